//! Money is integers: nanodollars (1e-9 USD) in an i64, about 9.2 billion dollars at most, always rounded up.

use serde::{Deserialize, Serialize};

/// 1e-9 US dollars.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, Hash)]
#[serde(transparent)]
pub struct Nanodollars(pub i64);

impl Nanodollars {
    pub const ZERO: Self = Nanodollars(0);
    pub const MAX: Self = Nanodollars(i64::MAX);

    /// The cost of `tokens` each at `price` per million, summed exactly and rounded up once. Saturates at [`Self::MAX`].
    pub fn of_tokens(parts: &[(u64, Nanodollars)]) -> Self {
        let sum = parts.iter().fold(0i128, |sum, &(tokens, price)| sum.saturating_add(i128::from(tokens) * i128::from(price.0)));
        let whole = sum / 1_000_000 + i128::from(sum % 1_000_000 > 0);
        Nanodollars(i64::try_from(whole).unwrap_or(i64::MAX))
    }

    /// How many tokens at `price` per million this amount buys, rounded down. `None` when they are free.
    pub fn buys(self, price: Nanodollars) -> Option<u64> {
        let tokens = (i128::from(self.0.max(0)) * 1_000_000).checked_div(i128::from(price.0))?;
        Some(u64::try_from(tokens).unwrap_or(u64::MAX))
    }

    pub fn plus(self, other: Self) -> Self {
        Nanodollars(self.0.saturating_add(other.0))
    }

    pub fn minus(self, other: Self) -> Self {
        Nanodollars(self.0.saturating_sub(other.0))
    }

    /// Reads a decimal amount of dollars such as `50`, `0.25` or `12.000000001`: no sign, no exponent, at most nine decimals.
    pub fn parse_usd(text: &str) -> Option<Self> {
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !digits(whole) || !digits(decimals) || decimals.len() > 9 || (text.contains('.') && decimals.is_empty()) {
            return None;
        }
        let fraction: i64 = format!("{decimals:0<9}").parse().ok()?;
        whole.parse::<i64>().ok()?.checked_mul(1_000_000_000)?.checked_add(fraction).map(Nanodollars)
    }

    /// Dollars with as many decimals as are needed, at least two.
    pub fn to_usd(self) -> String {
        let (sign, n) = if self.0 < 0 { ("-", self.0.unsigned_abs()) } else { ("", self.0.unsigned_abs()) };
        let decimals = format!("{:09}", n % 1_000_000_000);
        let kept = decimals.trim_end_matches('0').len().max(2);
        format!("{sign}{}.{}", n / 1_000_000_000, decimals.get(..kept).unwrap_or(&decimals))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn rounds_up_once() {
        let price = Nanodollars(2_500_000_000);
        assert_eq!(Nanodollars::of_tokens(&[(1, price)]), Nanodollars(2_500));
        assert_eq!(
            Nanodollars::of_tokens(&[(1, Nanodollars(1)), (1, Nanodollars(1))]),
            Nanodollars(1),
            "two millionths are one nanodollar up"
        );
        assert_eq!(Nanodollars::of_tokens(&[(u64::MAX, Nanodollars(i64::MAX))]), Nanodollars::MAX);
    }

    #[test]
    fn reads_and_writes_dollars() {
        for (text, nano) in [("50", 50_000_000_000), ("0.25", 250_000_000), ("0.000000001", 1), ("12.5", 12_500_000_000)] {
            assert_eq!(Nanodollars::parse_usd(text), Some(Nanodollars(nano)), "{text}");
        }
        for bad in ["", ".5", "5.", "-1", "+1", "1e3", "0.0000000001", "9300000000", "1,5", " 1"] {
            assert_eq!(Nanodollars::parse_usd(bad), None, "{bad}");
        }
        assert_eq!(Nanodollars(50_000_000_000).to_usd(), "50.00");
        assert_eq!(Nanodollars(-1).to_usd(), "-0.000000001");
    }

    proptest! {
        #[test]
        fn what_it_buys_never_costs_more(amount in 0i64..i64::MAX / 2, price in 1i64..1_000_000_000_000) {
            let (amount, price) = (Nanodollars(amount), Nanodollars(price));
            let tokens = amount.buys(price).unwrap();
            prop_assert!(Nanodollars::of_tokens(&[(tokens, price)]) <= amount);
            prop_assert!(Nanodollars::of_tokens(&[(tokens.saturating_add(1), price)]) > amount);
        }

        #[test]
        fn usd_round_trip(n in 0i64..i64::MAX) {
            prop_assert_eq!(Nanodollars::parse_usd(&Nanodollars(n).to_usd()), Some(Nanodollars(n)));
        }
    }
}
