//! `translate::answer::Stream`: any bytes of a provider in any pieces give the caller whole events and an end, and little is kept.
#![no_main]

use keyward_core::translate::answer::{Stream, Terms};
use keyward_fuzz::{CALLERS, PROVIDERS, assert_stream, input};
use libfuzzer_sys::fuzz_target;

/// What may be kept beside the event in hand, and what the ids and names of a call may add to that before it is sent on.
const HELD: usize = (64 << 10) + 4_096;
/// Larger bodies are not repeated: it would take too long.
const MAX_REPEATED: usize = 2_048;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let terms = Terms {
        from: choices.of(&PROVIDERS),
        to: choices.of(&CALLERS),
        include_usage: choices.flag(),
        base64: false,
        model: "the-model".to_owned(),
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        created: 1_795_176_000,
    };
    // Now and then much of the same, to come to the limits of what is kept.
    let times = if choices.number(64) == 63 && body.len() <= MAX_REPEATED { 40 } else { 1 };
    let body = if times > 1 { [body, b"\n\n"].concat().repeat(times) } else { body.to_vec() };
    let event = body.len() / times;

    let whole = told(&terms, event, [body.as_slice()]);
    assert_stream(&whole, terms.to);
    let cut = told(&terms, event, cuts.pieces(&body));
    assert!(whole == cut, "{}\n--- or, cut\n{}", String::from_utf8_lossy(&whole), String::from_utf8_lossy(&cut));
});

fn told<'a>(terms: &Terms, event: usize, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let (mut stream, mut out) = (Stream::new(terms.clone()), Vec::new());
    for piece in pieces {
        stream.piece(piece, &mut out);
        assert!(stream.held() <= HELD + event, "{} bytes are kept", stream.held());
    }
    stream.end(&mut out);
    let len = out.len();
    stream.end(&mut out);
    assert_eq!((stream.held(), out.len()), (0, len), "a stream that is over is over");
    out
}
