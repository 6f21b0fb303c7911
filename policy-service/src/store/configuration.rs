//! Configuration in the store: organisations and their objects, credentials, administrators' tokens. Every change is an
//! entry of the organisation's own chain, in the same transaction.

use super::ledger::{Chain, Ledger, signed, unsigned};
use super::{CredentialRow, Edit, Edited, Edits, Expect, Idempotent, NewOrganisation, StoreError, TokenRow, admin_chain};
use crate::config::{self, Credential, Document, Kind};
use crate::directory::{Directory, InForce, Meta, Organisation, shared_account};
use crate::prices::OwnPrices;
use keyward_core::audit::{self, Event};
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::sync::Arc;

/// Answers kept for writes that come again.
const IDEMPOTENT_MS: u64 = 24 * 3_600_000;

pub const CREDENTIAL_COLUMNS: &str = "id, organisation, name, provider, label, account, source, version, sealed, created_ms";

pub fn credential_row(row: &Row<'_>) -> rusqlite::Result<CredentialRow> {
    Ok(CredentialRow {
        id: row.get(0)?,
        organisation: row.get(1)?,
        name: row.get(2)?,
        provider: row.get(3)?,
        label: row.get(4)?,
        account: row.get(5)?,
        source: row.get(6)?,
        version: unsigned(row.get(7)?),
        sealed: row.get(8)?,
        created_ms: unsigned(row.get(9)?),
    })
}

pub const TOKEN_COLUMNS: &str = "id, organisation, role, team, label, created_ms, expires_ms, revoked_ms";

pub fn token_row(row: &Row<'_>) -> rusqlite::Result<TokenRow> {
    Ok(TokenRow {
        id: row.get(0)?,
        organisation: row.get(1)?,
        role: row.get(2)?,
        team: row.get(3)?,
        label: row.get(4)?,
        created_ms: unsigned(row.get(5)?),
        expires_ms: row.get::<_, Option<i64>>(6)?.map(unsigned),
        revoked_ms: row.get::<_, Option<i64>>(7)?.map(unsigned),
    })
}

/// Reads every organisation.
pub fn directory(db: &Connection) -> Result<Directory, StoreError> {
    let mut directory = Directory::default();
    let mut select = db.prepare_cached("SELECT id, label, rev FROM organisations")?;
    let rows = select.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, unsigned(row.get(2)?))))?;
    for row in rows {
        let (id, label, rev) = row?;
        let mut organisation = Organisation { label, rev, ..Organisation::default() };
        read_objects(db, &id, &mut organisation)?;
        read_credentials(db, &id, &mut organisation)?;
        organisation.in_force = InForce::of(&organisation.document).ok_or(StoreError::Damaged("limits that can't be read"))?;
        organisation.prices = OwnPrices::of(&organisation.document);
        directory.organisations.insert(id, Arc::new(organisation));
    }
    Ok(directory)
}

fn read_objects(db: &Connection, id: &str, into: &mut Organisation) -> Result<(), StoreError> {
    let mut select = db.prepare_cached(
        "SELECT kind, name, body, version, managed, created_ms, updated_ms FROM objects_of_configuration WHERE organisation = ?1",
    )?;
    let mut rows = select.query([id])?;
    while let Some(row) = rows.next()? {
        let (kind, name, body): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let kind = Kind::by_name(&kind).ok_or(StoreError::Damaged("an object of an unknown kind"))?;
        put(&mut into.document, kind, &name, &body)?;
        let meta = Meta {
            id: name.clone(),
            version: unsigned(row.get(3)?),
            managed: row.get(4)?,
            created_ms: unsigned(row.get(5)?),
            updated_ms: unsigned(row.get(6)?),
        };
        into.meta.insert((kind, name), meta);
    }
    Ok(())
}

/// The prices that an organisation gives for a provider.
pub(super) fn own_prices(db: &Connection, organisation: &str, provider: &str) -> Result<OwnPrices, StoreError> {
    let select = "SELECT body FROM objects_of_configuration WHERE organisation = ?1 AND kind = ?2 AND name = ?3";
    let mut select = db.prepare_cached(select)?;
    let body: Option<String> = select.query_row(params![organisation, Kind::Provider.name(), provider], |row| row.get(0)).optional()?;
    let mut document = Document::default();
    body.map_or(Ok(()), |body| put(&mut document, Kind::Provider, provider, &body))?;
    Ok(OwnPrices::of(&document))
}

