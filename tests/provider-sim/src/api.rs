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
use crate::azure;
use crate::body::SimBody;
use crate::call::{Call, Ready, Shape};
use crate::connection::Connection;
use crate::credentials::{Credential, State};
use crate::endpoint::{self, Endpoint};
use crate::gemini;
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
    let provider = addressed(&shared, &parts);
    let endpoint = Endpoint::find(provider, &parts.method, parts.uri.path());
    let seq = shared.ledger.begin(opening_entry(&shared, &parts, provider, endpoint));
    let mut ticket = Ticket::new(Arc::clone(&shared), connection, seq, endpoint.map(Endpoint::name));
    let lines = if shared.bench { Vec::new() } else { header_lines(&parts, ticket.connection()) };
    let mut reply = Reply::new(provider, parts.uri.path());
    reply.wrapped = endpoint == Some(Endpoint::StreamGenerate) && !gemini::as_events(parts.uri.query());

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

/// Which provider a request is meant for: the path tells, else the headers that only one's clients send, else whose secret it has.
fn addressed(shared: &Shared, parts: &Parts) -> Provider {
    let (path, has) = (parts.uri.path(), |name: &str| parts.headers.contains_key(name));
    let owner = || shared.credentials().by_secret(bearer(parts)?).map(|credential| credential.provider);
    if path.starts_with("/v1beta/") || (path.starts_with("/v1/models/") && path.contains(':')) || has("x-goog-api-key") {
        return Provider::Gemini;
    }
    if path.starts_with("/openai/") {
        let versioned = parts.uri.query().is_some_and(|query| query.contains("api-version="));
        let azure = path.starts_with("/openai/deployments/") || has("api-key") || versioned || owner() == Some(Provider::Azure);
        return if azure { Provider::Azure } else { Provider::Compatible };
    }
    if path.starts_with("/api/v1/") {
        return Provider::Compatible;
    }
    let claude = has("anthropic-version") || has("x-api-key");
    if path.starts_with("/v1/messages") || (claude && !path.starts_with("/v1/chat/")) {
        return Provider::Anthropic;
    }
    if path.starts_with("/v1/models") && gemini::key(parts.uri.query()).is_some() {
        return Provider::Gemini;
    }
    if owner() == Some(Provider::Compatible) { Provider::Compatible } else { Provider::Openai }
}

fn opening_entry(shared: &Shared, parts: &Parts, provider: Provider, endpoint: Option<Endpoint>) -> Entry {
    let header_names = if shared.bench { Vec::new() } else { parts.headers.keys().map(|name| name.as_str().to_owned()).collect() };
    Entry {
        query: parts.uri.query().map(|query| shown_query(shared, query)),
        endpoint: endpoint.map(Endpoint::name),
        http_version: if parts.version == Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
        client_request_id: header(&parts.headers, "x-client-request-id").map(str::to_owned),
        idempotency_key: header(&parts.headers, "idempotency-key").map(str::to_owned),
        header_names,
        ..Entry::new(provider, parts.method.as_str(), parts.uri.path())
    }
}

/// A query may hold a credential, if it is for Google.
fn shown_query(shared: &Shared, query: &str) -> String {
    if query.contains("key=") { shared.credentials().redact(query) } else { query.to_owned() }
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
    let endpoint = endpoint.ok_or_else(|| provider.unknown_url(parts.method.as_str(), parts.uri.path()))?;
    if provider == Provider::Azure {
        check_azure_version(parts)?;
    }
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
        Endpoint::Model => {
            // Names of OpenRouter's models have a slash in them.
            let name = call.tail().strip_prefix("models/").unwrap_or_default().replace("%2F", "/");
            listing::models(provider, Some(&name)).map(Served::Document)
        }
        Endpoint::Messages => converse(anthropic::request::parse(body, version)?, &mut call).map(Served::from),
        Endpoint::CountTokens => count_tokens(&mut call, version).map(Served::Document),
        Endpoint::Chat => converse(openai::request::parse(body, call.shop())?, &mut call).map(Served::from),
        Endpoint::Generate | Endpoint::StreamGenerate => {
            let asked = gemini::request::parse(call.body, gemini::model(&call)?, endpoint == Endpoint::StreamGenerate, &call)?;
            converse(asked, &mut call).map(Served::from)
        }
        Endpoint::GeminiTokens => gemini::count_tokens(&mut call).map(Served::Document),
        Endpoint::Embed | Endpoint::BatchEmbed => gemini::embeddings::create(&mut call),
        _ => openai::serve(&mut call),
    }
}

