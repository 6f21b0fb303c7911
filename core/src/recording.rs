//! How long a recording can last, from its first bytes and its size. Only forms whose bytes bound their length are known: PCM
//! in WAV, and MPEG audio, whose lowest rate is 8 kbit/s. Ogg, MP4, WebM and FLAC can say hours of silence in a few bytes.

/// Bytes from the start of a file that are kept.
const HEAD: usize = 256;

/// The beginning of a file, and its size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Head {
    start: Vec<u8>,
    bytes: u64,
}

impl Head {
    pub fn take(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.start.extend(bytes.iter().take(HEAD.saturating_sub(self.start.len())));
    }
}

/// Seconds that the recording lasts at most, begun ones included. `None`: its form does not tell.
pub fn longest(head: &Head) -> Option<u64> {
    wav_rate(&head.start).or_else(|| mpeg_rate(&head.start)).map(|rate| head.bytes.div_ceil(rate))
}

/// Bytes a second of PCM in WAV, whose format stands first.
fn wav_rate(start: &[u8]) -> Option<u64> {
    let at = |from: usize, n: usize| start.get(from..from + n);
    let number = |from: usize, n: usize| at(from, n).map(|b| b.iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte)));
    (at(0, 4)? == b"RIFF" && at(8, 8)? == b"WAVEfmt ").then_some(())?;
    // PCM and float: a fixed number of bytes for each sample.
    matches!(number(20, 2)?, 1 | 3).then_some(())?;
    let (channels, rate, bits) = (number(22, 2)?, number(24, 4)?, number(34, 2)?);
    let bytes_a_second = rate.checked_mul(channels)?.checked_mul(bits / 8)?;
    // What a decoder may take for its own: the header's two other ways to say the same must agree.
    (number(28, 4)? == bytes_a_second && number(32, 2)? == channels * (bits / 8)).then_some(())?;
    Some(bytes_a_second).filter(|rate| *rate > 0)
}

/// Bytes a second of MPEG audio of layer III at its lowest rate. A tag before it must end within the first bytes: what
/// stands behind a longer one, nobody has seen.
fn mpeg_rate(start: &[u8]) -> Option<u64> {
    const LOWEST: u64 = 1_000;
    let sound = match start.strip_prefix(b"ID3") {
        Some(tag) => {
            let size = tag.get(3..7)?.iter().fold(0usize, |sum, &byte| sum << 7 | usize::from(byte & 0x7f));
            start.get(10 + size..)?
        }
        None => start,
    };
    let (sync, second, third) = (*sound.first()?, *sound.get(1)?, *sound.get(2)?);
    // Eleven bits of sync, layer III, a bit rate that is neither free nor bad.
    (sync == 0xff && second & 0xe0 == 0xe0 && second & 0x06 == 0x02 && !matches!(third >> 4, 0 | 15)).then_some(LOWEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn wav(rate: u32, channels: u16, bits: u16, seconds: u32) -> Vec<u8> {
        let block = channels * bits / 8;
        let data = rate * u32::from(block) * seconds;
        let mut out = [b"RIFF".as_slice(), &(data + 36).to_le_bytes(), b"WAVEfmt ", &16u32.to_le_bytes(), &1u16.to_le_bytes()].concat();
        out.extend([channels.to_le_bytes().as_slice(), &rate.to_le_bytes(), &(rate * u32::from(block)).to_le_bytes()].concat());
        out.extend([block.to_le_bytes().as_slice(), &bits.to_le_bytes(), b"data", &data.to_le_bytes()].concat());
        out.resize(out.len() + data as usize, 0);
        out
    }

    fn of(bytes: &[u8]) -> Option<u64> {
        let mut head = Head::default();
        bytes.chunks(7).for_each(|piece| head.take(piece));
        longest(&head)
    }

    #[test]
    fn a_wav_lasts_as_long_as_its_bytes_say() {
        assert_eq!(of(&wav(8_000, 1, 16, 3)), Some(4), "44 bytes of header are counted as sound");
        assert_eq!(of(&wav(44_100, 2, 16, 2)), Some(3));
        let mut lying = wav(8_000, 1, 16, 3);
        lying[28] ^= 1;
        assert_eq!(of(&lying), None, "a header that contradicts itself");
        let mut compressed = wav(8_000, 1, 16, 1);
        compressed[20] = 2;
        assert_eq!(of(&compressed), None);
    }

    #[test]
    fn mpeg_audio_has_a_lowest_rate_and_the_others_none() {
        let mut sound = vec![0xff, 0xfb, 0x90, 0x00];
        sound.resize(2_500, 0);
        assert_eq!(of(&sound), Some(3));
        let tagged = [b"ID3\x04\x00\x00\x00\x00\x00\x05".as_slice(), b"hello", &sound].concat();
        assert_eq!(of(&tagged), Some(3));
        for (what, bytes) in [
            ("FLAC behind a tag", b"ID3\x04\x00\x00\x00\x00\x00\x00fLaC".as_slice()),
            ("a long tag", b"ID3\x04\x00\x00\x00\x00\x7f\x00"),
            ("Ogg", b"OggS\x00\x02"),
            ("a free rate", b"\xff\xfb\x00\x00"),
            ("AAC", b"\xff\xf1\x50\x80"),
            ("nothing", b""),
        ] {
            assert_eq!(of(bytes), None, "{what}");
        }
    }
}
