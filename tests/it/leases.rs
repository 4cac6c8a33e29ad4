//! Several daemons on one `state_db`: one of them tells a webhook, whatever is killed, stopped or asked for.
//!
//! Each daemon is known by a header of its own. Times of leases are a test's own, but in the long size.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::standin::record::{Delivery, Record};
use couch_hookd::sys;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::commands::{Desk, ask};
use crate::host::WAIT_MAX;
use crate::world::{
    Daemon, FLAVOURS, Ini, STATE_DB, couch, has_all, long, on_each, receiver_with, revs, write,
};

/// The real time of a lease.
const TTL: Duration = Duration::from_secs(15);

/// Daemons, by who they say to be.
struct Several {
    /// Dropped first: what is killed last would send to ports that are another test's by then.
    daemons: BTreeMap<&'static str, Mutex<Daemon>>,
    couch: StandIn,
    receiver: Receiver,
}

impl Several {
    /// Starts them one after the other, each as soon as the one before can be seen.
    fn start(flavour: Flavour, names: &[&'static str], ttl: Duration, lines: &str) -> Several {
        let couch = couch(flavour, &["orders"]);
        let receiver = receiver_with(|options| options.keep_bodies = true);
        let mut several = Several { couch, receiver, daemons: BTreeMap::new() };
        names.iter().for_each(|name| several.add(name, ttl, lines));
        several
    }

    fn add(&mut self, name: &'static str, ttl: Duration, lines: &str) {
        let n = self.daemons.len() + 1;
        let ini = self.ini(name, lines);
        let ttl = ttl.as_millis().to_string();
        let daemon = Daemon::start_with(&ini, &[("HOOKD_TEST_LEASE_TTL_MS", &ttl)]);
        self.daemons.insert(name, Mutex::new(daemon));
        let announced = self.couch.wait_until(WAIT_MAX, |seen| {
            let docs = seen.winners(STATE_DB);
            docs.iter().filter(|(id, doc)| id.starts_with("daemon:") && !doc.deleted).count() >= n
        });
        assert!(announced, "`{name}` is not announced\n{}", self.transcript());
    }

    fn daemon(&self, name: &str) -> MutexGuard<'_, Daemon> {
        self.daemons[name].lock().unwrap()
    }

    fn ini(&self, name: &str, lines: &str) -> Ini {
        let lines = format!("header.x-who = {name}\n{lines}");
        Ini::new(&self.couch.url()).webhook("orders", &self.receiver.url(), &lines)
    }

    /// The lease as it is stored.
    fn lease(&self) -> Option<Value> {
        let doc = self.couch.winner(STATE_DB, "lease:orders").filter(|doc| !doc.deleted)?;
        Some(serde_json::from_str(&doc.json).unwrap())
    }

    /// Waits until one of them holds the lease, another one than `before`; gives its name and the lease.
    fn wait_for_holder(&self, before: Option<&str>) -> (&'static str, Value) {
        let running = self.daemons.iter().filter_map(|(name, one)| {
            let one = one.lock().unwrap();
            one.is_running().then(|| (u64::from(one.pid()), *name))
        });
        let pids: HashMap<u64, &'static str> = running.collect();
        let mut found = None;
        let _ = self.couch.wait_until(WAIT_MAX, |seen| {
            let doc = seen.winner(STATE_DB, "lease:orders").filter(|doc| !doc.deleted);
            let lease: Option<Value> = doc.and_then(|doc| serde_json::from_str(&doc.json).ok());
            let lease = lease.filter(|lease| lease["released"] == false);
            found = lease.and_then(|lease| Some((*pids.get(&lease["pid"].as_u64()?)?, lease)));
            found.as_ref().is_some_and(|(name, _)| Some(*name) != before)
        });
        let found = found.filter(|(name, _)| Some(*name) != before);
        found.unwrap_or_else(|| panic!("nobody but {before:?} holds the lease\n{}", self.transcript()))
    }

    /// Waits until everything is told; while something is, for long.
    fn wait_for_all(&self) {
        let winners = revs(&self.couch, "orders");
        let mut n_seen = 0;
        loop {
            let mut is_all = false;
            let moves = self.receiver.wait_until(WAIT_MAX, |record| {
                is_all = has_all(record, "orders", &winners);
                is_all || record.deliveries().len() >= n_seen + 200
            });
            if is_all {
                return;
            }
            assert!(moves, "LOST\n{}", self.transcript());
            n_seen = self.receiver.look(|record| record.deliveries().len());
        }
    }

