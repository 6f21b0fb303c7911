//! Answers: read from the provider's dialect, written in the caller's.
//!
//! A reader for each dialect finds the events of an answer, streamed or whole, and a writer for each writes them. Of a stream nothing
//! is kept but what a writer can't do without: an event goes on with the byte that makes it whole.

mod embeddings;
mod event;
mod fault;
mod frames;
mod from_anthropic;
mod from_gemini;
mod from_openai;
mod gather;
mod to_anthropic;
mod to_openai;

use crate::hex;
use crate::json::JsonError;
use crate::operation::Dialect;
use crate::translate::doc::{Doc, Kind, Unreadable, Value};
use event::{Event, Sink};
use fault::Fault;
use frames::{Frame, Frames};
use gather::Gathered;
use sha2::{Digest, Sha256};

/// Most values of an answer, or of one event of a stream, that is read: an index of them is kept while that goes on.
const MAX_VALUES: usize = 200_000;
/// Most bytes that are kept of a stream, beside the event in hand.
const HELD: usize = 64 << 10;

/// What an answer is translated under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// The provider's dialect.
    pub from: Dialect,
    /// The caller's: [`Dialect::OpenAi`] (chat completions) or [`Dialect::Anthropic`] (messages).
    pub to: Dialect,
    /// The model that answers when the provider does not say.
    pub model: String,
    /// What an answer without an id of its own is called by: 32 hexadecimal digits.
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// Of OpenAI's streams: the caller asked for the chunk with usage.
    pub include_usage: bool,
    /// Of OpenAI's embeddings: the caller asked for `encoding_format: "base64"`.
    pub base64: bool,
}

/// A whole answer of a chat, which was a success. What is JSON but no answer is unreadable as well.
pub fn whole(body: &[u8], terms: &Terms) -> Result<String, Unreadable> {
    let doc = Doc::read(body, MAX_VALUES)?;
    let root = doc.root();
    let mut answer = Gathered::default();
    if let Some(fault) = Fault::within(root) {
        return Ok(fault.body(terms));
    }
    if root.kind() != Kind::Object || !Reader::new(terms).document(root, &mut answer) {
        return Err(Unreadable::Json(JsonError::Syntax(0)));
    }
    let written = if terms.to == Dialect::Anthropic { to_anthropic::whole(&answer, terms) } else { to_openai::whole(&answer, terms) };
    String::from_utf8(written).map_err(|_| Unreadable::Json(JsonError::Utf8(0)))
}

/// A whole answer of embeddings, which was a success: Gemini's as OpenAI's.
pub fn embeddings(body: &[u8], terms: &Terms) -> Result<String, Unreadable> {
    embeddings::embeddings(body, terms)
}

/// An error's status and body, whatever they are, as the caller is to see them.
pub fn error(status: u16, body: &[u8], terms: &Terms) -> (u16, String) {
    let fault = Fault::read(status, body);
    (fault.status, fault.body(terms))
}

/// Translates a stream of events as it passes. Bytes go in as they come, cut anywhere, and events come out as soon as they are whole.
#[derive(Debug)]
pub struct Stream {
    frames: Frames,
    flow: Flow,
}

/// What stands behind the framing.
#[derive(Debug)]
struct Flow {
    reader: Reader,
    writer: Writer,
    is_over: bool,
}

impl Stream {
    pub fn new(terms: Terms) -> Self {
        let writer = match terms.to {
            Dialect::Anthropic => Writer::Anthropic(to_anthropic::Streamed::new(&terms)),
            Dialect::OpenAi | Dialect::Gemini => Writer::OpenAi(to_openai::Streamed::new(&terms)),
        };
        Stream { frames: Frames::default(), flow: Flow { reader: Reader::new(&terms), writer, is_over: false } }
    }

    /// Takes a piece and appends what the caller is to see now.
    pub fn piece(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        self.frames.piece(piece, |frame| self.flow.frame(frame, out));
    }

    /// The provider's stream has ended: whole, or in the middle.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        self.frames.end(|frame| self.flow.last_frame(frame, out));
        self.flow.end(out);
    }

    /// Bytes that are kept now.
    pub fn held(&self) -> usize {
        let kept = match &self.flow.writer {
            Writer::OpenAi(writer) => writer.held(),
            Writer::Anthropic(writer) => writer.held(),
        };
        self.frames.held() + kept
    }
}

impl Flow {
    /// Whether the stream goes on.
    fn frame(&mut self, frame: Frame<'_>, out: &mut Vec<u8>) -> bool {
        match frame {
            Frame::Comment => self.take(Event::Ping, out),
            Frame::TooLarge => self.take(Event::Failed(Fault::provider("the provider sent an event that is too large to be read")), out),
            Frame::Data(data) => match self.data(data, out) {
                Ok(()) => {}
                Err(_) => self.take(Event::Failed(Fault::provider("the provider sent an event that can't be read")), out),
            },
        }
        !self.is_over
    }

