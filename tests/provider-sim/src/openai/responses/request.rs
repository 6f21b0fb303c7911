//! What a request to `/v1/responses` may say.

use serde_json::{Value, json};

use crate::answer::Sent;
use crate::models::{Kind, Model};
use crate::openai::fields::{self, Fields, flag, integer, missing, unsupported, wrong_type};
use crate::openai::request::sampling;
use crate::provider::ApiError;
use crate::text::identifier;
use crate::tokens;

const KNOWN: &[&str] = &[
    "background",
    "context_management",
    "conversation",
    "include",
    "input",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "moderation",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "user",
];

/// Items that an input may hold besides messages; those with an id of something stored are resolved later.
const ITEMS: &[&str] = &[
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "item_reference",
    "custom_tool_call",
    "custom_tool_call_output",
    "file_search_call",
    "web_search_call",
    "computer_call",
    "computer_call_output",
    "code_interpreter_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_call",
    "mcp_list_tools",
    "mcp_approval_request",
    "mcp_approval_response",
    "compaction",
];
const ROLES: &[&str] = &["assistant", "system", "developer", "user"];
const PARTS: &[&str] = &["input_text", "input_image", "output_text", "refusal", "input_file", "input_audio"];
const TOOLS: &[&str] = &[
    "function",
    "custom",
    "file_search",
    "web_search",
    "web_search_preview",
    "computer_use_preview",
    "mcp",
    "code_interpreter",
    "image_generation",
    "local_shell",
    "shell",
    "apply_patch",
];

const ITEM_OVERHEAD: u64 = 3;
/// An image counts at most this, and never more than its address has bytes.
const IMAGE_TOKENS: u64 = 85;
/// A file fetched from elsewhere, of which the simulator knows nothing.
const FILE_TOKENS: u64 = 100;

#[derive(Debug)]
pub struct Request {
    pub fields: Fields,
    pub model: &'static Model,
    pub stream: bool,
    pub background: bool,
    pub store: Sent,
    pub obfuscation: bool,
    pub limit: u64,
    /// As it is kept: every message with an id and its content as parts.
    pub input: Vec<Value>,
    pub tools: Vec<String>,
    pub forced_tool: Option<String>,
    pub last_user: String,
    pub after_tools: bool,
    /// Tokens of what the body itself says, and those of its items alone; never more than it has bytes.
    pub own_tokens: u64,
    pub item_tokens: u64,
}

pub fn parse(body: &[u8]) -> Result<Request, ApiError> {
    let fields = fields::object(body)?;
    fields::only(&fields, KNOWN)?;
    let model = fields::model(&fields, None, |kind| kind == Kind::Chat)?;
    let stream = flag(&fields, "stream")?.unwrap_or(false);
    let store = Sent::of(fields.get("store"), flag(&fields, "store")?);
    let background = flag(&fields, "background")?.unwrap_or(false);
    if background && store == Sent::False {
        let message = "Background mode requires 'store' to be true.";
        return Err(ApiError::invalid(message).param("background").code("invalid_value"));
    }
    sampling(&fields, model)?;
    fields::text(&fields, "instructions")?;
    let limit = integer(&fields, "max_output_tokens", 16, u64::MAX)?.unwrap_or(model.max_output).min(model.max_output);
    if !fields.get("metadata").is_none_or(|metadata| metadata.is_null() || metadata.is_object()) {
        return Err(wrong_type("metadata", "an object", fields.get("metadata").unwrap_or(&Value::Null)));
    }
    let input = input(&fields)?;
    let tools = tools(&fields)?;
    let item_tokens = input.iter().map(item_tokens).sum::<u64>().min(body.len() as u64);
    let own_tokens = (item_tokens + other_tokens(&fields)).min(body.len() as u64);
    Ok(Request {
        model,
        stream,
        background,
        store,
        obfuscation: stream && obfuscation(&fields)?,
        limit,
        forced_tool: forced_tool(&fields, &tools)?,
        tools,
        last_user: last_user(&input),
        after_tools: input.last().is_some_and(|item| kind(item).ends_with("call_output")),
        input,
        own_tokens,
        item_tokens,
        fields,
    })
}

fn obfuscation(fields: &Fields) -> Result<bool, ApiError> {
    match fields.get("stream_options") {
        None | Some(Value::Null) => Ok(true),
        Some(Value::Object(options)) => Ok(flag(options, "include_obfuscation")?.unwrap_or(true)),
        Some(other) => Err(wrong_type("stream_options", "an object", other)),
    }
}

/// The type of an item; a message may leave it out.
pub fn kind(item: &Value) -> &str {
    item.get("type").and_then(Value::as_str).unwrap_or("message")
}

