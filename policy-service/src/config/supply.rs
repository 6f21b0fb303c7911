//! What requests are answered by: providers, credentials, pools, routes.

use super::prices::OwnPrice;
use super::{Document, Fault, Faults, Kind, MAX_NAME, Object};
use crate::prices;
use keyward_core::operation::{AuthScheme, Dialect, Maker, Provider, Site};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Settings of a built-in provider, or a provider of your own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProviderSettings {
    /// `false`: nobody may use it.
    pub enabled: bool,
    /// Of a provider that is not built in: what its API speaks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dialect: Option<ProviderDialect>,
    /// Where Envoy connects: `https://llm.example.com:443`. Of a built-in provider, instead of its own host. Read by `keyward up` and
    /// `keyward envoy render`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The host that requests name and certificates are verified for; default: that of `url`, or the built-in provider's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "acme.openai.azure.com")]
    pub host: Option<String>,
    /// What stands before the path of each operation; default: `/v1`, or the built-in provider's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "/openai/v1")]
    pub base_path: Option<String>,
    /// Azure: models are deployments, `/openai/deployments/MODEL/...`, and requests say this version; default: its `/openai/v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2024-10-21")]
    pub api_version: Option<String>,
    /// What models cost here instead of the price table: by name or glob, such as `gpt-4o` or `acme-*`. An exact name wins over a
    /// glob, a longer glob over a shorter.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub prices: BTreeMap<String, OwnPrice>,
}

impl Default for ProviderSettings {
    fn default() -> Self {
        ProviderSettings {
            enabled: true,
            dialect: None,
            url: None,
            host: None,
            base_path: None,
            api_version: None,
            prices: BTreeMap::new(),
        }
    }
}

/// What a provider's API speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProviderDialect {
    /// Chat completions, as nearly every server has them.
    OpenAi,
    Anthropic,
    Gemini,
    /// OpenAI's, in an Azure resource of its own.
    Azure,
}

/// Host and port of a URL without a path.
fn authority(url: &str) -> Option<(&str, u16)> {
    let authority = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?;
    let (host, port) = authority.trim_end_matches('/').rsplit_once(':')?;
    (is_host(host)).then_some((host, port.parse().ok()?))
}

fn is_host(host: &str) -> bool {
    !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

impl ProviderSettings {
    /// Where the provider is, if it is not just as it is built in.
    pub fn site(&self, name: &str) -> Option<Site> {
        let known = Provider::by_name(name);
        let is_plain = self.host.is_none() && self.base_path.is_none() && self.api_version.is_none() && self.dialect.is_none();
        if known.is_some_and(|provider| !provider.host.is_empty()) && is_plain {
            return None;
        }
        let mut site = match (known, self.dialect) {
            (Some(provider), _) => provider.site(),
            (None, Some(dialect)) => dialect.site(),
            (None, None) => return None,
        };
        if let Some(host) = &self.host {
            site.host = host.clone().into();
        } else if site.host.is_empty() {
            let (host, port) = authority(self.url.as_deref()?)?;
            site.host = if matches!(port, 80 | 443) { host.to_owned() } else { format!("{host}:{port}") }.into();
        }
        if let Some(base) = &self.base_path {
            site.base = base.trim_end_matches('/').to_owned().into();
        }
        site.api_version.clone_from(&self.api_version);
        Some(site)
    }
}

impl ProviderDialect {
    /// A server of this dialect whose host is not known yet.
    fn site(self) -> Site {
        let like = match self {
            ProviderDialect::OpenAi => None,
            ProviderDialect::Anthropic => Provider::by_name("anthropic"),
            ProviderDialect::Gemini => Provider::by_name("gemini"),
            ProviderDialect::Azure => Provider::by_name("azure"),
        };
        let plain = Site {
            host: "".into(),
            base: "/v1".into(),
            dialect: Dialect::OpenAi,
            auth: AuthScheme::Bearer,
            maker: Maker::Other,
            api_version: None,
        };
        like.map_or(plain, |provider| Site { host: "".into(), ..provider.site() })
    }
}

impl Object for ProviderSettings {
    const KIND: Kind = Kind::Provider;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        let name = at.rsplit('.').next().unwrap_or_default();
        let known = Provider::by_name(name);
        match (known, self.dialect) {
            (Some(_), Some(_)) => faults.add("dialect", format!("{name} is built in: what it speaks is known")),
            (None, None) => faults.add("", format!("{}, and one of your own needs dialect and url", all.unknown_provider(name))),
            _ if self.url.is_none() && known.is_none_or(|provider| provider.host.is_empty()) => {
                faults.add("url", "is missing: nothing else says where this provider is");
            }
            _ => {}
        }
        if self.url.as_ref().is_some_and(|url| authority(url).is_none()) {
            faults.add("url", "expected http://HOST:PORT or https://HOST:PORT");
        }
        if self.host.as_ref().is_some_and(|host| !is_host(host) || host.len() > 253) {
            faults.add("host", "expected the name of a host");
        }
        let plain = |text: &str, more: &[u8]| {
            text.len() <= 128 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b) || more.contains(&b))
        };
        let is_path = |base: &str| base.starts_with('/') && !base.contains("//") && !base.contains("..") && plain(base, b"/");
        if self.base_path.as_ref().is_some_and(|base| !is_path(base)) {
            faults.add("base_path", "expected a path such as /v1");
        }
        match &self.api_version {
            Some(_) if !(name == "azure" || self.dialect == Some(ProviderDialect::Azure)) => {
                faults.add("api_version", "is only for Azure");
            }
            Some(version) if version.is_empty() || !plain(version, b"") => {
                faults.add("api_version", "expected a version such as 2024-10-21");
            }
            _ => {}
        }
        if self.prices.len() > 1_000 {
            faults.add("prices", "must be at most 1000 entries");
        }
        for (model, price) in &self.prices {
            let field = format!("prices.{model}");
            if model.is_empty() || model.len() > 256 {
                faults.add(&field, "a model is named by 1 to 256 bytes");
            }
            if let Err(fault) = prices::check(price) {
                let dot = if fault.field.is_empty() { "" } else { "." };
                faults.add(&format!("{field}{dot}{}", fault.field), fault.message);
            }
        }
    }
}

