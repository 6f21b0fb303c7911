//! The provider's side: from a request to its answer, with every step written down.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, Version};

use crate::answer::{self, Answer, Asked};
use crate::anthropic;
use crate::body::SimBody;
use crate::connection::Connection;
use crate::credentials::{Credential, Quota, State};
use crate::directive::{Directive, Found};
use crate::frames::{self, Frame};
use crate::ledger::{Ended, Entry};
use crate::listing;
use crate::openai;
use crate::provider::{ApiError, Provider};
use crate::reply::{Reply, header};
use crate::shared::Shared;
use crate::text::{identifier, unix_us};
use crate::ticket::{Bill, Ticket};
use crate::violations;

const LARGEST_REQUEST: usize = 64 * 1024 * 1024;
const DEFAULT_PER_DELTA: u64 = 3;

/// Answers one request. Never fails: what goes wrong is the provider's answer.
pub async fn answer(shared: Arc<Shared>, connection: Arc<Connection>, request: Request<Incoming>) -> Result<Response<SimBody>, Infallible> {
    let (parts, body) = request.into_parts();
    let provider = addressed(&parts);
    let seq = shared.ledger.begin(opening_entry(&shared, &parts, provider));
    let mut ticket = Ticket::new(Arc::clone(&shared), connection, seq);
    let lines = if shared.bench { Vec::new() } else { header_lines(&parts, ticket.connection()) };
    let mut reply = Reply::new(provider);

    let body = match receive(&parts, body, &ticket).await {
        Ok(body) => body,
        Err(error) => {
            ticket.close(Ended::ClientGone);
            return Ok(reply.refuse(ticket, &error));
        }
    };
    inspect(&parts, provider, lines, &body, &ticket);
    let served = serve(&parts, &body, &mut reply, &mut ticket);
    if let Some(wait) = reply.wait_ms {
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
    Ok(match served {
        Ok(Served::Document(text)) => reply.document(ticket, text),
        Ok(Served::Generation(generation)) => generate(&mut reply, ticket, &generation),
        Err(error) => reply.refuse(ticket, &error),
    })
}

enum Served {
    /// A list of models or one of them.
    Document(String),
    Generation(Box<Generation>),
}

struct Generation {
    asked: Asked,
    answer: Answer,
    script: Directive,
    response_id: String,
}

/// Which provider a request is meant for: the path tells, else the headers only Anthropic's clients send.
fn addressed(parts: &Parts) -> Provider {
    let path = parts.uri.path();
    let claude = parts.headers.contains_key("anthropic-version") || parts.headers.contains_key("x-api-key");
    if path.starts_with("/v1/messages") || (claude && !path.starts_with("/v1/chat/")) { Provider::Anthropic } else { Provider::Openai }
}

fn opening_entry(shared: &Shared, parts: &Parts, provider: Provider) -> Entry {
    let header_names = if shared.bench { Vec::new() } else { parts.headers.keys().map(|name| name.as_str().to_owned()).collect() };
    Entry {
        seq: 0,
        provider,
        credential: None,
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        model: None,
        stream: false,
        status: None,
        started_unix_us: unix_us(),
        ended_unix_us: None,
        prompt_tokens: 0,
        completion_tokens: 0,
        reasoning_tokens: 0,
        cache_read_tokens: 0,
        cache_write_tokens: 0,
        cost_nanodollars: 0,
        ended: None,
        http_version: if parts.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
        client_request_id: header(&parts.headers, "x-client-request-id").map(str::to_owned),
        header_names,
        body_sha256: None,
        response_id: None,
        body_bytes: 0,
    }
}

/// The header lines as they were sent; over HTTP/2, which has no lines, as they were decoded.
fn header_lines(parts: &Parts, connection: &Connection) -> Vec<(String, String)> {
    let wire = if parts.version == Version::HTTP_2 { None } else { connection.take_head() };
    wire.unwrap_or_else(|| {
        let decoded = parts.headers.iter();
        let mut lines: Vec<(String, String)> =
            decoded.map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())).collect();
        if let Some(authority) = parts.uri.authority() {
            lines.insert(0, (":authority".into(), authority.to_string()));
        }
        lines
    })
}

async fn receive(parts: &Parts, body: Incoming, ticket: &Ticket) -> Result<Bytes, ApiError> {
    let announced: Option<u64> = header(&parts.headers, "content-length").and_then(|length| length.parse().ok());
    match Limited::new(body, LARGEST_REQUEST).collect().await {
        Ok(collected) => {
            let body = collected.to_bytes();
            let received = body.len() as u64;
            if announced.is_some_and(|announced| announced != received) {
                ticket.violation(format!("body_length: announced {}, got {received}", announced.unwrap_or(0)));
            }
            Ok(body)
        }
        Err(error) => {
            if let Some(announced) = announced {
                ticket.violation(format!("body_length: announced {announced}, got less"));
            }
            let status = if error.is::<http_body_util::LengthLimitError>() { 413 } else { 400 };
            Err(ApiError::new(status, "invalid_request_error", "The request body could not be read"))
        }
    }
}

