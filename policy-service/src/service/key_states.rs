//! Which credentials can't be used, for all Envoys: what one gate tells goes to all others by the watch, what needs a person is kept
//! over a restart and raises an alarm, and an operator can take it back.

mod known;

use self::known::{Change, Entry, Known, Noted};
use super::access::{Permission, Principal};
use super::{InMemory, Service, ServiceError, moment, now_ms};
use crate::directory::{Directory, Organisation};
use crate::metrics::handles;
use crate::store::{Alarm, KeyState, KeyStateChange};
use keyward_core::edge::{Cooled, News};
use keyward_core::verdict::State;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// For so long after a secret was replaced, a rejection may still be of the old one: requests that were admitted before use it, and
/// may have waited for as long as a policy can let them.
const GRACE_MS: u64 = 70_000;

#[derive(Default)]
pub(super) struct KeyStates {
    board: Mutex<Board>,
    /// What is written stands in the order in which it happened.
    saving: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Board {
    known: Known,
    /// Names whose state the store does not have yet, each with the alarm that goes with it.
    unsaved: BTreeMap<String, Option<Alarm>>,
    /// Names that the store has.
    saved: BTreeSet<String>,
    /// Ids of credentials with a new secret, with their accounts, until when that is new.
    replaced: HashMap<String, (String, u64)>,
}

/// A state of a credential, for whoever looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateNow {
    pub state: State,
    /// `None`: with any model.
    pub model: Option<String>,
    /// Milliseconds; `None`: until an operator acts.
    pub left_ms: Option<u64>,
}

/// What a credential's account has left of a model's limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoomNow {
    pub model: String,
    pub room: keyward_core::verdict::Room,
    /// Milliseconds since the provider said so.
    pub age_ms: u64,
}

impl KeyStates {
    /// Nothing is ever left half done under the lock.
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of what is rejected.
    pub fn rejected(&self) -> Arc<HashSet<String>> {
        self.board().known.rejected()
    }

    /// What gates are told of these names.
    pub fn tell<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<Cooled> {
        let (board, now) = (self.board(), moment().steady_ms);
        names.filter_map(|name| board.known.tell(name, now)).collect()
    }

    /// Everything that stands, for who knows nothing; and of these names also what does not stand any more.
    pub fn everything<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<Cooled> {
        let (board, now) = (self.board(), moment().steady_ms);
        let gone = names.filter_map(|name| board.known.tell(name, now)).filter(|cooled| cooled.state.is_none());
        board.known.everything(now).into_iter().chain(gone).collect()
    }
}

impl Board {
    /// Takes what a gate tells of a name. `false`: nothing that the others have to know.
    fn take(&mut self, cooled: &Cooled, directory: &Directory, now_ms: u64) -> bool {
        if cooled.state == Some(State::Rejected) && self.is_of_old_secret(&cooled.name, now_ms) {
            self.known.clear(&cooled.name);
            // Nobody is to go by it, the gate that told it included.
            return true;
        }
        let change = self.known.take(cooled, now_ms);
        if change == Change::Nothing {
            return false;
        }
        self.must_save(
            &cooled.name,
            (change == Change::Worse).then(|| alarm(&cooled.name, self.known.get(&cooled.name), directory)).flatten(),
        );
        true
    }

    fn is_of_old_secret(&mut self, name: &str, now_ms: u64) -> bool {
        self.replaced.retain(|_, (_, until_ms)| *until_ms > now_ms);
        self.replaced.iter().any(|(id, (account, _))| concerns(name, id, account).is_some())
    }

    /// What stands under a name has to go to the store, if it is of the kind that stands there.
    fn must_save(&mut self, name: &str, alarm: Option<Alarm>) {
        let kept = self.known.get(name).is_some_and(|entry| entry.is_kept());
        if kept || self.saved.contains(name) {
            let waiting = self.unsaved.entry(name.to_owned()).or_default();
            *waiting = alarm.or(waiting.take());
        }
    }

    /// Takes away what stands against a credential, and against its account. Gives the names that the gates have to forget.
    fn clear(&mut self, id: &str, account: &str) -> Vec<String> {
        let mut names: BTreeSet<String> = self.known.names_of(id, account).into_iter().collect();
        for name in &names {
            self.known.clear(name);
            self.must_save(name, None);
        }
        // A gate may know what is not known here, and goes by what it was told to be left.
        names.extend(self.known.forget_rooms(account));
        names.extend([format!("c/{id}"), format!("a/{account}")]);
        names.into_iter().collect()
    }