    /// How many requests one has sent.
    fn n_sent(&self, name: &str) -> usize {
        self.receiver.look(|record| n_of(record, name))
    }

    fn transcript(&self) -> String {
        let log = |one: &Mutex<Daemon>| one.lock().unwrap().transcript();
        let logs = self.daemons.iter().map(|(name, one)| format!("--- {name} ---\n{}", log(one)));
        let docs = self.couch.winners(STATE_DB).into_iter();
        let docs = docs.filter(|(id, _)| id.starts_with("lease:") || id.starts_with("daemon:"));
        let docs: String = docs.map(|(_, doc)| format!("{}\n", doc.json)).collect();
        let received = self.receiver.look(Record::transcript);
        let cut = received.len().saturating_sub(20_000);
        format!("{}\n{docs}\n{}", logs.collect::<String>(), &received[cut..])
    }
}

/// Which daemon sent it.
fn who(one: &Delivery) -> &str {
    let header = one.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("x-who"));
    header.map_or("", |(_, value)| value)
}

/// Writes until it is told to end.
fn keep_writing(couch: &StandIn, over: &AtomicBool, pause: Duration) {
    let ticks = crossbeam_channel::tick(pause);
    for n in 0.. {
        if over.load(Ordering::Relaxed) {
            return;
        }
        couch.put("orders", &format!("d{}", n % 2_000), &json!({"n": n})).unwrap();
        let _ = ticks.recv();
    }
}

#[test]
fn one_daemon_alone_writes_no_lease_and_a_second_one_stands_by() {
    on_each(&FLAVOURS, |flavour| {
        let ttl = Duration::from_secs(3);
        let mut several = Several::start(flavour, &["a"], ttl, "");
        write(&several.couch, "orders", 5);
        several.wait_for_all();
        let looks = |several: &Several| several.couch.n_requests("GET /couch_hookd/_all_docs");
        let n_looks = looks(&several);
        // Some of its looks later.
        assert!(
            several.couch.wait_until(WAIT_MAX, |seen| {
                seen.n_requests("GET /couch_hookd/_all_docs") >= n_looks + 3
            })
        );
        assert_eq!(several.lease(), None, "{flavour:?}: nobody else is there");
        several.add("b", ttl, "");
        let (holder, _) = several.wait_for_holder(None);
        assert_eq!(holder, "a", "whoever tells it goes on");
        several.daemon("b").wait_for_log("standing by");
        write(&several.couch, "orders", 5);
        several.wait_for_all();
        assert_eq!((several.n_sent("a"), several.n_sent("b")), (10, 0), "{flavour:?}");
        // Given back at a clean end, after the last checkpoint: nothing is told twice.
        several.daemon("a").terminate();
        assert_eq!(several.wait_for_holder(Some("a")).0, "b");
        write(&several.couch, "orders", 5);
        several.wait_for_all();
        assert_eq!((several.n_sent("a"), several.n_sent("b")), (10, 5), "{}", several.transcript());
        several.receiver.look(|record| assert_eq!(record.violations(), []));
    });
}

#[test]
fn off_lets_every_daemon_tell_and_on_needs_a_lease_alone() {
    let several = Several::start(Flavour::V2, &["a", "b"], TTL, "lease = off");
    write(&several.couch, "orders", 5);
    let both = |record: &Record| record.n_accepted() == 10;
    assert!(several.receiver.wait_until(WAIT_MAX, both), "{}", several.transcript());
    assert_eq!(several.lease(), None);
    let several = Several::start(Flavour::V2, &["a"], TTL, "lease = on");
    write(&several.couch, "orders", 5);
    several.wait_for_all();
    assert_eq!(several.wait_for_holder(None).0, "a");
}

#[test]
fn what_is_no_lease_is_waited_out_not_ignored() {
    let couch = couch(Flavour::V3, &["orders", STATE_DB]);
    couch.put(STATE_DB, "lease:orders", &json!({"holder": 7})).unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let mut several = Several { couch, receiver, daemons: BTreeMap::new() };
    several.add("a", Duration::from_secs(2), "");
    write(&several.couch, "orders", 5);
    several.daemon("a").wait_for_log("is no lease");
    several.wait_for_all();
    assert_eq!(several.wait_for_holder(None).0, "a");
}

