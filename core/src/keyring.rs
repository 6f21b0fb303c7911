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

/// Whether a state keeps a credential from being used. One overloaded answer among many good ones does not, unless the provider asks
/// for time.
fn stops(state: State, is_guess: bool) -> bool {
    state != State::Overloaded || !is_guess
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
    /// Names that work again, with the time of the try that showed it; the service has not been told of them.
    freed: Vec<(String, u64)>,
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
        if stops(entry.state, entry.probe) {
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
                self.freed.push((name, began_ms));
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
                Some(state) if !stops(state, cooled.probe) => {}
                Some(state) => {
                    let until_ms = now_ms.saturating_add(cooled.ms.min(longest_here_ms(state)));
                    self.table.add(shared, &cooled.name, Entry { state, until_ms, probe: cooled.probe, since_ms: now_ms }, now_ms);
                }
                None => {
                    // What was found out since then stands.
                    self.table.remove(shared, &cooled.name, now_ms.saturating_sub(cooled.ms), now_ms);
                    // What was left then is no reason to spare it now.
                    Rooms::forget(shared, &cooled.name);
                }
            }
        }
    }

    /// What the service is to be told, once.
    pub fn report(&mut self, now_ms: u64) -> Vec<Cooled> {
        let freed = std::mem::take(&mut self.freed);
        let freed =
            freed.into_iter().map(|(name, began_ms)| Cooled { name, state: None, ms: now_ms.saturating_sub(began_ms), probe: false });
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
                None if !self.news.contains_key(&name) => self.freed.push((name, now_ms.saturating_sub(ms))),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::Secret;
    use crate::ring::shared::Shared;
    use crate::verdict::Left;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const AT: At<'_> = At { provider: "openai", model: "gpt-4o" };

    fn pool(ids: &[&str]) -> Vec<PlanCredential> {
        ids.iter().map(|id| PlanCredential { id: (*id).to_owned(), secret: Secret(format!("sk-{id}")), account: None }).collect()
    }

    fn limited(wait_ms: u64, told: bool) -> Verdict {
        Verdict { state: State::RateLimited, scope: Scope::Model, wait_ms, told }
    }

    fn choose(ring: &mut Keyring, shared: &Shared, pool: &[PlanCredential], now_ms: u64) -> Result<usize, Option<Unusable>> {
        let chosen = ring.choose(shared, AT, pool, &[], false, now_ms);
        if let Ok(place) = chosen {
            ring.done(pool[place].account());
        }
        chosen
    }

    #[test]
    fn a_key_cooled_by_one_vm_is_cooled_for_all_at_once_until_its_time() {
        let shared = Shared::default();
        let (mut one, mut other) = (Keyring::default(), Keyring::default());
        let two = pool(&["a", "b"]);
        one.cool(&shared, AT, &two[0], limited(5_000, true), 1_000);
        for now_ms in [1_000, 3_000, 5_999] {
            for _ in 0..4 {
                assert_eq!(choose(&mut other, &shared, &two, now_ms), Ok(1));
            }
        }
        assert!((0..4).any(|_| choose(&mut other, &shared, &two, 6_000) == Ok(0)), "its time is over");
        let alone = &two[..1];
        let wait = Unusable { wait_ms: 4_000, state: State::RateLimited };
        assert_eq!(choose(&mut other, &shared, alone, 2_000), Err(Some(wait)));
        // Another model of the same account, and the VM's successor after a trap.
        let at = At { model: "gpt-4o-mini", ..AT };
        assert_eq!(Keyring::default().choose(&shared, at, alone, &[], false, 2_000), Ok(0));
        assert_eq!(choose(&mut Keyring::default(), &shared, alone, 2_000), Err(Some(wait)));
    }

    /// "never shortened by an older answer", and the worse state stands.
    #[test]
    fn the_longer_deadline_and_the_worse_state_win() {
        let shared = Shared::default();
        let mut ring = Keyring::default();
        let one = pool(&["a"]);
        let wait = |ring: &mut Keyring, now_ms| choose(ring, &shared, &one, now_ms).unwrap_err().map(|u| (u.state, u.wait_ms));
        ring.cool(&shared, AT, &one[0], limited(30_000, true), 0);
        ring.cool(&shared, AT, &one[0], limited(2_000, true), 100);
        assert_eq!(wait(&mut ring, 1_000), Some((State::RateLimited, 29_000)));
        let spent = Verdict { state: State::Exhausted, scope: Scope::Model, wait_ms: 600_000, told: false };
        ring.cool(&shared, AT, &one[0], spent, 1_000);
        ring.cool(&shared, AT, &one[0], limited(900_000, true), 2_000);
        assert_eq!(wait(&mut ring, 2_000), Some((State::Exhausted, 599_000)));
    }

    #[test]
    fn scopes_reach_as_far_as_they_say() {
        let shared = Shared::default();
        let mut all = pool(&["a", "b", "c"]);
        for credential in &mut all[..2] {
            credential.account = Some("org/openai/shared".to_owned());
        }
        let usable = |ring: &mut Keyring, model| -> Vec<usize> {
            let at = At { model, ..AT };
            (0..3).filter(|n| ring.look(&shared, at, &all[*n..=*n], &[], 10).is_ok()).collect()
        };
        let mut ring = Keyring::default();
        assert_eq!(usable(&mut ring, "gpt-4o"), [0, 1, 2]);
        ring.cool(&shared, AT, &all[0], limited(1_000, true), 0);
        assert_eq!((usable(&mut ring, "gpt-4o"), usable(&mut ring, "o3")), (vec![2], vec![0, 1, 2]), "the account's limit of one model");
        ring.cool(&shared, AT, &all[2], Verdict { state: State::Rejected, scope: Scope::Credential, wait_ms: 1_000, told: false }, 0);
        assert_eq!((usable(&mut ring, "gpt-4o"), usable(&mut ring, "o3")), (vec![], vec![0, 1]));
        ring.cool(&shared, AT, &all[1], Verdict { state: State::Exhausted, scope: Scope::Account, wait_ms: 1_000, told: true }, 0);
        assert_eq!(usable(&mut ring, "o3"), [0; 0], "an account without money has none for any model");
    }

    #[test]
    fn one_overloaded_answer_stops_nothing_unless_the_provider_asks_for_time() {
        let shared = Shared::default();
        let (mut ring, all) = (Keyring::default(), pool(&["a", "b"]));
        let overloaded = |told| Verdict { state: State::Overloaded, scope: Scope::Provider, wait_ms: 3_000, told };
        ring.cool(&shared, AT, &all[0], overloaded(false), 0);
        assert!(choose(&mut ring, &shared, &all, 1).is_ok());
        let report = ring.report(1);
        assert_eq!(report.len(), 1, "it is told all the same");
        ring.heard(&shared, &report, 1);
        assert!(choose(&mut ring, &shared, &all, 1).is_ok(), "nor does it when it comes back as news");
        ring.cool(&shared, AT, &all[0], overloaded(true), 0);
        assert_eq!(choose(&mut ring, &shared, &all, 1), Err(Some(Unusable { wait_ms: 2_999, state: State::Overloaded })));
    }

    #[test]
    fn after_a_guess_one_request_probes_and_the_others_wait() {
        let shared = Shared::default();
        let (mut one, mut other, alone) = (Keyring::default(), Keyring::default(), pool(&["a"]));
        one.cool(&shared, AT, &alone[0], limited(2_000, false), 0);
        assert_eq!(choose(&mut one, &shared, &alone, 2_000), Ok(0), "the probe");
        assert!(choose(&mut other, &shared, &alone, 2_001).is_err());
        assert!(choose(&mut one, &shared, &alone, 2_001).is_err());
        // It works: all may go on. A try that had begun before the state was found out says nothing.
        other.worked(&shared, AT, &alone[0], 0, 2_100);
        assert!(choose(&mut one, &shared, &alone, 2_101).is_err());
        other.worked(&shared, AT, &alone[0], 2_000, 2_100);
        assert_eq!((choose(&mut one, &shared, &alone, 2_101), choose(&mut other, &shared, &alone, 2_101)), (Ok(0), Ok(0)));
        // It does not: the next one is a while later.
        one.cool(&shared, AT, &alone[0], limited(2_000, false), 3_000);
        assert_eq!(choose(&mut one, &shared, &alone, 5_000), Ok(0));
        one.cool(&shared, AT, &alone[0], limited(2_000, false), 5_010);
        assert!(choose(&mut other, &shared, &alone, 7_000).is_err());
        assert_eq!(choose(&mut other, &shared, &alone, 7_010), Ok(0));
        // A probe that never comes back is not waited for for ever.
        assert_eq!(choose(&mut one, &shared, &alone, 7_010 + table::PROBE_MS), Ok(0));
    }

    #[test]
    fn the_account_that_has_most_left_is_taken() {
        let shared = Shared::default();
        let (mut one, mut other, all) = (Keyring::default(), Keyring::default(), pool(&["a", "b", "c"]));
        let left = |limit, remaining| Some(Left { limit: Some(limit), remaining, reset_ms: Some(60_000) });
        let room = |requests, tokens| Room { requests: left(100, requests), tokens: left(10_000, tokens) };
        for (place, room) in [room(10, 9_000), room(80, 100), room(50, 5_000)].into_iter().enumerate() {
            one.has_left(&shared, AT, &all[place], room, true, 0);
        }
        assert!((0..5).all(|_| choose(&mut other, &shared, &all, 10) == Ok(2)));
        // What runs already counts as taken: of 50 places 42 run, so the one with ten has more.
        let running: Vec<usize> = (0..60).map(|_| other.choose(&shared, AT, &all, &[], false, 10).unwrap()).collect();
        assert!(running[..40].iter().all(|place| *place == 2) && running.contains(&0), "{running:?}");
        // Nothing left, and nothing else usable: it is tried rather than refused.
        one.has_left(&shared, AT, &all[0], room(0, 0), true, 20);
        assert_eq!(choose(&mut one, &shared, &all[..1], 30), Ok(0));
        // Figures of a window that is over say nothing.
        let later: std::collections::HashSet<usize> = (0..6).map(|_| choose(&mut one, &shared, &all, 70_000).unwrap()).collect();
        assert!(later.len() > 1, "{later:?}");
        assert_eq!(other.choose(&shared, AT, &all, &[], true, 10), Ok(0), "a sticky choice asks nobody");
    }

    /// An operator has had it used again: it is, although it had nothing left when it was last heard of.
    #[test]
    fn what_an_account_had_left_is_forgotten_with_its_state() {
        let shared = Shared::default();
        let (mut ring, all) = (Keyring::default(), pool(&["a", "b"]));
        let left = |remaining| Room { requests: Some(Left { limit: Some(9), remaining, reset_ms: Some(60_000) }), tokens: None };
        ring.has_left(&shared, AT, &all[0], left(0), true, 0);
        ring.has_left(&shared, AT, &all[1], left(5), true, 0);
        ring.cool(&shared, AT, &all[0], limited(60_000, true), 0);
        let cleared = |name: String| [Cooled { name, state: None, ms: 0, probe: false }];
        ring.heard(&shared, &cleared(AT.name(&all[1], Scope::Credential)), 1);
        assert_eq!(choose(&mut ring, &shared, &all, 1), Ok(1));
        ring.heard(&shared, &cleared(AT.name(&all[0], Scope::Model)), 1);
        assert_eq!(choose(&mut ring, &shared, &all, 1), Ok(0));
    }

    /// Without figures, a crowd spreads over all accounts.
    #[test]
    fn equals_share() {
        let shared = Shared::default();
        let (mut ring, all) = (Keyring::default(), pool(&["a", "b", "c", "d"]));
        let mut taken = [0; 4];
        for _ in 0..40 {
            taken[ring.choose(&shared, AT, &all, &[], false, 0).unwrap()] += 1;
        }
        assert_eq!(taken, [10; 4]);
    }

    #[test]
    fn news_goes_out_once_and_comes_in_from_others() {
        let shared = Shared::default();
        let (mut ring, one) = (Keyring::default(), pool(&["a"]));
        ring.cool(&shared, AT, &one[0], Verdict { state: State::Rejected, scope: Scope::Credential, wait_ms: 86_400_000, told: false }, 0);
        let report = ring.report(1_000);
        let expected = Cooled { name: "c/a".into(), state: Some(State::Rejected), ms: 86_399_000, probe: true };
        assert_eq!((report.as_slice(), ring.report(1_000).len()), ([expected].as_slice(), 0));
        ring.not_reported(report, 1_000);
        assert_eq!(ring.report(1_000).len(), 1, "a report that did not arrive is made again");

        let elsewhere = Shared::default();
        let mut far = Keyring::default();
        far.heard(&elsewhere, &[Cooled { name: "m/a/gpt-4o".into(), state: Some(State::RateLimited), ms: 700, probe: false }], 50);
        assert_eq!(choose(&mut far, &elsewhere, &one, 100), Err(Some(Unusable { wait_ms: 650, state: State::RateLimited })));
        far.heard(&elsewhere, &[Cooled { name: "m/a/gpt-4o".into(), state: None, ms: 0, probe: false }], 100);
        assert_eq!(choose(&mut far, &elsewhere, &one, 100), Ok(0));
    }

    #[test]
    fn a_name_is_the_callers_and_the_table_stays_small() {
        let shared = Shared::default();
        let (mut ring, one) = (Keyring::default(), pool(&["a"]));
        let long = "x".repeat(1_000_000);
        ring.cool(&shared, At { model: &long, ..AT }, &one[0], limited(10_000, true), 0);
        assert!(ring.look(&shared, At { model: &long, ..AT }, &one, &[], 1).is_err());
        for n in 0..2_000 {
            ring.cool(&shared, At { model: &format!("model {n}\n\"\u{7f}"), ..AT }, &one[0], limited(20_000 + n, true), 0);
        }
        assert!(shared.read(TABLE).unwrap().0.len() < 200_000);
        assert!(ring.look(&shared, At { model: "model 1999\n\"\u{7f}", ..AT }, &one, &[], 1).is_err());
        shared.write(TABLE, b"\xff{garbage", 0);
        assert_eq!(choose(&mut ring, &shared, &one, 1), Ok(0), "what can't be read keeps nobody from anything");
    }

    proptest! {
        /// Whatever happens, in whatever order and by however many VMs: no credential is chosen that some VM has been told to
        /// leave alone, and where a choice is refused every credential has a reason, whose end is named.
        #[test]
        fn no_vm_uses_what_another_has_cooled(steps in prop::collection::vec((0..3usize, 0..4usize, 0..5u8, 1..5_000u64), 1..80)) {
            let shared = Shared::default();
            let all = pool(&["a", "b", "c", "d"]);
            let mut rings = [Keyring::default(), Keyring::default(), Keyring::default()];
            let mut until = [0u64; 4];
            let mut now_ms = 0;
            for (vm, place, what, ms) in steps {
                let ring = &mut rings[vm];
                match what {
                    0 | 1 => {
                        ring.cool(&shared, AT, &all[place], limited(ms, true), now_ms);
                        until[place] = until[place].max(now_ms + ms);
                    }
                    2 => now_ms += ms,
                    // An answer to a try that began before any of this.
                    3 => ring.worked(&shared, AT, &all[place], 0, now_ms),
                    _ => match choose(ring, &shared, &all, now_ms) {
                        Ok(chosen) => prop_assert!(until[chosen] <= now_ms, "{chosen} is cooled until {}, it is {now_ms}", until[chosen]),
                        Err(unusable) => {
                            let first = until.iter().min().copied().unwrap_or_default();
                            prop_assert_eq!(unusable.map(|unusable| now_ms + unusable.wait_ms), Some(first));
                        }
                    },
                }
            }
        }
    }
}
