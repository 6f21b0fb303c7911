//! `/v1/responses`: answers that are kept unless the request says otherwise, and may build on one another.

mod render;
pub mod request;
pub mod stored;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::render::{Ending, Rendered};
use self::request::Request;
use super::{error, files};
use crate::answer::{self, Answer, Asked, Extras, Finish, Sent, Wish};
use crate::api::Served;
use crate::call::{Call, Ready, Shape};
use crate::directive::Directive;
use crate::ledger::{How, Reference};
use crate::objects::{Content, Kind, StoredResponse};
use crate::provider::ApiError;
use crate::text::{identifier, unix_us};
use crate::ticket::Bill;

pub fn create(call: &mut Call) -> Result<Served, ApiError> {
    let request = request::parse(call.body)?;
    call.note_store(request.store);
    let context = context(call, &request)?;
    check_calls(&context.input)?;
    let asked = asked(&request, &context)?;
    let (script, said) = call.steer(Some(request.model), request.stream, &request.last_user)?;
    let mut answer = answer::compose(&asked, &script, &said, call.shared().bench);
    call.admit(request.model, answer.usage.prompt + answer.usage.completion, &script)?;
    let ending = ending(&mut answer, &script);
    let id = identifier("resp_", 48);
    // A failed stream tells its usage and is charged just that.
    call.charge(Bill::new(request.model, answer.usage, request.stream && ending != Ending::Failed), Some(&id));
    let items = render::items(&answer, &request);
    let (created, usage) = (unix_us() / 1_000_000, answer.usage);
    let rendered = Rendered { id: &id, created, request: &request, items, usage, ending, script: &script };
    if request.stored() {
        keep(call, &rendered, context);
    }
    if request.stream {
        return Ok(Ready::events(rendered.stream(), script.clone(), render::error_event).into());
    }
    if request.background {
        // The work takes the time that the answer otherwise would.
        call.reply.wait_ms = None;
        return Ok(Ready::whole(rendered.begun("queued"), Shape::Json, script.clone()).into());
    }
    Ok(Ready::new(rendered.buffered(), Shape::Json, script.clone()).into())
}

impl Request {
    /// Whether the response is kept: yes, if nothing is said.
    pub fn stored(&self) -> bool {
        self.store != Sent::False
    }
}

/// What the model gets to see besides the body.
#[derive(Default)]
struct Context {
    /// All items, those of the responses before included.
    input: Vec<Value>,
    /// Tokens that are not in the body: earlier responses, items referred to, files.
    tokens: u64,
}

/// Finds everything of the account that the request names.
fn context(call: &Call, request: &Request) -> Result<Context, ApiError> {
    let mut context = Context::default();
    let named = |name: &str| request.fields.get(name).filter(|value| !value.is_null());
    if let Some(id) = named("previous_response_id").and_then(Value::as_str) {
        let object = call.refer(Kind::Response, id, How::Used);
        let before = object.as_deref().and_then(stored::stored).ok_or_else(|| error::previous_response_not_found(id))?;
        context.input.extend(before.input.iter().chain(&before.output).cloned());
        context.tokens += before.context_tokens;
    }
    unkept(call, request)?;
    for item in &request.input {
        let id = item.get("id").and_then(Value::as_str).unwrap_or_default();
        let reference = match request::kind(item) {
            "item_reference" => true,
            // Without its content a thought is only a name for what was kept.
            "reasoning" => item.get("encrypted_content").is_none_or(Value::is_null),
            _ => false,
        };
        if reference {
            let object = call.refer(Kind::Item, id, How::Used);
            let Some(Content::Item(kept)) = object.as_deref().map(|object| &object.content) else {
                return Err(error::item_not_found(id));
            };
            context.tokens += request::item_tokens(kept);
            context.input.push(kept.clone());
        } else {
            context.input.push(item.clone());
        }
        for file in request::files(item) {
            context.tokens += files::tokens(call, file, "input")?;
        }
    }
    Ok(context)
}

