//! The headers around every answer.

use bytes::Bytes;
use hyper::header::{self as names, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use crate::body::SimBody;
use crate::call::{Ready, Shape};
use crate::compatible::Flavour;
use crate::directive::Directive;
use crate::frames;
use crate::ledger::Ended;
use crate::limits::Quota;
use crate::provider::{ApiError, Provider};
use crate::text::{duration, identifier, rfc3339, unix_us};
use crate::ticket::Ticket;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const PLAIN_EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");
const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");

/// What is known about the answer to one request so far.
#[derive(Debug)]
pub struct Reply {
    pub provider: Provider,
    pub flavour: Flavour,
    pub request_id: String,
    /// Where the credential stands, once it has been asked.
    pub quota: Option<Quota>,
    /// Scripted milliseconds before the headers.
    pub wait_ms: Option<u64>,
    /// Headers of the script.
    headers: Vec<(HeaderName, HeaderValue)>,
    no_limit_headers: bool,
    /// The error stands in a list.
    pub wrapped: bool,
    /// What the script has for the body of an error.
    body: Option<Bytes>,
}

impl Reply {
    pub fn new(provider: Provider, path: &str) -> Self {
        let request_id = match provider {
            Provider::Anthropic => identifier("req_011", 21),
            _ => identifier("req_", 32),
        };
        Reply {
            provider,
            flavour: Flavour::of(path),
            request_id,
            quota: None,
            wait_ms: None,
            headers: Vec::new(),
            no_limit_headers: false,
            wrapped: false,
            body: None,
        }
    }

    /// Takes from the script what it says of the head, and of an error's body.
    pub fn obey(&mut self, script: &Directive) {
        self.wait_ms = script.first_ms;
        self.headers.clone_from(&script.headers);
        self.no_limit_headers = script.no_limit_headers;
        self.wrapped |= script.wrapped;
        self.body.clone_from(&script.body);
    }

    pub fn document(&self, mut ticket: Ticket, text: String) -> Response<SimBody> {
        ticket.answered(200);
        let mut response = self.with_headers(SimBody::plain(text.into(), ticket, Ended::Complete), StatusCode::OK, JSON);
        self.scripted(response.headers_mut());
        response
    }

    pub fn refuse(&self, mut ticket: Ticket, error: &ApiError) -> Response<SimBody> {
        let body = self.body.clone().unwrap_or_else(|| {
            let body = self.provider.error_body(error, &self.request_id, self.flavour);
            if self.wrapped { format!("[{body}]").into() } else { body.into() }
        });
        ticket.answered(error.status);
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = self.with_headers(SimBody::plain(body, ticket, Ended::Error), status, JSON);
        let headers = response.headers_mut();
        // Google says when in the body alone.
        let told = !self.no_limit_headers && self.provider != Provider::Gemini;
        if let Some(ms) = error.retry_after_ms.filter(|_| told) {
            headers.insert(names::RETRY_AFTER, ms.div_ceil(1000).into());
            if matches!(self.provider, Provider::Openai | Provider::Azure) {
                put(headers, "retry-after-ms", ms.into());
            }
        }
        if error.status == 529 {
            put(headers, "x-should-retry", HeaderValue::from_static("true"));
        }
        self.scripted(headers);
        response
    }

    pub fn answer(&self, mut ticket: Ticket, ready: Ready) -> Response<SimBody> {
        let Ready { mut frames, shape, script, outcome } = ready;
        let stream = shape == Shape::Events;
        if stream && script.crlf {
            frames::with_crlf(&mut frames);
        }
        let gzip = script.gzip && frames::with_gzip(&mut frames).is_ok();
        ticket.answered(200);
        let (kind, announce) = match shape {
            Shape::Json => (JSON, true),
            Shape::Text => (HeaderValue::from_static("text/plain; charset=utf-8"), true),
            Shape::Events => (if self.provider == Provider::Gemini { PLAIN_EVENTS } else { EVENTS }, false),
            Shape::List => (JSON, false),
            Shape::Bytes(kind) => (HeaderValue::from_static(kind), false),
        };
        let body = SimBody::scripted(frames, ticket, outcome, &script, announce);
        let mut response = self.with_headers(body, StatusCode::OK, kind);
        let headers = response.headers_mut();
        if stream {
            headers.insert(names::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        if gzip {
            headers.insert(names::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        if script.trailers {
            headers.insert(names::TRAILER, HeaderValue::from_static("x-sim-trailer"));
        }
        self.scripted(headers);
        response
    }

    /// Sets the headers of the script; one that it has several times is sent so.
    fn scripted(&self, headers: &mut HeaderMap) {
        for (name, _) in &self.headers {
            headers.remove(name);
        }
        for (name, value) in &self.headers {
            headers.append(name, value.clone());
        }
    }

    /// Where the account stands, if the answer is to say so.
    fn told(&self) -> Option<Quota> {
        self.quota.filter(|_| !self.no_limit_headers)
    }

    fn with_headers(&self, body: SimBody, status: StatusCode, kind: HeaderValue) -> Response<SimBody> {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.reserve(16);
        headers.insert(names::CONTENT_TYPE, kind);
        match self.provider {
            Provider::Openai => self.openai(headers),
            Provider::Anthropic => self.anthropic(headers),
            Provider::Gemini => put(headers, "server-timing", HeaderValue::from_static("gfet4t7; dur=7")),
            Provider::Azure => self.azure(headers),
            Provider::Compatible => {
                put(headers, "x-request-id", text(&self.request_id));
                if self.flavour == Flavour::Groq {
                    self.limits(headers, true);
                }
            }
        }
        response
    }

    fn openai(&self, headers: &mut HeaderMap) {
        put(headers, "x-request-id", text(&self.request_id));
        put(headers, "openai-organization", HeaderValue::from_static("org-sim"));
        put(headers, "openai-processing-ms", HeaderValue::from_static("7"));
        put(headers, "openai-version", HeaderValue::from_static("2020-10-01"));
        let cookie = format!("{}; path=/; HttpOnly; Secure; SameSite=None", identifier("__cf_bm=", 40));
        headers.insert(names::SET_COOKIE, text(&cookie));
        self.limits(headers, true);
    }

    fn azure(&self, headers: &mut HeaderMap) {
        put(headers, "apim-request-id", text(&self.request_id));
        put(headers, "x-request-id", text(&self.request_id));
        put(headers, "x-ms-region", HeaderValue::from_static("Sweden Central"));
        self.limits(headers, false);
    }

    /// The figures of limits as OpenAI has them; when they are whole again only if `resets`.
    fn limits(&self, headers: &mut HeaderMap, resets: bool) {
        let Some(quota) = self.told() else { return };
        put(headers, "x-ratelimit-limit-requests", quota.limit_requests.into());
        put(headers, "x-ratelimit-limit-tokens", quota.limit_tokens.into());
        put(headers, "x-ratelimit-remaining-requests", quota.remaining_requests.into());
        put(headers, "x-ratelimit-remaining-tokens", quota.remaining_tokens.into());
        if !resets {
            return;
        }
        let reset = text(&duration(quota.reset_ms));
        put(headers, "x-ratelimit-reset-requests", reset.clone());
        put(headers, "x-ratelimit-reset-tokens", reset);
    }

    fn anthropic(&self, headers: &mut HeaderMap) {
        put(headers, "request-id", text(&self.request_id));
        put(headers, "anthropic-organization-id", HeaderValue::from_static("00000000-0000-4000-8000-000000000000"));
        let Some(quota) = self.told() else { return };
        let reset = text(&rfc3339((unix_us() / 1000 + quota.reset_ms).div_ceil(1000)));
        put(headers, "anthropic-ratelimit-requests-limit", quota.limit_requests.into());
        put(headers, "anthropic-ratelimit-requests-remaining", quota.remaining_requests.into());
        put(headers, "anthropic-ratelimit-requests-reset", reset.clone());
        for (limit, remaining, until) in [
            ("anthropic-ratelimit-tokens-limit", "anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
            (
                "anthropic-ratelimit-input-tokens-limit",
                "anthropic-ratelimit-input-tokens-remaining",
                "anthropic-ratelimit-input-tokens-reset",
            ),
            (
                "anthropic-ratelimit-output-tokens-limit",
                "anthropic-ratelimit-output-tokens-remaining",
                "anthropic-ratelimit-output-tokens-reset",
            ),
        ] {
            put(headers, limit, quota.limit_tokens.into());
            put(headers, remaining, quota.remaining_tokens.into());
            put(headers, until, reset.clone());
        }
    }
}

/// The value of a header, if it is text.
pub fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn put(headers: &mut HeaderMap, name: &'static str, value: HeaderValue) {
    headers.insert(HeaderName::from_static(name), value);
}

/// Only called with text made here, all of it visible ASCII.
fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}
