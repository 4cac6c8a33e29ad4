//! One webhook, whole: its subscriptions and its endpoint, driven together.
//!
//! The shell feeds inputs (`on_*`), then takes [`Action`]s with [`Dispatch::poll`] until the next deadline.
//! Everything that decides is here or below, so that a simulation can run it through crashes that no machine
//! would show in a year.

pub mod batches;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pure::conflict::{LeafDocs, Owed, Standing};
use crate::pure::dispatch::batches::{Batch, Batching, Next};
use crate::pure::endpoint::{self, Class, Endpoint, LetterClass, Moment, Outcome, Settings, Start, Verdict};
use crate::pure::flow::{self, Before, Flow, Opened, Position, Read, ReadFault};
use crate::pure::lanes::LaneIndex;
use crate::pure::message::{self, Arrived, Event, doc_key};
use crate::pure::seq::Seq;
use crate::pure::table::Table;

/// What one of the flows that rest may take of the window, which others need, too: 1 of so many parts.
const SHARES: usize = 4;
/// Payload a webhook may hold, in bytes; one event is always let in.
const WINDOW_BYTES: usize = 16 << 20;
/// A dead letter, or a look-up, that failed is tried again after this.
const STORE_AGAIN: Duration = Duration::from_secs(5);
/// After `retry_schedule`, a suspect is replayed this often ...
const REPLAY_EVERY: Duration = Duration::from_secs(3600);
/// ... for this long.
const REPLAY_FOR: Duration = Duration::from_secs(24 * 3600);
/// Letters that an operator sends again: at work at a time ...
pub const ASKED_MAX: usize = 32;
/// ... and of them with their document in memory, waiting for their turn.
const ASKED_READY_MAX: usize = 8;
/// When the document of one could not be read, it is read again after this.
const FETCH_AGAIN: Duration = Duration::from_secs(5);

/// A subscription, by its place in the list given at the start.
pub type FlowIndex = usize;

/// What the shell has to do. Every one but `Close` and `Say` is answered by the input named.
#[derive(Debug)]
pub enum Action {
    /// `on_opened` / `on_rows`, `on_end` / `on_read_failed`.
    Read(FlowIndex, Read),
    /// End what `Read` opened; its own answer still comes.
    Close(FlowIndex),
    /// One request to the endpoint: `on_outcome` or `on_given_back`.
    Attempt(Attempt),
    /// One request that tells several events, answered likewise.
    Batch(Batch),
    /// Is there a dead letter of this event: `on_looked_up`.
    LookUp(Attempt),
    /// `on_letter`.
    StoreLetter(Attempt, LetterClass),
    /// Store, or delete, that the event's document is conflicted: `on_kept`.
    Keep(Attempt, Owed),
    /// The suspect with this id was delivered after all, its letter goes. Not answered.
    DeleteLetter(message::WebhookId),
    /// The document as it is now, of a suspect to be sent again: `on_fetched`.
    Fetch(FlowIndex, SuspectLetter),
    /// What came of a letter that [`Dispatch::ask_replay`] was about. Not answered.
    Replayed(message::WebhookId, Replayed),
    /// `on_checkpoint`.
    StoreCheckpoint(FlowIndex, Position),
    /// This flow rests, and nobody needs it: `release` it.
    LetGo(FlowIndex),
    /// A line for the log.
    Say(Notice),
}

/// One delivery at work.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Names it in the answer.
    pub token: u64,
    /// Its subscription.
    pub flow: FlowIndex,
    /// What is told.
    pub event: Arc<Event>,
    /// Attempts of this event in this process, this one included.
    pub attempt: u32,
    /// Whether a dead letter is sent again.
    pub replay: bool,
}

/// What is to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// About the endpoint.
    Endpoint(endpoint::Notice),
    /// About a subscription.
    Flow(FlowIndex, flow::Notice),
    /// A dead letter was stored.
    Letter(FlowIndex, message::WebhookId, LetterClass),
    /// One could not be stored; it stays undelivered and is tried again.
    LetterFailed(FlowIndex, message::WebhookId),
}

/// What a token stands for.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// A delivery; the way back from it.
    Attempt { flow: FlowIndex, replay: bool },
    /// Looking for its letter; when to try again if there is none.
    LookUp { flow: FlowIndex, retry_at: Instant },
    /// Storing its letter.
    Letter { flow: FlowIndex, class: LetterClass },
    /// Storing or deleting that its document is conflicted.
    Keep { flow: FlowIndex, owed: Owed },
}

/// A stored dead letter of class `suspect`, by reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuspectLetter {
    /// Its id, the letter's own.
    pub id: message::WebhookId,
    /// The document that it is about.
    pub doc_id: String,
    /// Of `document.resolved`: the revision that won.
    pub resolved: Option<String>,
}

/// What an operator wants of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Send it although a newer revision was delivered.
    pub even_if_superseded: bool,
}

/// What came of a letter that an operator sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// 2xx; its letter goes.
    Delivered,
    /// A newer revision was delivered, this one where it is known. The letter stays.
    Superseded(Option<String>),
    /// The endpoint refuses it still. The letter stays.
    Refused,
    /// The endpoint failed at it again and again. The letter stays.
    Failed,
    /// There is no such document any more. The letter stays.
    Gone,
    /// CouchDB does not give the document, and will not the next time; why. The letter stays.
    Unreadable(String),
}