fn input(fields: &Fields) -> Result<Vec<Value>, ApiError> {
    match fields.get("input") {
        Some(Value::String(text)) => Ok(vec![message("user", &Value::from(text.as_str()))]),
        Some(Value::Array(items)) => items.iter().enumerate().map(|(index, item)| one_item(index, item)).collect(),
        Some(other) if !other.is_null() => Err(wrong_type("input", "a string or an array of input items", other)),
        _ => {
            let elsewhere = ["previous_response_id", "prompt", "conversation"];
            if elsewhere.iter().any(|name| fields.get(*name).is_some_and(|value| !value.is_null())) {
                return Ok(Vec::new());
            }
            let message = "One of \"input\" or \"previous_response_id\" or 'prompt' or 'conversation' must be provided.";
            Err(ApiError::invalid(message).code("missing_required_parameter"))
        }
    }
}

fn one_item(index: usize, item: &Value) -> Result<Value, ApiError> {
    let at = format!("input[{index}]");
    if !item.is_object() {
        return Err(wrong_type(&at, "an object", item));
    }
    let kind = kind(item);
    if !ITEMS.contains(&kind) {
        return Err(unsupported(&at, kind, ITEMS));
    }
    let needs: &[&str] = match kind {
        "function_call" => &["call_id", "name", "arguments"],
        "function_call_output" => &["call_id", "output"],
        "item_reference" => &["id"],
        "message" => &["role", "content"],
        _ => &[],
    };
    if let Some(lacking) = needs.iter().find(|name| item.get(**name).is_none()) {
        return Err(missing(&format!("{at}.{lacking}")));
    }
    if kind != "message" {
        return Ok(with_id(item, kind));
    }
    let role = item.get("role").and_then(Value::as_str).unwrap_or_default();
    if !ROLES.contains(&role) {
        return Err(unsupported(&format!("{at}.role"), role, ROLES));
    }
    let content = item.get("content").unwrap_or(&Value::Null);
    match content {
        Value::String(_) => {}
        Value::Array(parts) => {
            let unknown = parts.iter().enumerate().find(|(_, part)| !PARTS.contains(&part_kind(part)));
            if let Some((place, part)) = unknown {
                return Err(unsupported(&format!("{at}.content[{place}]"), part_kind(part), PARTS));
            }
        }
        other => return Err(wrong_type(&format!("{at}.content"), "a string or an array of objects", other)),
    }
    Ok(message(role, content))
}

fn part_kind(part: &Value) -> &str {
    part.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn message(role: &str, content: &Value) -> Value {
    let content = match content.as_str() {
        None => content.clone(),
        Some(text) if role == "assistant" => json!([{"type": "output_text", "annotations": [], "logprobs": [], "text": text}]),
        Some(text) => json!([{"type": "input_text", "text": text}]),
    };
    json!({"id": identifier("msg_", 48), "type": "message", "status": "completed", "role": role, "content": content})
}

/// An item as it is kept: with an id of its own, if it hasn't one.
fn with_id(item: &Value, kind: &str) -> Value {
    let mut item = item.clone();
    if let Value::Object(fields) = &mut item {
        let prefix = if kind == "function_call" { "fc_" } else { "item_" };
        let lacks = fields.get("id").is_none_or(Value::is_null);
        if lacks {
            fields.insert("id".into(), identifier(prefix, 48).into());
        }
        if kind.starts_with("function_call") {
            fields.entry("status").or_insert_with(|| "completed".into());
        }
    }
    item
}

fn tools(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let tools = match fields.get("tools") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong_type("tools", "an array of objects", other)),
    };
    let mut names = Vec::new();
    for (index, tool) in tools.iter().enumerate() {
        let kind = part_kind(tool);
        if !TOOLS.contains(&kind) {
            return Err(unsupported(&format!("tools[{index}].type"), kind, TOOLS));
        }
        if kind == "function" || kind == "custom" {
            let name = tool.get("name").and_then(Value::as_str);
            names.push(name.ok_or_else(|| missing(&format!("tools[{index}].name")))?.to_owned());
        }
    }
    Ok(names)
}

fn forced_tool(fields: &Fields, tools: &[String]) -> Result<Option<String>, ApiError> {
    let choice = match fields.get("tool_choice") {
        None | Some(Value::Null) => return Ok(None),
        Some(choice) => choice,
    };
    match choice.as_str() {
        Some("auto" | "none") => return Ok(None),
        Some("required") => return Ok(tools.first().cloned()),
        Some(other) => return Err(unsupported("tool_choice", other, &["none", "auto", "required"])),
        None => {}
    }
    if part_kind(choice) != "function" {
        return Ok(None);
    }
    let named = choice.get("name").and_then(Value::as_str).unwrap_or_default();
    if tools.iter().any(|tool| tool == named) {
        return Ok(Some(named.to_owned()));
    }
    let message = format!("Tool choice 'function' not found in 'tools' parameter: {named}.");
    Err(ApiError::invalid(message).param("tool_choice"))
}

