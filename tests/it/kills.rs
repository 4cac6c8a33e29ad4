//! The daemon killed with SIGKILL, again and again, as CouchDB stops an os_daemon: nothing may be lost.
//!
//! The kill test proper needs a real BEAM, and a real CouchDB for one part; it is run from `outside`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Record, Violation};
use couch_hookd::sys;
use serde_json::json;

use crate::host::{Host, WAIT_MAX};
use crate::outside::beam::Beam;
use crate::world::{Dir, Ini, assert_no_secret, checkpoint, couch, has_all, long, receiver, revs};

/// Longest time that nothing may move while there is work.
const STUCK: Duration = WAIT_MAX;
/// Deliveries at a time.
const CONCURRENCY: usize = 8;
/// `checkpoint_interval`'s default.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);

/// How much of it.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) writes: usize,
    pub(crate) docs: usize,
    pub(crate) kills: usize,
    /// Milliseconds that the daemon lives, at least and at most.
    pub(crate) life: (u64, u64),
}

/// What writes the documents: a stand-in, or a real server.
pub(crate) trait Written {
    /// Updates documents `d0` to `d(docs-1)`, starting with the `from`th write, `n` of them.
    fn update(&self, from: usize, n: usize, docs: usize);
    fn revs(&self) -> BTreeMap<String, String>;
}

pub(crate) struct StoodIn<'a>(pub(crate) &'a StandIn);

impl Written for StoodIn<'_> {
    fn update(&self, from: usize, n: usize, docs: usize) {
        for i in from..from + n {
            // Scattered, so that a document's updates come at all distances.
            let id = format!("d{}", (i * 7919 + i / docs) % docs);
            self.0.put("orders", &id, &json!({"n": i})).unwrap();
        }
    }

    fn revs(&self) -> BTreeMap<String, String> {
        revs(self.0, "orders")
    }
}

/// Kills, then waits until everything written has been told. Gives the number of kills and the repeats after each.
pub(crate) fn kill_through_the_beam(
    name: &str,
    ini: &Ini,
    written: &dyn Written,
    db: &str,
    receiver: &Receiver,
    size: Size,
) -> String {
    receiver.answer(|_| {
        Reaction::Delay(Duration::from_micros(fastrand::u64(0..20_000)), Box::new(Reaction::Status(200)))
    });
    let folder = Dir::new();
    let daemon = concat!(env!("CARGO_BIN_EXE_couch-hookd"), " os-daemon");
    let mut beam = Beam::start(&folder.path("beam"), &ini.text(), daemon);
    written.update(0, size.docs, size.docs);
    // A webhook starts for the first time when its configuration was the same twice.
    let first = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= 20);
    assert!(first, "nothing arrived\n{}", beam.transcript());
    beam.order(&format!("kill {} {} {}", size.kills, size.life.0, size.life.1), "kills begun");
    let per_life = Duration::from_millis(u64::midpoint(size.life.0, size.life.1) + 50);
    let killing = per_life * u32::try_from(size.kills).unwrap();
    write_evenly(written, &mut beam, size, killing);
    if !beam.has_said("kills done") {
        beam.wait_for("kills done");
    }
    let winners = written.revs();
    let mut seen = 0;
    while !receiver.wait_until(STUCK, |record| {
        has_all(record, db, &winners) || record.deliveries().len() >= seen + 1_000
    }) || !receiver.look(|record| has_all(record, db, &winners))
    {
        let now = receiver.look(|record| record.deliveries().len());
        let lost: Vec<_> = receiver.look(|record| {
            let told = |(id, rev): &(&String, &String)| record.accepted_rev(db, id) != Some(rev.as_str());
            winners.iter().filter(told).map(|(id, rev)| format!("{id} {rev}")).collect()
        });
        assert!(now >= seen + 1_000, "LOST: {lost:?}\n{}", beam.transcript());
        seen = now;
    }
    let (starts, counts) = (beam.starts(), beam.counts());
    assert_eq!((counts["invalid"], counts["exits"]), (0, 0), "{}", beam.transcript());
    assert_no_secret("what CouchDB would have logged", &beam.transcript());
    receiver.look(|record| judge(name, record, &starts, size, &beam.transcript()))
}

/// Writes the rest over the time that the kills take.
fn write_evenly(written: &dyn Written, beam: &mut Beam, size: Size, killing: Duration) {
    const TICK: Duration = Duration::from_millis(20);
    let n_ticks = usize::try_from(killing.as_millis() / TICK.as_millis()).unwrap().max(1);
    let ticks = crossbeam_channel::tick(TICK);
    let mut done = size.docs;
    while done < size.writes {
        // Once killing is over the rest is only load.
        let n = if beam.has_said("kills done") { 1_000 } else { size.writes.div_ceil(n_ticks) };
        let n = n.min(size.writes - done);
        written.update(done, n, size.docs);
        done += n;
        let _ = ticks.recv();
    }
}

