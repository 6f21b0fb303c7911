//! What the policy service does, whatever the protocol: admit, settle, keys, configuration, audit.

pub mod access;
#[cfg(test)]
mod bed;
mod configuration;
pub mod key_states;
pub mod keys;
mod lent;
mod patience;
mod watch;
pub(crate) mod watched;
mod webhook;

pub use self::lent::{Lent, Loan};

use self::access::{Permission, Principal};
use self::key_states::KeyStates;
use self::patience::Patience;
use self::watch::{Changed, Watch};
use crate::config::Fault;
use crate::directory::{Directory, Organisation, shared_account};
use crate::metrics::handles;
use crate::store::{
    self, Admission, Admit, AuditRow, CredentialRow, Idempotent, Settle, Store, StoreError, UsageQuery, UsageRow, admin_chain,
};
use crate::vault::{Vault, VaultError, credential_aad, random};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use keyward_core::audit::ChainKey;
use keyward_core::edge::{
    AdmitAnswer, AdmitRequest, EdgeKey, News, PlanCredential, PlanTarget, Record, RequestId, Secret, SettleAnswer, Settlement, VmId,
};
use keyward_core::hex;
use keyward_core::limits::{Account, DAY_MS, Moment};
use keyward_core::refusal::{Code, Refusal};
use keyward_core::trace::TraceContext;
use sha2::Sha256;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use zeroize::Zeroizing;

/// The organisation that every installation has from its start.
pub const ORGANISATION: &str = "org_default";

#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Vault(#[from] VaultError),
    #[error("{0}: {1}")]
    Invalid(String, String),
    /// Several things are wrong with a configuration.
    #[error("the configuration has {} faults", .0.len())]
    Faults(Vec<Fault>),
    #[error("there is no {0} with this id")]
    NotFound(&'static str),
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    Conflict(String),
    #[error("there is one of this name already")]
    Exists,
    /// It was changed since the caller read it; its version now.
    #[error("it was changed meanwhile and is at version {0}")]
    Stale(u64),
}

/// Keys derived from the installation's root secret, each for one purpose.
pub struct Roots {
    pub pepper: [u8; 32],
    pub audit_seed: [u8; 32],
    pub edge_master: [u8; 32],
    pub webhook_master: [u8; 32],
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
        Ok(Roots {
            pepper: derive("token pepper"),
            audit_seed: derive("audit seed"),
            edge_master: derive("edge master"),
            webhook_master: derive("webhook master"),
        })
    }
}

/// A credential ready for use.
#[derive(Clone)]
struct Loaded {
    secret: Zeroizing<String>,
    /// The account that it shares, as gates name it.
    account: Option<String>,
}

/// What admissions work from, replaced whole after every change.
#[derive(Default)]
struct InMemory {
    directory: Arc<Directory>,
    /// Secrets by credential id.
    secrets: HashMap<String, Loaded>,
}

