//! What all admin endpoints share: bodies and queries that fail with a named field, pages, preconditions, idempotent writes.

use super::error::Problem;
use crate::metrics::handles;
use crate::service::Begun;
use crate::service::access::Principal;
use crate::service::{Service, ServiceError};
use crate::store::Expect;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use utoipa::{IntoParams, ToSchema};

pub const MAX_PAGE: u32 = 1_000;
/// Largest body of an ordinary request, in bytes.
pub const MAX_BODY: usize = 4 * 1024 * 1024;

#[derive(Clone)]
pub struct Admin {
    pub service: Arc<Service>,
}

/// Who calls, as [`authenticate`] found out.
impl<S: Sync> FromRequestParts<S> for Principal {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        parts.extensions.get::<Principal>().cloned().ok_or_else(unauthenticated)
    }
}

fn unauthenticated() -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", "send a valid admin token: authorization: Bearer kwa_...")
}

pub async fn authenticate(State(admin): State<Admin>, mut request: Request, next: Next) -> Result<Response, Problem> {
    let token = request.headers().get(header::AUTHORIZATION).and_then(|v| bearer(v.to_str().ok()?));
    let principal = match token {
        Some(token) => admin.service.principal(token).await?,
        None => None,
    };
    let Some(principal) = principal else {
        handles().admin_unauthenticated.increment(1);
        return Err(unauthenticated());
    };
    request.extensions_mut().insert(principal);
    Ok(next.run(request).await)
}

/// The token of `Bearer <token>`; the scheme's letters may be of either case (RFC 9110, 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim_start())
}

/// Carries a write to its end when its client goes away: a change that is stored must be taken into memory as well, and its
/// answer must be kept for the client that asks again.
pub async fn to_the_end(request: Request, next: Next) -> Result<Response, Problem> {
    if request.method().is_safe() {
        return Ok(next.run(request).await);
    }
    let done = tokio::spawn(async move { next.run(request).await }).await;
    done.map_err(|error| {
        tracing::error!(%error, "an admin request did not end");
        Problem::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "outcome unknown",
            "the request did not end as it should: look before you try again",
        )
    })
}

/// A JSON body. What does not fit is named by field; values, which may be secrets, are never repeated.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;
    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let media = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") && !media.eq_ignore_ascii_case("application/merge-patch+json") {
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported media type", "send content-type: application/json"));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            Problem::new(rejection.status(), "unreadable body", format!("the body could not be read; at most {MAX_BODY} bytes are"))
        })?;
        parse(&bytes).map(Json)
    }
}

/// Reads a JSON object, naming the field that does not fit.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let no_json = |error: &serde_json::Error| {
        let place = format!("not JSON: line {}, column {}", error.line(), error.column());
        Problem::new(StatusCode::BAD_REQUEST, "invalid JSON", place)
    };
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    // Serde would take an array's items for a struct's fields, in their order.
    let array = bytes.trim_ascii_start().starts_with(b"[");
    let value = serde_path_to_error::deserialize(&mut reader);
    match value {
        Ok(value) if !array => reader.end().map(|()| value).map_err(|error| no_json(&error)),
        other => {
            // Serde tells some values of a wrong type as if the text were no JSON.
            if let Err(error) = serde_json::from_slice::<serde_json::Value>(bytes) {
                return Err(no_json(&error));
            }
            let Err(error) = other else { return Err(Problem::field("", "expected an object")) };
            let path = error.path().to_string();
            let message = error.into_inner().to_string();
            Err(Problem::field(place(&path, &message).unwrap_or_default(), safe_message(&message)))
        }
    }
}

/// The field that an error is about: where the reader was, and what serde says is missing there or stands there twice.
fn place(path: &str, message: &str) -> Option<String> {
    let path = Some(path).filter(|path| *path != ".");
    let name = ["missing field `", "duplicate field `"].iter().find_map(|start| message.strip_prefix(start)?.split('`').next());
    match (path, name) {
        (Some(path), Some(name)) if path != name => Some(format!("{path}.{name}")),
        (path, name) => path.or(name).map(str::to_owned),
    }
}

/// What serde says of names it may say; what it says of values is left out.
fn safe_message(message: &str) -> String {
    let message = message.split(" at line ").next().unwrap_or_default();
    if message.starts_with("unknown variant") {
        return message.split_once("`, ").map_or_else(String::new, |(_, expected)| expected.to_owned());
    }
    if ["unknown field", "missing field", "duplicate field"].iter().any(|start| message.starts_with(start)) && message.len() < 400 {
        message.to_owned()
    } else {
        "has the wrong type or form".to_owned()
    }
}

