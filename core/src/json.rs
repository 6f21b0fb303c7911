//! A push tokenizer for JSON that arrives in pieces.
//!
//! It holds no document: one key or one short string at a time, a stack of one bit per level, and the byte offset.
//! It accepts exactly RFC 8259, with an object or array nesting of at most [`MAX_DEPTH`], valid UTF-8 and paired
//! surrogates. Whoever wants something from the document implements [`Visitor`].

/// Deepest nesting that is read; deeper is [`JsonError::TooDeep`].
pub const MAX_DEPTH: u32 = 128;
/// Longest key that is handed to the visitor; a longer one cannot be a governed name and arrives as `None`.
const MAX_KEY: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JsonError {
    Syntax(u64),
    Utf8(u64),
    Surrogate(u64),
    TooDeep(u64),
    Truncated(u64),
    Trailing(u64),
}

impl JsonError {
    /// What is wrong, in words for the caller.
    pub fn message(self) -> String {
        let (what, at) = match self {
            JsonError::Syntax(at) => ("is not valid JSON", at),
            JsonError::Utf8(at) => ("is not valid UTF-8", at),
            JsonError::Surrogate(at) => ("has an unpaired surrogate escape", at),
            JsonError::TooDeep(at) => ("is nested too deeply", at),
            JsonError::Truncated(at) => ("ends in the middle of the JSON document", at),
            JsonError::Trailing(at) => ("goes on after the JSON document", at),
        };
        format!("the request body {what} (byte {at})")
    }
}

/// A scalar. Strings are unescaped; of a string longer than the visitor asked for comes the start, and `len` tells
/// the whole length in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar<'a> {
    Str { text: &'a [u8], len: u64 },
    Num(&'a [u8]),
    Bool(bool),
    Null,
}

/// Where a value stands in the document, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

/// Receives the document as it passes. An `Err` stops the reading.
pub trait Visitor {
    type Error: From<JsonError>;
    /// An object (`true`) or array opened; `at` is the offset of its bracket.
    fn open(&mut self, object: bool, at: u64) -> Result<(), Self::Error>;
    /// The innermost object or array closed; `at` is the offset of its bracket.
    fn close(&mut self, at: u64) -> Result<(), Self::Error>;
    /// A key of the innermost object, unescaped; `None` when too long to matter.
    fn key(&mut self, key: Option<&[u8]>) -> Result<(), Self::Error>;
    /// Where the key stands that is told next, its quotes included.
    fn key_at(&mut self, _: Span) {}
    /// How many bytes of the string that starts now are wanted (0: none).
    fn wants(&self) -> usize;
    fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), Self::Error>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Value,
    FirstItemOrEnd,
    FirstKeyOrEnd,
    Key,
    Colon,
    CommaOrEnd,
    Str,
    Escape,
    Hex(u8),
    /// After a high surrogate: `\` then `u` must follow.
    LowBackslash,
    LowU,
    Num(Num),
    Literal(Literal, u8),
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Num {
    Minus,
    Zero,
    Int,
    Dot,
    Frac,
    Exp,
    ExpSign,
    ExpDigits,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Literal {
    True,
    False,
    Null,
}

impl Literal {
    fn text(self) -> &'static [u8] {
        match self {
            Literal::True => b"true",
            Literal::False => b"false",
            Literal::Null => b"null",
        }
    }

    fn value(self) -> Scalar<'static> {
        match self {
            Literal::True => Scalar::Bool(true),
            Literal::False => Scalar::Bool(false),
            Literal::Null => Scalar::Null,
        }
    }
}

/// The tokenizer. Feed it pieces of any size; the result does not depend on where they are cut.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    at: u64,
    depth: u32,
    /// One bit a level, the innermost lowest: set when it is an object.
    kinds: u128,
    start: u64,
    is_key: bool,
    keep: usize,
    len: u64,
    text: Vec<u8>,
    hex: u32,
    high: Option<u32>,
    utf8: Utf8,
}

