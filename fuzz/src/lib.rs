//! What the fuzz targets have in common: how an input is read, how a body is cut, and what every writer's output must be.
//!
//! An input is a header of six bytes and then what the target reads. The header's first four bytes choose among the ways to read, its
//! last two say where the body is cut. So a mutation of the body moves nothing else; `tools/fuzz` writes the same form.

use keyward_core::json::JsonError;
use keyward_core::operation::{Dialect, Form};
use keyward_core::translate::doc::{Doc, Unreadable};
use serde::de::IgnoredAny;

pub const FORMS: [Form; 10] = [
    Form::Chat,
    Form::Messages,
    Form::Count,
    Form::Responses,
    Form::Completions,
    Form::Embeddings,
    Form::Moderations,
    Form::Images,
    Form::Speech,
    Form::Other,
];
pub const PROVIDERS: [Dialect; 3] = [Dialect::OpenAi, Dialect::Anthropic, Dialect::Gemini];
pub const CALLERS: [Dialect; 2] = [Dialect::OpenAi, Dialect::Anthropic];

/// The choices of an input, taken one after the other: digits of a number, each in a base of its own.
pub struct Choices(u32);

impl Choices {
    /// One of `0..below`.
    pub fn number(&mut self, below: u32) -> u32 {
        let number = self.0 % below;
        self.0 /= below;
        number
    }

    pub fn flag(&mut self) -> bool {
        self.number(2) == 1
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.number(all.len() as u32) as usize]
    }
}

/// An input, taken apart: choices, where to cut, and the body. `None`: too short to be one.
pub fn input(data: &[u8]) -> Option<(Choices, Cuts, &[u8])> {
    let (&[a, b, c, d, e, f], body) = data.split_first_chunk::<6>()?;
    Some((Choices(u32::from_le_bytes([a, b, c, d])), Cuts(u16::from_le_bytes([e, f])), body))
}

/// A body of lines and the bytes behind them: up to the first empty line, or all of it.
pub fn lines(body: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let end = body.windows(2).position(|pair| pair == b"\n\n").unwrap_or(body.len());
    (body[..end].split(|&b| b == b'\n').collect(), body.get(end + 2..).unwrap_or_default())
}

/// Headers, one on each line: `name: value`.
pub fn headers<'a>(lines: &[&'a [u8]]) -> Vec<(&'a [u8], &'a [u8])> {
    let header = |line: &&'a [u8]| {
        let at = line.windows(2).position(|pair| pair == b": ")?;
        Some((&line[..at], &line[at + 2..]))
    };
    lines.iter().filter_map(header).collect()
}

/// Where a body is cut.
#[derive(Clone, Copy)]
pub struct Cuts(u16);

impl Cuts {
    /// All of the body, in pieces: single bytes, small or larger ones, or two.
    pub fn pieces(self, body: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut seed = u32::from(self.0) | 1 << 16;
        let mut rest = body;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let random = (seed >> 16) as usize;
            let len = match self.0 % 4 {
                0 => 1,
                1 => 1 + random % 8,
                2 => 1 + random % 200,
                _ => (1 + usize::from(self.0) / 4).min(rest.len()),
            };
            let (piece, tail) = rest.split_at(len.min(rest.len()));
            // Two pieces: what is left is the second.
            rest = tail;
            Some(piece)
        })
    }
}

/// Fails unless this is JSON as the strictest reader has it. Only nesting may be deeper than what we read ourselves: what was read is
/// copied into objects of ours.
pub fn assert_json(text: &[u8]) {
    let shown = || String::from_utf8_lossy(text);
    if let Err(error) = serde_json::from_slice::<IgnoredAny>(text) {
        panic!("{error}: {}", shown());
    }
    match Doc::read(text, usize::MAX) {
        Ok(_) | Err(Unreadable::Json(JsonError::TooDeep(_))) => {}
        Err(error) => panic!("{error:?}: {}", shown()),
    }
}

/// Fails unless these are whole events as the SDKs read them, each with one line of JSON, an end, and nothing behind it.
pub fn assert_stream(told: &[u8], to: Dialect) {
    let told = std::str::from_utf8(told).expect("events in UTF-8");
    assert!(told.ends_with("\n\n"), "{told}");
    let (mut is_over, mut open, mut blocks) = (false, None, 0);
    for event in told.split_terminator("\n\n") {
        assert!(!is_over, "more after the end: {event}");
        if event.starts_with(':') {
            continue;
        }
        let (name, data) = match event.split_once('\n') {
            Some((name, data)) => (Some(name.strip_prefix("event: ").expect("an event's name")), data),
            None => (None, event),
        };
        let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("no data: {event}"));
        if data == "[DONE]" {
            assert_eq!(to, Dialect::OpenAi);
            is_over = true;
            continue;
        }
        assert!(!data.contains(['\n', '\r']), "two lines: {event}");
        assert_json(data.as_bytes());
        let doc = Doc::read(data.as_bytes(), usize::MAX);
        let Ok(doc) = doc.as_ref().map(Doc::root) else { continue };
        let kind = doc.get("type").and_then(|kind| kind.str()).unwrap_or_default();
        is_over = doc.get("error").is_some() || kind == "message_stop";
        if to == Dialect::OpenAi {
            assert!(is_over || doc.get("choices").is_some_and(|choices| choices.items().count() <= 1), "{event}");
            continue;
        }
        assert_eq!(name, Some(kind.as_ref()), "{event}");
        // Blocks open and close one after the other, and each delta belongs to the open one.
        let index = doc.get("index").and_then(|index| index.integer());
        match kind.as_ref() {
            "content_block_start" => {
                assert_eq!((open, index), (None, Some(blocks)), "{told}");
                (open, blocks) = (index, blocks + 1);
            }
            "content_block_delta" => assert!(index.is_some() && index == open, "{told}"),
            "content_block_stop" => assert!(index.is_some() && index == open.take(), "{told}"),
            "message_delta" | "message_stop" => assert_eq!(open, None, "{told}"),
            _ => {}
        }
    }
    assert!(is_over, "no end: {told}");
}