/// Looks for what should not be there, and keeps what tests may want to see.
fn inspect(parts: &Parts, provider: Provider, lines: Vec<(String, String)>, body: &Bytes, ticket: &Ticket) {
    let shared = ticket.shared();
    let digest = (!shared.bench).then(|| digest(body));
    shared.ledger.update(ticket.seq, |entry| {
        entry.body_bytes = body.len() as u64;
        entry.body_sha256 = digest;
    });
    if shared.bench {
        return;
    }
    let credentials = shared.credentials();
    let target = parts.uri.path_and_query().map_or("", |target| target.as_str());
    let received = violations::Received { provider, target, headers: &lines, body };
    for what in violations::of(&received, &credentials) {
        ticket.violation(what);
    }
    let redacted = lines.into_iter().map(|(name, value)| (name, credentials.redact(&value))).collect();
    shared.ledger.capture(ticket.seq, redacted, body);
}

fn digest(body: &[u8]) -> String {
    use sha2::Digest;
    use std::fmt::Write;
    sha2::Sha256::digest(body).iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a String can't fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn serve(parts: &Parts, body: &Bytes, reply: &mut Reply, ticket: &mut Ticket) -> Result<Served, ApiError> {
    let path = parts.uri.path();
    let provider = reply.provider;
    let generates = match (&parts.method, path) {
        (&Method::POST, "/v1/chat/completions" | "/v1/messages") => true,
        (&Method::GET, "/v1/models") => false,
        (&Method::GET, path) if path.starts_with("/v1/models/") => false,
        _ => return Err(unknown_url(provider, parts)),
    };
    let credential = authenticate(parts, provider, ticket)?;
    let version = header(&parts.headers, "anthropic-version");
    if provider == Provider::Anthropic {
        anthropic::request::check_version(version)?;
    }
    if !generates {
        let name = path.strip_prefix("/v1/models/");
        return listing::models(provider, name).map(Served::Document);
    }
    if header(&parts.headers, "content-encoding").is_some_and(|coding| coding != "identity") {
        return Err(ApiError::invalid("Compressed request bodies are not supported"));
    }
    let asked = match provider {
        Provider::Openai => openai::request::parse(body),
        Provider::Anthropic => anthropic::request::parse(body, version.unwrap_or_default()),
    };
    let asked = asked?;
    generation(asked, &credential, reply, ticket).map(|generation| Served::Generation(Box::new(generation)))
}

fn authenticate(parts: &Parts, provider: Provider, ticket: &mut Ticket) -> Result<Arc<Credential>, ApiError> {
    let bearer = header(&parts.headers, "authorization")
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, secret)| secret.trim());
    let own = header(&parts.headers, "x-api-key").filter(|_| provider == Provider::Anthropic);
    let secret = match (own.or(bearer), provider) {
        (Some(secret), _) => secret,
        (None, Provider::Openai) => return Err(openai::error::missing_key()),
        (None, Provider::Anthropic) => return Err(anthropic::error::missing_key()),
    };
    let refused = || match provider {
        Provider::Openai => openai::error::bad_key(secret),
        Provider::Anthropic => anthropic::error::bad_key(own.is_none()),
    };
    let credentials = ticket.shared().credentials();
    let known = credentials.by_secret(secret).filter(|credential| credential.provider == provider);
    let credential = Arc::clone(known.ok_or_else(refused)?);
    ticket.credential = Some(Arc::clone(&credential));
    ticket.shared().ledger.update(ticket.seq, |entry| entry.credential = Some(Arc::clone(&credential.id)));
    let error = match (credential.state(), provider) {
        (State::Ok, _) => return Ok(credential),
        (State::Invalid, _) => refused(),
        (State::InsufficientQuota, Provider::Openai) => openai::error::insufficient_quota(),
        (State::InsufficientQuota, Provider::Anthropic) => anthropic::error::insufficient_quota(),
        (State::Overloaded, Provider::Openai) => openai::error::overloaded(),
        (State::Overloaded, Provider::Anthropic) => anthropic::error::overloaded(),
    };
    Err(error)
}

