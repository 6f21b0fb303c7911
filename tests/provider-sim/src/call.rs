//! One authenticated request: what every operation does with its script, its account and its bill.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use hyper::http::request::Parts;

use crate::answer::Sent;
use crate::credentials::Credential;
use crate::directive::{Directive, Found};
use crate::endpoint::{self, Endpoint};
use crate::frames::{self, Frame};
use crate::ledger::{Ended, How, Made, Reference};
use crate::limits::{Exceeded, Quota};
use crate::models::Model;
use crate::objects::{Content, Kind, Object};
use crate::openai::fields::Shop;
use crate::provider::{ApiError, Provider};
use crate::reply::Reply;
use crate::shared::Shared;
use crate::ticket::{Bill, Ticket};

pub struct Call<'a> {
    pub parts: &'a Parts,
    pub body: &'a Bytes,
    pub endpoint: Endpoint,
    pub credential: Arc<Credential>,
    pub reply: &'a mut Reply,
    pub ticket: &'a mut Ticket,
}

/// What a body is on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Json,
    Text,
    /// Server-sent events.
    Events,
    /// A JSON document that is sent as it is made.
    List,
    /// Bytes of this type, sent as they are made.
    Bytes(&'static str),
}

/// An answer decided to its last byte.
#[derive(Debug)]
pub struct Ready {
    pub frames: Vec<Frame>,
    pub shape: Shape,
    pub script: Directive,
    pub outcome: Ended,
}

impl Ready {
    pub fn new(frames: Vec<Frame>, shape: Shape, script: Directive) -> Self {
        Ready { frames, shape, script, outcome: Ended::Complete }
    }

    pub fn whole(text: String, shape: Shape, script: Directive) -> Self {
        Ready::new(vec![Frame { bytes: text.into(), produced: 0, delta: true }], shape, script)
    }

    /// A stream; `failure` makes the event that the script may want in place of its second half, given the number of
    /// events before it.
    pub fn events(frames: Vec<Frame>, script: Directive, failure: impl FnOnce(usize) -> String) -> Self {
        Ready::streamed(frames, Shape::Events, script, failure)
    }

    /// The same in another shape.
    pub fn streamed(mut frames: Vec<Frame>, shape: Shape, script: Directive, failure: impl FnOnce(usize) -> String) -> Self {
        let mut outcome = Ended::Complete;
        if script.error_midstream {
            outcome = Ended::Fault;
            frames::fail_midstream(&mut frames, failure);
        }
        Ready { outcome, ..Ready::new(frames, shape, script) }
    }
}

