//! Writes answers as OpenAI's chat completions.

use super::event::{Arguments, Event, MOST, Part, Reason, Usage, put};
use super::fault::Fault;
use super::gather::{Block, Choice, Gathered};
use super::{HELD, Names, Terms};
use crate::operation::Dialect;
use std::io::Write;

/// Writes a stream, event by event.
#[derive(Debug)]
pub(super) struct Streamed {
    names: Names,
    created: u64,
    include_usage: bool,
    /// Whether thinking is kept until its signature is there, to be given back as a block.
    keeps_thinking: bool,
    /// How every chunk of the answer begins; empty until it has begun.
    head: String,
    choices: Vec<Open>,
    usage: Option<Usage>,
}

/// A choice that has begun.
#[derive(Debug, Default)]
struct Open {
    /// Calls that have begun, and those that have arguments: a bit for each.
    calls: u128,
    filled: u128,
    reason: Option<(Reason, String)>,
    thinking: String,
    signature: String,
    /// The thinking is too long to be kept: its text has gone out, its block can't.
    is_too_long: bool,
    /// Blocks of thinking so far.
    blocks: u32,
}

fn word(reason: Reason) -> &'static str {
    match reason {
        Reason::Stop => "stop",
        Reason::Length => "length",
        Reason::Calls => "tool_calls",
        Reason::Filter => "content_filter",
    }
}

impl Streamed {
    pub fn new(terms: &Terms) -> Self {
        Streamed {
            names: Names::new("chatcmpl-", terms),
            created: terms.created,
            include_usage: terms.include_usage,
            keeps_thinking: terms.from == Dialect::Anthropic,
            head: String::new(),
            choices: Vec::new(),
            usage: None,
        }
    }

    pub fn held(&self) -> usize {
        self.choices.iter().map(|choice| choice.thinking.len() + choice.signature.len()).sum()
    }

    pub fn forget(&mut self) {
        self.choices = Vec::new();
    }

