//! `watch = databases` under SIGKILL at any moment: what came and went is told, in order, a repeat under its first id.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::databases_watched::bodies;
use crate::host::WAIT_MAX;
use crate::replications_kills::assert_order_in_each_life;
use crate::world::{Daemon, Ini, STATE_DB, couch, long, receiver_with};

/// Databases that go through [`LIFE`] together, each step when the one before was told.
const DBS: [&str; 4] = ["tenant-a", "tenant-b/x", "tenant-c", "tenant-d"];
/// Databases that come, change and go whatever was told.
const WILD: [&str; 3] = ["tenant-1", "tenant-2", "tenant-3"];
/// One that is there from the first and never changes.
const UNCHANGED: &str = "tenant-old";
/// A life with all that can happen in it.
const LIFE: &[&str] =
    &["create", "write", "ddoc", "write", "remake", "write", "delete", "create", "ddoc", "delete"];

fn step(couch: &StandIn, db: &str, name: &str) {
    match name {
        "create" => couch.create_db(db),
        "delete" => couch.delete_db(db),
        "remake" => {
            couch.delete_db(db);
            couch.create_db(db);
        }
        "ddoc" => drop(couch.put(db, "_design/v", &json!({"views": {}})).unwrap()),
        _ => drop(couch.put(db, "a", &json!({})).unwrap()),
    }
}

/// What may be told of a step, one or the other.
fn told_of(name: &str) -> &'static [&'static [&'static str]] {
    match name {
        "create" => &[&["created"]],
        "delete" => &[&["deleted"]],
        // Somebody may look in between.
        "remake" => &[&["recreated"], &["deleted", "created"]],
        "ddoc" => &[&["updated", "ddoc_updated"]],
        _ => &[&["updated"]],
    }
}

/// Whether all steps were told; an error when something else was.
fn is_told(mut told: &[String], steps: &[&str]) -> Result<bool, String> {
    let all = told.join(" ");
    for name in steps {
        let begins = |kinds: &&&[&str]| told.iter().zip(**kinds).all(|(told, kind)| told == kind);
        let Some(kinds) = told_of(name).iter().find(begins) else {
            return Err(format!("after {steps:?}: {all}"));
        };
        if told.len() < kinds.len() {
            return Ok(false);
        }
        told = &told[kinds.len()..];
    }
    if told.is_empty() { Ok(true) } else { Err(format!("after {steps:?}: {all}")) }
}

/// By database what was accepted, each once, in the order in which it first came; one id is one thing.
fn told(record: &Record) -> BTreeMap<String, Vec<String>> {
    let mut ids: BTreeMap<String, Value> = BTreeMap::new();
    let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for body in bodies(record) {
        let what = json!([body["type"], body["data"]]);
        let before = ids.insert(body["id"].as_str().unwrap().to_owned(), what.clone());
        assert!(before.as_ref().is_none_or(|before| *before == what), "{body} was {before:?}");
        if before.is_none() {
            let kind = body["type"].as_str().unwrap().trim_start_matches("database.").to_owned();
            told.entry(body["data"]["db"].as_str().unwrap().to_owned()).or_default().push(kind);
        }
    }
    told
}

/// Lets databases go through life after life, until the killing is over; gives the steps of each.
fn live(couch: &StandIn, receiver: &Receiver, killing: &AtomicBool) -> Vec<&'static str> {
    let mut steps = Vec::new();
    for (at, name) in LIFE.iter().cycle().enumerate() {
        if at % LIFE.len() == 0 && !killing.load(Ordering::SeqCst) {
            break;
        }
        DBS.iter().for_each(|db| step(couch, db, name));
        steps.push(*name);
        let until = sys::now() + 2 * WAIT_MAX;
        let there = |record: &Record| {
            let mut told = told(record);
            DBS.iter().all(|db| is_told(&told.remove(*db).unwrap_or_default(), &steps) != Ok(false))
        };
        while !receiver.wait_until(Duration::from_millis(50), there) {
            if sys::now() > until {
                // The other thread, which has the daemon's log, says what is missing.
                return steps;
            }
            let (db, name) = (WILD[fastrand::usize(..WILD.len())], LIFE[fastrand::usize(..LIFE.len())]);
            let is_there = couch.look(|seen| seen.databases().iter().any(|one| one == db));
            if is_there != (name == "create") {
                step(couch, db, name);
            }
        }
    }
    steps
}

/// Whether a database is there, for whoever was told this; an error when that cannot be.
fn is_there(told: &[String]) -> Result<bool, String> {
    let mut is_there = false;
    for kind in told {
        if is_there == (kind == "created") {
            return Err(told.join(" "));
        }
        is_there = kind != "deleted";
    }
    Ok(is_there)
}

