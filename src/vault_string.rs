//! The vault string: providers' keys, encrypted under a password, in one line of text. docs/vault-string.md is the format.
//!
//! Pure: text and bytes in, text and bytes out; randomness is an argument.

#[cfg(test)]
mod mutants;

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use argon2::{Algorithm, Argon2, Block, Version};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use std::ops::RangeInclusive;
use zeroize::Zeroizing;

/// What every vault string of this version starts with.
pub const PREFIX: &str = "kw_vault_v1_";
/// What vault strings of any version start with.
const FAMILY: &str = "kw_vault_v";
/// Longest text that is looked at. An environment variable of Linux has room for 131,071 bytes.
const MAX_TEXT: usize = 90_000;
/// Longest document with its padding, in bytes.
const MAX_DOCUMENT: usize = 64 * 1024;
/// The document is filled up to a multiple of this, so that its length tells little of what is in it.
const PADDING: usize = 256;
const NONCE: usize = 12;
const TAG: usize = 16;
/// Bytes of salt that are read; 16 are written.
const SALTS: RangeInclusive<usize> = 16..=64;
/// Version of the document inside.
const DOCUMENT_VERSION: u32 = 1;
/// Fewest characters of a password that something is sealed with.
pub const MIN_PASSWORD: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// Wrong before any password is tried. The text says what.
    Malformed(&'static str),
    /// A parameter of the key derivation is out of its bounds.
    Bounds(String),
    /// Wrong password or changed string: which of the two can't be told, and must not be.
    CannotOpen,
    /// It opened, but what is inside is not what this version reads. Tells places only, never values.
    Content(String),
    TooLarge,
    PasswordTooShort,
    /// The key derivation needs more memory than there is, in KiB.
    Memory(u32),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Malformed(what) => write!(f, "this is no vault string: {what}"),
            Error::Bounds(what) => f.write_str(what),
            Error::CannotOpen => f.write_str("the vault string can't be opened: the password is wrong, or the string was changed"),
            Error::Content(what) => write!(f, "the vault string opens, but {what}"),
            Error::TooLarge => write!(f, "a vault string holds at most {MAX_DOCUMENT} bytes"),
            Error::PasswordTooShort => write!(f, "the password of a vault string must have at least {MIN_PASSWORD} characters"),
            Error::Memory(kib) => write!(f, "opening or making this vault string needs {} MiB of memory, more than there is", kib / 1024),
        }
    }
}

/// How the key comes from the password. Exists only within the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kdf(Parameters);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Parameters {
    Argon2id { memory_kib: u32, passes: u32, lanes: u32 },
    Pbkdf2 { iterations: u32 },
}

/// Floors keep a guess dear, ceilings keep a hostile string from taking the machine. 19 MiB with two passes and 600,000
/// iterations are the least that OWASP's password storage cheat sheet gives.
const MEMORY_KIB: RangeInclusive<u32> = 19_456..=1_048_576;
const PASSES: RangeInclusive<u32> = 1..=16;
const LANES: RangeInclusive<u32> = 1..=16;
/// Memory times passes, in KiB: what it costs.
const WORK_KIB: RangeInclusive<u64> = 38_912..=4_194_304;
const ITERATIONS: RangeInclusive<u32> = 600_000..=10_000_000;

const ARGON2ID: u8 = 1;
const PBKDF2: u8 = 2;

/// The key of the cipher.
type DerivedKey = Zeroizing<[u8; 32]>;

impl Default for Kdf {
    fn default() -> Self {
        Kdf(Parameters::Argon2id { memory_kib: 65_536, passes: 3, lanes: 4 })
    }
}

impl Kdf {
    /// Argon2id, version 0x13.
    pub fn argon2id(memory_kib: u32, passes: u32, lanes: u32) -> Result<Self, Error> {
        let bound = |fine: bool, what: String| if fine { Ok(()) } else { Err(Error::Bounds(what)) };
        let range = |name: &str, range: RangeInclusive<u32>| format!("Argon2id {name} must be {} to {}", range.start(), range.end());
        bound(MEMORY_KIB.contains(&memory_kib), range("memory in KiB", MEMORY_KIB))?;
        bound(PASSES.contains(&passes), range("passes", PASSES))?;
        bound(LANES.contains(&lanes), range("lanes", LANES))?;
        let work = u64::from(memory_kib) * u64::from(passes);
        let text = format!("Argon2id memory in KiB times passes must be {} to {}", WORK_KIB.start(), WORK_KIB.end());
        bound(WORK_KIB.contains(&work), text)?;
        Ok(Kdf(Parameters::Argon2id { memory_kib, passes, lanes }))
    }

