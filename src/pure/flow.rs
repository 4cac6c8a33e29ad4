//! One subscription (a webhook on a database): rows in; deliveries, positions and checkpoints out.
//!
//! Guarantees (DESIGN §2, §7, §8): the checkpoint never passes a change that is neither delivered nor stored as
//! a dead letter nor replaced by a newer one that is unfinished or finished behind it; after a lost connection
//! reading goes on from the *stored* checkpoint; a page's `last_seq` counts only when the page was not full;
//! what was told is recognised by its id and not told again while that is remembered. Knows no endpoint, does
//! no I/O: [`Flow::next_read`] and [`Flow::next_checkpoint`] say what the shell has to do.
//!
//! ```text
//!  Open --ok--> Page --full--> Page ... --not full--> Wait --timeout--> Wait ...
//!   ^            |                                     |  after `rotate`: closed, one Page
//!   |            '---- no room: closed, Page later ----'
//!   '-- any error, mark changed: wait a little, then Open: read mark, checkpoint, begin behind it
//! ```
//!
//! A flow that [rests](Flow::resting) does so in the place of Wait, until it is [stirred](Flow::stir): one of thousands,
//! for which nobody keeps a request open.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pure::conflict::{Known, Owed};
use crate::pure::endpoint::Trial;
use crate::pure::lanes::{LaneIndex, Lanes, Stage};
use crate::pure::message::{Arrived, Event};
use crate::pure::seq::Seq;
use crate::pure::table::Table;
use crate::pure::told::Told;
use crate::pure::watermark::Watermark;

/// Rows of a page, at most: pages of 100 read half as fast as pages of 1,000 (DESIGN §8).
pub const PAGE_ROWS: usize = 1_000;
/// Deliveries beyond `through_seq` that a checkpoint names.
const BEYOND_MAX: usize = 1_000;
/// The first checkpoint after the first delivery comes this soon: kills that come faster must not stop it moving.
const CHECKPOINT_FIRST: Duration = Duration::from_millis(200);
/// A subscription that falls idle stores after this share of the interval: at once after the first events, within a
/// second later. A trickle of one event a second must not cost a write a second (4 KiB of file each, CONTRACT §9).
const CHECKPOINT_QUIET: u32 = 5;
/// Waits after errors of reading; the last repeats.
const REOPEN_AFTER: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Waits after the same fault at the same position; the last repeats. A server that is being started may answer
/// 500 for some seconds: that must not cost five minutes.
const REFUSED_AFTER: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(300)];
/// A first page that has more than this ahead, and half of the database, means that the feed was rewound.
const REWOUND_CHANGES: u64 = 10_000;

/// What was found when a feed was opened.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The database's mark as it is now.
    pub mark: String,
    /// What a checkpoint says that is believed: `through_seq` and the short ids delivered beyond it.
    pub checkpoint: Option<(Seq, Vec<u64>)>,
    /// `_rev` to write the next checkpoint with.
    pub rev: Option<String>,
    /// Whether this is another database of the same name than the one known.
    pub recreated: bool,
    /// Documents in it, for noticing rewinds.
    pub doc_count: u64,
    /// Documents stored as conflicted, in this life of the database; `None`: as the flow knows, which it does once it
    /// was told.
    pub conflicted: Option<Vec<u64>>,
}

/// What has to happen before an event that waits may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Nothing.
    Tell,
    /// This.
    Keep(Owed),
    /// It is not wanted, now that it is known what it is.
    Drop,
}

/// What the shell is to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read {
    /// Read mark and checkpoint, then answer with [`Flow::on_opened`].
    Open,
    /// One page of at most `limit` rows.
    Page {
        /// Behind this.
        since: Seq,
        /// Rows.
        limit: usize,
    },
    /// A request that stays open.
    Wait {
        /// Behind this.
        since: Seq,
    },
}

