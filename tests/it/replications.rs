//! `watch = replications`: every change of a replication's state is told once, in order, and nothing else is.
//!
//! The real daemon looks at the stand-in's replicator, where a test says which state each replication is in; states
//! that CouchDB 1.x does not have are left out there, and its `error` is what crashes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, Seen, StandIn};
use couch_hookd::standin::record::Record;
use couch_hookd::standin::replicator::{Progress, Replication, ReplicationState};
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::world::{Daemon, FLAVOURS, Ini, World, couch, on_each, receiver_with};

use ReplicationState::{Completed, Crashing, Error, Failed, Initializing, Pending, Running};

/// Where a replication lies unless a test says otherwise.
pub(crate) const DB: &str = "_replicator";
/// All events, and looks in quick succession.
pub(crate) const ALL: &str = "watch = replications\nevents = *\npoll_interval = 100ms";
/// What a closed port gives, on 2.x and later.
const REFUSED: &str = "{replication_auth_error,\n    {session_request_failed,\"http://127.0.0.1:1/_session\",\"admin\",\n        {conn_failed,{error,econnrefused}}}}";

/// One event as it came.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    /// Without `replication.`.
    pub(crate) kind: String,
    /// `webhook-id`.
    pub(crate) id: String,
    /// The body.
    pub(crate) body: Value,
}

/// Accepted events, each once, in the order in which they first came, by replication.
pub(crate) fn told(record: &Record) -> BTreeMap<String, Vec<Told>> {
    let mut told: BTreeMap<String, Vec<Told>> = BTreeMap::new();
    for one in record.deliveries().iter().filter(|one| one.accepted()) {
        let body: Value = serde_json::from_slice(&one.body).unwrap();
        let Some(kind) = body["type"].as_str().unwrap().strip_prefix("replication.") else { continue };
        let key = match body["data"]["id"].as_str() {
            Some(id) => id.to_owned(),
            None => format!("_replicate/{}", body["data"]["replication"]["id"].as_str().unwrap()),
        };
        let of_one = told.entry(key).or_default();
        if of_one.iter().all(|known| known.id != one.webhook_id) {
            of_one.push(Told { kind: kind.to_owned(), id: one.webhook_id.clone(), body });
        }
    }
    told
}

fn kinds(record: &Record, id: &str) -> Vec<String> {
    told(record).remove(id).unwrap_or_default().into_iter().map(|one| one.kind).collect()
}

/// Puts a document; over one that is there it is an edit.
pub(crate) fn put(couch: &StandIn, id: &str) {
    put_in(couch, DB, id);
}

fn put_in(couch: &StandIn, db: &str, id: &str) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    // The selector is another at each edit.
    let body = json!({"source": format!("http://admin:pass@127.0.0.1:1/{id}"), "target": "http://admin:pass@127.0.0.1:1/x",
        "continuous": true, "filter": "app/some", "query_params": {"n": n.to_string()}});
    couch.put_replication(db, id, &body).unwrap();
}

/// A running one that has done more than it ever had.
pub(crate) fn at_work(flavour: Flavour) -> Replication {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let seq = if flavour == Flavour::V1 { n.to_string() } else { format!("{n}-g1AAAACneJzLYWBg") };
    let progress = Progress {
        docs_read: n,
        docs_written: n,
        changes_pending: Some(0),
        source_seq: seq.clone(),
        checkpointed_source_seq: seq,
        ..Progress::default()
    };
    Replication::with_progress(Running, progress)
}

