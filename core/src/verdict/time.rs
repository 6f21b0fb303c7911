//! Times as providers write them: a duration, a number of seconds, a Unix time, an RFC 3339 time, an HTTP-date.

/// Longest text that is read as a time.
const MAX_TEXT: usize = 64;
const NS_PER_MS: u128 = 1_000_000;
const NS_PER_SECOND: u64 = 1_000_000_000;
/// Seconds from here on are a Unix time: as a wait it would be 31 years.
const UNIX_SECONDS: u64 = 1_000_000_000;
/// From here on it is a Unix time in milliseconds: in seconds it would be the year 5138.
const UNIX_MS: u64 = 100_000_000_000;

/// A number that isn't negative: its whole part, and billionths; digits after these are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Number {
    pub whole: u64,
    nanos: u64,
}

impl Number {
    /// Milliseconds, rounded up, when each one is a unit of so many nanoseconds.
    fn ms(self, unit_ns: u64) -> Option<u64> {
        to_ms(self.ns(unit_ns))
    }

    fn ns(self, unit_ns: u64) -> u128 {
        let unit = u128::from(unit_ns);
        // Neither term reaches 2^64 * 2^64.
        u128::from(self.whole) * unit + u128::from(self.nanos) * unit / u128::from(NS_PER_SECOND)
    }
}

fn to_ms(ns: u128) -> Option<u64> {
    u64::try_from(ns.div_ceil(NS_PER_MS)).ok()
}

/// Milliseconds to wait, from a header's value or a body's field. A time that has passed tells nothing: `None`.
pub fn wait(text: &[u8], now_ms: u64) -> Option<u64> {
    let text = short(text)?;
    let moment = match (plain(text), duration(text)) {
        (Some(n), _) if n.whole >= UNIX_MS => n.whole,
        (Some(n), _) if n.whole >= UNIX_SECONDS => n.ms(NS_PER_SECOND)?,
        (Some(n), _) => return n.ms(NS_PER_SECOND),
        (None, Some((ms, []))) => return Some(ms),
        _ => {
            let text = std::str::from_utf8(text).ok()?;
            rfc3339(text).or_else(|| http_date(text, now_ms))?
        }
    };
    moment.checked_sub(now_ms).filter(|wait| *wait > 0)
}

/// A whole text that is a plain number of milliseconds.
pub fn plain_ms(text: &[u8]) -> Option<u64> {
    plain(short(text)?)?.ms(1_000_000)
}

/// A whole text that is a plain number.
pub fn plain(text: &[u8]) -> Option<Number> {
    number(short(text)?).filter(|(_, rest)| rest.is_empty()).map(|(n, _)| n)
}

fn short(text: &[u8]) -> Option<&[u8]> {
    (text.len() <= MAX_TEXT).then(|| text.trim_ascii())
}

/// The number that a text begins with, and what follows.
fn number(text: &[u8]) -> Option<(Number, &[u8])> {
    let digits = |text: &[u8]| text.iter().take_while(|b| b.is_ascii_digit()).count();
    let (whole, mut rest) = text.split_at_checked(digits(text))?;
    if whole.is_empty() {
        return None;
    }
    let whole = whole.iter().try_fold(0u64, |n, b| n.checked_mul(10)?.checked_add(u64::from(b - b'0')))?;
    let mut nanos = 0;
    if let Some((fraction, after)) = rest.strip_prefix(b".").and_then(|tail| tail.split_at_checked(digits(tail)))
        && !fraction.is_empty()
    {
        nanos = fraction.iter().chain(std::iter::repeat(&b'0')).take(9).fold(0, |n, b| n * 10 + u64::from(b - b'0'));
        rest = after;
    }
    Some((Number { whole, nanos }, rest))
}

/// The duration that a text begins with, in milliseconds, and what follows: Go's form ("1h2m3.5s", "20ms"), protobuf's ("22s"), or
/// words ("26 seconds").
pub fn duration(text: &[u8]) -> Option<(u64, &[u8])> {
    let (mut ns, mut rest) = (None, text);
    while let Some((n, after)) = number(rest) {
        let after = after.strip_prefix(b" ").unwrap_or(after);
        let len = after.iter().take_while(|b| b.is_ascii_alphabetic() || !b.is_ascii()).count();
        let (word, tail) = after.split_at_checked(len)?;
        ns = Some(ns.unwrap_or(0u128).checked_add(n.ns(unit(word)?))?);
        rest = tail;
    }
    Some((to_ms(ns?)?, rest))
}

