//! `/v1/credentials`: real secrets, which go in and never come out.

use super::api::{Admin, Json, List, Page, Params, Path, Precondition, etag, page};
use super::error::Problem;
use crate::config::patch::{present, some};
use crate::config::{Credential, Kind};
use crate::directory::{Meta, Organisation};
use crate::service::access::{Permission, Principal};
use crate::service::key_states::{RoomNow, StateNow, state_name};
use crate::service::{Lent, ORGANISATION, ServiceError, now_ms};
use crate::store::Expect;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use keyward_core::limits::date_text;
use keyward_core::verdict::Left;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use zeroize::Zeroizing;

/// How often a change is tried again that somebody else's came between.
const TRIES: usize = 5;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .routes(routes!(list_credentials, add_credential))
        .routes(routes!(show_credential, change_credential, remove_credential))
        .routes(routes!(reset_credential))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddCredential {
    /// Default: the id that it gets.
    name: Option<String>,
    #[schema(example = "openai")]
    provider: String,
    #[serde(default)]
    label: String,
    /// The provider's account whose limits it shares; default: its own.
    account: Option<String>,
    #[schema(value_type = String, write_only)]
    secret: Zeroizing<String>,
}

/// What changes (RFC 7396): a field that is absent stays, `null` takes it away.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeCredential {
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    label: Option<Option<String>>,
    /// `null`: its own.
    #[serde(default, deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    account: Option<Option<String>>,
    /// Takes the place of the one that is stored, from the next admission on.
    #[serde(default, deserialize_with = "some")]
    #[schema(value_type = String, write_only, nullable = false)]
    secret: Option<Zeroizing<String>>,
}

/// A credential without its secret.
#[derive(Serialize, ToSchema)]
pub struct CredentialView {
    id: String,
    name: String,
    provider: String,
    label: String,
    account: String,
    /// Where the configuration says that the secret is.
    from: Option<String>,
    /// `stored`, or `vault_string`: in memory until the service stops.
    source: &'static str,
    managed_by: &'static str,
    version: u64,
    created_ms: u64,
    updated_ms: u64,
    /// `ok`, or the worst that keeps it from being used with some model: `overloaded`, `rate_limited`, `exhausted`, `rejected`.
    #[schema(example = "ok")]
    state: &'static str,
    /// When that ends; `null`: it does not stand, or stands until an operator acts.
    #[schema(example = "2026-11-20T14:35:26Z")]
    until: Option<String>,
    /// Everything that keeps it from being used, the worst first.
    states: Vec<StateView>,
    /// What its account has left, by model, as the provider last said it.
    headroom: Vec<HeadroomView>,
}

/// What keeps a credential from being used.
#[derive(Serialize, ToSchema)]
pub struct StateView {
    #[schema(example = "rate_limited")]
    state: &'static str,
    /// The provider's name of the model; `null`: any.
    model: Option<String>,
    /// `null`: until an operator acts.
    until: Option<String>,
    remaining_ms: Option<u64>,
}

/// What an account has left of the provider's limits for a model.
#[derive(Serialize, ToSchema)]
pub struct HeadroomView {
    model: String,
    requests: Option<LeftView>,
    tokens: Option<LeftView>,
    /// When the provider said so.
    told: String,
}

#[derive(Serialize, ToSchema)]
pub struct LeftView {
    remaining: u64,
    /// `null`: the provider does not say.
    limit: Option<u64>,
    /// When it is whole again; `null`: the provider does not say.
    reset: Option<String>,
}

