//! The lease of one webhook: when this daemon may tell, and what it writes for that.
//!
//! ```text
//!            nobody else there                     somebody came
//!  Unknown ------------------> Alone ------------------------------> Held <--.
//!     |                          ^      alone for long, released      |  |   | renewed
//!     | others, or `on`          '------------------------------------'  '---'
//!     v                                                               |
//!  Standby <-----------------------------------------------------------'  somebody else's by now
//!     '--- free: missing, released, or the same `_rev` for a TTL ---> Held
//! ```
//!
//! Guarantees, with clocks that run at the same speed and a CouchDB that is linearizable (one server; a cluster is not
//! always): at no time do two daemons find that they may tell, whatever is lost, late, stopped or killed. A holder's
//! time ends `ttl - margin` after the moment at which it *sent* the write that CouchDB took; another daemon writes over
//! the lease at the earliest a `ttl` after it first *saw* that write, and CouchDB takes that only under the `_rev` it
//! saw. Once its time is over the holder tells nothing, and goes on where it was when CouchDB takes a renewal under the
//! `_rev` of its last one: then nobody told in between.
//!
//! A daemon that is alone (`lease = auto`) tells without a lease. Each announces itself *before* it looks who else is
//! there, so of two that start at the same time one at least sees the other; whoever sees one that may tell without a
//! lease gives it a `ttl` to take one. That one tells on meanwhile, but no longer than `ttl - margin` after it *asked* for
//! the last look that showed nobody: who came was not there by then, and waits a `ttl` from later on. (Only a look shows
//! it: whoever cannot reach CouchDB tells what it has read, and does not know that somebody came. A limit, README
//! "Several daemons".)
//!
//! Where CouchDB is not linearizable both branches of a conflict may be taken for a while: then two tell, until one of
//! them reads that the other has won. What is told twice has the same `webhook-id`.
//!
//! Leaves to others: the clock (time since boot that counts suspension, given in as `now`), requests, and the check
//! before each delivery (`couch::leases`).

use std::collections::BTreeMap;
use std::time::Duration;

/// All times of a lease, made of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// How long a lease that is not renewed stays its holder's.
    pub ttl: Duration,
    /// How much earlier the holder itself lets go: for what lies between its check and the request, and for clocks.
    pub margin: Duration,
    /// Between two renewals, and two looks.
    pub renew: Duration,
    /// After something failed.
    pub again: Duration,
    /// Nobody else there for so long: a lease is needed no more.
    pub alone_after: Duration,
}

impl Times {
    /// With 15 s: margin 3 s, a renewal every 5 s, again after 1 s, alone after a minute.
    pub fn of(ttl: Duration) -> Times {
        Times { ttl, margin: ttl / 5, renew: ttl / 3, again: ttl / 15, alone_after: ttl * 4 }
    }

    /// How long a lease holds for its holder after the moment of writing it.
    pub fn own(&self) -> Duration {
        self.ttl - self.margin
    }
}

/// When a lease is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// While other daemons are there.
    Auto,
    /// Always.
    On,
    /// Always, and each daemon has one of its own: they divide what is told (`pure::share`).
    Shared,
}

/// A lease as CouchDB shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doc {
    /// Its `_rev`.
    pub rev: String,
    /// Names one life of one daemon.
    pub holder: String,
    /// Counts the holder's writes.
    pub n: u64,
    /// Given back.
    pub released: bool,
    /// Of whoever wrote it.
    pub ttl: Duration,
}

/// Another daemon that is alive and runs the webhook, or would.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// Names it.
    pub id: String,
    /// Whether it said that it tells with a lease alone.
    pub leased: bool,
}

/// What to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// A lease of ours over what is there.
    Take,
    /// The same once more.
    Renew,
    /// That it is nobody's.
    Release,
}

/// What is to be written, and over what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// What.
    pub write: Write,
    /// `_rev` of what is there; `None` when nothing is.
    pub over: Option<String>,
    /// For [`Doc::n`].
    pub n: u64,
}

