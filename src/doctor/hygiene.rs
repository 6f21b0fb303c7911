//! What the running configuration must look like for Keyward's promises to hold. Pure: a configuration in, outcomes out.

use super::configuration::{Cluster, Configuration, FilterKind, HttpFilter, Manager, Plugin, Route, plugin};
use super::report::{Findings, Outcome};
use keyward_core::credentials::CREDENTIAL_HEADERS;
use serde_json::Value;

const RENDER: &str = "render the configuration again (keyward envoy render) or take this part from it, then restart Envoy";
/// What a route may retry on: the request has not reached the provider, or the attempt itself asks for it.
const SAFE_RETRIES: [&str; 4] = ["connect-failure", "refused-stream", "reset-before-request", "retriable-headers"];
const SETTLE_FIELD: &str = "%FILTER_STATE(wasm.keyward.settle:PLAIN)%";

type Check = fn(&Configuration) -> Outcome;

/// All checks of the running configuration, by name.
pub const CHECKS: [(&str, Check); 8] = [
    ("gate", gate),
    ("attempt", attempt),
    ("vm", vm),
    ("routes", routes),
    ("timeouts", timeouts),
    ("policy-cluster", policy_cluster),
    ("provider-tls", provider_tls),
    ("access-log", access_log),
];

/// The gate stands before the router, and nothing lets a request pass it.
fn gate(running: &Configuration) -> Outcome {
    let mut findings = Findings::default();
    let mut listeners = Vec::new();
    for (manager, filter, gate) in running.gates() {
        let listener = &manager.listener;
        listeners.push(listener.as_str());
        let place = |wanted: &dyn Fn(&HttpFilter) -> bool| manager.filters.iter().position(wanted);
        let gate_at = place(&|f| std::ptr::eq(f, filter));
        let router_at = place(&|f| matches!(f.kind, FilterKind::Router));
        if router_at.is_none() || gate_at > router_at {
            findings.fault(format!("listener {listener}: the gate does not stand before the router"), RENDER);
        }
        if filter.disabled {
            findings.fault(format!("listener {listener}: the gate is disabled"), "remove `disabled: true` from the gate");
        }
        for route in manager.routes.iter().filter(|route| route.overrides.contains(&filter.name)) {
            let found = format!("listener {listener}, {}: typed_per_filter_config changes the gate or switches it off", route.place);
            findings.fault(found, format!("remove the entry {:?} from typed_per_filter_config", filter.name));
        }
        failure_policy(&mut findings, &format!("listener {listener}: the gate"), gate);
        if !gate.stop_iteration {
            let found = format!("listener {listener}: the gate lacks allow_on_headers_stop_iteration: requests hang or go on unadmitted");
            findings.fault(found, "set allow_on_headers_stop_iteration: true beside the gate's vm_config");
        }
    }
    if listeners.is_empty() {
        let providers = running.providers();
        let open = |manager: &&Manager| {
            manager.routes.iter().any(|route| providers.iter().any(|(_, cluster)| route.clusters.contains(&cluster.name)))
        };
        let open: Vec<&str> = running.managers.iter().filter(open).map(|manager| manager.listener.as_str()).collect();
        let more = if open.is_empty() { String::new() } else { format!("; providers are reached without it by {}", open.join(", ")) };
        let found = format!("no listener has the gate (a Wasm filter with root_id gate){more}");
        return Outcome::fault(found, format!("put the filter keyward.gate before the router: {RENDER}"));
    }
    findings.or_ok(format!("listener {}: before the router, FAIL_RELOAD, stops at headers", listeners.join(", ")))
}

