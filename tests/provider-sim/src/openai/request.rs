//! What a chat completion request may say, and what OpenAI answers when it says something else.

use std::collections::HashSet;

use serde_json::Value;

use super::fields::{self, Fields, Shop, flag, integer, missing, wrong_type};
use super::form::{self, json, one_call, thinking};
use crate::answer::{Asked, Extras, Kept, Sent, Wish};
use crate::compatible;
use crate::models::{Kind, Model};
use crate::provider::{ApiError, Provider};
use crate::tokens;

/// Arguments that exist; any other is refused by name.
const KNOWN: &[&str] = &[
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "metadata",
    "modalities",
    "model",
    "moderation",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
];

/// Tokens around each message and before the answer.
const MESSAGE_OVERHEAD: u64 = 3;
/// An image counts at most this, and never more than its address has bytes.
const IMAGE_TOKENS: u64 = 85;

pub fn parse(body: &[u8], shop: Shop) -> Result<Asked, ApiError> {
    let fields = fields::object(body)?;
    let model = fields::sold(&fields, shop, |kind| kind == Kind::Chat)?;
    if shop.provider == Provider::Compatible {
        compatible::only(&fields, KNOWN, shop.flavour)?;
    }
    if let Some(unknown) = fields.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(ApiError::invalid(format!("Unrecognized request argument supplied: {unknown}")));
    }
    let messages = messages(&fields)?;
    if shop.provider == Provider::Compatible {
        compatible::check_roles(messages, shop.flavour)?;
    }
    let limit = limit(&fields, model)?;
    let stream = flag(&fields, "stream")?.unwrap_or(false);
    sampling(&fields, model)?;
    let tools = tools(&fields)?;
    let prompt_tokens = prompt_tokens(&fields, messages).min(body.len() as u64);
    // A limit nobody named takes no room; a reasoning model's output has a window of its own.
    let reserved = if limit == model.max_output || model.reasons { 0 } else { limit };
    if prompt_tokens + reserved > model.context {
        let message = format!(
            "This model's maximum context length is {} tokens. However, your messages resulted in {prompt_tokens} tokens. \
             Please reduce the length of the messages.",
            model.context
        );
        return Err(ApiError::invalid(message).param("messages").code("context_length_exceeded"));
    }
    Ok(Asked {
        model,
        stream,
        include_usage: include_usage(&fields, stream)?,
        choices: choices(&fields)?,
        limit,
        stop: stop(&fields, model)?,
        forced_tool: forced_tool(&fields, &tools)?,
        wish: Wish { json: json(&fields, messages)?, one_call: one_call(&fields, &tools)?, thinking: thinking(&fields, model)? },
        tools: callable(&fields, tools),
        prompt_tokens,
        last_user: last_user(messages),
        after_tools: messages.last().and_then(|message| message.get("role")).is_some_and(|role| role == "tool"),
        extras: extras(&fields, messages)?,
    })
}

/// What reaches beyond the one exchange: `store`, and files uploaded before.
fn extras(fields: &Fields, messages: &[Value]) -> Result<Extras, ApiError> {
    let store = Sent::of(fields.get("store"), flag(fields, "store")?);
    let kept = || Kept { metadata: fields.get("metadata").cloned(), messages: messages.to_vec() };
    let parts = messages.iter().filter_map(|message| message.get("content")?.as_array()).flatten();
    let files = parts.filter_map(|part| part.pointer("/file/file_id")?.as_str().map(str::to_owned)).collect();
    Ok(Extras { store: Some(store), kept: (store == Sent::True).then(kept), files })
}

