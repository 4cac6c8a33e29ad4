//! `document.conflicted` and `document.resolved`: told of every conflict and of its end, whoever is killed when.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Delivery, Record};
use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::world::{Daemon, FLAVOURS, Ini, STATE_DB, World, couch, letters, on_each, receiver_with};

/// A leaf that loses against every first revision of the stand-in, and its hash.
const LOSER: &str = "1-00000000000000000000000000000001";
const LOSER_HASH: &str = "00000000000000000000000000000001";

fn world(flavour: Flavour, lines: &str) -> World {
    World::start_on(couch(flavour, &["orders"]), keeping(), lines)
}

fn keeping() -> Receiver {
    receiver_with(|options| options.keep_bodies = true)
}

/// Adds a leaf, as a replication does.
fn fork(couch: &StandIn, id: &str, rev: &str, body: &str) {
    couch.conflict("orders", id, rev, body).unwrap();
}

/// Deletes the leaf that [`LOSER`] is, as whoever resolves a conflict.
fn delete_loser(couch: &StandIn, id: &str, n: u32) {
    let tombstone =
        json!({"_deleted": true, "_revisions": {"start": 2, "ids": [format!("{n:032x}"), LOSER_HASH]}});
    fork(couch, id, &format!("2-{n:032x}"), &tombstone.to_string());
}

/// Type, id and revisions of everything accepted of a document, in order.
fn told(record: &Record, id: &str) -> Vec<(String, String)> {
    let accepted = record.deliveries().iter().filter(|one| one.accepted() && one.doc_id() == id);
    accepted.map(|one| (one.event().unwrap().event_type.clone(), one.webhook_id.clone())).collect()
}

fn types(record: &Record, id: &str) -> Vec<String> {
    told(record, id).into_iter().map(|(event_type, _)| event_type).collect()
}

fn body(one: &Delivery) -> Value {
    serde_json::from_slice(&one.body).unwrap()
}

/// What `state_db` lists as conflicted.
fn listed(couch: &StandIn) -> Vec<Value> {
    let docs = couch.winners(STATE_DB).into_iter();
    let listed = docs.filter(|(id, winner)| id.starts_with("conflict:") && !winner.deleted);
    listed.map(|(_, winner)| serde_json::from_str(&winner.json).unwrap()).collect()
}

fn wait_until_none_is_listed(world: &World) {
    world.wait_couch("end of all conflicts in state_db", |seen| {
        !seen.winners(STATE_DB).into_iter().any(|(id, winner)| id.starts_with("conflict:") && !winner.deleted)
    });
}

