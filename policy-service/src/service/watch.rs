//! Revocation and change push: after every change that may forbid what is running, what is running is judged anew, and what
//! may not go on is told to every Envoy that asks for news.
//!
//! The news are a log in memory, with an epoch of this process's own. Whoever asks from another epoch, from before the log or
//! from nowhere gets everything judged on the spot: that is what makes restarts and lost answers harmless.

use super::{Service, ServiceError, now_ms};
use crate::directory::{Directory, Organisation};
use crate::metrics::handles;
use crate::store::{Held, KeyRow, Running, StoreError, organisation_account, team_account};
use crate::vault::random;
use keyward_core::admission::{self, Aim, Allow};
use keyward_core::edge::{Ask, RequestId};
use keyward_core::hex;
use keyward_core::limits::{Account, Enforce, Limits};
use keyward_core::money::Nanodollars;
use keyward_core::operation::Operation;
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

/// What came after a place.
#[derive(Debug, Default, PartialEq, Eq)]
struct After {
    /// Where to go on.
    place: u64,
    end: Vec<End>,
    /// Names of states of credentials that have changed.
    states: Vec<String>,
}

#[derive(Default)]
struct State {
    /// The newest ends, oldest first, each with its number.
    log: VecDeque<(u64, End)>,
    in_log: HashSet<RequestId>,
    /// Names of states of credentials that have changed, by the number of the last change.
    states: BTreeMap<u64, String>,
    /// Where each of them stands there.
    in_states: HashMap<String, u64>,
    /// The newest number that is not in the log any more.
    forgotten: u64,
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
    fn after(&self, place: u64) -> Option<After> {
        let state = self.state();
        let last = self.told.borrow().last;
        if place > last || place < state.forgotten {
            return None;
        }
        let from = state.log.partition_point(|(number, _)| *number <= place);
        let ends = state.log.range(from..).map(|(number, end)| (*number, Ok(*end)));
        let states = state.states.range(place + 1..).map(|(number, name)| (*number, Err(name.clone())));
        // Each of the two is in order; one more than an answer holds says that there are more.
        let mut news: Vec<(u64, Result<End, String>)> = ends.take(MAX_ANSWER + 1).chain(states.take(MAX_ANSWER + 1)).collect();
        news.sort_by_key(|(number, _)| *number);
        let is_all = news.len() <= MAX_ANSWER;
        news.truncate(MAX_ANSWER);
        let mut after = After { place: news.last().map(|(number, _)| *number).filter(|_| !is_all).unwrap_or(last), ..After::default() };
        for (_, one) in news {
            match one {
                Ok(end) => after.end.push(end),
                Err(name) => after.states.push(name),
            }
        }
        Some(after)
    }

    /// Names of states that have changed lately.
    fn changed_states(&self) -> Vec<String> {
        self.state().states.values().cloned().collect()
    }

    /// States of credentials have changed. How, is looked up when it is told: only the newest counts.
    pub fn tell_states(&self, names: Vec<String>) {
        let mut state = self.state();
        let mut last = self.told.borrow().last;
        for name in names {
            last += 1;
            if let Some(before) = state.in_states.insert(name.clone(), last) {
                state.states.remove(&before);
            }
            state.states.insert(last, name);
            if state.states.len() > MAX_LOG
                && let Some((number, name)) = state.states.pop_first()
            {
                state.in_states.remove(&name);
                state.forgotten = state.forgotten.max(number);
            }
        }
        self.told.send_modify(|now| now.last = last);
    }

