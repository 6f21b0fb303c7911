//! News of requests that must end: what the policy service tells, and how the VMs of one Envoy process share it.
//!
//! One VM of the process asks the service for all of them. Which one, a lease in shared data says; one that its holder has
//! stopped renewing is taken over. The news goes onto a board in shared data: a head that says how many sheets there are and
//! where the next question goes on, and a fixed ring of sheets, one for each answer that brought news. Sheet and head are
//! written by compare-and-swap, the sheet first: two VMs that both believe to hold the lease can repeat news, never lose any.

use crate::edge::{Cooled, RequestId, VmId};
use crate::refusal::{Code, Refusal};
use crate::ring::SharedData;
use serde::{Deserialize, Serialize};

pub const WATCH_PATH: &str = "/edge/v1/watch";

/// How long the service holds a question to which there is no answer yet. Short: a connection that died without a word is
/// noticed after this time and a little more.
pub const HOLD_MS: u64 = 5_000;
/// How long the filter waits for an answer.
pub const POLL_TIMEOUT_MS: u64 = HOLD_MS + 2_000;
/// A lease that was not renewed for so long is free. Every VM looks at it once a tick (50 ms).
const STALE_MS: u64 = 500;
/// Longest wait between questions that got no answer: the service is back when it says so, and is asked within this time.
const MAX_BACKOFF_MS: u64 = 500;
/// Sheets of the board. At one answer a tick, a VM that stood still for less than 12 s misses nothing.
const SHEETS: u64 = 256;
/// A version that no value has: writes only what is not there yet.
const ABSENT: u32 = u32::MAX;

const LEASE: &[u8] = b"keyward/watch/1/lease";
const HEAD: &[u8] = b"keyward/watch/1/head";
/// When the service last answered, by the process's monotonic clock.
const HEARD: &[u8] = b"keyward/watch/1/heard";

/// One request that must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    pub req: RequestId,
    pub code: Code,
}

/// The service's answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchAnswer {
    /// Where the next question goes on.
    pub since: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub end: Vec<End>,
    /// What other Envoys or an operator have told of credentials.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cooled: Vec<Cooled>,
}

/// Reasons for which a running request is ended.
pub const ENDS: [Code; 7] = [
    Code::Revoked,
    Code::Expired,
    Code::ModelNotAllowed,
    Code::EndpointNotAllowed,
    Code::UnknownProvider,
    Code::CapExhausted,
    Code::PolicyUnavailable,
];

/// What a caller is told whose running request was ended.
pub fn refusal(code: Code) -> Refusal {
    let message = match code {
        Code::Revoked => "this virtual key has been revoked",
        Code::Expired => "this virtual key has expired",
        Code::ModelNotAllowed => "this virtual key may not use this model any more",
        Code::EndpointNotAllowed => "this virtual key may not call this endpoint any more",
        Code::UnknownProvider => "this provider has been switched off",
        Code::CapExhausted => "nothing is left of what this virtual key may spend",
        Code::PolicyUnavailable => "the policy service can't be reached, or the rules for this virtual key are gone",
        _ => "this virtual key may not make this request any more",
    };
    Refusal::new(code, message)
}

/// What one tick of a VM brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Ticked {
    pub news: Vec<End>,
    /// The path to ask the service for, if it is this VM's turn.
    pub ask: Option<String>,
    /// This VM has taken the lease.
    pub took_over: bool,
}

/// What became of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// It was to no question of this VM's.
    NotOurs,
    /// There was none.
    Nothing,
    Taken,
}

#[derive(Debug)]
struct Poll {
    token: u32,
    since: String,
    sent_ms: u64,
}

/// The head of the board: `SHEETS-WRITTEN SINCE`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Head {
    written: u64,
    /// Empty: the next question asks for everything.
    since: String,
}

impl Head {
    fn parse(value: &[u8]) -> Option<Self> {
        let (written, since) = std::str::from_utf8(value).ok()?.split_once(' ')?;
        Some(Head { written: written.parse().ok()?, since: since.to_owned() })
    }

