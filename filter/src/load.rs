//! How much the VMs of the process have open, as gauges that stay true when a VM traps: each VM keeps what it has added
//! to the gauges in a slot of shared data as well, and what a VM left there that is gone, another takes out again.

use crate::host;

/// Slots: more than any Envoy has workers. A VM without one only makes no amends when it traps.
const SLOTS: u32 = 128;
/// How often a VM with something open shows that it is alive.
const BEAT_MS: u64 = 1_000;
/// A slot that did not change for so long is a dead VM's.
const DEAD_MS: u64 = 5_000;
const SCAN_MS: u64 = 2_500;
/// A version that no value has: writes only what is not there yet.
const ABSENT: u32 = u32::MAX;

/// What a VM has open, or by how much that changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    pub streams: i64,
    /// Bytes of bodies that wait for their admission.
    pub waiting: i64,
    /// Bytes of answers that are held back.
    pub held: i64,
}

impl Load {
    fn minus(self, other: Load) -> Load {
        Load { streams: self.streams - other.streams, waiting: self.waiting - other.waiting, held: self.held - other.held }
    }

    /// `ms streams waiting held`
    fn parse(slot: &[u8]) -> Option<(u64, Load)> {
        let mut parts = std::str::from_utf8(slot).ok()?.split(' ');
        let at = parts.next()?.parse().ok()?;
        let mut number = || parts.next()?.parse().ok();
        Some((at, Load { streams: number()?, waiting: number()?, held: number()? }))
    }
}

/// One VM's part in it.
#[derive(Debug, Default)]
pub struct Loads {
    /// What the gauges have of this VM.
    told: Load,
    told_ms: u64,
    slot: Option<u32>,
    scan_ms: u64,
}

impl Loads {
    /// By how much the gauges must change for this VM to count with `now`.
    pub fn change(&mut self, now: Load, now_ms: u64) -> Load {
        let mut change = Load::default();
        if now_ms >= self.scan_ms {
            self.scan_ms = now_ms + SCAN_MS;
            change = bury_dead(self.slot, now_ms);
        }
        let idle = now == self.told && (now == Load::default() || now_ms < self.told_ms + BEAT_MS);
        if idle {
            return change;
        }
        if self.slot.is_some_and(|slot| !self.write(slot, now, now_ms)) {
            // This VM stood still for so long that another took it for dead, and its load out of the gauges.
            (self.slot, self.told) = (None, Load::default());
        }
        if self.slot.is_none() {
            self.slot = (0..SLOTS).find(|&slot| self.write(slot, now, now_ms));
        }
        let own = now.minus(self.told);
        (self.told, self.told_ms) = (now, now_ms);
        if now == Load::default() {
            self.slot = None;
        }
        change.minus(Load::default().minus(own))
    }

    /// Writes a slot that is this VM's, or free. A VM with nothing open has none.
    fn write(&self, slot: u32, now: Load, now_ms: u64) -> bool {
        let name = name(slot);
        let value = if now == Load::default() { String::new() } else { format!("{now_ms} {} {} {}", now.streams, now.waiting, now.held) };
        match host::shared(name.as_bytes()) {
            None => host::set_shared(name.as_bytes(), value.as_bytes(), ABSENT),
            Some((held, cas)) => {
                let ours = match Load::parse(&held) {
                    None => self.slot.is_none(),
                    Some(found) => self.slot == Some(slot) && found == (self.told_ms, self.told),
                };
                ours && host::set_shared(name.as_bytes(), value.as_bytes(), cas)
            }
        }
    }
}

/// Empties the slots of VMs that are gone. Gives what they had open, to be taken out of the gauges.
fn bury_dead(own: Option<u32>, now_ms: u64) -> Load {
    let mut change = Load::default();
    for slot in (0..SLOTS).filter(|&slot| Some(slot) != own) {
        let name = name(slot);
        // Slots are taken from the first on: behind one that never was there is none.
        let Some((value, cas)) = host::shared(name.as_bytes()) else { break };
        let Some((at, load)) = Load::parse(&value) else { continue };
        if at + DEAD_MS < now_ms && host::set_shared(name.as_bytes(), b"", cas) {
            change = change.minus(load);
        }
    }
    change
}

fn name(slot: u32) -> String {
    format!("keyward/load/{slot}")
}