/// A dead letter to be sent again: a suspect, by ourselves; any, because an operator asked.
#[derive(Debug)]
struct Suspect {
    flow: FlowIndex,
    letter: SuspectLetter,
    failures: u32,
    replay_at: Instant,
    until: Instant,
    state: Replay,
    asked: Option<Asked>,
}

#[derive(Debug)]
enum Replay {
    /// Until `replay_at`.
    Resting,
    /// The document is being read.
    Fetching,
    /// It is still what the letter is about; waits for its turn.
    Ready(Box<Event>),
    /// In flight under this token.
    Sent(u64),
}

/// The machine.
#[derive(Debug)]
pub struct Dispatch {
    endpoint: Endpoint,
    flows: Vec<Flow>,
    retry_schedule: Vec<Duration>,
    work: Table<u64, Work>,
    batching: Option<Batching>,
    /// Batches in flight: the tokens of their parts.
    batches: Table<u64, Vec<(u64, FlowIndex)>>,
    /// Since when something could go that waits for company.
    batch_since: Option<Instant>,
    suspects: Vec<Suspect>,
    next_token: u64,
    /// Where the next round over the flows begins, for fairness.
    turn: usize,
    /// The same, over those that rest, for reading.
    read_turn: usize,
    /// How many of those that rest may read at a time.
    readings_max: usize,
    /// Places of flows that were let go.
    vacant: Vec<FlowIndex>,
    /// No reading and no deliveries: paused, or being stopped.
    halted: bool,
    said: Vec<Notice>,
    /// What inputs asked for, until the next poll.
    outbox: Vec<Action>,
    /// Deliveries when suspects were last looked for.
    judged_at: u64,
    /// The process had no delivery to spare; the shell polls again when it has.
    starved: bool,
    /// Between two letters that an operator sends again.
    replay_pause: Duration,
    /// Not before then, ...
    next_asked_at: Option<Instant>,
    /// ... which one waits for.
    is_paced: bool,
    /// A letter waits for the endpoint, and for nothing else.
    replay_waits: bool,
    /// The last delivery that started was a letter that an operator sends again.
    last_was_asked: bool,
    /// Nothing is read: only letters are sent again.
    only_replays: bool,
}

impl Dispatch {
    /// Starts with nothing read.
    pub fn new(settings: Settings, flows: Vec<Flow>, now: Instant) -> Dispatch {
        Dispatch {
            retry_schedule: settings.retry_schedule.clone(),
            batching: settings.batching,
            batches: Table::default(),
            batch_since: None,
            endpoint: Endpoint::new(settings, now),
            vacant: (0..flows.len()).filter(|place| flows[*place].is_vacant()).collect(),
            flows,
            work: Table::default(),
            suspects: Vec::new(),
            next_token: 1,
            turn: 0,
            read_turn: 0,
            readings_max: 0,
            halted: false,
            said: Vec::new(),
            outbox: Vec::new(),
            judged_at: 0,
            starved: false,
            replay_pause: Duration::ZERO,
            next_asked_at: None,
            is_paced: false,
            replay_waits: false,
            last_was_asked: false,
            only_replays: false,
        }
    }

    /// Reads nothing, ever: for whoever only sends letters again.
    pub fn only_replays(&mut self) {
        self.only_replays = true;
    }

    /// Flows that [rest](Flow::resting) read so many at a time.
    pub fn set_readings_max(&mut self, readings_max: usize) {
        self.readings_max = readings_max;
    }

    /// One more subscription, which rests; its place. It is to be let go when [`Action::LetGo`] says so.
    pub fn add(&mut self, flow: Flow) -> FlowIndex {
        debug_assert!(flow.rests(), "others are there from the start, and stay");
        match self.vacant.pop() {
            Some(place) => {
                self.flows[place] = flow;
                place
            }
            None => {
                self.flows.push(flow);
                self.flows.len() - 1
            }
        }
    }

    /// Forgets a subscription that rests; its place is another's from now on.
    pub fn release(&mut self, flow: FlowIndex) {
        debug_assert!(self.flows[flow].is_told(), "what was read of it is told");
        self.flows[flow] = Flow::vacant();
        self.vacant.push(flow);
    }

    /// Lets a database go to somebody else; [`Action::LetGo`] says when nothing of it is under way any more. Letters of it
    /// that we would send again by ourselves are left to whoever starts with it next.
    pub fn leave(&mut self, flow: FlowIndex) {
        self.flows[flow].leave();
        self.leave_letters(flow);
    }

    /// Ends what is to be sent again of a database that is left, but for what is in flight or being read.
    fn leave_letters(&mut self, flow: FlowIndex) {
        let mut at = 0;
        while at < self.suspects.len() {
            let suspect = &self.suspects[at];
            if suspect.flow != flow || matches!(suspect.state, Replay::Sent(_) | Replay::Fetching) {
                at += 1;
            } else if suspect.asked.is_some() {
                let why = "another daemon tells its database now".to_owned();
                self.end_asked(at, Replayed::Unreadable(why));
            } else {
                self.drop_suspect(at);
            }
        }
    }

    /// A database is gone, and with it what its letters are about: they stay as they are.
    pub fn on_database_gone(&mut self, flow: FlowIndex) {
        let mut at = 0;
        while at < self.suspects.len() {
            let suspect = &self.suspects[at];
            if suspect.flow != flow || matches!(suspect.state, Replay::Sent(_) | Replay::Ready(_)) {
                at += 1;
            } else if suspect.asked.is_some() {
                self.end_asked(at, Replayed::Gone);
            } else {
                self.drop_suspect(at);
            }
        }
    }

