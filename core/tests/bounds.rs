//! A table of requests with the most that each may cost, or the refusal of what has no bound: as the gate reads them and admission
//! decides. The figures in `bounds.tsv` are worked out by hand from listed prices, not by this code.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

use keyward_core::admission::{Aim, Allow, KeyState, Status, decide, operation};
use keyward_core::edge::{Ask, RequestId, VmId};
use keyward_core::gate::{Limits, request_headers};
use keyward_core::limits::{self, Account, Budget, Moment, Window};
use keyward_core::money::Nanodollars;
use keyward_core::operation::Dialect;
use keyward_core::price::PriceTable;
use keyward_core::reserve::{Level, Of};
use keyward_core::token::VirtualKey;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const ROWS: &str = include_str!("bounds.tsv");

/// What the gate makes of a request.
fn ask(path: &str, body: &str) -> Ask {
    let auth = format!("Bearer {}", VirtualKey::generate([1; 32]).reveal());
    let headers = [(":method", "POST"), (":path", path), ("authorization", &auth), ("content-type", "application/json")];
    let headers: Vec<(&[u8], &[u8])> = headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
    let mut reading = request_headers(&headers, Limits { max_body_bytes: 1 << 20 }, RequestId([9; 16])).expect(path);
    reading.piece(body.as_bytes()).unwrap_or_else(|refused| panic!("{body}: {}", refused.refusal.message));
    let asking = reading.end().unwrap_or_else(|refused| panic!("{body}: {}", refused.refusal.message));
    asking.admit_request(VmId([1; 16]), String::new(), false).ask
}

/// A key with a large budget that may call everything.
fn any_key() -> KeyState {
    let others = ["batches", "fine_tuning/jobs", "realtime/client_secrets", "videos", "messages/batches"];
    let endpoints = others.iter().map(|path| format!("POST /v1/{path}")).chain(["*".to_owned()]).collect();
    KeyState { status: Status::Active, expires_ms: None, allow: Allow { endpoints, state: true, ..Allow::default() }, limits: Vec::new() }
}

/// A sum of products, such as `B*2500 + 3*100*10000`.
fn figure(text: &str, bytes: u64) -> u64 {
    let factor = |text: &str| if text == "B" { bytes } else { text.parse().unwrap_or_else(|_| panic!("no number: {text}")) };
    text.split(" + ").map(|product| product.split('*').map(factor).product::<u64>()).sum()
}

#[test]
fn every_request_has_its_bound_or_its_refusal() {
    let table = PriceTable::built_in().unwrap();
    let (mut rows, mut wrong) = (0, Vec::new());
    for row in ROWS.lines().filter(|line| !line.starts_with('#')) {
        let [path, expected, body, ..] = row.split('\t').collect::<Vec<_>>()[..] else { panic!("not a row: {row}") };
        rows += 1;
        let asked = ask(path, body);
        let provider = if asked.dialect == Dialect::Anthropic { "anthropic" } else { "openai" };
        let price = asked.model.as_deref().and_then(|model| table.price(provider, model, operation(&asked).models));
        let aims = [Aim { provider, model: asked.model.as_deref() }];
        let limits =
            limits::Limits { budgets: vec![Budget { window: Window::Total, cap: Nanodollars(1 << 60) }], ..limits::Limits::default() };
        let level = Level { of: Of::Key, limits: vec![&limits], account: &Account::default() };
        let decided = match decide(&any_key(), &[level], &asked, &aims, price.as_deref(), Moment::at(0)) {
            Ok(hold) => hold.total.0.to_string(),
            Err(refusal) => refusal.code.name().to_owned(),
        };
        let is_refusal = expected.contains('_');
        let expected = if is_refusal { expected.to_owned() } else { figure(expected, body.len() as u64).to_string() };
        if decided != expected {
            wrong.push(format!("{path} {body}: {decided}, should be {expected}"));
        }
    }
    assert!(rows >= 80, "only {rows} rows were read");
    assert!(wrong.is_empty(), "{} of {rows} rows:\n{}", wrong.len(), wrong.join("\n"));
}
