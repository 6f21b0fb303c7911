//! The table of operations: what may be called, in which dialect, and where it goes. The path that reaches a provider
//! comes from here, never from the client's bytes.

use serde::{Deserialize, Serialize};

/// The form in which an endpoint speaks: its bodies, its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    OpenAi,
    Anthropic,
}

/// How a provider wants its credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthScheme {
    Bearer,
    /// The header of this name carries the bare secret.
    Header(&'static str),
}

/// A provider that is built in. The host comes from here, never from the request.
#[derive(Debug, PartialEq, Eq)]
pub struct Provider {
    /// Name in configuration; also the name of its Envoy cluster and of its path prefix.
    pub name: &'static str,
    pub host: &'static str,
    pub dialect: Dialect,
    pub auth: AuthScheme,
}

pub static PROVIDERS: [Provider; 2] = [
    Provider { name: "openai", host: "api.openai.com", dialect: Dialect::OpenAi, auth: AuthScheme::Bearer },
    Provider { name: "anthropic", host: "api.anthropic.com", dialect: Dialect::Anthropic, auth: AuthScheme::Header("x-api-key") },
];

impl Provider {
    pub fn by_name(name: &str) -> Option<&'static Provider> {
        PROVIDERS.iter().find(|p| p.name == name)
    }
}

/// What an operation reads from the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// No body; one is refused.
    Nothing,
    /// A JSON body that names a model and bounds its own output.
    Generation {
        /// The fields that limit output in this dialect; the first is written when the caller set none.
        limits: &'static [&'static str],
        /// Streams tell usage only when `stream_options.include_usage` asks for it.
        asks_for_usage: bool,
    },
}

#[derive(Debug, PartialEq, Eq)]
pub struct Operation {
    pub name: &'static str,
    pub dialect: Dialect,
    pub method: &'static str,
    pub path: &'static str,
    pub takes: Takes,
}

pub static OPERATIONS: [Operation; 4] = [
    Operation {
        name: "chat",
        dialect: Dialect::OpenAi,
        method: "POST",
        path: "/v1/chat/completions",
        takes: Takes::Generation { limits: &["max_completion_tokens", "max_tokens"], asks_for_usage: true },
    },
    Operation { name: "models", dialect: Dialect::OpenAi, method: "GET", path: "/v1/models", takes: Takes::Nothing },
    Operation {
        name: "messages",
        dialect: Dialect::Anthropic,
        method: "POST",
        path: "/v1/messages",
        takes: Takes::Generation { limits: &["max_tokens"], asks_for_usage: false },
    },
    Operation { name: "models", dialect: Dialect::Anthropic, method: "GET", path: "/v1/models", takes: Takes::Nothing },
];

/// Where a request is meant to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub provider: &'static Provider,
    pub operation: &'static Operation,
}

/// Why a path leads nowhere, with the dialect to say so in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoTarget {
    UnknownProvider(Dialect),
    UnknownEndpoint(Dialect),
}

/// Finds the target of `path` (without query). `/{provider}/v1/...` names the provider; bare `/v1/...` means the provider
/// whose dialect has that path, told apart by `anthropic_version` (the header every Anthropic SDK sends) where both have it.
pub fn find(method: &str, path: &str, anthropic_version: bool) -> Result<Target, NoTarget> {
    let guess = if anthropic_version || path.ends_with("/v1/messages") { Dialect::Anthropic } else { Dialect::OpenAi };
    let (provider, rest) = if path.starts_with("/v1/") {
        (PROVIDERS.iter().find(|p| p.dialect == guess), path)
    } else {
        let trimmed = path.strip_prefix('/').unwrap_or(path);
        let (name, _) = trimmed.split_once('/').unwrap_or((trimmed, ""));
        (Provider::by_name(name), path.get(1 + name.len()..).unwrap_or_default())
    };
    let provider = provider.ok_or(NoTarget::UnknownProvider(guess))?;
    OPERATIONS
        .iter()
        .find(|op| op.dialect == provider.dialect && op.method == method && op.path == rest)
        .map(|operation| Target { provider, operation })
        .ok_or(NoTarget::UnknownEndpoint(provider.dialect))
}

impl Operation {
    /// `METHOD path`, the form in which a policy names endpoints.
    pub fn endpoint(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn paths_lead_where_the_table_says() {
        let name = |method, path, version| find(method, path, version).map(|t| (t.provider.name, t.operation.name));
        assert_eq!(name("POST", "/v1/chat/completions", false), Ok(("openai", "chat")));
        assert_eq!(name("POST", "/openai/v1/chat/completions", true), Ok(("openai", "chat")));
        assert_eq!(name("POST", "/v1/messages", false), Ok(("anthropic", "messages")));
        assert_eq!(name("POST", "/anthropic/v1/messages", false), Ok(("anthropic", "messages")));
        assert_eq!(name("GET", "/v1/models", false), Ok(("openai", "models")));
        assert_eq!(name("GET", "/v1/models", true), Ok(("anthropic", "models")));
    }

    #[test]
    fn nothing_else_leads_anywhere() {
        assert_eq!(find("POST", "/mistral/v1/chat/completions", false), Err(NoTarget::UnknownProvider(Dialect::OpenAi)));
        for (method, path) in [
            ("GET", "/v1/chat/completions"),
            ("POST", "/v1/files"),
            ("POST", "/openai/v1/messages"),
            ("POST", "/v1/chat/completions/"),
            ("POST", "/openai"),
        ] {
            assert!(matches!(find(method, path, false), Err(NoTarget::UnknownEndpoint(_))), "{method} {path}");
        }
        for path in ["", "/", "*", "//v1/chat/completions", "/é", "/v1"] {
            assert!(find("POST", path, false).is_err(), "{path}");
        }
    }
}
