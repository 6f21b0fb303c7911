//! States by name, and what accounts have left, as the gates told them. No I/O; all times are given.

use keyward_core::edge::Cooled;
use keyward_core::keyring::{LONGEST_NAME, Told};
use keyward_core::verdict::{Room, State};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// Names that are kept; beyond, those that end first go.
const MAX_NAMES: usize = 4_096;
/// Accounts and models whose room is kept; beyond, those that were told of first go.
const MAX_ROOMS: usize = 4_096;
/// A state is remembered for so long after its end: what comes again right away is no news to an operator.
const REMEMBERED_MS: u64 = 60_000;
/// An exhausted account is asked again after its time, and its answer may take a while to come.
const EXHAUSTED_REMEMBERED_MS: u64 = 3_600_000;
/// Longest that room is shown.
const ROOM_MS: u64 = 3_600_000;
/// What gates are told of a state that has no end: a day, after which they are told again.
const DAY_MS: u64 = 86_400_000;

/// One state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub state: State,
    /// Steady milliseconds; `None`: until an operator acts.
    pub until_ms: Option<u64>,
    /// The end is a guess.
    pub probe: bool,
    /// When it was last told.
    pub at_ms: u64,
}

impl Entry {
    pub fn lasts(&self, now_ms: u64) -> bool {
        self.until_ms.is_none_or(|until_ms| until_ms > now_ms)
    }

    /// What stands when `newer` comes to this one: the worse of two that last; of equal ones the longer.
    fn and(self, newer: Entry, now_ms: u64) -> Entry {
        let longer = |a: Option<u64>, b: Option<u64>| b.is_some_and(|b| a.is_none_or(|a| a > b));
        if !self.lasts(now_ms) || newer.state > self.state || newer.state == self.state && longer(newer.until_ms, self.until_ms) {
            return newer;
        }
        Entry { at_ms: newer.at_ms, ..self }
    }

    fn differs(self, other: Entry) -> bool {
        (self.state, self.until_ms, self.probe) != (other.state, other.until_ms, other.probe)
    }

    /// Milliseconds that it still lasts.
    pub fn left_ms(&self, now_ms: u64) -> Option<u64> {
        self.until_ms.map(|until_ms| until_ms.saturating_sub(now_ms))
    }

    fn is_forgotten(&self, now_ms: u64) -> bool {
        let remembered = if self.state == State::Exhausted { EXHAUSTED_REMEMBERED_MS } else { REMEMBERED_MS };
        self.until_ms.is_some_and(|until_ms| until_ms.saturating_add(remembered) <= now_ms)
    }

    /// Whether it has to outlast a restart.
    pub fn is_kept(&self) -> bool {
        matches!(self.state, State::Exhausted | State::Rejected)
    }
}

/// What an account has left of a model's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    pub room: Room,
    /// Steady milliseconds.
    pub at_ms: u64,
}

/// What news of a name has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Nothing,
    /// It stands differently.
    Differs,
    /// It is worse than before, which a person may have to know.
    Worse,
}

#[derive(Debug, Default)]
pub struct Known {
    entries: BTreeMap<String, Entry>,
    /// By account and model.
    rooms: BTreeMap<(String, String), Noted>,
    /// Names of what is rejected, for admissions.
    rejected: Arc<HashSet<String>>,
}

impl Known {
    /// Takes what a gate tells of a name.
    pub fn take(&mut self, cooled: &Cooled, now_ms: u64) -> Change {
        if cooled.name.len() > LONGEST_NAME {
            return Change::Nothing;
        }
        let Some(state) = cooled.state else {
            // What was found out since the success that shows it stands.
            let is_older = self.entries.get(&cooled.name).is_some_and(|entry| entry.at_ms <= now_ms.saturating_sub(cooled.ms));
            return if is_older && self.clear(&cooled.name) { Change::Differs } else { Change::Nothing };
        };
        let until_ms = (state != State::Rejected).then(|| now_ms.saturating_add(cooled.ms));
        self.put(&cooled.name, Entry { state, until_ms, probe: cooled.probe, at_ms: now_ms }, now_ms)
    }

    /// Adds a state to what is known.
    pub fn put(&mut self, name: &str, newer: Entry, now_ms: u64) -> Change {
        let before = self.entries.get(name).copied();
        let after = before.map_or(newer, |known| known.and(newer, now_ms));
        self.entries.insert(name.to_owned(), after);
        if before.is_some_and(|before| !before.differs(after)) {
            return Change::Nothing;
        }
        if self.entries.len() > MAX_NAMES {
            self.forget(now_ms);
        }
        self.rejected_changed(before, Some(after));
        if before.is_none_or(|before| before.state < after.state) { Change::Worse } else { Change::Differs }
    }

    /// Takes a state away. `false`: there was none.
    pub fn clear(&mut self, name: &str) -> bool {
        let before = self.entries.remove(name);
        self.rejected_changed(before, None);
        before.is_some()
    }

