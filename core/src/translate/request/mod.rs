//! Requests: read from the caller's dialect, written in the provider's.

use crate::operation::{Dialect, Form};

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
    let _ = (body, terms);
    Err(Untranslatable::TooComplex)
}
