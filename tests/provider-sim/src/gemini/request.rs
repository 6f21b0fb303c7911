//! What a request to generate may say, and what Google answers when it says something else.

use serde_json::Value;

use super::error::{self, bad};
use super::settings;
use super::wire::{self, COUNT, GENERATE};
use super::{history, signs};
use crate::answer::{Asked, Extras, Wish};
use crate::call::Call;
use crate::ledger::{How, Reference};
use crate::models::Model;
use crate::provider::ApiError;
use crate::tokens;

const CONTENT_OVERHEAD: u64 = 3;
/// A picture or a file counts at most this, and never more than its data or its address has bytes.
const MEDIA_TOKENS: u64 = 258;

pub fn parse(body: &[u8], model: &'static Model, stream: bool, call: &Call) -> Result<Asked, ApiError> {
    let request = wire::read(body, &GENERATE)?;
    let contents = contents(&request)?;
    check_contents(contents)?;
    history::check(contents, signs(model))?;
    let declared = settings::tools(&request)?;
    let choice = settings::choice(&request, &declared)?;
    let config = settings::config(&request, model, !declared.is_empty())?;
    if let Some(name) = request.get("cachedContent").and_then(Value::as_str) {
        // None are kept here, but who asks for whose must stand in the books.
        call.note(Reference::new("cached_content", name, How::Used, None));
        return Err(ApiError::new(403, "PERMISSION_DENIED", "CachedContent not found (or permission denied)"));
    }
    let prompt_tokens = prompt_tokens(&request, contents).min(body.len() as u64);
    too_long(prompt_tokens, model)?;
    let last = contents.last();
    Ok(Asked {
        model,
        stream,
        include_usage: true,
        choices: config.candidates,
        limit: config.limit,
        stop: config.stop,
        tools: choice.callable,
        forced_tool: choice.forced,
        prompt_tokens,
        last_user: last_user(contents),
        after_tools: last.is_some_and(|content| history::parts(content).any(|part| part.get("functionResponse").is_some())),
        wish: Wish { json: config.json, one_call: false, thinking: config.thinking },
        extras: Extras::default(),
    })
}

/// The tokens of a prompt that is only counted, and the last text of the user.
pub fn count(body: &[u8], model: &Model) -> Result<(u64, String), ApiError> {
    let request = wire::read(body, &COUNT)?;
    let whole = request.get("generateContentRequest").unwrap_or(&request);
    let contents = contents(whole)?;
    check_contents(contents)?;
    let tokens = prompt_tokens(whole, contents).min(body.len() as u64);
    too_long(tokens, model)?;
    Ok((tokens, last_user(contents)))
}

fn too_long(tokens: u64, model: &Model) -> Result<(), ApiError> {
    if tokens <= model.context {
        return Ok(());
    }
    let message = format!("The input token count ({tokens}) exceeds the maximum number of tokens allowed ({}).", model.context);
    Err(error::invalid(message))
}

fn contents(request: &Value) -> Result<&[Value], ApiError> {
    let contents = request.get("contents").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if contents.is_empty() { Err(bad("contents", "contents is not specified")) } else { Ok(contents) }
}

fn check_contents(contents: &[Value]) -> Result<(), ApiError> {
    for (index, content) in contents.iter().enumerate() {
        if !matches!(history::role(content), "user" | "model") {
            return Err(error::invalid("Please use a valid role: user, model."));
        }
        if history::parts(content).next().is_none() {
            return Err(bad(&format!("contents[{index}].parts"), "contents.parts must not be empty."));
        }
        for (at, part) in history::parts(content).enumerate() {
            check_part(&format!("contents[{index}].parts[{at}]"), history::role(content), part)?;
        }
    }
    Ok(())
}

/// The one thing that a part may hold.
const DATA: [&str; 7] = ["text", "inlineData", "fileData", "functionCall", "functionResponse", "executableCode", "codeExecutionResult"];

fn check_part(place: &str, role: &str, part: &Value) -> Result<(), ApiError> {
    let held: Vec<&str> = DATA.into_iter().filter(|name| part.get(name).is_some()).collect();
    let kind = match held.as_slice() {
        [] => return Err(bad(&format!("{place}.data"), "required oneof field 'data' must have one initialized field")),
        [one] => *one,
        [_, second, ..] => {
            let message = format!("Invalid value at '{place}' (oneof), oneof field 'data' is already set. Cannot set '{second}'");
            return Err(error::invalid(message));
        }
    };
    let lacks = |name: &str| part.get(kind).and_then(|data| data.get(name)).and_then(Value::as_str).is_none_or(str::is_empty);
    match kind {
        "functionCall" if role != "model" => Err(error::invalid("Please ensure that function call turn has the role model.")),
        "functionResponse" if role != "user" => Err(error::invalid("Please ensure that function response turn has the role user.")),
        "functionCall" if lacks("name") => Err(bad(&format!("{place}.function_call.name"), "Name cannot be empty.")),
        "functionResponse" if lacks("name") => Err(bad(&format!("{place}.function_response.name"), "Name cannot be empty.")),
        "functionResponse" if part.pointer("/functionResponse/response").is_none() => {
            Err(bad(&format!("{place}.function_response.response"), "response is not specified"))
        }
        "inlineData" if lacks("mimeType") => Err(error::invalid("Unsupported MIME type: ")),
        "inlineData" if lacks("data") => Err(bad(&format!("{place}.inline_data.data"), "required field data is not set")),
        "fileData" if lacks("fileUri") => Err(bad(&format!("{place}.file_data.file_uri"), "required field file_uri is not set")),
        _ => Ok(()),
    }
}

fn prompt_tokens(request: &Value, contents: &[Value]) -> u64 {
    let of_content = |content: &Value| CONTENT_OVERHEAD + history::parts(content).map(part_tokens).sum::<u64>();
    let told = request.get("systemInstruction").map_or(0, |content| history::parts(content).map(part_tokens).sum());
    let others = request.get("tools").map_or(0, tokens::count_json);
    let schema = ["responseSchema", "responseJsonSchema"];
    let schemas = schema.iter().filter_map(|name| request.get("generationConfig")?.get(*name)).map(tokens::count_json).sum::<u64>();
    contents.iter().map(of_content).sum::<u64>() + told + others + schemas
}

fn part_tokens(part: &Value) -> u64 {
    let member = |path: &str| part.pointer(path).and_then(Value::as_str);
    match (member("/text"), member("/inlineData/data").or(member("/fileData/fileUri"))) {
        (Some(text), _) => tokens::count(text),
        (None, Some(data)) => MEDIA_TOKENS.min(data.len() as u64),
        (None, None) => ["functionCall", "functionResponse"].iter().filter_map(|name| part.get(*name)).map(tokens::count_json).sum(),
    }
}

fn last_user(contents: &[Value]) -> String {
    let users = contents.iter().rev().filter(|content| history::role(content) == "user");
    let text = |content: &Value| {
        let texts: Vec<&str> = history::parts(content).filter_map(|part| part.get("text")?.as_str()).collect();
        texts.join("\n")
    };
    users.map(text).find(|text| !text.is_empty()).unwrap_or_default()
}