/// What came of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Its `_rev`.
    Written(String),
    /// 409: something else is there by now.
    Conflict,
    /// It may have been done, or be done yet.
    Unknown,
}

/// That we may tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Telling {
    /// Another one when somebody else may have told in between.
    pub tenure: u64,
    /// Up to when; `None` while nobody else is known to be there.
    pub until: Option<Duration>,
}

/// How we stand to the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nothing was seen yet.
    Unknown,
    /// Nobody else is there: we tell without a lease.
    Alone,
    /// It is somebody else's, or about to be ours.
    Standby,
    /// It is ours.
    Held,
}

/// A write whose answer we do not have. It may be taken as long as what it is over is there.
#[derive(Debug, Clone)]
struct Pending {
    order: Order,
    first_sent: Duration,
    last_sent: Duration,
}

/// One webhook's lease, as one daemon sees it.
#[derive(Debug)]
pub struct Lease {
    me: String,
    mode: Mode,
    times: Times,
    state: State,
    tenure: u64,
    /// What was last seen, or written by us.
    doc: Option<Doc>,
    /// When its `_rev` was first seen, and how much later than others we would write over it.
    standing_since: Duration,
    patience: Duration,
    /// Those who may tell without a lease, and since when we know.
    others: BTreeMap<String, Option<Duration>>,
    alone_since: Option<Duration>,
    /// When the look under way was asked for, and the last one that showed nobody else.
    asked_at: Option<Duration>,
    clean_at: Duration,
    /// What our announcement says.
    announced: Option<bool>,
    leaving: bool,
    letting_go: bool,
    /// Of our last write: each has its own, and a try once more has the same.
    n: u64,
    pending: Option<Pending>,
    until: Duration,
    renew_at: Duration,
    /// Nothing is written before CouchDB was looked at once more.
    must_look: bool,
}

impl Lease {
    /// Nothing seen yet. `me` names this life of this daemon.
    pub fn new(me: &str, mode: Mode, times: Times) -> Lease {
        Lease {
            me: me.to_owned(),
            mode,
            times,
            state: State::Unknown,
            tenure: 0,
            doc: None,
            standing_since: Duration::ZERO,
            patience: Duration::ZERO,
            others: BTreeMap::new(),
            alone_since: None,
            asked_at: None,
            clean_at: Duration::ZERO,
            announced: None,
            leaving: false,
            letting_go: false,
            n: 0,
            pending: None,
            until: Duration::ZERO,
            renew_at: Duration::ZERO,
            must_look: true,
        }
    }

    // --- Inputs ------------------------------------------------------------------------------------------

    /// Our announcement is stored; `leased` is what it says, see [`Lease::is_leased`].
    pub fn on_announced(&mut self, leased: bool) {
        if self.announced != Some(leased) {
            self.announced = Some(leased);
            // What was seen before others could see this does not count.
            self.must_look = true;
        }
    }

    /// CouchDB is about to be asked for what [`Lease::on_look`] is given.
    pub fn on_asking(&mut self, now: Duration) {
        self.asked_at = Some(now);
    }

