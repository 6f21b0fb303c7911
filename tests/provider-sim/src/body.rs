//! A response body that keeps a pace, falls silent, breaks off, and knows what it has cost so far.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame as HttpFrame, SizeHint};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::{Sleep, sleep};

use crate::directive::Directive;
use crate::frames::Frame;
use crate::ledger::Ended;
use crate::ticket::Ticket;

/// Time for the bytes sent to leave this machine before the connection is cut.
const BEFORE_CUT: Duration = Duration::from_millis(15);

#[derive(Debug, Clone, Copy)]
struct Cut {
    after: u64,
    reset: bool,
}

#[derive(Debug)]
pub struct SimBody {
    frames: VecDeque<Frame>,
    ticket: Ticket,
    /// How it ends if nobody interferes.
    outcome: Ended,
    pace: Duration,
    silent: Duration,
    split: Option<usize>,
    cut: Option<Cut>,
    trailers: bool,
    announced: Option<u64>,
    sent: u64,
    started: bool,
    /// A delta has gone out: the next one keeps the pace.
    paced: bool,
    pause: Option<Pin<Box<Sleep>>>,
    /// The pause before the frame in front has been taken.
    rested: bool,
    /// The pause before the cut has been taken.
    cut_rested: bool,
    /// Nothing more until what was handed out has been flushed.
    flush: bool,
}

impl SimBody {
    /// A body that is sent at once.
    pub fn plain(bytes: Bytes, ticket: Ticket, outcome: Ended) -> Self {
        let frame = Frame { bytes, produced: 0, delta: false };
        SimBody::scripted(vec![frame], ticket, outcome, &Directive::default(), true)
    }

    /// `announce` gives the length in advance, as `content-length`.
    pub fn scripted(frames: Vec<Frame>, ticket: Ticket, outcome: Ended, script: &Directive, announce: bool) -> Self {
        let cut = |after: Option<u64>, reset| after.map(|after| Cut { after, reset });
        let length = frames.iter().map(|frame| frame.bytes.len() as u64).sum();
        SimBody {
            frames: frames.into(),
            ticket,
            outcome,
            pace: Duration::from_millis(script.pace_ms.unwrap_or(0)),
            silent: Duration::from_millis(script.silent_ms.unwrap_or(0)),
            split: script.split.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
            cut: cut(script.cut_after_bytes, false).or(cut(script.reset_after_bytes, true)),
            trailers: script.trailers,
            announced: (announce && !script.trailers).then_some(length),
            sent: 0,
            started: false,
            paced: false,
            pause: None,
            rested: false,
            cut_rested: false,
            flush: false,
        }
    }

    fn rest(&mut self, pause: Duration) {
        self.pause = Some(Box::pin(sleep(pause)));
    }

    /// The pause that the frame in front needs.
    fn pause_before(&mut self, delta: bool) -> Duration {
        if !std::mem::replace(&mut self.started, true) {
            return self.silent;
        }
        if delta && self.paced { self.pace } else { Duration::ZERO }
    }

    fn break_off(&mut self, cut: Cut) -> io::Error {
        self.frames.clear();
        self.trailers = false;
        if cut.reset {
            self.ticket.connection().reset();
        }
        self.ticket.close(Ended::Fault);
        io::Error::other("scripted cut")
    }

    fn end_of_body(&mut self) -> Option<io::Result<HttpFrame<Bytes>>> {
        if !std::mem::replace(&mut self.trailers, false) {
            return None;
        }
        let mut trailers = HeaderMap::new();
        trailers.insert(HeaderName::from_static("x-sim-trailer"), HeaderValue::from_static("1"));
        Some(Ok(HttpFrame::trailers(trailers)))
    }

    /// The next piece of the frame in front, no longer than the split and the cut allow.
    fn next_piece(&mut self) -> Option<Bytes> {
        let room = self.cut.map_or(u64::MAX, |cut| cut.after - self.sent);
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(self.split.unwrap_or(usize::MAX));
        let frame = self.frames.front_mut()?;
        let piece = frame.bytes.split_to(room.min(frame.bytes.len()));
        self.sent += piece.len() as u64;
        if let Some(bill) = self.ticket.bill.as_mut() {
            // Begun to be sent means that all of its tokens had been generated.
            bill.produced = bill.produced.max(frame.produced);
        }
        if frame.bytes.is_empty() {
            self.paced |= frame.delta;
            self.rested = false;
            self.frames.pop_front();
        }
        if self.frames.is_empty() && self.cut.is_none_or(|cut| self.sent < cut.after) {
            self.cut = None;
            self.ticket.close(self.outcome);
        }
        Some(piece)
    }
}

impl Body for SimBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<HttpFrame<Bytes>>>> {
        let this = self.get_mut();
        if std::mem::replace(&mut this.flush, false) {
            // The server flushes whenever a body has nothing to give.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if let Some(pause) = this.pause.as_mut() {
                if pause.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                this.pause = None;
            }
            if let Some(cut) = this.cut.filter(|cut| this.sent >= cut.after) {
                if std::mem::replace(&mut this.cut_rested, true) {
                    return Poll::Ready(Some(Err(this.break_off(cut))));
                }
                this.rest(BEFORE_CUT);
                continue;
            }
            let Some(front) = this.frames.front() else {
                return Poll::Ready(this.end_of_body());
            };
            if !std::mem::replace(&mut this.rested, true) {
                let delta = front.delta;
                let pause = this.pause_before(delta);
                if !pause.is_zero() {
                    this.rest(pause);
                    continue;
                }
            }
            this.flush = this.split.is_some();
            return Poll::Ready(this.next_piece().map(|piece| Ok(HttpFrame::data(piece))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && !self.trailers && self.cut.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.announced.map_or_else(SizeHint::default, |length| SizeHint::with_exact(length.saturating_sub(self.sent)))
    }
}
