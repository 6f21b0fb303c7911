//! Records of ended requests on their way to the policy service: at least once, in batches, from the root context.
//!
//! A record waits in two places: in this VM, and in a ring of shared data that outlives a trap of the VM. What a trapped
//! VM left in the ring, any other VM sends. The service takes each request's first record and ignores repetitions.

use crate::{host, metrics};
use keyward_core::edge::{EdgeChain, EdgeKey, News, Record, SETTLE_PATH, SettleAnswer, Settlement, VmId};
use keyward_core::hex;
use keyward_core::keyring::Keyring;
use keyward_core::ring::{Ring, SharedData, Slot, Stored};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

const MAX_BATCH: usize = 256;
/// Records that wait before nothing more is asked: about 10 MiB of the VM.
const MAX_OUTBOX: usize = 16_384;
/// How often a part of the ring is looked through for what other VMs left behind; all of it takes 5 s.
const ORPHAN_SCAN_MS: u64 = 600;
/// Longest time that a count of refusals waits for a batch to go with.
const REPORT_MS: u64 = 15_000;
/// How often the service is told what accounts have left.
const ROOMS_MS: u64 = 1_000;
const MAX_BACKOFF_MS: u64 = 5_000;
const TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
struct Pending {
    record: Stored,
    /// The ring's slot that holds a copy.
    slot: Option<Slot>,
    /// Another VM's record, found in the ring.
    adopted: bool,
}

/// A batch that awaits its answer.
#[derive(Debug)]
struct Sent {
    token: u32,
    batch: Vec<Pending>,
    news: News,
    /// The root context that made the callout.
    by: u32,
}

