//! The gate: one request from its headers to its settlement. Each stage is a value that holds only what that stage
//! needs, and moving on consumes it. Nothing can be forwarded without the [`Permit`] that only an admission makes.

use crate::attempt::{AnswerHead, Flight};
use crate::body::{BodyFacts, BodyReader, Edits, Splice};
use crate::credentials::{self, Found};
use crate::edge::{AdmitAnswer, AdmitRequest, Ask, Outcome, Plan, RequestId, Settlement, VmId};
use crate::meter::{Measured, Meter, Passed};
use crate::operation::{Dialect, NoTarget, Provider, Takes, Target, find};
use crate::refusal::{Answer, Code, Refusal};
use crate::token::TokenHash;
use crate::trace::TraceContext;

/// Raw header names and values, pseudo-headers included, as the wire had them.
pub type Headers<'a> = [(&'a [u8], &'a [u8])];

/// What the gate is configured to allow, whoever asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub max_body_bytes: u64,
}

/// A refusal with what is needed to say it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub refusal: Refusal,
    pub dialect: Dialect,
    pub request_id: RequestId,
    /// The policy service has been asked and knows of the request; otherwise it learns of the refusal as a count.
    pub asked: bool,
}

impl Refused {
    pub fn answer(&self) -> Answer {
        self.refusal.answer(self.dialect, &self.request_id.to_string())
    }
}

/// First value of a header, by lower-case name.
pub fn header<'a>(headers: &Headers<'a>, name: &str) -> Option<&'a [u8]> {
    headers.iter().find(|(n, _)| *n == name.as_bytes()).map(|(_, v)| *v)
}

/// Stage 1: the headers have come. Says who asks for what, or refuses at once.
pub fn request_headers(headers: &Headers<'_>, limits: Limits, id: RequestId) -> Result<Reading, Refused> {
    let method = header(headers, ":method").and_then(|m| std::str::from_utf8(m).ok()).unwrap_or_default();
    let raw_path = header(headers, ":path").unwrap_or_default();
    let (path, query) = split_query(raw_path);
    let path = std::str::from_utf8(path).unwrap_or_default();
    let anthropic_version = header(headers, "anthropic-version").is_some();
    let target = find(method, path, anthropic_version);
    let dialect = match &target {
        Ok(target) => target.provider.dialect,
        Err(NoTarget::UnknownProvider(dialect) | NoTarget::UnknownEndpoint(dialect)) => *dialect,
    };
    let refuse = |code, message: &str| Refused { refusal: Refusal::new(code, message), dialect, request_id: id, asked: false };

    let token = match credentials::find(headers, query) {
        Found::Key(key) => key.hash(),
        Found::Nothing => return Err(refuse(Code::MissingKey, "no virtual key: send one as your SDK sends its API key")),
        Found::Malformed => return Err(refuse(Code::UnknownKey, credentials::UNKNOWN_KEY)),
        Found::Several => return Err(refuse(Code::BadRequest, "two different virtual keys were sent")),
    };
    let target = target.map_err(|none| match none {
        NoTarget::UnknownProvider(_) => refuse(Code::UnknownProvider, "no such provider"),
        NoTarget::UnknownEndpoint(_) => refuse(Code::EndpointNotAllowed, "this endpoint is not in the table of operations"),
    })?;
    if header(headers, "content-encoding").is_some_and(|e| !e.eq_ignore_ascii_case(b"identity")) {
        return Err(refuse(Code::BadRequest, "a request body must not be content-encoded"));
    }
    let announced = header(headers, "content-length").and_then(|n| std::str::from_utf8(n).ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limits.max_body_bytes) {
        return Err(too_large(dialect, limits, id));
    }
    let body = match target.operation.takes {
        Takes::Nothing => None,
        Takes::Generation { .. } => Some(Box::default()),
    };
    Ok(Reading { id, token, target, limits, body, trace: TraceContext::of(headers) })
}

fn split_query(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().position(|&b| b == b'?') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (path, &[]),
    }
}

fn too_large(dialect: Dialect, limits: Limits, id: RequestId) -> Refused {
    let refusal = Refusal::new(Code::BodyTooLarge, format!("the request body is larger than {} bytes", limits.max_body_bytes));
    Refused { refusal, dialect, request_id: id, asked: false }
}

/// Stage 2: the body is being read, in pieces.
#[derive(Debug)]
pub struct Reading {
    id: RequestId,
    token: TokenHash,
    target: Target,
    limits: Limits,
    body: Option<Box<BodyReader>>,
    trace: Option<TraceContext>,
}

