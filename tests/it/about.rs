//! `watch = daemon` seen from outside: what is told about ourselves, once and again after kills, and never in a circle.

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Delivery, Record};
use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::world::{
    Daemon, Ini, STATE_DB, World, checkpoint, couch, letters, on_each, receiver, receiver_with, write,
};

const SHORT: &str = "retry_schedule = 100ms";

/// A [`World`] with a second webhook `ops` that watches the daemon.
struct Watched {
    world: World,
    ops: Receiver,
}

impl Watched {
    fn start(flavour: Flavour, lines: &str) -> Watched {
        let couch = couch(flavour, &["orders"]);
        let (orders, ops) = (receiver(), receiver_with(|options| options.keep_bodies = true));
        let ini = Ini::new(&couch.url()).webhook("orders", &orders.url(), SHORT).webhook(
            "ops",
            &ops.url(),
            &format!("watch = daemon\nsince = now\n{SHORT}\n{lines}"),
        );
        let world = World { daemon: Daemon::start(&ini), couch, receiver: orders };
        let watched = Watched { world, ops };
        watched.wait("daemon.started", "daemon", 1);
        watched
    }

    /// Waits until the `n`th event of a type about something was accepted; gives its body.
    fn wait(&self, event_type: &str, about: &str, n: usize) -> Value {
        let found = self.ops.wait_until(WAIT_MAX, |record| told(record, event_type, about).len() >= n);
        assert!(found, "no `{event_type}` about `{about}`\n{}", self.transcript());
        self.ops.look(|record| told(record, event_type, about)[n - 1].clone())
    }

    fn transcript(&self) -> String {
        format!("{}\n--- ops ---\n{}", self.world.transcript(), self.ops.look(Record::transcript))
    }
}

fn body(one: &Delivery) -> Value {
    serde_json::from_slice(&one.body).unwrap()
}

/// Accepted events of a type about something, each id once.
fn told(record: &Record, event_type: &str, about: &str) -> Vec<Value> {
    let accepted = record.deliveries().iter().filter(|one| one.accepted()).map(body);
    let mut found: Vec<Value> = Vec::new();
    for event in accepted.filter(|event| event["type"] == event_type && event["data"]["about"] == about) {
        if found.iter().all(|other| other["id"] != event["id"]) {
            found.push(event);
        }
    }
    found
}

#[test]
fn an_endpoint_that_fails_recovers_and_is_gone_is_told_elsewhere() {
    let watched = Watched::start(Flavour::V3, "");
    let (couch, orders) = (&watched.world.couch, &watched.world.receiver);
    write(couch, "orders", 3);
    watched.world.wait_for_all("orders");
    orders.refuse_connections(true).unwrap();
    write(couch, "orders", 3);
    let failing = watched.wait("webhook.failing", "orders", 1);
    assert_eq!(failing["data"]["reason"], "unreachable");
    assert_eq!(failing["data"]["webhook"], "ops");
    orders.refuse_connections(false).unwrap();
    watched.wait("webhook.recovered", "orders", 1);
    watched.world.wait_for_all("orders");
    orders.answer(|_| Reaction::Status(410));
    write(couch, "orders", 3);
    let gone = watched.wait("webhook.gone", "orders", 1);
    assert!(gone["data"]["message"].as_str().unwrap().contains("410"), "{gone}");
    assert_eq!(watched.ops.look(Record::n_unverified), 0);
    // Nothing is said of who says it.
    watched
        .ops
        .look(|record| assert!(record.deliveries().iter().all(|one| body(one)["data"]["about"] != "ops")));
}

#[test]
fn dead_letters_are_told_though_we_are_killed_before_they_can_be() {
    on_each(&crate::world::FLAVOURS, |flavour| {
        let mut watched = Watched::start(flavour, "");
        watched.ops.refuse_connections(true).unwrap();
        watched.world.receiver.answer(|one| Reaction::Status(if one.doc_id() == "d1" { 422 } else { 200 }));
        write(&watched.world.couch, "orders", 4);
        watched.world.daemon.wait_for_log("is a dead letter now (refused)");
        watched.world.daemon.kill();
        watched.ops.refuse_connections(false).unwrap();
        watched.world.daemon.start_again();
        let event = watched.wait("webhook.dead_letter", "orders", 1);
        let letter = &letters(&watched.world.couch)[0];
        let named = &event["data"]["dead_letter"];
        assert_eq!((&named["id"], &named["doc_id"]), (&letter["_id"], &json!("d1")));
        assert_eq!((&named["class"], &named["status"]), (&json!("refused"), &json!(422)));
        assert_eq!(event["timestamp"].as_str().unwrap()[..19], letter["stored_at"].as_str().unwrap()[..19]);
        // Read from the beginning, it is the same event.
        watched.world.daemon.kill();
        let local = format!("/{STATE_DB}/_local/couch-hookd.ops");
        let stored = checkpoint(&watched.world.couch, STATE_DB, "ops").unwrap_or_default();
        let path = format!("{local}?rev={}", stored["_rev"].as_str().unwrap_or_default());
        let deleted = crate::http_client::ask(&watched.world.couch.url(), "DELETE", &path, "");
        assert!(deleted.status < 300 || deleted.status == 404, "{deleted:?}");
        watched.world.daemon.start_again();
        let repeated = watched.ops.wait_until(WAIT_MAX, |record| {
            record.deliveries().iter().filter(|one| one.webhook_id == event["id"].as_str().unwrap()).count()
                >= 2
        });
        assert!(repeated, "{}", watched.transcript());
        watched.ops.look(|record| assert_eq!(told(record, "webhook.dead_letter", "orders").len(), 1));
    });
}

