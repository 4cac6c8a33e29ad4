//! Tests of leases: every order of a few steps, and a simulation of three daemons at one CouchDB.

use std::collections::BTreeMap;

use super::*;
use crate::pure::size::size;

const TTL: Duration = Duration::from_secs(15);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn doc(rev: &str, holder: &str, n: u64) -> Doc {
    Doc { rev: rev.to_owned(), holder: holder.to_owned(), n, released: false, ttl: TTL }
}

fn other(id: &str, leased: bool) -> Other {
    Other { id: id.to_owned(), leased }
}

/// Announced and seen: a lease machine as it is after its first round.
fn begun(mode: Mode, found: Option<&Doc>, others: &[Other]) -> Lease {
    let mut lease = Lease::new("me", mode, Times::of(TTL));
    for _ in 0..2 {
        lease.on_announced(lease.is_leased());
        lease.on_look(found, others, s(100), 0.0);
    }
    lease
}

/// One write that CouchDB takes.
fn write(lease: &mut Lease, sent: Duration, rev: &str) -> Write {
    let order = lease.write(sent).expect("there is something to write");
    lease.on_sending(&order, sent);
    lease.on_answer(Answer::Written(rev.to_owned()), sent);
    order.write
}

#[test]
fn one_daemon_alone_tells_without_a_write() {
    let lease = begun(Mode::Auto, None, &[]);
    assert_eq!((lease.state(), lease.is_leased()), (State::Alone, false));
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: None }));
    assert_eq!(lease.write(s(10_000)), None);
    let lease = begun(Mode::On, None, &[]);
    assert_eq!((lease.telling(), lease.write(s(100)).unwrap().write), (None, Write::Take));
}

#[test]
fn nobody_begins_before_the_announcement_is_stored() {
    let mut lease = Lease::new("me", Mode::Auto, Times::of(TTL));
    lease.on_look(None, &[], s(100), 0.0);
    assert_eq!((lease.state(), lease.telling(), lease.write(s(100))), (State::Unknown, None, None));
}

#[test]
fn who_was_alone_takes_the_lease_when_somebody_comes_and_goes_on() {
    let mut lease = begun(Mode::Auto, None, &[]);
    lease.on_look(None, &[other("b", false)], s(105), 0.0);
    assert_eq!(write(&mut lease, s(105), "1-a"), Write::Take);
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: Some(s(117)) }));
    assert!(lease.is_leased());
}

#[test]
fn who_was_alone_and_cannot_take_the_lease_tells_no_longer_than_a_newcomer_waits() {
    let mut lease = Lease::new("me", Mode::Auto, Times::of(TTL));
    for _ in 0..2 {
        lease.on_announced(lease.is_leased());
        lease.on_asking(s(100));
        lease.on_look(None, &[], s(102), 0.0);
    }
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: None }));
    // It came after the look before was asked for, and may take the lease from 115 on.
    lease.on_asking(s(106));
    lease.on_look(None, &[other("b", true)], s(108), 0.0);
    let take = lease.write(s(108)).unwrap();
    lease.on_sending(&take, s(108));
    lease.on_answer(Answer::Unknown, s(111));
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: Some(s(112)) }));
    // What did not arrive is tried again; nobody told in between.
    lease.on_look(None, &[other("b", true)], s(113), 0.0);
    assert_eq!(lease.telling().unwrap().until, Some(s(112)));
    assert_eq!(write(&mut lease, s(113), "1-a"), Write::Take);
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: Some(s(125)) }));
    // Had somebody had it in between, and given it back, it would be another tenure.
    let mut lease = begun(Mode::Auto, None, &[]);
    let released = Doc { released: true, ..doc("2-b", "b", 2) };
    lease.on_look(Some(&released), &[], s(140), 0.0);
    assert_eq!((lease.telling(), lease.write(s(140)).unwrap().write), (None, Write::Take));
}

