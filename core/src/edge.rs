//! What the filter and the policy service say to each other (`/edge/v1/*`), and the MAC that chains the filter's records.

use crate::hex;
use crate::keyring::Told;
use crate::operation::{Dialect, Provider, Site};
use crate::refusal::{Code, Headroom, Refusal};
use crate::usage::Usage;
use crate::verdict::State;
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::borrow::Cow;
use std::collections::BTreeMap;

pub const ADMIT_PATH: &str = "/edge/v1/admit";
pub const SETTLE_PATH: &str = "/edge/v1/settle";

/// 128 random bits that name one request for good. Shown as `req_` + hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(#[serde(with = "hex::serde_hex")] pub [u8; 16]);

impl RequestId {
    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        hex::decode(text.strip_prefix("req_")?).map(RequestId)
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("req_")?;
        f.write_str(hex::Hex::of(&self.0).as_str())
    }
}

impl std::fmt::Debug for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// 128 random bits that name one VM from its start to its trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VmId(#[serde(with = "hex::serde_hex")] pub [u8; 16]);

/// A provider secret on its way to the attempt. It never prints itself.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What is asked for: everything the decision and the reservation rest on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ask {
    /// The provider that the caller names; empty: the model decides.
    pub provider: String,
    /// The dialect that the caller speaks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dialect: Dialect,
    /// `METHOD /path` of the operation.
    pub endpoint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default)]
    pub stream: bool,
    /// Length of the body, in bytes.
    #[serde(default)]
    pub bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u64>,
    #[serde(default)]
    pub choices: u64,
    #[serde(default)]
    pub thinking_budget: u64,
    #[serde(default)]
    pub images: u64,
    /// The first thing found whose cost has no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unbounded: Option<String>,
    /// Objects at the provider that the request refers to, in path, query or body.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refs: Vec<String>,
    /// There is input at the provider that the body does not show.
    #[serde(default, skip_serializing_if = "is_default")]
    pub history: bool,
    /// The provider is to go on by itself after it has answered, or to keep a conversation.
    #[serde(default, skip_serializing_if = "is_default")]
    pub keeps: bool,
    /// Texts that are each taken by themselves; 0 means 1.
    #[serde(default, skip_serializing_if = "is_default")]
    pub texts: u64,
    /// Characters to speak.
    #[serde(default, skip_serializing_if = "is_default")]
    pub characters: u64,
    /// Longest that a recording can last; `None`: its form does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub partial_images: u64,
    /// Input tokens that the provider adds for what the body asks for.
    #[serde(default, skip_serializing_if = "is_default")]
    pub added: u64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A question to the policy service. Those of several requests go together, one a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdmitRequest {
    pub req: RequestId,
    pub vm: VmId,
    /// Envoy's node id.
    pub node: String,
    /// SHA-256 of the virtual key.
    #[serde(with = "hex::serde_hex")]
    pub token: [u8; 32],
    /// The VM has no edge key yet.
    #[serde(default)]
    pub need_key: bool,
    /// The caller's place in a trace, as a `traceparent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    pub ask: Ask,
}

/// The answer to a question: exactly one of `plan` and `refusal`. Answers stand in the order of their questions, one a line; `null`: the
/// request id was used before, or the line could not be read.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AdmitAnswer {
    /// Whose question it answers.
    pub req: Option<RequestId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Refusal>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edge_key: Option<EdgeKey>,
}

