//! Records of ended requests on their way to the policy service: at least once, in batches, from the root context.
//!
//! A record waits in two places: in this VM, and in a ring of shared data that outlives a trap of the VM. What a trapped
//! VM left in the ring, any other VM sends. The service takes each request's first record and ignores repetitions.

use crate::{host, metrics};
use keyward_core::edge::{EdgeChain, EdgeKey, Record, SETTLE_PATH, SettleAnswer, Settlement, VmId};
use keyward_core::hex;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// Slots of the ring. A full ring loses nothing but the protection against a trap.
const SLOTS: u64 = 1024;
/// Slots that are tried before a record goes without one.
const PROBES: u64 = 8;
const MAX_BATCH: usize = 256;
/// Records that wait before nothing more is asked: about 10 MiB of the VM.
const MAX_OUTBOX: usize = 16_384;
/// How long a record of another VM must lie in the ring before somebody else sends it.
const ORPHAN_AGE_MS: u64 = 3_000;
const ORPHAN_SCAN_MS: u64 = 5_000;
/// Longest time that a count of refusals waits for a batch to go with.
const REPORT_MS: u64 = 15_000;
const MAX_BACKOFF_MS: u64 = 5_000;
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
struct Pending {
    line: String,
    /// The ring's slot that holds a copy.
    slot: Option<u64>,
}

/// A batch that awaits its answer.
#[derive(Debug)]
struct Sent {
    token: u32,
    batch: Vec<Pending>,
    refusals: BTreeMap<&'static str, u64>,
}

/// This VM's outbox.
#[derive(Debug, Default)]
pub struct Settlements {
    chain: Option<EdgeChain>,
    /// Ended before the VM had a key to seal with.
    unsealed: Vec<Settlement>,
    queue: VecDeque<Pending>,
    sent: Option<Sent>,
    /// Refusals that were decided without asking, by code, since the last report.
    refusals: BTreeMap<&'static str, u64>,
    report_at_ms: u64,
    retry_at_ms: u64,
    failures: u32,
    scan_at_ms: u64,
}

impl Settlements {
    /// The service has not taken records for so long that no more can be kept.
    pub fn is_full(&self) -> bool {
        self.queue.len() + self.unsealed.len() >= MAX_OUTBOX
    }

    pub fn needs_key(&self) -> bool {
        self.chain.is_none()
    }

    pub fn has_key(&mut self, vm: VmId, key: EdgeKey) {
        if self.chain.is_none() {
            self.chain = EdgeChain::new(vm, &key);
            for settlement in std::mem::take(&mut self.unsealed) {
                self.seal(&settlement, host::now_ms());
            }
        }
    }

    /// Counts a refusal that the service does not know of. It is told with the next batch, or after a while by itself.
    pub fn count_refusal(&mut self, code: &'static str, now_ms: u64) {
        if self.refusals.is_empty() {
            self.report_at_ms = now_ms + REPORT_MS;
        }
        *self.refusals.entry(code).or_default() += 1;
    }

    /// Puts the record of an ended request into the outbox. Returns its line, for the access log.
    pub fn push(&mut self, settlement: Settlement, now_ms: u64) -> Option<String> {
        metrics::pending_grew();
        let line = self.seal(&settlement, now_ms);
        if line.is_none() {
            self.unsealed.push(settlement);
        }
        line
    }

    fn seal(&mut self, settlement: &Settlement, now_ms: u64) -> Option<String> {
        let record = self.chain.as_mut()?.seal(settlement);
        let line = record.line();
        let slot = claim_slot(&record, &line, now_ms);
        self.queue.push_back(Pending { line: line.clone(), slot });
        Some(line)
    }

    /// Sends what waits, unless a batch is on its way. Called on every tick of the gate's root context.
    pub fn flush(&mut self, vm: VmId, cluster: &str, now_ms: u64) {
        if self.sent.is_some() || now_ms < self.retry_at_ms {
            return;
        }
        // Only while the service takes records: otherwise they would only pile up here.
        if self.failures == 0 && now_ms >= self.scan_at_ms {
            self.scan_at_ms = now_ms + ORPHAN_SCAN_MS;
            self.adopt_orphans(vm, now_ms);
        }
        let report_due = !self.refusals.is_empty() && now_ms >= self.report_at_ms;
        if self.queue.is_empty() && self.unsealed.is_empty() && !report_due {
            return;
        }
        let batch: Vec<Pending> = self.queue.drain(..self.queue.len().min(MAX_BATCH)).collect();
        let refusals = std::mem::take(&mut self.refusals);
        let body = self.batch_body(vm, &batch, &refusals);
        let headers = vec![(":method", "POST"), (":path", SETTLE_PATH), (":authority", "keyward-policy"), ("content-type", "text/plain")];
        match host::call(cluster, headers, body.as_bytes(), TIMEOUT) {
            Some(token) => self.sent = Some(Sent { token, batch, refusals }),
            None => self.failed(batch, refusals, now_ms),
        }
    }

