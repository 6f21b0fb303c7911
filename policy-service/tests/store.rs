//! What every store must do. A second store joins by giving another `open`.

#![allow(clippy::unwrap_used, clippy::panic)]

use keyward_core::admission::{Allow, Status};
use keyward_core::audit::{Entry, Event, Verifier};
use keyward_core::edge::{AdmitRequest, Ask, EdgeChain, EdgeKey, Outcome, RequestId, Settlement, Try, VmId};
use keyward_core::money::Nanodollars;
use keyward_core::price::PriceTable;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::usage::Usage;
use keyward_policy_service::config::Kind;
use keyward_policy_service::directory::Directory;
use keyward_policy_service::store::sqlite::SqliteStore;
use keyward_policy_service::store::{
    Admission, Admit, CredentialRow, Edit, Edited, Edits, Expect, KeyOutcome, KeyRow, KeyUpdate, LedgerKeys, NewKey, Rotation, Settle,
    Store, UsageBy, UsageQuery, admin_chain,
};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

const TTL: u64 = 1_000;
const VM: VmId = VmId([7; 16]);

const ORG: &str = "org_default";

struct Bed {
    store: Arc<SqliteStore>,
    directory: tempfile::TempDir,
    chain: EdgeChain,
}

fn ledger_keys() -> LedgerKeys {
    LedgerKeys { origin: "test".to_owned(), audit_seed: [5; 32], prices: PriceTable::built_in().unwrap() }
}

impl Bed {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("db"), ledger_keys()).unwrap());
        assert!(store.create_organisation(ORG, "", "test", 1).await.unwrap());
        let bed = Bed { store, directory, chain: EdgeChain::new(VM, &EdgeKey::derive(&[1; 32], VM)).unwrap() };
        bed.edit(vec![credential("cred_a", "openai", Expect::Absent)]).await;
        bed
    }

    async fn edit(&self, edits: Vec<Edit>) -> Edited {
        let edits = Edits { organisation: ORG.to_owned(), edits, expect_rev: None, actor: "test".to_owned(), now_ms: 1 };
        self.store.edit(edits).await.unwrap()
    }

    async fn directory(&self) -> Arc<Directory> {
        Arc::new(self.store.directory().await.unwrap())
    }

    /// Stops the store and opens it again, as a restart does.
    fn restart(&mut self) {
        self.store.close();
        self.store = Arc::new(SqliteStore::open(&self.directory.path().join("db"), ledger_keys()).unwrap());
    }

    async fn key(&self, n: u8, cap: Option<i64>) -> KeyRow {
        self.key_with(n, cap, Allow::default()).await
    }

    async fn key_with(&self, n: u8, cap: Option<i64>, allow: Allow) -> KeyRow {
        let row = KeyRow {
            id: format!("key_{n}"),
            organisation: ORG.to_owned(),
            team: None,
            policy: None,
            label: String::new(),
            allow,
            tags: BTreeMap::new(),
            personal: None,
            version: 1,
            status: Status::Active,
            created_ms: 1,
            expires_ms: None,
            cap: cap.map(Nanodollars),
            spent: Nanodollars::ZERO,
            reserved: Nanodollars::ZERO,
            in_flight: 0,
        };
        done(self.store.create_key(new_key(row, n)).await.unwrap())
    }

    async fn state(&self, n: u8) -> KeyRow {
        self.store.key(ORG, &format!("key_{n}")).await.unwrap().unwrap()
    }

    async fn admit(&self, key: u8, req: u8, max: u64, now: u64) -> Admission {
        self.decide(admit(key, req, max, now)).await
    }

    async fn decide(&self, asked: Admit) -> Admission {
        self.store.admit(Admit { directory: self.directory().await, ..asked }).await.unwrap()
    }

    async fn settle(&mut self, settlement: Settlement, now: u64) -> keyward_policy_service::store::Settled {
        let record = self.chain.seal(&settlement);
        self.store.settle(vec![Settle { record, settlement }], now).await.unwrap()
    }

    async fn events(&self, n: u8) -> Vec<Entry> {
        let id = format!("key_{n}");
        let mut verifier = Verifier::new("test", &id, |epoch| Some(ledger_keys().chain_key(&id, epoch)));
        let rows = self.store.audit(&id, 1, 10_000).await.unwrap();
        rows.iter().map(|row| verifier.entry(&row.entry, &row.mac).unwrap()).collect()
    }

    async fn names(&self, n: u8) -> Vec<&'static str> {
        self.events(n).await.iter().map(|entry| entry.event.name()).collect()
    }
}

fn admit(key: u8, req: u8, max: u64, now: u64) -> Admit {
    let ask = Ask {
        provider: "openai".to_owned(),
        endpoint: "POST /v1/chat/completions".to_owned(),
        model: Some("gpt-4o".to_owned()),
        bytes: 100,
        max_tokens: Some(max),
        choices: 1,
        ..Ask::default()
    };
    let request = AdmitRequest { req: RequestId([req; 16]), vm: VM, node: "n".to_owned(), token: [0; 32], need_key: false, ask };
    Admit { token_hash: [key; 32], request, directory: Arc::default(), now_ms: now, expires_ms: now + TTL, patient: false }
}

