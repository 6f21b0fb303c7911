//! A database that version 1 left behind: it opens, and everything in it goes on.

#![allow(clippy::unwrap_used, clippy::panic)]

use hmac::{Hmac, KeyInit, Mac};
use keyward_core::audit::{self, ChainKey, Entry, Event, Verifier};
use keyward_core::edge::{AdmitAnswer, AdmitRequest, Ask, EdgeChain, EdgeKey, Outcome, Plan, RequestId, Settlement, VmId};
use keyward_core::limits::Window;
use keyward_core::refusal::Code;
use keyward_core::token::VirtualKey;
use keyward_core::usage::Usage;
use keyward_policy_service::service::access::Principal;
use keyward_policy_service::service::{Admitted, ORGANISATION, Roots};
use keyward_policy_service::vault::{Vault, credential_aad};
use keyward_policy_service::{Config, Running, start};
use rusqlite::{Connection, params};
use sha2::{Digest, Sha256};
use std::path::Path;
use std::time::Duration;

const ORIGIN: &str = "old";
const SECRET: &str = "sk-proj-Old5Ht3Rk8Wq2Zy7Mn4Vb9Xc1Lp6Js0D";
const ADMIN: &str = "kwa_1111111111111111111111111111111111111111111111111111111111111111";
const VM: VmId = VmId([9; 16]);
/// Hold of the request that is under way.
const HOLD: i64 = 750_000;

fn token(n: u8) -> VirtualKey {
    VirtualKey::generate([n; 32])
}

fn stored(roots: &Roots, token: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(&roots.pepper).unwrap();
    mac.update(&Sha256::digest(token));
    mac.finalize().into_bytes().into()
}

/// A chain as version 1 wrote it: its end.
fn chain(db: &Connection, roots: &Roots, key: &str, events: Vec<Event>) -> (i64, [u8; 32]) {
    let (mut seq, mut mac) = (0, audit::genesis(ORIGIN, key));
    for event in events {
        seq += 1;
        let entry = Entry { epoch: 0, seq, time_ms: 1_000 + seq, organisation: ORGANISATION.to_owned(), key_id: key.to_owned(), event };
        let bytes = entry.encode();
        mac = ChainKey::derive(&roots.audit_seed, ORIGIN, key, 0).link(&mac, &bytes);
        let insert = "INSERT INTO audit (key_id, seq, entry, mac) VALUES (?1, ?2, ?3, ?4)";
        db.execute(insert, params![key, i64::try_from(seq).unwrap(), bytes, mac]).unwrap();
    }
    (i64::try_from(seq).unwrap(), mac)
}

fn admitted(req: u8) -> Event {
    Event::Admitted(audit::Admitted {
        req: [req; 16],
        vm: VM.0,
        node: "n".to_owned(),
        provider: "openai".to_owned(),
        endpoint: "POST /v1/chat/completions".to_owned(),
        model: "gpt-4o".to_owned(),
        stream: false,
        bytes: 100,
        clamp: u64::MAX,
        choices: 1,
        hold: HOLD,
        rev: 1,
        credentials: vec!["cred_old".to_owned()],
    })
}

