//! What a metric is, and the table of those that the filter tells Envoy. The service's own table stands beside its code.

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; starts again at zero with its process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts samples by size.
    Histogram,
}

impl Kind {
    /// Prometheus' word for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One metric, as its documentation and its HELP line say it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// Name in Prometheus.
    pub name: &'static str,
    pub kind: Kind,
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    /// One sentence without a full stop.
    pub help: &'static str,
    /// Upper bounds of a histogram's buckets, in its unit.
    pub buckets: &'static [f64],
}

impl Metric {
    pub const fn counter(name: &'static str, unit: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Metric { name, kind: Kind::Counter, unit, labels, help, buckets: &[] }
    }

    pub const fn gauge(name: &'static str, unit: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Metric { name, kind: Kind::Gauge, unit, labels, help, buckets: &[] }
    }

    pub const fn histogram(
        name: &'static str,
        unit: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        buckets: &'static [f64],
    ) -> Self {
        Metric { name, kind: Kind::Histogram, unit, labels, help, buckets }
    }
}

/// Metrics of the filter. Envoy shows them as `wasmcustom.NAME` in `/stats`, and by their bare name in `/stats/prometheus`.
pub static FILTER: [Metric; 17] = [
    Metric::counter("keyward_admitted_total", "requests", &[], "Requests admitted and sent on to a provider"),
    Metric::counter("keyward_refused_total", "requests", &[], "Requests refused by the gate, whoever decided it"),
    Metric::counter(
        "keyward_refused_by_reason_total",
        "requests",
        &["reason"],
        "The same by reason; where Envoy has no stats tag for it, keyward_refused_by_reason_REASON_total",
    ),
    Metric::histogram(
        "keyward_admission_wait_microseconds",
        "microseconds",
        &[],
        "Time from asking the policy service to its answer: what the admission adds to a request; those never answered do not count",
        &[],
    ),
    Metric::gauge("keyward_settlements_pending", "records", &[], "Records of ended requests that the policy service has not acknowledged"),
    Metric::counter(
        "keyward_settlement_batches_failed_total",
        "batches",
        &[],
        "Batches of records that got no answer; they are sent again",
    ),
    Metric::counter(
        "keyward_settlements_adopted_total",
        "records",
        &[],
        "Records that were left by a VM that trapped, and sent by another",
    ),
    Metric::counter("keyward_vm_starts_total", "VMs", &[], "VMs that started; each one after Envoy's own start is a reload after a trap"),
    Metric::gauge(
        "keyward_streams_open",
        "requests",
        &[],
        "Requests with a well-formed key that the gate has open, those that wait included",
    ),
    Metric::gauge("keyward_waiting_bytes", "bytes", &[], "Bytes of request bodies that wait for their admission"),
    Metric::counter(
        "keyward_streams_ended_total",
        "requests",
        &[],
        "Admitted requests that the gate ended before their end: revoked, expired, not allowed any more, out of money",
    ),
    Metric::counter(
        "keyward_streams_ended_by_reason_total",
        "requests",
        &["reason"],
        "The same by reason; where Envoy has no stats tag for it, keyward_streams_ended_by_reason_REASON_total",
    ),
    Metric::counter(
        "keyward_watch_polls_total",
        "calls",
        &[],
        "Questions for news of revocations and changes; one at a time for the whole Envoy",
    ),
    Metric::counter(
        "keyward_watch_polls_failed_total",
        "calls",
        &[],
        "Those that got no answer; they are asked again within half a second",
    ),
    Metric::gauge(
        "keyward_watch_silence_milliseconds",
        "milliseconds",
        &[],
        "Time since the policy service last answered such a question; it does so every 5 s when there is no news",
    ),
    Metric::counter(
        "keyward_watch_takeovers_total",
        "times",
        &[],
        "How often a worker began to ask for all: once at Envoy's start, and after each trap or standstill of the one that asked",
    ),
    Metric::gauge("keyward_held_bytes", "bytes", &[], "Bytes of answers that are held back until an event is whole"),
];

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn names_are_unique_and_counters_end_as_prometheus_wants() {
        for (n, metric) in FILTER.iter().enumerate() {
            assert!(FILTER.iter().skip(n + 1).all(|other| other.name != metric.name), "{}", metric.name);
            assert_eq!(metric.name.ends_with("_total"), metric.kind == Kind::Counter, "{}", metric.name);
        }
    }
}
