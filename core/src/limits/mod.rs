//! Limits in windows of time, and the sums they are held against. An [`Account`] is what a key, a team or an organisation has
//! spent, holds and may still do; nothing here reads a clock.

mod account;
mod recent;

pub use account::{Account, End, Moment, Sums};
pub use recent::Recent;

use crate::money::Nanodollars;
use serde::{Deserialize, Serialize};

pub const DAY_MS: u64 = 86_400_000;

/// A stretch of time over which sums are held against a limit. Days and months begin at 00:00 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    Day,
    Month,
    Total,
}

impl Window {
    pub const ALL: [Window; 3] = [Window::Day, Window::Month, Window::Total];

    pub fn name(self) -> &'static str {
        match self {
            Window::Day => "day",
            Window::Month => "month",
            Window::Total => "total",
        }
    }

    /// The first day of the window that `day` is in, counted from 1970-01-01.
    pub fn start(self, day: u64) -> u64 {
        match self {
            Window::Day => day,
            Window::Month => day - u64::from(date(day).2 - 1),
            Window::Total => 0,
        }
    }

    /// Milliseconds from `now_ms` until the next window of this kind begins; `None`: never. `day` is the window's own, which
    /// may be ahead of the clock.
    pub fn ends_in_ms(self, day: u64, now_ms: u64) -> Option<u64> {
        let next = match self {
            Window::Day => day + 1,
            Window::Month => (day..day + 32).find(|&later| Window::Month.start(later) > day)?,
            Window::Total => return None,
        };
        Some((next * DAY_MS).saturating_sub(now_ms))
    }
}

/// Year, month and day of month of a day counted from 1970-01-01 (Howard Hinnant's `civil_from_days`).
pub fn date(day: u64) -> (u64, u32, u32) {
    let z = day + 719_468;
    let (era, of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day_of_month = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, u32::try_from(month).unwrap_or(0), u32::try_from(day_of_month).unwrap_or(0))
}

/// A day as `2026-11-20`.
pub fn date_text(day: u64) -> String {
    let (year, month, of_month) = date(day);
    format!("{year:04}-{month:02}-{of_month:02}")
}

/// Most money that may be spent in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    pub window: Window,
    pub cap: Nanodollars,
}

/// Most requests and tokens in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    pub window: Window,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
}

/// Limits over any 60 seconds, and at any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rates {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<u64>,
}

/// Everything that one key, policy, team or organisation sets.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<Budget>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quotas: Vec<Quota>,
    pub rates: Rates,
}

impl Limits {
    pub fn budget(&self, window: Window) -> Option<Nanodollars> {
        self.budgets.iter().filter(|budget| budget.window == window).map(|budget| budget.cap).min()
    }
}

/// What a refused limit is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Enforce {
    #[default]
    Enforce,
    /// Everything is decided, recorded and measured; nothing is refused.
    Shadow,
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Days counted with `date -u -d ... +%s`.
    #[test]
    fn days_have_dates() {
        for (day, expected) in
            [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (11_017, (2000, 3, 1)), (20_777, (2026, 11, 20))]
        {
            assert_eq!(date(day), expected);
        }
        // Every day is the one after the day before, for two centuries.
        let mut previous = date(0);
        for day in 1..73_000 {
            let now = date(day);
            let follows = now == (previous.0, previous.1, previous.2 + 1)
                || now == (previous.0, previous.1 + 1, 1)
                || (now == (previous.0 + 1, 1, 1) && previous.1 == 12);
            assert!(follows, "{previous:?} {now:?}");
            previous = now;
        }
    }

    #[test]
    fn windows_begin_and_end_at_midnight() {
        let day = 20_777;
        assert_eq!((Window::Day.start(day), Window::Month.start(day), Window::Total.start(day)), (day, day - 19, 0));
        let noon = day * DAY_MS + DAY_MS / 2;
        assert_eq!(Window::Day.ends_in_ms(day, noon), Some(DAY_MS / 2));
        assert_eq!(Window::Month.ends_in_ms(day, noon), Some(10 * DAY_MS + DAY_MS / 2));
        assert_eq!(Window::Total.ends_in_ms(day, noon), None);
        assert_eq!(Window::Day.ends_in_ms(day, noon - DAY_MS), Some(DAY_MS + DAY_MS / 2), "the clock went back a day");
    }
}
