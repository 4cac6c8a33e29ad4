//! `watch = replications` under SIGKILL at any moment: every change is told, in order, a repeat under its first id.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Delivery, Record};
use couch_hookd::sys;

use crate::host::WAIT_MAX;
use crate::replications::{ALL, DB, LIFE, at_work, put, step, told};
use crate::world::{Daemon, Ini, STATE_DB, couch, long, receiver_with};

/// Replications that live at the same time.
const IDS: [&str; 5] = ["a", "b", "c", "d", "e"];
/// One that never changes.
const UNCHANGED: &str = "unchanged";

/// Lets all replications go through life after life, until the killing is over; a step is done when what it tells has
/// been accepted. Gives what was to be told of each.
fn live(couch: &StandIn, receiver: &Receiver, flavour: Flavour, killing: &AtomicBool) -> Vec<&'static str> {
    let mut expected = Vec::new();
    for (at, name) in LIFE.iter().cycle().enumerate() {
        if at % LIFE.len() == 0 && !killing.load(Ordering::SeqCst) {
            break;
        }
        for id in IDS {
            let kinds = step(couch, flavour, id, name);
            if id == IDS[0] {
                expected.extend(kinds);
            }
        }
        let until = sys::now() + 2 * WAIT_MAX;
        let there = |record: &Record| {
            let told = told(record);
            IDS.iter().all(|id| told.get(*id).map_or(0, Vec::len) >= expected.len())
        };
        // Until it counts, what recovers has to be seen working.
        while !receiver.wait_until(Duration::from_millis(100), there) {
            if sys::now() > until {
                // The other thread, which has the daemon's log, says what is missing.
                return expected;
            }
            if *name == "recover" {
                IDS.iter().for_each(|id| couch.replicate(DB, id, at_work(flavour)).unwrap());
            }
        }
    }
    expected
}

/// In no life of the daemon, of which these are the starts, may an event come behind a later one of the same `lane`.
pub(crate) fn assert_order_in_each_life(
    record: &Record,
    lane: impl Fn(&Delivery) -> String,
    starts: &[Instant],
    log: &str,
) {
    let mut known: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut last: BTreeMap<(usize, String), usize> = BTreeMap::new();
    for one in record.deliveries().iter().filter(|one| one.accepted()) {
        // What the life before sent may be read only now; the new one is not yet that far.
        let life =
            starts.iter().filter(|start| **start + Duration::from_millis(20) <= one.received_at).count();
        let ids = known.entry(lane(one)).or_default();
        let at = ids.iter().position(|id| *id == one.webhook_id).unwrap_or_else(|| {
            ids.push(&one.webhook_id);
            ids.len() - 1
        });
        if let Some(before) = last.insert((life, lane(one)), at) {
            assert!(before <= at, "{} of `{}` came behind a later one\n{log}", one.webhook_id, lane(one));
        }
    }
}