/// How a reading failed, as far as the flow cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFault {
    /// The database bears another mark, or its server was restarted (1.x): open anew, at once.
    Changed,
    /// CouchDB does not know the position: read from the beginning, what was told is recognised.
    BadPosition,
    /// CouchDB refuses this request: missing filter, filter that throws, rows that cannot be read.
    Refused,
    /// Everything else: connection, timeout, login, no database.
    Lost,
}

/// What is to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Deleted and created again: read from its beginning.
    Recreated,
    /// More than half of the database lies ahead of the checkpoint.
    Rewound {
        /// Changes ahead.
        pending: u64,
    },
}

/// A checkpoint to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// All up to here is finished.
    pub through_seq: Seq,
    /// The mark of the database that it is a place in.
    pub mark: String,
    /// Short ids of what is delivered beyond it.
    pub delivered: Vec<u64>,
    /// `_rev` to write with.
    pub rev: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Nothing is open; `next` tells what would be.
    Idle,
    /// Nothing until then.
    Parked(Instant),
    Opening,
    Page {
        limit: usize,
        n_rows: usize,
    },
    Waiting {
        since: Instant,
    },
    /// We asked the shell to close.
    Closing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Open,
    Page,
    Wait,
    /// Nothing, until stirred.
    Rest,
}

/// The machine.
#[derive(Debug)]
pub struct Flow {
    /// An open request may never end by itself: a filtered one does not (CONTRACT §6), nor does one on a busy
    /// database, nor pouchdb-server's on a deleted one.
    rotate: Duration,
    /// Rows of a page, at most.
    page_rows: usize,
    reading: Reading,
    next: Next,
    /// Rests where another one waits.
    rests: bool,
    /// Something may be new since the last page was asked for.
    stirred: bool,
    /// Stands for no database.
    vacant: bool,
    /// Reads nothing more, and tells only what is in flight: somebody else tells the database from now on.
    leaving: bool,
    first_page: bool,
    doc_count: u64,
    failures: u32,
    same_fault: (Option<Seq>, u32),
    /// The stored position is not of this server.
    position_unknown: bool,
    mark: Option<String>,
    watermark: Watermark,
    lanes: Lanes,
    told: Told,
    beyond: Beyond,
    /// Short ids that the stored checkpoint named; until the feed was once read to its end.
    restored: HashSet<u64>,
    conflicted: Known,
    clock: CheckpointClock,
    notices: Vec<Notice>,
}

impl Flow {
    /// `strict`: one lane. An open request is closed after `rotate` and a page read, so that the position moves
    /// though a filter drops everything, and so that the database is looked at again.
    pub fn new(strict: bool, rotate: Duration, checkpoint_interval: Duration) -> Flow {
        Flow {
            rotate,
            page_rows: PAGE_ROWS,
            reading: Reading::Idle,
            next: Next::Open,
            rests: false,
            stirred: false,
            vacant: false,
            leaving: false,
            first_page: true,
            doc_count: 0,
            failures: 0,
            same_fault: (None, 0),
            position_unknown: false,
            mark: None,
            watermark: Watermark::new(Seq::zero(), 0),
            lanes: Lanes::new(strict),
            told: Told::default(),
            beyond: Beyond::default(),
            restored: HashSet::new(),
            conflicted: Known::default(),
            clock: CheckpointClock::new(checkpoint_interval),
            notices: Vec::new(),
        }
    }

    /// Never waits for changes: reads to the end, then rests.
    #[must_use]
    pub fn resting(self) -> Flow {
        Flow { rests: true, ..self }
    }

    /// Of no database; the place of one that was let go.
    pub fn vacant() -> Flow {
        let flow = Flow::new(false, Duration::ZERO, Duration::ZERO);
        Flow { rests: true, vacant: true, next: Next::Rest, ..flow }
    }

    /// Whether it stands for no database.
    pub fn is_vacant(&self) -> bool {
        self.vacant
    }

    /// Whether it rests instead of waiting.
    pub fn rests(&self) -> bool {
        self.rests
    }

