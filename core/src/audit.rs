//! The audit chain of one virtual key: exact bytes, an HMAC that links each entry to all before it, and the check.
//!
//! Entry: `KWE1`, kind (1 byte), then fields in fixed order; integers are big-endian u64, byte strings carry a big-endian
//! u32 length. What was stored is what is MACed: nothing is ever re-serialised.

use hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

const MAGIC: &[u8; 4] = b"KWE1";
/// Longest byte string in an entry.
const MAX_FIELD: u32 = 64 * 1024;

/// What happened. The numbers are part of the format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Admitted(Admitted),
    Refused(Refused),
    Settled(Settled),
    Voided {
        req: [u8; 16],
    },
    Expired {
        req: [u8; 16],
        charge: i64,
    },
    KeyCreated {
        actor: String,
        detail: String,
    },
    KeyChanged {
        actor: String,
        detail: String,
    },
    KeyFrozen {
        reason: String,
    },
    KeyRevoked {
        actor: String,
    },
    /// A write of the admin API that is not about one key. It stands in the organisation's own chain.
    AdminChanged {
        actor: String,
        action: String,
        target: String,
        detail: String,
    },
    /// What would have been refused, were the key not in shadow mode. Its admission follows.
    WouldRefuse(Refused),
    /// Something that a person should look at: money spent up to a share of a budget, a charge above its hold.
    Alarm {
        what: String,
        /// JSON.
        detail: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Admitted {
    pub req: [u8; 16],
    pub vm: [u8; 16],
    pub node: String,
    pub provider: String,
    pub endpoint: String,
    pub model: String,
    pub stream: bool,
    pub bytes: u64,
    /// Output tokens the body was clamped to; `u64::MAX`: not clamped.
    pub clamp: u64,
    pub choices: u64,
    /// Nanodollars.
    pub hold: i64,
    pub rev: u64,
    /// Ids of the credentials handed out, in order.
    pub credentials: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refused {
    pub req: [u8; 16],
    pub code: String,
    pub provider: String,
    pub endpoint: String,
    pub model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settled {
    pub req: [u8; 16],
    pub outcome: String,
    /// 0: the provider never answered.
    pub status: u64,
    pub input: u64,
    pub cache_read: u64,
    pub cache_write: u64,
    pub cache_write_1h: u64,
    pub output: u64,
    pub reasoning: u64,
    /// Nanodollars.
    pub charge: i64,
    pub estimated: bool,
    pub ms: u64,
    pub tries: Vec<TryEntry>,
    /// Who answered, or was asked last; empty in entries of earlier versions.
    pub provider: String,
    /// The provider's name of the model.
    pub model: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TryEntry {
    pub credential: String,
    pub status: u64,
    pub ms: u64,
}

/// One entry of a key's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub epoch: u64,
    /// From 1, without gaps, per key.
    pub seq: u64,
    /// Unix milliseconds.
    pub time_ms: u64,
    pub organisation: String,
    pub key_id: String,
    pub event: Event,
}

impl Entry {
    /// The exact bytes that are stored and MACed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(MAGIC.to_vec());
        out.0.push(self.event.kind());
        out.u64(self.epoch).u64(self.seq).u64(self.time_ms).text(&self.organisation).text(&self.key_id);
        match &self.event {
            Event::Admitted(a) => {
                out.bytes(&a.req).bytes(&a.vm).text(&a.node).text(&a.provider).text(&a.endpoint).text(&a.model);
                out.u64(u64::from(a.stream)).u64(a.bytes).u64(a.clamp).u64(a.choices).i64(a.hold).u64(a.rev);
                out.u64(a.credentials.len() as u64);
                a.credentials.iter().for_each(|id| {
                    out.text(id);
                });
            }
            Event::Refused(r) | Event::WouldRefuse(r) => {
                out.bytes(&r.req).text(&r.code).text(&r.provider).text(&r.endpoint).text(&r.model);
            }
            Event::Settled(s) => {
                out.bytes(&s.req).text(&s.outcome).u64(s.status).u64(s.input).u64(s.cache_read).u64(s.cache_write).u64(s.cache_write_1h);
                out.u64(s.output).u64(s.reasoning).i64(s.charge).u64(u64::from(s.estimated)).u64(s.ms).u64(s.tries.len() as u64);
                s.tries.iter().for_each(|t| {
                    out.text(&t.credential).u64(t.status).u64(t.ms);
                });
                out.text(&s.provider).text(&s.model);
            }
            Event::Voided { req } => {
                out.bytes(req);
            }
            Event::Expired { req, charge } => {
                out.bytes(req).i64(*charge);
            }
            Event::KeyCreated { actor, detail } | Event::KeyChanged { actor, detail } => {
                out.text(actor).text(detail);
            }
            Event::KeyFrozen { reason } => {
                out.text(reason);
            }
            Event::KeyRevoked { actor } => {
                out.text(actor);
            }
            Event::AdminChanged { actor, action, target, detail } => {
                out.text(actor).text(action).text(target).text(detail);
            }
            Event::Alarm { what, detail } => {
                out.text(what).text(detail);
            }
        }
        out.0
    }

    /// Reads exactly what [`Self::encode`] writes; `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes.strip_prefix(MAGIC)?);
        let kind = r.byte()?;
        let (epoch, seq, time_ms, organisation, key_id) = (r.u64()?, r.u64()?, r.u64()?, r.text()?, r.text()?);
        let event = match kind {
            1 => Event::Admitted(Admitted {
                req: r.array()?,
                vm: r.array()?,
                node: r.text()?,
                provider: r.text()?,
                endpoint: r.text()?,
                model: r.text()?,
                stream: r.flag()?,
                bytes: r.u64()?,
                clamp: r.u64()?,
                choices: r.u64()?,
                hold: r.i64()?,
                rev: r.u64()?,
                credentials: r.list(Reader::text)?,
            }),
            2 => Event::Refused(r.refused()?),
            // Earlier versions did not say who answered.
            3 => Event::Settled(r.settled()?),
            13 => {
                let settled = r.settled()?;
                Event::Settled(Settled { provider: r.text()?, model: r.text()?, ..settled })
            }
            4 => Event::Voided { req: r.array()? },
            5 => Event::Expired { req: r.array()?, charge: r.i64()? },
            6 => Event::KeyCreated { actor: r.text()?, detail: r.text()? },
            7 => Event::KeyChanged { actor: r.text()?, detail: r.text()? },
            8 => Event::KeyFrozen { reason: r.text()? },
            9 => Event::KeyRevoked { actor: r.text()? },
            10 => Event::AdminChanged { actor: r.text()?, action: r.text()?, target: r.text()?, detail: r.text()? },
            11 => Event::WouldRefuse(r.refused()?),
            12 => Event::Alarm { what: r.text()?, detail: r.text()? },
            _ => return None,
        };
        r.0.is_empty().then_some(Entry { epoch, seq, time_ms, organisation, key_id, event })
    }
}

impl Event {
    fn kind(&self) -> u8 {
        match self {
            Event::Admitted(_) => 1,
            Event::Refused(_) => 2,
            Event::Settled(_) => 13,
            Event::Voided { .. } => 4,
            Event::Expired { .. } => 5,
            Event::KeyCreated { .. } => 6,
            Event::KeyChanged { .. } => 7,
            Event::KeyFrozen { .. } => 8,
            Event::KeyRevoked { .. } => 9,
            Event::AdminChanged { .. } => 10,
            Event::WouldRefuse(_) => 11,
            Event::Alarm { .. } => 12,
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Event::Admitted(_) => "ADMITTED",
            Event::Refused(_) => "REFUSED",
            Event::Settled(_) => "SETTLED",
            Event::Voided { .. } => "VOIDED",
            Event::Expired { .. } => "EXPIRED",
            Event::KeyCreated { .. } => "KEY_CREATED",
            Event::KeyChanged { .. } => "KEY_CHANGED",
            Event::KeyFrozen { .. } => "KEY_FROZEN",
            Event::KeyRevoked { .. } => "KEY_REVOKED",
            Event::AdminChanged { .. } => "ADMIN_CHANGED",
            Event::WouldRefuse(_) => "WOULD_REFUSE",
            Event::Alarm { .. } => "ALARM",
        }
    }

    /// The request an entry is about.
    pub fn request(&self) -> Option<[u8; 16]> {
        match self {
            Event::Admitted(Admitted { req, .. }) | Event::Settled(Settled { req, .. }) => Some(*req),
            Event::Refused(Refused { req, .. }) | Event::WouldRefuse(Refused { req, .. }) => Some(*req),
            Event::Voided { req } | Event::Expired { req, .. } => Some(*req),
            _ => None,
        }
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u64(&mut self, n: u64) -> &mut Self {
        self.0.extend_from_slice(&n.to_be_bytes());
        self
    }
    fn i64(&mut self, n: i64) -> &mut Self {
        self.0.extend_from_slice(&n.to_be_bytes());
        self
    }
    /// A field longer than [`MAX_FIELD`] is cut: the entry must stay readable, and nothing that long is legitimate.
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let bytes = bytes.get(..MAX_FIELD as usize).unwrap_or(bytes);
        let len = u32::try_from(bytes.len()).unwrap_or(MAX_FIELD);
        self.0.extend_from_slice(&len.to_be_bytes());
        self.0.extend_from_slice(bytes);
        self
    }
    fn text(&mut self, text: &str) -> &mut Self {
        let mut end = text.len().min(MAX_FIELD as usize);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(text.as_bytes().get(..end).unwrap_or_default())
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }
    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }
    fn i64(&mut self) -> Option<i64> {
        Some(i64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }
    fn flag(&mut self) -> Option<bool> {
        match self.u64()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
    fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = u32::from_be_bytes(self.take(4)?.try_into().ok()?);
        (len <= MAX_FIELD).then(|| self.take(len as usize))?
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes()?.try_into().ok()
    }
    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }
    fn refused(&mut self) -> Option<Refused> {
        Some(Refused { req: self.array()?, code: self.text()?, provider: self.text()?, endpoint: self.text()?, model: self.text()? })
    }
    fn settled(&mut self) -> Option<Settled> {
        Some(Settled {
            req: self.array()?,
            outcome: self.text()?,
            status: self.u64()?,
            input: self.u64()?,
            cache_read: self.u64()?,
            cache_write: self.u64()?,
            cache_write_1h: self.u64()?,
            output: self.u64()?,
            reasoning: self.u64()?,
            charge: self.i64()?,
            estimated: self.flag()?,
            ms: self.u64()?,
            tries: self.list(|r| Some(TryEntry { credential: r.text()?, status: r.u64()?, ms: r.u64()? }))?,
            ..Settled::default()
        })
    }
    fn list<T>(&mut self, item: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let n = self.u64()?;
        // Each item takes at least its length prefix: a longer list can't be honest.
        if n > (self.0.len() / 4) as u64 {
            return None;
        }
        (0..n).map(|_| item(self)).collect()
    }
}