impl Default for Scanner {
    fn default() -> Self {
        Scanner {
            state: State::Value,
            at: 0,
            depth: 0,
            kinds: 0,
            start: 0,
            is_key: false,
            keep: 0,
            len: 0,
            text: Vec::new(),
            hex: 0,
            high: None,
            utf8: Utf8::default(),
        }
    }
}

impl Scanner {
    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Forgets the document and begins another; what memory it holds stays.
    pub fn reset(&mut self) {
        *self = Scanner { text: std::mem::take(&mut self.text), ..Scanner::default() };
    }

    /// Reads the next piece. What most documents are made of is taken a token at a time, the rest byte by byte.
    pub fn feed<V: Visitor>(&mut self, piece: &[u8], visitor: &mut V) -> Result<(), V::Error> {
        let mut rest = piece;
        while let Some((&byte, tail)) = rest.split_first() {
            let mut taken = match self.state {
                State::Str => self.string_run(rest),
                State::Value | State::FirstItemOrEnd => self.value_token(byte, rest, visitor)?,
                State::Key | State::FirstKeyOrEnd if byte == b'"' => self.key_token(tail, visitor)?,
                State::CommaOrEnd if byte == b',' => {
                    self.state = if self.in_object() { State::Key } else { State::Value };
                    1 + one_space(tail)
                }
                State::CommaOrEnd if byte == if self.in_object() { b'}' } else { b']' } => {
                    self.pop(visitor)?;
                    1
                }
                _ => 0,
            };
            if taken == 0 {
                self.byte(byte, visitor)?;
                taken = 1;
            }
            self.at += taken as u64;
            rest = rest.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Ends the document: a document that stops half way is an error.
    pub fn finish<V: Visitor>(&mut self, visitor: &mut V) -> Result<(), V::Error> {
        if let State::Num(num) = self.state {
            self.end_number(num, visitor)?;
        }
        match self.state {
            State::Done => Ok(()),
            _ => Err(JsonError::Truncated(self.at).into()),
        }
    }

    /// Takes a value's first token as far as this piece shows it whole; of a string at least its plain beginning. Gives how many
    /// bytes; 0 leaves it to [`Self::byte`].
    #[inline]
    fn value_token<V: Visitor>(&mut self, byte: u8, rest: &[u8], visitor: &mut V) -> Result<usize, V::Error> {
        let (scalar, len) = match byte {
            b'"' => {
                let tail = rest.get(1..).unwrap_or_default();
                let run = plain_run(tail);
                let plain = tail.get(..run).unwrap_or_default();
                if tail.get(run) != Some(&b'"') {
                    self.start = self.at;
                    self.begin_string(false, visitor.wants());
                    self.keep_bytes(plain);
                    return Ok(1 + run);
                }
                (Scalar::Str { text: plain.get(..visitor.wants()).unwrap_or(plain), len: run as u64 }, run + 2)
            }
            b'{' | b'[' => {
                self.value(byte, visitor)?;
                return Ok(1);
            }
            b'0'..=b'9' => {
                // A plain integer, up to what shows that it is one.
                let len = rest.iter().take(20).take_while(|b| b.is_ascii_digit()).count();
                if len > 1 && byte == b'0' || !matches!(rest.get(len), Some(b',' | b'}' | b']')) {
                    return Ok(0);
                }
                (Scalar::Num(rest.get(..len).unwrap_or_default()), len)
            }
            b'n' if rest.starts_with(b"null") => (Scalar::Null, 4),
            b't' if rest.starts_with(b"true") => (Scalar::Bool(true), 4),
            b'f' if rest.starts_with(b"false") => (Scalar::Bool(false), 5),
            _ => return Ok(0),
        };
        self.after_value();
        visitor.scalar(scalar, Span { start: self.at, end: self.at + len as u64 })?;
        Ok(len)
    }

    /// Takes a key, whose quote is passed already, with its colon; of one that is not plain or not whole, the plain beginning.
    #[inline]
    fn key_token<V: Visitor>(&mut self, tail: &[u8], visitor: &mut V) -> Result<usize, V::Error> {
        let run = plain_run(tail);
        let (plain, after) = tail.split_at_checked(run).unwrap_or((tail, &[]));
        let Some((b'"', after)) = after.split_first() else {
            self.start = self.at;
            self.begin_string(true, MAX_KEY);
            self.keep_bytes(plain);
            return Ok(1 + run);
        };
        visitor.key_at(Span { start: self.at, end: self.at + run as u64 + 2 });
        visitor.key((run <= MAX_KEY).then_some(plain))?;
        let Some((b':', after)) = after.split_first() else {
            self.state = State::Colon;
            return Ok(run + 2);
        };
        self.state = State::Value;
        Ok(run + 3 + one_space(after))
    }

    /// Takes the longest run of string bytes that need little thought; most of a large body is such runs.
    fn string_run(&mut self, rest: &[u8]) -> usize {
        if !self.utf8.is_whole() {
            return 0;
        }
        let mut taken = 0;
        loop {
            let rest = rest.get(taken..).unwrap_or_default();
            let run = plain_run(rest);
            self.keep_bytes(rest.get(..run).unwrap_or_default());
            taken += run;
            match rest.get(run..) {
                Some([b'\\', escaped, ..]) if let Some(plain) = escaped_by(*escaped) => {
                    self.keep_bytes(&[plain]);
                    taken += 2;
                }
                Some(rest @ [0x80..=0xFF, ..]) => {
                    let whole = whole_characters(rest);
                    if whole.is_empty() {
                        return taken;
                    }
                    self.keep_bytes(whole);
                    taken += whole.len();
                }
                _ => return taken,
            }
        }
    }

    fn byte<V: Visitor>(&mut self, b: u8, visitor: &mut V) -> Result<(), V::Error> {
        match self.state {
            State::Str => self.in_string(b, visitor),
            State::Escape => Ok(self.escape(b)?),
            State::Hex(n) => Ok(self.hex_digit(b, n)?),
            State::LowBackslash | State::LowU => Ok(self.low_surrogate(b)?),
            State::Num(num) => self.number(b, num, visitor),
            State::Literal(which, n) => self.literal(b, which, n, visitor),
            _ if matches!(b, b' ' | b'\t' | b'\n' | b'\r') => Ok(()),
            State::Value => self.value(b, visitor),
            State::FirstItemOrEnd if b == b']' => self.pop(visitor),
            State::FirstItemOrEnd => self.value(b, visitor),
            State::FirstKeyOrEnd if b == b'}' => self.pop(visitor),
            State::FirstKeyOrEnd | State::Key if b == b'"' => {
                self.start = self.at;
                self.begin_string(true, MAX_KEY);
                Ok(())
            }
            State::Colon if b == b':' => {
                self.state = State::Value;
                Ok(())
            }
            State::CommaOrEnd => self.comma_or_end(b, visitor),
            State::Done => Err(JsonError::Trailing(self.at).into()),
            _ => Err(JsonError::Syntax(self.at).into()),
        }
    }

    fn value<V: Visitor>(&mut self, b: u8, visitor: &mut V) -> Result<(), V::Error> {
        self.start = self.at;
        self.text.clear();
        match b {
            b'{' | b'[' => {
                if self.depth >= MAX_DEPTH {
                    return Err(JsonError::TooDeep(self.at).into());
                }
                let object = b == b'{';
                self.kinds = self.kinds << 1 | u128::from(object);
                self.depth += 1;
                self.state = if object { State::FirstKeyOrEnd } else { State::FirstItemOrEnd };
                visitor.open(object, self.at)
            }
            b'"' => {
                self.begin_string(false, visitor.wants());
                Ok(())
            }
            b'-' | b'0'..=b'9' => {
                self.text.push(b);
                self.state = State::Num(match b {
                    b'-' => Num::Minus,
                    b'0' => Num::Zero,
                    _ => Num::Int,
                });
                Ok(())
            }
            b't' => self.begin_literal(Literal::True),
            b'f' => self.begin_literal(Literal::False),
            b'n' => self.begin_literal(Literal::Null),
            _ => Err(JsonError::Syntax(self.at).into()),
        }
    }

    fn begin_literal<E>(&mut self, which: Literal) -> Result<(), E> {
        self.state = State::Literal(which, 1);
        Ok(())
    }

    fn literal<V: Visitor>(&mut self, b: u8, which: Literal, n: u8, visitor: &mut V) -> Result<(), V::Error> {
        if which.text().get(usize::from(n)) != Some(&b) {
            return Err(JsonError::Syntax(self.at).into());
        }
        if usize::from(n) + 1 < which.text().len() {
            self.state = State::Literal(which, n + 1);
            return Ok(());
        }
        self.after_value();
        visitor.scalar(which.value(), Span { start: self.start, end: self.at + 1 })
    }

    fn number<V: Visitor>(&mut self, b: u8, num: Num, visitor: &mut V) -> Result<(), V::Error> {
        let next = match (num, b) {
            (Num::Minus, b'0') => Some(Num::Zero),
            (Num::Minus, b'1'..=b'9') | (Num::Int, b'0'..=b'9') => Some(Num::Int),
            (Num::Zero | Num::Int, b'.') => Some(Num::Dot),
            (Num::Dot | Num::Frac, b'0'..=b'9') => Some(Num::Frac),
            (Num::Zero | Num::Int | Num::Frac, b'e' | b'E') => Some(Num::Exp),
            (Num::Exp, b'+' | b'-') => Some(Num::ExpSign),
            (Num::Exp | Num::ExpSign | Num::ExpDigits, b'0'..=b'9') => Some(Num::ExpDigits),
            _ => None,
        };
        match next {
            Some(next) => {
                // 40 digits are more than any number that governs has.
                if self.text.len() < 40 {
                    self.text.push(b);
                }
                self.state = State::Num(next);
                Ok(())
            }
            None => {
                self.end_number(num, visitor)?;
                self.byte(b, visitor)
            }
        }
    }

    fn end_number<V: Visitor>(&mut self, num: Num, visitor: &mut V) -> Result<(), V::Error> {
        if !matches!(num, Num::Zero | Num::Int | Num::Frac | Num::ExpDigits) {
            return Err(JsonError::Syntax(self.at).into());
        }
        self.after_value();
        visitor.scalar(Scalar::Num(&self.text), Span { start: self.start, end: self.at })
    }

    fn begin_string(&mut self, is_key: bool, keep: usize) {
        self.state = State::Str;
        self.is_key = is_key;
        self.keep = keep;
        self.len = 0;
        self.text.clear();
    }

    fn in_string<V: Visitor>(&mut self, b: u8, visitor: &mut V) -> Result<(), V::Error> {
        if !self.utf8.is_whole() || b >= 0x80 {
            self.utf8.push(b).map_err(|()| JsonError::Utf8(self.at))?;
            self.keep_bytes(&[b]);
            return Ok(());
        }
        match b {
            b'"' => self.end_string(visitor),
            b'\\' => {
                self.state = State::Escape;
                Ok(())
            }
            0..0x20 => Err(JsonError::Syntax(self.at).into()),
            _ => {
                self.keep_bytes(&[b]);
                Ok(())
            }
        }
    }

    fn end_string<V: Visitor>(&mut self, visitor: &mut V) -> Result<(), V::Error> {
        if self.is_key {
            self.state = State::Colon;
            let whole = self.len <= MAX_KEY as u64;
            visitor.key_at(Span { start: self.start, end: self.at + 1 });
            return visitor.key(whole.then_some(self.text.as_slice()));
        }
        self.after_value();
        let value = Scalar::Str { text: &self.text, len: self.len };
        visitor.scalar(value, Span { start: self.start, end: self.at + 1 })
    }

    fn escape(&mut self, b: u8) -> Result<(), JsonError> {
        if b == b'u' {
            self.hex = 0;
            self.state = State::Hex(0);
            return Ok(());
        }
        let plain = escaped_by(b).ok_or(JsonError::Syntax(self.at))?;
        self.keep_bytes(&[plain]);
        self.state = State::Str;
        Ok(())
    }

    fn hex_digit(&mut self, b: u8, n: u8) -> Result<(), JsonError> {
        let digit = char::from(b).to_digit(16).ok_or(JsonError::Syntax(self.at))?;
        self.hex = self.hex * 16 + digit;
        self.state = State::Hex(n + 1);
        if n < 3 {
            return Ok(());
        }
        self.state = State::Str;
        let code = match (self.high.take(), self.hex) {
            (None, 0xD800..=0xDBFF) => {
                self.high = Some(self.hex);
                self.state = State::LowBackslash;
                return Ok(());
            }
            (Some(high), low @ 0xDC00..=0xDFFF) => 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00),
            (None, code) => code,
            (Some(_), _) => return Err(JsonError::Surrogate(self.at)),
        };
        let c = char::from_u32(code).ok_or(JsonError::Surrogate(self.at))?;
        self.keep_bytes(c.encode_utf8(&mut [0; 4]).as_bytes());
        Ok(())
    }

    fn low_surrogate(&mut self, b: u8) -> Result<(), JsonError> {
        match (self.state, b) {
            (State::LowBackslash, b'\\') => self.state = State::LowU,
            (State::LowU, b'u') => {
                self.hex = 0;
                self.state = State::Hex(0);
            }
            _ => return Err(JsonError::Surrogate(self.at)),
        }
        Ok(())
    }

    fn keep_bytes(&mut self, bytes: &[u8]) {
        let room = self.keep.saturating_sub(self.text.len());
        self.len += bytes.len() as u64;
        self.text.extend_from_slice(bytes.get(..room.min(bytes.len())).unwrap_or_default());
    }

    fn comma_or_end<V: Visitor>(&mut self, b: u8, visitor: &mut V) -> Result<(), V::Error> {
        let object = self.in_object();
        match (b, object) {
            (b',', true) => self.state = State::Key,
            (b',', false) => self.state = State::Value,
            (b'}', true) | (b']', false) => return self.pop(visitor),
            _ => return Err(JsonError::Syntax(self.at).into()),
        }
        Ok(())
    }

    fn pop<V: Visitor>(&mut self, visitor: &mut V) -> Result<(), V::Error> {
        self.depth = self.depth.saturating_sub(1);
        self.kinds >>= 1;
        self.after_value();
        visitor.close(self.at)
    }

    fn after_value(&mut self) {
        self.state = if self.depth == 0 { State::Done } else { State::CommaOrEnd };
    }

    fn in_object(&self) -> bool {
        self.depth > 0 && self.kinds & 1 == 1
    }
}

/// 1 when a space follows, as most writers put one after a colon or comma.
fn one_space(rest: &[u8]) -> usize {
    usize::from(rest.first() == Some(&b' '))
}

/// What a backslash and this byte stand for.
fn escaped_by(byte: u8) -> Option<u8> {
    Some(match byte {
        b'"' | b'\\' | b'/' => byte,
        b'b' => 0x08,
        b'f' => 0x0c,
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        _ => return None,
    })
}

/// Length of the run of bytes that stand for themselves in a string: ASCII from space on, but no quote and no backslash.
/// Eight at a time: most of a large body is such runs.
fn plain_run(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    let (words, rest) = bytes.as_chunks::<8>();
    for (n, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        // The classic test for bytes below a bound: it may also report a byte above a true one, so the lowest counts. With
        // 0x02 flipped in each, the quote comes to stand right above the control characters.
        let flipped = word ^ (ONES * 2);
        let slashes = word ^ (ONES * 0x5c);
        let found = (word | flipped.wrapping_sub(ONES * 0x21) & !flipped | slashes.wrapping_sub(ONES) & !slashes) & HIGHS;
        if found != 0 {
            return n * 8 + found.trailing_zeros() as usize / 8;
        }
    }
    words.len() * 8 + rest.iter().position(|&b| !(0x20..0x80).contains(&b) || b == b'"' || b == b'\\').unwrap_or(rest.len())
}

/// The characters beyond ASCII that these bytes begin with, as far as they are whole and right; of what follows, a byte at a time tells.
fn whole_characters(bytes: &[u8]) -> &[u8] {
    let run = bytes.iter().position(u8::is_ascii).map_or(bytes, |length| bytes.split_at(length).0);
    match std::str::from_utf8(run) {
        Ok(text) => text.as_bytes(),
        Err(wrong) => run.split_at(wrong.valid_up_to()).0,
    }
}

/// Checks UTF-8 a byte at a time (Unicode 15, table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF).
#[derive(Debug, Clone, Copy)]
struct Utf8 {
    left: u8,
    low: u8,
    high: u8,
}

impl Default for Utf8 {
    fn default() -> Self {
        Utf8 { left: 0, low: 0x80, high: 0xBF }
    }
}

impl Utf8 {
    fn is_whole(self) -> bool {
        self.left == 0
    }

