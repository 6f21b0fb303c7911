//! Token usage as providers report it, read from an answer as it passes.

use crate::json::{JsonError, Scalar, Scanner, Span, Visitor};
use crate::operation::{Tells, is_id};
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
    /// Input tokens that were sound, beside `input`.
    #[serde(rename = "ai", default, skip_serializing_if = "is_zero")]
    pub audio_input: u64,
    /// Input tokens that were pictures, beside `input`.
    #[serde(rename = "ii", default, skip_serializing_if = "is_zero")]
    pub image_input: u64,
    /// Output tokens that were sound or pictures, beside `output`.
    #[serde(rename = "mo", default, skip_serializing_if = "is_zero")]
    pub media_output: u64,
    /// Seconds of a recording, begun ones included, where they are what is paid.
    #[serde(rename = "s", default, skip_serializing_if = "is_zero")]
    pub seconds: u64,
}

impl Usage {
    /// All tokens, whatever they are billed as.
    pub fn tokens(&self) -> u64 {
        let parts = [
            self.input,
            self.cache_read,
            self.cache_write,
            self.cache_write_1h,
            self.output,
            self.audio_input,
            self.image_input,
            self.media_output,
        ];
        parts.iter().fold(0, |sum, part| sum.saturating_add(*part))
    }
}

/// Ids that one answer may name, at most: an answer and its items.
pub const MAX_IDS: usize = 128;

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
    audio_input: Option<u64>,
    image_input: Option<u64>,
    audio_output: Option<u64>,
    seconds: Option<u64>,
    /// Gemini: input of the provider's own tools, beside the prompt.
    tool_use: Option<u64>,
}

/// What of an answer is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Looks {
    pub tells: Tells,
    /// The ids of what the provider made and keeps.
    pub ids: bool,
}

/// Follows usage through an answer: a whole JSON document, or one event after the other of a stream. Anthropic's numbers
/// are cumulative and come in parts (`message_start`, then `message_delta`): a later number replaces an earlier one.
#[derive(Debug, Clone, Copy, Default)]
pub struct UsageReader {
    looks: Looks,
    numbers: Numbers,
    /// Bytes of text the caller was shown: content, arguments, refusals, reasoning summaries.
    pub visible_bytes: u64,
    /// Something passed that is not text (sound, probabilities of tokens): its bytes tell nothing about tokens.
    pub more_than_text: bool,
    /// Usage stood at the top of a document: what Anthropic's `message_start` tells is only the beginning.
    pub is_final: bool,
}

impl UsageReader {
    pub fn new(looks: Looks) -> Self {
        UsageReader { looks, ..UsageReader::default() }
    }

    /// Usage, once the provider has told input and output. `None` until then.
    pub fn usage(&self) -> Option<Usage> {
        let n = self.numbers;
        match self.looks.tells {
            Tells::Nothing => None,
            Tells::Completion => Some(openai(n, n.prompt?, n.completion?)),
            Tells::Prompt => Some(openai(n, n.prompt?, 0)),
            Tells::Input if n.seconds.is_some() => Some(Usage { seconds: n.seconds?, ..Usage::default() }),
            Tells::Input => Some(openai(n, n.input?, n.output?)),
            Tells::Anthropic => Some(anthropic(n, n.input?, n.output?)),
            Tells::Gemini => Some(gemini(n, n.prompt?)),
        }
    }

    /// Output tokens told so far.
    pub fn output_so_far(&self) -> u64 {
        let n = self.numbers;
        let beside = if self.looks.tells == Tells::Gemini { n.reasoning.unwrap_or(0) } else { 0 };
        n.completion.unwrap_or(0).saturating_add(beside).max(n.output.unwrap_or(0))
    }

    /// Input tokens alone, as soon as they are known: enough to charge a cut stream fairly.
    pub fn input(&self) -> Option<Usage> {
        let begun = || match self.looks.tells {
            Tells::Anthropic => self.numbers.input.map(|input| anthropic(self.numbers, input, 0)),
            _ => None,
        };
        self.usage().map(|usage| Usage { output: 0, reasoning: 0, media_output: 0, ..usage }).or_else(begun)
    }
}

/// OpenAI counts cached tokens, sound and pictures inside its sums.
fn openai(n: Numbers, prompt: u64, completion: u64) -> Usage {
    let mut left = prompt;
    let mut part = |count: Option<u64>| {
        let count = count.unwrap_or(0).min(left);
        left -= count;
        count
    };
    // Sound and pictures first: where cached tokens are some of them, the dearer price applies.
    let (audio_input, image_input) = (part(n.audio_input), part(n.image_input));
    let (cache_read, cache_write) = (part(n.cached), part(n.openai_cache_write));
    let media_output = n.audio_output.unwrap_or(0).min(completion);
    Usage {
        input: left,
        cache_read,
        cache_write,
        output: completion - media_output,
        reasoning: n.reasoning.unwrap_or(0).min(completion - media_output),
        audio_input,
        image_input,
        media_output,
        ..Usage::default()
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
        ..Usage::default()
    }
}

