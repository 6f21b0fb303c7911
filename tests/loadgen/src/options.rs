//! The command line, turned into a [`Plan`] that can't be wrong any more.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;

/// Sends a bounded number of HTTP/1.1 requests to a loopback address.
#[derive(Parser)]
#[command(version)]
pub struct Options {
    /// Where to, as http://127.0.0.1:PORT/path. Any host that is not loopback is refused.
    #[arg(long)]
    url: String,
    /// Keep-alive connections; each has one request in flight.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Requests to send in all, after the warm-up.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,
    /// Start no request after this many seconds, even if --requests is not reached.
    #[arg(long, value_name = "S")]
    duration_s: Option<u64>,
    /// Start requests at this fixed rate per second (open loop) instead of as fast as answers come.
    #[arg(long, value_name = "RPS")]
    rate: Option<NonZeroU64>,
    #[arg(long, default_value = "POST")]
    method: String,
    /// A request header as `name: value`. May be repeated.
    #[arg(long, value_name = "HEADER")]
    header: Vec<String>,
    /// A file of further request headers, one per line.
    #[arg(long, value_name = "FILE")]
    header_file: Option<PathBuf>,
    /// A file of bearer tokens, one per line; connections take them in turn.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[arg(long, value_name = "FILE")]
    body_file: Option<PathBuf>,
    /// Measure the time to the first body byte, and the gaps between arrivals of body bytes.
    #[arg(long)]
    stream: bool,
    /// Requests to send before measuring.
    #[arg(long, default_value_t = 0, value_name = "N")]
    warmup: u64,
    /// Close the connection once this many body bytes of a response came, if more are to come.
    #[arg(long, value_name = "N")]
    abort_after_bytes: Option<usize>,
    /// How many of a hundred responses to abort so.
    #[arg(long, value_name = "P", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100),
          requires = "abort_after_bytes")]
    abort_fraction_percent: u8,
    /// Give up on a response that is not complete after this many seconds, and count an error.
    #[arg(long, default_value_t = 60, value_name = "S")]
    timeout_s: u64,
    /// Print one JSON object instead of text.
    #[arg(long)]
    pub json: bool,
}

/// What to do, checked.
#[derive(Debug)]
pub struct Plan {
    pub address: SocketAddr,
    /// The whole request, once per connection.
    pub request_of_connection: Vec<Vec<u8>>,
    pub warmup: u64,
    pub requests: u64,
    pub duration: Option<Duration>,
    /// Requests started per second; without it the loop is closed.
    pub rate: Option<NonZeroU64>,
    pub stream: bool,
    pub abort: Option<Abort>,
    pub timeout: Duration,
}

/// Which responses the client walks away from, and when.
#[derive(Clone, Copy, Debug)]
pub struct Abort {
    pub after_bytes: usize,
    pub percent: u8,
}

impl Abort {
    /// Whether request number `ticket` is among the aborted, which are spread evenly.
    pub fn strikes(self, ticket: u64) -> bool {
        let percent = u64::from(self.percent);
        (ticket % 100) * percent / 100 != (ticket % 100 + 1) * percent / 100
    }
}

impl Options {
    /// Reads the files named and checks everything; the error is a sentence for the user.
    pub fn into_plan(self) -> Result<Plan, String> {
        let target = Target::parse(&self.url)?;
        let mut headers = self.header;
        if let Some(path) = &self.header_file {
            headers.extend(lines(path)?);
        }
        let headers = headers.iter().map(|line| checked_header(line)).collect::<Result<Vec<_>, _>>()?;
        let tokens = match &self.token_file {
            Some(path) => lines(path)?,
            None => Vec::new(),
        };
        if self.token_file.is_some() && tokens.is_empty() {
            return Err("--token-file holds no token".to_owned());
        }
        if self.method.is_empty() || !self.method.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(format!("--method {:?} is not an HTTP method", self.method));
        }
        if matches!(self.method.as_str(), "HEAD" | "CONNECT") {
            return Err(format!("--method {}: its responses are framed in another way", self.method));
        }
        let body = match &self.body_file {
            Some(path) => fs::read(path).map_err(|why| format!("{}: {why}", path.display()))?,
            None => Vec::new(),
        };

        let template = RequestTemplate { method: &self.method, target: &target, headers: &headers, body: &body };
        let mut tokens = tokens.iter().map(String::as_str).cycle();
        let request_of_connection = (0..self.connections).map(|_| template.with_token(tokens.next())).collect::<Result<Vec<_>, _>>()?;
        Ok(Plan {
            address: target.address,
            request_of_connection,
            warmup: self.warmup,
            requests: self.requests,
            duration: self.duration_s.map(Duration::from_secs),
            rate: self.rate,
            stream: self.stream,
            abort: self.abort_after_bytes.map(|after_bytes| Abort { after_bytes, percent: self.abort_fraction_percent }),
            timeout: Duration::from_secs(self.timeout_s),
        })
    }
}

