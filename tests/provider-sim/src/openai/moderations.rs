//! Moderations, which cost nothing.

use serde_json::Value;

use super::fields::{self, missing, wrong_type};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::models::{Kind, Usage};
use crate::provider::ApiError;
use crate::text::identifier;
use crate::ticket::Bill;
use crate::tokens;

const KNOWN: &[&str] = &["input", "model"];
/// Each with whether pictures are judged by it too.
const CATEGORIES: [(&str, bool); 13] = [
    ("harassment", false),
    ("harassment/threatening", false),
    ("sexual", true),
    ("hate", false),
    ("hate/threatening", false),
    ("illicit", false),
    ("illicit/violent", false),
    ("self-harm/intent", true),
    ("self-harm/instructions", true),
    ("self-harm", true),
    ("sexual/minors", false),
    ("violence", true),
    ("violence/graphic", true),
];
/// The word that the simulator takes offence at.
const OFFENCE: &str = "kill";

/// What one result is about.
#[derive(Debug, Default, PartialEq, Eq)]
struct Judged {
    text: String,
    picture: bool,
}

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let fields = fields::object(call.body)?;
    fields::only(&fields, KNOWN)?;
    let model = fields::model(&fields, Some("omni-moderation-latest"), |kind| kind == Kind::Moderation)?;
    let judged = judged(fields.get("input").ok_or_else(|| missing("input"))?)?;
    let tokens: u64 = judged.iter().map(|one| tokens::count(&one.text)).sum();
    let (script, _) = call.steer(Some(model), false, judged.last().map_or("", |one| one.text.as_str()))?;
    call.admit(model, 0, &script)?;
    let id = identifier("modr-", 29);
    call.charge(Bill::new(model, Usage { prompt: tokens, ..Usage::default() }, false), Some(&id));
    let results: Vec<String> = judged.iter().map(result).collect();
    let text = format!(r#"{{"id":"{id}","model":"{}","results":[{}]}}"#, model.name, results.join(","));
    Ok(Ready::whole(text, Shape::Json, script).into())
}

/// Texts get a result each; parts of one message get one together.
fn judged(input: &Value) -> Result<Vec<Judged>, ApiError> {
    let wrong = |value: &Value| wrong_type("input", "a string, an array of strings, or an array of objects", value);
    let text = |text: &str| Judged { text: text.to_owned(), picture: false };
    match input {
        Value::String(one) => Ok(vec![text(one)]),
        Value::Array(items) if items.iter().all(Value::is_string) => Ok(items.iter().filter_map(Value::as_str).map(text).collect()),
        Value::Array(parts) => {
            let mut together = Judged::default();
            for part in parts {
                match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
                    (Some("text"), Some(text)) => together.text.push_str(text),
                    (Some("image_url"), _) if part.pointer("/image_url/url").is_some_and(Value::is_string) => together.picture = true,
                    _ => return Err(wrong(part)),
                }
            }
            Ok(vec![together])
        }
        other => Err(wrong(other)),
    }
}

fn result(judged: &Judged) -> String {
    let flagged = judged.text.contains(OFFENCE);
    let all = |one: &dyn Fn(&str, bool) -> String| {
        let members: Vec<String> = CATEGORIES.iter().map(|(name, pictures)| format!(r#""{name}":{}"#, one(name, *pictures))).collect();
        format!("{{{}}}", members.join(","))
    };
    let hit = |name: &str| flagged && name == "violence";
    let types = |pictures: bool| match (judged.text.is_empty(), judged.picture && pictures) {
        (false, true) => r#"["text","image"]"#,
        (false, false) => r#"["text"]"#,
        (true, true) => r#"["image"]"#,
        (true, false) => "[]",
    };
    format!(
        r#"{{"flagged":{flagged},"categories":{},"category_scores":{},"category_applied_input_types":{}}}"#,
        all(&|name, _| hit(name).to_string()),
        all(&|name, _| if hit(name) { "0.97".into() } else { "0.0001".into() }),
        all(&|_, pictures| types(pictures).to_owned()),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn texts_are_judged_one_by_one_and_parts_together() -> Result<(), ApiError> {
        assert_eq!(judged(&json!(["a", "b"]))?.len(), 2);
        let parts = json!([{"type": "text", "text": "kill"}, {"type": "image_url", "image_url": {"url": "http://a/b.png"}}]);
        let together = judged(&parts)?;
        assert_eq!(together, [Judged { text: "kill".into(), picture: true }]);
        let result: Value = together.first().and_then(|one| serde_json::from_str(&result(one)).ok()).unwrap_or_default();
        assert_eq!((&result["flagged"], &result["categories"]["violence"]), (&json!(true), &json!(true)));
        assert_eq!(result["categories"]["hate"], json!(false));
        assert_eq!(result["category_applied_input_types"]["violence"], json!(["text", "image"]));
        assert_eq!(result["category_applied_input_types"]["hate"], json!(["text"]));
        assert!(judged(&json!([{"type": "sound"}])).is_err());
        Ok(())
    }
}
