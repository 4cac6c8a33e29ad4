//! Databases that a webhook finds by pattern: hundreds and thousands of them, by a handful of threads and connections.

use std::collections::BTreeSet;
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::sys;
use serde_json::json;

use crate::host::WAIT_MAX;
use crate::world::{
    CANARY, Daemon, FLAVOURS, Ini, World, couch, letters, long, on_each, receiver, receiver_with,
};

/// So that a sweep of hundreds of databases takes a moment, every second.
const QUICK: &str = "sweep_interval = 1s\nsweep_rate = 1000";

/// The pattern of most tests, from now on.
const TENANTS: &str = "db = tenant-*, !tenant-test\nsince = now";

fn tenant(n: usize) -> String {
    format!("tenant-{n:05}")
}

fn start(couch: StandIn, receiver: Receiver, hookd: &str, lines: &str) -> World {
    let ini = Ini::new(&couch.url()).hookd(hookd).webhook("tenants", &receiver.url(), lines);
    World { daemon: Daemon::start(&ini), couch, receiver }
}

/// Waits until the webhook has its starting point: what exists by then is told from now on.
fn wait_until_started(world: &World) {
    world.daemon.wait_for_log("webhook `tenants` starts for the first time: tells changes");
}

/// Names of databases of which something was accepted.
fn told_dbs(world: &World) -> BTreeSet<String> {
    world.receiver.look(|record| {
        record.deliveries().iter().filter(|one| one.accepted()).map(|one| one.db().to_owned()).collect()
    })
}

#[test]
fn databases_made_and_written_at_once_all_arrive_with_hints_and_without() {
    let n = if long() { 500 } else { 40 };
    std::thread::scope(|scope| {
        for (flavour, hints) in FLAVOURS.into_iter().flat_map(|flavour| [(flavour, true), (flavour, false)]) {
            scope.spawn(move || {
                let couch = couch(flavour, &["tenant-old", "tenant-test", "other"]);
                couch.put("tenant-old", "before", &json!({})).unwrap();
                couch.create_db("_global_changes");
                couch.quirks(|quirks| quirks.drop_updates = !hints);
                let world = start(couch, receiver(), QUICK, TENANTS);
                wait_until_started(&world);
                for i in 0..n {
                    world.couch.create_db(&tenant(i));
                    world.couch.put(&tenant(i), "first", &json!({ "n": i })).unwrap();
                }
                for db in ["tenant-test", "other", "tenant-old"] {
                    world.couch.put(db, "after", &json!({})).unwrap();
                }
                world.wait_long(WAIT_MAX * 6, "document of each", |record| record.n_accepted() > n);
                let told = told_dbs(&world);
                assert!((0..n).all(|i| told.contains(&tenant(i))) && told.contains("tenant-old"), "{told:?}");
                assert_eq!(told.len(), n + 1, "others were told of: {told:?}");
                world.receiver.look(|record| {
                    let before = |one: &_| couch_hookd::standin::record::Delivery::doc_id(one) == "before";
                    assert!(!record.deliveries().iter().any(before), "what was there before was told");
                });
                world.assert_clean();
            });
        }
    });
}

/// Between two walks over all databases.
#[test]
fn what_a_hint_names_is_told_at_once() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["_global_changes", "tenant-a"]);
        let world = start(couch, receiver(), "sweep_interval = 24h\nsweep_rate = 1000", TENANTS);
        wait_until_started(&world);
        world.daemon.wait_for_log("databases found by pattern: 1");
        let n_walks = world.couch.n_requests("GET /_all_dbs");
        // What is written before it listens is not hinted at.
        let heard = (0..100).any(|n| {
            world.couch.put("tenant-a", &format!("d{n}"), &json!({})).unwrap();
            world.receiver.wait_until(Duration::from_millis(300), |record| record.n_accepted() > 0)
        });
        assert!(heard, "{}", world.transcript());
        world.couch.create_db("tenant-b");
        world.couch.put("tenant-b", "doc", &json!({})).unwrap();
        world.wait_for_all("tenant-a");
        world.wait_for_all("tenant-b");
        assert_eq!(world.couch.n_requests("GET /_all_dbs"), n_walks, "{}", world.transcript());
    });
}

