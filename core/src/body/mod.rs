//! What a request body must tell before anything is decided, read in pieces, and the few bytes that are then written
//! into it. The document is never built: what is admitted is what is forwarded, all else passes byte for byte.

mod fields;
mod walk;

pub use walk::BodyReader;

use crate::json::{JsonError, Span};

/// Why a body is turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BodyError {
    Json(JsonError),
    /// The document is not an object.
    NotAnObject,
    /// A governed key stands twice, or in a spelling that some servers take for it and others don't.
    Ambiguous(&'static str),
    /// A governed field has a value of the wrong type or range.
    Field(&'static str, &'static str),
    TooManyReferences,
    /// A multipart form that can't be read in one way only.
    Form(&'static str),
}

impl From<JsonError> for BodyError {
    fn from(error: JsonError) -> Self {
        BodyError::Json(error)
    }
}

impl BodyError {
    pub fn message(&self) -> String {
        match self {
            BodyError::Json(error) => error.message(),
            BodyError::NotAnObject => "the request body must be a JSON object".to_owned(),
            BodyError::Ambiguous(key) => format!("the key \"{key}\" must stand at most once, spelled exactly so"),
            BodyError::Field(key, expected) => format!("\"{key}\" must be {expected}"),
            BodyError::Form(what) => format!("the multipart form {what}"),
            BodyError::TooManyReferences => format!("a request may refer to at most {} objects", crate::operation::MAX_REFS),
        }
    }
}

/// A limit on output tokens as it stands in the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    pub name: &'static str,
    /// `None` when the body says null.
    pub tokens: Option<u64>,
    span: Span,
}

/// Everything a body told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BodyFacts {
    pub bytes: u64,
    pub model: Option<String>,
    pub stream: bool,
    /// What the client itself asked: `stream_options.include_usage`.
    pub include_usage: bool,
    pub limits: Vec<Limit>,
    /// n x best_of, for each text that is to be completed; at least 1.
    pub choices: u64,
    pub thinking_budget: u64,
    pub images: u64,
    /// The first thing found whose cost has no bound.
    pub unbounded: Option<&'static str>,
    /// Objects at the provider that the body refers to.
    pub refs: Vec<String>,
    /// More input than the body has is at the provider: a conversation, an earlier answer, a stored prompt.
    pub history: bool,
    /// The provider is to work on it after it has answered.
    pub background: bool,
    /// Texts that are each taken by themselves, at least 1.
    pub texts: u64,
    /// Characters to speak.
    pub characters: u64,
    pub size: Option<String>,
    pub quality: Option<String>,
    pub partial_images: u64,
    /// Longest that a recording can last.
    pub seconds: Option<u64>,
    /// Input tokens that the provider adds for what the body asks for.
    pub added: u64,
    /// Embeddings are asked for as base64.
    pub base64: bool,
    tier: Tier,
    /// The body is a form: values stand in it as they are.
    plain: bool,
    /// `store`, and where it stands; `None` inside: null.
    store: Option<(Span, Option<bool>)>,
    model_span: Span,
    root: Object,
    stream_options: Option<Option<Object>>,
    stream_options_span: Span,
    include_usage_span: Option<Span>,
}

/// An object's opening bracket, and whether anything stands in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Object {
    open: u64,
    filled: bool,
}

/// Who chooses the service tier, which is part of the price.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Tier {
    /// The account's settings: nothing is said.
    #[default]
    Unsaid,
    /// The account's settings: it stands there, as `auto` or null.
    Open(Span),
    /// The request.
    Named,
}

impl BodyFacts {
    /// The request does not say that its answer must not be kept.
    pub fn lets_store(&self) -> bool {
        !matches!(self.store, Some((_, Some(false))))
    }

    /// The model of a form, and where it stands.
    pub fn plain_model(&mut self, model: String, span: Span) {
        (self.model, self.model_span, self.plain) = (Some(model), span, true);
    }

    /// The limit on output tokens that the request sets for itself, by the names that its dialect knows. Two of them are
    /// refused: which one the provider obeys is not the caller's to choose.
    pub fn max_tokens(&self, names: &[&'static str]) -> Result<Option<u64>, BodyError> {
        let mut own = self.limits.iter().filter(|limit| names.contains(&limit.name) && limit.tokens.is_some());
        match (own.next(), own.next()) {
            (Some(_), Some(second)) => Err(BodyError::Field(second.name, "the only limit on output tokens")),
            (first, _) => Ok(first.and_then(|limit| limit.tokens)),
        }
    }
}

/// One replacement of bytes in the body that is forwarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Splice {
    pub at: u64,
    pub remove: u64,
    pub insert: String,
}

