//! States of credentials that outlast a restart, and the alarms that go with them.

use super::*;
use keyward_core::verdict::State;
use keyward_policy_service::store::{Alarm, KeyState, KeyStateChange};

fn change(name: &str, state: Option<(State, Option<u64>)>) -> KeyStateChange {
    let state = state.map(|(state, until_ms)| KeyState { name: name.to_owned(), state, until_ms, probe: until_ms.is_some() });
    KeyStateChange { name: name.to_owned(), state, alarm: None }
}

#[tokio::test]
async fn states_are_kept_over_a_restart_and_forgotten_when_they_are_over() {
    let mut bed = Bed::new().await;
    let changes = vec![
        change("c/cred_a", Some((State::Exhausted, Some(5_000)))),
        change("m/cred_a/gpt-4o", Some((State::Rejected, None))),
        change("c/cred_a", Some((State::Rejected, None))),
        change("a/other", Some((State::Exhausted, Some(7_000)))),
        change("c/never", None),
    ];
    assert_eq!(bed.store.keep_key_states(changes.clone(), Moment::at(1)).await.unwrap(), []);
    let expected: Vec<KeyState> = [&changes[3], &changes[2], &changes[1]].into_iter().filter_map(|change| change.state.clone()).collect();
    assert_eq!(bed.store.key_states().await.unwrap(), expected, "the last of each name");
    bed.restart();
    assert_eq!(bed.store.key_states().await.unwrap(), expected);
    let forget = expected.iter().map(|state| change(&state.name, None)).collect();
    bed.store.keep_key_states(forget, Moment::at(2)).await.unwrap();
    assert_eq!(bed.store.key_states().await.unwrap(), []);
}

#[tokio::test]
async fn an_alarm_is_an_entry_of_the_organisation_s_chain_and_mail() {
    let bed = Bed::new().await;
    let detail = serde_json::json!({ "provider": "openai" });
    let alarm = Alarm { organisation: ORG.to_owned(), what: "credential_rejected".to_owned(), detail: detail.clone() };
    let raised = KeyStateChange { alarm: Some(alarm.clone()), ..change("c/cred_a", Some((State::Rejected, None))) };
    assert_eq!(bed.store.keep_key_states(vec![raised], Moment::at(9)).await.unwrap(), [alarm]);
    let chain = admin_chain(ORG);
    let mut verifier = Verifier::new("test", &chain, |epoch| Some(ledger_keys().chain_key(&chain, epoch)));
    let rows = bed.store.audit(&chain, 1, 100).await.unwrap();
    let entries: Vec<Entry> = rows.iter().map(|row| verifier.entry(&row.entry, &row.mac).unwrap()).collect();
    let expected = Event::Alarm { what: "credential_rejected".to_owned(), detail: detail.to_string() };
    assert_eq!(entries.last().map(|entry| (entry.time_ms, &entry.event)), Some((9, &expected)));
    let mail = bed.store.due_mail(9, 10).await.unwrap();
    assert_eq!(
        mail.iter().map(|mail| (mail.what.as_str(), mail.detail.as_str())).collect::<Vec<_>>(),
        [("credential_rejected", detail.to_string().as_str())]
    );
}

#[tokio::test]
async fn tries_are_counted_once_however_often_they_are_told() {
    let mut bed = Bed::new().await;
    bed.key(1, None).await;
    assert!(matches!(bed.admit(1, 1, 10, 1).await, Admission::Admitted(_)));
    let one = |status| Try { credential: "cred_a".to_owned(), status, ms: 1, target: 0, lost: false };
    let settlement = Settlement { tries: vec![one(Some(429)), one(None), one(Some(200))], ..settlement(1, Outcome::Complete, None) };
    let done = bed.settle(settlement.clone(), 2).await;
    let of = |status| ("openai".to_owned(), status);
    assert_eq!((done.rotated, done.tries), (1, BTreeMap::from([(of(Some(429)), 1), (of(None), 1), (of(Some(200)), 1)])));
    let again = bed.settle(settlement, 3).await;
    assert_eq!((again.rotated, again.tries.len()), (0, 0));
}