    /// There may be something new in its database: a page that is asked for after this is read to the end before it
    /// rests again.
    pub fn stir(&mut self) {
        self.stirred = true;
        if self.next == Next::Rest && !self.leaving {
            self.next = Next::Page;
        }
    }

    /// Whether all that it was stirred for is read, told and stored: it may be let go, and nothing is lost with it but
    /// the memory against rewinds.
    pub fn is_at_rest(&self) -> bool {
        self.next == Next::Rest && self.reading == Reading::Idle && self.is_done()
    }

    /// Lets the database go to somebody else: what waits is forgotten, what is in flight is the last that is told, and
    /// once that is stored it is at rest. The position stays in front of what was forgotten.
    pub fn leave(&mut self) {
        self.leaving = true;
        self.lanes.forget_waiting();
        self.next = Next::Rest;
        if let Reading::Parked(_) = self.reading {
            self.reading = Reading::Idle;
        }
    }

    /// Whether it is left to somebody else.
    pub fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Whether everything that was read is told and stored, so that after a fault it may be let go and opened later. So it
    /// is where nothing was read yet, though nothing is stored either.
    pub fn is_done(&self) -> bool {
        self.lanes.is_empty() && !self.clock.writing && self.clock.deadline().is_none()
    }

    /// Whether nothing that was read waits to be told, and no checkpoint is being stored: for a database that is gone,
    /// with everything that was stored in it.
    pub fn is_told(&self) -> bool {
        self.lanes.is_empty() && !self.clock.writing
    }

    /// Whether something is being read.
    pub fn is_reading(&self) -> bool {
        !matches!(self.reading, Reading::Idle | Reading::Parked(_))
    }

    /// With other pages, so that a test of a few rows has full ones.
    #[cfg(test)]
    #[must_use]
    pub fn with_page_rows(self, page_rows: usize) -> Flow {
        Flow { page_rows, ..self }
    }

    /// The lanes, for whoever starts deliveries.
    pub fn lanes(&mut self) -> &mut Lanes {
        &mut self.lanes
    }

    /// Whether what is at work came before what waits.
    #[cfg(test)]
    pub fn keeps_order(&self) -> bool {
        self.lanes.keeps_order()
    }

    /// Unfinished events.
    pub fn n_pending(&self) -> usize {
        self.lanes.len()
    }

    /// When the oldest of them was read.
    pub fn oldest(&self) -> Option<jiff::Timestamp> {
        self.lanes.oldest()
    }

    /// What they weigh, in bytes.
    pub fn bytes(&self) -> usize {
        self.lanes.bytes()
    }

    /// Whether there is something for a probe to take.
    pub fn can_probe(&self) -> bool {
        self.lanes.can_probe()
    }

    /// Trials of everything unfinished but the delivery `token`.
    pub fn trials_beside(&self, token: u64) -> impl Iterator<Item = &Trial> {
        self.lanes.trials_beside(token)
    }

    /// Rows that a page in progress may still bring.
    pub fn n_expected(&self) -> usize {
        match self.reading {
            Reading::Page { limit, n_rows } => limit.saturating_sub(n_rows),
            _ => 0,
        }
    }

    /// The mark of the database, once it was opened.
    pub fn mark(&self) -> Option<&str> {
        self.mark.as_deref()
    }

    /// What there is to say since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    // --- Reading -----------------------------------------------------------------------------------------

    /// What to read now, if anything; `room` is for how many more events there is. Call again after every
    /// input. The shell answers with `on_opened` or `on_rows`, then `on_end`, or `on_read_failed`.
    pub fn next_read(&mut self, room: usize, now: Instant) -> Option<Read> {
        if let Reading::Parked(until) = self.reading
            && until <= now
        {
            self.reading = Reading::Idle;
        }
        if self.reading != Reading::Idle || room == 0 {
            return None;
        }
        match self.next {
            Next::Open if self.clock.writing => None,
            Next::Open => {
                self.reading = Reading::Opening;
                Some(Read::Open)
            }
            Next::Page => {
                let limit = room.min(self.page_rows);
                self.stirred = false;
                self.reading = Reading::Page { limit, n_rows: 0 };
                Some(Read::Page { since: self.watermark.read_seq().clone(), limit })
            }
            Next::Wait => {
                self.reading = Reading::Waiting { since: now };
                Some(Read::Wait { since: self.watermark.read_seq().clone() })
            }
            Next::Rest => None,
        }
    }

