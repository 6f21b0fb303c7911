//! Tries that the gate makes itself (`rotation: callout`).

use super::{Gate, Stage};
use crate::attempt::{self, Direction, LONGEST_BODY_WAIT_MS};
use crate::host::{self, Buffer, Map};
use crate::replay::{self, Replay};
use crate::settlements::ProcessData;
use keyward_core::attempt::{Begun, MAX_ERROR_BODY, Next};
use keyward_core::gate::header;
use keyward_core::meter::Passed;
use keyward_core::refusal::{Code, Refusal};
use proxy_wasm::types::Action;

/// What the gate has of tries that it makes itself.
pub(super) struct Own {
    /// The request, if it can be sent again.
    pub(super) replay: Option<Replay>,
    /// What comes of the router's try is not for the caller: an error's headers wait for its body, or a callout is awaited.
    holds: bool,
    reads_body: bool,
}

impl Own {
    pub(super) fn new(replay: Option<Replay>) -> Self {
        Own { replay, holds: false, reads_body: false }
    }
}

impl Gate {
    /// The router's answer to the gate's own first try. `Some`: it is not, or not yet, for the caller.
    pub(super) fn judge_own(&mut self, end_of_stream: bool) -> Option<Action> {
        let Stage::Answering { flight, own: Some(own), .. } = &mut self.stage else { return None };
        if !host::property("response\0code_details").is_some_and(|details| details.starts_with(b"via_upstream")) {
            // Envoy itself has answered, or this is the gate's own word.
            if !flight.borrow().has_fallback() || flight.borrow().refusal().is_some() {
                return None;
            }
            let never_left = super::nothing_was_sent();
            if !never_left && !host::property("response\0code_details").is_some_and(|details| details.starts_with(b"upstream_")) {
                return None;
            }
            let next = self.without_answer(never_left);
            return self.go_on(next);
        }
        match attempt::answered(&self.vm, flight) {
            Next::Pass => None,
            Next::ReadBody if !end_of_stream => {
                (own.holds, own.reads_body) = (true, true);
                let until_ms = host::monotonic_ms() + LONGEST_BODY_WAIT_MS;
                attempt::pause(&self.vm, self.context, flight, until_ms, Direction::OwnAnswer);
                Some(Action::Pause)
            }
            Next::ReadBody => {
                let next = attempt::judge(&self.vm, flight, b"");
                self.go_on(next)
            }
            next @ Next::Retry => self.go_on(next),
        }
    }

    /// The last try has no answer of its provider's. Of what never left, the next target may know more; of what was sent, if the route says so.
    fn without_answer(&self, never_left: bool) -> Next {
        let Stage::Answering { flight, .. } = &self.stage else { return Next::Pass };
        let (mut flight, mut ring) = (flight.borrow_mut(), self.vm.keyring.borrow_mut());
        let now_ms = host::monotonic_ms();
        if never_left { flight.not_connected(&mut ring, &ProcessData, now_ms) } else { flight.unanswered(&mut ring, &ProcessData, now_ms) }
    }

    /// What becomes of a try that has been judged. `Some`: another is on its way, or has been refused.
    fn go_on(&mut self, next: Next) -> Option<Action> {
        if next != Next::Retry {
            return None;
        }
        let must_end = self.must_end();
        let timeout = self.desk.config.callout_timeout();
        loop {
            let Stage::Answering { flight, own: Some(own), .. } = &mut self.stage else { return None };
            own.holds = true;
            // Nothing is tried for a request that is about to be ended.
            if must_end {
                return Some(Action::Pause);
            }
            let Some(replay) = &mut own.replay else { return None };
            let begun = flight.borrow_mut().begin(&mut self.vm.keyring.borrow_mut(), &ProcessData, &replay.pairs(), host::monotonic_ms());
            match begun {
                Begun::Go(mut edits) => {
                    attempt::limit_own(flight, &mut edits);
                    replay.write(&edits);
                    let cluster = self.desk.config.cluster(flight.borrow().cluster()).to_owned();
                    let body = if flight.borrow().rewrites() { flight.borrow_mut().body(replay.body()) } else { Some(Vec::new()) };
                    let Some(body) = body else { break };
                    if replay.send(&cluster, &body, timeout) {
                        return Some(Action::Pause);
                    }
                    // Envoy knows of no host, or has no room for it.
                    let flight = flight.clone();
                    if self.without_answer(true) == Next::Retry {
                        continue;
                    }
                    flight
                        .borrow_mut()
                        .give_up(Refusal::new(Code::ProviderUnreachable, "the provider could not be reached").retry_after(1));
                }
                // A callout can't be held back.
                Begun::Wait { .. } => flight.borrow_mut().exhaust(&mut self.vm.keyring.borrow_mut(), &ProcessData, host::monotonic_ms()),
                Begun::Stop => {}
            }
            break;
        }
        self.refuse_flight()
    }

    /// Tells the caller why nothing more is tried.
    pub(super) fn refuse_flight(&mut self) -> Option<Action> {
        let Stage::Answering { flight, replaced, .. } = &mut self.stage else { return None };
        let refused = flight.borrow().refused()?;
        *replaced = true;
        Some(self.refuse(&refused))
    }