/// Order, ids, concurrency and repeats of a run; its numbers in a line.
fn judge(name: &str, record: &Record, starts: &[Instant], size: Size, host_log: &str) -> String {
    assert_eq!(starts.len(), size.kills + 1, "{host_log}");
    assert_eq!(record.violations(), [] as [Violation; 0], "{host_log}");
    assert_eq!(record.n_unverified(), 0);
    let most = record.concurrency_max();
    // A few hundred documents on a busy machine need not meet there, eight at once.
    let least = if crate::world::long() { CONCURRENCY } else { 2 };
    assert!(most >= least, "the receiver saw {most} at once");
    // Two lives may overlap in the receiver: requests of the one that was killed are still sleeping there.
    assert!(most <= 2 * CONCURRENCY, "the receiver saw {most} at once");
    let mut repeats = Vec::new();
    let mut bounds = Vec::new();
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let mut repeated: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for one in record.deliveries() {
        let life = starts.iter().filter(|start| **start <= one.received_at).count();
        let first = *ids.entry(&one.webhook_id).or_insert(life);
        if first < life {
            repeated.entry(life).or_default().insert(&one.webhook_id);
        }
    }
    for (kill, start) in starts.iter().enumerate().skip(1) {
        let life = kill + 1;
        repeats.push(repeated.get(&life).map_or(0, BTreeSet::len));
        let within = |at: Instant| at < *start && at + CHECKPOINT_INTERVAL >= *start;
        let recent = record.deliveries().iter().filter(|one| one.accepted() && within(one.received_at));
        bounds.push(CONCURRENCY + recent.count());
    }
    let (n, most) = (record.deliveries().len(), repeats.iter().max().copied().unwrap_or(0));
    let (median_repeats, median_bound) = (median(repeats), median(bounds));
    assert!(median_repeats <= median_bound, "{median_repeats} repeats per kill, at most {median_bound}");
    format!(
        "{name}: {} writes of {} documents, {} kills, {n} requests, 0 lost; repeats per kill: median {median_repeats}, \
         most {most}; concurrency + deliveries of 5 s: median {median_bound}",
        size.writes, size.docs, size.kills
    )
}

fn median(mut numbers: Vec<usize>) -> usize {
    numbers.sort_unstable();
    numbers[numbers.len() / 2]
}

#[test]
fn the_checkpoint_moves_however_often_we_are_killed() {
    const MOVES_MIN: usize = 5;
    let killing = Duration::from_secs(if long() { 60 } else { 4 });
    let couch = couch(Flavour::V1, &["orders"]);
    let receiver = receiver();
    // Slower than what is written: never idle, when a checkpoint is written at once.
    receiver.answer(|_| Reaction::Delay(Duration::from_millis(60), Box::new(Reaction::Status(200))));
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let through = || checkpoint(&couch, "orders", "orders").map(|one| one["through_seq"].as_u64().unwrap());
    let mut host = Host::start(&ini.text());
    let over = AtomicBool::new(false);
    let (mut moves, mut kills, mut standing, mut longest) = (0_usize, 0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ticks = crossbeam_channel::tick(Duration::from_millis(5));
            for n in 0.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                couch.put("orders", &format!("d{}", n % 500), &json!({"n": n})).unwrap();
                let _ = ticks.recv();
            }
        });
        assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() > 0), "{}", host.transcript());
        let until = sys::now() + killing;
        let mut stored = None;
        // A slow machine needs more lives; without early checkpoints no number of them would do.
        while sys::now() < until || (moves < MOVES_MIN && sys::now() < until + 2 * WAIT_MAX) {
            // A life: nothing is waited for, it ends when its time is up.
            let life = Duration::from_millis(fastrand::u64(50..900));
            let _ = receiver.wait_until(life, |_| false);
            host.kill();
            kills += 1;
            let now = through();
            standing = if now > stored { 0 } else { standing + 1 };
            moves += usize::from(now > stored);
            longest = longest.max(standing);
            stored = now;
            host.start_again();
        }
        over.store(true, Ordering::Relaxed);
    });
    println!(
        "{kills} kills; the checkpoint moved in {moves} lives, stood still in at most {longest} in a row"
    );
    assert!(moves >= MOVES_MIN, "moved in {moves} of {kills} lives\n{}", host.transcript());
    let winners = revs(&couch, "orders");
    assert!(
        receiver.wait_until(WAIT_MAX, |record| has_all(record, "orders", &winners)),
        "{}",
        host.transcript()
    );
    receiver.look(|record| assert_eq!(record.violations(), [] as [Violation; 0], "{}", host.transcript()));
    host.assert_protocol_kept();
}
