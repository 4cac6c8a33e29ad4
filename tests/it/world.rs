//! The real daemon, started by `run --config`, between a stand-in for CouchDB and receivers of webhooks.
//!
//! Everything the daemon logs is kept with its time; a wait that lasts [`WAIT_MAX`] panics with all of it. Nothing
//! sleeps. A dropped [`Daemon`] is killed, its files are removed. Daemons under a host are `host`'s, those under a
//! real BEAM `beam`'s; [`Ini`] writes the configuration of all three.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use couch_hookd::pure::signature::{Key, new_secret};
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::receiver::{Receiver, ReceiverOptions};
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::host::{Ended, WAIT_MAX};

/// The versions of CouchDB that are stood in for.
#[allow(dead_code, reason = "a driver offers more than the tests of one day use")]
pub(crate) const FLAVOURS: [Flavour; 3] = [Flavour::V1, Flavour::V2, Flavour::V3];

/// The database of dead letters and records.
pub(crate) const STATE_DB: &str = "couch_hookd";

/// Whether the sizes are those of `tests/run`, where minutes count, and not those of every day.
pub(crate) fn long() -> bool {
    std::env::var_os("HOOKD_LONG").is_some_and(|value| value != "0")
}

/// Does the same in all cases at once, on all versions for example, because most of it is waiting.
pub(crate) fn on_each<T: Copy + Send>(cases: &[T], check: impl Fn(T) + Sync) {
    std::thread::scope(|scope| {
        for case in cases.iter().copied() {
            let check = &check;
            scope.spawn(move || check(case));
        }
    });
}

/// A part of every password, token and header value that [`Ini`] writes: nobody may ever see it but those whom it
/// is for. Looked for in whatever a [`Daemon`] logs and a [`World`]'s CouchDB holds, whatever is tested.
pub(crate) const CANARY: &str = "c4n4ry";

/// Fails when `text` holds a password, a token, a header value or a signing secret of [`Ini`].
pub(crate) fn assert_no_secret(what: &str, text: &str) {
    use base64::Engine;
    let base64 = |login: &str| base64::engine::general_purpose::STANDARD.encode(login);
    let needles = [
        CANARY.to_owned(),
        base64(&format!("hook:{CANARY}-endpoint")),
        base64(&format!("hookd:{CANARY}-couchdb")),
        secret().trim_start_matches("whsec_").to_owned(),
    ];
    for needle in needles {
        assert!(!text.contains(&needle), "{what} holds the secret `{needle}`:\n{text}");
    }
}

/// The secret that [`Ini`] signs with and [`receiver`] verifies.
pub(crate) fn secret() -> String {
    new_secret([7; 32])
}

/// A receiver that verifies [`secret`] and answers 200.
pub(crate) fn receiver() -> Receiver {
    receiver_with(|_| {})
}

/// A receiver with other options.
pub(crate) fn receiver_with(change: impl FnOnce(&mut ReceiverOptions)) -> Receiver {
    let mut options = ReceiverOptions::new(vec![Key::parse(&secret()).unwrap()]);
    change(&mut options);
    Receiver::start(options).unwrap()
}

/// A stand-in with these databases.
pub(crate) fn couch(flavour: Flavour, dbs: &[&str]) -> StandIn {
    let couch = StandIn::start(Options::new(flavour)).unwrap();
    dbs.iter().for_each(|db| couch.create_db(db));
    couch
}

/// Writes `n` documents `d0`, `d1`, … once more each.
pub(crate) fn write(couch: &StandIn, db: &str, n: usize) {
    for i in 0..n {
        couch.put(db, &format!("d{i}"), &json!({"n": i})).unwrap();
    }
}

/// A configuration, section by section.
#[derive(Debug, Clone)]
pub(crate) struct Ini {
    hookd: String,
    webhooks: String,
    sections: String,
}

#[allow(dead_code, reason = "a driver offers more than the tests of one day use")]
impl Ini {
    /// `[hookd]` with this server, and a login where the URL has none (a stand-in without an admin takes any).
    pub(crate) fn new(couchdb_url: &str) -> Ini {
        let with_login = couchdb_url.replacen("://", &format!("://hookd:{CANARY}-couchdb@"), 1);
        let url = if couchdb_url.contains('@') { couchdb_url } else { &with_login };
        let hookd = format!("couchdb_url = {url}\n");
        Ini { hookd, webhooks: String::new(), sections: String::new() }
    }

