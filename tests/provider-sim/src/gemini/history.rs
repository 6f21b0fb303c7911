//! What went before: calls of functions, their results, and the signatures of the thoughts behind them.

use serde_json::Value;

use super::error;
use super::wire::decoded;
use crate::provider::ApiError;

/// How every signature begins that is made here.
const SIGNED: &[u8] = b"sim-thought:";
/// What Google takes for the signature of a call that another model made.
const UNSIGNED: [&str; 2] = ["skip_thought_signature_validator", "context_engineering_is_the_way_to_go"];

/// The role of a content; a user's if it has none.
pub fn role(content: &Value) -> &str {
    content.get("role").and_then(Value::as_str).filter(|role| !role.is_empty()).unwrap_or("user")
}

pub fn parts(content: &Value) -> impl Iterator<Item = &Value> {
    content.get("parts").and_then(Value::as_array).into_iter().flatten()
}

/// A signature, in base64 as it is sent.
pub fn signature(what: &str) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode([SIGNED, what.as_bytes()].concat())
}

/// Every call must be answered, by name, in the turn after it; `signed` if it must bring its signature back as well.
pub fn check(contents: &[Value], signed: bool) -> Result<(), ApiError> {
    let mut calls: Vec<&Value> = Vec::new();
    // Google looks at the signatures of the current turn alone: after the last text of the user.
    let said = |content: &Value| role(content) == "user" && parts(content).any(|part| part.get("functionResponse").is_none());
    let current = contents.iter().rposition(said).unwrap_or(0);
    for (index, content) in contents.iter().enumerate() {
        let answers: Vec<&Value> = parts(content).filter_map(|part| part.get("functionResponse")).collect();
        if answers.len() != calls.len() {
            return Err(error::invalid(if calls.is_empty() {
                "Please ensure that function response turn comes immediately after a function call turn."
            } else {
                "Please ensure that the number of function response parts is equal to the number of function call parts of the \
                 function call turn."
            }));
        }
        for answer in answers {
            answered(&mut calls, answer)?;
        }
        calls = parts(content).filter_map(|part| part.get("functionCall")).collect();
        let after_user = index.checked_sub(1).and_then(|before| contents.get(before)).is_some_and(|before| role(before) == "user");
        if !calls.is_empty() && !after_user {
            let message = "Please ensure that function call turn comes immediately after a user turn or after a function response turn.";
            return Err(error::invalid(message));
        }
        signatures(index, content, signed && index > current)?;
    }
    if calls.is_empty() {
        return Ok(());
    }
    Err(error::invalid("Please ensure that function call turn is followed by a function response turn."))
}

/// Takes the call that `answer` belongs to out of `calls`.
fn answered(calls: &mut Vec<&Value>, answer: &Value) -> Result<(), ApiError> {
    let same = |call: &&Value| {
        let id = answer.get("id").or_else(|| call.get("id"));
        call.get("name") == answer.get("name")
            && (id.is_none() || call.get("id").is_none() || answer.get("id").is_none() || call.get("id") == id)
    };
    let Some(at) = calls.iter().position(same) else {
        let name = answer.get("name").and_then(Value::as_str).unwrap_or_default();
        let message = format!("Function response `{name}` does not match any function call of the turn before.");
        return Err(error::invalid(message));
    };
    calls.remove(at);
    Ok(())
}

/// The first call of a turn has the signature; whatever signature there is must be one of ours.
fn signatures(index: usize, content: &Value, wanted: bool) -> Result<(), ApiError> {
    let first = parts(content).enumerate().find_map(|(at, part)| Some((at, part, part.get("functionCall")?)));
    if let Some((at, part, call)) = first.filter(|(_, part, _)| wanted && part.get("thoughtSignature").is_none()) {
        debug_assert!(part.is_object());
        let name = call.get("name").and_then(Value::as_str).unwrap_or_default();
        let message = format!(
            "Function call is missing a thought_signature in functionCall parts. This is required for tools to work correctly, and \
             missing thought_signature may lead to degraded model performance. Additional data, function call `default_api:{name}` , \
             position {}. Please refer to https://ai.google.dev/gemini-api/docs/thought-signatures for more details.",
            index + at + 1
        );
        return Err(error::invalid(message));
    }
    for signature in parts(content).filter_map(|part| part.get("thoughtSignature")?.as_str()) {
        let bytes = decoded(signature).unwrap_or_default();
        let dummy = UNSIGNED.iter().any(|word| signature == *word || bytes == word.as_bytes());
        if !bytes.starts_with(SIGNED) && !dummy {
            return Err(error::invalid("Corrupted thought signature."));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(contents: &Value, signed: bool) -> String {
        let contents = contents.as_array().cloned().unwrap_or_default();
        check(&contents, signed).err().map(|error| error.message).unwrap_or_default()
    }

    fn said(text: &str) -> Value {
        json!({"role": "user", "parts": [{"text": text}]})
    }

    fn call(name: &str) -> Value {
        json!({"functionCall": {"name": name, "args": {}}})
    }

    fn result(name: &str) -> Value {
        json!({"functionResponse": {"name": name, "response": {}}})
    }

    #[test]
    fn every_call_of_a_turn_is_answered_in_the_next_by_name() {
        let turn = |calls: Value, results: Value| json!([said("a"), {"role": "model", "parts": calls}, {"role": "user", "parts": results}]);
        assert_eq!(refusal(&turn(json!([call("f"), call("g")]), json!([result("g"), result("f")])), false), "");
        assert!(refusal(&turn(json!([call("f"), call("g")]), json!([result("f")])), false).contains("number of function response parts"));
        assert!(refusal(&turn(json!([call("f")]), json!([result("g")])), false).contains("`g` does not match"));
        assert!(refusal(&turn(json!([{"text": "no"}]), json!([result("g")])), false).contains("immediately after a function call turn"));
        assert!(refusal(&json!([said("a"), {"role": "model", "parts": [call("f")]}]), false).contains("followed by"));
        assert!(
            refusal(&json!([{"role": "model", "parts": [call("f")]}, {"role": "user", "parts": [result("f")]}]), false)
                .contains("immediately after a user turn")
        );
    }

    #[test]
    fn a_signature_comes_back_with_the_first_call_of_the_current_turn_and_unchanged() {
        let with = |sign: Value| {
            let mut first = call("f");
            first["thoughtSignature"] = sign;
            json!([said("a"), {"role": "model", "parts": [first, call("g")]}, {"role": "user", "parts": [result("f"), result("g")]}])
        };
        assert_eq!(refusal(&with(signature("1").into()), true), "");
        assert_eq!(refusal(&with("skip_thought_signature_validator".into()), true), "");
        assert_eq!(refusal(&with("c29tZXRoaW5n".into()), true), "Corrupted thought signature.");
        let bare = json!([said("a"), {"role": "model", "parts": [call("f")]}, {"role": "user", "parts": [result("f")]}]);
        assert!(refusal(&bare, true).starts_with("Function call is missing a thought_signature in functionCall parts."));
        assert_eq!(refusal(&bare, false), "");
        let mut earlier = bare.as_array().cloned().unwrap_or_default();
        earlier.extend([json!({"role": "model", "parts": [{"text": "done"}]}), said("b")]);
        assert_eq!(refusal(&earlier.into(), true), "", "an earlier turn is not looked at");
    }
}
