//! `/v1/keys`: virtual keys.

use super::api::{Admin, Json, List, Params, Path, Precondition, etag, page};
use super::error::Problem;
use super::standing::Standing;
use crate::config::patch::{ChangeRates, LimitsPatch, object, present, some};
use crate::config::{Allow, Budget, Enforce, Quota, Rates, written};
use crate::directory::Organisation;
use crate::service::access::Principal;
use crate::service::keys::{AllowPatch, FieldsPatch, KeyPatch, KeySpec};
use crate::store::KeyRow;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use keyward_core::admission::{self, Status};
use keyward_core::limits::Window;
use keyward_core::money::Nanodollars;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .routes(routes!(list_keys, create_key))
        .routes(routes!(show_key, change_key, revoke_key))
        .routes(routes!(rotate_key))
        .routes(routes!(erase_personal))
}

#[derive(Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
#[derive(Default)]
pub struct CreateKey {
    /// At most 200 bytes.
    label: String,
    /// A developer's default: their own team.
    team: Option<String>,
    /// Limits the key beside its own limits, and gives it an expiry when it brings none.
    policy: Option<String>,
    #[serde(deserialize_with = "object")]
    allow: Allow,
    budgets: Vec<Budget>,
    quotas: Vec<Quota>,
    #[serde(deserialize_with = "object")]
    rates: Rates,
    /// `shadow` is not for developers.
    enforce: Enforce,
    /// `30s`, `10m`, `12h`, `7d`.
    #[schema(example = "10m")]
    expires_in: Option<String>,
    /// Such as user, feature, run. Erased with the personal fields.
    tags: BTreeMap<String, String>,
    /// Personal data, such as name or e-mail. They stand beside the audit chain, and can be erased.
    personal: Option<BTreeMap<String, String>>,
}

/// What changes (RFC 7396): a field that is absent stays, `null` takes it away.
#[derive(Deserialize, ToSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeKey {
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    label: Option<Option<String>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    team: Option<Option<String>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    policy: Option<Option<String>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<ChangeAllow>)]
    allow: Option<Option<ChangeAllow>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<Budget>>)]
    budgets: Option<Option<Vec<Budget>>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<Quota>>)]
    quotas: Option<Option<Vec<Quota>>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<ChangeRates>)]
    rates: Option<Option<ChangeRates>>,
    /// `shadow` is not for developers.
    #[serde(deserialize_with = "some")]
    #[schema(nullable = false)]
    enforce: Option<Enforce>,
    /// Counted from now.
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>, example = "12h")]
    expires_in: Option<Option<String>>,
    /// Merged into those that there are; `null` as a value takes one away.
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    tags: Option<Fields>,
    /// As with tags.
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>)]
    personal: Option<Fields>,
    /// `active` lets a frozen key go on; that is not for developers.
    #[serde(deserialize_with = "some")]
    #[schema(nullable = false)]
    status: Option<Thawed>,
}

/// The fields of a merge patch on tags or personal data; `None`: all of them go.
type Fields = Option<BTreeMap<String, Option<String>>>;

fn fields_patch(fields: Fields) -> FieldsPatch {
    fields.map_or(FieldsPatch::Clear, FieldsPatch::Merge)
}

/// What changes in what is allowed; a list that is absent stays.
#[derive(Serialize, Deserialize, ToSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeAllow {
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<String>>)]
    models: Option<Option<Vec<String>>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<String>>)]
    endpoints: Option<Option<Vec<String>>>,
}

fn allow_patch(change: Option<ChangeAllow>) -> AllowPatch {
    match change {
        Some(ChangeAllow { models, endpoints }) => {
            AllowPatch { models: models.map(Option::unwrap_or_default), endpoints: endpoints.map(Option::unwrap_or_default) }
        }
        None => AllowPatch { models: Some(Vec::new()), endpoints: Some(Vec::new()) },
    }
}

/// The only status that can be written.
#[derive(Serialize, Deserialize, ToSchema, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Thawed {
    Active,
}