#[test]
fn a_conflict_and_its_end_are_told_under_ids_of_their_own() {
    on_each(&FLAVOURS, |flavour| {
        let world = world(flavour, "conflicts = true");
        let first = world.couch.put("orders", "order:17", &json!({"n": 1})).unwrap();
        world.wait("update", |record| record.n_accepted() == 1);
        fork(&world.couch, "order:17", LOSER, r#"{"n":2}"#);
        world.wait("conflict", |record| record.n_accepted() == 2);
        let kept = listed(&world.couch);
        assert_eq!(kept.len(), 1, "{kept:?}");
        assert_eq!(
            (&kept[0]["doc_id"], &kept[0]["leaves"], &kept[0]["db"], &kept[0]["webhook"]),
            (&json!("order:17"), &json!([first, LOSER]), &json!("orders"), &json!("orders"))
        );
        // The winner is what it was: a receiver that drops ids it knows must not drop this.
        delete_loser(&world.couch, "order:17", 7);
        world.wait("resolution", |record| record.n_accepted() == 3);
        wait_until_none_is_listed(&world);
        world.couch.put("orders", "order:17", &json!({"n": 3})).unwrap();
        world.wait("update", |record| record.n_accepted() == 4);
        world.receiver.look(|record| {
            let expected =
                ["document.updated", "document.conflicted", "document.resolved", "document.updated"];
            assert_eq!(types(record, "order:17"), expected, "{}", world.transcript());
            let ids: BTreeSet<_> = told(record, "order:17").into_iter().map(|(_, id)| id).collect();
            assert_eq!(ids.len(), 4, "{ids:?}");
            let bodies: Vec<Value> = record.deliveries().iter().map(body).collect();
            assert_eq!(bodies[1]["data"]["conflicts"], json!([LOSER]));
            assert_eq!(bodies[2]["data"]["conflicts"], json!([]));
            assert_eq!(bodies[2]["data"]["rev"], json!(first));
        });
    });
}

#[test]
fn other_leaves_are_told_and_deleting_winners_resolves() {
    let world = world(Flavour::V3, "conflicts = true");
    world.couch.put("orders", "a", &json!({})).unwrap();
    fork(&world.couch, "a", LOSER, r#"{"n":2}"#);
    world.wait("conflict", |record| types(record, "a").ends_with(&["document.conflicted".into()]));
    fork(&world.couch, "a", "1-00000000000000000000000000000002", r#"{"n":3}"#);
    world.wait("third leaf", |record| {
        record.n_accepted() >= 2
            && record
                .deliveries()
                .iter()
                .any(|one| body(one)["data"]["conflicts"].as_array().is_some_and(|all| all.len() == 2))
    });
    assert_eq!(listed(&world.couch).len(), 1, "one of a document");
    // The winner, then the one that wins after it.
    for _ in 0..2 {
        world.couch.delete("orders", "a").unwrap();
    }
    world.wait("end", |record| types(record, "a").last().is_some_and(|last| last == "document.resolved"));
    wait_until_none_is_listed(&world);
}

#[test]
fn whoever_wants_only_resolutions_gets_them() {
    let world = world(Flavour::V2, "conflicts = true\nevents = document.resolved");
    world.couch.put("orders", "a", &json!({})).unwrap();
    world.couch.put("orders", "b", &json!({})).unwrap();
    fork(&world.couch, "a", LOSER, r#"{"n":2}"#);
    world.wait_couch("conflict in state_db", |seen| {
        seen.winners(STATE_DB).keys().any(|id| id.starts_with("conflict:"))
    });
    delete_loser(&world.couch, "a", 7);
    world.wait("resolution", |record| record.n_accepted() == 1);
    world.receiver.look(|record| assert_eq!(types(record, "a"), ["document.resolved"]));
}

/// Nothing is kept, and what ends the conflict is a change as every other.
#[test]
fn whoever_does_not_want_resolutions_costs_nothing() {
    let world = world(Flavour::V3, "conflicts = true\nevents = document.updated, document.conflicted");
    world.couch.put("orders", "a", &json!({})).unwrap();
    fork(&world.couch, "a", LOSER, r#"{"n":2}"#);
    world.wait("conflict", |record| types(record, "a").ends_with(&["document.conflicted".into()]));
    delete_loser(&world.couch, "a", 7);
    world.wait("update", |record| types(record, "a").ends_with(&["document.updated".into()]));
    let all = world.couch.winners(STATE_DB);
    assert!(!all.keys().any(|id| id.starts_with("conflict:")), "{:?}", all.keys());
}

#[test]
fn a_resolution_that_is_refused_is_a_letter_and_is_told_when_it_is_sent_again() {
    let world = world(Flavour::V3, "conflicts = true\nretry_schedule = 100ms\ndead_letter_after = 1");
    world.receiver.answer(|one| {
        let refused = one.event().is_some_and(|event| event.event_type == "document.resolved") && !one.replay;
        Reaction::Status(if refused { 422 } else { 200 })
    });
    world.couch.put("orders", "a", &json!({})).unwrap();
    fork(&world.couch, "a", LOSER, r#"{"n":2}"#);
    world.wait("conflict", |record| types(record, "a").ends_with(&["document.conflicted".into()]));
    delete_loser(&world.couch, "a", 7);
    world.daemon.wait_for_log("is a dead letter now");
    wait_until_none_is_listed(&world);
    let letter = letters(&world.couch).remove(0);
    assert_eq!(letter["event_type"], "document.resolved");
    let desk = crate::commands::Desk::new(&Ini::new(&world.couch.url()).webhook(
        "orders",
        &world.receiver.url(),
        "conflicts = true",
    ));
    desk.done(&["dead-letters", "replay", "--yes"]);
    world.wait("letter", |record| {
        told(record, "a")
            .iter()
            .any(|(event_type, id)| event_type == "document.resolved" && letter["_id"] == id.as_str())
    });
}

#[test]
fn what_was_conflicted_in_a_database_that_was_made_again_is_forgotten() {
    let world = world(Flavour::V3, "conflicts = true");
    world.couch.put("orders", "a", &json!({})).unwrap();
    fork(&world.couch, "a", LOSER, r#"{"n":2}"#);
    world.wait("conflict", |record| types(record, "a").ends_with(&["document.conflicted".into()]));
    assert_eq!(listed(&world.couch).len(), 1);
    world.couch.delete_db("orders");
    world.couch.create_db("orders");
    world.couch.put("orders", "a", &json!({"other": true})).unwrap();
    world.wait("update", |record| types(record, "a").ends_with(&["document.updated".into()]));
    wait_until_none_is_listed(&world);
}

#[test]
fn leaves_come_byte_for_byte_in_the_order_of_conflicts() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.put_raw("orders", "a", r#"{"n":1.0}"#).unwrap();
        let (b, c) = (LOSER, "1-00000000000000000000000000000002");
        fork(&couch, "a", c, r#"{"z":-0.0,"big":12345678901234567890123}"#);
        fork(&couch, "a", b, r#"{"n":1.0,"a":"ü"}"#);
        let world = World::start_on(couch, keeping(), "conflicts = true\nconflict_docs = true");
        world.wait("conflict", |record| record.n_accepted() == 1);
        let text =
            world.receiver.look(|record| String::from_utf8(record.deliveries()[0].body.clone()).unwrap());
        let expected = format!(
            r#","conflicts":["{b}","{c}"],"conflict_docs":[{{"_id":"a","_rev":"{b}","n":1.0,"a":"ü"}},{{"_id":"a","_rev":"{c}","z":-0.0,"big":12345678901234567890123}}],"seq""#
        );
        assert!(text.contains(&expected), "{text}");
        assert_eq!(
            world.couch.look(|seen| seen
                .requests()
                .filter(|one| one.query.iter().any(|(name, _)| name == "open_revs"))
                .count()),
            1
        );
    });
}

#[test]
fn leaves_that_do_not_fit_are_left_out_and_those_of_users_hold_no_secrets() {
    let couch = couch(Flavour::V3, &["orders", "_users"]);
    couch.put("orders", "a", &json!({})).unwrap();
    let long = json!({"text": "x".repeat(2_000)}).to_string();
    fork(&couch, "a", LOSER, &long);
    let user = |n: u32| json!({"name": "ann", "type": "user", "roles": [], "salt": format!("c4n4ry-{n}")});
    couch.put("_users", "org.couchdb.user:ann", &user(1)).unwrap();
    couch.conflict("_users", "org.couchdb.user:ann", LOSER, &user(2).to_string()).unwrap();
    let receiver = keeping();
    let lines = "conflicts = true\nconflict_docs = true\npayload_bytes_max = 1KiB";
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), lines).webhook(
        "people",
        &receiver.url(),
        &format!("db = _users\n{lines}"),
    );
    let daemon = Daemon::start(&ini);
    assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == 2), "{}", daemon.transcript());
    receiver.look(|record| {
        for one in record.deliveries() {
            let event = body(one);
            assert_eq!(event["type"], "document.conflicted");
            let data = &event["data"];
            if one.db() == "orders" {
                let bytes = long.len() + format!(r#""_id":"a","_rev":"{LOSER}","#).len();
                assert_eq!(data["conflict_docs_omitted"], json!({"reason": "too_large", "bytes": bytes}));
                assert_eq!(data.get("conflict_docs"), None);
            } else {
                assert_eq!(data["conflict_docs"][0]["name"], "ann");
                let text = String::from_utf8_lossy(&one.body);
                assert!(!text.contains("c4n4ry"), "{text}");
            }
        }
    });
}

/// The README's review queue: a database of conflicts that people work off.
#[test]
fn a_database_is_a_queue_of_conflicts_to_review() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    let section = text.split("## Conflicts\n").nth(1).expect("the README has a section about conflicts");
    let ini = section.split("```ini\n").nth(1).unwrap().split("```").next().unwrap();
    let lines: Vec<&str> = ini.split("[hookd.webhook.conflicts]\n").nth(1).unwrap().lines().collect();
    let lines: Vec<&str> =
        lines.into_iter().filter(|line| !line.starts_with("secret") && !line.starts_with(';')).collect();
    let (review, source) = (couch(Flavour::V3, &["review"]), couch(Flavour::V3, &["orders"]));
    source.put("orders", "order:17", &json!({"total": 120})).unwrap();
    source.put("orders", "order:18", &json!({"total": 1})).unwrap();
    fork(&source, "order:17", LOSER, r#"{"total":95}"#);
    let ini =
        Ini::new(&source.url()).webhook("conflicts", &format!("{}/review", review.url()), &lines.join("\n"));
    let daemon = Daemon::start(&ini);
    let queue = |n: usize| {
        assert!(
            review.wait_until(WAIT_MAX, |seen| seen.winners("review").len() == n),
            "{}",
            daemon.transcript()
        );
        let docs = review.winners("review").into_values();
        docs.map(|winner| serde_json::from_str(&winner.json).unwrap()).collect::<Vec<Value>>()
    };
    let doc = queue(1).remove(0);
    assert_eq!(doc["type"], "document.conflicted");
    assert_eq!(doc["data"]["doc"]["total"], 120);
    assert_eq!(doc["data"]["conflict_docs"][0]["total"], 95);
    // Somebody merges: the loser is deleted, and the queue is told.
    delete_loser(&source, "order:17", 7);
    assert!(queue(2).iter().any(|doc| doc["type"] == "document.resolved"));
}

/// Conflicts and their ends while the daemon is killed at every moment: each conflict that was told is told to be over.
#[test]
fn kills_lose_no_resolution() {
    let n_rounds = if crate::world::long() { 40 } else { 12 };
    let mut world = world(Flavour::V1, "conflicts = true\nretry_schedule = 100ms");
    world.receiver.answer(|_| {
        let pause = Duration::from_micros(fastrand::u64(0..30_000));
        Reaction::Delay(pause, Box::new(Reaction::Status(if fastrand::u8(..8) == 0 { 500 } else { 200 })))
    });
    let mut conflicted = BTreeMap::new();
    for round in 0..n_rounds {
        for n in 0..6 {
            let id = format!("d{n}");
            match conflicted.remove(&id) {
                Some(()) => delete_loser_of(&world.couch, &id, round - 1),
                None => {
                    world.couch.put("orders", &id, &json!({"round": round})).unwrap();
                    fork(&world.couch, &id, &loser(round), &json!({"other": round}).to_string());
                    conflicted.insert(id, ());
                }
            }
        }
        // A life: nothing is waited for, it ends when its time is up.
        let _ = world.receiver.wait_until(Duration::from_millis(fastrand::u64(20..400)), |_| false);
        world.daemon.kill();
        world.daemon.start_again();
    }
    for id in conflicted.keys() {
        delete_loser_of(&world.couch, id, n_rounds - 1);
    }
    let over = |record: &Record| {
        (0..6).all(|n| {
            let all = told(record, &format!("d{n}"));
            let of = |wanted: &str| all.iter().rposition(|(event_type, _)| event_type == wanted);
            of("document.conflicted") < of("document.resolved")
                || (of("document.conflicted").is_none() && of("document.resolved").is_none())
        })
    };
    let all = world.receiver.wait_until(WAIT_MAX, over);
    let (mut n_conflicts, mut n_resolutions) = (0, 0);
    world.receiver.look(|record| {
        for n in 0..6 {
            let types = types(record, &format!("d{n}"));
            n_conflicts += types.iter().filter(|one| *one == "document.conflicted").count();
            n_resolutions += types.iter().filter(|one| *one == "document.resolved").count();
            assert!(all, "d{n}: {types:?}\n{}", world.daemon.transcript());
        }
    });
    assert!(n_conflicts > 0 && n_resolutions > 0, "{}", world.transcript());
    println!("{n_rounds} kills: {n_conflicts} conflicts and {n_resolutions} resolutions told, none lost");
    wait_until_none_is_listed(&world);
}

/// The losing leaf of a round: lower than every revision that the stand-in makes.
fn loser(round: u32) -> String {
    format!("1-{:032x}", round + 1)
}

fn delete_loser_of(couch: &StandIn, id: &str, round: u32) {
    let (new, old) = (format!("{:032x}", round + 1_000_000), format!("{:032x}", round + 1));
    let tombstone = json!({"_deleted": true, "_revisions": {"start": 2, "ids": [new, old]}});
    fork(couch, id, &format!("2-{new}"), &tombstone.to_string());
}