#[test]
fn a_newcomer_waits_for_one_that_may_tell_without_a_lease() {
    let mut lease = begun(Mode::Auto, None, &[other("a", false)]);
    assert_eq!((lease.state(), lease.write(s(114))), (State::Standby, None));
    assert_eq!(lease.next_deadline(), Some(s(115)));
    // It says that it goes by leases, too.
    lease.on_look(None, &[other("a", true)], s(101), 0.0);
    assert_eq!(lease.write(s(101)).unwrap().write, Write::Take);
    // Or says nothing for a TTL.
    lease.on_look(None, &[other("a", false)], s(102), 0.0);
    lease.on_look(None, &[other("a", false)], s(117), 0.0);
    assert_eq!(lease.write(s(116)), None);
    assert_eq!(lease.write(s(117)).unwrap().write, Write::Take);
}

#[test]
fn a_standby_takes_over_when_the_lease_has_stood_still_for_a_ttl_or_was_given_back() {
    let held = doc("5-a", "a", 5);
    let mut lease = begun(Mode::On, Some(&held), &[other("a", true)]);
    assert_eq!(lease.write(s(114)), None);
    assert_eq!(lease.write(s(115)).unwrap().over.as_deref(), Some("5-a"));
    // Renewed: the time begins anew.
    lease.on_look(Some(&doc("6-a", "a", 6)), &[other("a", true)], s(114), 0.0);
    assert_eq!(lease.write(s(128)), None);
    // Whoever holds it may have a longer time.
    let longer = Doc { ttl: s(60), ..doc("7-a", "a", 7) };
    lease.on_look(Some(&longer), &[other("a", true)], s(130), 0.0);
    assert_eq!(lease.write(s(189)), None);
    assert!(lease.write(s(190)).is_some());
    let released = Doc { released: true, ..doc("8-a", "a", 8) };
    lease.on_look(Some(&released), &[other("a", true)], s(131), 0.0);
    assert!(lease.write(s(131)).is_some());
    lease.on_look(None, &[other("a", true)], s(131), 0.0);
    assert_eq!(lease.write(s(131)).unwrap().over, None);
}

#[test]
fn a_holder_counts_from_the_moment_of_sending_and_tells_on_after_a_late_renewal() {
    let mut lease = begun(Mode::On, None, &[]);
    let take = lease.write(s(100)).unwrap();
    lease.on_sending(&take, s(100));
    lease.on_answer(Answer::Written("1-a".to_owned()), s(103));
    assert_eq!(lease.telling().unwrap().until, Some(s(112)));
    // CouchDB is away for a minute; nobody can have taken it.
    let renew = lease.write(s(105)).unwrap();
    lease.on_sending(&renew, s(105));
    lease.on_answer(Answer::Unknown, s(108));
    assert_eq!(lease.write(s(170)), None, "it looks first");
    lease.on_look(Some(&doc("1-a", "me", 1)), &[], s(170), 0.0);
    let again = lease.write(s(170)).unwrap();
    assert_eq!(again, renew, "the same once more");
    lease.on_sending(&again, s(170));
    // The first one came through at last: then it counts from that.
    lease.on_answer(Answer::Conflict, s(170));
    lease.on_look(Some(&doc("2-a", "me", 2)), &[], s(170), 0.0);
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: Some(s(117)) }));
    assert_eq!(write(&mut lease, s(171), "3-a"), Write::Renew);
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: Some(s(183)) }));
}

#[test]
fn whoever_sees_another_holder_tells_nothing_more_and_begins_anew_later() {
    let mut lease = begun(Mode::On, None, &[]);
    write(&mut lease, s(100), "1-a");
    lease.on_look(Some(&doc("2-b", "b", 1)), &[other("b", true)], s(101), 0.0);
    assert_eq!((lease.telling(), lease.state()), (None, State::Standby));
    assert_eq!(write(&mut lease, s(116), "3-a"), Write::Take);
    assert_eq!(lease.telling().unwrap().tenure, 2);
    // An operator deletes it, or gives it away.
    lease.on_look(None, &[], s(117), 0.0);
    assert_eq!(lease.telling(), None);
}

