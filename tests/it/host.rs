//! CouchDB's end of the pipes: starts the real binary as an os_daemon, answers its questions, reads its log, kills it.
//!
//! Everything that passes is kept with its time; a wait that lasts [`WAIT_MAX`] panics with all of it. Nothing
//! sleeps. A dropped `Host` kills its daemon. What this driver cannot prove, `tests/beam/host.escript` does: a real
//! BEAM with CouchDB's own port options.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::world::assert_no_secret;

/// How long anything may take before a test gives up and prints what happened.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(30);

/// Sections as CouchDB would give them.
pub(crate) type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// Parses `[section]` and `key = value` lines, enough for tests; `;` starts a comment line.
pub(crate) fn sections(ini: &str) -> Sections {
    let mut sections = Sections::new();
    let mut name = String::new();
    for line in ini.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(';')) {
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            name = header.to_owned();
        } else {
            let (key, value) = line.split_once('=').expect("`key = value`");
            sections.entry(name.clone()).or_default().insert(key.trim().to_owned(), value.trim().to_owned());
        }
    }
    sections
}

/// A line of the daemon's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Logged {
    /// `debug`, `info` or `error`.
    pub(crate) level: String,
    /// What CouchDB would write behind the daemon's name.
    pub(crate) message: String,
    /// Which start of the daemon wrote it, from 1.
    pub(crate) n_start: usize,
}

/// What became of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// `None` when a signal ended it.
    pub(crate) code: Option<i32>,
    /// From the moment its stdin was closed or it was killed.
    pub(crate) took: Duration,
}

/// The host. One daemon at a time.
pub(crate) struct Host {
    shared: Arc<(Mutex<Shared>, Condvar)>,
    program: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    running: Option<Running>,
    n_starts: usize,
}

struct Running {
    child: Child,
    stdin: Arc<Mutex<Option<ChildStdin>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

struct Shared {
    start: Instant,
    sections: Sections,
    answering: bool,
    transcript: Vec<(Duration, String)>,
    logged: Vec<Logged>,
    asked: Vec<String>,
    registered: Vec<String>,
    faults: Vec<String>,
}

#[allow(dead_code, reason = "a driver offers more than the tests of one day use")]
impl Host {
    /// Starts the real binary with `os-daemon`, answering from `ini`.
    pub(crate) fn start(ini: &str) -> Host {
        Host::start_with(ini, &["os-daemon"], &[])
    }

    /// Starts it with other arguments (none: the bare command) and more environment.
    pub(crate) fn start_with(ini: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Host {
        Host::start_program(env!("CARGO_BIN_EXE_couch-hookd"), ini, arguments, environment)
    }

    /// Starts something else that speaks as the daemon does.
    pub(crate) fn start_program(
        program: &str,
        ini: &str,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Host {
        let shared = Shared {
            start: now(),
            sections: sections(ini),
            answering: true,
            transcript: Vec::new(),
            logged: Vec::new(),
            asked: Vec::new(),
            registered: Vec::new(),
            faults: Vec::new(),
        };
        let mut host = Host {
            shared: Arc::new((Mutex::new(shared), Condvar::new())),
            program: program.to_owned(),
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            environment: environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            running: None,
            n_starts: 0,
        };
        host.start_again();
        host
    }

    /// Starts the daemon again after a kill or an end, as CouchDB does.
    pub(crate) fn start_again(&mut self) {
        assert!(self.running.is_none(), "one daemon at a time");
        self.n_starts += 1;
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        self.note(format!("started, process {}", child.id()));
        let stdin = Arc::new(Mutex::new(child.stdin.take()));
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (shared, answers, n_start) = (self.shared.clone(), stdin.clone(), self.n_starts);
        let protocol = thread(move || {
            for line in BufReader::new(stdout).split(b'\n') {
                let Ok(line) = line else { break };
                take_line(&shared, &answers, n_start, &String::from_utf8_lossy(&line));
            }
            note(&shared, "< end of stdout".to_owned());
        });
        let shared = self.shared.clone();
        let errors = thread(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                note(&shared, format!("stderr: {line}"));
            }
        });
        self.running = Some(Running { child, stdin, readers: vec![protocol, errors] });
    }