    /// There may be something new in a database.
    pub fn stir(&mut self, flow: FlowIndex) {
        self.flows[flow].stir();
    }

    /// Whether a letter of this subscription is to be sent again: then its flow stays.
    pub fn is_pinned(&self, flow: FlowIndex) -> bool {
        self.suspects.iter().any(|suspect| suspect.flow == flow)
    }

    /// Stops reading and delivering; what is in flight still comes back.
    pub fn halt(&mut self) {
        self.halted = true;
    }

    /// Deliveries in flight.
    pub fn n_in_flight(&self) -> usize {
        self.endpoint.n_in_flight()
    }

    /// The endpoint, for whoever shows its state.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Unfinished events over all databases.
    pub fn n_pending(&self) -> usize {
        self.flows.iter().map(Flow::n_pending).sum()
    }

    /// When the oldest of them was read.
    pub fn oldest(&self) -> Option<jiff::Timestamp> {
        self.flows.iter().filter_map(Flow::oldest).min()
    }

    /// What they weigh, in bytes.
    pub fn bytes(&self) -> usize {
        self.flows.iter().map(Flow::bytes).sum()
    }

    /// A subscription, for whoever looks.
    pub fn flow(&self, flow: FlowIndex) -> &Flow {
        &self.flows[flow]
    }

    /// Whether every checkpoint says all that it could.
    pub fn is_stored(&self) -> bool {
        self.only_replays || self.flows.iter().all(Flow::is_stored)
    }

    /// Makes all checkpoints due that moved.
    pub fn flush(&mut self, now: Instant) {
        self.flows.iter_mut().for_each(|flow| flow.flush(now));
    }

    /// Suspects known from the store at the start, to be counted and replayed.
    pub fn restore_suspects(&mut self, letters: Vec<(FlowIndex, SuspectLetter)>, now: Instant) {
        for (flow, letter) in letters {
            self.add_suspect(flow, letter, now);
        }
        self.count_suspects();
    }

    /// Whether we send this letter again already.
    pub fn is_suspect(&self, id: &message::WebhookId) -> bool {
        self.suspects.iter().any(|suspect| suspect.letter.id == *id)
    }

    // --- Inputs ------------------------------------------------------------------------------------------

    /// Answer to [`Read::Open`].
    pub fn on_opened(&mut self, flow: FlowIndex, opened: Opened) {
        self.flows[flow].on_opened(opened);
    }

    /// Rows of a page or an open request.
    pub fn on_rows(&mut self, flow: FlowIndex, rows: Vec<Arrived>, now: Instant) {
        self.flows[flow].on_rows(rows, now);
    }

    /// The request ended well, or because of [`Action::Close`] (`closed`).
    pub fn on_end(
        &mut self,
        flow: FlowIndex,
        last_seq: Option<Seq>,
        pending: Option<u64>,
        closed: bool,
        now: Instant,
    ) {
        self.flows[flow].on_end(last_seq, pending, closed, now);
    }

    /// The request, or the opening, failed.
    pub fn on_read_failed(&mut self, flow: FlowIndex, fault: ReadFault, now: Instant) {
        self.flows[flow].on_read_failed(fault, now);
    }

    /// Answer to [`Action::StoreCheckpoint`]: the new `_rev`, or `None`.
    pub fn on_checkpoint(&mut self, flow: FlowIndex, rev: Option<String>, now: Instant) {
        match rev {
            Some(rev) => self.flows[flow].on_checkpoint_stored(rev, now),
            None => self.flows[flow].on_checkpoint_failed(now),
        }
    }

    /// The same: it is not stored, and never will be, for the server is not the one that the position was read from.
    pub fn on_position_lost(&mut self, flow: FlowIndex, now: Instant) {
        self.flows[flow].on_position_lost(now);
    }

    /// What came of an attempt.
    pub fn on_outcome(&mut self, token: u64, outcome: Outcome, at: Moment) {
        let now = at.now;
        let Some(Work::Attempt { flow, replay }) = self.work.remove(&token) else {
            self.on_batch_outcome(token, outcome, at);
            return;
        };
        if replay {
            self.on_replayed(flow, token, outcome, at);
            return;
        }
        let left = self.only_left_overs_beside(token);
        let pending = self.flows[flow].lanes().busy_mut(token).expect("an attempt's lane is busy");
        let event = Arc::clone(&pending.event);
        let lane = lane_key(flow, &event);
        let mut trial = pending.trial;
        let verdict = self.endpoint.on_outcome(token, &mut trial, lane, outcome, left, at);
        if let Some(pending) = self.flows[flow].lanes().busy_mut(token) {
            pending.trial = trial;
        }
        match verdict {
            Verdict::Delivered => self.finish(flow, token, now),
            Verdict::RetryAt(at) => self.flows[flow].on_retry(token, at, now),
            Verdict::LookUp(retry_at) => {
                self.work.insert(token, Work::LookUp { flow, retry_at });
                self.outbox.push(Action::LookUp(attempt(token, flow, event, trial.attempts)));
            }
            Verdict::DeadLetter(class) => self.store_letter(token, flow, event, trial.attempts, class),
        }
    }

    /// The attempt was not made, or not finished, because we are being stopped.
    pub fn on_given_back(&mut self, token: u64, now: Instant) {
        let Some(Work::Attempt { flow, replay }) = self.work.remove(&token) else {
            self.on_batch_given_back(token, now);
            return;
        };
        self.endpoint.on_given_back(token);
        if replay {
            self.end_replay(flow, token, false, now);
            self.rest_suspect(token, now);
        } else {
            self.flows[flow].on_retry(token, now, now);
        }
    }

