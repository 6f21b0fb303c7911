//! The ring of slots in shared data where records of ended requests wait, so that they outlive a trap of their VM.
//!
//! A slot holds nothing, `MILLIS|record`, or `MILLIS|`: kept by the VM that used it last, empty for now. A VM writes into a slot
//! that it keeps without looking; whatever else is written is written by compare-and-swap. What keeps two VMs from believing
//! that a slot is theirs are the times below: each side stops long before the other begins. Should they meet all the same (a
//! thread that stood still for seconds between two instructions), a record loses its protection against a trap, never itself:
//! it is in its VM's memory as well.

use crate::hex;
use std::collections::VecDeque;

/// A full ring loses nothing but the protection against a trap.
const SLOTS: u16 = 2048;
/// Slots that are tried before a record goes without one.
const PROBES: u16 = 8;
/// Slots that a VM keeps for its next records.
const MAX_KEPT: usize = 256;
/// A kept slot is used again within this time or given up.
const KEEP_MS: u64 = 1_000;
/// After this time a kept slot is free for all: its VM has given it up, or is gone.
const ABANDONED_MS: u64 = 6_000;
/// How long a record must lie in the ring before another VM sends it.
const ORPHAN_AGE_MS: u64 = 3_000;
/// A record of this age was taken over by nobody.
const YOUNG_MS: u64 = 1_000;
/// Slots that are looked at for orphans in one go.
const SCAN: u16 = 256;
/// No value has this version: writing with it succeeds only where nothing stands.
const ABSENT: u32 = u32::MAX;

/// Shared data of the process, as Envoy has it.
pub trait SharedData {
    /// A value and its version.
    fn read(&self, key: &[u8]) -> Option<(Vec<u8>, u32)>;
    /// Writes if the version is still `version` or nothing stands there; 0: in any case. `false`: not written.
    fn write(&self, key: &[u8], value: &[u8], version: u32) -> bool;
}

/// A record as it lies in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    value: Vec<u8>,
    line_at: usize,
    since_ms: u64,
}

impl Stored {
    /// `append_line` writes the record's line.
    pub fn new(now_ms: u64, append_line: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut value = Vec::with_capacity(512);
        value.extend_from_slice(kept_since(now_ms).as_bytes());
        let line_at = value.len();
        append_line(&mut value);
        Stored { value, line_at, since_ms: now_ms }
    }

    fn parse(value: Vec<u8>) -> Option<Self> {
        let bar = value.iter().position(|&b| b == b'|')?;
        let since_ms = std::str::from_utf8(value.get(..bar)?).ok()?.parse().ok()?;
        Some(Stored { value, line_at: bar + 1, since_ms })
    }

    /// The record's line; empty for a slot that is only kept.
    pub fn line(&self) -> &[u8] {
        self.value.get(self.line_at..).unwrap_or_default()
    }
}

fn kept_since(now_ms: u64) -> String {
    format!("{now_ms}|")
}

/// The number of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u16);

impl Slot {
    fn key(self) -> [u8; 19] {
        let [high, low] = self.0.to_be_bytes().map(hex::digits);
        let mut key = *b"keyward/settle/0000";
        if let Some(number) = key.last_chunk_mut() {
            *number = [high[0], high[1], low[0], low[1]];
        }
        key
    }
}

/// One VM's part in the ring.
#[derive(Debug, Default)]
pub struct Ring {
    /// Slots to use again, with the time of their last use, newest last.
    kept: VecDeque<(Slot, u64)>,
    scan_from: u16,
}

impl Ring {
    /// Puts a record of this VM into a slot. `near`: a number at random, so that VMs don't crowd.
    pub fn claim(&mut self, shared: &impl SharedData, record: &Stored, near: u16, now_ms: u64) -> Option<Slot> {
        if let Some((slot, since_ms)) = self.kept.pop_back() {
            if now_ms.abs_diff(since_ms) <= KEEP_MS {
                return shared.write(&slot.key(), &record.value, 0).then_some(slot);
            }
            // All others are older.
            self.kept.clear();
        }
        (0..PROBES).map(|n| Slot(near.wrapping_add(n) % SLOTS)).find(|slot| {
            let key = slot.key();
            match shared.read(&key) {
                None => shared.write(&key, &record.value, ABSENT),
                Some((held, version)) => is_free(held, now_ms) && shared.write(&key, &record.value, version),
            }
        })
    }

