//! One HTTP request to a named address, over verified TLS where asked: what Envoy does on each connection, step by step, so that the
//! step that fails can be named.

use super::configuration::Authorities;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(10);
/// Largest head of an answer, in bytes.
const MAX_HEAD: usize = 64 * 1024;

/// Whom to ask.
pub struct Place<'a> {
    /// Name or address to connect to.
    pub address: &'a str,
    pub port: u16,
    /// What the `host` header says.
    pub host: &'a str,
    pub trust: Option<Trust<'a>>,
}

/// What the other side's certificate must show.
pub struct Trust<'a> {
    pub name: &'a str,
    pub authorities: &'a Authorities,
}

/// The head of an answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    headers: Vec<(String, String)>,
    /// When it came, by this machine's clock.
    pub at: SystemTime,
    /// When the certificate ends, if there is one.
    pub certificate_ends: Option<SystemTime>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// How far the other clock is ahead of this one, in seconds.
    pub fn clock_ahead(&self) -> Option<i64> {
        ahead(self.header("date")?, self.at)
    }
}

/// How far a `date` header is ahead of a time, in seconds.
pub fn ahead(date: &str, at: SystemTime) -> Option<i64> {
    let there = httpdate::parse_http_date(date).ok()?;
    let seconds = |d: Duration| i64::try_from(d.as_secs()).unwrap_or(i64::MAX);
    Some(match there.duration_since(at) {
        Ok(later) => seconds(later),
        Err(earlier) => -seconds(earlier.duration()),
    })
}

/// The step that failed.
#[derive(Debug)]
pub enum Failure {
    Resolve(String),
    Connect(String),
    Authorities(String),
    Certificate(CertificateError),
    Answer(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Resolve(why) | Failure::Connect(why) | Failure::Authorities(why) | Failure::Answer(why) => f.write_str(why),
            Failure::Certificate(wrong) => wrong.fmt(f),
        }
    }
}

/// Sends a request and reads the head of the answer.
pub fn exchange(place: &Place, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer, Failure> {
    let addresses = (place.address, place.port).to_socket_addrs().map_err(|error| Failure::Resolve(error.to_string()))?;
    let mut stream = connect(addresses)?;
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\nuser-agent: keyward-doctor\r\nconnection: close\r\n", place.host);
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    let request = [request.as_bytes(), body].concat();
    let Some(trust) = &place.trust else { return converse(&mut stream, &request) };
    let (config, verifier) = tls(trust)?;
    let name = ServerName::try_from(trust.name.to_owned()).map_err(|error| Failure::Answer(format!("{:?}: {error}", trust.name)))?;
    let connection = ClientConnection::new(config, name.clone()).map_err(|error| Failure::Answer(error.to_string()))?;
    let mut stream = StreamOwned::new(connection, stream);
    let mut answer = converse(&mut stream, &request)?;
    answer.certificate_ends = stream.conn.peer_certificates().and_then(|chain| end(&verifier, chain, &name));
    Ok(answer)
}

fn connect(addresses: impl Iterator<Item = SocketAddr>) -> Result<TcpStream, Failure> {
    let mut wrong = "the name has no address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => {
                let limited = stream.set_read_timeout(Some(ANSWER)).and_then(|()| stream.set_write_timeout(Some(ANSWER)));
                return limited.map(|()| stream).map_err(|error| Failure::Connect(error.to_string()));
            }
            Err(error) => wrong = format!("{address}: {error}"),
        }
    }
    Err(Failure::Connect(wrong))
}

fn tls(trust: &Trust) -> Result<(Arc<ClientConfig>, Arc<WebPkiServerVerifier>), Failure> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(authorities(trust.authorities)?);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|error| Failure::Authorities(format!("no certificate in it can be used ({error})")))?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::Answer(error.to_string()))?
        .with_webpki_verifier(verifier.clone())
        .with_no_client_auth();
    Ok((Arc::new(config), verifier))
}