    /// PBKDF2-HMAC-SHA256.
    pub fn pbkdf2(iterations: u32) -> Result<Self, Error> {
        let text = || Error::Bounds(format!("PBKDF2 iterations must be {} to {}", ITERATIONS.start(), ITERATIONS.end()));
        if ITERATIONS.contains(&iterations) { Ok(Kdf(Parameters::Pbkdf2 { iterations })) } else { Err(text()) }
    }

    fn write(self, out: &mut Vec<u8>) {
        let (id, numbers): (u8, &[u32]) = match self.0 {
            Parameters::Argon2id { memory_kib, passes, lanes } => (ARGON2ID, &[memory_kib, passes, lanes]),
            Parameters::Pbkdf2 { iterations } => (PBKDF2, &[iterations]),
        };
        out.push(id);
        out.extend(numbers.iter().flat_map(|number| number.to_be_bytes()));
    }

    fn read(bytes: &mut Bytes<'_>) -> Result<Self, Error> {
        match bytes.byte()? {
            ARGON2ID => Kdf::argon2id(bytes.number()?, bytes.number()?, bytes.number()?),
            PBKDF2 => Kdf::pbkdf2(bytes.number()?),
            _ => Err(Error::Malformed("its key derivation is not known")),
        }
    }

    fn derive(self, password: &str, salt: &[u8]) -> Result<DerivedKey, Error> {
        let (password, mut key) = (password.as_bytes(), Zeroizing::new([0; 32]));
        match self.0 {
            Parameters::Argon2id { memory_kib, passes, lanes } => {
                let bounds = |error: argon2::Error| Error::Bounds(error.to_string());
                let parameters = argon2::Params::new(memory_kib, passes, lanes, Some(key.len())).map_err(bounds)?;
                let blocks = parameters.block_count();
                // Memory of our own: what is in it leads to the key, so it is wiped; and too little of it is no abort.
                let mut memory = Zeroizing::new(Vec::new());
                memory.try_reserve_exact(blocks).map_err(|_| Error::Memory(memory_kib))?;
                memory.resize(blocks, Block::default());
                let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, parameters);
                argon2.hash_password_into_with_memory(password, salt, key.as_mut_slice(), memory.as_mut_slice()).map_err(bounds)?;
            }
            Parameters::Pbkdf2 { iterations } => pbkdf2::pbkdf2_hmac::<sha2::Sha256>(password, salt, iterations, key.as_mut_slice()),
        }
        Ok(key)
    }
}

/// The randomness of one sealing. Used once.
pub struct Fresh {
    pub salt: [u8; 16],
    pub nonce: [u8; NONCE],
}

/// Encrypts under a password. A new salt each time makes a new key each time.
pub fn seal(contents: &Contents, password: &str, kdf: Kdf, fresh: &Fresh) -> Result<String, Error> {
    if password.chars().count() < MIN_PASSWORD {
        return Err(Error::PasswordTooShort);
    }
    seal_with(contents, &kdf.derive(password, &fresh.salt)?, kdf, fresh)
}

fn seal_with(contents: &Contents, key: &DerivedKey, kdf: Kdf, fresh: &Fresh) -> Result<String, Error> {
    let document = contents.write()?;
    let mut bytes = Vec::new();
    kdf.write(&mut bytes);
    bytes.push(u8::try_from(fresh.salt.len()).map_err(|_| Error::TooLarge)?);
    bytes.extend(fresh.salt);
    bytes.extend(fresh.nonce);
    let payload = Payload { msg: &document, aad: &associated(&bytes) };
    let sealed = cipher(key).encrypt(&Nonce::from(fresh.nonce), payload).map_err(|_| Error::TooLarge)?;
    bytes.extend(sealed);
    Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes)))
}

