//! The gate: Envoy's callbacks of a downstream stream, turned into the stages of `keyward_core::gate`.

mod own;
mod showing;

use self::own::Own;
use crate::attempt::{self, Direction, FIRST_BYTE_LIMIT, Start};
use crate::config::Rotation;
use crate::host::{self, Buffer, Map};
use crate::metrics;
use crate::questions::Waiting;
use crate::replay::Replay;
use crate::settlements::ProcessData;
use crate::vm::{Desk, FLIGHT, KEY, REASON, SharedFlight, TARGET, Vm, vm};
use crate::watching::Running;
use keyward_core::body::{Splice, splice_piece, spliced_length};
use keyward_core::credentials::is_stripped;
use keyward_core::edge::{AdmitAnswer, RequestId, Settlement};
use keyward_core::gate::{self, Admitted, Answering, Asking, Decided, Reading, Refused, Told};
use keyward_core::questions::Question;
use keyward_core::refusal::Answer;
use proxy_wasm::traits::{Context, HttpContext};
use proxy_wasm::types::Action;
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::Instant;

/// How much of a body is copied into the VM at a time.
const PIECE: usize = 64 * 1024;

/// The stages a stream goes through; each holds only what it needs.
enum Stage {
    New,
    Reading(Reading),
    Asking {
        asking: Box<Asking>,
        since: Instant,
        /// The question is on its way.
        is_sent: bool,
    },
    Answering {
        answering: Box<Answering>,
        flight: SharedFlight,
        id: RequestId,
        replaced: bool,
        /// The headers wait for the body, of which so many bytes stand in Envoy's buffer for all that was taken.
        stands_in: Option<usize>,
        /// The tries are the gate's own.
        own: Option<Box<Own>>,
    },
    /// Refused, or already settled.
    Over,
}

/// A stream, which the root context reaches as well: it brings the answers of the policy service.
pub struct GateStream(SharedGate);

pub type SharedGate = Rc<RefCell<Gate>>;

pub struct Gate {
    vm: Rc<Vm>,
    /// Of its root context.
    desk: Rc<Desk>,
    /// Itself.
    shared: Weak<RefCell<Gate>>,
    context: u32,
    /// From when it is asked for; the tick may end it.
    running: Option<Rc<Running>>,
    stage: Stage,
    started_ms: u64,
    /// The request told its body's length.
    announced: bool,
    /// Body bytes of this stream that count as waiting.
    waiting: u64,
    /// The stream counts as open.
    open: bool,
    /// Somebody waits for its settlement.
    prompt: bool,
}

impl GateStream {
    pub fn new(context: u32, desk: Rc<Desk>) -> Self {
        GateStream(Rc::new_cyclic(|shared| RefCell::new(Gate::new(context, desk, shared.clone()))))
    }
}

impl Gate {
    fn new(context: u32, desk: Rc<Desk>, shared: Weak<RefCell<Gate>>) -> Self {
        Gate {
            vm: vm(),
            desk,
            shared,
            context,
            running: None,
            stage: Stage::New,
            started_ms: 0,
            announced: false,
            waiting: 0,
            open: false,
            prompt: false,
        }
    }

    fn take(&mut self) -> Stage {
        std::mem::replace(&mut self.stage, Stage::Over)
    }

    /// Reads what has newly come of the request body.
    fn read_body(&mut self, reading: &mut Reading, size: usize) -> Result<(), Refused> {
        let mut from = usize::try_from(reading.position()).unwrap_or(usize::MAX);
        while from < size {
            let piece = host::buffer(Buffer::RequestBody, from, PIECE.min(size - from)).filter(|p| !p.is_empty());
            let Some(piece) = piece else { return Err(reading.busy()) };
            reading.piece(&piece)?;
            from += piece.len();
        }
        let waiting = size as u64;
        let fits = self.vm.wait_with(self.waiting, waiting);
        self.waiting = waiting;
        if fits { Ok(()) } else { Err(reading.busy()) }
    }

    fn ask(&mut self, reading: Reading) -> Action {
        // Whatever is asked must be settled: with nowhere to keep the record, nothing is asked.
        let Some(vm_id) = self.vm.id().filter(|_| !self.vm.settlements.borrow().is_full()) else { return self.refuse(&reading.busy()) };
        let asking = match reading.end() {
            Ok(asking) => asking,
            Err(refused) => return self.refuse(&refused),
        };
        let need_key = self.vm.settlements.borrow().needs_key();
        let request = asking.admit_request(vm_id, self.vm.node().to_string(), need_key);
        let (Some(gate), true) = (self.shared.upgrade(), self.desk.ring()) else {
            return self.refuse(&Refused { asked: false, ..asking.unavailable() });
        };
        self.desk.questions.borrow_mut().ask(Question {
            waits: Waiting { gate, context: self.context },
            id: asking.id(),
            line: serde_json::to_vec(&request).unwrap_or_default(),
            asked_ms: host::monotonic_ms(),
            is_slow: !request.ask.refs.is_empty(),
        });
        self.running = Some(self.vm.watching.borrow_mut().open(asking.id(), self.context, asking.dialect()));
        self.stage = Stage::Asking { asking: Box::new(asking), since: Instant::now(), is_sent: false };
        Action::Pause
    }