fn authorities(from: &Authorities) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let read = |path: &std::path::Path| std::fs::read(path).map_err(|error| Failure::Authorities(format!("{}: {error}", path.display())));
    let pem = match from {
        Authorities::File(path) => read(path.as_ref())?,
        Authorities::Inline(pem) => pem.clone().into_bytes(),
        Authorities::System => read(&crate::envoy::system_ca())?,
        Authorities::Elsewhere(name) => return Err(Failure::Authorities(format!("{name} is delivered to Envoy alone"))),
    };
    Ok(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect())
}

/// When a chain stops to be valid: verified for the far future, the refusal tells it.
fn end(verifier: &WebPkiServerVerifier, chain: &[CertificateDer], name: &ServerName) -> Option<SystemTime> {
    let (leaf, others) = chain.split_first()?;
    let far = UnixTime::since_unix_epoch(Duration::from_secs(250_000_000_000));
    match verifier.verify_server_cert(leaf, others, name, &[], far) {
        Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. })) => {
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(not_after.as_secs()))
        }
        _ => None,
    }
}

fn converse(stream: &mut (impl Read + Write), request: &[u8]) -> Result<Answer, Failure> {
    stream.write_all(request).and_then(|()| stream.flush()).map_err(explain)?;
    let (mut head, mut piece) = (Vec::new(), [0_u8; 4096]);
    loop {
        if let Some(answer) = parse(&head) {
            return Ok(answer);
        }
        let count = stream.read(&mut piece).map_err(explain)?;
        head.extend_from_slice(piece.get(..count).unwrap_or_default());
        if count == 0 || head.len() > MAX_HEAD {
            return Err(Failure::Answer("the connection ended without an answer in HTTP".to_owned()));
        }
    }
}

/// The handshake happens with the first bytes, so that its refusal comes as an error of reading or writing.
fn explain(error: std::io::Error) -> Failure {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(wrong)) => Failure::Certificate(wrong.clone()),
        Some(other) => Failure::Answer(format!("TLS: {other}")),
        None => Failure::Answer(error.to_string()),
    }
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let length = bytes.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(bytes.get(..length)?).into_owned();
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let header = |line: &str| line.split_once(':').map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    Some(Answer { status, headers: lines.filter_map(header).collect(), at: SystemTime::now(), certificate_ends: None })
}

/// An answer that was read whole.
pub struct Text {
    pub status: u16,
    pub body: String,
    pub clock_ahead: Option<i64>,
}

/// GET of one of our own plain HTTP ports.
pub fn get(url: &str, token: Option<&str>) -> Result<Text, String> {
    let config = ureq::Agent::config_builder().timeout_global(Some(ANSWER)).http_status_as_error(false).proxy(None).build();
    let mut request = ureq::Agent::from(config).get(url);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let mut response = request.call().map_err(|error| error.to_string())?;
    let at = SystemTime::now();
    let clock_ahead = response.headers().get("date").and_then(|date| ahead(date.to_str().ok()?, at));
    let body = response.body_mut().with_config().limit(256 << 20).read_to_string().map_err(|error| error.to_string())?;
    Ok(Text { status: response.status().as_u16(), body, clock_ahead })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_when_it_is_whole() {
        let bytes = b"HTTP/1.1 401 Unauthorized\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nx-keyward-reason:unknown_key\r\n\r\n{";
        for cut in 0..bytes.len() - 1 {
            assert!(parse(&bytes[..cut]).is_none(), "{cut}");
        }
        let answer = parse(bytes).unwrap();
        assert_eq!((answer.status, answer.header("X-Keyward-Reason")), (401, Some("unknown_key")));
        assert!(answer.clock_ahead().unwrap() < -900_000_000);
        assert!(parse(b"SSH-2.0-OpenSSH\r\n\r\n\r\n").is_none());
    }

    #[test]
    fn clocks_are_compared_by_the_second() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        assert_eq!(ahead("Sun, 06 Nov 1994 08:49:37 GMT", at), Some(0));
        assert_eq!(ahead("Sun, 06 Nov 1994 08:50:37 GMT", at), Some(60));
        assert_eq!(ahead("Sun, 06 Nov 1994 08:48:37 GMT", at), Some(-60));
        assert_eq!(ahead("tomorrow", at), None);
    }
}
