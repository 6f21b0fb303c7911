//! Prices in nanodollars, the cost of what was used, and the dearest it could have been.

mod stand_in;

use crate::money::Nanodollars;
use crate::usage::Usage;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// Public list prices; `tools/prices` makes the file.
const BUILT_IN: &str = include_str!("../data/prices.tsv");

/// What a model is sold as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    #[default]
    Chat,
    Responses,
    Completion,
    Embedding,
    Moderation,
    Image,
    Speech,
    Transcription,
}

impl Mode {
    pub const ALL: [Mode; 8] =
        [Mode::Chat, Mode::Responses, Mode::Completion, Mode::Embedding, Mode::Moderation, Mode::Image, Mode::Speech, Mode::Transcription];

    /// The mode of this name, as in the price table and in an operator's own prices.
    pub fn by_name(name: &str) -> Option<Self> {
        serde_json::from_value(name.into()).ok()
    }
}

/// What one token of each class costs, per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    pub input: Nanodollars,
    pub cache_read: Nanodollars,
    pub cache_write: Nanodollars,
    pub cache_write_1h: Nanodollars,
    pub output: Nanodollars,
    pub audio_input: Nanodollars,
    pub image_input: Nanodollars,
    /// Output that is sound.
    pub media_output: Nanodollars,
}

/// What is counted when it is paid.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Unit {
    #[default]
    Tokens,
    /// Per million characters of input.
    Characters(Nanodollars),
    /// Per million seconds of a recording.
    Seconds(Nanodollars),
    Images(Vec<ImagePrice>),
}

/// What one picture costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePrice {
    pub quality: String,
    pub size: String,
    pub price: Nanodollars,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Price {
    pub mode: Mode,
    pub unit: Unit,
    pub base: Rates,
    /// Above so many input tokens the whole request costs these rates.
    pub tier: Option<(u64, Rates)>,
    /// Most input tokens the model takes: of each text, where a request has several.
    pub context: Option<u64>,
    /// Most output tokens: of an answer, of a picture. `None`: nobody says, so a budget can't be held for it.
    pub max_output: Option<u64>,
    /// The model thinks in tokens that nobody sees but somebody pays.
    pub reasoning: bool,
    /// Nobody lists it: it was put together from what is listed. Its charges are estimates, and no budget is held by it.
    pub stand_in: bool,
}

impl Price {
    /// What `usage` costs, rounded up once. `None` when it does not tell what this model is paid by.
    pub fn cost(&self, usage: &Usage) -> Option<Nanodollars> {
        match &self.unit {
            Unit::Tokens => (usage.seconds == 0).then(|| self.tokens(usage)),
            Unit::Seconds(each) if usage.seconds > 0 => Some(Nanodollars::of_tokens(&[(usage.seconds, *each)])),
            // What stands in for a model that may be paid by either has both prices.
            Unit::Seconds(_) => (self.base != Rates::default()).then(|| self.tokens(usage)),
            Unit::Characters(_) | Unit::Images(_) => None,
        }
    }

    fn tokens(&self, usage: &Usage) -> Nanodollars {
        let input = [usage.input, usage.cache_read, usage.cache_write, usage.cache_write_1h, usage.audio_input, usage.image_input];
        let rates = match self.tier {
            Some((above, rates)) if input.iter().fold(0u64, |sum, n| sum.saturating_add(*n)) > above => rates,
            _ => self.base,
        };
        Nanodollars::of_tokens(&[
            (usage.input, rates.input),
            (usage.cache_read, rates.cache_read),
            (usage.cache_write, rates.cache_write),
            (usage.cache_write_1h, rates.cache_write_1h),
            (usage.audio_input, rates.audio_input),
            (usage.image_input, rates.image_input),
            (usage.output, rates.output),
            (usage.media_output, rates.media_output),
        ])
    }

    /// The most one input token can cost.
    pub fn dearest_input(&self) -> Nanodollars {
        self.dearest_for(u64::MAX).0
    }

    /// The most one output token can cost.
    pub fn dearest_output(&self) -> Nanodollars {
        self.dearest_for(u64::MAX).1
    }

    /// The most one token of input and one of output can cost in a request of at most so many tokens of input.
    pub fn dearest_for(&self, input_tokens: u64) -> (Nanodollars, Nanodollars) {
        let tier = self.tier.filter(|(above, _)| input_tokens > *above).map(|(_, rates)| rates);
        let input = |r: Rates| r.input.max(r.cache_read).max(r.cache_write).max(r.cache_write_1h).max(r.audio_input).max(r.image_input);
        let output = |r: Rates| r.output.max(r.media_output);
        // A long prompt may still be dearer by the base, if somebody's own price says so.
        let both = |of: fn(Rates) -> Nanodollars| tier.map_or(of(self.base), |tier| of(tier).max(of(self.base)));
        (both(input), both(output))
    }
}

