//! The attempt: Envoy's callbacks of one try, on the provider cluster's own filter chain.

use crate::gate::send;
use crate::host::{self, Buffer, Map};
use crate::metrics;
use crate::settlements::ProcessData;
use crate::vm::{AT_ONCE, REASON, SharedFlight, TARGET, Vm, vm};
use keyward_core::attempt::{Begun, MAX_ERROR_BODY, Next, RequestEdits};
use keyward_core::gate::Refused;
use keyward_core::operation::Dialect;
use keyward_core::refusal::{Code, Refusal};
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::cell::Cell;
use std::rc::Rc;

/// How long an error's headers wait for its body, which tells more of the credential.
pub const LONGEST_BODY_WAIT_MS: u64 = 500;
/// On an answer: the router is to try again.
const RETRY: &str = "x-keyward-retry";

pub struct AttemptStream {
    context: u32,
    vm: Rc<Vm>,
    flight: Option<SharedFlight>,
    /// The answer's headers wait for its body.
    reads_body: bool,
    /// The request's headers wait for its body, which is written anew.
    rewrites: bool,
    /// Which of the flight's tries it carries; 0: none yet.
    number: Rc<Cell<usize>>,
}

/// A try that stands still until a time, and how it goes on then.
#[derive(Debug)]
pub struct Paused {
    context: u32,
    flight: SharedFlight,
    until_ms: u64,
    on: Direction,
    /// Which of the flight's tries it is.
    number: usize,
    /// Where the attempt is told which one it carries, as soon as it does.
    carried: Rc<Cell<usize>>,
}

impl Paused {
    pub fn is_of(&self, context: u32) -> bool {
        self.context == context
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// No credential is usable yet.
    Request,
    /// The same, and the try is the gate's own.
    Own,
    /// The body of an error has not come.
    Response,
    /// The same, and the try is the gate's own.
    OwnAnswer,
}

impl AttemptStream {
    pub fn new(context: u32) -> Self {
        AttemptStream { context, vm: vm(), flight: None, reads_body: false, rewrites: false, number: Rc::default() }
    }

    fn pause(&self, flight: &SharedFlight, until_ms: u64, on: Direction) {
        let number = flight.borrow().number();
        let paused = Paused { context: self.context, flight: flight.clone(), until_ms, on, number, carried: self.number.clone() };
        self.vm.paused.borrow_mut().push(paused);
    }

    /// No credential is usable yet: nothing of the request goes on.
    fn waits(&self) -> bool {
        self.vm.paused.borrow().iter().any(|paused| paused.context == self.context && paused.on == Direction::Request)
    }

    /// The body of the request, as far as it has come.
    fn request_body(&mut self, size: usize, end: bool) -> Action {
        let Some(flight) = &self.flight else { return Action::Pause };
        if self.waits() {
            flight.borrow_mut().body_came |= end;
            return Action::Pause;
        }
        if !self.rewrites {
            return Action::Continue;
        }
        if !end {
            return Action::Pause;
        }
        self.rewrites = false;
        if write_request(flight, size) {
            return Action::Continue;
        }
        let refused = flight.borrow().refused();
        refuse(refused);
        Action::Pause
    }

    /// The answer can be judged. `Pass` goes on with whatever it is.
    fn judge(&mut self, body: &[u8]) {
        self.reads_body = false;
        if let Some(flight) = &self.flight {
            judge_for_router(&self.vm, flight, body);
        }
    }
}

impl Context for AttemptStream {
    /// The try is over. One that was sent and not answered may have been carried out.
    fn on_done(&mut self) -> bool {
        if let Some(flight) = self.flight.take().filter(|flight| flight.borrow().first_byte_ms().is_some()) {
            let had_connection = host::may_have_connected();
            let (mut flight, number) = (flight.borrow_mut(), self.number.get());
            if had_connection { flight.lose(number) } else { flight.spare(number) }
        }
        // Envoy may know its context for a moment longer.
        self.vm.goes_on_no_more(self.context);
        true
    }
}

impl HttpContext for AttemptStream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        self.flight = self.vm.flight_of_stream();
        let Some(flight) = self.flight.clone() else {
            // No permit, or a VM that was reloaded under the request: nothing leaves.
            refuse(None);
            return Action::Pause;
        };
        if flight.borrow().has_fallback() {
            let named = host::property(TARGET).unwrap_or_default();
            flight.borrow_mut().runs_on(host::property("xds\0cluster_name").unwrap_or_default(), named);
        }
        self.rewrites = flight.borrow().rewrites();
        match begin(&self.vm, &flight, Direction::Request) {
            Start::Sent => {
                self.number.set(flight.borrow().number());
                if self.rewrites { Action::Pause } else { Action::Continue }
            }
            Start::Wait(until_ms) => {
                self.pause(&flight, until_ms, Direction::Request);
                Action::Pause
            }
            Start::Stopped => {
                let refused = flight.borrow().refused();
                refuse(refused);
                Action::Pause
            }
        }
    }

    /// Headers that wait would go on, as they are, with the first part of the body that may pass.
    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        self.request_body(size, end_of_stream)
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        self.request_body(usize::MAX, true)
    }

    fn on_http_response_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        let Some(flight) = self.flight.clone() else { return Action::Continue };
        match answered(&self.vm, &flight) {
            Next::Pass => Action::Continue,
            Next::Retry => {
                ask_for_retry(&flight);
                Action::Continue
            }
            Next::ReadBody if end_of_stream => {
                self.judge(b"");
                Action::Continue
            }
            Next::ReadBody => {
                self.reads_body = true;
                self.pause(&flight, host::monotonic_ms() + LONGEST_BODY_WAIT_MS, Direction::Response);
                Action::Pause
            }
        }
    }

    fn on_http_response_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        if !self.reads_body {
            return Action::Continue;
        }
        let was_judged = self.flight.as_ref().is_none_or(|flight| flight.borrow().is_judged());
        if was_judged {
            self.reads_body = false;
            return Action::Continue;
        }
        if !end_of_stream && size < MAX_ERROR_BODY {
            return Action::Pause;
        }
        let body = host::buffer(Buffer::ResponseBody, 0, size.min(MAX_ERROR_BODY)).unwrap_or_default();
        self.judge(&body);
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        if std::mem::take(&mut self.reads_body) && self.flight.as_ref().is_some_and(|flight| !flight.borrow().is_judged()) {
            let body = host::buffer(Buffer::ResponseBody, 0, MAX_ERROR_BODY).unwrap_or_default();
            self.judge(&body);
        }
        Action::Continue
    }
}

