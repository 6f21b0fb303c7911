//! Reads answers of Gemini's generateContent. An event of a stream has the form of a whole answer.

use super::event::{Arguments, Call, Event, MOST, Part, Reason, Sink, Usage, name, object, put, text, tokens};
use super::fault::Fault;
use super::stem;
use crate::translate::doc::{Kind, Value};

#[derive(Debug, Default)]
pub(super) struct Reader {
    has_begun: bool,
    /// What the answer is called by when it has no id.
    id: String,
    /// What calls without an id are called by: their ids must not come again in the same conversation.
    stem: String,
    /// Calls so far: of each choice, as far as choices have any, and of all.
    calls: Vec<u32>,
    all_calls: u64,
    usage: Usage,
    seen: u128,
    finished: u128,
}

impl Reader {
    pub fn new(id: String) -> Self {
        Reader { id, ..Reader::default() }
    }

    /// One event of a stream, or a whole answer.
    pub fn frame(&mut self, root: Value<'_>, sink: &mut impl Sink) {
        if let Some(fault) = Fault::within(root.items().next().unwrap_or(root)) {
            return sink.take(Event::Failed(fault));
        }
        self.usage(root, sink);
        if !std::mem::replace(&mut self.has_begun, true) {
            let id = name(root, "responseId");
            self.stem = stem(if id.is_empty() { &self.id } else { id });
            sink.take(Event::Start { id, model: name(root, "modelVersion") });
        }
        let candidates = root.get("candidates").into_iter().flat_map(Value::items);
        for (at, candidate) in (0u32..).zip(candidates).filter(|(_, candidate)| candidate.kind() == Kind::Object) {
            let index = candidate.get("index").and_then(Value::integer).map_or(Some(at), |index| u32::try_from(index).ok());
            if let Some(index) = index.filter(|index| *index < MOST) {
                self.seen |= 1 << index;
                self.candidate(index, candidate, sink);
            }
        }
        if let Some(block) = object(root, "promptFeedback").and_then(|feedback| feedback.get("blockReason")).and_then(Value::inner)
            && self.seen == 0
        {
            (self.seen, self.finished) = (1, 1);
            sink.part(0, Part::Finish(Reason::Filter, Some(block)));
        }
    }

    /// Whether the stream may end here: nothing else tells.
    pub fn is_whole(&self) -> bool {
        self.seen != 0 && self.seen == self.finished
    }

    /// A whole answer; `false` if it is none.
    pub fn document(&mut self, root: Value<'_>, sink: &mut impl Sink) -> bool {
        self.frame(root, sink);
        self.seen != 0
    }

    fn usage(&mut self, root: Value<'_>, sink: &mut impl Sink) {
        let Some(usage) = object(root, "usageMetadata") else { return };
        let of = |name| tokens(usage, name);
        if let Some(prompt) = of("promptTokenCount") {
            let prompt = prompt.saturating_add(of("toolUsePromptTokenCount").unwrap_or(0));
            self.usage.cache_read = of("cachedContentTokenCount").unwrap_or(0);
            self.usage.input = prompt.saturating_sub(self.usage.cache_read);
        }
        let thoughts = of("thoughtsTokenCount");
        if let Some(output) = of("candidatesTokenCount") {
            self.usage.output = output.saturating_add(thoughts.or(self.usage.reasoning).unwrap_or(0));
        } else if let Some(thoughts) = thoughts {
            self.usage.output = self.usage.output.max(thoughts);
        }
        self.usage.reasoning = thoughts.or(self.usage.reasoning);
        sink.take(Event::Usage(self.usage));
    }

