//! The messages of the API, and proto3's reading of JSON: every field is known, by either of its names, or refused.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};

use super::error::{self, JSON};
use crate::provider::ApiError;

#[derive(Debug)]
pub enum Kind {
    Text,
    Bytes,
    Flag,
    /// A whole number, also as a text.
    Int,
    Number,
    /// One of these words, in capitals or small letters.
    Word(&'static [&'static str]),
    /// Any JSON.
    Any,
    /// Any JSON object.
    Struct,
    Of(&'static Message),
    Many(&'static Kind),
    /// A field for each name.
    Map(&'static Kind),
}

/// A message and its fields by their JSON names.
#[derive(Debug)]
pub struct Message(pub &'static [(&'static str, Kind)]);

pub static GENERATE: Message = Message(&[
    ("model", Kind::Text),
    ("contents", Kind::Many(&Kind::Of(&CONTENT))),
    ("systemInstruction", Kind::Of(&CONTENT)),
    ("tools", Kind::Many(&Kind::Of(&TOOL))),
    ("toolConfig", Kind::Of(&TOOL_CONFIG)),
    ("safetySettings", Kind::Many(&Kind::Of(&SAFETY))),
    ("generationConfig", Kind::Of(&CONFIG)),
    ("cachedContent", Kind::Text),
    ("serviceTier", Kind::Text),
    ("store", Kind::Flag),
    ("labels", Kind::Map(&Kind::Text)),
]);

pub static COUNT: Message = Message(&[("contents", Kind::Many(&Kind::Of(&CONTENT))), ("generateContentRequest", Kind::Of(&GENERATE))]);

pub static EMBED: Message = Message(&[
    ("model", Kind::Text),
    ("content", Kind::Of(&CONTENT)),
    ("taskType", Kind::Word(TASKS)),
    ("title", Kind::Text),
    ("outputDimensionality", Kind::Int),
]);

pub static BATCH_EMBED: Message = Message(&[("requests", Kind::Many(&Kind::Of(&EMBED)))]);

static CONTENT: Message = Message(&[("role", Kind::Text), ("parts", Kind::Many(&Kind::Of(&PART)))]);

static PART: Message = Message(&[
    ("text", Kind::Text),
    ("inlineData", Kind::Of(&BLOB)),
    ("fileData", Kind::Of(&Message(&[("mimeType", Kind::Text), ("fileUri", Kind::Text)]))),
    ("functionCall", Kind::Of(&Message(&[("id", Kind::Text), ("name", Kind::Text), ("args", Kind::Struct)]))),
    ("functionResponse", Kind::Of(&FUNCTION_RESPONSE)),
    ("executableCode", Kind::Of(&Message(&[("id", Kind::Text), ("language", Kind::Text), ("code", Kind::Text)]))),
    ("codeExecutionResult", Kind::Of(&Message(&[("id", Kind::Text), ("outcome", Kind::Text), ("output", Kind::Text)]))),
    ("thought", Kind::Flag),
    ("thoughtSignature", Kind::Bytes),
    ("videoMetadata", Kind::Of(&Message(&[("startOffset", Kind::Text), ("endOffset", Kind::Text), ("fps", Kind::Number)]))),
    ("mediaResolution", Kind::Any),
    ("partMetadata", Kind::Struct),
]);

static BLOB: Message = Message(&[("mimeType", Kind::Text), ("data", Kind::Bytes)]);

static FUNCTION_RESPONSE: Message = Message(&[
    ("id", Kind::Text),
    ("name", Kind::Text),
    ("response", Kind::Struct),
    ("parts", Kind::Many(&Kind::Any)),
    ("willContinue", Kind::Flag),
    ("scheduling", Kind::Text),
]);

static TOOL: Message = Message(&[
    ("functionDeclarations", Kind::Many(&Kind::Of(&DECLARATION))),
    ("googleSearch", Kind::Struct),
    ("googleSearchRetrieval", Kind::Struct),
    ("googleMaps", Kind::Struct),
    ("codeExecution", Kind::Struct),
    ("urlContext", Kind::Struct),
    ("computerUse", Kind::Struct),
    ("fileSearch", Kind::Struct),
    ("mcpServers", Kind::Many(&Kind::Struct)),
]);

