//! One delivery in progress per document, the newest revision waiting behind it.
//!
//! Guarantees: two deliveries of one document are never open at once; what is sent later was read later; at
//! most one revision per document waits, so a hot document cannot fill the window; events that no newer one replaces
//! (of replications) wait one behind the other. Among documents the order is that of arrival, kept strictly when asked
//! to.

use std::collections::{BTreeMap, VecDeque};
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::time::Instant;

use crate::pure::endpoint::Trial;
use crate::pure::message::{Event, WebhookId};
use crate::pure::slots::Slots;
use crate::pure::table::Table;

/// Names a lane while something of it is unfinished.
pub type LaneIndex = usize;

/// An event that is not finished.
#[derive(Debug)]
pub struct Pending {
    /// What is told.
    pub event: Arc<Event>,
    /// Its place in the feed; of an earlier reading it means nothing any more.
    pub ordinal: u64,
    /// Its place among the lanes, by arrival.
    order: u64,
    /// What it has been through.
    pub trial: Trial,
    /// What `state_db` has to know of it, and when.
    pub stage: Stage,
}

/// Where an event stands between what is told and what is kept of conflicts; every other event is `Ready` for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Something has to be stored, or found out, before it may be told.
    Open,
    /// May be told.
    Ready,
    /// Was told; something has to be stored before it is finished.
    Told,
}

impl Pending {
    /// Whether a row of the feed stands behind it, and not a dead letter alone.
    pub fn has_row(&self) -> bool {
        self.ordinal != NO_ORDINAL
    }
}

#[derive(Debug)]
struct Lane {
    /// Of the document's id.
    hash: u32,
    /// In flight, or being looked up or stored as a dead letter.
    busy: Option<Pending>,
    /// The newest revision that waits; the first of those that nothing replaces.
    waiting: Option<Pending>,
    /// The others of those, in order of arrival.
    behind: VecDeque<Pending>,
    /// Not before then; `None` = in `ready`.
    held_until: Option<Instant>,
    /// When it was last tried, as a count of attempts; 0 = never.
    tried: u64,
}

impl Lane {
    fn new(hash: u32) -> Lane {
        Lane { hash, busy: None, waiting: None, behind: VecDeque::new(), held_until: None, tried: 0 }
    }

    /// The document. No lane is empty.
    fn doc_id(&self) -> Option<&str> {
        self.busy.as_ref().or(self.waiting.as_ref()).map(|pending| pending.event.doc_id.as_str())
    }

    fn newest(&mut self) -> Option<&mut Pending> {
        self.behind.back_mut().or(self.waiting.as_mut()).or(self.busy.as_mut())
    }

    /// The same event read before. One that may be replaced counts only while it is the newest: what won before may
    /// win again, behind another. What a letter tells must bear the same id: it may end a conflict since.
    fn known(&mut self, event: &Event) -> Option<&mut Pending> {
        if event.is_kept() {
            let mut all = self.busy.iter_mut().chain(&mut self.waiting).chain(&mut self.behind);
            return all.find(|pending| pending.event.id == event.id);
        }
        self.newest().filter(|newest| {
            newest.event.row_id() == event.row_id() && (newest.has_row() || newest.event.id == event.id)
        })
    }
}

/// What of the lanes could go out together.
#[derive(Debug)]
pub enum Picked {
    /// This one, and alone: something was held against it.
    Alone(LaneIndex),
    /// These, in order of arrival; perhaps none.
    Fresh {
        /// Which.
        lanes: Vec<LaneIndex>,
        /// What they add to a body.
        bytes: usize,
        /// Another one would not have fitted.
        is_full: bool,
    },
}

/// The lanes of one subscription.
#[derive(Debug, Default)]
pub struct Lanes {
    strict: bool,
    lanes: Open,
    ready: BTreeMap<u64, LaneIndex>,
    held: BTreeMap<(Instant, u64), LaneIndex>,
    busy: Table<u64, LaneIndex>,
    n_pending: usize,
    bytes: usize,
    n_tries: u64,
    n_arrived: u64,
}

impl Lanes {
    /// `strict`: only the event that arrived first may go, over all documents.
    pub fn new(strict: bool) -> Lanes {
        Lanes { strict, ..Lanes::default() }
    }

    /// Unfinished events.
    pub fn len(&self) -> usize {
        self.n_pending
    }

    /// Whether nothing is unfinished.
    pub fn is_empty(&self) -> bool {
        self.n_pending == 0
    }

