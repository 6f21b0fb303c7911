//! What a request body must tell before anything is decided, read in pieces, and the few bytes that are then written
//! into it. The document is never built: what is admitted is what is forwarded, all else passes byte for byte.

use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};

/// Longest model name that is read.
const MAX_MODEL: usize = 256;
/// Longest string value of any other governed field.
const MAX_WORD: usize = 64;

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
        }
    }
}

/// The fields at the top of a request that decide what it may cost, in any dialect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Model,
    Stream,
    StreamOptions,
    MaxTokens,
    MaxCompletionTokens,
    MaxOutputTokens,
    N,
    BestOf,
    Tools,
    Messages,
    System,
    Thinking,
    ServiceTier,
    /// Present and not null: the cost has no bound that this version can tell.
    Unbounded(&'static str),
}

/// Name, field. The names are matched after unescaping; a case variant of one is refused.
const FIELDS: &[(&str, Field)] = &[
    ("model", Field::Model),
    ("stream", Field::Stream),
    ("stream_options", Field::StreamOptions),
    ("max_tokens", Field::MaxTokens),
    ("max_completion_tokens", Field::MaxCompletionTokens),
    ("max_output_tokens", Field::MaxOutputTokens),
    ("n", Field::N),
    ("best_of", Field::BestOf),
    ("tools", Field::Tools),
    ("messages", Field::Messages),
    ("system", Field::System),
    ("thinking", Field::Thinking),
    ("service_tier", Field::ServiceTier),
    ("web_search_options", Field::Unbounded("web_search_options")),
    ("mcp_servers", Field::Unbounded("mcp_servers")),
    ("container", Field::Unbounded("container")),
    ("background", Field::Unbounded("background")),
    ("prompt", Field::Unbounded("prompt")),
    ("audio", Field::Unbounded("audio")),
    ("modalities", Field::Unbounded("modalities")),
    ("models", Field::Unbounded("models")),
    ("plugins", Field::Unbounded("plugins")),
    ("speed", Field::Unbounded("speed")),
    ("inference_geo", Field::Unbounded("inference_geo")),
];

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
    /// n x best_of, at least 1.
    pub choices: u64,
    pub thinking_budget: u64,
    pub images: u64,
    /// The first thing found whose cost has no bound.
    pub unbounded: Option<&'static str>,
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

impl BodyFacts {
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
}

impl BodyFacts {
    /// The splices that make the body say exactly what was admitted, in order. Empty: forward as it came.
    pub fn splices(&self, edits: &Edits<'_>) -> Vec<Splice> {
        let mut out = Vec::new();
        let mut members = Vec::new();
        if let (Some(admitted), Some(asked)) = (edits.model, &self.model)
            && admitted != asked
        {
            out.push(replace(self.model_span, json_string(admitted)));
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

/// Reads a body in pieces.
#[derive(Debug, Default)]
pub struct BodyReader {
    scanner: Scanner,
    walk: Walk,
}

impl BodyReader {
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), BodyError> {
        self.scanner.feed(piece, &mut self.walk)
    }

    pub fn position(&self) -> u64 {
        self.scanner.position()
    }

    pub fn finish(mut self) -> Result<BodyFacts, BodyError> {
        self.scanner.finish(&mut self.walk)?;
        let mut facts = self.walk.facts;
        facts.bytes = self.scanner.position();
        facts.choices = self.walk.n.max(1).saturating_mul(self.walk.best_of.max(1));
        Ok(facts)
    }
}

/// Where the reading stands: what the innermost object or array is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    StreamOptions,
    Tools,
    Tool,
    Messages,
    Message,
    /// A string or an array of parts.
    Content,
    Part,
    Source,
    Thinking,
    Other,
}

/// What the value that comes next is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Top(Field),
    IncludeUsage,
    ToolType,
    PartType,
    SourceType,
    ThinkingBudget,
    Into(Node),
    Ignored,
}

#[derive(Debug, Default)]
struct Walk {
    nodes: Vec<(Node, Slot)>,
    seen: Vec<Field>,
    seen_include_usage: bool,
    seen_thinking: bool,
    n: u64,
    best_of: u64,
    facts: BodyFacts,
}

