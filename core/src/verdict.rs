//! What a provider's answer says about the key it was asked with: whether, for what and for how long it can't be used.
//!
//! Every provider's form is read whatever the provider: headers and error codes travel through gateways and "compatible" APIs. An
//! answer may repeat what the caller wrote, so of a body only the places count where a provider speaks for itself ([`body`]), or else
//! one caller could have a key taken away from all.

mod body;
mod headers;
mod time;

use crate::gate::Headers;
use body::{Hint, Says};
use serde::{Deserialize, Serialize};

pub use headers::{Left, Room, room};

/// What keeps a key from being used; the worse, the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The provider can't keep up, whoever asks.
    Overloaded,
    /// Too much was asked in too short a time.
    RateLimited,
    /// A quota or the money is used up.
    Exhausted,
    /// The provider doesn't take the key, or not for this.
    Rejected,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::RateLimited => "rate_limited",
            State::Exhausted => "exhausted",
            State::Rejected => "rejected",
            State::Overloaded => "overloaded",
        }
    }
}

/// What a state holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The account, with this model.
    Model,
    /// The account, with any model.
    Account,
    /// This credential, with any model.
    Credential,
    /// The provider, with this model.
    Provider,
}

impl Scope {
    pub fn name(self) -> &'static str {
        match self {
            Scope::Model => "model",
            Scope::Account => "account",
            Scope::Credential => "credential",
            Scope::Provider => "provider",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub state: State,
    pub scope: Scope,
    /// Milliseconds from now on; 0: for this request only.
    pub wait_ms: u64,
    /// The provider named the time; otherwise it is a guess, to be probed.
    pub told: bool,
}

const SECOND: u64 = 1_000;
const DAY: u64 = 24 * 60 * 60 * SECOND;

/// Shortest wait: a provider that says "now" has just refused.
const SHORTEST: u64 = 100;
/// Longest wait: whatever was said, a day later it is worth a try.
const LONGEST: u64 = DAY;
const RATE_GUESS: u64 = 2 * SECOND;
const EXHAUSTED_LEAST: u64 = 60 * SECOND;
const EXHAUSTED_GUESS: u64 = 600 * SECOND;
const OVERLOADED_MOST: u64 = 60 * SECOND;
const OVERLOADED_GUESS: u64 = SECOND;

/// What an answer says about the key, if anything. `body`: the start of an error's body, perhaps cut, perhaps empty (64 KiB are
/// read). `now_ms`: Unix milliseconds.
pub fn verdict(status: u16, headers: &Headers<'_>, body: &[u8], now_ms: u64) -> Option<Verdict> {
    if matches!(status, 503 | 529) {
        return Some(overloaded(headers, now_ms));
    }
    if !needs_body(status) {
        return None;
    }
    let mut says = body::read(body, now_ms);
    if status == 400 && !says.typed {
        // OpenRouter: "<what the caller gave as the model> is not a valid model ID".
        says.forget_words();
    }
    if status == 402 || says.has(Hint::Exhausted) || says.has(Hint::KeySpent) || status == 429 && says.has(Hint::NoCredit) {
        // A key with a cap of its own leaves the account's other keys as they are.
        let of_key = says.has(Hint::KeySpent) || says.has(Hint::RaiseKey);
        return Some(exhausted(if of_key { Scope::Credential } else { Scope::Account }, headers, &says, now_ms));
    }
    match status {
        // One caller's request must not take the key away from all.
        429 if says.has(Hint::Request) => None,
        429 if says.has(Hint::Overloaded) => Some(overloaded(headers, now_ms)),
        429 if says.has(Hint::PerDay) => Some(exhausted(Scope::Model, headers, &says, now_ms)),
        429 => Some(rate_limited(headers, &says, now_ms)),
        // A key of narrow permissions still serves what it is for: another may serve this.
        401 | 403 if says.has(Hint::LacksScope) => Some(Verdict { wait_ms: 0, ..rejected(Scope::Model) }),
        401 => Some(rejected(Scope::Credential)),
        // Only where the API itself says so: a firewall before it may have taken offence at what one caller wrote.
        403 => {
            let of_key = says.has(Hint::Denied) || says.has(Hint::BadKey);
            (of_key && !says.has(Hint::Request)).then(|| rejected(Scope::Model))
        }
        400 => says.has(Hint::BadKey).then(|| rejected(Scope::Credential)),
        _ => None,
    }
}

/// Whether the body has to be seen before [`verdict`] can be sure.
pub fn needs_body(status: u16) -> bool {
    matches!(status, 400..=403 | 429)
}

/// The longest of what was named counts: the request has to pass every limit.
fn rate_limited(headers: &Headers<'_>, says: &Says, now_ms: u64) -> Verdict {
    let limits = headers::limits(headers, now_ms);
    let resets = limits.iter().filter(|limit| limit.binds()).filter_map(|limit| limit.reset_ms).filter(|wait| *wait > 0);
    let named = resets.chain(headers::retry_after(headers, now_ms)).chain(says.wait_ms).max();
    // Prose is the last resort: it rounds, and it names only one of the limits.
    let named = named.or(says.prose_ms);
    Verdict {
        state: State::RateLimited,
        scope: Scope::Model,
        wait_ms: named.unwrap_or(RATE_GUESS).clamp(SHORTEST, LONGEST),
        told: named.is_some(),
    }
}

/// Reset headers are about rates, which come back long before money or a day's quota does: they don't count here.
fn exhausted(scope: Scope, headers: &Headers<'_>, says: &Says, now_ms: u64) -> Verdict {
    let named = headers::retry_after(headers, now_ms).max(says.wait_ms);
    let wait_ms = named.unwrap_or(EXHAUSTED_GUESS).clamp(EXHAUSTED_LEAST, LONGEST);
    Verdict { state: State::Exhausted, scope, wait_ms, told: named.is_some() }
}

fn rejected(scope: Scope) -> Verdict {
    Verdict { state: State::Rejected, scope, wait_ms: LONGEST, told: false }
}

fn overloaded(headers: &Headers<'_>, now_ms: u64) -> Verdict {
    let named = headers::retry_after(headers, now_ms);
    let wait_ms = named.unwrap_or(OVERLOADED_GUESS).clamp(SHORTEST, OVERLOADED_MOST);
    Verdict { state: State::Overloaded, scope: Scope::Provider, wait_ms, told: named.is_some() }
}
