//! Databases that are made again, go back, appear late or lose what we keep in them: nothing is lost, and it is said.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Reaction;
use serde_json::{Value, json};

use crate::http_client::ask;
use crate::world::{
    Daemon, FLAVOURS, Ini, STATE_DB, World, checkpoint, couch, has_all, letters, on_each, receiver, revs,
    write,
};

/// What is said when a database was deleted and made again.
const RECREATED: &str = "database.recreated";
/// What is said of a checkpoint that we did not write.
const NOT_BELIEVED: &str = "is not believed";
/// `METHOD /path` of what stores the checkpoint of `World`'s webhook.
const PUT_CHECKPOINT: &str = "PUT /orders/_local/couch-hookd.orders";

/// Deletes the database and makes it again with five documents, at once.
fn recreate(couch: &StandIn, db: &str, prefix: &str) {
    couch.delete_db(db);
    couch.create_db(db);
    for i in 0..5 {
        couch.put(db, &format!("{prefix}{i}"), &json!({"n": i})).unwrap();
    }
}

/// Waits until the position behind everything that was read is stored.
fn wait_for_checkpoint(world: &World, db: &str) {
    world.wait_couch("checkpoint at the end", |seen| {
        let json = seen.local(db, "couch-hookd.orders").unwrap_or_default();
        let checkpoint: Value = serde_json::from_str(&json).unwrap_or_default();
        let seq = &checkpoint["through_seq"];
        let number = seq.as_str().map_or_else(|| seq.to_string(), str::to_owned);
        number.split('-').next().and_then(|n| n.parse().ok()) == Some(seen.update_seq(db))
    });
}

/// The ids under which each revision was accepted.
fn ids_of_revs(world: &World) -> BTreeMap<(String, String), BTreeSet<String>> {
    let mut ids = BTreeMap::<_, BTreeSet<String>>::new();
    world.receiver.look(|record| {
        for one in record.deliveries().iter().filter(|one| one.accepted()) {
            let key = (one.doc_id().to_owned(), one.rev().to_owned());
            ids.entry(key).or_default().insert(one.webhook_id.clone());
        }
    });
    ids
}

#[test]
fn a_database_made_again_is_read_from_its_beginning() {
    on_each(&FLAVOURS, |flavour| {
        let mut world = World::start(flavour, "since = now");
        world.daemon.wait_for_log("starts for the first time");
        write(&world.couch, "orders", 8);
        world.wait_for_all("orders");
        wait_for_checkpoint(&world, "orders");
        recreate(&world.couch, "orders", "running");
        world.wait_for_all("orders");
        wait_for_checkpoint(&world, "orders");
        assert_eq!(world.daemon.n_logged(RECREATED), 1, "{}", world.transcript());

        world.daemon.kill();
        recreate(&world.couch, "orders", "down");
        world.daemon.start_again();
        world.wait_for_all("orders");
        wait_for_checkpoint(&world, "orders");
        world.couch.put("orders", "last", &json!({})).unwrap();
        world.wait_for_all("orders");
        assert_eq!(world.daemon.n_logged(RECREATED), 2, "{}", world.transcript());
        assert_eq!(world.receiver.look(|record| record.n_accepted()), 8 + 5 + 5 + 1);
    });
}

#[test]
fn equal_documents_of_a_database_made_again_are_told_under_other_ids() {
    on_each(&FLAVOURS, |flavour| {
        let world = World::start(flavour, "since = now");
        world.daemon.wait_for_log("starts for the first time");
        world.wait_couch("waiting feed", |seen| seen.n_open_feeds() == 1);
        // The checkpoint that is on its way arrives in the new database.
        let kind = FaultKind::Late(Duration::from_millis(500));
        let before = world.couch.n_requests(PUT_CHECKPOINT);
        world.couch.quirks(|quirks| {
            quirks.faults.push(Fault { request: PUT_CHECKPOINT.to_owned(), times: 1, kind });
        });
        recreate(&world.couch, "orders", "d");
        recreate(&world.couch, "orders", "d");
        world.wait_couch("a checkpoint on its way", |seen| seen.n_requests(PUT_CHECKPOINT) > before);
        world.wait("the first five", |record| has_all(record, "orders", &revs(&world.couch, "orders")));
        let told = world.receiver.look(|record| record.n_accepted());
        recreate(&world.couch, "orders", "d");
        let revs = revs(&world.couch, "orders");
        world.wait("five more", |record| record.n_accepted() >= told + 5);
        for ((doc_id, rev), ids) in ids_of_revs(&world) {
            assert_eq!(revs[&doc_id], rev);
            assert!(ids.len() >= 2, "{doc_id} {rev}: {ids:?}\n{}", world.transcript());
        }
        assert_eq!(ids_of_revs(&world).len(), 5);
    });
}

