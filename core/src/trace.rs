//! W3C Trace Context: told as it came, read strictly, never made up.

use crate::gate::Headers;
use crate::hex;

/// The caller's place in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    trace: [u8; 16],
    span: [u8; 8],
    flags: u8,
}

impl TraceContext {
    /// What a request's headers say. `None`: nothing, two different things, or something that is no `traceparent`.
    pub fn of(headers: &Headers<'_>) -> Option<Self> {
        let mut parents = headers.iter().filter(|(name, _)| *name == b"traceparent").map(|(_, value)| *value);
        let parent = parents.next().filter(|_| parents.next().is_none())?;
        Self::parse(std::str::from_utf8(parent).ok()?)
    }

    /// Reads a `traceparent`: version, trace id, span id, flags, in lower-case hex. Of a version after 00 only these count.
    pub fn parse(parent: &str) -> Option<Self> {
        let mut parts = parent.splitn(5, '-');
        let [version] = hex::decode(parts.next()?)?;
        let (trace, span) = (hex::decode(parts.next()?)?, hex::decode(parts.next()?)?);
        let [flags] = hex::decode(parts.next()?)?;
        let context = TraceContext { trace, span, flags };
        let ends = parts.next().is_none() || version > 0;
        (version != 0xff && ends && context.trace != [0; 16] && context.span != [0; 8]).then_some(context)
    }

    /// As a header's value, in version 00.
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-{:02x}", self.trace_id(), self.span_id(), self.flags)
    }

    /// 32 hex digits.
    pub fn trace_id(&self) -> String {
        hex::encode(&self.trace)
    }

    /// The caller's span, 16 hex digits.
    pub fn span_id(&self) -> String {
        hex::encode(&self.span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn of(headers: &[(&str, &str)]) -> Option<TraceContext> {
        let headers: Vec<(&[u8], &[u8])> = headers.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())).collect();
        TraceContext::of(&headers)
    }

    #[test]
    fn a_context_is_passed_on_as_it_came() {
        let context = of(&[("traceparent", PARENT), ("tracestate", "a=1")]).unwrap();
        assert_eq!(context.traceparent(), PARENT);
        assert_eq!((context.trace_id().as_str(), context.span_id().as_str()), (&PARENT[3..35], &PARENT[36..52]));
        let newer = of(&[("traceparent", &format!("cc{}-what-comes", &PARENT[2..]))]).unwrap();
        assert_eq!(newer.traceparent(), PARENT, "of a later version what this one knows");
    }

    #[test]
    fn what_is_no_context_is_none() {
        let bad = [
            "",
            "00",
            &PARENT[..54],
            &format!("{PARENT}-more"),
            &PARENT.to_uppercase(),
            &PARENT.replace("00-", "ff-"),
            &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &PARENT.replace("b7ad6b7169203331", &"0".repeat(16)),
            &PARENT.replace('-', "_"),
            &PARENT.replace("0af7", "0Af7"),
            &format!(" {PARENT}"),
        ];
        for parent in bad {
            assert_eq!(of(&[("traceparent", parent)]), None, "{parent}");
        }
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("tracestate", "a=1")]), None);
        assert_eq!(of(&[("traceparent", PARENT), ("traceparent", PARENT)]), None, "two are not one");
    }
}
