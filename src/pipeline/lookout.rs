//! The lookout: one for each CouchDB, looks at all databases for whoever finds databases by pattern.
//!
//! ```text
//! db_updates: _db_updates --> Hints <-- update_notification
//!                               |
//! hints:                        `---------Sighting--> subscribers
//! lookout:    _all_dbs, _dbs_info --------Sighting-->
//! ```
//!
//! Guarantees that hints are passed on at once and that, whatever hints do, every wanted database is looked at again and
//! again, at the pace of `pure::sweep`. What it sees may be old by the time it is heard, and says nothing for certain:
//! whoever subscribes compares, and reads. It runs only while there are subscribers. A subscriber that does not listen
//! holds up the others for `PATIENCE` at most, and then misses something, which brings another walk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, bounded, select};

use crate::config::{self, keys};
use crate::couch::client::Server;
use crate::couch::databases::{Info, Looker, Walk};
use crate::couch::db_updates::{DbUpdates, Heard};
use crate::couch::feed::FeedCloser;
use crate::error::{Error, Kind, Result};
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::hints::{Hints, Taken};
use crate::pure::hint::Hint;
use crate::pure::sweep::{Settings, Sweep};
use crate::sys::{self, Thread};

/// A subscriber whose channel stays full for so long misses what there is to be said.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries to follow `_db_updates`, after failures in a row.
const FOLLOW_AGAIN: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30)];
/// The same where only a person can do something about it.
const FOLLOW_RARELY: Duration = Duration::from_secs(300);
/// What ended so soon has failed, whatever it says.
const SHORT: Duration = Duration::from_secs(30);
/// Without anything to do it is looked so often whether there is.
const IDLE: Duration = Duration::from_secs(60);

/// What is seen.
#[derive(Debug, Clone)]
pub enum Sighting {
    /// Something is said to have happened to these databases, one of which the subscriber wants at least.
    Hinted(Arc<Vec<Hint>>),
    /// How these databases are. Also of some that only others want.
    Infos(Arc<Vec<(String, Info)>>),
    /// Every wanted database that is there was part of `Infos` since the last `Swept`, or since the subscription: one
    /// that was not may be gone, which `GET /DB` says for certain. Not sent after a walk in which something was missed.
    Swept,
}

/// Which databases a subscriber wants, by name.
pub type Wanted = Box<dyn Fn(&str) -> bool + Send>;

/// One for each CouchDB; shared.
pub struct Lookout {
    inner: Arc<Inner>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    running: Vec<Thread>,
    closer: Option<FeedCloser>,
    is_stopped: bool,
}

struct Inner {
    server: Server,
    hints: Arc<Hints>,
    outage: Arc<Outage>,
    settings: Settings,
    subscribers: Mutex<Vec<Subscriber>>,
    n_subscriptions: AtomicU64,
    news: Mutex<News>,
    /// Full: the lookout is to see what is new.
    wake: Sender<()>,
    woken: Receiver<()>,
    stopping: AtomicBool,
    /// Cut off when we stop.
    stop: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
}

/// What others tell the lookout's thread.
#[derive(Default)]
struct News {
    joined: bool,
    hinted: bool,
    hints_gone: bool,
    hints_lost: bool,
    missed: bool,
}

struct Subscriber {
    id: u64,
    wanted: Wanted,
    to: Sender<Sighting>,
    /// Since the present walk began, which it may have joined late.
    has_missed: bool,
}

impl Lookout {
    /// Prepares it; nothing runs before somebody subscribes. Whoever else hears of databases notes it in `hints`.
    pub fn new(server: &Server, hookd: &config::Hookd, hints: Arc<Hints>, outage: Arc<Outage>) -> Lookout {
        let (wake, woken) = bounded(1);
        let (stop, stopped) = bounded(0);
        let inner = Inner {
            server: server.clone(),
            hints,
            outage,
            settings: Settings { interval: hookd.sweep_interval, rate: hookd.sweep_rate },
            subscribers: Mutex::default(),
            n_subscriptions: AtomicU64::new(0),
            news: Mutex::default(),
            wake,
            woken,
            stopping: AtomicBool::new(false),
            stop: Mutex::new(Some(stop)),
            stopped,
        };
        Lookout { inner: Arc::new(inner), threads: Mutex::default() }
    }

