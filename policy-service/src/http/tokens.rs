//! `/v1/admin-tokens` and `/v1/organisations`: who may use this API.

use super::api::{Admin, Json, List, Page, Params, Path, page};
use super::error::Problem;
use crate::service::access::{Principal, Role, TokenSpec};
use crate::store::TokenRow;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .routes(routes!(list_tokens, create_token))
        .routes(routes!(revoke_token))
        .routes(routes!(list_organisations, create_organisation))
        .routes(routes!(who_am_i))
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    role: Role,
    /// A developer's team.
    team: Option<String>,
    #[serde(default)]
    label: String,
    /// `30s`, `10m`, `12h`, `7d`; default: never.
    #[schema(example = "30d")]
    expires_in: Option<String>,
}

/// An admin token without the token.
#[derive(Serialize, ToSchema)]
pub struct TokenView {
    id: String,
    role: String,
    team: Option<String>,
    label: String,
    /// Unix milliseconds.
    created_ms: u64,
    expires_ms: Option<u64>,
    revoked_ms: Option<u64>,
}

impl From<TokenRow> for TokenView {
    fn from(row: TokenRow) -> Self {
        TokenView {
            id: row.id,
            role: row.role,
            team: row.team,
            label: row.label,
            created_ms: row.created_ms,
            expires_ms: row.expires_ms,
            revoked_ms: row.revoked_ms,
        }
    }
}

/// An admin token, shown this once.
#[derive(Serialize, ToSchema)]
pub struct NewToken {
    #[serde(flatten)]
    about: TokenView,
    #[schema(example = "kwa_...")]
    token: String,
}

/// List admin tokens
#[utoipa::path(get, path = "/v1/admin-tokens", tag = "admin tokens", params(Page), responses((status = 200, body = List<TokenView>)))]
async fn list_tokens(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let rows = admin.service.admin_tokens(&who, &after, limit + 1).await?;
    Ok(axum::Json(List::of(rows.into_iter().map(TokenView::from).collect(), limit, |token: &TokenView| &token.id)).into_response())
}

/// Make an admin token
///
/// The token is in this answer and nowhere else.
#[utoipa::path(post, path = "/v1/admin-tokens", tag = "admin tokens", request_body = CreateToken,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 201, body = NewToken)))]
async fn create_token(State(admin): State<Admin>, who: Principal, Json(body): Json<CreateToken>) -> Result<Response, Problem> {
    let spec = TokenSpec { role: body.role, team: body.team, label: body.label, expires_in: body.expires_in };
    let (row, token) = admin.service.create_admin_token(&who, spec).await?;
    let created = NewToken { about: row.into(), token: token.to_string() };
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], axum::Json(created)).into_response())
}

/// Revoke an admin token
///
/// Twice is no error.
#[utoipa::path(delete, path = "/v1/admin-tokens/{id}", tag = "admin tokens", params(("id" = String, Path)), responses((status = 204)))]
async fn revoke_token(State(admin): State<Admin>, who: Principal, Path(id): Path<String>) -> Result<StatusCode, Problem> {
    admin.service.revoke_admin_token(&who, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Who the token belongs to.
#[derive(Serialize, ToSchema)]
pub struct Whoami {
    token_id: String,
    organisation: String,
    role: Role,
    team: Option<String>,
}

/// Who am I
#[utoipa::path(get, path = "/v1/whoami", tag = "admin tokens", responses((status = 200, body = Whoami)))]
async fn who_am_i(who: Principal) -> Response {
    axum::Json(Whoami { token_id: who.token_id, organisation: who.organisation, role: who.role, team: who.team }).into_response()
}

#[derive(Serialize, ToSchema)]
pub struct OrganisationView {
    id: String,
    label: String,
    /// Counts changes of its configuration.
    revision: u64,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateOrganisation {
    #[schema(example = "org_acme")]
    id: String,
    #[serde(default)]
    label: String,
}

/// A new organisation with its first admin token, shown this once.
#[derive(Serialize, ToSchema)]
pub struct NewOrganisation {
    id: String,
    label: String,
    #[schema(example = "kwa_...")]
    token: String,
}

/// List organisations
///
/// The installation's own organisation sees all of them, another only itself.
#[utoipa::path(get, path = "/v1/organisations", tag = "organisations", params(Page), responses((status = 200, body = List<OrganisationView>)))]
async fn list_organisations(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let all = admin.service.organisations(&who)?.into_iter().filter(|(id, _)| *id > after).take(limit as usize + 1);
    let data =
        all.map(|(id, organisation)| OrganisationView { id, label: organisation.label.clone(), revision: organisation.rev }).collect();
    Ok(axum::Json(List::of(data, limit, |organisation: &OrganisationView| &organisation.id)).into_response())
}

/// Make an organisation
///
/// It has its own keys, credentials, configuration and administrators; the token in the answer is its first.
#[utoipa::path(post, path = "/v1/organisations", tag = "organisations", request_body = CreateOrganisation,
    params(("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
    responses((status = 201, body = NewOrganisation)))]
async fn create_organisation(
    State(admin): State<Admin>,
    who: Principal,
    Json(body): Json<CreateOrganisation>,
) -> Result<Response, Problem> {
    let token = admin.service.create_organisation(&who, &body.id, &body.label).await?.to_string();
    let created = NewOrganisation { id: body.id, label: body.label, token };
    Ok((StatusCode::CREATED, [(header::CACHE_CONTROL, "no-store")], axum::Json(created)).into_response())
}