impl Reading {
    /// Bytes of the body read so far.
    pub fn position(&self) -> u64 {
        self.body.as_ref().map_or(0, |body| body.position())
    }

    pub fn dialect(&self) -> Dialect {
        self.target.provider.dialect
    }

    pub fn piece(&mut self, piece: &[u8]) -> Result<(), Refused> {
        if self.position().saturating_add(piece.len() as u64) > self.limits.max_body_bytes {
            return Err(too_large(self.dialect(), self.limits, self.id));
        }
        let result = match &mut self.body {
            Some(body) => body.feed(piece).map_err(|error| error.message()),
            None if piece.is_empty() => Ok(()),
            None => Err("this endpoint takes no request body".to_owned()),
        };
        result.map_err(|message| self.bad_request(message))
    }

    /// The body has ended: what is asked for is known.
    pub fn end(mut self) -> Result<Asking, Refused> {
        let body = self.body.take().map(|body| body.finish()).transpose();
        let facts = body.map_err(|error| self.bad_request(error.message()))?;
        if matches!(self.target.operation.takes, Takes::Generation { .. })
            && facts.as_ref().is_none_or(|f| f.model.as_deref().unwrap_or_default().is_empty())
        {
            return Err(self.bad_request("\"model\" is required".to_owned()));
        }
        let facts = facts.unwrap_or_default();
        let max_tokens = match self.target.operation.takes {
            Takes::Generation { limits, .. } => facts.max_tokens(limits).map_err(|error| self.bad_request(error.message()))?,
            Takes::Nothing => None,
        };
        Ok(Asking { id: self.id, token: self.token, target: self.target, facts, max_tokens, trace: self.trace })
    }

    /// This worker can't take the request on now.
    pub fn busy(&self) -> Refused {
        let refusal = Refusal::new(Code::PolicyUnavailable, "this worker is at its limit; nothing was forwarded").retry_after(1);
        Refused { refusal, dialect: self.dialect(), request_id: self.id, asked: false }
    }

    fn bad_request(&self, message: String) -> Refused {
        Refused { refusal: Refusal::new(Code::BadRequest, message), dialect: self.dialect(), request_id: self.id, asked: false }
    }
}

/// Stage 3: the policy service has been asked.
#[derive(Debug)]
pub struct Asking {
    id: RequestId,
    token: TokenHash,
    target: Target,
    facts: BodyFacts,
    max_tokens: Option<u64>,
    trace: Option<TraceContext>,
}

impl Asking {
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// The caller's place in a trace, for the policy service's log.
    pub fn trace(&self) -> Option<&TraceContext> {
        self.trace.as_ref()
    }

    pub fn admit_request(&self, vm: VmId, node: String, need_key: bool) -> AdmitRequest {
        let facts = &self.facts;
        AdmitRequest {
            req: self.id,
            vm,
            node,
            token: self.token.0,
            need_key,
            ask: Ask {
                provider: self.target.provider.name.to_owned(),
                endpoint: self.target.operation.endpoint(),
                model: facts.model.clone(),
                stream: facts.stream,
                bytes: facts.bytes,
                max_tokens: self.max_tokens,
                choices: facts.choices,
                thinking_budget: facts.thinking_budget,
                images: facts.images,
                unbounded: facts.unbounded.map(str::to_owned),
            },
        }
    }

    /// The service has answered. Anything but a plan that can be carried out is a refusal.
    pub fn answered(self, answer: Option<AdmitAnswer>) -> Result<Admitted, Refused> {
        let (plan, refusal) = answer.map_or((None, None), |a| (a.plan, a.refusal));
        match (plan, refusal) {
            (Some(plan), None) => self.admitted(plan),
            (None, Some(refusal)) => Err(self.refused(refusal)),
            _ => Err(self.unavailable()),
        }
    }

    fn admitted(self, plan: Plan) -> Result<Admitted, Refused> {
        let Some(target) = plan.targets.first() else { return Err(self.unavailable()) };
        // This version never changes provider: a plan for another one is not ours to carry out.
        if target.provider != self.target.provider.name {
            return Err(self.unavailable());
        }
        let (limits, asks_for_usage) = match self.target.operation.takes {
            Takes::Generation { limits, asks_for_usage } => (limits, asks_for_usage),
            Takes::Nothing => (&[][..], false),
        };
        let add_usage = asks_for_usage && self.facts.stream;
        let edits = Edits { model: target.model.as_deref(), max_tokens: plan.clamp, limits, include_usage: add_usage };
        let splices = self.facts.splices(&edits);
        Ok(Admitted {
            body_bytes: self.facts.bytes,
            splices,
            clamp: plan.clamp,
            withhold_usage: add_usage && !self.facts.include_usage,
            stream: self.facts.stream,
            permit: Permit { id: self.id, target: self.target, plan },
        })
    }

