//! The table of operations: what may be called, in which dialect, what it costs, what it may refer to, and where it goes.
//! The path that reaches a provider comes from here, never from the client's bytes.

mod path;
mod provider;
mod table;
mod upstream;

pub use path::{MAX_REFS, is_id, looks_like_object};
pub use provider::{AuthScheme, Maker, Provider, Site, is_provider_name};
pub use table::{OPERATIONS, OTHER, PROVIDERS};
pub use upstream::{Upstream, carries, upstream};

use crate::price::Mode;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The form in which an endpoint speaks: its bodies, its errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dialect {
    #[default]
    OpenAi,
    Anthropic,
    /// Of providers only: callers speak one of the others.
    Gemini,
}

impl Dialect {
    /// The provider whose own dialect it is.
    pub fn provider(self) -> &'static str {
        match self {
            Dialect::OpenAi => "openai",
            Dialect::Anthropic => "anthropic",
            Dialect::Gemini => "gemini",
        }
    }
}

/// A JSON body by what governs in it; [`crate::body`] knows the fields of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    #[default]
    Chat,
    Messages,
    /// Anthropic's messages, only counted.
    Count,
    Responses,
    Completions,
    Embeddings,
    Moderations,
    Images,
    Speech,
    /// Of an operation that is not in the table: read only for what it refers to.
    Other,
}

/// What an operation reads from the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// No body; one is refused.
    Nothing,
    Json(Form),
    /// multipart/form-data with a recording in it.
    Recording,
    /// JSON, multipart/form-data or nothing.
    Anything,
}

/// What an operation is paid by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Costs {
    Free,
    Tokens,
    /// Characters that are spoken.
    Speech,
    Images,
    /// Seconds or tokens of a recording.
    Recording,
    /// Nobody knows: only keys without a budget.
    Unknown,
}

/// How an answer tells usage. The same names mean different things: OpenAI's `input_tokens` include cached ones,
/// Anthropic's don't.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tells {
    /// Nothing that is to be paid.
    #[default]
    Nothing,
    /// `prompt_tokens`, `completion_tokens`.
    Completion,
    /// `prompt_tokens` alone.
    Prompt,
    /// OpenAI's `input_tokens`, `output_tokens`, `seconds`.
    Input,
    Anthropic,
    Gemini,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Operation {
    pub name: &'static str,
    pub dialect: Dialect,
    pub method: &'static str,
    /// A segment `{id}` stands for an object of the caller's, `{model}` for a model.
    pub path: &'static str,
    pub takes: Takes,
    pub costs: Costs,
    pub tells: Tells,
    /// Models that it is made for, by what they are sold as.
    pub models: &'static [Mode],
    /// Query parameters that go on.
    pub query: &'static [&'static str],
}

