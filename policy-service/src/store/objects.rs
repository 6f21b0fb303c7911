//! Who made which object at a provider: keys that share an account must not reach each other's.

use super::ledger::signed;
use super::{Settle, StoreError};
use keyward_core::edge::Ask;
use keyward_core::operation::is_id;
use keyward_core::refusal::{Code, Refusal};
use rusqlite::{Connection, OptionalExtension, params};

/// Objects that one settlement records, at most.
const MAX_CREATED: usize = 256;

/// What a request's references come to.
pub enum References {
    /// It refers to nothing.
    None,
    /// All are the key's own, and this credential reaches them.
    Own(String),
    /// At least one is not known.
    Unknown,
    Refused(Refusal),
}

/// Looks the references of a request up. An object of another key's and one that nobody has made are the same to the caller.
pub fn references(db: &Connection, organisation: &str, key_id: &str, provider: &str, ask: &Ask) -> Result<References, StoreError> {
    let mut select = db.prepare_cached("SELECT key_id, credential FROM objects WHERE organisation = ?1 AND provider = ?2 AND id = ?3")?;
    let mut pinned: Option<String> = None;
    for id in &ask.refs {
        let found = select.query_row(params![organisation, provider, id], |row| Ok((row.get(0)?, row.get(1)?)));
        let found: Option<(String, String)> = found.optional()?;
        let Some((_, credential)) = found.filter(|(owner, _)| owner == key_id) else { return Ok(References::Unknown) };
        if pinned.as_ref().is_some_and(|other| *other != credential) {
            let message = "the objects of this request were made with different credentials: no request can reach them all";
            return Ok(References::Refused(Refusal::new(Code::StateNotOwned, message)));
        }
        pinned = Some(credential);
    }
    Ok(pinned.map_or(References::None, References::Own))
}

/// The refusal of a reference that is not known to be the key's own.
pub fn not_owned() -> Refusal {
    let message = "this request refers to an object that this virtual key has not made";
    Refusal::new(Code::StateNotOwned, message)
}

/// The refusal when the credential that reaches the objects is no longer there.
pub fn unreachable(credential: &str) -> Refusal {
    let message = format!("the credential {credential}, with which this object was made, is not in use any more");
    Refusal::new(Code::PoolExhausted, message)
}

/// Records what a request made, and forgets what it deleted. What somebody owns already stays theirs.
pub fn settle(db: &Connection, settle: &Settle, key_id: &str, provider: &str, now_ms: u64) -> Result<(), StoreError> {
    let settlement = &settle.settlement;
    if let (false, Some(last)) = (settlement.created.is_empty(), settlement.tries.last()) {
        let mut insert = db.prepare_cached(
            "INSERT OR IGNORE INTO objects (organisation, provider, id, key_id, credential, created_ms)
             SELECT organisation, ?2, ?3, id, ?4, ?5 FROM keys WHERE id = ?1",
        )?;
        for id in settlement.created.iter().filter(|id| is_id(id)).take(MAX_CREATED) {
            insert.execute(params![key_id, provider, id, last.credential, signed(now_ms)])?;
        }
    }
    if let Some(id) = &settlement.deleted {
        db.prepare_cached("DELETE FROM objects WHERE provider = ?2 AND id = ?3 AND key_id = ?1")?.execute(params![key_id, provider, id])?;
    }
    Ok(())
}