static DECLARATION: Message = Message(&[
    ("name", Kind::Text),
    ("description", Kind::Text),
    ("behavior", Kind::Text),
    ("parameters", Kind::Of(&SCHEMA)),
    ("parametersJsonSchema", Kind::Any),
    ("response", Kind::Of(&SCHEMA)),
    ("responseJsonSchema", Kind::Any),
]);

static TOOL_CONFIG: Message = Message(&[
    (
        "functionCallingConfig",
        Kind::Of(&Message(&[
            ("mode", Kind::Word(&["MODE_UNSPECIFIED", "AUTO", "ANY", "NONE", "VALIDATED"])),
            ("allowedFunctionNames", Kind::Many(&Kind::Text)),
        ])),
    ),
    ("retrievalConfig", Kind::Struct),
    ("includeServerSideToolInvocations", Kind::Flag),
]);

static SAFETY: Message = Message(&[("category", Kind::Word(CATEGORIES)), ("threshold", Kind::Word(THRESHOLDS))]);

static CONFIG: Message = Message(&[
    ("stopSequences", Kind::Many(&Kind::Text)),
    ("responseMimeType", Kind::Text),
    ("responseSchema", Kind::Of(&SCHEMA)),
    ("responseJsonSchema", Kind::Any),
    ("responseModalities", Kind::Many(&Kind::Word(&["MODALITY_UNSPECIFIED", "TEXT", "IMAGE", "AUDIO"]))),
    ("candidateCount", Kind::Int),
    ("maxOutputTokens", Kind::Int),
    ("temperature", Kind::Number),
    ("topP", Kind::Number),
    ("topK", Kind::Number),
    ("seed", Kind::Int),
    ("presencePenalty", Kind::Number),
    ("frequencyPenalty", Kind::Number),
    ("responseLogprobs", Kind::Flag),
    ("logprobs", Kind::Int),
    ("enableEnhancedCivicAnswers", Kind::Flag),
    ("speechConfig", Kind::Struct),
    ("thinkingConfig", Kind::Of(&THINKING)),
    ("imageConfig", Kind::Struct),
    ("mediaResolution", Kind::Text),
]);

static THINKING: Message = Message(&[
    ("includeThoughts", Kind::Flag),
    ("thinkingBudget", Kind::Int),
    ("thinkingLevel", Kind::Word(&["THINKING_LEVEL_UNSPECIFIED", "MINIMAL", "LOW", "MEDIUM", "HIGH", "XHIGH"])),
]);

/// A subset of OpenAPI's: `additionalProperties`, `$ref` and `$defs` are not in it.
static SCHEMA: Message = Message(&[
    ("type", Kind::Word(&["TYPE_UNSPECIFIED", "STRING", "NUMBER", "INTEGER", "BOOLEAN", "ARRAY", "OBJECT", "NULL"])),
    ("format", Kind::Text),
    ("title", Kind::Text),
    ("description", Kind::Text),
    ("nullable", Kind::Flag),
    ("enum", Kind::Many(&Kind::Text)),
    ("items", Kind::Of(&SCHEMA)),
    ("minItems", Kind::Int),
    ("maxItems", Kind::Int),
    ("properties", Kind::Map(&Kind::Of(&SCHEMA))),
    ("required", Kind::Many(&Kind::Text)),
    ("minProperties", Kind::Int),
    ("maxProperties", Kind::Int),
    ("minimum", Kind::Number),
    ("maximum", Kind::Number),
    ("minLength", Kind::Int),
    ("maxLength", Kind::Int),
    ("pattern", Kind::Text),
    ("example", Kind::Any),
    ("anyOf", Kind::Many(&Kind::Of(&SCHEMA))),
    ("propertyOrdering", Kind::Many(&Kind::Text)),
    ("default", Kind::Any),
]);

