//! One webhook, whole: its subscriptions and its endpoint, driven together.
//!
//! The shell feeds inputs (`on_*`), then takes [`Action`]s with [`Dispatch::poll`] until the next deadline.
//! Everything that decides is here or below, so that a simulation can run it through crashes that no machine
//! would show in a year.

pub mod batches;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pure::dispatch::batches::{Batch, Batching, Next};
use crate::pure::endpoint::{self, Endpoint, LetterClass, Moment, Outcome, Settings, Start, Verdict};
use crate::pure::flow::{self, Flow, Opened, Position, Read, ReadFault};
use crate::pure::message::{self, Arrived, Event};
use crate::pure::seq::Seq;
use crate::pure::table::Table;

/// Payload a webhook may hold, in bytes; one event is always let in.
const WINDOW_BYTES: usize = 16 << 20;
/// A dead letter, or a look-up, that failed is tried again after this.
const STORE_AGAIN: Duration = Duration::from_secs(5);
/// After `retry_schedule`, a suspect is replayed this often ...
const REPLAY_EVERY: Duration = Duration::from_secs(3600);
/// ... for this long.
const REPLAY_FOR: Duration = Duration::from_secs(24 * 3600);

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
    /// The suspect with this id was delivered after all, its letter goes. Not answered.
    DeleteLetter(message::WebhookId),
    /// The document as it is now, of a suspect to be sent again: `on_fetched`.
    Fetch(FlowIndex, SuspectLetter),
    /// `on_checkpoint`.
    StoreCheckpoint(FlowIndex, Position),
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
}

/// A stored dead letter of class `suspect`, by reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SuspectLetter {
    /// Its id, the letter's own.
    pub id: message::WebhookId,
    /// The document that it is about.
    pub doc_id: String,
}