    fn value(&self) -> Vec<u8> {
        format!("{} {}", self.written, self.since).into_bytes()
    }

    /// The head as it stands, and its version.
    fn read(shared: &impl SharedData) -> (Self, u32) {
        shared.read(HEAD).map_or((Head::default(), ABSENT), |(value, version)| (Head::parse(&value).unwrap_or_default(), version))
    }
}

/// One VM's part. All times are milliseconds of a monotonic clock that the VMs of a process share.
#[derive(Debug, Default)]
pub struct Watch {
    /// The lease's version, and since when it has been the same.
    lease: Option<(u32, u64)>,
    holds: bool,
    /// The head and its version as this VM last saw them.
    head: Option<(Head, u32)>,
    poll: Option<Poll>,
    /// The question to send, until its token is known.
    asking: Option<String>,
    retry_ms: u64,
    failures: u32,
}

impl Watch {
    /// The VM starts: it has no streams yet, so what stands on the board is not for it. Called before its first request.
    pub fn begin(&mut self, shared: &impl SharedData) {
        if self.head.is_none() {
            self.head = Some(Head::read(shared));
        }
    }

    /// Takes in what is new, renews or takes the lease, and says what to ask.
    pub fn tick(&mut self, shared: &impl SharedData, vm: VmId, now_ms: u64) -> Ticked {
        let news = self.take_in(shared);
        let took_over = self.lead(shared, vm, now_ms);
        let ask = if self.holds { self.next_question(now_ms) } else { None };
        Ticked { news, ask, took_over }
    }

    /// Whether this VM asks for all.
    pub fn holds_lease(&self) -> bool {
        self.holds
    }

    /// The question is on its way. `None`: it could not be sent.
    pub fn asked(&mut self, token: Option<u32>, now_ms: u64) {
        let since = self.asking.take().unwrap_or_default();
        match token {
            Some(token) => self.poll = Some(Poll { token, since, sent_ms: now_ms }),
            None => self.failed(now_ms),
        }
    }

    /// An answer has come; `None`: nothing that could be read.
    pub fn answered(&mut self, shared: &impl SharedData, vm: VmId, token: u32, answer: Option<WatchAnswer>, now_ms: u64) -> Heard {
        let Some(poll) = self.poll.take_if(|poll| poll.token == token) else { return Heard::NotOurs };
        let Some(answer) = answer else {
            self.failed(now_ms);
            return Heard::Nothing;
        };
        (self.failures, self.retry_ms) = (0, 0);
        shared.write(HEARD, now_ms.to_string().as_bytes(), 0);
        // Whoever took the lease over asks the same, and writes it down.
        if shared.read(LEASE).is_some_and(|(holder, _)| holder == vm.0) {
            post(shared, &poll.since, &answer);
        }
        Heard::Taken
    }

    /// Milliseconds since the service last answered any VM of the process; `started_ms` counts if it never did.
    pub fn silent_for(shared: &impl SharedData, started_ms: u64, now_ms: u64) -> u64 {
        let heard = shared.read(HEARD).and_then(|(value, _)| std::str::from_utf8(&value).ok()?.parse::<u64>().ok());
        now_ms.saturating_sub(heard.unwrap_or(0).max(started_ms))
    }

    fn failed(&mut self, now_ms: u64) {
        self.failures = self.failures.saturating_add(1);
        self.retry_ms = now_ms + (50u64 << self.failures.min(8)).min(MAX_BACKOFF_MS);
    }

    fn take_in(&mut self, shared: &impl SharedData) -> Vec<End> {
        let (head, version) = Head::read(shared);
        let Some((seen, seen_version)) = &self.head else {
            self.head = Some((head, version));
            return Vec::new();
        };
        if *seen_version == version {
            return Vec::new();
        }
        let (from, to) = (seen.written, head.written);
        let mut news = Vec::new();
        // The ring has gone round under this VM: it no longer has what it missed, so everything is asked for anew.
        if to - from.min(to) > SHEETS || !(from..to).all(|n| read_sheet(shared, n + 1, &mut news)) {
            ask_for_everything(shared);
        }
        self.head = Some((head, version));
        news
    }

