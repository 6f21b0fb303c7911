//! Sound as bytes: silence of a given length, and the length of what was sent.

/// Milliseconds of a WAV or MP3 file; none if it is neither, or has no length that can be told.
pub fn milliseconds(bytes: &[u8]) -> Option<u64> {
    if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WAVE") {
        return of_wav(bytes);
    }
    of_mp3(bytes)
}

/// Walks the chunks: `fmt ` says how many bytes a second has, `data` how many there are.
fn of_wav(bytes: &[u8]) -> Option<u64> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_le_bytes);
    let (mut at, mut byte_rate) = (12, 0);
    loop {
        let (name, length) = (bytes.get(at..at + 4)?, usize::try_from(word(at + 4)?).ok()?);
        at += 8;
        if name == b"fmt " {
            byte_rate = u64::from(word(at + 8)?);
        }
        if name == b"data" {
            // One that was streamed announces more than there is.
            let there = length.min(bytes.len() - at) as u64;
            return (byte_rate > 0).then(|| (there * 1000).div_ceil(byte_rate));
        }
        // Chunks begin at even places.
        at = at.checked_add(length)?.checked_add(length % 2)?;
    }
}

/// By the bit rate of its first frame, which all are taken to have.
fn of_mp3(bytes: &[u8]) -> Option<u64> {
    let mut rest = bytes;
    if let Some(tag) = bytes.strip_prefix(b"ID3") {
        // Its length has seven bits in each byte.
        let length = tag.get(3..7)?.iter().fold(0, |length, byte| length << 7 | usize::from(byte & 0x7f));
        rest = bytes.get(10 + length..)?;
    }
    const NEW: [u64; 14] = [32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320];
    const OLD: [u64; 14] = [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160];
    let rates = match rest {
        [0xff, 0xfa | 0xfb, ..] => NEW,
        [0xff, 0xf2 | 0xf3 | 0xe2 | 0xe3, ..] => OLD,
        _ => return None,
    };
    let kilobits = usize::from(rest.get(2)? >> 4).checked_sub(1).and_then(|at| rates.get(at))?;
    Some((rest.len() as u64 * 8).div_ceil(*kilobits))
}

const RATE: u64 = 24_000;

/// Silence as 16-bit samples, 24 kHz, one channel.
pub fn pcm(ms: u64) -> Vec<u8> {
    vec![0; usize::try_from(ms * RATE / 1000 * 2).unwrap_or(0)]
}

pub fn wav(ms: u64) -> Vec<u8> {
    let samples = pcm(ms);
    let length = u32::try_from(samples.len()).unwrap_or(u32::MAX - 36);
    let mut file = Vec::with_capacity(44 + samples.len());
    file.extend_from_slice(b"RIFF");
    file.extend_from_slice(&(length + 36).to_le_bytes());
    file.extend_from_slice(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    file.extend_from_slice(&24_000_u32.to_le_bytes());
    file.extend_from_slice(&48_000_u32.to_le_bytes());
    file.extend_from_slice(b"\x02\0\x10\0data");
    file.extend_from_slice(&length.to_le_bytes());
    file.extend_from_slice(&samples);
    file
}

/// Frames of 24 ms at 64 kbit/s: MPEG-2 layer III, 24 kHz, one channel.
pub fn mp3(ms: u64) -> Vec<u8> {
    let mut frame = [0; 192];
    frame[..4].copy_from_slice(&[0xff, 0xf3, 0x84, 0xc4]);
    frame.repeat(usize::try_from(ms.div_ceil(24)).unwrap_or(0))
}

/// Opus in Ogg (RFC 7845): packets of silence, 20 ms each, up to fifty on a page.
pub fn opus(ms: u64) -> Vec<u8> {
    const SILENCE: &[u8] = b"\xf8\xff\xfe";
    let mut file = page(0, 0, 2, &[b"OpusHead\x01\x01\x38\x01\xc0\x5d\0\0\0\0\0"]);
    file.extend(page(1, 0, 0, &[b"OpusTags\x03\0\0\0sim\0\0\0\0"]));
    let (mut left, mut number, mut samples) = (ms.div_ceil(20).max(1), 2, 0);
    while left > 0 {
        let packets = left.min(50);
        left -= packets;
        samples += packets * 960;
        let flags = if left == 0 { 4 } else { 0 };
        file.extend(page(number, samples, flags, &vec![SILENCE; usize::try_from(packets).unwrap_or(0)]));
        number += 1;
    }
    file
}

/// One Ogg page (RFC 3533) of packets shorter than 255 bytes.
fn page(number: u32, granule: u64, flags: u8, packets: &[&[u8]]) -> Vec<u8> {
    let mut page = Vec::new();
    page.extend_from_slice(b"OggS\0");
    page.push(flags);
    page.extend_from_slice(&granule.to_le_bytes());
    page.extend_from_slice(&1_u32.to_le_bytes());
    page.extend_from_slice(&number.to_le_bytes());
    page.extend_from_slice(&[0; 4]);
    page.push(u8::try_from(packets.len()).unwrap_or(u8::MAX));
    page.extend(packets.iter().map(|packet| u8::try_from(packet.len()).unwrap_or(u8::MAX)));
    page.extend(packets.concat());
    let crc = crc(&page).to_le_bytes();
    page[22..26].copy_from_slice(&crc);
    page
}

/// CRC-32 as Ogg has it: most significant bit first, from zero, nothing inverted.
fn crc(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte) << 24, |crc: u32, _| crc << 1 ^ if crc >> 31 == 1 { 0x04c1_1db7 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_has_the_length_it_was_made_with() {
        for ms in [24, 960, 1200, 60_000] {
            assert_eq!((milliseconds(&wav(ms)), milliseconds(&mp3(ms))), (Some(ms), Some(ms)));
        }
        assert_eq!(milliseconds(b"RIFF\0\0\0\0WAVE"), None);
        assert_eq!(milliseconds(b"anything else"), None);
    }

    #[test]
    fn a_wav_of_any_make_is_measured() {
        // 8 kHz, 8 bits, two channels; a list of odd length stands before the data, which announces more than there is.
        let mut file =
            b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\x01\0\x02\0\x40\x1f\0\0\x80\x3e\0\0\x02\0\x08\0LIST\x03\0\0\0abc\0data\xff\xff\xff\xff"
                .to_vec();
        file.extend(vec![0x80; 24_000]);
        assert_eq!(milliseconds(&file), Some(1500));
    }

    #[test]
    fn a_tag_before_an_mp3_is_not_sound() {
        let mut file = b"ID3\x04\0\0\0\0\x01\x00".to_vec();
        file.extend(vec![0; 128]);
        file.extend(mp3(240));
        assert_eq!(milliseconds(&file), Some(240));
    }

    #[test]
    fn ogg_pages_have_the_checksum_of_their_standard() {
        // The check value of CRC-32/CKSUM, which differs only in being inverted at the end.
        assert_eq!(crc(b"123456789"), !0x765e_7680);
        let file = opus(1010);
        assert_eq!(memchr::memmem::find_iter(&file, b"OggS").count(), 4);
        assert!(file.starts_with(b"OggS\0\x02") && memchr::memmem::find(&file, b"OpusHead").is_some());
    }
}
