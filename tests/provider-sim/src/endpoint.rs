//! Which of the providers' operations a request is for.

use hyper::Method;

use crate::provider::Provider;
use crate::{compatible, gemini};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Chat,
    ChatList,
    ChatStored,
    ChatMessages,
    ChatUpdate,
    ChatDelete,
    Messages,
    CountTokens,
    Models,
    Model,
    Responses,
    ResponseStored,
    ResponseDelete,
    ResponseCancel,
    ResponseInput,
    Embeddings,
    Completions,
    Moderations,
    Images,
    Speech,
    Transcriptions,
    FileUpload,
    FileList,
    File,
    FileDelete,
    FileContent,
    Generate,
    StreamGenerate,
    GeminiTokens,
    Embed,
    BatchEmbed,
}

impl Endpoint {
    pub fn find(provider: Provider, method: &Method, path: &str) -> Option<Endpoint> {
        let post = *method == Method::POST;
        // The two that benchmarks use come first.
        match path {
            "/v1/chat/completions" if post && matches!(provider, Provider::Openai | Provider::Compatible) => return Some(Endpoint::Chat),
            "/v1/messages" if post => return Some(Endpoint::Messages),
            _ => {}
        }
        if provider == Provider::Gemini {
            return Endpoint::gemini(method, path);
        }
        let segments: Vec<&str> = tail(provider, path)?.split('/').collect();
        if segments.iter().any(|segment| segment.is_empty()) {
            return None;
        }
        let found = match (provider, method.as_str(), segments.as_slice()) {
            (_, "GET", ["models"]) => Endpoint::Models,
            // Names of OpenRouter's models have a slash in them.
            (Provider::Compatible, "GET", ["models", ..]) => Endpoint::Model,
            (_, "GET", ["models", _]) => Endpoint::Model,
            (Provider::Anthropic, "POST", ["messages", "count_tokens"]) => Endpoint::CountTokens,
            (Provider::Anthropic, ..) => return None,
            (_, "POST", ["chat", "completions"]) => Endpoint::Chat,
            (_, "POST", ["embeddings"]) => Endpoint::Embeddings,
            (Provider::Azure | Provider::Compatible, ..) => return None,
            (_, "GET", ["chat", "completions"]) => Endpoint::ChatList,
            (_, "GET", ["chat", "completions", _]) => Endpoint::ChatStored,
            (_, "POST", ["chat", "completions", _]) => Endpoint::ChatUpdate,
            (_, "DELETE", ["chat", "completions", _]) => Endpoint::ChatDelete,
            (_, "GET", ["chat", "completions", _, "messages"]) => Endpoint::ChatMessages,
            (_, "POST", ["responses"]) => Endpoint::Responses,
            (_, "GET", ["responses", _]) => Endpoint::ResponseStored,
            (_, "DELETE", ["responses", _]) => Endpoint::ResponseDelete,
            (_, "POST", ["responses", _, "cancel"]) => Endpoint::ResponseCancel,
            (_, "GET", ["responses", _, "input_items"]) => Endpoint::ResponseInput,
            (_, "POST", ["completions"]) => Endpoint::Completions,
            (_, "POST", ["moderations"]) => Endpoint::Moderations,
            (_, "POST", ["images", "generations"]) => Endpoint::Images,
            (_, "POST", ["audio", "speech"]) => Endpoint::Speech,
            (_, "POST", ["audio", "transcriptions"]) => Endpoint::Transcriptions,
            (_, "POST", ["files"]) => Endpoint::FileUpload,
            (_, "GET", ["files"]) => Endpoint::FileList,
            (_, "GET", ["files", _]) => Endpoint::File,
            (_, "DELETE", ["files", _]) => Endpoint::FileDelete,
            (_, "GET", ["files", _, "content"]) => Endpoint::FileContent,
            _ => return None,
        };
        Some(found)
    }

    fn gemini(method: &Method, path: &str) -> Option<Endpoint> {
        let (name, work) = gemini::address(path)?;
        match (method.as_str(), name, work) {
            ("GET", None, None) => Some(Endpoint::Models),
            ("GET", Some(_), None) => Some(Endpoint::Model),
            ("POST", Some(_), Some("generateContent")) => Some(Endpoint::Generate),
            ("POST", Some(_), Some("streamGenerateContent")) => Some(Endpoint::StreamGenerate),
            ("POST", Some(_), Some("countTokens")) => Some(Endpoint::GeminiTokens),
            ("POST", Some(_), Some("embedContent")) => Some(Endpoint::Embed),
            ("POST", Some(_), Some("batchEmbedContents")) => Some(Endpoint::BatchEmbed),
            _ => None,
        }
    }

