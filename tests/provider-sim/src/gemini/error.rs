//! Errors as Google words them: `google.rpc.Status`, what is known besides in its details.
//!
//! The type of an error is its status. `code` is `API_KEY_INVALID`, or the id of the quota that is used up; `param` is the model of
//! the quota, or `json` where the body could not be read by its fields.

use serde_json::{Value, json};

use crate::directive::Directive;
use crate::limits::Exceeded;
use crate::provider::ApiError;

/// The body could not be read by its fields.
pub const JSON: &str = "json";
const PER_DAY: &str = "GenerateRequestsPerDayPerProjectPerModel";
const PER_MINUTE: &str = "GenerateRequestsPerMinutePerProjectPerModel";
const TOKENS_PER_MINUTE: &str = "GenerateContentInputTokensPerModelPerMinute";
const SERVICE: &str = "generativelanguage.googleapis.com";

pub fn body(error: &ApiError) -> String {
    // What the common parts refuse has a name of other dialects.
    let status = if error.kind == "invalid_request_error" { "INVALID_ARGUMENT" } else { &error.kind };
    let mut body = json!({"error": {"code": error.status, "message": error.message, "status": status}});
    let details = details(error);
    if !details.is_empty()
        && let Some(error) = body.get_mut("error").and_then(Value::as_object_mut)
    {
        error.insert("details".into(), Value::Array(details));
    }
    body.to_string()
}

