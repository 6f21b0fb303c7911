//! Reads what Envoy runs with (`/config_dump`), or what a configuration file would make it run with, down to what Keyward
//! depends on. What is absent here is absent there: defaults are not filled in, so that the checks can be strict.

use serde_json::Value;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The gate's policy cluster when its configuration names none (as the filter has it).
const POLICY_CLUSTER: &str = "keyward_policy";

#[derive(Debug, Default)]
pub struct Configuration {
    pub managers: Vec<Manager>,
    /// Listener filters that are no HTTP connection manager but lead to a cluster: listener, cluster.
    pub passages: Vec<(String, String)>,
    pub clusters: Vec<Cluster>,
    /// Envoy's own admin port.
    pub admin: Option<Address>,
    /// The file with the edge token. A dump has it redacted: only a configuration file tells.
    pub edge_token_file: Option<String>,
}

/// An HTTP connection manager of a listener.
#[derive(Debug)]
pub struct Manager {
    pub listener: String,
    pub address: Option<Address>,
    pub tls: bool,
    pub filters: Vec<HttpFilter>,
    pub routes: Vec<Route>,
    pub access_log: Value,
}

#[derive(Debug)]
pub struct HttpFilter {
    pub name: String,
    pub disabled: bool,
    pub kind: FilterKind,
}

#[derive(Debug)]
pub enum FilterKind {
    Router,
    Codec,
    Plugin(Box<Plugin>),
    /// The name of the secret that it injects.
    Injector(String),
    Other,
}

/// A Wasm filter.
#[derive(Debug, PartialEq, Eq)]
pub struct Plugin {
    pub root: String,
    /// As it stands: two plugins share a VM only if all of it is equal.
    pub vm: Value,
    pub failure_policy: Option<String>,
    pub stop_iteration: bool,
    pub configuration: String,
}

impl Plugin {
    /// The module's file.
    pub fn module(&self) -> Option<&str> {
        self.vm.pointer("/code/local/filename")?.as_str()
    }

    /// A field of the plugin's own configuration.
    fn setting(&self, name: &str) -> Option<Value> {
        serde_json::from_str::<Value>(&self.configuration).ok()?.get(name).cloned()
    }

    pub fn policy_cluster(&self) -> String {
        self.setting("policy_cluster").and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_else(|| POLICY_CLUSTER.to_owned())
    }

    /// The gate puts the credential in by itself: no cluster has an attempt.
    pub fn calls_out(&self) -> bool {
        self.setting("rotation").is_some_and(|rotation| rotation == "callout")
    }

    /// Largest body, in bytes.
    pub fn max_body(&self) -> Option<u64> {
        self.setting("max_body_bytes")?.as_u64()
    }
}

#[derive(Debug)]
pub struct Route {
    /// Where it stands: virtual host and number.
    pub place: String,
    pub clusters: Vec<String>,
    /// The request header that chooses the cluster.
    pub cluster_header: Option<String>,
    /// Cluster by what the gate writes into filter state: the provider's name.
    pub targets: BTreeMap<String, String>,
    /// `None`: Envoy's 15 s.
    pub timeout: Option<String>,
    pub retry_on: Option<String>,
    /// Bytes; `None`: the connection's buffer, 1 MiB by default.
    pub body_limit: Option<u64>,
    /// Names of filters that this route configures anew or switches off.
    pub overrides: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

impl Address {
    pub fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') { write!(f, "[{}]:{}", self.host, self.port) } else { write!(f, "{}:{}", self.host, self.port) }
    }
}

#[derive(Debug)]
pub struct Cluster {
    pub name: String,
    /// Empty where somebody else tells them (EDS), or where they are sockets of the file system.
    pub endpoints: Vec<Address>,
    pub filters: Vec<HttpFilter>,
    pub tls: Option<Tls>,
    /// A cluster of clusters, whose members' filters Envoy does not run.
    pub is_aggregate: bool,
    pub max_retries: Option<u64>,
    pub is_local_socket: bool,
}

#[derive(Debug)]
pub struct Tls {
    pub sni: String,
    /// Names of which the certificate must have one.
    pub names: Vec<String>,
    pub authorities: Option<Authorities>,
    pub accepts_untrusted: bool,
}

/// Where the trusted certificate authorities stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authorities {
    File(String),
    Inline(String),
    System,
    /// Delivered to Envoy by name.
    Elsewhere(String),
}

