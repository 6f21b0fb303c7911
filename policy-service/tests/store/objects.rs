//! What keys keep at providers.

use super::*;

/// A settlement that names what the provider made.
fn created(req: u8, ids: &[&str], credential: &str) -> Settlement {
    Settlement {
        created: ids.iter().map(|id| (*id).to_owned()).collect(),
        tries: vec![Try { credential: credential.to_owned(), status: Some(200), ms: 1, target: 0, lost: false }],
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
    assert!(matches!(&first, Admission::Admitted(a) if a.targets[0].credentials == ["cred_b"]), "{first:?}");
    assert_eq!(bed.decide(referring(1, 2, &["resp_1", "msg_1"])).await, first, "a replay gets the same");
    let last = bed.events(1).await.pop().unwrap();
    assert!(matches!(last.event, Event::Admitted(a) if a.credentials == ["cred_b"]), "the chain names what was handed out");

    let anothers = refused(bed.decide(referring(2, 3, &["resp_1"])).await);
    let nobodys = refused(bed.decide(referring(2, 4, &["resp_9"])).await);
    assert_eq!(anothers, nobodys, "nothing tells whether it exists");
    assert_eq!(anothers.code, Code::StateNotOwned);
    assert_eq!(refused(bed.decide(referring(1, 5, &["resp_1", "resp_9"])).await).code, Code::StateNotOwned);
    assert_eq!(bed.names(2).await, ["KEY_CREATED", "REFUSED", "REFUSED"]);
    assert_eq!(bed.sums(2).await.2, 0);
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
    assert!(admitted.plan.state);
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
    assert_eq!(
        listed.plan.answer.unwrap(),
        r#"{"data":[{"created":0,"id":"gpt-4o","object":"model","owned_by":"openai"}],"object":"list"}"#
    );
    asked.request.req = RequestId([2; 16]);
    bed.edit(vec![delete(Kind::Credential, "cred_a")]).await;
    let Admission::Admitted(listed) = bed.decide(asked).await else { panic!() };
    assert_eq!(listed.plan.answer.unwrap(), r#"{"data":[],"object":"list"}"#, "what can't be reached is not listed");
}
