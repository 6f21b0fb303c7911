//! Counts usage in an answer as it passes, and takes out the one chunk that the caller did not ask for.

use crate::usage::{AnswerReader, Document, Looks, MAX_IDS, Usage, UsageReader};

/// Largest event that is held back to be looked at whole; the chunk that may be withheld is far smaller.
const MAX_HELD: usize = 64 * 1024;

/// What became of a piece of the answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Passed {
    /// Send it on as it came.
    AsIs,
    /// Send this in its place.
    Instead(Vec<u8>),
}

/// What an answer told, once it ended or was cut.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Measured {
    /// Usage, when the provider told it.
    pub usage: Option<Usage>,
    /// The input side alone, when at least that was told.
    pub input: Option<Usage>,
    pub visible_bytes: u64,
    /// `usage` is the provider's last word, even if the stream went on.
    pub is_final: bool,
    /// The stream carried an error event.
    pub error: bool,
    /// Objects that the provider made and named.
    pub ids: Vec<String>,
}

/// Follows one answer. Memory is bounded by [`MAX_HELD`].
#[derive(Debug)]
pub enum Meter {
    /// Nothing in it can be read (an encoding we did not ask for, or not JSON).
    Opaque {
        bytes: u64,
    },
    Json(Box<AnswerReader>),
    Sse(Box<SseMeter>),
}

impl Meter {
    /// Chooses by the answer's headers. `withhold`: the usage chunk is there only because the gate asked for it.
    pub fn new(content_type: &[u8], encoded: bool, withhold: bool, looks: Looks) -> Self {
        let kind = content_type.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
        if encoded {
            Meter::Opaque { bytes: 0 }
        } else if kind.eq_ignore_ascii_case(b"text/event-stream") {
            Meter::Sse(Box::new(SseMeter::new(withhold, looks)))
        } else if kind.eq_ignore_ascii_case(b"application/json") {
            Meter::Json(Box::new(AnswerReader::new(UsageReader::new(looks))))
        } else {
            Meter::Opaque { bytes: 0 }
        }
    }

    /// Whether pieces may come out changed, so that the answer's announced length can't stand.
    pub fn rewrites(&self) -> bool {
        matches!(self, Meter::Sse(sse) if sse.withhold)
    }

    /// Bytes that are held back now.
    pub fn held(&self) -> usize {
        if let Meter::Sse(sse) = self { sse.held.len() } else { 0 }
    }

    /// Takes a piece. At most `room` bytes may be held back after it; what does not fit passes unlooked at.
    pub fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        match self {
            Meter::Opaque { bytes } => {
                *bytes += piece.len() as u64;
                Passed::AsIs
            }
            Meter::Json(reader) => {
                reader.feed(piece);
                Passed::AsIs
            }
            Meter::Sse(sse) => sse.piece(piece, end, room),
        }
    }

    pub fn finish(self) -> Measured {
        let (reader, error, ids) = match self {
            Meter::Opaque { bytes } => return Measured { visible_bytes: bytes, ..Measured::default() },
            Meter::Json(reader) => {
                let (reader, document) = reader.finish();
                (reader, document.error, document.ids)
            }
            Meter::Sse(sse) => (sse.so_far, sse.error, sse.ids),
        };
        Measured {
            usage: reader.usage(),
            input: reader.input(),
            visible_bytes: reader.visible_bytes,
            is_final: reader.is_final,
            error,
            ids,
        }
    }
}

/// Frames server-sent events byte by byte (WHATWG HTML, 9.2.6: lines end in LF, CRLF or CR) and reads the data of each.
#[derive(Debug)]
pub struct SseMeter {
    so_far: UsageReader,
    data: Option<AnswerReader>,
    line: Line,
    after_cr: bool,
    withhold: bool,
    /// Bytes of the event in hand, while they may have to be withheld.
    held: Vec<u8>,
    /// The event in hand is too large to be the one that is withheld: it passes.
    passing: bool,
    error: bool,
    ids: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// So many bytes of `data:` matched from the line's start.
    Field(usize),
    Data,
    Other,
}

const DATA: &[u8] = b"data:";

