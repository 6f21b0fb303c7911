//! The credentials the simulator knows, and what each is good for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::limits::{Allowance, Limits};
use crate::provider::Provider;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Ok,
    Invalid,
    /// Known, and not allowed to do this.
    Forbidden,
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
    /// Whose objects and limits it shares; without it an account of its own.
    #[serde(default)]
    pub account: Option<Arc<str>>,
    /// Requests and tokens in each window of the account.
    #[serde(default)]
    pub rpm: Option<u64>,
    #[serde(default)]
    pub tpm: Option<u64>,
    #[serde(default)]
    pub window_ms: Option<u64>,
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
    window_ms: u64,
    limited_for_ms: Option<u64>,
    state: State,
    requests: u64,
}

/// Accounts of different providers may have one name.
type Account = (Provider, Arc<str>);

#[derive(Debug)]
pub struct Credential {
    pub id: Arc<str>,
    /// Objects and limits belong to accounts.
    pub account: Arc<str>,
    pub provider: Provider,
    pub secret: String,
    pub allowance: Arc<Allowance>,
    state: Mutex<State>,
    /// Requests that came with it.
    seen: AtomicU64,
}

impl Given {
    fn account(&self) -> Account {
        (self.provider, Arc::clone(self.account.as_ref().unwrap_or(&self.id)))
    }

    fn limits(&self) -> Limits {
        Limits { rpm: self.rpm, tpm: self.tpm, window_ms: self.window_ms }
    }
}

impl Credential {
    fn new(given: Given, allowance: Arc<Allowance>) -> Self {
        let (provider, account) = given.account();
        let (state, seen) = (Mutex::new(given.state), AtomicU64::new(0));
        Credential { id: given.id, account, provider, secret: given.secret, allowance, state, seen }
    }

    /// Counts one more request, and says what it meets.
    pub fn meet(&self) -> State {
        self.seen.fetch_add(1, Ordering::Relaxed);
        *self.state()
    }

    /// Applies changes of the state and of the account's limits.
    pub fn patch(&self, changes: &Map<String, Value>) -> Result<(), String> {
        for (key, value) in changes {
            if key == "state" {
                *self.state() = State::deserialize(value).map_err(|_| format!("{value} is not a state"))?;
            } else if !self.allowance.set(key, value, Instant::now())? {
                return Err(format!("`{key}` can't be changed"));
            }
        }
        Ok(())
    }

    pub fn shown(&self) -> Shown {
        let (limits, limited_for_ms) = self.allowance.shown(Instant::now());
        Shown {
            id: Arc::clone(&self.id),
            account: Arc::clone(&self.account),
            provider: self.provider,
            rpm: limits.rpm,
            tpm: limits.tpm,
            window_ms: limits.window_ms(),
            limited_for_ms,
            state: *self.state(),
            requests: self.seen.load(Ordering::Relaxed),
        }
    }

    pub fn forget(&self) {
        self.seen.store(0, Ordering::Relaxed);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let allowances = allowances(&given)?;
        for one in given {
            let allowance = allowances.get(&one.account()).map(Arc::clone).ok_or("no account")?;
            if one.secret.is_empty() || made.find(&one.id).is_some() {
                return Err(format!("credential `{}` is there twice or has no secret", one.id));
            }
            let credential = Arc::new(Credential::new(one, allowance));
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

/// The limits of each account, from what its credentials say of them.
fn allowances(given: &[Given]) -> Result<HashMap<Account, Arc<Allowance>>, String> {
    let mut limits: HashMap<Account, Limits> = HashMap::new();
    for one in given {
        let known = limits.entry(one.account()).or_default();
        let contradiction = || format!("credential `{}` contradicts the limits of its account", one.id);
        *known = known.agreed(one.limits()).ok_or_else(contradiction)?;
    }
    Ok(limits.into_iter().map(|(account, limits)| (account, Arc::new(Allowance::new(limits)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(given: &str) -> Result<Credentials, String> {
        Credentials::new(serde_json::from_str(given).map_err(|error| error.to_string())?)
    }

    #[test]
    fn secrets_are_replaced_by_names() -> Result<(), String> {
        let credentials = made(r#"[{"id":"a","provider":"openai","secret":"sk-one"}]"#)?;
        assert_eq!(credentials.redact("Bearer sk-one"), "Bearer <credential:a>");
        Ok(())
    }

    #[test]
    fn limits_are_the_account_s_and_accounts_are_a_provider_s() -> Result<(), String> {
        let credentials = made(
            r#"[{"id":"a","provider":"openai","secret":"sk-a","account":"x","rpm":1},{"id":"b","provider":"openai","secret":"sk-b","account":"x"},
                {"id":"c","provider":"openai","secret":"sk-c"},{"id":"d","provider":"anthropic","secret":"sk-d","account":"x"}]"#,
        )?;
        let now = Instant::now();
        let refused = |id| credentials.find(id).map(|credential| credential.allowance.take(1, now).1.is_some());
        assert_eq!(["a", "b", "c", "c", "d", "d"].map(refused), [false, true, false, false, false, false].map(Some));
        assert!(made(r#"[{"id":"a","provider":"openai","secret":"s","account":"x","rpm":1},{"id":"b","provider":"openai","secret":"t","account":"x","rpm":2}]"#).is_err());
        Ok(())
    }
}
