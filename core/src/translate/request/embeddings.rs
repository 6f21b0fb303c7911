//! Writes OpenAI's embeddings as Gemini's batchEmbedContents.

use super::{Problems, Terms};
use crate::translate::doc::{Kind, Value};
use crate::translate::write::Writer;

/// As many as OpenAI takes at once (API reference, embeddings, `input`).
const MAX_TEXTS: usize = 2_048;

pub fn write(root: Value<'_>, terms: &Terms<'_>, p: &mut Problems) -> String {
    // The answer is given in whatever format is asked for, by the answering side.
    let [input, dimensions, format] = p.fields(root, format_args!(""), ["input", "dimensions", "encoding_format"], &["model", "user"]);
    if format.is_some_and(|format| !format.is("float") && !format.is("base64")) {
        p.invalid("encoding_format", "must be float or base64");
    }
    let dimensions = p.count(dimensions, 1, "dimensions");
    let texts: Vec<Value<'_>> = match input.map(|input| (input, input.kind())) {
        Some((text, Kind::Str)) => vec![text],
        Some((list, Kind::Array)) => {
            list.items().enumerate().filter_map(|(i, item)| if is_text(item, i, p) { Some(item) } else { None }).collect()
        }
        _ => Vec::new(),
    };
    if texts.is_empty() {
        p.invalid("input", "must be a string or a list of strings");
    }
    if texts.len() > MAX_TEXTS {
        // Each would be written with its model's name.
        p.invalid("input", format_args!("must be at most {MAX_TEXTS} texts"));
        return String::new();
    }
    let model = terms.model.strip_prefix("models/").unwrap_or(terms.model);
    let model = format!("models/{model}");
    let mut w = Writer::with_capacity(input.map_or(0, |input| input.raw().len()) + texts.len() * (model.len() + 64));
    w.object(|w| {
        w.key("requests").array(|w| {
            for text in texts {
                w.object(|w| {
                    w.key("model").str(&model);
                    w.key("content").object(|w| w.key("parts").array(|w| w.object(|w| w.key("text").value(text))));
                    if let Some(dimensions) = dimensions {
                        w.key("outputDimensionality").number(dimensions);
                    }
                });
            }
        });
    });
    w.into_string()
}

/// Tokens are of OpenAI's making: nobody else can read them. A request half of which is left out is none, so that they are an
/// error even where the route leaves things out.
fn is_text(item: Value<'_>, i: usize, p: &mut Problems) -> bool {
    match item.kind() {
        Kind::Str => return true,
        Kind::Number | Kind::Array => {
            let why = "it takes texts, not tokens".to_owned();
            p.keep(super::Untranslatable::Unsupported("input".to_owned(), why));
        }
        _ => p.invalid(format_args!("input[{i}]"), "must be a string"),
    }
    false
}