#[test]
fn only_the_daemon_that_tells_a_webhook_obeys_for_it() {
    let several = Several::start(Flavour::V3, &["a", "b"], Duration::from_secs(3), "");
    let (holder, _) = several.wait_for_holder(None);
    let standby = if holder == "a" { "b" } else { "a" };
    write(&several.couch, "orders", 5);
    several.wait_for_all();
    let desk = Desk::new(&several.ini("desk", ""));
    desk.done(&["pause", "orders", "--reason", "moving"]);
    several.daemon(holder).wait_for_log("pause, asked for by");
    let shown: Vec<Value> =
        desk.done(&["status", "--json"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(shown.len(), 1, "one line for the webhook: {shown:?}");
    assert_eq!(shown[0]["state"], "paused");
    assert_eq!(shown[0]["standbys"].as_array().unwrap().len(), 1, "{shown:?}");
    desk.done(&["resume", "orders"]);
    let said = desk.done(&["status"]);
    assert!(said.contains("standing by"), "{said}");
    let told = desk.done(&["explain", "orders"]);
    assert!(told.contains("lease:"), "{told}");
    assert_eq!(several.daemon(standby).n_logged("asked for by"), 0, "{}", several.transcript());
    // Whoever takes over does what was asked of the one that died.
    several.daemon(holder).kill();
    ask(&several.couch, "request:00000000000000000001-00000001", "pause", &json!({}));
    several.daemon(standby).wait_for_log("pause, asked for by");
    assert_eq!(several.wait_for_holder(Some(holder)).0, standby);
}

/// What was seen of one take-over.
struct TakeOver {
    /// From the kill to the new lease.
    took: Duration,
    n_repeated: usize,
}

/// Kills whoever holds the lease again and again, while documents are written.
fn kill_holders(kills: usize, ttl: Duration) -> Vec<TakeOver> {
    let several = Several::start(Flavour::V3, &["a", "b", "c"], ttl, "concurrency = 8");
    several.receiver.answer(|_| {
        Reaction::Delay(Duration::from_micros(fastrand::u64(0..20_000)), Box::new(Reaction::Status(200)))
    });
    let over = AtomicBool::new(false);
    let mut took = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| keep_writing(&several.couch, &over, Duration::from_millis(20)));
        let _end = End(&over);
        for _ in 0..kills {
            let (holder, _) = several.wait_for_holder(None);
            // It tells for a while, at random.
            let n = several.receiver.look(Record::n_accepted) + fastrand::usize(1..80);
            let told = several.receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= n);
            assert!(told, "nothing is told\n{}", several.transcript());
            several.daemon(holder).kill();
            let killed_at = sys::now();
            several.wait_for_holder(Some(holder));
            took.push(sys::now() - killed_at);
            several.daemon(holder).start_again();
        }
    });
    several.wait_for_all();
    let repeats = several.receiver.look(|record| {
        assert_eq!(record.violations(), [], "{}", several.transcript());
        repeats(record)
    });
    let n_repeated = |at: usize| repeats.get(at).copied().unwrap_or(0);
    took.into_iter().enumerate().map(|(at, took)| TakeOver { took, n_repeated: n_repeated(at) }).collect()
}

/// Whatever else, whoever writes has to end.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How many events were told again after each take-over. Within what one daemon tells in a row there is none.
fn repeats(record: &Record) -> Vec<usize> {
    let (mut tellers, mut told) = (Vec::new(), HashMap::new());
    let mut repeats: Vec<usize> = Vec::new();
    for one in record.deliveries().iter().filter(|one| one.accepted()) {
        if tellers.last() != Some(&who(one)) {
            tellers.push(who(one));
            repeats.push(0);
        }
        let stretch = tellers.len() - 1;
        if let Some(before) = told.insert(&one.webhook_id, stretch) {
            assert_ne!(before, stretch, "`{}` was told twice by one daemon", one.webhook_id);
            repeats[stretch] += 1;
        }
    }
    repeats.remove(0);
    repeats
}

#[test]
fn a_holder_that_is_killed_is_followed_by_another_and_nothing_is_lost() {
    let (kills, ttl) = if long() { (50, Duration::from_millis(1_500)) } else { (3, Duration::from_secs(2)) };
    let seen = kill_holders(kills, ttl);
    say_taken("kills", ttl, &seen);
}

#[test]
fn with_the_real_times_a_take_over_takes_less_than_two_of_them() {
    if !long() {
        println!("skipped: real times of leases (HOOKD_LONG is not set)");
        return;
    }
    let seen = kill_holders(3, TTL);
    say_taken("kills", TTL, &seen);
    assert!(seen.iter().all(|one| one.took < 2 * TTL));
}

