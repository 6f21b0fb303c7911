//! 20,000 changed vault strings: none may open.
//!
//! Each goes the whole way: `parse`, key derivation, `open_with`. A derivation is done once for the same parameters and salt
//! (its result depends on nothing else), so that a mutant that left these alone does not pay for it again, and one that
//! changed them does.

use super::tests::{floor, key};
use super::*;
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const PASSWORD: &str = "correct horse battery";
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// SplitMix64: the same mutants in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() % end as u64).unwrap()
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

fn bytes_of(text: &str) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX).unwrap()).unwrap()
}

fn text_of(bytes: &[u8]) -> String {
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
}

/// Changes to what the text stands for.
fn change_bytes(dice: &mut Dice, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let (at, second) = (dice.below(out.len()), dice.below(out.len()));
    match dice.below(9) {
        0 | 1 => out[at] ^= 1 << dice.below(8),
        2 => out[at] = dice.roll().to_le_bytes()[0],
        3 => out.swap(at, second),
        4 => out.truncate(at),
        5 => drop(out.drain(at.min(second)..at.max(second))),
        6 => out.insert(at, dice.roll().to_le_bytes()[0]),
        // Sixteen bytes change places: the cipher's own block.
        7 => {
            let (a, b) = (at.min(out.len() - 16), second.min(out.len() - 16));
            for n in 0..16 {
                out.swap(a + n, b + n);
            }
        }
        // A piece of another string of the same password, at the same place.
        _ => {
            let (from, to) = (at.min(second), at.max(second).min(other.len()));
            out[from.min(to)..to].copy_from_slice(&other[from.min(to)..to]);
        }
    }
    out
}

/// Other parameters, in bounds and out of them, and a whole header of other form.
fn change_parameters(dice: &mut Dice, bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    let number = |dice: &mut Dice, near: u32| match dice.below(4) {
        0 => near.wrapping_add(u32::try_from(dice.below(64)).unwrap()),
        1 => near.wrapping_sub(u32::try_from(dice.below(64)).unwrap()),
        2 => dice.of(&[0, 1, 2, 15, 16, 17, 1 << 14, 1 << 20, (1 << 20) + 1, 1 << 24, u32::MAX]),
        _ => u32::try_from(dice.roll() >> 32).unwrap(),
    };
    match dice.below(6) {
        0 => out[0] = dice.roll().to_le_bytes()[0],
        // The length of the salt: its end becomes part of the nonce, or the other way round.
        1 => {
            let at = if out[0] == ARGON2ID { 13 } else { 5 };
            out[at] = dice.roll().to_le_bytes()[0];
        }
        2 => {
            let mut header = Vec::new();
            let kdf = dice.of(&[floor(), Kdf::argon2id(38_912, 1, 1).unwrap(), Kdf::pbkdf2(600_000).unwrap()]);
            kdf.write(&mut header);
            let old = if out[0] == ARGON2ID { 13 } else { 5 };
            drop(out.splice(..old, header));
        }
        n => {
            let at = if out[0] == ARGON2ID { 1 + 4 * (n - 3) } else { 1 };
            let near = u32::from_be_bytes(out[at..at + 4].try_into().unwrap());
            out[at..at + 4].copy_from_slice(&number(dice, near).to_be_bytes());
        }
    }
    out
}

/// Changes to the text itself.
fn change_text(dice: &mut Dice, text: &str) -> String {
    let mut out = text.as_bytes().to_vec();
    let (at, second) = (dice.below(out.len()), dice.below(out.len()));
    match dice.below(8) {
        0 => out[at] ^= 1 << dice.below(7),
        1 => out[at] = dice.of(ALPHABET),
        2 => out.swap(at, second),
        3 => out.truncate(at),
        4 => drop(out.drain(at.min(second)..at.max(second))),
        5 => out.insert(at, dice.of(ALPHABET)),
        6 => out.insert(at, dice.of(b"=+/ \n\r\t\0.,%~")),
        _ => out[at] = if out[at].is_ascii_lowercase() { out[at].to_ascii_uppercase() } else { out[at].to_ascii_lowercase() },
    }
    String::from_utf8(out).unwrap()
}

