//! Virtual keys: made, shown, changed, rotated, revoked, within the limits of their team.

use super::access::{Permission, Principal};
use super::{Service, ServiceError, millis, now_ms};
use crate::config::patch::LimitsPatch;
use crate::config::{self, Budget, Quota, Rates, written};
use crate::store::{KeyOutcome, KeyRow, KeyUpdate, NewKey, Rotation};
use crate::vault::random;
use keyward_core::admission::{Allow, Status};
use keyward_core::hex;
use keyward_core::limits::{Account, Enforce, Limits, Window};
use keyward_core::money::Nanodollars;
use keyward_core::token::VirtualKey;
use std::collections::BTreeMap;

/// Most tags or personal fields of a key, and the longest of their names and values.
const MAX_FIELDS: usize = 32;
const MAX_FIELD: usize = 256;
/// How often a change is tried again that somebody else's came between.
const TRIES: usize = 5;

/// What a new key may do.
#[derive(Debug, Clone, Default)]
pub struct KeySpec {
    pub label: String,
    pub team: Option<String>,
    pub policy: Option<String>,
    pub allow: Allow,
    pub budgets: Vec<Budget>,
    pub quotas: Vec<Quota>,
    pub rates: Rates,
    pub enforce: Enforce,
    pub expires_in: Option<String>,
    pub tags: BTreeMap<String, String>,
    pub personal: Option<BTreeMap<String, String>>,
}

/// What changes on a key; `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct KeyPatch {
    pub label: Option<String>,
    pub team: Option<Option<String>>,
    pub policy: Option<Option<String>>,
    pub allow: Option<AllowPatch>,
    pub limits: LimitsPatch,
    pub enforce: Option<Enforce>,
    /// From now; `Some(None)`: never.
    pub expires_in: Option<Option<String>>,
    pub tags: Option<FieldsPatch>,
    pub personal: Option<FieldsPatch>,
    /// `active` lets a frozen key go on; nothing else can be written.
    pub active: bool,
}

/// What changes in the lists of what is allowed.
#[derive(Debug, Clone, Default)]
pub struct AllowPatch {
    pub models: Option<Vec<String>>,
    pub endpoints: Option<Vec<String>>,
}

/// What changes among tags or personal fields.
#[derive(Debug, Clone)]
pub enum FieldsPatch {
    Clear,
    /// Each is set, or with `None` taken away.
    Merge(BTreeMap<String, Option<String>>),
}

impl FieldsPatch {
    fn apply(&self, to: &mut BTreeMap<String, String>) {
        match self {
            FieldsPatch::Clear => to.clear(),
            FieldsPatch::Merge(fields) => {
                for (name, value) in fields {
                    match value {
                        Some(value) => drop(to.insert(name.clone(), value.clone())),
                        None => drop(to.remove(name)),
                    }
                }
            }
        }
    }
}

impl Service {
    /// Makes a key. The token is in the answer and nowhere else.
    pub async fn create_key(&self, who: &Principal, mut spec: KeySpec) -> Result<(KeyRow, VirtualKey), ServiceError> {
        who.needs(Permission::WriteKeys)?;
        if who.team.is_some() && spec.team.is_none() {
            spec.team.clone_from(&who.team);
        }
        self.template(&who.organisation, &mut spec)?;
        let now = now_ms();
        let row = KeyRow {
            id: format!("key_{}", hex::encode(&random::<10>()?)),
            organisation: who.organisation.clone(),
            team: spec.team,
            policy: spec.policy,
            label: spec.label,
            allow: spec.allow,
            tags: spec.tags,
            personal: spec.personal,
            status: Status::Active,
            version: 1,
            created_ms: now,
            expires_ms: expiry(spec.expires_in.as_deref(), now)?,
            limits: limits(&spec.budgets, &spec.quotas, &spec.rates)?,
            enforce: spec.enforce,
            account: Account::default(),
        };
        only_operators_shadow(who, row.enforce)?;
        let max_keys = self.within_limits(who, &row)?;
        let token = VirtualKey::generate(random()?);
        let key = NewKey { row, token_hash: self.pepper(&token.hash().0), salt: random()?, actor: who.actor(), max_keys };
        Ok((outcome(self.store.create_key(key).await?)?, token))
    }

