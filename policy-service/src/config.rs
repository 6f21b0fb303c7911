//! An organisation's configuration: what `keyward.yaml` says, what `PUT /v1/config` takes, what the store keeps.
//! Types, the check that everything named exists, and the difference between two configurations. No I/O.

use crate::prices;
use keyward_core::admission;
use keyward_core::limits::{self, Limits, Window};
use keyward_core::money::Nanodollars;
use keyward_core::operation::Provider;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;
use utoipa::ToSchema;

/// Longest name of a team, policy, pool, credential or route.
const MAX_NAME: usize = 128;
/// The one name of an organisation's own settings.
pub const ORGANISATION_OBJECT: &str = "organisation";
/// Most a quota or rate may say.
const MOST_COUNT: u64 = 1_000_000_000_000_000;
/// Most a budget may say, in nanodollars: a billion dollars, so that no sum of holds under it leaves its type.
const MOST: Nanodollars = Nanodollars(1_000_000_000_000_000_000);

/// The whole configuration. What it no longer names is removed, if an earlier `apply` made it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Document {
    /// Limits of all keys together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub organisation: Option<OrganisationSettings>,
    /// Who uses keys, and what their keys may be.
    pub teams: BTreeMap<String, Team>,
    /// Templates and limits of keys.
    pub policies: BTreeMap<String, Policy>,
    /// Settings of the built-in providers.
    pub providers: BTreeMap<String, ProviderSettings>,
    /// Real credentials, by reference.
    pub credentials: BTreeMap<String, Credential>,
    /// Ordered sets of credentials of one provider.
    pub pools: BTreeMap<String, Pool>,
    /// Model names of your own.
    pub routes: BTreeMap<String, Route>,
}

impl Document {
    /// The organisation's settings, as the other kinds are: by name.
    pub fn organisation_by_name(&self) -> BTreeMap<String, OrganisationSettings> {
        self.organisation.iter().map(|settings| (ORGANISATION_OBJECT.to_owned(), settings.clone())).collect()
    }
}

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

/// A hard cap in money.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Dollars, such as `"25.00"`.
    #[schema(example = "25.00")]
    pub usd: String,
    /// `day` and `month` begin at 00:00 UTC; `total` has no end.
    #[schema(example = "total")]
    pub window: String,
}

/// A cap in requests, tokens or both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Tokens of input and output together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// `day` and `month` begin at 00:00 UTC; `total` has no end.
    #[schema(example = "day")]
    pub window: String,
}

/// Limits over any 60 seconds, and at any moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Requests in any 60 seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u64>,
    /// Tokens in any 60 seconds; requests in flight count with all they may come to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    /// Requests at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<u64>,
}

impl Rates {
    fn is_none(&self) -> bool {
        *self == Rates::default()
    }
}

impl From<limits::Rates> for Rates {
    fn from(rates: limits::Rates) -> Self {
        Rates { rpm: rates.rpm, tpm: rates.tpm, max_in_flight: rates.max_in_flight }
    }
}

/// What a refused limit does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Enforce {
    #[default]
    Enforce,
    /// Everything is decided, recorded and measured; nothing is refused.
    Shadow,
}

impl Enforce {
    fn is_default(&self) -> bool {
        *self == Enforce::default()
    }
}

impl From<Enforce> for limits::Enforce {
    fn from(enforce: Enforce) -> Self {
        match enforce {
            Enforce::Enforce => limits::Enforce::Enforce,
            Enforce::Shadow => limits::Enforce::Shadow,
        }
    }
}

impl From<limits::Enforce> for Enforce {
    fn from(enforce: limits::Enforce) -> Self {
        match enforce {
            limits::Enforce::Enforce => Enforce::Enforce,
            limits::Enforce::Shadow => Enforce::Shadow,
        }
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
    #[serde(skip_serializing_if = "Rates::is_none")]
    pub rates: Rates,
}

/// A team: its keys may never be more than this.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Team {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// What every key of the team is limited to, whatever else it allows.
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
    #[serde(skip_serializing_if = "Rates::is_none")]
    pub rates: Rates,
}

/// A policy. Everything in it holds for every key that names it, from now on, beside the key's own: of two limits the lower
/// binds. Only the expiry is what a new key gets when it brings none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    pub allow: Allow,
    /// What each key may spend.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Budget>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<Quota>,
    #[serde(skip_serializing_if = "Rates::is_none")]
    pub rates: Rates,
    /// `shadow`: its keys are refused nothing that a limit or a list would refuse; it is only recorded.
    #[serde(skip_serializing_if = "Enforce::is_default")]
    pub enforce: Enforce,
    /// `30s`, `10m`, `12h`, `7d`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "10m")]
    pub expires_in: Option<String>,
    /// Provider to pool. A provider that is not named uses all its credentials.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pools: BTreeMap<String, String>,
}

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

