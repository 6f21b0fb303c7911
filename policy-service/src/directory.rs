//! Every organisation's configuration as it stands, held in memory: admissions read it, edits replace it.

use crate::config::{Affinity, Document, Kind, Pool, Route};
use crate::prices::OwnPrices;
use keyward_core::admission::Allow;
use keyward_core::edge::{PlanCredential, Secret};
use keyward_core::limits::{Enforce, Limits};
use keyward_core::operation::{Dialect, Provider, Site};
use keyward_core::price::{Mode, Price, PriceTable};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// All organisations by id.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    pub organisations: HashMap<String, Arc<Organisation>>,
}

/// One organisation's configuration.
#[derive(Debug, Clone, Default)]
pub struct Organisation {
    pub label: String,
    /// Counts changes; stands in every admission.
    pub rev: u64,
    /// Credentials stand in it without their secrets.
    pub document: Document,
    /// What the document does not say of each object.
    pub meta: BTreeMap<(Kind, String), Meta>,
    /// Names of credentials in the order in which they were stored.
    pub order: Vec<String>,
    /// Ids and providers of credentials that are in memory only, after the stored ones.
    pub lent: Vec<(String, String)>,
    /// By the id of a credential, the account at the provider that it shares with others, named as no other organisation's or
    /// provider's is. One that is not here has an account to itself.
    pub accounts: HashMap<String, String>,
    /// What the document's limits mean.
    pub in_force: InForce,
    /// The document's prices, read.
    pub prices: OwnPrices,
}

/// The limits that a document sets, read once.
#[derive(Debug, Clone, Default)]
pub struct InForce {
    pub organisation: Limits,
    pub teams: HashMap<String, Limits>,
    pub policies: HashMap<String, PolicyInForce>,
}

#[derive(Debug, Clone, Default)]
pub struct PolicyInForce {
    pub limits: Limits,
    pub enforce: Enforce,
}

impl InForce {
    /// `None`: a document that was never checked.
    pub fn of(document: &Document) -> Option<Self> {
        let settings = document.organisation.clone().unwrap_or_default();
        let mut in_force = InForce { organisation: settings.limits().ok()?, ..InForce::default() };
        for (name, team) in &document.teams {
            in_force.teams.insert(name.clone(), team.limits().ok()?);
        }
        for (name, policy) in &document.policies {
            in_force.policies.insert(name.clone(), PolicyInForce { limits: policy.limits().ok()?, enforce: policy.enforce.into() });
        }
        Some(in_force)
    }
}

/// An account's name that no other organisation or provider has: `ORGANISATION/PROVIDER/NAME`. In the name a slash is written as
/// `%2F`: what follows it is a model.
pub fn shared_account(organisation: &str, provider: &str, name: &str) -> String {
    format!("{organisation}/{provider}/{}", name.replace('%', "%25").replace('/', "%2F"))
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// The id of a credential; for all else the name.
    pub id: String,
    pub version: u64,
    /// Made by `apply`.
    pub managed: bool,
    pub created_ms: u64,
    pub updated_ms: u64,
}

/// Why no credential can be named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoCredential {
    None,
    /// The pool that a policy or route names is gone or is another provider's.
    Pool(String),
}

impl Organisation {
    pub fn meta(&self, kind: Kind, name: &str) -> Option<&Meta> {
        self.meta.get(&(kind, name.to_owned()))
    }

    /// The lists that limit a key beside its own: its policy's and its team's. `None`: one of them does not exist.
    pub fn limits(&self, team: Option<&str>, policy: Option<&str>) -> Option<Vec<Allow>> {
        let team = team.map(|name| self.document.teams.get(name).map(|team| &team.allow));
        let policy = policy.map(|name| self.document.policies.get(name).map(|policy| &policy.allow));
        let mut limits = Vec::new();
        for allow in [team, policy].into_iter().flatten() {
            limits.push(Allow::from(allow?));
        }
        Some(limits)
    }

    /// Where alarms are sent.
    pub fn webhook(&self) -> Option<String> {
        self.document.organisation.as_ref()?.webhook.clone()
    }

    /// Whether a key may keep state at providers: its own list or its policy's says so, and its team's does not forbid it.
    pub fn allows_state(&self, own: bool, team: Option<&str>, policy: Option<&str>) -> bool {
        let of_policy = policy.and_then(|name| self.document.policies.get(name)).is_some_and(|policy| policy.allow.state);
        let of_team = team.is_none_or(|name| self.document.teams.get(name).is_some_and(|team| team.allow.state));
        (own || of_policy) && of_team
    }

