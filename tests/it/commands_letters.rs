//! `dead-letters`: listed, sent again while live events flow, discarded; and the numbers after a kill in the middle.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use couch_hookd::pure::message::WebhookId;
use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::commands::{Desk, wait_until_alive};
use crate::host::WAIT_MAX;
use crate::world::{
    Daemon, FLAVOURS, Ini, STATE_DB, World, checkpoint, couch, letters, long, on_each, receiver, write,
};

const CLASSES: [&str; 3] = ["refused", "suspect", "given_up"];

/// Stores a letter about this revision, as the daemon does; its id.
fn letter(couch: &StandIn, mark: &str, doc_id: &str, rev: &str, class: &str) -> String {
    let id = WebhookId::of(&("orders", "orders", mark, doc_id, [rev])).to_string();
    let letter = json!({"webhook": "orders", "db": "orders", "mark": mark, "doc_id": doc_id, "rev": rev,
        "revs": [rev], "seq": null, "event_type": "document.updated", "class": class, "status": 422,
        "answer": "total is missing", "attempts": 3, "first_attempt_at": "2026-11-21T20:46:40Z",
        "stored_at": "2026-11-21T20:46:41.5Z"});
    couch.put(STATE_DB, &id, &letter).unwrap();
    id
}

fn mark(couch: &StandIn) -> String {
    checkpoint(couch, "orders", "orders").unwrap()["mark"].as_str().unwrap().to_owned()
}

fn ini(couch: &StandIn, receiver: &Receiver) -> Ini {
    // Refused at once where a test wants that, and never suspected by chance.
    Ini::new(&couch.url()).webhook("orders", &receiver.url(), "retry_schedule = 100ms")
}