/// Key of one virtual key's chain in one epoch. Whoever holds it can check that chain, and write it.
#[derive(Clone, PartialEq, Eq)]
pub struct ChainKey(pub [u8; 32]);

impl std::fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChainKey(..)")
    }
}

impl ChainKey {
    /// `HKDF-SHA256(A[epoch], salt = SHA-256(origin), info = "keyward/chain/v1" || key_id || u64be(epoch))`.
    pub fn derive(seed: &[u8; 32], origin: &str, key_id: &str, epoch: u64) -> Self {
        let mut key = [0; 32];
        let salt = Sha256::digest(origin.as_bytes());
        let info = [b"keyward/chain/v1".as_slice(), key_id.as_bytes(), &epoch.to_be_bytes()].concat();
        // 32 bytes are far below HKDF's limit: this can't fail.
        let _ = Hkdf::<Sha256>::new(Some(&salt), seed).expand(&info, &mut key);
        ChainKey(key)
    }

    /// `h_i = HMAC-SHA256(K, h_{i-1} || entry_i)`.
    pub fn link(&self, previous: &[u8; 32], entry: &[u8]) -> [u8; 32] {
        self.mac(&[previous, entry])
    }

    /// Binds the length of an export, so that a cut tail shows: `HMAC-SHA256(K, "keyward/head/v1" || u64be(count) || h_count)`.
    pub fn head(&self, count: u64, last: &[u8; 32]) -> [u8; 32] {
        self.mac(&[b"keyward/head/v1", &count.to_be_bytes(), last])
    }

