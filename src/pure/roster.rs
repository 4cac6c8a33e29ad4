//! The databases that a webhook finds by pattern: which are known, which may hold something new, which are being read.
//!
//! A database is looked at from outside: by hints, which may be lost, and by a sweep that gives a fingerprint of its
//! state. Guarantees that a fingerprint counts as clean only when the database was read to its end *after* it was seen,
//! everything told and the checkpoint stored; that a database is read again until then, whatever fails; that those that
//! wait take turns; and that a database at rest takes a few hundred bytes. Fingerprints are compared for equality only:
//! on a cluster an idle database has several, and each costs one look. Reading is `flow`'s; how much is read at a time
//! is `dispatch`'s.
//!
//! ```text
//!            unknown fingerprint, hint, unknown database              a place is free
//!   Idle ------------------------------------------------> Waiting ------------------> Active --rested--> Idle
//!                                                             ^   after a pause           |
//!                                                             '---------- Failed <--------' a fault
//! ```

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pure::checkpoint::Mark;
use crate::pure::dispatch::FlowIndex;
use crate::pure::message::doc_key;
use crate::pure::table::Table;

/// Fingerprints kept of a database: a cluster of three nodes has a handful of spellings for one state.
const CLEAN_MAX: usize = 16;
/// Parts that what is known is stored in, so that a change of one database does not write all of them.
pub const BUCKETS: usize = 256;
/// Pause after a fault that is not the database's own: when CouchDB answers again, nothing waits for long.
const LOST_AFTER: Duration = Duration::from_secs(1);
/// Pauses after faults of its own in a row, before a database is read again; the last repeats.
const FAILED_AFTER: [Duration; 5] = [
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(10),
    Duration::from_secs(60),
    Duration::from_secs(300),
];

/// What is stored of a database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    /// The mark that it bears.
    pub mark: Option<Mark>,
    /// Fingerprints of states that hold nothing new, oldest first.
    pub clean: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Waiting,
    Active(FlowIndex),
    Failed(Instant),
    /// Another daemon tells it; only its name is known.
    Theirs,
}

#[derive(Debug)]
struct Known {
    entry: Entry,
    /// Fingerprints that are clean once it rests.
    causes: Vec<u64>,
    state: State,
    failures: u8,
    /// A hint has named it since it last rested.
    hinted: bool,
    /// Its flow is to be let go: it is somebody else's now.
    leaving: bool,
    /// The last sweep that saw it.
    seen_in: u32,
}

/// The machine.
#[derive(Debug, Default)]
pub struct Roster {
    databases: Table<Arc<str>, Known>,
    waiting: VecDeque<Arc<str>>,
    failed: BTreeSet<(Instant, Arc<str>)>,
    n_active: usize,
    n_leaving: usize,
    /// Counts sweeps.
    sweep: u32,
    /// Whether the one under way began after we did.
    is_whole: bool,
    /// Buckets that are not stored as they are.
    changed: BTreeSet<u8>,
}

impl Roster {
    /// What was stored.
    pub fn restored(entries: impl IntoIterator<Item = (String, Entry)>) -> Roster {
        let known = |(name, entry): (String, Entry)| (Arc::from(name), Known::new(entry, State::Idle, 0));
        Roster { databases: entries.into_iter().map(known).collect(), sweep: 1, ..Roster::default() }
    }

    /// Those that are read, or have not rested yet.
    pub fn n_active(&self) -> usize {
        self.n_active
    }

    /// Whether it is known.
    pub fn is_known(&self, db: &str) -> bool {
        self.databases.contains_key(db)
    }

    /// Whether a database holds nothing new in this state, as far as is known; `at_rest`: the flow that it has.
    #[cfg(test)]
    pub fn is_clean(&self, db: &str, fingerprint: u64, at_rest: bool) -> bool {
        let Some(known) = self.databases.get(db) else { return false };
        known.entry.clean.contains(&fingerprint) && known.state == State::Idle
            || at_rest && known.causes.contains(&fingerprint)
    }

