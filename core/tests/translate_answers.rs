//! Golden answers: what providers send and what callers are to see of it, byte for byte, however it is cut.
//!
//! `UPDATE_ANSWERS=1 cargo test --release -p keyward-core --test translate_answers` writes what comes out now into the files: read the
//! difference. `tests/e2e/test_translated_answers.py` holds the same files against the SDKs that are to read them.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use keyward_core::operation::Dialect;
use keyward_core::translate::answer::{Stream, Terms, embeddings, error, whole};
use keyward_core::translate::doc::Doc;
use proptest::prelude::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const FILES: [(&str, &str); 5] = [
    ("anthropic-openai", include_str!("translate/answers/anthropic-openai.txt")),
    ("gemini-openai", include_str!("translate/answers/gemini-openai.txt")),
    ("openai-anthropic", include_str!("translate/answers/openai-anthropic.txt")),
    ("gemini-anthropic", include_str!("translate/answers/gemini-anthropic.txt")),
    ("framing", include_str!("translate/answers/framing.txt")),
];

struct Case {
    /// `stream`, `document`, `embeddings`, or an error's status.
    kind: String,
    name: String,
    with: Vec<String>,
    input: Vec<u8>,
    expected: String,
    terms: Terms,
}

fn dialect(name: &str) -> Dialect {
    match name {
        "openai" => Dialect::OpenAi,
        "anthropic" => Dialect::Anthropic,
        "gemini" => Dialect::Gemini,
        _ => panic!("no dialect: {name}"),
    }
}

fn terms(from: Dialect, to: Dialect) -> Terms {
    Terms {
        from,
        to,
        model: "the-model".to_owned(),
        id: "0123456789abcdef0123456789abcdef".to_owned(),
        created: 1_795_176_000,
        include_usage: false,
        base64: false,
    }
}

/// A file is cases: `=== kind: name`, perhaps `with: words`, `--- in` and the bytes, `--- out` and the bytes.
fn cases(file: &str, text: &str) -> Vec<Case> {
    let text = text.replace("\r\n", "\n");
    let cases = text.split("\n=== ").skip(1);
    cases
        .map(|case| {
            let (head, rest) = case.split_once("\n--- in\n").unwrap_or_else(|| panic!("no input: {case}"));
            let (input, expected) = rest.split_once("--- out\n").unwrap_or((rest, ""));
            let (title, with) = head.split_once("\nwith: ").unwrap_or((head, ""));
            let (kind, name) = title.split_once(": ").unwrap_or_else(|| panic!("no kind: {title}"));
            let with: Vec<String> = with.split_whitespace().map(str::to_owned).collect();
            let has = |word: &str| with.iter().any(|own| own == word);
            let of_dialects = |words: &str| words.split_once('-').map(|(from, to)| terms(dialect(from), dialect(to)));
            let of_case = with.iter().find(|word| word.contains('-')).map(String::as_str);
            let mut terms = of_dialects(of_case.unwrap_or(file)).unwrap();
            (terms.include_usage, terms.base64) = (has("include_usage"), has("base64"));
            let mut input = input.to_owned();
            for (word, ending) in [("crlf", "\r\n"), ("cr", "\r")] {
                if has(word) {
                    input = input.replace('\n', ending);
                }
            }
            if has("bom") {
                input.insert(0, '\u{feff}');
            }
            Case { kind: kind.to_owned(), name: name.to_owned(), with, input: input.into_bytes(), expected: expected.to_owned(), terms }
        })
        .collect()
}

fn all_cases() -> Vec<Case> {
    FILES.iter().flat_map(|(file, text)| cases(file, text)).collect()
}

fn streams() -> Vec<Case> {
    all_cases().into_iter().filter(|case| case.kind == "stream").collect()
}

fn streamed<'a>(terms: &Terms, pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let (mut stream, mut out) = (Stream::new(terms.clone()), Vec::new());
    for piece in pieces {
        stream.piece(piece, &mut out);
    }
    stream.end(&mut out);
    stream.end(&mut out);
    assert_eq!(stream.held(), 0, "something is kept of a stream that is over");
    String::from_utf8(out).unwrap()
}

