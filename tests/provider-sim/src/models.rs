//! The models on sale and what a call costs. Prices are nanodollars per million tokens.

use crate::provider::Provider;

/// What a model is for, with what its price depends on besides tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Chat,
    /// The completions of before chat.
    Completion,
    Embedding {
        dimensions: u64,
    },
    Moderation,
    /// Pictures paid by the piece; see `openai::images` for what each costs.
    Picture,
    /// Pictures paid by the token.
    PictureTokens,
    /// Speech; nanodollars per million characters.
    Speech {
        characters: u64,
    },
    /// Transcription by time; nanodollars per million seconds.
    Listening {
        seconds: u64,
    },
    /// Transcription by tokens; nanodollars per million tokens of sound.
    ListeningTokens {
        audio: u64,
    },
}

/// One model as the provider sells it.
#[derive(Debug, PartialEq, Eq)]
pub struct Model {
    pub provider: Provider,
    pub kind: Kind,
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
    /// Input, cached input and output where a prompt has more than `LONG_PROMPT` tokens.
    pub long: Option<(u64, u64, u64)>,
    /// The largest prompt.
    pub context: u64,
    pub max_output: u64,
    /// Reasons before answering: hidden output tokens, fixed temperature, no `max_tokens`.
    pub reasons: bool,
}

/// What one request consumed. `cache_read`, `cache_write` and `audio` are parts of `prompt`; `reasoning` and `image` are parts
/// of `completion`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub reasoning: u64,
    pub completion: u64,
    /// Tokens of sound.
    pub audio: u64,
    /// Tokens of pictures made.
    pub image: u64,
    pub characters: u64,
    pub images: u64,
    /// Of sound, as billed: begun seconds count.
    pub seconds: u64,
}

/// From here on some models are dearer.
const LONG_PROMPT: u64 = 200_000;

impl Usage {
    /// Prompt tokens charged at the full input price.
    pub fn fresh(&self) -> u64 {
        self.prompt.saturating_sub(self.cache_read).saturating_sub(self.cache_write).saturating_sub(self.audio)
    }
}

impl Model {
    pub fn find(provider: Provider, name: &str) -> Option<&'static Model> {
        MODELS.iter().find(|model| model.provider == provider && (model.name == name || model.snapshot == name))
    }

    pub fn of(provider: Provider) -> impl Iterator<Item = &'static Model> {
        MODELS.iter().filter(move |model| model.provider == provider)
    }

    /// Nanodollars for one request, rounded up once at the end; without pictures paid by the piece.
    pub fn cost(&self, usage: &Usage) -> u64 {
        let product = |tokens: u64, price: u64| u128::from(tokens) * u128::from(price);
        let (audio, characters, seconds) = match self.kind {
            Kind::ListeningTokens { audio } => (audio, 0, 0),
            Kind::Speech { characters } => (self.input, characters, 0),
            Kind::Listening { seconds } => (self.input, 0, seconds),
            _ => (self.input, 0, 0),
        };
        let plain = (self.input, self.cached_input, self.output);
        let (input, cached_input, output) = self.long.filter(|_| usage.prompt > LONG_PROMPT).unwrap_or(plain);
        let total = product(usage.fresh(), input)
            + product(usage.audio, audio)
            + product(usage.characters, characters)
            + product(usage.seconds, seconds)
            + product(usage.cache_read, cached_input)
            + product(usage.cache_write, self.cache_write)
            + product(usage.completion, output);
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
        kind: Kind::Chat,
        name,
        snapshot,
        display: name,
        created,
        input,
        cached_input,
        cache_write: input,
        output,
        long: None,
        context,
        max_output,
        reasons,
    }
}

/// A model that isn't for chat: price of a million tokens in and out, largest input and output in tokens.
const fn special(
    kind: Kind,
    (name, snapshot): (&'static str, &'static str),
    created: u64,
    (input, output): (u64, u64),
    limits: (u64, u64),
) -> Model {
    Model { kind, ..openai(name, snapshot, created, (input, input, output), limits, false) }
}