    /// More lines for `[hookd]`, `key = value`.
    pub(crate) fn hookd(mut self, lines: &str) -> Ini {
        self.hookd += lines;
        self.hookd += "\n";
        self
    }

    /// A webhook signed with [`secret`], and the lines of its section; `since = 0` unless they say otherwise. Its
    /// URL gets a login, a token and, where it is a [`receiver`]'s, a longer path, its requests a header that nobody else may see.
    pub(crate) fn webhook(mut self, name: &str, endpoint: &str, lines: &str) -> Ini {
        let url = endpoint.replacen("://", &format!("://hook:{CANARY}-endpoint@"), 1);
        let path = if url.ends_with("/hook") { format!("/{CANARY}-path") } else { String::new() };
        writeln!(self.webhooks, "{name} = {url}{path}?token={CANARY}-token").unwrap();
        writeln!(self.sections, "[hookd.webhook.{name}]\nheader.x-canary = {CANARY}-header").unwrap();
        if !lines.lines().any(|line| line.trim_start().starts_with("secret")) {
            writeln!(self.sections, "secret = {}", secret()).unwrap();
        }
        if !lines.lines().any(|line| line.trim_start().starts_with("since")) {
            self.sections += "since = 0\n";
        }
        writeln!(self.sections, "{lines}").unwrap();
        self
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        format!("[hookd]\n{}\n[hookd.webhooks]\n{}\n{}", self.hookd, self.webhooks, self.sections)
    }
}

/// A directory of a test's own, removed when dropped.
pub(crate) struct Dir(PathBuf);

impl Dir {
    /// Makes one.
    pub(crate) fn new() -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("world-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The daemon, as systemd would run it.
pub(crate) struct Daemon {
    dir: Dir,
    environment: Vec<(String, String)>,
    shared: Arc<(Mutex<Transcript>, Condvar)>,
    running: Option<(Child, Vec<sys::Thread>)>,
}

struct Transcript {
    begun: Instant,
    lines: Vec<(Duration, String)>,
}

#[allow(dead_code, reason = "a driver offers more than the tests of one day use")]
impl Daemon {
    /// Starts the real binary with `run --config` and this configuration.
    pub(crate) fn start(ini: &Ini) -> Daemon {
        Daemon::start_with(ini, &[])
    }

    /// Starts it with more environment.
    pub(crate) fn start_with(ini: &Ini, environment: &[(&str, &str)]) -> Daemon {
        let transcript = Transcript { begun: sys::now(), lines: Vec::new() };
        let mut daemon = Daemon {
            dir: Dir::new(),
            environment: environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            shared: Arc::new((Mutex::new(transcript), Condvar::new())),
            running: None,
        };
        daemon.configure(&ini.text());
        daemon.start_again();
        daemon
    }

    /// Writes another configuration; read at the next start, or after [`Daemon::signal`] with `SIGHUP`.
    pub(crate) fn configure(&self, ini: &str) {
        std::fs::write(self.dir.path("hookd.ini"), ini).unwrap();
    }

    /// Starts it again after it has ended.
    pub(crate) fn start_again(&mut self) {
        assert!(self.running.is_none(), "one daemon at a time");
        let mut child = Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
            .arg("run")
            .arg("--config")
            .arg(self.dir.path("hookd.ini"))
            .env_remove("COUCHDB_URL")
            .env_remove("COUCHDB_USER")
            .env_remove("COUCHDB_PASSWORD")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.note(format!("started, process {}", child.id()));
        let outputs: [(&str, Box<dyn std::io::Read + Send>); 2] = [
            ("stdout: ", Box::new(child.stdout.take().unwrap())),
            ("", Box::new(child.stderr.take().unwrap())),
        ];
        let readers = outputs.map(|(prefix, output)| {
            let shared = Arc::clone(&self.shared);
            let read = move || {
                for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                    note(&shared, format!("{prefix}{}", String::from_utf8_lossy(&line)));
                }
                // Wakes whoever waits for the end.
                shared.1.notify_all();
            };
            sys::spawn("daemon-output", read).unwrap()
        });
        self.running = Some((child, readers.into()));
    }

    /// The files in its folder: its configuration, and whatever else it should not have written.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        std::fs::read_dir(&self.dir.0).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// Whether it was started and not waited for.
    pub(crate) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.running.as_ref().expect("a daemon runs").0.id()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        self.note(format!("{signal}"));
        kill(Pid::from_raw(i32::try_from(self.pid()).unwrap()), signal).unwrap();
    }

