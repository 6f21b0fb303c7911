//! What every store must do. A second store joins by giving another `open`.

#![allow(clippy::unwrap_used, clippy::panic)]

use keyward_core::admission::{Allow, Status};
use keyward_core::audit::{Entry, Event, Verifier};
use keyward_core::edge::{AdmitRequest, Ask, EdgeChain, EdgeKey, Outcome, RequestId, Settlement, Try, VmId};
use keyward_core::limits::{Account, Budget, Enforce, Limits, Moment, Window};
use keyward_core::money::Nanodollars;
use keyward_core::price::PriceTable;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::usage::Usage;
use keyward_policy_service::config::Kind;
use keyward_policy_service::directory::Directory;
use keyward_policy_service::prices::AdmittedPrices;
use keyward_policy_service::store::sqlite::SqliteStore;
use keyward_policy_service::store::{
    Admission, Admit, CredentialRow, Edit, Edited, Edits, Expect, KeyOutcome, KeyRow, KeyUpdate, LedgerKeys, NewKey, Rotation, Settle,
    Store, UsageBy, UsageQuery, admin_chain,
};
use std::collections::BTreeMap;
use std::sync::Arc;

mod configuration;
mod key_states;
mod keys;
mod limits;
mod model;
mod objects;
mod prices;
mod routes;

const TTL: u64 = 1_000;
const VM: VmId = VmId([7; 16]);

const ORG: &str = "org_default";

struct Bed {
    store: Arc<SqliteStore>,
    directory: tempfile::TempDir,
    chain: EdgeChain,
}

fn ledger_keys() -> LedgerKeys {
    LedgerKeys {
        origin: "test".to_owned(),
        audit_seed: [5; 32],
        prices: PriceTable::built_in().unwrap(),
        admitted: AdmittedPrices::default(),
    }
}

impl Bed {
    async fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap()).await
    }

    /// On a file system in memory, where there is one: for long histories.
    async fn quick() -> Self {
        Self::on(tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()).await
    }

    async fn on(directory: tempfile::TempDir) -> Self {
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
            limits: total(cap),
            enforce: Enforce::Enforce,
            account: Account::default(),
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
        self.store.settle(vec![Settle { record, settlement }], self.directory().await, Moment::at(now)).await.unwrap()
    }

    async fn expire(&self, now: u64) -> u64 {
        self.store.expire(Moment::at(now)).await.unwrap().holds
    }

    /// What a key has spent, holds, and has in flight.
    async fn sums(&self, n: u8) -> (i64, i64, u64) {
        let account = self.state(n).await.account;
        let total = account.sums(Window::Total);
        (total.spent.0, total.reserved.0, account.in_flight)
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
    let request =
        AdmitRequest { req: RequestId([req; 16]), vm: VM, node: "n".to_owned(), token: [0; 32], need_key: false, trace: None, ask };
    Admit {
        token_hash: [key; 32],
        request,
        directory: Arc::default(),
        now: Moment::at(now),
        expires_ms: now + TTL,
        patient: false,
        rejected: Arc::default(),
    }
}

/// One budget for good.
fn total(cap: Option<i64>) -> Limits {
    let budgets = cap.map(|cap| Budget { window: Window::Total, cap: Nanodollars(cap) }).into_iter().collect();
    Limits { budgets, ..Limits::default() }
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
        sent: outcome != Outcome::Void,
        status: Some(200),
        usage: usage.map(|(input, output)| Usage { input, output, ..Usage::default() }),
        input: None,
        visible: None,
        beyond: false,
        tries: Vec::new(),
        created: Vec::new(),
        deleted: None,
        ended: None,
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
    assert_eq!(bed.sums(1).await, (0, hold_of(50), 1));
    let done = bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 20).await;
    assert_eq!((done.charged, done.nanodollars), (1, 225_000));
    assert_eq!(bed.sums(1).await, (225_000, 0, 0));
    let again = bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 30).await;
    assert_eq!((again.charged, again.repeated, bed.sums(1).await.0), (0, 1, 225_000), "a repeated record changes nothing");
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "SETTLED"]);
}

#[tokio::test]
async fn a_replay_gets_the_same_answer_and_anything_else_a_conflict() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.key(2, None).await;
    let first = bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.admit(1, 1, 50, 11).await, first);
    assert_eq!(bed.sums(1).await.2, 1, "the replay holds nothing more");
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
    assert_eq!(bed.sums(1).await, (0, 0, 0));
    bed.settle(settlement(2, Outcome::Void, None), 12).await;
    assert!(matches!(bed.admit(1, 2, 50, 13).await, Admission::Refused(r) if r.code == Code::PolicyUnavailable));
    assert_eq!(bed.sums(1).await.2, 0);
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "VOIDED", "REFUSED"]);
}

#[tokio::test]
async fn an_expired_hold_is_charged_and_a_late_settlement_lowers_it() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.expire(10 + TTL - 1).await, 0);
    assert_eq!(bed.expire(10 + TTL).await, 1);
    assert_eq!(bed.sums(1).await, (hold_of(50), 0, 0));
    bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 5_000).await;
    assert_eq!(bed.sums(1).await.0, 225_000);
    bed.settle(settlement(1, Outcome::Void, None), 6_000).await;
    assert_eq!(bed.sums(1).await.0, 225_000, "what has settled stays settled");
}

#[tokio::test]
async fn a_cost_above_its_hold_is_charged_whole_and_freezes_the_key() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    let done = bed.settle(settlement(1, Outcome::Complete, Some((100, 1_000))), 11).await;
    assert_eq!(done.frozen, ["key_1"]);
    assert_eq!((bed.state(1).await.status, bed.sums(1).await.0), (Status::Frozen, hold_of(1_000)));
    assert!(matches!(bed.admit(1, 2, 50, 12).await, Admission::Refused(r) if r.code == Code::CapExhausted));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "ADMITTED", "SETTLED", "ALARM", "KEY_FROZEN", "ALARM", "ALARM", "REFUSED"]);
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
    assert_eq!(bed.sums(1).await.2, 0);
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
    let (_, reserved, in_flight) = bed.sums(1).await;
    assert_eq!(reserved, held);
    assert!(held <= hold_of(50) * 10 && in_flight >= 10);
    bed.events(1).await;
}
