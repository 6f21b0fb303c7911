//! Lower-case hexadecimal, for ids and hashes on the wire.

/// The two digits of every byte.
static DIGITS: [[u8; 2]; 256] = {
    let mut table = [[0; 2]; 256];
    let mut n = 0;
    while n < 256 {
        table[n] = [b"0123456789abcdef"[n / 16], b"0123456789abcdef"[n % 16]];
        n += 1;
    }
    table
};

/// The two digits of a byte.
pub fn digits(byte: u8) -> [u8; 2] {
    DIGITS[usize::from(byte)]
}

/// Writes bytes as lower-case hex.
pub fn encode(bytes: &[u8]) -> String {
    let mut out = Vec::new();
    append(bytes, &mut out);
    String::from_utf8(out).unwrap_or_default()
}

/// Appends bytes as lower-case hex.
pub fn append(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend(bytes.iter().flat_map(|&byte| digits(byte)));
}

/// Bytes as lower-case hex, without an allocation.
pub struct Hex<const N: usize>([[u8; 2]; N]);

impl<const N: usize> Hex<N> {
    pub fn of(bytes: &[u8; N]) -> Self {
        Hex(bytes.map(digits))
    }

    pub fn as_str(&self) -> &str {
        std::str::from_utf8(self.0.as_flattened()).unwrap_or_default()
    }
}

/// Reads exactly `N` bytes of lower-case hex; anything else is `None`.
pub fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair.iter().try_fold(0u8, |n, &d| match d {
            b'0'..=b'9' => Some(n << 4 | (d - b'0')),
            b'a'..=b'f' => Some(n << 4 | (d - b'a' + 10)),
            _ => None,
        })?;
    }
    Some(out)
}

/// Reads any whole number of bytes of lower-case hex.
pub fn decode_vec(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| decode::<1>(std::str::from_utf8(pair).ok()?).map(|[byte]| byte)).collect()
}

/// serde for `[u8; N]` as hex.
pub mod serde_hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(super::Hex::of(bytes).as_str())
    }

    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(d: D) -> Result<[u8; N], D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        super::decode(&text).ok_or_else(|| D::Error::custom("expected lower-case hex"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn round_trip_and_strictness() {
        assert_eq!(encode(&[0, 0xa5, 0xff]), "00a5ff");
        assert_eq!(decode::<3>("00a5ff"), Some([0, 0xa5, 0xff]));
        for byte in 0..=255u8 {
            let text = format!("{byte:02x}");
            assert_eq!((encode(&[byte]).as_str(), Hex::of(&[byte]).as_str()), (text.as_str(), text.as_str()));
        }
        for bad in ["00a5f", "00A5ff", "00a5fg", "00a5ff00"] {
            assert_eq!(decode::<3>(bad), None, "{bad}");
            assert_ne!(decode_vec(bad), Some(vec![0, 0xa5, 0xff]), "{bad}");
        }
    }
}
