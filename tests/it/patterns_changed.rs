//! Patterns that are changed, and commands about databases that are found: what was not told yet is told, what is not
//! wanted any more is left alone, and no database is read twice.

use std::collections::BTreeMap;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::sys;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::host::WAIT_MAX;
use crate::world::{Daemon, Ini, STATE_DB, World, couch, letters, receiver};

/// So that a sweep takes a moment, every second.
const QUICK: &str = "sweep_interval = 1s\nsweep_rate = 1000";

fn ini(couch: &StandIn, receiver: &Receiver, lines: &str) -> Ini {
    Ini::new(&couch.url()).hookd(QUICK).webhook("tenants", &receiver.url(), lines)
}

fn start(couch: StandIn, receiver: Receiver, lines: &str) -> World {
    let ini = ini(&couch, &receiver, lines);
    World { daemon: Daemon::start(&ini), couch, receiver }
}

/// Another configuration, from now on.
fn configure(world: &World, lines: &str) {
    world.daemon.configure(&ini(&world.couch, &world.receiver, lines).text());
    world.daemon.signal(Signal::SIGHUP);
}

fn wait_until_started(world: &World) {
    world.daemon.wait_for_log("webhook `tenants` starts for the first time: tells changes");
}

/// Waits until two more walks over all databases have come to their end.
fn wait_for_walks(world: &World) {
    let n = world.couch.n_requests("GET /_all_dbs");
    world.wait_couch("more walks", |seen| seen.n_requests("GET /_all_dbs") >= n + 6);
}

/// Runs a command beside the daemon.
#[track_caller]
fn command(world: &World, arguments: &[&str]) -> String {
    let ini = world.daemon.files().into_iter().find(|path| path.ends_with("hookd.ini")).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
        .args(arguments)
        .arg("--config")
        .arg(ini)
        .output()
        .unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}\n{}", world.transcript());
    String::from_utf8(output.stdout).unwrap()
}

/// How often each document of a database was accepted.
fn counts(world: &World, db: &str) -> BTreeMap<String, usize> {
    world.receiver.look(|record| {
        let mut counts = BTreeMap::new();
        for one in record.deliveries().iter().filter(|one| one.accepted() && one.db() == db) {
            *counts.entry(one.doc_id().to_owned()).or_insert(0) += 1;
        }
        counts
    })
}

fn hints_off(couch: &StandIn) {
    couch.quirks(|quirks| quirks.drop_updates = true);
}

#[test]
fn a_place_set_in_a_named_database_makes_it_no_found_one() {
    let couch = couch(Flavour::V3, &["orders", "tenant-a"]);
    let lines = "db = orders, tenant-*\nsince = 0";
    let world = start(couch, receiver(), lines);
    (0..20).for_each(|n| drop(world.couch.put("orders", &format!("d{n}"), &json!({})).unwrap()));
    world.wait_for_all("orders");
    command(&world, &["seek", "tenants", "--yes", "--db", "orders", "--to", "0"]);
    world.wait("everything once more", |record| record.n_accepted() >= 40);
    // A second reader would have its own checkpoint and its own turn.
    wait_for_walks(&world);
    world.couch.put("orders", "last", &json!({})).unwrap();
    world.wait("the last one", |record| record.accepted_rev("orders", "last").is_some());
    wait_for_walks(&world);
    let counts = counts(&world, "orders");
    let wrong: Vec<_> = counts.iter().filter(|(id, n)| **n != if *id == "last" { 1 } else { 2 }).collect();
    assert!(wrong.is_empty(), "{wrong:?}\n{}", world.transcript());
    world.assert_clean();
}

