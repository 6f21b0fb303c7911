//! Errors of the admin API as RFC 9457 problems. What a database said stays in the log.

use crate::service::ServiceError;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

#[derive(Debug)]
pub struct Problem {
    pub status: StatusCode,
    pub title: &'static str,
    pub detail: String,
    /// The field of the request that is at fault.
    pub field: Option<&'static str>,
}

impl Problem {
    pub fn new(status: StatusCode, title: &'static str, detail: impl Into<String>) -> Self {
        Problem { status, title, detail: detail.into(), field: None }
    }

    pub fn field(field: &'static str, detail: impl Into<String>) -> Self {
        Problem { field: Some(field), ..Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid field", detail) }
    }
}

impl From<ServiceError> for Problem {
    fn from(error: ServiceError) -> Self {
        match error {
            ServiceError::Invalid(field, detail) => Problem::field(field, detail),
            ServiceError::NotFound(what) => Problem::new(StatusCode::NOT_FOUND, "not found", format!("there is no {what} with this id")),
            ServiceError::Conflict(detail) => Problem::new(StatusCode::CONFLICT, "conflict", detail),
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
        let mut body =
            serde_json::json!({ "type": "about:blank", "title": self.title, "status": self.status.as_u16(), "detail": self.detail });
        if let (Some(field), Some(map)) = (self.field, body.as_object_mut()) {
            map.insert("field".to_owned(), field.into());
        }
        (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
    }
}