fn details(error: &ApiError) -> Vec<Value> {
    match (error.status, error.code.as_deref(), error.param.as_deref()) {
        (_, Some(reason @ ("API_KEY_INVALID" | "ACCESS_TOKEN_TYPE_UNSUPPORTED")), _) => vec![
            json!({"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "googleapis.com", "metadata": {"service": SERVICE}}),
            json!({"@type": "type.googleapis.com/google.rpc.LocalizedMessage", "locale": "en-US", "message": error.message}),
        ],
        (429, Some(quota), model) => {
            let mut details = vec![
                json!({"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{
                    "quotaMetric": format!("{SERVICE}/generate_content_requests"), "quotaId": quota,
                    "quotaDimensions": {"location": "global", "model": model.unwrap_or_default()}, "quotaValue": "250",
                }]}),
                json!({"@type": "type.googleapis.com/google.rpc.Help", "links": [{
                    "description": "Learn more about Gemini API quotas", "url": "https://ai.google.dev/gemini-api/docs/rate-limits",
                }]}),
            ];
            if let Some(ms) = error.retry_after_ms {
                details.push(json!({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": seconds(ms)}));
            }
            details
        }
        (400, _, Some(JSON)) => {
            let violations: Vec<Value> = error.message.lines().map(violation).collect();
            vec![json!({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": violations})]
        }
        _ => Vec::new(),
    }
}

/// A duration as proto3 writes it.
fn seconds(ms: u64) -> String {
    match ms % 1000 {
        0 => format!("{}s", ms / 1000),
        rest => format!("{}.{rest:03}s", ms / 1000),
    }
}

/// One line of the message again, with the field it names.
fn violation(line: &str) -> Value {
    let field = line.split_once(" at '").and_then(|(_, rest)| rest.split_once('\'')).map(|(field, _)| field);
    field.map_or_else(|| json!({"description": line}), |field| json!({"field": field, "description": line}))
}

pub fn invalid(message: impl Into<String>) -> ApiError {
    ApiError::new(400, "INVALID_ARGUMENT", message)
}

/// A value that is known and not allowed where it stands: `place` after the name of the message.
pub fn bad(place: &str, what: &str) -> ApiError {
    invalid(format!("* GenerateContentRequest.{place}: {what}\n"))
}

pub fn missing_key() -> ApiError {
    ApiError::new(
        403,
        "PERMISSION_DENIED",
        "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or other form of API \
         consumer identity to call this API.",
    )
}

pub fn bad_key() -> ApiError {
    invalid("API key not valid. Please pass a valid API key.").code("API_KEY_INVALID")
}

/// A key where an access token belongs.
pub fn bad_token() -> ApiError {
    ApiError::new(
        401,
        "UNAUTHENTICATED",
        "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid authentication \
         credential. See https://developers.google.com/identity/sign-in/web/devconsole-project.",
    )
    .code("ACCESS_TOKEN_TYPE_UNSUPPORTED")
}

pub fn forbidden() -> ApiError {
    ApiError::new(403, "PERMISSION_DENIED", "The caller does not have permission")
}

/// The day's quota is used up: a retry soon doesn't help, whatever the delay says.
pub fn exhausted() -> ApiError {
    ApiError::new(429, "RESOURCE_EXHAUSTED", QUOTA).code(PER_DAY).retry_after_ms(Some(22_000))
}

const QUOTA: &str = "You exceeded your current quota, please check your plan and billing details. For more information on this error, \
                     head to: https://ai.google.dev/gemini-api/docs/rate-limits.";

pub fn rate_limited(model: &str, exceeded: Exceeded) -> ApiError {
    let quota = if exceeded.what == "requests" { PER_MINUTE } else { TOKENS_PER_MINUTE };
    let message = format!("{QUOTA}\nPlease retry in {}.", seconds(exceeded.wait_ms));
    ApiError::new(429, "RESOURCE_EXHAUSTED", message).code(quota).param(model).retry_after_ms(Some(exceeded.wait_ms))
}

pub fn overloaded() -> ApiError {
    ApiError::new(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")
}

pub fn model_not_found(model: &str, work: &str) -> ApiError {
    let message = format!(
        "models/{model} is not found for API version v1beta, or is not supported for {work}. Call ListModels to see the list of \
         available models and their supported methods."
    );
    ApiError::new(404, "NOT_FOUND", message)
}

pub fn unknown_url() -> ApiError {
    ApiError::new(404, "NOT_FOUND", "Requested entity was not found.")
}

/// The error a script asks for.
pub fn scripted(script: &Directive, model: &str) -> Option<ApiError> {
    let status = match (script.status, script.error.as_deref()) {
        (Some(status), _) => status,
        (None, Some("UNAUTHENTICATED")) => 401,
        (None, Some("PERMISSION_DENIED")) => 403,
        (None, Some("NOT_FOUND")) => 404,
        (None, Some("RESOURCE_EXHAUSTED" | "insufficient_quota" | "per_day" | "per_minute" | "rate_limit_exceeded")) => 429,
        (None, Some("INTERNAL")) => 500,
        (None, Some("UNAVAILABLE")) => 503,
        (None, Some("DEADLINE_EXCEEDED")) => 504,
        (None, Some(_)) => 400,
        (None, None) => return None,
    };
    let retry_after_ms = script.retry_after.map(|seconds| seconds.saturating_mul(1000));
    let wait_ms = retry_after_ms.unwrap_or(22_000);
    let mut error = match (status, script.error.as_deref()) {
        (429, Some("insufficient_quota" | "per_day")) => exhausted().param(model).retry_after_ms(Some(wait_ms)),
        (429, _) => rate_limited(model, Exceeded { what: "requests", limit: 250, used: 250, requested: 1, wait_ms }),
        (_, Some("API_KEY_INVALID")) => bad_key(),
        (401, _) => bad_token(),
        (403, _) => forbidden(),
        (404, _) => model_not_found(model, "generateContent"),
        (503, _) => overloaded(),
        (504, _) => ApiError::new(504, "DEADLINE_EXCEEDED", "Deadline expired before operation could complete."),
        (500.., _) => {
            let message = "An internal error has occurred. Please retry or report in \
                           https://developers.generativeai.google/guide/troubleshooting";
            ApiError::new(500, "INTERNAL", message)
        }
        (_, Some(kind)) if kind.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_') => {
            ApiError::new(status, kind.to_owned(), "Scripted error.")
        }
        _ => invalid("Scripted error."),
    };
    error.status = status;
    Some(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_says_whether_it_is_of_the_day_or_the_minute() -> Result<(), String> {
        for (words, quota, delay) in [
            ("status=429", PER_MINUTE, "22s"),
            ("error=per_day retry_after=7", PER_DAY, "7s"),
            ("error=insufficient_quota", PER_DAY, "22s"),
        ] {
            let error = scripted(&Directive::parse(words)?, "m").ok_or("no error")?;
            let body: Value = serde_json::from_str(&body(&error)).map_err(|error| error.to_string())?;
            assert_eq!(body.pointer("/error/details/0/violations/0/quotaId"), Some(&json!(quota)), "{words}");
            assert_eq!(body.pointer("/error/details/2/retryDelay"), Some(&json!(delay)));
            assert_eq!((&body["error"]["code"], &body["error"]["status"]), (&json!(429), &json!("RESOURCE_EXHAUSTED")));
        }
        Ok(())
    }

    #[test]
    fn a_bad_key_is_a_bad_argument_with_its_reason() {
        let body = body(&bad_key());
        assert!(body.contains(r#""reason":"API_KEY_INVALID""#) && body.contains(r#""status":"INVALID_ARGUMENT""#), "{body}");
        assert_eq!((seconds(22_000), seconds(1_500)), ("22s".into(), "1.500s".into()));
    }
}
