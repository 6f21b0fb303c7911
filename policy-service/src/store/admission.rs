//! An admission, in one transaction: who asks, whether they may, what is held for it, where it goes; and its entry.

mod ways;

use self::ways::Way;
use super::accounts::{organisation_account, team_account};
use super::ledger::{Chain, Ledger, chain_at, enforce, hold_at, json, signed, state, status, unsigned};
use super::objects;
use super::{Admission, Admit, Admitted, StoreError};
use crate::aims::{self, Place};
use crate::directory::Organisation;
use keyward_core::admission::{self, Aim, Hold, KeyState};
use keyward_core::audit::{self, Event};
use keyward_core::edge::{Ask, Plan, RequestId};
use keyward_core::limits::{DAY_MS, Enforce, Limits, Moment};
use keyward_core::operation::Dialect;
use keyward_core::price::{Price, Together};
use keyward_core::refusal::{Code, Headroom, Refusal};
use keyward_core::reserve::{self, Level, Of};
use rusqlite::{OptionalExtension, params};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::borrow::Cow;

/// Tokens that Anthropic puts before a request that has tools or asks for a schema, several times what is known of them (tool use guide:
/// 346 for Claude 4, 530 at most for Claude 3).
const TOKENS_FOR_INSTRUCTIONS: u64 = 2_000;

/// A key found by one of its tokens.
struct Found {
    id: String,
    state: KeyState,
    limits: Limits,
    enforce: Enforce,
    chain: Chain,
    team: Option<String>,
    policy: Option<String>,
    /// A newer token has taken this one's place since then.
    token_expires_ms: Option<u64>,
}

/// What a request is held to beside its key's own limits, and where it is booked.
struct Levels<'a> {
    key: Vec<&'a Limits>,
    team: Option<(String, &'a Limits)>,
    organisation: (String, &'a Limits),
}

/// A request whose id has been used before.
struct Seen {
    state: i64,
    fingerprint: Vec<u8>,
    hold: Hold,
    bounded: bool,
}

/// What was decided of a request.
struct Decision {
    way: Way,
    hold: Hold,
    /// Why it would have been refused, were the key not in shadow mode.
    forgiven: Option<Refusal>,
    bounded: bool,
    /// By target, where there are several.
    parts: Vec<Part>,
}

/// A target as it is kept beside the request, where there are several.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Part {
    pub provider: String,
    pub model: String,
    /// What of the hold is its.
    pub hold: Hold,
}

