//! The ledger's operations inside one SQLite transaction. Each first reads and decides, then writes: one that refuses
//! leaves nothing behind.

use super::objects::{self, References};
use super::{Admission, Admit, Admitted, Expired, LedgerKeys, Settle, Settled, StoreError, Used};
use crate::directory::{NoCredential, Organisation};
use keyward_core::admission::{self, Charge, Ended, Hold, KeyState, Status};
use keyward_core::audit::{self, Entry, Event, TryEntry};
use keyward_core::edge::{Outcome, RequestId, Settlement};
use keyward_core::models;
use keyward_core::money::Nanodollars;
use keyward_core::operation::Provider;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::usage::Usage;
use rusqlite::{Connection, OptionalExtension, Row, params};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Ended requests are remembered this long, so that a replay is told from a new request.
const REMEMBER_MS: u64 = 7 * 24 * 3_600_000;
/// Holds that one sweep charges at most.
const SWEEP: u32 = 1_000;

/// `requests.state`.
mod state {
    pub const HELD: i64 = 0;
    pub const SETTLED: i64 = 1;
    pub const VOIDED: i64 = 2;
    pub const EXPIRED: i64 = 3;
    pub const TOMBSTONE: i64 = 4;
}

pub struct Ledger<'a> {
    pub db: &'a Connection,
    pub keys: &'a LedgerKeys,
}

/// The end of a chain.
pub(super) struct Chain {
    pub organisation: String,
    pub epoch: u64,
    pub seq: u64,
    pub mac: [u8; 32],
}

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

/// Charges by day, key and model, gathered over a batch.
type Tally = BTreeMap<(String, u64, String, String, String), TallyLine>;

#[derive(Default)]
struct TallyLine {
    requests: u64,
    usage: Usage,
    nanodollars: i64,
    /// Of `nanodollars`, what was given back.
    returned: u64,
}

const DAY_MS: u64 = 86_400_000;

/// A key's sums. They saturate: SQLite would turn a sum that leaves 64 bits into a float.
struct Sums {
    spent: Nanodollars,
    reserved: Nanodollars,
    in_flight: u64,
}

/// A request as the ledger has it.
struct Request {
    key_id: String,
    state: i64,
    provider: String,
    model: String,
    stream: bool,
    choices: u64,
    hold: Hold,
    charge: Nanodollars,
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        StoreError::Database(error.to_string())
    }
}