impl Call<'_> {
    pub fn shared(&self) -> &Arc<Shared> {
        self.ticket.shared()
    }

    /// The nth segment of the path after the provider's base path.
    pub fn segment(&self, nth: usize) -> &str {
        self.tail().split('/').nth(nth).unwrap_or_default()
    }

    /// The path after the provider's base path.
    pub fn tail(&self) -> &str {
        endpoint::tail(self.credential.provider, self.parts.uri.path()).unwrap_or_default()
    }

    /// Where its model is looked up.
    pub fn shop(&self) -> Shop<'_> {
        let deployment = endpoint::deployment(self.parts.uri.path()).map(|(name, _)| name);
        let provider = self.credential.provider;
        Shop { provider, deployment: deployment.filter(|_| provider == Provider::Azure), flavour: self.reply.flavour }
    }

    /// One member of the query, as it stands there.
    pub fn query(&self, name: &str) -> Option<&str> {
        let pairs = self.parts.uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next()
    }

    /// What the script says: the directive in `text`, and before it a fault queued for such a request. Also gives the text
    /// around the directive.
    pub fn steer(&mut self, model: Option<&'static Model>, stream: bool, text: &str) -> Result<(Directive, String), ApiError> {
        let shared = Arc::clone(self.shared());
        shared.ledger.update(self.ticket.seq, |entry| {
            entry.model = model.map(|model| model.name.into());
            entry.stream = stream;
        });
        let kind = if self.credential.provider == Provider::Gemini { "INVALID_ARGUMENT" } else { "invalid_request_error" };
        let complain = |error| ApiError::new(400, kind, format!("provider-sim directive: {error}"));
        let found = Directive::find(text).map_err(complain)?;
        let (mut script, said) = match found {
            None => (Directive::default(), text.to_owned()),
            Some(found) => {
                let said = around(text, &found);
                (found.directive, said)
            }
        };
        if let Some(fault) = shared.faults.take(&self.credential, model, self.endpoint.name()) {
            script = fault.or(script);
        }
        self.reply.obey(&script);
        Ok((script, said))
    }

    /// Steers a request that names no model.
    pub fn steer_plain(&mut self) -> Result<Directive, ApiError> {
        let (script, _) = self.steer(None, false, "")?;
        self.admit_free(None, &script)?;
        Ok(script)
    }

    /// Admits what takes nothing out of the account's window, unless it is limited or the script says otherwise.
    pub fn admit_free(&mut self, model: Option<&Model>, script: &Directive) -> Result<(), ApiError> {
        if let Some((quota, exceeded)) = self.credential.allowance.refusal(Instant::now()) {
            self.reply.quota = Some(quota);
            return Err(self.rate_limited(model.map_or("default", |model| model.snapshot), exceeded));
        }
        self.refuse_if_scripted(script, model, None)
    }

    /// Takes `tokens` out of the account's window; refuses what is too much, or what the script says.
    pub fn admit(&mut self, model: &Model, tokens: u64, script: &Directive) -> Result<(), ApiError> {
        let (quota, exceeded) = self.credential.allowance.take(tokens, Instant::now());
        self.reply.quota = Some(quota);
        if let Some(exceeded) = exceeded {
            return Err(self.rate_limited(model.snapshot, exceeded));
        }
        self.refuse_if_scripted(script, Some(model), Some(quota))
    }

    fn rate_limited(&self, model: &str, exceeded: Exceeded) -> ApiError {
        self.credential.provider.rate_limited(model, exceeded)
    }

    /// Answers with the error of the script, if it has one.
    fn refuse_if_scripted(&mut self, script: &Directive, model: Option<&Model>, quota: Option<Quota>) -> Result<(), ApiError> {
        let (name, snapshot) = model.map_or(("default", "default"), |model| (model.name, model.snapshot));
        let scripted = self.credential.provider.scripted(script, &self.credential.secret, (name, snapshot));
        let Some(error) = scripted else { return Ok(()) };
        self.reply.quota = match (error.status, error.code.as_deref()) {
            (_, Some("insufficient_quota")) | (401 | 403, _) => None,
            (429, _) => {
                let reset_ms = error.retry_after_ms.unwrap_or(1000);
                quota.map(|quota| Quota { remaining_requests: 0, remaining_tokens: 0, reset_ms, ..quota })
            }
            _ => quota,
        };
        Err(error)
    }

    /// From here on the request costs. `id` is what the answer calls itself, if it has a name.
    pub fn charge(&mut self, bill: Bill, id: Option<&str>) {
        self.ticket.bill = Some(bill);
        if let Some(id) = id {
            self.name_answer(id);
        }
    }

    /// What the answer calls itself goes into the books.
    pub fn name_answer(&self, id: &str) {
        let id = id.to_owned();
        self.shared().ledger.update(self.ticket.seq, |entry| entry.response_id = Some(id));
    }

    pub fn note_store(&self, store: Sent) {
        if self.shared().bench {
            return;
        }
        self.shared().ledger.update(self.ticket.seq, |entry| entry.store = Some(store));
    }

    /// Keeps an object for the account, and writes that down.
    pub fn keep(&self, kind: Kind, id: &str, content: Content) {
        let object = Object { kind, id: id.to_owned(), seq: self.ticket.seq, credential: Arc::clone(&self.credential.id), content };
        self.shared().objects.put(&self.credential.account, object);
        self.shared().ledger.update(self.ticket.seq, |entry| entry.created.push(Made { kind, id: id.to_owned() }));
    }

    /// The account's object of this id; that it was asked for is written down, found or not.
    pub fn refer(&self, kind: Kind, id: &str, how: How) -> Option<Arc<Object>> {
        let found = self.shared().objects.find(&self.credential.account, kind, id);
        self.note(Reference::new(kind.name(), id, how, found.as_deref()));
        found
    }

    /// Writes down that the request named or saw an object.
    pub fn note(&self, reference: Reference) {
        self.shared().ledger.update(self.ticket.seq, |entry| entry.referenced.push(reference));
    }
}

/// The text around a directive.
fn around(text: &str, found: &Found) -> String {
    let before = text.get(..found.start).unwrap_or_default().trim_end();
    let after = text.get(found.end..).unwrap_or_default().trim_start();
    [before, after].join(" ").trim().to_owned()
}
