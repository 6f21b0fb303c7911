//! The members of a request body: how OpenAI reads each kind, and what it says of one it can't read.

use serde_json::{Map, Value};

use super::error;
use crate::compatible::Flavour;
use crate::models::{Kind, Model};
use crate::provider::{ApiError, Provider};

pub type Fields = Map<String, Value>;

/// Whose models a request asks for, and in what manner.
#[derive(Clone, Copy, Debug)]
pub struct Shop<'a> {
    pub provider: Provider,
    /// Azure's deployment, if the path names one: the body's model is not looked at.
    pub deployment: Option<&'a str>,
    pub flavour: Flavour,
}

/// The body as an object.
pub fn object(body: &[u8]) -> Result<Fields, ApiError> {
    match serde_json::from_slice(body) {
        Ok(Value::Object(fields)) => Ok(fields),
        _ => Err(unreadable()),
    }
}

/// Refuses what isn't `known`, in the words of the newer endpoints.
pub fn only(fields: &Fields, known: &[&str]) -> Result<(), ApiError> {
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(unknown) => {
            let error = ApiError::invalid(format!("Unknown parameter: '{unknown}'."));
            Err(error.param(unknown).code("unknown_parameter"))
        }
    }
}

/// The model that a shop has under the name given, if it can do what is asked of it.
pub fn sold(fields: &Fields, shop: Shop, fits: fn(Kind) -> bool) -> Result<&'static Model, ApiError> {
    if shop.provider == Provider::Openai {
        return model(fields, None, fits);
    }
    let name = match (shop.deployment, fields.get("model")) {
        (Some(deployment), _) => deployment,
        (None, Some(Value::String(name))) => name.as_str(),
        (None, _) => return Err(missing("model")),
    };
    let model = Model::find(shop.provider, name).ok_or_else(|| shop.provider.model_not_found(name))?;
    if fits(model.kind) { Ok(model) } else { Err(error::wrong_kind(model, fits)) }
}

/// The model named, if it can do what is asked of it; `default` where none need be named.
pub fn model(fields: &Fields, default: Option<&str>, fits: fn(Kind) -> bool) -> Result<&'static Model, ApiError> {
    let name = match fields.get("model") {
        Some(Value::String(name)) => name.as_str(),
        Some(Value::Null) | None => default.ok_or_else(|| ApiError::invalid("you must provide a model parameter"))?,
        Some(other) => return Err(wrong_type("model", "a string", other)),
    };
    let model = Model::find(Provider::Openai, name).ok_or_else(|| error::model_not_found(name))?;
    if fits(model.kind) { Ok(model) } else { Err(error::wrong_kind(model, fits)) }
}

/// A text; null is as good as absent.
pub fn text<'a>(fields: &'a Fields, name: &str) -> Result<Option<&'a str>, ApiError> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(name, "a string", other)),
    }
}

/// One of the words that `name` may be.
pub fn word<'a>(fields: &'a Fields, name: &str, words: &[&str]) -> Result<Option<&'a str>, ApiError> {
    let Some(given) = text(fields, name)? else { return Ok(None) };
    if words.contains(&given) { Ok(Some(given)) } else { Err(unsupported(name, given, words)) }
}

/// A value that isn't one of those there are.
pub fn unsupported(name: &str, given: &str, words: &[&str]) -> ApiError {
    let quoted: Vec<String> = words.iter().map(|word| format!("'{word}'")).collect();
    let list = match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, [one])) => format!("{one} and {last}"),
        Some((last, rest)) => format!("{}, and {last}", rest.join(", ")),
        None => String::new(),
    };
    let error = ApiError::invalid(format!("Invalid value: '{given}'. Supported values are: {list}."));
    error.param(name).code("invalid_value")
}

pub fn missing(name: &str) -> ApiError {
    let error = ApiError::invalid(format!("Missing required parameter: '{name}'."));
    error.param(name).code("missing_required_parameter")
}

pub fn too_long(name: &str, limit: u64, got: u64) -> ApiError {
    let message = format!(
        "Invalid '{name}': string too long. Expected a string with maximum length {limit}, but got a string with length {got} instead."
    );
    ApiError::invalid(message).param(name).code("string_above_max_length")
}

pub fn unreadable() -> ApiError {
    ApiError::invalid(
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library \
         correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)",
    )
}

/// A boolean; null is as good as absent.
pub fn flag(fields: &Fields, name: &str) -> Result<Option<bool>, ApiError> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => Err(wrong_type(name, "a boolean", other)),
    }
}

/// A whole number within bounds, both included.
pub fn integer(fields: &Fields, name: &str, low: u64, high: u64) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
    let number = match value.as_u64() {
        Some(number) if number >= low && number <= high => return Ok(Some(number)),
        Some(number) => number,
        None if value.is_i64() => 0,
        None => return Err(wrong_type(name, "an integer", value)),
    };
    let (what, sign, bound, code) = if number < low {
        ("below minimum", ">=", low, "integer_below_min_value")
    } else {
        ("above maximum", "<=", high, "integer_above_max_value")
    };
    let message = format!("Invalid '{name}': integer {what} value. Expected a value {sign} {bound}, but got {value} instead.");
    Err(ApiError::invalid(message).param(name).code(code))
}

pub fn wrong_type(name: &str, expected: &str, got: &Value) -> ApiError {
    let kind = match got {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    let message = format!("Invalid type for '{name}': expected {expected}, but got {kind} instead.");
    ApiError::invalid(message).param(name).code("invalid_type")
}