    /// Whether what is open should be closed: no room for more rows, or time to read a filtered feed anew.
    /// Once true, the shell closes and answers with `on_end` or `on_read_failed`.
    pub fn should_close(&mut self, has_room: bool, now: Instant) -> bool {
        let close = match self.reading {
            // A full one ends by itself.
            Reading::Page { limit, n_rows } => !has_room && n_rows < limit,
            Reading::Waiting { since } => !has_room || now >= since + self.rotate,
            Reading::Idle | Reading::Parked(_) | Reading::Opening | Reading::Closing => false,
        };
        if close {
            self.reading = Reading::Closing;
            self.next = Next::Page;
        }
        close
    }

    /// When reading changes by time alone.
    pub fn next_reading_deadline(&self) -> Option<Instant> {
        match self.reading {
            Reading::Parked(until) => Some(until),
            Reading::Waiting { since } => Some(since + self.rotate),
            Reading::Idle | Reading::Opening | Reading::Page { .. } | Reading::Closing => None,
        }
    }

    /// Mark and checkpoint were read.
    pub fn on_opened(&mut self, opened: Opened) {
        debug_assert_eq!(self.reading, Reading::Opening);
        let other = self.mark.as_ref().is_some_and(|mark| *mark != opened.mark);
        if opened.recreated || other {
            self.notices.push(Notice::Recreated);
            self.told = Told::default();
            self.lanes.forget_waiting();
        }
        // Not because it is said to be another one: what is stored in this life is said once.
        match opened.conflicted {
            Some(keys) => self.conflicted = Known::of(keys),
            None if other => self.conflicted = Known::default(),
            None => {}
        }
        let checkpoint = opened.checkpoint.filter(|_| !opened.recreated);
        self.clock.opened(opened.rev, checkpoint.as_ref().map(|(through_seq, _)| through_seq));
        let (mut through_seq, delivered) = checkpoint.unwrap_or_else(|| (Seq::zero(), Vec::new()));
        if std::mem::take(&mut self.position_unknown) {
            through_seq = Seq::zero();
        }
        self.mark = Some(opened.mark);
        self.watermark = Watermark::new(through_seq, self.watermark.next_ordinal());
        self.beyond = Beyond::default();
        self.restored = delivered.into_iter().collect();
        self.doc_count = opened.doc_count;
        self.first_page = true;
        self.reading = Reading::Idle;
        self.next = if self.leaving { Next::Rest } else { Next::Page };
    }

    /// Rows arrived, in the feed's order.
    pub fn on_rows(&mut self, rows: Vec<Arrived>, now: Instant) {
        if self.leaving {
            return;
        }
        if let Reading::Page { n_rows, .. } = &mut self.reading {
            *n_rows += rows.len();
        }
        for row in rows {
            self.arrive(row);
        }
        self.settle(now);
    }

    fn arrive(&mut self, Arrived { seq, event }: Arrived) {
        let Some(mut event) = event else {
            self.watermark.arrive_finished(seq);
            return;
        };
        if event.conflict.is_some() {
            if self.is_idle_about(&event) {
                self.watermark.arrive_finished(seq);
                return;
            }
            self.conflicted.judge(&mut event);
        }
        if self.was_told(&event) && self.conflicted.agrees(&event) {
            let ordinal = self.watermark.arrive_finished(seq);
            let short = event.row_id().short();
            self.restored.remove(&short);
            self.told.insert(event.doc_key(), short);
            self.note_beyond(ordinal, event.doc_key(), short);
            return;
        }
        let ordinal = self.watermark.arrive(seq);
        if let Some(finished) = self.lanes.arrive(event, ordinal) {
            self.watermark.finish(finished);
        }
    }

