//! The daemon as CouchDB 1.x starts it from `[update_notification]`: what it reads, what it never says, when it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::Receiver;
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use crossbeam_channel::bounded;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::host::WAIT_MAX;
use crate::world::{Dir, Ini, assert_no_secret, couch, receiver, rss_kib, write};

/// Exit within 1 s after the end of stdin; the rest is for a machine that is busy.
const END_MAX: Duration = Duration::from_millis(1_200);
/// More than a pipe holds: whoever does not read it all is found out.
const MORE_THAN_A_PIPE: usize = 300_000;

/// CouchDB's end of the pipes.
struct Notifier {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Lines of stderr as they come.
    errors: crossbeam_channel::Receiver<String>,
    said: Vec<String>,
    /// All of stdout, once it has ended.
    stdout: crossbeam_channel::Receiver<Vec<u8>>,
}

impl Notifier {
    fn start(words: &[&str]) -> Notifier {
        Notifier::start_with(words, &[])
    }

    fn start_with(words: &[&str], environment: &[(&str, &str)]) -> Notifier {
        let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
        let ours = std::env::vars().filter(|(name, _)| name.starts_with("COUCH"));
        ours.for_each(|(name, _)| {
            command.env_remove(name);
        });
        command.arg("update-notification").args(words).envs(environment.iter().copied());
        Notifier::spawn(command)
    }

    fn spawn(mut command: Command) -> Notifier {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut output, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let ((all, stdout), (line, lines)) = (bounded(1), bounded(100_000));
        drop(sys::spawn("stdout", move || {
            let mut bytes = Vec::new();
            output.read_to_end(&mut bytes).unwrap();
            // Nobody waits for it where the process was killed.
            let _ = all.send(bytes);
        }));
        drop(sys::spawn("stderr", move || {
            let said = BufReader::new(errors).split(b'\n').map_while(Result::ok);
            said.for_each(|text| drop(line.send(String::from_utf8_lossy(&text).into_owned())));
        }));
        Notifier { stdin: child.stdin.take(), child, errors: lines, said: Vec::new(), stdout }
    }

    /// Writes as CouchDB does: this does not return before all of it was read, or is in the pipe.
    fn write(&mut self, bytes: &[u8]) {
        self.stdin.as_mut().unwrap().write_all(bytes).expect("it reads");
    }

    /// Waits for a line on stderr that holds `text`.
    fn wait_for(&mut self, text: &str) {
        while !self.has_said(text) {
            let Ok(line) = self.errors.recv_timeout(WAIT_MAX) else {
                panic!("expected `{text}` on stderr, got {:#?}", self.said)
            };
            self.said.push(line);
        }
    }

