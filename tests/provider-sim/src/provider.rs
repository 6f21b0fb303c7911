//! The providers and the error that all dialects are rendered from.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    Openai,
    Anthropic,
    /// Google's Generative Language API.
    Gemini,
    /// OpenAI's models as Azure sells them.
    Azure,
    /// A server of somebody else that speaks OpenAI's chat: Groq, Mistral, OpenRouter, vLLM and so on.
    Compatible,
}

/// An error before it takes a provider's shape. Where a dialect has no `type`, `code` or `param`, its `error` module says what
/// they mean to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: u16,
    pub kind: Cow<'static, str>,
    pub code: Option<Cow<'static, str>>,
    pub param: Option<String>,
    pub message: String,
    /// When to try again, for the headers.
    pub retry_after_ms: Option<u64>,
}

impl ApiError {
    pub fn new(status: u16, kind: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        ApiError { status, kind: kind.into(), code: None, param: None, message: message.into(), retry_after_ms: None }
    }

    /// 400 `invalid_request_error`, which both providers have.
    pub fn invalid(message: impl Into<String>) -> Self {
        ApiError::new(400, "invalid_request_error", message)
    }

    pub fn code(self, code: impl Into<Cow<'static, str>>) -> Self {
        ApiError { code: Some(code.into()), ..self }
    }

    pub fn param(self, param: impl Into<String>) -> Self {
        ApiError { param: Some(param.into()), ..self }
    }

    pub fn retry_after_ms(self, retry_after_ms: Option<u64>) -> Self {
        ApiError { retry_after_ms, ..self }
    }
}
