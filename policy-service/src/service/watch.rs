//! Revocation and change push: after every change that may forbid what is running, what is running is judged anew, and what
//! may not go on is told to every Envoy that asks for news.
//!
//! The news are a log in memory, with an epoch of this process's own. Whoever asks from another epoch, from before the log or
//! from nowhere gets everything judged on the spot: that is what makes restarts and lost answers harmless.

use super::{Service, ServiceError, now_ms};
use crate::directory::Directory;
use crate::metrics::handles;
use crate::store::{Held, KeyRow, Running, StoreError};
use crate::vault::random;
use keyward_core::admission::{self, Allow};
use keyward_core::edge::{Ask, RequestId};
use keyward_core::hex;
use keyward_core::money::Nanodollars;
use keyward_core::refusal::Code;
use keyward_core::watch::{End, HOLD_MS, WatchAnswer};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};

/// News that are kept: whoever is further behind is told everything.
const MAX_LOG: usize = 8_192;
/// News in one answer, unless it tells everything.
const MAX_ANSWER: usize = 1_000;
/// Wait after the store failed to say what is running.
const RETRY: Duration = Duration::from_millis(100);

/// What must be judged anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changed {
    keys: BTreeSet<String>,
    all: bool,
    /// A change may have happened of which nobody here waits for the end.
    uncertain: bool,
}

impl Changed {
    pub fn key(id: &str) -> Self {
        Changed { keys: BTreeSet::from([id.to_owned()]), ..Changed::default() }
    }

    /// Anybody's requests may be concerned.
    pub fn all() -> Self {
        Changed { all: true, ..Changed::default() }
    }

    fn uncertain() -> Self {
        Changed { all: true, uncertain: true, ..Changed::default() }
    }

    fn is_nothing(&self) -> bool {
        !self.all && self.keys.is_empty()
    }

    fn add(&mut self, other: Changed) {
        self.keys.extend(other.keys);
        self.all |= other.all;
        self.uncertain |= other.uncertain;
    }
}

/// The log, and what waits to be judged.
pub(super) struct Watch {
    epoch: String,
    state: Mutex<State>,
    told: watch::Sender<Told>,
    work: Notify,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Told {
    /// Number of the newest of the news; they count from 1.
    last: u64,
    /// The service stops: nobody is to wait.
    closing: bool,
}

#[derive(Default)]
struct State {
    /// The newest news, oldest first.
    log: VecDeque<End>,
    in_log: HashSet<RequestId>,
    changed: Changed,
    /// When which keys have to be judged because they, or tokens of theirs, expire then.
    due: BTreeMap<u64, BTreeSet<String>>,
}

impl Watch {
    pub fn new() -> Result<Self, ServiceError> {
        let epoch = hex::encode(&random::<8>()?);
        Ok(Watch { epoch, state: Mutex::default(), told: watch::Sender::new(Told::default()), work: Notify::new() })
    }

    /// Nothing is ever left half done under the lock.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number in `EPOCH:NUMBER`, if it is a place in this log.
    fn place(&self, since: &str) -> Option<u64> {
        let (epoch, number) = since.split_once(':')?;
        number.parse().ok().filter(|_| epoch == self.epoch)
    }

    fn at(&self, number: u64) -> String {
        format!("{}:{number}", self.epoch)
    }

    /// What came after a place. `None`: the log does not go back so far.
    fn after(&self, place: u64) -> Option<WatchAnswer> {
        let state = self.state();
        let last = self.told.borrow().last;
        let missing = usize::try_from(last.checked_sub(place)?).ok()?;
        let from = state.log.len().checked_sub(missing)?;
        let end: Vec<End> = state.log.iter().skip(from).take(MAX_ANSWER).copied().collect();
        Some(WatchAnswer { since: self.at(place + end.len() as u64), end })
    }