    /// What CouchDB holds; it was asked after the last announcement, first for the lease, then for the others.
    /// `jitter` is in `0.0..1.0`.
    pub fn on_look(&mut self, doc: Option<&Doc>, others: &[Other], now: Duration, jitter: f64) {
        self.must_look = false;
        let is_new = doc.map(|doc| &doc.rev) != self.doc.as_ref().map(|doc| &doc.rev);
        if is_new {
            self.standing_since = now;
            self.patience = self.times.ttl.mul_f64(jitter / 10.0);
        }
        self.doc = doc.cloned();
        let asked_at = self.asked_at.take().unwrap_or(now);
        if others.is_empty() {
            self.clean_at = asked_at;
        }
        self.note_others(others, now);
        let ours = doc.filter(|doc| doc.holder == self.me);
        match &self.pending {
            Some(pending) if ours.is_some_and(|doc| doc.n == pending.order.n) => {
                self.confirm(pending.first_sent);
            }
            // Somebody else wrote since: ours was not taken, and under its `_rev` never will be.
            Some(pending) if doc.map(|doc| &doc.rev) != pending.order.over.as_ref() => self.pending = None,
            Some(_) | None => {}
        }
        // Given back by now, perhaps, but somebody had it.
        let was_taken = is_new && ours.is_none() && doc.is_some();
        match self.state {
            State::Held if ours.is_none_or(|doc| doc.released) => self.lose(),
            State::Alone if was_taken || !self.is_free(now) => self.lose(),
            State::Unknown => self.begin(now),
            State::Held => self.think_of_leaving(now),
            State::Alone | State::Standby => {}
        }
    }

    /// One write goes out.
    pub fn on_sending(&mut self, order: &Order, now: Duration) {
        let before = self.pending.take().filter(|pending| pending.order == *order);
        let first_sent = before.map_or(now, |pending| pending.first_sent);
        self.n = order.n;
        self.pending = Some(Pending { order: order.clone(), first_sent, last_sent: now });
    }

    /// What came of it.
    pub fn on_answer(&mut self, answer: Answer, now: Duration) {
        let Some(pending) = &self.pending else { return };
        match answer {
            Answer::Written(rev) => {
                let released = pending.order.write == Write::Release;
                let (holder, n, sent) = (self.me.clone(), pending.order.n, pending.last_sent);
                self.doc = Some(Doc { rev, holder, n, released, ttl: self.times.ttl });
                self.standing_since = now;
                self.confirm(sent);
            }
            // An earlier try of ours, or somebody else: only what is there can say. We tell on, for as long as we
            // have known that we may.
            Answer::Conflict => self.must_look = true,
            Answer::Unknown => {
                self.must_look = true;
                self.renew_at = self.renew_at.max(now + self.times.again);
            }
        }
    }

    /// The process was stopped for so long that others may have taken us for dead.
    pub fn on_gap(&mut self) {
        if self.state == State::Alone {
            self.lose();
            (self.state, self.announced) = (State::Unknown, None);
        }
    }

    /// The webhook does not run here any more: what is ours is given back.
    pub fn let_go(&mut self) {
        self.letting_go = true;
    }

    /// What the lease says beside is another: it is renewed now.
    pub fn hurry(&mut self) {
        self.renew_at = Duration::ZERO;
    }

    /// It does, with this mode.
    pub fn want(&mut self, mode: Mode) {
        (self.letting_go, self.mode) = (false, mode);
    }

    // --- Outputs -----------------------------------------------------------------------------------------

    /// What is to be written now.
    pub fn write(&self, now: Duration) -> Option<Order> {
        if self.must_look {
            return None;
        }
        let write = match self.state {
            State::Held if self.letting_go => Write::Release,
            _ if self.letting_go => return None,
            State::Unknown => return None,
            State::Alone if self.mode == Mode::Auto && self.others.is_empty() => return None,
            State::Alone => Write::Take,
            State::Standby if self.is_free(now) && self.may_take(now) => Write::Take,
            State::Standby => return None,
            State::Held if self.leaving && self.announced == Some(false) => Write::Release,
            State::Held if now >= self.renew_at => Write::Renew,
            State::Held => return None,
        };
        let over = self.doc.as_ref().map(|doc| doc.rev.clone());
        let again = self.pending.as_ref().map(|pending| &pending.order);
        match again.filter(|order| order.write == write && order.over == over) {
            Some(order) => Some(order.clone()),
            None => Some(Order { write, over, n: self.n + 1 }),
        }
    }