fn kill_through_lives(flavour: Flavour) {
    let n_kills = if long() { 30 } else { 12 };
    let couch = couch(flavour, &[DB]);
    put(&couch, UNCHANGED);
    couch.replicate(DB, UNCHANGED, at_work(flavour)).unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    receiver.answer(|_| {
        Reaction::Delay(Duration::from_millis(fastrand::u64(0..60)), Box::new(Reaction::Status(200)))
    });
    let mut daemon = Daemon::start(&Ini::new(&couch.url()).webhook("sync", &receiver.url(), ALL));
    let mut starts = vec![sys::now()];
    let killing = AtomicBool::new(true);
    let expected = std::thread::scope(|scope| {
        let living = scope.spawn(|| live(&couch, &receiver, flavour, &killing));
        for _ in 0..n_kills {
            // A life of the daemon ends when its time is up, or in the middle of a request.
            let life = Duration::from_millis(fastrand::u64(30..2_000));
            let n = receiver.look(|record| record.deliveries().len());
            let in_a_request = fastrand::bool();
            let _ = receiver.wait_until(life, |record| in_a_request && record.deliveries().len() > n);
            daemon.kill();
            daemon.start_again();
            starts.push(sys::now());
        }
        killing.store(false, Ordering::SeqCst);
        living.join().unwrap()
    });
    // Whatever is told again comes before a change that is made now.
    put(&couch, "last");
    couch.replicate(DB, "last", at_work(flavour)).unwrap();
    let last = |record: &Record| told(record).contains_key("last");
    assert!(receiver.wait_until(WAIT_MAX, last), "{}", daemon.transcript());
    let log = daemon.transcript();
    receiver.look(|record| {
        let told = told(record);
        for id in IDS {
            let found: Vec<&str> = told[id].iter().map(|one| one.kind.as_str()).collect();
            assert_eq!(found, expected, "{flavour:?} `{id}`\n{}\n{log}", record.transcript());
        }
        let unchanged: Vec<&str> = told[UNCHANGED].iter().map(|one| one.kind.as_str()).collect();
        assert_eq!(unchanged, ["running"], "{flavour:?}\n{}\n{log}", record.transcript());
        assert_eq!((record.n_unverified(), record.violations()), (0, &[][..]));
        assert_order_in_each_life(record, |one| one.doc_id().to_owned(), &starts, &log);
        let n_told: usize = told.values().map(Vec::len).sum();
        println!(
            "{flavour:?}: {} kills, {n_told} events, {} requests",
            starts.len() - 1,
            record.deliveries().len()
        );
    });
}

/// Of several daemons whoever tells is killed; the next one goes on from the states that are stored.
#[test]
fn whoever_takes_over_tells_nothing_as_something_new() {
    let n_kills = if long() { 20 } else { 4 };
    let couch = couch(Flavour::V3, &[DB]);
    put(&couch, UNCHANGED);
    couch.replicate(DB, UNCHANGED, at_work(Flavour::V3)).unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let ini = Ini::new(&couch.url()).webhook("sync", &receiver.url(), ALL);
    let times = [("HOOKD_TEST_LEASE_TTL_MS", "1500")];
    let mut daemons = [Daemon::start_with(&ini, &times), Daemon::start_with(&ini, &times)];
    let holder = || {
        let lease = couch.winner(STATE_DB, "lease:sync").filter(|doc| !doc.deleted)?;
        let lease: serde_json::Value = serde_json::from_str(&lease.json).unwrap();
        lease["pid"].as_u64().filter(|_| lease["released"] == false)
    };
    let killing = AtomicBool::new(true);
    let expected = std::thread::scope(|scope| {
        let living = scope.spawn(|| live(&couch, &receiver, Flavour::V3, &killing));
        let mut n_killed = 0;
        while n_killed < n_kills && !living.is_finished() {
            let life = Duration::from_millis(fastrand::u64(200..2_000));
            let n = receiver.look(|record| record.deliveries().len());
            let _ = receiver.wait_until(life, |record| record.deliveries().len() > n + 3);
            let pid = holder();
            if let Some(teller) = daemons.iter_mut().find(|one| pid == Some(u64::from(one.pid()))) {
                teller.kill();
                teller.start_again();
                n_killed += 1;
            }
        }
        killing.store(false, Ordering::SeqCst);
        living.join().unwrap()
    });
    let log = daemons.each_ref().map(Daemon::transcript).join("\n");
    receiver.look(|record| {
        let told = told(record);
        for id in IDS {
            let found: Vec<&str> = told[id].iter().map(|one| one.kind.as_str()).collect();
            assert_eq!(found, expected, "`{id}`\n{}\n{log}", record.transcript());
        }
        assert_eq!((record.n_unverified(), record.violations()), (0, &[][..]), "{log}");
    });
}

#[test]
fn nothing_is_lost_or_told_as_something_new_on_1_x() {
    kill_through_lives(Flavour::V1);
}

#[test]
fn nothing_is_lost_or_told_as_something_new_on_2_x() {
    kill_through_lives(Flavour::V2);
}

#[test]
fn nothing_is_lost_or_told_as_something_new_on_3_x() {
    kill_through_lives(Flavour::V3);
}