impl Configuration {
    /// From the answer of `/config_dump`.
    pub fn from_dump(dump: &Value) -> Result<Self, String> {
        let sections = dump.get("configs").and_then(Value::as_array).ok_or("this is no configuration dump: it has no configs")?;
        let (mut listeners, mut clusters, mut routes) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut admin = None;
        for section in sections {
            match type_name(section) {
                "BootstrapConfigDump" => admin = section.pointer("/bootstrap/admin"),
                "ListenersConfigDump" => {
                    listeners.extend(items(section, "static_listeners").filter_map(|l| l.get("listener")));
                    listeners.extend(items(section, "dynamic_listeners").filter_map(|l| l.pointer("/active_state/listener")));
                }
                "ClustersConfigDump" => {
                    let kinds = ["static_clusters", "dynamic_active_clusters"];
                    clusters.extend(kinds.iter().flat_map(|kind| items(section, kind)).filter_map(|c| c.get("cluster")));
                }
                "RoutesConfigDump" => {
                    let dynamic = items(section, "dynamic_route_configs").filter_map(|r| r.get("route_config"));
                    routes.extend(dynamic.map(|config| (text(config, "name"), config)));
                }
                _ => {}
            }
        }
        Ok(gather(&listeners, &clusters, &routes, admin))
    }

    /// From a configuration file, read as YAML.
    pub fn from_file(file: &Value) -> Self {
        let resources = file.get("static_resources").unwrap_or(&Value::Null);
        let all = |name| items(resources, name).collect::<Vec<_>>();
        let mut read = gather(&all("listeners"), &all("clusters"), &BTreeMap::new(), file.get("admin"));
        let policy = read.cluster(&read.policy_cluster());
        if let Some(secret) = policy.and_then(Cluster::injector) {
            let named = items(resources, "secrets").find(|value| text(value, "name") == secret);
            read.edge_token_file = named.and_then(|value| Some(value.pointer("/generic_secret/secret/filename")?.as_str()?.to_owned()));
        }
        read
    }

    pub fn cluster(&self, name: &str) -> Option<&Cluster> {
        self.clusters.iter().find(|cluster| cluster.name == name)
    }

    /// The managers with a gate, and the gate.
    pub fn gates(&self) -> impl Iterator<Item = (&Manager, &HttpFilter, &Plugin)> {
        self.managers.iter().filter_map(|manager| manager.gate().map(|(filter, plugin)| (manager, filter, plugin)))
    }

    pub fn policy_cluster(&self) -> String {
        self.gates().next().map_or_else(|| POLICY_CLUSTER.to_owned(), |(_, _, gate)| gate.policy_cluster())
    }

    /// The clusters of providers, with the provider's name: those that a gate leads to, and those that have an attempt.
    pub fn providers(&self) -> Vec<(String, &Cluster)> {
        let policy = self.policy_cluster();
        let routes = || self.gates().flat_map(|(manager, _, _)| &manager.routes);
        let led_to = |cluster: &Cluster| routes().any(|route| route.clusters.contains(&cluster.name));
        let name = |cluster: &Cluster| {
            let target = routes().flat_map(|route| &route.targets).find(|(_, to)| **to == cluster.name);
            target.map_or_else(|| cluster.name.clone(), |(provider, _)| provider.clone())
        };
        let ours = |cluster: &&Cluster| cluster.name != policy && (led_to(cluster) || plugin(&cluster.filters, "attempt").is_some());
        self.clusters.iter().filter(ours).map(|cluster| (name(cluster), cluster)).collect()
    }
}

impl Manager {
    pub fn gate(&self) -> Option<(&HttpFilter, &Plugin)> {
        plugin(&self.filters, "gate")
    }
}

impl Cluster {
    pub fn injector(&self) -> Option<&str> {
        self.filters.iter().find_map(|filter| match &filter.kind {
            FilterKind::Injector(secret) => Some(secret.as_str()),
            _ => None,
        })
    }

    /// Whether nothing that is sent here leaves this machine.
    pub fn is_local(&self) -> bool {
        self.is_local_socket || (!self.endpoints.is_empty() && self.endpoints.iter().all(Address::is_loopback))
    }
}

/// The first Wasm filter with this root.
pub fn plugin<'a>(filters: &'a [HttpFilter], root: &str) -> Option<(&'a HttpFilter, &'a Plugin)> {
    filters.iter().find_map(|filter| match &filter.kind {
        FilterKind::Plugin(plugin) if plugin.root == root => Some((filter, plugin.as_ref())),
        _ => None,
    })
}

