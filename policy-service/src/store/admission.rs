//! An admission, in one transaction: who asks, whether they may, what is held for it, where it goes; and its entry.

use super::ledger::{Chain, Ledger, chain_at, hold_at, json, signed, state, status, unsigned};
use super::objects::{self, References};
use super::{Admission, Admit, Admitted, StoreError};
use crate::directory::{NoCredential, Organisation};
use keyward_core::admission::{self, Hold, KeyState};
use keyward_core::audit::{self, Event};
use keyward_core::edge::{Ask, RequestId};
use keyward_core::models;
use keyward_core::money::Nanodollars;
use keyward_core::operation::Provider;
use keyward_core::refusal::{Code, Refusal};
use rusqlite::{OptionalExtension, params};
use sha2::{Digest, Sha256};

/// A key found by one of its tokens.
struct Found {
    id: String,
    state: KeyState,
    chain: Chain,
    team: Option<String>,
    policy: Option<String>,
    /// A newer token has taken this one's place since then.
    token_expires_ms: Option<u64>,
}

/// Where an admitted request goes.
#[derive(Default)]
struct Target {
    model: Option<String>,
    credentials: Vec<String>,
    state: bool,
    answer: Option<String>,
}

impl Ledger<'_> {
    pub fn admit(&self, admit: &Admit) -> Result<Admission, StoreError> {
        let ask = &admit.request.ask;
        let fingerprint = fingerprint(admit);
        let Some(mut key) = self.key_by_token(&admit.token_hash)? else {
            return Ok(Admission::Refused(Refusal::new(Code::UnknownKey, keyward_core::credentials::UNKNOWN_KEY)));
        };
        let organisation =
            admit.directory.organisations.get(&key.chain.organisation).ok_or(StoreError::Damaged("a key without organisation"))?;
        match self.seen(admit.request.req)? {
            Some((state::TOMBSTONE, _, _)) => {
                let refusal = Refusal::new(Code::PolicyUnavailable, "this request was given up before it was admitted");
                return self.refuse(&key, admit, refusal);
            }
            Some((state::HELD, seen, hold)) if seen == fingerprint => {
                if key.stand(organisation, admit).is_err() {
                    return Ok(Admission::Conflict);
                }
                let target = self.target(organisation, &key, admit)?;
                return Ok(target.map_or(Admission::Conflict, |target| admitted(&key, target, hold, organisation.rev, ask)));
            }
            Some(_) => return Ok(Admission::Conflict),
            None => {}
        }
        let (target, hold) = match self.decide(organisation, &mut key, admit)? {
            Ok(decided) => decided,
            Err(refusal) if admit.patient && key.state.in_flight > 0 && refusal == objects::not_owned() => return Ok(Admission::NotYet),
            Err(refusal) => return self.refuse(&key, admit, refusal),
        };
        let event = Event::Admitted(audit::Admitted {
            req: admit.request.req.0,
            vm: admit.request.vm.0,
            node: admit.request.node.clone(),
            provider: ask.provider.clone(),
            endpoint: ask.endpoint.clone(),
            model: ask.model.clone().unwrap_or_default(),
            stream: ask.stream,
            bytes: ask.bytes,
            clamp: hold.clamp.unwrap_or(u64::MAX),
            choices: ask.choices,
            hold: hold.total.0,
            rev: organisation.rev,
            credentials: target.credentials.clone(),
        });
        let (seq, mac) = self.append(&key.id, &key.chain, admit.now_ms, event)?;
        self.db
            .prepare_cached(
                "UPDATE keys SET reserved = reserved + ?2, in_flight = in_flight + 1, chain_seq = ?3, chain_mac = ?4 WHERE id = ?1",
            )?
            .execute(params![key.id, hold.total.0, signed(seq), mac])?;
        self.db
            .prepare_cached(
                "INSERT INTO requests (req, key_id, state, fingerprint, provider, model, stream, choices, hold, hold_input, clamp, expires_ms,
                     endpoint, asked, token)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            )?
            .execute(params![
                admit.request.req.0,
                key.id,
                state::HELD,
                fingerprint,
                ask.provider,
                target.model.as_deref().unwrap_or_default(),
                ask.stream,
                signed(ask.choices),
                hold.total.0,
                hold.input.0,
                hold.clamp.map(signed),
                signed(admit.expires_ms),
                ask.endpoint,
                ask.model,
                admit.token_hash,
            ])?;
        Ok(admitted(&key, target, hold, organisation.rev, ask))
    }

    fn decide(&self, organisation: &Organisation, key: &mut Found, admit: &Admit) -> Result<Result<(Target, Hold), Refusal>, StoreError> {
        let ask = &admit.request.ask;
        let decided = key.stand(organisation, admit).and_then(|()| {
            let upstream = ask.model.as_deref().and_then(|model| organisation.route(model)).map(|target| target.model.as_str());
            let price = upstream.or(ask.model.as_deref()).and_then(|model| self.keys.prices.find(&ask.provider, model));
            admission::decide(&key.state, ask, upstream, price, admit.now_ms)
        });
        match decided {
            Ok(hold) => Ok(self.target(organisation, key, admit)?.map(|target| (target, hold))),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Where a request goes that may be made: which model, which credentials, which state, or the answer itself. A route's name
    /// leads to its target, any other model to itself at the provider asked for.
    fn target(&self, organisation: &Organisation, key: &Found, admit: &Admit) -> Result<Result<Target, Refusal>, StoreError> {
        let ask = &admit.request.ask;
        let route = ask.model.as_deref().and_then(|model| organisation.route(model));
        if let Some(route) = route.filter(|route| route.provider != ask.provider) {
            let message = format!("this model leads to {}, and this endpoint is one of {}", route.provider, ask.provider);
            return Ok(Err(Refusal::new(Code::UnknownModel, message)));
        }
        let credentials = organisation.credentials(&ask.provider, key.policy.as_deref(), route.and_then(|route| route.pool.as_deref()));
        if admission::operation(ask).lists_models() {
            let answer = self.models(organisation, &key.state, admit, credentials.is_ok());
            return Ok(answer.map(|answer| Target { answer: Some(answer), ..Target::default() }));
        }
        let credentials = match credentials {
            Ok(credentials) => credentials,
            Err(none) => return Ok(Err(no_credential(&none, &ask.provider))),
        };
        let credentials = match objects::references(self.db, &key.chain.organisation, &key.id, ask)? {
            References::None => credentials,
            References::Own(credential) if credentials.contains(&credential) => vec![credential],
            References::Own(credential) => return Ok(Err(objects::unreachable(&credential))),
            References::Unknown => return Ok(Err(objects::not_owned())),
            References::Refused(refusal) => return Ok(Err(refusal)),
        };
        let model = route.map(|route| route.model.clone()).or_else(|| ask.model.clone());
        Ok(Ok(Target { model, credentials, state: key.state.allow.state, answer: None }))
    }

    /// The models that a key may use, of a provider that can be reached.
    fn models(&self, organisation: &Organisation, state: &KeyState, admit: &Admit, reachable: bool) -> Result<String, Refusal> {
        let ask = &admit.request.ask;
        let provider = Provider::by_name(&ask.provider)
            .ok_or_else(|| Refusal::new(Code::UnknownProvider, format!("there is no provider {}", ask.provider)))?;
        let models = if reachable {
            models::usable(&self.keys.prices, provider, &state.lists(), organisation.routes_to(provider.name))
        } else {
            Vec::new()
        };
        models::answer(provider, &models, ask.model.as_deref())
    }

    fn refuse(&self, key: &Found, admit: &Admit, refusal: Refusal) -> Result<Admission, StoreError> {
        let ask = &admit.request.ask;
        let event = Event::Refused(audit::Refused {
            req: admit.request.req.0,
            code: refusal.code.name().to_owned(),
            provider: ask.provider.clone(),
            endpoint: ask.endpoint.clone(),
            model: ask.model.clone().unwrap_or_default(),
        });
        self.append_alone(&key.id, &key.chain, admit.now_ms, event)?;
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
            "SELECT status, expires_ms, allow, cap, spent, reserved, in_flight, organisation, chain_epoch, chain_seq, chain_mac, team, policy
             FROM keys WHERE id = ?1",
        )?;
        let found = select
            .query_row([&id], |row| {
                let state = KeyState {
                    status: status(row, 0)?,
                    expires_ms: row.get::<_, Option<i64>>(1)?.map(unsigned),
                    allow: json(row, 2)?,
                    limits: Vec::new(),
                    cap: row.get::<_, Option<i64>>(3)?.map(Nanodollars),
                    spent: Nanodollars(row.get(4)?),
                    reserved: Nanodollars(row.get(5)?),
                    in_flight: unsigned(row.get(6)?),
                };
                let token_expires_ms = token_expires_ms.map(unsigned);
                Ok(Found { id: id.clone(), state, chain: chain_at(row, 7)?, team: row.get(11)?, policy: row.get(12)?, token_expires_ms })
            })
            .optional()?;
        Ok(found)
    }

    fn seen(&self, req: RequestId) -> Result<Option<(i64, Vec<u8>, Hold)>, StoreError> {
        let mut select = self.db.prepare_cached("SELECT state, fingerprint, hold, hold_input, clamp FROM requests WHERE req = ?1")?;
        Ok(select.query_row([req.0], |row| Ok((row.get(0)?, row.get(1)?, hold_at(row, 2)?))).optional()?)
    }
}

