//! What a chat wants of the answer's form: JSON, single calls, effort; and what OpenAI demands of schemas and names.

use serde_json::Value;

use super::fields::{Fields, flag, missing, unsupported, wrong_type};
use super::request::text_of;
use crate::answer::{Shown, Thinking};
use crate::models::Model;
use crate::provider::{ApiError, Provider};

/// The schema of the answer, if it is to be JSON; null for any object.
pub fn json(fields: &Fields, messages: &[Value]) -> Result<Option<Value>, ApiError> {
    let Some(format) = fields.get("response_format").filter(|format| !format.is_null()) else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => {
            let named = |message: &Value| text_of(message.get("content")).to_ascii_lowercase().contains("json");
            if messages.iter().any(named) {
                return Ok(Some(Value::Null));
            }
            let message = "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'.";
            Err(ApiError::invalid(message).param("messages"))
        }
        Some("json_schema") => schema(format).map(Some),
        Some(other) => Err(unsupported("response_format.type", other, &["json_object", "json_schema", "text"])),
        None => Err(missing("response_format.type")),
    }
}

fn schema(format: &Value) -> Result<Value, ApiError> {
    let given = format.get("json_schema").ok_or_else(|| missing("response_format.json_schema"))?;
    let name = given.get("name").and_then(Value::as_str).ok_or_else(|| missing("response_format.json_schema.name"))?;
    check_name("response_format.json_schema.name", name)?;
    let known = ["name", "schema", "strict", "description"];
    if let Some(unknown) = given.as_object().and_then(|given| given.keys().find(|key| !known.contains(&key.as_str()))) {
        let param = format!("response_format.json_schema.{unknown}");
        return Err(ApiError::invalid(format!("Unknown parameter: '{param}'.")).param(param).code("unknown_parameter"));
    }
    let schema = match given.get("schema") {
        Some(schema) if schema.is_object() => schema,
        Some(other) => return Err(wrong_type("response_format.json_schema.schema", "an object", other)),
        None => return Err(missing("response_format.json_schema.schema")),
    };
    if given.get("strict").is_some_and(|strict| strict == true) {
        strict(name, schema, &mut Vec::new())?;
    }
    Ok(schema.clone())
}

/// A strict schema has every property required, and no others.
fn strict(name: &str, schema: &Value, place: &mut Vec<String>) -> Result<(), ApiError> {
    let refuse = |place: &[String], what: &str| {
        let place: Vec<String> = place.iter().map(|step| format!("'{step}'")).collect();
        let message = format!("Invalid schema for response_format '{name}': In context=({}), {what}", place.join(", "));
        Err(ApiError::invalid(message).param("response_format").code("invalid_json_schema"))
    };
    let properties = schema.get("properties").and_then(Value::as_object);
    if properties.is_some() || schema.get("type").is_some_and(|kind| kind == "object") {
        if schema.get("additionalProperties").is_none_or(|others| others != false) {
            return refuse(place, "'additionalProperties' is required to be supplied and to be false.");
        }
        let required = schema.get("required").and_then(Value::as_array);
        let lacks = |key: &&String| required.is_none_or(|required| !required.iter().any(|name| name == key.as_str()));
        if let Some(key) = properties.and_then(|properties| properties.keys().find(lacks)) {
            let what =
                format!("'required' is required to be supplied and to be an array including every key in properties. Missing '{key}'.");
            return refuse(place, &what);
        }
    }
    let named = |group: &'static str| {
        schema.get(group).and_then(Value::as_object).into_iter().flatten().map(move |(key, inner)| (group, key.clone(), inner))
    };
    let listed = |group: &'static str| {
        let options = schema.get(group).and_then(Value::as_array).into_iter().flatten();
        options.enumerate().map(move |(at, inner)| (group, at.to_string(), inner))
    };
    let inner = named("properties").chain(named("$defs")).chain(listed("anyOf"));
    for (group, key, inner) in inner.chain(schema.get("items").map(|items| ("items", String::new(), items))) {
        let depth = place.len();
        place.push(group.to_owned());
        if !key.is_empty() {
            place.push(key);
        }
        strict(name, inner, place)?;
        place.truncate(depth);
    }
    Ok(())
}

/// A function of a tool: its name, and parameters that are a schema of an object.
pub fn check_function(param: &str, name: &str, function: Option<&Value>) -> Result<(), ApiError> {
    check_name(&format!("{param}.name"), name)?;
    let parameters = function.and_then(|function| function.get("parameters"));
    match parameters {
        Some(Value::Object(schema)) if schema.get("type").is_none_or(|kind| kind == "object") => Ok(()),
        Some(Value::Object(schema)) => {
            let kind = schema.get("type").map(Value::to_string).unwrap_or_default();
            let message =
                format!("Invalid schema for function '{name}': schema must be a JSON Schema of 'type: \"object\"', got 'type: {kind}'.");
            Err(ApiError::invalid(message).param(format!("{param}.parameters")).code("invalid_function_parameters"))
        }
        None | Some(Value::Null) => Ok(()),
        Some(other) => Err(wrong_type(&format!("{param}.parameters"), "an object", other)),
    }
}