    /// Whether an event that is not wanted for itself changes nothing about what is kept of conflicts either.
    fn is_idle_about(&self, event: &Event) -> bool {
        let unwanted = event.conflict.as_ref().is_some_and(|conflict| !conflict.wanted);
        unwanted
            && !event.is_conflicted()
            && !self.conflicted.has(event)
            && self.lanes.newest(&event.doc_id).is_none()
    }

    /// Whether this event is the last thing told about its document. Not "was ever told": when the winner of a
    /// conflict is deleted, a revision told long ago wins again and must be told again.
    fn was_told(&self, event: &Event) -> bool {
        if !event.is_kept() && self.lanes.newest(&event.doc_id).is_some() {
            return false;
        }
        match self.told.last(event.doc_key()) {
            Some(short) => short == event.row_id().short(),
            None => self.restored.contains(&event.row_id().short()),
        }
    }

    /// The request ended as it should, or because we closed it (`closed`). `last_seq` is what CouchDB gave.
    pub fn on_end(&mut self, last_seq: Option<Seq>, pending: Option<u64>, closed: bool, now: Instant) {
        if self.leaving {
            (self.reading, self.next) = (Reading::Idle, Next::Rest);
            return;
        }
        let to_the_end = match self.reading {
            Reading::Page { limit, n_rows } => {
                self.note_rewind(pending, n_rows);
                // Behind the last_seq of a full page a filter may have dropped rows that match (CONTRACT §6).
                n_rows < limit && !closed
            }
            Reading::Waiting { .. } => !closed,
            Reading::Closing | Reading::Idle | Reading::Parked(_) | Reading::Opening => false,
        };
        if to_the_end {
            self.watermark.arrive_finished(last_seq);
            if !std::mem::take(&mut self.restored).is_empty() {
                // The stored checkpoint still names them, and would suppress them after the next start.
                self.beyond.version += 1;
            }
        }
        self.next = match to_the_end {
            true if !self.rests => Next::Wait,
            true if !self.stirred => Next::Rest,
            true | false => Next::Page,
        };
        self.failures = 0;
        self.same_fault = (None, 0);
        self.reading = Reading::Idle;
        self.settle(now);
    }

    fn note_rewind(&mut self, pending: Option<u64>, n_rows: usize) {
        let ahead = pending.unwrap_or(0) + n_rows as u64;
        if std::mem::take(&mut self.first_page)
            && self.clock.stored.as_ref().is_some_and(|(seq, _)| *seq != Seq::zero())
            && ahead > REWOUND_CHANGES.max(self.doc_count / 2)
        {
            self.notices.push(Notice::Rewound { pending: ahead });
        }
    }

    /// Opening or reading failed. Whatever follows begins at the stored checkpoint.
    pub fn on_read_failed(&mut self, fault: ReadFault, now: Instant) {
        if self.leaving {
            (self.reading, self.next) = (Reading::Idle, Next::Rest);
            return;
        }
        self.next = Next::Open;
        if fault == ReadFault::Changed && self.failures == 0 {
            // At once, but not again and again: 1.x gives an idle database another life whenever it opens its file.
            self.failures = 1;
            self.reading = Reading::Idle;
            return;
        }
        self.failures += 1;
        let step = |steps: &[Duration], n: u32| steps[(n as usize - 1).min(steps.len() - 1)];
        let pause = match fault {
            ReadFault::Refused => {
                let at = self.watermark.read_seq().clone();
                let n = if self.same_fault.0.as_ref() == Some(&at) { self.same_fault.1 } else { 0 };
                self.same_fault = (Some(at), n + 1);
                step(&REFUSED_AFTER, n + 1)
            }
            ReadFault::BadPosition => {
                self.position_unknown = true;
                step(&REOPEN_AFTER, self.failures)
            }
            ReadFault::Changed | ReadFault::Lost => step(&REOPEN_AFTER, self.failures),
        };
        self.reading = Reading::Parked(now + pause);
    }

