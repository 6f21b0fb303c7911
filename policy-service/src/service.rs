//! What the policy service does, whatever the protocol: admit, settle, keys, credentials, audit.

use crate::store::{Admission, Admit, AuditRow, CredentialRow, KeyRow, NewKey, Settle, Settled, Store, StoreError};
use crate::vault::{Vault, VaultError, credential_aad, random};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use keyward_core::admission::{Allow, Status};
use keyward_core::audit::ChainKey;
use keyward_core::edge::{AdmitAnswer, AdmitRequest, EdgeKey, Plan, PlanCredential, PlanTarget, Record, Secret, SettleAnswer, VmId};
use keyward_core::hex;
use keyward_core::money::Nanodollars;
use keyward_core::operation::Provider;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::token::VirtualKey;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

/// The only organisation of this version.
pub const ORGANISATION: &str = "org_default";

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("{0}: {1}")]
    Invalid(&'static str, String),
    #[error("there is no {0} with this id")]
    NotFound(&'static str),
}

/// Keys derived from the installation's root secret, each for one purpose.
pub struct Roots {
    pub pepper: [u8; 32],
    pub audit_seed: [u8; 32],
    pub edge_master: [u8; 32],
}

impl Roots {
    /// Opens the root secret that `path` holds sealed; makes one on the first start. It is not the KEK itself, so that
    /// the KEK can be changed without every key and chain becoming another.
    pub fn load(vault: &Vault, path: &Path) -> Result<Self, VaultError> {
        const AAD: &[u8] = b"keyward/root/v1";
        let make = || {
            let root = Zeroizing::new(random::<32>().map_err(|error| error.to_string())?);
            vault.seal(root.as_slice(), AAD).map(|sealed| hex::encode(&sealed)).map_err(|error| error.to_string())
        };
        let text = crate::files::read_or_create(path, make).map_err(|error| VaultError::Kek(path.display().to_string(), error))?;
        let sealed = hex::decode_vec(&text).ok_or(VaultError::Sealed)?;
        let root = vault.open(&sealed, AAD)?;
        let derive = |purpose: &str| {
            let mut key = [0; 32];
            // 32 bytes are far below HKDF's limit: this can't fail.
            let _ = Hkdf::<Sha256>::new(Some(AAD), &root).expand(purpose.as_bytes(), &mut key);
            key
        };
        Ok(Roots { pepper: derive("token pepper"), audit_seed: derive("audit seed"), edge_master: derive("edge master") })
    }
}

/// A credential ready for use.
#[derive(Clone)]
struct Loaded {
    id: String,
    provider: String,
    secret: Zeroizing<String>,
}

pub struct Service {
    store: Arc<dyn Store>,
    vault: Vault,
    roots: Roots,
    origin: String,
    hold_ttl: Duration,
    loaded: RwLock<Arc<Vec<Loaded>>>,
}

/// What a new key may do.
#[derive(Debug, Clone, Default)]
pub struct KeySpec {
    pub label: String,
    pub allow: Allow,
    pub cap: Option<Nanodollars>,
    pub expires_in: Option<Duration>,
}

/// How an admit ended: an answer, or a conflict that gets none.
pub enum Admitted {
    Answer(Box<AdmitAnswer>),
    Conflict,
}

impl Service {
    /// Starts on a store and opens every stored credential, so that a wrong KEK shows now and not at the first request.
    pub async fn start(
        store: Arc<dyn Store>,
        vault: Vault,
        roots: Roots,
        origin: String,
        hold_ttl: Duration,
    ) -> Result<Self, ServiceError> {
        let service = Service { store, vault, roots, origin, hold_ttl, loaded: RwLock::default() };
        service.reload().await?;
        Ok(service)
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    async fn reload(&self) -> Result<(), ServiceError> {
        let open = |row: CredentialRow| {
            let secret = self.vault.open(&row.sealed, &credential_aad(ORGANISATION, &row.id, row.version))?;
            let secret = String::from_utf8(secret.to_vec()).map_err(|_| StoreError::Damaged("a secret that is not text"))?;
            Ok::<_, ServiceError>(Loaded { id: row.id, provider: row.provider, secret: Zeroizing::new(secret) })
        };
        let loaded = self.store.credentials().await?.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        if let Ok(mut slot) = self.loaded.write() {
            *slot = Arc::new(loaded);
        }
        Ok(())
    }

    /// Decides a request and writes it down; the plan with its credentials exists only once that is durable.
    pub async fn admit(&self, request: AdmitRequest) -> Admitted {
        let edge_key = request.need_key.then(|| EdgeKey::derive(&self.roots.edge_master, request.vm));
        let loaded = self.loaded.read().map(|loaded| loaded.clone()).unwrap_or_default();
        let usable: Vec<&Loaded> = loaded.iter().filter(|c| c.provider == request.ask.provider).collect();
        let now_ms = now_ms();
        let (provider, model) = (request.ask.provider.clone(), request.ask.model.clone());
        let admit = Admit {
            token_hash: self.pepper(&request.token),
            credentials: usable.iter().map(|c| c.id.clone()).collect(),
            now_ms,
            expires_ms: now_ms.saturating_add(millis(self.hold_ttl)),
            patient: true,
            request,
        };
        match self.admit_patiently(admit).await {
            Ok(Admission::Admitted { key_id, hold, grant }) => {
                metrics::counter!("keyward_admissions_total").increment(1);
                let usable = usable.iter().filter(|c| grant.answer.is_none() && grant.pinned.as_ref().is_none_or(|pinned| *pinned == c.id));
                let credentials = usable.map(|c| PlanCredential { id: c.id.clone(), secret: Secret(c.secret.to_string()) }).collect();
                let targets = vec![PlanTarget { provider, model, credentials }];
                let plan = Plan { key: key_id, rev: 0, clamp: hold.clamp, state: grant.state, answer: grant.answer, targets };
                Admitted::Answer(Box::new(AdmitAnswer { plan: Some(plan), refusal: None, edge_key }))
            }
            Ok(Admission::Refused(refusal)) => Admitted::Answer(Box::new(refused(refusal, edge_key))),
            Ok(Admission::Conflict | Admission::NotYet) => Admitted::Conflict,
            Err(error) => {
                tracing::error!(%error, "an admission could not be recorded");
                let refusal =
                    Refusal::new(Code::AuditUnavailable, "the request could not be recorded; nothing was forwarded").retry_after(1);
                Admitted::Answer(Box::new(refused(refusal, edge_key)))
            }
        }
    }

    /// A caller may refer to an object before the gate's record of it is here (it is sent within 50 ms of the answer's end): while
    /// the key has requests in flight, an unknown reference is looked up again for a while before it is refused.
    async fn admit_patiently(&self, mut admit: Admit) -> Result<Admission, StoreError> {
        const WAITS_MS: [u64; 5] = [30, 60, 90, 120, 150];
        for wait in WAITS_MS.iter().filter(|_| !admit.request.ask.refs.is_empty()) {
            match self.store.admit(admit.clone()).await? {
                Admission::NotYet => tokio::time::sleep(Duration::from_millis(*wait)).await,
                decided => return Ok(decided),
            }
        }
        admit.patient = false;
        self.store.admit(admit).await
    }

    /// Takes a batch of records: the first line names the VM, each further line is one sealed record.
    pub async fn settle(&self, body: &str) -> Result<SettleAnswer, ServiceError> {
        let mut lines = body.lines();
        let head =
            lines.next().and_then(BatchHead::parse).ok_or(ServiceError::Invalid("body", "the first line is no batch head".to_owned()))?;
        for (code, count) in head.refusals {
            metrics::counter!("keyward_edge_refusals_total", "reason" => code).increment(count);
        }
        let (taken, rejected) = self.take_records(lines).await?;
        let edge_key = head.need_key.then(|| EdgeKey::derive(&self.roots.edge_master, head.vm));
        Ok(SettleAnswer { taken, rejected, edge_key })
    }

    /// Takes sealed records, one a line, from wherever they come: the MAC says who wrote them.
    pub async fn take_records(&self, lines: impl Iterator<Item = &str>) -> Result<(u64, u64), ServiceError> {
        let (mut batch, mut rejected) = (Vec::new(), 0);
        for line in lines {
            let open = |record: Record| {
                let settlement = record.open(&EdgeKey::derive(&self.roots.edge_master, record.vm))?;
                Some(Settle { record, settlement })
            };
            match Record::parse(line).and_then(open) {
                Some(settle) => batch.push(settle),
                None => rejected += 1,
            }
        }
        if rejected > 0 {
            tracing::error!(rejected, "records with a wrong MAC or form were rejected");
            metrics::counter!("keyward_records_rejected_total").increment(rejected);
        }
        let (taken, failed) = self.settle_all(batch).await?;
        rejected += failed;
        Ok((taken, rejected))
    }

    /// Settles a batch together; if that fails, each record by itself, so that one that can't be booked does not keep the
    /// others from it. Returns how many were taken and how many could not be; if none could, the store is at fault.
    async fn settle_all(&self, batch: Vec<Settle>) -> Result<(u64, u64), ServiceError> {
        if batch.is_empty() {
            return Ok((0, 0));
        }
        let now_ms = now_ms();
        let error = match self.store.settle(batch.clone(), now_ms).await {
            Ok(settled) => {
                report(settled);
                return Ok((batch.len() as u64, 0));
            }
            Err(error) => error,
        };
        let (mut taken, mut failed) = (0, 0);
        for settle in batch {
            match self.store.settle(vec![settle], now_ms).await {
                Ok(settled) => {
                    report(settled);
                    taken += 1;
                }
                Err(error) => {
                    tracing::error!(%error, "a settlement could not be booked");
                    failed += 1;
                }
            }
        }
        if taken == 0 { Err(error.into()) } else { Ok((taken, failed)) }
    }

    /// Charges holds that nobody settled in time.
    pub async fn expire(&self) -> Result<u64, ServiceError> {
        let expired = self.store.expire(now_ms()).await?;
        metrics::counter!("keyward_holds_expired_total").increment(expired);
        Ok(expired)
    }

    /// Makes a key. The token is in the answer and nowhere else.
    pub async fn create_key(&self, spec: KeySpec, actor: &str) -> Result<(KeyRow, VirtualKey), ServiceError> {
        let token = VirtualKey::generate(random()?);
        let now = now_ms();
        let row = KeyRow {
            id: format!("key_{}", hex::encode(&random::<10>()?)),
            organisation: ORGANISATION.to_owned(),
            label: spec.label,
            allow: spec.allow,
            status: Status::Active,
            created_ms: now,
            expires_ms: spec.expires_in.map(|ttl| now.saturating_add(millis(ttl))),
            cap: spec.cap,
            spent: Nanodollars::ZERO,
            reserved: Nanodollars::ZERO,
            in_flight: 0,
        };
        let token_hash = self.pepper(&token.hash().0);
        let row = self.store.create_key(NewKey { row, token_hash, actor: actor.to_owned() }).await?;
        Ok((row, token))
    }

    pub async fn revoke_key(&self, id: &str, actor: &str) -> Result<(), ServiceError> {
        self.store.revoke_key(id, actor, now_ms()).await?.ok_or(ServiceError::NotFound("key"))
    }

    pub async fn key(&self, id: &str) -> Result<KeyRow, ServiceError> {
        self.store.key(id).await?.ok_or(ServiceError::NotFound("key"))
    }

    pub async fn keys(&self, after: &str, limit: u32) -> Result<Vec<KeyRow>, ServiceError> {
        Ok(self.store.keys(after, limit).await?)
    }

    pub async fn add_credential(
        &self,
        provider: &str,
        label: &str,
        account: Option<&str>,
        secret: &str,
    ) -> Result<CredentialRow, ServiceError> {
        if Provider::by_name(provider).is_none() {
            return Err(ServiceError::Invalid("provider", format!("there is no provider {provider:?}")));
        }
        // What can't stand in a header would break every request that uses it.
        if secret.is_empty() || secret.len() > 4_096 || !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ServiceError::Invalid("secret", "must be 1 to 4096 visible ASCII characters".to_owned()));
        }
        if secret.starts_with(keyward_core::token::PREFIX) {
            return Err(ServiceError::Invalid("secret", "is a virtual key: a credential is the provider's own key".to_owned()));
        }
        let id = format!("cred_{}", hex::encode(&random::<8>()?));
        let sealed = self.vault.seal(secret.as_bytes(), &credential_aad(ORGANISATION, &id, 1))?;
        let row = CredentialRow {
            account: account.unwrap_or(&id).to_owned(),
            id,
            provider: provider.to_owned(),
            label: label.to_owned(),
            version: 1,
            sealed,
            created_ms: now_ms(),
        };
        self.store.put_credential(row.clone()).await?;
        self.reload().await?;
        Ok(row)
    }

    pub async fn remove_credential(&self, id: &str) -> Result<(), ServiceError> {
        let removed = self.store.remove_credential(id).await?;
        self.reload().await?;
        if removed { Ok(()) } else { Err(ServiceError::NotFound("credential")) }
    }

    pub async fn credentials(&self) -> Result<Vec<CredentialRow>, ServiceError> {
        Ok(self.store.credentials().await?)
    }

    pub async fn audit(&self, key_id: &str, from: u64, limit: u32) -> Result<Vec<AuditRow>, ServiceError> {
        self.key(key_id).await?;
        Ok(self.store.audit(key_id, from, limit).await?)
    }

    pub fn chain_key(&self, key_id: &str, epoch: u64) -> ChainKey {
        ChainKey::derive(&self.roots.audit_seed, &self.origin, key_id, epoch)
    }

    /// Makes an admin token. The token is in the answer and nowhere else.
    pub async fn create_admin_token(&self, role: &str) -> Result<Zeroizing<String>, ServiceError> {
        let token = Zeroizing::new(format!("kwa_{}", hex::encode(&random::<32>()?)));
        let id = format!("adm_{}", hex::encode(&random::<8>()?));
        self.store.put_admin_token(&id, self.pepper(&Sha256::digest(token.as_bytes()).into()), role, now_ms()).await?;
        Ok(token)
    }

    pub async fn admin_role(&self, token: &str) -> Result<Option<String>, ServiceError> {
        Ok(self.store.admin_role(self.pepper(&Sha256::digest(token.as_bytes()).into())).await?)
    }

    pub async fn ready(&self) -> Result<(), ServiceError> {
        Ok(self.store.ready().await?)
    }

    /// What is stored of a token: `HMAC-SHA256(pepper, SHA-256(token))`.
    fn pepper(&self, hash: &[u8; 32]) -> [u8; 32] {
        // HMAC takes keys of any length: this can't fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.roots.pepper) else { return [0; 32] };
        mac.update(hash);
        mac.finalize().into_bytes().into()
    }
}

