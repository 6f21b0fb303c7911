//! `keyward demo`: the promises, walked through against the provider simulator with live output.

use crate::client::Client;
use crate::{audit, cli::out};
use clap::Args;
use keyward_core::operation::PROVIDERS;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Real-looking secrets that exist only here: wherever they turn up outside the provider, something leaked.
const SECRETS: [(&str, &str, &str); 2] = [
    ("openai", "OPENAI_API_KEY", "sk-proj-DemoQ7ZkW3mXv9Bf2LsYc8RdHj5NaPe"),
    ("anthropic", "ANTHROPIC_API_KEY", "sk-ant-api03-DemoHw6VbQ9xMz2JrTf7CkLp4SnYd"),
];
const SDK_STEPS: &str = include_str!("demo.py");

#[derive(Args)]
pub struct DemoOptions {
    /// The provider simulator; default: `provider-sim` beside this command
    #[arg(long, env = "SIM_BIN")]
    simulator: Option<PathBuf>,
    /// A Python that has the openai package
    #[arg(long, env = "KEYWARD_PYTHON", default_value = "python3")]
    python: PathBuf,
}

/// One line per promise, and what a failure said.
struct Walk {
    kept: u32,
    all: u32,
}

impl Walk {
    fn promise(&mut self, text: &str, result: Result<String, String>) -> Result<(), String> {
        self.all += 1;
        match result {
            Ok(seen) => {
                self.kept += 1;
                out(&format!("{:>2}. {text}: {seen} ... ok\n", self.all))
            }
            Err(wrong) => out(&format!("{:>2}. {text}: {wrong} ... FAILED\n", self.all)),
        }
    }
}

/// A child that does not outlive the demo.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory that does not outlive the demo.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Demo {
    directory: Scratch,
    base: String,
    control: String,
    admin: Client,
    up: Running,
    _simulator: Running,
}

pub fn run(options: &DemoOptions) -> Result<(), String> {
    out("Keyward demo: simulated providers, a policy service and Envoy with the filter, all on loopback\n")?;
    let mut demo = Demo::start(options)?;
    let mut walk = Walk { kept: 0, all: 0 };
    let (key_id, token) = demo.new_key("1.00", &["gpt-4o-mini", "claude-haiku-4-5"])?;
    let sdk = demo.sdk(options, &token);
    let field = |name: &str| sdk.clone().map(|seen| seen.get(name).cloned().unwrap_or_default());
    walk.promise(
        "An unmodified OpenAI SDK that holds only a vk_ key gets its answer",
        field("answer").and_then(|a| expect(a.is_string(), || format!("{a}"))),
    )?;
    walk.promise("Streams arrive while the model still speaks", demo.streamed(&sdk))?;
    walk.promise(
        "Tools pass through",
        field("tool").and_then(|t| expect(t == json!(["get_weather", { "city": "Paris" }]), || t.to_string())),
    )?;
    walk.promise(
        "A model that the key may not use is refused as the SDK's own exception",
        field("refused").and_then(|r| expect(r == json!(["PermissionDeniedError", "model_not_allowed"]), || r.to_string())),
    )?;
    walk.promise("curl and the Anthropic dialect work with the same key", demo.anthropic(&token))?;
    walk.promise("The provider saw real credentials only", demo.no_violations())?;
    walk.promise("The key was charged what the provider counted, to the nanodollar", demo.charged_exactly(&key_id))?;
    walk.promise("A hard cap holds under 40 parallel requests", demo.cap_holds())?;
    walk.promise("1,000 malformed keys cost no call to the policy service", demo.garbage_is_free())?;
    walk.promise("A revoked key is refused at its next request", demo.revoked(&key_id, &token))?;
    walk.promise("The audit chain verifies offline, and one changed byte is found", demo.audit_verifies(&key_id))?;
    walk.promise("No secret stands in a log, in the database or in Envoy's configuration", demo.no_leak(&token))?;
    walk.promise("An orderly stop lets a stream finish and leaves nothing running", demo.orderly_stop())?;
    drop(demo);
    out(&format!("demo: {} promises, {} ok\n", walk.all, walk.kept))?;
    if walk.kept == walk.all { Ok(()) } else { Err("not every promise was kept".to_owned()) }
}

fn expect(right: bool, seen: impl FnOnce() -> String) -> Result<String, String> {
    if right { Ok(seen()) } else { Err(seen()) }
}