    /// A callout of the gate's own has been answered; without headers, nobody knows what became of it.
    pub(super) fn own_answered(&mut self, has_headers: bool, body_size: usize) {
        let Stage::Answering { answering, flight, replaced, own: Some(_), .. } = &mut self.stage else { return };
        let map = host::headers(Map::CallResponseHeaders);
        let headers = map.pairs();
        // Envoy answers a callout that got none, or took too long, by itself; only a provider's answer has the time that it took. Without any
        // headers the answer broke off, or was too large: there was one.
        if !has_headers || header(&headers, "x-envoy-upstream-service-time").is_none() {
            let flight = flight.clone();
            let body = host::buffer(Buffer::CallResponseBody, 0, body_size).unwrap_or_default();
            if has_headers && self.without_answer(says_that_nothing_left(&body)) == Next::Retry {
                self.go_on(Next::Retry);
                return;
            }
            flight.borrow_mut().fail(Refusal::new(Code::ProviderUnreachable, "the provider did not answer"));
            self.refuse_flight();
            return;
        }
        let body = if body_size == 0 { Vec::new() } else { host::buffer(Buffer::CallResponseBody, 0, body_size).unwrap_or_default() };
        let (remove, next) = {
            let (mut flight, mut ring) = (flight.borrow_mut(), self.vm.keyring.borrow_mut());
            let (remove, next) = flight.answered(&mut ring, &ProcessData, &headers, host::clocks());
            let start = body.get(..body.len().min(MAX_ERROR_BODY)).unwrap_or_default();
            let next = if next == Next::ReadBody { flight.judge(&mut ring, &ProcessData, &headers, start, host::clocks()) } else { next };
            (remove, next)
        };
        if next == Next::Retry {
            self.go_on(next);
            return;
        }
        let edits = answering.headers(&mut flight.borrow_mut(), host::now_ms());
        *replaced = true;
        let edits = match edits {
            Ok(edits) => edits,
            Err(refused) => {
                self.refuse(&refused);
                return;
            }
        };
        let mut status = flight.borrow().status().unwrap_or(502);
        let mut passed = answering.piece(&body, true, usize::MAX);
        if edits.wait {
            match answering.whole() {
                Ok((translated, body)) => {
                    status = translated;
                    passed = Passed::Instead(flight.borrow().without_secrets(body).into_bytes());
                }
                Err(refused) => {
                    self.refuse(&refused);
                    return;
                }
            }
        }
        let goes = |name: &[u8]| {
            replay::is_of_the_connection(name)
                || remove.iter().any(|other| other == name)
                || edits.remove.iter().any(|other| other.as_bytes() == name)
                || edits.set.iter().any(|(other, _)| other.as_bytes() == name)
        };
        let kept = headers.iter().filter(|(name, _)| !goes(name));
        let text = kept.filter_map(|(name, value)| Some((std::str::from_utf8(name).ok()?, std::str::from_utf8(value).ok()?)));
        let all: Vec<(&str, &str)> = text.chain(edits.set.iter().map(|(name, value)| (*name, value.as_str()))).collect();
        let body = if let Passed::Instead(other) = passed { other } else { body };
        if let Some(running) = &self.running {
            running.over();
        }
        host::send_response(status, &all, body);
    }

    /// The body of a router's answer to the gate's own first try. `Some`: it is not, or not yet, for the caller.
    pub(super) fn judge_own_body(&mut self, size: usize, end_of_stream: bool) -> Option<Action> {
        let Stage::Answering { flight, own: Some(own), replaced: false, .. } = &mut self.stage else { return None };
        if !own.holds {
            return None;
        }
        if !own.reads_body || (!end_of_stream && size < MAX_ERROR_BODY) {
            return Some(Action::Pause);
        }
        if flight.borrow().was_told() {
            return Some(Action::Pause);
        }
        (own.holds, own.reads_body) = (false, false);
        let body = host::buffer(Buffer::ResponseBody, 0, size.min(MAX_ERROR_BODY)).unwrap_or_default();
        let next = attempt::judge(&self.vm, flight, &body);
        if let Some(action) = self.go_on(next) {
            return Some(action);
        }
        let shown = self.show_headers(false);
        if matches!(self.stage, Stage::Answering { replaced: false, stands_in: Some(_), .. }) {
            // They wait for the body, which has come as far as it was read.
            return Some(self.take_piece(size, end_of_stream));
        }
        Some(shown).filter(|action| *action == Action::Pause)
    }
}

/// Whether this is what Envoy answers to a callout that never had a connection.
fn says_that_nothing_left(body: &[u8]) -> bool {
    const CERTAIN: [&str; 5] =
        ["remote connection failure", "local connection failure", "connection timeout", "overflow", "no healthy upstream"];
    let text = String::from_utf8_lossy(body);
    let reason = text.split_once("reset reason: ").map_or(&*text, |(_, reason)| reason);
    CERTAIN.iter().any(|sure| reason.starts_with(sure))
}
