//! Requests as callers send them, with what the provider is to get: one table for each direction, worked out by hand from the
//! vendors' references. `tests/e2e/test_translated_requests.py` holds the same tables against the vendors' own typed clients.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use keyward_core::body::{BodyReader, Edits, splice_piece};
use keyward_core::operation::{Dialect, Form};
use keyward_core::translate::request::{MAX_VALUES, Terms, Untranslatable, translate};
use proptest::prelude::*;
use serde_json::{Value, json};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const TABLES: [(&str, &str); 6] = [
    ("openai_to_anthropic", include_str!("translate/requests/openai_to_anthropic.json")),
    ("openai_to_gemini", include_str!("translate/requests/openai_to_gemini.json")),
    ("anthropic_to_openai", include_str!("translate/requests/anthropic_to_openai.json")),
    ("anthropic_to_gemini", include_str!("translate/requests/anthropic_to_gemini.json")),
    ("openai_to_openai", include_str!("translate/requests/openai_to_openai.json")),
    ("embeddings", include_str!("translate/requests/embeddings.json")),
];

fn form(name: &str) -> Form {
    match name {
        "chat" => Form::Chat,
        "messages" => Form::Messages,
        "embeddings" => Form::Embeddings,
        other => panic!("no form {other}"),
    }
}

fn terms(form: Form, fields: &Value) -> Terms<'_> {
    let known = ["to", "model", "is_newest", "max_tokens", "max_output", "no_store", "list_price", "drops"];
    assert!(fields.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())), "{fields}");
    let flag = |name: &str| fields[name].as_bool().unwrap_or(false);
    Terms {
        form,
        to: match fields["to"].as_str().unwrap() {
            "openai" => Dialect::OpenAi,
            "anthropic" => Dialect::Anthropic,
            "gemini" => Dialect::Gemini,
            other => panic!("no dialect {other}"),
        },
        is_newest: flag("is_newest"),
        model: fields["model"].as_str().unwrap(),
        max_tokens: fields["max_tokens"].as_u64(),
        max_output: fields["max_output"].as_u64(),
        no_store: flag("no_store"),
        list_price: flag("list_price"),
        drops: flag("drops"),
    }
}

/// The text of a case's body: as it is written there, or put into JSON.
fn body(case: &Value) -> String {
    case["text"].as_str().map_or_else(|| case["body"].to_string(), str::to_owned)
}

/// The file's terms with the case's own over them.
fn merged(file: &Value, case: &Value) -> Value {
    let mut fields = file["terms"].clone();
    for (key, value) in case["terms"].as_object().into_iter().flatten() {
        fields[key] = value.clone();
    }
    fields
}

