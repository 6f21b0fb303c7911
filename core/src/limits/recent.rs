//! Requests and tokens of the last minute, for limits over any 60 seconds. Counted in slots of a fiftieth of a second: what
//! was counted leaves at the earliest 60 s after it came, at the latest a slot later.

use std::collections::VecDeque;

const SLOT_MS: u64 = 20;
const WINDOW_MS: u64 = 60_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Slots since the clock's zero.
    at: u64,
    requests: u64,
    tokens: u64,
}

/// What happened in the last minute. Times are of a clock that never goes back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recent {
    slots: VecDeque<Slot>,
    requests: u64,
    tokens: u64,
}

impl Recent {
    pub fn requests(&self) -> u64 {
        self.requests
    }

    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Forgets what is a minute old.
    pub fn advance(&mut self, now_ms: u64) {
        // What was too much to be summed can't be taken off again.
        let too_much = self.requests == u64::MAX || self.tokens == u64::MAX;
        while let Some(oldest) = self.slots.front().filter(|slot| leaves_ms(slot.at) <= now_ms) {
            self.requests = self.requests.saturating_sub(oldest.requests);
            self.tokens = self.tokens.saturating_sub(oldest.tokens);
            self.slots.pop_front();
        }
        if too_much {
            let sum = |of: fn(&Slot) -> u64| self.slots.iter().map(of).fold(0, u64::saturating_add);
            (self.requests, self.tokens) = (sum(|slot| slot.requests), sum(|slot| slot.tokens));
        }
    }

    pub fn add(&mut self, now_ms: u64, requests: u64, tokens: u64) {
        self.advance(now_ms);
        (self.requests, self.tokens) = (self.requests.saturating_add(requests), self.tokens.saturating_add(tokens));
        // A clock that went back all the same must not break the order.
        let at = (now_ms / SLOT_MS).max(self.slots.back().map_or(0, |last| last.at));
        match self.slots.back_mut().filter(|last| last.at == at) {
            Some(last) => (last.requests, last.tokens) = (last.requests.saturating_add(requests), last.tokens.saturating_add(tokens)),
            None => self.slots.push_back(Slot { at, requests, tokens }),
        }
    }

    /// Milliseconds until at most `requests` of the requests counted now are still counted.
    pub fn requests_fall_to(&self, requests: u64, now_ms: u64) -> u64 {
        self.falls_to(self.requests, requests, now_ms, |slot| slot.requests)
    }

    /// Milliseconds until at most `tokens` of the tokens counted now are still counted.
    pub fn tokens_fall_to(&self, tokens: u64, now_ms: u64) -> u64 {
        self.falls_to(self.tokens, tokens, now_ms, |slot| slot.tokens)
    }

    fn falls_to(&self, mut left: u64, least: u64, now_ms: u64, of: impl Fn(&Slot) -> u64) -> u64 {
        for slot in &self.slots {
            if left <= least {
                break;
            }
            left = left.saturating_sub(of(slot));
            if left <= least {
                return leaves_ms(slot.at).saturating_sub(now_ms);
            }
        }
        0
    }

    /// Milliseconds until nothing of now is counted.
    pub fn empty_in_ms(&self, now_ms: u64) -> u64 {
        self.slots.back().map_or(0, |last| leaves_ms(last.at).saturating_sub(now_ms))
    }

    /// For storing: each number in LEB128; times as differences.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (mut out, mut before) = (Vec::new(), 0);
        for slot in &self.slots {
            for number in [slot.at - before, slot.requests, slot.tokens] {
                put(number, &mut out);
            }
            before = slot.at;
        }
        out
    }

    /// What [`Self::to_bytes`] gave, read at `now_ms`. What lies ahead of a clock that was set back counts as of now.
    pub fn from_bytes(mut bytes: &[u8], now_ms: u64) -> Self {
        let (mut recent, mut at) = (Recent::default(), 0u64);
        while !bytes.is_empty() {
            let mut number = || take(&mut bytes);
            let (Some(after), Some(requests), Some(tokens)) = (number(), number(), number()) else { break };
            at = at.saturating_add(after);
            recent.add((at.saturating_mul(SLOT_MS)).min(now_ms), requests, tokens);
        }
        recent.advance(now_ms);
        recent
    }
}