fn check_name(param: &str, name: &str) -> Result<(), ApiError> {
    let legal = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == '-';
    let (what, code) = if name.is_empty() {
        ("empty string. Expected a string with minimum length 1, but got an empty string instead.".to_owned(), "empty_string")
    } else if name.len() > 64 {
        let length = name.len();
        let what = format!("string too long. Expected a string with maximum length 64, but got a string with length {length} instead.");
        (what, "string_above_max_length")
    } else if name.chars().all(legal) {
        return Ok(());
    } else {
        let what = "string does not match pattern. Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'.";
        (what.to_owned(), "invalid_value")
    };
    Err(ApiError::invalid(format!("Invalid '{param}': {what}")).param(param).code(code))
}

/// Whether calls must come one at a time.
pub fn one_call(fields: &Fields, tools: &[String]) -> Result<bool, ApiError> {
    let parallel = flag(fields, "parallel_tool_calls")?;
    if parallel.is_some() && tools.is_empty() {
        let message = "Invalid value for 'parallel_tool_calls': 'parallel_tool_calls' is only allowed when 'tools' are specified.";
        return Err(ApiError::invalid(message).param("parallel_tool_calls"));
    }
    Ok(parallel == Some(false))
}

/// What hidden tokens there may be. Only servers that aren't OpenAI's show them.
pub fn thinking(fields: &Fields, model: &Model) -> Result<Thinking, ApiError> {
    let shows = model.provider == Provider::Compatible;
    if let Some(effort) = super::fields::text(fields, "reasoning_effort")? {
        if !shows && !model.reasons {
            return Err(ApiError::invalid("Unrecognized request argument supplied: reasoning_effort"));
        }
        let known: &[&str] = match model.name {
            _ if shows => &["none", "default", "minimal", "low", "medium", "high", "xhigh"],
            "gpt-5" | "gpt-5-mini" => &["minimal", "low", "medium", "high"],
            _ => &["low", "medium", "high"],
        };
        if !known.contains(&effort) {
            let mut error = unsupported("reasoning_effort", effort, known);
            error.message = error.message.replace("Invalid value:", "Unsupported value:");
            return Err(error.code("unsupported_value"));
        }
        if effort == "none" {
            return Ok(Thinking::Off);
        }
    }
    Ok(if shows { Thinking::On { most: u64::MAX, shown: Shown::Whole } } else { Thinking::Unsaid })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        value.as_object().cloned().unwrap_or_default()
    }

    fn refusal<T>(outcome: Result<T, ApiError>) -> String {
        outcome.err().map(|error| error.message).unwrap_or_default()
    }

    fn format(strict: bool, schema: &Value) -> Result<Option<Value>, ApiError> {
        let format = json!({"type": "json_schema", "json_schema": {"name": "a", "strict": strict, "schema": schema}});
        super::json(&fields(json!({ "response_format": format })), &[])
    }

    #[test]
    fn a_strict_schema_leaves_nothing_open() {
        let closed = json!({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": false});
        assert_eq!(format(true, &closed), Ok(Some(closed.clone())));
        let open = json!({"type": "object", "properties": {"a": closed, "b": {"type": "object"}}, "required": ["a", "b"], "additionalProperties": false});
        let said = refusal(format(true, &open));
        assert!(said.contains("In context=('properties', 'b'), 'additionalProperties' is required"), "{said}");
        assert!(format(false, &open).is_ok());
        let optional = json!({"type": "object", "properties": {"a": {}}, "additionalProperties": false});
        assert!(refusal(format(true, &optional)).ends_with("Missing 'a'."));
    }

    #[test]
    fn an_object_is_given_to_who_says_json() {
        let wanted = fields(json!({"response_format": {"type": "json_object"}}));
        assert!(refusal(super::json(&wanted, &[json!({"role": "user", "content": "hi"})])).contains("must contain the word 'json'"));
        assert_eq!(super::json(&wanted, &[json!({"role": "user", "content": "As JSON"})]), Ok(Some(Value::Null)));
    }

    #[test]
    fn names_and_efforts_are_of_those_there_are() {
        assert!(refusal(check_function("f", "a b", None)).contains("does not match pattern"));
        assert!(refusal(check_function("f", &"a".repeat(65), None)).contains("length 65"));
        assert!(refusal(check_function("f", "a", Some(&json!({"parameters": {"type": "array"}})))).contains("JSON Schema of 'type"));
        let effort = |model, effort: &str| {
            let model = Model::find(Provider::Openai, model);
            model.map(|model| refusal(thinking(&fields(json!({ "reasoning_effort": effort })), model))).unwrap_or_default()
        };
        assert!(effort("gpt-4o", "low").starts_with("Unrecognized request argument"));
        assert_eq!((effort("o3", "low"), effort("gpt-5", "minimal")), (String::new(), String::new()));
        assert!(effort("o3", "minimal").starts_with("Unsupported value: 'minimal'"));
    }
}
