//! What is set aside for a request out of the limits of its key, its team and its organisation: all it may come to, or a
//! fair share of what is left.

use crate::admission::{Hold, MIN_OUTPUT_TOKENS, asked_output, bound, guess, input_tokens};
use crate::edge::Ask;
use crate::limits::{Account, Limits, Moment, Window};
use crate::money::Nanodollars;
use crate::operation::{Costs, Operation};
use crate::price::Price;
use crate::refusal::{Code, Headroom, Refusal, Room};

/// One request's share of what nobody holds, as long as that is a lot: requests that come later must find something left.
const SHARES: i64 = 32;
/// An answer of so many tokens is long enough for nearly all; below it what is left is divided by those who are there, not by
/// those who might come.
const COMFORTABLE_TOKENS: u64 = 16_384;
/// A minute's tokens are not cut into smaller pieces than this part of them: such a request waits.
const SMALLEST_PIECE: u64 = 50;
/// How long requests take while none has ended yet.
const USUAL_MS: u64 = 2_000;
const LONGEST_WAIT_MS: u64 = 300_000;

/// Whose limits they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    Key,
    Team,
    Organisation,
}

impl Of {
    fn name(self) -> &'static str {
        match self {
            Of::Key => "this key",
            Of::Team => "this key's team",
            Of::Organisation => "the organisation",
        }
    }
}

/// One account with the limits that it is held to.
#[derive(Debug, Clone)]
pub struct Level<'a> {
    pub of: Of,
    pub limits: Vec<&'a Limits>,
    /// As of now: [`Account::advance`] was called.
    pub account: &'a Account,
}

