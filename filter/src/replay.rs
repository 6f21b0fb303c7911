//! Rotation without an upstream filter (`rotation: callout`): the gate itself puts the credential into the first try, which goes
//! the router's way, and sends every further one as a callout with the body that it has kept. Such an answer comes whole.

use crate::host::{self, Buffer, Map};
use crate::vm::Vm;
use keyward_core::attempt::RequestEdits;
use std::time::Duration;

/// Headers that belong to one connection, or that Envoy writes itself.
const OF_THE_CONNECTION: [&str; 10] = [
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-request-id",
];

/// A request as it goes to the provider, kept for further tries.
pub struct Replay {
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// The callout that is awaited.
    token: Option<u32>,
    /// Bytes that count as kept.
    kept: u64,
}

impl Replay {
    /// Keeps the request in hand, whose body has `length` bytes. `None`: it can't be sent again, for its size or its headers.
    pub fn keep(vm: &Vm, length: u64) -> Option<Self> {
        let map = host::headers(Map::RequestHeaders);
        let text = |(name, value): &(&[u8], &[u8])| Some((String::from_utf8(name.to_vec()).ok()?, String::from_utf8(value.to_vec()).ok()?));
        let headers = map.pairs().iter().map(text).collect::<Option<Vec<_>>>()?;
        if !vm.keep(length) {
            return None;
        }
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        let body = if size == 0 { Some(Vec::new()) } else { host::buffer(Buffer::RequestBody, 0, size) };
        let Some(body) = body.filter(|body| body.len() == size) else {
            vm.let_go(length);
            return None;
        };
        Some(Replay { headers, body, token: None, kept: length })
    }

    /// The headers of the last try.
    pub fn pairs(&self) -> Vec<(&[u8], &[u8])> {
        self.headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect()
    }

    /// Makes the headers those of a try.
    pub fn write(&mut self, edits: &RequestEdits) {
        let goes = |name: &str| {
            OF_THE_CONNECTION.contains(&name)
                || edits.remove.iter().any(|other| other == name.as_bytes())
                || edits.set.iter().any(|(other, _)| *other == name)
        };
        self.headers.retain(|(name, _)| !goes(name) && name != ":scheme");
        // The listener's own scheme is none of the provider's business.
        self.headers.push((":scheme".to_owned(), "https".to_owned()));
        self.headers.extend(edits.set.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())));
    }

    /// The body as it was kept.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// Sends the try to a cluster, with this body if it is not the one that was kept. `false`: it could not be sent.
    pub fn send(&mut self, cluster: &str, body: &[u8], timeout: Duration) -> bool {
        let body = if body.is_empty() { &self.body } else { body };
        let headers = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.token = host::call(cluster, headers, body, timeout);
        self.token.is_some()
    }

    /// Whether this callout is the one that is awaited; it is no more.
    pub fn answered(&mut self, token: u32) -> bool {
        self.token.take_if(|awaited| *awaited == token).is_some()
    }

    /// Nothing is sent any more.
    pub fn let_go(self, vm: &Vm) {
        vm.let_go(self.kept);
    }
}

/// Whether a header of a callout's answer belongs to that answer alone.
pub fn is_of_the_connection(name: &[u8]) -> bool {
    name.starts_with(b":") || OF_THE_CONNECTION.iter().any(|other| other.as_bytes() == name && *other != "x-request-id")
}
