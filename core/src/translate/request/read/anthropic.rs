//! Reads Anthropic's messages.

use super::super::form::{
    Call, Chat, Choice, Effort, Format, Kind as MediaKind, Media, Names, Part, Place, Role, Settings, Source, Thinking, Tool,
};
use super::super::{Problems, Terms};
use super::{is_mime, strings, tool_name};
use crate::operation::Dialect;
use crate::translate::doc::{Kind, Value};
use std::borrow::Cow;

const NAMES: Names = Names {
    max_tokens: "max_tokens",
    stop: "stop_sequences",
    effort: "output_config.effort",
    one_call: "tool_choice.disable_parallel_tool_use",
    tool_name: ".name",
};

const FIELDS: [&str; 15] = [
    "messages",
    "max_tokens",
    "system",
    "stream",
    "stop_sequences",
    "temperature",
    "top_p",
    "top_k",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "metadata",
    "service_tier",
    "speed",
];

/// Marks for the prompt cache: only cost.
const IGNORED: &[&str] = &["model", "cache_control"];
const CACHE: &[&str] = &["cache_control"];

pub fn read<'d>(root: Value<'d>, terms: &Terms<'_>, p: &mut Problems) -> Chat<'d> {
    let mut chat = Chat::new(NAMES);
    let [
        messages,
        max_tokens,
        system,
        stream,
        stop_sequences,
        temperature,
        top_p,
        top_k,
        tools,
        tool_choice,
        thinking,
        output_config,
        metadata,
        service_tier,
        speed,
    ] = p.fields(root, format_args!(""), FIELDS, IGNORED);
    let (choice, one_call) = choice(tool_choice, p);
    let (thinking, shows_thoughts) = thinking.map_or((Thinking::Unsaid, false), |value| self::thinking(value, p));
    let [effort, format] =
        output_config.map_or([None; 2], |config| p.fields(config, format_args!("output_config"), ["effort", "format"], &[]));
    let [user] = metadata.map_or([None], |metadata| p.fields(metadata, format_args!("metadata"), ["user_id"], &[]));
    chat.settings = Settings {
        stream: p.bool(stream, "stream").unwrap_or(false),
        max_tokens: p.count(max_tokens, 1, "max_tokens"),
        stops: strings(stop_sequences, "stop_sequences", p),
        temperature: p.of_kind(temperature, Kind::Number, "temperature"),
        top_p: p.of_kind(top_p, Kind::Number, "top_p"),
        top_k: p.of_kind(top_k, Kind::Number, "top_k"),
        user: p.of_kind(user, Kind::Str, "metadata.user_id"),
        effort: self::effort(effort, p),
        format: self::format(format, p),
        thinking,
        shows_thoughts,
        choice,
        one_call,
        ..Settings::default()
    };
    for (field, value, nothing) in [("service_tier", service_tier, ["auto", "standard_only"]), ("speed", speed, ["standard", "standard"])] {
        if value.is_some_and(|value| !nothing.iter().any(|text| value.is(text))) {
            p.unsupported(field, "it has no such choice");
        }
    }
    let list = p.of_kind(tools, Kind::Array, "tools");
    chat.tools = list.into_iter().flat_map(Value::items).enumerate().filter_map(|(i, value)| tool(i, value, p)).collect();
    // OpenAI's dialect has instructions in the conversation, wherever they stand in it.
    let in_place = terms.to == Dialect::OpenAi;
    system_texts(&mut chat, system, in_place, "system", p);
    let list = p.required(messages, Kind::Array, "messages");
    for (i, value) in list.into_iter().flat_map(Value::items).enumerate() {
        message(&mut chat, i, value, in_place, p);
    }
    chat
}

