//! What must never reach a provider. Findings name the place and never repeat the secret.

use crate::credentials::Credentials;
use crate::multipart;
use crate::provider::Provider;

/// A request as it was received: names in lower case, one pair for each line, nothing merged.
pub struct Received<'a> {
    pub provider: Provider,
    /// Path and query.
    pub target: &'a str,
    pub headers: &'a [(String, String)],
    pub body: &'a [u8],
}

const AUTH_HEADERS: [&str; 5] = ["authorization", "proxy-authorization", "x-api-key", "api-key", "x-goog-api-key"];
/// How real secrets begin; anything of that look that isn't known has leaked from somewhere.
const SECRET_PREFIXES: [&str; 5] = ["sk-", "sk_live_", "sk_test_", "AIza", "rk_live_"];
/// Fields that decide what a request costs or reaches: two of them, and the gate and the provider may read different ones.
const GOVERNED: [&str; 23] = [
    "model",
    "stream",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "tools",
    "store",
    "background",
    "previous_response_id",
    "conversation",
    "best_of",
    "size",
    "quality",
    "input",
    "prompt",
    "contents",
    "generationConfig",
    "systemInstruction",
    "toolConfig",
    "cachedContent",
    "thinking",
    "output_config",
];

pub fn of(request: &Received, credentials: &Credentials) -> Vec<String> {
    let mut found = Vec::new();
    virtual_keys(request, &mut found);
    secrets(request, credentials, &mut found);
    headers(request, &mut found);
    let kind = request.headers.iter().find(|(name, _)| name == "content-type").map_or("", |(_, kind)| kind);
    let duplicates = multipart::boundary(kind).map_or_else(|| duplicate_keys(request.body), |bound| duplicate_fields(request.body, bound));
    for key in duplicates {
        found.push(format!("duplicate_key: {key}"));
    }
    found
}

fn virtual_keys(request: &Received, found: &mut Vec<String>) {
    for (name, value) in request.headers {
        if holds_virtual_key(name.as_bytes()) || holds_virtual_key(value.as_bytes()) {
            found.push(format!("virtual_key: header {name}"));
        }
    }
    if holds_virtual_key(request.target.as_bytes()) {
        found.push("virtual_key: path or query".into());
    }
    if holds_virtual_key(request.body) {
        found.push("virtual_key: body".into());
    }
}

/// `vk_` followed by at least ten base62 characters.
fn holds_virtual_key(bytes: &[u8]) -> bool {
    memchr::memmem::find_iter(bytes, b"vk_").any(|at| {
        let rest = bytes.get(at + 3..).unwrap_or_default();
        rest.iter().take(10).filter(|byte| byte.is_ascii_alphanumeric()).count() == 10
    })
}

fn secrets(request: &Received, credentials: &Credentials, found: &mut Vec<String>) {
    let mut auth_lines = 0;
    for (name, value) in request.headers {
        if !AUTH_HEADERS.contains(&name.as_str()) {
            if holds_secret(value, credentials) {
                found.push(format!("secret_outside_auth: header {name}"));
            }
            continue;
        }
        auth_lines += 1;
        let scheme = value.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let secret = scheme.map_or(value.as_str(), |(_, secret)| secret.trim());
        match credentials.by_secret(secret) {
            Some(credential) if credential.provider == request.provider => {}
            Some(credential) => found.push(format!("foreign_secret: header {name} has credential {}", credential.id)),
            None => found.push(format!("unknown_secret: header {name}")),
        }
    }
    let (target, key) = without_key(request);
    if let Some(secret) = key {
        auth_lines += 1;
        match credentials.by_secret(secret) {
            Some(credential) if credential.provider == request.provider => {}
            Some(credential) => found.push(format!("foreign_secret: query key has credential {}", credential.id)),
            None => found.push("unknown_secret: query key".into()),
        }
    }
    if holds_secret(&target, credentials) {
        found.push("secret_outside_auth: path or query".into());
    }
    if auth_lines > 1 {
        found.push(format!("several_auth_headers: {auth_lines}"));
    }
}

/// Path and query without Google's `key`, which may hold a credential; and what that holds.
fn without_key<'a>(request: &Received<'a>) -> (String, Option<&'a str>) {
    let Some((path, query)) = request.target.split_once('?').filter(|_| request.provider == Provider::Gemini) else {
        return (request.target.to_owned(), None);
    };
    let (keys, others): (Vec<&str>, Vec<&str>) = query.split('&').partition(|pair| pair.starts_with("key="));
    (format!("{path}?{}", others.join("&")), keys.first().and_then(|pair| pair.strip_prefix("key=")))
}

fn holds_secret(text: &str, credentials: &Credentials) -> bool {
    credentials.iter().any(|credential| text.contains(&credential.secret))
        || SECRET_PREFIXES.iter().any(|prefix| looks_secret(text, prefix))
}

