//! Reads answers of OpenAI's chat completions, as OpenAI, Azure and the servers that call themselves compatible write them.

use super::event::{Arguments, Call, Event, MOST, Part, Reason, Sink, Usage, name, object, text, tokens};
use super::fault::Fault;
use crate::translate::doc::{Kind, Value};
use std::hash::{DefaultHasher, Hash, Hasher};

#[derive(Debug, Default)]
pub(super) struct Reader {
    has_begun: bool,
    /// The calls of each choice, as far as choices have any.
    calls: Vec<Vec<Known>>,
    /// Choices that were seen, and those that have a reason to be over: a bit for each.
    seen: u128,
    finished: u128,
    /// What calls without an id are called by.
    stem: String,
}

/// A call that has begun.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// As the provider counts, or `None` where it doesn't.
    index: Option<i64>,
    id: Option<u64>,
}

impl Reader {
    pub fn new(stem: String) -> Self {
        Reader { stem, ..Reader::default() }
    }

    /// One event of a stream.
    pub fn frame(&mut self, root: Value<'_>, sink: &mut impl Sink) {
        if let Some(fault) = Fault::within(root) {
            return sink.take(Event::Failed(fault));
        }
        self.usage(root, sink);
        self.choices(root, "delta", sink);
    }

    /// `[DONE]` has come.
    pub fn done(&self, sink: &mut impl Sink) {
        sink.take(if self.has_begun { Event::Done } else { Event::Failed(Fault::cut()) });
    }

    /// Whether the stream may end here without `[DONE]`.
    pub fn is_whole(&self) -> bool {
        self.seen != 0 && self.seen == self.finished
    }

    /// A whole answer; `false` if it is none.
    pub fn document(&mut self, root: Value<'_>, sink: &mut impl Sink) -> bool {
        self.usage(root, sink);
        self.choices(root, "message", sink);
        self.has_begun
    }

    fn usage(&self, root: Value<'_>, sink: &mut impl Sink) {
        let Some(usage) = object(root, "usage") else { return };
        let Some(prompt) = tokens(usage, "prompt_tokens") else { return };
        let of = |details, name| object(usage, details).and_then(|details| tokens(details, name));
        let cache_read = of("prompt_tokens_details", "cached_tokens").or_else(|| tokens(usage, "prompt_cache_hit_tokens")).unwrap_or(0);
        let cache_write = of("prompt_tokens_details", "cache_write_tokens").unwrap_or(0);
        sink.take(Event::Usage(Usage {
            input: prompt.saturating_sub(cache_read).saturating_sub(cache_write),
            cache_read,
            cache_write,
            output: tokens(usage, "completion_tokens").unwrap_or(0),
            reasoning: of("completion_tokens_details", "reasoning_tokens"),
        }));
    }

    fn choices(&mut self, root: Value<'_>, message: &str, sink: &mut impl Sink) {
        let Some(choices) = root.get("choices") else { return };
        for (at, choice) in (0u32..).zip(choices.items()).filter(|(_, choice)| choice.kind() == Kind::Object) {
            // Azure's first event has no choice and neither id nor model: the answer begins with the first that has one.
            if !std::mem::replace(&mut self.has_begun, true) {
                sink.take(Event::Start { id: name(root, "id"), model: name(root, "model") });
            }
            let index = choice.get("index").and_then(Value::integer).map_or(Some(at), |index| u32::try_from(index).ok());
            let Some(index) = index.filter(|index| *index < MOST) else { continue };
            self.seen |= 1 << index;
            if let Some(message) = object(choice, message) {
                self.message(index, message, sink);
            }
            let entries = object(choice, "logprobs").and_then(|logprobs| logprobs.get("content"));
            if let Some(entries) = entries.filter(|entries| entries.kind() == Kind::Array && entries.items().next().is_some()) {
                let entries = entries.raw();
                sink.part(index, Part::Logprobs(entries.get(1..entries.len().saturating_sub(1)).unwrap_or_default()));
            }
            let finish = text(choice, "finish_reason");
            if !finish.is_empty() {
                self.finished |= 1 << index;
                let (reason, native) = reason(finish);
                sink.part(index, Part::Finish(reason, native));
            }
        }
    }