impl Level<'_> {
    fn budgets(&self) -> impl Iterator<Item = (Window, Nanodollars)> {
        self.limits.iter().flat_map(|limits| limits.budgets.iter().map(|budget| (budget.window, budget.cap)))
    }

    fn token_quotas(&self) -> impl Iterator<Item = (Window, u64)> {
        self.limits.iter().flat_map(|limits| limits.quotas.iter().filter_map(|quota| Some((quota.window, quota.tokens?))))
    }

    fn tpm(&self) -> Option<u64> {
        self.limits.iter().filter_map(|limits| limits.rates.tpm).min()
    }

    fn rpm(&self) -> Option<u64> {
        self.limits.iter().filter_map(|limits| limits.rates.rpm).min()
    }

    /// Milliseconds after which what is held now is likely to be free.
    fn usual_ms(&self) -> u64 {
        let usual = if self.account.usual_ms == 0 { USUAL_MS } else { self.account.usual_ms };
        usual.min(LONGEST_WAIT_MS)
    }

    /// How many requests may be made, whatever they cost.
    fn check_requests(&self, now: Moment) -> Result<(), Refusal> {
        let of = self.of.name();
        let most = self.limits.iter().filter_map(|limits| limits.rates.max_in_flight).min();
        if most.is_some_and(|most| self.account.in_flight >= most) {
            let message = format!("{of} has {} requests in flight, as many as it may", self.account.in_flight);
            return Err(Refusal::new(Code::ConcurrencyLimited, message).retry_after_ms(self.usual_ms()));
        }
        if let Some(rpm) = self.rpm().filter(|rpm| self.account.recent.requests() >= *rpm) {
            let wait = self.account.recent.requests_fall_to(rpm.saturating_sub(1), now.steady_ms);
            let refusal = Refusal::new(Code::RateLimited, format!("{of} may make {rpm} requests a minute"));
            return Err(if rpm == 0 { refusal } else { refusal.retry_after_ms(wait) });
        }
        for quota in self.limits.iter().flat_map(|limits| &limits.quotas) {
            let Some(most) = quota.requests.filter(|most| self.account.sums(quota.window).requests >= *most) else { continue };
            let message = format!("{of} may make {most} requests{}, and has made them", in_window(quota.window));
            return Err(self.until_the_window_ends(Refusal::new(Code::QuotaExhausted, message), quota.window, now));
        }
        Ok(())
    }

    /// Whether the least that the request may come to is there.
    fn check_room(&self, needed: &Hold, asked: &Hold, now: Moment) -> Result<(), Refusal> {
        let of = self.of.name();
        for (window, cap) in self.budgets() {
            let sums = self.account.sums(window);
            let left = cap.minus(sums.spent);
            if needed.total > left {
                // What others spent is not the caller's to know.
                let figures = match self.of {
                    Of::Key => format!(": ${} of ${} left", left.max(Nanodollars::ZERO).to_usd(), cap.to_usd()),
                    Of::Team | Of::Organisation => String::new(),
                };
                let refusal = Refusal::new(Code::CapExhausted, format!("the budget of {of}{} is spent{figures}", in_window(window)));
                return Err(self.until_the_window_ends(refusal, window, now));
            }
            if needed.total > left.minus(sums.reserved) {
                let message = format!("what is left of the budget of {of}{} is reserved by requests in flight", in_window(window));
                return Err(Refusal::new(Code::CapReserved, message).retry_after_ms(self.usual_ms()));
            }
        }
        for (window, most) in self.token_quotas() {
            let sums = self.account.sums(window);
            let left = most.saturating_sub(sums.tokens);
            let refusal = || Refusal::new(Code::QuotaExhausted, format!("{of} may use {most} tokens{}", in_window(window)));
            if needed.tokens > left {
                return Err(self.until_the_window_ends(refusal(), window, now));
            }
            if needed.tokens > left.saturating_sub(sums.tokens_reserved) {
                return Err(refusal().retry_after_ms(self.usual_ms()));
            }
        }
        let Some(tpm) = self.tpm() else { return Ok(()) };
        let needed = needed.tokens.max(asked.tokens.min(needed.tokens.saturating_add(tpm / SMALLEST_PIECE)));
        let refusal = Refusal::new(Code::RateLimited, format!("{of} may use {tpm} tokens a minute, and this request may come to {needed}"));
        if needed > tpm {
            return Err(refusal);
        }
        if needed > tpm.saturating_sub(self.account.tokens_now()) {
            let in_flight = self.account.sums(Window::Total).tokens_reserved;
            return Err(match tpm.checked_sub(in_flight.saturating_add(needed)) {
                Some(settled) => refusal.retry_after_ms(self.account.recent.tokens_fall_to(settled, now.steady_ms)),
                None => refusal.retry_after_ms(self.usual_ms()),
            });
        }
        Ok(())
    }

    /// The money and the tokens that one request may have of what is left here.
    fn share(&self, comfortable: &Hold) -> (Nanodollars, u64) {
        let here = i64::try_from(self.account.in_flight.saturating_add(1)).unwrap_or(i64::MAX);
        let share = |left: i64, comfortable: i64| (left / SHARES).max((left / here).min(comfortable));
        let money = |(window, cap): (Window, Nanodollars)| {
            let sums = self.account.sums(window);
            share(cap.minus(sums.spent).minus(sums.reserved).0, comfortable.total.0)
        };
        let tokens = |left: u64| {
            let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            u64::try_from(share(signed(left), signed(comfortable.tokens))).unwrap_or(0)
        };
        let quotas = self.token_quotas().map(|(window, most)| {
            let sums = self.account.sums(window);
            most.saturating_sub(sums.tokens).saturating_sub(sums.tokens_reserved)
        });
        let rate = self.tpm().map(|tpm| tpm.saturating_sub(self.account.tokens_now()));
        let money = self.budgets().map(money).min().unwrap_or(i64::MAX);
        (Nanodollars(money), quotas.chain(rate).map(tokens).min().unwrap_or(u64::MAX))
    }

    /// Waiting helps only when the next window begins.
    fn until_the_window_ends(&self, refusal: Refusal, window: Window, now: Moment) -> Refusal {
        match window.ends_in_ms(self.account.day, now.wall_ms) {
            Some(wait) => refusal.retry_after_ms(wait),
            None => refusal,
        }
    }
}

fn in_window(window: Window) -> &'static str {
    match window {
        Window::Day => " for the day",
        Window::Month => " for the month",
        Window::Total => "",
    }
}