fn new_key(row: KeyRow, n: u8) -> NewKey {
    NewKey { row, token_hash: [n; 32], salt: [n; 16], actor: "test".to_owned(), max_keys: None }
}

fn done(outcome: KeyOutcome) -> KeyRow {
    match outcome {
        KeyOutcome::Done(row) => *row,
        other => panic!("{other:?}"),
    }
}

fn credential(name: &str, provider: &str, expect: Expect) -> Edit {
    let row = CredentialRow {
        id: name.to_owned(),
        organisation: ORG.to_owned(),
        name: name.to_owned(),
        provider: provider.to_owned(),
        label: String::new(),
        account: name.to_owned(),
        source: None,
        version: 1,
        sealed: vec![1],
        created_ms: 1,
    };
    Edit::PutCredential { row, managed: false, expect }
}

fn put(kind: Kind, name: &str, body: serde_json::Value, expect: Expect) -> Edit {
    Edit::Put { kind, name: name.to_owned(), body: body.to_string(), managed: false, expect }
}

fn delete(kind: Kind, name: &str) -> Edit {
    Edit::Delete { kind, name: name.to_owned(), expect: Expect::Anything }
}

fn settlement(req: u8, outcome: Outcome, usage: Option<(u64, u64)>) -> Settlement {
    Settlement {
        req: RequestId([req; 16]),
        outcome,
        ended: None,
        sent: outcome != Outcome::Void,
        status: Some(200),
        usage: usage.map(|(input, output)| Usage { input, output, ..Usage::default() }),
        input: None,
        visible: None,
        tries: Vec::new(),
        created: Vec::new(),
        deleted: None,
        ms: 1,
        at: 1,
    }
}

/// 100 bytes of input at 2,500 and `max` tokens of output at 10,000 nanodollars.
fn hold_of(max: u64) -> i64 {
    100 * 2_500 + i64::try_from(max).unwrap() * 10_000
}

#[tokio::test]
async fn a_request_is_held_then_charged_what_it_cost() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    assert!(matches!(bed.admit(1, 1, 50, 10).await, Admission::Admitted(a) if a.hold.total.0 == hold_of(50)));
    let held = bed.state(1).await;
    assert_eq!((held.reserved.0, held.in_flight, held.spent.0), (hold_of(50), 1, 0));
    let done = bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 20).await;
    assert_eq!((done.charged, done.nanodollars), (1, 225_000));
    let state = bed.state(1).await;
    assert_eq!((state.reserved.0, state.in_flight, state.spent.0), (0, 0, 225_000));
    let again = bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 30).await;
    assert_eq!((again.charged, again.repeated, bed.state(1).await.spent.0), (0, 1, 225_000), "a repeated record changes nothing");
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "SETTLED"]);
}

#[tokio::test]
async fn a_replay_gets_the_same_answer_and_anything_else_a_conflict() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.key(2, None).await;
    let first = bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.admit(1, 1, 50, 11).await, first);
    assert_eq!(bed.state(1).await.in_flight, 1, "the replay holds nothing more");
    assert_eq!(bed.admit(1, 1, 51, 12).await, Admission::Conflict, "other content");
    assert_eq!(bed.admit(2, 1, 50, 12).await, Admission::Conflict, "another key");
    bed.settle(settlement(1, Outcome::Complete, Some((1, 1))), 13).await;
    assert_eq!(bed.admit(1, 1, 50, 14).await, Admission::Conflict, "after its end");
}

#[tokio::test]
async fn a_void_releases_and_one_that_comes_first_refuses() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    bed.settle(settlement(1, Outcome::Void, None), 11).await;
    let state = bed.state(1).await;
    assert_eq!((state.spent.0, state.reserved.0, state.in_flight), (0, 0, 0));
    bed.settle(settlement(2, Outcome::Void, None), 12).await;
    assert!(matches!(bed.admit(1, 2, 50, 13).await, Admission::Refused(r) if r.code == Code::PolicyUnavailable));
    assert_eq!(bed.state(1).await.in_flight, 0);
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "VOIDED", "REFUSED"]);
}

#[tokio::test]
async fn an_expired_hold_is_charged_and_a_late_settlement_lowers_it() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.store.expire(10 + TTL - 1).await.unwrap().holds, 0);
    assert_eq!(bed.store.expire(10 + TTL).await.unwrap().holds, 1);
    let state = bed.state(1).await;
    assert_eq!((state.spent.0, state.reserved.0, state.in_flight), (hold_of(50), 0, 0));
    bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 5_000).await;
    assert_eq!(bed.state(1).await.spent.0, 225_000);
    bed.settle(settlement(1, Outcome::Void, None), 6_000).await;
    assert_eq!(bed.state(1).await.spent.0, 225_000, "what has settled stays settled");
}

