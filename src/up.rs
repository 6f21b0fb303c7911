//! `keyward up`: a working gateway on loopback, started and stopped in order.

use crate::envoy::{self, Endpoint, FILTER, Rendering};
use crate::manifest::{Manifest, Mistake, tell};
use clap::Args;
use keyward_policy_service::config::{Budget, Credential};
use keyward_policy_service::logging::{self, LogFormat};
use keyward_policy_service::service::access::{Principal, Role, TokenSpec};
use keyward_policy_service::service::keys::KeySpec;
use keyward_policy_service::service::{Loan, Service, ServiceError};
use keyward_policy_service::store::Expect;
use keyward_policy_service::{Config, Running, start};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use zeroize::Zeroizing;

/// Environment variables that hold providers' keys.
const FROM_ENVIRONMENT: [(&str, &str); 8] = [
    ("OPENAI_API_KEY", "openai"),
    ("ANTHROPIC_API_KEY", "anthropic"),
    ("GEMINI_API_KEY", "gemini"),
    ("GROQ_API_KEY", "groq"),
    ("MISTRAL_API_KEY", "mistral"),
    ("DEEPSEEK_API_KEY", "deepseek"),
    ("TOGETHER_API_KEY", "together"),
    ("OPENROUTER_API_KEY", "openrouter"),
];

#[derive(Args)]
pub struct UpOptions {
    /// State: database, vault key, configuration
    #[arg(long, env = "KEYWARD_DATA", default_value = ".keyward")]
    data: PathBuf,
    /// Where agents call
    #[arg(long, default_value = "127.0.0.1:7800")]
    listen: SocketAddr,
    /// Admin API
    #[arg(long, default_value = "127.0.0.1:7802")]
    admin: SocketAddr,
    /// Envoy's own admin port; 0 takes a free one
    #[arg(long, default_value_t = 0)]
    envoy_admin_port: u16,
    /// Envoy's worker threads
    #[arg(long, default_value_t = 2)]
    concurrency: u32,
    /// Send a provider elsewhere: openai=http://127.0.0.1:9000
    #[arg(long = "provider")]
    providers: Vec<String>,
    /// Certificate authorities that providers are verified with; default: the system's
    #[arg(long)]
    provider_ca: Option<PathBuf>,
    /// Gateways of yours in front of the listener; only they may reach it
    #[arg(long, default_value_t = 0)]
    trusted_hops: u32,
    /// Longest wait for requests in flight when stopping, in seconds
    #[arg(long, default_value_t = 60)]
    drain_timeout: u64,
    /// Budget of the first key, in dollars
    #[arg(long, default_value = "5.00")]
    first_key_budget: String,
    /// Form of the policy service's log on standard error; RUST_LOG chooses how much (default: warn)
    #[arg(long, env = "KEYWARD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    #[command(flatten)]
    lending: crate::vault::Lending,
    /// Apply this configuration, and again whenever it changes
    #[arg(long, short)]
    config: Option<PathBuf>,
}

/// Starts everything, waits for a signal, stops everything.
pub fn run(options: UpOptions) -> Result<(), String> {
    logging::start(options.log_format, "warn");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(|error| error.to_string())?;
    let loans = options.lending.open()?;
    let manifest = options.config.as_deref().map(|file| read(file).map_err(|mistakes| tell(&mistakes))).transpose()?;
    runtime.block_on(gateway(options, loans, manifest))
}