    // --- Finishing ---------------------------------------------------------------------------------------

    /// The delivery `token` is finished: delivered, or its dead letter is stored.
    pub fn on_finished(&mut self, token: u64, now: Instant) {
        let Some(pending) = self.lanes.finish(token) else { return };
        let (doc_key, short) = (pending.event.doc_key(), pending.event.row_id().short());
        self.told.insert(doc_key, short);
        if self.watermark.is_unfinished(pending.ordinal) {
            self.watermark.finish(pending.ordinal);
            self.note_beyond(pending.ordinal, doc_key, short);
        }
        self.settle(now);
    }

    /// The delivery `token` is not to be told after all.
    pub fn on_dropped(&mut self, token: u64, now: Instant) {
        let Some(pending) = self.lanes.finish(token) else { return };
        self.watermark.finish(pending.ordinal);
        self.settle(now);
    }

    /// What has to happen before what waits in this lane may be told. (Of most events nothing ever has.)
    pub fn before(&mut self, lane: LaneIndex) -> Before {
        let Some(pending) = self.lanes.waiting_mut(lane) else { return Before::Tell };
        let is_conflicted = pending.event.is_conflicted();
        match pending.stage {
            Stage::Ready => Before::Tell,
            Stage::Told if is_conflicted => Before::Keep(Owed::Remember),
            Stage::Told => Before::Keep(Owed::Forget),
            Stage::Open if is_conflicted => Before::Keep(Owed::Remember),
            Stage::Open => {
                self.conflicted.judge(Arc::make_mut(&mut pending.event));
                let wanted = pending.event.conflict.as_ref().is_none_or(|conflict| conflict.wanted);
                if !wanted && !self.conflicted.has(&pending.event) {
                    return Before::Drop;
                }
                pending.stage = Stage::Ready;
                Before::Tell
            }
        }
    }

    /// What is to be stored of conflicts before the delivery `token`, which is told, is finished.
    pub fn owed(&mut self, token: u64) -> Option<Owed> {
        let pending = self.lanes.busy_mut(token)?;
        // What stands in a letter is history, but for the row that it may have joined.
        if pending.event.conflict_key().is_none() || !pending.has_row() {
            return None;
        }
        let is_known = self.conflicted.has(&pending.event);
        let owed = match pending.event.is_conflicted() {
            true => {
                let is_new = !is_known && self.watermark.is_unfinished(pending.ordinal);
                (is_new || pending.stage == Stage::Open).then_some(Owed::Remember)
            }
            false => is_known.then_some(Owed::Forget),
        };
        if owed.is_some() {
            pending.stage = Stage::Told;
        }
        owed
    }

    /// Work on what the busy delivery `token` owes begins.
    pub fn on_keeping(&mut self, token: u64, owed: Owed) {
        let Some(pending) = self.lanes.busy_mut(token) else { return };
        // From now on it may be there, also when nobody says so.
        if let (Owed::Remember, Some(key)) = (owed, pending.event.conflict_key()) {
            self.conflicted.insert(key);
        }
    }

    /// It is stored. What was not told yet may go now, unless it is not wanted; what was is finished.
    pub fn on_kept(&mut self, token: u64, owed: Owed, now: Instant) {
        let Some(pending) = self.lanes.busy_mut(token) else { return };
        if let (Owed::Forget, Some(key)) = (owed, pending.event.conflict_key()) {
            self.conflicted.remove(key);
        }
        if pending.stage == Stage::Told {
            return self.on_finished(token, now);
        }
        pending.stage = Stage::Ready;
        match pending.event.conflict.as_ref().is_some_and(|conflict| !conflict.wanted) {
            true => self.on_dropped(token, now),
            false => self.go_on(token, None, now),
        }
    }

    /// The delivery `token` has to be tried again at `at`.
    pub fn on_retry(&mut self, token: u64, at: Instant, now: Instant) {
        self.go_on(token, Some(at), now);
    }

