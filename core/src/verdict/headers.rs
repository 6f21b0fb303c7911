//! Rate limits as headers tell them. OpenAI, Azure, Groq and Mistral write `x-ratelimit-remaining-requests`, Anthropic
//! `anthropic-ratelimit-requests-remaining`, vendors `ratelimit-remaining`: a prefix, a field, and what is limited, in either order.

use super::time::{plain, plain_ms, wait};
use crate::gate::Headers;
use serde::{Deserialize, Serialize};

/// Headers that are looked at, and limits that are kept: far more than any provider sends.
const MAX_HEADERS: usize = 256;
const MAX_LIMITS: usize = 32;

/// What the account has left for this model, as the provider's headers tell. Of several limits of a kind, the one nearest its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Room {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Left>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Left>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    pub remaining: u64,
    /// Milliseconds from now until the limit is whole again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reset_ms: Option<u64>,
}

impl Left {
    /// A smaller share is left than of `other`; where a limit isn't told, a smaller number.
    fn is_tighter(self, other: Left) -> bool {
        match (self.limit, other.limit) {
            (Some(of), Some(of_other)) if of > 0 && of_other > 0 => {
                u128::from(self.remaining) * u128::from(of_other) < u128::from(other.remaining) * u128::from(of)
            }
            _ => self.remaining < other.remaining,
        }
    }
}

/// Reads the headers of any answer. `now_ms`: Unix milliseconds. `None` when they tell nothing.
pub fn room(headers: &Headers<'_>, now_ms: u64) -> Option<Room> {
    let limits = limits(headers, now_ms);
    let tightest = |tokens: bool| {
        let left = limits
            .iter()
            .filter(|limit| limit.is_of_tokens() == tokens)
            .filter_map(|limit| Some(Left { limit: limit.limit, remaining: limit.remaining?, reset_ms: limit.reset_ms }));
        left.reduce(|tightest, left| if left.is_tighter(tightest) { left } else { tightest })
    };
    let room = Room { requests: tightest(false), tokens: tightest(true) };
    (room.requests.is_some() || room.tokens.is_some()).then_some(room)
}

/// The longest time that a retry-after header names, in milliseconds from now.
pub fn retry_after(headers: &Headers<'_>, now_ms: u64) -> Option<u64> {
    let named = headers.iter().take(MAX_HEADERS).filter_map(|(name, value)| match *name {
        b"retry-after" => wait(value, now_ms),
        b"retry-after-ms" | b"x-ms-retry-after-ms" => plain_ms(value),
        _ => None,
    });
    named.max()
}

/// One limit, put together from its headers.
#[derive(Debug)]
pub struct Limit<'a> {
    what: (Family, &'a [u8]),
    limit: Option<u64>,
    remaining: Option<u64>,
    /// Milliseconds from now.
    pub reset_ms: Option<u64>,
    /// `anthropic-ratelimit-unified-5h-status` says what for others `remaining` says.
    rejects: Option<bool>,
}

impl Limit<'_> {
    /// Whether it may be this limit that turned a request away.
    pub fn binds(&self) -> bool {
        self.rejects.or(self.remaining.map(|left| left == 0)).unwrap_or(true)
    }

    fn is_of_tokens(&self) -> bool {
        let (family, name) = self.what;
        family == Family::BySize || name.windows(5).any(|part| part == b"token")
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Plain,
    /// Mistral's limits of a request's size: they count tokens.
    BySize,
}

#[derive(Debug, Clone, Copy)]
enum Field {
    Limit,
    Remaining,
    Reset,
    Status,
}

/// All limits that the headers tell of, with what could be read of each.
pub fn limits<'a>(headers: &Headers<'a>, now_ms: u64) -> Vec<Limit<'a>> {
    let mut limits: Vec<Limit<'a>> = Vec::new();
    for (name, value) in headers.iter().take(MAX_HEADERS) {
        let Some((what, field)) = parse(name) else { continue };
        let at = limits.iter().position(|limit| limit.what == what).unwrap_or(limits.len());
        if at == limits.len() {
            if at >= MAX_LIMITS {
                continue;
            }
            limits.push(Limit { what, limit: None, remaining: None, reset_ms: None, rejects: None });
        }
        let Some(limit) = limits.get_mut(at) else { continue };
        match field {
            Field::Limit => limit.limit = limit.limit.or(plain(value).map(|n| n.whole)),
            Field::Remaining => limit.remaining = limit.remaining.or(plain(value).map(|n| n.whole)),
            Field::Reset => limit.reset_ms = limit.reset_ms.max(wait(value, now_ms)),
            Field::Status => limit.rejects = Some(value.trim_ascii() == b"rejected"),
        }
    }
    limits
}

