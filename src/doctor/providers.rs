//! Each provider is reached as Envoy reaches it: the same address, name and authorities, without a credential.

use super::configuration::{Authorities, Cluster, Tls};
use super::report::Outcome;
use super::wire::{Failure, Place, Trust, exchange};
use rustls::CertificateError;
use std::time::{Duration, SystemTime};

const DAY: Duration = Duration::from_secs(86_400);

/// What was found, and how far the provider's clock is ahead of this one (seconds), where its certificate was verified or none
/// was asked for.
pub fn check(cluster: &Cluster) -> (Outcome, Option<i64>) {
    let name = &cluster.name;
    if cluster.endpoints.is_empty() {
        return (Outcome::not_checked(format!("cluster {name}: its addresses are not in the configuration")), None);
    }
    let mut reached = Vec::new();
    let mut clock = None;
    for endpoint in &cluster.endpoints {
        let place = format!("{endpoint}");
        let verified = cluster.tls.as_ref().and_then(|tls| Some((tls, tls.authorities.as_ref()?)));
        let trust = match (&cluster.tls, verified) {
            (None, _) => None,
            (Some(_), Some((_, Authorities::Elsewhere(secret)))) => {
                let found = format!("{place}: its certificate authorities ({secret}) are known to Envoy alone");
                return (Outcome::not_checked(found), clock);
            }
            (Some(tls), Some((_, authorities))) => Some(Trust { name: name_of(tls, &endpoint.host), authorities }),
            (Some(_), None) => {
                return (Outcome::not_checked(format!("{place}: no authorities to verify it with; see provider-tls")), clock);
            }
        };
        let host = trust.as_ref().map_or(endpoint.host.as_str(), |trust| trust.name);
        let to = Place { address: &endpoint.host, port: endpoint.port, host, trust };
        match exchange(&to, "GET", "/v1/models", &[("accept", "application/json")], b"") {
            Ok(answer) if answer.status >= 500 => {
                let found = format!("{place} answers {}", answer.status);
                return (Outcome::warn(found, "see the provider's status page; nothing of ours is wrong as far as can be seen"), clock);
            }
            Ok(answer) => {
                clock = answer.clock_ahead().or(clock);
                let left = answer.certificate_ends.map(|ends| ends.duration_since(SystemTime::now()).unwrap_or_default());
                if let Some(left) = left.filter(|left| *left < DAY * 3) {
                    let found = format!("{place}: its certificate ends in {} hours", left.as_secs() / 3600);
                    return (Outcome::warn(found, "if the provider does not renew it, requests will be refused then"), clock);
                }
                let until = answer.certificate_ends.map(|ends| format!(", certificate good until {}", day(ends))).unwrap_or_default();
                reached.push(format!("{place} answers {}{until}", answer.status));
            }
            Err(failure) => return (explain(&place, host, cluster.tls.as_ref(), failure), clock),
        }
    }
    (Outcome::ok(reached.join(", ")), clock)
}

fn name_of<'a>(tls: &'a Tls, host: &'a str) -> &'a str {
    if tls.sni.is_empty() { host } else { &tls.sni }
}

fn explain(place: &str, name: &str, tls: Option<&Tls>, failure: Failure) -> Outcome {
    let authorities = match tls.and_then(|tls| tls.authorities.as_ref()) {
        Some(Authorities::File(path)) => path.clone(),
        Some(Authorities::System) => "the system's authorities".to_owned(),
        _ => "its trusted_ca".to_owned(),
    };
    match failure {
        Failure::Resolve(error) => Outcome::fault(
            format!("the name in {place} has no address ({error})"),
            "check the name in the cluster and this machine's DNS (/etc/resolv.conf)",
        ),
        Failure::Connect(error) => Outcome::fault(
            format!("{place} can't be connected to ({error})"),
            "check the address in the cluster, and that the firewall lets this machine out to it",
        ),
        Failure::Authorities(error) => Outcome::fault(
            format!("{place}: the certificate authorities can't be read: {error}"),
            "name a PEM file with certificate authorities (keyward up --provider-ca, or trusted_ca in the cluster)",
        ),
        Failure::Certificate(wrong) => certificate(place, name, &authorities, wrong),
        Failure::Answer(error) => Outcome::fault(
            format!("{place} does not answer as a provider does ({error})"),
            "check that the port is the provider's and whether it speaks TLS (https:// or http:// in --provider)",
        ),
    }
}

fn certificate(place: &str, name: &str, authorities: &str, wrong: CertificateError) -> Outcome {
    let renew = "have the provider's side renew it; if it looks valid elsewhere, this machine's clock is wrong";
    match wrong {
        CertificateError::ExpiredContext { not_after, .. } => {
            let ended = day(SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs()));
            Outcome::fault(format!("{place}: its certificate expired on {ended}"), renew)
        }
        CertificateError::Expired => Outcome::fault(format!("{place}: its certificate expired"), renew),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            Outcome::fault(format!("{place}: its certificate is not valid yet"), renew)
        }
        CertificateError::NotValidForNameContext { presented, .. } => {
            // Names are printed as rustls shows them: `DnsName("a.example")`.
            let names: Vec<&str> = presented.iter().map(|name| name.split('"').nth(1).unwrap_or(name)).take(5).collect();
            let found = format!("{place}: its certificate is for {}, not for {name}", names.join(", "));
            Outcome::fault(found, "the address is another server's, or somebody stands in between: correct the address, or sni and names")
        }
        CertificateError::NotValidForName => Outcome::fault(
            format!("{place}: its certificate is not for {name}"),
            "the address is another server's, or somebody stands in between: correct the address, or sni and names",
        ),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => Outcome::fault(
            format!("{place}: its certificate is not from an authority in {authorities}"),
            "put the right authority into that file; if the provider is public, somebody stands in between, such as a proxy of your company",
        ),
        // Envoy's own library is milder in places: whether it would refuse as well can't be told from here.
        other => Outcome::warn(
            format!("{place}: its certificate was not accepted here ({other})"),
            "send a request through Envoy; if it ends as provider_unreachable, have the certificate made anew",
        ),
    }
}

/// `06 Nov 1994`
fn day(time: SystemTime) -> String {
    // It gives `Sun, 06 Nov 1994 08:49:37 GMT`.
    let text = httpdate::fmt_http_date(time);
    text.get(5..16).map_or(text.clone(), str::to_owned)
}
