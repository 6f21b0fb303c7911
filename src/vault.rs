//! `keyward vault`: makes, changes and uses vault strings (docs/vault-string.md).

use crate::cli::{Access, Output, out, table};
use crate::failure::Failure;
use crate::secret::{self, MAX_INPUT, ask, environment, from_environment};
use crate::vault_string::{self, Contents, Fresh, Kdf, Key, Sealed, seal};
use clap::{Args, Subcommand, ValueEnum};
use keyward_core::operation::Provider;
use keyward_policy_service::files;
use keyward_policy_service::service::Loan;
use keyward_policy_service::vault::random;
use serde_json::{Value, json};
use std::io::Read;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Where a vault string's password is looked for when nothing names another place.
const PASSWORD_ENV: &str = "KEYWARD_VAULT_PASSWORD";

#[derive(Subcommand)]
pub enum Vault {
    /// Make an empty vault string
    Init {
        /// Write it to this new file, for its owner only; without it, standard output
        #[arg(long)]
        file: Option<PathBuf>,
        #[command(flatten)]
        password: Password,
        #[command(flatten)]
        kdf: KdfOptions,
    },
    /// Put a provider's key in; it is read from the environment or from standard input, never from the command line
    AddKey {
        /// openai, anthropic
        provider: String,
        /// With the provider, what tells it from others
        #[arg(long, default_value = "main")]
        name: String,
        /// Provider account whose limits it shares; default: its own
        #[arg(long)]
        account: Option<String>,
        /// Name of the environment variable that holds the secret; without it, standard input
        #[arg(long, value_name = "NAME")]
        from_env: Option<String>,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        password: Password,
    },
    /// Take a key out
    RemoveKey {
        provider: String,
        #[arg(long, default_value = "main")]
        name: String,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        password: Password,
    },
    /// List the keys, without their secrets
    List {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        password: Password,
        #[arg(long, default_value = "table")]
        output: Output,
    },
    /// Print the string; on request under a new password or another key derivation
    Export {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        password: Password,
        /// Write it to this new file, for its owner only; without it, standard output
        #[arg(long)]
        to: Option<PathBuf>,
        /// Name of the environment variable that holds the new password
        #[arg(long, value_name = "NAME")]
        new_password_env: Option<String>,
        /// Ask for the new password
        #[arg(long, conflicts_with = "new_password_env")]
        new_password: bool,
        #[command(flatten)]
        kdf: KdfOptions,
    },
    /// Store the keys in a running policy service; those that it has by provider and label are left alone
    Import {
        #[command(flatten)]
        access: Access,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        password: Password,
    },
}

/// Where a vault string is held.
#[derive(Args)]
pub struct Place {
    /// File that holds the vault string; changes are written to it
    #[arg(long, conflicts_with = "string_env")]
    file: Option<PathBuf>,
    /// Environment variable that holds the vault string; a changed one is printed
    #[arg(long, value_name = "NAME", default_value = "KEYWARD_VAULT")]
    string_env: String,
}

#[derive(Args)]
pub struct Password {
    /// Environment variable that holds the password; default: KEYWARD_VAULT_PASSWORD if it is set, or you are asked
    #[arg(long, value_name = "NAME")]
    password_env: Option<String>,
}

