//! The reading: which of a body's values govern, by where they stand.

use super::fields::{Field, find, folds_to, name_of};
use super::{BodyError, BodyFacts, Limit, Object, Tier};
use crate::json::{Scalar, Scanner, Span, Visitor};
use crate::operation::{Form, MAX_REFS, is_id, looks_like_object};

/// Longest model name that is read.
const MAX_MODEL: usize = 256;
/// Longest string value of any other governed field.
const MAX_WORD: usize = 64;
/// Longest id that is read; a longer one is none.
const MAX_ID: usize = 129;
/// Text to speak of which the characters are counted; of longer text, the bytes. Four bytes for each of the 4,096
/// characters that OpenAI takes.
const MAX_SPOKEN: usize = 16 * 1024;
/// Tokens that Anthropic puts before a request that has tools (tool use guide: 346 for Claude 4, 530 at most for Claude 3), and for each
/// tool whose description is its own. The second has no figure that was checked: both are allowances, several times what is known.
const TOKENS_FOR_TOOLS: u64 = 2_000;
const TOKENS_OF_A_TOOL: u64 = 3_000;

/// Reads a body in pieces.
#[derive(Debug, Default)]
pub struct BodyReader {
    scanner: Scanner,
    walk: Walk,
}

impl BodyReader {
    pub fn new(form: Form) -> Self {
        BodyReader { walk: Walk { form, ..Walk::default() }, ..BodyReader::default() }
    }

    pub fn feed(&mut self, piece: &[u8]) -> Result<(), BodyError> {
        self.scanner.feed(piece, &mut self.walk)
    }

    pub fn position(&self) -> u64 {
        self.scanner.position()
    }

    pub fn finish(mut self) -> Result<BodyFacts, BodyError> {
        self.scanner.finish(&mut self.walk)?;
        let mut facts = self.walk.facts;
        facts.bytes = self.scanner.position();
        facts.texts = facts.texts.max(1);
        facts.choices = self.walk.n.max(1).saturating_mul(self.walk.best_of.max(1));
        if self.walk.form == Form::Completions {
            facts.choices = facts.choices.saturating_mul(facts.texts);
        }
        Ok(facts)
    }
}

/// What the innermost object or array is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Node {
    Root,
    StreamOptions,
    Tools,
    Tool,
    Messages,
    Message,
    /// A string or an array of parts.
    Content,
    Part,
    Source,
    Thinking,
    /// The items of a Responses request, and one of them.
    Input,
    Item,
    /// An object whose ids name objects at the provider.
    Holder,
    /// An array of such objects, or of ids.
    Holders,
    StoredPrompt,
    /// Parts by name.
    Variables,
    Texts,
    /// Of an operation that is not in the table: any string may name an object.
    Anywhere,
    #[default]
    Other,
}

/// What the value that comes next is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Slot {
    Top(Field),
    IncludeUsage,
    ToolType,
    PartType,
    SourceType,
    ThinkingBudget,
    ItemType,
    ItemId,
    ItemRole,
    ItemSealed,
    /// Sound of an earlier answer, kept at the provider.
    MessageAudio,
    /// The id of an object at the provider, or an object that holds ids; the name is for the caller.
    Reference(&'static str),
    /// An id of the operator's as well as of a key's: only what is certainly a key's counts.
    PerhapsReference,
    Into(Node),
    #[default]
    Ignored,
}

/// What one item of a Responses request told so far. An item that does not bring its content is a reference.
#[derive(Debug, Default)]
struct Item {
    ids: Vec<String>,
    types: u64,
    /// Every type that was named carries its own content.
    carried: bool,
    sealed: bool,
    /// It says who speaks: a message that names no type.
    role: bool,
}

#[derive(Debug, Default)]
struct Walk {
    form: Form,
    nodes: Vec<(Node, Slot)>,
    seen: Vec<Field>,
    seen_include_usage: bool,
    seen_thinking: bool,
    n: u64,
    best_of: u64,
    item: Item,
    facts: BodyFacts,
}

impl Walk {
    fn node(&self) -> Node {
        self.nodes.last().map_or(Node::Other, |&(node, _)| node)
    }