#[test]
fn every_request_is_translated_as_written_down() {
    let mut count = 0;
    let mut wrong = Vec::new();
    for (table, text) in TABLES {
        let file: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{table}: {error}"));
        for case in file["cases"].as_array().unwrap() {
            count += 1;
            let name = format!("{table}: {}", case["name"].as_str().unwrap());
            let fields = merged(&file, case);
            let got = match translate(body(case).as_bytes(), &terms(form(file["form"].as_str().unwrap()), &fields)) {
                Ok(out) => {
                    json!({ "expect": serde_json::from_str::<Value>(&out).unwrap_or_else(|error| panic!("{name}: {error}: {out}")) })
                }
                Err(Untranslatable::Unsupported(field, _)) => json!({ "unsupported": field }),
                Err(Untranslatable::Invalid(field, _)) => json!({ "invalid": field }),
                Err(Untranslatable::TooComplex) => json!("too complex"),
            };
            let want: Value = ["expect", "unsupported", "invalid"]
                .iter()
                .filter_map(|key| case.get(key).map(|value| ((*key).to_owned(), value.clone())))
                .collect::<serde_json::Map<_, _>>()
                .into();
            assert_eq!(want.as_object().unwrap().len(), 1, "{name}: one outcome");
            if got != want {
                wrong.push(format!("{name}\n   got {got}\n  want {want}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {count}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(count >= 80, "{count} cases");
}

#[test]
fn what_is_no_object_or_too_much_of_one_is_refused() {
    let fields = json!({ "to": "gemini", "model": "m" });
    let terms = terms(Form::Chat, &fields);
    for bad in ["[]", "1", "\"x\"", "", "{", "{\"messages\":[\"\\ud800\"]}"] {
        assert!(matches!(translate(bad.as_bytes(), &terms), Err(Untranslatable::Invalid(..))), "{bad}");
    }
    let many = format!("{{\"messages\":[{}1]}}", "1,".repeat(MAX_VALUES));
    assert_eq!(translate(many.as_bytes(), &terms), Err(Untranslatable::TooComplex));
}

/// Numbers that a float can't hold, and a key that stands twice in a schema, arrive as they were written.
#[test]
fn what_is_copied_is_copied_byte_for_byte() {
    let schema = r#"{"type":"object","properties":{"n":{"const":12345678901234567890.10e5,"const":2}}, "x" : "\u00e9\/"}"#;
    let text = format!(
        r#"{{"messages":[{{"role":"user","content":"\u0041\/b"}}],"seed":1e400,"tools":[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]}}"#
    );
    let fields = json!({ "to": "gemini", "model": "gemini-2.5-flash" });
    let out = translate(text.as_bytes(), &terms(Form::Chat, &fields)).unwrap();
    assert!(out.contains(schema) && out.contains(r#""\u0041\/b""#) && out.contains("\"seed\":1e400"), "{out}");
}

/// Many turns, parts and calls in one request take no more than their number.
#[test]
fn long_conversations_go_through() {
    let round = |i: usize| {
        format!(
            r#"{{"role":"assistant","tool_calls":[{{"id":"c{i}","type":"function","function":{{"name":"f","arguments":"{{}}"}}}}]}},{{"role":"tool","tool_call_id":"c{i}","content":"x"}}"#
        )
    };
    let rounds: Vec<String> = (0..9_000).map(round).collect();
    let text = format!(r#"{{"messages":[{}]}}"#, rounds.join(","));
    for to in ["gemini", "anthropic"] {
        let fields = json!({ "to": to, "model": "m", "max_tokens": 10 });
        let out: Value = serde_json::from_str(&translate(text.as_bytes(), &terms(Form::Chat, &fields)).unwrap()).unwrap();
        let list = if to == "gemini" { "contents" } else { "messages" };
        assert_eq!(out[list].as_array().map(Vec::len), Some(18_000));
    }
}

/// Documents that are nearly requests: the words of the dialects, put together at random.
fn documents() -> impl Strategy<Value = Value> {
    const WORDS: &[&str] = &[
        "messages",
        "role",
        "user",
        "assistant",
        "system",
        "tool",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "data:image/png;base64,AA",
        "tool_calls",
        "id",
        "function",
        "name",
        "arguments",
        "{}",
        "{\"a\":1}",
        "tool_call_id",
        "tools",
        "parameters",
        "tool_choice",
        "auto",
        "input",
        "thinking",
        "tool_use",
        "tool_result",
        "tool_use_id",
        "source",
        "base64",
        "media_type",
        "data",
        "signature",
        "gemini:x",
        "stop",
        "max_tokens",
        "response_format",
        "json_schema",
        "schema",
        "reasoning_effort",
        "low",
        "extra_content",
        "google",
        "thought_signature",
        "stream_options",
        "store",
    ];
    let word = proptest::sample::select(WORDS);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Into::into),
        (-3i64..5000).prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        "[\"\\\\a é\u{1f600}]{0,4}".prop_map(Into::into),
        word.clone().prop_map(Into::into),
    ];
    leaf.prop_recursive(7, 120, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            proptest::collection::vec((word.clone(), inner), 0..6)
                .prop_map(|members| members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

fn every_terms(mut check: impl FnMut(&Terms<'_>)) {
    for form in [Form::Chat, Form::Messages, Form::Embeddings, Form::Responses] {
        for (to, model) in [("openai", "gpt-5.1"), ("anthropic", "claude-opus-4-6"), ("gemini", "gemini-3-flash")] {
            for drops in [false, true] {
                let fields = json!({ "to": to, "model": model, "drops": drops, "is_newest": drops, "max_tokens": 2000, "no_store": true });
                check(&terms(form, &fields));
            }
        }
    }
}

/// A conversation of texts, with the texts in it.
fn conversations() -> impl Strategy<Value = Vec<(bool, Vec<String>)>> {
    let text = "[a-z\"\\\\/é\u{1f600}\u{7}\n]{0,5}[a-z]";
    proptest::collection::vec((any::<bool>(), proptest::collection::vec(text, 1..4)), 1..6)
}

/// All strings by the name "text", or that are the content of a message.
fn texts(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| texts(item, out)),
        Value::Object(members) => {
            for (key, value) in members {
                match value {
                    Value::String(text) if key == "text" || key == "content" => out.push(text.clone()),
                    other => texts(other, out),
                }
            }
        }
        _ => {}
    }
}

/// Fields that the gate writes into, and values that they may have.
const GOVERNED: &[(&str, &[&str])] = &[
    ("model", &["\"m\"", "\"gpt-4.1\""]),
    ("max_tokens", &["null", "5", "500"]),
    ("max_completion_tokens", &["null", "5", "500"]),
    ("stream", &["true", "false", "null"]),
    ("stream_options", &["null", "{}", "{\"include_usage\":false}", "{\"include_usage\":true,\"include_obfuscation\":false}"]),
    ("store", &["null", "true", "false"]),
    ("service_tier", &["null", "\"auto\"", "\"flex\"", "\"default\""]),
    ("messages", &["[]", "[{\"role\":\"developer\",\"content\":\"a\"}]"]),
    ("metadata", &["{\"a\":\"b\"}"]),
];

proptest! {
    #[test]
    fn any_document_is_an_error_or_a_request(document in documents(), wrapped: bool) {
        let document = if wrapped { json!({ "messages": [document.clone()], "tools": [document.clone()], "stop": document }) } else { document };
        let text = document.to_string();
        every_terms(|terms| {
            if let Ok(out) = translate(text.as_bytes(), terms) {
                assert!(serde_json::from_str::<Value>(&out).is_ok(), "{text} gave {out}");
            }
        });
    }

    /// A request to OpenAI says the same whether it is copied here or has the gate's splices written into it.
    #[test]
    fn a_copy_for_openai_is_what_the_gate_splices(
        members in proptest::sample::subsequence(GOVERNED, 0..=GOVERNED.len()),
        pick: usize,
        max_tokens in proptest::option::of(1u64..100),
        no_store: bool,
        list_price: bool,
    ) {
        let values = members.iter().enumerate().map(|(i, (name, values))| {
            let value = values[(pick >> i) % values.len()];
            ((*name).to_owned(), serde_json::from_str::<Value>(value).unwrap())
        });
        let document: Value = values.collect::<serde_json::Map<_, _>>().into();
        let text = document.to_string();
        let mut reader = BodyReader::new(Form::Chat);
        reader.feed(text.as_bytes()).unwrap();
        let facts = reader.finish().unwrap();
        let edits = Edits {
            model: Some("gpt-4.1"),
            max_tokens,
            limits: &["max_completion_tokens", "max_tokens"],
            include_usage: facts.stream,
            no_store,
            list_price,
        };
        let mut spliced = Vec::new();
        splice_piece(text.as_bytes(), 0, &facts.splices(&edits), &mut spliced);
        let terms = Terms {
            form: Form::Chat, to: Dialect::OpenAi, is_newest: true, model: "gpt-4.1", max_tokens, max_output: None, no_store, list_price, drops: false,
        };
        let copied = translate(text.as_bytes(), &terms).unwrap();
        prop_assert_eq!(serde_json::from_str::<Value>(&copied).unwrap(), serde_json::from_slice::<Value>(&spliced).unwrap());
    }

    #[test]
    fn every_text_arrives_once_and_in_its_place(conversation in conversations(), as_chat: bool) {
        let part = |text: &String| json!({ "type": "text", "text": text });
        let messages: Vec<Value> = conversation
            .iter()
            .map(|(is_user, said)| json!({ "role": if *is_user { "user" } else { "assistant" }, "content": said.iter().map(part).collect::<Vec<_>>() }))
            .collect();
        let body = json!({ "messages": messages }).to_string();
        let said: Vec<&str> = conversation.iter().flat_map(|(_, said)| said.iter().map(String::as_str)).collect();
        let (form, targets) = if as_chat { (Form::Chat, ["anthropic", "gemini"]) } else { (Form::Messages, ["openai", "gemini"]) };
        for to in targets {
            let fields = json!({ "to": to, "model": "m", "max_tokens": 10 });
            let out: Value = serde_json::from_str(&translate(body.as_bytes(), &terms(form, &fields)).unwrap()).unwrap();
            let mut arrived = Vec::new();
            texts(&out, &mut arrived);
            // OpenAI's dialect has what the model said in one string.
            prop_assert_eq!(arrived.concat(), said.concat());
        }
    }
}
