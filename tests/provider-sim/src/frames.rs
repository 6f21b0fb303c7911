//! A body as the pieces it is generated in.

use bytes::Bytes;

/// One event of a stream, or a whole buffered body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub bytes: Bytes,
    /// Visible tokens generated when this frame has been sent, over all choices.
    pub produced: u64,
    /// Carries tokens: the pace is kept before it.
    pub delta: bool,
}

/// Collects the frames of a stream while counting tokens.
#[derive(Debug, Default)]
pub struct Frames {
    made: Vec<Frame>,
    produced: u64,
}

impl Frames {
    pub fn push(&mut self, text: String) {
        self.made.push(Frame { bytes: text.into(), produced: self.produced, delta: false });
    }

    pub fn push_delta(&mut self, text: String, tokens: u64) {
        self.produced += tokens;
        self.made.push(Frame { bytes: text.into(), produced: self.produced, delta: true });
    }

    pub fn into_vec(self) -> Vec<Frame> {
        self.made
    }
}

/// Keeps the first half of the deltas and ends with an event, made from the number of those before it.
pub fn fail_midstream(frames: &mut Vec<Frame>, event: impl FnOnce(usize) -> String) {
    let deltas: Vec<usize> = frames.iter().enumerate().filter(|(_, frame)| frame.delta).map(|(at, _)| at).collect();
    let keep = deltas.get(deltas.len() / 2).copied().unwrap_or(1);
    frames.truncate(keep);
    let produced = frames.last().map_or(0, |frame| frame.produced);
    let event = event(frames.len());
    frames.push(Frame { bytes: event.into(), produced, delta: false });
}

/// Ends every line by CR LF. JSON holds no raw line feed, so all that are there end lines.
pub fn with_crlf(frames: &mut [Frame]) {
    for frame in frames {
        let mut wide: Vec<u8> = Vec::with_capacity(frame.bytes.len() + 4);
        for &byte in &frame.bytes {
            // Some lines have it already.
            if byte == b'\n' && wide.last() != Some(&b'\r') {
                wide.push(b'\r');
            }
            wide.push(byte);
        }
        frame.bytes = wide.into();
    }
}

/// Compresses, flushing after each frame so that a stream stays one.
pub fn with_gzip(frames: &mut [Frame]) -> std::io::Result<()> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let last = frames.len().saturating_sub(1);
    for (index, frame) in frames.iter_mut().enumerate() {
        encoder.write_all(&frame.bytes)?;
        if index == last {
            encoder.try_finish()?;
        } else {
            encoder.flush()?;
        }
        frame.bytes = std::mem::take(encoder.get_mut()).into();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn frames() -> Vec<Frame> {
        let mut frames = Frames::default();
        frames.push("start\n".into());
        for i in 0..4 {
            frames.push_delta(format!("{i}\n"), 3);
        }
        frames.push("end\n".into());
        frames.into_vec()
    }

    fn joined(frames: &[Frame]) -> Vec<u8> {
        frames.iter().flat_map(|frame| frame.bytes.to_vec()).collect()
    }

    #[test]
    fn a_failing_stream_keeps_half_its_deltas() {
        let mut failing = frames();
        fail_midstream(&mut failing, |before| format!("oops {before}\n"));
        assert_eq!(joined(&failing), b"start\n0\n1\noops 3\n");
        assert_eq!(failing.last().map(|frame| frame.produced), Some(6));
    }

    #[test]
    fn gzip_and_crlf_keep_the_content() -> std::io::Result<()> {
        let mut wide = frames();
        with_crlf(&mut wide);
        assert_eq!(joined(&wide), b"start\r\n0\r\n1\r\n2\r\n3\r\nend\r\n");
        with_gzip(&mut wide)?;
        let mut text = String::new();
        flate2::read::GzDecoder::new(joined(&wide).as_slice()).read_to_string(&mut text)?;
        assert_eq!(text, "start\r\n0\r\n1\r\n2\r\n3\r\nend\r\n");
        Ok(())
    }
}
