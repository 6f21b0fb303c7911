//! Follows one HTTP/1.1 response to its end without keeping its body (RFC 9112).

use std::fmt;

/// A head longer than this is not read any further.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;

/// One response as its bytes come in.
#[derive(Debug)]
pub struct Response {
    state: State,
    status: Option<u16>,
    keep_alive: bool,
}

#[derive(Debug)]
enum State {
    /// The bytes of the head so far.
    Head(Vec<u8>),
    Sized {
        left: usize,
    },
    Chunked(Chunk),
    UntilClose,
    Done,
}

/// Where in a chunked body (RFC 9112, 7.1) the last byte left us.
#[derive(Clone, Copy, Debug)]
enum Chunk {
    Size { so_far: Option<usize>, in_extension: bool },
    Data { left: usize },
    DataEnd,
    Trailer { line_is_empty: bool },
}

#[derive(Debug, PartialEq)]
pub enum Malformed {
    Head,
    HeadTooLong,
    ContentLength,
    Chunk,
    BytesAfterEnd,
    Truncated,
}

impl Response {
    pub fn new() -> Self {
        Self { state: State::Head(Vec::new()), status: None, keep_alive: true }
    }

    /// Takes the next bytes of the connection; gives how many of them were body.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        let State::Head(seen) = &mut self.state else {
            return self.feed_body(bytes);
        };
        seen.extend_from_slice(bytes);
        let Some((head_length, head)) = Head::parse(seen)? else {
            return if seen.len() > MAX_HEAD_BYTES { Err(Malformed::HeadTooLong) } else { Ok(0) };
        };
        let rest = seen.split_off(head_length);
        if head.status < 200 {
            // An interim response (RFC 9110, 15.2): the real one follows.
            self.state = State::Head(Vec::new());
            return self.feed(&rest);
        }
        self.status = Some(head.status);
        self.keep_alive = head.keep_alive && !matches!(head.body, State::UntilClose);
        self.state = head.body;
        self.feed_body(&rest)
    }

    /// The server closed the connection: the end of the response, or a cut.
    pub fn feed_end(&mut self) -> Result<(), Malformed> {
        match self.state {
            State::UntilClose | State::Done => {
                self.state = State::Done;
                Ok(())
            }
            _ => Err(Malformed::Truncated),
        }
    }

    /// The status, once the head is complete.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Whether another request may follow on this connection.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    fn feed_body(&mut self, bytes: &[u8]) -> Result<usize, Malformed> {
        match &mut self.state {
            State::Sized { left } => {
                *left = left.checked_sub(bytes.len()).ok_or(Malformed::BytesAfterEnd)?;
                if *left == 0 {
                    self.state = State::Done;
                }
                Ok(bytes.len())
            }
            State::Chunked(_) => self.feed_chunked(bytes),
            State::UntilClose => Ok(bytes.len()),
            State::Done if bytes.is_empty() => Ok(0),
            State::Done => Err(Malformed::BytesAfterEnd),
            State::Head(_) => Err(Malformed::Head),
        }
    }

    fn feed_chunked(&mut self, mut bytes: &[u8]) -> Result<usize, Malformed> {
        let mut body = 0;
        while let (State::Chunked(chunk), Some((&first, rest))) = (&mut self.state, bytes.split_first()) {
            if let Chunk::Data { left } = *chunk {
                let taken = left.min(bytes.len());
                body += taken;
                bytes = &bytes[taken..];
                *chunk = if taken == left { Chunk::DataEnd } else { Chunk::Data { left: left - taken } };
                continue;
            }
            bytes = rest;
            match chunk.after(first)? {
                Some(next) => *chunk = next,
                None => self.state = State::Done,
            }
        }
        if self.is_done() && !bytes.is_empty() {
            return Err(Malformed::BytesAfterEnd);
        }
        Ok(body)
    }
}

impl Chunk {
    const START: Self = Self::Size { so_far: None, in_extension: false };

    /// Where a byte that is not data leads; `None` is the end of the body.
    fn after(self, byte: u8) -> Result<Option<Self>, Malformed> {
        let next = match (self, byte) {
            (Self::Size { so_far: None, .. }, b'\n') => return Err(Malformed::Chunk),
            (Self::Size { so_far: Some(0), .. }, b'\n') => Self::Trailer { line_is_empty: true },
            (Self::Size { so_far: Some(left), .. }, b'\n') => Self::Data { left },
            (Self::Size { so_far: Some(size), in_extension }, b'\r' | b';') => {
                Self::Size { so_far: Some(size), in_extension: in_extension || byte == b';' }
            }
            (size @ Self::Size { in_extension: true, .. }, _) => size,
            (Self::Size { so_far, in_extension: false }, _) => {
                let digit = char::from(byte).to_digit(16).ok_or(Malformed::Chunk)?;
                let digit = usize::try_from(digit).map_err(|_| Malformed::Chunk)?;
                let size = so_far.unwrap_or(0).checked_mul(16).and_then(|size| size.checked_add(digit));
                Self::Size { so_far: Some(size.ok_or(Malformed::Chunk)?), in_extension: false }
            }
            (Self::DataEnd, b'\r') => Self::DataEnd,
            (Self::DataEnd, b'\n') => Self::START,
            (Self::DataEnd | Self::Data { .. }, _) => return Err(Malformed::Chunk),
            (Self::Trailer { line_is_empty: true }, b'\n') => return Ok(None),
            (Self::Trailer { .. }, b'\n') => Self::Trailer { line_is_empty: true },
            (trailer @ Self::Trailer { .. }, b'\r') => trailer,
            (Self::Trailer { .. }, _) => Self::Trailer { line_is_empty: false },
        };
        Ok(Some(next))
    }
}

