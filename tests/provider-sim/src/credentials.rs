//! The accounts the simulator knows, and how much each may still ask for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::provider::Provider;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Ok,
    Invalid,
    InsufficientQuota,
    Overloaded,
}

/// One credential as the control API takes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Given {
    pub id: Arc<str>,
    pub provider: Provider,
    pub secret: String,
    /// Whose objects it sees; without it an account of its own.
    #[serde(default)]
    pub account: Option<Arc<str>>,
    #[serde(default)]
    pub rpm: Option<u64>,
    #[serde(default)]
    pub tpm: Option<u64>,
    #[serde(default)]
    pub state: State,
}

/// One credential as the control API shows it: never with its secret.
#[derive(Debug, Serialize)]
pub struct Shown {
    id: Arc<str>,
    account: Arc<str>,
    provider: Provider,
    rpm: Option<u64>,
    tpm: Option<u64>,
    state: State,
}

#[derive(Debug)]
pub struct Credential {
    pub id: Arc<str>,
    /// Objects belong to accounts.
    pub account: Arc<str>,
    pub provider: Provider,
    pub secret: String,
    standing: Mutex<Standing>,
}

#[derive(Debug)]
struct Standing {
    rpm: Option<u64>,
    tpm: Option<u64>,
    state: State,
    /// Start of the running window and what was used in it.
    since: Instant,
    requests: u64,
    tokens: u64,
}

/// Where a credential stands in its window, for the response headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    pub limit_requests: u64,
    pub remaining_requests: u64,
    pub limit_tokens: u64,
    pub remaining_tokens: u64,
    pub reset_ms: u64,
}

/// A refusal: what ran out, its limit and the milliseconds until the window turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    pub what: &'static str,
    pub limit: u64,
    pub wait_ms: u64,
}

const WINDOW: Duration = Duration::from_secs(60);
/// What the headers say of a credential without limits.
const SHOWN_REQUESTS: u64 = 10_000;
const SHOWN_TOKENS: u64 = 2_000_000;

impl Credential {
    fn new(given: Given) -> Self {
        let (rpm, tpm, state) = (given.rpm, given.tpm, given.state);
        let standing = Standing { rpm, tpm, state, since: Instant::now(), requests: 0, tokens: 0 };
        let account = given.account.unwrap_or_else(|| Arc::clone(&given.id));
        Credential { id: given.id, account, provider: given.provider, secret: given.secret, standing: Mutex::new(standing) }
    }

    pub fn state(&self) -> State {
        self.standing().state
    }

    /// Takes one request of `tokens` out of the window that holds at `now`.
    pub fn take(&self, tokens: u64, now: Instant) -> (Quota, Option<Exceeded>) {
        let mut standing = self.standing();
        if now.saturating_duration_since(standing.since) >= WINDOW || standing.requests == 0 {
            standing.since = now;
            standing.requests = 0;
            standing.tokens = 0;
        }
        let left = WINDOW.saturating_sub(now.saturating_duration_since(standing.since));
        let wait_ms = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        let over = |limit: Option<u64>, used: u64, what| limit.filter(|limit| used > *limit).map(|limit| Exceeded { what, limit, wait_ms });
        let exceeded = over(standing.rpm, standing.requests + 1, "requests")
            .or_else(|| over(standing.tpm, standing.tokens.saturating_add(tokens), "tokens"));
        if exceeded.is_none() {
            standing.requests += 1;
            standing.tokens += tokens;
        }
        let (limit_requests, limit_tokens) = (standing.rpm.unwrap_or(SHOWN_REQUESTS), standing.tpm.unwrap_or(SHOWN_TOKENS));
        let quota = Quota {
            limit_requests,
            remaining_requests: limit_requests.saturating_sub(standing.requests),
            limit_tokens,
            remaining_tokens: limit_tokens.saturating_sub(standing.tokens),
            reset_ms: wait_ms,
        };
        (quota, exceeded)
    }