    /// The name it has in the books: method and path with `{id}` for what differs. What speaks OpenAI's dialect has OpenAI's names,
    /// whatever its base path.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Chat => "POST /v1/chat/completions",
            Endpoint::ChatList => "GET /v1/chat/completions",
            Endpoint::ChatStored => "GET /v1/chat/completions/{id}",
            Endpoint::ChatMessages => "GET /v1/chat/completions/{id}/messages",
            Endpoint::ChatUpdate => "POST /v1/chat/completions/{id}",
            Endpoint::ChatDelete => "DELETE /v1/chat/completions/{id}",
            Endpoint::Messages => "POST /v1/messages",
            Endpoint::CountTokens => "POST /v1/messages/count_tokens",
            Endpoint::Models => "GET /v1/models",
            Endpoint::Model => "GET /v1/models/{id}",
            Endpoint::Responses => "POST /v1/responses",
            Endpoint::ResponseStored => "GET /v1/responses/{id}",
            Endpoint::ResponseDelete => "DELETE /v1/responses/{id}",
            Endpoint::ResponseCancel => "POST /v1/responses/{id}/cancel",
            Endpoint::ResponseInput => "GET /v1/responses/{id}/input_items",
            Endpoint::Embeddings => "POST /v1/embeddings",
            Endpoint::Completions => "POST /v1/completions",
            Endpoint::Moderations => "POST /v1/moderations",
            Endpoint::Images => "POST /v1/images/generations",
            Endpoint::Speech => "POST /v1/audio/speech",
            Endpoint::Transcriptions => "POST /v1/audio/transcriptions",
            Endpoint::FileUpload => "POST /v1/files",
            Endpoint::FileList => "GET /v1/files",
            Endpoint::File => "GET /v1/files/{id}",
            Endpoint::FileDelete => "DELETE /v1/files/{id}",
            Endpoint::FileContent => "GET /v1/files/{id}/content",
            Endpoint::Generate => "POST /v1beta/models/{id}:generateContent",
            Endpoint::StreamGenerate => "POST /v1beta/models/{id}:streamGenerateContent",
            Endpoint::GeminiTokens => "POST /v1beta/models/{id}:countTokens",
            Endpoint::Embed => "POST /v1beta/models/{id}:embedContent",
            Endpoint::BatchEmbed => "POST /v1beta/models/{id}:batchEmbedContents",
        }
    }
}

/// The path after the provider's base path.
pub fn tail(provider: Provider, path: &str) -> Option<&str> {
    match provider {
        Provider::Openai | Provider::Anthropic => path.strip_prefix("/v1/"),
        Provider::Gemini => path.strip_prefix("/v1beta/").or_else(|| path.strip_prefix("/v1/")),
        Provider::Compatible => compatible::BASES.iter().find_map(|(base, _)| path.strip_prefix(base)),
        Provider::Azure => match deployment(path) {
            Some((_, tail)) => Some(tail).filter(|tail| !tail.starts_with("models")),
            None => path.strip_prefix("/openai/v1/"),
        },
    }
}

/// Azure's deployment, and the path after it.
pub fn deployment(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix("/openai/deployments/")?.split_once('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_is_told_from_those_around_it() {
        let find = |method, path| Endpoint::find(Provider::Openai, &method, path).map(Endpoint::name);
        assert_eq!(find(Method::POST, "/v1/responses"), Some("POST /v1/responses"));
        assert_eq!(find(Method::GET, "/v1/responses/resp_1"), Some("GET /v1/responses/{id}"));
        assert_eq!(find(Method::POST, "/v1/responses/resp_1/cancel"), Some("POST /v1/responses/{id}/cancel"));
        assert_eq!(find(Method::GET, "/v1/files/file-1/content"), Some("GET /v1/files/{id}/content"));
        assert_eq!(find(Method::POST, "/v1/chat/completions/chatcmpl-1"), Some("POST /v1/chat/completions/{id}"));
        for (method, path) in [
            (Method::POST, "/v1/responses/resp_1"),
            (Method::GET, "/v1/responses/"),
            (Method::GET, "/v1/files//content"),
            (Method::PUT, "/v1/files"),
            (Method::POST, "/responses"),
            (Method::POST, "/v1/messages/count_tokens"),
        ] {
            assert_eq!(find(method, path), None, "{path}");
        }
        let claude = Endpoint::find(Provider::Anthropic, &Method::POST, "/v1/messages/count_tokens");
        assert_eq!(claude, Some(Endpoint::CountTokens));
        assert_eq!(Endpoint::find(Provider::Anthropic, &Method::POST, "/v1/responses"), None);
    }

    #[test]
    fn each_provider_has_its_own_paths() {
        use Endpoint::{BatchEmbed, Chat, Embeddings, Generate, Model, Models, StreamGenerate};
        use Provider::{Azure, Compatible, Gemini};
        for (provider, method, path, expected) in [
            (Gemini, Method::POST, "/v1beta/models/gemini-2.5-pro:generateContent", Some(Generate)),
            (Gemini, Method::POST, "/v1/models/gemini-2.5-pro:streamGenerateContent", Some(StreamGenerate)),
            (Gemini, Method::POST, "/v1/models/gemini-embedding-001:batchEmbedContents", Some(BatchEmbed)),
            (Gemini, Method::GET, "/v1beta/models", Some(Models)),
            (Gemini, Method::GET, "/v1beta/models/gemini-2.5-pro", Some(Model)),
            (Gemini, Method::GET, "/v1beta/models/gemini-2.5-pro:generateContent", None),
            (Gemini, Method::POST, "/v1/chat/completions", None),
            (Azure, Method::POST, "/openai/deployments/gpt-4o/chat/completions", Some(Chat)),
            (Azure, Method::POST, "/openai/v1/embeddings", Some(Embeddings)),
            (Azure, Method::GET, "/openai/v1/models", Some(Models)),
            (Azure, Method::GET, "/openai/deployments/gpt-4o/models", None),
            (Azure, Method::POST, "/v1/chat/completions", None),
            (Compatible, Method::POST, "/v1/chat/completions", Some(Chat)),
            (Compatible, Method::POST, "/openai/v1/chat/completions", Some(Chat)),
            (Compatible, Method::POST, "/api/v1/chat/completions", Some(Chat)),
            (Compatible, Method::GET, "/api/v1/models/meta-llama/llama-3.3-70b-instruct", Some(Model)),
            (Compatible, Method::POST, "/v1/responses", None),
        ] {
            assert_eq!(Endpoint::find(provider, &method, path), expected, "{path}");
        }
    }
}