#[tokio::test]
async fn a_cost_above_its_hold_is_charged_whole_and_freezes_the_key() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    let done = bed.settle(settlement(1, Outcome::Complete, Some((100, 1_000))), 11).await;
    assert_eq!(done.frozen, 1);
    let state = bed.state(1).await;
    assert_eq!((state.status, state.spent.0), (Status::Frozen, hold_of(1_000)));
    assert!(matches!(bed.admit(1, 2, 50, 12).await, Admission::Refused(r) if r.code == Code::CapExhausted));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "SETTLED", "KEY_FROZEN", "REFUSED"]);
}

#[tokio::test]
async fn unknown_keys_leave_no_trace_and_revoked_ones_a_refusal() {
    let bed = Bed::new().await;
    assert!(matches!(bed.admit(9, 1, 50, 10).await, Admission::Refused(r) if r.code == Code::UnknownKey));
    bed.key(1, None).await;
    assert_eq!(done(bed.store.revoke_key(ORG, "key_1", None, "test", 11).await.unwrap()).status, Status::Revoked);
    done(bed.store.revoke_key(ORG, "key_1", None, "test", 12).await.unwrap());
    assert_eq!(bed.store.revoke_key(ORG, "key_2", None, "test", 12).await.unwrap(), KeyOutcome::Missing);
    assert_eq!(bed.store.revoke_key("org_other", "key_1", None, "test", 12).await.unwrap(), KeyOutcome::Missing, "another organisation's");
    assert!(matches!(bed.admit(1, 1, 50, 13).await, Admission::Refused(r) if r.code == Code::Revoked));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_REVOKED", "REFUSED"]);
}

#[tokio::test]
async fn no_credential_means_no_admission() {
    let bed = Bed::new().await;
    bed.key(1, None).await;
    assert_eq!(bed.edit(vec![delete(Kind::Credential, "cred_a")]).await, Edited::Done(2));
    assert!(matches!(bed.admit(1, 1, 50, 10).await, Admission::Refused(r) if r.code == Code::PoolExhausted));
    assert_eq!(bed.state(1).await.in_flight, 0);
}

#[tokio::test]
async fn missing_and_changed_records_of_a_vm_show() {
    let mut bed = Bed::new().await;
    bed.key(1, None).await;
    bed.admit(1, 1, 50, 10).await;
    bed.admit(1, 2, 50, 10).await;
    bed.settle(settlement(1, Outcome::Complete, Some((1, 1))), 11).await;
    // Two records are sealed and never sent.
    bed.chain.seal(&settlement(3, Outcome::Void, None));
    bed.chain.seal(&settlement(4, Outcome::Void, None));
    assert_eq!(bed.settle(settlement(2, Outcome::Complete, Some((1, 1))), 12).await.gaps, 2);
}

/// Many admissions at once share commits, and the cap holds among them.
#[tokio::test(flavor = "multi_thread")]
async fn the_cap_holds_among_concurrent_admissions() {
    let bed = Bed::new().await;
    bed.key(1, Some(hold_of(50) * 10)).await;
    let directory = bed.directory().await;
    let tasks: Vec<_> = (0..200u8)
        .map(|n| {
            tokio::spawn({
                let (store, directory) = (bed.store.clone(), directory.clone());
                async move { store.admit(Admit { directory, ..admit(1, n, 50, 10) }).await.unwrap() }
            })
        })
        .collect();
    let mut held = 0;
    for task in tasks {
        if let Admission::Admitted(admitted) = task.await.unwrap() {
            held += admitted.hold.total.0;
        }
    }
    let state = bed.state(1).await;
    assert_eq!(state.reserved.0, held);
    assert!(held <= hold_of(50) * 10 && state.in_flight >= 10);
    bed.events(1).await;
}

#[tokio::test]
async fn a_rotated_key_is_the_same_key_with_two_tokens_for_a_while() {
    let bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    let rotation = Rotation {
        organisation: ORG.to_owned(),
        id: "key_1".to_owned(),
        expect: Some(1),
        token_hash: [101; 32],
        overlap_until_ms: 100,
        actor: "test".to_owned(),
        now_ms: 20,
    };
    assert_eq!(done(bed.store.rotate_key(rotation.clone()).await.unwrap()).version, 2);
    assert_eq!(bed.store.rotate_key(rotation).await.unwrap(), KeyOutcome::Stale(2), "read at version 1");
    assert!(matches!(bed.admit(1, 1, 50, 99).await, Admission::Admitted(_)), "the old token in the overlap");
    assert!(matches!(bed.admit(101, 2, 50, 99).await, Admission::Admitted(a) if a.key_id == "key_1"));
    assert!(matches!(bed.admit(1, 3, 50, 100).await, Admission::Refused(r) if r.code == Code::Revoked));
    assert!(matches!(bed.admit(101, 4, 50, 100).await, Admission::Admitted(_)));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_CHANGED", "ADMITTED", "ADMITTED", "REFUSED", "ADMITTED"]);
}