fn read_credentials(db: &Connection, organisation: &str, into: &mut Organisation) -> Result<(), StoreError> {
    let mut select = db.prepare_cached(
        "SELECT id, name, provider, label, account, source, revision, managed, created_ms, updated_ms
         FROM credentials WHERE organisation = ?1 ORDER BY created_ms, rowid",
    )?;
    let mut rows = select.query([organisation])?;
    while let Some(row) = rows.next()? {
        let (id, name, account): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(4)?);
        let account = Some(account).filter(|account| *account != id);
        let credential = Credential { provider: row.get(2)?, label: row.get(3)?, account, from: row.get(5)?, secret: None };
        let shared = credential.account.as_ref().map(|name| shared_account(organisation, &credential.provider, name));
        into.accounts.extend(shared.map(|account| (id.clone(), account)));
        let meta = Meta {
            id,
            version: unsigned(row.get(6)?),
            managed: row.get(7)?,
            created_ms: unsigned(row.get(8)?),
            updated_ms: unsigned(row.get(9)?),
        };
        into.document.credentials.insert(name.clone(), credential);
        into.meta.insert((Kind::Credential, name.clone()), meta);
        into.order.push(name);
    }
    Ok(())
}

/// Puts an object's JSON into its place in a document.
fn put(document: &mut Document, kind: Kind, name: &str, body: &str) -> Result<(), StoreError> {
    let damaged = |_| StoreError::Damaged("an object of the configuration that can't be read");
    let name = name.to_owned();
    match kind {
        Kind::Organisation => document.organisation = Some(serde_json::from_str(body).map_err(damaged)?),
        Kind::Team => drop(document.teams.insert(name, serde_json::from_str(body).map_err(damaged)?)),
        Kind::Policy => drop(document.policies.insert(name, serde_json::from_str(body).map_err(damaged)?)),
        Kind::Provider => drop(document.providers.insert(name, serde_json::from_str(body).map_err(damaged)?)),
        Kind::Pool => drop(document.pools.insert(name, serde_json::from_str(body).map_err(damaged)?)),
        Kind::Route => drop(document.routes.insert(name, serde_json::from_str(body).map_err(damaged)?)),
        Kind::Credential => return Err(StoreError::Damaged("a credential among the objects")),
    }
    Ok(())
}

/// What an entry of the chain calls an object.
fn target(kind: Kind, name: &str) -> String {
    if kind == Kind::Organisation { kind.section().to_owned() } else { format!("{}/{name}", kind.section()) }
}

