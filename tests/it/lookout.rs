//! The lookout, without a webhook: what it sees of databases, how often it asks, and what it makes of lost hints.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use couch_hookd::config::Hookd;
use couch_hookd::couch::client::Server;
use couch_hookd::couch::databases::Info;
use couch_hookd::pipeline::complaints::Outage;
use couch_hookd::pipeline::hints::Hints;
use couch_hookd::pipeline::lookout::{Lookout, Sighting};
use couch_hookd::pure::hint::Hint;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::sys;
use crossbeam_channel::{Receiver, bounded};
use serde_json::json;

use crate::host::WAIT_MAX;
use crate::world::on_each;

struct World {
    couch: StandIn,
    server: Server,
    lookout: Lookout,
    hints: Arc<Hints>,
}

impl World {
    fn new(flavour: Flavour, interval: Duration, rate: u32) -> World {
        let couch = StandIn::start(Options::new(flavour)).unwrap();
        let hookd = Hookd { sweep_interval: interval, sweep_rate: rate, ..crate::couch::hookd(&couch.url()) };
        let server = Server::new(&hookd).unwrap();
        let (hints, outage) = (Arc::<Hints>::default(), Arc::new(Outage::new(couch.url())));
        let lookout = Lookout::new(&server, &hookd, Arc::clone(&hints), outage);
        World { couch, server, lookout, hints }
    }

