//! What can be told of a model by its name. A name that tells no version is taken for one of the newest.

/// The first number in a name and the one right after it, which may be missing: `claude-3-7-sonnet`, `gemini-2.5-pro`. Longer numbers are
/// dates.
fn version(name: &str) -> Option<(u16, u16)> {
    let mut words = name.split(['-', '.', '@', ':', '_', '/']).skip_while(|word| number(word).is_none());
    let major = number(words.next()?)?;
    Some((major, words.next().and_then(number).unwrap_or(0)))
}

fn number(word: &str) -> Option<u16> {
    (word.len() <= 2).then(|| word.parse().ok())?
}

/// A Claude model.
#[derive(Debug, Clone, Copy)]
pub struct Claude {
    version: (u16, u16),
    always_thinks: bool,
}

impl Claude {
    pub fn new(name: &str) -> Self {
        let version = version(name).unwrap_or((u16::MAX, 0));
        // Models overview and migration guides of Fable 5 and Opus 5.5: "thinking: disabled" is a 400 there.
        let always_thinks = version >= (5, 5) || name.contains("fable") || name.contains("mythos");
        Claude { version, always_thinks }
    }

    /// It takes temperature, top_p and top_k other than their defaults.
    pub fn samples(&self) -> bool {
        self.version <= (4, 6)
    }

    /// It takes temperature and top_p together (migration guide to Claude 4.5).
    pub fn samples_twice(&self) -> bool {
        self.version <= (4, 0)
    }

    pub fn thinks(&self) -> bool {
        self.version >= (3, 7)
    }

    pub fn always_thinks(&self) -> bool {
        self.always_thinks
    }

    /// It thinks unless told otherwise.
    pub fn thinks_by_itself(&self) -> bool {
        self.version >= (5, 0)
    }

    /// It chooses itself how much to think, guided by an effort. Others are given a budget.
    pub fn adapts(&self) -> bool {
        self.version >= (4, 6)
    }

    pub fn has_xhigh(&self) -> bool {
        self.version >= (4, 7)
    }
}

/// A Gemini model.
#[derive(Debug, Clone, Copy)]
pub struct Gemini {
    version: (u16, u16),
    is_pro: bool,
    is_flash: bool,
}

impl Gemini {
    pub fn new(name: &str) -> Self {
        Gemini { version: version(name).unwrap_or((u16::MAX, 0)), is_pro: name.contains("pro"), is_flash: name.contains("flash") }
    }

    pub fn thinks(&self) -> bool {
        self.version >= (2, 5)
    }

    /// Thinking goes by levels; before, by a budget.
    pub fn has_levels(&self) -> bool {
        self.version >= (3, 0)
    }

    /// Thinking can be turned off (thinking guide: neither in 2.5 Pro nor from 3 on).
    pub fn can_stop_thinking(&self) -> bool {
        !self.has_levels() && !self.is_pro
    }

    pub fn has_minimal(&self) -> bool {
        self.is_flash && self.version < (3, 7)
    }

    pub fn has_medium(&self) -> bool {
        !(self.is_pro && self.version == (3, 0))
    }

    pub fn max_budget(&self) -> u64 {
        if self.is_pro { 32_768 } else { 24_576 }
    }

    /// It reads a file at any https address (file input methods: not the 2.0 family).
    pub fn reads_urls(&self) -> bool {
        self.version >= (2, 5)
    }

    /// It wants a signature at the first call of each turn (thought signatures).
    pub fn wants_signatures(&self) -> bool {
        self.version >= (3, 0)
    }

    /// It reads images that a tool gave (function calling: multimodal function responses).
    pub fn reads_given_images(&self) -> bool {
        self.version >= (3, 0)
    }
}

/// A model of OpenAI's.
#[derive(Debug, Clone, Copy)]
pub struct Gpt {
    pub reasons: bool,
    /// It takes the effort `none`: from GPT-5.1 on.
    pub can_stop: bool,
}

impl Gpt {
    pub fn new(name: &str) -> Self {
        let gpt = name.strip_prefix("gpt-").and_then(version).filter(|version| *version >= (5, 0) && !name.contains("-chat"));
        let is_o = name.strip_prefix('o').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
        Gpt { reasons: is_o || gpt.is_some(), can_stop: gpt.is_some_and(|version| version >= (5, 1)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn versions_are_read_wherever_they_stand() {
        for (name, expected) in [
            ("claude-opus-4-6", Some((4, 6))),
            ("claude-sonnet-4-20250514", Some((4, 0))),
            ("claude-3-7-sonnet-20250219", Some((3, 7))),
            ("claude-sonnet-4-5-20250929", Some((4, 5))),
            ("claude-opus-5", Some((5, 0))),
            ("claude-fable-5-1", Some((5, 1))),
            ("claude-mythos-preview", None),
            ("claude-2.1", Some((2, 1))),
            ("models/gemini-2.5-flash-lite", Some((2, 5))),
            ("gemini-3-pro-preview", Some((3, 0))),
            ("gemini-2.0-flash-001", Some((2, 0))),
            ("gemini-flash-latest", None),
        ] {
            assert_eq!(version(name), expected, "{name}");
        }
    }

    #[test]
    fn what_a_model_can_do_goes_by_its_version() {
        let claude = |name| Claude::new(name);
        assert!(claude("claude-opus-4-6").samples() && !claude("claude-opus-4-7").samples() && !claude("claude-newest").samples());
        assert!(!claude("claude-3-5-haiku-latest").thinks() && claude("claude-3-7-sonnet-latest").thinks());
        assert!(
            claude("claude-fable-5").always_thinks()
                && claude("claude-opus-5-5").always_thinks()
                && !claude("claude-opus-5").always_thinks()
        );
        assert!(!claude("claude-opus-4-5").adapts() && claude("claude-sonnet-4-6").adapts() && claude("claude-mythos-preview").adapts());
        let gpt = |name| (Gpt::new(name).reasons, Gpt::new(name).can_stop);
        for (name, expected) in [
            ("gpt-4o", (false, false)),
            ("gpt-5", (true, false)),
            ("gpt-5.1", (true, true)),
            ("gpt-5-chat-latest", (false, false)),
            ("o3-mini", (true, false)),
            ("omni-moderation-latest", (false, false)),
        ] {
            assert_eq!(gpt(name), expected, "{name}");
        }
    }
}
