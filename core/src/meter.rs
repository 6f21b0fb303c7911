//! Counts usage in an answer as it passes, and takes out the one chunk that the caller did not ask for.

use crate::usage::{AnswerReader, Document, Looks, MAX_IDS, Usage, UsageReader};

/// Largest event that is held back to be looked at whole; the chunk that may be withheld is far smaller.
const MAX_HELD: usize = 64 * 1024;

/// Bytes of text that a token stands for at most, over more than a few of them, and how much text that may not be true of.
const MAX_TOKEN_BYTES: u64 = 16;
const TEXT_SLACK: u64 = 4_096;

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
    /// Output tokens that a stream has told of so far.
    pub running_output: u64,
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

    /// Whether words of ours can be put between two events.
    pub fn has_events(&self) -> bool {
        matches!(self, Meter::Sse(_))
    }

    /// Takes a piece of an answer that is broken off. At the first place between two events `words` take the place of what
    /// follows, and are gone from here; from then on nothing passes. What is not shown is read all the same: it was made.
    pub fn last_piece(&mut self, piece: &[u8], words: &mut Option<Vec<u8>>) -> Passed {
        match self {
            Meter::Sse(sse) => sse.last_piece(piece, words),
            other => other.piece(piece, false, 0),
        }
    }

    /// Whether more came than `limit` output tokens can be: by what the stream itself says as it goes, or by its text.
    pub fn exceeds(&self, limit: u64) -> bool {
        let Meter::Sse(sse) = self else { return false };
        let text = if sse.so_far.more_than_text { 0 } else { sse.so_far.visible_bytes };
        sse.running_output > limit || text > limit.saturating_mul(MAX_TOKEN_BYTES).saturating_add(TEXT_SLACK)
    }

    pub fn finish(self) -> Measured {
        let running_output = if let Meter::Sse(sse) = &self { sse.running_output } else { 0 };
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
            running_output,
            is_final: reader.is_final,
            error,
            ids,
        }
    }
}

/// Frames server-sent events (WHATWG HTML, 9.2.6: lines end in LF, CRLF or CR) and reads the data of each.
#[derive(Debug)]
pub struct SseMeter {
    /// What the events told that have ended.
    so_far: UsageReader,
    data: AnswerReader,
    /// The event in hand has a data line.
    has_data: bool,
    line: Line,
    after_cr: bool,
    withhold: bool,
    /// Bytes of the event in hand, while they may have to be withheld.
    held: Vec<u8>,
    /// The event in hand is too large to be the one that is withheld: it passes.
    passing: bool,
    /// A byte of the event in hand has been read.
    begun: bool,
    /// What passed last ended in CR: a LF would still be part of that line's end.
    passed_cr: bool,
    /// Output tokens that the stream told before its last word.
    running_output: u64,
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

const DATA: &[u8; 5] = b"data:";

impl SseMeter {
    fn new(withhold: bool, looks: Looks) -> Self {
        SseMeter {
            so_far: UsageReader::new(looks),
            data: AnswerReader::new(UsageReader::new(looks)),
            has_data: false,
            line: Line::Field(0),
            after_cr: false,
            withhold,
            held: Vec::new(),
            passing: false,
            begun: false,
            passed_cr: false,
            running_output: 0,
            error: false,
            ids: Vec::new(),
        }
    }

    fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        let passed = self.pass(piece, end, room);
        let last = match &passed {
            Passed::AsIs => piece.last(),
            Passed::Instead(other) => other.last(),
        };
        self.passed_cr = last.map_or(self.passed_cr, |last| *last == b'\r');
        passed
    }

