//! The service's metrics: the table of all of them, and handles that the hot path uses without looking anything up.

use keyward_core::metrics::{Kind, Metric};
use keyward_core::operation::{OPERATIONS, PROVIDERS, Provider, carries};
use keyward_core::price::PriceTable;
use keyward_core::refusal::Code;
use keyward_core::watch::ENDS;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, LazyLock, RwLock};
use std::time::SystemTime;

/// Seconds: an admission takes some 100 us, a commit on a slow disk some 10 ms, and the gate waits 0.9 s.
const FAST: &[f64] = &[0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
const GROUPS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
/// Label of whatever is not in a table of ours: values that a caller chooses must not become labels.
pub const OTHER: &str = "other";
/// Most models that get a label of their own.
const MAX_MODELS: usize = 500;
const MODEL: &[&str] = &["provider", "model"];
const RESERVED: Metric = Metric::gauge("keyward_reserved_nanodollars", "nanodollars", &[], "Money held now");

/// Every metric of `/metrics`.
#[rustfmt::skip]
pub static TABLE: &[Metric] = &[
    Metric::counter("keyward_admissions_total", "requests", &["provider", "operation"], "Requests admitted: reserved, written down and answered with a plan"),
    Metric::counter("keyward_refusals_total", "requests", &["reason"], "Requests refused by the service"),
    Metric::counter("keyward_admission_conflicts_total", "requests", &[], "Admissions whose request id was used before, for something else or something that is over"),
    Metric::counter("keyward_edge_refusals_total", "requests", &["reason"], "Requests that the gate refused without asking, as it reported them"),
    Metric::counter("keyward_edge_unauthenticated_total", "requests", &[], "Calls of the edge API without its token"),
    Metric::counter("keyward_edge_batches_total", "batches", &[], "Batches of records that the gate sent"),
    Metric::histogram("keyward_admit_duration_seconds", "seconds", &[], "Time from a read admission to its durable decision", FAST),
    Metric::histogram("keyward_settle_duration_seconds", "seconds", &[], "Time from a read batch of records to its durable settlement", FAST),
    Metric::counter("keyward_settlements_total", "requests", &[], "Requests that ended and were charged what they cost, nothing included"),
    Metric::counter("keyward_voids_total", "requests", &[], "Requests that the gate gave up before anything was forwarded"),
    Metric::counter("keyward_holds_expired_total", "requests", &[], "Holds that nobody settled in time; each was charged whole"),
    Metric::counter("keyward_tokens_total", "tokens", &["provider", "model", "direction"], "Tokens of settled requests; the directions input, cache_read, cache_write and output do not overlap"),
    Metric::counter("keyward_spent_nanodollars_total", "nanodollars", MODEL, "Money charged, expired holds included"),
    Metric::counter("keyward_returned_nanodollars_total", "nanodollars", MODEL, "Money given back: a settlement that came after its hold had expired costs less than the hold"),
    Metric::counter("keyward_ends_told_total", "requests", &["reason"], "Running requests that were told to end: revoked, expired, not allowed any more, out of money"),
    Metric::counter("keyward_edge_polls_total", "calls", &[], "Questions of Envoys for news; each has one open at a time, held for up to 5 s"),
    Metric::counter("keyward_edge_polls_everything_total", "calls", &[], "Questions of Envoys for news that were told all that may not go on: after a start of either side, or from too far behind"),
    Metric::counter("keyward_keys_frozen_total", "keys", &[], "Keys frozen because an actual cost exceeded its hold"),
    Metric::counter("keyward_tries_total", "tries", &["provider", "status"], "Tries at providers of requests that ended, by the provider's status; none: no answer came"),
    Metric::counter("keyward_rotated_requests_total", "requests", &[], "Requests that ended and had taken more than one try"),
    Metric::gauge("keyward_credentials_unusable", "credentials", &["provider", "state"], "Credentials that at least one model can't be asked with now: overloaded, rate_limited, exhausted, rejected"),
    Metric::counter("keyward_alarms_total", "alarms", &["what"], "Alarms: budget, over_hold, frozen, credential_rejected, credential_exhausted"),
    Metric::counter("keyward_alarms_sent_total", "alarms", &[], "Alarms that a webhook took"),
    Metric::counter("keyward_alarms_lost_total", "alarms", &[], "Alarms that a webhook did not take within a day; must stay 0"),
    Metric::counter("keyward_records_missing_total", "records", &[], "Records that the gates' chains say should have come and have not; must stay 0"),
    Metric::counter("keyward_records_rejected_total", "records", &[], "Records with a wrong MAC or form, or that could not be booked; must stay 0"),
    Metric::counter("keyward_records_repeated_total", "records", &[], "Records of requests that were settled already; they change nothing"),
    Metric::counter("keyward_records_unknown_total", "records", &[], "Settlements of requests that the ledger does not know; must stay 0"),
    Metric::histogram("keyward_commit_group_size", "changes", &[], "Changes that shared one commit", GROUPS),
    Metric::histogram("keyward_commit_duration_seconds", "seconds", &[], "Time that one commit took, its changes included", FAST),
    Metric::counter("keyward_store_errors_total", "changes", &[], "Changes that the store could not make durable"),
    Metric::gauge("keyward_holds", "requests", &[], "Requests whose money is held now"),
    Metric::gauge("keyward_hold_oldest_age_seconds", "seconds", &[], "Age of the oldest hold; 0 without one"),
    RESERVED,
    Metric::gauge("keyward_keys", "keys", &["status"], "Virtual keys: active, expired, frozen, revoked"),
    Metric::gauge("keyward_audit_entries", "entries", &[], "Entries in all audit chains"),
    Metric::gauge("keyward_pool_credentials", "credentials", &["provider", "state"], "Credentials stored or lent; state usable"),
    Metric::gauge("keyward_ready", "boolean", &[], "1 if a write was durable at the time of this reading, else 0"),
    Metric::gauge("keyward_clock_seconds", "seconds", &[], "The service's clock, as Unix time"),
    Metric::counter("keyward_admin_requests_total", "requests", &["method", "route", "status"], "Requests of the admin API"),
    Metric::histogram("keyward_admin_request_duration_seconds", "seconds", &["method", "route"], "Time that the admin API took to answer", FAST),
    Metric::counter("keyward_admin_unauthenticated_total", "requests", &[], "Calls of the admin API without a valid token"),
    Metric::gauge("keyward_build_info", "1", &["version"], "1; the label tells the version"),
    Metric::gauge("process_start_time_seconds", "seconds", &[], "When the process started, as Unix time"),
];

/// Handles, made once. What has no label here is 0 from the start, so that its first increase shows.
pub struct Handles {
    /// By provider, then `METHOD /path`; the last is for what the table of operations has not.
    admissions: HashMap<&'static str, (HashMap<String, Counter>, Counter)>,
    refusals: HashMap<Code, Counter>,
    edge_refusals: HashMap<&'static str, Counter>,
    models: RwLock<HashMap<String, HashMap<String, Arc<ModelHandles>>>>,
    prices: PriceTable,
    pub conflicts: Counter,
    pub edge_unauthenticated: Counter,
    pub edge_batches: Counter,
    pub admit_seconds: Histogram,
    pub settle_seconds: Histogram,
    pub settlements: Counter,
    pub voids: Counter,
    pub rotated: Counter,
    pub holds_expired: Counter,
    ends_told: HashMap<Code, Counter>,
    pub watch_polls: Counter,
    pub watch_everything: Counter,
    pub keys_frozen: Counter,
    pub alarms_sent: Counter,
    pub alarms_lost: Counter,
    pub records_missing: Counter,
    pub records_rejected: Counter,
    pub records_repeated: Counter,
    pub records_unknown: Counter,
    pub commit_group: Histogram,
    pub commit_seconds: Histogram,
    pub store_errors: Counter,
    pub holds: Gauge,
    pub oldest_hold_seconds: Gauge,
    /// Nanodollars. Money is never a float, and the recorder's gauges are: [`render`] writes it.
    pub reserved: AtomicI64,
    pub audit_entries: Gauge,
    pub ready: Gauge,
    pub clock: Gauge,
    pub admin_unauthenticated: Counter,
}

/// Counters of one model.
pub struct ModelHandles {
    pub input: Counter,
    pub cache_read: Counter,
    pub cache_write: Counter,
    pub output: Counter,
    pub spent: Counter,
    pub returned: Counter,
}

/// The process's recorder: one, however many services run in it.
pub fn recorder() -> &'static PrometheusHandle {
    &RECORDER.0
}

