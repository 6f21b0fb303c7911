//! Envoy: its configuration, rendered per version; its binary; starting it and stopping it in order.

use askama::Template;
use keyward_core::operation::{PROVIDERS, is_provider_name};
use keyward_policy_service::config::ProviderSettings;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The filter, as build.rs compiled it.
pub const FILTER: &[u8] = include_bytes!(env!("KEYWARD_FILTER"));
/// Oldest and newest Envoy that the configuration is tested with.
pub const VERSIONS: std::ops::RangeInclusive<u32> = 36..=40;
/// Room above the largest body, so that it is the gate and not Envoy that says what is wrong.
const BODY_SLACK: u64 = 1024 * 1024;

/// Where a provider is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub name: String,
    pub host: String,
    pub address: String,
    pub port: u16,
    pub tls: bool,
    pub ca: String,
    pub is_address: bool,
}

impl Endpoint {
    /// All built-in providers at their own hosts, over verified TLS; not those of which each account has a host of its own.
    fn public(ca: &Path) -> Vec<Self> {
        let endpoint = |p: &keyward_core::operation::Provider| Endpoint {
            name: p.name.to_owned(),
            host: p.host.to_owned(),
            address: p.host.to_owned(),
            port: 443,
            tls: true,
            ca: ca.display().to_string(),
            is_address: false,
        };
        PROVIDERS.iter().filter(|provider| !provider.host.is_empty()).map(endpoint).collect()
    }

    /// The built-in providers, and those that a configuration sends elsewhere or defines. `more`: as [`Endpoint::redirect`] takes them.
    pub fn configured(providers: Option<&BTreeMap<String, ProviderSettings>>, more: &[String], ca: &Path) -> Result<Vec<Self>, String> {
        let mut endpoints = Endpoint::public(ca);
        for (name, settings) in providers.into_iter().flatten() {
            if let Some(url) = &settings.url {
                Endpoint::redirect(&mut endpoints, &format!("{name}={url}"), ca)?;
            }
            if let (Some(host), Some(endpoint)) = (&settings.host, endpoints.iter_mut().find(|endpoint| endpoint.name == *name)) {
                endpoint.host.clone_from(host);
            }
        }
        for text in more {
            Endpoint::redirect(&mut endpoints, text, ca)?;
        }
        Ok(endpoints)
    }

    /// Sends one provider elsewhere: `name=http://host:port` or `name=https://host:port`. One that is not among them is added, at the
    /// host that it is reached at.
    fn redirect(endpoints: &mut Vec<Self>, text: &str, ca: &Path) -> Result<(), String> {
        let wrong = || format!("{text:?}: expected PROVIDER=http://HOST:PORT or PROVIDER=https://HOST:PORT");
        let (name, url) = text.split_once('=').ok_or_else(wrong)?;
        let (scheme, authority) = url.split_once("://").ok_or_else(wrong)?;
        let (host, port) = authority.trim_end_matches('/').rsplit_once(':').ok_or_else(wrong)?;
        if !is_provider_name(name) {
            return Err(format!("{name:?} is no name of a provider"));
        }
        if !endpoints.iter().any(|endpoint| endpoint.name == name) {
            let (name, host, ca) = (name.to_owned(), host.to_owned(), ca.display().to_string());
            endpoints.push(Endpoint { name, host, address: String::new(), port: 443, tls: true, ca, is_address: false });
        }
        let endpoint = endpoints.iter_mut().find(|e| e.name == name).ok_or_else(wrong)?;
        endpoint.tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        endpoint.port = port.parse().map_err(|_| wrong())?;
        endpoint.address = host.to_owned();
        endpoint.is_address = host.parse::<IpAddr>().is_ok();
        Ok(())
    }
}

/// Certificate and key of the listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenTls {
    pub certificate: String,
    pub key: String,
}

/// Who tries again when a provider has turned a try away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Rotation {
    /// Envoy's router, with a filter on each provider cluster; answers stream
    Router,
    /// The gate, by callouts: only the listener has a filter; what was tried again comes whole
    Callout,
}

/// Everything the configuration depends on.
#[derive(Debug, Clone, Template)]
#[template(path = "envoy.yaml")]
pub struct Rendering {
    /// `1.40`
    pub version: String,
    pub listen_host: String,
    pub listen_port: u16,
    pub listen_tls: Option<ListenTls>,
    /// Gateways in front of the listener whose x-forwarded-for and x-request-id are believed.
    pub trusted_hops: u32,
    pub admin_host: String,
    pub admin_port: u16,
    pub policy_host: String,
    pub policy_port: u16,
    pub policy_protocol: &'static str,
    pub edge_token_file: String,
    pub filter: String,
    pub access_log: String,
    pub max_body: u64,
    pub body_limit: u64,
    pub providers: Vec<Endpoint>,
    pub rotation: Rotation,
}