    fn push(&mut self, b: u8) -> Result<(), ()> {
        if self.left > 0 {
            if !(self.low..=self.high).contains(&b) {
                return Err(());
            }
            *self = Utf8 { left: self.left - 1, ..Utf8::default() };
            return Ok(());
        }
        let (left, low, high) = match b {
            0x00..=0x7F => return Ok(()),
            0xC2..=0xDF => (1, 0x80, 0xBF),
            0xE0 => (2, 0xA0, 0xBF),
            0xE1..=0xEC | 0xEE..=0xEF => (2, 0x80, 0xBF),
            0xED => (2, 0x80, 0x9F),
            0xF0 => (3, 0x90, 0xBF),
            0xF1..=0xF3 => (3, 0x80, 0xBF),
            0xF4 => (3, 0x80, 0x8F),
            _ => return Err(()),
        };
        *self = Utf8 { left, low, high };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Rebuilds the document, so that a second reader (serde_json) can say whether it was understood.
    #[derive(Default)]
    struct Rebuild(String);

    impl Rebuild {
        fn sep(&mut self) {
            if !self.0.is_empty() && !self.0.ends_with(['{', '[', ':']) {
                self.0.push(',');
            }
        }
    }

    impl Visitor for Rebuild {
        type Error = JsonError;
        fn open(&mut self, object: bool, _: u64) -> Result<(), JsonError> {
            self.sep();
            self.0.push(if object { '{' } else { '[' });
            Ok(())
        }
        fn close(&mut self, _: u64) -> Result<(), JsonError> {
            let open = self.0.chars().fold(Vec::new(), |mut stack, c| {
                match c {
                    '{' | '[' => stack.push(c),
                    '}' | ']' => {
                        stack.pop();
                    }
                    _ => {}
                }
                stack
            });
            self.0.push(if open.last() == Some(&'{') { '}' } else { ']' });
            Ok(())
        }
        fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
            self.sep();
            let key = String::from_utf8(key.unwrap_or_default().to_vec()).unwrap_or_default();
            self.0.push_str(&encode(&key));
            self.0.push(':');
            Ok(())
        }
        fn wants(&self) -> usize {
            1 << 20
        }
        fn scalar(&mut self, value: Scalar<'_>, _: Span) -> Result<(), JsonError> {
            self.sep();
            match value {
                Scalar::Str { text, .. } => self.0.push_str(&encode(&String::from_utf8_lossy(text))),
                Scalar::Num(n) => self.0.push_str(&String::from_utf8_lossy(n)),
                Scalar::Bool(b) => self.0.push_str(if b { "true" } else { "false" }),
                Scalar::Null => self.0.push_str("null"),
            }
            Ok(())
        }
    }