    /// Answer to [`Action::LookUp`]; `None` when it could not be found out.
    pub fn on_looked_up(&mut self, token: u64, exists: Option<bool>, now: Instant) {
        let Some(Work::LookUp { flow, retry_at }) = self.work.remove(&token) else { return };
        match exists {
            Some(true) => self.finish(flow, token, now),
            Some(false) => self.flows[flow].on_retry(token, retry_at, now),
            None => {
                if let Some(pending) = self.flows[flow].lanes().busy_mut(token) {
                    pending.trial.look_up_again();
                }
                self.flows[flow].on_retry(token, retry_at, now);
            }
        }
    }

    /// Answer to [`Action::StoreLetter`].
    pub fn on_letter(&mut self, token: u64, stored: bool, now: Instant) {
        let Some(Work::Letter { flow, class }) = self.work.remove(&token) else { return };
        let Some(pending) = self.flows[flow].lanes().busy_mut(token) else { return };
        let event = Arc::clone(&pending.event);
        if stored {
            self.said.push(Notice::Letter(flow, event.id, class));
            if class == LetterClass::Suspect {
                let resolved = (event.standing == Standing::Resolved).then(|| event.rev.clone());
                let (id, doc_id) = (event.id, event.doc_id.clone());
                self.add_suspect(flow, SuspectLetter { id, doc_id, resolved }, now);
            }
            self.finish(flow, token, now);
        } else {
            self.said.push(Notice::LetterFailed(flow, event.id));
            if class == LetterClass::Suspect {
                self.count_suspects();
            }
            self.flows[flow].on_retry(token, now + STORE_AGAIN, now);
        }
    }

    /// Answer to [`Action::Keep`]: the leaves' bodies where they were to be read, or `None` when it was not done.
    pub fn on_kept(&mut self, token: u64, docs: Option<LeafDocs>, now: Instant) {
        let Some(Work::Keep { flow, owed }) = self.work.remove(&token) else { return };
        match docs {
            Some(docs) => {
                if docs != LeafDocs::Unread {
                    self.flows[flow].lanes().amend(token, |event| {
                        if let Some(conflict) = &mut event.conflict {
                            conflict.docs = docs;
                        }
                    });
                }
                self.flows[flow].on_kept(token, owed, now);
            }
            None => self.flows[flow].on_retry(token, now + STORE_AGAIN, now),
        }
    }

    /// The delivery is told, or its letter stored: it is finished as soon as what that means for its document is kept.
    fn finish(&mut self, flow: FlowIndex, token: u64, now: Instant) {
        match self.flows[flow].owed(token) {
            Some(owed) => self.keep(flow, token, owed),
            None => self.flows[flow].on_finished(token, now),
        }
    }

    fn keep(&mut self, flow: FlowIndex, token: u64, owed: Owed) {
        self.flows[flow].on_keeping(token, owed);
        let Some(pending) = self.flows[flow].lanes().busy_mut(token) else { return };
        let attempt = attempt(token, flow, Arc::clone(&pending.event), pending.trial.attempts);
        self.work.insert(token, Work::Keep { flow, owed });
        self.outbox.push(Action::Keep(attempt, owed));
    }

    /// Does what has to be done before the event that waits in a lane is told; whether there was anything.
    fn prepare(&mut self, flow: FlowIndex, lane: LaneIndex, now: Instant) -> bool {
        let before = self.flows[flow].before(lane);
        if before == Before::Tell {
            return false;
        }
        let token = self.token();
        self.flows[flow].lanes().take_lane(lane, token).expect("something waits in it");
        match before {
            Before::Keep(owed) => self.keep(flow, token, owed),
            Before::Drop | Before::Tell => self.flows[flow].on_dropped(token, now),
        }
        true
    }

    // --- Outputs -----------------------------------------------------------------------------------------

    /// Everything that is to be done now. `bytes_free`: what the process still has room for; `permit`: asks for
    /// one of the process's deliveries, given back by the shell after the attempt.
    pub fn poll(
        &mut self,
        now: Instant,
        bytes_free: usize,
        jitter: f64,
        permit: &mut dyn FnMut() -> bool,
        actions: &mut Vec<Action>,
    ) {
        self.endpoint.on_time(now);
        self.starved = false;
        actions.append(&mut self.outbox);
        // Before an endpoint that recovered releases what is held back: it may be what made it look bad.
        self.judge_held(Moment { now, jitter });
        self.say_endpoint();
        for flow in 0..self.flows.len() {
            if self.flows[flow].is_leaving() {
                self.leave_letters(flow);
            }
        }
        if !self.halted {
            self.poll_replays(now, permit, actions);
            self.poll_attempts(now, permit, actions);
            actions.append(&mut self.outbox);
        }
        self.poll_reads(now, bytes_free, actions);
        for flow in 0..self.flows.len() {
            if let Some(position) = self.flows[flow].next_checkpoint(now) {
                actions.push(Action::StoreCheckpoint(flow, position));
            }
            for notice in self.flows[flow].take_notices() {
                self.said.push(Notice::Flow(flow, notice));
            }
            let is_over = self.flows[flow].is_at_rest() && !self.flows[flow].is_vacant();
            if is_over && !self.is_pinned(flow) {
                actions.push(Action::LetGo(flow));
            }
        }
        actions.extend(self.said.drain(..).map(Action::Say));
    }