    /// Nobody answered in time: nothing is forwarded, and the service is told so.
    pub fn unavailable(&self) -> Refused {
        self.refused(Refusal::new(Code::PolicyUnavailable, "the policy service did not answer; nothing was forwarded").retry_after(1))
    }

    fn refused(&self, refusal: Refusal) -> Refused {
        Refused { refusal, dialect: self.target.provider.dialect, request_id: self.id, asked: true }
    }
}

/// The right to forward one request. Only [`Asking::answered`] makes one.
#[derive(Debug)]
pub struct Permit {
    id: RequestId,
    target: Target,
    plan: Plan,
}

impl Permit {
    pub fn id(&self) -> RequestId {
        self.id
    }

    pub fn target(&self) -> Target {
        self.target
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }
}

/// Stage 4: admitted, with what must be written into the body before it goes on.
#[derive(Debug)]
pub struct Admitted {
    pub permit: Permit,
    /// Length of the body as it came.
    pub body_bytes: u64,
    /// Changes to the body, in order.
    pub splices: Vec<Splice>,
    pub clamp: Option<u64>,
    withhold_usage: bool,
    stream: bool,
}

impl Admitted {
    /// The request goes on: its permit becomes a flight, which the attempts work from.
    pub fn forward(self) -> (Answering, Flight) {
        let answering = Answering {
            dialect: self.permit.target.provider.dialect,
            id: self.permit.id,
            clamp: self.clamp,
            withhold_usage: self.withhold_usage,
            stream: self.stream,
            meter: None,
            complete: false,
        };
        (answering, Flight::new(self.permit))
    }
}

/// Stage 5: forwarded; the answer is awaited or passing.
#[derive(Debug)]
pub struct Answering {
    dialect: Dialect,
    id: RequestId,
    clamp: Option<u64>,
    withhold_usage: bool,
    stream: bool,
    meter: Option<Meter>,
    complete: bool,
}

/// What to do with an answer's headers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    pub remove: Vec<&'static str>,
    pub set: Vec<(&'static str, String)>,
}

impl Answering {
    /// The answer's headers have come. `head`: what the attempt saw of them; `None` when Envoy made the answer up.
    pub fn headers(&mut self, head: Option<AnswerHead>) -> Result<HeaderEdits, Refused> {
        if head.as_ref().is_some_and(|head| matches!(head.status, 401 | 403)) {
            // The caller's key was fine: it is our stored credential that the provider turned away.
            let message = "the provider rejected the stored credential; an operator has to replace it";
            let refusal = Refusal::new(Code::ProviderCredentialRejected, message);
            return Err(Refused { refusal, dialect: self.dialect, request_id: self.id, asked: true });
        }
        let head = head.unwrap_or_default();
        let meter = Meter::new(&head.content_type, head.encoded, self.withhold_usage);
        let mut edits = HeaderEdits { remove: Vec::new(), set: vec![("x-keyward-request-id", self.id.to_string())] };
        if meter.rewrites() {
            edits.remove.push("content-length");
        }
        if let Some(clamp) = self.clamp {
            edits.set.push(("x-keyward-max-tokens", clamp.to_string()));
        }
        self.meter = Some(meter);
        Ok(edits)
    }

    /// A piece of the answer's body. At most `room` bytes may be held back after it.
    pub fn piece(&mut self, piece: &[u8], end: bool, room: usize) -> Passed {
        self.complete |= end;
        self.meter.as_mut().map_or(Passed::AsIs, |meter| meter.piece(piece, end, room))
    }

    /// Bytes of the answer that are held back now.
    pub fn held(&self) -> usize {
        self.meter.as_ref().map_or(0, Meter::held)
    }

    /// The admitted request could not be put together: nothing was forwarded.
    pub fn failed(&self) -> Refused {
        let refusal = Refusal::new(Code::PolicyUnavailable, "the request could not be forwarded; nothing left").retry_after(1);
        Refused { refusal, dialect: self.dialect, request_id: self.id, asked: true }
    }

    /// The answer ended without a last piece: by its headers, or by trailers.
    pub fn ended(&mut self) {
        self.complete = true;
    }