    /// What the store has to do.
    fn take_unsaved(&mut self, steady_ms: u64) -> Vec<KeyStateChange> {
        let wall_ms = now_ms();
        let unsaved = std::mem::take(&mut self.unsaved);
        let change = |(name, alarm): (String, Option<Alarm>)| {
            let entry = self.known.get(&name).filter(Entry::is_kept);
            let state = entry.map(|entry| KeyState {
                name: name.clone(),
                state: entry.state,
                until_ms: entry.left_ms(steady_ms).map(|left_ms| wall_ms.saturating_add(left_ms)),
                probe: entry.probe,
            });
            match state {
                Some(_) => self.saved.insert(name.clone()),
                None => self.saved.remove(&name),
            };
            KeyStateChange { name, state, alarm }
        };
        unsaved.into_iter().map(change).collect()
    }

    /// The store did not do it: it is to be asked again, unless there is something newer.
    fn not_saved(&mut self, changes: Vec<KeyStateChange>) {
        for KeyStateChange { name, alarm, .. } in changes {
            self.saved.insert(name.clone());
            let waiting = self.unsaved.entry(name).or_default();
            *waiting = waiting.take().or(alarm);
        }
    }
}

impl Service {
    /// Takes what a gate tells that belongs to no record.
    pub(super) async fn take_news(&self, news: News) {
        for (code, count) in &news.refusals {
            handles().edge_refused(code, *count);
        }
        if news.cooled.is_empty() && news.rooms.is_empty() {
            return;
        }
        let (memory, now) = (self.memory(), moment().steady_ms);
        let mut changed = Vec::new();
        {
            let mut board = self.key_states.board();
            for cooled in news.cooled {
                if board.take(&cooled, &memory.directory, now) {
                    changed.push(cooled.name);
                }
            }
            for told in news.rooms {
                board.known.note_room(told, now);
            }
        }
        if !changed.is_empty() {
            self.watch.tell_states(changed);
            self.save_key_states().await;
        }
    }

    /// Brings the store up to date. What it can't take is tried again by the next call.
    pub async fn save_key_states(&self) {
        let _in_order = self.key_states.saving.lock().await;
        let now = moment();
        let changes = self.key_states.board().take_unsaved(now.steady_ms);
        if changes.is_empty() {
            return;
        }
        match self.store.keep_key_states(changes.clone(), now).await {
            Ok(alarms) => super::watched::raised(&alarms),
            Err(error) => {
                tracing::error!(%error, "states of credentials could not be stored; it is tried again");
                self.key_states.board().not_saved(changes);
            }
        }
    }

    /// Forgets what is over. Called every second.
    pub async fn tidy_key_states(&self) {
        let now = moment().steady_ms;
        {
            let mut board = self.key_states.board();
            board.known.forget(now);
            let over: Vec<String> = board.saved.iter().filter(|name| board.known.get(name).is_none()).cloned().collect();
            over.iter().for_each(|name| board.must_save(name, None));
        }
        self.save_key_states().await;
    }

    /// Takes what was kept into memory. What is of no stored credential is forgotten: it has gone, or it is lent anew at each start, and
    /// may have another secret.
    pub(super) async fn load_key_states(&self) -> Result<(), ServiceError> {
        let (rows, memory, now, wall_ms) = (self.store.key_states().await?, self.memory(), moment().steady_ms, now_ms());
        let mut board = self.key_states.board();
        for KeyState { name, state, until_ms, probe } in rows {
            let left_ms = until_ms.map(|until_ms| until_ms.saturating_sub(wall_ms));
            if left_ms != Some(0) && !owners(&name, &memory.directory).is_empty() {
                board.known.put(
                    &name,
                    Entry { state, until_ms: left_ms.map(|left_ms| now.saturating_add(left_ms)), probe, at_ms: now },
                    now,
                );
            }
            board.saved.insert(name);
        }
        Ok(())
    }