impl Walk {
    fn node(&self) -> Node {
        self.nodes.last().map_or(Node::Other, |&(node, _)| node)
    }

    /// What stands next: the slot that the last key opened, or an array's item.
    fn slot(&self) -> Slot {
        match self.nodes.last() {
            Some((Node::Tools, _)) => Slot::Into(Node::Tool),
            Some((Node::Messages, _)) => Slot::Into(Node::Message),
            Some((Node::Content, _)) => Slot::Into(Node::Part),
            Some(&(_, slot)) => slot,
            None => Slot::Into(Node::Root),
        }
    }

    fn set_slot(&mut self, slot: Slot) {
        if let Some(top) = self.nodes.last_mut() {
            top.1 = slot;
        }
    }

    fn top_field(&mut self, key: &[u8]) -> Result<Slot, BodyError> {
        let Some(&(name, field)) = FIELDS.iter().find(|(name, _)| folds_to(key, name)) else { return Ok(Slot::Ignored) };
        if key != name.as_bytes() || self.seen.contains(&field) {
            return Err(BodyError::Ambiguous(name));
        }
        self.seen.push(field);
        Ok(Slot::Top(field))
    }

    fn unbounded(&mut self, what: &'static str) {
        self.facts.unbounded.get_or_insert(what);
    }

    fn limit(&mut self, name: &'static str, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        let tokens = match value {
            Scalar::Null => None,
            _ => Some(count(value).ok_or(BodyError::Field(name, "a whole number of at most 1,000,000,000"))?),
        };
        self.facts.limits.push(Limit { name, tokens, span });
        Ok(())
    }

    fn top_scalar(&mut self, field: Field, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        match (field, value) {
            (Field::Model, Scalar::Str { text, len }) if len == text.len() as u64 => {
                self.facts.model = Some(String::from_utf8_lossy(text).into_owned());
                self.facts.model_span = span;
            }
            (Field::Model, _) => return Err(BodyError::Field("model", "a string of at most 256 bytes")),
            (Field::Stream, Scalar::Bool(stream)) => self.facts.stream = stream,
            (Field::Stream, Scalar::Null) => {}
            (Field::Stream, _) => return Err(BodyError::Field("stream", "true or false")),
            (Field::StreamOptions, Scalar::Null) => {
                self.facts.stream_options = Some(None);
                self.facts.stream_options_span = span;
            }
            (Field::StreamOptions, _) => return Err(BodyError::Field("stream_options", "an object")),
            (Field::MaxTokens, _) => return self.limit("max_tokens", value, span),
            (Field::MaxCompletionTokens, _) => return self.limit("max_completion_tokens", value, span),
            (Field::MaxOutputTokens, _) => return self.limit("max_output_tokens", value, span),
            (Field::N | Field::BestOf, Scalar::Null) => {}
            (Field::N, _) => self.n = choices(value).ok_or(BodyError::Field("n", "a whole number of at most 1024"))?,
            (Field::BestOf, _) => self.best_of = choices(value).ok_or(BodyError::Field("best_of", "a whole number of at most 1024"))?,
            (Field::ServiceTier, Scalar::Null) => {}
            (Field::ServiceTier, Scalar::Str { text: b"auto" | b"default" | b"standard" | b"standard_only", .. }) => {}
            (Field::ServiceTier, _) => self.unbounded("service_tier"),
            (Field::Unbounded(_), Scalar::Null) => {}
            (Field::Unbounded(what), _) => self.unbounded(what),
            (Field::Tools | Field::Messages | Field::System | Field::Thinking, _) => {}
        }
        Ok(())
    }

    fn enter(&mut self, object: bool, at: u64) -> Result<Node, BodyError> {
        let node = match self.slot() {
            Slot::Into(Node::Root) if object => {
                self.facts.root.open = at;
                Node::Root
            }
            Slot::Into(Node::Root) => return Err(BodyError::NotAnObject),
            Slot::Into(Node::Content) => if_array(object, Node::Content),
            Slot::Into(node) => if_object(object, node),
            Slot::Top(Field::StreamOptions) if object => {
                self.facts.stream_options = Some(Some(Object { open: at, filled: false }));
                Node::StreamOptions
            }
            Slot::Top(Field::Tools) => if_array(object, Node::Tools),
            Slot::Top(Field::Messages) => if_array(object, Node::Messages),
            Slot::Top(Field::System) => if_array(object, Node::Content),
            Slot::Top(Field::Thinking) => if_object(object, Node::Thinking),
            Slot::Top(Field::Unbounded(what)) => {
                self.unbounded(what);
                Node::Other
            }
            Slot::Ignored => Node::Other,
            Slot::Top(field) => return Err(BodyError::Field(name_of(field), "a scalar")),
            Slot::IncludeUsage | Slot::ToolType | Slot::PartType | Slot::SourceType | Slot::ThinkingBudget => {
                return Err(BodyError::Field("type", "a scalar"));
            }
        };
        Ok(node)
    }
}

