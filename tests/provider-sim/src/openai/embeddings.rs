//! Embeddings: the same text gets the same direction, always of length one.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::fields::{self, Fields, integer, missing, word};
use super::prompts::{self, Prompt};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::models::{Kind, Model, Usage};
use crate::provider::ApiError;
use crate::ticket::Bill;

const KNOWN: &[&str] = &["dimensions", "encoding_format", "input", "model", "user"];
const MOST_INPUTS: usize = 2048;
const MOST_TOKENS: u64 = 300_000;

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let fields = fields::object(call.body)?;
    fields::only(&fields, KNOWN)?;
    let model = fields::sold(&fields, call.shop(), |kind| matches!(kind, Kind::Embedding { .. }))?;
    let inputs = inputs(&fields, model)?;
    let dimensions = dimensions(&fields, model)?;
    let base64 = word(&fields, "encoding_format", &["float", "base64"])? == Some("base64");
    let tokens: u64 = inputs.iter().map(|input| input.tokens).sum();
    let last = inputs.last().map_or("", |input| input.text.as_str());
    let (script, _) = call.steer(Some(model), false, last)?;
    call.admit(model, tokens, &script)?;
    call.charge(Bill::new(model, Usage { prompt: tokens, ..Usage::default() }, false), None);
    let rows: Vec<String> = inputs.iter().enumerate().map(|(index, input)| row(index, input, dimensions, base64)).collect();
    let usage = if script.no_usage { String::new() } else { format!(r#","usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}"#) };
    let text = format!(
        r#"{{"object":"list","data":[{}],"model":"{}"{usage}{}}}"#,
        rows.join(","),
        model.snapshot,
        super::response::padding(&script),
    );
    Ok(Ready::whole(text, Shape::Json, script).into())
}

fn inputs(fields: &Fields, model: &Model) -> Result<Vec<Prompt>, ApiError> {
    let value = fields.get("input").ok_or_else(|| missing("input"))?;
    let invalid =
        || ApiError::invalid("'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference.");
    let inputs = prompts::of("input", value)?.ok_or_else(invalid)?;
    if inputs.len() > MOST_INPUTS {
        let message = format!(
            "Invalid 'input': array too long. Expected an array with maximum length {MOST_INPUTS}, but got an array with length {} instead.",
            inputs.len()
        );
        return Err(ApiError::invalid(message).param("input").code("array_above_max_length"));
    }
    if let Some(long) = inputs.iter().find(|input| input.tokens > model.context) {
        let (context, tokens) = (model.context, long.tokens);
        return Err(ApiError::invalid(format!(
            "This model's maximum context length is {context} tokens, however you requested {tokens} tokens ({tokens} in your prompt; \
             0 for the completion). Please reduce your prompt; or completion length."
        )));
    }
    let total: u64 = inputs.iter().map(|input| input.tokens).sum();
    if total > MOST_TOKENS {
        let message = format!("Requested {total} tokens, max {MOST_TOKENS} tokens per request");
        return Err(ApiError::new(400, "max_tokens_per_request", message).code("max_tokens_per_request"));
    }
    Ok(inputs)
}

fn dimensions(fields: &Fields, model: &Model) -> Result<u64, ApiError> {
    let most = match model.kind {
        Kind::Embedding { dimensions } => dimensions,
        _ => 1,
    };
    Ok(integer(fields, "dimensions", 1, most)?.unwrap_or(most))
}

fn row(index: usize, input: &Prompt, dimensions: u64, base64: bool) -> String {
    let vector = vector(input, dimensions);
    let embedding = if base64 {
        let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
        format!("\"{}\"", STANDARD.encode(bytes))
    } else {
        let numbers: Vec<String> = vector.iter().map(f32::to_string).collect();
        format!("[{}]", numbers.join(","))
    };
    format!(r#"{{"object":"embedding","index":{index},"embedding":{embedding}}}"#)
}

/// A direction that depends on the text alone.
#[allow(clippy::float_arithmetic, clippy::cast_possible_truncation, reason = "a vector has floats; no money is counted here")]
pub fn vector(input: &Prompt, dimensions: u64) -> Vec<f32> {
    // FNV-1a for the start, splitmix64 for the rest.
    let hash = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let mut state = input.text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ input.tokens, hash);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // 16 bits, never all equal to the middle: the length can't be zero.
        f64::from(u16::try_from(word >> 48).unwrap_or(0)) - 32_767.5
    };
    let raw: Vec<f64> = (0..dimensions).map(|_| next()).collect();
    let length = raw.iter().map(|number| number * number).sum::<f64>().sqrt();
    raw.iter().map(|number| (number / length) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(text: &str) -> Prompt {
        Prompt { text: text.into(), tokens: 1 }
    }

    #[test]
    #[allow(clippy::float_arithmetic, reason = "lengths of vectors")]
    fn vectors_have_length_one_and_depend_on_the_text() {
        for dimensions in [1, 3, 256, 1536] {
            let made = vector(&prompt("a"), dimensions);
            let length: f32 = made.iter().map(|number| number * number).sum();
            assert!((length - 1.0).abs() < 1e-4, "{dimensions}: {length}");
            assert_eq!(made, vector(&prompt("a"), dimensions));
        }
        assert_ne!(vector(&prompt("a"), 8), vector(&prompt("b"), 8));
    }

    #[test]
    fn both_encodings_hold_the_same_numbers() -> Result<(), Box<dyn std::error::Error>> {
        let (plain, packed) = (row(0, &prompt("a"), 4, false), row(0, &prompt("a"), 4, true));
        let plain: serde_json::Value = serde_json::from_str(&plain)?;
        let packed: serde_json::Value = serde_json::from_str(&packed)?;
        let bytes = STANDARD.decode(packed["embedding"].as_str().unwrap_or_default())?;
        let unpacked: Vec<f32> = bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap_or_default())).collect();
        let numbers: Vec<f32> = serde_json::from_value(plain["embedding"].clone())?;
        assert_eq!(numbers, unpacked);
        Ok(())
    }
}
