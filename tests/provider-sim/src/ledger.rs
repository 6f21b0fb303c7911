//! What really happened: every request from its first byte, what it cost, and what should not have been in it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde::Serialize;

use crate::answer::Sent;
use crate::models::Usage;
use crate::objects::{Kind, Object};
use crate::provider::Provider;
use crate::text::unix_us;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    Complete,
    ClientGone,
    Fault,
    Error,
}

/// An object that a request made the provider keep.
#[derive(Clone, Debug, Serialize)]
pub struct Made {
    pub kind: Kind,
    pub id: String,
}

/// What a request did with an object it named, or got to see in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    Read,
    Listed,
    Used,
    Changed,
    Deleted,
}

#[derive(Clone, Debug, Serialize)]
pub struct Reference {
    /// `response`, `file` and so on; also kinds that the simulator keeps none of.
    pub kind: &'static str,
    pub id: String,
    pub how: How,
    /// The request that made it and its credential; null if the account has no such object.
    pub created_seq: Option<u64>,
    pub created_by: Option<Arc<str>>,
}

impl Reference {
    pub fn new(kind: &'static str, id: &str, how: How, found: Option<&Object>) -> Self {
        let created_by = found.map(|object| Arc::clone(&object.credential));
        Reference { kind, id: id.to_owned(), how, created_seq: found.map(|object| object.seq), created_by }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    pub seq: u64,
    pub provider: Provider,
    pub credential: Option<Arc<str>>,
    pub account: Option<Arc<str>>,
    /// Whom the caller says it asks for: OpenAI's `user`, Anthropic's `metadata.user_id`.
    pub tag: Option<Arc<str>>,
    pub method: String,
    pub path: String,
    pub query: Option<String>,
    /// Null if there is no such operation.
    pub endpoint: Option<&'static str>,
    pub model: Option<Arc<str>>,
    pub stream: bool,
    pub status: Option<u16>,
    /// When the headers were first seen, before any of the body was read.
    pub started_unix_us: u64,
    /// When the answer's head was given to be sent.
    pub answered_unix_us: Option<u64>,
    pub ended_unix_us: Option<u64>,
    /// Cached tokens included.
    pub prompt_tokens: u64,
    /// Hidden tokens included.
    pub completion_tokens: u64,
    pub reasoning_tokens: u64,
    pub cache_read_tokens: u64,
    pub cache_write_tokens: u64,
    /// Of the prompt.
    pub audio_tokens: u64,
    /// Of the completion.
    pub image_tokens: u64,
    pub characters: u64,
    pub images: u64,
    pub seconds: u64,
    pub cost_nanodollars: u64,
    /// How `store` was sent; null where there is no such member.
    pub store: Option<Sent>,
    pub created: Vec<Made>,
    pub referenced: Vec<Reference>,
    pub ended: Option<Ended>,
    pub http_version: &'static str,
    pub client_request_id: Option<String>,
    pub idempotency_key: Option<String>,
    pub header_names: Vec<String>,
    pub body_sha256: Option<String>,
    pub response_id: Option<String>,
    pub body_bytes: u64,
}

impl Entry {
    /// An entry for a request that has just been seen.
    pub fn new(provider: Provider, method: &str, path: &str) -> Self {
        Entry {
            seq: 0,
            provider,
            credential: None,
            account: None,
            tag: None,
            method: method.to_owned(),
            path: path.to_owned(),
            query: None,
            endpoint: None,
            model: None,
            stream: false,
            status: None,
            started_unix_us: unix_us(),
            answered_unix_us: None,
            ended_unix_us: None,
            prompt_tokens: 0,
            completion_tokens: 0,
            reasoning_tokens: 0,
            cache_read_tokens: 0,
            cache_write_tokens: 0,
            audio_tokens: 0,
            image_tokens: 0,
            characters: 0,
            images: 0,
            seconds: 0,
            cost_nanodollars: 0,
            store: None,
            created: Vec::new(),
            referenced: Vec::new(),
            ended: None,
            http_version: "HTTP/1.1",
            client_request_id: None,
            idempotency_key: None,
            header_names: Vec::new(),
            body_sha256: None,
            response_id: None,
            body_bytes: 0,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Requests that have ended.
    pub calls: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub reasoning_tokens: u64,
    pub cache_read_tokens: u64,
    pub cache_write_tokens: u64,
    pub audio_tokens: u64,
    pub image_tokens: u64,
    pub characters: u64,
    pub images: u64,
    pub seconds: u64,
    pub cost_nanodollars: u64,
    /// By HTTP status, `none` where no answer was given.
    pub by_status: BTreeMap<String, u64>,
    /// What operations there are; others are not among them.
    pub by_endpoint: BTreeMap<&'static str, Share>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share {
    pub calls: u64,
    pub cost_nanodollars: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// None if no request could be told apart.
    pub seq: Option<u64>,
    pub what: String,
}

/// The exact request, for tests that look at what was forwarded.
#[derive(Clone, Debug, Default)]
pub struct Capture {
    pub headers: Vec<(String, String)>,
    pub body: Option<Bytes>,
}

/// What was asked for under one tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tagged {
    /// Requests that have ended.
    pub calls: u64,
    /// Requests begun and not ended.
    pub running: u64,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cost_nanodollars: u64,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub struct End {
    pub ended: Ended,
    pub usage: Usage,
    pub cost_nanodollars: u64,
    pub endpoint: Option<&'static str>,
    pub tag: Option<Arc<str>>,
}

const CAPTURES: usize = 1000;
const LARGEST_BODY: usize = 64 * 1024;
const VIOLATIONS: usize = 10_000;
/// Tags told apart; any further ones have no sum of their own.
const TAGS: usize = 10_000;

#[derive(Debug)]
pub struct Ledger {
    cap: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: VecDeque<Entry>,
    last_seq: u64,
    /// Requests up to here were cleared by a reset; what they still do is not counted.
    floor: u64,
    running: u64,
    totals: Totals,
    by_credential: BTreeMap<Arc<str>, Totals>,
    by_tag: BTreeMap<Arc<str>, Tagged>,
    violations: Vec<Violation>,
    violation_count: u64,
    captures: VecDeque<(u64, Capture)>,
}

/// A snapshot for `/control/totals`.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub credentials: BTreeMap<Arc<str>, Totals>,
    pub overall: Totals,
    /// Requests begun and not ended.
    pub running: u64,
    pub violations: Vec<Violation>,
    pub violation_count: u64,
}

impl Ledger {
    pub fn new(cap: usize) -> Self {
        Ledger { cap: cap.max(1), inner: Mutex::default() }
    }

