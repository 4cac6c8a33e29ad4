//! Reads one thing of a database when told to, and hands it on: a subscription's own thread, or one of the pool's.
//!
//! Guarantees (DESIGN §7) that mark, then checkpoint, are read before a feed is opened anew, and the mark before
//! every further request and again when it brings its first rows, on 1.x with the server's life, so that no row of
//! another database is taken for one of this; that rows are handed on after every read; that an
//! unfiltered feed silent for longer than its `timeout` is given up and a filtered one is not. What to read and
//! when is `pure::flow`'s.

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config;
use crate::couch::client::Generation;
use crate::couch::conflicts;
use crate::couch::feed::{Feed, FeedCloser, FeedEnd, FeedKind, FeedRequest};
use crate::couch::local_docs::{self, Life};
use crate::couch::remembered::Memory;
use crate::error::{Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::watcher::{Watcher, Watching};
use crate::pure::changes::Item;
use crate::pure::checkpoint::{Checkpoint, Mark, Seek};
use crate::pure::conflict;
use crate::pure::dispatch::FlowIndex;
use crate::pure::flow::{Opened, Read, ReadFault};
use crate::pure::format::Format;
use crate::pure::message::{Arrived, Telling, Watch};
use crate::pure::remembered::Waited;
use crate::pure::seq::Seq;
use crate::replication::{Looking, Monitor};
use crate::sys::{self, Thread};

/// A feed without filter that is silent for this much longer than its `timeout` is dead.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);
/// A filtered page may scan for long before its first byte; doubled after each miss.
const FILTERED_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// A row may be this much longer than the longest document that is kept, in bytes.
const ROW_MARGIN: usize = 64 * 1024;
/// How often a reader that waits for its turn at a filtered page looks whether it is to end.
const TURN_CHECK: Duration = Duration::from_millis(200);

/// What a reader gives.
#[derive(Debug)]
pub enum Fed {
    /// Answer to [`Read::Open`].
    Opened {
        /// Which.
        flow: FlowIndex,
        /// For the flow.
        opened: Opened,
        /// The database's mark, to be remembered.
        mark: Mark,
        /// 1.x: the server's life, to be compared before a checkpoint is stored.
        life: Option<Life>,
    },
    /// Rows of what is being read.
    Rows(FlowIndex, Vec<Arrived>),
    /// The end of it; `closed`: because of [`Reader::close`].
    End {
        /// Which.
        flow: FlowIndex,
        /// What CouchDB gave.
        last_seq: Option<Seq>,
        /// What it said to be still ahead.
        pending: Option<u64>,
        /// Whether we ended it.
        closed: bool,
    },
    /// The end of it, or of the opening, by a fault.
    Failed(FlowIndex, ReadFault, Option<Error>),
    /// One of these, of a subscription without a thread of its own: it is read with this again.
    Back(FlowIndex, Box<Reading>, Box<Fed>),
}

/// A subscription's own thread.
pub struct Reader {
    commands: Sender<(Read, Option<Mark>)>,
    closer: FeedCloser,
    stopping: Arc<AtomicBool>,
    thread: Option<Thread>,
}

impl Reader {
    /// Starts the thread; it reads nothing yet.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(mut reading: Reading) -> Result<Reader> {
        let mut feed = Feed::new(&reading.shared.server);
        let closer = feed.closer();
        let (commands, orders) = bounded::<(Read, Option<Mark>)>(1);
        let stopping = Arc::clone(&reading.stopping);
        let name = format!("feed:{}/{}", reading.telling.webhook, reading.telling.db);
        let thread = sys::spawn(&name, move || {
            while let Ok((read, known_mark)) = orders.recv() {
                if reading.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let fed = reading.read(&mut feed, read, known_mark.as_ref());
                if reading.to.send(fed).is_err() {
                    return;
                }
            }
        })?;
        Ok(Reader { commands, closer, stopping, thread: Some(thread) })
    }

    /// Orders one reading; never waits. `known_mark` is what is known of the database.
    pub fn read(&self, read: Read, known_mark: Option<Mark>) {
        self.commands.try_send((read, known_mark)).expect("a flow orders one reading at a time");
    }

    /// Ends what is being read.
    pub fn close(&self) {
        self.closer.close();
    }

    /// Ends the thread as soon as it can be woken; it is joined with the value given.
    pub fn stop(mut self) -> Thread {
        self.thread.take().expect("it is taken only here")
    }
}