impl Demo {
    fn start(options: &DemoOptions) -> Result<Self, String> {
        let own = std::env::current_exe().map_err(|error| error.to_string())?;
        let simulator = options.simulator.clone().unwrap_or_else(|| own.with_file_name("provider-sim"));
        let directory = Scratch(std::env::temp_dir().join(format!("keyward-demo-{}", std::process::id())));
        std::fs::create_dir_all(&directory.0).map_err(|error| error.to_string())?;
        let mut simulator = spawn(Command::new(&simulator).args(["--listen", "127.0.0.1:0", "--control", "127.0.0.1:0"]))?;
        let ready: Value = serde_json::from_str(&first_line(&mut simulator, |_| true)?).map_err(|error| error.to_string())?;
        let address = |name: &str| ready.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (api, control) = (address("api"), address("control"));
        let credentials: Vec<Value> =
            SECRETS.iter().map(|(provider, _, secret)| json!({ "id": provider, "provider": provider, "secret": secret })).collect();
        curl(&[
            "-X",
            "PUT",
            "-H",
            "content-type: application/json",
            "-d",
            &Value::from(credentials).to_string(),
            &format!("{control}/control/credentials"),
        ])?;

        let (listen, admin) = (free_address()?, free_address()?);
        let mut command = Command::new(own);
        command.arg("up").arg("--data").arg(&directory.0).args(["--listen", &listen, "--admin", &admin]);
        for provider in &PROVIDERS {
            command.args(["--provider", &format!("{}={api}", provider.name)]);
        }
        for (_, variable, secret) in SECRETS {
            command.env(variable, secret);
        }
        let mut up = spawn(&mut command)?;
        first_line(&mut up, |line| line.starts_with("keyward is up"))?;
        let token = std::fs::read_to_string(directory.0.join("admin-token")).map_err(|error| error.to_string())?;
        let admin = Client::new(&format!("http://{admin}"), token.trim());
        Ok(Demo { directory, base: format!("http://{listen}"), control, admin, up, _simulator: simulator })
    }

    fn new_key(&self, budget: &str, models: &[&str]) -> Result<(String, String), String> {
        let body = json!({ "label": "demo", "allow": { "models": models }, "budgets": [{ "usd": budget, "window": "total" }] });
        let key = self.admin.post("/v1/keys", &body)?;
        let text = |name: &str| key.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok((text("id"), text("token")))
    }