/// A suspect that is tried again by ourselves.
#[derive(Debug)]
struct Suspect {
    flow: FlowIndex,
    letter: SuspectLetter,
    failures: u32,
    replay_at: Instant,
    until: Instant,
    state: Replay,
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
    /// No reading and no deliveries: paused, or being stopped.
    halted: bool,
    said: Vec<Notice>,
    /// What inputs asked for, until the next poll.
    outbox: Vec<Action>,
    /// Deliveries when suspects were last looked for.
    judged_at: u64,
    /// The process had no delivery to spare; the shell polls again when it has.
    starved: bool,
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
            flows,
            work: Table::default(),
            suspects: Vec::new(),
            next_token: 1,
            turn: 0,
            halted: false,
            said: Vec::new(),
            outbox: Vec::new(),
            judged_at: 0,
            starved: false,
        }
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
        self.flows.iter().all(Flow::is_stored)
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
        self.endpoint.set_n_suspects(self.suspects.len());
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
            Verdict::Delivered => self.flows[flow].on_finished(token, now),
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
            self.flows[flow].on_finished(token, now);
            self.rest_suspect(token, now);
        } else {
            self.flows[flow].on_retry(token, now, now);
        }
    }

    /// Answer to [`Action::LookUp`]; `None` when it could not be found out.
    pub fn on_looked_up(&mut self, token: u64, exists: Option<bool>, now: Instant) {
        let Some(Work::LookUp { flow, retry_at }) = self.work.remove(&token) else { return };
        match exists {
            Some(true) => self.flows[flow].on_finished(token, now),
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
                self.add_suspect(flow, SuspectLetter { id: event.id, doc_id: event.doc_id.clone() }, now);
            }
            self.flows[flow].on_finished(token, now);
        } else {
            self.said.push(Notice::LetterFailed(flow, event.id));
            if class == LetterClass::Suspect {
                self.endpoint.set_n_suspects(self.suspects.len());
            }
            self.flows[flow].on_retry(token, now + STORE_AGAIN, now);
        }
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
            if matches!(next, Next::Nothing) {
                return;
            }
            if !permit() {
                self.starved = true;
                return;
            }
            let (flow, key) = match next {
                Next::Of(flow) => (flow, None),
                Next::One(flow, key) => (flow, Some(key)),
                Next::Batch(keys) => {
                    self.start_batch(keys, now, actions);
                    continue;
                }
                Next::Nothing => return,
            };
            self.batch_since = None;
            let token = self.token();
            let lanes = self.flows[flow].lanes();
            let pending = match (start, &key) {
                (Start::Probe, _) => lanes.take_probe(token),
                (Start::Go | Start::No, Some(key)) => lanes.take_key(key, token),
                (Start::Go | Start::No, None) => lanes.take(now, token),
            };
            let pending = pending.expect("the flow said that it has one");
            self.endpoint.on_start(token, &mut pending.trial, now);
            let attempt = attempt(token, flow, Arc::clone(&pending.event), pending.trial.attempts);
            self.work.insert(token, Work::Attempt { flow, replay: false });
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
        if self.halted || self.endpoint.is_gone() {
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
        for flow in (0..n).map(|i| (self.turn + i) % n) {
            // What a page may still bring ends no other request: a filtered one may take half an hour to bring nothing.
            let room = self.room(bytes_free);
            if self.flows[flow].should_close(room > 0, now) {
                actions.push(Action::Close(flow));
            }
            let limit = if room > 0 && room >= enough { self.page_limit(room) } else { 0 };
            if let Some(read) = self.flows[flow].next_read(limit, now) {
                actions.push(Action::Read(flow, read));
            }
        }
    }

    /// How many rows the next page may bring: never all that the pages under way leave, when there are others.
    fn page_limit(&self, room: usize) -> usize {
        let expected: usize = self.flows.iter().map(Flow::n_expected).sum();
        let left = room.saturating_sub(expected);
        if self.flows.len() > 1 { left.div_ceil(2).max(1) } else { left }
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
        let suspects = self.suspects.iter().map(|suspect| match suspect.state {
            Replay::Resting if !self.halted => Some(suspect.replay_at),
            Replay::Resting | Replay::Fetching | Replay::Ready(_) | Replay::Sent(_) => None,
        });
        let ready = self.suspects.iter().any(|suspect| matches!(suspect.state, Replay::Ready(_)));
        let probes = may_deliver && (ready || self.flows.iter().any(Flow::can_probe));
        let probe = if probes { self.endpoint.next_deadline() } else { None };
        let batch = if lanes_count { self.batch_deadline() } else { None };
        flows.chain(suspects).chain([probe, batch]).flatten().min()
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
                .map(|(key, trial)| (Arc::clone(key), *trial))
                .collect();
            for (key, trial) in suspects {
                let Verdict::DeadLetter(class) = self.endpoint.suspect(&trial, at) else { return };
                let token = self.token();
                let pending = self.flows[flow].lanes().take_held(&key, token).expect("it was held just now");
                let event = Arc::clone(&pending.event);
                self.store_letter(token, flow, event, trial.attempts, class);
            }
        }
    }

    fn add_suspect(&mut self, flow: FlowIndex, letter: SuspectLetter, now: Instant) {
        let failures = 3;
        let replay_at = now + self.replay_pause(failures);
        let (until, state) = (now + REPLAY_FOR, Replay::Resting);
        self.suspects.push(Suspect { flow, letter, failures, replay_at, until, state });
    }

    /// The rest of the schedule, then hourly.
    fn replay_pause(&self, failures: u32) -> Duration {
        self.retry_schedule.get(failures as usize).copied().unwrap_or(REPLAY_EVERY)
    }

    /// The document of a suspect, read again; `None`: not to be had now. When it is another revision by now,
    /// that one is told by the feed and the letter is history.
    pub fn on_fetched(&mut self, letter: &SuspectLetter, found: Fetched, now: Instant) {
        let Some(at) = self.suspects.iter().position(|suspect| suspect.letter == *letter) else { return };
        match found {
            Fetched::Event(event) if event.id == letter.id => {
                self.suspects[at].state = Replay::Ready(Box::new(event));
            }
            Fetched::Event(_) | Fetched::Gone => self.drop_suspect(at),
            Fetched::Failed => self.rest(at, now),
        }
    }

    fn drop_suspect(&mut self, at: usize) {
        self.suspects.swap_remove(at);
        self.endpoint.set_n_suspects(self.suspects.len());
    }

    fn rest(&mut self, at: usize, now: Instant) {
        let failures = self.suspects[at].failures + 1;
        let pause = self.replay_pause(failures);
        let suspect = &mut self.suspects[at];
        suspect.failures = failures;
        suspect.replay_at = now + pause;
        suspect.state = Replay::Resting;
        if suspect.replay_at > suspect.until {
            // The letter stays; now it is the operator's.
            self.drop_suspect(at);
        }
    }

    fn rest_suspect(&mut self, token: u64, now: Instant) {
        let sent = |suspect: &Suspect| matches!(suspect.state, Replay::Sent(t) if t == token);
        if let Some(at) = self.suspects.iter().position(sent) {
            self.rest(at, now);
        }
    }

    fn poll_replays(&mut self, now: Instant, permit: &mut dyn FnMut() -> bool, actions: &mut Vec<Action>) {
        let mut at = 0;
        while at < self.suspects.len() {
            let (flow, letter) = (self.suspects[at].flow, self.suspects[at].letter.clone());
            match &self.suspects[at].state {
                Replay::Resting if self.suspects[at].replay_at <= now => {
                    self.suspects[at].state = Replay::Fetching;
                    actions.push(Action::Fetch(flow, letter));
                }
                Replay::Ready(event) if self.flows[flow].is_superseded(event) => {
                    self.drop_suspect(at);
                    continue;
                }
                Replay::Ready(_) if self.may_replay(now) => {
                    if !permit() {
                        self.starved = true;
                        return;
                    }
                    let token = self.token();
                    let state = std::mem::replace(&mut self.suspects[at].state, Replay::Sent(token));
                    let Replay::Ready(event) = state else { unreachable!("matched above") };
                    let pending = self.flows[flow].lanes().start_replay(*event, token);
                    self.endpoint.on_start(token, &mut pending.trial, now);
                    let mut attempt = attempt(token, flow, Arc::clone(&pending.event), 1);
                    attempt.replay = true;
                    self.work.insert(token, Work::Attempt { flow, replay: true });
                    actions.push(Action::Attempt(attempt));
                }
                Replay::Resting | Replay::Fetching | Replay::Ready(_) | Replay::Sent(_) => {}
            }
            at += 1;
        }
    }

    /// Beside deliveries that succeed; as a probe only when there is nothing else to probe with: that is for what
    /// is not dead yet.
    fn may_replay(&self, now: Instant) -> bool {
        match self.endpoint.may_start(now) {
            Start::Go => true,
            Start::Probe => self.n_pending() == 0,
            Start::No => false,
        }
    }

    fn on_replayed(&mut self, flow: FlowIndex, token: u64, outcome: Outcome, at: Moment) {
        let now = at.now;
        let sent = |suspect: &Suspect| matches!(suspect.state, Replay::Sent(t) if t == token);
        let place = self.suspects.iter().position(sent);
        // Taken or not, its letter is stored: a row that joined it is finished.
        self.flows[flow].on_finished(token, now);
        if self.endpoint.on_replay_outcome(token, outcome, at) {
            if let Some(place) = place {
                self.outbox.push(Action::DeleteLetter(self.suspects[place].letter.id));
                self.drop_suspect(place);
            }
        } else if let Some(place) = place {
            self.rest(place, now);
        }
    }
}

/// What became of a suspect's document.
#[derive(Debug)]
pub enum Fetched {
    /// As it is now.
    Event(Event),
    /// Deleted without a trace, or its database is.
    Gone,
    /// CouchDB did not answer.
    Failed,
}

fn attempt(token: u64, flow: FlowIndex, event: Arc<Event>, attempt: u32) -> Attempt {
    Attempt { token, flow, event, attempt, replay: false }
}

/// Names a document over all databases of the webhook.
fn lane_key(flow: FlowIndex, event: &Event) -> u64 {
    event.doc_key() ^ (flow as u64).rotate_left(48)
}