impl Drop for Reader {
    /// Also when the webhook's thread panics: a feed that nobody listens to must not stay open.
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.closer.close();
    }
}

/// What was found when the feed was opened, to be compared before further requests.
struct Known {
    mark: Mark,
    life: Option<Life>,
}

/// One database of a webhook, and what was found when it was opened. Whoever has it reads.
pub struct Reading {
    shared: Shared,
    filter: Option<config::Filter>,
    telling: Arc<Telling>,
    /// Reads in the place of a feed, with `watch = replications`.
    monitor: Option<Monitor>,
    /// The same, with `watch = databases`.
    watcher: Option<Watcher>,
    /// Where a command has set the webhook.
    seek: Option<Seek>,
    flow: FlowIndex,
    to: Sender<Fed>,
    opened: Option<Known>,
    /// One of thousands: 1.x closes its file between two looks.
    is_of_many: bool,
    generation: Generation,
    misses: u32,
    /// The position that CouchDB last said not to know.
    unknown_since: Option<Seq>,
    /// The life of the database whose conflicts the flow was told.
    conflicts_of: Option<Mark>,
    stopping: Arc<AtomicBool>,
}

impl fmt::Debug for Reading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reading({}/{})", self.telling.webhook, self.telling.db)
    }
}

impl Reading {
    /// Nothing is read yet. `seek` is what the webhook's record says of the database; rows go to `to`.
    pub fn new(
        shared: &Shared,
        webhook: &config::Webhook,
        telling: &Arc<Telling>,
        seek: Option<Seek>,
        flow: FlowIndex,
        to: &Sender<Fed>,
    ) -> Reading {
        let stopping = Arc::new(AtomicBool::new(false));
        let memory = || Memory {
            server: shared.server.clone(),
            key: shared.key.clone(),
            telling: Telling::clone(telling),
            seek: seek.clone(),
            hold: Arc::clone(&shared.hold),
            stopping: Arc::clone(&stopping),
        };
        let monitor = (webhook.watch == Watch::Replications)
            .then(|| Monitor::new(Looking { memory: memory(), polling: webhook.polling }, &shared.hookd));
        let watcher = webhook.selection.clone().map(|selection| {
            let state_db = shared.state_db.clone();
            Watcher::new(Watching {
                memory: memory(),
                wanted: Arc::new(move |db| selection.has(db, &state_db)),
                lookout: Arc::clone(&shared.lookout),
            })
        });
        Reading {
            shared: shared.clone(),
            filter: webhook.filter.clone(),
            telling: Arc::clone(telling),
            monitor,
            watcher,
            seek,
            flow,
            to: to.clone(),
            opened: None,
            is_of_many: false,
            generation: Generation::Three,
            misses: 0,
            unknown_since: None,
            conflicts_of: None,
            stopping,
        }
    }

    /// Of a database that nobody follows all the time.
    #[must_use]
    pub fn of_many(self) -> Reading {
        Reading { is_of_many: true, ..self }
    }