    fn last_piece(&mut self, piece: &[u8], words: &mut Option<Vec<u8>>) -> Passed {
        // Some of the event in hand has been shown: it has to be finished first.
        let shown = self.begun && (!self.withhold || self.passing);
        let mut finished = 0;
        if words.is_some() && shown {
            let (taken, document) = self.event(piece);
            if document.is_none() {
                self.passed_cr = piece.last().map_or(self.passed_cr, |last| *last == b'\r');
                return Passed::AsIs;
            }
            finished = taken;
        }
        let (finished, dropped) = piece.split_at_checked(finished).unwrap_or((piece, &[]));
        let mut rest = dropped;
        while let (taken, Some(_)) = self.event(rest) {
            rest = rest.get(taken..).unwrap_or_default();
        }
        self.held = Vec::new();
        let Some(words) = words.take() else { return Passed::Instead(Vec::new()) };
        let mut out = finished.to_vec();
        if out.last().map_or(self.passed_cr, |last| *last == b'\r') {
            out.push(b'\n');
        }
        out.extend_from_slice(&words);
        Passed::Instead(out)
    }

    /// What of a piece goes on.
    fn pass(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        let slice = |from: usize, to: usize| piece.get(from..to).unwrap_or_default();
        let room = room.min(MAX_HELD);
        // What goes on: `out`, then the piece from `copied` on; the event in hand, from `begun` on, may stay behind.
        let (mut out, mut copied, mut begun) = (Vec::new(), 0, 0);
        while let (taken, Some(document)) = self.event(slice(begun, piece.len())) {
            let ended = begun + taken;
            self.passing |= self.held.len() + taken > room;
            if self.withhold && document.usage && document.no_choices && !self.passing {
                self.held.clear();
                out.extend_from_slice(slice(copied, begun));
                copied = ended;
            }
            out.append(&mut self.held);
            self.passing = false;
            begun = ended;
        }
        let in_hand = slice(begun, piece.len());
        self.passing |= !in_hand.is_empty() && self.held.len() + in_hand.len() > room;
        if self.withhold && !self.passing && !end && !in_hand.is_empty() {
            out.extend_from_slice(slice(copied, begun));
            self.held.extend_from_slice(in_hand);
        } else if (self.passing || end) && !self.held.is_empty() {
            // No event has ended in this piece.
            out.append(&mut self.held);
            out.extend_from_slice(piece);
        } else if out.is_empty() && copied == 0 {
            return Passed::AsIs;
        } else {
            out.extend_from_slice(slice(copied, piece.len()));
        }
        if out == piece { Passed::AsIs } else { Passed::Instead(out) }
    }

    /// Reads on to the end of the event in hand. Gives how many bytes it took, and what the event was if it ended with them.
    fn event(&mut self, piece: &[u8]) -> (usize, Option<Document>) {
        let mut rest = piece;
        while let Some((&byte, tail)) = rest.split_first() {
            let after_cr = std::mem::take(&mut self.after_cr);
            rest = match byte {
                b'\n' if after_cr => tail,
                b'\n' | b'\r' => {
                    self.after_cr = byte == b'\r';
                    if let Some(document) = self.end_of_line() {
                        self.begun = false;
                        return (piece.len() - tail.len(), Some(document));
                    }
                    tail
                }
                _ => {
                    self.begun = true;
                    rest.get(self.in_line(byte, rest)..).unwrap_or_default()
                }
            };
        }
        (piece.len(), None)
    }

    /// Takes at least one byte of a line, and none of its end; tells how many.
    fn in_line(&mut self, byte: u8, rest: &[u8]) -> usize {
        match self.line {
            Line::Field(0) if rest.starts_with(DATA) => {
                self.line = self.begin_data();
                DATA.len()
            }
            Line::Field(n) if DATA.get(n) == Some(&byte) => {
                self.line = if n + 1 == DATA.len() { self.begin_data() } else { Line::Field(n + 1) };
                1
            }
            Line::Field(_) => {
                self.line = Line::Other;
                1
            }
            Line::Data | Line::Other => {
                let run = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
                if self.line == Line::Data {
                    self.data.feed(rest.get(..run).unwrap_or_default());
                }
                run
            }
        }
    }

    fn begin_data(&mut self) -> Line {
        if std::mem::replace(&mut self.has_data, true) {
            // Several data lines of one event are joined by a line feed.
            self.data.feed(b"\n");
        }
        Line::Data
    }

