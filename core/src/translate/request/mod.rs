//! Requests: read from the caller's dialect into one form ([`form`]), and written from it in the provider's. OpenAI's dialect
//! to OpenAI's is a copy with edits ([`copy`]).
//!
//! What becomes of a field that a provider does not have:
//!
//! | field | what is done |
//! |---|---|
//! | `stream_options`, `metadata`, `prompt_cache_*`, `cache_control` of Anthropic's callers, an image's `detail`, `annotations` and `reasoning_content` that come back, `eager_input_streaming` | left out: they change cost or form, not what is asked |
//! | `store: false`, `service_tier: auto, default` (Anthropic: `auto, standard_only`), `verbosity: medium`, `modalities: ["text"]`, `n: 1`, a penalty of 0, `logprobs: false`, an empty `logit_bias`, a `temperature` or `top_p` of 1 at Anthropic's | left out: they ask for what happens anyway |
//! | `user`, `safety_identifier` | `metadata.user_id`; Gemini has none, and the answer is the same without |
//! | a system message in the middle | joined to the instructions at the top; OpenAI's dialect keeps its place |
//! | `json_object` at Anthropic's | an instruction |
//! | `is_error` | Gemini: `{"error": ...}`; OpenAI: the text begins with `Error: ` |
//! | empty texts and turns; for Anthropic those of white space alone | left out: they are refused, and say nothing |
//! | an id of a call with letters that Anthropic refuses | their numbers instead, at the call and its result |
//! | everything else, and every field that is not known here | an error that names it, or left out where the route says so |

mod copy;
mod embeddings;
mod form;
mod models;
mod read;
mod write;

use super::doc::{Doc, Kind, Unreadable, Value};
use crate::operation::{Dialect, Form};
use std::fmt;

/// What a request is translated under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms<'a> {
    /// The caller's endpoint: [`Form::Chat`], [`Form::Messages`] or [`Form::Embeddings`].
    pub form: Form,
    /// The provider's dialect.
    pub to: Dialect,
    /// Of OpenAI's dialect: the provider knows its newest fields (OpenAI itself, Azure). Other servers get the older names.
    pub is_newest: bool,
    /// The provider's name of the model.
    pub model: &'a str,
    /// Output tokens that were admitted, for each choice: no limit goes higher, and it is written where the caller set none.
    pub max_tokens: Option<u64>,
    /// Most output tokens of the model, for dialects that require a limit.
    pub max_output: Option<u64>,
    /// `"store": false` is written, where the provider knows it.
    pub no_store: bool,
    /// `"service_tier": "default"` is written where the caller leaves it open, and the provider knows it.
    pub list_price: bool,
    /// What the provider can't do is left out; otherwise it is an error.
    pub drops: bool,
}

/// Why a request can't be translated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Untranslatable {
    /// The provider can't do what this field asks for; the second says what of it.
    Unsupported(String, String),
    /// The field has a value that the caller's dialect does not know.
    Invalid(String, String),
    /// It has more values than this worker reads.
    TooComplex,
}

impl Untranslatable {
    /// In words for the caller.
    pub fn message(&self) -> String {
        match self {
            Untranslatable::Unsupported(field, why) => format!("\"{field}\" is not supported by this model's provider: {why}"),
            Untranslatable::Invalid(field, why) => format!("\"{field}\": {why}"),
            Untranslatable::TooComplex => "the request has too many parts to be translated for this model's provider".to_owned(),
        }
    }
}

/// Most values that a request may have which is translated: an index of them is kept while that goes on, 28 bytes for each.
pub const MAX_VALUES: usize = 200_000;

/// A request body in the provider's dialect. `body` is what the gate has read: JSON, an object.
pub fn translate(body: &[u8], terms: &Terms<'_>) -> Result<String, Untranslatable> {
    let doc = Doc::read(body, MAX_VALUES).map_err(|unreadable| match unreadable {
        Unreadable::Json(error) => Untranslatable::Invalid("body".to_owned(), error.message()),
        Unreadable::TooManyValues => Untranslatable::TooComplex,
    })?;
    let root = doc.root();
    let mut problems = Problems { drops: terms.drops, first: None };
    let p = &mut problems;
    if root.kind() != Kind::Object {
        p.invalid("body", "must be a JSON object");
        return problems.or(String::new());
    }
    let out = match (terms.form, terms.to) {
        (Form::Chat | Form::Embeddings, Dialect::OpenAi) => copy::write(root, terms, p),
        (Form::Embeddings, Dialect::Gemini) => embeddings::write(root, terms, p),
        (Form::Chat, Dialect::Anthropic) => {
            let chat = read::openai(root, terms, p);
            write::anthropic(&chat, terms, body.len(), p)
        }
        (Form::Chat, Dialect::Gemini) => {
            let chat = read::openai(root, terms, p);
            write::gemini(&chat, terms, body.len(), p)
        }
        (Form::Messages, Dialect::OpenAi) => {
            let chat = read::anthropic(root, terms, p);
            write::openai(&chat, terms, body.len(), p)
        }
        (Form::Messages, Dialect::Gemini) => {
            let chat = read::anthropic(root, terms, p);
            write::gemini(&chat, terms, body.len(), p)
        }
        _ => {
            // Not for the route to leave out: nothing would be left.
            p.keep(Untranslatable::Unsupported("model".to_owned(), "it has no endpoint of this kind".to_owned()));
            String::new()
        }
    };
    problems.or(out)
}

