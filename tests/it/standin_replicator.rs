//! The stand-in's replications against recorded answers of 1.7.1, 2.2.0 and 3.5.0, and what tests may do with them.
//!
//! The five replications of the recordings are given the states they had; what is compared is every byte but
//! revisions' hashes, seqs, times, ports, process and replication ids, which are levelled on both sides.

use std::fmt::Write;

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::replicator::{Progress, Replication, ReplicationState};
use serde_json::{Value, json};

use crate::http_client::{ask, get};

use ReplicationState::{Completed, Crashing, Error, Failed, Initializing, Pending, Running};

const DB: &str = "_replicator";
const SEQ: &str = "9-g1AAAACneJzLYWBgYMpgTmEQSc4v";
const AUTH_ERROR: &str = "{replication_auth_error,\n    {session_request_failed,\"http://127.0.0.1:1/_session\",\"admin\",\n        {conn_failed,{error,econnrefused}}}}";

fn recorded(version: &str, name: &str) -> Value {
    let file = format!("{}/tests/data/{version}/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn start(flavour: Flavour) -> StandIn {
    StandIn::start(Options::new(flavour)).unwrap()
}

fn put(couch: &StandIn, id: &str, source: &str, target: &str, more: Value) {
    let host = "http://admin:secret@127.0.0.1:15984";
    let target = if target.contains("://") { target.to_owned() } else { format!("{host}/{target}") };
    let mut body = json!({"source": format!("{host}/{source}"), "target": target, "owner": "admin"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    couch.put_replication(DB, id, &body).unwrap();
}

fn put_five(couch: &StandIn) {
    let closed = "http://admin:secret@127.0.0.1:1/x";
    put(couch, "rep_done", "fixture", "fixture_copy", json!({}));
    put(couch, "rep_cont", "fixture", "fixture_copy", json!({"continuous": true}));
    put(couch, "rep_no_source", "nothere", "fixture_copy", json!({}));
    put(couch, "rep_closed_port", "fixture", closed, json!({"continuous": true}));
    put(couch, "rep_no_filter", "fixture", "fixture_copy", json!({"filter": "nope/nope"}));
}

fn progress(n_docs: u64, bulk_get_docs: u64, at: &str, checkpointed: &str) -> Progress {
    Progress {
        revisions_checked: 8,
        missing_revisions_found: n_docs,
        docs_read: n_docs,
        docs_written: n_docs,
        bulk_get_docs,
        source_seq: at.to_owned(),
        checkpointed_source_seq: checkpointed.to_owned(),
        ..Progress::default()
    }
}

/// Puts what differs between two servers that mean the same into one spelling.
fn level(text: &str) -> String {
    let text = text.replace("couchdb@", "couch@").replace(".1>", ".0>");
    let (mut out, mut rest) = (String::new(), text.as_str());
    while let Some(first) = rest.chars().next() {
        if let Some(behind) = time_at(rest) {
            out.push('T');
            rest = behind;
            continue;
        }
        let token =
            rest.trim_start_matches(|letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter));
        let token = &rest[..rest.len() - token.len()];
        if token.is_empty() {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        rest = &rest[token.len()..];
        let hex = |text: &str| text.chars().all(|letter| letter.is_ascii_hexdigit());
        match token.split_once('-') {
            Some((_, seq)) if seq.starts_with("g1AAAA") => out.push('S'),
            Some((generation, hash)) if hash.len() == 32 && hex(hash) => {
                write!(out, "{generation}-H").unwrap()
            }
            Some((from, to)) if from.len() == 8 && to.len() == 8 && hex(from) && hex(to) => out.push('R'),
            None if token.len() == 32 && hex(token) => out.push('H'),
            None if token.len() > 3 && token.chars().all(|letter| letter.is_ascii_digit()) => out.push('0'),
            None if token.starts_with("couch") && rest.starts_with('@') => out.push_str("couch"),
            _ => out.push_str(token),
        }
    }
    out
}

/// What is behind `2026-11-21T21:45:47`, if that is what `text` begins with.
fn time_at(text: &str) -> Option<&str> {
    let (time, behind) = text.split_at_checked(19)?;
    let shape: String =
        time.chars().map(|letter| if letter.is_ascii_digit() { '0' } else { letter }).collect();
    (shape == "0000-00-00T00:00:00").then_some(behind)
}

#[track_caller]
fn compare(couch: &StandIn, version: &str, name: &str) {
    let recorded = recorded(version, name);
    let reply = get(&couch.url(), recorded["request"]["path"].as_str().unwrap());
    assert_eq!(u64::from(reply.status), recorded["status"], "{version} {name}: {}", reply.body);
    assert_eq!(level(&reply.body), level(recorded["body"].as_str().unwrap()), "{version} {name}");
}

/// Documents as the recorded feed has them, and in which order the replicator's own members stand.
fn compare_documents(couch: &StandIn, version: &str) {
    let recorded = recorded(version, "replicator_changes_35s");
    let feed: Value = serde_json::from_str(recorded["body"].as_str().unwrap()).unwrap();
    let live = feed["results"].as_array().unwrap().iter().filter(|row| row["deleted"].is_null());
    let mut n_seen = 0;
    for doc in live.map(|row| &row["doc"]) {
        let id = doc["_id"].as_str().unwrap();
        let ours = couch.winner(DB, id).unwrap().json;
        let value: Value = serde_json::from_str(&level(&ours)).unwrap();
        let expected: Value = serde_json::from_str(&level(&doc.to_string())).unwrap();
        assert_eq!(value, expected, "{version} {id}");
        let body = recorded["body"].as_str().unwrap();
        let theirs = &body[body.find(&format!("\"_id\":\"{id}\"")).unwrap()..];
        let theirs = &theirs[..theirs.find("\n").unwrap()];
        assert_eq!(replicator_members(&ours), replicator_members(theirs), "{version} {id}");
        n_seen += 1;
    }
    assert_eq!(n_seen, if version == "3.5.0" { 5 } else { 6 }, "{version}");
}

fn replicator_members(json: &str) -> Vec<&str> {
    let names = json.split("\"_replication_").skip(1);
    names.map(|rest| &rest[..rest.find('"').unwrap()]).collect()
}

#[test]
fn rows_and_documents_of_2_x_and_3_x_are_those_of_the_recorded_servers() {
    for (flavour, version) in [(Flavour::V2, "2.2.0"), (Flavour::V3, "3.5.0")] {
        let couch = start(flavour);
        put_five(&couch);
        if flavour == Flavour::V2 {
            // It was recorded before the server had put its design document there.
            couch.delete(DB, "_design/_replicator").unwrap();
            compare(&couch, version, "scheduler_docs_1s");
            couch.delete_db(DB);
            put_five(&couch);
        }
        let n_done = if flavour == Flavour::V2 { 0 } else { 6 };
        let done = Replication::with_progress(Completed, progress(n_done, 6, SEQ, SEQ));
        couch.replicate(DB, "rep_done", done).unwrap();
        let running = Replication::with_progress(Running, progress(8, 7, SEQ, "0"));
        couch.replicate(DB, "rep_cont", running).unwrap();
        let crashing = Replication::failing(Crashing, AUTH_ERROR, 1);
        couch.replicate(DB, "rep_closed_port", crashing).unwrap();
        let port = if flavour == Flavour::V2 { "13984" } else { "15984" };
        let no_source = format!("db_not_found: could not open http://127.0.0.1:{port}/nothere/");
        couch.replicate(DB, "rep_no_source", Replication::failing(Crashing, &no_source, 1)).unwrap();
        let userinfo = if flavour == Flavour::V2 { "admin:*****@" } else { "" };
        let no_filter = format!(
            "Couldn't open document `_design/nope` from source database `http://{userinfo}127.0.0.1:{port}/fixture/`: {{error,<<\"not_found\">>}}"
        );
        let n_errors = if flavour == Flavour::V2 { 2 } else { 1 };
        couch.replicate(DB, "rep_no_filter", Replication::failing(Error, &no_filter, n_errors)).unwrap();
        for name in ["scheduler_docs_12s", "active_tasks_12s", "scheduler_doc_missing"] {
            compare(&couch, version, name);
        }
        compare_jobs(&couch, version, "scheduler_jobs_12s");
        compare_documents(&couch, version);

        let running = Progress { changes_pending: Some(0), ..progress(8, 7, SEQ, SEQ) };
        couch.replicate(DB, "rep_cont", Replication::with_progress(Running, running)).unwrap();
        compare(&couch, version, "scheduler_doc_one");
        compare(&couch, version, "active_tasks_35s");
        if flavour == Flavour::V3 {
            couch.replicate(DB, "rep_closed_port", Replication::failing(Crashing, AUTH_ERROR, 2)).unwrap();
            couch.replicate(DB, "rep_no_source", Replication::failing(Crashing, &no_source, 2)).unwrap();
            compare(&couch, version, "scheduler_docs_35s");
            compare_jobs(&couch, version, "scheduler_jobs_35s");
        }
    }
}

/// Jobs come in the order of ids, which are hashes of URLs.
#[track_caller]
fn compare_jobs(couch: &StandIn, version: &str, name: &str) {
    let recorded = recorded(version, name);
    let reply = get(&couch.url(), recorded["request"]["path"].as_str().unwrap());
    let jobs = |body: &str| {
        let mut jobs: Vec<String> = level(body).split("{\"database\"").map(str::to_owned).collect();
        jobs.iter_mut().for_each(|job| *job = job.trim_end_matches(['\n', '}', ']', ',']).to_owned());
        jobs[1..].sort();
        jobs
    };
    assert_eq!(jobs(&reply.body), jobs(recorded["body"].as_str().unwrap()), "{version} {name}");
}

#[test]
fn documents_and_tasks_of_1_x_are_those_of_the_recorded_server() {
    let (couch, version) = (start(Flavour::V1), "1.7.1");
    put_five(&couch);
    let say = |id: &str, replication| couch.replicate(DB, id, replication).unwrap();
    let no_filter = "Couldn't open document `_design/nope` from source database `http://admin:*****@127.0.0.1:11984/fixture/`: {error,<<\"not_found\">>}";
    say("rep_no_filter", Replication::failing(Error, no_filter, 1));
    say("rep_done", Replication::with_progress(Running, progress(8, 0, "9", "9")));
    let one = Progress { revisions_checked: 1, ..progress(1, 0, "9", "0") };
    say("rep_cont", Replication::with_progress(Running, one));
    let no_source = "db_not_found: could not open http://admin:*****@127.0.0.1:11984/nothere/";
    say("rep_no_source", Replication::failing(Crashing, no_source, 1));
    say("rep_done", Replication::with_progress(Completed, progress(8, 0, "9", "9")));
    compare(&couch, version, "active_tasks_1s");
    let conflict =
        "{checkpoint_commit_failure,<<\"Error updating the source checkpoint document: conflict\">>}";
    say("rep_cont", Replication::failing(Crashing, conflict, 1));
    for name in ["scheduler_docs_12s", "scheduler_doc_one", "scheduler_doc_missing", "scheduler_jobs_12s"] {
        compare(&couch, version, name);
    }
    compare(&couch, version, "active_tasks_12s");
    say("rep_closed_port", Replication::failing(Failed, "timeout", 1));
    let none = Progress { revisions_checked: 0, ..progress(0, 0, "9", "9") };
    say("rep_cont", Replication::with_progress(Running, none));
    compare(&couch, version, "active_tasks_35s");
    compare_documents(&couch, version);
}

fn rows(couch: &StandIn, path: &str) -> Vec<(String, String)> {
    let reply = get(&couch.url(), path);
    assert_eq!(reply.status, 200, "{path}: {}", reply.body);
    let text = |value: &Value| value.as_str().unwrap_or("null").to_owned();
    let json = reply.json();
    json["docs"].as_array().unwrap().iter().map(|row| (text(&row["doc_id"]), text(&row["state"]))).collect()
}

fn put_simple(couch: &StandIn, db: &str, id: &str) {
    let body = json!({"source": format!("http://a/{id}"), "target": {"url": "https://u:p@b/x/"}});
    couch.put_replication(db, id, &body).unwrap();
}

fn simple(couch: &StandIn, db: &str, id: &str, state: ReplicationState) {
    put_simple(couch, db, id);
    couch.replicate(db, id, Replication::new(state)).unwrap();
}

#[test]
fn an_edit_or_a_deletion_makes_the_row_go() {
    for flavour in [Flavour::V2, Flavour::V3] {
        let couch = start(flavour);
        let path = "/_scheduler/docs";
        for state in [Running, Crashing, Completed, Failed] {
            couch.create_db(DB);
            simple(&couch, DB, "r", state);
            couch.delete_db(DB);
            assert_eq!(get(&couch.url(), path).status, 404);
            // Equal content has an equal revision.
            put_simple(&couch, DB, "r");
            assert_eq!(rows(&couch, path), [], "{flavour:?} {state:?} re-created");
            simple(&couch, DB, "r", state);
            assert_eq!(rows(&couch, path), [("r".to_owned(), state.as_str().to_owned())], "{flavour:?}");
            couch.put_replication(DB, "r", &json!({"source": "http://a/b", "target": "http://b/c"})).unwrap();
            assert_eq!(rows(&couch, path), [], "{flavour:?} {state:?} edited");
            let one = get(&couch.url(), "/_scheduler/docs/_replicator/r").json();
            assert_eq!((&one["state"], &one["source"]), (&Value::Null, &json!("http://a/b/")), "{flavour:?}");
            couch.replicate(DB, "r", Replication::new(state)).unwrap();
            assert_eq!(rows(&couch, path).len(), 1);
            couch.delete(DB, "r").unwrap();
            assert_eq!(rows(&couch, path), [], "{flavour:?} {state:?} deleted");
            assert_eq!(get(&couch.url(), "/_scheduler/docs/_replicator/r").status, 404);
            couch.delete_db(DB);
        }
        simple(&couch, DB, "r", Running);
        assert_eq!(rows(&couch, path).len(), 1);
        couch.forget_replications();
        assert_eq!(rows(&couch, path), [], "the server has not yet looked at it");
    }
}

#[test]
fn other_replicator_databases_pages_and_states_are_found() {
    let couch = start(Flavour::V3);
    for n in 0..7 {
        simple(&couch, "x/_replicator", &format!("r{n}"), if n < 4 { Running } else { Initializing });
    }
    for path in ["x/_replicator", "x%2F_replicator"] {
        let path = format!("/_scheduler/docs/{path}");
        assert_eq!(rows(&couch, &path).len(), 7);
        assert_eq!(rows(&couch, &format!("{path}?states=initializing,Running&limit=3")).len(), 3);
        assert_eq!(rows(&couch, &format!("{path}?states=initializing")).len(), 3);
        let page = rows(&couch, &format!("{path}?skip=3&limit=2"));
        assert_eq!(page.iter().map(|row| row.0.as_str()).collect::<Vec<_>>(), ["r3", "r4"]);
        let one = get(&couch.url(), &format!("{path}/r1")).json();
        assert_eq!((&one["state"], &one["target"]), (&json!("running"), &json!("https://b/x/")));
    }
    assert_eq!(rows(&couch, "/_scheduler/docs"), []);
    for (path, status, reason) in [
        (
            "/_scheduler/docs?states=foo",
            400,
            "Unknown states [foo]. Choose from: [initializing,error,running,pending,crashing,completed,failed]",
        ),
        ("/_scheduler/docs?limit=x", 400, "Invalid value for integer: \"x\""),
        ("/_scheduler/docs/x", 400, "Invalid path"),
        ("/_scheduler/docs/y/_replicator", 404, "Database does not exist."),
        ("/_scheduler/jobs/none", 404, "missing"),
    ] {
        let reply = get(&couch.url(), path);
        assert_eq!((reply.status, &reply.json()["reason"]), (status, &json!(reason)), "{path}");
    }
    let transient = "0123456789abcdef0123456789abcdef+continuous";
    couch.replicate_transient(transient, "http://a/b", "http://c/d", Replication::new(Running));
    let all = get(&couch.url(), "/_scheduler/jobs").json();
    assert_eq!((&all["total_rows"], all["jobs"].as_array().unwrap().len()), (&json!(5), 5));
    let job = get(&couch.url(), "/_scheduler/jobs/0123456789abcdef0123456789abcdef%2Bcontinuous").json();
    assert_eq!((&job["database"], &job["doc_id"]), (&Value::Null, &Value::Null));
    assert_eq!(job["history"][0]["type"], "started");
    couch.replicate_transient(transient, "http://a/b", "http://c/d", Replication::new(Completed));
    assert_eq!(
        get(&couch.url(), "/_scheduler/jobs?limit=2&skip=3").json()["jobs"].as_array().unwrap().len(),
        1
    );
}

#[test]
fn total_rows_is_no_number_of_rows_and_a_short_page_is_not_the_last() {
    for flavour in [Flavour::V2, Flavour::V3] {
        let couch = StandIn::start(Options { n_shards: 1, ..Options::new(flavour) }).unwrap();
        for n in 0..6 {
            simple(&couch, DB, &format!("r{n}"), Pending);
        }
        couch.put(DB, "_design/mine", &json!({})).unwrap();
        let page = get(&couch.url(), "/_scheduler/docs?limit=3").json();
        // 2.x has a design document of its own, and says one less.
        assert_eq!(page["total_rows"], 7, "{flavour:?}");
        let n_rows = page["docs"].as_array().unwrap().len();
        assert_eq!(n_rows, if flavour == Flavour::V2 { 1 } else { 2 }, "{flavour:?}");
        assert_eq!(rows(&couch, "/_scheduler/docs?limit=3&skip=2")[0].0, "r2", "{flavour:?}");
    }
}

#[test]
fn pages_fail_shift_and_lose_rows_as_often_as_asked_for() {
    let couch = start(Flavour::V3);
    for n in 0..50 {
        simple(&couch, DB, &format!("r{n:02}"), Running);
    }
    let path = "/_scheduler/docs?limit=10&skip=20";
    couch.hide_replication(DB, "r25", 2);
    assert_eq!([rows(&couch, path).len(), rows(&couch, path).len(), rows(&couch, path).len()], [9, 9, 10]);
    couch.quirks(|quirks| quirks.scheduler_fails_every = Some(3));
    let statuses: Vec<u16> = (0..6).map(|_| get(&couch.url(), path).status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 2, "{statuses:?}");
    couch.quirks(|quirks| {
        quirks.scheduler_fails_every = None;
        quirks.scheduler_row_lost_every = Some(4);
    });
    let n_rows: usize = (0..4).map(|_| rows(&couch, path).len()).sum();
    assert_eq!(n_rows, 30);
    couch.quirks(|quirks| {
        quirks.scheduler_row_lost_every = None;
        quirks.scheduler_shift_max = 3;
    });
    let firsts: std::collections::BTreeSet<String> =
        (0..60).map(|_| rows(&couch, path)[0].0.clone()).collect();
    assert!(firsts.len() > 4 && firsts.first().unwrap() >= &"r17".to_owned(), "{firsts:?}");
    assert_eq!(rows(&couch, "/_scheduler/docs?limit=10")[0].0, "r00");
    couch.quirks(|quirks| {
        let fault = Fault { request: "_scheduler/docs".into(), times: 1, kind: FaultKind::Html(502) };
        quirks.faults.push(fault);
    });
    assert_eq!(get(&couch.url(), path).status, 502);
}

#[test]
fn last_updated_moves_while_a_state_stays_and_history_grows() {
    let couch = start(Flavour::V2);
    simple(&couch, DB, "r", Crashing);
    let row = || get(&couch.url(), "/_scheduler/docs/_replicator/r").json();
    let before = row();
    let later = jiff::Timestamp::from_second(4_000_000_000).unwrap();
    let again = Replication { last_updated: Some(later), ..Replication::failing(Crashing, "x", 2) };
    couch.replicate(DB, "r", again).unwrap();
    let after = row();
    assert_eq!((&after["state"], &after["error_count"]), (&before["state"], &json!(2)));
    assert_eq!(after["last_updated"], "2096-10-02T07:06:40Z");
    assert_eq!(after["start_time"], before["start_time"]);
    couch.replicate(DB, "r", Replication::new(Running)).unwrap();
    couch.replicate(DB, "r", Replication::new(Pending)).unwrap();
    let job = &get(&couch.url(), "/_scheduler/jobs").json()["jobs"][0];
    let types: Vec<&str> =
        job["history"].as_array().unwrap().iter().map(|entry| entry["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["stopped", "started", "crashed", "started", "crashed", "started", "added"]);
}

#[test]
fn a_row_goes_through_states_listing_by_listing() {
    let couch = start(Flavour::V3);
    put_simple(&couch, DB, "r");
    let states = [Running, Pending, Failed].map(Replication::new);
    couch.replicate_by_listing(DB, "r", states).unwrap();
    let seen = [(); 4].map(|()| rows(&couch, "/_scheduler/docs")[0].1.clone());
    assert_eq!(seen, ["running", "pending", "failed", "failed"]);
    assert_eq!(couch.n_states_to_come(DB, "r"), 0);
}

#[test]
fn only_admins_see_replications() {
    for flavour in [Flavour::V1, Flavour::V2, Flavour::V3] {
        let options = Options { admin: Some(("admin".into(), "right".into())), ..Options::new(flavour) };
        let couch = StandIn::start(options).unwrap();
        let expected = if flavour == Flavour::V1 { 400 } else { 401 };
        assert_eq!(get(&couch.url(), "/_scheduler/docs").status, expected, "{flavour:?}");
        let tasks = get(&couch.url(), "/_active_tasks").status;
        assert_eq!(tasks, if flavour == Flavour::V2 { 200 } else { 401 }, "{flavour:?}");
        assert!(ask(&couch.url(), "POST", "/_scheduler/jobs", "{}").status >= 400);
    }
}
