//! `keyward apply`, `diff`, `config` and the collections that a configuration is made of.

use super::segment;
use crate::cli::{Access, Output, out};
use crate::failure::{Exit, Failure};
use crate::manifest::{Manifest, schema, tell};
use crate::reference;
use clap::{Args, Subcommand};
use keyward_policy_service::config::{Action, Difference, Kind};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// A configuration file, for a running service.
#[derive(Args)]
pub struct File {
    #[command(flatten)]
    access: Access,
    /// The configuration; - for standard input
    #[arg(long, short, default_value = "keyward.yaml")]
    file: PathBuf,
}

#[derive(Args)]
pub struct Apply {
    #[command(flatten)]
    file: File,
    /// Only from this revision, as `keyward config show` tells it
    #[arg(long)]
    revision: Option<u64>,
}

#[derive(Subcommand)]
pub enum Config {
    /// Print the configuration that is in force, without secrets
    Show {
        #[command(flatten)]
        access: Access,
    },
    /// Print the JSON Schema of keyward.yaml
    Schema,
    /// Print the reference of keyward.yaml, or of the API, in Markdown
    Reference {
        #[arg(long)]
        api: bool,
    },
    /// Check a file, without a service and without its secrets
    Check {
        #[arg(default_value = "keyward.yaml")]
        file: PathBuf,
    },
}

pub fn run(command: Config) -> Result<(), Failure> {
    match command {
        Config::Show { access } => Ok(out(&format!("{:#}\n", access.client()?.get("/v1/config")?))?),
        Config::Schema => Ok(out(&format!("{:#}\n", schema()))?),
        Config::Reference { api } => Ok(out(&if api { reference::api() } else { reference::configuration() })?),
        Config::Check { file } => {
            read(&file)?;
            Ok(out(&format!("{} is fine\n", file.display()))?)
        }
    }
}

fn read(file: &Path) -> Result<Manifest, Failure> {
    Manifest::read(file).map_err(|mistakes| Failure::new(Exit::Invalid, tell(&mistakes)))
}

/// The file with its secrets, as the service wants it.
fn body(file: &Path) -> Result<Value, Failure> {
    let manifest = read(file)?.with_secrets(file).map_err(|mistakes| Failure::new(Exit::Invalid, tell(&mistakes)))?;
    serde_json::to_value(&manifest.document).map_err(|error| error.to_string().into())
}

fn changes(answer: &Value) -> Result<Vec<Difference>, Failure> {
    let changes = answer.get("changes").cloned().unwrap_or_default();
    serde_json::from_value(changes).map_err(|_| Failure::from("the service speaks of changes that this command does not know"))
}

pub fn apply(options: &Apply) -> Result<(), Failure> {
    let access = &options.file.access;
    let etag = options.revision.map(|revision| format!("\"{revision}\""));
    let answer = access.client()?.put("/v1/config", &body(&options.file.file)?, etag.as_deref())?;
    if access.output == Output::Json {
        return Ok(out(&format!("{answer:#}\n"))?);
    }
    let changes = changes(&answer)?;
    out(&show(&changes))?;
    Ok(out(&format!("{}; revision {}\n", count(&changes), answer.get("revision").unwrap_or(&Value::Null)))?)
}

/// Shows what an apply would change. Differences are an exit code of their own.
pub fn diff(options: &File) -> Result<(), Failure> {
    let answer = options.access.client()?.post("/v1/config/diff", &body(&options.file)?)?;
    let changes = changes(&answer)?;
    // A person reads colours, whatever is not a terminal reads JSON.
    if options.access.output == Output::Json || !std::io::stdout().is_terminal() {
        out(&format!("{answer:#}\n"))?;
    } else {
        out(&show(&changes))?;
        out(&format!("{}\n", count(&changes)))?;
    }
    if changes.is_empty() { Ok(()) } else { Err(Failure::new(Exit::Differs, "")) }
}

fn count(changes: &[Difference]) -> String {
    let of = |action: Action| changes.iter().filter(|change| change.action == action).count();
    if changes.is_empty() {
        return "nothing to change".to_owned();
    }
    format!("{} to create, {} to update, {} to delete", of(Action::Create), of(Action::Update), of(Action::Delete))
}

fn show(changes: &[Difference]) -> String {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let paint = |code: &str, text: String| if colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text };
    let mut lines = String::new();
    for change in changes {
        let (sign, code) = match change.action {
            Action::Create => ("+", "32"),
            Action::Update => ("~", "33"),
            Action::Delete => ("-", "31"),
        };
        lines.push_str(&paint(code, format!("{sign} {} {}", change.kind.name(), change.name)));
        lines.push('\n');
        for field in &change.fields {
            let from = if field.from.is_null() { String::new() } else { format!("{} -> ", field.from) };
            let name = if field.field.is_empty() { String::new() } else { format!("{}: ", field.field) };
            lines.push_str(&format!("    {name}{from}{}\n", field.to));
        }
    }
    lines
}

/// What can be done with each kind of object.
#[derive(Subcommand)]
pub enum Collection {
    /// List them
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Show one
    Show {
        #[command(flatten)]
        access: Access,
        name: String,
    },
    /// Create or replace one
    Set {
        #[command(flatten)]
        access: Access,
        name: String,
        /// What it is, as JSON, such as '{"max_keys": 5}'; - for standard input
        #[arg(long)]
        spec: String,
    },
    /// Delete one
    Delete {
        #[command(flatten)]
        access: Access,
        name: String,
    },
}

pub fn run_collection(kind: Kind, command: Collection) -> Result<(), Failure> {
    let columns = ["name", "spec", "managed_by", "version"];
    let at = |name: &str| Ok::<_, Failure>(format!("/v1/{}/{}", kind.section(), segment(name)?));
    match command {
        Collection::List { access } => access.print(&access.client()?.list(&format!("/v1/{}", kind.section()))?, &columns),
        Collection::Show { access, name } => access.print(&access.client()?.get(&at(&name)?)?, &columns),
        Collection::Set { access, name, spec } => {
            let text = if spec == "-" { std::io::read_to_string(std::io::stdin()).map_err(|error| error.to_string())? } else { spec };
            let spec: Value = serde_json::from_str(&text)
                .map_err(|error| Failure::new(Exit::Invalid, format!("--spec is not JSON: {error}, such as {}", json!({}))))?;
            access.print(&access.client()?.put(&at(&name)?, &spec, None)?, &columns)
        }
        Collection::Delete { access, name } => access.client()?.delete(&at(&name)?),
    }
}