/// What a model costs: dollars as text, exact, for a million tokens unless it says otherwise. Needs `input` and `output`, or one of
/// `characters`, `seconds`, `picture`. Prices are all from here; of `context`, `max_output`, `mode` and `reasoning`, what is not said is
/// the price table's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OwnPrice {
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2.50")]
    pub input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "10.00")]
    pub output: Option<String>,
    /// Input read from a cache; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_read: Option<String>,
    /// Input written to a cache; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<String>,
    /// Input written to a cache that is kept for an hour; default: `cache_write`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<String>,
    /// Input that is sound; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_input: Option<String>,
    /// Input that is pictures; default: `input`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_input: Option<String>,
    /// Output that is sound; default: `output`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audio_output: Option<String>,
    /// Prices of a request whose input is longer than this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub long_prompt: Option<LongPrompt>,
    /// For a million characters of text to speak.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub characters: Option<String>,
    /// For a million seconds of a recording.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<String>,
    /// For one picture, whatever its size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub picture: Option<String>,
    /// Most input tokens that the model takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u64>,
    /// Most output tokens of an answer. A model without one can't be used on a budget.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_output: Option<u64>,
    /// What it is made for: `chat`, `responses`, `completion`, `embedding`, `moderation`, `image`, `speech` or `transcription`;
    /// default: the price table's, else `chat`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// It thinks in tokens that nobody sees: a stream that is cut is charged in full. Default: the price table's, else `true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<bool>,
}

/// Prices of long prompts, for all tokens of such a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LongPrompt {
    /// Input tokens above which they hold.
    pub above: u64,
    pub input: String,
    pub output: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_read: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_write_1h: Option<String>,
}

/// A real credential.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Credential {
    #[schema(example = "openai")]
    pub provider: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// The provider's account whose limits it shares; default: its own.
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

/// An ordered set of credentials of one provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    #[schema(example = "openai")]
    pub provider: String,
    /// Names (or ids) of credentials, the first is tried first.
    pub credentials: Vec<String>,
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

/// The kinds of objects that are nothing but configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Organisation,
    Team,
    Policy,
    Provider,
    Credential,
    Pool,
    Route,
}

impl Kind {
    pub const ALL: [Kind; 7] = [Kind::Organisation, Kind::Team, Kind::Policy, Kind::Provider, Kind::Credential, Kind::Pool, Kind::Route];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Organisation => "organisation",
            Kind::Team => "team",
            Kind::Policy => "policy",
            Kind::Provider => "provider",
            Kind::Credential => "credential",
            Kind::Pool => "pool",
            Kind::Route => "route",
        }
    }

    /// Its key in the document, and its collection in the API.
    pub fn section(self) -> &'static str {
        match self {
            Kind::Organisation => "organisation",
            Kind::Team => "teams",
            Kind::Policy => "policies",
            Kind::Provider => "providers",
            Kind::Credential => "credentials",
            Kind::Pool => "pools",
            Kind::Route => "routes",
        }
    }

    /// Path of an object in the document.
    pub fn at(self, name: &str) -> String {
        match self {
            Kind::Organisation => self.section().to_owned(),
            _ => format!("{}.{name}", self.section()),
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Something wrong in a document: where, and what would be right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// Path of the field: `policies.research.budgets[0].usd`.
    pub field: String,
    pub message: String,
}

/// One object that is kept as JSON.
pub trait Object: Serialize + DeserializeOwned + Clone + PartialEq {
    const KIND: Kind;
    /// What is wrong with it, alone and next to all others. `at` is its own path.
    fn check(&self, at: &str, all: &Document, faults: &mut Vec<Fault>);
}

/// Everything that is wrong with a document.
pub fn check(document: &Document) -> Vec<Fault> {
    let mut faults = Vec::new();
    fn each<T: Object>(map: &BTreeMap<String, T>, all: &Document, faults: &mut Vec<Fault>) {
        for (name, object) in map {
            let at = T::KIND.at(name);
            if let Err(message) = check_name(T::KIND, name) {
                faults.push(Fault { field: at.clone(), message });
            }
            object.check(&at, all, faults);
        }
    }
    each(&document.organisation_by_name(), document, &mut faults);
    each(&document.teams, document, &mut faults);
    each(&document.policies, document, &mut faults);
    each(&document.providers, document, &mut faults);
    each(&document.credentials, document, &mut faults);
    each(&document.pools, document, &mut faults);
    each(&document.routes, document, &mut faults);
    faults
}

/// Names stand in paths and in other objects. Routes are model names: they may have dots, colons and slashes as well.
pub fn check_name(kind: Kind, name: &str) -> Result<(), String> {
    let extra: &[u8] = if kind == Kind::Route { b"-_.:/" } else { b"-_." };
    let fits = |b: u8| b.is_ascii_alphanumeric() || extra.contains(&b);
    if kind == Kind::Organisation && name == ORGANISATION_OBJECT {
        return Ok(());
    }
    if kind == Kind::Provider {
        return Provider::by_name(name).map(|_| ()).ok_or_else(|| unknown_provider(name));
    }
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.bytes().all(fits)
        || !name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
    {
        return Err(format!("a {} is named by 1 to {MAX_NAME} letters, digits, - _ . and begins with a letter or digit", kind.name()));
    }
    Ok(())
}

fn unknown_provider(name: &str) -> String {
    let known: Vec<&str> = keyward_core::operation::PROVIDERS.iter().map(|p| p.name).collect();
    format!("there is no provider {name:?}; there are {}", known.join(", "))
}

struct Faults<'a> {
    at: &'a str,
    out: &'a mut Vec<Fault>,
}

