//! Runs a [`Plan`]: one task per connection, each taking the next request until none is left.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio::time;

use crate::http::Response;
use crate::options::{Abort, Plan};
use crate::report::Report;

const READ_BUFFER_BYTES: usize = 32 * 1024;
/// After a failure a connection waits: a server that is down must not be asked as fast as the kernel refuses.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Warms up, then measures.
pub async fn run(plan: &Plan) -> Report {
    let connections = plan.request_of_connection.iter().map(|request| Connection::new(plan, request.clone())).collect();
    let (connections, _) = run_phase(plan, connections, Tickets::new(plan.warmup, plan.rate, None)).await;
    let (_, report) = run_phase(plan, connections, Tickets::new(plan.requests, plan.rate, plan.duration)).await;
    report
}

/// Lets the connections send what `tickets` hold; gives them back, still open, with what was measured.
async fn run_phase(plan: &Plan, connections: Vec<Connection>, tickets: Tickets) -> (Vec<Connection>, Report) {
    // One thread: cells are enough, and one histogram serves all.
    let report = Rc::new(RefCell::new(Report::new(plan.stream)));
    let tickets = Rc::new(tickets);
    let local = LocalSet::new();
    let tasks: Vec<_> =
        connections.into_iter().map(|connection| local.spawn_local(connection.send_all(Rc::clone(&tickets), Rc::clone(&report)))).collect();
    let mut idle = Vec::with_capacity(tasks.len());
    local
        .run_until(async {
            for task in tasks {
                match task.await {
                    Ok(connection) => idle.push(connection),
                    Err(why) => report.borrow_mut().failed(&why),
                }
            }
        })
        .await;
    drop(local);
    let mut report = report.replace(Report::new(false));
    report.ended(tickets.started.elapsed());
    (idle, report)
}

/// The requests still to send, and when each is due.
struct Tickets {
    next: Cell<u64>,
    total: u64,
    started: Instant,
    rate: Option<NonZeroU64>,
    duration: Option<Duration>,
}

impl Tickets {
    fn new(total: u64, rate: Option<NonZeroU64>, duration: Option<Duration>) -> Self {
        Self { next: Cell::new(0), total, started: Instant::now(), rate, duration }
    }

    /// The next request's number and the time it is due, as an offset from the start; in a closed loop, at once.
    fn take(&self) -> Option<(u64, Option<Duration>)> {
        let ticket = self.next.get();
        let due = self.rate.map(|rate| due_after(ticket, rate));
        let starts = due.unwrap_or_default().max(self.started.elapsed());
        if ticket >= self.total || self.duration.is_some_and(|duration| starts >= duration) {
            return None;
        }
        self.next.set(ticket + 1);
        Some((ticket, due))
    }
}