    /// Credentials have another secret than before, or are gone: what was known of them is over.
    pub(super) async fn secrets_changed(&self, before: &InMemory, after: &InMemory) {
        let mut names = Vec::new();
        for (id, loaded) in &before.secrets {
            let now = after.secrets.get(id);
            if now.is_some_and(|now| now.secret == loaded.secret) {
                continue;
            }
            let account = |memory: &InMemory| {
                let shared = memory.directory.organisations.values().find_map(|organisation| organisation.accounts.get(id).cloned());
                shared.unwrap_or_else(|| id.clone())
            };
            let mut board = self.key_states.board();
            if now.is_some() {
                let account = account(after);
                names.extend(board.clear(id, &account));
                board.replaced.insert(id.clone(), (account, moment().steady_ms.saturating_add(GRACE_MS)));
            } else {
                // Its account may have others.
                names.extend(board.clear(id, id));
            }
        }
        if !names.is_empty() {
            self.watch.tell_states(names);
            self.save_key_states().await;
        }
    }

    /// Takes back all that stands against a credential, by name or id: it is used again, from the next request on.
    pub async fn reset_credential(&self, who: &Principal, name: &str) -> Result<(), ServiceError> {
        who.needs(Permission::WriteConfiguration)?;
        let organisation = self.organisation(&who.organisation)?;
        let found = organisation.all_credentials().map(|(id, _)| id).find(|id| *id == name || organisation.name_of(id) == Some(name));
        let id = found.ok_or(ServiceError::NotFound("credential"))?;
        let name = organisation.name_of(id).unwrap_or(id);
        self.store.note(&who.organisation, &who.actor(), "reset", &format!("credentials/{name}"), "{}", now_ms()).await?;
        let names = self.key_states.board().clear(id, organisation.plain(id).account());
        self.watch.tell_states(names);
        self.save_key_states().await;
        Ok(())
    }

    /// How a credential stands: what keeps it from being used, the worst first, and what its account has left.
    pub fn standing_of(&self, organisation: &Organisation, id: &str) -> (Vec<StateNow>, Vec<RoomNow>) {
        let (credential, now) = (organisation.plain(id), moment().steady_ms);
        let board = self.key_states.board();
        let mut states: Vec<StateNow> = board
            .known
            .of(id, credential.account(), now)
            .into_iter()
            .map(|(model, entry)| StateNow { state: entry.state, model: model.map(str::to_owned), left_ms: entry.left_ms(now) })
            .collect();
        states.sort_by_key(|now| std::cmp::Reverse((now.state, now.left_ms.unwrap_or(u64::MAX))));
        let room =
            |(model, Noted { room, at_ms }): (&str, Noted)| RoomNow { model: model.to_owned(), room, age_ms: now.saturating_sub(at_ms) };
        (states, board.known.rooms_of(credential.account(), now).into_iter().map(room).collect())
    }

    /// How many credentials can't be used now with at least one model, by provider and state.
    pub(super) fn unusable(&self) -> HashMap<(String, State), u64> {
        let mut counts = HashMap::new();
        for organisation in self.memory().directory.organisations.values() {
            for (id, provider) in organisation.all_credentials() {
                let states: HashSet<State> = self.standing_of(organisation, id).0.into_iter().map(|now| now.state).collect();
                states.into_iter().for_each(|state| *counts.entry((provider.to_owned(), state)).or_default() += 1);
            }
        }
        counts
    }
}

/// Whether a state's name is about this credential or its account: then also the model, if it is about one.
fn concerns<'a>(name: &'a str, id: &str, account: &str) -> Option<Option<&'a str>> {
    let (kind, rest) = name.split_once('/')?;
    match kind {
        "c" if rest == id => Some(None),
        "a" if rest == account => Some(None),
        "m" => rest.strip_prefix(account)?.strip_prefix('/').map(Some),
        _ => None,
    }
}

/// A credential that a state is about.
struct Owner<'a> {
    organisation: &'a str,
    provider: &'a str,
    id: &'a str,
    name: &'a str,
    account: Option<&'a str>,
}

/// Whose a state is.
fn owners<'a>(name: &str, directory: &'a Directory) -> Vec<Owner<'a>> {
    let of = |(organisation, found): (&'a String, &'a Arc<Organisation>)| {
        found.all_credentials().filter_map(move |(id, provider)| {
            let account = found.accounts.get(id).map(String::as_str);
            concerns(name, id, account.unwrap_or(id))?;
            Some(Owner { organisation, provider, id, name: found.name_of(id)?, account })
        })
    };
    directory.organisations.iter().flat_map(of).collect()
}

