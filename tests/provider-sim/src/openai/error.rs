//! Errors as OpenAI words them.

use crate::directive::Directive;
use crate::limits::Exceeded;
use crate::models::{Kind, Model};
use crate::provider::ApiError;
use crate::text::quoted;

pub fn body(error: &ApiError) -> String {
    let nullable = |text: Option<&str>| text.map_or_else(|| "null".to_owned(), quoted);
    format!(
        r#"{{"error":{{"message":{},"type":{},"param":{},"code":{}}}}}"#,
        quoted(&error.message),
        quoted(&error.kind),
        nullable(error.param.as_deref()),
        nullable(error.code.as_deref()),
    )
}

/// The error event of a stream that fails after its 200.
pub fn event(error: &ApiError) -> String {
    format!("data: {}\n\n", body(error))
}

pub fn missing_key() -> ApiError {
    ApiError::new(
        401,
        "invalid_request_error",
        "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth \
         (i.e. Authorization: Bearer YOUR_KEY), or as the password field (with blank username) if you're accessing the \
         API from your browser and are prompted for a username and password. You can obtain an API key from \
         https://platform.openai.com/account/api-keys.",
    )
}

pub fn bad_key(key: &str) -> ApiError {
    let message =
        format!("Incorrect API key provided: {}. You can find your API key at https://platform.openai.com/account/api-keys.", masked(key));
    ApiError::new(401, "invalid_request_error", message).code("invalid_api_key")
}

fn masked(key: &str) -> String {
    match (key.get(..6), key.len().checked_sub(3).and_then(|at| key.get(at..))) {
        (Some(head), Some(tail)) if key.len() >= 12 => format!("{head}***{tail}"),
        _ => "***".into(),
    }
}

pub fn insufficient_quota() -> ApiError {
    ApiError::new(
        429,
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing details. For more information on this \
         error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors.",
    )
    .code("insufficient_quota")
}

/// A restricted key without the right that the request needs.
pub fn forbidden() -> ApiError {
    ApiError::new(403, "invalid_request_error", "Organization has been restricted.").code("organization_restricted")
}

pub fn rate_limited(model: &str, exceeded: Exceeded) -> ApiError {
    let Exceeded { what, limit, used, requested, wait_ms } = exceeded;
    let short = if what == "requests" { "RPM" } else { "TPM" };
    let message = format!(
        "Rate limit reached for {model} in organization org-sim on {what} per min ({short}): Limit {limit}, Used {used}, Requested \
         {requested}. Please try again in {}. Visit https://platform.openai.com/account/rate-limits to learn more.",
        crate::text::duration(wait_ms)
    );
    ApiError::new(429, what, message).code("rate_limit_exceeded").retry_after_ms(Some(wait_ms))
}

/// A prompt that may not be answered.
pub fn blocked() -> ApiError {
    ApiError::invalid(
        "Invalid prompt: your prompt was flagged as potentially violating our usage policy. Please try again with a different prompt.",
    )
    .code("invalid_prompt")
}

pub fn overloaded() -> ApiError {
    ApiError::new(503, "server_error", "The engine is currently overloaded, please try again later")
}

pub fn server_error() -> ApiError {
    ApiError::new(500, "server_error", "The server had an error while processing your request. Sorry about that!")
}

pub fn model_not_found(model: &str) -> ApiError {
    let message = format!("The model `{model}` does not exist or you do not have access to it.");
    ApiError::new(404, "invalid_request_error", message).code("model_not_found")
}

/// A model that can't do what is asked of it.
pub fn wrong_kind(model: &Model, fits: fn(Kind) -> bool) -> ApiError {
    let refuse = |status, message: &str| ApiError::new(status, "invalid_request_error", message);
    if fits(Kind::Chat) && model.kind == Kind::Completion {
        let message =
            "This is not a chat model and thus not supported in the v1/chat/completions endpoint. Did you mean to use v1/completions?";
        return refuse(404, message).param("model");
    }
    if fits(Kind::Completion) {
        let message = "This is a chat model and not supported in the v1/completions endpoint. Did you mean to use v1/chat/completions?";
        return refuse(404, message).param("model");
    }
    if fits(Kind::Chat) {
        return refuse(403, "You are not allowed to sample from this model");
    }
    if fits(Kind::Embedding { dimensions: 0 }) {
        return refuse(403, "You are not allowed to generate embeddings from this model");
    }
    let message = format!("The model `{}` is not supported by this endpoint.", model.name);
    refuse(400, &message).param("model").code("invalid_value")
}