/// When request `ticket` of a stream of `rate` per second is due.
fn due_after(ticket: u64, rate: NonZeroU64) -> Duration {
    let nanos = u128::from(ticket) * 1_000_000_000 / u128::from(rate.get());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// One keep-alive connection and the request it repeats.
struct Connection {
    address: SocketAddr,
    request: Vec<u8>,
    socket: Option<TcpStream>,
    buffer: Vec<u8>,
    abort: Option<Abort>,
    stream: bool,
    timeout: Duration,
}

/// How an exchange ended when it did not fail.
struct Exchange {
    status: u16,
    body_bytes: u64,
    aborted: bool,
}

impl Connection {
    fn new(plan: &Plan, request: Vec<u8>) -> Self {
        Self {
            address: plan.address,
            request,
            socket: None,
            buffer: vec![0; READ_BUFFER_BYTES],
            abort: plan.abort,
            stream: plan.stream,
            timeout: plan.timeout,
        }
    }

    async fn send_all(mut self, tickets: Rc<Tickets>, report: Rc<RefCell<Report>>) -> Self {
        while let Some((ticket, due)) = tickets.take() {
            let began = wait_until_due(tickets.started, due).await;
            let abort_after = self.abort.filter(|abort| abort.strikes(ticket)).map(|abort| abort.after_bytes);
            match time::timeout(self.timeout, self.exchange(began, abort_after, &report)).await {
                Ok(Ok(Exchange { status, body_bytes, aborted: true })) => {
                    report.borrow_mut().aborted(status, body_bytes);
                }
                Ok(Ok(Exchange { status, body_bytes, aborted: false })) => {
                    report.borrow_mut().answered(status, body_bytes, began.elapsed());
                }
                Ok(Err(why)) => self.give_up(&why, &report).await,
                Err(_) => self.give_up(&"the response took longer than --timeout-s", &report).await,
            }
        }
        self
    }

    async fn give_up(&mut self, why: &impl std::fmt::Display, report: &RefCell<Report>) {
        self.socket = None;
        report.borrow_mut().failed(why);
        time::sleep(PAUSE_AFTER_FAILURE).await;
    }

    /// Sends the request and follows the response to its end, or to where the client is to walk away.
    /// A request is never repeated: a failure on a connection that was kept alive is a failure.
    async fn exchange(&mut self, began: Instant, abort_after: Option<usize>, report: &RefCell<Report>) -> io::Result<Exchange> {
        // Taken out, and put back only when the next request may use it.
        let mut socket = match self.socket.take() {
            Some(socket) => socket,
            None => connect(self.address).await?,
        };
        socket.write_all(&self.request).await?;

        let mut response = Response::new();
        let mut body_bytes = 0;
        let mut last_arrival = None;
        while !response.is_done() {
            let read = socket.read(&mut self.buffer).await?;
            if read == 0 {
                response.feed_end().map_err(io::Error::other)?;
                break;
            }
            let arrived = response.feed(&self.buffer[..read]).map_err(io::Error::other)?;
            body_bytes += arrived;
            if self.stream && arrived > 0 {
                let now = Instant::now();
                match last_arrival.replace(now) {
                    None => report.borrow_mut().first_byte(now - began),
                    Some(last) => report.borrow_mut().gap(now - last),
                }
            }
            if let (Some(status), Some(limit)) = (response.status(), abort_after)
                && body_bytes >= limit
                && !response.is_done()
            {
                return Ok(Exchange { status, body_bytes: body_bytes as u64, aborted: true });
            }
        }
        if response.keep_alive() {
            self.socket = Some(socket);
        }
        let status = response.status().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Exchange { status, body_bytes: body_bytes as u64, aborted: false })
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect(address).await?;
    // Requests are written whole: waiting to fill a packet would only delay them.
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// Waits for the request's time and gives the moment its latency counts from. A request that is late because every
/// connection was busy counts from when it was due; else a slow server would hide its own queue (coordinated
/// omission). One that was waited for counts from the wake-up, which the timer may delay by a millisecond.
async fn wait_until_due(started: Instant, due: Option<Duration>) -> Instant {
    let now = Instant::now();
    match due.map(|offset| started + offset) {
        None => now,
        Some(due) if due <= now => due,
        Some(due) => {
            time::sleep_until(due.into()).await;
            Instant::now()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use serde_json::{Value, json};

    use super::*;

    const REQUEST: &[u8] = b"POST / HTTP/1.1\r\ncontent-length: 0\r\n\r\n";

    /// Serves `answer` to each request of any connection, on threads that end with the test process.
    fn serve(answer: &'static [u8]) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        thread::spawn(move || {
            for mut socket in listener.incoming().flatten() {
                thread::spawn(move || {
                    let mut request = [0; REQUEST.len()];
                    while socket.read_exact(&mut request).is_ok() && socket.write_all(answer).is_ok() {}
                });
            }
        });
        Ok(address)
    }

    fn plan(address: SocketAddr) -> Plan {
        Plan {
            address,
            request_of_connection: vec![REQUEST.to_vec(); 4],
            warmup: 3,
            requests: 50,
            duration: None,
            rate: None,
            stream: false,
            abort: None,
            timeout: Duration::from_secs(30),
        }
    }

    fn run_to_json(plan: &Plan) -> io::Result<Value> {
        Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(plan)).to_json())
    }

    #[test]
    fn exactly_the_requests_asked_for_are_sent() -> io::Result<()> {
        let address = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        for rate in [None, NonZeroU64::new(1_000_000)] {
            let report = run_to_json(&Plan { rate, stream: true, ..plan(address) })?;
            assert_eq!(report["requests"], 50);
            assert_eq!(report["errors"], 0, "{report}");
            assert_eq!(report["by_status"], json!({"200": 50}));
            assert_eq!(report["bytes"], 100);
        }
        Ok(())
    }

    #[test]
    fn a_fraction_of_the_responses_is_aborted_in_the_middle() -> io::Result<()> {
        // The server never sends the rest, so only walking away ends these exchanges.
        let address = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc")?;
        let abort = Some(Abort { after_bytes: 2, percent: 100 });
        let report = run_to_json(&Plan { abort, ..plan(address) })?;
        assert_eq!((&report["aborted"], &report["errors"]), (&json!(50), &json!(0)));

        let address = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc")?;
        let report = run_to_json(&Plan { abort, ..plan(address) })?;
        assert_eq!((&report["aborted"], &report["errors"]), (&json!(0), &json!(0)));
        Ok(())
    }

    #[test]
    fn failures_are_counted_and_named() -> io::Result<()> {
        let address = serve(b"nonsense\r\n\r\n")?;
        let report = run_to_json(&plan(address))?;
        assert_eq!((&report["requests"], &report["errors"]), (&json!(50), &json!(50)));
        assert_eq!(report["first_error"], "the head of the response is not HTTP/1.1");
        Ok(())
    }

    #[test]
    fn nothing_starts_after_the_duration() -> io::Result<()> {
        let address = serve(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
        let report = run_to_json(&Plan { duration: Some(Duration::ZERO), ..plan(address) })?;
        assert_eq!(report["requests"], 0);
        Ok(())
    }

    #[test]
    fn an_open_loop_is_even() {
        let due: Vec<_> = (0..4).map(|ticket| NonZeroU64::new(3).map(|rate| due_after(ticket, rate).as_millis())).collect();
        assert_eq!(due, [Some(0), Some(333), Some(666), Some(1000)]);
    }
}