/// How much is thought, and whether it is shown.
fn thinking(value: Value<'_>, p: &mut Problems) -> (Thinking, bool) {
    let [kind, budget, display] = p.fields(value, format_args!("thinking"), ["type", "budget_tokens", "display"], &[]);
    let shows = !display.is_some_and(|display| display.is("omitted"));
    match kind.and_then(Value::str).as_deref() {
        Some("disabled") => (Thinking::Off, false),
        Some("adaptive") => (Thinking::Free, shows),
        Some("enabled") => {
            let budget = p.required(budget, Kind::Number, "thinking.budget_tokens");
            (p.count(budget, 1024, "thinking.budget_tokens").map_or(Thinking::Free, Thinking::Budget), shows)
        }
        Some("between_tools") => {
            p.unsupported("thinking", "it can't be told when to think");
            (Thinking::Unsaid, shows)
        }
        _ => {
            p.invalid("thinking.type", "must be enabled, disabled or adaptive");
            (Thinking::Unsaid, false)
        }
    }
}

fn effort(value: Option<Value<'_>>, p: &mut Problems) -> Option<Effort> {
    let value = value?;
    let effort = value.str().and_then(|name| Effort::named(&name)).filter(|effort| *effort >= Effort::Low);
    if effort.is_none() {
        p.invalid("output_config.effort", "must be low, medium, high, xhigh or max");
    }
    effort
}

fn format<'d>(value: Option<Value<'d>>, p: &mut Problems) -> Format<'d> {
    let Some(value) = value else { return Format::Text };
    let [kind, schema] = p.fields(value, format_args!("output_config.format"), ["type", "schema"], &[]);
    if !kind.is_some_and(|kind| kind.is("json_schema")) {
        p.invalid("output_config.format.type", "must be json_schema");
    }
    p.required(schema, Kind::Object, "output_config.format.schema").map_or(Format::Text, Format::Schema)
}

fn choice<'d>(value: Option<Value<'d>>, p: &mut Problems) -> (Choice<'d>, bool) {
    let Some(value) = value else { return (Choice::Unsaid, false) };
    let [kind, name, disable] = p.fields(value, format_args!("tool_choice"), ["type", "name", "disable_parallel_tool_use"], &[]);
    let one_call = p.bool(disable, NAMES.one_call).unwrap_or(false);
    let choice = match kind.and_then(Value::str).as_deref() {
        Some("auto") => Choice::Auto,
        Some("any") => Choice::Any,
        Some("none") => Choice::None,
        Some("tool") => tool_name(name, "tool_choice.name", p).map_or(Choice::Unsaid, Choice::Tool),
        _ => {
            p.invalid("tool_choice.type", "must be auto, any, none or tool");
            Choice::Unsaid
        }
    };
    (choice, one_call)
}

fn tool<'d>(index: usize, value: Value<'d>, p: &mut Problems) -> Option<Tool<'d>> {
    if value.get("type").is_some_and(|kind| !kind.is("custom")) {
        p.unsupported(format_args!("tools[{index}]"), "it has no tools of its own by that name");
        return None;
    }
    let names = ["type", "name", "description", "input_schema", "strict", "defer_loading", "allowed_callers"];
    // How a call's arguments are cut in a stream is not what is asked.
    let ignored = &["cache_control", "eager_input_streaming"];
    let [_, name, description, schema, strict, defer, callers] = p.fields(value, format_args!("tools[{index}]"), names, ignored);
    if p.bool(defer, format_args!("tools[{index}].defer_loading")) == Some(true) {
        p.unsupported(format_args!("tools[{index}].defer_loading"), "it can't look for tools");
    }
    if callers.is_some_and(|callers| callers.items().any(|caller| !caller.is("direct"))) {
        p.unsupported(format_args!("tools[{index}].allowed_callers"), "only the model itself can call it");
    }
    Some(Tool {
        name: tool_name(name, format_args!("tools[{index}].name"), p)?,
        description: p.of_kind(description, Kind::Str, format_args!("tools[{index}].description")),
        schema: p.required(schema, Kind::Object, format_args!("tools[{index}].input_schema")),
        is_strict: p.bool(strict, format_args!("tools[{index}].strict")).unwrap_or(false),
        index,
    })
}