    /// Sets a key; the daemon sees it at its next `get`.
    pub(crate) fn set(&self, section: &str, key: &str, value: &str) {
        self.note(format!("set [{section}] {key} = {value}"));
        let (lock, _) = &*self.shared;
        let mut shared = lock.lock().unwrap();
        shared.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_owned());
    }

    /// Replaces everything.
    pub(crate) fn set_all(&self, ini: &str) {
        self.note("set all sections".to_owned());
        self.shared.0.lock().unwrap().sections = sections(ini);
    }

    /// Whether `get`s are answered; a host that does not is one that hangs.
    pub(crate) fn answer(&self, answering: bool) {
        self.shared.0.lock().unwrap().answering = answering;
    }

    /// Writes bytes to the daemon's stdin as they are.
    pub(crate) fn write(&self, bytes: &[u8]) {
        let running = self.running.as_ref().expect("a daemon runs");
        if let Some(stdin) = running.stdin.lock().unwrap().as_mut() {
            stdin.write_all(bytes).expect("the daemon reads");
        }
    }

    /// Waits for a log line that holds `text`, from any start; gives it.
    pub(crate) fn wait_for_log(&self, text: &str) -> Logged {
        self.wait_for_nth_log(text, 1)
    }

    /// Waits until `n` log lines hold `text`; gives the last of them.
    pub(crate) fn wait_for_nth_log(&self, text: &str, n: usize) -> Logged {
        self.wait(&format!("log line {n} with `{text}`"), |shared| {
            shared.logged.iter().filter(|logged| logged.message.contains(text)).nth(n - 1).cloned()
        })
    }

    /// Waits until the daemon asked for `section` once more than `n_before` times.
    pub(crate) fn wait_for_get(&self, section: &str, n_before: usize) {
        self.wait(&format!("get {} of `{section}`", n_before + 1), |shared| {
            (shared.asked.iter().filter(|asked| *asked == section).count() > n_before).then_some(())
        });
    }

    /// How often the daemon has asked for `section`.
    pub(crate) fn n_asked(&self, section: &str) -> usize {
        self.shared.0.lock().unwrap().asked.iter().filter(|asked| *asked == section).count()
    }

    /// How often the daemon has registered `section`.
    pub(crate) fn n_registered(&self, section: &str) -> usize {
        let shared = self.shared.0.lock().unwrap();
        shared.registered.iter().filter(|registered| *registered == section).count()
    }

    /// Waits until the daemon registered a section.
    pub(crate) fn wait_for_register(&self, section: &str) {
        self.wait(&format!("register of `{section}`"), |shared| {
            shared.registered.iter().any(|registered| registered == section).then_some(())
        });
    }

    /// Everything logged so far.
    pub(crate) fn logged(&self) -> Vec<Logged> {
        self.shared.0.lock().unwrap().logged.clone()
    }

