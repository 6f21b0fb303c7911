//! Reads answers of Anthropic's messages.

use super::event::{Arguments, Call, Event, MOST, Part, Reason, Sink, Usage, name, object, text, tokens};
use super::fault::Fault;
use crate::translate::doc::Value;

#[derive(Debug, Default)]
pub(super) struct Reader {
    block: Block,
    /// Calls so far.
    calls: u32,
    usage: Usage,
}

/// The block that is open.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Block {
    #[default]
    Text,
    Thinking,
    /// The call of this number.
    Call(u32),
    /// Its input came whole with its start.
    WholeCall(u32),
    /// What has no place elsewhere: tools that the provider runs itself, and whatever comes to be.
    Other,
}

impl Reader {
    /// One event of a stream.
    pub fn frame(&mut self, root: Value<'_>, sink: &mut impl Sink) {
        match text(root, "type") {
            "message_start" => {
                let Some(message) = object(root, "message") else { return };
                self.usage(message, sink);
                sink.take(Event::Start { id: name(message, "id"), model: name(message, "model") });
            }
            "content_block_start" => {
                if let Some(block) = object(root, "content_block") {
                    self.begin(block, sink);
                }
            }
            "content_block_delta" => {
                if let Some(delta) = object(root, "delta") {
                    self.delta(delta, sink);
                }
            }
            "content_block_stop" => self.stop(sink),
            "message_delta" => {
                self.usage(root, sink);
                if let Some(delta) = object(root, "delta") {
                    finish(delta, sink);
                }
            }
            "message_stop" => sink.take(Event::Done),
            "ping" => sink.take(Event::Ping),
            _ => {
                if let Some(fault) = Fault::within(root) {
                    sink.take(Event::Failed(fault));
                }
            }
        }
    }

    /// A whole answer; `false` if it is none.
    pub fn document(&mut self, root: Value<'_>, sink: &mut impl Sink) -> bool {
        let Some(content) = root.get("content") else { return false };
        self.usage(root, sink);
        sink.take(Event::Start { id: name(root, "id"), model: name(root, "model") });
        // An answer without content has a choice all the same.
        sink.part(0, Part::Text(""));
        for block in content.items() {
            self.begin(block, sink);
            self.stop(sink);
        }
        finish(root, sink);
        true
    }

    /// Counts are totals, so they overwrite; of one that is not repeated, the earlier holds.
    fn usage(&mut self, of: Value<'_>, sink: &mut impl Sink) {
        let Some(usage) = object(of, "usage") else { return };
        let put = |count: &mut u64, name| *count = tokens(usage, name).unwrap_or(*count);
        put(&mut self.usage.input, "input_tokens");
        put(&mut self.usage.cache_write, "cache_creation_input_tokens");
        put(&mut self.usage.cache_read, "cache_read_input_tokens");
        put(&mut self.usage.output, "output_tokens");
        let thinking = object(usage, "output_tokens_details").and_then(|details| tokens(details, "thinking_tokens"));
        self.usage.reasoning = thinking.or(self.usage.reasoning);
        sink.take(Event::Usage(self.usage));
    }

    fn begin(&mut self, block: Value<'_>, sink: &mut impl Sink) {
        self.block = match text(block, "type") {
            "text" => {
                some(text(block, "text"), Part::Text, sink);
                Block::Text
            }
            "thinking" => {
                some(text(block, "thinking"), Part::Thinking, sink);
                some(text(block, "signature"), Part::Signature, sink);
                Block::Thinking
            }
            "redacted_thinking" => {
                some(text(block, "data"), Part::Redacted, sink);
                Block::Other
            }
            "tool_use" if !text(block, "name").is_empty() && self.calls < MOST => {
                let number = self.calls;
                self.calls += 1;
                sink.part(0, Part::Call(Call { number, id: text(block, "id"), name: text(block, "name"), signature: "" }));
                match object(block, "input").filter(|input| input.members().next().is_some()) {
                    Some(input) => {
                        sink.part(0, Part::Arguments(number, Arguments::Whole(input.raw())));
                        Block::WholeCall(number)
                    }
                    None => Block::Call(number),
                }
            }
            _ => Block::Other,
        };
    }

    fn delta(&self, delta: Value<'_>, sink: &mut impl Sink) {
        match (text(delta, "type"), self.block) {
            ("text_delta", Block::Text) => some(text(delta, "text"), Part::Text, sink),
            ("thinking_delta", Block::Thinking) => some(text(delta, "thinking"), Part::Thinking, sink),
            ("signature_delta", Block::Thinking) => some(text(delta, "signature"), Part::Signature, sink),
            ("input_json_delta", Block::Call(number)) => {
                some(text(delta, "partial_json"), |piece| Part::Arguments(number, Arguments::Piece(piece)), sink);
            }
            _ => {}
        }
    }

    fn stop(&mut self, sink: &mut impl Sink) {
        match std::mem::take(&mut self.block) {
            Block::Thinking => sink.part(0, Part::ThinkingEnd),
            Block::Call(number) | Block::WholeCall(number) => sink.part(0, Part::CallEnd(number)),
            Block::Text | Block::Other => {}
        }
    }
}

fn some<'a>(text: &'a str, part: impl FnOnce(&'a str) -> Part<'a>, sink: &mut impl Sink) {
    if !text.is_empty() {
        sink.part(0, part(text));
    }
}

fn finish(of: Value<'_>, sink: &mut impl Sink) {
    let (reason, native) = match text(of, "stop_reason") {
        "" => return,
        "end_turn" | "stop_sequence" => (Reason::Stop, None),
        "max_tokens" => (Reason::Length, None),
        "tool_use" => (Reason::Calls, None),
        other @ "model_context_window_exceeded" => (Reason::Length, Some(other)),
        other @ "refusal" => (Reason::Filter, Some(other)),
        // `pause_turn` among them: a turn that goes on when it is sent back, which the other dialect can't ask for.
        other => (Reason::Stop, Some(other)),
    };
    sink.part(0, Part::Finish(reason, native));
}
