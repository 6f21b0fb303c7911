//! Writes Gemini's generateContent. The model and whether it streams stand in the path.

use super::super::form::{
    Call, Chat, Choice, Effort, Format, Kind as MediaKind, Media, Part, Role, Source, Thinking, Tool, ToolResult, is_empty,
};
use super::super::models::Gemini;
use super::super::{Problems, Terms, float, limit};
use super::{arguments, is_object, joined, named, room};
use crate::translate::doc::Value;
use crate::translate::write::Writer;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Most stop sequences (API reference, `stopSequences`).
const MAX_STOPS: usize = 5;

/// Stands for the signature of a call that another model made (thought signatures, FAQ).
const FOREIGN_CALL: &str = "skip_thought_signature_validator";

/// Names of the tools that were called so far, by the ids of the calls.
type Called<'d> = BTreeMap<Cow<'d, str>, Value<'d>>;

pub fn write(chat: &Chat<'_>, terms: &Terms<'_>, size: usize, p: &mut Problems) -> String {
    let gemini = Gemini::new(terms.model);
    let settings = &chat.settings;
    let why = "a name begins with a letter or _";
    let begins = |name: &str| name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let tools = named(&chat.tools, chat.names.tool_name, begins, why, p);
    if settings.one_call && !tools.is_empty() {
        p.unsupported(chat.names.one_call, "it can't be kept from calling several tools at once");
    }
    let mut w = Writer::with_capacity(room(size));
    w.object(|w| {
        let system = || chat.system.iter().filter(|text| !is_empty(**text));
        if system().next().is_some() {
            w.key("systemInstruction").object(|w| w.key("parts").array(|w| system().for_each(|text| text_part(w, *text))));
        }
        let mut called = Called::new();
        let mut any = false;
        w.key("contents").array(|w| {
            for (role, parts) in chat.turns() {
                any |= if role == Role::Assistant {
                    model_turn(w, parts, gemini, &mut called, p)
                } else {
                    user_turn(w, chat, parts, gemini, &called, p)
                };
            }
        });
        if !any {
            p.invalid("messages", "must have a message that is not empty, besides instructions");
        }
        if !tools.is_empty() {
            w.key("tools")
                .array(|w| w.object(|w| w.key("functionDeclarations").array(|w| tools.iter().for_each(|tool| write_tool(w, tool)))));
            choice(w, settings.choice, tools.iter().any(|tool| tool.is_strict));
        }
        let mut config = Writer::default();
        config.object(|w| generation_config(w, chat, gemini, terms, p));
        // A config without anything in it says nothing.
        if config.len() > 2 {
            w.key("generationConfig").raw(&config.into_string());
        }
    });
    w.into_string()
}

fn text_part(w: &mut Writer, text: Value<'_>) {
    w.object(|w| w.key("text").value(text));
}

fn content(w: &mut Writer, role: &str, parts: impl FnOnce(&mut Writer)) {
    w.object(|w| {
        w.key("role").str(role);
        w.key("parts").array(parts);
    });
}

/// Writes what the model said. Thoughts of others are left out.
fn model_turn<'d>(w: &mut Writer, parts: &[Part<'d>], gemini: Gemini, called: &mut Called<'d>, p: &mut Problems) -> bool {
    let said: Vec<&Part<'d>> = parts.iter().filter(|part| matches!(part, Part::Call(_)) || is_said(part, gemini, p)).collect();
    if said.is_empty() {
        return false;
    }
    let mut is_first = true;
    content(w, "model", |w| {
        for part in said {
            match part {
                Part::Text(text) => text_part(w, *text),
                Part::Media(media) => write_media(w, media),
                Part::Call(call) => {
                    called.insert(call.id.str().unwrap_or_default(), call.name);
                    let foreign = std::mem::replace(&mut is_first, false) && gemini.wants_signatures();
                    write_call(w, call, foreign, p);
                }
                _ => {}
            }
        }
    });
    true
}

fn write_call(w: &mut Writer, call: &Call<'_>, needs_signature: bool, p: &mut Problems) {
    let arguments = arguments(call, p);
    w.object(|w| {
        w.key("functionCall").object(|w| {
            w.key("id").value(call.id);
            w.key("name").value(call.name);
            w.key("args").raw(&arguments);
        });
        match call.signature {
            Some(signature) => w.key("thoughtSignature").parts([signature]),
            None if needs_signature => w.key("thoughtSignature").str(FOREIGN_CALL),
            None => {}
        }
    });
}

