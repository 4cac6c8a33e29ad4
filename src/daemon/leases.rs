//! Which webhooks this daemon may tell now: announces it, and takes, renews and gives back leases.
//!
//! ```text
//! daemon --Want--> leases:NAME of this connection --> couch::alive (daemon:…), couch::leases (lease:NAME)
//!   ^                  |   ^
//!   '-- Hold of each --'   '-- nudges: requests:desk saw something of them change, or was asked how we are
//! ```
//!
//! One thread for all webhooks of a connection. Guarantees: this daemon is announced with a webhook before the webhook
//! is told; what is handed out for a webhook ([`Leases::hold`]) ends, for ever, as soon as it is known that somebody else may
//! tell it, and is not valid from the moment on when somebody might; a lease is given back only when nobody uses its
//! hold any more, so after the last delivery and the last checkpoint. No request lasts longer than a quarter of a TTL.
//! What is written, and when, is decided by `pure::lease`.

mod entry;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};

use crate::couch::alive::{self, Daemon};
use crate::couch::client::Limits;
use crate::couch::leases::{self, Found, Hold};
use crate::daemon::leases::entry::{Entry, Sharing};
use crate::error::{Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::desk::Nudge;
use crate::pure::lease::{Answer, Lease, Mode, Other, State, Times};
use crate::pure::snapshot::{self, Statuses, WebhookStatus};
use crate::sys::{self, Thread};

/// How long a lease that is not renewed stays its holder's.
const TTL: Duration = Duration::from_secs(15);
/// For tests: another one, in milliseconds.
const TTL_VARIABLE: &str = "HOOKD_TEST_LEASE_TTL_MS";
/// How often the daemon says that it is alive; a third of what makes it dead to others.
const RENEW: Duration = Duration::from_secs(30);
/// When a webhook's state is another one it says so earlier, but not again within this.
const RENEW_MIN: Duration = Duration::from_secs(1);
/// Looks that something changed for are no closer than this.
const LOOK_GAP: Duration = Duration::from_millis(100);
/// How often the thread looks at the time when nothing comes in.
const TICK: Duration = Duration::from_millis(500);
/// Orders of the daemon on their way.
const ORDERS_MAX: usize = 16;
/// From the first announcement to the first lease: announced, looked, announced otherwise, looked and written.
const STEPS_MAX: usize = 4;
/// At the end, for each of the last two requests, at least; CouchDB may be on its way out itself.
const END_MIN: Duration = Duration::from_millis(80);

/// What the daemon says.
enum Said {
    /// Its webhooks, and when each needs a lease.
    Want(BTreeMap<String, Option<Mode>>),
    /// Give everything back by then, and end.
    Stop(Instant),
}

/// By webhook, what is ours now.
type Holds = Arc<Mutex<BTreeMap<String, Arc<Hold>>>>;

/// The running thread.
pub(crate) struct Leases {
    to: Sender<Said>,
    holds: Holds,
    wanted: BTreeMap<String, Option<Mode>>,
    ended: Receiver<()>,
    thread: Thread,
}

impl Leases {
    /// Starts the thread. It does nothing before [`Leases::want`].
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub(crate) fn start(shared: &Shared, nudges: Receiver<Nudge>) -> Result<Leases> {
        Leases::start_with(shared, nudges, times())
    }

    fn start_with(shared: &Shared, mut nudges: Receiver<Nudge>, times: Times) -> Result<Leases> {
        let (to, said) = bounded(ORDERS_MAX);
        let (end, ended) = bounded(1);
        let holds = Holds::default();
        let keeper = Keeper::new(shared, times, Arc::clone(&holds));
        let thread = sys::spawn("leases", move || {
            keeper.run(&said, &mut nudges);
            // Nobody waits unless the process is about to end.
            let _ = end.send(());
        })?;
        Ok(Leases { to, holds, wanted: BTreeMap::new(), ended, thread })
    }

    /// These webhooks run here, or would. What is not among them any more is given back when nobody uses it.
    pub(crate) fn want(&mut self, wanted: BTreeMap<String, Option<Mode>>) {
        if self.wanted != wanted && self.to.try_send(Said::Want(wanted.clone())).is_ok() {
            self.wanted = wanted;
        }
    }

    /// What whoever tells this webhook has to ask before; `None` while we may not tell it.
    pub(crate) fn hold(&self, webhook: &str) -> Option<Arc<Hold>> {
        locked(&self.holds).get(webhook).cloned()
    }

    /// Gives back what nobody uses any more, by `until`; gives what tells when that is done.
    pub(crate) fn stop(self, until: Instant) -> (Thread, Receiver<()>) {
        // Full means that it is at work, and finds the end of the channel behind it.
        let _ = self.to.try_send(Said::Stop(until));
        (self.thread, self.ended)
    }
}

/// The real ones, or a test's.
fn times() -> Times {
    let ms = std::env::var(TTL_VARIABLE).ok().and_then(|ms| ms.parse::<u64>().ok());
    let ms = ms.filter(|ms| (100..=3_600_000).contains(ms));
    Times::of(ms.map_or(TTL, Duration::from_millis))
}

/// The thread's own state.
struct Keeper {
    shared: Shared,
    times: Times,
    limits: Limits,
    holds: Holds,
    us: Daemon,
    entries: BTreeMap<String, Entry>,
    /// Told without any lease.
    free: BTreeMap<String, Arc<Hold>>,
    began: bool,
    /// Whoever is alone may tell up to then without being seen here again.
    alone_until: Duration,
    asked: bool,
    announced_at: Option<Instant>,
    n_words: u64,
    /// Those of which the last announcement said so.
    standbys: BTreeSet<String>,
    look_at: Duration,
    looked_at: Duration,
    /// After something failed nothing is asked before.
    rest_until: Duration,
    n_joined: u64,
    complaint: Complaint,
    end_at: Option<Instant>,
}

impl Keeper {
    fn new(shared: &Shared, times: Times, holds: Holds) -> Keeper {
        let deadline = Some(times.ttl / 4);
        Keeper {
            shared: shared.clone(),
            times,
            limits: Limits { deadline, silence: deadline, ..Limits::default() },
            holds,
            us: Daemon::new(),
            entries: BTreeMap::new(),
            free: BTreeMap::new(),
            began: false,
            alone_until: Duration::ZERO,
            asked: false,
            announced_at: None,
            n_words: 0,
            standbys: BTreeSet::new(),
            look_at: Duration::ZERO,
            looked_at: Duration::ZERO,
            rest_until: Duration::ZERO,
            n_joined: 0,
            complaint: Complaint::default(),
            end_at: None,
        }
    }

    fn run(mut self, said: &Receiver<Said>, nudges: &mut Receiver<Nudge>) {
        while !self.is_over() {
            self.wait(said, nudges);
            self.beat();
            if self.began {
                self.round();
            }
        }
        let limits = self.last_limits();
        if let Err(error) = alive::end(&self.shared.server, &self.shared.state_db, &self.us, limits) {
            log::debug!("`{}` stays: {error}", self.us.id);
        }
    }

    // --- Inputs ------------------------------------------------------------------------------------------

    /// Waits for something to do, and takes what came in.
    fn wait(&mut self, said: &Receiver<Said>, nudges: &mut Receiver<Nudge>) {
        let pause = self.pause();
        let nudge = select! {
            recv(said) -> order => {
                self.on_said(order.unwrap_or(Said::Stop(sys::now())));
                None
            },
            recv(nudges) -> nudge => Some(nudge),
            default(pause) => None,
        };
        match nudge {
            Some(Ok(nudge)) => self.on_nudge(nudge),
            // The desk was stopped before us, or never started.
            Some(Err(_)) => *nudges = never(),
            None => {}
        }
        while let Ok(order) = said.try_recv() {
            self.on_said(order);
        }
        while let Ok(nudge) = nudges.try_recv() {
            self.on_nudge(nudge);
        }
    }

    fn on_said(&mut self, said: Said) {
        match said {
            Said::Want(wanted) => self.want(wanted),
            Said::Stop(until) => {
                self.end_at.get_or_insert(until);
                self.want(BTreeMap::new());
            }
        }
    }

    fn on_nudge(&mut self, nudge: Nudge) {
        match nudge {
            Nudge::Asked => self.asked = true,
            // What we wrote ourselves comes back, too.
            Nudge::Changed(rev) if self.is_ours(&rev) => {}
            Nudge::Changed(_) => self.look_at = self.look_at.min(self.looked_at + LOOK_GAP),
        }
    }

    fn is_ours(&self, rev: &str) -> bool {
        let docs = self.entries.values().filter_map(|entry| entry.lease.doc());
        let mut ours = docs.filter(|doc| doc.holder == self.us.id);
        self.us.rev.as_deref() == Some(rev) || ours.any(|doc| doc.rev == rev)
    }

    fn want(&mut self, wanted: BTreeMap<String, Option<Mode>>) {
        self.began = true;
        self.free.retain(|name, hold| {
            let stays = wanted.get(name) == Some(&None);
            if !stays {
                hold.end();
            }
            stays
        });
        self.entries.values_mut().for_each(|entry| entry.wanted = false);
        for (name, mode) in wanted {
            match mode {
                None => drop(self.free.entry(name).or_insert_with(Hold::unlimited)),
                Some(mode) => {
                    // Divided it has another lease; the daemon has ended what it told with the one before.
                    let is_other = |entry: &Entry| entry.shared.is_some() != (mode == Mode::Shared);
                    if self.entries.get(&name).is_none_or(is_other) {
                        self.begin(&name, mode);
                    }
                    let entry = self.entries.get_mut(&name).expect("it is there");
                    entry.lease.want(mode);
                    entry.wanted = true;
                }
            }
        }
        self.publish();
    }

    /// A webhook of which nothing is known; what was known of it ends.
    fn begin(&mut self, webhook: &str, mode: Mode) {
        let lease = Lease::new(&self.us.id, mode, self.times);
        let entry = match mode {
            Mode::Auto | Mode::On => Entry::new(lease, webhook.to_owned(), None),
            Mode::Shared => {
                self.n_joined += 1;
                let id = format!("{}.{}", self.us.id, self.n_joined);
                let lease_name = leases::member_name(webhook, &id);
                Entry::new(lease, lease_name, Some(Sharing::new(id)))
            }
        };
        let before = self.entries.insert(webhook.to_owned(), entry);
        if let Some((_, hold)) = before.and_then(|before| before.hold) {
            hold.end();
        }
    }

    /// Says that this process runs; when it did not for long, whoever was alone has to look again.
    fn beat(&mut self) {
        let now = sys::since_boot();
        if now >= self.alone_until {
            self.entries.values_mut().for_each(|entry| entry.lease.on_gap());
        }
        self.alone_until = now + self.times.own();
        self.publish();
    }

    // --- What is done ------------------------------------------------------------------------------------

    fn round(&mut self) {
        self.let_go();
        if sys::since_boot() < self.rest_until {
            return;
        }
        self.entries.values_mut().for_each(Entry::settle);
        // What was seen changes what is to be announced, and that has to be looked at once more.
        for _ in 0..STEPS_MAX {
            let done = self.announce().and_then(|()| self.look()).and_then(|()| self.write());
            self.publish();
            self.entries.iter_mut().for_each(|(name, entry)| entry.say(name, sys::since_boot()));
            if let Err(error) = done {
                self.rest_until = sys::since_boot() + self.times.again;
                self.complain(&error);
                return;
            }
            self.complaint = Complaint::default();
            if self.end_at.is_some() || (!self.must_look() && self.leased() == self.us.leased) {
                return;
            }
        }
    }

    /// What is to be announced of each webhook.
    fn leased(&self) -> BTreeMap<String, bool> {
        let entries = self.entries.iter().filter(|(_, entry)| entry.wanted);
        let leased = entries.map(|(name, entry)| (name.clone(), entry.lease.is_leased()));
        leased.chain(self.free.keys().map(|name| (name.clone(), false))).collect()
    }

    fn must_look(&self) -> bool {
        self.entries.values().any(|entry| entry.lease.must_look())
    }

    fn complain(&mut self, error: &Error) {
        if Outage::concerns(error) {
            self.shared.outage.say(error);
        } else if matches!(error.kind(), Kind::Timeout | Kind::Cut | Kind::Conflict) {
            // A server that is busy, or somebody who took us for dead. What comes of it for a webhook is said of the webhook.
            log::debug!("`{}`: {error}; trying again", self.shared.state_db);
        } else if error.kind() != Kind::Stopped && self.complaint.is_news(error.kind(), sys::now()) {
            let state_db = &self.shared.state_db;
            log::error!(
                "`{state_db}`: what daemons know of each other cannot be read or written: {error}; webhooks that are not \
                 told yet wait for it (`lease = off` tells without)"
            );
        }
    }

    /// Says that we are alive, and which webhooks we tell, or would; when there is reason to.
    fn announce(&mut self) -> Result<()> {
        let leased = self.leased();
        let standby = |entry: &Entry| entry.wanted && entry.lease.state() == State::Standby;
        let standbys = self.entries.iter().filter(|(_, entry)| standby(entry));
        let standbys: BTreeSet<String> = standbys.map(|(name, _)| name.clone()).collect();
        let now = sys::now();
        let (webhooks, n_words) = self.shared.board.look();
        let changed = n_words != self.n_words || standbys != self.standbys;
        let due = match self.announced_at {
            _ if self.end_at.is_some() => false,
            None => true,
            Some(at) => {
                self.asked
                    || leased != self.us.leased
                    || now >= at + RENEW
                    || (changed && now >= at + RENEW_MIN)
            }
        };
        if !due {
            return Ok(());
        }
        self.us.webhooks = self.with_standbys(webhooks);
        let before = std::mem::replace(&mut self.us.leased, leased.clone());
        let Shared { server, state_db, .. } = &self.shared;
        if let Err(error) = alive::renew(server, state_db, &mut self.us, self.limits) {
            // Others may see either.
            self.us.leased = before;
            self.announced_at = None;
            return Err(error);
        }
        (self.announced_at, self.n_words, self.asked) = (Some(now), n_words, false);
        self.standbys = standbys;
        for (name, entry) in &mut self.entries {
            if let Some(leased) = leased.get(name) {
                entry.lease.on_announced(*leased);
            }
        }
        self.beat();
        Ok(())
    }

    /// What the webhooks say of themselves; those that are told elsewhere do not run and say nothing.
    fn with_standbys(&self, mut webhooks: Statuses) -> Statuses {
        for (name, entry) in &self.entries {
            if entry.wanted && matches!(entry.lease.state(), State::Standby) {
                let why = match entry.place.as_str() {
                    "" => "nobody holds its lease yet".to_owned(),
                    place => format!("{place} holds its lease"),
                };
                let status = WebhookStatus::new(snapshot::State::Standby, entry.standby_since);
                webhooks.insert(name.clone(), WebhookStatus { why: Some(why), ..status });
            }
        }
        webhooks
    }

    /// Looks who else is there, and at the leases, when that is due.
    fn look(&mut self) -> Result<()> {
        let now = sys::since_boot();
        if self.entries.is_empty() || !(self.must_look() || now >= self.look_at) {
            return Ok(());
        }
        self.looked_at = now;
        self.entries.values_mut().for_each(|entry| entry.lease.on_asking(now));
        self.look_at = now + self.times.renew.mul_f64(0.8 + 0.2 * sys::jitter());
        // Alone nobody needs leases: that nobody else is there is enough.
        let is_quiet = |entry: &Entry| entry.lease.state() == State::Alone && !entry.lease.must_look();
        if self.entries.values().all(is_quiet) {
            let others = self.others()?;
            if self.entries.keys().all(|name| of(&others, name).is_empty()) {
                self.see(None, &others);
                return Ok(());
            }
        }
        // First the leases, then who is there: whoever gives one back says before that it tells without.
        let Shared { server, state_db, .. } = &self.shared;
        let mut found = leases::list(server, state_db, self.limits)?;
        for Entry { lease, lease_name, .. } in self.entries.values() {
            let ours = found.get(lease_name).is_some_and(|found| found.doc.holder == self.us.id);
            if lease.state() == State::Held && !ours {
                // A list may come from one copy that lags behind.
                match leases::read(server, state_db, lease_name, self.limits)? {
                    Some(lease) => drop(found.insert(lease_name.clone(), lease)),
                    None => drop(found.remove(lease_name)),
                }
            }
        }
        self.beat();
        let others = self.others()?;
        self.see(Some(&found), &others);
        Ok(())
    }

    /// Other daemons that are alive.
    fn others(&mut self) -> Result<Vec<Daemon>> {
        let Shared { server, state_db, .. } = &self.shared;
        let (mut daemons, now) = alive::list_within(server, state_db, self.limits)?;
        daemons.retain(|daemon| daemon.id != self.us.id && daemon.is_alive(now));
        self.beat();
        Ok(daemons)
    }

    /// `None`: the leases are as they were.
    fn see(&mut self, found: Option<&BTreeMap<String, Found>>, others: &[Daemon]) {
        let (now, times) = (sys::since_boot(), self.times);
        for (name, entry) in &mut self.entries {
            let before = entry.lease.doc().cloned();
            let doc = match found {
                Some(found) => {
                    let lease = found.get(&entry.lease_name);
                    entry.note(name, lease, &self.shared.state_db);
                    lease.map(|lease| &lease.doc)
                }
                None => before.as_ref(),
            };
            let was_held = entry.lease.state() == State::Held;
            entry.lease.on_look(doc, &of(others, name), now, sys::jitter());
            let is_held = was_held && entry.lease.state() == State::Held;
            if let (Some(sharing), Some(found), true) = (&mut entry.shared, found, is_held) {
                sharing.on_look(leases::members(found, name), times, now);
            }
            if entry.lease.waits_for_others(now) {
                self.look_at = self.look_at.min(now + self.times.again);
            }
        }
        self.publish();
        self.join_again();
    }

    /// Whoever was taken out, or let go, comes back as somebody else.
    fn join_again(&mut self) {
        let is_out = |entry: &Entry| {
            let is_member = entry.shared.as_ref().is_some_and(|sharing| sharing.members.is_some());
            is_member && entry.lease.state() != State::Held && entry.wanted
        };
        let out = self.entries.iter().filter(|(_, entry)| is_out(entry));
        let out: Vec<String> = out.map(|(name, _)| name.clone()).collect();
        out.iter().for_each(|name| self.begin(name, Mode::Shared));
    }

    /// Takes, renews and gives back what is due, all in one request.
    fn write(&mut self) -> Result<()> {
        let now = sys::since_boot();
        let mut due: Vec<String> = Vec::new();
        let (mut changes, mut expels) = (Vec::new(), Vec::new());
        for (name, entry) in &mut self.entries {
            if let Some(order) = entry.lease.write(now) {
                entry.lease.on_sending(&order, now);
                due.push(name.clone());
                changes.push(entry.change(order));
            }
            expels.extend(entry.expels(name, now));
        }
        changes.extend(expels);
        if changes.is_empty() {
            return Ok(());
        }
        let Shared { server, state_db, .. } = &self.shared;
        let limits = if self.end_at.is_some() { self.last_limits() } else { self.limits };
        let answers = leases::write(server, state_db, &self.us, self.times, &changes, limits);
        let now = sys::since_boot();
        let (answers, result) = match answers {
            Ok(answers) => (answers, Ok(())),
            Err(error) => (vec![Answer::Unknown; due.len()], Err(error)),
        };
        // Whether others were taken out the next look tells.
        for ((name, change), answer) in due.iter().zip(changes).zip(answers) {
            let entry = self.entries.get_mut(name).expect("it was just seen");
            if let (Some(sharing), Answer::Written(_)) = (&mut entry.shared, &answer) {
                sharing.knows = change.knows.unwrap_or_default();
                if sharing.members.is_none() {
                    self.look_at = now;
                }
            }
            entry.lease.on_answer(answer, now);
        }
        self.beat();
        result
    }

    /// What is not wanted any more is given back once nobody uses it.
    fn let_go(&mut self) {
        for entry in self.entries.values_mut().filter(|entry| !entry.wanted) {
            if entry.hold.as_ref().is_none_or(|(_, hold)| Arc::strong_count(hold) == 1) {
                entry.lease.let_go();
            }
        }
        self.entries.retain(|_, entry| entry.wanted || entry.is_used() || entry.lease.state() == State::Held);
    }

    /// Hands out what we may tell, and takes back what we may not.
    fn publish(&mut self) {
        let mut holds = locked(&self.holds);
        holds.clone_from(&self.free);
        for (name, entry) in &mut self.entries {
            entry.hand_out(self.alone_until);
            if let (Some((_, hold)), true) = (&entry.hold, entry.wanted) {
                holds.insert(name.clone(), Arc::clone(hold));
            }
        }
    }

    // --- When --------------------------------------------------------------------------------------------

    /// How long nothing is to be done.
    fn pause(&self) -> Duration {
        if !self.began {
            return TICK;
        }
        if self.end_at.is_some() {
            return Duration::from_millis(5);
        }
        let now = sys::since_boot();
        let tick = TICK.min(self.times.again);
        let due = self.entries.values().filter_map(|entry| entry.lease.next_deadline());
        let due = due.chain([self.look_at]).min().unwrap_or(now + tick);
        let due = due.max(self.looked_at + LOOK_GAP).max(self.rest_until);
        due.saturating_sub(now).clamp(Duration::from_millis(1), tick)
    }

    fn is_over(&self) -> bool {
        self.end_at.is_some_and(|end_at| self.entries.is_empty() || sys::now() >= end_at)
    }

    fn last_limits(&self) -> Limits {
        let left = self.end_at.map_or(END_MIN, |end_at| end_at.saturating_duration_since(sys::now()));
        Limits { deadline: Some(left.max(END_MIN)), ..Limits::default() }
    }
}

/// Those that run a webhook, or would.
fn of(others: &[Daemon], webhook: &str) -> Vec<Other> {
    let runs = others.iter().filter_map(|daemon| {
        let leased = daemon.is_leased(webhook)?;
        Some(Other { id: daemon.id.clone(), leased })
    });
    runs.collect()
}

/// A poisoned lock guards a map that stays whole whatever panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
