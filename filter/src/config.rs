//! Plugin configuration: JSON, the same in every Envoy that loads the module.

use keyward_core::gate::Limits;
use serde::Deserialize;
use std::time::Duration;

/// What to do with a request that carries no virtual key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unmanaged {
    Deny,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Envoy cluster of the policy service's edge port.
    pub policy_cluster: String,
    /// Longest wait for an admission, in milliseconds.
    pub admit_timeout_ms: u64,
    pub max_body_bytes: u64,
    pub unmanaged: Unmanaged,
    /// Bytes of request bodies that one worker lets wait for their admission at a time.
    pub max_waiting_bytes: u64,
    /// Streams that one worker has open at a time, agents without a valid key included.
    pub max_streams: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            policy_cluster: "keyward_policy".to_owned(),
            admit_timeout_ms: 900,
            max_body_bytes: 10 * 1024 * 1024,
            unmanaged: Unmanaged::Deny,
            max_waiting_bytes: 256 * 1024 * 1024,
            max_streams: 10_000,
        }
    }
}

impl Config {
    /// An empty configuration means the defaults; one that can't be read fails the plugin, so that Envoy refuses to serve.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_slice(bytes).map_err(|error| error.to_string())
    }

    pub fn limits(&self) -> Limits {
        Limits { max_body_bytes: self.max_body_bytes }
    }

    pub fn admit_timeout(&self) -> Duration {
        Duration::from_millis(self.admit_timeout_ms)
    }
}