/// `prefix` at the start of a word, followed by at least sixteen characters that keys have.
fn looks_secret(text: &str, prefix: &str) -> bool {
    text.match_indices(prefix).any(|(at, _)| {
        let inside_word = text.get(..at).and_then(|before| before.chars().next_back()).is_some_and(char::is_alphanumeric);
        let rest = text.get(at + prefix.len()..).unwrap_or_default();
        let key = rest.bytes().take(16).filter(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte));
        !inside_word && key.count() == 16
    })
}

fn headers(request: &Received, found: &mut Vec<String>) {
    let lines = |wanted: &str| request.headers.iter().filter(|(name, _)| name == wanted).count();
    let lengths = lines("content-length");
    if lengths > 1 {
        found.push(format!("several_content_lengths: {lengths}"));
    }
    if lengths > 0 && lines("transfer-encoding") > 0 {
        found.push("length_and_transfer_encoding".into());
    }
    for (name, _) in request.headers {
        if name.starts_with("x-envoy-auth") || name.starts_with("x-keyward-") {
            found.push(format!("internal_header: {name}"));
        }
    }
}

/// The governed fields of a form, and its file, that occur more than once.
fn duplicate_fields(body: &[u8], boundary: &str) -> Vec<&'static str> {
    let fields = multipart::parse(body, boundary).unwrap_or_default();
    let times = |name: &&str| fields.iter().filter(|field| field.name == *name).count() > 1;
    GOVERNED.into_iter().chain(["file", "purpose"]).filter(times).collect()
}

/// The governed top-level keys that occur more than once, after unescaping. Reads the raw text: a parsed document has
/// lost the difference already.
pub fn duplicate_keys(body: &[u8]) -> Vec<&'static str> {
    let mut seen = [0_u32; GOVERNED.len()];
    let (mut depth, mut expects_key, mut at) = (0_u32, false, 0);
    while let Some(&byte) = body.get(at) {
        at += 1;
        match byte {
            b'{' | b'[' => {
                depth += 1;
                expects_key = depth == 1 && byte == b'{';
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => expects_key = depth == 1,
            b'"' => {
                let start = at - 1;
                at = string_end(body, at);
                if depth == 1 && expects_key {
                    expects_key = false;
                    let literal = body.get(start..at).unwrap_or_default();
                    let key: Option<String> = serde_json::from_slice(literal).ok();
                    let governed = GOVERNED.iter().position(|name| key.as_deref() == Some(name));
                    if let Some(count) = governed.and_then(|index| seen.get_mut(index)) {
                        *count += 1;
                    }
                }
            }
            _ => {}
        }
    }
    GOVERNED.iter().zip(seen).filter(|(_, count)| *count > 1).map(|(name, _)| *name).collect()
}

