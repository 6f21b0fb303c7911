//! The list of models that a key may use, in the form of each dialect. It is answered from the price table and the key's
//! policy: a provider's own list shows what an account may use, fine-tuned models of others included.

use crate::admission::{Allow, model_fits, operation_fits};
use crate::operation::{Dialect, OPERATIONS, Provider};
use crate::price::{Mode, PriceTable};
use crate::refusal::{Code, Refusal};
use serde_json::{Value, json};

/// Models of a provider that a key may use whom all these lists limit, sorted. `routes` are names of the organisation's own with
/// the provider's models that they lead to.
pub fn usable<'a>(
    prices: &'a PriceTable,
    provider: &Provider,
    lists: &[&Allow],
    routes: impl Iterator<Item = (&'a str, &'a str)>,
) -> Vec<&'a str> {
    let callable = |mode: Mode| {
        OPERATIONS
            .iter()
            .filter(|op| op.dialect == provider.dialect && op.models.contains(&mode))
            .any(|op| lists.iter().all(|allow| operation_fits(allow, provider.name, op)))
    };
    let mut models: Vec<&str> = prices
        .models(provider.name)
        // A fine-tuned model is called by a name of its own; what is listed is only what its kind costs.
        .filter(|(model, _)| !model.starts_with("ft:"))
        .filter(|(model, price)| lists.iter().all(|allow| model_fits(allow, model)) && callable(price.mode))
        .map(|(model, _)| model)
        .collect();
    let fits = |name: &str, model: &str| lists.iter().all(|allow| model_fits(allow, name) || model_fits(allow, model));
    models.extend(routes.filter(|(name, model)| fits(name, model)).map(|(name, _)| name));
    models.sort_unstable();
    models.dedup();
    models
}

/// The answer to a question for all models, or for `one`: a JSON document.
pub fn answer(provider: &Provider, models: &[&str], one: Option<&str>) -> Result<String, Refusal> {
    let shown = |model: &str| match provider.dialect {
        // When a model came about, no table of ours says.
        Dialect::OpenAi | Dialect::Gemini => json!({ "id": model, "object": "model", "created": 0, "owned_by": provider.name }),
        Dialect::Anthropic => json!({ "type": "model", "id": model, "display_name": model, "created_at": "1970-01-01T00:00:00Z" }),
    };
    if let Some(one) = one {
        let known = models.contains(&one).then(|| shown(one).to_string());
        return known.ok_or_else(|| Refusal::new(Code::UnknownModel, format!("there is no model {one} for this virtual key")));
    }
    let data: Vec<Value> = models.iter().map(|model| shown(model)).collect();
    let list = match provider.dialect {
        Dialect::OpenAi | Dialect::Gemini => json!({ "object": "list", "data": data }),
        Dialect::Anthropic => {
            json!({ "data": data, "has_more": false, "first_id": models.first(), "last_id": models.last() })
        }
    };
    Ok(list.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn allow(models: &[&str], endpoints: &[&str]) -> Allow {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        Allow { models: own(models), endpoints: own(endpoints), state: false }
    }

    #[test]
    fn only_what_the_key_may_use() {
        let prices = PriceTable::built_in().unwrap();
        let openai = Provider::by_name("openai").unwrap();
        let all = usable(&prices, openai, &[&Allow::default()], std::iter::empty());
        assert!(
            all.contains(&"gpt-4o") && all.contains(&"whisper-1") && !all.iter().any(|m| m.starts_with("claude") || m.starts_with("ft:"))
        );
        assert!(all.is_sorted());
        assert_eq!(
            usable(&prices, openai, &[&allow(&["gpt-4o", "gpt-4o-mini", "claude-*"], &[])], std::iter::empty()),
            ["gpt-4o", "gpt-4o-mini"]
        );
        let embeddings = usable(&prices, openai, &[&allow(&[], &["POST /v1/embeddings"])], std::iter::empty());
        assert!(!embeddings.is_empty() && embeddings.iter().all(|m| m.starts_with("text-embedding")));
        assert_eq!(usable(&prices, openai, &[&allow(&[], &["anthropic:*"])], std::iter::empty()), [""; 0]);
    }

    #[test]
    fn each_dialect_has_its_own_list() {
        let [openai, anthropic] = ["openai", "anthropic"].map(|name| Provider::by_name(name).unwrap());
        assert_eq!(
            answer(openai, &["a"], None).unwrap(),
            r#"{"data":[{"created":0,"id":"a","object":"model","owned_by":"openai"}],"object":"list"}"#
        );
        let list: Value = serde_json::from_str(&answer(anthropic, &["a", "b"], None).unwrap()).unwrap();
        assert_eq!((&list["first_id"], &list["last_id"], &list["has_more"]), (&json!("a"), &json!("b"), &json!(false)));
        assert_eq!(answer(openai, &["a"], Some("b")).unwrap_err().code, Code::UnknownModel);
        assert!(answer(anthropic, &["a"], Some("a")).unwrap().contains("\"type\":\"model\""));
    }
}