    fn end_of_line(&mut self) -> Option<Document> {
        let blank = std::mem::replace(&mut self.line, Line::Field(0)) == Line::Field(0);
        if !blank {
            return None;
        }
        if !std::mem::take(&mut self.has_data) {
            return Some(Document::default());
        }
        let mut document = self.data.end_document();
        self.so_far = self.data.so_far();
        // Usage alone is the last that is said: then everything has come already.
        if document.usage && !document.no_choices {
            self.running_output = self.so_far.output_so_far();
        }
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

    /// What a reader makes of a stream, as the standard says: the data of each event that has some, and what came of one that did
    /// not end.
    fn read_events(stream: &str) -> Vec<String> {
        let (mut events, mut data) = (Vec::new(), Vec::new());
        for line in stream.replace("\r\n", "\n").replace('\r', "\n").split('\n') {
            if line.is_empty() && !data.is_empty() {
                events.push(std::mem::take(&mut data).join("\n"));
            } else if let Some(rest) = line.strip_prefix("data:") {
                data.push(rest.strip_prefix(' ').unwrap_or(rest).to_owned());
            }
        }
        events
    }

    const WORDS: &str = "event: error\ndata: {\"error\":\"ended\"}\n\n";

    /// Runs a stream in pieces and breaks it off before one of them: what came out, and whether the words are in it.
    fn run_broken(stream: &str, withhold: bool, cuts: &[usize], at: usize, room: usize) -> (String, bool) {
        let mut meter = Meter::new(b"text/event-stream", false, withhold, CHAT_LOOKS);
        let (mut out, mut from, mut words) = (Vec::new(), 0, Some(WORDS.as_bytes().to_vec()));
        for (i, &cut) in cuts.iter().chain([&stream.len()]).enumerate() {
            let piece = &stream.as_bytes()[from..cut];
            from = cut;
            let passed = if i < at { meter.piece(piece, false, room) } else { meter.last_piece(piece, &mut words) };
            match passed {
                Passed::AsIs => out.extend_from_slice(piece),
                Passed::Instead(other) => out.extend(other),
            }
        }
        (String::from_utf8(out).unwrap(), words.is_none())
    }

    #[test]
    fn a_stream_is_broken_off_between_two_events_at_every_split() {
        for line_end in ["\n", "\r\n", "\r"] {
            let stream = CHAT.replace('\n', line_end);
            let whole = [read_events(&run(&stream, true, &[]).0), read_events(&stream)];
            for (withhold, whole) in [(true, &whole[0]), (false, &whole[1])] {
                for cut in 0..stream.len() {
                    let (out, said) = run_broken(&stream, withhold, &[cut], 1, MAX_HELD);
                    assert!(said, "there is a place in what follows: cut at {cut}");
                    let events = read_events(&out);
                    let (last, before) = events.split_last().unwrap();
                    assert_eq!(last, "{\"error\":\"ended\"}", "cut at {cut}: {out:?}");
                    assert!(whole.starts_with(before), "cut at {cut}: {out:?}");
                    let shown = out.strip_suffix(WORDS).unwrap();
                    assert!(
                        shown.is_empty() || line_end != "\r\n" || shown.ends_with("\r\n\r\n"),
                        "for readers that know one line end only"
                    );
                    assert!(!shown.contains("event: error"));
                }
            }
        }
    }

    #[test]
    fn what_is_not_shown_is_counted_all_the_same() {
        let mut meter = Meter::new(b"text/event-stream", false, true, CHAT_LOOKS);
        let mut words = Some(WORDS.as_bytes().to_vec());
        assert_eq!(meter.last_piece(CHAT.as_bytes(), &mut words), Passed::Instead(WORDS.as_bytes().to_vec()));
        assert_eq!(meter.last_piece(b"data: {}\n\n", &mut words), Passed::Instead(Vec::new()));
        let measured = meter.finish();
        assert_eq!((measured.visible_bytes, measured.usage.map(|usage| usage.output)), (6, Some(4)));
    }

    #[test]
    fn more_than_the_hold_shows_as_it_comes() {
        let sse = || Meter::new(b"text/event-stream", false, false, CHAT_LOOKS);
        let mut meter = sse();
        meter.piece(
            b"data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":9}}\n\n",
            false,
            0,
        );
        assert_eq!((meter.exceeds(8), meter.exceeds(9)), (true, false), "usage told on the way");
        let mut meter = sse();
        meter.piece(b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":9}}\n\n", false, 0);
        assert!(!meter.exceeds(8), "the last word: all has come by then");
        let text = |name: &str| format!("data: {{\"choices\":[{{\"delta\":{{{name}:\"{}\"}}}}]}}\n\n", "x".repeat(5_000));
        let mut meter = sse();
        meter.piece(text("\"content\"").as_bytes(), false, 0);
        assert_eq!((meter.exceeds(56), meter.exceeds(57)), (true, false), "4,096 bytes and 16 for each token");
        let mut meter = sse();
        meter.piece(text("\"audio\":{\"data\"").replace("\"}}]", "\"}}}]").as_bytes(), false, 0);
        assert!(!meter.exceeds(1), "sound is no text");
        let mut meter = Meter::new(b"application/json", false, false, CHAT_LOOKS);
        meter.piece(text("\"content\"").as_bytes(), false, 0);
        assert!(!meter.exceeds(1), "a document has been made when it comes");
    }

    /// Parts of streams, so that random ones have events, comments, junk and every kind of line end.
    const PARTS: [&str; 16] = [
        "data: ",
        "data:",
        "\n",
        "\r\n",
        "\r",
        "\n\n",
        "\r\n\r\n",
        ": ping",
        "event: x",
        "id",
        "[DONE]",
        "{\"choices\":[{\"delta\":{\"content\":\"h\u{e9}\"}}]}",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4}}\n\n",
        "data: {\"error\":{}}\r\r",
        "data: {\"choices\":[],\ndata: \"usage\":{\"prompt_tokens\":5}}\n\n",
        "data: {\"choices\":[\n\n",
    ];

    proptest! {
        /// What comes out, and what was counted, does not depend on where a stream is cut; byte by byte is the plainest way.
        #[test]
        fn any_stream_any_split_comes_out_the_same(parts in proptest::collection::vec(proptest::sample::select(&PARTS[..]), 0..20), cuts in proptest::collection::vec(0usize..400, 0..4), withhold: bool) {
            let stream = parts.concat();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.sort_unstable();
            let slowly = run(&stream, withhold, &(1..stream.len()).collect::<Vec<_>>());
            prop_assert_eq!(&run(&stream, withhold, &[]), &slowly);
            prop_assert_eq!(&run(&stream, withhold, &cuts), &slowly);
        }

        /// Wherever a stream is broken off: what had been shown stays, the words come once, as an event of their own, and nothing after.
        #[test]
        fn any_stream_is_broken_off_whole(parts in proptest::collection::vec(proptest::sample::select(&PARTS[..]), 0..20), cuts in proptest::collection::vec(0usize..400, 0..6), at in 0usize..7, withhold: bool, room in proptest::sample::select(vec![0, 8, MAX_HELD])) {
            let stream = parts.concat();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.sort_unstable();
            let mut whole = read_events(&run(&stream, withhold, &[]).0);
            let (out, said) = run_broken(&stream, withhold, &cuts, at, room);
            if withhold && room < MAX_HELD {
                // Without room to hold it the usage chunk may pass: then it is one of the events.
                whole = read_events(&stream);
                prop_assert!(!said || out.ends_with(WORDS));
                let mut left = whole.iter();
                let mut shown = read_events(&out);
                if said {
                    prop_assert_eq!(shown.pop().unwrap_or_default(), "{\"error\":\"ended\"}");
                }
                prop_assert!(shown.iter().all(|event| left.any(|other| other == event)), "{:?} of {:?}", shown, whole);
                return Ok(());
            }
            let events = read_events(&out);
            if said {
                prop_assert!(out.ends_with(WORDS));
                let (last, before) = events.split_last().unwrap();
                prop_assert_eq!(last, "{\"error\":\"ended\"}");
                prop_assert!(whole.starts_with(before), "{:?} of {:?}", before, whole);
            } else {
                prop_assert!(whole.starts_with(&events), "{:?} of {:?}", events, whole);
            }
        }

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
