//! Several events in one request, seen from outside: who is blamed, what is told again, and in which order.

use std::time::Duration;

use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::standin::record::{Delivery, Record};
use serde_json::{Value, json};

use crate::world::{World, checkpoint, couch, has_all, letters, long, receiver, receiver_with, revs, write};

/// Steps so short that a test sees many.
const SHORT: &str = "retry_schedule = 100ms, 100ms, 200ms";

fn batches(record: &Record) -> Vec<&Delivery> {
    record.deliveries().iter().filter(|one| one.events.len() > 1).collect()
}

fn tells(one: &Delivery, doc_id: &str) -> bool {
    one.events.iter().any(|event| event.data.id == doc_id)
}

/// A webhook that was told of one document, so that its endpoint is known to be up, and then gets 50 at once.
fn fifty_with_d7(wait: &str, answer: fn(bool) -> u16) -> World {
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let lines = format!("batch_max = 50\nbatch_wait = {wait}\n{SHORT}");
    let world = World::start_on(couch(Flavour::V3, &["orders"]), receiver, &lines);
    world.couch.put("orders", "first", &json!({})).unwrap();
    world.wait_for_all("orders");
    world.receiver.answer(move |one| Reaction::Status(answer(tells(one, "d7"))));
    write(&world.couch, "orders", 50);
    world
}

#[test]
fn one_refused_event_of_fifty_is_one_dead_letter() {
    // Longer than any test waits: a batch goes because it is full.
    let world = fifty_with_d7("60s", |with_d7| if with_d7 { 422 } else { 200 });
    world.daemon.wait_for_log("is a dead letter now (refused)");
    let mut others = revs(&world.couch, "orders");
    others.remove("d7");
    world.wait("49 others", |record| has_all(record, "orders", &others));
    world.assert_clean();
    let stored = letters(&world.couch);
    assert_eq!(stored.len(), 1, "{stored:#?}");
    assert_eq!((&stored[0]["doc_id"], &stored[0]["class"]), (&json!("d7"), &json!("refused")));
    // Once in the batch, three times alone; its neighbours once in the batch, once alone.
    assert_eq!(stored[0]["attempts"], 4, "{stored:#?}");
    world.receiver.look(|record| {
        let all = batches(record);
        assert_eq!(all.len(), 1, "{}", record.transcript());
        let batch = all[0];
        assert_eq!((batch.events.len(), batch.status), (50, Some(422)));
        let body: Value = serde_json::from_slice(&batch.body).unwrap();
        assert_eq!((&body["type"], &body["id"]), (&json!("batch"), &json!(batch.webhook_id)));
        assert!(batch.events.iter().all(|event| event.id != batch.webhook_id), "its id is its own");
        let alone = record.deliveries().iter().filter(|one| one.events.len() == 1);
        let of_others = alone.filter(|one| one.doc_id() != "d7" && one.doc_id() != "first");
        assert!(of_others.clone().all(|one| one.attempt == Some(2)), "{}", record.transcript());
        assert_eq!(of_others.count(), 49, "{}", record.transcript());
    });
}

#[test]
fn one_event_that_the_endpoint_fails_at_is_found_in_its_batch() {
    let world = fifty_with_d7("20ms", |with_d7| if with_d7 { 500 } else { 200 });
    let mut others = revs(&world.couch, "orders");
    others.remove("d7");
    world.wait("49 others", |record| has_all(record, "orders", &others));
    // What others get while it fails is what makes it suspect.
    for n in 0.. {
        if world.daemon.n_logged("is a dead letter now (suspect)") > 0 {
            break;
        }
        assert!(n < 1_000, "{}", world.transcript());
        let rev = world.couch.put("orders", "filler", &json!({"n": n})).unwrap();
        world.wait("filler", |record| record.accepted_rev("orders", "filler") == Some(&rev));
    }
    let stored = letters(&world.couch);
    assert_eq!(stored.len(), 1, "{stored:#?}");
    assert_eq!((&stored[0]["doc_id"], &stored[0]["class"]), (&json!("d7"), &json!("suspect")));
    world.assert_clean();
}