/// The position after the closing quote of a string whose first character stands at `at`.
fn string_end(body: &[u8], mut at: usize) -> usize {
    while let Some(step) = memchr::memchr2(b'"', b'\\', body.get(at..).unwrap_or_default()) {
        at += step;
        if body.get(at) == Some(&b'"') {
            return at + 1;
        }
        at += 2;
    }
    body.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    type Lines = &'static [(&'static str, &'static str)];

    const KEY: &str = "vk_0123456789";

    fn credentials() -> Result<Credentials, String> {
        let given = r#"[{"id":"o","provider":"openai","secret":"sk-open"},{"id":"c","provider":"anthropic","secret":"sk-ant-claude"}]"#;
        Credentials::new(serde_json::from_str(given).map_err(|error| error.to_string())?)
    }

    fn check(target: &str, headers: &[(&str, &str)], body: &str) -> Result<Vec<String>, String> {
        let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        let request = Received { provider: Provider::Openai, target, headers: &headers, body: body.as_bytes() };
        Ok(of(&request, &credentials()?))
    }

    #[test]
    fn a_proper_request_has_none() -> Result<(), String> {
        let headers = [("authorization", "Bearer sk-open"), ("content-length", "20"), ("x-request-id", "a-b")];
        let body = r#"{"model":"gpt-4o","messages":[{"model":1,"n":2}],"n":1,"stop":"task-1234567890123456789"}"#;
        assert_eq!(check("/v1/chat/completions", &headers, body)?, Vec::<String>::new());
        Ok(())
    }

    #[test]
    fn each_kind_is_found_where_it_stands() -> Result<(), String> {
        let cases: [(&str, Lines, &str, &str); 14] = [
            ("/", &[("x-a", KEY)], "", "virtual_key: header x-a"),
            ("/?key=vk_0123456789", &[], "", "virtual_key: path or query"),
            ("/", &[], "{\"user\":\"xvk_0123456789\"}", "virtual_key: body"),
            ("/", &[("x-api-key", "sk-ant-claude")], "", "foreign_secret: header x-api-key has credential c"),
            ("/", &[("authorization", "Bearer nobody")], "", "unknown_secret: header authorization"),
            ("/", &[("x-copy", "sk-open")], "", "secret_outside_auth: header x-copy"),
            ("/?k=sk-proj-abcdefghijklmnop", &[], "", "secret_outside_auth: path or query"),
            ("/", &[("authorization", "Bearer sk-open"), ("x-api-key", "sk-open")], "", "several_auth_headers: 2"),
            ("/", &[("content-length", "1"), ("content-length", "1")], "", "several_content_lengths: 2"),
            ("/", &[("content-length", "1"), ("transfer-encoding", "chunked")], "", "length_and_transfer_encoding"),
            ("/", &[("x-keyward-plan", "1")], "", "internal_header: x-keyward-plan"),
            ("/", &[("x-envoy-auth-partial", "1")], "", "internal_header: x-envoy-auth-partial"),
            ("/", &[], r#"{"model":"a","m":{"n":1,"n":2},"model":"b"}"#, "duplicate_key: model"),
            ("/", &[], r#"{"max_tokens":1,"x":["}",{}],"max_\u0074okens":2}"#, "duplicate_key: max_tokens"),
        ];
        for (target, headers, body, expected) in cases {
            assert_eq!(check(target, headers, body)?, [expected]);
        }
        Ok(())
    }

    #[test]
    fn a_key_in_the_query_is_google_s_alone_and_must_be_its_own() -> Result<(), String> {
        let given = r#"[{"id":"g","provider":"gemini","secret":"AIzaGoogle"},{"id":"z","provider":"azure","secret":"0123456789abcdef"}]"#;
        let credentials = Credentials::new(serde_json::from_str(given).map_err(|error| error.to_string())?)?;
        let check = |provider, target, headers: &[(&str, &str)]| {
            let headers: Vec<_> = headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
            of(&Received { provider, target, headers: &headers, body: b"" }, &credentials)
        };
        use Provider::{Azure, Gemini};
        assert_eq!(check(Gemini, "/?alt=sse&key=AIzaGoogle", &[]), Vec::<String>::new());
        assert_eq!(check(Gemini, "/", &[("x-goog-api-key", "AIzaGoogle")]), Vec::<String>::new());
        assert_eq!(check(Azure, "/", &[("api-key", "0123456789abcdef")]), Vec::<String>::new());
        assert_eq!(check(Gemini, "/?key=0123456789abcdef", &[]), ["foreign_secret: query key has credential z"]);
        assert_eq!(check(Gemini, "/?key=AIzaNobody", &[]), ["unknown_secret: query key"]);
        assert_eq!(check(Gemini, "/?key=AIzaGoogle", &[("x-goog-api-key", "AIzaGoogle")]), ["several_auth_headers: 2"]);
        assert_eq!(check(Gemini, "/?k=AIzaGoogle", &[]), ["secret_outside_auth: path or query"]);
        assert_eq!(check(Azure, "/?key=AIzaGoogle", &[]), ["secret_outside_auth: path or query"]);
        assert_eq!(check(Azure, "/", &[("api-key", "AIzaGoogle")]), ["foreign_secret: header api-key has credential g"]);
        let virtual_key = check(Gemini, "/?key=vk_0123456789", &[]);
        assert_eq!(virtual_key, ["virtual_key: path or query", "unknown_secret: query key"]);
        Ok(())
    }

    #[test]
    fn a_form_is_read_by_its_fields_and_what_is_in_a_file_is_no_key() -> Result<(), String> {
        let part = |head: &str, data: &str| format!("--b\r\nContent-Disposition: form-data; {head}\r\n\r\n{data}\r\n");
        let file = part("name=\"file\"; filename=\"a.jsonl\"", "{\"model\":1}\n{\"model\":1}");
        let kind = [("content-type", "multipart/form-data; boundary=b")];
        assert_eq!(check("/", &kind, &format!("{file}--b--"))?, Vec::<String>::new());
        let model = part("name=\"model\"", "whisper-1");
        assert_eq!(check("/", &kind, &format!("{model}{file}{model}--b--"))?, ["duplicate_key: model"]);
        Ok(())
    }

    #[test]
    fn nine_characters_are_no_key_and_broken_json_no_trouble() -> Result<(), String> {
        assert_eq!(check("/", &[("x-a", "vk_012345678")], "{\"model\":\"a\\")?, Vec::<String>::new());
        assert_eq!(duplicate_keys(b"]]}{\"n\":1,\"n\":"), ["n"]);
        Ok(())
    }
}
