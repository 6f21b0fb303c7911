//! The configuration of an organisation: single objects, credentials, and the whole document of `keyward apply`.

use super::access::{Permission, Principal, Role, TokenSpec};
use super::watch::Changed;
use super::{Service, ServiceError, now_ms};
use crate::config::{self, Action, Credential, Difference, Document, FieldChange, Kind, Object};
use crate::directory::{Meta, Organisation};
use crate::store::{CredentialRow, Edit, Edited, Edits, Expect, NewOrganisation};
use crate::vault::{credential_aad, random};
use keyward_core::hex;
use serde_json::Value;
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// How often an apply is worked out again that somebody else's change came between.
const TRIES: usize = 5;

impl Service {
    /// Creates or replaces an object. Says whether it is new.
    pub async fn put_object<T: Object>(
        &self,
        who: &Principal,
        name: &str,
        object: &T,
        expect: Expect,
    ) -> Result<(bool, Meta), ServiceError> {
        who.needs(Permission::WriteConfiguration)?;
        config::check_name(T::KIND, name).map_err(|message| ServiceError::Invalid("name".to_owned(), message))?;
        let body = serde_json::to_string(object).map_err(|error| ServiceError::Invalid("body".to_owned(), error.to_string()))?;
        let created = self.organisation(&who.organisation)?.meta(T::KIND, name).is_none();
        let edit = Edit::Put { kind: T::KIND, name: name.to_owned(), body, managed: false, expect };
        self.edit(who, vec![edit], None).await.map_err(|error| relative(error, T::KIND, name))?;
        let organisation = self.organisation(&who.organisation)?;
        organisation.meta(T::KIND, name).cloned().map(|meta| (created, meta)).ok_or(ServiceError::NotFound(T::KIND.name()))
    }

    pub async fn delete_object(&self, who: &Principal, kind: Kind, name: &str, expect: Expect) -> Result<(), ServiceError> {
        who.needs(Permission::WriteConfiguration)?;
        let result = self.edit(who, vec![Edit::Delete { kind, name: name.to_owned(), expect }], None).await;
        match result {
            // What a removal leaves dangling is named by whoever needs it.
            Err(ServiceError::Faults(faults)) => {
                let by: Vec<String> = faults.into_iter().map(|fault| fault.field).collect();
                Err(ServiceError::Conflict(format!("the {} {name} is used by {}", kind.name(), by.join(", "))))
            }
            Err(ServiceError::NotFound(_)) => Err(ServiceError::NotFound(kind.name())),
            // Only `If-None-Match: *` asks for an absent object, and it is there.
            Err(ServiceError::Exists) => Err(ServiceError::Stale(0)),
            other => other.map(drop),
        }
    }

    /// Stores a credential, or a new secret for one that is there.
    pub async fn put_credential(
        &self,
        who: &Principal,
        name: Option<&str>,
        credential: &Credential,
        expect: Expect,
    ) -> Result<(String, Meta), ServiceError> {
        who.needs(Permission::WriteConfiguration)?;
        let organisation = self.organisation(&who.organisation)?;
        let known = name.and_then(|name| organisation.meta(Kind::Credential, name));
        let id = known.map_or_else(new_credential_id, |meta| Ok(meta.id.clone()))?;
        let name = name.map_or_else(|| id.clone(), str::to_owned);
        config::check_name(Kind::Credential, &name).map_err(|message| ServiceError::Invalid("name".to_owned(), message))?;
        let row = self.seal(&organisation.document, &who.organisation, &name, &id, credential, known.is_some()).await?;
        let edit = Edit::PutCredential { row, managed: false, expect };
        self.edit(who, vec![edit], None).await.map_err(|error| relative(error, Kind::Credential, &name))?;
        let organisation = self.organisation(&who.organisation)?;
        let meta = organisation.meta(Kind::Credential, &name).cloned().ok_or(ServiceError::NotFound("credential"))?;
        Ok((name, meta))
    }