/// Gemini counts cached tokens inside the prompt, and thoughts beside the candidates. What is not told is none.
fn gemini(n: Numbers, prompt: u64) -> Usage {
    let thoughts = n.reasoning.unwrap_or(0);
    let cache_read = n.cached.unwrap_or(0).min(prompt);
    Usage {
        input: (prompt - cache_read).saturating_add(n.tool_use.unwrap_or(0)),
        cache_read,
        output: n.completion.unwrap_or(0).saturating_add(thoughts),
        reasoning: thoughts,
        ..Usage::default()
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Document {
    /// It carried a usage object that was not null.
    pub usage: bool,
    /// It had a `choices` array and nothing in it.
    pub no_choices: bool,
    /// It was an error object.
    pub error: bool,
    /// Objects that it names as made: its own id, and its items'.
    pub ids: Vec<String>,
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
    /// `prompt_tokens_details`, `cache_creation` and the like.
    Details,
    /// `completion_tokens_details` and the like.
    OutputDetails,
    /// `message` of Anthropic's `message_start`.
    Message,
    /// `response` of an event of the Responses API.
    Response,
    /// Its `output`, and one item of it.
    Items,
    Item,
    Choices,
    /// Anything under `choices`, `content`, `delta`: its strings are what the caller sees.
    Shown,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Into(Node),
    Number(Name),
    Id,
    Error,
    Shown,
    /// Shown as well, but no text.
    Beside,
    /// Gemini: why it ends; what was told of usage by then is the last word.
    Last,
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
    AudioInput,
    ImageInput,
    AudioOutput,
    Seconds,
    ToolUse,
}

#[derive(Debug, Default)]
struct Walk {
    nodes: Vec<(Node, Slot)>,
    reader: UsageReader,
    usage: bool,
    choices: bool,
    items: u64,
    error: bool,
    ids: Vec<String>,
}

impl Walk {
    fn document(&mut self) -> Document {
        let ids = std::mem::take(&mut self.ids);
        Document { usage: self.usage, no_choices: self.choices && self.items == 0, error: self.error, ids }
    }

    fn reset(&mut self) {
        self.nodes.clear();
        self.ids.clear();
        (self.usage, self.choices, self.items, self.error) = (false, false, 0, false);
    }

    fn slot(&self) -> Slot {
        match self.nodes.last() {
            Some((Node::Choices | Node::Shown, Slot::Ignored)) => Slot::Into(Node::Shown),
            Some((Node::Items, _)) => Slot::Into(Node::Item),
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
            Slot::Beside => {
                self.reader.more_than_text = true;
                Node::Shown
            }
            Slot::Error => {
                self.error = true;
                Node::Other
            }
            Slot::Last => {
                self.reader.is_final = true;
                Node::Other
            }
            Slot::Number(_) | Slot::Id | Slot::Ignored => Node::Other,
        };
        match (self.nodes.last(), node) {
            (Some((Node::Choices, _)), _) => self.items += 1,
            (Some(&(parent, _)), Node::Usage) => {
                self.usage |= object;
                self.reader.is_final |= object && parent != Node::Message && self.reader.looks.tells != Tells::Gemini;
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
        let Looks { ids, tells } = self.reader.looks;
        let is_gemini = tells == Tells::Gemini;
        *slot = match (*node, key) {
            (Node::Root | Node::Message | Node::Response, b"usage") => Slot::Into(Node::Usage),
            (Node::Root, b"message") => Slot::Into(Node::Message),
            (Node::Root, b"response") => Slot::Into(Node::Response),
            (Node::Root, b"usageMetadata") => Slot::Into(Node::Usage),
            (Node::Root, b"choices" | b"candidates") => Slot::Into(Node::Choices),
            (Node::Shown, b"finishReason") | (Node::Root, b"promptFeedback" | b"embeddings") if is_gemini => Slot::Last,
            (Node::Root | Node::Message, b"content" | b"content_block" | b"delta") => Slot::Shown,
            (Node::Root | Node::Response, b"error") => Slot::Error,
            (Node::Root | Node::Response, b"output") if ids => Slot::Into(Node::Items),
            (Node::Root | Node::Response | Node::Item, b"id") if ids => Slot::Id,
            (Node::Shown, b"id" | b"type" | b"role" | b"finish_reason" | b"stop_reason" | b"index" | b"object") => Slot::Into(Node::Other),
            (Node::Shown, b"audio" | b"logprobs" | b"inlineData" | b"logprobsResult") => Slot::Beside,
            (Node::Shown, b"thoughtSignature") => Slot::Into(Node::Other),
            (Node::Shown, _) => Slot::Shown,
            (Node::Usage, b"prompt_tokens_details" | b"input_tokens_details" | b"input_token_details" | b"cache_creation") => {
                Slot::Into(Node::Details)
            }
            (Node::Usage, b"completion_tokens_details" | b"output_tokens_details" | b"output_token_details") => {
                Slot::Into(Node::OutputDetails)
            }
            (Node::Usage | Node::Details | Node::OutputDetails, _) => number(*node, key).map_or(Slot::Ignored, Slot::Number),
            _ => Slot::Ignored,
        };
        Ok(())
    }

    fn wants(&self) -> usize {
        if self.slot() == Slot::Id { 129 } else { 0 }
    }

    fn scalar(&mut self, value: Scalar<'_>, _: Span) -> Result<(), JsonError> {
        match (self.slot(), value) {
            (Slot::Shown | Slot::Beside | Slot::Into(Node::Shown), Scalar::Str { len, .. }) => self.reader.visible_bytes += len,
            (Slot::Id, Scalar::Str { text, .. }) => {
                let id = std::str::from_utf8(text).ok().filter(|id| is_id(id) && self.ids.len() < MAX_IDS);
                self.ids.extend(id.map(str::to_owned));
            }
            (Slot::Last, Scalar::Str { .. }) => self.reader.is_final = true,
            (Slot::Error, Scalar::Null) => {}
            (Slot::Error, _) => self.error = true,
            (Slot::Number(name), Scalar::Num(digits)) => {
                let n = whole(digits);
                if n.is_some() {
                    *self.reader.numbers.slot(name) = n;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A count; a part of one, as of a second, is paid as a whole.
fn whole(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    let (units, rest) = text.split_once('.').unwrap_or((text, ""));
    let more = rest.bytes().any(|b| b != b'0');
    units.parse::<u64>().ok()?.checked_add(u64::from(more)).filter(|_| !text.contains(['e', 'E']))
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
        (Node::OutputDetails, b"reasoning_tokens") => Name::Reasoning,
        (Node::OutputDetails, b"audio_tokens") => Name::AudioOutput,
        (Node::Details, b"audio_tokens") => Name::AudioInput,
        (Node::Details, b"image_tokens") => Name::ImageInput,
        (Node::Usage, b"promptTokenCount") => Name::Prompt,
        (Node::Usage, b"candidatesTokenCount") => Name::Completion,
        (Node::Usage, b"thoughtsTokenCount") => Name::Reasoning,
        (Node::Usage, b"cachedContentTokenCount") => Name::Cached,
        (Node::Usage, b"toolUsePromptTokenCount") => Name::ToolUse,
        (Node::Usage, b"seconds") => Name::Seconds,
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
            Name::AudioInput => &mut self.audio_input,
            Name::ImageInput => &mut self.image_input,
            Name::AudioOutput => &mut self.audio_output,
            Name::Seconds => &mut self.seconds,
            Name::ToolUse => &mut self.tool_use,
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

    fn telling(tells: Tells) -> UsageReader {
        UsageReader::new(Looks { tells, ids: false })
    }

    #[test]
    fn openai_cached_tokens_are_inside_the_prompt() {
        let (reader, document) = read(
            telling(Tells::Completion),
            r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"hé","usage":{"prompt_tokens":9}},"finish_reason":"stop"}],
               "usage":{"prompt_tokens":100,"completion_tokens":20,"total_tokens":120,"prompt_tokens_details":{"cached_tokens":60,"audio_tokens":0},
               "completion_tokens_details":{"reasoning_tokens":8}}}"#,
        );
        let expected = Usage { input: 40, cache_read: 60, output: 20, reasoning: 8, ..Usage::default() };
        assert_eq!(reader.usage(), Some(expected));
        assert_eq!((document.usage, document.no_choices, reader.visible_bytes), (true, false, 3));
    }

    #[test]
    fn gemini_counts_thoughts_beside_and_cached_tokens_inside() {
        let chunk = |reader, more: &str| {
            read(
                reader,
                &format!(
                    r#"{{"candidates":[{{"content":{{"parts":[{{"text":"hé"}},{{"thoughtSignature":"abc","functionCall":{{"name":"f"}}}},
                       {{"inlineData":{{"data":"AAAA"}}}}]}}{more}}}],
                       "usageMetadata":{{"promptTokenCount":100,"cachedContentTokenCount":60,"toolUsePromptTokenCount":5,"candidatesTokenCount":20,
                       "thoughtsTokenCount":7,"totalTokenCount":132,"promptTokensDetails":[{{"modality":"TEXT","tokenCount":100}}]}}}}"#
                ),
            )
            .0
        };
        let running = chunk(telling(Tells::Gemini), "");
        assert_eq!((running.is_final, running.output_so_far(), running.visible_bytes), (false, 27, 3 + 1 + 4));
        let last = chunk(running, r#","finishReason":"STOP""#);
        let expected = Usage { input: 45, cache_read: 60, output: 27, reasoning: 7, ..Usage::default() };
        assert_eq!((last.is_final, last.usage()), (true, Some(expected)));
        let blocked = r#"{"promptFeedback":{"blockReason":"SAFETY"},"usageMetadata":{"promptTokenCount":9}}"#;
        let (blocked, _) = read(telling(Tells::Gemini), blocked);
        assert_eq!((blocked.is_final, blocked.usage()), (true, Some(Usage { input: 9, ..Usage::default() })));
    }

    #[test]
    fn anthropic_deltas_are_cumulative() {
        let mut reader = telling(Tells::Anthropic);
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
        let expected = Usage { input: 25, cache_read: 7, cache_write: 6, cache_write_1h: 4, output: 17, ..Usage::default() };
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
