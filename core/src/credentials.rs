//! Where a request may carry credentials: every scheme an SDK uses. All of them are looked at, and none goes on.

use crate::gate::Headers;
use crate::token::{PREFIX, VirtualKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// Said of unknown and of malformed keys alike.
pub const UNKNOWN_KEY: &str = "this virtual key is not known";

/// Headers that carry a credential.
pub const CREDENTIAL_HEADERS: [&str; 8] = [
    "authorization",
    "proxy-authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "x-shopify-access-token",
    "x-postmark-server-token",
    "x-postmark-account-token",
];

/// Headers that change who is billed, or carry a session of somebody else.
pub const STEERING_HEADERS: [&str; 11] = [
    "cookie",
    "openai-organization",
    "openai-project",
    "x-goog-user-project",
    "stripe-account",
    "stripe-context",
    // No SDK of ours sends these; what stands in them is a credential of something else.
    "x-auth-token",
    "x-access-token",
    "x-forwarded-authorization",
    "x-original-authorization",
    "x-amz-security-token",
];

/// Headers that tell about the caller's network. Envoy's router needs some of them, so only the attempt takes them out.
pub const NETWORK_HEADERS: [&str; 6] = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-real-ip", "forwarded", "via"];

/// Prefixes of headers by which a client could steer Envoy or Keyward.
pub const STEERING_PREFIXES: [&str; 2] = ["x-envoy-", "x-keyward-"];

/// Whether an inbound header must not reach the provider: by its name, or because a virtual key stands in it.
pub fn is_stripped(name: &[u8], value: &[u8]) -> bool {
    let Ok(name) = std::str::from_utf8(name) else { return true };
    if name.starts_with(':') {
        return false;
    }
    let named =
        CREDENTIAL_HEADERS.contains(&name) || STEERING_HEADERS.contains(&name) || STEERING_PREFIXES.iter().any(|p| name.starts_with(p));
    named || value.windows(PREFIX.len()).any(|w| w == PREFIX.as_bytes())
}

#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    Key(VirtualKey),
    /// A credential, but no virtual key that could have been issued.
    Malformed,
    Several,
}

/// Finds the virtual key in the headers and the query (`?key=`).
pub fn find(headers: &Headers<'_>, query: &[u8]) -> Found {
    let mut candidates: Vec<Vec<u8>> = Vec::new();
    let in_headers = headers.iter().filter(|(name, _)| CREDENTIAL_HEADERS.iter().any(|h| h.as_bytes() == *name));
    for (_, value) in in_headers {
        candidates.extend(in_value(value));
    }
    candidates.extend(query.split(|&b| b == b'&').filter_map(|pair| pair.strip_prefix(b"key=")).map(<[u8]>::to_vec));
    candidates.retain(|candidate| !candidate.is_empty());

    let mut virtual_keys: Vec<&Vec<u8>> = candidates.iter().filter(|c| c.starts_with(PREFIX.as_bytes())).collect();
    virtual_keys.sort();
    virtual_keys.dedup();
    match virtual_keys.as_slice() {
        [] if candidates.is_empty() => Found::Nothing,
        [] => Found::Malformed,
        [one] => std::str::from_utf8(one).ok().and_then(VirtualKey::parse).map_or(Found::Malformed, Found::Key),
        _ => Found::Several,
    }
}

/// The credentials in one header value: bare, after `Bearer`, or user and password of `Basic`.
fn in_value(value: &[u8]) -> Vec<Vec<u8>> {
    let value = value.trim_ascii();
    let (scheme, rest) =
        value.iter().position(|&b| b == b' ').map_or((value, None), |at| (value.get(..at).unwrap_or_default(), value.get(at + 1..)));
    match rest.map(<[u8]>::trim_ascii) {
        Some(token) if scheme.eq_ignore_ascii_case(b"bearer") => vec![token.to_vec()],
        Some(encoded) if scheme.eq_ignore_ascii_case(b"basic") => {
            let decoded = STANDARD.decode(encoded).unwrap_or_default();
            let colon = decoded.iter().position(|&b| b == b':');
            match colon.and_then(|at| decoded.split_at_checked(at)) {
                Some((user, password)) => vec![user.to_vec(), password.get(1..).unwrap_or_default().to_vec()],
                None => vec![encoded.to_vec()],
            }
        }
        _ => vec![value.to_vec()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn headers<'a>(list: &[(&'a str, &'a [u8])]) -> Vec<(&'a [u8], &'a [u8])> {
        list.iter().map(|(n, v)| (n.as_bytes(), *v)).collect()
    }

    #[test]
    fn every_scheme_is_read() {
        let key = VirtualKey::generate([5; 32]);
        let token = key.reveal();
        let basic = |text: String| format!("Basic {}", STANDARD.encode(text));
        for (name, value) in [
            ("authorization", format!("Bearer {token}")),
            ("authorization", format!("bearer  {token}")),
            ("authorization", token.to_owned()),
            ("authorization", basic(format!("{token}:"))),
            ("authorization", basic(format!("ACxx:{token}"))),
            ("x-api-key", token.to_owned()),
            ("api-key", token.to_owned()),
            ("x-goog-api-key", token.to_owned()),
            ("x-postmark-server-token", token.to_owned()),
        ] {
            assert_eq!(find(&headers(&[(name, value.as_bytes())]), b""), Found::Key(key.clone()), "{name}: {value}");
        }
        assert_eq!(find(&[], format!("a=b&key={token}").as_bytes()), Found::Key(key));
    }

    #[test]
    fn what_must_not_go_on_is_told_by_name_and_by_content() {
        for (name, value) in [
            ("authorization", ""),
            ("x-envoy-max-retries", "3"),
            ("cookie", "a=b"),
            ("referer", "http://x/?key=vk_abc"),
            ("x-auth-token", "t"),
        ] {
            assert!(is_stripped(name.as_bytes(), value.as_bytes()), "{name}: {value}");
        }
        for (name, value) in [("user-agent", "curl"), ("openai-beta", "x"), (":path", "/v1/x?key=vk_abc")] {
            assert!(!is_stripped(name.as_bytes(), value.as_bytes()), "{name}: {value}");
        }
    }

    #[test]
    fn two_keys_no_key_and_garbage() {
        let [a, b] = [1, 2].map(|n| VirtualKey::generate([n; 32]));
        let bearer = format!("Bearer {}", a.reveal());
        let both = headers(&[("authorization", bearer.as_bytes()), ("x-api-key", b.reveal().as_bytes())]);
        assert_eq!(find(&both, b""), Found::Several);
        let same = headers(&[("authorization", bearer.as_bytes()), ("x-api-key", a.reveal().as_bytes())]);
        assert_eq!(find(&same, b""), Found::Key(a.clone()));
        assert_eq!(find(&headers(&[("x-other", b"vk_")]), b"q=1"), Found::Nothing);
        for garbage in [&b"Bearer sk-real"[..], b"Bearer vk_x", b"vk_\xff\xfe", b"Basic !!!", b"Basic", b"Bearer"] {
            assert_eq!(find(&headers(&[("authorization", garbage)]), b""), Found::Malformed, "{garbage:?}");
        }
        assert_eq!(find(&headers(&[("authorization", b"")]), b""), Found::Nothing);
    }
}