fn system_texts<'d>(chat: &mut Chat<'d>, content: Option<Value<'d>>, in_place: bool, at: &str, p: &mut Problems) {
    let mut take = |text| {
        if in_place {
            chat.push(Role::System, Part::Text(text));
        } else {
            chat.system.push(text);
        }
    };
    let Some(content) = content else { return };
    match content.kind() {
        Kind::Str => take(content),
        Kind::Array => {
            for (j, block) in content.items().enumerate() {
                if !block.get("type").is_some_and(|kind| kind.is("text")) {
                    p.invalid(format_args!("{at}[{j}].type"), "must be text");
                    continue;
                }
                let [_, text] = p.fields(block, format_args!("{at}[{j}]"), ["type", "text"], CACHE);
                if let Some(text) = p.required(text, Kind::Str, format_args!("{at}[{j}].text")) {
                    take(text);
                }
            }
        }
        _ => p.invalid(at, "must be a string or a list of blocks"),
    }
}

fn message<'d>(chat: &mut Chat<'d>, i: usize, value: Value<'d>, in_place: bool, p: &mut Problems) {
    let [role, content] = p.fields(value, format_args!("messages[{i}]"), ["role", "content"], &[]);
    let role = match role.and_then(Value::str).as_deref() {
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("system") => return system_texts(chat, content, in_place, &format!("messages[{i}].content"), p),
        _ => return p.invalid(format_args!("messages[{i}].role"), "must be user, assistant or system"),
    };
    let place = Place { list: "content", message: u32::try_from(i).unwrap_or(u32::MAX), part: None, inner: None, field: "" };
    let Some(content) = content else { return p.invalid(format_args!("{place}.content"), "is required") };
    match content.kind() {
        Kind::Str => chat.push(role, Part::Text(content)),
        Kind::Array => {
            let mut signature = None;
            for (j, value) in content.items().enumerate() {
                let place = Place { part: u32::try_from(j).ok(), ..place };
                signature = block(chat, role, value, place, signature, p);
            }
        }
        _ => p.invalid(format_args!("{place}.content"), "must be a string or a list of blocks"),
    }
}

/// Reads a block. Gives, and takes from the block before, the signature of Gemini's that stands before a call.
fn block<'d>(
    chat: &mut Chat<'d>,
    role: Role,
    value: Value<'d>,
    place: Place,
    signature: Option<&'d str>,
    p: &mut Problems,
) -> Option<&'d str> {
    match value.get("type").and_then(Value::str).as_deref() {
        Some("thinking") => {
            let [_, _, signature] = p.fields(value, format_args!("{place}"), ["type", "thinking", "signature"], CACHE);
            // Thoughts are taken only by the model that had them.
            return signature.and_then(Value::inner)?.strip_prefix("gemini:");
        }
        Some("redacted_thinking") => {}
        Some("tool_use") => {
            let names = ["type", "id", "name", "input", "caller"];
            let [_, id, name, input, caller] = p.fields(value, format_args!("{place}"), names, CACHE);
            if caller.is_some_and(|caller| !caller.get("type").is_some_and(|kind| kind.is("direct"))) {
                p.unsupported(format_args!("{place}.caller"), "only the model itself calls tools there");
            }
            let id = p.required(id, Kind::Str, format_args!("{place}.id"))?;
            let name = tool_name(name, format_args!("{place}.name"), p)?;
            let input = p.of_kind(input, Kind::Object, format_args!("{place}.input"));
            chat.push(role, Part::Call(Call { id, name, input, signature, place: Place { field: ".input", ..place } }));
        }
        Some("tool_result") => {
            let names = ["type", "tool_use_id", "content", "is_error"];
            let [_, id, content, is_error] = p.fields(value, format_args!("{place}"), names, CACHE);
            let id = p.required(id, Kind::Str, format_args!("{place}.tool_use_id"))?;
            let is_error = p.bool(is_error, format_args!("{place}.is_error")).unwrap_or(false);
            let mut given = Vec::new();
            match content.map(Value::kind) {
                None => {}
                Some(Kind::Str) => given.extend(content.map(Part::Text)),
                Some(Kind::Array) => {
                    for (k, inner) in content.into_iter().flat_map(Value::items).enumerate() {
                        let place = Place { inner: u32::try_from(k).ok(), ..place };
                        plain_block(inner, place, p, |part| given.push(part));
                    }
                }
                Some(_) => p.invalid(format_args!("{place}.content"), "must be a string or a list of blocks"),
            }
            chat.push_result(id, is_error, Place { field: ".tool_use_id", ..place }, given);
        }
        _ => plain_block(value, place, p, |part| chat.push(role, part)),
    }
    None
}

