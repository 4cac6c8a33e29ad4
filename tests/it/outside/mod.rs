//! Tests that need something nobody here wrote; `tests/run` installs it and runs each module as a part of its own.

pub(crate) mod beam;
pub(crate) mod beam_commands;
pub(crate) mod beam_kills;
pub(crate) mod beam_notified;
pub(crate) mod cloudevents;
pub(crate) mod couchdb;
pub(crate) mod couchdb_databases;
pub(crate) mod couchdb_kills;
pub(crate) mod couchdb_patterns;
pub(crate) mod couchdb_replications;
pub(crate) mod pouchdb;
pub(crate) mod pouchdb_daemon;

use std::io::{BufRead, BufReader, Read};

use crossbeam_channel::{Receiver, bounded};

/// Whether a real BEAM is installed; a plain `cargo test` does without, `tests/run` installs it or says that it cannot.
fn beam_is_there() -> bool {
    let there = std::process::Command::new("escript")
        .arg("--help")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok();
    if !there {
        println!("skipped: beam (no escript; tests/run installs it)");
    }
    there
}

/// Whether pouchdb-server is installed, likewise.
fn pouchdb_is_there() -> bool {
    let there =
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pouchdb/node_modules")).exists();
    if !there {
        println!("skipped: pouchdb (no tests/pouchdb/node_modules; tests/run installs it)");
    }
    there
}

/// The Python that has the packages of tests/interop, likewise.
fn interop_python() -> Option<String> {
    let python = std::env::var("COUCH_HOOKD_TEST_PYTHON").ok();
    let python = python.filter(|python| std::path::Path::new(python).exists());
    if python.is_none() {
        println!("skipped: interop (no COUCH_HOOKD_TEST_PYTHON; tests/run makes it)");
    }
    python
}

/// Lines of a child's output, read by a thread that ends with them.
fn lines(output: impl Read + Send + 'static) -> Receiver<String> {
    let (to, lines) = bounded(10_000);
    #[expect(clippy::disallowed_methods, reason = "tests have no `sys` of their own")]
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if to.send(line).is_err() {
                return;
            }
        }
    });
    lines
}
