//! The completions of before chat.

use serde_json::Value;

use super::error;
use super::fields::{self, Fields, flag, integer};
use super::prompts::{self, Prompt};
use super::request::{include_usage, sampling, stop};
use super::response::{padding, usage};
use crate::answer::{self, Answer, Asked, Choice, Extras, Finish, Wish};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::{Kind, Model, Usage};
use crate::provider::ApiError;
use crate::text::{identifier, quoted, unix_us};
use crate::ticket::Bill;

const KNOWN: &[&str] = &[
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "model",
    "n",
    "presence_penalty",
    "prompt",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
];
const DEFAULT_LIMIT: u64 = 16;
/// What the answer calls the model: neither its alias nor its snapshot.
const SERVED_BY: &str = "gpt-3.5-turbo-instruct:20230824-v2";

struct Request {
    model: &'static Model,
    prompts: Vec<Prompt>,
    /// Answers to give and to make for each prompt.
    n: u64,
    best_of: u64,
    echo: bool,
    stream: bool,
    include_usage: bool,
    limit: u64,
    stop: Vec<String>,
}

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let request = parse(call.body)?;
    let last = request.prompts.last().map_or("", |prompt| prompt.text.as_str());
    let (script, said) = call.steer(Some(request.model), request.stream, last)?;
    let answer = composed(&request, &script, &said, call.shared().bench);
    call.admit(request.model, answer.usage.prompt + answer.usage.completion, &script)?;
    let id = identifier("cmpl-", 29);
    call.charge(Bill::new(request.model, answer.usage, request.stream), Some(&id));
    let head = format!(r#""id":"{id}","object":"text_completion","created":{},"model":"{SERVED_BY}""#, unix_us() / 1_000_000);
    if request.stream {
        let frames = stream(&head, &request, &answer, &script);
        return Ok(Ready::events(frames, script, |_| error::event(&error::server_error())).into());
    }
    Ok(Ready::new(buffered(&head, &request, &answer, &script), Shape::Json, script).into())
}

fn parse(body: &[u8]) -> Result<Request, ApiError> {
    let fields = fields::object(body)?;
    let model = fields::model(&fields, None, |kind| kind == Kind::Completion)?;
    if let Some(unknown) = fields.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(ApiError::invalid(format!("Unrecognized request argument supplied: {unknown}")));
    }
    sampling(&fields, model)?;
    let stream = flag(&fields, "stream")?.unwrap_or(false);
    let prompts = prompts(&fields)?;
    let (n, best_of) = choices(&fields, stream)?;
    let limit = integer(&fields, "max_tokens", 0, u64::MAX)?.unwrap_or(DEFAULT_LIMIT);
    if let Some(long) = prompts.iter().find(|prompt| prompt.tokens.saturating_add(limit) > model.context) {
        let (context, tokens) = (model.context, long.tokens);
        return Err(ApiError::invalid(format!(
            "This model's maximum context length is {context} tokens, however you requested {} tokens ({tokens} in your prompt; {limit} \
             for the completion). Please reduce your prompt; or completion length.",
            tokens.saturating_add(limit)
        )));
    }
    let include_usage = include_usage(&fields, stream)?;
    let echo = flag(&fields, "echo")?.unwrap_or(false);
    Ok(Request { model, prompts, n, best_of, echo, stream, include_usage, limit, stop: stop(&fields, model)? })
}

/// Without a prompt the model begins as it would a new document, which is one token.
fn prompts(fields: &Fields) -> Result<Vec<Prompt>, ApiError> {
    let empty = || vec![Prompt { text: String::new(), tokens: 1 }];
    match fields.get("prompt") {
        None | Some(Value::Null) => Ok(empty()),
        Some(value) => Ok(prompts::of("prompt", value)?.unwrap_or_else(empty)),
    }
}

fn choices(fields: &Fields, stream: bool) -> Result<(u64, u64), ApiError> {
    let n = integer(fields, "n", 1, 128)?;
    let best_of = integer(fields, "best_of", 1, 20)?;
    let (n, best_of) = (n.unwrap_or(1), best_of.unwrap_or(n.unwrap_or(1)));
    if n > best_of {
        return Err(ApiError::invalid(format!(
            "You requested that the server return more choices than it will generate (HINT: You must set 'n' (currently {n}) to be at \
             most 'best_of' (currently {best_of}), or omit either parameter if you don't specifically want to use them.)"
        )));
    }
    if stream && best_of > n {
        return Err(ApiError::invalid("Results with 'best_of' greater than 'n' cannot be streamed.").param("best_of"));
    }
    Ok((n, best_of))
}

/// All that is made; what `best_of` makes and doesn't give is paid too.
fn composed(request: &Request, script: &Directive, said: &str, bench: bool) -> Answer {
    let prompts = request.prompts.len() as u64;
    let asked = Asked {
        model: request.model,
        stream: request.stream,
        include_usage: request.include_usage,
        choices: usize::try_from(prompts * request.best_of).unwrap_or(1),
        limit: request.limit,
        stop: request.stop.clone(),
        tools: Vec::new(),
        forced_tool: None,
        prompt_tokens: request.prompts.iter().map(|prompt| prompt.tokens).sum(),
        last_user: String::new(),
        after_tools: false,
        wish: Wish::default(),
        extras: Extras::default(),
    };
    let mut answer = answer::compose(&asked, script, said, bench);
    answer.choices.truncate(usize::try_from(prompts * request.n).unwrap_or(1));
    answer
}

