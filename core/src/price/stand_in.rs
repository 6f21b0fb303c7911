//! What a model costs that is in no list: never less than what is listed nearest to it.

use super::{ImagePrice, Mode, Price, PriceTable, Rates, Unit};
use crate::money::Nanodollars;
use std::borrow::Cow;

impl PriceTable {
    /// The price of a model in an operation that is made for models of these `modes`: as listed, else what stands in.
    /// `None`: the operation is made for no model.
    pub fn price(&self, provider: &str, model: &str, modes: &[Mode]) -> Option<Cow<'_, Price>> {
        match self.find(provider, model) {
            Some(listed) if modes.contains(&listed.mode) => Some(Cow::Borrowed(listed)),
            _ => self.stand_in(provider, model, modes).map(Cow::Owned),
        }
    }

    /// What an unlisted model costs. Its base is the longest listed name that it extends at a `-` or `:`. What it extends it by
    /// may be a date: then it costs what the base and its own dated snapshots do; anything else may be a bigger sibling: then it
    /// costs what the base and all that extends the base do. Without a base it costs what all models of these modes do. Of
    /// several prices, each part is the dearest. For a provider of whom no model of these modes is listed (an operator's own, or one
    /// that is known for other things) the models of all providers are looked at so, those of this very name first.
    pub fn stand_in(&self, provider: &str, model: &str, modes: &[Mode]) -> Option<Price> {
        let made_for = |price: &Price| modes.contains(&price.mode);
        let own: Vec<(&str, &Price)> = self.models(provider).filter(|(_, price)| made_for(price)).collect();
        if !own.is_empty() {
            return nearest(model, &own);
        }
        let everyones = || self.0.iter().filter(|(_, price)| made_for(price)).map(|((_, name), price)| (name.as_str(), price));
        let namesakes: Vec<&Price> = everyones().filter(|(name, _)| *name == model).map(|(_, price)| price).collect();
        dearest(&namesakes).or_else(|| nearest(model, &everyones().collect::<Vec<_>>()))
    }
}

/// What stands in for a model among those that are `listed`. `None`: there are none.
fn nearest(model: &str, listed: &[(&str, &Price)]) -> Option<Price> {
    let base = listed.iter().map(|(name, _)| *name).filter(|name| extension(model, name).is_some()).max_by_key(|name| name.len());
    let dated = base.and_then(|base| extension(model, base)).is_some_and(is_date);
    let near = |name: &str| {
        let Some(base) = base else { return true };
        name == base || extension(name, base).is_some_and(|by| !dated || is_date(by))
    };
    let family: Vec<&Price> = listed.iter().filter(|(name, _)| near(name)).map(|(_, price)| *price).collect();
    dearest(&family)
}

/// What `name` has behind `base` and a separator.
fn extension<'a>(name: &'a str, base: &str) -> Option<&'a str> {
    name.strip_prefix(base)?.strip_prefix(['-', ':'])
}

/// `2025-08-07`, `20250807`, `0613`.
fn is_date(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_digit).count();
    matches!(digits, 4 | 8) && text.bytes().all(|b| b.is_ascii_digit() || b == b'-')
}