pub struct Service {
    store: Arc<dyn Store>,
    vault: Vault,
    roots: Roots,
    origin: String,
    hold_ttl: Duration,
    memory: RwLock<Arc<InMemory>>,
    lent: RwLock<Vec<Lent>>,
    watch: Watch,
    key_states: KeyStates,
    /// When `/metrics` was last read.
    patience: Patience,
    watched: tokio::sync::Mutex<Option<Instant>>,
    /// Changes are taken into memory in the order in which they happened.
    reloading: tokio::sync::Mutex<()>,
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
        let service = Service {
            store,
            vault,
            roots,
            origin,
            hold_ttl,
            memory: RwLock::default(),
            lent: RwLock::default(),
            watch: Watch::new()?,
            key_states: KeyStates::default(),
            patience: Patience::default(),
            watched: tokio::sync::Mutex::default(),
            reloading: tokio::sync::Mutex::default(),
        };
        service.store.create_organisation(ORGANISATION, "", "keyward start", now_ms()).await?;
        service.reload().await?;
        service.load_key_states().await?;
        Ok(service)
    }

    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Takes the stored configuration and credentials into memory.
    async fn reload(&self) -> Result<(), ServiceError> {
        let _one_at_a_time = self.reloading.lock().await;
        let open = |row: CredentialRow| {
            let account = (row.account != row.id).then(|| shared_account(&row.organisation, &row.provider, &row.account));
            Ok::<_, ServiceError>((row.id.clone(), Loaded { secret: self.open(&row)?, account }))
        };
        let secrets = self.store.credentials().await?.into_iter().map(open).collect::<Result<HashMap<_, _>, _>>()?;
        let mut memory = InMemory { directory: Arc::default(), secrets };
        let mut directory = self.store.directory().await?;
        self.add_lent(&mut directory, &mut memory.secrets);
        watched::pools(&directory);
        memory.directory = Arc::new(directory);
        let (before, after) = (self.memory(), Arc::new(memory));
        if let Ok(mut slot) = self.memory.write() {
            *slot = after.clone();
        }
        self.secrets_changed(&before, &after).await;
        Ok(())
    }

    fn open(&self, row: &CredentialRow) -> Result<Zeroizing<String>, ServiceError> {
        let secret = self.vault.open(&row.sealed, &credential_aad(&row.organisation, &row.id, row.version))?;
        let secret = std::str::from_utf8(&secret).map_err(|_| StoreError::Damaged("a secret that is not text"))?;
        Ok(Zeroizing::new(secret.to_owned()))
    }

    fn memory(&self) -> Arc<InMemory> {
        self.memory.read().map(|memory| memory.clone()).unwrap_or_default()
    }

    /// An organisation's configuration as it stands.
    pub fn organisation(&self, id: &str) -> Result<Arc<Organisation>, ServiceError> {
        self.memory().directory.organisations.get(id).cloned().ok_or(ServiceError::NotFound("organisation"))
    }

    /// All organisations, by id.
    pub fn organisations(&self, who: &Principal) -> Result<Vec<(String, Arc<Organisation>)>, ServiceError> {
        who.needs(Permission::ReadOrganisations)?;
        let memory = self.memory();
        let all = memory.directory.organisations.iter().filter(|(id, _)| who.organisation == ORGANISATION || **id == who.organisation);
        let mut all: Vec<_> = all.map(|(id, organisation)| (id.clone(), organisation.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(all)
    }

    /// Decides a request and writes it down; the plan with its credentials exists only once that is durable.
    pub async fn admit(&self, request: AdmitRequest) -> Admitted {
        let began = Instant::now();
        let (req, metrics) = (request.req, handles());
        let trace = request.trace.as_deref().and_then(TraceContext::parse);
        let trace = trace.as_ref();
        let admitted = self.decide(request, trace).await;
        metrics.admit_seconds.record(began.elapsed());
        if let Admitted::Conflict = admitted {
            metrics.conflicts.increment(1);
            let (trace_id, span_id) = watched::ids(trace);
            tracing::warn!(request_id = %req, trace_id, span_id, "an admission whose request id was used before");
        }
        admitted
    }

    async fn decide(&self, request: AdmitRequest, trace: Option<&TraceContext>) -> Admitted {
        let edge_key = request.need_key.then(|| EdgeKey::derive(&self.roots.edge_master, request.vm));
        let memory = self.memory();
        let now = moment();
        let (req, endpoint, named) = (request.req, request.ask.endpoint.clone(), request.ask.provider.clone());
        // Until it is known where the request goes.
        let provider = if named.is_empty() { request.ask.dialect.provider().to_owned() } else { named };
        let admit = Admit {
            token_hash: self.pepper(&request.token),
            directory: memory.directory.clone(),
            now,
            expires_ms: now.wall_ms.saturating_add(millis(self.hold_ttl)),
            patient: true,
            rejected: self.key_states.rejected(),
            request,
        };
        match self.admit_patiently(admit).await {
            Ok(Admission::Admitted(admitted)) => {
                let store::Admitted { hold, targets, mut plan } = *admitted;
                let provider = targets.first().map_or(provider, |target| target.provider.clone());
                handles().admitted(&provider, &endpoint);
                if !Arc::ptr_eq(&memory.directory, &self.memory().directory) {
                    // Decided by rules that have changed meanwhile, and perhaps written down after all that was running was judged.
                    self.changed(Changed::key(&plan.key));
                }
                if tracing::enabled!(tracing::Level::DEBUG) {
                    let (trace_id, span_id) = watched::ids(trace);
                    tracing::debug!(
                        request_id = %req, trace_id, span_id, key = plan.key, gen_ai.provider.name = provider, endpoint,
                        reserved_nanodollars = hold.total.0, "admitted"
                    );
                }
                let with_secret = |id: String| {
                    let Loaded { secret, account } = memory.secrets.get(&id)?;
                    Some(PlanCredential { id, secret: Secret(secret.to_string()), account: account.clone() })
                };
                plan.targets = targets
                    .into_iter()
                    .map(|target| PlanTarget {
                        provider: target.provider,
                        model: target.model,
                        credentials: target.credentials.into_iter().filter_map(with_secret).collect(),
                        max_output: target.max_output,
                        site: target.site.map(Box::new),
                    })
                    .collect();
                Admitted::Answer(Box::new(AdmitAnswer { req: Some(req), plan: Some(plan), refusal: None, edge_key }))
            }
            Ok(Admission::Refused(refusal)) => {
                watched::refused(&refusal, req, &provider, &endpoint, trace);
                Admitted::Answer(Box::new(refused(req, refusal, edge_key)))
            }
            Ok(Admission::Conflict | Admission::NotYet) => Admitted::Conflict,
            Err(error) => {
                let (trace_id, span_id) = watched::ids(trace);
                tracing::error!(request_id = %req, trace_id, span_id, %error, "an admission could not be recorded");
                let refusal =
                    Refusal::new(Code::AuditUnavailable, "the request could not be recorded; nothing was forwarded").retry_after(1);
                Admitted::Answer(Box::new(refused(req, refusal, edge_key)))
            }
        }
    }

    /// A caller may refer to an object before the gate's record of it is here (it is sent within 50 ms of the answer's end): while
    /// the key has requests in flight, an unknown reference is looked up again for a while before it is refused.
    async fn admit_patiently(&self, mut admit: Admit) -> Result<Admission, StoreError> {
        const WAITS_MS: [u64; 5] = [30, 60, 90, 120, 150];
        let mut patience = None;
        for wait in WAITS_MS.iter().filter(|_| !admit.request.ask.refs.is_empty()) {
            match self.store.admit(admit.clone()).await? {
                Admission::NotYet => {}
                decided => return Ok(decided),
            }
            patience = patience.or_else(|| self.patience.take(admit.token_hash));
            if patience.is_none() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(*wait)).await;
        }
        admit.patient = false;
        self.store.admit(admit).await
    }

    /// Takes a batch of records: the first line names the VM, each further line is one sealed record.
    pub async fn settle(&self, body: &str) -> Result<SettleAnswer, ServiceError> {
        let began = Instant::now();
        let settled = self.settle_batch(body).await;
        handles().settle_seconds.record(began.elapsed());
        settled
    }

    async fn settle_batch(&self, body: &str) -> Result<SettleAnswer, ServiceError> {
        let mut lines = body.lines();
        let head = lines
            .next()
            .and_then(BatchHead::parse)
            .ok_or(ServiceError::Invalid("body".to_owned(), "the first line is no batch head".to_owned()))?;
        self.take_news(head.news).await;
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
                Some(settle) => {
                    let Settlement { req, outcome, status, ms, .. } = &settle.settlement;
                    tracing::debug!(request_id = %req, ?outcome, status, duration_ms = ms, "settled");
                    batch.push(settle);
                }
                None => rejected += 1,
            }
        }
        if rejected > 0 {
            tracing::error!(rejected, "records with a wrong MAC or form were rejected");
        }
        let (taken, failed) = self.settle_all(batch).await?;
        rejected += failed;
        handles().records_rejected.increment(rejected);
        Ok((taken, rejected))
    }

    /// Settles a batch together; if that fails, each record by itself, so that one that can't be booked does not keep the
    /// others from it. Returns how many were taken and how many could not be; if none could, the store is at fault.
    async fn settle_all(&self, batch: Vec<Settle>) -> Result<(u64, u64), ServiceError> {
        if batch.is_empty() {
            return Ok((0, 0));
        }
        let (directory, now) = (self.memory().directory.clone(), moment());
        let error = match self.store.settle(batch.clone(), directory.clone(), now).await {
            Ok(settled) => {
                self.report(&settled);
                return Ok((batch.len() as u64, 0));
            }
            Err(error) => error,
        };
        let (mut taken, mut failed) = (0, 0);
        for settle in batch {
            let req = settle.settlement.req;
            match self.store.settle(vec![settle], directory.clone(), now).await {
                Ok(settled) => {
                    self.report(&settled);
                    taken += 1;
                }
                Err(error) => {
                    tracing::error!(request_id = %req, %error, "a settlement could not be booked");
                    failed += 1;
                }
            }
        }
        if taken == 0 { Err(error.into()) } else { Ok((taken, failed)) }
    }

    /// Charges holds that nobody settled in time.
    pub async fn expire(&self) -> Result<u64, ServiceError> {
        let expired = self.store.expire(moment()).await?;
        handles().holds_expired.increment(expired.holds);
        self.count_used(&expired.used);
        if expired.holds > 0 {
            tracing::warn!(holds = expired.holds, "holds that nobody settled in time were charged");
        }
        Ok(expired.holds)
    }

    /// Takes sealed records that an administrator brings.
    pub async fn import_records(&self, who: &Principal, lines: impl Iterator<Item = &str>) -> Result<(u64, u64), ServiceError> {
        who.needs(Permission::ImportSettlements)?;
        let (taken, rejected) = self.take_records(lines).await?;
        let detail = serde_json::json!({ "taken": taken, "rejected": rejected }).to_string();
        self.store.note(&who.organisation, &who.actor(), "import", "settlements", &detail, now_ms()).await?;
        Ok((taken, rejected))
    }

    /// The account of a team, or of the organisation itself.
    pub async fn account(&self, who: &Principal, team: Option<&str>) -> Result<Account, ServiceError> {
        Ok(self.store.account(&who.organisation, team).await?)
    }

    /// Entries of a key's chain, or of the organisation's chain of administrative changes.
    pub async fn audit(&self, who: &Principal, chain: &str, from: u64, limit: u32) -> Result<Vec<AuditRow>, ServiceError> {
        who.needs(Permission::ReadAudit)?;
        if chain != admin_chain(&who.organisation) || who.team.is_some() {
            self.key(who, chain).await?;
        }
        Ok(self.store.audit(chain, from, limit).await?)
    }

    /// Sums of what was used; a developer's are those of their team.
    pub async fn usage(&self, who: &Principal, mut query: UsageQuery) -> Result<Vec<UsageRow>, ServiceError> {
        who.needs(Permission::ReadUsage)?;
        query.organisation.clone_from(&who.organisation);
        match (&who.team, &query.team) {
            (Some(own), Some(asked)) if own != asked => return Ok(Vec::new()),
            (Some(own), _) => query.team = Some(own.clone()),
            _ => {}
        }
        Ok(self.store.usage(query).await?)
    }

    /// Begins a write that carries an Idempotency-Key. An answer that is known is opened.
    pub async fn begin_idempotent(&self, who: &Principal, key: &str, fingerprint: [u8; 32]) -> Result<Begun, ServiceError> {
        // Keyed: bodies may hold personal data that somebody with the database could guess.
        let fingerprint = self.pepper(&fingerprint);
        Ok(match self.store.begin_idempotent(&who.token_id, key, fingerprint, now_ms()).await? {
            Idempotent::New => Begun::New,
            Idempotent::Answered(sealed) => Begun::Answered(self.vault.open(&sealed, &idempotent_aad(who, key))?),
            Idempotent::Unfinished => Begun::Unfinished,
            Idempotent::Other => Begun::Other,
        })
    }

    /// Keeps the answer, sealed: it may hold a token. `None`: the write did not happen. `about`: the id of what it tells of.
    pub async fn end_idempotent(
        &self,
        who: &Principal,
        key: &str,
        answer: Option<&[u8]>,
        about: Option<String>,
    ) -> Result<(), ServiceError> {
        let sealed = answer.map(|answer| self.vault.seal(answer, &idempotent_aad(who, key))).transpose()?;
        Ok(self.store.end_idempotent(&who.token_id, key, sealed, about).await?)
    }

    pub fn chain_key(&self, key_id: &str, epoch: u64) -> ChainKey {
        ChainKey::derive(&self.roots.audit_seed, &self.origin, key_id, epoch)
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

/// What is known of a write that carries an Idempotency-Key.
pub enum Begun {
    New,
    Answered(Zeroizing<Vec<u8>>),
    Unfinished,
    Other,
}

fn idempotent_aad(who: &Principal, key: &str) -> Vec<u8> {
    [b"keyward/idempotent/v1\0".as_slice(), who.token_id.as_bytes(), b"\0", key.as_bytes()].concat()
}

/// `KB1 vm need_key news-json`.
struct BatchHead {
    vm: VmId,
    need_key: bool,
    news: News,
}

impl BatchHead {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(4, ' ');
        (parts.next()? == "KB1").then_some(())?;
        let vm = VmId(hex::decode(parts.next()?)?);
        let need_key = parts.next()? == "1";
        let mut news: News = serde_json::from_str(parts.next()?).ok()?;
        // The names become a metric's label: only our own codes may.
        news.refusals.retain(|code, _| Code::named(code).is_some());
        Some(BatchHead { vm, need_key, news })
    }
}

fn refused(req: RequestId, refusal: Refusal, edge_key: Option<EdgeKey>) -> AdmitAnswer {
    handles().refused(refusal.code);
    AdmitAnswer { req: Some(req), plan: None, refusal: Some(refusal), edge_key }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Now, by a clock that people set and by one that never goes back. The second one is near the first, so that what it counted
/// means something after a restart.
pub fn moment() -> Moment {
    static START: LazyLock<(Instant, u64)> = LazyLock::new(|| (Instant::now(), now_ms()));
    let (started, at_ms) = *START;
    let wall_ms = now_ms();
    Moment { wall_ms, steady_ms: at_ms.saturating_add(millis(started.elapsed())), day: wall_ms / DAY_MS }
}

/// Unix time in milliseconds.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, millis)
}
