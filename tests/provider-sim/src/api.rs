//! The provider's side: from a request to its answer, with every step written down.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Request, Response, Version};
use serde::Deserialize;

use crate::answer::{self, Asked};
use crate::anthropic;
use crate::body::SimBody;
use crate::call::{Call, Ready, Shape};
use crate::connection::Connection;
use crate::credentials::{Credential, State};
use crate::endpoint::Endpoint;
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
const LONGEST_TAG: usize = 256;

/// Answers one request. Never fails: what goes wrong is the provider's answer.
pub async fn answer(shared: Arc<Shared>, connection: Arc<Connection>, request: Request<Incoming>) -> Result<Response<SimBody>, Infallible> {
    let (parts, body) = request.into_parts();
    let provider = addressed(&parts);
    let endpoint = Endpoint::find(provider, &parts.method, parts.uri.path());
    let seq = shared.ledger.begin(opening_entry(&shared, &parts, provider, endpoint));
    let mut ticket = Ticket::new(Arc::clone(&shared), connection, seq, endpoint.map(Endpoint::name));
    let lines = if shared.bench { Vec::new() } else { header_lines(&parts, ticket.connection()) };
    let mut reply = Reply::new(provider);

    let body = match receive(&parts, body, &ticket).await {
        Ok(body) => body,
        Err(error) => {
            ticket.close(Ended::ClientGone);
            return Ok(reply.refuse(ticket, &error));
        }
    };
    inspect(&parts, provider, lines, &body, &mut ticket);
    let served = serve(&parts, &body, endpoint, &mut reply, &mut ticket);
    if let Some(wait) = reply.wait_ms {
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
    Ok(match served {
        Ok(Served::Document(text)) => reply.document(ticket, text),
        Ok(Served::Answer(ready)) => reply.answer(ticket, *ready),
        Err(error) => reply.refuse(ticket, &error),
    })
}

/// What comes of a request that isn't refused.
pub enum Served {
    /// A list or an object, at no charge.
    Document(String),
    Answer(Box<Ready>),
}

/// Which provider a request is meant for: the path tells, else the headers only Anthropic's clients send.
fn addressed(parts: &Parts) -> Provider {
    let path = parts.uri.path();
    let claude = parts.headers.contains_key("anthropic-version") || parts.headers.contains_key("x-api-key");
    if path.starts_with("/v1/messages") || (claude && !path.starts_with("/v1/chat/")) { Provider::Anthropic } else { Provider::Openai }
}

fn opening_entry(shared: &Shared, parts: &Parts, provider: Provider, endpoint: Option<Endpoint>) -> Entry {
    let header_names = if shared.bench { Vec::new() } else { parts.headers.keys().map(|name| name.as_str().to_owned()).collect() };
    Entry {
        query: parts.uri.query().map(str::to_owned),
        endpoint: endpoint.map(Endpoint::name),
        http_version: if parts.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
        client_request_id: header(&parts.headers, "x-client-request-id").map(str::to_owned),
        idempotency_key: header(&parts.headers, "idempotency-key").map(str::to_owned),
        header_names,
        ..Entry::new(provider, parts.method.as_str(), parts.uri.path())
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
fn inspect(parts: &Parts, provider: Provider, lines: Vec<(String, String)>, body: &Bytes, ticket: &mut Ticket) {
    let shared = Arc::clone(ticket.shared());
    let digest = (!shared.bench).then(|| digest(body));
    shared.ledger.update(ticket.seq, |entry| {
        entry.body_bytes = body.len() as u64;
        entry.body_sha256 = digest;
    });
    if shared.bench {
        return;
    }
    if let Some(tag) = tag(body) {
        ticket.tag(tag);
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

/// Whom the body says it is for.
fn tag(body: &[u8]) -> Option<Arc<str>> {
    #[derive(Deserialize)]
    struct Body {
        user: Option<String>,
        metadata: Option<Metadata>,
    }
    #[derive(Deserialize)]
    struct Metadata {
        user_id: Option<String>,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let tag = body.user.or_else(|| body.metadata?.user_id).filter(|tag| tag.len() <= LONGEST_TAG);
    tag.map(Arc::from)
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

fn serve(parts: &Parts, body: &Bytes, endpoint: Option<Endpoint>, reply: &mut Reply, ticket: &mut Ticket) -> Result<Served, ApiError> {
    let provider = reply.provider;
    let endpoint = endpoint.ok_or_else(|| unknown_url(provider, parts))?;
    let credential = authenticate(parts, provider, ticket)?;
    let version = header(&parts.headers, "anthropic-version");
    if provider == Provider::Anthropic {
        anthropic::request::check_version(version)?;
    }
    if header(&parts.headers, "content-encoding").is_some_and(|coding| coding != "identity") {
        return Err(ApiError::invalid("Compressed request bodies are not supported"));
    }
    let version = version.unwrap_or_default();
    let mut call = Call { parts, body, endpoint, credential, reply, ticket };
    match endpoint {
        Endpoint::Models => listing::models(provider, None).map(Served::Document),
        Endpoint::Model => listing::models(provider, Some(call.segment(1))).map(Served::Document),
        Endpoint::Messages => converse(anthropic::request::parse(body, version)?, &mut call).map(Served::from),
        Endpoint::CountTokens => count_tokens(&mut call, version).map(Served::Document),
        Endpoint::Chat => converse(openai::request::parse(body)?, &mut call).map(Served::from),
        _ => openai::serve(&mut call),
    }
}

impl From<Ready> for Served {
    fn from(ready: Ready) -> Self {
        Served::Answer(Box::new(ready))
    }
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
    ticket.shared().ledger.update(ticket.seq, |entry| {
        entry.credential = Some(Arc::clone(&credential.id));
        entry.account = Some(Arc::clone(&credential.account));
    });
    let error = match (credential.meet(), provider) {
        (State::Ok, _) => return Ok(credential),
        (State::Invalid, _) => refused(),
        (State::Forbidden, Provider::Openai) => openai::error::forbidden(),
        (State::Forbidden, Provider::Anthropic) => anthropic::error::forbidden(),
        (State::InsufficientQuota, Provider::Openai) => openai::error::insufficient_quota(),
        (State::InsufficientQuota, Provider::Anthropic) => anthropic::error::insufficient_quota(),
        (State::Overloaded, Provider::Openai) => openai::error::overloaded(),
        (State::Overloaded, Provider::Anthropic) => anthropic::error::overloaded(),
    };
    Err(error)
}

/// A chat completion or message: decides the whole answer.
fn converse(mut asked: Asked, call: &mut Call) -> Result<Ready, ApiError> {
    if let Some(store) = asked.extras.store {
        call.note_store(store);
    }
    for id in &asked.extras.files {
        asked.prompt_tokens += openai::files::tokens(call, id, "messages")?;
    }
    let (script, said) = call.steer(Some(asked.model), asked.stream, &asked.last_user)?;
    let answer = answer::compose(&asked, &script, &said, call.shared().bench);
    call.admit(asked.model, answer.usage.prompt + answer.usage.completion, &script)?;
    let id = match call.credential.provider {
        Provider::Openai => identifier("chatcmpl-", 29),
        Provider::Anthropic => identifier("msg_01", 22),
    };
    call.charge(Bill::new(asked.model, answer.usage, asked.stream), Some(&id));
    let per_delta = script.deltas_of();
    let frames = match (asked.model.provider, asked.stream) {
        (Provider::Openai, stream) => {
            let head = openai::response::Head { id: &id, created: unix_us() / 1_000_000, model: asked.model.snapshot };
            if let Some(kept) = &asked.extras.kept {
                openai::stored_chats::keep(call, &head, &answer, kept);
            }
            if stream {
                openai::response::stream(&head, &answer, &script, asked.include_usage, per_delta)
            } else {
                openai::response::buffered(&head, &answer, &script)
            }
        }
        (Provider::Anthropic, stream) => {
            let head = anthropic::response::Head { id: &id, model: asked.model.snapshot };
            if stream {
                anthropic::response::stream(&head, &answer, &script, per_delta)
            } else {
                anthropic::response::buffered(&head, &answer, &script)
            }
        }
    };
    if !asked.stream {
        return Ok(Ready::new(frames, Shape::Json, script));
    }
    Ok(Ready::events(frames, script, |_| match call.credential.provider {
        Provider::Openai => openai::error::event(&openai::error::server_error()),
        Provider::Anthropic => anthropic::error::event(&anthropic::error::overloaded(), &call.reply.request_id),
    }))
}

/// How many tokens a prompt has, free of charge.
fn count_tokens(call: &mut Call, version: &str) -> Result<String, ApiError> {
    let (model, tokens, last_user) = anthropic::request::count(call.body, version)?;
    let (script, _) = call.steer(Some(model), false, &last_user)?;
    call.admit_free(Some(model), &script)?;
    Ok(format!(r#"{{"input_tokens":{tokens}}}"#))
}

fn unknown_url(provider: Provider, parts: &Parts) -> ApiError {
    match provider {
        Provider::Openai => openai::error::unknown_url(parts.method.as_str(), parts.uri.path()),
        Provider::Anthropic => anthropic::error::unknown_url(),
    }
}