impl CredentialView {
    /// Adds how it stands now.
    fn standing(mut self, admin: &Admin, organisation: &Organisation) -> Self {
        let (states, rooms) = admin.service.standing_of(organisation, &self.id);
        let now = now_ms();
        let later = |ms: u64| instant_text(now.saturating_add(ms));
        let states = states.into_iter().map(|StateNow { state, model, left_ms }| StateView {
            state: state_name(state),
            model,
            until: left_ms.map(later),
            remaining_ms: left_ms,
        });
        self.states = states.collect();
        if let Some(worst) = self.states.first() {
            (self.state, self.until) = (worst.state, worst.until.clone());
        }
        let left = |left: Left, age_ms: u64| LeftView {
            remaining: left.remaining,
            limit: left.limit,
            reset: left.reset_ms.map(|ms| instant_text(now.saturating_sub(age_ms).saturating_add(ms))),
        };
        let rooms = rooms.into_iter().map(|RoomNow { model, room, age_ms }| HeadroomView {
            model,
            requests: room.requests.map(|of| left(of, age_ms)),
            tokens: room.tokens.map(|of| left(of, age_ms)),
            told: instant_text(now.saturating_sub(age_ms)),
        });
        self.headroom = rooms.collect();
        self
    }
}

/// RFC 3339 in UTC, from Unix milliseconds; rounded up to the second, so that what is over then is over.
fn instant_text(unix_ms: u64) -> String {
    let seconds = unix_ms.div_ceil(1_000);
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    format!("{}T{:02}:{:02}:{:02}Z", date_text(day), second / 3_600, second / 60 % 60, second % 60)
}

fn view(name: &str, credential: &Credential, meta: &Meta) -> CredentialView {
    CredentialView {
        state: "ok",
        until: None,
        states: Vec::new(),
        headroom: Vec::new(),
        id: meta.id.clone(),
        name: name.to_owned(),
        provider: credential.provider.clone(),
        label: credential.label.clone(),
        account: credential.account.clone().unwrap_or_else(|| meta.id.clone()),
        from: credential.from.clone(),
        source: "stored",
        managed_by: if meta.managed { "configuration" } else { "api" },
        version: meta.version,
        created_ms: meta.created_ms,
        updated_ms: meta.updated_ms,
    }
}

/// What a vault string lends, for whoever belongs to the installation itself.
fn lent(admin: &Admin, who: &Principal) -> Vec<CredentialView> {
    let view = |lent: Lent| CredentialView {
        state: "ok",
        until: None,
        states: Vec::new(),
        headroom: Vec::new(),
        name: lent.id.clone(),
        id: lent.id,
        provider: lent.provider,
        label: lent.label,
        account: lent.account,
        from: None,
        source: "vault_string",
        managed_by: "vault_string",
        version: 1,
        created_ms: lent.since_ms,
        updated_ms: lent.since_ms,
    };
    if who.organisation == ORGANISATION { admin.service.lent().into_iter().map(view).collect() } else { Vec::new() }
}

fn find(organisation: &Organisation, name: &str) -> Result<(CredentialView, Meta), Problem> {
    let found = organisation.document.credentials.get(name).zip(organisation.meta(Kind::Credential, name));
    let (credential, meta) = found.ok_or(ServiceError::NotFound("credential"))?;
    Ok((view(name, credential, meta), meta.clone()))
}

/// List credentials
///
/// In the order of their names, without secrets; each with what keeps it from being used, and what its account has left.
#[utoipa::path(get, path = "/v1/credentials", tag = "credentials", params(Page), responses((status = 200, body = List<CredentialView>)))]
async fn list_credentials(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let stored = organisation.document.credentials.keys().filter_map(|name| find(&organisation, name).ok()).map(|(view, _)| view);
    let mut data: Vec<CredentialView> = stored.chain(lent(&admin, &who)).filter(|credential| credential.name > after).collect();
    data.sort_by(|a, b| a.name.cmp(&b.name));
    let data = data.into_iter().map(|credential| credential.standing(&admin, &organisation)).collect();
    Ok(axum::Json(List::of(data, limit, |credential| &credential.name)).into_response())
}

/// Store a credential
///
/// The secret is encrypted at rest and never shown again.
#[utoipa::path(post, path = "/v1/credentials", tag = "credentials", request_body = AddCredential,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 201, body = CredentialView, headers(("ETag" = String)))))]
async fn add_credential(State(admin): State<Admin>, who: Principal, Json(body): Json<AddCredential>) -> Result<Response, Problem> {
    let secret = Some(body.secret.to_string());
    let credential = Credential { provider: body.provider, label: body.label, account: body.account, from: None, secret };
    let (name, meta) = admin.service.put_credential(&who, body.name.as_deref(), &credential, Expect::Absent).await?;
    Ok((StatusCode::CREATED, etag(meta.version), axum::Json(view(&name, &credential, &meta))).into_response())
}

