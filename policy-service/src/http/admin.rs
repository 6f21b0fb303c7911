//! Admin API: keys, credentials, audit; and what operators watch.

use super::error::Problem;
use crate::service::{KeySpec, Lent, Service};
use crate::store::{AuditRow, CredentialRow, KeyRow};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyward_core::admission::{Allow, Status};
use keyward_core::audit::Entry;
use keyward_core::hex;
use keyward_core::money::Nanodollars;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

const MAX_PAGE: u32 = 1_000;
/// Largest import of records at a time, in bytes.
const MAX_IMPORT: usize = 64 * 1024 * 1024;

#[derive(Clone)]
pub struct Admin {
    pub service: Arc<Service>,
    pub metrics: PrometheusHandle,
}

pub fn router(admin: Admin) -> Router {
    let guarded = Router::new()
        .route("/v1/keys", get(list_keys).post(create_key))
        .route("/v1/keys/{id}", get(show_key).delete(revoke_key))
        .route("/v1/credentials", get(list_credentials).post(add_credential))
        .route("/v1/credentials/{id}", delete(remove_credential))
        .route("/v1/audit/{key}", get(audit_page))
        .route("/v1/audit/{key}/bundle", get(audit_bundle))
        .route("/v1/settlements/import", post(import_settlements).layer(DefaultBodyLimit::max(MAX_IMPORT)))
        .layer(middleware::from_fn_with_state(admin.clone(), authenticate));
    Router::new()
        .merge(guarded)
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(|State(admin): State<Admin>| async move { admin.metrics.render() }))
        .with_state(admin)
}

/// Who calls, for the audit chain.
#[derive(Clone)]
struct Actor(String);

async fn authenticate(State(admin): State<Admin>, mut request: Request, next: Next) -> Result<Response, Problem> {
    let token = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()?.strip_prefix("Bearer "));
    let role = match token {
        Some(token) => admin.service.admin_role(token).await?,
        None => None,
    };
    let role = role
        .ok_or_else(|| Problem::new(StatusCode::UNAUTHORIZED, "unauthenticated", "send an admin token: authorization: Bearer kwa_..."))?;
    request.extensions_mut().insert(Actor(role));
    Ok(next.run(request).await)
}

async fn ready(State(admin): State<Admin>) -> Result<&'static str, Problem> {
    admin.service.ready().await?;
    Ok("ready\n")
}

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    cursor: String,
    #[serde(default = "default_limit")]
    limit: u32,
}

fn default_limit() -> u32 {
    100
}

/// One budget of the cap. Only `total` exists in this version.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    usd: String,
    window: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateKey {
    #[serde(default)]
    label: String,
    #[serde(default)]
    allow: Allow,
    #[serde(default)]
    budgets: Vec<Budget>,
    #[serde(default)]
    expires_in: Option<String>,
}

/// A key without its token.
#[derive(Serialize)]
struct KeyView {
    id: String,
    label: String,
    status: Status,
    allow: Allow,
    budget_usd: Option<String>,
    spent_usd: String,
    reserved_usd: String,
    /// The same three as integers, in nanodollars.
    budget_nanodollars: Option<i64>,
    spent_nanodollars: i64,
    reserved_nanodollars: i64,
    in_flight: u64,
    created_ms: u64,
    expires_ms: Option<u64>,
}

impl From<KeyRow> for KeyView {
    fn from(row: KeyRow) -> Self {
        KeyView {
            id: row.id,
            label: row.label,
            status: row.status,
            allow: row.allow,
            budget_usd: row.cap.map(Nanodollars::to_usd),
            spent_usd: row.spent.to_usd(),
            reserved_usd: row.reserved.to_usd(),
            budget_nanodollars: row.cap.map(|cap| cap.0),
            spent_nanodollars: row.spent.0,
            reserved_nanodollars: row.reserved.0,
            in_flight: row.in_flight,
            created_ms: row.created_ms,
            expires_ms: row.expires_ms,
        }
    }
}

#[derive(Serialize)]
struct CreatedKey {
    #[serde(flatten)]
    key: KeyView,
    /// Shown this once.
    token: String,
}

