//! The fields at the top of a request that govern, by the form of the body.

use crate::operation::Form;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Model,
    Stream,
    StreamOptions,
    MaxTokens,
    MaxCompletionTokens,
    MaxOutputTokens,
    N,
    BestOf,
    Tools,
    Messages,
    System,
    Thinking,
    ServiceTier,
    /// The items of a Responses request.
    Input,
    /// Text, a list of texts, or tokens: each answered by itself.
    Texts,
    /// The text that is spoken.
    Spoken,
    Voice,
    /// The conversation so far is at the provider: the id of an object, or an object with an id.
    History(&'static str),
    /// A prompt that is stored at the provider.
    StoredPrompt,
    Background,
    Store,
    /// A container at the provider, by id or described.
    Container,
    Size,
    Quality,
    PartialImages,
    /// How numbers are to be written.
    EncodingFormat,
    /// Present and neither null nor false: the cost has no bound that this version can tell.
    Unbounded(&'static str),
}

const CHAT: u16 = 1;
const MESSAGES: u16 = 2;
const RESPONSES: u16 = 4;
const COMPLETIONS: u16 = 8;
const TEXTS: u16 = 16;
const IMAGES: u16 = 32;
const SPEECH: u16 = 64;
const OTHER: u16 = 128;
const TALK: u16 = CHAT | MESSAGES | RESPONSES | COMPLETIONS;
const TABLE: u16 = TALK | TEXTS | IMAGES | SPEECH;

fn bit(form: Form) -> u16 {
    match form {
        Form::Chat => CHAT,
        Form::Messages | Form::Count => MESSAGES,
        Form::Responses => RESPONSES,
        Form::Completions => COMPLETIONS,
        Form::Embeddings | Form::Moderations => TEXTS,
        Form::Images => IMAGES,
        Form::Speech => SPEECH,
        Form::Other => OTHER,
    }
}

/// Name, field, forms. The names are matched after unescaping; a case variant of one is refused.
const FIELDS: &[(&str, Field, u16)] = &[
    ("model", Field::Model, TABLE | OTHER),
    ("stream", Field::Stream, TABLE),
    ("stream_options", Field::StreamOptions, TALK),
    ("max_tokens", Field::MaxTokens, TALK),
    ("max_completion_tokens", Field::MaxCompletionTokens, TALK),
    ("max_output_tokens", Field::MaxOutputTokens, TALK),
    ("n", Field::N, TALK | IMAGES),
    ("best_of", Field::BestOf, TALK),
    ("tools", Field::Tools, TALK),
    ("messages", Field::Messages, CHAT | MESSAGES),
    ("system", Field::System, CHAT | MESSAGES),
    ("thinking", Field::Thinking, TALK),
    ("service_tier", Field::ServiceTier, TABLE),
    ("input", Field::Input, RESPONSES),
    ("input", Field::Texts, TEXTS),
    ("input", Field::Spoken, SPEECH),
    ("voice", Field::Voice, SPEECH),
    ("prompt", Field::Texts, COMPLETIONS),
    ("prompt", Field::StoredPrompt, RESPONSES),
    ("prompt", Field::Unbounded("prompt"), CHAT | MESSAGES),
    ("previous_response_id", Field::History("previous_response_id"), RESPONSES),
    ("conversation", Field::History("conversation"), RESPONSES),
    ("background", Field::Background, RESPONSES),
    ("background", Field::Unbounded("background"), CHAT | MESSAGES | COMPLETIONS),
    ("store", Field::Store, CHAT | RESPONSES),
    ("container", Field::Container, TALK),
    ("size", Field::Size, IMAGES),
    ("quality", Field::Quality, IMAGES),
    ("partial_images", Field::PartialImages, IMAGES),
    ("encoding_format", Field::EncodingFormat, TEXTS),
    // Compaction is an answer of its own, paid besides.
    ("context_management", Field::Unbounded("context_management"), RESPONSES | MESSAGES),
    // What of it the model does not take over is paid as output, besides the limit.
    ("prediction", Field::Unbounded("prediction"), CHAT),
    ("web_search_options", Field::Unbounded("web_search_options"), TALK),
    ("mcp_servers", Field::Unbounded("mcp_servers"), TALK),
    ("audio", Field::Unbounded("audio"), TALK),
    ("modalities", Field::Unbounded("modalities"), TALK),
    ("models", Field::Unbounded("models"), TALK),
    ("plugins", Field::Unbounded("plugins"), TALK),
    ("speed", Field::Unbounded("speed"), TALK),
    ("inference_geo", Field::Unbounded("inference_geo"), TALK),
];

/// The field that some reader could take `key` for, with its one right name.
pub fn find(form: Form, key: &[u8]) -> Option<(&'static str, Field)> {
    let bit = bit(form);
    let fits = |name: &str| if key.is_ascii() { key.eq_ignore_ascii_case(name.as_bytes()) } else { folds_to(key, name) };
    FIELDS.iter().find(|(name, _, forms)| forms & bit != 0 && fits(name)).map(|&(name, field, _)| (name, field))
}

pub fn name_of(field: Field) -> &'static str {
    FIELDS.iter().find(|(_, f, _)| *f == field).map_or("", |(name, ..)| name)
}

/// Whether some JSON reader could take `key` for `name`: case is folded, with the two letters outside ASCII that fold
/// into it (U+017F to s, U+212A to k), as Go's encoding/json does.
pub fn folds_to(key: &[u8], name: &str) -> bool {
    if key.is_ascii() {
        return key.eq_ignore_ascii_case(name.as_bytes());
    }
    let Ok(text) = std::str::from_utf8(key) else { return false };
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    text.chars().map(fold).eq(name.chars())
}
