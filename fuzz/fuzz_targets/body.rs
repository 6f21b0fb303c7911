//! `body::BodyReader`: the same facts wherever the body is cut; with the gate's splices, what another reader reads is what was admitted.
#![no_main]

use keyward_core::body::{BodyError, BodyFacts, BodyReader, Edits, splice_piece, spliced_length};
use keyward_core::operation::{Costs, Form, OPERATIONS};
use keyward_fuzz::{FORMS, input};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let form = choices.of(&FORMS);
    let read = facts(form, [body]);
    assert_eq!(read, facts(form, cuts.pieces(body)), "it depends on where it is cut");
    let Ok(facts_read) = read else { return };
    assert_eq!(facts_read.bytes, body.len() as u64);

    let operations = OPERATIONS.iter().filter(|operation| operation.form() == Some(form));
    let operation = operations.max_by_key(|operation| operation.costs == Costs::Tokens);
    let limits = operation.map(|operation| operation.limits()).unwrap_or_default();
    let can = |does: fn(&keyward_core::operation::Operation) -> bool| operation.is_some_and(does);
    let edits = Edits {
        model: choices.of(&[None, Some("admitted"), Some("a \"quoted\" \\ \u{e9}")]),
        max_tokens: choices.of(&[None, Some(1), Some(500)]),
        limits,
        include_usage: choices.flag() && can(|operation| operation.asks_for_usage()),
        no_store: choices.flag() && can(|operation| operation.may_store()),
        list_price: choices.flag() && can(|operation| operation.has_tiers()),
    };
    let splices = facts_read.splices(&edits);
    let (mut whole, mut pieced, mut at) = (Vec::new(), Vec::new(), 0);
    splice_piece(body, 0, &splices, &mut whole);
    for piece in cuts.pieces(body) {
        splice_piece(piece, at, &splices, &mut pieced);
        at += piece.len() as u64;
    }
    assert_eq!(whole, pieced, "the splices depend on where it is cut");
    assert_eq!(spliced_length(body.len() as u64, &splices), whole.len() as u64);
    let again = facts(form, [whole.as_slice()]).expect("what is forwarded can be read");
    check(&edits, &facts_read, &again);
    // A second reader; it has no room for every number.
    if let (Ok(before), Ok(after)) = (serde_json::from_slice::<Value>(body), serde_json::from_slice::<Value>(&whole)) {
        compare(&edits, before, after);
    }
});

fn facts<'a>(form: Form, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<BodyFacts, BodyError> {
    let mut reader = BodyReader::new(form);
    pieces.into_iter().try_for_each(|piece| reader.feed(piece))?;
    reader.finish()
}

fn check(edits: &Edits<'_>, before: &BodyFacts, after: &BodyFacts) {
    assert_eq!(after.model.as_deref(), edits.model.or(before.model.as_deref()));
    if let Some(max) = edits.max_tokens {
        assert!(after.limits.iter().all(|limit| limit.tokens.is_some_and(|tokens| tokens <= max)));
        assert!(edits.limits.is_empty() || after.limits.iter().any(|limit| edits.limits.contains(&limit.name)));
    }
    assert!(!edits.include_usage || after.include_usage);
    assert!(!edits.no_store || !after.lets_store());
    assert_eq!(
        (after.stream, after.choices, after.images, after.texts, after.characters, after.seconds, after.added, after.thinking_budget),
        (
            before.stream,
            before.choices,
            before.images,
            before.texts,
            before.characters,
            before.seconds,
            before.added,
            before.thinking_budget
        )
    );
    assert_eq!(
        (&after.refs, after.history, after.background, after.unbounded),
        (&before.refs, before.history, before.background, before.unbounded)
    );
}

fn compare(edits: &Edits<'_>, mut before: Value, mut after: Value) {
    if let Some(model) = edits.model {
        assert_eq!(after["model"], model);
    }
    if let Some(max) = edits.max_tokens {
        let set: Vec<u64> = edits.limits.iter().filter_map(|name| after[*name].as_u64()).collect();
        assert!(edits.limits.is_empty() || !set.is_empty() && set.iter().all(|tokens| *tokens <= max), "{after}");
    }
    if edits.include_usage {
        assert_eq!(after["stream_options"]["include_usage"], true);
    }
    if edits.no_store {
        assert_eq!(after["store"], false);
    }
    if edits.list_price {
        let tier = &after["service_tier"];
        assert!(!tier.is_null() && tier != "auto", "{after}");
    }
    // All else is what it was.
    for document in [&mut before, &mut after] {
        let members = document.as_object_mut().expect("an object");
        if let Some(options) = members.get_mut("stream_options").and_then(Value::as_object_mut) {
            options.remove("include_usage");
        }
        members.retain(|name, value| {
            let is_written =
                ["model", "store", "service_tier", "max_tokens", "max_completion_tokens", "max_output_tokens"].contains(&name.as_str());
            !is_written && (name != "stream_options" || value.as_object().is_some_and(|options| !options.is_empty()))
        });
    }
    assert_eq!(before, after);
}
