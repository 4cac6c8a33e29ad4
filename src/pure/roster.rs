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
/// Pauses after faults in a row, before a database is read again; the last repeats.
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
}

#[derive(Debug)]
struct Known {
    entry: Entry,
    /// Fingerprints that are clean once it rests.
    causes: Vec<u64>,
    state: State,
    failures: u8,
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

    /// Databases known.
    pub fn n_known(&self) -> usize {
        self.databases.len()
    }

    /// Those that wait to be read.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Those that are read, or have not rested yet.
    pub fn n_active(&self) -> usize {
        self.n_active
    }

    /// The flow that a database has at the moment.
    pub fn flow(&self, db: &str) -> Option<FlowIndex> {
        match self.databases.get(db)?.state {
            State::Active(flow) => Some(flow),
            State::Idle | State::Waiting | State::Failed(_) => None,
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
            State::Idle => {
                known.state = State::Waiting;
                self.waiting.push_back(db.into());
                None
            }
            // What it is waiting for comes after this.
            State::Waiting | State::Failed(_) => None,
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
            State::Idle | State::Waiting => {}
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

    /// It could not be read.
    pub fn on_failed(&mut self, db: &str, now: Instant) {
        let Some(known) = self.leave(db) else { return };
        let until = now + FAILED_AFTER[usize::from(known.failures).min(FAILED_AFTER.len() - 1)];
        known.failures = known.failures.saturating_add(1);
        known.state = State::Failed(until);
        self.failed.insert((until, db.into()));
    }

    fn leave(&mut self, db: &str) -> Option<&mut Known> {
        let known = self.databases.get_mut(db)?;
        if let State::Active(_) = known.state {
            self.n_active -= 1;
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
        let opened = ours.filter(|(_, known)| known.entry.mark.is_some());
        let mut entries: Vec<_> =
            opened.map(|(name, known)| (name.to_string(), known.entry.clone())).collect();
        entries.sort_by(|one, other| one.0.cmp(&other.0));
        entries
    }
}

impl Known {
    fn new(entry: Entry, state: State, seen_in: u32) -> Known {
        Known { entry, causes: Vec::new(), state, failures: 0, seen_in }
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
