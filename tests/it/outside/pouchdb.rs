//! A CouchDB-compatible server nobody here wrote: drives `tests/pouchdb/start.js`.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A running pouchdb-server, empty, in memory. Dropped, it ends.
pub(crate) struct Pouch {
    child: Child,
    /// `http://127.0.0.1:PORT`.
    pub(crate) url: String,
}

impl Pouch {
    /// Starts one and waits until it answers.
    pub(crate) fn start() -> Pouch {
        let mut child = Command::new("node")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pouchdb/start.js"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("`node` starts: tests/run installs what it needs");
        let said = super::lines(child.stdout.take().unwrap());
        // Longer than other waits: node reads 264 packages, and two cores may be busy compiling.
        let url =
            said.recv_timeout(Duration::from_secs(40)).expect("pouchdb-server answers: tests/run pouchdb");
        Pouch { child, url }
    }
}

impl Drop for Pouch {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[test]
fn the_server_answers_as_a_couchdb_does() {
    use std::io::{Read, Write};
    if !super::pouchdb_is_there() {
        return;
    }
    let pouch = Pouch::start();
    let address = pouch.url.strip_prefix("http://").unwrap();
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("PouchDB"), "{answer}");
}