/// Does what `step` says to replications, and gives what is told of each then.
pub(crate) fn step(couch: &StandIn, flavour: Flavour, id: &str, step: &str) -> &'static [&'static str] {
    let old = flavour == Flavour::V1;
    let say = |replication| couch.replicate(DB, id, replication).unwrap();
    match step {
        "put" | "edit" => put(couch, id),
        "delete" => drop(couch.delete(DB, id).unwrap()),
        "initialize" => say(Replication::new(Initializing)),
        "wait" => say(Replication::new(Pending)),
        "run" => say(at_work(flavour)),
        "recover" => say(at_work(flavour)),
        "crash" => say(Replication::failing(Crashing, REFUSED, 3)),
        "complete" => say(Replication::with_progress(Completed, Progress::default())),
        "fail" => say(Replication::failing(Failed, "db_not_found: could not open http://127.0.0.1:1/x/", 1)),
        _ => unreachable!("{step}"),
    }
    match step {
        "put" | "edit" => &[],
        "initialize" | "wait" if old => &[],
        "delete" => &["removed"],
        "initialize" => &["initializing"],
        "wait" => &["pending"],
        "run" => &["running"],
        "recover" => &["running", "recovered"],
        "crash" | "fail" if old => &["error"],
        "crash" => &["crashing"],
        "complete" => &["completed"],
        _ => &["failed"],
    }
}

/// A life with all that can happen in it.
pub(crate) const LIFE: &[&str] = &[
    "put",
    "initialize",
    "run",
    "crash",
    "recover",
    "complete",
    "edit",
    "fail",
    "edit",
    "recover",
    "wait",
    "delete",
    "put",
    "run",
    "complete",
    "delete",
];

/// The daemon at a replicator.
pub(crate) struct Watched {
    pub(crate) world: World,
    flavour: Flavour,
    expected: BTreeMap<String, Vec<&'static str>>,
}

impl Watched {
    fn start(flavour: Flavour, lines: &str) -> Watched {
        Watched::start_on(couch(flavour, &[DB]), flavour, lines)
    }

    pub(crate) fn start_on(couch: StandIn, flavour: Flavour, lines: &str) -> Watched {
        let receiver = receiver_with(|options| options.keep_bodies = true);
        let daemon = Daemon::start(&Ini::new(&couch.url()).webhook("sync", &receiver.url(), lines));
        Watched { world: World { couch, receiver, daemon }, flavour, expected: BTreeMap::new() }
    }

    pub(crate) fn couch(&self) -> &StandIn {
        &self.world.couch
    }

    /// Waits until the daemon has looked at everything `n` times more, from one end to the other.
    pub(crate) fn looks(&self, n: usize) {
        // After each look it waits at the database's own feed.
        let n_waits = |seen: &Seen<'_>| {
            let feeds = seen.requests().filter(|one| one.path.ends_with("_replicator/_changes"));
            feeds.filter(|one| one.query.iter().any(|(_, value)| value == "continuous")).count()
        };
        let before = self.couch().look(n_waits);
        for n in 1..=n + 2 {
            let looked = self.couch().wait_until(WAIT_MAX, |seen| n_waits(seen) >= before + n);
            assert!(looked, "no look within {WAIT_MAX:?}\n{}", self.world.transcript());
        }
    }

    /// Says the next thing of a replication, and waits until what must be told of it is.
    pub(crate) fn step(&mut self, id: &str, name: &str) {
        let expected = step(self.couch(), self.flavour, id, name);
        self.expect(id, expected, name == "recover");
    }

    /// Waits for events of a replication beyond those expected before; it goes on working where it `works`.
    fn expect(&mut self, id: &str, kinds_then: &[&'static str], works: bool) {
        let expected = self.expected.entry(id.to_owned()).or_default();
        expected.extend(kinds_then);
        let expected = expected.clone();
        let until = sys::now() + WAIT_MAX;
        let limit = if works { Duration::from_millis(150) } else { WAIT_MAX };
        loop {
            let there = |record: &Record| kinds(record, id).len() >= expected.len();
            if self.world.receiver.wait_until(limit, there) {
                break;
            }
            let found = self.world.receiver.look(|record| kinds(record, id));
            assert!(
                sys::now() < until,
                "`{id}`: expected {expected:?}, got {found:?}\n{}",
                self.world.transcript()
            );
            self.couch().replicate(DB, id, at_work(self.flavour)).unwrap();
        }
        self.check();
    }

    /// Fails unless exactly what was expected has been told, of everything.
    #[track_caller]
    fn check(&self) {
        let found = self.world.receiver.look(told);
        let found: BTreeMap<String, Vec<&str>> = found
            .iter()
            .map(|(id, all)| (id.clone(), all.iter().map(|one| one.kind.as_str()).collect()))
            .collect();
        let expected = self.expected.iter().filter(|(_, kinds)| !kinds.is_empty());
        let expected: BTreeMap<String, Vec<&str>> =
            expected.map(|(id, kinds)| (id.clone(), kinds.clone())).collect();
        assert_eq!(found, expected, "{}", self.world.transcript());
        self.world.assert_clean();
    }

    /// Looks on for a while and fails when something more is told.
    #[track_caller]
    pub(crate) fn settle(&self) {
        self.looks(4);
        self.check();
    }

    /// The last event of a replication.
    fn last(&self, id: &str) -> Value {
        self.world.receiver.look(told).remove(id).unwrap().pop().unwrap().body
    }
}

