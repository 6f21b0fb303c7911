//! `GET /v1/models`, in every dialect.

use crate::gemini;
use crate::models::Model;
use crate::provider::{ApiError, Provider};
use crate::text::rfc3339;

/// All models of a provider, or the one of this name.
pub fn models(provider: Provider, name: Option<&str>) -> Result<String, ApiError> {
    if let Some(name) = name {
        return Model::find(provider, name).map(|model| one(model, name)).ok_or_else(|| provider.model_not_found(name));
    }
    Ok(match provider {
        Provider::Gemini => {
            let rows: Vec<String> = Model::of(provider).map(gemini::response::model).collect();
            format!(r#"{{"models":[{}]}}"#, rows.join(","))
        }
        Provider::Azure | Provider::Compatible => {
            let rows: Vec<String> = Model::of(provider).map(|model| one(model, model.name)).collect();
            format!(r#"{{"object":"list","data":[{}]}}"#, rows.join(","))
        }
        Provider::Openai => {
            let names = Model::of(provider).flat_map(|model| [(model, model.name), (model, model.snapshot)]);
            let rows: Vec<String> = names.map(|(model, name)| one(model, name)).collect();
            format!(r#"{{"object":"list","data":[{}]}}"#, rows.join(","))
        }
        Provider::Anthropic => {
            let rows: Vec<String> = Model::of(provider).map(|model| one(model, model.snapshot)).collect();
            let first = Model::of(provider).next().map_or("", |model| model.snapshot);
            let last = Model::of(provider).last().map_or("", |model| model.snapshot);
            format!(r#"{{"data":[{}],"has_more":false,"first_id":"{first}","last_id":"{last}"}}"#, rows.join(","))
        }
    })
}

fn one(model: &Model, name: &str) -> String {
    match model.provider {
        Provider::Gemini => gemini::response::model(model),
        Provider::Openai | Provider::Azure | Provider::Compatible => {
            format!(r#"{{"id":"{name}","object":"model","created":{},"owned_by":"system"}}"#, model.created)
        }
        Provider::Anthropic => format!(
            r#"{{"type":"model","id":"{}","display_name":"{}","created_at":"{}","lifecycle":"active","max_input_tokens":{},"max_tokens":{}}}"#,
            model.snapshot,
            model.display,
            rfc3339(model.created),
            model.context,
            model.max_output,
        ),
    }
}