    /// A credential as it will be stored beside `document`. Without a new secret it keeps the one it has.
    async fn seal(
        &self,
        document: &Document,
        organisation: &str,
        name: &str,
        id: &str,
        credential: &Credential,
        known: bool,
    ) -> Result<CredentialRow, ServiceError> {
        let mut faults = Vec::new();
        credential.check("", document, &mut faults);
        if let Some(fault) = faults.into_iter().next() {
            return Err(ServiceError::Invalid(fault.field.trim_start_matches('.').to_owned(), fault.message));
        }
        let stored = if known { self.store.credentials().await?.into_iter().find(|row| row.id == id) } else { None };
        let (version, sealed) = match (&credential.secret, &stored) {
            (None, None) => return Err(ServiceError::Invalid("secret".to_owned(), "a new credential needs its secret".to_owned())),
            (None, Some(row)) => (row.version, row.sealed.clone()),
            (Some(secret), Some(row)) if self.open(row)?.as_str() == secret.as_str() => (row.version, row.sealed.clone()),
            (Some(secret), stored) => {
                let version = stored.as_ref().map_or(1, |row| row.version + 1);
                (version, self.vault.seal(secret.as_bytes(), &credential_aad(organisation, id, version))?)
            }
        };
        Ok(CredentialRow {
            id: id.to_owned(),
            organisation: organisation.to_owned(),
            name: name.to_owned(),
            provider: credential.provider.clone(),
            label: credential.label.clone(),
            account: credential.account.clone().unwrap_or_else(|| id.to_owned()),
            source: credential.from.clone(),
            version,
            sealed,
            created_ms: stored.map_or_else(now_ms, |row| row.created_ms),
        })
    }

    /// Whether a credential of this name is stored with this secret.
    pub async fn holds(&self, who: &Principal, name: &str, secret: &str) -> Result<bool, ServiceError> {
        let rows = self.store.credentials().await?;
        let row = rows.iter().find(|row| row.organisation == who.organisation && row.name == name);
        Ok(row.map(|row| self.open(row)).transpose()?.is_some_and(|stored| stored.as_str() == secret))
    }

    /// The name of the credential with this id or name.
    pub fn credential_name(&self, who: &Principal, id_or_name: &str) -> Result<String, ServiceError> {
        let organisation = self.organisation(&who.organisation)?;
        if organisation.document.credentials.contains_key(id_or_name) {
            return Ok(id_or_name.to_owned());
        }
        let by_id = organisation.meta.iter().find(|((kind, _), meta)| *kind == Kind::Credential && meta.id == id_or_name);
        by_id.map(|((_, name), _)| name.clone()).ok_or(ServiceError::NotFound("credential"))
    }

    /// What `apply` of a document would change.
    pub async fn diff(&self, who: &Principal, document: &Document) -> Result<Vec<Difference>, ServiceError> {
        who.needs(Permission::ReadSupply)?;
        Ok(self.work_out(who, document).await?.1)
    }

    /// Makes the configuration what the document says, whole or not at all. `expect`: only from this revision.
    pub async fn apply(&self, who: &Principal, document: &Document, expect: Option<u64>) -> Result<(u64, Vec<Difference>), ServiceError> {
        who.needs(Permission::WriteConfiguration)?;
        for _ in 0..TRIES {
            let rev = self.organisation(&who.organisation)?.rev;
            if expect.is_some_and(|expected| expected != rev) {
                return Err(ServiceError::Stale(rev));
            }
            let (edits, differences) = self.work_out(who, document).await?;
            match self.edit(who, edits, Some(rev)).await {
                // Somebody else was faster: with no expectation of the caller's, work it out again.
                Err(ServiceError::Stale(_)) if expect.is_none() => self.reload().await?,
                other => return Ok((other?, differences)),
            }
        }
        Err(ServiceError::Conflict("the configuration is being changed by others; try again".to_owned()))
    }