/// A key without its token.
#[derive(Serialize, ToSchema)]
pub struct Key {
    id: String,
    label: String,
    #[schema(value_type = KeyStatus)]
    status: Status,
    team: Option<String>,
    policy: Option<String>,
    allow: Allow,
    tags: BTreeMap<String, String>,
    personal: Option<BTreeMap<String, String>>,
    /// Its own limits; its policy's, team's and organisation's come on top.
    budgets: Vec<Budget>,
    quotas: Vec<Quota>,
    rates: Rates,
    enforce: Enforce,
    /// Its budget of the window `total`: its own or its policy's, the lower one.
    budget_usd: Option<String>,
    /// In all its life.
    spent_usd: String,
    reserved_usd: String,
    /// The same three as integers, in nanodollars.
    budget_nanodollars: Option<i64>,
    spent_nanodollars: i64,
    reserved_nanodollars: i64,
    #[serde(flatten)]
    standing: Standing,
    /// Unix milliseconds.
    created_ms: u64,
    expires_ms: Option<u64>,
    /// Counts changes; the number in the ETag.
    version: u64,
}

#[allow(dead_code, reason = "stands for the core's type in the OpenAPI document")]
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
enum KeyStatus {
    Active,
    Frozen,
    Revoked,
}

impl Key {
    /// `organisation`: where its policy is.
    fn of(row: KeyRow, organisation: &Organisation) -> Self {
        let (budgets, quotas, rates) = written(&row.limits);
        let policy = row.policy.as_ref().and_then(|policy| organisation.in_force.policies.get(policy)).map(|policy| &policy.limits);
        let cap = std::iter::once(&row.limits).chain(policy).filter_map(|limits| limits.budget(Window::Total)).min();
        let total = row.account.sums(Window::Total);
        Key {
            id: row.id,
            label: row.label,
            status: row.status,
            team: row.team,
            policy: row.policy,
            allow: Allow::from(&row.allow),
            tags: row.tags,
            personal: row.personal,
            budgets,
            quotas,
            rates,
            enforce: row.enforce.into(),
            budget_usd: cap.map(Nanodollars::to_usd),
            spent_usd: total.spent.to_usd(),
            reserved_usd: total.reserved.to_usd(),
            budget_nanodollars: cap.map(|cap| cap.0),
            spent_nanodollars: total.spent.0,
            reserved_nanodollars: total.reserved.0,
            standing: Standing::of(&row.account),
            created_ms: row.created_ms,
            expires_ms: row.expires_ms,
            version: row.version,
        }
    }
}

/// A key with its token, which is shown this once.
#[derive(Serialize, ToSchema)]
pub struct KeyWithToken {
    #[serde(flatten)]
    key: Key,
    #[schema(example = "vk_...")]
    token: String,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct KeyQuery {
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Most items, 1 to 1000.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
    /// Only keys of this team.
    team: Option<String>,
}

/// List keys
///
/// In the order of their ids. A developer sees the keys of their own team.
#[utoipa::path(get, path = "/v1/keys", tag = "keys", params(KeyQuery), responses((status = 200, body = List<Key>)))]
async fn list_keys(State(admin): State<Admin>, who: Principal, Params(query): Params<KeyQuery>) -> Result<Response, Problem> {
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let rows = admin.service.keys(&who, query.team.as_deref(), &after, limit + 1).await?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let list = List::of(rows.into_iter().map(|row| Key::of(row, &organisation)).collect(), limit, |key: &Key| &key.id);
    Ok(axum::Json(list).into_response())
}

/// Make a key
///
/// The token is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/keys", tag = "keys", request_body = CreateKey,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 201, body = KeyWithToken, headers(("ETag" = String)))))]
async fn create_key(State(admin): State<Admin>, who: Principal, Json(body): Json<CreateKey>) -> Result<Response, Problem> {
    let spec = KeySpec {
        label: body.label,
        team: body.team,
        policy: body.policy,
        allow: admission::Allow::from(&body.allow),
        budgets: body.budgets,
        quotas: body.quotas,
        rates: body.rates,
        enforce: body.enforce.into(),
        expires_in: body.expires_in,
        tags: body.tags,
        personal: body.personal,
    };
    let (row, token) = admin.service.create_key(&who, spec).await?;
    Ok((StatusCode::CREATED, with_token(&admin, row, token.reveal())?).into_response())
}

fn with_token(admin: &Admin, row: KeyRow, token: &str) -> Result<Response, Problem> {
    let (tag, organisation) = (etag(row.version), admin.service.organisation(&row.organisation)?);
    let created = KeyWithToken { key: Key::of(row, &organisation), token: token.to_owned() };
    Ok(([(header::CACHE_CONTROL, "no-store")], tag, axum::Json(created)).into_response())
}

fn shown(admin: &Admin, row: KeyRow) -> Result<Response, Problem> {
    let organisation = admin.service.organisation(&row.organisation)?;
    Ok((etag(row.version), axum::Json(Key::of(row, &organisation))).into_response())
}

/// Show a key
#[utoipa::path(get, path = "/v1/keys/{id}", tag = "keys", params(("id" = String, Path)), responses((status = 200, body = Key, headers(("ETag" = String)))))]
async fn show_key(State(admin): State<Admin>, who: Principal, Path(id): Path<String>) -> Result<Response, Problem> {
    shown(&admin, admin.service.key(&who, &id).await?)
}

/// Change a key
///
/// JSON merge patch (RFC 7396): what is absent stays as it is.
#[utoipa::path(patch, path = "/v1/keys/{id}", tag = "keys", request_body = ChangeKey,
    params(("id" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 200, body = Key, headers(("ETag" = String)))))]
