//! Prices of an operator's own, and models that nobody lists.

use super::*;

fn own_price(usd: &str) -> Edit {
    let price = serde_json::json!({"input": usd, "output": usd, "context": 128_000, "max_output": 1_000});
    put(Kind::Provider, "openai", serde_json::json!({"prices": {"gpt-4o": price, "acme-*": price}}), Expect::Anything)
}

fn asks_for(model: &str, asked: Admit) -> Admit {
    let ask = Ask { model: Some(model.to_owned()), ..asked.request.ask };
    Admit { request: AdmitRequest { ask, ..asked.request }, ..asked }
}

/// An operator's price holds from the next admission on; what was admitted before is charged as it was promised.
#[tokio::test]
async fn a_request_is_charged_at_the_price_it_was_admitted_at() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(10_000_000)).await;
    bed.edit(vec![own_price("1.00")]).await;
    // 100 bytes and 50 tokens at a dollar a million.
    assert!(matches!(bed.admit(1, 1, 50, 10).await, Admission::Admitted(a) if a.hold.total.0 == 150_000));
    assert!(matches!(bed.decide(asks_for("acme-1", admit(1, 2, 50, 10))).await, Admission::Admitted(a) if a.hold.total.0 == 150_000));
    bed.edit(vec![own_price("5.00")]).await;
    bed.settle(settlement(1, Outcome::Complete, Some((100, 50))), 20).await;
    bed.settle(settlement(2, Outcome::Complete, Some((100, 40))), 20).await;
    assert_eq!(bed.sums(1).await.0, 150_000 + 140_000, "the price of the admission");
    assert!(matches!(bed.admit(1, 3, 50, 30).await, Admission::Admitted(a) if a.hold.total.0 == 750_000));
    bed.edit(vec![own_price("9.00")]).await;
    bed.restart();
    bed.settle(settlement(3, Outcome::Complete, Some((100, 50))), 40).await;
    assert_eq!(
        (bed.sums(1).await.0, bed.state(1).await.status),
        (290_000 + 750_000, Status::Active),
        "forgotten: never more than was held"
    );
    bed.edit(vec![delete(Kind::Provider, "openai")]).await;
    assert!(matches!(bed.admit(1, 4, 50, 50).await, Admission::Admitted(a) if a.hold.total.0 == hold_of(50)), "the table's again");
    assert!(matches!(bed.decide(asks_for("acme-1", admit(1, 5, 50, 50))).await, Admission::Refused(r) if r.code == Code::UnboundedInput));
}

/// A model that nobody lists is refused on a budget, and never free without one.
#[tokio::test]
async fn an_unlisted_model_is_refused_or_estimated() {
    let mut bed = Bed::new().await;
    bed.key(1, Some(1 << 50)).await;
    bed.key(2, None).await;
    let mut spent = 0;
    // 10 tokens in and 20 out: at $5 and $15, as gpt-4o's dearest snapshot; at $150 and $600, as the dearest of all.
    for (req, model, cost) in [(1, "gpt-4o-2027-01-01", 350_000), (3, "mystery", 13_500_000)] {
        assert!(
            matches!(bed.decide(asks_for(model, admit(1, req, 50, 10))).await, Admission::Refused(r) if r.code == Code::UnboundedInput)
        );
        assert!(matches!(bed.decide(asks_for(model, admit(2, req + 1, 50, 10))).await, Admission::Admitted(_)));
        if req == 3 {
            bed.restart();
        }
        bed.settle(settlement(req + 1, Outcome::Complete, Some((10, 20))), 11).await;
        spent += cost;
        assert_eq!(bed.sums(2).await.0, spent, "{model}");
    }
    let estimated = |entry: &Entry| matches!(&entry.event, Event::Settled(settled) if settled.estimated);
    assert_eq!(bed.events(2).await.iter().filter(|entry| estimated(entry)).count(), 2);
}