    fn subscribe(&self, room: usize) -> Receiver<Sighting> {
        let (to, sightings) = bounded(room);
        self.lookout.subscribe(Box::new(|db| db.starts_with("tenant-")), to).unwrap();
        sightings
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let threads = self.lookout.stop();
        self.server.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// What is seen up to the end of a walk.
#[track_caller]
fn walk(sightings: &Receiver<Sighting>) -> BTreeMap<String, Info> {
    let mut seen = BTreeMap::new();
    loop {
        match sightings.recv_timeout(WAIT_MAX).expect("a walk ends") {
            Sighting::Infos(infos) => seen.extend(infos.iter().cloned()),
            Sighting::Swept => return seen,
            Sighting::Hinted(_) => {}
        }
    }
}

#[track_caller]
fn until_hinted(sightings: &Receiver<Sighting>, wanted: &Hint) {
    loop {
        let sighting = sightings.recv_timeout(WAIT_MAX).expect("hints are passed on");
        if matches!(&sighting, Sighting::Hinted(hints) if hints.contains(wanted)) {
            return;
        }
    }
}

#[test]
fn every_wanted_database_is_seen_in_every_walk_and_no_other_is_asked_about() {
    on_each(&[Flavour::V1, Flavour::V2, Flavour::V3], |flavour| {
        let world = World::new(flavour, Duration::from_millis(100), 1000);
        let n = if flavour == Flavour::V1 { 12 } else { 130 };
        (0..n).for_each(|n| world.couch.create_db(&format!("tenant-{n:03}")));
        world.couch.create_db("other");
        // Walks are far apart while hints arrive.
        world.couch.quirks(|quirks| quirks.drop_updates = true);
        let sightings = world.subscribe(100);
        let first = walk(&sightings);
        assert_eq!(first.len(), n);
        world.couch.put("tenant-007", "a", &json!({})).unwrap();
        world.couch.delete_db("tenant-003");
        world.couch.create_db("tenant-new");
        // The one under way may have passed them.
        walk(&sightings);
        let later = walk(&sightings);
        let changed: Vec<&String> =
            later.iter().filter(|(db, info)| first.get(*db) != Some(info)).map(|(db, _)| db).collect();
        assert_eq!(changed, ["tenant-007", "tenant-new"], "{flavour:?}");
        assert!(!later.contains_key("tenant-003"));
        assert_eq!(world.couch.n_requests("GET /other"), 0);
    });
}

#[test]
fn hints_are_passed_on_at_once_whoever_gives_them_and_not_of_others() {
    on_each(&[Flavour::V1, Flavour::V3], |flavour| {
        let world = World::new(flavour, Duration::from_secs(3600), 1000);
        world.couch.create_db("_global_changes");
        ["tenant-1", "tenant-2", "other"].iter().for_each(|db| world.couch.create_db(db));
        let sightings = world.subscribe(100);
        walk(&sightings);
        world.hints.note(Hint::Updated("other".to_owned()));
        world.hints.note(Hint::Updated("tenant-1".to_owned()));
        until_hinted(&sightings, &Hint::Updated("tenant-1".to_owned()));
        let open = |seen: &couch_hookd::standin::couch::Seen<'_>| {
            seen.requests().any(|one| one.query.contains(&("feed".to_owned(), "continuous".to_owned())))
        };
        assert!(world.couch.wait_until(WAIT_MAX, open));
        // On 1.x the request may be logged a moment before it listens.
        let wanted = Hint::Updated("tenant-2".to_owned());
        let heard = (0..100).any(|n| {
            world.couch.put("tenant-2", &format!("d{n}"), &json!({})).unwrap();
            let recent = || sightings.recv_timeout(Duration::from_millis(300)).ok();
            std::iter::from_fn(recent)
                .any(|sighting| matches!(sighting, Sighting::Hinted(hints) if hints.contains(&wanted)))
        });
        assert!(heard, "{flavour:?}");
    });
}

#[test]
fn lost_hints_bring_a_walk_at_once() {
    let world = World::new(Flavour::V3, Duration::from_secs(3600), 1000);
    world.couch.create_db("tenant-1");
    let sightings = world.subscribe(100);
    walk(&sightings);
    world.hints.note_lost();
    assert_eq!(walk(&sightings).len(), 1);
}

/// A webhook that is started again and again must not keep the last databases of others from being looked at.
#[test]
fn whoever_joins_does_not_begin_the_walk_of_others_anew() {
    let world = World::new(Flavour::V3, Duration::from_secs(3600), 1000);
    (0..180).for_each(|n| world.couch.create_db(&format!("tenant-{n:03}")));
    let sightings = world.subscribe(100);
    let mut others = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    loop {
        match sightings.recv_timeout(WAIT_MAX).expect("a walk ends") {
            Sighting::Infos(infos) => {
                seen.extend(infos.iter().map(|(db, _)| db.clone()));
                others.push(world.subscribe(100));
            }
            Sighting::Swept => break,
            Sighting::Hinted(_) => {}
        }
        assert!(others.len() < 40, "{} of 180 seen", seen.len());
    }
    assert_eq!(seen.len(), 180);
    // And whoever joined late hears of all, too, before it is told so.
    assert_eq!(walk(&others.swap_remove(1)).len(), 180);
}

#[test]
fn one_who_does_not_listen_holds_up_others_for_a_moment_and_is_told_all_in_the_end() {
    let world = World::new(Flavour::V3, Duration::from_secs(3600), 1000);
    (0..120).for_each(|n| world.couch.create_db(&format!("tenant-{n:03}")));
    let deaf = world.subscribe(1);
    let sightings = world.subscribe(100);
    assert_eq!(walk(&sightings).len(), 120, "the other hears of all");
    // What it missed comes with another walk, which ends with `Swept`: none of those that it missed something of did.
    assert_eq!(walk(&deaf).len(), 120);
}

#[test]
fn a_server_that_fails_in_the_middle_of_a_walk_is_gone_on_with() {
    let world = World::new(Flavour::V2, Duration::from_secs(3600), 1000);
    (0..120).for_each(|n| world.couch.create_db(&format!("tenant-{n:03}")));
    for (request, kind) in [("POST /_dbs_info", FaultKind::Status(500)), ("GET /_all_dbs", FaultKind::Cut)] {
        let fault = Fault { request: request.to_owned(), times: 2, kind };
        world.couch.quirks(|quirks| quirks.faults.push(fault));
    }
    assert_eq!(walk(&world.subscribe(100)).len(), 120);
}

#[test]
fn ten_thousand_idle_databases_cost_less_than_three_requests_a_second() {
    let world = World::new(Flavour::V3, Duration::from_secs(60), 1000);
    let n = if crate::world::long() { 10_000 } else { 2_000 };
    (0..n).for_each(|n| world.couch.create_db(&format!("tenant-{n:05}")));
    let sightings = world.subscribe(100);
    let started = sys::now();
    assert_eq!(walk(&sightings).len(), n);
    // At 1,000 databases a second; at the default 40 it is 25 times less.
    let n_requests = world.couch.look(|seen| seen.requests().count());
    assert!(n_requests < n / 40 + 30, "{n_requests}");
    assert!(sys::now() - started >= Duration::from_secs(n as u64 / 1000 - 1), "never faster than the rate");
}