    async fn work_out(&self, who: &Principal, document: &Document) -> Result<(Vec<Edit>, Vec<Difference>), ServiceError> {
        let faults = config::check(document);
        if !faults.is_empty() {
            return Err(ServiceError::Faults(faults));
        }
        let now = self.organisation(&who.organisation)?;
        let mut work = Work { now: &now, edits: Vec::new(), differences: Vec::new() };
        // A credential may be one of a provider that is defined beside it.
        work.put_all(&now.document.providers, &document.providers)?;
        self.credential_edits(who, document, &mut work).await?;
        work.put_all(&now.document.organisation_by_name(), &document.organisation_by_name())?;
        work.put_all(&now.document.teams, &document.teams)?;
        work.put_all(&now.document.pools, &document.pools)?;
        work.put_all(&now.document.policies, &document.policies)?;
        work.put_all(&now.document.routes, &document.routes)?;
        work.remove_unnamed(document);
        Ok((work.edits, work.differences))
    }

    async fn credential_edits(&self, who: &Principal, document: &Document, work: &mut Work<'_>) -> Result<(), ServiceError> {
        let stored: BTreeMap<String, CredentialRow> = self
            .store
            .credentials()
            .await?
            .into_iter()
            .filter(|row| row.organisation == who.organisation)
            .map(|row| (row.name.clone(), row))
            .collect();
        for (name, credential) in &document.credentials {
            let meta = work.now.meta(Kind::Credential, name);
            let id = meta.map_or_else(new_credential_id, |meta| Ok(meta.id.clone()))?;
            let row = self.seal(document, &who.organisation, name, &id, credential, meta.is_some()).await?;
            let view =
                |credential: &Credential| serde_json::to_value(Credential { secret: None, ..credential.clone() }).unwrap_or_default();
            let before = work.now.document.credentials.get(name).map(view);
            let mut fields = config::field_changes(before.as_ref().unwrap_or(&Value::Null), &view(credential));
            if stored.get(name).is_some_and(|stored| stored.version != row.version) {
                let hidden = || Value::from("(secret)");
                fields.push(FieldChange { field: "secret".to_owned(), from: hidden(), to: hidden() });
            }
            let managed = meta.is_some_and(|meta| meta.managed);
            if fields.is_empty() && managed {
                continue;
            }
            work.differ(meta.is_some(), Kind::Credential, name, fields, managed);
            let expect = meta.map_or(Expect::Absent, |meta| Expect::Version(meta.version));
            work.edits.push(Edit::PutCredential { row, managed: true, expect });
        }
        Ok(())
    }

    /// Runs edits in the store, then takes the new configuration into memory. Gives the revision.
    async fn edit(&self, who: &Principal, edits: Vec<Edit>, expect_rev: Option<u64>) -> Result<u64, ServiceError> {
        let edits = Edits { organisation: who.organisation.clone(), edits, expect_rev, actor: who.actor(), now_ms: now_ms() };
        let changing = self.changing();
        let not_done = match self.store.edit(edits).await? {
            Edited::Done(rev) => {
                self.reload().await?;
                changing.done(Changed::all());
                return Ok(rev);
            }
            Edited::Missing => ServiceError::NotFound("object"),
            Edited::Exists => ServiceError::Exists,
            Edited::Stale => ServiceError::Stale(0),
            Edited::InUse(by) => ServiceError::Conflict(by),
            Edited::Invalid(faults) => ServiceError::Faults(faults),
        };
        changing.nothing();
        Err(not_done)
    }

    /// Makes an organisation of its own, with its first admin token.
    pub async fn create_organisation(&self, who: &Principal, id: &str, label: &str) -> Result<Zeroizing<String>, ServiceError> {
        who.needs(Permission::WriteOrganisations)?;
        if who.organisation != super::ORGANISATION {
            return Err(ServiceError::Forbidden("only the installation's own organisation makes others".to_owned()));
        }
        let fits =
            id.starts_with("org_") && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if !fits || id.len() < 5 {
            return Err(ServiceError::Invalid("id".to_owned(), "expected org_ and 1 to 60 lower-case letters, digits, _".to_owned()));
        }
        if label.len() > 200 {
            return Err(ServiceError::Invalid("label".to_owned(), "must be at most 200 bytes".to_owned()));
        }
        let spec = TokenSpec { role: Role::Admin, team: None, label: "first admin".to_owned(), expires_in: None };
        let (row, token, token_hash) = self.new_token(id, spec)?;
        let new = NewOrganisation { label: label.to_owned(), token: row, token_hash, home: who.organisation.clone(), actor: who.actor() };
        if !self.store.found_organisation(new).await? {
            return Err(ServiceError::Conflict(format!("there is an organisation {id} already")));
        }
        self.reload().await?;
        Ok(token)
    }
}

