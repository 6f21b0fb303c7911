//! Where decisions become durable. One trait; SQLite implements it for a single machine.

mod accounts;
mod admission;
mod alarms;
mod configuration;
mod key_states;
mod keys;
pub mod ledger;
pub mod objects;
mod outbox;
mod settlement;
pub mod sqlite;
mod watched;

pub use self::accounts::{organisation_account, team_account};
use crate::config::{Fault, Kind};
use crate::directory::Directory;
use crate::prices::AdmittedPrices;
use async_trait::async_trait;
use keyward_core::admission::{Allow, Hold, Status};
use keyward_core::audit::ChainKey;
use keyward_core::edge::{AdmitRequest, Plan, Record, RequestId, Settlement};
use keyward_core::limits::{Account, Enforce, Limits, Moment};
use keyward_core::money::Nanodollars;
use keyward_core::operation::Site;
use keyward_core::price::PriceTable;
use keyward_core::refusal::Refusal;
use keyward_core::usage::Usage;
use keyward_core::verdict::State;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// What went wrong below. The text is for the log; callers of the API are told only that the store failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    #[error("the database refused: {0}")]
    Database(String),
    #[error("the store is shutting down")]
    Closed,
    #[error("the stored data are damaged: {0}")]
    Damaged(&'static str),
}

/// A virtual key as the ledger has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    pub id: String,
    pub organisation: String,
    pub team: Option<String>,
    pub policy: Option<String>,
    pub label: String,
    pub allow: Allow,
    pub tags: BTreeMap<String, String>,
    /// Personal data; erased on demand.
    pub personal: Option<BTreeMap<String, String>>,
    pub status: Status,
    /// Counts changes by people; spending is none.
    pub version: u64,
    pub created_ms: u64,
    pub expires_ms: Option<u64>,
    /// Its own; its policy's come on top.
    pub limits: Limits,
    pub enforce: Enforce,
    pub account: Account,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKey {
    pub row: KeyRow,
    pub token_hash: [u8; 32],
    /// Salt of the hash that commits to the personal data.
    pub salt: [u8; 16],
    pub actor: String,
    /// Most live keys of the team, this one included.
    pub max_keys: Option<u32>,
}

/// A change of a key that was read at `row.version`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyUpdate {
    pub row: KeyRow,
    pub salt: [u8; 16],
    pub actor: String,
    pub now_ms: u64,
    /// Most live keys of its team, if the change makes it one of them.
    pub max_keys: Option<u32>,
}

/// A new token for a key; the old ones work until `overlap_until_ms`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    pub organisation: String,
    pub id: String,
    pub expect: Option<u64>,
    pub token_hash: [u8; 32],
    pub overlap_until_ms: u64,
    pub actor: String,
    pub now_ms: u64,
}

/// How a change of one key went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOutcome {
    Done(Box<KeyRow>),
    Missing,
    /// Somebody changed it since; its version now.
    Stale(u64),
    /// Against a rule that only the ledger can check.
    Refused(Fault),
}

/// A credential with its secret sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRow {
    pub id: String,
    pub organisation: String,
    pub name: String,
    pub provider: String,
    pub label: String,
    pub account: String,
    /// Where the secret was read from, in the configuration's words.
    pub source: Option<String>,
    /// Version of the secret.
    pub version: u64,
    pub sealed: Vec<u8>,
    pub created_ms: u64,
}

/// What an object of the configuration must be for an edit to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Anything,
    Absent,
    Present,
    Version(u64),
}

/// One change of the configuration.
#[derive(Debug, Clone, PartialEq)]
pub enum Edit {
    Put { kind: Kind, name: String, body: String, managed: bool, expect: Expect },
    PutCredential { row: CredentialRow, managed: bool, expect: Expect },
    Delete { kind: Kind, name: String, expect: Expect },
}

/// Changes that happen together or not at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Edits {
    pub organisation: String,
    pub edits: Vec<Edit>,
    /// The revision that the changes were worked out from.
    pub expect_rev: Option<u64>,
    pub actor: String,
    pub now_ms: u64,
}

/// How a change of the configuration went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edited {
    /// The revision now.
    Done(u64),
    Missing,
    Exists,
    Stale,
    InUse(String),
    Invalid(Vec<Fault>),
}

