//! Envoy itself: its binary, the process, its flags, its configuration file and the module that it loaded.

use super::configuration::{Address, Configuration};
use super::report::{Findings, Outcome};
use super::wire;
use crate::envoy::{self, FILTER, VERSIONS};
use keyward_core::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// The filter tells its first counts on its first tick, 50 ms after its start.
const FIRST_TICK: Duration = Duration::from_secs(2);
/// Longest message of Envoy's that is repeated, in characters.
const MESSAGE: usize = 500;

fn supported() -> String {
    format!("1.{} to 1.{}", VERSIONS.start(), VERSIONS.end())
}

/// The binary on this machine, and its minor version if it can be used.
pub fn binary(bin: &Path, is_running: bool) -> (Outcome, Option<u32>) {
    let cure = format!("install Envoy {} and name it by --envoy-bin or ENVOY_BIN", supported());
    match envoy::minor_version(bin) {
        Ok(minor) if VERSIONS.contains(&minor) => (Outcome::ok(format!("{} is Envoy 1.{minor}", bin.display())), Some(minor)),
        Ok(minor) => (Outcome::fault(format!("{} is Envoy 1.{minor}; {} are supported", bin.display(), supported()), cure), None),
        // Envoy may run in a container of its own.
        Err(_) if is_running => {
            (Outcome::warn(format!("there is no Envoy at {}: configurations can't be tried out here", bin.display()), cure), None)
        }
        Err(_) => (Outcome::fault(format!("there is no Envoy at {}", bin.display()), cure), None),
    }
}

/// What a running Envoy says of itself.
pub struct Process {
    pub minor: Option<u32>,
    pub config_path: PathBuf,
    info: Value,
    started: Option<SystemTime>,
}

impl Process {
    fn flag(&self, name: &str) -> &str {
        self.info.get("command_line_options").and_then(|flags| flags.get(name)).and_then(Value::as_str).unwrap_or_default()
    }
}

/// Asks Envoy's admin port who is there.
pub fn process(admin: &str) -> (Outcome, Option<Process>) {
    let cure = "start Envoy (keyward up does), or name its admin port by --envoy-admin; the last lines of its log say why it ended";
    let text = match wire::get(&format!("http://{admin}/server_info"), None) {
        Ok(text) if text.status == 200 => text.body,
        Ok(text) => return (Outcome::fault(format!("{admin} is not Envoy's admin port: it answers {}", text.status), cure), None),
        Err(error) => return (Outcome::fault(format!("Envoy's admin port {admin} can't be reached ({error})"), cure), None),
    };
    let Ok(info) = serde_json::from_str::<Value>(&text) else {
        return (Outcome::fault(format!("{admin} is not Envoy's admin port: it answers something else"), cure), None);
    };
    let field = |name: &str| info.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (state, version) = (field("state"), field("version"));
    let outcome = match state.as_str() {
        "LIVE" => Outcome::ok(format!("{admin}: LIVE, {}", version.split('/').nth(1).unwrap_or(&version))),
        "DRAINING" => {
            Outcome::fault(format!("{admin}: Envoy is DRAINING: it takes no new connections"), "start it again once it has ended")
        }
        other => Outcome::fault(
            format!("{admin}: Envoy is in state {other}"),
            "wait; if it stays so, a listener or cluster waits for its configuration: see Envoy's log",
        ),
    };
    let started = seconds(&field("uptime_current_epoch")).and_then(|up| SystemTime::now().checked_sub(up));
    let mut process = Process { minor: envoy::minor_of(&version), config_path: PathBuf::new(), info, started };
    process.config_path = PathBuf::from(process.flag("config_path"));
    (outcome, Some(process))
}

/// `0.100s` and `600s`.
fn seconds(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.strip_suffix('s')?.parse().ok()?).ok()
}

