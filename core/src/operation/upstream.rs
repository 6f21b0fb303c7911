//! How an operation that a caller asks for is carried out at a provider, which may speak another dialect.

use super::path::encode;
use super::{Dialect, Form, Operation, Site, Target, Tells};
use std::borrow::Cow;

/// An operation at a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Path and query.
    pub path: Cow<'static, str>,
    /// How the provider's answer tells usage.
    pub tells: Tells,
    /// Request and answer are translated.
    pub translates: bool,
}

/// Whether a caller's operation can be carried out at a provider of this dialect.
pub fn carries(operation: &Operation, caller: Dialect, provider: Dialect) -> bool {
    caller == provider
        || matches!(
            (operation.form(), provider),
            (Some(Form::Chat), Dialect::Anthropic)
                | (Some(Form::Messages), Dialect::OpenAi)
                | (Some(Form::Chat | Form::Messages | Form::Embeddings), Dialect::Gemini)
        )
}

/// The operation at this site. `None`: it has none that does the same.
pub fn upstream(target: &Target, site: &Site, model: Option<&str>, stream: bool) -> Option<Upstream> {
    if !carries(target.operation, target.dialect, site.dialect) {
        return None;
    }
    let model = model.unwrap_or_default();
    if target.dialect == site.dialect {
        let path = own_path(target.path.clone(), site, model, target.operation.form().is_some())?;
        return Some(Upstream { path, tells: target.operation.tells, translates: false });
    }
    let (path, tells) = match (site.dialect, target.operation.form()) {
        (Dialect::OpenAi, _) => (own_path(Cow::Borrowed("/v1/chat/completions"), site, model, true)?, Tells::Completion),
        (Dialect::Anthropic, _) => (own_path(Cow::Borrowed("/v1/messages"), site, model, true)?, Tells::Anthropic),
        (Dialect::Gemini, form) => {
            let method = match form {
                Some(Form::Embeddings) => "batchEmbedContents",
                _ if stream => "streamGenerateContent?alt=sse",
                _ => "generateContent",
            };
            (Cow::Owned(format!("{}/models/{}:{method}", site.base, encode(model))), Tells::Gemini)
        }
    };
    Some(Upstream { path, tells, translates: true })
}

/// A path of the provider's own dialect, at its place. `None`: no deployment can be called as the model is; one of dots alone would lead
/// out of the deployments.
fn own_path(path: Cow<'static, str>, site: &Site, model: &str, has_model: bool) -> Option<Cow<'static, str>> {
    if site.api_version.is_none() && site.base == "/v1" {
        return Some(path);
    }
    let rest = path.strip_prefix("/v1").unwrap_or(&path);
    Some(match &site.api_version {
        None => Cow::Owned(format!("{}{rest}", site.base)),
        Some(_) if has_model && model.bytes().all(|byte| byte == b'.') => return None,
        Some(version) => {
            let separator = if rest.contains('?') { '&' } else { '?' };
            let deployment = if has_model { format!("/deployments/{}", encode(model)) } else { String::new() };
            Cow::Owned(format!("/openai{deployment}{rest}{separator}api-version={}", encode(version)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::{Provider, find};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn path(at: &str, site: &Site, stream: bool) -> Option<String> {
        let target = find("POST", at, b"", false).unwrap();
        upstream(&target, site, Some("some/model 1"), stream).map(|upstream| upstream.path.into_owned())
    }

    #[test]
    fn each_provider_has_its_own_paths() {
        let site = |name: &str| Provider::by_name(name).unwrap().site();
        let azure =
            |version: Option<&str>| Site { host: "acme.openai.azure.com".into(), api_version: version.map(Into::into), ..site("azure") };
        for (at, site, stream, expected) in [
            ("/v1/chat/completions", site("openai"), false, Some("/v1/chat/completions")),
            ("/v1/chat/completions", site("anthropic"), true, Some("/v1/messages")),
            ("/v1/chat/completions", site("gemini"), false, Some("/v1beta/models/some%2Fmodel%201:generateContent")),
            ("/v1/messages", site("gemini"), true, Some("/v1beta/models/some%2Fmodel%201:streamGenerateContent?alt=sse")),
            ("/v1/messages", site("groq"), true, Some("/openai/v1/chat/completions")),
            ("/v1/messages", site("anthropic"), true, Some("/v1/messages")),
            ("/v1/messages/count_tokens", site("openai"), false, None),
            ("/v1/embeddings", site("gemini"), false, Some("/v1beta/models/some%2Fmodel%201:batchEmbedContents")),
            ("/v1/embeddings", site("anthropic"), false, None),
            ("/v1/responses", site("openrouter"), false, Some("/api/v1/responses")),
            ("/v1/responses", site("gemini"), false, None),
            ("/v1/chat/completions", azure(None), false, Some("/openai/v1/chat/completions")),
            (
                "/v1/chat/completions",
                azure(Some("2024-10-21")),
                false,
                Some("/openai/deployments/some%2Fmodel%201/chat/completions?api-version=2024-10-21"),
            ),
        ] {
            assert_eq!(path(at, &site, stream).as_deref(), expected, "{at} {site:?}");
        }
    }

    /// The model is the caller's word: it is one segment of the path, and never a step to another.
    #[test]
    fn no_model_leads_out_of_the_deployments() {
        let target = find("POST", "/v1/chat/completions", b"", false).unwrap();
        let azure = Site { api_version: Some("2024-10-21".to_owned()), ..Provider::by_name("azure").unwrap().site() };
        for (model, leads) in [("", false), (".", false), ("..", false), ("...", false), ("../x", true), ("..x", true)] {
            let path = upstream(&target, &azure, Some(model), false).map(|upstream| upstream.path.into_owned());
            assert_eq!(path.is_some(), leads, "{model}");
            assert!(path.is_none_or(|path| path.split('/').count() == 6 && !path.contains("/../")));
        }
    }
}