    /// What is left when the stream ends. Half an event is no event.
    fn last_frame(&mut self, frame: Frame<'_>, out: &mut Vec<u8>) -> bool {
        if let Frame::Data(data) = frame {
            let _ = self.data(data, out);
        }
        !self.is_over
    }

    fn data(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Unreadable> {
        let data = data.trim_ascii();
        if data.is_empty() {
            return Ok(());
        }
        let Flow { reader, writer, is_over } = self;
        let mut sink = Out { writer, is_over, out };
        if data == b"[DONE]" {
            if let Reader::OpenAi(reader) = reader {
                reader.done(&mut sink);
            }
            return Ok(());
        }
        let doc = Doc::read(data, MAX_VALUES)?;
        reader.frame(doc.root(), &mut sink);
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        let is_whole = match &self.reader {
            Reader::OpenAi(reader) => reader.is_whole(),
            Reader::Gemini(reader) => reader.is_whole(),
            Reader::Anthropic(_) => false,
        };
        self.take(if is_whole { Event::Done } else { Event::Failed(Fault::cut()) }, out);
    }

    fn take(&mut self, event: Event<'_>, out: &mut Vec<u8>) {
        Out { writer: &mut self.writer, is_over: &mut self.is_over, out }.take(event);
    }
}

#[derive(Debug)]
enum Reader {
    OpenAi(from_openai::Reader),
    Anthropic(from_anthropic::Reader),
    Gemini(from_gemini::Reader),
}

impl Reader {
    fn new(terms: &Terms) -> Self {
        match terms.from {
            Dialect::OpenAi => Reader::OpenAi(from_openai::Reader::new(stem(&terms.id))),
            Dialect::Anthropic => Reader::Anthropic(from_anthropic::Reader::default()),
            Dialect::Gemini => Reader::Gemini(from_gemini::Reader::new(terms.id.clone())),
        }
    }

    fn frame(&mut self, root: Value<'_>, sink: &mut impl Sink) {
        match self {
            Reader::OpenAi(reader) => reader.frame(root, sink),
            Reader::Anthropic(reader) => reader.frame(root, sink),
            Reader::Gemini(reader) => reader.frame(root, sink),
        }
    }

    fn document(&mut self, root: Value<'_>, sink: &mut impl Sink) -> bool {
        match self {
            Reader::OpenAi(reader) => reader.document(root, sink),
            Reader::Anthropic(reader) => reader.document(root, sink),
            Reader::Gemini(reader) => reader.document(root, sink),
        }
    }
}

#[derive(Debug)]
enum Writer {
    OpenAi(to_openai::Streamed),
    Anthropic(to_anthropic::Streamed),
}

impl Writer {
    /// Gives back what is kept for events to come: none comes any more.
    fn forget(&mut self) {
        match self {
            Writer::OpenAi(writer) => writer.forget(),
            Writer::Anthropic(writer) => writer.forget(),
        }
    }
}

/// Where the events of a stream go. After the last nothing is written, whatever comes.
struct Out<'a> {
    writer: &'a mut Writer,
    is_over: &'a mut bool,
    out: &'a mut Vec<u8>,
}

impl Sink for Out<'_> {
    fn take(&mut self, event: Event<'_>) {
        if !*self.is_over {
            *self.is_over = !match &mut *self.writer {
                Writer::OpenAi(writer) => writer.take(event, self.out),
                Writer::Anthropic(writer) => writer.take(event, self.out),
            };
            if *self.is_over {
                self.writer.forget();
            }
        }
    }
}

/// What an answer and its model are called by.
#[derive(Debug)]
struct Names {
    prefix: &'static str,
    /// When the provider does not say, both escaped.
    id: String,
    model: String,
}

impl Names {
    fn new(prefix: &'static str, terms: &Terms) -> Self {
        let inner = |text: &str| {
            let mut out = String::new();
            super::write::escape(text, &mut out);
            out.pop();
            out.split_off(1)
        };
        Names { prefix, id: inner(&terms.id), model: inner(&terms.model) }
    }

    /// Prefix, id and model of an answer that names itself so.
    fn of<'a>(&'a self, id: &'a str, model: &'a str) -> (&'static str, &'a str, &'a str) {
        let id = if id.is_empty() { &self.id } else { id };
        let prefix = if id.starts_with(self.prefix) { "" } else { self.prefix };
        (prefix, id, if model.is_empty() { &self.model } else { model })
    }
}

/// How the ids of calls begin that the provider gave none: no other answer of a conversation has the same.
fn stem(id: &str) -> String {
    let [a, b, c, d, e, f, ..]: [u8; 32] = Sha256::digest(id.as_bytes()).into();
    format!("call_{}_", hex::encode(&[a, b, c, d, e, f]))
}