    /// Brackets inside strings would confuse `close` above.
    fn encode(text: &str) -> String {
        let text = serde_json::to_string(text).unwrap_or_default();
        text.replace('{', "\\u007b").replace('}', "\\u007d").replace('[', "\\u005b").replace(']', "\\u005d")
    }

    fn scan(pieces: &[&[u8]]) -> Result<String, JsonError> {
        let (mut scanner, mut out) = (Scanner::default(), Rebuild::default());
        for piece in pieces {
            scanner.feed(piece, &mut out)?;
        }
        scanner.finish(&mut out)?;
        Ok(out.0)
    }

    #[test]
    fn understands_what_serde_understands_at_every_split() {
        let text = r#" {"a":[1,-0.5e+3,0,true,false,null,"x\u00e9\n\ud83d\ude00\\"],"é😀":{},"":[[],{}],"b":"\/"} "#.as_bytes();
        let expected: serde_json::Value = serde_json::from_slice(text).unwrap();
        for cut in 0..=text.len() {
            let rebuilt = scan(&[&text[..cut], &text[cut..]]).unwrap();
            assert_eq!(serde_json::from_str::<serde_json::Value>(&rebuilt).unwrap(), expected, "cut at {cut}");
        }
    }

    #[test]
    fn refuses_what_is_not_json() {
        for bad in [
            "",
            " ",
            "{",
            "[1,]",
            "{\"a\":1,}",
            "{\"a\"}",
            "{a:1}",
            "01",
            "-",
            "1.",
            "1e",
            "tru",
            "nul1",
            "\"\u{1}\"",
            "\"\\x\"",
            "[1}",
            "{]",
            "1 2",
            "{}{}",
            "\"\\ud800\"",
            "\"\\ud800\\u0041\"",
            "\"\\udc00\"",
            "+1",
            ".5",
            "'a'",
            "{\"a\":1 \"b\":2}",
            "\u{feff}{}",
        ] {
            assert!(scan(&[bad.as_bytes()]).is_err(), "{bad:?} was accepted");
        }
        assert!(matches!(scan(&[b"\"\xff\""]), Err(JsonError::Utf8(1))));
        assert!(matches!(scan(&[b"\"\xed\xa0\x80\""]), Err(JsonError::Utf8(_))), "an encoded surrogate");
        assert!(matches!(scan(&[b"\"\xc3\""]), Err(JsonError::Utf8(_))));
        let deep = "[".repeat(129);
        assert!(matches!(scan(&[deep.as_bytes()]), Err(JsonError::TooDeep(128))));
    }

