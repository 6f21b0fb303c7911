//! The rows: providers, and what may be called at each.

use super::{AuthScheme, Costs, Dialect, Form, Operation, Provider, Takes, Tells};
use crate::price::Mode;

const fn compatible(name: &'static str, host: &'static str, base: &'static str) -> Provider {
    Provider { name, host, base, dialect: Dialect::OpenAi, auth: AuthScheme::Bearer }
}

pub static PROVIDERS: [Provider; 9] = [
    compatible("openai", "api.openai.com", "/v1"),
    Provider { dialect: Dialect::Anthropic, auth: AuthScheme::XApiKey, ..compatible("anthropic", "api.anthropic.com", "/v1") },
    Provider {
        dialect: Dialect::Gemini,
        auth: AuthScheme::XGoogApiKey,
        ..compatible("gemini", "generativelanguage.googleapis.com", "/v1beta")
    },
    // Each resource has a host of its own.
    Provider { auth: AuthScheme::ApiKey, ..compatible("azure", "", "/openai/v1") },
    compatible("groq", "api.groq.com", "/openai/v1"),
    compatible("mistral", "api.mistral.ai", "/v1"),
    compatible("deepseek", "api.deepseek.com", "/v1"),
    compatible("together", "api.together.xyz", "/v1"),
    compatible("openrouter", "openrouter.ai", "/api/v1"),
];

const TALKS: &[Mode] = &[Mode::Chat, Mode::Responses];

/// A row that takes nothing, costs nothing and forwards no query; the others say what differs.
const fn row(name: &'static str, dialect: Dialect, method: &'static str, path: &'static str) -> Operation {
    Operation { name, dialect, method, path, takes: Takes::Nothing, costs: Costs::Free, tells: Tells::Nothing, models: &[], query: &[] }
}

const fn openai(name: &'static str, method: &'static str, path: &'static str) -> Operation {
    row(name, Dialect::OpenAi, method, path)
}

pub static OPERATIONS: [Operation; 23] = [
    Operation {
        takes: Takes::Json(Form::Chat),
        costs: Costs::Tokens,
        tells: Tells::Completion,
        models: TALKS,
        ..openai("chat", "POST", "/v1/chat/completions")
    },
    Operation {
        takes: Takes::Json(Form::Messages),
        costs: Costs::Tokens,
        tells: Tells::Anthropic,
        models: TALKS,
        ..row("messages", Dialect::Anthropic, "POST", "/v1/messages")
    },
    Operation {
        takes: Takes::Json(Form::Responses),
        costs: Costs::Tokens,
        tells: Tells::Input,
        models: TALKS,
        ..openai("responses", "POST", "/v1/responses")
    },
    Operation {
        takes: Takes::Json(Form::Embeddings),
        costs: Costs::Tokens,
        tells: Tells::Prompt,
        models: &[Mode::Embedding],
        ..openai("embeddings", "POST", "/v1/embeddings")
    },
    Operation {
        takes: Takes::Json(Form::Completions),
        costs: Costs::Tokens,
        tells: Tells::Completion,
        models: &[Mode::Completion],
        ..openai("completions", "POST", "/v1/completions")
    },
    Operation { takes: Takes::Json(Form::Moderations), models: &[Mode::Moderation], ..openai("moderations", "POST", "/v1/moderations") },
    Operation {
        takes: Takes::Json(Form::Images),
        costs: Costs::Images,
        tells: Tells::Input,
        models: &[Mode::Image],
        ..openai("images", "POST", "/v1/images/generations")
    },
    Operation {
        takes: Takes::Json(Form::Speech),
        costs: Costs::Speech,
        tells: Tells::Input,
        models: &[Mode::Speech],
        ..openai("speech", "POST", "/v1/audio/speech")
    },
    Operation {
        takes: Takes::Recording,
        costs: Costs::Recording,
        tells: Tells::Input,
        models: &[Mode::Transcription],
        ..openai("transcriptions", "POST", "/v1/audio/transcriptions")
    },
    Operation {
        takes: Takes::Recording,
        costs: Costs::Recording,
        tells: Tells::Input,
        models: &[Mode::Transcription],
        ..openai("translations", "POST", "/v1/audio/translations")
    },
    Operation { takes: Takes::Json(Form::Responses), ..openai("input_tokens", "POST", "/v1/responses/input_tokens") },
    Operation { query: &["include", "stream", "starting_after", "include_obfuscation"], ..openai("response", "GET", "/v1/responses/{id}") },
    openai("delete_response", "DELETE", "/v1/responses/{id}"),
    openai("cancel_response", "POST", "/v1/responses/{id}/cancel"),
    Operation { query: &["include", "limit", "order", "after"], ..openai("response_input", "GET", "/v1/responses/{id}/input_items") },
    openai("chat_completion", "GET", "/v1/chat/completions/{id}"),
    Operation { query: &["limit", "order", "after"], ..openai("chat_messages", "GET", "/v1/chat/completions/{id}/messages") },
    openai("delete_chat_completion", "DELETE", "/v1/chat/completions/{id}"),
    openai("models", "GET", "/v1/models"),
    openai("model", "GET", "/v1/models/{model}"),
    row("models", Dialect::Anthropic, "GET", "/v1/models"),
    row("model", Dialect::Anthropic, "GET", "/v1/models/{model}"),
    Operation { takes: Takes::Json(Form::Count), ..row("count_tokens", Dialect::Anthropic, "POST", "/v1/messages/count_tokens") },
];

/// What is not in the table: only for keys whose policy spells it out, and never on a key with a budget.
pub static OTHER: Operation = Operation { takes: Takes::Anything, costs: Costs::Unknown, ..row("other", Dialect::OpenAi, "", "") };