    fn has_said(&mut self, text: &str) -> bool {
        self.said.extend(self.errors.try_iter());
        self.said.iter().any(|line| line.contains(text))
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Closes stdin and waits for the end, which is in time and without a byte on stdout; gives the exit status.
    #[track_caller]
    fn close(mut self) -> i32 {
        let is_damaged = self.has_said("cannot be read");
        let begun = sys::now();
        drop(self.stdin.take());
        // Ends with the process, which nobody else shares it with.
        let stdout = self.stdout.recv_timeout(WAIT_MAX).expect("it lives on");
        let status = self.child.wait().unwrap().code();
        let took = begun.elapsed();
        self.said.extend(self.errors.iter());
        assert!(is_damaged || !self.has_said("cannot be read"), "an end is no damage: {:#?}", self.said);
        assert_eq!(String::from_utf8_lossy(&stdout), "", "on stdout; {:#?}", self.said);
        assert!(took <= END_MAX, "{took:?}; {:#?}", self.said);
        self.said.iter().for_each(|line| assert_no_secret("stderr", line));
        status.unwrap_or_else(|| panic!("a signal ended it; {:#?}", self.said))
    }
}

impl Drop for Notifier {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `n` lines about databases `NAME-0`, `NAME-1`, …, `distinct` different ones in turn.
fn lines(name: &str, n: usize, distinct: usize) -> Vec<u8> {
    let line = |i: usize| format!("{{\"type\":\"updated\",\"db\":\"{name}-{}\"}}\n", i % distinct);
    (0..n).map(line).collect::<String>().into_bytes()
}

/// A daemon with a webhook on `orders`, configured from a file.
fn notified(ini: impl Fn(Ini) -> Ini) -> (Dir, StandIn, Receiver, Notifier) {
    let (dir, couch, receiver) = (Dir::new(), couch(Flavour::V1, &["orders"]), receiver());
    let ini = ini(Ini::new(&couch.url()).webhook("orders", &receiver.url(), ""));
    std::fs::write(dir.path("hookd.ini"), ini.text()).unwrap();
    let notifier = Notifier::start(&["--config", dir.path("hookd.ini").to_str().unwrap()]);
    (dir, couch, receiver, notifier)
}

#[track_caller]
fn wait(receiver: &Receiver, notifier: &mut Notifier, n: usize) {
    let got = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= n);
    assert!(got, "{} of {n} delivered; {:#?}", receiver.look(Record::n_accepted), {
        notifier.has_said("");
        &notifier.said
    });
}

#[test]
fn a_hundred_thousand_lines_change_neither_stdout_nor_memory_nor_deliveries() {
    let (_dir, couch, receiver, mut notifier) = notified(|ini| ini);
    write(&couch, "orders", 5);
    wait(&receiver, &mut notifier, 5);
    // As many names as are kept, and then some: from here on there is no room.
    notifier.write(&lines("full", 12_000, 12_000));
    write(&couch, "orders", 5);
    wait(&receiver, &mut notifier, 10);
    let before = rss_kib(notifier.child.id());
    for round in 0..10 {
        notifier.write(&lines(&format!("round-{round}"), 10_000, if round % 2 == 0 { 7 } else { 10_000 }));
    }
    write(&couch, "orders", 5);
    wait(&receiver, &mut notifier, 15);
    let after = rss_kib(notifier.child.id());
    println!("{before} KiB before 100,000 lines, {after} KiB after");
    assert!(after < before + 4_096, "{before} KiB before, {after} KiB after");
    assert!(before < 65_536, "{before} KiB");
    assert!(!notifier.has_said("cannot be read"), "{:#?}", notifier.said);
    assert_eq!(notifier.close(), 0);
}

/// Nothing else leads to these databases: `_db_updates` says nothing, and they are looked at once an hour.
#[test]
fn what_couchdb_says_leads_to_databases_of_a_pattern() {
    let (dir, receiver) = (Dir::new(), receiver());
    let couch = couch(Flavour::V1, &["tenant-a", "tenant-b/c", "tenant-gone", "other"]);
    couch.quirks(|quirks| quirks.drop_updates = true);
    let ini = Ini::new(&couch.url()).hookd("sweep_interval = 1h\nlog_level = debug").webhook(
        "tenants",
        &receiver.url(),
        "db = tenant-*\nsince = now",
    );
    std::fs::write(dir.path("hookd.ini"), ini.text()).unwrap();
    let mut notifier = Notifier::start(&["--config", dir.path("hookd.ini").to_str().unwrap()]);
    notifier.wait_for("webhook `tenants` starts for the first time: tells changes");
    let told = |notifier: &mut Notifier, db: &str, rev: &str| {
        let is_told =
            |record: &Record| record.accepted_rev(db, "doc").is_some_and(|told| told.starts_with(rev));
        let told = receiver.wait_until(WAIT_MAX, is_told);
        assert!(told, "`{db}` {rev}: {:#?}", (notifier.has_said(""), &notifier.said));
    };
    // The second round comes when the first walk over all of them is over for sure: it leads to the first.
    for rev in ["1-", "2-", "3-"] {
        couch.put("tenant-a", "doc", &json!({})).unwrap();
        notifier.write(b"{\"type\":\"updated\",\"db\":\"tenant-a\"}\n");
        told(&mut notifier, "tenant-a", rev);
    }
    couch.put("tenant-b/c", "doc", &json!({})).unwrap();
    notifier.write(b"{\"db\":\"shards/00000000-ffffffff/tenant-b/c.1500000000\",\"type\":\"updated\"}\n");
    told(&mut notifier, "tenant-b/c", "1-");
    couch.create_db("tenant-new");
    couch.put("tenant-new", "doc", &json!({})).unwrap();
    couch.delete_db("tenant-gone");
    notifier.write(
        b"{\"type\":\"deleted\",\"db\":\"tenant-gone\"}\n{\"type\":\"created\",\"db\":\"tenant-new\"}\n",
    );
    told(&mut notifier, "tenant-new", "1-");
    // A line that cannot be read may have been about any of them.
    couch.put("tenant-b/c", "doc", &json!({})).unwrap();
    notifier.write(b"{\"type\":\"updated\",\"db\":\n");
    told(&mut notifier, "tenant-b/c", "2-");
    assert_eq!(receiver.look(Record::n_accepted), 6);
    assert_eq!(notifier.close(), 0);
}

#[test]
fn damaged_lines_are_said_once_and_change_nothing() {
    let (_dir, couch, receiver, mut notifier) = notified(|ini| ini);
    notifier.write(b"nonsense\n\xff\xfe\0\n{\"type\":\n\n[]\n{\"db\":\"shards/00000000-1fffffff/a.15\",\"type\":\"updated\"}\n");
    notifier.wait_for("cannot be read");
    notifier.write(&[b'x'; MORE_THAN_A_PIPE]);
    for _ in 0..1_000 {
        notifier.write(b"\n{\"type\":\"upda");
        notifier.write(b"ted\",\"db\":7}");
    }
    write(&couch, "orders", 5);
    wait(&receiver, &mut notifier, 5);
    assert_eq!(notifier.said.iter().filter(|line| line.contains("cannot be read")).count(), 1);
    assert_eq!(notifier.close(), 0);
}

/// Whatever is wrong: it stays, reads all there is, says why on stderr and nothing on stdout, and ends with stdin.
#[track_caller]
fn check_stays(words: &[&str], environment: &[(&str, &str)], said: &str, status: i32) -> Vec<String> {
    let mut notifier = Notifier::start_with(words, environment);
    notifier.wait_for(said);
    notifier.write(&lines("db", MORE_THAN_A_PIPE / 30, 100));
    assert!(notifier.is_running(), "{words:?}: {:#?}", notifier.said);
    let said = std::mem::take(&mut notifier.said);
    assert_eq!(notifier.close(), status, "{words:?}");
    said
}

#[test]
fn whatever_is_wrong_it_stays_until_couchdb_goes() {
    let dir = Dir::new();
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path(name), text).unwrap();
        dir.path(name).to_str().unwrap().to_owned()
    };
    let webhook = "[hookd.webhooks]\norders = http://127.0.0.1:9/hook\n";
    let faulty = file("faulty.ini", "[hookd]\nlog_level = loud\n");
    let nowhere = file("nowhere.ini", &format!("[hookd]\ncouchdb_url = http://127.0.0.1:9\n{webhook}"));
    let binary = file("binary.ini", "\0\u{1}\u{2}[hookd\n]");
    let log = dir.path("none/hookd.log");
    let unwritable =
        file("unwritable.ini", &format!("[hookd]\nlog_file = {}\nlog_level = loud\n", log.display()));
    let missing = dir.path("missing.ini").to_str().unwrap().to_owned();

    // Arguments: the process knows nothing, and stays for CouchDB's sake.
    check_stays(&["--confg", &nowhere], &[], "unexpected argument '--confg'", 2);
    check_stays(&["--config"], &[], "a value is required", 2);
    check_stays(&["stray"], &[], "unexpected argument 'stray'", 2);
    check_stays(&["--help"], &[], "stays only because CouchDB needs it", 2);
    check_stays(&["--version"], &[], "stays only because CouchDB needs it", 2);
    check_stays(&["--config", &nowhere, "--node", "x"], &[], "cannot be used with", 2);
    // Configurations.
    check_stays(&["--config", &missing], &[], "the configuration cannot be used", 0);
    check_stays(&["--config", &faulty], &[], "got `loud`", 0);
    check_stays(&["--config", &binary], &[], "expected", 0);
    check_stays(&["--config", &dir.path("").to_string_lossy()], &[], "unwritable.ini:3", 0);
    check_stays(&["--config", &faulty, "--set", "nonsense"], &[], "--set: expected", 0);
    let said = check_stays(&["--config", &unwritable], &[], "the configuration cannot be used", 0);
    let about_log = |line: &&String| line.contains("log lines go to stderr");
    assert_eq!(said.iter().filter(about_log).count(), 1, "{said:#?}");
    // Servers.
    check_stays(&["--config", &nowhere], &[], "waiting for CouchDB at http://127.0.0.1:9", 0);
    check_stays(
        &[],
        &[("COUCHDB_URL", "http://127.0.0.1:9")],
        "waiting for CouchDB at http://127.0.0.1:9",
        0,
    );
    check_stays(&[], &[("COUCHDB_URL", "nonsense")], "COUCHDB_URL", 0);
    check_stays(&[], &[("COUCH_HOOKD_PASSWORD_FILE", "/nonexistent")], "failed to read `/nonexistent`", 0);
}

