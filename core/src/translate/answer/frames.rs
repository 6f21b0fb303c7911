//! Cuts a stream into its events by the rules of server-sent events (WHATWG HTML, section 9.2.6), wherever its bytes were cut.

/// Largest event that is read: what is kept of it, the line in hand included.
pub(super) const MAX_FRAME: usize = 4 << 20;
/// A buffer that an unusually large event has left behind is given back.
const KEPT_BUFFER: usize = 64 << 10;

/// One event of a stream.
pub(super) enum Frame<'a> {
    Data(&'a [u8]),
    /// Comments only: what servers send to keep a connection open.
    Comment,
    /// Larger than is read; what follows is not read either.
    TooLarge,
}

#[derive(Debug, Default)]
pub(super) struct Frames {
    /// The line in hand, as far as it has come.
    line: Vec<u8>,
    /// Data lines of the event in hand, one after the other.
    data: Vec<u8>,
    has_data: bool,
    has_comment: bool,
    /// The last line ended with a carriage return: a line feed that follows belongs to it.
    after_cr: bool,
    /// Past the first line, which may begin with a byte order mark.
    past_first: bool,
    is_over: bool,
}

impl Frames {
    /// Takes a piece and hands on the events that are whole with it. An answer of `false` ends the reading.
    pub fn piece(&mut self, mut piece: &[u8], mut frame: impl FnMut(Frame<'_>) -> bool) {
        while !self.is_over && !piece.is_empty() {
            if std::mem::take(&mut self.after_cr)
                && let Some(rest) = piece.strip_prefix(b"\n")
            {
                piece = rest;
                continue;
            }
            let end = memchr::memchr2(b'\n', b'\r', piece);
            let (head, rest) = piece.split_at_checked(end.unwrap_or(piece.len())).unwrap_or((piece, b""));
            if self.line.len() + self.data.len() + head.len() > MAX_FRAME {
                frame(Frame::TooLarge);
                self.stop();
                return;
            }
            let Some((ending, rest)) = rest.split_first() else {
                self.line.extend_from_slice(head);
                return;
            };
            (self.after_cr, piece) = (*ending == b'\r', rest);
            if self.line.is_empty() {
                self.line_of(head, &mut frame);
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(head);
                self.line_of(&line, &mut frame);
                line.clear();
                self.line = line;
                give_back(&mut self.line);
            }
        }
    }

    /// The stream is over. An event whose closing empty line was left out, as some servers do, is handed on if it is data.
    pub fn end(&mut self, mut frame: impl FnMut(Frame<'_>) -> bool) {
        if self.is_over {
            return;
        }
        let line = std::mem::take(&mut self.line);
        self.line_of(&line, &mut frame);
        if self.has_data {
            self.line_of(b"", &mut frame);
        }
        self.stop();
    }

    /// Bytes kept of the event in hand.
    pub fn held(&self) -> usize {
        self.line.len() + self.data.len()
    }

    pub fn stop(&mut self) {
        *self = Frames { is_over: true, ..Frames::default() };
    }

    fn line_of(&mut self, line: &[u8], frame: &mut impl FnMut(Frame<'_>) -> bool) {
        let line = if std::mem::replace(&mut self.past_first, true) { line } else { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line) };
        if line.is_empty() {
            return self.dispatch(frame);
        }
        if line.starts_with(b":") {
            self.has_comment = true;
            return;
        }
        // Names of events, ids and retry times tell nothing that the data does not tell.
        let value = match line.strip_prefix(b"data") {
            Some([]) => &[][..],
            Some([b':', b' ', value @ ..] | [b':', value @ ..]) => value,
            _ => return,
        };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
    }

    fn dispatch(&mut self, frame: &mut impl FnMut(Frame<'_>) -> bool) {
        let has_comment = std::mem::take(&mut self.has_comment);
        let goes_on = match std::mem::take(&mut self.has_data) {
            true => frame(Frame::Data(&self.data)),
            false if has_comment => frame(Frame::Comment),
            false => true,
        };
        self.data.clear();
        give_back(&mut self.data);
        if !goes_on {
            self.stop();
        }
    }
}

fn give_back(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT_BUFFER {
        *buffer = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let (mut frames, mut read) = (Frames::default(), Vec::new());
        let mut note = |frame: Frame<'_>| {
            read.push(match frame {
                Frame::Data(data) => String::from_utf8_lossy(data).into_owned(),
                Frame::Comment => "comment".to_owned(),
                Frame::TooLarge => "too large".to_owned(),
            });
            true
        };
        for piece in pieces {
            frames.piece(piece, &mut note);
        }
        frames.end(&mut note);
        read
    }

    /// Every line ending, a mark, comments, fields that are not data: the same events wherever the stream is cut.
    #[test]
    fn events_are_those_of_the_standard_wherever_the_stream_is_cut() {
        let stream = "\u{feff}data: a\r\n\r\n:hello\r\rdata:b\rdata:  c\r\revent: x\nid: 1\nretry: 5\ndatax: no\ndata\n\n: c\ndata: d\n\nevent: y\n\n\n\r\ndata: last";
        let expected = ["a", "comment", "b\n c", "", "d", "last"];
        assert_eq!(read([stream.as_bytes()]), expected);
        assert_eq!(read(stream.as_bytes().chunks(1)), expected);
        for cut in 0..stream.len() {
            let (head, tail) = stream.as_bytes().split_at(cut);
            assert_eq!(read([head, tail]), expected, "cut at {cut}");
        }
    }

    #[test]
    fn an_event_is_handed_on_with_its_last_byte() {
        let mut frames = Frames::default();
        let mut count = 0;
        for (byte, so_far) in "data: a\r\n\r\ndata: b\n\n".bytes().zip([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2]) {
            frames.piece(&[byte], |_| {
                count += 1;
                true
            });
            assert_eq!(count, so_far);
        }
        assert_eq!(frames.held(), 0);
    }

    #[test]
    fn too_large_an_event_ends_the_reading_wherever_it_is_cut() {
        let fits = format!("data: {}\n\n", "x".repeat(MAX_FRAME - 6));
        let large = format!("data: {}\n\ndata: more\n\n", "x".repeat(MAX_FRAME - 5));
        for size in [usize::MAX, 1 << 20, 1_000_003] {
            let chunks = |text: &'static str| text.as_bytes().chunks(size);
            assert_eq!(read(chunks(fits.clone().leak())).first().map(String::len), Some(MAX_FRAME - 6));
            assert_eq!(read(chunks(large.clone().leak())), ["too large"]);
        }
        let lines = "data: x\n".repeat(MAX_FRAME);
        assert_eq!(read([lines.as_bytes()]), ["too large"]);
    }
}
