//! What operators see of the service: gauges that are read when somebody looks, and what a log line may say.

use super::key_states::state_name;
use super::watch::Changed;
use super::{InMemory, Service, millis, now_ms};
use crate::directory::Directory;
use crate::metrics::{handles, unix_seconds};
use crate::store::{Alarm, Settled, Used};
use keyward_core::edge::RequestId;
use keyward_core::operation::PROVIDERS;
use keyward_core::refusal::{Code, Refusal};
use keyward_core::trace::TraceContext;
use keyward_core::verdict::State;
use metrics::gauge;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Readings closer together than this show the same: whoever can read must not be able to keep the database busy.
const AT_MOST_EVERY: Duration = Duration::from_secs(1);
/// What keeps a credential from being used.
const STATES: [State; 4] = [State::Overloaded, State::RateLimited, State::Exhausted, State::Rejected];
/// A store that takes longer to write is not ready.
const PATIENCE: Duration = Duration::from_secs(2);

impl Service {
    /// Brings the gauges up to date that nobody counts along.
    pub async fn watch(&self) {
        let mut last = self.watched.lock().await;
        if last.is_some_and(|last| last.elapsed() < AT_MOST_EVERY) {
            return;
        }
        let unusable = self.unusable();
        for (provider, state) in PROVIDERS.iter().flat_map(|provider| STATES.map(|state| (provider.name, state))) {
            let count = unusable.get(&(provider.to_owned(), state)).copied().unwrap_or(0);
            gauge!("keyward_credentials_unusable", "provider" => provider, "state" => state_name(state)).set(as_float(count));
        }
        let metrics = handles();
        let ready = matches!(tokio::time::timeout(PATIENCE, self.store.ready()).await, Ok(Ok(())));
        metrics.ready.set(if ready { 1.0 } else { 0.0 });
        metrics.clock.set(unix_seconds());
        let now_ms = now_ms();
        match self.store.standing(now_ms).await {
            Ok(standing) => {
                for status in ["active", "expired", "frozen", "revoked"] {
                    set("keyward_keys", "status", status, standing.keys.get(status).copied().unwrap_or(0));
                }
                metrics.holds.set(as_float(standing.holds));
                // A hold's begin is not stored, but how long before its expiry it began.
                let age = |first: u64| now_ms.saturating_add(millis(self.hold_ttl)).saturating_sub(first);
                metrics.oldest_hold_seconds.set(Duration::from_millis(standing.first_expiry_ms.map_or(0, age)).as_secs_f64());
                metrics.reserved.store(standing.reserved.0, Ordering::Relaxed);
                metrics.audit_entries.set(as_float(standing.audit_entries));
            }
            Err(error) => tracing::error!(%error, "the ledger's sums could not be read"),
        }
        *last = Some(Instant::now());
    }

    /// Counts what a batch of settlements did.
    pub(super) fn report(&self, settled: &Settled) {
        let metrics = handles();
        metrics.settlements.increment(settled.charged);
        metrics.voids.increment(settled.voided);
        metrics.keys_frozen.increment(settled.frozen.len() as u64);
        metrics.records_missing.increment(settled.gaps);
        metrics.records_repeated.increment(settled.repeated);
        metrics.records_unknown.increment(settled.unknown);
        self.count_used(&settled.used);
        metrics.rotated.increment(settled.rotated);
        for ((provider, status), count) in &settled.tries {
            metrics.tried(provider, *status, *count);
        }
        raised(&settled.alarms);
        for key in &settled.frozen {
            self.changed(Changed::key(key));
        }
        if settled.gaps > 0 || settled.unknown > 0 || !settled.frozen.is_empty() {
            tracing::error!(
                missing = settled.gaps,
                unknown = settled.unknown,
                frozen = ?settled.frozen,
                "settlements need an operator's eye"
            );
        }
    }

    /// Tokens and money, by model.
    pub(super) fn count_used(&self, used: &[Used]) {
        for used in used {
            let model = handles().model(&used.provider, &used.model, || self.memory().names(&used.provider, &used.model));
            model.input.increment(used.usage.input);
            model.cache_read.increment(used.usage.cache_read);
            model.cache_write.increment(used.usage.cache_write);
            model.output.increment(used.usage.output);
            model.spent.increment(used.nanodollars);
            model.returned.increment(used.returned_nanodollars);
        }
    }
}

impl InMemory {
    /// Whether a route of any organisation leads to this model.
    fn names(&self, provider: &str, model: &str) -> bool {
        let routes = self.directory.organisations.values().flat_map(|organisation| organisation.document.routes.values());
        routes.flat_map(|route| &route.targets).any(|target| target.provider == provider && target.model == model)
    }
}

/// Counts alarms, and logs them.
pub(super) fn raised(alarms: &[Alarm]) {
    for alarm in alarms {
        metrics::counter!("keyward_alarms_total", "what" => alarm.what.clone()).increment(1);
        tracing::warn!(organisation = alarm.organisation, what = alarm.what, detail = %alarm.detail, "alarm");
    }
}

/// Credentials of each provider that admissions can use, over all organisations.
pub(super) fn pools(directory: &Directory) {
    for provider in &PROVIDERS {
        let of_provider = directory.organisations.values().filter_map(|o| o.credentials(provider.name, None, None).ok());
        let usable = of_provider.map(|ids| ids.len() as u64).sum();
        let value = as_float(usable);
        gauge!("keyward_pool_credentials", "provider" => provider.name, "state" => "usable").set(value);
    }
}

/// A refusal in the log: why, for whom it was meant, never its text, which may repeat what the caller sent.
pub(super) fn refused(refusal: &Refusal, req: RequestId, provider: &str, endpoint: &str, trace: Option<&TraceContext>) {
    let (trace_id, span_id) = ids(trace);
    let reason = refusal.code.name();
    if refusal.code == Code::UnknownKey {
        // Anybody can make any number of these.
        tracing::debug!(request_id = %req, trace_id, span_id, reason, gen_ai.provider.name = provider, endpoint, "refused");
    } else {
        tracing::info!(request_id = %req, trace_id, span_id, reason, gen_ai.provider.name = provider, endpoint, "refused");
    }
}

/// `trace_id` and `span_id` of a log line; without a trace the line has neither.
pub fn ids(trace: Option<&TraceContext>) -> (Option<String>, Option<String>) {
    (trace.map(TraceContext::trace_id), trace.map(TraceContext::span_id))
}

fn set(name: &'static str, label: &'static str, value: &'static str, count: u64) {
    gauge!(name, label => value).set(as_float(count));
}

#[allow(clippy::cast_precision_loss, reason = "a gauge is a float; counts are exact up to 2^53")]
fn as_float(count: u64) -> f64 {
    count as f64
}
