//! How limits and what is used of them look in the API, and `/v1/organisation`.

use super::api::{Admin, Json, Precondition, etag};
use super::error::Problem;
use crate::config::patch::{ChangeRates, LimitsPatch, present};
use crate::config::{Budget, Kind, ORGANISATION_OBJECT, OrganisationSettings, Quota};
use crate::directory::Organisation;
use crate::service::access::{Permission, Principal};
use crate::service::{ServiceError, moment};
use crate::store::Expect;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use keyward_core::limits::{Account, Window, date_text};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub fn router() -> OpenApiRouter<Admin> {
    OpenApiRouter::new().routes(routes!(show_organisation, change_organisation)).routes(routes!(show_webhook_secret))
}

/// What was used in one window, and what is held.
#[derive(Serialize, ToSchema)]
pub struct WindowView {
    /// `day`, `month` or `total`.
    #[schema(example = "day")]
    window: &'static str,
    /// Its first day, UTC; `null`: from the beginning.
    #[schema(example = "2026-11-01")]
    start: Option<String>,
    spent_usd: String,
    /// As an integer, in nanodollars.
    spent_nanodollars: i64,
    reserved_nanodollars: i64,
    requests: u64,
    tokens: u64,
}

/// What is used now.
#[derive(Serialize, ToSchema)]
pub struct Standing {
    /// Requests that are admitted and not settled.
    pub in_flight: u64,
    pub windows: Vec<WindowView>,
}

impl Standing {
    pub fn of(account: &Account) -> Self {
        let mut account = account.clone();
        let now = moment();
        account.advance(keyward_core::limits::Moment { day: now.day.max(account.day), ..now });
        let window = |window: Window| {
            let sums = account.sums(window);
            WindowView {
                window: window.name(),
                start: (window != Window::Total).then(|| date_text(window.start(account.day))),
                spent_usd: sums.spent.to_usd(),
                spent_nanodollars: sums.spent.0,
                reserved_nanodollars: sums.reserved.0,
                requests: sums.requests,
                tokens: sums.tokens,
            }
        };
        Standing { in_flight: account.in_flight, windows: Window::ALL.map(window).into() }
    }
}

/// The organisation's own limits, and how it stands.
#[derive(Serialize, ToSchema)]
pub struct OrganisationStanding {
    id: String,
    label: String,
    spec: OrganisationSettings,
    /// Grows with every change of `spec`; the number in the ETag. 0: never set.
    version: u64,
    #[serde(flatten)]
    standing: Standing,
}

/// What changes (RFC 7396): a field that is absent stays, `null` takes it away.
#[derive(Deserialize, ToSchema, Default)]
#[serde(default, deny_unknown_fields)]
pub struct ChangeOrganisation {
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<Budget>>)]
    budgets: Option<Option<Vec<Budget>>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<Vec<Quota>>)]
    quotas: Option<Option<Vec<Quota>>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<ChangeRates>)]
    rates: Option<Option<ChangeRates>>,
    #[serde(deserialize_with = "present")]
    #[schema(value_type = Option<String>)]
    webhook: Option<Option<String>>,
}

/// What the alarms are signed with.
#[derive(Serialize, ToSchema)]
pub struct WebhookSecret {
    #[schema(example = "whsec_...")]
    secret: String,
}

/// Show what alarms are signed with
///
/// Their receiver needs it, to know that they are genuine (Standard Webhooks).
#[utoipa::path(get, path = "/v1/organisation/webhook-secret", tag = "organisations", responses((status = 200, body = WebhookSecret)))]
async fn show_webhook_secret(State(admin): State<Admin>, who: Principal) -> Result<Response, Problem> {
    let secret = admin.service.webhook_secret(&who)?.to_string();
    Ok(([(header::CACHE_CONTROL, "no-store")], axum::Json(WebhookSecret { secret })).into_response())
}

async fn shown(admin: &Admin, who: &Principal) -> Result<Response, Problem> {
    let organisation = admin.service.organisation(&who.organisation)?;
    let account = admin.service.account(who, None).await?;
    let version = version(&organisation);
    let view = OrganisationStanding {
        id: who.organisation.clone(),
        label: organisation.label.clone(),
        spec: organisation.document.organisation.clone().unwrap_or_default(),
        version,
        standing: Standing::of(&account),
    };
    Ok((etag(version), axum::Json(view)).into_response())
}

fn version(organisation: &Organisation) -> u64 {
    organisation.meta(Kind::Organisation, ORGANISATION_OBJECT).map_or(0, |meta| meta.version)
}

/// Show the organisation's limits and what is used of them
#[utoipa::path(get, path = "/v1/organisation", tag = "organisations",
    responses((status = 200, body = OrganisationStanding, headers(("ETag" = String)))))]
async fn show_organisation(State(admin): State<Admin>, who: Principal) -> Result<Response, Problem> {
    who.needs(Permission::ReadSupply)?;
    shown(&admin, &who).await
}

/// Change the organisation's limits
///
/// JSON merge patch (RFC 7396): what is absent stays as it is.
#[utoipa::path(patch, path = "/v1/organisation", tag = "organisations", request_body = ChangeOrganisation,
    params(("If-Match" = Option<String>, Header, description = "ETag of the version that was read")),
    responses((status = 200, body = OrganisationStanding, headers(("ETag" = String)))))]
async fn change_organisation(
    State(admin): State<Admin>,
    who: Principal,
    expected: Precondition,
    Json(body): Json<ChangeOrganisation>,
) -> Result<Response, Problem> {
    who.needs(Permission::WriteConfiguration)?;
    let organisation = admin.service.organisation(&who.organisation)?;
    let before = version(&organisation);
    let mut settings = organisation.document.organisation.clone().unwrap_or_default();
    let limits = LimitsPatch { budgets: body.budgets, quotas: body.quotas, rates: body.rates };
    limits.apply(&mut settings.budgets, &mut settings.quotas, &mut settings.rates);
    settings.webhook = body.webhook.unwrap_or(settings.webhook);
    // Whatever was expected, it must still be what was merged into.
    if expected.version().is_some_and(|version| version != before) {
        return Err(expected.failed(ServiceError::Stale(before)));
    }
    let expect = if before == 0 { Expect::Absent } else { Expect::Version(before) };
    admin.service.put_object(&who, ORGANISATION_OBJECT, &settings, expect).await.map_err(|error| expected.failed(error))?;
    shown(&admin, &who).await
}
