//! Files: kept for the account, read by whoever knows or lists their ids.

use std::sync::Arc;

use bytes::Bytes;

use super::fields::{self, missing};
use super::{error, page};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::frames::Frame;
use crate::ledger::{How, Reference};
use crate::multipart::{self, Field};
use crate::objects::{Content, Kind, Object, StoredFile};
use crate::provider::ApiError;
use crate::reply::header;
use crate::text::{identifier, quoted, unix_us};
use crate::tokens;

const PURPOSES: &[&str] = &["assistants", "batch", "fine-tune", "vision", "user_data", "evals"];
/// What OpenAI doesn't give back.
const KEPT_IN: &[&str] = &["assistants", "user_data"];

pub fn upload(call: &mut Call) -> Result<Served, ApiError> {
    let script = call.steer_plain()?;
    let form = form(call)?;
    let purpose = field(&form, "purpose").ok_or_else(|| missing("purpose"))?;
    if !PURPOSES.contains(&purpose.as_str()) {
        return Err(fields::unsupported("purpose", &purpose, PURPOSES));
    }
    let file = form.iter().find(|field| field.name == "file").ok_or_else(|| missing("file"))?;
    if file.data.is_empty() {
        return Err(ApiError::invalid("File is empty."));
    }
    let stored = StoredFile {
        filename: file.filename.clone().unwrap_or_else(|| "file".into()),
        purpose,
        created: unix_us() / 1_000_000,
        // A copy: the request's body is a slice of a larger buffer.
        bytes: Bytes::copy_from_slice(file.data),
    };
    let id = identifier("file-", 22);
    let text = document(&id, &stored);
    call.keep(Kind::File, &id, Content::File(stored));
    call.name_answer(&id);
    Ok(Ready::whole(text, Shape::Json, script).into())
}

pub fn list(call: &mut Call) -> Result<Served, ApiError> {
    let script = call.steer_plain()?;
    let mut all = call.shared().objects.all(&call.credential.account, Kind::File);
    if let Some(purpose) = call.query("purpose") {
        all.retain(|object| stored(object).is_some_and(|file| file.purpose == purpose));
    }
    let page = page::of(call, all, (10_000, true), 10_000, |object: &Arc<Object>| &object.id)?;
    let mut rows = Vec::new();
    for object in &page.rows {
        call.note(Reference::new(Kind::File.name(), &object.id, How::Listed, Some(object)));
        rows.extend(stored(object).map(|file| (object.id.clone(), document(&object.id, file))));
    }
    Ok(Ready::whole(page::document(&rows, page.more), Shape::Json, script).into())
}

pub fn read(call: &mut Call) -> Result<Served, ApiError> {
    let object = named(call, How::Read)?;
    let script = call.steer_plain()?;
    let file = stored(&object).ok_or_else(|| error::file_not_found(&object.id))?;
    Ok(Ready::whole(document(&object.id, file), Shape::Json, script).into())
}

pub fn delete(call: &mut Call) -> Result<Served, ApiError> {
    let object = named(call, How::Deleted)?;
    let script = call.steer_plain()?;
    call.shared().objects.remove(&call.credential.account, &object.id);
    let text = format!(r#"{{"object":"file","deleted":true,"id":{}}}"#, quoted(&object.id));
    Ok(Ready::whole(text, Shape::Json, script).into())
}

pub fn content(call: &mut Call) -> Result<Served, ApiError> {
    let object = named(call, How::Read)?;
    let script = call.steer_plain()?;
    let file = stored(&object).ok_or_else(|| error::file_not_found(&object.id))?;
    if KEPT_IN.contains(&file.purpose.as_str()) {
        return Err(ApiError::invalid(format!("Not allowed to download files of purpose: {}", file.purpose)));
    }
    let frame = Frame { bytes: file.bytes.clone(), produced: 0, delta: true };
    Ok(Ready::new(vec![frame], Shape::Bytes("application/octet-stream"), script).into())
}

/// Tokens of a file that an input names; `param` is where it stands. The account's own file, whoever uploaded it.
pub fn tokens(call: &Call, id: &str, param: &str) -> Result<u64, ApiError> {
    let object = call.refer(Kind::File, id, How::Used);
    let file = object.as_deref().and_then(stored).ok_or_else(|| error::input_file_not_found(id, param))?;
    Ok(tokens::count(&String::from_utf8_lossy(&file.bytes)))
}

/// The form in the body.
pub fn form<'a>(call: &Call<'a>) -> Result<Vec<Field<'a>>, ApiError> {
    let kind = header(&call.parts.headers, "content-type").unwrap_or_default();
    let boundary = multipart::boundary(kind).ok_or_else(|| {
        let message = format!(
            "Invalid Content-Type header ({kind}), expected multipart/form-data. (HINT: If you're using curl, you can pass -H \
             'Content-Type: multipart/form-data')"
        );
        ApiError::invalid(message)
    })?;
    multipart::parse(call.body, boundary).ok_or_else(|| ApiError::invalid("Could not parse multipart form"))
}

/// The text of a field of a form.
pub fn field(form: &[Field], name: &str) -> Option<String> {
    form.iter().find(|field| field.name == name).map(|field| String::from_utf8_lossy(field.data).into_owned())
}

fn named(call: &Call, how: How) -> Result<Arc<Object>, ApiError> {
    let id = call.segment(1);
    call.refer(Kind::File, id, how).ok_or_else(|| error::file_not_found(id))
}

fn stored(object: &Object) -> Option<&StoredFile> {
    match &object.content {
        Content::File(file) => Some(file),
        _ => None,
    }
}

fn document(id: &str, file: &StoredFile) -> String {
    format!(
        r#"{{"object":"file","id":{},"purpose":{},"filename":{},"bytes":{},"created_at":{},"expires_at":null,"status":"processed","status_details":null}}"#,
        quoted(id),
        quoted(&file.purpose),
        quoted(&file.filename),
        file.bytes.len(),
        file.created,
    )
}
