//! A JSON document in the bytes it came in: an index of where its values stand. Strings and whole values are copied as they are,
//! escapes and number forms included; nothing is built that is not looked at.

use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};
use std::borrow::Cow;

/// What a document is not read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    Json(JsonError),
    /// It has more values than may be kept.
    TooManyValues,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Object,
    Array,
    Str,
    Number,
    Bool,
    Null,
}

/// One value: 24 bytes for each that the document has.
#[derive(Debug, Clone, Copy)]
struct Node {
    kind: Kind,
    /// A string without escapes: its bytes are its text.
    is_plain: bool,
    start: u32,
    end: u32,
    /// Of a member, its key with the quotes.
    key: (u32, u32),
    /// The value after this one and all that is in it.
    next: u32,
}

/// Bytes that a value and its key usually take, and values that there is room for from the start.
const USUAL_VALUE: usize = 32;
const USUAL_VALUES: usize = 4_096;

/// An index of one document.
#[derive(Debug)]
pub struct Doc<'a> {
    text: &'a str,
    nodes: Vec<Node>,
}

impl<'a> Doc<'a> {
    /// Reads a document of at most `max_values` values.
    pub fn read(bytes: &'a [u8], max_values: usize) -> Result<Self, Unreadable> {
        if u32::try_from(bytes.len()).is_err() {
            return Err(Unreadable::TooManyValues);
        }
        let nodes = Vec::with_capacity((bytes.len() / USUAL_VALUE + 1).min(USUAL_VALUES));
        let (mut scanner, mut index) = (Scanner::default(), Index { nodes, max_values, open: Vec::new(), key: (0, 0) });
        scanner.feed(bytes, &mut index).and_then(|()| scanner.finish(&mut index)).map_err(|stop| stop.0)?;
        // The scanner takes nothing but UTF-8.
        let text = std::str::from_utf8(bytes).map_err(|_| Unreadable::Json(JsonError::Utf8(0)))?;
        Ok(Doc { text, nodes: index.nodes })
    }

    pub fn root(&self) -> Value<'_> {
        Value { doc: self, at: 0 }
    }

    fn slice(&self, start: u32, end: u32) -> &str {
        self.text.get(start as usize..end as usize).unwrap_or_default()
    }
}

/// A value of a document.
#[derive(Debug, Clone, Copy)]
pub struct Value<'d> {
    doc: &'d Doc<'d>,
    at: u32,
}

impl<'d> Value<'d> {
    fn node(self) -> Node {
        const NOTHING: Node = Node { kind: Kind::Null, is_plain: true, start: 0, end: 0, key: (0, 0), next: u32::MAX };
        self.doc.nodes.get(self.at as usize).copied().unwrap_or(NOTHING)
    }

    pub fn kind(self) -> Kind {
        self.node().kind
    }

    pub fn is_null(self) -> bool {
        self.kind() == Kind::Null
    }

    /// The value's bytes as they stand in the document.
    pub fn raw(self) -> &'d str {
        let node = self.node();
        self.doc.slice(node.start, node.end)
    }

    /// A string's text.
    pub fn str(self) -> Option<Cow<'d, str>> {
        let node = self.node();
        (node.kind == Kind::Str).then(|| text(self.raw(), node.is_plain))
    }

    /// Whether it is this string.
    pub fn is(self, text: &str) -> bool {
        self.str().is_some_and(|own| own == text)
    }

    /// A string's escaped text, without its quotes: several can be put together into one.
    pub fn inner(self) -> Option<&'d str> {
        (self.kind() == Kind::Str).then(|| inner(self.raw()))
    }

    pub fn bool(self) -> Option<bool> {
        (self.kind() == Kind::Bool).then(|| self.raw() == "true")
    }

    /// A whole number.
    pub fn integer(self) -> Option<i64> {
        (self.kind() == Kind::Number).then(|| self.raw().parse().ok())?
    }

    /// The member of this name; of several the last, as most readers have it. `None` where it is null.
    pub fn get(self, name: &str) -> Option<Value<'d>> {
        self.members().filter(|(key, _)| key == name).last().map(|(_, value)| value).filter(|value| !value.is_null())
    }

    /// The members of an object, in order; of anything else none.
    pub fn members(self) -> impl Iterator<Item = (Cow<'d, str>, Value<'d>)> {
        let doc = self.doc;
        self.children(Kind::Object).map(move |value| {
            let (start, end) = value.node().key;
            let key = doc.slice(start, end);
            (text(key, !key.contains('\\')), value)
        })
    }

    /// The items of an array, in order; of anything else none.
    pub fn items(self) -> impl Iterator<Item = Value<'d>> {
        self.children(Kind::Array)
    }

    fn children(self, of: Kind) -> impl Iterator<Item = Value<'d>> {
        let node = self.node();
        let doc = self.doc;
        let end = if node.kind == of { node.next } else { 0 };
        let mut at = self.at.saturating_add(1);
        std::iter::from_fn(move || {
            let value = (at < end).then_some(Value { doc, at })?;
            // Each step goes on, whatever stands there.
            at = value.node().next.max(at.saturating_add(1));
            Some(value)
        })
    }
}

fn inner(quoted: &str) -> &str {
    quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or_default()
}

fn text(quoted: &str, is_plain: bool) -> Cow<'_, str> {
    if is_plain {
        return Cow::Borrowed(inner(quoted));
    }
    // The scanner let only pairs of surrogates pass.
    Cow::Owned(serde_json::from_str(quoted).unwrap_or_default())
}

/// Builds the index while the document is read, and stops at too many values.
struct Index {
    nodes: Vec<Node>,
    max_values: usize,
    /// Objects and arrays that have not closed, by their place.
    open: Vec<usize>,
    /// Where the key stands whose value comes next.
    key: (u32, u32),
}

