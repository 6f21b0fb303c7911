//! `multipart`: the same wherever the form is cut; with the gate's splice it says the admitted model and all else as before.
#![no_main]

use keyward_core::body::{BodyError, BodyFacts, Edits, splice_piece};
use keyward_core::multipart::{MultipartReader, boundary};
use keyward_fuzz::{input, lines};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((mut choices, cuts, body)) = input(data) else { return };
    // The content-type stands first.
    let (content_type, body) = match choices.flag() {
        true => (b"multipart/form-data; boundary=XX".as_slice(), body),
        false => {
            let (head, body) = lines(body);
            (head.first().copied().unwrap_or_default(), body)
        }
    };
    let Some(boundary) = boundary(content_type) else { return };
    let read = facts(&boundary, [body]);
    assert_eq!(read, facts(&boundary, cuts.pieces(body)), "it depends on where it is cut");
    let Ok(before) = read else { return };
    let edits = Edits { model: Some("admitted"), ..Edits::default() };
    let mut out = Vec::new();
    splice_piece(body, 0, &before.splices(&edits), &mut out);
    // A form without a model has no place for one; the gate refuses it.
    if before.model.is_none() {
        return;
    }
    let after = facts(&boundary, [out.as_slice()]).expect("what is forwarded can be read");
    assert_eq!(after.model.as_deref(), Some("admitted"));
    assert_eq!((&after.refs, after.stream, after.seconds), (&before.refs, before.stream, before.seconds));
});

fn facts<'a>(boundary: &str, pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<BodyFacts, BodyError> {
    let mut reader = MultipartReader::new(boundary);
    pieces.into_iter().try_for_each(|piece| reader.feed(piece))?;
    reader.finish()
}
