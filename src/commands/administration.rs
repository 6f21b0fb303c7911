//! `keyward tokens`, `organisations`, `whoami`, `usage`, `audit`, `settle`: who may do what, and what happened.

use super::segment;
use crate::audit;
use crate::cli::{Access, out};
use crate::failure::{Exit, Failure};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub enum Tokens {
    /// Make an admin token and print it, once
    Create {
        #[command(flatten)]
        access: Access,
        #[arg(long, value_enum)]
        role: Role,
        /// A developer's team
        #[arg(long)]
        team: Option<String>,
        #[arg(long, default_value = "")]
        label: String,
        /// 30s, 10m, 12h, 7d
        #[arg(long)]
        expires_in: Option<String>,
    },
    /// List admin tokens, without the tokens
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Revoke an admin token
    Revoke {
        #[command(flatten)]
        access: Access,
        id: String,
    },
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Role {
    /// Everything
    Admin,
    /// Everything but admin tokens and organisations
    Operator,
    /// Reads everything, changes nothing
    Auditor,
    /// The keys of one team
    Developer,
}

pub fn run_tokens(command: Tokens) -> Result<(), Failure> {
    match command {
        Tokens::Create { access, role, team, label, expires_in } => {
            let role = role.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
            let body = json!({ "role": role, "team": team, "label": label, "expires_in": expires_in });
            access.print(&access.client()?.post("/v1/admin-tokens", &body)?, &["id", "role", "team", "token"])
        }
        Tokens::List { access } => {
            let columns = ["id", "role", "team", "label", "created_ms", "expires_ms", "revoked_ms"];
            access.print(&access.client()?.list("/v1/admin-tokens")?, &columns)
        }
        Tokens::Revoke { access, id } => access.client()?.delete(&format!("/v1/admin-tokens/{}", segment(&id)?)),
    }
}

#[derive(Subcommand)]
pub enum Organisations {
    /// List organisations
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Make an organisation and print its first admin token, once
    Create {
        #[command(flatten)]
        access: Access,
        /// org_ and lower-case letters, digits, _
        id: String,
        #[arg(long, default_value = "")]
        label: String,
    },
}

pub fn run_organisations(command: Organisations) -> Result<(), Failure> {
    match command {
        Organisations::List { access } => access.print(&access.client()?.list("/v1/organisations")?, &["id", "label", "revision"]),
        Organisations::Create { access, id, label } => {
            access.print(&access.client()?.post("/v1/organisations", &json!({ "id": id, "label": label }))?, &["id", "token"])
        }
    }
}

pub fn whoami(access: &Access) -> Result<(), Failure> {
    access.print(&access.client()?.get("/v1/whoami")?, &["token_id", "organisation", "role", "team"])
}

#[derive(Args)]
pub struct Usage {
    #[command(flatten)]
    access: Access,
    /// What to sum by: day, team, key, provider, model, tag:NAME; with --would-deny also reason; repeat or separate by commas
    #[arg(long, value_delimiter = ',')]
    by: Vec<String>,
    /// First day, UTC; default: 30 days before the last
    #[arg(long)]
    from: Option<String>,
    /// Last day, UTC; default: today
    #[arg(long)]
    to: Option<String>,
    #[arg(long)]
    team: Option<String>,
    #[arg(long)]
    key: Option<String>,
    /// What keys in shadow mode would have been refused
    #[arg(long)]
    would_deny: bool,
}

pub fn usage(options: &Usage) -> Result<(), Failure> {
    // Why they would be refused is what one asks first.
    let by = if options.would_deny && options.by.is_empty() { vec!["reason".to_owned()] } else { options.by.clone() };
    let mut query = format!("?by={}", by.join(","));
    for (name, value) in [("from", &options.from), ("to", &options.to), ("team", &options.team), ("key", &options.key)] {
        if let Some(value) = value {
            query.push_str(&format!("&{name}={}", segment(value)?));
        }
    }
    let path = if options.would_deny { "/v1/usage/would-deny" } else { "/v1/usage" };
    let mut sums = options.access.client()?.list(&format!("{path}{query}"))?;
    // A table has one column for each thing it is summed by.
    for sum in sums.as_array_mut().into_iter().flatten() {
        if let Some(Value::Object(by)) = sum.get("by").cloned()
            && let Some(row) = sum.as_object_mut()
            && options.access.is_table()
        {
            row.extend(by);
        }
    }
    let mut columns: Vec<&str> = by.iter().map(String::as_str).collect();
    columns.extend(if options.would_deny { &["requests"][..] } else { &["requests", "input_tokens", "output_tokens", "spent_usd"] });
    options.access.print(&sums, &columns)
}

#[derive(Subcommand)]
pub enum Audit {
    /// Print a chain's newest entries
    Tail {
        #[command(flatten)]
        access: Access,
        /// A key's id, or adm_ and the organisation's id for administrative changes
        key: String,
        /// Go on printing new ones
        #[arg(long, short)]
        follow: bool,
    },
    /// Print a whole chain with what is needed to verify it
    Export {
        #[command(flatten)]
        access: Access,
        key: String,
    },
    /// Verify an exported chain, offline
    Verify {
        /// The export; - for standard input
        file: PathBuf,
    },
}

pub fn run_audit(command: Audit) -> Result<(), Failure> {
    match command {
        Audit::Tail { access, key, follow } => Ok(audit::tail(&access.client()?, &segment(&key)?, follow)?),
        Audit::Export { access, key } => Ok(out(&access.client()?.get_text(&format!("/v1/audit/{}/bundle", segment(&key)?))?)?),
        Audit::Verify { file } => {
            let text = if file.as_os_str() == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(&file) };
            let text = text.map_err(|error| format!("{}: {error}", file.display()))?;
            let verified = audit::verify(&text).map_err(|broken| Failure::new(Exit::Differs, broken))?;
            Ok(out(&format!("ok: {verified}\n"))?)
        }
    }
}

#[derive(Subcommand)]
pub enum Settle {
    /// Recover what a dead Envoy never sent, from its access log
    Import {
        #[command(flatten)]
        access: Access,
        /// Envoy's access log
        file: PathBuf,
    },
}

/// Records sent in one call.
const IMPORT_LINES: usize = 5_000;

pub fn import_settlements(access: &Access, file: &Path) -> Result<(), Failure> {
    let log = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let record = |line: &[u8]| serde_json::from_slice::<Value>(line).ok()?.get("settle")?.as_str().map(str::to_owned);
    let records: Vec<String> = log.split(|&b| b == b'\n').filter_map(record).collect();
    let client = access.client()?;
    let progress = progress(records.len() as u64, "records");
    let (mut taken, mut rejected) = (0, 0);
    for chunk in records.chunks(IMPORT_LINES) {
        let answer = client.post_text("/v1/settlements/import", &chunk.join("\n"))?;
        let count = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
        taken += count("taken");
        rejected += count("rejected");
        progress.inc(chunk.len() as u64);
    }
    progress.finish_and_clear();
    out(&format!("{taken} records taken (those known already are ignored), {rejected} rejected\n"))?;
    if rejected > 0 { Err("some records have a wrong MAC: the log was changed, or is another installation's".into()) } else { Ok(()) }
}

/// A bar on a terminal, and nothing elsewhere.
fn progress(length: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr()).with_style(style).with_message(what)
}