/// A vault string whose form is right. What it says of itself is authenticated only by opening it.
#[derive(Debug)]
pub struct Sealed {
    kdf: Kdf,
    salt: Vec<u8>,
    nonce: [u8; NONCE],
    header: Vec<u8>,
    ciphertext: Vec<u8>,
}

impl Sealed {
    /// Reads the form. Costs no more than the length of the text, whatever it says.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_TEXT {
            return Err(Error::Malformed("it is too long"));
        }
        let Some(body) = text.strip_prefix(PREFIX) else {
            let newer = text.starts_with(FAMILY);
            return Err(Error::Malformed(if newer {
                "this keyward does not know its version"
            } else {
                "it does not start with kw_vault_v1_"
            }));
        };
        // One text for one value: padding, other alphabets, white space and left-over bits are refused.
        let decoded = URL_SAFE_NO_PAD.decode(body).map_err(|_| Error::Malformed("it is not base64url without padding"))?;
        let mut bytes = Bytes(&decoded);
        let kdf = Kdf::read(&mut bytes)?;
        let salt = usize::from(bytes.byte()?);
        if !SALTS.contains(&salt) {
            return Err(Error::Malformed("its salt has no fitting length"));
        }
        let salt = bytes.take(salt)?.to_vec();
        let nonce = bytes.array()?;
        let ciphertext = bytes.0.to_vec();
        let document = ciphertext.len().checked_sub(TAG).ok_or(CUT)?;
        if document == 0 || document % PADDING != 0 || document > MAX_DOCUMENT {
            return Err(Error::Malformed("its length does not fit; it may be cut off"));
        }
        let header = decoded.get(..decoded.len() - ciphertext.len()).ok_or(CUT)?.to_vec();
        Ok(Sealed { kdf, salt, nonce, header, ciphertext })
    }

    pub fn kdf(&self) -> Kdf {
        self.kdf
    }

    /// Opens it. A wrong password and a changed string cost and say the same.
    pub fn open(&self, password: &str) -> Result<Contents, Error> {
        self.open_with(&self.kdf.derive(password, &self.salt)?)
    }

    fn open_with(&self, key: &DerivedKey) -> Result<Contents, Error> {
        let payload = Payload { msg: &self.ciphertext, aad: &associated(&self.header) };
        let document = cipher(key).decrypt(&Nonce::from(self.nonce), payload).map(Zeroizing::new).map_err(|_| Error::CannotOpen)?;
        Contents::read(&document)
    }
}

/// What is authenticated beside the ciphertext: everything before it, the prefix included.
fn associated(header: &[u8]) -> Vec<u8> {
    [PREFIX.as_bytes(), header].concat()
}

fn cipher(key: &DerivedKey) -> Aes256Gcm {
    Aes256Gcm::new(&aes_gcm::Key::<Aes256Gcm>::from(**key))
}

const CUT: Error = Error::Malformed("it is cut off");

/// What is still to be read of a header.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(CUT)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        self.take(N)?.try_into().map_err(|_| CUT)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        self.array().map(|[byte]| byte)
    }

    fn number(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_be_bytes)
    }
}

/// One provider's key. Exists only if it can be used: a header has to carry the secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawKey")]
pub struct Key {
    provider: String,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    account: Option<String>,
    secret: Zeroizing<String>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    ext: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKey {
    provider: String,
    name: String,
    #[serde(default)]
    account: Option<String>,
    secret: Zeroizing<String>,
    #[serde(default)]
    ext: Map<String, Value>,
}

impl TryFrom<RawKey> for Key {
    type Error = &'static str;

    fn try_from(raw: RawKey) -> Result<Self, &'static str> {
        let RawKey { provider, name, account, secret, ext } = raw;
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
        if provider.is_empty() || provider.len() > 64 || !provider.bytes().all(word) {
            return Err("a provider's name has 1 to 64 of a-z, 0-9, - and _");
        }
        let line = |text: &str| !text.is_empty() && text.len() <= 200 && !text.chars().any(char::is_control);
        if !line(&name) {
            return Err("a name has 1 to 200 bytes and no control characters");
        }
        if !account.as_deref().is_none_or(line) {
            return Err("an account has 1 to 200 bytes and no control characters");
        }
        if secret.is_empty() || secret.len() > 4_096 || !secret.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("a secret has 1 to 4096 visible ASCII characters");
        }
        if secret.starts_with(keyward_core::token::PREFIX) {
            return Err("this secret is a virtual key: what belongs here is the provider's own key");
        }
        Ok(Key { provider, name, account, secret, ext })
    }
}

