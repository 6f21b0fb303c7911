//! The gate: one request from its headers to its settlement. Each stage is a value that holds only what that stage
//! needs, and moving on consumes it. Nothing can be forwarded without the [`Permit`] that only an admission makes.

mod answering;
mod translating;

pub use answering::{Answering, HeaderEdits};

use crate::attempt::Flight;
use crate::body::{BodyError, BodyFacts, BodyReader, Splice};
use crate::credentials::{self, Found};
use crate::edge::{AdmitAnswer, AdmitRequest, Ask, Outcome, Plan, PlanTarget, RequestId, Settlement, VmId};
use crate::multipart::{MultipartReader, boundary};
use crate::operation::{Costs, Dialect, Form, MAX_REFS, NoTarget, OTHER, Site, Takes, Target, Tells, Upstream, find, upstream};
use crate::refusal::{Answer, Code, Refusal};
use crate::rewrite::Rewriting;
use crate::token::TokenHash;
use crate::trace::TraceContext;
use crate::usage::Looks;
use crate::watch;
use std::borrow::Cow;

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
    let target = find(method, path, query, anthropic_version);
    let dialect = match &target {
        Ok(target) => target.dialect,
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
        NoTarget::UnknownEndpoint(_) => refuse(Code::EndpointNotAllowed, "this is no path of an endpoint"),
    })?;
    if header(headers, "content-encoding").is_some_and(|e| !e.eq_ignore_ascii_case(b"identity")) {
        return Err(refuse(Code::BadRequest, "a request body must not be content-encoded"));
    }
    let announced = header(headers, "content-length").and_then(|n| std::str::from_utf8(n).ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limits.max_body_bytes) {
        return Err(too_large(dialect, limits, id));
    }
    let body = Body::expected(target.operation.takes, headers).map_err(|message| refuse(Code::BadRequest, message))?;
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

/// What reads the body.
#[derive(Debug)]
enum Body {
    Nothing,
    Json(Box<BodyReader>),
    Form(Box<MultipartReader>, String),
}

