//! Looks at the replications of one replicator database for one webhook, and gives what is to be told of them.
//!
//! Seen from the pipeline a database of replications is read as any other: it is opened, gives pages of events, and is
//! waited on; the positions are numbers of ours, `"t17"` (`"now"` before the first look). Guarantees (DESIGN §7) that an
//! event, and the state that it made known, are stored together before the event is handed over; that it is handed over
//! again after every start until the webhook's checkpoint has passed it; that long lists are read page by page and a
//! page that fails costs that look alone. What counts as a change is `pure::transitions`'.

mod details;
mod look;

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::config::{self, Polling};
use crate::couch::client::{Generation, Welcome};
use crate::couch::feed::Feed;
use crate::couch::remembered::{Memory, Revs};
use crate::error::{Kind, Result};
use crate::pure::checkpoint::Mark;
use crate::pure::lag::Here;
use crate::pure::message::Arrived;
use crate::pure::remembered::{Waited, is_now, number, position, position_now};
use crate::pure::rep_doc::Version;
use crate::pure::replication::Row;
use crate::pure::seq::Seq;
use crate::pure::transitions::{Transitions, telling};
use crate::sys;

/// Events handed over at once while waiting; with more the pipeline takes pages, as large as it has room for.
const EVENTS_MAX: usize = 100;
/// Between two looks, whatever wakes us: a replicator database may be written a hundred times a second.
const LOOK_GAP: Duration = Duration::from_secs(1);
/// Looks in a row that may fail by an answer 5xx before it counts as a fault.
const FAILED_LOOKS_MAX: u32 = 3;

/// What is needed to look.
pub struct Looking {
    /// What is told, of which database, and where that is remembered.
    pub memory: Memory,
    /// How often, and what counts.
    pub polling: Polling,
}

/// One webhook's look at one replicator database.
pub struct Monitor {
    looking: Looking,
    here: Here,
    opened: Option<Opened>,
}

/// From one opening to the next.
struct Opened {
    machine: Transitions,
    generation: Generation,
    version: Option<Version>,
    /// Whether there is `_scheduler`; before CouchDB 2.1 documents alone say how their replications are.
    has_scheduler: bool,
    /// `_rev`s of the documents in which states are remembered.
    revs: Revs,
    /// How far the database's own feed was read.
    since: Seq,
    /// Until it was once read to its end: the documents that are there.
    found: Option<HashSet<String>>,
    /// Without `_scheduler`: what the documents say.
    rows: BTreeMap<String, Row>,
    next_look: Instant,
    n_failed: u32,
}

impl Monitor {
    /// Prepares everything; sends nothing.
    pub fn new(looking: Looking, hookd: &config::Hookd) -> Monitor {
        let bases = [Some(hookd.couchdb_url.as_str()), hookd.public_url.as_deref()];
        let here = Here::new(bases.into_iter().flatten());
        Monitor { looking, here, opened: None }
    }

