//! What all connections and the control API share.

use std::sync::{Arc, PoisonError, RwLock};

use crate::credentials::Credentials;
use crate::faults::Faults;
use crate::ledger::Ledger;
use crate::objects::Objects;

#[derive(Debug)]
pub struct Shared {
    credentials: RwLock<Arc<Credentials>>,
    pub faults: Faults,
    pub ledger: Ledger,
    pub objects: Objects,
    /// No captures, digests nor violation scans: as little work as possible.
    pub bench: bool,
    /// Tokens a stream still generates after its client has gone.
    pub abort_overrun: u64,
}

impl Shared {
    pub fn new(ledger_cap: usize, bench: bool, abort_overrun: u64) -> Self {
        let (credentials, faults, ledger) = (RwLock::default(), Faults::default(), Ledger::new(ledger_cap));
        Shared { credentials, faults, ledger, objects: Objects::default(), bench, abort_overrun }
    }

    pub fn credentials(&self) -> Arc<Credentials> {
        Arc::clone(&self.credentials.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn replace_credentials(&self, credentials: Credentials) {
        *self.credentials.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(credentials);
    }
}