    /// What a model costs in an operation that is made for models of these `modes`: what the organisation says, else the table's, else
    /// what stands in for a model that nobody lists.
    pub fn price<'a>(&self, table: &'a PriceTable, provider: &str, model: &str, modes: &[Mode]) -> Option<Cow<'a, Price>> {
        let own = self.prices.find(table, provider, model, modes).map(Cow::Owned);
        own.or_else(|| table.price(provider, model, modes))
    }

    pub fn is_enabled(&self, provider: &str) -> bool {
        self.document.providers.get(provider).is_none_or(|settings| settings.enabled)
    }

    /// What a provider speaks. `None`: there is none of this name, or nobody says where it is.
    pub fn dialect(&self, provider: &str) -> Option<Dialect> {
        match self.site(provider) {
            Some(site) => Some(site.dialect),
            None => Provider::by_name(provider).filter(|known| !known.host.is_empty()).map(|known| known.dialect),
        }
    }

    /// Where a provider is, if it is not just as it is built in.
    pub fn site(&self, provider: &str) -> Option<Site> {
        self.document.providers.get(provider)?.site(provider)
    }

    /// Where a model name of the organisation's own leads.
    pub fn route(&self, model: &str) -> Option<&Route> {
        self.document.routes.get(model)
    }

    /// Whether any credential of a provider is there.
    pub fn has_credential(&self, provider: &str) -> bool {
        self.document.credentials.values().any(|credential| credential.provider == provider)
            || self.lent.iter().any(|(_, of)| of == provider)
    }

    /// Ids of the credentials to try, in order: those of `pool`, or of the pool that the policy names, or all of the provider.
    pub fn credentials(&self, provider: &str, policy: Option<&str>, pool: Option<&str>) -> Result<Vec<String>, NoCredential> {
        let ids: Vec<String> = match self.pool_name(provider, policy, pool) {
            Some(name) => {
                let pool = self.pool(provider, name).ok_or_else(|| NoCredential::Pool(name.to_owned()))?;
                pool.credentials.iter().filter_map(|name| self.credential_id(name)).collect()
            }
            None => {
                let of_provider =
                    |name: &&String| self.document.credentials.get(name.as_str()).is_some_and(|credential| credential.provider == provider);
                let stored = self.order.iter().filter(of_provider).filter_map(|name| self.credential_id(name));
                let lent = self.lent.iter().filter(|(_, of)| of == provider).map(|(id, _)| id.clone());
                stored.chain(lent).collect()
            }
        };
        if ids.is_empty() { Err(NoCredential::None) } else { Ok(ids) }
    }

    /// Whether each key has an order of its own in which it tries the credentials that it may use.
    pub fn goes_by_key(&self, provider: &str, policy: Option<&str>, pool: Option<&str>) -> bool {
        let pool = self.pool_name(provider, policy, pool).and_then(|name| self.pool(provider, name));
        pool.is_some_and(|pool| pool.affinity == Affinity::Key)
    }

    /// How long requests of a policy may wait for a credential, in milliseconds.
    pub fn wait_ms(&self, policy: Option<&str>) -> u64 {
        policy.and_then(|name| self.document.policies.get(name)).and_then(|policy| policy.wait_ms).unwrap_or(0)
    }

    fn pool_name<'a>(&'a self, provider: &str, policy: Option<&str>, pool: Option<&'a str>) -> Option<&'a str> {
        pool.or_else(|| self.document.policies.get(policy?)?.pools.get(provider).map(String::as_str))
    }

    fn pool(&self, provider: &str, name: &str) -> Option<&Pool> {
        self.document.pools.get(name).filter(|pool| pool.provider == provider)
    }

    /// Ids and providers of all credentials.
    pub fn all_credentials(&self) -> impl Iterator<Item = (&str, &str)> {
        let provider = |name: &str| self.document.credentials.get(name).map(|credential| credential.provider.as_str());
        let stored = self.order.iter().filter_map(move |name| Some((self.meta(Kind::Credential, name)?.id.as_str(), provider(name)?)));
        stored.chain(self.lent.iter().map(|(id, provider)| (id.as_str(), provider.as_str())))
    }

    /// A credential's name; that of one that is lent is its id.
    pub fn name_of(&self, id: &str) -> Option<&str> {
        let stored = self.order.iter().find(|name| self.meta(Kind::Credential, name).is_some_and(|meta| meta.id == id));
        stored.or_else(|| self.lent.iter().map(|(lent, _)| lent).find(|lent| *lent == id)).map(String::as_str)
    }

    /// A credential as the gates' names of states have it: without its secret.
    pub fn plain(&self, id: &str) -> PlanCredential {
        PlanCredential { id: id.to_owned(), secret: Secret(String::new()), account: self.accounts.get(id).cloned() }
    }

    fn credential_id(&self, name: &str) -> Option<String> {
        self.meta(Kind::Credential, name).map(|meta| meta.id.clone())
    }
}