#[test]
fn a_whole_life_is_told_in_order() {
    on_each(&FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        for (at, name) in LIFE.iter().enumerate() {
            watched.step("edge", name);
            // Now and then time passes in which nothing changes.
            if at % 3 == 2 {
                watched.settle();
            }
        }
        watched.settle();
        let all = watched.world.receiver.look(told).remove("edge").unwrap();
        let mut before = &Value::Null;
        for one in &all {
            let data = &one.body["data"];
            // That it has recovered is no state of its own.
            if one.kind != "recovered" {
                assert_eq!(data["previous_state"], *before, "{flavour:?} {}", one.body);
                before = &data["state"];
            }
        }
    });
}

#[test]
fn a_crash_says_what_where_and_what_to_do() {
    on_each(&FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        for name in ["put", "run", "crash"] {
            watched.step("edge", name);
        }
        let body = watched.last("edge");
        let (data, replication) = (&body["data"], &body["data"]["replication"]);
        let url = watched.couch().url();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        assert!(text(&body["source"]).ends_with("/_replicator"), "{url}: {body}");
        assert_eq!(
            (&data["webhook"], &data["db"], &data["id"]),
            (&json!("sync"), &json!(DB), &json!("edge"))
        );
        assert_eq!(data["previous_state"], "running");
        assert_eq!(text(&replication["source"]).trim_end_matches('/'), "http://127.0.0.1:1/edge", "{body}");
        assert_eq!(text(&replication["target"]).trim_end_matches('/'), "http://127.0.0.1:1/x", "{body}");
        assert_eq!(replication["error_class"], "unreachable", "{body}");
        assert!(text(&replication["error"]).contains("connection refused"), "{body}");
        assert!(text(&replication["error_raw"]).contains("econnrefused"), "{body}");
        assert!(!text(&replication["hint"]).is_empty(), "{body}");
        assert_eq!(replication["error_count"], if flavour == Flavour::V1 { 1 } else { 3 }, "{body}");
        assert!(!body.to_string().contains("pass@"), "{body}");
        // A row in `error` has neither source nor target; they are the document's.
        watched.couch().replicate(DB, "edge", Replication::failing(Error, "nxdomain", 1)).unwrap();
        if flavour != Flavour::V1 {
            watched.expect("edge", &["error"], false);
            let target = text(&watched.last("edge")["data"]["replication"]["target"]);
            assert_eq!(target.trim_end_matches('/'), "http://127.0.0.1:1/x");
        }
    });
}

#[test]
fn flapping_tells_nothing() {
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        watched.step("edge", "put");
        watched.step("edge", "run");
        let flaps = (0..30).map(|n| if n % 2 == 0 { Replication::new(Pending) } else { at_work(flavour) });
        watched.couch().replicate_by_listing(DB, "edge", flaps).unwrap();
        while watched.couch().n_states_to_come(DB, "edge") > 0 {
            watched.looks(1);
        }
        watched.settle();
        watched.step("edge", "wait");
        watched.settle();
    });
}

