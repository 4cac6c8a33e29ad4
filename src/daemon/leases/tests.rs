//! Several daemons' leases at one stand-in for CouchDB: who has which part of a webhook that is divided.

use std::time::Duration;

use super::*;
use crate::config;
use crate::daemon;
use crate::pipeline::checkpointer;
use crate::pure::checkpoint::StateKey;
use crate::standin::couch::{Flavour, Options, StandIn};

const WEBHOOK: &str = "tenants";
const DBS: usize = 3_000;
/// Long enough for a machine that is busy.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// One daemon, as far as leases go, and what a roster would do.
struct One {
    leases: Leases,
    hold: Option<Arc<Hold>>,
}

impl One {
    fn start(shared: &Shared, times: Times) -> One {
        let mut leases = Leases::start_with(shared, never(), times).unwrap();
        leases.want(BTreeMap::from([(WEBHOOK.to_owned(), Some(Mode::Shared))]));
        One { leases, hold: None }
    }

    /// Lets go of what is not its own any more, and gives what is.
    fn mine(&mut self) -> BTreeSet<usize> {
        self.hold = self.leases.hold(WEBHOOK);
        let Some(hold) = &self.hold else { return BTreeSet::new() };
        let share = hold.share().expect("it is divided");
        let (generation, division) = (share.generation(), share.division());
        let mine = (0..DBS).filter(|n| hold.is_valid() && division.is_mine(&format!("tenant-{n}"))).collect();
        share.on_settled(generation);
        mine
    }
}

/// Looks again and again until `is_fine`; no database is two daemons' at any time.
fn wait_for(all: &mut [One], what: &str, is_fine: impl Fn(&[usize]) -> bool) {
    let until = sys::now() + WAIT_MAX;
    loop {
        let parts: Vec<BTreeSet<usize>> = all.iter_mut().map(One::mine).collect();
        let sizes: Vec<usize> = parts.iter().map(BTreeSet::len).collect();
        let together: BTreeSet<usize> = parts.iter().flatten().copied().collect();
        assert_eq!(together.len(), sizes.iter().sum::<usize>(), "{what}: two have the same: {sizes:?}");
        if is_fine(&sizes) {
            return;
        }
        assert!(sys::now() < until, "{what}: {sizes:?}");
        sys::sleep(Duration::from_millis(20));
    }
}

#[test]
fn three_daemons_have_a_third_each_and_two_take_over_the_part_of_one_that_dies() {
    let couch = StandIn::start(Options::new(Flavour::V3)).unwrap();
    couch.create_db("couch_hookd");
    let settings =
        BTreeMap::from([("hookd".to_owned(), BTreeMap::from([("couchdb_url".to_owned(), couch.url())]))]);
    let overrides = config::source::Overrides::default();
    let raw = config::source::from_sections(&settings, &config::finding::Origin::OsDaemons, &overrides);
    let hookd = Arc::new(config::parse(&raw).0.config.unwrap().hookd);
    let server = crate::couch::client::Server::new(&hookd).unwrap();
    let (checkpoints, checkpointer) = checkpointer::start().unwrap();
    let key = StateKey::new(sys::random_bytes());
    let shared = daemon::shared(&server, &hookd, key, String::new(), checkpoints);
    let times = Times::of(Duration::from_secs(3));
    let mut all = vec![One::start(&shared, times)];
    wait_for(&mut all, "alone", |sizes| sizes == [DBS]);
    all.extend((0..2).map(|_| One::start(&shared, times)));
    let is_third = |n: &usize| (850..=1_150).contains(n);
    wait_for(&mut all, "three", |sizes| sizes.iter().all(is_third) && sizes.iter().sum::<usize>() == DBS);
    // One dies: its thread ends while something of it still runs, so nothing is given back.
    let dead = all.remove(0);
    let (thread, ended) = dead.leases.stop(sys::now());
    ended.recv_timeout(WAIT_MAX).unwrap();
    thread.join().unwrap();
    let died_at = sys::now();
    wait_for(&mut all, "two", |sizes| sizes.iter().sum::<usize>() == DBS);
    println!("its part was taken after {:?}, with a TTL of {:?}", sys::now() - died_at, times.ttl);
    assert!(!dead.hold.unwrap().is_valid(), "whoever is dead has nothing");
    // One goes: its part is taken at once.
    let One { leases, hold } = all.remove(0);
    drop(hold);
    let (thread, ended) = leases.stop(sys::now() + WAIT_MAX);
    ended.recv_timeout(WAIT_MAX).unwrap();
    thread.join().unwrap();
    wait_for(&mut all, "one", |sizes| sizes == [DBS]);
    for One { leases, hold } in all {
        drop(hold);
        leases.stop(sys::now() + WAIT_MAX).0.join().unwrap();
    }
    drop(shared);
    checkpointer.join().unwrap();
}