    /// Whether there still is something to be asked.
    pub fn asks(&self) -> bool {
        matches!(self.stage, Stage::Asking { .. }) && !self.must_end()
    }

    /// The question is on its way.
    pub fn has_asked(&mut self) {
        if let Stage::Asking { is_sent, .. } = &mut self.stage {
            *is_sent = true;
        }
    }

    /// What the policy service has answered; `None`: nothing, in time. Brought by the root context, in this stream's name.
    pub fn answered(&mut self, mut answer: Option<AdmitAnswer>) {
        // A permit for a request that must end is void, although nobody may have told its caller yet.
        if self.must_end() {
            return;
        }
        let (asking, since, is_sent) = match self.take() {
            Stage::Asking { asking, since, is_sent } => (asking, since, is_sent),
            other => {
                self.stage = other;
                return;
            }
        };
        if let Some(plan) = answer.as_mut().and_then(|answer| answer.plan.as_mut()).filter(|_| !self.desk.config.falls_back()) {
            // This Envoy's router stays on one cluster.
            plan.targets.truncate(1);
            plan.first_byte_ms = None;
        }
        if let (Some(vm_id), Some(key)) = (self.vm.id(), answer.as_ref().and_then(|a| a.edge_key)) {
            self.vm.settlements.borrow_mut().has_key(vm_id, key);
        }
        self.prompt = answer.as_ref().and_then(|answer| answer.plan.as_ref()).is_some_and(|plan| plan.prompt);
        if answer.is_some() {
            metrics::answered(since);
        }
        let (id, decided) = (asking.id(), answer.as_ref().is_some_and(|a| a.refusal.is_some()));
        match asking.answered(answer) {
            Ok(Decided::Forward(admitted)) => self.forward(*admitted),
            Ok(Decided::Answer(told)) => {
                self.vm.wait_with(std::mem::take(&mut self.waiting), 0);
                self.tell(&told);
            }
            Err(refused) => {
                if !decided && is_sent {
                    self.settle(gate::void(id, self.elapsed_ms(), host::now_ms()));
                }
                self.vm.wait_with(std::mem::take(&mut self.waiting), 0);
                self.refuse(&Refused { asked: is_sent, ..refused });
            }
        }
    }

    /// Answers in the caller's dialect; nothing more happens on this stream.
    fn refuse(&mut self, refused: &Refused) -> Action {
        let code = refused.refusal.code.name();
        metrics::refused(code);
        if let Some(running) = &self.running {
            running.over();
        }
        if !refused.asked {
            self.vm.settlements.borrow_mut().count_refusal(code, host::now_ms());
        }
        host::set_filter_state(REASON, code);
        send(&refused.answer());
        Action::Pause
    }

    /// Gives the service's own answer; nothing is forwarded.
    fn tell(&mut self, told: &Told) {
        metrics::admitted();
        if let Some(running) = &self.running {
            running.over();
        }
        self.settle(told.settlement(self.elapsed_ms(), host::now_ms()));
        send(&told.answer());
    }

    fn settle(&self, settlement: Settlement) {
        let now = settlement.at;
        if let Some(line) = self.vm.settlements.borrow_mut().push(settlement, now) {
            host::set_filter_state("keyward.settle", line);
        }
        if self.prompt {
            self.vm.hurry();
        }
    }

