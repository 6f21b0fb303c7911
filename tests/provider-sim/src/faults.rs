//! Faults queued through the control API, each for the next so many generation requests that it fits.

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

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
    pub fn take(&self, credential: &str, model: &Model) -> Option<Directive> {
        let mut queue = self.queue();
        let at = queue.iter().position(|(fault, _)| {
            fault.provider.is_none_or(|provider| provider == model.provider)
                && fault.credential.as_ref().is_none_or(|id| id == credential)
                && fault.model.as_ref().is_none_or(|name| name == model.name || name == model.snapshot)
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

    #[test]
    fn a_fault_meets_only_what_it_names_and_only_so_often() -> Result<(), String> {
        let faults = Faults::default();
        let queued = r#"[{"sim":"status=429","count":2,"credential":"a"},{"sim":"status=500","model":"gpt-4o"}]"#;
        faults.add(serde_json::from_str(queued).map_err(|error| error.to_string())?)?;
        let model = Model::find(Provider::Openai, "gpt-4o").ok_or("model")?;
        let other = Model::find(Provider::Openai, "gpt-4.1").ok_or("model")?;
        let status = |id, model| faults.take(id, model).and_then(|directive| directive.status);
        assert_eq!(status("b", other), None);
        assert_eq!(status("a", model), Some(429));
        assert_eq!(status("b", model), Some(500));
        assert_eq!(status("a", other), Some(429));
        assert_eq!(status("a", model), None);
        let typo = Fault { sim: "stats=1".into(), count: 1, provider: None, credential: None, model: None };
        assert!(faults.add(vec![typo]).is_err());
        Ok(())
    }
}
