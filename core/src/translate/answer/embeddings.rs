//! Embeddings: Gemini's batchEmbedContents as OpenAI's list. The numbers are read as they pass: there are too many to keep an index of.

use super::Terms;
use super::event::put;
use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};
use crate::translate::doc::Unreadable;
use crate::translate::write::escape;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::io::Write;

/// Reads the answer and writes it, each number as it stands, or all of a list as base64 of 32-bit floats, lowest byte first.
pub(super) fn embeddings(body: &[u8], terms: &Terms) -> Result<String, Unreadable> {
    let mut list = List { is_base64: terms.base64, out: Vec::with_capacity(body.len()), ..List::default() };
    let mut scanner = Scanner::default();
    scanner.feed(body, &mut list).and_then(|()| scanner.finish(&mut list)).map_err(Unreadable::Json)?;
    if !list.is_answer {
        return Err(Unreadable::Json(JsonError::Syntax(0)));
    }
    let mut model = String::new();
    escape(&terms.model, &mut model);
    let tokens = list.tokens;
    let mut out = b"{\"object\":\"list\",\"data\":[".to_vec();
    out.append(&mut list.out);
    let _ = write!(out, r#"],"model":{model},"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#);
    String::from_utf8(out).map_err(|_| Unreadable::Json(JsonError::Utf8(0)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Root,
    Embeddings,
    Embedding,
    Values,
    Usage,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Key {
    Embeddings,
    Embedding,
    Values,
    Usage,
    Tokens,
    #[default]
    Other,
}

#[derive(Default)]
struct List {
    is_base64: bool,
    is_answer: bool,
    places: Vec<Place>,
    key: Key,
    /// Lists so far.
    count: u32,
    /// Numbers of the list in hand.
    numbers: u32,
    floats: Vec<u8>,
    out: Vec<u8>,
    tokens: u64,
}

impl List {
    fn place(&self) -> Option<Place> {
        self.places.last().copied()
    }

    fn begin(&mut self) {
        let comma = if self.count == 0 { "" } else { "," };
        let _ = write!(self.out, r#"{comma}{{"object":"embedding","index":{},"embedding":"#, self.count);
        put(&mut self.out, &[if self.is_base64 { "\"" } else { "[" }]);
        self.count = self.count.saturating_add(1);
        self.numbers = 0;
        self.floats.clear();
    }

    fn number(&mut self, digits: &[u8]) {
        if self.is_base64 {
            let float = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse::<f32>().ok()).unwrap_or(0.0);
            self.floats.extend_from_slice(&float.to_le_bytes());
        } else {
            put(&mut self.out, &[if self.numbers == 0 { "" } else { "," }]);
            self.out.extend_from_slice(digits);
            self.numbers = self.numbers.saturating_add(1);
        }
    }

    fn finish(&mut self) {
        if self.is_base64 {
            put(&mut self.out, &[&STANDARD.encode(&self.floats), "\"}"]);
        } else {
            put(&mut self.out, &["]}"]);
        }
    }
}

impl Visitor for List {
    type Error = JsonError;

    fn open(&mut self, object: bool, _: u64) -> Result<(), JsonError> {
        let place = match (self.place(), std::mem::take(&mut self.key), object) {
            (None, _, true) => Place::Root,
            (Some(Place::Root), Key::Embeddings, false) => Place::Embeddings,
            // The answer to a single content.
            (Some(Place::Root), Key::Embedding, true) | (Some(Place::Embeddings), _, true) => Place::Embedding,
            (Some(Place::Embedding), Key::Values, false) => Place::Values,
            (Some(Place::Root), Key::Usage, true) => Place::Usage,
            _ => Place::Other,
        };
        self.is_answer |= matches!(place, Place::Embeddings | Place::Embedding);
        if place == Place::Values {
            self.begin();
        }
        self.places.push(place);
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), JsonError> {
        if self.places.pop() == Some(Place::Values) {
            self.finish();
        }
        Ok(())
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
        self.key = match key {
            Some(b"embeddings") => Key::Embeddings,
            Some(b"embedding") => Key::Embedding,
            Some(b"values") => Key::Values,
            Some(b"usageMetadata") => Key::Usage,
            Some(b"promptTokenCount") => Key::Tokens,
            _ => Key::Other,
        };
        Ok(())
    }

    fn wants(&self) -> usize {
        0
    }

    fn scalar(&mut self, value: Scalar<'_>, _: Span) -> Result<(), JsonError> {
        match (value, self.place(), std::mem::take(&mut self.key)) {
            (Scalar::Num(digits), Some(Place::Values), _) => self.number(digits),
            (Scalar::Num(digits), Some(Place::Usage), Key::Tokens) => {
                self.tokens = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).unwrap_or(0);
            }
            _ => {}
        }
        Ok(())
    }
}
