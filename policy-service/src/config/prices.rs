//! Prices of one's own.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a model costs: dollars as text, exact, for a million tokens unless it says otherwise. Needs `input` and `output`, or one of
/// `characters`, `seconds`, `picture`. Prices are all from here; of `context`, `max_output`, `mode` and `reasoning`, what is not said is
/// the price table's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OwnPrice {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2.50")]
    pub input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "10.00")]
    pub output: Option<String>,
    /// Input read from a cache; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_read: Option<String>,
    /// Input written to a cache; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<String>,
    /// Input written to a cache that is kept for an hour; default: `cache_write`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<String>,
    /// Input that is sound; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_input: Option<String>,
    /// Input that is pictures; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_input: Option<String>,
    /// Output that is sound; default: `output`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_output: Option<String>,
    /// Prices of a request whose input is longer than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub long_prompt: Option<LongPrompt>,
    /// For a million characters of text to speak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub characters: Option<String>,
    /// For a million seconds of a recording.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<String>,
    /// For one picture, whatever its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub picture: Option<String>,
    /// Most input tokens that the model takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u64>,
    /// Most output tokens of an answer. A model without one can't be used on a budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_output: Option<u64>,
    /// What it is made for: `chat`, `responses`, `completion`, `embedding`, `moderation`, `image`, `speech` or `transcription`;
    /// default: the price table's, else `chat`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// It thinks in tokens that nobody sees: a stream that is cut is charged in full. Default: the price table's, else `true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<bool>,
}

/// Prices of long prompts, for all tokens of such a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LongPrompt {
    /// Input tokens above which they hold.
    pub above: u64,
    pub input: String,
    pub output: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_read: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<String>,
}
