//! The attempt: one try at a provider. It picks the credential, overwrites everything by which a provider tells callers apart,
//! each time anew, because all tries of a request share one set of headers, and judges the answer.

use crate::credentials::{CREDENTIAL_HEADERS, NETWORK_HEADERS};
use crate::edge::{PlanCredential, Try};
use crate::gate::{Headers, Permit, Refused, header};
use crate::hex;
use crate::keyring::{At, Keyring, Unusable};
use crate::operation::Dialect;
use crate::refusal::{Code, Refusal};
use crate::rewrite::Rewriting;
use crate::ring::SharedData;
use crate::translate::answer;
use crate::verdict::{State, needs_body, room, verdict};
use std::borrow::Cow;

/// Connections that may fail before the provider counts as unreachable.
const MAX_UNCONNECTED: usize = 3;
/// Looks for a credential while a request waits: more than there are ticks in the longest wait.
const MAX_WAITS: usize = 2_000;
/// Bytes of an error's body that are looked at.
pub const MAX_ERROR_BODY: usize = 64 * 1024;

/// A permitted request on its way: the permit, and what became of its tries.
#[derive(Debug)]
pub struct Flight {
    permit: Permit,
    /// The body is written anew for each try.
    rewriting: Option<Box<Rewriting>>,
    tries: Vec<Running>,
    /// The target in hand, by its place in the plan.
    target: usize,
    /// The target to which the router goes by itself, should the try in hand get no answer.
    fallback: Option<usize>,
    /// By the credentials' places in the target in hand: not to be tried again.
    tried: Vec<bool>,
    answer: Option<AnswerHead>,
    /// Why nothing more is tried.
    refusal: Option<Refusal>,
    /// Until when the request may be held back; set when it is for the first time.
    hold_until_ms: Option<u64>,
    /// The body can be sent once more.
    replayable: bool,
    /// The caller has been told already why nothing more is tried.
    told: bool,
    /// The router was asked for another try, which has not begun.
    awaits_retry: bool,
    /// The try that is to come has its target and no credential yet; what became of the one before is settled.
    is_waiting: bool,
    /// How often it was found that it has to wait.
    waits: usize,
    /// The cluster on which the next try begins, and the name by which the router came to it, where that has to be looked at.
    cluster: Option<(Vec<u8>, Vec<u8>)>,
    /// The clusters on which tries of targets were made, by the target's provider.
    clusters: Vec<(String, Vec<u8>)>,
    /// The body of the try in hand has come, while it waits.
    pub body_came: bool,
}

/// What the gate needs to know of the headers of a provider's answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AnswerHead {
    pub status: u16,
    pub content_type: Vec<u8>,
    /// The body is in an encoding that can't be read.
    pub encoded: bool,
    /// Tries that were made.
    pub tries: usize,
    /// The place in the plan of the target that answered.
    pub target: usize,
}

/// The version under which translated requests are made: the newer one refuses every temperature (PROVIDERS: Anthropic API version).
const ANTHROPIC_VERSION: &str = "2023-06-01";

/// Answer headers that tell which account paid, or bind the caller to it.
const ACCOUNT_HEADERS: [&str; 4] = ["set-cookie", "openai-organization", "openai-project", "anthropic-organization-id"];

#[derive(Debug)]
struct Running {
    /// The target's place in the plan, and the credential's in the target.
    target: usize,
    place: usize,
    status: Option<u16>,
    started_ms: u64,
    /// Milliseconds until the headers of the answer.
    answered_ms: Option<u64>,
    /// The connection never came about, or the provider turned the try away unread: it costs nothing.
    is_free: bool,
    /// It was sent, and nobody knows what became of it.
    is_lost: bool,
    /// It is certain that nothing of it was sent.
    never_left: bool,
    is_over: bool,
}

/// Request headers of one try.
#[derive(Debug, PartialEq, Eq)]
pub struct RequestEdits {
    /// Names of headers that must go, of those that are there.
    pub remove: Vec<Vec<u8>>,
    pub set: Vec<(&'static str, Cow<'static, str>)>,
}

/// What a try may do.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun {
    Go(RequestEdits),
    /// No credential is usable: look again at this time.
    Wait {
        until_ms: u64,
    },
    /// Nothing may be sent; [`Flight::refusal`] says why.
    Stop,
}

/// What comes of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// It goes on to the caller.
    Pass,
    /// Its body tells more.
    ReadBody,
    /// The router is asked for another try.
    Retry,
}

/// Now, by the clock that is never set and by the one that people set; both in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    pub now_ms: u64,
    pub unix_ms: u64,
}

impl Flight {
    /// `replayable`: the router has the body for another try.
    pub fn new(permit: Permit, replayable: bool, rewriting: Option<Box<Rewriting>>) -> Self {
        let mut flight = Flight {
            permit,
            rewriting,
            tries: Vec::new(),
            target: 0,
            fallback: None,
            tried: Vec::new(),
            answer: None,
            refusal: None,
            hold_until_ms: None,
            replayable,
            told: false,
            awaits_retry: false,
            is_waiting: false,
            waits: 0,
            cluster: None,
            clusters: Vec::new(),
            body_came: false,
        };
        flight.aim_at(0);
        flight
    }

    fn aim_at(&mut self, target: usize) {
        self.target = target;
        self.tried = vec![false; self.pool().len()];
    }

    fn pool_of(&self, target: usize) -> &[PlanCredential] {
        self.permit.plan().targets.get(target).map(|target| target.credentials.as_slice()).unwrap_or_default()
    }

    fn pool(&self) -> &[PlanCredential] {
        self.pool_of(self.target)
    }

