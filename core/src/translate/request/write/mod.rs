//! Writes the providers' dialects.

mod anthropic;
mod gemini;
mod openai;

pub use anthropic::write as anthropic;
pub use gemini::write as gemini;
pub use openai::write as openai;

use super::Problems;
use super::form::{Call, Tool};
use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};
use crate::translate::doc::{Kind, Value};
use crate::translate::write::Writer;
use std::borrow::Cow;

/// Room for what a body of this size becomes at most, give or take: arguments that are written as a string escape every quote. Growing
/// on the way would for a moment need both copies, and a worker has 64 MiB.
fn room(size: usize) -> usize {
    size.saturating_mul(2)
}

/// The arguments of a call: an object, as JSON.
fn arguments<'d>(call: &Call<'d>, p: &mut Problems) -> Cow<'d, str> {
    let Some(input) = call.input else { return Cow::Borrowed("{}") };
    let text = match input.kind() {
        Kind::Object => return Cow::Borrowed(input.raw()),
        _ => input.str().unwrap_or_default(),
    };
    if text.trim().is_empty() {
        return Cow::Borrowed("{}");
    }
    if !is_object(&text) {
        p.invalid(call.place, "must be a JSON object in a string");
    }
    text
}

/// Whether a text is JSON, an object.
fn is_object(text: &str) -> bool {
    let mut scanner = Scanner::default();
    let read = scanner.feed(text.as_bytes(), &mut Nothing).and_then(|()| scanner.finish(&mut Nothing));
    read.is_ok() && text.trim_start_matches([' ', '\t', '\r', '\n']).starts_with('{')
}

/// Reads a document only to know that it is one.
struct Nothing;

impl Visitor for Nothing {
    type Error = JsonError;

    fn open(&mut self, _: bool, _: u64) -> Result<(), JsonError> {
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), JsonError> {
        Ok(())
    }

    fn key(&mut self, _: Option<&[u8]>) -> Result<(), JsonError> {
        Ok(())
    }

    fn wants(&self) -> usize {
        0
    }

    fn scalar(&mut self, _: Scalar<'_>, _: Span) -> Result<(), JsonError> {
        Ok(())
    }
}

/// Several strings as one.
fn joined<'d>(w: &mut Writer, texts: impl Iterator<Item = Value<'d>>, between: &'static str, before: &'static str) {
    let mut is_first = true;
    let parts = texts.flat_map(|text| {
        let separator = if std::mem::replace(&mut is_first, false) { before } else { between };
        [separator, text.inner().unwrap_or_default()]
    });
    w.parts(parts);
}

/// The tools whose names the provider takes.
fn named<'c, 'd>(tools: &'c [Tool<'d>], field: &str, fits: impl Fn(&str) -> bool, why: &str, p: &mut Problems) -> Vec<&'c Tool<'d>> {
    let mut kept = Vec::new();
    for tool in tools {
        if tool.name.str().is_some_and(|name| fits(&name)) {
            kept.push(tool);
        } else {
            p.unsupported(format_args!("tools[{}]{field}", tool.index), why);
        }
    }
    kept
}
