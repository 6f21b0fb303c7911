//! `/v1/teams`, `/v1/policies`, `/v1/providers`, `/v1/pools`, `/v1/routes`, and all of it at once at `/v1/config`.

use super::api::{Admin, Json, List, Page, Params, Path, Precondition, etag, page};
use super::error::Problem;
use super::standing::{Standing, WindowView};
use crate::config::{Difference, Document, Kind, Object, Policy, Pool, ProviderSettings, Route, Team};
use crate::directory::{Meta, Organisation};
use crate::service::ServiceError;
use crate::service::access::{Permission, Principal};
use crate::store::Expect;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use keyward_core::operation::Provider;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .merge(teams::router())
        .merge(policies::router())
        .merge(pools::router())
        .merge(model_routes::router())
        .routes(routes!(list_providers))
        .routes(routes!(show_provider, put_provider, reset_provider))
        .routes(routes!(show_config, apply_config))
        .routes(routes!(diff_config))
}

/// An object of the configuration with what is known of it.
#[derive(Serialize, ToSchema)]
pub struct Named<T> {
    name: String,
    spec: T,
    /// `configuration`: the last `apply` made it, and the next may remove it.
    #[schema(value_type = ManagedBy)]
    managed_by: &'static str,
    /// Grows with every change; the number in the ETag.
    version: u64,
    /// Unix milliseconds.
    created_ms: u64,
    updated_ms: u64,
    /// Of a team that is shown: requests of its keys that are admitted and not settled.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    in_flight: Option<u64>,
    /// Of a team that is shown: what its keys use together.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    windows: Option<Vec<WindowView>>,
}

#[allow(dead_code, reason = "tells the OpenAPI document what the strings are")]
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
enum ManagedBy {
    Api,
    Configuration,
    Default,
}

impl<T> Named<T> {
    fn new(name: &str, spec: T, meta: &Meta) -> Self {
        let managed_by = if meta.managed { "configuration" } else { "api" };
        let Meta { version, created_ms, updated_ms, .. } = *meta;
        Named { name: name.to_owned(), spec, managed_by, version, created_ms, updated_ms, in_flight: None, windows: None }
    }
}

/// A new object.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewObject<T> {
    name: String,
    spec: T,
}

fn list<T: Object>(
    organisation: &Organisation,
    objects: &BTreeMap<String, T>,
    query: &Page,
    only: Option<&str>,
) -> Result<Response, Problem> {
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let wanted = objects.iter().filter(|(name, _)| **name > after && only.is_none_or(|only| only == name.as_str()));
    let named = |(name, object): (&String, &T)| organisation.meta(T::KIND, name).map(|meta| Named::new(name, object.clone(), meta));
    let data: Vec<Named<T>> = wanted.filter_map(named).take(limit as usize + 1).collect();
    Ok(axum::Json(List::of(data, limit, |object| &object.name)).into_response())
}

async fn show<T: Object>(
    admin: &Admin,
    who: &Principal,
    organisation: &Organisation,
    objects: &BTreeMap<String, T>,
    name: &str,
) -> Result<Response, Problem> {
    let missing = || Problem::from(ServiceError::NotFound(T::KIND.name()));
    let (object, meta) = objects.get(name).zip(organisation.meta(T::KIND, name)).ok_or_else(missing)?;
    let mut named = Named::new(name, object.clone(), meta);
    if T::KIND == Kind::Team {
        let Standing { in_flight, windows } = Standing::of(&admin.service.account(who, Some(name)).await?);
        (named.in_flight, named.windows) = (Some(in_flight), Some(windows));
    }
    Ok((etag(meta.version), axum::Json(named)).into_response())
}

async fn put<T: Object>(admin: &Admin, who: &Principal, name: &str, object: T, expect: Expect) -> Result<Response, ServiceError> {
    let (created, meta) = admin.service.put_object(who, name, &object, expect).await?;
    let status = if created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, etag(meta.version), axum::Json(Named::new(name, object, &meta))).into_response())
}