fn gather(listeners: &[&Value], clusters: &[&Value], dynamic: &BTreeMap<String, &Value>, admin: Option<&Value>) -> Configuration {
    let admin = admin.and_then(|admin| address(admin.get("address")?));
    let mut configuration = Configuration { admin, ..Configuration::default() };
    for listener in listeners {
        let name = text(listener, "name");
        let chains = items(listener, "filter_chains").chain(listener.get("default_filter_chain"));
        for chain in chains {
            let tls = chain.get("transport_socket").is_some();
            for filter in items(chain, "filters") {
                let config = filter.get("typed_config").unwrap_or(&Value::Null);
                if type_name(config) == "HttpConnectionManager" {
                    configuration.managers.push(manager(&name, listener.get("address"), tls, config, dynamic));
                } else {
                    let mut found = Vec::new();
                    named_clusters(config, &mut found);
                    configuration.passages.extend(found.into_iter().map(|cluster| (name.clone(), cluster)));
                }
            }
        }
    }
    configuration.clusters = clusters.iter().map(|value| cluster(value)).collect();
    configuration
}

fn manager(listener: &str, at: Option<&Value>, tls: bool, config: &Value, dynamic: &BTreeMap<String, &Value>) -> Manager {
    let by_name = || dynamic.get(config.pointer("/rds/route_config_name")?.as_str()?).copied();
    let routes = config.get("route_config").or_else(by_name).map(routes).unwrap_or_default();
    Manager {
        listener: listener.to_owned(),
        address: at.and_then(address),
        tls,
        filters: items(config, "http_filters").map(http_filter).collect(),
        routes,
        access_log: config.get("access_log").cloned().unwrap_or_default(),
    }
}

fn routes(config: &Value) -> Vec<Route> {
    let mut all = Vec::new();
    for host in items(config, "virtual_hosts") {
        for (number, route) in items(host, "routes").enumerate() {
            let mut clusters = Vec::new();
            named_clusters(route, &mut clusters);
            // A specifier that stands beside the routes and is only named by them.
            named_clusters(config.get("cluster_specifier_plugins").unwrap_or(&Value::Null), &mut clusters);
            let mut targets = BTreeMap::new();
            named_targets(route, &mut targets);
            let action = route.get("route").unwrap_or(&Value::Null);
            let inherited = |name: &str| action.get(name).or_else(|| host.get(name));
            let levels = [config, host, route].into_iter().filter_map(|level| level.get("typed_per_filter_config")?.as_object());
            all.push(Route {
                place: format!("virtual host {}, route {}", text(host, "name"), number + 1),
                clusters,
                cluster_header: action.get("cluster_header").and_then(Value::as_str).map(str::to_owned),
                targets,
                timeout: action.get("timeout").and_then(Value::as_str).map(str::to_owned),
                retry_on: inherited("retry_policy").map(|policy| text(policy, "retry_on")),
                body_limit: route.get("request_body_buffer_limit").or_else(|| host.get("request_body_buffer_limit")).and_then(number_of),
                overrides: levels.flat_map(|level| level.keys().cloned()).collect(),
            });
        }
    }
    all
}

/// Every cluster that is named anywhere in here: by routes, weights, mirrors and matchers.
fn named_clusters(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match (name.as_str(), field) {
                    ("cluster", Value::String(cluster)) => found.push(cluster.clone()),
                    ("weighted_clusters", weighted) => {
                        found.extend(items(weighted, "clusters").map(|cluster| text(cluster, "name")));
                        named_clusters(weighted, found);
                    }
                    _ => named_clusters(field, found),
                }
            }
        }
        Value::Array(all) => all.iter().for_each(|one| named_clusters(one, found)),
        _ => {}
    }
}

/// What a matcher tree maps to clusters.
fn named_targets(value: &Value, found: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(fields) => {
            if let Some(map) = value.pointer("/exact_match_map/map").and_then(Value::as_object) {
                for (key, action) in map {
                    let mut clusters = Vec::new();
                    named_clusters(action, &mut clusters);
                    found.extend(clusters.into_iter().map(|cluster| (key.clone(), cluster)));
                }
            }
            fields.values().for_each(|field| named_targets(field, found));
        }
        Value::Array(all) => all.iter().for_each(|one| named_targets(one, found)),
        _ => {}
    }
}

fn http_filter(filter: &Value) -> HttpFilter {
    let mut config = filter.get("typed_config").unwrap_or(&Value::Null);
    let mut kind = type_name(config);
    if kind == "TypedStruct" {
        // How Istio's patches spell an extension that they don't know.
        kind = config.get("type_url").and_then(Value::as_str).map_or("", last_part);
        config = config.get("value").unwrap_or(&Value::Null);
    }
    let kind = match kind {
        "Router" => FilterKind::Router,
        "UpstreamCodec" => FilterKind::Codec,
        "Wasm" => FilterKind::Plugin(Box::new(wasm(config.get("config").unwrap_or(&Value::Null)))),
        "CredentialInjector" => {
            let secret = config.pointer("/credential/typed_config/credential/name").and_then(Value::as_str);
            FilterKind::Injector(secret.unwrap_or_default().to_owned())
        }
        _ => FilterKind::Other,
    };
    HttpFilter { name: text(filter, "name"), disabled: truth(filter, "disabled"), kind }
}

