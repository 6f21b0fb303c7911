//! The commands that talk to the admin API, by what they are about.

pub mod administration;
pub mod configuration;
pub mod keys;
pub mod limits;

use crate::failure::{Exit, Failure};

/// A name or id in a path, escaped.
pub fn segment(name: &str) -> Result<String, Failure> {
    if name.is_empty() || name == "." || name == ".." {
        return Err(Failure::new(Exit::Invalid, format!("{name:?} is no name")));
    }
    let escaped = |b: u8| if b.is_ascii_alphanumeric() || b"-._".contains(&b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    Ok(name.bytes().map(escaped).collect())
}

/// `name=value` pairs.
pub fn pairs(texts: &[String]) -> Result<serde_json::Map<String, serde_json::Value>, Failure> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.into())),
        _ => Err(Failure::new(Exit::Invalid, format!("{text:?}: expected NAME=VALUE"))),
    };
    texts.iter().map(pair).collect()
}