impl Ledger<'_> {
    pub fn admit(&self, admit: &Admit) -> Result<Admission, StoreError> {
        let fingerprint = fingerprint(admit);
        let Some(mut key) = self.key_by_token(&admit.token_hash)? else {
            return Ok(Admission::Refused(Refusal::new(Code::UnknownKey, keyward_core::credentials::UNKNOWN_KEY)));
        };
        let organisation =
            admit.directory.organisations.get(&key.chain.organisation).ok_or(StoreError::Damaged("a key without organisation"))?;
        match self.seen(admit.request.req)? {
            Some(Seen { state: state::TOMBSTONE, .. }) => {
                let refusal = Refusal::new(Code::PolicyUnavailable, "this request was given up before it was admitted");
                return self.refuse(&key, admit, refusal);
            }
            Some(Seen { state: state::HELD, fingerprint: seen, hold, bounded }) if seen == fingerprint => {
                if key.stand(organisation, admit).is_err() {
                    return Ok(Admission::Conflict);
                }
                let ask = &admit.request.ask;
                let Ok(places) = aims::places(organisation, &self.keys.prices, ask, admit.request.req) else {
                    return Ok(Admission::Conflict);
                };
                let way = self.way(organisation, &key, admit, &places)?;
                return Ok(way.map_or(Admission::Conflict, |way| admitted(&key, way, hold, organisation, ask, None, bounded)));
            }
            Some(_) => return Ok(Admission::Conflict),
            None => {}
        }
        let now = self.accounts.moment(admit.now);
        let decision = match self.decide(organisation, &mut key, admit, now)? {
            Ok(decision) => decision,
            Err(refusal) => {
                let in_flight = self.account(&key.id, now, |account| account.in_flight)?;
                if admit.patient && in_flight > 0 && refusal.code == Code::StateNotOwned && refusal == objects::not_owned() {
                    return Ok(Admission::NotYet);
                }
                return self.refuse(&key, admit, refusal);
            }
        };
        self.write_down(organisation, key, admit, decision, fingerprint, now)
    }

    /// Books what was decided: the entry, the hold at every level, the request.
    fn write_down(
        &self,
        organisation: &Organisation,
        key: Found,
        admit: &Admit,
        decision: Decision,
        fingerprint: Vec<u8>,
        now: Moment,
    ) -> Result<Admission, StoreError> {
        let ask = &admit.request.ask;
        let Decision { way, hold, forgiven, bounded, parts } = decision;
        let first = way.targets.first();
        let provider = first.map_or(ask.provider.as_str(), |target| target.provider.as_str());
        let mut chain = key.chain.clone();
        if let Some(refusal) = &forgiven {
            chain = self.append(&key.id, &chain, now.wall_ms, Event::WouldRefuse(refused(admit, provider, refusal)))?;
            self.count_forgiven(&key, admit, provider, refusal, now)?;
        }
        let event = Event::Admitted(audit::Admitted {
            req: admit.request.req.0,
            vm: admit.request.vm.0,
            node: admit.request.node.clone(),
            provider: provider.to_owned(),
            endpoint: ask.endpoint.clone(),
            model: ask.model.clone().unwrap_or_default(),
            stream: ask.stream,
            bytes: ask.bytes,
            clamp: hold.clamp.unwrap_or(u64::MAX),
            choices: ask.choices,
            hold: hold.total.0,
            rev: organisation.rev,
            credentials: way.targets.iter().flat_map(|target| target.credentials.clone()).collect(),
        });
        let end = self.append(&key.id, &chain, now.wall_ms, event)?;
        self.end_chain(&key.id, &end);
        let levels = key.levels(organisation);
        let mut rated = 0;
        for (bit, id, is_rated) in levels.accounts(&key.id) {
            self.change_account(id, now, |account| account.reserve(hold.total, hold.tokens, now, is_rated))?;
            rated |= if is_rated { bit } else { 0 };
        }
        let headroom = if rated == 0 { None } else { self.with_levels(&key.id, &levels, now, |levels| reserve::headroom(levels, now))? };
        self.db
            .prepare_cached(
                "INSERT INTO requests (req, key_id, state, fingerprint, provider, model, stream, choices, hold, hold_input, clamp, hold_tokens,
                     hold_output, expires_ms, team, endpoint, asked, admitted_ms, day, bounded, rated, token, targets)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23)",
            )?
            .execute(params![
                admit.request.req.0,
                key.id,
                state::HELD,
                fingerprint,
                provider,
                first.and_then(|target| target.model.as_deref()).unwrap_or_default(),
                ask.stream,
                signed(ask.choices),
                hold.total.0,
                hold.input.0,
                hold.clamp.map(signed),
                signed(hold.tokens),
                signed(hold.output_tokens),
                signed(admit.expires_ms),
                key.team,
                ask.endpoint,
                ask.model,
                signed(now.wall_ms),
                signed(now.day),
                bounded,
                rated,
                admit.token_hash,
                (parts.len() > 1).then(|| serde_json::to_string(&parts).unwrap_or_default()),
            ])?;
        Ok(admitted(&key, way, hold, organisation, ask, headroom, bounded))
    }

    fn decide(
        &self,
        organisation: &Organisation,
        key: &mut Found,
        admit: &Admit,
        now: Moment,
    ) -> Result<Result<Decision, Refusal>, StoreError> {
        let ask = &admit.request.ask;
        if let Err(refusal) = key.stand(organisation, admit) {
            return Ok(Err(refusal));
        }
        let places = match aims::places(organisation, &self.keys.prices, ask, admit.request.req) {
            Ok(places) => places,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let operation = admission::operation(ask);
        // Why it can't go anywhere is told only to those who may.
        let way = self.way(organisation, key, admit, &places)?;
        // Those that can't be used now are not held for.
        let chosen: Vec<&Place<'_>> = match &way {
            Ok(way) if !way.usable.is_empty() => way.usable.iter().filter_map(|place| places.places.get(*place)).collect(),
            _ => places.places.iter().collect(),
        };
        let price_of = |place: &Place<'_>| {
            let model = place.model.as_deref()?;
            organisation.price(&self.keys.prices, &place.provider, model, operation.models)
        };
        let found: Vec<Option<Cow<'_, Price>>> = chosen.iter().map(|place| price_of(place)).collect();
        let kind = if places.first_byte_ms.is_some() { Together::AllOf } else { Together::OneOf };
        let together = match found.as_slice() {
            [one] => one.clone(),
            several => {
                let known: Option<Vec<&Price>> = several.iter().map(Option::as_deref).collect();
                known.and_then(|known| Price::together(&known, kind)).map(Cow::Owned)
            }
        };
        let price = together.as_deref();
        let ask = &with_instructions(organisation, ask, &chosen);
        let aimed: Vec<Aim<'_>> = places.places.iter().map(Place::aim).collect();
        let levels = key.levels(organisation);
        let decided = self.with_levels(&key.id, &levels, now, |levels| {
            let hold = admission::decide(&key.state, levels, ask, &aimed, price, now);
            (hold, reserve::is_bounded(levels))
        })?;
        let shadow = key.is_in_shadow(organisation);
        let (hold, forgiven, bounded) = match decided {
            (Ok(hold), bounded) if !shadow => (hold, None, bounded),
            // Nothing of a request in shadow mode is changed: it is not clamped either.
            (Ok(_), _) => (reserve::unlimited(ask, operation, price), None, false),
            (Err(refusal), _) if shadow && refusal.code.is_forgiven_in_shadow() => {
                (reserve::unlimited(ask, operation, price), Some(refusal), false)
            }
            (Err(refusal), _) => return Ok(Err(refusal)),
        };
        let way = match way {
            Ok(way) => way,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let part = |(place, price): (&&Place<'_>, &Option<Cow<'_, Price>>)| Part {
            provider: place.provider.to_string(),
            model: place.model.as_deref().unwrap_or_default().to_owned(),
            hold: admission::part(ask, operation, price.as_deref(), hold.clamp, bounded),
        };
        let parts = if found.len() > 1 { chosen.iter().zip(&found).map(part).collect() } else { Vec::new() };
        self.keys.admitted.remember(admit.request.req, found.into_iter().map(|price| price.map(Cow::into_owned)).collect());
        Ok(Ok(Decision { way, hold, forgiven, bounded, parts }))
    }

    /// Runs `with` on the accounts of a request's levels, each with its limits.
    fn with_levels<T>(
        &self,
        key_id: &str,
        levels: &Levels<'_>,
        now: Moment,
        with: impl FnOnce(&[Level<'_>]) -> T,
    ) -> Result<T, StoreError> {
        let (of_organisation, limits) = &levels.organisation;
        self.account(key_id, now, |_| ())?;
        self.account(of_organisation, now, |_| ())?;
        if let Some((team, _)) = &levels.team {
            self.account(team, now, |_| ())?;
        }
        self.accounts.look(|cached| {
            let account = |id: &str| cached.get(id).ok_or(StoreError::Damaged("an account that is gone"));
            let mut all = vec![Level { of: Of::Key, limits: levels.key.clone(), account: account(key_id)? }];
            if let Some((team, limits)) = &levels.team {
                all.push(Level { of: Of::Team, limits: vec![limits], account: account(team)? });
            }
            all.push(Level { of: Of::Organisation, limits: vec![limits], account: account(of_organisation)? });
            Ok(with(&all))
        })
    }

    /// Counts what a key in shadow mode would have been refused.
    fn count_forgiven(&self, key: &Found, admit: &Admit, provider: &str, refusal: &Refusal, now: Moment) -> Result<(), StoreError> {
        let ask = &admit.request.ask;
        self.db
            .prepare_cached(
                "INSERT INTO would_refuse (organisation, day, key_id, code, provider, model, requests) VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1)
                 ON CONFLICT DO UPDATE SET requests = requests + 1",
            )?
            .execute(params![
                key.chain.organisation,
                signed(now.wall_ms / DAY_MS),
                key.id,
                refusal.code.name(),
                provider,
                ask.model.as_deref().unwrap_or_default(),
            ])?;
        Ok(())
    }

    fn refuse(&self, key: &Found, admit: &Admit, refusal: Refusal) -> Result<Admission, StoreError> {
        let organisation = admit.directory.organisations.get(&key.chain.organisation);
        let provider =
            organisation.map(|organisation| aims::provider(organisation, &self.keys.prices, &admit.request.ask)).unwrap_or_default();
        self.append_alone(&key.id, &key.chain, admit.now.wall_ms, Event::Refused(refused(admit, &provider, &refusal)))?;
        Ok(Admission::Refused(refusal))
    }

    fn key_by_token(&self, token_hash: &[u8; 32]) -> Result<Option<Found>, StoreError> {
        // Two look-ups: SQLite prepares a join over both tables anew each time.
        let token: Option<(String, Option<i64>)> = self
            .db
            .prepare_cached("SELECT key_id, expires_ms FROM tokens WHERE token_hash = ?1")?
            .query_row([token_hash], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let Some((id, token_expires_ms)) = token else { return Ok(None) };
        let mut select = self.db.prepare_cached(
            "SELECT status, expires_ms, allow, limits, enforce, organisation, chain_epoch, chain_seq, chain_mac, team, policy
             FROM keys WHERE id = ?1",
        )?;
        let found = select
            .query_row([&id], |row| {
                let state = KeyState {
                    status: status(row, 0)?,
                    expires_ms: row.get::<_, Option<i64>>(1)?.map(unsigned),
                    allow: json(row, 2)?,
                    limits: Vec::new(),
                };
                Ok(Found {
                    id: id.clone(),
                    state,
                    limits: json(row, 3)?,
                    enforce: enforce(row, 4)?,
                    // The row has the end of the last commit, and this group may have gone on.
                    chain: self.known_chain(&id).map_or_else(|| chain_at(row, 5), Ok)?,
                    team: row.get(9)?,
                    policy: row.get(10)?,
                    token_expires_ms: token_expires_ms.map(unsigned),
                })
            })
            .optional()?;
        Ok(found)
    }

    fn seen(&self, req: RequestId) -> Result<Option<Seen>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT state, fingerprint, hold, hold_input, clamp, hold_tokens, hold_output, bounded FROM requests WHERE req = ?1",
        )?;
        Ok(select
            .query_row([req.0], |row| {
                Ok(Seen { state: row.get(0)?, fingerprint: row.get(1)?, hold: hold_at(row, 2)?, bounded: row.get(7)? })
            })
            .optional()?)
    }
}