/// A block that may stand in a message as well as in what a tool gave.
fn plain_block<'d>(value: Value<'d>, place: Place, p: &mut Problems, mut take: impl FnMut(Part<'d>)) {
    match value.get("type").and_then(Value::str).as_deref() {
        Some("text") => {
            // Of an answer that comes back: where the model had it from.
            let [_, text] = p.fields(value, format_args!("{place}"), ["type", "text"], &["cache_control", "citations"]);
            p.required(text, Kind::Str, format_args!("{place}.text")).map(Part::Text).into_iter().for_each(take);
        }
        Some("image") => {
            let [_, source] = p.fields(value, format_args!("{place}"), ["type", "source"], CACHE);
            let source = source.and_then(|value| self::source(value, place, p));
            source.map(|source| Part::Media(Media { kind: MediaKind::Image, source, name: None, place })).into_iter().for_each(take);
        }
        Some("document") => {
            let names = ["type", "source", "title", "context", "citations"];
            let [_, source, title, context, citations] = p.fields(value, format_args!("{place}"), names, CACHE);
            if citations.is_some_and(|citations| citations.get("enabled").and_then(Value::bool) == Some(true)) {
                p.unsupported(format_args!("{place}.citations"), "it does not cite");
            }
            let Some(value) = p.required(source, Kind::Object, format_args!("{place}.source")) else { return };
            let title = p.of_kind(title, Kind::Str, format_args!("{place}.title"));
            let context = p.of_kind(context, Kind::Str, format_args!("{place}.context"));
            if value.get("type").is_some_and(|kind| kind.is("text")) {
                let [_, _, data] = p.fields(value, format_args!("{place}.source"), ["type", "media_type", "data"], &[]);
                let data = p.required(data, Kind::Str, format_args!("{place}.source.data"));
                title.into_iter().chain(context).chain(data).map(Part::Text).for_each(take);
            } else if let Some(source) = self::source(value, place, p) {
                context.map(Part::Text).into_iter().for_each(&mut take);
                take(Part::Media(Media { kind: MediaKind::File, source, name: title, place }));
            }
        }
        kind => p.unsupported(place, format_args!("it takes no blocks of type \"{}\"", kind.unwrap_or_default())),
    }
}

fn source<'d>(value: Value<'d>, place: Place, p: &mut Problems) -> Option<Source<'d>> {
    match value.get("type").and_then(Value::str).as_deref() {
        Some("base64") => {
            let [_, mime, data] = p.fields(value, format_args!("{place}.source"), ["type", "media_type", "data"], &[]);
            let mime = p.required(mime, Kind::Str, format_args!("{place}.source.media_type"))?;
            let data = p.required(data, Kind::Str, format_args!("{place}.source.data"))?;
            let mime = mime.str().unwrap_or(Cow::Borrowed(""));
            if !is_mime(&mime) {
                p.invalid(format_args!("{place}.source.media_type"), "must be a media type");
            }
            Some(Source::Data { mime, data: data.inner()? })
        }
        Some("url") => {
            let [_, url] = p.fields(value, format_args!("{place}.source"), ["type", "url"], &[]);
            p.required(url, Kind::Str, format_args!("{place}.source.url")).map(Source::Url)
        }
        kind => {
            p.unsupported(format_args!("{place}.source"), format_args!("it takes no source of type \"{}\"", kind.unwrap_or_default()));
            None
        }
    }
}
