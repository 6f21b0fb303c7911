//! What is running: requests whose money is held, with the keys that they belong to.

use super::accounts::{self, organisation_account, team_account};
use super::keys::{KEY_COLUMNS, KEYS, key_row};
use super::ledger::unsigned;
use super::{Held, Running, StoreError};
use keyward_core::edge::RequestId;
use keyward_core::money::Nanodollars;
use rusqlite::{Connection, OptionalExtension};
use std::collections::{BTreeSet, HashMap};

/// Everything that is held, or what these keys hold. It looks through all that is held: an index by key would cost each
/// admission and settlement more than the few changes of rules are worth.
pub fn running(db: &Connection, only: Option<&BTreeSet<String>>) -> Result<Running, StoreError> {
    // One transaction: requests, keys and tokens of the same moment.
    let tx = db.unchecked_transaction()?;
    let mut running = Running::default();
    let mut select = tx.prepare_cached(
        "SELECT key_id, req, provider, endpoint, asked, model, hold, expires_ms, token, team, day FROM requests INDEXED BY requests_held
         WHERE state = 0",
    )?;
    let mut key = tx.prepare_cached(&format!("SELECT {} FROM {KEYS} WHERE k.id = ?1", *KEY_COLUMNS))?;
    let mut token = tx.prepare_cached("SELECT expires_ms FROM tokens WHERE token_hash = ?1")?;
    let mut tokens: HashMap<Vec<u8>, Option<u64>> = HashMap::new();
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let key_id: String = row.get(0)?;
        if only.is_some_and(|only| !only.contains(&key_id)) {
            continue;
        }
        if !running.keys.contains_key(&key_id) {
            let Some(found) = key.query_row([&key_id], key_row).optional()? else { continue };
            running.keys.insert(key_id.clone(), found);
        }
        let hash: Vec<u8> = row.get(8)?;
        let token_expires_ms = match tokens.get(&hash) {
            Some(known) => *known,
            None => {
                let found: Option<Option<i64>> = token.query_row([&hash], |row| row.get(0)).optional()?;
                *tokens.entry(hash).or_insert(found.flatten().map(unsigned))
            }
        };
        running.requests.push(Held {
            req: RequestId(row.get(1)?),
            key_id,
            provider: row.get(2)?,
            endpoint: row.get(3)?,
            asked: row.get(4)?,
            model: row.get(5)?,
            hold: Nanodollars(row.get(6)?),
            expires_ms: unsigned(row.get(7)?),
            token_expires_ms,
            team: row.get(9)?,
            day: unsigned(row.get(10)?),
        });
    }
    if only.is_none() {
        let shared = running.requests.iter().filter_map(|request| Some((request, &running.keys.get(&request.key_id)?.organisation)));
        let shared = shared.flat_map(|(request, organisation)| {
            let team = request.team.as_ref().map(|team| team_account(organisation, team));
            team.into_iter().chain([organisation_account(organisation)])
        });
        let ids: BTreeSet<String> = shared.collect();
        for id in ids {
            let account = accounts::read(&tx, &id)?;
            running.accounts.insert(id, account);
        }
    }
    Ok(running)
}
