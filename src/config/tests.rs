//! What configurations mean and what is said about wrong ones, case by case.

use expect_test::{Expect, expect, expect_file};

use super::*;
use crate::config::finding::Origin;
use crate::pure::ini::{self, Dialect};

/// No finding may hold this, wherever it stands in the input.
const CANARY: &str = "c4n4ry";

/// `whsec_` and 24 zero bytes.
const SECRET: &str = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

fn raw(text: &str, dialect: Dialect) -> Raw {
    let mut raw = Raw::default();
    let (entries, _) = ini::parse(text.as_bytes(), dialect);
    for ini::Entry { section, key, value, line } in entries {
        let origin = Origin::File { path: "hookd.ini".into(), line };
        let value = Value { text: Secret::new(value), origin };
        raw.sections.entry(section).or_default().insert(key, value);
    }
    raw
}

/// Everything found, a line each, and what is left to run.
fn outcome(text: &str) -> String {
    let (parsed, findings) = parse(&raw(text, Dialect::Since3_3));
    let mut lines = String::new();
    for finding in &findings {
        let text = finding.to_string();
        assert!(!text.contains('\n') && !text.contains(CANARY), "{text}");
        lines.push_str(&format!("{}{text}\n", if finding.is_error() { "" } else { "warning: " }));
    }
    let running = parsed.config.map_or("nothing".to_owned(), |config| {
        let names: Vec<String> = config.webhooks.into_iter().map(|webhook| webhook.name).collect();
        format!("[{}]", names.join(", "))
    });
    let held_back: Vec<String> = parsed.held_back.into_iter().collect();
    lines + &format!("runs {running}, holds back [{}]", held_back.join(", "))
}

fn check(text: &str, expected: Expect) {
    expected.assert_eq(&outcome(text));
}

/// Each line in `[hookd.webhook.orders]`, and what is said about it.
fn check_keys(lines: &[&str], expected: Expect) {
    let said = lines.iter().map(|line| {
        let secret = if line.starts_with("secret") { String::new() } else { format!("secret = {SECRET}\n") };
        let outcome = outcome(&format!(
            "[hookd.webhooks]\norders = https://shop.example\n[hookd.webhook.orders]\n{line}\n{secret}"
        ));
        let (findings, running) = outcome.rsplit_once('\n').unwrap_or(("fine", &outcome));
        let fine = findings == "fine" || findings.starts_with("warning: ");
        let expected = if fine { "runs [orders], holds back []" } else { "runs [], holds back [orders]" };
        assert_eq!(running, expected, "{line}");
        format!("{line:?}\n    {}\n", findings.replace("hookd.ini:4: [hookd.webhook.orders] ", ""))
    });
    expected.assert_eq(&said.collect::<String>());
}

/// Each line in `[hookd]`, and what is said about it.
fn check_hookds(lines: &[&str], expected: Expect) {
    let said = lines.iter().map(|line| {
        let outcome = outcome(&format!(
            "[hookd]\n{line}\n[hookd.webhooks]\norders = https://h\n[hookd.webhook.orders]\nsecret = {SECRET}\n"
        ));
        let (findings, running) = outcome.rsplit_once('\n').unwrap_or(("fine", &outcome));
        let fine = findings == "fine" || findings.starts_with("warning: ");
        let expected = if fine { "runs [orders], holds back []" } else { "runs nothing, holds back []" };
        assert_eq!(running, expected, "{line}");
        format!("{line:?}\n    {}\n", findings.replace("hookd.ini:2: [hookd] ", ""))
    });
    expected.assert_eq(&said.collect::<String>());
}

fn config(text: &str) -> Config {
    parse(&raw(text, Dialect::Since3_3)).0.config.expect("a configuration without fault")
}

fn webhook(lines: &str) -> Webhook {
    let text = format!("[hookd.webhooks]\norders = https://shop.example\n[hookd.webhook.orders]\n{lines}\n");
    config(&text).webhooks.remove(0)
}