    fn say_endpoint(&mut self) {
        for notice in self.endpoint.take_notices() {
            if notice == endpoint::Notice::Up {
                self.flows.iter_mut().for_each(|flow| flow.lanes().release());
            }
            self.said.push(Notice::Endpoint(notice));
        }
    }

    fn poll_attempts(&mut self, now: Instant, permit: &mut dyn FnMut() -> bool, actions: &mut Vec<Action>) {
        loop {
            let start = self.endpoint.may_start(now);
            if start == Start::No {
                return;
            }
            let next = match self.batching {
                Some(batching) if start == Start::Go => self.next_batch(batching, now),
                Some(_) | None => match self.next_flow(start, now) {
                    Some(flow) => Next::Of(flow),
                    None => Next::Nothing,
                },
            };
            let (flow, lane) = match next {
                Next::Of(flow) => {
                    let lanes = self.flows[flow].lanes();
                    let lane =
                        if start == Start::Probe { lanes.probe_lane() } else { lanes.first_ready(now) };
                    (flow, lane.expect("the flow said that it has one"))
                }
                Next::One(flow, lane) => (flow, lane),
                Next::Batch(_) if !permit() => {
                    self.starved = true;
                    return;
                }
                Next::Batch(lanes) => {
                    self.start_batch(lanes, now, actions);
                    continue;
                }
                Next::Nothing => return,
            };
            if self.prepare(flow, lane, now) {
                continue;
            }
            if !permit() {
                self.starved = true;
                return;
            }
            self.batch_since = None;
            let token = self.token();
            let pending = self.flows[flow].lanes().take_lane(lane, token);
            let pending = pending.expect("something waits in it");
            self.endpoint.on_start(token, &mut pending.trial, now);
            let attempt = attempt(token, flow, Arc::clone(&pending.event), pending.trial.attempts);
            self.work.insert(token, Work::Attempt { flow, replay: false });
            self.last_was_asked = false;
            self.turn = flow + 1;
            actions.push(Action::Attempt(attempt));
        }
    }

    fn next_flow(&mut self, start: Start, now: Instant) -> Option<FlowIndex> {
        let n = self.flows.len();
        (0..n).map(|i| (self.turn + i) % n).find(|flow| {
            let lanes = self.flows[*flow].lanes();
            match start {
                Start::Probe => lanes.can_probe(),
                Start::Go | Start::No => lanes.can_take(now),
            }
        })
    }

    /// Whether the process and this webhook have room, and for how many events.
    fn room(&self, bytes_free: usize) -> usize {
        if self.halted || self.only_replays || self.endpoint.is_gone() {
            return 0;
        }
        let bytes = self.bytes();
        if bytes > 0 && (bytes >= WINDOW_BYTES || bytes_free == 0) {
            return 0;
        }
        self.endpoint.window().saturating_sub(self.n_pending())
    }

    fn poll_reads(&mut self, now: Instant, bytes_free: usize, actions: &mut Vec<Action>) {
        // A page is asked for when half of the window is free: many small pages would cost CouchDB more.
        let enough = self.endpoint.window() / 2;
        let n = self.flows.len();
        // What a page may still bring ends no other request: a filtered one may take half an hour to bring nothing.
        let room = self.room(bytes_free);
        let mut n_expected: usize = self.flows.iter().map(Flow::n_expected).sum();
        for flow in (0..n).map(|i| (self.turn + i) % n) {
            if self.flows[flow].should_close(room > 0, now) {
                actions.push(Action::Close(flow));
            }
            if self.flows[flow].rests() {
                continue;
            }
            let limit = if room > 0 && room >= enough { page_limit(room, n_expected, n) } else { 0 };
            if let Some(read) = self.flows[flow].next_read(limit, now) {
                n_expected += self.flows[flow].n_expected();
                actions.push(Action::Read(flow, read));
            }
        }
        self.poll_resting_reads(room, n_expected, now, actions);
    }

    /// Of those that rest a few read at a time, in turns; and none takes more than its share of the window, so that
    /// one with a million changes never leaves less for those with one.
    fn poll_resting_reads(
        &mut self,
        room: usize,
        mut n_expected: usize,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let reads = |flow: &&Flow| flow.rests() && flow.is_reading();
        let mut n_free = self.readings_max.saturating_sub(self.flows.iter().filter(reads).count());
        let share = (self.endpoint.window() / SHARES).max(1);
        let (n, turn) = (self.flows.len(), self.read_turn);
        for flow in (0..n).map(|i| (turn + i) % n) {
            if n_free == 0 {
                return;
            }
            let n_pending = self.flows[flow].n_pending();
            // Not a page for every event that is finished.
            if !self.flows[flow].rests() || n_pending > share / 2 {
                continue;
            }
            let limit = page_limit(room, n_expected, n).min(share - n_pending);
            if let Some(read) = self.flows[flow].next_read(limit, now) {
                self.read_turn = flow + 1;
                n_free -= 1;
                n_expected += self.flows[flow].n_expected();
                actions.push(Action::Read(flow, read));
            }
        }
    }

