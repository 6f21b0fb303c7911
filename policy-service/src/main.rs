//! The policy service as a process of its own.

use clap::Parser;
use keyward_policy_service::logging::{self, LogFormat};
use keyward_policy_service::{Config, start};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use zeroize::Zeroizing;

#[derive(Parser)]
#[command(version, about = "Keyward's policy service: admits, reserves, records")]
struct Options {
    /// Directory of the database and of the secret files made on the first start
    #[arg(long, default_value = ".keyward")]
    data: PathBuf,
    /// Where the filter calls
    #[arg(long, default_value = "127.0.0.1:7801")]
    edge: SocketAddr,
    /// Where people and tools call
    #[arg(long, default_value = "127.0.0.1:7802")]
    admin: SocketAddr,
    /// Name of this installation in every audit chain; only the first start's counts
    #[arg(long, default_value = "keyward.local")]
    origin: String,
    /// Seconds after which a hold that nobody settled is charged; longer than the longest stream
    #[arg(long, default_value_t = 3900)]
    hold_ttl: u64,
    /// Key-encryption key, 64 hex digits; without it the file `kek` in the data directory
    #[arg(long, env = "KEYWARD_KEK", hide_env_values = true)]
    kek: Option<String>,
    /// Form of the log on standard error; RUST_LOG chooses how much (default: info)
    #[arg(long, env = "KEYWARD_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

fn main() -> ExitCode {
    let options = Options::parse();
    logging::start(options.log_format, "info");
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("keyward-policy-service: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keyward-policy-service: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let running = start(Config {
        data: options.data,
        edge: options.edge,
        admin: options.admin,
        origin: options.origin,
        hold_ttl: Duration::from_secs(options.hold_ttl),
        kek: options.kek.map(Zeroizing::new),
    })
    .await?;
    let ready = serde_json::json!({
        "edge": running.edge.to_string(), "admin": running.admin.to_string(), "edge_token_file": running.edge_token_file,
        "bootstrap_admin_token": running.bootstrap.as_ref().map(|token| token.as_str()),
    });
    println!("{ready}");
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    running.stop().await;
    Ok(())
}
