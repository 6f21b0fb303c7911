//! Plugin configuration: JSON, the same in every Envoy that loads the module.

use keyward_core::gate::Limits;
use keyward_core::watch::POLL_TIMEOUT_MS;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// What to do with a request that carries no virtual key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unmanaged {
    Deny,
}

/// What becomes of running streams when the policy service is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLostWatch {
    /// They go on and settle later.
    Finish,
    /// They end when it has not answered for so long.
    EndAfter(Span),
}

impl OnLostWatch {
    /// Milliseconds of silence after which streams end.
    pub fn end_after_ms(self) -> Option<u64> {
        match self {
            OnLostWatch::Finish => None,
            OnLostWatch::EndAfter(Span(ms)) => Some(ms),
        }
    }
}

/// A length of time in milliseconds, written as `500ms`, `30s` or `5m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(u64);

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected a whole number with ms, s or m, longer than the 7 s that a question may take");
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, unit) = text.split_at_checked(unit_at).ok_or_else(wrong)?;
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            _ => return Err(wrong()),
        };
        let ms = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        // Shorter ones would end streams while all is well: the service answers once in 5 s if there is no news.
        ms.filter(|ms| *ms > POLL_TIMEOUT_MS).map(Span).ok_or_else(wrong)
    }
}

/// Who tries again when a provider has turned a try away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rotation {
    /// Envoy's router; each provider cluster has the attempt as its upstream filter. Answers stream.
    Router,
    /// The gate, by callouts; nothing but the listener is changed. What was rotated comes whole.
    Callout,
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
    pub on_lost_watch: OnLostWatch,
    pub rotation: Rotation,
    /// The router chooses the cluster anew for each try (Envoy 1.39 and later, `refresh_cluster_on_retry`): a route's further targets can be
    /// tried. With `rotation: callout` they always can.
    pub fallback: bool,
    /// Envoy's clusters by provider, where they don't have the provider's name. Only for `rotation: callout`: callouts go there.
    pub clusters: BTreeMap<String, String>,
    /// Longest that a callout to a provider may take, in milliseconds.
    pub callout_timeout_ms: u64,
    /// Bodies of up to so many bytes are sent again; of larger ones there is one try.
    pub max_replay_bytes: u64,
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
            on_lost_watch: OnLostWatch::Finish,
            rotation: Rotation::Router,
            fallback: false,
            clusters: BTreeMap::new(),
            callout_timeout_ms: 600_000,
            max_replay_bytes: 10 * 1024 * 1024,
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

    /// The cluster that callouts to a provider go to.
    pub fn cluster<'a>(&'a self, provider: &'a str) -> &'a str {
        self.clusters.get(provider).map_or(provider, String::as_str)
    }

    /// Whether a request can go on to another provider.
    pub fn falls_back(&self) -> bool {
        self.fallback || self.rotation == Rotation::Callout
    }

    pub fn callout_timeout(&self) -> Duration {
        Duration::from_millis(self.callout_timeout_ms)
    }
}
