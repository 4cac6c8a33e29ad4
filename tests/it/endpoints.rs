//! What follows an answer, seen from outside: outages, suspicion, dead letters, 410, `Retry-After`, redirects.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Delivery, Record};
use couch_hookd::sys;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::host::WAIT_MAX;
use crate::world::{Daemon, Ini, World, checkpoint, couch, has_all, letters, long, receiver, revs, write};

/// Steps so short that a test sees many, the last one often enough for what a test replays.
const SHORT: &str = "retry_schedule = 100ms, 100ms, 200ms, 200ms, 300ms, 300ms, 500ms, 500ms, 500ms, 500ms, 500ms, \
    500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms, 500ms";

/// How long writing one document takes to arrive, `n` times, one after the other.
fn latencies(couch: &StandIn, receiver: &Receiver, n: usize, each: &mut dyn FnMut()) -> Vec<Duration> {
    let sample = |_| {
        each();
        let begun = sys::now();
        let rev = couch.put("quick", "q", &json!({})).unwrap();
        assert!(
            receiver.wait_until(WAIT_MAX, |record| record.accepted_rev("quick", "q") == Some(&rev)),
            "the webhook that works stopped\n{}",
            receiver.look(Record::transcript)
        );
        begun.elapsed()
    };
    (0..n).map(sample).collect()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

#[test]
fn an_outage_costs_no_memory_no_letter_and_nobody_else_anything() {
    let (outage, backlog, samples) = match long() {
        true => (Duration::from_secs(60), 5_000, 1_000),
        false => (Duration::from_secs(3), 2_500, 60),
    };
    // So large that reading on during the outage would show.
    let body = json!({"text": "x".repeat(2_048)});
    let write = |couch: &StandIn, n: usize| {
        (0..n).for_each(|i| drop(couch.put("orders", &format!("d{i}"), &body).unwrap()));
    };
    let last_step = Duration::from_millis(500);
    let couch = couch(Flavour::V3, &["orders", "quick"]);
    let (down, quick) = (receiver(), receiver());
    let ini = Ini::new(&couch.url())
        .webhook("orders", &down.url(), "retry_schedule = 100ms, 300ms, 500ms")
        .webhook("quick", &quick.url(), "");
    let world = World { daemon: Daemon::start(&ini), couch, receiver: down };
    let (couch, daemon) = (&world.couch, &world.daemon);
    // Buffers and workers have the size that work gives them before anything is compared.
    write(couch, 500);
    world.wait_for_all("orders");
    latencies(couch, &quick, 50, &mut || {});
    let mut before = latencies(couch, &quick, samples, &mut || {});
    let rss_before = daemon.rss_kib();

    world.receiver.refuse_connections(true).unwrap();
    write(couch, backlog);
    daemon.wait_for_log("webhook `orders`: its endpoint cannot be reached");
    let until = sys::now() + outage;
    let mut rss_most = 0;
    let mut meanwhile = latencies(couch, &quick, samples, &mut || rss_most = rss_most.max(daemon.rss_kib()));
    // Whatever else this machine does only adds: three times slow is slow.
    for _ in 0..2 {
        let again = latencies(couch, &quick, samples, &mut || rss_most = rss_most.max(daemon.rss_kib()));
        meanwhile = std::cmp::min_by_key(meanwhile, again, |times| median(times.clone()));
    }
    while sys::now() < until {
        latencies(couch, &quick, 10, &mut || rss_most = rss_most.max(daemon.rss_kib()));
    }
    assert_eq!(letters(couch), [] as [serde_json::Value; 0]);
    let n_before = world.receiver.look(|record| record.deliveries().len());
    world.receiver.refuse_connections(false).unwrap();
    let back_at = sys::now();
    world.wait("delivery after the outage", |record| record.deliveries().len() > n_before);
    let noticed = back_at.elapsed();
    world.wait_for_all_within(Duration::from_secs(60), "orders");
    before.extend(latencies(couch, &quick, samples, &mut || {}));
    let (usual, meanwhile) = (median(before), median(meanwhile));
    println!(
        "outage of {outage:?}, {backlog} changes waiting: resident {rss_before} KiB before, at most {rss_most} KiB \
         meanwhile; noticed after {noticed:?}; the other webhook's median latency {usual:?}, meanwhile {meanwhile:?}"
    );
    assert!(rss_most <= rss_before + 2 * 1024, "{rss_before} KiB grew to {rss_most} KiB");
    // ± 20 % of jitter, and what it takes to connect on a machine that is busy.
    assert!(noticed <= last_step.mul_f64(1.2) + Duration::from_millis(300), "noticed after {noticed:?}");
    // Beside many other tests the machine's own noise is larger than that.
    let at_most =
        if long() { usual.mul_f64(1.5) } else { usual.mul_f64(1.5).max(Duration::from_millis(200)) };
    assert!(meanwhile <= at_most, "{meanwhile:?} against {usual:?}");
    assert_eq!(letters(couch), [] as [serde_json::Value; 0]);
    assert_eq!(daemon.n_logged("webhook `quick`: its endpoint"), 0, "{}", daemon.transcript());
}

/// One document whose handler is broken, among many others.
fn one_bad_document(timeout: &str, bad: fn() -> Reaction) {
    let n = 1_000;
    let couch = couch(Flavour::V1, &["orders"]);
    write(&couch, "orders", n);
    let receiver = receiver();
    receiver.answer(move |one| if one.doc_id() == "d7" { bad() } else { Reaction::Status(200) });
    let mut world = World::start_on(couch, receiver, &format!("{SHORT}\ntimeout = {timeout}"));
    let begun = sys::now();
    let mut others = revs(&world.couch, "orders");
    others.remove("d7");
    world.wait_long(Duration::from_secs(30), "999 others", |record| has_all(record, "orders", &others));
    let took = begun.elapsed();
    world.daemon.wait_for_log("is a dead letter now (suspect)");
    let stored = letters(&world.couch);
    println!("999 others took {took:?}");
    assert_eq!(stored.len(), 1, "{stored:#?}");
    assert_eq!((&stored[0]["class"], &stored[0]["doc_id"]), (&json!("suspect"), &json!("d7")), "{stored:#?}");
    let end = json!(world.couch.update_seq("orders"));
    world.wait_couch("checkpoint behind the letter", |seen| {
        let json = seen.local("orders", "couch-hookd.orders");
        json.is_some_and(|json| {
            serde_json::from_str::<serde_json::Value>(&json).unwrap()["through_seq"] == end
        })
    });
    // It is replayed by a later life, too, and goes when it has been taken.
    let n_replays = |record: &Record| record.deliveries().iter().filter(|one| one.replay).count();
    world.wait("replay", |record| n_replays(record) > 0);
    world.daemon.kill();
    world.daemon.start_again();
    let before = world.receiver.look(n_replays);
    world.couch.put("orders", "later", &json!({})).unwrap();
    world.wait("replay by the next life", |record| n_replays(record) > before);
    let id = stored[0]["_id"].as_str().unwrap().to_owned();
    world.receiver.look(|record| {
        let of_letter = record.deliveries().iter().filter(|one| one.doc_id() == "d7");
        assert_eq!(
            of_letter.map(|one| one.webhook_id.clone()).collect::<BTreeSet<_>>(),
            BTreeSet::from([id.clone()])
        );
    });
    world.receiver.answer(|_| Reaction::Status(200));
    world.wait_couch("end of the letter", |seen| {
        seen.winner("couch_hookd", &id).is_none_or(|one| one.deleted)
    });
    world.wait_for_all("orders");
}

#[test]
fn a_document_that_always_gets_500_becomes_a_suspect_and_holds_up_nobody() {
    one_bad_document("15s", || Reaction::Status(500));
}

#[test]
fn a_document_whose_handler_never_answers_becomes_a_suspect_and_holds_up_nobody() {
    one_bad_document(if long() { "1s" } else { "300ms" }, || Reaction::Hang);
}

#[test]
fn an_endpoint_that_refuses_everything_gets_few_dead_letters() {
    let (refusing, backlog) =
        if long() { (Duration::from_secs(60), 5_000) } else { (Duration::from_secs(4), 1_000) };
    let couch = couch(Flavour::V2, &["orders"]);
    let receiver = receiver();
    let world = World::start_on(couch, receiver, SHORT);
    // One is accepted first: from "up" more is sent at a time than from "not known yet".
    write(&world.couch, "orders", 20);
    world.wait_for_all("orders");
    world.receiver.answer(|_| Reaction::Status(422));
    write(&world.couch, "orders", backlog);
    let many = |record: &Record| record.deliveries().len() > 20 * backlog;
    assert!(!world.receiver.wait_until(refusing, many), "it is hammered\n{}", world.transcript());
    let stored = letters(&world.couch);
    world.receiver.answer(|_| Reaction::Status(200));
    let of_letters: BTreeSet<&str> = stored.iter().filter_map(|letter| letter["doc_id"].as_str()).collect();
    let mut others = revs(&world.couch, "orders");
    others.retain(|id, _| !of_letters.contains(id.as_str()));
    world.wait_long(Duration::from_secs(60), "others", |record| has_all(record, "orders", &others));
    let stored = letters(&world.couch);
    println!("422 to everything for {refusing:?}, {backlog} changes: {} dead letters", stored.len());
    assert!(stored.len() <= 10, "{stored:#?}");
    assert!(others.len() + stored.len() >= backlog);
    world.assert_clean();
}

#[test]
fn one_410_is_a_proxys_two_are_for_good() {
    let mut world = World::start(Flavour::V3, SHORT);
    let gone_once = std::sync::atomic::AtomicBool::new(true);
    world.receiver.answer(move |_| {
        let first = gone_once.swap(false, std::sync::atomic::Ordering::Relaxed);
        Reaction::Status(if first { 410 } else { 200 })
    });
    write(&world.couch, "orders", 5);
    world.wait_for_all("orders");
    assert_eq!(world.daemon.n_logged("is gone"), 0);

    world.receiver.answer(|_| Reaction::Status(410));
    write(&world.couch, "orders", 5);
    world.daemon.wait_for_log("said 410 twice and is gone");
    world.wait_couch("gone_since", |seen| {
        seen.winner("couch_hookd", "webhook:orders").is_some_and(|one| one.json.contains("\"gone_since\""))
    });
    assert_eq!(world.daemon.terminate().code, Some(0), "{}", world.transcript());
    let n = world.receiver.look(|record| record.deliveries().len());
    let kept = checkpoint(&world.couch, "orders", "orders");
    world.receiver.answer(|_| Reaction::Status(200));
    world.daemon.start_again();
    world.daemon.wait_for_log("is paused for good: its endpoint said 410");
    write(&world.couch, "orders", 5);
    let ini = Ini::new(&world.couch.url());
    let changed = ini.webhook("orders", &world.receiver.url(), &format!("{SHORT}\nheader.x-new = yes"));
    assert_eq!(world.receiver.look(|record| record.deliveries().len()), n, "{}", world.transcript());
    assert_eq!(checkpoint(&world.couch, "orders", "orders"), kept);
    world.daemon.configure(&changed.text());
    world.daemon.signal(Signal::SIGHUP);
    world.wait_for_all("orders");
    assert!(world.couch.look(|seen| {
        let record = seen.winner("couch_hookd", "webhook:orders").unwrap();
        !record.json.contains("\"gone_since\":\"")
    }));
}

#[test]
fn the_same_410_after_a_minute_is_believed() {
    if !long() {
        println!("skipped: 410 to one event for a minute (HOOKD_LONG is not set)");
        return;
    }
    let world = World::start(Flavour::V3, "retry_schedule = 5s");
    world.receiver.answer(|_| Reaction::Status(410));
    write(&world.couch, "orders", 1);
    let gone = |_: &Record| world.daemon.n_logged("said 410 twice and is gone") > 0;
    let early = world.receiver.wait_until(Duration::from_secs(50), gone);
    assert!(!early, "{}", world.transcript());
    world.wait_long(Duration::from_secs(40), "end of the webhook", |record| {
        record.deliveries().len() > 8 && gone(record)
    });
}

/// The time between a request that is told to come back later and the next request of all.
fn pause_after(headers: fn() -> Vec<(String, String)>, lines: &str) -> Duration {
    let world = World::start(Flavour::V3, &format!("retry_schedule = 100ms\n{lines}"));
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
    let first: std::sync::Mutex<Option<Instant>> = std::sync::Mutex::default();
    world.receiver.answer(move |one| {
        // Those that are in flight with the first get the same answer.
        let first = *first.lock().unwrap().get_or_insert(one.received_at);
        if one.received_at < first + Duration::from_millis(400) {
            let answer = Reaction::StatusWith { status: 503, headers: headers(), body: String::new() };
            return Reaction::Delay(Duration::from_millis(100), Box::new(answer));
        }
        Reaction::Status(200)
    });
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let refused = record.deliveries().iter().filter(|one| one.status == Some(503));
        let told = refused.clone().map(|one| one.received_at).max().unwrap();
        assert!(refused.count() <= 8, "{}", record.transcript());
        let later = record.deliveries().iter().map(|one| one.received_at).filter(|at| *at > told);
        later.min().unwrap() - told
    })
}

