//! The response object, and the events it is streamed in.

use serde_json::Value;

use super::request::Request;
use crate::answer::{Answer, Call, Finish, call_overhead};
use crate::directive::Directive;
use crate::frames::{Frame, Frames};
use crate::models::Usage;
use crate::openai::response::padding;
use crate::text::{identifier, quoted};
use crate::tokens::Text;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Completed,
    /// Cut by `max_output_tokens`.
    Incomplete,
    /// As the script wants it.
    Failed,
}

/// One response, decided.
pub struct Rendered<'a> {
    pub id: &'a str,
    pub created: u64,
    pub request: &'a Request,
    pub items: Vec<Item<'a>>,
    pub usage: Usage,
    pub ending: Ending,
    pub script: &'a Directive,
}

/// A piece of the output.
pub enum Item<'a> {
    /// With its content, encrypted, if that was asked for.
    Reasoning {
        id: String,
        encrypted: Option<String>,
    },
    Message {
        id: String,
        text: &'a Text,
    },
    Call {
        id: String,
        call: &'a Call,
    },
}

/// The items that an answer has.
pub fn items<'a>(answer: &'a Answer, request: &Request) -> Vec<Item<'a>> {
    let mut items = Vec::new();
    if request.model.reasons {
        let wanted = request.fields.get("include").and_then(Value::as_array);
        let encrypted = wanted.is_some_and(|include| include.iter().any(|word| word == "reasoning.encrypted_content"));
        let encrypted = encrypted.then(|| identifier("gAAAAA", 90));
        items.push(Item::Reasoning { id: identifier("rs_", 48), encrypted });
    }
    for choice in &answer.choices {
        // Reasoning may use up all there is; then there is no message at all.
        if choice.text.tokens() > 0 || (choice.calls.is_empty() && choice.finish != Finish::Length) {
            items.push(Item::Message { id: identifier("msg_", 48), text: &choice.text });
        }
        items.extend(choice.calls.iter().map(|call| Item::Call { id: identifier("fc_", 48), call }));
    }
    items
}

