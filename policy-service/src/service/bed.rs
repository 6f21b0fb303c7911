//! What tests of the service stand on: the whole of it, on a directory of their own.

use crate::config::Credential;
use crate::service::access::Principal;
use crate::{Config, Running, start};
use std::path::Path;
use std::time::Duration;

/// A service on the state in `data`.
pub async fn started(data: &Path) -> Running {
    let config = Config {
        data: data.to_owned(),
        edge: "127.0.0.1:0".parse().unwrap(),
        admin: "127.0.0.1:0".parse().unwrap(),
        origin: "test".to_owned(),
        hold_ttl: Duration::from_secs(60),
        kek: None,
    };
    start(config).await.unwrap()
}

/// Who may do everything.
pub fn who() -> Principal {
    Principal::local("test")
}

/// A credential of OpenAI.
pub fn credential(secret: &str) -> Credential {
    Credential { provider: "openai".to_owned(), label: String::new(), account: None, from: None, secret: Some(secret.to_owned()) }
}