    /// Writes what the event says; `false` when nothing may follow.
    pub fn take(&mut self, event: Event<'_>, out: &mut Vec<u8>) -> bool {
        match event {
            Event::Start { id, model } => self.start(id, model, out),
            Event::Usage(usage) => self.usage = Some(usage),
            Event::Part(choice, part) if choice < MOST => {
                self.open(choice, out);
                self.part(choice, part, out);
            }
            Event::Part(..) => {}
            Event::Ping => put(out, &[": ping\n\n"]),
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
        if self.head.is_empty() {
            let (prefix, id, model) = self.names.of(id, model);
            self.head = format!(
                r#"data: {{"id":"{prefix}{id}","object":"chat.completion.chunk","created":{},"model":"{model}","choices":["#,
                self.created
            );
            self.open(0, out);
        }
    }

    /// Begins a choice, and those before it: readers take choices in order.
    fn open(&mut self, choice: u32, out: &mut Vec<u8>) {
        self.start("", "", out);
        while let Ok(next) = u32::try_from(self.choices.len())
            && next <= choice
        {
            self.choices.push(Open::default());
            self.chunk(next, out, |out| put(out, &[r#""role":"assistant","content":"""#]));
        }
    }

    fn chunk(&self, choice: u32, out: &mut Vec<u8>, delta: impl FnOnce(&mut Vec<u8>)) {
        put(out, &[&self.head]);
        let _ = write!(out, r#"{{"index":{choice},"delta":{{"#);
        delta(out);
        put(out, &["},\"finish_reason\":null}]}\n\n"]);
    }

    fn text(&self, choice: u32, name: &str, text: &str, out: &mut Vec<u8>) {
        if !text.is_empty() {
            self.chunk(choice, out, |out| put(out, &["\"", name, "\":\"", text, "\""]));
        }
    }

    fn part(&mut self, choice: u32, part: Part<'_>, out: &mut Vec<u8>) {
        match part {
            Part::Text(text) => self.text(choice, "content", text, out),
            Part::Refusal(text) => self.text(choice, "refusal", text, out),
            Part::Thinking(text) => {
                self.text(choice, "reasoning_content", text, out);
                self.keep(choice, text, |open| &mut open.thinking);
            }
            Part::Signature(signature) => self.keep(choice, signature, |open| &mut open.signature),
            Part::ThinkingEnd => self.thinking_end(choice, out),
            Part::Redacted(data) => self.block(choice, out, |out| put(out, &[r#""type":"redacted_thinking","data":""#, data, "\""])),
            Part::Call(call) => {
                let Some(open) = self.choices.get_mut(choice as usize) else { return };
                open.calls |= 1 << call.number;
                self.chunk(choice, out, |out| {
                    let _ = write!(out, r#""tool_calls":[{{"index":{},"#, call.number);
                    put(out, &[r#""id":""#, call.id, r#"","type":"function","function":{"name":""#, call.name, r#"","arguments":""}"#]);
                    extra(call.signature, out);
                    put(out, &["}]"]);
                });
            }
            Part::Arguments(number, arguments) => self.arguments(choice, number, arguments, out),
            Part::CallEnd(number) => self.fill(choice, number, out),
            Part::Logprobs(entries) => {
                put(out, &[&self.head]);
                let _ = write!(out, r#"{{"index":{choice},"delta":{{}},"logprobs":{{"content":["#);
                put(out, &[entries, "],\"refusal\":null},\"finish_reason\":null}]}\n\n"]);
            }
            Part::Finish(reason, native) => {
                if let Some(open) = self.choices.get_mut(choice as usize) {
                    open.reason = Some((reason, native.filter(|native| native.len() <= 64).unwrap_or_default().to_owned()));
                }
            }
        }
    }

    fn arguments(&mut self, choice: u32, number: u32, arguments: Arguments<'_>, out: &mut Vec<u8>) {
        if let Some(open) = self.choices.get_mut(choice as usize) {
            open.filled |= 1 << number;
        }
        self.chunk(choice, out, |out| {
            let _ = write!(out, r#""tool_calls":[{{"index":{number},"function":{{"arguments":""#);
            arguments.put(out);
            put(out, &["\"}}]"]);
        });
    }

    /// Arguments that never came are an empty object: what is there must be JSON.
    fn fill(&mut self, choice: u32, number: u32, out: &mut Vec<u8>) {
        if self.choices.get(choice as usize).is_some_and(|open| open.calls & !open.filled & (1 << number) != 0) {
            self.arguments(choice, number, Arguments::Piece("{}"), out);
        }
    }

    fn keep(&mut self, choice: u32, text: &str, of: impl FnOnce(&mut Open) -> &mut String) {
        let fits = self.held() + text.len() <= HELD;
        let Some(open) = self.choices.get_mut(choice as usize).filter(|_| self.keeps_thinking) else { return };
        if fits && !open.is_too_long {
            of(open).push_str(text);
        } else {
            (open.thinking, open.signature, open.is_too_long) = (String::new(), String::new(), true);
        }
    }

    fn thinking_end(&mut self, choice: u32, out: &mut Vec<u8>) {
        let Some(open) = self.choices.get_mut(choice as usize) else { return };
        let (thinking, signature) = (std::mem::take(&mut open.thinking), std::mem::take(&mut open.signature));
        // Half a block would not be taken back by the provider; without one it only thinks anew.
        let is_something = !thinking.is_empty() || !signature.is_empty();
        if !std::mem::take(&mut open.is_too_long) && is_something {
            self.block(choice, out, |out| thinking_block(&thinking, &signature, out));
        }
    }

    /// A whole block of thinking. It has an index so that the SDKs can put the chunks together.
    fn block(&mut self, choice: u32, out: &mut Vec<u8>, block: impl FnOnce(&mut Vec<u8>)) {
        let Some(open) = self.choices.get_mut(choice as usize) else { return };
        let index = open.blocks;
        open.blocks = open.blocks.saturating_add(1);
        self.chunk(choice, out, |out| {
            let _ = write!(out, r#""thinking_blocks":[{{"index":{index},"#);
            block(out);
            put(out, &["}]"]);
        });
    }

    fn done(&mut self, out: &mut Vec<u8>) {
        self.start("", "", out);
        for choice in 0..u32::try_from(self.choices.len()).unwrap_or(0) {
            for number in 0..MOST {
                self.fill(choice, number, out);
            }
            let Some(open) = self.choices.get(choice as usize) else { continue };
            let (reason, native) = open.reason.as_ref().map_or((Reason::Stop, ""), |(reason, native)| (*reason, native.as_str()));
            put(out, &[&self.head]);
            let _ = write!(out, r#"{{"index":{choice},"delta":{{}},"finish_reason":"{}""#, word(reason.given(open.calls != 0)));
            put_native(native, out);
            put(out, &["}]}\n\n"]);
        }
        if let Some(usage) = self.usage.filter(|_| self.include_usage) {
            put(out, &[&self.head, "],\"usage\":"]);
            usage.openai(out);
            put(out, &["}\n\n"]);
        }
        put(out, &["data: [DONE]\n\n"]);
    }
}

fn failed(fault: &Fault, out: &mut Vec<u8>) {
    put(out, &["data: ", &fault.openai(), "\n\n"]);
}

fn extra(signature: &str, out: &mut Vec<u8>) {
    if !signature.is_empty() {
        put(out, &[r#","extra_content":{"google":{"thought_signature":""#, signature, r#""}}"#]);
    }
}

fn put_native(native: &str, out: &mut Vec<u8>) {
    if !native.is_empty() {
        put(out, &[r#","native_finish_reason":""#, native, "\""]);
    }
}

fn thinking_block(thinking: &str, signature: &str, out: &mut Vec<u8>) {
    put(out, &[r#""type":"thinking","thinking":""#, thinking, r#"","signature":""#, signature, "\""]);
}

/// Writes a whole answer.
pub(super) fn whole(answer: &Gathered, terms: &Terms) -> Vec<u8> {
    let names = Names::new("chatcmpl-", terms);
    let (prefix, id, model) = names.of(&answer.id, &answer.model);
    let mut out = Vec::new();
    let _ = write!(out, r#"{{"id":"{prefix}{id}","object":"chat.completion","created":{},"model":"{model}","choices":["#, terms.created);
    for (index, choice) in answer.choices.iter().enumerate() {
        put(&mut out, &[if index == 0 { "" } else { "," }]);
        let _ = write!(out, r#"{{"index":{index},"message":{{"role":"assistant""#);
        message(choice, terms, &mut out);
        put(&mut out, &["},\"logprobs\":"]);
        if choice.logprobs.is_empty() {
            put(&mut out, &["null"]);
        } else {
            put(&mut out, &["{\"content\":[", &choice.logprobs, "],\"refusal\":null}"]);
        }
        put(&mut out, &[r#","finish_reason":""#, word(choice.reason()), "\""]);
        put_native(&choice.native, &mut out);
        put(&mut out, &["}"]);
    }
    put(&mut out, &["]"]);
    if let Some(usage) = answer.usage {
        put(&mut out, &[",\"usage\":"]);
        usage.openai(&mut out);
    }
    put(&mut out, &["}"]);
    out
}

fn message<'a>(choice: &'a Choice, terms: &Terms, out: &mut Vec<u8>) {
    let has_calls = choice.blocks.iter().any(|block| matches!(block, Block::Call { .. }));
    // A message has content, or says that it has none because it calls.
    joined("content", choice, !has_calls, out, |block| if let Block::Text(text) = block { Some(text) } else { None });
    joined("refusal", choice, false, out, |block| if let Block::Refusal(text) = block { Some(text) } else { None });
    let thought = |block: &'a Block| if let Block::Thinking { text, .. } = block { Some(text) } else { None };
    if choice.blocks.iter().any(|block| thought(block).is_some_and(|text| !text.is_empty())) {
        joined("reasoning_content", choice, true, out, thought);
    }
    if terms.from == Dialect::Anthropic {
        listed("thinking_blocks", choice, out, |block, out| match block {
            Block::Thinking { text, signature, .. } => {
                thinking_block(text, signature, out);
                true
            }
            Block::Redacted(data) => {
                put(out, &[r#""type":"redacted_thinking","data":""#, data, "\""]);
                true
            }
            _ => false,
        });
    }
    listed("tool_calls", choice, out, |block, out| {
        let Block::Call { id, name, signature, arguments, .. } = block else { return false };
        put(out, &[r#""id":""#, id, r#"","type":"function","function":{"name":""#, name, r#"","arguments":""#]);
        out.extend_from_slice(if arguments.is_empty() { b"{}" } else { arguments });
        put(out, &["\"}"]);
        extra(signature, out);
        true
    });
}

/// One string of all blocks of a kind; null where there is none, unless it must be a string.
fn joined<'a>(name: &str, choice: &'a Choice, is_string: bool, out: &mut Vec<u8>, of: impl Fn(&'a Block) -> Option<&'a String>) {
    put(out, &[",\"", name, "\":"]);
    let mut texts = choice.blocks.iter().filter_map(of).peekable();
    if texts.peek().is_none() && !is_string {
        return put(out, &["null"]);
    }
    put(out, &["\""]);
    texts.for_each(|text| put(out, &[text]));
    put(out, &["\""]);
}

/// A list of what blocks are written as, left out where there is none. `item` writes the members of one.
fn listed(name: &str, choice: &Choice, out: &mut Vec<u8>, item: impl Fn(&Block, &mut Vec<u8>) -> bool) {
    let before = out.len();
    put(out, &[",\"", name, "\":[{"]);
    let mut any = false;
    for block in &choice.blocks {
        if item(block, out) {
            any = true;
            put(out, &["},{"]);
        }
    }
    if any {
        out.truncate(out.len().saturating_sub(2));
        put(out, &["]"]);
    } else {
        out.truncate(before);
    }
}
