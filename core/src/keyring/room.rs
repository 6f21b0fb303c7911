//! What accounts have left, as providers tell in the headers of their answers.

use super::table;
use crate::ring::SharedData;
use crate::verdict::{Left, Room};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// Slots in shared data. Two accounts in one slot only forget each other's figures.
const SLOTS: u16 = 1024;
/// Figures without a time of their own are believed for so long.
const FRESH_MS: u64 = 60_000;
/// Accounts and models of which a VM keeps what it will report.
const MAX_KEPT: usize = 1024;
/// Nothing is known, or nothing is used: a whole.
const WHOLE: u64 = 1_000_000;

/// What the service is told of one account and model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pub account: String,
    pub model: String,
    pub room: Room,
    /// Milliseconds since the provider said so: each worker tells what it saw itself, and the newest counts.
    #[serde(default)]
    pub age_ms: u64,
}

/// What stands in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    /// First bytes of the hash of account and model.
    of: u64,
    room: Room,
    at_ms: u64,
}

#[derive(Debug, Default)]
pub struct Rooms {
    /// By account and model: what is to be reported, and since when. Places stay, so that an answer needs no new one.
    news: HashMap<String, HashMap<String, Option<(Room, u64)>>>,
    places: usize,
    has_news: bool,
    reported_ms: u64,
}

fn hash(account: &str, model: &str) -> u64 {
    hash_of(&table::fitting(format!("m/{account}/{model}")))
}

/// The same, by the name that states of an account and model have.
fn hash_of(name: &str) -> u64 {
    Sha256::digest(name).first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
}

fn slot(hash: u64) -> Vec<u8> {
    format!("keyward/keyring/1/room/{}", hash % u64::from(SLOTS)).into_bytes()
}

impl Rooms {
    /// `is_shared`: other VMs choose by it as well.
    pub fn note(&mut self, shared: &impl SharedData, account: &str, model: &str, room: Room, is_shared: bool, now_ms: u64) {
        if is_shared {
            let of = hash(account, model);
            let noted = Noted { of, room, at_ms: now_ms };
            shared.write(&slot(of), &serde_json::to_vec(&noted).unwrap_or_default(), 0);
        }
        self.has_news = true;
        if let Some(place) = self.news.get_mut(account).and_then(|models| models.get_mut(model)) {
            *place = Some((room, now_ms));
            return;
        }
        if self.places >= MAX_KEPT {
            self.news.clear();
            self.places = 0;
        }
        self.places += 1;
        self.news.entry(account.to_owned()).or_default().insert(model.to_owned(), Some((room, now_ms)));
    }

    /// Nothing is known any more of the account and model whose states have this name.
    pub fn forget(shared: &impl SharedData, name: &str) {
        let slot = slot(hash_of(name));
        if name.starts_with("m/") && shared.read(&slot).is_some() {
            shared.write(&slot, b"", 0);
        }
    }

    /// How much of its limits an account has left, in millionths, less what runs already, and how many run.
    pub fn score(&self, shared: &impl SharedData, account: &str, model: &str, running: u32, now_ms: u64) -> (u64, u32) {
        let of = hash(account, model);
        let noted = shared.read(&slot(of)).and_then(|(value, _)| serde_json::from_slice::<Noted>(&value).ok());
        let Some(noted) = noted.filter(|noted| noted.of == of) else { return (WHOLE, running) };
        let age_ms = now_ms.saturating_sub(noted.at_ms);
        let left = |left: Option<Left>, taken: u64| {
            let Some(left) = left.filter(|left| age_ms < left.reset_ms.unwrap_or(FRESH_MS)) else { return WHOLE };
            let free = left.remaining.saturating_sub(taken);
            let limit = left.limit.unwrap_or(left.remaining).max(free).max(1);
            // Limits are far below 2^44.
            free.saturating_mul(WHOLE) / limit
        };
        let score = left(noted.room.requests, u64::from(running)).min(left(noted.room.tokens, 0));
        (score, running)
    }

    /// What is to be reported, at most once in `every_ms`.
    pub fn report(&mut self, every_ms: u64, now_ms: u64) -> Vec<Told> {
        if !self.has_news || now_ms < self.reported_ms.saturating_add(every_ms) {
            return Vec::new();
        }
        (self.reported_ms, self.has_news) = (now_ms, false);
        let mut told = Vec::new();
        for (account, models) in &mut self.news {
            for (model, place) in models {
                if let Some((room, at_ms)) = place.take() {
                    let age_ms = now_ms.saturating_sub(at_ms);
                    told.push(Told { account: account.clone(), model: model.clone(), room, age_ms });
                }
            }
        }
        told
    }
}