    fn candidate(&mut self, choice: u32, candidate: Value<'_>, sink: &mut impl Sink) {
        let parts = object(candidate, "content").and_then(|content| content.get("parts"));
        for part in parts.into_iter().flat_map(Value::items) {
            if let Some(function) = object(part, "functionCall") {
                self.call(choice, part, function, sink);
                continue;
            }
            let own = text(part, "text");
            if own.is_empty() {
                continue;
            }
            let is_thought = part.get("thought").and_then(Value::bool) == Some(true);
            sink.part(choice, if is_thought { Part::Thinking(own) } else { Part::Text(own) });
        }
        if let Some(result) = object(candidate, "logprobsResult") {
            let entries = logprobs(result);
            if !entries.is_empty() {
                sink.part(choice, Part::Logprobs(&entries));
            }
        }
        if let Some((reason, native)) = reason(text(candidate, "finishReason")) {
            self.finished |= 1 << choice;
            sink.part(choice, Part::Finish(reason, native));
        }
    }

    fn call(&mut self, choice: u32, part: Value<'_>, function: Value<'_>, sink: &mut impl Sink) {
        let at = choice as usize;
        if self.calls.len() <= at {
            self.calls.resize(at + 1, 0);
        }
        let (id, name) = (text(function, "id"), text(function, "name"));
        let Some(calls) = self.calls.get_mut(at).filter(|calls| **calls < MOST && !name.is_empty()) else { return };
        let made = if id.is_empty() { format!("{}{}", self.stem, self.all_calls) } else { String::new() };
        let (number, signature) = (*calls, text(part, "thoughtSignature"));
        *calls += 1;
        self.all_calls += 1;
        let id = if id.is_empty() { &made } else { id };
        sink.part(choice, Part::Call(Call { number, id, name, signature }));
        if let Some(arguments) = object(function, "args") {
            sink.part(choice, Part::Arguments(number, Arguments::Whole(arguments.raw())));
        }
        sink.part(choice, Part::CallEnd(number));
    }
}

fn reason(finish: &str) -> Option<(Reason, Option<&str>)> {
    Some(match finish {
        "" | "FINISH_REASON_UNSPECIFIED" => return None,
        "STOP" => (Reason::Stop, None),
        "MAX_TOKENS" => (Reason::Length, None),
        "CONTINUATION" => (Reason::Length, Some(finish)),
        "SAFETY"
        | "RECITATION"
        | "BLOCKLIST"
        | "PROHIBITED_CONTENT"
        | "SPII"
        | "LANGUAGE"
        | "IMAGE_SAFETY"
        | "IMAGE_PROHIBITED_CONTENT"
        | "IMAGE_RECITATION"
        | "ESCALATION"
        | "PUP_LIMITED_DISABLED"
        | "MODEL_ARMOR" => (Reason::Filter, Some(finish)),
        // A call that the model got wrong, and the like: no filter, and nothing to call. The word itself goes along.
        _ => (Reason::Stop, Some(finish)),
    })
}

/// OpenAI's entries: the token that was chosen, and what else was likely.
fn logprobs(result: Value<'_>) -> String {
    let mut out = Vec::new();
    let mut top = result.get("topCandidates").into_iter().flat_map(Value::items);
    for chosen in result.get("chosenCandidates").into_iter().flat_map(Value::items) {
        let comma = if out.is_empty() { "" } else { "," };
        put(&mut out, &[comma]);
        entry(chosen, &mut out);
        put(&mut out, &[",\"top_logprobs\":["]);
        let others = top.next().and_then(|top| top.get("candidates"));
        for (at, other) in others.into_iter().flat_map(Value::items).enumerate() {
            put(&mut out, &[if at == 0 { "" } else { "," }]);
            entry(other, &mut out);
            put(&mut out, &["}"]);
        }
        put(&mut out, &["]}"]);
    }
    String::from_utf8(out).unwrap_or_default()
}

/// One token, its object left open.
fn entry(token: Value<'_>, out: &mut Vec<u8>) {
    let logprob = token.get("logProbability").filter(|value| value.kind() == Kind::Number);
    // Zero is left out where Google writes JSON.
    put(out, &["{\"token\":\"", text(token, "token"), "\",\"logprob\":", logprob.map_or("0", Value::raw), ",\"bytes\":null"]);
}
