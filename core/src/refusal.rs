//! Refusals: one code each, answered in the dialect of the endpoint that was called.

use crate::operation::Dialect;
use serde::{Deserialize, Serialize};

/// A client that has to wait longer gives up: SDKs take no longer `retry-after` than this.
const LONGEST_RETRY_MS: u64 = 60_000;

/// Why a request is refused. The names are part of the interface (`x-keyward-reason`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    MissingKey,
    UnknownKey,
    Revoked,
    Expired,
    ModelNotAllowed,
    EndpointNotAllowed,
    StateNotOwned,
    UnknownProvider,
    UnknownModel,
    BadRequest,
    UnboundedInput,
    BodyTooLarge,
    CapExhausted,
    CapReserved,
    QuotaExhausted,
    RateLimited,
    ConcurrencyLimited,
    PoolExhausted,
    ProviderCredentialRejected,
    ProviderUnreachable,
    PolicyUnavailable,
    AuditUnavailable,
}

impl Code {
    /// Every code there is.
    pub const ALL: [Code; 22] = [
        Code::MissingKey,
        Code::UnknownKey,
        Code::Revoked,
        Code::Expired,
        Code::ModelNotAllowed,
        Code::EndpointNotAllowed,
        Code::StateNotOwned,
        Code::UnknownProvider,
        Code::UnknownModel,
        Code::BadRequest,
        Code::UnboundedInput,
        Code::BodyTooLarge,
        Code::CapExhausted,
        Code::CapReserved,
        Code::QuotaExhausted,
        Code::RateLimited,
        Code::ConcurrencyLimited,
        Code::PoolExhausted,
        Code::ProviderCredentialRejected,
        Code::ProviderUnreachable,
        Code::PolicyUnavailable,
        Code::AuditUnavailable,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Code::MissingKey => "missing_key",
            Code::UnknownKey => "unknown_key",
            Code::Revoked => "revoked",
            Code::Expired => "expired",
            Code::ModelNotAllowed => "model_not_allowed",
            Code::EndpointNotAllowed => "endpoint_not_allowed",
            Code::StateNotOwned => "state_not_owned",
            Code::UnknownProvider => "unknown_provider",
            Code::UnknownModel => "unknown_model",
            Code::BadRequest => "bad_request",
            Code::UnboundedInput => "unbounded_input",
            Code::BodyTooLarge => "body_too_large",
            Code::CapExhausted => "cap_exhausted",
            Code::CapReserved => "cap_reserved",
            Code::QuotaExhausted => "quota_exhausted",
            Code::RateLimited => "rate_limited",
            Code::ConcurrencyLimited => "concurrency_limited",
            Code::PoolExhausted => "pool_exhausted",
            Code::ProviderCredentialRejected => "provider_credential_rejected",
            Code::ProviderUnreachable => "provider_unreachable",
            Code::PolicyUnavailable => "policy_unavailable",
            Code::AuditUnavailable => "audit_unavailable",
        }
    }

    /// The code of this name.
    pub fn named(name: &str) -> Option<Self> {
        Code::ALL.into_iter().find(|code| code.name() == name)
    }

    pub fn status(self) -> u16 {
        match self {
            Code::MissingKey | Code::UnknownKey | Code::Revoked | Code::Expired => 401,
            Code::ModelNotAllowed | Code::EndpointNotAllowed | Code::StateNotOwned => 403,
            Code::UnknownProvider | Code::UnknownModel => 404,
            Code::BadRequest | Code::UnboundedInput => 400,
            Code::BodyTooLarge => 413,
            Code::CapExhausted
            | Code::CapReserved
            | Code::QuotaExhausted
            | Code::RateLimited
            | Code::ConcurrencyLimited
            | Code::PoolExhausted => 429,
            Code::ProviderCredentialRejected => 502,
            Code::ProviderUnreachable | Code::PolicyUnavailable | Code::AuditUnavailable => 503,
        }
    }

    /// Whether a key in shadow mode passes all the same: who it is and what it owns are checked for everybody.
    pub fn is_forgiven_in_shadow(self) -> bool {
        matches!(
            self,
            Code::ModelNotAllowed
                | Code::EndpointNotAllowed
                | Code::UnboundedInput
                | Code::CapExhausted
                | Code::CapReserved
                | Code::QuotaExhausted
                | Code::RateLimited
                | Code::ConcurrencyLimited
        )
    }
}

/// A refusal, as the policy service or the gate states it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: Code,
    pub message: String,
    /// Milliseconds until a retry can help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headroom: Option<Box<Headroom>>,
}

/// What the tightest limits per minute have left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Headroom {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Room>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Room>,
}

/// What one limit per minute has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    pub limit: u64,
    pub remaining: u64,
    /// Milliseconds until all of it is there again.
    pub reset_ms: u64,
}