    fn go_on(&mut self, token: u64, at: Option<Instant>, now: Instant) {
        if self.leaving {
            // Unfinished: whoever has the database now reads it again.
            self.lanes.finish(token);
            self.settle(now);
            return;
        }
        if let Some(replaced) = self.lanes.put_back(token, at) {
            self.watermark.finish(replaced);
            self.settle(now);
        }
    }

    /// Whether something newer of this document was told or is about to be, and stands for it.
    pub fn is_superseded(&self, event: &Event) -> bool {
        if event.is_kept() {
            return false;
        }
        self.lanes.newest(&event.doc_id).is_some()
            || self.told.last(event.doc_key()).is_some_and(|short| short != event.row_id().short())
    }

    /// When a delivery that is held back falls due.
    pub fn next_lane_deadline(&self) -> Option<Instant> {
        self.lanes.next_deadline()
    }

    fn note_beyond(&mut self, ordinal: u64, doc_key: u64, short: u64) {
        self.beyond.insert(ordinal, doc_key, short);
    }

    fn settle(&mut self, now: Instant) {
        self.beyond.drop_below(self.watermark.first_unfinished());
        let moved = self.clock.moved(self.watermark.through_seq(), self.beyond.version);
        let idle = self.lanes.is_empty();
        self.clock.settle(moved, idle, now);
    }

    // --- Checkpoints -------------------------------------------------------------------------------------

    /// The checkpoint to store now, if one is due; answered by `on_checkpoint_stored` or `on_checkpoint_failed`.
    pub fn next_checkpoint(&mut self, now: Instant) -> Option<Position> {
        // While a feed is being opened the stored one is being read: one of both would be stale.
        if self.reading == Reading::Opening || !self.clock.is_due(now) {
            return None;
        }
        let mark = self.mark.clone()?;
        let mut delivered: Vec<u64> = self.beyond.shorts().chain(self.restored.iter().copied()).collect();
        delivered.truncate(BEYOND_MAX);
        let through_seq = self.watermark.through_seq().clone();
        self.clock.start(&through_seq, self.beyond.version);
        Some(Position { through_seq, mark, delivered, rev: self.clock.rev.clone() })
    }

    /// When the next checkpoint is due.
    pub fn next_checkpoint_deadline(&self) -> Option<Instant> {
        // While a feed is being opened none is given either.
        let none = self.clock.writing || self.mark.is_none() || self.reading == Reading::Opening;
        if none { None } else { self.clock.deadline() }
    }

    /// Stored, under this `_rev`.
    pub fn on_checkpoint_stored(&mut self, rev: String, now: Instant) {
        self.clock.done(rev);
        self.settle(now);
    }

    /// Not stored; tried again later.
    pub fn on_checkpoint_failed(&mut self, now: Instant) {
        // Whoever waits for the database must not wait for ever: on 1.x a position of before a restart is never stored.
        if self.leaving {
            self.clock.give_up();
            return;
        }
        self.clock.failed(now);
    }

    /// Not stored, and not to be: on 1.x the server was started again since the feed was opened. A feed that is read finds
    /// that out by itself; what rests is opened anew, from the stored checkpoint, and what was told is recognised.
    pub fn on_position_lost(&mut self, now: Instant) {
        self.on_checkpoint_failed(now);
        if self.next == Next::Rest && self.reading == Reading::Idle && !self.leaving {
            self.next = Next::Open;
        }
    }

    /// Whether nothing is to be stored: the checkpoint says all that it could, or there is nothing to say.
    pub fn is_stored(&self) -> bool {
        self.vacant || !self.clock.writing && self.clock.deadline().is_none()
    }

    /// Makes the next checkpoint due now, if anything moved: before a clean end.
    pub fn flush(&mut self, now: Instant) {
        if self.clock.due.is_some() {
            self.clock.due = Some(now);
        }
    }

    /// All up to here is finished.
    pub fn through_seq(&self) -> &Seq {
        self.watermark.through_seq()
    }
}

