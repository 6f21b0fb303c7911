//! What Azure adds to OpenAI's dialect: deployments in the path, filters in the answers, short errors of its own.

use crate::directive::Directive;
use crate::openai;
use crate::provider::ApiError;
use crate::text::quoted;

/// The type of an error that has only code and message.
const SHORT: &str = "azure";

/// What each part of an answer says of its filters.
pub const PASSED: &str = concat!(
    r#"{"hate":{"filtered":false,"severity":"safe"},"protected_material_code":{"filtered":false,"detected":false},"#,
    r#""protected_material_text":{"filtered":false,"detected":false},"self_harm":{"filtered":false,"severity":"safe"},"#,
    r#""sexual":{"filtered":false,"severity":"safe"},"violence":{"filtered":false,"severity":"safe"}}"#
);
/// What an answer says of the filters of its prompt.
pub const PROMPT_PASSED: &str = concat!(
    r#"[{"prompt_index":0,"content_filter_results":{"hate":{"filtered":false,"severity":"safe"},"jailbreak":{"filtered":false,"detected":false},"#,
    r#""self_harm":{"filtered":false,"severity":"safe"},"sexual":{"filtered":false,"severity":"safe"},"#,
    r#""violence":{"filtered":false,"severity":"safe"}}}]"#
);

const INNER: &str = concat!(
    r#""status":400,"innererror":{"code":"ResponsibleAIPolicyViolation","content_filter_result":{"hate":{"filtered":false,"severity":"safe"},"#,
    r#""jailbreak":{"filtered":false,"detected":false},"self_harm":{"filtered":false,"severity":"safe"},"#,
    r#""sexual":{"filtered":false,"severity":"safe"},"violence":{"filtered":true,"severity":"medium"}}}"#
);

/// What Azure says itself has a code and a message; what OpenAI's code behind it says has OpenAI's shape.
pub fn body(error: &ApiError) -> String {
    let code = error.code.as_deref().unwrap_or_default();
    if error.kind == SHORT {
        return format!(r#"{{"error":{{"code":{},"message":{}}}}}"#, quoted(code), quoted(&error.message));
    }
    if code == "content_filter" {
        let message = quoted(&error.message);
        return format!(r#"{{"error":{{"message":{message},"type":null,"param":"prompt","code":"content_filter",{INNER}}}}}"#);
    }
    openai::error::body(error)
}

fn short(status: u16, code: &'static str, message: impl Into<String>) -> ApiError {
    ApiError::new(status, SHORT, message).code(code)
}

pub fn bad_key() -> ApiError {
    short(
        401,
        "401",
        "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a valid key for an active \
         subscription and use a correct regional API endpoint for your resource.",
    )
}

pub fn forbidden() -> ApiError {
    short(403, "AuthorizationFailed", "The principal does not have access to API/Operation.")
}

pub fn not_found() -> ApiError {
    short(404, "404", "Resource not found")
}

pub fn deployment_not_found() -> ApiError {
    short(
        404,
        "DeploymentNotFound",
        "The API deployment for this resource does not exist. If you created the deployment within the last 5 minutes, please wait \
         a moment and try again.",
    )
}

/// `what` is `requests` or `tokens`.
pub fn rate_limited(what: &str, wait_ms: u64) -> ApiError {
    let what = if what == "requests" { "call" } else { "token" };
    let message = format!(
        "Requests to the ChatCompletions_Create Operation under Azure OpenAI API have exceeded {what} rate limit of your current \
         pricing tier. Please retry after {} seconds.",
        wait_ms.div_ceil(1000)
    );
    short(429, "429", message).retry_after_ms(Some(wait_ms))
}

pub fn overloaded() -> ApiError {
    short(503, "ServiceUnavailable", "The service is temporarily unable to process your request. Please try again later.")
}

/// The filters refused the prompt.
pub fn blocked() -> ApiError {
    ApiError::invalid(
        "The response was filtered due to the prompt triggering Azure OpenAI's content management policy. Please modify your prompt \
         and retry.",
    )
    .code("content_filter")
}

pub fn scripted(script: &Directive, secret: &str, model: (&str, &str)) -> Option<ApiError> {
    let theirs = openai::error::scripted(script, secret, model)?;
    let mut error = match (theirs.status, script.error.as_deref()) {
        (_, Some("content_filter")) => blocked(),
        (_, Some("insufficient_quota")) => return Some(theirs),
        (401, _) => bad_key(),
        (403, _) => forbidden(),
        (404, _) => deployment_not_found(),
        (429, _) => rate_limited("requests", theirs.retry_after_ms.unwrap_or(1000)),
        (500, _) => short(500, "InternalServerError", "The server had an error while processing your request. Sorry about that!"),
        (503, _) => overloaded(),
        _ => return Some(theirs),
    };
    error.status = theirs.status;
    error.retry_after_ms = theirs.retry_after_ms;
    Some(error)
}

/// Whether a version of the API is named as Azure names them: by its day.
pub fn is_version(given: &str) -> bool {
    let day = given.strip_suffix("-preview").unwrap_or(given);
    let digits = |at: std::ops::Range<usize>| day.get(at).is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_digit()));
    day.len() == 10 && digits(0..4) && digits(5..7) && digits(8..10) && day.get(4..5) == Some("-") && day.get(7..8) == Some("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_are_exact() {
        assert_eq!(body(&not_found()), r#"{"error":{"code":"404","message":"Resource not found"}}"#);
        let filtered = body(&blocked());
        assert!(
            filtered.contains(r#""code":"content_filter","status":400,"innererror":{"code":"ResponsibleAIPolicyViolation""#),
            "{filtered}"
        );
        assert!(serde_json::from_str::<serde_json::Value>(&filtered).is_ok());
        assert!(body(&ApiError::invalid("no").param("n")).contains(r#""type":"invalid_request_error","param":"n""#));
    }

    #[test]
    fn versions_are_days() {
        assert!(["2024-10-21", "2025-04-01-preview"].iter().all(|given| is_version(given)));
        assert!(!["", "v1", "2024-10", "2024-1a-21", "preview"].iter().any(|given| is_version(given)));
    }
}
