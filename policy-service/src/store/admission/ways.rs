//! Where an admitted request goes: to which targets, with which credentials there.

use super::super::objects::{self, References};
use super::super::{Admit, StoreError, Target};
use super::Found;
use super::Ledger;
use crate::aims::{Place, Places};
use crate::config::RouteTarget;
use crate::directory::{NoCredential, Organisation};
use keyward_core::admission::{self, Allow};
use keyward_core::edge::Ask;
use keyward_core::keyring::At;
use keyward_core::models::{self, Listed};
use keyward_core::operation::Dialect;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::verdict::Scope;
use sha2::{Digest, Sha256};

/// Where an admitted request goes.
#[derive(Default)]
pub(super) struct Way {
    pub targets: Vec<Target>,
    /// Of each target, its place among those that the request may go to.
    pub usable: Vec<usize>,
    pub in_order: bool,
    pub wait_ms: u64,
    pub state: bool,
    pub answer: Option<String>,
    pub first_byte_ms: Option<u64>,
    pub drops: bool,
}

impl Ledger<'_> {
    /// Where a request goes that may be made: which targets with which credentials, which state, or the answer itself.
    pub(super) fn way(
        &self,
        organisation: &Organisation,
        key: &Found,
        admit: &Admit,
        places: &Places<'_>,
    ) -> Result<Result<Way, Refusal>, StoreError> {
        let ask = &admit.request.ask;
        let policy = key.policy.as_deref();
        if admission::operation(ask).lists_models() {
            let answer = self.models(organisation, key, ask);
            return Ok(answer.map(|answer| Way { answer: Some(answer), ..Way::default() }));
        }
        let mut way = Way {
            wait_ms: organisation.wait_ms(policy),
            state: key.state.allow.state,
            first_byte_ms: places.first_byte_ms,
            drops: places.drops,
            ..Way::default()
        };
        let mut refusal = None;
        for (i, place) in places.places.iter().enumerate() {
            match self.credentials(organisation, key, admit, place)? {
                Ok((credentials, in_order)) => {
                    way.in_order |= in_order;
                    way.usable.push(i);
                    way.targets.push(self.at(organisation, ask, place, places.places.len() > 1, credentials));
                }
                Err(why) => refusal = refusal.or(Some(why)),
            }
        }
        Ok(match refusal.filter(|_| way.targets.is_empty()) {
            Some(refusal) => Err(refusal),
            None => Ok(way),
        })
    }

    /// The credentials to try at a place, and whether in that order.
    fn credentials(
        &self,
        organisation: &Organisation,
        key: &Found,
        admit: &Admit,
        place: &Place<'_>,
    ) -> Result<Result<(Vec<String>, bool), Refusal>, StoreError> {
        let (provider, policy, ask) = (place.provider.as_ref(), key.policy.as_deref(), &admit.request.ask);
        let credentials = match organisation.credentials(provider, policy, place.pool) {
            Ok(credentials) => credentials,
            Err(none) => return Ok(Err(no_credential(&none, provider))),
        };
        let credentials = match objects::references(self.db, &key.chain.organisation, &key.id, provider, ask)? {
            References::None => credentials,
            References::Own(credential) if credentials.contains(&credential) => vec![credential],
            References::Own(credential) => return Ok(Err(objects::unreachable(&credential))),
            References::Unknown => return Ok(Err(objects::not_owned())),
            References::Refused(refusal) => return Ok(Err(refusal)),
        };
        let at = At { provider, model: place.model.as_deref().unwrap_or_default() };
        let mut credentials: Vec<String> = credentials.into_iter().filter(|id| !is_rejected(organisation, at, id, admit)).collect();
        if credentials.is_empty() {
            let message = format!("{provider} rejected every stored credential that this request could use; an operator has to act");
            return Ok(Err(Refusal::new(Code::ProviderCredentialRejected, message)));
        }
        let in_order = organisation.goes_by_key(provider, policy, place.pool);
        if in_order {
            credentials.sort_by_cached_key(|id| rank(&key.id, id));
        }
        Ok(Ok((credentials, in_order)))
    }

    fn at(&self, organisation: &Organisation, ask: &Ask, place: &Place<'_>, has_others: bool, credentials: Vec<String>) -> Target {
        let model = place.model.as_deref();
        // Anthropic's API must be told a limit, and of several targets not all give as much.
        let is_told =
            has_others || (organisation.dialect(&place.provider) == Some(Dialect::Anthropic) && ask.dialect != Dialect::Anthropic);
        let price = model
            .filter(|_| is_told)
            .and_then(|model| organisation.price(&self.keys.prices, &place.provider, model, admission::operation(ask).models));
        Target {
            provider: place.provider.to_string(),
            model: model.map(str::to_owned),
            credentials,
            max_output: price.and_then(|price| price.max_output),
            site: organisation.site(&place.provider),
        }
    }

    /// The models that a key may use, of the provider asked for or of all that can be reached, and the routes to them.
    fn models(&self, organisation: &Organisation, key: &Found, ask: &Ask) -> Result<String, Refusal> {
        let (lists, policy) = (key.state.lists(), key.policy.as_deref());
        let reachable = |provider: &str, pool: Option<&str>| {
            organisation.is_enabled(provider) && organisation.credentials(provider, policy, pool).is_ok()
        };
        let asked = |provider: &str| ask.provider.is_empty() || ask.provider == provider;
        let mut listed = Vec::new();
        for provider in organisation.document.provider_names().into_iter().filter(|provider| asked(provider) && reachable(provider, None)) {
            let Some(dialect) = organisation.dialect(provider) else { continue };
            listed.extend(models::usable(&self.keys.prices, provider, dialect, &lists, organisation.prices.models(provider)));
        }
        for (name, route) in &organisation.document.routes {
            let fits = |allow: &&Allow| {
                admission::model_fits(allow, name) || route.targets.iter().all(|target| admission::model_fits(allow, &target.model))
            };
            let leads = |target: &&RouteTarget| asked(&target.provider) && reachable(&target.provider, target.pool.as_deref());
            if let Some(target) = route.targets.iter().find(leads).filter(|_| lists.iter().all(fits)) {
                listed.insert(0, Listed { model: name, owner: &target.provider });
            }
        }
        models::answer(ask.dialect, listed, ask.model.as_deref())
    }
}

/// Whether the provider has said that this credential, or its account with this model, is not to be used.
fn is_rejected(organisation: &Organisation, at: At<'_>, id: &str, admit: &Admit) -> bool {
    if admit.rejected.is_empty() {
        return false;
    }
    let credential = organisation.plain(id);
    [Scope::Credential, Scope::Account, Scope::Model].into_iter().any(|scope| admit.rejected.contains(&at.name(&credential, scope)))
}

/// A key's own order of credentials (rendezvous hashing): when one goes or comes, the order of the others stays.
fn rank(key_id: &str, credential: &str) -> [u8; 32] {
    Sha256::new().chain_update(key_id).chain_update([0]).chain_update(credential).finalize().into()
}

fn no_credential(none: &NoCredential, provider: &str) -> Refusal {
    let message = match none {
        NoCredential::None => format!("no credential for {provider} is stored"),
        NoCredential::Pool(name) => format!("the pool {name} has no credential for {provider}"),
    };
    Refusal::new(Code::PoolExhausted, message).retry_after(30)
}
