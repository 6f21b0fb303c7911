//! Errors of the admin API as RFC 9457 problems. What a database said stays in the log.

use crate::config::Fault;
use crate::service::ServiceError;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// What an error's body says (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    #[serde(rename = "type")]
    #[schema(example = "about:blank")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    detail: String,
    /// The field of the request that is at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    field: Option<String>,
    /// Everything that is wrong with a configuration.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldProblem>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct FieldProblem {
    field: String,
    detail: String,
}

#[derive(Debug)]
pub struct Problem {
    pub status: StatusCode,
    pub title: &'static str,
    pub detail: String,
    /// The field of the request that is at fault.
    pub field: Option<String>,
    pub faults: Vec<Fault>,
}

impl Problem {
    pub fn new(status: StatusCode, title: &'static str, detail: impl Into<String>) -> Self {
        Problem { status, title, detail: detail.into(), field: None, faults: Vec::new() }
    }

    pub fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        let field = Some(field.into()).filter(|field| !field.is_empty());
        Problem { field, ..Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid field", detail) }
    }
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Invalid(field, detail) => Problem::field(field, detail),
            ServiceError::Faults(faults) => {
                let detail = format!("{} fields do not fit", faults.len());
                Problem { faults, ..Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid configuration", detail) }
            }
            ServiceError::NotFound(what) => {
                Problem::new(StatusCode::NOT_FOUND, "not found", format!("there is no {what} of this name or id"))
            }
            ServiceError::Forbidden(detail) => Problem::new(StatusCode::FORBIDDEN, "forbidden", detail),
            ServiceError::Exists => Problem::new(StatusCode::CONFLICT, "conflict", "there is one of this name already"),
            ServiceError::Conflict(detail) => Problem::new(StatusCode::CONFLICT, "conflict", detail),
            ServiceError::Stale(_) => {
                let detail = "it was changed since you read it: read it again, then decide";
                Problem::new(StatusCode::PRECONDITION_FAILED, "precondition failed", detail)
            }
            ServiceError::Store(error) => {
                tracing::error!(%error, "an admin request failed in the store");
                Problem::new(StatusCode::SERVICE_UNAVAILABLE, "store unavailable", "the change could not be stored; it did not happen")
            }
            ServiceError::Vault(error) => {
                tracing::error!(%error, "an admin request failed in the vault");
                Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "vault error", "the vault could not be used")
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let errors = self.faults.into_iter().map(|fault| FieldProblem { field: fault.field, detail: fault.message }).collect();
        let body = ProblemBody {
            kind: "about:blank",
            title: self.title,
            status: self.status.as_u16(),
            detail: self.detail,
            field: self.field,
            errors,
        };
        let body = serde_json::to_string(&body).unwrap_or_default();
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            // RFC 9110, 15.5.2: a 401 says how to do it right.
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