/// An administrator's token, without the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    pub id: String,
    pub organisation: String,
    pub role: String,
    pub team: Option<String>,
    pub label: String,
    pub created_ms: u64,
    pub expires_ms: Option<u64>,
    pub revoked_ms: Option<u64>,
}

/// A new organisation with its first administrator's token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOrganisation {
    pub label: String,
    /// Names the organisation as well.
    pub token: TokenRow,
    pub token_hash: [u8; 32],
    /// The organisation whose administrator makes it.
    pub home: String,
    pub actor: String,
}

/// One admission to decide.
#[derive(Debug, Clone)]
pub struct Admit {
    pub token_hash: [u8; 32],
    pub request: AdmitRequest,
    pub directory: Arc<Directory>,
    pub now: Moment,
    pub expires_ms: u64,
    /// What the request refers to may be in a settlement that has not come yet: say so instead of refusing.
    pub patient: bool,
    /// Names of states, as the gates have them, of what the provider rejects.
    pub rejected: Arc<HashSet<String>>,
}

/// What became of an admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    Admitted(Box<Admitted>),
    /// Nothing has been decided or written: an object that the request refers to is not known, but the key has requests in
    /// flight, one of which may have made it.
    NotYet,
    Refused(Refusal),
    /// The request id was used before, for something else or something that is over.
    Conflict,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    pub hold: Hold,
    /// Where it may go.
    pub targets: Vec<Target>,
    /// What the gate is told, still without targets: secrets are not the store's.
    pub plan: Plan,
}

/// Where an admitted request may go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub provider: String,
    /// The provider's name of the model.
    pub model: Option<String>,
    /// Ids of the credentials to try, in order: where the request refers to objects, the one that reaches them.
    pub credentials: Vec<String>,
    /// Most output tokens of the model, where the gate has to know.
    pub max_output: Option<u64>,
    /// Of a provider that is not just as it is built in.
    pub site: Option<Site>,
}

/// A settlement whose MAC has been checked, with its place in its VM's chain.
#[derive(Debug, Clone)]
pub struct Settle {
    pub record: Record,
    pub settlement: Settlement,
}

/// What a batch of settlements did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    pub charged: u64,
    pub voided: u64,
    pub repeated: u64,
    /// Settled although the ledger knows nothing of the request.
    pub unknown: u64,
    /// Records that should have come before these and have not.
    pub gaps: u64,
    /// Keys whose charge exceeded its hold.
    pub frozen: Vec<String>,
    pub nanodollars: i64,
    pub used: Vec<Used>,
    pub alarms: Vec<Alarm>,
    /// Tries at providers, by provider and status; no status: it never answered.
    pub tries: BTreeMap<(String, Option<u16>), u64>,
    /// Requests that took more than one try.
    pub rotated: u64,
}

/// Something that a person should look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alarm {
    pub organisation: String,
    /// `budget`, `over_hold`, `frozen`, `credential_rejected` or `credential_exhausted`.
    pub what: String,
    pub detail: serde_json::Value,
}

/// A state of a credential, its account or a model of that, under the name that the gates give it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyState {
    pub name: String,
    pub state: State,
    /// Unix milliseconds; `None`: until an operator acts.
    pub until_ms: Option<u64>,
    /// The end is a guess.
    pub probe: bool,
}

/// What becomes of a state that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyStateChange {
    pub name: String,
    /// `None`: it is forgotten.
    pub state: Option<KeyState>,
    pub alarm: Option<Alarm>,
}

/// What one model was used for, and what it was charged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Used {
    pub provider: String,
    pub model: String,
    pub usage: Usage,
    pub nanodollars: u64,
    /// Given back of what had been charged before.
    pub returned_nanodollars: u64,
}

/// What a sweep over expired holds did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expired {
    pub holds: u64,
    pub used: Vec<Used>,
}

/// A request that is running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub req: RequestId,
    pub key_id: String,
    pub provider: String,
    /// `METHOD /path`; empty for one that an earlier version admitted.
    pub endpoint: String,
    /// The model as asked for.
    pub asked: Option<String>,
    /// The provider's name of the model; empty without one.
    pub model: String,
    pub hold: Nanodollars,
    /// When the hold expires: the newest request's last.
    pub expires_ms: u64,
    /// When the token that it came with stops working.
    pub token_expires_ms: Option<u64>,
    /// The team that it was reserved on.
    pub team: Option<String>,
    /// The day whose windows it is charged to.
    pub day: u64,
}