/// A part of the path.
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        path.map(|path| Path(path.0)).map_err(|_| Problem::new(StatusCode::BAD_REQUEST, "invalid path", "the path is not UTF-8"))
    }
}

/// Query parameters.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let query = parts.uri.query().unwrap_or_default();
        let pairs = serde_urlencoded::Deserializer::new(form_urlencoded::parse(query.as_bytes()));
        let params = serde_path_to_error::deserialize(pairs).map_err(|error| {
            let path = error.path().to_string();
            let message = error.into_inner().to_string();
            let field = place(&path, &message);
            Problem { field, ..Problem::new(StatusCode::BAD_REQUEST, "invalid query", safe_message(&message)) }
        })?;
        Ok(Params(params))
    }
}

/// A page of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// `next_cursor` of the page before.
    pub cursor: Option<String>,
    /// Most items, 1 to 1000.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// Where a page begins, and how many items it may have.
pub fn page(cursor: Option<&str>, limit: Option<u32>) -> Result<(String, u32), Problem> {
    let limit = limit.unwrap_or(100);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(invalid_query("limit", "must be 1 to 1000"));
    }
    let after = cursor.map(|cursor| URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| String::from_utf8(bytes).ok()));
    match after {
        Some(None) => Err(invalid_query("cursor", "is not one that a page gave")),
        Some(Some(after)) => Ok((after, limit)),
        None => Ok((String::new(), limit)),
    }
}

/// A query parameter that does not fit.
pub fn invalid_query(parameter: &str, detail: &str) -> Problem {
    Problem { field: Some(parameter.to_owned()), ..Problem::new(StatusCode::BAD_REQUEST, "invalid query", detail) }
}

/// A cursor, opaque to the caller.
pub fn cursor(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

/// One page, and where the next begins.
#[derive(Debug, Serialize, ToSchema)]
pub struct List<T> {
    pub data: Vec<T>,
    /// Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub next_cursor: Option<String>,
}

impl<T> List<T> {
    /// A page of at most `limit` items. `data` has one more where there is one: then another page follows.
    pub fn of(mut data: Vec<T>, limit: u32, id: impl Fn(&T) -> &str) -> Self {
        let more = data.len() > limit as usize;
        data.truncate(limit as usize);
        let next_cursor = data.last().filter(|_| more).map(|last| cursor(id(last)));
        List { data, next_cursor }
    }
}

/// A version that nothing ever has.
const NEVER: u64 = u64::MAX;

/// `If-Match` and `If-None-Match`, as far as they are understood.
pub struct Precondition(pub Expect);

impl<S: Sync> FromRequestParts<S> for Precondition {
    type Rejection = Problem;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        expectation(&parts.headers).map(Precondition)
    }
}

fn expectation(headers: &HeaderMap) -> Result<Expect, Problem> {
    let value = |name| headers.get(name).map(|v: &HeaderValue| v.to_str().unwrap_or_default().trim());
    match (value(header::IF_MATCH), value(header::IF_NONE_MATCH)) {
        (None, None) => Ok(Expect::Anything),
        // It must be there and must not be there.
        (Some(_), Some("*")) => Ok(Expect::Version(NEVER)),
        (None, Some("*")) => Ok(Expect::Absent),
        (Some("*"), None) => Ok(Expect::Present),
        (Some(tag), None) => {
            let digits = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
            let version: Option<u64> = digits.and_then(|t| t.parse().ok().filter(|n: &u64| n.to_string() == t));
            // A tag of another form names no version that ever was.
            Ok(Expect::Version(version.unwrap_or(NEVER)))
        }
        _ => Err(Problem::new(StatusCode::BAD_REQUEST, "invalid precondition", "expected If-Match: \"<version>\" or If-None-Match: *")),
    }
}

impl Precondition {
    /// The version that something must be at which is certainly there. `If-None-Match: *` never holds for it.
    pub fn version(&self) -> Option<u64> {
        match self.0 {
            Expect::Version(version) => Some(version),
            Expect::Absent => Some(NEVER),
            Expect::Anything | Expect::Present => None,
        }
    }

