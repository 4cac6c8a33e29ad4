//! Where requests come in: follows `state_db`, and has them obeyed in order by the daemon that tells their webhook.
//!
//! ```text
//! state_db/_changes --> requests:follow --requests--> requests:desk --asks--> daemon (its webhooks)
//!       '--nudges--> leases                               '--> couch: records, answers
//! ```
//!
//! Guarantees: what counts is a request's document, not the feed: after every lost connection all open ones are
//! listed; one webhook's requests are obeyed in the order of their ids; one that failed for a passing reason holds
//! back those behind it and is tried again. Obeying itself is `pipeline::obey`'s.

use std::collections::{HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::{Map, Value, json};

use crate::config;
use crate::couch::alive;
use crate::couch::feed::{self, Feed, FeedCloser, FeedKind, FeedRequest};
use crate::couch::leases;
use crate::couch::requests::{self, Command, Progress, Request};
use crate::error::{Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::board::Attempts;
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::dispatcher::Order;
use crate::pipeline::obey;
use crate::pure::changes::{Item, Row, RowDoc};
use crate::sys::{self, Thread};

/// How often the desk looks at the time when nothing comes in.
const TICK: Duration = Duration::from_millis(500);
/// Between two tries of a request that failed for a passing reason.
const AGAIN: Duration = Duration::from_secs(1);
/// How often old requests and dead daemons are cleaned away.
const CLEAN: Duration = Duration::from_secs(3600);
/// The first time: a start has better things to do, above all one of many in a row.
const CLEAN_FIRST: Duration = Duration::from_secs(10);
/// A tail that is not renewed ends after this.
const TAIL_FOR: Duration = Duration::from_secs(30);
/// How often a tail's attempts are written.
const TAIL_EVERY: Duration = Duration::from_secs(1);
/// A webhook that is started again has ended by then: what it takes to end deliveries, and a little.
const RESTART_MAX: Duration = Duration::from_secs(10);
/// What was done so shortly before the desk began may be missing in the records that webhooks started from: its doer took
/// us for not there yet. By its clock and ours, so there is room for both.
const DONE_MARGIN: Duration = Duration::from_secs(60);
/// Requests remembered to be answered; one that is forgotten costs a needless start of its webhook at the most.
const ANSWERED_MAX: usize = 10_000;
/// A request is no longer than this, in bytes.
const DOC_BYTES_MAX: usize = 1 << 20;
/// The feed is dead when it is silent for this much longer than its `timeout`.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);
/// Waits after the feed was lost; the last repeats.
const FOLLOW_AGAIN: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5)];

/// What the desk asks of the daemon that runs the webhooks.
#[derive(Debug)]
pub enum Ask {
    /// What is configured under this name, and whether it is told here now; `None` when it is not ours.
    Webhook(String, Sender<Option<(config::Webhook, bool)>>),
    /// Ends the webhook's parts and starts them again; the sender is dropped when they have ended.
    Restart(String, Sender<()>),
    /// Passes an order to its thread.
    Order(String, Order),
}

/// What the follower sees, or is asked, of what others keep: which daemons are alive, and whose webhooks are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Nudge {
    /// Somebody wants to know how webhooks are.
    Asked,
    /// A daemon, or a lease, is another one than before: with this `_rev`.
    Changed(String),
}

/// What came in.
enum Incoming {
    /// All there are, after a lost connection.
    Listed(Vec<Request>),
    /// One was written.
    Written(Box<Request>),
    /// One was deleted.
    Deleted(String),
    /// The end.
    Stop,
}

/// A running desk.
pub struct Desk {
    stopping: Arc<AtomicBool>,
    closer: FeedCloser,
    to: Sender<Incoming>,
    threads: Vec<Thread>,
}

