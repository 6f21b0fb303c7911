//! Token usage as providers report it, read from an answer as it passes.

use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};
use serde::{Deserialize, Serialize};

/// Tokens by what they are billed as. The classes don't overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Input tokens that were neither read from nor written to a prompt cache.
    #[serde(rename = "in")]
    pub input: u64,
    #[serde(rename = "cr", default, skip_serializing_if = "is_zero")]
    pub cache_read: u64,
    /// Written to a cache kept for 5 minutes (or the provider's only kind).
    #[serde(rename = "cw", default, skip_serializing_if = "is_zero")]
    pub cache_write: u64,
    #[serde(rename = "cw1h", default, skip_serializing_if = "is_zero")]
    pub cache_write_1h: u64,
    /// Output tokens, hidden reasoning included.
    #[serde(rename = "out")]
    pub output: u64,
    /// Of `output`, those that were hidden reasoning.
    #[serde(rename = "rs", default, skip_serializing_if = "is_zero")]
    pub reasoning: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The numbers of one usage object, before they are sorted into classes that don't overlap.
#[derive(Debug, Clone, Copy, Default)]
struct Numbers {
    prompt: Option<u64>,
    completion: Option<u64>,
    cached: Option<u64>,
    openai_cache_write: Option<u64>,
    reasoning: Option<u64>,
    input: Option<u64>,
    output: Option<u64>,
    cache_creation: Option<u64>,
    cache_creation_1h: Option<u64>,
    cache_read: Option<u64>,
}

/// Follows usage through an answer: a whole JSON document, or one event after the other of a stream. Anthropic's numbers
/// are cumulative and come in parts (`message_start`, then `message_delta`): a later number replaces an earlier one.
#[derive(Debug, Clone, Copy, Default)]
pub struct UsageReader {
    numbers: Numbers,
    /// Bytes of text the caller was shown: content, arguments, refusals, reasoning summaries.
    pub visible_bytes: u64,
    /// Usage stood at the top of a document: what Anthropic's `message_start` tells is only the beginning.
    pub is_final: bool,
}

impl UsageReader {
    /// Usage, once the provider has told input and output. `None` until then.
    pub fn usage(&self) -> Option<Usage> {
        let n = self.numbers;
        match (n.prompt, n.completion, n.input, n.output) {
            (Some(prompt), Some(completion), _, _) => Some(openai(n, prompt, completion)),
            (_, _, Some(input), Some(output)) => Some(anthropic(n, input, output)),
            _ => None,
        }
    }

    /// Input tokens alone, as soon as they are known: enough to charge a cut stream fairly.
    pub fn input(&self) -> Option<Usage> {
        self.usage()
            .map(|usage| Usage { output: 0, reasoning: 0, ..usage })
            .or_else(|| self.numbers.input.map(|input| anthropic(self.numbers, input, 0)))
    }
}

/// OpenAI counts cached tokens inside `prompt_tokens`.
fn openai(n: Numbers, prompt: u64, completion: u64) -> Usage {
    let cache_read = n.cached.unwrap_or(0).min(prompt);
    let cache_write = n.openai_cache_write.unwrap_or(0).min(prompt - cache_read);
    Usage {
        input: prompt - cache_read - cache_write,
        cache_read,
        cache_write,
        cache_write_1h: 0,
        output: completion,
        reasoning: n.reasoning.unwrap_or(0).min(completion),
    }
}

/// Anthropic counts cache tokens beside `input_tokens`; the 1 h part is inside `cache_creation_input_tokens`.
fn anthropic(n: Numbers, input: u64, output: u64) -> Usage {
    let long = n.cache_creation_1h.unwrap_or(0);
    Usage {
        input,
        cache_read: n.cache_read.unwrap_or(0),
        cache_write: n.cache_creation.unwrap_or(0).saturating_sub(long),
        cache_write_1h: long,
        output,
        reasoning: 0,
    }
}

/// Reads one JSON document of an answer: the whole body, or the data of one event.
#[derive(Debug)]
pub struct AnswerReader {
    scanner: Scanner,
    walk: Walk,
    failed: bool,
}

/// What one document was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Document {
    /// It carried a usage object that was not null.
    pub usage: bool,
    /// It had a `choices` array and nothing in it.
    pub no_choices: bool,
    /// It was an error object.
    pub error: bool,
}

impl AnswerReader {
    pub fn new(so_far: UsageReader) -> Self {
        AnswerReader { scanner: Scanner::default(), walk: Walk { reader: so_far, ..Walk::default() }, failed: false }
    }