/// What was admitted: where to go, with which credentials, within which limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Id of the virtual key.
    pub key: String,
    /// Revision of the policy state that this was decided at.
    pub rev: u64,
    /// Output tokens to write into the body; `None`: as the caller asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamp: Option<u64>,
    /// Unix milliseconds at which the key or its token expires: the gate ends the answer then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// Output tokens that money is held for, over all choices; `None`: nothing bounds them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_limit: Option<u64>,
    /// The provider may keep what it answers: the key is allowed state.
    #[serde(default, skip_serializing_if = "is_default")]
    pub state: bool,
    /// What the limits per minute have left, for the answer's headers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headroom: Option<Headroom>,
    /// Its settlement is to be sent at once: it frees a place among requests whose number is limited.
    #[serde(default, skip_serializing_if = "is_default")]
    pub prompt: bool,
    /// The whole answer, JSON: the gate gives it and nothing is forwarded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Longest that the request may be held back while no credential is usable, in milliseconds.
    #[serde(default, skip_serializing_if = "is_default")]
    pub wait_ms: u64,
    /// The first usable credential is taken, so that the same key meets the same prompt cache.
    #[serde(default, skip_serializing_if = "is_default")]
    pub in_order: bool,
    /// What a target's provider can't do is left out of a translated request, instead of being an error.
    #[serde(default, skip_serializing_if = "is_default")]
    pub drops: bool,
    /// Longest that a target may take until the first byte of its answer before the next one is tried, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_byte_ms: Option<u64>,
    /// Where the request may go, in order. Another is tried only when the one before it can't answer.
    pub targets: Vec<PlanTarget>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanTarget {
    pub provider: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Usable credentials, best first.
    pub credentials: Vec<PlanCredential>,
    /// Most output tokens that the model gives, where its dialect must be told or other targets give more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_output: Option<u64>,
    /// Of a provider that is not built in, or not as it is built in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Box<Site>>,
}

impl PlanTarget {
    /// Where the provider is. `None`: this gate does not know it.
    pub fn site(&self) -> Option<Cow<'_, Site>> {
        match &self.site {
            Some(site) => Some(Cow::Borrowed(site)),
            None => Provider::by_name(&self.provider).map(|provider| Cow::Owned(provider.site())),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanCredential {
    pub id: String,
    pub secret: Secret,
    /// Whose limits it shares; `None`: it has an account to itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
}

impl PlanCredential {
    pub fn account(&self) -> &str {
        self.account.as_deref().unwrap_or(&self.id)
    }
}

/// News of a credential's state, between gates and service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cooled {
    /// What the state holds for, as [`crate::keyring`] names it.
    pub name: String,
    /// `None`: nothing stands against it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// How much longer it lasts, in milliseconds; without a state, for how long nothing has stood against it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ms: u64,
    /// Its end is a guess.
    #[serde(default, skip_serializing_if = "is_default")]
    pub probe: bool,
}

/// What goes before the records of a settle batch: what the VM has seen that belongs to no record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct News {
    /// Refusals that were decided without asking, by code.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub refusals: BTreeMap<String, u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cooled: Vec<Cooled>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rooms: Vec<Told>,
}

impl News {
    pub fn is_empty(&self) -> bool {
        self.refusals.is_empty() && self.cooled.is_empty() && self.rooms.is_empty()
    }
}

/// One try at a provider.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Try {
    /// Credential id.
    #[serde(rename = "c")]
    pub credential: String,
    /// The provider's status; `None`: it never answered.
    #[serde(rename = "s", default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Milliseconds from the try's start to its answer's headers, or to its end.
    pub ms: u64,
    /// The target's place in the plan.
    #[serde(rename = "t", default, skip_serializing_if = "is_default")]
    pub target: u64,
    /// It was sent, and nobody knows what became of it.
    #[serde(rename = "l", default, skip_serializing_if = "is_default")]
    pub lost: bool,
}

/// How a request ended, from the gate's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer passed whole.
    Complete,
    /// The answer stopped half way, or never came.
    Cut,
    /// The gate gave up waiting for its admission: nothing was forwarded.
    Void,
}