#[test]
fn alone_for_long_the_lease_is_given_back_once_others_can_know() {
    let mut lease = begun(Mode::Auto, None, &[other("b", true)]);
    write(&mut lease, s(100), "1-a");
    let mine = doc("1-a", "me", 1);
    lease.on_look(Some(&mine), &[], s(110), 0.0);
    lease.on_look(Some(&mine), &[], s(169), 0.0);
    assert!(lease.is_leased());
    lease.on_look(Some(&mine), &[], s(170), 0.0);
    assert!(!lease.is_leased());
    assert_eq!(lease.write(s(170)).unwrap().write, Write::Renew, "not before it is announced");
    lease.on_announced(false);
    assert_eq!(lease.write(s(170)), None, "nor before it was looked once more");
    lease.on_look(Some(&mine), &[], s(171), 0.0);
    assert_eq!(write(&mut lease, s(171), "2-a"), Write::Release);
    assert_eq!(lease.telling(), Some(Telling { tenure: 1, until: None }));
    // Somebody came just before.
    let mut lease = begun(Mode::On, None, &[]);
    write(&mut lease, s(100), "1-a");
    lease.on_look(Some(&mine), &[], s(500), 0.0);
    assert!(lease.is_leased(), "`on` never leaves");
}

#[test]
fn what_does_not_run_here_any_more_is_given_back() {
    let mut lease = begun(Mode::On, None, &[]);
    write(&mut lease, s(100), "1-a");
    lease.let_go();
    assert_eq!(write(&mut lease, s(101), "2-a"), Write::Release);
    assert_eq!((lease.telling(), lease.write(s(500))), (None, None));
    lease.want(Mode::On);
    assert!(lease.write(s(102)).is_some());
}

#[test]
fn after_a_gap_whoever_was_alone_looks_again() {
    let mut lease = begun(Mode::Auto, None, &[]);
    lease.on_gap();
    assert_eq!((lease.state(), lease.telling()), (State::Unknown, None));
    lease.on_announced(false);
    lease.on_look(Some(&doc("1-b", "b", 1)), &[other("b", true)], s(200), 0.0);
    assert_eq!((lease.state(), lease.telling(), lease.write(s(214))), (State::Standby, None, None));
}

// --- Every order of a few steps ------------------------------------------------------------------------------

/// CouchDB with one lease document.
#[derive(Debug, Clone, Default)]
struct Couch {
    doc: Option<Doc>,
    n_writes: u64,
    announced: BTreeMap<String, bool>,
}

impl Couch {
    fn take(&mut self, who: &str, order: &Order) -> Answer {
        if self.doc.as_ref().map(|doc| &doc.rev) != order.over.as_ref() {
            return Answer::Conflict;
        }
        self.n_writes += 1;
        let rev = format!("{}-{who}", self.n_writes);
        let released = order.write == Write::Release;
        self.doc = Some(Doc { released, ..doc(&rev, who, order.n) });
        Answer::Written(rev)
    }
}

/// A daemon whose requests are answered at once, or never.
struct Simple {
    name: &'static str,
    lease: Lease,
    alone_until: Duration,
}

impl Simple {
    fn new(name: &'static str, mode: Mode) -> Simple {
        Simple { name, lease: Lease::new(name, mode, Times::of(TTL)), alone_until: Duration::ZERO }
    }

    /// One round; `lost`: the answer to its write.
    fn round(&mut self, couch: &mut Couch, now: Duration, lost: bool) {
        if self.alone_until <= now {
            self.lease.on_gap();
        }
        self.alone_until = now + Times::of(TTL).own();
        couch.announced.insert(self.name.to_owned(), self.lease.is_leased());
        self.lease.on_announced(self.lease.is_leased());
        let others: Vec<Other> = couch
            .announced
            .iter()
            .filter(|(name, _)| *name != self.name)
            .map(|(name, leased)| other(name, *leased))
            .collect();
        self.lease.on_look(couch.doc.as_ref(), &others, now, 0.0);
        if let Some(order) = self.lease.write(now) {
            self.lease.on_sending(&order, now);
            let answer = couch.take(self.name, &order);
            self.lease.on_answer(if lost { Answer::Unknown } else { answer }, now);
        }
    }

