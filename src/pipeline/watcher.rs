//! Watches databases themselves for one webhook, and gives what is to be told of them.
//!
//! Seen from the pipeline it is read as a feed is: it is opened, gives pages of events, and is waited on; the positions
//! are numbers of ours, `"t17"` (`"now"` before the first look). Guarantees (DESIGN §7) that an event, and what it made
//! known, are stored together before the event is handed over; that it is handed over again after every start until the
//! webhook's checkpoint has passed it; and that a look that fails is found to be needed again. What is told is
//! `pure::database_events`'; when databases are looked at is the lookout's.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use http::Method;
use serde::Deserialize;

use crate::couch::client::{Generation, Server, Welcome, Written, db_path};
use crate::couch::databases::{Info, Walk};
use crate::couch::leases::Hold;
use crate::couch::local_docs;
use crate::couch::look_into::look_into;
use crate::couch::refusal::from_json;
use crate::couch::state_db::FULL_COMMIT;
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::lookout::{Lookout, Sighting};
use crate::pure::checkpoint::{Mark, Seek, StateKey};
use crate::pure::database_events::known::{BUCKETS, Bucket};
use crate::pure::database_events::{DatabaseEvents, telling};
use crate::pure::message::{Arrived, Telling};
use crate::pure::seq::Seq;
use crate::sys;

/// The position of a webhook that has not looked yet, and asked for what happens from now on.
const NOW: &str = "\"now\"";
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
    /// The watched CouchDB.
    pub server: Server,
    /// Signs what is remembered.
    pub key: StateKey,
    /// What is told; its database is the one that what is remembered lies in.
    pub telling: Telling,
    /// Of which databases.
    pub wanted: Wanted,
    /// Who sees them.
    pub lookout: Arc<Lookout>,
    /// Where a command has set the webhook.
    pub seek: Option<Seek>,
    /// Whether the webhook is ours to tell.
    pub hold: Arc<Hold>,
    /// Set when the thread is to end.
    pub stopping: Arc<AtomicBool>,
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
    revs: [Option<String>; BUCKETS],
    sightings: Receiver<Sighting>,
    waiting: Waiting,
}

/// Databases to be looked into, each once, and the fingerprint that led there last.
#[derive(Default)]
struct Waiting {
    order: VecDeque<String>,
    fingerprints: HashMap<String, Option<u64>>,
}

/// What is remembered, and the `_rev`s that it was read with.
type Stored = (Vec<Option<Bucket>>, [Option<String>; BUCKETS]);

/// How a wait ended.
#[derive(Debug, PartialEq)]
pub struct Watched {
    /// What was handed over up to here.
    pub last_seq: Seq,
    /// Whether we were told to end it, or there is more than is handed over at once.
    pub closed: bool,
}