#[test]
fn a_database_that_appears_later_is_read_from_its_beginning() {
    on_each(&FLAVOURS, |flavour| {
        let world = World::start_on(couch(flavour, &[]), receiver(), "since = now");
        world.daemon.wait_for_log("database `orders` does not exist; waiting for it");
        recreate(&world.couch, "orders", "d");
        world.wait_for_all("orders");
        assert_eq!(world.daemon.n_logged("does not exist"), 1, "{}", world.transcript());
        assert_eq!(world.daemon.n_logged(RECREATED), 0, "{}", world.transcript());
    });
}

#[test]
fn since_is_asked_once() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders", "other"]);
        write(&couch, "orders", 3);
        write(&couch, "other", 3);
        let mut world = World::start_on(couch, receiver(), "since = now\ndb = orders, other");
        world.daemon.wait_for_log("tells changes of `orders`, `other` from now on");
        world.couch.put("orders", "new", &json!({})).unwrap();
        world.wait("the new one", |record| record.n_accepted() == 1);
        world.daemon.kill();
        let ini = Ini::new(&world.couch.url());
        let ini = ini.webhook("orders", &world.receiver.url(), "since = 0\ndb = orders, other");
        world.daemon.configure(&ini.text());
        // Written while nobody looks.
        world.couch.put("other", "new", &json!({})).unwrap();
        world.daemon.start_again();
        world.wait("the second new one", |record| record.accepted_rev("other", "new").is_some());
        world.couch.put("orders", "last", &json!({})).unwrap();
        world.wait("the last one", |record| record.accepted_rev("orders", "last").is_some());
        let told = world.receiver.look(|record| record.n_accepted());
        // The kill may have come before the first checkpoint.
        assert!((3..=4).contains(&told), "{told}\n{}", world.transcript());
        world.assert_clean();

        let all =
            Ini::new(&world.couch.url()).webhook("all", &world.receiver.url(), "since = 0\ndb = orders");
        let daemon = Daemon::start(&all);
        let n_told = |record: &couch_hookd::standin::record::Record| {
            record.deliveries().iter().filter(|one| one.webhook == "all" && one.accepted()).count()
        };
        world.wait("all five", |record| n_told(record) == 5);
        drop(daemon);
    });
}

#[test]
fn a_checkpoint_of_a_server_without_creation_times_holds_after_its_upgrade() {
    let couch = couch(Flavour::V3, &["orders"]);
    couch.quirks(|quirks| quirks.no_creation_time = true);
    let mut world = World::start_on(couch, receiver(), "");
    write(&world.couch, "orders", 5);
    world.wait_for_all("orders");
    wait_for_checkpoint(&world, "orders");
    world.daemon.kill();
    world.couch.quirks(|quirks| quirks.no_creation_time = false);
    world.daemon.start_again();
    world.couch.put("orders", "new", &json!({})).unwrap();
    world.wait_for_all("orders");
    assert_eq!(world.receiver.look(|record| record.n_accepted()), 6, "{}", world.transcript());
    wait_for_checkpoint(&world, "orders");
    world.daemon.kill();
    // A lost shard shows everything again: with the ids of before the upgrade, or `assert_clean` says so.
    world.couch.quirks(|quirks| quirks.rewinds = 1);
    world.daemon.start_again();
    world.wait("everything again", |record| record.n_accepted() == 12);
    world.assert_clean();
    assert_eq!(world.daemon.n_logged(RECREATED), 0, "{}", world.transcript());
}