/// What the gate writes into the body it forwards.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits<'a> {
    pub model: Option<&'a str>,
    /// Output tokens allowed; written over every limit that is larger, or under the first of `limits` when none of them stands there.
    pub max_tokens: Option<u64>,
    /// The dialect's own names for it.
    pub limits: &'a [&'static str],
    pub include_usage: bool,
    /// `"store": false` must stand there.
    pub no_store: bool,
    /// Where the request leaves the service tier to the account's settings, `"service_tier": "default"` must stand there: a
    /// project's own default may cost twice the list price.
    pub list_price: bool,
}

impl BodyFacts {
    /// The splices that make the body say exactly what was admitted, in order. Empty: forward as it came.
    pub fn splices(&self, edits: &Edits<'_>) -> Vec<Splice> {
        if self.plain {
            let admitted = edits.model.filter(|admitted| self.model.as_deref() != Some(*admitted));
            return admitted.map(|admitted| replace(self.model_span, admitted.to_owned())).into_iter().collect();
        }
        let mut out = Vec::new();
        let mut members = Vec::new();
        match (edits.model, &self.model) {
            (Some(admitted), Some(asked)) if admitted != asked => out.push(replace(self.model_span, json_string(admitted))),
            (Some(admitted), None) if self.model_span != Span::default() => out.push(replace(self.model_span, json_string(admitted))),
            (Some(admitted), None) => members.push(format!("\"model\":{}", json_string(admitted))),
            _ => {}
        }
        match self.store.filter(|_| edits.no_store) {
            Some((_, Some(false))) => {}
            Some((span, _)) => out.push(replace(span, "false".to_owned())),
            None if edits.no_store => members.push("\"store\":false".to_owned()),
            None => {}
        }
        match self.tier {
            Tier::Unsaid if edits.list_price => members.push("\"service_tier\":\"default\"".to_owned()),
            Tier::Open(span) if edits.list_price => out.push(replace(span, "\"default\"".to_owned())),
            _ => {}
        }
        if let Some(max) = edits.max_tokens {
            for limit in &self.limits {
                if limit.tokens.is_none_or(|tokens| tokens > max) {
                    out.push(replace(limit.span, max.to_string()));
                }
            }
            if let Some(name) = edits.limits.first()
                && !self.limits.iter().any(|limit| edits.limits.contains(&limit.name))
            {
                members.push(format!("\"{name}\":{max}"));
            }
        }
        if edits.include_usage && !self.include_usage {
            match (self.include_usage_span, self.stream_options) {
                (Some(span), _) => out.push(replace(span, "true".to_owned())),
                (None, Some(Some(object))) => out.push(insert_first(object, "\"include_usage\":true")),
                (None, Some(None)) => out.push(replace(self.stream_options_span, "{\"include_usage\":true}".to_owned())),
                (None, None) => members.push("\"stream_options\":{\"include_usage\":true}".to_owned()),
            }
        }
        if !members.is_empty() {
            out.push(insert_first(self.root, &members.join(",")));
        }
        out.sort_by_key(|splice| splice.at);
        out
    }
}

/// The length of a body of `length` bytes after `splices`.
pub fn spliced_length(length: u64, splices: &[Splice]) -> u64 {
    splices.iter().fold(length, |n, s| n.saturating_sub(s.remove).saturating_add(s.insert.len() as u64))
}

/// Copies one piece of the body that starts at `from` to `out`, with the splices applied.
pub fn splice_piece(piece: &[u8], from: u64, splices: &[Splice], out: &mut Vec<u8>) {
    let end = from + piece.len() as u64;
    let part = |a: u64, b: u64| {
        let index = |at: u64| usize::try_from(at.clamp(from, end) - from).unwrap_or(usize::MAX);
        piece.get(index(a)..index(b).max(index(a))).unwrap_or_default()
    };
    let mut copied = from;
    for splice in splices {
        if splice.at >= end || splice.at + splice.remove < from {
            continue;
        }
        out.extend_from_slice(part(copied, splice.at));
        if splice.at >= from {
            out.extend_from_slice(splice.insert.as_bytes());
        }
        copied = copied.max(splice.at + splice.remove);
    }
    out.extend_from_slice(part(copied, end));
}

fn replace(span: Span, insert: String) -> Splice {
    Splice { at: span.start, remove: span.end - span.start, insert }
}

