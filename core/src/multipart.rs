//! A push reader of multipart/form-data (RFC 7578, RFC 2046 5.1), in pieces of any size. It finds the parts that govern and
//! the size and first bytes of the file; nothing of a file is kept. What two readers could understand differently is
//! refused: a preamble, bare line feeds, escapes in names, a part twice.

use crate::body::{BodyError, BodyFacts};
use crate::json::Span;
use crate::operation::{MAX_REFS, looks_like_object};
use crate::recording::{self, Head};

/// Longest line block of a part's headers.
const MAX_HEADERS: usize = 1_024;
const MAX_PARTS: usize = 64;
/// Longest value of a part that governs.
const MAX_VALUE: usize = 256;

/// The boundary in a content-type of multipart/form-data. `None`: it is not that, or says it in a way that needs unquoting.
pub fn boundary(content_type: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(content_type).ok()?;
    let mut parameters = text.split(';').map(str::trim);
    parameters.next().filter(|kind| kind.eq_ignore_ascii_case("multipart/form-data"))?;
    let mut found = None;
    for parameter in parameters.filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=')?;
        if name.eq_ignore_ascii_case("boundary") {
            let value = value.strip_prefix('"').map_or(Some(value), |rest| rest.strip_suffix('"'))?;
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"'()+_,-./:=?".contains(&b);
            if found.is_some() || !(1..=70).contains(&value.len()) || !value.bytes().all(plain) {
                return None;
            }
            found = Some(value.to_owned());
        }
    }
    found
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first delimiter: no line end before it.
    Start,
    /// After a delimiter: CRLF for another part, `--` for the end.
    AfterDelimiter,
    ExpectLf,
    ExpectDash,
    Headers,
    Body,
    /// After the last delimiter: nothing but one line end.
    End,
    EndLf,
    Over,
}

/// The parts that govern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Model,
    Stream,
    File,
    /// Any other text: it may name an object.
    Text,
    /// Any other file.
    Blob,
}

/// Reads a form in pieces.
#[derive(Debug)]
pub struct MultipartReader {
    /// `\r\n--boundary`.
    delimiter: Vec<u8>,
    state: State,
    /// So many bytes of the delimiter have matched.
    matched: usize,
    at: u64,
    headers: Vec<u8>,
    part: Part,
    parts: usize,
    /// Names of parts that may stand but once and have.
    seen: Vec<&'static str>,
    value: Vec<u8>,
    value_start: u64,
    head: Head,
    facts: BodyFacts,
}

impl MultipartReader {
    pub fn new(boundary: &str) -> Self {
        MultipartReader {
            delimiter: format!("\r\n--{boundary}").into_bytes(),
            state: State::Start,
            // The body begins with a delimiter that has no line end before it.
            matched: 2,
            at: 0,
            headers: Vec::new(),
            part: Part::Text,
            parts: 0,
            seen: Vec::new(),
            value: Vec::new(),
            value_start: 0,
            head: Head::default(),
            facts: BodyFacts::default(),
        }
    }

    pub fn position(&self) -> u64 {
        self.at
    }

    pub fn feed(&mut self, piece: &[u8]) -> Result<(), BodyError> {
        let mut rest = piece;
        while let Some((&byte, tail)) = rest.split_first() {
            let taken = match self.state {
                State::Body if self.matched == 0 && byte != b'\r' => {
                    let run = memchr::memchr(b'\r', rest).unwrap_or(rest.len());
                    self.data(rest.get(..run).unwrap_or_default())?;
                    run
                }
                _ => {
                    self.byte(byte)?;
                    1
                }
            };
            self.at += taken as u64;
            rest = if taken == 1 { tail } else { rest.get(taken..).unwrap_or_default() };
        }
        Ok(())
    }

    /// What the form told. A recording's length in seconds is bound by its file's first bytes and its size.
    pub fn finish(mut self) -> Result<BodyFacts, BodyError> {
        if !matches!(self.state, State::End | State::Over) {
            return Err(BodyError::Form("ends before its last boundary"));
        }
        self.facts.bytes = self.at;
        self.facts.choices = 1;
        self.facts.texts = 1;
        self.facts.seconds = recording::longest(&self.head);
        Ok(self.facts)
    }

