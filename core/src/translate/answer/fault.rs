//! Errors: read from any provider, written in either dialect.

use super::Terms;
use crate::operation::Dialect;
use crate::translate::doc::{Doc, Kind, Value};
use crate::translate::write::Writer;
use crate::verdict::{State, verdict};

/// More of an error's body is not read as JSON.
const MAX_VALUES: usize = 10_000;

/// An error as the caller is to see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub status: u16,
    pub message: String,
    pub code: Option<String>,
    pub param: Option<String>,
}

impl Fault {
    /// One of ours: the provider's answer is not what it should be.
    pub fn provider(message: &str) -> Self {
        Fault { status: 502, message: message.to_owned(), code: Some("provider_error".to_owned()), param: None }
    }

    pub fn cut() -> Self {
        Fault { code: Some("provider_stream_cut".to_owned()), ..Fault::provider("the provider's stream ended before the answer was whole") }
    }

    /// Of an answer with a status that is no success.
    pub fn read(status: u16, body: &[u8]) -> Self {
        let says = verdict(status, &[], body, 0).map(|verdict| verdict.state);
        let document = Doc::read(body, MAX_VALUES).ok();
        let error = document.as_ref().map(|document| error_of(document.root()));
        let message = error.and_then(message_of).unwrap_or_else(|| format!("the provider answered with status {status}"));
        let own = |name| error.and_then(|error| error.get(name)).and_then(Value::str).map(std::borrow::Cow::into_owned);
        let (param, own_code) = (own("param"), own("code"));
        let fault = |status, code: Option<&str>| Fault { status, message: message.clone(), code: code.map(str::to_owned), param: None };
        match (status, says) {
            // What the provider says of our key is not for the caller.
            (401, _) | (400, Some(State::Rejected)) => Fault {
                message: "the provider does not accept the credential that this request was sent with".to_owned(),
                ..fault(502, Some("provider_credential_rejected"))
            },
            (403, Some(State::Rejected)) => Fault {
                message: "the provider does not let the credential that this request was sent with do this".to_owned(),
                ..fault(403, Some("provider_permission_denied"))
            },
            (402, _) | (_, Some(State::Exhausted)) => fault(429, Some("insufficient_quota")),
            (429, _) => fault(429, Some("rate_limit_exceeded")),
            (529, _) => fault(503, Some("overloaded")),
            (500 | 502..=504, _) => fault(status, own_code.as_deref()),
            // Codes that are numbers or Google's words are none of OpenAI's, and are no strings or no codes there.
            (400..=499, _) => Fault { param, ..fault(status, own_code.as_deref()) },
            _ => fault(502, own_code.as_deref()),
        }
    }

    /// Of an error in an answer that began as a success; `None` if it is none.
    pub fn within(root: Value<'_>) -> Option<Self> {
        let error = root.get("error").or_else(|| root.is_error().then_some(root))?;
        Some(Fault::read(status_of(error), root.raw().as_bytes()))
    }

    pub fn openai(&self) -> String {
        let kind = match self.code.as_deref() {
            Some("insufficient_quota") => "insufficient_quota",
            _ if self.status == 429 => "rate_limit_error",
            _ if self.status >= 500 => "server_error",
            _ => "invalid_request_error",
        };
        let mut w = Writer::with_capacity(self.message.len() + 100);
        w.object(|w| {
            w.key("error").object(|w| {
                w.key("message").str(&self.message);
                w.key("type").str(kind);
                or_null(w.key("param"), self.param.as_deref());
                or_null(w.key("code"), self.code.as_deref());
            });
        });
        w.into_string()
    }

    pub fn anthropic(&self) -> String {
        let kind = match self.status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            504 => "timeout_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        };
        let mut w = Writer::with_capacity(self.message.len() + 100);
        w.object(|w| {
            w.key("type").str("error");
            w.key("error").object(|w| {
                w.key("type").str(kind);
                w.key("message").str(&self.message);
                if let Some(code) = &self.code {
                    w.key("code").str(code);
                }
            });
        });
        w.into_string()
    }

    pub fn body(&self, terms: &Terms) -> String {
        if terms.to == Dialect::Anthropic { self.anthropic() } else { self.openai() }
    }
}

impl Value<'_> {
    /// `{"type":"error","code":..,"message":..}`, without an object of its own.
    fn is_error(self) -> bool {
        let says = |name| self.get(name).is_some_and(|kind| kind.is("error"));
        (says("type") || says("object")) && self.get("message").is_some()
    }
}

fn or_null(w: &mut Writer, text: Option<&str>) {
    match text {
        Some(text) => w.str(text),
        None => w.null(),
    }
}

/// The error in a document: Google wraps it in an array at times, some servers leave `error` out.
fn error_of(root: Value<'_>) -> Value<'_> {
    let root = root.items().next().unwrap_or(root);
    root.get("error").unwrap_or(root)
}

fn message_of(error: Value<'_>) -> Option<String> {
    let text = match error.kind() {
        Kind::Str => error.str(),
        _ => error.get("message").or_else(|| error.get("detail")).and_then(Value::str),
    };
    text.filter(|text| !text.is_empty()).map(std::borrow::Cow::into_owned)
}

/// The status that an error would have had, had it come before the answer began.
fn status_of(error: Value<'_>) -> u16 {
    let number = |name| error.get(name).and_then(Value::integer).and_then(|code| u16::try_from(code).ok());
    if let Some(code @ 400..=599) = number("code").or_else(|| number("status")) {
        return code;
    }
    let words = ["code", "type", "status"].into_iter().filter_map(|name| error.get(name).and_then(Value::str));
    let known = words.filter_map(|word| {
        Some(match word.as_ref() {
            "content_filter" | "context_length_exceeded" | "invalid_request_error" | "INVALID_ARGUMENT" => 400,
            "authentication_error" | "invalid_api_key" | "UNAUTHENTICATED" => 401,
            "billing_error" => 402,
            "permission_error" | "PERMISSION_DENIED" => 403,
            "not_found_error" | "model_not_found" | "NOT_FOUND" => 404,
            "request_too_large" => 413,
            "rate_limit_error" | "rate_limit_exceeded" | "insufficient_quota" | "RESOURCE_EXHAUSTED" => 429,
            "overloaded_error" => 529,
            "UNAVAILABLE" => 503,
            "timeout_error" | "DEADLINE_EXCEEDED" => 504,
            _ => return None,
        })
    });
    known.into_iter().next().unwrap_or(500)
}