/// `KB1 vm need_key refusals-json`.
struct BatchHead {
    vm: VmId,
    need_key: bool,
    refusals: HashMap<String, u64>,
}

impl BatchHead {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(4, ' ');
        (parts.next()? == "KB1").then_some(())?;
        let vm = VmId(hex::decode(parts.next()?)?);
        let need_key = parts.next()? == "1";
        let refusals: HashMap<String, u64> = serde_json::from_str(parts.next()?).ok()?;
        // The names become a metric's label: only our own codes may.
        let known = |code: &str| serde_json::from_value::<Code>(code.into()).is_ok();
        Some(BatchHead { vm, need_key, refusals: refusals.into_iter().filter(|(code, _)| known(code)).collect() })
    }
}

fn refused(refusal: Refusal, edge_key: Option<EdgeKey>) -> AdmitAnswer {
    metrics::counter!("keyward_refusals_total", "reason" => refusal.code.name()).increment(1);
    AdmitAnswer { plan: None, refusal: Some(refusal), edge_key }
}

fn report(settled: Settled) {
    metrics::counter!("keyward_settlements_total").increment(settled.charged);
    metrics::counter!("keyward_voids_total").increment(settled.voided);
    metrics::counter!("keyward_spent_nanodollars_total").increment(settled.nanodollars.try_into().unwrap_or(0));
    metrics::counter!("keyward_keys_frozen_total").increment(settled.frozen);
    metrics::counter!("keyward_records_missing_total").increment(settled.gaps);
    if settled.gaps > 0 || settled.unknown > 0 || settled.frozen > 0 {
        tracing::error!(missing = settled.gaps, unknown = settled.unknown, frozen = settled.frozen, "settlements need an operator's eye");
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}