    /// The mark that it bore when it was last opened.
    pub fn mark(&self, db: &str) -> Option<Mark> {
        self.databases.get(db)?.entry.mark
    }

    /// Whether something of what is known is not stored.
    pub fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// The flow that a database has at the moment.
    pub fn flow(&self, db: &str) -> Option<FlowIndex> {
        match self.databases.get(db)?.state {
            State::Active(flow) => Some(flow),
            State::Idle | State::Waiting | State::Failed(_) | State::Theirs => None,
        }
    }

    /// The sweep saw a database of the pattern in this state. A flow that is given is to be stirred.
    pub fn on_seen(&mut self, db: &str, fingerprint: u64) -> Option<FlowIndex> {
        let sweep = self.sweep;
        if let Some(known) = self.databases.get_mut(db) {
            known.seen_in = sweep;
            // Among the causes: it is being read since then, to its end.
            if known.entry.clean.contains(&fingerprint) || known.causes.contains(&fingerprint) {
                return None;
            }
        }
        let flow = self.stir(db);
        if let Some(known) = self.databases.get_mut(db) {
            push_last(&mut known.causes, fingerprint);
        }
        flow
    }

    /// A hint names a database of the pattern. A flow that is given is to be stirred.
    pub fn on_hint(&mut self, db: &str) -> Option<FlowIndex> {
        let flow = self.stir(db);
        if let Some(known) = self.databases.get_mut(db) {
            known.hinted = true;
        }
        flow
    }

    /// Whether changes that were read of it were named by no hint: said once until it rests.
    pub fn on_changes(&mut self, db: &str) -> bool {
        let Some(known) = self.databases.get_mut(db) else { return false };
        !std::mem::replace(&mut known.hinted, true)
    }

    /// Something is said to have happened to a database of the pattern, or it is wanted. A flow that is given is to be
    /// stirred.
    pub fn stir(&mut self, db: &str) -> Option<FlowIndex> {
        let Some(known) = self.databases.get_mut(db) else {
            let name: Arc<str> = db.into();
            let known = Known::new(Entry::default(), State::Waiting, self.sweep);
            self.databases.insert(Arc::clone(&name), known);
            self.waiting.push_back(name);
            return None;
        };
        match known.state {
            State::Active(flow) => Some(flow),
            State::Idle | State::Theirs => {
                known.state = State::Waiting;
                self.waiting.push_back(db.into());
                None
            }
            // What it is waiting for comes after this.
            State::Waiting | State::Failed(_) => None,
        }
    }

    /// A database of the pattern that another daemon tells was seen, or hinted at.
    pub fn on_theirs(&mut self, db: &str) {
        let sweep = self.sweep;
        match self.databases.get_mut(db) {
            Some(known) => known.seen_in = sweep,
            None => {
                drop(self.databases.insert(db.into(), Known::new(Entry::default(), State::Theirs, sweep)))
            }
        }
    }

    /// The databases are divided anew. Gives flows to leave; what was another daemon's and is ours now waits to be read.
    pub fn divide(&mut self, is_mine: impl Fn(&str) -> bool) -> Vec<FlowIndex> {
        let mut flows = Vec::new();
        for (name, known) in &mut self.databases {
            match (known.state, is_mine(name)) {
                (State::Theirs, true) => {
                    known.state = State::Waiting;
                    self.waiting.push_back(Arc::clone(name));
                }
                (State::Idle | State::Waiting | State::Failed(_), false) => {
                    if let State::Failed(until) = known.state {
                        self.failed.remove(&(until, Arc::clone(name)));
                    }
                    *known = Known::new(Entry::default(), State::Theirs, known.seen_in);
                }
                (State::Active(flow), false) if !known.leaving => {
                    known.leaving = true;
                    self.n_leaving += 1;
                    flows.push(flow);
                }
                (State::Theirs | State::Active(_), false)
                | (State::Idle | State::Waiting | State::Failed(_) | State::Active(_), true) => {}
            }
        }
        self.waiting.retain(|name| is_mine(name));
        flows
    }

