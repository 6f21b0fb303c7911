//! `keyward doctor`: checks an installation from the outside and names each fault with its cure. It changes nothing.

mod configuration;
mod envoy;
mod hygiene;
mod providers;
mod report;
mod service;
mod wire;

use crate::cli::{Output, out};
use crate::failure::{Exit, Failure};
use clap::Args;
use configuration::Configuration;
use report::{Outcome, Report, Status};
use service::EdgeToken;
use std::path::PathBuf;
use zeroize::Zeroizing;

const ADMIN: &str = "http://127.0.0.1:7802";
const ENVOY_ADMIN: &str = "127.0.0.1:7809";

/// Where the installation is. The defaults are those of `keyward up`.
#[derive(Args)]
pub struct DoctorOptions {
    /// Data directory of `keyward up` or of the policy service
    #[arg(long, env = "KEYWARD_DATA", default_value = ".keyward")]
    data: PathBuf,
    /// Admin API; default: http://127.0.0.1:7802
    #[arg(long, env = "KEYWARD_ADMIN")]
    admin: Option<String>,
    /// Admin token; without it the file `admin-token` in the data directory
    #[arg(long, env = "KEYWARD_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// Envoy's admin port; default: what the file `envoy-admin` in the data directory says, else 127.0.0.1:7809
    #[arg(long)]
    envoy_admin: Option<String>,
    /// Envoy's configuration file; default: `envoy.yaml` in the data directory, else the one that Envoy says it was started with
    #[arg(long)]
    envoy_config: Option<PathBuf>,
    /// The Envoy to try the configuration with; default: ENVOY_BIN, or `envoy` from the search path
    #[arg(long)]
    envoy_bin: Option<PathBuf>,
    /// How to print
    #[arg(long, default_value = "table")]
    output: Output,
}

/// Checks everything. An error says how many faults there are.
pub fn run(options: DoctorOptions) -> Result<(), Failure> {
    let output = options.output;
    let patient = Patient::find(options).map_err(|message| Failure::new(Exit::Invalid, message))?;
    let report = patient.examine();
    out(&match output {
        Output::Table => report.table(),
        Output::Json => report.json()?,
    })?;
    match report.count(Status::Fault) {
        0 => Ok(()),
        1 => Err(Failure::new(Exit::Differs, "1 fault")),
        faults => Err(Failure::new(Exit::Differs, format!("{faults} faults"))),
    }
}

/// The installation to examine.
struct Patient {
    data: PathBuf,
    admin: String,
    admin_token: Option<Zeroizing<String>>,
    envoy_admin: String,
    envoy_config: Option<PathBuf>,
    envoy_bin: PathBuf,
}