    /// The daemon's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().expect("a daemon runs").child.id()
    }

    /// SIGKILL, now, as CouchDB stops an os_daemon.
    pub(crate) fn kill(&mut self) -> Ended {
        self.note("SIGKILL".to_owned());
        self.running.as_mut().expect("a daemon runs").child.kill().expect("our own child");
        self.wait_for_end()
    }

    /// Closes the daemon's stdin, as a CouchDB that stops does, and waits for the end.
    pub(crate) fn close(&mut self) -> Ended {
        self.note("stdin closed".to_owned());
        self.running.as_mut().expect("a daemon runs").stdin.lock().unwrap().take();
        self.wait_for_end()
    }

    /// Waits until the daemon ends.
    pub(crate) fn wait_for_end(&mut self) -> Ended {
        let asked_at = now();
        let mut running = self.running.take().expect("a daemon runs");
        // stdout ends with the process and wakes the wait below; only then is the status asked for.
        let ended: ExitStatus = loop {
            if let Some(status) = running.child.try_wait().expect("our own child") {
                break status;
            }
            let (lock, change) = &*self.shared;
            let shared = lock.lock().unwrap();
            if now() - asked_at > WAIT_MAX {
                let transcript = print(&shared);
                drop(shared);
                let _ = running.child.kill();
                panic!("the daemon did not end within {WAIT_MAX:?}\n{transcript}");
            }
            drop(change.wait_timeout(shared, Duration::from_millis(5)).unwrap());
        };
        let took = now() - asked_at;
        running.stdin.lock().unwrap().take();
        for reader in running.readers {
            reader.join().expect("readers do not panic");
        }
        self.note(format!("ended with {ended} after {took:?}"));
        Ended { code: ended.code(), took }
    }

    /// Fails when the daemon ever wrote something that CouchDB would not understand.
    pub(crate) fn assert_protocol_kept(&self) {
        let shared = self.shared.0.lock().unwrap();
        assert!(shared.faults.is_empty(), "{:#?}\n{}", shared.faults, print(&shared));
    }

    /// Everything that passed, for messages of tests that fail.
    pub(crate) fn transcript(&self) -> String {
        print(&self.shared.0.lock().unwrap())
    }

    fn wait<T>(&self, what: &str, found: impl Fn(&Shared) -> Option<T>) -> T {
        let (lock, change) = &*self.shared;
        let until = now() + WAIT_MAX;
        let mut shared = lock.lock().unwrap();
        loop {
            if let Some(value) = found(&shared) {
                return value;
            }
            let left = until.saturating_duration_since(now());
            if left.is_zero() {
                let transcript = print(&shared);
                drop(shared);
                panic!("no {what} within {WAIT_MAX:?}\n{transcript}");
            }
            shared = change.wait_timeout(shared, left).unwrap().0;
        }
    }

    fn note(&self, text: String) {
        note(&self.shared, text);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
        if !std::thread::panicking() {
            let shared = self.shared.0.lock().unwrap();
            for logged in &shared.logged {
                assert_no_secret("the log", &logged.message);
            }
            for (_, line) in shared.transcript.iter().filter(|(_, line)| line.starts_with("stderr:")) {
                assert_no_secret("stderr", line);
            }
        }
    }
}

/// One line of the daemon, handled as `couch_os_daemons.erl` does.
fn take_line(
    shared: &(Mutex<Shared>, Condvar),
    stdin: &Mutex<Option<ChildStdin>>,
    n_start: usize,
    line: &str,
) {
    let (lock, change) = shared;
    let mut state = lock.lock().unwrap();
    let at = now() - state.start;
    state.transcript.push((at, format!("< {line}")));
    let request = serde_json::from_str::<Vec<serde_json::Value>>(line).unwrap_or_default();
    let words: Vec<Option<&str>> = request.iter().map(serde_json::Value::as_str).collect();
    let mut answer = None;
    match words[..] {
        [Some("get"), Some(section)] => {
            answer =
                Some(serde_json::to_string(state.sections.get(section).unwrap_or(&BTreeMap::new())).unwrap());
            state.asked.push(section.to_owned());
        }
        [Some("get"), Some(section), Some(key)] => {
            let value = state.sections.get(section).and_then(|section| section.get(key));
            answer = Some(serde_json::to_string(&value).unwrap());
            state.asked.push(format!("{section}/{key}"));
        }
        [Some("register"), Some(section)] | [Some("register"), Some(section), Some(_)] => {
            state.registered.push(section.to_owned());
        }
        [Some("log"), Some(message), None] => {
            let level = request[2]["level"].as_str().unwrap_or("none").to_owned();
            if !["debug", "info", "error"].contains(&level.as_str()) {
                state.faults.push(format!("invalid log level: {line}"));
            }
            if message.chars().any(char::is_control) {
                state.faults.push(format!("control character in a log line: {line}"));
            }
            state.logged.push(Logged { level, message: message.to_owned(), n_start });
        }
        _ => state.faults.push(format!("invalid request: {line}")),
    }
    if let Some(answer) = answer.filter(|_| state.answering) {
        state.transcript.push((at, format!("> {answer}")));
        // A daemon that was killed meanwhile reads no more.
        if let Some(stdin) = stdin.lock().unwrap().as_mut() {
            let _ = stdin.write_all(format!("{answer}\n").as_bytes());
        }
    }
    change.notify_all();
}

