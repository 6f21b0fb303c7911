//! One account's sums, and how a request moves them.

use super::{DAY_MS, Recent, Window};
use crate::money::Nanodollars;

/// When something happens, by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Unix milliseconds.
    pub wall_ms: u64,
    /// Milliseconds of a clock that never goes back, near `wall_ms`.
    pub steady_ms: u64,
    /// The day whose windows count, from 1970-01-01: that of the wall clock, or a later one if the clock was set back.
    pub day: u64,
}

impl Moment {
    /// A moment at which both clocks agree.
    pub fn at(ms: u64) -> Self {
        Moment { wall_ms: ms, steady_ms: ms, day: ms / DAY_MS }
    }
}

/// One window's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sums {
    pub spent: Nanodollars,
    pub reserved: Nanodollars,
    pub requests: u64,
    pub tokens: u64,
    /// Tokens that requests in flight may come to.
    pub tokens_reserved: u64,
    /// The highest share of its budget, in percent, that an alarm told of.
    pub alarmed: u8,
}

/// What a key, a team or an organisation has used and holds. Windows never go back: what a window was charged stays charged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Account {
    /// The day of the day's and the month's window.
    pub day: u64,
    windows: [Sums; 3],
    pub in_flight: u64,
    pub recent: Recent,
    /// Mean time from admission to end, in milliseconds, the last ones counting most; 0: none yet.
    pub usual_ms: u64,
}

/// How a request that was reserved ends, or what a later word about it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// The day that it was reserved on: its windows are charged, or none if they are over.
    pub day: u64,
    /// It was in flight until now; otherwise it had been charged before.
    pub held: bool,
    pub hold: Nanodollars,
    pub hold_tokens: u64,
    /// Change of what is charged.
    pub charge: Nanodollars,
    /// Change of the tokens used.
    pub tokens: i64,
    /// It never was a request: it was given up before anything was forwarded.
    pub void: bool,
    /// How long it took, in milliseconds; `None`: nobody said.
    pub took_ms: Option<u64>,
}

impl Account {
    pub fn new(day: u64, windows: [Sums; 3], in_flight: u64, recent: Recent) -> Self {
        Account { day, windows, in_flight, recent, usual_ms: 0 }
    }

    pub fn sums(&self, window: Window) -> &Sums {
        match window {
            Window::Day => &self.windows[0],
            Window::Month => &self.windows[1],
            Window::Total => &self.windows[2],
        }
    }

    pub fn sums_mut(&mut self, window: Window) -> &mut Sums {
        match window {
            Window::Day => &mut self.windows[0],
            Window::Month => &mut self.windows[1],
            Window::Total => &mut self.windows[2],
        }
    }

    /// Tokens that count against a limit per minute: those of the last minute, and those that are in flight.
    pub fn tokens_now(&self) -> u64 {
        self.recent.tokens().saturating_add(self.sums(Window::Total).tokens_reserved)
    }

    /// Begins the windows that have begun since.
    pub fn advance(&mut self, now: Moment) {
        self.recent.advance(now.steady_ms);
        if now.day <= self.day {
            return;
        }
        for window in [Window::Day, Window::Month] {
            if window.start(now.day) > window.start(self.day) {
                *self.sums_mut(window) = Sums::default();
            }
        }
        self.day = now.day;
    }

    /// Sets aside what a request may cost.
    pub fn reserve(&mut self, hold: Nanodollars, tokens: u64, now: Moment, rated: bool) {
        self.advance(now);
        for sums in &mut self.windows {
            sums.reserved = sums.reserved.plus(hold);
            sums.requests = sums.requests.saturating_add(1);
            sums.tokens_reserved = sums.tokens_reserved.saturating_add(tokens);
        }
        self.in_flight = self.in_flight.saturating_add(1);
        if rated {
            self.recent.add(now.steady_ms, 1, 0);
        }
    }

    /// Moves a request to its end.
    pub fn end(&mut self, end: &End, now: Moment, rated: bool) {
        self.advance(now);
        for window in Window::ALL {
            if window.start(end.day) != window.start(self.day) {
                continue;
            }
            let sums = self.sums_mut(window);
            sums.spent = sums.spent.plus(end.charge).max(Nanodollars::ZERO);
            sums.tokens = sums.tokens.saturating_add_signed(end.tokens);
            if end.held {
                sums.reserved = sums.reserved.minus(end.hold).max(Nanodollars::ZERO);
                sums.tokens_reserved = sums.tokens_reserved.saturating_sub(end.hold_tokens);
            }
            if end.void {
                sums.requests = sums.requests.saturating_sub(1);
            }
        }
        if !end.held {
            return;
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        if rated {
            self.recent.add(now.steady_ms, 0, u64::try_from(end.tokens).unwrap_or(0));
        }
        if let Some(took_ms) = end.took_ms {
            self.usual_ms = if self.usual_ms == 0 { took_ms } else { self.usual_ms.saturating_mul(3).saturating_add(took_ms) / 4 };
        }
    }
}
