//! Secrets at rest: AES-256-GCM, a data key per record, wrapped by the key-encryption key (KEK).
//!
//! Sealed form: version (1) | nonce_k (12) | wrapped data key (32 + 16) | nonce_d (12) | ciphertext + tag (16). Both layers
//! carry the same associated data, so that a record can't be moved to another id, version or organisation.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Key, Nonce};
use std::path::Path;
use zeroize::Zeroizing;

const VERSION: u8 = 1;
const NONCE: usize = 12;
const WRAPPED: usize = 32 + 16;

#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("the key-encryption key at {0} can't be used: {1}")]
    Kek(String, String),
    #[error("a sealed record can't be opened: the key-encryption key is another one, or the record was changed")]
    Sealed,
    #[error("no randomness: {0}")]
    Entropy(String),
}

/// Seals and opens secrets with one KEK. The KEK never leaves it, and never prints.
pub struct Vault {
    kek: Zeroizing<[u8; 32]>,
}

/// 32 fresh random bytes.
pub fn random<const N: usize>() -> Result<[u8; N], VaultError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| VaultError::Entropy(error.to_string()))?;
    Ok(bytes)
}

impl Vault {
    pub fn new(kek: [u8; 32]) -> Self {
        Vault { kek: Zeroizing::new(kek) }
    }

    /// Reads the KEK from 64 hex digits.
    pub fn from_hex(text: &str, origin: &str) -> Result<Self, VaultError> {
        let kek = keyward_core::hex::decode(text.trim())
            .ok_or_else(|| VaultError::Kek(origin.to_owned(), "expected 64 hex digits".to_owned()))?;
        Ok(Vault::new(kek))
    }

    /// Reads the KEK from a file; makes one, readable by its owner only, when the file is not there.
    pub fn from_file(path: &Path) -> Result<Self, VaultError> {
        let text = crate::files::read_or_create(path, || {
            random::<32>().map(|kek| keyward_core::hex::encode(&kek)).map_err(|error| error.to_string())
        });
        let text = text.map_err(|error| VaultError::Kek(path.display().to_string(), error))?;
        Self::from_hex(&Zeroizing::new(text), &path.display().to_string())
    }

    /// Seals `secret` so that it opens only with the same `aad`.
    pub fn seal(&self, secret: &[u8], aad: &[u8]) -> Result<Vec<u8>, VaultError> {
        let data_key = Zeroizing::new(random::<32>()?);
        let (nonce_k, nonce_d) = (random::<NONCE>()?, random::<NONCE>()?);
        let wrapped =
            cipher(&self.kek).encrypt(&Nonce::from(nonce_k), Payload { msg: data_key.as_slice(), aad }).map_err(|_| VaultError::Sealed)?;
        let sealed = cipher(&data_key).encrypt(&Nonce::from(nonce_d), Payload { msg: secret, aad }).map_err(|_| VaultError::Sealed)?;
        Ok([&[VERSION], nonce_k.as_slice(), &wrapped, &nonce_d, &sealed].concat())
    }

    pub fn open(&self, sealed: &[u8], aad: &[u8]) -> Result<Zeroizing<Vec<u8>>, VaultError> {
        let (version, rest) = sealed.split_first().ok_or(VaultError::Sealed)?;
        if *version != VERSION {
            return Err(VaultError::Sealed);
        }
        let (nonce_k, rest) = rest.split_at_checked(NONCE).ok_or(VaultError::Sealed)?;
        let (wrapped, rest) = rest.split_at_checked(WRAPPED).ok_or(VaultError::Sealed)?;
        let (nonce_d, sealed) = rest.split_at_checked(NONCE).ok_or(VaultError::Sealed)?;
        let data_key = Zeroizing::new(decrypt(&self.kek, nonce_k, wrapped, aad)?);
        let data_key = Zeroizing::new(<[u8; 32]>::try_from(data_key.as_slice()).map_err(|_| VaultError::Sealed)?);
        Ok(Zeroizing::new(decrypt(&data_key, nonce_d, sealed, aad)?))
    }
}

fn cipher(key: &[u8; 32]) -> Aes256Gcm {
    Aes256Gcm::new(&Key::<Aes256Gcm>::from(*key))
}

fn decrypt(key: &[u8; 32], nonce: &[u8], sealed: &[u8], aad: &[u8]) -> Result<Vec<u8>, VaultError> {
    let nonce = <[u8; NONCE]>::try_from(nonce).map_err(|_| VaultError::Sealed)?;
    cipher(key).decrypt(&Nonce::from(nonce), Payload { msg: sealed, aad }).map_err(|_| VaultError::Sealed)
}

/// Associated data of a credential: who, which, and which version of it.
pub fn credential_aad(organisation: &str, id: &str, version: u64) -> Vec<u8> {
    let field = |text: &str| [&(text.len() as u64).to_be_bytes(), text.as_bytes()].concat();
    [b"keyward/credential/v1".to_vec(), field(organisation), field(id), version.to_be_bytes().to_vec()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_only_what_it_sealed_for_the_same_record() {
        let vault = Vault::new([1; 32]);
        let aad = credential_aad("org", "cred_a", 1);
        let sealed = vault.seal(b"sk-real", &aad).unwrap();
        assert_eq!(vault.open(&sealed, &aad).unwrap().as_slice(), b"sk-real");
        assert_ne!(sealed, vault.seal(b"sk-real", &aad).unwrap(), "every sealing is different");
        assert!(!sealed.windows(7).any(|w| w == b"sk-real"));
        for (org, id, version) in [("org", "cred_b", 1), ("org", "cred_a", 2), ("other", "cred_a", 1)] {
            assert!(vault.open(&sealed, &credential_aad(org, id, version)).is_err(), "{org} {id} {version}");
        }
        assert!(Vault::new([2; 32]).open(&sealed, &aad).is_err());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(vault.open(&changed, &aad).is_err(), "byte {at}");
            assert!(vault.open(&sealed[..at], &aad).is_err(), "cut at {at}");
        }
    }
}