    /// Reads a piece. What is not JSON (`[DONE]`) is no error: it just tells nothing.
    pub fn feed(&mut self, piece: &[u8]) {
        self.failed = self.failed || self.scanner.feed(piece, &mut self.walk).is_err();
    }

    /// Ends the document in hand. The next goes on from what was told so far, in the memory of this one.
    pub fn end_document(&mut self) -> Document {
        self.failed = self.failed || self.scanner.finish(&mut self.walk).is_err();
        let document = if self.failed { Document::default() } else { self.walk.document() };
        self.failed = false;
        self.scanner.reset();
        self.walk.reset();
        document
    }

    /// What all documents told together, the one in hand included as far as it was read.
    pub fn so_far(&self) -> UsageReader {
        self.walk.reader
    }

    pub fn finish(mut self) -> (UsageReader, Document) {
        let document = self.end_document();
        (self.so_far(), document)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Root,
    /// `usage`, or `message.usage`.
    Usage,
    /// `prompt_tokens_details`, `completion_tokens_details`, `cache_creation`: their names don't clash.
    Details,
    /// `message` of Anthropic's `message_start`.
    Message,
    Choices,
    /// Anything under `choices`, `content`, `delta`: its strings are what the caller sees.
    Shown,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Into(Node),
    Number(Name),
    Shown,
    Ignored,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Prompt,
    Completion,
    Cached,
    OpenAiCacheWrite,
    Reasoning,
    Input,
    Output,
    CacheCreation,
    CacheCreation1h,
    CacheRead,
}

#[derive(Debug, Default)]
struct Walk {
    nodes: Vec<(Node, Slot)>,
    reader: UsageReader,
    usage: bool,
    choices: bool,
    items: u64,
    error: bool,
}

impl Walk {
    fn document(&self) -> Document {
        Document { usage: self.usage, no_choices: self.choices && self.items == 0, error: self.error }
    }

    fn reset(&mut self) {
        self.nodes.clear();
        (self.usage, self.choices, self.items, self.error) = (false, false, 0, false);
    }

    fn slot(&self) -> Slot {
        match self.nodes.last() {
            Some((Node::Choices | Node::Shown, Slot::Ignored)) => Slot::Into(Node::Shown),
            Some(&(_, slot)) => slot,
            None => Slot::Into(Node::Root),
        }
    }
}

impl Visitor for Walk {
    type Error = JsonError;

    fn open(&mut self, object: bool, _: u64) -> Result<(), JsonError> {
        let node = match self.slot() {
            Slot::Into(node) => node,
            Slot::Shown => Node::Shown,
            Slot::Number(_) | Slot::Ignored => Node::Other,
        };
        match (self.nodes.last(), node) {
            (Some((Node::Choices, _)), _) => self.items += 1,
            (Some(&(parent, _)), Node::Usage) => {
                self.usage |= object;
                self.reader.is_final |= object && parent == Node::Root;
            }
            (_, Node::Choices) => self.choices = true,
            _ => {}
        }
        self.nodes.push((node, Slot::Ignored));
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), JsonError> {
        self.nodes.pop();
        Ok(())
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
        let key = key.unwrap_or_default();
        let Some((node, slot)) = self.nodes.last_mut() else { return Ok(()) };
        *slot = match (*node, key) {
            (Node::Root | Node::Message, b"usage") => Slot::Into(Node::Usage),
            (Node::Root, b"message") => Slot::Into(Node::Message),
            (Node::Root, b"choices") => Slot::Into(Node::Choices),
            (Node::Root | Node::Message, b"content" | b"content_block" | b"delta") => Slot::Shown,
            (Node::Root, b"error") => {
                self.error = true;
                Slot::Ignored
            }
            (Node::Shown, b"id" | b"type" | b"role" | b"finish_reason" | b"stop_reason" | b"index" | b"object") => Slot::Into(Node::Other),
            (Node::Shown, _) => Slot::Shown,
            (Node::Usage, b"prompt_tokens_details" | b"completion_tokens_details" | b"cache_creation") => Slot::Into(Node::Details),
            (Node::Usage | Node::Details, _) => number(*node, key).map_or(Slot::Ignored, Slot::Number),
            _ => Slot::Ignored,
        };
        Ok(())
    }

    fn wants(&self) -> usize {
        0
    }