impl Rendering {
    /// The configuration that `envoy/envoy.yaml` shows.
    pub fn example(version: u32) -> Self {
        let max_body = 10 * 1024 * 1024;
        Rendering {
            version: format!("1.{version}"),
            listen_host: "127.0.0.1".to_owned(),
            listen_port: 7800,
            listen_tls: None,
            trusted_hops: 0,
            admin_host: "127.0.0.1".to_owned(),
            admin_port: 7809,
            policy_host: "127.0.0.1".to_owned(),
            policy_port: 7801,
            policy_protocol: "{http_protocol_options: {}}",
            edge_token_file: "/etc/keyward/edge-token".to_owned(),
            filter: "/etc/keyward/filter.wasm".to_owned(),
            access_log: "/dev/stdout".to_owned(),
            max_body,
            body_limit: 2 * max_body + BODY_SLACK,
            providers: Endpoint::public(Path::new(EXAMPLE_CA)),
            rotation: Rotation::Router,
        }
    }

    /// Whether this Envoy's router can follow a request to another provider.
    fn falls_back(&self) -> bool {
        self.rotation == Rotation::Router
            && self.version.strip_prefix("1.").and_then(|minor| minor.parse().ok()).is_some_and(|minor: u32| minor >= 39)
    }

    pub fn yaml(&self) -> Result<String, String> {
        self.render().map_err(|error| error.to_string())
    }

    pub fn set_max_body(&mut self, bytes: u64) {
        self.max_body = bytes;
        self.body_limit = bytes.saturating_mul(2).saturating_add(BODY_SLACK);
    }
}

/// Where most systems keep the public certificate authorities.
pub const EXAMPLE_CA: &str = "/etc/ssl/certs/ca-certificates.crt";
const CA_FILES: [&str; 4] = [EXAMPLE_CA, "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem"];

/// The system's public certificate authorities.
pub fn system_ca() -> PathBuf {
    CA_FILES.iter().map(Path::new).find(|path| path.exists()).unwrap_or(Path::new(CA_FILES[0])).to_owned()
}

/// The Envoy binary: `ENVOY_BIN`, or `envoy` from the search path.
pub fn binary() -> PathBuf {
    std::env::var_os("ENVOY_BIN").filter(|bin| !bin.is_empty()).map_or_else(|| PathBuf::from("envoy"), PathBuf::from)
}

/// Minor version of the Envoy binary (`40` of 1.40.0).
pub fn minor_version(envoy: &Path) -> Result<u32, String> {
    let output = Command::new(envoy).arg("--version").output().map_err(|error| no_envoy(envoy, &error))?;
    let text = String::from_utf8_lossy(&output.stdout);
    minor_of(&text).ok_or_else(|| format!("{} --version printed no version that is known", envoy.display()))
}

/// Minor version in what Envoy says of itself: `<commit>/1.40.0/Clean/RELEASE/BoringSSL`.
pub fn minor_of(text: &str) -> Option<u32> {
    text.split('/').find_map(|part| part.strip_prefix("1.")?.split('.').next()?.parse().ok())
}

fn no_envoy(envoy: &Path, error: &std::io::Error) -> String {
    format!(
        "Envoy can't be started ({}: {error}). Set ENVOY_BIN to an Envoy 1.36 to 1.40, or use `make up`, which fetches one.",
        envoy.display()
    )
}

/// Loads a configuration, module included, as Envoy itself does.
pub fn validate(envoy: &Path, file: &Path) -> Result<(), String> {
    let output = Command::new(envoy)
        .args(["--mode", "validate", "--log-level", "warning", "-c"])
        .arg(file)
        .output()
        .map_err(|error| no_envoy(envoy, &error))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What people copy is what the command renders.
    #[test]
    fn the_examples_are_up_to_date() {
        for (rotation, file, how) in [
            (Rotation::Router, "envoy/envoy.yaml", "keyward envoy render > envoy/envoy.yaml"),
            (Rotation::Callout, "envoy/listener-only.yaml", "keyward envoy render --rotation callout > envoy/listener-only.yaml"),
        ] {
            let rendered = Rendering { rotation, ..Rendering::example(*VERSIONS.end()) }.yaml().unwrap();
            let kept = std::fs::read_to_string(file).unwrap();
            assert_eq!(rendered.trim_end(), kept.trim_end(), "run: {how}");
        }
    }

    #[test]
    fn a_provider_is_sent_elsewhere() {
        let mut endpoints = Endpoint::public(Path::new("/ca.pem"));
        let ca = Path::new("/ca.pem");
        Endpoint::redirect(&mut endpoints, "openai=http://127.0.0.1:99", ca).unwrap();
        assert_eq!((endpoints[0].tls, endpoints[0].port, endpoints[0].is_address), (false, 99, true));
        assert_eq!(endpoints[0].host, "api.openai.com", "the name that is verified and sent stays");
        for bad in ["openai", "openai=127.0.0.1:1", "openai=ftp://h:1", "No.body=http://h:1", "openai=http://h:x"] {
            assert!(Endpoint::redirect(&mut endpoints, bad, ca).is_err(), "{bad}");
        }
        Endpoint::redirect(&mut endpoints, "vllm=https://llm.example.com:8443", ca).unwrap();
        let added = endpoints.last().unwrap();
        assert_eq!((added.name.as_str(), added.host.as_str(), added.port, added.tls), ("vllm", "llm.example.com", 8443, true));
    }
}
