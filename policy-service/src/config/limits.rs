//! Limits as they are written, and what they mean.

use super::Fault;
use keyward_core::limits::{self, Limits, Window};
use keyward_core::money::Nanodollars;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most a quota or rate may say.
const MOST_COUNT: u64 = 1_000_000_000_000_000;

/// Most a budget may say, in nanodollars: a billion dollars, so that no sum of holds under it leaves its type.
const MOST: Nanodollars = Nanodollars(1_000_000_000_000_000_000);

/// A hard cap in money.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// Dollars, such as `"25.00"`.
    #[schema(example = "25.00")]
    pub usd: String,
    /// `day` and `month` begin at 00:00 UTC; `total` has no end.
    #[schema(example = "total")]
    pub window: String,
}

/// A cap in requests, tokens or both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quota {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<u64>,
    /// Tokens of input and output together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// `day` and `month` begin at 00:00 UTC; `total` has no end.
    #[schema(example = "day")]
    pub window: String,
}

/// Limits over any 60 seconds, and at any moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Rates {
    /// Requests in any 60 seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rpm: Option<u64>,
    /// Tokens in any 60 seconds; requests in flight count with all they may come to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<u64>,
    /// Requests at the same time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<u64>,
}

impl Rates {
    pub(super) fn is_none(&self) -> bool {
        *self == Rates::default()
    }
}

impl From<limits::Rates> for Rates {
    fn from(rates: limits::Rates) -> Self {
        Rates { rpm: rates.rpm, tpm: rates.tpm, max_in_flight: rates.max_in_flight }
    }
}

/// What a refused limit does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Enforce {
    #[default]
    Enforce,
    /// Everything is decided, recorded and measured; nothing is refused.
    Shadow,
}

impl Enforce {
    pub(super) fn is_default(&self) -> bool {
        *self == Enforce::default()
    }
}

impl From<Enforce> for limits::Enforce {
    fn from(enforce: Enforce) -> Self {
        match enforce {
            Enforce::Enforce => limits::Enforce::Enforce,
            Enforce::Shadow => limits::Enforce::Shadow,
        }
    }
}

impl From<limits::Enforce> for Enforce {
    fn from(enforce: limits::Enforce) -> Self {
        match enforce {
            limits::Enforce::Enforce => Enforce::Enforce,
            limits::Enforce::Shadow => Enforce::Shadow,
        }
    }
}

/// Dollars, at most a billion.
pub fn parse_usd(usd: &str) -> Result<Nanodollars, String> {
    let amount = Nanodollars::parse_usd(usd).filter(|amount| *amount <= MOST);
    amount.ok_or_else(|| "expected dollars such as \"50.00\", at most a billion".to_owned())
}

/// The limits that these lists mean, or everything that is wrong with them.
pub fn parse_limits(budgets: &[Budget], quotas: &[Quota], rates: &Rates) -> Result<Limits, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut fault = |field: String, message: String| faults.push(Fault { field, message });
    let mut limits = Limits::default();
    for (i, budget) in budgets.iter().enumerate() {
        let (window, cap) = (parse_window(&budget.window), parse_usd(&budget.usd));
        if let Ok(window) = window
            && limits.budget(window).is_some()
        {
            fault(format!("budgets[{i}].window"), format!("there is a budget for {:?} already", budget.window));
        }
        match (window, cap) {
            (Ok(window), Ok(cap)) => limits.budgets.push(limits::Budget { window, cap }),
            (window, cap) => {
                window.err().into_iter().for_each(|message| fault(format!("budgets[{i}].window"), message));
                cap.err().into_iter().for_each(|message| fault(format!("budgets[{i}].usd"), message));
            }
        }
    }
    let too_much = |n: Option<u64>| n.is_some_and(|n| n > MOST_COUNT);
    for (i, quota) in quotas.iter().enumerate() {
        let at = format!("quotas[{i}]");
        if quota.requests.is_none() && quota.tokens.is_none() {
            fault(at.clone(), "needs \"requests\", \"tokens\" or both".to_owned());
        }
        for (field, _) in [("requests", quota.requests), ("tokens", quota.tokens)].into_iter().filter(|(_, n)| too_much(*n)) {
            fault(format!("{at}.{field}"), format!("must be at most {MOST_COUNT}"));
        }
        match parse_window(&quota.window) {
            Ok(window) if limits.quotas.iter().any(|quota| quota.window == window) => {
                fault(format!("{at}.window"), format!("there is a quota for {:?} already", quota.window));
            }
            Ok(window) => limits.quotas.push(limits::Quota { window, requests: quota.requests, tokens: quota.tokens }),
            Err(message) => fault(format!("{at}.window"), message),
        }
    }
    let Rates { rpm, tpm, max_in_flight } = *rates;
    for (field, _) in [("rpm", rpm), ("tpm", tpm), ("max_in_flight", max_in_flight)].into_iter().filter(|(_, n)| too_much(*n)) {
        fault(format!("rates.{field}"), format!("must be at most {MOST_COUNT}"));
    }
    limits.rates = limits::Rates { rpm, tpm, max_in_flight };
    if faults.is_empty() { Ok(limits) } else { Err(faults) }
}

fn parse_window(window: &str) -> Result<Window, String> {
    let known = Window::ALL.into_iter().find(|known| known.name() == window);
    known.ok_or_else(|| "expected \"day\", \"month\" or \"total\"".to_owned())
}

/// Limits as they are written.
pub fn written(limits: &Limits) -> (Vec<Budget>, Vec<Quota>, Rates) {
    let budgets = limits.budgets.iter().map(|b| Budget { usd: b.cap.to_usd(), window: b.window.name().to_owned() });
    let quotas = limits.quotas.iter().map(|q| Quota { requests: q.requests, tokens: q.tokens, window: q.window.name().to_owned() });
    (budgets.collect(), quotas.collect(), limits.rates.into())
}
