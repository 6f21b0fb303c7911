//! An organisation's configuration: what `keyward.yaml` says, what `PUT /v1/config` takes, what the store keeps.
//! Types, the check that everything named exists, and the difference between two configurations. No I/O.

mod difference;
mod limits;
mod parties;
pub mod patch;
mod prices;
mod supply;

pub use self::difference::{Action, Difference, FieldChange, field_changes};
pub use self::limits::{Budget, Enforce, Quota, Rates, parse_limits, parse_usd, written};
pub use self::parties::{Allow, OrganisationSettings, Policy, Team};
pub use self::prices::{LongPrompt, OwnPrice};
pub use self::supply::{Affinity, Credential, Pool, ProviderDialect, ProviderSettings, Route, RouteTarget, Unsupported, check_secret};

use keyward_core::limits::Limits;
use keyward_core::operation::{PROVIDERS, Provider, is_provider_name};
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
        let message = || "a provider is named by 1 to 64 lower-case letters, digits and -, and begins with a letter".to_owned();
        return is_provider_name(name).then_some(()).ok_or_else(message);
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

impl Document {
    /// Whether there is a provider of this name: built in, or defined here.
    pub fn knows_provider(&self, name: &str) -> bool {
        Provider::by_name(name).is_some() || self.providers.get(name).is_some_and(|settings| settings.dialect.is_some())
    }

    /// Names of all providers.
    pub fn provider_names(&self) -> Vec<&str> {
        let built_in = PROVIDERS.iter().map(|provider| provider.name);
        let own = self.providers.iter().filter(|(name, settings)| settings.dialect.is_some() && Provider::by_name(name).is_none());
        built_in.chain(own.map(|(name, _)| name.as_str())).collect()
    }

    pub fn unknown_provider(&self, name: &str) -> String {
        format!("there is no provider {name:?}; there are {}", self.provider_names().join(", "))
    }
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

    fn limits(&mut self, limits: Result<Limits, Vec<Fault>>) {
        if let Err(faults) = limits {
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
            "policies": {"p": {"pools": {"openai": "prod"}, "budgets": [{"usd": "5.00", "window": "total"}], "expires_in": "10m", "wait_ms": 60_000}},
            "routes": {"fast": {"targets": [{"provider": "openai", "model": "gpt-4o-mini", "pool": "prod"}]}},
            "providers": {"openai": {"url": "http://127.0.0.1:9000", "prices": {"gpt-4o": {"input": "2.50", "output": "10.00"}}}},
        });
        assert_eq!(fields(good), [""; 0]);
        let bad = serde_json::json!({
            "teams": {"bad name": {}, "t": {"max_key_usd": "-1", "max_expires_in": "soon", "allow": {"endpoints": ["chat"]}}},
            "credentials": {"main": {"provider": "nobody", "from": "OPENAI_API_KEY", "secret": "vk_x"}},
            "pools": {"prod": {"provider": "openai", "credentials": ["main", "other"]}, "empty": {"provider": "openai", "credentials": []}},
            "policies": {"p": {"pools": {"openai": "none"}, "budgets": [{"usd": "5.00", "window": "week"}], "quotas": [{"window": "day"}], "wait_ms": 60_001}},
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
                "policies.p.wait_ms",
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
