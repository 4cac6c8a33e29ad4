//! What webhooks and documents share, and nobody may use up: deliveries in flight, the window, the order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::standin::record::Record;
use serde_json::json;

use crate::world::{Daemon, Ini, World, couch, receiver, write};

#[test]
fn deliveries_max_holds_over_all_webhooks_and_starves_none() {
    let couch = couch(Flavour::V3, &["orders", "bills"]);
    write(&couch, "orders", 200);
    write(&couch, "bills", 200);
    let receiver = receiver();
    receiver.answer(|_| Reaction::Delay(Duration::from_millis(10), Box::new(Reaction::Status(200))));
    let ini = Ini::new(&couch.url())
        .hookd("deliveries_max = 3")
        .webhook("orders", &receiver.url(), "")
        .webhook("bills", &receiver.url(), "");
    let world = World { daemon: Daemon::start(&ini), couch, receiver };
    world.wait_for_all("orders");
    world.wait_for_all("bills");
    world.receiver.look(|record| {
        assert_eq!(record.concurrency_max(), 3, "{}", record.transcript());
        let first = &record.deliveries()[..200];
        let bills = first.iter().filter(|one| one.db() == "bills").count();
        assert!((50..=150).contains(&bills), "{bills} of the first 200 were one webhook's");
    });
}

#[test]
fn concurrency_1_keeps_the_order_over_all_documents() {
    let couch = couch(Flavour::V1, &["orders"]);
    let written: Vec<String> = (0..100).map(|i| format!("d{}", (i * 37) % 101)).collect();
    for id in &written {
        couch.put("orders", id, &json!({})).unwrap();
    }
    let receiver = receiver();
    // Every tenth fails once: all others wait for it.
    receiver.answer(|one| {
        let fails = one.attempt == Some(1) && one.doc_id().ends_with('7');
        Reaction::Status(if fails { 503 } else { 200 })
    });
    let world = World::start_on(couch, receiver, "concurrency = 1\nretry_schedule = 100ms");
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let accepted = record.deliveries().iter().filter(|one| one.accepted());
        assert_eq!(accepted.map(|one| one.doc_id().to_owned()).collect::<Vec<_>>(), written);
        assert_eq!(record.concurrency_max(), 1);
        assert!(record.deliveries().len() >= 109, "{}", record.transcript());
    });
}

#[test]
fn a_hot_document_does_not_fill_the_window() {
    // More updates than a webhook may hold unfinished events.
    const UPDATES: usize = 1_300;
    let world = World::start(Flavour::V3, "");
    write(&world.couch, "orders", 8);
    world.wait_for_all("orders");
    world.receiver.answer(|one| match one.doc_id() {
        "hot" => Reaction::Hang,
        _ => Reaction::Status(200),
    });
    let (rest, over) = (&world.couch, &AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // 200 a second, and in short runs 1,000: each is to be a row of its own.
            let pause = Duration::from_millis(if crate::world::long() { 5 } else { 1 });
            let ticks = crossbeam_channel::tick(pause);
            for n in 0..UPDATES {
                rest.put("orders", "hot", &json!({"n": n})).unwrap();
                let _ = ticks.recv();
            }
            over.store(true, Ordering::Relaxed);
        });
        let mut n_meanwhile = 0;
        while !over.load(Ordering::Relaxed) {
            let rev = rest.put("orders", "cold", &json!({})).unwrap();
            world.wait("cold document", |record| record.accepted_rev("orders", "cold") == Some(&rev));
            n_meanwhile += 1;
        }
        assert!(n_meanwhile > 5, "{n_meanwhile}");
    });
    let rev = rest.put("orders", "cold", &json!({})).unwrap();
    world.wait("cold document", |record| record.accepted_rev("orders", "cold") == Some(&rev));
    let n_hot = |record: &Record| record.deliveries().iter().filter(|one| one.doc_id() == "hot").count();
    assert_eq!(world.receiver.look(n_hot), 1);
    world.receiver.answer(|_| Reaction::Status(200));
    // The one that hangs is cut, and the newest follows; what was between is not told.
    world.receiver.refuse_connections(true).unwrap();
    world.receiver.refuse_connections(false).unwrap();
    world.wait_for_all("orders");
    let n = world.receiver.look(n_hot);
    assert!(n <= 4, "{n} of {UPDATES} revisions were sent\n{}", world.transcript());
}
