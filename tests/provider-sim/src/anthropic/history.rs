//! The messages of a request: their blocks, the calls of tools and their results, and signed thoughts.

use serde_json::Value;

use super::form::only;
use super::request::{NO_SAMPLING, required};
use crate::models::Model;
use crate::provider::ApiError;

/// How every signature begins that is made here.
const SIGNED: &str = "sim-thought:";
/// Since this model an answer can't be begun by the caller.
const NO_PREFILL: u64 = 1_770_163_200;

/// Checks all messages. `with_thoughts` demands that calls of the current turn come with what was thought before them.
pub fn check(messages: &[Value], version: &str, model: &Model, with_thoughts: bool) -> Result<(), ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages: at least one message is required"));
    }
    for (index, message) in messages.iter().enumerate() {
        let role = match message.get("role").and_then(Value::as_str) {
            Some(role @ ("user" | "assistant")) => role,
            Some("system") if version == NO_SAMPLING => "system",
            Some(_) => return Err(ApiError::invalid(format!("messages.{index}.role: Input should be 'user' or 'assistant'"))),
            None => return Err(required(&format!("messages.{index}.role"))),
        };
        if index == 0 && role == "assistant" {
            return Err(ApiError::invalid("messages: first message must use the \"user\" role"));
        }
        only(message, &["role", "content"], &format!("messages.{index}"))?;
        check_content(index, role, message, version)?;
    }
    let turns = turns(messages);
    pair_tools(&turns)?;
    last_turn(&turns, model, with_thoughts)
}

/// Messages of one role that follow each other are one turn: its role, its blocks, each with the place of its message.
fn turns(messages: &[Value]) -> Vec<(&str, Vec<(usize, &Value)>)> {
    let mut turns: Vec<(&str, Vec<(usize, &Value)>)> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
        let content = message.get("content").unwrap_or(&Value::Null);
        // A text stands for itself among the blocks.
        let blocks: Vec<&Value> = content.as_array().map_or_else(|| vec![content], |blocks| blocks.iter().collect());
        let blocks = blocks.into_iter().map(|block| (index, block));
        match turns.last_mut() {
            Some((before, all)) if *before == role => all.extend(blocks),
            _ => turns.push((role, blocks.collect())),
        }
    }
    turns
}

/// Every call of a turn is answered once, and at the beginning of the next.
fn pair_tools(turns: &[(&str, Vec<(usize, &Value)>)]) -> Result<(), ApiError> {
    let mut open: Vec<&str> = Vec::new();
    let mut asked_at = 0;
    let mut all: Vec<&str> = Vec::new();
    for (_, blocks) in turns {
        let mut left = std::mem::take(&mut open);
        let mut answered: Vec<&str> = Vec::new();
        for (index, block) in blocks {
            match kind(block) {
                "tool_result" => {
                    let id = member(block, "tool_use_id");
                    if answered.contains(&id) {
                        let message = format!("each tool_use must have a single result. Found multiple `tool_result` blocks with id: {id}");
                        return Err(ApiError::invalid(format!("messages.{index}.content.0: {message}")));
                    }
                    let Some(at) = left.iter().position(|call| *call == id) else {
                        return Err(ApiError::invalid(format!(
                            "messages.{index}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {id}. Each \
                             `tool_result` block must have a corresponding `tool_use` block in the previous message."
                        )));
                    };
                    left.remove(at);
                    answered.push(id);
                }
                // Results come first.
                _ if !left.is_empty() => return unanswered(asked_at, &left),
                "tool_use" => {
                    let id = member(block, "id");
                    if all.contains(&id) {
                        return Err(ApiError::invalid(format!("messages.{index}.content.0: `tool_use` ids must be unique")));
                    }
                    all.push(id);
                    open.push(id);
                    asked_at = *index;
                }
                _ => {}
            }
        }
        unanswered(asked_at, &left)?;
    }
    unanswered(asked_at, &open)
}