    /// When the oldest of them was read; looks at every one.
    pub fn oldest(&self) -> Option<jiff::Timestamp> {
        let lanes = self.lanes.iter().map(|(_, lane)| lane);
        let pending = lanes.flat_map(|lane| lane.busy.iter().chain(&lane.waiting).chain(&lane.behind));
        pending.map(|pending| pending.event.read_at).min()
    }

    /// What they weigh, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The id of the newest event of a document that is not finished.
    pub fn newest(&self, doc_id: &str) -> Option<WebhookId> {
        let lane = &self.lanes[self.lanes.find(doc_id)?];
        lane.behind.back().or(lane.waiting.as_ref()).or(lane.busy.as_ref()).map(|pending| pending.event.id)
    }

    /// Takes in an event. Gives the ordinal that this finishes: of the same event read before, or of an older
    /// revision that waited and is replaced.
    pub fn arrive(&mut self, event: Event, ordinal: u64) -> Option<u64> {
        let at = self.lanes.find_or_open(&event.doc_id);
        let lane = &mut self.lanes[at];
        if let Some(known) = lane.known(&event) {
            return Some(std::mem::replace(&mut known.ordinal, ordinal));
        }
        self.n_arrived += 1;
        self.n_pending += 1;
        self.bytes += event.bytes();
        if event.is_kept() && lane.waiting.is_some() {
            let (order, trial) = (self.n_arrived, Trial::default());
            let stage = Stage::Ready;
            lane.behind.push_back(Pending { event: Arc::new(event), ordinal, order, trial, stage });
            return None;
        }
        let queued = lane.busy.is_none() && lane.waiting.is_some();
        if queued {
            self.unqueue(at);
        }
        let lane = &mut self.lanes[at];
        // What is at work may change what is known of the document.
        let is_open = event
            .conflict
            .as_ref()
            .is_some_and(|conflict| event.is_conflicted() || lane.busy.is_some() || !conflict.wanted);
        let (order, trial) = (self.n_arrived, Trial::default());
        let stage = if is_open { Stage::Open } else { Stage::Ready };
        let mut pending = Pending { event: Arc::new(event), ordinal, order, trial, stage };
        let mut finished = None;
        if let Some(old) = lane.waiting.take() {
            pending.trial = old.trial.of_successor();
            if !self.strict {
                pending.order = old.order;
            }
            self.n_pending -= 1;
            self.bytes -= old.event.bytes();
            finished = Some(old.ordinal);
        }
        lane.waiting = Some(pending);
        if lane.busy.is_none() {
            self.queue(at);
        }
        finished
    }

    /// Where a lane with something that waits stands in the queues.
    fn place(&self, at: LaneIndex) -> (Option<Instant>, u64) {
        let lane = &self.lanes[at];
        (lane.held_until, lane.waiting.as_ref().expect("a queued lane has something that waits").order)
    }

    fn queue(&mut self, at: LaneIndex) {
        match self.place(at) {
            (None, order) => self.ready.insert(order, at),
            (Some(until), order) => self.held.insert((until, order), at),
        };
    }

    fn unqueue(&mut self, at: LaneIndex) {
        match self.place(at) {
            (None, order) => self.ready.remove(&order),
            (Some(until), order) => self.held.remove(&(until, order)),
        };
    }

    fn wake(&mut self, now: Instant) {
        while let Some(entry) = self.held.first_entry()
            && entry.key().0 <= now
        {
            let order = entry.key().1;
            let at = entry.remove();
            self.lanes[at].held_until = None;
            self.ready.insert(order, at);
        }
    }

    /// Starts the next delivery that is due, under the name `token`.
    pub fn take(&mut self, now: Instant, token: u64) -> Option<&mut Pending> {
        if !self.can_take(now) {
            return None;
        }
        let at = self.ready.first_key_value().map(|(_, at)| *at)?;
        Some(self.start(at, token))
    }

    /// What is due that could go into one batch: at most `n_max`, together at most `bytes_max`. In strict order nothing is
    /// passed over.
    pub fn pick(&mut self, now: Instant, n_max: usize, bytes_max: usize) -> Picked {
        let (mut lanes, mut bytes, mut is_full) = (Vec::new(), 0, false);
        if !self.can_take(now) {
            return Picked::Fresh { lanes, bytes, is_full };
        }
        let first_held = self.held.keys().map(|(_, order)| *order).min().filter(|_| self.strict);
        for (order, at) in &self.ready {
            let pending = self.lanes[*at].waiting.as_ref().expect("a queued lane has something that waits");
            if first_held.is_some_and(|held| held < *order) {
                break;
            }
            if pending.trial.is_alone() || pending.stage != Stage::Ready {
                if lanes.is_empty() || !self.strict {
                    return Picked::Alone(*at);
                }
                // The order asks for those before it to go now.
                is_full = true;
                break;
            }
            let more = pending.event.body_bytes();
            if lanes.len() == n_max || bytes + more > bytes_max {
                is_full = true;
                break;
            }
            bytes += more;
            lanes.push(*at);
        }
        Picked::Fresh { lanes, bytes, is_full }
    }

