//! Accepts connections and speaks HTTP/1.1 or HTTP/2 on them, whichever the client begins with.

use std::sync::Arc;

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::api;
use crate::connection::{Connection, Transport, Watched};
use crate::shared::Shared;

/// Serves for ever.
pub async fn serve(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(None);
    http.http2().timer(TokioTimer::new()).max_concurrent_streams(1000);
    let http = Arc::new(http);
    loop {
        // Out of file descriptors, or a client that left before it was accepted: there will be others.
        let Ok((tcp, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            continue;
        };
        tokio::spawn(connection(tcp, tls.clone(), Arc::clone(&http), Arc::clone(&shared)));
    }
}

async fn connection(tcp: TcpStream, tls: Option<TlsAcceptor>, http: Arc<auto::Builder<TokioExecutor>>, shared: Arc<Shared>) {
    // Without it small events wait for acknowledgements; if it fails they only wait.
    let _ = tcp.set_nodelay(true);
    let transport = match tls {
        None => Transport::Plain(tcp),
        Some(tls) => match tls.accept(tcp).await {
            Ok(stream) => Transport::Tls(Box::new(stream)),
            Err(_) => return,
        },
    };
    let connection = Arc::new(Connection::new(!shared.bench));
    let io = TokioIo::new(Watched::new(transport, Arc::clone(&connection)));
    let service = service_fn(|request| api::answer(Arc::clone(&shared), Arc::clone(&connection), request));
    if let Err(error) = http.serve_connection(io, service).await
        && let Some(what) = garbage(&*error)
    {
        shared.ledger.violation(None, format!("parse_error: {what}"));
    }
}

/// What was wrong, if the client sent what isn't HTTP: the sign of a desynchronised connection.
fn garbage(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let error = error.downcast_ref::<hyper::Error>()?;
    error.is_parse().then(|| error.to_string())
}
