//! An answer whose provider speaks another dialect than its caller.

use crate::operation::Form;
use crate::refusal::{Code, Refusal};
use crate::translate::answer::{self, Stream, Terms};

/// Largest answer that is translated as a whole.
const MAX_WHOLE: usize = 16 * 1024 * 1024;

/// A translation that is going on.
#[derive(Debug)]
pub(super) struct Translating {
    terms: Terms,
    status: u16,
    form: Option<Form>,
    mode: Mode,
}

#[derive(Debug)]
enum Mode {
    Stream(Box<Stream>),
    /// It is put together first.
    Whole(Vec<u8>),
    TooLarge,
}

impl Translating {
    /// `form`: what the caller asked for.
    pub fn new(terms: Terms, status: u16, has_events: bool, form: Option<Form>) -> Self {
        let is_stream = has_events && (200..300).contains(&status);
        let mode = if is_stream { Mode::Stream(Box::new(Stream::new(terms.clone()))) } else { Mode::Whole(Vec::new()) };
        Translating { terms, status, form, mode }
    }

    /// Nothing of it passes before all of it has come, its status included.
    pub fn is_whole(&self) -> bool {
        !matches!(self.mode, Mode::Stream(_))
    }

    /// Bytes that are kept now.
    pub fn held(&self) -> usize {
        match &self.mode {
            Mode::Stream(stream) => stream.held(),
            Mode::Whole(body) => body.len(),
            Mode::TooLarge => 0,
        }
    }

    /// Takes a piece; gives what the caller is to see now. At most `room` bytes may be kept after it.
    pub fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Vec<u8> {
        let mut out = Vec::new();
        match &mut self.mode {
            Mode::Stream(stream) => {
                stream.piece(piece, &mut out);
                if end {
                    stream.end(&mut out);
                }
            }
            Mode::Whole(body) if body.len().saturating_add(piece.len()) <= room.min(MAX_WHOLE) => body.extend_from_slice(piece),
            Mode::Whole(_) | Mode::TooLarge => self.mode = Mode::TooLarge,
        }
        out
    }

    /// Status and body of an answer that has come whole.
    pub fn whole(&mut self) -> Result<(u16, String), Refusal> {
        let unreadable = |what: &str| Refusal::new(Code::ProviderUnreachable, format!("the provider's answer {what}"));
        let body = match std::mem::replace(&mut self.mode, Mode::Whole(Vec::new())) {
            Mode::Whole(body) => body,
            Mode::TooLarge => return Err(unreadable("is too large to be translated")),
            Mode::Stream(_) => return Err(unreadable("is no document")),
        };
        if !(200..300).contains(&self.status) {
            return Ok(answer::error(self.status, &body, &self.terms));
        }
        let read = if self.form == Some(Form::Embeddings) { answer::embeddings } else { answer::whole };
        read(&body, &self.terms).map(|body| (self.status, body)).map_err(|_| unreadable("could not be read"))
    }
}
