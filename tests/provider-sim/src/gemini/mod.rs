//! Google's Generative Language API: `generateContent`, plain and streamed, counting, and embeddings.

pub mod embeddings;
pub mod error;
pub mod history;
pub mod request;
pub mod response;
pub mod settings;
pub mod wire;

use crate::call::Call;
use crate::endpoint::tail;
use crate::models::{Kind, Model};
use crate::provider::{ApiError, Provider};

/// The model of a path and what it is to do; none and none for the list of models.
pub fn address(path: &str) -> Option<(Option<&str>, Option<&str>)> {
    let rest = tail(Provider::Gemini, path)?.strip_prefix("models")?;
    if rest.is_empty() {
        return Some((None, None));
    }
    let name = rest.strip_prefix('/').filter(|name| !name.is_empty() && !name.contains('/'))?;
    Some(match name.split_once(':') {
        Some((name, work)) => (Some(name), Some(work)),
        None => (Some(name), None),
    })
}

/// A credential in the query.
pub fn key(query: Option<&str>) -> Option<&str> {
    query?.split('&').find_map(|pair| pair.strip_prefix("key="))
}

/// Whether a stream is to come as server-sent events; otherwise it is a list.
pub fn as_events(query: Option<&str>) -> bool {
    query.is_some_and(|query| query.split('&').any(|pair| pair == "alt=sse"))
}

/// The model that a chat's path names.
pub fn model(call: &Call) -> Result<&'static Model, ApiError> {
    named(call, "generateContent", |kind| kind == Kind::Chat)
}

fn named(call: &Call, work: &str, fits: fn(Kind) -> bool) -> Result<&'static Model, ApiError> {
    let name = address(call.parts.uri.path()).and_then(|(name, _)| name).unwrap_or_default();
    let found = Model::find(Provider::Gemini, name).filter(|model| fits(model.kind));
    found.ok_or_else(|| error::model_not_found(name, work))
}

/// How many tokens a prompt has, free of charge.
pub fn count_tokens(call: &mut Call) -> Result<String, ApiError> {
    let model = named(call, "countTokens", |_| true)?;
    let (tokens, last_user) = request::count(call.body, model)?;
    let (script, _) = call.steer(Some(model), false, &last_user)?;
    call.admit_free(Some(model), &script)?;
    Ok(format!(r#"{{"totalTokens":{tokens},"promptTokensDetails":[{{"modality":"TEXT","tokenCount":{tokens}}}]}}"#))
}

/// Whether a model is of the third generation, which signs what it thinks and wants the signatures back.
pub fn signs(model: &Model) -> bool {
    model.name.starts_with("gemini-3")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_model_and_its_work() {
        assert_eq!(address("/v1beta/models/gemini-2.5-pro:countTokens"), Some((Some("gemini-2.5-pro"), Some("countTokens"))));
        assert_eq!(address("/v1/models"), Some((None, None)));
        assert_eq!(address("/v1/models/a"), Some((Some("a"), None)));
        assert!(["/v1/models/", "/v1/models/a/b", "/v2/models", "/v1/model"].iter().all(|path| address(path).is_none()));
        assert_eq!(key(Some("alt=sse&key=a")), Some("a"));
        assert!(as_events(Some("key=a&alt=sse")) && !as_events(Some("alt=json")) && !as_events(None));
    }
}