    /// `KB1 vm need_key refusals-json`, then one record a line.
    fn batch_body(&self, vm: VmId, batch: &[Pending], refusals: &BTreeMap<&'static str, u64>) -> String {
        let refusals = serde_json::to_string(refusals).unwrap_or_default();
        let mut body = format!("KB1 {} {} {refusals}\n", hex::encode(&vm.0), u8::from(self.needs_key()));
        for pending in batch {
            body.push_str(&pending.line);
            body.push('\n');
        }
        body
    }

    /// The answer to a batch: `None` when there was none.
    pub fn answered(&mut self, vm: VmId, token: u32, answer: Option<SettleAnswer>, now_ms: u64) {
        let Some(Sent { batch, refusals, .. }) = self.sent.take_if(|sent| sent.token == token) else { return };
        let Some(answer) = answer else { return self.failed(batch, refusals, now_ms) };
        self.failures = 0;
        // A record that two VMs sent counts once: for whoever still finds it in the ring.
        let settled = batch.iter().filter(|pending| pending.slot.is_none_or(|slot| release_slot(slot, &pending.line)));
        metrics::pending_shrank(settled.count());
        if let Some(key) = answer.edge_key {
            self.has_key(vm, key);
        }
    }

    fn failed(&mut self, batch: Vec<Pending>, refusals: BTreeMap<&'static str, u64>, now_ms: u64) {
        for (code, count) in refusals {
            *self.refusals.entry(code).or_default() += count;
        }
        self.failures = self.failures.saturating_add(1);
        metrics::batch_failed();
        let wait = 100u64.saturating_mul(1 << self.failures.min(6));
        self.retry_at_ms = now_ms + wait.min(MAX_BACKOFF_MS);
        for pending in batch.into_iter().rev() {
            self.queue.push_front(pending);
        }
    }

    /// Takes over what other VMs left in the ring and nobody has sent for a while.
    fn adopt_orphans(&mut self, vm: VmId, now_ms: u64) {
        let own = (self.queue.len() + self.unsealed.len()) as u64;
        if metrics::pending() <= own {
            return;
        }
        for slot in 0..SLOTS {
            let Some((value, _)) = host::shared(&slot_key(slot)) else { continue };
            let Some((since, line)) = std::str::from_utf8(&value).ok().and_then(|v| v.split_once('|')) else { continue };
            let old = since.parse::<u64>().is_ok_and(|at| at + ORPHAN_AGE_MS < now_ms);
            let foreign = Record::parse(line).is_some_and(|record| record.vm != vm);
            let queued = self.queue.iter().any(|pending| pending.slot == Some(slot));
            if old && foreign && !queued {
                metrics::adopted();
                self.queue.push_back(Pending { line: line.to_owned(), slot: Some(slot) });
            }
        }
    }
}

fn slot_key(slot: u64) -> String {
    format!("keyward/settle/{slot}")
}

/// Finds an empty slot near a place that the record's MAC names, so that VMs don't crowd.
fn claim_slot(record: &Record, line: &str, now_ms: u64) -> Option<u64> {
    let start = record.mac.iter().take(4).fold(0u64, |n, &b| n << 8 | u64::from(b));
    let value = format!("{now_ms}|{line}");
    (start..start + PROBES).map(|n| n % SLOTS).find(|&slot| {
        let key = slot_key(slot);
        match host::shared(&key) {
            None => host::set_shared(&key, value.as_bytes(), 0),
            Some((held, cas)) => held.is_empty() && host::set_shared(&key, value.as_bytes(), cas),
        }
    })
}

/// Empties a slot; `false` when somebody else did.
fn release_slot(slot: u64, line: &str) -> bool {
    let key = slot_key(slot);
    host::shared(&key).is_some_and(|(value, cas)| value.ends_with(line.as_bytes()) && host::set_shared(&key, b"", cas))
}