    fn byte(&mut self, byte: u8) -> Result<(), BodyError> {
        const BROKEN: BodyError = BodyError::Form("has a broken boundary line");
        self.state = match (self.state, byte) {
            (State::Start, _) => match self.delimiter.get(self.matched) {
                Some(&expected) if expected == byte => {
                    self.matched += 1;
                    if self.matched == self.delimiter.len() { State::AfterDelimiter } else { State::Start }
                }
                _ => return Err(BodyError::Form("does not begin with its boundary")),
            },
            (State::AfterDelimiter, b'\r') => State::ExpectLf,
            (State::AfterDelimiter, b'-') => State::ExpectDash,
            (State::ExpectLf, b'\n') => {
                self.headers.clear();
                State::Headers
            }
            (State::ExpectDash, b'-') => State::End,
            (State::End, b'\r') => State::EndLf,
            (State::EndLf, b'\n') => State::Over,
            (State::End | State::Over, _) => return Err(BodyError::Form("goes on after its last boundary")),
            (State::Headers, _) => return self.header_byte(byte),
            (State::Body, _) => return self.body_byte(byte),
            _ => return Err(BROKEN),
        };
        Ok(())
    }

    fn header_byte(&mut self, byte: u8) -> Result<(), BodyError> {
        self.headers.push(byte);
        if self.headers.len() > MAX_HEADERS {
            return Err(BodyError::Form("has a part with headers that are too long"));
        }
        if self.headers.ends_with(b"\r\n\r\n") {
            self.begin_part()?;
        }
        Ok(())
    }

    fn begin_part(&mut self) -> Result<(), BodyError> {
        self.parts += 1;
        if self.parts > MAX_PARTS {
            return Err(BodyError::Form("has too many parts"));
        }
        let (name, file) = disposition(&self.headers).ok_or(BodyError::Form("has a part whose headers can't be read in one way only"))?;
        self.part = self.part_named(&name, file)?;
        (self.state, self.matched, self.value_start) = (State::Body, 0, self.at + 1);
        self.value.clear();
        Ok(())
    }

    fn part_named(&mut self, name: &str, file: bool) -> Result<Part, BodyError> {
        const GOVERN: [(&str, Part); 3] = [("model", Part::Model), ("stream", Part::Stream), ("file", Part::File)];
        let Some(&(right, part)) = GOVERN.iter().find(|(right, _)| right.eq_ignore_ascii_case(name)) else {
            return Ok(if file { Part::Blob } else { Part::Text });
        };
        if right != name || self.seen.contains(&right) {
            return Err(BodyError::Ambiguous(right));
        }
        if file != (part == Part::File) {
            return Err(BodyError::Field(right, if file { "a plain field" } else { "a file" }));
        }
        self.seen.push(right);
        Ok(part)
    }

    /// The delimiter begins with the only CR in it, so that a mismatch can begin anew only with this very byte.
    fn body_byte(&mut self, byte: u8) -> Result<(), BodyError> {
        if self.delimiter.get(self.matched) == Some(&byte) {
            self.matched += 1;
            if self.matched == self.delimiter.len() {
                self.end_part()?;
                (self.state, self.matched) = (State::AfterDelimiter, 0);
            }
            return Ok(());
        }
        let begun = self.delimiter.get(..self.matched).unwrap_or_default().to_vec();
        self.data(&begun)?;
        self.matched = usize::from(byte == b'\r');
        if self.matched == 0 { self.data(&[byte]) } else { Ok(()) }
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), BodyError> {
        match self.part {
            Part::File => self.head.take(bytes),
            Part::Blob => {}
            Part::Model | Part::Stream => {
                if self.value.len() + bytes.len() > MAX_VALUE {
                    let name = if self.part == Part::Model { "model" } else { "stream" };
                    return Err(BodyError::Field(name, "at most 256 bytes"));
                }
                self.value.extend_from_slice(bytes);
            }
            // An id is no longer than that; what is longer is none.
            Part::Text => self.value.extend(bytes.iter().take((MAX_VALUE + 1).saturating_sub(self.value.len()))),
        }
        Ok(())
    }

