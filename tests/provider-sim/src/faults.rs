//! Faults queued through the control API, each for the next so many requests that it fits.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::credentials::Credential;
use crate::directive::Directive;
use crate::models::Model;
use crate::provider::Provider;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The same words as inside `[[sim ...]]`.
    pub sim: String,
    #[serde(default = "once")]
    pub count: u64,
    #[serde(default)]
    pub provider: Option<Provider>,
    #[serde(default)]
    pub credential: Option<String>,
    #[serde(default)]
    pub model: Option<String>,
    /// `POST /v1/files` or `/v1/files`. Without it the fault meets requests that name a model, and no others.
    #[serde(default)]
    pub endpoint: Option<String>,
}

fn once() -> u64 {
    1
}

#[derive(Debug, Default)]
pub struct Faults(Mutex<Vec<(Fault, Directive)>>);

impl Faults {
    /// Queues all or, if one can't be read, none.
    pub fn add(&self, faults: Vec<Fault>) -> Result<(), String> {
        let parsed: Result<Vec<_>, String> =
            faults.into_iter().map(|fault| Directive::parse(&fault.sim).map(|directive| (fault, directive))).collect();
        self.queue().extend(parsed?);
        Ok(())
    }

    pub fn clear(&self) {
        self.queue().clear();
    }

    pub fn list(&self) -> Vec<Fault> {
        self.queue().iter().map(|(fault, _)| fault.clone()).collect()
    }

    /// The oldest fault that fits, used up by one.
    pub fn take(&self, credential: &Credential, model: Option<&Model>, endpoint: &str) -> Option<Directive> {
        let mut queue = self.queue();
        let at = queue.iter().position(|(fault, _)| {
            let path = |name: &str| endpoint == name || endpoint.split_once(' ').is_some_and(|(_, path)| path == name);
            fault.provider.is_none_or(|provider| provider == credential.provider)
                && fault.credential.as_ref().is_none_or(|id| **id == *credential.id)
                && fault.model.as_ref().is_none_or(|name| model.is_some_and(|model| name == model.name || name == model.snapshot))
                && fault.endpoint.as_ref().map_or(model.is_some(), |name| path(name))
                && fault.count > 0
        })?;
        let (fault, directive) = queue.get_mut(at)?;
        fault.count -= 1;
        let directive = directive.clone();
        if fault.count == 0 {
            queue.remove(at);
        }
        Some(directive)
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Vec<(Fault, Directive)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::Credentials;

    #[test]
    fn a_fault_meets_only_what_it_names_and_only_so_often() -> Result<(), String> {
        let given = r#"[{"id":"a","provider":"openai","secret":"sk-a"},{"id":"b","provider":"openai","secret":"sk-b"}]"#;
        let credentials = Credentials::new(serde_json::from_str(given).map_err(|error| error.to_string())?)?;
        let (a, b) = (credentials.find("a").ok_or("a")?, credentials.find("b").ok_or("b")?);
        let faults = Faults::default();
        let queued = r#"[{"sim":"status=429","count":2,"credential":"a"},{"sim":"status=500","model":"gpt-4o"},
                         {"sim":"status=503","endpoint":"/v1/files/{id}"}]"#;
        faults.add(serde_json::from_str(queued).map_err(|error| error.to_string())?)?;
        let model = Model::find(Provider::Openai, "gpt-4o");
        let other = Model::find(Provider::Openai, "gpt-4.1");
        let status = |credential, model| faults.take(credential, model, "POST /v1/chat/completions").and_then(|fault| fault.status);
        assert_eq!(status(b, other), None);
        assert_eq!(status(a, model), Some(429));
        assert_eq!(status(b, model), Some(500));
        assert_eq!(status(a, None), None);
        assert_eq!(status(a, other), Some(429));
        assert_eq!(status(a, model), None);
        let file = |endpoint| faults.take(b, None, endpoint).and_then(|fault| fault.status);
        assert_eq!((file("POST /v1/files"), file("GET /v1/files/{id}")), (None, Some(503)));
        let typo = Fault { sim: "stats=1".into(), count: 1, provider: None, credential: None, model: None, endpoint: None };
        assert!(faults.add(vec![typo]).is_err());
        Ok(())
    }
}