#[derive(Args)]
pub struct KdfOptions {
    /// How the key comes from the password; default: argon2id
    #[arg(long, value_enum)]
    kdf: Option<KdfName>,
    /// Argon2id: memory, 19 to 1024 [default: 64]
    #[arg(long)]
    memory_mib: Option<u32>,
    /// Argon2id: passes over the memory, 1 to 16 [default: 3]
    #[arg(long)]
    passes: Option<u32>,
    /// Argon2id: lanes, 1 to 16 [default: 4]
    #[arg(long)]
    lanes: Option<u32>,
    /// PBKDF2-HMAC-SHA256: iterations, 600000 to 10000000 [default: 600000]
    #[arg(long)]
    iterations: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KdfName {
    Argon2id,
    Pbkdf2,
}

/// What `keyward up` is told about a vault string.
#[derive(Args)]
pub struct Lending {
    /// Environment variable that holds a vault string: its keys are used from memory and stored nowhere
    #[arg(long, value_name = "NAME")]
    vault_string_env: Option<String>,
    /// Environment variable that holds its password; default: KEYWARD_VAULT_PASSWORD if it is set, or you are asked
    #[arg(long, value_name = "NAME", requires = "vault_string_env")]
    vault_password_env: Option<String>,
}

/// Carries out a command. The error is what a person needs to know.
pub fn run(command: Vault) -> Result<(), String> {
    match command {
        Vault::Init { file, password, kdf } => {
            let kdf = kdf.resolve()?.unwrap_or_default();
            let text = sealed(&Contents::default(), &password.choose()?, kdf)?;
            hand_out(file.as_deref(), &text)
        }
        Vault::AddKey { provider, name, account, from_env, place, password } => {
            // First what costs nothing, so that nobody types a password for a misspelt provider.
            if Provider::by_name(&provider).is_none() {
                return Err(format!("there is no provider {provider:?}"));
            }
            let mut opened = Opened::new(&place, &password)?;
            let secret = secret::read(from_env.as_deref(), &format!("Key of {provider}: "))?;
            let key = Key::new(&provider, &name, account, secret)?;
            if !opened.contents.add(key) {
                return Err(format!("there is a key {provider} {name:?} already: remove it first, or give this one another --name"));
            }
            opened.keep(&place, &format!("added {provider} {name:?}"))
        }
        Vault::RemoveKey { provider, name, place, password } => {
            let mut opened = Opened::new(&place, &password)?;
            if !opened.contents.remove(&provider, &name) {
                return Err(format!("there is no key {provider} {name:?}"));
            }
            opened.keep(&place, &format!("removed {provider} {name:?}"))
        }
        Vault::List { place, password, output } => {
            let opened = Opened::new(&place, &password)?;
            let row = |key: &Key| json!({ "provider": key.provider(), "name": key.name(), "account": key.account() });
            let rows = Value::Array(opened.contents.keys().iter().map(row).collect());
            match output {
                Output::Json => out(&format!("{rows:#}\n")),
                Output::Table => out(&table(&rows, &["provider", "name", "account"])),
            }
        }
        Vault::Export { place, password, to, new_password_env, new_password, kdf } => {
            let kdf = kdf.resolve()?;
            if kdf.is_none() && new_password_env.is_none() && !new_password {
                let text = place.read()?;
                Sealed::parse(&text).map_err(say)?;
                return hand_out(to.as_deref(), &text);
            }
            let opened = Opened::new(&place, &password)?;
            let password = match new_password_env {
                Some(name) => from_environment(&name)?,
                None if new_password => ask_twice()?,
                None => opened.password,
            };
            hand_out(to.as_deref(), &sealed(&opened.contents, &password, kdf.unwrap_or(opened.kdf))?)
        }
        Vault::Import { access, place, password } => import(&access, &Opened::new(&place, &password)?.contents),
    }
}

/// A vault string that has been opened, and what it takes to close it again.
struct Opened {
    contents: Contents,
    kdf: Kdf,
    password: Zeroizing<String>,
}

impl Opened {
    fn new(place: &Place, password: &Password) -> Result<Self, String> {
        let string = Sealed::parse(&place.read()?).map_err(say)?;
        let password = password.read()?;
        Ok(Opened { contents: string.open(&password).map_err(say)?, kdf: string.kdf(), password })
    }

    /// Encrypts what has been changed and puts it where it came from.
    fn keep(&self, place: &Place, what: &str) -> Result<(), String> {
        let text = sealed(&self.contents, &self.password, self.kdf)?;
        let Some(file) = &place.file else { return out(&format!("{text}\n")) };
        replace(file, &text).map_err(|error| format!("{}: {error}", file.display()))?;
        out(&format!("{what}; {} now holds {}\n", file.display(), count(self.contents.keys().len())))
    }
}

impl Place {
    fn read(&self) -> Result<String, String> {
        let text = match &self.file {
            None => environment(&self.string_env).ok_or_else(|| format!("no vault string: give --file, or set {}", self.string_env))?,
            Some(file) => {
                let read = || std::fs::File::open(file).and_then(|open| std::io::read_to_string(open.take(MAX_INPUT)));
                read().map(Zeroizing::new).map_err(|error| format!("{}: {error}", file.display()))?
            }
        };
        Ok(one_line(&text).to_owned())
    }
}

impl Password {
    fn read(&self) -> Result<Zeroizing<String>, Failure> {
        password(self.password_env.as_deref(), || ask("Password of the vault string: "))
    }

    /// One for something new: asked for twice.
    fn choose(&self) -> Result<Zeroizing<String>, Failure> {
        password(self.password_env.as_deref(), ask_twice)
    }
}

impl KdfOptions {
    /// `None`: nothing was said.
    fn resolve(&self) -> Result<Option<Kdf>, String> {
        let argon2id = self.memory_mib.is_some() || self.passes.is_some() || self.lanes.is_some();
        match (self.kdf, argon2id, self.iterations) {
            (None, false, None) => Ok(None),
            (Some(KdfName::Pbkdf2), false, iterations) => Kdf::pbkdf2(iterations.unwrap_or(600_000)).map(Some).map_err(say),
            (Some(KdfName::Pbkdf2), true, _) => Err("--memory-mib, --passes and --lanes are for --kdf argon2id".to_owned()),
            (_, _, Some(_)) => Err("--iterations is for --kdf pbkdf2".to_owned()),
            (_, _, None) => {
                let memory = self.memory_mib.unwrap_or(64).saturating_mul(1024);
                Kdf::argon2id(memory, self.passes.unwrap_or(3), self.lanes.unwrap_or(4)).map(Some).map_err(say)
            }
        }
    }
}

impl Lending {
    /// Opens the string that is named, if one is.
    pub fn open(&self) -> Result<Vec<Loan>, String> {
        let Some(name) = &self.vault_string_env else { return Ok(Vec::new()) };
        let string = Sealed::parse(one_line(&from_environment(name)?)).map_err(|error| format!("{name}: {error}"))?;
        let password = password(self.vault_password_env.as_deref(), || ask("Password of the vault string: "))?;
        let contents = string.open(&password).map_err(|error| format!("{name}: {error}"))?;
        let loan = |key: &Key| Loan {
            provider: key.provider().to_owned(),
            label: key.name().to_owned(),
            account: key.account().map(str::to_owned),
            secret: key.secret().clone(),
        };
        Ok(contents.keys().iter().map(loan).collect())
    }

