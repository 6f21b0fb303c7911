//! Which of the providers' operations a request is for.

use hyper::Method;

use crate::provider::Provider;

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
}

impl Endpoint {
    pub fn find(provider: Provider, method: &Method, path: &str) -> Option<Endpoint> {
        let post = *method == Method::POST;
        // The two that benchmarks use come first.
        match path {
            "/v1/chat/completions" if post => return Some(Endpoint::Chat),
            "/v1/messages" if post => return Some(Endpoint::Messages),
            _ => {}
        }
        let segments: Vec<&str> = path.strip_prefix("/v1/")?.split('/').collect();
        if segments.iter().any(|segment| segment.is_empty()) {
            return None;
        }
        let found = match (provider, method.as_str(), segments.as_slice()) {
            (_, "GET", ["models"]) => Endpoint::Models,
            (_, "GET", ["models", _]) => Endpoint::Model,
            (Provider::Anthropic, "POST", ["messages", "count_tokens"]) => Endpoint::CountTokens,
            (Provider::Anthropic, ..) => return None,
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
            (_, "POST", ["embeddings"]) => Endpoint::Embeddings,
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

    /// The name it has in the books: method and path with `{id}` for what differs.
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
        }
    }
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
}