#[test]
fn what_is_written_later_to_any_of_them_arrives_once() {
    on_each(&FLAVOURS, |flavour| {
        let (hints, nodes) = match flavour {
            Flavour::V1 => (false, 0),
            Flavour::V2 => (false, 2),
            Flavour::V3 => (true, 2),
        };
        let couch = couch(flavour, &[]);
        (0..40).for_each(|n| couch.create_db(&tenant(n)));
        couch.create_db("_global_changes");
        couch.quirks(|quirks| (quirks.drop_updates, quirks.n_other_nodes) = (!hints, nodes));
        let world = start(couch, receiver(), QUICK, TENANTS);
        wait_until_started(&world);
        for round in 1..=3 {
            for n in (0..40).step_by(round) {
                world.couch.put(&tenant(n), "doc", &json!({ "round": round })).unwrap();
            }
            for n in 0..40 {
                world.wait_for_all(&tenant(n));
            }
        }
        let n_expected = 40 + 20 + 14;
        assert_eq!(world.receiver.look(|record| record.n_accepted()), n_expected, "{}", world.transcript());
        world.assert_clean();
    });
}

#[test]
fn kills_lose_nothing_of_databases_that_come_and_go() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &[]);
        (0..10).for_each(|n| couch.create_db(&tenant(n)));
        let mut world = start(couch, receiver(), QUICK, TENANTS);
        wait_until_started(&world);
        let random = &mut fastrand::Rng::with_seed(7);
        let n_kills = if long() { 25 } else { 8 };
        for kill in 0..n_kills {
            for _ in 0..random.usize(1..30) {
                let db = tenant(random.usize(..30));
                if random.u8(..10) == 0 {
                    world.couch.delete_db(&db);
                }
                world.couch.create_db(&db);
                world.couch.put(&db, &format!("d{}", random.usize(..5)), &json!({ "kill": kill })).unwrap();
            }
            let n_before = world.receiver.look(|record| record.n_accepted());
            let n_more = random.usize(..8);
            // It may have nothing more to tell: then it is killed at rest.
            let is_far =
                |record: &couch_hookd::standin::record::Record| record.n_accepted() >= n_before + n_more;
            let _ = world.receiver.wait_until(Duration::from_millis(300), is_far);
            world.daemon.kill();
            world.daemon.start_again();
        }
        for n in 0..30 {
            if !world.couch.winners(&tenant(n)).is_empty() {
                world.wait_for_all(&tenant(n));
            }
        }
        world.assert_clean();
    });
}

#[test]
fn a_database_made_again_is_told_from_its_beginning_also_when_it_looks_the_same() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["tenant-a"]);
        let mut world = start(couch, receiver(), QUICK, TENANTS);
        wait_until_started(&world);
        world.couch.put("tenant-a", "doc", &json!({})).unwrap();
        world.wait("first", |record| record.n_accepted() == 1);
        let again = |world: &World| {
            world.couch.delete_db("tenant-a");
            world.couch.create_db("tenant-a");
            world.couch.put("tenant-a", "doc", &json!({})).unwrap();
        };
        again(&world);
        world.wait("second", |record| record.n_accepted() == 2);
        world.daemon.kill();
        again(&world);
        world.daemon.start_again();
        world.wait("third", |record| record.n_accepted() == 3);
        world.receiver.look(|record| {
            let ids: BTreeSet<&str> = record.deliveries().iter().map(|one| one.webhook_id.as_str()).collect();
            assert_eq!(ids.len(), 3, "each life has its own ids");
        });
    });
}

#[test]
fn a_database_that_is_deleted_unheard_is_let_go() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["tenant-a", "tenant-b"]);
        couch.quirks(|quirks| quirks.drop_updates = true);
        let world = start(couch, receiver(), QUICK, TENANTS);
        wait_until_started(&world);
        world.couch.put("tenant-a", "doc", &json!({})).unwrap();
        world.wait_for_all("tenant-a");
        let walks = |n: usize| {
            let before = world.couch.n_requests("GET /_all_dbs");
            world.wait_couch("walks", |seen| seen.n_requests("GET /_all_dbs") >= before + 2 * n);
        };
        walks(2);
        world.couch.delete_db("tenant-a");
        // Whether it is gone only it can say; it is asked once, and no more.
        let n_asked = world.couch.n_requests("GET /tenant-a");
        world.wait_couch("look", |seen| seen.n_requests("GET /tenant-a") > n_asked);
        walks(2);
        let n_asked = world.couch.n_requests("GET /tenant-a");
        walks(2);
        assert_eq!(world.couch.n_requests("GET /tenant-a"), n_asked, "{}", world.transcript());
        world.couch.create_db("tenant-a");
        world.couch.put("tenant-a", "again", &json!({})).unwrap();
        world.wait("what it holds", |record| record.accepted_rev("tenant-a", "again").is_some());
    });
}

