//! Writes answers as Anthropic's messages.

use super::event::{Arguments, Call, Event, Part, Reason, Usage, put};
use super::fault::Fault;
use super::gather::{Block, Gathered};
use super::{HELD, Names, Terms};
use crate::translate::doc::{Doc, Kind};
use std::io::Write;

/// Marks a signature as Gemini's: it comes back with the request and belongs to the call behind it.
pub(super) const GEMINI: &str = "gemini:";

/// Writes a stream, event by event. Only the first choice: callers of this dialect can't ask for more.
#[derive(Debug)]
pub(super) struct Streamed {
    names: Names,
    has_begun: bool,
    /// Blocks so far, the open one included.
    blocks: u32,
    open: Open,
    /// Calls that began before the open one was whole. One block after the other: they have to wait.
    waiting: Vec<Waiting>,
    has_calls: bool,
    reason: Option<Reason>,
    usage: Option<Usage>,
}

#[derive(Debug, Clone, Copy)]
enum Open {
    None,
    Text,
    Thinking,
    Call { number: u32, so_far: Json, has_ended: bool },
}

#[derive(Debug)]
struct Waiting {
    number: u32,
    id: String,
    name: String,
    signature: String,
    arguments: Vec<u8>,
    has_ended: bool,
}

impl Waiting {
    fn len(&self) -> usize {
        self.id.len() + self.name.len() + self.signature.len() + self.arguments.len()
    }
}

fn word(reason: Reason) -> &'static str {
    match reason {
        // A sequence of the caller's may have stopped it: the other dialects don't tell.
        Reason::Stop => "end_turn",
        Reason::Length => "max_tokens",
        Reason::Calls => "tool_use",
        Reason::Filter => "refusal",
    }
}

impl Streamed {
    pub fn new(terms: &Terms) -> Self {
        Streamed {
            names: Names::new("msg_", terms),
            has_begun: false,
            blocks: 0,
            open: Open::None,
            waiting: Vec::new(),
            has_calls: false,
            reason: None,
            usage: None,
        }
    }

    pub fn held(&self) -> usize {
        self.waiting.iter().map(Waiting::len).sum()
    }

    pub fn forget(&mut self) {
        self.waiting = Vec::new();
    }

    /// Writes what the event says; `false` when nothing may follow.
    pub fn take(&mut self, event: Event<'_>, out: &mut Vec<u8>) -> bool {
        match event {
            Event::Start { id, model } => self.start(id, model, out),
            Event::Usage(usage) => self.usage = Some(usage),
            Event::Part(0, part) => {
                self.start("", "", out);
                return self.part(part, out);
            }
            Event::Part(..) => {}
            Event::Ping => put(out, &["event: ping\ndata: {\"type\":\"ping\"}\n\n"]),
            Event::Failed(fault) => {
                failed(&fault, out);
                return false;
            }
            Event::Done => {
                self.done(out);
                return false;
            }
        }
        true
    }