#[derive(Debug, PartialEq)]
struct Target {
    address: SocketAddr,
    authority: String,
    path: String,
}

impl Target {
    fn parse(url: &str) -> Result<Self, String> {
        let rest = url.strip_prefix("http://").ok_or_else(|| format!("--url {url}: only http:// is spoken"))?;
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        if path.bytes().any(|b| b <= b' ' || b == 0x7f) {
            return Err(format!("--url {url}: the path holds a space or a control character"));
        }
        let (host, port) = authority.rsplit_once(':').ok_or_else(|| format!("--url {url}: name the port"))?;
        let port = port.parse().map_err(|_| format!("--url {url}: {port} is not a port"))?;
        // No name but this one is looked up: a load generator must not be led away from this machine by DNS.
        let ip = if host == "localhost" {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            host.trim_start_matches('[')
                .trim_end_matches(']')
                .parse::<IpAddr>()
                .map_err(|_| format!("--url {url}: {host} is not a loopback address"))?
        };
        if !ip.is_loopback() {
            return Err(format!("--url {url}: {host} is not a loopback address"));
        }
        Ok(Self { address: SocketAddr::new(ip, port), authority: authority.to_owned(), path: path.to_owned() })
    }
}

struct RequestTemplate<'a> {
    method: &'a str,
    target: &'a Target,
    headers: &'a [(String, String)],
    body: &'a [u8],
}

impl RequestTemplate<'_> {
    fn with_token(&self, token: Option<&str>) -> Result<Vec<u8>, String> {
        let mut head = format!("{} {} HTTP/1.1\r\nhost: {}\r\n", self.method, self.target.path, self.target.authority);
        let mut push = |name: &str, value: &str| {
            head.extend([name, ": ", value, "\r\n"]);
        };
        if let Some(token) = token {
            let (name, value) = checked_header(&format!("authorization: Bearer {token}"))?;
            push(&name, &value);
        }
        if !self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) && !self.body.is_empty() {
            push("content-type", "application/json");
        }
        for (name, value) in self.headers {
            push(name, value);
        }
        push("content-length", &self.body.len().to_string());
        head.push_str("\r\n");
        Ok([head.as_bytes(), self.body].concat())
    }
}

/// Splits `name: value`; refuses what would break the framing of the request.
fn checked_header(line: &str) -> Result<(String, String), String> {
    let (name, value) = line.split_once(':').ok_or_else(|| "a header must be `name: value`".to_owned())?;
    let (name, value) = (name.trim(), value.trim());
    // The value may be a secret: messages show the name only.
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(format!("{name:?} is not a header name"));
    }
    if value.bytes().any(|b| b.is_ascii_control()) {
        return Err(format!("the value of header {name} holds a control character"));
    }
    if ["host", "content-length", "transfer-encoding", "connection"].iter().any(|own| name.eq_ignore_ascii_case(own)) {
        return Err(format!("loadgen writes the header {name} itself"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// The lines of a file that are not blank.
fn lines(path: &Path) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(path).map_err(|why| format!("{}: {why}", path.display()))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_reached() {
        for url in ["http://127.0.0.1:80/v1", "http://127.9.9.9:1/", "http://[::1]:8080/x?y=z", "http://localhost:9"] {
            assert!(Target::parse(url).is_ok_and(|target| target.address.ip().is_loopback()), "{url}");
        }
        for url in [
            "http://10.0.0.1:80/",
            "http://example.org:80/",
            "http://0.0.0.0:80/",
            "http://127.0.0.1.example.org:80/",
            "http://localhost@10.0.0.1:80/",
            "http://127.0.0.1/",
            "https://127.0.0.1:443/",
        ] {
            assert!(Target::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn requests_are_framed() -> Result<(), String> {
        let target = Target::parse("http://127.0.0.1:8080/v1/chat/completions")?;
        let headers = [checked_header("X-Tag:  a b ")?];
        let template = RequestTemplate { method: "POST", target: &target, headers: &headers, body: b"{}" };
        assert_eq!(
            String::from_utf8_lossy(&template.with_token(Some("vk_1"))?),
            "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8080\r\nauthorization: Bearer vk_1\r\n\
             content-type: application/json\r\nX-Tag: a b\r\ncontent-length: 2\r\n\r\n{}"
        );
        Ok(())
    }

    #[test]
    fn headers_that_break_the_framing_are_refused() {
        for line in ["no colon", ": x", "a b: x", "a: x\r\nb: y", "Content-Length: 3", "Host: other"] {
            assert!(checked_header(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn aborts_are_as_many_as_asked_for() {
        for percent in 0..=100 {
            let abort = Abort { after_bytes: 0, percent };
            let struck = (0..1000).filter(|&ticket| abort.strikes(ticket)).count();
            assert_eq!(struck, usize::from(percent) * 10);
        }
    }
}
