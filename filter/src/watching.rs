//! Requests that are open in this VM, and ending those of them that must: by news from the policy service, by the clock, or
//! because the service has been silent for too long.
//!
//! The tick of the root context decides; what a callback of the stream has to do for it, it finds in its [`Running`].

use crate::host;
use crate::metrics;
use crate::settlements::ProcessData;
use crate::vm::{AT_ONCE, Vm};
use keyward_core::edge::{RequestId, VmId};
use keyward_core::gate;
use keyward_core::operation::Dialect;
use keyward_core::refusal::Code;
use keyward_core::watch::{Heard, POLL_TIMEOUT_MS, Ticked, Watch, WatchAnswer};
use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

/// How long a stream that must end may take to its next event, behind which the caller can be told why.
const LAST_WORDS_MS: u64 = 250;
/// How often the age of the service's last answer is told to Envoy.
const TELL_MS: u64 = 1_000;

/// How far a request has come, as far as it matters to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The policy service has been asked.
    Waiting,
    /// Admitted; no answer has been shown yet.
    Sent,
    /// Events are passing: the caller can be told between two of them.
    Events,
    /// Anything else is passing.
    Passing,
    /// Nothing is left to end.
    Over,
}

#[derive(Debug, Clone, Copy)]
struct Ending {
    code: Code,
    /// When the stream is cut, told or not.
    by_ms: u64,
}

/// One open request, shared by its stream and the tick.
#[derive(Debug)]
pub struct Running {
    id: RequestId,
    context: u32,
    dialect: Dialect,
    phase: Cell<Phase>,
    ending: Cell<Option<Ending>>,
    /// The caller has been told in the stream.
    said: Cell<bool>,
    /// Unix milliseconds.
    expires_ms: Cell<u64>,
}

impl Running {
    /// Why it must end.
    pub fn ending(&self) -> Option<Code> {
        self.ending.get().map(|ending| ending.code)
    }

    /// Whether nothing more of it may pass, or has to be looked at.
    pub fn is_over(&self) -> bool {
        self.phase.get() == Phase::Over
    }

    pub fn over(&self) {
        self.phase.set(Phase::Over);
    }

    /// The head of the answer has passed.
    pub fn shows(&self, has_events: bool) {
        self.phase.set(if has_events { Phase::Events } else { Phase::Passing });
    }

    pub fn said(&self) {
        self.said.set(true);
    }
}

/// What of all this is one VM's.
#[derive(Default)]
pub struct Watching {
    watch: Watch,
    /// The root context that asked last.
    asked_by: u32,
    started_ms: u64,
    told_ms: u64,
    open: HashMap<RequestId, Rc<Running>>,
    /// Those of them that must end and have not yet.
    ending: Vec<Rc<Running>>,
    /// No request expires before; Unix milliseconds.
    first_expiry_ms: u64,
}

impl Watching {
    /// The VM starts. Called before its first request.
    pub fn begin(&mut self) {
        if self.started_ms == 0 {
            self.started_ms = host::monotonic_ms();
            self.first_expiry_ms = u64::MAX;
        }
        self.watch.begin(&ProcessData);
    }

    /// A root context has ended: what it asked will not be answered.
    pub fn is_left_by(&mut self, root: u32) {
        if self.asked_by == root {
            self.watch.forget_question();
        }
    }

    /// The policy service is being asked for this request.
    pub fn open(&mut self, id: RequestId, context: u32, dialect: Dialect) -> Rc<Running> {
        let running = Rc::new(Running {
            id,
            context,
            dialect,
            phase: Cell::new(Phase::Waiting),
            ending: Cell::new(None),
            said: Cell::new(false),
            expires_ms: Cell::new(u64::MAX),
        });
        self.open.insert(id, running.clone());
        running
    }

    /// It was admitted and goes on.
    pub fn sent(&mut self, running: &Running, expires_ms: Option<u64>) {
        running.phase.set(Phase::Sent);
        if let Some(at) = expires_ms {
            running.expires_ms.set(at);
            self.first_expiry_ms = self.first_expiry_ms.min(at);
        }
    }

    pub fn close(&mut self, running: &Running) {
        running.over();
        self.open.remove(&running.id);
    }

    /// The request must end. The first reason stays.
    pub fn end(&mut self, running: &Rc<Running>, code: Code) {
        if !running.is_over() && running.ending.get().is_none() {
            running.ending.set(Some(Ending { code, by_ms: host::monotonic_ms() + LAST_WORDS_MS }));
            self.ending.push(running.clone());
        }
    }

    fn end_by_id(&mut self, id: RequestId, code: Code) {
        // What is not open here is another VM's, or over.
        if let Some(running) = self.open.get(&id).cloned() {
            self.end(&running, code);
        }
    }

    fn end_where(&mut self, must: impl Fn(&Running) -> bool, code: Code) {
        let found: Vec<Rc<Running>> = self.open.values().filter(|running| must(running)).cloned().collect();
        found.iter().for_each(|running| self.end(running, code));
    }