fn unanswered(index: usize, missing: &[&str]) -> Result<(), ApiError> {
    if missing.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid(format!(
        "messages.{index}: `tool_use` ids were found without `tool_result` blocks immediately after: {}. Each `tool_use` block \
         must have a corresponding `tool_result` block in the next message.",
        missing.join(", ")
    )))
}

/// What may not stand at the end.
fn last_turn(turns: &[(&str, Vec<(usize, &Value)>)], model: &Model, with_thoughts: bool) -> Result<(), ApiError> {
    if let Some(("assistant", blocks)) = turns.last() {
        if model.created >= NO_PREFILL {
            let message = "This model does not support assistant message prefill. The conversation must end with a user message.";
            return Err(ApiError::invalid(message));
        }
        let text = blocks.last().map_or("", |(_, block)| block.as_str().unwrap_or_else(|| member(block, "text")));
        if text.ends_with(char::is_whitespace) {
            return Err(ApiError::invalid("messages: final assistant content cannot end with trailing whitespace"));
        }
    }
    let last = turns.iter().rev().find(|(role, _)| *role == "assistant").map(|(_, blocks)| blocks);
    let calls = last.is_some_and(|blocks| blocks.iter().any(|(_, block)| kind(block) == "tool_use"));
    let answered = turns.last().is_some_and(|(_, blocks)| blocks.iter().any(|(_, block)| kind(block) == "tool_result"));
    if let Some((index, first)) = last.and_then(|blocks| blocks.first()).filter(|_| with_thoughts && calls && answered)
        && !kind(first).ends_with("thinking")
    {
        let found = if first.is_string() { "text" } else { kind(first) };
        return Err(ApiError::invalid(format!(
            "messages.{index}.content.0.type: Expected `thinking` or `redacted_thinking`, but found `{found}`. When `thinking` is \
             enabled, a final `assistant` message must start with a thinking block (preceeding the lastmost set of `tool_use` and \
             `tool_result` blocks)."
        )));
    }
    Ok(())
}

fn check_content(index: usize, role: &str, message: &Value, version: &str) -> Result<(), ApiError> {
    let parts = match message.get("content") {
        Some(Value::String(text)) if text.is_empty() && role != "assistant" => return Err(empty(index)),
        Some(Value::String(_)) => return Ok(()),
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err(ApiError::invalid(format!("messages.{index}.content: Input should be a valid list"))),
        None => return Err(required(&format!("messages.{index}.content"))),
    };
    if parts.is_empty() && role != "assistant" {
        return Err(empty(index));
    }
    parts.iter().enumerate().try_for_each(|(at, part)| check_block(&format!("messages.{index}.content.{at}"), role, part, version))
}

fn empty(index: usize) -> ApiError {
    ApiError::invalid(format!("messages.{index}: user messages must have non-empty content"))
}

