//! What was measured. Times are whole microseconds.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

/// The longest time told apart; longer ones count as this.
const LONGEST_US: u64 = 3_600_000_000;

#[derive(Debug)]
pub struct Report {
    /// Requests sent: answered, aborted or failed.
    requests: u64,
    /// Requests without a complete answer that were not aborted on purpose.
    errors: u64,
    aborted: u64,
    first_error: Option<String>,
    by_status: BTreeMap<u16, u64>,
    /// Body bytes received.
    bytes: u64,
    elapsed: Duration,
    latency: Times,
    /// Time to the first body byte, and between arrivals of body bytes; only asked of streams.
    stream: Option<(Times, Times)>,
}

impl Report {
    pub fn new(stream: bool) -> Self {
        Self {
            requests: 0,
            errors: 0,
            aborted: 0,
            first_error: None,
            by_status: BTreeMap::new(),
            bytes: 0,
            elapsed: Duration::ZERO,
            latency: Times::new(),
            stream: stream.then(|| (Times::new(), Times::new())),
        }
    }

    pub fn answered(&mut self, status: u16, bytes: u64, latency: Duration) {
        self.requests += 1;
        self.bytes += bytes;
        *self.by_status.entry(status).or_default() += 1;
        self.latency.record(latency);
    }

    /// The client walked away in the middle: no latency, since there was no end.
    pub fn aborted(&mut self, status: u16, bytes: u64) {
        self.requests += 1;
        self.aborted += 1;
        self.bytes += bytes;
        *self.by_status.entry(status).or_default() += 1;
    }

    pub fn failed(&mut self, why: &impl fmt::Display) {
        self.requests += 1;
        self.errors += 1;
        self.first_error.get_or_insert_with(|| why.to_string());
    }

    pub fn first_byte(&mut self, after: Duration) {
        if let Some((first_byte, _)) = &mut self.stream {
            first_byte.record(after);
        }
    }

    pub fn gap(&mut self, gap: Duration) {
        if let Some((_, gaps)) = &mut self.stream {
            gaps.record(gap);
        }
    }

    pub fn ended(&mut self, elapsed: Duration) {
        self.elapsed = elapsed;
    }

    pub fn to_json(&self) -> Value {
        let by_status = self.by_status.iter().map(|(status, count)| (status.to_string(), json!(count)));
        json!({
            "requests": self.requests,
            "errors": self.errors,
            "aborted": self.aborted,
            "first_error": self.first_error,
            "by_status": Value::Object(by_status.collect()),
            "elapsed_us": micros(self.elapsed),
            "rps": self.answers_per_second(),
            "latency_us": self.latency.to_json(),
            "ttfb_us": self.stream.as_ref().map(|(first_byte, _)| first_byte.to_json()),
            "gap_us": self.stream.as_ref().map(|(_, gaps)| gaps.to_json()),
            "bytes": self.bytes,
        })
    }

    fn answers_per_second(&self) -> u64 {
        let answers = u128::from(self.requests - self.errors - self.aborted);
        let per_second = answers * 1_000_000 / self.elapsed.as_micros().max(1);
        u64::try_from(per_second).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} requests, {} errors, {} aborted", self.requests, self.errors, self.aborted)?;
        if let Some(why) = &self.first_error {
            writeln!(f, "first error: {why}")?;
        }
        for (status, count) in &self.by_status {
            writeln!(f, "status {status}: {count}")?;
        }
        writeln!(f, "{} us, {} answers/s, {} bytes", micros(self.elapsed), self.answers_per_second(), self.bytes)?;
        writeln!(f, "latency    {}", self.latency)?;
        if let Some((first_byte, gaps)) = &self.stream {
            writeln!(f, "first byte {first_byte}")?;
            writeln!(f, "gap        {gaps}")?;
        }
        Ok(())
    }
}

/// A distribution of durations, exact to three digits.
#[derive(Debug)]
struct Times(Histogram<u64>);

impl Times {
    fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3);
        Self(histogram.unwrap_or_else(|why| unreachable!("these bounds are valid: {why}")))
    }

    fn record(&mut self, time: Duration) {
        self.0.saturating_record(micros(time));
    }

    fn percentiles(&self) -> [(&'static str, u64); 5] {
        [
            ("p50", self.0.value_at_quantile(0.5)),
            ("p90", self.0.value_at_quantile(0.9)),
            ("p99", self.0.value_at_quantile(0.99)),
            ("p999", self.0.value_at_quantile(0.999)),
            ("max", self.0.max()),
        ]
    }

    fn to_json(&self) -> Value {
        Value::Object(self.percentiles().into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.percentiles() {
            write!(f, " {name} {value} us")?;
        }
        Ok(())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut times = Times::new();
        for us in 1..=1000 {
            times.record(Duration::from_micros(us));
        }
        assert_eq!(times.percentiles(), [("p50", 500), ("p90", 900), ("p99", 990), ("p999", 999), ("max", 1000)]);
    }

    #[test]
    fn nothing_recorded_is_zero_and_too_long_is_the_longest() {
        let mut times = Times::new();
        assert!(times.percentiles().iter().all(|(_, value)| *value == 0));
        times.record(Duration::from_secs(1_000_000));
        // The histogram gives the upper end of a bucket, which is one part in a thousand wide.
        assert!((LONGEST_US..LONGEST_US + LONGEST_US / 500).contains(&times.0.max()));
    }

    #[test]
    fn the_json_holds_what_happened() {
        let mut report = Report::new(false);
        report.answered(200, 10, Duration::from_micros(100));
        report.answered(429, 5, Duration::from_micros(200));
        report.aborted(200, 3);
        report.failed(&"refused");
        report.failed(&"refused again");
        report.ended(Duration::from_millis(500));
        let latency = json!({"p50": 100, "p90": 200, "p99": 200, "p999": 200, "max": 200});
        assert_eq!(
            report.to_json(),
            json!({
                "requests": 5, "errors": 2, "aborted": 1, "first_error": "refused",
                "by_status": {"200": 2, "429": 1}, "elapsed_us": 500_000, "rps": 4,
                "latency_us": latency, "ttfb_us": null, "gap_us": null, "bytes": 18,
            })
        );
    }
}