fn say_taken(what: &str, ttl: Duration, seen: &[TakeOver]) {
    let mut took: Vec<Duration> = seen.iter().map(|one| one.took).collect();
    took.sort_unstable();
    let (middle, most) = (took[took.len() / 2], took[took.len() - 1]);
    let mut repeated: Vec<usize> = seen.iter().map(|one| one.n_repeated).collect();
    repeated.sort_unstable();
    println!(
        "{} {what} of the holder with a TTL of {ttl:?}: 0 lost; take-over after {middle:?}, at most {most:?}; told again \
         after each: median {}, most {}",
        seen.len(),
        repeated[repeated.len() / 2],
        repeated[repeated.len() - 1]
    );
}

/// Stops whoever holds the lease in the middle of its work, lets another take over, and lets it go on.
#[test]
fn a_holder_that_was_stopped_for_long_sends_nothing_more() {
    let (rounds, ttl) = if long() { (8, Duration::from_secs(3)) } else { (1, Duration::from_secs(3)) };
    stop_holders(rounds, ttl);
    if long() {
        stop_holders(1, TTL);
    }
}

fn stop_holders(rounds: usize, ttl: Duration) {
    let several = Several::start(Flavour::V3, &["a", "b", "c"], ttl, "concurrency = 8");
    several.receiver.answer(|_| {
        Reaction::Delay(Duration::from_micros(fastrand::u64(0..20_000)), Box::new(Reaction::Status(200)))
    });
    let over = AtomicBool::new(false);
    let mut n_judged = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| keep_writing(&several.couch, &over, Duration::from_millis(3)));
        let _end = End(&over);
        // A machine that is busy may make one lose its lease for that alone: such a round shows nothing.
        for _ in 0..10 * rounds {
            let (holder, _) = several.wait_for_holder(None);
            let n = several.n_sent(holder) + 20;
            let told = several.receiver.wait_until(WAIT_MAX, |record| n_of(record, holder) >= n);
            assert!(told, "nothing is told\n{}", several.transcript());
            let n_lost = several.daemon(holder).n_logged("tells it now");
            several.daemon(holder).signal(Signal::SIGSTOP);
            let (next, lease) = several.wait_for_holder(Some(holder));
            let n = several.n_sent(next) + 20;
            let told = several.receiver.wait_until(WAIT_MAX, |record| n_of(record, next) >= n);
            assert!(told, "nothing is told\n{}", several.transcript());
            let n_stopped = several.n_sent(holder);
            several.daemon(holder).signal(Signal::SIGCONT);
            several.daemon(holder).wait_for_nth_log("tells it now", n_lost + 1);
            let n = several.n_sent(next) + 50;
            let told = several.receiver.wait_until(WAIT_MAX, |record| n_of(record, next) >= n);
            let (now, after) = (several.n_sent(holder), several.lease().unwrap());
            if after["holder"] == lease["holder"] {
                assert!(told, "nothing is told\n{}", several.transcript());
                assert_eq!(now, n_stopped, "`{holder}` sent without the lease\n{}", several.transcript());
                n_judged += 1;
            }
            if n_judged == rounds {
                break;
            }
        }
    });
    assert_eq!(n_judged, rounds, "{}", several.transcript());
    several.wait_for_all();
    several.receiver.look(|record| assert_eq!(record.violations(), [], "{}", several.transcript()));
}

fn n_of(record: &Record, name: &str) -> usize {
    record.deliveries().iter().filter(|one| who(one) == name).count()
}

#[test]
fn a_couchdb_that_is_away_for_longer_than_a_lease_costs_no_start() {
    let ttl = Duration::from_secs(1);
    let several = Several::start(Flavour::V3, &["a"], ttl, "lease = on");
    write(&several.couch, "orders", 5);
    several.wait_for_all();
    several.couch.stop();
    several.daemon("a").wait_for_log("could not be renewed in time");
    several.couch.start_again().unwrap();
    several.daemon("a").wait_for_log("nobody took it meanwhile");
    write(&several.couch, "orders", 5);
    several.wait_for_all();
    assert_eq!(several.n_sent("a"), 10, "{}", several.transcript());
    assert_eq!(several.daemon("a").n_logged("goes on with changes"), 0, "{}", several.transcript());
}