fn kill_through_lives(flavour: Flavour) {
    let n_kills = if long() { 40 } else { 2 };
    let couch = couch(flavour, &[UNCHANGED]);
    if flavour == Flavour::V3 {
        couch.create_db("_global_changes");
    }
    let receiver = receiver_with(|options| options.keep_bodies = true);
    receiver.answer(|_| {
        Reaction::Delay(Duration::from_millis(fastrand::u64(0..60)), Box::new(Reaction::Status(200)))
    });
    let ini = Ini::new(&couch.url()).hookd("sweep_interval = 200ms\nsweep_rate = 1000").webhook(
        "dbs",
        &receiver.url(),
        "watch = databases\ndb = tenant-*\nsince = now",
    );
    let mut daemon = Daemon::start(&ini);
    // What is there from the first is written down.
    let last =
        |seen: &couch_hookd::standin::couch::Seen<'_>| seen.local(STATE_DB, "couch-hookd.dbs.63").is_some();
    assert!(couch.wait_until(WAIT_MAX, last), "{}", daemon.transcript());
    let mut starts = vec![sys::now()];
    let killing = AtomicBool::new(true);
    let steps = std::thread::scope(|scope| {
        let living = scope.spawn(|| live(&couch, &receiver, &killing));
        for _ in 0..n_kills {
            // A life of the daemon ends when its time is up, or in the middle of some request, which may be late: it takes
            // two seconds to be sure that a database was made again.
            let (in_a_request, n_more) = (fastrand::bool(), fastrand::usize(..8));
            let life = Duration::from_millis(fastrand::u64(30..2_000));
            let n = receiver.look(|record| record.deliveries().len()) + n_more;
            let life = if in_a_request { WAIT_MAX } else { life };
            let _ = receiver.wait_until(life, |record| in_a_request && record.deliveries().len() > n);
            daemon.kill();
            daemon.start_again();
            starts.push(sys::now());
        }
        killing.store(false, Ordering::SeqCst);
        living.join().unwrap()
    });
    // Whoever heard all of it knows what there is in the end, and hears of what is written then.
    let there: Vec<String> = couch.look(|seen| seen.databases());
    let knows_all = |record: &Record| {
        let told = told(record);
        let knows = |db: &&str| {
            let heard = is_there(told.get(*db).map_or(&[], Vec::as_slice));
            heard.unwrap_or_else(|told| panic!("{flavour:?} `{db}`: {told}"))
                == there.iter().any(|one| one == db)
        };
        WILD.iter().all(knows)
    };
    let is_settled = receiver.wait_until(WAIT_MAX, knows_all);
    assert!(is_settled, "{flavour:?}: {:?}\n{}", receiver.look(told), daemon.transcript());
    let n_before = receiver.look(|record| bodies(record).len());
    let left: Vec<&str> = WILD.into_iter().filter(|db| there.iter().any(|one| one == db)).collect();
    left.iter().for_each(|db| step(&couch, db, "write"));
    let heard = |record: &Record| {
        // One that was made again a moment before is told as that, with what is in it by then.
        let tells = ["database.updated", "database.recreated", "database.created"];
        let of =
            |body: &Value, db: &str| tells.iter().any(|one| body["type"] == *one) && body["data"]["db"] == db;
        left.iter().all(|db| bodies(record).iter().skip(n_before).any(|body| of(body, db)))
    };
    assert!(receiver.wait_until(WAIT_MAX, heard), "{flavour:?}\n{}", daemon.transcript());
    let log = daemon.transcript();
    receiver.look(|record| {
        let told = told(record);
        for db in DBS {
            assert_eq!(is_told(&told[db], &steps), Ok(true), "{flavour:?} `{db}`: {:?}\n{log}", told[db]);
        }
        assert!(!told.contains_key(UNCHANGED), "{flavour:?}: {told:?}\n{log}");
        assert_eq!((record.n_unverified(), record.violations()), (0, &[][..]));
        assert_order_in_each_life(record, |one| one.db().to_owned(), &starts, &log);
        let n_told: usize = told.values().map(Vec::len).sum();
        println!(
            "{flavour:?}: {} kills, {} steps of {} databases, {n_told} events, {} requests",
            starts.len() - 1,
            steps.len(),
            DBS.len(),
            record.deliveries().len()
        );
    });
}

#[test]
fn what_comes_and_goes_is_told_through_kills_on_1_x() {
    kill_through_lives(Flavour::V1);
}

#[test]
fn what_comes_and_goes_is_told_through_kills_on_2_x() {
    kill_through_lives(Flavour::V2);
}

#[test]
fn what_comes_and_goes_is_told_through_kills_on_3_x() {
    kill_through_lives(Flavour::V3);
}