    /// Ends waits of the reading under way, from another thread, and keeps later ones from beginning.
    pub fn stopping(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stopping)
    }

    /// How its database is told of.
    pub fn telling(&self) -> Arc<Telling> {
        Arc::clone(&self.telling)
    }

    /// The request that last set its place.
    pub fn seek(&self) -> Option<String> {
        self.seek.as_ref().map(|seek| seek.request.clone())
    }

    /// Where what is read goes.
    pub fn to(&self) -> Sender<Fed> {
        self.to.clone()
    }

    /// Whose rows these are.
    pub fn flow(&self) -> FlowIndex {
        self.flow
    }

    /// Reads one thing; what comes on the way is sent, the last word is given.
    pub fn read(&mut self, feed: &mut Feed, read: Read, known_mark: Option<&Mark>) -> Fed {
        let reading = AssertUnwindSafe(|| match read {
            Read::Open => self.open(known_mark),
            Read::Page { since, limit } => {
                let limit = u32::try_from(limit).unwrap_or(u32::MAX);
                self.read_feed(feed, since, FeedKind::Page { limit })
            }
            Read::Wait { since } => {
                let timeout = self.shared.hookd.feed_timeout;
                self.read_feed(feed, since, FeedKind::Continuous { timeout })
            }
        });
        // The panic was logged by its hook; a flow that gets no answer would read nothing for ever.
        let fed = catch_unwind(reading).unwrap_or_else(|_| Err(Error::new(Kind::Io, "we panicked")));
        fed.unwrap_or_else(|error| Fed::Failed(self.flow, fault_of(&error), Some(error)))
    }

    fn open(&mut self, known_mark: Option<&Mark>) -> Result<Fed> {
        let Shared { server, key, .. } = &self.shared;
        let (db, webhook) = (&self.telling.db, &self.telling.webhook);
        // The server may be another one than at our start: upgraded, or moved to.
        let welcome = server.welcome()?;
        self.generation = welcome.generation;
        if self.generation == Generation::One && matches!(self.filter, Some(config::Filter::Selector(_))) {
            let found = "`selector` needs CouchDB 2.0 or later, and this server is older; use a filter function \
                (`filter = ddoc/name`) instead";
            return Err(Error::new(Kind::BadRequest, found));
        }
        let stopping = Arc::clone(&self.stopping);
        let pause = move |duration: Duration| {
            let until = sys::now() + duration;
            while sys::now() < until && !stopping.load(Ordering::SeqCst) {
                sys::sleep(TURN_CHECK.min(duration));
            }
        };
        let seek = self.seek.as_ref();
        // `state_db` is followed all the time: 1.x does not close it.
        let server_life = match self.is_of_many {
            true => local_docs::life_of_server(server, self.generation, &self.shared.state_db)?,
            false => None,
        };
        let opened = local_docs::open(server, self.generation, db, webhook, key, known_mark, seek, &pause)?;
        let place = format!("webhook `{webhook}`, database `{db}`");
        if let Some(why) = &opened.not_believed {
            log::error!("{place}: the stored checkpoint is not believed ({why}); reading from the beginning");
        }
        if opened.rolled_back {
            log::warn!(
                "{place}: CouchDB lost changes that were read (it was killed, or restored from a backup); reading from \
                 the beginning"
            );
        }
        let life = server_life.or(opened.life);
        self.opened = Some(Known { mark: opened.mark, life: life.clone() });
        let known = |checkpoint: &Checkpoint| self.unknown_since.as_ref() != Some(&checkpoint.through_seq);
        if opened.checkpoint.as_ref().is_some_and(|checkpoint| !known(checkpoint)) {
            log::error!("{place}: CouchDB does not know the stored position; reading from the beginning");
        }
        let checkpoint = opened.checkpoint.filter(known).map(|checkpoint| {
            let delivered = checkpoint.delivered.iter().map(|id| id.0).collect();
            (checkpoint.through_seq, delivered)
        });
        if let Some(monitor) = &mut self.monitor {
            monitor.open(&welcome, opened.mark, checkpoint.as_ref().map(|(through_seq, _)| through_seq))?;
        }
        if let Some(watcher) = &mut self.watcher {
            watcher.open(&welcome, opened.mark, checkpoint.as_ref().map(|(through_seq, _)| through_seq))?;
        }
        // Once: from then on the flow knows best, for only it changes what is stored.
        let conflicted = match self.telling.remembers() && self.conflicts_of != Some(opened.mark) {
            true => {
                let place = conflict::place(webhook, db, &opened.mark.to_string());
                Some(conflicts::list(server, &self.shared.state_db, &place)?)
            }
            false => None,
        };
        if conflicted.is_some() {
            self.conflicts_of = Some(opened.mark);
        }
        let found = Opened {
            mark: opened.mark.to_string(),
            recreated: opened.recreated && checkpoint.is_none(),
            checkpoint,
            rev: opened.checkpoint_rev,
            doc_count: opened.doc_count,
            conflicted,
        };
        Ok(Fed::Opened { flow: self.flow, opened: found, mark: opened.mark, life })
    }

    /// One request for rows, after a look whether the database is still the one that was opened.
    fn read_feed(&mut self, feed: &mut Feed, since: Seq, kind: FeedKind) -> Result<Fed> {
        let filtered = self.filter.is_some();
        let is_page = matches!(kind, FeedKind::Page { .. });
        // Before the look: another webhook's page may take half an hour, and the database be another one by then.
        let pages = Arc::clone(&self.shared.filtered_pages);
        let _turn = match filtered && is_page {
            true => match pages.turn(&self.telling.db, &self.stopping) {
                Some(turn) => Some(turn),
                None => return Ok(self.end(None, None, true)),
            },
            false => None,
        };
        let known = self.opened.as_ref().expect("a feed is opened before it is read");
        let (db, life) = (&self.telling.db, known.life.as_ref());
        if !local_docs::is_same(&self.shared.server, db, &known.mark, life)? {
            return Ok(Fed::Failed(self.flow, ReadFault::Changed, None));
        }
        if self.monitor.is_some() {
            return self.monitor(feed, &since, kind);
        }
        if self.watcher.is_some() {
            return self.watch(feed, &since, kind);
        }
        let mark = known.mark.to_string();
        let request = FeedRequest {
            db: db.clone(),
            since,
            kind,
            filter: self.filter.clone(),
            include_docs: self.telling.include_docs,
            conflicts: self.telling.conflicts,
            doc_bytes_max: self.telling.payload_bytes_max + ROW_MARGIN,
            keeps_lines: self.telling.format == Format::Raw,
            silence: (!filtered).then_some(self.shared.hookd.feed_timeout + SILENCE_MARGIN),
            deadline: (filtered && is_page).then(|| FILTERED_DEADLINE * 2_u32.pow(self.misses.min(6))),
        };
        let (flow, to, telling) = (self.flow, &self.to, &self.telling);
        let mut end = (None, None);
        let (server, mark_now, life_now) = (&self.shared.server, known.mark, known.life.clone());
        let mut is_same: Option<Result<bool>> = None;
        let result = feed.read(&request, &mut |items: &mut Vec<Item>| {
            // The database may have been made again between the look and the request, which then gives rows of another
            // one, from its beginning. By now the request is bound to what it found.
            let is_ours =
                is_same.get_or_insert_with(|| local_docs::is_same(server, db, &mark_now, life_now.as_ref()));
            if !matches!(is_ours, Ok(true)) {
                return ControlFlow::Break(());
            }
            let read_at = sys::wall();
            let mut rows = Vec::with_capacity(items.len());
            for item in items.drain(..) {
                match item {
                    Item::Row(row) => rows.push(telling.arrived(row, &mark, read_at)),
                    Item::End { last_seq, pending } => end = (last_seq, pending),
                    // The feed makes an error of it.
                    Item::Fault { .. } => {}
                }
            }
            match rows.is_empty() || to.send(Fed::Rows(flow, rows)).is_ok() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        if is_same.transpose()? == Some(false) {
            return Ok(Fed::Failed(flow, ReadFault::Changed, None));
        }
        if let Err(error) = &result
            && error.kind() == Kind::Timeout
            && filtered
        {
            self.misses += 1;
        } else {
            self.misses = 0;
        }
        if let Err(error) = &result {
            self.unknown_since = (error.kind() == Kind::BadSince).then_some(request.since);
        }
        let closed = result? != FeedEnd::Complete;
        Ok(self.end(end.0, end.1, closed))
    }

    /// What is told of replications behind a position, in the place of changes.
    fn monitor(&mut self, feed: &mut Feed, since: &Seq, kind: FeedKind) -> Result<Fed> {
        let (flow, to) = (self.flow, &self.to);
        let mut emit = |rows: Vec<Arrived>| to.send(Fed::Rows(flow, rows)).is_ok();
        let monitor = self.monitor.as_mut().expect("asked by the caller");
        match kind {
            FeedKind::Page { limit } => {
                let (rows, last_seq) = monitor.page(since, limit as usize);
                let closed = !rows.is_empty() && !emit(rows);
                Ok(self.end(Some(last_seq), None, closed))
            }
            FeedKind::Continuous { timeout } => {
                let Waited { last_seq, closed } = monitor.wait(feed, since, timeout, &mut emit)?;
                Ok(self.end(Some(last_seq), None, closed))
            }
        }
    }

    /// What is told of databases behind a position, in the place of changes.
    fn watch(&mut self, feed: &Feed, since: &Seq, kind: FeedKind) -> Result<Fed> {
        let (flow, to) = (self.flow, &self.to);
        let mut emit = |rows: Vec<Arrived>| to.send(Fed::Rows(flow, rows)).is_ok();
        let watcher = self.watcher.as_mut().expect("asked by the caller");
        let (last_seq, closed) = match kind {
            FeedKind::Page { limit } => {
                let (rows, last_seq) = watcher.page(since, limit as usize);
                (last_seq, !rows.is_empty() && !emit(rows))
            }
            FeedKind::Continuous { timeout } => {
                let Waited { last_seq, closed } =
                    watcher.wait(&|| feed.take_closed(), since, timeout, &mut emit)?;
                (last_seq, closed)
            }
        };
        Ok(self.end(Some(last_seq), None, closed))
    }

    fn end(&self, last_seq: Option<Seq>, pending: Option<u64>, closed: bool) -> Fed {
        Fed::End { flow: self.flow, last_seq, pending, closed }
    }
}

/// What a failed reading means to the flow.
fn fault_of(error: &Error) -> ReadFault {
    match error.kind() {
        Kind::BadSince => ReadFault::BadPosition,
        Kind::BadRequest | Kind::Server | Kind::Malformed => ReadFault::Refused,
        _ => ReadFault::Lost,
    }
}

/// One filtered page per database at a time.
#[derive(Debug, Default)]
pub struct FilteredPages {
    turns: Mutex<HashMap<String, Turns>>,
}

/// Holds the single token of a database while nobody reads.
type Turns = (Sender<()>, Receiver<()>);

/// Somebody's turn; given back when dropped.
struct Turn {
    back: Sender<()>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        // Nobody listens any more when the process ends.
        let _ = self.back.try_send(());
    }
}

impl FilteredPages {
    /// Waits for the turn; `None` when told to stop.
    fn turn(&self, db: &str, stopping: &AtomicBool) -> Option<Turn> {
        let (back, token) = {
            let mut turns = self.turns.lock().expect("no thread panics with this lock");
            turns.entry(db.to_owned()).or_insert_with(new_turns).clone()
        };
        loop {
            if token.recv_timeout(TURN_CHECK).is_ok() {
                return Some(Turn { back });
            }
            if stopping.load(Ordering::SeqCst) {
                return None;
            }
        }
    }
}

fn new_turns() -> Turns {
    let (back, token) = bounded(1);
    back.try_send(()).expect("it has room for one");
    (back, token)
}