    fn rejected_changed(&mut self, before: Option<Entry>, after: Option<Entry>) {
        let is_rejected = |entry: Option<Entry>| entry.is_some_and(|entry| entry.state == State::Rejected);
        if is_rejected(before) != is_rejected(after) {
            let names = self.entries.iter().filter(|(_, entry)| entry.state == State::Rejected).map(|(name, _)| name.clone());
            self.rejected = Arc::new(names.collect());
        }
    }

    /// Drops what is over; and if that is not enough, what ends first.
    pub fn forget(&mut self, now_ms: u64) {
        self.entries.retain(|_, entry| !entry.is_forgotten(now_ms));
        self.rooms.retain(|_, noted| noted.at_ms.saturating_add(ROOM_MS) > now_ms);
        while self.entries.len() > MAX_NAMES {
            let first = self.entries.iter().min_by_key(|(_, entry)| entry.until_ms.unwrap_or(u64::MAX)).map(|(name, _)| name.clone());
            let Some(first) = first else { break };
            self.clear(&first);
        }
    }

    pub fn get(&self, name: &str) -> Option<Entry> {
        self.entries.get(name).copied()
    }

    /// Names of what is rejected.
    pub fn rejected(&self) -> Arc<HashSet<String>> {
        self.rejected.clone()
    }

    /// Everything that stands now, as gates are told.
    pub fn everything(&self, now_ms: u64) -> Vec<Cooled> {
        self.entries.iter().filter(|(_, entry)| entry.lasts(now_ms)).map(|(name, entry)| cooled(name, *entry, now_ms)).collect()
    }

    /// What gates are told of a name. `None`: its time is over, as they know themselves.
    pub fn tell(&self, name: &str, now_ms: u64) -> Option<Cooled> {
        match self.get(name) {
            Some(entry) if entry.lasts(now_ms) => Some(cooled(name, entry, now_ms)),
            Some(_) => None,
            None => Some(Cooled { name: name.to_owned(), state: None, ms: 0, probe: false }),
        }
    }

    /// States that stand now of a credential and of its account: the model, where it is about one alone.
    pub fn of(&self, id: &str, account: &str, now_ms: u64) -> Vec<(Option<&str>, Entry)> {
        let single = [format!("c/{id}"), format!("a/{account}")];
        let single = single.into_iter().filter_map(|name| Some((None, self.get(&name)?)));
        let models = self.of_models(account).map(|(model, entry)| (Some(model), entry));
        single.chain(models).filter(|(_, entry)| entry.lasts(now_ms)).collect()
    }

    fn of_models(&self, account: &str) -> impl Iterator<Item = (&str, Entry)> {
        let start = format!("m/{account}/");
        let from = self.entries.range(start.clone()..);
        from.map_while(move |(name, entry)| Some((name.strip_prefix(&start)?, *entry)))
    }

    /// Names of the states that concern a credential or its account. A name that was too long to be kept says not whose it is: those
    /// are among them.
    pub fn names_of(&self, id: &str, account: &str) -> Vec<String> {
        let single = [format!("c/{id}"), format!("a/{account}")].into_iter().filter(|name| self.entries.contains_key(name));
        let models = self.of_models(account).map(|(model, _)| format!("m/{account}/{model}"));
        let hashed = self.entries.keys().filter(|name| name.strip_prefix("m/").is_some_and(|rest| !rest.contains('/'))).cloned();
        single.chain(models).chain(hashed).collect()
    }

    pub fn note_room(&mut self, told: Told, now_ms: u64) {
        if told.account.len().saturating_add(told.model.len()) > 4 * LONGEST_NAME {
            return;
        }
        let at_ms = now_ms.saturating_sub(told.age_ms);
        let of = (told.account, told.model);
        if self.rooms.get(&of).is_some_and(|noted| noted.at_ms > at_ms) {
            return;
        }
        self.rooms.insert(of, Noted { room: told.room, at_ms });
        if self.rooms.len() > MAX_ROOMS {
            let oldest = self.rooms.iter().min_by_key(|(_, noted)| noted.at_ms).map(|(name, _)| name.clone());
            oldest.map(|name| self.rooms.remove(&name));
        }
    }

    /// Forgets what an account has left. Gives the names that its states with these models have.
    pub fn forget_rooms(&mut self, account: &str) -> Vec<String> {
        let gone = self.rooms.extract_if(.., |(of, _), _| of == account);
        gone.map(|((_, model), _)| format!("m/{account}/{model}")).filter(|name| name.len() <= LONGEST_NAME).collect()
    }

    /// What an account has left, by model.
    pub fn rooms_of(&self, account: &str, now_ms: u64) -> Vec<(&str, Noted)> {
        let from = self.rooms.range((account.to_owned(), String::new())..);
        let of_account = from.take_while(|((of, _), _)| of == account);
        let fresh = of_account.filter(|(_, noted)| noted.at_ms.saturating_add(ROOM_MS) > now_ms);
        fresh.map(|((_, model), noted)| (model.as_str(), *noted)).collect()
    }
}