/// Delivered letters that were sent again, by id.
fn replayed(record: &Record) -> Vec<&str> {
    let replays = record.deliveries().iter().filter(|one| one.replay && one.accepted());
    replays.map(|one| one.webhook_id.as_str()).collect()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Writes a document again and again, each when the one before was delivered; how long each took.
fn live(couch: &StandIn, receiver: &Receiver, n: usize) -> Vec<Duration> {
    (0..n)
        .map(|i| {
            let written: Instant = sys::now();
            let rev = couch.put("orders", "live", &json!({"n": i})).unwrap();
            let arrived = |record: &Record| record.accepted_rev("orders", "live") == Some(&rev);
            assert!(receiver.wait_until(WAIT_MAX, arrived), "`live` {rev} did not arrive");
            written.elapsed()
        })
        .collect()
}

#[test]
fn one_class_of_many_is_sent_again_while_live_events_flow() {
    let n = if long() { 1_000 } else { 150 };
    let world = World::start_on(couch(Flavour::V3, &["orders"]), receiver(), "");
    write(&world.couch, "orders", n);
    world.wait_for_all("orders");
    let before = live(&world.couch, &world.receiver, 20);
    world.wait_couch("a checkpoint", |seen| seen.local("orders", "couch-hookd.orders").is_some());
    let (mark, mut wanted, mut superseded) = (mark(&world.couch), BTreeSet::new(), BTreeSet::new());
    for i in 0..n {
        let doc_id = format!("d{i}");
        let rev = world.couch.winner("orders", &doc_id).unwrap().rev;
        let class = CLASSES[i % 3];
        let id = letter(&world.couch, &mark, &doc_id, &rev, class);
        if i % 15 == 0 {
            // Delivered at a newer revision since.
            world.couch.put("orders", &doc_id, &json!({"n": "newer"})).unwrap();
            superseded.insert(id);
        } else if class == "refused" {
            wanted.insert(id);
        }
    }
    world.wait_for_all("orders");
    wait_until_alive(&world.couch);
    let desk = Desk::new(&ini(&world.couch, &world.receiver));
    let begun = sys::now();
    let listed = desk.done(&["dead-letters", "list", "--webhook", "orders"]);
    println!("{n} dead letters listed in {:?}", begun.elapsed());
    let (n_refused, n_suspect, n_given_up) = (n.div_ceil(3), (n + 1) / 3, n / 3);
    assert!(listed.ends_with(&format!("{n} dead letters: {n_refused} refused, {n_suspect} suspect, {n_given_up} given_up; {} of them not shown (--limit)\n", n - 100)), "{listed}");
    let json = desk.done(&["dead-letters", "list", "--class", "suspect", "--json"]);
    assert_eq!(json.lines().count(), n_suspect);
    assert!(json.lines().all(|line| line.contains("\"class\":\"suspect\"")), "{json}");
    let replay = ["dead-letters", "replay", "--class", "refused", "--rate", "50", "--yes"];
    let command = desk.command(&replay).spawn().unwrap();
    assert!(
        world.receiver.wait_until(WAIT_MAX, |record| !replayed(record).is_empty()),
        "{}",
        world.transcript()
    );
    let during = live(&world.couch, &world.receiver, 20);
    let output = command.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    println!(
        "live latency: median {:?} before, {:?} beside 50 letters a second",
        median(before),
        median(during)
    );
    let (n_sent, n_stay) = (wanted.len(), superseded.len());
    assert_eq!(output.status.code(), Some(1), "some stay: {out}{err}\n{}", world.transcript());
    assert!(
        out.contains(&format!("{n_sent} of {n_refused} dead letters delivered; {n_stay} superseded stay")),
        "{out}"
    );
    assert!(out.contains("superseded by 2-"), "{out}");
    world.receiver.look(|record| {
        let told: Vec<&str> = replayed(record);
        assert_eq!(told.iter().map(|id| (*id).to_owned()).collect::<BTreeSet<_>>(), wanted);
        assert_eq!(told.len(), wanted.len(), "each once");
    });
    world.assert_clean();
    let left: BTreeSet<String> =
        letters(&world.couch).iter().map(|letter| letter["_id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(left.len(), n - n_sent);
    assert!(left.is_disjoint(&wanted));
    // Those can be had all the same.
    let said = desk.done(&["dead-letters", "replay", "--class", "refused", "--even-if-superseded", "--yes"]);
    assert!(said.contains(&format!("{n_stay} of {n_stay} dead letters delivered")), "{said}");
    world.receiver.look(|record| {
        let told: BTreeSet<String> = replayed(record).into_iter().map(str::to_owned).collect();
        assert!(superseded.is_subset(&told), "exactly the old ones, with their ids");
    });
    let said = desk.done(&["dead-letters", "discard", "--class", "suspect", "--yes"]);
    assert!(said.contains(&format!("{n_suspect} dead letters deleted")), "{said}");
    assert_eq!(letters(&world.couch).len(), n_given_up, "the third class is left");
}

#[test]
fn numbers_are_right_after_a_kill_in_the_middle() {
    let n = 60;
    let mut world = World::start_on(couch(Flavour::V2, &["orders"]), receiver(), "");
    write(&world.couch, "orders", n);
    world.wait_for_all("orders");
    world.wait_couch("a checkpoint", |seen| seen.local("orders", "couch-hookd.orders").is_some());
    let mark = mark(&world.couch);
    for i in 0..n {
        let rev = world.couch.winner("orders", &format!("d{i}")).unwrap().rev;
        letter(&world.couch, &mark, &format!("d{i}"), &rev, "refused");
    }
    wait_until_alive(&world.couch);
    // One of them is still refused.
    world.receiver.answer(|one| Reaction::Status(if one.replay && one.doc_id() == "d7" { 422 } else { 200 }));
    let desk = Desk::new(&ini(&world.couch, &world.receiver));
    let replay = ["dead-letters", "replay", "--rate", "20", "--yes", "--json"];
    let command = desk.command(&replay).spawn().unwrap();
    world.wait("a third of them", |record| replayed(record).len() >= n / 3);
    world.daemon.kill();
    let told_by_then = world.receiver.look(|record| replayed(record).len());
    let left_by_then = letters(&world.couch).len();
    assert!(left_by_then > 1 && left_by_then >= n - told_by_then, "{told_by_then} told, {left_by_then} left");
    world.daemon.start_again();
    let output = command.wait_with_output().unwrap();
    let out = String::from_utf8(output.stdout).unwrap();
    let answer: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"));
    assert_eq!(
        (&answer["letters"], &answer["delivered"], &answer["refused"], &answer["left"]),
        (&json!(n), &json!(n - 1), &json!(1), &json!(1)),
        "{answer}"
    );
    assert_eq!(output.status.code(), Some(1));
    let left = letters(&world.couch);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0]["doc_id"], "d7");
    // Told twice at the most where the kill came between a 2xx and the deletion of the letter.
    world.receiver.look(|record| {
        let told = replayed(record);
        let all: BTreeSet<&str> = told.iter().copied().collect();
        assert_eq!(all.len(), n - 1);
        assert!(told.len() <= n - 1 + 8, "{}", told.len());
    });
    world.assert_clean();
}

#[test]
fn without_a_daemon_they_are_sent_from_here_exactly_as_they_were() {
    on_each(&FLAVOURS, |flavour| {
        let (couch, receiver) = (couch(flavour, &["orders"]), receiver());
        let ini = ini(&couch, &receiver);
        let desk = Desk::new(&ini);
        // A first start, so that there is a mark.
        let mut daemon = Daemon::start(&ini);
        couch.put("orders", "first", &json!({})).unwrap();
        assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == 1));
        daemon.terminate();
        let mark = mark(&couch);
        // Both revisions were refused: nothing newer was delivered.
        let old = couch.put("orders", "a", &json!({"total": "old"})).unwrap();
        let new = couch.put("orders", "a", &json!({"total": "new"})).unwrap();
        let (old_id, new_id) =
            (letter(&couch, &mark, "a", &old, "refused"), letter(&couch, &mark, "a", &new, "refused"));
        let said = desk.say(&["dead-letters", "replay", &old_id, "--yes"]);
        assert_eq!(said.status, 0, "{flavour:?}: {said:?}");
        assert!(said.err.contains("no daemon runs webhook `orders`: done here"), "{said:?}");
        assert!(said.out.contains("1 of 1 dead letter delivered"), "{said:?}");
        receiver.look(|record| {
            let last = record.deliveries().last().unwrap();
            assert_eq!((last.rev(), &*last.webhook_id, last.replay), (&*old, &*old_id, true), "{flavour:?}");
        });
        // Where CouchDB has the old revision no more, what is there now is told under its own id.
        let old_id = letter(&couch, &mark, "a", &old, "refused");
        couch.compact("orders");
        desk.done(&["dead-letters", "replay", &old_id, "--yes"]);
        receiver.look(|record| {
            let last = record.deliveries().last().unwrap();
            assert_eq!((last.rev(), &*last.webhook_id), (&*new, &*new_id), "{flavour:?}");
        });
        assert_eq!(letters(&couch).len(), 1);
        let shown = desk.done(&["dead-letters", "show", &new_id]);
        assert!(shown.contains("answer            total is missing"), "{shown}");
        // A letter about a document that is gone, and one of a database that was made again.
        couch.delete("orders", "a").unwrap();
        let said = desk.say(&["dead-letters", "replay", "--yes"]);
        assert!(said.status == 1 && said.out.contains("0 of 1 dead letter delivered; 1 "), "{said:?}");
        desk.done(&["dead-letters", "discard", "--yes"]);
        assert_eq!(letters(&couch).len(), 0);
        assert_eq!(desk.done(&["dead-letters", "list"]), "no dead letters\n");
        assert!(desk.say(&["dead-letters", "discard"]).status == 0, "nothing to ask about");
    });
}

