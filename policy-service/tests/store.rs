//! What every store must do. A second store joins by giving another `open`.

#![allow(clippy::unwrap_used, clippy::panic)]

use keyward_core::admission::{Allow, Hold, Status};
use keyward_core::audit::{Entry, Event, Verifier};
use keyward_core::edge::{AdmitRequest, Ask, EdgeChain, EdgeKey, Outcome, RequestId, Settlement, Try, VmId};
use keyward_core::money::Nanodollars;
use keyward_core::price::PriceTable;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::usage::Usage;
use keyward_policy_service::store::sqlite::SqliteStore;
use keyward_policy_service::store::{Admission, Admit, KeyRow, LedgerKeys, NewKey, Settle, Store};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;

const TTL: u64 = 1_000;
const VM: VmId = VmId([7; 16]);

struct Bed {
    store: Arc<SqliteStore>,
    directory: tempfile::TempDir,
    chain: EdgeChain,
}

fn ledger_keys() -> LedgerKeys {
    LedgerKeys { origin: "test".to_owned(), audit_seed: [5; 32], prices: PriceTable::built_in().unwrap() }
}

impl Bed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(SqliteStore::open(&directory.path().join("db"), ledger_keys()).unwrap());
        Bed { store, directory, chain: EdgeChain::new(VM, &EdgeKey::derive(&[1; 32], VM)).unwrap() }
    }

    /// Stops the store and opens it again, as a restart does.
    fn restart(&mut self) {
        self.store.close();
        self.store = Arc::new(SqliteStore::open(&self.directory.path().join("db"), ledger_keys()).unwrap());
    }

    async fn key(&self, n: u8, cap: Option<i64>) -> KeyRow {
        self.key_with(n, cap, Allow::default()).await
    }

    /// What a request holds, by the only thing that a replay shows.
    async fn held(&self, key: u8, req: u8) -> Hold {
        match self.store.admit(referring(key, req, &["resp_1", "msg_1"])).await.unwrap() {
            Admission::Admitted { hold, .. } => hold,
            other => panic!("{other:?}"),
        }
    }

    async fn key_with(&self, n: u8, cap: Option<i64>, allow: Allow) -> KeyRow {
        let row = KeyRow {
            id: format!("key_{n}"),
            organisation: "org_default".to_owned(),
            label: String::new(),
            allow,
            status: Status::Active,
            created_ms: 1,
            expires_ms: None,
            cap: cap.map(Nanodollars),
            spent: Nanodollars::ZERO,
            reserved: Nanodollars::ZERO,
            in_flight: 0,
        };
        self.store.create_key(NewKey { row, token_hash: [n; 32], actor: "test".to_owned() }).await.unwrap()
    }

    async fn state(&self, n: u8) -> KeyRow {
        self.store.key(&format!("key_{n}")).await.unwrap().unwrap()
    }

    async fn admit(&self, key: u8, req: u8, max: u64, now: u64) -> Admission {
        self.store.admit(admit(key, req, max, now)).await.unwrap()
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
    Admit { token_hash: [key; 32], request, credentials: vec!["cred_a".to_owned()], now_ms: now, expires_ms: now + TTL, patient: false }
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
    let mut bed = Bed::new();
    bed.key(1, Some(10_000_000)).await;
    assert!(matches!(bed.admit(1, 1, 50, 10).await, Admission::Admitted { hold, .. } if hold.total.0 == hold_of(50)));
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
    let mut bed = Bed::new();
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
    let mut bed = Bed::new();
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
    let mut bed = Bed::new();
    bed.key(1, Some(10_000_000)).await;
    bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.store.expire(10 + TTL - 1).await.unwrap(), 0);
    assert_eq!(bed.store.expire(10 + TTL).await.unwrap(), 1);
    let state = bed.state(1).await;
    assert_eq!((state.spent.0, state.reserved.0, state.in_flight), (hold_of(50), 0, 0));
    bed.settle(settlement(1, Outcome::Complete, Some((10, 20))), 5_000).await;
    assert_eq!(bed.state(1).await.spent.0, 225_000);
    bed.settle(settlement(1, Outcome::Void, None), 6_000).await;
    assert_eq!(bed.state(1).await.spent.0, 225_000, "what has settled stays settled");
}

