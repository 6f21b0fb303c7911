//! Writes OpenAI's chat completions, for callers of Anthropic's dialect.

use super::super::form::{Chat, Choice, Effort, Format, Kind as MediaKind, Media, Part, Role, Source, Thinking, is_empty};
use super::super::models::Gpt;
use super::super::{Problems, Terms, limit};
use super::{arguments, joined, named, room};
use crate::translate::doc::Value;
use crate::translate::write::Writer;

/// Most stop sequences (API reference, `stop`).
const MAX_STOPS: usize = 4;

pub fn write(chat: &Chat<'_>, terms: &Terms<'_>, size: usize, p: &mut Problems) -> String {
    let settings = &chat.settings;
    let effort = effort(chat, terms, p);
    if settings.top_k.is_some() {
        p.unsupported("top_k", "it has nothing like it");
    }
    let mut stops = settings.stops.as_slice();
    if terms.is_newest && stops.len() > MAX_STOPS {
        p.unsupported(chat.names.stop, format_args!("at most {MAX_STOPS} are taken"));
        stops = stops.get(..MAX_STOPS).unwrap_or_default();
    }
    let longest = if terms.is_newest { 64 } else { 128 };
    let tools = named(&chat.tools, chat.names.tool_name, |name| name.len() <= longest, "a name has at most 64 characters", p);
    let mut w = Writer::with_capacity(room(size));
    w.object(|w| {
        w.key("model").str(terms.model);
        let mut any = false;
        w.key("messages").array(|w| {
            for (role, parts) in chat.turns() {
                any |= turn(w, chat, role, parts, terms, p);
            }
        });
        if !any {
            p.invalid("messages", "must have a message that is not empty");
        }
        if let Some(max) = limit(settings.max_tokens, terms) {
            w.key(if terms.is_newest { "max_completion_tokens" } else { "max_tokens" }).number(max);
        }
        if settings.stream {
            w.key("stream").bool(true);
            w.key("stream_options").raw(r#"{"include_usage":true}"#);
        }
        if !stops.is_empty() {
            w.key("stop").array(|w| stops.iter().for_each(|stop| w.value(*stop)));
        }
        for (field, value) in [("temperature", settings.temperature), ("top_p", settings.top_p), ("user", settings.user)] {
            if let Some(value) = value {
                w.key(field).value(value);
            }
        }
        if let Some(effort) = effort {
            w.key("reasoning_effort").str(effort.name());
        }
        if let Format::Schema(schema) = settings.format {
            w.key("response_format").object(|w| {
                w.key("type").str("json_schema");
                w.key("json_schema").object(|w| {
                    w.key("name").str("answer");
                    w.key("schema").value(schema);
                    w.key("strict").bool(true);
                });
            });
        }
        if !tools.is_empty() {
            w.key("tools").array(|w| {
                for tool in tools {
                    w.object(|w| {
                        w.key("type").str("function");
                        w.key("function").object(|w| {
                            w.key("name").value(tool.name);
                            if let Some(description) = tool.description {
                                w.key("description").value(description);
                            }
                            if let Some(schema) = tool.schema {
                                w.key("parameters").value(schema);
                            }
                            if tool.is_strict {
                                w.key("strict").bool(true);
                            }
                        });
                    });
                }
            });
            choice(w, chat);
        }
        if terms.is_newest && terms.no_store {
            w.key("store").bool(false);
        }
        if terms.is_newest && terms.list_price {
            w.key("service_tier").str("default");
        }
    });
    w.into_string()
}

/// How much the model is to reason, where that can be said.
fn effort(chat: &Chat<'_>, terms: &Terms<'_>, p: &mut Problems) -> Option<Effort> {
    let gpt = Gpt::new(terms.model);
    let reasons = terms.is_newest && gpt.reasons;
    let (field, asked) = match (chat.settings.effort, chat.settings.thinking) {
        (_, Thinking::Off) if !reasons => return None,
        (_, Thinking::Off) if gpt.can_stop => return Some(Effort::None),
        (_, Thinking::Off) => {
            p.unsupported("thinking", "this model always reasons");
            return None;
        }
        (Some(effort), _) => (chat.names.effort, Some(effort)),
        (None, Thinking::Budget(tokens)) => ("thinking", Some(Effort::of_budget(tokens))),
        (None, Thinking::Free) => ("thinking", None),
        (None, Thinking::Unsaid) => return None,
    };
    if !reasons {
        p.unsupported(field, "this model can't be told how much to think");
        return None;
    }
    asked
}

fn turn(w: &mut Writer, chat: &Chat<'_>, role: Role, parts: &[Part<'_>], terms: &Terms<'_>, p: &mut Problems) -> bool {
    let texts = || parts.iter().filter_map(text).filter(|text| !is_empty(*text));
    match role {
        Role::System if texts().next().is_none() => return false,
        Role::System => w.object(|w| {
            w.key("role").str("system");
            joined(w.key("content"), texts(), "\\n\\n", "");
        }),
        Role::Assistant => return assistant(w, parts, p),
        Role::User => return user(w, chat, parts, terms, p),
    }
    true
}

