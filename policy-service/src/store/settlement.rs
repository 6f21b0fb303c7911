//! How requests end, each in one transaction: settled, voided or expired; the charge, the entry, and the day's sums.

use super::accounts::{organisation_account, team_account};
use super::admission::Part;
use super::ledger::{Ledger, hold_at, signed, state, unsigned};
use super::{Expired, Settle, Settled, StoreError, Used, configuration, objects};
use crate::directory::Directory;
use keyward_core::admission::{self, Charge, Ended, Hold};
use keyward_core::audit::{self, Event, TryEntry};
use keyward_core::edge::{Outcome, RequestId, Settlement, Try};
use keyward_core::limits::{self, DAY_MS, Moment};
use keyward_core::money::Nanodollars;
use keyward_core::price::{Mode, Price};
use keyward_core::usage::Usage;
use rusqlite::{OptionalExtension, params};
use serde_json::json;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Ended requests are remembered this long, so that a replay is told from a new request.
const REMEMBER_MS: u64 = 7 * 24 * 3_600_000;
/// Holds that one sweep charges at most.
const SWEEP: u32 = 1_000;

/// Charges by organisation, day, key, provider and model, gathered over a batch.
type Tally = BTreeMap<(String, u64, String, String, String), TallyLine>;

#[derive(Default)]
struct TallyLine {
    requests: u64,
    usage: Usage,
    nanodollars: i64,
    /// Of `nanodollars`, what was given back.
    returned: u64,
}

/// A request as the ledger has it.
pub(super) struct Request {
    pub key_id: String,
    state: i64,
    provider: String,
    model: String,
    stream: bool,
    choices: u64,
    hold: Hold,
    /// What it was charged so far.
    charge: Nanodollars,
    tokens: u64,
    pub team: Option<String>,
    /// The day whose windows it is charged to.
    day: u64,
    bounded: bool,
    rated: i64,
    /// Where it could go, if to more than one place.
    parts: Vec<Part>,
}

/// How a request ends.
struct End {
    state: i64,
    charge: Nanodollars,
    tokens: u64,
    usage: Usage,
    event: Event,
    /// As the gate measured it, whatever the clock here did meanwhile.
    took_ms: Option<u64>,
}