#[test]
fn a_checkpoint_that_is_not_ours_is_said_and_not_believed() {
    on_each(&FLAVOURS, |flavour| {
        let mut world = World::start(flavour, "");
        write(&world.couch, "orders", 5);
        world.wait_for_all("orders");
        wait_for_checkpoint(&world, "orders");
        let mut forged = checkpoint(&world.couch, "orders", "orders").unwrap();
        // In the name of whoever may write documents: everything that follows would be skipped.
        for (n_before, damage) in [(5, true), (10, false)] {
            world.daemon.kill();
            let rev = checkpoint(&world.couch, "orders", "orders").unwrap()["_rev"].clone();
            forged["_rev"] = rev.clone();
            forged["through_seq"] = json!(1_000_000);
            let body = if damage { forged.clone() } else { json!({"_rev": rev, "through_seq": 7}) };
            let path = "/orders/_local/couch-hookd.orders";
            let reply = ask(&world.couch.url(), "PUT", path, &body.to_string());
            assert_eq!(reply.status, 201, "{reply:?}");
            world.daemon.start_again();
            world.wait("everything again", |record| record.n_accepted() == n_before + 5);
            wait_for_checkpoint(&world, "orders");
        }
        assert_eq!(world.daemon.n_logged(NOT_BELIEVED), 2, "{}", world.transcript());
        let line = world.daemon.wait_for_log(NOT_BELIEVED);
        assert!(line.contains("ERROR") && line.contains("webhook `orders`, database `orders`"), "{line}");
        world.assert_clean();
    });
}

#[test]
fn without_its_state_db_everything_is_told_again() {
    on_each(&FLAVOURS, |flavour| {
        let mut world = World::start(flavour, "since = now\nretry_schedule = 100ms\ndead_letter_after = 1");
        world.daemon.wait_for_log("starts for the first time");
        world
            .receiver
            .answer(|delivery| Reaction::Status(if delivery.doc_id() == "bad" { 422 } else { 200 }));
        write(&world.couch, "orders", 5);
        world.wait_for_all("orders");
        world.couch.delete_db(STATE_DB);
        // What needs no dead letter goes on; what needs one is neither lost nor passed.
        world.couch.put("orders", "bad", &json!({})).unwrap();
        world.couch.put("orders", "good", &json!({})).unwrap();
        world.daemon.wait_for_log("a dead letter could not be stored");
        world.wait("the good one", |record| record.accepted_rev("orders", "good").is_some());

        world.daemon.kill();
        world.couch.delete_db(STATE_DB);
        write(&world.couch, "orders", 2);
        world.daemon.start_again();
        world.wait_couch("the letter", |seen| {
            let docs = seen.winners(STATE_DB);
            docs.values().any(|winner| winner.json.contains("\"doc_id\":\"bad\""))
        });
        // The key that signed the checkpoint is gone with it.
        world.daemon.wait_for_log(NOT_BELIEVED);
        let mut revs = revs(&world.couch, "orders");
        revs.remove("bad");
        world.wait("all others", |record| has_all(record, "orders", &revs));
        world.assert_clean();
    });
}

/// One refused document among twenty, its letter stored and passed.
fn with_a_letter() -> World {
    let lines = "retry_schedule = 100ms\ndead_letter_after = 1";
    let world = World::start_on(couch(Flavour::V1, &["orders"]), receiver(), lines);
    world.receiver.answer(|delivery| Reaction::Status(if delivery.doc_id() == "d7" { 422 } else { 200 }));
    world.daemon.wait_for_log("starts for the first time");
    write(&world.couch, "orders", 20);
    world.wait_couch("letter", |seen| seen.winners(STATE_DB).keys().any(|id| id.starts_with("msg_")));
    wait_for_checkpoint(&world, "orders");
    world
}

/// As the crash of a CouchDB 1.x that had not committed: `n` documents are gone, their numbers used again.
fn crash(world: &World, n: usize) {
    let before = world.couch.update_seq("orders");
    world.couch.crash_losing(STATE_DB, 1_000);
    assert_eq!(world.couch.crash_losing("orders", n), n);
    for i in 0..n {
        world.couch.put("orders", &format!("again{i}"), &json!({"n": i})).unwrap();
    }
    assert_eq!(world.couch.update_seq("orders"), before);
}

#[test]
fn a_couchdb_1_that_is_killed_after_a_dead_letter_keeps_it() {
    for daemon_runs in [true, false] {
        let mut world = with_a_letter();
        if !daemon_runs {
            world.daemon.kill();
        }
        crash(&world, 5);
        world.couch.start_again().unwrap();
        if !daemon_runs {
            world.daemon.start_again();
        }
        let mut winners = revs(&world.couch, "orders");
        winners.remove("d7");
        world.wait("what was written after the crash", |record| has_all(record, "orders", &winners));
        world.assert_clean();
        let ids: Vec<_> = letters(&world.couch).iter().map(|letter| letter["doc_id"].clone()).collect();
        assert_eq!(ids, ["d7"], "{}", world.transcript());
    }
}