#[tokio::test]
async fn a_cost_above_its_hold_is_charged_whole_and_freezes_the_key() {
    let mut bed = Bed::new();
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
    let bed = Bed::new();
    assert!(matches!(bed.admit(9, 1, 50, 10).await, Admission::Refused(r) if r.code == Code::UnknownKey));
    bed.key(1, None).await;
    assert_eq!(bed.store.revoke_key("key_1", "test", 11).await.unwrap(), Some(()));
    assert_eq!(bed.store.revoke_key("key_1", "test", 12).await.unwrap(), Some(()), "twice is no error");
    assert_eq!(bed.store.revoke_key("key_2", "test", 12).await.unwrap(), None);
    assert!(matches!(bed.admit(1, 1, 50, 13).await, Admission::Refused(r) if r.code == Code::Revoked));
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "KEY_REVOKED", "REFUSED"]);
}

#[tokio::test]
async fn no_credential_means_no_admission() {
    let bed = Bed::new();
    bed.key(1, None).await;
    let asked = Admit { credentials: Vec::new(), ..admit(1, 1, 50, 10) };
    assert!(matches!(bed.store.admit(asked).await.unwrap(), Admission::Refused(r) if r.code == Code::PoolExhausted));
    assert_eq!(bed.state(1).await.in_flight, 0);
}

#[tokio::test]
async fn missing_and_changed_records_of_a_vm_show() {
    let mut bed = Bed::new();
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
    let bed = Bed::new();
    bed.key(1, Some(hold_of(50) * 10)).await;
    let tasks: Vec<_> = (0..200u8)
        .map(|n| {
            tokio::spawn({
                let store = bed.store.clone();
                async move { store.admit(admit(1, n, 50, 10)).await.unwrap() }
            })
        })
        .collect();
    let mut held = 0;
    for task in tasks {
        if let Admission::Admitted { hold, .. } = task.await.unwrap() {
            held += hold.total.0;
        }
    }
    let state = bed.state(1).await;
    assert_eq!(state.reserved.0, held);
    assert!(held <= hold_of(50) * 10 && state.in_flight >= 10);
    bed.events(1).await;
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
    admit.credentials = vec!["cred_a".to_owned(), "cred_b".to_owned()];
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
    let mut bed = Bed::new();
    bed.key(1, None).await;
    bed.key(2, None).await;
    bed.admit(1, 1, 50, 10).await;
    bed.settle(created(1, &["resp_1", "msg_1"], "cred_b"), 11).await;

    let Admission::Admitted { grant, .. } = bed.store.admit(referring(1, 2, &["resp_1", "msg_1"])).await.unwrap() else { panic!() };
    assert_eq!(grant.pinned.as_deref(), Some("cred_b"));
    assert_eq!(
        bed.store.admit(referring(1, 2, &["resp_1", "msg_1"])).await.unwrap(),
        Admission::Admitted { key_id: "key_1".to_owned(), hold: bed.held(1, 2).await, grant }
    );
    let last = bed.events(1).await.pop().unwrap();
    assert!(matches!(last.event, Event::Admitted(a) if a.credentials == ["cred_b"]), "the chain names what was handed out");

    let anothers = refused(bed.store.admit(referring(2, 3, &["resp_1"])).await.unwrap());
    let nobodys = refused(bed.store.admit(referring(2, 4, &["resp_9"])).await.unwrap());
    assert_eq!(anothers, nobodys, "nothing tells whether it exists");
    assert_eq!(anothers.code, Code::StateNotOwned);
    assert_eq!(refused(bed.store.admit(referring(1, 5, &["resp_1", "resp_9"])).await.unwrap()).code, Code::StateNotOwned);
    assert_eq!(bed.names(2).await, ["KEY_CREATED", "REFUSED", "REFUSED"]);
    assert_eq!(bed.state(2).await.in_flight, 0);
}

#[tokio::test]
async fn an_object_outlives_a_restart_and_not_its_deletion() {
    let mut bed = Bed::new();
    bed.key(1, None).await;
    bed.key(2, None).await;
    bed.admit(1, 1, 50, 10).await;
    bed.settle(created(1, &["resp_1"], "cred_a"), 11).await;
    bed.restart();
    // Another key can neither take it over nor delete it.
    bed.admit(2, 2, 50, 12).await;
    let theft = Settlement { deleted: Some("resp_1".to_owned()), ..created(2, &["resp_1"], "cred_a") };
    bed.settle(theft, 13).await;
    assert!(matches!(bed.store.admit(referring(1, 3, &["resp_1"])).await.unwrap(), Admission::Admitted { .. }));
    assert_eq!(refused(bed.store.admit(referring(2, 4, &["resp_1"])).await.unwrap()).code, Code::StateNotOwned);
    let deleted = Settlement { deleted: Some("resp_1".to_owned()), ..settlement(3, Outcome::Complete, None) };
    bed.settle(deleted, 14).await;
    assert_eq!(refused(bed.store.admit(referring(1, 5, &["resp_1"])).await.unwrap()).code, Code::StateNotOwned);
}

