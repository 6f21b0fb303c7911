//! `provider-sim`: the APIs of OpenAI, Anthropic, Gemini, Azure and servers like them as an oracle. It answers as they do, by
//! a script if told to, and knows exactly what it was asked, by whom, and what that cost.

mod answer;
mod anthropic;
mod api;
mod azure;
mod body;
mod call;
mod compatible;
mod connection;
mod control;
mod credentials;
mod dialect;
mod directive;
mod document;
mod endpoint;
mod faults;
mod frames;
mod gemini;
mod ledger;
mod limits;
mod listing;
mod models;
mod multipart;
mod objects;
mod openai;
mod provider;
mod reply;
mod server;
mod shared;
mod text;
mod ticket;
mod tls;
mod tokens;
mod violations;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::shared::Shared;

/// Simulates the APIs of model providers and keeps the books that tests compare with.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where the APIs are served; port 0 takes any free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where the control API is served.
    #[arg(long, default_value = "127.0.0.1:0")]
    control: SocketAddr,
    /// Serve the APIs by TLS, and write the certificate of the authority to DIR/ca.pem.
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// A host name for the TLS certificate, besides localhost and 127.0.0.1. Can be repeated.
    #[arg(long = "host", value_name = "NAME")]
    hosts: Vec<String>,
    /// Worker threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Requests that the ledger keeps one by one; totals count all.
    #[arg(long, default_value_t = 200_000)]
    ledger_cap: usize,
    /// Output tokens that a stream still generates, and bills, after its client has gone.
    #[arg(long, default_value_t = 16)]
    abort_overrun: u64,
    /// Least work per request: no violation scans, no kept bodies, headers, digests or `store`, 8-token answers.
    #[arg(long)]
    bench: bool,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    match start(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("provider-sim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: &Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(args.threads.max(1)).enable_all().build()?;
    let result = runtime.block_on(run(args));
    // At once: what is still open is dropped, not waited for.
    runtime.shutdown_background();
    result
}

async fn run(args: &Args) -> Result<(), Failure> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let shared = Arc::new(Shared::new(args.ledger_cap, args.bench, args.abort_overrun));
    let (ca, acceptor) = match &args.tls_dir {
        Some(dir) => {
            let (path, acceptor) = tls::acceptor(dir, &args.hosts)?;
            (Some(path), Some(acceptor))
        }
        None => (None, None),
    };
    let api = TcpListener::bind(args.listen).await?;
    let control = TcpListener::bind(args.control).await?;
    let scheme = if acceptor.is_some() { "https" } else { "http" };
    let ready = json!({
        "api": format!("{scheme}://{}", api.local_addr()?),
        "control": format!("http://{}", control.local_addr()?),
        "ca": ca,
    });
    println!("{ready}");
    tokio::spawn(server::serve(api, acceptor, Arc::clone(&shared)));
    tokio::select! {
        result = axum::serve(control, control::router(shared)) => Ok(result?),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}