/// Envoy takes it out before the request leaves.
pub const FIRST_BYTE_LIMIT: &str = "x-envoy-upstream-rq-per-try-timeout-ms";

/// Lets a stream of the gate's stand still until a time.
pub fn pause(vm: &Vm, context: u32, flight: &SharedFlight, until_ms: u64, on: Direction) {
    let number = flight.borrow().number();
    vm.paused.borrow_mut().push(Paused { context, flight: flight.clone(), until_ms, on, number, carried: Rc::default() });
}

/// How a try has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Sent,
    /// Until when to wait.
    Wait(u64),
    /// The flight says why.
    Stopped,
}

/// Begins a try on the request in hand, which the gate makes itself or an attempt of its own.
pub fn begin(vm: &Vm, flight: &SharedFlight, on: Direction) -> Start {
    let map = host::headers(Map::RequestHeaders);
    let begun = flight.borrow_mut().begin(&mut vm.keyring.borrow_mut(), &ProcessData, &map.pairs(), host::monotonic_ms());
    if let Some(cluster) = flight.borrow().cluster_without_answer().filter(|_| on == Direction::Request) {
        host::set_filter_state(TARGET, cluster);
    }
    let mut edits = match begun {
        Begun::Go(edits) => edits,
        Begun::Wait { until_ms } => return Start::Wait(until_ms),
        Begun::Stop => return Start::Stopped,
    };
    if on == Direction::Own {
        limit_own(flight, &mut edits);
    }
    if write(&edits, on) {
        return Start::Sent;
    }
    // Headers that could not be written: nothing leaves.
    flight.borrow_mut().give_up(Refusal::new(Code::PolicyUnavailable, "the request could not be forwarded; nothing left"));
    Start::Stopped
}

/// Lets Envoy give up a try that the gate makes itself, if its first byte takes longer than the route allows.
pub fn limit_own(flight: &SharedFlight, edits: &mut RequestEdits) {
    if let Some(ms) = flight.borrow().first_byte_ms() {
        edits.set.push((FIRST_BYTE_LIMIT, ms.to_string().into()));
    }
}

/// Takes in the headers of the answer in hand, and takes out those that don't go on.
pub fn answered(vm: &Vm, flight: &SharedFlight) -> Next {
    let map = host::headers(Map::ResponseHeaders);
    let (remove, next) = flight.borrow_mut().answered(&mut vm.keyring.borrow_mut(), &ProcessData, &map.pairs(), host::clocks());
    for name in remove {
        host::remove_header(Map::ResponseHeaders, &name);
    }
    next
}

/// Judges the answer in hand.
pub fn judge(vm: &Vm, flight: &SharedFlight, body: &[u8]) -> Next {
    let map = host::headers(Map::ResponseHeaders);
    flight.borrow_mut().judge(&mut vm.keyring.borrow_mut(), &ProcessData, &map.pairs(), body, host::clocks())
}

/// Judges the answer in hand and marks it for the router, if another try is to be made.
fn judge_for_router(vm: &Vm, flight: &SharedFlight, body: &[u8]) {
    if judge(vm, flight, body) == Next::Retry {
        ask_for_retry(flight);
    }
}

