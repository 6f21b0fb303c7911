//! Messages and the events they are streamed in.

use serde_json::Value;

use super::history::signature;
use crate::answer::{Answer, Choice, Finish, Shown, call_overhead};
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::Usage;
use crate::openai::response::padding;
use crate::text::quoted;

/// What the parts of one response repeat.
pub struct Head<'a> {
    pub id: &'a str,
    pub model: &'static str,
}

pub fn buffered(head: &Head, answer: &Answer, directive: &Directive) -> Vec<Frame> {
    let Some(choice) = answer.choices.first() else { return Vec::new() };
    let mut blocks = Vec::new();
    if answer.shown != Shown::No {
        let (thought, signature) = (quoted(answer.thoughts.as_str()), signature(answer.thoughts.as_str()));
        blocks.push(format!(r#"{{"type":"thinking","thinking":{thought},"signature":"{signature}"}}"#));
    }
    if !choice.text.as_str().is_empty() {
        blocks.push(format!(r#"{{"type":"text","text":{}}}"#, quoted(choice.text.as_str())));
    }
    for call in &choice.calls {
        // Arguments cut by the limit aren't JSON any more.
        let object = serde_json::from_str::<Value>(call.args.as_str()).is_ok_and(|value| value.is_object());
        let (id, name) = (format!("toolu_{}", call.id), quoted(&call.name));
        let input = if object { call.args.as_str() } else { "{}" };
        blocks.push(format!(r#"{{"type":"tool_use","id":"{id}","name":{name},"input":{input}}}"#));
    }
    let usage = if directive.no_usage { String::new() } else { format!(r#","usage":{}"#, usage(&answer.usage, answer.usage.completion)) };
    let body = format!(
        r#"{{"model":"{}","id":"{}","type":"message","role":"assistant","content":[{}],{}{usage}{}}}"#,
        head.model,
        head.id,
        blocks.join(","),
        stop(choice),
        padding(directive),
    );
    let mut frames = Frames::default();
    frames.push_delta(body, choice.visible);
    frames.into_vec()
}

pub fn stream(head: &Head, answer: &Answer, directive: &Directive, per_delta: usize) -> Vec<Frame> {
    let Some(choice) = answer.choices.first() else { return Vec::new() };
    let with_usage = |text: String| if directive.no_usage { String::new() } else { text };
    let mut frames = Frames::default();
    let first = with_usage(format!(r#","usage":{}"#, usage(&answer.usage, answer.usage.completion.min(1))));
    frames.push(event(
        "message_start",
        &format!(
            r#","message":{{"model":"{}","id":"{}","type":"message","role":"assistant","content":[],"stop_reason":null,"stop_sequence":null{first}}}"#,
            head.model, head.id
        ),
    ));
    frames.push(event("ping", ""));
    content_events(&mut frames, answer, choice, padding(directive), per_delta);
    let last = with_usage(format!(
        r#","usage":{{"input_tokens":{},"cache_creation_input_tokens":{},"cache_read_input_tokens":{},"output_tokens":{}}}"#,
        answer.usage.fresh(),
        answer.usage.cache_write,
        answer.usage.cache_read,
        answer.usage.completion
    ));
    frames.push(event("message_delta", &format!(r#","delta":{{{}}}{last}"#, stop(choice))));
    frames.push(event("message_stop", ""));
    frames.into_vec()
}

fn content_events(frames: &mut Frames, answer: &Answer, choice: &Choice, mut extra: String, per_delta: usize) {
    let mut index = 0;
    let start = |index: u64, block: &str| event("content_block_start", &format!(r#","index":{index},"content_block":{block}"#));
    let mut delta = |index: u64, delta: &str| {
        let text = event("content_block_delta", &format!(r#","index":{index},"delta":{delta}{extra}"#));
        extra.clear();
        text
    };
    let end = |index: u64| event("content_block_stop", &format!(r#","index":{index}"#));
    if answer.shown != Shown::No {
        frames.push(start(index, r#"{"type":"thinking","thinking":"","signature":""}"#));
        for (piece, _) in answer.thoughts.deltas(per_delta) {
            // Hidden tokens are charged before the first visible one.
            frames.push_delta(delta(index, &format!(r#"{{"type":"thinking_delta","thinking":{}}}"#, quoted(piece))), 0);
        }
        let signature = signature(answer.thoughts.as_str());
        frames.push(delta(index, &format!(r#"{{"type":"signature_delta","signature":"{signature}"}}"#)));
        frames.push(end(index));
        index += 1;
    }
    if choice.text.tokens() > 0 {
        frames.push(start(index, r#"{"type":"text","text":""}"#));
        for (piece, tokens) in choice.text.deltas(per_delta) {
            let piece = quoted(piece);
            frames.push_delta(delta(index, &format!(r#"{{"type":"text_delta","text":{piece}}}"#)), tokens);
        }
        frames.push(end(index));
        index += 1;
    }
    for call in &choice.calls {
        let (id, name) = (format!("toolu_{}", call.id), quoted(&call.name));
        frames.push_delta(start(index, &format!(r#"{{"type":"tool_use","id":"{id}","name":{name},"input":{{}}}}"#)), call_overhead());
        let json = |piece: &str| format!(r#"{{"type":"input_json_delta","partial_json":{}}}"#, quoted(piece));
        frames.push(delta(index, &json("")));
        for (piece, tokens) in call.args.deltas(per_delta) {
            frames.push_delta(delta(index, &json(piece)), tokens);
        }
        frames.push(end(index));
        index += 1;
    }
}

fn event(name: &str, rest: &str) -> String {
    format!("event: {name}\ndata: {{\"type\":\"{name}\"{rest}}}\n\n")
}

fn stop(choice: &Choice) -> String {
    let (reason, sequence) = match &choice.finish {
        Finish::Done => ("end_turn", "null".to_owned()),
        Finish::Length => ("max_tokens", "null".to_owned()),
        Finish::Tools => ("tool_use", "null".to_owned()),
        Finish::Named(reason) => (reason.as_str(), "null".to_owned()),
        Finish::Blocked(_) => ("refusal", "null".to_owned()),
        Finish::Sequence(sequence) => ("stop_sequence", quoted(sequence)),
    };
    format!(r#""stop_reason":"{reason}","stop_sequence":{sequence}"#)
}

fn usage(usage: &Usage, output: u64) -> String {
    format!(
        r#"{{"input_tokens":{},"cache_creation_input_tokens":{written},"cache_read_input_tokens":{},"cache_creation":{{"ephemeral_5m_input_tokens":{written},"ephemeral_1h_input_tokens":0}},"output_tokens":{output},"service_tier":"standard","inference_geo":"not_available"}}"#,
        usage.fresh(),
        usage.cache_read,
        written = usage.cache_write,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{compose, tests::asked};
    use crate::provider::Provider;

    const HEAD: Head = Head { id: "msg_1", model: "claude-haiku-4-5-20251001" };

    #[test]
    fn a_stream_reads_exactly_like_this() -> Result<(), &'static str> {
        let script = Directive { tokens: Some(2), cache_read: Some(10), ..Directive::default() };
        let answer = compose(&asked(Provider::Anthropic, "claude-haiku-4-5").ok_or("model")?, &script, "", false);
        let text: String =
            stream(&HEAD, &answer, &script, 3).iter().map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned()).collect();
        let expected = concat!(
            "event: message_start\n",
            r#"data: {"type":"message_start","message":{"model":"claude-haiku-4-5-20251001","id":"msg_1","type":"message","role":"assistant","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":20,"cache_creation_input_tokens":0,"cache_read_input_tokens":10,"cache_creation":{"ephemeral_5m_input_tokens":0,"ephemeral_1h_input_tokens":0},"output_tokens":1,"service_tier":"standard","inference_geo":"not_available"}}}"#,
            "\n\nevent: ping\ndata: {\"type\":\"ping\"}\n\n",
            "event: content_block_start\n",
            r#"data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            "\n\nevent: content_block_delta\n",
            r#"data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"the calm"}}"#,
            "\n\nevent: content_block_stop\n",
            r#"data: {"type":"content_block_stop","index":0}"#,
            "\n\nevent: message_delta\n",
            r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":20,"cache_creation_input_tokens":0,"cache_read_input_tokens":10,"output_tokens":2}}"#,
            "\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
        );
        assert_eq!(text, expected);
        Ok(())
    }

    #[test]
    fn a_call_cut_by_the_limit_still_has_an_object_as_input() -> Result<(), &'static str> {
        let mut request = asked(Provider::Anthropic, "claude-haiku-4-5").ok_or("model")?;
        request.tools = vec!["look".into()];
        request.limit = 6;
        let script = Directive::parse("tool=look args={\"city\":\"Paris\"}").map_err(|_| "directive")?;
        let answer = compose(&request, &script, "", false);
        let frames = buffered(&HEAD, &answer, &script);
        let body: Value = frames.first().and_then(|frame| serde_json::from_slice(&frame.bytes).ok()).ok_or("not JSON")?;
        assert_eq!(body.pointer("/stop_reason"), Some(&Value::from("max_tokens")));
        assert_eq!(body.pointer("/content/0/input"), Some(&serde_json::json!({})));
        assert_eq!(body.pointer("/usage/output_tokens"), Some(&Value::from(6)));
        Ok(())
    }
}