/// One price of which no part is below that of any of `family`. `None`: there are none.
fn dearest(family: &[&Price]) -> Option<Price> {
    // Which of several is the same at every look: the table has no order.
    let mode = Mode::ALL.into_iter().find(|mode| family.iter().any(|price| price.mode == *mode))?;
    let tokens: Vec<&&Price> = family.iter().filter(|price| price.unit == Unit::Tokens).collect();
    let (mut characters, mut seconds, mut picture) = (None, None, None);
    for price in family {
        match &price.unit {
            Unit::Tokens => {}
            Unit::Characters(each) => characters = characters.max(Some(*each)),
            Unit::Seconds(each) => seconds = seconds.max(Some(*each)),
            Unit::Images(listed) => picture = picture.max(listed.iter().map(|image| image.price).max()),
        }
    }
    let mut base = tokens.iter().fold(Rates::default(), |rates, price| rates.max(price.base));
    let above = tokens.iter().filter_map(|price| price.tier.map(|(above, _)| above)).min();
    let tier = above.map(|above| (above, tokens.iter().fold(base, |rates, price| rates.max(price.tier.map_or(price.base, |(_, t)| t)))));
    let mut max_output = family.iter().filter_map(|price| price.max_output).max();
    let unit = match (tokens.is_empty(), characters, seconds, picture) {
        // Told in seconds or in tokens: it has a price for both.
        (_, _, Some(each), _) => Unit::Seconds(each),
        (true, Some(each), ..) => Unit::Characters(each),
        (true, _, _, Some(price)) => Unit::Images(vec![ImagePrice { quality: String::new(), size: String::new(), price }]),
        _ => Unit::Tokens,
    };
    if unit == Unit::Tokens {
        // Speech by tokens is guessed at four to a character, a picture by the most of its tokens: neither below what is paid otherwise.
        if let Some(each) = characters {
            base.output = base.output.max(Nanodollars(each.0 / 4 + 1));
        }
        if let Some(price) = picture
            && base.output > Nanodollars::ZERO
        {
            let tokens = price.buys(base.output).unwrap_or(0).saturating_add(1);
            max_output = max_output.max(Some(tokens));
        }
    }
    Some(Price {
        mode,
        unit,
        base,
        tier,
        context: family.iter().filter_map(|price| price.context).max(),
        max_output,
        reasoning: family.iter().any(|price| price.reasoning),
        stand_in: true,
    })
}

