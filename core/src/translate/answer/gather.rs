//! Puts the events of a whole answer together.

use super::event::{Call, Event, MOST, Part, Reason, Sink, Usage};
use super::fault::Fault;

/// A whole answer. Text is escaped, as in events.
#[derive(Default)]
pub(super) struct Gathered {
    pub id: String,
    pub model: String,
    pub choices: Vec<Choice>,
    pub usage: Option<Usage>,
    pub fault: Option<Fault>,
}

#[derive(Default)]
pub(super) struct Choice {
    pub blocks: Vec<Block>,
    pub logprobs: String,
    pub reason: Option<Reason>,
    /// The provider's own word for it.
    pub native: String,
}

pub(super) enum Block {
    Text(String),
    Refusal(String),
    Thinking { text: String, signature: String, is_whole: bool },
    Redacted(String),
    Call { number: u32, id: String, name: String, signature: String, arguments: Vec<u8> },
}

impl Choice {
    pub fn reason(&self) -> Reason {
        self.reason.unwrap_or(Reason::Stop).given(self.blocks.iter().any(|block| matches!(block, Block::Call { .. })))
    }

    fn take(&mut self, part: Part<'_>) {
        let last = self.blocks.last_mut();
        match (part, last) {
            (Part::Text("") | Part::Refusal("") | Part::Thinking(""), _) => {}
            (Part::Text(more), Some(Block::Text(text))) | (Part::Refusal(more), Some(Block::Refusal(text))) => text.push_str(more),
            (Part::Thinking(more), Some(Block::Thinking { text, is_whole: false, .. })) => text.push_str(more),
            (Part::Signature(more), Some(Block::Thinking { signature, is_whole: false, .. })) => signature.push_str(more),
            (Part::ThinkingEnd, Some(Block::Thinking { is_whole, .. })) => *is_whole = true,
            (Part::Text(text), _) => self.blocks.push(Block::Text(text.to_owned())),
            (Part::Refusal(text), _) => self.blocks.push(Block::Refusal(text.to_owned())),
            (Part::Thinking(text), _) => self.thinking(text, ""),
            (Part::Signature(signature), _) => self.thinking("", signature),
            (Part::Redacted(data), _) => self.blocks.push(Block::Redacted(data.to_owned())),
            (Part::Call(Call { number, id, name, signature }), _) => self.blocks.push(Block::Call {
                number,
                id: id.to_owned(),
                name: name.to_owned(),
                signature: signature.to_owned(),
                arguments: Vec::new(),
            }),
            (Part::Arguments(of, more), _) => {
                let of_call = self.blocks.iter_mut().rev().find_map(|block| match block {
                    Block::Call { number, arguments, .. } if *number == of => Some(arguments),
                    _ => None,
                });
                if let Some(arguments) = of_call {
                    more.put(arguments);
                }
            }
            (Part::Logprobs(entries), _) => {
                let comma = if self.logprobs.is_empty() || entries.is_empty() { "" } else { "," };
                self.logprobs.extend([comma, entries]);
            }
            (Part::Finish(reason, native), _) => (self.reason, self.native) = (Some(reason), native.unwrap_or_default().to_owned()),
            (Part::ThinkingEnd | Part::CallEnd(_), _) => {}
        }
    }

    fn thinking(&mut self, text: &str, signature: &str) {
        self.blocks.push(Block::Thinking { text: text.to_owned(), signature: signature.to_owned(), is_whole: false });
    }
}

impl Sink for Gathered {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Start { id, model } => (self.id, self.model) = (id.to_owned(), model.to_owned()),
            Event::Usage(usage) => self.usage = Some(usage),
            Event::Part(choice, part) if choice < MOST => {
                let at = choice as usize;
                if at >= self.choices.len() {
                    self.choices.resize_with(at + 1, Choice::default);
                }
                if let Some(choice) = self.choices.get_mut(at) {
                    choice.take(part);
                }
            }
            Event::Failed(fault) => self.fault = Some(fault),
            Event::Part(..) | Event::Ping | Event::Done => {}
        }
    }
}
