//! `operation::find`: a path that goes on is put together from checked parts, leads to the same operation when it is looked up again, and
//! stays inside the provider's API.
#![no_main]

use keyward_core::operation::{OTHER, PROVIDERS, find, is_id, upstream};
use keyward_core::token::PREFIX;
use keyward_fuzz::{input, lines};
use libfuzzer_sys::fuzz_target;

const METHODS: [&str; 7] = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", ""];

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, _, body)) = input(data) else { return };
    let (method, anthropic_version, stream) = (choices.of(&METHODS), choices.flag(), choices.flag());
    let model = choices.of(&[None, Some("gpt-4.1"), Some("../a?b=c#d e\u{e9}"), Some("..")]);
    let (head, query) = lines(body);
    let Some(Ok(path)) = head.first().map(|line| std::str::from_utf8(line)) else { return };
    let Ok(target) = find(method, path, query, anthropic_version) else { return };

    check_path(&target.path, "/v1/");
    assert!(!target.endpoint().contains(PREFIX) && !target.endpoint().contains('?'));
    if target.operation != &OTHER {
        assert!(target.refs.iter().all(|id| is_id(id)));
    }
    let (own, query) = target.path.split_once('?').unwrap_or((&target.path, ""));
    let full = target.provider.as_ref().map_or_else(|| own.to_owned(), |provider| format!("/{provider}{own}"));
    let again = find(method, &full, query.as_bytes(), anthropic_version).expect("what goes on is well formed");
    assert_eq!(again, target);
    for provider in &PROVIDERS {
        let mut site = provider.site();
        for version in [None, Some("2026-01-01".to_owned())] {
            site.api_version = version;
            if let Some(there) = upstream(&target, &site, model, stream) {
                // Azure has a place of its own, as far as it speaks OpenAI's dialect.
                let place = if there.path.starts_with("/openai/") && site.api_version.is_some() { "/openai/" } else { &site.base };
                check_path(&there.path, place);
            }
        }
    }
});

/// Printable ASCII without a fragment, one question mark at most, no step up, no empty segment, no virtual key.
fn check_path(path: &str, place: &str) {
    let (own, query) = path.split_once('?').unwrap_or((path, ""));
    assert!(path.starts_with(place), "{path} is not in {place}");
    assert!(path.bytes().all(|byte| byte.is_ascii_graphic() && !b"#\\\"<>`{}|^".contains(&byte)), "{path}");
    assert!(!query.contains('?') && !path.contains(PREFIX), "{path}");
    assert!(own.split('/').skip(1).all(|segment| !segment.is_empty() && segment != "." && segment != ".."), "{path}");
}
