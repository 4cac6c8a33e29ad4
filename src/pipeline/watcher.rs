//! Watches databases themselves for one webhook, and gives what is to be told of them.
//!
//! Seen from the pipeline it is read as a feed is: it is opened, gives pages of events, and is waited on; the positions
//! are numbers of ours, `"t17"` (`"now"` before the first look). Guarantees (DESIGN §7) that an event, and what it made
//! known, are stored together before the event is handed over; that it is handed over again after every start until the
//! webhook's checkpoint has passed it; and that a look that fails is found to be needed again. What is told is
//! `pure::database_events`'; when databases are looked at is the lookout's.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};

use crate::couch::client::{Generation, Welcome};
use crate::couch::databases::{Info, Walk};
use crate::couch::look_into::look_into;
use crate::couch::remembered::{Memory, Revs};
use crate::error::{Kind, Result};
use crate::pipeline::lookout::{Lookout, Sighting};
use crate::pure::checkpoint::Mark;
use crate::pure::database_events::{DatabaseEvents, telling};
use crate::pure::message::Arrived;
use crate::pure::remembered::{Waited, is_now, number, position};
use crate::pure::seq::Seq;
use crate::sys;

/// Events handed over at once while waiting.
const EVENTS_MAX: usize = 100;
/// Sightings on their way; each is a page of databases at most.
const SIGHTINGS_MAX: usize = 64;
/// Databases looked into before what was found is stored and told, and the lookout heard again.
const LOOKS_MAX: usize = 20;
/// How often it is looked whether a wait is to end.
const END_CHECK: Duration = Duration::from_millis(200);

/// Which databases, by name.
pub type Wanted = Arc<dyn Fn(&str) -> bool + Send + Sync>;

/// What is needed to watch.
pub struct Watching {
    /// What is told, and where it is remembered.
    pub memory: Memory,
    /// Of which databases.
    pub wanted: Wanted,
    /// Who sees them.
    pub lookout: Arc<Lookout>,
}

/// One webhook's watch over databases.
pub struct Watcher {
    watching: Watching,
    opened: Option<Opened>,
}

/// From one opening to the next.
struct Opened {
    machine: DatabaseEvents,
    generation: Generation,
    /// `_rev`s of the documents in which databases are remembered.
    revs: Revs,
    sightings: Receiver<Sighting>,
    waiting: Waiting,
}

/// Databases to be looked into, each once, and the fingerprint that led there last.
#[derive(Default)]
struct Waiting {
    order: VecDeque<String>,
    fingerprints: HashMap<String, Option<u64>>,
}

impl Watcher {
    /// Prepares everything; sends nothing.
    pub fn new(watching: Watching) -> Watcher {
        Watcher { watching, opened: None }
    }