impl Faults<'_> {
    fn add(&mut self, field: &str, message: impl Into<String>) {
        let dot = if field.is_empty() || field.starts_with('[') { "" } else { "." };
        self.out.push(Fault { field: format!("{}{dot}{field}", self.at), message: message.into() });
    }

    fn result<T>(&mut self, field: &str, result: Result<T, String>) {
        if let Err(message) = result {
            self.add(field, message);
        }
    }

    fn label(&mut self, label: &str) {
        if label.len() > 200 {
            self.add("label", "must be at most 200 bytes");
        }
    }

    fn limits(&mut self, budgets: &[Budget], quotas: &[Quota], rates: &Rates) {
        if let Err(faults) = parse_limits(budgets, quotas, rates) {
            faults.into_iter().for_each(|fault| self.add(&fault.field, fault.message));
        }
    }

    fn allow(&mut self, allow: &Allow) {
        for (list, items) in [("models", &allow.models), ("endpoints", &allow.endpoints)] {
            for (i, item) in items.iter().enumerate() {
                if item.is_empty() || item.len() > 256 {
                    self.add(&format!("allow.{list}[{i}]"), "must be 1 to 256 bytes");
                }
            }
            if items.len() > 1_000 {
                self.add(&format!("allow.{list}"), "must be at most 1000 entries");
            }
        }
        for (i, endpoint) in allow.endpoints.iter().enumerate() {
            if endpoint != "*" && !endpoint.contains(' ') && !endpoint.contains('*') {
                self.add(&format!("allow.endpoints[{i}]"), "expected \"METHOD /path\", such as \"POST /v1/chat/completions\"");
            }
        }
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
        faults.limits(&self.budgets, &self.quotas, &self.rates);
    }
}

impl Object for OrganisationSettings {
    const KIND: Kind = Kind::Organisation;
    fn check(&self, at: &str, _: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.limits(&self.budgets, &self.quotas, &self.rates);
        if self.webhook.as_deref().is_some_and(|url| !is_webhook(url)) {
            faults.add("webhook", "expected https://HOST/PATH; plain http only to 127.0.0.1 or localhost");
        }
    }
}

