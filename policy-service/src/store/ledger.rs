//! What every operation of the ledger stands on, inside one SQLite transaction: the chains, and how columns are read. Each
//! operation first reads and decides, then writes: one that refuses leaves nothing behind.

use super::accounts::Accounts;
use super::{LedgerKeys, StoreError};
use keyward_core::admission::{Hold, Status};
use keyward_core::audit::{Entry, Event};
use keyward_core::limits::Enforce;
use keyward_core::money::Nanodollars;
use rusqlite::{Connection, Row, params};

/// `requests.state`.
pub(super) mod state {
    pub const HELD: i64 = 0;
    pub const SETTLED: i64 = 1;
    pub const VOIDED: i64 = 2;
    pub const EXPIRED: i64 = 3;
    pub const TOMBSTONE: i64 = 4;
}

pub struct Ledger<'a> {
    pub db: &'a Connection,
    pub keys: &'a LedgerKeys,
    pub accounts: &'a Accounts,
}

/// The end of a chain.
#[derive(Debug, Clone)]
pub struct Chain {
    pub organisation: String,
    pub epoch: u64,
    pub seq: u64,
    pub mac: [u8; 32],
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        StoreError::Database(error.to_string())
    }
}

impl Ledger<'_> {
    /// Appends an entry. Gives the chain's new end, which the caller has to store.
    pub(super) fn append(&self, key_id: &str, chain: &Chain, time_ms: u64, event: Event) -> Result<Chain, StoreError> {
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
        Ok(Chain { organisation: chain.organisation.clone(), epoch: chain.epoch, seq, mac })
    }

    pub(super) fn append_alone(&self, key_id: &str, chain: &Chain, time_ms: u64, event: Event) -> Result<(), StoreError> {
        let end = self.append(key_id, chain, time_ms, event)?;
        self.end_chain(key_id, &end);
        Ok(())
    }

    pub(super) fn chain(&self, key_id: &str) -> Result<Chain, StoreError> {
        if let Some(known) = self.known_chain(key_id) {
            return Ok(known);
        }
        let mut select = self.db.prepare_cached("SELECT organisation, chain_epoch, chain_seq, chain_mac FROM keys WHERE id = ?1")?;
        let chain = select.query_row([key_id], |row| chain_at(row, 0))?;
        self.know_chain(key_id, &chain);
        Ok(chain)
    }
}

pub(super) fn status(row: &Row<'_>, at: usize) -> rusqlite::Result<Status> {
    Ok(match row.get_ref(at)?.as_str()? {
        "active" => Status::Active,
        "frozen" => Status::Frozen,
        // Whatever else it says, the key must not pass.
        _ => Status::Revoked,
    })
}

pub(super) fn enforce(row: &Row<'_>, at: usize) -> rusqlite::Result<Enforce> {
    Ok(if row.get_ref(at)?.as_str()? == "shadow" { Enforce::Shadow } else { Enforce::Enforce })
}

pub(super) fn json<T: serde::de::DeserializeOwned>(row: &Row<'_>, at: usize) -> rusqlite::Result<T> {
    let text = row.get_ref(at)?.as_str()?;
    serde_json::from_str(text).map_err(|error| rusqlite::Error::FromSqlConversionFailure(at, rusqlite::types::Type::Text, Box::new(error)))
}

pub(super) fn chain_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Chain> {
    Ok(Chain { organisation: row.get(at)?, epoch: unsigned(row.get(at + 1)?), seq: unsigned(row.get(at + 2)?), mac: row.get(at + 3)? })
}

/// Reads `hold, hold_input, clamp, hold_tokens, hold_output`.
pub(super) fn hold_at(row: &Row<'_>, at: usize) -> rusqlite::Result<Hold> {
    let clamp: Option<i64> = row.get(at + 2)?;
    Ok(Hold {
        total: Nanodollars(row.get(at)?),
        input: Nanodollars(row.get(at + 1)?),
        clamp: clamp.map(unsigned),
        tokens: unsigned(row.get(at + 3)?),
        output_tokens: unsigned(row.get(at + 4)?),
    })
}

/// SQLite integers are signed; nothing stored here comes near the limit, and what does saturates.
pub fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

pub fn unsigned(n: i64) -> u64 {
    u64::try_from(n).unwrap_or(0)
}