/// What a version 1 had after some use: three keys (one revoked), a request under way, a credential, an admin token.
fn version_1(data: &Path) -> Roots {
    let vault = Vault::from_file(&data.join("kek")).unwrap();
    let roots = Roots::load(&vault, &data.join("root")).unwrap();
    keyward_policy_service::files::create(&data.join("origin"), ORIGIN).unwrap();
    keyward_policy_service::files::create(&data.join("bootstrapped"), "").unwrap();
    let db = Connection::open(data.join("keyward.db")).unwrap();
    db.pragma_update(None, "journal_mode", "WAL").unwrap();
    // Frozen as it was: it must not change when the schema does.
    db.execute_batch(include_str!("version-1.sql")).unwrap();
    let made = || Event::KeyCreated { actor: "admin adt_old".to_owned(), detail: "{}".to_owned() };
    let keys = [
        ("key_a", 1, "active", Some(10_000_000), vec![made(), admitted(1)]),
        ("key_b", 2, "active", None, vec![made()]),
        ("key_c", 3, "revoked", None, vec![made(), Event::KeyRevoked { actor: "admin adt_old".to_owned() }]),
    ];
    for (id, n, status, cap, events) in keys {
        let (seq, mac) = chain(&db, &roots, id, events);
        let held = if id == "key_a" { (5_000, HOLD, 1) } else { (0, 0, 0) };
        db.execute(
            "INSERT INTO keys (id, token_hash, organisation, label, allow, status, created_ms, cap, spent, reserved, in_flight, chain_seq, chain_mac)
             VALUES (?1, ?2, 'org_default', ?1, ?3, ?4, 1000, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                id,
                stored(&roots, token(n).reveal().as_bytes()),
                r#"{"models":["gpt-4o*"],"endpoints":[]}"#,
                status,
                cap,
                held.0,
                held.1,
                held.2,
                seq,
                mac
            ],
        )
        .unwrap();
    }
    db.execute(
        "INSERT INTO requests (req, key_id, state, fingerprint, provider, model, stream, choices, hold, hold_input, expires_ms)
         VALUES (?1, 'key_a', 0, x'', 'openai', 'gpt-4o', 0, 1, ?2, 250000, ?3)",
        params![[1u8; 16], HOLD, i64::MAX],
    )
    .unwrap();
    let sealed = vault.seal(SECRET.as_bytes(), &credential_aad(ORGANISATION, "cred_old", 1)).unwrap();
    let insert = "INSERT INTO credentials VALUES ('cred_old', 'openai', 'main', 'cred_old', 1, ?1, 1000)";
    db.execute(insert, params![sealed]).unwrap();
    let insert = "INSERT INTO admin_tokens (id, token_hash, role, created_ms) VALUES ('adt_old', ?1, 'admin', 1000)";
    db.execute(insert, params![stored(&roots, ADMIN.as_bytes())]).unwrap();
    db.execute("INSERT INTO vms (vm, seq, mac, seen_ms) VALUES (?1, 0, ?2, 1)", params![VM.0, [0u8; 32]]).unwrap();
    roots
}

async fn service(data: &Path) -> Running {
    let loopback = "127.0.0.1:0".parse().unwrap();
    let hold_ttl = Duration::from_secs(60);
    start(Config { data: data.to_owned(), edge: loopback, admin: loopback, origin: ORIGIN.to_owned(), hold_ttl, kek: None }).await.unwrap()
}

async fn ask(running: &Running, token: &VirtualKey, req: u8) -> Result<Plan, Code> {
    let ask = Ask {
        provider: "openai".to_owned(),
        endpoint: "POST /v1/chat/completions".to_owned(),
        model: Some("gpt-4o".to_owned()),
        bytes: 100,
        max_tokens: Some(50),
        choices: 1,
        ..Ask::default()
    };
    let request =
        AdmitRequest { req: RequestId([req; 16]), vm: VM, node: "n".to_owned(), token: token.hash().0, need_key: false, trace: None, ask };
    match running.service.admit(request).await {
        Admitted::Answer(answer) => {
            let AdmitAnswer { plan, refusal, .. } = *answer;
            plan.ok_or_else(|| refusal.unwrap().code)
        }
        Admitted::Conflict => panic!("a conflict"),
    }
}

/// A key's chain from its first entry, made by version 1, to its last.
async fn events(running: &Running, roots: &Roots, who: &Principal, key: &str) -> Vec<&'static str> {
    let mut verifier = Verifier::new(ORIGIN, key, |epoch| Some(ChainKey::derive(&roots.audit_seed, ORIGIN, key, epoch)));
    let rows = running.service.audit(who, key, 1, 1_000).await.unwrap();
    rows.iter().map(|row| verifier.entry(&row.entry, &row.mac).unwrap().event.name()).collect()
}

