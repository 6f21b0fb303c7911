//! Virtual keys: `vk_` + 43 base62 digits (256 random bits) + 6 base62 digits (CRC-32 of the 43).
//!
//! The CRC is no secret. It lets the gate turn garbage away without asking anybody.

use sha2::{Digest, Sha256};

pub const PREFIX: &str = "vk_";
const SECRET_DIGITS: usize = 43;
const CRC_DIGITS: usize = 6;
const LEN: usize = PREFIX.len() + SECRET_DIGITS + CRC_DIGITS;
const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A well-formed virtual key. It never prints itself.
#[derive(Clone, PartialEq, Eq)]
pub struct VirtualKey(String);

/// SHA-256 of a virtual key: what the gate sends instead of the key. It opens the edge API, so it is a secret as well.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash(pub [u8; 32]);

impl VirtualKey {
    /// Makes a key from 256 random bits.
    pub fn generate(entropy: [u8; 32]) -> Self {
        let mut token = String::with_capacity(LEN);
        token.push_str(PREFIX);
        let secret = base62_256(entropy);
        token.push_str(&secret);
        token.push_str(&base62_u32(crc32(secret.as_bytes())));
        VirtualKey(token)
    }

    /// Accepts only the exact form with a matching CRC.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        if text.len() != LEN || !digits.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return None;
        }
        let (secret, crc) = digits.split_at_checked(SECRET_DIGITS)?;
        (base62_u32(crc32(secret.as_bytes())) == crc).then(|| VirtualKey(text.to_owned()))
    }

    pub fn hash(&self) -> TokenHash {
        TokenHash(Sha256::digest(self.0.as_bytes()).into())
    }

    /// The key itself: to show it once, at creation.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for VirtualKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VirtualKey(..)")
    }
}

impl std::fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenHash(..)")
    }
}

fn digit(n: u32) -> char {
    char::from(BASE62.get(n as usize).copied().unwrap_or(b'0'))
}

fn base62_u32(mut n: u32) -> String {
    let mut out = ['0'; CRC_DIGITS];
    for slot in out.iter_mut().rev() {
        *slot = digit(n % 62);
        n /= 62;
    }
    out.iter().collect()
}

/// Long division of a 256-bit number by 62, most significant byte first.
fn base62_256(mut n: [u8; 32]) -> String {
    let mut out = ['0'; SECRET_DIGITS];
    for slot in out.iter_mut().rev() {
        let mut rest = 0u32;
        for byte in &mut n {
            let value = rest << 8 | u32::from(*byte);
            *byte = u8::try_from(value / 62).unwrap_or(u8::MAX);
            rest = value % 62;
        }
        *slot = digit(rest);
    }
    out.iter().collect()
}

/// CRC-32 (IEEE 802.3, reflected 0xEDB88320), bit by bit: 43 bytes need no table.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| (0..8).fold(crc ^ u32::from(b), |c, _| if c & 1 == 1 { c >> 1 ^ 0xEDB8_8320 } else { c >> 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn crc_is_the_published_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }

    #[test]
    fn extremes_have_the_fixed_length() {
        for entropy in [[0; 32], [0xff; 32]] {
            let key = VirtualKey::generate(entropy);
            assert_eq!(key.reveal().len(), 52);
            assert_eq!(VirtualKey::parse(key.reveal()), Some(key));
        }
        assert_eq!(format!("{:?}", VirtualKey::generate([7; 32])), "VirtualKey(..)");
    }

    proptest! {
        #[test]
        fn any_single_change_is_refused(entropy: [u8; 32], at in 0usize..52, byte in 32u8..127) {
            let key = VirtualKey::generate(entropy);
            let mut bytes = key.reveal().as_bytes().to_vec();
            prop_assume!(bytes[at] != byte);
            bytes[at] = byte;
            prop_assert_eq!(VirtualKey::parse(std::str::from_utf8(&bytes).unwrap()), None);
        }

        #[test]
        fn whatever_parses_is_what_was_given(text in "(vk_)?[0-9A-Za-z\\PC]{0,60}") {
            let parsed = VirtualKey::parse(&text);
            prop_assert!(parsed.is_none_or(|key| key.reveal() == text && text.len() == LEN));
        }
    }
}