/// The five operations on one kind of object. They differ in type and path only.
macro_rules! collection {
    ($module:ident, $type:ident, $list_path:literal, $item_path:literal, $tag:literal, $field:ident, $own_only:expr, $read:ident) => {
        mod $module {
            use super::*;

            pub fn router() -> OpenApiRouter<Admin> {
                OpenApiRouter::new().routes(routes!(list_all, create)).routes(routes!(show_one, replace, remove))
            }

            /// A developer sees their own team and no other.
            fn own(who: &Principal) -> Option<&str> {
                if $own_only { who.team.as_deref() } else { None }
            }

            /// List
            #[utoipa::path(get, path = $list_path, tag = $tag, operation_id = concat!("list_", stringify!($module)),
                summary = concat!("List ", $tag), params(Page),
                responses((status = 200, body = List<Named<$type>>)))]
            async fn list_all(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
                who.needs(Permission::$read)?;
                let organisation = admin.service.organisation(&who.organisation)?;
                list(&organisation, &organisation.document.$field, &query, own(&who))
            }

            /// Create
            #[utoipa::path(post, path = $list_path, tag = $tag, operation_id = concat!("create_", stringify!($module)),
                summary = concat!("Make one of the ", $tag), request_body = NewObject<$type>,
                params(("Idempotency-Key" = Option<String>, Header, description = "The same request again gets the same answer, for 24 hours")),
                responses((status = 201, body = Named<$type>, headers(("ETag" = String)))))]
            async fn create(State(admin): State<Admin>, who: Principal, Json(body): Json<NewObject<$type>>) -> Result<Response, Problem> {
                Ok(put(&admin, &who, &body.name, body.spec, Expect::Absent).await?)
            }

            /// Show
            #[utoipa::path(get, path = $item_path, tag = $tag, operation_id = concat!("show_", stringify!($module)),
                summary = concat!("Show one of the ", $tag), params(("name" = String, Path)),
                responses((status = 200, body = Named<$type>, headers(("ETag" = String)))))]
            async fn show_one(State(admin): State<Admin>, who: Principal, Path(name): Path<String>) -> Result<Response, Problem> {
                who.needs(Permission::$read)?;
                let organisation = admin.service.organisation(&who.organisation)?;
                if own(&who).is_some_and(|own| own != name) {
                    return Err(ServiceError::NotFound(<$type as Object>::KIND.name()).into());
                }
                show(&admin, &who, &organisation, &organisation.document.$field, &name).await
            }

            /// Create or replace
            #[utoipa::path(put, path = $item_path, tag = $tag, operation_id = concat!("put_", stringify!($module)),
                summary = concat!("Make or replace one of the ", $tag), request_body = $type,
                params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read"),
                    ("If-None-Match" = Option<String>, Header, description = "*: only if there is none")),
                responses((status = 200, body = Named<$type>, headers(("ETag" = String))), (status = 201, body = Named<$type>, headers(("ETag" = String)))))]
            async fn replace(
                State(admin): State<Admin>,
                who: Principal,
                Path(name): Path<String>,
                expected: Precondition,
                Json(body): Json<$type>,
            ) -> Result<Response, Problem> {
                put(&admin, &who, &name, body, expected.0).await.map_err(|error| expected.failed(error))
            }

            /// Delete
            ///
            /// Refused while something still needs it.
            #[utoipa::path(delete, path = $item_path, tag = $tag, operation_id = concat!("delete_", stringify!($module)),
                summary = concat!("Delete one of the ", $tag),
                params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
                responses((status = 204)))]
            async fn remove(State(admin): State<Admin>, who: Principal, Path(name): Path<String>, expected: Precondition) -> Result<StatusCode, Problem> {
                admin.service.delete_object(&who, <$type as Object>::KIND, &name, expected.0).await?;
                Ok(StatusCode::NO_CONTENT)
            }
        }
    };
}

collection!(teams, Team, "/v1/teams", "/v1/teams/{name}", "teams", teams, true, ReadConfiguration);
collection!(policies, Policy, "/v1/policies", "/v1/policies/{name}", "policies", policies, false, ReadConfiguration);
collection!(pools, Pool, "/v1/pools", "/v1/pools/{name}", "pools", pools, false, ReadSupply);
// Route names may have slashes.
collection!(model_routes, Route, "/v1/routes", "/v1/routes/{*name}", "routes", routes, false, ReadConfiguration);

/// A built-in provider and its settings.
#[derive(Serialize, ToSchema)]
pub struct ProviderView {
    name: String,
    /// The provider's own host; it is what TLS verifies.
    host: String,
    spec: ProviderSettings,
    #[schema(value_type = ManagedBy)]
    managed_by: &'static str,
    /// 0: never set.
    version: u64,
    /// Credentials that are stored for it.
    credentials: usize,
}

fn provider_view(organisation: &Organisation, name: &str) -> Option<ProviderView> {
    let built_in = Provider::by_name(name);
    let meta = organisation.meta(Kind::Provider, name);
    if built_in.is_none() && meta.is_none() {
        return None;
    }
    let host = organisation.site(name).map(|site| site.host.into_owned());
    Some(ProviderView {
        name: name.to_owned(),
        host: host.or(built_in.map(|provider| provider.host.to_owned())).unwrap_or_default(),
        spec: organisation.document.providers.get(name).cloned().unwrap_or_default(),
        managed_by: meta.map_or("default", |meta| if meta.managed { "configuration" } else { "api" }),
        version: meta.map_or(0, |meta| meta.version),
        credentials: organisation.document.credentials.values().filter(|credential| credential.provider == name).count(),
    })
}

