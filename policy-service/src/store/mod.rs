//! Where decisions become durable. One trait; SQLite implements it for a single machine.

pub mod ledger;
pub mod objects;
pub mod sqlite;

use async_trait::async_trait;
use keyward_core::admission::{Allow, Hold, Status};
use keyward_core::audit::ChainKey;
use keyward_core::edge::{AdmitRequest, Record, Settlement};
use keyward_core::money::Nanodollars;
use keyward_core::price::PriceTable;
use keyward_core::refusal::Refusal;
use serde::{Deserialize, Serialize};

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

/// A virtual key as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRow {
    pub id: String,
    pub organisation: String,
    pub label: String,
    pub allow: Allow,
    pub status: Status,
    pub created_ms: u64,
    pub expires_ms: Option<u64>,
    pub cap: Option<Nanodollars>,
    pub spent: Nanodollars,
    pub reserved: Nanodollars,
    pub in_flight: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKey {
    pub row: KeyRow,
    pub token_hash: [u8; 32],
    pub actor: String,
}

/// A credential with its secret sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialRow {
    pub id: String,
    pub provider: String,
    pub label: String,
    pub account: String,
    pub version: u64,
    pub sealed: Vec<u8>,
    pub created_ms: u64,
}

/// One admission to decide.
#[derive(Debug, Clone)]
pub struct Admit {
    pub token_hash: [u8; 32],
    pub request: AdmitRequest,
    /// Usable credentials of the provider asked for, in the order in which they will be tried.
    pub credentials: Vec<String>,
    pub now_ms: u64,
    pub expires_ms: u64,
    /// What the request refers to may be in a settlement that has not come yet: say so instead of refusing.
    pub patient: bool,
}

/// What an admission gives besides its hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grant {
    /// The only credential with which the objects that the request refers to can be reached.
    pub pinned: Option<String>,
    /// The provider may keep what it answers.
    pub state: bool,
    /// The answer, where the service itself gives it.
    pub answer: Option<String>,
}

/// What became of an admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    Admitted {
        key_id: String,
        hold: Hold,
        grant: Grant,
    },
    /// Nothing has been decided or written: an object that the request refers to is not known, but the key has requests in
    /// flight, one of which may have made it.
    NotYet,
    Refused(Refusal),
    /// The request id was used before, for something else or something that is over.
    Conflict,
}

/// A settlement whose MAC has been checked, with its place in its VM's chain.
#[derive(Debug, Clone)]
pub struct Settle {
    pub record: Record,
    pub settlement: Settlement,
}

/// What a batch of settlements did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    pub charged: u64,
    pub voided: u64,
    pub repeated: u64,
    /// Settled although the ledger knows nothing of the request.
    pub unknown: u64,
    /// Records that should have come before these and have not.
    pub gaps: u64,
    pub frozen: u64,
    pub nanodollars: i64,
}

/// One entry of a key's chain as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    pub seq: u64,
    pub entry: Vec<u8>,
    pub mac: [u8; 32],
}

/// What the ledger needs to write chains and prices, given once at the start.
pub struct LedgerKeys {
    pub origin: String,
    pub audit_seed: [u8; 32],
    pub prices: PriceTable,
}

impl LedgerKeys {
    pub fn chain_key(&self, key_id: &str, epoch: u64) -> ChainKey {
        ChainKey::derive(&self.audit_seed, &self.origin, key_id, epoch)
    }
}

/// The store. Every method that changes something returns only after the change is durable.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    async fn admit(&self, admit: Admit) -> Result<Admission, StoreError>;
    async fn settle(&self, batch: Vec<Settle>, now_ms: u64) -> Result<Settled, StoreError>;
    /// Charges every hold that is past its time. Returns how many.
    async fn expire(&self, now_ms: u64) -> Result<u64, StoreError>;

    async fn create_key(&self, key: NewKey) -> Result<KeyRow, StoreError>;
    /// Revokes a key for good. `None`: no such key. Revoking twice is no error.
    async fn revoke_key(&self, id: &str, actor: &str, now_ms: u64) -> Result<Option<()>, StoreError>;
    async fn key(&self, id: &str) -> Result<Option<KeyRow>, StoreError>;
    /// Keys after `after` in the order of their ids.
    async fn keys(&self, after: &str, limit: u32) -> Result<Vec<KeyRow>, StoreError>;

    async fn put_credential(&self, row: CredentialRow) -> Result<(), StoreError>;
    async fn remove_credential(&self, id: &str) -> Result<bool, StoreError>;
    async fn credentials(&self) -> Result<Vec<CredentialRow>, StoreError>;

    /// Entries of a key's chain from `from` on.
    async fn audit(&self, key_id: &str, from: u64, limit: u32) -> Result<Vec<AuditRow>, StoreError>;

    async fn put_admin_token(&self, id: &str, hash: [u8; 32], role: &str, now_ms: u64) -> Result<(), StoreError>;
    /// Role of an admin token.
    async fn admin_role(&self, hash: [u8; 32]) -> Result<Option<String>, StoreError>;

    /// Whether a write would be durable now.
    async fn ready(&self) -> Result<(), StoreError>;
}