/// Nanoseconds of a unit.
fn unit(word: &[u8]) -> Option<u64> {
    Some(match word {
        b"ns" => 1,
        // Both letters that look like a Greek mu.
        b"us" | b"\xc2\xb5s" | b"\xce\xbcs" => 1_000,
        b"ms" | b"milliseconds" => 1_000_000,
        b"s" | b"sec" | b"secs" | b"second" | b"seconds" => NS_PER_SECOND,
        b"m" | b"min" | b"mins" | b"minute" | b"minutes" => 60 * NS_PER_SECOND,
        b"h" | b"hr" | b"hour" | b"hours" => 3_600 * NS_PER_SECOND,
        b"d" | b"day" | b"days" => 86_400 * NS_PER_SECOND,
        _ => return None,
    })
}

/// Unix milliseconds of an RFC 3339 time.
pub fn rfc3339(text: &str) -> Option<u64> {
    let (date, time) = text.split_once(['T', 't', ' '])?;
    let mut date = date.split('-');
    let (year, month, day) = (digits(date.next()?, 4)?, digits(date.next()?, 2)?, digits(date.next()?, 2)?);
    if date.next().is_some() {
        return None;
    }
    let midnight = midnight(year, month, day)?;
    if let Some(time) = time.strip_suffix(['Z', 'z']) {
        return Some(midnight + clock(time)?);
    }
    let (time, offset) = time.split_at_checked(time.rfind(['+', '-'])?)?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let (hours, minutes) = (digits(hours, 2).filter(|h| *h < 24)?, digits(minutes, 2).filter(|m| *m < 60)?);
    let (here, offset_ms) = (midnight + clock(time)?, (hours * 60 + minutes) * 60_000);
    if offset.starts_with('-') { here.checked_add(offset_ms) } else { here.checked_sub(offset_ms) }
}

/// Unix milliseconds of an HTTP-date (RFC 9110, section 5.6.7) in any of its three forms. The weekday isn't looked at.
fn http_date(text: &str, now_ms: u64) -> Option<u64> {
    let Some((_, rest)) = text.split_once(", ") else {
        // asctime: Sun Nov  6 08:49:37 1994
        let mut parts = text.split_ascii_whitespace().skip(1);
        let (month, day, time, year) = (month(parts.next()?)?, parts.next()?, parts.next()?, digits(parts.next()?, 4)?);
        let day = digits(day, day.len().clamp(1, 2))?;
        return parts.next().is_none().then_some(midnight(year, month, day)? + clock(time)?);
    };
    let (date, time) = rest.strip_suffix(" GMT")?.rsplit_once(' ')?;
    let mut parts = date.split([' ', '-']);
    let (day, month, year) = (digits(parts.next()?, 2)?, month(parts.next()?)?, parts.next()?);
    let year = match digits(year, 2) {
        Some(short) if date.contains('-') => {
            // Two digits that seem more than 50 years ahead are of the century before.
            let this_year = 1970 + now_ms / 31_556_952_000;
            let year = this_year / 100 * 100 + short;
            if year > this_year + 50 { year - 100 } else { year }
        }
        _ => digits(year, 4)?,
    };
    parts.next().is_none().then_some(midnight(year, month, day)? + clock(time)?)
}

fn month(name: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    (1..).zip(MONTHS).find(|(_, month)| month.eq_ignore_ascii_case(name)).map(|(n, _)| n)
}