/// What the gate reports when a request is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settlement {
    pub req: RequestId,
    pub outcome: Outcome,
    /// Why the gate ended it before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Code>,
    /// The last try may have reached the provider; of those before it, the lost ones may.
    pub sent: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<Usage>,
    /// Bytes of text that passed, when there is no usage and they could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub visible: Option<u64>,
    /// More passed than what the request was held for allows: its hold says nothing any more of what it cost.
    #[serde(default, skip_serializing_if = "is_default")]
    pub beyond: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tries: Vec<Try>,
    /// Ids of objects that the provider made for this request and keeps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub created: Vec<String>,
    /// Id of the object that the provider deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<String>,
    /// Milliseconds from the request's headers to its end.
    pub ms: u64,
    /// Unix milliseconds at the end.
    pub at: u64,
}

/// The key of one VM's records, derived by the service from the VM's id.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EdgeKey(#[serde(with = "hex::serde_hex")] pub [u8; 32]);

impl std::fmt::Debug for EdgeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EdgeKey(..)")
    }
}

impl EdgeKey {
    /// The VM's id is part of the derivation, so a record's MAC need not cover it.
    pub fn derive(master: &[u8; 32], vm: VmId) -> Self {
        let mut key = [0; 32];
        let info = [b"keyward/edge-key/v1".as_slice(), &vm.0].concat();
        // 32 bytes are far below HKDF's limit of 255 blocks: this can't fail.
        let _ = Hkdf::<Sha256>::new(None, master).expand(&info, &mut key);
        EdgeKey(key)
    }

    /// `HMAC-SHA256(key, u64be(seq) || previous MAC || payload)`, its key already taken in: the filter makes one per request.
    fn keyed(&self) -> Option<Hmac<Sha256>> {
        // HMAC takes keys of any length: this can't fail.
        Hmac::new_from_slice(&self.0).ok()
    }
}

/// Room for a record's payload that is rarely exceeded.
const USUAL_PAYLOAD: usize = 512;

fn record_mac(mut keyed: Hmac<Sha256>, seq: u64, prev: &[u8; 32], payload: &[u8]) -> [u8; 32] {
    for part in [seq.to_be_bytes().as_slice(), prev, payload] {
        keyed.update(part);
    }
    keyed.finalize().into_bytes().into()
}

/// Where one VM's chain of records stands, and what seals the next.
#[derive(Clone)]
pub struct EdgeChain {
    vm: VmId,
    keyed: Hmac<Sha256>,
    seq: u64,
    mac: [u8; 32],
}

impl std::fmt::Debug for EdgeChain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EdgeChain({:?}, {})", self.vm, self.seq)
    }
}

impl EdgeChain {
    pub fn new(vm: VmId, key: &EdgeKey) -> Option<Self> {
        Some(EdgeChain { vm, keyed: key.keyed()?, seq: 0, mac: [0; 32] })
    }

    /// Numbers and MACs the next record.
    pub fn seal(&mut self, settlement: &Settlement) -> Record {
        let mut payload = Vec::with_capacity(USUAL_PAYLOAD);
        // Writing to memory can't fail.
        let _ = serde_json::to_writer(&mut payload, settlement);
        let payload = String::from_utf8(payload).unwrap_or_default();
        let (seq, prev) = (self.seq + 1, self.mac);
        let mac = record_mac(self.keyed.clone(), seq, &prev, payload.as_bytes());
        (self.seq, self.mac) = (seq, mac);
        Record { vm: self.vm, seq, prev, mac, payload }
    }
}

/// A sealed record: one line, the same on the edge API, in shared data and in Envoy's access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub vm: VmId,
    pub seq: u64,
    /// MAC of the VM's record before.
    pub prev: [u8; 32],
    pub mac: [u8; 32],
    payload: String,
}

impl Record {
    /// `KS1 vm seq prev mac payload`, without a line end.
    pub fn line(&self) -> String {
        let mut line = Vec::with_capacity(192 + self.payload.len());
        self.append_line(&mut line);
        String::from_utf8(line).unwrap_or_default()
    }