impl Object for Policy {
    const KIND: Kind = Kind::Policy;
    fn check(&self, at: &str, all: &Document, out: &mut Vec<Fault>) {
        let mut faults = Faults { at, out };
        faults.label(&self.label);
        faults.allow(&self.allow);
        faults.limits(&self.budgets, &self.quotas, &self.rates);
        faults.result("expires_in", self.expires_in.as_deref().map(parse_duration).transpose());
        for (provider, pool) in &self.pools {
            let field = format!("pools.{provider}");
            match all.pools.get(pool) {
                _ if Provider::by_name(provider).is_none() => faults.add(&field, unknown_provider(provider)),
                None => faults.add(&field, format!("there is no pool {pool:?}")),
                Some(found) if found.provider != *provider => faults.add(&field, format!("the pool {pool:?} is one of {}", found.provider)),
                Some(_) => {}
            }
        }
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

/// Dollars, at most a billion.
pub fn parse_usd(usd: &str) -> Result<Nanodollars, String> {
    let amount = Nanodollars::parse_usd(usd).filter(|amount| *amount <= MOST);
    amount.ok_or_else(|| "expected dollars such as \"50.00\", at most a billion".to_owned())
}

/// The limits that these lists mean, or everything that is wrong with them.
pub fn parse_limits(budgets: &[Budget], quotas: &[Quota], rates: &Rates) -> Result<Limits, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut fault = |field: String, message: String| faults.push(Fault { field, message });
    let mut limits = Limits::default();
    for (i, budget) in budgets.iter().enumerate() {
        let (window, cap) = (parse_window(&budget.window), parse_usd(&budget.usd));
        if let Ok(window) = window
            && limits.budget(window).is_some()
        {
            fault(format!("budgets[{i}].window"), format!("there is a budget for {:?} already", budget.window));
        }
        match (window, cap) {
            (Ok(window), Ok(cap)) => limits.budgets.push(limits::Budget { window, cap }),
            (window, cap) => {
                window.err().into_iter().for_each(|message| fault(format!("budgets[{i}].window"), message));
                cap.err().into_iter().for_each(|message| fault(format!("budgets[{i}].usd"), message));
            }
        }
    }
    let too_much = |n: Option<u64>| n.is_some_and(|n| n > MOST_COUNT);
    for (i, quota) in quotas.iter().enumerate() {
        let at = format!("quotas[{i}]");
        if quota.requests.is_none() && quota.tokens.is_none() {
            fault(at.clone(), "needs \"requests\", \"tokens\" or both".to_owned());
        }
        for (field, _) in [("requests", quota.requests), ("tokens", quota.tokens)].into_iter().filter(|(_, n)| too_much(*n)) {
            fault(format!("{at}.{field}"), format!("must be at most {MOST_COUNT}"));
        }
        match parse_window(&quota.window) {
            Ok(window) if limits.quotas.iter().any(|quota| quota.window == window) => {
                fault(format!("{at}.window"), format!("there is a quota for {:?} already", quota.window));
            }
            Ok(window) => limits.quotas.push(limits::Quota { window, requests: quota.requests, tokens: quota.tokens }),
            Err(message) => fault(format!("{at}.window"), message),
        }
    }
    let Rates { rpm, tpm, max_in_flight } = *rates;
    for (field, _) in [("rpm", rpm), ("tpm", tpm), ("max_in_flight", max_in_flight)].into_iter().filter(|(_, n)| too_much(*n)) {
        fault(format!("rates.{field}"), format!("must be at most {MOST_COUNT}"));
    }
    limits.rates = limits::Rates { rpm, tpm, max_in_flight };
    if faults.is_empty() { Ok(limits) } else { Err(faults) }
}

/// Limits as they are written.
pub fn written(limits: &Limits) -> (Vec<Budget>, Vec<Quota>, Rates) {
    let budgets = limits.budgets.iter().map(|b| Budget { usd: b.cap.to_usd(), window: b.window.name().to_owned() });
    let quotas = limits.quotas.iter().map(|q| Quota { requests: q.requests, tokens: q.tokens, window: q.window.name().to_owned() });
    (budgets.collect(), quotas.collect(), limits.rates.into())
}

/// What changes in the rates; a field that is absent stays, `null` takes it away.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeRates {
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    rpm: Option<Option<u64>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    tpm: Option<Option<u64>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<u64>)]
    max_in_flight: Option<Option<u64>>,
}

/// Tells `null` from absent.
fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<u64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// Merges a change into rates; none clears them.
pub fn merge_rates(change: Option<&ChangeRates>, rates: Rates) -> Rates {
    let Some(change) = change else { return Rates::default() };
    Rates {
        rpm: change.rpm.unwrap_or(rates.rpm),
        tpm: change.tpm.unwrap_or(rates.tpm),
        max_in_flight: change.max_in_flight.unwrap_or(rates.max_in_flight),
    }
}

fn parse_window(window: &str) -> Result<Window, String> {
    let known = Window::ALL.into_iter().find(|known| known.name() == window);
    known.ok_or_else(|| "expected \"day\", \"month\" or \"total\"".to_owned())
}

/// `30s`, `10m`, `12h`, `7d`; at most ten years.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a duration such as \"30s\", \"10m\", \"12h\" or \"7d\", at most \"3650d\"".to_owned();
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let digits = text.strip_suffix(unit).filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())).ok_or_else(wrong)?;
    let number: u32 = digits.parse().map_err(|_| wrong())?;
    let total = u64::from(number) * seconds;
    if total > 3_650 * 86_400 { Err(wrong()) } else { Ok(Duration::from_secs(total)) }
}

/// What an `apply` would do to one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Create,
    Update,
    Delete,
}