/// Exactly so many digits.
fn digits(text: &str, len: usize) -> Option<u64> {
    (text.len() == len && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Milliseconds since midnight of `HH:MM:SS`, with or without a fraction. A leap second is the first one of the next day.
fn clock(text: &str) -> Option<u64> {
    let mut parts = text.split(':');
    let (hour, minute, second) = (digits(parts.next()?, 2)?, digits(parts.next()?, 2)?, parts.next()?);
    let (second, fraction) = second.split_once('.').unwrap_or((second, "0"));
    let second = digits(second, 2)?;
    let fits = hour < 24 && minute < 60 && second <= 60 && parts.next().is_none() && !fraction.is_empty();
    if !fits || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let ms = fraction.bytes().chain(std::iter::repeat(b'0')).take(3).fold(0, |n, b| n * 10 + u64::from(b - b'0'));
    Some(((hour * 60 + minute) * 60 + second) * 1_000 + ms)
}

/// Unix milliseconds at which a day begins; `None` for a day that there isn't, or before 1970. `year` has at most four digits.
fn midnight(year: u64, month: u64, day: u64) -> Option<u64> {
    const BEFORE: [u64; 13] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334, 365];
    let leaps_before = |year: u64| (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400;
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let at = usize::try_from(month).ok()?;
    let (before, after) = (BEFORE.get(at.checked_sub(1)?)?, BEFORE.get(at)?);
    let length = after - before + u64::from(month == 2 && is_leap);
    if year < 1970 || day == 0 || day > length {
        return None;
    }
    let days = (year - 1970) * 365 + leaps_before(year) - leaps_before(1970) + before + u64::from(month > 2 && is_leap) + day - 1;
    Some(days * 86_400_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// 2026-11-20T12:00:00Z, as `date -u` has it.
    const NOW: u64 = 1_795_176_000_000;

    /// Every form of a time a minute away, and the same minute in forms that say how far it is.
    #[test]
    fn one_minute_in_every_form() {
        for text in [
            "60",
            "60.0",
            " 60 ",
            "60s",
            "1m",
            "1m0s",
            "0h1m0s",
            "60000ms",
            "59999.5ms500us",
            "60000000us",
            "60000000\u{b5}s",
            "60000000\u{3bc}s",
            "60000000000ns",
            "0.0166666666666h0.000000001s",
            "1 minute",
            "60 seconds",
            "1795176060",
            "1795176060.0",
            "1795176060000",
            "2026-11-20T12:01:00Z",
            "2026-11-20t12:01:00z",
            "2026-11-20 12:01:00Z",
            "2026-11-20T12:01:00.000000000Z",
            "2026-11-20T12:01:00+00:00",
            "2026-11-20T12:01:00-00:00",
            "2026-11-20T14:01:00+02:00",
            "2026-11-20T06:31:00.0-05:30",
            "2026-11-21T02:01:00+14:00",
            "2026-11-19T12:31:00-23:30",
            "2026-11-20T12:00:60Z",
            "Fri, 20 Nov 2026 12:01:00 GMT",
            "Friday, 20-Nov-26 12:01:00 GMT",
            "Fri Nov 20 12:01:00 2026",
        ] {
            assert_eq!(wait(text.as_bytes(), NOW), Some(60_000), "{text}");
        }
    }

    #[test]
    fn other_lengths() {
        for (text, expected) in [
            ("0", 0),
            ("0s", 0),
            ("0.0004", 1),
            ("20ms", 20),
            ("0.5s", 500),
            ("7.66s", 7_660),
            ("6m0s", 360_000),
            ("1h2m3.5s", 3_723_500),
            ("1d2h", 93_600_000),
            ("17h31m12.345s", 63_072_345),
            ("999999999", 999_999_999_000),
            ("2026-11-20T12:00:00.25Z", 250),
            ("2026-11-20T12:00:00.2509Z", 250),
            ("Tue Dec  1 12:00:00 2026", 11 * 86_400_000),
            ("Tue Dec 1 12:00:00 2026", 11 * 86_400_000),
        ] {
            assert_eq!(wait(text.as_bytes(), NOW), Some(expected), "{text}");
        }
        assert_eq!(plain_ms(b"1432.2"), Some(1_433));
        assert_eq!(duration(b"1m26.4s. Visit"), Some((86_400, &b". Visit"[..])));
        assert_eq!(duration(b"2. Then"), None);
    }

    /// What isn't a time, or has passed, must not become a wait of nothing.
    #[test]
    fn what_is_no_time() {
        let long = "0".repeat(65);
        for text in [
            "",
            " ",
            "-1",
            "-5s",
            "+5",
            "NaN",
            "inf",
            "1e3",
            "0x10",
            "1.",
            ".5",
            "1,5",
            "5, 10",
            "5s 10s",
            "5x",
            "5s3",
            "s",
            "ms",
            "soon",
            "\u{665}",
            "99999999999999999999",
            "18446744073709551615d",
            "18446744073709551616ms",
            &long,
            "1795175999",
            "1795176000",
            "1795175999999",
            "2026-11-20T11:59:59Z",
            "2026-11-20T12:00:00Z",
            "2026-11-20T12:01:00",
            "2026-11-20T12:01Z",
            "2026-11-20",
            "2026-11-20T12:01:00.Z",
            "2026-11-20T12:01:00.5.5Z",
            "2026-11-20T24:00:00Z",
            "2026-11-20T12:60:00Z",
            "2026-11-20T12:00:61Z",
            "2026-13-20T12:01:00Z",
            "2026-00-20T12:01:00Z",
            "2026-11-31T12:01:00Z",
            "2026-11-00T12:01:00Z",
            "2027-02-29T12:01:00Z",
            "2100-02-29T12:01:00Z",
            "2026-11-20T12:01:00+24:00",
            "2026-11-20T12:01:00+0200",
            "2026-11-20-01T12:01:00Z",
            "02026-11-20T12:01:00Z",
            "1960-01-01T00:00:00Z",
            "1970-01-01T00:00:00+01:00",
            "Fri, 20 Nov 2026 12:01:00",
            "Fri, 20 Nov 2026 12:01:00 CET",
            "Fri, 20 Nov 26 12:01:00 GMT",
            "Fri, 20 Nev 2026 12:01:00 GMT",
            "Fri, 31 Nov 2026 12:01:00 GMT",
            "Friday, 20-Nov-026 12:01:00 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
            "Fri Nov 120 12:01:00 2026",
            "Fri Nov 20 12:01:00 2026 GMT",
        ] {
            assert_eq!(wait(text.as_bytes(), NOW), None, "{text}");
        }
        assert_eq!(wait(b"\xff\xfe", NOW), None);
        assert_eq!(plain_ms(b"20ms"), None);
    }

    /// Seconds as `date -u -d ... +%s` has them.
    #[test]
    fn days_are_counted_through_leap_years() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("1972-02-29T00:00:00Z", 68_169_600),
            ("2000-02-29T23:59:59Z", 951_868_799),
            ("2000-03-01T00:00:00Z", 951_868_800),
            ("2024-02-29T12:00:00Z", 1_709_208_000),
            ("2024-12-31T00:00:00Z", 1_735_603_200),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
            ("2400-02-29T00:00:00Z", 13_574_563_200),
            ("9999-12-31T23:59:59Z", 253_402_300_799),
        ] {
            assert_eq!(rfc3339(text), Some(seconds * 1_000), "{text}");
        }
    }

    #[test]
    fn all_http_dates_are_one_moment() {
        for text in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(http_date(text, NOW), Some(784_111_777_000), "{text}");
        }
        let year = |short: u32| http_date(&format!("Sunday, 01-Mar-{short:02} 00:00:00 GMT"), NOW).map(|ms| 1970 + ms / 31_556_952_000);
        assert_eq!([76, 77, 0].map(year), [Some(2076), Some(1977), Some(2000)], "two digits are at most 50 years ahead");
    }

    proptest! {
        /// No text, however odd, makes it panic; whatever is read again after being written is the same.
        #[test]
        fn any_text_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..80), text in "[0-9a-zA-Z:,.+ -]{0,40}", now in any::<u64>()) {
            for text in [bytes.as_slice(), text.as_bytes()] {
                let _ = (wait(text, now), duration(text), plain_ms(text));
                let _ = std::str::from_utf8(text).map(|text| (rfc3339(text), http_date(text, now)));
            }
        }

        #[test]
        fn every_day_follows_its_day_before(days in 0u64..2_900_000) {
            // An independent count: the limits have one that goes from days to dates.
            let (year, month, day) = crate::limits::date(days);
            prop_assert_eq!(midnight(year, month.into(), day.into()), Some(days * 86_400_000));
        }

        #[test]
        fn durations_add_up(h in 0u64..100, m in 0u64..60, s in 0u64..60, ms in 0u64..1_000) {
            let expected = ((h * 60 + m) * 60 + s) * 1_000 + ms;
            prop_assert_eq!(wait(format!("{h}h{m}m{s}.{ms:03}s").as_bytes(), NOW), Some(expected));
            prop_assert_eq!(wait(format!("{}.{ms:03}", (h * 60 + m) * 60 + s).as_bytes(), NOW), Some(expected));
        }
    }
}
