//! Counters of the filter, as they appear in Envoy's statistics.

use crate::host::{self, Metric};
use std::cell::RefCell;
use std::collections::HashMap;

thread_local! {
    static IDS: RefCell<HashMap<String, Option<u32>>> = RefCell::default();
}

fn id(kind: Metric, name: &str) -> Option<u32> {
    IDS.with(|ids| {
        if let Some(id) = ids.borrow().get(name) {
            return *id;
        }
        let id = host::define_metric(kind, name);
        ids.borrow_mut().insert(name.to_owned(), id);
        id
    })
}

fn count(name: &str) {
    if let Some(id) = id(Metric::Counter, name) {
        host::add_to_metric(id, 1);
    }
}

pub fn admitted() {
    count("keyward_admitted_total");
}

pub fn refused(code: &str) {
    count(&format!("keyward_refused_{code}_total"));
}

const PENDING: &str = "keyward_settlements_pending";

/// Records that the policy service has not acknowledged, in all VMs of the process.
pub fn add_pending(offset: i64) {
    if let Some(id) = id(Metric::Gauge, PENDING) {
        host::add_to_metric(id, offset);
    }
}

pub fn pending() -> u64 {
    id(Metric::Gauge, PENDING).and_then(host::metric).unwrap_or(0)
}