    /// Opens an entry and gives its number.
    pub fn begin(&self, mut entry: Entry) -> u64 {
        let mut inner = self.inner();
        inner.last_seq += 1;
        inner.running += 1;
        entry.seq = inner.last_seq;
        if inner.entries.len() >= self.cap {
            inner.entries.pop_front();
        }
        inner.entries.push_back(entry);
        inner.last_seq
    }

    pub fn update(&self, seq: u64, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.inner().entry(seq) {
            change(entry);
        }
    }

    /// The body of a request told its tag.
    pub fn tag(&self, seq: u64, tag: &Arc<str>) {
        let mut inner = self.inner();
        if seq <= inner.floor {
            return;
        }
        if let Some(entry) = inner.entry(seq) {
            entry.tag = Some(Arc::clone(tag));
        }
        if inner.by_tag.len() < TAGS || inner.by_tag.contains_key(tag) {
            inner.by_tag.entry(Arc::clone(tag)).or_default().running += 1;
        }
    }

    pub fn end(&self, seq: u64, end: &End, credential: Option<&Arc<str>>, status: Option<u16>) {
        let now = unix_us();
        let mut inner = self.inner();
        if seq <= inner.floor {
            return;
        }
        inner.running = inner.running.saturating_sub(1);
        if let Some(entry) = inner.entry(seq) {
            entry.ended_unix_us = Some(now);
            entry.ended = Some(end.ended);
            entry.status = status;
            entry.prompt_tokens = end.usage.prompt;
            entry.completion_tokens = end.usage.completion;
            entry.reasoning_tokens = end.usage.reasoning;
            entry.cache_read_tokens = end.usage.cache_read;
            entry.cache_write_tokens = end.usage.cache_write;
            entry.audio_tokens = end.usage.audio;
            entry.image_tokens = end.usage.image;
            entry.characters = end.usage.characters;
            entry.images = end.usage.images;
            entry.seconds = end.usage.seconds;
            entry.cost_nanodollars = end.cost_nanodollars;
        }
        inner.totals.add(end, status);
        if let Some(sum) = end.tag.as_ref().and_then(|tag| inner.by_tag.get_mut(tag)) {
            sum.calls += 1;
            sum.running = sum.running.saturating_sub(1);
            sum.prompt_tokens += end.usage.prompt;
            sum.completion_tokens += end.usage.completion;
            sum.cost_nanodollars += end.cost_nanodollars;
        }
        if let Some(credential) = credential {
            match inner.by_credential.get_mut(credential) {
                Some(totals) => totals.add(end, status),
                None => inner.by_credential.entry(Arc::clone(credential)).or_default().add(end, status),
            }
        }
    }

    pub fn violation(&self, seq: Option<u64>, what: String) {
        let mut inner = self.inner();
        if seq.is_some_and(|seq| seq <= inner.floor) {
            return;
        }
        inner.violation_count += 1;
        if inner.violations.len() < VIOLATIONS {
            inner.violations.push(Violation { seq, what });
        }
    }

    pub fn capture(&self, seq: u64, headers: Vec<(String, String)>, body: &Bytes) {
        // A copy: the received body is a slice of a larger read buffer, which it would keep alive.
        let body = (body.len() <= LARGEST_BODY).then(|| Bytes::copy_from_slice(body));
        let mut inner = self.inner();
        if inner.captures.len() >= CAPTURES {
            inner.captures.pop_front();
        }
        inner.captures.push_back((seq, Capture { headers, body }));
    }