impl Ledger<'_> {
    /// Applies edits one after the other, checks the whole, and keeps all of it or nothing. A new object's first version is
    /// the revision that made it: one that is deleted and made again never has a version that somebody knows already.
    pub fn edit(&self, edits: &Edits) -> Result<Edited, StoreError> {
        let Some(rev) = self.rev(&edits.organisation)? else { return Ok(Edited::Missing) };
        if edits.expect_rev.is_some_and(|expected| expected != rev) {
            return Ok(Edited::Stale);
        }
        // A refusal in the middle takes back what came before it, and only that: others share this transaction.
        self.db.execute_batch("SAVEPOINT edit")?;
        let result = self.edit_all(edits, rev);
        let keep = matches!(result, Ok(Edited::Done(_)));
        self.db.execute_batch(if keep { "RELEASE edit" } else { "ROLLBACK TO edit; RELEASE edit" })?;
        result
    }

    fn edit_all(&self, edits: &Edits, rev: u64) -> Result<Edited, StoreError> {
        for edit in &edits.edits {
            let refused = match edit {
                Edit::Put { kind, name, body, managed, expect } => self.put_object(edits, *kind, name, body, *managed, *expect)?,
                Edit::PutCredential { row, managed, expect } => self.put_credential(edits, row, *managed, *expect)?,
                Edit::Delete { kind, name, expect } => self.delete_object(edits, *kind, name, *expect)?,
            };
            if let Some(refused) = refused {
                return Ok(refused);
            }
        }
        let mut organisation = Organisation::default();
        read_objects(self.db, &edits.organisation, &mut organisation)?;
        read_credentials(self.db, &edits.organisation, &mut organisation)?;
        let faults = config::check(&organisation.document);
        if !faults.is_empty() {
            return Ok(Edited::Invalid(faults));
        }
        if edits.edits.is_empty() {
            return Ok(Edited::Done(rev));
        }
        self.db.prepare_cached("UPDATE organisations SET rev = rev + 1 WHERE id = ?1")?.execute([&edits.organisation])?;
        Ok(Edited::Done(rev + 1))
    }

    fn put_object(
        &self,
        edits: &Edits,
        kind: Kind,
        name: &str,
        body: &str,
        managed: bool,
        expect: Expect,
    ) -> Result<Option<Edited>, StoreError> {
        let version = self.version(&edits.organisation, kind, name)?;
        if let Some(refused) = unexpected(expect, version) {
            return Ok(Some(refused));
        }
        self.db
            .prepare_cached(
                "INSERT INTO objects_of_configuration (organisation, kind, name, body, version, managed, created_ms, updated_ms)
                 VALUES (?1, ?2, ?3, ?4, (SELECT rev + 1 FROM organisations WHERE id = ?1), ?5, ?6, ?6)
                 ON CONFLICT DO UPDATE SET body = ?4, version = version + 1, managed = ?5, updated_ms = ?6",
            )?
            .execute(params![edits.organisation, kind.name(), name, body, managed, signed(edits.now_ms)])?;
        let action = if version.is_some() { "update" } else { "create" };
        self.note(&edits.organisation, &edits.actor, action, &target(kind, name), body, edits.now_ms)?;
        Ok(None)
    }

    fn put_credential(&self, edits: &Edits, row: &CredentialRow, managed: bool, expect: Expect) -> Result<Option<Edited>, StoreError> {
        let version = self.version(&edits.organisation, Kind::Credential, &row.name)?;
        if let Some(refused) = unexpected(expect, version) {
            return Ok(Some(refused));
        }
        self.db
            .prepare_cached(
                "INSERT INTO credentials (id, organisation, name, provider, label, account, source, version, sealed, revision, managed, created_ms, updated_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, (SELECT rev + 1 FROM organisations WHERE id = ?2), ?10, ?11, ?11)
                 ON CONFLICT (organisation, name) DO UPDATE SET provider = ?4, label = ?5, account = ?6, source = ?7, version = ?8, sealed = ?9,
                     revision = revision + 1, managed = ?10, updated_ms = ?11",
            )?
            .execute(params![
                row.id,
                edits.organisation,
                row.name,
                row.provider,
                row.label,
                row.account,
                row.source,
                signed(row.version),
                row.sealed,
                managed,
                signed(edits.now_ms),
            ])?;
        let detail = serde_json::json!({ "id": row.id, "provider": row.provider, "label": row.label, "account": row.account, "secret_version": row.version });
        let action = if version.is_some() { "update" } else { "create" };
        self.note(&edits.organisation, &edits.actor, action, &format!("credentials/{}", row.name), &detail.to_string(), edits.now_ms)?;
        Ok(None)
    }

    fn delete_object(&self, edits: &Edits, kind: Kind, name: &str, expect: Expect) -> Result<Option<Edited>, StoreError> {
        let version = self.version(&edits.organisation, kind, name)?;
        if version.is_none() {
            return Ok(Some(Edited::Missing));
        }
        if let Some(refused) = unexpected(expect, version) {
            return Ok(Some(refused));
        }
        if let Some(by) = self.used_by(edits, kind, name)? {
            return Ok(Some(Edited::InUse(by)));
        }
        let delete = match kind {
            Kind::Credential => "DELETE FROM credentials WHERE organisation = ?1 AND name = ?2 AND ?3 = ?3",
            _ => "DELETE FROM objects_of_configuration WHERE organisation = ?1 AND name = ?2 AND kind = ?3",
        };
        self.db.prepare_cached(delete)?.execute(params![edits.organisation, name, kind.name()])?;
        self.note(&edits.organisation, &edits.actor, "delete", &target(kind, name), "{}", edits.now_ms)?;
        Ok(None)
    }

    /// What still needs an object that is to go, beyond other objects of the configuration.
    fn used_by(&self, edits: &Edits, kind: Kind, name: &str) -> Result<Option<String>, StoreError> {
        let organisation = &edits.organisation;
        let column = match kind {
            Kind::Team => "team",
            Kind::Policy => "policy",
            _ => return Ok(None),
        };
        let select = format!("SELECT count(*) FROM keys WHERE organisation = ?1 AND {column} = ?2 AND status <> 'revoked'");
        let keys: i64 = self.db.prepare_cached(&select)?.query_row(params![organisation, name], |row| row.get(0))?;
        if keys > 0 {
            return Ok(Some(format!("{keys} keys of the {} {name} are not revoked", kind.name())));
        }
        if kind == Kind::Team {
            // A token that has expired can't come back, as a key can.
            let select = "SELECT count(*) FROM admin_tokens WHERE organisation = ?1 AND team = ?2 AND revoked_ms IS NULL
                 AND (expires_ms IS NULL OR expires_ms > ?3)";
            let tokens: i64 =
                self.db.prepare_cached(select)?.query_row(params![organisation, name, signed(edits.now_ms)], |row| row.get(0))?;
            return Ok((tokens > 0).then(|| format!("{tokens} admin tokens of the team {name} are neither revoked nor expired")));
        }
        Ok(None)
    }

    fn version(&self, organisation: &str, kind: Kind, name: &str) -> Result<Option<u64>, StoreError> {
        let select = match kind {
            Kind::Credential => "SELECT revision FROM credentials WHERE organisation = ?1 AND name = ?2 AND ?3 = ?3",
            _ => "SELECT version FROM objects_of_configuration WHERE organisation = ?1 AND name = ?2 AND kind = ?3",
        };
        let found = self.db.prepare_cached(select)?.query_row(params![organisation, name, kind.name()], |row| row.get(0)).optional()?;
        Ok(found.map(unsigned))
    }

    fn rev(&self, organisation: &str) -> Result<Option<u64>, StoreError> {
        let select = "SELECT rev FROM organisations WHERE id = ?1";
        Ok(self.db.prepare_cached(select)?.query_row([organisation], |row| row.get(0)).optional()?.map(unsigned))
    }

    /// Appends an entry to the organisation's chain of administrative changes.
    pub fn note(&self, organisation: &str, actor: &str, action: &str, target: &str, detail: &str, now_ms: u64) -> Result<(), StoreError> {
        let text = |text: &str| text.to_owned();
        let event = Event::AdminChanged { actor: text(actor), action: text(action), target: text(target), detail: text(detail) };
        self.append_to_organisation(organisation, now_ms, event)
    }

    /// Appends an entry to an organisation's own chain.
    pub(super) fn append_to_organisation(&self, organisation: &str, now_ms: u64, event: Event) -> Result<(), StoreError> {
        let select = "SELECT id, chain_epoch, chain_seq, chain_mac FROM organisations WHERE id = ?1";
        let chain = self.db.prepare_cached(select)?.query_row([organisation], |row| {
            Ok(Chain { organisation: row.get(0)?, epoch: unsigned(row.get(1)?), seq: unsigned(row.get(2)?), mac: row.get(3)? })
        })?;
        let end = self.append(&admin_chain(organisation), &chain, now_ms, event)?;
        self.db.prepare_cached("UPDATE organisations SET chain_seq = ?2, chain_mac = ?3 WHERE id = ?1")?.execute(params![
            organisation,
            signed(end.seq),
            end.mac
        ])?;
        Ok(())
    }

    /// Makes an organisation; `false` when there is one of this id.
    pub fn create_organisation(&self, id: &str, label: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError> {
        let genesis = audit::genesis(&self.keys.origin, &admin_chain(id));
        let made = self
            .db
            .prepare_cached("INSERT INTO organisations (id, label, created_ms, chain_mac) VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING")?
            .execute(params![id, label, signed(now_ms), genesis])?;
        if made > 0 {
            let detail = serde_json::json!({ "label": label }).to_string();
            self.note(id, actor, "create", &format!("organisations/{id}"), &detail, now_ms)?;
        }
        Ok(made > 0)
    }

    /// Makes an organisation with its first token: one without could never be entered. Noted in its own chain, and in the
    /// chain of the organisation `home` whose administrator did it.
    pub fn found_organisation(&self, new: &NewOrganisation) -> Result<bool, StoreError> {
        let token = &new.token;
        if !self.create_organisation(&token.organisation, &new.label, &new.actor, token.created_ms)? {
            return Ok(false);
        }
        self.put_admin_token(token, new.token_hash, &new.actor)?;
        let detail = serde_json::json!({ "label": new.label }).to_string();
        self.note(&new.home, &new.actor, "create", &format!("organisations/{}", token.organisation), &detail, token.created_ms)?;
        Ok(true)
    }

    pub fn put_admin_token(&self, row: &TokenRow, hash: [u8; 32], actor: &str) -> Result<(), StoreError> {
        let insert = "INSERT INTO admin_tokens (id, token_hash, role, created_ms, organisation, team, label, expires_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
        let values =
            params![row.id, hash, row.role, signed(row.created_ms), row.organisation, row.team, row.label, row.expires_ms.map(signed)];
        self.db.prepare_cached(insert)?.execute(values)?;
        let detail = serde_json::json!({ "role": row.role, "team": row.team, "label": row.label, "expires_ms": row.expires_ms });
        self.note(&row.organisation, actor, "create", &format!("admin-tokens/{}", row.id), &detail.to_string(), row.created_ms)
    }

    pub fn revoke_admin_token(&self, organisation: &str, id: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError> {
        let exists = "SELECT 1 FROM admin_tokens WHERE organisation = ?1 AND id = ?2";
        if !self.db.prepare_cached(exists)?.exists(params![organisation, id])? {
            return Ok(false);
        }
        let revoke = "UPDATE admin_tokens SET revoked_ms = ?3 WHERE organisation = ?1 AND id = ?2 AND revoked_ms IS NULL";
        if self.db.prepare_cached(revoke)?.execute(params![organisation, id, signed(now_ms)])? > 0 {
            self.note(organisation, actor, "delete", &format!("admin-tokens/{id}"), "{}", now_ms)?;
        }
        Ok(true)
    }

    /// Forgets the answers that tell of an object: they may repeat what was erased. The same write again is told to look first.
    pub(super) fn forget_answers(&self, about: &str) -> Result<(), StoreError> {
        self.db.prepare_cached("UPDATE idempotency SET answer = NULL, about = NULL WHERE about = ?1")?.execute([about])?;
        Ok(())
    }

    pub fn begin_idempotent(&self, token_id: &str, key: &str, fingerprint: [u8; 32], now_ms: u64) -> Result<Idempotent, StoreError> {
        self.db.prepare_cached("DELETE FROM idempotency WHERE created_ms < ?1")?.execute([signed(now_ms.saturating_sub(IDEMPOTENT_MS))])?;
        let select = "SELECT fingerprint, answer FROM idempotency WHERE token_id = ?1 AND key = ?2";
        let found: Option<([u8; 32], Option<Vec<u8>>)> =
            self.db.prepare_cached(select)?.query_row(params![token_id, key], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        match found {
            None => {
                let insert = "INSERT INTO idempotency (token_id, key, fingerprint, created_ms) VALUES (?1, ?2, ?3, ?4)";
                self.db.prepare_cached(insert)?.execute(params![token_id, key, fingerprint, signed(now_ms)])?;
                Ok(Idempotent::New)
            }
            Some((seen, _)) if seen != fingerprint => Ok(Idempotent::Other),
            Some((_, Some(answer))) => Ok(Idempotent::Answered(answer)),
            Some((_, None)) => Ok(Idempotent::Unfinished),
        }
    }

    pub fn end_idempotent(&self, token_id: &str, key: &str, answer: Option<&[u8]>, about: Option<&str>) -> Result<(), StoreError> {
        match answer {
            Some(answer) => self
                .db
                .prepare_cached("UPDATE idempotency SET answer = ?3, about = ?4 WHERE token_id = ?1 AND key = ?2")?
                .execute(params![token_id, key, answer, about])?,
            None => self.db.prepare_cached("DELETE FROM idempotency WHERE token_id = ?1 AND key = ?2")?.execute(params![token_id, key])?,
        };
        Ok(())
    }
}

/// Why an edit may not happen, given the version that is there.
fn unexpected(expect: Expect, version: Option<u64>) -> Option<Edited> {
    match (expect, version) {
        (Expect::Absent, Some(_)) => Some(Edited::Exists),
        // What is gone has no version; what asks for one must not make it anew.
        (Expect::Version(_) | Expect::Present, None) => Some(Edited::Stale),
        (Expect::Version(expected), Some(version)) if expected != version => Some(Edited::Stale),
        _ => None,
    }
}