    /// When `poll` has to be called again though nothing happened. Never before what the last `poll` could do: what
    /// waits for a free delivery, a permit or an answer has no deadline of its own.
    pub fn next_deadline(&self) -> Option<Instant> {
        let may_deliver = !self.halted && !self.starved;
        // While the endpoint is down only its probe's turn counts, not what lanes wait for.
        let lanes_count = may_deliver && self.endpoint.has_free_delivery();
        let flows = self.flows.iter().flat_map(|flow| {
            let lanes = if lanes_count { flow.next_lane_deadline() } else { None };
            [flow.next_reading_deadline(), flow.next_checkpoint_deadline(), lanes]
        });
        let may_fetch = self.n_asked_ready() < ASKED_READY_MAX;
        let suspects = self.suspects.iter().map(|suspect| match suspect.state {
            Replay::Resting if !self.halted && (suspect.asked.is_none() || may_fetch) => {
                Some(suspect.replay_at)
            }
            Replay::Resting | Replay::Fetching | Replay::Ready(_) | Replay::Sent(_) => None,
        });
        let probes = may_deliver && (self.replay_waits || self.flows.iter().any(Flow::can_probe));
        let probe = if probes { self.endpoint.next_deadline() } else { None };
        let batch = if lanes_count { self.batch_deadline() } else { None };
        let paced = self.next_asked_at.filter(|_| self.is_paced && may_deliver);
        flows.chain(suspects).chain([probe, paced, batch]).flatten().min()
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }
}

/// Dead letters and suspects.
impl Dispatch {
    fn store_letter(
        &mut self,
        token: u64,
        flow: FlowIndex,
        event: Arc<Event>,
        attempts: u32,
        class: LetterClass,
    ) {
        self.work.insert(token, Work::Letter { flow, class });
        self.outbox.push(Action::StoreLetter(attempt(token, flow, event, attempts), class));
    }

    /// Whether every unfinished event but this one failed often and was passed by others.
    fn only_left_overs_beside(&self, token: u64) -> bool {
        self.n_pending() <= endpoint::SUSPECTS_MAX
            && self
                .flows
                .iter()
                .flat_map(|flow| flow.trials_beside(token))
                .all(|trial| self.endpoint.is_left_over(trial))
    }

    /// Judges anew what is held back, when others were delivered since: that is what makes a suspect.
    fn judge_held(&mut self, at: Moment) {
        let delivered = self.endpoint.n_delivered();
        if std::mem::replace(&mut self.judged_at, delivered) == delivered {
            return;
        }
        for flow in 0..self.flows.len() {
            let endpoint = &self.endpoint;
            let suspects: Vec<_> = self.flows[flow]
                .lanes()
                .held()
                .filter(|(_, trial)| endpoint.is_suspect(trial, false))
                .map(|(lane, trial)| (lane, *trial))
                .collect();
            for (lane, trial) in suspects {
                let Verdict::DeadLetter(class) = self.endpoint.suspect(&trial, at) else { return };
                let token = self.token();
                let pending = self.flows[flow].lanes().take_held(lane, token).expect("it was held just now");
                let event = Arc::clone(&pending.event);
                self.store_letter(token, flow, event, trial.attempts, class);
            }
        }
    }

    fn add_suspect(&mut self, flow: FlowIndex, letter: SuspectLetter, now: Instant) {
        let failures = 3;
        let replay_at = now + self.replay_pause(failures);
        let (until, state) = (now + REPLAY_FOR, Replay::Resting);
        self.suspects.push(Suspect { flow, letter, failures, replay_at, until, state, asked: None });
    }

    /// Sends a letter again because an operator asked; [`Action::Replayed`] says what came of it. At most
    /// [`ASKED_MAX`] at a time.
    pub fn ask_replay(&mut self, flow: FlowIndex, letter: SuspectLetter, asked: Asked, now: Instant) {
        if let Some(suspect) = self.suspects.iter_mut().find(|suspect| suspect.letter.id == letter.id) {
            suspect.asked = Some(asked);
            suspect.failures = 0;
            if matches!(suspect.state, Replay::Resting) {
                suspect.replay_at = now;
            }
            self.count_suspects();
            return;
        }
        let (until, state) = (now + REPLAY_FOR, Replay::Resting);
        let suspect = Suspect { flow, letter, failures: 0, replay_at: now, until, state, asked: Some(asked) };
        self.suspects.push(suspect);
    }

    /// At most one letter that an operator sends again in this time.
    pub fn set_replay_pause(&mut self, pause: Duration) {
        self.replay_pause = pause;
    }

    /// Letters that an operator sends again and that nothing has come of yet.
    pub fn n_asked(&self) -> usize {
        self.suspects.iter().filter(|suspect| suspect.asked.is_some()).count()
    }

    /// Those whose document is being read, or was.
    fn n_asked_ready(&self) -> usize {
        let ready = |suspect: &&Suspect| {
            suspect.asked.is_some() && matches!(suspect.state, Replay::Fetching | Replay::Ready(_))
        };
        self.suspects.iter().filter(ready).count()
    }

    /// These letters are gone: somebody discarded them. What is in flight comes back, and is not sent again.
    pub fn forget_letters(&mut self, gone: &[message::WebhookId]) {
        for suspect in self.suspects.iter_mut().filter(|suspect| gone.contains(&suspect.letter.id)) {
            suspect.asked = None;
            suspect.until = suspect.replay_at;
        }
        self.suspects
            .retain(|suspect| matches!(suspect.state, Replay::Sent(_)) || !gone.contains(&suspect.letter.id));
        self.count_suspects();
    }

    /// Only those that became letters by suspicion say something about the endpoint.
    fn count_suspects(&mut self) {
        let own = self.suspects.iter().filter(|suspect| suspect.asked.is_none()).count();
        self.endpoint.set_n_suspects(own);
    }