#[tokio::test]
async fn objects_that_no_single_credential_reaches_are_refused() {
    let mut bed = Bed::new();
    bed.key(1, None).await;
    for (req, id, credential) in [(1, "resp_a", "cred_a"), (2, "resp_b", "cred_b"), (3, "resp_gone", "cred_gone")] {
        bed.admit(1, req, 50, 10).await;
        bed.settle(created(req, &[id], credential), 11).await;
    }
    assert_eq!(refused(bed.store.admit(referring(1, 4, &["resp_a", "resp_b"])).await.unwrap()).code, Code::StateNotOwned);
    assert_eq!(refused(bed.store.admit(referring(1, 5, &["resp_gone"])).await.unwrap()).code, Code::PoolExhausted);
}

/// The record of an answer may come after its caller's next request.
#[tokio::test]
async fn what_is_in_flight_may_have_made_it() {
    let mut bed = Bed::new();
    bed.key(1, None).await;
    let patient = |req| Admit { patient: true, ..referring(1, req, &["resp_1"]) };
    assert_eq!(refused(bed.store.admit(patient(9)).await.unwrap()).code, Code::StateNotOwned, "nothing is in flight");
    bed.admit(1, 1, 50, 10).await;
    assert_eq!(bed.store.admit(patient(2)).await.unwrap(), Admission::NotYet);
    assert_eq!(bed.names(1).await, ["KEY_CREATED", "REFUSED", "ADMITTED"], "nothing is written while it waits");
    bed.settle(created(1, &["resp_1"], "cred_a"), 11).await;
    assert!(matches!(bed.store.admit(patient(2)).await.unwrap(), Admission::Admitted { .. }));
}

#[tokio::test]
async fn state_at_a_provider_needs_the_policys_word() {
    let bed = Bed::new();
    bed.key(1, None).await;
    let allow = Allow { state: true, ..Allow::default() };
    bed.key_with(2, None, allow).await;
    let keeps = |key, req| {
        let mut admit = admit(key, req, 50, 100);
        admit.request.ask.keeps = true;
        admit
    };
    assert_eq!(refused(bed.store.admit(keeps(1, 1)).await.unwrap()).code, Code::StateNotOwned);
    let Admission::Admitted { grant, .. } = bed.store.admit(keeps(2, 2)).await.unwrap() else { panic!() };
    assert!(grant.state);
}

#[tokio::test]
async fn models_are_answered_without_a_provider() {
    let bed = Bed::new();
    let allow = Allow { models: vec!["gpt-4o".to_owned()], ..Allow::default() };
    bed.key_with(1, Some(0), allow).await;
    let mut asked = admit(1, 1, 50, 10);
    asked.request.ask = Ask { provider: "openai".to_owned(), endpoint: "GET /v1/models".to_owned(), ..Ask::default() };
    let Admission::Admitted { grant, hold, .. } = bed.store.admit(asked.clone()).await.unwrap() else { panic!() };
    assert_eq!(hold.total, Nanodollars::ZERO);
    assert_eq!(grant.answer.unwrap(), r#"{"data":[{"created":0,"id":"gpt-4o","object":"model","owned_by":"openai"}],"object":"list"}"#);
    asked.request.req = RequestId([2; 16]);
    asked.credentials.clear();
    let Admission::Admitted { grant, .. } = bed.store.admit(asked).await.unwrap() else { panic!() };
    assert_eq!(grant.answer.unwrap(), r#"{"data":[],"object":"list"}"#, "what can't be reached is not listed");
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
    let mut bed = Bed::new();
    for key in 1..4 {
        bed.key(key, Some(CAP)).await;
    }
    let (mut model, mut now) = (Model::default(), 10_000);
    for step in steps {
        match step {
            Step::Admit { key, req, max } => {
                let known = model.requests.contains_key(&req) || model.ended.contains_key(&req);
                match bed.admit(key, req, max, now).await {
                    Admission::Admitted { hold, .. } if !known => {
                        model.requests.insert(req, (key, hold.total.0, None, now + TTL));
                    }
                    Admission::Admitted { hold, .. } => {
                        assert_eq!(model.requests.get(&req).map(|r| (r.0, r.1, r.2)), Some((key, hold.total.0, None)))
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
            Step::Revoke { key } => drop(bed.store.revoke_key(&format!("key_{key}"), "test", now).await.unwrap()),
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
