//! Chat completions that were asked to be stored.

use std::sync::Arc;

use serde_json::{Value, json};

use super::fields::{self, missing, wrong_type};
use super::response::{self, Head};
use super::{error, page};
use crate::answer::{Answer, Kept};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::directive::Directive;
use crate::ledger::{How, Reference};
use crate::objects::{Content, Kind, Object, StoredChat};
use crate::provider::ApiError;
use crate::text::quoted;

/// Keeps the answer to a request with `store: true`, as if it had not been streamed.
pub fn keep(call: &Call, head: &Head, answer: &Answer, kept: &Kept) {
    let whole = response::buffered(head, answer, &Directive::default());
    let text: String = whole.iter().map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned()).collect();
    let chat = StoredChat {
        document: text,
        model: head.model,
        metadata: kept.metadata.clone().filter(Value::is_object).unwrap_or_else(|| json!({})),
        messages: kept.messages.clone(),
    };
    call.keep(Kind::ChatCompletion, head.id, Content::Chat(Box::new(chat)));
}

pub fn list(call: &mut Call) -> Result<Served, ApiError> {
    let script = call.steer_plain()?;
    let mut all = call.shared().objects.all(&call.credential.account, Kind::ChatCompletion);
    if let Some(model) = call.query("model") {
        all.retain(|object| stored(object).is_some_and(|chat| chat.model == model));
    }
    let page = page::of(call, all, (20, false), 100, |object: &Arc<Object>| &object.id)?;
    let mut rows = Vec::new();
    for object in &page.rows {
        call.note(Reference::new(Kind::ChatCompletion.name(), &object.id, How::Listed, Some(object)));
        rows.extend(stored(object).map(|chat| (object.id.clone(), document(chat))));
    }
    Ok(Ready::whole(page::document(&rows, page.more), Shape::Json, script).into())
}

pub fn read(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Read)?;
    let chat = stored(&object).ok_or_else(|| not_found(&object.id))?;
    Ok(Ready::whole(document(chat), Shape::Json, script).into())
}

pub fn messages(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Read)?;
    let chat = stored(&object).ok_or_else(|| not_found(&object.id))?;
    let message = |(index, message): (usize, &Value)| {
        let id = format!("{}-{index}", object.id);
        let mut row = message.clone();
        if let Value::Object(fields) = &mut row {
            fields.insert("id".into(), id.clone().into());
            if let Some(parts) = fields.get("content").filter(|content| content.is_array()).cloned() {
                fields.insert("content".into(), Value::Null);
                fields.insert("content_parts".into(), parts);
            }
        }
        (id, row.to_string())
    };
    let all: Vec<_> = chat.messages.iter().enumerate().map(message).collect();
    let page = page::of(call, all, (20, false), 100, |(id, _)| id)?;
    Ok(Ready::whole(page::document(&page.rows, page.more), Shape::Json, script).into())
}

pub fn update(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Changed)?;
    let fields = fields::object(call.body)?;
    let metadata = fields.get("metadata").ok_or_else(|| missing("metadata"))?;
    if !metadata.is_object() {
        return Err(wrong_type("metadata", "an object", metadata));
    }
    let chat = stored(&object).ok_or_else(|| not_found(&object.id))?;
    let changed = StoredChat { metadata: metadata.clone(), ..chat.clone() };
    let text = document(&changed);
    let content = Content::Chat(Box::new(changed));
    let replaced =
        Object { kind: object.kind, id: object.id.clone(), seq: object.seq, credential: Arc::clone(&object.credential), content };
    call.shared().objects.put(&call.credential.account, replaced);
    Ok(Ready::whole(text, Shape::Json, script).into())
}

pub fn delete(call: &mut Call) -> Result<Served, ApiError> {
    let (script, object) = named(call, How::Deleted)?;
    call.shared().objects.remove(&call.credential.account, &object.id);
    let text = format!(r#"{{"object":"chat.completion.deleted","id":{},"deleted":true}}"#, quoted(&object.id));
    Ok(Ready::whole(text, Shape::Json, script).into())
}

fn named(call: &mut Call, how: How) -> Result<(Directive, Arc<Object>), ApiError> {
    let id = call.segment(2).to_owned();
    let found = call.refer(Kind::ChatCompletion, &id, how);
    let script = call.steer_plain()?;
    found.map(|object| (script, object)).ok_or_else(|| not_found(&id))
}

fn not_found(id: &str) -> ApiError {
    error::object_not_found("Chat completion", id)
}

fn stored(object: &Object) -> Option<&StoredChat> {
    match &object.content {
        Content::Chat(chat) => Some(chat),
        _ => None,
    }
}

/// The completion with what was sent along to be kept.
fn document(chat: &StoredChat) -> String {
    let body = chat.document.strip_suffix('}').unwrap_or(&chat.document);
    format!(r#"{body},"metadata":{}}}"#, chat.metadata)
}
