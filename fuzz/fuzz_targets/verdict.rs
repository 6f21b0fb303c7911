//! `verdict`: any headers and body of a provider give a verdict that ends, or none.
#![no_main]

use keyward_core::verdict::{needs_body, room, verdict};
use keyward_fuzz::{headers, input, lines};
use libfuzzer_sys::fuzz_target;

const DAY: u64 = 24 * 60 * 60 * 1_000;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let status = choices.of(&[400, 401, 402, 403, 404, 429, 500, 503, 529, 200]);
    // Now, 1970 and the end of 9999.
    let now_ms = choices.of(&[1_795_176_000_000, 0, 253_402_300_799_000]);
    let (head, body) = lines(body);
    let headers = headers(&head);
    let _ = room(&headers, now_ms);
    // What is read of a body may be cut anywhere.
    for body in [body, cuts.pieces(body).next().unwrap_or_default()] {
        let Some(said) = verdict(status, &headers, body, now_ms) else { continue };
        assert!(said.wait_ms <= DAY, "{said:?}");
        assert!(status >= 400, "{said:?} of {status}");
        assert!(needs_body(status) || matches!(status, 503 | 529));
    }
});
