//! The one form between the dialects: a conversation, its tools and its settings. What is in it points into the caller's
//! document; strings, numbers and schemas are copied from there as they stand.

use crate::translate::doc::Value;
use std::borrow::Cow;
use std::fmt;

/// A request for a chat.
#[derive(Debug, Default)]
pub struct Chat<'d> {
    /// What the caller's dialect calls its fields, for errors.
    pub names: Names,
    /// Instructions, where the provider takes them apart from the conversation. Strings.
    pub system: Vec<Value<'d>>,
    turns: Vec<Turn>,
    parts: Vec<Part<'d>>,
    /// What tools gave, by the ranges in [`ToolResult`]: texts and media.
    given: Vec<Part<'d>>,
    pub tools: Vec<Tool<'d>>,
    pub settings: Settings<'d>,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Names {
    pub max_tokens: &'static str,
    pub stop: &'static str,
    pub effort: &'static str,
    pub one_call: &'static str,
    /// Of a tool, after `tools[i]`.
    pub tool_name: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

/// Parts up to `end`, from where the turn before ends.
#[derive(Debug)]
struct Turn {
    role: Role,
    end: usize,
}

#[derive(Debug)]
pub enum Part<'d> {
    /// A string.
    Text(Value<'d>),
    Media(Media<'d>),
    Call(Call<'d>),
    Result(ToolResult<'d>),
    /// Text and signature: strings.
    Thinking(Value<'d>, Value<'d>),
    Redacted(Value<'d>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Image,
    Audio,
    File,
}

#[derive(Debug)]
pub struct Media<'d> {
    pub kind: Kind,
    pub source: Source<'d>,
    /// A file's name, a string.
    pub name: Option<Value<'d>>,
    pub place: Place,
}

#[derive(Debug)]
pub enum Source<'d> {
    /// Base64, escaped as it stood.
    Data {
        mime: Cow<'d, str>,
        data: &'d str,
    },
    Url(Value<'d>),
}

/// A call of a tool by the model.
#[derive(Debug)]
pub struct Call<'d> {
    pub id: Value<'d>,
    pub name: Value<'d>,
    /// OpenAI's: a string that holds an object. Anthropic's: the object. None: no arguments.
    pub input: Option<Value<'d>>,
    /// Gemini's signature of the thought that led to it, escaped as it stood.
    pub signature: Option<&'d str>,
    pub place: Place,
}

#[derive(Debug)]
pub struct ToolResult<'d> {
    pub id: Value<'d>,
    pub is_error: bool,
    pub place: Place,
    from: usize,
    to: usize,
}

/// Where a part stands in the caller's document.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub list: &'static str,
    pub message: u32,
    pub part: Option<u32>,
    /// Of what a tool gave.
    pub inner: Option<u32>,
    /// What the part is called there when it is in none of the lists by itself.
    pub field: &'static str,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "messages[{}]", self.message)?;
        match (self.part, self.inner) {
            (Some(part), Some(inner)) => write!(f, ".{}[{part}].content[{inner}]", self.list)?,
            (Some(part), None) => write!(f, ".{}[{part}]", self.list)?,
            _ => {}
        }
        f.write_str(self.field)
    }
}

#[derive(Debug)]
pub struct Tool<'d> {
    pub name: Value<'d>,
    pub description: Option<Value<'d>>,
    /// An object, or a boolean: JSON Schema.
    pub schema: Option<Value<'d>>,
    pub is_strict: bool,
    /// Where it stands in the caller's list.
    pub index: usize,
}

#[derive(Debug, Default)]
pub struct Settings<'d> {
    pub stream: bool,
    pub max_tokens: Option<u64>,
    /// Strings.
    pub stops: Vec<Value<'d>>,
    /// Numbers.
    pub temperature: Option<Value<'d>>,
    pub top_p: Option<Value<'d>>,
    pub top_k: Option<Value<'d>>,
    pub seed: Option<Value<'d>>,
    pub presence_penalty: Option<Value<'d>>,
    pub frequency_penalty: Option<Value<'d>>,
    pub choices: Option<u64>,
    pub logprobs: bool,
    pub top_logprobs: Option<Value<'d>>,
    /// Who the caller's own user is: a string.
    pub user: Option<Value<'d>>,
    pub format: Format<'d>,
    pub effort: Option<Effort>,
    pub thinking: Thinking,
    /// Thoughts are to be in the answer.
    pub shows_thoughts: bool,
    pub choice: Choice<'d>,
    /// At most one call of a tool in an answer.
    pub one_call: bool,
}

