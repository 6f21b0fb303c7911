//! One request's place in the ledger. However the request goes, its ticket writes down the end, once.

use std::sync::Arc;

use crate::connection::Connection;
use crate::credentials::Credential;
use crate::ledger::{End, Ended};
use crate::models::{Model, Usage};
use crate::shared::Shared;
use crate::text::unix_us;

/// What the provider charges if the answer goes to its end.
#[derive(Debug)]
pub struct Bill {
    pub model: &'static Model,
    pub usage: Usage,
    pub stream: bool,
    /// Visible tokens generated so far.
    pub produced: u64,
    /// Nanodollars for what has its own price by the piece.
    pub pieces: u64,
}

#[derive(Debug)]
pub struct Ticket {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    pub seq: u64,
    endpoint: Option<&'static str>,
    pub credential: Option<Arc<Credential>>,
    status: Option<u16>,
    tag: Option<Arc<str>>,
    pub bill: Option<Bill>,
    closed: bool,
}

impl Ticket {
    pub fn new(shared: Arc<Shared>, connection: Arc<Connection>, seq: u64, endpoint: Option<&'static str>) -> Self {
        Ticket { shared, connection, seq, endpoint, credential: None, status: None, tag: None, bill: None, closed: false }
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// Says whom the request is for; only the first time counts.
    pub fn tag(&mut self, tag: Arc<str>) {
        if self.tag.is_none() {
            self.shared.ledger.tag(self.seq, &tag);
            self.tag = Some(tag);
        }
    }

    pub fn violation(&self, what: String) {
        self.shared.ledger.violation(Some(self.seq), what);
    }

    /// The answer's head is about to be sent.
    pub fn answered(&mut self, status: u16) {
        self.status = Some(status);
        self.shared.ledger.update(self.seq, |entry| (entry.status, entry.answered_unix_us) = (Some(status), Some(unix_us())));
    }

    /// Writes down how it ended; only the first time counts.
    pub fn close(&mut self, ended: Ended) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let (usage, cost_nanodollars) = self.bill.as_ref().map_or_else(Default::default, |bill| bill.due(ended, self.shared.abort_overrun));
        let credential = self.credential.as_ref().map(|credential| &credential.id);
        let end = End { ended, usage, cost_nanodollars, endpoint: self.endpoint, tag: self.tag.take() };
        self.shared.ledger.end(self.seq, &end, credential, self.status);
        self.connection.expect_head();
    }
}

impl Drop for Ticket {
    /// Dropped before its end means that nobody reads any more.
    fn drop(&mut self) {
        self.close(Ended::ClientGone);
    }
}

impl Bill {
    pub fn new(model: &'static Model, usage: Usage, stream: bool) -> Self {
        Bill { model, usage, stream, produced: 0, pieces: 0 }
    }

    /// A buffered answer is generated whole whoever waits for it. A stream stops soon after its reader has gone: what was
    /// generated is charged, hidden tokens (which come first) in full, and up to `overrun` more.
    fn due(&self, ended: Ended, overrun: u64) -> (Usage, u64) {
        let mut usage = self.usage;
        if self.stream && ended != Ended::Complete {
            let visible = usage.completion - usage.reasoning;
            usage.completion = usage.reasoning + visible.min(self.produced.saturating_add(overrun));
        }
        (usage, self.model.cost(&usage).saturating_add(self.pieces))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Provider;

    #[test]
    fn a_stream_cut_short_pays_for_a_little_more_than_it_gave() -> Result<(), &'static str> {
        let model = Model::find(Provider::Openai, "o3").ok_or("model")?;
        let usage = Usage { prompt: 10, reasoning: 50, completion: 150, ..Usage::default() };
        let mut bill = Bill { model, usage, stream: true, produced: 30, pieces: 0 };
        assert_eq!(bill.due(Ended::ClientGone, 16).0.completion, 96);
        assert_eq!(bill.due(Ended::ClientGone, 16).1, 10 * 2000 + 96 * 8000);
        assert_eq!(bill.due(Ended::Complete, 16).0.completion, 150);
        bill.produced = 95;
        assert_eq!(bill.due(Ended::Fault, 16).0.completion, 150);
        bill.stream = false;
        bill.produced = 0;
        bill.pieces = 7;
        assert_eq!(bill.due(Ended::ClientGone, 16).1, 10 * 2000 + 150 * 8000 + 7);
        assert_eq!(bill.due(Ended::ClientGone, 16).0.completion, 150);
        Ok(())
    }
}