impl Ledger<'_> {
    /// Takes a batch of one or more VMs, in the order in which it was sent.
    pub fn settle(&self, batch: &[Settle], directory: &Directory, now: Moment) -> Result<Settled, StoreError> {
        let now = self.accounts.moment(now);
        let (mut done, mut tally) = (Settled::default(), Tally::new());
        for settle in batch {
            done.gaps += self.follow_vm(settle, now.wall_ms)?;
            self.settle_one(settle, directory, now, &mut done, &mut tally)?;
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

    fn settle_one(
        &self,
        settle: &Settle,
        directory: &Directory,
        now: Moment,
        done: &mut Settled,
        tally: &mut Tally,
    ) -> Result<(), StoreError> {
        let settlement = &settle.settlement;
        let void = settlement.outcome == Outcome::Void;
        let Some(request) = self.request(settlement.req)? else {
            done.unknown += u64::from(!void);
            done.voided += u64::from(void);
            return self.bury(settlement.req, now.wall_ms);
        };
        match (request.state, void) {
            (state::HELD | state::EXPIRED, true) => {
                done.voided += 1;
                let event = Event::Voided { req: settlement.req.0 };
                let end = End { state: state::VOIDED, charge: Nanodollars::ZERO, tokens: 0, usage: Usage::default(), event, took_ms: None };
                self.finish(settlement.req, &request, None, end, now, tally)
            }
            (state::HELD | state::EXPIRED, false) => {
                let (provider, _) = request.at(settlement.tries.last());
                objects::settle(self.db, settle, &request.key_id, provider, now.wall_ms)?;
                for one in &settlement.tries {
                    *done.tries.entry((request.at(Some(one)).0.to_owned(), one.status)).or_default() += 1;
                }
                done.rotated += u64::from(settlement.tries.len() > 1);
                self.charge(settlement, &request, now, done, tally)?;
                if request.bounded { self.look_at_budgets(&request, directory, now, done) } else { Ok(()) }
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
        now: Moment,
        done: &mut Settled,
        tally: &mut Tally,
    ) -> Result<(), StoreError> {
        let last = settlement.tries.last();
        let (price, as_admitted) = self.price(settlement.req, request, last)?;
        let ended = Ended {
            sent: settlement.sent,
            status: settlement.status,
            stream: request.stream,
            usage: settlement.usage.as_ref(),
            input: settlement.input.as_ref(),
            visible_bytes: settlement.visible,
            beyond: settlement.beyond,
            choices: request.choices,
        };
        let mut charge = admission::charge(&request.part(last), price.as_ref(), &ended);
        // Tries of which nobody knows what became of them keep their share.
        for lost in settlement.tries.iter().rev().skip(1).filter(|one| one.lost) {
            let part = request.part(Some(lost));
            charge = Charge { amount: charge.amount.plus(part.total), tokens: charge.tokens.saturating_add(part.tokens), estimated: true };
        }
        // What an operator has changed since is no reason to charge more than was promised, or to freeze.
        if !as_admitted && charge.amount > request.hold.total {
            charge = Charge { amount: request.hold.total, estimated: true, ..charge };
        }
        let usage = settlement.usage.or(settlement.input).unwrap_or_default();
        let event = settled_event(settlement, request, charge);
        let end = End { state: state::SETTLED, charge: charge.amount, tokens: charge.tokens, usage, event, took_ms: Some(settlement.ms) };
        self.finish(settlement.req, request, last, end, now, tally)?;
        done.charged += 1;
        done.nanodollars = done.nanodollars.saturating_add(charge.amount.0);
        if charge.amount > request.hold.total && request.bounded {
            let detail = json!({
                "request": settlement.req.to_string(), "held_nanodollars": request.hold.total.0, "charged_nanodollars": charge.amount.0,
            });
            self.alarm(&request.key_id, "over_hold", detail, now, done)?;
            if self.freeze(&request.key_id, settlement.req, now, done)? {
                done.frozen.push(request.key_id.clone());
            }
        }
        Ok(())
    }

    /// The price of a request, and whether it is the one that it was admitted at. After a restart nobody remembers that, and the
    /// price is what it is now: when the organisation gives prices of its own, it may have been edited in between.
    fn price(&self, req: RequestId, request: &Request, last: Option<&Try>) -> Result<(Option<Price>, bool), StoreError> {
        if let Some(prices) = self.keys.admitted.of(req) {
            return Ok((prices.get(place(last)).cloned().flatten(), true));
        }
        let organisation = self.chain(&request.key_id)?.organisation;
        let (provider, model) = request.at(last);
        let own = configuration::own_prices(self.db, &organisation, provider)?;
        let table = &self.keys.prices;
        let stated = own.find(table, provider, model, &Mode::ALL);
        let price = stated.or_else(|| table.price(provider, model, &Mode::ALL).map(Cow::into_owned));
        Ok((price.filter(|_| !model.is_empty()), !own.gives(provider)))
    }

    /// Moves a request to its end: the hold goes, the charge comes, at every level; the chain and the tally say so.
    fn finish(
        &self,
        req: RequestId,
        request: &Request,
        last: Option<&Try>,
        end: End,
        now: Moment,
        tally: &mut Tally,
    ) -> Result<(), StoreError> {
        let chain = self.append(&request.key_id, &self.chain(&request.key_id)?, now.wall_ms, end.event)?;
        self.end_chain(&request.key_id, &chain);
        let held = request.state == state::HELD;
        let change = end.charge.minus(request.charge);
        let moves = limits::End {
            day: request.day,
            held,
            hold: request.hold.total,
            hold_tokens: request.hold.tokens,
            charge: change,
            tokens: signed(end.tokens).saturating_sub(signed(request.tokens)),
            void: end.state == state::VOIDED,
            took_ms: end.took_ms,
        };
        for (bit, account) in request.accounts(&chain.organisation) {
            self.change_account(&account, now, |account| account.end(&moves, now, request.rated & bit != 0))?;
        }
        self.db.prepare_cached("UPDATE requests SET state = ?2, charge = ?3, tokens = ?4 WHERE req = ?1")?.execute(params![
            req.0,
            end.state,
            end.charge.0,
            signed(end.tokens)
        ])?;
        let (provider, model) = request.at(last);
        let line = (chain.organisation, now.wall_ms / DAY_MS, request.key_id.clone(), provider.to_owned(), model.to_owned());
        let booked = tally.entry(line).or_default();
        booked.requests += u64::from(held);
        booked.nanodollars = booked.nanodollars.saturating_add(change.0);
        booked.returned = booked.returned.saturating_add(if change.0 < 0 { change.0.unsigned_abs() } else { 0 });
        add_tokens(&mut booked.usage, &end.usage);
        Ok(())
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

    /// An actual cost exceeded its hold: the key stops until an operator acts.
    fn freeze(&self, key_id: &str, req: RequestId, now: Moment, done: &mut Settled) -> Result<bool, StoreError> {
        let changed = self
            .db
            .prepare_cached("UPDATE keys SET status = 'frozen', version = version + 1 WHERE id = ?1 AND status = 'active'")?
            .execute([key_id])?;
        if changed > 0 {
            let reason = format!("the actual cost of {req} exceeded its hold");
            self.append_alone(key_id, &self.chain(key_id)?, now.wall_ms, Event::KeyFrozen { reason })?;
            self.alarm(key_id, "frozen", json!({ "request": req.to_string() }), now, done)?;
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
    pub fn expire(&self, now: Moment) -> Result<Expired, StoreError> {
        let (now, now_ms) = (self.accounts.moment(now), now.wall_ms);
        let mut select =
            self.db.prepare_cached("SELECT req FROM requests WHERE state = 0 AND expires_ms <= ?1 ORDER BY expires_ms LIMIT ?2")?;
        let due: Vec<[u8; 16]> = select.query_map(params![signed(now_ms), SWEEP], |row| row.get(0))?.collect::<Result<_, _>>()?;
        let mut tally = Tally::new();
        for req in &due {
            let Some(request) = self.request(RequestId(*req))? else { continue };
            let charge = request.hold.total;
            let event = Event::Expired { req: *req, charge: charge.0 };
            let end = End { state: state::EXPIRED, charge, tokens: request.hold.tokens, usage: Usage::default(), event, took_ms: None };
            self.finish(RequestId(*req), &request, None, end, now, &mut tally)?;
        }
        let used = self.book(tally)?;
        self.db
            .prepare_cached("DELETE FROM requests WHERE req IN (SELECT req FROM requests WHERE state > 0 AND expires_ms < ?1 LIMIT ?2)")?
            .execute(params![signed(now_ms.saturating_sub(REMEMBER_MS)), SWEEP])?;
        Ok(Expired { holds: due.len() as u64, used })
    }

    fn request(&self, req: RequestId) -> Result<Option<Request>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT key_id, state, provider, model, stream, choices, charge, hold, hold_input, clamp, hold_tokens, hold_output, tokens, team,
                 day, bounded, rated, targets FROM requests WHERE req = ?1",
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
                tokens: unsigned(row.get(12)?),
                team: row.get(13)?,
                day: unsigned(row.get(14)?),
                bounded: row.get(15)?,
                rated: row.get(16)?,
                parts: row.get::<_, Option<String>>(17)?.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default(),
            })
        });
        Ok(request.optional()?)
    }
}

impl Request {
    /// The provider and model of a try.
    fn at(&self, one: Option<&Try>) -> (&str, &str) {
        let part = self.parts.get(place(one));
        part.map_or((&self.provider, &self.model), |part| (&part.provider, &part.model))
    }

    /// What was held for the target of a try.
    fn part(&self, one: Option<&Try>) -> Hold {
        self.parts.get(place(one)).map_or(self.hold, |part| part.hold)
    }

    /// The accounts that it was booked on, each with its bit in `rated`.
    fn accounts(&self, organisation: &str) -> impl Iterator<Item = (i64, String)> {
        let team = self.team.as_ref().map(|team| (2, team_account(organisation, team)));
        std::iter::once((1, self.key_id.clone())).chain(team).chain(std::iter::once((4, organisation_account(organisation))))
    }
}

impl Used {
    fn add(&mut self, line: &TallyLine) {
        add_tokens(&mut self.usage, &line.usage);
        self.returned_nanodollars = self.returned_nanodollars.saturating_add(line.returned);
        let charged = u64::try_from(line.nanodollars.saturating_add_unsigned(line.returned)).unwrap_or(0);
        self.nanodollars = self.nanodollars.saturating_add(charged);
    }
}

/// Adds up tokens by what operators are shown: whatever they were made of, and however long a cache keeps them.
fn add_tokens(to: &mut Usage, usage: &Usage) {
    let add = |to: &mut u64, parts: &[u64]| *to = parts.iter().fold(*to, |sum, part| sum.saturating_add(*part));
    add(&mut to.input, &[usage.input, usage.audio_input, usage.image_input]);
    add(&mut to.cache_read, &[usage.cache_read]);
    add(&mut to.cache_write, &[usage.cache_write, usage.cache_write_1h]);
    add(&mut to.output, &[usage.output, usage.media_output]);
}

/// A count of tokens that can be added up for a long time: SQLite's sums end at 2^63.
fn tokens(n: u64) -> i64 {
    signed(n).min(1 << 48)
}

/// The place of a try's target in the plan.
fn place(one: Option<&Try>) -> usize {
    one.and_then(|one| usize::try_from(one.target).ok()).unwrap_or(0)
}

fn settled_event(settlement: &Settlement, request: &Request, charge: Charge) -> Event {
    let usage = settlement.usage.or(settlement.input).unwrap_or_default();
    let (provider, model) = request.at(settlement.tries.last());
    let tries =
        settlement.tries.iter().map(|t| TryEntry { credential: t.credential.clone(), status: u64::from(t.status.unwrap_or(0)), ms: t.ms });
    Event::Settled(audit::Settled {
        req: settlement.req.0,
        outcome: match (settlement.ended, settlement.outcome) {
            (Some(code), _) => format!("ended:{}", code.name()),
            (None, Outcome::Complete) => "complete".to_owned(),
            (None, Outcome::Cut) => "cut".to_owned(),
            (None, Outcome::Void) => "void".to_owned(),
        },
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
        provider: provider.to_owned(),
        model: model.to_owned(),
    })
}