impl Headroom {
    /// `x-ratelimit-*`, in the form in which OpenAI gives them.
    pub fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        let of = |room: Option<Room>, names: [&'static str; 3]| {
            let values = room.map(|room| [room.limit.to_string(), room.remaining.to_string(), duration(room.reset_ms)]);
            values.into_iter().flat_map(move |values| names.into_iter().zip(values))
        };
        let requests = ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
        let tokens = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
        of(self.requests, requests).chain(of(self.tokens, tokens))
    }
}

/// `120ms`, `6s`, `1m0s`.
fn duration(ms: u64) -> String {
    let seconds = ms.div_ceil(1_000);
    match (ms, seconds) {
        (0..1_000, _) => format!("{ms}ms"),
        (_, 0..60) => format!("{seconds}s"),
        _ => format!("{}m{}s", seconds / 60, seconds % 60),
    }
}

/// A whole answer to the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: String,
}

impl Refusal {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Refusal { code, message: message.into(), retry_after_ms: None, headroom: None }
    }

    pub fn retry_after(self, seconds: u64) -> Self {
        self.retry_after_ms(seconds.saturating_mul(1_000))
    }

    pub fn retry_after_ms(mut self, ms: u64) -> Self {
        self.retry_after_ms = Some(ms);
        self
    }

    /// Whether the same request may succeed soon without anybody changing anything.
    fn retry_can_help(&self) -> bool {
        matches!(self.code, Code::PolicyUnavailable | Code::AuditUnavailable)
            || self.retry_after_ms.is_some_and(|ms| ms <= LONGEST_RETRY_MS)
    }

    /// The answer in the caller's dialect.
    pub fn answer(&self, dialect: Dialect, request_id: &str) -> Answer {
        let mut headers = vec![
            ("content-type", "application/json".to_owned()),
            ("x-keyward-reason", self.code.name().to_owned()),
            ("x-keyward-request-id", request_id.to_owned()),
        ];
        if let Some(ms) = self.retry_after_ms {
            headers.push(("retry-after", ms.div_ceil(1_000).max(1).to_string()));
            headers.push(("retry-after-ms", ms.max(1).to_string()));
        }
        headers.extend(self.headroom.iter().flat_map(|headroom| headroom.headers()));
        if !self.retry_can_help() {
            headers.push(("x-should-retry", "false".to_owned()));
        }
        let body = match dialect {
            Dialect::OpenAi | Dialect::Gemini => serde_json::json!({ "error": {
                "message": self.message, "type": self.openai_type(), "param": null, "code": self.code.name(),
            } }),
            Dialect::Anthropic => serde_json::json!({ "type": "error", "error": {
                "type": self.anthropic_type(), "message": self.message,
            }, "request_id": request_id }),
        };
        Answer { status: self.code.status(), headers, body: body.to_string() }
    }

    fn openai_type(&self) -> &'static str {
        match self.code {
            Code::CapExhausted | Code::CapReserved | Code::QuotaExhausted => "insufficient_quota",
            _ if self.code.status() == 429 => "rate_limit_error",
            _ if self.code.status() >= 500 => "server_error",
            _ => "invalid_request_error",
        }
    }

    fn anthropic_type(&self) -> &'static str {
        match self.code.status() {
            400 => "invalid_request_error",
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            _ => "api_error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn the_name_on_the_wire_is_the_name_in_the_header() {
        for code in [Code::MissingKey, Code::EndpointNotAllowed, Code::StateNotOwned, Code::ProviderCredentialRejected, Code::CapReserved] {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{}\"", code.name()));
        }
    }

    /// A code that is missing from the list would have no metric until its first refusal, and no alert on that one.
    #[test]
    fn all_codes_are_listed() {
        let known = serde_json::from_str::<Code>("\"none\"").unwrap_err().to_string();
        let known: Vec<&str> = known.split('`').skip(3).step_by(2).collect();
        assert_eq!(known, Code::ALL.map(Code::name));
        assert!(Code::ALL.iter().all(|code| Code::named(code.name()) == Some(*code)) && Code::named("none").is_none());
    }

    #[test]
    fn each_dialect_has_its_own_error_object() {
        let refusal = Refusal::new(Code::CapReserved, "held").retry_after(3);
        let answer = refusal.answer(Dialect::OpenAi, "req_1");
        assert_eq!(answer.status, 429);
        assert_eq!(answer.body, r#"{"error":{"code":"cap_reserved","message":"held","param":null,"type":"insufficient_quota"}}"#);
        assert!(answer.headers.contains(&("retry-after", "3".to_owned())) && !answer.headers.iter().any(|(n, _)| *n == "x-should-retry"));
        let answer = Refusal::new(Code::Revoked, "gone").answer(Dialect::Anthropic, "req_1");
        assert_eq!(answer.body, r#"{"error":{"message":"gone","type":"authentication_error"},"request_id":"req_1","type":"error"}"#);
        assert!(answer.headers.contains(&("x-should-retry", "false".to_owned())));
    }
}
