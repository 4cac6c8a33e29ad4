//! A real BEAM as the host: drives `tests/beam/host.escript` and reads what CouchDB would have logged.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use couch_hookd::sys;
use crossbeam_channel::Receiver;

use crate::host::WAIT_MAX;

/// The running BEAM with its daemon. Dropped, it stops the daemon and ends.
pub(crate) struct Beam {
    child: Child,
    orders: ChildStdin,
    said: Receiver<String>,
    transcript: PathBuf,
    /// What it said, and when that was heard.
    heard: Vec<(Instant, String)>,
}

impl Beam {
    /// Starts `command` (words, no quoting: CouchDB has none) as an os_daemon; `folder` takes the files, `ini` is
    /// written to `host.ini` there and read again at every get.
    pub(crate) fn start(folder: &Path, ini: &str, command: &str) -> Beam {
        std::fs::create_dir_all(folder).unwrap();
        let (ini_path, transcript) = (folder.join("host.ini"), folder.join("transcript"));
        std::fs::write(&ini_path, ini).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/beam/host.escript");
        let mut child = Command::new("escript")
            .args([Path::new(script), &ini_path, &transcript])
            .args(command.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`escript` starts: tests/run installs erlang-base");
        let (orders, said) = (child.stdin.take().unwrap(), super::lines(child.stdout.take().unwrap()));
        let mut beam = Beam { child, orders, said, transcript, heard: Vec::new() };
        beam.wait_for("started ");
        beam
    }

    /// Sends an order (see the script's head) and waits for the line that begins with `answer`.
    pub(crate) fn order(&mut self, order: &str, answer: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        self.wait_for(answer)
    }

    /// Waits for what the BEAM says next that begins with `start`.
    pub(crate) fn wait_for(&mut self, start: &str) -> String {
        self.wait_for_long(start, WAIT_MAX)
    }

    /// As [`Beam::wait_for`], with another patience between two lines.
    pub(crate) fn wait_for_long(&mut self, start: &str, patience: Duration) -> String {
        self.wait_for_one(&[start], patience)
    }

    /// As [`Beam::wait_for`], for what begins with any of `starts`.
    fn wait_for_any(&mut self, starts: &[&str]) -> String {
        self.wait_for_one(starts, WAIT_MAX)
    }

    fn wait_for_one(&mut self, starts: &[&str], patience: Duration) -> String {
        loop {
            let Ok(line) = self.said.recv_timeout(patience) else {
                panic!("the BEAM said none of {starts:?}; said {:#?}\n{}", self.heard, self.transcript());
            };
            self.heard.push((sys::now(), line.clone()));
            if starts.iter().any(|start| line.starts_with(start)) {
                return line;
            }
        }
    }

    /// Takes what it has said, without waiting; whether it ever said a line that begins with `start`.
    pub(crate) fn has_said(&mut self, start: &str) -> bool {
        self.heard.extend(self.said.try_iter().map(|line| (sys::now(), line)));
        self.heard.iter().any(|(_, line)| line.starts_with(start))
    }

    /// When the daemon was started, each time, as far as that was heard.
    pub(crate) fn starts(&self) -> Vec<Instant> {
        self.heard.iter().filter(|(_, line)| line.starts_with("started ")).map(|(at, _)| *at).collect()
    }

    /// What was counted: `starts exits kills gets registers logs invalid lines`.
    pub(crate) fn counts(&mut self) -> BTreeMap<String, u64> {
        let line = self.order("counts", "counts ");
        let pairs = line.split(' ').filter_map(|pair| pair.split_once('='));
        pairs.filter_map(|(name, n)| Some((name.to_owned(), n.parse().ok()?))).collect()
    }

    /// What CouchDB would have logged.
    pub(crate) fn transcript(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.transcript).unwrap_or_default()).into_owned()
    }
}

impl Drop for Beam {
    fn drop(&mut self) {
        let _ = writeln!(self.orders, "exit");
        let _ = self.child.wait();
    }
}

#[test]
fn a_daemon_is_served_killed_restarted_and_halted_as_couchdb_does() {
    if !super::beam_is_there() {
        return;
    }
    let folder = std::env::temp_dir().join(format!("couch-hookd-beam-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let daemon = folder.join("daemon.sh");
    let script = "echo '[\"register\",\"a\"]'; echo '[\"get\",\"a\"]'; read -r answer\n\
                  echo \"[\\\"log\\\",\\\"${#answer} characters\\\",{\\\"level\\\":\\\"error\\\"}]\"\n\
                  echo '[\"log\",\"up\\\\u00e4\"]'; echo '[\"log\",\"x\",{\"level\":\"warn\"}]'; echo oops\n\
                  while read -r line; do :; done\n";
    std::fs::write(&daemon, script).unwrap();
    let mut beam =
        Beam::start(&folder, "[a]\nk = ä \"v\" ; cut\nnone =\n", &format!("/bin/sh {}", daemon.display()));
    let until = |beam: &mut Beam, name: &str, n: u64| {
        let patience = sys::now() + WAIT_MAX;
        while sys::now() < patience {
            if beam.counts()[name] >= n {
                return;
            }
        }
        panic!("{name} never reached {n}: {}", beam.transcript());
    };
    until(&mut beam, "invalid", 2);
    assert_eq!(beam.counts()["registers"], 1);
    beam.order("change b k", "not registered");
    beam.order("change a k", "restarted");
    until(&mut beam, "invalid", 4);
    beam.order("kill 3 20 60", "kills begun");
    beam.wait_for("kills done");
    until(&mut beam, "starts", 5);
    // How many exits fall into five seconds is the machine's affair: killing goes on until it is halted.
    // Each is killed after it said all it has to say: of one that dies while it starts a BEAM may not tell the exit.
    for _ in 0..30 {
        until(&mut beam, "lines", 7);
        beam.order("kill", "killed");
        beam.wait_for("exited 137");
        if beam.wait_for_any(&["started ", "halted"]) == "halted" {
            break;
        }
    }
    let counts = beam.counts();
    assert!(counts["exits"] >= 3, "{counts:?}");
    assert_eq!(counts["kills"], counts["exits"] + 4);
    let transcript = beam.transcript();
    assert!(transcript.contains("[error] Daemon :: 16 characters"), "{transcript}");
    assert!(transcript.contains("[info] Daemon :: upä"), "{transcript}");
    assert!(transcript.contains("Invalid log level from daemon: <<\"warn\">>"), "{transcript}");
    drop(beam);
    std::fs::remove_dir_all(&folder).unwrap();
}
