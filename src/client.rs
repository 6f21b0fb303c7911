//! A client of the admin API. Its errors are what the service said, in words for a person.

use crate::failure::{Exit, Failure};
use serde_json::Value;
use std::time::Duration;
use ureq::http::Response;
use ureq::{Agent, Body, RequestBuilder};
use zeroize::Zeroizing;

pub struct Client {
    base: String,
    token: Zeroizing<String>,
    agent: Agent,
}

impl Client {
    pub fn new(base: &str, token: &str) -> Self {
        let config = Agent::config_builder().timeout_global(Some(Duration::from_secs(30))).http_status_as_error(false).proxy(None).build();
        Client { base: base.trim_end_matches('/').to_owned(), token: Zeroizing::new(format!("Bearer {token}")), agent: config.into() }
    }

    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        parse(&self.get_text(path)?)
    }

    pub fn get_text(&self, path: &str) -> Result<String, Failure> {
        self.finish(self.mine(self.agent.get(self.url(path)), None).call())
    }

    /// All pages of a list, as one array.
    pub fn list(&self, path: &str) -> Result<Value, Failure> {
        let mark = if path.contains('?') { '&' } else { '?' };
        let (mut all, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("{path}{mark}limit=1000{cursor}"))?;
            all.extend(page.get("data").and_then(Value::as_array).cloned().unwrap_or_default());
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(Value::Array(all)),
            }
        }
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        parse(&self.finish(self.mine(self.agent.post(self.url(path)), None).send_json(body))?)
    }

    pub fn put(&self, path: &str, body: &Value, if_match: Option<&str>) -> Result<Value, Failure> {
        parse(&self.finish(self.mine(self.agent.put(self.url(path)), if_match).send_json(body))?)
    }

    pub fn patch(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        parse(&self.finish(self.mine(self.agent.patch(self.url(path)), None).send_json(body))?)
    }

    pub fn post_text(&self, path: &str, body: &str) -> Result<Value, Failure> {
        let request = self.mine(self.agent.post(self.url(path)), None).header("content-type", "text/plain");
        parse(&self.finish(request.send(body))?)
    }

    pub fn delete(&self, path: &str) -> Result<(), Failure> {
        self.finish(self.mine(self.agent.delete(self.url(path)), None).call()).map(drop)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    fn mine<T>(&self, request: RequestBuilder<T>, if_match: Option<&str>) -> RequestBuilder<T> {
        let request = request.header("authorization", self.token.as_str());
        if let Some(etag) = if_match { request.header("if-match", etag) } else { request }
    }

    fn finish(&self, result: Result<Response<Body>, ureq::Error>) -> Result<String, Failure> {
        let unreachable = |error: ureq::Error| {
            let message =
                format!("the admin API at {} can't be reached: {error}. Is `keyward up` running? --admin says where it is", self.base);
            Failure::new(Exit::Unreachable, message)
        };
        let mut response = result.map_err(unreachable)?;
        let body = response.body_mut().with_config().limit(1 << 30).read_to_string().map_err(unreachable)?;
        if response.status().is_success() { Ok(body) } else { Err(refused(response.status().as_u16(), &body)) }
    }
}

/// A problem (RFC 9457) in words, with what to do next where that is not plain.
fn refused(status: u16, body: &str) -> Failure {
    let problem: Value = serde_json::from_str(body).unwrap_or_default();
    let field = |value: &Value| value.get("field").and_then(Value::as_str).map_or(String::new(), |field| format!("{field}: "));
    let detail = |value: &Value| value.get("detail").and_then(Value::as_str).unwrap_or("no details").to_owned();
    let mut message = format!("{}{} ({status})", field(&problem), detail(&problem));
    for error in problem.get("errors").and_then(Value::as_array).into_iter().flatten() {
        message.push_str(&format!("\n  {}{}", field(error), detail(error)));
    }
    let (code, next) = match status {
        401 => (Exit::Denied, "\nSet KEYWARD_ADMIN_TOKEN to a valid admin token, or run where `keyward up` keeps its state (--data)."),
        403 => (Exit::Denied, "\n`keyward whoami` tells the role of your token."),
        404 => (Exit::NotFound, ""),
        409 => (Exit::Conflict, ""),
        412 => (Exit::Conflict, "\nSomebody else changed it: look at it again and repeat."),
        400 | 413 | 415 | 422 => (Exit::Invalid, ""),
        _ => (Exit::Failed, ""),
    };
    Failure::new(code, message + next)
}

fn parse(text: &str) -> Result<Value, Failure> {
    serde_json::from_str(text).map_err(|error| Failure::from(format!("the admin API sent something else than JSON: {error}")))
}
