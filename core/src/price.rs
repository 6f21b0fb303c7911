//! Prices per million tokens in nanodollars, the cost of what was used, and the dearest it could have been.

use crate::money::Nanodollars;
use crate::usage::Usage;
use std::collections::HashMap;

/// Public list prices; `tools/prices` makes the file.
const BUILT_IN: &str = include_str!("../data/prices.tsv");

/// What one token of each class costs, per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    pub input: Nanodollars,
    pub cache_read: Nanodollars,
    pub cache_write: Nanodollars,
    pub cache_write_1h: Nanodollars,
    pub output: Nanodollars,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    pub base: Rates,
    /// Above so many input tokens the whole request costs these rates.
    pub tier: Option<(u64, Rates)>,
    /// Most input tokens the model takes.
    pub context: Option<u64>,
    pub max_output: u64,
    /// The model thinks in tokens that nobody sees but somebody pays.
    pub reasoning: bool,
}

impl Price {
    /// What `usage` costs, rounded up once.
    pub fn cost(&self, usage: &Usage) -> Nanodollars {
        let input = usage.input.saturating_add(usage.cache_read).saturating_add(usage.cache_write).saturating_add(usage.cache_write_1h);
        let rates = match self.tier {
            Some((above, rates)) if input > above => rates,
            _ => self.base,
        };
        Nanodollars::of_tokens(&[
            (usage.input, rates.input),
            (usage.cache_read, rates.cache_read),
            (usage.cache_write, rates.cache_write),
            (usage.cache_write_1h, rates.cache_write_1h),
            (usage.output, rates.output),
        ])
    }

    /// The most one input token can cost.
    pub fn dearest_input(&self) -> Nanodollars {
        self.all_rates().map(|r| r.input.max(r.cache_read).max(r.cache_write).max(r.cache_write_1h)).max().unwrap_or_default()
    }

    /// The most one output token can cost.
    pub fn dearest_output(&self) -> Nanodollars {
        self.all_rates().map(|r| r.output).max().unwrap_or_default()
    }

    fn all_rates(&self) -> impl Iterator<Item = Rates> {
        std::iter::once(self.base).chain(self.tier.map(|(_, rates)| rates))
    }
}

/// Prices by provider and exact model name.
#[derive(Debug, Clone, Default)]
pub struct PriceTable(HashMap<(String, String), Price>);

impl PriceTable {
    /// The table that ships with Keyward.
    pub fn built_in() -> Result<Self, String> {
        Self::parse(BUILT_IN)
    }

    /// Reads tab-separated lines; a line that can't be read is named in the error.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut table = HashMap::new();
        for (n, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#') && !line.is_empty()) {
            let (provider, model, price) = row(line).ok_or_else(|| format!("price table, line {}: can't be read", n + 1))?;
            table.insert((provider, model), price);
        }
        Ok(PriceTable(table))
    }

    pub fn find(&self, provider: &str, model: &str) -> Option<&Price> {
        self.0.get(&(provider.to_owned(), model.to_owned()))
    }
}

fn row(line: &str) -> Option<(String, String, Price)> {
    let cells: Vec<&str> = line.split('\t').collect();
    let cell = |i: usize| cells.get(i).copied().filter(|c| !c.is_empty());
    let money = |i: usize| match cell(i) {
        None => Some(None),
        Some(text) => text.parse().ok().filter(|n: &i64| *n >= 0).map(|n| Some(Nanodollars(n))),
    };
    let rates = |input: Nanodollars, read: Option<Nanodollars>, write: Option<Nanodollars>, write_1h: Option<Nanodollars>, output| Rates {
        input,
        cache_read: read.unwrap_or(input),
        cache_write: write.unwrap_or(input),
        cache_write_1h: write_1h.or(write).unwrap_or(input),
        output,
    };
    let base = rates(money(2)??, money(3)?, money(4)?, money(5)?, money(6)??);
    let tier = match cell(9) {
        None => None,
        Some(above) => {
            let input = money(10)??;
            // A tier that lists no 1 h cache price keeps the base's ratio to the 5 min price, at least.
            let write_1h = money(12)?.map(|w| w.plus(w));
            Some((above.parse().ok()?, rates(input, money(11)?, money(12)?, write_1h, money(13)??)))
        }
    };
    let price = Price {
        base,
        tier,
        context: cell(7).map(str::parse).transpose().ok()?,
        max_output: cell(8)?.parse().ok()?,
        reasoning: cell(14) == Some("1"),
    };
    Some((cell(0)?.to_owned(), cell(1)?.to_owned(), price))
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Figures from the providers' public price pages, typed in by hand.
    #[test]
    fn known_prices() {
        let table = PriceTable::built_in().unwrap();
        let gpt_4o = table.find("openai", "gpt-4o").unwrap();
        let usage = Usage { input: 1_000_000, cache_read: 1_000_000, output: 1_000_000, ..Usage::default() };
        assert_eq!(gpt_4o.cost(&usage).to_usd(), "13.75");
        assert_eq!((gpt_4o.max_output, gpt_4o.reasoning), (16_384, false));
        let sonnet = table.find("anthropic", "claude-sonnet-4-5").unwrap();
        let usage = Usage { cache_write: 1_000_000, ..Usage::default() };
        assert_eq!(sonnet.cost(&usage).to_usd(), "3.75");
        assert_eq!(sonnet.dearest_input().to_usd(), "6.00");
        assert!(table.find("openai", "o3").unwrap().reasoning);
        assert_eq!(table.find("openai", "no-such-model"), None);
    }

    #[test]
    fn a_long_prompt_costs_the_tier_for_every_token() {
        let table = PriceTable::parse("p\tm\t1000000\t\t\t\t2000000\t\t10\t100\t3000000\t\t\t4000000\t0\n").unwrap();
        let price = table.find("p", "m").unwrap();
        assert_eq!(price.cost(&Usage { input: 100, output: 1, ..Usage::default() }), Nanodollars(102));
        assert_eq!(price.cost(&Usage { input: 101, output: 1, ..Usage::default() }), Nanodollars(307));
        assert_eq!((price.dearest_input(), price.dearest_output()), (Nanodollars(3_000_000), Nanodollars(4_000_000)));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(PriceTable::parse("#\np\tm\tx").unwrap_err(), "price table, line 2: can't be read");
        assert!(PriceTable::parse("p\tm\t-1\t\t\t\t2\t\t10").is_err());
    }
}
