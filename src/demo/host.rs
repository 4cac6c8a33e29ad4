//! CouchDB's end of the pipes, for the demo: starts the daemon as CouchDB 1.1 to 2.2 would, answers its questions,
//! takes its log lines, kills it with SIGKILL and starts it again.
//!
//! What a real BEAM does with the same pipes is tested by `tests/beam/host.escript`; this is for showing.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use serde_json::{Value, json};

use crate::error::{Error, Kind, Result};
use crate::sys::{self, Thread};

/// How long the daemon has after the end of its stdin (it promises one second).
const END_MAX: Duration = Duration::from_secs(2);

/// Sections as CouchDB's configuration holds them.
pub(crate) type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// A log line of the daemon, as CouchDB would write it.
#[derive(Debug)]
pub(crate) struct LogLine {
    /// `debug`, `info` or `error`.
    pub(crate) level: String,
    /// The message.
    pub(crate) text: String,
}

/// The host, with its daemon running.
pub(crate) struct Host {
    program: PathBuf,
    sections: Arc<Sections>,
    log: Sender<LogLine>,
    daemon: Daemon,
}

/// One life of the daemon.
struct Daemon {
    child: Child,
    /// Taken to close it.
    stdin: Arc<Mutex<Option<ChildStdin>>>,
    reader: Thread,
}

impl Host {
    /// Starts `program os-daemon`.
    ///
    /// # Errors
    /// `Io` when it cannot be started.
    pub(crate) fn start(program: PathBuf, sections: Sections, log: Sender<LogLine>) -> Result<Host> {
        let sections = Arc::new(sections);
        let daemon = start_daemon(&program, &sections, &log)?;
        Ok(Host { program, sections, log, daemon })
    }

    /// The daemon's process.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.child.id()
    }

    /// SIGKILL, then a new one at once: CouchDB's own way of stopping and of restarting it.
    ///
    /// # Errors
    /// `Io` when the new one cannot be started.
    pub(crate) fn kill_and_restart(self) -> Result<Host> {
        let Host { program, sections, log, mut daemon } = self;
        kill(&mut daemon.child);
        daemon.reader.join().map_err(|panic| Error::new(Kind::Io, panic))?;
        let daemon = start_daemon(&program, &sections, &log)?;
        Ok(Host { program, sections, log, daemon })
    }

    /// Closes its stdin and waits for it to go; gives how long that took.
    ///
    /// # Errors
    /// `Io` when it did not go by itself; it is killed then.
    pub(crate) fn close(self) -> Result<Duration> {
        let mut daemon = self.daemon;
        let start = sys::now();
        drop(daemon.stdin.lock().expect("no thread panics with this lock").take());
        let ended = wait_for(&mut daemon.child, start + END_MAX);
        let took = sys::now() - start;
        if !ended {
            kill(&mut daemon.child);
        }
        daemon.reader.join().map_err(|panic| Error::new(Kind::Io, panic))?;
        match ended {
            true => Ok(took),
            false => Err(Error::new(Kind::Io, "the daemon did not end after its stdin was closed")),
        }
    }
}

fn start_daemon(program: &PathBuf, sections: &Arc<Sections>, log: &Sender<LogLine>) -> Result<Daemon> {
    let mut child = Command::new(program)
        .arg("os-daemon")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| Error::new(Kind::Io, format!("`{} os-daemon`: {error}", program.display())))?;
    let stdin = Arc::new(Mutex::new(child.stdin.take()));
    let stdout = child.stdout.take().expect("stdout is a pipe");
    let (sections, log, answers) = (Arc::clone(sections), log.clone(), Arc::clone(&stdin));
    let reader = sys::spawn("demo:host", move || answer(stdout, &answers, &sections, &log))?;
    Ok(Daemon { child, stdin, reader })
}

/// Reads what the daemon writes until its end.
fn answer(
    stdout: ChildStdout,
    stdin: &Mutex<Option<ChildStdin>>,
    sections: &Sections,
    log: &Sender<LogLine>,
) {
    for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
        let words: Vec<Value> = serde_json::from_str(&line).unwrap_or_default();
        let text = |at: usize| words.get(at).and_then(Value::as_str);
        let reply = match (text(0), text(1), text(2)) {
            (Some("get"), Some(section), None) => json!(sections.get(section).cloned().unwrap_or_default()),
            (Some("get"), Some(section), Some(key)) => {
                json!(sections.get(section).and_then(|section| section.get(key)))
            }
            (Some("log"), Some(message), None) => {
                let level = words.get(2).and_then(|options| options["level"].as_str()).unwrap_or("info");
                // A full channel would hold up the daemon as a slow CouchDB would.
                let _ = log.send(LogLine { level: level.to_owned(), text: message.to_owned() });
                continue;
            }
            // Registered, or nothing that CouchDB would answer.
            _ => continue,
        };
        if let Some(stdin) = stdin.lock().expect("no thread panics with this lock").as_mut() {
            // It may be gone by now; then its output ends, too.
            let _ = writeln!(stdin, "{reply}").and_then(|()| stdin.flush());
        }
    }
}

fn kill(child: &mut Child) {
    // Both fail only for a process that is gone.
    let _ = child.kill();
    let _ = child.wait();
}

/// Whether the process ended by itself in time.
fn wait_for(child: &mut Child, until: Instant) -> bool {
    while sys::now() < until {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return true;
        }
        sys::sleep(Duration::from_millis(10));
    }
    false
}