    fn end_part(&mut self) -> Result<(), BodyError> {
        let value = std::str::from_utf8(&self.value);
        match self.part {
            Part::Model => {
                let model = value.map_err(|_| BodyError::Field("model", "UTF-8"))?;
                let span = Span { start: self.value_start, end: self.value_start + model.len() as u64 };
                self.facts.plain_model(model.to_owned(), span);
            }
            Part::Stream => {
                self.facts.stream = match value {
                    Ok("true" | "True" | "1") => true,
                    Ok("false" | "False" | "0" | "") => false,
                    _ => return Err(BodyError::Field("stream", "true or false")),
                };
            }
            Part::Text => {
                if let Some(id) = value.ok().filter(|text| looks_like_object(text))
                    && !self.facts.refs.iter().any(|known| known == id)
                {
                    if self.facts.refs.len() >= MAX_REFS {
                        return Err(BodyError::TooManyReferences);
                    }
                    self.facts.refs.push(id.to_owned());
                }
            }
            Part::File | Part::Blob => {}
        }
        Ok(())
    }
}

/// The name in a part's headers, and whether it is a file.
fn disposition(headers: &[u8]) -> Option<(String, bool)> {
    let text = std::str::from_utf8(headers.strip_suffix(b"\r\n\r\n")?).ok()?;
    let mut found = None;
    for line in text.split("\r\n") {
        let (name, value) = line.split_once(':')?;
        // A line that begins with a space would go on with the one before; a bare CR or LF is a line end to some.
        if name.is_empty() || name.contains([' ', '\t']) || line.contains(['\r', '\n', '\0']) {
            return None;
        }
        if name.eq_ignore_ascii_case("content-disposition") {
            if found.is_some() {
                return None;
            }
            found = Some(parameters(value.trim())?);
        } else if name.eq_ignore_ascii_case("content-transfer-encoding") {
            return None;
        }
    }
    found
}