    /// What stands next: the slot that the last key opened, or an array's item.
    fn slot(&self) -> Slot {
        match self.nodes.last() {
            Some((Node::Tools, _)) => Slot::Into(Node::Tool),
            Some((Node::Messages, _)) => Slot::Into(Node::Message),
            Some((Node::Content | Node::Variables, _)) => Slot::Into(Node::Part),
            Some((Node::Input, _)) => Slot::Into(Node::Item),
            Some((Node::Holders, _)) => Slot::Reference("ids"),
            Some((Node::Anywhere, Slot::Ignored)) => Slot::Into(Node::Anywhere),
            Some(&(_, slot)) => slot,
            None => Slot::Into(Node::Root),
        }
    }

    fn is_anthropic(&self) -> bool {
        matches!(self.form, Form::Messages | Form::Count)
    }

    fn set_slot(&mut self, slot: Slot) {
        if let Some(top) = self.nodes.last_mut() {
            top.1 = slot;
        }
    }

    fn top_field(&mut self, key: &[u8]) -> Result<Slot, BodyError> {
        let Some((name, field)) = find(self.form, key) else { return Ok(Slot::Ignored) };
        if key != name.as_bytes() || self.seen.contains(&field) {
            return Err(BodyError::Ambiguous(name));
        }
        self.seen.push(field);
        Ok(Slot::Top(field))
    }

    fn unbounded(&mut self, what: &'static str) {
        self.facts.unbounded.get_or_insert(what);
    }

    fn refer(&mut self, id: String) -> Result<(), BodyError> {
        if self.facts.refs.contains(&id) {
            return Ok(());
        }
        if self.facts.refs.len() >= MAX_REFS {
            return Err(BodyError::TooManyReferences);
        }
        self.facts.refs.push(id);
        Ok(())
    }

    fn reference(&mut self, name: &'static str, value: Scalar<'_>) -> Result<(), BodyError> {
        if value == Scalar::Null {
            return Ok(());
        }
        let id = id(value).ok_or(BodyError::Field(name, "an id of at most 128 letters, digits, \"_\" and \"-\""))?;
        self.refer(id)
    }

