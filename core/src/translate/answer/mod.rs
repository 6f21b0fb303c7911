//! Answers: read from the provider's dialect, written in the caller's.

use crate::operation::Dialect;
use crate::translate::doc::Unreadable;

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
}

/// A whole answer of a chat, which was a success.
pub fn whole(body: &[u8], terms: &Terms) -> Result<String, Unreadable> {
    let _ = (body, terms);
    Err(Unreadable::TooManyValues)
}

/// A whole answer of embeddings, which was a success.
pub fn embeddings(body: &[u8], terms: &Terms) -> Result<String, Unreadable> {
    let _ = (body, terms);
    Err(Unreadable::TooManyValues)
}

/// An error's status and body, whatever they are, as the caller is to see them.
pub fn error(status: u16, body: &[u8], terms: &Terms) -> (u16, String) {
    let _ = (body, terms);
    (status, String::new())
}

/// Translates a stream of events as it passes. Bytes go in as they come, cut anywhere, and events come out as soon as they are whole.
#[derive(Debug)]
pub struct Stream {
    terms: Terms,
}

impl Stream {
    pub fn new(terms: Terms) -> Self {
        Stream { terms }
    }

    /// Takes a piece and appends what the caller is to see now.
    pub fn piece(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let _ = (&self.terms, piece, out);
    }

    /// The provider's stream has ended: whole, or in the middle.
    pub fn end(&mut self, out: &mut Vec<u8>) {
        let _ = (&self.terms, out);
    }

    /// Bytes that are kept now.
    pub fn held(&self) -> usize {
        0
    }
}