    fn mac(&self, parts: &[&[u8]]) -> [u8; 32] {
        // HMAC takes keys of any length: this can't fail.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return [0; 32] };
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    }
}

/// `h0 = SHA-256("keyward/genesis/v1\0" || origin || key_id)`.
pub fn genesis(origin: &str, key_id: &str) -> [u8; 32] {
    Sha256::new().chain_update(b"keyward/genesis/v1\0").chain_update(origin).chain_update(key_id).finalize().into()
}

/// Why a chain does not verify: the entry, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Number of the entry, from 1.
    pub entry: u64,
    pub what: &'static str,
}

/// Checks a chain entry by entry. `keys(epoch)` gives the chain key of an epoch.
pub struct Verifier<K> {
    key_id: String,
    last: [u8; 32],
    count: u64,
    epoch: u64,
    keys: K,
}

impl<K: Fn(u64) -> Option<ChainKey>> Verifier<K> {
    pub fn new(origin: &str, key_id: &str, keys: K) -> Self {
        Verifier { key_id: key_id.to_owned(), last: genesis(origin, key_id), count: 0, epoch: 0, keys }
    }

    /// Takes the next entry with its stored MAC.
    pub fn entry(&mut self, bytes: &[u8], mac: &[u8; 32]) -> Result<Entry, Broken> {
        let number = self.count + 1;
        let broken = |what| Broken { entry: number, what };
        let entry = Entry::decode(bytes).ok_or(broken("is not a well-formed entry"))?;
        if entry.key_id != self.key_id {
            return Err(broken("belongs to another key"));
        }
        if entry.seq != number {
            return Err(broken("is out of sequence"));
        }
        if entry.epoch < self.epoch {
            return Err(broken("goes back to an earlier epoch"));
        }
        let key = (self.keys)(entry.epoch).ok_or(broken("is of an epoch without a key"))?;
        if key.link(&self.last, bytes) != *mac {
            return Err(broken("does not match its MAC"));
        }
        (self.last, self.count, self.epoch) = (*mac, number, entry.epoch);
        Ok(entry)
    }