    /// What an operator asked for has come to this.
    fn end_asked(&mut self, at: usize, end: Replayed) {
        self.outbox.push(Action::Replayed(self.suspects[at].letter.id, end));
        self.drop_suspect(at);
    }

    /// The rest of the schedule, then hourly.
    fn replay_pause(&self, failures: u32) -> Duration {
        self.retry_schedule.get(failures as usize).copied().unwrap_or(REPLAY_EVERY)
    }

    /// The document of a suspect, read again; `None`: not to be had now. When it is another revision by now,
    /// that one is told by the feed and the letter is history.
    pub fn on_fetched(&mut self, letter: &SuspectLetter, found: Fetched, now: Instant) {
        let Some(at) = self.suspects.iter().position(|suspect| suspect.letter == *letter) else { return };
        let asked = self.suspects[at].asked.is_some();
        match found {
            // Which revision an operator's is to be told at is the shell's to find out.
            Fetched::Event(event) if asked || event.id == letter.id => {
                self.suspects[at].state = Replay::Ready(Box::new(event));
            }
            Fetched::Superseded(rev) if asked => self.end_asked(at, Replayed::Superseded(Some(rev))),
            Fetched::Gone if asked => self.end_asked(at, Replayed::Gone),
            Fetched::Unreadable(why) if asked => self.end_asked(at, Replayed::Unreadable(why)),
            Fetched::Event(_) | Fetched::Superseded(_) | Fetched::Gone => self.drop_suspect(at),
            Fetched::Failed if asked => self.fetch_again(at, now),
            // Nothing was tried: it does not count as a try.
            Fetched::NotYet => self.fetch_again(at, now),
            Fetched::Failed | Fetched::Unreadable(_) => self.rest(at, now),
        }
    }

    fn fetch_again(&mut self, at: usize, now: Instant) {
        let suspect = &mut self.suspects[at];
        (suspect.state, suspect.replay_at) = (Replay::Resting, now + FETCH_AGAIN);
    }

    fn drop_suspect(&mut self, at: usize) {
        // In their order: an operator sees them go as they were asked for.
        self.suspects.remove(at);
        self.count_suspects();
    }

    fn rest(&mut self, at: usize, now: Instant) {
        let failures = self.suspects[at].failures + 1;
        let asked = self.suspects[at].asked.is_some();
        let pause = self.replay_pause(if asked { failures - 1 } else { failures });
        let suspect = &mut self.suspects[at];
        suspect.failures = failures;
        suspect.replay_at = now + pause;
        suspect.state = Replay::Resting;
        if asked && failures >= self.endpoint.strikes_max() {
            self.end_asked(at, Replayed::Failed);
        } else if self.suspects[at].replay_at > self.suspects[at].until {
            // The letter stays; now it is the operator's.
            match asked {
                true => self.end_asked(at, Replayed::Failed),
                false => self.drop_suspect(at),
            }
        }
    }

    fn rest_suspect(&mut self, token: u64, now: Instant) {
        let sent = |suspect: &Suspect| matches!(suspect.state, Replay::Sent(t) if t == token);
        if let Some(at) = self.suspects.iter().position(sent) {
            self.rest(at, now);
        }
    }

    fn poll_replays(&mut self, now: Instant, permit: &mut dyn FnMut() -> bool, actions: &mut Vec<Action>) {
        (self.is_paced, self.replay_waits) = (false, false);
        self.send_replays(now, permit, actions);
        let mut n_ready = self.n_asked_ready();
        for suspect in &mut self.suspects {
            let may_fetch = suspect.asked.is_none() || n_ready < ASKED_READY_MAX;
            if matches!(suspect.state, Replay::Resting) && suspect.replay_at <= now && may_fetch {
                suspect.state = Replay::Fetching;
                n_ready += usize::from(suspect.asked.is_some());
                actions.push(Action::Fetch(suspect.flow, suspect.letter.clone()));
            }
        }
    }

    /// Sends those whose document was read.
    fn send_replays(&mut self, now: Instant, permit: &mut dyn FnMut() -> bool, actions: &mut Vec<Action>) {
        let mut at = 0;
        while at < self.suspects.len() {
            let suspect = &self.suspects[at];
            let (flow, asked) = (suspect.flow, suspect.asked);
            let Replay::Ready(event) = &suspect.state else {
                at += 1;
                continue;
            };
            let superseded = self.flows[flow].is_superseded(event);
            let is_own = event.id == suspect.letter.id;
            match asked {
                None if superseded => {
                    self.drop_suspect(at);
                    continue;
                }
                // Told by the feed at this moment, or waiting there: after that it is seen what is left to do.
                Some(_) if self.flows[flow].lanes().newest(&event.doc_id) == Some(event.id) => {
                    at += 1;
                    continue;
                }
                // Only the letter's own revision is sent behind a newer one: what was read in its place is just old.
                Some(asked) if superseded && !(asked.even_if_superseded && is_own) => {
                    self.end_asked(at, Replayed::Superseded(None));
                    continue;
                }
                Some(_) if self.flows[flow].lanes().newest(&event.doc_id).is_some() => {
                    at += 1;
                    continue;
                }
                None | Some(_) => {}
            }
            if !self.may_replay(asked.is_some(), now) {
                at += 1;
                continue;
            }
            if !permit() {
                self.starved = true;
                return;
            }
            actions.push(self.start_replay(at, now));
            at += 1;
        }
    }

