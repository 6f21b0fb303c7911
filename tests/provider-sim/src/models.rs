//! The models on sale and what a call costs. Prices are nanodollars per million tokens.

use crate::provider::Provider;

/// One model as the provider sells it.
#[derive(Debug, PartialEq, Eq)]
pub struct Model {
    pub provider: Provider,
    /// The alias callers use.
    pub name: &'static str,
    /// What responses call it: an alias resolves to a dated snapshot.
    pub snapshot: &'static str,
    pub display: &'static str,
    pub created: u64,
    pub input: u64,
    pub cached_input: u64,
    /// Anthropic's five-minute cache; equal to `input` where writes are not charged apart.
    pub cache_write: u64,
    pub output: u64,
    /// The largest prompt.
    pub context: u64,
    pub max_output: u64,
    /// Reasons before answering: hidden output tokens, fixed temperature, no `max_tokens`.
    pub reasons: bool,
}

/// What one request consumed. `cache_read` and `cache_write` are parts of `prompt`, `reasoning` is part of `completion`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub reasoning: u64,
    pub completion: u64,
}

impl Usage {
    /// Prompt tokens charged at the full input price.
    pub fn fresh(&self) -> u64 {
        self.prompt.saturating_sub(self.cache_read).saturating_sub(self.cache_write)
    }
}

impl Model {
    pub fn find(provider: Provider, name: &str) -> Option<&'static Model> {
        MODELS.iter().find(|model| model.provider == provider && (model.name == name || model.snapshot == name))
    }

    pub fn of(provider: Provider) -> impl Iterator<Item = &'static Model> {
        MODELS.iter().filter(move |model| model.provider == provider)
    }

    /// Nanodollars for one request, rounded up once at the end.
    pub fn cost(&self, usage: &Usage) -> u64 {
        let product = |tokens: u64, price: u64| u128::from(tokens) * u128::from(price);
        let total = product(usage.fresh(), self.input)
            + product(usage.cache_read, self.cached_input)
            + product(usage.cache_write, self.cache_write)
            + product(usage.completion, self.output);
        u64::try_from(total.div_ceil(1_000_000)).unwrap_or(u64::MAX)
    }
}

const fn openai(
    name: &'static str,
    snapshot: &'static str,
    created: u64,
    (input, cached_input, output): (u64, u64, u64),
    (context, max_output): (u64, u64),
    reasons: bool,
) -> Model {
    Model {
        provider: Provider::Openai,
        name,
        snapshot,
        display: name,
        created,
        input,
        cached_input,
        cache_write: input,
        output,
        context,
        max_output,
        reasons,
    }
}

