//! A prompt as the older operations take it: a text, texts, tokens, or lists of tokens.

use serde_json::Value;

use super::fields::wrong_type;
use crate::provider::ApiError;
use crate::tokens;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Empty if it came as tokens.
    pub text: String,
    pub tokens: u64,
}

/// None if `value` is an empty text or an empty list.
pub fn of(name: &str, value: &Value) -> Result<Option<Vec<Prompt>>, ApiError> {
    let wrong = |value: &Value| wrong_type(name, "a string, an array of strings, or an array of tokens", value);
    let prompts = match value {
        Value::String(text) => vec![text_of(text)],
        Value::Array(items) if items.iter().all(Value::is_u64) => vec![tokens_of(items)],
        Value::Array(items) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(text_of(text)),
                Value::Array(tokens) if tokens.iter().all(Value::is_u64) => Ok(tokens_of(tokens)),
                other => Err(wrong(other)),
            })
            .collect::<Result<_, _>>()?,
        other => return Err(wrong(other)),
    };
    Ok(prompts.iter().all(|prompt| prompt.tokens > 0).then_some(prompts))
}

fn text_of(text: &str) -> Prompt {
    Prompt { text: text.to_owned(), tokens: tokens::count(text) }
}

fn tokens_of(tokens: &[Value]) -> Prompt {
    Prompt { text: String::new(), tokens: tokens.len() as u64 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_form_is_told_from_the_others() -> Result<(), ApiError> {
        let tokens =
            |value: Value| of("input", &value).map(|prompts| prompts.map(|all| all.iter().map(|one| one.tokens).collect::<Vec<_>>()));
        assert_eq!(tokens(json!("one two"))?, Some(vec![2]));
        assert_eq!(tokens(json!(["one", "two more"]))?, Some(vec![1, 2]));
        assert_eq!(tokens(json!([5, 6, 7]))?, Some(vec![3]));
        assert_eq!(tokens(json!([[5], [6, 7]]))?, Some(vec![1, 2]));
        assert_eq!((tokens(json!(""))?, tokens(json!([]))?, tokens(json!(["a", ""]))?), (None, None, None));
        assert!(of("input", &json!({"a": 1})).is_err() && of("input", &json!(["a", null])).is_err());
        Ok(())
    }
}
