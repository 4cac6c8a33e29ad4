//! As much of CouchDB as a daemon needs to start and read: one database whose documents are made up as they are
//! asked for, and whatever else is written kept in memory.
//!
//! Guarantees that a million changes cost no memory and next to no time, so that it is the daemon that is measured.
//! The stand-in of the tests (`standin`) parses and keeps every document; it is no good for that.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use couch_hookd::sys;

/// The database with changes.
pub(crate) const DB: &str = "bench";
/// Length of a document, in bytes.
pub(crate) const DOC_BYTES: usize = 1024;
/// A chunk of a page, in bytes; CouchDB 3.x collects about as much.
const CHUNK_BYTES: usize = 16 * 1024;
/// What follows the number in a seq: as long as those of a 3.x with two shards.
const SEQ_TAIL: &str = "-g1AAAACTeJzLYWBgYMpgTmHgz8tPSTV0MDQy1zMAQsMckEQiQ1L9____szKYExlzgQLsxpYWZomGqdg04DEmSQFIJtnDTWIEm5RkmpqSZJqMTScek5IEHBFmpgHAqg";

/// A running server. It ends with the process.
pub(crate) struct Couch {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    n_changes: AtomicU64,
    /// Bodies by path, each with its `_rev`.
    documents: Mutex<HashMap<String, (u64, String)>>,
    n_checkpoints: AtomicU64,
}

impl Couch {
    /// Starts one on a free port of loopback.
    pub(crate) fn start() -> Couch {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
        let address = listener.local_addr().expect("it listens");
        let shared = Arc::new(Shared {
            n_changes: AtomicU64::new(0),
            documents: Mutex::default(),
            n_checkpoints: AtomicU64::new(0),
        });
        let serving = Arc::clone(&shared);
        let accept = move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                // It ends when the daemon hangs up.
                let _connection = sys::spawn("couch", move || serve(&shared, stream));
            }
        };
        let _accepting = sys::spawn("couch:accept", accept).expect("there is room for a thread");
        Couch { shared, address }
    }

    /// Forgets everything that was written; the database has `n_changes` now.
    pub(crate) fn reset(&self, n_changes: u64) {
        self.shared.n_changes.store(n_changes, Ordering::SeqCst);
        self.shared.n_checkpoints.store(0, Ordering::SeqCst);
        self.shared.documents.lock().expect("nobody panics").clear();
    }

    /// Where it is.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Checkpoints stored since the reset, and the number in the last one's `through_seq`.
    pub(crate) fn checkpoints(&self) -> (u64, u64) {
        let documents = self.shared.documents.lock().expect("nobody panics");
        let checkpoint = documents.iter().find(|(path, _)| path.contains("/_local/couch-hookd."));
        let through_seq = checkpoint.and_then(|(_, (_, body))| {
            let (_, rest) = body.split_once("\"through_seq\":\"")?;
            rest.split_once('-')?.0.parse().ok()
        });
        (self.shared.n_checkpoints.load(Ordering::SeqCst), through_seq.unwrap_or(0))
    }
}

/// Appends the row of change `n`.
pub(crate) fn push_row(out: &mut Vec<u8>, n: u64) {
    let rev = format!("1-{:032x}", u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
    write!(
        out,
        "{{\"seq\":\"{n}{SEQ_TAIL}\",\"id\":\"doc-{n:09}\",\"changes\":[{{\"rev\":\"{rev}\"}}],\"doc\":"
    )
    .expect("memory takes it");
    let start = out.len();
    write!(
        out,
        "{{\"_id\":\"doc-{n:09}\",\"_rev\":\"{rev}\",\"type\":\"order\",\"customer\":{{\"name\":\"Müller & Söhne\",\
         \"city\":\"Basel\",\"vip\":false,\"tags\":[\"b2b\",\"net30\"]}},\"total\":1234.50,\"currency\":\"CHF\",\"items\":["
    )
    .expect("memory takes it");
    for item in 0..6 {
        let comma = if item == 0 { "" } else { "," };
        write!(out, "{comma}{{\"sku\":\"A-{item:05}\",\"quantity\":{item},\"price\":19.90,\"text\":\"a \\\"thing\\\"\"}}")
            .expect("memory takes it");
    }
    out.extend_from_slice(b"],\"note\":\"");
    let missing = DOC_BYTES - (out.len() - start) - 2;
    out.resize(out.len() + missing, b'x');
    out.extend_from_slice(b"\"}}");
}

struct Request {
    method: String,
    path: String,
    query: String,
    body: String,
}

/// Reads the next request; `None` when the peer is gone.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut n_bytes = 0;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let header = line.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            n_bytes = value.trim().parse().ok()?;
        }
    }
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let (path, query) = (path.to_owned(), query.to_owned());
    Some(Request { method, path, query, body: String::from_utf8(body).ok()? })
}