#[test]
fn retry_after_holds_the_whole_endpoint() {
    let seconds = || vec![("Retry-After".to_owned(), "2".to_owned())];
    let paused = pause_after(seconds, "");
    assert!(paused >= Duration::from_secs(2) && paused < Duration::from_secs(6), "{paused:?}");
    // Against the answer's own clock, which is wrong.
    let date = || {
        vec![
            ("Date".to_owned(), "Sat, 21 Nov 2020 21:30:40 GMT".to_owned()),
            ("Retry-After".to_owned(), "Sat, 21 Nov 2020 21:30:42 GMT".to_owned()),
        ]
    };
    let paused = pause_after(date, "");
    assert!(paused >= Duration::from_secs(2) && paused < Duration::from_secs(6), "{paused:?}");
    let an_hour = || vec![("Retry-After".to_owned(), "3600".to_owned())];
    let paused = pause_after(an_hour, "retry_after_max = 1s");
    assert!(paused >= Duration::from_secs(1) && paused < Duration::from_secs(6), "{paused:?}");
}

#[test]
fn redirects_are_not_followed() {
    let world = World::start(Flavour::V3, SHORT);
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let location = format!("http://{}/hook", elsewhere.local_addr().unwrap());
    world.receiver.answer(move |one| match one.attempt {
        Some(1) => {
            let status = *fastrand::choice(&[301, 302, 303, 307, 308]).unwrap();
            let headers = vec![("Location".to_owned(), location.clone())];
            Reaction::StatusWith { status, headers, body: String::new() }
        }
        _ => Reaction::Status(200),
    });
    write(&world.couch, "orders", 10);
    world.wait_for_all("orders");
    assert_eq!(elsewhere.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(letters(&world.couch), [] as [serde_json::Value; 0]);
}

#[test]
fn a_pooled_connection_that_died_is_no_failure() {
    let world = World::start(Flavour::V3, "retry_schedule = 300ms");
    write(&world.couch, "orders", 1);
    world.wait_for_all("orders");
    let cuts = std::sync::atomic::AtomicU32::new(1);
    let left = move |_: &Delivery| {
        use std::sync::atomic::Ordering::Relaxed;
        match cuts.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)) {
            Ok(_) => Reaction::CutConnection,
            Err(_) => Reaction::Status(200),
        }
    };
    world.receiver.answer(left);
    write(&world.couch, "orders", 1);
    world.wait_for_all("orders");
    let attempts = |world: &World| -> Vec<_> {
        world
            .receiver
            .look(|record| record.deliveries().iter().map(|one| (one.attempt, one.status)).collect())
    };
    let silent = [(Some(1), Some(200)), (Some(1), None), (Some(1), Some(200))];
    assert_eq!(attempts(&world), silent, "{}", world.transcript());
    // Twice in a row it is a failure, and the schedule's.
    let cuts = std::sync::atomic::AtomicU32::new(2);
    world.receiver.answer(move |_| {
        use std::sync::atomic::Ordering::Relaxed;
        match cuts.fetch_update(Relaxed, Relaxed, |n| n.checked_sub(1)) {
            Ok(_) => Reaction::CutConnection,
            Err(_) => Reaction::Status(200),
        }
    });
    write(&world.couch, "orders", 1);
    world.wait_for_all("orders");
    assert_eq!(attempts(&world)[3..], [(Some(1), None), (Some(1), None), (Some(2), Some(200))]);
}