    /// Whether the lease has just become this VM's.
    fn lead(&mut self, shared: &impl SharedData, vm: VmId, now_ms: u64) -> bool {
        let Some((holder, version)) = shared.read(LEASE) else {
            self.holds = shared.write(LEASE, &vm.0, ABSENT);
            return self.holds;
        };
        if holder == vm.0 {
            // Every writing makes a new version: that is the sign of life.
            self.holds = shared.write(LEASE, &vm.0, version);
            return false;
        }
        if std::mem::take(&mut self.holds) {
            self.poll = None;
        }
        match self.lease {
            Some((seen, since_ms)) if seen == version && now_ms.saturating_sub(since_ms) > STALE_MS => {
                self.lease = None;
                self.holds = shared.write(LEASE, &vm.0, version);
                self.holds
            }
            Some((seen, _)) if seen == version => false,
            _ => {
                self.lease = Some((version, now_ms));
                false
            }
        }
    }

    /// The question that is on its way will not be answered: another one may be asked at once.
    pub fn forget_question(&mut self) {
        self.poll = None;
    }

    fn next_question(&mut self, now_ms: u64) -> Option<String> {
        let since = self.head.as_ref().map(|(head, _)| head.since.clone()).unwrap_or_default();
        // One that waits is let go when somebody wants everything, or when its answer should have come long since.
        let waits = |poll: &Poll| poll.since == since && now_ms.saturating_sub(poll.sent_ms) < POLL_TIMEOUT_MS + 1_000;
        if self.poll.as_ref().is_some_and(waits) || now_ms < self.retry_ms {
            return None;
        }
        let path = if since.is_empty() { WATCH_PATH.to_owned() } else { format!("{WATCH_PATH}?since={since}") };
        self.asking = Some(since);
        Some(path)
    }
}

/// Puts an answer onto the board, unless it went on from there meanwhile.
fn post(shared: &impl SharedData, asked: &str, answer: &WatchAnswer) {
    // It becomes part of a path and of a line.
    let plain = answer.since.bytes().all(|b| b.is_ascii_alphanumeric() || b == b':');
    let (head, version) = Head::read(shared);
    if head.since != asked || !plain || (answer.end.is_empty() && answer.since == asked) {
        return;
    }
    let mut written = head.written;
    if !answer.end.is_empty() {
        written += 1;
        let key = sheet_key(written);
        let before = shared.read(&key).map_or(ABSENT, |(_, version)| version);
        // The sheet may be another VM's, written since the head was read: then it counts already.
        if Head::read(shared).1 != version {
            return;
        }
        if !shared.write(&key, &sheet(written, &answer.end), before) {
            return;
        }
    }
    shared.write(HEAD, &Head { written, since: answer.since.clone() }.value(), version);
}

fn ask_for_everything(shared: &impl SharedData) {
    let (head, version) = Head::read(shared);
    if !head.since.is_empty() {
        shared.write(HEAD, &Head { since: String::new(), ..head }.value(), version);
    }
}

fn sheet_key(number: u64) -> Vec<u8> {
    format!("keyward/watch/1/sheet/{}", number % SHEETS).into_bytes()
}

/// `NUMBER`, then `REQ CODE` for each, one a line.
fn sheet(number: u64, ends: &[End]) -> Vec<u8> {
    let mut out = number.to_string();
    for end in ends {
        out.push('\n');
        out.push_str(crate::hex::Hex::of(&end.req.0).as_str());
        out.push(' ');
        out.push_str(end.code.name());
    }
    out.into_bytes()
}