impl Body {
    /// By what the operation takes and, where it takes several, by what the headers announce.
    fn expected(takes: Takes, headers: &Headers<'_>) -> Result<Self, &'static str> {
        let announced = || header(headers, "content-type").unwrap_or_default();
        let form = || boundary(announced()).map(|boundary| Body::Form(Box::new(MultipartReader::new(&boundary)), boundary));
        match takes {
            Takes::Nothing => Ok(Body::Nothing),
            Takes::Json(form) => Ok(Body::Json(Box::new(BodyReader::new(form)))),
            Takes::Recording => form().ok_or("this endpoint takes multipart/form-data with a plain boundary"),
            Takes::Anything => {
                let kind = announced().split(|&b| b == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
                match kind.as_slice() {
                    b"" | b"application/json" => Ok(Body::Json(Box::new(BodyReader::new(Form::Other)))),
                    _ => form().ok_or("only JSON and multipart/form-data can be sent to this endpoint"),
                }
            }
        }
    }

    fn position(&self) -> u64 {
        match self {
            Body::Nothing => 0,
            Body::Json(reader) => reader.position(),
            Body::Form(reader, _) => reader.position(),
        }
    }

    fn feed(&mut self, piece: &[u8]) -> Result<(), String> {
        match self {
            Body::Nothing if piece.is_empty() => Ok(()),
            Body::Nothing => Err("this endpoint takes no request body".to_owned()),
            Body::Json(reader) => reader.feed(piece).map_err(|error| error.message()),
            Body::Form(reader, _) => reader.feed(piece).map_err(|error| error.message()),
        }
    }

    /// What the body told, and the content-type under which it goes on.
    fn finish(self, takes: Takes) -> Result<(BodyFacts, Option<Cow<'static, str>>), BodyError> {
        match self {
            Body::Nothing => Ok((BodyFacts::default(), None)),
            _ if takes == Takes::Anything && self.position() == 0 => Ok((BodyFacts::default(), None)),
            // A charset of the caller's would make another document of the bytes that the gate has read.
            Body::Json(reader) => Ok((reader.finish()?, Some(Cow::Borrowed("application/json")))),
            Body::Form(reader, boundary) => {
                Ok((reader.finish()?, Some(Cow::Owned(format!("multipart/form-data; boundary=\"{boundary}\"")))))
            }
        }
    }
}

/// Stage 2: the body is being read, in pieces.
#[derive(Debug)]
pub struct Reading {
    id: RequestId,
    token: TokenHash,
    target: Target,
    limits: Limits,
    body: Body,
    trace: Option<TraceContext>,
}

impl Reading {
    /// Bytes of the body read so far.
    pub fn position(&self) -> u64 {
        self.body.position()
    }

    pub fn dialect(&self) -> Dialect {
        self.target.dialect
    }

    pub fn piece(&mut self, piece: &[u8]) -> Result<(), Refused> {
        let room = self.limits.max_body_bytes.saturating_sub(self.position());
        let (fits, more) = piece.split_at_checked(usize::try_from(room).unwrap_or(usize::MAX)).unwrap_or((piece, &[]));
        // What is wrong before the limit is wrong wherever the body is cut.
        self.body.feed(fits).map_err(|message| self.bad_request(message))?;
        if more.is_empty() { Ok(()) } else { Err(too_large(self.dialect(), self.limits, self.id)) }
    }

    /// The body has ended: what is asked for is known.
    pub fn end(self) -> Result<Asking, Refused> {
        let Reading { id, token, target, body, trace, .. } = self;
        let operation = target.operation;
        let refuse = |message: String| bad_request(&target, id, message);
        let (mut facts, content_type) = body.finish(operation.takes).map_err(|error| refuse(error.message()))?;
        if facts.model.as_deref() == Some("") {
            return Err(refuse("\"model\" is required".to_owned()));
        }
        let named = target.model.clone().or_else(|| facts.model.clone());
        if named.is_none() && operation.needs_model() {
            return Err(refuse("\"model\" is required".to_owned()));
        }
        let model = named.or_else(|| operation.default_model().map(str::to_owned));
        facts.refs.extend(target.refs.iter().cloned());
        if facts.refs.len() > MAX_REFS {
            return Err(refuse(BodyError::TooManyReferences.message()));
        }
        let own_limit = facts.max_tokens(operation.limits()).map_err(|error| refuse(error.message()))?;
        let max_tokens = own_limit.or(operation.default_limit());
        Ok(Asking { id, token, target, facts, model, content_type, max_tokens, trace })
    }

    /// This worker can't take the request on now.
    pub fn busy(&self) -> Refused {
        let refusal = Refusal::new(Code::PolicyUnavailable, "this worker is at its limit; nothing was forwarded").retry_after(1);
        Refused { refusal, dialect: self.dialect(), request_id: self.id, asked: false }
    }

    fn bad_request(&self, message: String) -> Refused {
        bad_request(&self.target, self.id, message)
    }
}

fn bad_request(target: &Target, request_id: RequestId, message: String) -> Refused {
    Refused { refusal: Refusal::new(Code::BadRequest, message), dialect: target.dialect, request_id, asked: false }
}

/// Stage 3: the policy service has been asked.
#[derive(Debug)]
pub struct Asking {
    id: RequestId,
    token: TokenHash,
    target: Target,
    facts: BodyFacts,
    model: Option<String>,
    content_type: Option<Cow<'static, str>>,
    max_tokens: Option<u64>,
    trace: Option<TraceContext>,
}

/// What the service's yes means.
#[derive(Debug)]
pub enum Decided {
    Forward(Box<Admitted>),
    /// The service itself has answered.
    Answer(Told),
}

impl Asking {
    pub fn id(&self) -> RequestId {
        self.id
    }

    pub fn admit_request(&self, vm: VmId, node: String, need_key: bool) -> AdmitRequest {
        let facts = &self.facts;
        AdmitRequest {
            req: self.id,
            vm,
            node,
            token: self.token.0,
            need_key,
            trace: self.trace.as_ref().map(TraceContext::traceparent),
            ask: Ask {
                provider: self.target.provider.clone().unwrap_or_default(),
                dialect: self.target.dialect,
                endpoint: self.target.endpoint().into_owned(),
                model: self.model.clone(),
                stream: facts.stream,
                bytes: facts.bytes,
                max_tokens: self.max_tokens,
                choices: facts.choices,
                thinking_budget: facts.thinking_budget,
                images: facts.images,
                unbounded: facts.unbounded.map(str::to_owned),
                refs: facts.refs.clone(),
                history: facts.history,
                keeps: facts.background,
                texts: if facts.texts > 1 { facts.texts } else { 0 },
                characters: facts.characters,
                seconds: facts.seconds,
                size: facts.size.clone(),
                quality: facts.quality.clone(),
                partial_images: facts.partial_images,
                added: facts.added,
            },
        }
    }

    /// The service has answered. Anything but a plan that can be carried out is a refusal.
    pub fn answered(self, answer: Option<AdmitAnswer>) -> Result<Decided, Refused> {
        let (plan, refusal) = answer.map_or((None, None), |a| (a.plan, a.refusal));
        match (plan, refusal) {
            (Some(Plan { answer: Some(body), .. }), None) if self.target.operation.lists_models() => {
                Ok(Decided::Answer(Told { id: self.id, body }))
            }
            (Some(plan), None) if !self.target.operation.lists_models() => Ok(Decided::Forward(Box::new(self.admitted(plan)?))),
            (None, Some(refusal)) => Err(self.refused(refusal)),
            _ => Err(self.unavailable()),
        }
    }

    fn admitted(self, plan: Plan) -> Result<Admitted, Refused> {
        let aim = |target: &PlanTarget| {
            let site = target.site()?.into_owned();
            let upstream = upstream(&self.target, &site, target.model.as_deref(), self.facts.stream)?;
            Some(Aim { site, upstream })
        };
        // A plan that this version can't carry out, or that leads to another provider than the caller named.
        let elsewhere = |target: &PlanTarget| self.target.provider.as_ref().is_some_and(|named| *named != target.provider);
        let aims: Option<Vec<Aim>> = plan.targets.iter().map(aim).collect();
        let Some(aims) = aims.filter(|aims| !aims.is_empty() && !plan.targets.iter().any(elsewhere)) else {
            return Err(self.unavailable());
        };
        let (Some(first), Some(target)) = (aims.first(), plan.targets.first()) else { return Err(self.unavailable()) };
        let operation = self.target.operation;
        let may_store = operation.may_store() && first.site.stores_answers(operation.form());
        let creates = if operation == &OTHER {
            self.target.endpoint().starts_with("POST ")
        } else {
            may_store && plan.state && self.facts.lets_store()
        };
        let (stream, choices, body_bytes) = (self.facts.stream, self.facts.choices, self.facts.bytes);
        let include_usage = self.facts.include_usage;
        let rewriting = Rewriting { facts: self.facts, operation, max_tokens: self.max_tokens };
        let is_written_once = rewriting.is_written_once(&plan, &first.site, self.target.dialect);
        let splices = if is_written_once { rewriting.splices(&plan, target, &first.site) } else { Vec::new() };
        Ok(Admitted {
            body_bytes,
            splices,
            clamp: plan.clamp,
            include_usage,
            stream,
            choices,
            creates,
            rewriting: (!is_written_once).then(|| Box::new(rewriting)),
            permit: Permit { id: self.id, target: self.target, content_type: self.content_type, plan, aims },
        })
    }

    /// Nobody answered in time: nothing is forwarded, and the service is told so.
    pub fn unavailable(&self) -> Refused {
        self.refused(Refusal::new(Code::PolicyUnavailable, "the policy service did not answer; nothing was forwarded").retry_after(1))
    }

    pub fn dialect(&self) -> Dialect {
        self.target.dialect
    }

    fn refused(&self, refusal: Refusal) -> Refused {
        Refused { refusal, dialect: self.dialect(), request_id: self.id, asked: true }
    }
}

/// What the caller of a running request is told that must end, as long as it has seen nothing of an answer.
pub fn ended(code: Code, dialect: Dialect, request_id: RequestId) -> Refused {
    Refused { refusal: watch::refusal(code), dialect, request_id, asked: true }
}

/// The right to forward one request. Only [`Asking::answered`] makes one.
#[derive(Debug)]
pub struct Permit {
    id: RequestId,
    target: Target,
    content_type: Option<Cow<'static, str>>,
    plan: Plan,
    /// How each of the plan's targets is reached.
    aims: Vec<Aim>,
}

/// How a target is reached.
#[derive(Debug)]
pub struct Aim {
    pub site: Site,
    pub upstream: Upstream,
}

impl Permit {
    pub fn id(&self) -> RequestId {
        self.id
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The content-type of what was read; `None`: there is no body.
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How one of the plan's targets is reached.
    pub fn aim(&self, target: usize) -> Option<&Aim> {
        self.aims.get(target)
    }

    /// The provider of one of the plan's targets: also the name by which the router knows its cluster.
    pub fn provider(&self, target: usize) -> &str {
        self.plan.targets.get(target).map(|target| target.provider.as_str()).unwrap_or_default()
    }
}

/// An answer that the service gave in the provider's place.
#[derive(Debug, PartialEq, Eq)]
pub struct Told {
    pub id: RequestId,
    /// JSON.
    pub body: String,
}

impl Told {
    pub fn answer(&self) -> Answer {
        let headers = vec![("content-type", "application/json".to_owned()), ("x-keyward-request-id", self.id.to_string())];
        Answer { status: 200, headers, body: self.body.clone() }
    }

    /// The record of a request that was answered without a provider.
    pub fn settlement(&self, ms: u64, at: u64) -> Settlement {
        Settlement { outcome: Outcome::Complete, ..void(self.id, ms, at) }
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
    /// The body is written anew for each try, from what it told.
    rewriting: Option<Box<Rewriting>>,
    include_usage: bool,
    stream: bool,
    choices: u64,
    creates: bool,
}

impl Admitted {
    /// The request goes on: its permit becomes a flight, which the attempts work from.
    pub fn forward(self, replayable: bool) -> (Answering, Flight) {
        let target = &self.permit.target;
        let operation = target.operation;
        // Every picture of a stream tells its own usage: of several, the sum is not known.
        let tells_nothing = operation.costs == Costs::Images && self.stream && self.choices > 1;
        let deletes = target.endpoint().starts_with("DELETE ") && target.refs.len() == 1;
        let answering = Answering {
            looks: Looks { tells: if tells_nothing { Tells::Nothing } else { operation.tells }, ids: self.creates },
            is_text: !operation.limits().is_empty(),
            form: operation.form(),
            is_response: operation.name == "responses",
            deletes: target.refs.first().filter(|_| deletes).cloned(),
            dialect: target.dialect,
            id: self.permit.id,
            clamp: self.clamp,
            headroom: self.permit.plan.headroom,
            adds_usage: operation.asks_for_usage() && self.stream && !self.include_usage,
            stream: self.stream,
            output_limit: self.permit.plan.output_limit,
            beyond: false,
            meter: None,
            translating: None,
            complete: false,
            breaking: None,
        };
        (answering, Flight::new(self.permit, replayable, self.rewriting))
    }
}

/// The record of a gate that gave up before anything was forwarded.
pub fn void(id: RequestId, ms: u64, at: u64) -> Settlement {
    Settlement {
        req: id,
        outcome: Outcome::Void,
        ended: None,
        sent: false,
        status: None,
        usage: None,
        input: None,
        visible: None,
        beyond: false,
        tries: Vec::new(),
        created: Vec::new(),
        deleted: None,
        ms,
        at,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::attempt::{Begun, Clocks, Next, RequestEdits};
    use crate::edge::{PlanCredential, Secret};
    use crate::keyring::Keyring;
    use crate::meter::Passed;
    use crate::ring::shared::Shared;
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
        asking_at(&[], body)
    }

    fn asking_at(extra: &[(&str, &str)], body: &str) -> Result<Asking, Refused> {
        let mut reading = with_headers(extra, |headers| request_headers(headers, LIMITS, RequestId([9; 16])))?;
        reading.piece(body.as_bytes())?;
        reading.end()
    }

    fn ask_at(extra: &[(&str, &str)], body: &str) -> Ask {
        asking_at(extra, body).unwrap().admit_request(VmId([1; 16]), String::new(), false).ask
    }

    pub(crate) fn plan(clamp: Option<u64>) -> Plan {
        let credential = PlanCredential { id: "cred_a".into(), secret: Secret("sk-real".into()), account: None };
        let target = PlanTarget {
            provider: "openai".into(),
            model: Some("gpt-4o".into()),
            credentials: vec![credential],
            max_output: None,
            site: None,
        };
        Plan {
            key: "key_1".into(),
            rev: 1,
            clamp,
            expires_ms: None,
            output_limit: None,
            state: false,
            headroom: None,
            prompt: false,
            answer: None,
            wait_ms: 0,
            in_order: false,
            drops: false,
            first_byte_ms: None,
            targets: vec![target],
        }
    }

    fn admitted(body: &str) -> Admitted {
        admitted_at(&[], body, plan(None))
    }

    pub(crate) fn admitted_at(extra: &[(&str, &str)], body: &str, plan: Plan) -> Admitted {
        match asking_at(extra, body).unwrap().answered(Some(AdmitAnswer { plan: Some(plan), ..AdmitAnswer::default() })).unwrap() {
            Decided::Forward(admitted) => *admitted,
            Decided::Answer(told) => panic!("{told:?}"),
        }
    }

    fn messages(body: &str) -> Admitted {
        let mut plan = plan(None);
        plan.targets[0].provider = "anthropic".into();
        admitted_at(&[(":path", "/v1/messages")], body, plan)
    }

    const CLOCKS: Clocks = Clocks { now_ms: 30, unix_ms: 1_000 };

    /// The request after a provider's answer to its first try, whose headers came after so many milliseconds.
    fn answered(admitted: Admitted, headers: &Headers<'_>, after_ms: u64) -> (Answering, Flight) {
        let (mut answering, mut flight) = admitted.forward(true);
        let (mut ring, shared) = (Keyring::default(), Shared::default());
        flight.begin(&mut ring, &shared, &[], 0);
        let clocks = Clocks { now_ms: after_ms, unix_ms: 1_000 };
        if flight.answered(&mut ring, &shared, headers, clocks).1 == Next::ReadBody {
            flight.judge(&mut ring, &shared, headers, b"", clocks);
        }
        answering.headers(&mut flight, 1_000).unwrap();
        (answering, flight)
    }

    /// The headers of a try on a request with these.
    fn begun(flight: &mut Flight, extra: &[(&str, &str)]) -> RequestEdits {
        match with_headers(extra, |headers| flight.begin(&mut Keyring::default(), &Shared::default(), headers, 0)) {
            Begun::Go(edits) => edits,
            other => panic!("{other:?}"),
        }
    }

    /// The body that goes on.
    fn forwarded(admitted: &Admitted, body: &str) -> serde_json::Value {
        let mut out = Vec::new();
        crate::body::splice_piece(body.as_bytes(), 0, &admitted.splices, &mut out);
        serde_json::from_slice(&out).unwrap()
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
        assert_eq!(at(&[(":path", "/No.where/v1/x")]), Code::UnknownProvider);
        assert_eq!(at(&[(":path", "/v1//files")]), Code::EndpointNotAllowed);
        assert_eq!(at(&[(":path", "/v1/audio/transcriptions")]), Code::BadRequest);
        assert_eq!(at(&[(":path", "/v1/files"), ("content-type", "application/x-www-form-urlencoded")]), Code::BadRequest);
        assert_eq!(at(&[("content-encoding", "gzip")]), Code::BadRequest);
        assert_eq!(at(&[("content-length", "1001")]), Code::BodyTooLarge);
        assert_eq!(code(asking("{\"model\":\"a\",\"model\":\"b\"}")), Code::BadRequest);
        assert_eq!(code(asking("{}")), Code::BadRequest);
        assert_eq!(code(asking("")), Code::BadRequest);
        assert_eq!(code(asking(&format!("{{\"a\":\"{}", "x".repeat(995)))), Code::BodyTooLarge);
        assert_eq!(code(asking(&"x".repeat(1_001))), Code::BadRequest, "wherever it is cut");
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
        for (path, provider) in
            [("/openai/v1/chat/completions", "anthropic"), ("/v1/chat/completions", "nobody"), ("/v1/responses", "gemini")]
        {
            let mut elsewhere = plan(None);
            elsewhere.targets[0].provider = provider.into();
            let answer = AdmitAnswer { plan: Some(elsewhere), ..AdmitAnswer::default() };
            let asking = asking_at(&[(":path", path)], "{\"model\":\"gpt-4o\"}").unwrap();
            assert_eq!(code(asking.answered(Some(answer))), Code::PolicyUnavailable, "{path}");
        }
    }

    #[test]
    fn each_try_overwrites_every_credential_header() {
        let (_, mut flight) = admitted("{\"model\":\"gpt-4o\"}").forward(true);
        let left = [("x-api-key", "left by an earlier try"), ("x-forwarded-for", "10.0.0.1"), ("x-other", "stays")];
        let edits = begun(&mut flight, &left);
        assert!(edits.set.contains(&("authorization", "Bearer sk-real".into())));
        assert!(edits.set.contains(&(":authority", "api.openai.com".into())));
        assert_eq!(edits.remove, [b"x-api-key".to_vec(), b"x-forwarded-for".to_vec()]);
        let edits = begun(&mut flight, &[(":path", "/openai/v1/chat/completions?key=x")]);
        assert!(edits.set.contains(&(":path", "/v1/chat/completions".into())));
        let headers: &Headers<'_> = &[(b":status", b"200"), (b"x-echo", b"Bearer sk-real"), (b"x-keyward-retry", b"1")];
        let (leaks, next) = flight.answered(&mut Keyring::default(), &Shared::default(), headers, CLOCKS);
        assert_eq!((leaks, next), (vec![b"x-echo".to_vec(), b"x-keyward-retry".to_vec()], Next::Pass));
        assert_eq!(flight.hand_over().map(|head| head.status), Some(200));
        assert_eq!(flight.hand_over(), None, "a later answer is not the provider's");
    }

    #[test]
    fn a_stream_is_asked_for_usage_and_settles_it() {
        let admitted = admitted("{\"model\":\"gpt-4o\",\"stream\":true}");
        assert_eq!(admitted.splices.len(), 1);
        let (mut answering, flight) = answered(admitted, STREAM, 7);
        let usage = b"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}\n\n";
        assert_eq!(answering.piece(usage, false, 1_000), Passed::Instead(Vec::new()));
        answering.piece(b"data: [DONE]\n\n", true, 1_000);
        let settled = answering.over(&flight, 30, CLOCKS);
        assert_eq!((settled.outcome, settled.status, settled.sent), (Outcome::Complete, Some(200), true));
        assert_eq!(settled.usage, Some(Usage { input: 3, output: 4, ..Usage::default() }));
        assert_eq!((settled.tries[0].status, settled.tries[0].ms), (Some(200), 7));
    }

    #[test]
    fn a_cut_anthropic_stream_tells_its_input_only() {
        let (mut answering, flight) = answered(messages("{\"model\":\"gpt-4o\",\"stream\":true}"), STREAM, 1);
        answering.piece(b"data: {\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n", false, 1_000);
        let settled = answering.over(&flight, 30, CLOCKS);
        assert_eq!((settled.outcome, settled.usage), (Outcome::Cut, None));
        assert_eq!(settled.input.map(|u| (u.input, u.output)), Some((25, 0)));
    }

    /// An error in the middle of an Anthropic stream ends it whole, but the usage told so far is only its beginning.
    #[test]
    fn a_stream_that_ends_in_an_error_tells_no_final_usage() {
        let (mut answering, flight) = answered(messages("{\"model\":\"gpt-4o\",\"stream\":true}"), STREAM, 1);
        answering.piece(b"data: {\"message\":{\"usage\":{\"input_tokens\":25,\"output_tokens\":1}}}\n\n", false, 1_000);
        answering.piece(b"event: error\ndata: {\"type\":\"error\",\"error\":{}}\n\n", true, 1_000);
        assert_eq!(answering.over(&flight, 30, CLOCKS).usage, None);
    }

    const CHUNK: &[u8] = b"data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n";

    fn streaming(admitted: Admitted) -> (Answering, Flight) {
        answered(admitted, STREAM, 1)
    }

    #[test]
    fn a_broken_off_stream_says_why_and_settles_as_cut() {
        let chat = || streaming(admitted("{\"model\":\"gpt-4o\",\"stream\":true}"));
        let (mut answering, flight) = chat();
        answering.piece(CHUNK, false, 1_000);
        answering.break_off(Code::Revoked);
        answering.break_off(Code::Expired);
        let Passed::Instead(out) = answering.piece(CHUNK, false, 1_000) else { panic!("it passed") };
        let text = String::from_utf8(out).unwrap();
        let data: serde_json::Value = serde_json::from_str(text.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!((data["error"]["code"].as_str(), answering.has_said_so()), (Some("revoked"), true));
        assert_eq!(answering.piece(CHUNK, false, 1_000), Passed::Instead(Vec::new()));
        let settled = answering.over(&flight, 30, CLOCKS);
        assert_eq!((settled.outcome, settled.ended, settled.visible), (Outcome::Cut, Some(Code::Revoked), Some(6)));

        let (mut answering, flight) = chat();
        answering.break_off(Code::Revoked);
        answering.ended();
        assert_eq!(answering.over(&flight, 30, CLOCKS).ended, None, "it came whole before that");
    }

    #[test]
    fn each_dialect_has_its_own_error_event() {
        let said = |(mut answering, _): (Answering, Flight)| {
            answering.break_off(Code::Expired);
            let Passed::Instead(out) = answering.piece(b"", false, 1_000) else { panic!("nothing") };
            let text = String::from_utf8(out).unwrap();
            let (event, data) = text.strip_prefix("event: error\n").unwrap().split_once("data: ").unwrap();
            assert_eq!(event, "");
            serde_json::from_str::<serde_json::Value>(data).unwrap()
        };
        let claude = said(streaming(messages("{\"model\":\"gpt-4o\",\"stream\":true}")));
        assert_eq!((claude["type"].as_str(), claude["error"]["type"].as_str()), (Some("error"), Some("authentication_error")));
        let response = admitted_at(&[(":path", "/v1/responses")], r#"{"model":"gpt-4o","stream":true,"input":"hi"}"#, plan(None));
        let response = said(streaming(response));
        assert_eq!((response["type"].as_str(), response["code"].as_str()), (Some("error"), Some("expired")));
        assert_eq!(response["error"]["code"], "expired");
    }

    #[test]
    fn a_stream_that_runs_away_is_broken_off() {
        let limited = |limit| {
            let plan = Plan { output_limit: limit, ..plan(None) };
            streaming(admitted_at(&[], "{\"model\":\"gpt-4o\",\"stream\":true}", plan)).0
        };
        let long = format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{}\"}}}}]}}\n\n", "x".repeat(4_200));
        for (limit, code) in [(Some(6), Some(Code::CapExhausted)), (Some(7), None), (None, None)] {
            let mut answering = limited(limit);
            assert_eq!(answering.piece(long.as_bytes(), false, 1_000), Passed::AsIs, "what has come has come");
            assert_eq!(answering.breaks_off(), code, "{limit:?}");
        }
    }

    #[test]
    fn nothing_is_kept_unless_the_policy_says_so() {
        let responses = [(":path", "/v1/responses")];
        for (extra, body) in [
            (&responses[..], r#"{"model":"gpt-4o","input":"hi"}"#),
            (&responses, r#"{"store":true,"model":"gpt-4o","input":"hi"}"#),
            (&responses, r#"{"model":"gpt-4o","store":null}"#),
            (&[], r#"{"model":"gpt-4o","store":true}"#),
            (&[], r#"{"model":"gpt-4o"}"#),
        ] {
            let kept = admitted_at(extra, body, Plan { state: true, ..plan(None) });
            assert_eq!(forwarded(&kept, body).get("store"), serde_json::from_str::<serde_json::Value>(body).unwrap().get("store"));
            assert!(kept.creates, "{body}");
            let admitted = admitted_at(extra, body, plan(None));
            assert_eq!(forwarded(&admitted, body)["store"], false, "{body}");
            assert!(!admitted.creates);
        }
        let own_wish = admitted_at(&responses, r#"{"model":"gpt-4o","store":false}"#, Plan { state: true, ..plan(None) });
        assert!(!own_wish.creates);
        let body = r#"{"model":"gpt-4o"}"#;
        assert!(forwarded(&messages(body), body).get("store").is_none(), "Anthropic knows no such field");
    }

    /// A project's settings must not choose the price; a request may, where the key has no budget.
    #[test]
    fn the_service_tier_is_the_one_that_was_priced() {
        let tier = |body: &str| forwarded(&admitted(body), body)["service_tier"].clone();
        for (body, expected) in [
            (r#"{"model":"gpt-4o"}"#, "default"),
            (r#"{"model":"gpt-4o","service_tier":"auto"}"#, "default"),
            (r#"{"model":"gpt-4o","service_tier":"priority"}"#, "priority"),
        ] {
            assert_eq!(tier(body), expected, "{body}");
        }
        let body = r#"{"model":"claude-opus-4-6","max_tokens":5}"#;
        assert!(forwarded(&messages(body), body).get("service_tier").is_none(), "Anthropic's auto costs no more than the list");
        let body = r#"{"model":"text-embedding-3-small","input":"x"}"#;
        let embedding = admitted_at(&[(":path", "/v1/embeddings")], body, plan(None));
        assert!(forwarded(&embedding, body).get("service_tier").is_none());
    }

    /// A hold rests on a limit that stands in the body: of legacy completions, the provider's own default.
    #[test]
    fn a_default_limit_is_written_down() {
        let body = r#"{"model":"gpt-3.5-turbo-instruct","prompt":["a","b"],"n":2}"#;
        let admitted = admitted_at(&[(":path", "/v1/completions")], body, plan(None));
        assert_eq!(forwarded(&admitted, body)["max_tokens"], 16);
        let ask = ask_at(&[(":path", "/v1/completions")], body);
        assert_eq!((ask.max_tokens, ask.choices, ask.texts), (Some(16), 4, 2));
        let own = r#"{"model":"m","prompt":"a","max_tokens":5}"#;
        assert_eq!(forwarded(&admitted_at(&[(":path", "/v1/completions")], own, plan(None)), own)["max_tokens"], 5);
    }

    #[test]
    fn a_model_that_goes_without_saying_is_said() {
        let body = r#"{"input":"x"}"#;
        let ask = ask_at(&[(":path", "/v1/moderations")], body);
        assert_eq!(ask.model.as_deref(), Some("omni-moderation-latest"));
        let mut named = plan(None);
        named.targets[0].model = ask.model;
        assert_eq!(forwarded(&admitted_at(&[(":path", "/v1/moderations")], body, named), body)["model"], "omni-moderation-latest");
        assert_eq!(code(asking_at(&[(":path", "/v1/embeddings")], body)), Code::BadRequest);
    }

    #[test]
    fn references_of_path_and_body_are_asked_together() {
        let body = r#"{"model":"gpt-4o","previous_response_id":"resp_1","input":[{"type":"item_reference","id":"msg_2"}]}"#;
        let ask = ask_at(&[(":path", "/v1/responses")], body);
        assert_eq!((ask.refs, ask.history), (vec!["resp_1".to_owned(), "msg_2".to_owned()], true));
        let other = ask_at(&[(":path", "/v1/vector_stores/vs_1/files")], r#"{"file_id":"file-Ab12"}"#);
        assert_eq!((other.endpoint.as_str(), other.refs.len()), ("POST /v1/vector_stores/vs_1/files", 2));
        let get = ask_at(&[(":method", "GET"), (":path", "/v1/responses/resp_9"), ("content-type", "application/json")], "");
        assert_eq!((get.endpoint.as_str(), get.refs), ("GET /v1/responses/{id}", vec!["resp_9".to_owned()]));
        let many: Vec<String> = (0..65).map(|n| format!("{{\"type\":\"item_reference\",\"id\":\"i{n}\"}}")).collect();
        let limits = Limits { max_body_bytes: 100_000 };
        let mut reading = with_headers(&[(":path", "/v1/responses")], |h| request_headers(h, limits, RequestId([9; 16]))).unwrap();
        let body = format!("{{\"model\":\"m\",\"input\":[{}]}}", many.join(","));
        assert_eq!(code(reading.piece(body.as_bytes())), Code::BadRequest);
    }

    #[test]
    fn what_the_provider_made_is_told() {
        let stored = |body: &str| admitted_at(&[(":path", "/v1/responses")], body, Plan { state: true, ..plan(None) });
        let (mut answering, flight) = answered(stored(r#"{"model":"gpt-4o","stream":true}"#), STREAM, 1);
        for event in [
            r#"{"type":"response.created","response":{"id":"resp_7","output":[],"usage":null,"error":null}}"#,
            r#"{"type":"response.output_text.delta","item_id":"msg_8","delta":"Hello"}"#,
            r#"{"type":"response.completed","response":{"id":"resp_7","output":[{"id":"msg_8","type":"message"}],
                "usage":{"input_tokens":30,"input_tokens_details":{"cached_tokens":10},"output_tokens":5,"output_tokens_details":{"reasoning_tokens":2}}}}"#,
        ] {
            answering.piece(format!("event: x\ndata: {}\n\n", event.replace('\n', "")).as_bytes(), false, 1_000);
        }
        let settled = answering.over(&flight, 30, CLOCKS);
        assert_eq!(settled.created, ["resp_7", "msg_8"]);
        assert_eq!(settled.usage, Some(Usage { input: 20, cache_read: 10, output: 5, reasoning: 2, ..Usage::default() }));
        assert_eq!(settled.outcome, Outcome::Cut, "usage is final although the stream was cut after it");

        let (mut answering, flight) =
            answered(stored(r#"{"model":"gpt-4o"}"#), &[(b":status", b"400"), (b"content-type", b"application/json")], 1);
        answering.piece(br#"{"id":"resp_7"}"#, true, 1_000);
        assert_eq!(answering.over(&flight, 30, CLOCKS).created, [""; 0], "an error makes nothing");
    }

    #[test]
    fn what_the_provider_deleted_is_told() {
        let delete = [(":method", "DELETE"), (":path", "/v1/responses/resp_7")];
        for (status, gone) in [("200", Some("resp_7".to_owned())), ("404", None)] {
            let (mut answering, flight) = answered(admitted_at(&delete, "", plan(None)), &[(b":status", status.as_bytes())], 1);
            answering.ended();
            assert_eq!(answering.over(&flight, 30, CLOCKS).deleted, gone);
        }
    }

    #[test]
    fn the_service_answers_for_models_and_for_nothing_else() {
        let told = |extra: &[(&str, &str)], body: &str, answer: Option<&str>| {
            let plan = Plan { answer: answer.map(str::to_owned), ..plan(None) };
            asking_at(extra, body).unwrap().answered(Some(AdmitAnswer { plan: Some(plan), ..AdmitAnswer::default() }))
        };
        let models = [(":method", "GET"), (":path", "/v1/models")];
        let Ok(Decided::Answer(list)) = told(&models, "", Some("{}")) else { panic!("no answer") };
        assert_eq!((list.answer().status, list.answer().body.as_str()), (200, "{}"));
        assert!(!list.settlement(1, 2).sent);
        assert_eq!(code(told(&models, "", None)), Code::PolicyUnavailable, "a list never comes from the provider");
        let chat = told(&[], r#"{"model":"gpt-4o"}"#, Some("{}"));
        assert!(matches!(chat, Ok(Decided::Forward(_)) | Err(_)));
        assert!(!matches!(chat, Ok(Decided::Answer(_))));
    }

    #[test]
    fn a_form_goes_on_as_a_form() {
        let form = "--X1\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--X1\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nOggS\r\n--X1--\r\n";
        let transcription = [(":path", "/v1/audio/transcriptions"), ("content-type", "multipart/form-data; boundary=X1")];
        let ask = ask_at(&transcription, form);
        assert_eq!((ask.model.as_deref(), ask.seconds, ask.bytes), (Some("whisper-1"), None, form.len() as u64));
        let mut routed = plan(None);
        routed.targets[0].model = Some("other".into());
        let admitted = admitted_at(&transcription, form, routed);
        let mut out = Vec::new();
        crate::body::splice_piece(form.as_bytes(), 0, &admitted.splices, &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), form.replace("whisper-1", "other"));
        let (_, mut flight) = admitted.forward(true);
        let edits = begun(&mut flight, &transcription);
        assert!(edits.set.contains(&("content-type", "multipart/form-data; boundary=\"X1\"".into())));
    }
}
