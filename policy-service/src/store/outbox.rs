//! Alarms on their way to a webhook.

use super::ledger::{Ledger, signed, unsigned};
use super::{Mail, StoreError};
use rusqlite::{Connection, params};

/// Alarms that are to be sent now, the oldest first.
pub fn due(db: &Connection, now_ms: u64, limit: u32) -> Result<Vec<Mail>, StoreError> {
    let mut select =
        db.prepare_cached("SELECT id, organisation, what, detail, time_ms, tries FROM outbox WHERE next_ms <= ?1 ORDER BY id LIMIT ?2")?;
    let rows = select.query_map(params![signed(now_ms), limit], |row| {
        Ok(Mail {
            id: unsigned(row.get(0)?),
            organisation: row.get(1)?,
            what: row.get(2)?,
            detail: row.get(3)?,
            time_ms: unsigned(row.get(4)?),
            tries: row.get(5)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

impl Ledger<'_> {
    /// One alarm was sent, or is to be tried again at `next_ms`.
    pub fn sent_mail(&self, id: u64, next_ms: Option<u64>) -> Result<(), StoreError> {
        match next_ms {
            None => self.db.prepare_cached("DELETE FROM outbox WHERE id = ?1")?.execute([signed(id)])?,
            Some(next) => self
                .db
                .prepare_cached("UPDATE outbox SET tries = tries + 1, next_ms = ?2 WHERE id = ?1")?
                .execute(params![signed(id), signed(next)])?,
        };
        Ok(())
    }
}