    /// Tells `to` of all databases that are `wanted`, beginning with what is left of a walk that is under way, then all of
    /// them. The subscription ends when
    /// the receiver is dropped. `to` should hold some tens of sightings.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn subscribe(&self, wanted: Wanted, to: Sender<Sighting>) -> Result<()> {
        let mut threads = lock(&self.threads);
        if threads.is_stopped {
            return Ok(());
        }
        if threads.running.is_empty() {
            let updates = DbUpdates::new(&self.inner.server);
            let closer = updates.closer();
            let [lookout, hints, following] = [(); 3].map(|()| Arc::clone(&self.inner));
            threads.running.push(sys::spawn("lookout", move || State::new(lookout).run())?);
            threads.running.push(sys::spawn("hints", move || hints.pass_on_all())?);
            threads.running.push(sys::spawn("db_updates", move || follow(&following, updates))?);
            threads.closer = Some(closer);
        }
        let id = self.inner.n_subscriptions.fetch_add(1, Ordering::Relaxed);
        lock(&self.inner.subscribers).push(Subscriber { id, wanted, to, has_missed: true });
        self.inner.tell(|news| news.joined = true);
        Ok(())
    }

    /// A walk led a subscriber to a change that no hint had named: hints are not relied on for a while.
    pub fn on_missed(&self) {
        self.inner.tell(|news| news.missed = true);
    }

    /// Ends the threads as soon as they can be woken; they are joined with the values given. Requests under way end when
    /// the server is stopped.
    pub fn stop(&self) -> Vec<Thread> {
        self.inner.stopping.store(true, Ordering::SeqCst);
        lock(&self.inner.stop).take();
        let mut threads = lock(&self.threads);
        threads.is_stopped = true;
        if let Some(closer) = threads.closer.take() {
            closer.close();
        }
        self.inner.tell(|_| {});
        std::mem::take(&mut threads.running)
    }
}

impl Inner {
    fn tell(&self, news: impl FnOnce(&mut News)) {
        news(&mut lock(&self.news));
        // Full: it is told already.
        let _ = self.wake.try_send(());
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Whether anybody wants it.
    fn is_wanted(&self, db: &str) -> bool {
        lock(&self.subscribers).iter().any(|subscriber| (subscriber.wanted)(db))
    }

    /// Sends each subscriber what `of` gives for it; those that listen no more are let go. Whether somebody missed it.
    fn send(&self, of: impl Fn(&Subscriber) -> Option<Sighting>) -> bool {
        // Not sent with the lock held: one who does not listen holds up nobody who subscribes or hints.
        let due: Vec<(u64, Sender<Sighting>, Sighting)> = lock(&self.subscribers)
            .iter()
            .filter_map(|subscriber| Some((subscriber.id, subscriber.to.clone(), of(subscriber)?)))
            .collect();
        let mut somebody_missed = false;
        for (id, to, sighting) in due {
            let Err(error) = self.send_one(&to, sighting) else { continue };
            let mut subscribers = lock(&self.subscribers);
            match error {
                SendTimeoutError::Disconnected(_) => subscribers.retain(|subscriber| subscriber.id != id),
                SendTimeoutError::Timeout(_) => {
                    somebody_missed = true;
                    let missed = subscribers.iter_mut().filter(|subscriber| subscriber.id == id);
                    missed.for_each(|subscriber| subscriber.has_missed = true);
                }
            }
        }
        somebody_missed
    }

    fn send_one(
        &self,
        to: &Sender<Sighting>,
        sighting: Sighting,
    ) -> std::result::Result<(), SendTimeoutError<Sighting>> {
        let until = sys::now() + PATIENCE;
        let mut sighting = sighting;
        loop {
            match to.send_timeout(sighting, PATIENCE / 20) {
                Err(SendTimeoutError::Timeout(back)) if sys::now() < until && !self.is_stopping() => {
                    sighting = back
                }
                sent => return sent,
            }
        }
    }
}

impl Inner {
    /// The thread `hints`: it waits for no answer of CouchDB's, so that a hint waits for none either.
    fn pass_on_all(&self) {
        let (hinted, stopped) = (self.hints.woken(), self.stopped.clone());
        while !self.is_stopping() {
            select! {
                recv(hinted) -> _ => self.pass_on(),
                recv(stopped) -> _ => return,
            }
        }
    }