#[derive(Serialize)]
struct List<T> {
    data: Vec<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddCredential {
    provider: String,
    #[serde(default)]
    label: String,
    #[serde(default)]
    account: Option<String>,
    secret: zeroize::Zeroizing<String>,
}

/// A credential without its secret.
#[derive(Serialize)]
struct CredentialView {
    id: String,
    provider: String,
    label: String,
    account: String,
    created_ms: u64,
    /// `stored`, or `vault_string`: in memory until the service stops.
    source: &'static str,
}

impl From<CredentialRow> for CredentialView {
    fn from(row: CredentialRow) -> Self {
        let CredentialRow { id, provider, label, account, created_ms, .. } = row;
        CredentialView { id, provider, label, account, created_ms, source: "stored" }
    }
}

impl From<Lent> for CredentialView {
    fn from(lent: Lent) -> Self {
        let Lent { id, provider, label, account, since_ms, .. } = lent;
        CredentialView { id, provider, label, account, created_ms: since_ms, source: "vault_string" }
    }
}

#[derive(Deserialize)]
struct AuditRange {
    #[serde(default = "first")]
    from: u64,
    #[serde(default = "default_limit")]
    limit: u32,
}

fn first() -> u64 {
    1
}

#[derive(Serialize)]
struct AuditView {
    seq: u64,
    time_ms: u64,
    event: &'static str,
    /// What the entry says, for people; the bytes beside it are what counts.
    text: String,
    entry: String,
    mac: String,
}

async fn create_key(
    State(admin): State<Admin>,
    actor: axum::Extension<Actor>,
    body: Result<Json<CreateKey>, JsonRejection>,
) -> Result<Response, Problem> {
    let Json(body) = body.map_err(bad_body)?;
    if body.label.len() > 200 {
        return Err(Problem::field("label", "must be at most 200 bytes"));
    }
    let cap = match body.budgets.as_slice() {
        [] => None,
        [one] if one.window == "total" => Some(parse_cap(&one.usd)?),
        [_] => return Err(Problem::field("budgets[0].window", "this version knows only \"total\"")),
        _ => return Err(Problem::field("budgets", "this version takes one budget")),
    };
    let expires_in = body.expires_in.as_deref().map(parse_duration).transpose()?;
    let spec = KeySpec { label: body.label, allow: body.allow, cap, expires_in };
    let (row, token) = admin.service.create_key(spec, &actor.0.0).await?;
    let created = CreatedKey { key: row.into(), token: token.reveal().to_owned() };
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], Json(created)).into_response())
}

/// At most a billion dollars, so that no sum of holds under it leaves its type.
fn parse_cap(usd: &str) -> Result<Nanodollars, Problem> {
    const MOST: Nanodollars = Nanodollars(1_000_000_000_000_000_000);
    let cap = Nanodollars::parse_usd(usd).filter(|cap| *cap <= MOST);
    cap.ok_or_else(|| Problem::field("budgets[0].usd", "expected dollars such as \"50.00\", at most a billion"))
}

