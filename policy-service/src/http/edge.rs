//! Edge API: for the filter only. Envoy itself puts the edge token on every call.

use crate::metrics::handles;
use crate::service::{Admitted, Service};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::FutureExt;
use futures_util::future::join_all;
use keyward_core::edge::{ADMIT_PATH, AdmitAnswer, SETTLE_PATH};
use keyward_core::watch::WATCH_PATH;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Largest batch of records or questions, in bytes.
const MAX_BODY: usize = 1024 * 1024;
/// Questions that are taken at once: more than any gate sends.
const MAX_QUESTIONS: usize = 1_024;

/// The whole `authorization` value that opens the edge API.
#[derive(Clone)]
pub struct EdgeToken(pub Arc<Zeroizing<String>>);

pub fn router(service: Arc<Service>, token: EdgeToken) -> Router {
    Router::new()
        .route(ADMIT_PATH, post(admit))
        .route(SETTLE_PATH, post(settle))
        .route(WATCH_PATH, get(watch))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(token, authenticate))
        .with_state(service)
}

async fn authenticate(State(token): State<EdgeToken>, request: Request, next: Next) -> Response {
    if is_authentic(request.headers(), &token) {
        return next.run(request).await;
    }
    handles().edge_unauthenticated.increment(1);
    StatusCode::UNAUTHORIZED.into_response()
}

fn is_authentic(headers: &HeaderMap, token: &EdgeToken) -> bool {
    headers.get(header::AUTHORIZATION).is_some_and(|sent| bool::from(sent.as_bytes().ct_eq(token.0.as_bytes())))
}

/// A question a line, decided together: one that can't be read, or whose request id was used before, takes nothing from the others.
async fn admit(State(service): State<Arc<Service>>, body: Bytes) -> Response {
    let lines = || body.trim_ascii_end().split(|b| *b == b'\n');
    if lines().nth(MAX_QUESTIONS).is_some() {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    }
    let decide = async |line: &[u8]| match serde_json::from_slice(line) {
        Ok(request) => match AssertUnwindSafe(service.admit(request)).catch_unwind().await {
            Ok(Admitted::Answer(answer)) => Ok(answer),
            Ok(Admitted::Conflict) => Err(StatusCode::CONFLICT),
            Err(_) => Err(StatusCode::INTERNAL_SERVER_ERROR),
        },
        Err(_) => Err(StatusCode::BAD_REQUEST),
    };
    let answers = join_all(lines().map(decide)).await;
    if let Some(Err(status)) = answers.first().filter(|_| answers.iter().all(Result::is_err)) {
        return status.into_response();
    }
    ([(header::CONTENT_TYPE, "application/x-ndjson")], written(&answers)).into_response()
}

/// An answer a line.
fn written(answers: &[Result<Box<AdmitAnswer>, StatusCode>]) -> Vec<u8> {
    const USUAL_ANSWER: usize = 512;
    let mut body = Vec::with_capacity(answers.len() * USUAL_ANSWER);
    for answer in answers {
        // Writing to memory can't fail.
        let _ = serde_json::to_writer(&mut body, &answer.as_ref().ok());
        body.push(b'\n');
    }
    body
}

async fn settle(State(service): State<Arc<Service>>, body: String) -> Response {
    handles().edge_batches.increment(1);
    match service.settle(&body).await {
        Ok(answer) => json(&answer),
        Err(error) => {
            tracing::error!(%error, "a batch of settlements was not taken");
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
    }
}

#[derive(serde::Deserialize)]
struct Since {
    since: Option<String>,
}

async fn watch(State(service): State<Arc<Service>>, Query(Since { since }): Query<Since>) -> Response {
    match service.news(since.as_deref()).await {
        Ok(answer) => json(&answer),
        Err(error) => {
            tracing::error!(%error, "a question for news was not answered");
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
    }
}

fn json(value: &impl serde::Serialize) -> Response {
    let body = serde_json::to_vec(value).unwrap_or_default();
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}