impl Visitor for Walk {
    type Error = BodyError;

    fn open(&mut self, object: bool, at: u64) -> Result<(), BodyError> {
        let node = self.enter(object, at)?;
        self.nodes.push((node, Slot::Ignored));
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), BodyError> {
        self.nodes.pop();
        Ok(())
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), BodyError> {
        let key = key.unwrap_or_default();
        let slot = match self.node() {
            Node::Root => {
                self.facts.root.filled = true;
                self.top_field(key)?
            }
            Node::StreamOptions => {
                if let Some(Some(object)) = &mut self.facts.stream_options {
                    object.filled = true;
                }
                match governed(key, "include_usage", &mut self.seen_include_usage)? {
                    true => Slot::IncludeUsage,
                    false => Slot::Ignored,
                }
            }
            Node::Thinking if governed(key, "budget_tokens", &mut self.seen_thinking)? => Slot::ThinkingBudget,
            Node::Tool if folds_to(key, "type") => Slot::ToolType,
            Node::Part if folds_to(key, "type") => Slot::PartType,
            Node::Source if folds_to(key, "type") => Slot::SourceType,
            Node::Part if folds_to(key, "source") => Slot::Into(Node::Source),
            Node::Part | Node::Message if folds_to(key, "content") => Slot::Into(Node::Content),
            Node::Message if folds_to(key, "audio") => {
                self.unbounded("audio");
                Slot::Ignored
            }
            _ => Slot::Ignored,
        };
        self.set_slot(slot);
        Ok(())
    }

    fn wants(&self) -> usize {
        match self.slot() {
            Slot::Top(Field::Model) => MAX_MODEL,
            Slot::Ignored | Slot::Into(_) => 0,
            _ => MAX_WORD,
        }
    }

    fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        match (self.slot(), value) {
            (Slot::Into(Node::Root), _) => return Err(BodyError::NotAnObject),
            (Slot::Top(field), _) => return self.top_scalar(field, value, span),
            (Slot::IncludeUsage, Scalar::Bool(asked)) => {
                self.facts.include_usage = asked;
                self.facts.include_usage_span = Some(span);
            }
            (Slot::IncludeUsage, Scalar::Null) => self.facts.include_usage_span = Some(span),
            (Slot::IncludeUsage, _) => return Err(BodyError::Field("stream_options.include_usage", "true or false")),
            (Slot::ThinkingBudget, Scalar::Null) => {}
            (Slot::ThinkingBudget, _) => {
                self.facts.thinking_budget =
                    count(value).ok_or(BodyError::Field("thinking.budget_tokens", "a whole number of at most 1,000,000,000"))?;
            }
            (Slot::ToolType, Scalar::Str { text, .. }) if !runs_at_the_client(text) => self.unbounded("a tool that runs at the provider"),
            (Slot::PartType, Scalar::Str { text, .. }) => match text {
                b"image_url" | b"image" | b"input_image" => self.facts.images += 1,
                b"input_audio" | b"file" | b"input_file" | b"document" | b"container_upload" | b"video_url" => {
                    self.unbounded("a file or audio part");
                }
                _ => {}
            },
            (Slot::SourceType, Scalar::Str { text: b"file", .. }) => self.unbounded("a file or audio part"),
            _ => {}
        }
        Ok(())
    }
}

