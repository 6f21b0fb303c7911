//! Tools and settings of a request, within Google's bounds.

use serde_json::Value;

use super::error::{self, bad};
use super::signs;
use crate::answer::{Shown, Thinking};
use crate::models::Model;
use crate::provider::ApiError;

/// Which functions may be called, and one that must be.
pub struct Choice {
    pub callable: Vec<String>,
    pub forced: Option<String>,
}

pub struct Config {
    pub candidates: usize,
    pub limit: u64,
    pub stop: Vec<String>,
    pub json: Option<Value>,
    pub thinking: Thinking,
}

/// The names of all functions declared.
pub fn tools(request: &Value) -> Result<Vec<String>, ApiError> {
    let mut names: Vec<String> = Vec::new();
    for (index, tool) in list(request, "tools").iter().enumerate() {
        for (at, function) in list(tool, "functionDeclarations").iter().enumerate() {
            let place = format!("tools[{index}].function_declarations[{at}]");
            let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
            if !is_name(name) {
                let what = "Invalid function name. Must start with a letter or an underscore. Must be alphanumeric (a-z, A-Z, 0-9), \
                            underscores (_), dots (.), colons (:), or dashes (-), with a maximum length of 128.";
                return Err(bad(&format!("{place}.name"), what));
            }
            if names.iter().any(|known| known == name) {
                return Err(error::invalid(format!("Duplicate function declaration found: {name}")));
            }
            if function.get("parameters").is_some() && function.get("parametersJsonSchema").is_some() {
                let what = "parameters and parameters_json_schema are mutually exclusive.";
                return Err(bad(&place, what));
            }
            if let Some(schema) = function.get("parameters") {
                self::schema(&format!("{place}.parameters"), schema)?;
            }
            if function.get("parametersJsonSchema").is_some_and(|schema| !schema.is_object()) {
                return Err(bad(&format!("{place}.parameters_json_schema"), "schema must be an object."));
            }
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn is_name(name: &str) -> bool {
    let begins = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    begins && name.len() <= 128 && name.chars().all(|char| char.is_ascii_alphanumeric() || "_.:-".contains(char))
}

/// What Google demands of its own schemas, beyond that it knows their fields.
fn schema(place: &str, schema: &Value) -> Result<(), ApiError> {
    let properties = schema.get("properties").and_then(Value::as_object);
    match schema.get("type").and_then(Value::as_str) {
        Some("ARRAY") if schema.get("items").is_none() => return Err(bad(&format!("{place}.items"), "missing field.")),
        Some("OBJECT") if properties.is_none_or(serde_json::Map::is_empty) => {
            return Err(bad(&format!("{place}.properties"), "should be non-empty for OBJECT type"));
        }
        Some(kind) if kind != "STRING" && schema.get("enum").is_some() => {
            return Err(bad(&format!("{place}.enum"), "only allowed for STRING type"));
        }
        None if schema.get("anyOf").is_none() => return Err(bad(&format!("{place}.type"), "must be specified.")),
        _ => {}
    }
    for (at, name) in list(schema, "required").iter().filter_map(Value::as_str).enumerate() {
        if properties.is_none_or(|properties| !properties.contains_key(name)) {
            return Err(bad(&format!("{place}.required[{at}]"), "property is not defined"));
        }
    }
    for (name, inner) in properties.into_iter().flatten() {
        self::schema(&format!("{place}.properties[{name}]"), inner)?;
    }
    if let Some(items) = schema.get("items") {
        self::schema(&format!("{place}.items"), items)?;
    }
    list(schema, "anyOf").iter().enumerate().try_for_each(|(at, option)| self::schema(&format!("{place}.any_of[{at}]"), option))
}

pub fn choice(request: &Value, declared: &[String]) -> Result<Choice, ApiError> {
    let config = request.pointer("/toolConfig/functionCallingConfig");
    let mode = config.and_then(|config| config.get("mode")?.as_str()).unwrap_or("AUTO");
    let allowed: Vec<&str> =
        config.map(|config| list(config, "allowedFunctionNames")).unwrap_or_default().iter().filter_map(Value::as_str).collect();
    if matches!(mode, "ANY" | "VALIDATED") && declared.is_empty() {
        return Err(error::invalid("Function calling config is set without function_declarations."));
    }
    if !allowed.is_empty() && !matches!(mode, "ANY" | "VALIDATED") {
        return Err(error::invalid("Please set allowed_function_names only when function calling mode is ANY."));
    }
    if let Some(stranger) = allowed.iter().find(|name| !declared.iter().any(|known| known == **name)) {
        return Err(error::invalid(format!("allowed_function_names contains a function that is not declared: {stranger}")));
    }
    let callable: Vec<String> = match (mode, allowed.as_slice()) {
        ("NONE", _) => Vec::new(),
        (_, []) => declared.to_vec(),
        (_, names) => names.iter().map(|name| (*name).to_owned()).collect(),
    };
    let forced = callable.first().filter(|_| mode == "ANY").cloned();
    Ok(Choice { callable, forced })
}

pub fn config(request: &Value, model: &Model, tools: bool) -> Result<Config, ApiError> {
    let empty = Value::Null;
    let config = request.get("generationConfig").unwrap_or(&empty);
    let place = |name: &str| format!("generation_config.{name}");
    for (name, snake, low, high) in [
        ("temperature", "temperature", 0.0, 2.0),
        ("topP", "top_p", 0.0, 1.0),
        ("topK", "top_k", 1.0, f64::MAX),
        ("presencePenalty", "presence_penalty", -2.0, 2.0),
        ("frequencyPenalty", "frequency_penalty", -2.0, 2.0),
    ] {
        let given = config.get(name).and_then(Value::as_f64);
        if given.is_some_and(|number| !(low..=high).contains(&number)) {
            return Err(bad(&place(snake), &format!("{snake} must be in the range [{low:?}, {high:?}].")));
        }
    }
    let stop: Vec<String> = list(config, "stopSequences").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    if stop.len() > 5 {
        return Err(bad(&place("stop_sequences"), "the number of stop sequences must not exceed 5."));
    }
    if stop.iter().any(String::is_empty) {
        return Err(bad(&place("stop_sequences"), "stop sequences must not be empty."));
    }
    let most = if signs(model) { 1 } else { 8 };
    let candidates = whole(config, "candidateCount").unwrap_or(1);
    if !(1..=most).contains(&candidates) {
        return Err(bad(&place("candidate_count"), &format!("candidate_count must be in the range [1, {most}].")));
    }
    let asked = config.get("logprobs").is_some();
    if asked && config.get("responseLogprobs").is_none_or(|wanted| wanted != true) {
        return Err(error::invalid("logprobs is set but response_logprobs is not true."));
    }
    if whole(config, "logprobs").is_some_and(|number| !(0..=20).contains(&number)) {
        return Err(bad(&place("logprobs"), "logprobs must be in the range [0, 20]."));
    }
    Ok(Config {
        candidates: usize::try_from(candidates).unwrap_or(1),
        limit: limit(config, model)?,
        stop,
        json: json(config, model, tools)?,
        thinking: thinking(config, model)?,
    })
}

fn limit(config: &Value, model: &Model) -> Result<u64, ApiError> {
    let Some(asked) = whole(config, "maxOutputTokens") else { return Ok(model.max_output) };
    match u64::try_from(asked) {
        Ok(limit) if (1..=model.max_output).contains(&limit) => Ok(limit),
        _ => Err(error::invalid(format!(
            "Unable to submit request because it has a maxOutputTokens value of {asked} but the supported range is from 1 (inclusive) \
             to {} (exclusive). Update the value and try again.",
            model.max_output + 1
        ))),
    }
}

/// The schema of the answer, if it is to be JSON.
fn json(config: &Value, model: &Model, tools: bool) -> Result<Option<Value>, ApiError> {
    let kind = config.get("responseMimeType").and_then(Value::as_str).unwrap_or("text/plain");
    let (own, standard) = (config.get("responseSchema"), config.get("responseJsonSchema"));
    if !["text/plain", "application/json", "text/x.enum"].contains(&kind) {
        let what = "allowed mimetypes are `text/plain`, `application/json`, `application/xml`, `application/yaml` and `text/x.enum`.";
        return Err(bad(&place_of("response_mime_type"), what));
    }
    if own.is_some() && standard.is_some() {
        return Err(error::invalid("Only one of response_schema and response_json_schema can be set."));
    }
    let (name, given) = if own.is_some() { ("response_schema", own) } else { ("response_json_schema", standard) };
    if let Some(own) = own {
        schema(&place_of("response_schema"), own)?;
    }
    if kind != "application/json" {
        return match given {
            Some(_) if kind == "text/plain" => Err(bad(&place_of(name), "only allowed for response_mime_type application/json")),
            _ => Ok(None),
        };
    }
    if tools && !signs(model) {
        return Err(error::invalid("Function calling with a response mime type: 'application/json' is unsupported"));
    }
    Ok(Some(given.cloned().unwrap_or(Value::Null)))
}

fn place_of(name: &str) -> String {
    format!("generation_config.{name}")
}

/// Newer models take a level, older ones a budget, and each refuses what it can't do.
fn thinking(config: &Value, model: &Model) -> Result<Thinking, ApiError> {
    let Some(config) = config.get("thinkingConfig") else { return Ok(Thinking::Unsaid) };
    let shown = if config.get("includeThoughts").is_some_and(|wanted| wanted == true) { Shown::Whole } else { Shown::No };
    let (budget, level) = (whole(config, "thinkingBudget"), config.get("thinkingLevel").and_then(Value::as_str));
    if budget.is_some() && level.is_some() {
        return Err(error::invalid("You can only set only one of thinking budget and thinking level."));
    }
    if let Some(level) = level {
        return match level {
            _ if !signs(model) => Err(error::invalid("Thinking level is not supported for this model.")),
            "LOW" | "HIGH" | "MEDIUM" | "THINKING_LEVEL_UNSPECIFIED" => Ok(Thinking::On { most: u64::MAX, shown }),
            _ => Err(error::invalid(format!(
                "Thinking level {level} is not supported for this model. Please retry with other thinking level."
            ))),
        };
    }
    let (low, high) = if model.reasons { (128, 32_768) } else { (0, 24_576) };
    match budget {
        None | Some(-1) => Ok(Thinking::On { most: u64::MAX, shown }),
        Some(0) if model.reasons => Err(error::invalid("Budget 0 is invalid. This model only works in thinking mode.")),
        Some(0) => Ok(Thinking::Off),
        Some(budget) if (low..=high).contains(&budget) => Ok(Thinking::On { most: u64::try_from(budget).unwrap_or(0), shown }),
        Some(budget) => {
            Err(error::invalid(format!("The thinking budget {budget} is invalid. Please choose a value between {low} and {high}.")))
        }
    }
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn whole(value: &Value, name: &str) -> Option<i64> {
    value.get(name)?.as_i64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::provider::Provider;

    fn outcome(name: &str, config: Value, tools: bool) -> String {
        let model = Model::find(Provider::Gemini, name);
        let made = model.map(|model| self::config(&json!({ "generationConfig": config }), model, tools));
        made.and_then(Result::err).map(|error| error.message).unwrap_or_default()
    }

    #[test]
    fn settings_have_their_bounds() {
        let flash = |config| outcome("gemini-2.5-flash", config, false);
        assert!(flash(json!({"temperature": 2.1})).contains("temperature must be in the range [0.0, 2.0]"));
        assert_eq!(
            flash(json!({"temperature": 2.0, "topP": 1, "maxOutputTokens": 65_536, "stopSequences": ["a", "b", "c", "d", "e"]})),
            ""
        );
        assert!(flash(json!({"maxOutputTokens": 65_537})).contains("from 1 (inclusive) to 65537 (exclusive)"));
        assert!(flash(json!({"stopSequences": ["a", "b", "c", "d", "e", "f"]})).contains("must not exceed 5"));
        assert!(flash(json!({"responseJsonSchema": {}})).contains("only allowed for response_mime_type application/json"));
        assert!(outcome("gemini-2.5-flash", json!({"responseMimeType": "application/json"}), true).contains("is unsupported"));
        assert_eq!(outcome("gemini-3-pro-preview", json!({"responseMimeType": "application/json"}), true), "");
    }

    #[test]
    fn each_generation_thinks_in_its_own_units() {
        let with = |name, thinking: Value| outcome(name, json!({ "thinkingConfig": thinking }), false);
        assert_eq!(with("gemini-2.5-flash", json!({"thinkingBudget": 0})), "");
        assert!(with("gemini-2.5-pro", json!({"thinkingBudget": 0})).contains("only works in thinking mode"));
        assert!(with("gemini-2.5-flash", json!({"thinkingBudget": 30_000})).contains("between 0 and 24576"));
        assert!(with("gemini-2.5-pro", json!({"thinkingLevel": "LOW"})).contains("not supported for this model"));
        assert_eq!(with("gemini-3-pro-preview", json!({"thinkingLevel": "LOW"})), "");
        assert!(with("gemini-3-pro-preview", json!({"thinkingLevel": "LOW", "thinkingBudget": 200})).contains("only one of"));
    }

    #[test]
    fn names_are_allowed_only_where_a_call_is_wanted() {
        let request = |mode: &str| json!({"toolConfig": {"functionCallingConfig": {"mode": mode, "allowedFunctionNames": ["f"]}}});
        let declared = ["f".to_owned(), "g".to_owned()];
        let any = choice(&request("ANY"), &declared).ok();
        assert_eq!(any.map(|choice| (choice.callable, choice.forced)), Some((vec!["f".into()], Some("f".into()))));
        assert!(choice(&request("AUTO"), &declared).is_err() && choice(&request("ANY"), &["g".to_owned()]).is_err());
        let none = choice(&json!({"toolConfig": {"functionCallingConfig": {"mode": "NONE"}}}), &declared).ok();
        assert_eq!(none.map(|choice| choice.callable.len()), Some(0));
    }
}