/// All metrics as Prometheus reads them.
pub fn render() -> String {
    let Metric { name, help, .. } = RESERVED;
    let reserved = handles().reserved.load(Ordering::Relaxed);
    format!("{}# HELP {name} {help}\n# TYPE {name} gauge\n{name} {reserved}\n", recorder().render())
}

/// The process's handles.
pub fn handles() -> &'static Handles {
    &RECORDER.1
}

static RECORDER: LazyLock<(PrometheusHandle, Handles)> = LazyLock::new(|| {
    let histograms = TABLE.iter().filter(|metric| metric.kind == Kind::Histogram);
    // Bounds are refused only when there are none.
    let with_buckets = |builder: PrometheusBuilder, metric: &Metric| {
        let named = Matcher::Full(metric.name.to_owned());
        builder.set_buckets_for_metric(named, metric.buckets).unwrap_or_else(|_| PrometheusBuilder::new())
    };
    let recorder = histograms.fold(PrometheusBuilder::new(), with_buckets).build_recorder();
    let handle = recorder.handle();
    // Somebody else's recorder may be installed already; then theirs is used and ours shows nothing.
    let _ = metrics::set_global_recorder(recorder);
    for metric in TABLE.iter().filter(|metric| metric.name != RESERVED.name) {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
    (handle, Handles::new())
});

impl Handles {
    fn new() -> Self {
        gauge!("keyward_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        gauge!("process_start_time_seconds").set(unix_seconds());
        for what in ["budget", "over_hold", "frozen", "credential_rejected", "credential_exhausted"] {
            counter!("keyward_alarms_total", "what" => what).increment(0);
        }
        let edge_refusal = |code: Code| counter!("keyward_edge_refusals_total", "reason" => code.name());
        Handles {
            admissions: PROVIDERS.iter().map(admissions).collect(),
            refusals: Code::ALL.iter().map(|code| (*code, refusal(*code))).collect(),
            edge_refusals: Code::ALL.iter().map(|code| (code.name(), edge_refusal(*code))).collect(),
            models: RwLock::default(),
            // A table that can't be read ends the start elsewhere; without one every model is another.
            prices: PriceTable::built_in().unwrap_or_default(),
            conflicts: counter!("keyward_admission_conflicts_total"),
            edge_unauthenticated: counter!("keyward_edge_unauthenticated_total"),
            edge_batches: counter!("keyward_edge_batches_total"),
            admit_seconds: histogram!("keyward_admit_duration_seconds"),
            settle_seconds: histogram!("keyward_settle_duration_seconds"),
            settlements: counter!("keyward_settlements_total"),
            voids: counter!("keyward_voids_total"),
            rotated: counter!("keyward_rotated_requests_total"),
            holds_expired: counter!("keyward_holds_expired_total"),
            ends_told: ENDS.iter().map(|code| (*code, counter!("keyward_ends_told_total", "reason" => code.name()))).collect(),
            watch_polls: counter!("keyward_edge_polls_total"),
            watch_everything: counter!("keyward_edge_polls_everything_total"),
            keys_frozen: counter!("keyward_keys_frozen_total"),
            alarms_sent: counter!("keyward_alarms_sent_total"),
            alarms_lost: counter!("keyward_alarms_lost_total"),
            records_missing: counter!("keyward_records_missing_total"),
            records_rejected: counter!("keyward_records_rejected_total"),
            records_repeated: counter!("keyward_records_repeated_total"),
            records_unknown: counter!("keyward_records_unknown_total"),
            commit_group: histogram!("keyward_commit_group_size"),
            commit_seconds: histogram!("keyward_commit_duration_seconds"),
            store_errors: counter!("keyward_store_errors_total"),
            holds: gauge!("keyward_holds"),
            oldest_hold_seconds: gauge!("keyward_hold_oldest_age_seconds"),
            reserved: AtomicI64::new(0),
            audit_entries: gauge!("keyward_audit_entries"),
            ready: gauge!("keyward_ready"),
            clock: gauge!("keyward_clock_seconds"),
            admin_unauthenticated: counter!("keyward_admin_unauthenticated_total"),
        }
    }

    /// A request for this provider's `METHOD /path` was admitted.
    pub fn admitted(&self, provider: &str, endpoint: &str) {
        if let Some((by_endpoint, other)) = self.admissions.get(provider) {
            by_endpoint.get(endpoint).unwrap_or(other).increment(1);
        }
    }

    pub fn refused(&self, code: Code) {
        match self.refusals.get(&code) {
            Some(counter) => counter.increment(1),
            None => refusal(code).increment(1),
        }
    }

    /// Tries at a provider ended with this status, or without any.
    pub fn tried(&self, provider: &str, status: Option<u16>, count: u64) {
        let provider = Provider::by_name(provider).map_or(OTHER, |provider| provider.name);
        let status = match status {
            None => "none".to_owned(),
            Some(status @ 100..=599) => status.to_string(),
            Some(_) => OTHER.to_owned(),
        };
        counter!("keyward_tries_total", "provider" => provider, "status" => status).increment(count);
    }

    /// A running request was told to end.
    pub fn told_to_end(&self, code: Code) {
        if let Some(counter) = self.ends_told.get(&code) {
            counter.increment(1);
        }
    }

    /// The gate refused so many without asking. `false`: this is no code of ours.
    pub fn edge_refused(&self, code: &str, count: u64) -> bool {
        self.edge_refusals.get(code).map(|counter| counter.increment(count)).is_some()
    }

    /// The counters of a model. `is_ours`: an operator has named it; the price table's are known without.
    pub fn model(&self, provider: &str, model: &str, is_ours: impl FnOnce() -> bool) -> Arc<ModelHandles> {
        let find = |models: &HashMap<String, HashMap<String, Arc<ModelHandles>>>| models.get(provider)?.get(model).cloned();
        if let Some(found) = self.models.read().ok().and_then(|models| find(&models)) {
            return found;
        }
        let known = self.prices.find(provider, model).is_some() || is_ours();
        let Ok(mut models) = self.models.write() else { return Arc::new(ModelHandles::new(OTHER, OTHER)) };
        let full = models.values().map(HashMap::len).sum::<usize>() >= MAX_MODELS;
        let (provider, model) = match Provider::by_name(provider) {
            None => (OTHER, OTHER),
            Some(provider) => (provider.name, if known && !full { model } else { OTHER }),
        };
        let of_provider = models.entry(provider.to_owned()).or_default();
        of_provider.entry(model.to_owned()).or_insert_with(|| Arc::new(ModelHandles::new(provider, model))).clone()
    }
}

impl ModelHandles {
    fn new(provider: &str, model: &str) -> Self {
        let (provider, model) = (provider.to_owned(), model.to_owned());
        let tokens = |direction: &'static str| counter!("keyward_tokens_total", "provider" => provider.clone(), "model" => model.clone(), "direction" => direction);
        ModelHandles {
            input: tokens("input"),
            cache_read: tokens("cache_read"),
            cache_write: tokens("cache_write"),
            output: tokens("output"),
            spent: counter!("keyward_spent_nanodollars_total", "provider" => provider.clone(), "model" => model.clone()),
            returned: counter!("keyward_returned_nanodollars_total", "provider" => provider.clone(), "model" => model.clone()),
        }
    }
}

fn admissions(provider: &'static Provider) -> (&'static str, (HashMap<String, Counter>, Counter)) {
    let counter = |operation: &'static str| counter!("keyward_admissions_total", "provider" => provider.name, "operation" => operation);
    let operations = OPERATIONS.iter().filter(|operation| carries(operation, operation.dialect, provider.dialect));
    let by_endpoint = operations.map(|o| (format!("{} {}", o.method, o.path), counter(o.name))).collect();
    (provider.name, (by_endpoint, counter(OTHER)))
}

fn refusal(code: Code) -> Counter {
    counter!("keyward_refusals_total", "reason" => code.name())
}

/// Unix time in seconds.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a caller can choose must not make series: a model that nobody named is one of the others.
    #[test]
    fn labels_are_bounded() {
        let handles = handles();
        for n in 0..2_000 {
            handles.model("openai", &format!("made-up-{n}"), || false).spent.increment(1);
            handles.model("nobody", &format!("gpt-4o-{n}"), || true).spent.increment(1);
            handles.model("anthropic", &format!("routed-{n}"), || true).spent.increment(1);
            handles.admitted("openai", &format!("POST /v1/{n}"));
        }
        handles.model("openai", "gpt-4o", || false).output.increment(3);
        let text = render();
        assert!(text.contains("keyward_spent_nanodollars_total{provider=\"openai\",model=\"other\"} 2000"), "{text}");
        assert!(text.contains("keyward_spent_nanodollars_total{provider=\"other\",model=\"other\"} 2000"));
        assert!(!text.contains("made-up") && !text.contains("gpt-4o-1"));
        assert!(text.matches("model=\"routed-").count() <= 6 * MAX_MODELS);
        assert!(text.contains("keyward_admissions_total{provider=\"openai\",operation=\"other\"} 2000"));
    }

    fn rows(table: &[Metric]) -> String {
        let labels = |metric: &Metric| metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
        let row = |m: &Metric| format!("| `{}` | {} | {} | {} | {} |\n", m.name, m.kind.name(), m.unit, labels(m), m.help);
        format!("| name | type | unit | labels | meaning |\n|---|---|---|---|---|\n{}", table.iter().map(row).collect::<String>())
    }

    /// What people read is what the code has. `UPDATE_DOCS=1` writes it.
    #[test]
    fn the_documentation_has_both_tables() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/metrics.md");
        let mut text = std::fs::read_to_string(path).unwrap();
        for (name, table) in [("service", TABLE), ("filter", &keyward_core::metrics::FILTER[..])] {
            let (start, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
            let (before, rest) = text.split_once(&start).unwrap();
            let (written, after) = rest.split_once(&end).unwrap();
            if std::env::var_os("UPDATE_DOCS").is_none() {
                assert_eq!(written, rows(table), "run: UPDATE_DOCS=1 cargo test -p keyward-policy-service the_documentation");
            }
            text = format!("{before}{start}{}{end}{after}", rows(table));
        }
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, text).unwrap();
        }
    }

    #[test]
    fn names_are_unique_and_end_as_prometheus_wants() {
        for (n, metric) in TABLE.iter().enumerate() {
            assert!(TABLE.iter().skip(n + 1).all(|other| other.name != metric.name), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
            assert_eq!(metric.buckets.is_empty(), metric.kind != Kind::Histogram, "{}", metric.name);
            if metric.unit == "seconds" {
                assert!(metric.name.ends_with("_seconds"), "{}", metric.name);
            }
        }
    }
}