fn wasm(config: &Value) -> Plugin {
    let policy = config.get("failure_policy").and_then(Value::as_str).map(str::to_owned);
    // The older spelling of the same.
    let open = truth(config, "fail_open").then(|| "FAIL_OPEN".to_owned());
    Plugin {
        root: text(config, "root_id"),
        vm: config.get("vm_config").cloned().unwrap_or_default(),
        failure_policy: policy.or(open),
        stop_iteration: truth(config, "allow_on_headers_stop_iteration"),
        configuration: config.get("configuration").map(|value| text(value, "value")).unwrap_or_default(),
    }
}

fn cluster(value: &Value) -> Cluster {
    let assignment = value.get("load_assignment").unwrap_or(&Value::Null);
    let endpoints = || items(assignment, "endpoints").flat_map(|locality| items(locality, "lb_endpoints"));
    let at = |endpoint: &Value| address(endpoint.pointer("/endpoint/address")?);
    let options = value.get("typed_extension_protocol_options").and_then(Value::as_object);
    let options = options.into_iter().flat_map(|map| map.values()).find(|options| type_name(options) == "HttpProtocolOptions");
    let socket = value.pointer("/transport_socket/typed_config").filter(|socket| type_name(socket) == "UpstreamTlsContext");
    let kind = value.pointer("/cluster_type/name").and_then(Value::as_str).unwrap_or_default();
    Cluster {
        name: text(value, "name"),
        endpoints: endpoints().filter_map(at).collect(),
        filters: options.map(|options| items(options, "http_filters").map(http_filter).collect()).unwrap_or_default(),
        tls: socket.map(upstream_tls),
        is_aggregate: kind.ends_with(".aggregate") || kind.ends_with(".composite"),
        max_retries: value.pointer("/circuit_breakers/thresholds/0/max_retries").and_then(Value::as_u64),
        is_local_socket: endpoints().next().is_some() && endpoints().all(|e| e.pointer("/endpoint/address/pipe").is_some()),
    }
}

fn upstream_tls(context: &Value) -> Tls {
    let common = context.get("common_tls_context").unwrap_or(&Value::Null);
    let combined = || common.pointer("/combined_validation_context/default_validation_context");
    let validation = common.get("validation_context").or_else(combined).unwrap_or(&Value::Null);
    let by_name = ["/validation_context_sds_secret_config/name", "/combined_validation_context/validation_context_sds_secret_config/name"];
    let field = |path: &str| validation.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let authorities = field("/trusted_ca/filename").map(Authorities::File);
    let authorities = authorities.or_else(|| field("/trusted_ca/inline_string").map(Authorities::Inline));
    let authorities = authorities.or_else(|| validation.get("system_root_certs").map(|_| Authorities::System));
    let elsewhere = || by_name.iter().find_map(|path| common.pointer(path)?.as_str().map(|name| Authorities::Elsewhere(name.to_owned())));
    let name = |matcher: &Value| ["exact", "suffix", "prefix"].iter().find_map(|kind| matcher.get(kind)?.as_str().map(str::to_owned));
    let typed = items(validation, "match_typed_subject_alt_names").filter_map(|entry| entry.get("matcher"));
    let plain = items(validation, "match_subject_alt_names");
    Tls {
        sni: text(context, "sni"),
        names: typed.chain(plain).map(|matcher| name(matcher).unwrap_or_else(|| matcher.to_string())).collect(),
        authorities: authorities.or_else(elsewhere),
        accepts_untrusted: validation.get("trust_chain_verification").and_then(Value::as_str) == Some("ACCEPT_UNTRUSTED"),
    }
}

fn address(value: &Value) -> Option<Address> {
    let socket = value.get("socket_address")?;
    Some(Address { host: text(socket, "address"), port: u16::try_from(socket.get("port_value")?.as_u64()?).ok()? })
}

fn items<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.get(name).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn truth(value: &Value, name: &str) -> bool {
    value.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// A dump has 64-bit numbers as text.
fn number_of(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// The message's name of a value with a type URL.
fn type_name(value: &Value) -> &str {
    value.get("@type").and_then(Value::as_str).map_or("", last_part)
}

fn last_part(url: &str) -> &str {
    url.rsplit('.').next().unwrap_or(url)
}