    /// An `If-None-Match: *` that did not hold is a failed precondition, and no conflict.
    pub fn failed(&self, error: ServiceError) -> Problem {
        match error {
            ServiceError::Exists if self.0 == Expect::Absent => ServiceError::Stale(0).into(),
            other => other.into(),
        }
    }
}

/// The tag of a version.
pub fn etag(version: u64) -> [(header::HeaderName, String); 1] {
    [(header::ETAG, format!("\"{version}\""))]
}

/// An answer as it is kept for a write that comes again.
#[derive(Serialize, Deserialize)]
struct Kept {
    status: u16,
    content_type: String,
    etag: Option<String>,
    body: String,
}

/// What an answer is about: a kept answer is forgotten when that object's personal data are erased.
#[derive(Deserialize)]
struct About {
    id: String,
}

/// Makes a POST with an `Idempotency-Key` happen once: the same one again gets the same answer.
pub async fn idempotent(State(admin): State<Admin>, request: Request, next: Next) -> Result<Response, Problem> {
    let key = request.headers().get("idempotency-key").filter(|_| request.method() == Method::POST).cloned();
    let (Some(key), Some(who)) = (key, request.extensions().get::<Principal>().cloned()) else { return Ok(next.run(request).await) };
    let key =
        key.to_str().ok().filter(|key| (1..=255).contains(&key.len()) && !key.contains('\t')).map(str::to_owned).ok_or_else(|| {
            Problem::new(StatusCode::BAD_REQUEST, "invalid idempotency key", "Idempotency-Key must be 1 to 255 printable ASCII characters")
        })?;
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, MAX_BODY).await.map_err(|_| {
        Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body too large",
            format!("with an Idempotency-Key a body has at most {MAX_BODY} bytes"),
        )
    })?;
    let fingerprint = Sha256::new().chain_update(parts.uri.to_string()).chain_update([0]).chain_update(&body).finalize().into();
    match admin.service.begin_idempotent(&who, &key, fingerprint).await? {
        Begun::New => {}
        Begun::Answered(kept) => return Ok(replay(&kept)),
        Begun::Unfinished => {
            let detail =
                "a request with this Idempotency-Key is under way, or its outcome was lost: look before you try again with another key";
            return Err(Problem::new(StatusCode::CONFLICT, "outcome unknown", detail));
        }
        Begun::Other => {
            let detail = "this Idempotency-Key was used for another request";
            return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency key reused", detail));
        }
    }
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    Ok(keep(&admin, &who, &key, response).await)
}

async fn keep(admin: &Admin, who: &Principal, key: &str, response: Response) -> Response {
    let (parts, body) = response.into_parts();
    // What a handler answered is in memory already.
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    // A write that failed on our side did not happen, and may be tried again under the same key.
    let answer = (!parts.status.is_server_error()).then(|| {
        let text = |name| parts.headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok()).map(str::to_owned);
        let kept = Kept {
            status: parts.status.as_u16(),
            content_type: text(header::CONTENT_TYPE).unwrap_or_default(),
            etag: text(header::ETAG),
            body: String::from_utf8_lossy(&body).into_owned(),
        };
        zeroize::Zeroizing::new(serde_json::to_vec(&kept).unwrap_or_default())
    });
    let about = serde_json::from_slice::<About>(&body).ok().map(|about| about.id);
    let kept = admin.service.end_idempotent(who, key, answer.as_ref().map(|answer| answer.as_slice()), about).await;
    if let Err(error) = kept {
        // The write has happened, and its answer may hold the only copy of a token: the caller gets it all the same.
        tracing::error!(%error, "an answer could not be kept for its Idempotency-Key");
    }
    Response::from_parts(parts, Body::from(body))
}

fn replay(kept: &[u8]) -> Response {
    let Ok(kept) = serde_json::from_slice::<Kept>(kept) else {
        return Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "vault error", "the kept answer can't be read").into_response();
    };
    let mut response = (StatusCode::from_u16(kept.status).unwrap_or_default(), kept.body).into_response();
    let headers = response.headers_mut();
    let mut set = |name, value: Option<String>| match value.and_then(|value| HeaderValue::from_str(&value).ok()) {
        Some(value) if !value.is_empty() => drop(headers.insert(name, value)),
        _ => {
            headers.remove(name);
        }
    };
    set(header::CONTENT_TYPE, Some(kept.content_type));
    set(header::ETAG, kept.etag);
    set(header::CACHE_CONTROL, Some("no-store".to_owned()));
    headers.insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}
