//! Paths and queries from checked parts only.

use super::{Dialect, OTHER, Operation, Target};
use std::borrow::Cow;

/// Objects that one request may refer to, at most.
pub const MAX_REFS: usize = 64;
const MAX_ID: usize = 128;
const MAX_PATH: usize = 1_024;
const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/// Whether `text` is an id that a provider may have given: `[A-Za-z0-9_-]`, 1 to 128.
pub fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// What ids begin with, as far as providers say.
const KINDS: [&str; 29] = [
    "file",
    "resp",
    "batch",
    "thread",
    "vs",
    "vsfb",
    "asst",
    "conv",
    "msg",
    "run",
    "step",
    "ftjob",
    "ftckpt",
    "upload",
    "part",
    "cntr",
    "container",
    "cfile",
    "eval",
    "evalrun",
    "video",
    "skill",
    "skillver",
    "msgbatch",
    "rs",
    "fc",
    "ig",
    "chatcmpl",
    "voice",
];

/// An id's beginning and the rest of it.
fn kind(text: &str) -> Option<(&str, &str)> {
    let at = text.find(['_', '-'])?;
    Some((text.get(..at)?, text.get(at + 1..)?)).filter(|(kind, _)| KINDS.contains(kind))
}

/// Whether `text`, found where anything may stand, names an object at a provider: a kind that is known, then an id.
pub fn looks_like_object(text: &str) -> bool {
    is_id(text) && kind(text).is_some_and(|(_, rest)| rest.bytes().any(|b| b.is_ascii_digit() || b.is_ascii_uppercase()))
}

/// Words of a path that name no object: `file_batches`.
fn is_word(segment: &str) -> bool {
    let word = !segment.is_empty() && segment.len() <= 32 && segment.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    word && (kind(segment).is_none() || segment == "file_batches")
}

/// A model's name in a path.
fn is_model(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b':'))
        && text.bytes().any(|b| b.is_ascii_alphanumeric())
}

/// What stands in a template's braces.
#[derive(Debug, Default)]
pub struct Found {
    id: Option<String>,
    model: Option<String>,
}

/// Whether `path` is one of `template`'s.
pub fn fits(template: &str, path: &str) -> Option<Found> {
    if !template.contains('{') {
        return (template == path).then(Found::default);
    }
    let (mut found, mut segments) = (Found::default(), path.split('/'));
    for expected in template.split('/') {
        let segment = segments.next()?;
        match expected {
            "{id}" if is_id(segment) => found.id = Some(segment.to_owned()),
            "{model}" if is_model(segment) => found.model = Some(segment.to_owned()),
            _ if expected == segment && !expected.starts_with('{') => {}
            _ => return None,
        }
    }
    segments.next().is_none().then_some(found)
}

/// The target of a row of the table: its own path, with the ids that fit it and the query that it lists.
pub fn in_table(provider: Option<String>, operation: &'static Operation, path: &str, found: Found, query: &[u8]) -> Target {
    // `path` has been compared with the template piece by piece.
    let mut out = if operation.path.contains('{') { Cow::Owned(path.to_owned()) } else { Cow::Borrowed(operation.path) };
    let mut separator = '?';
    for (name, value) in pairs(query).flatten() {
        if !operation.query.contains(&name.strip_suffix("[]").unwrap_or(&name)) || value.contains(crate::token::PREFIX) {
            continue;
        }
        out.to_mut().push_str(&format!("{separator}{}={}", encode(&name), encode(&value)));
        separator = '&';
    }
    let refs = found.id.into_iter().collect();
    Target { provider, dialect: operation.dialect, operation, path: out, other: None, refs, model: found.model }
}

/// The target of a path that the table does not have, if it is well formed. The policy decides whether it may be called.
pub fn other(provider: Option<String>, dialect: Dialect, method: &str, path: &str, query: &[u8]) -> Option<Target> {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'~' | b'-');
    let segments: Vec<&str> = path.strip_prefix('/')?.split('/').collect();
    let well_formed = |segment: &&str| !segment.is_empty() && segment.bytes().all(fine) && !segment.bytes().all(|b| b == b'.');
    // What is no version's path is nobody's.
    if !METHODS.contains(&method)
        || !path.starts_with("/v1/")
        || path.len() > MAX_PATH
        || segments.len() < 2
        || !segments.iter().all(well_formed)
    {
        return None;
    }
    // Whatever is no plain word is taken for somebody's object.
    let mut refs: Vec<String> = segments.iter().skip(2).filter(|s| !is_word(s)).map(|s| (*s).to_owned()).collect();
    let mut out = path.to_owned();
    let mut separator = '?';
    for pair in pairs(query) {
        let (name, value) = pair?;
        if name == "key" {
            continue;
        }
        let fine = |text: &str| text.bytes().all(|b| fine(b) || matches!(b, b',' | b'[' | b']' | b':'));
        if !fine(&name) || !fine(&value) || value.contains(crate::token::PREFIX) || name.contains(crate::token::PREFIX) {
            return None;
        }
        if !is_word(&value) && !value.bytes().all(|b| b.is_ascii_digit()) {
            refs.push(value.clone());
        }
        out.push_str(&format!("{separator}{}={}", encode(&name), encode(&value)));
        separator = '&';
    }
    if refs.len() > MAX_REFS || out.len() > 2 * MAX_PATH {
        return None;
    }
    let endpoint = Some(format!("{method} {path}"));
    Some(Target { provider, dialect, operation: &OTHER, other: endpoint, path: Cow::Owned(out), refs, model: None })
}

/// Decoded names and values; `None` for a pair that can't be read.
fn pairs(query: &[u8]) -> impl Iterator<Item = Option<(String, String)>> {
    query.split(|&b| b == b'&').filter(|pair| !pair.is_empty()).map(|pair| {
        let at = pair.iter().position(|&b| b == b'=').unwrap_or(pair.len());
        Some((decode(pair.get(..at)?)?, decode(pair.get(at + 1..).unwrap_or_default())?))
    })
}

fn decode(text: &[u8]) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.iter();
    while let Some(&byte) = rest.next() {
        out.push(match byte {
            b'%' => {
                let digits = [*rest.next()?, *rest.next()?];
                digits.iter().all(u8::is_ascii_hexdigit).then_some(())?;
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok().filter(|text| !text.contains(char::is_control))
}

/// A text as it stands in a path or query.
pub fn encode(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}