/// `false`: this sheet is gone.
fn read_sheet(shared: &impl SharedData, number: u64, news: &mut Vec<End>) -> bool {
    let Some((value, _)) = shared.read(&sheet_key(number)) else { return false };
    let Ok(text) = std::str::from_utf8(&value) else { return false };
    let mut lines = text.split('\n');
    if lines.next().and_then(|first| first.parse::<u64>().ok()) != Some(number) {
        return false;
    }
    let end = |line: &str| {
        let (req, code) = line.split_once(' ')?;
        Some(End { req: RequestId(crate::hex::decode(req)?), code: Code::named(code)? })
    };
    news.extend(lines.filter_map(end));
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::shared::Shared;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn end(n: u64) -> End {
        let mut req = [0; 16];
        req[..8].copy_from_slice(&n.to_be_bytes());
        End { req: RequestId(req), code: if n.is_multiple_of(2) { Code::Revoked } else { Code::CapExhausted } }
    }

    /// A service whose news are numbered from 1: what it answers to a path.
    fn serve(path: &str, news: u64, epoch: &str) -> WatchAnswer {
        let since = path.strip_prefix(WATCH_PATH).unwrap();
        let from = since.strip_prefix(&format!("?since={epoch}:")).map_or(0, |n| n.parse().unwrap());
        WatchAnswer { since: format!("{epoch}:{news}"), end: (from + 1..=news).map(end).collect(), cooled: Vec::new() }
    }

    struct Process {
        shared: Shared,
        vms: Vec<(VmId, Watch, Vec<End>, u32)>,
        now_ms: u64,
        tokens: u32,
        /// Questions under way: which VM, token, path.
        asked: HashMap<u32, (usize, String)>,
    }

    impl Process {
        fn new(vms: u8) -> Self {
            let mut process = Process { shared: Shared::default(), vms: Vec::new(), now_ms: 1_000, tokens: 0, asked: HashMap::new() };
            for n in 0..vms {
                process.start(n);
            }
            process
        }

        fn start(&mut self, n: u8) {
            let mut watch = Watch::default();
            watch.begin(&self.shared);
            self.vms.push((VmId([n; 16]), watch, Vec::new(), 0));
        }

        fn tick(&mut self, at: usize) -> Ticked {
            let (id, watch, seen, takeovers) = &mut self.vms[at];
            let ticked = watch.tick(&self.shared, *id, self.now_ms);
            seen.extend(&ticked.news);
            *takeovers += u32::from(ticked.took_over);
            if let Some(path) = &ticked.ask {
                self.tokens += 1;
                watch.asked(Some(self.tokens), self.now_ms);
                self.asked.insert(self.tokens, (at, path.clone()));
            }
            ticked
        }

        fn tick_all(&mut self) {
            self.now_ms += 50;
            (0..self.vms.len()).for_each(|at| drop(self.tick(at)));
        }

        fn answer(&mut self, token: u32, with: impl FnOnce(&str) -> Option<WatchAnswer>) -> Heard {
            let (at, path) = self.asked.remove(&token).unwrap();
            let (id, watch, _, _) = &mut self.vms[at];
            watch.answered(&self.shared, *id, token, with(&path), self.now_ms)
        }

        fn answer_all(&mut self, news: u64, epoch: &str) {
            for token in self.asked.keys().copied().collect::<Vec<_>>() {
                self.answer(token, |path| Some(serve(path, news, epoch)));
            }
        }
    }

    fn seen(process: &Process, at: usize) -> HashSet<RequestId> {
        process.vms[at].2.iter().map(|end| end.req).collect()
    }

    fn up_to(news: u64) -> HashSet<RequestId> {
        (1..=news).map(|n| end(n).req).collect()
    }

    #[test]
    fn one_vm_asks_and_all_hear() {
        let mut process = Process::new(4);
        process.tick_all();
        assert_eq!(process.asked.len(), 1, "one question for the whole process");
        process.answer_all(3, "e");
        process.tick_all();
        for at in 0..4 {
            assert_eq!(process.vms[at].2, [end(1), end(2), end(3)], "with their codes, once");
        }
        assert_eq!(process.asked.values().map(|(_, path)| path.as_str()).collect::<Vec<_>>(), ["/edge/v1/watch?since=e:3"]);
        process.answer_all(3, "e");
        process.tick_all();
        assert_eq!(process.vms[2].2.len(), 3, "no news is none");
        assert_eq!(process.vms.iter().map(|vm| vm.3).sum::<u32>(), 1);
    }

    #[test]
    fn a_lease_is_taken_over_when_its_holder_is_gone_and_not_before() {
        let mut process = Process::new(3);
        process.tick_all();
        let holder = process.vms.iter().position(|vm| vm.1.holds_lease()).unwrap();
        for _ in 0..100 {
            process.tick_all();
        }
        assert_eq!(process.vms.iter().map(|vm| vm.3).sum::<u32>(), 1, "a holder that ticks keeps it");
        process.vms.remove(holder);
        process.asked.clear();
        for _ in 0..12 {
            process.tick_all();
        }
        assert_eq!(process.vms.iter().filter(|vm| vm.1.holds_lease()).count(), 1);
        assert_eq!(process.asked.len(), 1);
    }

    #[test]
    fn a_service_that_is_down_is_not_asked_in_a_spin() {
        let mut process = Process::new(1);
        let mut asked = 0;
        for _ in 0..200 {
            process.tick_all();
            for token in process.asked.keys().copied().collect::<Vec<_>>() {
                asked += 1;
                assert_eq!(process.answer(token, |_| None), Heard::Nothing);
            }
        }
        // 200 ticks are 10 s.
        assert!((18..=25).contains(&asked), "{asked}");
        assert!(Watch::silent_for(&process.shared, 1_000, process.now_ms) >= 10_000);
        process.now_ms += MAX_BACKOFF_MS;
        process.tick_all();
        process.answer_all(0, "e");
        assert_eq!(Watch::silent_for(&process.shared, 1_000, process.now_ms), 0);
    }

    #[test]
    fn a_vm_that_missed_too_much_asks_for_everything() {
        let mut process = Process::new(2);
        process.tick_all();
        let holder = process.vms.iter().position(|vm| vm.1.holds_lease()).unwrap();
        for news in 1..=SHEETS + 1 {
            process.answer_all(news, "e");
            process.now_ms += 50;
            process.tick(holder);
        }
        let asleep = 1 - holder;
        // What it finds is not all there was.
        process.tick(asleep);
        process.now_ms += 50;
        let ticked = process.tick(holder);
        assert_eq!(ticked.ask.as_deref(), Some(WATCH_PATH), "also under a question that waits");
        process.answer_all(SHEETS + 1, "e");
        process.tick_all();
        assert_eq!(seen(&process, asleep), up_to(SHEETS + 1));
    }

    #[test]
    fn an_answer_to_an_older_question_does_not_undo_that_everything_is_wanted() {
        let mut process = Process::new(1);
        process.tick_all();
        process.answer_all(3, "e");
        process.tick_all();
        ask_for_everything(&process.shared);
        process.answer_all(4, "e");
        process.now_ms += 50;
        assert_eq!(process.tick(0).ask.as_deref(), Some(WATCH_PATH));
    }

    #[test]
    fn a_holder_that_stands_still_for_a_moment_keeps_the_lease() {
        let mut process = Process::new(2);
        process.tick_all();
        let holder = process.vms.iter().position(|vm| vm.1.holds_lease()).unwrap();
        for _ in 0..9 {
            process.now_ms += 50;
            assert!(!process.tick(1 - holder).took_over);
        }
        process.tick_all();
        process.now_ms += STALE_MS;
        assert!(!process.tick(1 - holder).took_over, "it has been looked at once only");
        process.now_ms += STALE_MS + 1;
        assert!(process.tick(1 - holder).took_over);
        process.tick(holder);
        assert!(!process.vms[holder].1.holds_lease(), "there is one");
    }

    #[test]
    fn an_answer_that_comes_late_changes_nothing() {
        let mut process = Process::new(1);
        process.tick_all();
        let late = process.tokens;
        process.now_ms += POLL_TIMEOUT_MS + 2_000;
        process.tick(0);
        assert_eq!(process.answer(late, |path| Some(serve(path, 9, "e"))), Heard::NotOurs);
        process.tick_all();
        assert!(process.vms[0].2.is_empty());
        process.answer_all(9, "e");
        process.tick_all();
        assert_eq!(seen(&process, 0), up_to(9));
    }

    #[test]
    fn what_can_t_be_a_place_is_not_gone_on_from() {
        let mut process = Process::new(1);
        process.tick_all();
        let token = process.tokens;
        process.answer(token, |_| Some(WatchAnswer { since: "e 1\nx".to_owned(), end: vec![end(1)], cooled: Vec::new() }));
        let ticked = process.tick(0);
        assert_eq!((ticked.ask.as_deref(), ticked.news), (Some(WATCH_PATH), vec![]));
    }

    /// Two VMs believe to hold the lease and bring the answers to the same question: what the one with more news has written stays,
    /// at whichever moment it comes.
    #[test]
    fn of_two_answers_to_one_question_the_one_that_counts_stays_whole() {
        for moment in 0..3 {
            let shared = Shared::default();
            let more = WatchAnswer { since: "e:2".to_owned(), end: vec![end(1), end(2)], cooled: Vec::new() };
            let less = WatchAnswer { since: "e:1".to_owned(), end: vec![end(1)], cooled: Vec::new() };
            let expected = more.clone();
            let post_more = move |shared: &Shared| post(shared, "", &more);
            fn after(readings: u32, run: impl FnOnce(&Shared) + 'static) -> Box<dyn FnOnce(&Shared)> {
                if readings == 0 {
                    return Box::new(run);
                }
                Box::new(move |shared| *shared.meanwhile.borrow_mut() = Some(after(readings - 1, run)))
            }
            *shared.meanwhile.borrow_mut() = Some(after(moment, post_more));
            post(&shared, "", &less);
            let (mut news, head) = (Vec::new(), Head::read(&shared).0);
            assert!((1..=head.written).all(|n| read_sheet(&shared, n, &mut news)), "moment {moment}");
            assert_eq!((head.since, news), (expected.since, expected.end), "moment {moment}");
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        News,
        Tick(u8),
        Answer { lost: bool },
        Restart,
        Trap(u8),
        Pause(u16),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => Just(Step::News),
            6 => (0u8..3).prop_map(Step::Tick),
            4 => proptest::bool::weighted(0.2).prop_map(|lost| Step::Answer { lost }),
            1 => Just(Step::Restart),
            1 => (0u8..3).prop_map(Step::Trap),
            1 => (0u16..900).prop_map(Step::Pause),
        ]
    }

    proptest! {
        /// Whatever is lost, restarted or trapped, in whatever order VMs and answers come: once it is calm, every VM has heard of
        /// everything that was told since it began.
        #[test]
        fn nothing_is_missed(steps in proptest::collection::vec(step(), 0..120)) {
            let mut process = Process::new(3);
            let (mut news, mut epoch, mut began) = (0u64, 0u32, [0u64; 3]);
            let mut born = 3u8;
            for step in steps {
                process.now_ms += 10;
                match step {
                    Step::News => news += 1,
                    Step::Tick(at) => drop(process.tick(usize::from(at))),
                    Step::Answer { lost } => {
                        let Some(token) = process.asked.keys().min().copied() else { continue };
                        let epoch = format!("e{epoch}");
                        process.answer(token, |path| (!lost).then(|| serve(path, news, &epoch)));
                    }
                    // The service knows what is held, and begins to count anew.
                    Step::Restart => epoch += 1,
                    Step::Trap(at) => {
                        let at = usize::from(at);
                        let mut watch = Watch::default();
                        watch.begin(&process.shared);
                        process.vms[at] = (VmId([born; 16]), watch, Vec::new(), 0);
                        process.asked.retain(|_, (vm, _)| *vm != at);
                        born = born.wrapping_add(1).max(3);
                        began[at] = news;
                    }
                    Step::Pause(ms) => process.now_ms += u64::from(ms),
                }
            }
            for _ in 0..40 {
                process.tick_all();
                process.answer_all(news, &format!("e{epoch}"));
            }
            process.tick_all();
            for (at, began) in began.into_iter().enumerate() {
                let seen = seen(&process, at);
                prop_assert!((began + 1..=news).all(|n| seen.contains(&end(n).req)), "VM {at} of {news} from {began}: {seen:?}");
            }
        }
    }
}