    /// Ends what has expired. It is looked through only when something has.
    fn end_expired(&mut self, now_ms: u64) {
        if now_ms >= self.first_expiry_ms {
            self.end_where(|running| running.expires_ms.get() <= now_ms, Code::Expired);
            let left = self.open.values().map(|running| running.expires_ms.get()).filter(|at| *at > now_ms);
            self.first_expiry_ms = left.min().unwrap_or(u64::MAX);
        }
    }

    /// Those whose time to be cut or answered is now, and whether there are more than can be at once.
    fn due(&mut self, now_ms: u64) -> (Vec<(Rc<Running>, Ending)>, bool) {
        let (mut due, mut are_more) = (Vec::new(), false);
        self.ending.retain(|running| {
            let Some(ending) = running.ending.get() else { return false };
            let wait = running.phase.get() == Phase::Events && !running.said.get() && now_ms < ending.by_ms;
            if wait || running.is_over() {
                return wait;
            }
            if due.len() >= AT_ONCE {
                are_more = true;
                return true;
            }
            due.push((running.clone(), ending));
            false
        });
        (due, are_more)
    }
}

/// Called on every tick of the gate's root context, after all that is done in its own name.
pub fn tick(vm: &Vm, id: VmId, root: u32) {
    let (mono_ms, now_ms) = (host::monotonic_ms(), host::now_ms());
    let config = vm.config();
    #[cfg(feature = "test-trap")]
    trap_if_asked(vm.watching.borrow().watch.holds_lease());
    {
        let mut watching = vm.watching.borrow_mut();
        let Ticked { news, ask, took_over } = watching.watch.tick(&ProcessData, id, mono_ms);
        if took_over {
            metrics::took_over();
        }
        if let Some(path) = ask {
            let headers = vec![(":method", "GET"), (":path", path.as_str()), (":authority", "keyward-policy")];
            let token = host::call(&config.policy_cluster, headers, b"", Duration::from_millis(POLL_TIMEOUT_MS));
            watching.watch.asked(token, mono_ms);
            watching.asked_by = root;
            metrics::polled(token.is_some());
        }
        for end in news {
            watching.end_by_id(end.req, end.code);
        }
        watching.end_expired(now_ms);
        let silent_for = || Watch::silent_for(&ProcessData, watching.started_ms, mono_ms);
        if watching.watch.holds_lease() && mono_ms >= watching.told_ms + TELL_MS {
            metrics::silent_for(silent_for());
            watching.told_ms = mono_ms;
        }
        let silent_for = || Watch::silent_for(&ProcessData, watching.started_ms, mono_ms);
        if !watching.open.is_empty() && config.on_lost_watch.end_after_ms().is_some_and(|longest| silent_for() > longest) {
            watching.end_where(|running| running.phase.get() != Phase::Waiting, Code::PolicyUnavailable);
        }
    }
    finish_due(vm, root);
}

/// Ends some of the requests whose time has come; the bell is rung for the rest.
pub fn finish_due(vm: &Vm, root: u32) {
    let (due, are_more) = vm.watching.borrow_mut().due(host::monotonic_ms());
    if due.is_empty() {
        return;
    }
    // Nothing is borrowed here, although Envoy acts on these only after the callback.
    for (running, ending) in due {
        finish(&running, ending.code);
    }
    host::act_for(root);
    if are_more {
        vm.ring();
    }
}

#[cfg(feature = "test-trap")]
const TRAP: &[u8] = b"keyward/test/trap-holder";

/// Traps the VM that asks for all, whichever it is.
#[cfg(feature = "test-trap")]
pub fn trap_holder() {
    host::set_shared(TRAP, b"1", 0);
}

#[cfg(feature = "test-trap")]
fn trap_if_asked(holds_lease: bool) {
    if holds_lease && host::shared(TRAP).is_some_and(|(value, _)| !value.is_empty()) {
        host::set_shared(TRAP, b"", 0);
        std::process::abort();
    }
}

/// Answers a request whose caller has seen nothing yet; cuts one that is being answered.
fn finish(running: &Running, code: Code) {
    if !host::act_for(running.context) {
        return;
    }
    let unanswered = matches!(running.phase.get(), Phase::Waiting | Phase::Sent);
    running.over();
    if unanswered {
        let answer = gate::ended(code, running.dialect, running.id).answer();
        let headers: Vec<(&str, &str)> = answer.headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
        if host::send_response(answer.status, &headers, &answer.body) {
            return;
        }
    }
    host::reset_response();
}

/// An answer to a question of this VM's root context. `false`: it was to another question.
pub fn answered(vm: &Vm, id: VmId, token: u32, body: Option<&[u8]>) -> bool {
    let answer = body.and_then(|body| serde_json::from_slice::<WatchAnswer>(body).ok());
    let now_ms = host::monotonic_ms();
    let cooled = answer.as_ref().map(|answer| answer.cooled.clone()).unwrap_or_default();
    let heard = vm.watching.borrow_mut().watch.answered(&ProcessData, id, token, answer, now_ms);
    if heard == Heard::Taken {
        vm.keyring.borrow_mut().heard(&ProcessData, &cooled, now_ms);
    }
    if heard == Heard::Nothing {
        metrics::poll_failed();
    }
    heard != Heard::NotOurs
}