#[tokio::test]
async fn a_change_needs_the_version_that_was_read_and_leaves_the_money() {
    let bed = Bed::new().await;
    let row = bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    let personal = Some(BTreeMap::from([("email".to_owned(), "ada@example.com".to_owned())]));
    let change = KeyRow { label: "new".to_owned(), personal, spent: Nanodollars(7), ..row.clone() };
    let update = |row: &KeyRow| KeyUpdate { row: row.clone(), salt: [3; 16], actor: "test".to_owned(), now_ms: 30, max_keys: None };
    let now = done(bed.store.update_key(update(&change)).await.unwrap());
    assert_eq!((now.label.as_str(), now.version, now.spent.0, now.reserved.0), ("new", 2, 0, hold_of(50)));
    assert_eq!(bed.store.update_key(update(&change)).await.unwrap(), KeyOutcome::Stale(2));
    let chain = format!("{:?}", bed.events(1).await);
    assert!(chain.contains("personal_sha256") && !chain.contains("ada@example.com"), "{chain}");
    let nowhere = KeyRow { team: Some("none".to_owned()), ..now.clone() };
    assert!(matches!(bed.store.update_key(update(&nowhere)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    done(bed.store.revoke_key(ORG, "key_1", Some(2), "test", 40).await.unwrap());
    let revived = KeyRow { version: 3, status: Status::Active, ..now };
    assert!(matches!(bed.store.update_key(update(&revived)).await.unwrap(), KeyOutcome::Refused(_)), "revoked is for good");
}

#[tokio::test]
async fn edits_happen_together_or_not_at_all() {
    let bed = Bed::new().await;
    let pool = serde_json::json!({"provider": "openai", "credentials": ["cred_a"]});
    let policy = serde_json::json!({"pools": {"openai": "prod"}});
    let both = vec![put(Kind::Policy, "p", policy.clone(), Expect::Absent), put(Kind::Pool, "prod", pool.clone(), Expect::Absent)];
    assert_eq!(bed.edit(both.clone()).await, Edited::Done(2), "order within a change does not matter");
    assert_eq!(bed.edit(both).await, Edited::Exists);
    let with_a_bad_one = vec![
        put(Kind::Team, "t", serde_json::json!({}), Expect::Absent),
        put(Kind::Policy, "q", serde_json::json!({"pools": {"openai": "none"}}), Expect::Absent),
    ];
    assert!(matches!(bed.edit(with_a_bad_one).await, Edited::Invalid(faults) if faults[0].field == "policies.q.pools.openai"));
    assert!(bed.directory().await.organisations[ORG].document.teams.is_empty(), "the team went with it");
    assert!(matches!(bed.edit(vec![delete(Kind::Pool, "prod")]).await, Edited::Invalid(_)), "the policy needs it");
    assert!(matches!(bed.edit(vec![delete(Kind::Credential, "cred_a")]).await, Edited::Invalid(_)), "the pool needs it");
    assert_eq!(bed.edit(vec![put(Kind::Pool, "prod", pool.clone(), Expect::Version(9))]).await, Edited::Stale);
    assert_eq!(bed.edit(vec![delete(Kind::Pool, "other")]).await, Edited::Missing);
    let stale = Edits { organisation: ORG.to_owned(), edits: vec![], expect_rev: Some(1), actor: String::new(), now_ms: 1 };
    assert_eq!(bed.store.edit(stale).await.unwrap(), Edited::Stale);

    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Absent)]).await;
    let row = KeyRow { id: "key_9".to_owned(), team: Some("t".to_owned()), policy: Some("p".to_owned()), ..bed.key(1, None).await };
    let limited = |max| NewKey { max_keys: Some(max), ..new_key(row.clone(), 9) };
    assert!(matches!(bed.store.create_key(limited(0)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    done(bed.store.create_key(limited(1)).await.unwrap());
    assert!(matches!(bed.edit(vec![delete(Kind::Team, "t")]).await, Edited::InUse(_)));
    assert!(matches!(bed.edit(vec![delete(Kind::Policy, "p")]).await, Edited::InUse(_)));
    done(bed.store.revoke_key(ORG, "key_9", None, "test", 5).await.unwrap());
    assert!(matches!(bed.edit(vec![delete(Kind::Team, "t"), delete(Kind::Policy, "p")]).await, Edited::Done(_)));

    // Every change stands in the organisation's chain, refused ones don't.
    let id = admin_chain(ORG);
    let mut verifier = Verifier::new("test", &id, |epoch| Some(ledger_keys().chain_key(&id, epoch)));
    let rows = bed.store.audit(&id, 1, 1_000).await.unwrap();
    let told = |row: &keyward_policy_service::store::AuditRow| match verifier.entry(&row.entry, &row.mac).unwrap().event {
        Event::AdminChanged { action, target, .. } => format!("{action} {target}"),
        other => panic!("{other:?}"),
    };
    let told: Vec<String> = rows.iter().map(told).collect();
    assert_eq!(
        told,
        [
            "create organisations/org_default",
            "create credentials/cred_a",
            "create policies/p",
            "create pools/prod",
            "create teams/t",
            "delete teams/t",
            "delete policies/p"
        ]
    );
}

#[tokio::test]
async fn policy_team_and_route_decide_with_the_key() {
    let bed = Bed::new().await;
    bed.edit(vec![
        credential("cred_b", "openai", Expect::Absent),
        put(Kind::Pool, "b", serde_json::json!({"provider": "openai", "credentials": ["cred_b"]}), Expect::Absent),
        put(Kind::Policy, "p", serde_json::json!({"allow": {"models": ["gpt-4o", "fast"]}, "pools": {"openai": "b"}}), Expect::Absent),
        put(Kind::Team, "t", serde_json::json!({"allow": {"models": ["gpt-4*", "fast"]}}), Expect::Absent),
        put(Kind::Route, "fast", serde_json::json!({"targets": [{"provider": "openai", "model": "gpt-4o-mini"}]}), Expect::Absent),
    ])
    .await;
    let row = KeyRow { id: "key_5".to_owned(), team: Some("t".to_owned()), policy: Some("p".to_owned()), ..bed.key(1, None).await };
    done(bed.store.create_key(new_key(row, 5)).await.unwrap());
    let directory = bed.directory().await;
    let ask = |req: u8, model: &str| {
        let mut asked = Admit { directory: directory.clone(), ..admit(5, req, 50, 10) };
        asked.request.ask.model = Some(model.to_owned());
        bed.store.admit(asked)
    };
    let Admission::Admitted(plain) = ask(1, "gpt-4o").await.unwrap() else { panic!() };
    assert_eq!((plain.model.as_deref(), plain.credentials), (Some("gpt-4o"), vec!["cred_b".to_owned()]), "the policy's pool");
    let Admission::Admitted(routed) = ask(2, "fast").await.unwrap() else { panic!() };
    assert_eq!((routed.model.as_deref(), routed.rev), (Some("gpt-4o-mini"), 2));
    assert!(matches!(ask(3, "gpt-4.1").await.unwrap(), Admission::Refused(r) if r.code == Code::ModelNotAllowed), "the policy says no");
    bed.edit(vec![put(Kind::Provider, "openai", serde_json::json!({"enabled": false}), Expect::Absent)]).await;
    assert!(matches!(bed.admit(5, 4, 50, 10).await, Admission::Refused(r) if r.code == Code::UnknownProvider));
}

#[tokio::test]
async fn usage_adds_up_by_day_key_and_model() {
    const DAY: u64 = 86_400_000;
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.key(2, None).await;
    for (req, key, now) in [(1, 1, 10), (2, 1, 20), (3, 2, DAY + 10), (4, 1, DAY + 20)] {
        bed.admit(key, req, 50, now).await;
    }
    bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 30).await;
    bed.settle(settlement(2, Outcome::Void, None), 30).await;
    bed.settle(settlement(3, Outcome::Complete, Some((1, 2))), DAY + 30).await;
    bed.store.expire(DAY + 20 + TTL).await.unwrap();
    bed.settle(settlement(4, Outcome::Complete, Some((4, 0))), DAY + 5_000).await;
    let query =
        |by: &[UsageBy]| UsageQuery { organisation: ORG.to_owned(), to_day: 9, by: by.to_vec(), limit: 100, ..UsageQuery::default() };
    let by = |by: &'static [UsageBy]| async { bed.store.usage(query(by)).await.unwrap() };
    let all = by(&[]).await;
    assert_eq!((all[0].requests, all[0].input, all[0].output, all[0].nanodollars), (4, 15, 22, 225_000 + 22_500 + 10_000));
    let days: Vec<_> = by(&[UsageBy::Day, UsageBy::Key]).await.into_iter().map(|row| (row.by, row.nanodollars)).collect();
    let text = |day: &str, key: &str| vec![day.to_owned(), key.to_owned()];
    assert_eq!(days, [(text("0", "key_1"), 225_000), (text("1", "key_1"), 10_000), (text("1", "key_2"), 22_500)]);
    let after = UsageQuery { after: text("0", "key_2"), limit: 1, ..query(&[UsageBy::Day, UsageBy::Key]) };
    let next: Vec<_> = bed.store.usage(after).await.unwrap().into_iter().map(|row| row.by).collect();
    assert_eq!(next, [text("1", "key_1")], "a page goes on after a place, whether or not that place is still taken");
    let spent = bed.state(1).await.spent.0 + bed.state(2).await.spent.0;
    assert_eq!(all[0].nanodollars, spent, "the days' sums are what the keys spent");
}

/// A settlement that names what the provider made.
fn created(req: u8, ids: &[&str], credential: &str) -> Settlement {
    Settlement {
        created: ids.iter().map(|id| (*id).to_owned()).collect(),
        tries: vec![Try { credential: credential.to_owned(), status: Some(200), ms: 1 }],
        ..settlement(req, Outcome::Complete, Some((1, 1)))
    }
}

/// An admission that refers to objects, on a service with two credentials.
fn referring(key: u8, req: u8, refs: &[&str]) -> Admit {
    let mut admit = admit(key, req, 50, 100);
    admit.request.ask.refs = refs.iter().map(|id| (*id).to_owned()).collect();
    admit
}

fn refused(admission: Admission) -> Refusal {
    match admission {
        Admission::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_object_is_its_makers_own_and_pins_the_credential() {
    let mut bed = Bed::new().await;
    bed.edit(vec![credential("cred_b", "openai", Expect::Absent)]).await;
    bed.key(1, None).await;
    bed.key(2, None).await;
    bed.admit(1, 1, 50, 10).await;
    bed.settle(created(1, &["resp_1", "msg_1"], "cred_b"), 11).await;

    let first = bed.decide(referring(1, 2, &["resp_1", "msg_1"])).await;
    assert!(matches!(&first, Admission::Admitted(a) if a.credentials == ["cred_b"]), "{first:?}");
    assert_eq!(bed.decide(referring(1, 2, &["resp_1", "msg_1"])).await, first, "a replay gets the same");
    let last = bed.events(1).await.pop().unwrap();
    assert!(matches!(last.event, Event::Admitted(a) if a.credentials == ["cred_b"]), "the chain names what was handed out");

    let anothers = refused(bed.decide(referring(2, 3, &["resp_1"])).await);
    let nobodys = refused(bed.decide(referring(2, 4, &["resp_9"])).await);
    assert_eq!(anothers, nobodys, "nothing tells whether it exists");
    assert_eq!(anothers.code, Code::StateNotOwned);
    assert_eq!(refused(bed.decide(referring(1, 5, &["resp_1", "resp_9"])).await).code, Code::StateNotOwned);
    assert_eq!(bed.names(2).await, ["KEY_CREATED", "REFUSED", "REFUSED"]);
    assert_eq!(bed.state(2).await.in_flight, 0);
}

#[tokio::test]
async fn an_object_outlives_a_restart_and_not_its_deletion() {
    let mut bed = Bed::new().await;
    bed.key(1, None).await;
    bed.key(2, None).await;
    bed.admit(1, 1, 50, 10).await;
    bed.settle(created(1, &["resp_1"], "cred_a"), 11).await;
    bed.restart();
    // Another key can neither take it over nor delete it.
    bed.admit(2, 2, 50, 12).await;
    let theft = Settlement { deleted: Some("resp_1".to_owned()), ..created(2, &["resp_1"], "cred_a") };
    bed.settle(theft, 13).await;
    assert!(matches!(bed.decide(referring(1, 3, &["resp_1"])).await, Admission::Admitted(_)));
    assert_eq!(refused(bed.decide(referring(2, 4, &["resp_1"])).await).code, Code::StateNotOwned);
    let deleted = Settlement { deleted: Some("resp_1".to_owned()), ..settlement(3, Outcome::Complete, None) };
    bed.settle(deleted, 14).await;
    assert_eq!(refused(bed.decide(referring(1, 5, &["resp_1"])).await).code, Code::StateNotOwned);
}

#[tokio::test]
async fn objects_that_no_single_credential_reaches_are_refused() {
    let mut bed = Bed::new().await;
    bed.edit(vec![credential("cred_b", "openai", Expect::Absent)]).await;
    bed.key(1, None).await;
    for (req, id, credential) in [(1, "resp_a", "cred_a"), (2, "resp_b", "cred_b"), (3, "resp_gone", "cred_gone")] {
        bed.admit(1, req, 50, 10).await;
        bed.settle(created(req, &[id], credential), 11).await;
    }
    assert_eq!(refused(bed.decide(referring(1, 4, &["resp_a", "resp_b"])).await).code, Code::StateNotOwned);
    assert_eq!(refused(bed.decide(referring(1, 5, &["resp_gone"])).await).code, Code::PoolExhausted);
}

/// The record of an answer may come after its caller's next request.
#[tokio::test]
async fn what_is_in_flight_may_have_made_it() {
    let mut bed = Bed::new().await;
    bed.key(1, None).await;
    let patient = |req| Admit { patient: true, ..referring(1, req, &["resp_1"]) };
    assert_eq!(refused(bed.decide(patient(9)).await).code, Code::StateNotOwned, "nothing is in flight");
    bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.decide(patient(2)).await, Admission::NotYet);
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "REFUSED", "ADMITTED"], "nothing is written while it waits");
    bed.settle(created(1, &["resp_1"], "cred_a"), 11).await;
    assert!(matches!(bed.decide(patient(2)).await, Admission::Admitted(_)));
}

#[tokio::test]
async fn state_at_a_provider_needs_the_policys_word() {
    let bed = Bed::new().await;
    bed.key(1, None).await;
    let allow = Allow { state: true, ..Allow::default() };
    bed.key_with(2, None, allow).await;
    let keeps = |key, req| {
        let mut admit = admit(key, req, 50, 100);
        admit.request.ask.keeps = true;
        admit
    };
    assert_eq!(refused(bed.decide(keeps(1, 1)).await).code, Code::StateNotOwned);
    let Admission::Admitted(admitted) = bed.decide(keeps(2, 2)).await else { panic!() };
    assert!(admitted.state);
}

#[tokio::test]
async fn models_are_answered_without_a_provider() {
    let bed = Bed::new().await;
    let allow = Allow { models: vec!["gpt-4o".to_owned()], ..Allow::default() };
    bed.key_with(1, Some(0), allow).await;
    let mut asked = admit(1, 1, 50, 10);
    asked.request.ask = Ask { provider: "openai".to_owned(), endpoint: "GET /v1/models".to_owned(), ..Ask::default() };
    let Admission::Admitted(listed) = bed.decide(asked.clone()).await else { panic!() };
    assert_eq!(listed.hold.total, Nanodollars::ZERO);
    assert_eq!(listed.answer.unwrap(), r#"{"data":[{"created":0,"id":"gpt-4o","object":"model","owned_by":"openai"}],"object":"list"}"#);
    asked.request.req = RequestId([2; 16]);
    bed.edit(vec![delete(Kind::Credential, "cred_a")]).await;
    let Admission::Admitted(listed) = bed.decide(asked).await else { panic!() };
    assert_eq!(listed.answer.unwrap(), r#"{"data":[],"object":"list"}"#, "what can't be reached is not listed");
}

/// A version that comes again would let a writer overwrite what it never read.
#[tokio::test]
async fn an_object_made_anew_has_a_version_of_its_own() {
    let bed = Bed::new().await;
    let version = async || bed.directory().await.organisations[ORG].meta(Kind::Team, "t").unwrap().version;
    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Absent)]).await;
    let first = version().await;
    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({"label": "x"}), Expect::Version(first))]).await;
    let second = version().await;
    bed.edit(vec![delete(Kind::Team, "t")]).await;
    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Anything)]).await;
    let third = version().await;
    assert!(first < second && second < third, "{first} {second} {third}");
    for stale in [first, second] {
        assert_eq!(bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Version(stale))]).await, Edited::Stale);
    }
    let absent = put(Kind::Team, "none", serde_json::json!({}), Expect::Present);
    assert_eq!(bed.edit(vec![absent]).await, Edited::Stale, "what must be there is not made");
}