impl Patient {
    fn find(options: DoctorOptions) -> Result<Self, String> {
        let DoctorOptions { data, admin, admin_token, envoy_admin, envoy_config, envoy_bin, output: _ } = options;
        if !data.is_dir() && admin.is_none() && envoy_admin.is_none() && envoy_config.is_none() {
            let data = data.display();
            return Err(format!(
                "there is no installation at {data}: name it by --data, or its parts by --admin, --envoy-admin, --envoy-config"
            ));
        }
        if let Some(file) = envoy_config.as_ref().filter(|file| !file.is_file()) {
            return Err(format!("--envoy-config: there is no file {}", file.display()));
        }
        let admin = admin.unwrap_or_else(|| ADMIN.to_owned()).trim_end_matches('/').to_owned();
        if !admin.starts_with("http://") {
            return Err("--admin: expected http://HOST:PORT".to_owned());
        }
        let kept = |name: &str| std::fs::read_to_string(data.join(name)).ok().map(|text| text.trim().to_owned());
        let envoy_admin = envoy_admin.or_else(|| kept("envoy-admin")).unwrap_or_else(|| ENVOY_ADMIN.to_owned());
        if envoy_admin.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
            return Err(format!("--envoy-admin: {envoy_admin:?} is not HOST:PORT"));
        }
        let admin_token = admin_token.or_else(|| kept("admin-token")).map(|token| Zeroizing::new(token.trim().to_owned()));
        Ok(Patient { data, admin, admin_token, envoy_admin, envoy_config, envoy_bin: envoy_bin.unwrap_or_else(crate::envoy::binary) })
    }

    fn examine(&self) -> Report {
        let mut report = Report::default();
        for name in ["edge-token", "admin-token", "kek"] {
            report.hide(&std::fs::read_to_string(self.data.join(name)).unwrap_or_default());
        }
        report.hide(self.admin_token.as_ref().map_or("", |token| token.as_str()));

        let (is_running, process) = envoy::process(&self.envoy_admin);
        let (binary, minor) = envoy::binary(&self.envoy_bin, process.is_some());
        report.add("envoy-binary", binary);
        report.add("envoy-running", is_running);

        let file = self.configuration_file(process.as_ref());
        let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
        let from_file = serde_saphyr::from_str(&text).ok().map(|value| Configuration::from_file(&value));
        let running = process.as_ref().map(|_| envoy::running(&self.envoy_admin));
        if let Some(Err(error)) = &running {
            report.add("envoy-dump", Outcome::fault(format!("Envoy's configuration can't be read ({error})"), "see Envoy's log"));
        }
        let running = running.and_then(Result::ok);
        let token = EdgeToken {
            envoys: from_file.as_ref().and_then(|file| file.edge_token_file.as_ref()).map(PathBuf::from),
            services: Some(self.data.join("edge-token")).filter(|file| file.exists()),
        };
        for file in token.envoys.iter() {
            report.hide(&std::fs::read_to_string(file).unwrap_or_default());
        }

        let down = || Outcome::not_checked("Envoy is not running: see envoy-running");
        report.add("envoy-version", process.as_ref().map_or_else(down, |p| envoy::version(p, envoy::rendered_for(&text))));
        let admin = running.as_ref().and_then(|running| running.admin.as_ref());
        report.add("envoy-flags", process.as_ref().map_or_else(down, |p| envoy::flags(p, admin)));
        report.add("configuration-loads", envoy::loads(&self.envoy_bin, minor, file.as_deref()));

        let gate_is_sound = self.examine_running(&mut report, running.as_ref(), process.as_ref());
        let known = running.as_ref().or(from_file.as_ref());
        self.examine_service(&mut report, known, &token, running.as_ref().filter(|_| gate_is_sound));
        report
    }

    fn configuration_file(&self, process: Option<&envoy::Process>) -> Option<PathBuf> {
        let ours = Some(self.data.join("envoy.yaml")).filter(|file| file.is_file());
        let theirs = || process.map(|process| process.config_path.clone()).filter(|file| file.is_file());
        self.envoy_config.clone().or(ours).or_else(theirs)
    }

    /// What Envoy runs with, and the module in it. Gives whether there is a gate and nothing is wrong with it.
    fn examine_running(&self, report: &mut Report, running: Option<&Configuration>, process: Option<&envoy::Process>) -> bool {
        let (Some(running), Some(process)) = (running, process) else {
            for name in hygiene::CHECKS.iter().map(|(name, _)| *name).chain(["filter-running", "filter-version"]) {
                report.add(name, Outcome::not_checked("Envoy is not running: see envoy-running"));
            }
            return false;
        };
        let mut gate_is_sound = true;
        for (name, check) in hygiene::CHECKS {
            let outcome = check(running);
            gate_is_sound &= name != "gate" || !outcome.is_fault();
            report.add(name, outcome);
        }
        report.add("filter-running", envoy::filter_runs(&self.envoy_admin, running.gates().next().is_some()));
        report.add("filter-version", envoy::filter_version(running, process));
        gate_is_sound
    }

    /// The service, its surroundings and the providers. `gated`: a running configuration whose gate is sound.
    fn examine_service(&self, report: &mut Report, known: Option<&Configuration>, token: &EdgeToken, gated: Option<&Configuration>) {
        let (ready, ahead) = service::ready(&self.admin);
        let is_up = !ready.is_fault();
        report.add("policy-service", ready);
        report.add("edge-token-file", service::edge_token_file(token));
        let edge = service::edge_token(token, known, is_up);
        let edge_is_ok = edge.status == Status::Ok;
        report.add("edge-token", edge);
        report.add(
            "gate-answers",
            match gated.and_then(|running| running.gates().next()) {
                None => Outcome::not_checked("there is no sound gate to ask: see envoy-running and gate"),
                Some(_) if !edge_is_ok => Outcome::not_checked("it would be refused: see policy-service and edge-token"),
                Some((manager, _, _)) => service::gate_answers(manager),
            },
        );
        let down = || (Outcome::not_checked("the policy service is not ready: see policy-service"), false);
        let admin_token = self.admin_token.as_ref().map(|token| token.as_str());
        let (who, may_read) = if is_up { service::admin_token(&self.admin, admin_token) } else { down() };
        report.add("admin-token", who);
        report.add("secret-files", service::secret_files(&self.data));

        let providers = known.map(Configuration::providers).unwrap_or_default();
        let names: Vec<String> = providers.iter().map(|(name, _)| name.clone()).collect();
        let (credentials, used) = match admin_token.filter(|_| may_read) {
            Some(_) if names.is_empty() => (Outcome::not_checked("which providers there are is not known"), None),
            Some(token) => service::credentials(&self.admin, token, &names),
            None => (Outcome::not_checked("it needs an admin token that may read them: see admin-token"), None),
        };
        report.add("credentials", credentials);
        let mut clocks: Vec<(String, i64)> = ahead.map(|ahead| ("the policy service".to_owned(), ahead)).into_iter().collect();
        for (name, cluster) in providers {
            // Nothing goes to one that has no credential.
            if used.as_ref().is_some_and(|used| !used.contains(&name)) {
                continue;
            }
            let (outcome, ahead) = providers::check(cluster);
            report.add(format!("provider:{name}"), outcome);
            clocks.extend(ahead.map(|ahead| (name, ahead)));
        }
        report.add("clock", service::clock(&clocks));
        report.add("disk", service::disk(&self.data));
    }
}