#[test]
fn nothing_of_couchdbs_own_databases_is_told_whatever_the_pattern() {
    let own = ["_users", "_replicator", "_global_changes", "a/_replicator"];
    let couch = couch(Flavour::V3, &["tenant-a"]);
    for db in own {
        couch.create_db(db);
        let secret = format!("{CANARY}-{db}");
        couch.put(db, "org.couchdb.user:jo", &json!({ "password": secret, "name": secret })).unwrap();
    }
    let world = start(couch, receiver(), QUICK, "db = *\nsince = 0");
    world.couch.put("tenant-a", "doc", &json!({})).unwrap();
    world.wait("document", |record| record.n_accepted() == 1);
    for db in own {
        world.couch.put(db, "more", &json!({ "password": CANARY })).unwrap();
    }
    // A letter, which lies in `state_db`.
    world.receiver.answer(|one| match one.doc_id() {
        "bad" => Reaction::Status(422),
        _ => Reaction::Status(200),
    });
    world.couch.put("tenant-a", "bad", &json!({})).unwrap();
    world.couch.create_db("tenant-b");
    world.couch.put("tenant-b", "doc", &json!({})).unwrap();
    world.wait("document of another database", |record| record.accepted_rev("tenant-b", "doc").is_some());
    let sweeps = world.couch.n_requests("GET /_all_dbs");
    world.wait_couch("two more sweeps", |seen| seen.n_requests("GET /_all_dbs") >= sweeps + 4);
    world.receiver.look(|record| {
        for one in record.deliveries() {
            assert!(one.db().starts_with("tenant-"), "told of `{}`", one.db());
            assert!(!String::from_utf8_lossy(&one.body).contains(CANARY));
        }
    });
    for db in own {
        for what in ["_changes", "_local"] {
            let part = format!("/{}/{what}", db.replace('/', "%2F"));
            assert_eq!(world.couch.n_requests(&part), 0, "`{db}` was asked for {what}");
        }
    }
}

#[test]
fn one_that_cannot_be_read_holds_up_no_other() {
    let couch = couch(Flavour::V3, &[]);
    (0..20).for_each(|n| couch.create_db(&tenant(n)));
    let world = start(couch, receiver(), QUICK, TENANTS);
    wait_until_started(&world);
    let broken = tenant(3);
    world.couch.quirks(|quirks| {
        let request = format!("GET /{broken}/_changes");
        quirks.faults.push(Fault { request, times: 2, kind: FaultKind::Status(500) });
    });
    (0..20).for_each(|n| drop(world.couch.put(&tenant(n), "doc", &json!({})).unwrap()));
    world.wait("document of the others", |record| record.n_accepted() >= 19);
    world.wait_long(WAIT_MAX * 3, "document of the broken one", |record| {
        record.accepted_rev(&broken, "doc").is_some()
    });
    world.assert_clean();
}

/// 1.x keeps 100 databases open, and says of one that it opened again that it began anew.
#[test]
fn places_in_databases_that_were_closed_meanwhile_are_stored() {
    let couch = couch(Flavour::V1, &[]);
    (0..30).for_each(|n| couch.create_db(&tenant(n)));
    couch.quirks(|quirks| quirks.closes_idle = true);
    let world = start(couch, receiver(), QUICK, TENANTS);
    wait_until_started(&world);
    (0..30).for_each(|n| drop(world.couch.put(&tenant(n), "doc", &json!({})).unwrap()));
    world.wait_couch("place behind the document of each", |seen| {
        (0..30).all(|n| {
            let stored = seen.local(&tenant(n), "couch-hookd.tenants").unwrap_or_default();
            serde_json::from_str::<serde_json::Value>(&stored).is_ok_and(|stored| stored["through_seq"] == 1)
        })
    });
    assert_eq!(world.receiver.look(|record| record.n_accepted()), 30);
    world.assert_clean();
}