#[test]
fn a_row_that_is_missing_is_no_removal() {
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        watched.step("edge", "put");
        watched.step("edge", "run");
        watched.couch().hide_replication(DB, "edge", 5);
        watched.looks(7);
        watched.settle();
        // As while the server starts.
        watched.couch().forget_replications();
        watched.settle();
        watched.couch().replicate(DB, "edge", at_work(flavour)).unwrap();
        watched.settle();
        watched.step("edge", "delete");
    });
}

#[test]
fn last_updated_moves_and_nothing_is_told() {
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        watched.step("edge", "put");
        watched.step("edge", "crash");
        for n in 0..5 {
            let moved = Some(jiff::Timestamp::from_second(2_000_000_000 + n).unwrap());
            let again = Replication { last_updated: moved, ..Replication::failing(Crashing, REFUSED, 4) };
            watched.couch().replicate(DB, "edge", again).unwrap();
            watched.looks(2);
        }
        // It tries, and that is no recovery.
        let trying = Replication { last_updated: None, ..Replication::new(Running) };
        watched.couch().replicate(DB, "edge", trying).unwrap();
        watched.settle();
        watched.couch().replicate(DB, "edge", Replication::failing(Crashing, REFUSED, 5)).unwrap();
        watched.settle();
    });
}

#[test]
fn what_changed_while_we_were_down_is_told_once() {
    on_each(&FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        for id in ["crashes", "stays", "goes", "ends"] {
            watched.step(id, "put");
            watched.step(id, "run");
        }
        watched.looks(2);
        watched.world.daemon.kill();
        let crash = step(&watched.world.couch, flavour, "crashes", "crash");
        let gone = step(&watched.world.couch, flavour, "goes", "delete");
        let done = step(&watched.world.couch, flavour, "ends", "complete");
        step(&watched.world.couch, flavour, "comes", "put");
        let run = step(&watched.world.couch, flavour, "comes", "run");
        watched.world.daemon.start_again();
        for (id, kinds) in [("crashes", crash), ("goes", gone), ("ends", done), ("comes", run)] {
            watched.expected.entry(id.to_owned()).or_default().extend(kinds);
        }
        let n: usize = watched.expected.values().map(Vec::len).sum();
        watched
            .world
            .wait("events after the start", |record| told(record).values().map(Vec::len).sum::<usize>() >= n);
        watched.settle();
        watched.world.daemon.kill();
        watched.world.daemon.start_again();
        watched.settle();
    });
}

#[test]
fn a_webhook_that_starts_now_is_told_of_changes_alone() {
    on_each(&FLAVOURS, |flavour| {
        let standin = couch(flavour, &[DB]);
        for id in ["a", "b"] {
            put(&standin, id);
            standin.replicate(DB, id, at_work(flavour)).unwrap();
        }
        let mut watched = Watched::start_on(standin, flavour, &format!("{ALL}\nsince = now"));
        watched.settle();
        watched.step("a", "crash");
        watched.step("c", "put");
        watched.step("c", "run");
        watched.settle();
    });
}

#[test]
fn who_stands_still_or_cannot_write_is_told_of_once() {
    on_each(&FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, &format!("{ALL}\nstalled_after = 3s"));
        let (behind, end) = if flavour == Flavour::V1 { ("4", "9") } else { ("4-g1AAAAC", "9-g1AAAAC") };
        let state = |docs_read: u64, doc_write_failures: u64| {
            let progress = Progress {
                docs_read,
                doc_write_failures,
                changes_pending: Some(5),
                source_seq: end.into(),
                checkpointed_source_seq: behind.into(),
                ..Progress::default()
            };
            Replication::with_progress(Running, progress)
        };
        watched.step("edge", "put");
        let say = |watched: &Watched, one| watched.couch().replicate(DB, "edge", one).unwrap();
        say(&watched, state(1, 0));
        watched.expect("edge", &["running", "stalled"], false);
        watched.settle();
        say(&watched, state(2, 0));
        watched.looks(2);
        watched.check();
        say(&watched, state(2, 2));
        watched.expect("edge", &["write_failures"], false);
        assert_eq!(watched.last("edge")["data"]["progress"]["doc_write_failures"], 2);
        say(&watched, state(3, 2));
        watched.expect("edge", &["stalled"], false);
        watched.settle();
        say(&watched, state(3, 5));
        watched.expect("edge", &["write_failures", "stalled"], false);
    });
}