/// The same bytes said in another way, or almost. Finitely many.
fn reencodings(text: &str) -> Vec<String> {
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE};
    let (bytes, body) = (bytes_of(text), text.strip_prefix(PREFIX).unwrap());
    let mut all: Vec<String> = vec![
        format!("{PREFIX}{}", STANDARD.encode(&bytes)),
        format!("{PREFIX}{}", STANDARD_NO_PAD.encode(&bytes)),
        format!("{PREFIX}{}", URL_SAFE.encode(&bytes)),
        format!("{PREFIX}{body}="),
        format!("{PREFIX}{body}=="),
        format!("{PREFIX}{}", keyward_core::hex::encode(&bytes)),
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(body)),
        format!("{PREFIX}{text}"),
        format!("{text}{text}"),
        format!("\u{feff}{text}"),
        format!("{text}\u{200b}"),
        body.to_owned(),
        String::new(),
        PREFIX.to_owned(),
    ];
    for space in [" ", "\n", "\r\n", "\t", "\0", "\"", "'"] {
        all.extend([format!("{space}{text}"), format!("{text}{space}"), format!("{PREFIX}{space}{body}")]);
    }
    for prefix in
        ["kw_vault_v0_", "kw_vault_v2_", "kw_vault_v11_", "kw_vault_v01_", "KW_VAULT_V1_", "kw_vault_v1", "kw-vault-v1-", "w_vault_v1_"]
    {
        all.push(format!("{prefix}{body}"));
    }
    // Every other last digit: those that say the same bytes have bits left over.
    let (last, rest) = text.as_bytes().split_last().unwrap();
    let others = ALPHABET.iter().filter(|digit| *digit != last);
    all.extend(others.map(|&digit| String::from_utf8([rest, &[digit]].concat()).unwrap()));
    all
}

/// So many different texts, none of them one that opens.
fn mutants(count: usize, seed: u64, originals: &[String; 2]) -> Vec<String> {
    let (mut dice, mut seen) = (Dice(seed), HashSet::new());
    let mut all: Vec<String> = originals.iter().flat_map(|text| reencodings(text)).collect();
    while all.len() < count {
        let n = dice.below(2);
        let (text, other) = (&originals[n], &originals[1 - n]);
        all.push(match dice.below(20) {
            0 => text_of(&change_parameters(&mut dice, &bytes_of(text))),
            1..=11 => text_of(&change_bytes(&mut dice, &bytes_of(text), &bytes_of(other))),
            _ => change_text(&mut dice, text),
        });
        // Kept out here, so that the count is one of different mutants.
        let newest = all.last().unwrap();
        if originals.contains(newest) || !seen.insert(newest.clone()) {
            all.pop();
        }
    }
    all
}

/// Opens as `Sealed::open` does, with the derivations remembered.
#[derive(Default)]
struct Opener {
    derived: Mutex<HashMap<(Kdf, Vec<u8>), DerivedKey>>,
    derivations: AtomicUsize,
    malformed: AtomicUsize,
    closed: AtomicUsize,
}

impl Opener {
    fn open(&self, text: &str) -> Result<Contents, Error> {
        let result = Sealed::parse(text).and_then(|sealed| sealed.open_with(&self.derive(&sealed)?));
        match &result {
            Err(Error::CannotOpen) => self.closed.fetch_add(1, Ordering::Relaxed),
            Err(Error::Malformed(_) | Error::Bounds(_)) => self.malformed.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
        result
    }

    fn derive(&self, sealed: &Sealed) -> Result<DerivedKey, Error> {
        let inputs = (sealed.kdf, sealed.salt.clone());
        if let Some(known) = self.derived.lock().unwrap().get(&inputs) {
            return Ok(known.clone());
        }
        let key = sealed.kdf.derive(PASSWORD, &sealed.salt)?;
        self.derivations.fetch_add(1, Ordering::Relaxed);
        self.derived.lock().unwrap().insert(inputs, key.clone());
        Ok(key)
    }
}

/// Two strings of the same password, and `count` mutants of them: the two open, the mutants do not.
fn none_opens(kdf: Kdf, count: usize, seed: u64) {
    let text = |n: u8| {
        let mut contents = Contents::default();
        // Long enough that most of a string is ciphertext, as it is in life.
        for name in ["main", "spare", "batch"] {
            assert!(contents.add(key("openai", name, &format!("sk-proj-{n}-{}", name.repeat(30)))));
        }
        seal(&contents, PASSWORD, kdf, &Fresh { salt: [n; 16], nonce: [n + 100; NONCE] }).unwrap()
    };
    let originals = [text(1), text(2)];
    let opener = Opener::default();
    for original in &originals {
        assert_eq!(opener.open(original).unwrap().keys().len(), 3, "without this the test could not fail");
    }
    let all = mutants(count, seed, &originals);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    assert!(opener.open(mutant).is_err(), "seed {seed}: this opens: {mutant}");
                }
            });
        }
    });
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let (malformed, closed) = (count(&opener.malformed), count(&opener.closed));
    println!("{} mutants: {malformed} have no form, {closed} do not open; {} derivations", all.len(), count(&opener.derivations));
    assert_eq!(malformed + closed, all.len(), "refused for these two reasons only");
    assert!(closed > all.len() / 4 && malformed > all.len() / 10, "the mutants test one of the two hardly at all");
    assert!(count(&opener.derivations) > 20, "hardly any mutant changed salt or parameters");
}

#[test]
fn none_of_18_000_mutants_under_argon2id_opens() {
    none_opens(floor(), 18_000, 1);
}

#[test]
fn none_of_2_000_mutants_under_pbkdf2_opens() {
    none_opens(Kdf::pbkdf2(600_000).unwrap(), 2_000, 2);
}