/// Requests that were under way when one was told to come back later, and are taken: they say nothing about later.
#[test]
fn retry_after_holds_though_what_was_in_flight_is_taken() {
    let world = World::start(Flavour::V3, "retry_schedule = 100ms");
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
    let told: std::sync::Mutex<Option<Instant>> = std::sync::Mutex::default();
    world.receiver.answer(move |one| {
        let mut told = told.lock().unwrap();
        if told.is_none() && one.concurrency >= 4 {
            *told = Some(sys::now());
            let headers = vec![("Retry-After".to_owned(), "2".to_owned())];
            return Reaction::StatusWith { status: 429, headers, body: String::new() };
        }
        Reaction::Delay(Duration::from_millis(50), Box::new(Reaction::Status(200)))
    });
    write(&world.couch, "orders", 50);
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let limited = record.deliveries().iter().find(|one| one.status == Some(429)).expect("one of them");
        let after = |one: &&Delivery| one.received_at > limited.received_at + Duration::from_millis(60);
        let next = record.deliveries().iter().find(after).unwrap().received_at - limited.received_at;
        assert!(
            next >= Duration::from_secs(2),
            "the next request came after {next:?}\n{}",
            record.transcript()
        );
    });
}

#[test]
fn an_endpoint_that_is_gone_is_said_once() {
    let world = World::start(Flavour::V3, SHORT);
    write(&world.couch, "orders", 20);
    world.wait_for_all("orders");
    world.receiver.answer(|_| Reaction::Delay(Duration::from_millis(50), Box::new(Reaction::Status(410))));
    write(&world.couch, "orders", 20);
    world.daemon.wait_for_log("said 410 twice and is gone");
    world.wait("answers to all", |record| record.concurrency() == 0);
    world.receiver.answer(|_| Reaction::Status(200));
    let mut world = world;
    assert_eq!(world.daemon.terminate().code, Some(0));
    assert_eq!(world.daemon.n_logged("said 410 twice and is gone"), 1, "{}", world.transcript());
}