/// What a person has to be told of a state: which credentials are concerned, never what their secrets are.
fn alarm(name: &str, entry: Option<Entry>, directory: &Directory) -> Option<Alarm> {
    let what = match entry?.state {
        State::Rejected => "credential_rejected",
        State::Exhausted => "credential_exhausted",
        State::Overloaded | State::RateLimited => return None,
    };
    let owners = owners(name, directory);
    let first = owners.first()?;
    let model = concerns(name, first.id, first.account.unwrap_or(first.id)).flatten();
    let credentials: Vec<_> = owners.iter().map(|owner| json!({ "id": owner.id, "name": owner.name })).collect();
    let detail = json!({ "provider": first.provider, "credentials": credentials, "account": first.account, "model": model });
    Some(Alarm { organisation: first.organisation.to_owned(), what: what.to_owned(), detail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Credential};
    use crate::service::bed::{self, started, who};
    use crate::service::keys::KeySpec;
    use crate::service::{Admitted, ORGANISATION};
    use crate::store::{Expect, admin_chain};
    use keyward_core::edge::{AdmitAnswer, AdmitRequest, Ask, Plan, RequestId, VmId};
    use keyward_core::keyring::Told;
    use keyward_core::refusal::Refusal;
    use keyward_core::token::VirtualKey;
    use keyward_core::verdict::{Left, Room};
    use keyward_core::watch::WatchAnswer;
    use std::time::Duration;
    use tokio::time::timeout;

    /// Far longer than anything here takes, and shorter than a question is held.
    const SOON: Duration = Duration::from_secs(4);
    const SECRETS: [&str; 2] = ["sk-proj-First5Hq8Zx2Vb6Nm1Kj9Hg5Fd3Sa", "sk-proj-Second5Hq8Zx2Vb6Nm1Kj9Hg5Fd3S"];

    struct Bed {
        data: tempfile::TempDir,
        running: crate::Running,
        token: VirtualKey,
        key: String,
        ids: [String; 2],
        reqs: u8,
    }

    impl Bed {
        /// Two credentials `first` and `second`, the second one in a pool with an account to share.
        async fn new() -> Self {
            let data = tempfile::tempdir().unwrap();
            let running = started(data.path()).await;
            let mut ids = Vec::new();
            for (name, account, secret) in [("first", None, SECRETS[0]), ("second", Some("acme/1"), SECRETS[1])] {
                ids.push(put(&running.service, name, account, secret).await);
            }
            let (row, token) = running.service.create_key(&who(), KeySpec::default()).await.unwrap();
            Bed { data, running, token, key: row.id, ids: ids.try_into().unwrap(), reqs: 0 }
        }

        fn service(&self) -> &Service {
            &self.running.service
        }

        async fn restart(mut self) -> Self {
            self.running.stop().await;
            self.running = started(self.data.path()).await;
            self
        }

        async fn admit(&mut self) -> Result<Plan, Refusal> {
            self.reqs += 1;
            let ask = Ask {
                provider: "openai".to_owned(),
                endpoint: "POST /v1/chat/completions".to_owned(),
                model: Some("gpt-4o-mini".to_owned()),
                bytes: 100,
                max_tokens: Some(10),
                choices: 1,
                ..Ask::default()
            };
            let req = RequestId([self.reqs; 16]);
            let token = self.token.hash().0;
            let request = AdmitRequest { req, vm: VmId([1; 16]), node: String::new(), token, need_key: false, trace: None, ask };
            match self.service().admit(request).await {
                Admitted::Answer(answer) => {
                    let AdmitAnswer { plan, refusal, .. } = *answer;
                    plan.ok_or_else(|| refusal.unwrap())
                }
                Admitted::Conflict => panic!("a conflict"),
            }
        }

        /// Ids of the credentials that a request gets.
        async fn usable(&mut self) -> Vec<String> {
            let plan = self.admit().await.unwrap();
            plan.targets[0].credentials.iter().map(|credential| credential.id.clone()).collect()
        }

        /// What a gate reports, as it does.
        async fn tell(&self, news: News) {
            let body = format!("KB1 {} 0 {}\n", "07".repeat(16), serde_json::to_string(&news).unwrap());
            self.service().settle(&body).await.unwrap();
        }

        async fn cooled(&self, name: &str, state: Option<State>, ms: u64) {
            self.tell(News { cooled: vec![Cooled { name: name.to_owned(), state, ms, probe: false }], ..News::default() }).await;
        }

        async fn everything(&self) -> WatchAnswer {
            self.service().news(None).await.unwrap()
        }

        async fn next(&self, since: &str) -> WatchAnswer {
            timeout(SOON, self.service().news(Some(since))).await.expect("no news").unwrap()
        }

        /// States of a credential as people see them.
        fn states(&self, n: usize) -> Vec<(State, Option<String>, bool)> {
            let organisation = self.service().organisation(ORGANISATION).unwrap();
            let states = self.service().standing_of(&organisation, &self.ids[n]).0;
            states.into_iter().map(|now| (now.state, now.model, now.left_ms.is_some())).collect()
        }

        /// The organisation's chain, as text.
        async fn chain(&self) -> Vec<String> {
            let rows = self.service().audit(&who(), &admin_chain(ORGANISATION), 1, 100).await.unwrap();
            rows.iter().map(|row| String::from_utf8_lossy(&row.entry).into_owned()).collect()
        }

        async fn alarms(&self) -> Vec<(String, String)> {
            self.service().store.due_mail(u64::MAX >> 1, 100).await.unwrap().into_iter().map(|mail| (mail.what, mail.detail)).collect()
        }
    }

    async fn put(service: &Service, name: &str, account: Option<&str>, secret: &str) -> String {
        let credential = Credential { account: account.map(str::to_owned), ..bed::credential(secret) };
        service.put_credential(&who(), Some(name), &credential, Expect::Anything).await.unwrap().1.id
    }

    fn names(answer: &WatchAnswer) -> Vec<(&str, Option<State>)> {
        answer.cooled.iter().map(|cooled| (cooled.name.as_str(), cooled.state)).collect()
    }

    #[tokio::test]
    async fn what_one_gate_tells_all_others_hear() {
        let bed = Bed::new().await;
        let since = bed.everything().await.since;
        let waiting = {
            let (service, since) = (bed.running.service.clone(), since.clone());
            tokio::spawn(async move { service.news(Some(&since)).await.unwrap() })
        };
        tokio::task::yield_now().await;
        bed.cooled("m/acme/gpt-4o", Some(State::RateLimited), 60_000).await;
        let heard = timeout(SOON, waiting).await.unwrap().unwrap();
        assert_eq!(names(&heard), [("m/acme/gpt-4o", Some(State::RateLimited))]);
        assert!((1..=60_000).contains(&heard.cooled[0].ms), "what is left of it: {}", heard.cooled[0].ms);
        // What changes nothing is no news; of several changes of one name the last is told.
        bed.cooled("m/acme/gpt-4o", Some(State::RateLimited), 10).await;
        bed.cooled("c/x", Some(State::RateLimited), 60_000).await;
        bed.cooled("c/x", Some(State::Exhausted), 60_000).await;
        let answer = bed.next(&heard.since).await;
        assert_eq!(names(&answer), [("c/x", Some(State::Exhausted))]);
        assert_eq!(names(&bed.next(&since).await).len(), 2, "whoever is further behind hears more");
        bed.cooled("c/x", None, 0).await;
        let last = bed.next(&answer.since).await;
        assert_eq!(names(&last), [("c/x", None)]);
        assert_eq!(last.since, bed.everything().await.since);
        // Whoever knows nothing is told all that stands, and what has just stopped to.
        assert_eq!(names(&bed.everything().await), [("m/acme/gpt-4o", Some(State::RateLimited)), ("c/x", None)]);
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_rejected_credential_is_out_until_an_operator_acts() {
        let mut bed = Bed::new().await;
        let [first, second] = bed.ids.clone();
        let rejected = |id: &str| format!("c/{id}");
        bed.cooled(&rejected(&first), Some(State::Rejected), 1).await;
        bed.cooled(&rejected(&first), Some(State::Rejected), 1).await;
        assert_eq!(bed.usable().await, [second.as_str()]);
        assert_eq!((bed.states(0), bed.states(1)), (vec![(State::Rejected, None, false)], vec![]));
        let alarms = bed.alarms().await;
        assert_eq!(alarms.len(), 1, "once: {alarms:?}");
        assert!(alarms[0].0 == "credential_rejected" && alarms[0].1.contains(&first) && alarms[0].1.contains("\"first\""), "{alarms:?}");
        assert_eq!(bed.chain().await.iter().filter(|entry| entry.contains("credential_rejected")).count(), 1);
        let all = format!("{alarms:?}{:?}", bed.chain().await);
        assert!(SECRETS.iter().all(|secret| !all.contains(secret)));

        // A restart forgets nothing of it.
        bed = bed.restart().await;
        assert_eq!(bed.usable().await, [second.as_str()]);
        assert_eq!(names(&bed.everything().await), [(rejected(&first).as_str(), Some(State::Rejected))]);

        // The other one, by its account and this model: nothing is left, and the chain says so.
        let model = "m/org_default/openai/acme%2F1/gpt-4o-mini";
        bed.cooled(model, Some(State::Rejected), 1).await;
        let refusal = bed.admit().await.unwrap_err();
        assert_eq!(refusal.code.name(), "provider_credential_rejected");
        let rows = bed.service().audit(&who(), &bed.key, 1, 100).await.unwrap();
        assert!(String::from_utf8_lossy(&rows.last().unwrap().entry).contains("provider_credential_rejected"));
        assert_eq!(bed.states(1), [(State::Rejected, Some("gpt-4o-mini".to_owned()), false)]);

        // An operator has both used again: all gates are told, and no restart brings it back.
        let since = bed.everything().await.since;
        bed.service().reset_credential(&who(), "second").await.unwrap();
        assert!(names(&bed.next(&since).await).contains(&(model, None)));
        assert_eq!(bed.usable().await, [second.as_str()]);
        bed.service().reset_credential(&who(), &first).await.unwrap();
        bed = bed.restart().await;
        assert_eq!(bed.usable().await.len(), 2);
        assert!(bed.everything().await.cooled.is_empty() && bed.states(0).is_empty());
        assert_eq!(bed.chain().await.iter().filter(|entry| entry.contains("reset")).count(), 2);
        assert!(matches!(bed.service().reset_credential(&who(), "nobody").await, Err(ServiceError::NotFound(_))));
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_new_secret_is_a_new_beginning() {
        let mut bed = Bed::new().await;
        let first = bed.ids[0].clone();
        let name = format!("c/{first}");
        bed.cooled(&name, Some(State::Rejected), 1).await;
        put(bed.service(), "first", None, SECRETS[0]).await;
        assert_eq!(bed.usable().await.len(), 1, "the same secret again is no other");
        let since = bed.everything().await.since;
        put(bed.service(), "first", None, "sk-proj-Third5Hq8Zx2Vb6Nm1Kj9Hg5Fd3Sa").await;
        assert!(names(&bed.next(&since).await).contains(&(name.as_str(), None)));
        assert_eq!(bed.usable().await.len(), 2);
        // A request that was under way with the old one comes back rejected.
        let since = bed.everything().await.since;
        bed.cooled(&name, Some(State::Rejected), 1).await;
        assert_eq!(names(&bed.next(&since).await), [(name.as_str(), None)], "the gate that told it takes it back too");
        assert_eq!(bed.usable().await.len(), 2);
        assert_eq!(bed.alarms().await.len(), 1);
        bed = bed.restart().await;
        assert_eq!(bed.usable().await.len(), 2);
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn what_is_used_up_is_told_kept_and_used_all_the_same() {
        let mut bed = Bed::new().await;
        let name = "a/org_default/openai/acme%2F1";
        bed.cooled(name, Some(State::Exhausted), 600_000).await;
        bed.cooled("m/org_default/openai/acme%2F1/gpt-4o", Some(State::RateLimited), 60_000).await;
        assert_eq!(bed.usable().await.len(), 2, "the gate knows best when it is over");
        let alarms = bed.alarms().await;
        assert!(alarms.len() == 1 && alarms[0].0 == "credential_exhausted" && alarms[0].1.contains(&bed.ids[1]), "{alarms:?}");
        assert_eq!(
            bed.service().unusable(),
            HashMap::from([(("openai".to_owned(), State::Exhausted), 1), (("openai".to_owned(), State::RateLimited), 1)])
        );
        bed = bed.restart().await;
        let everything = bed.everything().await;
        assert_eq!(names(&everything), [(name, Some(State::Exhausted))]);
        assert!((500_000..=600_000).contains(&everything.cooled[0].ms), "until when it was: {everything:?}");
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_credential_that_goes_takes_its_states_along() {
        let bed = Bed::new().await;
        let name = format!("c/{}", bed.ids[0]);
        bed.cooled(&name, Some(State::Rejected), 1).await;
        let since = bed.everything().await.since;
        bed.service().delete_object(&who(), config::Kind::Credential, "first", Expect::Anything).await.unwrap();
        assert!(names(&bed.next(&since).await).contains(&(name.as_str(), None)));
        let bed = bed.restart().await;
        assert!(bed.everything().await.cooled.is_empty());
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn a_plan_says_whose_limits_and_how_to_choose() {
        let mut bed = Bed::new().await;
        let plan = bed.admit().await.unwrap();
        let accounts: Vec<_> = plan.targets[0].credentials.iter().map(|credential| credential.account.as_deref()).collect();
        assert_eq!((accounts, plan.in_order, plan.wait_ms), (vec![None, Some("org_default/openai/acme%2F1")], false, 0));
        for n in 0..4 {
            put(bed.service(), &format!("more-{n}"), None, &format!("{}{n}", SECRETS[0])).await;
        }
        let all = ["first", "second", "more-0", "more-1", "more-2", "more-3"];
        let object = |json: serde_json::Value| serde_json::from_value(json).unwrap();
        let pool: config::Pool = serde_json::from_value(json!({ "provider": "openai", "credentials": all, "affinity": "key" })).unwrap();
        bed.service().put_object(&who(), "sticky", &pool, Expect::Absent).await.unwrap();
        let policy: config::Policy = object(json!({ "pools": { "openai": "sticky" }, "wait_ms": 1_500 }));
        bed.service().put_object(&who(), "waits", &policy, Expect::Absent).await.unwrap();
        let mut orders = HashSet::new();
        for _ in 0..4 {
            let spec = KeySpec { policy: Some("waits".to_owned()), ..KeySpec::default() };
            bed.token = bed.service().create_key(&who(), spec).await.unwrap().1;
            let plan = bed.admit().await.unwrap();
            assert_eq!((plan.in_order, plan.wait_ms), (true, 1_500));
            let order: Vec<String> = plan.targets[0].credentials.iter().map(|credential| credential.id.clone()).collect();
            assert_eq!(bed.usable().await, order, "a key's order is always the same");
            // Without the best one the others stay in their order.
            bed.cooled(&format!("c/{}", order[0]), Some(State::Rejected), 1).await;
            assert_eq!(bed.usable().await, order[1..]);
            let id = order[0].clone();
            bed.service().reset_credential(&who(), &id).await.unwrap();
            orders.insert(order);
        }
        assert!(orders.len() > 1, "keys spread over the pool");
        bed.running.stop().await;
    }

    #[tokio::test]
    async fn what_accounts_have_left_is_shown() {
        let bed = Bed::new().await;
        let left = |remaining| Some(Left { limit: Some(60), remaining, reset_ms: Some(1_000) });
        let told = |model: &str, remaining, age_ms| Told {
            account: "org_default/openai/acme%2F1".to_owned(),
            model: model.to_owned(),
            room: Room { requests: left(remaining), tokens: None },
            age_ms,
        };
        let since = bed.everything().await.since;
        bed.tell(News {
            rooms: vec![told("gpt-4o", 58, 900), told("gpt-4o-mini", 3, 0), told("gpt-4o", 57, 0), told("gpt-4o", 59, 1_000)],
            ..News::default()
        })
        .await;
        let organisation = bed.service().organisation(ORGANISATION).unwrap();
        let of = |n: usize| {
            let rooms = bed.service().standing_of(&organisation, &bed.ids[n]).1;
            rooms.into_iter().map(|now| (now.model, now.room.requests.unwrap().remaining)).collect::<Vec<_>>()
        };
        assert_eq!((of(0), of(1)), (vec![], vec![("gpt-4o".to_owned(), 57), ("gpt-4o-mini".to_owned(), 3)]));
        assert_eq!(bed.everything().await.since, since, "that is no news for gates");
        bed.running.stop().await;
    }
}
