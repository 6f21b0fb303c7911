//! Embeddings: one content, or several in one request. No usage is told, but it is charged.

use serde_json::Value;

use super::wire::{self, BATCH_EMBED, EMBED};
use super::{error, history, named};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::endpoint::Endpoint;
use crate::models::{Kind, Model, Usage};
use crate::openai::embeddings::vector;
use crate::openai::prompts::Prompt;
use crate::provider::ApiError;
use crate::ticket::Bill;
use crate::tokens;

const MOST_REQUESTS: usize = 100;

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let batch = call.endpoint == Endpoint::BatchEmbed;
    let work = if batch { "batchEmbedContents" } else { "embedContent" };
    let model = named(call, work, |kind| matches!(kind, Kind::Embedding { .. }))?;
    let read = wire::read(call.body, if batch { &BATCH_EMBED } else { &EMBED })?;
    let requests = match read.get("requests").and_then(Value::as_array) {
        Some(requests) if batch => requests.as_slice(),
        _ if batch => return Err(error::invalid("* BatchEmbedContentsRequest.requests: at least one request is required\n")),
        _ => std::slice::from_ref(&read),
    };
    if requests.is_empty() || requests.len() > MOST_REQUESTS {
        let message = format!("* BatchEmbedContentsRequest.requests: at most {MOST_REQUESTS} requests can be in one batch\n");
        return Err(error::invalid(message));
    }
    let wanted: Vec<(Prompt, u64)> =
        requests.iter().enumerate().map(|(index, one)| self::wanted(index, one, model, batch)).collect::<Result<_, _>>()?;
    let tokens: u64 = wanted.iter().map(|(prompt, _)| prompt.tokens).sum();
    let last = wanted.last().map_or("", |(prompt, _)| prompt.text.as_str());
    let (script, _) = call.steer(Some(model), false, last)?;
    call.admit(model, tokens, &script)?;
    call.charge(Bill::new(model, Usage { prompt: tokens, ..Usage::default() }, false), None);
    let rows: Vec<String> = wanted.iter().map(|(prompt, dimensions)| row(prompt, *dimensions)).collect();
    let text = if batch { format!(r#"{{"embeddings":[{}]}}"#, rows.join(",")) } else { format!(r#"{{"embedding":{}}}"#, rows.join(",")) };
    Ok(Ready::whole(text, Shape::Json, script).into())
}

fn wanted(index: usize, request: &Value, model: &Model, batch: bool) -> Result<(Prompt, u64), ApiError> {
    let place = if batch { format!("BatchEmbedContentsRequest.requests[{index}]") } else { "EmbedContentRequest".into() };
    let refuse = |name: &str, what: &str| error::invalid(format!("* {place}.{name}: {what}\n"));
    match request.get("model").and_then(Value::as_str) {
        Some(name) if name.strip_prefix("models/") == Some(model.name) => {}
        None if !batch => {}
        None => return Err(refuse("model", "unexpected model name format")),
        Some(_) => return Err(refuse("model", "the model must be the one of the request's path")),
    }
    let content = request.get("content").ok_or_else(|| refuse("content", "contents is not specified"))?;
    let texts: Vec<&str> = history::parts(content).filter_map(|part| part.get("text")?.as_str()).collect();
    let text = texts.join("\n");
    if text.is_empty() {
        return Err(refuse("content", "contents.parts must not be empty."));
    }
    let most = match model.kind {
        Kind::Embedding { dimensions } => dimensions,
        _ => 1,
    };
    let dimensions = match request.get("outputDimensionality").and_then(Value::as_i64) {
        None => most,
        Some(wanted) => u64::try_from(wanted)
            .ok()
            .filter(|wanted| (1..=most).contains(wanted))
            .ok_or_else(|| refuse("output_dimensionality", &format!("must be in the range [1, {most}]")))?,
    };
    // What is longer than the model takes is cut off, and not charged.
    let tokens = tokens::count(&text).min(model.context);
    Ok((Prompt { text, tokens }, dimensions))
}

fn row(prompt: &Prompt, dimensions: u64) -> String {
    let numbers: Vec<String> = vector(prompt, dimensions).iter().map(f32::to_string).collect();
    format!(r#"{{"values":[{}]}}"#, numbers.join(","))
}