/// Writes what the user said; what tools gave comes first, in a turn of its own, as the model waits for nothing else then.
fn user_turn<'d>(w: &mut Writer, chat: &Chat<'d>, parts: &[Part<'d>], gemini: Gemini, called: &Called<'d>, p: &mut Problems) -> bool {
    let results = || parts.iter().filter_map(|part| if let Part::Result(result) = part { Some(result) } else { None });
    let has_results = results().next().is_some();
    if has_results {
        content(w, "user", |w| results().for_each(|result| write_result(w, chat, result, gemini, called, p)));
    }
    let said: Vec<&Part<'d>> = parts.iter().filter(|part| is_said(part, gemini, p)).collect();
    if said.is_empty() {
        return has_results;
    }
    content(w, "user", |w| {
        for part in said {
            match part {
                Part::Text(text) => text_part(w, *text),
                Part::Media(media) => write_media(w, media),
                _ => {}
            }
        }
    });
    true
}

fn write_result<'d>(w: &mut Writer, chat: &Chat<'d>, result: &ToolResult<'d>, gemini: Gemini, called: &Called<'d>, p: &mut Problems) {
    let Some(name) = called.get(result.id.str().unwrap_or_default().as_ref()) else {
        return p.invalid(result.place, "no call of a tool with this id comes before it");
    };
    let texts = || chat.given(result).iter().filter_map(|part| if let Part::Text(text) = part { Some(*text) } else { None });
    let mut images: Vec<(&str, &str)> = Vec::new();
    for part in chat.given(result) {
        let Part::Media(media) = part else { continue };
        match &media.source {
            Source::Data { mime, data } if gemini.reads_given_images() => images.push((mime, data)),
            _ => p.unsupported(media.place, "tools give nothing but text there"),
        }
    }
    w.object(|w| {
        w.key("functionResponse").object(|w| {
            w.key("id").value(result.id);
            w.key("name").value(*name);
            let mut both = texts();
            let only =
                both.next().filter(|_| both.next().is_none()).and_then(Value::str).filter(|text| !result.is_error && is_object(text));
            match only {
                Some(object) => w.key("response").raw(&object),
                None => w.key("response").object(|w| {
                    joined(w.key(if result.is_error { "error" } else { "result" }), texts(), "\\n", "");
                }),
            }
            if !images.is_empty() {
                w.key("parts").array(|w| images.iter().for_each(|(mime, data)| inline_data(w, mime, data)));
            }
        });
    });
}

fn inline_data(w: &mut Writer, mime: &str, data: &str) {
    w.object(|w| {
        w.key("inlineData").object(|w| {
            w.key("mimeType").str(mime);
            w.key("data").parts([data]);
        });
    });
}

/// Whether a part is text with something in it, or media that are taken.
fn is_said(part: &Part<'_>, gemini: Gemini, p: &mut Problems) -> bool {
    let media = match part {
        Part::Text(text) => return !is_empty(*text),
        Part::Media(media) => media,
        _ => return false,
    };
    let Source::Url(url) = media.source else { return true };
    let text = url.str().unwrap_or_default();
    let refusal = match public_path(&text) {
        _ if !gemini.reads_urls() => "this model does not fetch addresses",
        None => "only a public address of https is fetched",
        Some(path) if mime_at(media, path).is_none() => "what kind of image it is can't be told from its address",
        Some(_) => return true,
    };
    p.unsupported(media.place, refusal);
    false
}

fn mime_at(media: &Media<'_>, path: &str) -> Option<&'static str> {
    if media.kind == MediaKind::File { Some("application/pdf") } else { image_type(path) }
}

fn write_media(w: &mut Writer, media: &Media<'_>) {
    let url = match &media.source {
        Source::Data { mime, data } => return inline_data(w, if mime == "image/jpg" { "image/jpeg" } else { mime }, data),
        Source::Url(url) => *url,
    };
    let text = url.str().unwrap_or_default();
    let mime = public_path(&text).and_then(|path| mime_at(media, path)).unwrap_or_default();
    w.object(|w| {
        w.key("fileData").object(|w| {
            w.key("mimeType").str(mime);
            w.key("fileUri").value(url);
        });
    });
}

/// The path of a public address. A file that somebody has put into the provider's own store is reached by an address too: those
/// are not a caller's to name.
fn public_path(url: &str) -> Option<&str> {
    let rest = ["https://", "http://"].iter().find_map(|scheme| {
        let head = url.get(..scheme.len())?;
        head.eq_ignore_ascii_case(scheme).then(|| url.get(scheme.len()..))?
    })?;
    let (host, path) = rest.find(['/', '?', '#', '\\']).and_then(|at| rest.split_at_checked(at)).unwrap_or((rest, ""));
    let host = host.to_ascii_lowercase();
    let is_plain = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']'));
    (is_plain && !host.contains("generativelanguage")).then_some(path)
}

fn image_type(path: &str) -> Option<&'static str> {
    let path = path.split(['?', '#']).next()?;
    let (_, extension) = path.rsplit_once('.')?;
    match extension.to_ascii_lowercase().as_str() {
        "jpg" | "jpeg" => Some("image/jpeg"),
        "png" => Some("image/png"),
        "webp" => Some("image/webp"),
        "gif" => Some("image/gif"),
        "heic" => Some("image/heic"),
        "heif" => Some("image/heif"),
        _ => None,
    }
}