impl Operation {
    /// The operation of an endpoint as [`Target::endpoint`] names it. `None`: it is not in the table.
    pub fn by_endpoint(dialect: Dialect, endpoint: &str) -> Option<&'static Operation> {
        let (method, path) = endpoint.split_once(' ')?;
        OPERATIONS.iter().find(|op| op.dialect == dialect && op.method == method && op.path == path)
    }

    /// An operation by its endpoint alone, whoever's dialect it is.
    pub fn named(endpoint: &str) -> Option<&'static Operation> {
        [Dialect::OpenAi, Dialect::Anthropic].into_iter().find_map(|dialect| Operation::by_endpoint(dialect, endpoint))
    }

    pub fn form(&self) -> Option<Form> {
        if let Takes::Json(form) = self.takes { Some(form) } else { None }
    }

    /// The fields that limit output, by the dialect's own names; the first is written when the caller set none.
    pub fn limits(&self) -> &'static [&'static str] {
        match self.form() {
            Some(Form::Chat) => &["max_completion_tokens", "max_tokens"],
            Some(Form::Messages | Form::Completions) => &["max_tokens"],
            Some(Form::Responses) if self.costs == Costs::Tokens => &["max_output_tokens"],
            _ => &[],
        }
    }

    /// The limit that the provider itself sets when the caller sets none; it is written down so that the hold can rest on it.
    pub fn default_limit(&self) -> Option<u64> {
        // API reference, legacy completions: "max_tokens: defaults to 16".
        (self.form() == Some(Form::Completions)).then_some(16)
    }

    /// Streams tell usage only when `stream_options.include_usage` asks for it.
    pub fn asks_for_usage(&self) -> bool {
        matches!(self.form(), Some(Form::Chat | Form::Completions))
    }

    /// The provider may keep what it answers, unless told otherwise.
    pub fn may_store(&self) -> bool {
        self.costs == Costs::Tokens && matches!(self.form(), Some(Form::Chat | Form::Responses))
    }

    /// What it costs depends on a service tier.
    pub fn has_tiers(&self) -> bool {
        self.may_store()
    }

    /// The model that the provider takes when none is named.
    pub fn default_model(&self) -> Option<&'static str> {
        (self.form() == Some(Form::Moderations)).then_some("omni-moderation-latest")
    }

    /// The body must name a model.
    pub fn needs_model(&self) -> bool {
        matches!(self.takes, Takes::Json(_) | Takes::Recording) && self.default_model().is_none()
    }

    /// It is answered from the policy, not by the provider.
    pub fn lists_models(&self) -> bool {
        matches!(self.path, "/v1/models" | "/v1/models/{model}")
    }
}

/// What a request is for, as its caller says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The provider that the path names; `None`: the model decides.
    pub provider: Option<String>,
    /// The caller's.
    pub dialect: Dialect,
    pub operation: &'static Operation,
    /// Path and query in the caller's dialect, put together from checked parts.
    pub path: Cow<'static, str>,
    /// `METHOD /path` of an operation that is not in the table.
    other: Option<String>,
    /// Objects that path and query refer to.
    pub refs: Vec<String>,
    /// The model that the path names.
    pub model: Option<String>,
}

impl Target {
    /// `METHOD /path`, the form in which a policy names endpoints: a template, or the path itself when it is not in the table.
    pub fn endpoint(&self) -> Cow<'_, str> {
        match &self.other {
            Some(endpoint) => Cow::Borrowed(endpoint),
            None => Cow::Owned(format!("{} {}", self.operation.method, self.operation.path)),
        }
    }
}

/// Why a path leads nowhere, with the dialect to say so in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoTarget {
    UnknownProvider(Dialect),
    UnknownEndpoint(Dialect),
}

/// Finds the target of a path and its query. `/{provider}/v1/...` names the provider; bare `/v1/...` leaves it to the model. The dialect
/// is that of the path: `/v1/messages` is Anthropic's, and so is what both have where `anthropic_version` (the header every
/// Anthropic SDK sends) says so or the provider is Anthropic.
pub fn find(method: &str, path: &str, query: &[u8], anthropic_version: bool) -> Result<Target, NoTarget> {
    let (name, rest) = if path.starts_with("/v1/") {
        (None, path)
    } else {
        let trimmed = path.strip_prefix('/').unwrap_or(path);
        let (name, _) = trimmed.split_once('/').unwrap_or((trimmed, ""));
        (Some(name), path.get(1 + name.len()..).unwrap_or_default())
    };
    let known = name.and_then(Provider::by_name);
    let messages = rest.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    let is_own = known.is_some_and(|provider| provider.dialect == Dialect::Anthropic);
    let of_openai =
        || OPERATIONS.iter().any(|op| op.dialect == Dialect::OpenAi && op.method == method && path::fits(op.path, rest).is_some());
    let dialect = if messages || ((anthropic_version || is_own) && (is_model_list(rest) || (is_own && !of_openai()))) {
        Dialect::Anthropic
    } else {
        Dialect::OpenAi
    };
    if name.is_some_and(|name| !is_provider_name(name)) {
        return Err(NoTarget::UnknownProvider(dialect));
    }
    // Paths are written down: a virtual key must not stand in one.
    if rest.contains(crate::token::PREFIX) {
        return Err(NoTarget::UnknownEndpoint(dialect));
    }
    let provider = name.map(str::to_owned);
    let in_table = OPERATIONS
        .iter()
        .filter(|op| op.dialect == dialect && op.method == method)
        .find_map(|operation| Some((operation, path::fits(operation.path, rest)?)));
    match in_table {
        Some((operation, found)) => Ok(path::in_table(provider, operation, rest, found, query)),
        None => path::other(provider, dialect, method, rest, query).ok_or(NoTarget::UnknownEndpoint(dialect)),
    }
}

