//! What every provider has a wording of its own for.

use crate::compatible::{self, Flavour};
use crate::directive::Directive;
use crate::limits::Exceeded;
use crate::openai;
use crate::provider::{ApiError, Provider};
use crate::{anthropic, azure, gemini};

impl Provider {
    /// A secret that isn't known. `bearer` is whether it came as one.
    pub fn bad_key(self, secret: &str, bearer: bool) -> ApiError {
        match self {
            Provider::Openai => openai::error::bad_key(secret),
            Provider::Anthropic => anthropic::error::bad_key(bearer),
            Provider::Gemini => gemini::error::bad_key(),
            Provider::Azure => azure::bad_key(),
            Provider::Compatible => compatible::bad_key(),
        }
    }

    pub fn missing_key(self) -> ApiError {
        match self {
            Provider::Openai => openai::error::missing_key(),
            Provider::Anthropic => anthropic::error::missing_key(),
            Provider::Gemini => gemini::error::missing_key(),
            Provider::Azure => azure::bad_key(),
            Provider::Compatible => compatible::bad_key(),
        }
    }

    pub fn forbidden(self) -> ApiError {
        match self {
            Provider::Openai | Provider::Compatible => openai::error::forbidden(),
            Provider::Anthropic => anthropic::error::forbidden(),
            Provider::Gemini => gemini::error::forbidden(),
            Provider::Azure => azure::forbidden(),
        }
    }

    pub fn insufficient_quota(self) -> ApiError {
        match self {
            Provider::Openai | Provider::Azure => openai::error::insufficient_quota(),
            Provider::Anthropic => anthropic::error::insufficient_quota(),
            Provider::Gemini => gemini::error::exhausted(),
            Provider::Compatible => compatible::insufficient_quota(),
        }
    }

    pub fn overloaded(self) -> ApiError {
        match self {
            Provider::Openai | Provider::Compatible => openai::error::overloaded(),
            Provider::Anthropic => anthropic::error::overloaded(),
            Provider::Gemini => gemini::error::overloaded(),
            Provider::Azure => azure::overloaded(),
        }
    }

    pub fn rate_limited(self, model: &str, exceeded: Exceeded) -> ApiError {
        match self {
            Provider::Openai | Provider::Compatible => openai::error::rate_limited(model, exceeded),
            Provider::Anthropic => anthropic::error::rate_limited(exceeded.what, exceeded.limit, exceeded.wait_ms),
            Provider::Gemini => gemini::error::rate_limited(model, exceeded),
            Provider::Azure => azure::rate_limited(exceeded.what, exceeded.wait_ms),
        }
    }

    pub fn model_not_found(self, name: &str) -> ApiError {
        match self {
            Provider::Openai => openai::error::model_not_found(name),
            Provider::Anthropic => anthropic::error::model_not_found(name),
            Provider::Gemini => gemini::error::model_not_found(name, "generateContent"),
            Provider::Azure => azure::deployment_not_found(),
            Provider::Compatible => compatible::model_not_found(name),
        }
    }

    pub fn unknown_url(self, method: &str, path: &str) -> ApiError {
        match self {
            Provider::Openai => openai::error::unknown_url(method, path),
            Provider::Anthropic => anthropic::error::unknown_url(),
            Provider::Gemini => gemini::error::unknown_url(),
            Provider::Azure => azure::not_found(),
            Provider::Compatible => compatible::unknown_url(method, path),
        }
    }

    /// The error that a script asks for. `model` is its name and that of its snapshot.
    pub fn scripted(self, script: &Directive, secret: &str, model: (&str, &str)) -> Option<ApiError> {
        match self {
            Provider::Openai | Provider::Compatible => openai::error::scripted(script, secret, model),
            Provider::Anthropic => anthropic::error::scripted(script, model.0),
            Provider::Gemini => gemini::error::scripted(script, model.0),
            Provider::Azure => azure::scripted(script, secret, model),
        }
    }

    /// The error of a prompt that may not be answered; none where the answer itself says so.
    pub fn blocked(self) -> Option<ApiError> {
        match self {
            Provider::Openai | Provider::Compatible => Some(openai::error::blocked()),
            Provider::Azure => Some(azure::blocked()),
            Provider::Anthropic | Provider::Gemini => None,
        }
    }

    pub fn error_body(self, error: &ApiError, request_id: &str, flavour: Flavour) -> String {
        match self {
            Provider::Openai => openai::error::body(error),
            Provider::Anthropic => anthropic::error::body(error, request_id),
            Provider::Gemini => gemini::error::body(error),
            Provider::Azure => azure::body(error),
            Provider::Compatible => compatible::body(error, flavour),
        }
    }

    /// The event in place of the second half of a stream.
    pub fn failure_event(self, request_id: &str, flavour: Flavour) -> String {
        match self {
            Provider::Openai | Provider::Azure => openai::error::event(&openai::error::server_error()),
            Provider::Compatible => format!("data: {}\n\n", compatible::body(&openai::error::server_error(), flavour)),
            Provider::Anthropic => anthropic::error::event(&anthropic::error::overloaded(), request_id),
            Provider::Gemini => format!("data: {}\r\n\r\n", gemini::error::body(&gemini::error::overloaded())),
        }
    }
}