    fn sdk(&self, options: &DemoOptions, token: &str) -> Result<Value, String> {
        let output = Command::new(&options.python).args(["-c", SDK_STEPS, &self.base, token, &self.control]).output();
        let output = output.map_err(|error| format!("{}: {error}", options.python.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        serde_json::from_str(&text)
            .map_err(|_| format!("the SDK failed: {}", String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("no word")))
    }

    fn streamed(&self, sdk: &Result<Value, String>) -> Result<String, String> {
        let seen = sdk.clone()?;
        let count = |name: &str| seen.get(name).and_then(Value::as_u64).unwrap_or(0);
        let (chunks, early) = (count("chunks"), count("chunks_while_running"));
        expect(chunks == 10 && early == 5, || format!("{chunks} chunks; of the first 5, {early} came before the provider was done"))
    }

    fn anthropic(&self, token: &str) -> Result<String, String> {
        let body =
            json!({ "model": "claude-haiku-4-5", "max_tokens": 50, "messages": [{ "role": "user", "content": "Hello" }] }).to_string();
        let key = format!("x-api-key: {token}");
        let answer = curl(&[
            "-H",
            &key,
            "-H",
            "anthropic-version: 2023-06-01",
            "-H",
            "content-type: application/json",
            "-d",
            &body,
            &format!("{}/v1/messages", self.base),
        ])?;
        let answer: Value = serde_json::from_str(&answer).map_err(|_| answer.clone())?;
        expect(answer.get("type") == Some(&json!("message")), || answer.pointer("/content/0/text").unwrap_or(&answer).to_string())
    }

    fn totals(&self) -> Result<Value, String> {
        // A request may still be ending.
        for _ in 0..100 {
            let totals: Value =
                serde_json::from_str(&curl(&[&format!("{}/control/totals", self.control)])?).map_err(|error| error.to_string())?;
            if totals.get("running") == Some(&json!(0)) {
                return Ok(totals);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err("the simulator does not come to rest".to_owned())
    }

    fn cost(&self) -> Result<i64, String> {
        Ok(self.totals()?.pointer("/overall/cost_nanodollars").and_then(Value::as_i64).unwrap_or(-1))
    }

    fn no_violations(&self) -> Result<String, String> {
        let totals = self.totals()?;
        let calls = totals.pointer("/overall/calls").and_then(Value::as_u64).unwrap_or(0);
        expect(totals.get("violation_count") == Some(&json!(0)) && calls > 0, || {
            format!("{calls} requests, {} violations", totals.get("violation_count").unwrap_or(&Value::Null))
        })
    }

    /// A key's charge and what it still holds, once nothing is in flight.
    fn spent(&self, key_id: &str) -> Result<i64, String> {
        for _ in 0..200 {
            let key = self.admin.get(&format!("/v1/keys/{key_id}"))?;
            let number = |name: &str| key.get(name).and_then(Value::as_i64).unwrap_or(-1);
            if number("in_flight") == 0 {
                return Ok(number("spent_nanodollars"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err("the key's requests do not settle".to_owned())
    }

    fn charged_exactly(&self, key_id: &str) -> Result<String, String> {
        let (spent, cost) = (self.spent(key_id)?, self.cost()?);
        expect(spent == cost && cost > 0, || format!("charged {spent}, true cost {cost} nanodollars"))
    }

    fn cap_holds(&self) -> Result<String, String> {
        const CAP: i64 = 300_000;
        let before = self.cost()?;
        let (key_id, token) = self.new_key("0.0003", &[])?;
        let body = json!({ "model": "gpt-4o-mini", "max_tokens": 60, "messages": [{ "role": "user", "content": "[[sim tokens=40]]" }] })
            .to_string();
        let auth = format!("authorization: Bearer {token}");
        let url = format!("{}/v1/chat/completions", self.base);
        let urls = vec![url.as_str(); 40];
        let mut arguments = vec![
            "-Z",
            "--parallel-immediate",
            "--parallel-max",
            "40",
            "-H",
            auth.as_str(),
            "-H",
            "content-type: application/json",
            "-d",
            body.as_str(),
            "-w",
            "status=%{http_code}\n",
        ];
        arguments.extend(urls);
        let answers = curl(&arguments)?;
        let count = |status: &str| answers.matches(&format!("status={status}")).count();
        let (served, refused) = (count("200"), count("429"));
        let (spent, cost) = (self.spent(&key_id)?, self.cost()? - before);
        let right = served > 0 && refused > 0 && served + refused == 40 && cost <= CAP && spent == cost;
        expect(right, || format!("{served} served, {refused} refused; true cost {cost} of {CAP} nanodollars"))
    }

    fn garbage_is_free(&self) -> Result<String, String> {
        let before = self.questions()?;
        let url = format!("{}/v1/models?key=vk_[1-1000]", self.base);
        let answers = curl(&["-o", "/dev/null", "-w", "%{http_code}\n", &url])?;
        let refused = answers.lines().filter(|line| *line == "401").count();
        let calls = self.questions()? - before;
        expect(refused == 1_000 && calls == 0, || format!("{refused} refused, {calls} calls"))
    }

    fn envoy_admin(&self, path: &str) -> Result<String, String> {
        let address = std::fs::read_to_string(self.directory.0.join("envoy-admin")).map_err(|error| error.to_string())?;
        curl(&[&format!("http://{}{path}", address.trim())])
    }

    /// Calls of Envoy's to the policy service that asked for an admission: all but those that go at times of their own, for news and
    /// with records.
    fn questions(&self) -> Result<i64, String> {
        const FILTER: &str = "/stats?filter=cluster.keyward_policy.upstream_rq_total|keyward_watch_polls_total";
        let (mut before, mut same) = (None, 0);
        for _ in 0..200 {
            let (stats, metrics) = (self.envoy_admin(FILTER)?, self.admin.get_text("/metrics")?);
            let count = |text: &str, name: &str| {
                let values =
                    text.lines().filter(|line| line.contains(name)).filter_map(|line| line.rsplit(' ').next()?.parse::<i64>().ok());
                values.sum::<i64>()
            };
            let polls = count(&stats, "keyward_watch_polls_total");
            let now = (count(&stats, "upstream_rq_total"), polls, count(&metrics, "keyward_edge_batches_total"));
            // The filter tells its counts once a tick, 50 ms: only where all stand still do they belong together.
            same = if before == Some(now) { same + 1 } else { 0 };
            if same == 3 {
                return Ok(now.0 - now.1 - now.2);
            }
            before = Some(now);
            std::thread::sleep(Duration::from_millis(60));
        }
        Err("the calls to the policy service do not come to rest".to_owned())
    }

    fn revoked(&self, key_id: &str, token: &str) -> Result<String, String> {
        self.admin.delete(&format!("/v1/keys/{key_id}"))?;
        let body = json!({ "model": "gpt-4o-mini", "messages": [] }).to_string();
        let auth = format!("authorization: Bearer {token}");
        let answer = curl(&["-H", &auth, "-d", &body, "-w", " %{http_code}", &format!("{}/v1/chat/completions", self.base)])?;
        expect(answer.ends_with(" 401") && answer.contains("\"revoked\""), || answer.rsplit(' ').next().unwrap_or_default().to_owned())
    }

    fn audit_verifies(&self, key_id: &str) -> Result<String, String> {
        let export = self.admin.get_text(&format!("/v1/audit/{key_id}/bundle"))?;
        let verified = audit::verify(&export)?;
        // One digit of the third entry's MAC.
        let mut lines: Vec<String> = export.lines().map(str::to_owned).collect();
        if let Some(line) = lines.get_mut(3) {
            let at = line.find("\"mac\":\"").map_or(0, |at| at + 7);
            let other = if line.get(at..=at) == Some("0") { "1" } else { "0" };
            line.replace_range(at..=at, other);
        }
        let found = audit::verify(&lines.join("\n")).err().unwrap_or_default();
        expect(found.starts_with("entry 3 "), || format!("{verified}; after the change: {found}"))
    }

    fn no_leak(&self, token: &str) -> Result<String, String> {
        let mut places = vec![
            ("config_dump".to_owned(), self.envoy_admin("/config_dump")?.into_bytes()),
            ("stats".to_owned(), self.envoy_admin("/stats")?.into_bytes()),
        ];
        for name in ["access.log", "envoy.log", "envoy.yaml", "keyward.db", "keyward.db-wal"] {
            if let Ok(bytes) = std::fs::read(self.directory.0.join(name)) {
                places.push((name.to_owned(), bytes));
            }
        }
        let secrets: Vec<&str> = SECRETS.iter().map(|(_, _, secret)| *secret).chain([token]).collect();
        for (name, bytes) in &places {
            if secrets.iter().any(|s| bytes.windows(s.len()).any(|w| w == s.as_bytes())) {
                return Err(format!("a secret stands in {name}"));
            }
        }
        Ok(format!("{} places searched", places.len()))
    }

    fn orderly_stop(&mut self) -> Result<String, String> {
        let (_, token) = self.new_key("1.00", &[])?;
        let body =
            json!({ "model": "gpt-4o-mini", "stream": true, "messages": [{ "role": "user", "content": "[[sim tokens=60 pace_ms=60]]" }] })
                .to_string();
        let auth = format!("authorization: Bearer {token}");
        let mut stream =
            spawn(Command::new("curl").args(["-sN", "-H", &auth, "-d", &body, &format!("{}/v1/chat/completions", self.base)]))?;
        first_line(&mut stream, |line| line.contains("delta"))?;
        let pid = self.up.0.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().map_err(|error| error.to_string())?;
        let mut rest = String::new();
        if let Some(mut output) = stream.0.stdout.take() {
            output.read_to_string(&mut rest).map_err(|error| error.to_string())?;
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.up.0.try_wait().map_err(|error| error.to_string())? {
                return expect(status.success() && rest.contains("[DONE]"), || {
                    format!("the stream {}, {status}", if rest.contains("[DONE]") { "finished" } else { "was cut" })
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err("it does not stop".to_owned())
    }
}

fn spawn(command: &mut Command) -> Result<Running, String> {
    let name = Path::new(command.get_program()).display().to_string();
    command.stdout(Stdio::piped()).spawn().map(Running).map_err(|error| format!("{name} can't be started: {error}"))
}

/// Reads a child's output up to the first line that fits.
fn first_line(child: &mut Running, fits: impl Fn(&str) -> bool) -> Result<String, String> {
    let output = child.0.stdout.as_mut().ok_or("a child without output")?;
    // Byte by byte, so that what follows stays for the next reader.
    let mut reader = BufReader::with_capacity(1, output);
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(0) | Err(_) => return Err("a part of the demo ended before it was ready".to_owned()),
            Ok(_) if fits(&line) => return Ok(line),
            Ok(_) => {}
        }
    }
}

fn curl(arguments: &[&str]) -> Result<String, String> {
    let output =
        Command::new("curl").args(["-sS", "--max-time", "30"]).args(arguments).output().map_err(|error| format!("curl: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

fn free_address() -> Result<String, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
    Ok(listener.local_addr().map_err(|error| error.to_string())?.to_string())
}