fn text<'d>(part: &Part<'d>) -> Option<Value<'d>> {
    if let Part::Text(text) = part { Some(*text) } else { None }
}

fn assistant(w: &mut Writer, parts: &[Part<'_>], p: &mut Problems) -> bool {
    // Blocks of an answer follow each other without a gap.
    let texts = || parts.iter().filter_map(text).filter(|text| !is_empty(*text));
    let calls = || parts.iter().filter_map(|part| if let Part::Call(call) = part { Some(call) } else { None });
    for part in parts {
        if let Part::Media(media) = part {
            p.unsupported(media.place, "the model itself says nothing but text");
        }
    }
    let (has_texts, has_calls) = (texts().next().is_some(), calls().next().is_some());
    if !has_texts && !has_calls {
        return false;
    }
    w.object(|w| {
        w.key("role").str("assistant");
        if has_texts {
            joined(w.key("content"), texts(), "", "");
        } else {
            w.key("content").null();
        }
        if has_calls {
            w.key("tool_calls").array(|w| {
                for call in calls() {
                    let arguments = arguments(call, p);
                    w.object(|w| {
                        w.key("id").value(call.id);
                        w.key("type").str("function");
                        w.key("function").object(|w| {
                            w.key("name").value(call.name);
                            w.key("arguments").str(&arguments);
                        });
                    });
                }
            });
        }
    });
    true
}

/// What tools gave comes first, each in a message of its own.
fn user(w: &mut Writer, chat: &Chat<'_>, parts: &[Part<'_>], terms: &Terms<'_>, p: &mut Problems) -> bool {
    let mut any = false;
    for part in parts {
        let Part::Result(result) = part else { continue };
        any = true;
        w.object(|w| {
            w.key("role").str("tool");
            w.key("tool_call_id").value(result.id);
            let before = if result.is_error { "Error: " } else { "" };
            let given = chat.given(result);
            if given.iter().any(|part| text(part).is_some()) {
                joined(w.key("content"), given.iter().filter_map(text), "\\n", before);
            } else {
                w.key("content").str(before);
            }
        });
        for part in chat.given(result) {
            if let Part::Media(media) = part {
                p.unsupported(media.place, "tools give nothing but text there");
            }
        }
    }
    let said: Vec<&Part<'_>> = parts.iter().filter(|part| is_said(part, terms, p)).collect();
    if said.is_empty() {
        return any;
    }
    w.object(|w| {
        w.key("role").str("user");
        w.key("content");
        match said.as_slice() {
            [Part::Text(text)] => w.value(*text),
            _ => w.array(|w| {
                for part in said {
                    match part {
                        Part::Text(text) => w.object(|w| {
                            w.key("type").str("text");
                            w.key("text").value(*text);
                        }),
                        Part::Media(media) => write_media(w, media),
                        _ => {}
                    }
                }
            }),
        }
    });
    true
}

/// Whether a part belongs into the user's own message, and is taken.
fn is_said(part: &Part<'_>, terms: &Terms<'_>, p: &mut Problems) -> bool {
    let media = match part {
        Part::Text(text) => return !is_empty(*text),
        Part::Media(media) => media,
        _ => return false,
    };
    let is_pdf = matches!(&media.source, Source::Data { mime, .. } if mime == "application/pdf");
    if media.kind == MediaKind::Image || (media.kind == MediaKind::File && is_pdf && terms.is_newest) {
        return true;
    }
    p.unsupported(media.place, "it does not take such a document");
    false
}

fn write_media(w: &mut Writer, media: &Media<'_>) {
    let is_image = media.kind == MediaKind::Image;
    let (kind, field) = if is_image { ("image_url", "url") } else { ("file", "file_data") };
    w.object(|w| {
        w.key("type").str(kind);
        w.key(kind).object(|w| {
            if !is_image {
                match media.name {
                    Some(name) => w.key("filename").value(name),
                    None => w.key("filename").str("document.pdf"),
                }
            }
            w.key(field);
            match &media.source {
                Source::Data { mime, data } => data_url(w, mime, data),
                Source::Url(url) => w.value(*url),
            }
        });
    });
}

fn data_url(w: &mut Writer, mime: &str, data: &str) {
    w.parts(["data:", mime, ";base64,", data]);
}

fn choice(w: &mut Writer, chat: &Chat<'_>) {
    match chat.settings.choice {
        Choice::Unsaid => {}
        Choice::Auto => w.key("tool_choice").str("auto"),
        Choice::None => w.key("tool_choice").str("none"),
        Choice::Any => w.key("tool_choice").str("required"),
        Choice::Tool(name) => w.key("tool_choice").object(|w| {
            w.key("type").str("function");
            w.key("function").object(|w| w.key("name").value(name));
        }),
    }
    if chat.settings.one_call {
        w.key("parallel_tool_calls").bool(false);
    }
}
