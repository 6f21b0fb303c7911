//! What a message wants of the answer's form: thinking, effort, JSON, single calls.

use serde_json::Value;

use super::request::{Fields, required};
use crate::answer::{Shown, Thinking};
use crate::models::Model;
use crate::provider::ApiError;

/// When Opus 4.6 came: the last model that takes a temperature, and the first that thinks as much as it sees fit.
const OPUS_4_6: u64 = 1_770_163_200;
const LEAST_BUDGET: u64 = 1024;

/// Whether a model came after Opus 4.6.
pub fn is_newest(model: &Model) -> bool {
    model.created > OPUS_4_6
}

pub fn thinking(fields: &Fields, model: &Model, limit: u64) -> Result<Thinking, ApiError> {
    effort(fields, model)?;
    let Some(thinking) = fields.get("thinking").filter(|thinking| !thinking.is_null()) else { return Ok(Thinking::Unsaid) };
    let kind = thinking.get("type").and_then(Value::as_str).ok_or_else(|| required("thinking.type"))?;
    let known: &[&str] = match kind {
        "enabled" => &["type", "budget_tokens", "display"],
        "adaptive" => &["type", "display"],
        "disabled" => &["type"],
        _ => {
            let message = format!(
                "thinking: Input tag '{kind}' found using 'type' does not match any of the expected tags: 'disabled', 'enabled', 'adaptive'"
            );
            return Err(ApiError::invalid(message));
        }
    };
    only(thinking, known, &format!("thinking.{kind}"))?;
    let shown = match thinking.get("display").and_then(Value::as_str) {
        None | Some("summarized") => Shown::Whole,
        Some("omitted") => Shown::Signed,
        Some(_) => return Err(ApiError::invalid(format!("thinking.{kind}.display: Input should be 'summarized' or 'omitted'"))),
    };
    match kind {
        "disabled" => Ok(Thinking::Off),
        "adaptive" if model.created < OPUS_4_6 => Err(ApiError::invalid("adaptive thinking is not supported on this model")),
        "adaptive" => Ok(Thinking::On { most: u64::MAX, shown }),
        _ if is_newest(model) => Err(ApiError::invalid(
            "\"thinking.type.enabled\" is not supported for this model. Use \"thinking.type.adaptive\" and \"output_config.effort\" to \
             control thinking behavior.",
        )),
        _ => {
            let given = thinking.get("budget_tokens").ok_or_else(|| required("thinking.enabled.budget_tokens"))?;
            let wrong = || ApiError::invalid("thinking.enabled.budget_tokens: Input should be a valid integer");
            let budget = given.as_u64().ok_or_else(wrong)?;
            if budget < LEAST_BUDGET {
                let message = format!("thinking.enabled.budget_tokens: Input should be greater than or equal to {LEAST_BUDGET}");
                return Err(ApiError::invalid(message));
            }
            if budget >= limit {
                return Err(ApiError::invalid("`max_tokens` must be greater than `thinking.budget_tokens`."));
            }
            Ok(Thinking::On { most: budget, shown })
        }
    }
}

/// Whether thinking has a budget: then calls of tools in the history come with their thoughts.
pub fn budgeted(fields: &Fields) -> bool {
    fields.get("thinking").and_then(|thinking| thinking.get("type")).is_some_and(|kind| kind == "enabled")
}

fn effort(fields: &Fields, model: &Model) -> Result<(), ApiError> {
    let Some(config) = fields.get("output_config").filter(|config| !config.is_null()) else { return Ok(()) };
    only(config, &["effort", "format", "task_budget"], "output_config")?;
    let Some(effort) = config.get("effort").filter(|effort| !effort.is_null()) else { return Ok(()) };
    if !["low", "medium", "high", "xhigh", "max"].iter().any(|known| effort == known) {
        return Err(ApiError::invalid("output_config.effort: Input should be 'low', 'medium', 'high', 'xhigh' or 'max'"));
    }
    if model.created < OPUS_4_6 {
        return Err(ApiError::invalid("This model does not support the effort parameter."));
    }
    if effort == "xhigh" && !is_newest(model) {
        return Err(ApiError::invalid("This model does not support effort level 'xhigh'. Supported levels: high, low, max, medium."));
    }
    Ok(())
}

/// The schema of the answer, if it is to be JSON.
pub fn json(fields: &Fields, _model: &Model) -> Result<Option<Value>, ApiError> {
    let format = fields.get("output_config").and_then(|config| config.get("format")).filter(|format| !format.is_null());
    let Some(format) = format else { return Ok(None) };
    only(format, &["type", "schema"], "output_config.format")?;
    if format.get("type").is_none_or(|kind| kind != "json_schema") {
        return Err(ApiError::invalid("output_config.format.type: Input should be 'json_schema'"));
    }
    match format.get("schema") {
        Some(schema) if schema.is_object() => {
            self::schema(schema)?;
            Ok(Some(schema.clone()))
        }
        Some(_) => Err(ApiError::invalid("output_config.format.schema: Input should be a valid dictionary")),
        None => Err(required("output_config.format.schema")),
    }
}