/// The running version against the one that the configuration was rendered for.
pub fn version(process: &Process, rendered: Option<u32>) -> Outcome {
    let Some(minor) = process.minor else { return Outcome::warn("Envoy does not tell its version", "use a released Envoy") };
    if !VERSIONS.contains(&minor) {
        return Outcome::fault(format!("Envoy 1.{minor} is running; {} are supported", supported()), "run a supported Envoy");
    }
    match rendered {
        Some(rendered) if rendered != minor => Outcome::fault(
            format!("Envoy 1.{minor} is running with a configuration for Envoy 1.{rendered}"),
            format!("render it for this one (keyward envoy render --envoy {minor}) and start Envoy with it"),
        ),
        Some(_) => Outcome::ok(format!("Envoy 1.{minor}, for which the configuration was rendered")),
        None => Outcome::ok(format!("Envoy 1.{minor}; the configuration does not say what it was rendered for")),
    }
}

/// What a rendered configuration says in its first line.
pub fn rendered_for(file: &str) -> Option<u32> {
    let (_, rest) = file.lines().find_map(|line| line.split_once("Keyward in Envoy 1."))?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Flags that stopping in order and recovery after a crash rest on.
pub fn flags(process: &Process, admin: Option<&Address>) -> Outcome {
    let mut findings = Findings::default();
    let strategy = process.flag("drain_strategy");
    if !strategy.eq_ignore_ascii_case("immediate") {
        let found = format!("the drain strategy is {strategy:?}: connections stay open for minutes after the drain");
        findings.warn(found, "start Envoy with --drain-strategy immediate");
    }
    let flush = process.flag("file_flush_interval");
    if seconds(flush).is_none_or(|interval| interval > Duration::from_secs(1)) {
        let found = format!("the access log is written only every {flush}: a crash loses the records of that time");
        findings.warn(found, "start Envoy with --file-flush-interval-msec 100");
    }
    let level = process.flag("log_level");
    if matches!(level, "debug" | "trace") {
        let found = format!("Envoy's log level is {level}: its log shows every header, credentials included");
        findings.warn(found, "start Envoy with --log-level warning, delete what was logged, rotate the credentials");
    }
    if let Some(admin) = admin.filter(|admin| !admin.is_loopback()) {
        let found = format!("Envoy's admin port is at {admin}: whoever reaches it can stop Envoy");
        findings.warn(found, "let it listen on 127.0.0.1");
    }
    let workers = process.info.pointer("/command_line_options/concurrency").and_then(Value::as_u64).unwrap_or(0);
    findings.or_ok(format!("drains at once, access log every {flush}, {workers} workers"))
}

/// Loads a configuration, module included, in an Envoy that serves nothing.
pub fn loads(bin: &Path, minor: Option<u32>, file: Option<&Path>) -> Outcome {
    let Some(file) = file else { return Outcome::not_checked("no configuration file is known: name it by --envoy-config") };
    let Some(minor) = minor else { return Outcome::not_checked("there is no supported Envoy here to try it with: see envoy-binary") };
    match envoy::validate(bin, file) {
        Ok(()) => Outcome::ok(format!("Envoy 1.{minor} loads {}", file.display())),
        Err(message) => {
            // The last line that speaks of an error is the cause; before it, and before the word, stands where Envoy was.
            let cause = |line: &str| line.find("error").and_then(|at| line.get(at..)).map(str::to_owned);
            let line = message.lines().rev().find_map(cause).unwrap_or_else(|| message.trim().to_owned());
            let line: String = line.chars().take(MESSAGE).collect();
            let cure = "correct what the message names, or render the configuration again (keyward envoy render)";
            Outcome::fault(format!("Envoy 1.{minor} does not load {}: {line}", file.display()), cure)
        }
    }
}

/// Everything that Envoy runs with.
pub fn running(admin: &str) -> Result<Configuration, String> {
    let text = wire::get(&format!("http://{admin}/config_dump"), None)?.body;
    Configuration::from_dump(&serde_json::from_str(&text).map_err(|error| error.to_string())?)
}

/// The module lives in Envoy's VMs and the gate has told its counts.
pub fn filter_runs(admin: &str, has_gate: bool) -> Outcome {
    let deadline = Instant::now() + FIRST_TICK;
    loop {
        let text = match wire::get(&format!("http://{admin}/stats?filter=wasm"), None) {
            Ok(text) => text.body,
            Err(error) => return Outcome::not_checked(format!("Envoy's statistics can't be read: {error}")),
        };
        let sum = |suffix: &str| -> u64 {
            let value = |line: &str| line.split_once(": ").filter(|(name, _)| name.ends_with(suffix))?.1.trim().parse::<u64>().ok();
            text.lines().filter_map(value).sum()
        };
        let active = sum("envoy.wasm.runtime.v8.active");
        if active == 0 {
            let cure = "see Envoy's log for why the module was not loaded; an Envoy built without V8 can't load any";
            return Outcome::fault("no Wasm VM is active in Envoy", cure);
        }
        let speaks = text.contains("keyward_settlements_pending");
        if has_gate && !speaks && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        if has_gate && !speaks {
            let found = format!("{active} VMs are active, but the gate does not tell its counts (keyward_settlements_pending)");
            return Outcome::fault(found, "see Envoy's log: the module is not Keyward's, or its configuration was refused");
        }
        let traps = sum(".vm_reload");
        if traps > 0 {
            let found = format!("{active} VMs are active; {traps} times a VM was made anew after a trap");
            return Outcome::warn(found, "Envoy's log says what trapped: report it");
        }
        return Outcome::ok(format!("{active} VMs are active, none was ever made anew"));
    }
}

/// The module's file against the module in this command.
pub fn filter_version(running: &Configuration, process: &Process) -> Outcome {
    let attempts = running.clusters.iter().filter_map(|cluster| super::configuration::plugin(&cluster.filters, "attempt"));
    let plugins = running.gates().map(|(_, _, gate)| gate).chain(attempts.map(|(_, attempt)| attempt));
    let Some(file) = plugins.filter_map(|plugin| plugin.module()).next() else {
        return Outcome::not_checked("no plugin loads the module from a file");
    };
    let cure = format!("keyward filter export {file}, and restart Envoy; or use the keyward of that version");
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) => return Outcome::warn(format!("{file} can't be read here ({error})"), "run keyward doctor where Envoy runs"),
    };
    let sum = |bytes: &[u8]| hex::encode(&Sha256::digest(bytes)).chars().take(12).collect::<String>();
    let (theirs, ours) = (sum(&bytes), sum(FILTER));
    if bytes != FILTER {
        let version = env!("CARGO_PKG_VERSION");
        return Outcome::fault(format!("{file} (sha256 {theirs}) is not the module of keyward {version} (sha256 {ours})"), cure);
    }
    let changed = std::fs::metadata(file).and_then(|meta| meta.modified()).ok();
    // Envoy tells its age in whole seconds.
    let slack = Duration::from_secs(2);
    if let (Some(changed), Some(started)) = (changed, process.started)
        && changed > started + slack
    {
        let found = format!("{file} was written after Envoy started: what runs may be an older module");
        return Outcome::warn(found, "restart Envoy");
    }
    Outcome::ok(format!("{file} is the module of this keyward (sha256 {ours})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendered_file_says_for_which_envoy() {
        assert_eq!(rendered_for(&envoy::Rendering::example(38).yaml().unwrap()), Some(38));
        assert_eq!(rendered_for("static_resources: {}"), None);
    }

    fn process(flags: Value) -> Process {
        let info = serde_json::json!({ "command_line_options": flags });
        Process { minor: Some(40), config_path: PathBuf::new(), info, started: None }
    }

    /// None of them stops an installation from working, each costs something later.
    #[test]
    fn flags_are_warnings() {
        use crate::doctor::report::Status;
        let good =
            serde_json::json!({"drain_strategy": "Immediate", "file_flush_interval": "0.100s", "log_level": "warning", "concurrency": 2});
        assert_eq!(flags(&process(good.clone()), None).status, Status::Ok);
        for (flag, value) in [("drain_strategy", "Gradual"), ("file_flush_interval", "10s"), ("log_level", "debug")] {
            let mut changed = good.clone();
            changed[flag] = value.into();
            let outcome = flags(&process(changed), None);
            assert_eq!(outcome.status, Status::Warn, "{flag}");
            assert!(outcome.cure.is_some());
        }
        let open = Address { host: "0.0.0.0".to_owned(), port: 9901 };
        assert_eq!(flags(&process(good), Some(&open)).status, Status::Warn);
    }
}