impl Desk {
    /// Starts both threads.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(shared: &Shared, asks: Sender<Ask>, nudges: Sender<Nudge>) -> Result<Desk> {
        let (to, incoming) = bounded(64);
        let stopping = Arc::new(AtomicBool::new(false));
        let feed = Feed::new(&shared.server);
        let closer = feed.closer();
        let clerk = Clerk::new(shared, asks, nudges.clone());
        let desk = sys::spawn("requests:desk", move || clerk.run(&incoming))?;
        let (shared, stopping_too) = (shared.clone(), Arc::clone(&stopping));
        let follower = Follower { shared, to: to.clone(), nudges, stopping: stopping_too };
        let follow = sys::spawn("requests:follow", move || follower.run(feed))?;
        Ok(Desk { stopping, closer, to, threads: vec![follow, desk] })
    }

    /// Ends both as soon as they can be woken; gives their threads.
    pub fn stop(self) -> Vec<Thread> {
        self.stopping.store(true, Ordering::SeqCst);
        self.closer.close();
        // Full means that it is at work, and finds the end of the channel behind it.
        let _ = self.to.try_send(Incoming::Stop);
        self.threads
    }
}

struct Follower {
    shared: Shared,
    to: Sender<Incoming>,
    nudges: Sender<Nudge>,
    stopping: Arc<AtomicBool>,
}

impl Follower {
    fn run(self, mut feed: Feed) {
        let (mut n_lost, mut complaint) = (0, Complaint::default());
        while !self.stopping.load(Ordering::SeqCst) {
            let Err(error) = self.follow(&mut feed, &mut n_lost, &mut complaint) else { return };
            if Outage::concerns(&error) {
                self.shared.outage.say(&error);
            } else if error.kind() != Kind::Stopped && complaint.is_news(error.kind(), sys::now()) {
                let state_db = &self.shared.state_db;
                log::warn!("`{state_db}`: requests of commands cannot be read: {error}; trying again");
            }
            let until = sys::now() + FOLLOW_AGAIN[n_lost.min(FOLLOW_AGAIN.len() - 1)];
            n_lost += 1;
            while sys::now() < until && !self.stopping.load(Ordering::SeqCst) {
                sys::sleep(FOLLOW_AGAIN[0]);
            }
        }
    }