/// This VM's outbox.
#[derive(Debug, Default)]
pub struct Settlements {
    chain: Option<EdgeChain>,
    ring: Ring,
    /// Ended before the VM had a key to seal with.
    unsealed: Vec<Settlement>,
    queue: VecDeque<Pending>,
    sent: Option<Sent>,
    /// Refusals that were decided without asking, by code, since the last report.
    refusals: BTreeMap<String, u64>,
    report_at_ms: u64,
    retry_at_ms: u64,
    /// What waits is not to wait for the tick.
    urgent: bool,
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
        *self.refusals.entry(code.to_owned()).or_default() += 1;
    }

    /// Puts the record of an ended request into the outbox. Returns its line, for the access log.
    pub fn push(&mut self, settlement: Settlement, now_ms: u64) -> Option<&[u8]> {
        metrics::pending_grew();
        if !self.seal(&settlement, now_ms) {
            self.unsealed.push(settlement);
            return None;
        }
        self.queue.back().map(|pending| pending.record.line())
    }

    /// What waits is to go as soon as it can. `true`: the root context has to be woken for that; else it was already, or comes
    /// to it with the answer to the batch that is on its way.
    pub fn hurry(&mut self) -> bool {
        !std::mem::replace(&mut self.urgent, true) && self.sent.is_none()
    }

    pub fn is_urgent(&self) -> bool {
        self.urgent
    }

    /// `false` without a key.
    fn seal(&mut self, settlement: &Settlement, now_ms: u64) -> bool {
        let Some(chain) = &mut self.chain else { return false };
        let sealed = chain.seal(settlement);
        let record = Stored::new(now_ms, |out| sealed.append_line(out));
        // Slots are looked for near a place that the MAC names.
        let near = sealed.mac.first_chunk().map_or(0, |start| u16::from_be_bytes(*start));
        let slot = self.ring.claim(&ProcessData, &record, near, now_ms);
        self.queue.push_back(Pending { record, slot, adopted: false });
        true
    }

    /// Sends what waits, unless a batch is on its way. Called by the gate's root context: on every tick, and when somebody hurries.
    pub fn flush(&mut self, vm: VmId, root: u32, cluster: &str, ring: &mut Keyring, now_ms: u64) {
        if self.sent.is_some() || now_ms < self.retry_at_ms {
            return;
        }
        // Only while the service takes records: otherwise they would only pile up here.
        if self.failures == 0 && now_ms >= self.scan_at_ms {
            self.scan_at_ms = now_ms + ORPHAN_SCAN_MS;
            self.adopt_orphans(vm, now_ms);
        }
        let report_due = !self.refusals.is_empty() && now_ms >= self.report_at_ms;
        let mono_ms = host::monotonic_ms();
        let rooms = ring.rooms().report(ROOMS_MS, mono_ms);
        if self.queue.is_empty() && self.unsealed.is_empty() && !report_due && !ring.has_news() && rooms.is_empty() {
            self.urgent = false;
            return;
        }
        let batch: Vec<Pending> = self.queue.drain(..self.queue.len().min(MAX_BATCH)).collect();
        self.urgent &= !(self.queue.is_empty() && self.unsealed.is_empty());
        let news = News { refusals: std::mem::take(&mut self.refusals), cooled: ring.report(mono_ms), rooms };
        let body = self.batch_body(vm, &batch, &news);
        let headers = vec![(":method", "POST"), (":path", SETTLE_PATH), (":authority", "keyward-policy"), ("content-type", "text/plain")];
        match host::call(cluster, headers, &body, TIMEOUT) {
            Some(token) => self.sent = Some(Sent { token, batch, news, by: root }),
            None => self.failed(batch, news, ring, now_ms),
        }
    }

    /// `KB1 vm need_key news-json`, then one record a line.
    fn batch_body(&self, vm: VmId, batch: &[Pending], news: &News) -> Vec<u8> {
        let news = serde_json::to_string(news).unwrap_or_default();
        let head = format!("KB1 {} {} {news}\n", hex::encode(&vm.0), u8::from(self.needs_key()));
        let mut body = Vec::with_capacity(head.len() + batch.iter().map(|pending| pending.record.line().len() + 1).sum::<usize>());
        body.extend_from_slice(head.as_bytes());
        for pending in batch {
            body.extend_from_slice(pending.record.line());
            body.push(b'\n');
        }
        body
    }

    /// The answer to a batch: `None` when there was none.
    pub fn answered(&mut self, vm: VmId, token: u32, answer: Option<SettleAnswer>, ring: &mut Keyring, now_ms: u64) {
        let Some(Sent { batch, news, .. }) = self.sent.take_if(|sent| sent.token == token) else { return };
        let Some(answer) = answer else { return self.failed(batch, news, ring, now_ms) };
        self.failures = 0;
        // A record that two VMs sent counts once: for whoever still finds it in the ring.
        let release = |Pending { record, slot, adopted }: &Pending| match slot {
            None => true,
            Some(slot) if *adopted => self.ring.release_orphan(&ProcessData, *slot, record),
            Some(slot) => self.ring.release_own(&ProcessData, *slot, record, now_ms),
        };
        metrics::pending_shrank(batch.iter().map(release).filter(|settled| *settled).count());
        if let Some(key) = answer.edge_key {
            self.has_key(vm, key);
        }
    }

    /// A root context has ended: nothing will be heard of what it sent.
    pub fn is_left_by(&mut self, root: u32, ring: &mut Keyring, now_ms: u64) {
        if let Some(Sent { batch, news, .. }) = self.sent.take_if(|sent| sent.by == root) {
            self.failed(batch, news, ring, now_ms);
        }
    }

    /// What a VM has left is not sent again: the next answers tell it anew.
    fn failed(&mut self, batch: Vec<Pending>, news: News, ring: &mut Keyring, now_ms: u64) {
        for (code, count) in news.refusals {
            *self.refusals.entry(code).or_default() += count;
        }
        ring.not_reported(news.cooled, host::monotonic_ms());
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
        for (slot, record) in self.ring.orphans(&ProcessData, now_ms) {
            let foreign = std::str::from_utf8(record.line()).ok().and_then(Record::parse).is_some_and(|record| record.vm != vm);
            let queued = self.queue.iter().any(|pending| pending.slot == Some(slot));
            if foreign && !queued {
                metrics::adopted();
                self.queue.push_back(Pending { record, slot: Some(slot), adopted: true });
            }
        }
    }
}

/// What all VMs of the process share.
pub struct ProcessData;

impl SharedData for ProcessData {
    fn read(&self, key: &[u8]) -> Option<(Vec<u8>, u32)> {
        host::shared(key)
    }

    fn write(&self, key: &[u8], value: &[u8], version: u32) -> bool {
        host::set_shared(key, value, version)
    }
}