    /// SIGKILL, and waits for the end.
    pub(crate) fn kill(&mut self) -> Ended {
        self.signal(Signal::SIGKILL);
        self.wait_for_end()
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn terminate(&mut self) -> Ended {
        self.signal(Signal::SIGTERM);
        self.wait_for_end()
    }

    /// Waits until it ends; the time counts from now.
    pub(crate) fn wait_for_end(&mut self) -> Ended {
        let asked_at = sys::now();
        let (mut child, readers) = self.running.take().expect("a daemon runs");
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if asked_at.elapsed() > WAIT_MAX {
                let _ = child.kill();
                panic!("the daemon did not end within {WAIT_MAX:?}\n{}", self.transcript());
            }
            let (lock, changed) = &*self.shared;
            drop(changed.wait_timeout(lock.lock().unwrap(), Duration::from_millis(5)).unwrap());
        };
        let took = asked_at.elapsed();
        for reader in readers {
            reader.join().unwrap();
        }
        self.note(format!("ended with {status} after {took:?}"));
        Ended {
            code: std::os::unix::process::ExitStatusExt::signal(&status).map_or(status.code(), |_| None),
            took,
        }
    }

    /// Waits for a log line that holds `text`, from any start; gives it.
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        self.wait_for_nth_log(text, 1)
    }

    /// Waits until `n` log lines hold `text`; gives the last of them.
    pub(crate) fn wait_for_nth_log(&self, text: &str, n: usize) -> String {
        let (lock, changed) = &*self.shared;
        let until = sys::now() + WAIT_MAX;
        let mut transcript = lock.lock().unwrap();
        loop {
            let mut found = transcript.lines.iter().filter(|(_, line)| line.contains(text));
            if let Some((_, line)) = found.nth(n - 1) {
                return line.clone();
            }
            let left = until.saturating_duration_since(sys::now());
            if left.is_zero() {
                drop(transcript);
                panic!("no log line {n} with `{text}` within {WAIT_MAX:?}\n{}", self.transcript());
            }
            transcript = changed.wait_timeout(transcript, left).unwrap().0;
        }
    }

    /// How many log lines hold `text`.
    pub(crate) fn n_logged(&self, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(text)).count()
    }

    /// Everything it wrote, and what was done to it.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.shared.0.lock().unwrap().lines.iter().map(|(_, line)| line.clone()).collect()
    }

    /// Resident memory, in KiB.
    pub(crate) fn rss_kib(&self) -> u64 {
        rss_kib(self.pid())
    }

    /// Everything that passed, for messages of tests that fail.
    pub(crate) fn transcript(&self) -> String {
        let mut text = String::from("--- daemon ---\n");
        for (at, line) in &self.shared.0.lock().unwrap().lines {
            let _ = writeln!(text, "{:9.3} {line}", at.as_secs_f64());
        }
        text
    }

    fn note(&self, line: String) {
        note(&self.shared, line);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some((child, _)) = &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
        if !std::thread::panicking() {
            assert_no_secret("the log", &self.transcript());
        }
    }
}

fn note(shared: &(Mutex<Transcript>, Condvar), line: String) {
    let (lock, changed) = shared;
    let mut transcript = lock.lock().unwrap();
    let at = transcript.begun.elapsed();
    transcript.lines.push((at, line));
    drop(transcript);
    changed.notify_all();
}

/// Resident memory of a process, in KiB.
pub(crate) fn rss_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("Linux says it");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One webhook `orders` on the database `orders`, everything from its beginning.
pub(crate) struct World {
    /// What is tested. Dropped first: what is killed last would send to ports that are another test's by then.
    pub(crate) daemon: Daemon,
    /// CouchDB.
    pub(crate) couch: StandIn,
    /// The endpoint.
    pub(crate) receiver: Receiver,
}

#[allow(dead_code, reason = "a driver offers more than the tests of one day use")]
impl World {
    /// Starts all three; `lines` are for the webhook's section.
    pub(crate) fn start(flavour: Flavour, lines: &str) -> World {
        World::start_on(couch(flavour, &["orders"]), receiver(), lines)
    }