/// What is finished beyond the watermark, the last of each document.
#[derive(Debug, Default)]
struct Beyond {
    by_ordinal: BTreeMap<u64, (u64, u64)>,
    by_doc: Table<u64, u64>,
    /// Changes with every change.
    version: u64,
}

impl Beyond {
    fn insert(&mut self, ordinal: u64, doc_key: u64, short: u64) {
        if let Some(older) = self.by_doc.insert(doc_key, ordinal) {
            self.by_ordinal.remove(&older);
        }
        self.by_ordinal.insert(ordinal, (doc_key, short));
        self.version += 1;
        if self.by_ordinal.len() > BEYOND_MAX {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        if let Some((ordinal, (doc_key, _))) = self.by_ordinal.pop_first()
            && self.by_doc.get(&doc_key) == Some(&ordinal)
        {
            self.by_doc.remove(&doc_key);
        }
    }

    fn drop_below(&mut self, first_unfinished: u64) {
        while self.by_ordinal.first_key_value().is_some_and(|(ordinal, _)| *ordinal < first_unfinished) {
            self.drop_first();
        }
    }

    fn shorts(&self) -> impl Iterator<Item = u64> {
        self.by_ordinal.values().map(|(_, short)| *short)
    }
}

/// When checkpoints are stored.
#[derive(Debug)]
struct CheckpointClock {
    interval_max: Duration,
    interval: Duration,
    rev: Option<String>,
    /// What the stored one says: position and version of what lies beyond.
    stored: Option<(Seq, u64)>,
    in_progress: Option<(Seq, u64)>,
    writing: bool,
    /// By the interval.
    due: Option<Instant>,
    /// Because nothing is unfinished; moves on with every event.
    quiet_at: Option<Instant>,
}

impl CheckpointClock {
    fn new(interval_max: Duration) -> CheckpointClock {
        CheckpointClock {
            interval_max,
            interval: CHECKPOINT_FIRST.min(interval_max),
            rev: None,
            stored: None,
            in_progress: None,
            writing: false,
            due: None,
            quiet_at: None,
        }
    }

    fn opened(&mut self, rev: Option<String>, through_seq: Option<&Seq>) {
        self.stored = through_seq.map(|through_seq| (through_seq.clone(), 0));
        self.rev = rev;
        (self.due, self.quiet_at) = (None, None);
        self.interval = CHECKPOINT_FIRST.min(self.interval_max);
    }

    fn moved(&self, through_seq: &Seq, beyond: u64) -> bool {
        self.stored.as_ref().is_none_or(|(seq, version)| seq != through_seq || *version != beyond)
    }

    fn settle(&mut self, moved: bool, idle: bool, now: Instant) {
        if !moved {
            (self.due, self.quiet_at) = (None, None);
            return;
        }
        self.due.get_or_insert(now + self.interval);
        self.quiet_at = idle.then_some(now + self.interval / CHECKPOINT_QUIET);
    }

    fn deadline(&self) -> Option<Instant> {
        self.due.into_iter().chain(self.quiet_at).min()
    }

    fn is_due(&self, now: Instant) -> bool {
        !self.writing && self.deadline().is_some_and(|due| due <= now)
    }

    fn start(&mut self, through_seq: &Seq, beyond: u64) {
        self.writing = true;
        (self.due, self.quiet_at) = (None, None);
        self.in_progress = Some((through_seq.clone(), beyond));
    }

    fn done(&mut self, rev: String) {
        self.writing = false;
        self.rev = Some(rev);
        self.stored = self.in_progress.take();
        self.interval = (self.interval * 2).min(self.interval_max);
    }

    /// Not stored, and not to be.
    fn give_up(&mut self) {
        self.writing = false;
        self.in_progress = None;
        (self.due, self.quiet_at) = (None, None);
    }

    fn failed(&mut self, now: Instant) {
        self.writing = false;
        self.in_progress = None;
        self.due = Some(now + self.interval_max.min(Duration::from_secs(1)));
    }
}

#[cfg(test)]
mod tests;
