//! A minimal HTTP/1.1 server for loopback: what the stand-in and the receiver are made of.
//!
//! Guarantees: a thread per connection, joined when it ends or at [`Server::stop`]; bodies by length or chunked,
//! keep-alive, streamed answers that reach the peer at every write; `stop` closes the listening socket and cuts
//! every open connection at once, whatever it is doing; `start` on the same port works right after.
//! Leaves to the handler: what to answer, and ending when the peer is gone ([`Answer::peer_gone`]) or when the
//! server is being stopped (the handler's owner must wake it).
//!
//! Ours and not `oxhttp` 0.3.3, which DESIGN §10 names for the status page: its server cannot be stopped
//! (`ListeningServer` only joins), its threads are out of reach, so no connection can be cut; a streamed body is
//! read through a fixed buffer that holds a row back until it is full; and it prints to stderr. Tests need all
//! three. No TLS, no HTTP/1.0 keep-alive, no trailers, no pipelining limits: peers are our own.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use percent_encoding::percent_decode_str;

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Longest request line and headers together, in bytes.
const HEAD_BYTES_MAX: u64 = 64 * 1024;
/// Longest body of a request, in bytes: more than any batch or `_bulk_docs` of ours.
const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How often a taken port is tried again, 20 ms apart: our own predecessor may still be closing.
const BIND_TRIES: usize = 100;

/// A request, read to its end.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `POST`, …
    pub method: String,
    /// Path as it came, still percent-encoded, without the query: `/db/_local%2Fx`.
    pub path: String,
    /// Query, decoded, in order: `+` is a blank.
    pub query: Vec<(String, String)>,
    /// Headers in order, names as they came.
    pub headers: Vec<(String, String)>,
    /// The body, empty when there is none.
    pub body: Vec<u8>,
}

impl Request {
    /// The segments of the path, each decoded: `/a%2Fb/c` is `["a/b", "c"]`.
    pub fn segments(&self) -> Vec<String> {
        let decode = |segment: &str| percent_decode_str(segment).decode_utf8_lossy().into_owned();
        self.path.split('/').filter(|segment| !segment.is_empty()).map(decode).collect()
    }