#[test]
fn stdout_is_never_written_though_stderr_be_the_same_pipe() {
    let (mut output, pipe) = std::io::pipe().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
        .args(["update-notification", "--config", "/nonexistent.ini", "--set", "hookd.log_level=debug"])
        .stdin(Stdio::piped())
        .stdout(pipe.try_clone().unwrap())
        .stderr(pipe)
        .spawn()
        .unwrap();
    // All of this is read, so it has begun and has said what it had to say about its configuration.
    child.stdin.as_mut().unwrap().write_all(&lines("db", 50_000, 100)).unwrap();
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut said = String::new();
    output.read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn a_configuration_that_is_mended_is_taken_up_without_a_restart() {
    let (dir, couch, receiver) = (Dir::new(), couch(Flavour::V1, &["orders"]), receiver());
    write(&couch, "orders", 3);
    let path = dir.path("hookd.ini");
    let mut notifier = Notifier::start(&["--config", path.to_str().unwrap()]);
    notifier.wait_for("the configuration cannot be used");
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    std::fs::write(&path, ini.text()).unwrap();
    // Nobody tells it: it looks.
    wait(&receiver, &mut notifier, 3);
    std::fs::write(&path, "[hookd]\nlog_level = loud\n").unwrap();
    notifier.signal(Signal::SIGHUP);
    notifier.wait_for("the old one stays in force");
    write(&couch, "orders", 3);
    wait(&receiver, &mut notifier, 6);
    assert_eq!(notifier.close(), 0);
}

#[test]
fn lines_go_to_the_log_file_and_follow_it_after_sighup() {
    let dir = Dir::new();
    let (log, moved) = (dir.path("hookd.log"), dir.path("hookd.log.1"));
    let with_log = |ini: Ini| ini.hookd(&format!("log_file = {}", log.display()));
    let (_dir, couch, receiver, mut notifier) = notified(with_log);
    notifier.wait_for(&format!("log lines go to `{}`", log.display()));
    write(&couch, "orders", 3);
    wait(&receiver, &mut notifier, 3);
    std::fs::rename(&log, &moved).unwrap();
    notifier.signal(Signal::SIGHUP);
    wait_for_text(&log, "SIGHUP: configuration applied");
    let first = std::fs::read_to_string(&moved).unwrap();
    assert!(first.contains("starts for the first time"), "{first}");
    // What is wrong with a configuration stands where people look.
    let ini = std::fs::read_to_string(_dir.path("hookd.ini")).unwrap();
    std::fs::write(_dir.path("hookd.ini"), ini.replace("[hookd]\n", "[hookd]\nlog_level = loud\n")).unwrap();
    notifier.signal(Signal::SIGHUP);
    wait_for_text(&log, "the old one stays in force");
    assert!(std::fs::read_to_string(&log).unwrap().contains("got `loud`"));
    assert_eq!(notifier.said.len(), 1, "stderr: {:#?}", notifier.said);
    assert_no_secret("the log file", &std::fs::read_to_string(&log).unwrap());
    assert_eq!(notifier.close(), 0);
}

#[track_caller]
fn wait_for_text(path: &Path, text: &str) {
    let until = sys::now() + WAIT_MAX;
    while !std::fs::read_to_string(path).is_ok_and(|found| found.contains(text)) {
        assert!(sys::now() < until, "expected `{text}` in {:?}", std::fs::read_to_string(path));
        sys::yield_now();
    }
}

#[test]
fn without_files_couchdb_is_asked_over_http() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    write(&couch, "orders", 3);
    let dir = Dir::new();
    let log = dir.path("hookd.log");
    couch.set_config("hookd", "log_file", log.to_str().unwrap());
    couch.set_config("hookd.webhooks", "orders", &receiver.url());
    couch.set_config("hookd.webhook.orders", "since", "0");
    couch.set_config("hookd.webhook.orders", "secret", &crate::world::secret());
    let mut notifier = Notifier::start_with(&[], &[("COUCHDB_URL", &couch.url())]);
    wait(&receiver, &mut notifier, 3);
    notifier.wait_for("`--set hookd.log_file=PATH`");
    assert!(!log.exists(), "a CouchDB admin has us write no files");
    notifier.signal(Signal::SIGHUP);
    notifier.wait_for("asked for anyway");
    assert_eq!(notifier.close(), 0);
}

