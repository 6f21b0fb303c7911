//! Reads OpenAI's chat completions.

use super::super::form::{Call, Chat, Choice, Effort, Format, Kind as MediaKind, Media, Names, Part, Place, Role, Settings, Source, Tool};
use super::super::{Problems, Terms, float};
use super::{data_url, strings, tool_name};
use crate::translate::doc::{Kind, Value};
use std::fmt::Arguments;

const NAMES: Names = Names {
    max_tokens: "max_tokens",
    stop: "stop",
    effort: "reasoning_effort",
    one_call: "parallel_tool_calls",
    tool_name: ".function.name",
};

/// Fields that change nothing of the answer: what is kept of it, what it costs, how its stream is cut.
const IGNORED: &[&str] =
    &["model", "stream_options", "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"];

/// Of a part: only its cost.
const PART_IGNORED: &[&str] = &["prompt_cache_breakpoint"];

/// Of a call or a thought: what is left of a stream that a client has put together.
const INDEX: &[&str] = &["index"];

const FIELDS: [&str; 26] = [
    "messages",
    "stream",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "logprobs",
    "top_logprobs",
    "user",
    "response_format",
    "reasoning_effort",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    // These have a value that asks for nothing.
    "store",
    "service_tier",
    "verbosity",
    "modalities",
    "logit_bias",
    "functions",
    "function_call",
];

pub fn read<'d>(root: Value<'d>, terms: &Terms<'_>, p: &mut Problems) -> Chat<'d> {
    let mut chat = Chat::new(NAMES);
    let [
        messages,
        stream,
        max_tokens,
        max_completion_tokens,
        stop,
        temperature,
        top_p,
        seed,
        presence_penalty,
        frequency_penalty,
        n,
        logprobs,
        top_logprobs,
        user,
        response_format,
        reasoning_effort,
        tools,
        tool_choice,
        parallel_tool_calls,
        store,
        service_tier,
        verbosity,
        modalities,
        logit_bias,
        functions,
        function_call,
    ] = p.fields(root, format_args!(""), FIELDS, IGNORED);
    let mut number = |value, at| p.of_kind(value, Kind::Number, at);
    let settings = Settings {
        temperature: number(temperature, "temperature"),
        top_p: number(top_p, "top_p"),
        seed: number(seed, "seed"),
        presence_penalty: number(presence_penalty, "presence_penalty").filter(|penalty| float(*penalty) != 0.0),
        frequency_penalty: number(frequency_penalty, "frequency_penalty").filter(|penalty| float(*penalty) != 0.0),
        top_logprobs: number(top_logprobs, "top_logprobs"),
        ..Settings::default()
    };
    let own = p.count(max_tokens, 1, "max_tokens");
    let newer = p.count(max_completion_tokens, 1, "max_completion_tokens");
    chat.settings = Settings {
        stream: p.bool(stream, "stream").unwrap_or(false),
        max_tokens: own.into_iter().chain(newer).min(),
        stops: strings(stop, "stop", p),
        choices: p.count(n, 1, "n"),
        logprobs: p.bool(logprobs, "logprobs").unwrap_or(false),
        user: p.of_kind(user.or_else(|| root.get("safety_identifier")), Kind::Str, "user"),
        format: format(response_format, p),
        effort: effort(reasoning_effort, p),
        choice: choice(tool_choice, p),
        one_call: p.bool(parallel_tool_calls, "parallel_tool_calls") == Some(false),
        ..settings
    };
    // What must not be kept is not, whatever the caller says of it.
    if store.and_then(Value::bool) == Some(true) && !terms.no_store {
        p.unsupported("store", "it keeps no answers");
    }
    let asks = |value: Option<Value<'_>>, nothing: &[&str]| value.is_some_and(|value| !nothing.iter().any(|text| value.is(text)));
    if asks(service_tier, &["auto", "default"]) {
        p.unsupported("service_tier", "it has no such tiers");
    }
    if asks(verbosity, &["medium"]) {
        p.unsupported("verbosity", "it can't be told how much to say");
    }
    if modalities.is_some_and(|list| list.items().any(|item| !item.is("text"))) {
        p.unsupported("modalities", "only text comes back");
    }
    if logit_bias.is_some_and(|bias| bias.members().next().is_some()) {
        p.unsupported("logit_bias", "its tokens are others");
    }
    for (name, value) in [("functions", functions), ("function_call", function_call)] {
        if value.is_some() {
            p.unsupported(name, "it is older than tools: use those");
        }
    }
    let list = p.of_kind(tools, Kind::Array, "tools");
    chat.tools = list.into_iter().flat_map(Value::items).enumerate().filter_map(|(i, value)| tool(i, value, p)).collect();
    let list = p.required(messages, Kind::Array, "messages");
    for (i, value) in list.into_iter().flat_map(Value::items).enumerate() {
        message(&mut chat, i, value, p);
    }
    chat
}

