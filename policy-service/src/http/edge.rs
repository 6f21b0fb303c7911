//! Edge API: for the filter only. Envoy itself puts the edge token on every call.

use super::observe::trace;
use crate::metrics::handles;
use crate::service::{Admitted, Service};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use keyward_core::edge::{ADMIT_PATH, AdmitRequest, SETTLE_PATH};
use keyward_core::watch::WATCH_PATH;
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// Largest batch of records, in bytes.
const MAX_BODY: usize = 1024 * 1024;

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

async fn admit(State(service): State<Arc<Service>>, headers: HeaderMap, body: Bytes) -> Response {
    let Ok(request) = serde_json::from_slice::<AdmitRequest>(&body) else { return StatusCode::BAD_REQUEST.into_response() };
    match service.admit(request, trace(&headers).as_ref()).await {
        Admitted::Answer(answer) => json(&*answer),
        Admitted::Conflict => StatusCode::CONFLICT.into_response(),
    }
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
