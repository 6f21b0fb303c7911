//! The table of states in shared data.

use crate::ring::SharedData;
use crate::verdict::State;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Where the table stands in shared data.
pub const TABLE: &[u8] = b"keyward/keyring/1/table";
/// Longer names stand as their hash: a model's name is the caller's.
pub const LONGEST_NAME: usize = 200;
/// States that are kept; beyond, those that end first go.
const MAX_ENTRIES: usize = 512;
/// How long a probe has the credential for itself.
pub const PROBE_MS: u64 = 2_000;
/// A guess that is over stands this long: until then the first who uses the credential does so alone.
const REMEMBERED_MS: u64 = 60_000;
/// Tries of a compare-and-swap. Every loss is another's success, so this many in a row don't happen.
const MAX_TRIES: usize = 64;
/// Writes only what is not there yet.
const ABSENT: u32 = u32::MAX;

/// One state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    #[serde(rename = "s")]
    pub state: State,
    /// Until when; monotonic milliseconds of the process.
    #[serde(rename = "u")]
    pub until_ms: u64,
    /// The end is a guess: one request probes it.
    #[serde(rename = "p", default, skip_serializing_if = "std::ops::Not::not")]
    pub probe: bool,
    /// When it was found out.
    #[serde(rename = "b")]
    pub since_ms: u64,
}

impl Entry {
    /// The state that stands when `newer` comes to this one: the worse of two that last; of equal ones the longer.
    fn and(self, newer: Entry, now_ms: u64) -> Entry {
        let lasts = self.until_ms > now_ms;
        if !lasts || newer.state > self.state {
            return newer;
        }
        if newer.state < self.state || newer.until_ms <= self.until_ms {
            return Entry { since_ms: newer.since_ms, ..self };
        }
        newer
    }

    fn is_forgotten(&self, now_ms: u64) -> bool {
        self.until_ms.saturating_add(if self.probe { REMEMBERED_MS } else { 0 }) <= now_ms
    }
}

/// A name that is short enough to stand in the table.
pub fn fitting(name: String) -> String {
    if name.len() <= LONGEST_NAME {
        return name;
    }
    let kind: String = name.chars().take(2).collect();
    format!("{kind}{}", crate::hex::encode(&Sha256::digest(name.as_bytes())))
}

/// The table as this VM last saw it.
#[derive(Debug, Default)]
pub struct Table {
    entries: BTreeMap<String, Entry>,
    version: Option<u32>,
}

impl Table {
    pub fn refresh(&mut self, shared: &impl SharedData) {
        let Some((value, version)) = shared.read(TABLE) else {
            self.entries.clear();
            self.version = None;
            return;
        };
        if self.version != Some(version) {
            self.entries = serde_json::from_slice(&value).unwrap_or_default();
            self.version = Some(version);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// Adds a state to what is known.
    pub fn add(&mut self, shared: &impl SharedData, name: &str, entry: Entry, now_ms: u64) {
        self.change(shared, now_ms, |entries| {
            let stands = entries.get(name).map_or(entry, |known| known.and(entry, now_ms));
            entries.insert(name.to_owned(), stands) != Some(stands)
        });
    }

    /// Takes a state away that was found out before `before_ms`. `false`: there is none.
    pub fn remove(&mut self, shared: &impl SharedData, name: &str, before_ms: u64, now_ms: u64) -> bool {
        self.change(shared, now_ms, |entries| {
            let old = entries.get(name).is_some_and(|entry| entry.since_ms <= before_ms);
            old && entries.remove(name).is_some()
        })
    }

    /// Whether what stands under this name lets this request pass now. If it is a guess that is over, only one may, for a while.
    pub fn lease(&mut self, shared: &impl SharedData, name: &str, now_ms: u64) -> bool {
        if self.get(name).is_none_or(|entry| entry.until_ms <= now_ms && !entry.probe) {
            return true;
        }
        self.change(shared, now_ms, |entries| {
            let Some(entry) = entries.get_mut(name).filter(|entry| entry.until_ms <= now_ms) else { return false };
            entry.until_ms = now_ms + PROBE_MS;
            true
        })
    }

    /// Changes the table by compare-and-swap; `change` says whether it did anything. Returns what it said of the table that was
    /// written. What can't be written (shared data that is gone) is known to this VM alone.
    fn change(&mut self, shared: &impl SharedData, now_ms: u64, change: impl Fn(&mut BTreeMap<String, Entry>) -> bool) -> bool {
        for _ in 0..MAX_TRIES {
            let (mut entries, version): (BTreeMap<String, Entry>, u32) = match shared.read(TABLE) {
                Some((value, version)) => (serde_json::from_slice(&value).unwrap_or_default(), version),
                None => (BTreeMap::new(), ABSENT),
            };
            if !change(&mut entries) {
                (self.entries, self.version) = (entries, Some(version));
                return false;
            }
            entries.retain(|_, entry| !entry.is_forgotten(now_ms));
            while entries.len() > MAX_ENTRIES {
                let first = entries.iter().min_by_key(|(_, entry)| entry.until_ms).map(|(name, _)| name.clone());
                first.map(|name| entries.remove(&name));
            }
            let value = serde_json::to_vec(&entries).unwrap_or_default();
            if shared.write(TABLE, &value, version) {
                // The version of what was written is not told: the next look reads it anew.
                (self.entries, self.version) = (entries, None);
                return true;
            }
        }
        change(&mut self.entries)
    }
}