    fn tells(&self, now: Duration) -> bool {
        let until = |telling: Telling| telling.until.unwrap_or(self.alone_until);
        self.lease.telling().is_some_and(|telling| now < until(telling))
    }
}

#[test]
fn in_no_order_of_rounds_pauses_and_lost_answers_do_two_tell() {
    const STEPS: u32 = 6;
    // Either runs a round with or without a lost answer, or time passes: a little, or more than a TTL.
    const KINDS: u32 = 6;
    let mut told = 0;
    for modes in [[Mode::On, Mode::On], [Mode::Auto, Mode::Auto], [Mode::Auto, Mode::On]] {
        for code in 0..KINDS.pow(STEPS) {
            let mut couch = Couch::default();
            let mut both = [Simple::new("a", modes[0]), Simple::new("b", modes[1])];
            let (mut now, mut rest) = (s(1_000), code);
            for _ in 0..STEPS {
                match rest % KINDS {
                    0 => both[0].round(&mut couch, now, false),
                    1 => both[1].round(&mut couch, now, false),
                    2 => both[0].round(&mut couch, now, true),
                    3 => both[1].round(&mut couch, now, true),
                    4 => now += s(6),
                    _ => now += s(16),
                }
                rest /= KINDS;
                let n = both.iter().filter(|one| one.tells(now)).count();
                assert!(n <= 1, "{modes:?}, steps {code}: two tell");
                told += n;
            }
        }
    }
    assert!(told > 20_000, "{told}");
}

// --- Three daemons -------------------------------------------------------------------------------------------

/// What is on its way.
#[derive(Debug, Clone)]
enum Way {
    /// To CouchDB.
    Announce(bool),
    Look,
    Write(Order),
    /// Back.
    Announced(bool),
    Looked(Option<Doc>, Vec<Other>),
    Answered(Answer),
    /// Nothing came for too long.
    Silence,
    /// The daemon's own clock.
    Wake,
}

struct Daemon {
    name: String,
    life: u64,
    lease: Lease,
    /// One request at a time; answers to others are not waited for any more.
    request: u64,
    waits: bool,
    alone_until: Duration,
    /// When it asked CouchDB who else is there, and for the last answer that it got.
    asked_at: Duration,
    looked_at: Duration,
    /// Stopped until then.
    stopped: Duration,
    next_round: Duration,
}

struct World {
    rng: fastrand::Rng,
    now: Duration,
    couch: Couch,
    alive: BTreeMap<String, Duration>,
    /// The request that stored the announcement of each.
    newest: BTreeMap<String, u64>,
    daemons: Vec<Daemon>,
    /// By time, then by order of making: for which daemon (by index and life), request.
    events: BTreeMap<(Duration, u64), (usize, u64, u64, Way)>,
    n_events: u64,
    n_takes: u64,
    mode: [Mode; 3],
    lossy: bool,
}

impl World {
    fn new(seed: u64, mode: [Mode; 3], lossy: bool) -> World {
        let mut world = World {
            rng: fastrand::Rng::with_seed(seed),
            now: s(1_000),
            couch: Couch::default(),
            alive: BTreeMap::new(),
            newest: BTreeMap::new(),
            daemons: Vec::new(),
            events: BTreeMap::new(),
            n_events: 0,
            n_takes: 0,
            mode,
            lossy,
        };
        (0..3).for_each(|at| world.start(at, 0));
        world
    }

    fn start(&mut self, at: usize, life: u64) {
        let name = format!("d{at}.{life}");
        let daemon = Daemon {
            lease: Lease::new(&name, self.mode[at], Times::of(TTL)),
            name,
            life,
            request: 0,
            waits: false,
            alone_until: Duration::ZERO,
            asked_at: Duration::ZERO,
            looked_at: Duration::ZERO,
            stopped: Duration::ZERO,
            next_round: self.now,
        };
        if at < self.daemons.len() {
            self.daemons[at] = daemon
        } else {
            self.daemons.push(daemon)
        }
        self.push(at, self.now, Way::Wake);
    }

