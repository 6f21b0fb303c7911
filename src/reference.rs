//! The reference pages, made from what the code says of itself: docs/configuration.md and docs/api.md.

use crate::manifest::schema;
use keyward_policy_service::http::admin::openapi;
use serde_json::Value;

/// The configuration reference, in Markdown.
pub fn configuration() -> String {
    let schema = schema();
    let mut page = String::from(
        "# Configuration reference\n\nMade by `keyward config reference` from the code; a test keeps it so. `keyward config schema` prints the JSON Schema, \
`keyward config check` checks a file.\nEvery section is optional. Names are 1 to 128 letters, digits, `-`, `_`, `.`; those of routes may have `:` and `/` as well.\n",
    );
    section(&mut page, "keyward.yaml", &schema);
    for (name, definition) in schema.get("$defs").and_then(Value::as_object).into_iter().flatten() {
        section(&mut page, name, definition);
    }
    page
}

fn section(page: &mut String, name: &str, definition: &Value) {
    page.push_str(&format!("\n## {name}\n\n"));
    let about = text(definition, "description");
    if !about.is_empty() {
        page.push_str(&format!("{}\n\n", one_line(about)));
    }
    // A choice of words has no fields.
    let words: Vec<String> = definition.get("oneOf").and_then(Value::as_array).into_iter().flatten().flat_map(words).collect();
    if !words.is_empty() {
        words.iter().for_each(|word| page.push_str(&format!("- {word}\n")));
        return;
    }
    page.push_str("| field | type | |\n|---|---|---|\n");
    let required: Vec<&str> =
        definition.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    for (field, about) in definition.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let must = if required.contains(&field.as_str()) { "**required** " } else { "" };
        page.push_str(&format!("| `{field}` | {} | {must}{} |\n", kind(about), one_line(text(about, "description"))));
    }
}

/// The words of one branch of a choice, with what it means.
fn words(choice: &Value) -> Vec<String> {
    let about = one_line(text(choice, "description"));
    let about = if about.is_empty() { about } else { format!(": {about}") };
    let several = choice.get("enum").and_then(Value::as_array).into_iter().flatten();
    several.chain(choice.get("const")).filter_map(Value::as_str).map(|word| format!("`{word}`{about}")).collect()
}

fn kind(about: &Value) -> String {
    if let Some(reference) = about.get("$ref").and_then(Value::as_str) {
        let name = reference.rsplit('/').next().unwrap_or_default();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(items) = about.get("items") {
        return format!("list of {}", kind(items));
    }
    if let Some(values) = about.get("additionalProperties").filter(|values| values.is_object()) {
        return format!("map of {}", kind(values));
    }
    let names = match about.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).filter(|name| *name != "null").collect(),
        _ => Vec::new(),
    };
    names.join(" or ")
}

/// The API reference, in Markdown.
pub fn api() -> String {
    let api = serde_json::to_value(openapi()).unwrap_or_default();
    let mut page = String::from(
        "# API reference\n\nMade by `keyward config reference --api` from the code; a test keeps it so. `GET /openapi.json` is the whole OpenAPI 3.1 document, with every\n\
field. All calls carry `authorization: Bearer kwa_...`, an admin token. Bodies are JSON.\n\n\
- Errors are RFC 9457 problems (`application/problem+json`): `title`, `status`, `detail`, and `field` or `errors` where a field is at fault.\n\
- Lists take `limit` (1 to 1000) and `cursor`, and give `data` and, unless it is the last page, `next_cursor`.\n\
- Objects have a version, sent as `ETag`. `If-Match` makes a write conditional on it (412 when it was changed); `If-None-Match: *` on a PUT means: only if there is none.\n\
- A POST with an `Idempotency-Key` happens once: the same request again gets the same answer, for 24 hours.\n\
- Every write is an entry of the key's audit chain, or of the organisation's (`adm_` and its id).\n\n\
Roles: `admin` everything; `operator` everything but admin tokens and organisations; `auditor` reads everything; `developer` the keys, usage and audit of one team.\n\n\
| | |\n|---|---|\n",
    );
    for (path, item) in api.get("paths").and_then(Value::as_object).into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            let (summary, about) = (text(operation, "summary"), text(operation, "description"));
            let about = if about.is_empty() { String::new() } else { format!(". {}", one_line(about)) };
            page.push_str(&format!("| `{} {path}` | {}{about} |\n", method.to_uppercase(), one_line(summary)));
        }
    }
    page
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_say_what_the_code_says() {
        for (file, page, command) in [("docs/configuration.md", configuration(), ""), ("docs/api.md", api(), " --api")] {
            let written = std::fs::read_to_string(file).unwrap_or_default();
            assert!(written == page, "{file} is not up to date: keyward config reference{command} > {file}");
        }
    }
}