async fn gateway(options: UpOptions, loans: Vec<Loan>, manifest: Option<Manifest>) -> Result<(), String> {
    let envoy_bin = envoy::binary();
    let minor = envoy::minor_version(&envoy_bin)?;
    if !envoy::VERSIONS.contains(&minor) {
        return Err(format!(
            "{} is Envoy 1.{minor}; 1.{} to 1.{} are supported",
            envoy_bin.display(),
            envoy::VERSIONS.start(),
            envoy::VERSIONS.end()
        ));
    }
    let mut signals = Signals::new()?;
    let service = start(Config {
        data: options.data.clone(),
        edge: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0),
        admin: options.admin,
        origin: "keyward.local".to_owned(),
        hold_ttl: Duration::from_secs(3_900),
        kek: std::env::var("KEYWARD_KEK").ok().map(Zeroizing::new),
    })
    .await
    .map_err(|error| error.to_string())?;

    let envoy_admin = match options.envoy_admin_port {
        0 => free_port()?,
        port => port,
    };
    let lent = service.service.lend_credentials(loans).await.map_err(|error| format!("the vault string can't be used: {error}"));
    let ready = match (lent, &manifest) {
        (Ok(()), Some(manifest)) => apply(&service.service, manifest).await.map(drop),
        (lent, _) => lent,
    };
    let ready = match ready {
        Ok(()) => keep_admin_token(&options, &service).await,
        Err(error) => Err(error),
    };
    let started = match ready {
        Ok(()) => start_envoy(&options, manifest.as_ref(), &service, &envoy_bin, minor, envoy_admin).await,
        Err(error) => Err(error),
    };
    let mut envoy = match started {
        Ok(envoy) => envoy,
        Err(error) => {
            service.stop().await;
            return Err(error);
        }
    };
    let greeted = greet(&options, &service).await;
    let result = match greeted {
        Ok(()) => tokio::select! {
            () = signals.next() => Ok(()),
            () = watch(options.config.as_deref(), &service.service) => Ok(()),
            status = envoy.wait() => Err(format!("Envoy ended by itself: {status:?}; see {}", options.data.join("envoy.log").display())),
        },
        Err(error) => Err(error),
    };
    eprintln!("stopping: no new requests, waiting for those in flight (again to stop at once)");
    tokio::select! {
        () = stop_envoy(&mut envoy, envoy_admin, Duration::from_secs(options.drain_timeout)) => {}
        () = signals.next() => drop(envoy.kill().await),
    }
    service.stop().await;
    result
}

/// Reads a configuration file and the secrets that it names.
fn read(file: &Path) -> Result<Manifest, Vec<Mistake>> {
    Manifest::read(file)?.with_secrets(file)
}

/// Makes the service's configuration what the file says. Gives how many objects changed.
async fn apply(service: &Service, manifest: &Manifest) -> Result<usize, String> {
    match service.apply(&Principal::local("keyward up"), &manifest.document, None).await {
        Ok((_, changes)) => Ok(changes.len()),
        Err(ServiceError::Faults(faults)) => Err(tell(&manifest.mistakes(&faults))),
        Err(error) => Err(error.to_string()),
    }
}

/// How often the configuration file is looked at.
const WATCH: Duration = Duration::from_millis(500);

/// Applies the configuration file whenever its content changes. What can't be applied is told, and what is in force stays.
/// It never returns.
async fn watch(file: Option<&Path>, service: &Arc<Service>) {
    let Some(file) = file else { return std::future::pending().await };
    // Its content and not its time: an editor may write the same file, and a secret file may have changed beside it.
    let mut seen = std::fs::read(file).ok();
    loop {
        tokio::time::sleep(WATCH).await;
        let now = std::fs::read(file).ok();
        if now == seen || now.is_none() {
            continue;
        }
        seen = now;
        let result = match read(file) {
            Ok(manifest) => apply(service, &manifest).await,
            Err(mistakes) => Err(tell(&mistakes)),
        };
        match result {
            Ok(changes) => println!("{}: {changes} objects changed", file.display()),
            Err(error) => eprintln!("{error}\n{}: not applied; what was in force before stays", file.display()),
        }
    }
}