#[test]
fn a_kill_loses_nothing() {
    let (dir, couch, receiver, mut notifier) = notified(|ini| ini);
    write(&couch, "orders", 20);
    wait(&receiver, &mut notifier, 1);
    for n in 1..=3 {
        // As CouchDB 1.x does when its notifier is set anew: SIGKILL, and a new process.
        notifier.signal(Signal::SIGKILL);
        drop(notifier);
        write(&couch, "orders", 20);
        notifier = Notifier::start(&["--config", dir.path("hookd.ini").to_str().unwrap()]);
        notifier.write(&lines("orders", 100, 1));
        let told = |record: &Record| {
            (0..20).all(|i| {
                record
                    .accepted_rev("orders", &format!("d{i}"))
                    .is_some_and(|rev| rev.starts_with(&format!("{}-", n + 1)))
            })
        };
        assert!(receiver.wait_until(WAIT_MAX, told), "{}", receiver.look(Record::transcript));
    }
    assert_eq!(notifier.close(), 0);
}

/// The daemon finds no file descriptor for its signals and breaks down; once there are some it starts anew, in the same
/// process, and CouchDB has noticed nothing.
#[test]
fn a_daemon_that_breaks_down_starts_anew_in_the_same_process() {
    if !Command::new("prlimit").arg("--version").output().is_ok_and(|tried| tried.status.success()) {
        println!("skipped: no prlimit (util-linux)");
        return;
    }
    let (dir, couch, receiver) = (Dir::new(), couch(Flavour::V1, &["orders"]), receiver());
    write(&couch, "orders", 3);
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    std::fs::write(dir.path("hookd.ini"), ini.text()).unwrap();
    let mut command = Command::new("/bin/sh");
    let script = "ulimit -S -n 5; exec \"$0\" update-notification --config \"$1\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_couch-hookd")]).arg(dir.path("hookd.ini"));
    let mut notifier = Notifier::spawn(command);
    notifier.wait_for("the daemon broke down: failed to catch signals");
    notifier.write(&lines("db", MORE_THAN_A_PIPE / 30, 100));
    let pid = notifier.child.id().to_string();
    assert!(Command::new("prlimit").args(["--pid", &pid, "--nofile=1024"]).status().unwrap().success());
    wait(&receiver, &mut notifier, 3);
    notifier.write(&lines("db", MORE_THAN_A_PIPE / 30, 100));
    assert_eq!(notifier.close(), 0);
}