/// When what came in a slot is a minute old for certain.
fn leaves_ms(at: u64) -> u64 {
    at.saturating_mul(SLOT_MS).saturating_add(SLOT_MS - 1 + WINDOW_MS)
}

fn put(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn take(bytes: &mut &[u8]) -> Option<u64> {
    let (mut number, mut shift) = (0u64, 0u32);
    loop {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
        shift += 7;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn it_is_told_when_there_is_room_again() {
        let mut recent = Recent::default();
        recent.add(1_000_000, 2, 30);
        recent.add(1_000_600, 1, 5);
        assert_eq!((recent.requests(), recent.tokens()), (3, 35));
        assert_eq!(recent.requests_fall_to(3, 1_001_000), 0);
        assert_eq!(recent.requests_fall_to(2, 1_001_000), 1_000_019 + 60_000 - 1_001_000);
        assert_eq!(recent.tokens_fall_to(4, 1_001_000), 1_000_619 + 60_000 - 1_001_000);
        recent.advance(1_000_019 + 60_000);
        assert_eq!((recent.requests(), recent.tokens()), (1, 5));
    }

    #[test]
    fn a_clock_that_went_back_frees_nothing() {
        let mut recent = Recent::default();
        recent.add(10_000_000, 5, 50);
        let reread = Recent::from_bytes(&recent.to_bytes(), 10_000_000 - 3_600_000);
        assert_eq!((reread.requests(), reread.tokens()), (5, 50));
        assert_eq!(reread.empty_in_ms(10_000_000 - 3_600_000), 60_019);
    }

    proptest! {
        /// Against a list of every single event: never fewer than in the exact window, never more than in one that is a slot longer.
        #[test]
        fn it_counts_every_window(steps in proptest::collection::vec((0u64..9_000, 0u64..4, 0u64..100), 1..200)) {
            let (mut recent, mut all, mut now) = (Recent::default(), Vec::new(), 5_000_000u64);
            for (wait, requests, tokens) in steps {
                now += wait;
                recent.add(now, requests, tokens);
                all.push((now, requests, tokens));
                let within = |ms: u64| all.iter().filter(|e| now - e.0 < ms).fold((0, 0), |sum, e| (sum.0 + e.1, sum.1 + e.2));
                let (exact, longer) = (within(WINDOW_MS), within(WINDOW_MS + SLOT_MS));
                prop_assert!(exact.0 <= recent.requests() && recent.requests() <= longer.0);
                prop_assert!(exact.1 <= recent.tokens() && recent.tokens() <= longer.1);
                prop_assert_eq!(&Recent::from_bytes(&recent.to_bytes(), now).to_bytes(), &recent.to_bytes());
                let wait = recent.requests_fall_to(recent.requests() / 2, now);
                let mut later = recent.clone();
                later.advance(now + wait);
                prop_assert!(later.requests() <= recent.requests() / 2);
            }
        }

        /// Damaged rows of the store: what is read of them is sound, whatever it says.
        #[test]
        fn any_bytes_are_read(
            numbers in proptest::collection::vec((0u64..3_000, any::<u64>(), any::<u64>()), 0..12),
            bytes in proptest::collection::vec(any::<u8>(), 0..60),
            now in prop_oneof![0u64..300_000, 0u64..1 << 50],
        ) {
            let mut all = Vec::new();
            numbers.iter().flat_map(|(after, requests, tokens)| [after, requests, tokens]).for_each(|number| put(*number, &mut all));
            all.extend(bytes);
            let recent = Recent::from_bytes(&all, now);
            let sum = |of: fn(&Slot) -> u64| recent.slots.iter().map(of).fold(0, u64::saturating_add);
            prop_assert_eq!((recent.requests(), recent.tokens()), (sum(|slot| slot.requests), sum(|slot| slot.tokens)));
            prop_assert!(recent.slots.len() <= all.len() / 3, "a slot is three numbers");
            prop_assert!(recent.slots.iter().all(|slot| slot.at <= now / SLOT_MS && leaves_ms(slot.at) > now), "of the last minute");
            prop_assert!(recent.slots.iter().zip(recent.slots.iter().skip(1)).all(|(one, next)| one.at < next.at));
            prop_assert_eq!(Recent::from_bytes(&recent.to_bytes(), now), recent);
        }
    }
}