    fn push(&mut self, at: usize, when: Duration, way: Way) {
        self.n_events += 1;
        let daemon = &self.daemons[at];
        self.events.insert((when, self.n_events), (at, daemon.life, daemon.request, way));
    }

    /// A way from or to CouchDB.
    fn delay(&mut self) -> Duration {
        let ms = if self.rng.u8(..10) == 0 { self.rng.u64(0..4_000) } else { self.rng.u64(0..50) };
        Duration::from_millis(ms)
    }

    fn is_lost(&mut self) -> bool {
        self.lossy && self.rng.u8(..6) == 0
    }

    fn send(&mut self, at: usize, way: Way) {
        self.daemons[at].request += 1;
        self.daemons[at].waits = true;
        let (late, silence) = (self.now + self.delay(), self.now + Duration::from_millis(3_750));
        if !self.is_lost() {
            self.push(at, late, way);
        }
        self.push(at, silence, Way::Silence);
    }

    fn step(&mut self) {
        let ((when, n), (at, life, request, way)) = self.events.pop_first().expect("daemons wake for ever");
        self.now = when;
        // What CouchDB does it does also for the dead.
        match &way {
            Way::Announce(_) | Way::Look | Way::Write(_) => return self.serve(at, life, request, way),
            _ if self.daemons[at].life != life => return,
            _ if self.daemons[at].stopped > when => {
                let until = self.daemons[at].stopped;
                self.events.insert((until, n), (at, life, request, way));
                return;
            }
            _ => {}
        }
        let now = self.now;
        let daemon = &mut self.daemons[at];
        let is_answer = daemon.waits && daemon.request == request;
        if daemon.alone_until <= now {
            daemon.lease.on_gap();
        }
        daemon.alone_until = now + Times::of(TTL).own();
        let jitter = self.rng.f64();
        match way {
            Way::Announced(leased) if is_answer => {
                daemon.lease.on_announced(leased);
                daemon.lease.on_asking(now);
                daemon.asked_at = now;
                self.send(at, Way::Look);
            }
            Way::Looked(found, others) if is_answer => {
                daemon.lease.on_look(found.as_ref(), &others, now, jitter);
                daemon.looked_at = daemon.asked_at;
                self.go_on(at);
            }
            Way::Answered(answer) if is_answer => {
                if matches!((&answer, daemon.lease.state()), (Answer::Written(_), State::Standby)) {
                    self.n_takes += 1;
                }
                daemon.lease.on_answer(answer, now);
                self.rest(at);
            }
            Way::Silence if is_answer => {
                daemon.lease.on_answer(Answer::Unknown, now);
                self.rest(at);
            }
            Way::Wake if !daemon.waits && now >= daemon.next_round => {
                let leased = daemon.lease.is_leased();
                self.send(at, Way::Announce(leased));
            }
            Way::Wake => {}
            _ => {}
        }
        // Its thread wakes at least so often.
        if matches!(self.events.values().filter(|(who, ..)| *who == at).count(), 0) {
            self.push(at, now + s(1), Way::Wake);
        }
    }

    fn go_on(&mut self, at: usize) {
        let now = self.now;
        let daemon = &mut self.daemons[at];
        match daemon.lease.write(now) {
            Some(order) => {
                daemon.lease.on_sending(&order, now);
                self.send(at, Way::Write(order));
            }
            None => self.rest(at),
        }
    }

    fn rest(&mut self, at: usize) {
        let daemon = &mut self.daemons[at];
        daemon.waits = false;
        let busy = daemon.lease.must_look();
        let pause = if busy { s(1) } else { Duration::from_millis(self.rng.u64(2_000..5_000)) };
        daemon.next_round = self.now + pause;
        let next = daemon.next_round;
        self.push(at, next, Way::Wake);
    }