    /// The first value of a query parameter.
    pub fn query_value(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The first value of a header, its name in any case.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

/// What answers: called on the connection's thread, for several requests at a time.
pub type Handler = dyn Fn(&Request, Answer<'_>) + Send + Sync;

/// A server that may be stopped and started again on its port. Stops when dropped.
pub struct Server {
    name: String,
    handler: Arc<Handler>,
    address: SocketAddr,
    running: Mutex<Option<Running>>,
}

struct Running {
    accepting: sys::Thread,
    /// Dropping or writing to it ends the accepting thread.
    wake: UnixStream,
    connections: Arc<Mutex<Connections>>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, Connection>,
}

struct Connection {
    /// For `stop`, which shuts it down under the thread that serves it.
    stream: TcpStream,
    thread: sys::Thread,
}

impl Server {
    /// Starts one; `name` is put in front of its threads' names. Port 0 takes a free one.
    ///
    /// # Errors
    /// `Io` when the address cannot be had.
    pub fn start(
        name: &str,
        listen: SocketAddr,
        handler: impl Fn(&Request, Answer<'_>) + Send + Sync + 'static,
    ) -> Result<Server> {
        let listener = bind(listen)?;
        let address = listener.local_addr().map_err(|error| io_error(listen, &error))?;
        let handler: Arc<Handler> = Arc::new(handler);
        let running = run(name, listener, Arc::clone(&handler))?;
        Ok(Server { name: name.to_owned(), handler, address, running: Mutex::new(Some(running)) })
    }

    /// Where it listens, or listened.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes the listening socket, cuts all connections, joins all threads. Idempotent.
    ///
    /// A handler that waits for something else must have been woken by its owner before.
    pub fn stop(&self) {
        let Some(running) = locked(&self.running).take() else { return };
        drop(running.wake);
        report(running.accepting.join());
        let open = {
            let mut connections = locked(&running.connections);
            std::mem::take(&mut connections.open)
        };
        for connection in open.values() {
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        for (_, connection) in open {
            report(connection.thread.join());
        }
    }

    /// Listens on the same port again after [`Server::stop`]; nothing when it runs already.
    ///
    /// # Errors
    /// `Io` when somebody else has the port.
    pub fn start_again(&self) -> Result<()> {
        let mut running = locked(&self.running);
        if running.is_none() {
            *running = Some(run(&self.name, bind(self.address)?, Arc::clone(&self.handler))?);
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn bind(listen: SocketAddr) -> Result<TcpListener> {
    let mut tries = 0;
    loop {
        // The standard library sets SO_REUSEADDR, so connections in TIME_WAIT do not hold the port.
        match TcpListener::bind(listen) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && listen.port() != 0 && tries < BIND_TRIES =>
            {
                tries += 1;
                sys::sleep(Duration::from_millis(20));
            }
            result => return result.map_err(|error| io_error(listen, &error)),
        }
    }
}

fn io_error(listen: SocketAddr, error: &io::Error) -> Error {
    Error::new(Kind::Io, error.to_string()).context(format!("failed to listen on `{listen}`"))
}

fn run(name: &str, listener: TcpListener, handler: Arc<Handler>) -> Result<Running> {
    let failed =
        |error: io::Error| Error::new(Kind::Io, format!("failed to make a pair of sockets: {error}"));
    let (wake, woken) = UnixStream::pair().map_err(failed)?;
    let connections = Arc::new(Mutex::new(Connections::default()));
    let (thread_name, shared) = (name.to_owned(), Arc::clone(&connections));
    let accepting = sys::spawn(&format!("{name}:accept"), move || {
        accept(&thread_name, &listener, &woken, &shared, &handler)
    })?;
    Ok(Running { accepting, wake, connections })
}

/// Takes connections until `woken` has something to read: its other end was dropped.
fn accept(
    name: &str,
    listener: &TcpListener,
    woken: &UnixStream,
    connections: &Arc<Mutex<Connections>>,
    handler: &Arc<Handler>,
) {
    loop {
        let mut waiting =
            [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return log::error!("{name}: failed to wait for connections: {error}"),
        }
        if waiting[1].any().unwrap_or(true) {
            return;
        }
        if !waiting[0].any().unwrap_or(false) {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = open(name, stream, connections, handler) {
                    log::warn!("{name}: dropped a connection: {error}");
                }
            }
            Err(error) => {
                // The peer gave up in between, or descriptors have run out: then it would be asked at once again.
                log::debug!("{name}: failed to accept: {error}");
                sys::sleep(Duration::from_millis(10));
            }
        }
    }
}

fn open(
    name: &str,
    stream: TcpStream,
    connections: &Arc<Mutex<Connections>>,
    handler: &Arc<Handler>,
) -> Result<()> {
    let failed = |error: io::Error| Error::new(Kind::Io, error.to_string());
    stream.set_nodelay(true).map_err(failed)?;
    let ours = stream.try_clone().map_err(failed)?;
    let mut connections = locked(connections);
    reap(&mut connections);
    let number = connections.next;
    connections.next += 1;
    let handler = Arc::clone(handler);
    let thread = sys::spawn(&format!("{name}:{number}"), move || {
        let _ = serve(&stream, &*handler);
        // The clone in the table would keep the connection open.
        let _ = stream.shutdown(Shutdown::Both);
    })?;
    connections.open.insert(number, Connection { stream: ours, thread });
    Ok(())
}

fn reap(connections: &mut Connections) {
    let ended: Vec<u64> = connections
        .open
        .iter()
        .filter(|(_, one)| one.thread.is_finished())
        .map(|(number, _)| *number)
        .collect();
    for connection in ended.iter().filter_map(|number| connections.open.remove(number)) {
        report(connection.thread.join());
    }
}

fn report(joined: std::result::Result<(), String>) {
    if let Err(panic) = joined {
        log::error!("{panic}");
    }
}

fn serve(stream: &TcpStream, handler: &Handler) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    while let Some((request, keep_alive)) = read_request(&mut reader, stream)? {
        let mut outcome = Outcome::Cut;
        handler(
            &request,
            Answer { stream, keep_alive, head: request.method == "HEAD", outcome: &mut outcome },
        );
        if outcome == Outcome::Cut || !keep_alive {
            break;
        }
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum Outcome {
    Whole,
    Cut,
}

/// The answer to one request. Dropped without a call, the connection is cut.
pub struct Answer<'a> {
    stream: &'a TcpStream,
    keep_alive: bool,
    head: bool,
    outcome: &'a mut Outcome,
}

impl<'a> Answer<'a> {
    /// A whole answer, in one write. `content-length` and `date` are put by us.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn send(self, status: u16, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
        let mut bytes = self.head(status, headers);
        bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        if !self.head {
            bytes.extend(body);
        }
        (&*self.stream).write_all(&bytes)?;
        *self.outcome = Outcome::Whole;
        Ok(())
    }

    /// Sends the head and gives a writer for a chunked body.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn stream(self, status: u16, headers: &[(&str, &str)]) -> io::Result<ChunkWriter<'a>> {
        let mut bytes = self.head(status, headers);
        bytes.extend(b"Transfer-Encoding: chunked\r\n\r\n");
        (&*self.stream).write_all(&bytes)?;
        Ok(ChunkWriter { stream: self.stream, outcome: self.outcome })
    }

    /// Drops the connection without an answer.
    pub fn cut(self) {}

    /// Whether the peer has closed or reset the connection. Never waits.
    pub fn peer_gone(&self) -> bool {
        peer_gone(self.stream)
    }

    /// A second handle on the connection, to ask whether the peer is gone from elsewhere.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn peer(&self) -> io::Result<Peer> {
        self.stream.try_clone().map(Peer)
    }

    fn head(&self, status: u16, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut head = format!("HTTP/1.1 {status} {}\r\n", reason(status));
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let printer = jiff::fmt::rfc2822::DateTimePrinter::new();
        if let Ok(date) = printer.timestamp_to_rfc9110_string(&sys::wall()) {
            head.push_str(&format!("Date: {date}\r\n"));
        }
        if !self.keep_alive {
            head.push_str("Connection: close\r\n");
        }
        head.into_bytes()
    }
}

/// Somebody's connection, only to look whether they are still there.
#[derive(Debug)]
pub struct Peer(TcpStream);

impl Peer {
    /// As [`Answer::peer_gone`].
    pub fn gone(&self) -> bool {
        peer_gone(&self.0)
    }
}

fn peer_gone(stream: &TcpStream) -> bool {
    match recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(n_bytes) => n_bytes == 0,
        Err(Errno::EAGAIN | Errno::EINTR) => false,
        Err(_) => true,
    }
}

/// Writes a chunked body; each write is one chunk and leaves at once. Dropped before `finish`, the body is cut.
pub struct ChunkWriter<'a> {
    stream: &'a TcpStream,
    outcome: &'a mut Outcome,
}

impl ChunkWriter<'_> {
    /// Sends bytes; none are none, not the end.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let mut chunk = format!("{:x}\r\n", bytes.len()).into_bytes();
        chunk.extend(bytes);
        chunk.extend(b"\r\n");
        self.stream.write_all(&chunk)
    }

    /// Ends the body rightly.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn finish(mut self) -> io::Result<()> {
        self.stream.write_all(b"0\r\n\r\n")?;
        *self.outcome = Outcome::Whole;
        Ok(())
    }

    /// Drops the connection in the middle of the body.
    pub fn cut(self) {}

    /// As [`Answer::peer_gone`].
    pub fn peer_gone(&self) -> bool {
        peer_gone(self.stream)
    }
}