impl Found {
    /// Puts the key under its team and policy, or says why it may do nothing now.
    fn stand(&mut self, organisation: &Organisation, admit: &Admit) -> Result<(), Refusal> {
        admission::check_standing(&self.state, admit.now.wall_ms)?;
        if self.token_expires_ms.is_some_and(|at| at <= admit.now.wall_ms) {
            return Err(Refusal::new(Code::Revoked, "this token was replaced by a newer one of its key"));
        }
        let (team, policy) = (self.team.as_deref(), self.policy.as_deref());
        let gone = || Refusal::new(Code::PolicyUnavailable, "this key's team or policy does not exist; an operator has to act");
        self.state.limits = organisation.limits(team, policy).ok_or_else(gone)?;
        self.state.allow.state = organisation.allows_state(self.state.allow.state, team, policy);
        Ok(())
    }

    /// The limits of every level that counts: the key's own and its policy's, its team's, its organisation's.
    fn levels<'a>(&'a self, organisation: &'a Organisation) -> Levels<'a> {
        let in_force = &organisation.in_force;
        let of_policy = self.policy.as_ref().and_then(|policy| in_force.policies.get(policy)).map(|policy| &policy.limits);
        Levels {
            key: std::iter::once(&self.limits).chain(of_policy).collect(),
            team: self.team.as_ref().and_then(|team| Some((team_account(&self.chain.organisation, team), in_force.teams.get(team)?))),
            organisation: (organisation_account(&self.chain.organisation), &in_force.organisation),
        }
    }