impl Rates {
    /// Each rate of two, put together.
    fn with(self, other: Rates, both: fn(Nanodollars, Nanodollars) -> Nanodollars) -> Rates {
        Rates {
            input: both(self.input, other.input),
            cache_read: both(self.cache_read, other.cache_read),
            cache_write: both(self.cache_write, other.cache_write),
            cache_write_1h: both(self.cache_write_1h, other.cache_write_1h),
            output: both(self.output, other.output),
            audio_input: both(self.audio_input, other.audio_input),
            image_input: both(self.image_input, other.image_input),
            media_output: both(self.media_output, other.media_output),
        }
    }
}

/// How the prices of several targets make one, by which a request is held for that may go to any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Together {
    /// One of them answers, and the others cost nothing.
    OneOf,
    /// Each of them may have to be paid.
    AllOf,
}

impl Price {
    /// A price that no request to the targets can exceed. `None`: one of them is not paid by tokens.
    pub fn together(prices: &[&Price], together: Together) -> Option<Price> {
        let both = match together {
            Together::OneOf => Nanodollars::max,
            Together::AllOf => Nanodollars::plus,
        };
        let (first, rest) = prices.split_first()?;
        if prices.iter().any(|price| price.unit != Unit::Tokens) {
            return None;
        }
        // A long prompt may be dearer by either, as in `dearest_for`.
        let long = |price: &Price| price.tier.map_or(price.base, |(_, rates)| rates.with(price.base, Nanodollars::max));
        let above = prices.iter().filter_map(|price| price.tier.map(|(above, _)| above)).min();
        let all = |of: &dyn Fn(&Price) -> Rates| rest.iter().fold(of(first), |sum, price| sum.with(of(price), both));
        let most = |of: fn(&Price) -> Option<u64>| rest.iter().fold(of(first), |most, price| Some(most?.max(of(price)?)));
        Some(Price {
            mode: first.mode,
            unit: Unit::Tokens,
            base: all(&|price| price.base),
            tier: above.map(|above| (above, all(&long))),
            context: most(|price| price.context),
            max_output: most(|price| price.max_output),
            reasoning: prices.iter().any(|price| price.reasoning),
            stand_in: prices.iter().any(|price| price.stand_in),
        })
    }
}