impl From<Ready> for Served {
    fn from(ready: Ready) -> Self {
        Served::Answer(Box::new(ready))
    }
}

/// A version must be named where deployments are; elsewhere it may be.
fn check_azure_version(parts: &Parts) -> Result<(), ApiError> {
    let pairs = parts.uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    let version = pairs.filter(|(name, _)| *name == "api-version").map(|(_, version)| version).next();
    let needed = endpoint::deployment(parts.uri.path()).is_some();
    let fits = match version {
        Some(version) => azure::is_version(version) || (!needed && ["v1", "preview", "latest"].contains(&version)),
        None => !needed,
    };
    if fits { Ok(()) } else { Err(azure::not_found()) }
}

fn bearer(parts: &Parts) -> Option<&str> {
    let (scheme, secret) = header(&parts.headers, "authorization")?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(secret.trim())
}

fn authenticate(parts: &Parts, provider: Provider, ticket: &mut Ticket) -> Result<Arc<Credential>, ApiError> {
    let own = match provider {
        Provider::Openai | Provider::Compatible => None,
        Provider::Anthropic => header(&parts.headers, "x-api-key"),
        Provider::Gemini => header(&parts.headers, "x-goog-api-key").or_else(|| gemini::key(parts.uri.query())),
        Provider::Azure => header(&parts.headers, "api-key"),
    };
    let bearer = bearer(parts);
    if provider == Provider::Gemini && own.is_none() && bearer.is_some() {
        return Err(gemini::error::bad_token());
    }
    let secret = own.or(bearer).ok_or_else(|| provider.missing_key())?;
    let refused = || provider.bad_key(secret, own.is_none());
    let credentials = ticket.shared().credentials();
    let known = credentials.by_secret(secret).filter(|credential| credential.provider == provider);
    let credential = Arc::clone(known.ok_or_else(refused)?);
    ticket.credential = Some(Arc::clone(&credential));
    ticket.shared().ledger.update(ticket.seq, |entry| {
        entry.credential = Some(Arc::clone(&credential.id));
        entry.account = Some(Arc::clone(&credential.account));
    });
    Err(match credential.meet() {
        State::Ok => return Ok(credential),
        State::Invalid => refused(),
        State::Forbidden => provider.forbidden(),
        State::InsufficientQuota => provider.insufficient_quota(),
        State::Overloaded => provider.overloaded(),
    })
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
    if let Some(error) = script.block.as_ref().and_then(|_| call.credential.provider.blocked()) {
        return Err(error);
    }
    let id = match call.credential.provider {
        Provider::Openai | Provider::Azure | Provider::Compatible => identifier("chatcmpl-", 29),
        Provider::Anthropic => identifier("msg_01", 22),
        Provider::Gemini => identifier("", 22),
    };
    call.charge(Bill::new(asked.model, answer.usage, asked.stream), Some(&id));
    let per_delta = script.deltas_of();
    let mut shape = if asked.stream { Shape::Events } else { Shape::Json };
    let frames = match (asked.model.provider, asked.stream) {
        (Provider::Gemini, stream) => {
            let head = gemini::response::Head { id: &id, model: asked.model.snapshot };
            let listed = stream && call.query("alt") != Some("sse");
            if listed {
                shape = Shape::List;
            }
            if stream {
                gemini::response::stream(&head, &answer, &script, per_delta, listed)
            } else {
                gemini::response::buffered(&head, &answer, &script)
            }
        }
        (provider @ (Provider::Openai | Provider::Azure | Provider::Compatible), stream) => {
            let (created, flavour) = (unix_us() / 1_000_000, call.reply.flavour);
            let head = openai::response::Head { id: &id, created, model: asked.model.snapshot, provider, flavour };
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
    Ok(Ready::streamed(frames, shape, script, |_| match shape {
        Shape::List => gemini::response::failure_item(),
        _ => call.credential.provider.failure_event(&call.reply.request_id, call.reply.flavour),
    }))
}

/// How many tokens a prompt has, free of charge.
fn count_tokens(call: &mut Call, version: &str) -> Result<String, ApiError> {
    let (model, tokens, last_user) = anthropic::request::count(call.body, version)?;
    let (script, _) = call.steer(Some(model), false, &last_user)?;
    call.admit_free(Some(model), &script)?;
    Ok(format!(r#"{{"input_tokens":{tokens}}}"#))
}
