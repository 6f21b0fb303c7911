//! The accounts of keys, teams and organisations and the ends of the keys' chains, as the writer has them: read once, changed
//! in memory, written once for each commit, however many requests of the group share them.

use super::StoreError;
use super::alarms::Facts;
use super::ledger::{Chain, Ledger, signed, unsigned};
use keyward_core::limits::{Account, Moment, Recent, Sums, Window};
use keyward_core::money::Nanodollars;
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::sync::Arc;

/// Accounts that stay in memory between commits, at most.
const MAX_CACHED: usize = 20_000;

pub const ACCOUNT_COLUMNS: &str =
    "a.day, a.in_flight, a.day_spent, a.day_reserved, a.day_requests, a.day_tokens, a.day_tokens_reserved, a.day_alarmed,
    a.month_spent, a.month_reserved, a.month_requests, a.month_tokens, a.month_tokens_reserved, a.month_alarmed,
    a.total_spent, a.total_reserved, a.total_requests, a.total_tokens, a.total_tokens_reserved, a.total_alarmed";
const COLUMNS: usize = 20;

/// The account of a team.
pub fn team_account(organisation: &str, team: &str) -> String {
    format!("team/{organisation}/{team}")
}

/// The account of an organisation.
pub fn organisation_account(organisation: &str) -> String {
    format!("org/{organisation}")
}

/// Reads [`ACCOUNT_COLUMNS`] from column `at` on. What is not there is an account without any past.
pub fn account_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Account> {
    let number = |i: usize| Ok::<_, rusqlite::Error>(row.get::<_, Option<i64>>(at + i)?.unwrap_or(0));
    let sums = |first: usize| {
        Ok::<_, rusqlite::Error>(Sums {
            spent: Nanodollars(number(first)?),
            reserved: Nanodollars(number(first + 1)?),
            requests: unsigned(number(first + 2)?),
            tokens: unsigned(number(first + 3)?),
            tokens_reserved: unsigned(number(first + 4)?),
            alarmed: u8::try_from(number(first + 5)?).unwrap_or(100),
        })
    };
    Ok(Account::new(unsigned(number(0)?), [sums(2)?, sums(8)?, sums(14)?], unsigned(number(1)?), Recent::default()))
}

/// The account of this name as it is stored.
pub fn read(db: &Connection, id: &str) -> Result<Account, StoreError> {
    let mut select = db.prepare_cached(&format!("SELECT {ACCOUNT_COLUMNS} FROM accounts a WHERE id = ?1"))?;
    Ok(select.query_row([id], |row| account_at(row, 0)).optional()?.unwrap_or_default())
}

/// What the writer knows of the accounts.
#[derive(Debug, Default)]
pub struct Accounts {
    cached: RefCell<HashMap<String, Account>>,
    /// Changed since the last commit.
    dirty: RefCell<Vec<String>>,
    chains: RefCell<HashMap<String, Chain>>,
    dirty_chains: RefCell<Vec<String>>,
    pub(super) facts: RefCell<HashMap<String, Arc<Facts>>>,
    /// The latest day that any window has begun on: a clock that is set back does not bring it back.
    day: Cell<u64>,
    /// The day as it is stored.
    stored_day: Cell<u64>,
}

impl Accounts {
    pub fn open(db: &Connection) -> Result<Self, StoreError> {
        let begun: Option<i64> = db.query_row("SELECT max(day) FROM accounts", [], |row| row.get(0))?;
        // A day on which nothing was booked has begun all the same.
        let seen: Option<[u8; 8]> = db.query_row("SELECT value FROM meta WHERE name = 'day'", [], |row| row.get(0)).optional()?;
        let seen = seen.map_or(0, u64::from_be_bytes);
        let day = unsigned(begun.unwrap_or(0)).max(seen);
        Ok(Accounts { day: Cell::new(day), stored_day: Cell::new(seen), ..Accounts::default() })
    }