/// After a trap only FAIL_RELOAD both refuses and recovers.
fn failure_policy(findings: &mut Findings, what: &str, plugin: &Plugin) {
    let means = match plugin.failure_policy.as_deref() {
        Some("FAIL_RELOAD") => return,
        Some("FAIL_OPEN") => "has failure_policy FAIL_OPEN: after a trap requests pass unfiltered".to_owned(),
        Some(other) => format!("has failure_policy {other}: after a trap its worker answers 503 for ever"),
        None => "has no failure_policy: after a trap its worker answers 503 for ever".to_owned(),
    };
    findings.fault(format!("{what} {means}"), "set failure_policy: FAIL_RELOAD, with reload_config {backoff: {base_interval: 0.1s}}");
}

/// The attempt runs on every cluster that a gate leads to: it alone puts the credential in.
fn attempt(running: &Configuration) -> Outcome {
    let mut findings = Findings::default();
    let providers = running.providers();
    for (_, cluster) in &providers {
        let name = &cluster.name;
        if cluster.is_aggregate {
            let found = format!("cluster {name} is a cluster of clusters: Envoy does not run its members' upstream filters");
            findings.fault(found, "lead the route to the members by the gate's filter state, as in keyward envoy render");
        }
        match plugin(&cluster.filters, "attempt") {
            Some((filter, attempt)) => {
                failure_policy(&mut findings, &format!("cluster {name}: the attempt"), attempt);
                let is_last = cluster.filters.iter().rposition(|f| !matches!(f.kind, FilterKind::Codec))
                    == cluster.filters.iter().position(|f| std::ptr::eq(f, filter));
                if !is_last || filter.disabled {
                    let found = format!("cluster {name}: the attempt is disabled, or another filter runs after it and sees the credential");
                    findings.fault(found, "let keyward.attempt stand right before envoy.filters.http.upstream_codec");
                }
            }
            // Such a gate puts the credential in by itself.
            None if running.gates().all(|(_, _, gate)| gate.calls_out()) => {}
            None => findings.fault(
                format!("cluster {name} is led to by a gate and has no attempt (an upstream Wasm filter with root_id attempt)"),
                format!("put keyward.attempt into the http_filters of cluster {name}'s HttpProtocolOptions: {RENDER}"),
            ),
        }
    }
    if providers.is_empty() {
        findings.fault("no cluster of a provider: the gate leads nowhere, and no cluster has the attempt", RENDER);
    }
    let names: Vec<&str> = providers.iter().map(|(_, cluster)| cluster.name.as_str()).collect();
    findings.or_ok(format!("on every provider's cluster: {}", names.join(", ")))
}