    /// Appends [`Self::line`].
    pub fn append_line(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"KS1 ");
        hex::append(&self.vm.0, out);
        out.extend_from_slice(format!(" {} ", self.seq).as_bytes());
        hex::append(&self.prev, out);
        out.push(b' ');
        hex::append(&self.mac, out);
        out.push(b' ');
        out.extend_from_slice(self.payload.as_bytes());
    }

    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(6, ' ');
        let mut part = || parts.next();
        (part()? == "KS1").then_some(())?;
        Some(Record {
            vm: VmId(hex::decode(part()?)?),
            seq: part()?.parse().ok()?,
            prev: hex::decode(part()?)?,
            mac: hex::decode(part()?)?,
            payload: part()?.to_owned(),
        })
    }

    /// The settlement, if the MAC is right.
    pub fn open(&self, key: &EdgeKey) -> Option<Settlement> {
        use subtle::ConstantTimeEq;
        let mac = record_mac(key.keyed()?, self.seq, &self.prev, self.payload.as_bytes());
        bool::from(mac.ct_eq(&self.mac)).then(|| serde_json::from_str(&self.payload).ok())?
    }
}

/// Answer to a settle batch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleAnswer {
    /// Records taken, duplicates included; they need not be sent again.
    pub taken: u64,
    /// Records whose MAC or form was wrong: reported, and not to be sent again.
    pub rejected: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edge_key: Option<EdgeKey>,
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn settlement() -> Settlement {
        Settlement {
            req: RequestId([1; 16]),
            outcome: Outcome::Complete,
            ended: None,
            sent: true,
            status: Some(200),
            usage: Some(Usage { input: 5, output: 7, ..Usage::default() }),
            input: None,
            visible: Some(9),
            beyond: false,
            tries: vec![Try { credential: "cred_a".into(), status: Some(200), ms: 12, target: 1, lost: false }],
            created: vec!["resp_1".into()],
            deleted: None,
            ms: 20,
            at: 1_700_000_000_000,
        }
    }

    #[test]
    fn a_record_survives_its_line_and_no_change() {
        let vm = VmId([9; 16]);
        let key = EdgeKey::derive(&[3; 32], vm);
        let mut chain = EdgeChain::new(vm, &key).unwrap();
        let first = chain.seal(&settlement());
        let second = chain.seal(&settlement());
        assert_eq!((first.seq, second.seq, second.prev), (1, 2, first.mac));
        let line = second.line();
        let [vm, prev, mac] = [hex::encode(&vm.0), hex::encode(&first.mac), hex::encode(&second.mac)];
        assert_eq!(line, format!("KS1 {vm} 2 {prev} {mac} {}", second.payload));
        assert_eq!(Record::parse(&line).unwrap().open(&key), Some(settlement()));
        for at in 0..line.len() {
            let mut bytes = line.clone().into_bytes();
            bytes[at] ^= 1;
            // As the service does it: the key is that of the VM which the line names.
            let parsed = String::from_utf8(bytes).ok().and_then(|l| Record::parse(&l));
            let opened = parsed.and_then(|r| r.open(&EdgeKey::derive(&[3; 32], r.vm)));
            assert_eq!(opened, None, "byte {at} changed");
        }
        assert_eq!(second.open(&EdgeKey::derive(&[3; 32], VmId([8; 16]))), None, "another VM's key");
    }

    #[test]
    fn a_request_id_survives_its_text() {
        let id = RequestId([0xa5; 16]);
        assert_eq!(RequestId::parse(&id.to_string()), Some(id));
        assert_eq!(RequestId::parse("req_"), None);
    }

    #[test]
    fn secrets_do_not_print() {
        let credential = PlanCredential { id: "cred_a".into(), secret: Secret("sk-real".into()), account: None };
        assert!(!format!("{credential:?}").contains("sk-real"));
        assert_eq!(format!("{:?}", EdgeKey([7; 32])), "EdgeKey(..)");
    }
}
