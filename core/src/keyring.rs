//! Which credentials can be used now, and which is best: what all VMs of an Envoy process know of them together.
//!
//! A state is kept under a name that says what it holds for (an account and model, a whole account, one credential, a provider
//! and model). All of them stand in one table in shared data, changed by compare-and-swap, so that a key that was cooled by one
//! worker is cooled for all at once. What an account has left, by the provider's own headers, stands in slots beside it.

mod room;
mod table;

pub use room::{Rooms, Told};
pub use table::{Entry, LONGEST_NAME, TABLE};

use crate::edge::{Cooled, PlanCredential};
use crate::ring::SharedData;
use crate::verdict::{Room, Scope, State, Verdict};
use std::collections::HashMap;
use table::Table;

/// A provider and model, as the names of states have them.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    pub provider: &'a str,
    /// The provider's name of the model; empty where the operation has none.
    pub model: &'a str,
}

impl At<'_> {
    /// The name under which a state of this scope is kept.
    pub fn name(&self, credential: &PlanCredential, scope: Scope) -> String {
        let name = match scope {
            Scope::Model => format!("m/{}/{}", credential.account(), self.model),
            Scope::Account => format!("a/{}", credential.account()),
            Scope::Credential => format!("c/{}", credential.id),
            Scope::Provider => format!("p/{}/{}", self.provider, self.model),
        };
        table::fitting(name)
    }

    fn names(&self, credential: &PlanCredential) -> [String; 4] {
        [Scope::Model, Scope::Account, Scope::Credential, Scope::Provider].map(|scope| self.name(credential, scope))
    }
}

/// Why no credential can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unusable {
    /// Milliseconds until the first of them can be.
    pub wait_ms: u64,
    /// The state that ends last among those that end first: what the caller is told of.
    pub state: State,
}

/// How long a state is kept in an Envoy at most. Whether a rejected credential is used again is the service's to say; should its word be
/// lost, one request finds out.
fn longest_here_ms(state: State) -> u64 {
    if state == State::Rejected { 300_000 } else { u64::MAX }
}

/// One VM's view of all credentials. All times are milliseconds of a monotonic clock that the VMs of a process share.
#[derive(Debug, Default)]
pub struct Keyring {
    table: Table,
    rooms: Rooms,
    /// Tries that run in this VM, by account.
    running: HashMap<String, u32>,
    turn: usize,
    /// What the service has not been told yet.
    news: HashMap<String, Entry>,
    /// Names that work again, and that the service has not been told of.
    freed: Vec<String>,
}

impl Keyring {
    /// The best usable credential of those not yet `tried`; its try counts as running. `in_order`: the first usable one is taken,
    /// whatever the others have left.
    pub fn choose(
        &mut self,
        shared: &impl SharedData,
        at: At<'_>,
        pool: &[PlanCredential],
        tried: &[bool],
        in_order: bool,
        now_ms: u64,
    ) -> Result<usize, Option<Unusable>> {
        self.table.refresh(shared);
        let untried = |index: &usize| !tried.get(*index).copied().unwrap_or(false);
        let mut refused: Option<Unusable> = None;
        let mut usable = Vec::new();
        for (index, credential) in pool.iter().enumerate().filter(|(index, _)| untried(index)) {
            match self.blocked(at, credential, now_ms) {
                None => usable.push(index),
                Some(unusable) if refused.is_none_or(|sooner| unusable.wait_ms < sooner.wait_ms) => refused = Some(unusable),
                Some(_) => {}
            }
        }
        if !in_order && usable.len() > 1 {
            self.turn = self.turn.wrapping_add(1);
            let turn = self.turn;
            let count = usable.len();
            // Of equals it is another one's turn each time.
            usable.rotate_left(turn % count);
            let score = |index: &usize| {
                let credential = pool.get(*index)?;
                let running = self.running.get(credential.account()).copied().unwrap_or(0);
                Some(self.rooms.score(shared, credential.account(), at.model, running, now_ms))
            };
            let mut scored: Vec<(Option<(u64, u32)>, usize)> = usable.iter().map(|index| (score(index), *index)).collect();
            scored.sort_by_key(|(score, _)| score.map(|(left, running)| (std::cmp::Reverse(left), running)));
            usable = scored.into_iter().map(|(_, index)| index).collect();
        }
        for index in usable {
            let Some(credential) = pool.get(index) else { continue };
            // One that is only guessed to work again is probed by one request.
            if self.table.is_empty() || at.names(credential).iter().all(|name| self.table.lease(shared, name, now_ms)) {
                if pool.len() > 1 {
                    *self.running.entry(credential.account().to_owned()).or_default() += 1;
                }
                return Ok(index);
            }
            let waits = Unusable { wait_ms: table::PROBE_MS, state: State::RateLimited };
            if refused.is_none_or(|sooner| waits.wait_ms < sooner.wait_ms) {
                refused = Some(waits);
            }
        }
        Err(refused)
    }

