//! The policy service: checks policy, reserves money, writes everything down, and only then hands out a credential.

pub mod aims;
pub mod config;
pub mod directory;
pub mod files;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod prices;
pub mod service;
pub mod store;
pub mod vault;

use crate::http::api::Admin;
use crate::http::edge::EdgeToken;
use crate::prices::AdmittedPrices;
use crate::service::access::{Principal, Role, TokenSpec};
use crate::service::{Roots, Service};
use crate::store::sqlite::SqliteStore;
use crate::store::{LedgerKeys, Store};
use crate::vault::{Vault, random};
use keyward_core::hex;
use keyward_core::price::PriceTable;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// How the service is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of the database and of the secret files that are made on the first start.
    pub data: PathBuf,
    pub edge: SocketAddr,
    pub admin: SocketAddr,
    /// Name of this installation in every audit chain. Set at the first start; it can't change later.
    pub origin: String,
    /// A hold that nobody settled is charged after this; longer than the longest stream allowed.
    pub hold_ttl: Duration,
    /// 64 hex digits; `None`: the file `kek` in `data`.
    pub kek: Option<Zeroizing<String>>,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Service(#[from] service::ServiceError),
    #[error(transparent)]
    Vault(#[from] vault::VaultError),
    #[error(transparent)]
    Store(#[from] store::StoreError),
    #[error("{0}")]
    Setup(String),
    #[error("can't listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
}

/// A service that listens.
pub struct Running {
    pub service: Arc<Service>,
    pub edge: SocketAddr,
    pub admin: SocketAddr,
    /// The file with the edge token, for Envoy.
    pub edge_token_file: PathBuf,
    /// The first admin token, only on the very first start.
    pub bootstrap: Option<Zeroizing<String>>,
    stop: watch::Sender<bool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    store: Arc<SqliteStore>,
}

/// Opens the store and the vault and listens on both ports.
pub async fn start(config: Config) -> Result<Running, StartError> {
    metrics::recorder();
    if !config.edge.ip().is_loopback() {
        return Err(StartError::Setup(format!("the edge API has no TLS yet and may listen on loopback only, not on {}", config.edge)));
    }
    std::fs::create_dir_all(&config.data).map_err(|error| StartError::Setup(format!("{}: {error}", config.data.display())))?;
    let vault = match &config.kek {
        Some(hex) => Vault::from_hex(hex, "KEYWARD_KEK")?,
        None => Vault::from_file(&config.data.join("kek"))?,
    };
    let edge_token_file = config.data.join("edge-token");
    // The whole header value, as Envoy's credential_injector sends it.
    let make = || random::<32>().map(|token| format!("Bearer kwe_{}", hex::encode(&token))).map_err(|error| error.to_string());
    let edge_token = files::read_or_create(&edge_token_file, make)
        .map_err(|error| StartError::Setup(format!("{}: {error}", edge_token_file.display())))?;

    let origin = fixed_origin(&config)?;
    let prices = PriceTable::built_in().map_err(StartError::Setup)?;
    let roots = Roots::load(&vault, &config.data.join("root"))?;
    let keys = LedgerKeys { origin: origin.clone(), audit_seed: roots.audit_seed, prices, admitted: AdmittedPrices::default() };
    let path = config.data.join("keyward.db");
    let store = Arc::new(
        tokio::task::spawn_blocking(move || SqliteStore::open(&path, keys))
            .await
            .map_err(|error| StartError::Setup(error.to_string()))??,
    );
    let service = Arc::new(Service::start(store.clone() as Arc<dyn Store>, vault, roots, origin, config.hold_ttl).await?);

    let (stop, stopped) = watch::channel(false);
    let edge = listen(config.edge).await?;
    let admin = listen(config.admin).await?;
    // Last of what can fail: the token is marked as shown.
    let bootstrap = bootstrap(&config, &service).await?;
    let edge_router = http::edge::router(service.clone(), EdgeToken(Arc::new(Zeroizing::new(edge_token))));
    let admin_router = http::admin::router(Admin { service: service.clone() });
    let mut running = Running {
        edge: edge.local_addr().map_err(|error| StartError::Listen(config.edge, error))?,
        admin: admin.local_addr().map_err(|error| StartError::Listen(config.admin, error))?,
        service: service.clone(),
        edge_token_file,
        bootstrap,
        stop,
        tasks: Vec::new(),
        store,
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), edge = %running.edge, admin = %running.admin, "the policy service listens");
    running.tasks.push(tokio::spawn(serve(edge, edge_router, stopped.clone())));
    running.tasks.push(tokio::spawn(serve(admin, admin_router, stopped.clone())));
    running.tasks.push(tokio::spawn(watch_changes(service.clone(), stopped.clone())));
    running.tasks.push(tokio::spawn(sweep(service.clone(), stopped.clone())));
    running.tasks.push(tokio::spawn(send_alarms(service, stopped)));
    Ok(running)
}

impl Running {
    /// Stops in order: no new requests, those in hand end, everything queued is committed, the database is closed.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        // A question for news would be held for seconds.
        self.service.end_watches();
        for task in self.tasks {
            let _ = tokio::time::timeout(Duration::from_secs(10), task).await;
        }
        let store = self.store;
        tracing::info!("the policy service stops");
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }
}