/// What is running, and whose it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Running {
    pub keys: HashMap<String, KeyRow>,
    /// Accounts of teams and organisations, where everybody's requests are here.
    pub accounts: HashMap<String, Account>,
    pub requests: Vec<Held>,
}

/// How the ledger stands, for whoever watches it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Standing {
    /// Keys by status; a key past its time is `expired`.
    pub keys: BTreeMap<String, u64>,
    /// Requests whose money is held.
    pub holds: u64,
    /// When the first hold expires, Unix milliseconds.
    pub first_expiry_ms: Option<u64>,
    pub reserved: Nanodollars,
    pub audit_entries: u64,
}

/// One entry of a chain as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    pub seq: u64,
    pub entry: Vec<u8>,
    pub mac: [u8; 32],
}

/// An alarm that waits to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    pub id: u64,
    pub organisation: String,
    pub what: String,
    /// JSON.
    pub detail: String,
    pub time_ms: u64,
    /// How often it was tried in vain.
    pub tries: u32,
}

/// What usage is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsageQuery {
    pub organisation: String,
    pub team: Option<String>,
    pub key: Option<String>,
    /// Days since 1970-01-01, both included.
    pub from_day: u64,
    pub to_day: u64,
    pub by: Vec<UsageBy>,
    /// Only sums after the one of these values, in the order of `by`; empty: from the first.
    pub after: Vec<String>,
    /// Most sums to give.
    pub limit: u32,
    /// Not what was used, but what keys in shadow mode would have been refused.
    pub would_deny: bool,
}

/// What usage is summed by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UsageBy {
    Day,
    Team,
    Key,
    Provider,
    Model,
    /// The value of one of the key's tags; letters, digits, - _ .
    Tag(String),
    /// Why it would have been refused.
    Reason,
}