fn write_tool(w: &mut Writer, tool: &Tool<'_>) {
    w.object(|w| {
        w.key("name").value(tool.name);
        if let Some(description) = tool.description {
            w.key("description").value(description);
        }
        if let Some(schema) = tool.schema {
            w.key("parametersJsonSchema").value(schema);
        }
    });
}

fn choice(w: &mut Writer, choice: Choice<'_>, is_strict: bool) {
    let mode = match choice {
        // Calls are held to the schema then, as they are where one is forced.
        Choice::Unsaid | Choice::Auto if is_strict => "VALIDATED",
        Choice::Unsaid => return,
        Choice::Auto => "AUTO",
        Choice::None => "NONE",
        Choice::Any | Choice::Tool(_) => "ANY",
    };
    w.key("toolConfig").object(|w| {
        w.key("functionCallingConfig").object(|w| {
            w.key("mode").str(mode);
            if let Choice::Tool(name) = choice {
                w.key("allowedFunctionNames").array(|w| w.value(name));
            }
        });
    });
}

fn generation_config(w: &mut Writer, chat: &Chat<'_>, gemini: Gemini, terms: &Terms<'_>, p: &mut Problems) {
    let settings = &chat.settings;
    if let Some(max) = limit(settings.max_tokens, terms) {
        w.key("maxOutputTokens").number(max);
    }
    for (field, value) in [
        ("temperature", settings.temperature),
        ("topP", settings.top_p),
        ("topK", settings.top_k),
        ("seed", settings.seed),
        ("presencePenalty", settings.presence_penalty),
        ("frequencyPenalty", settings.frequency_penalty),
    ] {
        if let Some(value) = value {
            w.key(field).value(value);
        }
    }
    let mut stops = settings.stops.as_slice();
    if stops.len() > MAX_STOPS {
        p.unsupported(chat.names.stop, format_args!("at most {MAX_STOPS} are taken"));
        stops = stops.get(..MAX_STOPS).unwrap_or_default();
    }
    if !stops.is_empty() {
        w.key("stopSequences").array(|w| stops.iter().for_each(|stop| w.value(*stop)));
    }
    if let Some(n) = settings.choices.filter(|n| *n > 1) {
        w.key("candidateCount").number(n);
    }
    if settings.logprobs {
        w.key("responseLogprobs").bool(true);
        if let Some(top) = settings.top_logprobs.filter(|top| float(*top) != 0.0) {
            w.key("logprobs").value(top);
        }
    }
    match settings.format {
        Format::Text => {}
        Format::Json => w.key("responseMimeType").str("application/json"),
        Format::Schema(schema) => {
            w.key("responseMimeType").str("application/json");
            w.key("responseJsonSchema").value(schema);
        }
    }
    thinking(w, chat, gemini, p);
}

fn thinking(w: &mut Writer, chat: &Chat<'_>, gemini: Gemini, p: &mut Problems) {
    let settings = &chat.settings;
    let asks = settings.effort.is_some() || settings.thinking != Thinking::Unsaid;
    let off = settings.effort == Some(Effort::None) || settings.thinking == Thinking::Off;
    let field = if settings.effort.is_some() { chat.names.effort } else { "thinking" };
    if !asks || (off && !gemini.thinks()) {
        return;
    }
    let refusal = match settings.effort {
        _ if !gemini.thinks() => Some("this model does not think"),
        _ if off && !gemini.can_stop_thinking() => Some("this model always thinks"),
        Some(Effort::XHigh | Effort::Max) => Some("this model has no such effort"),
        _ => None,
    };
    if let Some(why) = refusal {
        return p.unsupported(field, why);
    }
    let effort = match (settings.effort, settings.thinking) {
        (Some(effort), _) => Some(effort),
        (None, Thinking::Budget(tokens)) => Some(Effort::of_budget(tokens)),
        _ => None,
    };
    w.key("thinkingConfig").object(|w| {
        if gemini.has_levels() {
            let level = match effort {
                Some(Effort::Minimal) if gemini.has_minimal() => Some("MINIMAL"),
                Some(Effort::Minimal | Effort::Low) => Some("LOW"),
                Some(Effort::Medium) if gemini.has_medium() => Some("MEDIUM"),
                Some(_) => Some("HIGH"),
                None => None,
            };
            if let Some(level) = level {
                w.key("thinkingLevel").str(level);
            }
        } else {
            let budget = match (off, settings.thinking, effort.and_then(Effort::budget)) {
                (true, ..) => Some(0),
                (_, Thinking::Budget(tokens), _) => Some(tokens),
                (_, _, budget) => budget,
            };
            match budget {
                Some(budget) => w.key("thinkingBudget").number(budget.min(gemini.max_budget())),
                // As much as the model finds right.
                None => w.key("thinkingBudget").number(-1),
            }
        }
        if settings.shows_thoughts && !off {
            w.key("includeThoughts").bool(true);
        }
    });
}