/// One object that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Difference {
    pub action: Action,
    pub kind: Kind,
    pub name: String,
    /// Fields that differ, by path, with what they were and will be. A secret is only said to differ.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldChange>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldChange {
    pub field: String,
    pub from: serde_json::Value,
    pub to: serde_json::Value,
}

/// The fields in which two JSON values differ.
pub fn field_changes(from: &serde_json::Value, to: &serde_json::Value) -> Vec<FieldChange> {
    fn walk(at: &str, from: &serde_json::Value, to: &serde_json::Value, out: &mut Vec<FieldChange>) {
        use serde_json::Value::{Null, Object};
        if let (Object(a), Object(b)) = (from, to) {
            let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for name in names {
                let dot = if at.is_empty() { "" } else { "." };
                walk(&format!("{at}{dot}{name}"), a.get(name).unwrap_or(&Null), b.get(name).unwrap_or(&Null), out);
            }
        } else if from != to {
            out.push(FieldChange { field: at.to_owned(), from: from.clone(), to: to.clone() });
        }
    }
    let mut out = Vec::new();
    walk("", from, to, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(json: serde_json::Value) -> Document {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn every_name_must_lead_somewhere() {
        let fields = |json| check(&document(json)).into_iter().map(|fault| fault.field).collect::<Vec<_>>();
        let good = serde_json::json!({
            "teams": {"search": {"max_key_usd": "10.00", "max_expires_in": "30d"}},
            "credentials": {"main": {"provider": "openai", "from": "env:OPENAI_API_KEY"}},
            "pools": {"prod": {"provider": "openai", "credentials": ["main"]}},
            "policies": {"p": {"pools": {"openai": "prod"}, "budgets": [{"usd": "5.00", "window": "total"}], "expires_in": "10m"}},
            "routes": {"fast": {"targets": [{"provider": "openai", "model": "gpt-4o-mini", "pool": "prod"}]}},
            "providers": {"openai": {"url": "http://127.0.0.1:9000", "prices": {"gpt-4o": {"input": "2.50", "output": "10.00"}}}},
        });
        assert_eq!(fields(good), [""; 0]);
        let bad = serde_json::json!({
            "teams": {"bad name": {}, "t": {"max_key_usd": "-1", "max_expires_in": "soon", "allow": {"endpoints": ["chat"]}}},
            "credentials": {"main": {"provider": "nobody", "from": "OPENAI_API_KEY", "secret": "vk_x"}},
            "pools": {"prod": {"provider": "openai", "credentials": ["main", "other"]}, "empty": {"provider": "openai", "credentials": []}},
            "policies": {"p": {"pools": {"openai": "none"}, "budgets": [{"usd": "5.00", "window": "week"}], "quotas": [{"window": "day"}]}},
            "routes": {"fast": {"targets": []}, "slow": {"targets": [{"provider": "x", "model": "", "pool": "none"}]}},
            "providers": {"openai": {"url": "example.com", "prices": {"gpt-4o": {"input": "2,50", "output": "10"}}}, "mine": {}},
        });
        assert_eq!(
            fields(bad),
            [
                "teams.bad name",
                "teams.t.allow.endpoints[0]",
                "teams.t.max_key_usd",
                "teams.t.max_expires_in",
                "policies.p.budgets[0].window",
                "policies.p.quotas[0]",
                "policies.p.pools.openai",
                "providers.mine",
                "providers.openai.url",
                "providers.openai.prices.gpt-4o.input",
                "credentials.main.provider",
                "credentials.main.from",
                "credentials.main.secret",
                "pools.empty.credentials",
                "pools.prod.credentials[0]",
                "pools.prod.credentials[1]",
                "routes.fast.targets",
                "routes.slow.targets[0].provider",
                "routes.slow.targets[0].model",
                "routes.slow.targets[0].pool",
            ]
        );
    }

    #[test]
    fn durations_have_a_unit_and_an_end() {
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        for bad in ["", "10", "m", "-1m", "+1m", "1.5h", "4000d", "99999999999s", "10m "] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_difference_names_its_fields() {
        let (from, to) = (serde_json::json!({"a": {"b": 1, "c": 2}}), serde_json::json!({"a": {"b": 1, "c": 3}, "d": []}));
        let fields: Vec<_> = field_changes(&from, &to).into_iter().map(|change| change.field).collect();
        assert_eq!(fields, ["a.c", "d"]);
    }

    #[test]
    fn a_secret_does_not_print() {
        let credential =
            Credential { provider: "openai".into(), label: String::new(), account: None, from: None, secret: Some("sk-real".into()) };
        assert!(!format!("{credential:?}").contains("sk-real"));
    }
}