#[test]
fn a_document_that_cannot_work_is_told_of_once() {
    on_each(&FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        let bad = json!({"source": "http://h/a", "filter": "a/b"});
        watched.couch().put_replication(DB, "bad", &bad).unwrap();
        watched.expect("bad", &["invalid"], false);
        assert!(!watched.last("bad")["data"]["findings"].as_array().unwrap().is_empty());
        watched.world.daemon.kill();
        watched.world.daemon.start_again();
        watched.settle();
        watched.step("bad", "edit");
        watched.settle();
    });
}

#[test]
fn a_failed_replication_is_submitted_again_as_often_as_asked_for() {
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let mut watched = Watched::start(flavour, &format!("{ALL}\nretry_failed = 1, 1s"));
        watched.step("edge", "put");
        watched.step("edge", "fail");
        watched.expect("edge", &["resubmitted"], false);
        let saved = |seen: &Seen<'_>| {
            seen.winner(DB, "edge").is_some_and(|winner| !winner.json.contains("_replication_state"))
        };
        watched.world.wait_couch("document without a state", saved);
        watched.settle();
        let reason = "db_not_found: could not open http://127.0.0.1:1/x/";
        // CouchDB's times have seconds: the next failure is another one when its time is.
        sys::sleep(Duration::from_millis(1_100));
        watched.couch().replicate(DB, "edge", Replication::failing(Failed, reason, 1)).unwrap();
        watched.expect("edge", &["failed"], false);
        watched.settle();
        watched.step("edge", "edit");
        watched.step("edge", "recover");
    });
}

#[test]
fn jobs_of_replicate_are_told_of_without_a_document() {
    let id = "0123456789abcdef0123456789abcdef+continuous";
    let key = format!("_replicate/{id}");
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let mut watched = Watched::start(flavour, ALL);
        let say = |watched: &Watched, one| {
            watched.couch().replicate_transient(id, "http://h/a", "http://u:p@h/b", one);
        };
        say(&watched, Replication::new(Running));
        watched.expect(&key, &["running"], false);
        let body = watched.last(&key);
        assert_eq!(body["data"]["id"], Value::Null);
        assert_eq!(body["data"]["replication"]["target"], "http://h/b/");
        say(&watched, Replication::new(Completed));
        watched.expect(&key, &["removed"], false);
        watched.settle();
    });
}

#[test]
fn other_replicator_databases_and_the_default_events() {
    let db = "team/_replicator";
    on_each(&FLAVOURS, |flavour| {
        let lines = format!("watch = replications\ndb = {db}\npoll_interval = 100ms");
        let mut watched = Watched::start_on(couch(flavour, &[db]), flavour, &lines);
        put_in(watched.couch(), db, "edge");
        let say = |watched: &Watched, one| watched.couch().replicate(db, "edge", one).unwrap();
        say(&watched, at_work(flavour));
        watched.looks(3);
        say(&watched, Replication::failing(Crashing, REFUSED, 1));
        let crash = if flavour == Flavour::V1 { "error" } else { "crashing" };
        watched.expect("edge", &[crash], false);
        assert_eq!(watched.last("edge")["data"]["db"], db);
        say(&watched, Replication::new(Completed));
        watched.expect("edge", &["completed", "recovered"], false);
        watched.settle();
    });
}

#[test]
fn a_written_state_wakes_us_long_before_the_next_look() {
    on_each(&FLAVOURS, |flavour| {
        let lines = "watch = replications\npoll_interval = 1h\nconfirm_polls = 1";
        let mut watched = Watched::start(flavour, lines);
        watched.world.daemon.wait_for_log("webhook `sync`");
        watched.step("edge", "put");
        watched.step("edge", "fail");
    });
}