    /// Whether we may tell.
    pub fn telling(&self) -> Option<Telling> {
        let until = match self.state {
            State::Alone if self.others.is_empty() => None,
            State::Alone => Some(self.clean_at + self.times.own()),
            State::Held => Some(self.until),
            State::Unknown | State::Standby => return None,
        };
        Some(Telling { tenure: self.tenure, until })
    }

    /// What our announcement has to say: whether we tell with a lease alone.
    pub fn is_leased(&self) -> bool {
        match self.state {
            State::Unknown => self.mode != Mode::Auto,
            State::Alone => false,
            State::Standby | State::Held => !self.leaving,
        }
    }

    /// Whether only the time that others have to take a lease keeps us from taking it.
    pub fn waits_for_others(&self, now: Duration) -> bool {
        self.state == State::Standby && self.is_free(now) && !self.may_take(now)
    }

    /// How we stand to it.
    pub fn state(&self) -> State {
        self.state
    }

    /// What was last seen of it.
    pub fn doc(&self) -> Option<&Doc> {
        self.doc.as_ref()
    }

    /// Whether CouchDB has to be looked at before anything else.
    pub fn must_look(&self) -> bool {
        self.must_look
    }

    /// When [`Lease::write`] may give something though nothing was seen before.
    pub fn next_deadline(&self) -> Option<Duration> {
        match self.state {
            State::Held => Some(self.renew_at),
            State::Standby => {
                let grace = self.others.values().flatten().map(|since| *since + self.times.ttl).max();
                Some(self.free_at().max(grace.unwrap_or_default()))
            }
            State::Unknown | State::Alone => None,
        }
    }

    // --- Within ------------------------------------------------------------------------------------------

    fn note_others(&mut self, others: &[Other], now: Duration) {
        self.others = others
            .iter()
            .map(|other| {
                let known = self.others.get(&other.id).copied().flatten();
                (other.id.clone(), (!other.leased).then(|| known.unwrap_or(now)))
            })
            .collect();
        self.alone_since = if others.is_empty() { self.alone_since.or(Some(now)) } else { None };
    }

    /// From when on the lease is nobody's.
    fn free_at(&self) -> Duration {
        match &self.doc {
            Some(doc) if !doc.released => self.standing_since + self.times.ttl.max(doc.ttl) + self.patience,
            Some(_) | None => Duration::ZERO,
        }
    }

    fn is_free(&self, now: Duration) -> bool {
        now >= self.free_at()
    }

    /// Whether everybody else tells with a lease alone, or had the time to take one.
    fn may_take(&self, now: Duration) -> bool {
        self.others.values().flatten().all(|since| now >= *since + self.times.ttl)
    }

    fn begin(&mut self, now: Duration) {
        let Some(announced) = self.announced else { return };
        if self.mode == Mode::Auto && !announced && self.others.is_empty() && self.is_free(now) {
            self.state = State::Alone;
            self.tenure += 1;
        } else {
            self.state = State::Standby;
        }
    }

    fn think_of_leaving(&mut self, now: Duration) {
        let alone = self.alone_since.is_some_and(|since| now >= since + self.times.alone_after);
        self.leaving = self.mode == Mode::Auto && alone;
    }

    /// The pending write was taken; what it says counts from `sent`.
    fn confirm(&mut self, sent: Duration) {
        let Some(pending) = self.pending.take() else { return };
        if pending.order.write == Write::Release {
            self.state = if self.leaving && !self.letting_go { State::Alone } else { State::Standby };
            self.leaving = false;
            return;
        }
        if matches!(self.state, State::Unknown | State::Standby) {
            self.tenure += 1;
        }
        if self.state != State::Held {
            self.until = Duration::ZERO;
        }
        self.state = State::Held;
        self.until = self.until.max(sent + self.times.own());
        self.renew_at = sent + self.times.renew;
    }

    fn lose(&mut self) {
        self.state = State::Standby;
        self.pending = None;
        self.leaving = false;
    }
}

#[cfg(test)]
mod tests;