const fn claude(
    (name, snapshot, display): (&'static str, &'static str, &'static str),
    created: u64,
    (input, cached_input, cache_write, output): (u64, u64, u64, u64),
    (context, max_output): (u64, u64),
) -> Model {
    Model {
        provider: Provider::Anthropic,
        name,
        snapshot,
        display,
        created,
        input,
        cached_input,
        cache_write,
        output,
        context,
        max_output,
        reasons: false,
    }
}

/// One dollar per million tokens.
const USD: u64 = 1_000_000_000;
const CENT: u64 = USD / 100;
/// A tenth of a cent.
const MILL: u64 = CENT / 10;

#[rustfmt::skip]
static MODELS: [Model; 11] = [
    openai("gpt-4o", "gpt-4o-2024-08-06", 1_715_367_049, (250 * CENT, 125 * CENT, 10 * USD), (128_000, 16_384), false),
    openai("gpt-4o-mini", "gpt-4o-mini-2024-07-18", 1_721_172_741, (15 * CENT, 75 * MILL, 60 * CENT), (128_000, 16_384), false),
    openai("gpt-4.1", "gpt-4.1-2025-04-14", 1_744_316_542, (2 * USD, 50 * CENT, 8 * USD), (1_047_576, 32_768), false),
    openai("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", 1_744_318_173, (40 * CENT, 10 * CENT, 160 * CENT), (1_047_576, 32_768), false),
    openai("gpt-5", "gpt-5-2025-08-07", 1_754_425_777, (125 * CENT, 125 * MILL, 10 * USD), (272_000, 128_000), true),
    openai("gpt-5-mini", "gpt-5-mini-2025-08-07", 1_754_425_928, (25 * CENT, 25 * MILL, 2 * USD), (272_000, 128_000), true),
    openai("o3", "o3-2025-04-16", 1_744_225_308, (2 * USD, 50 * CENT, 8 * USD), (200_000, 100_000), true),
    openai("o4-mini", "o4-mini-2025-04-16", 1_744_225_351, (110 * CENT, 275 * MILL, 440 * CENT), (200_000, 100_000), true),
    claude(("claude-sonnet-4-5", "claude-sonnet-4-5-20250929", "Claude Sonnet 4.5"), 1_759_104_000, (3 * USD, 30 * CENT, 375 * CENT, 15 * USD), (200_000, 64_000)),
    claude(("claude-haiku-4-5", "claude-haiku-4-5-20251001", "Claude Haiku 4.5"), 1_760_486_400, (USD, 10 * CENT, 125 * CENT, 5 * USD), (200_000, 64_000)),
    claude(("claude-opus-4-6", "claude-opus-4-6", "Claude Opus 4.6"), 1_770_163_200, (5 * USD, 50 * CENT, 625 * CENT, 25 * USD), (1_000_000, 128_000)),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(provider: Provider, model: &str, usage: Usage) -> Option<u64> {
        Model::find(provider, model).map(|model| model.cost(&usage))
    }

    #[test]
    fn costs_match_figures_worked_out_by_hand() {
        use Provider::{Anthropic, Openai};
        let plain = |prompt, completion| Usage { prompt, completion, ..Usage::default() };
        // 1000 x $2.50/M + 500 x $10/M = $0.0075
        assert_eq!(cost(Openai, "gpt-4o", plain(1000, 500)), Some(7_500_000));
        // 7 x 150 + 3 x 600 nanodollars
        assert_eq!(cost(Openai, "gpt-4o-mini", plain(7, 3)), Some(2_850));
        // 60 fresh x 2500 + 40 cached x 1250 + 10 x 10000
        let cached = Usage { prompt: 100, cache_read: 40, completion: 10, ..Usage::default() };
        assert_eq!(cost(Openai, "gpt-4o-2024-08-06", cached), Some(300_000));
        // reasoning is inside completion and costs no more: 10 x 2000 + 80 x 8000
        let hidden = Usage { prompt: 10, reasoning: 64, completion: 80, ..Usage::default() };
        assert_eq!(cost(Openai, "o3", hidden), Some(660_000));
        // 30 x 3000 + 50 x 300 + 20 x 3750 + 5 x 15000
        let claude = Usage { prompt: 100, cache_read: 50, cache_write: 20, completion: 5, ..Usage::default() };
        assert_eq!(cost(Anthropic, "claude-sonnet-4-5", claude), Some(255_000));
        assert_eq!(cost(Anthropic, "claude-opus-4-6", plain(1_000_000, 1_000_000)), Some(30 * USD));
        assert_eq!(cost(Openai, "claude-opus-4-6", plain(1, 1)), None);
    }

    #[test]
    fn the_table_agrees_with_the_published_per_token_prices() {
        let rows = [
            ("gpt-4o", 2500, 1250, 10_000),
            ("gpt-4o-mini", 150, 75, 600),
            ("gpt-4.1", 2000, 500, 8000),
            ("gpt-4.1-mini", 400, 100, 1600),
            ("gpt-5", 1250, 125, 10_000),
            ("gpt-5-mini", 250, 25, 2000),
            ("o3", 2000, 500, 8000),
            ("o4-mini", 1100, 275, 4400),
            ("claude-sonnet-4-5", 3000, 300, 15_000),
            ("claude-haiku-4-5", 1000, 100, 5000),
            ("claude-opus-4-6", 5000, 500, 25_000),
        ];
        for (model, (name, input, cached, output)) in MODELS.iter().zip(rows) {
            assert_eq!(
                (model.name, model.input, model.cached_input, model.output),
                (name, input * 1_000_000, cached * 1_000_000, output * 1_000_000)
            );
        }
    }

    #[test]
    fn a_fraction_of_a_nanodollar_is_rounded_up() {
        let odd = Model { input: 1, ..openai("x", "x", 0, (1, 1, 1), (1, 1), false) };
        assert_eq!(odd.cost(&Usage { prompt: 1, ..Usage::default() }), 1);
        assert_eq!(odd.cost(&Usage::default()), 0);
    }
}