/// `form-data; name="model"; filename="a.wav"`: quoted or bare values without escapes, each name once.
fn parameters(value: &str) -> Option<(String, bool)> {
    let (mut name, mut file) = (None, false);
    let mut rest = value.strip_prefix("form-data")?.trim_start();
    while let Some(parameter) = rest.strip_prefix(';') {
        let (key, tail) = parameter.trim_start().split_once('=')?;
        let value;
        (value, rest) = match tail.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => tail.split_at(tail.find([';', ' ', '\t']).unwrap_or(tail.len())),
        };
        rest = rest.trim_start();
        match key {
            "name" if name.is_none() && !value.contains('\\') => name = Some(value.to_owned()),
            "filename" if !file && !value.contains('\\') => file = true,
            // A second spelling of the file's name: there is one in plain as well, or the part is none that governs.
            "filename*" => file = true,
            _ => return None,
        }
    }
    rest.is_empty().then_some((name?, file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read(text: &[u8], cuts: &[usize]) -> Result<BodyFacts, BodyError> {
        let mut reader = MultipartReader::new("XX");
        let mut from = 0;
        for &cut in cuts.iter().chain([&text.len()]) {
            reader.feed(&text[from..cut])?;
            from = cut;
        }
        assert_eq!(reader.position(), text.len() as u64);
        reader.finish()
    }

    fn field(name: &str, value: &str) -> String {
        format!("--XX\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    }

    fn form(parts: &[String]) -> String {
        format!("{}--XX--\r\n", parts.concat())
    }

    const FILE: &str =
        "--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav\r\n\r\n\r\n--X\r\r\n--XY\r\n";

    #[test]
    fn reads_what_governs_at_every_split() {
        let text = form(&[field("model", "whisper-1"), FILE.to_owned(), field("stream", "true"), field("prompt", "file-Ab12cd34")]);
        for cut in 0..=text.len() {
            let facts = read(text.as_bytes(), &[cut]).unwrap();
            assert_eq!((facts.model.as_deref(), facts.stream, facts.bytes), (Some("whisper-1"), true, text.len() as u64), "cut at {cut}");
            assert_eq!(facts.refs, ["file-Ab12cd34"]);
        }
        let without_line_end = text.trim_end();
        assert!(read(without_line_end.as_bytes(), &[]).is_ok());
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        let model = field("model", "m");
        let raw = |headers: &str| form(&[format!("--XX\r\n{headers}\r\n\r\nv\r\n")]);
        for (why, bad) in [
            ("twice", form(&[model.clone(), model.clone()])),
            ("another case", form(&[field("Model", "m")])),
            ("too long", form(&[field("model", &"m".repeat(257))])),
            ("a file", raw("content-disposition: form-data; name=\"model\"; filename=\"m\"")),
            ("not a file", form(&[field("file", "x")])),
            ("a preamble", format!("hello\r\n{}", form(std::slice::from_ref(&model)))),
            ("an epilogue", format!("{}x", form(std::slice::from_ref(&model)))),
            ("no end", model.clone()),
            ("bare line feeds", form(std::slice::from_ref(&model)).replace("\r\n", "\n")),
            ("two names", raw("content-disposition: form-data; name=\"a\"; name=\"model\"")),
            ("two dispositions", raw("content-disposition: form-data; name=\"a\"\r\ncontent-disposition: form-data; name=\"model\"")),
            ("no name", raw("content-disposition: form-data")),
            ("an escape", raw("content-disposition: form-data; name=\"mod\\\"el\"")),
            ("another encoding of the name", raw("content-disposition: form-data; name*=utf-8''model")),
            ("a folded line", raw("content-disposition: form-data;\r\n name=\"model\"")),
            ("an encoding", raw("content-disposition: form-data; name=\"a\"\r\ncontent-transfer-encoding: base64")),
            ("no flag", form(&[field("stream", "perhaps")])),
            ("many parts", form(&vec![field("a", "b"); MAX_PARTS + 1])),
            ("long headers", raw(&format!("content-disposition: form-data; name=\"{}\"", "n".repeat(MAX_HEADERS)))),
            ("nothing", String::new()),
        ] {
            assert!(read(bad.as_bytes(), &[]).is_err(), "{why}: {bad}");
        }
    }

    #[test]
    fn the_boundary_comes_from_the_content_type() {
        let of = |text: &str| boundary(text.as_bytes());
        assert_eq!(of("multipart/form-data; boundary=abc"), Some("abc".to_owned()));
        assert_eq!(of("Multipart/Form-Data; charset=x; Boundary=\"a=b\""), Some("a=b".to_owned()));
        for bad in [
            "application/json",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=a; boundary=b",
            "multipart/form-data; boundary=\"a b\"",
            "multipart/mixed; boundary=a",
        ] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }

    proptest! {
        /// Whatever a file holds, it is only its own part, wherever the pieces are cut.
        #[test]
        fn a_file_hides_nothing_and_adds_nothing(
            file in proptest::collection::vec(proptest::sample::select(&b"\r\n-XxY"[..]), 0..60), cuts in proptest::collection::vec(0usize..400, 0..6),
        ) {
            let mut text = field("model", "m").into_bytes();
            text.extend_from_slice(b"--XX\r\ncontent-disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n");
            text.extend_from_slice(&file);
            text.extend_from_slice(b"\r\n--XX--");
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut <= text.len()).collect();
            cuts.sort_unstable();
            let holds_delimiter = [b"\r\n".as_slice(), &file].concat().windows(6).any(|w| w == b"\r\n--XX");
            let whole = read(&text, &[]);
            prop_assert_eq!(&read(&text, &cuts), &whole);
            match whole {
                Ok(facts) => prop_assert_eq!(facts.model.as_deref(), Some("m")),
                Err(_) => prop_assert!(holds_delimiter),
            }
        }
    }
}