/// A real credential.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    #[schema(example = "openai")]
    pub provider: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// The provider's account whose limits it shares: credentials of one provider with the same name here are limited together;
    /// default: its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// In the file: where the secret is, `env:NAME` or `file:PATH` (relative to the file). The API shows only this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "env:OPENAI_API_KEY")]
    pub from: Option<String>,
    /// The secret itself. Only ever sent to the API, by `keyward apply`; never shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(skip)]
    #[schema(write_only)]
    pub secret: Option<String>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credential").field("provider", &self.provider).field("account", &self.account).finish_non_exhaustive()
    }
}

impl Object for Credential {
    const KIND: Kind = Kind::Credential;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.label(&self.label);
        if !all.knows_provider(&self.provider) {
            faults.add("provider", all.unknown_provider(&self.provider));
        }
        if self.account.as_ref().is_some_and(|account| account.is_empty() || account.len() > MAX_NAME) {
            faults.add("account", format!("must be 1 to {MAX_NAME} bytes"));
        }
        let known = |from: &String| ["env:", "file:"].iter().any(|kind| from.strip_prefix(kind).is_some_and(|rest| !rest.is_empty()));
        if self.from.as_ref().is_some_and(|from| !known(from)) {
            faults.add("from", "expected \"env:NAME\" or \"file:PATH\"");
        }
        faults.result("secret", self.secret.as_deref().map_or(Ok(()), check_secret));
    }
}

/// What can't stand in a header would break every request that uses it.
pub fn check_secret(secret: &str) -> Result<(), String> {
    if secret.is_empty() || secret.len() > 4_096 || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("must be 1 to 4096 visible ASCII characters".to_owned());
    }
    if secret.starts_with(keyward_core::token::PREFIX) {
        return Err("is a virtual key: a credential is the provider's own key".to_owned());
    }
    Ok(())
}

/// An ordered set of credentials of one provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    #[schema(example = "openai")]
    pub provider: String,
    /// Names of credentials. Each request takes the usable one whose account has most left.
    pub credentials: Vec<String>,
    /// `key`: each virtual key has an order of its own and stays with the first usable credential of it, so that a provider's prompt
    /// cache is met again. Default: `none`.
    #[serde(default, skip_serializing_if = "Affinity::is_none")]
    pub affinity: Affinity,
}

