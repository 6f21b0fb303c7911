//! Alarms: what a person should look at, as an entry of the chain it concerns, and as mail for the organisation's webhook.

use super::accounts::{organisation_account, team_account};
use super::ledger::{Ledger, json as json_column, signed};
use super::settlement::Request;
use super::{Alarm, Settled, StoreError};
use crate::directory::Directory;
use keyward_core::audit::Event;
use keyward_core::limits::{Limits, Moment, Window};
use rusqlite::{OptionalExtension, params};
use serde_json::{Value, json};
use std::sync::Arc;

/// Shares of a budget, in percent, that are told when they are spent.
const SHARES: [u8; 3] = [50, 80, 100];

/// What of a key its alarms depend on.
#[derive(Debug)]
pub struct Facts {
    organisation: String,
    limits: Limits,
    policy: Option<String>,
}

/// What a budget alarm is about.
struct Level<'a> {
    /// `key`, `team` or `organisation`, and its id or name.
    of: (&'static str, &'a str),
    account: String,
    limits: Vec<&'a Limits>,
}

impl Ledger<'_> {
    /// Tells of every budget of the request's levels that has been spent up to a further share, once for each window.
    pub(super) fn look_at_budgets(
        &self,
        request: &Request,
        directory: &Directory,
        now: Moment,
        done: &mut Settled,
    ) -> Result<(), StoreError> {
        let Some(key) = self.facts(&request.key_id)? else { return Ok(()) };
        let organisation = &key.organisation;
        let Some(configured) = directory.organisations.get(organisation) else { return Ok(()) };
        let in_force = &configured.in_force;
        let policy = key.policy.as_ref().and_then(|policy| in_force.policies.get(policy));
        let limits = std::iter::once(&key.limits).chain(policy.map(|policy| &policy.limits)).collect();
        let mut levels = vec![Level { of: ("key", &request.key_id), account: request.key_id.clone(), limits }];
        if let Some((name, limits)) = request.team.as_ref().and_then(|name| Some((name, in_force.teams.get(name)?))) {
            levels.push(Level { of: ("team", name), account: team_account(organisation, name), limits: vec![limits] });
        }
        let limits = vec![&in_force.organisation];
        levels.push(Level { of: ("organisation", organisation), account: organisation_account(organisation), limits });
        for level in levels.iter().filter(|level| level.limits.iter().any(|limits| !limits.budgets.is_empty())) {
            self.look_at(level, organisation, now, done)?;
        }
        Ok(())
    }

    /// What of a key its alarms depend on. In memory until the key is changed.
    fn facts(&self, key_id: &str) -> Result<Option<Arc<Facts>>, StoreError> {
        if let Some(known) = self.accounts.facts.borrow().get(key_id) {
            return Ok(Some(known.clone()));
        }
        let mut select = self.db.prepare_cached("SELECT organisation, limits, policy FROM keys WHERE id = ?1")?;
        let found =
            select.query_row([key_id], |row| Ok(Facts { organisation: row.get(0)?, limits: json_column(row, 1)?, policy: row.get(2)? }));
        let facts = found.optional()?.map(Arc::new);
        self.accounts.facts.borrow_mut().extend(facts.clone().map(|facts| (key_id.to_owned(), facts)));
        Ok(facts)
    }

    fn look_at(&self, level: &Level<'_>, organisation: &str, now: Moment, done: &mut Settled) -> Result<(), StoreError> {
        for window in Window::ALL {
            let Some(cap) = level.limits.iter().filter_map(|limits| limits.budget(window)).min() else { continue };
            let (spent, alarmed) =
                self.account(&level.account, now, |account| (account.sums(window).spent, account.sums(window).alarmed))?;
            let reached = |share: u8| i128::from(spent.0) * 100 >= i128::from(cap.0) * i128::from(share);
            let Some(share) = SHARES.into_iter().rev().find(|share| *share > alarmed && reached(*share)) else { continue };
            self.change_account(&level.account, now, |account| account.sums_mut(window).alarmed = share)?;
            let (of, name) = level.of;
            let detail = json!({
                of: name, "window": window.name(), "percent": share, "spent_nanodollars": spent.0, "budget_nanodollars": cap.0,
            });
            match of {
                "key" => self.alarm(name, "budget", detail, now, done)?,
                _ => self.alarm_of_organisation(organisation, "budget", detail, now, done)?,
            }
        }
        Ok(())
    }

    /// Raises an alarm about a key.
    pub(super) fn alarm(&self, key_id: &str, what: &str, mut detail: Value, now: Moment, done: &mut Settled) -> Result<(), StoreError> {
        let chain = self.chain(key_id)?;
        if let Some(fields) = detail.as_object_mut() {
            fields.insert("key".to_owned(), key_id.into());
        }
        let event = Event::Alarm { what: what.to_owned(), detail: detail.to_string() };
        self.append_alone(key_id, &chain, now.wall_ms, event)?;
        self.post(&chain.organisation, what, detail, now, done)
    }

    /// Raises an alarm about what all keys of an organisation share.
    pub(super) fn alarm_of_organisation(
        &self,
        organisation: &str,
        what: &str,
        detail: Value,
        now: Moment,
        done: &mut Settled,
    ) -> Result<(), StoreError> {
        let event = Event::Alarm { what: what.to_owned(), detail: detail.to_string() };
        self.append_to_organisation(organisation, now.wall_ms, event)?;
        self.post(organisation, what, detail, now, done)
    }

    /// Puts an alarm where the webhook's sender finds it.
    fn post(&self, organisation: &str, what: &str, detail: Value, now: Moment, done: &mut Settled) -> Result<(), StoreError> {
        self.db
            .prepare_cached("INSERT INTO outbox (organisation, what, detail, time_ms, next_ms) VALUES (?1, ?2, ?3, ?4, ?4)")?
            .execute(params![organisation, what, detail.to_string(), signed(now.wall_ms)])?;
        done.alarms.push(Alarm { organisation: organisation.to_owned(), what: what.to_owned(), detail });
        Ok(())
    }
}