fn messages(fields: &Fields) -> Result<&[Value], ApiError> {
    let messages = match fields.get("messages") {
        None | Some(Value::Null) => {
            return Err(missing("messages"));
        }
        Some(Value::Array(messages)) => messages,
        Some(other) => return Err(wrong_type("messages", "an array of objects", other)),
    };
    if messages.is_empty() {
        let message = "Invalid 'messages': empty array. Expected an array with minimum length 1, but got an empty array \
                       instead.";
        return Err(ApiError::invalid(message).param("messages").code("empty_array"));
    }
    let mut open_calls: HashSet<&str> = HashSet::new();
    for (index, message) in messages.iter().enumerate() {
        one_message(index, message, &mut open_calls)?;
    }
    unanswered(&open_calls, messages.len())?;
    Ok(messages)
}

fn one_message<'a>(index: usize, message: &'a Value, open_calls: &mut HashSet<&'a str>) -> Result<(), ApiError> {
    let at = format!("messages[{index}]");
    let role = match message.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(wrong_type(&format!("{at}.role"), "a string", other)),
        None => {
            return Err(missing(&format!("{at}.role")));
        }
    };
    if !["system", "assistant", "user", "function", "tool", "developer"].contains(&role) {
        let message = format!(
            "Invalid value: '{role}'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and \
             'developer'."
        );
        return Err(ApiError::invalid(message).param(format!("{at}.role")).code("invalid_value"));
    }
    if role == "tool" {
        let id = message.get("tool_call_id").and_then(Value::as_str).ok_or_else(|| {
            let error = ApiError::invalid(format!("Missing parameter 'tool_call_id': {at} with role 'tool' must have it."));
            error.param(format!("{at}.tool_call_id"))
        })?;
        if !open_calls.remove(id) {
            let message = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with \
                           'tool_calls'.";
            return Err(ApiError::invalid(message).param(format!("{at}.role")));
        }
    } else {
        unanswered(open_calls, index)?;
    }
    content(&at, role, message)?;
    for (position, call) in message.get("tool_calls").and_then(Value::as_array).into_iter().flatten().enumerate() {
        let id = call.get("id").and_then(Value::as_str);
        let named = call.pointer("/function/name").is_some_and(Value::is_string)
            && call.pointer("/function/arguments").is_some_and(Value::is_string);
        match id {
            Some(id) if named && role == "assistant" => open_calls.insert(id),
            _ => {
                let error = ApiError::invalid(format!("Invalid value for '{at}.tool_calls[{position}]'."));
                return Err(error.param(format!("{at}.tool_calls[{position}]")).code("invalid_value"));
            }
        };
    }
    Ok(())
}

fn unanswered(open_calls: &HashSet<&str>, index: usize) -> Result<(), ApiError> {
    if open_calls.is_empty() {
        return Ok(());
    }
    let mut ids: Vec<&str> = open_calls.iter().copied().collect();
    ids.sort_unstable();
    let message = format!(
        "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. The \
         following tool_call_ids did not have response messages: {}",
        ids.join(", ")
    );
    Err(ApiError::invalid(message).param(format!("messages[{index}].role")))
}

fn content(at: &str, role: &str, message: &Value) -> Result<(), ApiError> {
    let param = format!("{at}.content");
    match message.get("content") {
        Some(Value::String(_)) => Ok(()),
        Some(Value::Array(parts)) => parts.iter().enumerate().try_for_each(|(index, part)| {
            let kind = part.get("type").and_then(Value::as_str).unwrap_or_default();
            let whole = match kind {
                "text" => part.get("text").is_some_and(Value::is_string),
                "refusal" => part.get("refusal").is_some_and(Value::is_string),
                "image_url" => part.pointer("/image_url/url").is_some_and(Value::is_string),
                "input_audio" | "file" => true,
                _ => false,
            };
            let error = || ApiError::invalid(format!("Invalid value for '{param}[{index}]': type '{kind}'."));
            whole.then_some(()).ok_or_else(|| error().param(format!("{param}[{index}]")).code("invalid_value"))
        }),
        Some(Value::Null) | None if role == "assistant" => Ok(()),
        Some(Value::Null) | None => {
            let error = ApiError::invalid(format!("Invalid value for 'content': expected a string, got null. ({param})"));
            Err(error.param(param))
        }
        Some(other) => Err(wrong_type(&param, "a string or an array of objects", other)),
    }
}