#[test]
fn what_a_pattern_leaves_out_later_is_left_alone() {
    let couch = couch(Flavour::V3, &["tenant-a", "tenant-b", "tenant-c"]);
    hints_off(&couch);
    let world = start(couch, receiver(), "db = tenant-*\nsince = now");
    wait_until_started(&world);
    for db in ["tenant-a", "tenant-b", "tenant-c"] {
        world.couch.put(db, "before", &json!({})).unwrap();
    }
    world.wait("document of each", |record| record.n_accepted() == 3);
    // One of them was set to a place, too.
    command(&world, &["seek", "tenants", "--yes", "--db", "tenant-c", "--to", "now"]);
    configure(&world, "db = tenant-*, !tenant-b, !tenant-c\nsince = now");
    world.daemon.wait_for_log("goes on with changes of `tenant-*`, `!tenant-b`, `!tenant-c`");
    for db in ["tenant-a", "tenant-b", "tenant-c"] {
        world.couch.put(db, "after", &json!({})).unwrap();
    }
    world.wait("what is wanted", |record| record.accepted_rev("tenant-a", "after").is_some());
    wait_for_walks(&world);
    for db in ["tenant-b", "tenant-c"] {
        let told = world.receiver.look(|record| record.accepted_rev(db, "after").is_some());
        assert!(!told, "`{db}` is told of\n{}", world.transcript());
    }
    // Wanted again, they go on from where they were left.
    configure(&world, "db = tenant-*\nsince = now");
    for db in ["tenant-b", "tenant-c"] {
        world.wait("what was left out", |record| record.accepted_rev(db, "after").is_some());
    }
    world.assert_clean();
}

#[test]
fn a_database_that_came_just_before_the_pattern_was_changed_is_told_from_its_beginning() {
    for flavour in [Flavour::V1, Flavour::V3] {
        let couch = couch(flavour, &["tenant-a", "other-a"]);
        hints_off(&couch);
        let mut world = start(couch, receiver(), "db = tenant-*, !tenant-test\nsince = now");
        wait_until_started(&world);
        world.daemon.kill();
        world.couch.create_db("tenant-new");
        world.couch.put("tenant-new", "first", &json!({})).unwrap();
        world.couch.put("other-a", "before", &json!({})).unwrap();
        let lines = "db = tenant-*, other-*\nsince = now";
        world.daemon.configure(&ini(&world.couch, &world.receiver, lines).text());
        world.daemon.start_again();
        world.daemon.wait_for_log("goes on with changes of");
        world.couch.put("other-a", "after", &json!({})).unwrap();
        world.wait("what came last", |record| record.accepted_rev("other-a", "after").is_some());
        world.wait("first document", |record| record.accepted_rev("tenant-new", "first").is_some());
        assert!(!counts(&world, "other-a").contains_key("before"), "it was not watched by then");
        world.assert_clean();
    }
}

#[test]
fn what_waits_in_a_database_that_was_named_is_told_when_it_is_found_by_pattern() {
    let couch = couch(Flavour::V3, &["tenant-a"]);
    hints_off(&couch);
    let mut world = start(couch, receiver(), "db = tenant-a\nsince = now");
    wait_until_started(&world);
    world.couch.put("tenant-a", "first", &json!({})).unwrap();
    world.wait("first", |record| record.n_accepted() == 1);
    world.receiver.answer(|_| Reaction::Status(503));
    world.couch.put("tenant-a", "waits", &json!({})).unwrap();
    world.wait("refusal", |record| record.deliveries().iter().any(|one| one.doc_id() == "waits"));
    world.daemon.kill();
    world.receiver.answer(|_| Reaction::Status(200));
    world.daemon.configure(&ini(&world.couch, &world.receiver, "db = tenant-*\nsince = now").text());
    world.daemon.start_again();
    world.wait("what waited", |record| record.accepted_rev("tenant-a", "waits").is_some());
    world.assert_clean();
}

#[test]
fn a_first_start_that_was_killed_loses_nothing_of_what_it_had_begun_with() {
    let couch = couch(Flavour::V3, &[]);
    hints_off(&couch);
    (0..30).for_each(|n| couch.create_db(&format!("tenant-{n:02}")));
    let receiver = receiver();
    let lines = "db = tenant-*\nsince = now";
    let slow = Ini::new(&couch.url()).hookd("sweep_interval = 1s\nsweep_rate = 5").webhook(
        "tenants",
        &receiver.url(),
        lines,
    );
    let mut world = World { daemon: Daemon::start(&slow), couch, receiver };
    world.wait_couch("first starting points", |seen| {
        seen.n_requests("PUT /tenant-05/_local/couch-hookd.tenants") > 0
    });
    world.daemon.kill();
    // It has its starting point: what comes now is behind it.
    world.couch.put("tenant-05", "between", &json!({})).unwrap();
    world.daemon.configure(&ini(&world.couch, &world.receiver, lines).text());
    world.daemon.start_again();
    world.wait("what came between", |record| record.accepted_rev("tenant-05", "between").is_some());
    world.assert_clean();
}

