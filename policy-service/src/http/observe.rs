//! What every request of the admin API leaves behind: a count, a duration, a log line.

use crate::metrics::OTHER;
use crate::service::watched::ids;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::Response;
use keyward_core::trace::TraceContext;
use metrics::{counter, histogram};
use std::time::Instant;

/// The caller's place in a trace.
pub fn trace(headers: &HeaderMap) -> Option<TraceContext> {
    let mut parents = headers.get_all("traceparent").iter();
    let parent = parents.next().filter(|_| parents.next().is_none())?;
    TraceContext::parse(parent.to_str().ok()?)
}

/// Paths name keys and teams, and a mistaken one may hold anything: only the route's template is told.
pub async fn observe(request: Request, next: Next) -> Response {
    let began = Instant::now();
    let trace = trace(request.headers());
    let method = method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or(OTHER, MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let (status, took) = (response.status().as_u16(), began.elapsed());
    counter!("keyward_admin_requests_total", "method" => method, "route" => route.clone(), "status" => status.to_string()).increment(1);
    histogram!("keyward_admin_request_duration_seconds", "method" => method, "route" => route.clone()).record(took);
    let (trace_id, span_id) = ids(trace.as_ref());
    let duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    if route.starts_with("/v1/") {
        tracing::info!(method, route, status, duration_ms, trace_id, span_id, "admin request");
    } else {
        tracing::debug!(method, route, status, duration_ms, trace_id, span_id, "admin request");
    }
    response
}

/// A caller can make up methods, but no labels.
fn method(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => OTHER,
    }
}