    /// The request is over, however it went.
    pub fn over(self, flight: &Flight, ms: u64, at: u64) -> Settlement {
        let readable = !matches!(self.meter, Some(Meter::Opaque { .. }));
        let measured = self.meter.map_or(Measured::default(), Meter::finish);
        // A stream's usage is final once it was told, whatever follows; a document's only when the document is whole.
        let usage = measured.usage.filter(|_| measured.is_final && (self.complete || self.stream));
        Settlement {
            req: self.id,
            outcome: if self.complete { Outcome::Complete } else { Outcome::Cut },
            sent: flight.may_have_been_sent(),
            status: flight.status(),
            usage,
            input: measured.input.filter(|_| usage.is_none()),
            visible: Some(measured.visible_bytes).filter(|_| readable && usage.is_none()),
            tries: flight.tries(ms),
            ms,
            at,
        }
    }
}

/// The record of a gate that gave up before anything was forwarded.
pub fn void(id: RequestId, ms: u64, at: u64) -> Settlement {
    Settlement {
        req: id,
        outcome: Outcome::Void,
        sent: false,
        status: None,
        usage: None,
        input: None,
        visible: None,
        tries: Vec::new(),
        ms,
        at,
    }
}

/// The name under which the router finds the provider's cluster.
pub fn cluster(provider: &Provider) -> &'static str {
    provider.name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::{PlanCredential, PlanTarget, Secret};
    use crate::token::VirtualKey;
    use crate::usage::Usage;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const LIMITS: Limits = Limits { max_body_bytes: 1_000 };

    /// A chat request's headers; of two with one name the extra one counts.
    fn with_headers<T>(extra: &[(&str, &str)], run: impl FnOnce(&Headers<'_>) -> T) -> T {
        let auth = format!("Bearer {}", VirtualKey::generate([1; 32]).reveal());
        let mut all = vec![(":method", "POST"), (":path", "/v1/chat/completions"), ("authorization", auth.as_str())];
        all.retain(|(name, _)| !extra.iter().any(|(other, _)| name == other));
        all.extend_from_slice(extra);
        run(&all.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())).collect::<Vec<_>>())
    }

    const STREAM: &Headers<'_> = &[(b":status", b"200"), (b"content-type", b"text/event-stream")];

    fn asking(body: &str) -> Result<Asking, Refused> {
        let mut reading = with_headers(&[], |headers| request_headers(headers, LIMITS, RequestId([9; 16])))?;
        reading.piece(body.as_bytes())?;
        reading.end()
    }

    fn plan(clamp: Option<u64>) -> Plan {
        let credential = PlanCredential { id: "cred_a".into(), secret: Secret("sk-real".into()) };
        let target = PlanTarget { provider: "openai".into(), model: Some("gpt-4o".into()), credentials: vec![credential] };
        Plan { key: "key_1".into(), rev: 1, clamp, targets: vec![target] }
    }

    fn admitted(body: &str) -> Admitted {
        asking(body).unwrap().answered(Some(AdmitAnswer { plan: Some(plan(None)), ..AdmitAnswer::default() })).unwrap()
    }

    fn code(result: Result<impl Sized, Refused>) -> Code {
        result.err().map(|r| r.refusal.code).unwrap()
    }

    #[test]
    fn refused_before_anybody_is_asked() {
        let at = |extra: &[(&str, &str)]| code(with_headers(extra, |headers| request_headers(headers, LIMITS, RequestId([9; 16]))));
        assert_eq!(at(&[("authorization", "")]), Code::MissingKey);
        assert_eq!(at(&[("authorization", "Bearer vk_nope")]), Code::UnknownKey);
        assert_eq!(at(&[("x-api-key", VirtualKey::generate([2; 32]).reveal())]), Code::BadRequest);
        assert_eq!(at(&[(":path", "/nowhere/v1/x")]), Code::UnknownProvider);
        assert_eq!(at(&[(":path", "/v1/files")]), Code::EndpointNotAllowed);
        assert_eq!(at(&[("content-encoding", "gzip")]), Code::BadRequest);
        assert_eq!(at(&[("content-length", "1001")]), Code::BodyTooLarge);
        assert_eq!(code(asking("{\"model\":\"a\",\"model\":\"b\"}")), Code::BadRequest);
        assert_eq!(code(asking("{}")), Code::BadRequest);
        assert_eq!(code(asking("")), Code::BadRequest);
        assert_eq!(code(asking(&"x".repeat(1_001))), Code::BodyTooLarge);
    }

    #[test]
    fn undecided_means_refused() {
        for answer in [
            None,
            Some(AdmitAnswer::default()),
            Some(AdmitAnswer { plan: Some(Plan { targets: vec![], ..plan(None) }), ..AdmitAnswer::default() }),
        ] {
            assert_eq!(code(asking("{\"model\":\"gpt-4o\"}").unwrap().answered(answer)), Code::PolicyUnavailable);
        }
        let mut elsewhere = plan(None);
        elsewhere.targets[0].provider = "anthropic".into();
        let answer = AdmitAnswer { plan: Some(elsewhere), ..AdmitAnswer::default() };
        assert_eq!(code(asking("{\"model\":\"gpt-4o\"}").unwrap().answered(Some(answer))), Code::PolicyUnavailable);
    }

    #[test]
    fn each_try_overwrites_every_credential_header() {
        let (_, mut flight) = admitted("{\"model\":\"gpt-4o\"}").forward();
        let shared = [("x-api-key", "left by an earlier try"), ("x-forwarded-for", "10.0.0.1"), ("x-other", "stays")];
        let edits = with_headers(&shared, |headers| flight.begin(headers, 0).unwrap());
        assert!(edits.set.contains(&("authorization", "Bearer sk-real".to_owned())));
        assert!(edits.set.contains(&(":authority", "api.openai.com".to_owned())));
        assert_eq!(edits.remove, [b"x-api-key".to_vec(), b"x-forwarded-for".to_vec()]);
        let edits = with_headers(&[(":path", "/openai/v1/chat/completions?key=x")], |headers| flight.begin(headers, 0).unwrap());
        assert!(edits.set.contains(&(":path", "/v1/chat/completions".to_owned())));
        let leak = flight.answered(&[(b":status", b"200"), (b"x-echo", b"Bearer sk-real")], 5);
        assert_eq!(leak, [b"x-echo".to_vec()]);
        assert_eq!(flight.hand_over().map(|head| head.status), Some(200));
        assert_eq!(flight.hand_over(), None, "a later answer is not the provider's");
    }

    #[test]
    fn a_stream_is_asked_for_usage_and_settles_it() {
        let admitted = admitted("{\"model\":\"gpt-4o\",\"stream\":true}");
        assert_eq!(admitted.splices.len(), 1);
        let (mut answering, mut flight) = admitted.forward();
        flight.begin(&[], 0);
        flight.answered(STREAM, 7);
        answering.headers(flight.hand_over()).unwrap();
        let usage = b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n";
        assert_eq!(answering.piece(usage, false, 1_000), Passed::Instead(Vec::new()));
        answering.piece(b"data: [DONE]\n\n", true, 1_000);
        let settled = answering.over(&flight, 30, 1_000);
        assert_eq!((settled.outcome, settled.status, settled.sent), (Outcome::Complete, Some(200), true));
        assert_eq!(settled.usage, Some(Usage { input: 3, output: 4, ..Usage::default() }));
        assert_eq!((settled.tries[0].status, settled.tries[0].ms), (Some(200), 7));
    }

    #[test]
    fn a_cut_anthropic_stream_tells_its_input_only() {
        let (mut answering, mut flight) = admitted("{\"model\":\"gpt-4o\",\"stream\":true}").forward();
        flight.begin(&[], 0);
        flight.answered(STREAM, 1);
        answering.headers(flight.hand_over()).unwrap();
        answering.piece(b"data: {\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n", false, 1_000);
        let settled = answering.over(&flight, 30, 1_000);
        assert_eq!((settled.outcome, settled.usage), (Outcome::Cut, None));
        assert_eq!(settled.input.map(|u| (u.input, u.output)), Some((25, 0)));
    }

    /// An error in the middle of an Anthropic stream ends it whole, but the usage told so far is only its beginning.
    #[test]
    fn a_stream_that_ends_in_an_error_tells_no_final_usage() {
        let (mut answering, mut flight) = admitted("{\"model\":\"gpt-4o\",\"stream\":true}").forward();
        flight.begin(&[], 0);
        flight.answered(STREAM, 1);
        answering.headers(flight.hand_over()).unwrap();
        answering.piece(b"data: {\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n", false, 1_000);
        answering.piece(b"event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n", true, 1_000);
        assert_eq!(answering.over(&flight, 30, 1_000).usage, None);
    }

    #[test]
    fn a_rejected_credential_is_not_the_callers_fault() {
        let (mut answering, _) = admitted("{\"model\":\"gpt-4o\"}").forward();
        let head = AnswerHead { status: 401, ..AnswerHead::default() };
        assert_eq!(code(answering.headers(Some(head))), Code::ProviderCredentialRejected);
        assert!(answering.headers(None).is_ok(), "Envoy's own 401 would not be the provider's");
    }
}
