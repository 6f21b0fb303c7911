//! The policy service and what stands around it: its ports, tokens, files, credentials, the clock, the disk.

use super::configuration::{Authorities, Configuration, Manager};
use super::report::{Findings, Outcome};
use super::wire::{self, Place, Trust, exchange};
use crate::client::Client;
use keyward_core::edge::SETTLE_PATH;
use keyward_core::token::VirtualKey;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Under this, in bytes, the next hour may end with a full disk.
const LEAST_SPACE: u64 = 100 * 1024 * 1024;
/// Seconds.
const CLOCK_WARN: u64 = 5;
const CLOCK_FAULT: u64 = 60;

/// Whether the service says that it is ready, and how far its clock is ahead of this one, in seconds.
pub fn ready(admin: &str) -> (Outcome, Option<i64>) {
    let start = "start it (keyward up, or keyward-policy-service), or name its admin API by --admin; its log says why it ended";
    match wire::get(&format!("{admin}/readyz"), None) {
        Ok(text) if text.status == 200 && text.body.trim() == "ready" => (Outcome::ok(format!("{admin} is ready")), text.clock_ahead),
        Ok(text) if text.status == 503 => {
            let found = format!("{admin} is there and not ready: {}", detail(&text.body));
            (Outcome::fault(found, "see its log: the disk may be full, or the database held by another process"), text.clock_ahead)
        }
        Ok(text) => (Outcome::fault(format!("{admin} is not the admin API: it answers {}", text.status), start), None),
        Err(error) => (Outcome::fault(format!("{admin} can't be reached ({error})"), start), None),
    }
}

fn detail(body: &str) -> String {
    let problem: Value = serde_json::from_str(body).unwrap_or_default();
    problem.get("detail").and_then(Value::as_str).unwrap_or("no details").to_owned()
}

/// Whose token it is; whether it may read credentials.
pub fn admin_token(admin: &str, token: Option<&str>) -> (Outcome, bool) {
    let cure = "set KEYWARD_ADMIN_TOKEN to a token that is still valid; keyward up makes a new one when the file admin-token is gone";
    let Some(token) = token else { return (Outcome::warn("there is no admin token here: credentials can't be looked at", cure), false) };
    let text = match wire::get(&format!("{admin}/v1/whoami"), Some(token)) {
        Ok(text) => text,
        Err(error) => return (Outcome::not_checked(error), false),
    };
    let who: Value = serde_json::from_str(&text.body).unwrap_or_default();
    let field = |name: &str| who.get(name).and_then(Value::as_str).unwrap_or("unknown").to_owned();
    match text.status {
        200 => (Outcome::ok(format!("role {}, organisation {}", field("role"), field("organisation"))), field("role") != "developer"),
        401 => (Outcome::fault("the policy service does not know this admin token: it is wrong, expired or revoked", cure), false),
        other => (Outcome::fault(format!("the policy service answers {other}: {}", detail(&text.body)), cure), false),
    }
}

/// The files by which Envoy and the service know the edge token.
pub struct EdgeToken {
    /// Named by Envoy's configuration file.
    pub envoys: Option<PathBuf>,
    /// In the data directory.
    pub services: Option<PathBuf>,
}

impl EdgeToken {
    /// What Envoy would send.
    fn sent(&self) -> Option<&PathBuf> {
        self.envoys.as_ref().or(self.services.as_ref())
    }
}

fn open_to_others(file: &Path) -> Option<u32> {
    let mode = std::fs::metadata(file).ok()?.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then_some(mode)
}

/// Only its owner may read it.
pub fn edge_token_file(token: &EdgeToken) -> Outcome {
    let Some(sent) = token.sent() else {
        return Outcome::not_checked("neither Envoy's configuration file nor the data directory tells where the edge token is");
    };
    let mut findings = Findings::default();
    if let Err(error) = std::fs::read_to_string(sent) {
        let found = format!("{} can't be read ({error})", sent.display());
        findings.fault(found, "name the policy service's edge-token in the secret keyward_edge_token, or run keyward doctor as its owner");
    }
    let mut files = vec![sent];
    files.extend(token.services.iter().filter(|file| *file != sent));
    for file in files {
        if let Some(mode) = open_to_others(file) {
            let found = format!("{} has mode {mode:04o}: whoever reads it gets every credential", file.display());
            findings.fault(
                found,
                format!("chmod 600 {}; if others were on this machine, delete it, restart the service, then Envoy", file.display()),
            );
        }
    }
    findings.or_ok(format!("{}, readable by its owner alone", sent.display()))
}