    /// Writes what has changed. Part of the commit.
    pub fn flush(&self, db: &Connection) -> Result<(), StoreError> {
        let mut cached = self.cached.borrow_mut();
        let mut insert = db.prepare_cached(
            "INSERT OR REPLACE INTO accounts VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23)",
        )?;
        let mut dirty = std::mem::take(&mut *self.dirty.borrow_mut());
        dirty.sort_unstable();
        dirty.dedup();
        for id in dirty {
            let Some(account) = cached.get(&id) else { continue };
            let [day, month, total] = Window::ALL.map(|window| account.sums(window));
            insert.execute(params![
                id,
                signed(account.day),
                signed(account.in_flight),
                day.spent.0,
                day.reserved.0,
                signed(day.requests),
                signed(day.tokens),
                signed(day.tokens_reserved),
                day.alarmed,
                month.spent.0,
                month.reserved.0,
                signed(month.requests),
                signed(month.tokens),
                signed(month.tokens_reserved),
                month.alarmed,
                total.spent.0,
                total.reserved.0,
                signed(total.requests),
                signed(total.tokens),
                signed(total.tokens_reserved),
                total.alarmed,
                account.recent.to_bytes(),
                signed(account.usual_ms),
            ])?;
        }
        if cached.len() > MAX_CACHED {
            cached.clear();
        }
        if self.stored_day.get() < self.day.get() {
            db.prepare_cached("INSERT INTO meta (name, value) VALUES ('day', ?1) ON CONFLICT (name) DO UPDATE SET value = ?1")?
                .execute([self.day.get().to_be_bytes()])?;
            self.stored_day.set(self.day.get());
        }
        self.flush_chains(db)
    }

    fn flush_chains(&self, db: &Connection) -> Result<(), StoreError> {
        let mut chains = self.chains.borrow_mut();
        let mut update = db.prepare_cached("UPDATE keys SET chain_seq = ?2, chain_mac = ?3 WHERE id = ?1")?;
        let mut dirty = std::mem::take(&mut *self.dirty_chains.borrow_mut());
        dirty.sort_unstable();
        dirty.dedup();
        for id in dirty {
            let Some(end) = chains.get(&id) else { continue };
            update.execute(params![id, signed(end.seq), end.mac])?;
        }
        if chains.len() > MAX_CACHED {
            chains.clear();
            self.facts.borrow_mut().clear();
        }
        Ok(())
    }

    /// The commit failed: what was changed did not happen.
    pub fn forget(&self) {
        self.cached.borrow_mut().clear();
        self.dirty.borrow_mut().clear();
        self.chains.borrow_mut().clear();
        self.dirty_chains.borrow_mut().clear();
        self.stored_day.set(0);
        self.facts.borrow_mut().clear();
    }

    /// Runs `look` on what is in memory.
    pub fn look<T>(&self, look: impl FnOnce(&HashMap<String, Account>) -> T) -> T {
        look(&self.cached.borrow())
    }

    /// The moment with the day whose windows count.
    pub fn moment(&self, now: Moment) -> Moment {
        self.day.set(self.day.get().max(now.day));
        Moment { day: self.day.get(), ..now }
    }
}

impl Ledger<'_> {
    /// The end of a key's chain, where it is known in memory.
    pub(super) fn known_chain(&self, key_id: &str) -> Option<Chain> {
        self.accounts.chains.borrow().get(key_id).cloned()
    }

    pub(super) fn know_chain(&self, key_id: &str, end: &Chain) {
        self.accounts.chains.borrow_mut().insert(key_id.to_owned(), end.clone());
    }

    /// Moves a key's chain to a new end; it is written with the commit.
    pub(super) fn end_chain(&self, key_id: &str, end: &Chain) {
        self.know_chain(key_id, end);
        self.accounts.dirty_chains.borrow_mut().push(key_id.to_owned());
    }

    /// Runs `with` on an account as of now.
    pub(super) fn account<T>(&self, id: &str, now: Moment, with: impl FnOnce(&mut Account) -> T) -> Result<T, StoreError> {
        let mut cached = self.accounts.cached.borrow_mut();
        if !cached.contains_key(id) {
            cached.insert(id.to_owned(), self.read_account(id, now)?);
        }
        let account = cached.get_mut(id).ok_or(StoreError::Damaged("an account that is gone"))?;
        account.advance(now);
        Ok(with(account))
    }

    /// The same; what it changes is written with the commit.
    pub(super) fn change_account<T>(&self, id: &str, now: Moment, change: impl FnOnce(&mut Account) -> T) -> Result<T, StoreError> {
        let changed = self.account(id, now, change)?;
        self.accounts.dirty.borrow_mut().push(id.to_owned());
        Ok(changed)
    }

    fn read_account(&self, id: &str, now: Moment) -> Result<Account, StoreError> {
        let mut select =
            self.db.prepare_cached(&format!("SELECT {ACCOUNT_COLUMNS}, a.recent, a.usual_ms FROM accounts a WHERE id = ?1"))?;
        let found = select.query_row([id], |row| {
            let recent: Vec<u8> = row.get(COLUMNS)?;
            let mut account = account_at(row, 0)?;
            account.recent = Recent::from_bytes(&recent, now.steady_ms);
            account.usual_ms = unsigned(row.get(COLUMNS + 1)?);
            Ok(account)
        });
        Ok(found.optional()?.unwrap_or_default())
    }
}