fn translated(case: &Case) -> String {
    let told = match case.kind.as_str() {
        "stream" => return streamed(&case.terms, [case.input.as_slice()]),
        "document" => whole(&case.input, &case.terms),
        "embeddings" => embeddings(&case.input, &case.terms),
        status => {
            let (status, body) = error(status.parse().unwrap(), case.input.trim_ascii_end(), &case.terms);
            return format!("{status} {body}\n\n");
        }
    };
    told.map_or_else(|error| format!("{error:?}\n\n"), |told| format!("{told}\n\n"))
}

#[test]
fn every_answer_is_translated_as_written() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for (file, text) in FILES {
        let mut updated = text.split("\n=== ").next().unwrap_or_default().to_owned();
        for case in cases(file, text) {
            count += 1;
            let told = translated(&case);
            let with = if case.with.is_empty() { String::new() } else { format!("\nwith: {}", case.with.join(" ")) };
            let input = String::from_utf8(case.input.clone()).unwrap().replace("\r\n", "\n").replace('\r', "\n").replace('\u{feff}', "");
            updated.push_str(&format!("\n=== {}: {}{with}\n--- in\n{input}--- out\n{}", case.kind, case.name, told));
            // Cases are set apart by an empty line, which ends most outputs.
            if told.trim_end() != case.expected.trim_end() {
                wrong.push(format!("{file}: {}\n{told}--- and not\n{}", case.name, case.expected));
            }
        }
        #[cfg(not(target_arch = "wasm32"))]
        if std::env::var_os("UPDATE_ANSWERS").is_some() {
            let path = format!("{}/tests/translate/answers/{file}.txt", env!("CARGO_MANIFEST_DIR"));
            std::fs::write(path, updated.trim_end().to_owned() + "\n\n").unwrap();
        }
    }
    assert!(count >= 80, "only {count} cases were read");
    assert!(wrong.is_empty(), "{} of {count} cases:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_stream_is_translated_the_same_wherever_it_is_cut() {
    for Case { name, input, expected, terms, .. } in streams() {
        let expected = expected.trim_end();
        assert_eq!(streamed(&terms, input.chunks(1)).trim_end(), expected, "{name}: byte by byte");
        for cut in 0..input.len() {
            let (head, tail) = input.split_at(cut);
            assert_eq!(streamed(&terms, [head, tail]).trim_end(), expected, "{name}: cut at {cut}");
        }
    }
}

