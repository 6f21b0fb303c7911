//! `/v1/credentials`: real secrets, which go in and never come out.

use super::api::{Admin, Json, List, Page, Params, Path, Precondition, etag, page};
use super::error::Problem;
use crate::config::patch::{present, some};
use crate::config::{Credential, Kind};
use crate::directory::{Meta, Organisation};
use crate::service::access::{Permission, Principal};
use crate::service::{Lent, ORGANISATION, ServiceError};
use crate::store::Expect;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use zeroize::Zeroizing;

/// How often a change is tried again that somebody else's came between.
const TRIES: usize = 5;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new().routes(routes!(list_credentials, add_credential)).routes(routes!(
        show_credential,
        change_credential,
        remove_credential
    ))
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
}

fn view(name: &str, credential: &Credential, meta: &Meta) -> CredentialView {
    CredentialView {
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
/// In the order of their names, without secrets.
#[utoipa::path(get, path = "/v1/credentials", tag = "credentials", params(Page), responses((status = 200, body = List<CredentialView>)))]
async fn list_credentials(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let stored = organisation.document.credentials.keys().filter_map(|name| find(&organisation, name).ok()).map(|(view, _)| view);
    let mut data: Vec<CredentialView> = stored.chain(lent(&admin, &who)).filter(|credential| credential.name > after).collect();
    data.sort_by(|a, b| a.name.cmp(&b.name));
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
    if let Some(lent) = lent(&admin, &who).into_iter().find(|lent| lent.id == name) {
        return Ok((etag(lent.version), axum::Json(lent)).into_response());
    }
    let name = admin.service.credential_name(&who, &name)?;
    let (view, meta) = find(&*admin.service.organisation(&who.organisation)?, &name)?;
    Ok((etag(meta.version), axum::Json(view)).into_response())
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
                return Ok((etag(meta.version), axum::Json(view(&name, &credential, &meta))).into_response());
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