    fn serve(&mut self, at: usize, life: u64, request: u64, way: Way) {
        let name = format!("d{at}.{life}");
        let back = match way {
            // Over the `_rev` of the one before: what comes late is refused.
            Way::Announce(_) if self.newest.get(&name).is_some_and(|newest| *newest > request) => return,
            Way::Announce(leased) => {
                self.newest.insert(name.clone(), request);
                self.couch.announced.insert(name.clone(), leased);
                self.alive.insert(name, self.now);
                Way::Announced(leased)
            }
            Way::Look => {
                let (alive, now) = (&self.alive, self.now);
                let live = |one: &str| one != name && alive.get(one).is_some_and(|at| now - *at <= s(90));
                let others = self.couch.announced.iter().filter(|(one, _)| live(one));
                Way::Looked(self.couch.doc.clone(), others.map(|(one, leased)| other(one, *leased)).collect())
            }
            Way::Write(order) => Way::Answered(self.couch.take(&name, &order)),
            _ => return,
        };
        if self.is_lost() {
            return;
        }
        self.n_events += 1;
        let when = self.now + self.delay();
        self.events.insert((when, self.n_events), (at, life, request, back));
    }

    fn tellers(&self) -> Vec<&str> {
        let tells = |daemon: &&Daemon| {
            // Who is alone and hears nothing of CouchDB goes on with what it has read: a limit that the README states.
            let alone_until = daemon.alone_until.min(daemon.looked_at + Times::of(TTL).own());
            let until = |telling: Telling| telling.until.unwrap_or(alone_until);
            let telling = daemon.lease.telling();
            daemon.stopped <= self.now && telling.is_some_and(|telling| self.now < until(telling))
        };
        self.daemons.iter().filter(tells).map(|daemon| daemon.name.as_str()).collect()
    }

    /// A daemon is stopped for a while, or killed and started again.
    fn trouble(&mut self) {
        let at = self.rng.usize(0..3);
        match self.rng.u8(..3) {
            0 => {
                let pause = Duration::from_millis(self.rng.u64(0..40_000));
                self.daemons[at].stopped = self.now + pause;
            }
            1 => self.daemons[at].stopped = self.now + s(self.rng.u64(60..200)),
            _ => {
                let life = self.daemons[at].life + 1;
                if self.rng.bool() {
                    // Seen to be gone: it was on the same machine.
                    let name = self.daemons[at].name.clone();
                    self.alive.remove(&name);
                }
                self.start(at, life);
            }
        }
    }
}

fn simulate(seed: u64, mode: [Mode; 3], lossy: bool) -> (u64, Duration) {
    let mut world = World::new(seed, mode, lossy);
    let end = world.now + s(1_500);
    let mut next_trouble = world.now + s(20);
    let (mut told, mut before) = (Duration::ZERO, world.now);
    while world.now < end {
        world.step();
        let tellers = world.tellers();
        assert!(tellers.len() <= 1, "seed {seed}, {mode:?}, at {:?}: {tellers:?} tell", world.now);
        if tellers.len() == 1 {
            told += world.now - before;
        }
        before = world.now;
        if world.now >= next_trouble {
            world.trouble();
            next_trouble = world.now + Duration::from_millis(world.rng.u64(1_000..90_000));
        }
    }
    (world.n_takes, told)
}

#[test]
fn in_a_simulation_with_stops_kills_and_lost_answers_no_two_tell() {
    let seeds = std::env::var("LEASE_SCHEDULES").map_or_else(|_| size(60, 300), |n| n.parse().unwrap());
    let (auto, on) = (Mode::Auto, Mode::On);
    let (mut n_takes, mut told) = (0, Duration::ZERO);
    let modes = [[on, on, on], [auto, auto, auto], [auto, on, auto]];
    for seed in 0..seeds {
        let mode = modes[usize::try_from(seed % 3).unwrap()];
        let (takes, one) = simulate(seed, mode, seed % 2 == 0);
        n_takes += takes;
        told += one;
    }
    let share = told.as_secs_f64() / (s(1_500) * u32::try_from(seeds).unwrap()).as_secs_f64();
    println!("{seeds} schedules, {n_takes} take-overs, somebody told {share:.2} of the time");
    assert!(n_takes > seeds * 3, "{n_takes} take-overs");
    assert!(share > 0.5, "somebody told only {share:.2} of the time");
}