/// Every event that is whole has gone out: nothing waits for the next one but what must.
#[test]
fn an_event_goes_out_with_its_last_byte() {
    for (from, to, event) in [
        (Dialect::Anthropic, Dialect::OpenAi, r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"now"}}"#),
        (Dialect::Gemini, Dialect::OpenAi, r#"{"candidates":[{"content":{"parts":[{"text":"now"}]}}]}"#),
        (Dialect::OpenAi, Dialect::Anthropic, r#"{"choices":[{"index":0,"delta":{"content":"now"}}]}"#),
        (Dialect::Gemini, Dialect::Anthropic, r#"{"candidates":[{"content":{"parts":[{"text":"now"}]}}]}"#),
    ] {
        let (mut stream, mut out) = (Stream::new(terms(from, to)), Vec::new());
        stream.piece(format!("data: {event}\n").as_bytes(), &mut out);
        assert!(out.is_empty());
        stream.piece(b"\n", &mut out);
        let told = String::from_utf8(out).unwrap();
        assert!(told.contains("\"now\"") && told.ends_with("\n\n"), "{told}");
    }
}

/// What goes out can always be read: events, each with one line of JSON, and nothing behind the last.
fn check(told: &str, to: Dialect) {
    assert!(told.is_empty() || told.ends_with("\n\n"), "{told}");
    let mut is_over = false;
    for event in told.split_terminator("\n\n") {
        assert!(!is_over, "more after the end: {event}");
        if event.starts_with(':') {
            continue;
        }
        let (name, data) = match event.split_once('\n') {
            Some((name, data)) => (name.strip_prefix("event: "), data),
            None => (None, event),
        };
        let data = data.strip_prefix("data: ").unwrap_or_else(|| panic!("no data: {event}"));
        if data == "[DONE]" {
            is_over = true;
            continue;
        }
        let value: serde_json::Value = serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {event}"));
        is_over = value.get("error").is_some() || name == Some("message_stop");
        match to {
            Dialect::Anthropic => assert_eq!(name, value["type"].as_str(), "{event}"),
            _ => assert!(is_over || value["choices"].as_array().is_some_and(|choices| choices.len() <= 1), "{event}"),
        }
    }
    assert!(is_over, "no end: {told}");
}

/// Blocks open and close one after the other, and each delta belongs to the open one.
fn check_blocks(told: &str) {
    let (mut open, mut next) = (None, 0);
    for data in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
        let value: serde_json::Value = serde_json::from_str(data).unwrap();
        let index = value["index"].as_u64();
        match value["type"].as_str().unwrap() {
            "content_block_start" => {
                assert_eq!((open, index), (None, Some(next)), "{told}");
                (open, next) = (index, next + 1);
            }
            "content_block_delta" => assert!(index.is_some() && index == open, "{told}"),
            "content_block_stop" => assert!(index.is_some() && index == open.take(), "{told}"),
            "message_delta" | "message_stop" => assert_eq!(open, None, "{told}"),
            _ => {}
        }
    }
}

#[test]
fn golden_streams_are_well_formed() {
    for case in streams() {
        let told = translated(&case);
        check(&told, case.terms.to);
        if case.terms.to == Dialect::Anthropic {
            check_blocks(&told);
        }
    }
}

/// Thinking too long to be kept is told as text and not given back as a block: half a block is none.
#[test]
fn little_is_kept_however_much_is_thought_or_called() {
    let (mut stream, mut out) = (Stream::new(terms(Dialect::Anthropic, Dialect::OpenAi)), Vec::new());
    let thinking = r#"{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}"#;
    let delta = |text: &str| {
        format!(r#"data: {{"type":"content_block_delta","index":0,"delta":{{"type":"thinking_delta","thinking":"{text}"}}}}{}"#, "\n\n")
    };
    for round in 0..2 {
        stream.piece(format!("data: {thinking}\n\n").as_bytes(), &mut out);
        let pieces = if round == 0 { 100 } else { 10 };
        for _ in 0..pieces {
            stream.piece(delta(&"x".repeat(1 << 10)).as_bytes(), &mut out);
            assert!(stream.held() <= 64 << 10);
        }
        stream.piece(b"data: {\"type\":\"content_block_stop\",\"index\":0}\n\n", &mut out);
        assert_eq!(stream.held(), 0);
    }
    let told = String::from_utf8(out).unwrap();
    assert_eq!((told.matches("reasoning_content").count(), told.matches("thinking_blocks").count()), (110, 1));
}

/// Whatever a stream ends with in the middle of, nothing of it stays behind.
#[test]
fn nothing_is_kept_of_a_stream_that_broke_off() {
    let thinking = concat!(
        "data: {\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"thinking\",\"thinking\":\"x\",\"signature\":\"\"}}\n\n",
        "data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"thinking_delta\",\"thinking\":\"y\"}}\n\n",
    );
    let calls = [call_piece(0, ""), call_piece(1, ""), call_piece(1, "{\"a\":")].concat();
    for (from, to, begun) in [(Dialect::Anthropic, Dialect::OpenAi, thinking), (Dialect::OpenAi, Dialect::Anthropic, calls.as_str())] {
        for end in ["", "data: {\"error\":{\"message\":\"x\"}}\n\n"] {
            let (mut stream, mut out) = (Stream::new(terms(from, to)), Vec::new());
            stream.piece(begun.as_bytes(), &mut out);
            assert!(stream.held() > 0);
            stream.piece(end.as_bytes(), &mut out);
            stream.end(&mut out);
            assert_eq!(stream.held(), 0);
        }
    }
}

fn call_piece(index: u32, arguments: &str) -> String {
    let first = if arguments.is_empty() { format!(r#""id":"call_{index}","type":"function","#) } else { String::new() };
    let name = if arguments.is_empty() { format!(r#""name":"f{index}","#) } else { String::new() };
    let arguments = serde_json::Value::from(arguments);
    format!(
        r#"data: {{"choices":[{{"index":0,"delta":{{"tool_calls":[{{"index":{index},{first}"function":{{{name}"arguments":{arguments}}}}}]}}}}]}}{}"#,
        "\n\n"
    )
}

/// The arguments of a call that has to wait for another are kept, up to a limit; then the other is taken for whole.
#[test]
fn calls_that_wait_go_out_before_too_much_is_kept() {
    let (mut stream, mut out) = (Stream::new(terms(Dialect::OpenAi, Dialect::Anthropic)), Vec::new());
    stream.piece(call_piece(0, "").as_bytes(), &mut out);
    stream.piece(call_piece(1, "").as_bytes(), &mut out);
    stream.piece(call_piece(1, "{\"x\":\"").as_bytes(), &mut out);
    for _ in 0..200 {
        stream.piece(call_piece(1, &"y".repeat(1_000)).as_bytes(), &mut out);
        assert!(stream.held() <= 64 << 10);
    }
    stream.piece(call_piece(1, "\"}").as_bytes(), &mut out);
    stream.piece(b"data: [DONE]\n\n", &mut out);
    let told = String::from_utf8(out).unwrap();
    check(&told, Dialect::Anthropic);
    check_blocks(&told);
    assert_eq!((told.matches("\"tool_use\"").count(), told.matches("yyyyyyyyyy").count()), (3, 200 * 100), "{told}");
    // A call that begins when there is no room sends those before it on, and stays open itself.
    let (mut stream, mut out) = (Stream::new(terms(Dialect::OpenAi, Dialect::Anthropic)), Vec::new());
    let long = "y".repeat((64 << 10) - 11);
    for piece in [call_piece(0, ""), call_piece(1, ""), call_piece(1, &long), call_piece(2, ""), call_piece(2, "{}")] {
        stream.piece(piece.as_bytes(), &mut out);
        assert!(stream.held() <= 64 << 10);
    }
    stream.piece(b"data: [DONE]\n\n", &mut out);
    let told = String::from_utf8(out).unwrap();
    check_blocks(&told);
    assert!(told.contains(&long) && told.ends_with("message_stop\"}\n\n"), "{told}");
    // More of the first would have no place any more.
    let (mut stream, mut out) = (Stream::new(terms(Dialect::OpenAi, Dialect::Anthropic)), Vec::new());
    for piece in
        [call_piece(0, ""), call_piece(1, ""), call_piece(1, &"y".repeat(60_000)), call_piece(1, &"y".repeat(60_000)), call_piece(0, "{}")]
    {
        stream.piece(piece.as_bytes(), &mut out);
    }
    let late = String::from_utf8(out).unwrap();
    check(&late, Dialect::Anthropic);
    assert!(late.contains("event: error"), "{late}");
}

#[test]
fn an_event_that_is_too_large_ends_the_stream_with_an_error() {
    for to in [Dialect::OpenAi, Dialect::Anthropic] {
        for from in [Dialect::OpenAi, Dialect::Anthropic, Dialect::Gemini] {
            let (mut stream, mut out) = (Stream::new(terms(from, to)), Vec::new());
            stream.piece(b"data: \"", &mut out);
            for _ in 0..65 {
                stream.piece(&[b'x'; 64 << 10], &mut out);
                assert!(stream.held() <= 4 << 20);
            }
            stream.end(&mut out);
            let told = String::from_utf8(out).unwrap();
            check(&told, to);
            assert!(told.contains("too large"), "{told}");
        }
    }
}

fn dialects() -> impl Strategy<Value = (Dialect, Dialect)> {
    let from = proptest::sample::select(&[Dialect::OpenAi, Dialect::Anthropic, Dialect::Gemini][..]);
    (from, proptest::sample::select(&[Dialect::OpenAi, Dialect::Anthropic][..]))
}

/// Every event of every golden stream.
fn events() -> Vec<String> {
    let mut events: Vec<String> = streams()
        .iter()
        .flat_map(|case| String::from_utf8(case.input.clone()).unwrap().split_inclusive("\n\n").map(str::to_owned).collect::<Vec<_>>())
        .collect();
    events.sort();
    events.dedup();
    events
}

proptest! {
    #[test]
    fn any_cuts_give_the_same(at in any::<proptest::sample::Index>(), cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..20)) {
        let streams = streams();
        let Case { input, expected, terms, .. } = at.get(&streams);
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(input.len() + 1)).collect();
        cuts.extend([0, input.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|ends| &input[ends[0]..ends[1]]);
        let told = streamed(terms, pieces);
        prop_assert_eq!(told.trim_end(), expected.trim_end());
    }

    /// Events of any provider in any order, some damaged: what goes out can be read.
    #[test]
    fn any_mixture_gives_something_well_formed(
        (from, to) in dialects(),
        include_usage: bool,
        picks in proptest::collection::vec((any::<proptest::sample::Index>(), proptest::option::weighted(0.1, (any::<proptest::sample::Index>(), any::<u8>()))), 0..30),
    ) {
        let events = events();
        let mut stream = Stream::new(Terms { include_usage, ..terms(from, to) });
        let mut out = Vec::new();
        for (pick, damage) in picks {
            let mut event = pick.get(&events).clone().into_bytes();
            if let Some((at, byte)) = damage {
                let at = at.index(event.len());
                event[at] = byte;
            }
            stream.piece(&event, &mut out);
            prop_assert!(stream.held() <= (64 << 10) + event.len() + 4_096);
        }
        stream.end(&mut out);
        let told = String::from_utf8(out).unwrap();
        check(&told, to);
        if to == Dialect::Anthropic {
            check_blocks(&told);
        }
    }

    /// Calls that take turns in any way come out each with its own arguments.
    #[test]
    fn calls_that_take_turns_are_told_apart(turns in proptest::collection::vec(0u32..4, 0..60), cuts in proptest::collection::vec(1usize..9, 4)) {
        let documents: Vec<String> = (0..4).map(|n| serde_json::json!({ "n": n, "text": "a\"}]\\\u{e9}{[", "list": [[], {}] }).to_string()).collect();
        let mut rest: Vec<&str> = documents.iter().map(String::as_str).collect();
        let (mut stream, mut out) = (Stream::new(terms(Dialect::OpenAi, Dialect::Anthropic)), Vec::new());
        (0..4).for_each(|n| stream.piece(call_piece(n, "").as_bytes(), &mut out));
        for n in turns.into_iter().chain((0..4).flat_map(|n| [n; 60])) {
            let own = rest[n as usize];
            let cut = (cuts[n as usize]..).find(|cut| *cut >= own.len() || own.is_char_boundary(*cut)).unwrap().min(own.len());
            let (head, tail) = own.split_at(cut);
            if !head.is_empty() {
                stream.piece(call_piece(n, head).as_bytes(), &mut out);
            }
            rest[n as usize] = tail;
        }
        stream.piece(b"data: [DONE]\n\n", &mut out);
        let told = String::from_utf8(out).unwrap();
        check_blocks(&told);
        let mut inputs = vec![String::new(); 4];
        for data in told.lines().filter_map(|line| line.strip_prefix("data: ")) {
            let value: serde_json::Value = serde_json::from_str(data).unwrap();
            if let (Some(index), Some(piece)) = (value["index"].as_u64(), value["delta"]["partial_json"].as_str()) {
                inputs[usize::try_from(index).unwrap()].push_str(piece);
            }
        }
        prop_assert_eq!(inputs, documents);
    }

    #[test]
    fn any_body_is_an_answer_or_not(body in proptest::collection::vec(any::<u8>(), 0..200), (from, to) in dialects(), status: u16) {
        let terms = terms(from, to);
        let (status, told) = error(status, &body, &terms);
        prop_assert!((400..600).contains(&status) && status != 401);
        prop_assert!(serde_json::from_str::<serde_json::Value>(&told).is_ok());
        let _ = (whole(&body, &terms), embeddings(&body, &terms));
    }

    #[test]
    fn any_damaged_document_is_an_answer_or_not(at in any::<proptest::sample::Index>(), damage in any::<(proptest::sample::Index, u8)>(), (from, to) in dialects()) {
        let documents: Vec<Case> = all_cases().into_iter().filter(|case| case.kind == "document" || case.kind == "embeddings").collect();
        let mut body = at.get(&documents).input.clone();
        let place = damage.0.index(body.len());
        body[place] = damage.1;
        for told in [whole(&body, &terms(from, to)), embeddings(&body, &terms(from, to))].into_iter().flatten() {
            // Not serde's reader: it has no room for every number that JSON can write.
            prop_assert!(Doc::read(told.as_bytes(), 100_000).is_ok(), "{}", told);
        }
    }
}