    /// Starts the daemon between these two.
    pub(crate) fn start_on(couch: StandIn, receiver: Receiver, lines: &str) -> World {
        let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), lines);
        World { daemon: Daemon::start(&ini), couch, receiver }
    }

    /// Waits for something in the receiver's record.
    pub(crate) fn wait(&self, what: &str, condition: impl FnMut(&Record) -> bool) {
        self.wait_long(WAIT_MAX, what, condition);
    }

    /// As [`World::wait`], for what takes longer by its nature.
    pub(crate) fn wait_long(&self, limit: Duration, what: &str, condition: impl FnMut(&Record) -> bool) {
        assert!(
            self.receiver.wait_until(limit, condition),
            "no {what} within {limit:?}\n{}",
            self.transcript()
        );
    }

    /// Waits for something that CouchDB holds.
    pub(crate) fn wait_couch(
        &self,
        what: &str,
        condition: impl FnMut(&couch_hookd::standin::couch::Seen<'_>) -> bool,
    ) {
        assert!(
            self.couch.wait_until(WAIT_MAX, condition),
            "no {what} within {WAIT_MAX:?}\n{}",
            self.transcript()
        );
    }

    /// Waits until every document's winning revision has been accepted, and nothing was wrong on the way.
    pub(crate) fn wait_for_all(&self, db: &str) {
        self.wait_for_all_within(WAIT_MAX, db);
    }

    /// As [`World::wait_for_all`], for many.
    pub(crate) fn wait_for_all_within(&self, limit: Duration, db: &str) {
        let winners = revs(&self.couch, db);
        self.wait_long(limit, &format!("{} documents of `{db}`", winners.len()), |record| {
            record.n_events_accepted() >= winners.len() && has_all(record, db, &winners)
        });
        self.assert_clean();
    }

    /// Fails when the receiver saw something wrong.
    pub(crate) fn assert_clean(&self) {
        let (violations, n_unverified) =
            self.receiver.look(|record| (record.violations().to_vec(), record.n_unverified()));
        assert!(violations.is_empty() && n_unverified == 0, "{violations:#?}\n{}", self.transcript());
    }

    /// Everything that passed.
    pub(crate) fn transcript(&self) -> String {
        let requests = self.couch.look(|seen| {
            let lines = seen.requests().rev().take(200).collect::<Vec<_>>().into_iter().rev();
            lines.fold(String::new(), |mut text, one| {
                let _ = writeln!(text, "{} {} {:?}", one.method, one.path, one.query);
                text
            })
        });
        let received = self.receiver.look(Record::transcript);
        let cut = received.len().saturating_sub(40_000);
        let received: String = received.chars().skip(cut).collect();
        format!(
            "{}\n--- receiver (its end) ---\n{received}\n--- CouchDB (the last requests) ---\n{requests}",
            self.daemon.transcript()
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for (id, winner) in self.couch.winners(STATE_DB) {
            assert_no_secret(&id, &winner.json);
        }
        for db in self.couch.look(|seen| seen.databases()) {
            let checkpoint =
                self.couch.look(|seen| seen.local(&db, "couch-hookd.orders")).unwrap_or_default();
            assert_no_secret(&db, &checkpoint);
        }
    }
}

/// Every document's winning revision.
pub(crate) fn revs(couch: &StandIn, db: &str) -> BTreeMap<String, String> {
    couch.winners(db).into_iter().map(|(id, winner)| (id, winner.rev)).collect()
}

/// Whether each of these revisions is what was accepted last of its document.
pub(crate) fn has_all(record: &Record, db: &str, revs: &BTreeMap<String, String>) -> bool {
    revs.iter().all(|(id, rev)| record.accepted_rev(db, id) == Some(rev))
}

/// The dead letters, by id.
pub(crate) fn letters(couch: &StandIn) -> Vec<Value> {
    let docs = couch.winners(STATE_DB).into_iter();
    let letters = docs.filter(|(id, winner)| id.starts_with("msg_") && !winner.deleted);
    letters.map(|(_, winner)| serde_json::from_str(&winner.json).unwrap()).collect()
}

/// The checkpoint of a webhook in a database.
pub(crate) fn checkpoint(couch: &StandIn, db: &str, webhook: &str) -> Option<Value> {
    let json = couch.look(|seen| seen.local(db, &format!("couch-hookd.{webhook}")))?;
    Some(serde_json::from_str(&json).unwrap())
}