impl Key {
    /// The error says what does not fit, never the value.
    pub fn new(provider: &str, name: &str, account: Option<String>, secret: Zeroizing<String>) -> Result<Self, &'static str> {
        Key::try_from(RawKey { provider: provider.to_owned(), name: name.to_owned(), account, secret, ext: Map::new() })
    }

    pub fn provider(&self) -> &str {
        &self.provider
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Provider account whose limits it shares; `None`: its own.
    pub fn account(&self) -> Option<&str> {
        self.account.as_deref()
    }

    pub fn secret(&self) -> &Zeroizing<String> {
        &self.secret
    }

    fn is(&self, provider: &str, name: &str) -> bool {
        self.provider == provider && self.name == name
    }
}

/// Without the secret.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.provider, self.name)
    }
}

/// What a vault string holds: keys, each with a provider and name of its own.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contents {
    keys: Vec<Key>,
    ext: Map<String, Value>,
}

/// The document as JSON. `ext` is the seam, here and in each key: what later versions add there may be ignored, and
/// whoever rewrites the document keeps it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document<K> {
    version: u32,
    keys: K,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    ext: Map<String, Value>,
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

impl Contents {
    pub fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// Adds a key. False if there is one of this provider and name already: then nothing changes.
    #[must_use]
    pub fn add(&mut self, key: Key) -> bool {
        let new = !self.keys.iter().any(|known| known.is(&key.provider, &key.name));
        if new {
            self.keys.push(key);
        }
        new
    }

    /// Removes a key. False if there is none.
    #[must_use]
    pub fn remove(&mut self, provider: &str, name: &str) -> bool {
        let before = self.keys.len();
        self.keys.retain(|key| !key.is(provider, name));
        self.keys.len() < before
    }

    /// The document, filled up with spaces: JSON may end in them, so that no reader has to cut.
    fn write(&self) -> Result<Zeroizing<Vec<u8>>, Error> {
        // All the room at once: a buffer that grows leaves copies of secrets behind.
        let mut room = Zeroizing::new(vec![b' '; MAX_DOCUMENT]);
        let mut free = room.as_mut_slice();
        let document = Document { version: DOCUMENT_VERSION, keys: &self.keys, ext: self.ext.clone() };
        serde_json::to_writer(&mut free, &document).map_err(|_| Error::TooLarge)?;
        let left = free.len();
        let written = room.len() - left;
        room.truncate(written.next_multiple_of(PADDING));
        Ok(room)
    }