    /// Whether any level limits how many requests run at once: the end of this one is waited for.
    fn limits_flight(&self, organisation: &Organisation) -> bool {
        let in_force = &organisation.in_force;
        let of_policy = self.policy.as_ref().and_then(|policy| in_force.policies.get(policy)).map(|policy| &policy.limits);
        let of_team = self.team.as_ref().and_then(|team| in_force.teams.get(team));
        let mut all = [&self.limits, &in_force.organisation].into_iter().chain(of_policy).chain(of_team);
        all.any(|limits| limits.rates.max_in_flight.is_some())
    }

    fn is_in_shadow(&self, organisation: &Organisation) -> bool {
        let of_policy = self.policy.as_ref().and_then(|policy| organisation.in_force.policies.get(policy)).map(|policy| policy.enforce);
        self.enforce == Enforce::Shadow || of_policy == Some(Enforce::Shadow)
    }
}

impl Levels<'_> {
    /// The accounts that a request is booked on, from the narrowest to the widest: each with its bit in `requests.rated`, and
    /// whether a rate limits it.
    fn accounts<'a>(&'a self, key_id: &'a str) -> impl Iterator<Item = (i64, &'a str, bool)> {
        let rated = |limits: &Limits| limits.rates.rpm.is_some() || limits.rates.tpm.is_some();
        let team = self.team.as_ref().map(|(id, limits)| (2, id.as_str(), rated(limits)));
        let (organisation, limits) = &self.organisation;
        std::iter::once((1, key_id, self.key.iter().any(|limits| rated(limits)))).chain(team).chain(std::iter::once((
            4,
            organisation.as_str(),
            rated(limits),
        )))
    }
}

