//! Providers: those that are built in, and how any of them is spoken to.

use super::{Dialect, Form, PROVIDERS};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// How a provider wants its credential.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AuthScheme {
    Bearer,
    // The headers of these names carry the bare secret.
    XApiKey,
    ApiKey,
    XGoogApiKey,
}

impl AuthScheme {
    /// The header that carries a secret, and its value.
    pub fn header(self, secret: &str) -> (&'static str, String) {
        match self {
            AuthScheme::Bearer => ("authorization", ["Bearer ", secret].concat()),
            AuthScheme::XApiKey => ("x-api-key", secret.to_owned()),
            AuthScheme::ApiKey => ("api-key", secret.to_owned()),
            AuthScheme::XGoogApiKey => ("x-goog-api-key", secret.to_owned()),
        }
    }
}

/// A provider that is built in.
#[derive(Debug, PartialEq, Eq)]
pub struct Provider {
    /// Name in configuration; also the name of its Envoy cluster and of its path prefix.
    pub name: &'static str,
    /// Empty: each account has a host of its own.
    pub host: &'static str,
    /// What stands before the path of each operation.
    pub base: &'static str,
    pub dialect: Dialect,
    pub auth: AuthScheme,
}

impl Provider {
    pub fn by_name(name: &str) -> Option<&'static Provider> {
        PROVIDERS.iter().find(|p| p.name == name)
    }

    pub fn site(&self) -> Site {
        let (host, base) = (Cow::Borrowed(self.host), Cow::Borrowed(self.base));
        Site { host, base, dialect: self.dialect, auth: self.auth, maker: Maker::of(self.name), api_version: None }
    }
}

/// Whose server it is, as far as that changes what it takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Maker {
    OpenAi,
    Azure,
    #[default]
    Other,
}

impl Maker {
    fn of(name: &str) -> Self {
        match name {
            "openai" => Maker::OpenAi,
            "azure" => Maker::Azure,
            _ => Maker::Other,
        }
    }
}

/// Where a provider is, and how it is spoken to. It comes from the table or from configuration, never from a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    pub host: Cow<'static, str>,
    /// What stands before the path of each operation: `/v1`.
    pub base: Cow<'static, str>,
    pub dialect: Dialect,
    pub auth: AuthScheme,
    #[serde(default)]
    pub maker: Maker,
    /// Azure: models are deployments, named in the path, and every request says this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_version: Option<String>,
}

impl Site {
    /// The provider keeps answers of this form unless it is told `store: false`. Other servers don't know the field.
    pub fn stores_answers(&self, form: Option<Form>) -> bool {
        match self.maker {
            Maker::OpenAi => true,
            // Its chat completions keep nothing unless asked to.
            Maker::Azure => form == Some(Form::Responses),
            Maker::Other => false,
        }
    }

    /// A request that names no service tier, or `auto`, gets what the project's settings say (API reference, `service_tier`).
    pub fn defaults_tier(&self) -> bool {
        self.maker == Maker::OpenAi
    }

    /// It takes OpenAI's newest fields; other servers of the dialect know the older ones.
    pub fn is_newest(&self) -> bool {
        self.maker != Maker::Other
    }
}

/// Whether a provider can be called so: it is the first segment of paths and the name of a cluster.
pub fn is_provider_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
        && name != "edge"
        // A version of an API, not somebody's.
        && !name.strip_prefix('v').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_digit()))
}
