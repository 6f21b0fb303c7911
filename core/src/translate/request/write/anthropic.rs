//! Writes Anthropic's messages, as under anthropic-version 2023-06-01: later ones take no temperature.

use super::super::form::{Chat, Choice, Effort, Format, Kind as MediaKind, Media, Part, Role, Source, Tool, is_blank};
use super::super::models::Claude;
use super::super::{Problems, Terms, Untranslatable, float, limit};
use super::{arguments, room};
use crate::translate::doc::Value;
use crate::translate::write::Writer;

/// What is asked of a model where the provider has no field for it.
const JSON_ONLY: &str = "Respond with a single valid JSON object and nothing else.";

/// How the model is to think.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thinking {
    Unsaid,
    Off,
    Adaptive(Effort),
    Budget(u64),
}

impl Thinking {
    fn is_on(self) -> bool {
        matches!(self, Thinking::Adaptive(_) | Thinking::Budget(_))
    }
}

pub fn write(chat: &Chat<'_>, terms: &Terms<'_>, size: usize, p: &mut Problems) -> String {
    let claude = Claude::new(terms.model);
    let settings = &chat.settings;
    let known = limit(settings.max_tokens, terms).or(terms.max_output);
    let Some(max_tokens) = known.map(|tokens| tokens.min(terms.max_output.unwrap_or(tokens))) else {
        let why = "it requires a limit on output, and how much this model can write is not known".to_owned();
        p.keep(Untranslatable::Unsupported(chat.names.max_tokens.to_owned(), why));
        return String::new();
    };
    let thinking = thinking(chat, claude, max_tokens, p);
    let (temperature, top_p) = sampling(chat, claude, thinking, p);
    refuse(chat, p);
    let stops: Vec<Value<'_>> = kept_stops(chat, p);
    let mut w = Writer::with_capacity(room(size));
    w.object(|w| {
        w.key("model").str(terms.model);
        w.key("max_tokens").number(max_tokens);
        system(w, chat);
        let mut any = false;
        w.key("messages").array(|w| {
            for (role, parts) in chat.turns() {
                any |= turn(w, chat, role, parts, p);
            }
        });
        if !any {
            p.invalid("messages", "must have a message that is not empty, besides instructions");
        }
        if !chat.tools.is_empty() {
            w.key("tools").array(|w| chat.tools.iter().for_each(|tool| write_tool(w, tool)));
            choice(w, chat);
        }
        if !stops.is_empty() {
            w.key("stop_sequences").array(|w| stops.iter().for_each(|stop| w.value(*stop)));
        }
        if let Some(temperature) = temperature {
            w.key("temperature").value(temperature);
        }
        if let Some(top_p) = top_p {
            w.key("top_p").value(top_p);
        }
        match thinking {
            Thinking::Unsaid => {}
            Thinking::Off => w.key("thinking").raw(r#"{"type":"disabled"}"#),
            Thinking::Adaptive(_) => w.key("thinking").raw(r#"{"type":"adaptive"}"#),
            Thinking::Budget(tokens) => w.key("thinking").object(|w| {
                w.key("type").str("enabled");
                w.key("budget_tokens").number(tokens);
            }),
        }
        output_config(w, chat, thinking);
        if let Some(user) = settings.user {
            w.key("metadata").object(|w| w.key("user_id").value(user));
        }
        if settings.stream {
            w.key("stream").bool(true);
        }
    });
    w.into_string()
}

fn thinking(chat: &Chat<'_>, claude: Claude, max_tokens: u64, p: &mut Problems) -> Thinking {
    let Some(effort) = chat.settings.effort else { return Thinking::Unsaid };
    let mut refuse = |why: &str| {
        p.unsupported(chat.names.effort, why);
        Thinking::Unsaid
    };
    let forced = chat.settings.choice.forces() && !chat.tools.is_empty();
    match effort {
        Effort::None if claude.always_thinks() => refuse("this model always thinks"),
        Effort::None if claude.thinks_by_itself() => Thinking::Off,
        Effort::None => Thinking::Unsaid,
        _ if !claude.thinks() => refuse("this model does not think"),
        _ if forced && !claude.always_thinks() => refuse("it does not think where a tool must be called"),
        Effort::XHigh if !claude.has_xhigh() => refuse("this model has no such effort"),
        Effort::Minimal if claude.adapts() => Thinking::Adaptive(Effort::Low),
        effort if claude.adapts() => Thinking::Adaptive(effort),
        effort => match effort.budget() {
            None => refuse("this model has no such effort"),
            // Some of the limit is left for the answer, and less than 1024 tokens of thought are refused.
            Some(_) if max_tokens <= 1024 => refuse("the limit on output leaves no room to think"),
            Some(budget) => Thinking::Budget(budget.min(max_tokens.saturating_sub(1).min((max_tokens / 2).max(1024)))),
        },
    }
}

/// Temperature and top_p, where they say something: 1 is what both are anyway.
fn sampling<'d>(chat: &Chat<'d>, claude: Claude, thinking: Thinking, p: &mut Problems) -> (Option<Value<'d>>, Option<Value<'d>>) {
    let says = |value: Option<Value<'d>>| value.filter(|value| float(*value) != 1.0);
    let (mut temperature, mut top_p) = (says(chat.settings.temperature), says(chat.settings.top_p));
    for (field, value) in [("temperature", &mut temperature), ("top_p", &mut top_p)] {
        let Some(number) = *value else { continue };
        let why = if !claude.samples() {
            "this model takes nothing but 1"
        } else if thinking.is_on() {
            "it takes nothing but 1 while the model thinks"
        } else if float(number) > 1.0 {
            "it goes from 0 to 1"
        } else {
            continue;
        };
        p.unsupported(field, why);
        *value = None;
    }
    if temperature.is_some() && top_p.is_some() && !claude.samples_twice() {
        p.unsupported("top_p", "this model takes either temperature or top_p");
        top_p = None;
    }
    (temperature, top_p)
}

/// What Anthropic has nothing for.
fn refuse(chat: &Chat<'_>, p: &mut Problems) {
    let settings = &chat.settings;
    for (field, asked) in [
        ("n", settings.choices.is_some_and(|n| n > 1)),
        ("seed", settings.seed.is_some()),
        ("presence_penalty", settings.presence_penalty.is_some()),
        ("frequency_penalty", settings.frequency_penalty.is_some()),
        ("logprobs", settings.logprobs),
        ("top_logprobs", settings.top_logprobs.is_some_and(|n| float(n) != 0.0)),
    ] {
        if asked {
            p.unsupported(field, "it has nothing like it");
        }
    }
}

fn kept_stops<'d>(chat: &Chat<'d>, p: &mut Problems) -> Vec<Value<'d>> {
    let mut kept = Vec::new();
    for stop in &chat.settings.stops {
        if is_blank(*stop) {
            p.unsupported(chat.names.stop, "it does not stop at white space alone");
        } else {
            kept.push(*stop);
        }
    }
    kept
}