    /// Lists what is open, then follows; `Ok` when nobody listens any more.
    fn follow(&self, feed: &mut Feed, n_lost: &mut usize, complaint: &mut Complaint) -> Result<()> {
        let Shared { server, state_db, hookd, .. } = &self.shared;
        let generation = server.welcome()?.generation;
        // First the place, then the list: what is written in between comes twice, not never.
        let mut since = feed::resolve_now(server, state_db, generation)?;
        let listed = requests::list(server, state_db)?;
        if self.to.send(Incoming::Listed(listed)).is_err() {
            return Ok(());
        }
        (*n_lost, *complaint) = (0, Complaint::default());
        loop {
            let request = FeedRequest {
                db: state_db.clone(),
                since: since.clone(),
                kind: FeedKind::Continuous { timeout: hookd.feed_timeout },
                filter: None,
                include_docs: true,
                conflicts: false,
                doc_bytes_max: DOC_BYTES_MAX,
                keeps_lines: false,
                silence: Some(hookd.feed_timeout + SILENCE_MARGIN),
                deadline: None,
            };
            let mut last = None;
            let mut gone = false;
            feed.read(&request, &mut |items| {
                for item in items.drain(..) {
                    match item {
                        Item::Row(row) => gone |= self.pass(&row).is_err(),
                        Item::End { last_seq, .. } => last = last_seq,
                        Item::Fault { .. } => {}
                    }
                }
                if gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            if gone || self.stopping.load(Ordering::SeqCst) {
                return Ok(());
            }
            since = last.ok_or_else(|| Error::new(Kind::Cut, "the feed ended without a place"))?;
        }
    }

    fn pass(&self, row: &Row) -> Result<(), ()> {
        let Row { id, deleted, doc, revs, .. } = row;
        if !id.starts_with(requests::PREFIX) {
            if [alive::PREFIX, leases::PREFIX].iter().any(|prefix| id.starts_with(prefix)) {
                // Full: there is a reason to look already.
                let rev = revs.first().cloned().unwrap_or_default();
                let _ = self.nudges.try_send(Nudge::Changed(rev));
            }
            return Ok(());
        }
        let incoming = match doc {
            _ if *deleted => Incoming::Deleted(id.clone()),
            RowDoc::Json(doc) => match Request::parse(doc.get()) {
                Some(request) => Incoming::Written(Box::new(request)),
                None => return Ok(()),
            },
            RowDoc::Absent | RowDoc::Null | RowDoc::TooLarge { .. } => return Ok(()),
        };
        self.to.send(incoming).map_err(drop)
    }
}

/// Somebody who looks on.
struct Tail {
    request: String,
    webhook: String,
    attempts: Arc<Attempts>,
    n_renewed: u64,
    until: Instant,
    n_written: u64,
}

/// The desk's own thread.
struct Clerk {
    shared: Shared,
    asks: Sender<Ask>,
    nudges: Sender<Nudge>,
    /// To be obeyed, in order.
    waiting: VecDeque<Request>,
    try_at: Instant,
    /// Answered by us, or before we came: their documents come back through the feed.
    answered: HashSet<String>,
    has_listed: bool,
    tails: Vec<Tail>,
    tails_at: Instant,
    complaint: Complaint,
    began_at: jiff::Timestamp,
    clean_at: Instant,
}

impl Clerk {
    fn new(shared: &Shared, asks: Sender<Ask>, nudges: Sender<Nudge>) -> Clerk {
        let now = sys::now();
        Clerk {
            shared: shared.clone(),
            asks,
            nudges,
            waiting: VecDeque::new(),
            try_at: now,
            answered: HashSet::new(),
            has_listed: false,
            tails: Vec::new(),
            tails_at: now,
            complaint: Complaint::default(),
            began_at: sys::wall(),
            clean_at: now + CLEAN_FIRST,
        }
    }

    fn run(mut self, incoming: &Receiver<Incoming>) {
        loop {
            match incoming.recv_timeout(TICK) {
                Ok(Incoming::Listed(requests)) => self.on_listed(requests),
                Ok(Incoming::Written(request)) => self.on_request(*request),
                Ok(Incoming::Deleted(id)) => self.on_deleted(&id),
                Ok(Incoming::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            let now = sys::now();
            if now >= self.try_at {
                self.obey_waiting();
            }
            self.show_tails(now);
            self.clean(now);
        }
    }

    fn on_listed(&mut self, requests: Vec<Request>) {
        if !std::mem::replace(&mut self.has_listed, true) {
            // What was done before we came stands in the records that everything starts from.
            let began = self.began_at;
            let done = requests.iter().filter(|request| was_done_before(request, began));
            self.answered.extend(done.map(|request| request.id.clone()));
        }
        // Done by others: one start for all that was done to a webhook.
        let mut others: Vec<String> = Vec::new();
        for request in &requests {
            if restarts(request.command)
                && request.state == Progress::Done
                && self.answered.insert(request.id.clone())
                && !others.contains(&request.webhook)
            {
                others.push(request.webhook.clone());
            }
        }
        others.iter().for_each(|webhook| self.restart(webhook));
        requests.into_iter().for_each(|request| self.on_request(request));
    }

    fn on_request(&mut self, request: Request) {
        if request.state != Progress::Open {
            self.waiting.retain(|waiting| waiting.id != request.id);
            // Done by another daemon, or by a command that took us for dead: it counts for us, too.
            let ours = self.answered.contains(&request.id);
            if request.state == Progress::Done && restarts(request.command) && !ours {
                self.answered.insert(request.id.clone());
                self.restart(&request.webhook);
            }
            return;
        }
        if request.command == Command::Status {
            // Listed at a start: whoever asked may be gone.
            if !is_old(&request) {
                let _ = self.nudges.try_send(Nudge::Asked);
            }
        } else if request.command == Command::Tail {
            self.on_tail(&request);
        } else if !self.waiting.iter().any(|waiting| waiting.id == request.id)
            && !self.answered.contains(&request.id)
        {
            self.waiting.push_back(request);
            self.try_at = sys::now();
        }
    }

    fn on_deleted(&mut self, id: &str) {
        self.waiting.retain(|waiting| waiting.id != id);
        for tail in &mut self.tails {
            if tail.request == id {
                tail.until = sys::now();
            }
        }
    }

    /// Obeys what waits; what fails for a passing reason holds back what waits for the same webhook.
    fn obey_waiting(&mut self) {
        let mut held: HashSet<String> = HashSet::new();
        for request in std::mem::take(&mut self.waiting) {
            if held.contains(&request.webhook) {
                self.waiting.push_back(request);
            } else if let Err(error) = self.obey(&request) {
                if Outage::concerns(&error) {
                    self.shared.outage.say(&error);
                } else if error.kind() != Kind::Stopped && self.complaint.is_news(error.kind(), sys::now()) {
                    let (name, what) = (&request.webhook, request.command.as_str());
                    log::warn!("webhook `{name}`: cannot {what} now: {error}; trying again");
                }
                held.insert(request.webhook.clone());
                self.waiting.push_back(request);
            }
        }
        self.try_at = sys::now() + AGAIN;
    }

    fn obey(&mut self, request: &Request) -> Result<()> {
        // Of another daemon, or of nobody: the command that made it knows.
        let Some((webhook, is_told_here)) = self.find(&request.webhook)? else { return Ok(()) };
        if !is_told_here {
            // Whoever tells the webhook obeys; should it be us before that is done, we do.
            return Err(stopped());
        }
        let Shared { server, state_db, .. } = &self.shared;
        if request.command == Command::Replay {
            // The feed shows it as it was after one of its answers; what counts is how it is.
            let is_open = requests::read(server, state_db, &request.id)?
                .is_some_and(|request| request.state == Progress::Open);
            if !is_open {
                return Ok(());
            }
            self.ask(Ask::Order(webhook.name, Order::Replay(Box::new(request.clone()))))?;
            return Ok(());
        }
        let obeyed = obey::obey(&self.shared, &webhook, request)?;
        if self.answered.len() > ANSWERED_MAX {
            self.answered.clear();
        }
        self.answered.insert(request.id.clone());
        if obeyed.restart {
            self.restart(&webhook.name);
        }
        if !obeyed.discarded.is_empty() {
            self.ask(Ask::Order(webhook.name.clone(), Order::Discarded(obeyed.discarded)))?;
        }
        let (name, what, by) = (&webhook.name, request.command.as_str(), &request.made_by);
        match obeyed.state {
            Progress::Failed => log::warn!("webhook `{name}`: {what} asked for by `{by}` failed"),
            _ => log::info!("webhook `{name}`: {what}, asked for by `{by}`, is done"),
        }
        requests::answer(server, state_db, &request.id, obeyed.state, &obeyed.answer).inspect_err(|_| {
            // To be answered at the next try; that it was done stands in the record.
            self.answered.remove(&request.id);
        })
    }

    /// What is configured, and whether it is told here.
    fn find(&self, webhook: &str) -> Result<Option<(config::Webhook, bool)>> {
        let (to, found) = bounded(1);
        self.ask(Ask::Webhook(webhook.to_owned(), to))?;
        found.recv().map_err(|_| stopped())
    }

    fn restart(&self, webhook: &str) {
        let (to, ended) = bounded(1);
        if self.ask(Ask::Restart(webhook.to_owned(), to)).is_ok() {
            // Disconnected: it has ended, or we are being stopped.
            let _ = ended.recv_timeout(RESTART_MAX);
        }
    }

    fn ask(&self, ask: Ask) -> Result<()> {
        self.asks.send(ask).map_err(|_| stopped())
    }

    // --- Onlookers ---------------------------------------------------------------------------------------

    fn on_tail(&mut self, request: &Request) {
        let until = sys::now() + TAIL_FOR;
        let n_renewed = request.arguments.n_renewed;
        if let Some(tail) = self.tails.iter_mut().find(|tail| tail.request == request.id) {
            // What we wrote ourselves comes back, too.
            if n_renewed > tail.n_renewed {
                (tail.n_renewed, tail.until) = (n_renewed, until);
            }
            return;
        }
        let is_ours = matches!(self.find(&request.webhook), Ok(Some((_, true))));
        if !is_ours || is_old(request) {
            return;
        }
        let attempts = self.shared.board.onlooker(&request.webhook).unwrap_or_default();
        self.shared.board.set_onlooker(&request.webhook, Some(Arc::clone(&attempts)));
        let (request, webhook) = (request.id.clone(), request.webhook.clone());
        // The answer says at once that somebody is there, though nothing may happen for long.
        self.tails.push(Tail { request, webhook, attempts, n_renewed, until, n_written: u64::MAX });
        self.tails_at = sys::now();
    }

    fn show_tails(&mut self, now: Instant) {
        if self.tails.is_empty() || now < self.tails_at {
            return;
        }
        self.tails_at = now + TAIL_EVERY;
        let (over, open): (Vec<Tail>, Vec<Tail>) =
            std::mem::take(&mut self.tails).into_iter().partition(|tail| now >= tail.until);
        self.tails = open;
        for tail in &over {
            if !self.tails.iter().any(|other| other.webhook == tail.webhook) {
                self.shared.board.set_onlooker(&tail.webhook, None);
            }
        }
        let Shared { server, state_db, .. } = &self.shared;
        let write = |tail: &Tail, state: Progress| {
            let (n, attempts) = tail.attempts.last();
            if n == tail.n_written && state == Progress::Open {
                return n;
            }
            let answer: Map<String, Value> =
                Map::from_iter([("n".to_owned(), json!(n)), ("attempts".to_owned(), json!(attempts))]);
            match requests::answer(server, state_db, &tail.request, state, &answer) {
                Ok(()) => n,
                // Whoever looks on sees it with the next one.
                Err(_) => tail.n_written,
            }
        };
        over.iter().for_each(|tail| {
            let _ = write(tail, Progress::Done);
        });
        self.tails.iter_mut().for_each(|tail| tail.n_written = write(tail, Progress::Open));
    }

    // --- Cleaning -----------------------------------------------------------------------------------------

    fn clean(&mut self, now: Instant) {
        if now < self.clean_at {
            return;
        }
        self.clean_at = now + CLEAN;
        let Shared { server, state_db, .. } = &self.shared;
        let cleaned =
            requests::delete_old(server, state_db).and_then(|()| alive::delete_dead(server, state_db));
        if let Err(error) = cleaned {
            log::debug!("`{state_db}`: what is old could not be deleted: {error}");
        }
    }
}

/// Whether a webhook has to be started again for what was done by others to count.
fn restarts(command: Command) -> bool {
    !matches!(command, Command::Replay | Command::Tail | Command::Status)
}

/// Whether every webhook that started with or after the desk has seen what came of a request.
fn was_done_before(request: &Request, began: jiff::Timestamp) -> bool {
    let done_at = request.done_at.unwrap_or(request.made_at);
    request.state != Progress::Open && done_at < began - DONE_MARGIN
}

/// Of another hour: whoever looked on is gone.
fn is_old(request: &Request) -> bool {
    sys::wall().duration_since(request.made_at).unsigned_abs() > CLEAN
}

fn stopped() -> Error {
    Error::new(Kind::Stopped, "stopped")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::couch::requests::Arguments;

    #[test]
    fn only_what_was_done_well_before_the_start_is_known_to_stand_in_the_records() {
        let began = sys::wall();
        let mut request = Request::new("orders", Command::Pause, Arguments::default(), "anna");
        assert!(!was_done_before(&request, began), "it is open");
        request.state = Progress::Done;
        let mut check = |seconds: i64, expected: bool| {
            request.done_at = Some(began + jiff::SignedDuration::from_secs(seconds));
            assert_eq!(was_done_before(&request, began), expected, "{seconds} s");
        };
        check(-3600, true);
        check(-5, false);
        // Between the reading of the webhook's record and the first list.
        check(0, false);
        check(3600, false);
    }
}
