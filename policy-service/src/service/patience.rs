//! How many admissions of one key may wait at a time: while they do, they hold calls of a gate.

use std::collections::HashMap;
use std::sync::Mutex;

/// More of one key are decided at once: it waits for its own settlements, and must not make others wait.
const MAX_WAITING: usize = 8;

type Key = [u8; 32];

#[derive(Debug, Default)]
pub(super) struct Patience {
    waiting: Mutex<HashMap<Key, usize>>,
}

/// The right to wait, until it is dropped.
#[derive(Debug)]
pub(super) struct Waits<'a> {
    of: &'a Patience,
    key: Key,
}

impl Patience {
    /// `None`: enough of this key wait already.
    pub(super) fn take(&self, key: Key) -> Option<Waits<'_>> {
        let mut waiting = self.waiting.lock().ok()?;
        let count = waiting.entry(key).or_default();
        if *count >= MAX_WAITING {
            return None;
        }
        *count += 1;
        Some(Waits { of: self, key })
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let Ok(mut waiting) = self.of.waiting.lock() else { return };
        if let Some(count) = waiting.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_its_places_and_leaves_nothing_behind() {
        let patience = Patience::default();
        let held: Vec<_> = (0..MAX_WAITING).map(|_| patience.take([1; 32]).unwrap()).collect();
        assert!(patience.take([1; 32]).is_none());
        assert!(patience.take([2; 32]).is_some(), "another key has its own");
        drop(held);
        assert!(patience.waiting.lock().unwrap().is_empty());
        assert!(patience.take([1; 32]).is_some());
    }
}