    /// Passes hints on, to those who want one of their databases.
    fn pass_on(&self) {
        let Taken { hints, overflowed } = self.hints.take();
        let hints = Arc::new(hints);
        let missed = self.send(|subscriber| {
            let is_wanted = hints.iter().any(|hint| (subscriber.wanted)(hint.db()));
            is_wanted.then(|| Sighting::Hinted(Arc::clone(&hints)))
        });
        self.tell(|news| {
            news.hinted |= !hints.is_empty();
            news.hints_lost |= overflowed || missed;
        });
    }
}

/// The lookout's thread.
struct State {
    inner: Arc<Inner>,
    sweep: Sweep,
    walk: Walk,
    looker: Looker,
    /// Names that are wanted and not asked about yet.
    waiting: Vec<String>,
    complaint: Complaint,
    /// What was said of how long a change may take: whether hints flowed.
    said: Option<bool>,
}

impl State {
    fn new(inner: Arc<Inner>) -> State {
        State {
            sweep: Sweep::new(inner.settings, sys::now()),
            walk: Walk::default(),
            looker: Looker::new(&inner.server),
            waiting: Vec::new(),
            complaint: Complaint::default(),
            said: None,
            inner,
        }
    }

    fn run(mut self) {
        let (woken, stopped) = (self.inner.woken.clone(), self.inner.stopped.clone());
        while !self.inner.is_stopping() {
            let now = sys::now();
            let left = match lock(&self.inner.subscribers).is_empty() {
                true => IDLE,
                false => self.sweep.due(now).saturating_duration_since(now).min(IDLE),
            };
            // First: a flood of hints must not keep us from looking.
            if left.is_zero() {
                self.step();
            }
            select! {
                recv(woken) -> _ => self.hear(),
                recv(stopped) -> _ => return,
                default(left) => self.say(sys::now()),
            }
        }
    }

    /// What others told us.
    fn hear(&mut self) {
        let News { joined, hinted, hints_gone, hints_lost, missed } =
            std::mem::take(&mut *lock(&self.inner.news));
        if hinted {
            self.sweep.on_hint(sys::now());
        }
        if hints_gone {
            self.sweep.on_hints_gone(sys::now());
        }
        // Who joined before the walk under way began misses nothing.
        let missed_some = joined && lock(&self.inner.subscribers).iter().any(|one| one.has_missed);
        if missed_some || hints_lost {
            self.sweep.on_hints_lost();
        }
        if missed {
            self.sweep.on_missed(sys::now());
        }
    }

    /// One step of a walk.
    fn step(&mut self) {
        let now = sys::now();
        match self.walk_on(now) {
            Ok(()) => {
                self.inner.outage.over();
                self.complaint.over();
            }
            Err(error) if error.kind() == Kind::Stopped => {}
            Err(error) => self.complain(&error),
        }
    }

    fn walk_on(&mut self, now: Instant) -> Result<()> {
        if !self.sweep.is_walking() {
            self.looker.find_out()?;
            (self.walk, self.waiting) = (Walk::default(), Vec::new());
            lock(&self.inner.subscribers).iter_mut().for_each(|subscriber| subscriber.has_missed = false);
            self.sweep.begin(self.looker.is_single(), now);
        }
        let n = self.looker.at_once();
        let mut is_end = false;
        if self.waiting.len() < n {
            let names = self.walk.next(&self.inner.server)?;
            is_end = names.is_empty();
            self.waiting.extend(names.into_iter().filter(|name| self.inner.is_wanted(name)));
        }
        if self.waiting.len() < n && !is_end {
            self.sweep.on_page(sys::now());
            return Ok(());
        }
        let n_asked = n.min(self.waiting.len());
        let started = sys::now();
        let infos = self.looker.infos(&self.waiting[..n_asked])?;
        self.waiting.drain(..n_asked);
        self.sweep.on_asked(n_asked, started, sys::now());
        if !infos.is_empty() {
            let infos = Arc::new(infos);
            if self.inner.send(|_| Some(Sighting::Infos(Arc::clone(&infos)))) {
                self.sweep.on_hints_lost();
            }
        }
        // With more of them the next step comes to the same end.
        if is_end && self.waiting.is_empty() {
            self.sweep.on_end();
            self.inner.send(|subscriber| (!subscriber.has_missed).then_some(Sighting::Swept));
            self.say(sys::now());
        }
        Ok(())
    }