    fn read(document: &[u8]) -> Result<Self, Error> {
        // serde_json's own words may repeat a value.
        let wrong = |error: serde_json::Error| {
            Error::Content(format!("its content does not fit (line {}, column {})", error.line(), error.column()))
        };
        let VersionOnly { version } = serde_json::from_slice(document).map_err(wrong)?;
        if version != DOCUMENT_VERSION {
            return Err(Error::Content(format!("this keyward does not know version {version} of its content")));
        }
        let Document::<Vec<Key>> { keys, ext, .. } = serde_json::from_slice(document).map_err(wrong)?;
        let mut contents = Contents { keys: Vec::with_capacity(keys.len()), ext };
        for key in keys {
            if !contents.add(key) {
                return Err(Error::Content("two of its keys have the same provider and name".to_owned()));
            }
        }
        Ok(contents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWORD: &str = "correct horse battery";
    /// The cheapest that is accepted.
    pub(super) fn floor() -> Kdf {
        Kdf::argon2id(*MEMORY_KIB.start(), 2, 1).unwrap()
    }

    fn fresh(n: u8) -> Fresh {
        Fresh { salt: [n; 16], nonce: [n ^ 0x55; NONCE] }
    }

    pub(super) fn key(provider: &str, name: &str, secret: &str) -> Key {
        Key::new(provider, name, None, Zeroizing::new(secret.to_owned())).unwrap()
    }

    fn contents(keys: impl IntoIterator<Item = Key>) -> Contents {
        let mut contents = Contents::default();
        keys.into_iter().for_each(|key| assert!(contents.add(key)));
        contents
    }

    /// A string with this document, whatever it says, sealed with a key that is given: what a foreign writer may send.
    fn foreign(document: &str) -> Result<Contents, Error> {
        let mut plain = document.as_bytes().to_vec();
        plain.resize(plain.len().next_multiple_of(PADDING), b' ');
        Contents::read(&plain)
    }

    #[test]
    fn opens_with_its_password_and_no_other() {
        let held = contents([key("openai", "main", "sk-one"), key("openai", "spare", "sk-two"), key("anthropic", "main", "sk-three")]);
        let text = seal(&held, PASSWORD, floor(), &fresh(1)).unwrap();
        let sealed = Sealed::parse(&text).unwrap();
        assert_eq!(sealed.open(PASSWORD).unwrap(), held);
        for wrong in ["", "correct horse batterY", "correct horse battery ", "correct horse", "Correct horse battery"] {
            assert_eq!(sealed.open(wrong).unwrap_err(), Error::CannotOpen, "{wrong:?}");
        }
    }

    /// The cipher itself vouches for what stands before the ciphertext, not only the key that this leads to.
    #[test]
    fn every_bit_before_the_ciphertext_is_authenticated() {
        let key = Zeroizing::new([9; 32]);
        let text = seal_with(&Contents::default(), &key, floor(), &fresh(3)).unwrap();
        let mut sealed = Sealed::parse(&text).unwrap();
        assert!(sealed.open_with(&key).is_ok());
        for (at, bit) in (0..sealed.header.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            sealed.header[at] ^= 1 << bit;
            assert_eq!(sealed.open_with(&key).unwrap_err(), Error::CannotOpen, "bit {bit} of byte {at}");
            sealed.header[at] ^= 1 << bit;
        }
        let without_prefix = Payload { msg: &sealed.ciphertext, aad: &sealed.header };
        assert!(cipher(&key).decrypt(&Nonce::from(sealed.nonce), without_prefix).is_err());
    }

    /// A string made by an older keyward opens with this one; and what this one writes is what its other readers know.
    #[test]
    fn strings_of_old_open() {
        for golden in [include_str!("../tests/vault-string/argon2id.json"), include_str!("../tests/vault-string/pbkdf2.json")] {
            let golden: Value = serde_json::from_str(golden).unwrap();
            let text = |field: &str| golden[field].as_str().unwrap();
            let sealed = Sealed::parse(text("vault")).unwrap();
            let opened = sealed.open(text("password")).unwrap();
            let document: Value = serde_json::from_slice(&opened.write().unwrap()).unwrap();
            assert_eq!(document, golden["content"], "and with it all its extensions");
            let fresh = Fresh { salt: sealed.salt.as_slice().try_into().unwrap(), nonce: sealed.nonce };
            assert_eq!(seal(&opened, text("password"), sealed.kdf(), &fresh).unwrap(), text("vault"));
        }
    }

    #[test]
    fn parameters_out_of_bounds_are_refused_before_they_cost_anything() {
        let kib = |n: u32| n * 1024;
        for (memory, passes, lanes) in [(19_456, 2, 1), (kib(64), 3, 4), (kib(1024), 4, 16), (kib(256), 16, 1), (38_912, 1, 1)] {
            assert!(Kdf::argon2id(memory, passes, lanes).is_ok(), "{memory} {passes} {lanes}");
        }
        let argon2id = [
            (19_455, 3, 1),
            (19_456, 1, 1),
            (38_911, 1, 1),
            (kib(1024) + 1, 1, 1),
            (kib(1024), 5, 1),
            (kib(64), 0, 1),
            (kib(64), 17, 1),
            (kib(64), 3, 0),
            (kib(64), 3, 17),
            (0, 0, 0),
            (u32::MAX, u32::MAX, u32::MAX),
        ];
        for (memory, passes, lanes) in argon2id {
            assert!(matches!(Kdf::argon2id(memory, passes, lanes), Err(Error::Bounds(_))), "{memory} {passes} {lanes}");
            let header = [&[ARGON2ID][..], &memory.to_be_bytes(), &passes.to_be_bytes(), &lanes.to_be_bytes(), &[16], &[0; 16 + 12 + 272]];
            let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(header.concat()));
            assert!(matches!(Sealed::parse(&text), Err(Error::Bounds(_))), "in a string: {memory} {passes} {lanes}");
        }
        assert!(Kdf::pbkdf2(600_000).is_ok() && Kdf::pbkdf2(10_000_000).is_ok());
        for iterations in [0, 1, 599_999, 10_000_001, u32::MAX] {
            assert!(matches!(Kdf::pbkdf2(iterations), Err(Error::Bounds(_))), "{iterations}");
            let header = [&[PBKDF2][..], &iterations.to_be_bytes(), &[16], &[0; 16 + 12 + 272]];
            let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(header.concat()));
            assert!(matches!(Sealed::parse(&text), Err(Error::Bounds(_))), "in a string: {iterations}");
        }
    }