    /// Adds what has not been told yet.
    fn tell(&self, ends: Vec<End>) {
        let mut state = self.state();
        let (last, mut told) = (self.told.borrow().last, 0);
        for end in ends {
            if !state.in_log.insert(end.req) {
                continue;
            }
            told += 1;
            state.log.push_back((last + told, end));
            handles().told_to_end(end.code);
            if state.log.len() > MAX_LOG
                && let Some((number, oldest)) = state.log.pop_front()
            {
                state.in_log.remove(&oldest.req);
                state.forgotten = state.forgotten.max(number);
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
            let Some(After { place: next, end, states }) = self.watch.after(place) else { return self.everything().await };
            let cooled = self.key_states.tell(states.iter().map(String::as_str));
            let answer = WatchAnswer { since: self.watch.at(next), end, cooled };
            if closing || !answer.end.is_empty() || !answer.cooled.is_empty() {
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
        let cooled = self.key_states.everything(self.watch.changed_states().iter().map(String::as_str));
        Ok(WatchAnswer { since: self.watch.at(last), end: judged.end, cooled })
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
    let mut left = Vec::new();
    for request in &running.requests {
        let Some(key) = running.keys.get(&request.key_id) else { continue };
        match may_go_on(key, request, directory, now_ms) {
            Ok(()) => {
                for at in [key.expires_ms, request.token_expires_ms].into_iter().flatten() {
                    judged.due.entry(at).or_default().insert(request.key_id.clone());
                }
                left.push((key, request));
            }
            Err(code) => judged.end.push(End { req: request.req, code }),
        }
    }
    judged.end.extend(over_caps(running, left, directory).into_iter().map(|req| End { req, code: Code::CapExhausted }));
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
    if request.endpoint.is_empty() || is_in_shadow(key, organisation) {
        return Ok(());
    }
    let lists: Vec<&Allow> = std::iter::once(&key.allow).chain(&limits).collect();
    let dialect = Operation::named(&request.endpoint).map(|operation| operation.dialect).unwrap_or_default();
    let ask = Ask { dialect, endpoint: request.endpoint.clone(), model: request.asked.clone(), ..Ask::default() };
    let aim = Aim { provider: &request.provider, model: Some(request.model.as_str()).filter(|model| !model.is_empty()) };
    admission::may_go_on(&lists, &ask, &[aim]).map_err(|refusal| refusal.code)
}

/// The newest requests whose holds are more than a cap has room for. A cap is reached by admissions only up to its last
/// nanodollar: it has been lowered, or a charge above its hold went over it.
fn over_caps(running: &Running, left: Vec<(&KeyRow, &Held)>, directory: &Directory) -> BTreeSet<RequestId> {
    let mut levels: HashMap<String, (Vec<&Limits>, &Account, Vec<&Held>)> = HashMap::new();
    for (key, request) in left {
        let Some(organisation) = directory.organisations.get(&key.organisation) else { continue };
        if request.hold == Nanodollars::ZERO || is_in_shadow(key, organisation) {
            continue;
        }
        let in_force = &organisation.in_force;
        let policy = key.policy.as_ref().and_then(|policy| in_force.policies.get(policy)).map(|policy| &policy.limits);
        let own = std::iter::once(&key.limits).chain(policy).collect();
        levels.entry(key.id.clone()).or_insert_with(|| (own, &key.account, Vec::new())).2.push(request);
        let team = request.team.as_ref().and_then(|team| Some((team_account(&key.organisation, team), in_force.teams.get(team)?)));
        let shared = team.into_iter().chain([(organisation_account(&key.organisation), &in_force.organisation)]);
        for (id, limits) in shared {
            if let Some(account) = running.accounts.get(&id) {
                levels.entry(id).or_insert_with(|| (vec![limits], account, Vec::new())).2.push(request);
            }
        }
    }
    levels.into_values().flat_map(|(limits, account, requests)| over(&limits, account, requests)).collect()
}

fn over(limits: &[&Limits], account: &Account, mut requests: Vec<&Held>) -> BTreeSet<RequestId> {
    requests.sort_by_key(|request| std::cmp::Reverse((request.expires_ms, request.req)));
    let mut over = BTreeSet::new();
    for budget in limits.iter().flat_map(|limits| &limits.budgets) {
        let sums = account.sums(budget.window);
        let mut total = sums.spent.plus(sums.reserved);
        for request in requests.iter().filter(|request| budget.window.start(request.day) == budget.window.start(account.day)) {
            if total <= budget.cap {
                break;
            }
            total = total.minus(request.hold);
            over.insert(request.req);
        }
    }
    over
}

fn is_in_shadow(key: &KeyRow, organisation: &Organisation) -> bool {
    let policy = key.policy.as_ref().and_then(|policy| organisation.in_force.policies.get(policy));
    key.enforce == Enforce::Shadow || policy.is_some_and(|policy| policy.enforce == Enforce::Shadow)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::patch::LimitsPatch;
    use crate::config::{self, Budget};
    use crate::service::Admitted;
    use crate::service::bed::{credential, started, who};
    use crate::service::keys::{AllowPatch, KeyPatch, KeySpec};
    use crate::store::Expect;
    use keyward_core::edge::{AdmitRequest, Plan, VmId};
    use keyward_core::limits::Window;
    use keyward_core::token::VirtualKey;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::sync::Arc;
    use std::task::Poll;
    use tokio::time::timeout;

    /// Far longer than anything here takes, and shorter than a question is held.
    const SOON: Duration = Duration::from_millis(HOLD_MS - 1_000);

    struct Bed {
        data: tempfile::TempDir,
        running: crate::Running,
        reqs: u8,
    }

    impl Bed {
        async fn new() -> Self {
            let data = tempfile::tempdir().unwrap();
            let running = started(data.path()).await;
            let credential = credential("sk-proj-Watched7Qw8Zx2Vb6Nm1Kj9Hg5Fd3Sa");
            running.service.put_credential(&who(), Some("main"), &credential, Expect::Absent).await.unwrap();
            Bed { data, running, reqs: 0 }
        }

        fn service(&self) -> &Arc<Service> {
            &self.running.service
        }

        async fn key(&self, spec: KeySpec) -> (String, VirtualKey) {
            let (row, token) = self.service().create_key(&who(), spec).await.unwrap();
            (row.id, token)
        }

        /// Has a request running: its id, and the plan that it got.
        async fn admit(&mut self, token: &VirtualKey) -> (RequestId, Plan) {
            let request = self.request(token);
            let req = request.req;
            match self.service().admit(request).await {
                Admitted::Answer(answer) => (req, answer.plan.unwrap()),
                Admitted::Conflict => panic!("a conflict"),
            }
        }

        fn request(&mut self, token: &VirtualKey) -> AdmitRequest {
            self.reqs = self.reqs.wrapping_add(1);
            let req = RequestId([self.reqs; 16]);
            let ask = Ask {
                provider: "openai".to_owned(),
                endpoint: "POST /v1/chat/completions".to_owned(),
                model: Some("gpt-4o-mini".to_owned()),
                bytes: 100,
                max_tokens: Some(1_000),
                choices: 2,
                ..Ask::default()
            };
            AdmitRequest { req, vm: VmId([1; 16]), node: String::new(), token: token.hash().0, need_key: false, trace: None, ask }
        }

        async fn now(&self) -> String {
            self.service().news(None).await.unwrap().since
        }

        /// What comes after a place, and where to go on.
        async fn next(&self, since: &str) -> (Vec<End>, String) {
            let answer = timeout(SOON, self.service().news(Some(since))).await.expect("no news").unwrap();
            (answer.end, answer.since)
        }

        async fn put<T: config::Object>(&self, name: &str, object: serde_json::Value) {
            let object: T = serde_json::from_value(object).unwrap();
            self.service().put_object(&who(), name, &object, Expect::Anything).await.unwrap();
        }
    }

    fn ends(req: RequestId, code: Code) -> Vec<End> {
        vec![End { req, code }]
    }

    #[tokio::test]
    async fn a_revocation_is_news_to_whoever_waits() {
        let mut bed = Bed::new().await;
        let (key, token) = bed.key(KeySpec::default()).await;
        let (_, other) = bed.key(KeySpec::default()).await;
        let (req, _) = bed.admit(&token).await;
        let _ = bed.admit(&other).await;
        let since = bed.now().await;
        let waiting = {
            let (service, since) = (bed.service().clone(), since.clone());
            tokio::spawn(async move { service.news(Some(&since)).await.unwrap() })
        };
        bed.service().revoke_key(&who(), &key, None).await.unwrap();
        let heard = timeout(SOON, waiting).await.unwrap().unwrap();
        assert_eq!(heard.end, ends(req, Code::Revoked), "the other key's request goes on");
        // Who asks later hears it as well, once; who asks from nowhere as long as it runs.
        assert_eq!(bed.next(&since).await, (heard.end.clone(), heard.since));
        bed.service().revoke_key(&who(), &key, None).await.unwrap();
        let everything = bed.service().news(None).await.unwrap();
        assert_eq!((everything.end, everything.since), (heard.end, bed.now().await));
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn after_a_restart_everything_is_told() {
        let mut bed = Bed::new().await;
        let (key, token) = bed.key(KeySpec::default()).await;
        let (req, _) = bed.admit(&token).await;
        let since = bed.now().await;
        bed.service().revoke_key(&who(), &key, None).await.unwrap();
        bed.running.stop().await;
        bed.running = started(bed.data.path()).await;
        for place in [Some(since.as_str()), None, Some("nonsense"), Some("")] {
            assert_eq!(bed.service().news(place).await.unwrap().end, ends(req, Code::Revoked), "{place:?}");
        }
        let (epoch, _) = bed.now().await.split_once(':').map(|(epoch, n)| (epoch.to_owned(), n.to_owned())).unwrap();
        let ahead = format!("{epoch}:99");
        assert_eq!(bed.service().news(Some(&ahead)).await.unwrap().end, ends(req, Code::Revoked), "a place that is not there yet");
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn each_rule_ends_what_it_no_longer_allows() {
        let mut bed = Bed::new().await;
        bed.put::<config::Team>("crew", serde_json::json!({})).await;
        bed.put::<config::Policy>("usual", serde_json::json!({})).await;
        let spec = KeySpec { team: Some("crew".to_owned()), policy: Some("usual".to_owned()), ..KeySpec::default() };
        let (key, token) = bed.key(spec).await;
        let allow = |models: &[&str], endpoints: &[&str]| KeyPatch {
            allow: Some(AllowPatch {
                models: Some(models.iter().map(|s| (*s).to_owned()).collect()),
                endpoints: Some(endpoints.iter().map(|s| (*s).to_owned()).collect()),
            }),
            ..KeyPatch::default()
        };
        let mut since = bed.now().await;
        for (n, code) in [
            Code::ModelNotAllowed,
            Code::EndpointNotAllowed,
            Code::ModelNotAllowed,
            Code::ModelNotAllowed,
            Code::UnknownProvider,
            Code::Revoked,
        ]
        .into_iter()
        .enumerate()
        {
            let (_, fresh) = bed.service().rotate_key(&who(), &key, None, "1h").await.unwrap();
            let (req, _) = bed.admit(&fresh).await;
            // What stays within the rules changes nothing: the next news is of the change after it.
            bed.service().update_key(&who(), &key, None, &allow(&["gpt-4o*"], &["POST /v1/chat/*"])).await.unwrap();
            match n {
                0 => drop(bed.service().update_key(&who(), &key, None, &allow(&["o3"], &[])).await.unwrap()),
                1 => drop(bed.service().update_key(&who(), &key, None, &allow(&[], &["POST /v1/embeddings"])).await.unwrap()),
                2 => bed.put::<config::Policy>("usual", serde_json::json!({ "allow": { "models": ["o3"] } })).await,
                3 => bed.put::<config::Team>("crew", serde_json::json!({ "allow": { "models": ["o3"] } })).await,
                4 => bed.put::<config::ProviderSettings>("openai", serde_json::json!({ "enabled": false })).await,
                _ => drop(bed.service().rotate_key(&who(), &key, None, "0s").await.unwrap()),
            }
            let (end, next) = bed.next(&since).await;
            assert_eq!(end, ends(req, code), "change {n}");
            since = next;
            bed.service().update_key(&who(), &key, None, &allow(&[], &[])).await.unwrap();
            bed.put::<config::Policy>("usual", serde_json::json!({})).await;
            bed.put::<config::Team>("crew", serde_json::json!({})).await;
            bed.put::<config::ProviderSettings>("openai", serde_json::json!({ "enabled": true })).await;
        }
        drop(token);
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_shortened_life_ends_when_it_ends() {
        let mut bed = Bed::new().await;
        let (key, token) = bed.key(KeySpec { expires_in: Some("1h".to_owned()), ..KeySpec::default() }).await;
        let (req, plan) = bed.admit(&token).await;
        assert_eq!(plan.expires_ms, bed.service().key(&who(), &key).await.unwrap().expires_ms, "the gate sees to the life that it had");
        let since = bed.now().await;
        let patch = KeyPatch { expires_in: Some(Some("1s".to_owned())), ..KeyPatch::default() };
        bed.service().update_key(&who(), &key, None, &patch).await.unwrap();
        assert_eq!(bed.next(&since).await.0, ends(req, Code::Expired));
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_lowered_cap_ends_the_newest() {
        let mut bed = Bed::new().await;
        let budget = |usd: &str| vec![Budget { usd: usd.to_owned(), window: "total".to_owned() }];
        let (key, token) = bed.key(KeySpec { budgets: budget("1.00"), ..KeySpec::default() }).await;
        let (first, plan) = bed.admit(&token).await;
        assert_eq!(plan.output_limit, Some(2_000), "over both choices");
        // Holds are told apart by when they expire.
        tokio::time::sleep(Duration::from_millis(3)).await;
        let (second, _) = bed.admit(&token).await;
        let since = bed.now().await;
        let reserved = bed.service().key(&who(), &key).await.unwrap().account.sums(Window::Total).reserved;
        let lower = |cap: i64| KeyPatch {
            limits: LimitsPatch { budgets: Some(Some(budget(&Nanodollars(cap).to_usd()))), ..LimitsPatch::default() },
            ..KeyPatch::default()
        };
        bed.service().update_key(&who(), &key, None, &lower(reserved.0)).await.unwrap();
        bed.service().update_key(&who(), &key, None, &lower(reserved.0 - 1)).await.unwrap();
        let (end, since) = bed.next(&since).await;
        assert_eq!(end, ends(second, Code::CapExhausted), "there is room for one");
        bed.service().update_key(&who(), &key, None, &lower(0)).await.unwrap();
        assert_eq!(bed.next(&since).await.0, ends(first, Code::CapExhausted));
        bed.running.stop().await;
    }

    /// Whoever asks for a revocation may hang up before its answer: what was written is pushed all the same.
    #[tokio::test]
    async fn a_change_whose_caller_has_gone_is_news_too() {
        let mut bed = Bed::new().await;
        let (key, token) = bed.key(KeySpec::default()).await;
        let (req, _) = bed.admit(&token).await;
        let since = bed.now().await;
        {
            let service = bed.service().clone();
            let mut write = pin!(service.changing_key(&key, service.store.revoke_key(crate::service::ORGANISATION, &key, None, "test", 1)));
            poll_fn(|context| {
                assert!(write.as_mut().poll(context).is_pending(), "it was to be dropped half way");
                Poll::Ready(())
            })
            .await;
        }
        assert_eq!(bed.next(&since).await.0, ends(req, Code::Revoked));
        bed.running.stop().await;
    }

    /// An admission takes the rules as they are when it begins; by the time it is written down there may be others, and what is running
    /// may have been judged by them already. None slips through between the two.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn what_is_admitted_while_the_rules_change_is_judged() {
        let mut bed = Bed::new().await;
        bed.put::<config::Policy>("usual", serde_json::json!({})).await;
        let (_, token) = bed.key(KeySpec { policy: Some("usual".to_owned()), ..KeySpec::default() }).await;
        for round in 0..20u8 {
            bed.put::<config::Policy>("usual", serde_json::json!({})).await;
            let mut since = bed.now().await;
            let admissions: Vec<_> = (0..60u8)
                .map(|n| {
                    let service = bed.service().clone();
                    let mut request = bed.request(&token);
                    request.req.0[..2].copy_from_slice(&[round, n]);
                    tokio::spawn(async move {
                        // Some before, some while, some after.
                        tokio::time::sleep(Duration::from_micros(u64::from(n) * 60)).await;
                        let req = request.req;
                        match service.admit(request).await {
                            Admitted::Answer(answer) => answer.plan.map(|_| req),
                            Admitted::Conflict => panic!("a conflict"),
                        }
                    })
                })
                .collect();
            tokio::time::sleep(Duration::from_millis(1)).await;
            bed.put::<config::Policy>("usual", serde_json::json!({ "allow": { "models": ["o3"] } })).await;
            let mut running = HashSet::new();
            for admission in admissions {
                running.extend(admission.await.unwrap());
            }
            while !running.is_empty() {
                let (end, next) = bed.next(&since).await;
                assert!(!end.is_empty(), "in round {round} these run on: {running:?}");
                running.retain(|req| !end.iter().any(|end| end.req == *req));
                since = next;
            }
        }
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn nobody_waits_while_the_service_stops() {
        let bed = Bed::new().await;
        let since = bed.now().await;
        let waiting = {
            let (service, since) = (bed.service().clone(), since.clone());
            tokio::spawn(async move { service.news(Some(&since)).await.unwrap() })
        };
        tokio::task::yield_now().await;
        bed.service().end_watches();
        let answer = timeout(SOON, waiting).await.expect("it waits on").unwrap();
        assert_eq!(answer, WatchAnswer { since, end: Vec::new(), cooled: Vec::new() });
        bed.running.stop().await;
    }

    #[test]
    fn ends_and_states_are_told_in_their_order_and_a_state_once() {
        let watch = Watch::new().unwrap();
        let end = |n: usize| End { req: RequestId((n as u128).to_be_bytes()), code: Code::Revoked };
        let names = |names: &[usize]| names.iter().map(|n| format!("c/{n}")).collect::<Vec<_>>();
        watch.tell_states(names(&[1, 2]));
        watch.tell(vec![end(1)]);
        watch.tell_states(names(&[1]));
        let after = |place: u64| watch.after(place).unwrap();
        assert_eq!(after(0), After { place: 4, end: vec![end(1)], states: names(&[2, 1]) });
        assert_eq!(after(3), After { place: 4, end: vec![], states: names(&[1]) });
        // An answer that is full goes on where it ended, wherever that is among the two.
        let many: Vec<usize> = (10..10 + MAX_ANSWER).collect();
        watch.tell(many.iter().map(|n| end(*n)).collect());
        watch.tell_states(names(&many));
        let (mut place, mut ends, mut states) = (4, 0, 0);
        for _ in 0..2 {
            let after = after(place);
            assert_eq!(after.end.len() + after.states.len(), MAX_ANSWER);
            (place, ends, states) = (after.place, ends + after.end.len(), states + after.states.len());
        }
        assert_eq!(
            (place, ends, states, watch.changed_states().len()),
            (4 + 2 * MAX_ANSWER as u64, MAX_ANSWER, MAX_ANSWER, 2 + MAX_ANSWER)
        );
        // States that change all the time push no end out of the log, and the other way round.
        (0..MAX_LOG).for_each(|_| watch.tell_states(names(&[1])));
        assert_eq!((after(2).end.len(), after(place).states), (MAX_ANSWER, names(&[1])));
    }

    #[test]
    fn a_log_tells_what_it_has_and_owns_up_to_what_it_has_not() {
        let watch = Watch::new().unwrap();
        let end = |n: usize| End { req: RequestId((n as u128).to_be_bytes()), code: Code::Revoked };
        watch.tell(vec![end(1), end(2), end(1)]);
        let told = |place: u64| watch.after(place).map(|answer| answer.end);
        assert_eq!((told(0), told(1)), (Some(vec![end(1), end(2)]), Some(vec![end(2)])));
        assert_eq!((told(2), told(3)), (Some(vec![]), None));
        watch.tell((10..10 + MAX_LOG).map(end).collect());
        assert_eq!(told(1), None, "it does not go back so far");
        let all = watch.after(2).unwrap();
        assert_eq!((all.end.len(), all.place), (MAX_ANSWER, 2 + MAX_ANSWER as u64), "the rest at the next question");
        watch.tell(vec![end(1)]);
        assert_eq!(told(2 + MAX_LOG as u64), Some(vec![end(1)]), "what has left the log can be told again");
    }
}