#[test]
fn what_a_first_start_stores_outlives_a_killed_couchdb_1() {
    for (since, n_told) in [("since = 0", 6), ("since = now", 1)] {
        let couch = couch(Flavour::V1, &["orders"]);
        write(&couch, "orders", 5);
        let world = World::start_on(couch, receiver(), since);
        world.daemon.wait_for_log("starts for the first time");
        world.wait_couch("waiting feed", |seen| seen.n_open_feeds() == 1);
        if n_told > 1 {
            world.wait_for_all("orders");
        }
        world.couch.crash_losing("orders", 0);
        world.couch.put("orders", "new", &json!({})).unwrap();
        world.couch.start_again().unwrap();
        world.wait("the new one", |record| record.accepted_rev("orders", "new").is_some());
        wait_for_checkpoint(&world, "orders");
        world.assert_clean();
        let told = world.receiver.look(|record| record.n_accepted());
        assert_eq!((told, world.daemon.n_logged(RECREATED)), (n_told, 0), "{}", world.transcript());
    }
}

#[test]
fn a_couchdb_1_that_went_back_is_read_again() {
    for daemon_runs in [true, false] {
        let mut world = World::start(Flavour::V1, "");
        write(&world.couch, "orders", 10);
        world.wait_for_all("orders");
        wait_for_checkpoint(&world, "orders");
        assert_eq!(ask(&world.couch.url(), "POST", "/orders/_ensure_full_commit", "").status, 201);
        for i in 0..10 {
            world.couch.put("orders", &format!("e{i}"), &json!({})).unwrap();
        }
        world.wait_for_all("orders");
        if !daemon_runs {
            world.daemon.kill();
        }
        crash(&world, 10);
        world.couch.start_again().unwrap();
        if !daemon_runs {
            world.daemon.start_again();
        }
        world.wait_for_all("orders");
        let again = world.receiver.look(|record| record.n_accepted()) - 30;
        assert_eq!(again, 0, "the stored checkpoint went back with the database\n{}", world.transcript());
    }
}

#[test]
fn a_checkpoint_that_waited_while_couchdb_1_was_started_again_is_not_stored() {
    // One thread stores for all, ten at once and then ten a second: behind one that hangs, and others, what `orders`
    // has to store is tried when the server is back.
    let others: Vec<String> = (0..14).map(|i| format!("other{i}")).collect();
    let mut dbs: Vec<&str> = others.iter().map(String::as_str).collect();
    dbs.push("orders");
    let (couch, receiver) = (couch(Flavour::V1, &dbs), receiver());
    let ini = dbs.iter().fold(Ini::new(&couch.url()), |ini, db| ini.webhook(db, &receiver.url(), ""));
    let world = World { daemon: Daemon::start(&ini), couch, receiver };
    write(&world.couch, "orders", 10);
    world.wait_for_all("orders");
    wait_for_checkpoint(&world, "orders");
    assert_eq!(ask(&world.couch.url(), "POST", "/orders/_ensure_full_commit", "").status, 201);
    world.wait_couch("waiting feeds", |seen| seen.n_open_feeds() == dbs.len());
    let request = "PUT /other0/_local/couch-hookd.other0".to_owned();
    let before = world.couch.n_requests(&request);
    world.couch.quirks(|quirks| {
        quirks.faults.push(Fault { request: request.clone(), times: 1, kind: FaultKind::Hang });
    });
    world.couch.put("other0", "d", &json!({})).unwrap();
    world.wait_couch("a hanging checkpoint", |seen| seen.n_requests(&request) > before);
    for db in &others {
        world.couch.put(db, "e", &json!({})).unwrap();
    }
    for i in 0..5 {
        world.couch.put("orders", &format!("e{i}"), &json!({})).unwrap();
    }
    dbs.iter().for_each(|db| world.wait_for_all(db));
    // Longer than a quiet subscription waits before it stores; nothing shows that it waits.
    let _ = crossbeam_channel::after(Duration::from_millis(1_200)).recv();
    crash(&world, 5);
    world.couch.start_again().unwrap();
    dbs.iter().for_each(|db| world.wait_for_all(db));
}