fn effort(value: Option<Value<'_>>, p: &mut Problems) -> Option<Effort> {
    let value = p.of_kind(value, Kind::Str, "reasoning_effort")?;
    let effort = value.str().and_then(|name| Effort::named(&name));
    if effort.is_none() {
        p.invalid("reasoning_effort", "must be none, minimal, low, medium, high, xhigh or max");
    }
    effort
}

fn format<'d>(value: Option<Value<'d>>, p: &mut Problems) -> Format<'d> {
    let Some(value) = value else { return Format::Text };
    let [kind, json_schema] = p.fields(value, format_args!("response_format"), ["type", "json_schema"], &[]);
    match kind.and_then(Value::str).as_deref() {
        Some("text") => Format::Text,
        Some("json_object") => Format::Json,
        Some("json_schema") => {
            let at = "response_format.json_schema";
            let Some(json_schema) = p.required(json_schema, Kind::Object, at) else { return Format::Text };
            // A name is only for the caller, and both other providers keep to a schema strictly.
            let [schema] = p.fields(json_schema, format_args!("{at}"), ["schema"], &["name", "strict"]);
            schema
                .and_then(|schema| p.of_kind(Some(schema), Kind::Object, "response_format.json_schema.schema"))
                .map_or(Format::Json, Format::Schema)
        }
        _ => {
            p.invalid("response_format.type", "must be text, json_object or json_schema");
            Format::Text
        }
    }
}

fn choice<'d>(value: Option<Value<'d>>, p: &mut Problems) -> Choice<'d> {
    let Some(value) = value else { return Choice::Unsaid };
    match value.str().as_deref() {
        Some("auto") => return Choice::Auto,
        Some("none") => return Choice::None,
        Some("required") => return Choice::Any,
        _ => {}
    }
    match value.get("type").and_then(Value::str).as_deref() {
        Some("function") => {
            let [_, function] = p.fields(value, format_args!("tool_choice"), ["type", "function"], &[]);
            let Some(function) = p.required(function, Kind::Object, "tool_choice.function") else { return Choice::Unsaid };
            let [name] = p.fields(function, format_args!("tool_choice.function"), ["name"], &[]);
            tool_name(name, "tool_choice.function.name", p).map_or(Choice::Unsaid, Choice::Tool)
        }
        Some(kind @ ("allowed_tools" | "custom")) => {
            p.unsupported("tool_choice", format_args!("it has no choice of type {kind}"));
            Choice::Unsaid
        }
        _ => {
            p.invalid("tool_choice", "must be none, auto, required or an object of a known type");
            Choice::Unsaid
        }
    }
}

fn tool<'d>(index: usize, value: Value<'d>, p: &mut Problems) -> Option<Tool<'d>> {
    let kind = value.get("type").and_then(Value::str).unwrap_or_default();
    if kind != "function" {
        p.unsupported(format_args!("tools[{index}]"), "only tools of type function can be called there");
        return None;
    }
    let [_, function] = p.fields(value, format_args!("tools[{index}]"), ["type", "function"], &[]);
    let function = p.required(function, Kind::Object, format_args!("tools[{index}].function"))?;
    let at = format_args!("tools[{index}].function");
    let [name, description, parameters, strict] = p.fields(function, at, ["name", "description", "parameters", "strict"], &[]);
    Some(Tool {
        name: tool_name(name, format_args!("tools[{index}].function.name"), p)?,
        description: p.of_kind(description, Kind::Str, format_args!("tools[{index}].function.description")),
        schema: p.of_kind(parameters, Kind::Object, format_args!("tools[{index}].function.parameters")),
        is_strict: p.bool(strict, format_args!("tools[{index}].function.strict")).unwrap_or(false),
        index,
    })
}