fn new_credential_id() -> Result<String, ServiceError> {
    Ok(format!("cred_{}", hex::encode(&random::<8>()?)))
}

/// Names a fault of the object itself by its own field.
fn relative(error: ServiceError, kind: Kind, name: &str) -> ServiceError {
    let at = kind.at(name);
    match error {
        ServiceError::Faults(mut faults) => {
            for fault in &mut faults {
                if let Some(rest) = fault.field.strip_prefix(&at) {
                    fault.field = rest.trim_start_matches('.').to_owned();
                }
            }
            match <[config::Fault; 1]>::try_from(faults) {
                Ok([one]) => ServiceError::Invalid(one.field, one.message),
                Err(faults) => ServiceError::Faults(faults),
            }
        }
        other => other,
    }
}

/// An apply on its way: what there is, and what will be done.
struct Work<'a> {
    now: &'a Organisation,
    edits: Vec<Edit>,
    differences: Vec<Difference>,
}

impl Work<'_> {
    fn put_all<T: Object>(&mut self, now: &BTreeMap<String, T>, wanted: &BTreeMap<String, T>) -> Result<(), ServiceError> {
        for (name, object) in wanted {
            let meta = self.now.meta(T::KIND, name);
            let managed = meta.is_some_and(|meta| meta.managed);
            if now.get(name) == Some(object) && managed {
                continue;
            }
            let value = |object: &T| serde_json::to_value(object).unwrap_or_default();
            let fields = config::field_changes(&now.get(name).map_or(Value::Null, value), &value(object));
            self.differ(meta.is_some(), T::KIND, name, fields, managed);
            let body = serde_json::to_string(object).map_err(|error| ServiceError::Invalid("body".to_owned(), error.to_string()))?;
            let expect = meta.map_or(Expect::Absent, |meta| Expect::Version(meta.version));
            self.edits.push(Edit::Put { kind: T::KIND, name: name.clone(), body, managed: true, expect });
        }
        Ok(())
    }

    fn differ(&mut self, exists: bool, kind: Kind, name: &str, mut fields: Vec<FieldChange>, managed: bool) {
        if exists && !managed {
            let value = |text: &str| Value::from(text);
            fields.push(FieldChange { field: "managed_by".to_owned(), from: value("api"), to: value("configuration") });
        }
        let action = if exists { Action::Update } else { Action::Create };
        self.differences.push(Difference { action, kind, name: name.to_owned(), fields });
    }

    /// Removes what an earlier apply made and the document no longer names; what needs others goes before what is needed.
    fn remove_unnamed(&mut self, wanted: &Document) {
        for kind in [Kind::Route, Kind::Policy, Kind::Pool, Kind::Credential, Kind::Provider, Kind::Team, Kind::Organisation] {
            let names = self.now.meta.iter().filter(|((of, name), meta)| *of == kind && meta.managed && !names_it(wanted, kind, name));
            for ((_, name), meta) in names {
                self.differences.push(Difference { action: Action::Delete, kind, name: name.clone(), fields: Vec::new() });
                self.edits.push(Edit::Delete { kind, name: name.clone(), expect: Expect::Version(meta.version) });
            }
        }
    }
}

fn names_it(document: &Document, kind: Kind, name: &str) -> bool {
    match kind {
        Kind::Organisation => document.organisation.is_some(),
        Kind::Team => document.teams.contains_key(name),
        Kind::Policy => document.policies.contains_key(name),
        Kind::Provider => document.providers.contains_key(name),
        Kind::Credential => document.credentials.contains_key(name),
        Kind::Pool => document.pools.contains_key(name),
        Kind::Route => document.routes.contains_key(name),
    }
}