    fn message(&mut self, choice: u32, message: Value<'_>, sink: &mut impl Sink) {
        let reasoning = ["reasoning_content", "reasoning"].into_iter().map(|name| text(message, name)).find(|text| !text.is_empty());
        if let Some(reasoning) = reasoning {
            sink.part(choice, Part::Thinking(reasoning));
        }
        if let Some(content) = message.get("content") {
            texts(choice, content, sink);
        }
        let refusal = text(message, "refusal");
        if !refusal.is_empty() {
            sink.part(choice, Part::Refusal(refusal));
        }
        for call in message.get("tool_calls").into_iter().flat_map(Value::items) {
            self.call(choice, call, sink);
        }
    }

    fn call(&mut self, choice: u32, call: Value<'_>, sink: &mut impl Sink) {
        let Some(function) = object(call, "function") else { return };
        let at = choice as usize;
        if self.calls.len() <= at {
            self.calls.resize_with(at + 1, Vec::new);
        }
        let Some(calls) = self.calls.get_mut(at) else { return };
        let (id, name) = (text(call, "id"), text(function, "name"));
        let seen = Known { index: call.get("index").and_then(Value::integer), id: (!id.is_empty()).then(|| hash(id)) };
        let number = match known(calls, seen, !name.is_empty()) {
            Some(number) => number,
            // Nothing can be called that has no name.
            None if name.is_empty() || calls.len() >= MOST as usize => return,
            None => {
                let number = u32::try_from(calls.len()).unwrap_or(MOST);
                calls.push(seen);
                let made = if id.is_empty() { format!("{}{number}", self.stem) } else { String::new() };
                let signature = object(call, "extra_content").and_then(|extra| object(extra, "google"));
                let signature = signature.map(|google| text(google, "thought_signature")).unwrap_or_default();
                let id = if id.is_empty() { &made } else { id };
                sink.part(choice, Part::Call(Call { number, id, name, signature }));
                number
            }
        };
        let arguments = function.get("arguments").map(|arguments| match arguments.inner() {
            Some(piece) => Arguments::Piece(piece),
            // Some servers give the document itself.
            None => Arguments::Whole(arguments.raw()),
        });
        if let Some(arguments) = arguments.filter(|arguments| !arguments.is_empty()) {
            sink.part(choice, Part::Arguments(number, arguments));
        }
    }
}

/// Which call more is told of. Servers leave out the index, or give every call the same: what begins a call has a name and an id of its
/// own, or a name and no index.
fn known(calls: &[Known], seen: Known, is_named: bool) -> Option<u32> {
    let at = match seen.index {
        Some(index) => {
            let at = calls.iter().rposition(|call| call.index == Some(index))?;
            let is_other = is_named && seen.id.is_some() && calls.get(at).is_some_and(|call| call.id != seen.id);
            // A server that tells calls by their ids comes back to an earlier one by it.
            if is_other { calls.iter().position(|call| call.index == Some(index) && call.id == seen.id)? } else { at }
        }
        None if seen.id.is_some() => calls.iter().position(|call| call.id == seen.id)?,
        None if is_named => return None,
        None => calls.len().checked_sub(1)?,
    };
    u32::try_from(at).ok()
}

fn hash(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

/// Content is a string, or parts of text and of thinking.
fn texts(choice: u32, content: Value<'_>, sink: &mut impl Sink) {
    if let Some(text) = content.inner() {
        if !text.is_empty() {
            sink.part(choice, Part::Text(text));
        }
        return;
    }
    for part in content.items() {
        let own = text(part, "text");
        if !own.is_empty() {
            sink.part(choice, Part::Text(own));
        }
        for thought in part.get("thinking").into_iter().flat_map(Value::items) {
            sink.part(choice, Part::Thinking(text(thought, "text")));
        }
    }
}

fn reason(finish: &str) -> (Reason, Option<&str>) {
    match finish {
        "stop" => (Reason::Stop, None),
        "length" => (Reason::Length, None),
        "tool_calls" | "function_call" => (Reason::Calls, None),
        "content_filter" => (Reason::Filter, None),
        other => (Reason::Stop, Some(other)),
    }
}
