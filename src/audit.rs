//! Reading and checking audit chains from the command line.

use crate::cli::out;
use crate::client::Client;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyward_core::audit::{ChainKey, Verifier};
use keyward_core::hex;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How many entries `tail` starts with.
const TAIL: usize = 20;
/// Entries that are asked for at a time.
const PAGE: usize = 1_000;

/// First line of an export.
#[derive(Deserialize)]
struct Head {
    format: String,
    origin: String,
    key: String,
    chain_keys: BTreeMap<u64, String>,
}

#[derive(Deserialize)]
struct Line {
    seq: u64,
    entry: String,
    mac: String,
}

/// Last line of an export.
#[derive(Deserialize)]
struct Tail {
    count: u64,
    head: String,
}

/// Checks an export. Returns what was found right; the error names the first entry that is not.
pub fn verify(text: &str) -> Result<String, String> {
    let mut lines = text.lines();
    let head: Head = lines.next().and_then(|l| serde_json::from_str(l).ok()).ok_or("the first line is not the head of an audit export")?;
    if head.format != "keyward-audit-export/v1" {
        return Err(format!("the format {:?} is not known", head.format));
    }
    let keys = |epoch: u64| head.chain_keys.get(&epoch).and_then(|key| hex::decode(key)).map(ChainKey);
    let mut verifier = Verifier::new(&head.origin, &head.key, keys);
    let mut number = 0;
    let mut rest = lines.peekable();
    while let Some(line) = rest.next() {
        if rest.peek().is_none() {
            let tail: Tail =
                serde_json::from_str(line).map_err(|_| format!("the export stops after entry {number}: its last line is missing"))?;
            let head_mac = hex::decode(&tail.head).ok_or("the last line's MAC can't be read")?;
            let count = verifier.finish(tail.count, &head_mac).map_err(|broken| format!("entry {} {}", broken.entry, broken.what))?;
            return Ok(format!("{count} entries of {} ({}) verify", head.key, head.origin));
        }
        number += 1;
        let unreadable = || format!("entry {number} can't be read");
        let line: Line = serde_json::from_str(line).map_err(|_| unreadable())?;
        let entry = STANDARD.decode(&line.entry).map_err(|_| unreadable())?;
        let mac = hex::decode(&line.mac).ok_or_else(unreadable)?;
        if line.seq != number {
            return Err(format!("entry {number} is missing or out of order: entry {} stands in its place", line.seq));
        }
        verifier.entry(&entry, &mac).map_err(|broken| format!("entry {} {}", broken.entry, broken.what))?;
    }
    Err("the export has no entries and no last line".to_owned())
}

/// Prints the newest entries of a key's chain, and with `follow` those that come.
pub fn tail(client: &Client, key: &str, follow: bool) -> Result<(), String> {
    let (mut next, mut started) = (1, false);
    let mut newest = VecDeque::new();
    loop {
        let page = client.get(&format!("/v1/audit/{key}?from={next}&limit={PAGE}"))?;
        let rows = page.get("data").and_then(Value::as_array).cloned().unwrap_or_default();
        let full = rows.len() == PAGE;
        for row in rows {
            next = row.get("seq").and_then(Value::as_u64).unwrap_or(next) + 1;
            newest.push_back(row);
            if !started && newest.len() > TAIL {
                newest.pop_front();
            }
        }
        if full {
            continue;
        }
        started = true;
        newest.drain(..).try_for_each(|row| out(&line(&row)))?;
        if !follow {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// `seq  time  EVENT  name=value ...`
fn line(row: &Value) -> String {
    let field = |name: &str| row.get(name).map_or(String::new(), show);
    let fields = row.get("fields").and_then(Value::as_object).into_iter().flatten();
    let said: Vec<String> = fields.filter(|(_, value)| !value.is_null()).map(|(name, value)| format!("{name}={}", show(value))).collect();
    format!("{:>6}  {}  {:<13}  {}\n", field("seq"), field("time_ms"), field("event"), said.join(" "))
}

fn show(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
