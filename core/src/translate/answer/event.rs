//! The one form between the dialects: what happens in an answer, be it streamed or whole.
//!
//! Text is `&str` as it stands between the quotes of the provider's JSON, escapes included, so that it is copied and never rebuilt.

use super::fault::Fault;
use crate::translate::doc::{Kind, Value};
use std::io::Write;

/// Choices, and calls of one choice, beyond this many are left out: no provider gives as many, and what is kept of each stays small.
pub(super) const MOST: u32 = 128;
/// Longest id and name of a model that is kept from a provider.
const MAX_NAME: usize = 256;

pub(super) enum Event<'a> {
    /// The answer begins. Empty where the provider tells nothing.
    Start {
        id: &'a str,
        model: &'a str,
    },
    /// All that is known by now; it takes the place of what was said before.
    Usage(Usage),
    /// Something of a choice.
    Part(u32, Part<'a>),
    Ping,
    /// The provider gave up; nothing follows.
    Failed(Fault),
    /// The answer is whole; nothing follows.
    Done,
}

pub(super) enum Part<'a> {
    Text(&'a str),
    Refusal(&'a str),
    Thinking(&'a str),
    /// The signature of the thinking before it, or a piece of one.
    Signature(&'a str),
    /// The block of thinking is whole. Only Anthropic says so.
    ThinkingEnd,
    /// Thinking that only the provider can read.
    Redacted(&'a str),
    Call(Call<'a>),
    /// More of the arguments of the call of this number.
    Arguments(u32, Arguments<'a>),
    CallEnd(u32),
    /// Entries of OpenAI's `logprobs.content`, with commas between them.
    Logprobs(&'a str),
    /// Why it stopped; the provider's own word where the reason says less.
    Finish(Reason, Option<&'a str>),
}

#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    /// Calls of a choice are numbered from 0 on.
    pub number: u32,
    pub id: &'a str,
    pub name: &'a str,
    /// Gemini's signature of the thought behind it, or empty.
    pub signature: &'a str,
}

#[derive(Clone, Copy)]
pub(super) enum Arguments<'a> {
    /// A piece of the document, escaped as part of a string.
    Piece(&'a str),
    /// The whole document.
    Whole(&'a str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    Stop,
    Length,
    Calls,
    Filter,
}

impl Reason {
    /// A call is what the answer stopped for if there is one, whatever the provider says, and can't be if there is none.
    pub fn given(self, has_calls: bool) -> Self {
        match (self, has_calls) {
            (Reason::Stop, true) => Reason::Calls,
            (Reason::Calls, false) => Reason::Stop,
            (reason, _) => reason,
        }
    }
}

/// Tokens, in classes that don't overlap, but for `reasoning`, which is part of `output`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub input: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub output: u64,
    pub reasoning: Option<u64>,
}

impl Usage {
    pub fn openai(self, out: &mut Vec<u8>) {
        let prompt = self.input.saturating_add(self.cache_read).saturating_add(self.cache_write);
        let total = prompt.saturating_add(self.output);
        let _ = write!(out, r#"{{"prompt_tokens":{prompt},"completion_tokens":{},"total_tokens":{total}"#, self.output);
        let _ = write!(out, r#","prompt_tokens_details":{{"cached_tokens":{}"#, self.cache_read);
        if self.cache_write > 0 {
            let _ = write!(out, r#","cache_write_tokens":{}"#, self.cache_write);
        }
        out.push(b'}');
        if let Some(reasoning) = self.reasoning {
            let _ = write!(out, r#","completion_tokens_details":{{"reasoning_tokens":{reasoning}}}"#);
        }
        out.push(b'}');
    }

    pub fn anthropic(self, out: &mut Vec<u8>) {
        let Usage { input, cache_read, cache_write, output, reasoning } = self;
        let _ = write!(out, r#"{{"input_tokens":{input},"cache_creation_input_tokens":{cache_write}"#);
        let _ = write!(out, r#","cache_read_input_tokens":{cache_read},"output_tokens":{output}"#);
        if let Some(reasoning) = reasoning {
            let _ = write!(out, r#","output_tokens_details":{{"thinking_tokens":{reasoning}}}"#);
        }
        out.push(b'}');
    }
}

/// Takes what readers find.
pub(super) trait Sink {
    fn take(&mut self, event: Event<'_>);

    fn part(&mut self, choice: u32, part: Part<'_>) {
        self.take(Event::Part(choice, part));
    }
}

pub(super) fn put(out: &mut Vec<u8>, parts: &[&str]) {
    for part in parts {
        out.extend_from_slice(part.as_bytes());
    }
}

/// Writes a document as part of a string: without the spaces between its values, with escapes.
pub(super) fn put_escaped(json: &str, out: &mut Vec<u8>) {
    let (mut in_string, mut after_backslash) = (false, false);
    for &byte in json.as_bytes() {
        if !in_string && byte.is_ascii_whitespace() {
            continue;
        }
        if byte == b'"' || byte == b'\\' {
            out.push(b'\\');
        }
        out.push(byte);
        in_string ^= byte == b'"' && !after_backslash;
        after_backslash = in_string && byte == b'\\' && !after_backslash;
    }
}

impl Arguments<'_> {
    /// Writes them as part of a string.
    pub fn put(self, out: &mut Vec<u8>) {
        match self {
            Arguments::Piece(piece) => put(out, &[piece]),
            Arguments::Whole(json) => put_escaped(json, out),
        }
    }

    pub fn is_empty(self) -> bool {
        matches!(self, Arguments::Piece("") | Arguments::Whole(""))
    }
}

/// The text of a member, escaped; empty where there is none.
pub(super) fn text<'d>(value: Value<'d>, name: &str) -> &'d str {
    value.get(name).and_then(Value::inner).unwrap_or_default()
}

/// A member that names something and is kept.
pub(super) fn name<'d>(value: Value<'d>, name: &str) -> &'d str {
    let name = text(value, name);
    if name.len() > MAX_NAME { "" } else { name }
}

pub(super) fn object<'d>(value: Value<'d>, name: &str) -> Option<Value<'d>> {
    value.get(name).filter(|value| value.kind() == Kind::Object)
}

/// A count of tokens.
pub(super) fn tokens(value: Value<'_>, name: &str) -> Option<u64> {
    value.get(name).and_then(Value::integer).map(|count| u64::try_from(count).unwrap_or(0))
}
