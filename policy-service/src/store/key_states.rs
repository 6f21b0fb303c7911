//! States of credentials that outlast a restart, and their alarms.

use super::ledger::{Ledger, json, signed, unsigned};
use super::{Alarm, KeyState, KeyStateChange, Settled, StoreError};
use keyward_core::limits::Moment;
use rusqlite::{Connection, params};

/// All that are kept.
pub fn read(db: &Connection) -> Result<Vec<KeyState>, StoreError> {
    let mut select = db.prepare_cached("SELECT name, state, until_ms, probe FROM key_states ORDER BY name")?;
    let rows = select.query_map([], |row| {
        Ok(KeyState { name: row.get(0)?, state: json(row, 1)?, until_ms: row.get::<_, Option<i64>>(2)?.map(unsigned), probe: row.get(3)? })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

impl Ledger<'_> {
    /// Keeps states, or forgets them, and raises the alarms that belong to them.
    pub fn keep_key_states(&self, changes: &[KeyStateChange], now: Moment) -> Result<Vec<Alarm>, StoreError> {
        let mut done = Settled::default();
        for change in changes {
            match &change.state {
                Some(state) => self
                    .db
                    .prepare_cached(
                        "INSERT INTO key_states (name, state, until_ms, probe) VALUES (?1, ?2, ?3, ?4)
                         ON CONFLICT DO UPDATE SET state = ?2, until_ms = ?3, probe = ?4",
                    )?
                    .execute(params![
                        change.name,
                        serde_json::to_string(&state.state).unwrap_or_default(),
                        state.until_ms.map(signed),
                        state.probe
                    ])?,
                None => self.db.prepare_cached("DELETE FROM key_states WHERE name = ?1")?.execute([&change.name])?,
            };
            if let Some(Alarm { organisation, what, detail }) = &change.alarm {
                self.alarm_of_organisation(organisation, what, detail.clone(), now, &mut done)?;
            }
        }
        Ok(done.alarms)
    }
}