    /// Whether one of the credentials not yet tried can be used now, and if not, when.
    pub fn look(
        &mut self,
        shared: &impl SharedData,
        at: At<'_>,
        pool: &[PlanCredential],
        tried: &[bool],
        now_ms: u64,
    ) -> Result<(), Option<Unusable>> {
        self.table.refresh(shared);
        let mut soonest: Option<Unusable> = None;
        for (_, credential) in pool.iter().enumerate().filter(|(index, _)| !tried.get(*index).copied().unwrap_or(false)) {
            match self.blocked(at, credential, now_ms) {
                None => return Ok(()),
                Some(unusable) if soonest.is_none_or(|sooner| unusable.wait_ms < sooner.wait_ms) => soonest = Some(unusable),
                Some(_) => {}
            }
        }
        Err(soonest)
    }

    /// What keeps a credential from being used now, and for how long.
    fn blocked(&self, at: At<'_>, credential: &PlanCredential, now_ms: u64) -> Option<Unusable> {
        if self.table.is_empty() {
            return None;
        }
        let states = at.names(credential).into_iter().filter_map(|name| self.table.get(&name).filter(|entry| entry.until_ms > now_ms));
        let last = states.max_by_key(|entry| entry.until_ms)?;
        Some(Unusable { wait_ms: last.until_ms - now_ms, state: last.state })
    }

    /// A try on this credential is over.
    pub fn done(&mut self, account: &str) {
        if let Some(running) = self.running.get_mut(account) {
            *running -= 1;
            if *running == 0 {
                self.running.remove(account);
            }
        }
    }

    /// The provider's answer said that the credential, its account or the provider can't be used for a while.
    pub fn cool(&mut self, shared: &impl SharedData, at: At<'_>, credential: &PlanCredential, verdict: Verdict, now_ms: u64) {
        let name = at.name(credential, verdict.scope);
        let until_ms = now_ms.saturating_add(verdict.wait_ms.min(longest_here_ms(verdict.state)));
        let entry = Entry { state: verdict.state, until_ms, probe: !verdict.told, since_ms: now_ms };
        // One overloaded answer among many good ones is no reason to stop, unless the provider asks for it.
        if verdict.told || verdict.state != State::Overloaded {
            self.table.add(shared, &name, entry, now_ms);
        }
        // The service is told the whole of it; what is kept here ends earlier, so that nothing stays for ever that the service has forgotten.
        let whole = Entry { until_ms: now_ms.saturating_add(verdict.wait_ms), ..entry };
        self.news.insert(name, whole);
    }

    /// A try that began at `began_ms` worked: what stood against the credential before is over.
    pub fn worked(&mut self, shared: &impl SharedData, at: At<'_>, credential: &PlanCredential, began_ms: u64, now_ms: u64) {
        self.table.refresh(shared);
        if self.table.is_empty() {
            return;
        }
        for name in at.names(credential) {
            if self.table.get(&name).is_some_and(|entry| entry.since_ms < began_ms) && self.table.remove(shared, &name, began_ms, now_ms) {
                self.news.remove(&name);
                self.freed.push(name);
            }
        }
    }

    /// What the account has left, as an answer told.
    pub fn has_left(
        &mut self,
        shared: &impl SharedData,
        at: At<'_>,
        credential: &PlanCredential,
        room: Room,
        is_shared: bool,
        now_ms: u64,
    ) {
        self.rooms.note(shared, credential.account(), at.model, room, is_shared, now_ms);
    }

    /// What other Envoys or an operator have told the service.
    pub fn heard(&mut self, shared: &impl SharedData, news: &[Cooled], now_ms: u64) {
        for cooled in news {
            match cooled.state {
                Some(state) => {
                    let until_ms = now_ms.saturating_add(cooled.ms.min(longest_here_ms(state)));
                    self.table.add(shared, &cooled.name, Entry { state, until_ms, probe: cooled.probe, since_ms: now_ms }, now_ms);
                }
                None => {
                    self.table.remove(shared, &cooled.name, now_ms, now_ms);
                }
            }
        }
    }

    /// What the service is to be told, once.
    pub fn report(&mut self, now_ms: u64) -> Vec<Cooled> {
        let freed = std::mem::take(&mut self.freed).into_iter().map(|name| Cooled { name, state: None, ms: 0, probe: false });
        let news = std::mem::take(&mut self.news).into_iter();
        let cooled = news.map(|(name, entry)| Cooled {
            name,
            state: Some(entry.state),
            ms: entry.until_ms.saturating_sub(now_ms),
            probe: entry.probe,
        });
        freed.chain(cooled).collect()
    }

    /// A report did not arrive: it is made again, unless there is newer news.
    pub fn not_reported(&mut self, report: Vec<Cooled>, now_ms: u64) {
        for Cooled { name, state, ms, probe } in report {
            match state {
                Some(state) => {
                    self.news.entry(name).or_insert(Entry { state, until_ms: now_ms.saturating_add(ms), probe, since_ms: now_ms });
                }
                None if !self.news.contains_key(&name) => self.freed.push(name),
                None => {}
            }
        }
    }

    /// Whether there is something to report.
    pub fn has_news(&self) -> bool {
        !self.news.is_empty() || !self.freed.is_empty()
    }

    pub fn rooms(&mut self) -> &mut Rooms {
        &mut self.rooms
    }
}
