//! Speech: silence as long as the text would take to say.

use serde_json::Value;

use super::fields::{self, Fields, missing, too_long, word};
use super::sound;
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::frames::Frame;
use crate::models::{Kind, Usage};
use crate::provider::ApiError;
use crate::ticket::Bill;

const KNOWN: &[&str] = &["input", "instructions", "model", "response_format", "speed", "stream_format", "voice"];
/// `flac` and `aac` exist too; the simulator has no silence in them.
const FORMATS: &[&str] = &["mp3", "opus", "wav", "pcm"];
const MS_PER_CHARACTER: u64 = 60;
/// Bytes that are sent together.
const PIECE: usize = 16 * 1024;

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let fields = fields::object(call.body)?;
    fields::only(&fields, KNOWN)?;
    let model = fields::model(&fields, None, |kind| matches!(kind, Kind::Speech { .. }))?;
    let input = fields::text(&fields, "input")?.ok_or_else(|| missing("input"))?;
    let characters = input.chars().count() as u64;
    if characters > model.context {
        return Err(too_long("input", model.context, characters));
    }
    if characters == 0 {
        let message = "Invalid 'input': string too short. Expected a string with minimum length 1, but got an empty string instead.";
        return Err(ApiError::invalid(message).param("input").code("string_below_min_length"));
    }
    voice(&fields)?;
    if word(&fields, "stream_format", &["sse", "audio"])? == Some("sse") {
        let message = format!("The model `{}` does not support stream_format 'sse'.", model.name);
        return Err(ApiError::invalid(message).param("stream_format").code("unsupported_value"));
    }
    let format = word(&fields, "response_format", FORMATS)?.unwrap_or("mp3");
    let (script, _) = call.steer(Some(model), false, input)?;
    call.admit(model, 0, &script)?;
    call.charge(Bill::new(model, Usage { characters, ..Usage::default() }, false), None);
    let ms = characters * MS_PER_CHARACTER;
    let (bytes, kind) = match format {
        "opus" => (sound::opus(ms), "audio/opus"),
        "wav" => (sound::wav(ms), "audio/wav"),
        "pcm" => (sound::pcm(ms), "audio/pcm"),
        _ => (sound::mp3(ms), "audio/mpeg"),
    };
    let frames = bytes.chunks(PIECE).map(|piece| Frame { bytes: piece.to_vec().into(), produced: 0, delta: true }).collect();
    Ok(Ready::new(frames, Shape::Bytes(kind), script).into())
}

fn voice(fields: &Fields) -> Result<(), ApiError> {
    match fields.get("voice") {
        None | Some(Value::Null) => Err(missing("voice")),
        Some(Value::String(_)) => Ok(()),
        Some(voice) if voice.get("id").is_some_and(Value::is_string) => Ok(()),
        Some(other) => Err(fields::wrong_type("voice", "a string", other)),
    }
}
