//! Counters of the filter, as they appear in Envoy's statistics.

use crate::host::{self, Metric};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

thread_local! {
    static IDS: RefCell<HashMap<String, Option<u32>>> = RefCell::default();
    static GATHERED: Gathered = Gathered::default();
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

pub fn refused(code: &str) {
    count(&format!("keyward_refused_{code}_total"));
}

const ADMITTED: &str = "keyward_admitted_total";
const PENDING: &str = "keyward_settlements_pending";

/// What every request changes is gathered here and told to Envoy once a tick: each call to the host costs.
#[derive(Default)]
struct Gathered {
    admitted: Cell<i64>,
    pending: Cell<i64>,
}

pub fn admitted() {
    GATHERED.with(|g| g.admitted.set(g.admitted.get() + 1));
}

/// A record waits for the policy service to acknowledge it.
pub fn pending_grew() {
    GATHERED.with(|g| g.pending.set(g.pending.get() + 1));
}

/// So many records were acknowledged.
pub fn pending_shrank(records: usize) {
    GATHERED.with(|g| g.pending.set(g.pending.get() - i64::try_from(records).unwrap_or(0)));
    publish();
}

/// Tells Envoy what has gathered. Called on every tick.
pub fn publish() {
    GATHERED.with(|g| {
        for (kind, name, cell) in [(Metric::Counter, ADMITTED, &g.admitted), (Metric::Gauge, PENDING, &g.pending)] {
            if let (offset @ (..=-1 | 1..), Some(id)) = (cell.take(), id(kind, name)) {
                host::add_to_metric(id, offset);
            }
        }
    });
}

/// Records that wait in all VMs of the process, as far as they have been told.
pub fn pending() -> u64 {
    id(Metric::Gauge, PENDING).and_then(host::metric).unwrap_or(0)
}