#[test]
fn sigterm_ends_it_cleanly() {
    let (_dir, couch, receiver, mut notifier) = notified(|ini| ini);
    write(&couch, "orders", 3);
    wait(&receiver, &mut notifier, 3);
    notifier.signal(Signal::SIGTERM);
    assert_eq!(notifier.child.wait().unwrap().code(), Some(0));
    assert_eq!(notifier.stdout.recv_timeout(WAIT_MAX).unwrap(), b"");
}

#[test]
fn the_end_of_stdin_ends_it_while_nobody_reads_its_log() {
    let (_errors, full) = std::io::pipe().unwrap();
    let mut filler = full.try_clone().unwrap();
    nix::fcntl::fcntl(&filler, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4_096)).unwrap();
    filler.write_all(&[b'.'; 4_096]).unwrap();
    for words in [vec!["--confg"], vec!["--config", "/nonexistent.ini"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
            .arg("update-notification")
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(full.try_clone().unwrap())
            .spawn()
            .unwrap();
        // Hangs in its first word, and still reads.
        child.stdin.as_mut().unwrap().write_all(&lines("db", MORE_THAN_A_PIPE / 30, 100)).unwrap();
        let begun = sys::now();
        drop(child.stdin.take());
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert!(begun.elapsed() <= END_MAX, "{:?}", begun.elapsed());
    }
}

#[test]
fn a_parent_that_is_gone_is_the_end_though_stdin_stays_open() {
    let script = "exec 3<&0; \"$0\" update-notification --config /nonexistent.ini <&3 & wait";
    let mut parent = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_couch-hookd")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    // Kept: waiting for the parent would close it.
    let (mut stdin, mut output) = (parent.stdin.take().unwrap(), parent.stdout.take().unwrap());
    let mut errors = BufReader::new(parent.stderr.take().unwrap());
    let mut line = String::new();
    errors.read_line(&mut line).unwrap();
    stdin.write_all(&lines("db", MORE_THAN_A_PIPE / 30, 100)).unwrap();
    let begun = sys::now();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (to, ended) = bounded(1);
    drop(sys::spawn("output", move || {
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).unwrap();
        to.send((sys::now(), rest)).unwrap();
    }));
    let (ended_at, rest) = ended.recv_timeout(WAIT_MAX).expect("it lives on without its parent");
    assert_eq!(rest, b"");
    // Looked at every so often, then a second as for any other end.
    assert!(ended_at - begun < Duration::from_millis(2_500), "{:?}", ended_at - begun);
    drop(stdin);
}
