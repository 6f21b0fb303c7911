//! Virtual keys in the ledger: made, changed, rotated, revoked; each by an entry in the key's own chain.

use super::accounts::{ACCOUNT_COLUMNS, account_at};
use super::ledger::{Chain, Ledger, enforce, json, signed, status, unsigned};
use super::{KeyOutcome, KeyRow, KeyUpdate, NewKey, Rotation, StoreError};
use crate::config::Fault;
use keyward_core::audit::{self, Event};
use keyward_core::hex;
use keyward_core::limits::Enforce;
use rusqlite::{OptionalExtension, Row, params};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// A key with its account.
pub const KEYS: &str = "keys k LEFT JOIN accounts a ON a.id = k.id";
pub static KEY_COLUMNS: LazyLock<String> = LazyLock::new(|| {
    let own =
        "k.id, k.organisation, k.team, k.policy, k.label, k.allow, k.tags, k.personal, k.status, k.version, k.created_ms, k.expires_ms,
        k.limits, k.enforce";
    format!("{own}, {ACCOUNT_COLUMNS}")
});

pub fn key_row(row: &Row<'_>) -> rusqlite::Result<KeyRow> {
    Ok(KeyRow {
        id: row.get(0)?,
        organisation: row.get(1)?,
        team: row.get(2)?,
        policy: row.get(3)?,
        label: row.get(4)?,
        allow: json(row, 5)?,
        tags: json(row, 6)?,
        personal: row.get::<_, Option<String>>(7)?.and_then(|text| serde_json::from_str(&text).ok()),
        status: status(row, 8)?,
        version: unsigned(row.get(9)?),
        created_ms: unsigned(row.get(10)?),
        expires_ms: row.get::<_, Option<i64>>(11)?.map(unsigned),
        limits: json(row, 12)?,
        enforce: enforce(row, 13)?,
        account: account_at(row, 14)?,
    })
}