#[test]
fn more_letters_than_a_page_holds_are_all_listed_and_all_discarded() {
    let n = if long() { 10_000 } else { 1_050 };
    let (couch, receiver) = (couch(Flavour::V2, &["orders"]), receiver());
    let desk = Desk::new(&ini(&couch, &receiver));
    couch.create_db(STATE_DB);
    for i in 0..n {
        letter(&couch, "83146ee2921be552562ce8f00b98b5b3", &format!("d{i}"), "1-a", CLASSES[i % 3]);
    }
    let begun = sys::now();
    let json = desk.done(&["dead-letters", "list", "--json"]);
    println!("{n} dead letters listed in {:?}", begun.elapsed());
    let ids: BTreeSet<String> = json
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["_id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!((ids.len(), json.lines().count()), (n, n));
    let begun = sys::now();
    let said = desk.done(&["dead-letters", "discard", "--limit", "7", "--yes"]);
    assert!(said.contains("7 dead letters deleted"), "{said}");
    assert_eq!(letters(&couch).len(), n - 7);
    let said = desk.done(&["dead-letters", "discard", "--webhook", "orders", "--yes"]);
    println!("and discarded in {:?}", begun.elapsed());
    assert!(said.contains(&format!("{} dead letters deleted", n - 7)), "{said}");
    assert_eq!(letters(&couch).len(), 0);
}

#[test]
fn a_paused_webhook_sends_no_letters_and_says_so() {
    let (couch, receiver) = (couch(Flavour::V3, &["orders"]), receiver());
    let desk = Desk::new(&ini(&couch, &receiver));
    desk.done(&["pause", "orders"]);
    letter(&couch, "83146ee2921be552562ce8f00b98b5b3", "a", "1-a", "refused");
    let said = desk.say(&["dead-letters", "replay", "--yes"]);
    assert!(said.status == 1 && said.err.contains("`couch-hookd resume orders` first"), "{said:?}");
    let said = desk.say(&["dead-letters", "replay"]);
    assert!(said.status == 2 && said.err.contains("say --yes"), "{said:?}");
    let said = desk.say(&["dead-letters", "list", "--since", "yesterday"]);
    assert!(said.status == 2 && said.err.contains("`2h`"), "{said:?}");
}

#[test]
fn what_is_discarded_is_not_sent_again_by_the_daemon_either() {
    let world = World::start(Flavour::V3, "retry_schedule = 100ms, 100ms, 100ms, 2s");
    // Fails at one document, and takes others: suspect after three tries.
    world.receiver.answer(|one| Reaction::Status(if one.doc_id() == "bad" { 500 } else { 200 }));
    world.couch.put("orders", "bad", &json!({})).unwrap();
    let mut n = 0;
    while letters(&world.couch).is_empty() {
        world.couch.put("orders", &format!("good{n}"), &json!({})).unwrap();
        n += 1;
        world.wait("the next good one", |record| record.n_accepted() >= n);
        assert!(n < 10_000, "{}", world.transcript());
    }
    wait_until_alive(&world.couch);
    let desk = Desk::new(&ini(&world.couch, &world.receiver));
    let said = desk.done(&["dead-letters", "discard", "--class", "suspect", "--yes"]);
    assert!(said.contains("1 dead letter deleted"), "{said}");
    let (n_bad, n_before) = world.receiver.look(|record| {
        let bad = record.deliveries().iter().filter(|one| one.doc_id() == "bad").count();
        (bad, record.deliveries().len())
    });
    // Nothing to wait for but time passing: the replay would have come after 2 s.
    let over =
        world.receiver.wait_until(Duration::from_secs(3), |record| record.deliveries().len() > n_before);
    let now =
        world.receiver.look(|record| record.deliveries().iter().filter(|one| one.doc_id() == "bad").count());
    assert!(now == n_bad && !over, "sent {} times more\n{}", now - n_bad, world.transcript());
}
