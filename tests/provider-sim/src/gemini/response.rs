//! Generated contents, whole or in pieces, and what models are said to be.

use serde_json::Value;

use super::{error, history};
use crate::answer::{Answer, Call, Choice, Finish, Shown, call_overhead};
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::{Kind, Model, Usage};
use crate::openai::response::padding;
use crate::text::quoted;

/// What every part of one response repeats.
pub struct Head<'a> {
    pub id: &'a str,
    pub model: &'static str,
}

impl Head<'_> {
    /// A model of the third generation signs each answer, and gives its calls ids.
    fn signs(&self) -> bool {
        self.model.starts_with("gemini-3")
    }
}

pub fn buffered(head: &Head, answer: &Answer, directive: &Directive) -> Vec<Frame> {
    let visible: u64 = answer.choices.iter().map(|choice| choice.visible).sum();
    let candidates: Vec<String> = answer
        .choices
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            let mut parts: Vec<String> = pieces(head, answer, choice, usize::MAX).into_iter().map(|(part, _)| part).collect();
            if head.signs() && choice.calls.is_empty() && answer.usage.reasoning > 0 {
                sign_last(&mut parts);
            }
            candidate(index, &parts, Some(&choice.finish))
        })
        .collect();
    let usage = usage(&answer.usage, visible);
    let body = whole(head, answer, directive, &candidates.join(","), &usage, &padding(directive));
    let mut frames = Frames::default();
    frames.push_delta(body, visible);
    frames.into_vec()
}