/// Show a credential, by name or id
#[utoipa::path(get, path = "/v1/credentials/{name}", tag = "credentials", params(("name" = String, Path)),
    responses((status = 200, body = CredentialView, headers(("ETag" = String)))))]
async fn show_credential(State(admin): State<Admin>, who: Principal, Path(name): Path<String>) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    shown(&admin, &who, &name)
}

fn shown(admin: &Admin, who: &Principal, name: &str) -> Result<Response, Problem> {
    let organisation = admin.service.organisation(&who.organisation)?;
    if let Some(lent) = lent(admin, who).into_iter().find(|lent| lent.id == name) {
        return Ok((etag(lent.version), axum::Json(lent.standing(admin, &organisation))).into_response());
    }
    let name = admin.service.credential_name(who, name)?;
    let (view, meta) = find(&organisation, &name)?;
    Ok((etag(meta.version), axum::Json(view.standing(admin, &organisation))).into_response())
}

/// Use a credential again, by name or id
///
/// Takes back all that stands against it and against its account: what the provider rejected or said to be used up is tried again with
/// the next request. A new secret does so by itself.
#[utoipa::path(post, path = "/v1/credentials/{name}/reset", tag = "credentials",
    params(("name" = String, Path), ("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 200, body = CredentialView, headers(("ETag" = String)))))]
async fn reset_credential(State(admin): State<Admin>, who: Principal, Path(name): Path<String>) -> Result<Response, Problem> {
    admin.service.reset_credential(&who, &name).await?;
    shown(&admin, &who, &name)
}

/// Change a credential, or replace its secret
#[utoipa::path(patch, path = "/v1/credentials/{name}", tag = "credentials", request_body = ChangeCredential,
    params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 200, body = CredentialView, headers(("ETag" = String)))))]
async fn change_credential(
    State(admin): State<Admin>,
    who: Principal,
    Path(name): Path<String>,
    expected: Precondition,
    Json(body): Json<ChangeCredential>,
) -> Result<Response, Problem> {
    who.needs(Permission::WriteConfiguration)?;
    admin.service.not_lent(&name)?;
    let name = admin.service.credential_name(&who, &name)?;
    for _ in 0..TRIES {
        let organisation = admin.service.organisation(&who.organisation)?;
        let (_, meta) = find(&organisation, &name)?;
        let mut credential = organisation.document.credentials.get(&name).cloned().ok_or(ServiceError::NotFound("credential"))?;
        credential.label = body.label.clone().map_or(credential.label, Option::unwrap_or_default);
        credential.account = body.account.clone().unwrap_or(credential.account);
        credential.secret = body.secret.as_ref().map(|secret| secret.to_string());
        // Whatever the caller expects: what was read here must still be there.
        let expect = Expect::Version(expected.version().unwrap_or(meta.version));
        match admin.service.put_credential(&who, Some(&name), &credential, expect).await {
            Err(ServiceError::Stale(_)) if expected.version().is_none() => {}
            other => {
                let (name, meta) = other?;
                let view = view(&name, &credential, &meta).standing(&admin, &*admin.service.organisation(&who.organisation)?);
                return Ok((etag(meta.version), axum::Json(view)).into_response());
            }
        }
    }
    Err(ServiceError::Conflict("the credential is being changed by others; try again".to_owned()).into())
}

/// Remove a credential, by name or id
///
/// Refused while a pool names it.
#[utoipa::path(delete, path = "/v1/credentials/{name}", tag = "credentials",
    params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 204)))]
async fn remove_credential(
    State(admin): State<Admin>,
    who: Principal,
    Path(name): Path<String>,
    expected: Precondition,
) -> Result<StatusCode, Problem> {
    who.needs(Permission::WriteConfiguration)?;
    admin.service.not_lent(&name)?;
    let name = admin.service.credential_name(&who, &name)?;
    admin.service.delete_object(&who, Kind::Credential, &name, expected.0).await?;
    Ok(StatusCode::NO_CONTENT)
}