    /// Lengths that a header may claim, at their edges.
    #[test]
    fn lengths_out_of_bounds_are_refused() {
        let text = |salt: u8, document: usize| {
            let mut bytes = Vec::new();
            floor().write(&mut bytes);
            bytes.push(salt);
            bytes.resize(bytes.len() + usize::from(salt) + NONCE + document + TAG, 7);
            format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
        };
        for (salt, document) in [(16, 256), (64, 256), (16, MAX_DOCUMENT), (64, MAX_DOCUMENT)] {
            assert!(Sealed::parse(&text(salt, document)).is_ok(), "{salt} {document}");
            assert!(text(salt, document).len() <= MAX_TEXT);
        }
        for (salt, document) in [(0, 256), (15, 256), (65, 256), (255, 256), (16, 0), (16, 255), (16, 257), (16, MAX_DOCUMENT + 256)] {
            assert!(matches!(Sealed::parse(&text(salt, document)), Err(Error::Malformed(_))), "{salt} {document}");
        }
        assert!(matches!(Sealed::parse(&format!("{PREFIX}{}", "A".repeat(100_000_000))), Err(Error::Malformed("it is too long"))));
    }

    #[test]
    fn another_version_is_named_as_such() {
        let text = seal(&Contents::default(), PASSWORD, floor(), &fresh(1)).unwrap().replace("_v1_", "_v2_");
        let Err(Error::Malformed(what)) = Sealed::parse(&text) else { panic!("it was read") };
        assert!(what.contains("version"), "{what}");
        assert!(matches!(foreign(r#"{"version": 2, "keyring": {}}"#), Err(Error::Content(what)) if what.contains("version 2")));
    }

    /// Fields that this version does not know could change what the others mean; only `ext` may be ignored, and it is kept.
    #[test]
    fn unknown_fields_are_refused_and_extensions_are_kept() {
        let fine =
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": "sk", "ext": {"weight": 3}}], "ext": {"x": [1]}}"#;
        let opened = foreign(fine).unwrap();
        let written: Value = serde_json::from_slice(&opened.write().unwrap()).unwrap();
        assert_eq!(written, serde_json::from_str::<Value>(fine).unwrap());
        for wrong in [
            "",
            "[]",
            r#"{"keys": []}"#,
            r#"{"version": 1}"#,
            r#"{"version": 1, "keys": [], "more": 1}"#,
            r#"{"version": 1, "keys": []} x"#,
            r#"{"version": 1, "version": 1, "keys": []}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": "sk", "scope": "x"}]}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a"}]}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": "s"}, {"provider": "openai", "name": "a", "secret": "t"}]}"#,
        ] {
            assert!(matches!(foreign(wrong), Err(Error::Content(_))), "{wrong}");
        }
    }

    #[test]
    fn a_key_that_could_not_be_used_does_not_exist() {
        let make = |provider: &str, name: &str, account: Option<&str>, secret: &str| {
            Key::new(provider, name, account.map(str::to_owned), Zeroizing::new(secret.to_owned())).is_ok()
        };
        assert!(make("openai", "main key, 2026", Some("org-1"), "sk-\"'!"));
        for (provider, name, account, secret) in [
            ("", "n", None, "s"),
            ("Open AI", "n", None, "s"),
            ("openai", "", None, "s"),
            ("openai", "a\nb", None, "s"),
            ("openai", "\u{1b}[2J", None, "s"),
            ("openai", "n", Some(""), "s"),
            ("openai", "n", None, ""),
            ("openai", "n", None, "two words"),
            ("openai", "n", None, "line\n"),
            ("openai", "n", None, "schl\u{fc}ssel"),
            ("openai", "n", None, "vk_0123"),
        ] {
            assert!(!make(provider, name, account, secret), "{provider:?} {name:?} {account:?} {secret:?}");
        }
        assert!(!make("openai", &"n".repeat(201), None, "s") && !make("openai", "n", None, &"s".repeat(4_097)));
    }

    /// Neither what is held nor what goes wrong with it prints a secret.
    #[test]
    fn no_secret_is_printed() {
        let held = contents([key("openai", "main", "sk-canary")]);
        assert_eq!(format!("{held:?}"), "Contents { keys: [openai/main], ext: {} }");
        for document in [
            r#"{"version": "sk-canary", "keys": []}"#,
            r#"{"version": 1, "keys": ["sk-canary"]}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": {"sk-canary": 1}}]}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": "sk-canary", "sk-canary": 1}]}"#,
            r#"{"version": 1, "keys": [{"provider": "openai", "name": "a", "secret": "sk-canary "}]}"#,
        ] {
            let error = foreign(document).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("canary"), "{error:?}");
        }
    }

    #[test]
    fn a_short_password_makes_nothing() {
        for (password, fine) in [("", false), ("1234567", false), ("12345678", true), ("\u{fc}\u{fc}\u{fc}\u{fc}", false)] {
            let made = seal(&Contents::default(), password, floor(), &fresh(1));
            assert_eq!(made.is_ok(), fine, "{password:?}");
            assert!(fine || made == Err(Error::PasswordTooShort));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_not_cut() {
        let many = |count: usize| contents((0..count).map(|n| key("openai", &format!("key {n}"), &"s".repeat(4_000))));
        assert!(many(16).write().is_ok());
        assert_eq!(many(17).write().unwrap_err(), Error::TooLarge);
        assert!(Sealed::parse(&seal(&many(16), PASSWORD, floor(), &fresh(2)).unwrap()).is_ok());
    }

    fn any_key() -> impl Strategy<Value = Key> {
        let account = proptest::option::of("[^\\p{Cc}]{1,40}");
        ("[a-z0-9_-]{1,20}", "[^\\p{Cc}]{1,40}", account, "s[!-~]{0,200}")
            .prop_map(|(provider, name, account, secret)| Key::new(&provider, &name, account, Zeroizing::new(secret)).unwrap())
    }

    proptest! {
        /// Whatever keys go in come out, in their order, and the length tells only how many blocks of 256 there are.
        #[test]
        fn what_goes_in_comes_out(keys in proptest::collection::vec(any_key(), 0..12), salt: [u8; 16], nonce: [u8; NONCE], key: [u8; 32]) {
            let mut held = Contents::default();
            for key in keys {
                let _ = held.add(key);
            }
            let key = Zeroizing::new(key);
            let text = seal_with(&held, &key, floor(), &Fresh { salt, nonce }).unwrap();
            let sealed = Sealed::parse(&text).unwrap();
            prop_assert_eq!((sealed.salt.as_slice(), sealed.nonce, sealed.kdf()), (salt.as_slice(), nonce, floor()));
            prop_assert_eq!((sealed.ciphertext.len() - TAG) % PADDING, 0);
            prop_assert_eq!(sealed.open_with(&key).unwrap(), held);
        }

        /// Any text at all is read or refused, at no more cost than its length.
        #[test]
        fn any_text_is_read_or_refused(body in "(kw_vault_v1_)?[A-Za-z0-9_=-]{0,600}") {
            let _ = Sealed::parse(&body);
        }
    }
}