/// Names of objects that the simulator has none of: written down, and refused as unknown.
fn unkept(call: &Call, request: &Request) -> Result<(), ApiError> {
    let missing = |kind: &'static str, what: &str, id: &str| {
        call.note(Reference::new(kind, id, How::Used, None));
        Err(error::object_not_found(what, id))
    };
    let id_of = |value: &Value| value.as_str().or_else(|| value.get("id")?.as_str()).map(str::to_owned);
    let member = |name: &str| request.fields.get(name).and_then(id_of);
    if let Some(id) = member("conversation") {
        return missing("conversation", "Conversation", &id);
    }
    if let Some(id) = member("prompt") {
        return missing("prompt", "Prompt", &id);
    }
    for tool in request.fields.get("tools").and_then(Value::as_array).into_iter().flatten() {
        let stores = tool.get("vector_store_ids").and_then(Value::as_array).into_iter().flatten();
        if let Some(id) = stores.filter_map(Value::as_str).next() {
            return missing("vector_store", "Vector store", id);
        }
        if let Some(id) = tool.get("container").and_then(Value::as_str) {
            return missing("container", "Container", id);
        }
    }
    Ok(())
}

/// Each call of a function has its output, each output its call.
fn check_calls(input: &[Value]) -> Result<(), ApiError> {
    let ids = |wanted: &'static str| {
        let items = input.iter().filter(move |item| request::kind(item) == wanted);
        items.filter_map(|item| item.get("call_id")?.as_str())
    };
    let (calls, outputs): (HashSet<_>, HashSet<_>) = (ids("function_call").collect(), ids("function_call_output").collect());
    if let Some(stray) = ids("function_call_output").find(|id| !calls.contains(id)) {
        let message = format!("No tool call found for function call output with call_id {stray}.");
        return Err(ApiError::invalid(message).param("input"));
    }
    if let Some(open) = ids("function_call").find(|id| !outputs.contains(id)) {
        return Err(ApiError::invalid(format!("No tool output found for function call {open}.")).param("input"));
    }
    Ok(())
}

fn asked(request: &Request, context: &Context) -> Result<Asked, ApiError> {
    let mut prompt_tokens = request.own_tokens + context.tokens;
    if prompt_tokens > request.model.context {
        if request.fields.get("truncation").is_none_or(|truncation| truncation != "auto") {
            let message = "Your input exceeds the context window of this model. Please adjust your input and try again.";
            return Err(ApiError::invalid(message).param("input").code("context_length_exceeded"));
        }
        prompt_tokens = request.model.context;
    }
    Ok(Asked {
        model: request.model,
        stream: request.stream,
        include_usage: true,
        choices: 1,
        limit: request.limit,
        stop: Vec::new(),
        tools: request.tools.clone(),
        forced_tool: request.forced_tool.clone(),
        prompt_tokens,
        last_user: String::new(),
        after_tools: request.after_tools,
        wish: Wish::default(),
        extras: Extras::default(),
    })
}

/// How it ends; one that fails has made half of its text by then.
fn ending(answer: &mut Answer, script: &Directive) -> Ending {
    let Some(choice) = answer.choices.first_mut() else { return Ending::Completed };
    if script.failed {
        choice.calls.clear();
        choice.text.truncate(choice.text.tokens() / 2);
        choice.visible = choice.text.tokens();
        answer.usage.completion = answer.usage.reasoning + choice.visible;
        return Ending::Failed;
    }
    if choice.finish == Finish::Length { Ending::Incomplete } else { Ending::Completed }
}

fn keep(call: &Call, rendered: &Rendered, context: Context) {
    let document = rendered.whole();
    // What was just written is read back: the items kept are those that were sent.
    let written: Value = serde_json::from_str(&document).unwrap_or_default();
    let output: Vec<Value> = written.get("output").and_then(Value::as_array).cloned().unwrap_or_default();
    let due = Instant::now() + Duration::from_millis(rendered.script.first_ms.unwrap_or(0));
    let background = rendered.request.background;
    let response = StoredResponse {
        pending: (background && !rendered.request.stream).then(|| (due, rendered.begun("queued"))),
        background,
        // Neither hidden tokens nor instructions are shown to the model again.
        context_tokens: context.tokens + rendered.request.item_tokens + rendered.usage.completion - rendered.usage.reasoning,
        input: context.input,
        output: output.clone(),
        document,
    };
    call.keep(Kind::Response, rendered.id, Content::Response(Box::new(response)));
    for item in output {
        if let Some(id) = item.get("id").and_then(Value::as_str).map(str::to_owned) {
            call.keep(Kind::Item, &id, Content::Item(item));
        }
    }
}

#[cfg(test)]
mod tests;
