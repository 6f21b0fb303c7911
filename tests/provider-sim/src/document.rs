//! A JSON document that fits a schema: what a model says that was told to answer in one.

use serde_json::{Map, Value, json};

/// Deeper than this a schema that refers to itself is cut off.
const DEEPEST: usize = 12;

/// The plainest document that fits `schema`, all its properties in it, its texts made of `words`; null fits any object. Types
/// may be written in capitals, as Google's schemas have them.
pub fn fitting(schema: &Value, words: &str) -> Value {
    if schema.is_null() {
        return json!({ "answer": words });
    }
    Maker { root: schema, words }.make(schema, 0)
}

struct Maker<'a> {
    root: &'a Value,
    words: &'a str,
}

impl Maker<'_> {
    fn make(&self, schema: &Value, depth: usize) -> Value {
        if depth > DEEPEST {
            return Value::Null;
        }
        let deeper = |schema: &Value| self.make(schema, depth + 1);
        if let Some(target) = schema.get("$ref").or_else(|| schema.get("ref")).and_then(Value::as_str) {
            return self.root.pointer(target.trim_start_matches('#')).map_or(Value::Null, deeper);
        }
        if let Some(fixed) = schema.get("const") {
            return fixed.clone();
        }
        if let Some(first) = schema.get("enum").and_then(|words| words.get(0)) {
            return first.clone();
        }
        for name in ["anyOf", "oneOf", "allOf"] {
            if let Some(first) = schema.get(name).and_then(|options| options.get(0)) {
                return deeper(first);
            }
        }
        match kind(schema).as_str() {
            "object" => {
                let properties = schema.get("properties").and_then(Value::as_object);
                let made = properties.into_iter().flatten().map(|(name, schema)| (name.clone(), deeper(schema)));
                Value::Object(made.collect::<Map<_, _>>())
            }
            "array" => {
                let count = number(schema, "minItems").unwrap_or(1).clamp(1, 100);
                let item = schema.get("items").map_or(Value::Null, deeper);
                Value::Array((0..count).map(|_| item.clone()).collect())
            }
            "integer" => json!(within(schema)),
            "number" => within(schema).as_f64().map_or(Value::Null, |number| json!(number)),
            "boolean" => Value::Bool(true),
            "null" => Value::Null,
            _ => Value::String(self.text(schema)),
        }
    }

    fn text(&self, schema: &Value) -> String {
        let formatted = match schema.get("format").and_then(Value::as_str) {
            Some("date") => Some("2026-01-31"),
            Some("date-time") => Some("2026-01-31T12:00:00Z"),
            Some("time") => Some("12:00:00Z"),
            Some("email") => Some("a@example.com"),
            Some("uuid") => Some("00000000-0000-4000-8000-000000000000"),
            Some("uri") => Some("https://example.com/"),
            _ => None,
        };
        let least = usize::try_from(number(schema, "minLength").unwrap_or(0)).unwrap_or(0);
        let most = number(schema, "maxLength").and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
        let words = formatted.unwrap_or(self.words);
        let fill = std::iter::repeat_n('x', least.saturating_sub(words.chars().count()));
        words.chars().chain(fill).take(most).collect()
    }
}

/// The type in small letters; the first that isn't null where there are several; by what else there is where there is none.
fn kind(schema: &Value) -> String {
    let named = match schema.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null"),
        Some(kind) => kind.as_str(),
        None if schema.get("properties").is_some() => Some("object"),
        None if schema.get("items").is_some() => Some("array"),
        None => None,
    };
    named.unwrap_or("string").to_ascii_lowercase()
}

/// A whole number, which Google's schemas may have as a text.
fn number(schema: &Value, name: &str) -> Option<i64> {
    let value = schema.get(name)?;
    value.as_i64().or_else(|| value.as_str()?.parse().ok())
}

/// A number within the bounds of the schema; 7 if there are none.
fn within(schema: &Value) -> Value {
    let above = number(schema, "exclusiveMinimum").map(|low| low.saturating_add(1));
    let below = number(schema, "exclusiveMaximum").map(|high| high.saturating_sub(1));
    let low = number(schema, "minimum").or(above);
    let high = number(schema, "maximum").or(below);
    json!(7.max(low.unwrap_or(7)).min(high.unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_has_all_that_its_schema_names() {
        let schema = json!({
            "type": "object", "required": ["name"], "additionalProperties": false,
            "properties": {
                "name": {"type": "string"}, "age": {"type": "integer", "minimum": 18}, "when": {"type": "string", "format": "date"},
                "kind": {"enum": ["b", "a"]}, "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 2},
                "sure": {"type": ["null", "boolean"]}, "share": {"type": "number"}, "none": {"type": "null"},
                "either": {"anyOf": [{"const": 5}, {"type": "null"}]},
            },
            "$defs": {"tag": {"type": "object", "properties": {"id": {"type": "string", "maxLength": 3}}}},
        });
        let expected = json!({
            "name": "the calm", "age": 18, "when": "2026-01-31", "kind": "b", "tags": [{"id": "the"}, {"id": "the"}], "sure": true,
            "share": 7.0, "none": null, "either": 5,
        });
        assert_eq!(fitting(&schema, "the calm"), expected);
    }

    #[test]
    fn google_s_capitals_mean_the_same_and_what_refers_to_itself_ends() {
        let schema = json!({"type": "OBJECT", "properties": {"list": {"type": "ARRAY", "items": {"type": "INTEGER"}}}});
        assert_eq!(fitting(&schema, "a"), json!({"list": [7]}));
        assert_eq!(fitting(&Value::Null, "a"), json!({"answer": "a"}));
        assert!(fitting(&json!({"type": "object", "properties": {"next": {"$ref": "#"}}}), "a").is_object());
    }
}
