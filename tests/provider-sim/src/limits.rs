//! The rate limits of an account: windows that begin with their first request, shared by all its credentials.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What an account may ask for in one window; none is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub rpm: Option<u64>,
    pub tpm: Option<u64>,
    pub window_ms: Option<u64>,
}

/// Where an account stands in its window, for the response headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    pub limit_requests: u64,
    pub remaining_requests: u64,
    pub limit_tokens: u64,
    pub remaining_tokens: u64,
    pub reset_ms: u64,
}

/// A refusal: what ran out, the figures that say so, and the milliseconds until it is there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    pub what: &'static str,
    pub limit: u64,
    pub used: u64,
    pub requested: u64,
    pub wait_ms: u64,
}

/// An account's limits and what has been used of them.
#[derive(Debug)]
pub struct Allowance(Mutex<Standing>);

#[derive(Debug)]
struct Standing {
    limits: Limits,
    /// Start of the running window and what was used in it.
    since: Instant,
    requests: u64,
    tokens: u64,
    /// Until then every request is one too many.
    limited_until: Option<Instant>,
}

const WINDOW_MS: u64 = 60_000;
/// What the headers say of an account without limits.
const SHOWN_REQUESTS: u64 = 10_000;
const SHOWN_TOKENS: u64 = 2_000_000;

impl Limits {
    /// What two credentials of one account say of it; none if they contradict each other.
    pub fn agreed(self, other: Limits) -> Option<Limits> {
        fn either(one: Option<u64>, other: Option<u64>) -> Option<Option<u64>> {
            match (one, other) {
                (Some(one), Some(other)) if one != other => None,
                _ => Some(one.or(other)),
            }
        }
        Some(Limits {
            rpm: either(self.rpm, other.rpm)?,
            tpm: either(self.tpm, other.tpm)?,
            window_ms: either(self.window_ms, other.window_ms)?,
        })
    }

    pub fn window_ms(&self) -> u64 {
        self.window_ms.unwrap_or(WINDOW_MS)
    }

    fn window(&self) -> Duration {
        Duration::from_millis(self.window_ms())
    }
}

impl Allowance {
    pub fn new(limits: Limits) -> Self {
        Allowance(Mutex::new(Standing { limits, since: Instant::now(), requests: 0, tokens: 0, limited_until: None }))
    }

    /// Takes one request of `tokens` out of the window that holds at `now`.
    pub fn take(&self, tokens: u64, now: Instant) -> (Quota, Option<Exceeded>) {
        let mut standing = self.standing();
        standing.turn(now);
        let exceeded = standing.exceeded(tokens, now);
        if exceeded.is_none() {
            standing.requests += 1;
            standing.tokens += tokens;
        }
        (standing.quota(now), exceeded)
    }

    /// The refusal of a request that takes nothing, if the account is limited at `now` whatever it asks.
    pub fn refusal(&self, now: Instant) -> Option<(Quota, Exceeded)> {
        let mut standing = self.standing();
        standing.turn(now);
        standing.limited_ms(now)?;
        let exceeded = standing.exceeded(0, now)?;
        Some((standing.quota(now), exceeded))
    }

    /// Changes one limit, which starts a new window, or how long from `now` every request is one too many; null lifts either.
    /// False if `key` is neither.
    pub fn set(&self, key: &str, value: &Value, now: Instant) -> Result<bool, String> {
        let number = || match value {
            Value::Null => Ok(None),
            other => other.as_u64().map(Some).ok_or_else(|| format!("`{key}` is a number or null, not {other}")),
        };
        let mut standing = self.standing();
        match key {
            "rpm" => standing.limits.rpm = number()?,
            "tpm" => standing.limits.tpm = number()?,
            "window_ms" => standing.limits.window_ms = number()?,
            "limited_for_ms" => {
                standing.limited_until = number()?.and_then(|ms| now.checked_add(Duration::from_millis(ms)));
                return Ok(true);
            }
            _ => return Ok(false),
        }
        standing.requests = 0;
        Ok(true)
    }

    /// The limits, and for how many milliseconds more every request is refused.
    pub fn shown(&self, now: Instant) -> (Limits, Option<u64>) {
        let standing = self.standing();
        (standing.limits, standing.limited_ms(now))
    }

