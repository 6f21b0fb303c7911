//! The answer on its way to the caller.

use super::{Gate, Stage};
use crate::host::{self, Buffer, Map};
use keyward_core::attempt::MAX_ERROR_BODY;
use keyward_core::meter::Passed;
use proxy_wasm::types::Action;

/// Callbacks, then what they do.
impl Gate {
    pub(super) fn response_headers(&mut self, end_of_stream: bool) -> Action {
        if self.was_ended() {
            return Action::Continue;
        }
        if matches!(self.stage, Stage::Answering { replaced: false, own: Some(_), .. })
            && let Some(action) = self.judge_own(end_of_stream)
        {
            return action;
        }
        self.show_headers(end_of_stream)
    }

    pub(super) fn response_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        if self.was_ended() {
            return Action::Continue;
        }
        if let Some(action) = self.judge_own_body(size, end_of_stream) {
            return action;
        }
        if matches!(self.stage, Stage::Answering { replaced: false, stands_in: Some(_), .. }) {
            return self.take_piece(size, end_of_stream);
        }
        let Stage::Answering { answering, replaced: false, .. } = &mut self.stage else { return Action::Continue };
        let piece = if size == 0 { Vec::new() } else { host::buffer(Buffer::ResponseBody, 0, size).unwrap_or_default() };
        let held = answering.held();
        let ending = self.running.as_ref().and_then(|running| running.ending());
        if let Some(code) = ending {
            answering.break_off(code);
        }
        let passed = answering.piece(&piece, end_of_stream, self.vm.room_to_hold(held));
        self.vm.hold(held, answering.held());
        if let Passed::Instead(other) = passed {
            host::replace_buffer(Buffer::ResponseBody, size, &other);
        }
        if let Some(running) = &self.running {
            if let (None, Some(code)) = (ending, answering.breaks_off()) {
                self.vm.watching.borrow_mut().end(running, code);
            }
            if answering.has_said_so() {
                running.said();
            }
            if end_of_stream {
                running.over();
            }
        }
        Action::Continue
    }

    pub(super) fn response_trailers(&mut self) -> Action {
        // They end the body of an error that waits.
        if let Some(action) = self.judge_own_body(MAX_ERROR_BODY, true) {
            return action;
        }
        let ended = self.was_ended();
        if let Stage::Answering { replaced: false, stands_in: Some(size), answering, .. } = &mut self.stage
            && !ended
        {
            let size = *size;
            answering.ended();
            return self.show_whole(size);
        }
        if let Stage::Answering { answering, .. } = &mut self.stage
            && !ended
        {
            answering.ended();
            self.running.iter().for_each(|running| running.over());
        }
        Action::Continue
    }

    /// The headers of an answer that is for the caller.
    pub(super) fn show_headers(&mut self, end_of_stream: bool) -> Action {
        let Stage::Answering { answering, flight, replaced, stands_in, .. } = &mut self.stage else { return Action::Continue };
        if *replaced {
            return Action::Continue;
        }
        if flight.borrow().was_told() {
            *replaced = true;
            return Action::Continue;
        }
        // The try saw the same headers a moment ago; without it, Envoy made the answer up.
        let edits = answering.headers(&mut flight.borrow_mut(), host::now_ms());
        match edits {
            Ok(edits) => {
                for name in edits.remove {
                    host::remove_header(Map::ResponseHeaders, name.as_bytes());
                }
                for (name, value) in edits.set {
                    host::set_header(Map::ResponseHeaders, name, &value);
                }
                if end_of_stream {
                    answering.ended();
                }
                if edits.wait {
                    *stands_in = Some(0);
                    return if end_of_stream { self.show_whole(0) } else { Action::Pause };
                }
                match &self.running {
                    Some(running) if end_of_stream => running.over(),
                    Some(running) => running.shows(answering.has_events()),
                    None => {}
                }
                Action::Continue
            }
            Err(refused) => {
                *replaced = true;
                self.refuse(&refused)
            }
        }
    }

    /// Takes a piece of an answer that goes on as a whole. `size`: of what is in Envoy's buffer now.
    pub(super) fn take_piece(&mut self, size: usize, end_of_stream: bool) -> Action {
        /// Keeps Envoy's buffer there, so that it can be written when trailers end the answer.
        const STAND_IN: &[u8] = b" ";
        let Stage::Answering { answering, stands_in: Some(stands_in), .. } = &mut self.stage else { return Action::Continue };
        let new = size.saturating_sub(*stands_in);
        let piece = if new == 0 { Vec::new() } else { host::buffer(Buffer::ResponseBody, *stands_in, new).unwrap_or_default() };
        let held = answering.held();
        answering.piece(&piece, end_of_stream, self.vm.room_to_hold(held).max(held));
        self.vm.hold(held, answering.held());
        if end_of_stream {
            return self.show_whole(size);
        }
        if new > 0 && host::replace_buffer(Buffer::ResponseBody, size, STAND_IN) {
            *stands_in = STAND_IN.len();
        }
        Action::Pause
    }

    /// An answer that waited has come whole: status and body are written. `size`: of what stands in its place.
    fn show_whole(&mut self, size: usize) -> Action {
        let Stage::Answering { answering, flight, replaced, stands_in, .. } = &mut self.stage else { return Action::Continue };
        *stands_in = None;
        let held = answering.held();
        let whole = answering.whole();
        self.vm.hold(held, answering.held());
        if let Some(running) = &self.running {
            running.over();
        }
        match whole {
            Ok((status, body)) => {
                let body = flight.borrow().without_secrets(body);
                host::set_header(Map::ResponseHeaders, ":status", &status.to_string());
                host::set_header(Map::ResponseHeaders, "content-length", &body.len().to_string());
                host::replace_buffer(Buffer::ResponseBody, size, body.as_bytes());
                Action::Continue
            }
            Err(refused) => {
                *replaced = true;
                self.refuse(&refused)
            }
        }
    }
}