/// What a request's credential is chosen by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Affinity {
    /// By what the accounts have left.
    #[default]
    None,
    /// By the virtual key.
    Key,
}

impl Affinity {
    fn is_none(&self) -> bool {
        *self == Affinity::None
    }
}

impl Object for Pool {
    const KIND: Kind = Kind::Pool;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        if !all.knows_provider(&self.provider) {
            faults.add("provider", all.unknown_provider(&self.provider));
        }
        if self.credentials.is_empty() {
            faults.add("credentials", "must name at least one credential");
        }
        for (i, name) in self.credentials.iter().enumerate() {
            let field = format!("credentials[{i}]");
            match all.credentials.get(name) {
                None => faults.add(&field, format!("there is no credential {name:?}")),
                Some(found) if found.provider != self.provider => {
                    faults.add(&field, format!("{name:?} is a credential of {}", found.provider))
                }
                Some(_) if self.credentials.iter().take(i).any(|earlier| earlier == name) => {
                    faults.add(&field, format!("{name:?} stands twice"))
                }
                Some(_) => {}
            }
        }
    }
}

/// Targets that a route may have: each is held for, and tried.
const MOST_TARGETS: usize = 8;
const MOST_WEIGHT: u32 = 1_000;
/// Longest wait for a first byte before another target is tried, in milliseconds.
const MOST_FIRST_BYTE_MS: u64 = 600_000;

/// A model name of your own, and where it leads. A request goes to the first target. Another is tried only if that one can't answer:
/// none of its credentials is usable, it answers with a 5xx or can't be connected to, or its first byte takes too long; never
/// after a byte of an answer was passed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    pub targets: Vec<RouteTarget>,
    /// Longest wait for the first byte of a target's answer before the next is tried, 100 to 600000 milliseconds; default: as long as
    /// it takes. A target that was given up may still do its work and cost: so much is reserved for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 100, maximum = 600_000)]
    pub first_byte_timeout_ms: Option<u64>,
    /// What becomes of a field that a target's provider can't do, in a request that is translated for it.
    #[serde(default, skip_serializing_if = "Unsupported::is_error")]
    pub unsupported: Unsupported,
}

/// What becomes of what a provider can't do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unsupported {
    /// The request is refused, and the field is named.
    #[default]
    Error,
    /// It is left out.
    Drop,
}

impl Unsupported {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
    fn is_error(&self) -> bool {
        *self == Unsupported::Error
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteTarget {
    #[schema(example = "openai")]
    pub provider: String,
    /// The provider's own name of the model.
    #[schema(example = "gpt-4o-mini")]
    pub model: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where any target has a weight, requests go first to one of them by chance, so often as its weight of all; then in order. One
    /// without a weight is only fallen back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 1_000)]
    pub weight: Option<u32>,
}

impl Object for Route {
    const KIND: Kind = Kind::Route;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        if !(1..=MOST_TARGETS).contains(&self.targets.len()) {
            faults.add("targets", format!("must be 1 to {MOST_TARGETS} targets"));
        }
        if self.first_byte_timeout_ms.is_some_and(|ms| !(100..=MOST_FIRST_BYTE_MS).contains(&ms)) {
            faults.add("first_byte_timeout_ms", format!("must be 100 to {MOST_FIRST_BYTE_MS}"));
        }
        for (i, target) in self.targets.iter().enumerate() {
            if !all.knows_provider(&target.provider) {
                faults.add(&format!("targets[{i}].provider"), all.unknown_provider(&target.provider));
            }
            if target.weight.is_some_and(|weight| weight > MOST_WEIGHT) {
                faults.add(&format!("targets[{i}].weight"), format!("must be 0 to {MOST_WEIGHT}"));
            }
            if target.model.is_empty() || target.model.len() > 256 {
                faults.add(&format!("targets[{i}].model"), "must be 1 to 256 bytes");
            }
            let Some(pool) = &target.pool else { continue };
            match all.pools.get(pool) {
                None => faults.add(&format!("targets[{i}].pool"), format!("there is no pool {pool:?}")),
                Some(found) if found.provider != target.provider => {
                    faults.add(&format!("targets[{i}].pool"), format!("the pool {pool:?} is one of {}", found.provider));
                }
                Some(_) => {}
            }
        }
    }
}