fn insert_first(object: Object, members: &str) -> Splice {
    let comma = if object.filled { "," } else { "" };
    Splice { at: object.open + 1, remove: 0, insert: format!("{members}{comma}") }
}

fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Form;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(text: &str) -> Result<BodyFacts, BodyError> {
        read_as(Form::Chat, text)
    }

    fn read_as(form: Form, text: &str) -> Result<BodyFacts, BodyError> {
        let mut reader = BodyReader::new(form);
        reader.feed(text.as_bytes())?;
        reader.finish()
    }

    fn rewrite(text: &str, edits: &Edits<'_>, step: usize) -> String {
        let splices = read(text).unwrap().splices(edits);
        let mut out = Vec::new();
        for (i, piece) in text.as_bytes().chunks(step).enumerate() {
            splice_piece(piece, (i * step) as u64, &splices, &mut out);
        }
        assert_eq!(out.len() as u64, spliced_length(text.len() as u64, &splices));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn reads_what_governs() {
        let facts = read(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"{\"model\":\"x\"}"},{"type":"image_url","image_url":{"url":"u"}}]}],
                "mod\u0065l":"gpt-4o","stream":true,"stream_options":{"include_usage":false},"max_tokens":12,"n":3,
                "tools":[{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"Model":{"type":"web_search"}}}}}]}"#,
        )
        .unwrap();
        assert_eq!((facts.model.as_deref(), facts.stream, facts.include_usage), (Some("gpt-4o"), true, false));
        assert_eq!((facts.max_tokens(&["max_tokens"]), facts.choices, facts.images, facts.unbounded), (Ok(Some(12)), 3, 1, None));
    }

    #[test]
    fn ambiguity_is_refused() {
        for (bad, key) in [
            (r#"{"model":"a","model":"b"}"#, "model"),
            (r#"{"model":"a","mod\u0065l":"b"}"#, "model"),
            (r#"{"model":"a","MODEL":"b"}"#, "model"),
            (r#"{"Stream":true}"#, "stream"),
            ("{\"max_to\u{212a}ens\":1}", "max_tokens"),
            ("{\"\u{17f}tream\":true}", "stream"),
            (r#"{"stream_options":{"include_usage":true,"include_usage":false}}"#, "include_usage"),
            (r#"{"tools":[],"tools":[]}"#, "tools"),
        ] {
            assert_eq!(read(bad), Err(BodyError::Ambiguous(key)), "{bad}");
        }
    }

    #[test]
    fn wrong_types_are_refused() {
        for bad in [
            "[]",
            "1",
            "\"x\"",
            r#"{"model":1}"#,
            r#"{"model":["a"]}"#,
            r#"{"stream":"true"}"#,
            r#"{"max_tokens":-1}"#,
            r#"{"max_tokens":1.5}"#,
            r#"{"max_tokens":1e3}"#,
            r#"{"n":"2"}"#,
            r#"{"max_tokens":99999999999999999999}"#,
            r#"{"max_tokens":1000000001}"#,
            r#"{"n":1025}"#,
            r#"{"stream_options":true}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(read(&format!(r#"{{"model":"{}"}}"#, "m".repeat(257))).is_err());
    }

    #[test]
    fn what_has_no_bound_is_named() {
        for (text, what) in [
            (r#"{"web_search_options":{}}"#, "web_search_options"),
            (r#"{"tools":[{"type":"web_search_20250305"}]}"#, "a tool that runs at the provider"),
            (r#"{"messages":[{"content":[{"type":"input_audio"}]}]}"#, "a file or audio part"),
            (r#"{"messages":[{"content":[{"type":"tool_result","content":[{"type":"document"}]}]}]}"#, "a file or audio part"),
            (r#"{"messages":[{"role":"assistant","audio":{"id":"x"}}]}"#, "audio"),
            (r#"{"service_tier":"priority"}"#, "service_tier"),
        ] {
            assert_eq!(read(text).unwrap().unbounded, Some(what), "{text}");
        }
        for fine in [
            r#"{"audio":null,"prompt":null}"#,
            // As the openai SDK sends back what its helper for streams has put together.
            r#"{"messages":[{"role":"assistant","content":null,"audio":null,"function_call":null,"refusal":null}]}"#,
            r#"{"tools":[{"type":"custom"},{"name":"f","input_schema":{"type":"object"}}]}"#,
            r#"{"service_tier":"auto"}"#,
        ] {
            assert_eq!(read(fine).unwrap().unbounded, None, "{fine}");
        }
    }

    #[test]
    fn two_limits_are_one_too_many() {
        let limits = |text: &str| read(text).unwrap().max_tokens(&["max_completion_tokens", "max_tokens"]);
        assert!(limits(r#"{"max_tokens":16,"max_completion_tokens":9000}"#).is_err());
        assert_eq!(limits(r#"{"max_tokens":null,"max_completion_tokens":9000}"#), Ok(Some(9000)));
        assert_eq!(limits(r#"{"max_output_tokens":16}"#), Ok(None));
    }

    #[test]
    fn edits_touch_nothing_else() {
        let usage = Edits { include_usage: true, limits: &["max_tokens"], ..Edits::default() };
        for (from, to) in [
            (r#"{"a":1}"#, r#"{"stream_options":{"include_usage":true},"a":1}"#),
            ("{ }", r#"{"stream_options":{"include_usage":true} }"#),
            (r#"{"stream_options":null}"#, r#"{"stream_options":{"include_usage":true}}"#),
            (r#"{"stream_options":{}}"#, r#"{"stream_options":{"include_usage":true}}"#),
            (r#"{"stream_options":{"x":1}}"#, r#"{"stream_options":{"include_usage":true,"x":1}}"#),
            (r#"{"stream_options":{"include_usage": false}}"#, r#"{"stream_options":{"include_usage": true}}"#),
            (r#"{"stream_options":{"include_usage":true}}"#, r#"{"stream_options":{"include_usage":true}}"#),
        ] {
            for step in [1, 3, 1000] {
                assert_eq!(rewrite(from, &usage, step), to);
            }
        }
        let all = Edits { model: Some("b\"c"), max_tokens: Some(7), limits: &["max_completion_tokens", "max_tokens"], ..Edits::default() };
        assert_eq!(rewrite(r#"{"model":"a","x":[1, 2]}"#, &all, 2), r#"{"max_completion_tokens":7,"model":"b\"c","x":[1, 2]}"#);
        let all = Edits { model: None, ..all };
        assert_eq!(rewrite(r#"{"max_tokens": 90,"max_completion_tokens":5}"#, &all, 2), r#"{"max_tokens": 7,"max_completion_tokens":5}"#);
        assert_eq!(rewrite(r#"{"max_tokens":null}"#, &all, 2), r#"{"max_tokens":7}"#);
        assert_eq!(
            rewrite(r#"{"max_output_tokens":5}"#, &all, 2),
            r#"{"max_completion_tokens":7,"max_output_tokens":5}"#,
            "a foreign name limits nothing"
        );
    }

    /// A body of an operation that is not in the table has members as well: one that is written before them needs a comma.
    #[test]
    fn a_model_is_written_into_any_body() {
        let edits = Edits { model: Some("m"), ..Edits::default() };
        for (from, to) in [
            ("{}", r#"{"model":"m"}"#),
            (r#"{"a":[]}"#, r#"{"model":"m","a":[]}"#),
            (r#"{"a":{"model":"b"}}"#, r#"{"model":"m","a":{"model":"b"}}"#),
            (r#"{"model":null}"#, r#"{"model":"m"}"#),
        ] {
            let mut out = Vec::new();
            splice_piece(from.as_bytes(), 0, &read_as(Form::Other, from).unwrap().splices(&edits), &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), to);
        }
    }

    #[test]
    fn the_service_tier_is_not_left_to_the_account() {
        let list_price = Edits { list_price: true, ..Edits::default() };
        for (from, to) in [
            (r#"{"a":1}"#, r#"{"service_tier":"default","a":1}"#),
            (r#"{"service_tier":"auto"}"#, r#"{"service_tier":"default"}"#),
            (r#"{"service_tier": null}"#, r#"{"service_tier": "default"}"#),
            (r#"{"service_tier":"flex"}"#, r#"{"service_tier":"flex"}"#),
            (r#"{"service_tier":"default"}"#, r#"{"service_tier":"default"}"#),
        ] {
            assert_eq!(rewrite(from, &list_price, 3), to);
            assert_eq!(rewrite(from, &Edits::default(), 3), from);
        }
    }

    #[test]
    fn an_item_that_brings_nothing_is_a_reference() {
        let refs = |items: &str| {
            let facts = read_as(Form::Responses, &format!(r#"{{"model":"m","input":[{items}]}}"#)).unwrap();
            (facts.refs, facts.history)
        };
        for (item, referred) in [
            (r#"{"type":"item_reference","id":"msg_1"}"#, true),
            (r#"{"id":"msg_1"}"#, true),
            (r#"{"id":"msg_1","type":null}"#, true),
            (r#"{"id":"msg_1","type":"image_generation_call","result":"x"}"#, true),
            (r#"{"id":"msg_1","type":"something_new"}"#, true),
            (r#"{"id":"msg_1","type":"reasoning","summary":[]}"#, true),
            (r#"{"id":"msg_1","type":"reasoning","encrypted_content":null}"#, true),
            (r#"{"id":"msg_1","type":"item_reference","type":"message"}"#, true),
            (r#"{"id":"msg_1","type":"reasoning","encrypted_content":"x"}"#, false),
            (
                r#"{"id":"msg_1","type":"message","role":"assistant","content":[{"type":"output_text","text":"x","annotations":[{"file_id":"file-1"}]}]}"#,
                false,
            ),
            (r#"{"role":"user","content":"x"}"#, false),
            (r#"{"id":"msg_1","type":"function_call","name":"f","arguments":"{}"}"#, false),
        ] {
            let expected = if referred { vec!["msg_1".to_owned()] } else { Vec::new() };
            assert_eq!(refs(item), (expected, referred), "{item}");
        }
    }

    #[test]
    fn references_are_found_wherever_they_stand() {
        for (form, text, id) in [
            (Form::Responses, r#"{"previous_response_id":"x-1"}"#, "x-1"),
            (Form::Responses, r#"{"conversation":"x-1"}"#, "x-1"),
            (Form::Responses, r#"{"conversation":{"id":"x-1"}}"#, "x-1"),
            (Form::Responses, r#"{"prompt":{"id":"pmpt_1","variables":{"v":{"type":"input_file","file_id":"x-1"}}}}"#, "x-1"),
            (Form::Responses, r#"{"input":[{"role":"user","content":[{"type":"input_file","file_id":"x-1"}]}]}"#, "x-1"),
            (
                Form::Responses,
                r#"{"input":[{"type":"computer_call_output","output":{"type":"computer_screenshot","file_id":"x-1"}}]}"#,
                "x-1",
            ),
            (Form::Responses, r#"{"input":[{"type":"function_call_output","output":[{"type":"input_image","file_id":"x-1"}]}]}"#, "x-1"),
            (Form::Responses, r#"{"tools":[{"type":"file_search","vector_store_ids":["x-1"]}]}"#, "x-1"),
            (Form::Responses, r#"{"tools":[{"type":"code_interpreter","container":"x-1"}]}"#, "x-1"),
            (Form::Responses, r#"{"tools":[{"type":"code_interpreter","container":{"type":"auto","file_ids":["x-1"]}}]}"#, "x-1"),
            (Form::Responses, r#"{"tools":[{"type":"shell","environment":{"container_id":"x-1"}}]}"#, "x-1"),
            (Form::Responses, r#"{"tools":[{"type":"image_generation","input_image_mask":{"file_id":"x-1"}}]}"#, "x-1"),
            (Form::Chat, r#"{"messages":[{"role":"user","content":[{"type":"file","file":{"file_id":"x-1"}}]}]}"#, "x-1"),
            (Form::Chat, r#"{"messages":[{"role":"assistant","audio":{"id":"x-1"}}]}"#, "x-1"),
            (Form::Messages, r#"{"messages":[{"content":[{"type":"document","source":{"type":"file","file_id":"x-1"}}]}]}"#, "x-1"),
            (Form::Messages, r#"{"messages":[{"content":[{"type":"container_upload","file_id":"x-1"}]}]}"#, "x-1"),
            (Form::Messages, r#"{"container":"x-1"}"#, "x-1"),
            (
                Form::Messages,
                r#"{"container":{"skills":[{"type":"anthropic","skill_id":"xlsx"},{"type":"custom","skill_id":"skill_01"}]}}"#,
                "skill_01",
            ),
            (Form::Count, r#"{"messages":[{"content":[{"type":"image","source":{"type":"file","file_id":"x-1"}}]}]}"#, "x-1"),
            (Form::Speech, r#"{"voice":{"id":"x-1"}}"#, "x-1"),
            (Form::Other, r#"{"a":[{"b":"file-Ab12cd"},"just text","gpt-4o-2024-08-06"]}"#, "file-Ab12cd"),
        ] {
            assert_eq!(read_as(form, text).unwrap().refs, [id], "{text}");
        }
        for (form, text) in [
            (Form::Chat, r#"{"messages":[{"role":"user","content":"file-Ab12cd"}],"metadata":{"file_id":"x-1"}}"#),
            (Form::Messages, r#"{"messages":[{"content":[{"type":"tool_use","id":"toolu_1","input":{"file_id":"x-1","id":"x-1"}}]}]}"#),
            (
                Form::Responses,
                r#"{"tools":[{"type":"function","parameters":{"properties":{"container":{"id":"x-1"}}}}],"conversation":null}"#,
            ),
            (Form::Speech, r#"{"voice":"alloy"}"#),
        ] {
            assert_eq!(read_as(form, text).unwrap().refs, [""; 0], "{text}");
        }
        for bad in [r#"{"previous_response_id":"../x"}"#, r#"{"previous_response_id":1}"#, r#"{"previous_response_id":""}"#] {
            assert!(read_as(Form::Responses, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_form_has_its_own_fields() {
        let unbounded = |form, text: &str| read_as(form, text).unwrap().unbounded;
        assert_eq!(unbounded(Form::Completions, r#"{"prompt":"x"}"#), None);
        assert_eq!(unbounded(Form::Responses, r#"{"prompt":{"id":"pmpt_1"}}"#), Some("prompt"));
        assert_eq!(unbounded(Form::Responses, r#"{"background":false}"#), None);
        assert!(read_as(Form::Responses, r#"{"background":true}"#).unwrap().background);
        assert_eq!(unbounded(Form::Images, r#"{"background":"transparent","prompt":"a cat"}"#), None);
        assert_eq!(unbounded(Form::Speech, r#"{"speed":2.0}"#), None);
        assert_eq!(unbounded(Form::Responses, r#"{"tools":[{"type":"computer_use_preview"}]}"#), Some("a tool that runs at the provider"));
        assert_eq!(unbounded(Form::Messages, r#"{"tools":[{"type":"computer_20250124"}]}"#), None);
        let spoken = read_as(Form::Speech, r#"{"input":"h\u00e9llo"}"#).unwrap();
        assert_eq!(spoken.characters, 5);
        let long = read_as(Form::Speech, &format!(r#"{{"input":"{}"}}"#, "é".repeat(10_000))).unwrap();
        assert_eq!(long.characters, 20_000, "of what nobody takes, the bytes");
        let images = read_as(Form::Images, r#"{"n":3,"size":"1024x1024","quality":"hd","partial_images":2}"#).unwrap();
        assert_eq!(
            (images.choices, images.size.as_deref(), images.quality.as_deref(), images.partial_images),
            (3, Some("1024x1024"), Some("hd"), 2)
        );
        for (input, texts) in [("\"a\"", 1), ("[\"a\",\"b\"]", 2), ("[1,2,3]", 1), ("[[1,2],[3],[4]]", 3), ("[]", 1)] {
            assert_eq!(read_as(Form::Embeddings, &format!("{{\"input\":{input}}}")).unwrap().texts, texts, "{input}");
        }
    }

    proptest! {
        /// What is admitted is what is forwarded: a second reader sees the admitted values, and all else unchanged.
        #[test]
        fn a_second_reader_sees_the_admitted_values(
            model in "[a-z\\\\\"é]{0,12}", max in proptest::option::of(1u64..1000), clamp in 1u64..1000, pad in "[ \n]{0,3}",
            text in ".{0,20}", options in 0..4, cut in 1usize..50,
        ) {
            let mut body = serde_json::json!({ "model": model, "messages": [{"role": "user", "content": text}], "stream": true });
            if let Some(max) = max { body["max_tokens"] = max.into(); }
            match options { 1 => body["stream_options"] = serde_json::json!({}), 2 => body["stream_options"] = serde_json::json!({"include_usage": false}),
                3 => body["stream_options"] = serde_json::Value::Null, _ => {} }
            let text = format!("{pad}{}{pad}", serde_json::to_string_pretty(&body).unwrap());
            let edits = Edits { model: Some("admitted"), max_tokens: Some(clamp), limits: &["max_tokens"], include_usage: true, ..Edits::default() };
            let seen: serde_json::Value = serde_json::from_str(&rewrite(&text, &edits, cut)).unwrap();
            prop_assert_eq!(&seen["model"], "admitted");
            prop_assert_eq!(seen["max_tokens"].as_u64().unwrap(), max.unwrap_or(u64::MAX).min(clamp));
            prop_assert_eq!(&seen["stream_options"]["include_usage"], true);
            prop_assert_eq!(&seen["messages"], &body["messages"]);
        }
    }
}
