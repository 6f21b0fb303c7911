//! Reads the callers' dialects.

mod anthropic;
mod openai;

pub use anthropic::read as anthropic;
pub use openai::read as openai;

use super::Problems;
use super::form::Source;
use crate::translate::doc::{Kind, Value};
use std::borrow::Cow;
use std::fmt;

/// An address of `data:` in a string, its Base64 escaped as it stood. None: it is another kind of address.
fn data_url<'d>(url: Value<'d>, at: impl fmt::Display, p: &mut Problems) -> Option<Source<'d>> {
    let inner = url.inner()?;
    // Some writers escape every slash.
    let is_data = inner.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"));
    let rest = is_data.then(|| inner.get(5..))??;
    let (head, data) = rest.split_once(',').unwrap_or((rest, ""));
    let head = if head.contains('\\') { Cow::Owned(head.replace("\\/", "/")) } else { Cow::Borrowed(head) };
    let mut parameters = head.split(';');
    let mime = parameters.next().unwrap_or_default().trim().to_ascii_lowercase();
    if !is_mime(&mime) || data.is_empty() || parameters.next_back().is_none_or(|last| !last.trim().eq_ignore_ascii_case("base64")) {
        p.invalid(at, "must be an address of the form data:type;base64,data");
    }
    Some(Source::Data { mime: Cow::Owned(mime), data })
}

/// A media type without parameters.
fn is_mime(text: &str) -> bool {
    let is_letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'+' | b'-' | b'_');
    text.split_once('/').is_some_and(|(a, b)| [a, b].iter().all(|part| !part.is_empty() && part.bytes().all(is_letter)))
}

/// A list of strings, or one string.
fn strings<'d>(value: Option<Value<'d>>, at: &str, p: &mut Problems) -> Vec<Value<'d>> {
    let Some(value) = value else { return Vec::new() };
    match value.kind() {
        Kind::Str => vec![value],
        Kind::Array => {
            value.items().enumerate().filter_map(|(i, item)| p.of_kind(Some(item), Kind::Str, format_args!("{at}[{i}]"))).collect()
        }
        _ => {
            p.invalid(at, "must be a string or a list of strings");
            Vec::new()
        }
    }
}

/// A tool's name as both OpenAI and Anthropic have it.
fn tool_name<'d>(name: Option<Value<'d>>, at: impl fmt::Display, p: &mut Problems) -> Option<Value<'d>> {
    let Some(name) = name.filter(|name| name.kind() == Kind::Str) else {
        p.invalid(at, "must be a string");
        return None;
    };
    let is_name = name
        .str()
        .is_some_and(|name| (1..=128).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-')));
    if !is_name {
        p.invalid(at, "must be 1 to 128 letters, digits, _ and -");
    }
    Some(name)
}