    /// Reads what is remembered, in the database that bears `mark`; `through` is what its checkpoint says.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn open(&mut self, welcome: &Welcome, mark: Mark, through: Option<&Seq>) -> Result<()> {
        self.opened = None;
        let is_quiet = through.is_some_and(is_now);
        let (stored, revs) = self.looking.memory.read(mark)?;
        let through = through.map_or(0, number);
        let settings = self.looking.polling.transitions;
        let generation = welcome.generation;
        let has_scheduler = generation != Generation::One && self.has_scheduler()?;
        self.opened = Some(Opened {
            machine: Transitions::new(settings, mark, stored, through, is_quiet),
            generation,
            version: welcome.version.parse().ok(),
            has_scheduler,
            revs,
            since: Seq::zero(),
            found: Some(HashSet::new()),
            rows: BTreeMap::new(),
            next_look: sys::now(),
            n_failed: 0,
        });
        Ok(())
    }

    /// Events behind a position that are stored, at most `limit`, and the position behind them.
    pub fn page(&self, since: &Seq, limit: usize) -> (Vec<Arrived>, Seq) {
        let machine = &self.opened().machine;
        if machine.remembered.is_first_look() {
            // Whoever stops here has not looked, or not at everything.
            return (Vec::new(), position_now());
        }
        let events = machine.remembered.events_after(number(since), limit);
        let last = position(events.last().map_or(number(since), |last| last.n));
        let mark = machine.remembered.mark().to_string();
        let telling = &self.looking.memory.telling;
        let arrived = |n, event| Arrived { seq: Some(position(n)), event };
        (events.iter().map(|kept| arrived(kept.n, telling::event(telling, kept, &mark))).collect(), last)
    }

    /// Looks again and again, and hands over what is to be told; ends after `timeout`, when `feed` is closed, or when
    /// `emit` says so.
    ///
    /// # Errors
    /// As [`Memory::write`]; what was not stored by then is found again after the next opening.
    pub fn wait(
        &mut self,
        feed: &mut Feed,
        since: &Seq,
        timeout: Duration,
        emit: &mut dyn FnMut(Vec<Arrived>) -> bool,
    ) -> Result<Waited> {
        let until = sys::now() + timeout;
        let mut last_seq = since.clone();
        loop {
            if sys::now() >= self.opened().next_look {
                self.look_once(feed)?;
            }
            let (events, behind) = self.page(&last_seq, EVENTS_MAX);
            let is_full = events.len() == EVENTS_MAX;
            last_seq = behind;
            if !events.is_empty() && !emit(events) {
                return Ok(Waited { last_seq, closed: true });
            }
            if is_full || self.looking.memory.is_stopping() {
                return Ok(Waited { last_seq, closed: true });
            }
            let next = self.opened().next_look.min(until);
            let left = next.saturating_duration_since(sys::now());
            if sys::now() >= until {
                return Ok(Waited { last_seq, closed: false });
            }
            if !self.rest(feed, left)? {
                return Ok(Waited { last_seq, closed: true });
            }
        }
    }

    /// One look, and what follows from it. One that fails by an answer 5xx is left for the next (CONTRACT §8).
    fn look_once(&mut self, feed: &mut Feed) -> Result<()> {
        let interval = self.looking.polling.interval;
        let may_fail = self.may_fail();
        match self.look(feed) {
            Ok(()) => self.opened_mut().n_failed = 0,
            Err(error) if error.kind() == Kind::Server && may_fail => {
                log::debug!("replications of `{}`: {error}; looking again", self.looking.memory.telling.db);
            }
            Err(error) => return Err(error),
        }
        self.opened_mut().next_look = sys::now() + interval;
        Ok(())
    }

    /// Whether a failure of the look that begins may be passed over: not at the first look, of which nothing is kept
    /// before all of it is, nor before all documents were seen.
    fn may_fail(&mut self) -> bool {
        let opened = self.opened_mut();
        opened.n_failed += 1;
        opened.n_failed <= FAILED_LOOKS_MAX
            && !opened.machine.remembered.is_first_look()
            && opened.found.is_none()
    }

    /// Waits for a change of the database for so long; `false` when the feed was closed.
    fn rest(&mut self, feed: &mut Feed, left: Duration) -> Result<bool> {
        let gap = LOOK_GAP.min(self.looking.polling.interval);
        let (went_on, n_changes) = self.follow(feed, left)?;
        let opened = self.opened_mut();
        if n_changes > 0 {
            opened.next_look = opened.next_look.min(sys::now() + gap);
        }
        Ok(went_on)
    }

    fn opened(&self) -> &Opened {
        self.opened.as_ref().expect("a database is opened before it is looked at")
    }

    fn opened_mut(&mut self) -> &mut Opened {
        self.opened.as_mut().expect("a database is opened before it is looked at")
    }

    /// Stores what changed; only then may it be told.
    fn store(&mut self) -> Result<()> {
        let opened = self.opened.as_mut().expect("a database is opened before it is looked at");
        self.looking.memory.write(&mut opened.machine.remembered, &mut opened.revs)
    }
}