    /// What `take` would take.
    pub fn first_ready(&mut self, now: Instant) -> Option<LaneIndex> {
        if !self.can_take(now) {
            return None;
        }
        self.ready.first_key_value().map(|(_, at)| *at)
    }

    /// Starts what waits in a lane that was picked.
    pub fn take_lane(&mut self, at: LaneIndex, token: u64) -> Option<&mut Pending> {
        self.lanes.get(at)?.waiting.as_ref()?;
        Some(self.start(at, token))
    }

    /// What a probe takes: the lane that was tried longest ago, due or not.
    pub fn probe_lane(&self) -> Option<LaneIndex> {
        if !self.can_probe() {
            return None;
        }
        let queued = self.ready.iter().map(|(order, at)| (*order, *at));
        let queued = queued.chain(self.held.iter().map(|((_, order), at)| (*order, *at)));
        let strict = self.strict;
        queued
            .min_by_key(|(order, at)| (if strict { 0 } else { self.lanes[*at].tried }, *order))
            .map(|(_, at)| at)
    }

    /// What waits in a lane.
    pub fn waiting_mut(&mut self, at: LaneIndex) -> Option<&mut Pending> {
        self.lanes.get_mut(at)?.waiting.as_mut()
    }

    /// Changes the event of a busy delivery.
    pub fn amend(&mut self, token: u64, change: impl FnOnce(&mut Event)) {
        let Some(pending) = self.busy_mut(token) else { return };
        let before = pending.event.bytes();
        change(Arc::make_mut(&mut pending.event));
        let after = pending.event.bytes();
        self.bytes = self.bytes - before + after;
    }

    fn start(&mut self, at: LaneIndex, token: u64) -> &mut Pending {
        self.unqueue(at);
        self.n_tries += 1;
        self.busy.insert(token, at);
        let lane = &mut self.lanes[at];
        lane.held_until = None;
        lane.tried = self.n_tries;
        lane.busy = lane.waiting.take();
        lane.waiting = lane.behind.pop_front();
        lane.busy.as_mut().expect("a queued lane has something that waits")
    }

    /// The delivery of this name, while it is busy.
    pub fn busy_mut(&mut self, token: u64) -> Option<&mut Pending> {
        let at = *self.busy.get(&token)?;
        self.lanes[at].busy.as_mut()
    }

    /// The delivery is finished, one way or another; what waits behind it may go.
    pub fn finish(&mut self, token: u64) -> Option<Pending> {
        let at = self.busy.remove(&token)?;
        let lane = &mut self.lanes[at];
        let pending = lane.busy.take().expect("a busy lane has something busy");
        self.n_pending -= 1;
        self.bytes -= pending.event.bytes();
        if lane.waiting.is_some() {
            self.queue(at);
        } else {
            self.lanes.close(at);
        }
        Some(pending)
    }

    /// The delivery has to be tried again at `until`. Gives the ordinal that this finishes, when a newer revision
    /// waits and takes its place.
    pub fn retry(&mut self, token: u64, until: Instant) -> Option<u64> {
        self.put_back(token, Some(until))
    }

    /// As [`Lanes::retry`]; without a time it may go at once.
    pub fn put_back(&mut self, token: u64, until: Option<Instant>) -> Option<u64> {
        let at = self.busy.remove(&token)?;
        let lane = &mut self.lanes[at];
        let pending = lane.busy.take().expect("a busy lane has something busy");
        let finished = match lane.waiting.take() {
            Some(newer) if pending.event.is_kept() => {
                lane.behind.push_front(newer);
                lane.waiting = Some(pending);
                None
            }
            Some(newer) => {
                self.n_pending -= 1;
                self.bytes -= pending.event.bytes();
                lane.waiting = Some(Pending { trial: pending.trial.of_successor(), ..newer });
                Some(pending.ordinal)
            }
            None => {
                lane.waiting = Some(pending);
                None
            }
        };
        lane.held_until = until;
        self.queue(at);
        finished
    }

    /// Everything that is held back may go: the endpoint recovered.
    pub fn release(&mut self) {
        for ((_, order), at) in std::mem::take(&mut self.held) {
            self.lanes[at].held_until = None;
            self.ready.insert(order, at);
        }
    }

