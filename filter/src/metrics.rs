//! The filter's metrics in Envoy's statistics; `keyward_core::metrics::FILTER` says what each one means.

use crate::host::{self, Metric};
use crate::load::{Load, Loads};
use keyward_core::refusal::Code;
use keyward_core::watch::ENDS;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

thread_local! {
    static IDS: RefCell<HashMap<String, Option<u32>>> = RefCell::default();
    static GATHERED: Gathered = Gathered::default();
}

const PENDING: &str = "keyward_settlements_pending";
const WAIT: &str = "keyward_admission_wait_microseconds";
/// Waits that are kept from one tick to the next; so many more would be no news.
const MAX_WAITS: usize = 4_096;

/// What happens is gathered here and told to Envoy once a tick: each call to the host costs.
#[derive(Default)]
struct Gathered {
    started: Cell<bool>,
    admitted: Cell<i64>,
    refused: RefCell<BTreeMap<&'static str, i64>>,
    /// Microseconds.
    waits: RefCell<Vec<u64>>,
    pending: Cell<i64>,
    failed: Cell<i64>,
    adopted: Cell<i64>,
    polls: Cell<i64>,
    polls_failed: Cell<i64>,
    takeovers: Cell<i64>,
    ended: RefCell<BTreeMap<&'static str, i64>>,
    loads: RefCell<Loads>,
}

fn add(cell: &Cell<i64>, n: i64) {
    cell.set(cell.get() + n);
}

fn counted(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(0)
}

pub fn refused(code: &'static str) {
    GATHERED.with(|g| *g.refused.borrow_mut().entry(code).or_default() += 1);
}

pub fn admitted() {
    GATHERED.with(|g| add(&g.admitted, 1));
}

/// The policy service answered what it was asked at `since`.
pub fn answered(since: Instant) {
    let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
    GATHERED.with(|g| {
        let mut waits = g.waits.borrow_mut();
        if waits.len() < MAX_WAITS {
            waits.push(micros);
        }
    });
}

/// A record waits for the policy service to acknowledge it.
pub fn pending_grew() {
    GATHERED.with(|g| add(&g.pending, 1));
}

/// So many records were acknowledged.
pub fn pending_shrank(records: usize) {
    GATHERED.with(|g| {
        add(&g.pending, -counted(records));
        tell(Metric::Gauge, PENDING, g.pending.take());
    });
}

/// A batch of records got no answer.
pub fn batch_failed() {
    GATHERED.with(|g| add(&g.failed, 1));
}

/// A record of a VM that is gone was taken over.
pub fn adopted() {
    GATHERED.with(|g| add(&g.adopted, 1));
}

/// A request was ended before its end.
pub fn ended(code: &'static str) {
    GATHERED.with(|g| *g.ended.borrow_mut().entry(code).or_default() += 1);
}

/// The policy service is asked for news, or could not be.
pub fn polled(sent: bool) {
    GATHERED.with(|g| add(&g.polls, 1));
    if !sent {
        poll_failed();
    }
}

pub fn poll_failed() {
    GATHERED.with(|g| add(&g.polls_failed, 1));
}

/// This VM asks for news from now on.
pub fn took_over() {
    GATHERED.with(|g| add(&g.takeovers, 1));
}

/// Milliseconds since the policy service last answered a question for news.
pub fn silent_for(ms: u64) {
    if let Some(id) = id(Metric::Gauge, "keyward_watch_silence_milliseconds") {
        host::record_metric(id, ms);
    }
}

/// Records that wait in all VMs of the process, as far as they have been told.
pub fn pending() -> u64 {
    id(Metric::Gauge, PENDING).and_then(host::metric).unwrap_or(0)
}

/// Tells Envoy what has gathered, and what this VM has open now. Called on every tick.
pub fn publish(load: Load, now_ms: u64) {
    GATHERED.with(|g| {
        if !g.started.replace(true) {
            start();
        }
        tell(Metric::Counter, "keyward_admitted_total", g.admitted.take());
        let refused = std::mem::take(&mut *g.refused.borrow_mut());
        tell(Metric::Counter, "keyward_refused_total", refused.values().sum());
        for (code, count) in refused {
            tell(Metric::Counter, &by_reason("refused", code), count);
        }
        let ended = std::mem::take(&mut *g.ended.borrow_mut());
        tell(Metric::Counter, "keyward_streams_ended_total", ended.values().sum());
        for (code, count) in ended {
            tell(Metric::Counter, &by_reason("streams_ended", code), count);
        }
        tell(Metric::Counter, "keyward_watch_polls_total", g.polls.take());
        tell(Metric::Counter, "keyward_watch_polls_failed_total", g.polls_failed.take());
        tell(Metric::Counter, "keyward_watch_takeovers_total", g.takeovers.take());
        if let Some(id) = id(Metric::Histogram, WAIT) {
            g.waits.borrow_mut().drain(..).for_each(|micros| host::record_metric(id, micros));
        }
        tell(Metric::Gauge, PENDING, g.pending.take());
        tell(Metric::Counter, "keyward_settlement_batches_failed_total", g.failed.take());
        tell(Metric::Counter, "keyward_settlements_adopted_total", g.adopted.take());
        let change = g.loads.borrow_mut().change(load, now_ms);
        tell(Metric::Gauge, "keyward_streams_open", change.streams);
        tell(Metric::Gauge, "keyward_waiting_bytes", change.waiting);
        tell(Metric::Gauge, "keyward_held_bytes", change.held);
    });
}

/// Counts this VM's start, and makes every metric without a label visible before anything happens: a counter that begins
/// at one would look as if nothing had happened.
fn start() {
    use keyward_core::metrics::{FILTER, Kind};
    for metric in FILTER.iter().filter(|metric| metric.labels.is_empty()) {
        let kind = match metric.kind {
            Kind::Counter => Metric::Counter,
            Kind::Gauge => Metric::Gauge,
            Kind::Histogram => Metric::Histogram,
        };
        id(kind, metric.name);
    }
    for code in Code::ALL {
        id(Metric::Counter, &by_reason("refused", code.name()));
    }
    for code in ENDS {
        id(Metric::Counter, &by_reason("streams_ended", code.name()));
    }
    tell(Metric::Counter, "keyward_vm_starts_total", 1);
}

/// Envoy's stats tag takes the middle part out and makes a label of it; without one the name still tells.
fn by_reason(what: &str, code: &str) -> String {
    format!("keyward_{what}_by_reason.{code}.total")
}

fn tell(kind: Metric, name: &str, offset: i64) {
    if let (offset @ (..=-1 | 1..), Some(id)) = (offset, id(kind, name)) {
        host::add_to_metric(id, offset);
    }
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