/// The edge API takes Envoy's token and no other.
pub fn edge_token(token: &EdgeToken, known: Option<&Configuration>, is_service_up: bool) -> Outcome {
    let Some(known) = known else { return Outcome::not_checked("Envoy's configuration is not known") };
    let policy = known.policy_cluster();
    let Some((cluster, endpoint)) = known.cluster(&policy).and_then(|cluster| Some((cluster, cluster.endpoints.first()?))) else {
        return Outcome::not_checked(format!("the address of cluster {policy} is not in the configuration"));
    };
    let Some(file) = token.sent() else { return Outcome::not_checked("where the edge token is, is not known") };
    let Ok(text) = std::fs::read_to_string(file) else { return Outcome::not_checked(format!("{} can't be read", file.display())) };
    let trust = match &cluster.tls {
        None => None,
        Some(tls) => match &tls.authorities {
            Some(authorities) if !matches!(authorities, Authorities::Elsewhere(_)) => Some(Trust { name: &tls.sni, authorities }),
            _ => return Outcome::not_checked(format!("cluster {policy}: its certificate authorities are known to Envoy alone")),
        },
    };
    let place = Place { address: &endpoint.host, port: endpoint.port, host: &endpoint.host, trust };
    // A batch of no records: it changes nothing.
    let vm: String = "0".repeat(32);
    let ask = |token: &str| {
        let headers = [("authorization", token), ("content-type", "text/plain")];
        exchange(&place, "POST", SETTLE_PATH, &headers, format!("KB1 {vm} 0 {{}}\n").as_bytes())
    };
    let at = format!("the edge API at {endpoint}");
    let status = match ask(text.trim()) {
        Ok(answer) => answer.status,
        Err(_) if !is_service_up => return Outcome::not_checked("the policy service can't be reached: see policy-service"),
        Err(failure) => {
            let cure = format!("let cluster {policy} name the address that the service listens on (keyward-policy-service --edge)");
            return Outcome::fault(format!("{at} can't be reached ({failure})"), cure);
        }
    };
    match status {
        200 => match ask("Bearer kwe_none").map(|answer| answer.status) {
            Ok(401) => Outcome::ok(format!("{at} takes the token in {}, and no other", file.display())),
            Ok(other) => Outcome::fault(
                format!("{at} answers {other} to a wrong token"),
                format!("something else than the policy service answers there: correct the address of cluster {policy}"),
            ),
            Err(_) => Outcome::warn(format!("{at} takes the token, then stopped answering"), "run keyward doctor again"),
        },
        401 => refused_token(token, file, &at),
        other => Outcome::fault(format!("{at} answers {other}"), format!("see the service's log, and the address of cluster {policy}")),
    }
}

fn refused_token(token: &EdgeToken, file: &Path, at: &str) -> Outcome {
    let read = |file: &Path| std::fs::read_to_string(file).ok().map(|text| text.trim().to_owned());
    let other = token.services.as_deref().filter(|services| read(services).is_some() && read(services) != read(file));
    match other {
        Some(services) => Outcome::fault(
            format!("{at} refuses Envoy's token: {} differs from the service's {}", file.display(), services.display()),
            format!("let the secret keyward_edge_token in Envoy's configuration name {}, and restart Envoy", services.display()),
        ),
        None => Outcome::fault(
            format!("{at} refuses the token in {}: it was changed since the service started, or is another service's", file.display()),
            "restart the policy service, then Envoy, so that both read the same file",
        ),
    }
}

/// The other secrets at rest.
pub fn secret_files(data: &Path) -> Outcome {
    if !data.is_dir() {
        return Outcome::not_checked(format!("the data directory {} is not here", data.display()));
    }
    let mut findings = Findings::default();
    let mut seen = Vec::new();
    for name in ["kek", "root", "admin-token"] {
        let file = data.join(name);
        if !file.exists() {
            continue;
        }
        seen.push(name);
        if let Some(mode) = open_to_others(&file) {
            let what = if name == "kek" { ": it opens every stored credential" } else { "" };
            findings.fault(format!("{} has mode {mode:04o}{what}", file.display()), format!("chmod 600 {}", file.display()));
        }
    }
    let kek = if seen.contains(&"kek") { "" } else { "; no file kek: the service has it from KEYWARD_KEK" };
    findings.or_ok(format!("{}: readable by their owner alone{kek}", seen.join(", ")))
}

