//! Stand-in until the real one is merged.
use crate::gate::Headers;
use serde::{Deserialize, Serialize};
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Overloaded,
    RateLimited,
    Exhausted,
    Rejected,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Model,
    Account,
    Credential,
    Provider,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub state: State,
    pub scope: Scope,
    pub wait_ms: u64,
    pub told: bool,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Left {
    pub limit: Option<u64>,
    pub remaining: u64,
    pub reset_ms: Option<u64>,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Room {
    pub requests: Option<Left>,
    pub tokens: Option<Left>,
}
pub fn needs_body(status: u16) -> bool {
    matches!(status, 400 | 402 | 403 | 429)
}
pub fn verdict(status: u16, headers: &Headers<'_>, _body: &[u8], _now_ms: u64) -> Option<Verdict> {
    let wait = crate::gate::header(headers, "retry-after").and_then(|v| std::str::from_utf8(v).ok()?.parse::<u64>().ok());
    match status {
        429 => {
            Some(Verdict { state: State::RateLimited, scope: Scope::Model, wait_ms: wait.map_or(2000, |s| s * 1000), told: wait.is_some() })
        }
        401 => Some(Verdict { state: State::Rejected, scope: Scope::Credential, wait_ms: 86_400_000, told: false }),
        503 | 529 => Some(Verdict { state: State::Overloaded, scope: Scope::Provider, wait_ms: 1000, told: false }),
        _ => None,
    }
}
pub fn room(_headers: &Headers<'_>, _now_ms: u64) -> Option<Room> {
    None
}
