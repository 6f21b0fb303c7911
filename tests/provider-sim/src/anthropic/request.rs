//! What a messages request may say, and what Anthropic answers when it says something else.

use serde_json::{Map, Value};

use super::{error, form, history};
use crate::answer::{Asked, Extras, Thinking, Wish};
use crate::models::Model;
use crate::openai::request::text_of;
use crate::provider::{ApiError, Provider};
use crate::tokens;

pub type Fields = Map<String, Value>;

/// The version since which sampling parameters are refused.
pub const NO_SAMPLING: &str = "2026-10-21";
const VERSIONS: [&str; 3] = ["2023-01-01", "2023-06-01", NO_SAMPLING];

const KNOWN: &[&str] = &[
    "cache_control",
    "container",
    "context_management",
    "diagnostics",
    "inference_geo",
    "max_tokens",
    "mcp_servers",
    "messages",
    "metadata",
    "model",
    "output_config",
    "output_format",
    "service_tier",
    "speed",
    "stop_sequences",
    "stream",
    "system",
    "temperature",
    "thinking",
    "tool_choice",
    "tools",
    "top_k",
    "top_p",
    "user_profile_id",
    "workspace_id",
];

const MESSAGE_OVERHEAD: u64 = 3;
/// An image or document counts at most this, and never more than its data has bytes.
const IMAGE_TOKENS: u64 = 1600;

pub fn check_version(version: Option<&str>) -> Result<(), ApiError> {
    match version {
        None => Err(ApiError::invalid("anthropic-version: header is required")),
        Some(version) if VERSIONS.contains(&version) => Ok(()),
        Some(version) => Err(ApiError::invalid(format!("anthropic-version: {version:?} is not a valid version for this endpoint"))),
    }
}

pub fn parse(body: &[u8], version: &str) -> Result<Asked, ApiError> {
    let fields = object(body)?;
    let name = model_name(&fields)?;
    let limit = max_tokens(&fields)?;
    let messages = messages(&fields)?;
    if let Some(unknown) = fields.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(ApiError::invalid(format!("{unknown}: Extra inputs are not permitted")));
    }
    let model = Model::find(Provider::Anthropic, name).ok_or_else(|| error::model_not_found(name))?;
    if limit > model.max_output {
        return Err(ApiError::invalid(format!(
            "max_tokens: {limit} > {}, which is the maximum allowed number of output tokens for {}",
            model.max_output, model.snapshot
        )));
    }
    let thinking = form::thinking(&fields, model, limit)?;
    sampling(&fields, version, model, thinking)?;
    system(&fields)?;
    form::metadata(&fields)?;
    history::check(messages, version, model, matches!(thinking, Thinking::On { .. }) && form::budgeted(&fields))?;
    let tools = tools(&fields)?;
    let prompt_tokens = prompt_tokens(&fields, messages).min(body.len() as u64) + added_tokens(&fields);
    if prompt_tokens > model.context {
        let message = format!("prompt is too long: {prompt_tokens} tokens > {} maximum", model.context);
        return Err(ApiError::invalid(message));
    }
    let stream = match fields.get("stream") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(stream)) => *stream,
        Some(_) => return Err(ApiError::invalid("stream: Input should be a valid boolean")),
    };
    Ok(Asked {
        model,
        stream,
        include_usage: true,
        choices: 1,
        limit,
        stop: stop(&fields)?,
        forced_tool: forced_tool(&fields, &tools, thinking)?,
        tools: form::callable(&fields, tools),
        prompt_tokens,
        last_user: last_user(messages),
        after_tools: messages.last().is_some_and(|message| history::blocks(message, "tool_result").next().is_some()),
        wish: Wish { json: form::json(&fields, model)?, one_call: form::one_call(&fields)?, thinking },
        extras: Extras::default(),
    })
}

/// What counting tokens may say besides what both have.
const NOT_COUNTED: &[&str] =
    &["container", "inference_geo", "max_tokens", "metadata", "service_tier", "stop_sequences", "stream", "temperature", "top_k", "top_p"];