/// A request with a key that was never issued goes all the way to the policy service and comes back refused.
pub fn gate_answers(manager: &Manager) -> Outcome {
    let Some(address) = &manager.address else { return Outcome::not_checked("the listener's address is not in the configuration") };
    if manager.tls {
        return Outcome::not_checked(format!("listener {} speaks TLS", manager.listener));
    }
    let host = match address.host.as_str() {
        "0.0.0.0" => "127.0.0.1",
        "::" => "::1",
        host => host,
    };
    // Always the same key: it is known to nobody, so it can be told apart in a log.
    let never = VirtualKey::generate(Sha256::digest(b"keyward doctor: a key that was never issued").into());
    let place = Place { address: host, port: address.port, host, trust: None };
    let bearer = format!("Bearer {}", never.reveal());
    let answer = match exchange(&place, "GET", "/v1/models", &[("authorization", &bearer)], b"") {
        Ok(answer) => answer,
        Err(failure) => return Outcome::fault(format!("listener {address} does not answer ({failure})"), "see Envoy's log"),
    };
    match answer.header("x-keyward-reason") {
        Some("unknown_key") => Outcome::ok(format!("{address} refuses a key that was never issued (unknown_key)")),
        Some("policy_unavailable") => Outcome::fault(
            format!("{address} refuses everything (policy_unavailable): the gate gets no answer from the policy service"),
            "restart Envoy: it may hold an older edge token; else see its log",
        ),
        Some(other) => Outcome::fault(
            format!("{address} refuses a key that was never issued with {other} instead of unknown_key"),
            "see Envoy's log and the refusal in docs/operations.md",
        ),
        None => Outcome::fault(
            format!("{address} answers {} without a word of the gate's: the request passed it", answer.status),
            "stop this Envoy; then find what stands between listener and gate",
        ),
    }
}

/// Some provider that the configuration leads to has something to be called with. Gives those that have, where that could be seen.
pub fn credentials(admin: &str, token: &str, providers: &[String]) -> (Outcome, Option<Vec<String>>) {
    let list = match Client::new(admin, token).list("/v1/credentials") {
        Ok(list) => list,
        Err(error) => return (Outcome::not_checked(error), None),
    };
    let stored = |provider: &&String| {
        let is = |credential: &Value| credential.get("provider").and_then(Value::as_str) == Some(provider.as_str());
        list.as_array().is_some_and(|all| all.iter().any(is))
    };
    let (with, without): (Vec<&String>, Vec<&String>) = providers.iter().partition(stored);
    let names = |all: &[&String]| all.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    let cure = |name: &str| format!("keyward credentials add {name}");
    let outcome = match (with.as_slice(), without.as_slice()) {
        ([], [first, ..]) => Outcome::fault(format!("no credential is stored for {}: nothing can be called", names(&without)), cure(first)),
        (_, []) => Outcome::ok(format!("stored for {}", names(&with))),
        // Nobody has them all.
        _ => Outcome::ok(format!("stored for {}; none for {}", names(&with), names(&without))),
    };
    (outcome, Some(with.into_iter().cloned().collect()))
}

/// This machine's clock against all others that were seen, in seconds that they are ahead.
pub fn clock(others: &[(String, i64)]) -> Outcome {
    let Some((whose, ahead)) = others.iter().max_by_key(|(_, ahead)| ahead.unsigned_abs()) else {
        return Outcome::not_checked("nothing answered with its time");
    };
    let way = if *ahead < 0 { "behind" } else { "ahead of" };
    let found = format!("{whose}: its clock is {} s {way} this machine's", ahead.unsigned_abs());
    let cure =
        format!("set both clocks right (NTP: timedatectl set-ntp true), this machine's and that of {whose}; expiry and budgets go by them");
    match ahead.unsigned_abs() {
        off if off > CLOCK_FAULT => Outcome::fault(found, cure),
        off if off > CLOCK_WARN => Outcome::warn(found, cure),
        _ => {
            let names: Vec<&str> = others.iter().map(|(name, _)| name.as_str()).collect();
            Outcome::ok(format!("within {CLOCK_WARN} s of {}", names.join(", ")))
        }
    }
}

/// Room for the ledger: without it nothing is admitted.
pub fn disk(data: &Path) -> Outcome {
    let stat = match rustix::fs::statvfs(data) {
        Ok(stat) => stat,
        Err(error) => return Outcome::not_checked(format!("{}: {error}", data.display())),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let found = format!("{} has {} MiB free", data.display(), free / (1024 * 1024));
    if free < LEAST_SPACE {
        return Outcome::fault(found, "make room: on a full disk every request is refused (audit_unavailable)");
    }
    Outcome::ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Status;

    #[test]
    fn the_clock_that_is_farthest_off_decides() {
        let at = |a: i64, b: i64| clock(&[("the policy service".to_owned(), a), ("openai".to_owned(), b)]);
        assert_eq!(at(1, -5).status, Status::Ok);
        assert_eq!(at(-6, 0).status, Status::Warn);
        assert_eq!(at(60, 0).status, Status::Warn);
        let far = at(2, -3600);
        assert!(far.is_fault() && far.found.contains("openai") && far.found.contains("3600 s behind"), "{far:?}");
        assert_eq!(clock(&[]).status, Status::NotChecked);
    }
}