#[test]
fn a_database_that_couchdb_cannot_open_keeps_no_other_from_being_looked_at() {
    for (flavour, single) in [(Flavour::V1, true), (Flavour::V3, true)] {
        let couch = couch(flavour, &["tenant-a", "tenant-b", "tenant-c"]);
        hints_off(&couch);
        let broken = |request: &str| Fault {
            request: request.to_owned(),
            times: u32::MAX,
            kind: FaultKind::Status(500),
        };
        couch.quirks(|quirks| {
            quirks.no_dbs_info = single;
            quirks.faults.push(broken("GET /tenant-b?"));
        });
        let world = start(couch, receiver(), "db = tenant-*\nsince = 0");
        for db in ["tenant-a", "tenant-c"] {
            world.couch.put(db, "doc", &json!({})).unwrap();
            world.wait("document", |record| record.accepted_rev(db, "doc").is_some());
        }
        world.couch.quirks(|quirks| quirks.faults.clear());
        world.couch.put("tenant-b", "doc", &json!({})).unwrap();
        world.wait_long(WAIT_MAX * 3, "document of what was broken", |record| {
            record.accepted_rev("tenant-b", "doc").is_some()
        });
        world.assert_clean();
    }
}

#[test]
fn a_place_that_couchdb_does_not_know_any_more_is_no_end() {
    let couch = couch(Flavour::V3, &["tenant-a"]);
    let mut world = start(couch, receiver(), "db = tenant-*\nsince = 0");
    world.couch.put("tenant-a", "first", &json!({})).unwrap();
    world.wait_for_all("tenant-a");
    world.wait_couch("place", |seen| seen.local("tenant-a", "couch-hookd.tenants").is_some());
    world.daemon.kill();
    world.couch.put("tenant-a", "second", &json!({})).unwrap();
    world.couch.quirks(|quirks| quirks.unknown_seqs = 1_000_000);
    world.daemon.start_again();
    world.wait("second", |record| record.accepted_rev("tenant-a", "second").is_some());
    world.daemon.wait_for_log("does not know the stored position; reading from the beginning");
}

#[test]
fn a_letter_of_a_found_database_that_is_gone_keeps_no_request_open() {
    let couch = couch(Flavour::V3, &["tenant-a", "tenant-b"]);
    let world = start(couch, receiver(), "db = tenant-*\nsince = now");
    wait_until_started(&world);
    world.receiver.answer(|one| Reaction::Status(if one.doc_id() == "bad" { 422 } else { 200 }));
    world.couch.put("tenant-a", "bad", &json!({})).unwrap();
    world.couch.put("tenant-b", "bad", &json!({})).unwrap();
    let deadline = sys::now() + WAIT_MAX;
    while letters(&world.couch).len() < 2 {
        assert!(sys::now() < deadline, "no letters\n{}", world.transcript());
        std::thread::yield_now();
    }
    world.couch.delete_db("tenant-a");
    wait_for_walks(&world);
    world.receiver.answer(|_| Reaction::Status(200));
    let (to, done) = crossbeam_channel::bounded(1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let said =
                command_any(&world, &["dead-letters", "replay", "--yes", "--webhook", "tenants", "--json"]);
            let _ = to.send(said);
        });
        let said = done.recv_timeout(WAIT_MAX * 2);
        if said.is_err() {
            // Whoever waits for it ends with the request.
            world.couch.delete(STATE_DB, &open_request(&world)).unwrap();
        }
        let said = said.unwrap_or_else(|_| panic!("the request stays open\n{}", world.transcript()));
        let answer = said.replace(' ', "");
        assert!(answer.contains("\"delivered\":1") && answer.contains("\"gone\":1"), "{said}");
    });
    world.wait("the other letter", |record| record.accepted_rev("tenant-b", "bad").is_some());
    // Nobody goes on looking for what is gone.
    wait_for_walks(&world);
    let n = world.couch.n_requests("GET /tenant-a");
    wait_for_walks(&world);
    assert_eq!(world.couch.n_requests("GET /tenant-a"), n, "{}", world.transcript());
}

/// As [`command`], whatever it comes to.
fn command_any(world: &World, arguments: &[&str]) -> String {
    let ini = world.daemon.files().into_iter().find(|path| path.ends_with("hookd.ini")).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
        .args(arguments)
        .arg("--config")
        .arg(ini)
        .output()
        .unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn open_request(world: &World) -> String {
    let docs = world.couch.winners(STATE_DB).into_iter();
    let mut requests = docs.map(|(id, _)| id).filter(|id| id.starts_with("request:"));
    requests.next().expect("it is there")
}