#[test]
fn defaults_are_those_of_the_table() {
    expect![[r#"
        Config {
            hookd: Hookd {
                couchdb_url: "http://127.0.0.1:5984",
                username: None,
                password: None,
                ca_file: None,
                state_db: "couch_hookd",
                log_level: Info,
                log_format: Text,
                public_url: None,
                register: false,
                checkpoint_interval: 5s,
                deliveries_max: 64,
                dead_letters_max: 10000,
                guard: Guard {
                    level: Metadata,
                    allow: [],
                    deny: [],
                    watched: Some(
                        Watched {
                            host: "127.0.0.1",
                            port: 5984,
                        },
                    ),
                },
                feed_rotate: 60s,
                feed_timeout: 60s,
                feed_connections: 16,
                sweep_interval: 60s,
                sweep_rate: 40,
            },
            webhooks: [
                Webhook {
                    name: "orders",
                    endpoint: ***,
                    watch: Changes,
                    db: [
                        "orders",
                    ],
                    patterns: None,
                    selection: None,
                    since: Now,
                    polling: Polling {
                        interval: 5s,
                        transitions: Settings {
                            confirm_polls: 2,
                            stalled_after: 600s,
                            retry_failed: None,
                        },
                    },
                    events: [
                        "document.*",
                    ],
                    filter: None,
                    include_docs: true,
                    conflicts: false,
                    conflict_docs: false,
                    design_docs: false,
                    secrets: [],
                    headers: [],
                    timeout: 15s,
                    connect_timeout: 5s,
                    concurrency: 8,
                    retry_schedule: [
                        1s,
                        5s,
                        15s,
                        30s,
                        60s,
                        120s,
                        300s,
                    ],
                    retry_after_max: 3600s,
                    give_up_after: 86400s,
                    dead_letter_after: 3,
                    dead_letter_on: [
                        400,
                        409,
                        411,
                        413,
                        414,
                        415,
                        422,
                        431,
                        501,
                    ],
                    payload_bytes_max: 1048576,
                    format: Standard,
                    rate_limit: None,
                    batching: None,
                    paused: false,
                    lease: Some(
                        Auto,
                    ),
                    guard: Guard {
                        level: Metadata,
                        allow: [],
                        deny: [],
                        watched: Some(
                            Watched {
                                host: "127.0.0.1",
                                port: 5984,
                            },
                        ),
                    },
                    ca_file: None,
                    fingerprint: "5a9604a38e61de906703fcfcfa4c289f8ba0933a776e81da4c936fe6cdf9f91c",
                },
            ],
        }
    "#]]
    .assert_debug_eq(&config("[hookd.webhooks]\norders = https://u:c4n4ry@shop.example/c4n4ry\n"));
}

#[test]
fn values_are_taken() {
    let hook = webhook(&format!(
        "db = a, b,a\nsince = 0\nevents = document.deleted\nview = d/v\ninclude_docs = off\nsecret = {SECRET}, {SECRET}\n\
         header.X-Tenant = blue\ntimeout = 500ms\nretry_schedule = 1s,2m\ndead_letter_on = off\n\
         payload_bytes_max = 64KiB\nconcurrency = 1"
    ));
    assert_eq!(hook.db, ["a", "b"]);
    assert_eq!(hook.since, Since::Beginning);
    assert_eq!(hook.events, ["document.deleted"]);
    assert_eq!(hook.filter, Some(Filter::View("d/v".into())));
    assert_eq!(hook.secrets.len(), 2);
    assert_eq!((hook.headers[0].0.as_str(), hook.headers[0].1.expose()), ("x-tenant", "blue"));
    assert_eq!(hook.timeout, Duration::from_millis(500));
    assert_eq!(hook.retry_schedule, [Duration::from_secs(1), Duration::from_secs(120)]);
    assert!(hook.dead_letter_on.is_empty() && !hook.include_docs);
    assert_eq!((hook.payload_bytes_max, hook.concurrency), (65536, 1));
}

#[test]
fn databases_are_named_found_and_left_out() {
    let hook = webhook("db = orders, tenant-*,!tenant-test, a/b, ! old-*, tenant-1, tenant-*");
    assert_eq!(hook.db, ["orders", "a/b", "tenant-1"]);
    assert_eq!(hook.databases(), "orders, a/b, tenant-1, tenant-*, !tenant-test, !old-*");
    let patterns = hook.patterns.unwrap();
    let found = ["orders", "tenant-1", "tenant-2", "tenant-test", "tenant-/_replicator", "tenant-x/y"];
    let found = found.into_iter().filter(|db| patterns.matches(db, "couch_hookd")).collect::<Vec<_>>();
    assert_eq!(found, ["tenant-2", "tenant-x/y"], "what is named is not found as well");
    let all = webhook("db = *");
    assert!(all.db.is_empty() && all.patterns.is_some());
    assert_eq!(webhook("").patterns, None);
}

#[test]
fn filters_are_taken_as_written() {
    let filter = |lines: &str| webhook(lines).filter.unwrap();
    assert_eq!(
        filter("selector = {\"b\": 1.0, \"a\":\"x\\u003b\"}"),
        Filter::Selector("{\"b\": 1.0, \"a\":\"x\\u003b\"}".into())
    );
    assert_eq!(filter("doc_ids = [\"a\",\"b\"]"), Filter::DocIds(vec!["a".into(), "b".into()]));
    let params = vec![("n".into(), "5".into()), ("type".into(), "x y".into()), ("v".into(), "[1]".into())];
    assert_eq!(
        filter("filter = _design/d/f\nfilter_params = {\"type\":\"x y\",\"n\":5,\"v\":[1]}"),
        Filter::Function { name: "d/f".into(), params }
    );
}

#[test]
fn logins_come_from_keys_or_from_the_url() {
    let login = |lines: &str| {
        let hookd = config(&format!("[hookd]\n{lines}\n")).hookd;
        let password = hookd.password.map(|password| password.expose().to_owned());
        format!("{} {:?} {:?}", hookd.couchdb_url, hookd.username, password)
    };
    assert_eq!(login(""), "http://127.0.0.1:5984 None None");
    assert_eq!(login("couchdb_url = https://a%40b:p%3A@h/x/"), "https://h/x Some(\"a@b\") Some(\"p:\")");
    assert_eq!(
        login("couchdb_url = https://a:b@h\nusername = u\npassword = p"),
        "https://h Some(\"u\") Some(\"p\")"
    );
}

#[test]
fn couchdb_is_found_from_its_own_sections() {
    let check = |text: &str, expected: Option<&str>| {
        assert_eq!(couchdb_url_from(&raw(text, Dialect::Since3_3)).as_deref(), expected, "{text}");
    };
    check("", None);
    check("[chttpd]\nrequire_valid_user = true\n[httpd]\nenable_cors = true", None);
    check(
        "[chttpd]\nport = 15984\nbind_address = 0.0.0.0\n[httpd]\nport = 5986",
        Some("http://127.0.0.1:15984"),
    );
    check("[chttpd]\nbind_address = any", Some("http://127.0.0.1:5984"));
    check("[httpd]\nport = 5985", Some("http://127.0.0.1:5985"));
    check("[httpd]\nbind_address = 10.0.0.1", Some("http://10.0.0.1:5984"));
    check("[chttpd]\nbind_address = ::\nport = 80", Some("http://[::1]:80"));
    check("[chttpd]\nbind_address = fe80::1", Some("http://[fe80::1]:5984"));
    check("[chttpd]\nbind_address = [::1]", Some("http://[::1]:5984"));
    check("[chttpd]\nport = 0", None);
    check("[chttpd]\nport = x", None);
    let text = "[chttpd]\nport = 15984\n";
    assert_eq!(config(text).hookd.couchdb_url, "http://127.0.0.1:15984");
    let text = "[chttpd]\nport = 15984\n[hookd]\ncouchdb_url = https://h";
    assert_eq!(config(text).hookd.couchdb_url, "https://h");
}

#[test]
fn faults_of_hookd_are_said() {
    check_hookds(
        &[
            "",
            "couchdb_url = couch.example",
            "couchdb_url = http://:5984/c4n4ry",
            "couchdb_url = https://a:c4n4ry@h/?x",
            "couchdb_url = https://c4n4ry@h",
            "couchdb_url = http://a:c4n4ry@couch.example",
            "username = a:b",
            "username = a",
            "password = c4n4ry",
            "pasword = c4n4ry",
            "state_db = Hookd",
            "state_db = _users",
            "log_level = trace",
            "log_format = xml",
            "public_url = https://a:c4n4ry@couch.example",
            "register = maybe",
            "checkpoint_interval = 5",
            "checkpoint_interval = 1ms",
            "deliveries_max = 1000",
            "status_listen = 127.0.0.1:1",
            "timeout = 5s",
            "# a comment = c4n4ry",
            "whsec_c4n4ry = =",
        ],
        expect![[r##"
            ""
                fine
            "couchdb_url = couch.example"
                couchdb_url: expected `http://HOST` or `https://HOST` with or without a path, got a text without `://`
            "couchdb_url = http://:5984/c4n4ry"
                couchdb_url: expected `http://HOST` or `https://HOST` with or without a path, got no host
            "couchdb_url = https://a:c4n4ry@h/?x"
                couchdb_url: expected a URL without a query, got one with `?`
            "couchdb_url = https://c4n4ry@h"
                couchdb_url: expected `NAME:PASSWORD@` in front of the host, got no password
            "couchdb_url = http://a:c4n4ry@couch.example"
                warning: couchdb_url: the login goes to http://couch.example unencrypted; write https:// where the server takes it
            "username = a:b"
                username: expected a user name without `:`, which no login can hold
            "username = a"
                username: expected `password` or `password_file` beside it, got neither
            "password = c4n4ry"
                password: expected `username` beside it, got none
            "pasword = c4n4ry"
                pasword: this key is unknown; the nearest one is `password`
            "state_db = Hookd"
                state_db: expected a database name (a lower-case letter, then lower-case letters, digits and _$()+/-), got `Hookd`
            "state_db = _users"
                state_db: expected a database of its own, got CouchDB's `_users`
            "log_level = trace"
                log_level: expected `error` or `warn` or `info` or `debug`, got `trace`
            "log_format = xml"
                log_format: expected `text` or `json`, got `xml`
            "public_url = https://a:c4n4ry@couch.example"
                public_url: expected a URL without user name and query: it stands in every event
            "register = maybe"
                register: expected `true` or `false`, got `maybe`
            "checkpoint_interval = 5"
                checkpoint_interval: expected a duration with its unit, got `5`; write `5s` or `5m`
            "checkpoint_interval = 1ms"
                checkpoint_interval: expected a duration from `200ms` to `10m`, got `1ms`
            "deliveries_max = 1000"
                deliveries_max: expected a number from 1 to 256, got `1000`
            "status_listen = 127.0.0.1:1"
                status_listen: this key is not available in this version; delete the line
            "timeout = 5s"
                timeout: this key belongs to [hookd.webhook.NAME]; CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key that is set over HTTP below the wrong section: see the file and edit it there
            "# a comment = c4n4ry"
                # a comment: this key is unknown; comments begin with `;`
            "whsec_c4n4ry = ="
                ***: this key is unknown
        "##]],
    );
}

#[test]
fn faults_of_a_webhook_are_said() {
    check_keys(
        &[
            "",
            "watch = replications",
            "watch = dogs",
            "db = tenant-*",
            "db = *",
            "db = orders, tenant-?, !tenant-test, ! old-*, tenant-1",
            "db = orders, !orders-old",
            "db = !*",
            "db = orders, *, !ord*",
            "db = _*",
            "db = Tenant-*",
            "db = tenant-[ab]*",
            "db = *, couch_hookd",
            "db = *, !couch_hookd",
            "watch = replications\ndb = */_replicator",
            "db = Orders",
            "db = ,",
            "db = couch_hookd",
            "db = _users, a/_replicator",
            "since = 12-g1AAA",
            "events = document.created",
            "events = documents.*",
            "events = replication.failed",
            "events = *.deleted, *",
            "events = document.resolved",
            "events = document.resolved\nconflicts = true",
            "conflict_docs = true",
            "conflicts = true\nconflict_docs = true\nformat = raw",
            "conflicts = true\nconflict_docs = true",
            "selector = [1]",
            "selector = {type: order}",
            "selector = {\"name\": \"a ;c4n4ry\"}",
            "selector = {}\nfilter = d/f",
            "filter = f",
            "filter = _selector",
            "filter_params = {}",
            "filter = d/f\nfilter_params = 5",
            "doc_ids = a, b",
            "doc_ids = []",
            "doc_ids = [1]",
            "include_docs = yes",
            "secret = c4n4ry",
            "secret = whsec_c4n4ry",
            "secret = whsec_c4n4ry!",
            &format!("secret = {SECRET} whsec_c4n4ry"),
            "header.content-type = c4n4ry",
            "header.webhook-id = c4n4ry",
            "header.x y = c4n4ry",
            "header.x = c4n4ryä",
            "header.x = a\nheader.X = c4n4ry",
            "header. = c4n4ry",
            "format = cloudevents",
            "timeout = 15",
            "timeout = 15 sec",
            "timeout = 0",
            "timeout = 99999999999999999999h",
            "timeout = whsec_c4n4ry",
            "retry_schedule = 5,x",
            "retry_schedule = 5s,x",
            "retry_schedule = 5s,,1m",
            "retry_schedule = 0s",
            "concurrency = 0",
            "dead_letter_on = 200",
            "dead_letter_on = 410",
            "payload_bytes_max = 1048576",
            "payload_bytes_max = 1MB",
            "payload_bytes_max = 1GiB",
            "payload_bytes_max = 99999999999999999999MiB",
            "batch_max = 5",
            "batch_max = 501",
            "batch_max = 5\nformat = slack",
            "watch = daemon",
            "watch = daemon\nevents = webhook.*, feed.lost",
            "watch = daemon\nevents = document.*",
            "watch = daemon\nselector = {}",
            "watch = daemon\nformat = raw",
            "watch = databases\ndb = tenant-*\nlease = shared",
            "watch = databases\nlease = on",
            "watch = replications\nlease = shared",
            "rate_limit = off",
            "rate_limit = 1000/h",
            "rate_limit = 10",
            "rate_limit = 0/s",
            "rate_limit = 10/d",
            "rate_limit = 10 / s",
            "format = xml",
            "url = https://c4n4ry.example",
            "selectr = {}",
            "Watch = changes",
            "include-docs = true",
            "secrte_file = c4n4ry",
            "banana = c4n4ry",
            "username = c4n4ry",
        ],
        expect![[r#"
            ""
                fine
            "watch = replications"
                fine
            "watch = dogs"
                watch: expected `changes` or `databases` or `replications` or `daemon`, got `dogs`
            "db = tenant-*"
                fine
            "db = *"
                fine
            "db = orders, tenant-?, !tenant-test, ! old-*, tenant-1"
                fine
            "db = orders, !orders-old"
                db: `!orders-old` leaves out what a pattern such as `tenant-*` would find: expected one beside it, got none
            "db = !*"
                db: `!*` leaves out what a pattern such as `tenant-*` would find: expected one beside it, got none
            "db = orders, *, !ord*"
                db: `orders` is named, and left out by a `!`; delete one of the two
            "db = _*"
                db: a pattern never matches a database whose name begins with `_`, got `_*`; name it singly
            "db = Tenant-*"
                db: expected a pattern of lower-case letters, digits, _$()+/- with `*` for any text and `?` for one character, got `Tenant-*`
            "db = tenant-[ab]*"
                db: expected a pattern of lower-case letters, digits, _$()+/- with `*` for any text and `?` for one character, got `tenant-[ab]*`
            "db = *, couch_hookd"
                db: `couch_hookd` is [hookd] state_db, which cannot be watched
            "db = *, !couch_hookd"
                fine
            "watch = replications\ndb = */_replicator"
                hookd.ini:5: [hookd.webhook.orders] db: expected a database by its name, got a pattern, `*/_replicator`
            "db = Orders"
                db: expected a database name (a lower-case letter, then lower-case letters, digits and _$()+/-), got `Orders`
            "db = ,"
                db: expected databases, separated by commas, got none
            "db = couch_hookd"
                db: `couch_hookd` is [hookd] state_db, which cannot be watched
            "db = _users, a/_replicator"
                fine
            "since = 12-g1AAA"
                since: expected `now` or `0`, got `12-g1AAA`; a sequence is for `couch-hookd seek`
            "events = document.created"
                events: there is no `document.created`: CouchDB cannot know whether a document is new; write `document.updated`
            "events = documents.*"
                events: expected `document.updated`, `document.deleted`, `document.conflicted`, `document.resolved` or a pattern such as `document.*`, got `documents.*`
            "events = replication.failed"
                events: expected `document.updated`, `document.deleted`, `document.conflicted`, `document.resolved` or a pattern such as `document.*`, got `replication.failed`
            "events = *.deleted, *"
                fine
            "events = document.resolved"
                events: `document.resolved` is told only with `conflicts = true`; write that line, too
            "events = document.resolved\nconflicts = true"
                fine
            "conflict_docs = true"
                conflict_docs: has a meaning only with `conflicts = true`; write that line, too, or delete this one
            "conflicts = true\nconflict_docs = true\nformat = raw"
                hookd.ini:5: [hookd.webhook.orders] conflict_docs: a request with `format = raw` or `format = slack` holds no leaves; choose another format, or delete this line
            "conflicts = true\nconflict_docs = true"
                fine
            "selector = [1]"
                selector: expected a JSON object such as `{"type": "order"}`, got an array
            "selector = {type: order}"
                selector: expected a JSON object such as `{"type": "order"}`, got a text that is no JSON at character 2
            "selector = {\"name\": \"a ;c4n4ry\"}"
                selector: expected a JSON object such as `{"type": "order"}`, got one that ends in the middle; where it holds ` ;`, that begins a comment: write \u003b for the semicolon
            "selector = {}\nfilter = d/f"
                hookd.ini:5: [hookd.webhook.orders] filter: expected one kind of filter, got `selector` and `filter`; delete one of them
            "filter = f"
                filter: expected `DESIGN_DOCUMENT/NAME`, got `f`
            "filter = _selector"
                filter: expected `DESIGN_DOCUMENT/NAME`, got `_selector`; for a built-in filter write `selector`, `doc_ids` or `view`
            "filter_params = {}"
                filter_params: expected `filter` beside it, got none
            "filter = d/f\nfilter_params = 5"
                hookd.ini:5: [hookd.webhook.orders] filter_params: expected a JSON object such as `{"type": "order"}`, got a number
            "doc_ids = a, b"
                doc_ids: expected a JSON array of strings such as `["a", "b"]`, got a text that is no JSON at character 1
            "doc_ids = []"
                doc_ids: expected a JSON array of strings such as `["a", "b"]`, got an empty one, which no document passes
            "doc_ids = [1]"
                doc_ids: expected a JSON array of strings such as `["a", "b"]`, got a number in it
            "include_docs = yes"
                include_docs: expected `true` or `false`, got `yes`
            "secret = c4n4ry"
                secret: expected `whsec_` and base64 of 24 to 64 bytes, got something without `whsec_`; `couch-hookd secret` prints a new one
            "secret = whsec_c4n4ry"
                secret: expected base64 after `whsec_`, got 6 characters that are not; `couch-hookd secret` prints a new one
            "secret = whsec_c4n4ry!"
                secret: expected base64 after `whsec_`, got 7 characters that are not; `couch-hookd secret` prints a new one
            "secret = whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA whsec_c4n4ry"
                secret: secret 2 of 2: expected base64 after `whsec_`, got 6 characters that are not; `couch-hookd secret` prints a new one
            "header.content-type = c4n4ry"
                header.content-type: the header `content-type` is set by couch-hookd itself
            "header.webhook-id = c4n4ry"
                header.webhook-id: the header `webhook-id` is set by couch-hookd itself
            "header.x y = c4n4ry"
                header.x y: expected a header name of letters, digits and `-` after `header.`
            "header.x = c4n4ryä"
                header.x: expected visible ASCII characters and blanks, got others
            "header.x = a\nheader.X = c4n4ry"
                header.x: the header `x` is set twice
            "header. = c4n4ry"
                header.: this key is unknown; the nearest one is `header.*`
            "format = cloudevents"
                fine
            "timeout = 15"
                timeout: expected a duration with its unit, got `15`; write `15s`
            "timeout = 15 sec"
                timeout: expected a duration such as `500ms`, `5s`, `2m` or `1h`, got `15 sec`
            "timeout = 0"
                timeout: expected a duration with its unit, from `100ms` to `10m`, got `0`
            "timeout = 99999999999999999999h"
                timeout: expected a duration such as `500ms`, `5s`, `2m` or `1h`, got `99999999999999999999h`
            "timeout = whsec_c4n4ry"
                timeout: expected a duration such as `500ms`, `5s`, `2m` or `1h`, got `***`
            "retry_schedule = 5,x"
                retry_schedule: expected durations such as `5s` or `2m`, separated by commas, got `5`; write `5s` or `5m`
            "retry_schedule = 5s,x"
                retry_schedule: expected durations such as `5s` or `2m`, separated by commas, each from `100ms` to `24h`, got `x`
            "retry_schedule = 5s,,1m"
                retry_schedule: expected durations such as `5s` or `2m`, separated by commas, got nothing between two commas
            "retry_schedule = 0s"
                retry_schedule: expected durations such as `5s` or `2m`, separated by commas, each from `100ms` to `24h`, got `0s`
            "concurrency = 0"
                concurrency: expected a number from 1 to 256, got `0`
            "dead_letter_on = 200"
                dead_letter_on: expected statuses from 400 to 599, separated by commas, or `off`, got `200`
            "dead_letter_on = 410"
                dead_letter_on: 410 always pauses the webhook; leave it out
            "payload_bytes_max = 1048576"
                payload_bytes_max: expected a size such as `64KiB` or `1MiB`, got `1048576`; write `1MiB`
            "payload_bytes_max = 1MB"
                payload_bytes_max: expected a size such as `64KiB` or `1MiB`, got `1MB`; write `1MiB`
            "payload_bytes_max = 1GiB"
                payload_bytes_max: expected a size such as `64KiB` or `1MiB`, got `1GiB`
            "payload_bytes_max = 99999999999999999999MiB"
                payload_bytes_max: expected a size from `1KiB` to `16MiB`, got `99999999999999999999MiB`
            "batch_max = 5"
                fine
            "batch_max = 501"
                batch_max: expected a number from 1 to 500, got `501`
            "batch_max = 5\nformat = slack"
                batch_max: a request with `format = slack` holds one event: expected `batch_max = 1`, or `format = standard` or `format = cloudevents`, got `batch_max = 5`
            "watch = daemon"
                fine
            "watch = daemon\nevents = webhook.*, feed.lost"
                fine
            "watch = daemon\nevents = document.*"
                hookd.ini:5: [hookd.webhook.orders] events: expected types such as `webhook.failing`, `feed.lost`, `daemon.started` or a pattern such as `webhook.*`, got `document.*`
            "watch = daemon\nselector = {}"
                hookd.ini:5: [hookd.webhook.orders] selector: has no meaning with `watch = daemon`; delete the line
            "watch = daemon\nformat = raw"
                hookd.ini:5: [hookd.webhook.orders] format: expected another format, got `raw`: with `watch = daemon` there is no change line to send
            "watch = databases\ndb = tenant-*\nlease = shared"
                warning: hookd.ini:6: [hookd.webhook.orders] lease: `shared` divides changes of documents; with `watch = databases` there is nothing to divide, so one daemon tells, as with `on`: write that
            "watch = databases\nlease = on"
                fine
            "watch = replications\nlease = shared"
                hookd.ini:5: [hookd.webhook.orders] lease: `shared` divides databases that are found by pattern, and this webhook has none; choose `auto`
            "rate_limit = off"
                fine
            "rate_limit = 1000/h"
                fine
            "rate_limit = 10"
                rate_limit: expected `off` or a rate such as `10/s`, `100/m` or `1000/h`, got `10`; write `10/s` or `10/m`
            "rate_limit = 0/s"
                rate_limit: expected a rate from 1 to 1000000, got `0/s`
            "rate_limit = 10/d"
                rate_limit: expected `off` or a rate such as `10/s`, `100/m` or `1000/h`, got `10/d`
            "rate_limit = 10 / s"
                rate_limit: expected `off` or a rate such as `10/s`, `100/m` or `1000/h`, got `10 / s`
            "format = xml"
                format: expected `standard` or `cloudevents` or `raw` or `slack` or `couchdb_doc`, got `xml`
            "url = https://c4n4ry.example"
                url: this key is unknown; put `orders = URL` under [hookd.webhooks]
            "selectr = {}"
                selectr: this key is unknown; the nearest one is `selector`
            "Watch = changes"
                Watch: this key is unknown; the nearest one is `watch`
            "include-docs = true"
                include-docs: this key is unknown; the nearest one is `include_docs`
            "secrte_file = c4n4ry"
                secrte_file: this key is unknown; the nearest one is `secret_file`
            "banana = c4n4ry"
                banana: this key is unknown
            "username = c4n4ry"
                username: this key belongs to [hookd]; CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key that is set over HTTP below the wrong section: see the file and edit it there
        "#]],
    );
}

#[test]
fn every_fault_is_said_and_holds_back_its_own_webhook_alone() {
    check(
        "[hookd.webhooks]\na = https://a.example/c4n4ry\nb = b.example/c4n4ry\nc = http://c.example/c4n4ry\n\
         Big = https://d.example\n[hookd.webhook.a]\ntimeout = 1\nbanana = 2\n",
        expect![[r#"
            hookd.ini:5: [hookd.webhooks] Big: expected a name of up to 40 lower-case letters, digits, `-` and `_` that begins with a letter or digit
            hookd.ini:8: [hookd.webhook.a] banana: this key is unknown
            warning: [hookd.webhook.a] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            hookd.ini:7: [hookd.webhook.a] timeout: expected a duration with its unit, got `1`; write `1s` or `1m`
            hookd.ini:3: [hookd.webhooks] b: expected `http://HOST` or `https://HOST` with or without a path, got a text without `://`
            warning: [hookd.webhook.b] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            warning: hookd.ini:4: [hookd.webhooks] c: payloads go to http://c.example #f9262d unencrypted; write https:// where the endpoint takes it
            warning: [hookd.webhook.c] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            runs [c], holds back [Big, a, b]"#]],
    );
    check(
        "",
        expect![[r#"
        warning: [hookd.webhooks]: lists no webhook: expected lines such as `orders = https://shop.example/hooks/orders`
        runs [], holds back []"#]],
    );
    check(
        "[hookd]\nbanana = 1\n[hookd.webhooks]\na = https://a.example\n",
        expect![[r#"
        hookd.ini:2: [hookd] banana: this key is unknown
        warning: [hookd.webhook.a] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        runs nothing, holds back []"#]],
    );
}

#[test]
fn sections_of_no_listed_webhook_are_said() {
    let listed = "[hookd.webhooks]\norders = https://h\nsync = https://h\n";
    let check = |text: &str, expected| check(&format!("{listed}{text}"), expected);
    check(
        "[hookd.webhook.order]\nselector = {}\n",
        expect![[r#"
            warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            hookd.ini:5: [hookd.webhook.order]: belongs to no listed webhook; the nearest section is [hookd.webhook.orders], and `orders` is held back: without its section it might tell everything
            runs [sync], holds back [orders]"#]],
    );
    check(
        "[hookd.webhook.orders ]\nselector = {}\n",
        expect![[r#"
            warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            hookd.ini:5: [hookd.webhook.orders ]: belongs to no listed webhook; the nearest section is [hookd.webhook.orders], and `orders` is held back: without its section it might tell everything
            runs [sync], holds back [orders]"#]],
    );
    check(
        "[hookd.webhok.orders]\nselector = {}\n",
        expect![[r#"
            warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            hookd.ini:5: [hookd.webhok.orders]: belongs to no listed webhook; the nearest section is [hookd.webhook.orders], and `orders` is held back: without its section it might tell everything
            runs [sync], holds back [orders]"#]],
    );
    check(
        "[Hookd.Webhook.Orders]\nselector = {}\n",
        expect![[r#"
            warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            hookd.ini:5: [Hookd.Webhook.Orders]: belongs to no listed webhook; the nearest section is [hookd.webhook.orders], and `orders` is held back: without its section it might tell everything
            runs [sync], holds back [orders]"#]],
    );
    check(
        "[hookd.webhook.old]\nselector = {}\n",
        expect![[r#"
        warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        warning: hookd.ini:5: [hookd.webhook.old]: belongs to no webhook that [hookd.webhooks] lists; it is not used
        runs [orders, sync], holds back []"#]],
    );
    check(
        "[hookd.webhook]\nsync2 = https://h\n",
        expect![[r#"
        warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        hookd.ini:5: [hookd.webhook]: is unknown; the nearest section is [hookd.webhooks]
        runs nothing, holds back []"#]],
    );
    check(
        "[hookds]\nusername = c4n4ry\n",
        expect![[r#"
        warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        hookd.ini:5: [hookds]: is unknown; the nearest section is [hookd]
        runs nothing, holds back []"#]],
    );
    check(
        "[couchdb]\nuuid = x\n",
        expect![[r#"
        warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        warning: [hookd.webhook.sync] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
        runs [orders, sync], holds back []"#]],
    );
}

/// Before 3.3 CouchDB ignores a header with a comment behind it: the keys below it arrive as webhooks, and
/// `orders` would run without its selector.
#[test]
fn a_header_that_couchdb_ignored_stops_everything() {
    let text = "[hookd.webhooks]\norders = https://h\n[hookd.webhook.orders] ; mine\nselector = {\"a\":\"c4n4ry\"}\n";
    let (parsed, findings) = parse(&raw(text, Dialect::Before3_3));
    assert_eq!(parsed.config, None);
    expect!["hookd.ini:4: [hookd.webhooks] selector: this is a key of [hookd.webhook.NAME], not a webhook; CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key that is set over HTTP below the wrong section: see the file and edit it there"].assert_eq(&findings[0].to_string());
}

/// CouchDB 1.x writes a key set over HTTP below the last section whose name has dots.
#[test]
fn a_key_that_couchdb_1_wrote_below_the_list_stops_everything() {
    check(
        "[hookd.webhooks]\norders = https://h\nstate_db = c4n4ry\n[hookd.webhook.orders]\nlog_level = debug\n",
        expect![[r#"
            hookd.ini:3: [hookd.webhooks] state_db: this is a key of [hookd], not a webhook; CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key that is set over HTTP below the wrong section: see the file and edit it there
            hookd.ini:5: [hookd.webhook.orders] log_level: this key belongs to [hookd]; CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key that is set over HTTP below the wrong section: see the file and edit it there
            warning: [hookd.webhook.orders] secret: there is none: receivers cannot tell our requests from forged ones; `couch-hookd secret` prints a new one
            runs nothing, holds back [orders]"#]],
    );
}

#[test]
fn a_fingerprint_tells_changes_from_rearrangements() {
    let of = |lines: &str| webhook(lines).fingerprint;
    assert_eq!(of("timeout = 5s\nsince = 0").len(), 64);
    assert_eq!(of("timeout = 5s\nsince = 0"), of("; comment\nsince=0\n\ntimeout =  5s"));
    assert_ne!(of("timeout = 5s"), of("timeout = 6s"));
    assert_ne!(of("timeout = 5s"), of("connect_timeout = 5s"));
    assert_ne!(of("header.a = bc"), of("header.ab = c"));
    let hook =
        |url: &str| config(&format!("[hookd.webhooks]\norders = {url}\n")).webhooks.remove(0).fingerprint;
    assert_ne!(hook("https://h/a"), hook("https://h/b"));
}

#[test]
fn sections_to_ask_for_follow_the_list() {
    let sections = webhook_sections(["orders", "slack_file", "Bad Name", "x "]);
    let sections: Vec<&str> = sections.iter().map(String::as_str).collect();
    assert_eq!(
        sections,
        ["hookd.webhook.orders", "hookd.webhook.slack", "hookd.webhook.slack_file", "hookd.webhook.x"]
    );
}

#[test]
fn a_log_file_is_found_whatever_else_is_wrong_and_never_believed_of_couchdb() {
    let check = |lines: &str, expected: Option<&str>, said: &str| {
        let raw = raw(&format!("[hookd]\n{lines}\n"), Dialect::Since3_3);
        let (parsed, findings) = parse(&raw);
        assert_eq!(log_file(&raw).as_deref(), expected.map(std::path::Path::new), "{lines}");
        let about = findings.iter().filter(|finding| finding.place.contains("log_file"));
        assert_eq!(about.map(ToString::to_string).collect::<Vec<_>>().join("\n"), said, "{lines}");
        parsed.config.is_some()
    };
    assert!(check("log_file = /var/log/x.log", Some("/var/log/x.log"), ""));
    assert!(!check("log_file = /var/log/x.log\nlog_level = loud", Some("/var/log/x.log"), ""));
    let relative =
        "hookd.ini:2: [hookd] log_file: expected an absolute path, got `x.log`; log lines go to stderr";
    assert!(check("log_file = x.log", None, relative), "no reason to deliver nothing");
    let sections = [("hookd".to_owned(), [("log_file".to_owned(), "/etc/passwd".to_owned())].into())].into();
    let raw = source::from_sections(&sections, &Origin::CouchConfig, &source::Overrides::default());
    assert_eq!(log_file(&raw), None);
    let (parsed, findings) = parse(&raw);
    assert!(parsed.config.is_some());
    assert!(
        findings.iter().any(|finding| finding.to_string().contains("`--set hookd.log_file=PATH`")),
        "{findings:?}"
    );
}

#[test]
fn samples_are_generated_and_read_the_same_by_all_versions() {
    for (text, file) in [
        (keys::sample_standalone(), expect_file!["../../couchdb-ini/hookd.ini"]),
        (keys::sample_os_daemons(), expect_file!["../../couchdb-ini/local.d-hookd.ini"]),
        (keys::sample_update_notification(), expect_file!["../../couchdb-ini/local.d-hookd-notified.ini"]),
    ] {
        file.assert_eq(&text);
        // Also with every default and example made to count.
        let lines = text.lines().map(|line| match line.strip_prefix(';') {
            Some(key) if !key.starts_with(' ') => key,
            _ => line,
        });
        let active = lines.collect::<Vec<_>>().join("\n");
        assert_ne!(active, text);
        for text in [&text, &active] {
            let (before, found_before) = ini::parse(text.as_bytes(), Dialect::Before3_3);
            let (since, found_since) = ini::parse(text.as_bytes(), Dialect::Since3_3);
            assert_eq!(before, since);
            assert_eq!((found_before, found_since), (vec![], vec![]));
            assert_eq!(ini::differences(text.as_bytes(), |_| true), []);
        }
        let (_, findings) = parse(&raw(&text, Dialect::Since3_3));
        assert!(findings.iter().all(|finding| !finding.is_error()), "{findings:?}");
        let others = ["filter", "filter_params", "doc_ids", "view"];
        let one_filter =
            active.lines().filter(|line| !others.contains(&line.split(' ').next().unwrap_or_default()));
        let text = one_filter
            .collect::<Vec<_>>()
            .join("\n")
            .replace("_file = /etc/couch-hookd/orders.secret", &format!(" = {SECRET}"));
        let text = text.replace("password_file", "password");
        assert_eq!(outcome(&text), "runs [orders], holds back []");
    }
}

#[test]
fn the_reference_names_every_key() {
    let text = keys::reference_markdown();
    for key in keys::KEYS {
        assert!(text.contains(&format!("| `{}` |", key.name)), "{}", key.name);
    }
    assert!(text.lines().all(|line| !line.starts_with('|') || line.matches('|').count() == 5), "{text}");
}