    fn scalar(&mut self, value: Scalar<'_>, _: Span) -> Result<(), JsonError> {
        match (self.slot(), value) {
            (Slot::Shown | Slot::Into(Node::Shown), Scalar::Str { len, .. }) => self.reader.visible_bytes += len,
            (Slot::Number(name), Scalar::Num(digits)) => {
                let n = std::str::from_utf8(digits).ok().and_then(|d| d.parse().ok());
                if n.is_some() {
                    *self.reader.numbers.slot(name) = n;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn number(node: Node, key: &[u8]) -> Option<Name> {
    Some(match (node, key) {
        (Node::Usage, b"prompt_tokens") => Name::Prompt,
        (Node::Usage, b"completion_tokens") => Name::Completion,
        (Node::Usage, b"input_tokens") => Name::Input,
        (Node::Usage, b"output_tokens") => Name::Output,
        (Node::Usage, b"cache_creation_input_tokens") => Name::CacheCreation,
        (Node::Usage, b"cache_read_input_tokens") => Name::CacheRead,
        (Node::Details, b"cached_tokens") => Name::Cached,
        (Node::Details, b"cache_write_tokens") => Name::OpenAiCacheWrite,
        (Node::Details, b"reasoning_tokens") => Name::Reasoning,
        (Node::Details, b"ephemeral_1h_input_tokens") => Name::CacheCreation1h,
        _ => return None,
    })
}

impl Numbers {
    fn slot(&mut self, name: Name) -> &mut Option<u64> {
        match name {
            Name::Prompt => &mut self.prompt,
            Name::Completion => &mut self.completion,
            Name::Cached => &mut self.cached,
            Name::OpenAiCacheWrite => &mut self.openai_cache_write,
            Name::Reasoning => &mut self.reasoning,
            Name::Input => &mut self.input,
            Name::Output => &mut self.output,
            Name::CacheCreation => &mut self.cache_creation,
            Name::CacheCreation1h => &mut self.cache_creation_1h,
            Name::CacheRead => &mut self.cache_read,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(so_far: UsageReader, text: &str) -> (UsageReader, Document) {
        let mut reader = AnswerReader::new(so_far);
        reader.feed(text.as_bytes());
        reader.finish()
    }

    #[test]
    fn openai_cached_tokens_are_inside_the_prompt() {
        let (reader, document) = read(
            UsageReader::default(),
            r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"hé","usage":{"prompt_tokens":9}},"finish_reason":"stop"}],
               "usage":{"prompt_tokens":100,"completion_tokens":20,"total_tokens":120,"prompt_tokens_details":{"cached_tokens":60,"audio_tokens":0},
               "completion_tokens_details":{"reasoning_tokens":8}}}"#,
        );
        let expected = Usage { input: 40, cache_read: 60, output: 20, reasoning: 8, ..Usage::default() };
        assert_eq!(reader.usage(), Some(expected));
        assert_eq!((document.usage, document.no_choices, reader.visible_bytes), (true, false, 3));
    }

    #[test]
    fn anthropic_deltas_are_cumulative() {
        let mut reader = UsageReader::default();
        let mut documents = Vec::new();
        for event in [
            r#"{"type":"message_start","message":{"id":"msg_1","content":[],"usage":{"input_tokens":25,"cache_creation_input_tokens":10,"cache_read_input_tokens":7,"cache_creation":{"ephemeral_5m_input_tokens":6,"ephemeral_1h_input_tokens":4},"output_tokens":1}}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":17}}"#,
        ] {
            let document;
            (reader, document) = read(reader, event);
            documents.push(document.usage);
        }
        let expected = Usage { input: 25, cache_read: 7, cache_write: 6, cache_write_1h: 4, output: 17, reasoning: 0 };
        assert_eq!(reader.usage(), Some(expected));
        assert_eq!(reader.visible_bytes, 5);
        assert_eq!(documents, [true, false, true, true]);
        assert!(reader.is_final);
    }

    #[test]
    fn only_the_usage_chunk_has_no_choices_and_usage() {
        let (_, usage_chunk) = read(UsageReader::default(), r#"{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#);
        assert_eq!((usage_chunk.no_choices, usage_chunk.usage), (true, true));
        let (_, azure_first) = read(UsageReader::default(), r#"{"choices":[],"usage":null,"prompt_filter_results":[]}"#);
        assert_eq!((azure_first.no_choices, azure_first.usage), (true, false));
        let (_, last_words) =
            read(UsageReader::default(), r#"{"choices":[{"delta":{}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#);
        assert_eq!((last_words.no_choices, last_words.usage), (false, true));
        assert_eq!(read(UsageReader::default(), "[DONE]").1, Document::default());
    }
}