impl UsageBy {
    pub fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "day" => UsageBy::Day,
            "team" => UsageBy::Team,
            "key" => UsageBy::Key,
            "provider" => UsageBy::Provider,
            "model" => UsageBy::Model,
            "reason" => UsageBy::Reason,
            _ => {
                let tag = name.strip_prefix("tag:").filter(|tag| (1..=64).contains(&tag.len()))?;
                UsageBy::Tag(tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)).then(|| tag.to_owned())?)
            }
        })
    }

    pub fn name(&self) -> String {
        match self {
            UsageBy::Day => "day".to_owned(),
            UsageBy::Team => "team".to_owned(),
            UsageBy::Key => "key".to_owned(),
            UsageBy::Provider => "provider".to_owned(),
            UsageBy::Model => "model".to_owned(),
            UsageBy::Reason => "reason".to_owned(),
            UsageBy::Tag(tag) => format!("tag:{tag}"),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UsageRow {
    /// One value for each `by`, in its order.
    pub by: Vec<String>,
    pub requests: u64,
    pub input: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub output: u64,
    pub nanodollars: i64,
}

/// What is known of a write that carries an Idempotency-Key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Idempotent {
    /// Not seen before; it is now.
    New,
    /// The sealed answer to the same write.
    Answered(Vec<u8>),
    /// The same write began and has no answer.
    Unfinished,
    /// Another write used this key.
    Other,
}

/// What the ledger needs to write chains and prices, given once at the start.
pub struct LedgerKeys {
    pub origin: String,
    pub audit_seed: [u8; 32],
    pub prices: PriceTable,
    /// What requests in flight were admitted at.
    pub admitted: AdmittedPrices,
}

impl LedgerKeys {
    pub fn chain_key(&self, key_id: &str, epoch: u64) -> ChainKey {
        ChainKey::derive(&self.audit_seed, &self.origin, key_id, epoch)
    }
}

/// The chain of an organisation's administrative changes.
pub fn admin_chain(organisation: &str) -> String {
    format!("adm_{organisation}")
}

/// The store. Every method that changes something returns only after the change is durable.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    async fn admit(&self, admit: Admit) -> Result<Admission, StoreError>;
    async fn settle(&self, batch: Vec<Settle>, directory: Arc<Directory>, now: Moment) -> Result<Settled, StoreError>;
    /// What these keys have running, or everybody.
    async fn running(&self, keys: Option<BTreeSet<String>>) -> Result<Running, StoreError>;
    /// Charges every hold that is past its time.
    async fn expire(&self, now: Moment) -> Result<Expired, StoreError>;

    async fn create_key(&self, key: NewKey) -> Result<KeyOutcome, StoreError>;
    async fn update_key(&self, update: KeyUpdate) -> Result<KeyOutcome, StoreError>;
    async fn rotate_key(&self, rotation: Rotation) -> Result<KeyOutcome, StoreError>;
    /// Erases a key's tags and personal fields, also from the files behind the store. Also of a revoked key.
    async fn erase_personal(&self, organisation: &str, id: &str, expect: u64, actor: &str, now_ms: u64) -> Result<KeyOutcome, StoreError>;
    /// Revokes a key for good. Revoking twice is no error.
    async fn revoke_key(
        &self,
        organisation: &str,
        id: &str,
        expect: Option<u64>,
        actor: &str,
        now_ms: u64,
    ) -> Result<KeyOutcome, StoreError>;
    async fn key(&self, organisation: &str, id: &str) -> Result<Option<KeyRow>, StoreError>;
    /// Keys after `after` in the order of their ids; of one team, if named.
    async fn keys(&self, organisation: &str, team: Option<&str>, after: &str, limit: u32) -> Result<Vec<KeyRow>, StoreError>;

    /// Every organisation with its configuration.
    async fn directory(&self) -> Result<Directory, StoreError>;
    /// Changes an organisation's configuration.
    async fn edit(&self, edits: Edits) -> Result<Edited, StoreError>;
    /// All credentials of all organisations, sealed.
    async fn credentials(&self) -> Result<Vec<CredentialRow>, StoreError>;
    /// Makes an organisation. `false`: there is one of this id.
    async fn create_organisation(&self, id: &str, label: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError>;

    /// Makes an organisation together with its first token. `false`: there is one of this id.
    async fn found_organisation(&self, new: NewOrganisation) -> Result<bool, StoreError>;

    async fn put_admin_token(&self, row: TokenRow, hash: [u8; 32], actor: &str) -> Result<(), StoreError>;
    async fn admin_token(&self, hash: [u8; 32]) -> Result<Option<TokenRow>, StoreError>;
    async fn admin_tokens(&self, organisation: &str, after: &str, limit: u32) -> Result<Vec<TokenRow>, StoreError>;
    /// Revokes a token. `false`: there is none of this id.
    async fn revoke_admin_token(&self, organisation: &str, id: &str, actor: &str, now_ms: u64) -> Result<bool, StoreError>;
    /// Notes an administrative act that changes nothing else.
    async fn note(&self, organisation: &str, actor: &str, action: &str, target: &str, detail: &str, now_ms: u64) -> Result<(), StoreError>;

    /// The account of a team, or of the organisation itself.
    async fn account(&self, organisation: &str, team: Option<&str>) -> Result<Account, StoreError>;

    /// Entries of a chain from `from` on.
    async fn audit(&self, chain: &str, from: u64, limit: u32) -> Result<Vec<AuditRow>, StoreError>;
    async fn usage(&self, query: UsageQuery) -> Result<Vec<UsageRow>, StoreError>;

    /// Begins a write with an Idempotency-Key, or says what is known of it.
    async fn begin_idempotent(&self, token_id: &str, key: &str, fingerprint: [u8; 32], now_ms: u64) -> Result<Idempotent, StoreError>;
    /// Keeps the sealed answer, which tells of the object `about`; no answer forgets the write, which did not happen.
    async fn end_idempotent(&self, token_id: &str, key: &str, answer: Option<Vec<u8>>, about: Option<String>) -> Result<(), StoreError>;

    /// Alarms that are to be sent now, the oldest first.
    async fn due_mail(&self, now_ms: u64, limit: u32) -> Result<Vec<Mail>, StoreError>;
    /// One alarm was sent, or is to be tried again at `next_ms`.
    async fn sent_mail(&self, id: u64, next_ms: Option<u64>) -> Result<(), StoreError>;

    /// The states of credentials that are kept.
    async fn key_states(&self) -> Result<Vec<KeyState>, StoreError>;
    /// Keeps states of credentials, or forgets them, and raises the alarms that belong to them: these are given.
    async fn keep_key_states(&self, changes: Vec<KeyStateChange>, now: Moment) -> Result<Vec<Alarm>, StoreError>;

    async fn standing(&self, now_ms: u64) -> Result<Standing, StoreError>;
    /// Whether a write would be durable now.
    async fn ready(&self) -> Result<(), StoreError>;
}
