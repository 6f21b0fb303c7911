//! Lists by cursor: `limit`, `order` and `after`.

use super::fields::unsupported;
use crate::call::Call;
use crate::provider::ApiError;
use crate::text::quoted;

#[derive(Debug, PartialEq, Eq)]
pub struct Page<T> {
    pub rows: Vec<T>,
    pub more: bool,
}

/// The page that the query asks for of `all`, which come oldest first. `usual` is the limit and whether the newest come first
/// when the query doesn't say.
pub fn of<T>(call: &Call, all: Vec<T>, usual: (usize, bool), largest: usize, id: impl Fn(&T) -> &str) -> Result<Page<T>, ApiError> {
    let limit = match call.query("limit") {
        None => usual.0,
        Some(text) => text.parse().ok().filter(|limit| (1..=largest).contains(limit)).ok_or_else(|| {
            let message = format!("Invalid 'limit': expected a value between 1 and {largest}, but got {text} instead.");
            ApiError::invalid(message).param("limit").code("invalid_value")
        })?,
    };
    let newest_first = match call.query("order") {
        None => usual.1,
        Some("asc") => false,
        Some("desc") => true,
        Some(other) => return Err(unsupported("order", other, &["asc", "desc"])),
    };
    Ok(cut(all, limit, newest_first, call.query("after"), id))
}

fn cut<T>(mut all: Vec<T>, limit: usize, newest_first: bool, after: Option<&str>, id: impl Fn(&T) -> &str) -> Page<T> {
    if newest_first {
        all.reverse();
    }
    if let Some(at) = after.and_then(|after| all.iter().position(|row| id(row) == after)) {
        all.drain(..=at);
    }
    let more = all.len() > limit;
    all.truncate(limit);
    Page { rows: all, more }
}

/// The list object, from its rows and their ids.
pub fn document(rows: &[(String, String)], more: bool) -> String {
    let bound = |row: Option<&(String, String)>| row.map_or_else(|| "null".to_owned(), |(id, _)| quoted(id));
    let data: Vec<&str> = rows.iter().map(|(_, row)| row.as_str()).collect();
    format!(
        r#"{{"object":"list","data":[{}],"first_id":{},"last_id":{},"has_more":{more}}}"#,
        data.join(","),
        bound(rows.first()),
        bound(rows.last()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_in_either_order() {
        let all = || vec!["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let page = |newest, after| {
            let page = cut(all(), 2, newest, after, String::as_str);
            (page.rows.concat(), page.more)
        };
        assert_eq!(page(false, None), ("ab".into(), true));
        assert_eq!(page(false, Some("b")), ("c".into(), false));
        assert_eq!(page(true, None), ("cb".into(), true));
        assert_eq!(page(true, Some("b")), ("a".into(), false));
    }

    #[test]
    fn an_empty_list_has_no_ends() {
        assert_eq!(document(&[], false), r#"{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}"#);
    }
}
