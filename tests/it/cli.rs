//! The commands, through the real binary: each one's main use and main misuse, and no secret in any of it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use couch_hookd::pure::signature::{Key, new_secret};
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::receiver::{Receiver, ReceiverOptions};
use couch_hookd::sys;
use crossbeam_channel::{Receiver as Lines, bounded};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);
/// Stands in everything secret here; must stand in nothing that is printed.
const CANARY: &str = "canary";

/// Our binary with an environment of its own: none of ours that it would heed.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
    for (name, _) in std::env::vars() {
        if name.starts_with("COUCH") || name == "CREDENTIALS_DIRECTORY" || name == "JOURNAL_STREAM" {
            command.env_remove(name);
        }
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Exit status, stdout, stderr of a command that ends by itself.
fn run(arguments: &[&str], stdin: &[u8]) -> (i32, String, String) {
    let mut command = command(arguments);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A command that does not read its stdin may be gone by now.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(!format!("{out}{err}").contains(CANARY), "{arguments:?} shows a secret:\n{out}{err}");
    (output.status.code().unwrap(), out, err)
}

#[track_caller]
fn refused(arguments: &[&str], expected: &str) {
    let (status, out, err) = run(arguments, b"");
    assert_eq!((status, out.as_str()), (2, ""), "{arguments:?}: {err}");
    assert_eq!(err.lines().count(), 1, "{arguments:?}: {err}");
    assert!(err.starts_with("couch-hookd: ") && err.contains(expected), "{arguments:?}: {err}");
}

/// A command that runs until it is told to end.
struct Running {
    child: Child,
    lines: Lines<String>,
    heard: Vec<String>,
}

impl Running {
    fn start(mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (to, lines) = bounded(1000);
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let also_to = to.clone();
        drop(sys::spawn("out", move || {
            BufReader::new(out).lines().map_while(Result::ok).for_each(|line| drop(to.send(line)));
        }));
        drop(sys::spawn("err", move || {
            BufReader::new(err).lines().map_while(Result::ok).for_each(|line| drop(also_to.send(line)));
        }));
        Running { child, lines, heard: Vec::new() }
    }

    /// The next line, of stdout or stderr, that holds `part`.
    #[track_caller]
    fn until(&mut self, part: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(LIMIT) else {
                panic!("expected a line with `{part}`, got {:#?}", self.heard)
            };
            self.heard.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Ctrl-C; the exit status, and everything that was said.
    fn interrupt(mut self) -> (Option<i32>, String) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        let status = self.child.wait().unwrap().code();
        self.heard.extend(self.lines.iter());
        let said = self.heard.join("\n");
        assert!(!said.contains(CANARY), "{said}");
        (status, said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder of its own, gone in the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static N: AtomicU32 = AtomicU32::new(0);
        let n = N.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("couch-hookd-cli-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn couch(flavour: Flavour) -> StandIn {
    let admin = Some(("admin".to_owned(), CANARY.to_owned()));
    let couch = StandIn::start(Options { admin, ..Options::new(flavour) }).unwrap();
    couch.create_db("orders");
    couch
}

/// The stand-in's URL with its login.
fn url(couch: &StandIn) -> String {
    couch.url().replace("http://", &format!("http://admin:{CANARY}@"))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn wrong_use_is_one_line_and_status_2() {
    refused(&["nonsense"], "unrecognized subcommand 'nonsense'");
    refused(&["watch"], "<DATABASE_URL>");
    refused(&["watch", "http://u:canary@h"], "DATABASE_URL: expected");
    refused(&["watch", "http://h/db", "--selector", "{"], "--selector: expected");
    refused(&["receive", "--secret", "whsec_canary"], "--secret: expected");
    refused(&["receive", "--answer", "99"], "99 is not in 200..=599");
    refused(&["signature", "sign", "--id", "msg_1"], "expected --secret or --secret-file");
    refused(&["signature", "verify", "--secret", &new_secret([1; 32]), "-H", "x"], "--header: expected");
    refused(&["signature", "verify", "--secret-file", "/nowhere"], "/nowhere");
    refused(&["run", "--node", "x"], "--from-couchdb");
    refused(&["run", "--from-couchdb", "--set", "hookd.couchdb_url=canary"], "couchdb_url");
    refused(&["demo", "--for", "5"], "--for");
    let (status, out, _) = run(&["--version"], b"");
    assert_eq!((status, out.trim()), (0, concat!("couch-hookd ", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn a_bare_start_on_pipes_is_an_os_daemon_and_anywhere_else_help() {
    let mut child =
        command(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), r#"["get","hookd"]"#);
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let output = command(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("Usage: couch-hookd <COMMAND>") && output.stdout.is_empty(), "{said}");
}

#[test]
fn a_new_secret_signs_what_verify_accepts_and_a_changed_body_is_told_why() {
    let (status, secret, _) = run(&["secret"], b"");
    let secret = secret.trim();
    assert!(status == 0 && Key::parse(secret).is_ok(), "{secret}");
    let folder = Folder::new();
    let file = folder.file("secret", secret);
    let (status, signed, _) =
        run(&["signature", "sign", "--secret-file", text(&file), "--id", "msg_1"], b"{\"a\":1}");
    assert_eq!(status, 0);
    let verify = |body: &[u8]| {
        let mut arguments = vec!["signature", "verify", "--secret", secret];
        signed.lines().for_each(|header| arguments.extend(["-H", header]));
        run(&arguments, body)
    };
    let (status, out, _) = verify(b"{\"a\":1}");
    assert_eq!((status, out.as_str()), (0, "ok       the signature is right\n"));
    let (status, out, _) = verify(b"{\"a\":1}\n");
    assert_eq!(status, 1);
    assert!(out.starts_with("wrong    the signature does not match: a line break was added"), "{out}");
    assert!(!out.contains('\x1b'), "no colours but on a terminal");
}

#[test]
fn receive_prints_what_watch_sends_and_watch_writes_nothing() {
    let couch = couch(Flavour::V3);
    couch.put("orders", "a", &json!({"n": 1})).unwrap();
    let mut receive = Running::start(command(&["receive", "--listen", "127.0.0.1:0", "--refuse", "bad"]));
    let listening = receive.until("receiving on http://");
    let endpoint = listening.split(' ').find(|word| word.starts_with("http://")).unwrap().to_owned();
    let base = format!("{}/orders", url(&couch));
    let mut watch = Running::start(command(&["watch", &base, "--since", "0", "--to", &endpoint]));
    let signing = watch.until("signing with whsec_");
    assert!(Key::parse(signing.split(' ').nth(2).unwrap()).is_ok(), "{signing}");
    receive.until("200 document.updated orders/a 1-");
    watch.until("200      document.updated orders/a 1-");
    couch.put("orders", "b", &json!({"n": 2})).unwrap();
    watch.until("200      document.updated orders/b 1-");
    couch.put("orders", "bad", &json!({})).unwrap();
    watch.until("422      document.updated orders/bad 1-");
    let (status, _) = watch.interrupt();
    assert_eq!(status, Some(0));
    assert_eq!(receive.interrupt().0, Some(0));
    let asked: Vec<String> =
        couch.look(|seen| seen.requests().map(|one| format!("{} {}", one.method, one.path)).collect());
    let reads = |one: &String| one.starts_with("GET ") || one.starts_with("POST /orders/_changes");
    assert!(!asked.is_empty() && asked.iter().all(reads), "{asked:#?}");
}

#[test]
fn watch_prints_payloads_on_every_version_and_a_selector_needs_2_0() {
    for flavour in [Flavour::V1, Flavour::V2, Flavour::V3] {
        let couch = couch(flavour);
        couch.put("orders", "old", &json!({})).unwrap();
        let base = format!("{}/orders", url(&couch));
        let mut watch = Running::start(command(&["watch", &base]));
        watch.until("following `orders`");
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
        couch.put_raw("orders", "new", r#"{"n":1.0}"#).unwrap();
        let payload: Value = serde_json::from_str(&watch.until("document.updated")).unwrap();
        assert_eq!(payload["data"]["id"], "new", "{payload}");
        assert_eq!(watch.interrupt().0, Some(0));
        let writes = couch.look(|seen| seen.requests().filter(|one| one.method != "GET").count());
        assert_eq!(writes, 0);
    }
    let couch = couch(Flavour::V1);
    let (status, _, err) = run(&["watch", &format!("{}/orders", url(&couch)), "--selector", "{}"], b"");
    assert!(status == 1 && err.contains("needs CouchDB 2.0"), "{err}");
    let (status, _, err) = run(&["watch", &format!("{}/nope", url(&couch))], b"");
    assert!(status == 1 && err.contains("database `nope`: GET /nope: 404"), "{err}");
}

/// Lines of `check --json`, by subject.
fn checked(arguments: &[&str]) -> (i32, BTreeMap<String, String>) {
    let (status, out, err) = run(arguments, b"");
    assert_eq!(err, "");
    let mut lines: BTreeMap<String, String> = BTreeMap::new();
    for line in out.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let text = |key: &str| line[key].as_str().unwrap().to_owned();
        let said = lines.entry(text("subject")).or_default();
        *said = format!("{said}{}: {}; ", text("level"), text("message"));
    }
    (status, lines)
}

#[track_caller]
fn says(lines: &BTreeMap<String, String>, subject: &str, expected: &str) {
    let hit = lines.iter().any(|(place, said)| place.contains(subject) && said.contains(expected));
    assert!(hit, "expected `{subject}` with `{expected}`, got {lines:#?}");
}

#[test]
fn check_finds_many_faults_at_once_and_still_tries_server_and_endpoints() {
    let couch = couch(Flavour::V3);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (fine, folder) = (listener.local_addr().unwrap(), Folder::new());
    let ini = folder.file(
        "hookd.ini",
        &format!(
            "[hookd]\ncouchdb_url = {}\nusername = admin\npassword = {CANARY}\n[hookd.webhooks]\n\
             orders = http://{fine}/hook?token={CANARY}\nlost = http://127.0.0.1:1/\nbad = http://{fine}/\n\
             [hookd.webhook.orders]\nselector = {{\"type\":\"order\"}}\nsecret = {}\n\
             [hookd.webhook.lost]\ndb = nope\n[hookd.webhook.bad] ; {CANARY}\ntimeot = 5s\nsecret = whsec_{CANARY}\n",
            couch.url(),
            new_secret([1; 32])
        ),
    );
    let (status, lines) = checked(&["check", "--json", "--config", text(&ini)]);
    assert_eq!(status, 1);
    says(&lines, "hookd.ini:14", "before 3.3 a comment");
    says(&lines, "hookd.ini:15: [hookd.webhook.bad] timeot", "the nearest one is `timeout`");
    says(&lines, "hookd.ini:16: [hookd.webhook.bad] secret", "error: ");
    says(&lines, "server http://", "ok: CouchDB 3.5.0 answers");
    says(&lines, "clock", "ok: ");
    says(&lines, "login", "ok: `admin`, a server admin");
    says(&lines, "state_db `couch_hookd`", "ok: ");
    says(&lines, "webhook `orders`, database `orders`", "ok: its changes can be read; ok: its checkpoint");
    says(&lines, "webhook `orders`", r#"{"$or":[{"type":"order"},{"_deleted":true}]}"#);
    says(&lines, "webhook `lost`, database `nope`", "warning: does not exist");
    says(&lines, "webhook `orders`, endpoint", "ok: connects");
    says(&lines, "webhook `lost`, endpoint http://127.0.0.1:1", "error: cannot be reached");
    says(&lines, "webhook `bad`, endpoint", "ok: connects");
    let left = couch.look(|seen| seen.winners("orders").len());
    let deleted = couch.n_requests("DELETE /orders/_local/couch-hookd-check-");
    assert_eq!((left, deleted), (0, 1), "what was written is deleted again");
    // Two connections, and not a byte on them.
    listener.set_nonblocking(true).unwrap();
    let mut n_connections = 0;
    while let Ok((mut stream, _)) = listener.accept() {
        let mut text = Vec::new();
        std::io::Read::read_to_end(&mut stream, &mut text).unwrap();
        assert_eq!(String::from_utf8_lossy(&text), "");
        n_connections += 1;
    }
    assert_eq!(n_connections, 2);
}

#[test]
fn check_says_what_an_old_server_or_a_wrong_login_means() {
    let couch = couch(Flavour::V1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let hook = format!("hookd.webhooks.orders=http://{}/", listener.local_addr().unwrap());
    let server = format!("hookd.couchdb_url={}", url(&couch));
    let selector = "hookd.webhook.orders.selector={\"a\":1}";
    let (status, lines) = checked(&["check", "--json", "--set", &server, "--set", &hook, "--set", selector]);
    assert_eq!(status, 1);
    says(&lines, "webhook `orders`, database `orders`", "error: `selector` needs CouchDB 2.0");
    let (status, lines) = checked(&["check", "--json", "--set", &server, "--set", &hook]);
    assert_eq!(status, 0, "{lines:#?}");
    let wrong = format!("hookd.couchdb_url={}", couch.url().replace("//", "//admin:wrong_canary@"));
    let n_sessions = couch.n_requests("GET /_session");
    let (status, lines) = checked(&["check", "--json", "--set", &wrong, "--set", &hook]);
    assert_eq!(status, 1);
    says(&lines, "server", "ok: CouchDB 1.7.1 answers");
    says(&lines, "login", "error: ");
    says(&lines, "rights", "warning: not tried");
    says(&lines, "webhook `orders`, endpoint", "ok: connects");
    assert_eq!(couch.n_requests("GET /_session"), n_sessions, "a wrong login is sent once, to `GET /`");
    couch.stop();
    let (status, lines) = checked(&["check", "--json", "--set", &server, "--set", &hook]);
    assert_eq!(status, 1);
    says(&lines, "server", "error: ");
    says(&lines, "webhook `orders`, endpoint", "ok: connects");
    let (status, out, _) = run(&["check", "--set", &server, "--set", &hook], b"");
    assert_eq!(status, 1);
    assert!(
        out.contains("\nerror    server http://127.0.0.1:") && out.ends_with("1 error, 2 warnings\n"),
        "{out}"
    );
}

#[test]
fn check_says_what_a_pattern_finds_and_who_may_look() {
    for flavour in [Flavour::V1, Flavour::V2, Flavour::V3] {
        let couch = StandIn::start(Options {
            admin: Some(("admin".to_owned(), CANARY.to_owned())),
            users: vec![("hookd".to_owned(), CANARY.to_owned())],
            ..Options::new(flavour)
        })
        .unwrap();
        (0..120).for_each(|n| couch.create_db(&format!("tenant-{n:03}")));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hook = format!("hookd.webhooks.all=http://{}/", listener.local_addr().unwrap());
        let check = |user: &str, db: &str| {
            let server =
                format!("hookd.couchdb_url={}", couch.url().replace("//", &format!("//{user}:{CANARY}@")));
            let db = format!("hookd.webhook.all.db={db}");
            checked(&["check", "--json", "--set", &server, "--set", &hook, "--set", &db]).1
        };
        let lines = check("admin", "tenant-*, !tenant-000, tenant-001");
        let expected = "ok: finds 118 databases now: `tenant-002`, `tenant-003`, `tenant-004`, `tenant-005`, `tenant-006`, ...";
        says(&lines, "webhook `all`, databases `tenant-*, !tenant-000`", expected);
        says(&lines, "webhook `all`, database `tenant-001`", "ok: its changes can be read");
        let lines = check("admin", "couch*");
        says(&lines, "databases `couch*`", "warning: finds no database");
        says(&lines, "databases `couch*`", "ok: `couch_hookd` is [hookd] state_db, which no pattern finds");
        let lines = check("hookd", "*");
        let expected = match flavour {
            Flavour::V3 => "a pattern needs a server admin, who may list databases, and we are `hookd`: give",
            _ => "warning: we are no server admin: of databases that we may not read nothing is told",
        };
        says(&lines, "databases `*`", expected);
    }
}

#[test]
fn a_configuration_in_couchdb_is_followed_live() {
    check_followed_live(Flavour::V3);
}

#[test]
fn a_configuration_in_an_old_couchdb_is_followed_live() {
    check_followed_live(Flavour::V1);
}

fn check_followed_live(flavour: Flavour) {
    let couch = couch(flavour);
    let receiver = Receiver::start(ReceiverOptions::new(Vec::new())).unwrap();
    couch.set_config("hookd.webhooks", "orders", &receiver.url());
    couch.set_config("hookd.webhook.orders", "since", "0");
    couch.set_config("hookd.webhook.orders", "secret_file", "/etc/passwd");
    let mut command = command(&["run", "--from-couchdb", "--set", "hookd.log_level=debug"]);
    command.env("COUCHDB_URL", couch.url()).env("COUCHDB_USER", "admin").env("COUCHDB_PASSWORD", CANARY);
    couch.stop();
    let mut daemon = Running::start(command);
    daemon.until("waiting for CouchDB at http://");
    couch.start_again().unwrap();
    daemon.until("_config: [hookd.webhook.orders] secret_file: expected a file below");
    couch.put("orders", "a", &json!({})).unwrap();
    couch.set_config("hookd.webhook.orders", "secret_file", "");
    assert!(
        receiver.wait_until(LIMIT, |record| record.n_accepted() >= 1),
        "{flavour:?}: {:#?}",
        daemon.heard
    );
    let other = Receiver::start(ReceiverOptions::new(Vec::new())).unwrap();
    couch.set_config("hookd.webhooks", "orders", &other.url());
    couch.put("orders", "b", &json!({})).unwrap();
    assert!(
        receiver.wait_until(LIMIT, |record| record.n_accepted() >= 2),
        "told to the old endpoint until the new one is settled"
    );
    // Both answers that settle it lie five seconds apart.
    let mut n = 0;
    while !other.wait_until(Duration::from_millis(500), |record| record.n_accepted() >= 1) {
        n += 1;
        assert!(n < 40, "{flavour:?}: {:#?}", daemon.heard);
        couch.put("orders", &format!("c{n}"), &json!({})).unwrap();
    }
    let (status, said) = daemon.interrupt();
    assert_eq!(status, Some(0), "{said}");
    assert!(flavour == Flavour::V1 || said.contains("the configuration is node `"), "{said}");
    assert!(flavour == Flavour::V3 || couch.n_requests("GET /_config") > 1);
}

/// What bash offers behind `couch-hookd` and these words.
fn completed_by_bash(completions: &Path, words: &[&str]) -> String {
    let script = r#"source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        function=$(complete -p couch-hookd | sed 's/.* -F \([^ ]*\).*/\1/')
        "$function" couch-hookd "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"; echo "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    let bash = bash.args(["-c", script, "bash"]).arg(completions).arg("couch-hookd").args(words);
    String::from_utf8(bash.output().unwrap().stdout).unwrap().trim().to_owned()
}

#[test]
fn completions_and_manual_pages_come_from_the_definition() {
    for (shell, part) in [("bash", "complete -F"), ("zsh", "#compdef couch-hookd"), ("fish", "complete -c")] {
        let (status, out, err) = run(&["completions", shell], b"");
        assert_eq!(status, 0, "{err}");
        assert!(out.contains(part) && out.contains("from-couchdb"), "{shell}: {out}");
        if shell == "bash" {
            let folder = Folder::new();
            let path = folder.file("completions", &out);
            assert!(Command::new("bash").arg("-n").arg(&path).status().unwrap().success());
            assert_eq!(completed_by_bash(&path, &["sta"]), "status");
            assert_eq!(completed_by_bash(&path, &["dead-letters", "re"]), "replay");
            assert_eq!(completed_by_bash(&path, &["signature", "verify", "--any"]), "--any-age");
        }
    }
    refused(&["completions", "tcsh"], "invalid value 'tcsh'");
    let folder = Folder::new();
    let (status, _, err) = run(&["man", "--dir", folder.0.to_str().unwrap()], b"");
    assert_eq!(status, 0, "{err}");
    for page in ["man1/couch-hookd.1", "man1/couch-hookd-explain.1", "man5/hookd.ini.5"] {
        assert!(folder.0.join(page).exists(), "{page}");
    }
    let (status, out, _) = run(&["man"], b"");
    assert!(status == 0 && out.contains(".TH couch-hookd 1"), "{out}");
    let (status, _, err) = run(&["man", "--dir", "/dev/null"], b"");
    assert!(status == 1 && err.contains("`/dev/null/man1/couch-hookd.1`: failed to write"), "{err}");
}