/// The model, the tokens of the prompt and the last text of the user in a request that only counts.
pub fn count(body: &[u8], version: &str) -> Result<(&'static Model, u64, String), ApiError> {
    let fields = object(body)?;
    let name = model_name(&fields)?;
    let messages = messages(&fields)?;
    let known = |key: &&String| KNOWN.contains(&key.as_str()) && !NOT_COUNTED.contains(&key.as_str());
    if let Some(unknown) = fields.keys().find(|key| !known(key)) {
        return Err(ApiError::invalid(format!("{unknown}: Extra inputs are not permitted")));
    }
    let model = Model::find(Provider::Anthropic, name).ok_or_else(|| error::model_not_found(name))?;
    system(&fields)?;
    history::check(messages, version, model, false)?;
    tools(&fields)?;
    Ok((model, prompt_tokens(&fields, messages).min(body.len() as u64) + added_tokens(&fields), last_user(messages)))
}

fn object(body: &[u8]) -> Result<Fields, ApiError> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(fields),
        _ => Err(ApiError::invalid("The request body is not valid JSON")),
    }
}

fn model_name(fields: &Fields) -> Result<&str, ApiError> {
    match fields.get("model") {
        Some(Value::String(name)) => Ok(name),
        Some(_) => Err(ApiError::invalid("model: Input should be a valid string")),
        None => Err(required("model")),
    }
}

fn messages(fields: &Fields) -> Result<&[Value], ApiError> {
    match fields.get("messages") {
        Some(Value::Array(messages)) => Ok(messages),
        Some(_) => Err(ApiError::invalid("messages: Input should be a valid list")),
        None => Err(required("messages")),
    }
}

pub fn required(name: &str) -> ApiError {
    ApiError::invalid(format!("{name}: Field required"))
}

fn max_tokens(fields: &Fields) -> Result<u64, ApiError> {
    let value = fields.get("max_tokens").ok_or_else(|| required("max_tokens"))?;
    match value.as_u64() {
        Some(limit @ 1..) => Ok(limit),
        None if !value.is_i64() => Err(ApiError::invalid("max_tokens: Input should be a valid integer")),
        _ => Err(ApiError::invalid("max_tokens: Input should be greater than or equal to 1")),
    }
}

/// The instructions: a text, or blocks of text.
fn system(fields: &Fields) -> Result<(), ApiError> {
    match fields.get("system") {
        None | Some(Value::Null | Value::String(_)) => Ok(()),
        Some(Value::Array(blocks)) => {
            let text =
                |block: &Value| block.get("type").is_some_and(|kind| kind == "text") && block.get("text").is_some_and(Value::is_string);
            match blocks.iter().position(|block| !text(block)) {
                None => Ok(()),
                Some(at) => Err(ApiError::invalid(format!("system.{at}.type: Input should be 'text'"))),
            }
        }
        Some(_) => Err(ApiError::invalid("system: Input should be a valid string")),
    }
}

fn sampling(fields: &Fields, version: &str, model: &Model, thinking: Thinking) -> Result<(), ApiError> {
    let given = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
    for name in ["temperature", "top_p", "top_k"] {
        let Some(value) = fields.get(name).filter(|value| !value.is_null()) else { continue };
        if version == NO_SAMPLING {
            return Err(ApiError::invalid(format!("{name}: Extra inputs are not permitted")));
        }
        let Some(number) = value.as_f64() else {
            return Err(ApiError::invalid(format!("{name}: Input should be a valid number")));
        };
        if name != "top_k" && !(0.0..=1.0).contains(&number) {
            return Err(ApiError::invalid(format!("{name}: range: 0..1")));
        }
        let default = (1.0..=1.0).contains(&number);
        if name == "temperature" && !default && form::is_newest(model) {
            return Err(ApiError::invalid("`temperature` is deprecated for this model."));
        }
        if name == "temperature" && !default && matches!(thinking, Thinking::On { .. }) {
            return Err(ApiError::invalid("`temperature` may only be set to 1 when thinking is enabled."));
        }
    }
    if given("temperature") && given("top_p") {
        return Err(ApiError::invalid("`temperature` and `top_p` cannot both be specified for this model. Please use only one."));
    }
    Ok(())
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let wrong = || ApiError::invalid("stop_sequences: Input should be a valid list of strings");
    let sequences = match fields.get("stop_sequences") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(sequences)) => sequences,
        Some(_) => return Err(wrong()),
    };
    let one = |sequence: &Value| match sequence.as_str() {
        Some(text) if text.trim().is_empty() => Err(ApiError::invalid("stop_sequences: each stop sequence must contain non-whitespace")),
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong()),
    };
    sequences.iter().map(one).collect()
}