struct Stop(Unreadable);

impl From<JsonError> for Stop {
    fn from(error: JsonError) -> Self {
        Stop(Unreadable::Json(error))
    }
}

impl Index {
    fn push(&mut self, kind: Kind, is_plain: bool, span: Span) -> Result<(), Stop> {
        if self.nodes.len() >= self.max_values {
            return Err(Stop(Unreadable::TooManyValues));
        }
        let next = offset(self.nodes.len() as u64 + 1);
        self.nodes.push(Node {
            kind,
            is_plain,
            start: offset(span.start),
            end: offset(span.end),
            key: std::mem::take(&mut self.key),
            next,
        });
        Ok(())
    }
}

/// Offsets of 32 bits are enough for any body that is let in; a larger one is not read.
fn offset(at: u64) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

impl Visitor for Index {
    type Error = Stop;

    fn open(&mut self, object: bool, at: u64) -> Result<(), Stop> {
        self.open.push(self.nodes.len());
        self.push(if object { Kind::Object } else { Kind::Array }, true, Span { start: at, end: at })
    }

    fn close(&mut self, at: u64) -> Result<(), Stop> {
        let next = offset(self.nodes.len() as u64);
        if let Some(node) = self.open.pop().and_then(|opened| self.nodes.get_mut(opened)) {
            (node.end, node.next) = (offset(at + 1), next);
        }
        Ok(())
    }

    fn key(&mut self, _: Option<&[u8]>) -> Result<(), Stop> {
        Ok(())
    }

    fn key_at(&mut self, span: Span) {
        self.key = (offset(span.start), offset(span.end));
    }

    fn wants(&self) -> usize {
        0
    }

    fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), Stop> {
        let (kind, is_plain) = match value {
            // An escape is longer than what it stands for.
            Scalar::Str { len, .. } => (Kind::Str, len + 2 == span.end - span.start),
            Scalar::Num(_) => (Kind::Number, true),
            Scalar::Bool(_) => (Kind::Bool, true),
            Scalar::Null => (Kind::Null, true),
        };
        self.push(kind, is_plain, span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// What the document says, put together again value by value.
    fn rebuilt(value: Value<'_>) -> serde_json::Value {
        match value.kind() {
            Kind::Object => value.members().map(|(key, value)| (key.into_owned(), rebuilt(value))).collect(),
            Kind::Array => value.items().map(rebuilt).collect(),
            Kind::Str => value.str().unwrap().into(),
            Kind::Bool => value.bool().unwrap().into(),
            Kind::Null => serde_json::Value::Null,
            Kind::Number => serde_json::from_str(value.raw()).unwrap(),
        }
    }

    #[test]
    fn a_value_knows_its_bytes() {
        let text = r#" {"a" : [1, -2.50e3 ,{"b":"x\"\u00e9\n"}], "c":{}, "d":[] ,"a\u0062":true,"e":null,"s":"plain"} "#;
        let doc = Doc::read(text.as_bytes(), 100).unwrap();
        let root = doc.root();
        assert_eq!(root.get("a").unwrap().raw(), r#"[1, -2.50e3 ,{"b":"x\"\u00e9\n"}]"#);
        let b = root.get("a").unwrap().items().nth(2).unwrap().get("b").unwrap();
        assert_eq!((b.str().unwrap().as_ref(), b.inner()), ("x\"é\n", Some(r#"x\"\u00e9\n"#)));
        assert_eq!((root.get("ab").unwrap().bool(), root.get("e").is_none(), root.get("nothing").is_none()), (Some(true), true, true));
        assert!(root.get("s").unwrap().is("plain") && root.get("s").unwrap().items().next().is_none());
        assert_eq!(root.get("a").unwrap().items().next().unwrap().integer(), Some(1));
        assert_eq!(rebuilt(root), serde_json::from_str::<serde_json::Value>(text).unwrap());
    }

    #[test]
    fn of_two_members_of_one_name_the_last_counts() {
        let doc = Doc::read(br#"{"a":1,"a":2}"#, 100).unwrap();
        assert_eq!(doc.root().get("a").and_then(Value::integer), Some(2));
    }

    #[test]
    fn what_is_no_document_or_too_much_of_one_is_not_read() {
        assert!(matches!(Doc::read(b"{\"a\":}", 100), Err(Unreadable::Json(_))));
        assert!(matches!(Doc::read(b"\"\xff\"", 100), Err(Unreadable::Json(_))));
        assert!(matches!(Doc::read(b"[1,2,3]", 3), Err(Unreadable::TooManyValues)));
        assert!(Doc::read(b"[1,2,3]", 4).is_ok());
    }

    fn documents() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            "[a:,\"\\\\{}\\[\\]é\u{1f600}\n ]{0,6}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                proptest::collection::btree_map("[a\":\\\\é]{0,3}", inner, 0..5).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_document_reads_as_another_reader_reads_it(document in documents(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&document) } else { serde_json::to_string(&document) }.unwrap();
            let doc = Doc::read(text.as_bytes(), 10_000).unwrap();
            prop_assert_eq!(rebuilt(doc.root()), document);
        }

        #[test]
        fn any_bytes_are_read_or_not(bytes in proptest::collection::vec(proptest::sample::select(&b"{}[]\",:\\u0a1e-. tfn"[..]), 0..40)) {
            let other = serde_json::from_slice::<serde_json::Value>(&bytes);
            if let Ok(doc) = Doc::read(&bytes, 1_000) {
                // Numbers that another reader has no room for are fine here.
                if let Ok(other) = other {
                    prop_assert_eq!(rebuilt(doc.root()), other);
                }
            } else {
                prop_assert!(other.is_err());
            }
        }
    }
}