    fn start(&mut self, id: &str, model: &str, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.has_begun, true) {
            return;
        }
        let (prefix, id, model) = self.names.of(id, model);
        put(out, &["event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"", prefix, id]);
        put(out, &[r#"","type":"message","role":"assistant","model":""#, model, r#"","content":[],"#]);
        put(out, &[r#""stop_reason":null,"stop_sequence":null,"usage":"#]);
        Usage { output: 0, reasoning: None, ..self.usage.unwrap_or_default() }.anthropic(out);
        put(out, &["}}\n\n"]);
    }

    fn part(&mut self, part: Part<'_>, out: &mut Vec<u8>) -> bool {
        match part {
            Part::Text("") | Part::Refusal("") | Part::Thinking("") | Part::Logprobs(_) => {}
            Part::Text(text) => {
                self.text(out);
                self.delta("text_delta", "text", text, out);
            }
            Part::Refusal(text) => {
                self.reason = Some(Reason::Filter);
                self.text(out);
                self.delta("text_delta", "text", text, out);
            }
            Part::Thinking(text) => {
                self.thinking(out);
                self.delta("thinking_delta", "thinking", text, out);
            }
            Part::Signature(signature) => {
                self.thinking(out);
                self.delta("signature_delta", "signature", signature, out);
            }
            Part::ThinkingEnd => self.close_all(out),
            Part::Redacted(data) => {
                self.close_all(out);
                self.begin(out, |out| put(out, &[r#""type":"redacted_thinking","data":""#, data, "\""]));
                self.stop(out);
            }
            Part::Call(call) => self.call(call, out),
            Part::Arguments(number, arguments) => return self.arguments(number, arguments, out),
            Part::CallEnd(ended) => {
                match (&mut self.open, self.waiting.iter_mut().find(|call| call.number == ended)) {
                    (Open::Call { number, has_ended, .. }, _) if *number == ended => *has_ended = true,
                    (_, Some(call)) => call.has_ended = true,
                    _ => {}
                }
                self.advance(out);
            }
            // A refusal stays one, whatever the provider calls the end.
            Part::Finish(Reason::Stop, _) if self.reason == Some(Reason::Filter) => {}
            Part::Finish(reason, _) => self.reason = Some(reason),
        }
        true
    }

    fn text(&mut self, out: &mut Vec<u8>) {
        if !matches!(self.open, Open::Text) {
            self.close_all(out);
            self.begin(out, |out| put(out, &[r#""type":"text","text":"""#]));
            self.open = Open::Text;
        }
    }

    fn thinking(&mut self, out: &mut Vec<u8>) {
        if !matches!(self.open, Open::Thinking) {
            self.close_all(out);
            self.begin_thinking(out);
        }
    }

    fn begin_thinking(&mut self, out: &mut Vec<u8>) {
        if !matches!(self.open, Open::Thinking) {
            self.stop(out);
            self.begin(out, |out| put(out, &[r#""type":"thinking","thinking":"","signature":"""#]));
            self.open = Open::Thinking;
        }
    }

    fn call(&mut self, call: Call<'_>, out: &mut Vec<u8>) {
        self.has_calls = true;
        if self.is_open_whole() {
            return self.begin_call(call, out);
        }
        let Call { number, id, name, signature } = call;
        let waiting = Waiting {
            number,
            id: id.to_owned(),
            name: name.to_owned(),
            signature: signature.to_owned(),
            arguments: Vec::new(),
            has_ended: false,
        };
        self.waiting.push(waiting);
        while self.held() > HELD {
            self.next(out);
        }
    }

    /// Whether nothing more can come for the open block.
    fn is_open_whole(&self) -> bool {
        !matches!(self.open, Open::Call { so_far, has_ended: false, .. } if !so_far.is_whole())
    }

    fn begin_call(&mut self, call: Call<'_>, out: &mut Vec<u8>) {
        if !call.signature.is_empty() {
            // Not after what waits: of that, this is the next.
            self.begin_thinking(out);
            self.signature_delta(&[GEMINI, call.signature], out);
        }
        self.stop(out);
        self.begin(out, |out| put(out, &[r#""type":"tool_use","id":""#, call.id, r#"","name":""#, call.name, r#"","input":{}"#]));
        self.open = Open::Call { number: call.number, so_far: Json::default(), has_ended: false };
    }

    /// Arguments of the open call go out, those of a waiting one wait. `false` when they come for one whose block is closed.
    fn arguments(&mut self, of: u32, arguments: Arguments<'_>, out: &mut Vec<u8>) -> bool {
        // What waits may have to go first, so that not too much is kept.
        if !matches!(self.open, Open::Call { number, .. } if number == of) {
            let len = match arguments {
                Arguments::Piece(piece) => piece.len(),
                // Every byte of it may need an escape.
                Arguments::Whole(json) => json.len().saturating_mul(2),
            };
            if self.held().saturating_add(len) > HELD {
                while self.waiting.iter().any(|call| call.number == of) {
                    self.next(out);
                }
            }
        }
        if let Open::Call { number, so_far, .. } = &mut self.open
            && *number == of
        {
            so_far.take(arguments);
            self.arguments_delta(arguments, out);
            self.advance(out);
        } else if let Some(call) = self.waiting.iter_mut().find(|call| call.number == of) {
            arguments.put(&mut call.arguments);
        } else if !matches!(arguments, Arguments::Piece(piece) if is_space(piece)) {
            failed(&Fault::provider("the provider mixed the arguments of several calls, too much to keep apart"), out);
            return false;
        }
        true
    }

    /// Goes on to the calls that wait, as far as the open one is whole.
    fn advance(&mut self, out: &mut Vec<u8>) {
        while !self.waiting.is_empty() && self.is_open_whole() {
            self.next(out);
        }
    }

    /// Closes the open block and begins the call that has waited longest.
    fn next(&mut self, out: &mut Vec<u8>) {
        if self.waiting.is_empty() {
            return;
        }
        let Waiting { number, id, name, signature, arguments, has_ended: ended } = self.waiting.remove(0);
        self.begin_call(Call { number, id: &id, name: &name, signature: &signature }, out);
        let arguments = String::from_utf8(arguments).unwrap_or_default();
        if let Open::Call { so_far, has_ended, .. } = &mut self.open {
            so_far.take(Arguments::Piece(&arguments));
            *has_ended = ended;
        }
        if !arguments.is_empty() {
            self.arguments_delta(Arguments::Piece(&arguments), out);
        }
    }

    /// Closes the open block after all that waits.
    fn close_all(&mut self, out: &mut Vec<u8>) {
        while !self.waiting.is_empty() {
            self.next(out);
        }
        self.stop(out);
    }

    fn begin(&mut self, out: &mut Vec<u8>, block: impl FnOnce(&mut Vec<u8>)) {
        let _ = write!(out, "event: content_block_start\ndata: {{\"type\":\"content_block_start\",\"index\":{}", self.blocks);
        put(out, &[",\"content_block\":{"]);
        block(out);
        put(out, &["}}\n\n"]);
        self.blocks = self.blocks.saturating_add(1);
        // Closed with the next, or right away.
        self.open = Open::Text;
    }

    fn stop(&mut self, out: &mut Vec<u8>) {
        if !matches!(std::mem::replace(&mut self.open, Open::None), Open::None) {
            let index = self.blocks.saturating_sub(1);
            let _ = write!(out, "event: content_block_stop\ndata: {{\"type\":\"content_block_stop\",\"index\":{index}}}\n\n");
        }
    }

    fn delta_of(&self, kind: &str, name: &str, out: &mut Vec<u8>, value: impl FnOnce(&mut Vec<u8>)) {
        let index = self.blocks.saturating_sub(1);
        let _ = write!(out, "event: content_block_delta\ndata: {{\"type\":\"content_block_delta\",\"index\":{index}");
        put(out, &[",\"delta\":{\"type\":\"", kind, "\",\"", name, "\":\""]);
        value(out);
        put(out, &["\"}}\n\n"]);
    }

    fn delta(&self, kind: &str, name: &str, text: &str, out: &mut Vec<u8>) {
        self.delta_of(kind, name, out, |out| put(out, &[text]));
    }

    fn signature_delta(&self, parts: &[&str], out: &mut Vec<u8>) {
        self.delta_of("signature_delta", "signature", out, |out| put(out, parts));
    }

    fn arguments_delta(&self, arguments: Arguments<'_>, out: &mut Vec<u8>) {
        self.delta_of("input_json_delta", "partial_json", out, |out| arguments.put(out));
    }

    fn done(&mut self, out: &mut Vec<u8>) {
        self.start("", "", out);
        self.close_all(out);
        let reason = self.reason.unwrap_or(Reason::Stop).given(self.has_calls);
        put(out, &["event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"", word(reason)]);
        put(out, &["\",\"stop_sequence\":null},\"usage\":"]);
        self.usage.unwrap_or_default().anthropic(out);
        put(out, &["}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n"]);
    }
}

fn failed(fault: &Fault, out: &mut Vec<u8>) {
    put(out, &["event: error\ndata: ", &fault.anthropic(), "\n\n"]);
}

/// Whether escaped text is nothing but space.
fn is_space(escaped: &str) -> bool {
    let mut rest = escaped.trim_start();
    while let Some(more) = ["\\n", "\\r", "\\t"].into_iter().find_map(|escape| rest.strip_prefix(escape)) {
        rest = more.trim_start();
    }
    rest.is_empty()
}

/// Whether a document that comes in pieces, each escaped as part of a string, is whole: its brackets are closed.
#[derive(Debug, Clone, Copy, Default)]
struct Json {
    depth: u32,
    has_begun: bool,
    in_string: bool,
    /// In a string of the document, after a backslash of its own.
    after_backslash: bool,
}

impl Json {
    fn is_whole(self) -> bool {
        self.has_begun && self.depth == 0 && !self.in_string
    }

    fn take(&mut self, arguments: Arguments<'_>) {
        let Arguments::Piece(piece) = arguments else {
            *self = Json { has_begun: true, ..Json::default() };
            return;
        };
        let mut bytes = piece.bytes();
        while let Some(byte) = bytes.next() {
            let byte = match byte {
                b'\\' => match bytes.next() {
                    Some(b'u') => bytes
                        .by_ref()
                        .take(4)
                        .fold(0u32, |code, digit| code << 4 | char::from(digit).to_digit(16).unwrap_or(0))
                        .try_into()
                        .unwrap_or(b'x'),
                    Some(byte @ (b'"' | b'\\' | b'/')) => byte,
                    _ => b' ',
                },
                byte => byte,
            };
            self.byte(byte);
        }
    }

    fn byte(&mut self, byte: u8) {
        if std::mem::take(&mut self.after_backslash) {
            return;
        }
        match (byte, self.in_string) {
            (b'\\', true) => self.after_backslash = true,
            (b'"', _) => self.in_string = !self.in_string,
            (b'{' | b'[', false) => (self.depth, self.has_begun) = (self.depth.saturating_add(1), true),
            (b'}' | b']', false) => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }
}

/// Writes a whole answer.
pub(super) fn whole(answer: &Gathered, terms: &Terms) -> Vec<u8> {
    let names = Names::new("msg_", terms);
    let (prefix, id, model) = names.of(&answer.id, &answer.model);
    let mut out = Vec::new();
    put(&mut out, &["{\"id\":\"", prefix, id, r#"","type":"message","role":"assistant","model":""#, model, r#"","content":["#]);
    let first = answer.choices.first();
    let blocks = first.map(|choice| choice.blocks.as_slice()).unwrap_or_default();
    let mut is_refused = false;
    let mut behind = blocks.iter().skip(1);
    for (at, block) in blocks.iter().enumerate() {
        let next = behind.next();
        put(&mut out, &[if at == 0 { "" } else { "," }]);
        is_refused |= matches!(block, Block::Refusal(_));
        content(block, at.checked_sub(1).and_then(|before| blocks.get(before)), next, &mut out);
    }
    let reason = first.map_or(Reason::Stop, super::gather::Choice::reason);
    let reason = if is_refused && reason == Reason::Stop { Reason::Filter } else { reason };
    put(&mut out, &["],\"stop_reason\":\"", word(reason), "\",\"stop_sequence\":null,\"usage\":"]);
    answer.usage.unwrap_or_default().anthropic(&mut out);
    put(&mut out, &["}"]);
    out
}

fn content(block: &Block, before: Option<&Block>, next: Option<&Block>, out: &mut Vec<u8>) {
    match block {
        Block::Text(text) | Block::Refusal(text) => put(out, &[r#"{"type":"text","text":""#, text, "\"}"]),
        Block::Redacted(data) => put(out, &[r#"{"type":"redacted_thinking","data":""#, data, "\"}"]),
        Block::Thinking { text, signature, .. } => {
            // Thought and signature are one block, and it stands directly before the call.
            let (mark, signature) = match next {
                Some(Block::Call { signature: of_call, .. }) if signature.is_empty() && !of_call.is_empty() => (GEMINI, of_call),
                _ => ("", signature),
            };
            put(out, &[r#"{"type":"thinking","thinking":""#, text, r#"","signature":""#, mark, signature, "\"}"]);
        }
        Block::Call { id, name, signature, arguments, .. } => {
            if !signature.is_empty() && !matches!(before, Some(Block::Thinking { signature, .. }) if signature.is_empty()) {
                put(out, &[r#"{"type":"thinking","thinking":"","signature":""#, GEMINI, signature, "\"},"]);
            }
            put(out, &[r#"{"type":"tool_use","id":""#, id, r#"","name":""#, name, r#"","input":"#]);
            input(arguments, out);
            put(out, &["}"]);
        }
    }
}

/// An input must be an object. What the model wrote instead goes along under the name that Anthropic gives to such a thing:
/// <https://docs.claude.com/en/docs/agents-and-tools/tool-use/fine-grained-tool-streaming>
fn input(escaped: &[u8], out: &mut Vec<u8>) {
    let quoted = [b"\"", escaped, b"\""].concat();
    let text = serde_json::from_slice::<String>(&quoted).unwrap_or_default();
    let is_object = Doc::read(text.as_bytes(), super::MAX_VALUES).is_ok_and(|doc| doc.root().kind() == Kind::Object);
    if text.trim().is_empty() || text.trim() == "null" {
        put(out, &["{}"]);
    } else if is_object {
        put(out, &[text.trim()]);
    } else {
        put(out, &["{\"INVALID_JSON\":"]);
        out.extend_from_slice(&quoted);
        put(out, &["}"]);
    }
}