    pub fn captured(&self, seq: u64) -> Option<Capture> {
        self.inner().captures.iter().find(|(at, _)| *at == seq).map(|(_, capture)| capture.clone())
    }

    /// Entries after `since`, and the last number given out.
    pub fn since(&self, since: u64) -> (Vec<Entry>, u64) {
        let inner = self.inner();
        let entries = inner.entries.iter().skip_while(|entry| entry.seq <= since).cloned().collect();
        (entries, inner.last_seq)
    }

    pub fn summary(&self) -> Summary {
        let inner = self.inner();
        Summary {
            credentials: inner.by_credential.clone(),
            overall: inner.totals.clone(),
            running: inner.running,
            violations: inner.violations.clone(),
            violation_count: inner.violation_count,
        }
    }

    /// The sums of each tag, all of the same moment.
    pub fn tags(&self) -> BTreeMap<Arc<str>, Tagged> {
        self.inner().by_tag.clone()
    }

    pub fn reset(&self) {
        let mut inner = self.inner();
        let last_seq = inner.last_seq;
        *inner = Inner { last_seq, floor: last_seq, ..Inner::default() };
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn entry(&mut self, seq: u64) -> Option<&mut Entry> {
        let first = self.entries.front()?.seq;
        let at = usize::try_from(seq.checked_sub(first)?).ok()?;
        self.entries.get_mut(at)
    }
}

impl Totals {
    fn add(&mut self, end: &End, status: Option<u16>) {
        self.calls += 1;
        self.prompt_tokens += end.usage.prompt;
        self.completion_tokens += end.usage.completion;
        self.reasoning_tokens += end.usage.reasoning;
        self.cache_read_tokens += end.usage.cache_read;
        self.cache_write_tokens += end.usage.cache_write;
        self.audio_tokens += end.usage.audio;
        self.image_tokens += end.usage.image;
        self.characters += end.usage.characters;
        self.images += end.usage.images;
        self.seconds += end.usage.seconds;
        self.cost_nanodollars += end.cost_nanodollars;
        let status = status.map_or_else(|| "none".to_owned(), |status| status.to_string());
        *self.by_status.entry(status).or_default() += 1;
        if let Some(endpoint) = end.endpoint {
            let share = self.by_endpoint.entry(endpoint).or_default();
            share.calls += 1;
            share.cost_nanodollars += end.cost_nanodollars;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        Entry::new(Provider::Openai, "POST", "/")
    }

    fn end(cost_nanodollars: u64) -> End {
        let usage = Usage { prompt: 2, completion: 3, ..Usage::default() };
        End { ended: Ended::Complete, usage, cost_nanodollars, endpoint: Some("POST /v1/files"), tag: Some("k".into()) }
    }

    #[test]
    fn totals_outlive_entries_that_the_cap_drops() {
        let ledger = Ledger::new(2);
        let seqs: Vec<u64> = (0..3).map(|_| ledger.begin(entry())).collect();
        for seq in &seqs {
            ledger.end(*seq, &end(10), Some(&"a".into()), Some(200));
        }
        assert_eq!(ledger.since(0).0.len(), 2);
        assert_eq!(ledger.since(2).0.len(), 1);
        let summary = ledger.summary();
        assert_eq!((summary.overall.calls, summary.overall.cost_nanodollars, summary.running), (3, 30, 0));
        assert_eq!(summary.overall.by_endpoint.get("POST /v1/files"), Some(&Share { calls: 3, cost_nanodollars: 30 }));
        assert_eq!(summary.credentials.get("a").map(|totals| totals.completion_tokens), Some(9));
    }

    #[test]
    fn a_tag_sums_what_ended_and_counts_what_runs() {
        let ledger = Ledger::new(1);
        let seqs: Vec<u64> = (0..3).map(|_| ledger.begin(entry())).collect();
        for seq in &seqs {
            ledger.tag(*seq, &"k".into());
        }
        for seq in seqs.iter().skip(1) {
            ledger.end(*seq, &end(10), None, Some(200));
        }
        ledger.end(ledger.begin(entry()), &End { tag: Some("never told".into()), ..end(10) }, None, None);
        let expected = Tagged { calls: 2, running: 1, prompt_tokens: 4, completion_tokens: 6, cost_nanodollars: 20 };
        assert_eq!(ledger.tags(), BTreeMap::from([("k".into(), expected)]));
        ledger.reset();
        ledger.tag(1, &"k".into());
        assert!(ledger.tags().is_empty());
    }

    #[test]
    fn what_was_running_at_a_reset_is_not_counted_after_it() {
        let ledger = Ledger::new(10);
        let old = ledger.begin(entry());
        ledger.reset();
        let new = ledger.begin(entry());
        ledger.end(old, &end(10), None, Some(200));
        ledger.violation(Some(old), "late".into());
        assert_eq!((ledger.summary().overall.calls, ledger.summary().violation_count), (0, 0));
        assert_eq!(ledger.since(0).0.first().map(|entry| entry.seq), Some(new));
    }
}