impl Ledger<'_> {
    pub fn create_key(&self, key: &NewKey) -> Result<KeyOutcome, StoreError> {
        let row = &key.row;
        if let Some(fault) = self.missing_reference(row)? {
            return Ok(KeyOutcome::Refused(fault));
        }
        if let Some(fault) = self.team_is_full(row, key.max_keys, row.created_ms)? {
            return Ok(KeyOutcome::Refused(fault));
        }
        let chain = Chain { organisation: row.organisation.clone(), epoch: 0, seq: 0, mac: audit::genesis(&self.keys.origin, &row.id) };
        let personal = personal(row, &key.salt);
        self.db
            .prepare_cached(
                "INSERT INTO keys (id, organisation, team, policy, label, allow, tags, personal, personal_salt, status, created_ms, expires_ms, limits,
                     enforce, chain_seq, chain_mac)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'active', ?10, ?11, ?12, ?13, 0, ?14)",
            )?
            .execute(params![
                row.id,
                row.organisation,
                row.team,
                row.policy,
                row.label,
                text(&row.allow)?,
                text(&row.tags)?,
                personal.as_ref().map(|p| &p.text),
                personal.as_ref().map(|p| p.salt),
                signed(row.created_ms),
                row.expires_ms.map(signed),
                text(&row.limits)?,
                enforce_name(row.enforce),
                chain.mac,
            ])?;
        self.db.prepare_cached("INSERT INTO tokens (token_hash, key_id) VALUES (?1, ?2)")?.execute(params![key.token_hash, row.id])?;
        let event = Event::KeyCreated { actor: key.actor.clone(), detail: detail(row, personal.as_ref()) };
        self.append_alone(&row.id, &chain, row.created_ms, event)?;
        Ok(KeyOutcome::Done(Box::new(row.clone())))
    }

    /// Writes what people may change of a key that was read at `row.version`.
    pub fn update_key(&self, update: &KeyUpdate) -> Result<KeyOutcome, StoreError> {
        let row = &update.row;
        let Some(now) = self.key(&row.organisation, &row.id)? else { return Ok(KeyOutcome::Missing) };
        if now.version != row.version {
            return Ok(KeyOutcome::Stale(now.version));
        }
        if let Some(fault) = self.missing_reference(row)? {
            return Ok(KeyOutcome::Refused(fault));
        }
        // A revoked key stays revoked, whatever else is written.
        if matches!(now.status, keyward_core::admission::Status::Revoked) {
            return Ok(KeyOutcome::Refused(fault("status", "the key is revoked; that is for good".to_owned())));
        }
        // A key that comes to life in a team, from another or from after its expiry, takes a place like a new one.
        let lives = |row: &KeyRow| row.expires_ms.is_none_or(|at| at > update.now_ms);
        if lives(row)
            && !(lives(&now) && now.team == row.team)
            && let Some(fault) = self.team_is_full(row, update.max_keys, update.now_ms)?
        {
            return Ok(KeyOutcome::Refused(fault));
        }
        if (&now.personal, &now.tags) != (&row.personal, &row.tags) {
            self.forget_answers(&row.id)?;
        }
        let status = if matches!(row.status, keyward_core::admission::Status::Frozen) { "frozen" } else { "active" };
        let personal = personal(row, &update.salt);
        self.db
            .prepare_cached(
                "UPDATE keys SET team = ?2, policy = ?3, label = ?4, allow = ?5, tags = ?6, personal = ?7, personal_salt = ?8, status = ?9,
                     expires_ms = ?10, limits = ?11, enforce = ?12, version = version + 1 WHERE id = ?1",
            )?
            .execute(params![
                row.id,
                row.team,
                row.policy,
                row.label,
                text(&row.allow)?,
                text(&row.tags)?,
                personal.as_ref().map(|p| &p.text),
                personal.as_ref().map(|p| p.salt),
                status,
                row.expires_ms.map(signed),
                text(&row.limits)?,
                enforce_name(row.enforce),
            ])?;
        self.accounts.facts.borrow_mut().remove(&row.id);
        let event = Event::KeyChanged { actor: update.actor.clone(), detail: detail(row, personal.as_ref()) };
        self.append_alone(&row.id, &self.chain(&row.id)?, update.now_ms, event)?;
        self.done(&row.organisation, &row.id)
    }

    /// Takes tags, personal fields and their salt away: what the chain holds of them then stands for nothing.
    pub fn erase_personal(&self, organisation: &str, id: &str, expect: u64, actor: &str, now_ms: u64) -> Result<KeyOutcome, StoreError> {
        let Some(now) = self.key(organisation, id)? else { return Ok(KeyOutcome::Missing) };
        if now.version != expect {
            return Ok(KeyOutcome::Stale(now.version));
        }
        self.forget_answers(id)?;
        if now.personal.is_none() && now.tags.is_empty() {
            return Ok(KeyOutcome::Done(Box::new(now)));
        }
        self.db
            .prepare_cached("UPDATE keys SET tags = '{}', personal = NULL, personal_salt = NULL, version = version + 1 WHERE id = ?1")?
            .execute([id])?;
        let row = KeyRow { personal: None, tags: std::collections::BTreeMap::new(), ..now };
        let event = Event::KeyChanged { actor: actor.to_owned(), detail: detail(&row, None) };
        self.append_alone(id, &self.chain(id)?, now_ms, event)?;
        self.done(organisation, id)
    }

    /// Gives a key a new token; those it has end at the overlap's end, or earlier if they were to end earlier.
    pub fn rotate_key(&self, rotation: &Rotation) -> Result<KeyOutcome, StoreError> {
        let Some(now) = self.key(&rotation.organisation, &rotation.id)? else { return Ok(KeyOutcome::Missing) };
        if rotation.expect.is_some_and(|version| version != now.version) {
            return Ok(KeyOutcome::Stale(now.version));
        }
        if matches!(now.status, keyward_core::admission::Status::Revoked) {
            return Ok(KeyOutcome::Refused(fault("id", "the key is revoked; that is for good".to_owned())));
        }
        let until = signed(rotation.overlap_until_ms);
        self.db
            .prepare_cached("UPDATE tokens SET expires_ms = ?2 WHERE key_id = ?1 AND (expires_ms IS NULL OR expires_ms > ?2)")?
            .execute(params![rotation.id, until])?;
        self.db
            .prepare_cached("INSERT INTO tokens (token_hash, key_id) VALUES (?1, ?2)")?
            .execute(params![rotation.token_hash, rotation.id])?;
        self.db.prepare_cached("UPDATE keys SET version = version + 1 WHERE id = ?1")?.execute([&rotation.id])?;
        let detail = serde_json::json!({ "rotated": true, "overlap_until_ms": rotation.overlap_until_ms }).to_string();
        let event = Event::KeyChanged { actor: rotation.actor.clone(), detail };
        self.append_alone(&rotation.id, &self.chain(&rotation.id)?, rotation.now_ms, event)?;
        self.done(&rotation.organisation, &rotation.id)
    }

    pub fn revoke_key(
        &self,
        organisation: &str,
        id: &str,
        expect: Option<u64>,
        actor: &str,
        now_ms: u64,
    ) -> Result<KeyOutcome, StoreError> {
        let Some(now) = self.key(organisation, id)? else { return Ok(KeyOutcome::Missing) };
        if expect.is_some_and(|version| version != now.version) {
            return Ok(KeyOutcome::Stale(now.version));
        }
        let changed = self
            .db
            .prepare_cached("UPDATE keys SET status = 'revoked', version = version + 1 WHERE id = ?1 AND status <> 'revoked'")?
            .execute([id])?;
        if changed > 0 {
            self.append_alone(id, &self.chain(id)?, now_ms, Event::KeyRevoked { actor: actor.to_owned() })?;
        }
        self.done(organisation, id)
    }

    fn key(&self, organisation: &str, id: &str) -> Result<Option<KeyRow>, StoreError> {
        let select = format!("SELECT {} FROM {KEYS} WHERE k.organisation = ?1 AND k.id = ?2", *KEY_COLUMNS);
        Ok(self.db.prepare_cached(&select)?.query_row(params![organisation, id], key_row).optional()?)
    }

    fn done(&self, organisation: &str, id: &str) -> Result<KeyOutcome, StoreError> {
        Ok(self.key(organisation, id)?.map_or(KeyOutcome::Missing, |row| KeyOutcome::Done(Box::new(row))))
    }

    /// Whether the key's team has as many other live keys as it may have.
    fn team_is_full(&self, row: &KeyRow, max: Option<u32>, now_ms: u64) -> Result<Option<Fault>, StoreError> {
        let (Some(max), Some(team)) = (max, &row.team) else { return Ok(None) };
        let mut select = self.db.prepare_cached(
            "SELECT count(*) FROM keys WHERE organisation = ?1 AND team = ?2 AND id <> ?3 AND status <> 'revoked'
                 AND (expires_ms IS NULL OR expires_ms > ?4)",
        )?;
        let live: i64 = select.query_row(params![row.organisation, team, row.id, signed(now_ms)], |row| row.get(0))?;
        Ok((live >= i64::from(max)).then(|| fault("team", format!("the team {team} may have {max} keys, and has them"))))
    }

    /// A team or policy that is not there, or not there any more.
    fn missing_reference(&self, row: &KeyRow) -> Result<Option<Fault>, StoreError> {
        for (field, kind, name) in [("team", "team", &row.team), ("policy", "policy", &row.policy)] {
            let Some(name) = name else { continue };
            let mut select =
                self.db.prepare_cached("SELECT 1 FROM objects_of_configuration WHERE organisation = ?1 AND kind = ?2 AND name = ?3")?;
            if !select.exists(params![row.organisation, kind, name])? {
                return Ok(Some(fault(field, format!("there is no {kind} {name:?}"))));
            }
        }
        Ok(None)
    }
}

