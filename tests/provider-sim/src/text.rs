//! Small renderings both dialects share: JSON strings, durations, times, identifiers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A JSON string literal.
pub fn quoted(text: &str) -> String {
    serde_json::to_string(text).unwrap_or_else(|_| "\"\"".into())
}

/// A duration as OpenAI's reset headers have it: `20ms`, `1.5s`, `6m0s`.
pub fn duration(ms: u64) -> String {
    let (minutes, seconds, millis) = (ms / 60_000, ms / 1000 % 60, ms % 1000);
    match (minutes, seconds, millis) {
        (0, 0, _) => format!("{millis}ms"),
        (0, _, 0) => format!("{seconds}s"),
        (0, ..) => format!("{seconds}.{}s", format!("{millis:03}").trim_end_matches('0')),
        _ => format!("{minutes}m{seconds}s"),
    }
}

/// RFC 3339 in UTC, from seconds since 1970.
pub fn rfc3339(unix: u64) -> String {
    let (days, second) = (unix / 86_400, unix % 86_400);
    // Days to civil date by 400-year eras that start on 1 March 0000.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

pub fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

/// Identifiers that don't repeat in a process nor, by its start time, across processes.
pub fn identifier(prefix: &str, length: usize) -> String {
    static STATE: AtomicU64 = AtomicU64::new(0);
    if STATE.load(Ordering::Relaxed) == 0 {
        STATE.fetch_add(unix_us(), Ordering::Relaxed);
    }
    const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut made = String::with_capacity(prefix.len() + length);
    made.push_str(prefix);
    let mut word = 0;
    for i in 0..length {
        if i % 10 == 0 {
            // splitmix64
            word = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^= word >> 31;
        }
        made.push(char::from(ALPHABET[usize::try_from(word % 62).unwrap_or(0)]));
        word /= 62;
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_times_read_as_the_providers_write_them() {
        let durations = [0, 20, 1000, 1500, 59_001, 60_000, 360_000].map(duration);
        assert_eq!(durations, ["0ms", "20ms", "1s", "1.5s", "59.001s", "1m0s", "6m0s"]);
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_795_181_726), "2026-11-20T13:35:26Z");
    }

    #[test]
    fn identifiers_differ() {
        let (first, second) = (identifier("req_", 24), identifier("req_", 24));
        assert_eq!(first.len(), 28);
        assert_ne!(first, second);
    }
}