/// List providers
#[utoipa::path(get, path = "/v1/providers", tag = "providers", params(Page), responses((status = 200, body = List<ProviderView>)))]
async fn list_providers(State(admin): State<Admin>, who: Principal, Params(query): Params<Page>) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    let (after, limit) = page(query.cursor.as_deref(), query.limit)?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let mut names = organisation.document.provider_names();
    names.retain(|name| *name > after.as_str());
    names.sort_unstable();
    let data: Vec<ProviderView> =
        names.into_iter().filter_map(|name| provider_view(&organisation, name)).take(limit as usize + 1).collect();
    Ok(axum::Json(List::of(data, limit, |provider| &provider.name)).into_response())
}

/// Show a provider
#[utoipa::path(get, path = "/v1/providers/{name}", tag = "providers", params(("name" = String, Path)),
    responses((status = 200, body = ProviderView, headers(("ETag" = String)))))]
async fn show_provider(State(admin): State<Admin>, who: Principal, Path(name): Path<String>) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    let view = provider_view(&*admin.service.organisation(&who.organisation)?, &name).ok_or(ServiceError::NotFound("provider"))?;
    Ok((etag(view.version), axum::Json(view)).into_response())
}

/// Set a provider
#[utoipa::path(put, path = "/v1/providers/{name}", tag = "providers", request_body = ProviderSettings,
    params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read"),
        ("If-None-Match" = Option<String>, Header, description = "*: only if it was never set")),
    responses((status = 200, body = ProviderView, headers(("ETag" = String)))))]
async fn put_provider(
    State(admin): State<Admin>,
    who: Principal,
    Path(name): Path<String>,
    expected: Precondition,
    Json(body): Json<ProviderSettings>,
) -> Result<Response, Problem> {
    who.needs(Permission::WriteConfiguration)?;
    // A name that nothing is known of defines a provider.
    if Provider::by_name(&name).is_none() && body.dialect.is_none() {
        return Err(ServiceError::NotFound("provider").into());
    }
    // Version 0 is that of settings that were never made.
    let expected = Precondition(if expected.0 == Expect::Version(0) { Expect::Absent } else { expected.0 });
    admin.service.put_object(&who, &name, &body, expected.0).await.map_err(|error| expected.failed(error))?;
    let view = provider_view(&*admin.service.organisation(&who.organisation)?, &name).ok_or(ServiceError::NotFound("provider"))?;
    Ok((etag(view.version), axum::Json(view)).into_response())
}

/// Take a provider's settings back
#[utoipa::path(delete, path = "/v1/providers/{name}", tag = "providers",
    params(("name" = String, Path), ("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 204)))]
async fn reset_provider(
    State(admin): State<Admin>,
    who: Principal,
    Path(name): Path<String>,
    expected: Precondition,
) -> Result<StatusCode, Problem> {
    admin.service.delete_object(&who, Kind::Provider, &name, expected.0).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The whole configuration, and its revision.
#[derive(Serialize, ToSchema)]
pub struct Configuration {
    revision: u64,
    configuration: Document,
}

/// What an apply changed, or would change.
#[derive(Serialize, ToSchema)]
pub struct Differences {
    /// The revision after it; for a diff the one it was made from.
    revision: u64,
    changes: Vec<Difference>,
}

/// Show the whole configuration
///
/// Secrets are never in it.
#[utoipa::path(get, path = "/v1/config", tag = "configuration", responses((status = 200, body = Configuration, headers(("ETag" = String)))))]
async fn show_config(State(admin): State<Admin>, who: Principal) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let tag = etag(organisation.rev);
    Ok((tag, axum::Json(Configuration { revision: organisation.rev, configuration: organisation.document.clone() })).into_response())
}

/// Apply a whole configuration
///
/// It becomes what the document says, whole or not at all. What an earlier apply made and the document no longer names is
/// removed; what was made otherwise stays. The same document again changes nothing.
#[utoipa::path(put, path = "/v1/config", tag = "configuration", request_body = Document,
    params(("If-Match" = Option<String>, Header, description = "ETag of the revision that was read")),
    responses((status = 200, body = Differences, headers(("ETag" = String)))))]
async fn apply_config(
    State(admin): State<Admin>,
    who: Principal,
    expected: Precondition,
    Json(document): Json<Document>,
) -> Result<Response, Problem> {
    let (revision, changes) = admin.service.apply(&who, &document, expected.version()).await?;
    Ok((etag(revision), axum::Json(Differences { revision, changes })).into_response())
}

/// What an apply would change
#[utoipa::path(post, path = "/v1/config/diff", tag = "configuration", request_body = Document, responses((status = 200, body = Differences)))]
async fn diff_config(State(admin): State<Admin>, who: Principal, Json(document): Json<Document>) -> Result<Response, Problem> {
    let changes = admin.service.diff(&who, &document).await?;
    let revision = admin.service.organisation(&who.organisation)?.rev;
    Ok(axum::Json(Differences { revision, changes }).into_response())
}