/// `bounded`: some budget holds the request to its hold.
fn admitted(
    key: &Found,
    way: Way,
    hold: Hold,
    organisation: &Organisation,
    ask: &Ask,
    headroom: Option<Headroom>,
    bounded: bool,
) -> Admission {
    let Way { targets, usable: _, in_order, wait_ms, state, answer, first_byte_ms, drops } = way;
    // Where output has a limit, that is what was held for; without a budget the hold binds nobody.
    let output_limit = Some(hold.output_tokens).filter(|_| bounded && !admission::operation(ask).limits().is_empty());
    let plan = Plan {
        key: key.id.clone(),
        rev: organisation.rev,
        clamp: hold.clamp,
        expires_ms: key.state.expires_ms.into_iter().chain(key.token_expires_ms).min(),
        output_limit,
        state,
        headroom,
        prompt: key.limits_flight(organisation),
        answer,
        wait_ms,
        in_order,
        drops,
        first_byte_ms: first_byte_ms.filter(|_| targets.len() > 1),
        targets: Vec::new(),
    };
    Admission::Admitted(Box::new(Admitted { hold, targets, plan }))
}

/// The request as its bound is worked out: of one that is translated for Anthropic's API, with what the provider puts before tools and
/// schemas.
fn with_instructions<'a>(organisation: &Organisation, ask: &'a Ask, places: &[&Place<'_>]) -> Cow<'a, Ask> {
    let is_translated = |place: &&Place<'_>| organisation.dialect(&place.provider) == Some(Dialect::Anthropic);
    if ask.dialect == Dialect::Anthropic || !places.iter().any(is_translated) {
        return Cow::Borrowed(ask);
    }
    Cow::Owned(Ask { added: ask.added.saturating_add(TOKENS_FOR_INSTRUCTIONS), ..ask.clone() })
}

fn refused(admit: &Admit, provider: &str, refusal: &Refusal) -> audit::Refused {
    let ask = &admit.request.ask;
    audit::Refused {
        req: admit.request.req.0,
        code: refusal.code.name().to_owned(),
        provider: provider.to_owned(),
        endpoint: ask.endpoint.clone(),
        model: ask.model.clone().unwrap_or_default(),
    }
}

/// What a replay must repeat exactly to be the same request.
fn fingerprint(admit: &Admit) -> Vec<u8> {
    let ask = serde_json::to_vec(&admit.request.ask).unwrap_or_default();
    Sha256::new().chain_update(admit.token_hash).chain_update(ask).finalize().to_vec()
}