fn cooled(name: &str, entry: Entry, now_ms: u64) -> Cooled {
    Cooled { name: name.to_owned(), state: Some(entry.state), ms: entry.left_ms(now_ms).unwrap_or(DAY_MS), probe: entry.probe }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(name: &str, state: State, ms: u64) -> Cooled {
        Cooled { name: name.to_owned(), state: Some(state), ms, probe: false }
    }

    #[test]
    fn the_worse_state_and_the_longer_deadline_stay() {
        let mut known = Known::default();
        let until = |known: &Known| known.get("c/a").map(|entry| (entry.state, entry.until_ms));
        assert_eq!(known.take(&news("c/a", State::RateLimited, 500), 100), Change::Worse);
        assert_eq!(known.take(&news("c/a", State::RateLimited, 300), 100), Change::Nothing, "never shortened");
        assert_eq!(known.take(&news("c/a", State::RateLimited, 300), 400), Change::Differs);
        assert_eq!(until(&known), Some((State::RateLimited, Some(700))));
        assert_eq!(known.take(&news("c/a", State::Overloaded, 9_000), 400), Change::Nothing, "the milder one of two");
        assert_eq!(known.take(&news("c/a", State::Exhausted, 10), 400), Change::Worse, "the worse one, also if it is shorter");
        assert_eq!(known.take(&news("c/a", State::RateLimited, 50), 411), Change::Differs, "what is over keeps nothing off");
        assert_eq!(known.take(&news("c/a", State::Exhausted, 100), 500), Change::Worse);
        assert_eq!(known.take(&news("c/a", State::Exhausted, 100), 700), Change::Differs, "the same again is no news to a person");
        assert_eq!(known.take(&Cooled { state: None, ..news("c/a", State::Rejected, 0) }, 700), Change::Differs);
        assert_eq!((until(&known), known.clear("c/a")), (None, false));
    }

    #[test]
    fn what_is_rejected_has_no_end() {
        let mut known = Known::default();
        known.take(&news("c/a", State::Rejected, 5), 0);
        known.take(&news("c/a", State::Exhausted, 1 << 50), u64::MAX - 1);
        known.forget(u64::MAX);
        assert_eq!(known.tell("c/a", u64::MAX), Some(news("c/a", State::Rejected, DAY_MS)));
        assert_eq!(*known.rejected(), HashSet::from(["c/a".to_owned()]));
        known.clear("c/a");
        assert!(known.rejected().is_empty());
        assert_eq!(known.tell("c/a", 0), Some(Cooled { state: None, ms: 0, ..news("c/a", State::Rejected, 0) }), "gates are told so");
    }

    #[test]
    fn a_credential_has_its_own_states_and_its_account_s() {
        let mut known = Known::default();
        for (name, state) in [
            ("c/one", State::Rejected),
            ("a/org/openai/acme", State::Exhausted),
            ("m/org/openai/acme/gpt/4", State::RateLimited),
            ("m/org/openai/acme2/gpt-4o", State::RateLimited),
            ("m/one/gpt-4o", State::RateLimited),
            ("p/openai/gpt-4o", State::Overloaded),
            ("m/0011", State::RateLimited),
        ] {
            known.take(&news(name, state, 1_000), 0);
        }
        let of: Vec<_> = known.of("one", "org/openai/acme", 0).into_iter().map(|(model, entry)| (model, entry.state)).collect();
        assert_eq!(of, [(None, State::Rejected), (None, State::Exhausted), (Some("gpt/4"), State::RateLimited)]);
        assert_eq!(known.names_of("one", "org/openai/acme"), ["c/one", "a/org/openai/acme", "m/org/openai/acme/gpt/4", "m/0011"]);
        assert_eq!(known.of("one", "org/openai/acme", 1_000).len(), 1, "only what stands");
        assert_eq!(known.everything(1_000).len(), 1);
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let mut known = Known::default();
        known.take(&news("c/bad", State::Rejected, 0), 0);
        for n in 0..2 * MAX_NAMES as u64 {
            known.take(&news(&format!("m/a/{n}"), State::RateLimited, 1_000 + n), 0);
            let room = Told { account: "a".to_owned(), model: n.to_string(), room: Room::default(), age_ms: 0 };
            known.note_room(room, n);
        }
        assert_eq!((known.everything(0).len(), known.rooms.len()), (MAX_NAMES, MAX_ROOMS));
        assert!(known.get("c/bad").is_some() && known.get("m/a/0").is_none(), "those that end first went");
        known.take(&news(&"x".repeat(LONGEST_NAME + 1), State::Rejected, 1), 0);
        assert_eq!(known.rejected().len(), 1);
        known.forget(1 << 40);
        assert_eq!((known.entries.len(), known.rooms.len()), (1, 0));
    }
}