/// The position to begin at, where a webhook is to tell what happens from now on.
pub fn position_now() -> Seq {
    Seq::from_json(NOW).expect("a JSON text")
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
    /// As [`Server::request`].
    pub fn open(&mut self, welcome: &Welcome, mark: Mark, through: Option<&Seq>) -> Result<()> {
        self.opened = None;
        let is_quiet = through.is_some_and(|through| through.as_json() == NOW);
        let (stored, revs) = self.stored(mark)?;
        let webhook = &self.watching.telling.webhook;
        let mut machine = DatabaseEvents::new(webhook, mark, stored, through.map_or(0, number), is_quiet);
        // Before what is there is listed: what happens meanwhile is hinted at.
        let (to, sightings) = bounded(SIGHTINGS_MAX);
        let wanted = Arc::clone(&self.watching.wanted);
        self.watching.lookout.subscribe(Box::new(move |db| wanted(db)), to)?;
        if machine.is_first_look() {
            machine.on_there(self.names()?);
        }
        let generation = welcome.generation;
        self.opened = Some(Opened { machine, generation, revs, sightings, waiting: Waiting::default() });
        self.store()
    }

    /// Events behind a position that are stored, at most `limit`, and the position behind them.
    pub fn page(&mut self, since: &Seq, limit: usize) -> (Vec<Arrived>, Seq) {
        let machine = &mut self.opened_mut().machine;
        let (events, mark) = (machine.events_after(number(since), limit), machine.mark().to_string());
        let last = events.last().map_or_else(|| seq(number(since)), |last| seq(last.n));
        let telling = &self.watching.telling;
        let arrived = |n, event| Arrived { seq: Some(seq(n)), event };
        (events.iter().map(|kept| arrived(kept.n, telling::event(telling, kept, &mark))).collect(), last)
    }

    /// Hears of databases, looks into them, and hands over what is to be told; ends after `timeout`, when `is_closed`
    /// says so, or `emit`.
    ///
    /// # Errors
    /// As [`Server::request`]; what was not stored by then is found again after the next opening.
    pub fn wait(
        &mut self,
        is_closed: &dyn Fn() -> bool,
        since: &Seq,
        timeout: Duration,
        emit: &mut dyn FnMut(Vec<Arrived>) -> bool,
    ) -> Result<Watched> {
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
            if !goes_on || is_full || is_closed() || self.is_stopping() {
                return Ok(Watched { last_seq, closed: true });
            }
            let opened = self.opened_mut();
            if opened.waiting.order.is_empty() {
                let left = until.saturating_duration_since(sys::now());
                if left.is_zero() {
                    return Ok(Watched { last_seq, closed: false });
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
            let stopping = &self.watching.stopping;
            let pause = |duration: Duration| {
                let until = sys::now() + duration;
                while sys::now() < until && !stopping.load(Ordering::SeqCst) {
                    sys::sleep(END_CHECK.min(duration));
                }
            };
            let found = look_into(&self.watching.server, opened.generation, &db, known.as_ref(), &pause);
            match found {
                Ok(Some(found)) => opened.machine.on_found(&db, found, fingerprint, sys::wall()),
                Ok(None) => opened.machine.on_gone(&db, sys::wall()),
                // Of one database alone: nothing is known of it until it may be read, and no other waits for it.
                Err(error) if matches!(error.kind(), Kind::Forbidden | Kind::BadRequest | Kind::Server) => {
                    log::debug!("webhook `{}`, database `{db}`: {error}", self.watching.telling.webhook);
                }
                Err(error) => return Err(error.context(format!("database `{db}`"))),
            }
            self.is_stopping_error()?;
        }
        Ok(())
    }

    /// Names of all wanted databases.
    fn names(&self) -> Result<Vec<String>> {
        let (mut walk, mut names) = (Walk::default(), Vec::new());
        loop {
            self.is_stopping_error()?;
            let page = walk.next(&self.watching.server)?;
            if page.is_empty() {
                return Ok(names);
            }
            names.extend(page.into_iter().filter(|db| (self.watching.wanted)(db)));
        }
    }

    /// Everything that is remembered in the database that bears `mark`, and the `_rev`s that it was read with.
    fn stored(&self, mark: Mark) -> Result<Stored> {
        #[derive(Deserialize)]
        struct Revision {
            #[serde(rename = "_rev")]
            rev: Option<String>,
        }
        let (db, webhook) = (&self.watching.telling.db, &self.watching.telling.webhook);
        let mut revs = [const { None }; BUCKETS];
        let mut stored = Vec::with_capacity(BUCKETS);
        for (index, rev) in revs.iter_mut().enumerate() {
            self.is_stopping_error()?;
            let id = Bucket::id(webhook, index);
            let path = db_path(db, &["_local", &id]);
            let reply = match self.watching.server.request(&Method::GET, &path, None, &[]) {
                Err(error) if error.kind() == Kind::NotFound => {
                    stored.push(None);
                    continue;
                }
                reply => reply?,
            };
            *rev = from_json::<Revision>(&reply.body).context(|| format!("GET {path}"))?.rev;
            let found = Bucket::from_json(&reply.body, &(db, &id), &self.watching.key).map_err(|why| {
                log::error!(
                    "webhook `{webhook}`: what `_local/{id}` remembers of databases is not believed ({why}); they are told \
                     anew"
                );
            });
            stored.push(found.ok().filter(|bucket| bucket.mark == mark));
        }
        Ok((stored, revs))
    }

    /// Stores what changed; only then may it be told.
    fn store(&mut self) -> Result<()> {
        let Watching { server, key, telling, seek, hold, stopping, .. } = &self.watching;
        let (db, webhook) = (&telling.db, &telling.webhook);
        let opened = self.opened.as_mut().expect("it is opened before it is watched");
        let mark = opened.machine.mark();
        if opened.machine.dirty().is_empty() {
            return Ok(());
        }
        if !local_docs::is_same(server, db, &mark, None)? {
            // A stale `_rev` is taken by a database that was created again (CONTRACT §6).
            return Err(Error::new(Kind::Conflict, "the database was created again meanwhile"));
        }
        // What is delivered need not be written again.
        let checkpoint = local_docs::position(server, db, webhook, key, seek.as_ref())?;
        if let Some(checkpoint) = checkpoint.filter(|checkpoint| checkpoint.mark == mark) {
            opened.machine.on_through(number(&checkpoint.through_seq));
        }
        let documents = opened.machine.dirty().into_iter().map(|(index, bucket)| {
            let id = Bucket::id(webhook, index);
            let body = bucket.to_json(&(db, &id), key, opened.revs[index].as_deref());
            (index, db_path(db, &["_local", &id]), body)
        });
        for (index, path, body) in documents.collect::<Vec<_>>() {
            // Whoever tells after us may have begun: 2.x and 3.x take what we write over what it wrote.
            hold.check()?;
            if stopping.load(Ordering::SeqCst) {
                return Err(Error::new(Kind::Stopped, "stopped"));
            }
            let reply = server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT])?;
            let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
            opened.revs[index] = Some(written.rev);
            opened.machine.on_stored(index);
        }
        Ok(())
    }

    fn opened_mut(&mut self) -> &mut Opened {
        self.opened.as_mut().expect("it is opened before it is watched")
    }

    fn is_stopping(&self) -> bool {
        self.watching.stopping.load(Ordering::SeqCst)
    }

    fn is_stopping_error(&self) -> Result<()> {
        match self.is_stopping() {
            true => Err(Error::new(Kind::Stopped, "stopped")),
            false => self.watching.hold.check(),
        }
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

/// The number in a position of ours; 0 for everything else.
fn number(position: &Seq) -> u64 {
    let text = position.as_since();
    text.strip_prefix('t').and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn seq(number: u64) -> Seq {
    Seq::from_json(&format!("\"t{number}\"")).expect("a JSON text")
}