const TASKS: &[&str] = &[
    "TASK_TYPE_UNSPECIFIED",
    "RETRIEVAL_QUERY",
    "RETRIEVAL_DOCUMENT",
    "SEMANTIC_SIMILARITY",
    "CLASSIFICATION",
    "CLUSTERING",
    "QUESTION_ANSWERING",
    "FACT_VERIFICATION",
    "CODE_RETRIEVAL_QUERY",
];
const CATEGORIES: &[&str] = &[
    "HARM_CATEGORY_HARASSMENT",
    "HARM_CATEGORY_HATE_SPEECH",
    "HARM_CATEGORY_SEXUALLY_EXPLICIT",
    "HARM_CATEGORY_DANGEROUS_CONTENT",
    "HARM_CATEGORY_CIVIC_INTEGRITY",
];
const THRESHOLDS: &[&str] =
    &["HARM_BLOCK_THRESHOLD_UNSPECIFIED", "BLOCK_LOW_AND_ABOVE", "BLOCK_MEDIUM_AND_ABOVE", "BLOCK_ONLY_HIGH", "BLOCK_NONE", "OFF"];

/// A body as `message`, its fields by their JSON names; all that is wrong is told at once.
pub fn read(body: &[u8], message: &'static Message) -> Result<Value, ApiError> {
    let unreadable = |error: serde_json::Error| error::invalid(format!("Invalid JSON payload received. {error}")).param(JSON);
    let given: Value = serde_json::from_slice(body).map_err(unreadable)?;
    let mut problems = Vec::new();
    let read = of_message(&given, message, "", &mut problems);
    if problems.is_empty() { Ok(read) } else { Err(error::invalid(problems.join("\n")).param(JSON)) }
}

fn of_message(given: &Value, message: &Message, place: &str, problems: &mut Vec<String>) -> Value {
    let Value::Object(fields) = given else {
        problems.push(wrong(place, "message", given));
        return Value::Null;
    };
    let mut read = Map::new();
    for (name, value) in fields {
        let Some((known, kind)) = message.0.iter().find(|(known, _)| name == known || *name == snake(known)) else {
            let at = if place.is_empty() { String::new() } else { format!(" at '{place}'") };
            problems.push(format!("Invalid JSON payload received. Unknown name \"{name}\"{at}: Cannot find field."));
            continue;
        };
        let inside = if place.is_empty() { snake(known) } else { format!("{place}.{}", snake(known)) };
        // Null is as good as absent.
        if !value.is_null() {
            let value = of_kind(value, kind, &inside, problems);
            if read.insert((*known).to_owned(), value).is_some() {
                problems.push(format!("Invalid value at '{inside}', field is already set."));
            }
        }
    }
    Value::Object(read)
}

fn of_kind(given: &Value, kind: &Kind, place: &str, problems: &mut Vec<String>) -> Value {
    let mut refuse = |what: &str| {
        problems.push(wrong(place, what, given));
        Value::Null
    };
    match kind {
        Kind::Any => given.clone(),
        Kind::Struct if given.is_object() => given.clone(),
        Kind::Struct => refuse("type.googleapis.com/google.protobuf.Struct"),
        Kind::Text if given.is_string() => given.clone(),
        Kind::Text => refuse("TYPE_STRING"),
        Kind::Flag if given.is_boolean() => given.clone(),
        Kind::Flag => refuse("TYPE_BOOL"),
        Kind::Bytes if given.as_str().is_some_and(is_base64) => given.clone(),
        Kind::Bytes => refuse("TYPE_BYTES"),
        Kind::Int => whole(given).map_or_else(|| refuse("TYPE_INT32"), Value::from),
        Kind::Number => {
            let number = given.as_f64().or_else(|| given.as_str()?.parse().ok());
            number.map_or_else(|| refuse("TYPE_FLOAT"), Value::from)
        }
        Kind::Word(words) => {
            let word = given.as_str().map(str::to_ascii_uppercase).filter(|word| words.contains(&word.as_str()));
            word.map_or_else(|| refuse("TYPE_ENUM"), Value::String)
        }
        Kind::Of(message) => of_message(given, message, place, problems),
        Kind::Many(kind) => match given {
            Value::Array(items) => {
                let items = items.iter().enumerate();
                Value::Array(items.map(|(at, item)| of_kind(item, kind, &format!("{place}[{at}]"), problems)).collect())
            }
            // One alone is as good as a list of one.
            one => Value::Array(vec![of_kind(one, kind, &format!("{place}[0]"), problems)]),
        },
        Kind::Map(kind) => match given {
            Value::Object(fields) => {
                let field =
                    |(name, value): (&String, &Value)| (name.clone(), of_kind(value, kind, &format!("{place}[{name}].value"), problems));
                Value::Object(fields.iter().map(field).collect())
            }
            _ => refuse("TYPE_MESSAGE"),
        },
    }
}