/// Server-sent events; a list with the same documents if `listed`.
pub fn stream(head: &Head, answer: &Answer, directive: &Directive, per_delta: usize, listed: bool) -> Vec<Frame> {
    let mut frames = Frames::default();
    let (mut produced, mut sent) = (0, false);
    let mut push = |candidate: &str, tokens: u64| {
        produced += tokens;
        let extra = if sent { String::new() } else { padding(directive) };
        let document = whole(head, answer, directive, candidate, &usage(&answer.usage, produced), &extra);
        let text = match (listed, sent) {
            (false, _) => format!("data: {document}\r\n\r\n"),
            (true, false) => format!("[{document}"),
            (true, true) => format!(",\r\n{document}"),
        };
        sent = true;
        if tokens > 0 { frames.push_delta(text, tokens) } else { frames.push(text) }
    };
    let mut queues: Vec<_> = answer.choices.iter().map(|choice| pieces(head, answer, choice, per_delta).into_iter()).collect();
    let mut more = true;
    while more {
        more = false;
        for (index, queue) in queues.iter_mut().enumerate() {
            if let Some((part, tokens)) = queue.next() {
                push(&candidate(index, &[part], None), tokens);
                more = true;
            }
        }
    }
    for (index, choice) in answer.choices.iter().enumerate() {
        let mut last = vec![r#"{"text":""}"#.to_owned()];
        if head.signs() && choice.calls.is_empty() && answer.usage.reasoning > 0 {
            sign_last(&mut last);
        }
        let empty = choice.visible == 0 && matches!(choice.finish, Finish::Named(_));
        push(&candidate(index, if empty { &[] } else { &last }, Some(&choice.finish)), 0);
    }
    if listed {
        frames.push("]".into());
    }
    frames.into_vec()
}

/// What stands in a list in place of its second half.
pub fn failure_item() -> String {
    format!(",\r\n{}]", error::body(&error::overloaded()))
}

/// The parts of one candidate, each with the visible tokens it has. Calls are never in pieces, and one that the limit cut
/// short, whose arguments are no JSON any more, is not told.
fn pieces(head: &Head, answer: &Answer, choice: &Choice, per_delta: usize) -> Vec<(String, u64)> {
    let mut parts: Vec<(String, u64)> = Vec::new();
    if answer.shown == Shown::Whole {
        let thoughts = answer.thoughts.deltas(per_delta);
        parts.extend(thoughts.map(|(piece, _)| (format!(r#"{{"text":{},"thought":true}}"#, quoted(piece)), 0)));
    }
    parts.extend(choice.text.deltas(per_delta).map(|(piece, tokens)| (format!(r#"{{"text":{}}}"#, quoted(piece)), tokens)));
    let signed = head.signs() || answer.usage.reasoning > 0;
    for (index, call) in choice.calls.iter().enumerate() {
        let Some(args) = arguments(call) else { continue };
        let id = if head.signs() { format!(r#""id":"{}","#, call.id) } else { String::new() };
        let sign = if signed && index == 0 { format!(r#","thoughtSignature":"{}""#, history::signature(&call.id)) } else { String::new() };
        let part = format!(r#"{{"functionCall":{{{id}"name":{},"args":{args}}}{sign}}}"#, quoted(&call.name));
        parts.push((part, call_overhead() + call.args.tokens()));
    }
    parts
}

fn arguments(call: &Call) -> Option<&str> {
    serde_json::from_str::<Value>(call.args.as_str()).is_ok_and(|args| args.is_object()).then(|| call.args.as_str())
}

/// The last part brings the signature, if it is no thought itself.
fn sign_last(parts: &mut [String]) {
    if let Some(last) = parts.last_mut().filter(|part| part.ends_with('}') && !part.contains(r#""thought":true"#)) {
        last.pop();
        last.push_str(&format!(r#","thoughtSignature":"{}"}}"#, history::signature("text")));
    }
}

fn candidate(index: usize, parts: &[String], finish: Option<&Finish>) -> String {
    let content = if parts.is_empty() { String::new() } else { format!(r#""content":{{"parts":[{}],"role":"model"}},"#, parts.join(",")) };
    let finish = finish.map_or_else(String::new, |finish| format!(r#""finishReason":"{}","#, reason(finish)));
    format!(r#"{{{content}{finish}"index":{index}}}"#)
}

fn reason(finish: &Finish) -> &str {
    match finish {
        // Google has no reason of its own for calls.
        Finish::Done | Finish::Tools | Finish::Sequence(_) => "STOP",
        Finish::Length => "MAX_TOKENS",
        Finish::Named(reason) | Finish::Blocked(reason) => reason,
    }
}

fn whole(head: &Head, answer: &Answer, directive: &Directive, candidates: &str, usage: &str, extra: &str) -> String {
    let blocked = answer.choices.iter().find_map(|choice| match &choice.finish {
        Finish::Blocked(reason) => Some(reason),
        _ => None,
    });
    let said = match blocked {
        Some(reason) => format!(r#""promptFeedback":{{"blockReason":"{reason}"}}"#),
        None => format!(r#""candidates":[{candidates}]"#),
    };
    let usage = if directive.no_usage { "" } else { usage };
    format!(r#"{{{said}{usage},"modelVersion":"{}","responseId":"{}"{extra}}}"#, head.model, head.id)
}

/// `visible` are the tokens that candidates have so far; hidden ones come before them.
fn usage(usage: &Usage, visible: u64) -> String {
    let some = |name: &str, tokens: u64| if tokens == 0 { String::new() } else { format!(r#","{name}":{tokens}"#) };
    format!(
        r#","usageMetadata":{{"promptTokenCount":{}{},"totalTokenCount":{}{},"promptTokensDetails":[{{"modality":"TEXT","tokenCount":{}}}]{}}}"#,
        usage.prompt,
        some("candidatesTokenCount", visible),
        usage.prompt + visible + usage.reasoning,
        some("cachedContentTokenCount", usage.cache_read),
        usage.prompt,
        some("thoughtsTokenCount", usage.reasoning),
    )
}

/// A model as the list has it.
pub fn model(model: &Model) -> String {
    let (methods, more) = match model.kind {
        Kind::Chat => (
            r#""generateContent","countTokens","createCachedContent","batchGenerateContent""#,
            r#","temperature":1,"topP":0.95,"topK":64,"maxTemperature":2,"thinking":true"#,
        ),
        _ => (r#""embedContent","countTextTokens","countTokens","asyncBatchEmbedContent""#, ""),
    };
    format!(
        r#"{{"name":"models/{}","version":"001","displayName":"{}","description":"{}","inputTokenLimit":{},"outputTokenLimit":{},"supportedGenerationMethods":[{methods}]{more}}}"#,
        model.name,
        model.display,
        model.display,
        model.context,
        model.max_output.max(1),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::answer::{Asked, Thinking, Wish, compose, tests::asked};
    use crate::provider::Provider;

    const HEAD: Head = Head { id: "r1", model: "gemini-2.5-flash" };

    fn request(name: &str) -> Result<Asked, &'static str> {
        asked(Provider::Gemini, name).ok_or("model")
    }

    fn text(frames: &[Frame]) -> String {
        frames.iter().map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned()).collect()
    }

    #[test]
    fn a_stream_reads_exactly_like_this() -> Result<(), &'static str> {
        let script = Directive { tokens: Some(2), ..Directive::default() };
        let answer = compose(&request("gemini-2.5-flash")?, &script, "", false);
        let tail = |tokens: u64| {
            format!(
                "\"usageMetadata\":{{\"promptTokenCount\":30,\"candidatesTokenCount\":{tokens},\"totalTokenCount\":{},\
                 \"promptTokensDetails\":[{{\"modality\":\"TEXT\",\"tokenCount\":30}}]}},\"modelVersion\":\"gemini-2.5-flash\",\
                 \"responseId\":\"r1\"}}",
                30 + tokens
            )
        };
        let chunk = |text: &str, finish: &str| {
            format!("{{\"candidates\":[{{\"content\":{{\"parts\":[{{\"text\":\"{text}\"}}],\"role\":\"model\"}},{finish}\"index\":0}}],")
        };
        let documents = [chunk("the", "") + &tail(1), chunk(" calm", "") + &tail(2), chunk("", "\"finishReason\":\"STOP\",") + &tail(2)];
        let events: String = documents.iter().map(|document| format!("data: {document}\r\n\r\n")).collect();
        assert_eq!(text(&stream(&HEAD, &answer, &script, 1, false)), events);
        assert_eq!(text(&stream(&HEAD, &answer, &script, 1, true)), format!("[{}]", documents.join(",\r\n")));
        Ok(())
    }

    #[test]
    fn calls_are_whole_and_the_first_of_them_is_signed() -> Result<(), &'static str> {
        let script = Directive::parse("tool=f args={\"a\":1} tool=g args={} reasoning=9").map_err(|_| "directive")?;
        let request = Asked { tools: vec!["f".into(), "g".into()], ..request("gemini-3-pro-preview")? };
        let answer = compose(&request, &script, "", false);
        let head = Head { model: "gemini-3-pro-preview", ..HEAD };
        let body: Value = serde_json::from_str(&text(&buffered(&head, &answer, &script))).map_err(|_| "JSON")?;
        let parts = body.pointer("/candidates/0/content/parts").ok_or("parts")?;
        assert_eq!((&parts[0]["functionCall"]["name"], &parts[0]["functionCall"]["args"]), (&json!("f"), &json!({"a": 1})));
        assert!(parts[0]["thoughtSignature"].is_string() && parts[1].get("thoughtSignature").is_none());
        assert_eq!(body.pointer("/candidates/0/finishReason"), Some(&json!("STOP")));
        assert_eq!(body.pointer("/usageMetadata/thoughtsTokenCount"), Some(&json!(9)));
        let visible = answer.choices.first().map_or(0, |choice| choice.visible);
        assert_eq!(body.pointer("/usageMetadata/candidatesTokenCount"), Some(&json!(visible)));
        Ok(())
    }

    #[test]
    fn thoughts_are_parts_of_their_own_and_a_blocked_prompt_has_no_candidates() -> Result<(), &'static str> {
        let shown = Wish { thinking: Thinking::On { most: 4, shown: Shown::Whole }, ..Wish::default() };
        let script = Directive { tokens: Some(2), reasoning: Some(9), ..Directive::default() };
        let answer = compose(&Asked { wish: shown, ..request("gemini-2.5-pro")? }, &script, "", false);
        let body: Value = serde_json::from_str(&text(&buffered(&HEAD, &answer, &script))).map_err(|_| "JSON")?;
        assert_eq!(body.pointer("/candidates/0/content/parts/0/thought"), Some(&json!(true)));
        assert_eq!(body.pointer("/usageMetadata/totalTokenCount"), Some(&json!(36)));
        let script = Directive { block: Some("SAFETY".into()), ..Directive::default() };
        let answer = compose(&request("gemini-2.5-pro")?, &script, "", false);
        let body: Value = serde_json::from_str(&text(&buffered(&HEAD, &answer, &script))).map_err(|_| "JSON")?;
        assert_eq!((body.pointer("/promptFeedback/blockReason"), body.get("candidates")), (Some(&json!("SAFETY")), None));
        assert_eq!(answer.usage.completion, 0);
        Ok(())
    }
}