fn system(w: &mut Writer, chat: &Chat<'_>) {
    let texts = || chat.system.iter().filter(|text| !is_blank(**text));
    let json = matches!(chat.settings.format, Format::Json);
    match (texts().count(), json) {
        (0, false) => {}
        (0, true) => w.key("system").str(JSON_ONLY),
        (1, false) => texts().for_each(|text| w.key("system").value(*text)),
        _ => w.key("system").array(|w| {
            texts().for_each(|text| text_block(w, *text));
            if json {
                w.object(|w| {
                    w.key("type").str("text");
                    w.key("text").str(JSON_ONLY);
                });
            }
        }),
    }
}

fn text_block(w: &mut Writer, text: Value<'_>) {
    w.object(|w| {
        w.key("type").str("text");
        w.key("text").value(text);
    });
}

/// Writes a turn, results of tools first, and says whether there was anything in it.
fn turn(w: &mut Writer, chat: &Chat<'_>, role: Role, parts: &[Part<'_>], p: &mut Problems) -> bool {
    let mut seen: Vec<&Part<'_>> = parts.iter().filter(|part| is_kept(part, p)).collect();
    seen.sort_by_key(|part| !matches!(part, Part::Result(_)));
    if seen.is_empty() {
        return false;
    }
    w.object(|w| {
        w.key("role").str(if role == Role::Assistant { "assistant" } else { "user" });
        w.key("content");
        match seen.as_slice() {
            [Part::Text(text)] => w.value(*text),
            _ => w.array(|w| seen.iter().for_each(|part| block(w, chat, part, p))),
        }
    });
    true
}

fn block(w: &mut Writer, chat: &Chat<'_>, part: &Part<'_>, p: &mut Problems) {
    match part {
        Part::Text(text) => text_block(w, *text),
        Part::Media(media) => write_media(w, media),
        Part::Call(call) => {
            let input = arguments(call, p);
            w.object(|w| {
                w.key("type").str("tool_use");
                w.key("id").str(&id(call.id));
                w.key("name").value(call.name);
                w.key("input").raw(&input);
            });
        }
        Part::Result(result) => w.object(|w| {
            w.key("type").str("tool_result");
            w.key("tool_use_id").str(&id(result.id));
            let given: Vec<&Part<'_>> = chat.given(result).iter().filter(|part| is_kept(part, p)).collect();
            match given.as_slice() {
                [] => {}
                [Part::Text(text)] => w.key("content").value(*text),
                _ => w.key("content").array(|w| {
                    for part in given {
                        match part {
                            Part::Text(text) => text_block(w, *text),
                            Part::Media(media) => write_media(w, media),
                            _ => {}
                        }
                    }
                }),
            }
            if result.is_error {
                w.key("is_error").bool(true);
            }
        }),
        Part::Thinking(text, signature) => w.object(|w| {
            w.key("type").str("thinking");
            w.key("thinking").value(*text);
            w.key("signature").value(*signature);
        }),
        Part::Redacted(data) => w.object(|w| {
            w.key("type").str("redacted_thinking");
            w.key("data").value(*data);
        }),
    }
}