    /// Checks the end: the chain has as many entries as its head says.
    pub fn finish(self, count: u64, head: &[u8; 32]) -> Result<u64, Broken> {
        let broken = |entry, what| Broken { entry, what };
        if self.count != count {
            return Err(broken(self.count.min(count) + 1, "is missing or too many: the head tells another count"));
        }
        let key = (self.keys)(self.epoch).ok_or(broken(count, "is of an epoch without a key"))?;
        match key.head(count, &self.last) == *head {
            true => Ok(count),
            false => Err(broken(count, "does not match the head's MAC")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn entries() -> Vec<Entry> {
        let events = [
            Event::KeyCreated { actor: "bootstrap".into(), detail: "{\"label\":\"é\"}".into() },
            Event::Admitted(Admitted {
                req: [1; 16],
                vm: [2; 16],
                model: "gpt-4o".into(),
                hold: 5,
                credentials: vec!["cred_a".into(), "cred_b".into()],
                ..Admitted::default()
            }),
            Event::Settled(Settled {
                req: [1; 16],
                outcome: "complete".into(),
                charge: 3,
                tries: vec![TryEntry { credential: "cred_a".into(), status: 200, ms: 7 }],
                ..Settled::default()
            }),
            Event::Refused(Refused { req: [3; 16], code: "cap_exhausted".into(), ..Refused::default() }),
            Event::Voided { req: [4; 16] },
            Event::Expired { req: [5; 16], charge: 9 },
            Event::KeyFrozen { reason: "over hold".into() },
            Event::KeyChanged { actor: "a".into(), detail: "d".into() },
            Event::KeyRevoked { actor: "a".into() },
        ];
        let entry = |(i, event)| Entry {
            epoch: 0,
            seq: i as u64 + 1,
            time_ms: 1_700_000_000_000,
            organisation: "org_default".into(),
            key_id: "key_1".into(),
            event,
        };
        events.into_iter().enumerate().map(entry).collect()
    }

    /// Entries with their MACs.
    type Linked = Vec<(Vec<u8>, [u8; 32])>;

    fn chain() -> (ChainKey, Linked) {
        let key = ChainKey::derive(&[7; 32], "test", "key_1", 0);
        let mut last = genesis("test", "key_1");
        let linked = entries().into_iter().map(|e| {
            let bytes = e.encode();
            last = key.link(&last, &bytes);
            (bytes, last)
        });
        (key.clone(), linked.collect())
    }

    fn verify(key: &ChainKey, chain: &[(Vec<u8>, [u8; 32])], count: u64, head: &[u8; 32]) -> Result<u64, Broken> {
        let mut verifier = Verifier::new("test", "key_1", |epoch| (epoch == 0).then(|| key.clone()));
        for (bytes, mac) in chain {
            verifier.entry(bytes, mac)?;
        }
        verifier.finish(count, head)
    }

    #[test]
    fn every_kind_survives_its_bytes() {
        for entry in entries() {
            assert_eq!(Entry::decode(&entry.encode()), Some(entry));
        }
    }

    #[test]
    fn any_change_is_found_and_named() {
        let (key, chain) = chain();
        let count = chain.len() as u64;
        let head = key.head(count, &chain.last().unwrap().1);
        assert_eq!(verify(&key, &chain, count, &head), Ok(count));
        for i in 0..chain.len() {
            for at in 0..chain[i].0.len() {
                let mut changed = chain.clone();
                changed[i].0[at] ^= 0x40;
                assert_eq!(verify(&key, &changed, count, &head).unwrap_err().entry, i as u64 + 1, "entry {i}, byte {at}");
            }
            let mut removed = chain.clone();
            removed.remove(i);
            assert_eq!(verify(&key, &removed, count, &head).unwrap_err().entry, i as u64 + 1, "entry {i} removed");
            if i > 0 {
                let mut swapped = chain.clone();
                swapped.swap(i - 1, i);
                assert_eq!(verify(&key, &swapped, count, &head).unwrap_err().entry, i as u64, "{i} swapped");
            }
        }
        let cut = &chain[..chain.len() - 1];
        assert!(verify(&key, cut, count - 1, &head).is_err(), "a cut tail with an honest count");
    }

    proptest! {
        #[test]
        fn decode_never_panics_and_is_exact(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 1u8..10) {
            let framed = [MAGIC.as_slice(), &[kind], &bytes].concat();
            for bytes in [&bytes, &framed] {
                if let Some(entry) = Entry::decode(bytes) {
                    prop_assert_eq!(&entry.encode(), bytes);
                }
            }
        }
    }
}