    /// Forgets all that waits and may be replaced; what is busy stays until its outcome.
    pub fn forget_waiting(&mut self) {
        self.ready.clear();
        self.held.clear();
        let all: Vec<LaneIndex> = self.lanes.iter().map(|(at, _)| at).collect();
        for at in all {
            let lane = &mut self.lanes[at];
            lane.held_until = None;
            if let Some(old) = lane.waiting.take_if(|old| !old.event.is_kept()) {
                self.n_pending -= 1;
                self.bytes -= old.event.bytes();
            }
            match (&lane.busy, &lane.waiting) {
                (None, Some(kept)) => {
                    self.ready.insert(kept.order, at);
                }
                (None, None) => self.lanes.close(at),
                (Some(_), _) => {}
            }
        }
    }

    /// Trials of what is held back, to be judged again when other events were delivered.
    pub fn held(&self) -> impl Iterator<Item = (LaneIndex, &Trial)> {
        self.held.values().filter_map(|at| Some((*at, &self.lanes[*at].waiting.as_ref()?.trial)))
    }

    /// Trials of everything unfinished but the delivery `token`.
    pub fn trials_beside(&self, token: u64) -> impl Iterator<Item = &Trial> {
        let but = self.busy.get(&token).copied();
        self.lanes.iter().flat_map(move |(at, lane)| {
            let busy = lane.busy.as_ref().filter(|_| Some(at) != but);
            busy.into_iter().chain(&lane.waiting).map(|pending| &pending.trial)
        })
    }

    /// Makes a held lane busy without an attempt, to store its dead letter.
    pub fn take_held(&mut self, at: LaneIndex, token: u64) -> Option<&mut Pending> {
        self.lanes.get(at)?.held_until?;
        Some(self.start(at, token))
    }

    /// When something held back falls due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.held.first_key_value().map(|((at, _), _)| *at)
    }

    /// Whether `take` would give something at `now`.
    pub fn can_take(&mut self, now: Instant) -> bool {
        self.wake(now);
        let Some((order, _)) = self.ready.first_key_value() else { return false };
        !self.strict || (self.busy.is_empty() && self.held.keys().all(|(_, held)| held > order))
    }

    /// Whether `take_probe` would give something.
    pub fn can_probe(&self) -> bool {
        (!self.ready.is_empty() || !self.held.is_empty()) && (!self.strict || self.busy.is_empty())
    }

    /// Whether every event at work came before every one that waits.
    #[cfg(test)]
    pub fn keeps_order(&self) -> bool {
        let busy = self.lanes.iter().filter_map(|(_, lane)| Some(lane.busy.as_ref()?.order)).max();
        let waiting = self.lanes.iter().filter_map(|(_, lane)| Some(lane.waiting.as_ref()?.order)).min();
        busy.zip(waiting).is_none_or(|(busy, waiting)| busy < waiting)
    }

    /// Opens a lane for a dead letter that is sent again. The document must have no lane.
    pub fn start_replay(&mut self, event: Event, token: u64) -> &mut Pending {
        self.n_pending += 1;
        self.bytes += event.bytes();
        let at = self.lanes.find_or_open(&event.doc_id);
        self.busy.insert(token, at);
        let lane = &mut self.lanes[at];
        assert!(lane.busy.is_none() && lane.waiting.is_none(), "a replay starts in an empty lane");
        lane.busy.insert(Pending {
            event: Arc::new(event),
            ordinal: NO_ORDINAL,
            order: 0,
            trial: Trial::default(),
            stage: Stage::Ready,
        })
    }
}

/// The lanes that there are, by place and by document.
#[derive(Debug, Default)]
struct Open {
    /// Boxed: those that are gone leave little.
    lanes: Vec<Option<Box<Lane>>>,
    /// Places of those that are gone.
    free: Vec<LaneIndex>,
    slots: Slots,
}

impl Open {
    fn find(&self, doc_id: &str) -> Option<LaneIndex> {
        self.find_hashed(self.slots.hash(doc_id), doc_id)
    }

    fn find_hashed(&self, hash: u32, doc_id: &str) -> Option<LaneIndex> {
        self.slots.find(hash, |at| self[at].doc_id() == Some(doc_id))
    }

    /// Whoever opens a lane puts something into it.
    fn find_or_open(&mut self, doc_id: &str) -> LaneIndex {
        let hash = self.slots.hash(doc_id);
        self.find_hashed(hash, doc_id).unwrap_or_else(|| {
            let at = self.free.pop().unwrap_or(self.lanes.len());
            if at == self.lanes.len() {
                self.lanes.push(None);
            }
            self.lanes[at] = Some(Box::new(Lane::new(hash)));
            self.slots.insert(hash, at);
            at
        })
    }

