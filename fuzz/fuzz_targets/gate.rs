//! The gate's first three stages with whatever a caller may send: headers, then the body in pieces, then the question to the service.
#![no_main]

use keyward_core::edge::{AdmitRequest, RequestId, VmId};
use keyward_core::gate::{Limits, request_headers};
use keyward_core::token::VirtualKey;
use keyward_fuzz::{Cuts, assert_json, headers, input, lines};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { max_body_bytes: 4_096 };

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let method = choices.of(&["POST", "GET", "DELETE", ""]);
    let (head, body) = lines(body);
    let key = VirtualKey::generate([7; 32]);
    let bearer = format!("Bearer {}", key.reveal());
    let mut all = headers(&head);
    // Most requests bring a key: without one, nothing more would be read.
    if !choices.flag() {
        all.push((b"authorization", bearer.as_bytes()));
    }
    all.push((b":method", method.as_bytes()));
    all.push((b":path", head.first().copied().unwrap_or_default()));
    let whole = ask(&all, &[body]);
    assert_eq!(whole, ask(&all, &pieces(cuts, body)), "it depends on where it is cut");
    if let Ok(asked) = whole {
        let written = serde_json::to_string(&asked).expect("a question can be written");
        assert!(!asked.ask.endpoint.contains("vk_"), "a key in {written}");
        assert_eq!(serde_json::from_str::<AdmitRequest>(&written).ok(), Some(asked));
    }
});

fn pieces(cuts: Cuts, body: &[u8]) -> Vec<&[u8]> {
    cuts.pieces(body).collect()
}

/// The question, or the code of the refusal.
fn ask(headers: &[(&[u8], &[u8])], pieces: &[&[u8]]) -> Result<AdmitRequest, keyward_core::refusal::Code> {
    let asked = request_headers(headers, LIMITS, RequestId([9; 16])).and_then(|mut reading| {
        pieces.iter().try_for_each(|piece| reading.piece(piece))?;
        reading.end()
    });
    asked.map(|asking| asking.admit_request(VmId([1; 16]), "node".to_owned(), true)).map_err(|refused| {
        assert_json(refused.answer().body.as_bytes());
        refused.refusal.code
    })
}
