//! Admin API: the router, who may pass, its OpenAPI document, and what operators watch.

use super::api::{Admin, MAX_BODY, authenticate, idempotent, to_the_end};
use super::error::{Problem, ProblemBody};
use super::observe::observe;
use super::{audit, configuration, credentials, keys, standing, tokens};
use crate::metrics::render;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, OpenApi, Ref, RefOr, Required, Response as OpenApiResponse, ResponseBuilder, Schema};
use utoipa::{OpenApi as _, PartialSchema, ToSchema};
use utoipa_axum::router::OpenApiRouter;

pub fn router(admin: Admin) -> Router {
    let (guarded, api) = described().split_for_parts();
    let api = document(api);
    let guarded = guarded
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(admin.clone(), idempotent))
        .layer(middleware::from_fn(to_the_end))
        .layer(middleware::from_fn_with_state(admin.clone(), authenticate));
    Router::new()
        .merge(guarded)
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(move || std::future::ready(Json(api.clone()))))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "not found", "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "method not allowed", "this path does not take this method; see allow")
        })
        .layer(middleware::from_fn(observe))
        .with_state(admin)
}

fn described() -> OpenApiRouter<Admin> {
    OpenApiRouter::new()
        .merge(keys::router())
        .merge(standing::router())
        .merge(configuration::router())
        .merge(credentials::router())
        .merge(tokens::router())
        .merge(audit::router())
}

/// The OpenAPI 3.1 document, as `/openapi.json` shows it.
pub fn openapi() -> OpenApi {
    document(described().split_for_parts().1)
}

#[derive(utoipa::OpenApi)]
#[openapi(info(
    title = "Keyward admin API",
    description = "Virtual keys, configuration, credentials, audit and usage of one organisation. Every write is an audit entry."
))]
struct About;

/// Errors that any guarded operation may answer with.
const PROBLEMS: [(&str, &str); 11] = [
    ("400", "The request can't be read"),
    ("401", "No valid admin token"),
    ("403", "The token's role may not do this"),
    ("404", "There is no such object"),
    ("409", "It can't be done as things stand"),
    ("412", "It was changed since the version named by If-Match"),
    ("413", "The body is too large"),
    ("415", "The body is not JSON"),
    ("422", "A field does not fit; `field` or `errors` say which"),
    ("500", "The vault failed, or the outcome is unknown"),
    ("503", "It could not be stored, and did not happen"),
];

/// What a request header must look like.
fn header_schema(name: &str) -> Schema {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    Schema::Object(match name {
        "If-Match" => text().pattern(Some(r#"^(\*|"[0-9]{1,19}")$"#)).build(),
        "If-None-Match" => text().enum_values(Some(["*"])).build(),
        // HTTP takes white space around it away.
        _ => text().pattern(Some("^[!-~]([ -~]{0,253}[!-~])?$")).build(),
    })
}

/// Completes what the handlers say of themselves by what holds for all of them.
fn document(mut api: OpenApi) -> OpenApi {
    api.info = About::openapi().info;
    let components = api.components.get_or_insert_default();
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("An admin token, kwa_...")).build();
    components.add_security_scheme("admin_token", SecurityScheme::Http(scheme));
    components.schemas.insert("Problem".to_owned(), ProblemBody::schema());
    let mut nested = Vec::new();
    ProblemBody::schemas(&mut nested);
    components.schemas.extend(nested);
    for item in api.paths.paths.values_mut() {
        for operation in [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch].into_iter().flatten() {
            operation.security = Some(vec![SecurityRequirement::new::<_, [&str; 0], &str>("admin_token", [])]);
            for parameter in operation.parameters.iter_mut().flatten() {
                if let RefOr::T(parameter) = parameter
                    && parameter.parameter_in == ParameterIn::Header
                {
                    parameter.schema = Some(RefOr::T(header_schema(&parameter.name)));
                }
            }
            if let Some(RefOr::T(body)) = &mut operation.request_body
                && body.content.contains_key("text/plain")
            {
                // No text is no records.
                body.required = Some(Required::False);
            }
            for (status, response) in &mut operation.responses.responses {
                let done = if status == "201" { "Made" } else { "Done" };
                if let RefOr::T(response) = response {
                    response.description = done.to_owned();
                }
            }
            for (status, description) in PROBLEMS {
                operation.responses.responses.entry(status.to_owned()).or_insert_with(|| RefOr::T(problem(description)));
            }
        }
    }
    // The wildcard is the router's own spelling.
    let paths = std::mem::take(&mut api.paths.paths);
    api.paths.paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item)).collect();
    api
}

fn problem(description: &str) -> OpenApiResponse {
    let content = Content::new(Some(RefOr::Ref(Ref::from_schema_name("Problem"))));
    ResponseBuilder::new().description(description).content("application/problem+json", content).build()
}

async fn ready(State(admin): State<Admin>) -> Result<&'static str, Problem> {
    admin.service.ready().await?;
    Ok("ready\n")
}

async fn metrics(State(admin): State<Admin>) -> impl IntoResponse {
    admin.service.watch().await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], render())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two schemas of one name would silently be one of them.
    #[test]
    fn every_operation_is_described_and_needs_a_token() {
        let api = serde_json::to_value(openapi()).unwrap();
        assert_eq!(api["openapi"], "3.1.0");
        let mut ids = std::collections::BTreeSet::new();
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["security"][0]["admin_token"].is_array(), "{method} {path}");
                assert!(operation["responses"]["401"].is_object(), "{method} {path}");
                assert!(ids.insert(operation["operationId"].as_str().unwrap().to_owned()), "{method} {path}: its id is another's");
            }
        }
        assert!(ids.len() > 30, "{}", ids.len());
        assert!(!api.to_string().contains("{*"));
    }
}
