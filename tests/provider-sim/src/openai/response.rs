//! Chat completions and their chunks.

use crate::answer::{Answer, Choice, Finish, call_overhead};
use crate::azure;
use crate::compatible::Flavour;
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::Usage;
use crate::provider::Provider;
use crate::text::quoted;

/// What every part of one response repeats.
pub struct Head<'a> {
    pub id: &'a str,
    pub created: u64,
    pub model: &'static str,
    pub provider: Provider,
    pub flavour: Flavour,
}

impl Head<'_> {
    /// What OpenAI says of how it was served.
    fn service(&self) -> &'static str {
        match self.provider {
            Provider::Openai => concat!(r#""service_tier":"default","#, r#""system_fingerprint":"fp_51db84afab""#),
            _ => r#""system_fingerprint":"fp_51db84afab""#,
        }
    }

    /// What a choice says besides.
    fn filtered(&self) -> String {
        if self.provider == Provider::Azure { format!(r#","content_filter_results":{}"#, azure::PASSED) } else { String::new() }
    }

    /// Usage comes with the last choice, as DeepSeek has it, instead of after it.
    fn joins_usage(&self) -> bool {
        self.provider == Provider::Compatible && self.flavour == Flavour::Plain
    }
}

pub fn buffered(head: &Head, answer: &Answer, directive: &Directive) -> Vec<Frame> {
    let choices: Vec<String> =
        answer.choices.iter().enumerate().map(|(i, choice)| whole_choice(head, i, choice, answer.thoughts.as_str())).collect();
    let usage = if directive.no_usage { String::new() } else { format!(r#","usage":{}"#, usage(&answer.usage)) };
    let azure = head.provider == Provider::Azure;
    let filtered = if azure { format!(r#","prompt_filter_results":{}"#, azure::PROMPT_PASSED) } else { String::new() };
    let body = format!(
        r#"{{"id":"{}","object":"chat.completion","created":{},"model":"{}","choices":[{}]{usage},{}{filtered}{}}}"#,
        head.id,
        head.created,
        head.model,
        choices.join(","),
        head.service(),
        padding(directive),
    );
    let mut frames = Frames::default();
    frames.push_delta(body, answer.usage.completion - answer.usage.reasoning);
    frames.into_vec()
}

fn whole_choice(head: &Head, index: usize, choice: &Choice, thoughts: &str) -> String {
    let calls: Vec<String> = choice
        .calls
        .iter()
        .map(|call| {
            format!(
                r#"{{"id":"call_{}","type":"function","function":{{"name":{},"arguments":{}}}}}"#,
                call.id,
                quoted(&call.name),
                quoted(call.args.as_str()),
            )
        })
        .collect();
    let content = content(choice);
    let calls = if calls.is_empty() { String::new() } else { format!(r#","tool_calls":[{}]"#, calls.join(",")) };
    let others = match head.provider {
        Provider::Compatible if thoughts.is_empty() => String::new(),
        Provider::Compatible => format!(r#","reasoning_content":{}"#, quoted(thoughts)),
        _ => r#","refusal":null,"annotations":[]"#.into(),
    };
    format!(
        r#"{{"index":{index},"message":{{"role":"assistant","content":{content}{calls}{others}}},"logprobs":null,"finish_reason":"{}"{}}}"#,
        finish(choice),
        head.filtered(),
    )
}

pub fn stream(head: &Head, answer: &Answer, directive: &Directive, include_usage: bool, per_delta: usize) -> Vec<Frame> {
    let with_usage = include_usage && !directive.no_usage;
    let (service, filtered) = (head.service(), head.filtered());
    let chunk = |choices: &str, usage: &str, extra: &str| {
        let usage = if with_usage { format!(r#","usage":{usage}"#) } else { String::new() };
        format!(
            "data: {{\"id\":\"{}\",\"object\":\"chat.completion.chunk\",\"created\":{},\"model\":\"{}\",\
             {service},\"choices\":[{choices}]{usage}{extra}}}\n\n",
            head.id, head.created, head.model
        )
    };
    let delta = |index: usize, delta: &str, finish: &str, extra: &str| {
        let choice = format!(r#"{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":{finish}{filtered}}}"#);
        chunk(&choice, "null", extra)
    };
    let mut frames = Frames::default();
    if head.provider == Provider::Azure {
        frames.push(format!(
            "data: {{\"choices\":[],\"created\":0,\"id\":\"\",\"model\":\"\",\"object\":\"\",\"prompt_filter_results\":{}}}\n\n",
            azure::PROMPT_PASSED
        ));
    }
    for (index, choice) in answer.choices.iter().enumerate() {
        let content = if choice.calls.is_empty() { "\"\"" } else { "null" };
        let refusal = if head.provider == Provider::Compatible { "" } else { r#","refusal":null"# };
        let role = format!(r#"{{"role":"assistant","content":{content}{refusal}}}"#);
        frames.push(delta(index, &role, "null", ""));
    }
    let mut extra = padding(directive);
    for (piece, _) in answer.thoughts.deltas(per_delta) {
        // Hidden tokens are charged before the first visible one.
        let thought = format!(r#"{{"content":null,"reasoning_content":{}}}"#, quoted(piece));
        frames.push_delta(delta(0, &thought, "null", ""), 0);
    }
    let mut queues: Vec<_> = answer.choices.iter().map(|choice| choice_deltas(choice, per_delta).into_iter()).collect();
    // Choices are generated side by side: their deltas come in turns.
    let mut more = true;
    while more {
        more = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            if let Some((json, tokens)) = queue.next() {
                frames.push_delta(delta(index, &json, "null", &extra), tokens);
                extra.clear();
                more = true;
            }
        }
    }
    for (index, choice) in answer.choices.iter().enumerate() {
        let last = index + 1 == answer.choices.len();
        if with_usage && last && head.joins_usage() {
            let choice = format!(r#"{{"index":{index},"delta":{{}},"logprobs":null,"finish_reason":{}}}"#, quoted(finish(choice)));
            frames.push(chunk(&choice, &usage(&answer.usage), ""));
            continue;
        }
        frames.push(delta(index, "{}", &quoted(finish(choice)), ""));
    }
    if with_usage && !head.joins_usage() {
        frames.push(chunk("", &usage(&answer.usage), ""));
    }
    frames.push("data: [DONE]\n\n".into());
    frames.into_vec()
}

fn choice_deltas(choice: &Choice, per_delta: usize) -> Vec<(String, u64)> {
    let mut deltas: Vec<(String, u64)> =
        choice.text.deltas(per_delta).map(|(piece, tokens)| (format!(r#"{{"content":{}}}"#, quoted(piece)), tokens)).collect();
    for (index, call) in choice.calls.iter().enumerate() {
        let opening = format!(
            r#"{{"tool_calls":[{{"index":{index},"id":"call_{}","type":"function","function":{{"name":{},"arguments":""}}}}]}}"#,
            call.id,
            quoted(&call.name),
        );
        deltas.push((opening, call_overhead()));
        deltas.extend(call.args.deltas(per_delta).map(|(piece, tokens)| {
            let args = quoted(piece);
            (format!(r#"{{"tool_calls":[{{"index":{index},"function":{{"arguments":{args}}}}}]}}"#), tokens)
        }));
    }
    deltas
}

fn content(choice: &Choice) -> String {
    if choice.text.as_str().is_empty() && !choice.calls.is_empty() {
        return "null".into();
    }
    quoted(choice.text.as_str())
}

fn finish(choice: &Choice) -> &str {
    match &choice.finish {
        Finish::Named(reason) => reason,
        Finish::Blocked(_) => "content_filter",
        Finish::Done | Finish::Sequence(_) => "stop",
        Finish::Length => "length",
        Finish::Tools => "tool_calls",
    }
}

pub fn usage(usage: &Usage) -> String {
    format!(
        r#"{{"prompt_tokens":{},"completion_tokens":{},"total_tokens":{},"prompt_tokens_details":{{"cached_tokens":{},"audio_tokens":0}},"completion_tokens_details":{{"reasoning_tokens":{},"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}}}"#,
        usage.prompt,
        usage.completion,
        usage.prompt + usage.completion,
        usage.cache_read,
        usage.reasoning,
    )
}

/// A field no client knows, to make a body or an event as large as a test wants it.
pub fn padding(directive: &Directive) -> String {
    directive.pad_bytes.map_or_else(String::new, |bytes| {
        let bytes = usize::try_from(bytes).unwrap_or(0);
        format!(r#","sim_padding":"{}""#, "x".repeat(bytes))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::answer::{compose, tests::asked};

    const HEAD: Head =
        Head { id: "chatcmpl-1", created: 1, model: "gpt-4o-2024-08-06", provider: Provider::Openai, flavour: Flavour::Plain };

    fn text(frames: &[Frame]) -> String {
        frames.iter().map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned()).collect()
    }

    #[test]
    fn a_stream_reads_exactly_like_this() -> Result<(), &'static str> {
        let script = Directive { tokens: Some(2), ..Directive::default() };
        let answer = compose(&asked(Provider::Openai, "gpt-4o").ok_or("model")?, &script, "", false);
        let chunk = "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\
                     \"model\":\"gpt-4o-2024-08-06\",\"service_tier\":\"default\",\
                     \"system_fingerprint\":\"fp_51db84afab\",\"choices\":[";
        let expected = [
            "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\",\"refusal\":null},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
            "{\"index\":0,\"delta\":{\"content\":\"the\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
            "{\"index\":0,\"delta\":{\"content\":\" calm\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
            "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":null}\n\n",
            "],\"usage\":{\"prompt_tokens\":30,\"completion_tokens\":2,\"total_tokens\":32,\"prompt_tokens_details\":{\"cached_tokens\":0,\"audio_tokens\":0},\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0,\"accepted_prediction_tokens\":0,\"rejected_prediction_tokens\":0}}}\n\n",
        ];
        let expected: String = expected.iter().flat_map(|rest| [chunk, rest]).chain(["data: [DONE]\n\n"]).collect();
        assert_eq!(text(&stream(&HEAD, &answer, &script, true, 1)), expected);
        let bare = text(&stream(&HEAD, &answer, &script, false, 1));
        assert!(!bare.contains("usage") && bare.ends_with("data: [DONE]\n\n"));
        Ok(())
    }

    #[test]
    fn choices_interleave_and_tokens_add_up() -> Result<(), &'static str> {
        let mut request = asked(Provider::Openai, "gpt-4o").ok_or("model")?;
        request.choices = 2;
        let answer = compose(&request, &Directive::default(), "", false);
        let frames = stream(&HEAD, &answer, &Directive::default(), false, 3);
        assert_eq!(frames.last().map(|frame| frame.produced), Some(answer.usage.completion));
        assert_eq!(answer.usage.completion, 40);
        let whole: Value = buffered(&HEAD, &answer, &Directive::default())
            .first()
            .and_then(|frame| serde_json::from_slice(&frame.bytes).ok())
            .ok_or("not JSON")?;
        assert_eq!(whole.pointer("/choices/1/index"), Some(&Value::from(1)));
        assert_ne!(whole.pointer("/choices/0/message/content"), whole.pointer("/choices/1/message/content"));
        assert_eq!(whole.pointer("/usage/completion_tokens"), Some(&Value::from(40)));
        Ok(())
    }
}
