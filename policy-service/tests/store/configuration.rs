//! Configuration and what follows from it.

use super::*;

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
    assert_eq!(
        (plain.targets[0].model.as_deref(), plain.targets[0].credentials.clone()),
        (Some("gpt-4o"), vec!["cred_b".to_owned()]),
        "the policy's pool"
    );
    let Admission::Admitted(routed) = ask(2, "fast").await.unwrap() else { panic!() };
    assert_eq!((routed.targets[0].model.as_deref(), routed.plan.rev), (Some("gpt-4o-mini"), 2));
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
    bed.expire(DAY + 20 + TTL).await;
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
    let spent = bed.sums(1).await.0 + bed.sums(2).await.0;
    assert_eq!(all[0].nanodollars, spent, "the days' sums are what the keys spent");
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
