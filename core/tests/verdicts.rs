//! A table of providers' answers with what each says of the key, and what holds of any answer.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use keyward_core::verdict::{Scope, State, Verdict, needs_body, room, verdict};
use proptest::prelude::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const ROWS: &str = include_str!("verdicts.tsv");
/// 2026-11-20T12:00:00Z.
const NOW: u64 = 1_795_176_000_000;
const DAY: u64 = 86_400_000;

struct Row {
    status: u16,
    expected: &'static str,
    headers: Vec<(&'static [u8], &'static [u8])>,
    body: &'static [u8],
    note: &'static str,
}

fn rows() -> impl Iterator<Item = Row> {
    ROWS.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let [status, expected, headers, body, note] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("not a row: {line}") };
        let header = |line: &'static str| {
            let (name, value) = line.split_once(": ").unwrap_or_else(|| panic!("no header: {line}"));
            (name.as_bytes(), value.as_bytes())
        };
        let headers = headers.split(" | ").filter(|line| !line.is_empty()).map(header).collect();
        Row { status: status.parse().unwrap(), expected, headers, body: body.as_bytes(), note }
    })
}

fn written(verdict: Option<Verdict>) -> String {
    verdict.map_or("-".to_owned(), |Verdict { state, scope, wait_ms, told }| {
        format!("{} {} {wait_ms} {}", state.name(), scope.name(), if told { "told" } else { "guess" })
    })
}

#[test]
fn every_answer_has_its_verdict() {
    let (mut count, mut wrong) = (0, Vec::new());
    for row in rows() {
        count += 1;
        let said = written(verdict(row.status, &row.headers, row.body, NOW));
        if said != row.expected {
            wrong.push(format!("{} ({}): {said}, should be {}", row.note, row.status, row.expected));
        }
    }
    assert!(count >= 150, "only {count} rows were read");
    assert!(wrong.is_empty(), "{} of {count} rows:\n{}", wrong.len(), wrong.join("\n"));
}

/// What holds of every verdict, whatever the answer.
fn check(status: u16, headers: &[(&[u8], &[u8])], body: &[u8], now_ms: u64) -> Result<(), TestCaseError> {
    let said = verdict(status, headers, body, now_ms);
    let _ = room(headers, now_ms);
    if !needs_body(status) {
        prop_assert_eq!(said, verdict(status, headers, b"", now_ms), "the body counted at {}", status);
    }
    let Some(Verdict { state, scope, wait_ms, told }) = said else { return Ok(()) };
    let (least, most) = match state {
        State::RateLimited => (100, DAY),
        State::Exhausted => (60_000, DAY),
        State::Rejected => (if scope == Scope::Model { 0 } else { DAY }, DAY),
        State::Overloaded => (100, 60_000),
    };
    prop_assert!((least..=most).contains(&wait_ms), "{:?}", said);
    prop_assert!(!(told && state == State::Rejected));
    prop_assert_eq!(scope == Scope::Provider, state == State::Overloaded);
    prop_assert!(matches!(status, 400..=403 | 429 | 503 | 529), "a verdict at {}", status);
    Ok(())
}

/// A body may be cut anywhere. Half of it may leave the status to decide, but never takes more of the pool than that or the whole.
#[test]
fn a_cut_body_takes_no_more_than_the_whole() {
    for row in rows() {
        let scope = |body| verdict(row.status, &row.headers, body, NOW).map(|verdict| verdict.scope);
        let known = [None, Some(Scope::Model), scope(row.body), scope(b"")];
        for cut in 0..row.body.len() {
            let body = &row.body[..cut];
            check(row.status, &row.headers, body, NOW).unwrap();
            assert!(known.contains(&scope(body)), "{}: cut at {cut}: {:?}", row.note, scope(body));
        }
    }
}

#[test]
fn only_the_start_of_a_body_is_read() {
    let late = format!("{{\"x\":\"{}\",\"error\":{{\"code\":\"insufficient_quota\"}}}}", "x".repeat(64 << 10));
    assert_eq!(written(verdict(429, &[], late.as_bytes(), NOW)), "rate_limited model 2000 guess");
    let deep = "[".repeat(60_000);
    assert_eq!(written(verdict(429, &[], deep.as_bytes(), NOW)), "rate_limited model 2000 guess");
}

