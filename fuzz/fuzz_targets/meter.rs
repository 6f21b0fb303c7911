//! `meter::Meter`: what is measured and what passes does not depend on the cuts; of a stream only whole events are withheld, and words of
//! ours stand between events.
#![no_main]

use keyward_core::meter::{Measured, Meter, Passed};
use keyward_core::operation::Tells;
use keyward_core::usage::Looks;
use keyward_fuzz::input;
use libfuzzer_sys::fuzz_target;

const TELLS: [Tells; 6] = [Tells::Nothing, Tells::Completion, Tells::Prompt, Tells::Input, Tells::Anthropic, Tells::Gemini];
const WORDS: &[u8] = b"data: broken off\n\n";

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let kind = choices.of(&["text/event-stream", "application/json", "text/event-stream; charset=utf-8", "text/plain"]);
    let (withhold, ids, tells) = (choices.flag(), choices.flag(), choices.of(&TELLS));
    let room = choices.of(&[usize::MAX, 200, 0]);
    let break_at = choices.number(64) as usize;
    let meter = || Meter::new(kind.as_bytes(), false, withhold, Looks { tells, ids });

    let (measured, passed) = run(meter(), [body], room);
    let (measured_cut, passed_cut) = run(meter(), cuts.pieces(body), room);
    assert_eq!(measured, measured_cut, "the measure depends on where it is cut");
    assert!(passed == passed_cut, "{}\n--- or, cut\n{}", passed.escape_ascii(), passed_cut.escape_ascii());
    if !withhold || !kind.starts_with("text/event") {
        assert!(passed == body, "{}", passed.escape_ascii());
        assert!(!meter().rewrites());
    } else {
        check_withheld(body, &passed);
    }
    if meter().has_events() {
        let whole = measured.clone();
        break_off(meter(), cuts.pieces(body), break_at, room, &whole);
    }
});

fn run<'a>(mut meter: Meter, pieces: impl IntoIterator<Item = &'a [u8]>, room: usize) -> (Measured, Vec<u8>) {
    let mut out = Vec::new();
    for piece in pieces {
        pass(meter.piece(piece, false, room), piece, &mut out);
        assert!(meter.held() <= room.min(64 << 10));
        let _ = (meter.exceeds(0), meter.exceeds(u64::MAX));
    }
    pass(meter.piece(b"", true, room), b"", &mut out);
    assert_eq!(meter.held(), 0, "something stays behind");
    (meter.finish(), out)
}

fn pass(passed: Passed, piece: &[u8], out: &mut Vec<u8>) {
    match passed {
        Passed::AsIs => out.extend_from_slice(piece),
        Passed::Instead(other) => out.extend_from_slice(&other),
    }
}

/// A stream's events, each with the line ends that close it. A line feed behind the carriage return that closed one belongs to the next:
/// the closing byte has gone on by then.
fn events(body: &[u8]) -> Vec<&[u8]> {
    let (mut events, mut begun, mut is_blank, mut after_cr) = (Vec::new(), 0, true, false);
    for (at, &byte) in body.iter().enumerate() {
        let is_second = std::mem::replace(&mut after_cr, byte == b'\r') && byte == b'\n';
        if is_second {
            continue;
        }
        if matches!(byte, b'\n' | b'\r') {
            if is_blank {
                events.push(&body[begun..=at]);
                begun = at + 1;
            }
            is_blank = true;
        } else {
            is_blank = false;
        }
    }
    events.push(&body[begun..]);
    events
}

/// What passed is the body without some of its events, and those told usage.
fn check_withheld(body: &[u8], passed: &[u8]) {
    let mut rest = passed;
    for event in events(body) {
        match rest.strip_prefix(event) {
            Some(tail) => rest = tail,
            // A key may be written with escapes.
            None => assert!(event.windows(5).any(|word| word == b"usage") || event.contains(&b'\\'), "{}", event.escape_ascii()),
        }
    }
    assert!(rest.is_empty(), "{}", rest.escape_ascii());
}

/// Breaks a stream off after some pieces.
fn break_off<'a>(mut meter: Meter, pieces: impl Iterator<Item = &'a [u8]>, at: usize, room: usize, whole: &Measured) {
    let (mut out, mut words) = (Vec::new(), Some(WORDS.to_vec()));
    for (number, piece) in pieces.enumerate() {
        let is_over = words.is_none();
        let before = out.len();
        match number < at {
            true => pass(meter.piece(piece, false, room), piece, &mut out),
            false => pass(meter.last_piece(piece, &mut words), piece, &mut out),
        }
        assert!(!is_over || out.len() == before, "more after the last words");
    }
    if words.is_none() {
        let shown = out.strip_suffix(WORDS).unwrap_or_else(|| panic!("no words: {}", out.escape_ascii()));
        let last = events(shown).pop().unwrap_or_default();
        assert!(last.is_empty() || last == b"\n", "in the middle of an event: {}", out.escape_ascii());
    }
    assert_eq!(meter.finish(), *whole, "what is not shown was made all the same");
}