const fn claude(
    (name, snapshot, display): (&'static str, &'static str, &'static str),
    created: u64,
    (input, cached_input, cache_write, output): (u64, u64, u64, u64),
    (context, max_output): (u64, u64),
) -> Model {
    Model {
        provider: Provider::Anthropic,
        kind: Kind::Chat,
        name,
        snapshot,
        display,
        created,
        input,
        cached_input,
        cache_write,
        output,
        long: None,
        context,
        max_output,
        reasons: false,
    }
}

/// A model as another provider sells it, at the same price.
const fn sold_by(provider: Provider, model: Model) -> Model {
    Model { provider, ..model }
}

const fn gemini(
    (name, display): (&'static str, &'static str),
    (input, cached_input, output): (u64, u64, u64),
    long: Option<(u64, u64, u64)>,
    reasons: bool,
) -> Model {
    let model = openai(name, name, 0, (input, cached_input, output), (1_048_576, 65_536), reasons);
    Model { provider: Provider::Gemini, display, long, ..model }
}

/// A model of a server that speaks OpenAI's chat, at a price of our own.
const fn compatible(name: &'static str, prices: (u64, u64, u64), limits: (u64, u64)) -> Model {
    Model { provider: Provider::Compatible, ..openai(name, name, 1_733_447_754, prices, limits, false) }
}

/// One dollar per million tokens.
const USD: u64 = 1_000_000_000;
const CENT: u64 = USD / 100;
/// A tenth of a cent.
const MILL: u64 = CENT / 10;

#[rustfmt::skip]
static MODELS: [Model; 43] = [
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
    special(Kind::Completion, ("gpt-3.5-turbo-instruct", "gpt-3.5-turbo-instruct-0914"), 1_692_901_427, (150 * CENT, 2 * USD), (4_096, 4_096)),
    special(Kind::Embedding { dimensions: 1536 }, ("text-embedding-3-small", "text-embedding-3-small"), 1_705_948_997, (2 * CENT, 0), (8_192, 0)),
    special(Kind::Embedding { dimensions: 3072 }, ("text-embedding-3-large", "text-embedding-3-large"), 1_705_953_180, (13 * CENT, 0), (8_192, 0)),
    special(Kind::Moderation, ("omni-moderation-latest", "omni-moderation-2024-09-26"), 1_731_689_265, (0, 0), (32_768, 0)),
    special(Kind::Picture, ("dall-e-2", "dall-e-2"), 1_698_798_177, (0, 0), (1_000, 0)),
    special(Kind::Picture, ("dall-e-3", "dall-e-3"), 1_698_785_189, (0, 0), (4_000, 0)),
    special(Kind::PictureTokens, ("gpt-image-1", "gpt-image-1"), 1_745_517_030, (5 * USD, 40 * USD), (32_000, 62_400)),
    special(Kind::Speech { characters: 15 * USD }, ("tts-1", "tts-1"), 1_681_940_951, (0, 0), (4_096, 0)),
    special(Kind::Speech { characters: 30 * USD }, ("tts-1-hd", "tts-1-hd"), 1_699_046_015, (0, 0), (4_096, 0)),
    // $0.006 a minute.
    special(Kind::Listening { seconds: 100 * USD }, ("whisper-1", "whisper-1"), 1_677_532_384, (0, 0), (0, 0)),
    special(Kind::ListeningTokens { audio: 6 * USD }, ("gpt-4o-transcribe", "gpt-4o-transcribe"), 1_742_068_463, (250 * CENT, 10 * USD), (16_000, 2_000)),
    claude(("claude-opus-4-7", "claude-opus-4-7", "Claude Opus 4.7"), 1_776_297_600, (5 * USD, 50 * CENT, 625 * CENT, 25 * USD), (1_000_000, 128_000)),
    gemini(("gemini-2.5-flash", "Gemini 2.5 Flash"), (30 * CENT, 3 * CENT, 250 * CENT), None, false),
    gemini(("gemini-2.5-pro", "Gemini 2.5 Pro"), (125 * CENT, 125 * MILL, 10 * USD), Some((250 * CENT, 25 * CENT, 15 * USD)), true),
    gemini(("gemini-3-pro-preview", "Gemini 3 Pro Preview"), (2 * USD, 20 * CENT, 12 * USD), Some((4 * USD, 40 * CENT, 18 * USD)), true),
    gemini(("gemini-3.1-pro-preview", "Gemini 3.1 Pro Preview"), (2 * USD, 20 * CENT, 12 * USD), Some((4 * USD, 40 * CENT, 18 * USD)), true),
    sold_by(Provider::Gemini, special(Kind::Embedding { dimensions: 3072 }, ("gemini-embedding-001", "gemini-embedding-001"), 0, (15 * CENT, 0), (2_048, 0))),
    sold_by(Provider::Azure, openai("gpt-4o", "gpt-4o-2024-08-06", 1_715_367_049, (250 * CENT, 125 * CENT, 10 * USD), (128_000, 16_384), false)),
    sold_by(Provider::Azure, openai("gpt-4o-mini", "gpt-4o-mini-2024-07-18", 1_721_172_741, (15 * CENT, 75 * MILL, 60 * CENT), (128_000, 16_384), false)),
    sold_by(Provider::Azure, openai("gpt-4.1", "gpt-4.1-2025-04-14", 1_744_316_542, (2 * USD, 50 * CENT, 8 * USD), (1_047_576, 32_768), false)),
    sold_by(Provider::Azure, openai("gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", 1_744_318_173, (40 * CENT, 10 * CENT, 160 * CENT), (1_047_576, 32_768), false)),
    sold_by(Provider::Azure, openai("gpt-5", "gpt-5-2025-08-07", 1_754_425_777, (125 * CENT, 125 * MILL, 10 * USD), (272_000, 128_000), true)),
    sold_by(Provider::Azure, openai("gpt-5-mini", "gpt-5-mini-2025-08-07", 1_754_425_928, (25 * CENT, 25 * MILL, 2 * USD), (272_000, 128_000), true)),
    sold_by(Provider::Azure, openai("o4-mini", "o4-mini-2025-04-16", 1_744_225_351, (110 * CENT, 275 * MILL, 440 * CENT), (200_000, 100_000), true)),
    sold_by(Provider::Azure, special(Kind::Embedding { dimensions: 1536 }, ("text-embedding-3-small", "text-embedding-3-small"), 1_705_948_997, (2 * CENT, 0), (8_192, 0))),
    sold_by(Provider::Azure, special(Kind::Embedding { dimensions: 3072 }, ("text-embedding-3-large", "text-embedding-3-large"), 1_705_953_180, (13 * CENT, 0), (8_192, 0))),
    compatible("llama-3.3-70b-versatile", (59 * CENT, 59 * CENT, 79 * CENT), (131_072, 32_768)),
    compatible("deepseek-chat", (28 * CENT, 28 * MILL, 42 * CENT), (131_072, 8_192)),
    compatible("mistral-large-latest", (50 * CENT, 50 * MILL, 150 * CENT), (262_144, 131_072)),
    compatible("meta-llama/llama-3.3-70b-instruct", (13 * CENT, 13 * CENT, 40 * CENT), (131_072, 16_384)),
    compatible("qwen3:8b", (0, 0, 0), (40_960, 40_960)),
    sold_by(Provider::Compatible, special(Kind::Embedding { dimensions: 768 }, ("nomic-embed-text", "nomic-embed-text"), 1_733_447_754, (MILL, 0), (8_192, 0))),
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
    fn what_is_not_paid_by_the_token_is_paid_by_its_own_unit() {
        let of = |model, usage| cost(Provider::Openai, model, usage);
        // 1000 x $0.02/M
        assert_eq!(of("text-embedding-3-small", Usage { prompt: 1000, ..Usage::default() }), Some(20_000));
        // 100 characters x $15/M, and twice that
        let said = Usage { characters: 100, ..Usage::default() };
        assert_eq!((of("tts-1", said), of("tts-1-hd", said)), (Some(1_500_000), Some(3_000_000)));
        // a minute at $0.006
        assert_eq!(of("whisper-1", Usage { seconds: 60, ..Usage::default() }), Some(6_000_000));
        // 600 tokens of sound x $6/M + 5 of text x $2.50/M + 20 out x $10/M
        let heard = Usage { prompt: 605, audio: 600, completion: 20, seconds: 60, ..Usage::default() };
        assert_eq!(of("gpt-4o-transcribe", heard), Some(3_600_000 + 12_500 + 200_000));
        // 10 x $5/M + 1056 x $40/M
        let painted = Usage { prompt: 10, completion: 1056, image: 1056, images: 1, ..Usage::default() };
        assert_eq!(of("gpt-image-1", painted), Some(50_000 + 42_240_000));
        assert_eq!(of("omni-moderation-latest", Usage { prompt: 500, ..Usage::default() }), Some(0));
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
            ("gpt-3.5-turbo-instruct", 1500, 1500, 2000),
            ("text-embedding-3-small", 20, 20, 0),
            ("text-embedding-3-large", 130, 130, 0),
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