#[test]
fn a_suspect_is_replayed_after_a_restart_though_nothing_else_happens() {
    let couch = couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 200);
    let receiver = receiver();
    receiver.answer(|one| Reaction::Status(if one.doc_id() == "d7" { 500 } else { 200 }));
    let mut world = World::start_on(couch, receiver, SHORT);
    world.daemon.wait_for_log("is a dead letter now (suspect)");
    assert_eq!(world.daemon.terminate().code, Some(0));
    world.receiver.answer(|_| Reaction::Status(200));
    world.daemon.start_again();
    world.wait("replay", |record| record.accepted_rev("orders", "d7").is_some());
}

#[test]
fn a_rate_limit_paces_first_attempts_and_retries() {
    let world = World::start(Flavour::V3, "rate_limit = 40/s\nretry_schedule = 100ms");
    // Every document's first attempt fails, so that half of the attempts are retries.
    world.receiver.answer(|one| Reaction::Status(if one.attempt == Some(1) { 422 } else { 200 }));
    write(&world.couch, "orders", 60);
    world.wait_for_all("orders");
    world.receiver.look(|record| {
        let times: Vec<Instant> = record.deliveries().iter().map(|one| one.received_at).collect();
        let took = *times.last().unwrap() - times[0];
        let least = Duration::from_millis(1_000 * (times.len() as u64 - 40) / 40);
        assert!(
            times.len() >= 120 && took >= least.mul_f64(0.9),
            "{} in {took:?}, least {least:?}",
            times.len()
        );
    });
}