    fn limit(&mut self, name: &'static str, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        let tokens = match value {
            Scalar::Null => None,
            _ => Some(count(value).ok_or(BodyError::Field(name, "a whole number of at most 1,000,000,000"))?),
        };
        self.facts.limits.push(Limit { name, tokens, span });
        Ok(())
    }

    fn top_scalar(&mut self, field: Field, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        match (field, value) {
            (Field::Model, Scalar::Str { text, len }) if len == text.len() as u64 => {
                self.facts.model = Some(String::from_utf8_lossy(text).into_owned());
                self.facts.model_span = span;
            }
            // Where a default is taken, null means it.
            (Field::Model, Scalar::Null) if matches!(self.form, Form::Moderations | Form::Other) => self.facts.model_span = span,
            (Field::Model, _) => return Err(BodyError::Field("model", "a string of at most 256 bytes")),
            (Field::Stream, Scalar::Bool(stream)) => self.facts.stream = stream,
            (Field::Stream, Scalar::Null) => {}
            (Field::Stream, _) => return Err(BodyError::Field("stream", "true or false")),
            (Field::StreamOptions, Scalar::Null) => {
                self.facts.stream_options = Some(None);
                self.facts.stream_options_span = span;
            }
            (Field::StreamOptions, _) => return Err(BodyError::Field("stream_options", "an object")),
            (Field::MaxTokens, _) => return self.limit("max_tokens", value, span),
            (Field::MaxCompletionTokens, _) => return self.limit("max_completion_tokens", value, span),
            (Field::MaxOutputTokens, _) => return self.limit("max_output_tokens", value, span),
            (Field::N | Field::BestOf | Field::PartialImages, Scalar::Null) => {}
            (Field::N, _) => self.n = choices(value).ok_or(BodyError::Field("n", "a whole number of at most 1024"))?,
            (Field::BestOf, _) => self.best_of = choices(value).ok_or(BodyError::Field("best_of", "a whole number of at most 1024"))?,
            (Field::PartialImages, _) => {
                self.facts.partial_images = choices(value).ok_or(BodyError::Field("partial_images", "a whole number of at most 1024"))?;
            }
            (Field::ServiceTier, Scalar::Null | Scalar::Str { text: b"auto", .. }) => self.facts.tier = Tier::Open(span),
            (Field::ServiceTier, Scalar::Str { text: b"default" | b"standard" | b"standard_only", .. }) => self.facts.tier = Tier::Named,
            (Field::ServiceTier, _) => {
                self.facts.tier = Tier::Named;
                self.unbounded("service_tier");
            }
            (Field::Store, Scalar::Bool(store)) => self.facts.store = Some((span, Some(store))),
            (Field::Store, Scalar::Null) => self.facts.store = Some((span, None)),
            (Field::Store, _) => return Err(BodyError::Field("store", "true or false")),
            (Field::History(name), _) => {
                self.facts.history |= value != Scalar::Null;
                return self.reference(name, value);
            }
            (Field::Container | Field::Voice, _) => {
                // Voices that everybody has are words.
                if field == Field::Container && value != Scalar::Null {
                    self.unbounded("container");
                    return self.reference("container", value);
                }
            }
            (Field::Texts, Scalar::Str { .. }) => self.facts.texts += 1,
            (Field::Spoken, Scalar::Str { text, len }) => {
                let whole = len == text.len() as u64;
                self.facts.characters = if whole { String::from_utf8_lossy(text).chars().count() as u64 } else { len };
            }
            (Field::Spoken, _) => return Err(BodyError::Field("input", "a string")),
            (Field::EncodingFormat, Scalar::Str { text, .. }) => self.facts.base64 = text == b"base64",
            (Field::EncodingFormat, Scalar::Null) => {}
            (Field::EncodingFormat, _) => return Err(BodyError::Field("encoding_format", "a string")),
            (Field::Size, Scalar::Str { .. }) => self.facts.size = word(value, "size")?,
            (Field::Quality, Scalar::Str { .. }) => self.facts.quality = word(value, "quality")?,
            (Field::Background | Field::StoredPrompt | Field::Unbounded(_), Scalar::Null | Scalar::Bool(false)) => {}
            (Field::Background, _) => {
                self.facts.background = true;
                self.unbounded("background");
            }
            (Field::StoredPrompt, _) => self.unbounded("prompt"),
            (Field::Unbounded(what), _) => self.unbounded(what),
            (Field::Size | Field::Quality, Scalar::Null) => {}
            (Field::Size | Field::Quality, _) => return Err(BodyError::Field(name_of(field), "a string")),
            (Field::Tools | Field::Messages | Field::System | Field::Thinking | Field::Input | Field::Texts, _) => {}
        }
        Ok(())
    }

    fn enter(&mut self, object: bool, at: u64) -> Result<Node, BodyError> {
        let node = match self.slot() {
            Slot::Into(Node::Root) if object => {
                self.facts.root.open = at;
                if self.form == Form::Other { Node::Anywhere } else { Node::Root }
            }
            Slot::Into(Node::Root) => return Err(BodyError::NotAnObject),
            Slot::Into(Node::Anywhere) => Node::Anywhere,
            Slot::Into(Node::Content) => if_array(object, Node::Content),
            Slot::Into(Node::Holders) => if_array(object, Node::Holders),
            Slot::Into(Node::Item) => {
                self.item = Item { carried: true, ..Item::default() };
                if_object(object, Node::Item)
            }
            Slot::Into(node) => if_object(object, node),
            Slot::Top(field) => return self.enter_field(field, object, at),
            Slot::Reference(_) => if_object(object, Node::Holder),
            Slot::MessageAudio => {
                self.unbounded("audio");
                if_object(object, Node::Holder)
            }
            Slot::PerhapsReference | Slot::Ignored => Node::Other,
            Slot::IncludeUsage
            | Slot::ToolType
            | Slot::PartType
            | Slot::SourceType
            | Slot::ThinkingBudget
            | Slot::ItemType
            | Slot::ItemId
            | Slot::ItemRole
            | Slot::ItemSealed => {
                return Err(BodyError::Field("type", "a scalar"));
            }
        };
        Ok(node)
    }

    fn enter_field(&mut self, field: Field, object: bool, at: u64) -> Result<Node, BodyError> {
        Ok(match field {
            Field::StreamOptions if object => {
                self.facts.stream_options = Some(Some(Object { open: at, filled: false }));
                Node::StreamOptions
            }
            Field::Tools => {
                if self.is_anthropic() {
                    self.facts.added += TOKENS_FOR_TOOLS;
                }
                if_array(object, Node::Tools)
            }
            Field::Messages => if_array(object, Node::Messages),
            Field::System => if_array(object, Node::Content),
            Field::Thinking => if_object(object, Node::Thinking),
            Field::Input => if_array(object, Node::Input),
            Field::Texts => if_array(object, Node::Texts),
            Field::Voice => if_object(object, Node::Holder),
            Field::History(_) => {
                self.facts.history = true;
                if_object(object, Node::Holder)
            }
            Field::Container => {
                self.unbounded("container");
                if_object(object, Node::Holder)
            }
            Field::StoredPrompt => {
                self.facts.history = true;
                self.unbounded("prompt");
                if_object(object, Node::StoredPrompt)
            }
            Field::Unbounded(what) => {
                self.unbounded(what);
                Node::Other
            }
            field => return Err(BodyError::Field(name_of(field), "a scalar")),
        })
    }

    /// The slot of a key below the top.
    fn inner_key(&mut self, node: Node, key: &[u8]) -> Result<Slot, BodyError> {
        let is = |name: &str| folds_to(key, name);
        Ok(match node {
            Node::StreamOptions => {
                if let Some(Some(object)) = &mut self.facts.stream_options {
                    object.filled = true;
                }
                match governed(key, "include_usage", &mut self.seen_include_usage)? {
                    true => Slot::IncludeUsage,
                    false => Slot::Ignored,
                }
            }
            Node::Thinking if governed(key, "budget_tokens", &mut self.seen_thinking)? => Slot::ThinkingBudget,
            Node::Tool if is("type") => Slot::ToolType,
            Node::Part if is("type") => Slot::PartType,
            Node::Source if is("type") => Slot::SourceType,
            Node::Item if is("type") => Slot::ItemType,
            Node::Item if is("id") => Slot::ItemId,
            Node::Item if is("encrypted_content") => Slot::ItemSealed,
            Node::Item if is("role") => Slot::ItemRole,
            Node::Part if is("source") => Slot::Into(Node::Source),
            Node::Part | Node::Message | Node::Source | Node::Item if is("content") => Slot::Into(Node::Content),
            // The output of a call: text, a list of parts, or one object that may be a file.
            Node::Item if is("output") => Slot::Into(Node::Content),
            Node::Message if is("audio") => Slot::MessageAudio,
            Node::StoredPrompt if is("variables") => Slot::Into(Node::Variables),
            Node::Part if is("file") => Slot::Into(Node::Holder),
            Node::Tool | Node::Part if is("input_image_mask") => Slot::Into(Node::Holder),
            Node::Tool if is("container") || is("environment") => Slot::Reference("container"),
            Node::Tool | Node::Holder if is("vector_store_ids") || is("file_ids") || is("skills") => Slot::Into(Node::Holders),
            Node::Part | Node::Source | Node::Item | Node::Holder if is("file_id") => Slot::Reference("file_id"),
            Node::Item | Node::Holder if is("container_id") => Slot::Reference("container_id"),
            Node::Holder if is("skill_id") => Slot::PerhapsReference,
            Node::Holder if is("id") => Slot::Reference("id"),
            _ => Slot::Ignored,
        })
    }

    /// An item has ended: one that is named by an id and does not bring its content refers to what the provider keeps.
    fn end_item(&mut self) -> Result<(), BodyError> {
        let item = std::mem::take(&mut self.item);
        let brings = if item.types > 0 { item.carried || item.sealed } else { item.role };
        if !brings {
            self.facts.history |= !item.ids.is_empty();
            for id in item.ids {
                self.refer(id)?;
            }
        }
        Ok(())
    }

    fn item_scalar(&mut self, slot: Slot, value: Scalar<'_>) -> Result<(), BodyError> {
        match (slot, value) {
            (_, Scalar::Null) => {}
            (Slot::ItemType, Scalar::Str { text, .. }) => {
                self.item.types += 1;
                self.item.carried &= brings_content(text);
                match text {
                    b"input_image" | b"image_generation_call" => self.facts.images += 1,
                    b"input_file" | b"input_audio" => self.unbounded("a file or audio part"),
                    _ => {}
                }
            }
            (Slot::ItemType, _) => return Err(BodyError::Field("type", "a string")),
            (Slot::ItemId, _) if self.item.ids.len() < MAX_REFS => {
                let id = id(value).ok_or(BodyError::Field("id", "an id of at most 128 letters, digits, \"_\" and \"-\""))?;
                self.item.ids.push(id);
            }
            (Slot::ItemId, _) => return Err(BodyError::TooManyReferences),
            (Slot::ItemRole, _) => self.item.role = true,
            (_, Scalar::Str { len, .. }) => self.item.sealed = len > 0,
            _ => {}
        }
        Ok(())
    }
}

