//! What requests are answered by: providers, credentials, pools, routes.

use super::prices::OwnPrice;
use super::{Document, Fault, Faults, Kind, MAX_NAME, Object, unknown_provider};
use crate::prices;
use keyward_core::operation::Provider;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Settings of a built-in provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProviderSettings {
    /// `false`: nobody may use it.
    pub enabled: bool,
    /// Where Envoy connects instead of the provider's own host: `http://127.0.0.1:9000`. Read by `keyward up` and
    /// `keyward envoy render`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// What models cost here instead of the price table: by name or glob, such as `gpt-4o` or `acme-*`. An exact name wins over a
    /// glob, a longer glob over a shorter.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub prices: BTreeMap<String, OwnPrice>,
}

impl Default for ProviderSettings {
    fn default() -> Self {
        ProviderSettings { enabled: true, url: None, prices: BTreeMap::new() }
    }
}

impl Object for ProviderSettings {
    const KIND: Kind = Kind::Provider;
    fn check(&self, at: &str, _: &Document, out: &mut Vec<Fault>) {
        let fits = |url: &String| {
            let authority = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
            let port = authority.and_then(|a| a.trim_end_matches('/').rsplit_once(':'));
            port.is_some_and(|(host, port)| {
                port.parse::<u16>().is_ok() && !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
            })
        };
        let mut faults = Faults { at, out };
        if self.url.as_ref().is_some_and(|url| !fits(url)) {
            faults.add("url", "expected http://HOST:PORT or https://HOST:PORT");
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
    fn check(&self, at: &str, _: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.label(&self.label);
        if Provider::by_name(&self.provider).is_none() {
            faults.add("provider", unknown_provider(&self.provider));
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
        if Provider::by_name(&self.provider).is_none() {
            faults.add("provider", unknown_provider(&self.provider));
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

/// A model name of your own. This version takes exactly one target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    pub targets: Vec<RouteTarget>,
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
}

impl Object for Route {
    const KIND: Kind = Kind::Route;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        if self.targets.len() != 1 {
            faults.add("targets", "this version takes exactly one target");
        }
        for (i, target) in self.targets.iter().enumerate() {
            if Provider::by_name(&target.provider).is_none() {
                faults.add(&format!("targets[{i}].provider"), unknown_provider(&target.provider));
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
