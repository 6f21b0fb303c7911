//! The attempt: one try at a provider. It overwrites everything by which a provider tells callers apart, each time anew,
//! because all tries of a request share one set of headers.

use crate::credentials::{CREDENTIAL_HEADERS, NETWORK_HEADERS};
use crate::edge::Try;
use crate::gate::{Headers, Permit, header};
use crate::operation::AuthScheme;
use std::borrow::Cow;

/// A permitted request on its way: the permit, and what became of its tries.
#[derive(Debug)]
pub struct Flight {
    permit: Permit,
    tries: Vec<Running>,
    answer: Option<AnswerHead>,
}

/// What the gate needs to know of the headers of a provider's answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerHead {
    pub status: u16,
    pub content_type: Vec<u8>,
    /// The body is in an encoding that can't be read.
    pub encoded: bool,
}

/// Answer headers that tell which account paid, or bind the caller to it.
const ACCOUNT_HEADERS: [&str; 4] = ["set-cookie", "openai-organization", "openai-project", "anthropic-organization-id"];

#[derive(Debug)]
struct Running {
    credential: String,
    status: Option<u16>,
    started_ms: u64,
    /// Milliseconds until the headers of the answer.
    answered_ms: Option<u64>,
    /// The connection never came about: the provider saw nothing.
    never_sent: bool,
}

/// Request headers of one try.
#[derive(Debug, PartialEq, Eq)]
pub struct RequestEdits {
    /// Names of headers that must go, of those that are there.
    pub remove: Vec<Vec<u8>>,
    pub set: Vec<(&'static str, Cow<'static, str>)>,
}

impl Flight {
    pub fn new(permit: Permit) -> Self {
        Flight { permit, tries: Vec::new(), answer: None }
    }

    /// Begins a try on a request with these headers. `None` when no usable credential is left: then nothing may be sent.
    pub fn begin(&mut self, headers: &Headers<'_>, now_ms: u64) -> Option<RequestEdits> {
        let target = self.permit.target();
        let credential = self.permit.plan().targets.first()?.credentials.first()?;
        let auth = match target.provider.auth {
            AuthScheme::Bearer => ("authorization", ["Bearer ", &credential.secret.0].concat()),
            AuthScheme::Header(name) => (name, credential.secret.0.clone()),
        };
        // Whatever tells callers apart, or told them apart in an earlier try, goes.
        let goes =
            |name: &[u8]| CREDENTIAL_HEADERS.iter().chain(&NETWORK_HEADERS).any(|other| other.as_bytes() == name && *other != auth.0);
        let remove =
            headers.iter().filter(|(name, _)| goes(name) || name.starts_with(b"x-envoy-")).map(|(name, _)| name.to_vec()).collect();
        let mut set = Vec::with_capacity(6);
        set.extend([
            (":authority", Cow::Borrowed(target.provider.host)),
            (":path", target.path.to_string().into()),
            ("accept-encoding", "identity".into()),
            // The id under which the audit chain has this request; OpenAI documents the header for exactly that.
            ("x-client-request-id", self.permit.id().to_string().into()),
        ]);
        if let Some(content_type) = self.permit.content_type() {
            set.push(("content-type", content_type.to_owned().into()));
        }
        set.retain(|(name, value)| header(headers, name) != Some(value.as_bytes()));
        set.push((auth.0, auth.1.into()));
        let edits = RequestEdits { remove, set };
        self.tries.push(Running {
            credential: credential.id.clone(),
            status: None,
            started_ms: now_ms,
            answered_ms: None,
            never_sent: false,
        });
        Some(edits)
    }

    /// The provider answered the last try with these headers. Returns the names of those that don't go on: they repeat the
    /// credential, or tell whose it is.
    pub fn answered(&mut self, headers: &Headers<'_>, now_ms: u64) -> Vec<Vec<u8>> {
        let status = header(headers, ":status").and_then(|s| std::str::from_utf8(s).ok()?.parse().ok());
        if let Some(last) = self.tries.last_mut() {
            last.status = status;
            last.answered_ms = Some(now_ms.saturating_sub(last.started_ms));
        }
        self.answer = Some(AnswerHead {
            status: status.unwrap_or(0),
            content_type: header(headers, "content-type").unwrap_or_default().to_vec(),
            encoded: header(headers, "content-encoding").is_some_and(|e| !e.eq_ignore_ascii_case(b"identity")),
        });
        let secrets: Vec<&[u8]> = self.permit.plan().targets.iter().flat_map(|t| &t.credentials).map(|c| c.secret.0.as_bytes()).collect();
        let repeats = |value: &[u8]| secrets.iter().any(|s| !s.is_empty() && value.windows(s.len()).any(|w| w == *s));
        let tells = |name: &[u8]| ACCOUNT_HEADERS.iter().any(|other| other.as_bytes() == name);
        headers.iter().filter(|(name, value)| tells(name) || repeats(value)).map(|(name, _)| name.to_vec()).collect()
    }

    /// The head of the last try's answer, once: `None` means that the answer in hand is not the provider's.
    pub fn hand_over(&mut self) -> Option<AnswerHead> {
        self.answer.take()
    }

    /// The last try's connection never came about.
    pub fn never_connected(&mut self) {
        if let Some(last) = self.tries.last_mut() {
            last.never_sent = true;
        }
    }

    /// Whether an attempt saw the headers of an answer.
    pub fn was_answered(&self) -> bool {
        self.tries.iter().any(|t| t.status.is_some())
    }

    pub fn may_have_been_sent(&self) -> bool {
        self.tries.iter().any(|t| !t.never_sent)
    }

    /// The provider's last status.
    pub fn status(&self) -> Option<u16> {
        self.tries.last().and_then(|t| t.status)
    }

    /// The tries for the record; one that was never answered lasted until `end_ms`, counted from the request's start.
    pub fn tries(&self, end_ms: u64) -> Vec<Try> {
        let record = |t: &Running| Try { credential: t.credential.clone(), status: t.status, ms: t.answered_ms.unwrap_or(end_ms) };
        self.tries.iter().map(record).collect()
    }
}
