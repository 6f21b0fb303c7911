//! A deterministic tokenizer, and text made of an exact number of its tokens.
//!
//! A token is at most four bytes of one class (word or punctuation) with the white space before it, so a text never has
//! more tokens than bytes. That is the bound Keyward reserves by; the simulator must not be the one to break it.

use serde_json::Value;

const LONGEST: usize = 4;

/// A text with the end of each of its tokens, so that it can be streamed or cut at any of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    text: String,
    ends: Vec<usize>,
}

impl Text {
    pub fn of(text: impl Into<String>) -> Self {
        let text = text.into();
        let mut ends = Vec::new();
        scan(&text, |end| ends.push(end));
        Text { text, ends }
    }

    /// `tokens` words. `seed` makes the choices of one answer differ from each other.
    pub fn generate(tokens: usize, seed: usize, unicode: bool) -> Self {
        const PLAIN: [&str; 16] =
            ["the", "sky", "is", "blue", "and", "wind", "sea", "calm", "rain", "fell", "moon", "rose", "soft", "day", "hill", "lake"];
        const WIDE: [&str; 8] = ["né", "日", "bär", "😀", "ñu", "語", "да", "🦀"];
        let words: &[&str] = if unicode { &WIDE } else { &PLAIN };
        let mut made = Text { text: String::with_capacity(tokens.saturating_mul(6)), ends: Vec::with_capacity(tokens) };
        for i in 0..tokens {
            if i > 0 {
                made.text.push(' ');
            }
            // No word is longer than a token: each is exactly one.
            made.text.push_str(words[(i * 7 + seed * 3 + i / 16) % words.len()]);
            made.ends.push(made.text.len());
        }
        made
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn tokens(&self) -> u64 {
        self.ends.len() as u64
    }

    /// Cuts after `tokens`; true if anything was cut off.
    pub fn truncate(&mut self, tokens: u64) -> bool {
        let keep = usize::try_from(tokens).unwrap_or(usize::MAX);
        if keep >= self.ends.len() {
            return false;
        }
        self.ends.truncate(keep);
        self.text.truncate(self.ends.last().copied().unwrap_or(0));
        true
    }

    /// Pieces of `per` tokens, each with the tokens it has.
    pub fn deltas(&self, per: usize) -> impl Iterator<Item = (&str, u64)> {
        let mut start = 0;
        self.ends.chunks(per.max(1)).filter_map(move |ends| {
            let end = *ends.last()?;
            let piece = self.text.get(start..end)?;
            start = end;
            Some((piece, ends.len() as u64))
        })
    }
}

pub fn count(text: &str) -> u64 {
    let mut tokens = 0;
    scan(text, |_| tokens += 1);
    tokens
}

/// Tokens of a JSON value: its keys, strings and scalars. Walks instead of printing, since printing a number again may
/// take more bytes than the request had.
pub fn count_json(value: &Value) -> u64 {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 1,
        Value::String(text) => count(text),
        Value::Array(items) => items.iter().map(count_json).sum(),
        Value::Object(fields) => fields.iter().map(|(key, value)| count(key) + count_json(value)).sum(),
    }
}

fn scan(text: &str, mut token_end: impl FnMut(usize)) {
    let mut length = 0;
    let mut in_word = false;
    let mut close_at = None;
    for (at, char) in text.char_indices() {
        if char.is_whitespace() {
            if length > 0 {
                close_at = Some(at);
                length = 0;
            }
            continue;
        }
        let word = char.is_alphanumeric();
        if let Some(end) = close_at.take() {
            token_end(end);
        } else if length > 0 && (word != in_word || length + char.len_utf8() > LONGEST) {
            token_end(at);
            length = 0;
        }
        in_word = word;
        length += char.len_utf8();
    }
    if !text.is_empty() {
        token_end(text.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_at_most_four_bytes_of_one_class_with_the_space_before() {
        let text = Text::of("Hello, wide  world! ");
        let pieces: Vec<_> = text.deltas(1).map(|(piece, _)| piece).collect();
        assert_eq!(pieces, ["Hell", "o", ",", " wide", "  worl", "d", "! "]);
        assert_eq!(count(""), 0);
        assert_eq!(count("   "), 1);
    }

    #[test]
    fn no_text_has_more_tokens_than_bytes() {
        let mut state = 7_u64;
        for _ in 0..2000 {
            let mut text = String::new();
            for _ in 0..state % 40 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let alphabet = ['a', 'Z', '9', ' ', '\n', '.', '{', 'é', '日', '😀', '_', '\u{a0}'];
                text.push(alphabet[usize::try_from(state >> 33).unwrap_or(0) % alphabet.len()]);
            }
            state = state.wrapping_add(1);
            let made = Text::of(text.clone());
            assert!(made.tokens() <= text.len() as u64, "{text:?}");
            assert_eq!(made.tokens(), count(&text));
            assert_eq!(made.deltas(3).map(|(piece, _)| piece).collect::<String>(), text);
        }
    }

    #[test]
    fn generated_text_has_exactly_the_tokens_asked_for() {
        for unicode in [false, true] {
            for tokens in [0, 1, 8, 20, 500] {
                for seed in 0..4 {
                    let made = Text::generate(tokens, seed, unicode);
                    assert_eq!(count(made.as_str()), tokens as u64, "{}", made.as_str());
                    assert_eq!(Text::of(made.as_str()), made);
                }
            }
        }
    }

    #[test]
    fn a_cut_keeps_whole_tokens() {
        let mut text = Text::of("one two three");
        assert!(text.truncate(2));
        assert_eq!((text.as_str(), text.tokens()), ("one two", 2));
        assert!(!text.truncate(2));
        assert!(text.truncate(0));
        assert_eq!(text.as_str(), "");
    }
}
