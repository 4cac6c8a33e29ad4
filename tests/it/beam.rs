//! A real BEAM as CouchDB's end of the pipes: drives `tests/beam/host.escript`.
//!
//! Keeps what the host says with the time it was said. Needs Debian's `erlang-base`; where it is missing, tests say
//! `skipped` and why.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use couch_hookd::sys;

use crate::host::WAIT_MAX;
use crate::world::{Dir, Ini, assert_no_secret};

/// A running host with a daemon under it. Dropped, it stops the daemon as CouchDB does.
pub(crate) struct Beam {
    child: Child,
    dir: Dir,
    said: Arc<(Mutex<Vec<(Instant, String)>>, Condvar)>,
    reader: Option<sys::Thread>,
}

impl Beam {
    /// Starts the daemon under it; `None`, and a line that says so, where there is no Erlang.
    pub(crate) fn start(ini: &Ini) -> Option<Beam> {
        let dir = Dir::new();
        std::fs::write(dir.path("hookd.ini"), ini.text()).unwrap();
        let spawned = Command::new("escript")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/beam/host.escript"))
            .args([dir.path("hookd.ini"), dir.path("transcript")])
            .args([env!("CARGO_BIN_EXE_couch-hookd"), "os-daemon"])
            .env_remove("COUCHDB_URL")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                println!("skipped: kills by a real BEAM (`escript` of Debian's erlang-base: {error})");
                return None;
            }
        };
        let said: Arc<(Mutex<Vec<(Instant, String)>>, Condvar)> = Arc::default();
        let (shared, output) = (Arc::clone(&said), child.stdout.take().unwrap());
        let reader = sys::spawn("beam", move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                shared.0.lock().unwrap().push((sys::now(), line));
                shared.1.notify_all();
            }
        });
        Some(Beam { child, dir, said, reader: Some(reader.unwrap()) })
    }

    /// Gives the host an order.
    pub(crate) fn order(&mut self, order: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{order}").unwrap();
    }

    /// Whether the host said a line that begins so.
    pub(crate) fn has_said(&self, start: &str) -> bool {
        self.said.0.lock().unwrap().iter().any(|(_, line)| line.starts_with(start))
    }

    /// When the daemon was started, each time.
    pub(crate) fn starts(&self) -> Vec<Instant> {
        let said = self.said.0.lock().unwrap();
        said.iter().filter(|(_, line)| line.starts_with("started ")).map(|(at, _)| *at).collect()
    }

    /// Waits for a line that begins so; gives it.
    pub(crate) fn wait_for(&self, start: &str, limit: Duration) -> String {
        let until = sys::now() + limit;
        let mut said = self.said.0.lock().unwrap();
        loop {
            if let Some((_, line)) = said.iter().find(|(_, line)| line.starts_with(start)) {
                return line.clone();
            }
            let left = until.saturating_duration_since(sys::now());
            if left.is_zero() {
                drop(said);
                panic!("the host did not say `{start}` within {limit:?}\n{}", self.transcript());
            }
            said = self.said.1.wait_timeout(said, left).unwrap().0;
        }
    }

    /// What the host said, and what CouchDB would have logged.
    pub(crate) fn transcript(&self) -> String {
        let said: Vec<String> = self.said.0.lock().unwrap().iter().map(|(_, line)| line.clone()).collect();
        let log = std::fs::read_to_string(self.dir.path("transcript")).unwrap_or_default();
        format!("--- host ---\n{}\n--- its log ---\n{log}", said.join("\n"))
    }

    /// Stops the daemon and the host; what CouchDB would have logged.
    pub(crate) fn stop(mut self) -> String {
        self.end();
        assert_no_secret("what CouchDB would have logged", &self.transcript());
        self.transcript()
    }

    fn end(&mut self) {
        let Some(reader) = self.reader.take() else { return };
        let _ = self.child.stdin.as_mut().unwrap().write_all(b"exit\n");
        // The end of its output is its end; it never takes long, and a test that hangs here is seen.
        let _ = reader.join();
        let _ = self.child.wait();
    }
}

impl Drop for Beam {
    fn drop(&mut self) {
        if self.reader.is_some() && std::thread::panicking() {
            let _ = self.child.kill();
        }
        self.end();
    }
}

/// How long the host may take to stop or start a daemon.
pub(crate) const HOST_MAX: Duration = WAIT_MAX;
