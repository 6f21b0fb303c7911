//! Virtual keys: `token::VirtualKey::parse`, and `credentials::find` wherever a request may carry one.
#![no_main]

use keyward_core::credentials::{Found, find, is_stripped};
use keyward_core::token::VirtualKey;
use keyward_core::trace::TraceContext;
use keyward_fuzz::{headers, input, lines};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((_, _, body)) = input(data) else { return };
    if let Ok(text) = std::str::from_utf8(body) {
        check(text);
    }
    let (head, query) = lines(body);
    let headers = headers(&head);
    if let Found::Key(key) = find(&headers, query) {
        // A key that is taken is in a place from which it is taken out. Only users and passwords are encoded.
        let in_query = query.windows(key.reveal().len()).any(|text| text == key.reveal().as_bytes());
        assert!(in_query || headers.iter().any(|(name, value)| is_stripped(name, value)));
        check(key.reveal());
    }
    if let Some(context) = TraceContext::of(&headers) {
        let again = TraceContext::parse(&context.traceparent()).map(|again| again.traceparent());
        assert_eq!(again, Some(context.traceparent()));
    }
    if let Some(entropy) = body.first_chunk::<32>() {
        let key = VirtualKey::generate(*entropy);
        assert!(VirtualKey::parse(key.reveal()) == Some(key));
    }
});

fn check(text: &str) {
    if let Some(key) = VirtualKey::parse(text) {
        assert_eq!(key.reveal(), text);
        assert!(text.len() == 52 && text.is_ascii());
    }
}