/// Lets the router try again: on the cluster of the target that is in hand now.
fn ask_for_retry(flight: &SharedFlight) {
    if flight.borrow().has_fallback() {
        host::set_filter_state(TARGET, flight.borrow().cluster());
    }
    host::set_header(Map::ResponseHeaders, RETRY, "1");
}

/// Writes the body in hand, of `size` bytes at most, as the target in hand is to have it. `false`: nothing may be sent.
pub fn write_request(flight: &SharedFlight, size: usize) -> bool {
    let body = host::buffer(Buffer::RequestBody, 0, size).unwrap_or_default();
    let Some(written) = flight.borrow_mut().body(&body) else { return false };
    let done = host::replace_buffer(Buffer::RequestBody, body.len(), &written)
        && host::set_header(Map::RequestHeaders, "content-length", &written.len().to_string());
    if !done {
        flight.borrow_mut().give_up(Refusal::new(Code::PolicyUnavailable, "the request could not be forwarded; nothing left"));
    }
    done
}

/// Refuses a request that waited.
fn stop(paused: &Paused) {
    let refused = paused.flight.borrow().refused();
    if let (Direction::Own | Direction::OwnAnswer, Some(refused)) = (paused.on, &refused) {
        // The gate sees its own answer pass, and must not answer again.
        paused.flight.borrow_mut().tell();
        let code = refused.refusal.code.name();
        metrics::refused(code);
        host::set_filter_state(REASON, code);
    }
    refuse(refused);
}

/// Ends the try where it is. Downstream, the gate sees the answer pass and says the same.
fn refuse(refused: Option<Refused>) {
    let answer = refused.map_or_else(
        || Refusal::new(Code::PolicyUnavailable, "this request was not admitted").retry_after(1).answer(Dialect::OpenAi, ""),
        |refused| refused.answer(),
    );
    send(&answer);
}

/// Puts the headers of a try into the request in hand.
fn write(edits: &RequestEdits, on: Direction) -> bool {
    // Without it the router finds no route; the route takes it out.
    const ROUTED_BY: &[u8] = b"x-forwarded-proto";
    for name in edits.remove.iter().filter(|name| on != Direction::Own || *name != ROUTED_BY) {
        host::remove_header(Map::RequestHeaders, name);
    }
    let written = edits.set.iter().all(|(name, value)| host::set_header(Map::RequestHeaders, name, value));
    // The gate's own try goes where its host leads: in a mesh, routes are by host.
    written && (on != Direction::Own || host::clear_route_cache())
}

/// Begins a try that has waited. Its body may have come meanwhile.
fn begin_waiting(vm: &Vm, paused: &Paused) -> Start {
    let came = paused.flight.borrow().body_came || paused.on == Direction::Own;
    let start = begin(vm, &paused.flight, paused.on);
    paused.flight.borrow_mut().body_came = came;
    if start == Start::Sent {
        paused.carried.set(paused.flight.borrow().number());
    }
    if start == Start::Sent && came && paused.flight.borrow().rewrites() && !write_request(&paused.flight, usize::MAX) {
        return Start::Stopped;
    }
    start
}

/// Lets some of the tries go on whose time has come; the bell is rung for the rest. Called after all that the root does in its own name.
pub fn go_on(vm: &Vm, root: u32) {
    if vm.paused.borrow().is_empty() {
        return;
    }
    let now_ms = host::monotonic_ms();
    let due: Vec<Paused> = vm.paused.borrow_mut().extract_if(.., |paused| paused.until_ms <= now_ms).take(AT_ONCE).collect();
    if due.len() == AT_ONCE {
        vm.ring();
    }
    for mut paused in due {
        // One whose stream is gone, or whose try is long since over.
        if paused.flight.borrow().number() != paused.number || !host::act_for(paused.context) {
            continue;
        }
        match paused.on {
            Direction::Request | Direction::Own => match begin_waiting(vm, &paused) {
                Start::Sent
                    if paused.on == Direction::Request && paused.flight.borrow().rewrites() && !paused.flight.borrow().body_came => {}
                Start::Sent => host::resume_request(),
                Start::Wait(until_ms) => {
                    paused.until_ms = until_ms;
                    vm.paused.borrow_mut().push(paused);
                }
                Start::Stopped => stop(&paused),
            },
            Direction::Response => {
                if !paused.flight.borrow().is_judged() {
                    let body = host::buffer(Buffer::ResponseBody, 0, MAX_ERROR_BODY).unwrap_or_default();
                    judge_for_router(vm, &paused.flight, &body);
                    host::resume_response();
                }
            }
            Direction::OwnAnswer => {
                if !paused.flight.borrow().is_judged() {
                    judge(vm, &paused.flight, b"");
                    let mut flight = paused.flight.borrow_mut();
                    if flight.refused().is_none() {
                        flight.fail(Refusal::new(Code::ProviderUnreachable, "the provider's error did not come whole"));
                    }
                    drop(flight);
                    stop(&paused);
                }
            }
        }
    }
    host::act_for(root);
}