    fn at_of(&self, target: usize) -> At<'_> {
        let model = self.permit.plan().targets.get(target).and_then(|target| target.model.as_deref()).unwrap_or_default();
        At { provider: self.permit.provider(target), model }
    }

    fn at(&self) -> At<'_> {
        self.at_of(self.target)
    }

    /// Chooses the first target that has a usable credential: once it is on its way, a request changes its target only after a try.
    pub fn choose_target(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) {
        let target = self.usable_from(0, ring, shared, now_ms).unwrap_or(0);
        self.aim_at(target);
    }

    fn usable_from(&self, from: usize, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Option<usize> {
        let targets = self.permit.plan().targets.len();
        // Alone it is taken anyhow.
        if targets == 1 {
            return (from == 0).then_some(0);
        }
        (from..targets).find(|target| ring.look(shared, self.at_of(*target), self.pool_of(*target), &[], now_ms).is_ok())
    }

    /// The name under which the router knows the cluster of the target in hand.
    pub fn cluster(&self) -> &str {
        self.permit.provider(self.target)
    }

    /// Where the router goes by itself, if the try in hand gets no answer. `None`: to the same cluster.
    pub fn cluster_without_answer(&self) -> Option<&str> {
        self.fallback.map(|target| self.permit.provider(target))
    }

    /// How long a try may be without a first byte.
    pub fn first_byte_ms(&self) -> Option<u64> {
        self.permit.plan().first_byte_ms
    }

    /// Whether the request may go to several targets.
    pub fn has_fallback(&self) -> bool {
        self.permit.plan().targets.len() > 1
    }

    /// The next try begins on this cluster of Envoy's, to which the router came by the name that was told to it.
    pub fn runs_on(&mut self, cluster: Vec<u8>, named: Vec<u8>) {
        self.cluster = Some((cluster, named));
    }

    /// Whether a try of the target in hand may be made on this cluster. Two providers on one cluster: the router did not follow, and the
    /// credential of one would reach the other.
    fn may_run_on(&mut self, cluster: Vec<u8>, named: &[u8]) -> bool {
        let provider = self.permit.provider(self.target);
        if provider.as_bytes() != named {
            return false;
        }
        if self.clusters.iter().any(|(other, name)| other != provider && *name == cluster) {
            return false;
        }
        let provider = provider.to_owned();
        if !self.clusters.iter().any(|(other, _)| *other == provider) {
            self.clusters.push((provider, cluster));
        }
        true
    }

    /// Whether the body has to be written for each try.
    pub fn rewrites(&self) -> bool {
        self.rewriting.is_some()
    }

    /// The body for the try in hand, from the caller's. `None`: nothing may be sent, and [`Flight::refusal`] says why.
    pub fn body(&mut self, body: &[u8]) -> Option<Vec<u8>> {
        let plan = self.permit.plan();
        let (rewriting, target, aim) = (self.rewriting.as_ref()?, plan.targets.get(self.target)?, self.permit.aim(self.target)?);
        match rewriting.body(body, plan, target, &aim.site, self.permit.target().dialect) {
            Ok(body) => Some(body),
            Err(error) => {
                self.give_up(Refusal::new(Code::BadRequest, error.message()));
                None
            }
        }
    }

    /// How an answer of this target is to be translated. `None`: its provider speaks the caller's dialect.
    pub fn translation(&self, target: usize, unix_ms: u64) -> Option<answer::Terms> {
        let aim = self.permit.aim(target).filter(|aim| aim.upstream.translates)?;
        let facts = self.rewriting.as_ref().map(|rewriting| &rewriting.facts);
        Some(answer::Terms {
            from: aim.site.dialect,
            to: self.permit.target().dialect,
            model: self.at_of(target).model.to_owned(),
            id: hex::encode(&self.permit.id().0),
            created: unix_ms / 1_000,
            include_usage: facts.is_some_and(|facts| facts.include_usage),
            base64: facts.is_some_and(|facts| facts.base64),
        })
    }

    /// Begins a try on a request with these headers.
    pub fn begin(&mut self, ring: &mut Keyring, shared: &impl SharedData, headers: &Headers<'_>, now_ms: u64) -> Begun {
        if self.refusal.is_some() {
            return Begun::Stop;
        }
        self.answer = None;
        self.body_came = false;
        let (was_asked_for, has_waited) = (std::mem::take(&mut self.awaits_retry), std::mem::take(&mut self.is_waiting));
        let fallback = self.fallback.take();
        let broke_off = self.tries.last().is_some_and(|last| last.status.is_some() && !last.is_over);
        if !has_waited {
            self.never_connected(ring, now_ms);
        }
        if !was_asked_for && !has_waited {
            // The router tries again by itself where no byte was sent, where the route lets it go on after such a try, or where an error broke
            // off before it was judged: to where it was told when the last try began.
            match fallback {
                Some(target) => self.aim_at(target),
                // What may have been carried out is not sent there again.
                None if self.tries.last().is_some_and(|last| last.status.is_none() && last.is_lost) => {
                    return self.stop(Refusal::new(Code::ProviderUnreachable, "the provider did not answer in time").retry_after(1));
                }
                None if broke_off => {
                    return self.stop(Refusal::new(Code::ProviderUnreachable, "the provider's error did not come whole").retry_after(1));
                }
                None => {}
            }
        }
        if let Some((cluster, named)) = self.cluster.take()
            && !self.may_run_on(cluster, &named)
        {
            return self.stop(Refusal::new(Code::PolicyUnavailable, "this Envoy can't go on to another provider"));
        }
        let here = self.tries.iter().filter(|t| t.status.is_none() && t.target == self.target);
        if here.count() >= MAX_UNCONNECTED {
            return self.stop(Refusal::new(Code::ProviderUnreachable, "the provider could not be reached").retry_after(1));
        }
        let in_order = self.permit.plan().in_order;
        let place = match ring.choose(shared, self.at(), self.pool(), &self.tried, in_order, now_ms) {
            Ok(place) => place,
            Err(_) => match self.can_wait(ring, shared, now_ms) {
                // A router that can't connect meanwhile begins anew each time.
                Some(until_ms) if self.waits < MAX_WAITS => {
                    self.waits += 1;
                    self.is_waiting = true;
                    return Begun::Wait { until_ms };
                }
                _ => {
                    let refusal = self.exhausted(ring, shared, now_ms);
                    return self.stop(refusal);
                }
            },
        };
        let Some(credential) = self.pool().get(place) else {
            return self.stop(Refusal::new(Code::PoolExhausted, "this plan has no credential"));
        };
        let Some(edits) = self.edits(credential, headers) else {
            return self.stop(Refusal::new(Code::PolicyUnavailable, "this plan has no such target"));
        };
        let target = self.target;
        self.tries.push(Running {
            target,
            place,
            status: None,
            started_ms: now_ms,
            answered_ms: None,
            is_free: false,
            is_lost: false,
            never_left: false,
            is_over: false,
        });
        self.fallback = if self.replayable { self.usable_from(target + 1, ring, shared, now_ms) } else { None };
        Begun::Go(edits)
    }

    /// The headers of a try with this credential.
    fn edits(&self, credential: &PlanCredential, headers: &Headers<'_>) -> Option<RequestEdits> {
        let aim = self.permit.aim(self.target)?;
        let auth = aim.site.auth.header(&credential.secret.0);
        // Whatever tells callers apart, or told them apart in an earlier try, goes.
        let goes =
            |name: &[u8]| CREDENTIAL_HEADERS.iter().chain(&NETWORK_HEADERS).any(|other| other.as_bytes() == name && *other != auth.0);
        let remove =
            headers.iter().filter(|(name, _)| goes(name) || name.starts_with(b"x-envoy-")).map(|(name, _)| name.to_vec()).collect();
        let mut set = Vec::with_capacity(7);
        set.extend([
            (":authority", aim.site.host.clone()),
            (":path", aim.upstream.path.clone()),
            ("accept-encoding", "identity".into()),
            // The id under which the audit chain has this request; OpenAI documents the header for exactly that.
            ("x-client-request-id", self.permit.id().to_string().into()),
        ]);
        if let Some(content_type) = self.permit.content_type() {
            set.push(("content-type", content_type.to_owned().into()));
        }
        if aim.upstream.translates && aim.site.dialect == Dialect::Anthropic {
            set.push(("anthropic-version", ANTHROPIC_VERSION.into()));
        }
        set.retain(|(name, value)| header(headers, name) != Some(value.as_bytes()));
        set.push((auth.0, auth.1.into()));
        Some(RequestEdits { remove, set })
    }

    fn stop(&mut self, refusal: Refusal) -> Begun {
        self.refusal = Some(refusal);
        Begun::Stop
    }

    /// Until when the request waits for a credential, if its policy lets it. Then those that were tried before count again.
    fn can_wait(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Option<u64> {
        let wait_ms = Some(self.permit.plan().wait_ms).filter(|wait_ms| *wait_ms > 0)?;
        let deadline_ms = *self.hold_until_ms.get_or_insert(now_ms.saturating_add(wait_ms));
        let until_ms = match ring.look(shared, self.at(), self.pool(), &[], now_ms) {
            Ok(()) => now_ms,
            Err(unusable) => now_ms.saturating_add(unusable?.wait_ms.max(1)),
        };
        if until_ms > deadline_ms {
            return None;
        }
        self.tried.fill(false);
        Some(until_ms)
    }

    /// What the caller is told when no credential is left.
    fn exhausted(&self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Refusal {
        match ring.look(shared, self.at(), self.pool(), &[], now_ms) {
            Err(Some(Unusable { state: State::Rejected, .. })) => Refusal::new(
                Code::ProviderCredentialRejected,
                "the provider rejected every stored credential that this request could use; an operator has to replace them",
            ),
            Err(Some(Unusable { state: State::Overloaded, wait_ms })) => {
                Refusal::new(Code::PoolExhausted, "the provider is overloaded and asked for time").retry_after_ms(wait_ms)
            }
            Err(Some(Unusable { wait_ms, .. })) => {
                Refusal::new(Code::PoolExhausted, "every credential that this request could use is at its provider's limit")
                    .retry_after_ms(wait_ms)
            }
            _ => {
                Refusal::new(Code::PoolExhausted, "every credential that this request could use was at its provider's limit").retry_after(1)
            }
        }
    }

    /// The provider answered the last try with these headers. Returns the names of those that don't go on (they repeat the
    /// credential, tell whose it is, or would steer the router), and what comes next.
    pub fn answered(
        &mut self,
        ring: &mut Keyring,
        shared: &impl SharedData,
        headers: &Headers<'_>,
        clocks: Clocks,
    ) -> (Vec<Vec<u8>>, Next) {
        let status = header(headers, ":status").and_then(|s| std::str::from_utf8(s).ok()?.parse().ok());
        if let Some(last) = self.tries.last_mut() {
            last.status = status;
            last.answered_ms = Some(clocks.now_ms.saturating_sub(last.started_ms));
        }
        self.answer = Some(AnswerHead {
            status: status.unwrap_or(0),
            content_type: header(headers, "content-type").unwrap_or_default().to_vec(),
            encoded: header(headers, "content-encoding").is_some_and(|e| !e.eq_ignore_ascii_case(b"identity")),
            tries: self.tries.len(),
            target: self.target,
        });
        let secrets: Vec<&[u8]> = self.pool().iter().map(|credential| credential.secret.0.as_bytes()).collect();
        let repeats = |value: &[u8]| secrets.iter().any(|s| !s.is_empty() && value.windows(s.len()).any(|w| w == *s));
        // Its x-envoy-* and x-keyward-* would steer our router.
        let steers = |name: &[u8]| name.starts_with(b"x-keyward-") || name.starts_with(b"x-envoy-");
        let tells = |name: &[u8]| ACCOUNT_HEADERS.iter().any(|other| other.as_bytes() == name) || steers(name);
        let remove = headers.iter().filter(|(name, value)| tells(name) || repeats(value)).map(|(name, _)| name.to_vec()).collect();
        if status.is_some_and(needs_body) {
            return (remove, Next::ReadBody);
        }
        (remove, self.judge(ring, shared, headers, b"", clocks))
    }

    /// Judges the last try's answer by its headers and the start of its body, and says what comes next.
    pub fn judge(&mut self, ring: &mut Keyring, shared: &impl SharedData, headers: &Headers<'_>, body: &[u8], clocks: Clocks) -> Next {
        let Clocks { now_ms, unix_ms } = clocks;
        let Some((place, status, started_ms)) = self.tries.last().and_then(|last| Some((last.place, last.status?, last.started_ms))) else {
            return Next::Pass;
        };
        self.try_is_over(ring);
        let Some(credential) = self.pool().get(place) else { return Next::Pass };
        if let Some(room) = room(headers, unix_ms) {
            ring.has_left(shared, self.at(), credential, room, self.pool().len() > 1, now_ms);
        }
        let Some(verdict) = verdict(status, headers, body, unix_ms) else {
            if status < 400 {
                ring.worked(shared, self.at(), credential, started_ms, now_ms);
            }
            return if status >= 500 { self.go_on_elsewhere(ring, shared, now_ms) } else { Next::Pass };
        };
        if verdict.wait_ms > 0 {
            ring.cool(shared, self.at(), credential, verdict, now_ms);
        }
        if verdict.state == State::Overloaded {
            return self.go_on_elsewhere(ring, shared, now_ms);
        }
        if let Some(last) = self.tries.last_mut() {
            last.is_free = true;
        }
        if let Some(tried) = self.tried.get_mut(place) {
            *tried = true;
        }
        if !self.replayable {
            let message = "the provider's limit was met, and the body is too large to be sent again with another credential";
            self.refusal = Some(Refusal::new(Code::PoolExhausted, message).retry_after(1));
            return Next::Pass;
        }
        let is_left = ring.look(shared, self.at(), self.pool(), &self.tried, now_ms).is_ok();
        if !is_left && self.go_on_elsewhere(ring, shared, now_ms) == Next::Retry {
            return Next::Retry;
        }
        if is_left || (verdict.wait_ms > 0 && self.can_wait(ring, shared, now_ms).is_some()) {
            self.awaits_retry = true;
            return Next::Retry;
        }
        if verdict.wait_ms == 0 && verdict.state == State::Rejected {
            let message = "no stored credential may do this at the provider; an operator has to give one the permission";
            self.refusal = Some(Refusal::new(Code::ProviderCredentialRejected, message));
        } else {
            self.exhaust(ring, shared, now_ms);
        }
        Next::Pass
    }

    /// The target in hand can't answer: the next one that can is tried, where the route lists one.
    fn go_on_elsewhere(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Next {
        if !self.replayable {
            return Next::Pass;
        }
        let Some(target) = self.usable_from(self.target + 1, ring, shared, now_ms) else { return Next::Pass };
        if let Some(last) = self.tries.last_mut() {
            last.is_free = true;
        }
        self.aim_at(target);
        self.awaits_retry = true;
        Next::Retry
    }

    /// Nothing more is tried: no credential is left.
    pub fn exhaust(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) {
        self.refusal = Some(self.exhausted(ring, shared, now_ms));
    }

    /// The head of the last try's answer, once: `None` means that the answer in hand is not the provider's.
    pub fn hand_over(&mut self) -> Option<AnswerHead> {
        self.answer.take()
    }

    pub fn permit(&self) -> &Permit {
        &self.permit
    }

    /// The router has no body for another try after all.
    pub fn cannot_be_replayed(&mut self) {
        self.replayable = false;
    }

    /// The caller has been told why nothing more is tried.
    pub fn tell(&mut self) {
        self.told = true;
    }

    pub fn was_told(&self) -> bool {
        self.told
    }

    /// What the caller is told in place of the provider's answer, if nothing more is tried.
    pub fn refused(&self) -> Option<Refused> {
        // A router that was asked and did not obey (a body that it no longer had) leaves the caller with an answer that is not for it.
        let ignored =
            || Refusal::new(Code::PoolExhausted, "a credential was at its limit, and the request could not be tried again").retry_after(1);
        let refusal = self.refusal.clone().or_else(|| self.awaits_retry.then(ignored))?;
        let dialect = self.permit.target().dialect;
        Some(Refused { refusal, dialect, request_id: self.permit.id(), asked: true })
    }

    /// Why nothing more is tried, if the caller is to be told so in place of the provider's answer.
    pub fn refusal(&self) -> Option<&Refusal> {
        self.refusal.as_ref()
    }

    /// Nothing more is tried, for a reason that has nothing to do with the credentials.
    pub fn give_up(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
        if let Some(last) = self.tries.last_mut() {
            last.is_free = true;
        }
    }

    /// The last try was sent, and nobody knows what became of it.
    pub fn fail(&mut self, refusal: Refusal) {
        self.refusal = Some(refusal);
    }

    /// A provider's words without the credentials that were in use.
    pub fn without_secrets(&self, text: String) -> String {
        let secrets = self.permit.plan().targets.iter().flat_map(|target| &target.credentials).map(|credential| &credential.secret.0);
        secrets
            .filter(|secret| !secret.is_empty())
            .fold(text, |text, secret| if text.contains(secret.as_str()) { text.replace(secret.as_str(), "[credential]") } else { text })
    }

    /// How many tries have begun.
    pub fn number(&self) -> usize {
        self.tries.len()
    }

    /// Whether what comes of the last try's answer is decided.
    pub fn is_judged(&self) -> bool {
        self.tries.last().is_none_or(|last| last.is_over)
    }

    /// The last try got no answer because its connection never came about; unless it took as long as a first byte may, or is known to
    /// have been sent.
    pub fn never_connected(&mut self, ring: &mut Keyring, now_ms: u64) {
        self.try_is_over(ring);
        let first_byte_ms = self.first_byte_ms();
        if let Some(last) = self.tries.last_mut().filter(|last| last.status.is_none()) {
            let timed_out = !last.never_left && first_byte_ms.is_some_and(|ms| now_ms.saturating_sub(last.started_ms) >= ms);
            last.is_lost |= timed_out;
            last.is_free = !last.is_lost;
        }
    }

    /// It is certain that nothing of the last try, which got no answer, was sent, however long that took to turn out.
    pub fn never_left(&mut self, ring: &mut Keyring) {
        self.try_is_over(ring);
        self.spare(self.tries.len());
    }

    /// The connection of this try never came about.
    pub fn spare(&mut self, number: usize) {
        if let Some(spared) = self.unanswered_try(number).filter(|spared| !spared.is_lost) {
            (spared.never_left, spared.is_free) = (true, true);
        }
    }

    fn unanswered_try(&mut self, number: usize) -> Option<&mut Running> {
        number.checked_sub(1).and_then(|at| self.tries.get_mut(at)).filter(|one| one.status.is_none())
    }

    /// Of a gate that makes its tries itself: nothing of the last one was sent. What comes next.
    pub fn not_connected(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Next {
        self.never_left(ring);
        self.fallback = None;
        self.go_on_elsewhere(ring, shared, now_ms)
    }

    /// Of a gate that makes its tries itself: the last one was sent and never answered. What comes next.
    pub fn unanswered(&mut self, ring: &mut Keyring, shared: &impl SharedData, now_ms: u64) -> Next {
        self.try_is_over(ring);
        // Where the route sets no time, what may have been carried out is not sent again.
        if self.first_byte_ms().is_none() || !self.replayable || !self.has_fallback() {
            return Next::Pass;
        }
        self.lose(self.tries.len());
        let Some(target) = self.usable_from(self.target + 1, ring, shared, now_ms) else { return Next::Pass };
        self.aim_at(target);
        self.awaits_retry = true;
        Next::Retry
    }

    /// The connection of this try came about, and it ended without an answer. Where the route sets no time for that, the router goes on only
    /// from what the provider has surely not begun.
    pub fn lose(&mut self, number: usize) {
        if self.first_byte_ms().is_none() {
            return;
        }
        if let Some(lost) = self.unanswered_try(number) {
            lost.is_lost = true;
            lost.is_free = false;
        }
    }

    /// The last try takes no more of its account.
    pub fn try_is_over(&mut self, ring: &mut Keyring) {
        let (target, place) = match self.tries.last_mut() {
            Some(last) if !last.is_over => {
                last.is_over = true;
                (last.target, last.place)
            }
            _ => return,
        };
        let pool = self.pool_of(target);
        if let Some(credential) = pool.get(place).filter(|_| pool.len() > 1) {
            ring.done(credential.account());
        }
    }

    /// Whether an attempt saw the headers of an answer to the last try.
    pub fn was_answered(&self) -> bool {
        self.tries.last().is_some_and(|t| t.status.is_some())
    }

    /// Whether the last try may have cost something. Of those before it, the lost ones are marked, and the others are known to be free.
    pub fn may_have_been_sent(&self) -> bool {
        self.tries.last().is_some_and(|t| !t.is_free)
    }

    /// The provider's last status.
    pub fn status(&self) -> Option<u16> {
        self.tries.last().and_then(|t| t.status)
    }

    /// The tries for the record; one that was never answered lasted until the next, or until now.
    pub fn tries(&self, now_ms: u64) -> Vec<Try> {
        let ends = self.tries.iter().skip(1).map(|next| next.started_ms).chain([now_ms]);
        let record = |(t, end_ms): (&Running, u64)| Try {
            credential: self.pool_of(t.target).get(t.place).map(|credential| credential.id.clone()).unwrap_or_default(),
            status: t.status,
            ms: t.answered_ms.unwrap_or_else(|| end_ms.saturating_sub(t.started_ms)),
            target: t.target as u64,
            // The last one's outcome is the request's.
            lost: t.is_lost && t.answered_ms.is_none(),
        };
        self.tries.iter().zip(ends).map(record).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::{Plan, PlanTarget, Secret};
    use crate::gate::Answering;
    use crate::gate::tests::{admitted_at, plan};
    use crate::ring::shared::Shared;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// One Envoy process, and a request in it.
    struct Air {
        shared: Shared,
        ring: Keyring,
        now_ms: u64,
        flight: Flight,
        answering: Answering,
    }

    impl Air {
        fn new(credentials: usize, change: impl FnOnce(&mut Plan)) -> Self {
            let mut plan = plan(None);
            let credential = |n| PlanCredential { id: format!("cred_{n}"), secret: Secret(format!("sk-{n}")), account: None };
            plan.targets[0].credentials = (0..credentials).map(credential).collect();
            plan.in_order = true;
            change(&mut plan);
            let (answering, flight) = admitted_at(&[], r#"{"model":"gpt-4o"}"#, plan).forward(true);
            Air { shared: Shared::default(), ring: Keyring::default(), now_ms: 1_000, flight, answering }
        }

        fn begin(&mut self) -> Begun {
            self.flight.begin(&mut self.ring, &self.shared, &[], self.now_ms)
        }

        /// Begins a try that must be sent, and gives its credential.
        fn sent(&mut self) -> String {
            match self.begin() {
                Begun::Go(edits) => edits.set.iter().find(|(name, _)| *name == "authorization").unwrap().1.to_string(),
                other => panic!("{other:?}"),
            }
        }

        fn answer(&mut self, status: &str, headers: &[(&str, &str)], body: &str) -> Next {
            let mut all: Vec<(&[u8], &[u8])> = vec![(b":status", status.as_bytes())];
            all.extend(headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
            let clocks = Clocks { now_ms: self.now_ms, unix_ms: 1_700_000_000_000 + self.now_ms };
            match self.flight.answered(&mut self.ring, &self.shared, &all, clocks).1 {
                Next::ReadBody => self.flight.judge(&mut self.ring, &self.shared, &all, body.as_bytes(), clocks),
                next => next,
            }
        }

        fn limited(&mut self, seconds: &str) -> Next {
            self.answer("429", &[("retry-after", seconds)], "{}")
        }

        fn refused(&self) -> (Code, Option<u64>) {
            let refusal = self.flight.refusal().unwrap();
            (refusal.code, refusal.retry_after_ms)
        }
    }

    #[test]
    fn each_credential_is_tried_once_and_the_last_answer_passes() {
        let mut air = Air::new(12, |_| {});
        for n in 0..11 {
            assert_eq!((air.sent(), air.limited("9")), (format!("Bearer sk-{n}"), Next::Retry));
            air.now_ms += 2;
        }
        assert_eq!((air.sent(), air.answer("200", &[], "")), ("Bearer sk-11".to_owned(), Next::Pass));
        let tries = air.flight.tries(air.now_ms);
        assert_eq!((tries.len(), tries[0].status, tries[11].status), (12, Some(429), Some(200)));
        assert!(air.flight.may_have_been_sent());
        let edits = air.answering.headers(&mut air.flight, 1_000).unwrap();
        assert!(edits.set.contains(&("x-keyward-attempts", "12".to_owned())));
    }

    #[test]
    fn when_all_are_limited_the_soonest_is_told_and_nothing_is_charged() {
        let mut air = Air::new(3, |_| {});
        for (seconds, next) in [("30", Next::Retry), ("4", Next::Retry), ("60", Next::Pass)] {
            air.sent();
            assert_eq!(air.limited(seconds), next);
        }
        assert_eq!((air.refused(), air.flight.may_have_been_sent()), ((Code::PoolExhausted, Some(4_000)), false));
        assert_eq!(air.answering.headers(&mut air.flight, 1_000).unwrap_err().refusal.code, Code::PoolExhausted);
        // Another request, a moment later: the provider is not asked at all.
        let mut other = Air { shared: air.shared, now_ms: 2_500, ..Air::new(3, |_| {}) };
        assert_eq!(other.begin(), Begun::Stop);
        assert_eq!((other.refused(), other.flight.tries(0).len()), ((Code::PoolExhausted, Some(2_500)), 0));
    }

    #[test]
    fn a_policy_may_let_it_wait_so_long_and_no_longer() {
        let mut air = Air::new(2, |plan| plan.wait_ms = 5_000);
        air.sent();
        assert_eq!(air.limited("3"), Next::Retry);
        air.sent();
        assert_eq!(air.limited("4"), Next::Retry, "there is time for the first one again");
        assert_eq!(air.begin(), Begun::Wait { until_ms: 4_000 });
        air.now_ms = 4_000;
        assert_eq!((air.sent(), air.limited("1")), ("Bearer sk-0".to_owned(), Next::Retry));
        assert_eq!(air.begin(), Begun::Wait { until_ms: 5_000 });
        air.now_ms = 5_000;
        assert_eq!((air.sent(), air.limited("1")), ("Bearer sk-0".to_owned(), Next::Retry), "the second one is usable");
        assert_eq!((air.sent(), air.limited("2")), ("Bearer sk-1".to_owned(), Next::Retry));
        air.now_ms = 6_000;
        assert_eq!((air.sent(), air.limited("3")), ("Bearer sk-0".to_owned(), Next::Pass), "5 s are over before the next one is usable");
        assert_eq!(air.refused().0, Code::PoolExhausted);
        let mut late = Air { shared: air.shared, now_ms: 5_000, ..Air::new(1, |plan| plan.wait_ms = 500) };
        late.ring.cool(&late.shared, At { provider: "openai", model: "gpt-4o" }, &late.flight.pool()[0].clone(), limit(9_000), 5_000);
        assert_eq!(late.begin(), Begun::Stop, "longer than the policy lets it");
    }

    /// A request that may go to OpenAI, then to Claude, then to Gemini.
    fn routed(body: &str, change: impl FnOnce(&mut Plan)) -> Air {
        let mut plan = plan(None);
        for (provider, model) in [("anthropic", "claude-haiku-4-5"), ("gemini", "gemini-2.5-flash")] {
            let credential = PlanCredential { id: provider.into(), secret: Secret(format!("sk-{provider}")), account: None };
            let (provider, model, credentials) = (provider.into(), Some(model.into()), vec![credential]);
            plan.targets.push(PlanTarget { provider, model, credentials, max_output: Some(64_000), site: None });
        }
        change(&mut plan);
        let (answering, flight) = admitted_at(&[], body, plan).forward(true);
        Air { shared: Shared::default(), ring: Keyring::default(), now_ms: 1_000, flight, answering }
    }

    const ASKED: &str = r#"{"model":"fast","messages":[{"role":"user","content":"Hi"}]}"#;

    impl Air {
        fn unanswered(&mut self) -> Next {
            self.flight.unanswered(&mut self.ring, &self.shared, self.now_ms)
        }

        /// Begins a try that must be sent, and gives host, path and body.
        fn target(&mut self) -> (String, String, serde_json::Value) {
            let Begun::Go(edits) = self.begin() else { panic!("{:?}", self.flight.refusal()) };
            let value = |of: &str| edits.set.iter().find(|(name, _)| *name == of).unwrap().1.to_string();
            let body = self.flight.body(ASKED.as_bytes()).unwrap();
            (value(":authority"), value(":path"), serde_json::from_slice(&body).unwrap())
        }
    }

    #[test]
    fn a_request_goes_on_where_its_route_leads() {
        let mut air = routed(ASKED, |_| {});
        let (host, path, body) = air.target();
        assert_eq!((host.as_str(), path.as_str(), body["model"].as_str()), ("api.openai.com", "/v1/chat/completions", Some("gpt-4o")));
        assert_eq!(air.flight.cluster_without_answer(), Some("anthropic"), "should it never connect");
        assert_eq!((air.limited("9"), air.flight.cluster()), (Next::Retry, "anthropic"));
        let (host, path, body) = air.target();
        assert_eq!((host.as_str(), path.as_str(), body["max_tokens"].as_u64()), ("api.anthropic.com", "/v1/messages", Some(64_000)));
        assert_eq!((air.answer("500", &[], "{}"), air.flight.cluster()), (Next::Retry, "gemini"));
        let (_, path, body) = air.target();
        assert_eq!(
            (path.as_str(), body["contents"][0]["role"].as_str()),
            ("/v1beta/models/gemini-2.5-flash:generateContent", Some("user"))
        );
        assert_eq!((air.answer("503", &[], "{}"), air.flight.cluster_without_answer()), (Next::Pass, None), "nobody is left");
        let tries: Vec<_> = air.flight.tries(0).into_iter().map(|one| (one.target, one.status, one.lost)).collect();
        assert_eq!(tries, [(0, Some(429), false), (1, Some(500), false), (2, Some(503), false)]);
        let edits = air.answering.headers(&mut air.flight, 1_000).unwrap();
        assert!(edits.wait && edits.set.contains(&("x-keyward-served-by", "gemini/gemini-2.5-flash".to_owned())));
    }

    #[test]
    fn a_try_that_nobody_heard_of_again_is_told_from_one_that_never_left() {
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        air.now_ms += 5;
        assert!(air.target().0.contains("anthropic"), "the router went on by itself");
        air.now_ms += 300;
        assert!(air.target().0.contains("googleapis"));
        air.answer("200", &[], "");
        let lost: Vec<_> = air.flight.tries(0).iter().map(|one| one.lost).collect();
        assert_eq!(lost, [false, true, false], "the second took its whole time");
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        air.flight.lose(1);
        air.target();
        assert!(air.flight.tries(0)[0].lost, "its connection had come about");
        air.now_ms += 300;
        assert!(air.target().0.contains("googleapis"));
        let mut refused = routed(ASKED, |_| {});
        refused.target();
        refused.flight.lose(1);
        refused.target();
        assert!(!refused.flight.tries(0)[0].lost, "a stream that the provider refused costs nothing");
        air.now_ms += 300;
        assert_eq!(air.begin(), Begun::Stop, "the last one is not asked twice");
        assert_eq!(air.refused().0, Code::ProviderUnreachable);
        assert_eq!((air.flight.tries(0).len(), air.flight.may_have_been_sent()), (3, true));
    }

    #[test]
    fn a_gate_that_tries_itself_goes_on_from_a_lost_try_where_the_route_says_so() {
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        air.now_ms += 40;
        assert_eq!(air.unanswered(), Next::Retry);
        assert!(air.target().0.contains("anthropic") && air.flight.tries(0)[0].lost && air.flight.may_have_been_sent());
        assert_eq!(air.flight.tries(9_000)[0].ms, 40, "until the next began");
        assert_eq!(air.unanswered(), Next::Retry);
        assert!(air.target().0.contains("googleapis"));
        assert_eq!(air.unanswered(), Next::Pass, "nobody is left");
        assert_eq!(air.flight.refused(), None, "its outcome is the request's");
        let mut patient = routed(ASKED, |_| {});
        patient.target();
        assert_eq!((patient.unanswered(), patient.flight.refused()), (Next::Pass, None));
        assert!(patient.flight.may_have_been_sent());
        // Who has become unusable meanwhile is left out.
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        let second = air.flight.pool_of(1)[0].clone();
        air.ring.cool(&air.shared, At { provider: "anthropic", model: "claude-haiku-4-5" }, &second, limit(9_000), air.now_ms);
        assert_eq!(air.unanswered(), Next::Retry);
        assert!(air.target().0.contains("googleapis"));
    }

    /// It took as long as a first byte may, and is no lost try for that.
    #[test]
    fn what_surely_never_left_is_free_however_long_it_took() {
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        air.now_ms += 5_000;
        assert_eq!(air.flight.not_connected(&mut air.ring, &air.shared, air.now_ms), Next::Retry);
        assert!(air.target().0.contains("anthropic"));
        assert_eq!(air.unanswered(), Next::Retry);
        assert!(air.target().0.contains("googleapis"));
        air.now_ms += 5_000;
        assert_eq!(air.flight.not_connected(&mut air.ring, &air.shared, air.now_ms), Next::Pass, "nobody is left");
        let lost: Vec<_> = air.flight.tries(0).iter().map(|one| one.lost).collect();
        assert_eq!((lost, air.flight.may_have_been_sent()), (vec![false, true, false], false), "the second alone has its share");
    }

    #[test]
    fn what_a_target_cannot_do_is_told_and_nothing_leaves() {
        let body = r#"{"model":"fast","n":2,"messages":[{"role":"user","content":"Hi"}]}"#;
        let mut air = routed(body, |plan| drop(plan.targets.remove(0)));
        assert!(matches!(air.begin(), Begun::Go(_)));
        assert_eq!(air.flight.body(body.as_bytes()), None);
        let refused = air.flight.refused().unwrap().refusal;
        assert!(refused.code == Code::BadRequest && refused.message.contains("\"n\""), "{refused:?}");
        assert!(!air.flight.may_have_been_sent());
    }

    #[test]
    fn the_first_target_that_can_is_chosen_before_anything_leaves() {
        let mut air = routed(ASKED, |_| {});
        let first = air.flight.pool()[0].clone();
        air.ring.cool(&air.shared, At { provider: "openai", model: "gpt-4o" }, &first, limit(9_000), 1_000);
        air.flight.choose_target(&mut air.ring, &air.shared, 1_000);
        assert_eq!(air.flight.cluster(), "anthropic");
        assert_eq!(air.target().0, "api.anthropic.com");
    }

    /// A router that did not follow would send one provider's credential to another.
    #[test]
    fn two_providers_never_meet_on_one_cluster() {
        let mut air = routed(ASKED, |_| {});
        air.flight.runs_on("one".into(), "openai".into());
        air.target();
        // Two that can't be connected to: each is looked at with the target that it is for.
        for (cluster, named) in [("two", "anthropic"), ("three", "gemini")] {
            air.flight.runs_on(cluster.into(), named.into());
            air.target();
        }
        assert!(air.flight.may_run_on("three".into(), b"gemini") && !air.flight.may_run_on("two".into(), b"gemini"));
        for (cluster, named) in [("one", "anthropic"), ("two", "openai")] {
            let mut stray = routed(ASKED, |_| {});
            stray.flight.runs_on("one".into(), "openai".into());
            stray.target();
            stray.answer("500", &[], "{}");
            stray.flight.runs_on(cluster.into(), named.into());
            assert_eq!((stray.begin(), stray.refused().0), (Begun::Stop, Code::PolicyUnavailable), "nothing leaves");
            assert_eq!(stray.flight.number(), 1);
        }
    }

    /// The router goes to where it was told when the try began, as it does without any answer.
    #[test]
    fn an_error_that_breaks_off_before_it_was_judged_is_followed_by_where_the_router_goes() {
        let mut air = routed(ASKED, |plan| plan.first_byte_ms = Some(300));
        air.target();
        let clocks = Clocks { now_ms: air.now_ms, unix_ms: 1 };
        let headers: [(&[u8], &[u8]); 1] = [(b":status", b"429")];
        assert_eq!(air.flight.answered(&mut air.ring, &air.shared, &headers, clocks).1, Next::ReadBody);
        assert_eq!(air.flight.cluster_without_answer(), Some("anthropic"));
        assert_eq!(air.target().0, "api.anthropic.com");
        // With nobody left it is not asked for ever.
        air.target();
        assert_eq!(air.flight.answered(&mut air.ring, &air.shared, &headers, clocks).1, Next::ReadBody);
        assert_eq!((air.begin(), air.refused().0), (Begun::Stop, Code::ProviderUnreachable));
    }

    /// What became of the try before is judged once, by its own time and not by that of the wait.
    #[test]
    fn a_try_that_waits_for_its_credential_keeps_its_target() {
        for lost in [false, true] {
            let mut air = routed(ASKED, |plan| (plan.first_byte_ms, plan.wait_ms) = (Some(300), 5_000));
            air.target();
            for (target, at) in
                [(1, At { provider: "anthropic", model: "claude-haiku-4-5" }), (2, At { provider: "gemini", model: "gemini-2.5-flash" })]
            {
                let credential = air.flight.pool_of(target)[0].clone();
                air.ring.cool(&air.shared, at, &credential, limit(2_000), air.now_ms);
            }
            if lost {
                air.flight.lose(1)
            } else {
                air.flight.spare(1)
            }
            air.now_ms += 10;
            assert!(matches!(air.begin(), Begun::Wait { .. }));
            air.now_ms += 2_000;
            assert_eq!(air.target().0, "api.anthropic.com");
            assert_eq!(air.flight.tries(0)[0].lost, lost);
        }
    }

    fn limit(wait_ms: u64) -> crate::verdict::Verdict {
        crate::verdict::Verdict { state: State::RateLimited, scope: crate::verdict::Scope::Model, wait_ms, told: true }
    }

    #[test]
    fn what_is_tried_again_and_what_is_not() {
        let quota = r#"{"error":{"code":"insufficient_quota","message":"You exceeded your current quota"}}"#;
        for (status, body, next) in [
            ("429", quota, Next::Retry),
            ("401", r#"{"error":{"code":"invalid_api_key"}}"#, Next::Retry),
            ("403", r#"{"error":{"type":"permission_error"}}"#, Next::Retry),
            ("401", r#"{"error":{"message":"You have insufficient permissions for this operation. Missing scopes: x"}}"#, Next::Retry),
            ("403", "error code: 1010", Next::Pass),
            ("529", r#"{"type":"error","error":{"type":"overloaded_error"}}"#, Next::Pass),
            ("503", "", Next::Pass),
            ("500", "", Next::Pass),
            ("400", r#"{"error":{"message":"bad"}}"#, Next::Pass),
            ("404", "", Next::Pass),
            ("200", "", Next::Pass),
        ] {
            let mut air = Air::new(2, |_| {});
            air.sent();
            assert_eq!(air.answer(status, &[], body), next, "{status} {body}");
            assert_eq!(air.flight.may_have_been_sent(), next == Next::Pass);
            assert!(air.flight.refusal().is_none());
        }
    }

    #[test]
    fn a_rejected_credential_is_not_the_callers_fault() {
        let mut air = Air::new(1, |_| {});
        air.sent();
        assert_eq!(air.answer("401", &[], ""), Next::Pass);
        let refused = air.answering.headers(&mut air.flight, 1_000).unwrap_err();
        assert_eq!(refused.answer().status, 502);
        // Envoy's own 401 would not be the provider's.
        let mut own = Air::new(1, |_| {});
        own.sent();
        assert!(own.answering.headers(&mut own.flight, 1_000).is_ok());
    }

    #[test]
    fn connections_that_never_came_about_cost_nothing_and_end() {
        let mut air = Air::new(2, |_| {});
        for _ in 0..MAX_UNCONNECTED {
            assert_eq!(air.sent(), "Bearer sk-0", "the key is as good as before");
        }
        assert_eq!(air.begin(), Begun::Stop);
        assert_eq!((air.refused().0, air.flight.may_have_been_sent()), (Code::ProviderUnreachable, false));
        // Of a try that was sent and never answered nobody knows: it keeps its charge, whatever was tried before.
        let mut unknown = Air::new(2, |_| {});
        unknown.sent();
        unknown.limited("1");
        unknown.sent();
        unknown.flight.try_is_over(&mut unknown.ring);
        assert!(unknown.flight.may_have_been_sent() && !unknown.flight.was_answered());
        assert_eq!(unknown.flight.status(), None);
    }

    /// A key made for other endpoints serves those on: only this request goes to the next.
    #[test]
    fn a_permission_that_lacks_is_no_state() {
        let scopes = r#"{"error":{"message":"You have insufficient permissions for this operation. Missing scopes: api.responses.write"}}"#;
        let mut air = Air::new(2, |_| {});
        for next in [Next::Retry, Next::Pass] {
            air.sent();
            assert_eq!(air.answer("401", &[], scopes), next);
        }
        assert_eq!(air.refused(), (Code::ProviderCredentialRejected, None));
        let mut other = Air { shared: air.shared, ..Air::new(2, |_| {}) };
        assert_eq!(other.sent(), "Bearer sk-0");
    }

    #[test]
    fn a_router_that_does_not_try_again_shows_nobody_the_limit() {
        let mut air = Air::new(2, |_| {});
        air.sent();
        assert_eq!(air.limited("9"), Next::Retry);
        assert_eq!(air.answering.headers(&mut air.flight, 1_000).unwrap_err().refusal.code, Code::PoolExhausted);
    }

    #[test]
    fn what_cannot_be_sent_again_is_said_so() {
        let mut air = Air::new(2, |_| {});
        air.flight.cannot_be_replayed();
        air.sent();
        assert_eq!(air.limited("1"), Next::Pass);
        assert!(air.flight.refusal().unwrap().message.contains("too large"));
    }
}