    /// A record of this VM is settled: the slot is free for the next. `false`: another VM has taken the record over and seen to it.
    pub fn release_own(&mut self, shared: &impl SharedData, slot: Slot, record: &Stored, now_ms: u64) -> bool {
        if now_ms.abs_diff(record.since_ms) > YOUNG_MS {
            return self.release_orphan(shared, slot, record);
        }
        while self.kept.front().is_some_and(|(_, since_ms)| now_ms.abs_diff(*since_ms) > KEEP_MS) {
            self.kept.pop_front();
        }
        let keep = self.kept.len() < MAX_KEPT;
        let value = if keep { kept_since(now_ms) } else { String::new() };
        if shared.write(&slot.key(), value.as_bytes(), 0) && keep {
            self.kept.push_back((slot, now_ms));
        }
        true
    }

    /// A record that this VM found in the ring is settled. `false`: somebody else has seen to it.
    pub fn release_orphan(&mut self, shared: &impl SharedData, slot: Slot, record: &Stored) -> bool {
        let key = slot.key();
        shared.read(&key).is_some_and(|(value, version)| value == record.value && shared.write(&key, b"", version))
    }

    /// What lies in the next part of the ring for so long that nobody seems to send it.
    pub fn orphans(&mut self, shared: &impl SharedData, now_ms: u64) -> Vec<(Slot, Stored)> {
        let from = self.scan_from;
        self.scan_from = (from + SCAN) % SLOTS;
        let stored = |slot: Slot| Some((slot, Stored::parse(shared.read(&slot.key())?.0)?));
        let old = |record: &Stored| !record.line().is_empty() && record.since_ms.saturating_add(ORPHAN_AGE_MS) < now_ms;
        (from..from + SCAN).map(Slot).filter_map(stored).filter(|(_, record)| old(record)).collect()
    }
}

/// Whether anybody may take a slot in which this stands.
fn is_free(held: Vec<u8>, now_ms: u64) -> bool {
    held.is_empty() || Stored::parse(held).is_some_and(|kept| kept.line().is_empty() && now_ms.abs_diff(kept.since_ms) > ABANDONED_MS)
}

#[cfg(test)]
pub(crate) mod shared {
    use super::SharedData;
    use std::cell::{Cell, RefCell};
    use std::collections::HashMap;

    type Meanwhile = Box<dyn FnOnce(&Shared)>;
    type Versioned = (Vec<u8>, u32);

    /// Shared data with Envoy's rules. `meanwhile` runs once, right after the next reading.
    #[derive(Default)]
    pub(crate) struct Shared {
        pub values: RefCell<HashMap<Vec<u8>, Versioned>>,
        pub versions: Cell<u32>,
        pub meanwhile: RefCell<Option<Meanwhile>>,
    }

    impl SharedData for Shared {
        fn read(&self, key: &[u8]) -> Option<(Vec<u8>, u32)> {
            let found = self.values.borrow().get(key).cloned();
            if let Some(meanwhile) = self.meanwhile.take() {
                meanwhile(self);
            }
            found
        }

        fn write(&self, key: &[u8], value: &[u8], version: u32) -> bool {
            let mut values = self.values.borrow_mut();
            if version != 0 && values.get(key).is_some_and(|(_, now)| *now != version) {
                return false;
            }
            self.versions.set(self.versions.get() + 1);
            values.insert(key.to_vec(), (value.to_vec(), self.versions.get()));
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shared::Shared;
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, HashMap, HashSet};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    impl Shared {
        fn holds(&self, slot: Slot, record: &Stored) -> bool {
            self.values.borrow().get(slot.key().as_slice()).is_some_and(|(value, _)| *value == record.value)
        }
    }