fn is_model_list(path: &str) -> bool {
    path == "/v1/models" || path.starts_with("/v1/models/")
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn target(method: &str, path: &str) -> Target {
        find(method, path, b"", false).unwrap()
    }

    #[test]
    fn paths_lead_where_the_table_says() {
        let name = |method, path, version| {
            let target = find(method, path, b"", version)?;
            let dialect = if target.dialect == Dialect::Anthropic { "anthropic" } else { "openai" };
            Ok::<_, NoTarget>((target.provider.unwrap_or_else(|| dialect.to_owned()), target.operation.name))
        };
        for (method, path, version, provider, operation) in [
            ("POST", "/v1/chat/completions", false, "openai", "chat"),
            ("POST", "/anthropic/v1/chat/completions", true, "anthropic", "chat"),
            ("POST", "/gemini/v1/chat/completions", false, "gemini", "chat"),
            ("POST", "/my-vllm/v1/messages", false, "my-vllm", "messages"),
            ("GET", "/anthropic/v1/models", false, "anthropic", "models"),
            ("POST", "/openai/v1/chat/completions", true, "openai", "chat"),
            ("POST", "/v1/messages", false, "anthropic", "messages"),
            ("POST", "/anthropic/v1/messages", false, "anthropic", "messages"),
            ("POST", "/v1/messages/count_tokens", false, "anthropic", "count_tokens"),
            ("GET", "/v1/models", false, "openai", "models"),
            ("GET", "/v1/models", true, "anthropic", "models"),
            ("GET", "/v1/models/gpt-4.1", false, "openai", "model"),
            ("POST", "/v1/responses", false, "openai", "responses"),
            ("GET", "/v1/responses/resp_1", false, "openai", "response"),
            ("POST", "/v1/responses/resp_1/cancel", false, "openai", "cancel_response"),
            ("GET", "/v1/responses/resp_1/input_items", false, "openai", "response_input"),
            ("POST", "/v1/audio/transcriptions", false, "openai", "transcriptions"),
            ("POST", "/v1/files", false, "openai", "other"),
            ("POST", "/openai/v1/messages", false, "openai", "messages"),
            ("POST", "/anthropic/v1/files", false, "anthropic", "other"),
        ] {
            assert_eq!(name(method, path, version), Ok((provider.to_owned(), operation)), "{method} {path}");
        }
    }

    #[test]
    fn nothing_else_leads_anywhere() {
        for path in ["/Mistral/v1/chat/completions", "/a.b/v1/chat/completions"] {
            assert_eq!(find("POST", path, b"", false), Err(NoTarget::UnknownProvider(Dialect::OpenAi)), "{path}");
        }
        for (method, path) in [
            ("POST", "/v1/chat/completions/"),
            ("POST", "/openai"),
            ("POST", "/openai/"),
            ("POST", "/v1/"),
            ("POST", "/openai/edge/v1/admit"),
            ("POST", "/v1/files/vk_abc"),
            ("GET", "/v1/models/vk_abc"),
            ("POST", "/v1/files/../models"),
            ("POST", "/v1/files/."),
            ("POST", "/v1//files"),
            ("POST", "/v1/files/a%2fb"),
            ("POST", "/v1/files/a;b"),
            ("TRACE", "/v1/files"),
            ("post", "/v1/files"),
        ] {
            assert!(matches!(find(method, path, b"", false), Err(NoTarget::UnknownEndpoint(_))), "{method} {path}");
        }
        for path in ["", "/", "*", "//v1/chat/completions", "/é", "/v1"] {
            assert!(find("POST", path, b"", false).is_err(), "{path}");
        }
    }

    #[test]
    fn ids_in_a_path_are_references_and_nothing_else_is_taken_over() {
        let own = target("GET", "/v1/responses/resp_68ab");
        assert_eq!((own.path.as_ref(), own.endpoint().as_ref()), ("/v1/responses/resp_68ab", "GET /v1/responses/{id}"));
        assert_eq!(own.refs, ["resp_68ab"]);
        let model = target("GET", "/v1/models/ft:gpt-4.1:org::x");
        assert_eq!((model.model.as_deref(), model.refs.len()), (Some("ft:gpt-4.1:org::x"), 0));
        let long = format!("/v1/responses/{}", "x".repeat(129));
        assert_eq!(find("GET", &long, b"", false).map(|t| t.operation.name), Ok("other"), "no id: the table does not have it");
        assert_eq!(target("POST", "/v1/chat/completions").path, Cow::Borrowed("/v1/chat/completions"));
    }

    #[test]
    fn an_operation_outside_the_table_names_its_objects() {
        for (path, refs) in [
            ("/v1/files", vec![]),
            ("/v1/files/file-Ab12/content", vec!["file-Ab12"]),
            ("/v1/vector_stores/vs_1/file_batches/vsfb_2/files", vec!["vs_1", "vsfb_2"]),
            ("/v1/threads/thread_a/messages", vec!["thread_a"]),
            ("/v1/fine_tuning/jobs", vec![]),
        ] {
            let other = target("GET", path);
            assert_eq!((other.operation, other.refs), (&OTHER, refs.iter().map(|r| (*r).to_owned()).collect()), "{path}");
            assert_eq!(target("GET", path).endpoint(), format!("GET {path}"));
        }
    }

    #[test]
    fn query_parameters_go_on_by_name() {
        let path = |path: &str, query: &str| find("GET", path, query.as_bytes(), false).map(|t| t.path.into_owned());
        let own = "/v1/responses/resp_1";
        assert_eq!(path(own, "stream=true&key=vk_x&other=1"), Ok(format!("{own}?stream=true")));
        assert_eq!(path(own, "include%5B%5D=a%2Bb&include[]=c d"), Ok(format!("{own}?include%5B%5D=a%2Bb&include%5B%5D=c%20d")));
        assert_eq!(path("/v1/models", "limit=5"), Ok("/v1/models".to_owned()));
        let files = "/v1/files/file-1A";
        assert_eq!(path(files, "limit=5&key=vk_x&order=asc"), Ok(format!("{files}?limit=5&order=asc")));
        assert_eq!(find("GET", files, b"after=file-2B", false).map(|t| t.refs), Ok(vec!["file-1A".to_owned(), "file-2B".to_owned()]));
        for bad in ["a=%zz", "a=vk_x", "a=é", "a=%00", "a=b/c"] {
            assert!(path(files, bad).is_err(), "{bad}");
        }
    }

    /// The service finds an operation by the name under which the gate asks for it.
    #[test]
    fn every_operation_is_found_by_its_endpoint() {
        for op in &OPERATIONS {
            let endpoint = format!("{} {}", op.method, op.path);
            assert_eq!(Operation::by_endpoint(op.dialect, &endpoint), Some(op), "{endpoint}");
            let path = op.path.replace("{id}", "resp_1").replace("{model}", "gpt-4o");
            let provider = PROVIDERS.iter().find(|p| p.dialect == op.dialect).unwrap();
            let found = find(op.method, &format!("/{}{path}", provider.name), b"", false).unwrap();
            assert_eq!((found.operation, found.endpoint().into_owned()), (op, endpoint));
        }
        assert_eq!(Operation::by_endpoint(Dialect::OpenAi, "POST /v1/files"), None);
    }
}