/// Output tokens allowed: what was asked, or the model's maximum.
fn limit(fields: &Fields, model: &Model) -> Result<u64, ApiError> {
    let old = integer(fields, "max_tokens", 1, u64::MAX)?;
    let new = integer(fields, "max_completion_tokens", 1, u64::MAX)?;
    let (name, asked) = match (old, new) {
        (Some(_), Some(_)) => {
            let message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.";
            return Err(ApiError::invalid(message).param("max_tokens").code("invalid_parameter_combination"));
        }
        (Some(_), None) if model.reasons => {
            let message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use \
                           'max_completion_tokens' instead.";
            return Err(ApiError::invalid(message).param("max_tokens").code("unsupported_parameter"));
        }
        (Some(asked), None) => ("max_tokens", asked),
        (None, Some(asked)) => ("max_completion_tokens", asked),
        (None, None) => return Ok(model.max_output),
    };
    if asked > model.max_output {
        let message = format!(
            "{name} is too large: {asked}. This model supports at most {} completion tokens, whereas you provided {asked}.",
            model.max_output
        );
        return Err(ApiError::invalid(message).param(name).code("invalid_value"));
    }
    Ok(asked)
}

/// Temperature and the like, within their bounds and the model's.
pub fn sampling(fields: &Fields, model: &Model) -> Result<(), ApiError> {
    for (name, low, high) in
        [("temperature", 0.0, 2.0), ("top_p", 0.0, 1.0), ("presence_penalty", -2.0, 2.0), ("frequency_penalty", -2.0, 2.0)]
    {
        let Some(value) = fields.get(name).filter(|value| !value.is_null()) else { continue };
        let number = value.as_f64().ok_or_else(|| wrong_type(name, "a decimal", value))?;
        let bound = if number < low {
            Some(("below minimum", ">=", low, "decimal_below_min_value"))
        } else if number > high {
            Some(("above maximum", "<=", high, "decimal_above_max_value"))
        } else {
            None
        };
        if let Some((what, sign, bound, code)) = bound {
            let message = format!("Invalid '{name}': decimal {what} value. Expected a value {sign} {bound}, but got {value} instead.");
            return Err(ApiError::invalid(message).param(name).code(code));
        }
        if model.reasons && name == "temperature" && !(1.0..=1.0).contains(&number) {
            let message = format!(
                "Unsupported value: 'temperature' does not support {value} with this model. Only the default (1) value is \
                 supported."
            );
            return Err(ApiError::invalid(message).param(name).code("unsupported_value"));
        }
    }
    Ok(())
}

fn choices(fields: &Fields) -> Result<usize, ApiError> {
    let wanted = integer(fields, "n", 1, 128)?.unwrap_or(1);
    Ok(usize::try_from(wanted).unwrap_or(1))
}

/// Whether a stream ends with its usage.
pub fn include_usage(fields: &Fields, stream: bool) -> Result<bool, ApiError> {
    match fields.get("stream_options") {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Object(options)) if stream => Ok(flag(options, "include_usage")?.unwrap_or(false)),
        Some(Value::Object(_)) => {
            let message = "The 'stream_options' parameter is only allowed when 'stream' is enabled.";
            Err(ApiError::invalid(message).param("stream_options"))
        }
        Some(other) => Err(wrong_type("stream_options", "an object", other)),
    }
}

/// Where an answer is to end.
pub fn stop(fields: &Fields, model: &Model) -> Result<Vec<String>, ApiError> {
    let sequences = match fields.get("stop") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => stops
            .iter()
            .map(|stop| stop.as_str().map(str::to_owned).ok_or_else(|| wrong_type("stop", "an array of strings", stop)))
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(wrong_type("stop", "a string or an array of strings", other)),
    };
    if model.reasons {
        let message = "Unsupported parameter: 'stop' is not supported with this model.";
        return Err(ApiError::invalid(message).param("stop").code("unsupported_parameter"));
    }
    if sequences.len() > 4 {
        let message = format!(
            "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with length {} \
             instead.",
            sequences.len()
        );
        return Err(ApiError::invalid(message).param("stop").code("array_above_max_length"));
    }
    Ok(sequences.into_iter().filter(|stop| !stop.is_empty()).collect())
}