    fn record(name: impl std::fmt::Display, now_ms: u64) -> Stored {
        Stored::new(now_ms, |out| out.extend_from_slice(format!("KS1 {name}").as_bytes()))
    }

    const NOW: u64 = 1_800_000_000_000;

    #[test]
    fn a_kept_slot_is_written_without_looking() {
        let (shared, mut ring) = (Shared::default(), Ring::default());
        let first = record(1, NOW);
        let slot = ring.claim(&shared, &first, 7, NOW).unwrap();
        assert_eq!((slot.key().as_slice(), shared.holds(slot, &first)), (b"keyward/settle/0007".as_slice(), true));
        *shared.meanwhile.borrow_mut() = Some(Box::new(|_| panic!("it was read")));
        assert!(ring.release_own(&shared, slot, &first, NOW + 50));
        let second = record(2, NOW + 60);
        assert_eq!(ring.claim(&shared, &second, 99, NOW + 60), Some(slot));
        assert!(shared.holds(slot, &second));
    }

    #[test]
    fn of_two_vms_at_one_slot_one_goes_on_to_the_next() {
        let kept = |shared: &Shared| {
            let mut gone = Ring::default();
            let old = record("old", NOW - 9_000);
            let slot = gone.claim(shared, &old, 0, NOW - 9_000).unwrap();
            assert!(gone.release_own(shared, slot, &old, NOW - 9_000));
        };
        let emptied = |shared: &Shared| assert!(shared.write(&Slot(0).key(), b"", 0));
        let absent = |_: &Shared| {};
        for before in [&absent as &dyn Fn(&Shared), &emptied, &kept] {
            let shared = Shared::default();
            before(&shared);
            let theirs = record("theirs", NOW);
            let copy = theirs.clone();
            *shared.meanwhile.borrow_mut() =
                Some(Box::new(move |shared| assert_eq!(Ring::default().claim(shared, &copy, 0, NOW), Some(Slot(0)))));
            let ours = record("ours", NOW);
            assert_eq!(Ring::default().claim(&shared, &ours, 0, NOW), Some(Slot(1)));
            assert!(shared.holds(Slot(0), &theirs) && shared.holds(Slot(1), &ours));
        }
    }

    #[test]
    fn a_full_neighbourhood_is_left_alone() {
        let shared = Shared::default();
        let mut others: Vec<Ring> = (0..PROBES).map(|_| Ring::default()).collect();
        let records: Vec<Stored> = (0..PROBES).map(|n| record(n, NOW)).collect();
        let slots: Vec<Slot> =
            others.iter_mut().zip(&records).map(|(ring, record)| ring.claim(&shared, record, 2_044, NOW).unwrap()).collect();
        assert_eq!(slots.iter().collect::<HashSet<_>>().len(), 8);
        assert_eq!(Ring::default().claim(&shared, &record("late", NOW), 2_044, NOW), None);
        assert!(slots.iter().zip(&records).all(|(slot, record)| shared.holds(*slot, record)));
    }

    #[test]
    fn a_round_of_scans_sees_every_slot() {
        let (shared, mut dead, mut other) = (Shared::default(), Ring::default(), Ring::default());
        let near = [0, 255, 256, 1_000, 2_047];
        let slots: HashSet<Slot> = near.iter().map(|&near| dead.claim(&shared, &record(near, NOW), near, NOW).unwrap()).collect();
        let rounds = |ring: &mut Ring, now| -> Vec<Slot> {
            (0..SLOTS / SCAN).flat_map(|_| ring.orphans(&shared, now)).map(|(slot, _)| slot).collect()
        };
        assert_eq!(rounds(&mut other, NOW + ORPHAN_AGE_MS), []);
        let found = rounds(&mut other, NOW + ORPHAN_AGE_MS + 1);
        assert_eq!((found.len(), found.into_iter().collect::<HashSet<_>>()), (5, slots));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Push(usize, u16),
        /// The oldest records of a VM are acknowledged.
        Settle(usize, usize),
        Trap(usize),
        /// A VM looks for orphans, sends them, and they are acknowledged.
        Adopt(usize),
        Wait(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0usize..3, 0u16..6).prop_map(|(vm, near)| Step::Push(vm, near)),
            4 => (0usize..3, 1usize..5).prop_map(|(vm, n)| Step::Settle(vm, n)),
            1 => (0usize..3).prop_map(Step::Trap),
            1 => (0usize..3).prop_map(Step::Adopt),
            4 => proptest::sample::select(vec![1u64, 50, 900, 1_100, 2_500, 3_100, 5_500, 7_000]).prop_map(Step::Wait),
        ];
        proptest::collection::vec(step, 0..80)
    }