/// `concurrency = 1`: whatever is batched, refused or failed at, what was written first is told first.
#[test]
fn strict_order_holds_within_batches_and_over_them() {
    let couch = couch(Flavour::V1, &["orders"]);
    let ids: Vec<String> = (0..120).map(|n| format!("d{n}")).collect();
    for id in &ids {
        couch.put("orders", id, &json!({})).unwrap();
    }
    let receiver = receiver();
    receiver.answer(|one| {
        let fails = one.order % 7 == 3;
        Reaction::Status(if fails { *fastrand::choice(&[422, 500, 503]).unwrap() } else { 200 })
    });
    let world = World::start_on(couch, receiver, &format!("concurrency = 1\nbatch_max = 9\n{SHORT}"));
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let accepted = record.deliveries().iter().filter(|one| one.accepted());
        let told: Vec<&str> =
            accepted.flat_map(|one| &one.events).map(|event| event.data.id.as_str()).collect();
        assert_eq!(told, ids, "{}", record.transcript());
        assert!(batches(record).len() > 3, "{}", record.transcript());
        assert_eq!(record.concurrency_max(), 1);
    });
}

#[test]
fn kills_lose_nothing_of_a_batch_and_keep_the_order() {
    let (n_kills, n_docs) = if long() { (60, 200) } else { (12, 60) };
    let couch = couch(Flavour::V3, &["orders"]);
    let receiver = receiver();
    receiver.answer(|_| {
        let delay = Duration::from_micros(fastrand::u64(0..30_000));
        Reaction::Delay(delay, Box::new(Reaction::Status(200)))
    });
    let lines = format!("batch_max = 20\nbatch_wait = 5ms\nconcurrency = 4\n{SHORT}");
    let mut world = World::start_on(couch, receiver, &lines);
    for n in 0..n_kills {
        write(&world.couch, "orders", n_docs);
        // Killed while batches are in flight: after so many more requests.
        let seen = world.receiver.look(|record| record.deliveries().len());
        world.wait("requests", |record| record.deliveries().len() > seen + n % 3);
        world.daemon.kill();
        world.daemon.start_again();
    }
    world.wait_for_all("orders");
    let n_batches = world.receiver.look(|record| batches(record).len());
    assert!(n_batches >= n_kills, "{n_batches} batches\n{}", world.transcript());
    assert_eq!(letters(&world.couch), [] as [Value; 0]);
}

#[test]
fn an_outage_keeps_every_event_of_a_batch() {
    let world = World::start(Flavour::V2, &format!("batch_max = 10\n{SHORT}"));
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
    world.receiver.answer(|_| Reaction::Delay(Duration::from_millis(20), Box::new(Reaction::Status(503))));
    write(&world.couch, "orders", 50);
    world.daemon.wait_for_log("its endpoint fails");
    world.receiver.refuse_connections(true).unwrap();
    write(&world.couch, "orders", 50);
    world.receiver.refuse_connections(false).unwrap();
    world.receiver.answer(|_| Reaction::Status(200));
    world.wait_for_all("orders");
    assert_eq!(letters(&world.couch), [] as [Value; 0]);
    world.wait_couch("checkpoint", |seen| seen.local("orders", "couch-hookd.orders").is_some());
    assert!(checkpoint(&world.couch, "orders", "orders").is_some());
}

#[test]
fn a_batch_stays_below_its_bytes_and_what_is_larger_goes_alone() {
    let couch = couch(Flavour::V3, &["orders"]);
    couch.put("orders", "large", &json!({"text": "x".repeat(9_000)})).unwrap();
    for n in 0..60 {
        couch.put("orders", &format!("d{n}"), &json!({"text": "x".repeat(800)})).unwrap();
    }
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let world = World::start_on(couch, receiver, "batch_max = 50\nbatch_wait = 50ms\nbatch_bytes_max = 8KiB");
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let all = batches(record);
        assert!(all.len() >= 5, "{}", record.transcript());
        let sizes: Vec<usize> = all.iter().map(|one| one.body.len()).collect();
        assert!(sizes.iter().all(|size| *size <= 8 << 10), "{sizes:?}");
        assert!(sizes.iter().any(|size| *size > 4 << 10), "they are filled: {sizes:?}");
        assert!(all.iter().all(|one| !tells(one, "large")), "{}", record.transcript());
    });
}