/// Tokens of what the next response in a chain does not see again.
fn other_tokens(fields: &Fields) -> u64 {
    let said = ["instructions", "tools", "text"].iter().filter_map(|name| fields.get(*name)).map(tokens::count_json);
    said.sum::<u64>() + ITEM_OVERHEAD
}

/// Tokens of one item; uploaded files and items referred to are counted where they are found.
pub fn item_tokens(item: &Value) -> u64 {
    let content = match kind(item) {
        "item_reference" => 0,
        "message" => match item.get("content") {
            Some(Value::Array(parts)) => parts.iter().map(part_tokens).sum(),
            Some(other) => tokens::count_json(other),
            None => 0,
        },
        _ => ["arguments", "output", "name"].iter().filter_map(|name| item.get(*name)).map(tokens::count_json).sum(),
    };
    ITEM_OVERHEAD + content
}

fn part_tokens(part: &Value) -> u64 {
    let member = |name: &str| part.get(name).and_then(Value::as_str);
    match (member("text"), member("image_url"), member("file_data"), member("file_url")) {
        (Some(text), ..) => tokens::count(text),
        (_, Some(url), ..) => IMAGE_TOKENS.min(url.len() as u64),
        (_, _, Some(data), _) => tokens::count(data),
        (.., Some(url)) => FILE_TOKENS.min(url.len() as u64),
        _ => 1,
    }
}

/// Ids of uploaded files that an item names.
pub fn files(item: &Value) -> impl Iterator<Item = &str> {
    let parts = item.get("content").and_then(Value::as_array).into_iter().chain(item.get("output").and_then(Value::as_array));
    parts.flatten().filter_map(|part| part.get("file_id")?.as_str())
}

fn last_user(input: &[Value]) -> String {
    let users = input.iter().rev().filter(|item| item.get("role").is_some_and(|role| role == "user"));
    users.map(|item| crate::openai::request::text_of(item.get("content"))).find(|text| !text.is_empty()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(body: Value) -> (String, Option<String>) {
        parse(body.to_string().as_bytes()).err().map(|error| (error.message, error.param)).unwrap_or_default()
    }

    #[test]
    fn plain_text_becomes_a_message_with_an_id() -> Result<(), ApiError> {
        let request = parse(br#"{"model":"gpt-4o-mini","input":"[[sim tokens=3]] hello"}"#)?;
        let item = request.input.first().cloned().unwrap_or_default();
        assert_eq!(item.pointer("/content/0/text"), Some(&json!("[[sim tokens=3]] hello")));
        assert!(item.get("id").and_then(Value::as_str).is_some_and(|id| id.starts_with("msg_")));
        assert_eq!((request.store, request.last_user.as_str()), (Sent::Absent, "[[sim tokens=3]] hello"));
        Ok(())
    }

    #[test]
    fn the_body_never_counts_more_tokens_than_it_has_bytes() -> Result<(), ApiError> {
        let items = vec![json!({"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b"}]}); 3];
        let body = json!({"model": "o3", "input": items}).to_string();
        assert!(parse(body.as_bytes())?.own_tokens <= body.len() as u64);
        assert_eq!(item_tokens(&json!({"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b"}]})), 13);
        Ok(())
    }

    #[test]
    fn mistakes_are_named_as_openai_names_them() {
        let unknown = refusal(json!({"model": "gpt-4o", "input": "a", "max_tokens": 5}));
        assert_eq!(unknown, ("Unknown parameter: 'max_tokens'.".into(), Some("max_tokens".into())));
        let small = refusal(json!({"model": "gpt-4o", "input": "a", "max_output_tokens": 1}));
        assert!(small.0.starts_with("Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16"), "{}", small.0);
        let role = refusal(json!({"model": "gpt-4o", "input": [{"role": "tool", "content": "a"}]}));
        assert_eq!(role.1.as_deref(), Some("input[0].role"));
        let part = refusal(json!({"model": "gpt-4o", "input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}));
        assert!(part.0.starts_with("Invalid value: 'text'. Supported values are: 'input_text'"), "{}", part.0);
        assert_eq!(refusal(json!({"model": "tts-1", "input": "a"})).0, "You are not allowed to sample from this model");
        assert!(refusal(json!({"model": "gpt-4o"})).0.starts_with("One of \"input\""));
    }
}
