//! The command line: what can be asked, and who does it.

use crate::client::Client;
use crate::envoy::{self, Endpoint, Rendering};
use crate::{audit, up};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::io::{Read, Write};
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "keyward", version, about = "Virtual keys inside Envoy")]
pub struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a gateway on loopback: policy service and Envoy with the filter
    Up(up::UpOptions),
    /// Walk through the promises against the provider simulator
    Demo(crate::demo::DemoOptions),
    /// Check an installation: what is wrong, and its cure
    Doctor(crate::doctor::DoctorOptions),
    /// Virtual keys
    #[command(subcommand)]
    Keys(Keys),
    /// Provider credentials in the vault
    #[command(subcommand)]
    Credentials(Credentials),
    /// Vault strings: many providers' keys, encrypted, in one line of text
    #[command(subcommand)]
    Vault(crate::vault::Vault),
    /// Audit chains
    #[command(subcommand)]
    Audit(Audit),
    /// Records of ended requests
    #[command(subcommand)]
    Settle(Settle),
    /// Envoy's configuration
    #[command(subcommand)]
    Envoy(Envoy),
    /// The Wasm module
    #[command(subcommand)]
    Filter(Filter),
}

/// How to reach the admin API.
#[derive(Args, Clone)]
pub struct Access {
    /// Admin API
    #[arg(long, env = "KEYWARD_ADMIN", default_value = "http://127.0.0.1:7802")]
    admin: String,
    /// Admin token; without it the file `admin-token` in the data directory
    #[arg(long, env = "KEYWARD_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// Data directory of `keyward up`
    #[arg(long, env = "KEYWARD_DATA", default_value = ".keyward")]
    data: PathBuf,
    /// How to print
    #[arg(long, default_value = "table")]
    output: Output,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

impl Access {
    pub fn client(&self) -> Result<Client, String> {
        let token = match &self.admin_token {
            Some(token) => token.clone(),
            None => {
                let file = self.data.join("admin-token");
                let explain = |error| format!("no admin token: set KEYWARD_ADMIN_TOKEN, or run where {} is ({error})", file.display());
                std::fs::read_to_string(&file).map_err(explain)?
            }
        };
        Ok(Client::new(&self.admin, token.trim()))
    }