    /// An expiry that the key does not bring comes from its policy.
    fn template(&self, organisation: &str, spec: &mut KeySpec) -> Result<(), ServiceError> {
        let Some(name) = &spec.policy else { return Ok(()) };
        let organisation = self.organisation(organisation)?;
        let Some(policy) = organisation.document.policies.get(name) else {
            return Err(ServiceError::Invalid("policy".to_owned(), format!("there is no policy {name:?}")));
        };
        if spec.expires_in.is_none() {
            spec.expires_in.clone_from(&policy.expires_in);
        }
        Ok(())
    }

    /// Whether the key, as it is to be, keeps to its team's limits. Gives how many live keys the team may have.
    fn within_limits(&self, who: &Principal, row: &KeyRow) -> Result<Option<u32>, ServiceError> {
        let invalid = |field: &str, message: String| Err(ServiceError::Invalid(field.to_owned(), message));
        if who.team.is_some() && who.team != row.team {
            return Err(ServiceError::Forbidden("a developer's keys are those of their own team".to_owned()));
        }
        if row.label.len() > 200 {
            return invalid("label", "must be at most 200 bytes".to_owned());
        }
        for (list, patterns) in [("allow.models", &row.allow.models), ("allow.endpoints", &row.allow.endpoints)] {
            if patterns.len() > 1_000 || patterns.iter().any(|p| p.is_empty() || p.len() > 256) {
                return invalid(list, "must be at most 1000 entries of 1 to 256 bytes".to_owned());
            }
        }
        for (field, map) in [("tags", Some(&row.tags)), ("personal", row.personal.as_ref())] {
            let Some(map) = map else { continue };
            if map.len() > MAX_FIELDS || map.iter().any(|(k, v)| k.is_empty() || k.len() > MAX_FIELD || v.len() > MAX_FIELD) {
                return invalid(field, format!("must be at most {MAX_FIELDS} pairs of at most {MAX_FIELD} bytes each"));
            }
        }
        let organisation = self.organisation(&row.organisation)?;
        if let Some(policy) = row.policy.as_ref().filter(|name| !organisation.document.policies.contains_key(*name)) {
            return invalid("policy", format!("there is no policy {policy:?}"));
        }
        let Some(name) = &row.team else { return Ok(None) };
        let Some(team) = organisation.document.teams.get(name) else { return invalid("team", format!("there is no team {name:?}")) };
        // Its policy's budgets hold for it as its own do.
        let of_policy = row.policy.as_ref().and_then(|policy| organisation.in_force.policies.get(policy)).map(|policy| &policy.limits);
        let cap = |window| std::iter::once(&row.limits).chain(of_policy).filter_map(|limits| limits.budget(window)).min();
        let caps: Vec<Nanodollars> = Window::ALL.into_iter().filter_map(cap).collect();
        if let Some(most) = team.max_key_usd.as_deref().and_then(|usd| config::parse_usd(usd).ok())
            && (caps.is_empty() || caps.iter().any(|cap| *cap > most))
        {
            return invalid("budgets", format!("a key of the team {name} has a budget of at most ${}", most.to_usd()));
        }
        if let Some(longest) = &team.max_expires_in
            && let Ok(ttl) = config::parse_duration(longest)
            // From when it was made: a change can't make it live on and on.
            && row.expires_ms.is_none_or(|at| at > row.created_ms.saturating_add(millis(ttl)))
        {
            return invalid("expires_in", format!("a key of the team {name} lives at most {longest}"));
        }
        Ok(team.max_keys)
    }