fn check_block(place: &str, role: &str, part: &Value, version: &str) -> Result<(), ApiError> {
    let kind = part.get("type").and_then(Value::as_str).ok_or_else(|| required(&format!("{place}.type")))?;
    let has = |field: &str| part.get(field).ok_or_else(|| required(&format!("{place}.{kind}.{field}")));
    let known = |fields: &[&str]| only(part, fields, &format!("{place}.{kind}"));
    match kind {
        "text" => {
            known(&["type", "text", "cache_control", "citations"])?;
            match has("text")?.as_str() {
                Some("") => return Err(ApiError::invalid("messages: text content blocks must be non-empty")),
                Some(_) => {}
                None => return Err(ApiError::invalid(format!("{place}.text.text: Input should be a valid string"))),
            }
            let cited = part.get("citations").and_then(Value::as_array).is_some_and(|citations| !citations.is_empty());
            if cited && role == "user" && version == NO_SAMPLING {
                return Err(ApiError::invalid(format!("{place}.text.citations: Extra inputs are not permitted")));
            }
        }
        "tool_use" if role == "assistant" => {
            known(&["type", "id", "name", "input", "cache_control", "caller"])?;
            let id = has("id")?.as_str().unwrap_or_default();
            if id.is_empty() || !id.chars().all(|char| char.is_ascii_alphanumeric() || "_-".contains(char)) {
                return Err(ApiError::invalid(format!("{place}.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'")));
            }
            has("name")?;
            if !has("input")?.is_object() {
                return Err(ApiError::invalid(format!("{place}.tool_use.input: Input should be a valid dictionary")));
            }
        }
        "tool_result" if role == "user" => {
            known(&["type", "tool_use_id", "content", "is_error", "cache_control"])?;
            has("tool_use_id")?;
            let inner = part.get("content").and_then(Value::as_array).into_iter().flatten();
            for (at, block) in inner.enumerate() {
                check_block(&format!("{place}.tool_result.content.{at}"), role, block, version)?;
            }
        }
        "document" if role == "assistant" && version == NO_SAMPLING => {
            return Err(ApiError::invalid(format!("{place}: Extra inputs are not permitted")));
        }
        "image" => {
            known(&["type", "source", "cache_control"])?;
            image(&format!("{place}.image.source"), has("source")?)?;
        }
        "document" => {
            has("source")?;
        }
        "thinking" if role == "assistant" => {
            known(&["type", "thinking", "signature"])?;
            let (thought, signed) = (has("thinking")?.as_str().unwrap_or_default(), has("signature")?.as_str().unwrap_or_default());
            // Thoughts that were not shown come back empty.
            if signed != signature(thought) && !(thought.is_empty() && is_signature(signed)) {
                return Err(ApiError::invalid(format!("{place}: Invalid `signature` in `thinking` block")));
            }
        }
        "redacted_thinking" if role == "assistant" => {
            known(&["type", "data"])?;
            has("data")?;
        }
        _ if ["search_result", "server_tool_use", "container_upload"].contains(&kind) || kind.ends_with("_tool_result") => {}
        _ => {
            let message = format!("{place}: Input tag '{kind}' found using 'type' does not match any of the expected tags");
            return Err(ApiError::invalid(message));
        }
    }
    Ok(())
}

/// A picture in the body, by its address, or among the files.
fn image(place: &str, source: &Value) -> Result<(), ApiError> {
    match source.get("type").and_then(Value::as_str) {
        Some("base64") => {
            only(source, &["type", "media_type", "data"], &format!("{place}.base64"))?;
            if !["image/jpeg", "image/png", "image/gif", "image/webp"].contains(&member(source, "media_type")) {
                let message = "Input should be 'image/jpeg', 'image/png', 'image/gif' or 'image/webp'";
                return Err(ApiError::invalid(format!("{place}.base64.media_type: {message}")));
            }
            use base64::Engine;
            let data = base64::engine::general_purpose::STANDARD.decode(member(source, "data"));
            if data.is_ok_and(|data| !data.is_empty()) {
                Ok(())
            } else {
                Err(ApiError::invalid(format!("{place}.base64.data: Invalid base64 data")))
            }
        }
        Some("url") => {
            only(source, &["type", "url"], &format!("{place}.url"))?;
            let url = member(source, "url");
            if url.starts_with("https://") { Ok(()) } else { Err(ApiError::invalid("Only HTTPS URLs are supported.")) }
        }
        Some("file") => Ok(()),
        _ => Err(ApiError::invalid(format!(
            "{place}: Input tag found using 'type' does not match any of the expected tags: 'base64', 'file', 'url'"
        ))),
    }
}

/// What a thought is signed with, in base64: it fits no other.
pub fn signature(thought: &str) -> String {
    use base64::Engine;
    // FNV-1a: nobody forges signatures here.
    let hash = thought.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    base64::engine::general_purpose::STANDARD.encode(format!("{SIGNED}{hash:016x}"))
}

fn is_signature(given: &str) -> bool {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(given).is_ok_and(|bytes| bytes.starts_with(SIGNED.as_bytes()))
}

pub fn blocks<'a>(message: &'a Value, wanted: &str) -> impl Iterator<Item = &'a Value> {
    let parts = message.get("content").and_then(Value::as_array).into_iter().flatten();
    parts.filter(move |part| kind(part) == wanted)
}

