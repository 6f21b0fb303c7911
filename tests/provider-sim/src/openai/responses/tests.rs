use super::render::{Ending, Item, Rendered, items};
use super::*;
use crate::directive::Directive;
use crate::frames::Frame;

fn parsed(body: &str) -> Result<Request, ApiError> {
    request::parse(body.as_bytes())
}

fn composed(request: &Request, script: &Directive) -> Result<Answer, ApiError> {
    Ok(answer::compose(&asked(request, &Context::default())?, script, "", false))
}

fn events(frames: &[Frame]) -> Vec<Value> {
    let texts = frames.iter().map(|frame| String::from_utf8_lossy(&frame.bytes).into_owned());
    texts.filter_map(|text| serde_json::from_str(text.split_once("data: ")?.1).ok()).collect()
}

fn streamed(body: &str, words: &str) -> Result<Vec<Value>, ApiError> {
    let request = parsed(body)?;
    let script = Directive::parse(words).map_err(ApiError::invalid)?;
    let mut answer = composed(&request, &script)?;
    let ending = ending(&mut answer, &script);
    let items = items(&answer, &request);
    let rendered = Rendered { id: "resp_1", created: 1, request: &request, items, usage: answer.usage, ending, script: &script };
    Ok(events(&rendered.stream()))
}

fn names(events: &[Value]) -> Vec<&str> {
    events.iter().filter_map(|event| event.get("type")?.as_str()).collect()
}

#[test]
fn a_stream_has_every_event_in_its_place() -> Result<(), ApiError> {
    let events = streamed(r#"{"model":"gpt-4o","input":"a","stream":true}"#, "tokens=2 per_delta=1")?;
    let expected = [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ];
    assert_eq!(names(&events), expected);
    let numbers: Vec<u64> = events.iter().filter_map(|event| event.get("sequence_number")?.as_u64()).collect();
    assert_eq!(numbers, (0..10).collect::<Vec<u64>>());
    let last = events.last().cloned().unwrap_or_default();
    assert_eq!(last.pointer("/response/usage/output_tokens"), Some(&Value::from(2)));
    assert_eq!(last.pointer("/response/output/0"), events.get(8).and_then(|event| event.get("item")));
    Ok(())
}

#[test]
fn calls_and_thoughts_are_items_of_their_own() -> Result<(), ApiError> {
    let body = r#"{"model":"o3","input":"a","stream":true,"tools":[{"type":"function","name":"look","parameters":{}}]}"#;
    let events = streamed(body, "reasoning=30 tool=look args={\"a\":1}")?;
    let kinds: Vec<&str> = events.iter().filter_map(|event| event.pointer("/item/type")?.as_str()).collect();
    assert_eq!(kinds, ["reasoning", "reasoning", "function_call", "function_call"]);
    let deltas = events.iter().filter(|event| event.get("type").is_some_and(|kind| kind == "response.function_call_arguments.delta"));
    let joined: String = deltas.filter_map(|event| event.get("delta")?.as_str()).collect();
    assert_eq!(joined, r#"{"a":1}"#);
    let usage = events.last().and_then(|event| event.pointer("/response/usage")).cloned().unwrap_or_default();
    assert_eq!(usage.pointer("/output_tokens_details/reasoning_tokens"), Some(&Value::from(30)));
    Ok(())
}

#[test]
fn a_limit_makes_it_incomplete_and_a_script_makes_it_fail() -> Result<(), ApiError> {
    let body = r#"{"model":"gpt-4o","input":"a","stream":true,"max_output_tokens":16}"#;
    let cut = streamed(body, "tokens=50")?;
    let last = cut.last().cloned().unwrap_or_default();
    assert_eq!(last.get("type"), Some(&Value::from("response.incomplete")));
    assert_eq!(last.pointer("/response/incomplete_details/reason"), Some(&Value::from("max_output_tokens")));
    assert_eq!(last.pointer("/response/usage/output_tokens"), Some(&Value::from(16)));
    let failed = streamed(body, "tokens=10 failed=1")?;
    let last = failed.last().cloned().unwrap_or_default();
    assert_eq!(last.get("type"), Some(&Value::from("response.failed")));
    assert_eq!(last.pointer("/response/error/code"), Some(&Value::from("server_error")));
    assert_eq!(last.pointer("/response/usage/output_tokens"), Some(&Value::from(5)));
    assert!(!names(&failed).contains(&"response.output_text.done"));
    Ok(())
}

#[test]
fn thinking_may_use_up_everything() -> Result<(), ApiError> {
    let request = parsed(r#"{"model":"o3","input":"a","max_output_tokens":16}"#)?;
    let answer = composed(&request, &Directive::default())?;
    let items = items(&answer, &request);
    assert!(matches!(items.as_slice(), [Item::Reasoning { .. }]));
    assert_eq!((answer.usage.completion, answer.usage.reasoning), (16, 16));
    Ok(())
}

#[test]
fn calls_and_their_outputs_belong_together() -> Result<(), ApiError> {
    let call = r#"{"type":"function_call","call_id":"c1","name":"look","arguments":"{}"}"#;
    let output = |id: &str| format!(r#"{{"type":"function_call_output","call_id":"{id}","output":"1"}}"#);
    let check = |items: &str| parsed(&format!(r#"{{"model":"o3","input":[{items}]}}"#)).and_then(|request| check_calls(&request.input));
    assert!(check(&format!("{call},{}", output("c1"))).is_ok());
    let open = check(call).err().map(|error| error.message);
    assert_eq!(open.as_deref(), Some("No tool output found for function call c1."));
    let stray = check(&output("c2")).err().map(|error| error.message);
    assert_eq!(stray.as_deref(), Some("No tool call found for function call output with call_id c2."));
    Ok(())
}

#[test]
fn a_buffered_response_says_what_was_asked_of_it() -> Result<(), ApiError> {
    let body = r#"{"model":"gpt-4o","input":"a","store":false,"metadata":{"k":"v"},"temperature":0.5}"#;
    let request = parsed(body)?;
    let script = Directive::default();
    let answer = composed(&request, &script)?;
    let (items, usage) = (items(&answer, &request), answer.usage);
    let rendered = Rendered { id: "resp_1", created: 1, request: &request, items, usage, ending: Ending::Completed, script: &script };
    let document: Value = serde_json::from_str(&rendered.whole()).unwrap_or_default();
    assert_eq!((document.get("store"), document.pointer("/metadata/k")), (Some(&Value::Bool(false)), Some(&Value::from("v"))));
    assert_eq!(document.get("temperature"), Some(&Value::from(0.5)));
    Ok(())
}