/// Personal data and tags as stored, and the hash that stands for them in the chain.
struct Personal {
    text: Option<String>,
    salt: [u8; 16],
    commitment: String,
}

/// `SHA-256(salt || {"personal":...,"tags":...})`: shows later that the data were these, as long as somebody has data and salt.
fn personal(row: &KeyRow, salt: &[u8; 16]) -> Option<Personal> {
    if row.personal.is_none() && row.tags.is_empty() {
        return None;
    }
    let text = row.personal.as_ref().map(serde_json::to_string).transpose().ok()?;
    let both = serde_json::json!({ "personal": row.personal, "tags": row.tags }).to_string();
    let commitment = hex::encode(&<[u8; 32]>::from(Sha256::new().chain_update(salt).chain_update(&both).finalize()));
    Some(Personal { text, salt: *salt, commitment })
}

/// What a chain entry tells of a key: everything that governs it; personal data and tags only by their hash, so that they
/// can be erased.
fn detail(row: &KeyRow, personal: Option<&Personal>) -> String {
    serde_json::json!({
        "label": row.label, "team": row.team, "policy": row.policy, "allow": row.allow, "limits": row.limits, "enforce": row.enforce,
        "expires_ms": row.expires_ms, "status": row.status, "personal_sha256": personal.map(|p| &p.commitment),
    })
    .to_string()
}

fn enforce_name(enforce: Enforce) -> &'static str {
    match enforce {
        Enforce::Enforce => "enforce",
        Enforce::Shadow => "shadow",
    }
}

fn fault(field: &str, message: String) -> Fault {
    Fault { field: field.to_owned(), message }
}

fn text(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|_| StoreError::Damaged("a value that can't be written as JSON"))
}
