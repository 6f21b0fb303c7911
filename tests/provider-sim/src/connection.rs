//! One accepted connection: keeps each request's head as it was on the wire, and can end in a reset.
//!
//! The HTTP library merges or drops repeated framing headers before anyone sees them, and those are exactly what the
//! violations look for: hence the copy.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

const END_OF_HEAD: &[u8] = b"\r\n\r\n";
const LARGEST_HEAD: usize = 256 * 1024;

#[derive(Debug)]
pub struct Connection {
    reset: AtomicBool,
    /// The head being read; none while a request is under way, or if heads are not kept.
    head: Mutex<Option<Vec<u8>>>,
    keeps_heads: bool,
}

impl Connection {
    pub fn new(keeps_heads: bool) -> Self {
        Connection { reset: AtomicBool::new(false), head: Mutex::new(keeps_heads.then(Vec::new)), keeps_heads }
    }

    /// Ends the connection by RST at its next use.
    pub fn reset(&self) {
        self.reset.store(true, Ordering::Release);
    }

    /// The header lines of the HTTP/1 request that has just been read, names in lower case.
    pub fn take_head(&self) -> Option<Vec<(String, String)>> {
        let head = self.head().take()?;
        let end = memchr::memmem::find(&head, END_OF_HEAD)?;
        let text = String::from_utf8_lossy(head.get(..end)?);
        let lines = text.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
        Some(lines.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect())
    }

    /// The request under way has been answered: the next bytes are a new head.
    pub fn expect_head(&self) {
        if self.keeps_heads {
            *self.head() = Some(Vec::new());
        }
    }

    fn received(&self, bytes: &[u8]) {
        if !self.keeps_heads {
            return;
        }
        if let Some(head) = self.head().as_mut()
            && head.len() < LARGEST_HEAD
            && memchr::memmem::find(head, END_OF_HEAD).is_none()
        {
            head.extend_from_slice(bytes);
        }
    }

    fn head(&self) -> std::sync::MutexGuard<'_, Option<Vec<u8>>> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The bytes of a connection, watched.
#[derive(Debug)]
pub struct Watched {
    transport: Transport,
    connection: Arc<Connection>,
}

impl Watched {
    pub fn new(transport: Transport, connection: Arc<Connection>) -> Self {
        Watched { transport, connection }
    }

    fn usable(&self) -> io::Result<()> {
        if self.connection.reset.load(Ordering::Acquire) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if self.usable().is_err() {
            let tcp = match &self.transport {
                Transport::Plain(tcp) => tcp,
                Transport::Tls(tls) => tls.get_ref().0,
            };
            // A connection that lingers for no time is closed by RST. If that fails it is closed by FIN: still cut.
            let _ = socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.usable()?;
        let before = buf.filled().len();
        let result = match &mut this.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Transport::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        };
        if let Some(bytes) = buf.filled().get(before..).filter(|bytes| !bytes.is_empty()) {
            this.connection.received(bytes);
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.usable()?;
        match &mut this.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Transport::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.usable()?;
        match &mut this.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, bufs),
            Transport::Tls(tls) => Pin::new(tls).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.transport {
            Transport::Plain(tcp) => tcp.is_write_vectored(),
            Transport::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.usable()?;
        match &mut this.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Transport::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.usable()?;
        match &mut this.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Transport::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_kept_line_by_line_and_the_body_is_not() {
        let connection = Connection::new(true);
        connection.received(b"POST / HTTP/1.1\r\nContent-Length: 2\r\ncontent-");
        connection.received(b"length:2\r\n\r\n{}");
        let length = ("content-length".to_owned(), "2".to_owned());
        assert_eq!(connection.take_head(), Some(vec![length.clone(), length]));
        connection.received(b"more body");
        assert_eq!(connection.take_head(), None);
        connection.expect_head();
        connection.received(b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(connection.take_head(), Some(Vec::new()));
    }
}