/// What a response head says about the rest.
struct Head {
    status: u16,
    keep_alive: bool,
    body: State,
}

impl Head {
    /// The head that `bytes` begin with and its length, if it is complete.
    fn parse(bytes: &[u8]) -> Result<Option<(usize, Self)>, Malformed> {
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(length) = response.parse(bytes).map_err(|_| Malformed::Head)? else {
            return Ok(None);
        };
        let status = response.code.ok_or(Malformed::Head)?;
        let mut keep_alive = response.version == Some(1);
        let mut chunked = false;
        let mut content_length = None;
        for header in response.headers.iter() {
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                chunked = header.value.to_ascii_lowercase().ends_with(b"chunked");
            } else if header.name.eq_ignore_ascii_case("content-length") {
                let digits = str::from_utf8(header.value).map_err(|_| Malformed::ContentLength)?;
                content_length = Some(digits.trim().parse().map_err(|_| Malformed::ContentLength)?);
            } else if header.name.eq_ignore_ascii_case("connection") {
                keep_alive &= !header.value.eq_ignore_ascii_case(b"close");
            }
        }
        let body = match (status, chunked, content_length) {
            (204 | 304, ..) | (_, false, Some(0)) => State::Done,
            (_, true, _) => State::Chunked(Chunk::START),
            (_, false, Some(left)) => State::Sized { left },
            (_, false, None) => State::UntilClose,
        };
        Ok(Some((length, Self { status, keep_alive, body })))
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => "the head of the response is not HTTP/1.1",
            Self::HeadTooLong => "the head of the response is too long",
            Self::ContentLength => "the content-length of the response is not a number",
            Self::Chunk => "the chunks of the response are malformed",
            Self::BytesAfterEnd => "bytes came after the end of the response",
            Self::Truncated => "the connection ended within the response",
        })
    }
}

impl std::error::Error for Malformed {}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZED: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";
    const EMPTY: &[u8] = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n";
    const NO_CONTENT: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";
    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n1A;name=\"v\"\r\nabcdefghijklmnopqrstuvwxyz\r\n0\r\nTrailer: x\r\n\r\n";
    const INTERIM: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok";

    /// Status, body bytes and the response after the pieces were fed in order.
    fn follow<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(Option<u16>, usize, Response), Malformed> {
        let mut response = Response::new();
        let mut body = 0;
        for piece in pieces {
            body += response.feed(piece)?;
        }
        Ok((response.status(), body, response))
    }

    #[test]
    fn complete_responses_end_wherever_they_are_split() -> Result<(), Malformed> {
        for (bytes, status, body) in [(SIZED, 200, 5), (EMPTY, 429, 0), (NO_CONTENT, 204, 0), (CHUNKED, 200, 31), (INTERIM, 201, 2)] {
            for at in 0..=bytes.len() {
                let (first, second) = bytes.split_at(at);
                let (seen_status, seen_body, response) = follow([first, second])?;
                assert_eq!((seen_status, seen_body), (Some(status), body), "split at {at}");
                assert!(response.is_done() && response.keep_alive(), "split at {at}");
            }
            let (_, seen_body, response) = follow(bytes.chunks(1))?;
            assert_eq!((seen_body, response.is_done()), (body, true));
        }
        Ok(())
    }

    #[test]
    fn cut_responses_are_not_done() -> Result<(), Malformed> {
        for bytes in [SIZED, EMPTY, NO_CONTENT, CHUNKED, INTERIM] {
            for at in 0..bytes.len() {
                let (_, _, mut response) = follow([&bytes[..at]])?;
                assert!(!response.is_done(), "cut at {at}");
                assert_eq!(response.feed_end(), Err(Malformed::Truncated), "cut at {at}");
            }
        }
        Ok(())
    }

    #[test]
    fn without_a_length_the_close_is_the_end() -> Result<(), Malformed> {
        let (status, body, mut response) = follow([&b"HTTP/1.1 200 OK\r\n\r\nabc"[..], b"de"])?;
        assert_eq!((status, body, response.is_done()), (Some(200), 5, false));
        assert_eq!(response.feed_end(), Ok(()));
        assert!(response.is_done() && !response.keep_alive());
        Ok(())
    }

    #[test]
    fn a_server_that_closes_is_believed() -> Result<(), Malformed> {
        for head in ["HTTP/1.1 200 OK\r\nConnection: close", "HTTP/1.0 200 OK"] {
            let (_, _, response) = follow([format!("{head}\r\ncontent-length: 1\r\n\r\nx").as_bytes()])?;
            assert!(response.is_done() && !response.keep_alive(), "{head}");
        }
        Ok(())
    }

    #[test]
    fn malformed_responses_are_named() {
        let chunks = |body: &str| format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        let long = format!("HTTP/1.1 200 OK\r\nx: {}", "a".repeat(MAX_HEAD_BYTES));
        for (bytes, problem) in [
            ("SSH-2.0-OpenSSH\r\n".to_owned(), Malformed::Head),
            (long, Malformed::HeadTooLong),
            ("HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n".to_owned(), Malformed::ContentLength),
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nxx".to_owned(), Malformed::BytesAfterEnd),
            (chunks("x\r\n"), Malformed::Chunk),
            (chunks("\r\n"), Malformed::Chunk),
            (chunks("1\r\nab"), Malformed::Chunk),
            (chunks("ffffffffffffffffff\r\n"), Malformed::Chunk),
            (chunks("0\r\n\r\nHTTP/1.1"), Malformed::BytesAfterEnd),
        ] {
            assert_eq!(follow([bytes.as_bytes()]).err(), Some(problem), "{bytes:.80}");
        }
    }
}