/// What was found that can't go on: the first of it is the answer, if there is any.
struct Problems {
    drops: bool,
    first: Option<Untranslatable>,
}

impl Problems {
    fn keep(&mut self, problem: Untranslatable) {
        self.first.get_or_insert(problem);
    }

    /// The provider can't do it: it is left out where the route says so.
    fn unsupported(&mut self, field: impl fmt::Display, why: impl fmt::Display) {
        if !self.drops && self.first.is_none() {
            self.keep(Untranslatable::Unsupported(field.to_string(), why.to_string()));
        }
    }

    /// The caller's dialect does not know it.
    fn invalid(&mut self, field: impl fmt::Display, why: impl fmt::Display) {
        if self.first.is_none() {
            self.keep(Untranslatable::Invalid(field.to_string(), why.to_string()));
        }
    }

    fn or(self, out: String) -> Result<String, Untranslatable> {
        self.first.map_or(Ok(out), Err)
    }

    /// The members of an object by these names, none where one is null. Others are unsupported, but for those in `ignored`.
    fn fields<'d, const N: usize>(
        &mut self,
        object: Value<'d>,
        at: fmt::Arguments<'_>,
        names: [&str; N],
        ignored: &[&str],
    ) -> [Option<Value<'d>>; N] {
        let mut found = [None; N];
        if object.kind() != Kind::Object {
            self.invalid(at, "must be an object");
        }
        let dot = if at.as_str() == Some("") { "" } else { "." };
        for (key, value) in object.members() {
            let slot = names.iter().position(|name| *name == key).and_then(|at| found.get_mut(at));
            match slot {
                Some(slot) => *slot = (!value.is_null()).then_some(value),
                None if value.is_null() || ignored.contains(&key.as_ref()) => {}
                None => self.unsupported(format_args!("{at}{dot}{key}"), "it has nothing like it"),
            }
        }
        found
    }

    /// A value of this kind, or an error.
    fn of_kind<'d>(&mut self, value: Option<Value<'d>>, kind: Kind, at: impl fmt::Display) -> Option<Value<'d>> {
        let value = value?;
        if value.kind() == kind {
            return Some(value);
        }
        let what = match kind {
            Kind::Object => "an object",
            Kind::Array => "a list",
            Kind::Str => "a string",
            Kind::Number => "a number",
            Kind::Bool => "true or false",
            Kind::Null => "null",
        };
        self.invalid(at, format_args!("must be {what}"));
        None
    }

    /// As [`Problems::of_kind`], where there must be one.
    fn required<'d>(&mut self, value: Option<Value<'d>>, kind: Kind, at: impl fmt::Display) -> Option<Value<'d>> {
        if value.is_none() {
            self.invalid(at, "is required");
            return None;
        }
        self.of_kind(value, kind, at)
    }

    fn bool(&mut self, value: Option<Value<'_>>, at: impl fmt::Display) -> Option<bool> {
        self.of_kind(value, Kind::Bool, at)?.bool()
    }

    /// A whole number of at least `least`.
    fn count(&mut self, value: Option<Value<'_>>, least: u64, at: impl fmt::Display) -> Option<u64> {
        let value = value?;
        let count = value.integer().and_then(|n| u64::try_from(n).ok()).filter(|n| *n >= least);
        if count.is_none() {
            self.invalid(at, format_args!("must be a whole number of at least {least}"));
        }
        count
    }
}

/// The lower of the caller's own limit and the one that was admitted.
fn limit(own: Option<u64>, terms: &Terms<'_>) -> Option<u64> {
    match (own, terms.max_tokens) {
        (Some(own), Some(admitted)) => Some(own.min(admitted)),
        (own, admitted) => own.or(admitted),
    }
}

/// A number's value; only for comparing it.
fn float(value: Value<'_>) -> f64 {
    value.raw().parse().unwrap_or(f64::NAN)
}
