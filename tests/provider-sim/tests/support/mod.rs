//! A simulator to test against, and the plainest HTTP client that can also misbehave.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

pub type Outcome<T = ()> = Result<T, Box<dyn Error>>;

pub const OPENAI: &str = "authorization: Bearer sk-openai-test\r\n";
pub const ANTHROPIC: &str = "x-api-key: sk-ant-test\r\nanthropic-version: 2023-06-01\r\n";

pub struct Sim {
    child: Child,
    api: String,
    control: String,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    /// Chunks joined, if it was chunked.
    pub body: Vec<u8>,
    /// Ended as its framing promised.
    pub whole: bool,
}

impl Sim {
    /// Started, with one credential of each provider: `o` and `c`.
    pub fn start() -> Outcome<Sim> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_provider-sim")).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut line)?;
        let ready: Value = serde_json::from_str(&line)?;
        let address = |name: &str| ready[name].as_str().and_then(|url| url.strip_prefix("http://")).map(str::to_owned);
        let sim = Sim { child, api: address("api").ok_or("no api")?, control: address("control").ok_or("no control")? };
        sim.credentials(&json!([
            {"id": "o", "provider": "openai", "secret": "sk-openai-test"},
            {"id": "c", "provider": "anthropic", "secret": "sk-ant-test"},
        ]))?;
        Ok(sim)
    }

    pub fn credentials(&self, given: &Value) -> Outcome {
        self.control("PUT", "/control/credentials", Some(given)).map(drop)
    }

    /// Asks the control API; the answer as JSON, null if it has no body.
    pub fn control(&self, method: &str, target: &str, body: Option<&Value>) -> Outcome<Value> {
        let body = body.map(Value::to_string).unwrap_or_default();
        let answer = exchange(&self.control, &request(method, target, "content-type: application/json\r\n", &body))?;
        if answer.status >= 300 {
            return Err(format!("{method} {target}: {} {}", answer.status, answer.text()).into());
        }
        Ok(if answer.body.is_empty() { Value::Null } else { serde_json::from_slice(&answer.body)? })
    }

    pub fn raw_control(&self, target: &str) -> Outcome<Answer> {
        exchange(&self.control, &request("GET", target, "", ""))
    }

    pub fn chat(&self, auth: &str, body: &Value) -> Outcome<Answer> {
        self.send("POST", "/v1/chat/completions", auth, &body.to_string())
    }

    pub fn messages(&self, auth: &str, body: &Value) -> Outcome<Answer> {
        self.send("POST", "/v1/messages", auth, &body.to_string())
    }

    pub fn send(&self, method: &str, target: &str, headers: &str, body: &str) -> Outcome<Answer> {
        exchange(&self.api, &request(method, target, headers, body))
    }

    pub fn connect(&self) -> Outcome<TcpStream> {
        Ok(TcpStream::connect(&self.api)?)
    }

    pub fn totals(&self) -> Outcome<Value> {
        self.control("GET", "/control/totals", None)
    }

    pub fn last_entry(&self) -> Outcome<Value> {
        let ledger = self.control("GET", "/control/ledger", None)?;
        Ok(ledger["requests"].as_array().and_then(|requests| requests.last()).cloned().ok_or("an empty ledger")?)
    }

    /// Waits until nothing is under way any more: the one thing tests have to wait for.
    pub fn settle(&self) -> Outcome<Value> {
        loop {
            let totals = self.totals()?;
            if totals["running"] == 0 {
                return Ok(totals);
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        // It may have ended by itself; a test has nothing more to say about it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Outcome<Value> {
        Ok(serde_json::from_slice(&self.body)?)
    }

    /// The data of all events that are JSON.
    pub fn events(&self) -> Vec<Value> {
        let text = self.text();
        text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (given, value) = line.split_once(": ")?;
            given.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}

pub fn request(method: &str, target: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("{method} {target} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}content-length: {length}\r\n\r\n{body}")
}

fn exchange(address: &str, request: &str) -> Outcome<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request.as_bytes())?;
    read(&mut stream)
}

pub fn read(stream: &mut TcpStream) -> Outcome<Answer> {
    let mut bytes = Vec::new();
    // A reset is an ending like others here: what came before it is what is looked at.
    let ended = stream.read_to_end(&mut bytes);
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").ok_or("no complete head")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).ok_or("no status")?.parse()?;
    let rest = &bytes[end + 4..];
    let mut answer = Answer { status, head, body: rest.to_vec(), whole: ended.is_ok() };
    if answer.header("transfer-encoding") == Some("chunked") {
        (answer.body, answer.whole) = dechunk(rest);
    } else if let Some(length) = answer.header("content-length") {
        answer.whole = length.parse() == Ok(rest.len());
    }
    Ok(answer)
}

fn dechunk(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(line) = rest.windows(2).position(|window| window == b"\r\n") else { return (body, false) };
        let size = std::str::from_utf8(&rest[..line]).ok().and_then(|size| usize::from_str_radix(size, 16).ok());
        rest = &rest[line + 2..];
        match size {
            Some(0) => return (body, true),
            Some(size) if rest.len() >= size + 2 => {
                body.extend_from_slice(&rest[..size]);
                rest = &rest[size + 2..];
            }
            _ => {
                body.extend_from_slice(rest);
                return (body, false);
            }
        }
    }
}