fn message<'d>(chat: &mut Chat<'d>, i: usize, value: Value<'d>, p: &mut Problems) {
    let at = u32::try_from(i).unwrap_or(u32::MAX);
    let place = Place { list: "content", message: at, part: None, inner: None, field: "" };
    match value.get("role").and_then(Value::str).as_deref() {
        Some("system" | "developer") => {
            let [_, content] = p.fields(value, format_args!("{place}"), ["role", "content"], &[]);
            let mut texts = Vec::new();
            content_parts(content, place, p, |part| texts.push(part));
            chat.system.extend(texts.into_iter().filter_map(only_text));
        }
        Some("user") => {
            let [_, content] = p.fields(value, format_args!("{place}"), ["role", "content"], &[]);
            content_parts(content, place, p, |part| chat.push(Role::User, part));
        }
        Some("assistant") => assistant(chat, value, place, p),
        Some("tool") => {
            // A tool's name is told by the call.
            let [_, id, content] = p.fields(value, format_args!("{place}"), ["role", "tool_call_id", "content"], &["name"]);
            let Some(id) = p.required(id, Kind::Str, format_args!("{place}.tool_call_id")) else { return };
            let mut given = Vec::new();
            content_parts(content, place, p, |part| given.push(part));
            chat.push_result(id, false, Place { field: ".tool_call_id", ..place }, given);
        }
        Some("function") => p.unsupported(place, "it is older than tools: use those"),
        _ => p.invalid(format_args!("{place}.role"), "must be system, developer, user, assistant or tool"),
    }
}

fn only_text(part: Part<'_>) -> Option<Value<'_>> {
    if let Part::Text(text) = part { Some(text) } else { None }
}

/// The content of a message: a string, or parts.
fn content_parts<'d>(content: Option<Value<'d>>, place: Place, p: &mut Problems, mut take: impl FnMut(Part<'d>)) {
    let Some(content) = content else { return };
    match content.kind() {
        Kind::Str => take(Part::Text(content)),
        Kind::Array => {
            for (j, value) in content.items().enumerate() {
                let place = Place { part: u32::try_from(j).ok(), ..place };
                if let Some(read) = part(value, place, p) {
                    take(read);
                }
            }
        }
        _ => p.invalid(format_args!("{place}.content"), "must be a string or a list of parts"),
    }
}

fn part<'d>(value: Value<'d>, place: Place, p: &mut Problems) -> Option<Part<'d>> {
    let media = |kind, source, name| Part::Media(Media { kind, source, name, place });
    let kind = value.get("type").and_then(Value::str).unwrap_or_default();
    match kind.as_ref() {
        "text" | "refusal" => {
            let name = if kind == "text" { "text" } else { "refusal" };
            let [_, text] = p.fields(value, format_args!("{place}"), ["type", name], PART_IGNORED);
            p.required(text, Kind::Str, format_args!("{place}.{name}")).map(Part::Text)
        }
        "image_url" => {
            let [_, image] = p.fields(value, format_args!("{place}"), ["type", "image_url"], PART_IGNORED);
            let image = p.required(image, Kind::Object, format_args!("{place}.image_url"))?;
            let [url] = p.fields(image, format_args!("{place}.image_url"), ["url"], &["detail"]);
            let url = p.required(url, Kind::Str, format_args!("{place}.image_url.url"))?;
            let source = data_url(url, format_args!("{place}.image_url.url"), p).unwrap_or(Source::Url(url));
            Some(media(MediaKind::Image, source, None))
        }
        "input_audio" => {
            let [_, audio] = p.fields(value, format_args!("{place}"), ["type", "input_audio"], PART_IGNORED);
            let audio = p.required(audio, Kind::Object, format_args!("{place}.input_audio"))?;
            let [data, format] = p.fields(audio, format_args!("{place}.input_audio"), ["data", "format"], &[]);
            let data = p.required(data, Kind::Str, format_args!("{place}.input_audio.data"))?;
            let mime = match format.and_then(Value::str).as_deref() {
                Some("wav") => "audio/wav",
                Some("mp3") => "audio/mp3",
                _ => {
                    p.invalid(format_args!("{place}.input_audio.format"), "must be wav or mp3");
                    return None;
                }
            };
            Some(media(MediaKind::Audio, Source::Data { mime: mime.into(), data: data.inner()? }, None))
        }
        "file" => {
            let [_, file] = p.fields(value, format_args!("{place}"), ["type", "file"], PART_IGNORED);
            let file = p.required(file, Kind::Object, format_args!("{place}.file"))?;
            let [data, name] = p.fields(file, format_args!("{place}.file"), ["file_data", "filename"], &[]);
            // An id of a file at OpenAI was named above.
            let data = p.of_kind(data, Kind::Str, format_args!("{place}.file.file_data"))?;
            let source = data_url(data, format_args!("{place}.file.file_data"), p);
            if source.is_none() {
                p.invalid(format_args!("{place}.file.file_data"), "must be an address of the form data:type;base64,data");
            }
            let name = p.of_kind(name, Kind::Str, format_args!("{place}.file.filename"));
            Some(media(MediaKind::File, source?, name))
        }
        kind => {
            p.unsupported(place, format_args!("it takes no parts of type \"{kind}\""));
            None
        }
    }
}

