//! `json::Scanner` and `translate::doc::Doc`: the same wherever the document is cut, and what another reader reads.
#![no_main]

use keyward_core::json::{JsonError, Scalar, Scanner, Span, Visitor};
use keyward_core::translate::doc::{Doc, Kind, Value};
use keyward_fuzz::input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    let wants = choices.of(&[0, 1, 7, 1_000]);
    let whole = heard(wants, [body]);
    assert_eq!(whole, heard(wants, cuts.pieces(body)), "it depends on where it is cut");

    let doc = Doc::read(body, 1_000_000);
    assert_eq!(doc.is_ok(), matches!(whole.last(), Some(Heard::End(Ok(())))));
    match (doc, serde_json::from_slice::<serde_json::Value>(body)) {
        (Ok(doc), Ok(other)) => assert_eq!(rebuilt(doc.root()), other),
        (Err(_), Ok(other)) => panic!("it was not read, and is {other}"),
        // The other reader has no room for every number, and one level less.
        (Ok(_), Err(error)) => {
            let error = error.to_string();
            assert!(error.starts_with("number out of range") || error.starts_with("recursion limit"), "{error}");
        }
        (Err(_), Err(_)) => {}
    }
});

#[derive(Debug, PartialEq)]
enum Heard {
    Open(bool, u64),
    Close(u64),
    Key(Option<Vec<u8>>),
    Str(Vec<u8>, u64, Span),
    Num(Vec<u8>, Span),
    Bool(bool, Span),
    Null(Span),
    End(Result<(), JsonError>),
}

struct Ear(usize, Vec<Heard>);

impl Visitor for Ear {
    type Error = JsonError;

    fn open(&mut self, object: bool, at: u64) -> Result<(), JsonError> {
        self.1.push(Heard::Open(object, at));
        Ok(())
    }

    fn close(&mut self, at: u64) -> Result<(), JsonError> {
        self.1.push(Heard::Close(at));
        Ok(())
    }

    fn key(&mut self, key: Option<&[u8]>) -> Result<(), JsonError> {
        self.1.push(Heard::Key(key.map(<[u8]>::to_vec)));
        Ok(())
    }

    fn wants(&self) -> usize {
        self.0
    }

    fn scalar(&mut self, value: Scalar<'_>, span: Span) -> Result<(), JsonError> {
        self.1.push(match value {
            Scalar::Str { text, len } => {
                assert!(text.len() <= self.0, "more than was wanted");
                Heard::Str(text.to_vec(), len, span)
            }
            Scalar::Num(digits) => Heard::Num(digits.to_vec(), span),
            Scalar::Bool(bool) => Heard::Bool(bool, span),
            Scalar::Null => Heard::Null(span),
        });
        Ok(())
    }
}

fn heard<'a>(wants: usize, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Heard> {
    let (mut scanner, mut ear) = (Scanner::default(), Ear(wants, Vec::new()));
    let fed = pieces.into_iter().try_for_each(|piece| scanner.feed(piece, &mut ear));
    let end = fed.and_then(|()| scanner.finish(&mut ear));
    ear.1.push(Heard::End(end));
    ear.1
}

fn rebuilt(value: Value<'_>) -> serde_json::Value {
    match value.kind() {
        Kind::Object => value.members().map(|(key, value)| (key.into_owned(), rebuilt(value))).collect(),
        Kind::Array => value.items().map(rebuilt).collect(),
        Kind::Str => value.str().expect("a string").into(),
        Kind::Bool => value.bool().expect("a bool").into(),
        Kind::Null => serde_json::Value::Null,
        Kind::Number => serde_json::from_str(value.raw()).expect("a number"),
    }
}