/// Tools whose calls the client itself runs; every other kind may cost money at the provider.
fn runs_at_the_client(kind: &[u8]) -> bool {
    const KINDS: [&[u8]; 4] = [b"bash_", b"text_editor_", b"computer_", b"memory_"];
    matches!(kind, b"function" | b"custom") || KINDS.iter().any(|k| kind.starts_with(k))
}

fn governed(key: &[u8], name: &'static str, seen: &mut bool) -> Result<bool, BodyError> {
    if !folds_to(key, name) {
        return Ok(false);
    }
    if *seen || key != name.as_bytes() {
        return Err(BodyError::Ambiguous(name));
    }
    *seen = true;
    Ok(true)
}

/// Whether some JSON reader could take `key` for `name`: case is folded, with the two letters outside ASCII that fold
/// into it (U+017F to s, U+212A to k), as Go's encoding/json does.
fn folds_to(key: &[u8], name: &str) -> bool {
    if key.is_ascii() {
        return key.eq_ignore_ascii_case(name.as_bytes());
    }
    let Ok(text) = std::str::from_utf8(key) else { return false };
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    text.chars().map(fold).eq(name.chars())
}

/// A whole number that some request could mean; beyond, sums of money would leave their type.
fn count(value: Scalar<'_>) -> Option<u64> {
    const MOST: u64 = 1_000_000_000;
    let Scalar::Num(digits) = value else { return None };
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|n| *n <= MOST)
}

/// How many answers are asked for: far more than any provider gives.
fn choices(value: Scalar<'_>) -> Option<u64> {
    count(value).filter(|n| *n <= 1_024)
}

fn if_object(object: bool, node: Node) -> Node {
    if object { node } else { Node::Other }
}

fn if_array(object: bool, node: Node) -> Node {
    if object { Node::Other } else { node }
}

fn name_of(field: Field) -> &'static str {
    FIELDS.iter().find(|(_, f)| *f == field).map_or("", |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(text: &str) -> Result<BodyFacts, BodyError> {
        let mut reader = BodyReader::default();
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
            (r#"{"service_tier":"priority"}"#, "service_tier"),
        ] {
            assert_eq!(read(text).unwrap().unbounded, Some(what), "{text}");
        }
        for fine in [
            r#"{"audio":null,"prompt":null}"#,
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
        let all =
            Edits { model: Some("b\"c"), max_tokens: Some(7), limits: &["max_completion_tokens", "max_tokens"], include_usage: false };
        assert_eq!(rewrite(r#"{"model":"a","x":[1, 2]}"#, &all, 2), r#"{"max_completion_tokens":7,"model":"b\"c","x":[1, 2]}"#);
        assert_eq!(rewrite(r#"{"max_tokens": 90,"max_completion_tokens":5}"#, &all, 2), r#"{"max_tokens": 7,"max_completion_tokens":5}"#);
        assert_eq!(rewrite(r#"{"max_tokens":null}"#, &all, 2), r#"{"max_tokens":7}"#);
        assert_eq!(
            rewrite(r#"{"max_output_tokens":5}"#, &all, 2),
            r#"{"max_completion_tokens":7,"max_output_tokens":5}"#,
            "a foreign name limits nothing"
        );
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
            let edits = Edits { model: Some("admitted"), max_tokens: Some(clamp), limits: &["max_tokens"], include_usage: true };
            let seen: serde_json::Value = serde_json::from_str(&rewrite(&text, &edits, cut)).unwrap();
            prop_assert_eq!(&seen["model"], "admitted");
            prop_assert_eq!(seen["max_tokens"].as_u64().unwrap(), max.unwrap_or(u64::MAX).min(clamp));
            prop_assert_eq!(&seen["stream_options"]["include_usage"], true);
            prop_assert_eq!(&seen["messages"], &body["messages"]);
        }
    }
}
