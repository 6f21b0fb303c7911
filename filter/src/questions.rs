//! Questions of admission on their way to the policy service, those of many requests in one callout: a callout costs Envoy about as much as
//! all else that it does for a request.
//!
//! The gate's root context makes the callouts, so that none of them ends with the stream that began it. A stream rings for it; Envoy lets the
//! root answer the bell once it has read what has come on all connections. While callouts are on their way, further questions
//! gather for the next: under load the batches become as large as they must, alone a question waits for nobody.

use crate::gate::SharedGate;
use crate::host;
use crate::vm::Vm;
use keyward_core::edge::{ADMIT_PATH, AdmitAnswer, RequestId};
use std::collections::VecDeque;
use std::time::Duration;

/// Callouts that are on their way at once. While the service commits one it takes in the next; a third would only wait there.
const MAX_CALLOUTS: usize = 2;
/// Questions of one callout, and about how many bytes they may have together.
const MAX_QUESTIONS: usize = 128;
const MAX_BYTES: usize = 256 * 1024;
/// After its time is up, a callout of which nothing was heard is given up so much later: its root context is gone.
const LOST_MS: u64 = 100;

/// A request's question.
pub struct Question {
    pub gate: SharedGate,
    pub context: u32,
    pub id: RequestId,
    /// JSON.
    pub line: Vec<u8>,
    /// By the monotonic clock.
    pub asked_ms: u64,
    /// The service may take its time to decide: it goes alone, for the others not to wait.
    pub is_slow: bool,
}

/// A callout that awaits its answer.
struct Sent {
    token: u32,
    questions: Vec<Question>,
    until_ms: u64,
}

/// What one VM asks.
#[derive(Default)]
pub struct Questions {
    waiting: VecDeque<Question>,
    sent: Vec<Sent>,
}

impl Questions {
    pub fn ask(&mut self, question: Question) {
        self.waiting.push_back(question);
    }

    /// What is to be sent now. Questions of requests that are over meanwhile are left out.
    fn next(&mut self) -> Option<Vec<Question>> {
        let is_slow = |sent: &Sent| matches!(sent.questions.as_slice(), [one] if one.is_slow);
        let on_their_way = self.sent.iter().filter(|sent| !is_slow(sent)).count();
        let mut batch: Vec<Question> = Vec::new();
        let mut bytes = 0;
        while let Some(first) = self.waiting.front() {
            let alone = first.is_slow;
            let full = batch.len() >= MAX_QUESTIONS || (!batch.is_empty() && bytes + first.line.len() > MAX_BYTES);
            if full || (alone && !batch.is_empty()) || (!alone && on_their_way >= MAX_CALLOUTS) {
                break;
            }
            let Some(question) = self.waiting.pop_front() else { break };
            if !question.gate.borrow_mut().is_sent() {
                continue;
            }
            bytes += question.line.len();
            batch.push(question);
            if alone {
                break;
            }
        }
        (!batch.is_empty()).then_some(batch)
    }

    /// Questions that have waited for their turn, or for an answer, for as long as they may.
    fn overdue(&mut self, longest_ms: u64, now_ms: u64) -> Vec<Question> {
        let mut overdue = Vec::new();
        while let Some(question) = self.waiting.pop_front_if(|question| now_ms >= question.asked_ms.saturating_add(longest_ms)) {
            overdue.push(question);
        }
        for lost in self.sent.extract_if(.., |sent| now_ms >= sent.until_ms.saturating_add(LOST_MS)) {
            overdue.extend(lost.questions);
        }
        overdue
    }
}

/// Sends what waits, as far as it may go now. In the root's own name.
pub fn flush(vm: &Vm, root: u32) {
    loop {
        let Some(batch) = vm.questions.borrow_mut().next() else { return };
        let (config, now_ms) = (vm.config(), host::monotonic_ms());
        let longest_ms = config.admit_timeout_ms;
        let asked_ms = batch.iter().map(|question| question.asked_ms).min().unwrap_or(now_ms);
        // Of a batch the first one's time counts. It is never over: what is overdue waits no more.
        let left_ms = asked_ms.saturating_add(longest_ms).saturating_sub(now_ms).max(1);
        let body = batch.iter().map(|question| question.line.as_slice()).collect::<Vec<_>>().join(b"\n".as_slice());
        let headers =
            vec![(":method", "POST"), (":path", ADMIT_PATH), (":authority", "keyward-policy"), ("content-type", "application/x-ndjson")];
        match host::call(&config.policy_cluster, headers, &body, Duration::from_millis(left_ms)) {
            Some(token) => {
                let sent = Sent { token, questions: batch, until_ms: now_ms.saturating_add(left_ms) };
                vm.questions.borrow_mut().sent.push(sent);
            }
            None => tell(batch, None, root),
        }
    }
}

/// An answer to a callout of the root's. `false`: to another one.
pub fn answered(vm: &Vm, root: u32, token: u32, body: Option<&[u8]>) -> bool {
    let sent = vm.questions.borrow_mut().sent.extract_if(.., |sent| sent.token == token).next();
    let Some(Sent { questions, .. }) = sent else { return false };
    tell(questions, body, root);
    flush(vm, root);
    true
}

/// Called on every tick, in the root's own name: nobody waits for longer than is configured.
pub fn tick(vm: &Vm, root: u32) {
    let overdue = vm.questions.borrow_mut().overdue(vm.config().admit_timeout_ms, host::monotonic_ms());
    tell(overdue, None, root);
    flush(vm, root);
}

/// Hands each its line of the answer; without one, nobody has answered it.
fn tell(questions: Vec<Question>, body: Option<&[u8]>, root: u32) {
    if questions.is_empty() {
        return;
    }
    let mut lines = body.unwrap_or_default().split(|b| *b == b'\n');
    for question in questions {
        let answer: Option<AdmitAnswer> = lines.next().and_then(|line| serde_json::from_slice(line).ok()).flatten();
        // Whatever went wrong, no request gets another's credentials.
        let answer = answer.filter(|answer| answer.req == Some(question.id));
        if host::act_for(question.context) {
            question.gate.borrow_mut().answered(answer);
        }
    }
    host::act_for(root);
}