    /// Whether nothing is under way any more of what was found not to be ours.
    pub fn is_settled(&self) -> bool {
        self.n_leaving == 0
    }

    /// Whether a database is being let go to somebody else.
    pub fn is_leaving(&self, db: &str) -> bool {
        self.databases.get(db).is_some_and(|known| known.leaving)
    }

    /// Nothing of a database that was left is under way any more.
    pub fn on_left(&mut self, db: &str, is_mine: bool) {
        let Some(known) = self.leave(db) else { return };
        *known = Known::new(Entry::default(), State::Theirs, known.seen_in);
        if is_mine {
            self.stir(db);
        }
    }

    /// A sweep has seen all databases that there are: those that it did not see are looked at, and found to be gone.
    /// The first one may have been under way when we began.
    pub fn on_swept(&mut self) {
        if !std::mem::replace(&mut self.is_whole, true) {
            self.sweep = self.sweep.wrapping_add(1);
            return;
        }
        let unseen = |(name, known): (&Arc<str>, &Known)| {
            (known.state == State::Idle && known.seen_in != self.sweep).then(|| Arc::clone(name))
        };
        let unseen: Vec<Arc<str>> = self.databases.iter().filter_map(unseen).collect();
        let sweep = self.sweep;
        self.databases.retain(|_, known| known.state != State::Theirs || known.seen_in == sweep);
        for name in unseen {
            self.stir(&name);
        }
        self.sweep = self.sweep.wrapping_add(1);
    }

    /// The next database to be read, and the mark that it bore; to be answered with `on_active`, `on_rested`, `on_gone`
    /// or `on_failed`.
    pub fn next(&mut self, now: Instant) -> Option<(Arc<str>, Option<Mark>)> {
        while let Some((until, name)) = self.failed.pop_first() {
            if until > now {
                self.failed.insert((until, name));
                break;
            }
            if let Some(known) = self.databases.get_mut(&name) {
                known.state = State::Waiting;
                self.waiting.push_back(name);
            }
        }
        let name = self.waiting.pop_front()?;
        let mark = self.databases.get(&name).and_then(|known| known.entry.mark);
        Some((name, mark))
    }