impl Visitor for Walk {
    type Error = BodyError;

    fn open(&mut self, object: bool, at: u64) -> Result<(), BodyError> {
        if self.node() == Node::Texts {
            self.facts.texts += 1;
        }
        // The output of a call is one object: a screenshot, perhaps a file.
        let one_part = object && self.node() == Node::Item && self.slot() == Slot::Into(Node::Content);
        let node = if one_part { Node::Part } else { self.enter(object, at)? };
        self.nodes.push((node, Slot::Ignored));
        Ok(())
    }

    fn close(&mut self, _: u64) -> Result<(), BodyError> {
        match self.nodes.pop() {
            Some((Node::Item, _)) => self.end_item(),
            _ => Ok(()),
        }
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), BodyError> {
        let key = key.unwrap_or_default();
        let slot = match self.node() {
            Node::Root => {
                self.facts.root.filled = true;
                self.top_field(key)?
            }
            // Of what is not in the table, only the model at the top is known by its name.
            Node::Anywhere if self.nodes.len() == 1 => {
                self.facts.root.filled = true;
                self.top_field(key)?
            }
            Node::Variables => Slot::Into(Node::Part),
            node => self.inner_key(node, key)?,
        };
        self.set_slot(slot);
        Ok(())
    }

    fn wants(&self) -> usize {
        match self.slot() {
            Slot::Top(Field::Model) => MAX_MODEL,
            Slot::Top(Field::Spoken) => MAX_SPOKEN,
            Slot::Top(Field::History(_) | Field::Container)
            | Slot::Reference(_)
            | Slot::PerhapsReference
            | Slot::ItemId
            | Slot::Into(Node::Anywhere) => MAX_ID,
            Slot::Ignored | Slot::Into(_) | Slot::ItemSealed | Slot::MessageAudio | Slot::Top(Field::Texts) => 0,
            _ => MAX_WORD,
        }
    }

    fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), BodyError> {
        match (self.slot(), value) {
            (Slot::Into(Node::Root), _) => return Err(BodyError::NotAnObject),
            (Slot::Into(Node::Anywhere) | Slot::PerhapsReference, _) => {
                if let Some(id) = id(value).filter(|id| looks_like_object(id)) {
                    self.refer(id)?;
                }
            }
            (Slot::Top(field), _) => return self.top_scalar(field, value, span),
            (Slot::Reference(name), _) => return self.reference(name, value),
            (slot @ (Slot::ItemType | Slot::ItemId | Slot::ItemRole | Slot::ItemSealed), _) => return self.item_scalar(slot, value),
            (Slot::IncludeUsage, Scalar::Bool(asked)) => {
                self.facts.include_usage = asked;
                self.facts.include_usage_span = Some(span);
            }
            (Slot::IncludeUsage, Scalar::Null) => self.facts.include_usage_span = Some(span),
            (Slot::IncludeUsage, _) => return Err(BodyError::Field("stream_options.include_usage", "true or false")),
            (Slot::ThinkingBudget, Scalar::Null) => {}
            (Slot::ThinkingBudget, _) => {
                self.facts.thinking_budget =
                    count(value).ok_or(BodyError::Field("thinking.budget_tokens", "a whole number of at most 1,000,000,000"))?;
            }
            (Slot::ToolType, Scalar::Str { text, .. }) if !runs_at_the_client(self.form, text) => {
                self.unbounded("a tool that runs at the provider");
            }
            (Slot::ToolType, Scalar::Str { text, .. }) if self.is_anthropic() && text != b"custom" => self.facts.added += TOKENS_OF_A_TOOL,
            (Slot::PartType, Scalar::Str { text, .. }) => match text {
                b"image_url" | b"image" | b"input_image" | b"computer_screenshot" => self.facts.images += 1,
                b"input_audio" | b"file" | b"input_file" | b"document" | b"container_upload" | b"video_url" => {
                    self.unbounded("a file or audio part");
                }
                _ => {}
            },
            (Slot::MessageAudio, Scalar::Null) => {}
            (Slot::MessageAudio, _) => self.unbounded("audio"),
            (Slot::SourceType, Scalar::Str { text: b"file", .. }) => self.unbounded("a file or audio part"),
            // Tokens instead of text: the whole list is one text.
            (_, Scalar::Str { .. }) if self.node() == Node::Texts => self.facts.texts += 1,
            _ => {}
        }
        Ok(())
    }
}

