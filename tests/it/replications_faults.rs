//! `watch = replications` when CouchDB fails, or we are stopped, in the middle of a look: what was seen is told.

use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, Seen, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Receiver;
use couch_hookd::standin::record::Record;
use couch_hookd::standin::replicator::{Progress, Replication, ReplicationState};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::world::{Daemon, Ini, couch, receiver_with};

use ReplicationState::{Crashing, Failed, Running};

const DB: &str = "_replicator";
const ALL: &str = "watch = replications\nevents = *\npoll_interval = 100ms";
const REFUSED: &str = "{conn_failed,{error,econnrefused}}";

/// What was told of a replication, each event once.
fn kinds(record: &Record, id: &str) -> Vec<String> {
    let mut ids = Vec::new();
    let mut kinds = Vec::new();
    for one in record.deliveries().iter().filter(|one| one.accepted()) {
        let body: Value = serde_json::from_slice(&one.body).unwrap();
        if body["data"]["id"] == id && !ids.contains(&one.webhook_id) {
            ids.push(one.webhook_id.clone());
            kinds.push(body["type"].as_str().unwrap().trim_start_matches("replication.").to_owned());
        }
    }
    kinds
}

fn put(couch: &StandIn, id: &str) {
    let body = json!({"source": format!("http://127.0.0.1:1/{id}"), "target": "http://127.0.0.1:1/x", "continuous": true});
    couch.put_replication(DB, id, &body).unwrap();
}

fn endpoint() -> Receiver {
    receiver_with(|options| options.keep_bodies = true)
}

#[track_caller]
fn wait(receiver: &Receiver, daemon: &Daemon, id: &str, expected: &[&str]) {
    let there = |record: &Record| kinds(record, id).len() >= expected.len();
    let told = receiver.wait_until(WAIT_MAX, there);
    let found = receiver.look(|record| kinds(record, id));
    assert!(told && found == expected, "`{id}`: {found:?}, expected {expected:?}\n{}", daemon.transcript());
}

fn fault(couch: &StandIn, request: &str, kind: FaultKind) {
    let request = request.to_owned();
    couch.quirks(|quirks| quirks.faults.push(Fault { request, times: u32::MAX, kind }));
}

/// 2.x says what runs in a list of its own, asked for in the middle of the rows.
#[test]
fn rows_before_a_failed_request_are_not_lost() {
    let (couch, receiver) = (couch(Flavour::V2, &[DB]), endpoint());
    let daemon = Daemon::start(&Ini::new(&couch.url()).webhook("sync", &receiver.url(), ALL));
    for id in ["a", "b"] {
        put(&couch, id);
        couch.replicate(DB, id, Replication::with_progress(Running, Progress::default())).unwrap();
        wait(&receiver, &daemon, id, &["running"]);
    }
    fault(&couch, "GET /_active_tasks", FaultKind::Status(500));
    couch.replicate(DB, "a", Replication::failing(Failed, "db_not_found: gone", 1)).unwrap();
    let before = couch.n_requests("_active_tasks");
    let asked = couch.wait_until(WAIT_MAX, |seen| seen.n_requests("_active_tasks") >= before + 2);
    assert!(asked, "{}", daemon.transcript());
    couch.quirks(|quirks| quirks.faults.clear());
    wait(&receiver, &daemon, "a", &["running", "failed"]);
}

/// Another configuration comes while details of the first of several are looked up.
#[test]
fn a_stop_in_the_middle_of_a_look_loses_nothing() {
    let ids = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let (couch, receiver) = (couch(Flavour::V3, &[DB]), endpoint());
    let ini =
        |lines: &str| Ini::new(&couch.url()).webhook("sync", &receiver.url(), &format!("{ALL}\n{lines}"));
    let daemon = Daemon::start(&ini(""));
    for id in ids {
        put(&couch, id);
        couch.replicate(DB, id, Replication::with_progress(Running, Progress::default())).unwrap();
    }
    ids.iter().for_each(|id| wait(&receiver, &daemon, id, &["running"]));
    let n_jobs = couch.n_requests("/_scheduler/jobs/");
    fault(&couch, "GET /_scheduler/jobs/", FaultKind::Late(Duration::from_secs(1)));
    for id in ids {
        couch.replicate(DB, id, Replication::failing(Crashing, REFUSED, 1)).unwrap();
    }
    let asked = couch.wait_until(WAIT_MAX, |seen| seen.n_requests("/_scheduler/jobs/") > n_jobs);
    assert!(asked, "{}", daemon.transcript());
    let is_memory = |path: &str| path.contains("couch-hookd.sync.");
    let n_stored =
        |seen: &Seen<'_>| seen.requests().filter(|one| one.method == "PUT" && is_memory(&one.path)).count();
    let before = couch.look(n_stored);
    daemon.configure(&ini("paused = true").text());
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_log("is paused by its configuration");
    // Who looked sees it after the answer that it waits for.
    let _ = couch.wait_until(Duration::from_secs(3), |seen| n_stored(seen) > before);
    couch.quirks(|quirks| quirks.faults.clear());
    daemon.configure(&ini("").text());
    daemon.signal(Signal::SIGHUP);
    ids.iter().for_each(|id| wait(&receiver, &daemon, id, &["running", "crashing"]));
}

/// What was there when we came is no news, though what we remember of it could not be stored at first.
#[test]
fn a_first_look_that_cannot_be_stored_is_begun_anew() {
    let (couch, receiver) = (couch(Flavour::V3, &[DB]), endpoint());
    put(&couch, "old");
    couch.replicate(DB, "old", Replication::failing(Failed, "db_not_found: gone", 1)).unwrap();
    fault(&couch, "PUT /_replicator/_local/couch-hookd.sync.", FaultKind::Status(500));
    let lines = "watch = replications\nevents = *\nsince = now\npoll_interval = 2s";
    let ini = Ini::new(&couch.url()).hookd("feed_timeout = 1s").webhook("sync", &receiver.url(), lines);
    let mut daemon = Daemon::start(&ini);
    let is_memory = |path: &str| path.contains("couch-hookd.sync.");
    let n_stored =
        |seen: &Seen<'_>| seen.requests().filter(|one| one.method == "PUT" && is_memory(&one.path)).count();
    let tried = couch.wait_until(WAIT_MAX, |seen| n_stored(seen) >= 2);
    assert!(tried, "{}", daemon.transcript());
    daemon.kill();
    couch.quirks(|quirks| quirks.faults.clear());
    daemon.start_again();
    let stored = couch.wait_until(WAIT_MAX, |seen| n_stored(seen) > 64);
    assert!(stored, "{}", daemon.transcript());
    put(&couch, "new");
    couch.replicate(DB, "new", Replication::failing(Failed, "db_not_found: gone", 1)).unwrap();
    wait(&receiver, &daemon, "new", &["failed"]);
    wait(&receiver, &daemon, "old", &[]);
}