/// SIGINT and SIGTERM alike.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self, String> {
        let listen = |kind| signal(kind).map_err(|error| error.to_string());
        Ok(Signals { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

async fn start_envoy(
    options: &UpOptions,
    manifest: Option<&Manifest>,
    service: &Running,
    envoy_bin: &Path,
    minor: u32,
    envoy_admin: u16,
) -> Result<Child, String> {
    let data = std::path::absolute(&options.data).map_err(|error| error.to_string())?;
    let filter = data.join("filter.wasm");
    write(&filter, FILTER)?;
    let mut rendering = Rendering::example(minor);
    let ca = options.provider_ca.clone().unwrap_or_else(envoy::system_ca);
    rendering.providers = Endpoint::configured(manifest.map(|manifest| &manifest.document.providers), &options.providers, &ca)?;
    (rendering.listen_host, rendering.listen_port) = (options.listen.ip().to_string(), options.listen.port());
    rendering.trusted_hops = options.trusted_hops;
    rendering.admin_port = envoy_admin;
    (rendering.policy_host, rendering.policy_port) = (service.edge.ip().to_string(), service.edge.port());
    rendering.edge_token_file = data.join("edge-token").display().to_string();
    rendering.filter = filter.display().to_string();
    rendering.access_log = data.join("access.log").display().to_string();
    let file = data.join("envoy.yaml");
    write(&file, rendering.yaml()?.as_bytes())?;
    write(&data.join("envoy-admin"), format!("127.0.0.1:{envoy_admin}\n").as_bytes())?;

    let log = std::fs::File::create(data.join("envoy.log")).map_err(|error| error.to_string())?;
    let errors = log.try_clone().map_err(|error| error.to_string())?;
    let mut command = Command::new(envoy_bin);
    // Envoy needs no secret of ours, and an environment is easily shown.
    let names = FROM_ENVIRONMENT.iter().map(|(name, _)| *name).chain(["KEYWARD_KEK", "KEYWARD_ADMIN_TOKEN"]);
    names.chain(options.lending.secret_names()).for_each(|name| {
        command.env_remove(name);
    });
    let mut envoy = command
        .arg("-c")
        .arg(&file)
        // The access log is flushed often: what is in it can be recovered should Envoy die. Draining is immediate: every answer
        // tells its client to close, so that "nothing in flight" comes about and stays.
        .args(["--use-dynamic-base-id", "--log-level", "warning", "--file-flush-interval-msec", "100", "--drain-strategy", "immediate"])
        .args(["--concurrency", &options.concurrency.to_string()])
        .stdout(log)
        .stderr(errors)
        // A signal from the terminal goes to the whole group; Envoy must be stopped in order instead.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("Envoy can't be started: {error}"))?;
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = envoy.try_wait().map_err(|error| error.to_string())? {
            return Err(format!("Envoy ended at once ({status}); see {}", data.join("envoy.log").display()));
        }
        if admin_get(envoy_admin, "/ready").await.is_ok_and(|text| text.starts_with("LIVE")) {
            return Ok(envoy);
        }
        if Instant::now() > deadline {
            return Err(format!("Envoy did not become ready; see {}", data.join("envoy.log").display()));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Keeps an admin token where the other commands look for it. A token that was made and lost is replaced.
async fn keep_admin_token(options: &UpOptions, service: &Running) -> Result<(), String> {
    let file = options.data.join("admin-token");
    if file.exists() {
        return Ok(());
    }
    let token = match &service.bootstrap {
        Some(token) => token.clone(),
        None => {
            let spec = TokenSpec { role: Role::Admin, team: None, label: "keyward up".to_owned(), expires_in: None };
            service.service.create_admin_token(&Principal::local("keyward up"), spec).await.map_err(|error| error.to_string())?.1
        }
    };
    keyward_policy_service::files::create(&file, &token).map_err(|error| format!("{}: {error}", file.display()))?;
    println!("admin token (shown this once, kept in {}): {}", file.display(), token.as_str());
    Ok(())
}

/// Stores what the environment offers, makes the first key, and says how to use it.
async fn greet(options: &UpOptions, service: &Running) -> Result<(), String> {
    let say = |error: keyward_policy_service::service::ServiceError| error.to_string();
    let who = Principal::local("keyward up");
    for (name, provider) in FROM_ENVIRONMENT {
        let Some(secret) = std::env::var(name).ok().map(Zeroizing::new).filter(|secret| !secret.is_empty()) else { continue };
        // Whoever exported a virtual key for their SDK starts the next gateway from the same shell.
        if secret.starts_with(keyward_core::token::PREFIX) {
            println!("{name} holds a virtual key and is left alone");
            continue;
        }
        if service.service.holds(&who, name, &secret).await.map_err(say)? {
            continue;
        }
        let credential = Credential {
            provider: provider.to_owned(),
            label: String::new(),
            account: None,
            from: Some(format!("env:{name}")),
            secret: Some(secret.to_string()),
        };
        service
            .service
            .put_credential(&who, Some(name), &credential, Expect::Anything)
            .await
            .map_err(|error| format!("{name}: {error}"))?;
        println!("stored {name} in the vault");
    }
    for lent in service.service.lent() {
        println!("{} {:?} comes from the vault string and stays in memory", lent.provider, lent.label);
    }
    let first = service.service.keys(&who, None, "", 1).await.map_err(say)?.is_empty();
    if first {
        let budget = Budget { usd: options.first_key_budget.clone(), window: "total".to_owned() };
        let spec = KeySpec { label: "first key".to_owned(), budgets: vec![budget], ..KeySpec::default() };
        let (_, token) = service.service.create_key(&who, spec).await.map_err(|error| format!("--first-key-budget: {error}"))?;
        let (base, token) = (format!("http://{}", options.listen), token.reveal());
        println!("first virtual key (shown this once, ${} at most): {token}\n", options.first_key_budget);
        println!("  export OPENAI_BASE_URL={base}/v1 OPENAI_API_KEY={token}");
        println!("  export ANTHROPIC_BASE_URL={base} ANTHROPIC_API_KEY={token}\n");
        println!("  curl {base}/v1/chat/completions -H 'authorization: Bearer {token}' -H 'content-type: application/json' \\");
        println!("    -d '{{\"model\": \"gpt-4o-mini\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'\n");
    }
    println!("keyward is up: agents call http://{}, the admin API is http://{}", options.listen, service.admin);
    Ok(())
}

/// Drain, wait for zero in flight and nothing to settle, exit.
pub async fn stop_envoy(envoy: &mut Child, admin: u16, longest: Duration) {
    let deadline = Instant::now() + longest;
    let _ = admin_post(admin, "/drain_listeners").await;
    // The filter tells its counts every 50 ms, of a stream that has ended and of its record at once: quiet counts only when it lasts.
    let mut quiet = 0;
    while quiet < 3 && Instant::now() < deadline {
        match admin_get(admin, "/stats?filter=downstream_rq_active|keyward_settlements_pending|keyward_streams_open").await {
            Ok(stats) if is_quiet(&stats) => quiet += 1,
            Ok(_) => quiet = 0,
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let _ = admin_post(admin, "/quitquitquit").await;
    if tokio::time::timeout(Duration::from_secs(10), envoy.wait()).await.is_err() {
        let _ = envoy.kill().await;
    }
}

/// Nothing in flight on our listener, by Envoy's count and by the filter's, and every settlement acknowledged.
fn is_quiet(stats: &str) -> bool {
    const COUNTS: [&str; 3] = ["http.keyward.downstream_rq_active", "keyward_settlements_pending", "keyward_streams_open"];
    let value = |line: &str| line.rsplit_once(": ").and_then(|(_, n)| n.trim().parse::<u64>().ok());
    let counts = |line: &&str| COUNTS.iter().any(|name| line.contains(name));
    stats.lines().filter(counts).all(|line| value(line) == Some(0))
}

async fn admin_get(port: u16, path: &str) -> Result<String, String> {
    call(port, path, false).await
}

async fn admin_post(port: u16, path: &str) -> Result<String, String> {
    call(port, path, true).await
}

async fn call(port: u16, path: &str, post: bool) -> Result<String, String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    let request = move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(2))).proxy(None).build().into();
        let response = if post { agent.post(&url).send_empty() } else { agent.get(&url).call() };
        response.map_err(|error| error.to_string())?.body_mut().read_to_string().map_err(|error| error.to_string())
    };
    tokio::task::spawn_blocking(request).await.map_err(|error| error.to_string())?
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

fn free_port() -> Result<u16, String> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
    Ok(listener.local_addr().map_err(|error| error.to_string())?.port())
}

#[cfg(test)]
mod tests {
    use super::is_quiet;

    #[test]
    fn quiet_means_nothing_in_flight_and_nothing_to_settle() {
        assert!(is_quiet(
            "http.admin.downstream_rq_active: 1\nhttp.keyward.downstream_rq_active: 0\nwasmcustom.keyward_settlements_pending: 0\n"
        ));
        assert!(!is_quiet("http.keyward.downstream_rq_active: 2\n"));
        assert!(!is_quiet("http.keyward.downstream_rq_active: 0\nwasmcustom.keyward_settlements_pending: 3\n"));
        assert!(!is_quiet("http.keyward.downstream_rq_active: 0\nwasmcustom.keyward_streams_open: 1\n"));
    }
}
