//! `multipart/form-data` (RFC 7578) as the SDKs write it.

/// One field of a form.
#[derive(Debug, PartialEq, Eq)]
pub struct Field<'a> {
    pub name: String,
    pub filename: Option<String>,
    pub data: &'a [u8],
}

/// The boundary that a content type names.
pub fn boundary(content_type: &str) -> Option<&str> {
    let (kind, rest) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let named = rest.split(';').find_map(|part| part.trim().strip_prefix("boundary="))?;
    Some(named.trim_matches('"')).filter(|boundary| !boundary.is_empty())
}

/// The fields in order; none if the body isn't such a form to its end.
pub fn parse<'a>(body: &'a [u8], boundary: &str) -> Option<Vec<Field<'a>>> {
    let delimiter = format!("\r\n--{boundary}");
    let mut rest = body.strip_prefix(delimiter.as_bytes().get(2..)?)?;
    let mut fields = Vec::new();
    loop {
        if rest.starts_with(b"--") {
            return Some(fields);
        }
        rest = rest.strip_prefix(b"\r\n")?;
        let end = memchr::memmem::find(rest, delimiter.as_bytes())?;
        fields.push(field(rest.get(..end)?)?);
        rest = rest.get(end + delimiter.len()..)?;
    }
}

fn field(part: &[u8]) -> Option<Field<'_>> {
    let end = memchr::memmem::find(part, b"\r\n\r\n")?;
    let head = std::str::from_utf8(part.get(..end)?).ok()?;
    let data = part.get(end + 4..)?;
    let disposition = head.split("\r\n").find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-disposition").then_some(value)
    })?;
    Some(Field { name: parameter(disposition, "name")?, filename: parameter(disposition, "filename"), data })
}

/// A quoted parameter, with the escapes that browsers and SDKs use.
fn parameter(disposition: &str, name: &str) -> Option<String> {
    let start = format!("; {name}=\"");
    let at = disposition.find(&start)? + start.len();
    let value = disposition.get(at..)?;
    let value = value.get(..value.find('"')?)?;
    Some(value.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_read_field_by_field_and_data_may_hold_anything() {
        let body = b"--b\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nwhisper-1\r\n--b\r\nContent-Disposition: form-data; \
                     name=\"file\"; filename=\"a %22b%22.wav\"\r\nContent-Type: audio/wav\r\n\r\n\r\n--\x00b--\r\n\r\n--b--\r\n";
        let fields = parse(body, "b").unwrap_or_default();
        assert_eq!(fields.first(), Some(&Field { name: "model".into(), filename: None, data: b"whisper-1" }));
        let file = Field { name: "file".into(), filename: Some("a \"b\".wav".into()), data: b"\r\n--\x00b--\r\n" };
        assert_eq!(fields.get(1), Some(&file));
    }

    #[test]
    fn a_form_cut_short_is_none() {
        let whole = b"--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n1\r\n--b--";
        assert_eq!(parse(whole, "b").map(|fields| fields.len()), Some(1));
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end], "b"), None, "{end}");
        }
        assert_eq!(parse(whole, "c"), None);
    }

    #[test]
    fn the_boundary_is_found_in_either_spelling() {
        assert_eq!(boundary("multipart/form-data; boundary=abc"), Some("abc"));
        assert_eq!(boundary("multipart/form-data; charset=utf-8; boundary=\"a b\""), Some("a b"));
        assert_eq!(boundary("application/json"), None);
        assert_eq!(boundary("multipart/form-data; boundary="), None);
    }
}