    fn close(&mut self, at: LaneIndex) {
        let lane = self.lanes[at].take().expect("it is open");
        self.slots.remove(lane.hash, at);
        self.free.push(at);
    }

    fn get_mut(&mut self, at: LaneIndex) -> Option<&mut Lane> {
        self.lanes.get_mut(at)?.as_deref_mut()
    }

    fn get(&self, at: LaneIndex) -> Option<&Lane> {
        self.lanes.get(at)?.as_deref()
    }

    fn iter(&self) -> impl Iterator<Item = (LaneIndex, &Lane)> {
        self.lanes.iter().enumerate().filter_map(|(at, lane)| Some((at, lane.as_deref()?)))
    }
}

impl Index<LaneIndex> for Open {
    type Output = Lane;

    fn index(&self, at: LaneIndex) -> &Lane {
        self.lanes[at].as_deref().expect("who names a lane keeps it open")
    }
}

impl IndexMut<LaneIndex> for Open {
    fn index_mut(&mut self, at: LaneIndex) -> &mut Lane {
        self.lanes[at].as_deref_mut().expect("who names a lane keeps it open")
    }
}

/// Of a replay: no place in any feed.
const NO_ORDINAL: u64 = u64::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pure::about::About;
    use crate::pure::conflict::Standing;
    use crate::pure::message::EventDoc;
    use crate::sys;

    /// The `n`th thing told of `doc_id`.
    fn event(doc_id: &str, n: u32, is_kept: bool) -> Event {
        let data = n.to_string().into_boxed_str();
        let about = About { event_type: "x", subject: doc_id.into(), message: String::new(), data, is_kept };
        Event {
            id: WebhookId::of(&(doc_id, n)),
            doc_id: doc_id.into(),
            rev: String::new(),
            conflicts: Vec::new(),
            deleted: false,
            seq: None,
            doc: EventDoc::Absent,
            line: None,
            about: Some(Box::new(about)),
            standing: Standing::Plain,
            conflict: None,
            read_at: jiff::Timestamp::UNIX_EPOCH,
        }
    }

    fn take(lanes: &mut Lanes, token: u64) -> Option<String> {
        let pending = lanes.take(sys::now(), token)?;
        Some(pending.event.about.as_ref().unwrap().data.to_string())
    }

    #[test]
    fn what_nothing_replaces_goes_one_by_one_in_order_whatever_fails_and_is_read_again() {
        for strict in [false, true] {
            let mut lanes = Lanes::new(strict);
            for n in 1..=4 {
                assert_eq!(lanes.arrive(event("a", n, true), u64::from(n)), None);
            }
            assert_eq!((lanes.len(), take(&mut lanes, 1).as_deref()), (4, Some("1")));
            assert_eq!(take(&mut lanes, 2), None, "one at a time");
            assert_eq!(lanes.retry(1, sys::now()), None);
            // The feed is read anew from the first on.
            for n in 1..=5 {
                let before = lanes.arrive(event("a", n, true), u64::from(10 + n));
                assert_eq!(before, (n < 5).then_some(u64::from(n)));
            }
            for n in 1..=5_u32 {
                assert_eq!(take(&mut lanes, 100), Some(n.to_string()), "strict: {strict}");
                assert_eq!(lanes.finish(100).unwrap().ordinal, u64::from(10 + n));
            }
            assert!(lanes.is_empty() && lanes.bytes() == 0);
        }
    }

    #[test]
    fn of_a_document_only_the_newest_waits() {
        let mut lanes = Lanes::new(false);
        assert_eq!(lanes.arrive(event("a", 1, false), 1), None);
        assert_eq!(lanes.arrive(event("a", 2, false), 2), Some(1));
        assert_eq!((lanes.len(), take(&mut lanes, 1).as_deref()), (1, Some("2")));
    }

    #[test]
    fn forgetting_what_waits_keeps_what_nothing_replaces() {
        let mut lanes = Lanes::new(false);
        for (doc_id, is_kept) in [("a", true), ("b", false)] {
            for n in 1..=2 {
                lanes.arrive(event(doc_id, n, is_kept), u64::from(n));
            }
        }
        lanes.forget_waiting();
        assert_eq!(lanes.len(), 2);
        assert_eq!((take(&mut lanes, 1).as_deref(), take(&mut lanes, 2)), (Some("1"), None));
        lanes.finish(1);
        assert_eq!(take(&mut lanes, 2).as_deref(), Some("2"));
    }
}