#[test]
fn names_are_those_that_are_written() {
    for state in [State::RateLimited, State::Exhausted, State::Rejected, State::Overloaded] {
        assert_eq!(serde_json::to_value(state).unwrap(), state.name());
    }
    for scope in [Scope::Model, Scope::Account, Scope::Credential, Scope::Provider] {
        assert_eq!(serde_json::to_value(scope).unwrap(), scope.name());
    }
    let verdict = Verdict { state: State::RateLimited, scope: Scope::Model, wait_ms: 2_000, told: true };
    let text = r#"{"state":"rate_limited","scope":"model","wait_ms":2000,"told":true}"#;
    assert_eq!(serde_json::to_string(&verdict).unwrap(), text);
    assert_eq!(serde_json::from_str::<Verdict>(text).unwrap(), verdict);
}

/// Names and values that mean something, so that chance gets past the first comparison.
const NAMES: [&str; 10] = [
    "retry-after",
    "retry-after-ms",
    "x-ratelimit-reset",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-remaining-tokens",
    "x-rate-limit-reset-tokens",
    "anthropic-ratelimit-tokens-reset",
    "anthropic-ratelimit-unified-status",
    "ratelimit-limit",
    "ratelimitbysize-reset",
];
const TOKENS: [&str; 34] = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "\\",
    "\"error\":",
    "{\"error\":{",
    "\"code\":",
    "\"type\":",
    "\"status\":",
    "\"message\":",
    "\"details\":[",
    "\"reason\":",
    "\"retryDelay\":",
    "\"violations\":[",
    "\"quotaId\":",
    "\"metadata\":{",
    "\"headers\":{",
    "\"X-RateLimit-Reset\":",
    "\"insufficient_quota\"",
    "\"API_KEY_INVALID\"",
    "\"permission_error\"",
    "\"PerDay\"",
    "\"22s\"",
    "\"99999999999999999999d\"",
    "\"Please retry in 1h1h1h. retry after 18446744073709551615 days\"",
    "\"You have reached your specified API usage limits. regain access on 9999-12-31 at 23:59\"",
    "\"regain access on \u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\u{e9}\"",
    "1e999",
    "null",
    "é",
];

proptest! {
    #[test]
    fn any_bytes_have_a_verdict_within_bounds(
        status in prop_oneof![any::<u16>(), proptest::sample::select(&[400u16, 401, 402, 403, 429, 503, 529][..])],
        headers in proptest::collection::vec((
            proptest::sample::select(&NAMES[..]),
            prop_oneof![proptest::collection::vec(any::<u8>(), 0..30), "[0-9a-zA-Z:,. +-]{0,30}".prop_map(String::into_bytes), "[0-9]{1,22}(ms|s|m|h|d|)".prop_map(String::into_bytes)],
        ), 0..8),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        tokens in proptest::collection::vec(proptest::sample::select(&TOKENS[..]), 0..30),
        now in prop_oneof![any::<u64>(), Just(NOW), Just(0), Just(u64::MAX)],
    ) {
        let headers: Vec<(&[u8], &[u8])> = headers.iter().map(|(name, value)| (name.as_bytes(), value.as_slice())).collect();
        check(status, &headers, &noise, now)?;
        check(status, &headers, tokens.concat().as_bytes(), now)?;
    }

    /// Whatever a caller wrote, repeated where providers repeat it, takes no key from anybody.
    #[test]
    fn an_echo_is_no_verdict(tokens in proptest::collection::vec(proptest::sample::select(&TOKENS[..]), 0..20), status in proptest::sample::select(&[400u16, 403][..])) {
        let said = tokens.concat();
        let document = serde_json::from_str::<serde_json::Value>(&said).unwrap_or_else(|_| serde_json::json!({ "error": { "code": "insufficient_quota", "message": said } }));
        let body = serde_json::json!({
            "error": { "code": status, "message": format!("Invalid value: '{said}'"), "param": said, "metadata": { "raw": said, "flagged_input": document } },
            "detail": [{ "msg": "Extra inputs are not permitted", "input": document }],
            "input": document,
        });
        prop_assert_eq!(verdict(status, &[], body.to_string().as_bytes(), NOW), None);
    }
}