/// What a schema may not say: an open object, bounds of numbers and lengths of texts.
fn schema(schema: &Value) -> Result<(), ApiError> {
    let kind = schema.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind == "object" && schema.get("additionalProperties").is_none_or(|others| others != false) {
        return Err(ApiError::invalid(
            "output_config.format.schema: For 'object' type, 'additionalProperties' must be explicitly set to false",
        ));
    }
    let bounds: &[&str] = match kind {
        "integer" | "number" => &["maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum", "multipleOf"],
        "string" => &["maxLength", "minLength"],
        _ => &[],
    };
    let there: Vec<&str> = bounds.iter().copied().filter(|name| schema.get(name).is_some()).collect();
    if !there.is_empty() {
        let message = format!("output_config.format.schema: For '{kind}' type, properties {} are not supported", there.join(", "));
        return Err(ApiError::invalid(message));
    }
    let maps = ["properties", "$defs", "definitions"].into_iter().filter_map(|name| schema.get(name)?.as_object());
    let lists = ["anyOf", "allOf"].into_iter().filter_map(|name| schema.get(name)?.as_array());
    let inner = maps.flat_map(|map| map.values()).chain(lists.flatten()).chain(schema.get("items"));
    inner.filter(|inner| inner.is_object()).try_for_each(self::schema)
}

pub fn metadata(fields: &Fields) -> Result<(), ApiError> {
    match fields.get("metadata") {
        Some(metadata) if !metadata.is_null() => only(metadata, &["user_id"], "metadata"),
        _ => Ok(()),
    }
}

/// Whether calls must come one at a time.
pub fn one_call(fields: &Fields) -> Result<bool, ApiError> {
    let Some(choice) = fields.get("tool_choice").filter(|choice| !choice.is_null()) else { return Ok(false) };
    let kind = choice.get("type").and_then(Value::as_str).unwrap_or_default();
    let known: &[&str] = match kind {
        "none" => &["type"],
        "tool" => &["type", "name", "disable_parallel_tool_use"],
        _ => &["type", "disable_parallel_tool_use"],
    };
    only(choice, known, &format!("tool_choice.{kind}"))?;
    Ok(choice.get("disable_parallel_tool_use").is_some_and(|wanted| wanted == true))
}

/// What the answer may call: nothing if the choice says so, or the one that it names.
pub fn callable(fields: &Fields, tools: Vec<String>) -> Vec<String> {
    let choice = |name: &str| fields.get("tool_choice").and_then(|choice| choice.get(name)?.as_str());
    match (choice("type"), choice("name")) {
        (Some("none"), _) => Vec::new(),
        (Some("tool"), Some(name)) => vec![name.to_owned()],
        _ => tools,
    }
}

/// Refuses members that aren't known.
pub fn only(value: &Value, known: &[&str], place: &str) -> Result<(), ApiError> {
    let Some(fields) = value.as_object() else {
        return Err(ApiError::invalid(format!("{place}: Input should be a valid dictionary")));
    };
    match fields.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(unknown) => Err(ApiError::invalid(format!("{place}.{unknown}: Extra inputs are not permitted"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::provider::Provider;

    fn outcome(name: &str, fields: &Value, limit: u64) -> Result<Thinking, String> {
        let model = Model::find(Provider::Anthropic, name).ok_or("no model")?;
        thinking(&fields.as_object().cloned().unwrap_or_default(), model, limit).map_err(|error| error.message)
    }

    #[test]
    fn each_generation_thinks_as_it_can() {
        let on = |most| Ok(Thinking::On { most, shown: Shown::Whole });
        let budget = |tokens: u64| json!({"thinking": {"type": "enabled", "budget_tokens": tokens}});
        assert_eq!(outcome("claude-haiku-4-5", &budget(1024), 1025), on(1024));
        assert!(outcome("claude-haiku-4-5", &budget(1023), 5000).is_err_and(|said| said.contains("greater than or equal to 1024")));
        assert!(outcome("claude-haiku-4-5", &budget(1024), 1024).is_err_and(|said| said.contains("`max_tokens` must be greater")));
        assert!(outcome("claude-opus-4-7", &budget(1024), 5000).is_err());
        let adaptive = json!({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}});
        assert_eq!(outcome("claude-opus-4-6", &adaptive, 10), on(u64::MAX));
        assert!(outcome("claude-sonnet-4-5", &adaptive, 10).is_err_and(|said| said.contains("effort")));
        assert_eq!(outcome("claude-opus-4-7", &json!({"thinking": {"type": "disabled"}}), 10), Ok(Thinking::Off));
        assert!(
            outcome("claude-opus-4-7", &json!({"thinking": {"type": "adaptive", "a": 1}}), 10)
                .is_err_and(|said| said.contains("thinking.adaptive.a"))
        );
    }

    #[test]
    fn a_schema_is_closed_and_has_no_bounds() {
        let closed = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false});
        assert_eq!(schema(&closed), Ok(()));
        let said = |schema: &Value| self::schema(schema).err().map(|error| error.message).unwrap_or_default();
        assert!(said(&json!({"type": "array", "items": {"type": "object"}})).contains("must be explicitly set to false"));
        assert!(said(&json!({"type": "integer", "minimum": 1})).contains("For 'integer' type, properties minimum are not supported"));
    }
}