/// Items of a Responses request that say everything themselves; their ids are only names. Every other kind with an id
/// may be looked up at the provider.
fn brings_content(kind: &[u8]) -> bool {
    let kind = kind.strip_suffix(b"_output").unwrap_or(kind);
    matches!(
        kind,
        b"message" | b"function_call" | b"custom_tool_call" | b"computer_call" | b"local_shell_call" | b"shell_call" | b"apply_patch_call"
    )
}

/// Tools whose calls the client itself runs; every other kind may cost money at the provider.
fn runs_at_the_client(form: Form, kind: &[u8]) -> bool {
    const KINDS: [&[u8]; 4] = [b"bash_", b"text_editor_", b"computer_", b"memory_"];
    let anthropic = matches!(form, Form::Messages | Form::Count);
    matches!(kind, b"function" | b"custom") || (anthropic && KINDS.iter().any(|k| kind.starts_with(k)))
}

fn governed(key: &[u8], name: &'static str, seen: &mut bool) -> Result<bool, BodyError> {
    if !folds_to(key, name) {
        return Ok(false);
    }
    if *seen || key != name.as_bytes() {
        return Err(BodyError::Ambiguous(name));
    }
    *seen = true;
    Ok(true)
}

fn id(value: Scalar<'_>) -> Option<String> {
    let Scalar::Str { text, len } = value else { return None };
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() as u64 == len && is_id(text))?;
    Some(text.to_owned())
}

fn word(value: Scalar<'_>, name: &'static str) -> Result<Option<String>, BodyError> {
    let Scalar::Str { text, len } = value else { return Ok(None) };
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() as u64 == len);
    text.map(|text| Some(text.to_owned())).ok_or(BodyError::Field(name, "a string of at most 64 bytes"))
}

/// A whole number that some request could mean; beyond, sums of money would leave their type.
fn count(value: Scalar<'_>) -> Option<u64> {
    const MOST: u64 = 1_000_000_000;
    let Scalar::Num(digits) = value else { return None };
    std::str::from_utf8(digits).ok()?.parse().ok().filter(|n| *n <= MOST)
}

/// How many answers are asked for: far more than any provider gives.
fn choices(value: Scalar<'_>) -> Option<u64> {
    count(value).filter(|n| *n <= 1_024)
}

fn if_object(object: bool, node: Node) -> Node {
    if object { node } else { Node::Other }
}

fn if_array(object: bool, node: Node) -> Node {
    if object { Node::Other } else { node }
}