/// Decides the whole answer, and charges the credential's window for it.
fn generation(asked: Asked, credential: &Credential, reply: &mut Reply, ticket: &mut Ticket) -> Result<Generation, ApiError> {
    let shared = Arc::clone(ticket.shared());
    shared.ledger.update(ticket.seq, |entry| {
        entry.model = Some(asked.model.name.into());
        entry.stream = asked.stream;
    });
    let complain = |error| ApiError::invalid(format!("provider-sim directive: {error}"));
    let found = Directive::find(&asked.last_user).map_err(complain)?;
    let (mut script, said) = match found {
        None => (Directive::default(), asked.last_user.clone()),
        Some(found) => {
            let said = around(&asked.last_user, &found);
            (found.directive, said)
        }
    };
    if let Some(fault) = shared.faults.take(&credential.id, asked.model) {
        script = fault.or(script);
    }
    reply.wait_ms = script.first_ms;
    let answer = answer::compose(&asked, &script, &said, shared.bench);
    let (quota, exceeded) = credential.take(answer.usage.prompt + answer.usage.completion, Instant::now());
    reply.quota = Some(quota);
    if let Some(exceeded) = exceeded {
        let error = match credential.provider {
            Provider::Openai => openai::error::rate_limited(asked.model.snapshot, exceeded.what, exceeded.limit, exceeded.wait_ms),
            Provider::Anthropic => anthropic::error::rate_limited(exceeded.what, exceeded.limit, exceeded.wait_ms),
        };
        return Err(error);
    }
    let scripted = match credential.provider {
        Provider::Openai => openai::error::scripted(&script, &credential.secret, asked.model),
        Provider::Anthropic => anthropic::error::scripted(&script, asked.model),
    };
    if let Some(error) = scripted {
        reply.quota = match (error.status, error.code.as_deref()) {
            (_, Some("insufficient_quota")) | (401 | 403, _) => None,
            (429, _) => {
                let reset_ms = error.retry_after.unwrap_or(1) * 1000;
                Some(Quota { remaining_requests: 0, remaining_tokens: 0, reset_ms, ..quota })
            }
            _ => Some(quota),
        };
        return Err(error);
    }
    ticket.bill = Some(Bill { model: asked.model, usage: answer.usage, stream: asked.stream, produced: 0 });
    let response_id = match credential.provider {
        Provider::Openai => identifier("chatcmpl-", 29),
        Provider::Anthropic => identifier("msg_01", 22),
    };
    shared.ledger.update(ticket.seq, |entry| entry.response_id = Some(response_id.clone()));
    Ok(Generation { asked, answer, script, response_id })
}

/// The text around a directive.
fn around(text: &str, found: &Found) -> String {
    let before = text.get(..found.start).unwrap_or_default().trim_end();
    let after = text.get(found.end..).unwrap_or_default().trim_start();
    [before, after].join(" ").trim().to_owned()
}

fn generate(reply: &mut Reply, ticket: Ticket, generation: &Generation) -> Response<SimBody> {
    let Generation { asked, script, .. } = generation;
    let mut frames = rendered(generation);
    let mut outcome = Ended::Complete;
    if asked.stream && script.error_midstream {
        outcome = Ended::Fault;
        let event = match reply.provider {
            Provider::Openai => openai::error::event(&openai::error::server_error()),
            Provider::Anthropic => anthropic::error::event(&anthropic::error::overloaded(), &reply.request_id),
        };
        frames::fail_midstream(&mut frames, event);
    }
    if asked.stream && script.crlf {
        frames::with_crlf(&mut frames);
    }
    if script.gzip && frames::with_gzip(&mut frames).is_ok() {
        reply.gzip = true;
    }
    reply.generation(ticket, frames, outcome, asked.stream, script)
}

fn rendered(generation: &Generation) -> Vec<Frame> {
    let Generation { asked, answer, script, response_id } = generation;
    let per_delta = usize::try_from(script.per_delta.unwrap_or(DEFAULT_PER_DELTA)).unwrap_or(usize::MAX);
    let (id, model) = (response_id.as_str(), asked.model.snapshot);
    match (asked.model.provider, asked.stream) {
        (Provider::Openai, stream) => {
            let head = openai::response::Head { id, created: unix_us() / 1_000_000, model };
            if stream {
                openai::response::stream(&head, answer, script, asked.include_usage, per_delta)
            } else {
                openai::response::buffered(&head, answer, script)
            }
        }
        (Provider::Anthropic, true) => anthropic::response::stream(&anthropic::response::Head { id, model }, answer, script, per_delta),
        (Provider::Anthropic, false) => anthropic::response::buffered(&anthropic::response::Head { id, model }, answer, script),
    }
}

fn unknown_url(provider: Provider, parts: &Parts) -> ApiError {
    match provider {
        Provider::Openai => openai::error::unknown_url(parts.method.as_str(), parts.uri.path()),
        Provider::Anthropic => anthropic::error::unknown_url(),
    }
}