/// `30s`, `10m`, `12h`, `7d`.
fn parse_duration(text: &str) -> Result<Duration, Problem> {
    let wrong = || Problem::field("expires_in", "expected a duration such as \"30s\", \"10m\", \"12h\" or \"7d\"");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let number: u32 = text.strip_suffix(unit).and_then(|n| n.parse().ok()).ok_or_else(wrong)?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

async fn list_keys(State(admin): State<Admin>, Query(page): Query<Page>) -> Result<Response, Problem> {
    let limit = page.limit.clamp(1, MAX_PAGE);
    let rows = admin.service.keys(&page.cursor, limit).await?;
    let full = rows.len() >= limit as usize;
    let next_cursor = rows.last().filter(|_| full).map(|row| row.id.clone());
    Ok(Json(List { data: rows.into_iter().map(KeyView::from).collect(), next_cursor }).into_response())
}

async fn show_key(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Response, Problem> {
    Ok(Json(KeyView::from(admin.service.key(&id).await?)).into_response())
}

async fn revoke_key(State(admin): State<Admin>, actor: axum::Extension<Actor>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    admin.service.revoke_key(&id, &actor.0.0).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn add_credential(State(admin): State<Admin>, body: Result<Json<AddCredential>, JsonRejection>) -> Result<Response, Problem> {
    let Json(body) = body.map_err(bad_body)?;
    let row = admin.service.add_credential(&body.provider, &body.label, body.account.as_deref(), &body.secret).await?;
    Ok((StatusCode::CREATED, Json(CredentialView::from(row))).into_response())
}

async fn list_credentials(State(admin): State<Admin>) -> Result<Response, Problem> {
    let stored = admin.service.credentials().await?.into_iter().map(CredentialView::from);
    let data = stored.chain(admin.service.lent().into_iter().map(CredentialView::from)).collect();
    Ok(Json(List { data, next_cursor: None }).into_response())
}

async fn remove_credential(State(admin): State<Admin>, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    admin.service.remove_credential(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn audit_page(State(admin): State<Admin>, Path(key): Path<String>, Query(range): Query<AuditRange>) -> Result<Response, Problem> {
    let rows = admin.service.audit(&key, range.from, range.limit.clamp(1, MAX_PAGE)).await?;
    let data: Vec<AuditView> = rows.iter().filter_map(audit_view).collect();
    Ok(Json(List { data, next_cursor: None }).into_response())
}

fn audit_view(row: &AuditRow) -> Option<AuditView> {
    let entry = Entry::decode(&row.entry)?;
    Some(AuditView {
        seq: row.seq,
        time_ms: entry.time_ms,
        event: entry.event.name(),
        text: format!("{:?}", entry.event),
        entry: STANDARD.encode(&row.entry),
        mac: hex::encode(&row.mac),
    })
}

/// The whole chain of a key with what is needed to check it (docs/audit-format.md): JSON lines.
async fn audit_bundle(State(admin): State<Admin>, Path(key): Path<String>) -> Result<Response, Problem> {
    let mut entries = String::new();
    let (mut count, mut last, mut epochs) = (0u64, [0; 32], std::collections::BTreeSet::new());
    loop {
        let rows = admin.service.audit(&key, count + 1, MAX_PAGE).await?;
        for row in &rows {
            count = row.seq;
            last = row.mac;
            epochs.extend(Entry::decode(&row.entry).map(|entry| entry.epoch));
            let line = serde_json::json!({ "seq": row.seq, "entry": STANDARD.encode(&row.entry), "mac": hex::encode(&row.mac) });
            entries.push_str(&format!("{line}\n"));
        }
        if rows.len() < MAX_PAGE as usize {
            break;
        }
    }
    let keys: serde_json::Map<_, _> =
        epochs.iter().map(|&e| (e.to_string(), hex::encode(&admin.service.chain_key(&key, e).0).into())).collect();
    let head = serde_json::json!({ "format": "keyward-audit-export/v1", "origin": admin.service.origin(), "key": key, "chain_keys": keys });
    let newest = epochs.last().copied().unwrap_or(0);
    let tail = serde_json::json!({ "count": count, "head": hex::encode(&admin.service.chain_key(&key, newest).head(count, &last)) });
    let body = format!("{head}\n{entries}{tail}\n");
    Ok(([(header::CONTENT_TYPE, "application/jsonl")], body).into_response())
}

/// What an import did.
#[derive(Serialize)]
struct Imported {
    taken: u64,
    rejected: u64,
}

/// Takes the sealed records of an Envoy that died before it sent them: one record a line.
async fn import_settlements(State(admin): State<Admin>, body: String) -> Result<Response, Problem> {
    let (taken, rejected) = admin.service.take_records(body.lines()).await?;
    Ok(Json(Imported { taken, rejected }).into_response())
}

fn bad_body(rejection: JsonRejection) -> Problem {
    // The rejection's text names field and place; it never repeats the value of a secret.
    let detail = match &rejection {
        JsonRejection::JsonDataError(_) | JsonRejection::JsonSyntaxError(_) => {
            "the body does not fit: check field names and types".to_owned()
        }
        other => other.body_text(),
    };
    Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid body", detail)
}