    fn start_replay(&mut self, at: usize, now: Instant) -> Action {
        let token = self.token();
        let flow = self.suspects[at].flow;
        let state = std::mem::replace(&mut self.suspects[at].state, Replay::Sent(token));
        let Replay::Ready(event) = state else { unreachable!("only what is ready is sent") };
        let pending = self.flows[flow].lanes().start_replay(*event, token);
        self.endpoint.on_start(token, &mut pending.trial, now);
        let mut attempt = attempt(token, flow, Arc::clone(&pending.event), 1);
        attempt.replay = true;
        self.work.insert(token, Work::Attempt { flow, replay: true });
        if self.suspects[at].asked.is_some() {
            self.last_was_asked = true;
            // Late is late: what was missed is not made up for.
            let due = self.next_asked_at.filter(|due| *due + self.replay_pause > now).unwrap_or(now);
            self.next_asked_at = Some(due + self.replay_pause);
        }
        Action::Attempt(attempt)
    }

    /// Beside deliveries that succeed; as a probe only when there is nothing else to probe with: that is for what
    /// is not dead yet.
    fn may_replay(&mut self, asked: bool, now: Instant) -> bool {
        if asked && !self.is_turn_of_asked(now) {
            return false;
        }
        match self.endpoint.may_start(now) {
            Start::Go => true,
            Start::Probe if self.n_pending() == 0 => true,
            Start::Probe => false,
            Start::No => {
                self.replay_waits |= self.n_pending() == 0 || self.endpoint.is_up();
                false
            }
        }
    }

    /// Letters that an operator sends again take half of the deliveries at most, and with a single one every other.
    fn is_turn_of_asked(&mut self, now: Instant) -> bool {
        if self.next_asked_at.is_some_and(|at| now < at) {
            self.is_paced = true;
            return false;
        }
        let in_flight =
            |suspect: &&Suspect| suspect.asked.is_some() && matches!(suspect.state, Replay::Sent(_));
        let n_in_flight = self.suspects.iter().filter(in_flight).count();
        let live_waits = self.last_was_asked && self.flows.iter_mut().any(|flow| flow.lanes().can_take(now));
        n_in_flight < (self.endpoint.concurrency() / 2).max(1)
            && !(self.endpoint.concurrency() == 1 && self.endpoint.is_up() && live_waits)
    }

    /// Closes the lane of a replay. What was told, or is told of by a letter that stays, is finished, with the row of
    /// the feed that may have joined it. A letter sent in vain at a newer revision says nothing of that one: it is
    /// the feed's to tell.
    fn end_replay(&mut self, flow: FlowIndex, token: u64, told: bool, now: Instant) {
        let sent = |suspect: &&Suspect| matches!(suspect.state, Replay::Sent(t) if t == token);
        let letter = self.suspects.iter().find(sent).map(|suspect| suspect.letter.id);
        let at = flow;
        let flow = &mut self.flows[flow];
        let Some(pending) = flow.lanes().busy_mut(token) else { return };
        if told || Some(pending.event.id) == letter {
            self.finish(at, token, now);
        } else if pending.has_row() {
            flow.on_retry(token, now, now);
        } else {
            flow.lanes().finish(token);
        }
    }

    fn on_replayed(&mut self, flow: FlowIndex, token: u64, outcome: Outcome, at: Moment) {
        let now = at.now;
        let sent = |suspect: &Suspect| matches!(suspect.state, Replay::Sent(t) if t == token);
        let place = self.suspects.iter().position(sent);
        self.end_replay(flow, token, self.endpoint.is_delivered(outcome), now);
        let asked = place.is_some_and(|place| self.suspects[place].asked.is_some());
        let class = self.endpoint.on_replay_outcome(token, outcome, asked, at);
        let Some(place) = place else { return };
        match class {
            Class::Delivered => {
                self.outbox.push(Action::DeleteLetter(self.suspects[place].letter.id));
                match asked {
                    true => self.end_asked(place, Replayed::Delivered),
                    false => self.drop_suspect(place),
                }
            }
            Class::Event if asked => self.end_asked(place, Replayed::Refused),
            // An outage says nothing about the letter.
            _ if asked && outcome == Outcome::Unreachable => {
                self.suspects[place].state = Replay::Resting;
                self.suspects[place].replay_at = now + self.replay_pause(0);
            }
            Class::Event | Class::Endpoint | Class::Gone => self.rest(place, now),
        }
    }
}

/// What became of a suspect's document.
#[derive(Debug)]
pub enum Fetched {
    /// As it is now.
    Event(Event),
    /// A newer revision was delivered: this one.
    Superseded(String),
    /// Deleted without a trace, or its database is.
    Gone,
    /// CouchDB did not answer.
    Failed,
    /// Its database was not opened yet.
    NotYet,
    /// It does not give the document, and will not the next time: too large, no rights, no revision; why.
    Unreadable(String),
}

/// How many rows the next page may bring: never all that the pages under way leave, when there are others.
fn page_limit(room: usize, n_expected: usize, n_flows: usize) -> usize {
    let left = room.saturating_sub(n_expected);
    if n_flows > 1 && room > 0 { left.div_ceil(2).max(1) } else { left }
}

fn attempt(token: u64, flow: FlowIndex, event: Arc<Event>, attempt: u32) -> Attempt {
    Attempt { token, flow, event, attempt, replay: false }
}

/// Names a document over all databases of the webhook.
fn lane_key(flow: FlowIndex, event: &Event) -> u64 {
    doc_key(&event.doc_id) ^ (flow as u64).rotate_left(48)
}

#[cfg(test)]
mod tests;