/// The price of a picture of this size and quality. What is not said is the provider's default (API reference: 1024x1024,
/// standard); what is not listed costs the dearest that is.
pub fn image_price(prices: &[ImagePrice], size: Option<&str>, quality: Option<&str>) -> Option<Nanodollars> {
    let (size, quality) = (size.unwrap_or("1024x1024"), quality.unwrap_or("standard"));
    let listed = prices.iter().find(|p| p.size == size && p.quality == quality).map(|p| p.price);
    listed.or_else(|| prices.iter().map(|p| p.price).max())
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
            let bad = || format!("price table, line {}: can't be read", n + 1);
            let (provider, model, price) = row(line).ok_or_else(bad)?;
            match table.entry((provider, model)) {
                Entry::Vacant(slot) => drop(slot.insert(price)),
                // A model that is paid by the picture has a line for each size and quality.
                Entry::Occupied(mut slot) => match (&mut slot.get_mut().unit, price.unit) {
                    (Unit::Images(listed), Unit::Images(more)) => listed.extend(more),
                    _ => return Err(bad()),
                },
            }
        }
        Ok(PriceTable(table))
    }

    /// Models of a provider, in no order.
    pub fn models(&self, provider: &str) -> impl Iterator<Item = (&str, &Price)> {
        self.0.iter().filter(move |((of, _), _)| of == provider).map(|((_, model), price)| (model.as_str(), price))
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
    let (audio_input, image_input, media_output) = (money(16)?, money(17)?, money(18)?);
    let rates = |input: Nanodollars, read: Option<Nanodollars>, write: Option<Nanodollars>, write_1h: Option<Nanodollars>, output| Rates {
        input,
        cache_read: read.unwrap_or(input),
        cache_write: write.unwrap_or(input),
        cache_write_1h: write_1h.or(write).unwrap_or(input),
        output,
        audio_input: audio_input.unwrap_or(input).max(input),
        image_input: image_input.unwrap_or(input).max(input),
        media_output: media_output.unwrap_or(output).max(output),
    };
    let unit = match (cell(19), money(20)?) {
        (None, None) => Unit::Tokens,
        (Some("characters"), Some(each)) => Unit::Characters(each),
        (Some("seconds"), Some(each)) => Unit::Seconds(each),
        (Some("image"), Some(price)) => Unit::Images(vec![ImagePrice { quality: cell(21)?.to_owned(), size: cell(22)?.to_owned(), price }]),
        _ => return None,
    };
    // What is not paid by tokens has no price for one.
    let token = |i: usize| match unit {
        Unit::Tokens => money(i)?,
        _ => Some(Nanodollars::ZERO),
    };
    let base = rates(token(2)?, money(3)?, money(4)?, money(5)?, token(6)?);
    let tier = match cell(9) {
        None => None,
        Some(above) => {
            let input = money(10)??;
            // A tier that lists no 1 h cache price costs no more than twice the 5 min price.
            let write_1h = money(23)?.or(money(12)?.map(|w| w.plus(w)));
            Some((above.parse().ok()?, rates(input, money(11)?, money(12)?, write_1h, money(13)??)))
        }
    };
    let price = Price {
        mode: cell(15).map_or(Some(Mode::Chat), Mode::by_name)?,
        unit,
        base,
        tier,
        context: cell(7).map(str::parse).transpose().ok()?,
        max_output: cell(8).map(str::parse).transpose().ok()?,
        reasoning: cell(14) == Some("1"),
        stand_in: false,
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
        assert_eq!(gpt_4o.cost(&usage).unwrap().to_usd(), "13.75");
        assert_eq!((gpt_4o.max_output, gpt_4o.reasoning), (Some(16_384), false));
        let sonnet = table.find("anthropic", "claude-sonnet-4-5").unwrap();
        let usage = Usage { cache_write: 100_000, ..Usage::default() };
        assert_eq!(sonnet.cost(&usage).unwrap().to_usd(), "0.375");
        // Above 200,000 tokens, a cache for an hour: twice $6.
        assert_eq!(sonnet.dearest_input().to_usd(), "12.00");
        // The two sources differ, and the dearer is taken.
        assert_eq!(table.find("anthropic", "claude-sonnet-5").unwrap().base.input.to_usd(), "3.00");
        // Above 100,000 tokens $0.50 and $2.50, not $0.10 and $0.50.
        let haiku = table.find("anthropic", "claude-haiku-5-5").unwrap();
        let usage = Usage { input: 1_000_000, output: 1_000_000, ..Usage::default() };
        assert_eq!(haiku.cost(&usage).unwrap().to_usd(), "3.00");
        assert!(table.find("openai", "o3").unwrap().reasoning);
        assert_eq!(table.find("openai", "no-such-model"), None);
    }

    /// Looked up by hand in the two lists; where they differ, the dearer.
    #[test]
    fn known_prices_of_the_other_providers() {
        let table = PriceTable::built_in().unwrap();
        let cost = |provider: &str, model: &str, usage: Usage| table.find(provider, model).unwrap().cost(&usage).unwrap().to_usd();
        let million = Usage { input: 1_000_000, cache_read: 1_000_000, output: 1_000_000, ..Usage::default() };
        // $1.25 and $10; above 200,000 tokens $2.50, $0.25 from the cache, and $15.
        assert_eq!(cost("gemini", "gemini-2.5-pro", Usage { input: 200_000, output: 10_000, ..Usage::default() }), "0.35");
        let long = Usage { input: 200_000, cache_read: 100_000, output: 10_000, ..Usage::default() };
        assert_eq!(cost("gemini", "gemini-2.5-pro", long), "0.675");
        // $0.30, $0.03, $2.50, and $1 for sound.
        assert_eq!(cost("gemini", "gemini-2.5-flash", Usage { audio_input: 1_000_000, ..million }), "3.83");
        // Each token that it gives may be of a picture, at $30.
        assert_eq!(table.find("gemini", "gemini-2.5-flash-image").unwrap().dearest_output().to_usd(), "30.00");
        // $2.50, $1.25 and $10 in the world, a tenth more in Europe.
        assert_eq!(cost("azure", "gpt-4o", million), "15.125");
        // Only the model is listed by region, its snapshot is not: $0.22, $0.022 and $1.32.
        assert_eq!(cost("azure", "gpt-5.6-luna-2026-07-09", Usage { input: 100_000, ..Usage::default() }), "0.022");
        assert_eq!(cost("groq", "openai/gpt-oss-120b", million), "0.825");
        assert_eq!(cost("groq", "llama-3.3-70b-versatile", Usage { cache_read: 0, ..million }), "1.38");
        // $0.28, $0.028 and $0.42 in one list, $0.27, $0.07 and $1.10 by day in the other.
        assert_eq!(cost("deepseek", "deepseek-chat", million), "1.45");
        assert_eq!(cost("mistral", "mistral-large-latest", Usage { cache_read: 0, ..million }), "8.00");
        assert_eq!(cost("together", "meta-llama/Llama-3.2-3B-Instruct", million), "0.18");
        // The maker's prices: $6 and $22.50 for long prompts, $12 into a cache for an hour.
        let sonnet = table.find("openrouter", "anthropic/claude-sonnet-4.5").unwrap();
        assert_eq!((sonnet.dearest_input().to_usd().as_str(), sonnet.dearest_output().to_usd().as_str()), ("12.00", "22.50"));
        let limits = |provider: &str, model: &str| {
            let price = table.find(provider, model).unwrap();
            (price.context, price.max_output, price.reasoning)
        };
        assert_eq!(limits("gemini", "gemini-2.5-pro"), (Some(1_048_576), Some(65_536), true));
        assert_eq!(limits("gemini", "gemini-embedding-001"), (Some(2_048), Some(0), false));
        assert_eq!(limits("deepseek", "deepseek-chat"), (Some(131_072), Some(8_192), false));
        // Hosted by many, of which the list has one price: nothing is promised by it.
        assert_eq!(limits("openrouter", "meta-llama/llama-3.3-70b-instruct").1, None);
    }

    /// A price of nothing would let a key with a budget through for nothing.
    #[test]
    fn no_listed_model_is_free_and_no_long_prompt_is_cheaper() {
        for ((provider, model), price) in PriceTable::built_in().unwrap().0 {
            let of = format!("{provider} {model}");
            assert!(!price.stand_in && !model.starts_with([' ', '/']), "{of}");
            if price.unit == Unit::Tokens && price.mode != Mode::Moderation {
                assert!(price.base.input > Nanodollars::ZERO, "{of}");
                assert!((price.mode == Mode::Embedding) != (price.base.output > Nanodollars::ZERO), "{of}");
                assert!(price.base.cache_read > Nanodollars::ZERO && price.base.cache_write >= price.base.input, "{of}");
            }
            if let Some((above, tier)) = price.tier {
                let base = price.base;
                assert!(above > 0 && tier.input >= base.input && tier.output >= base.output && tier.cache_read >= base.cache_read, "{of}");
                assert!(tier.cache_write >= tier.input && tier.cache_write_1h >= tier.cache_write, "{of}");
            }
            assert!(price.mode != Mode::Embedding || price.max_output == Some(0), "{of}");
        }
    }

    #[test]
    fn what_is_not_paid_by_tokens_has_its_own_unit() {
        let table = PriceTable::built_in().unwrap();
        let of = |model: &str| table.find("openai", model).unwrap();
        assert_eq!(of("tts-1").unit, Unit::Characters(Nanodollars(15_000_000_000)));
        assert_eq!((of("tts-1").mode, of("tts-1").cost(&Usage::default())), (Mode::Speech, None));
        let minute = Usage { seconds: 60, ..Usage::default() };
        assert_eq!(of("whisper-1").cost(&minute).unwrap().to_usd(), "0.006");
        assert_eq!(of("gpt-4o-transcribe").cost(&minute), None, "paid by tokens, told seconds");
        let Unit::Images(listed) = &of("dall-e-3").unit else { panic!("not by the picture") };
        for (size, quality, usd) in [(None, None, "0.04"), (Some("1024x1792"), Some("hd"), "0.12"), (Some("9x9"), None, "0.12")] {
            assert_eq!(image_price(listed, size, quality).unwrap().to_usd(), usd, "{size:?} {quality:?}");
        }
        let drawn = Usage { input: 50, image_input: 200, output: 4_160, ..Usage::default() };
        assert_eq!(of("gpt-image-1").cost(&drawn).unwrap().to_usd(), "0.16865");
        assert_eq!((of("omni-moderation-latest").mode, of("text-embedding-3-small").mode), (Mode::Moderation, Mode::Embedding));
    }

    #[test]
    fn a_long_prompt_costs_the_tier_for_every_token() {
        let table = PriceTable::parse("p\tm\t1000000\t\t\t\t2000000\t\t10\t100\t3000000\t\t\t4000000\t0\n").unwrap();
        let price = table.find("p", "m").unwrap();
        assert_eq!(price.cost(&Usage { input: 100, output: 1, ..Usage::default() }), Some(Nanodollars(102)));
        assert_eq!(price.cost(&Usage { input: 101, output: 1, ..Usage::default() }), Some(Nanodollars(307)));
        assert_eq!((price.dearest_input(), price.dearest_output()), (Nanodollars(3_000_000), Nanodollars(4_000_000)));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(PriceTable::parse("#\np\tm\tx").unwrap_err(), "price table, line 2: can't be read");
        assert!(PriceTable::parse("p\tm\t-1\t\t\t\t2\t\t10").is_err());
        let twice = "p\tm\t1\t\t\t\t2\t\t10\n";
        assert!(PriceTable::parse(&twice.repeat(2)).is_err(), "two prices for one model");
    }
}