#[tokio::test]
async fn a_key_that_comes_back_to_life_needs_a_place_in_its_team() {
    let bed = Bed::new().await;
    bed.edit(vec![put(Kind::Team, "t", serde_json::json!({}), Expect::Absent)]).await;
    let row = bed.key(1, None).await;
    let join = |row: &KeyRow, max| KeyUpdate { row: row.clone(), salt: [3; 16], actor: "test".to_owned(), now_ms: 50, max_keys: Some(max) };
    let member = KeyRow { team: Some("t".to_owned()), ..row };
    assert!(matches!(bed.store.update_key(join(&member, 0)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    let member = done(bed.store.update_key(join(&member, 1)).await.unwrap());
    let renamed = done(bed.store.update_key(join(&KeyRow { label: "x".to_owned(), ..member }, 0)).await.unwrap());
    let expired = done(bed.store.update_key(join(&KeyRow { expires_ms: Some(40), ..renamed }, 0)).await.unwrap());
    let revived = KeyRow { expires_ms: None, ..expired };
    assert!(matches!(bed.store.update_key(join(&revived, 0)).await.unwrap(), KeyOutcome::Refused(f) if f.field == "team"));
    done(bed.store.update_key(join(&revived, 1)).await.unwrap());
}

/// Erasing takes effect in the files, on keys that are revoked as well, and the chain still verifies.
#[tokio::test]
async fn erased_data_are_in_no_file() {
    let bed = Bed::new().await;
    let row = bed.key(1, None).await;
    let personal = Some(BTreeMap::from([("email".to_owned(), "ada@example.com".repeat(10))]));
    let tags = BTreeMap::from([("user".to_owned(), "ada".to_owned())]);
    let change = KeyRow { personal, tags, ..row };
    done(
        bed.store.update_key(KeyUpdate { row: change, salt: [3; 16], actor: "test".to_owned(), now_ms: 30, max_keys: None }).await.unwrap(),
    );
    let traces = || {
        let files = std::fs::read_dir(bed.directory.path()).unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap());
        files.filter(|bytes| bytes.windows(15).any(|w| w == b"ada@example.com")).count()
    };
    assert!(traces() > 0);
    done(bed.store.revoke_key(ORG, "key_1", Some(2), "test", 40).await.unwrap());
    assert_eq!(bed.store.erase_personal(ORG, "key_1", 2, "test", 50).await.unwrap(), KeyOutcome::Stale(3));
    let erased = done(bed.store.erase_personal(ORG, "key_1", 3, "test", 50).await.unwrap());
    assert_eq!((erased.personal, erased.tags.len(), erased.status), (None, 0, Status::Revoked));
    assert_eq!(traces(), 0);
    done(bed.store.erase_personal(ORG, "key_1", erased.version, "test", 60).await.unwrap());
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_CHANGED", "KEY_REVOKED", "KEY_CHANGED"], "twice is one entry");
}

#[derive(Debug, Clone)]
enum Step {
    Admit { key: u8, req: u8, max: u64 },
    Settle { req: u8, input: u64, output: u64 },
    Cut { req: u8 },
    Void { req: u8 },
    Wait { ms: u64 },
    Revoke { key: u8 },
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1u8..4, 0u8..60, 1u64..200).prop_map(|(key, req, max)| Step::Admit { key, req, max }),
        6 => (0u8..60, 0u64..100, 0u64..60).prop_map(|(req, input, output)| Step::Settle { req, input, output }),
        1 => (0u8..60).prop_map(|req| Step::Cut { req }),
        2 => (0u8..60).prop_map(|req| Step::Void { req }),
        2 => (0u64..700).prop_map(|ms| Step::Wait { ms }),
        1 => (3u8..4).prop_map(|key| Step::Revoke { key }),
        1 => Just(Step::Restart),
    ]
}