#[derive(Debug, Default)]
pub enum Format<'d> {
    #[default]
    Text,
    /// Any JSON object.
    Json,
    /// JSON of this schema.
    Schema(Value<'d>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Effort {
    None,
    Minimal,
    Low,
    Medium,
    High,
    XHigh,
    Max,
}

impl Effort {
    const ALL: [(Effort, &'static str); 7] = [
        (Effort::None, "none"),
        (Effort::Minimal, "minimal"),
        (Effort::Low, "low"),
        (Effort::Medium, "medium"),
        (Effort::High, "high"),
        (Effort::XHigh, "xhigh"),
        (Effort::Max, "max"),
    ];

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, own)| *own == name).map(|(effort, _)| *effort)
    }

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(effort, _)| *effort == self).map_or("", |(_, name)| name)
    }

    /// Tokens of thought that this effort stands for, where a model counts them. They are what Google's own endpoint for
    /// OpenAI's dialect takes (ai.google.dev, OpenAI compatibility). None: no number is known for it.
    pub fn budget(self) -> Option<u64> {
        match self {
            Effort::None => Some(0),
            Effort::Minimal | Effort::Low => Some(1024),
            Effort::Medium => Some(8192),
            Effort::High => Some(24_576),
            Effort::XHigh | Effort::Max => None,
        }
    }

    /// The effort whose budget is nearest.
    pub fn of_budget(tokens: u64) -> Self {
        match tokens {
            0..=4096 => Effort::Low,
            4097..=16_384 => Effort::Medium,
            _ => Effort::High,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Thinking {
    #[default]
    Unsaid,
    Off,
    /// As much as the model finds right.
    Free,
    /// At most so many tokens.
    Budget(u64),
}

#[derive(Debug, Clone, Copy, Default)]
pub enum Choice<'d> {
    #[default]
    Unsaid,
    Auto,
    None,
    Any,
    /// The tool of this name, a string.
    Tool(Value<'d>),
}

impl Choice<'_> {
    /// The model has to call a tool.
    pub fn forces(&self) -> bool {
        matches!(self, Choice::Any | Choice::Tool(_))
    }
}

impl<'d> Chat<'d> {
    pub fn new(names: Names) -> Self {
        Chat { names, ..Chat::default() }
    }

    /// Adds to the turn of this role: to the last one, if it is of the same, as providers want them to take turns.
    pub fn push(&mut self, role: Role, part: Part<'d>) {
        self.parts.push(part);
        let end = self.parts.len();
        match self.turns.last_mut() {
            Some(last) if last.role == role => last.end = end,
            _ => self.turns.push(Turn { role, end }),
        }
    }

    /// Adds what a tool gave.
    pub fn push_result(&mut self, id: Value<'d>, is_error: bool, place: Place, given: impl IntoIterator<Item = Part<'d>>) {
        let from = self.given.len();
        self.given.extend(given);
        self.push(Role::User, Part::Result(ToolResult { id, is_error, place, from, to: self.given.len() }));
    }

    pub fn given(&self, result: &ToolResult<'d>) -> &[Part<'d>] {
        self.given.get(result.from..result.to).unwrap_or_default()
    }

    pub fn turns(&self) -> impl Iterator<Item = (Role, &[Part<'d>])> {
        let mut from = 0;
        self.turns.iter().map(move |turn| {
            let start = std::mem::replace(&mut from, turn.end);
            (turn.role, self.parts.get(start..turn.end).unwrap_or_default())
        })
    }
}

/// A string without anything in it: providers refuse such texts, and nothing is lost with them.
pub fn is_empty(text: Value<'_>) -> bool {
    text.inner().unwrap_or_default().is_empty()
}

/// A string with nothing but white space in it.
pub fn is_blank(text: Value<'_>) -> bool {
    // Most show it by their first character.
    if text.inner().is_some_and(|inner| inner.starts_with(|c: char| c != '\\' && !c.is_whitespace())) {
        return false;
    }
    text.str().is_none_or(|text| text.trim().is_empty())
}