    /// Writes down every call with all it says.
    #[derive(Default)]
    struct Calls(Vec<String>);

    impl Visitor for Calls {
        type Error = JsonError;
        fn open(&mut self, object: bool, at: u64) -> Result<(), JsonError> {
            self.0.push(format!("{}{at}", if object { '{' } else { '[' }));
            Ok(())
        }
        fn close(&mut self, at: u64) -> Result<(), JsonError> {
            self.0.push(format!("close {at}"));
            Ok(())
        }
        fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
            self.0.push(key.map_or("long key".to_owned(), |key| format!("key {}", String::from_utf8_lossy(key))));
            Ok(())
        }
        fn wants(&self) -> usize {
            // As real visitors do, by where the document stands.
            self.0.len() % 4 * 3
        }
        fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), JsonError> {
            let value = match value {
                Scalar::Str { text, len } => format!("{:?} of {len}", String::from_utf8_lossy(text)),
                Scalar::Num(digits) => String::from_utf8_lossy(digits).into_owned(),
                other => format!("{other:?}"),
            };
            self.0.push(format!("{value} {}..{}", span.start, span.end));
            Ok(())
        }
    }

    fn calls<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<String>, Result<(), JsonError>) {
        let (mut scanner, mut calls) = (Scanner::default(), Calls::default());
        let fed = pieces.into_iter().try_for_each(|piece| scanner.feed(piece, &mut calls));
        let ended = fed.and_then(|()| scanner.finish(&mut calls));
        (calls.0, ended)
    }

    #[test]
    fn a_document_is_told_with_its_offsets() {
        let text = br#" {"id": "abc-def","n":[0,12, -3.5e1 ,{}],"ok":true, "no":null,"t\u0065xt":"a\"b","u":{"x":[]}}"#;
        let expected = [
            "{1",
            "key id",
            "\"abc-de\" of 7 8..17",
            "key n",
            "[22",
            "0 23..24",
            "12 25..27",
            "-3.5e1 29..35",
            "{37",
            "close 38",
            "close 39",
            "key ok",
            "Bool(true) 46..50",
            "key no",
            "Null 57..61",
            "key text",
            "\"\" of 3 74..80",
            "key u",
            "{85",
            "key x",
            "[90",
            "close 91",
            "close 92",
            "close 93",
        ];
        assert_eq!(calls([text.as_slice()]), (expected.map(str::to_owned).to_vec(), Ok(())));
    }

    #[test]
    fn a_scanner_that_was_reset_is_as_new() {
        let mut scanner = Scanner::default();
        for before in [&b""[..], b"{\"a\":[1,\"x", b"[1,{\"\\ud83d", b"[tru", b"\"\xc3", b"nonsense", b"{}"] {
            let _ = scanner.feed(before, &mut Calls::default());
            scanner.reset();
            let mut after = Calls::default();
            scanner.feed(b"{\"a\":\"b\"}", &mut after).unwrap();
            scanner.finish(&mut after).unwrap();
            assert_eq!(after.0, calls([b"{\"a\":\"b\"}".as_slice()]).0, "after {before:?}");
            scanner.reset();
        }
    }

    #[test]
    fn a_plain_run_stops_exactly_at_what_needs_thought() {
        for byte in 0..=255u8 {
            let plain = (0x20..0x80).contains(&byte) && byte != b'"' && byte != b'\\';
            for (at, len) in (0..20).flat_map(|at| (at + 1..24).map(move |len| (at, len))) {
                let mut bytes = vec![b'~'; len];
                bytes[at] = byte;
                assert_eq!(plain_run(&bytes), if plain { len } else { at }, "{byte:#x} at {at} of {len}");
            }
        }
    }

    /// Whole tokens and pieces of them, so that random documents go deep before they go wrong.
    const TOKENS: [&str; 30] = [
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        ", ",
        ": ",
        " ",
        "\n",
        "\"\"",
        "\"key\":",
        "\"a longer string\"",
        "\"h\u{e9}\u{1f600}\"",
        "\"x\\n\\ud83d\\ude00\"",
        "\"open",
        "\"",
        "\\",
        "0",
        "01",
        "12",
        "12345678901234567890123",
        "-1",
        "1.5e3",
        "1.",
        "null",
        "true",
        "false",
        "nul",
        "[{\"a\":[",
    ];

    proptest! {
        /// The way a token at a time tells exactly what the way byte by byte tells, errors included, wherever pieces are cut.
        #[test]
        fn tokens_are_read_as_their_bytes_are(tokens in proptest::collection::vec(proptest::sample::select(&TOKENS[..]), 0..25), cuts in proptest::collection::vec(0usize..200, 0..4)) {
            let text = tokens.concat();
            let bytes = text.as_bytes();
            let slowly = calls(bytes.chunks(1));
            prop_assert_eq!(&calls([bytes]), &slowly);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.sort_unstable();
            let starts = std::iter::once(0).chain(cuts.iter().copied());
            let ends = cuts.iter().copied().chain([bytes.len()]);
            prop_assert_eq!(&calls(starts.zip(ends).map(|(a, b)| &bytes[a..b])), &slowly);
        }

        /// The tokenizer and serde_json agree on every byte string, valid or not, however it is cut.
        #[test]
        fn agrees_with_serde(bytes in proptest::collection::vec(proptest::sample::select(&b"{}[]\",:\\ue+-.0123456789tfn \xc3\xa9\xf0\x9f"[..]), 0..40), cut in 0usize..40) {
            let cut = cut.min(bytes.len());
            let whole = scan(&[&bytes]);
            prop_assert_eq!(&whole, &scan(&[&bytes[..cut], &bytes[cut..]]));
            // serde_json skips UTF-8 checks for ignored strings, so hold it to text.
            let theirs = std::str::from_utf8(&bytes).ok().and_then(|t| serde_json::from_str::<serde_json::Value>(t).ok());
            // Numbers beyond a double are errors for serde_json only.
            if let Some(theirs) = theirs {
                let ours: serde_json::Value = serde_json::from_str(&whole.expect("serde accepts it")).unwrap();
                prop_assert_eq!(ours, theirs);
            } else if let Ok(text) = &whole {
                prop_assert!(serde_json::from_str::<serde_json::Value>(text).is_err(), "only we accept {:?}", bytes);
            }
        }
    }
}