fn tools(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let tools = match fields.get("tools") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(ApiError::invalid("tools: Input should be a valid list")),
    };
    let one = |(index, tool): (usize, &Value)| {
        let name = tool.get("name").and_then(Value::as_str);
        let name = name.ok_or_else(|| required(&format!("tools.{index}.custom.name")))?;
        let hosted = tool.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "custom");
        let legal = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == '-';
        if name.is_empty() || name.len() > 128 || !name.chars().all(legal) {
            let message = format!("tools.{index}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'");
            return Err(ApiError::invalid(message));
        }
        if !hosted && !tool.get("input_schema").is_some_and(Value::is_object) {
            return Err(required(&format!("tools.{index}.custom.input_schema")));
        }
        Ok(name.to_owned())
    };
    let names: Vec<String> = tools.iter().enumerate().map(one).collect::<Result<_, _>>()?;
    let twice = names.iter().enumerate().any(|(at, name)| names.iter().take(at).any(|before| before == name));
    if twice { Err(ApiError::invalid("tools: Tool names must be unique.")) } else { Ok(names) }
}

fn forced_tool(fields: &Fields, tools: &[String], thinking: Thinking) -> Result<Option<String>, ApiError> {
    let Some(choice) = fields.get("tool_choice").filter(|choice| !choice.is_null()) else { return Ok(None) };
    match choice.get("type").and_then(Value::as_str) {
        Some("auto" | "none") => Ok(None),
        Some("any" | "tool") if tools.is_empty() => Err(ApiError::invalid("tool_choice may only be specified while providing tools")),
        Some("any" | "tool") if matches!(thinking, Thinking::On { .. }) => {
            Err(ApiError::invalid("Thinking may not be enabled when tool_choice forces tool use."))
        }
        Some("any") => Ok(tools.first().cloned()),
        Some("tool") => {
            let name = choice.get("name").and_then(Value::as_str).ok_or_else(|| required("tool_choice.tool.name"))?;
            let known = tools.iter().find(|tool| *tool == name);
            let missing = || ApiError::invalid(format!("Tool '{name}' not found in provided tools"));
            known.cloned().map(Some).ok_or_else(missing)
        }
        _ => Err(ApiError::invalid(
            "tool_choice: Input tag found using 'type' does not match any of the expected tags: 'auto', 'any', 'tool', 'none'",
        )),
    }
}

fn prompt_tokens(fields: &Fields, messages: &[Value]) -> u64 {
    let content = |content: Option<&Value>| match content {
        Some(Value::Array(parts)) => parts.iter().map(part_tokens).sum(),
        Some(other) => tokens::count_json(other),
        None => 0,
    };
    let said: u64 = messages.iter().map(|message| MESSAGE_OVERHEAD + content(message.get("content"))).sum();
    said + content(fields.get("system")) + fields.get("tools").map_or(0, tokens::count_json) + MESSAGE_OVERHEAD
}

/// Tokens that stand in no body: the provider's own words about tools, and its descriptions of those that it has trained. 346 is
/// the tool use guide's for Claude 4; those of single tools are of the right size, and were not checked.
fn added_tokens(fields: &Fields) -> u64 {
    let tools = fields.get("tools").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let own = |tool: &Value| {
        let kind = tool.get("type").and_then(Value::as_str).unwrap_or_default();
        let known = [("bash_", 245), ("text_editor_", 700), ("computer_", 1_234)];
        known.iter().find(|(name, _)| kind.starts_with(name)).map_or(0, |(_, tokens)| *tokens)
    };
    if tools.is_empty() { 0 } else { 346 + tools.iter().map(own).sum::<u64>() }
}

fn part_tokens(part: &Value) -> u64 {
    let data = part.pointer("/source/data").or_else(|| part.pointer("/source/url")).and_then(Value::as_str);
    match (data, part.get("text")) {
        (Some(data), _) => IMAGE_TOKENS.min(data.len() as u64),
        (None, Some(text)) => tokens::count_json(text),
        (None, None) => tokens::count_json(part),
    }
}

fn last_user(messages: &[Value]) -> String {
    let users = messages.iter().rev().filter(|message| message.get("role").is_some_and(|role| role == "user"));
    users.map(|message| text_of(message.get("content"))).find(|text| !text.is_empty()).unwrap_or_default()
}