    pub async fn key(&self, who: &Principal, id: &str) -> Result<KeyRow, ServiceError> {
        who.needs(Permission::ReadKeys)?;
        let row = self.store.key(&who.organisation, id).await?;
        // A key of another team is as good as none.
        row.filter(|row| who.team.is_none() || who.team == row.team).ok_or(ServiceError::NotFound("key"))
    }

    pub async fn keys(&self, who: &Principal, team: Option<&str>, after: &str, limit: u32) -> Result<Vec<KeyRow>, ServiceError> {
        who.needs(Permission::ReadKeys)?;
        if team.is_some() && who.team.is_some() && who.team.as_deref() != team {
            return Ok(Vec::new());
        }
        Ok(self.store.keys(&who.organisation, who.team.as_deref().or(team), after, limit).await?)
    }

    /// Changes a key; `expect`: only if it is still at this version.
    pub async fn update_key(&self, who: &Principal, id: &str, expect: Option<u64>, patch: &KeyPatch) -> Result<KeyRow, ServiceError> {
        who.needs(Permission::WriteKeys)?;
        for _ in 0..TRIES {
            let now = now_ms();
            let before = self.key(who, id).await?;
            if expect.is_some_and(|version| version != before.version) {
                return Err(ServiceError::Stale(before.version));
            }
            if before.status == Status::Revoked {
                return Err(ServiceError::Conflict("the key is revoked; that is for good".to_owned()));
            }
            if before.status == Status::Frozen && patch.active && who.team.is_some() {
                return Err(ServiceError::Forbidden("a frozen key needs an operator's eye".to_owned()));
            }
            let row = patched(before, patch, now)?;
            if patch.enforce.is_some() {
                only_operators_shadow(who, row.enforce)?;
            }
            let max_keys = self.within_limits(who, &row)?;
            let update = KeyUpdate { row, salt: random()?, actor: who.actor(), now_ms: now, max_keys };
            match self.changing_key(id, self.store.update_key(update)).await? {
                KeyOutcome::Stale(_) if expect.is_none() => {}
                other => return outcome(other),
            }
        }
        Err(contended())
    }

    /// Erases tags and personal fields, of a revoked key as well, and whatever limits the team has by now.
    pub async fn erase_personal(&self, who: &Principal, id: &str) -> Result<(), ServiceError> {
        who.needs(Permission::WriteKeys)?;
        for _ in 0..TRIES {
            let before = self.key(who, id).await?;
            match self.store.erase_personal(&who.organisation, id, before.version, &who.actor(), now_ms()).await? {
                KeyOutcome::Stale(_) => {}
                other => return outcome(other).map(drop),
            }
        }
        Err(contended())
    }

    /// Gives a key a new token. The old ones work for the time of the overlap.
    pub async fn rotate_key(
        &self,
        who: &Principal,
        id: &str,
        expect: Option<u64>,
        overlap: &str,
    ) -> Result<(KeyRow, VirtualKey), ServiceError> {
        who.needs(Permission::WriteKeys)?;
        let overlap = config::parse_duration(overlap).map_err(|message| ServiceError::Invalid("overlap".to_owned(), message))?;
        let token = VirtualKey::generate(random()?);
        for _ in 0..TRIES {
            // It must still be the key that the caller may see: it could move to another team meanwhile.
            let before = self.key(who, id).await?;
            let now = now_ms();
            let rotation = Rotation {
                organisation: who.organisation.clone(),
                id: id.to_owned(),
                expect: expect.or(Some(before.version)),
                token_hash: self.pepper(&token.hash().0),
                overlap_until_ms: now.saturating_add(millis(overlap)),
                actor: who.actor(),
                now_ms: now,
            };
            match self.changing_key(id, self.store.rotate_key(rotation)).await? {
                KeyOutcome::Stale(_) if expect.is_none() => {}
                other => return Ok((outcome(other)?, token)),
            }
        }
        Err(contended())
    }