fn tools(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let tools = match fields.get("tools") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(tools)) => tools,
        Some(other) => return Err(wrong_type("tools", "an array of objects", other)),
    };
    let name = |(index, tool): (usize, &Value)| {
        let kind = tool.get("type").and_then(Value::as_str);
        let name = match kind {
            Some("function") => tool.pointer("/function/name"),
            Some("custom") => tool.pointer("/custom/name"),
            _ => None,
        };
        let name = name.and_then(Value::as_str).ok_or_else(|| missing(&format!("tools[{index}].function.name")))?;
        form::check_function(&format!("tools[{index}].function"), name, tool.get("function"))?;
        Ok(name.to_owned())
    };
    tools.iter().enumerate().map(name).collect()
}

fn forced_tool(fields: &Fields, tools: &[String]) -> Result<Option<String>, ApiError> {
    let choice = match fields.get("tool_choice") {
        None | Some(Value::Null) => return Ok(None),
        Some(choice) if tools.is_empty() => {
            let harmless = choice == "none" || choice == "auto";
            let error = ApiError::invalid("'tool_choice' is only allowed when 'tools' are specified.");
            return if harmless { Ok(None) } else { Err(error.param("tool_choice")) };
        }
        Some(choice) => choice,
    };
    match choice.as_str() {
        Some("auto" | "none") => return Ok(None),
        Some("required") => return Ok(tools.first().cloned()),
        _ => {}
    }
    let named = choice.pointer("/function/name").and_then(Value::as_str);
    match named.filter(|name| tools.iter().any(|tool| tool == name)) {
        Some(name) => Ok(Some(name.to_owned())),
        None => {
            let error = ApiError::invalid("Invalid value for 'tool_choice'.");
            Err(error.param("tool_choice").code("invalid_value"))
        }
    }
}

/// What the answer may call: nothing if the choice says so, or the one that it names.
fn callable(fields: &Fields, tools: Vec<String>) -> Vec<String> {
    let Some(choice) = fields.get("tool_choice") else { return tools };
    match (choice.as_str(), choice.pointer("/function/name").and_then(Value::as_str)) {
        (Some("none"), _) => Vec::new(),
        (_, Some(name)) => vec![name.to_owned()],
        _ => tools,
    }
}

fn prompt_tokens(fields: &Fields, messages: &[Value]) -> u64 {
    let of_message = |message: &Value| {
        let content = match message.get("content") {
            Some(Value::Array(parts)) => parts.iter().map(part_tokens).sum(),
            Some(content) => tokens::count_json(content),
            None => 0,
        };
        let calls = message.get("tool_calls").map_or(0, tokens::count_json);
        MESSAGE_OVERHEAD + content + calls
    };
    let extra = ["tools", "functions", "response_format"].iter().filter_map(|key| fields.get(*key));
    messages.iter().map(of_message).sum::<u64>() + extra.map(tokens::count_json).sum::<u64>() + MESSAGE_OVERHEAD
}

fn part_tokens(part: &Value) -> u64 {
    let url = part.pointer("/image_url/url").and_then(Value::as_str);
    match url {
        Some(url) => IMAGE_TOKENS.min(url.len() as u64),
        None => part.get("text").map_or(1, tokens::count_json),
    }
}

fn last_user(messages: &[Value]) -> String {
    let users = messages.iter().rev().filter(|message| message.get("role").is_some_and(|role| role == "user"));
    users.map(|message| text_of(message.get("content"))).find(|text| !text.is_empty()).unwrap_or_default()
}

/// The text of a string or of the text parts of an array.
pub fn text_of(content: Option<&Value>) -> String {
    match content {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}