#[test]
fn a_feed_that_is_lost_and_found_is_told() {
    let watched = Watched::start(Flavour::V3, "events = feed.*, database.*, daemon.*");
    let couch = &watched.world.couch;
    write(couch, "orders", 3);
    watched.world.wait_for_all("orders");
    couch.delete_db("orders");
    let lost = watched.wait("feed.lost", "orders", 1);
    assert_eq!((&lost["data"]["db"], &lost["type"]), (&json!("orders"), &json!("feed.lost")));
    couch.create_db("orders");
    write(couch, "orders", 3);
    watched.world.wait_for_all("orders");
    watched.wait("database.recreated", "orders", 1);
    watched.wait("feed.recovered", "orders", 1);
    // `events` is a choice: nothing else came.
    watched.ops.look(|record| {
        let types = record.deliveries().iter().map(|one| body(one)["type"].as_str().unwrap().to_owned());
        let strange: Vec<String> = types.filter(|name| name.starts_with("webhook.")).collect();
        assert_eq!(strange, [""; 0]);
    });
}

#[test]
fn a_couchdb_that_is_away_is_told_from_memory() {
    let watched = Watched::start(Flavour::V3, "");
    let couch = &watched.world.couch;
    for n in 1..=2 {
        couch.stop();
        let lost = watched.wait("feed.lost", "couchdb", n);
        assert!(lost["data"]["message"].as_str().unwrap().contains("cannot be read"), "{lost}");
        couch.start_again().unwrap();
        watched.wait("feed.recovered", "couchdb", n);
    }
}

#[test]
fn every_start_is_told_once() {
    let mut watched = Watched::start(Flavour::V2, "");
    watched.world.daemon.kill();
    watched.world.daemon.start_again();
    let second = watched.wait("daemon.started", "daemon", 2);
    assert_eq!(second["data"]["version"], env!("CARGO_PKG_VERSION"));
}

/// Two that watch, both refused whatever they say: their letters are stored, and told to nobody.
#[test]
fn what_watches_is_not_watched() {
    let couch = couch(Flavour::V3, &["orders"]);
    let (orders, ops) = (receiver(), receiver_with(|options| options.keep_bodies = true));
    orders.answer(|one| Reaction::Status(if one.doc_id() == "d1" { 422 } else { 200 }));
    // Every second one is taken, so that the others are blamed and not the endpoint.
    ops.answer(|one| Reaction::Status(if body(one)["type"] == "webhook.dead_letter" { 422 } else { 200 }));
    let lines = format!("watch = daemon\nsince = now\n{SHORT}");
    let ini = Ini::new(&couch.url())
        .webhook("orders", &orders.url(), SHORT)
        .webhook("ops", &ops.url(), &lines)
        .webhook("ops2", &ops.url(), &lines);
    let daemon = Daemon::start(&ini);
    let world = World { daemon, couch, receiver: orders };
    world.daemon.wait_for_log("webhook `ops2` starts for the first time");
    world.daemon.wait_for_log("webhook `ops` starts for the first time");
    write(&world.couch, "orders", 4);
    let of = |couch: &StandIn, webhook: &str| -> Vec<Value> {
        letters(couch).into_iter().filter(|letter| letter["webhook"] == webhook).collect()
    };
    let stored = world.couch.wait_until(WAIT_MAX, |seen| {
        seen.winners(STATE_DB).keys().filter(|id| id.starts_with("msg_")).count() >= 3
    });
    assert!(stored, "{}\n{}", world.transcript(), ops.look(Record::transcript));
    // Another event passes all of that, so what would follow from the letters would have come by then.
    world.couch.put("orders", "d1", &json!({"again": 1})).unwrap();
    let more = world.couch.wait_until(WAIT_MAX, |seen| {
        seen.winners(STATE_DB).keys().filter(|id| id.starts_with("msg_")).count() >= 6
    });
    assert!(more, "{}", world.transcript());
    assert_eq!([of(&world.couch, "orders").len(), of(&world.couch, "ops").len()], [2, 2]);
    assert_eq!(of(&world.couch, "ops2").len(), 2);
    for letter in of(&world.couch, "ops") {
        assert_eq!(letter["payload"]["about"], "orders", "{letter:#}");
    }
    ops.look(|record| {
        for one in record.deliveries() {
            assert!(!body(one)["data"]["about"].as_str().unwrap().starts_with("ops"), "{}", body(one));
        }
    });
}