    /// Reads what is remembered, in the database that bears `mark`, and at the first start what there is; `through` is
    /// what the checkpoint says.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn open(&mut self, welcome: &Welcome, mark: Mark, through: Option<&Seq>) -> Result<()> {
        self.opened = None;
        let is_quiet = through.is_some_and(is_now);
        let (stored, revs) = self.watching.memory.read(mark)?;
        let webhook = &self.watching.memory.telling.webhook;
        let mut machine = DatabaseEvents::new(webhook, mark, stored, through.map_or(0, number), is_quiet);
        // Before what is there is listed: what happens meanwhile is hinted at.
        let (to, sightings) = bounded(SIGHTINGS_MAX);
        let wanted = Arc::clone(&self.watching.wanted);
        self.watching.lookout.subscribe(Box::new(move |db| wanted(db)), to)?;
        if machine.remembered.is_first_look() {
            machine.on_there(self.names()?);
        }
        let generation = welcome.generation;
        self.opened = Some(Opened { machine, generation, revs, sightings, waiting: Waiting::default() });
        self.store()
    }

    /// Events behind a position that are stored, at most `limit`, and the position behind them.
    pub fn page(&mut self, since: &Seq, limit: usize) -> (Vec<Arrived>, Seq) {
        let machine = &mut self.opened_mut().machine;
        let (events, mark) =
            (machine.events_after(number(since), limit), machine.remembered.mark().to_string());
        let last = position(events.last().map_or(number(since), |last| last.n));
        let telling = &self.watching.memory.telling;
        let arrived = |n, event| Arrived { seq: Some(position(n)), event };
        (events.iter().map(|kept| arrived(kept.n, telling::event(telling, kept, &mark))).collect(), last)
    }

    /// Hears of databases, looks into them, and hands over what is to be told; ends after `timeout`, when `is_closed`
    /// says so, or `emit`.
    ///
    /// # Errors
    /// As [`Memory::write`]; what was not stored by then is found again after the next opening.
    pub fn wait(
        &mut self,
        is_closed: &dyn Fn() -> bool,
        since: &Seq,
        timeout: Duration,
        emit: &mut dyn FnMut(Vec<Arrived>) -> bool,
    ) -> Result<Waited> {
        let until = sys::now() + timeout;
        let mut last_seq = since.clone();
        loop {
            self.hear();
            self.look()?;
            self.store()?;
            let (events, behind) = self.page(&last_seq, EVENTS_MAX);
            let is_full = events.len() == EVENTS_MAX;
            last_seq = behind;
            let goes_on = events.is_empty() || emit(events);
            if !goes_on || is_full || is_closed() || self.watching.memory.is_stopping() {
                return Ok(Waited { last_seq, closed: true });
            }
            let opened = self.opened_mut();
            if opened.waiting.order.is_empty() {
                let left = until.saturating_duration_since(sys::now());
                if left.is_zero() {
                    return Ok(Waited { last_seq, closed: false });
                }
                if let Ok(sighting) = opened.sightings.recv_timeout(left.min(END_CHECK)) {
                    self.on_sighting(sighting);
                }
            }
        }
    }

    /// Takes what was seen meanwhile: one who does not listen holds up the lookout.
    fn hear(&mut self) {
        while let Ok(sighting) = self.opened_mut().sightings.try_recv() {
            self.on_sighting(sighting);
        }
    }

    fn on_sighting(&mut self, sighting: Sighting) {
        let wanted = Arc::clone(&self.watching.wanted);
        let Opened { machine, waiting, .. } = self.opened_mut();
        match sighting {
            Sighting::Hinted(hints) => {
                for db in hints.iter().map(|hint| hint.db()).filter(|db| wanted(db)) {
                    machine.on_hinted(db);
                    waiting.add(db, None);
                }
            }
            Sighting::Infos(infos) => {
                for (db, info) in infos.iter().filter(|(db, _)| wanted(db)) {
                    match info {
                        Info::Seen(fingerprint) if machine.on_seen(db, *fingerprint) => {
                            waiting.add(db, Some(*fingerprint));
                        }
                        Info::Seen(_) => {}
                        Info::Gone => waiting.add(db, None),
                    }
                }
            }
            Sighting::Swept => {
                machine.on_swept().iter().for_each(|db| waiting.add(db, None));
            }
        }
    }

    /// Looks into some of the databases that wait for it.
    fn look(&mut self) -> Result<()> {
        for _ in 0..LOOKS_MAX {
            let Some((db, fingerprint)) = self.opened_mut().waiting.next() else { return Ok(()) };
            let opened = self.opened.as_mut().expect("asked a moment ago");
            let known = opened.machine.known(&db);
            let memory = &self.watching.memory;
            let pause = |duration: Duration| {
                let until = sys::now() + duration;
                while sys::now() < until && !memory.is_stopping() {
                    sys::sleep(END_CHECK.min(duration));
                }
            };
            let found =
                look_into(&self.watching.memory.server, opened.generation, &db, known.as_ref(), &pause);
            match found {
                Ok(Some(found)) => opened.machine.on_found(&db, found, fingerprint, sys::wall()),
                Ok(None) => opened.machine.on_gone(&db, sys::wall()),
                // Of one database alone: nothing is known of it until it may be read, and no other waits for it.
                Err(error) if matches!(error.kind(), Kind::Forbidden | Kind::BadRequest | Kind::Server) => {
                    log::debug!(
                        "webhook `{}`, database `{db}`: {error}",
                        self.watching.memory.telling.webhook
                    );
                }
                Err(error) => return Err(error.context(format!("database `{db}`"))),
            }
            self.watching.memory.check()?;
        }
        Ok(())
    }

    /// Names of all wanted databases.
    fn names(&self) -> Result<Vec<String>> {
        let (mut walk, mut names) = (Walk::default(), Vec::new());
        loop {
            self.watching.memory.check()?;
            let page = walk.next(&self.watching.memory.server)?;
            if page.is_empty() {
                return Ok(names);
            }
            names.extend(page.into_iter().filter(|db| (self.watching.wanted)(db)));
        }
    }

    /// Stores what changed; only then may it be told.
    fn store(&mut self) -> Result<()> {
        let opened = self.opened.as_mut().expect("it is opened before it is watched");
        self.watching.memory.write(&mut opened.machine.remembered, &mut opened.revs)
    }

    fn opened_mut(&mut self) -> &mut Opened {
        self.opened.as_mut().expect("it is opened before it is watched")
    }
}

impl Waiting {
    /// One look is enough for all that led to it so far.
    fn add(&mut self, db: &str, fingerprint: Option<u64>) {
        match self.fingerprints.get_mut(db) {
            Some(known) => *known = fingerprint.or(*known),
            None => {
                self.order.push_back(db.to_owned());
                self.fingerprints.insert(db.to_owned(), fingerprint);
            }
        }
    }

    fn next(&mut self) -> Option<(String, Option<u64>)> {
        let db = self.order.pop_front()?;
        let fingerprint = self.fingerprints.remove(&db).flatten();
        Some((db, fingerprint))
    }
}
