//! Errors as Anthropic words them.

use crate::directive::Directive;
use crate::provider::ApiError;
use crate::text::quoted;

pub fn body(error: &ApiError, request_id: &str) -> String {
    format!(
        r#"{{"type":"error","error":{{"type":{},"message":{}}},"request_id":{}}}"#,
        quoted(&error.kind),
        quoted(&error.message),
        quoted(request_id),
    )
}

/// The error event of a stream that fails after its 200.
pub fn event(error: &ApiError, request_id: &str) -> String {
    format!("event: error\ndata: {}\n\n", body(error, request_id))
}

pub fn missing_key() -> ApiError {
    ApiError::new(401, "authentication_error", "x-api-key header is required")
}

pub fn bad_key(bearer: bool) -> ApiError {
    ApiError::new(401, "authentication_error", if bearer { "Invalid bearer token" } else { "invalid x-api-key" })
}

pub fn forbidden() -> ApiError {
    ApiError::new(403, "permission_error", "Your API key does not have permission to use the specified resource.")
}

pub fn insufficient_quota() -> ApiError {
    ApiError::invalid(
        "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to upgrade or \
         purchase credits.",
    )
}

/// `what` is `requests` or `tokens`; `wait_ms` is how long until the window turns.
pub fn rate_limited(what: &'static str, limit: u64, wait_ms: u64) -> ApiError {
    let message = format!(
        "This request would exceed your organization's rate limit of {limit} {what} per minute. For details, refer to: \
         https://docs.claude.com/en/api/rate-limits."
    );
    ApiError::new(429, "rate_limit_error", message).retry_after_ms(Some(wait_ms))
}

pub fn overloaded() -> ApiError {
    ApiError::new(529, "overloaded_error", "Overloaded")
}

pub fn model_not_found(model: &str) -> ApiError {
    ApiError::new(404, "not_found_error", format!("model: {model}"))
}

pub fn unknown_url() -> ApiError {
    ApiError::new(404, "not_found_error", "Not found")
}

/// The error a script asks for.
pub fn scripted(directive: &Directive, model: &str) -> Option<ApiError> {
    let status = match (directive.status, directive.error.as_deref()) {
        (Some(status), _) => status,
        (None, Some("authentication_error")) => 401,
        (None, Some("billing_error")) => 402,
        (None, Some("permission_error")) => 403,
        (None, Some("not_found_error")) => 404,
        (None, Some("request_too_large")) => 413,
        (None, Some("rate_limit_error")) => 429,
        (None, Some("api_error")) => 500,
        (None, Some("timeout_error")) => 504,
        (None, Some("overloaded_error")) => 529,
        (None, Some(_)) => 400,
        (None, None) => return None,
    };
    let retry_after_ms = directive.retry_after.map(|seconds| seconds.saturating_mul(1000));
    let mut error = match (status, directive.error.as_deref()) {
        (_, Some("insufficient_quota")) => insufficient_quota(),
        (_, Some(kind)) => ApiError::new(status, kind.to_owned(), "Scripted error."),
        (401, _) => bad_key(false),
        (402, _) => ApiError::new(402, "billing_error", "Your account has a billing issue."),
        (403, _) => forbidden(),
        (404, _) => model_not_found(model),
        (413, _) => ApiError::new(413, "request_too_large", "Request exceeds the maximum size"),
        (429, _) => rate_limited("requests", 50, retry_after_ms.unwrap_or(1000)),
        (504, _) => ApiError::new(504, "timeout_error", "Request timed out"),
        (529, _) => overloaded(),
        (500.., _) => ApiError::new(500, "api_error", "Internal server error"),
        _ => ApiError::invalid("Scripted error."),
    };
    error.status = if directive.status.is_none() { error.status } else { status };
    error.retry_after_ms = retry_after_ms;
    Some(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_is_exact() {
        assert_eq!(
            body(&bad_key(false), "req_1"),
            r#"{"type":"error","error":{"type":"authentication_error","message":"invalid x-api-key"},"request_id":"req_1"}"#
        );
        assert_eq!(
            event(&overloaded(), "req_1"),
            "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"},\
             \"request_id\":\"req_1\"}\n\n"
        );
    }
}