    /// When one that failed is to be read again.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.failed.first().map(|(until, _)| *until)
    }

    /// Its flow is this one; what is seen from now on stirs it.
    pub fn on_active(&mut self, db: &str, flow: FlowIndex) {
        let known = self.databases.entry(db.into()).or_insert_with(|| {
            // Nobody has seen it: somebody wants it.
            Known::new(Entry::default(), State::Idle, self.sweep)
        });
        match known.state {
            State::Failed(until) => drop(self.failed.remove(&(until, db.into()))),
            State::Idle | State::Waiting | State::Theirs => {}
            State::Active(_) => unreachable!("a database has one flow at a time"),
        }
        known.state = State::Active(flow);
        self.waiting.retain(|name| **name != *db);
        self.n_active += 1;
    }

    /// The mark that it bears; whether it bore another one before.
    pub fn on_mark(&mut self, db: &str, mark: Mark) -> Option<Mark> {
        let known = self.databases.get_mut(db)?;
        let before = known.entry.mark.replace(mark);
        if before != Some(mark) {
            // What was clean of another database says nothing of this one.
            known.entry.clean.clear();
            if before.is_some() {
                known.causes.clear();
            }
            self.changed.insert(bucket(db));
        }
        before.filter(|before| *before != mark)
    }

    /// It was read to its end, and everything is told and stored.
    pub fn on_rested(&mut self, db: &str) {
        let Some(known) = self.leave(db) else { return };
        known.state = State::Idle;
        known.failures = 0;
        known.hinted = false;
        let causes = std::mem::take(&mut known.causes);
        if !causes.is_empty() {
            for cause in causes {
                push_last(&mut known.entry.clean, cause);
            }
            self.changed.insert(bucket(db));
        }
    }

    /// It does not exist any more. One of its name that comes later is read from its beginning.
    pub fn on_gone(&mut self, db: &str) {
        self.leave(db);
        self.databases.remove(db);
        self.changed.insert(bucket(db));
    }

    /// It could not be read; `is_its_own`: the others can, as far as is known.
    pub fn on_failed(&mut self, db: &str, is_its_own: bool, now: Instant) {
        let Some(known) = self.leave(db) else { return };
        let until = match is_its_own {
            true => now + FAILED_AFTER[usize::from(known.failures).min(FAILED_AFTER.len() - 1)],
            false => now + LOST_AFTER,
        };
        known.failures = known.failures.saturating_add(u8::from(is_its_own));
        known.state = State::Failed(until);
        self.failed.insert((until, db.into()));
    }

    fn leave(&mut self, db: &str) -> Option<&mut Known> {
        let known = self.databases.get_mut(db)?;
        if let State::Active(_) = known.state {
            self.n_active -= 1;
        }
        if std::mem::take(&mut known.leaving) {
            self.n_leaving -= 1;
        }
        Some(known)
    }

    /// A bucket that is to be stored, and what it holds; another one at the next call.
    pub fn take_changed(&mut self) -> Option<(u8, Vec<(String, Entry)>)> {
        let number = self.changed.pop_first()?;
        Some((number, self.entries(number)))
    }

    /// It could not be stored.
    pub fn on_not_stored(&mut self, bucket: u8) {
        self.changed.insert(bucket);
    }

    fn entries(&self, number: u8) -> Vec<(String, Entry)> {
        let ours = self.databases.iter().filter(|(name, _)| bucket(name) == number);
        // One without a mark was never opened: as good as not known.
        let opened = ours.filter(|(_, known)| known.entry.mark.is_some() && known.state != State::Theirs);
        let mut entries: Vec<_> =
            opened.map(|(name, known)| (name.to_string(), known.entry.clone())).collect();
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        entries
    }
}

impl Known {
    fn new(entry: Entry, state: State, seen_in: u32) -> Known {
        Known { entry, causes: Vec::new(), state, failures: 0, hinted: false, leaving: false, seen_in }
    }
}

/// The bucket that a database is stored in.
pub fn bucket(db: &str) -> u8 {
    // The upper bits of FNV-1a are the better mixed ones.
    u8::try_from(doc_key(db) >> 56).expect("8 bits are left")
}

