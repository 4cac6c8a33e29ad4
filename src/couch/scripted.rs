//! A server for unit tests: answers each request by a closure, remembers what was asked.
//!
//! One request per connection, on loopback. Not a CouchDB: `standin` is.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::config;
use crate::couch::client::Server;
use crate::pure::secret::Secret;
use crate::sys;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) path: String,
    /// Lines in lower case.
    pub(crate) headers: Vec<String>,
    pub(crate) body: String,
}

/// The server; ends with the test process.
pub(crate) struct Scripted {
    pub(crate) port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Scripted {
    pub(crate) fn start(answer: impl Fn(&Seen, &mut TcpStream) + Send + Sync + 'static) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let answer = Arc::new(answer);
        let log = Arc::clone(&seen);
        let accept = move || {
            for stream in listener.incoming() {
                let (mut stream, answer, log) = (stream.unwrap(), Arc::clone(&answer), Arc::clone(&log));
                drop(sys::spawn("scripted:connection", move || {
                    if let Some(request) = read_request(&stream) {
                        log.lock().unwrap().push(request.clone());
                        answer(&request, &mut stream);
                    }
                }));
            }
        };
        drop(sys::spawn("scripted", accept));
        Scripted { port, seen }
    }

    /// `METHOD PATH` of all requests so far.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect()
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn server(&self, login: Option<(&str, &str)>) -> Server {
        Server::new(&hookd(&format!("http://127.0.0.1:{}", self.port), login)).unwrap()
    }
}

/// A configuration for that URL.
pub(crate) fn hookd(url: &str, login: Option<(&str, &str)>) -> config::Hookd {
    config::Hookd {
        couchdb_url: url.to_owned(),
        username: login.map(|(username, _)| username.to_owned()),
        password: login.map(|(_, password)| Secret::new(password)),
        ca_file: None,
        state_db: "couch_hookd".to_owned(),
        log_level: log::LevelFilter::Info,
        log_format: config::LogFormat::Text,
        public_url: None,
        register: false,
        checkpoint_interval: std::time::Duration::from_secs(5),
        deliveries_max: 64,
        dead_letters_max: 10_000,
        guard: crate::pure::guard::Guard::off(),
        feed_rotate: std::time::Duration::from_secs(60),
        feed_timeout: std::time::Duration::from_secs(60),
        feed_connections: 16,
        sweep_interval: std::time::Duration::from_secs(60),
        sweep_rate: 40,
    }
}

/// A whole answer.
pub(crate) fn send(stream: &mut TcpStream, status: u16, body: &str) {
    let head = format!(
        "HTTP/1.1 {status} X\r\ndate: Sat, 21 Nov 2026 21:30:40 GMT\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(format!("{head}{body}").as_bytes());
}

/// The start of a chunked answer.
pub(crate) fn send_head(stream: &mut TcpStream) {
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
}

/// A piece of a chunked answer; an empty one ends it.
pub(crate) fn send_chunk(stream: &mut TcpStream, piece: &str) {
    let _ = stream.write_all(format!("{:x}\r\n{piece}\r\n", piece.len()).as_bytes());
}

/// Blocks until the other side hangs up.
pub(crate) fn wait_for_hang_up(stream: &mut TcpStream) {
    let _ = stream.read(&mut [0; 1]);
}

/// The recorded answer of a version, from `tests/data`.
pub(crate) fn recorded(version: &str, name: &str) -> (u16, String) {
    let path = format!("{}/tests/data/{version}/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let answer: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    (answer["status"].as_u64().unwrap() as u16, answer["body"].as_str().unwrap().to_owned())
}

fn read_request(stream: &TcpStream) -> Option<Seen> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    let mut n_bytes = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim_end().to_lowercase();
        if line.is_empty() {
            break;
        }
        if let Some(length) = line.strip_prefix("content-length: ") {
            n_bytes = length.parse().ok()?;
        }
        headers.push(line);
    }
    let mut body = vec![0; n_bytes];
    reader.read_exact(&mut body).ok()?;
    Some(Seen { method, path, headers, body: String::from_utf8(body).ok()? })
}