fn note(shared: &(Mutex<Shared>, Condvar), text: String) {
    let (lock, change) = shared;
    let mut state = lock.lock().unwrap();
    let at = now() - state.start;
    state.transcript.push((at, text));
    change.notify_all();
}

fn print(shared: &Shared) -> String {
    let mut text = String::from("transcript:\n");
    for (at, line) in &shared.transcript {
        writeln!(text, "{:9.3} s  {line}", at.as_secs_f64()).unwrap();
    }
    text
}

#[expect(clippy::disallowed_methods, reason = "tests measure real time")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "tests have no `sys` of their own")]
fn thread(body: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    std::thread::spawn(body)
}

mod tests {
    use super::*;

    /// A daemon in shell: says that it is up, asks, tells what it was answered, follows orders on stdin.
    const SCRIPT: &str = r#"
        log() { echo "[\"log\",\"$1\",{\"level\":\"info\"}]"; }
        log up; echo '["register","hookd"]'
        echo '["get","hookd"]'; read -r answer; log "${#answer} characters"
        while read -r order; do
            case "$order" in
                again) echo '["get","hookd","name"]'; read -r answer; log "name ${#answer} characters";;
                wrong) echo '["log","x",{"level":"warn"}]'; echo '["got"]'; echo oops >&2; log wrong;;
                exit) exit 3;;
            esac
        done
    "#;

    #[test]
    fn the_driver_answers_collects_kills_and_starts_again() {
        let mut host = Host::start_program("/bin/sh", "[hookd]\nname = x\n", &["-c", SCRIPT], &[("A", "b")]);
        host.wait_for_get("hookd", 0);
        host.wait_for_register("hookd");
        assert_eq!(host.wait_for_log("12 characters").n_start, 1, "{}", host.transcript());
        host.set("hookd", "name", "xyz");
        host.write(b"again\n");
        host.wait_for_log("name 5 characters");
        host.assert_protocol_kept();
        let pid = host.pid();
        assert_eq!(host.kill().code, None);
        host.set_all("[other]\na = b\n");
        host.start_again();
        assert_ne!(host.pid(), pid);
        assert_eq!(host.wait_for_nth_log("up", 2).n_start, 2);
        host.wait_for_nth_log("2 characters", 2);
        let ended = host.close();
        assert_eq!(ended.code, Some(0));
        assert!(ended.took < WAIT_MAX);
        host.start_again();
        host.wait_for_nth_log("2 characters", 3);
        host.write(b"exit\n");
        assert_eq!(host.wait_for_end().code, Some(3));
        assert_eq!(host.logged().iter().filter(|logged| logged.message == "up").count(), 3);
    }

    #[test]
    fn the_driver_sees_what_couchdb_would_not_understand() {
        let host = Host::start_program("/bin/sh", "", &["-c", SCRIPT], &[]);
        host.wait_for_log("2 characters");
        host.write(b"wrong\n");
        host.wait_for_log("wrong");
        let faults = host.shared.0.lock().unwrap().faults.clone();
        assert_eq!(
            faults,
            [r#"invalid log level: ["log","x",{"level":"warn"}]"#, r#"invalid request: ["got"]"#]
        );
        host.answer(false);
        host.write(b"again\n");
        host.wait_for_get("hookd/name", 0);
        assert!(!host.transcript().contains("> null"), "{}", host.transcript());
    }
}