/// An id of a call. Anthropic takes letters, digits, _ and - only; others are written by their number, so that two ids
/// stay two.
fn id(id: Value<'_>) -> String {
    let id = id.str().unwrap_or_default();
    let mut out = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("_{byte:02x}"));
        }
    }
    out
}

/// Whether a part is there to be written: texts with something in them, and media that are taken.
fn is_kept(part: &Part<'_>, p: &mut Problems) -> bool {
    let media = match part {
        Part::Text(text) => return !is_blank(*text),
        Part::Media(media) => media,
        _ => return true,
    };
    let mime = if let Source::Data { mime, .. } = &media.source { Some(mime.as_ref()) } else { None };
    let refusal = match (media.kind, mime) {
        (MediaKind::Image, None | Some("image/jpeg" | "image/jpg" | "image/png" | "image/gif" | "image/webp")) => return true,
        (MediaKind::File, Some("application/pdf")) => return true,
        (MediaKind::Image, _) => "of images it takes JPEG, PNG, GIF and WebP",
        (MediaKind::File, _) => "of files it takes PDF only",
        (MediaKind::Audio, _) => "it does not listen",
    };
    p.unsupported(media.place, refusal);
    false
}

fn write_media(w: &mut Writer, media: &Media<'_>) {
    let kind = if media.kind == MediaKind::File { "document" } else { "image" };
    w.object(|w| {
        w.key("type").str(kind);
        w.key("source").object(|w| match &media.source {
            Source::Data { mime, data } => {
                w.key("type").str("base64");
                // A name that is often used, and that only some know.
                w.key("media_type").str(if mime == "image/jpg" { "image/jpeg" } else { mime });
                w.key("data").parts([*data]);
            }
            Source::Url(url) => {
                w.key("type").str("url");
                w.key("url").value(*url);
            }
        });
        if let Some(name) = media.name {
            w.key("title").value(name);
        }
    });
}

fn write_tool(w: &mut Writer, tool: &Tool<'_>) {
    w.object(|w| {
        w.key("name").value(tool.name);
        if let Some(description) = tool.description {
            w.key("description").value(description);
        }
        w.key("input_schema");
        match tool.schema {
            Some(schema) if schema.get("type").is_some() => w.value(schema),
            // The type must be there.
            Some(schema) => w.object(|w| {
                w.key("type").str("object");
                schema.members().filter(|(key, _)| key != "type").for_each(|(key, value)| w.key(&key).value(value));
            }),
            None => w.raw(r#"{"type":"object","properties":{}}"#),
        }
        if tool.is_strict {
            w.key("strict").bool(true);
        }
    });
}

fn choice(w: &mut Writer, chat: &Chat<'_>) {
    let settings = &chat.settings;
    let kind = match settings.choice {
        Choice::Unsaid | Choice::Auto if !settings.one_call => return,
        Choice::Unsaid | Choice::Auto => "auto",
        Choice::None => return w.key("tool_choice").raw(r#"{"type":"none"}"#),
        Choice::Any => "any",
        Choice::Tool(_) => "tool",
    };
    w.key("tool_choice").object(|w| {
        w.key("type").str(kind);
        if let Choice::Tool(name) = settings.choice {
            w.key("name").value(name);
        }
        if settings.one_call {
            w.key("disable_parallel_tool_use").bool(true);
        }
    });
}

fn output_config(w: &mut Writer, chat: &Chat<'_>, thinking: Thinking) {
    let effort = if let Thinking::Adaptive(effort) = thinking { Some(effort) } else { None };
    let schema = if let Format::Schema(schema) = chat.settings.format { Some(schema) } else { None };
    if effort.is_none() && schema.is_none() {
        return;
    }
    w.key("output_config").object(|w| {
        if let Some(effort) = effort {
            w.key("effort").str(effort.name());
        }
        if let Some(schema) = schema {
            w.key("format").object(|w| {
                w.key("type").str("json_schema");
                w.key("schema").value(schema);
            });
        }
    });
}