/// A second, plain reading of the ledger's rules.
#[derive(Default)]
struct Model {
    requests: HashMap<u8, (u8, i64, Option<i64>, u64)>,
    ended: HashMap<u8, bool>,
}

impl Model {
    fn spent(&self, key: u8) -> i64 {
        self.requests.values().filter(|r| r.0 == key).filter_map(|r| r.2).sum()
    }
    fn reserved(&self, key: u8) -> i64 {
        self.requests.values().filter(|r| r.0 == key && r.2.is_none()).map(|r| r.1).sum()
    }
}

const CAP: i64 = 12_000_000;

async fn play(steps: Vec<Step>) {
    let mut bed = Bed::new().await;
    for key in 1..4 {
        bed.key(key, Some(CAP)).await;
    }
    let (mut model, mut now) = (Model::default(), 10_000);
    for step in steps {
        match step {
            Step::Admit { key, req, max } => {
                let known = model.requests.contains_key(&req) || model.ended.contains_key(&req);
                match bed.admit(key, req, max, now).await {
                    Admission::Admitted(admitted) if !known => {
                        model.requests.insert(req, (key, admitted.hold.total.0, None, now + TTL));
                    }
                    Admission::Admitted(admitted) => {
                        assert_eq!(model.requests.get(&req).map(|r| (r.0, r.1, r.2)), Some((key, admitted.hold.total.0, None)))
                    }
                    Admission::Refused(_) | Admission::Conflict | Admission::NotYet => {}
                }
            }
            Step::Settle { req, input, output } => {
                bed.settle(settlement(req, Outcome::Complete, Some((input, output))), now).await;
                let cost = i64::try_from(input * 2_500 + output * 10_000).unwrap();
                end(&mut model, req, |_| cost);
            }
            Step::Cut { req } => {
                let cut = Settlement { status: None, ..settlement(req, Outcome::Cut, None) };
                bed.settle(cut, now).await;
                end(&mut model, req, |hold| hold);
            }
            Step::Void { req } => {
                bed.settle(settlement(req, Outcome::Void, None), now).await;
                end(&mut model, req, |_| 0);
            }
            Step::Wait { ms } => {
                now += ms;
                bed.store.expire(now).await.unwrap();
                for (_, hold, charge, expires) in model.requests.values_mut() {
                    if charge.is_none() && *expires <= now {
                        *charge = Some(*hold);
                    }
                }
            }
            Step::Revoke { key } => drop(bed.store.revoke_key(ORG, &format!("key_{key}"), None, "test", now).await.unwrap()),
            Step::Restart => bed.restart(),
        }
        for key in 1..4 {
            let state = bed.state(key).await;
            assert_eq!((state.spent.0, state.reserved.0), (model.spent(key), model.reserved(key)), "key {key}");
            assert!(state.status == Status::Frozen || state.spent.0 + state.reserved.0 <= CAP, "I1");
        }
    }
    for key in 1..4 {
        one_end_each(&bed.events(key).await);
    }
}

fn end(model: &mut Model, req: u8, charge: impl Fn(i64) -> i64) {
    if model.ended.insert(req, true).is_none()
        && let Some(request) = model.requests.get_mut(&req)
    {
        request.2 = Some(charge(request.1));
    }
}

/// I5: a request ends once; only an EXPIRED may be followed by what settles it after all.
fn one_end_each(entries: &[Entry]) {
    let mut ends: HashMap<[u8; 16], Vec<&str>> = HashMap::new();
    for entry in entries {
        if let Event::Settled(_) | Event::Voided { .. } | Event::Expired { .. } = entry.event {
            ends.entry(entry.event.request().unwrap()).or_default().push(entry.event.name());
        }
    }
    for (req, names) in ends {
        assert!(names.len() == 1 || (names.len() == 2 && names[0] == "EXPIRED"), "{req:?}: {names:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// I1 to I5 after every step of any history, against a plain reference ledger.
    #[test]
    fn any_history_keeps_the_books(steps in proptest::collection::vec(step(), 1..120)) {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap().block_on(play(steps));
    }
}
