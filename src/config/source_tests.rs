//! Files, flags, environment and CouchDB's sections, merged: which value counts, and what is said about the rest.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use expect_test::{Expect, expect};

use crate::config::finding::{Origin, Raw};
use crate::config::parse;
use crate::config::source::{Overrides, Sources, from_sections, load_or};

/// No finding may hold this.
const CANARY: &str = "c4n4ry";

/// A directory of its own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("couch-hookd-{test}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }

    /// Reads `config` (names in this directory) with `--set` and environment texts `NAME=VALUE`.
    fn load(&self, config: &[&str], set: &[&str], environment: &[&str]) -> Raw {
        let pair =
            |text: &&str| text.split_once('=').map(|(name, value)| (name.to_owned(), self.fill(value)));
        let overrides = Overrides {
            set: set.iter().map(|text| self.fill(text)).collect(),
            environment: environment.iter().filter_map(pair).collect(),
        };
        let config = config.iter().map(|name| self.0.join(name)).collect();
        load_or(&Sources { config, overrides }, &self.0.join("default.ini"))
    }

    fn fill(&self, text: &str) -> String {
        text.replace("DIR", self.0.to_str().unwrap())
    }

    /// Findings, then values with their origins; the directory shown as `DIR`.
    fn show(&self, raw: &Raw) -> String {
        show(raw).replace(self.0.to_str().unwrap(), "DIR")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn show(raw: &Raw) -> String {
    let mut text = String::new();
    for finding in &raw.findings {
        let line = finding.to_string();
        assert!(!line.contains('\n') && !line.contains(CANARY), "{line}");
        let kind = match (&finding.webhook, finding.is_error()) {
            (Some(webhook), true) => format!("holds back {webhook}"),
            (None, true) => "stops all".to_owned(),
            (_, false) => "warning".to_owned(),
        };
        text.push_str(&format!("{kind}: {line}\n"));
    }
    for (section, values) in &raw.sections {
        for (key, value) in values {
            text.push_str(&format!("[{section}] {key} = {:?} ({})\n", value.text.expose(), value.origin));
        }
    }
    text
}

fn check(directory: &Directory, raw: &Raw, expected: Expect) {
    expected.assert_eq(&directory.show(raw));
}

#[test]
fn flag_beats_environment_beats_later_file_beats_earlier() {
    let directory = Directory::new("order");
    directory.write(
        "d/10-a.ini",
        "[hookd]\nstate_db = a\nlog_level = debug\nfeed_rotate = 1s\nfeed_timeout = 1s\n",
    );
    directory.write("d/20-b.ini", "[hookd]\nlog_level = info\nfeed_rotate = 2s\nfeed_timeout = 2s\n");
    directory.write("d/ignored.txt", "[hookd]\nlog_level = error\n");
    let raw = directory.load(
        &["d"],
        &[
            "hookd.feed_timeout=4s",
            "hookd.webhook.header.timeout = 5s",
            "hookd.webhook.orders.header.x.y=a=b",
        ],
        &["COUCH_HOOKD_FEED_ROTATE=3s", "COUCH_HOOKD_FEED_TIMEOUT=3s", "COUCH_HOOKD_LOG_FORMAT="],
    );
    check(
        &directory,
        &raw,
        expect![[r#"
        [hookd] feed_rotate = "3s" (environment `COUCH_HOOKD_FEED_ROTATE`)
        [hookd] feed_timeout = "4s" (--set)
        [hookd] log_level = "info" (DIR/d/20-b.ini:2)
        [hookd] state_db = "a" (DIR/d/10-a.ini:2)
        [hookd.webhook.header] timeout = "5s" (--set)
        [hookd.webhook.orders] header.x.y = "a=b" (--set)
    "#]],
    );
}

#[test]
fn couchdbs_own_local_ini_will_do() {
    let directory = Directory::new("local-ini");
    let text = "[couchdb]\nuuid = x\n[admins]\nadmin = c4n4ry\n[a] ; comment\n broken\n[chttpd]\nport = 15984\n\
                bind_address = 0.0.0.0\n[os_daemons]\nhookd = x ; y\n[hookd.webhooks]\norders = https://h\n";
    directory.write("local.ini", text);
    let raw = directory.load(&["local.ini"], &[], &[]);
    check(
        &directory,
        &raw,
        expect![[r#"
        [chttpd] bind_address = "0.0.0.0" (DIR/local.ini:9)
        [chttpd] port = "15984" (DIR/local.ini:8)
        [hookd.webhooks] orders = "https://h" (DIR/local.ini:13)
    "#]],
    );
    assert_eq!(parse(&raw).0.config.unwrap().hookd.couchdb_url, "http://127.0.0.1:15984");
}

#[test]
fn couchdb_variables_count_when_nothing_else_is_given() {
    let directory = Directory::new("fallbacks");
    let all = ["COUCHDB_URL=https://c", "COUCHDB_USER=u", "COUCHDB_PASSWORD=p"];
    let check = |ini: &str, environment: &[&str], expected: &str| {
        directory.write("x.ini", ini);
        let raw = directory.load(&["x.ini"], &[], environment);
        let hookd = parse(&raw).0.config.unwrap().hookd;
        let login = hookd
            .username
            .zip(hookd.password)
            .map(|(name, password)| format!("{name}:{}", password.expose()));
        assert_eq!(format!("{} {}", hookd.couchdb_url, login.unwrap_or_default()), expected, "{ini}");
    };
    check("", &[], "http://127.0.0.1:5984 ");
    check("", &all, "https://c u:p");
    check("[chttpd]\nport = 1\n", &all, "https://c u:p");
    check("[hookd]\ncouchdb_url = https://i\n", &all, "https://i u:p");
    check("[hookd]\ncouchdb_url = https://a:b@i\n", &all, "https://i a:b");
    check("[hookd]\nusername = a\npassword = b\n", &all, "https://c a:b");
    check("", &["COUCHDB_URL=https://a:b@c", "COUCHDB_USER=u", "COUCHDB_PASSWORD=p"], "https://c a:b");
    check("", &["COUCH_HOOKD_COUCHDB_URL=https://d", "COUCHDB_URL=https://c"], "https://d ");
}

#[test]
fn values_come_from_files() {
    let directory = Directory::new("files");
    directory.write("password", "c4n4ry \n");
    directory.write("credentials/orders", "whsec_x\r\n");
    directory.write("sub/orders", "whsec_beside\n");
    directory.write("sub/url", "https://h/c4n4ry\n");
    directory.write("ca.pem", "x");
    let ini = directory.fill(
        "[hookd]\nusername = u\npassword_file = DIR/password\n[hookd.webhooks]\norders_file = url\n\
         log_file = https://named.log_file\n[hookd.webhook.orders]\nsecret_file = orders\nca_file = ../ca.pem\n\
         header.x-token_file = DIR/password\n",
    );
    directory.write("sub/x.ini", ini);
    let raw = directory.load(&["sub/x.ini"], &[], &["CREDENTIALS_DIRECTORY=DIR/credentials"]);
    check(
        &directory,
        &raw,
        expect![[r#"
        [hookd] password = "c4n4ry " (DIR/sub/x.ini:3)
        [hookd] username = "u" (DIR/sub/x.ini:2)
        [hookd.webhook.orders] ca_file = "DIR/credentials/../ca.pem" (DIR/sub/x.ini:9)
        [hookd.webhook.orders] header.x-token = "c4n4ry " (DIR/sub/x.ini:10)
        [hookd.webhook.orders] secret = "whsec_x" (DIR/sub/x.ini:8)
        [hookd.webhooks] log_file = "https://named.log_file" (DIR/sub/x.ini:6)
        [hookd.webhooks] orders = "https://h/c4n4ry" (DIR/sub/x.ini:5)
    "#]],
    );
    let raw = directory.load(&["sub/x.ini"], &["hookd.password=p"], &["CREDENTIALS_DIRECTORY=DIR/none"]);
    let text = |section: &str, key: &str| raw.value(section, key).unwrap().text.expose().to_owned();
    assert_eq!(text("hookd", "password"), "p", "a flag takes the place of a file's `password_file`");
    assert_eq!(text("hookd.webhook.orders", "secret"), "whsec_beside");
    let raw = directory.load(&[], &["hookd.password=p"], &["COUCH_HOOKD_PASSWORD_FILE=DIR/password"]);
    assert_eq!(raw.value("hookd", "password").unwrap().text.expose(), "p");
    let raw = directory.load(&[], &["hookd.password_file=DIR/password"], &["COUCH_HOOKD_PASSWORD=p"]);
    assert_eq!(raw.value("hookd", "password").unwrap().text.expose(), "c4n4ry ");
}

#[test]
fn files_that_will_not_do_hold_back_who_needs_them() {
    let directory = Directory::new("bad-files");
    directory.write("empty", "\n");
    directory.write("latin1", b"\xe4");
    directory.write("fine", "c4n4ry");
    let open = directory.write("open", "c4n4ry");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).unwrap();
    directory.write("long", vec![b'x'; (1 << 20) + 1]);
    let mut ini = String::from("[hookd.webhooks]\nz_file = none\n");
    for (name, line) in [
        ("a", "secret_file = none"),
        ("b", "secret_file = empty"),
        ("c", "selector_file = latin1"),
        ("d", "secret_file = open"),
        ("e", "db_file = open"),
        ("f", "secret = c4n4ry\nsecret_file = fine"),
        ("g", "header.x_file = long"),
        ("h", "ca_file = none"),
        ("i", "secret_file = ."),
        ("j", "banana_file = fine"),
    ] {
        ini.push_str(&format!("[hookd.webhook.{name}]\n{line}\n"));
    }
    directory.write("x.ini", ini);
    let raw = directory.load(&["x.ini"], &["hookd.webhook.k.secret_file=fine"], &[]);
    check(
        &directory,
        &Raw { sections: BTreeMap::new(), findings: raw.findings.clone() },
        expect![[r#"
        holds back f: DIR/x.ini:15: [hookd.webhook.f] secret_file: expected either `secret` or `secret_file`, got both
        holds back a: DIR/x.ini:4: [hookd.webhook.a] secret_file: failed to read `DIR/none`: No such file or directory (os error 2)
        holds back b: DIR/x.ini:6: [hookd.webhook.b] secret_file: expected a value in `DIR/empty`, got an empty file
        holds back c: DIR/x.ini:8: [hookd.webhook.c] selector_file: expected UTF-8 in `DIR/latin1`, got other bytes
        warning: DIR/x.ini:10: [hookd.webhook.d] secret_file: others may read `DIR/open` (mode 644); `chmod o= DIR/open`
        holds back g: DIR/x.ini:17: [hookd.webhook.g] header.x_file: expected at most 1MiB in `DIR/long`, got more
        holds back h: DIR/x.ini:19: [hookd.webhook.h] ca_file: failed to read `DIR/none`: No such file or directory (os error 2)
        holds back i: DIR/x.ini:21: [hookd.webhook.i] secret_file: expected a file at `DIR/.`, got something else
        holds back k: --set: [hookd.webhook.k] secret_file: expected an absolute path, or one in $CREDENTIALS_DIRECTORY, got `fine`
        holds back z: DIR/x.ini:2: [hookd.webhooks] z_file: failed to read `DIR/none`: No such file or directory (os error 2)
    "#]],
    );
    assert!(raw.sections.values().all(|values| !values.contains_key("secret_file")));
}

#[test]
fn files_that_cannot_be_read_are_said() {
    let directory = Directory::new("unreadable");
    directory
        .write("latin1.ini", b"[hookd.webhooks]\norders = https://h\n[hookd.webhook.orders]\ndb = \xe4\n");
    fs::create_dir(directory.0.join("empty")).unwrap();
    let check = |config: &[&str], set: &[&str], environment: &[&str], expected| {
        check(&directory, &directory.load(config, set, environment), expected);
    };
    check(
        &[],
        &[],
        &[],
        expect![[r#"
            stops all: DIR/default.ini: there is no such file: expected it, or `--config`, `--set`, or COUCH_HOOKD_ variables
        "#]],
    );
    check(
        &[],
        &["hookd.username=u"],
        &[],
        expect![[r#"
        [hookd] username = "u" (--set)
    "#]],
    );
    check(
        &[],
        &[],
        &["COUCH_HOOKD_USERNAME=u"],
        expect![[r#"
        [hookd] username = "u" (environment `COUCH_HOOKD_USERNAME`)
    "#]],
    );
    check(
        &["none.ini"],
        &["hookd.username=u"],
        &[],
        expect![[r#"
            stops all: configuration: failed to read `DIR/none.ini`: No such file or directory (os error 2)
            [hookd] username = "u" (--set)
        "#]],
    );
    check(
        &["empty"],
        &[],
        &[],
        expect![[r#"
        stops all: DIR/empty: expected files *.ini in this directory, got none
    "#]],
    );
    check(
        &["latin1.ini"],
        &[],
        &[],
        expect![[r#"
        holds back orders: DIR/latin1.ini:4: [hookd.webhook.orders]: expected UTF-8, got other bytes; the line is ignored
        [hookd.webhooks] orders = "https://h" (DIR/latin1.ini:2)
    "#]],
    );
}

#[test]
fn malformed_lines_stop_whom_they_may_concern() {
    let directory = Directory::new("malformed");
    let text = "[hookd.webhooks]\norders https://c4n4ry\nsync = https://h\n[hookd.webhook.sync]\n\
                selector {\"c4n4ry\":1}\ntimeout = 5s\n[hookd.webhook.x\nsince = 0\n";
    directory.write("x.ini", text);
    check(
        &directory,
        &directory.load(&["x.ini"], &[], &[]),
        expect![[r#"
        holds back orders: DIR/x.ini:2: [hookd.webhooks]: expected `key = value`, got a line without `=`; comments begin with `;`
        holds back sync: DIR/x.ini:5: [hookd.webhook.sync]: expected `key = value`, got a line without `=`; comments begin with `;`
        stops all: DIR/x.ini:7: [hookd.webhook.sync]: expected `[section]` alone on its line, got a line that only begins like one; it is ignored, and the keys below it count for the section above it
        [hookd.webhook.sync] since = "0" (DIR/x.ini:8)
        [hookd.webhook.sync] timeout = "5s" (DIR/x.ini:6)
        [hookd.webhooks] sync = "https://h" (DIR/x.ini:3)
    "#]],
    );
    assert_eq!(parse(&directory.load(&["x.ini"], &[], &[])).0.config, None);
    let text = "[hookd.webhooks]\norders https://c4n4ry\nsync = https://h\na = https://h\n[hookd.webhook.sync]\nselector {}\n";
    directory.write("x.ini", text);
    let (parsed, _) = parse(&directory.load(&["x.ini"], &[], &[]));
    let running: Vec<String> =
        parsed.config.unwrap().webhooks.into_iter().map(|webhook| webhook.name).collect();
    assert_eq!((running, parsed.held_back.len()), (vec!["a".to_owned()], 2), "`orders` and `sync` wait");
    directory.write(
        "x.ini",
        "[hookd.webhooks]\nx = https://h\n[hookd.webhook.x] ; y\nselector = {\"a\": \"b = c ;d\"}\n",
    );
    check(
        &directory,
        &directory.load(&["x.ini"], &[], &[]),
        expect![[r#"
        warning: DIR/x.ini:3: [hookd.webhook.x]: before 3.3 a comment, a tab or an empty name makes CouchDB ignore this section header, and its keys count for the section above; write `[section]` alone on its line
        warning: DIR/x.ini:4: [hookd.webhook.x]: in a file everything from a blank and `;` on is a comment, over HTTP it belongs to the value until CouchDB restarts; put comments on a line of their own, and inside JSON write \u003b for `;`
        [hookd.webhook.x] selector = "{\"a\": \"b = c" (DIR/x.ini:4)
        [hookd.webhooks] x = "https://h" (DIR/x.ini:2)
    "#]],
    );
}

#[test]
fn wrong_flags_and_variables_are_said() {
    let directory = Directory::new("flags");
    let raw = directory.load(
        &[],
        &[
            "c4n4ry",
            "=c4n4ry",
            "timeout=c4n4ry",
            "hookd.=c4n4ry",
            "couchdb.x=c4n4ry",
            "hookd.webhook.a=c4n4ry",
            "hookd.username=",
        ],
        &[
            "COUCH_HOOKD_PASWORD=c4n4ry",
            "COUCH_HOOKD_SERVICE_HOST=c4n4ry",
            "COUCH_HOOKD=c4n4ry",
            "HOME=c4n4ry",
        ],
    );
    check(
        &directory,
        &raw,
        expect![[r#"
        warning: environment `COUCH_HOOKD_PASWORD`: is no key of [hookd] and not used; the nearest one is `COUCH_HOOKD_PASSWORD`
        warning: environment `COUCH_HOOKD_SERVICE_HOST`: is no key of [hookd] and not used
        stops all: --set: expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`, got a text without `=`
        stops all: --set: expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`, got `` in front of `=`
        stops all: --set: expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`, got `timeout` in front of `=`
        stops all: --set: expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`, got `hookd.` in front of `=`
        stops all: --set: [couchdb] x: expected section `hookd`, `hookd.webhooks` or `hookd.webhook.NAME`
        stops all: --set: expected `SECTION.KEY=VALUE` such as `hookd.webhook.orders.timeout=5s`, got `hookd.webhook.a` in front of `=`
        stops all: --set: [hookd] username: expected a value, got none
    "#]],
    );
}

#[test]
fn sections_come_from_couchdb() {
    let json = r#"{"admins":{"a":"c4n4ry"},"chttpd":{"port":"5984"},"hookd":{"username ":" u ","password":"p "},
        "hookd.webhooks":{"orders":"https://h"},"hookd.webhook.orders":{"selector":"{\"a\":\"b ;c\"}","db":"","secret_file":"s"}}"#;
    let sections: BTreeMap<String, BTreeMap<String, String>> = serde_json::from_str(json).unwrap();
    let raw = from_sections(&sections, &Origin::CouchConfig, &Overrides::default());
    expect![[r#"
        warning: _config: [hookd.webhook.orders] selector: a blank and `;` in it begin a comment as soon as CouchDB restarts and reads its files; inside JSON write \u003b for `;`
        holds back orders: _config: [hookd.webhook.orders] secret_file: expected a file below $CREDENTIALS_DIRECTORY or `/etc/couch-hookd`, which is all that CouchDB's configuration may name with --from-couchdb, got `s`
        [chttpd] port = "5984" (_config)
        [hookd] password = "p" (_config)
        [hookd] username = "u" (_config)
        [hookd.webhook.orders] selector = "{\"a\":\"b ;c\"}" (_config)
        [hookd.webhooks] orders = "https://h" (_config)
    "#]].assert_eq(&show(&raw));
    let mut overrides = Overrides::default();
    overrides.environment.insert("COUCH_HOOKD_USERNAME".to_owned(), "e".to_owned());
    let raw = from_sections(&sections, &Origin::OsDaemons, &overrides);
    assert_eq!(raw.value("hookd", "username").unwrap().text.expose(), "e");
}

/// Whoever may write `_config` must not read our files: the value would be sent as a header, to a URL of his.
#[test]
fn couchdb_may_name_only_files_that_are_meant_for_us() {
    let folder = Directory::new("named");
    let other = folder.write("other", CANARY);
    folder.write("credentials/token", "inside");
    let credentials = folder.0.join("credentials");
    std::os::unix::fs::symlink(other, credentials.join("link")).unwrap();
    let mut overrides = Overrides::default();
    let directory = credentials.to_str().unwrap().to_owned();
    overrides.environment.insert("CREDENTIALS_DIRECTORY".to_owned(), directory.clone());
    let value = |path: &str| {
        let keys = BTreeMap::from([("header.x_file".to_owned(), path.to_owned())]);
        let sections = BTreeMap::from([("hookd.webhook.orders".to_owned(), keys)]);
        let raw = from_sections(&sections, &Origin::CouchConfig, &overrides);
        let value = raw.value("hookd.webhook.orders", "header.x").map(|value| value.text.expose().to_owned());
        assert_eq!(value.is_none(), raw.findings.iter().any(|finding| finding.is_error()), "{path}");
        value
    };
    assert_eq!(value("token").as_deref(), Some("inside"));
    assert_eq!(value(&format!("{directory}/token")).as_deref(), Some("inside"));
    for path in ["../other", "link", "/etc/passwd", &format!("{directory}/../other"), "nowhere"] {
        assert_eq!(value(path), None, "{path}");
    }
}

#[test]
fn overrides_do_not_show_what_they_hold() {
    let overrides = Overrides { set: vec![CANARY.to_owned()], ..Overrides::default() };
    let sources = Sources { config: vec![Path::new("x").to_owned()], overrides };
    assert!(!format!("{sources:?}").contains(CANARY));
}
