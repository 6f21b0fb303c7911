//! `translate::answer::whole`, `embeddings` and `error`: JSON for the caller, or the word that the provider's answer can't be read.
#![no_main]

use keyward_core::translate::answer::{Terms, embeddings, error, whole};
use keyward_fuzz::{CALLERS, PROVIDERS, assert_json, input};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, _, body)) = input(data) else { return };
    let terms = Terms {
        from: choices.of(&PROVIDERS),
        to: choices.of(&CALLERS),
        include_usage: false,
        base64: choices.flag(),
        model: choices.of(&["the-model", "a\"b\\c\u{e9}"]).to_owned(),
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        created: 1_795_176_000,
    };
    let status = choices.of(&[200, 400, 401, 403, 404, 413, 429, 500, 503, 529, 0, u16::MAX]);
    for told in [whole(body, &terms), embeddings(body, &terms)].into_iter().flatten() {
        assert_json(told.as_bytes());
    }
    let (status, told) = error(status, body, &terms);
    assert!((400..600).contains(&status) && status != 401, "{status}");
    assert_json(told.as_bytes());
});