    pub async fn revoke_key(&self, who: &Principal, id: &str, expect: Option<u64>) -> Result<KeyRow, ServiceError> {
        who.needs(Permission::WriteKeys)?;
        for _ in 0..TRIES {
            let before = self.key(who, id).await?;
            let at = expect.or(Some(before.version));
            let actor = who.actor();
            match self.changing_key(id, self.store.revoke_key(&who.organisation, id, at, &actor, now_ms())).await? {
                KeyOutcome::Stale(_) if expect.is_none() => {}
                other => return outcome(other),
            }
        }
        Err(contended())
    }
}

fn contended() -> ServiceError {
    ServiceError::Conflict("the key is being changed by others; try again".to_owned())
}

fn patched(mut row: KeyRow, patch: &KeyPatch, now: u64) -> Result<KeyRow, ServiceError> {
    if let Some(label) = &patch.label {
        row.label.clone_from(label);
    }
    if let Some(team) = &patch.team {
        row.team.clone_from(team);
    }
    if let Some(policy) = &patch.policy {
        row.policy.clone_from(policy);
    }
    if let Some(allow) = &patch.allow {
        row.allow.models = allow.models.clone().unwrap_or(row.allow.models);
        row.allow.endpoints = allow.endpoints.clone().unwrap_or(row.allow.endpoints);
    }
    if !patch.limits.is_empty() {
        let (mut budgets, mut quotas, mut rates) = written(&row.limits);
        patch.limits.apply(&mut budgets, &mut quotas, &mut rates);
        row.limits = limits(&budgets, &quotas, &rates)?;
    }
    row.enforce = patch.enforce.unwrap_or(row.enforce);
    if let Some(expires_in) = &patch.expires_in {
        row.expires_ms = expiry(expires_in.as_deref(), now)?;
    }
    if let Some(tags) = &patch.tags {
        tags.apply(&mut row.tags);
    }
    if let Some(personal) = &patch.personal {
        let mut fields = row.personal.unwrap_or_default();
        personal.apply(&mut fields);
        row.personal = Some(fields).filter(|fields| !fields.is_empty());
    }
    if patch.active {
        row.status = Status::Active;
    }
    Ok(row)
}

fn limits(budgets: &[Budget], quotas: &[Quota], rates: &Rates) -> Result<Limits, ServiceError> {
    config::parse_limits(budgets, quotas, rates).map_err(|faults| match <[config::Fault; 1]>::try_from(faults) {
        Ok([one]) => ServiceError::Invalid(one.field, one.message),
        Err(faults) => ServiceError::Faults(faults),
    })
}

/// A key in shadow mode has no limits: a developer's must have theirs.
fn only_operators_shadow(who: &Principal, enforce: Enforce) -> Result<(), ServiceError> {
    if enforce == Enforce::Shadow && who.team.is_some() {
        return Err(ServiceError::Forbidden("a developer's keys are not in shadow mode".to_owned()));
    }
    Ok(())
}

fn expiry(expires_in: Option<&str>, now: u64) -> Result<Option<u64>, ServiceError> {
    let ttl = expires_in.map(config::parse_duration).transpose();
    let ttl = ttl.map_err(|message| ServiceError::Invalid("expires_in".to_owned(), message))?;
    Ok(ttl.map(|ttl| now.saturating_add(millis(ttl))))
}

fn outcome(outcome: KeyOutcome) -> Result<KeyRow, ServiceError> {
    match outcome {
        KeyOutcome::Done(row) => Ok(*row),
        KeyOutcome::Missing => Err(ServiceError::NotFound("key")),
        KeyOutcome::Stale(version) => Err(ServiceError::Stale(version)),
        KeyOutcome::Refused(fault) if fault.field == "status" || fault.field == "id" => Err(ServiceError::Conflict(fault.message)),
        KeyOutcome::Refused(fault) => Err(ServiceError::Invalid(fault.field, fault.message)),
    }
}