    /// Applies the `rpm`, `tpm` and `state` given; null lifts a limit, and a new limit starts a new window.
    pub fn patch(&self, changes: &Map<String, Value>) -> Result<(), String> {
        let number = |value: &Value| match value {
            Value::Null => Ok(None),
            other => other.as_u64().map(Some).ok_or_else(|| format!("{other} is not a limit")),
        };
        let mut standing = self.standing();
        for (key, value) in changes {
            match key.as_str() {
                "rpm" => (standing.rpm, standing.requests) = (number(value)?, 0),
                "tpm" => (standing.tpm, standing.requests) = (number(value)?, 0),
                "state" => {
                    standing.state = State::deserialize(value).map_err(|_| format!("{value} is not a state"))?;
                }
                _ => return Err(format!("`{key}` can't be changed")),
            }
        }
        Ok(())
    }

    pub fn shown(&self) -> Shown {
        let standing = self.standing();
        let (id, account) = (Arc::clone(&self.id), Arc::clone(&self.account));
        Shown { id, account, provider: self.provider, rpm: standing.rpm, tpm: standing.tpm, state: standing.state }
    }

    fn standing(&self) -> std::sync::MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
pub struct Credentials {
    by_secret: HashMap<String, Arc<Credential>>,
    in_order: Vec<Arc<Credential>>,
}

impl Credentials {
    pub fn new(given: Vec<Given>) -> Result<Self, String> {
        let mut made = Credentials::default();
        for one in given {
            if one.secret.is_empty() || made.find(&one.id).is_some() {
                return Err(format!("credential `{}` is there twice or has no secret", one.id));
            }
            let credential = Arc::new(Credential::new(one));
            if made.by_secret.insert(credential.secret.clone(), Arc::clone(&credential)).is_some() {
                return Err(format!("the secret of `{}` is there twice", credential.id));
            }
            made.in_order.push(credential);
        }
        Ok(made)
    }

    pub fn by_secret(&self, secret: &str) -> Option<&Arc<Credential>> {
        self.by_secret.get(secret)
    }

    pub fn find(&self, id: &str) -> Option<&Arc<Credential>> {
        self.in_order.iter().find(|credential| &*credential.id == id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Credential>> {
        self.in_order.iter()
    }

    /// `text` with every known secret replaced by its credential's name.
    pub fn redact(&self, text: &str) -> String {
        let known = self.in_order.iter().filter(|credential| text.contains(&credential.secret));
        known.fold(text.to_owned(), |text, credential| text.replace(&credential.secret, &format!("<credential:{}>", credential.id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limited(rpm: Option<u64>, tpm: Option<u64>) -> Credential {
        let state = State::Ok;
        Credential::new(Given { id: "a".into(), provider: Provider::Openai, secret: "sk-a".into(), account: None, rpm, tpm, state })
    }

    #[test]
    fn a_window_lets_its_limit_through_and_then_turns() {
        let credential = limited(Some(2), None);
        let start = Instant::now();
        assert_eq!(credential.take(5, start).0.remaining_requests, 1);
        assert_eq!(credential.take(5, start).1, None);
        let late = start + Duration::from_secs(59);
        let exceeded = Exceeded { what: "requests", limit: 2, wait_ms: 1000 };
        assert_eq!(credential.take(5, late).1, Some(exceeded));
        assert_eq!(credential.take(5, start + WINDOW).1, None);
    }

    #[test]
    fn tokens_are_limited_apart_and_a_refusal_takes_none() {
        let credential = limited(None, Some(100));
        let now = Instant::now();
        assert_eq!(credential.take(60, now).1, None);
        assert_eq!(credential.take(60, now).1.map(|exceeded| exceeded.what), Some("tokens"));
        let (quota, exceeded) = credential.take(40, now);
        assert_eq!((quota.remaining_tokens, exceeded), (0, None));
    }

    #[test]
    fn secrets_are_replaced_by_names() -> Result<(), String> {
        let given = r#"[{"id":"a","provider":"openai","secret":"sk-one"}]"#;
        let credentials = Credentials::new(serde_json::from_str(given).map_err(|error| error.to_string())?)?;
        assert_eq!(credentials.redact("Bearer sk-one"), "Bearer <credential:a>");
        Ok(())
    }
}