/// What stands before the answer, if it is to be repeated.
fn repeated(request: &Request, index: usize) -> &str {
    let prompt = usize::try_from(request.n).ok().and_then(|n| request.prompts.get(index / n));
    prompt.filter(|_| request.echo).map_or("", |prompt| prompt.text.as_str())
}

fn finish(choice: &Choice) -> &'static str {
    if choice.finish == Finish::Length { "length" } else { "stop" }
}

fn whole_usage(used: &Usage, script: &Directive) -> String {
    if script.no_usage { String::new() } else { format!(r#","usage":{}"#, usage(used)) }
}

fn buffered(head: &str, request: &Request, answer: &Answer, script: &Directive) -> Vec<Frame> {
    let choice = |(index, choice): (usize, &Choice)| {
        let text = format!("{}{}", repeated(request, index), choice.text.as_str());
        format!(r#"{{"text":{},"index":{index},"logprobs":null,"finish_reason":"{}"}}"#, quoted(&text), finish(choice))
    };
    let choices: Vec<String> = answer.choices.iter().enumerate().map(choice).collect();
    let mut frames = Frames::default();
    let text = format!(r#"{{{head},"choices":[{}]{}{}}}"#, choices.join(","), whole_usage(&answer.usage, script), padding(script));
    frames.push_delta(text, answer.usage.completion);
    frames.into_vec()
}

fn stream(head: &str, request: &Request, answer: &Answer, script: &Directive) -> Vec<Frame> {
    let with_usage = request.include_usage && !script.no_usage;
    let none = if with_usage { r#","usage":null"# } else { "" };
    let chunk = |index: usize, text: &str, finish: &str, extra: &str| {
        let text = quoted(text);
        format!(
            "data: {{{head},\"choices\":[{{\"text\":{text},\"index\":{index},\"logprobs\":null,\"finish_reason\":{finish}}}]{none}{extra}}}\n\n"
        )
    };
    let mut frames = Frames::default();
    let mut extra = padding(script);
    for (index, choice) in answer.choices.iter().enumerate() {
        let repeated = repeated(request, index);
        if !repeated.is_empty() {
            frames.push(chunk(index, repeated, "null", ""));
        }
        for (piece, tokens) in choice.text.deltas(script.deltas_of()) {
            frames.push_delta(chunk(index, piece, "null", &extra), tokens);
            extra.clear();
        }
        frames.push(chunk(index, "", &quoted(finish(choice)), ""));
    }
    if with_usage {
        frames.push(format!("data: {{{head},\"choices\":[]{}}}\n\n", whole_usage(&answer.usage, script)));
    }
    frames.push("data: [DONE]\n\n".into());
    frames.into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(body: &str, words: &str) -> Result<(Request, Answer, Directive), ApiError> {
        let script = Directive::parse(words).map_err(ApiError::invalid)?;
        let request = parse(body.as_bytes())?;
        let answer = composed(&request, &script, "", false);
        Ok((request, answer, script))
    }

    #[test]
    fn all_that_is_made_is_paid_and_less_may_be_given() -> Result<(), ApiError> {
        let body = r#"{"model":"gpt-3.5-turbo-instruct","prompt":["a","b c"],"n":2,"best_of":3,"echo":true}"#;
        let (request, answer, script) = answered(body, "tokens=5")?;
        assert_eq!((answer.choices.len(), answer.usage.prompt, answer.usage.completion), (4, 3, 30));
        let frames = buffered(r#""id":"x""#, &request, &answer, &script);
        let bytes = frames.first().map(|frame| frame.bytes.clone()).unwrap_or_default();
        let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let text = |index: usize| value.pointer(&format!("/choices/{index}/text")).and_then(Value::as_str).unwrap_or_default().to_owned();
        assert!(text(0).starts_with('a') && text(1).starts_with('a') && text(2).starts_with("b c"), "{value}");
        assert_eq!(value.pointer("/usage/total_tokens"), Some(&Value::from(33)));
        Ok(())
    }

    #[test]
    fn without_a_limit_it_is_sixteen_tokens() -> Result<(), ApiError> {
        let (_, answer, _) = answered(r#"{"model":"gpt-3.5-turbo-instruct","prompt":[1,2,3]}"#, "tokens=50")?;
        assert_eq!((answer.usage.prompt, answer.usage.completion), (3, 16));
        assert_eq!(answer.choices.first().map(finish), Some("length"));
        Ok(())
    }

    #[test]
    fn a_stream_ends_with_its_usage_when_asked() -> Result<(), ApiError> {
        let body = r#"{"model":"gpt-3.5-turbo-instruct","prompt":"a","stream":true,"stream_options":{"include_usage":true}}"#;
        let (request, answer, script) = answered(body, "tokens=4 per_delta=2")?;
        let texts: Vec<String> = stream(r#""id":"x""#, &request, &answer, &script)
            .iter()
            .map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned())
            .collect();
        assert_eq!(texts.len(), 5);
        assert!(texts.iter().take(3).all(|text| text.contains(r#""usage":null"#)), "{texts:?}");
        assert!(texts.get(3).is_some_and(|text| text.contains(r#""choices":[],"usage":{"prompt_tokens":1,"completion_tokens":4"#)));
        Ok(())
    }

    #[test]
    fn more_answers_than_are_made_can_not_be_given() {
        let refused = parse(br#"{"model":"gpt-3.5-turbo-instruct","prompt":"a","n":3,"best_of":2}"#);
        assert!(refused.err().is_some_and(|error| error.message.contains("(currently 3) to be at most 'best_of' (currently 2)")));
        let chat = parse(br#"{"model":"gpt-4o","prompt":"a"}"#).err().map(|error| error.status);
        assert_eq!(chat, Some(404));
    }
}