    /// Says once, and when it changes, after how long changes are seen.
    fn say(&mut self, now: Instant) {
        let (Some(n), Some(worst)) = (self.sweep.n_databases(), self.sweep.worst_delay(now)) else { return };
        let flow = self.sweep.hints_flow(now);
        if self.said == Some(flow) {
            return;
        }
        let worst = keys::short(Duration::from_secs(worst.as_secs().max(1)));
        match (flow, self.said) {
            (true, _) => log::info!(
                "databases found by pattern: {n}; CouchDB tells which changed, so changes are seen at once, and within \
                 {worst} when CouchDB forgets to tell"
            ),
            (false, None) => log::info!("databases found by pattern: {n}; changes are seen within {worst}"),
            (false, Some(_)) => log::warn!(
                "CouchDB does not tell any more which databases changed: of {n} found by pattern changes are seen within \
                 {worst}"
            ),
        }
        self.said = Some(flow);
    }

    fn complain(&mut self, error: &Error) {
        let now = sys::now();
        let is_right = error.kind() == Kind::Forbidden;
        self.sweep.on_failure(is_right, now);
        if Outage::concerns(error) {
            return self.inner.outage.say(error);
        }
        if !self.complaint.is_news(error.kind(), now) {
            return;
        }
        match is_right {
            true => log::error!(
                "databases cannot be found by pattern: {error}; that needs a server admin: give `username` and `password` \
                 of one in [hookd], or name databases singly"
            ),
            false => log::warn!("databases cannot be looked at: {error}; trying again"),
        }
    }
}

/// The thread `db_updates`: follows it for as long as we run.
fn follow(inner: &Inner, mut updates: DbUpdates) {
    let (mut complaint, mut n_failed, mut has_heard) = (Complaint::default(), 0, false);
    while !inner.is_stopping() {
        let started = sys::now();
        let followed = updates.follow(&mut |heard| match heard {
            Heard::Opened { goes_on } => {
                if has_heard && !goes_on {
                    inner.hints.note_lost();
                }
                has_heard = true;
            }
            Heard::Hint(hint) => inner.hints.note(hint),
            Heard::Damaged => inner.hints.note_lost(),
        });
        inner.tell(|news| news.hints_gone = true);
        n_failed = if sys::now() > started + SHORT { 0 } else { n_failed + 1 };
        let mut pause = FOLLOW_AGAIN[n_failed.min(FOLLOW_AGAIN.len() - 1)];
        if let Err(error) = followed {
            if error.kind() == Kind::Stopped {
                return;
            }
            if matches!(error.kind(), Kind::NotFound | Kind::Forbidden) {
                pause = FOLLOW_RARELY;
            }
            if Outage::concerns(&error) {
                inner.outage.say(&error);
            } else if complaint.is_news(error.kind(), sys::now()) {
                say_unheard(&error);
            }
        }
        // Ends at once when the sender is gone.
        if inner.stopped.recv_timeout(pause).is_err_and(|error| error.is_disconnected()) {
            return;
        }
    }
}

fn say_unheard(error: &Error) {
    match error.kind() {
        Kind::NotFound => log::warn!(
            "CouchDB does not tell which databases changed, so those found by pattern are looked at in turn; from 2.0 on \
             `curl -X PUT $COUCH/_global_changes` by an admin changes that: changes are seen at once then ({error})"
        ),
        Kind::Forbidden => log::warn!(
            "CouchDB does not let us hear which databases changed, so those found by pattern are looked at in turn; that \
             needs a server admin ({error})"
        ),
        // Cut, silent, down: tried again at once, and nothing is lost but time.
        _ => log::debug!("{error}"),
    }
}

/// A poisoned lock guards values that stay whole whatever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
