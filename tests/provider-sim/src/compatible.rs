//! Servers that speak OpenAI's chat without being OpenAI: what they don't know, and how each words an error.

use serde_json::{Value, json};

use crate::openai::fields::Fields;
use crate::provider::ApiError;
use crate::text::quoted;

/// Whose ways the server has, told by its base path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// `/openai/v1`, as Groq has it: 400, and the figures of limits in OpenAI's headers.
    Groq,
    /// `/api/v1`, as OpenRouter has it: the code of an error is its status.
    Openrouter,
    /// `/v1`, as Mistral, Together, DeepSeek, vLLM and Ollama have it: 422, with a list of what was wrong.
    #[default]
    Plain,
}

/// Base paths, longest first.
pub const BASES: [(&str, Flavour); 3] = [("/openai/v1/", Flavour::Groq), ("/api/v1/", Flavour::Openrouter), ("/v1/", Flavour::Plain)];

/// What OpenAI has and these servers haven't.
const FOREIGN: &[&str] = &[
    "audio",
    "metadata",
    "modalities",
    "moderation",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "verbosity",
    "web_search_options",
];

impl Flavour {
    pub fn of(path: &str) -> Flavour {
        BASES.iter().find(|(base, _)| path.starts_with(base)).map_or(Flavour::Plain, |(_, flavour)| *flavour)
    }
}

/// Refuses what only OpenAI knows, `known` being what there is at all.
pub fn only(fields: &Fields, known: &[&str], flavour: Flavour) -> Result<(), ApiError> {
    let foreign = |key: &&String| FOREIGN.contains(&key.as_str()) || !known.contains(&key.as_str());
    let Some(name) = fields.keys().find(foreign) else { return Ok(()) };
    Err(match flavour {
        Flavour::Groq => ApiError::invalid(format!("property '{name}' is unsupported")),
        Flavour::Openrouter => ApiError::invalid(format!("Unrecognized key(s) in object: '{name}'")),
        Flavour::Plain => unprocessable("extra_forbidden", &[name], "Extra inputs are not permitted", fields.get(name)),
    })
}

/// The role that only OpenAI's newer models know.
pub fn check_roles(messages: &[Value], flavour: Flavour) -> Result<(), ApiError> {
    let developer = |message: &Value| message.get("role").is_some_and(|role| role == "developer");
    match messages.iter().position(developer) {
        Some(at) if flavour == Flavour::Plain => {
            let at = at.to_string();
            let message = "Input should be 'system', 'user', 'assistant' or 'tool'";
            Err(unprocessable("literal_error", &["messages", &at, "role"], message, None))
        }
        _ => Ok(()),
    }
}

/// 422, as servers made with FastAPI have it: the message is a document that says where.
fn unprocessable(kind: &str, place: &[&str], message: &str, input: Option<&Value>) -> ApiError {
    let place: Vec<&str> = ["body"].iter().chain(place).copied().collect();
    let detail = json!({"detail": [{"type": kind, "loc": place, "msg": message, "input": input}]});
    ApiError::new(422, "invalid_request_error", detail.to_string())
}

pub fn body(error: &ApiError, flavour: Flavour) -> String {
    let (message, kind) = (quoted(&error.message), quoted(&error.kind));
    let code = error.code.as_deref().map_or_else(|| "null".to_owned(), quoted);
    match flavour {
        Flavour::Groq if error.code.is_none() => format!(r#"{{"error":{{"message":{message},"type":{kind}}}}}"#),
        Flavour::Groq => format!(r#"{{"error":{{"message":{message},"type":{kind},"code":{code}}}}}"#),
        Flavour::Openrouter => format!(r#"{{"error":{{"message":{message},"code":{}}},"user_id":"user_sim"}}"#, error.status),
        Flavour::Plain if error.status == 422 => {
            // The message is a document already.
            format!(r#"{{"object":"error","message":{},"type":{kind},"param":null,"code":null}}"#, error.message)
        }
        Flavour::Plain => format!(r#"{{"object":"error","message":{message},"type":{kind},"param":null,"code":{code}}}"#),
    }
}

pub fn bad_key() -> ApiError {
    ApiError::new(401, "invalid_request_error", "Invalid API Key").code("invalid_api_key")
}

pub fn insufficient_quota() -> ApiError {
    ApiError::new(402, "insufficient_balance", "Insufficient Balance").code("insufficient_balance")
}

pub fn model_not_found(name: &str) -> ApiError {
    let message = format!("The model `{name}` does not exist or you do not have access to it.");
    ApiError::new(404, "invalid_request_error", message).code("model_not_found")
}

pub fn unknown_url(method: &str, path: &str) -> ApiError {
    ApiError::new(404, "invalid_request_error", format!("Unknown request URL: {method} {path}.")).code("unknown_url")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refuses_what_only_openai_knows_in_its_own_words() -> Result<(), serde_json::Error> {
        let fields: Fields = serde_json::from_str(r#"{"model":"a","store":false}"#)?;
        let known = ["model", "store"];
        let refusal = |path| only(&fields, &known, Flavour::of(path)).err().map(|error| (error.status, body(&error, Flavour::of(path))));
        let groq = r#"{"error":{"message":"property 'store' is unsupported","type":"invalid_request_error"}}"#;
        assert_eq!(refusal("/openai/v1/chat/completions"), Some((400, groq.into())));
        let router = r#"{"error":{"message":"Unrecognized key(s) in object: 'store'","code":400},"user_id":"user_sim"}"#;
        assert_eq!(refusal("/api/v1/chat/completions"), Some((400, router.into())));
        let (status, plain) = refusal("/v1/chat/completions").unwrap_or_default();
        let plain: Value = serde_json::from_str(&plain)?;
        assert_eq!((status, plain.pointer("/message/detail/0/loc")), (422, Some(&json!(["body", "store"]))));
        assert!(only(&serde_json::from_str(r#"{"model":"a"}"#)?, &known, Flavour::Plain).is_ok());
        Ok(())
    }
}