    /// Adds what has not been told yet.
    fn tell(&self, ends: Vec<End>) {
        let mut state = self.state();
        let mut told = 0;
        for end in ends {
            if !state.in_log.insert(end.req) {
                continue;
            }
            state.log.push_back(end);
            told += 1;
            handles().told_to_end(end.code);
            if state.log.len() > MAX_LOG
                && let Some(oldest) = state.log.pop_front()
            {
                state.in_log.remove(&oldest.req);
            }
        }
        if told > 0 {
            // Under the lock: the number and the log are one.
            self.told.send_modify(|now| now.last += told);
        }
    }

    fn changed(&self, changed: Changed) {
        self.state().changed.add(changed);
        self.work.notify_one();
    }

    /// What must be judged now, what has come due included.
    fn take_changed(&self, now_ms: u64) -> Changed {
        let mut state = self.state();
        let later = state.due.split_off(&now_ms.saturating_add(1));
        let due = std::mem::replace(&mut state.due, later);
        let mut changed = std::mem::take(&mut state.changed);
        changed.keys.extend(due.into_values().flatten());
        changed
    }

    fn next_due_ms(&self) -> Option<u64> {
        self.state().due.first_key_value().map(|(at, _)| *at)
    }

    fn will_be_due(&self, due: BTreeMap<u64, BTreeSet<String>>) {
        let mut state = self.state();
        for (at, keys) in due {
            state.due.entry(at).or_default().extend(keys);
        }
    }
}

/// A change under way. If it is dropped before its end is known (the caller of the API has gone), it may still happen.
pub(super) struct Changing<'a> {
    watch: &'a Watch,
    known: bool,
}

impl Changing<'_> {
    /// It has happened.
    pub fn done(mut self, changed: Changed) {
        self.known = true;
        self.watch.changed(changed);
    }

    /// It has not.
    pub fn nothing(mut self) {
        self.known = true;
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        if !self.known {
            self.watch.changed(Changed::uncertain());
        }
    }
}