impl Found {
    /// Puts the key under its team and policy, or says why it may do nothing now.
    fn stand(&mut self, organisation: &Organisation, admit: &Admit) -> Result<(), Refusal> {
        admission::check_standing(&self.state, admit.now_ms)?;
        if self.token_expires_ms.is_some_and(|at| at <= admit.now_ms) {
            return Err(Refusal::new(Code::Revoked, "this token was replaced by a newer one of its key"));
        }
        let provider = &admit.request.ask.provider;
        if !organisation.is_enabled(provider) {
            return Err(Refusal::new(Code::UnknownProvider, format!("the provider {provider} is switched off")));
        }
        let (team, policy) = (self.team.as_deref(), self.policy.as_deref());
        let gone = || Refusal::new(Code::PolicyUnavailable, "this key's team or policy does not exist; an operator has to act");
        self.state.limits = organisation.limits(team, policy).ok_or_else(gone)?;
        self.state.allow.state = organisation.allows_state(self.state.allow.state, team, policy);
        Ok(())
    }
}

fn admitted(key: &Found, target: Target, hold: Hold, rev: u64, ask: &Ask) -> Admission {
    let Target { model, credentials, state, answer } = target;
    let expires_ms = key.state.expires_ms.into_iter().chain(key.token_expires_ms).min();
    // Where output has a limit, that is what was held for; without a budget the hold binds nobody.
    let limited = key.state.cap.is_some() && !admission::operation(ask).limits().is_empty();
    let per_choice = hold.clamp.or(ask.max_tokens).filter(|_| limited);
    let output_limit = per_choice.map(|limit| limit.saturating_mul(ask.choices.max(1)));
    Admission::Admitted(Box::new(Admitted {
        key_id: key.id.clone(),
        hold,
        model,
        credentials,
        state,
        answer,
        expires_ms,
        output_limit,
        rev,
    }))
}

fn no_credential(none: &NoCredential, provider: &str) -> Refusal {
    let message = match none {
        NoCredential::None => format!("no credential for {provider} is stored"),
        NoCredential::Pool(name) => format!("the pool {name} has no credential for {provider}"),
    };
    Refusal::new(Code::PoolExhausted, message).retry_after(30)
}

/// What a replay must repeat exactly to be the same request.
fn fingerprint(admit: &Admit) -> Vec<u8> {
    let ask = serde_json::to_vec(&admit.request.ask).unwrap_or_default();
    Sha256::new().chain_update(admit.token_hash).chain_update(ask).finalize().to_vec()
}
