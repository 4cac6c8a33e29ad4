//! Where endpoints may lie: what is refused is never connected to, is said clearly, and `check` finds it before.

use std::net::TcpListener;
use std::process::Command;

use couch_hookd::standin::couch::Flavour;

use crate::world::{Daemon, Dir, Ini, assert_no_secret, couch, receiver, write};

/// Exit status and output of `check`.
fn check(ini: &Ini) -> (Option<i32>, String) {
    let dir = Dir::new();
    let path = dir.path("hookd.ini");
    std::fs::write(&path, ini.text()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
    let output = command.arg("check").arg("--config").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    assert_no_secret("check", &text);
    (output.status.code(), text)
}

#[test]
fn a_metadata_service_is_never_asked_and_that_is_said() {
    let couch = couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 1);
    let ini = Ini::new(&couch.url()).webhook("orders", "http://169.254.169.254/hook", "");
    let daemon = Daemon::start(&ini);
    let line = daemon.wait_for_log("its endpoint cannot be reached");
    assert!(line.contains("(http://169.254.169.254 #"), "{line}");
    let refused =
        "the address `169.254.169.254` is refused: a link-local address; `endpoint_allow` lets it through";
    assert!(line.contains(refused), "{line}");
    let (status, text) = check(&ini);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("webhook `orders`, endpoint http://169.254.169.254 #"), "{text}");
    assert!(text.contains(refused), "{text}");
}

#[test]
fn a_denied_endpoint_sees_no_connection_until_its_webhook_says_otherwise() {
    let couch = couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 1);
    // Nobody accepts here: a connection would stay in the queue and be seen.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let endpoint = format!("http://{}/hook", listener.local_addr().unwrap());
    let hookd = "endpoint_deny = 127.0.0.0/8";
    let retry = "retry_schedule = 100ms";
    let ini = Ini::new(&couch.url()).hookd(hookd).hookd("log_level = debug");
    let daemon = Daemon::start(&ini.webhook("orders", &endpoint, retry));
    daemon.wait_for_nth_log("is refused: `endpoint_deny` lists it", 4);
    assert!(listener.accept().is_err(), "{}", daemon.transcript());
    drop(daemon);

    let receiver = receiver();
    let own = format!("{retry}\nendpoint_deny = 10.0.0.0/8");
    let ini = Ini::new(&couch.url()).hookd(hookd).hookd("log_level = debug");
    let daemon = Daemon::start(&ini.webhook("orders", &receiver.url(), &own));
    daemon.wait_for_log("delivered");
}

#[test]
fn the_watched_couchdb_is_no_endpoint_unless_it_is_allowed() {
    let couch = couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 1);
    let url = couch.url();
    let port = url.rsplit(':').next().unwrap().trim_end_matches('/');
    // The same server by another name.
    let endpoint = format!("http://localhost:{port}/orders/hook");
    let lines = "retry_schedule = 100ms";
    let (status, text) = check(&Ini::new(&url).webhook("orders", &endpoint, lines));
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("is refused: the watched CouchDB listens there"), "{text}");
    let daemon = Daemon::start(&Ini::new(&url).webhook("orders", &endpoint, lines));
    daemon.wait_for_log("is refused: the watched CouchDB listens there; `endpoint_allow` lets it through");
    drop(daemon);
    let allowed = Ini::new(&url).hookd("endpoint_allow = 127.0.0.0/8, ::1");
    let (_, text) = check(&allowed.webhook("orders", &endpoint, lines));
    assert!(text.lines().any(|line| line.starts_with("ok") && line.ends_with(": connects")), "{text}");
}
