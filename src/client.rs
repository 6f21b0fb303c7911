//! A client of the admin API. Its errors are what the service said, in words for a person.

use serde_json::Value;
use std::time::Duration;
use ureq::Agent;
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

    pub fn get(&self, path: &str) -> Result<Value, String> {
        parse(&self.get_text(path)?)
    }

    pub fn get_text(&self, path: &str) -> Result<String, String> {
        self.finish(self.agent.get(format!("{}{path}", self.base)).header("authorization", self.token.as_str()).call())
    }

    /// All pages of a list, as one array.
    pub fn list(&self, path: &str) -> Result<Value, String> {
        let (mut all, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.get(&format!("{path}?limit=1000&cursor={cursor}"))?;
            all.extend(page.get("data").and_then(Value::as_array).cloned().unwrap_or_default());
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(next) => cursor = next.to_owned(),
                None => return Ok(Value::Array(all)),
            }
        }
    }

    pub fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        parse(&self.finish(self.agent.post(format!("{}{path}", self.base)).header("authorization", self.token.as_str()).send_json(body))?)
    }

    pub fn post_text(&self, path: &str, body: &str) -> Result<Value, String> {
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .header("authorization", self.token.as_str())
            .header("content-type", "text/plain");
        parse(&self.finish(request.send(body))?)
    }

    pub fn delete(&self, path: &str) -> Result<(), String> {
        self.finish(self.agent.delete(format!("{}{path}", self.base)).header("authorization", self.token.as_str()).call()).map(drop)
    }

    fn finish(&self, result: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<String, String> {
        let unreachable =
            |error: ureq::Error| format!("the admin API at {} can't be reached: {error}. Is `keyward up` running?", self.base);
        let mut response = result.map_err(unreachable)?;
        let body = response.body_mut().with_config().limit(1 << 30).read_to_string().map_err(unreachable)?;
        if response.status().is_success() {
            return Ok(body);
        }
        let problem: Value = serde_json::from_str(&body).unwrap_or_default();
        let detail = problem.get("detail").and_then(Value::as_str).unwrap_or("no details");
        let field = problem.get("field").and_then(Value::as_str).map_or(String::new(), |field| format!("{field}: "));
        Err(format!("{field}{detail} ({})", response.status().as_u16()))
    }
}

fn parse(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("the admin API sent something else than JSON: {error}"))
}
