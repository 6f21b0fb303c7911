//! The list of models that a key may use, in the form of each dialect. It is answered from the price table and the key's
//! policy: a provider's own list shows what an account may use, fine-tuned models of others included.

use crate::admission::{Allow, model_fits, operation_fits};
use crate::operation::{Dialect, OPERATIONS, carries};
use crate::price::{Mode, PriceTable};
use crate::refusal::{Code, Refusal};
use serde_json::{Value, json};

/// A model in a list: its name, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed<'a> {
    pub model: &'a str,
    pub owner: &'a str,
}

/// Models of a provider that a key may use whom all these lists limit. `own` are models that the organisation itself has named.
pub fn usable<'a>(
    prices: &'a PriceTable,
    provider: &'a str,
    dialect: Dialect,
    lists: &[&Allow],
    own: impl Iterator<Item = &'a str>,
) -> Vec<Listed<'a>> {
    let callable = |mode: Mode| {
        OPERATIONS
            .iter()
            .filter(|op| op.models.contains(&mode) && carries(op, op.dialect, dialect))
            .any(|op| lists.iter().all(|allow| operation_fits(allow, provider, op)))
    };
    let listed = prices
        .models(provider)
        // A fine-tuned model is called by a name of its own; what is listed is only what its kind costs.
        .filter(|(model, price)| !model.starts_with("ft:") && callable(price.mode))
        .map(|(model, _)| model);
    let fits = |model: &&str| lists.iter().all(|allow| model_fits(allow, model));
    listed.chain(own).filter(fits).map(|model| Listed { model, owner: provider }).collect()
}

/// The answer to a question for all models, or for `one`: a JSON document in the caller's dialect. Of two of one name the first stands.
pub fn answer(dialect: Dialect, mut models: Vec<Listed<'_>>, one: Option<&str>) -> Result<String, Refusal> {
    models.sort_by_key(|listed| listed.model);
    models.dedup_by_key(|listed| listed.model);
    let shown = |listed: &Listed<'_>| match dialect {
        // When a model came about, no table of ours says.
        Dialect::OpenAi | Dialect::Gemini => json!({ "id": listed.model, "object": "model", "created": 0, "owned_by": listed.owner }),
        Dialect::Anthropic => {
            json!({ "type": "model", "id": listed.model, "display_name": listed.model, "created_at": "1970-01-01T00:00:00Z" })
        }
    };
    if let Some(one) = one {
        let known = models.iter().find(|listed| listed.model == one).map(|listed| shown(listed).to_string());
        return known.ok_or_else(|| Refusal::new(Code::UnknownModel, format!("there is no model {one} for this virtual key")));
    }
    let data: Vec<Value> = models.iter().map(shown).collect();
    let list = match dialect {
        Dialect::OpenAi | Dialect::Gemini => json!({ "object": "list", "data": data }),
        Dialect::Anthropic => {
            let [first, last] = [models.first(), models.last()].map(|listed| listed.map(|listed| listed.model));
            json!({ "data": data, "has_more": false, "first_id": first, "last_id": last })
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
        let of = |provider: &'static str, dialect, allow: Allow| {
            let listed = usable(&prices, provider, dialect, &[&allow], ["acme-1"].into_iter());
            let mut models: Vec<String> = listed.iter().map(|listed| listed.model.to_owned()).collect();
            models.sort_unstable();
            models
        };
        let openai = |list| of("openai", Dialect::OpenAi, list);
        let all = openai(Allow::default());
        let has = |name: &str| all.iter().any(|model| model == name);
        assert!(has("gpt-4o") && has("whisper-1") && has("acme-1") && !all.iter().any(|m| m.starts_with("claude") || m.starts_with("ft:")));
        assert_eq!(openai(allow(&["gpt-4o", "gpt-4o-mini", "claude-*"], &[])), ["gpt-4o", "gpt-4o-mini"]);
        let embeddings = openai(allow(&["text*", "gpt*"], &["POST /v1/embeddings"]));
        assert!(!embeddings.is_empty() && embeddings.iter().all(|m| m.starts_with("text-embedding")));
        assert_eq!(openai(allow(&["gpt*"], &["anthropic:*"])), [""; 0]);
        let claude = of("anthropic", Dialect::Anthropic, allow(&["claude*"], &["POST /v1/chat/completions"]));
        assert!(!claude.is_empty(), "a model of another dialect is called by the translated operation");
    }

    #[test]
    fn each_dialect_has_its_own_list() {
        let listed = |models: &[&'static str]| models.iter().map(|model| Listed { model, owner: "acme" }).collect::<Vec<_>>();
        assert_eq!(
            answer(Dialect::OpenAi, listed(&["b", "a", "b"]), None).unwrap(),
            r#"{"data":[{"created":0,"id":"a","object":"model","owned_by":"acme"},{"created":0,"id":"b","object":"model","owned_by":"acme"}],"object":"list"}"#
        );
        let list: Value = serde_json::from_str(&answer(Dialect::Anthropic, listed(&["a", "b"]), None).unwrap()).unwrap();
        assert_eq!((&list["first_id"], &list["last_id"], &list["has_more"]), (&json!("a"), &json!("b"), &json!(false)));
        assert_eq!(answer(Dialect::OpenAi, listed(&["a"]), Some("b")).unwrap_err().code, Code::UnknownModel);
        assert!(answer(Dialect::Anthropic, listed(&["a"]), Some("a")).unwrap().contains("\"type\":\"model\""));
    }
}
