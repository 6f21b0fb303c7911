//! The command line: what can be asked, and who does it.

use crate::client::Client;
use crate::commands::administration::{self, Audit, Organisations, Settle, Tokens, Usage};
use crate::commands::configuration::{self, Apply, Collection, Config, File};
use crate::commands::keys::{self, Credentials, Keys};
use crate::commands::limits::{self, Organisation};
use crate::envoy::{self, Endpoint, Rendering};
use crate::failure::{EXIT_CODES, Failure};
use crate::manifest::{Manifest, tell};
use crate::up;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use keyward_policy_service::config::Kind;
use std::io::Write;
use std::path::PathBuf;

#[derive(Parser)]
#[command(name = "keyward", version, about = "Virtual keys inside Envoy", after_help = EXIT_CODES)]
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
    /// Make the configuration what a file says
    Apply(Box<Apply>),
    /// Show what apply would change; exit code 3 when there is something
    Diff(Box<File>),
    /// The configuration in force, its schema, a check of a file
    #[command(subcommand)]
    Config(Config),
    /// Teams: whose keys they are, and what these may be
    #[command(subcommand)]
    Teams(Collection),
    /// Policies: templates and limits of keys
    #[command(subcommand)]
    Policies(Collection),
    /// Providers and their settings
    #[command(subcommand)]
    Providers(Collection),
    /// Pools: ordered sets of credentials
    #[command(subcommand)]
    Pools(Collection),
    /// Routes: model names of your own
    #[command(subcommand)]
    Routes(Collection),
    /// Admin tokens
    #[command(subcommand)]
    Tokens(Tokens),
    /// Organisations of the installation
    #[command(subcommand)]
    Organisations(Organisations),
    /// The organisation's own limits, and what is used of them
    #[command(subcommand)]
    Organisation(Organisation),
    /// Tell whose token this is
    Whoami(Access),
    /// What was used and spent
    Usage(Box<Usage>),
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
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Write the manual pages into a directory
    Man { directory: PathBuf },
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
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

impl Access {
    pub fn client(&self) -> Result<Client, Failure> {
        let token = match &self.admin_token {
            Some(token) => token.clone(),
            None => {
                let file = self.data.join("admin-token");
                let explain = |error| format!("no admin token: set KEYWARD_ADMIN_TOKEN, or run where {} is ({error})", file.display());
                std::fs::read_to_string(&file).map_err(explain).map_err(|message| Failure::new(crate::failure::Exit::Denied, message))?
            }
        };
        Ok(Client::new(&self.admin, token.trim()))
    }

    pub fn print(&self, value: &serde_json::Value, columns: &[&str]) -> Result<(), Failure> {
        Ok(match self.output {
            Output::Json => out(&format!("{value:#}\n")),
            Output::Table => out(&table(value, columns)),
        }?)
    }

    pub fn is_table(&self) -> bool {
        self.output == Output::Table
    }
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
    /// Take the providers' addresses from this configuration
    #[arg(long, short)]
    config: Option<PathBuf>,
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
    /// Gateways of yours in front of the listener; only they may reach it
    #[arg(long, default_value_t = 0)]
    trusted_hops: u32,
    /// Who tries again when a provider has turned a try away
    #[arg(long, value_enum, default_value_t = envoy::Rotation::Router)]
    rotation: envoy::Rotation,
}

#[derive(Subcommand)]
enum Filter {
    /// Write the Wasm module to a file
    Export { file: PathBuf },
}

/// Carries out a command. The error is what a person needs to know.
pub fn run(options: Options) -> Result<(), Failure> {
    match options.command {
        Command::Up(options) => Ok(up::run(options)?),
        Command::Demo(options) => Ok(crate::demo::run(&options)?),
        Command::Doctor(options) => crate::doctor::run(options),
        Command::Keys(command) => keys::run(command),
        Command::Credentials(command) => keys::run_credentials(command),
        Command::Apply(options) => configuration::apply(&options),
        Command::Diff(options) => configuration::diff(&options),
        Command::Config(command) => configuration::run(command),
        Command::Teams(command) => configuration::run_collection(Kind::Team, command),
        Command::Policies(command) => configuration::run_collection(Kind::Policy, command),
        Command::Providers(command) => configuration::run_collection(Kind::Provider, command),
        Command::Pools(command) => configuration::run_collection(Kind::Pool, command),
        Command::Routes(command) => configuration::run_collection(Kind::Route, command),
        Command::Tokens(command) => administration::run_tokens(command),
        Command::Organisations(command) => administration::run_organisations(command),
        Command::Organisation(command) => limits::run(command),
        Command::Whoami(access) => administration::whoami(&access),
        Command::Usage(options) => administration::usage(&options),
        Command::Vault(vault) => Ok(crate::vault::run(vault)?),
        Command::Audit(command) => administration::run_audit(command),
        Command::Settle(Settle::Import { access, file }) => administration::import_settlements(&access, &file),
        Command::Envoy(command) => Ok(run_envoy(command)?),
        Command::Filter(Filter::Export { file }) => {
            Ok(std::fs::write(&file, envoy::FILTER).map_err(|error| format!("{}: {error}", file.display()))?)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Options::command(), "keyward", &mut script);
            Ok(out(&String::from_utf8_lossy(&script))?)
        }
        Command::Man { directory } => {
            let made = std::fs::create_dir_all(&directory).and_then(|()| clap_mangen::generate_to(Options::command(), &directory));
            Ok(made.map_err(|error| format!("{}: {error}", directory.display()))?)
        }
    }
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
    let ca = options.provider_ca.unwrap_or_else(|| envoy::EXAMPLE_CA.into());
    let manifest = options.config.as_ref().map(|file| Manifest::read(file).map_err(|mistakes| tell(&mistakes))).transpose()?;
    rendering.providers = Endpoint::configured(manifest.as_ref().map(|manifest| &manifest.document.providers), &options.providers, &ca)?;
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
    rendering.trusted_hops = options.trusted_hops;
    rendering.rotation = options.rotation;
    Ok(rendering)
}

pub fn text(value: &serde_json::Value, field: &str) -> String {
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
