//! `explain NAME`: every value with its origin, what follows, rights; no secret in any of it.

use std::process::Command;

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use serde_json::Value;

use crate::world::{CANARY, Dir, Ini, assert_no_secret, couch};

/// Exit status and output of `explain orders`, and the path of the ini file.
fn explain(ini: &Ini, arguments: &[&str]) -> (Option<i32>, String, String) {
    let dir = Dir::new();
    let path = dir.path("hookd.ini");
    std::fs::write(&path, ini.text()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
    command.args(["explain", "orders", "--config"]).arg(&path).args(arguments);
    let output = command.env("COUCH_HOOKD_LOG_LEVEL", "warn").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert_no_secret("explain", &text);
    (output.status.code(), text, path.display().to_string())
}

#[test]
fn every_value_has_its_origin() {
    let couch = couch(Flavour::V3, &["orders"]);
    let ini = Ini::new(&couch.url()).webhook("orders", "http://127.0.0.1:9/hook", "timeout = 7s");
    let (status, text, path) = explain(&ini, &["--json", "--set", "hookd.webhook.orders.concurrency=1"]);
    assert_eq!(status, Some(0), "{text}");
    let said: Value = serde_json::from_str(&text).unwrap();
    let line = |wanted: &str| ini.text().lines().position(|line| line.starts_with(wanted)).unwrap() + 1;
    let check = |key: &str, value: &str, origin: &str| {
        let settings = said["settings"].as_array().unwrap();
        let found =
            settings.iter().find(|setting| setting["key"] == key).unwrap_or_else(|| panic!("no {key}"));
        assert_eq!(
            (found["value"].as_str(), found["origin"].as_str()),
            (Some(value), Some(origin)),
            "{found}"
        );
    };
    check("timeout", "7s", &format!("{path}:{}", line("timeout")));
    check("header.x-canary", "set", &format!("{path}:{}", line("header.x-canary")));
    check("concurrency", "1", "--set");
    check("log_level", "warn", "environment `COUCH_HOOKD_LOG_LEVEL`");
    check("dead_letter_after", "3", "default");
    check("db", "orders", "the webhook's name");
    check("couchdb_url", couch.url().trim_end_matches('/'), &format!("{path}:{}", line("couchdb_url")));
    check("orders", said["endpoint"].as_str().unwrap(), &format!("{path}:{}", line("orders =")));
    assert_eq!(
        said["retry_since_first_seconds"],
        serde_json::json!([1.0, 6.0, 21.0, 51.0, 111.0, 231.0, 531.0])
    );
    assert!(said["facts"]["given up"].as_str().unwrap().contains("after 24h (`concurrency = 1`"), "{text}");
    let rights = said["rights"].as_array().unwrap();
    assert!(rights.len() == 3 && rights.iter().all(|right| right["missing"].is_null()), "{text}");
}

#[test]
fn a_missing_right_is_an_error_and_people_get_a_table() {
    let mut options = Options::new(Flavour::V3);
    options.admin = Some(("hookd".to_owned(), format!("{CANARY}-another")));
    let couch = StandIn::start(options).unwrap();
    let ini = Ini::new(&couch.url()).webhook("orders", "http://127.0.0.1:9/hook", "");
    let (status, text, _) = explain(&ini, &[]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("error    a login at CouchDB") && text.contains("401"), "{text}");
    let wanted = "tried again: after 1s, 5s, 15s, 30s, 1m, 2m, 5m, then every 5m";
    assert!(text.contains(wanted), "{text}");
    let secret = text.lines().find(|line| line.contains("  secret  ")).unwrap();
    assert!(secret.contains("set (#"), "{text}");
}