    fn standing(&self) -> std::sync::MutexGuard<'_, Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Begins a new window if the running one is over, or nothing was asked in it.
    fn turn(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) >= self.limits.window() || self.requests == 0 {
            self.since = now;
            self.requests = 0;
            self.tokens = 0;
        }
    }

    fn window_left_ms(&self, now: Instant) -> u64 {
        ceil_ms(self.limits.window().saturating_sub(now.saturating_duration_since(self.since)))
    }

    fn limited_ms(&self, now: Instant) -> Option<u64> {
        let left = self.limited_until?.saturating_duration_since(now);
        Some(ceil_ms(left)).filter(|ms| *ms > 0)
    }

    fn exceeded(&self, tokens: u64, now: Instant) -> Option<Exceeded> {
        let over = |what, limit: Option<u64>, used: u64, requested: u64| {
            let limit = limit.filter(|limit| used.saturating_add(requested) > *limit)?;
            Some(Exceeded { what, limit, used, requested, wait_ms: self.window_left_ms(now) })
        };
        let in_window =
            over("requests", self.limits.rpm, self.requests, 1).or_else(|| over("tokens", self.limits.tpm, self.tokens, tokens));
        let Some(limited_ms) = self.limited_ms(now) else { return in_window };
        let limit = self.limits.rpm.unwrap_or(SHOWN_REQUESTS);
        let whole = Exceeded { what: "requests", limit, used: limit, requested: 1, wait_ms: 0 };
        let exceeded = in_window.unwrap_or(whole);
        Some(Exceeded { wait_ms: limited_ms.max(exceeded.wait_ms), ..exceeded })
    }

    fn quota(&self, now: Instant) -> Quota {
        let (limit_requests, limit_tokens) = (self.limits.rpm.unwrap_or(SHOWN_REQUESTS), self.limits.tpm.unwrap_or(SHOWN_TOKENS));
        let quota = Quota {
            limit_requests,
            remaining_requests: limit_requests.saturating_sub(self.requests),
            limit_tokens,
            remaining_tokens: limit_tokens.saturating_sub(self.tokens),
            reset_ms: self.window_left_ms(now),
        };
        match self.exceeded(0, now).filter(|_| self.limited_ms(now).is_some()) {
            Some(exceeded) => Quota { remaining_requests: 0, reset_ms: exceeded.wait_ms, ..quota },
            None => quota,
        }
    }
}

/// Rounded up: who waits that long has waited long enough.
fn ceil_ms(left: Duration) -> u64 {
    u64::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(rpm: Option<u64>, tpm: Option<u64>, window_ms: Option<u64>) -> Allowance {
        Allowance::new(Limits { rpm, tpm, window_ms })
    }

    #[test]
    fn a_window_lets_its_limit_through_and_then_turns() {
        for (window_ms, seconds) in [(None, 60), (Some(2000), 2)] {
            let allowance = limited(Some(2), None, window_ms);
            let start = Instant::now();
            assert_eq!(allowance.take(5, start).0.remaining_requests, 1);
            assert_eq!(allowance.take(5, start).1, None);
            let late = start + Duration::from_secs(seconds) - Duration::from_millis(250);
            let (quota, exceeded) = allowance.take(5, late);
            assert_eq!(exceeded, Some(Exceeded { what: "requests", limit: 2, used: 2, requested: 1, wait_ms: 250 }));
            assert_eq!((quota.remaining_requests, quota.reset_ms), (0, 250));
            assert_eq!(allowance.take(5, start + Duration::from_secs(seconds)).1, None);
        }
    }

    #[test]
    fn tokens_are_limited_apart_and_a_refusal_takes_none() {
        let allowance = limited(None, Some(100), None);
        let now = Instant::now();
        assert_eq!(allowance.take(60, now).1, None);
        let refused = Exceeded { what: "tokens", limit: 100, used: 60, requested: 60, wait_ms: 60_000 };
        assert_eq!(allowance.take(60, now).1, Some(refused));
        let (quota, exceeded) = allowance.take(40, now);
        assert_eq!((quota.remaining_tokens, exceeded), (0, None));
    }

    #[test]
    fn an_account_is_limited_for_the_time_given_and_no_longer() -> Result<(), String> {
        let allowance = limited(None, None, Some(1000));
        let now = Instant::now();
        assert_eq!(allowance.refusal(now), None);
        allowance.set("limited_for_ms", &2000.into(), now)?;
        let (quota, exceeded) = allowance.take(1, now + Duration::from_micros(500_100));
        assert_eq!(exceeded.map(|exceeded| (exceeded.what, exceeded.wait_ms)), Some(("requests", 1500)));
        assert_eq!((quota.remaining_requests, quota.reset_ms), (0, 1500));
        assert_eq!(allowance.refusal(now).map(|(_, exceeded)| exceeded.wait_ms), Some(2000));
        assert_eq!(allowance.take(1, now + Duration::from_secs(2)).1, None);
        allowance.set("limited_for_ms", &2000.into(), now)?;
        allowance.set("limited_for_ms", &Value::Null, now)?;
        assert_eq!(allowance.take(1, now).1, None);
        Ok(())
    }

    #[test]
    fn a_limited_account_whose_window_is_used_up_waits_for_the_later_of_the_two() -> Result<(), String> {
        let allowance = limited(Some(1), None, Some(5000));
        let now = Instant::now();
        assert_eq!(allowance.take(1, now).1, None);
        allowance.set("limited_for_ms", &2000.into(), now)?;
        let (quota, exceeded) = allowance.take(1, now);
        assert_eq!((exceeded.map(|exceeded| exceeded.wait_ms), quota.reset_ms), (Some(5000), 5000));
        Ok(())
    }

    #[test]
    fn limits_of_one_account_are_joined_and_may_not_contradict() {
        let (first, second) = (Limits { rpm: Some(5), ..Limits::default() }, Limits { window_ms: Some(9), ..Limits::default() });
        assert_eq!(first.agreed(second), Some(Limits { rpm: Some(5), tpm: None, window_ms: Some(9) }));
        assert_eq!(first.agreed(Limits { rpm: Some(6), ..Limits::default() }), None);
    }
}
