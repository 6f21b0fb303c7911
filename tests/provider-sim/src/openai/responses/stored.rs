//! What is kept of responses: read, listed, cancelled, deleted by any credential of the account.

use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;

use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::directive::Directive;
use crate::ledger::How;
use crate::objects::{Content, Kind, Object, StoredResponse};
use crate::openai::{error, page};
use crate::provider::ApiError;
use crate::text::quoted;

pub fn read(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Read)?;
    let response = stored(&object).ok_or_else(|| not_found(&object.id))?;
    if call.query("stream").is_some_and(|stream| stream.eq_ignore_ascii_case("true")) {
        let message = "This response cannot be streamed because it was not created with background=true.";
        return Err(ApiError::invalid(message).param("stream"));
    }
    Ok(Ready::whole(now(response).to_owned(), Shape::Json, script).into())
}

pub fn delete(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Deleted)?;
    let response = stored(&object).ok_or_else(|| not_found(&object.id))?;
    for id in response.output.iter().filter_map(|item| item.get("id")?.as_str()) {
        call.shared().objects.remove(&call.credential.account, id);
    }
    call.shared().objects.remove(&call.credential.account, &object.id);
    let text = format!(r#"{{"id":{},"object":"response","deleted":true}}"#, quoted(&object.id));
    Ok(Ready::whole(text, Shape::Json, script).into())
}

pub fn cancel(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Changed)?;
    let response = stored(&object).ok_or_else(|| not_found(&object.id))?;
    if !response.background {
        return Err(ApiError::invalid("Cannot cancel a synchronous response."));
    }
    let (false, Some((_, pending))) = (finished(response), &response.pending) else {
        // Cancelling what has ended changes nothing.
        return Ok(Ready::whole(response.document.clone(), Shape::Json, script).into());
    };
    let text = pending.replacen(r#""status":"queued""#, r#""status":"cancelled""#, 1);
    let cancelled = StoredResponse { document: text.clone(), pending: None, output: Vec::new(), ..response.clone() };
    let content = Content::Response(Box::new(cancelled));
    let replaced =
        Object { kind: object.kind, id: object.id.clone(), seq: object.seq, credential: Arc::clone(&object.credential), content };
    call.shared().objects.put(&call.credential.account, replaced);
    Ok(Ready::whole(text, Shape::Json, script).into())
}

pub fn input_items(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Read)?;
    let response = stored(&object).ok_or_else(|| not_found(&object.id))?;
    let row = |item: &Value| (item.get("id").and_then(Value::as_str).unwrap_or_default().to_owned(), item.to_string());
    let all: Vec<_> = response.input.iter().map(row).collect();
    let page = page::of(call, all, (20, true), 100, |(id, _)| id)?;
    Ok(Ready::whole(page::document(&page.rows, page.more), Shape::Json, script).into())
}

fn named(call: &mut Call, how: How) -> Result<(Directive, Arc<Object>), ApiError> {
    let id = call.segment(1).to_owned();
    let found = call.refer(Kind::Response, &id, how);
    let script = call.steer_plain()?;
    found.map(|object| (script, object)).ok_or_else(|| not_found(&id))
}

fn not_found(id: &str) -> ApiError {
    error::object_not_found("Response", id)
}

pub fn stored(object: &Object) -> Option<&StoredResponse> {
    match &object.content {
        Content::Response(response) => Some(response),
        _ => None,
    }
}

fn finished(response: &StoredResponse) -> bool {
    response.pending.as_ref().is_none_or(|(due, _)| *due <= Instant::now())
}

/// The object as it stands: one made in the background is not done before its time.
fn now(response: &StoredResponse) -> &str {
    match &response.pending {
        Some((_, pending)) if !finished(response) => pending,
        _ => &response.document,
    }
}