#[tokio::test]
async fn a_database_of_version_1_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let roots = version_1(directory.path());
    let running = service(directory.path()).await;
    assert!(running.bootstrap.is_none());
    let who = running.service.principal(ADMIN).await.unwrap().unwrap();
    assert_eq!((who.token_id.as_str(), who.organisation.as_str()), ("adt_old", ORGANISATION));

    // Keys: what they may, what they have spent, what they hold.
    let key = running.service.key(&who, "key_a").await.unwrap();
    let total = key.account.sums(Window::Total);
    assert_eq!((total.spent.0, total.reserved.0, key.account.in_flight, key.version, key.team), (5_000, HOLD, 1, 1, None));
    assert_eq!(key.limits.budget(Window::Total).map(|cap| cap.0), Some(10_000_000));
    assert_eq!(running.service.keys(&who, None, "", 10).await.unwrap().len(), 3);
    for (n, req) in [(1, 2), (2, 3)] {
        let plan = ask(&running, &token(n), req).await.unwrap();
        let credential = &plan.targets[0].credentials[0];
        assert_eq!((credential.id.as_str(), credential.secret.0.as_str()), ("cred_old", SECRET));
    }
    assert_eq!(ask(&running, &token(3), 4).await.unwrap_err(), Code::Revoked);
    assert_eq!(ask(&running, &token(4), 5).await.unwrap_err(), Code::UnknownKey);

    // The request that was under way ends, once.
    let mut vm = EdgeChain::new(VM, &EdgeKey::derive(&roots.edge_master, VM)).unwrap();
    let usage = Some(Usage { input: 10, output: 20, ..Usage::default() });
    let settlement = Settlement {
        req: RequestId([1; 16]),
        outcome: Outcome::Complete,
        ended: None,
        sent: true,
        status: Some(200),
        usage,
        input: None,
        visible: None,
        beyond: false,
        tries: Vec::new(),
        created: Vec::new(),
        deleted: None,
        ms: 1,
        at: 1,
    };
    let line = vm.seal(&settlement).line();
    for _ in 0..2 {
        assert_eq!(running.service.take_records([line.as_str()].into_iter()).await.unwrap(), (1, 0));
    }
    assert_eq!(running.service.key(&who, "key_a").await.unwrap().account.sums(Window::Total).spent.0, 5_000 + 225_000);

    // What version 1 did not know works on what it made: rotation, change, another name for the credential.
    let (_, new) = running.service.rotate_key(&who, "key_b", None, "0s").await.unwrap();
    assert_eq!(ask(&running, &token(2), 6).await.unwrap_err(), Code::Revoked);
    assert!(ask(&running, &new, 7).await.is_ok());
    let organisation = running.service.organisation(ORGANISATION).unwrap();
    assert_eq!(organisation.document.credentials["cred_old"].label, "main");
    running.stop().await;

    // A second start finds nothing to migrate, and the chains are whole from their first entry on.
    let running = service(directory.path()).await;
    assert!(ask(&running, &new, 8).await.is_ok());
    assert_eq!(events(&running, &roots, &who, "key_a").await, ["KEY_CREATED", "ADMITTED", "ADMITTED", "SETTLED"]);
    assert_eq!(
        events(&running, &roots, &who, "key_b").await,
        ["KEY_CREATED", "ADMITTED", "KEY_CHANGED", "REFUSED", "ADMITTED", "ADMITTED"]
    );
    assert_eq!(events(&running, &roots, &who, "key_c").await, ["KEY_CREATED", "KEY_REVOKED", "REFUSED"]);
    running.stop().await;
    let db = Connection::open(directory.path().join("keyward.db")).unwrap();
    let text: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(text, "ok");
    assert!(!db.prepare("PRAGMA foreign_key_check").unwrap().exists([]).unwrap());
}