impl Rates {
    /// The dearer of each.
    fn max(self, other: Rates) -> Rates {
        Rates {
            input: self.input.max(other.input),
            cache_read: self.cache_read.max(other.cache_read),
            cache_write: self.cache_write.max(other.cache_write),
            cache_write_1h: self.cache_write_1h.max(other.cache_write_1h),
            output: self.output.max(other.output),
            audio_input: self.audio_input.max(other.audio_input),
            image_input: self.image_input.max(other.image_input),
            media_output: self.media_output.max(other.media_output),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::{Ended, Hold, charge};
    use crate::operation::OPERATIONS;
    use crate::usage::Usage;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const TALKS: &[Mode] = &[Mode::Chat, Mode::Responses];

    /// Dollars per million input and output tokens, worked out by hand from the two price lists that the table is made from.
    #[test]
    fn an_unlisted_model_costs_what_the_rule_says() {
        let table = PriceTable::built_in().unwrap();
        for (provider, model, modes, input, output, listed) in [
            ("openai", "gpt-4o-2024-08-06", TALKS, "2.50", "10.00", true),
            // gpt-4o-2024-05-13 was $5 and $15.
            ("openai", "gpt-4o-2027-01-01", TALKS, "5.00", "15.00", false),
            ("openai", "gpt-4o-mini-2027-01-01", TALKS, "0.15", "0.60", false),
            ("openai", "gpt-4.1-nano-2027-01-01", TALKS, "0.10", "0.40", false),
            // gpt-5-pro is $15 and $120: whatever gpt-5-ultra is, it may be as big.
            ("openai", "gpt-5-2027-01-01", TALKS, "1.25", "10.00", false),
            ("openai", "gpt-5-ultra", TALKS, "15.00", "120.00", false),
            ("openai", "o3-2027-01-01", TALKS, "2.00", "8.00", false),
            ("openai", "ft:gpt-4o-2024-08-06:acme::9x", TALKS, "3.75", "15.00", false),
            ("anthropic", "claude-opus-4-6-20270101", TALKS, "5.00", "25.00", false),
            ("anthropic", "claude-sonnet-4-5-20270101", TALKS, "3.00", "15.00", false),
            // Nothing like it: o1-pro at $150 and $600 is the dearest there is; at Anthropic $10 and $50.
            ("openai", "mystery", TALKS, "150.00", "600.00", false),
            ("openai", "gpt-4o2", TALKS, "150.00", "600.00", false),
            ("anthropic", "claude-7", TALKS, "10.00", "50.00", false),
            // Listed, and not made for that.
            ("openai", "dall-e-3", TALKS, "150.00", "600.00", false),
            ("openai", "text-embedding-9", &[Mode::Embedding], "0.13", "0.00", false),
        ] {
            let price = table.price(provider, model, modes).unwrap();
            assert_eq!((price.base.input.to_usd().as_str(), price.base.output.to_usd().as_str()), (input, output), "{model}");
            assert_eq!(!price.stand_in, listed, "{model}");
        }
        assert!(table.price("openai", "mystery", &[]).is_none() && table.price("nobody", "mystery", &[]).is_none());
    }

    /// Dollars per million input and output tokens, as above, for the providers with names that have a slash, a region or a family.
    #[test]
    fn a_provider_that_lists_it_differently_is_asked_first() {
        let table = PriceTable::built_in().unwrap();
        for (provider, model, input, output) in [
            // gemini-2.5-pro-preview-tts speaks at $20; what gemini-2.5-pro-x does, nobody knows.
            ("gemini", "gemini-2.5-pro-2027-01-01", "1.25", "10.00"),
            ("gemini", "gemini-2.5-pro-x", "1.25", "20.00"),
            // As dear as in the dearest region.
            ("azure", "gpt-4o-2027-01-01", "5.50", "16.50"),
            ("groq", "openai/gpt-oss-120b-2027-01-01", "0.15", "0.60"),
            ("openrouter", "meta-llama/llama-3.3-70b-instruct:free", "0.05", "0.24"),
            // The dearest there: mistral-large-latest and the mediums; Llama-3.1-405B and Kimi-K3.
            ("mistral", "mystery", "2.00", "7.50"),
            ("together", "acme/mystery", "3.50", "15.00"),
        ] {
            let price = table.price(provider, model, TALKS).unwrap();
            assert_eq!((price.base.input.to_usd().as_str(), price.base.output.to_usd().as_str()), (input, output), "{model}");
            assert!(price.stand_in, "{model}");
        }
    }

    /// An operator's own provider, and a listed one that is asked for what it does not sell.
    #[test]
    fn a_provider_without_a_listed_model_costs_what_others_do() {
        let table = PriceTable::built_in().unwrap();
        let usd = |provider: &str, model: &str, modes: &[Mode]| {
            let price = table.price(provider, model, modes).unwrap();
            assert!(price.stand_in && modes.contains(&price.mode), "{provider} {model}");
            (price.base.input.to_usd(), price.base.output.to_usd())
        };
        let is = |input: &str, output: &str| (input.to_owned(), output.to_owned());
        // OpenAI's at $2.50 and $10, Azure's in Europe at a tenth more.
        assert_eq!(usd("acme", "gpt-4o", TALKS), is("2.75", "11.00"));
        assert_eq!(usd("acme", "gpt-4o-mini-2027-01-01", TALKS), is("0.165", "0.66"));
        // o1-pro, the dearest of all.
        assert_eq!(usd("acme", "our-model", TALKS), is("150.00", "600.00"));
        assert_eq!(usd("anthropic", "text-embedding-3-large", &[Mode::Embedding]), is("0.163", "0.00"));
        for mode in Mode::ALL {
            assert!(table.price("acme", "", &[mode]).is_some(), "{mode:?}");
        }
        // What is asked for at a settlement.
        assert!(table.price("acme", "our-model", &Mode::ALL).unwrap().stand_in);
    }

    #[test]
    fn what_is_not_paid_by_tokens_has_a_stand_in_too() {
        let table = PriceTable::built_in().unwrap();
        let of = |model: &str, mode: Mode| table.price("openai", model, &[mode]).unwrap().into_owned();
        assert_eq!(of("tts-1-9999", Mode::Speech).unit, Unit::Characters(Nanodollars(15_000_000_000)));
        let Unit::Images(pictures) = of("dall-e-3-2027-01-01", Mode::Image).unit else { panic!("by the picture") };
        assert_eq!(pictures.first().unwrap().price.to_usd(), "0.12");
        let heard = of("new-ears", Mode::Transcription);
        assert_eq!(heard.cost(&Usage { seconds: 60, ..Usage::default() }).unwrap().to_usd(), "0.006");
        // A million each at $2.50, $6 for sound, and $10.
        let tokens = Usage { input: 1_000_000, audio_input: 1_000_000, output: 1_000_000, ..Usage::default() };
        assert_eq!(heard.cost(&tokens).unwrap().to_usd(), "18.50");
    }

    #[test]
    fn a_charge_by_a_stand_in_is_an_estimate() {
        let table = PriceTable::built_in().unwrap();
        let usage = Usage { input: 1_000, output: 1_000, ..Usage::default() };
        let ended = Ended {
            sent: true,
            status: Some(200),
            stream: false,
            usage: Some(&usage),
            input: None,
            visible_bytes: None,
            beyond: false,
            choices: 1,
        };
        for (model, estimated) in [("gpt-4o-mini", false), ("gpt-4o-mini-2027-01-01", true), ("mystery", true)] {
            let charge = charge(&Hold::default(), table.price("openai", model, TALKS).as_deref(), &ended);
            assert!(charge.estimated == estimated && charge.amount > Nanodollars::ZERO, "{model}: {charge:?}");
        }
    }

    proptest! {
        /// Whatever a request used, a stand-in charges no less than any listed model of the family would.
        #[test]
        fn never_below_a_listed_price_of_the_family(
            pick in 0usize..10_000, who in 0usize..10_000, suffix in "(-2027-01-01|-20270101|-ultra|-x-2027-01-01|:own|x)", op in 0usize..OPERATIONS.len(),
            counts in proptest::collection::vec(0u64..2_000_000, 8), seconds in 0u64..10_000,
        ) {
            let table = PriceTable::built_in().unwrap();
            let modes = OPERATIONS[op].models;
            let mut providers: Vec<&str> = table.0.iter().filter(|(_, price)| modes.contains(&price.mode)).map(|((of, _), _)| of.as_str()).collect();
            providers.sort_unstable();
            providers.dedup();
            prop_assume!(!providers.is_empty());
            let provider = providers[who % providers.len()];
            let mut listed: Vec<(&str, &Price)> = table.models(provider).filter(|(_, price)| modes.contains(&price.mode)).collect();
            listed.sort_by_key(|(name, _)| *name);
            let (base, _) = listed[pick % listed.len()];
            let model = format!("{base}{suffix}");
            prop_assume!(table.find(provider, &model).is_none());
            let stand_in = table.price(provider, &model, modes).unwrap();
            prop_assert!(stand_in.stand_in);
            // The base itself and its dated snapshots; where there is no base, everything.
            let base = listed.iter().map(|(name, _)| *name).filter(|name| ['-', ':'].iter().any(|sep| model.starts_with(&format!("{name}{sep}"))));
            let base = base.max_by_key(|name| name.len());
            let near = |name: &str, base: &str| name == base || extension(name, base).is_some_and(is_date);
            let related = listed.iter().filter(|(name, _)| base.is_none_or(|base| near(name, base)));
            let [input, cache_read, cache_write, cache_write_1h, audio_input, image_input, output, media_output] = counts[..] else { unreachable!() };
            let tokens = Usage { input, cache_read, cache_write, cache_write_1h, audio_input, image_input, output, media_output, ..Usage::default() };
            for (name, price) in related {
                for usage in [tokens, Usage { seconds, ..Usage::default() }] {
                    if let Some(cost) = price.cost(&usage) {
                        prop_assert!(stand_in.cost(&usage).is_some_and(|at_least| at_least >= cost) || usage == Usage::default(), "{model} below {name}");
                    }
                }
            }
        }
    }
}