fn kind(block: &Value) -> &str {
    member(block, "type")
}

fn member<'a>(block: &'a Value, name: &str) -> &'a str {
    block.get(name).and_then(Value::as_str).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::provider::Provider;

    fn refusal(model: &str, messages: &Value, with_thoughts: bool) -> String {
        let messages = messages.as_array().cloned().unwrap_or_default();
        let model = Model::find(Provider::Anthropic, model);
        let checked = model.map(|model| check(&messages, "2023-06-01", model, with_thoughts));
        checked.and_then(Result::err).map(|error| error.message).unwrap_or_default()
    }

    fn call(id: &str) -> Value {
        json!({"type": "tool_use", "id": id, "name": "f", "input": {}})
    }

    fn result(id: &str) -> Value {
        json!({"type": "tool_result", "tool_use_id": id, "content": "x"})
    }

    #[test]
    fn messages_of_one_role_are_one_turn_whose_calls_the_next_answers() {
        let split = json!([
            {"role": "user", "content": "a"}, {"role": "assistant", "content": [call("a")]}, {"role": "assistant", "content": [call("b")]},
            {"role": "user", "content": [result("b")]}, {"role": "user", "content": [result("a"), {"type": "text", "text": "so?"}]},
        ]);
        assert_eq!(refusal("claude-haiku-4-5", &split, false), "");
        let turn = |blocks: Value| {
            let asked = json!({"role": "assistant", "content": [call("a"), call("b")]});
            refusal("claude-haiku-4-5", &json!([{"role": "user", "content": "a"}, asked, {"role": "user", "content": blocks}]), false)
        };
        assert!(turn(json!([result("a")])).contains("without `tool_result` blocks immediately after: b."));
        assert!(turn(json!([{"type": "text", "text": "first"}, result("a"), result("b")])).contains("immediately after: a, b."));
        assert!(turn(json!([result("a"), result("b"), result("a")])).contains("single result"));
        assert!(turn(json!([result("a"), result("b"), result("c")])).contains("unexpected `tool_use_id`"));
    }

    #[test]
    fn thoughts_come_back_as_they_were() {
        let history = |first: Value| json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": [first, call("a")]}, {"role": "user", "content": [result("a")]}]);
        let thought = |text: &str, signed: String| json!({"type": "thinking", "thinking": text, "signature": signed});
        assert_eq!(refusal("claude-haiku-4-5", &history(thought("hm", signature("hm"))), true), "");
        assert_eq!(refusal("claude-haiku-4-5", &history(thought("", signature("hm"))), true), "");
        assert!(
            refusal("claude-haiku-4-5", &history(thought("ha", signature("hm"))), true).contains("Invalid `signature` in `thinking` block")
        );
        let bare = history(json!({"type": "text", "text": "hm"}));
        assert!(refusal("claude-haiku-4-5", &bare, true).contains("but found `text`"));
        assert_eq!(refusal("claude-haiku-4-5", &bare, false), "");
    }

    #[test]
    fn blocks_have_their_members_and_no_others() {
        let one = |block: Value| refusal("claude-haiku-4-5", &json!([{"role": "user", "content": [block]}]), false);
        assert!(
            one(json!({"type": "text", "text": "a", "foo": 1})).ends_with("messages.0.content.0.text.foo: Extra inputs are not permitted")
        );
        assert!(
            one(json!({"type": "image", "source": {"type": "base64", "media_type": "image/bmp", "data": "eA=="}})).contains("media_type")
        );
        assert!(one(json!({"type": "image", "source": {"type": "url", "url": "data:image/png;base64,eA=="}})).contains("HTTPS"));
        assert_eq!(one(json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}})), "");
        let prefill = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        assert_eq!(refusal("claude-haiku-4-5", &prefill, false), "");
        assert!(refusal("claude-opus-4-6", &prefill, false).contains("prefill"));
    }
}