/// Gate and attempt hand requests over within one VM: a difference in its configuration makes it two.
fn vm(running: &Configuration) -> Outcome {
    let gates = running.gates().map(|(manager, _, gate)| (format!("the gate of listener {}", manager.listener), gate));
    let attempts = running.clusters.iter().filter_map(|cluster| {
        let (_, attempt) = plugin(&cluster.filters, "attempt")?;
        Some((format!("the attempt of cluster {}", cluster.name), attempt))
    });
    let all: Vec<(String, &Plugin)> = gates.chain(attempts).collect();
    let Some((first, model)) = all.first() else { return Outcome::not_checked("there is neither gate nor attempt") };
    let mut findings = Findings::default();
    for (place, plugin) in all.iter().filter(|(_, plugin)| plugin.vm != model.vm) {
        let fields = |vm: &Value| vm.as_object().map(|map| map.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
        let mut differ = fields(&plugin.vm);
        differ.extend(fields(&model.vm));
        differ.sort();
        differ.dedup();
        differ.retain(|field| plugin.vm.get(field) != model.vm.get(field));
        let found = format!("{place} and {first} differ in vm_config.{}: they don't share a VM", differ.join(", vm_config."));
        findings.fault(found, "give gate and attempt one and the same vm_config (a YAML anchor keeps them equal)");
    }
    let id = model.vm.get("vm_id").and_then(Value::as_str).unwrap_or_default();
    findings.or_ok(format!("one vm_config for all {} plugins, vm_id {id:?}", all.len()))
}

/// Envoy puts the edge token on whatever goes to the policy cluster: no client's request may go there.
fn routes(running: &Configuration) -> Outcome {
    let policy = running.policy_cluster();
    let mut findings = Findings::default();
    let mut count = 0;
    for manager in &running.managers {
        for route in &manager.routes {
            count += 1;
            let place = format!("listener {}, {}", manager.listener, route.place);
            if route.clusters.contains(&policy) {
                let found = format!("{place} leads to {policy}: clients reach the edge API there, with Envoy's own edge token");
                findings.fault(found, "remove that route; only the filter's callouts may go to the policy cluster");
            }
            if let Some(header) = &route.cluster_header {
                let found = format!("{place} takes its cluster from the header {header}, by which a client may name {policy}");
                findings.fault(found, "name the cluster in the route");
            }
        }
    }
    for (listener, _) in running.passages.iter().filter(|(_, cluster)| *cluster == policy) {
        findings.fault(format!("listener {listener} passes connections on to {policy}"), "remove that listener filter");
    }
    findings.or_ok(format!("none of {count} leads to {policy}"))
}

/// Streams are not cut, and no request is sent twice after one admission.
fn timeouts(running: &Configuration) -> Outcome {
    let mut findings = Findings::default();
    let providers = running.providers();
    for (manager, _, gate) in running.gates() {
        let leads = |route: &&Route| providers.iter().any(|(_, cluster)| route.clusters.contains(&cluster.name));
        for route in manager.routes.iter().filter(leads) {
            let place = format!("listener {}, {}", manager.listener, route.place);
            match route.timeout.as_deref() {
                Some("0s") => {}
                Some(limit) => findings.warn(format!("{place}: answers are cut after {limit}"), "set timeout: 0s and use idle_timeout"),
                None => findings.fault(
                    format!("{place} has no timeout: Envoy's default cuts every answer after 15 s"),
                    "set timeout: 0s and use idle_timeout",
                ),
            }
            let unsafe_retries = |on: &&str| !on.is_empty() && !SAFE_RETRIES.contains(on);
            let retries = route.retry_on.as_deref().unwrap_or_default();
            let twice: Vec<&str> = retries.split(',').map(str::trim).filter(unsafe_retries).collect();
            if !twice.is_empty() {
                let found = format!("{place} retries on {}: a request that was admitted once may be charged twice", twice.join(", "));
                findings.fault(found, format!("retry on {} at most", SAFE_RETRIES.join(", ")));
            }
            let few = |(_, cluster): &&(String, &Cluster)| cluster.max_retries.is_none_or(|max| max < 100);
            for (_, cluster) in providers.iter().filter(|_| !retries.is_empty()).filter(few) {
                let found = format!("cluster {}: at most {} retries at a time", cluster.name, cluster.max_retries.unwrap_or(3));
                findings.warn(found, "raise max_retries in its circuit_breakers");
            }
            if let Some(largest) = gate.max_body().filter(|largest| route.body_limit.unwrap_or(1024 * 1024) <= *largest) {
                let found = format!("{place}: request_body_buffer_limit is not above the gate's max_body_bytes, {largest}");
                findings.warn(found, "raise it: larger bodies are refused by Envoy, without a word of the gate's");
            }
        }
    }
    findings.or_ok("no answer has a total time limit, no request is sent twice")
}

/// What the policy cluster carries opens everything.
fn policy_cluster(running: &Configuration) -> Outcome {
    let name = running.policy_cluster();
    let Some(cluster) = running.cluster(&name) else {
        return Outcome::fault(format!("there is no cluster {name}, to which the gate calls"), RENDER);
    };
    let mut findings = Findings::default();
    if cluster.injector().is_none() {
        let found = format!("cluster {name} has no credential_injector: the policy service answers every callout with 401");
        findings.fault(found, RENDER);
    }
    if !cluster.is_local() && cluster.tls.is_none() {
        let at: Vec<String> = cluster.endpoints.iter().map(ToString::to_string).collect();
        let found = format!("cluster {name} ({}) leaves this machine without TLS: edge token and credentials can be read", at.join(", "));
        findings.fault(found, "let the policy service listen on loopback beside Envoy, or put TLS on the cluster");
    }
    let transport = if cluster.tls.is_some() { "TLS" } else { "loopback" };
    findings.or_ok(format!("{name}: {transport}, Envoy adds the edge token"))
}

/// A real credential leaves only to a provider whose certificate was verified.
fn provider_tls(running: &Configuration) -> Outcome {
    let mut findings = Findings::default();
    let (mut verified, mut local) = (Vec::new(), Vec::new());
    for (_, cluster) in running.providers() {
        let name = &cluster.name;
        let Some(tls) = &cluster.tls else {
            if cluster.is_local() {
                local.push(name.as_str());
            } else {
                findings.fault(format!("cluster {name} leaves this machine without TLS: credentials can be read"), RENDER);
            }
            continue;
        };
        if cluster.is_local() {
            local.push(name.as_str());
        } else {
            verified.push(name.as_str());
        }
        let lacks = [
            (tls.sni.is_empty(), "sni"),
            (tls.names.is_empty(), "match_typed_subject_alt_names"),
            (tls.authorities.is_none() || tls.accepts_untrusted, "trusted_ca"),
        ];
        let lacks: Vec<&str> = lacks.into_iter().filter_map(|(lacks, what)| lacks.then_some(what)).collect();
        if !lacks.is_empty() && !cluster.is_local() {
            let found = format!("cluster {name} does not verify whom it talks to: it lacks {}", lacks.join(", "));
            findings.fault(found, "set sni, match_typed_subject_alt_names and trusted_ca in its UpstreamTlsContext");
        }
    }
    let list = |names: &[&str]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    findings.or_ok(format!("verified by name and authority: {}; on loopback: {}", list(&verified), list(&local)))
}

/// The log carries what a crash is recovered from, and no credential.
fn access_log(running: &Configuration) -> Outcome {
    let mut findings = Findings::default();
    for (manager, _, _) in running.gates() {
        let listener = &manager.listener;
        let has_settle = |log: &Value| {
            let format = log.pointer("/typed_config/log_format").unwrap_or(&Value::Null);
            ["/json_format/settle", "/typed_json_format/settle"]
                .iter()
                .any(|at| format.pointer(at).and_then(Value::as_str) == Some(SETTLE_FIELD))
        };
        if !manager.access_log.as_array().is_some_and(|logs| logs.iter().any(has_settle)) {
            let found = format!("listener {listener}: no access log has the field settle: what a dead Envoy had not sent is lost");
            findings.fault(found, format!("add to the json_format of its file access log: settle: \"{SETTLE_FIELD}\""));
        }
        let format = manager.access_log.to_string().to_ascii_lowercase();
        let logs = |header: &&&str| {
            [format!("({header})"), format!("({header}?"), format!("?{header})")].iter().any(|s| format.contains(s.as_str()))
        };
        for header in CREDENTIAL_HEADERS.iter().filter(logs) {
            let found = format!("listener {listener}: the access log prints the header {header}, where the real credential stands");
            findings.fault(found, format!("take %REQ({header})% out of the log's format, delete what was logged, rotate the credentials"));
        }
    }
    findings.or_ok("has the field settle, prints no credential")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Status;

    /// What Envoy told of the configuration that `keyward envoy render` gives, cut to the parts that are read.
    fn dump() -> Value {
        serde_json::from_str(include_str!("golden/config-dump.json")).unwrap()
    }

    fn checks(running: &Configuration) -> Vec<(&'static str, Outcome)> {
        CHECKS.iter().map(|(name, check)| (*name, check(running))).collect()
    }

    fn outcome(dump: &Value, check: &str) -> Outcome {
        let running = Configuration::from_dump(dump).unwrap();
        checks(&running).into_iter().find(|(name, _)| *name == check).unwrap().1
    }

    const MANAGER: &str = "/configs/2/static_listeners/0/listener/filter_chains/0/filters/0/typed_config";
    const CLUSTERS: &str = "/configs/1/static_clusters";

    /// Breaks one thing: exactly one check names it, with a cure.
    #[track_caller]
    fn breaks(check: &str, names: &str, change: impl Fn(&mut Value)) {
        let mut dump = dump();
        change(&mut dump);
        let running = Configuration::from_dump(&dump).unwrap();
        for (name, outcome) in checks(&running) {
            if name == check {
                assert!(outcome.is_fault() && outcome.cure.is_some(), "{name}: {outcome:?}");
                assert!(outcome.found.contains(names), "{name}: {outcome:?}");
            } else {
                assert_eq!(outcome.status, Status::Ok, "{name} as well: {outcome:?}");
            }
        }
    }

    fn set(dump: &mut Value, at: &str, field: &str, value: Value) {
        dump.pointer_mut(at).unwrap()[field] = value;
    }

    fn remove(dump: &mut Value, at: &str, field: &str) {
        dump.pointer_mut(at).unwrap().as_object_mut().unwrap().remove(field).unwrap();
    }

    /// A cluster's place in the dump.
    fn at(dump: &Value, cluster: &str) -> String {
        let all = dump.pointer(CLUSTERS).unwrap().as_array().unwrap();
        let index = all.iter().position(|c| c["cluster"]["name"] == cluster).unwrap();
        format!("{CLUSTERS}/{index}/cluster")
    }

    #[test]
    fn what_is_rendered_is_sound() {
        let running = Configuration::from_dump(&dump()).unwrap();
        for (name, outcome) in checks(&running) {
            assert_eq!(outcome.status, Status::Ok, "{name}: {outcome:?}");
        }
        let providers: Vec<String> = running.providers().into_iter().map(|(name, _)| name).collect();
        assert_eq!(providers, ["anthropic", "openai"]);
        assert_eq!(running.admin.map(|at| at.to_string()).as_deref(), Some("127.0.0.1:7809"));
        assert_eq!(running.edge_token_file, None, "a dump has it redacted");
    }

    /// The same, from the file that people copy.
    #[test]
    fn a_file_reads_as_its_dump() {
        let rendered = crate::envoy::Rendering::example(40).yaml().unwrap();
        let file = Configuration::from_file(&serde_saphyr::from_str(&rendered).unwrap());
        for (name, outcome) in checks(&file) {
            assert_eq!(outcome.status, Status::Ok, "{name}: {outcome:?}");
        }
        assert_eq!(file.edge_token_file.as_deref(), Some("/etc/keyward/edge-token"));
        assert_eq!(file.providers().len(), 8);
    }

    #[test]
    fn a_dump_must_be_one() {
        assert!(Configuration::from_dump(&serde_json::json!({"error": "no"})).is_err());
        let empty = serde_json::json!({"configs": []});
        assert!(outcome(&empty, "gate").is_fault() && outcome(&empty, "policy-cluster").is_fault());
    }

    #[test]
    fn a_gate_that_can_be_passed_is_a_fault() {
        let gate = format!("{MANAGER}/http_filters/0/typed_config/config");
        breaks("gate", "FAIL_OPEN", |dump| set(dump, &gate, "failure_policy", "FAIL_OPEN".into()));
        breaks("gate", "no failure_policy", |dump| remove(dump, &gate, "failure_policy"));
        breaks("gate", "stop_iteration", |dump| remove(dump, &gate, "allow_on_headers_stop_iteration"));
        breaks("gate", "disabled", |dump| set(dump, &format!("{MANAGER}/http_filters/0"), "disabled", true.into()));
        breaks("gate", "before the router", |dump| {
            dump.pointer_mut(&format!("{MANAGER}/http_filters")).unwrap().as_array_mut().unwrap().reverse();
        });
        breaks("gate", "typed_per_filter_config", |dump| {
            let route = format!("{MANAGER}/route_config/virtual_hosts/0/routes/0");
            set(dump, &route, "typed_per_filter_config", serde_json::json!({"keyward.gate": {"disabled": true}}));
        });
    }

    #[test]
    fn a_provider_without_its_attempt_is_a_fault() {
        breaks("attempt", "cluster openai", |dump| {
            let options = format!("{}/typed_extension_protocol_options", at(dump, "openai"));
            let options = dump.pointer_mut(&options).unwrap().as_object_mut().unwrap().values_mut().next().unwrap();
            options["http_filters"].as_array_mut().unwrap().remove(0);
        });
        breaks("attempt", "another filter runs after it", |dump| {
            let options = format!("{}/typed_extension_protocol_options", at(dump, "openai"));
            let options = dump.pointer_mut(&options).unwrap().as_object_mut().unwrap().values_mut().next().unwrap();
            options["http_filters"]
                .as_array_mut()
                .unwrap()
                .insert(1, serde_json::json!({"name": "lua", "typed_config": {"@type": "x/Lua"}}));
        });
    }

    #[test]
    fn two_vms_are_a_fault() {
        breaks("vm", "vm_config.vm_id", |dump| {
            set(dump, &format!("{MANAGER}/http_filters/0/typed_config/config/vm_config"), "vm_id", "other".into());
        });
    }

    #[test]
    fn a_way_to_the_policy_cluster_is_a_fault() {
        let routes = format!("{MANAGER}/route_config/virtual_hosts/0/routes");
        let ways = [
            serde_json::json!({"match": {"prefix": "/x"}, "route": {"cluster": "keyward_policy"}}),
            serde_json::json!({"route": {"cluster_header": "x-cluster"}}),
            serde_json::json!({"route": {"weighted_clusters": {"clusters": [{"name": "keyward_policy", "weight": 1}]}}}),
            serde_json::json!({"route": {"cluster": "elsewhere", "request_mirror_policies": [{"cluster": "keyward_policy"}]}}),
        ];
        for way in ways {
            breaks("routes", "keyward_policy", |dump| dump.pointer_mut(&routes).unwrap().as_array_mut().unwrap().push(way.clone()));
        }
    }

    #[test]
    fn a_cut_or_repeated_answer_is_a_fault() {
        let route = format!("{MANAGER}/route_config/virtual_hosts/0/routes/0/route");
        breaks("timeouts", "15 s", |dump| remove(dump, &route, "timeout"));
        breaks("timeouts", "5xx", |dump| set(dump, &route, "retry_policy", serde_json::json!({"retry_on": "connect-failure,5xx"})));
    }

    #[test]
    fn an_open_way_to_service_or_provider_is_a_fault() {
        breaks("policy-cluster", "without TLS", |dump| {
            let endpoint =
                format!("{}/load_assignment/endpoints/0/lb_endpoints/0/endpoint/address/socket_address", at(dump, "keyward_policy"));
            set(dump, &endpoint, "address", "10.0.0.7".into());
        });
        breaks("provider-tls", "without TLS", |dump| {
            let cluster = at(dump, "openai");
            remove(dump, &cluster, "transport_socket");
        });
        for (field, lacks) in [("trusted_ca", "trusted_ca"), ("match_typed_subject_alt_names", "match_typed_subject_alt_names")] {
            breaks("provider-tls", lacks, |dump| {
                let context = format!("{}/transport_socket/typed_config/common_tls_context/validation_context", at(dump, "openai"));
                remove(dump, &context, field);
            });
        }
    }

    #[test]
    fn a_log_without_the_record_or_with_a_credential_is_a_fault() {
        let format = format!("{MANAGER}/access_log/0/typed_config/log_format/json_format");
        breaks("access-log", "settle", |dump| remove(dump, &format, "settle"));
        for spelling in ["%REQ(authorization)%", "%REQ(X-Api-Key):20%", "%REQ(x-auth?Authorization)%"] {
            breaks("access-log", "prints the header", |dump| set(dump, &format, "who", spelling.into()));
        }
    }
}