/// A 1.x that is killed loses what it has not written to the disk, and gives its numbers to what is written next.
#[test]
fn what_is_written_under_the_numbers_of_lost_changes_is_told() {
    let couch = couch(Flavour::V1, &["tenant-a"]);
    couch.quirks(|quirks| quirks.drop_updates = true);
    let world = start(couch, receiver(), QUICK, TENANTS);
    wait_until_started(&world);
    for (n, id) in [(1, "kept"), (2, "lost")] {
        world.couch.put("tenant-a", id, &json!({ "n": 1 })).unwrap();
        world.wait("document", |record| record.n_accepted() == n);
        let sweeps = world.couch.n_requests("GET /_all_dbs");
        world.wait_couch("more walks", |seen| seen.n_requests("GET /_all_dbs") >= sweeps + 3);
    }
    assert_eq!(world.couch.crash_losing("tenant-a", 1), 1);
    world.couch.start_again().unwrap();
    world.couch.put("tenant-a", "next", &json!({ "n": 2 })).unwrap();
    assert_eq!(world.couch.update_seq("tenant-a"), 2, "the number of the one that was lost");
    world.wait("document", |record| record.accepted_rev("tenant-a", "next").is_some());
    world.assert_clean();
}

#[test]
fn a_letter_of_a_database_at_rest_can_be_sent_again() {
    let couch = couch(Flavour::V3, &["tenant-a"]);
    let world = start(couch, receiver(), QUICK, TENANTS);
    wait_until_started(&world);
    world.receiver.answer(|one| Reaction::Status(if one.doc_id() == "bad" { 422 } else { 200 }));
    world.couch.put("tenant-a", "bad", &json!({})).unwrap();
    world.wait("refusals", |record| record.deliveries().iter().filter(|one| !one.accepted()).count() >= 3);
    let deadline = sys::now() + WAIT_MAX;
    while letters(&world.couch).is_empty() {
        assert!(sys::now() < deadline, "no letter\n{}", world.transcript());
        std::thread::yield_now();
    }
    world.receiver.answer(|_| Reaction::Status(200));
    let ini = world.daemon.files().into_iter().find(|path| path.ends_with("hookd.ini")).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_couch-hookd"))
        .args(["dead-letters", "replay", "--yes", "--webhook", "tenants", "--config"])
        .arg(ini)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}\n{}", world.transcript());
    world.wait("letter", |record| record.accepted_rev("tenant-a", "bad").is_some());
    assert!(letters(&world.couch).is_empty());
}

#[test]
fn a_database_with_a_mountain_of_changes_leaves_room_for_the_others() {
    let (n_changes, n_others) = if long() { (50_000, 1_000) } else { (4_000, 100) };
    let couch = couch(Flavour::V3, &[]);
    let receiver = receiver_with(|options| options.keep_bodies = false);
    (0..n_others).for_each(|n| couch.create_db(&tenant(n)));
    couch.create_db("tenant-big");
    // The mountain takes its time whatever the machine does: the others are to come meanwhile.
    receiver.answer(|one| match one.db() {
        "tenant-big" => Reaction::Delay(Duration::from_millis(10), Box::new(Reaction::Status(200))),
        _ => Reaction::Status(200),
    });
    let world = start(couch, receiver, QUICK, TENANTS);
    wait_until_started(&world);
    for n in 0..n_changes {
        world.couch.put("tenant-big", &format!("d{n}"), &json!({})).unwrap();
    }
    world.wait("start on the mountain", |record| record.n_accepted() > 100);
    (0..n_others).for_each(|n| drop(world.couch.put(&tenant(n), "doc", &json!({})).unwrap()));
    let mut n_big = 0;
    world.wait_long(WAIT_MAX * 6, "document of each of the others", |record| {
        let is_big = |one: &&_| couch_hookd::standin::record::Delivery::db(one) == "tenant-big";
        n_big = record.deliveries().iter().filter(is_big).count();
        record.deliveries().len() - n_big >= n_others
    });
    assert!(n_big < n_changes, "the others came after all {n_changes} of the big one");
}
