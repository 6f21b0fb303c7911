//! The control API: credentials, faults, and the ledger that tests compare with.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::credentials::{Credentials, Given};
use crate::faults::Fault;
use crate::shared::Shared;

pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/control/credentials", put(put_credentials).get(list_credentials))
        .route("/control/credentials/{id}", patch(patch_credential))
        .route("/control/faults", post(add_faults).get(list_faults).delete(clear_faults))
        .route("/control/ledger", get(ledger))
        .route("/control/totals", get(totals))
        .route("/control/tags", get(tags))
        .route("/control/objects", get(objects))
        .route("/control/bodies", get(body))
        .route("/control/headers", get(headers))
        .route("/control/reset", post(reset))
        .with_state(shared)
}

/// A refusal: the status and what was wrong.
struct Problem(StatusCode, String);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

#[derive(Deserialize)]
struct Since {
    #[serde(default)]
    since: u64,
}

#[derive(Deserialize)]
struct Seq {
    seq: u64,
}

async fn put_credentials(State(shared): State<Arc<Shared>>, Json(given): Json<Vec<Given>>) -> Result<impl IntoResponse, Problem> {
    let credentials = Credentials::new(given).map_err(|what| Problem(StatusCode::BAD_REQUEST, what))?;
    shared.replace_credentials(credentials);
    Ok(list_credentials(State(shared)).await)
}

async fn list_credentials(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let shown: Vec<_> = shared.credentials().iter().map(|credential| credential.shown()).collect();
    Json(json!({ "credentials": shown }))
}

async fn patch_credential(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<String>,
    Json(changes): Json<Map<String, Value>>,
) -> Result<impl IntoResponse, Problem> {
    let credentials = shared.credentials();
    let missing = || Problem(StatusCode::NOT_FOUND, format!("no credential `{id}`"));
    let credential = credentials.find(&id).ok_or_else(missing)?;
    credential.patch(&changes).map_err(|what| Problem(StatusCode::BAD_REQUEST, what))?;
    Ok(Json(credential.shown()))
}

async fn add_faults(State(shared): State<Arc<Shared>>, Json(given): Json<Value>) -> Result<impl IntoResponse, Problem> {
    let bad = |what: String| Problem(StatusCode::BAD_REQUEST, what);
    let given = if given.is_array() { given } else { json!([given]) };
    let faults: Vec<Fault> = serde_json::from_value(given).map_err(|error| bad(error.to_string()))?;
    shared.faults.add(faults).map_err(bad)?;
    Ok(list_faults(State(shared)).await)
}

async fn list_faults(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    Json(json!({ "faults": shared.faults.list() }))
}

async fn clear_faults(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.faults.clear();
    StatusCode::NO_CONTENT
}

async fn ledger(State(shared): State<Arc<Shared>>, Query(query): Query<Since>) -> impl IntoResponse {
    let (requests, last_seq) = shared.ledger.since(query.since);
    Json(json!({ "requests": requests, "last_seq": last_seq }))
}

async fn totals(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    Json(shared.ledger.summary())
}

async fn tags(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    Json(json!({ "tags": shared.ledger.tags() }))
}

async fn objects(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    Json(json!({ "accounts": shared.objects.shown() }))
}

async fn body(State(shared): State<Arc<Shared>>, Query(query): Query<Seq>) -> Result<impl IntoResponse, Problem> {
    let kept = shared.ledger.captured(query.seq).and_then(|capture| capture.body);
    let missing = || Problem(StatusCode::NOT_FOUND, format!("the body of request {} is not kept", query.seq));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], kept.ok_or_else(missing)?))
}

async fn headers(State(shared): State<Arc<Shared>>, Query(query): Query<Seq>) -> Result<impl IntoResponse, Problem> {
    let missing = || Problem(StatusCode::NOT_FOUND, format!("the headers of request {} are not kept", query.seq));
    let capture = shared.ledger.captured(query.seq).ok_or_else(missing)?;
    Ok(Json(capture.headers))
}

async fn reset(State(shared): State<Arc<Shared>>) -> StatusCode {
    shared.ledger.reset();
    shared.faults.clear();
    shared.objects.clear();
    shared.credentials().iter().for_each(|credential| credential.forget());
    StatusCode::NO_CONTENT
}