/// The origin is part of every MAC: it is written down once and must not change.
fn fixed_origin(config: &Config) -> Result<String, StartError> {
    let path = config.data.join("origin");
    let origin = files::read_or_create(&path, || Ok(config.origin.clone()))
        .map_err(|error| StartError::Setup(format!("{}: {error}", path.display())))?;
    Ok(origin)
}

/// The first admin token: made once, shown once, marked by a file.
async fn bootstrap(config: &Config, service: &Service) -> Result<Option<Zeroizing<String>>, StartError> {
    let mark = config.data.join("bootstrapped");
    if mark.exists() {
        return Ok(None);
    }
    let spec = TokenSpec { role: Role::Admin, team: None, label: "first admin".to_owned(), expires_in: None };
    let (_, token) = service.create_admin_token(&Principal::local("keyward start"), spec).await?;
    files::create(&mark, "the first admin token has been shown\n").map_err(StartError::Setup)?;
    Ok(Some(token))
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen(address, error))
}

async fn serve(listener: TcpListener, router: axum::Router, mut stopped: watch::Receiver<bool>) {
    use axum::serve::ListenerExt;
    // Answers are small and awaited: they must not wait for more bytes.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let until = async move { stop_asked(&mut stopped).await };
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(until).await {
        tracing::error!(%error, "a listener ended");
    }
}

async fn stop_asked(stopped: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: then it is over as well.
    drop(stopped.wait_for(|stop| *stop).await);
}

/// Sends alarms to their webhooks.
async fn send_alarms(service: Arc<Service>, mut stopped: watch::Receiver<bool>) {
    let mut every = tokio::time::interval(Duration::from_secs(1));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop_asked(&mut stopped) => return,
            _ = every.tick() => {
                if let Err(error) = service.send_alarms().await {
                    tracing::error!(%error, "alarms could not be sent");
                }
            }
        }
    }
}

/// Judges what is running after each change of the rules.
async fn watch_changes(service: Arc<Service>, mut stopped: watch::Receiver<bool>) {
    tokio::select! {
        () = stop_asked(&mut stopped) => {}
        () = service.watch_changes() => {}
    }
}

/// Charges expired holds, every second.
async fn sweep(service: Arc<Service>, mut stopped: watch::Receiver<bool>) {
    let mut every = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = stop_asked(&mut stopped) => return,
            _ = every.tick() => {
                // Without it samples would pile up for as long as nobody reads the metrics.
                metrics::recorder().run_upkeep();
                if let Err(error) = service.expire().await {
                    tracing::error!(%error, "expired holds could not be charged");
                }
                service.tidy_key_states().await;
            }
        }
    }
}