    fn forward(&mut self, admitted: Admitted) {
        let id = admitted.permit.id();
        let plan = admitted.permit.plan();
        let (expires_ms, first_byte_ms) = (plan.expires_ms, plan.first_byte_ms);
        let config = &self.desk.config;
        let calls_out = config.rotation == Rotation::Callout;
        let length = spliced_length(admitted.body_bytes, &admitted.splices);
        let replayable = length <= config.max_replay_bytes;
        let written = write_body(&admitted.splices, admitted.body_bytes, self.announced)
            && host::set_filter_state(KEY, &plan.key)
            && host::set_filter_state(FLIGHT, id.to_string());
        self.vm.wait_with(std::mem::take(&mut self.waiting), 0);
        let has_choice = plan.targets.len() > 1 || plan.targets.first().is_some_and(|target| target.credentials.len() > 1);
        let (answering, mut flight) = admitted.forward(replayable);
        flight.choose_target(&mut self.vm.keyring.borrow_mut(), &ProcessData, host::monotonic_ms());
        let ready = written
            && host::set_filter_state(TARGET, flight.cluster())
            && first_byte_ms.filter(|_| !calls_out).is_none_or(limit_first_byte)
            && host::clear_route_cache();
        if !ready {
            // Nothing has left: the reservation goes back.
            self.settle(gate::void(id, 0, host::now_ms()));
            self.refuse(&answering.failed());
            return;
        }
        metrics::admitted();
        if let Some(running) = &self.running {
            self.vm.watching.borrow_mut().sent(running, expires_ms);
        }
        let flight = self.vm.take_off(id, flight);
        let mut own = None;
        if calls_out {
            let replay = if replayable && has_choice { Replay::keep(&self.vm, length) } else { None };
            if replay.is_none() {
                flight.borrow_mut().cannot_be_replayed();
            }
            own = Some(Box::new(Own::new(replay)));
        }
        self.stage = Stage::Answering { answering: Box::new(answering), flight: flight.clone(), id, replaced: false, stands_in: None, own };
        if calls_out {
            match attempt::begin(&self.vm, &flight, Direction::Own) {
                Start::Sent if !flight.borrow().rewrites() || attempt::write_request(&flight, usize::MAX) => {}
                Start::Sent => {
                    self.refuse_flight();
                    return;
                }
                Start::Wait(until_ms) => return attempt::pause(&self.vm, self.context, &flight, until_ms, Direction::Own),
                Start::Stopped => {
                    self.refuse_flight();
                    return;
                }
            }
        }
        host::resume_request();
    }

    fn must_end(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.ending().is_some())
    }

    /// The tick has answered in the provider's place, or cut the stream: whatever comes is no more to be looked at.
    fn was_ended(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.is_over() && running.ending().is_some())
    }

    fn elapsed_ms(&self) -> u64 {
        host::now_ms().saturating_sub(self.started_ms)
    }
}

/// Lets the router give a try up that has no first byte after so long, and go on as it does after a failed connection. Not by status: what
/// an answer means is the attempt's to say.
fn limit_first_byte(ms: u64) -> bool {
    host::set_header(Map::RequestHeaders, FIRST_BYTE_LIMIT, &ms.to_string())
        && host::set_header(Map::RequestHeaders, "x-envoy-retry-on", "reset")
}

/// Answers in the provider's place.
pub fn send(answer: &Answer) {
    let headers: Vec<(&str, &str)> = answer.headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
    host::send_response(answer.status, &headers, &answer.body);
}

/// Writes the admitted values into the buffered body, reading it in pieces so that only one copy is in the VM, and its length
/// into the headers if the caller had announced it.
fn write_body(splices: &[Splice], length: u64, announced: bool) -> bool {
    if splices.is_empty() {
        return true;
    }
    let new_length = spliced_length(length, splices);
    let (Ok(length), Ok(capacity)) = (usize::try_from(length), usize::try_from(new_length)) else { return false };
    let mut body = Vec::with_capacity(capacity);
    let mut from = 0;
    while from < length {
        let Some(piece) = host::buffer(Buffer::RequestBody, from, PIECE.min(length - from)).filter(|p| !p.is_empty()) else { return false };
        splice_piece(&piece, from as u64, splices, &mut body);
        from += piece.len();
    }
    host::replace_buffer(Buffer::RequestBody, length, &body)
        && (!announced || host::set_header(Map::RequestHeaders, "content-length", &new_length.to_string()))
}

impl Context for GateStream {
    /// An answer to a try that the gate makes itself.
    fn on_http_call_response(&mut self, token: u32, headers: usize, body_size: usize, _trailers: usize) {
        self.0.borrow_mut().called(token, headers > 0, body_size);
    }
}

impl HttpContext for GateStream {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        self.0.borrow_mut().request_headers(end_of_stream)
    }

    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        self.0.borrow_mut().request_body(size, end_of_stream)
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        self.0.borrow_mut().request_trailers()
    }

    fn on_http_response_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        self.0.borrow_mut().response_headers(end_of_stream)
    }

    fn on_http_response_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        self.0.borrow_mut().response_body(size, end_of_stream)
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        self.0.borrow_mut().response_trailers()
    }

    fn on_log(&mut self) {
        self.0.borrow_mut().over();
    }
}

/// The callbacks of a stream.
impl Gate {
    fn called(&mut self, token: u32, has_headers: bool, body_size: usize) {
        let ended = self.was_ended();
        if let Stage::Answering { own: Some(own), .. } = &mut self.stage
            && own.replay.as_mut().is_some_and(|replay| replay.answered(token))
            && !ended
        {
            self.own_answered(has_headers, body_size);
        }
    }