    /// Environment variables that only this process may have.
    pub fn secret_names(&self) -> impl Iterator<Item = &str> {
        let named = self.vault_string_env.iter().chain(&self.vault_password_env).map(String::as_str);
        named.chain([PASSWORD_ENV])
    }
}

/// Puts each key into a running service; says what became of it.
fn import(access: &Access, contents: &Contents) -> Result<(), String> {
    let client = access.client()?;
    let known = client.list("/v1/credentials")?;
    let text = |row: &Value, field: &str| row.get(field).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (mut rows, mut failed) = (Vec::new(), 0);
    for key in contents.keys() {
        let same = |row: &&Value| text(row, "provider") == key.provider() && text(row, "label") == key.name();
        let (id, result) = match known.as_array().and_then(|rows| rows.iter().find(same)) {
            Some(row) if text(row, "source") == "vault_string" => (text(row, "id"), "there already, lent by a vault string".to_owned()),
            Some(row) => (text(row, "id"), "there already".to_owned()),
            None => {
                let body = json!({
                    "provider": key.provider(), "label": key.name(), "account": key.account(), "secret": key.secret().as_str(),
                });
                match client.post("/v1/credentials", &body) {
                    Ok(row) => (text(&row, "id"), "stored".to_owned()),
                    Err(error) => {
                        failed += 1;
                        ("-".to_owned(), format!("not stored: {}", error.message))
                    }
                }
            }
        };
        rows.push(json!({ "provider": key.provider(), "name": key.name(), "id": id, "result": result }));
    }
    access.print(&Value::Array(rows), &["provider", "name", "id", "result"])?;
    if failed > 0 { Err(format!("{} could not be stored", count(failed))) } else { Ok(()) }
}

fn sealed(contents: &Contents, password: &str, kdf: Kdf) -> Result<String, String> {
    let fresh = || Ok::<_, keyward_policy_service::vault::VaultError>(Fresh { salt: random()?, nonce: random()? });
    seal(contents, password, kdf, &fresh().map_err(|error| error.to_string())?).map_err(say)
}

fn hand_out(file: Option<&Path>, text: &str) -> Result<(), String> {
    match file {
        None => out(&format!("{text}\n")),
        Some(file) => files::create(file, &format!("{text}\n")).map_err(|error| format!("{}: {error}", file.display())),
    }
}

/// Puts another text into a file, whole or not at all.
fn replace(file: &Path, text: &str) -> Result<(), String> {
    let explain = |error: std::io::Error| error.to_string();
    // A link stays a link: what it points at is replaced.
    let file = file.canonicalize().map_err(explain)?;
    let mut name = file.file_name().ok_or("is no file")?.to_owned();
    name.push(format!(".{}", keyward_core::hex::encode(&random::<4>().map_err(|error| error.to_string())?)));
    let new = file.with_file_name(name);
    files::create(&new, &format!("{text}\n"))?;
    std::fs::rename(&new, &file).map_err(|error| {
        let _ = std::fs::remove_file(&new);
        explain(error)
    })?;
    let directory = file.parent().ok_or("is no file")?;
    std::fs::File::open(directory).and_then(|open| open.sync_all()).map_err(explain)
}

/// The password from the variable that is named, from its usual one, or from a person.
fn password(name: Option<&str>, ask: impl FnOnce() -> Result<Zeroizing<String>, Failure>) -> Result<Zeroizing<String>, Failure> {
    match name {
        Some(name) => from_environment(name),
        None => environment(PASSWORD_ENV).map_or_else(ask, Ok),
    }
}

fn ask_twice() -> Result<Zeroizing<String>, Failure> {
    let password = ask("New password of the vault string: ")?;
    if password.chars().count() < vault_string::MIN_PASSWORD {
        return Err(say(vault_string::Error::PasswordTooShort).into());
    }
    if *password == *ask("The same again: ")? { Ok(password) } else { Err("the two passwords are not the same".into()) }
}

/// A string without the line end that files and many secret stores add.
fn one_line(text: &str) -> &str {
    text.trim_end_matches(['\r', '\n'])
}

fn count(keys: usize) -> String {
    if keys == 1 { "1 key".to_owned() } else { format!("{keys} keys") }
}

fn say(error: vault_string::Error) -> String {
    error.to_string()
}