    pub fn print(&self, value: &serde_json::Value, columns: &[&str]) -> Result<(), String> {
        match self.output {
            Output::Json => out(&format!("{value:#}\n")),
            Output::Table => out(&table(value, columns)),
        }
    }
}

#[derive(Subcommand)]
enum Keys {
    /// Make a key and print its token, once
    Create {
        #[command(flatten)]
        access: Access,
        #[arg(long, default_value = "")]
        label: String,
        /// Hard cap in dollars over the key's whole life, such as 25.00
        #[arg(long)]
        budget: Option<String>,
        /// Models it may use (globs); repeat for more; none: any
        #[arg(long = "model")]
        models: Vec<String>,
        /// Endpoints it may call, such as "POST /v1/chat/completions"; repeat for more; none: any
        #[arg(long = "endpoint")]
        endpoints: Vec<String>,
        /// 30s, 10m, 12h, 7d
        #[arg(long)]
        expires_in: Option<String>,
    },
    /// List keys
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Show one key
    Show {
        #[command(flatten)]
        access: Access,
        id: String,
    },
    /// Revoke a key for good
    Revoke {
        #[command(flatten)]
        access: Access,
        id: String,
    },
}

#[derive(Subcommand)]
enum Credentials {
    /// Store a provider's key; it is read from the environment or from standard input, never from the command line
    Add {
        #[command(flatten)]
        access: Access,
        /// openai, anthropic
        provider: String,
        /// Name of the environment variable that holds the secret; without it, standard input
        #[arg(long)]
        from_env: Option<String>,
        #[arg(long, default_value = "")]
        label: String,
        /// Provider account whose limits it shares; default: its own
        #[arg(long)]
        account: Option<String>,
    },
    /// List credentials, without their secrets
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Remove a credential
    Remove {
        #[command(flatten)]
        access: Access,
        id: String,
    },
}

#[derive(Subcommand)]
enum Audit {
    /// Print a key's newest entries
    Tail {
        #[command(flatten)]
        access: Access,
        key: String,
        /// Go on printing new ones
        #[arg(long, short)]
        follow: bool,
    },
    /// Print a key's whole chain with what is needed to verify it
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

#[derive(Subcommand)]
enum Settle {
    /// Recover what a dead Envoy never sent, from its access log
    Import {
        #[command(flatten)]
        access: Access,
        /// Envoy's access log
        file: PathBuf,
    },
}

#[derive(Subcommand)]
enum Envoy {
    /// Print a complete configuration
    Render(Box<RenderOptions>),
    /// Load a configuration as Envoy does, module included
    Validate { file: PathBuf },
}

#[derive(Args)]
struct RenderOptions {
    /// Minor version of Envoy 1.x: 36 to 40
    #[arg(long, default_value_t = 40)]
    envoy: u32,
    /// Send a provider elsewhere: openai=http://127.0.0.1:9000
    #[arg(long = "provider")]
    providers: Vec<String>,
    #[arg(long)]
    listen: Option<std::net::SocketAddr>,
    #[arg(long)]
    envoy_admin: Option<std::net::SocketAddr>,
    /// Edge port of the policy service
    #[arg(long)]
    policy: Option<std::net::SocketAddr>,
    #[arg(long)]
    edge_token_file: Option<PathBuf>,
    #[arg(long)]
    filter: Option<PathBuf>,
    #[arg(long)]
    access_log: Option<PathBuf>,
    #[arg(long)]
    max_body_bytes: Option<u64>,
    /// Certificate authorities that providers are verified with
    #[arg(long)]
    provider_ca: Option<PathBuf>,
    #[arg(long, requires = "listen_key")]
    listen_certificate: Option<PathBuf>,
    #[arg(long, requires = "listen_certificate")]
    listen_key: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Filter {
    /// Write the Wasm module to a file
    Export { file: PathBuf },
}

/// Carries out a command. The error is what a person needs to know.
pub fn run(options: Options) -> Result<(), String> {
    match options.command {
        Command::Up(options) => up::run(options),
        Command::Demo(options) => crate::demo::run(&options),
        Command::Doctor(options) => crate::doctor::run(options),
        Command::Keys(keys) => run_keys(keys),
        Command::Credentials(credentials) => run_credentials(credentials),
        Command::Vault(vault) => crate::vault::run(vault),
        Command::Audit(command) => run_audit(command),
        Command::Settle(Settle::Import { access, file }) => import_settlements(&access, &file),
        Command::Envoy(command) => run_envoy(command),
        Command::Filter(Filter::Export { file }) => {
            std::fs::write(&file, envoy::FILTER).map_err(|error| format!("{}: {error}", file.display()))
        }
    }
}

const KEY_COLUMNS: [&str; 7] = ["id", "label", "status", "budget_usd", "spent_usd", "reserved_usd", "in_flight"];

fn run_keys(command: Keys) -> Result<(), String> {
    match command {
        Keys::Create { access, label, budget, models, endpoints, expires_in } => {
            let budgets: Vec<_> = budget.iter().map(|usd| serde_json::json!({ "usd": usd, "window": "total" })).collect();
            let body = serde_json::json!({
                "label": label, "allow": { "models": models, "endpoints": endpoints }, "budgets": budgets, "expires_in": expires_in,
            });
            let key = access.client()?.post("/v1/keys", &body)?;
            match access.output {
                Output::Json => out(&format!("{key:#}\n")),
                Output::Table => out(&format!("{}  {}\nThe token is shown this once.\n", text(&key, "id"), text(&key, "token"))),
            }
        }
        Keys::List { access } => access.print(&access.client()?.list("/v1/keys")?, &KEY_COLUMNS),
        Keys::Show { access, id } => access.print(&access.client()?.get(&format!("/v1/keys/{}", segment(&id)?))?, &KEY_COLUMNS),
        Keys::Revoke { access, id } => access.client()?.delete(&format!("/v1/keys/{}", segment(&id)?)),
    }
}

fn run_credentials(command: Credentials) -> Result<(), String> {
    match command {
        Credentials::Add { access, provider, from_env, label, account } => {
            let secret = match from_env {
                Some(name) => std::env::var(&name).map_err(|_| format!("the environment variable {name} is not set"))?,
                None => {
                    let mut text = String::new();
                    std::io::stdin().read_to_string(&mut text).map_err(|error| error.to_string())?;
                    text
                }
            };
            let secret = zeroize::Zeroizing::new(secret);
            let body = serde_json::json!({ "provider": provider, "label": label, "account": account, "secret": secret.trim() });
            access.print(&access.client()?.post("/v1/credentials", &body)?, &["id", "provider", "label", "account"])
        }
        Credentials::List { access } => {
            access.print(&access.client()?.list("/v1/credentials")?, &["id", "provider", "label", "account", "source"])
        }
        Credentials::Remove { access, id } => access.client()?.delete(&format!("/v1/credentials/{}", segment(&id)?)),
    }
}

fn run_audit(command: Audit) -> Result<(), String> {
    match command {
        Audit::Tail { access, key, follow } => audit::tail(&access.client()?, segment(&key)?, follow),
        Audit::Export { access, key } => out(&access.client()?.get_text(&format!("/v1/audit/{}/bundle", segment(&key)?))?),
        Audit::Verify { file } => {
            let text = if file.as_os_str() == "-" { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(&file) };
            let text = text.map_err(|error| format!("{}: {error}", file.display()))?;
            let verified = audit::verify(&text)?;
            out(&format!("ok: {verified}\n"))
        }
    }
}

/// Records sent in one call.
const IMPORT_LINES: usize = 5_000;

fn import_settlements(access: &Access, file: &std::path::Path) -> Result<(), String> {
    let log = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let record = |line: &[u8]| serde_json::from_slice::<serde_json::Value>(line).ok()?.get("settle")?.as_str().map(str::to_owned);
    let records: Vec<String> = log.split(|&b| b == b'\n').filter_map(record).collect();
    let client = access.client()?;
    let (mut taken, mut rejected) = (0, 0);
    for chunk in records.chunks(IMPORT_LINES) {
        let answer = client.post_text("/v1/settlements/import", &chunk.join("\n"))?;
        let count = |name: &str| answer.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        taken += count("taken");
        rejected += count("rejected");
    }
    out(&format!("{taken} records taken (those known already are ignored), {rejected} rejected\n"))?;
    if rejected > 0 { Err("some records have a wrong MAC: the log was changed, or is another installation's".to_owned()) } else { Ok(()) }
}

fn run_envoy(command: Envoy) -> Result<(), String> {
    match command {
        Envoy::Render(options) => out(&rendering(*options)?.yaml()?),
        Envoy::Validate { file } => envoy::validate(&envoy::binary(), &file),
    }
}

fn rendering(options: RenderOptions) -> Result<Rendering, String> {
    if !envoy::VERSIONS.contains(&options.envoy) {
        return Err(format!(
            "Envoy 1.{} is not supported: 1.{} to 1.{} are",
            options.envoy,
            envoy::VERSIONS.start(),
            envoy::VERSIONS.end()
        ));
    }
    let mut rendering = Rendering::example(options.envoy);
    if let Some(ca) = options.provider_ca {
        rendering.providers = Endpoint::public(&ca);
    }
    for provider in &options.providers {
        Endpoint::redirect(&mut rendering.providers, provider)?;
    }
    let set = |host: &mut String, port: &mut u16, address: Option<std::net::SocketAddr>| {
        if let Some(address) = address {
            (*host, *port) = (address.ip().to_string(), address.port());
        }
    };
    set(&mut rendering.listen_host, &mut rendering.listen_port, options.listen);
    set(&mut rendering.admin_host, &mut rendering.admin_port, options.envoy_admin);
    set(&mut rendering.policy_host, &mut rendering.policy_port, options.policy);
    let set = |slot: &mut String, path: Option<PathBuf>| {
        if let Some(path) = path {
            *slot = path.display().to_string();
        }
    };
    set(&mut rendering.edge_token_file, options.edge_token_file);
    set(&mut rendering.filter, options.filter);
    set(&mut rendering.access_log, options.access_log);
    if let Some(bytes) = options.max_body_bytes {
        rendering.set_max_body(bytes);
    }
    if let (Some(certificate), Some(key)) = (options.listen_certificate, options.listen_key) {
        rendering.listen_tls = Some(envoy::ListenTls { certificate: certificate.display().to_string(), key: key.display().to_string() });
    }
    Ok(rendering)
}

/// An id that may stand in a path.
fn segment(id: &str) -> Result<&str, String> {
    let fine = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if fine { Ok(id) } else { Err(format!("{id:?} is no id")) }
}

fn text(value: &serde_json::Value, field: &str) -> String {
    match value.get(field) {
        Some(serde_json::Value::String(text)) => text.clone(),
        None | Some(serde_json::Value::Null) => "-".to_owned(),
        Some(other) => other.to_string(),
    }
}

pub fn table(value: &serde_json::Value, columns: &[&str]) -> String {
    let one = std::slice::from_ref(value);
    let rows = value.as_array().map_or(one, Vec::as_slice);
    let cells: Vec<Vec<String>> = rows.iter().map(|row| columns.iter().map(|c| text(row, c)).collect()).collect();
    let heads: Vec<String> = columns.iter().map(|c| c.to_uppercase()).collect();
    let width = |i: usize| cells.iter().chain([&heads]).filter_map(|row| row.get(i)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let padded: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    std::iter::once(&heads).chain(&cells).map(line).collect()
}

/// Prints to standard output; a reader that went away is no error.
pub fn out(text: &str) -> Result<(), String> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.to_string()),
        _ => Ok(()),
    }
}