impl Ledger<'_> {
    pub fn admit(&self, admit: &Admit) -> Result<Admission, StoreError> {
        let ask = &admit.request.ask;
        let fingerprint = fingerprint(admit);
        let Some(key) = self.key_by_token(&admit.token_hash)? else {
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
                let state = match standing(organisation, &key, admit) {
                    Ok(state) => state,
                    Err(_) => return Ok(Admission::Conflict),
                };
                let target = self.target(organisation, &key, &state, admit)?;
                return Ok(target.map_or(Admission::Conflict, |target| admitted(&key, target, hold, organisation.rev)));
            }
            Some(_) => return Ok(Admission::Conflict),
            None => {}
        }
        let (target, hold) = match self.decide(organisation, &key, admit)? {
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
                "INSERT INTO requests (req, key_id, state, fingerprint, provider, model, stream, choices, hold, hold_input, clamp, expires_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
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
            ])?;
        Ok(admitted(&key, target, hold, organisation.rev))
    }

    fn decide(&self, organisation: &Organisation, key: &Found, admit: &Admit) -> Result<Result<(Target, Hold), Refusal>, StoreError> {
        let ask = &admit.request.ask;
        let decided = standing(organisation, key, admit).and_then(|state| {
            let upstream = ask.model.as_deref().and_then(|model| organisation.route(model)).map(|target| target.model.as_str());
            let price = upstream.or(ask.model.as_deref()).and_then(|model| self.keys.prices.find(&ask.provider, model));
            let hold = admission::decide(&state, ask, upstream, price, admit.now_ms)?;
            Ok((state, hold))
        });
        match decided {
            Ok((state, hold)) => Ok(self.target(organisation, key, &state, admit)?.map(|target| (target, hold))),
            Err(refusal) => Ok(Err(refusal)),
        }
    }

    /// Where a request goes that may be made: which model, which credentials, which state, or the answer itself. A route's name
    /// leads to its target, any other model to itself at the provider asked for.
    fn target(
        &self,
        organisation: &Organisation,
        key: &Found,
        state: &KeyState,
        admit: &Admit,
    ) -> Result<Result<Target, Refusal>, StoreError> {
        let ask = &admit.request.ask;
        let route = ask.model.as_deref().and_then(|model| organisation.route(model));
        if let Some(route) = route.filter(|route| route.provider != ask.provider) {
            let message = format!("this model leads to {}, and this endpoint is one of {}", route.provider, ask.provider);
            return Ok(Err(Refusal::new(Code::UnknownModel, message)));
        }
        let credentials = organisation.credentials(&ask.provider, key.policy.as_deref(), route.and_then(|route| route.pool.as_deref()));
        if admission::operation(ask).lists_models() {
            let answer = self.models(organisation, state, admit, credentials.is_ok());
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
        Ok(Ok(Target { model, credentials, state: state.allow.state, answer: None }))
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

    /// Takes a batch of one or more VMs, in the order in which it was sent.
    pub fn settle(&self, batch: &[Settle], now_ms: u64) -> Result<Settled, StoreError> {
        let (mut done, mut tally) = (Settled::default(), Tally::new());
        for settle in batch {
            done.gaps += self.follow_vm(settle, now_ms)?;
            self.settle_one(settle, now_ms, &mut done, &mut tally)?;
        }
        done.used = self.book(tally)?;
        Ok(done)
    }

    /// Follows the chain of a VM's records. Returns how many are missing before this one.
    fn follow_vm(&self, settle: &Settle, now_ms: u64) -> Result<u64, StoreError> {
        let record = &settle.record;
        let known: Option<(i64, [u8; 32])> = self
            .db
            .prepare_cached("SELECT seq, mac FROM vms WHERE vm = ?1")?
            .query_row([record.vm.0], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()?;
        let (last, mac) = known.map_or((0, [0; 32]), |(seq, mac)| (unsigned(seq), mac));
        if record.seq <= last {
            return Ok(0);
        }
        self.db
            .prepare_cached("INSERT INTO vms (vm, seq, mac, seen_ms) VALUES (?1, ?2, ?3, ?4) ON CONFLICT (vm) DO UPDATE SET seq = ?2, mac = ?3, seen_ms = ?4")?
            .execute(params![record.vm.0, signed(record.seq), record.mac, signed(now_ms)])?;
        let missing = record.seq - last - 1;
        Ok(if missing == 0 && record.prev != mac { 1 } else { missing })
    }

    fn settle_one(&self, settle: &Settle, now_ms: u64, done: &mut Settled, tally: &mut Tally) -> Result<(), StoreError> {
        let settlement = &settle.settlement;
        let void = settlement.outcome == Outcome::Void;
        let Some(request) = self.request(settlement.req)? else {
            done.unknown += u64::from(!void);
            done.voided += u64::from(void);
            return self.bury(settlement.req, now_ms);
        };
        match (request.state, void) {
            (state::HELD | state::EXPIRED, true) => {
                done.voided += 1;
                let event = Event::Voided { req: settlement.req.0 };
                self.finish(settlement.req, &request, state::VOIDED, Nanodollars::ZERO, now_ms, event, tally)?;
                Ok(())
            }
            (state::HELD | state::EXPIRED, false) => {
                objects::settle(self.db, settle, &request.key_id, &request.provider, now_ms)?;
                self.charge(settlement, &request, now_ms, done, tally)
            }
            _ => {
                done.repeated += 1;
                Ok(())
            }
        }
    }

    fn charge(
        &self,
        settlement: &Settlement,
        request: &Request,
        now_ms: u64,
        done: &mut Settled,
        tally: &mut Tally,
    ) -> Result<(), StoreError> {
        let price = self.keys.prices.find(&request.provider, &request.model);
        let ended = Ended {
            sent: settlement.sent,
            status: settlement.status,
            stream: request.stream,
            usage: settlement.usage.as_ref(),
            input: settlement.input.as_ref(),
            visible_bytes: settlement.visible,
            choices: request.choices,
        };
        let charge = admission::charge(&request.hold, price, &ended);
        let line = self.finish(settlement.req, request, state::SETTLED, charge.amount, now_ms, settled_event(settlement, charge), tally)?;
        let usage = settlement.usage.or(settlement.input).unwrap_or_default();
        if let Some(line) = tally.get_mut(&line) {
            let input = usage.input.saturating_add(usage.audio_input).saturating_add(usage.image_input);
            line.usage.input = line.usage.input.saturating_add(input);
            line.usage.cache_read = line.usage.cache_read.saturating_add(usage.cache_read);
            line.usage.cache_write = line.usage.cache_write.saturating_add(usage.cache_write).saturating_add(usage.cache_write_1h);
            line.usage.output = line.usage.output.saturating_add(usage.output).saturating_add(usage.media_output);
        }
        done.input_tokens += usage.input + usage.cache_read + usage.cache_write + usage.cache_write_1h;
        done.output_tokens += usage.output;
        done.charged += 1;
        done.nanodollars = done.nanodollars.saturating_add(charge.amount.0);
        if charge.amount > request.hold.total && self.freeze(&request.key_id, settlement.req, now_ms)? {
            done.frozen += 1;
        }
        Ok(())
    }

    /// Moves a request to its end: the hold goes, the charge comes, the chain says so.
    #[allow(clippy::too_many_arguments, reason = "they are one fact: how which request ended, when, and for how much")]
    fn finish(
        &self,
        req: RequestId,
        request: &Request,
        to: i64,
        charge: Nanodollars,
        now_ms: u64,
        event: Event,
        tally: &mut Tally,
    ) -> Result<(String, u64, String, String, String), StoreError> {
        let (sums, chain) = self.sums_and_chain(&request.key_id)?;
        let (seq, mac) = self.append(&request.key_id, &chain, now_ms, event)?;
        let held = request.state == state::HELD;
        let released = if held { request.hold.total } else { Nanodollars::ZERO };
        let spent = sums.spent.plus(charge.minus(request.charge)).max(Nanodollars::ZERO);
        let reserved = sums.reserved.minus(released).max(Nanodollars::ZERO);
        let in_flight = sums.in_flight.saturating_sub(u64::from(held));
        self.db
            .prepare_cached("UPDATE keys SET spent = ?2, reserved = ?3, in_flight = ?4, chain_seq = ?5, chain_mac = ?6 WHERE id = ?1")?
            .execute(params![request.key_id, spent.0, reserved.0, signed(in_flight), signed(seq), mac])?;
        self.db.prepare_cached("UPDATE requests SET state = ?2, charge = ?3 WHERE req = ?1")?.execute(params![req.0, to, charge.0])?;
        let line = (chain.organisation, now_ms / DAY_MS, request.key_id.clone(), request.provider.clone(), request.model.clone());
        let booked = tally.entry(line.clone()).or_default();
        booked.requests += u64::from(held);
        let change = charge.minus(request.charge).0;
        booked.nanodollars = booked.nanodollars.saturating_add(change);
        booked.returned = booked.returned.saturating_add(if change < 0 { change.unsigned_abs() } else { 0 });
        Ok(line)
    }

    /// Adds what a batch was charged to the days' sums. Gives it summed up by model.
    fn book(&self, tally: Tally) -> Result<Vec<Used>, StoreError> {
        let mut used: Vec<Used> = Vec::new();
        for ((organisation, day, key, provider, model), line) in tally {
            self.db
                .prepare_cached(
                    "INSERT INTO usage (organisation, day, key_id, provider, model, requests, input, cache_read, cache_write, output, nanodollars)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
                     ON CONFLICT DO UPDATE SET requests = requests + ?6, input = input + ?7, cache_read = cache_read + ?8,
                         cache_write = cache_write + ?9, output = output + ?10, nanodollars = nanodollars + ?11",
                )?
                .execute(params![
                    organisation,
                    signed(day),
                    key,
                    provider,
                    model,
                    signed(line.requests),
                    tokens(line.usage.input),
                    tokens(line.usage.cache_read),
                    tokens(line.usage.cache_write),
                    tokens(line.usage.output),
                    line.nanodollars,
                ])?;
            match used.iter_mut().find(|used| used.provider == provider && used.model == model) {
                Some(used) => used.add(&line),
                None => {
                    let mut first = Used { provider, model, ..Used::default() };
                    first.add(&line);
                    used.push(first);
                }
            }
        }
        Ok(used)
    }

    /// An actual cost exceeded its hold: the key stops until an operator acts. Keys without a budget have no hold to exceed.
    fn freeze(&self, key_id: &str, req: RequestId, now_ms: u64) -> Result<bool, StoreError> {
        let changed = self
            .db
            .prepare_cached("UPDATE keys SET status = 'frozen' WHERE id = ?1 AND status = 'active' AND cap IS NOT NULL")?
            .execute([key_id])?;
        if changed > 0 {
            let reason = format!("the actual cost of {req} exceeded its hold");
            self.append_alone(key_id, &self.chain(key_id)?, now_ms, Event::KeyFrozen { reason })?;
        }
        Ok(changed > 0)
    }

    /// Remembers a request that was voided before it was admitted, so that its admission is refused.
    fn bury(&self, req: RequestId, now_ms: u64) -> Result<(), StoreError> {
        self.db
            .prepare_cached(
                "INSERT INTO requests (req, key_id, state, fingerprint, provider, model, stream, choices, hold, hold_input, expires_ms)
                 VALUES (?1, '', ?2, x'', '', '', 0, 0, 0, 0, ?3)",
            )?
            .execute(params![req.0, state::TOMBSTONE, signed(now_ms)])?;
        Ok(())
    }

    /// Charges the holds that are past their time: whoever held them has not said what they cost.
    pub fn expire(&self, now_ms: u64) -> Result<Expired, StoreError> {
        let mut select =
            self.db.prepare_cached("SELECT req FROM requests WHERE state = 0 AND expires_ms <= ?1 ORDER BY expires_ms LIMIT ?2")?;
        let due: Vec<[u8; 16]> = select.query_map(params![signed(now_ms), SWEEP], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let mut tally = Tally::new();
        for req in &due {
            let Some(request) = self.request(RequestId(*req))? else { continue };
            let charge = request.hold.total;
            let event = Event::Expired { req: *req, charge: charge.0 };
            self.finish(RequestId(*req), &request, state::EXPIRED, charge, now_ms, event, &mut tally)?;
        }
        let used = self.book(tally)?;
        self.db
            .prepare_cached("DELETE FROM requests WHERE req IN (SELECT req FROM requests WHERE state > 0 AND expires_ms < ?1 LIMIT ?2)")?
            .execute(params![signed(now_ms.saturating_sub(REMEMBER_MS)), SWEEP])?;
        Ok(Expired { holds: due.len() as u64, used })
    }

    pub(super) fn append(&self, key_id: &str, chain: &Chain, time_ms: u64, event: Event) -> Result<(u64, [u8; 32]), StoreError> {
        let seq = chain.seq + 1;
        let entry =
            Entry { epoch: chain.epoch, seq, time_ms, organisation: chain.organisation.clone(), key_id: key_id.to_owned(), event }.encode();
        let mac = self.keys.chain_key(key_id, chain.epoch).link(&chain.mac, &entry);
        self.db.prepare_cached("INSERT INTO audit (key_id, seq, entry, mac) VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            key_id,
            signed(seq),
            entry,
            mac
        ])?;
        Ok((seq, mac))
    }

    pub(super) fn append_alone(&self, key_id: &str, chain: &Chain, time_ms: u64, event: Event) -> Result<(), StoreError> {
        let (seq, mac) = self.append(key_id, chain, time_ms, event)?;
        self.db.prepare_cached("UPDATE keys SET chain_seq = ?2, chain_mac = ?3 WHERE id = ?1")?.execute(params![
            key_id,
            signed(seq),
            mac
        ])?;
        Ok(())
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

    pub(super) fn chain(&self, key_id: &str) -> Result<Chain, StoreError> {
        Ok(self.sums_and_chain(key_id)?.1)
    }

    fn sums_and_chain(&self, key_id: &str) -> Result<(Sums, Chain), StoreError> {
        let mut select = self
            .db
            .prepare_cached("SELECT spent, reserved, in_flight, organisation, chain_epoch, chain_seq, chain_mac FROM keys WHERE id = ?1")?;
        let found = select.query_row([key_id], |row| {
            let sums = Sums { spent: Nanodollars(row.get(0)?), reserved: Nanodollars(row.get(1)?), in_flight: unsigned(row.get(2)?) };
            Ok((sums, chain_at(row, 3)?))
        });
        Ok(found?)
    }

    fn seen(&self, req: RequestId) -> Result<Option<(i64, Vec<u8>, Hold)>, StoreError> {
        let mut select = self.db.prepare_cached("SELECT state, fingerprint, hold, hold_input, clamp FROM requests WHERE req = ?1")?;
        Ok(select.query_row([req.0], |row| Ok((row.get(0)?, row.get(1)?, hold_at(row, 2)?))).optional()?)
    }

    fn request(&self, req: RequestId) -> Result<Option<Request>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT key_id, state, provider, model, stream, choices, charge, hold, hold_input, clamp FROM requests WHERE req = ?1",
        )?;
        let request = select.query_row([req.0], |row| {
            Ok(Request {
                key_id: row.get(0)?,
                state: row.get(1)?,
                provider: row.get(2)?,
                model: row.get(3)?,
                stream: row.get(4)?,
                choices: unsigned(row.get(5)?),
                charge: Nanodollars(row.get(6)?),
                hold: hold_at(row, 7)?,
            })
        });
        Ok(request.optional()?)
    }
}

impl Used {
    fn add(&mut self, line: &TallyLine) {
        self.usage.input = self.usage.input.saturating_add(line.usage.input);
        self.usage.cache_read = self.usage.cache_read.saturating_add(line.usage.cache_read);
        self.usage.cache_write = self.usage.cache_write.saturating_add(line.usage.cache_write);
        self.usage.output = self.usage.output.saturating_add(line.usage.output);
        self.returned_nanodollars = self.returned_nanodollars.saturating_add(line.returned);
        let charged = u64::try_from(line.nanodollars.saturating_add_unsigned(line.returned)).unwrap_or(0);
        self.nanodollars = self.nanodollars.saturating_add(charged);
    }
}

fn admitted(key: &Found, target: Target, hold: Hold, rev: u64) -> Admission {
    let Target { model, credentials, state, answer } = target;
    Admission::Admitted(Box::new(Admitted { key_id: key.id.clone(), hold, model, credentials, state, answer, rev }))
}

/// The key as it stands under its team and policy, or why it may do nothing now.
fn standing(organisation: &Organisation, key: &Found, admit: &Admit) -> Result<KeyState, Refusal> {
    admission::check_standing(&key.state, admit.now_ms)?;
    if key.token_expires_ms.is_some_and(|at| at <= admit.now_ms) {
        return Err(Refusal::new(Code::Revoked, "this token was replaced by a newer one of its key"));
    }
    let provider = &admit.request.ask.provider;
    if !organisation.is_enabled(provider) {
        return Err(Refusal::new(Code::UnknownProvider, format!("the provider {provider} is switched off")));
    }
    let mut state = key.state.clone();
    let limits = organisation.limits(key.team.as_deref(), key.policy.as_deref());
    let gone = || Refusal::new(Code::PolicyUnavailable, "this key's team or policy does not exist; an operator has to act");
    state.limits = limits.ok_or_else(gone)?;
    state.allow.state = organisation.allows_state(state.allow.state, key.team.as_deref(), key.policy.as_deref());
    Ok(state)
}

fn no_credential(none: &NoCredential, provider: &str) -> Refusal {
    let message = match none {
        NoCredential::None => format!("no credential for {provider} is stored"),
        NoCredential::Pool(name) => format!("the pool {name} has no credential for {provider}"),
    };
    Refusal::new(Code::PoolExhausted, message).retry_after(30)
}

/// A count of tokens that can be added up for a long time: SQLite's sums end at 2^63.
fn tokens(n: u64) -> i64 {
    signed(n).min(1 << 48)
}

fn settled_event(settlement: &Settlement, charge: Charge) -> Event {
    let usage = settlement.usage.or(settlement.input).unwrap_or_default();
    let tries =
        settlement.tries.iter().map(|t| TryEntry { credential: t.credential.clone(), status: u64::from(t.status.unwrap_or(0)), ms: t.ms });
    Event::Settled(audit::Settled {
        req: settlement.req.0,
        outcome: match settlement.outcome {
            Outcome::Complete => "complete",
            Outcome::Cut => "cut",
            Outcome::Void => "void",
        }
        .to_owned(),
        status: u64::from(settlement.status.unwrap_or(0)),
        // The chain counts tokens, whatever they were made of.
        input: usage.input.saturating_add(usage.audio_input).saturating_add(usage.image_input),
        cache_read: usage.cache_read,
        cache_write: usage.cache_write,
        cache_write_1h: usage.cache_write_1h,
        output: usage.output.saturating_add(usage.media_output),
        reasoning: usage.reasoning,
        charge: charge.amount.0,
        estimated: charge.estimated,
        ms: settlement.ms,
        tries: tries.collect(),
    })
}

/// What a replay must repeat exactly to be the same request.
fn fingerprint(admit: &Admit) -> Vec<u8> {
    let ask = serde_json::to_vec(&admit.request.ask).unwrap_or_default();
    Sha256::new().chain_update(admit.token_hash).chain_update(ask).finalize().to_vec()
}

pub(super) fn status(row: &Row<'_>, at: usize) -> rusqlite::Result<Status> {
    Ok(match row.get_ref(at)?.as_str()? {
        "active" => Status::Active,
        "frozen" => Status::Frozen,
        // Whatever else it says, the key must not pass.
        _ => Status::Revoked,
    })
}

pub(super) fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, at: usize) -> rusqlite::Result<T> {
    let text = row.get_ref(at)?.as_str()?;
    serde_json::from_str(text).map_err(|error| rusqlite::Error::FromSqlConversionFailure(at, rusqlite::types::Type::Text, Box::new(error)))
}

fn chain_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Chain> {
    Ok(Chain { organisation: row.get(at)?, epoch: unsigned(row.get(at + 1)?), seq: unsigned(row.get(at + 2)?), mac: row.get(at + 3)? })
}

fn hold_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Hold> {
    let clamp: Option<i64> = row.get(at + 2)?;
    Ok(Hold { total: Nanodollars(row.get(at)?), input: Nanodollars(row.get(at + 1)?), clamp: clamp.map(unsigned) })
}

/// SQLite integers are signed; nothing stored here comes near the limit, and what does saturates.
pub fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}