    #[derive(Default)]
    struct VmModel {
        ring: Ring,
        waiting: Vec<(Option<Slot>, Stored)>,
    }

    proptest! {
        /// However VMs push, settle, trap and adopt: a record that got a slot lies in it until it is settled, and every record is
        /// seen to exactly once, by its own VM or by another.
        #[test]
        fn every_record_stays_until_it_is_settled_once(steps in steps()) {
            let (shared, mut now) = (Shared::default(), NOW);
            let mut vms: [VmModel; 3] = Default::default();
            let mut orphaned: BTreeMap<u16, Stored> = BTreeMap::new();
            let mut seen_to: HashMap<Vec<u8>, u32> = HashMap::new();
            let mut pushed = 0u32;
            for step in steps {
                match step {
                    Step::Push(vm, near) => {
                        pushed += 1;
                        let record = record(pushed, now);
                        let slot = vms[vm].ring.claim(&shared, &record, near, now);
                        vms[vm].waiting.push((slot, record));
                    }
                    Step::Settle(vm, n) => {
                        let vm = &mut vms[vm];
                        for (slot, record) in vm.waiting.drain(..n.min(vm.waiting.len())) {
                            let first = slot.is_none_or(|slot| vm.ring.release_own(&shared, slot, &record, now));
                            *seen_to.entry(record.line().to_vec()).or_default() += u32::from(first);
                            prop_assert_eq!(seen_to[record.line()], 1);
                        }
                    }
                    Step::Trap(vm) => {
                        let lost = std::mem::take(&mut vms[vm]);
                        orphaned.extend(lost.waiting.into_iter().filter_map(|(slot, record)| Some((slot?.0, record))));
                    }
                    Step::Adopt(vm) => {
                        let ring = &mut vms[vm].ring;
                        let found: Vec<_> = (0..SLOTS / SCAN).flat_map(|_| ring.orphans(&shared, now)).collect();
                        for (slot, record) in found {
                            let first = ring.release_orphan(&shared, slot, &record);
                            *seen_to.entry(record.line().to_vec()).or_default() += u32::from(first);
                        }
                    }
                    Step::Wait(ms) => now += ms,
                }
                orphaned.retain(|_, record| !seen_to.contains_key(record.line()));
                let waiting = vms.iter().flat_map(|vm| &vm.waiting).filter_map(|(slot, record)| Some(((*slot)?, record)));
                for (slot, record) in waiting.chain(orphaned.iter().map(|(slot, record)| (Slot(*slot), record))) {
                    prop_assert!(seen_to.contains_key(record.line()) || shared.holds(slot, record), "{record:?} is not in {slot:?}");
                }
            }
            // Long after, whoever is left finds all that the dead left behind.
            now += 10_000;
            let ring = &mut vms[0].ring;
            let found: HashSet<Vec<u8>> = (0..SLOTS / SCAN).flat_map(|_| ring.orphans(&shared, now)).map(|(_, record)| record.line().to_vec()).collect();
            prop_assert!(orphaned.values().all(|record| found.contains(record.line())));
            prop_assert!(seen_to.values().all(|n| *n == 1));
        }
    }
}