/// Adds one, in the place of the oldest where there are enough.
fn push_last(fingerprints: &mut Vec<u64>, fingerprint: u64) {
    if fingerprints.contains(&fingerprint) {
        return;
    }
    if fingerprints.len() >= CLEAN_MAX {
        fingerprints.remove(0);
    }
    fingerprints.push(fingerprint);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::sys;

    const DATABASES: [&str; 4] = ["a", "b", "c", "d"];

    /// A database as it is, and what was read of it.
    #[derive(Debug, Default)]
    struct Real {
        exists: bool,
        life: u64,
        version: u64,
        /// Of the page under way, or the last one; `None` before the first.
        page: Option<(u64, u64)>,
        stirred: bool,
        /// Read to the end, told, stored.
        done: (u64, u64),
    }

    impl Real {
        fn fingerprint(&self, spelling: u64) -> u64 {
            self.life << 32 | self.version << 8 | spelling
        }
    }

    struct World {
        roster: Roster,
        real: BTreeMap<&'static str, Real>,
        flows: Vec<Option<&'static str>>,
        random: fastrand::Rng,
        now: Instant,
    }

    impl World {
        fn new(seed: u64) -> World {
            let real = DATABASES.map(|db| (db, Real::default())).into_iter().collect();
            let (roster, flows) = (Roster::restored([]), vec![None; DATABASES.len()]);
            World { roster, real, flows, random: fastrand::Rng::with_seed(seed), now: sys::now() }
        }

        fn stir(&mut self, flow: Option<FlowIndex>) {
            if let Some(db) = flow.map(|flow| self.flows[flow].expect("it has a flow")) {
                self.real.get_mut(db).unwrap().stirred = true;
            }
        }

        fn happen(&mut self) {
            let db = DATABASES[self.random.usize(..DATABASES.len())];
            let is_hinted = self.random.bool();
            let real = self.real.get_mut(db).unwrap();
            match self.random.u8(..8) {
                0 if real.exists => real.exists = false,
                _ if real.exists => real.version += 1,
                _ => (real.exists, real.life, real.version) = (true, real.life + 1, 0),
            }
            if is_hinted {
                let flow = self.roster.stir(db);
                self.stir(flow);
            }
        }

        fn sweep(&mut self) {
            for db in DATABASES {
                let real = &self.real[db];
                if real.exists {
                    let fingerprint = real.fingerprint(self.random.u64(..3));
                    let flow = self.roster.on_seen(db, fingerprint);
                    self.stir(flow);
                }
                if self.random.u8(..4) == 0 {
                    self.work();
                }
            }
            self.roster.on_swept();
        }

        /// One step of one of those who read.
        fn work(&mut self) {
            let free = self.flows.iter().position(Option::is_none);
            if let Some(free) = free.filter(|_| self.random.bool()) {
                if let Some((db, _)) = self.roster.next(self.now) {
                    let db = DATABASES.into_iter().find(|known| **known == *db).unwrap();
                    self.roster.on_active(db, free);
                    self.flows[free] = Some(db);
                    let real = self.real.get_mut(db).unwrap();
                    (real.stirred, real.page) = (true, None);
                }
                return;
            }
            let flow = self.random.usize(..self.flows.len());
            let Some(db) = self.flows[flow] else { return };
            let real = self.real.get_mut(db).unwrap();
            if self.random.u8(..6) == 0 {
                let is_its_own = self.random.bool();
                self.roster.on_failed(db, is_its_own, self.now);
                self.flows[flow] = None;
            } else if !real.exists {
                self.roster.on_gone(db);
                self.flows[flow] = None;
            } else if real.stirred {
                (real.stirred, real.page) = (false, Some((real.life, real.version)));
                let mut mark = [0; 16];
                mark[0] = u8::try_from(real.life % 256).unwrap();
                self.roster.on_mark(db, Mark::new(mark));
            } else {
                real.done = real.page.expect("it was read");
                self.roster.on_rested(db);
                self.flows[flow] = None;
                self.check_clean(db);
            }
        }

        /// What counts as clean was read.
        fn check_clean(&self, db: &str) {
            let real = &self.real[db];
            for fingerprint in &self.roster.databases[db].entry.clean {
                let (life, version) = (fingerprint >> 32, (fingerprint >> 8) & 0xff_ffff);
                assert!(
                    (life, version) <= real.done,
                    "`{db}`: {life}/{version} is clean, read was {:?}",
                    real.done
                );
            }
        }
    }

    #[test]
    fn whatever_is_lost_and_fails_everything_is_read_in_the_end() {
        for seed in 0..2_000 {
            let mut world = World::new(seed);
            for _ in 0..world.random.usize(..80) {
                match world.random.u8(..4) {
                    0 => world.happen(),
                    1 if world.random.bool() => world.sweep(),
                    _ => world.work(),
                }
            }
            let mut n = 0;
            while world.real.iter().any(|(db, real)| match real.exists {
                true => real.done != (real.life, real.version),
                false => world.roster.is_known(db),
            }) {
                world.now += FAILED_AFTER[FAILED_AFTER.len() - 1];
                world.sweep();
                (0..40).for_each(|_| world.work());
                n += 1;
                assert!(n < 200, "seed {seed}: {:?}\n{:?}", world.real, world.roster);
            }
        }
    }

    #[test]
    fn an_idle_database_is_looked_at_once_for_each_way_its_state_is_spelled() {
        let mut roster = Roster::restored([("a".to_owned(), Entry { mark: None, clean: vec![1] })]);
        let now = sys::now();
        let mut n_looks = 0;
        for fingerprint in [1, 2, 1, 3, 2, 3, 1] {
            roster.on_seen("a", fingerprint);
            if roster.next(now).is_some() {
                n_looks += 1;
                roster.on_active("a", 0);
                roster.on_rested("a");
            }
        }
        assert_eq!(n_looks, 2);
    }

    #[test]
    fn what_was_clean_of_another_life_is_not_clean() {
        let [old, new] = [Mark::new([1; 16]), Mark::new([2; 16])];
        let mut roster = Roster::restored([("a".to_owned(), Entry { mark: Some(old), clean: vec![1, 2] })]);
        roster.on_active("a", 0);
        assert_eq!(roster.on_mark("a", new), Some(old));
        roster.on_rested("a");
        roster.on_seen("a", 2);
        assert!(roster.next(sys::now()).is_some());
    }

    #[test]
    fn those_that_fail_wait_longer_each_time_and_hold_up_nobody() {
        let mut roster = Roster::restored([]);
        let mut now = sys::now();
        let mut pauses = Vec::new();
        roster.stir("bad");
        for _ in 0..6 {
            assert_eq!(roster.next(now).map(|(db, _)| db.to_string()).as_deref(), Some("bad"));
            roster.on_active("bad", 0);
            roster.on_failed("bad", true, now);
            roster.stir("bad");
            roster.stir("good");
            assert_eq!(roster.next(now).map(|(db, _)| db.to_string()).as_deref(), Some("good"));
            roster.on_active("good", 1);
            roster.on_rested("good");
            assert!(roster.next(now).is_none());
            let until = roster.next_deadline().unwrap();
            pauses.push((until - now).as_millis());
            now = until;
        }
        assert_eq!(pauses, [500, 2_000, 10_000, 60_000, 300_000, 300_000]);
    }

    #[test]
    fn only_buckets_that_changed_are_stored() {
        let entries = (0..1_000)
            .map(|n| (format!("tenant-{n}"), Entry { mark: Some(Mark::new([1; 16])), clean: vec![7] }));
        let mut roster = Roster::restored(entries);
        assert!(!roster.is_changed());
        roster.on_seen("tenant-9", 8);
        roster.next(sys::now());
        roster.on_active("tenant-9", 0);
        roster.on_rested("tenant-9");
        let (number, stored) = roster.take_changed().unwrap();
        assert_eq!((number, roster.take_changed()), (bucket("tenant-9"), None));
        assert!(stored.len() < 30, "of 1,000 databases 4 are in a bucket, {} are", stored.len());
        let own = stored.iter().find(|(db, _)| db == "tenant-9").unwrap();
        assert_eq!(own.1.clean, [7, 8]);
        roster.on_not_stored(number);
        assert!(roster.is_changed());
    }

    #[test]
    fn what_is_stored_is_clean_only_once_it_was_read_and_told() {
        let mark = Mark::new([1; 16]);
        let mut roster = Roster::restored([("a".to_owned(), Entry { mark: Some(mark), clean: vec![1] })]);
        let mut now = sys::now();
        let stored = |roster: &mut Roster| {
            roster.on_not_stored(bucket("a"));
            roster.take_changed().unwrap().1[0].1.clean.clone()
        };
        roster.on_seen("a", 2);
        assert_eq!(stored(&mut roster), [1], "it waits");
        for _ in 0..2 {
            roster.next(now).unwrap();
            roster.on_active("a", 0);
            assert_eq!(stored(&mut roster), [1], "it is read");
            roster.on_failed("a", true, now);
            assert_eq!(stored(&mut roster), [1], "it could not be read");
            now = roster.next_deadline().unwrap();
        }
        roster.next(now).unwrap();
        roster.on_active("a", 0);
        roster.on_rested("a");
        assert_eq!(stored(&mut roster), [1, 2]);
    }
}