/// Reads one request and whether the connection stays open after it; `None` when the peer closed between two.
fn read_request(
    reader: &mut BufReader<&TcpStream>,
    mut stream: &TcpStream,
) -> io::Result<Option<(Request, bool)>> {
    let mut limited = reader.take(HEAD_BYTES_MAX);
    let Some(first) = read_line(&mut limited)? else { return Ok(None) };
    let mut words = first.split(' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(malformed("request line"));
    };
    let mut headers = Vec::new();
    loop {
        let line = read_line(&mut limited)?.ok_or_else(|| malformed("headers"))?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed("header"))?;
        headers.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    if header(&headers, "expect").is_some_and(|value| value.eq_ignore_ascii_case("100-continue")) {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    let body = read_body(reader, &headers)?;
    let close = header(&headers, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = query.split('&').filter(|pair| !pair.is_empty()).map(decode_pair).collect();
    let request = Request { method: method.to_owned(), path: path.to_owned(), query, headers, body };
    Ok(Some((request, version == "HTTP/1.1" && !close)))
}

fn read_body(reader: &mut impl BufRead, headers: &[(String, String)]) -> io::Result<Vec<u8>> {
    let mut body = Vec::new();
    let chunked =
        header(headers, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
    if !chunked {
        let length = header(headers, "content-length").map_or(Ok(0), str::parse::<u64>);
        let length = length.ok().filter(|length| *length <= BODY_BYTES_MAX);
        read_exactly(reader, length.ok_or_else(|| malformed("content-length"))?, &mut body)?;
        return Ok(body);
    }
    loop {
        let line = read_line(&mut reader.take(HEAD_BYTES_MAX))?.unwrap_or_default();
        let size = line.split(';').next().and_then(|size| u64::from_str_radix(size.trim(), 16).ok());
        let size = size.filter(|size| body.len() as u64 + size <= BODY_BYTES_MAX);
        let size = size.ok_or_else(|| malformed("chunk size"))?;
        read_exactly(reader, size, &mut body)?;
        if !read_line(&mut reader.take(HEAD_BYTES_MAX))?.unwrap_or_default().is_empty() {
            return Err(malformed("chunk end"));
        }
        if size == 0 {
            return Ok(body);
        }
    }
}

fn read_exactly(reader: &mut impl BufRead, length: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if reader.take(length).read_to_end(body)? as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

fn read_line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    if !line.ends_with('\n') {
        return Err(malformed("line"));
    }
    line.truncate(line.trim_end_matches(['\r', '\n']).len());
    Ok(Some(line))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed {what}"))
}

fn decode_pair(pair: &str) -> (String, String) {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    (decode(name), decode(value))
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(given, _)| given.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

fn reason(status: u16) -> &'static str {
    http::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason()).unwrap_or("Unknown")
}

/// A lock that survives a panic of another thread: what is behind it is whole after each statement.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn loopback() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    fn echo() -> Server {
        Server::start("echo", loopback(), |request, answer| match request.path.as_str() {
            "/cut" => answer.cut(),
            "/rows" => {
                let mut rows = answer.stream(200, &[]).unwrap();
                rows.write(b"one\n").unwrap();
                while !rows.peer_gone() {
                    sys::sleep(Duration::from_millis(1));
                }
            }
            "/half" => answer.stream(200, &[]).unwrap().write(b"half").unwrap(),
            _ => {
                let text = format!(
                    "{} {:?} {:?} {}",
                    request.method,
                    request.segments(),
                    request.query,
                    String::from_utf8_lossy(&request.body)
                );
                answer.send(200, &[("X-Test", "1")], text.as_bytes()).unwrap();
            }
        })
        .unwrap()
    }

    fn connect(server: &Server) -> TcpStream {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }

    /// Sends `requests` and reads until the peer closes.
    fn exchange(server: &Server, requests: &str) -> String {
        let mut stream = connect(server);
        stream.write_all(requests.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn reads_bodies_of_both_kinds_on_one_connection() {
        let server = echo();
        let answer = exchange(
            &server,
            "POST /a%2Fb/c?x=1+2&y=%7B HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc\
             PUT /d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n\
             GET /e HTTP/1.1\r\nConnection: close\r\n\r\n",
        );
        assert!(answer.contains(r#"POST ["a/b", "c"] [("x", "1 2"), ("y", "{")] abc"#), "{answer}");
        assert!(answer.contains(r#"PUT ["d"] [] hello"#), "{answer}");
        assert!(answer.ends_with(r#"GET ["e"] [] "#), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 200 OK\r\nX-Test: 1\r\nDate: ").count(), 3, "{answer}");
    }

    #[test]
    fn a_streamed_row_arrives_while_the_answer_goes_on() {
        let server = echo();
        let mut stream = connect(&server);
        stream.write_all(b"GET /rows HTTP/1.1\r\n\r\n").unwrap();
        let mut reader = BufReader::new(&stream);
        let mut line = String::new();
        while line != "one\n" {
            line.clear();
            assert_ne!(reader.read_line(&mut line).unwrap(), 0);
        }
    }

    #[test]
    fn cuts_without_an_answer_and_in_the_middle_of_one() {
        let server = echo();
        assert_eq!(exchange(&server, "GET /cut HTTP/1.1\r\n\r\n"), "");
        let half = exchange(&server, "GET /half HTTP/1.1\r\n\r\n");
        assert!(half.ends_with("4\r\nhalf\r\n"), "{half}");
        assert_eq!(exchange(&server, "nonsense\r\n\r\n"), "");
    }

    #[test]
    fn stop_cuts_everything_and_the_port_can_be_had_again() {
        let (entered, left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (entered_too, left_too) = (Arc::clone(&entered), Arc::clone(&left));
        let server = Server::start("stop", loopback(), move |_, answer| {
            entered_too.fetch_add(1, Ordering::SeqCst);
            while !answer.peer_gone() {
                sys::sleep(Duration::from_millis(1));
            }
            left_too.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        for round in 1..=3 {
            let mut busy = connect(&server);
            busy.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let idle = connect(&server);
            while entered.load(Ordering::SeqCst) < round {
                sys::sleep(Duration::from_millis(1));
            }
            server.stop();
            assert_eq!(left.load(Ordering::SeqCst), round, "a handler outlived `stop`");
            for mut stream in [busy, idle] {
                assert!(stream.read(&mut [0; 10]).unwrap_or(0) == 0, "a connection outlived `stop`");
            }
            let refused = TcpStream::connect(server.address()).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            server.start_again().unwrap();
        }
    }
}