/// `what` as OpenAI begins the sentence: `Response`, `Conversation`.
pub fn object_not_found(what: &str, id: &str) -> ApiError {
    ApiError::new(404, "invalid_request_error", format!("{what} with id '{id}' not found."))
}

pub fn previous_response_not_found(id: &str) -> ApiError {
    let error = ApiError::invalid(format!("Previous response with id '{id}' not found."));
    error.param("previous_response_id").code("previous_response_not_found")
}

pub fn item_not_found(id: &str) -> ApiError {
    let message = format!(
        "Item with id '{id}' not found. Items are not persisted when `store` is set to false. Try again with `store` set to true, \
         or remove this item from your input."
    );
    ApiError::new(404, "invalid_request_error", message).param("input")
}

pub fn file_not_found(id: &str) -> ApiError {
    ApiError::new(404, "invalid_request_error", format!("No such File object: {id}")).param("id")
}

/// A file that an input names.
pub fn input_file_not_found(id: &str, param: &str) -> ApiError {
    ApiError::new(404, "invalid_request_error", format!("Files ['{id}'] were not found.")).param(param)
}

pub fn unknown_url(method: &str, path: &str) -> ApiError {
    let message = format!(
        "Unknown request URL: {method} {path}. Please check the URL for typos, or see the docs at \
         https://platform.openai.com/docs/api-reference/."
    );
    ApiError::new(404, "invalid_request_error", message).code("unknown_url")
}

/// The error a script asks for. `model` is its name and that of its snapshot.
pub fn scripted(directive: &Directive, key: &str, model: (&str, &str)) -> Option<ApiError> {
    let status = match (directive.status, directive.error.as_deref()) {
        (Some(status), _) => status,
        (None, Some("invalid_api_key")) => 401,
        (None, Some("model_not_found")) => 404,
        (None, Some("rate_limit_exceeded" | "insufficient_quota")) => 429,
        (None, Some("overloaded" | "service_unavailable")) => 503,
        (None, Some("server_error")) => 500,
        (None, Some(_)) => 400,
        (None, None) => return None,
    };
    let retry_after_ms = directive.retry_after.map(|seconds| seconds.saturating_mul(1000));
    let wait_ms = retry_after_ms.unwrap_or(1000);
    let limit = || rate_limited(model.1, Exceeded { what: "requests", limit: 500, used: 500, requested: 1, wait_ms });
    let mut error = match (status, directive.error.as_deref()) {
        (_, Some("insufficient_quota")) => insufficient_quota(),
        (_, Some("invalid_api_key")) | (401, None) => bad_key(key),
        (403, None) => forbidden(),
        (_, Some("model_not_found")) | (404, None) => model_not_found(model.0),
        (_, Some("rate_limit_exceeded")) | (429, None) => limit(),
        (503, _) => overloaded(),
        (500.., _) => server_error(),
        (_, code) => {
            let error = ApiError::new(status, "invalid_request_error", "Scripted error.");
            code.map_or(error.clone(), |code| error.code(code.to_owned()))
        }
    };
    error.status = status;
    error.retry_after_ms = retry_after_ms;
    Some(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_masked_and_the_shape_exact() {
        let error = bad_key("sk-abcdefghijklmxyz");
        assert_eq!(
            body(&error),
            "{\"error\":{\"message\":\"Incorrect API key provided: sk-abc***xyz. You can find your API key at \
             https://platform.openai.com/account/api-keys.\",\"type\":\"invalid_request_error\",\"param\":null,\
             \"code\":\"invalid_api_key\"}}"
        );
        assert!(bad_key("short").message.contains(": ***."));
    }
}
