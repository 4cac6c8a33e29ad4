//! Commands against a daemon under a real BEAM, which starts it again by itself when it is killed.

use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Reaction;
use serde_json::{Value, json};

use crate::commands::{Desk, ask, wait_until_alive};
use crate::host::WAIT_MAX;
use crate::outside::beam::Beam;
use crate::world::{Dir, Ini, STATE_DB, couch, has_all, receiver, revs, write};

#[test]
fn commands_reach_a_daemon_under_a_real_beam_that_is_killed_between_obeying_and_answering() {
    if !super::beam_is_there() {
        return;
    }
    let (couch, receiver, folder) = (couch(Flavour::V1, &["orders"]), receiver(), Dir::new());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let daemon = concat!(env!("CARGO_BIN_EXE_couch-hookd"), " os-daemon");
    let mut beam = Beam::start(&folder.path("beam"), &ini.text(), daemon);
    write(&couch, "orders", 20);
    let all = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= 20);
    assert!(all, "{}", beam.transcript());
    wait_until_alive(&couch);
    let desk = Desk::new(&ini);
    desk.done(&["pause", "orders"]);
    couch.put("orders", "late", &json!({})).unwrap();
    let said = desk.say(&["status", "--json"]);
    let line: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!((said.status, &line["pending"]), (0, &json!(1)), "{said:?}");
    desk.done(&["resume", "orders"]);
    let late = receiver.wait_until(WAIT_MAX, |record| record.accepted_rev("orders", "late").is_some());
    assert!(late, "{}", beam.transcript());
    // Killed while its answer hangs: done, and not yet said.
    let n_answers = couch.n_requests("PUT /couch_hookd/request%3A");
    let fault = Fault { request: "PUT /couch_hookd/request%3A".to_owned(), times: 1, kind: FaultKind::Hang };
    couch.quirks(|quirks| quirks.faults = vec![fault]);
    let id = "request:00000000000000000001-a";
    ask(&couch, id, "seek", &json!({"to": 0}));
    let hangs = couch.wait_until(WAIT_MAX, |seen| seen.n_requests("PUT /couch_hookd/request%3A") > n_answers);
    assert!(hangs, "{}", beam.transcript());
    beam.order("restart", "restarted");
    let answered = couch.wait_until(WAIT_MAX, |seen| {
        seen.winner(STATE_DB, id).is_some_and(|winner| winner.json.contains("\"state\":\"done\""))
    });
    assert!(answered, "{}", beam.transcript());
    let winners = revs(&couch, "orders");
    let again = receiver.wait_until(WAIT_MAX, |record| {
        let told = |doc: &String| {
            record.deliveries().iter().filter(|one| one.accepted() && one.doc_id() == doc).count()
        };
        winners.keys().all(|doc| told(doc) >= 2) && has_all(record, "orders", &winners)
    });
    assert!(again, "{}", beam.transcript());
    let counts = beam.counts();
    assert_eq!((counts["invalid"], counts["exits"]), (0, 0), "{}", beam.transcript());
}

#[test]
fn letters_are_sent_again_and_discarded_by_a_daemon_under_a_real_beam() {
    if !super::beam_is_there() {
        return;
    }
    let (couch, receiver, folder) = (couch(Flavour::V2, &["orders"]), receiver(), Dir::new());
    receiver
        .answer(|delivery| Reaction::Status(if delivery.doc_id().starts_with("bad") { 422 } else { 200 }));
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "retry_schedule = 100ms");
    let daemon = concat!(env!("CARGO_BIN_EXE_couch-hookd"), " os-daemon");
    let mut beam = Beam::start(&folder.path("beam"), &ini.text(), daemon);
    wait_until_alive(&couch);
    for doc in ["bad0", "good0", "bad1", "good1"] {
        couch.put("orders", doc, &json!({})).unwrap();
    }
    let letters = |n: usize| {
        couch.wait_until(WAIT_MAX, |seen| {
            let winners = seen.winners(STATE_DB);
            winners.iter().filter(|(id, winner)| id.starts_with("msg_") && !winner.deleted).count() == n
        })
    };
    assert!(letters(2), "{}", beam.transcript());
    let desk = Desk::new(&ini);
    assert!(desk.done(&["dead-letters", "list"]).contains("2 dead letters: 2 refused"));
    receiver.answer(|_| Reaction::Status(200));
    let said = desk.done(&["dead-letters", "replay", "--limit", "1", "--yes"]);
    assert!(said.contains("1 of 1 dead letter delivered"), "{said}");
    assert!(letters(1), "{}", beam.transcript());
    let replayed = receiver.look(|record| record.deliveries().iter().filter(|one| one.replay).count());
    assert_eq!(replayed, 1);
    assert!(desk.done(&["dead-letters", "discard", "--yes"]).contains("1 dead letter deleted"));
    assert!(letters(0), "{}", beam.transcript());
    assert!(desk.done(&["test", "orders"]).contains("the endpoint takes events"));
    assert!(desk.done(&["explain", "orders"]).contains("retry_schedule"));
    let counts = beam.counts();
    assert_eq!((counts["invalid"], counts["exits"]), (0, 0), "{}", beam.transcript());
}