impl Service {
    /// Before a change that may forbid what is running.
    pub(super) fn changing(&self) -> Changing<'_> {
        Changing { watch: &self.watch, known: false }
    }

    /// What these keys have running, or everybody, is to be judged anew.
    pub(super) fn changed(&self, changed: Changed) {
        self.watch.changed(changed);
    }

    /// Makes a change of a key in the store, and has what the key has running judged anew.
    pub(super) async fn changing_key<T>(&self, id: &str, write: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        let changing = self.changing();
        let outcome = write.await?;
        changing.done(Changed::key(id));
        Ok(outcome)
    }

    /// News after `since`: at once if there are any, else when some come, or none after a while.
    pub async fn news(&self, since: Option<&str>) -> Result<WatchAnswer, ServiceError> {
        handles().watch_polls.increment(1);
        let Some(place) = since.and_then(|since| self.watch.place(since)) else { return self.everything().await };
        let mut told = self.watch.told.subscribe();
        let until = Instant::now() + Duration::from_millis(HOLD_MS);
        loop {
            let closing = told.borrow_and_update().closing;
            let Some(answer) = self.watch.after(place) else { return self.everything().await };
            if closing || !answer.end.is_empty() {
                return Ok(answer);
            }
            tokio::select! {
                _ = told.changed() => {}
                () = sleep_until(until) => return Ok(answer),
            }
        }
    }

    /// All that may not go on, whoever knows of it already.
    async fn everything(&self) -> Result<WatchAnswer, ServiceError> {
        handles().watch_everything.increment(1);
        // What changes from here on is in the log after this place.
        let last = self.watch.told.borrow().last;
        let judged = judge(&self.store.running(None).await?, &self.memory().directory, now_ms());
        self.watch.will_be_due(judged.due);
        self.watch.work.notify_one();
        Ok(WatchAnswer { since: self.watch.at(last), end: judged.end })
    }

    /// Whoever waits for news is answered now, and nobody waits any more.
    pub fn end_watches(&self) {
        self.watch.told.send_modify(|told| told.closing = true);
    }

    /// Judges what is running after each change. It never returns.
    pub async fn watch_changes(&self) {
        loop {
            let now = now_ms();
            let changed = self.watch.take_changed(now);
            if changed.is_nothing() {
                let due = self.watch.next_due_ms().map(|at| Duration::from_millis(at.saturating_sub(now)));
                tokio::select! {
                    () = self.watch.work.notified() => {}
                    () = sleep(due.unwrap_or(Duration::MAX)) => {}
                }
                continue;
            }
            if let Err(error) = self.judge_anew(&changed).await {
                tracing::error!(%error, "what is running could not be judged after a change; it is tried again");
                self.watch.changed(changed);
                sleep(RETRY).await;
            }
        }
    }

    async fn judge_anew(&self, changed: &Changed) -> Result<(), ServiceError> {
        if changed.uncertain {
            // Changes are written in the order in which they were asked for: once this is written, so are they.
            self.store.ready().await?;
            self.reload().await?;
        }
        let running = self.store.running(Some(changed.keys.clone()).filter(|_| !changed.all)).await?;
        let judged = judge(&running, &self.memory().directory, now_ms());
        self.watch.will_be_due(judged.due);
        self.watch.tell(judged.end);
        Ok(())
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Judged {
    end: Vec<End>,
    /// When what may go on now has to be judged again.
    due: BTreeMap<u64, BTreeSet<String>>,
}

/// Judges running requests by the rules as they are now.
fn judge(running: &Running, directory: &Directory, now_ms: u64) -> Judged {
    let mut judged = Judged::default();
    let mut left: HashMap<&str, Vec<&Held>> = HashMap::new();
    for request in &running.requests {
        let Some(key) = running.keys.get(&request.key_id) else { continue };
        match may_go_on(key, request, directory, now_ms) {
            Ok(()) => {
                for at in [key.expires_ms, request.token_expires_ms].into_iter().flatten() {
                    judged.due.entry(at).or_default().insert(request.key_id.clone());
                }
                left.entry(&request.key_id).or_default().push(request);
            }
            Err(code) => judged.end.push(End { req: request.req, code }),
        }
    }
    for (key_id, requests) in left {
        let Some(key) = running.keys.get(key_id) else { continue };
        let over = over_cap(key, requests);
        judged.end.extend(over.into_iter().map(|request| End { req: request.req, code: Code::CapExhausted }));
    }
    judged
}

fn may_go_on(key: &KeyRow, request: &Held, directory: &Directory, now_ms: u64) -> Result<(), Code> {
    admission::standing(key.status, key.expires_ms, now_ms).map_err(|refusal| refusal.code)?;
    if request.token_expires_ms.is_some_and(|at| at <= now_ms) {
        return Err(Code::Revoked);
    }
    let organisation = directory.organisations.get(&key.organisation).ok_or(Code::PolicyUnavailable)?;
    if !organisation.is_enabled(&request.provider) {
        return Err(Code::UnknownProvider);
    }
    // Without its team or policy nobody knows what the key may do.
    let limits = organisation.limits(key.team.as_deref(), key.policy.as_deref()).ok_or(Code::PolicyUnavailable)?;
    // An earlier version did not write down what its requests called.
    if request.endpoint.is_empty() {
        return Ok(());
    }
    let lists: Vec<&Allow> = std::iter::once(&key.allow).chain(&limits).collect();
    let ask =
        Ask { provider: request.provider.clone(), endpoint: request.endpoint.clone(), model: request.asked.clone(), ..Ask::default() };
    let upstream = Some(request.model.as_str()).filter(|model| !model.is_empty());
    admission::may_go_on(&lists, &ask, upstream).map_err(|refusal| refusal.code)
}

/// The newest of a key's requests whose holds are more than its cap has room for. A cap is reached by admissions only up to its
/// last nanodollar: it has been lowered.
fn over_cap<'a>(key: &KeyRow, mut requests: Vec<&'a Held>) -> Vec<&'a Held> {
    let Some(cap) = key.cap else { return Vec::new() };
    let mut total = key.spent.plus(key.reserved);
    requests.sort_by_key(|request| std::cmp::Reverse((request.expires_ms, request.req.0)));
    let newest = requests.into_iter().filter(|request| request.hold > Nanodollars::ZERO);
    let must_go = |request: &&Held| {
        let over = total > cap;
        if over {
            total = total.minus(request.hold);
        }
        over
    };
    newest.take_while(must_go).collect()
}
