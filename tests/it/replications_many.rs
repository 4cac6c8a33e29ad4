//! `watch = replications` with hundreds and thousands of replications: lists are read in pages, and to their end.

use std::collections::BTreeSet;

use couch_hookd::standin::couch::{Flavour, Logged, Options, StandIn};
use couch_hookd::standin::replicator::{Replication, ReplicationState};
use serde_json::json;

use crate::replications::{DB, Watched, at_work, put};
use crate::world::{couch, long, on_each};

use ReplicationState::Initializing;

#[test]
fn pages_that_fail_and_shift_tell_nothing_and_lose_nothing() {
    let n_all = if long() { 1_100 } else { 600 };
    let lines = "watch = replications\nevents = replication.crashing\npoll_interval = 100ms";
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let standin = couch(flavour, &[DB]);
        for n in 0..n_all {
            put(&standin, &format!("r{n:04}"));
            standin.replicate(DB, &format!("r{n:04}"), Replication::new(Initializing)).unwrap();
        }
        let mut watched = Watched::start_on(standin, flavour, lines);
        watched.looks(3);
        watched.couch().quirks(|quirks| {
            quirks.scheduler_fails_every = Some(7);
            quirks.scheduler_shift_max = 5;
            quirks.scheduler_row_lost_every = Some(7);
        });
        watched.settle();
        for at in [0, 498, 499, 500, n_all - 1] {
            watched.step(&format!("r{at:04}"), "crash");
        }
        watched.settle();
        watched.couch().quirks(|quirks| {
            quirks.scheduler_fails_every = None;
            quirks.scheduler_shift_max = 0;
            quirks.scheduler_row_lost_every = None;
        });
        watched.settle();
        watched.step("r0501", "crash");
    });
}

#[test]
fn no_row_is_passed_over_behind_a_full_page() {
    // One shard, a design document, as many rows as make CouchDB's count end a page too early.
    for (flavour, n) in [(Flavour::V2, 500), (Flavour::V2, 501), (Flavour::V3, 500), (Flavour::V3, 1_000)] {
        let standin = StandIn::start(Options { n_shards: 1, ..Options::new(flavour) }).unwrap();
        standin.create_db(DB);
        standin.put(DB, "_design/mine", &json!({})).unwrap();
        for n in 0..n {
            put(&standin, &format!("r{n:04}"));
            standin.replicate(DB, &format!("r{n:04}"), Replication::new(Initializing)).unwrap();
        }
        let lines = "watch = replications\nevents = replication.crashing\npoll_interval = 100ms";
        let mut watched = Watched::start_on(standin, flavour, lines);
        for at in BTreeSet::from([n - 1, 498, 499]) {
            watched.step(&format!("r{at:04}"), "crash");
        }
    }
}

#[test]
fn thousands_are_read_in_pages_of_500_and_told_of_when_they_change() {
    let flavours: &[Flavour] = if long() { &[Flavour::V2, Flavour::V3] } else { &[Flavour::V3] };
    on_each(flavours, |flavour| {
        // What 5,000 cost the release build is a benchmark's subject; here the stand-in is what takes long.
        let n_all = if long() && flavour == Flavour::V3 { 5_000 } else { 620 };
        let standin = couch(flavour, &[DB]);
        for n in 0..n_all {
            put(&standin, &format!("r{n:04}"));
            let state =
                if flavour == Flavour::V2 { Replication::new(Initializing) } else { at_work(flavour) };
            standin.replicate(DB, &format!("r{n:04}"), state).unwrap();
        }
        let lines = "watch = replications\nevents = *\npoll_interval = 500ms\nsince = now";
        let mut watched = Watched::start_on(standin, flavour, lines);
        watched.settle();
        for at in [0, 499, 500, n_all - 1] {
            watched.step(&format!("r{at:04}"), "crash");
        }
        watched.settle();
        let pages = watched.couch().look(|seen| {
            let pages = seen.requests().filter(|one| one.path.starts_with("/_scheduler/docs"));
            let number = |one: &Logged, name: &str| -> usize {
                one.query.iter().find(|(key, _)| key == name).map_or(0, |(_, value)| value.parse().unwrap())
            };
            pages.map(|one| (number(one, "skip"), number(one, "limit"))).collect::<Vec<_>>()
        });
        assert!(pages.iter().all(|(_, limit)| (1..=500).contains(limit)), "{pages:?}");
        let looks: Vec<_> = pages.split(|(skip, _)| *skip == 0).skip(1).collect();
        assert!(looks.iter().all(|look| look.len() <= n_all / 500), "{pages:?}");
        println!(
            "{flavour:?}: {} looks, {} pages, {} KiB",
            looks.len(),
            pages.len(),
            watched.world.daemon.rss_kib()
        );
    });
}