async fn change_key(
    State(admin): State<Admin>,
    who: Principal,
    Path(id): Path<String>,
    expected: Precondition,
    Json(body): Json<ChangeKey>,
) -> Result<Response, Problem> {
    let patch = KeyPatch {
        label: body.label.map(Option::unwrap_or_default),
        team: body.team,
        policy: body.policy,
        allow: body.allow.map(allow_patch),
        limits: LimitsPatch { budgets: body.budgets, quotas: body.quotas, rates: body.rates },
        enforce: body.enforce.map(Into::into),
        expires_in: body.expires_in,
        tags: body.tags.map(fields_patch),
        personal: body.personal.map(fields_patch),
        active: body.status.is_some(),
    };
    shown(&admin, admin.service.update_key(&who, &id, expected.version(), &patch).await?)
}

/// Revoke a key for good
///
/// It is refused from the next admission on. Twice is no error.
#[utoipa::path(delete, path = "/v1/keys/{id}", tag = "keys",
    params(("id" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 204)))]
async fn revoke_key(
    State(admin): State<Admin>,
    who: Principal,
    Path(id): Path<String>,
    expected: Precondition,
) -> Result<StatusCode, Problem> {
    admin.service.revoke_key(&who, &id, expected.version()).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize, ToSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub struct RotateKey {
    /// How long the old token works on; default: not at all.
    #[schema(example = "1h")]
    overlap: Option<String>,
}

/// Give a key a new token
///
/// The key stays the same: id, budget, chain. Its old token works until the overlap ends.
#[utoipa::path(post, path = "/v1/keys/{id}/rotate", tag = "keys", request_body = RotateKey,
    params(("id" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read"),
        ("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 200, body = KeyWithToken, headers(("ETag" = String)))))]
async fn rotate_key(
    State(admin): State<Admin>,
    who: Principal,
    Path(id): Path<String>,
    expected: Precondition,
    Json(body): Json<RotateKey>,
) -> Result<Response, Problem> {
    let overlap = body.overlap.as_deref().unwrap_or("0s");
    let (row, token) = admin.service.rotate_key(&who, &id, expected.version(), overlap).await?;
    with_token(&admin, row, token.reveal())
}

/// Erase a key's personal fields and tags
///
/// The audit chain keeps only a salted hash of them, and the salt goes as well.
#[utoipa::path(delete, path = "/v1/keys/{id}/personal", tag = "keys", params(("id" = String, Path)), responses((status = 204)))]
async fn erase_personal(State(admin): State<Admin>, who: Principal, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    admin.service.erase_personal(&who, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}
