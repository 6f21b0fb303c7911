//! What travels between gate and service: records, and the documents of the edge API.
#![no_main]

use keyward_core::edge::{AdmitAnswer, AdmitRequest, EdgeKey, News, Record, RequestId, SettleAnswer, Settlement};
use keyward_core::questions::{Question, Questions};
use keyward_core::watch::WatchAnswer;
use keyward_fuzz::input;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, _, body)) = input(data) else { return };
    match choices.number(8) {
        0 => record(body),
        1 => document::<AdmitRequest>(body),
        2 => document::<AdmitAnswer>(body),
        3 => document::<News>(body),
        4 => document::<Settlement>(body),
        5 => document::<WatchAnswer>(body),
        6 => answers(body),
        _ => document::<SettleAnswer>(body),
    }
});

fn record(body: &[u8]) {
    let Ok(line) = std::str::from_utf8(body) else { return };
    if let Some(id) = RequestId::parse(line) {
        assert_eq!(RequestId::parse(&id.to_string()), Some(id));
    }
    let Some(record) = Record::parse(line) else { return };
    assert_eq!(record.line(), line, "two forms of one record");
    assert_eq!(record.open(&EdgeKey([7; 32])), None, "nobody guesses a MAC");
}

/// Whatever the answer to a batch of questions says, each gets its own or none.
fn answers(body: &[u8]) {
    let mut questions = Questions::default();
    for number in 1..=3 {
        let id = RequestId([number; 16]);
        questions.ask(Question { waits: id, id, line: Vec::new(), asked_ms: 0, is_slow: false });
    }
    let batch = questions.next(900, 0, |_| true).expect("three wait");
    questions.sent(1, batch, 0);
    assert!(questions.answered(1, body));
    let told: Vec<_> = std::iter::from_fn(|| questions.tell()).collect();
    assert_eq!(told.len(), 3);
    assert!(told.iter().all(|(id, answer)| answer.as_ref().is_none_or(|answer| answer.req == Some(*id))));
}

/// What is read can be written and is then read as the same.
fn document<T: DeserializeOwned + Serialize>(body: &[u8]) {
    let Ok(read) = serde_json::from_slice::<T>(body) else { return };
    let written = serde_json::to_string(&read).expect("what was read can be written");
    let again = serde_json::from_str::<T>(&written).unwrap_or_else(|error| panic!("{error}: {written}"));
    assert_eq!(serde_json::to_string(&again).expect("as before"), written);
}