    fn request_headers(&mut self, end_of_stream: bool) -> Action {
        self.started_ms = host::now_ms();
        let map = host::headers(Map::RequestHeaders);
        let headers = map.pairs();
        self.announced = gate::header(&headers, "content-length").is_some_and(|length| !length.is_empty());
        #[cfg(feature = "test-trap")]
        match gate::header(&headers, "x-test-trap") {
            Some(b"lease") => crate::watching::trap_holder(),
            Some(_) => std::process::abort(),
            None => {}
        }
        // Without randomness there is no id that nobody can guess: the request ends here.
        let Some(id) = self.vm.request_id() else {
            host::send_response(503, &[("x-keyward-reason", "policy_unavailable")], "");
            return Action::Pause;
        };
        let reading = match gate::request_headers(&headers, self.desk.config.limits(), id) {
            Ok(reading) => reading,
            Err(refused) => return self.refuse(&refused),
        };
        if !self.vm.open_stream() {
            return self.refuse(&reading.busy());
        }
        self.open = true;
        for (name, value) in &headers {
            if is_stripped(name, value) {
                host::remove_header(Map::RequestHeaders, name);
            }
        }
        if end_of_stream {
            return self.ask(reading);
        }
        self.stage = Stage::Reading(reading);
        Action::Pause
    }

    fn request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        let mut reading = match self.take() {
            Stage::Reading(reading) => reading,
            other => {
                self.stage = other;
                // An answering stream was resumed with its body; any other waits or is over.
                return if matches!(self.stage, Stage::Answering { .. }) { Action::Continue } else { Action::Pause };
            }
        };
        if let Err(refused) = self.read_body(&mut reading, size) {
            return self.refuse(&refused);
        }
        if end_of_stream {
            return self.ask(reading);
        }
        self.stage = Stage::Reading(reading);
        Action::Pause
    }

    /// Trailers end the body: no body callback told so. None of them goes on: they are headers that nobody looked at.
    fn request_trailers(&mut self) -> Action {
        for (name, _) in host::headers(Map::RequestTrailers).pairs() {
            host::remove_header(Map::RequestTrailers, name);
        }
        match self.take() {
            Stage::Reading(reading) => self.ask(reading),
            other => {
                self.stage = other;
                if matches!(self.stage, Stage::Answering { .. }) { Action::Continue } else { Action::Pause }
            }
        }
    }

    /// The stream is over, however it ended.
    fn over(&mut self) {
        self.vm.wait_with(std::mem::take(&mut self.waiting), 0);
        if std::mem::take(&mut self.open) {
            self.vm.close_stream();
        }
        let ending = self.running.take().and_then(|running| {
            self.vm.watching.borrow_mut().close(&running);
            running.ending()
        });
        match self.take() {
            Stage::Asking { asking, is_sent, .. } => {
                if let Some(code) = ending {
                    metrics::refused(code.name());
                    host::set_filter_state(REASON, code.name());
                }
                if is_sent {
                    self.settle(gate::void(asking.id(), self.elapsed_ms(), host::now_ms()));
                }
            }
            Stage::Answering { mut answering, flight, id, replaced, own, .. } => {
                let is_own = own.is_some();
                if let Some(replay) = own.and_then(|own| own.replay) {
                    replay.let_go(&self.vm);
                }
                if let Some(code) = ending {
                    answering.break_off(code);
                }
                self.vm.land(id);
                self.vm.goes_on_no_more(self.context);
                self.vm.hold(answering.held(), 0);
                let ring = &mut self.vm.keyring.borrow_mut();
                // Of the gate's own tries Envoy knows here of the first alone; the others were callouts.
                let is_the_routers = !is_own || flight.borrow().number() <= 1;
                if is_the_routers && !flight.borrow().was_answered() && nothing_was_sent() {
                    flight.borrow_mut().never_left(ring);
                }
                flight.borrow_mut().try_is_over(ring);
                let clocks = host::clocks();
                let settlement = answering.over(&flight.borrow(), clocks.unix_ms.saturating_sub(self.started_ms), clocks);
                if let Some(code) = settlement.ended.filter(|_| !replaced) {
                    metrics::ended(code.name());
                    host::set_filter_state(REASON, code.name());
                }
                self.settle(settlement);
            }
            Stage::New | Stage::Reading(_) | Stage::Over => {}
        }
    }
}

/// Whether it is certain that no byte of the request reached the provider: Envoy says so, or it never had a connection for it.
fn nothing_was_sent() -> bool {
    const CERTAIN: [&str; 5] = ["connection_failure", "no_healthy_upstream", "overflow", "cluster_not_found", "route_not_found"];
    if !host::may_have_connected() {
        return true;
    }
    let details = host::property("response\0code_details").unwrap_or_default();
    let details = String::from_utf8_lossy(&details).into_owned();
    CERTAIN.iter().any(|sure| details.contains(sure))
}