impl Item<'_> {
    pub fn id(&self) -> &str {
        match self {
            Item::Reasoning { id, .. } | Item::Message { id, .. } | Item::Call { id, .. } => id,
        }
    }

    pub fn json(&self, status: &str) -> String {
        match self {
            Item::Reasoning { id, encrypted } => {
                let content = encrypted.as_ref().map_or_else(String::new, |text| format!(r#","encrypted_content":"{text}""#));
                format!(r#"{{"id":"{id}","type":"reasoning","summary":[]{content}}}"#)
            }
            Item::Message { id, text } => {
                let part = part(text.as_str());
                format!(r#"{{"id":"{id}","type":"message","status":"{status}","content":[{part}],"role":"assistant"}}"#)
            }
            Item::Call { id, call } => called(id, call, status, call.args.as_str()),
        }
    }
}

fn part(text: &str) -> String {
    format!(r#"{{"type":"output_text","annotations":[],"logprobs":[],"text":{}}}"#, quoted(text))
}

fn called(id: &str, call: &Call, status: &str, args: &str) -> String {
    format!(
        r#"{{"id":"{id}","type":"function_call","status":"{status}","arguments":{},"call_id":"call_{}","name":{}}}"#,
        quoted(args),
        call.id,
        quoted(&call.name),
    )
}

impl Rendered<'_> {
    /// The object as it is at its end, which is also what is kept.
    pub fn whole(&self) -> String {
        let last = self.items.len().saturating_sub(1);
        let status = |index| if self.ending == Ending::Incomplete && index == last { "incomplete" } else { "completed" };
        let items: Vec<String> = match self.ending {
            Ending::Failed => Vec::new(),
            _ => self.items.iter().enumerate().map(|(index, item)| item.json(status(index))).collect(),
        };
        let usage = if self.script.no_usage { "null".to_owned() } else { usage(&self.usage) };
        let (status, error, incomplete) = match self.ending {
            Ending::Completed => ("completed", "null", "null"),
            Ending::Incomplete => ("incomplete", "null", r#"{"reason":"max_output_tokens"}"#),
            Ending::Failed => ("failed", FAILURE, "null"),
        };
        let completed = if self.ending == Ending::Completed { self.created.to_string() } else { "null".into() };
        self.document(&Phase { status, error, incomplete, completed: &completed, tier: "default" }, &items.join(","), &usage)
    }

    /// The object before there is any output.
    pub fn begun(&self, status: &str) -> String {
        let phase = Phase { status, error: "null", incomplete: "null", completed: "null", tier: "auto" };
        self.document(&phase, "", "null")
    }

    fn document(&self, phase: &Phase, output: &str, usage: &str) -> String {
        let given = |name: &str, otherwise: &str| {
            let value = self.request.fields.get(name).filter(|value| !value.is_null());
            value.map_or_else(|| otherwise.to_owned(), Value::to_string)
        };
        let reasoning = self.request.fields.get("reasoning");
        let effort = if self.request.model.reasons { r#""medium""# } else { "null" };
        let of_reasoning = |name: &str, otherwise: &str| {
            reasoning.and_then(|value| value.get(name)).map_or_else(|| otherwise.to_owned(), Value::to_string)
        };
        format!(
            r#"{{"id":"{}","object":"response","created_at":{},"status":"{}","background":{},"completed_at":{},"error":{},"incomplete_details":{},"instructions":{},"max_output_tokens":{},"max_tool_calls":{},"model":"{}","output":[{output}],"parallel_tool_calls":{},"previous_response_id":{},"prompt_cache_key":{},"prompt_cache_retention":{},"reasoning":{{"effort":{},"summary":{}}},"safety_identifier":{},"service_tier":"{}","store":{},"temperature":{},"text":{},"tool_choice":{},"tools":{},"top_logprobs":{},"top_p":{},"truncation":{},"usage":{usage},"user":{},"metadata":{}}}"#,
            self.id,
            self.created,
            phase.status,
            self.request.background,
            phase.completed,
            phase.error,
            phase.incomplete,
            given("instructions", "null"),
            given("max_output_tokens", "null"),
            given("max_tool_calls", "null"),
            self.request.model.snapshot,
            given("parallel_tool_calls", "true"),
            given("previous_response_id", "null"),
            given("prompt_cache_key", "null"),
            given("prompt_cache_retention", "null"),
            of_reasoning("effort", effort),
            of_reasoning("summary", "null"),
            given("safety_identifier", "null"),
            phase.tier,
            self.request.stored(),
            given("temperature", "1.0"),
            given("text", r#"{"format":{"type":"text"},"verbosity":"medium"}"#),
            given("tool_choice", r#""auto""#),
            given("tools", "[]"),
            given("top_logprobs", "0"),
            given("top_p", "1.0"),
            given("truncation", r#""disabled""#),
            given("user", "null"),
            given("metadata", "{}"),
        )
    }

    pub fn buffered(&self) -> Vec<Frame> {
        let mut text = self.whole();
        let padding = padding(self.script);
        if !padding.is_empty() {
            text.truncate(text.len() - 1);
            text.push_str(&padding);
            text.push('}');
        }
        let mut frames = Frames::default();
        frames.push_delta(text, self.usage.completion - self.usage.reasoning);
        frames.into_vec()
    }

    pub fn stream(&self) -> Vec<Frame> {
        let mut events = Events { frames: Frames::default(), next: 0, padding: padding(self.script) };
        let first = if self.request.background { "queued" } else { "in_progress" };
        events.push("response.created", &format!(r#""response":{}"#, self.begun(first)));
        if self.request.background {
            events.push("response.queued", &format!(r#""response":{}"#, self.begun("queued")));
        }
        events.push("response.in_progress", &format!(r#""response":{}"#, self.begun("in_progress")));
        let last = self.items.len().saturating_sub(1);
        for (index, item) in self.items.iter().enumerate() {
            let cut = self.ending == Ending::Incomplete && index == last;
            self.item_events(&mut events, index, item, if cut { "incomplete" } else { "completed" });
        }
        let name = match self.ending {
            Ending::Completed => "response.completed",
            Ending::Incomplete => "response.incomplete",
            Ending::Failed => "response.failed",
        };
        events.push(name, &format!(r#""response":{}"#, self.whole()));
        events.frames.into_vec()
    }

    fn item_events(&self, events: &mut Events, index: usize, item: &Item, status: &str) {
        // A response that fails breaks off after its last delta.
        let ends = self.ending != Ending::Failed;
        let id = item.id();
        let place = format!(r#""item_id":"{id}","output_index":{index}"#);
        let added = |opening: &str| format!(r#""output_index":{index},"item":{opening}"#);
        match item {
            Item::Reasoning { .. } => {
                events.push("response.output_item.added", &added(&item.json("in_progress")));
            }
            Item::Message { text, .. } => {
                let opening = format!(r#"{{"id":"{id}","type":"message","status":"in_progress","content":[],"role":"assistant"}}"#);
                events.push("response.output_item.added", &added(&opening));
                let place = format!(r#"{place},"content_index":0"#);
                events.push("response.content_part.added", &format!(r#"{place},"part":{}"#, part("")));
                for (piece, tokens) in text.deltas(self.script.deltas_of()) {
                    let rest = format!(r#"{place},"delta":{},"logprobs":[]{}"#, quoted(piece), self.obfuscation(piece));
                    events.push_delta("response.output_text.delta", &rest, tokens);
                }
                if ends {
                    let whole = quoted(text.as_str());
                    events.push("response.output_text.done", &format!(r#"{place},"text":{whole},"logprobs":[]"#));
                    events.push("response.content_part.done", &format!(r#"{place},"part":{}"#, part(text.as_str())));
                }
            }
            Item::Call { call, .. } => {
                events.push_delta("response.output_item.added", &added(&called(id, call, "in_progress", "")), call_overhead());
                for (piece, tokens) in call.args.deltas(self.script.deltas_of()) {
                    let rest = format!(r#"{place},"delta":{}{}"#, quoted(piece), self.obfuscation(piece));
                    events.push_delta("response.function_call_arguments.delta", &rest, tokens);
                }
                if ends {
                    let rest = format!(r#"{place},"arguments":{},"name":{}"#, quoted(call.args.as_str()), quoted(&call.name));
                    events.push("response.function_call_arguments.done", &rest);
                }
            }
        }
        if ends {
            events.push("response.output_item.done", &added(&item.json(status)));
        }
    }

    /// Makes pieces of different length look alike on the wire.
    fn obfuscation(&self, piece: &str) -> String {
        if !self.request.obfuscation {
            return String::new();
        }
        format!(r#","obfuscation":"{}""#, identifier("", 16_usize.saturating_sub(piece.len())))
    }
}

struct Phase<'a> {
    status: &'a str,
    error: &'a str,
    incomplete: &'a str,
    completed: &'a str,
    tier: &'a str,
}

const FAILURE: &str = r#"{"code":"server_error","message":"The server had an error processing your request. Sorry about that!"}"#;

/// Numbers the events as they come.
struct Events {
    frames: Frames,
    next: u64,
    padding: String,
}

impl Events {
    fn text(&mut self, name: &str, rest: &str) -> String {
        let number = self.next;
        self.next += 1;
        format!("event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{number},{rest}}}\n\n")
    }

    fn push(&mut self, name: &str, rest: &str) {
        let text = self.text(name, rest);
        self.frames.push(text);
    }

    fn push_delta(&mut self, name: &str, rest: &str, tokens: u64) {
        let padding = std::mem::take(&mut self.padding);
        let text = self.text(name, &format!("{rest}{padding}"));
        self.frames.push_delta(text, tokens);
    }
}

/// The event of a stream that breaks off, the `number`th.
pub fn error_event(number: usize) -> String {
    format!(
        "event: error\ndata: {{\"type\":\"error\",\"sequence_number\":{number},\"code\":\"server_error\",\"message\":\"The server had an \
         error while processing your request. Sorry about that!\",\"param\":null}}\n\n"
    )
}

fn usage(usage: &Usage) -> String {
    format!(
        r#"{{"input_tokens":{},"input_tokens_details":{{"cached_tokens":{},"cache_write_tokens":{}}},"output_tokens":{},"output_tokens_details":{{"reasoning_tokens":{}}},"total_tokens":{}}}"#,
        usage.prompt,
        usage.cache_read,
        usage.cache_write,
        usage.completion,
        usage.reasoning,
        usage.prompt + usage.completion,
    )
}