impl SseMeter {
    fn new(withhold: bool, looks: Looks) -> Self {
        SseMeter {
            so_far: UsageReader::new(looks),
            data: None,
            line: Line::Field(0),
            after_cr: false,
            withhold,
            held: Vec::new(),
            passing: false,
            error: false,
            ids: Vec::new(),
        }
    }

    fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        if !self.withhold {
            let mut rest = piece;
            while !rest.is_empty() {
                let (taken, _) = self.step(rest);
                rest = rest.get(taken..).unwrap_or_default();
            }
            return Passed::AsIs;
        }
        let mut out = Vec::with_capacity(self.held.len() + piece.len());
        let mut rest = piece;
        while !rest.is_empty() {
            let (taken, event) = self.step(rest);
            let (now, later) = rest.split_at_checked(taken).unwrap_or((rest, &[]));
            self.hold(now, &mut out, room.min(MAX_HELD));
            if let Some(document) = event {
                self.release(document, &mut out);
            }
            rest = later;
        }
        if end {
            out.append(&mut self.held);
        }
        if out == piece { Passed::AsIs } else { Passed::Instead(out) }
    }

    fn hold(&mut self, bytes: &[u8], out: &mut Vec<u8>, room: usize) {
        if self.passing || self.held.len() + bytes.len() > room {
            self.passing = true;
            out.append(&mut self.held);
            out.extend_from_slice(bytes);
        } else {
            self.held.extend_from_slice(bytes);
        }
    }

    fn release(&mut self, document: Document, out: &mut Vec<u8>) {
        if document.usage && document.no_choices && !self.passing {
            self.held.clear();
        }
        out.append(&mut self.held);
        self.passing = false;
    }

    /// Takes at least one byte; tells how many, and what an event that ended with them was.
    fn step(&mut self, rest: &[u8]) -> (usize, Option<Document>) {
        let Some(&byte) = rest.first() else { return (0, None) };
        if std::mem::take(&mut self.after_cr) && byte == b'\n' {
            return (1, None);
        }
        if matches!(byte, b'\n' | b'\r') {
            self.after_cr = byte == b'\r';
            return (1, self.end_of_line());
        }
        match self.line {
            Line::Field(n) if DATA.get(n) == Some(&byte) => {
                self.line = if n + 1 == DATA.len() { self.begin_data() } else { Line::Field(n + 1) };
                (1, None)
            }
            Line::Field(_) => {
                self.line = Line::Other;
                (1, None)
            }
            Line::Data | Line::Other => {
                let run = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                if let (Line::Data, Some(data)) = (self.line, &mut self.data) {
                    data.feed(rest.get(..run).unwrap_or_default());
                }
                (run, None)
            }
        }
    }

    fn begin_data(&mut self) -> Line {
        match &mut self.data {
            // Several data lines of one event are joined by a line feed.
            Some(data) => data.feed(b"\n"),
            None => self.data = Some(AnswerReader::new(self.so_far)),
        }
        Line::Data
    }

    fn end_of_line(&mut self) -> Option<Document> {
        let blank = std::mem::replace(&mut self.line, Line::Field(0)) == Line::Field(0);
        if !blank {
            return None;
        }
        let Some(data) = self.data.take() else { return Some(Document::default()) };
        let (so_far, mut document) = data.finish();
        self.so_far = so_far;
        self.error |= document.error;
        for id in std::mem::take(&mut document.ids) {
            // The events of one answer name it again and again.
            if self.ids.len() < MAX_IDS && !self.ids.contains(&id) {
                self.ids.push(id);
            }
        }
        Some(document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Tells;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const CHAT_LOOKS: Looks = Looks { tells: Tells::Completion, ids: false };

    const CHAT: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}],\"usage\":null}\n\n",
        ": ping\n\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"h\u{e9}llo\"}}],\"usage\":null}\n\n",
        "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n",
        "data: [DONE]\n\n",
    );

    fn run(stream: &str, withhold: bool, cuts: &[usize]) -> (String, Measured) {
        let mut meter = Meter::new(b"text/event-stream; charset=utf-8", false, withhold, CHAT_LOOKS);
        let bytes = stream.as_bytes();
        let mut out = Vec::new();
        let mut from = 0;
        for (i, &cut) in cuts.iter().chain([&bytes.len()]).enumerate() {
            let piece = &bytes[from..cut];
            match meter.piece(piece, i == cuts.len(), MAX_HELD) {
                Passed::AsIs => out.extend_from_slice(piece),
                Passed::Instead(other) => out.extend(other),
            }
            from = cut;
        }
        (String::from_utf8(out).unwrap(), meter.finish())
    }

    #[test]
    fn the_usage_chunk_is_withheld_at_every_split() {
        for line_end in ["\n", "\r\n", "\r"] {
            let stream = CHAT.replace('\n', line_end);
            let (expected, usage) = run(&stream, true, &[]);
            assert!(!expected.contains("prompt_tokens") && expected.contains("[DONE]") && expected.contains("h\u{e9}llo"));
            assert_eq!(usage.usage, Some(Usage { input: 7, cache_read: 2, output: 4, ..Usage::default() }));
            assert_eq!(usage.visible_bytes, 6);
            for cut in 0..=stream.len() {
                let (out, measured) = run(&stream, true, &[cut]);
                assert_eq!(out.replace(['\r', '\n'], ""), expected.replace(['\r', '\n'], ""), "cut at {cut}");
                assert_eq!(measured, usage, "cut at {cut}");
                assert_eq!(run(&stream, false, &[cut]), (stream.clone(), usage.clone()), "cut at {cut}");
            }
        }
    }

    #[test]
    fn complete_events_are_never_held() {
        let mut meter = Meter::new(b"text/event-stream", false, true, CHAT_LOOKS);
        let first = b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
        assert_eq!(meter.piece(first, false, MAX_HELD), Passed::AsIs);
        let mut both = first.to_vec();
        both.extend_from_slice(b"data: {\"cho");
        assert_eq!(meter.piece(&both, false, MAX_HELD), Passed::Instead(first.to_vec()), "only the event in hand waits");
    }

    #[test]
    fn a_huge_event_passes_in_bounded_memory() {
        let mut meter = Meter::new(b"text/event-stream", false, true, CHAT_LOOKS);
        let mut out = 0;
        out += match meter.piece(b"data: \"", false, MAX_HELD) {
            Passed::AsIs => 7,
            Passed::Instead(bytes) => bytes.len(),
        };
        for _ in 0..1000 {
            let piece = [b'x'; 1000];
            out += match meter.piece(&piece, false, MAX_HELD) {
                Passed::AsIs => piece.len(),
                Passed::Instead(bytes) => bytes.len(),
            };
            let Meter::Sse(sse) = &meter else { unreachable!() };
            assert!(sse.held.len() <= MAX_HELD);
        }
        assert_eq!(out, 1_000_007);
    }

    #[test]
    fn without_room_nothing_is_held() {
        let mut meter = Meter::new(b"text/event-stream", false, true, CHAT_LOOKS);
        assert_eq!(meter.piece(b"data: {\"choi", false, 4), Passed::AsIs);
        assert_eq!(meter.held(), 0);
        assert_eq!(meter.piece(b"ces\":[]}\n\n", false, 4), Passed::AsIs);
    }

    #[test]
    fn what_cannot_be_read_is_counted_in_bytes() {
        let mut meter = Meter::new(b"application/json", true, false, CHAT_LOOKS);
        meter.piece(b"\x1f\x8b123", true, MAX_HELD);
        assert_eq!(meter.finish(), Measured { visible_bytes: 5, ..Measured::default() });
    }

    proptest! {
        #[test]
        fn any_bytes_any_split_pass_unchanged_without_a_usage_chunk(bytes in proptest::collection::vec(proptest::sample::select(&b"data: \r\n{}[]\"x:,"[..]), 0..80), cut in 0usize..80) {
            let cut = cut.min(bytes.len());
            for withhold in [false, true] {
                let mut meter = Meter::new(b"text/event-stream", false, withhold, CHAT_LOOKS);
                let mut out = Vec::new();
                for (piece, end) in [(&bytes[..cut], false), (&bytes[cut..], true)] {
                    match meter.piece(piece, end, MAX_HELD) {
                        Passed::AsIs => out.extend_from_slice(piece),
                        Passed::Instead(other) => out.extend(other),
                    }
                }
                prop_assert_eq!(&out, &bytes);
            }
        }
    }
}