fn serve(shared: &Shared, mut stream: TcpStream) {
    let Ok(reading) = stream.try_clone() else { return };
    let _ = stream.set_nodelay(true);
    let mut reader = BufReader::with_capacity(CHUNK_BYTES, reading);
    while let Some(request) = read_request(&mut reader) {
        let sent = if request.path == format!("/{DB}/_changes") {
            send_changes(shared, &request.query, &mut stream)
        } else {
            let (status, body) = answer(shared, &request);
            let head = format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: ");
            stream.write_all(format!("{head}{}\r\n\r\n{body}", body.len()).as_bytes())
        };
        if sent.is_err() {
            return;
        }
    }
}

fn answer(shared: &Shared, request: &Request) -> (u16, String) {
    let n_changes = shared.n_changes.load(Ordering::SeqCst);
    let mut documents = shared.documents.lock().expect("nobody panics");
    match (request.method.as_str(), request.path.as_str()) {
        ("GET", "/") => {
            (200, "{\"couchdb\":\"Welcome\",\"version\":\"3.5.0\",\"uuid\":\"bench\"}".to_owned())
        }
        ("GET", "/_membership") => (200, "{\"all_nodes\":[\"a\"],\"cluster_nodes\":[\"a\"]}".to_owned()),
        ("GET", path) if path == format!("/{DB}") => {
            let seq =
                format!("\"update_seq\":\"{n_changes}{SEQ_TAIL}\",\"instance_start_time\":\"1700000000\"");
            (200, format!("{{\"db_name\":\"{DB}\",\"doc_count\":{n_changes},{seq}}}"))
        }
        ("GET", path) if path.ends_with("/_all_docs") => (200, "{\"rows\":[]}".to_owned()),
        ("GET", path) => match documents.get(path) {
            Some((rev, body)) if path.contains("/_local/") || !path.contains("/_") => {
                (200, format!("{{\"_rev\":\"0-{rev}\",{}", &body[1..]))
            }
            Some((_, body)) => (200, body.clone()),
            None if path.ends_with("/_security") => (200, "{}".to_owned()),
            None => (404, "{\"error\":\"not_found\",\"reason\":\"missing\"}".to_owned()),
        },
        ("PUT", path) => {
            if path.contains("/_local/couch-hookd.") {
                shared.n_checkpoints.fetch_add(1, Ordering::SeqCst);
            }
            let rev = documents.get(path).map_or(1, |(rev, _)| rev + 1);
            // The daemon writes `_rev` as a member of the body; one is enough.
            let mut body: serde_json::Value = serde_json::from_str(&request.body).unwrap_or_default();
            if let Some(members) = body.as_object_mut() {
                members.remove("_rev");
            }
            documents.insert(path.to_owned(), (rev, body.to_string()));
            (201, format!("{{\"ok\":true,\"id\":\"x\",\"rev\":\"0-{rev}\"}}"))
        }
        _ => (405, "{\"error\":\"method_not_allowed\",\"reason\":\"bench\"}".to_owned()),
    }
}

fn send_changes(shared: &Shared, query: &str, stream: &mut TcpStream) -> std::io::Result<()> {
    let n_changes = shared.n_changes.load(Ordering::SeqCst);
    let value = |name: &str| {
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
    };
    let number = |text: &str| text.split('-').next().and_then(|number| number.parse::<u64>().ok());
    let since = number(value("since")).unwrap_or(0);
    let is_page = value("feed") == "normal";
    let limit = number(value("limit")).filter(|_| is_page).unwrap_or(u64::MAX);
    let last = since.saturating_add(limit).min(n_changes).max(since);
    stream.write_all(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
    )?;
    let mut chunk = Vec::with_capacity(2 * CHUNK_BYTES);
    if is_page {
        chunk.extend_from_slice(b"{\"results\":[\n");
    }
    for n in since + 1..=last {
        push_row(&mut chunk, n);
        chunk.extend_from_slice(if is_page && n < last { b",\n" } else { b"\n" });
        if chunk.len() >= CHUNK_BYTES {
            send_chunk(stream, &mut chunk)?;
        }
    }
    if is_page {
        writeln!(chunk, "],\"last_seq\":\"{last}{SEQ_TAIL}\",\"pending\":{}}}", n_changes - last)?;
        send_chunk(stream, &mut chunk)?;
        return stream.write_all(b"0\r\n\r\n");
    }
    send_chunk(stream, &mut chunk)?;
    // An open request: nothing more happens until the daemon hangs up.
    stream.read(&mut [0]).and(Err(std::io::ErrorKind::UnexpectedEof.into()))
}

fn send_chunk(stream: &mut TcpStream, chunk: &mut Vec<u8>) -> std::io::Result<()> {
    if !chunk.is_empty() {
        let size = format!("{:x}\r\n", chunk.len());
        chunk.splice(0..0, size.into_bytes());
        chunk.extend_from_slice(b"\r\n");
        stream.write_all(chunk)?;
        chunk.clear();
    }
    Ok(())
}