/// Whether what a request costs must have a bound here: some level limits money or tokens.
pub fn is_bounded(levels: &[Level<'_>]) -> bool {
    levels.iter().any(|level| level.budgets().next().is_some() || level.token_quotas().next().is_some() || level.tpm().is_some())
}

/// Decides what is held for a request.
pub fn reserve(
    levels: &[Level<'_>],
    ask: &Ask,
    operation: &'static Operation,
    price: Option<&Price>,
    now: Moment,
) -> Result<Hold, Refusal> {
    for level in levels {
        level.check_requests(now)?;
    }
    if operation.costs == Costs::Free {
        return Ok(Hold::default());
    }
    // A model that is not made for this operation has no price in it.
    let price = price.filter(|price| operation.models.contains(&price.mode));
    if !is_bounded(levels) {
        return Ok(unlimited(ask, operation, price));
    }
    let unbounded = |message: String| Refusal::new(Code::UnboundedInput, message);
    if operation.costs == Costs::Unknown {
        return Err(unbounded(format!("no price is known for {}, and this key has a budget", ask.endpoint)));
    }
    if let Some(what) = &ask.unbounded {
        return Err(unbounded(format!("a key with a budget can't use {what}: its cost has no bound")));
    }
    let model = ask.model.as_deref().unwrap_or_default();
    // What stands in for a price is good enough to be charged, not to keep a promise.
    let price = price.filter(|price| !price.stand_in);
    let price = price.ok_or_else(|| unbounded(format!("no price is known for the model {model} here, and this key has a budget")))?;
    let no_bound = || unbounded(format!("the cost of this request to {model} has no bound, and this key has a budget"));
    let full = bound(ask, operation, price, None).ok_or_else(no_bound)?;
    let clamps = !operation.limits().is_empty();
    let least = MIN_OUTPUT_TOKENS.max(ask.thinking_budget.saturating_add(1)).min(asked_output(ask, price));
    let at_most = |tokens: u64| if clamps { bound(ask, operation, price, Some(tokens)).ok_or_else(no_bound) } else { Ok(full) };
    let needed = at_most(least)?;
    let comfortable = at_most(COMFORTABLE_TOKENS.max(least))?;
    let (mut money, mut tokens) = (Nanodollars::MAX, u64::MAX);
    for level in levels {
        level.check_room(&needed, &full, now)?;
        let share = level.share(&comfortable);
        (money, tokens) = (money.min(share.0), tokens.min(share.1));
    }
    if !clamps || (full.total <= money && full.tokens <= tokens) {
        return Ok(full);
    }
    let choices = ask.choices.max(1);
    let (_, each) = price.dearest_for(input_tokens(ask, price).ok_or_else(no_bound)?);
    let per_token = Nanodollars(each.0.saturating_mul(i64::try_from(choices).unwrap_or(i64::MAX)));
    let affordable = money.minus(full.input).buys(per_token).unwrap_or(u64::MAX);
    let allowed = tokens.saturating_sub(full.input_tokens()) / choices;
    at_most(affordable.min(allowed).max(least))
}

/// Without a limit nothing is clamped: the hold only tells what may come.
pub fn unlimited(ask: &Ask, operation: &'static Operation, price: Option<&Price>) -> Hold {
    let hold = price
        .filter(|price| operation.models.contains(&price.mode))
        .and_then(|price| bound(ask, operation, price, None).or_else(|| guess(ask, operation, price)));
    hold.map_or(Hold::default(), |hold| Hold { clamp: None, ..hold })
}

/// What the tightest limits per minute have left, for the headers of the answer.
pub fn headroom(levels: &[Level<'_>], now: Moment) -> Option<Headroom> {
    let requests = levels.iter().filter_map(|level| {
        let (limit, recent) = (level.rpm()?, &level.account.recent);
        Some(Room { limit, remaining: limit.saturating_sub(recent.requests()), reset_ms: recent.empty_in_ms(now.steady_ms) })
    });
    let tokens = levels.iter().filter_map(|level| {
        let limit = level.tpm()?;
        let reset_ms = level.account.recent.empty_in_ms(now.steady_ms);
        Some(Room { limit, remaining: limit.saturating_sub(level.account.tokens_now()), reset_ms })
    });
    let headroom = Headroom { requests: requests.min_by_key(|room| room.remaining), tokens: tokens.min_by_key(|room| room.remaining) };
    (headroom != Headroom::default()).then_some(headroom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{Budget, Quota, Rates};
    use crate::price::PriceTable;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn ask(bytes: u64, max_tokens: Option<u64>) -> Ask {
        let (provider, endpoint, model) = ("openai".into(), "POST /v1/chat/completions".into(), Some("gpt-4o".into()));
        Ask { provider, endpoint, model, bytes, max_tokens, choices: 1, ..Ask::default() }
    }

    fn price(max_output: u64, usd_output: i64) -> Price {
        let mut price = PriceTable::built_in().unwrap().find("openai", "gpt-4o").unwrap().clone();
        (price.max_output, price.base.output, price.base.media_output) =
            (Some(max_output), Nanodollars(usd_output), Nanodollars(usd_output));
        price
    }

    fn usd(usd: &str, window: Window) -> Limits {
        Limits { budgets: vec![Budget { window, cap: Nanodollars::parse_usd(usd).unwrap() }], ..Limits::default() }
    }

    fn take(levels: &[(&Limits, &Account)], ask: &Ask, price: &Price, now: Moment) -> Result<Hold, Refusal> {
        let levels: Vec<Level> = levels
            .iter()
            .zip([Of::Key, Of::Team, Of::Organisation])
            .map(|((limits, account), of)| Level { of, limits: vec![limits], account })
            .collect();
        reserve(&levels, ask, crate::admission::operation(ask), Some(price), now)
    }

    /// DESIGN 6: a worst-case hold never starves a key that has spent nothing.
    #[test]
    fn parallel_requests_share_what_is_left() {
        let (limits, price, now) = (usd("25.00", Window::Total), price(64_000, 25_000_000_000), Moment::at(0));
        let mut account = Account::default();
        let mut clamps = Vec::new();
        for _ in 0..32 {
            let hold = take(&[(&limits, &account)], &ask(200, Some(64_000)), &price, now).unwrap();
            clamps.push(hold.clamp.unwrap_or(64_000));
            account.reserve(hold.total, hold.tokens, now, false);
        }
        let (least, most) = (clamps.iter().min().unwrap(), clamps.iter().max().unwrap());
        assert!(least * 4 >= *most, "{clamps:?}");
        assert!(account.sums(Window::Total).reserved <= Nanodollars(25_000_000_000));
    }

    #[test]
    fn who_is_alone_gets_a_comfortable_answer() {
        let (limits, price) = (usd("0.50", Window::Day), price(64_000, 25_000_000_000));
        let hold = take(&[(&limits, &Account::default())], &ask(100, None), &price, Moment::at(0)).unwrap();
        assert_eq!(hold.clamp, Some(16_384));
        let hold = take(&[(&usd("0.20", Window::Day), &Account::default())], &ask(100, None), &price, Moment::at(0)).unwrap();
        assert!(hold.clamp.unwrap() > 7_900 && hold.total <= Nanodollars(200_000_000), "{hold:?}");
    }

    #[test]
    fn every_level_and_window_counts() {
        let (price, now) = (price(16_384, 10_000_000_000), Moment::at(90_000_000));
        let (wide, narrow) = (usd("100.00", Window::Total), usd("0.001", Window::Month));
        let mut account = Account::default();
        account.advance(now);
        let empty = account.clone();
        let hold = take(&[(&wide, &empty), (&wide, &empty), (&narrow, &empty)], &ask(10, None), &price, now).unwrap();
        assert!(hold.total <= Nanodollars(1_000_000), "the organisation's budget binds: {hold:?}");
        account.sums_mut(Window::Month).spent = Nanodollars(1_000_000);
        let refusal = take(&[(&wide, &empty), (&narrow, &account)], &ask(10, None), &price, now).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_ms), (Code::CapExhausted, Some(30 * 86_400_000 - 3_600_000)));
        assert_eq!(refusal.message, "the budget of this key's team for the month is spent");
        account.advance(Moment::at(31 * 86_400_000));
        assert!(take(&[(&wide, &empty), (&narrow, &account)], &ask(10, None), &price, Moment::at(31 * 86_400_000)).is_ok(), "a new month");
    }

    #[test]
    fn rates_and_quotas() {
        let (price, now) = (price(16_384, 10_000_000_000), Moment::at(10_000_000));
        let limits = |rates, quota: Option<Quota>| Limits { rates, quotas: quota.into_iter().collect(), ..Limits::default() };
        let refused = |limits: &Limits, account: &Account, asked: Option<u64>| {
            let refusal = take(&[(limits, account)], &ask(100, asked), &price, now).unwrap_err();
            (refusal.code, refusal.retry_after_ms)
        };
        let mut account = Account::default();
        account.reserve(Nanodollars::ZERO, 900, now, true);
        let rpm = limits(Rates { rpm: Some(1), ..Rates::default() }, None);
        assert_eq!(refused(&rpm, &account, None), (Code::RateLimited, Some(60_019)));
        let one = limits(Rates { max_in_flight: Some(1), ..Rates::default() }, None);
        assert_eq!(refused(&one, &account, None), (Code::ConcurrencyLimited, Some(2_000)));
        let requests = Quota { window: Window::Total, requests: Some(1), tokens: None };
        assert_eq!(refused(&limits(Rates::default(), Some(requests)), &account, None), (Code::QuotaExhausted, None));
        let tokens = Quota { window: Window::Total, requests: None, tokens: Some(1_000) };
        assert_eq!(refused(&limits(Rates::default(), Some(tokens)), &account, None), (Code::QuotaExhausted, Some(2_000)), "held");
        let tpm = limits(Rates { tpm: Some(1_000), ..Rates::default() }, None);
        assert_eq!(refused(&tpm, &account, Some(500)), (Code::RateLimited, Some(2_000)), "held");
        let mut used = Account::default();
        used.recent.add(now.steady_ms, 0, 950);
        assert_eq!(refused(&tpm, &used, Some(500)), (Code::RateLimited, Some(60_019)));
        let small = limits(Rates { tpm: Some(110), ..Rates::default() }, None);
        assert_eq!(refused(&small, &Account::default(), Some(500)), (Code::RateLimited, None), "it never fits");
        let hold = take(&[(&tpm, &Account::default())], &ask(100, None), &price, now).unwrap();
        assert_eq!((hold.clamp, hold.tokens), (Some(900), 1_000), "what does not say how long it is takes what there is");
    }

    proptest! {
        /// I1 at every level, whatever the mixture of limits: no hold exceeds what is free in money or tokens.
        #[test]
        fn a_hold_fits_everywhere(
            caps in proptest::collection::vec(0i64..1 << 36, 3), spent in proptest::collection::vec(0i64..1 << 35, 3),
            reserved in proptest::collection::vec(0i64..1 << 35, 3), in_flight in 0u64..300, tokens in 0u64..500_000, used in 0u64..300_000,
            tpm in proptest::option::of(1u64..500_000), bytes in 1u64..100_000, max in proptest::option::of(0u64..100_000), choices in 1u64..5,
        ) {
            let price = price(64_000, 10_000_000_000);
            let windows = [Window::Day, Window::Month, Window::Total];
            let limits = Limits {
                budgets: windows.iter().zip(&caps).map(|(window, cap)| Budget { window: *window, cap: Nanodollars(*cap) }).collect(),
                quotas: vec![Quota { window: Window::Day, requests: None, tokens: Some(tokens) }],
                rates: Rates { tpm, ..Rates::default() },
            };
            let sums = |i: usize| crate::limits::Sums { spent: Nanodollars(spent[i]), reserved: Nanodollars(reserved[i]), tokens: used / 2, tokens_reserved: used / 3, ..Default::default() };
            let account = Account::new(0, [sums(0), sums(1), sums(2)], in_flight, crate::limits::Recent::default());
            let asked = Ask { choices, ..ask(bytes, max) };
            if let Ok(hold) = take(&[(&limits, &account)], &asked, &price, Moment::at(0)) {
                for i in 0..3 {
                    prop_assert!(spent[i] + reserved[i] + hold.total.0 <= caps[i]);
                }
                prop_assert!(used / 2 + used / 3 + hold.tokens <= tokens);
                prop_assert!(tpm.is_none_or(|tpm| account.tokens_now() + hold.tokens <= tpm));
            }
        }
    }
}
