//! OpenAI's dialect to OpenAI's: everything as it stands, but for what was admitted and what only OpenAI knows.

use super::{Problems, Terms};
use crate::operation::Form;
use crate::translate::doc::{Kind, Value};
use crate::translate::write::Writer;
use std::borrow::Cow;

/// The limits on output, by both names.
const LIMITS: [&str; 2] = ["max_completion_tokens", "max_tokens"];

/// What only OpenAI keeps or counts, and what the answer does not depend on.
const OPENAI_ONLY: &[&str] = &["metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"];

/// What others of the dialect have nothing for.
const OPENAI_CAN: &[&str] = &["web_search_options", "prediction", "audio", "moderation"];

pub fn write(root: Value<'_>, terms: &Terms<'_>, p: &mut Problems) -> String {
    let is_chat = terms.form == Form::Chat;
    let stream = is_chat && root.get("stream").and_then(Value::bool) == Some(true);
    let mut w = Writer::with_capacity(root.raw().len() + 128);
    w.object(|w| {
        w.key("model").str(terms.model);
        for (key, value) in root.members() {
            match key.as_ref() {
                "model" => {}
                "messages" if is_chat => messages(w, value, terms),
                "stream_options" if stream => {}
                name if is_chat && LIMITS.contains(&name) => {
                    if terms.is_newest {
                        lowered(w, &key, value, terms, p);
                    }
                }
                "store" | "service_tier" if is_chat && terms.is_newest => {}
                name if is_chat && !terms.is_newest && !goes_on(name, value, terms, p) => {}
                name => w.key(name).value(value),
            }
        }
        if !is_chat {
            return;
        }
        if terms.is_newest {
            openai_fields(w, root, terms);
        } else if let Some(tokens) = older_limit(root, terms, p) {
            w.key("max_tokens").number(tokens);
        }
        if stream {
            stream_options(w, root, terms);
        }
    });
    w.into_string()
}

/// A limit that is no higher than the one that was admitted.
fn lowered(w: &mut Writer, name: &str, value: Value<'_>, terms: &Terms<'_>, p: &mut Problems) {
    let own = Some(value).filter(|value| !value.is_null()).and_then(|value| p.count(Some(value), 0, name));
    match terms.max_tokens {
        Some(max) if own.is_none_or(|own| own > max) => w.key(name).number(max),
        _ => w.key(name).value(value),
    }
}

/// The one limit that older servers know.
fn older_limit(root: Value<'_>, terms: &Terms<'_>, p: &mut Problems) -> Option<u64> {
    let own = LIMITS.iter().filter_map(|name| p.count(root.get(name), 0, name)).min();
    super::limit(own, terms)
}

/// What is decided for OpenAI itself and Azure.
fn openai_fields(w: &mut Writer, root: Value<'_>, terms: &Terms<'_>) {
    let stands = |name: &str| root.members().any(|(key, _)| key == name);
    if let Some(max) = terms.max_tokens
        && !LIMITS.iter().any(|name| stands(name))
    {
        w.key("max_completion_tokens").number(max);
    }
    match root.get("store") {
        _ if terms.no_store => w.key("store").bool(false),
        Some(store) => w.key("store").value(store),
        None if stands("store") => w.key("store").null(),
        None => {}
    }
    match root.get("service_tier") {
        None if terms.list_price => w.key("service_tier").str("default"),
        Some(tier) if terms.list_price && tier.is("auto") => w.key("service_tier").str("default"),
        Some(tier) => w.key("service_tier").value(tier),
        None if stands("service_tier") => w.key("service_tier").null(),
        None => {}
    }
}

/// Whether a field goes to a server that is not OpenAI. Fields that are not known here may be that server's own.
fn goes_on(name: &str, value: Value<'_>, terms: &Terms<'_>, p: &mut Problems) -> bool {
    let asks = match name {
        "store" => value.bool() == Some(true) && !terms.no_store,
        "service_tier" => !value.is_null() && !value.is("auto") && !value.is("default"),
        "verbosity" => !value.is_null() && !value.is("medium"),
        "modalities" => value.items().any(|item| !item.is("text")),
        name if OPENAI_ONLY.contains(&name) => false,
        name if OPENAI_CAN.contains(&name) => !value.is_null(),
        _ => return true,
    };
    if asks {
        p.unsupported(name, "only OpenAI itself has it");
    }
    false
}

/// The chunk with usage is asked for, and what else stood there is kept.
fn stream_options(w: &mut Writer, root: Value<'_>, terms: &Terms<'_>) {
    w.key("stream_options").object(|w| {
        w.key("include_usage").bool(true);
        for (key, value) in root.get("stream_options").into_iter().flat_map(Value::members) {
            if key != "include_usage" && (terms.is_newest || key != "include_obfuscation") {
                w.key(&key).value(value);
            }
        }
    });
}

fn messages(w: &mut Writer, list: Value<'_>, terms: &Terms<'_>) {
    if list.kind() != Kind::Array {
        return w.key("messages").value(list);
    }
    w.key("messages").array(|w| {
        for message in list.items() {
            if terms.is_newest && has_carrier(message) {
                without_carriers(w, message);
            } else if !terms.is_newest && message.get("role").is_some_and(|role| role.is("developer")) {
                w.object(|w| {
                    for (key, value) in message.members() {
                        match key.as_ref() {
                            "role" => w.key("role").str("system"),
                            key => w.key(key).value(value),
                        }
                    }
                });
            } else {
                w.value(message);
            }
        }
    });
}

/// What comes back of another provider's answer, and what OpenAI refuses as unknown.
fn is_carrier(key: &str) -> bool {
    matches!(key, "reasoning_content" | "thinking_blocks")
}

fn has_carrier(message: Value<'_>) -> bool {
    let in_call = |(key, calls): (Cow<'_, str>, Value<'_>)| {
        key == "tool_calls" && calls.items().any(|call| call.members().any(|(key, _)| key == "extra_content"))
    };
    message.members().any(|(key, value)| is_carrier(&key) || in_call((key, value)))
}

fn without_carriers(w: &mut Writer, message: Value<'_>) {
    w.object(|w| {
        for (key, value) in message.members().filter(|(key, _)| !is_carrier(key)) {
            if key != "tool_calls" || value.kind() != Kind::Array {
                w.key(&key).value(value);
                continue;
            }
            w.key("tool_calls").array(|w| {
                for call in value.items() {
                    if call.kind() != Kind::Object {
                        w.value(call);
                        continue;
                    }
                    w.object(|w| {
                        for (key, value) in call.members().filter(|(key, _)| key != "extra_content") {
                            w.key(&key).value(value);
                        }
                    });
                }
            });
        }
    });
}
