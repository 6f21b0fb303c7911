//! `translate::request::translate`: an error or JSON, in which nothing goes beyond what was admitted.
#![no_main]

use keyward_core::body::BodyReader;
use keyward_core::operation::{Dialect, Form, Operation};
use keyward_core::translate::doc::{Doc, Value};
use keyward_core::translate::request::{Terms, translate};
use keyward_fuzz::{FORMS, PROVIDERS, assert_json, input};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, _, body)) = input(data) else { return };
    let terms = Terms {
        form: choices.of(&FORMS),
        to: choices.of(&PROVIDERS),
        drops: choices.flag(),
        is_newest: choices.flag(),
        model: choices.of(&["gpt-5.1", "claude-opus-4-6", "gemini-3-flash", "gemini-2.5-pro", "claude-sonnet-4-5", "", "a\"b\\c\u{e9}"]),
        max_tokens: choices.of(&[None, Some(100), Some(1), Some(u64::MAX)]),
        max_output: choices.of(&[None, Some(8_192)]),
        no_store: choices.flag(),
        list_price: choices.flag(),
    };
    let translated = translate(body, &terms);
    let Ok(out) = &translated else {
        let message = translated.map_err(|error| error.message());
        assert!(message.is_err_and(|message| !message.is_empty()));
        return;
    };
    assert_json(out.as_bytes());
    let Ok(doc) = Doc::read(out.as_bytes(), usize::MAX) else { return };
    // Only what the gate has let in is translated.
    if was_admitted(terms.form, body) {
        check(doc.root(), &terms);
    }
});

fn was_admitted(form: Form, body: &[u8]) -> bool {
    let mut reader = BodyReader::new(form);
    let Ok(facts) = reader.feed(body).and_then(|()| reader.finish()) else { return false };
    let names = keyward_core::operation::OPERATIONS.iter().find(|operation| operation.form() == Some(form)).map(Operation::limits);
    facts.max_tokens(names.unwrap_or_default()).is_ok()
}

fn check(root: Value<'_>, terms: &Terms<'_>) {
    let stands = |name: &str| root.members().filter(|(key, _)| key == name).count();
    const OF_CHATS: [&str; 9] =
        ["messages", "contents", "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "generationConfig", "store"];
    // Of what does not govern, a caller may say two things.
    let names = if terms.form == Form::Embeddings { &["model"][..] } else { &OF_CHATS };
    for name in names {
        assert!(stands(name) <= 1, "{name} stands twice: {}", root.raw());
    }
    if terms.to != Dialect::Gemini {
        assert!(root.get("model").is_some_and(|model| model.is(terms.model)), "{}", root.raw());
    }
    let (Some(max), Form::Chat | Form::Messages) = (terms.max_tokens, terms.form) else { return };
    // Each dialect's own: what another calls so is a field like any.
    let (own, names) = match terms.to {
        Dialect::OpenAi => (Some(root), &["max_tokens", "max_completion_tokens"][..]),
        Dialect::Anthropic => (Some(root), &["max_tokens"][..]),
        Dialect::Gemini => (root.get("generationConfig"), &["maxOutputTokens"][..]),
    };
    let limits: Vec<Value<'_>> = names.iter().filter_map(|name| own?.get(name)).collect();
    assert!(!limits.is_empty(), "no limit: {}", root.raw());
    for limit in limits {
        // What 64 bits with a sign don't hold is not what was admitted, unless that is as much.
        let tokens = limit.raw().parse::<u64>().unwrap_or_else(|error| panic!("{error}: {}", limit.raw()));
        assert!(tokens <= max, "{tokens} of {max}");
    }
}
