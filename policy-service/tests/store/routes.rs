//! Requests that may go to several targets: each is charged at the price of who answered, and nobody is taken for another.

use super::*;
use keyward_core::edge::Try;

const TARGETS: &str = r#"{"targets": [
    {"provider": "openai", "model": "gpt-4o-mini", "pool": "first"},
    {"provider": "openai", "model": "gpt-4o-mini", "pool": "second"},
    {"provider": "anthropic", "model": "claude-opus-4-6"}]}"#;

async fn routed(first_byte_ms: Option<u64>) -> Bed {
    let bed = Bed::new().await;
    let mut route: serde_json::Value = serde_json::from_str(TARGETS).unwrap();
    if let Some(ms) = first_byte_ms {
        route["first_byte_timeout_ms"] = ms.into();
    }
    let pool = |name: &str| serde_json::json!({"provider": "openai", "credentials": [name]});
    bed.edit(vec![
        credential("cred_b", "openai", Expect::Absent),
        credential("cred_c", "anthropic", Expect::Absent),
        put(Kind::Pool, "first", pool("cred_a"), Expect::Absent),
        put(Kind::Pool, "second", pool("cred_b"), Expect::Absent),
        put(Kind::Route, "fast", route, Expect::Absent),
    ])
    .await;
    bed.key(1, Some(1 << 40)).await;
    bed
}

fn asked(req: u8) -> Admit {
    let mut asked = admit(1, req, 50, 10);
    (asked.request.ask.provider, asked.request.ask.model) = (String::new(), Some("fast".to_owned()));
    asked
}

fn answered(req: u8, tries: &[(u64, Option<u16>, bool)]) -> Settlement {
    let one = |&(target, status, lost): &(u64, Option<u16>, bool)| Try { credential: String::new(), status, ms: 1, target, lost };
    Settlement { tries: tries.iter().map(one).collect(), ..settlement(req, Outcome::Complete, Some((100, 10))) }
}

/// Two targets differ in their pool alone, and the first can't be used: the one that answers is the second of those that were handed out.
#[tokio::test]
async fn who_answered_is_charged_and_recorded() {
    for restarts in [false, true] {
        let mut bed = routed(None).await;
        let Admission::Admitted(admitted) = bed.decide(Admit { rejected: Arc::new(["c/cred_a".to_owned()].into()), ..asked(1) }).await
        else {
            panic!()
        };
        let handed: Vec<_> = admitted.targets.iter().map(|target| (target.provider.as_str(), target.credentials.clone())).collect();
        assert_eq!(handed, [("openai", vec!["cred_b".to_owned()]), ("anthropic", vec!["cred_c".to_owned()])]);
        if restarts {
            bed.restart();
        }
        bed.settle(answered(1, &[(0, Some(500), false), (1, Some(200), false)]), 20).await;
        // Claude Opus 4.6: $5 and $25 a million.
        assert_eq!(bed.sums(1).await, (100 * 5_000 + 10 * 25_000, 0, 0), "after a restart: {restarts}");
        let Some(Event::Settled(settled)) = bed.events(1).await.pop().map(|entry| entry.event) else { panic!() };
        assert_eq!((settled.provider.as_str(), settled.model.as_str()), ("anthropic", "claude-opus-4-6"));
    }
}

/// A try that was given up may have been carried out: its share stays charged, and all shares together were held.
#[tokio::test]
async fn a_lost_try_keeps_its_share() {
    let mut bed = routed(Some(300)).await;
    let Admission::Admitted(both) = bed.decide(asked(1)).await else { panic!() };
    bed.settle(answered(1, &[(0, None, true), (2, Some(200), false)]), 20).await;
    let (spent, reserved, _) = bed.sums(1).await;
    // 100 bytes and what is put before them, and 50 tokens, of gpt-4o-mini: $0.15 and $0.60 a million; then Claude's own 100 and 10.
    assert_eq!((spent, reserved), (2_100 * 150 + 50 * 600 + 100 * 5_000 + 10 * 25_000, 0));
    assert!(spent <= both.hold.total.0);
    let mut bed = routed(None).await;
    let Admission::Admitted(one) = bed.decide(asked(1)).await else { panic!() };
    assert!(one.hold.total < both.hold.total, "without a time limit one answer is paid at most");
    bed.settle(answered(1, &[(0, Some(200), false)]), 20).await;
    assert_eq!(bed.sums(1).await.0, 100 * 150 + 10 * 600);
}