/// What a header is about, and which of its fields it is.
fn parse(name: &[u8]) -> Option<((Family, &[u8]), Field)> {
    const PREFIXES: [(&[u8], Family); 6] = [
        (b"x-ratelimit-", Family::Plain),
        (b"anthropic-ratelimit-", Family::Plain),
        (b"ratelimit-", Family::Plain),
        // Azure, for its reset only; the rest of the same limit is `x-ratelimit-`.
        (b"x-rate-limit-", Family::Plain),
        (b"ratelimitbysize-", Family::BySize),
        (b"x-ratelimitbysize-", Family::BySize),
    ];
    const FIELDS: [(&[u8], Field); 4] =
        [(b"limit", Field::Limit), (b"remaining", Field::Remaining), (b"reset", Field::Reset), (b"status", Field::Status)];
    let (rest, family) = PREFIXES.iter().find_map(|(prefix, family)| Some((name.strip_prefix(*prefix)?, *family)))?;
    FIELDS.iter().find_map(|(word, field)| {
        let first = rest.strip_prefix(*word);
        let what = match first {
            Some(b"") => b"",
            _ => first.and_then(|rest| rest.strip_prefix(b"-")).or_else(|| rest.strip_suffix(*word)?.strip_suffix(b"-"))?,
        };
        Some(((family, what), *field))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const NOW: u64 = 1_795_176_000_000;

    /// `lines`: `name: value`, one a line.
    fn with<T>(lines: &str, run: impl FnOnce(&Headers<'_>) -> T) -> T {
        let headers: Vec<(&[u8], &[u8])> = lines
            .lines()
            .filter_map(|line| line.trim().split_once(": "))
            .map(|(name, value)| (name.as_bytes(), value.as_bytes()))
            .collect();
        run(&headers)
    }

    fn left(limit: impl Into<Option<u64>>, remaining: u64, reset_ms: impl Into<Option<u64>>) -> Option<Left> {
        Some(Left { limit: limit.into(), remaining, reset_ms: reset_ms.into() })
    }

    fn seen(lines: &str) -> (Option<Left>, Option<Left>) {
        with(lines, |headers| room(headers, NOW)).map(|room| (room.requests, room.tokens)).unwrap_or_default()
    }

    #[test]
    fn room_of_each_provider() {
        let openai = "x-ratelimit-limit-requests: 500
            x-ratelimit-limit-tokens: 30000
            x-ratelimit-remaining-requests: 499
            x-ratelimit-remaining-tokens: 29975
            x-ratelimit-reset-requests: 120ms
            x-ratelimit-reset-tokens: 50ms";
        assert_eq!(seen(openai), (left(500, 499, 120), left(30_000, 29_975, 50)));
        let azure = "x-ratelimit-remaining-requests: 19
            x-ratelimit-remaining-tokens: 18240
            x-rate-limit-reset-tokens: 55";
        assert_eq!(seen(azure), (left(None, 19, None), left(None, 18_240, 55_000)));
        let anthropic = "anthropic-ratelimit-requests-limit: 4000
            anthropic-ratelimit-requests-remaining: 3999
            anthropic-ratelimit-requests-reset: 2026-11-20T12:00:01Z
            anthropic-ratelimit-input-tokens-limit: 400000
            anthropic-ratelimit-input-tokens-remaining: 399000
            anthropic-ratelimit-input-tokens-reset: 2026-11-20T12:00:00Z
            anthropic-ratelimit-output-tokens-limit: 80000
            anthropic-ratelimit-output-tokens-remaining: 4000
            anthropic-ratelimit-output-tokens-reset: 2026-11-20T12:00:57Z
            anthropic-ratelimit-tokens-limit: 480000
            anthropic-ratelimit-tokens-remaining: 403000
            anthropic-ratelimit-tokens-reset: 2026-11-20T12:00:00Z";
        assert_eq!(seen(anthropic), (left(4_000, 3_999, 1_000), left(80_000, 4_000, 57_000)));
        let mistral = "x-ratelimit-limit-req-minute: 60
            x-ratelimit-remaining-req-minute: 59
            x-ratelimit-limit-tokens-minute: 500000
            x-ratelimit-remaining-tokens-minute: 499992
            x-ratelimit-limit-tokens-month: 1000000000
            x-ratelimit-remaining-tokens-month: 1000000";
        assert_eq!(seen(mistral), (left(60, 59, None), left(1_000_000_000, 1_000_000, None)));
        let mistral_before = "ratelimitbysize-limit: 500000
            ratelimitbysize-remaining: 499997
            ratelimitbysize-reset: 42";
        assert_eq!(seen(mistral_before), (None, left(500_000, 499_997, 42_000)));
        let groq = "x-ratelimit-limit-requests: 14400
            x-ratelimit-remaining-requests: 14370
            x-ratelimit-reset-requests: 2m59.56s
            x-ratelimit-limit-tokens: 6000
            x-ratelimit-remaining-tokens: 5963
            x-ratelimit-reset-tokens: 370ms";
        assert_eq!(seen(groq), (left(14_400, 14_370, 179_560), left(6_000, 5_963, 370)));
        let cerebras = "x-ratelimit-limit-requests-day: 14400
            x-ratelimit-remaining-requests-day: 100
            x-ratelimit-reset-requests-day: 33011.382867
            x-ratelimit-limit-tokens-minute: 60000
            x-ratelimit-remaining-tokens-minute: 60000
            x-ratelimit-reset-tokens-minute: 11.38";
        assert_eq!(seen(cerebras), (left(14_400, 100, 33_011_383), left(60_000, 60_000, 11_380)));
        let openrouter = "x-ratelimit-limit: 50
            x-ratelimit-remaining: 7
            x-ratelimit-reset: 1795219200000";
        assert_eq!(seen(openrouter), (left(50, 7, 43_200_000), None));
        let resend = "ratelimit-limit: 2
            ratelimit-remaining: 1
            ratelimit-reset: 1
            ratelimit-policy: 2;w=1";
        assert_eq!(seen(resend), (left(2, 1, 1_000), None));
    }

    #[test]
    fn what_is_not_told_is_not_made_up() {
        for lines in [
            "content-type: application/json",
            "x-ratelimit-limit-requests: 500",
            "x-ratelimit-reset-requests: 1s",
            "x-ratelimit-remaining-requests: -1",
            "x-ratelimit-remaining-requests: ",
            "x-ratelimit-remaining-requests: 18446744073709551616",
            "x-ratelimit-remaining-requests: 10;w=60",
            "x-ratelimit-remaining: NaN",
            "x-ratelimit-remainingrequests: 5",
            "x-ratelimit-requestsremaining: 5",
            "remaining: 5",
            "anthropic-priority-input-tokens-remaining: 0",
        ] {
            assert_eq!(seen(lines), (None, None), "{lines}");
        }
        let repeated = "x-ratelimit-remaining-requests: x
            x-ratelimit-remaining-requests: 4
            x-ratelimit-remaining-requests: 9
            x-ratelimit-limit-requests: 0";
        assert_eq!(seen(repeated), (left(0, 4, None), None));
    }

    /// A provider that sends headers without end costs no more than one that sends many.
    #[test]
    fn work_is_bounded() {
        let names: Vec<String> = (0..5_000).map(|n| format!("x-ratelimit-remaining-thing{n}")).collect();
        let headers: Vec<(&[u8], &[u8])> = names.iter().map(|name| (name.as_bytes(), &b"1"[..])).collect();
        assert_eq!(limits(&headers, NOW).len(), MAX_LIMITS);
    }

    proptest! {
        #[test]
        fn any_headers_are_read(
            headers in proptest::collection::vec((
                "(x-ratelimit-|ratelimit-|anthropic-ratelimit-|)(limit|remaining|reset|requests|tokens|-){0,4}",
                proptest::collection::vec(any::<u8>(), 0..20),
            ), 0..12),
            now in any::<u64>(),
        ) {
            let mut headers: Vec<(&[u8], &[u8])> = headers.iter().map(|(name, value)| (name.as_bytes(), value.as_slice())).collect();
            let seen = room(&headers, now);
            for left in seen.into_iter().flat_map(|room| [room.requests, room.tokens]).flatten() {
                // What is said to be left stands in some header that says so.
                let says = |(name, value): &(&[u8], &[u8])| {
                    name.windows(9).any(|word| word == b"remaining") && plain(value).is_some_and(|n| n.whole == left.remaining)
                };
                prop_assert!(headers.iter().any(says), "{left:?}");
            }
            prop_assert_eq!(retry_after(&headers, now), None, "none of these names is a retry-after");
            headers.extend([(&b"x-other"[..], &b"1"[..]), (b"retry-after-ms", b"7")]);
            prop_assert_eq!((room(&headers, now), retry_after(&headers, now)), (seen, Some(7)), "another's header changes nothing");
        }
    }
}
