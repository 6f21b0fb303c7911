//! Who is limited: the organisation, its teams, and the policies of keys.

use super::limits::{Budget, Enforce, Quota, Rates, parse_limits, parse_usd};
use super::patch::object;
use super::{Document, Fault, Faults, Kind, Object, parse_duration};
use keyward_core::admission;
use keyward_core::limits::Limits;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Longest that a request may be held back for a credential.
const MOST_WAIT_MS: u64 = 60_000;

/// What may be called. An empty list allows everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Allow {
    /// Globs over model names, such as `gpt-4o*`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// Globs over `METHOD /path`, or `provider:METHOD /path`. What is not in the table of operations must be spelled out in
    /// its first two segments, such as `POST /v1/files`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,
    /// Providers may keep answers and conversations, and the key may refer to what it made itself. Without it `store: false` is
    /// written into requests. A key of a team needs its team's word as well.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub state: bool,
}

impl From<&Allow> for admission::Allow {
    fn from(allow: &Allow) -> Self {
        admission::Allow { models: allow.models.clone(), endpoints: allow.endpoints.clone(), state: allow.state }
    }
}

impl From<&admission::Allow> for Allow {
    fn from(allow: &admission::Allow) -> Self {
        Allow { models: allow.models.clone(), endpoints: allow.endpoints.clone(), state: allow.state }
    }
}

/// The organisation's own settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OrganisationSettings {
    /// Where alarms are sent: `https://HOST/PATH`, or `http` to this machine. Each is signed: `keyward organisation
    /// webhook-secret`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "https://alarms.example.com/keyward")]
    pub webhook: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Budget>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<Quota>,
    #[serde(skip_serializing_if = "Rates::is_none", deserialize_with = "object")]
    pub rates: Rates,
}

impl OrganisationSettings {
    /// What its limits mean, or everything that is wrong with them.
    pub fn limits(&self) -> Result<Limits, Vec<Fault>> {
        parse_limits(&self.budgets, &self.quotas, &self.rates)
    }
}

impl Object for OrganisationSettings {
    const KIND: Kind = Kind::Organisation;
    fn check(&self, at: &str, _: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.limits(self.limits());
        if self.webhook.as_deref().is_some_and(|url| !is_webhook(url)) {
            faults.add("webhook", "expected https://HOST/PATH; plain http only to 127.0.0.1 or localhost");
        }
    }
}

/// Alarms tell who spends how much: they leave this machine encrypted only.
fn is_webhook(url: &str) -> bool {
    let (rest, local) = match (url.strip_prefix("https://"), url.strip_prefix("http://")) {
        (Some(rest), _) => (rest, false),
        (None, Some(rest)) => (rest, true),
        (None, None) => return false,
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let (host, port) = authority.rsplit_once(':').map_or((authority, None), |(host, port)| (host, Some(port)));
    let plain = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) && !host.is_empty();
    let visible = url.len() <= 2_048 && url.bytes().all(|b| b.is_ascii_graphic());
    plain && visible && port.is_none_or(|port| port.parse::<u16>().is_ok()) && (!local || matches!(host, "127.0.0.1" | "localhost"))
}

/// A team: its keys may never be more than this.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Team {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// What every key of the team is limited to, whatever else it allows.
    #[serde(deserialize_with = "object")]
    pub allow: Allow,
    /// Most keys that are neither revoked nor expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_keys: Option<u32>,
    /// Largest budget of one key, in dollars; a key of the team must then have a budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "100.00")]
    pub max_key_usd: Option<String>,
    /// Longest life of one key, such as `30d`; a key of the team must then expire.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "30d")]
    pub max_expires_in: Option<String>,
    /// What all keys of the team may spend together.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Budget>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<Quota>,
    #[serde(skip_serializing_if = "Rates::is_none", deserialize_with = "object")]
    pub rates: Rates,
}

impl Team {
    /// What its limits mean, or everything that is wrong with them.
    pub fn limits(&self) -> Result<Limits, Vec<Fault>> {
        parse_limits(&self.budgets, &self.quotas, &self.rates)
    }
}

impl Object for Team {
    const KIND: Kind = Kind::Team;
    fn check(&self, at: &str, _: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.label(&self.label);
        faults.allow(&self.allow);
        faults.result("max_key_usd", self.max_key_usd.as_deref().map(parse_usd).transpose());
        faults.result("max_expires_in", self.max_expires_in.as_deref().map(parse_duration).transpose());
        faults.limits(self.limits());
    }
}

/// A policy. Everything in it holds for every key that names it, from now on, beside the key's own: of two limits the lower
/// binds. Only the expiry is what a new key gets when it brings none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    #[serde(deserialize_with = "object")]
    pub allow: Allow,
    /// What each key may spend.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Budget>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<Quota>,
    #[serde(skip_serializing_if = "Rates::is_none", deserialize_with = "object")]
    pub rates: Rates,
    /// `shadow`: its keys are refused nothing that a limit or a list would refuse; it is only recorded.
    #[serde(skip_serializing_if = "Enforce::is_default")]
    pub enforce: Enforce,
    /// `30s`, `10m`, `12h`, `7d`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "10m")]
    pub expires_in: Option<String>,
    /// How many milliseconds a request may be held back while no credential of its pool can be used, 0 to 60000; default: 0, it is
    /// refused at once with the time after which to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(maximum = 60_000)]
    pub wait_ms: Option<u64>,
    /// Provider to pool. A provider that is not named uses all its credentials.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pools: BTreeMap<String, String>,
}

impl Policy {
    /// What its limits mean, or everything that is wrong with them.
    pub fn limits(&self) -> Result<Limits, Vec<Fault>> {
        parse_limits(&self.budgets, &self.quotas, &self.rates)
    }
}

impl Object for Policy {
    const KIND: Kind = Kind::Policy;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.label(&self.label);
        faults.allow(&self.allow);
        faults.limits(self.limits());
        faults.result("expires_in", self.expires_in.as_deref().map(parse_duration).transpose());
        if self.wait_ms.is_some_and(|wait_ms| wait_ms > MOST_WAIT_MS) {
            faults.add("wait_ms", format!("must be 0 to {MOST_WAIT_MS}"));
        }
        for (provider, pool) in &self.pools {
            let field = format!("pools.{provider}");
            match all.pools.get(pool) {
                _ if !all.knows_provider(provider) => faults.add(&field, all.unknown_provider(provider)),
                None => faults.add(&field, format!("there is no pool {pool:?}")),
                Some(found) if found.provider != *provider => faults.add(&field, format!("the pool {pool:?} is one of {}", found.provider)),
                Some(_) => {}
            }
        }
    }
}