fn assistant<'d>(chat: &mut Chat<'d>, value: Value<'d>, place: Place, p: &mut Problems) {
    // Thoughts without a signature are taken by nobody, and what came with an answer besides is not for the model.
    let ignored = &["reasoning_content", "reasoning", "annotations"];
    let names = ["role", "content", "refusal", "tool_calls", "thinking_blocks", "audio", "function_call"];
    let [_, content, refusal, tool_calls, thinking, audio, function_call] = p.fields(value, format_args!("{place}"), names, ignored);
    if audio.is_some() {
        p.unsupported(format_args!("{place}.audio"), "what was spoken is kept at OpenAI");
    }
    if function_call.is_some() {
        p.unsupported(format_args!("{place}.function_call"), "it is older than tools: use those");
    }
    let list = p.of_kind(thinking, Kind::Array, format_args!("{place}.thinking_blocks"));
    for (j, block) in list.into_iter().flat_map(Value::items).enumerate() {
        if let Some(part) = thought(block, format_args!("{place}.thinking_blocks[{j}]"), p) {
            chat.push(Role::Assistant, part);
        }
    }
    content_parts(content, place, p, |part| chat.push(Role::Assistant, part));
    if let Some(refusal) = p.of_kind(refusal, Kind::Str, format_args!("{place}.refusal")) {
        chat.push(Role::Assistant, Part::Text(refusal));
    }
    let list = p.of_kind(tool_calls, Kind::Array, format_args!("{place}.tool_calls"));
    for (j, value) in list.into_iter().flat_map(Value::items).enumerate() {
        let place = Place { list: "tool_calls", part: u32::try_from(j).ok(), ..place };
        if let Some(call) = call(value, place, p) {
            chat.push(Role::Assistant, Part::Call(call));
        }
    }
}

fn thought<'d>(block: Value<'d>, at: Arguments<'_>, p: &mut Problems) -> Option<Part<'d>> {
    match block.get("type").and_then(Value::str).as_deref() {
        Some("thinking") => {
            let [_, text, signature] = p.fields(block, at, ["type", "thinking", "signature"], INDEX);
            let text = p.required(text, Kind::Str, at)?;
            // Without its signature it is refused, and a signature of Gemini's belongs to a call.
            let signature = signature.filter(|signature| signature.inner().is_some_and(|s| !s.is_empty() && !s.starts_with("gemini:")))?;
            Some(Part::Thinking(text, signature))
        }
        Some("redacted_thinking") => {
            let [_, data] = p.fields(block, at, ["type", "data"], INDEX);
            p.required(data, Kind::Str, at).map(Part::Redacted)
        }
        _ => {
            p.invalid(at, "must be of type thinking or redacted_thinking");
            None
        }
    }
}

fn call<'d>(value: Value<'d>, place: Place, p: &mut Problems) -> Option<Call<'d>> {
    let names = ["type", "id", "function", "extra_content"];
    let [kind, id, function, extra] = p.fields(value, format_args!("{place}"), names, INDEX);
    if kind.is_some_and(|kind| !kind.is("function")) {
        p.unsupported(place, "only tools of type function can be called there");
        return None;
    }
    let id = p.required(id, Kind::Str, format_args!("{place}.id"))?;
    let function = p.required(function, Kind::Object, format_args!("{place}.function"))?;
    let [name, arguments] = p.fields(function, format_args!("{place}.function"), ["name", "arguments"], &[]);
    let signature =
        extra.and_then(|extra| extra.get("google")?.get("thought_signature")?.inner()).filter(|signature| !signature.is_empty());
    Some(Call {
        id,
        name: tool_name(name, format_args!("{place}.function.name"), p)?,
        input: p.of_kind(arguments, Kind::Str, format_args!("{place}.function.arguments")),
        signature,
        place: Place { field: ".function.arguments", ..place },
    })
}