fn wrong(place: &str, kind: &str, given: &Value) -> String {
    match given {
        Value::Object(_) if kind != "message" => {
            format!("Invalid JSON payload received. Unknown name \"\" at '{place}': Proto field is not repeating, cannot start list.")
        }
        _ => format!("Invalid value at '{place}' ({kind}), {given}"),
    }
}

fn whole(given: &Value) -> Option<i64> {
    let number = given.as_i64().or_else(|| given.as_str()?.parse().ok());
    // A number with a fraction of zero is whole as well.
    number.or_else(|| given.as_f64().filter(|number| number.fract() == 0.0).and_then(|number| format!("{number:.0}").parse().ok()))
}

/// Base64 of either alphabet, with or without its padding.
pub fn is_base64(text: &str) -> bool {
    decoded(text).is_some()
}

pub fn decoded(text: &str) -> Option<Vec<u8>> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let standard = GeneralPurpose::new(&base64::alphabet::STANDARD, lenient);
    let url_safe = GeneralPurpose::new(&base64::alphabet::URL_SAFE, lenient);
    STANDARD.decode(text).or_else(|_| URL_SAFE.decode(text)).or_else(|_| standard.decode(text)).or_else(|_| url_safe.decode(text)).ok()
}

/// `maxOutputTokens` as `max_output_tokens`.
fn snake(name: &str) -> String {
    name.chars().fold(String::with_capacity(name.len() + 4), |mut made, char| {
        if char.is_ascii_uppercase() {
            made.push('_');
        }
        made.push(char.to_ascii_lowercase());
        made
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(body: &Value) -> String {
        read(body.to_string().as_bytes(), &GENERATE).err().map(|error| error.message).unwrap_or_default()
    }

    #[test]
    fn both_names_of_a_field_are_one_and_one_alone_is_a_list() -> Result<(), ApiError> {
        let camel = json!({"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": "eA=="}}]}],
                           "generationConfig": {"maxOutputTokens": 5, "thinkingConfig": {"thinkingLevel": "LOW"}}});
        let snake = json!({"contents": {"parts": {"inline_data": {"mime_type": "image/png", "data": "eA=="}}},
                           "generation_config": {"max_output_tokens": "5", "thinking_config": {"thinking_level": "low"}}});
        assert_eq!(read(camel.to_string().as_bytes(), &GENERATE)?, camel);
        assert_eq!(read(snake.to_string().as_bytes(), &GENERATE)?, camel);
        Ok(())
    }

    #[test]
    fn what_is_not_known_is_named_where_it_stands() {
        let unknown = refusal(&json!({"contents": [{"foo": 1, "parts": [{"text": "a", "bar": 2}]}], "messages": []}));
        let expected = [
            "Invalid JSON payload received. Unknown name \"foo\" at 'contents[0]': Cannot find field.",
            "Invalid JSON payload received. Unknown name \"bar\" at 'contents[0].parts[0]': Cannot find field.",
            "Invalid JSON payload received. Unknown name \"messages\": Cannot find field.",
        ];
        assert!(expected.iter().all(|line| unknown.contains(line)), "{unknown}");
        let parameters = json!({"type": "object", "properties": {"a": {"type": "string", "$ref": "#"}}, "additionalProperties": false});
        let schema = refusal(&json!({"tools": [{"functionDeclarations": [{"name": "a", "parameters": parameters}]}]}));
        assert!(schema.contains("Unknown name \"additionalProperties\" at 'tools[0].function_declarations[0].parameters'"), "{schema}");
        assert!(schema.contains("parameters.properties[a].value'"), "{schema}");
        assert!(
            refusal(&json!({"generationConfig": {"maxOutputTokens": "x"}}))
                .contains("'generation_config.max_output_tokens' (TYPE_INT32), \"x\"")
        );
        assert!(refusal(&json!({"toolConfig": {"functionCallingConfig": {"mode": "auto!"}}})).contains("TYPE_ENUM"));
    }
}
