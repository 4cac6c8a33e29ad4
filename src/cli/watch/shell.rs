//! Drives `pure::dispatch` for `watch`: one database, one endpoint, everything in memory.
//!
//! Guarantees that what a daemon would store is kept here or only said; that the first reading that fails ends the
//! command, because then it is the arguments; and that Ctrl-C ends it within two seconds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select_biased};

use crate::cli::out::{Colour, Out};
use crate::cli::watch::Plan;
use crate::cli::watch::reader::{Fed, Position, Reader};
use crate::couch::client::{Server, encoded};
use crate::couch::leases::Hold;
use crate::daemon::public_source;
use crate::error::{Error, Kind, Result};
use crate::host::standalone::{Signal, Signals};
use crate::pipeline::complaints::Complaint;
use crate::pipeline::dispatcher::{settings, telling};
use crate::pipeline::webhook::{Answer, Endpoint, Job};
use crate::pure::conflict::LeafDocs;
use crate::pure::dispatch::{Action, Attempt, Dispatch, Fetched, Notice};
use crate::pure::endpoint::{self, Moment, Outcome};
use crate::pure::flow::{self, Flow, Read};
use crate::pure::format;
use crate::pure::message::{Event, Telling};
use crate::pure::seq::Seq;
use crate::sys::{self, Thread};

/// The only subscription.
const FLOW: usize = 0;
/// Checkpoints go into memory and cost nothing.
const CHECKPOINT_INTERVAL: Duration = Duration::from_millis(200);
/// What is in flight may take this long after Ctrl-C; so may threads that hang.
const END_MAX: Duration = Duration::from_secs(1);
/// Payload in memory, in bytes.
const BYTES_MAX: usize = 64 << 20;

/// Follows until told to end.
pub(super) fn follow(plan: Plan, out: &mut Out) -> Result<u8> {
    let signals = Signals::catch()?;
    let server = Server::new(&plan.hookd)?;
    let welcome = server.welcome().map_err(|error| {
        Error::new(error.kind(), error.cause()).context(format!("CouchDB at {}", server.base_url()))
    })?;
    let db = plan.webhook.db.first().ok_or_else(|| Error::new(Kind::Config, "no database"))?.clone();
    let source = public_source(&plan.hookd, server.base_url(), welcome.uuid.as_deref());
    let telling = telling(&source, &plan.webhook, &db);
    let from = match &plan.since {
        None => "now on".to_owned(),
        Some(since) if *since == Seq::zero() => "its beginning".to_owned(),
        Some(since) => format!("`{since}` on"),
    };
    log::info!("following `{db}` of CouchDB {} at {} from {from}", welcome.version, server.base_url());
    let reader = Reader::start(&server, &plan.hookd, &plan.webhook, telling.clone(), plan.since.clone())?;
    let mut shell = Shell::new(&plan, telling, reader, out)?;
    let followed = shell.run(&signals.received());
    let left = shell.end();
    server.stop();
    join(left);
    signals.stop().map_err(|panic| Error::new(Kind::Io, panic))?;
    followed.map(|()| 0)
}

/// What hangs in a name that does not resolve ends with the process.
fn join(threads: Vec<Thread>) {
    let until = sys::now() + END_MAX;
    while sys::now() < until && !threads.iter().all(Thread::is_finished) {
        sys::sleep(Duration::from_millis(10));
    }
    for thread in threads.into_iter().filter(Thread::is_finished) {
        if let Err(panic) = thread.join() {
            log::error!("{panic}");
        }
    }
}

struct Shell<'a> {
    plan: &'a Plan,
    out: &'a mut Out,
    dispatch: Dispatch,
    telling: Arc<Telling>,
    reader: Reader,
    position: Option<Position>,
    /// Whether something was read, so that a fault is no longer the arguments'.
    has_read: bool,
    complaint: Complaint,
    workers: Workers,
    /// What is in flight.
    in_flight: HashMap<u64, Vec<Attempt>>,
}

impl<'a> Shell<'a> {
    fn new(plan: &'a Plan, telling: Telling, reader: Reader, out: &'a mut Out) -> Result<Shell<'a>> {
        let webhook = &plan.webhook;
        let strict = webhook.concurrency == 1;
        let rotate = plan.hookd.feed_rotate;
        let flow = Flow::new(strict, rotate, CHECKPOINT_INTERVAL);
        let telling = Arc::new(telling);
        Ok(Shell {
            dispatch: Dispatch::new(settings(webhook), vec![flow], sys::now()),
            workers: Workers::new(Endpoint::new(webhook, &Hold::unlimited())?, webhook.concurrency),
            plan,
            out,
            telling,
            reader,
            position: None,
            has_read: false,
            complaint: Complaint::default(),
            in_flight: HashMap::new(),
        })
    }

    fn run(&mut self, signals: &Receiver<Signal>) -> Result<()> {
        let mut actions = Vec::new();
        let mut end_at: Option<Instant> = None;
        loop {
            let now = sys::now();
            let free = BYTES_MAX.saturating_sub(self.dispatch.bytes());
            self.dispatch.poll(now, free, sys::jitter(), &mut || true, &mut actions);
            let idle = actions.is_empty();
            for action in actions.drain(..) {
                self.act(action, now)?;
            }
            if end_at.is_some_and(|end_at| self.in_flight.is_empty() || now >= end_at) {
                return Ok(());
            }
            // What was printed is finished already, and may free room at once.
            let deadline = if idle { self.dispatch.next_deadline() } else { Some(now) };
            let deadline =
                end_at.map_or(deadline, |end_at| Some(deadline.map_or(end_at, |at| at.min(end_at))));
            let timer = deadline.map_or_else(never, at);
            let (done, fed) = (self.workers.done.1.clone(), self.reader.fed.clone());
            select_biased! {
                recv(signals) -> signal => if signal != Ok(Signal::Reload) {
                    end_at.get_or_insert(now + END_MAX);
                    self.dispatch.halt();
                    self.reader.close();
                },
                recv(done) -> done => if let Ok((token, answer)) = done {
                    self.on_done(token, &answer)?;
                },
                recv(fed) -> fed => if let Ok(fed) = fed {
                    self.on_fed(fed)?;
                },
                recv(timer) -> _ => {}
            }
        }
    }

    /// Ends everything; gives the threads that are to be joined.
    fn end(self) -> Vec<Thread> {
        let mut threads = self.workers.stop();
        threads.push(self.reader.stop());
        threads
    }

    fn on_fed(&mut self, fed: Fed) -> Result<()> {
        let now = sys::now();
        match fed {
            Fed::Opened(opened) => {
                if self.complaint.over() {
                    log::info!("{}: reading again", self.place());
                }
                self.dispatch.on_opened(FLOW, opened);
            }
            Fed::Rows(rows) => {
                self.has_read = true;
                self.dispatch.on_rows(FLOW, rows, now);
            }
            Fed::End { last_seq, pending, closed } => {
                self.has_read = true;
                self.dispatch.on_end(FLOW, last_seq, pending, closed, now);
            }
            Fed::Failed(_, error) if !self.has_read => return Err(error.context(self.place())),
            Fed::Failed(fault, error) => {
                if self.complaint.is_news(error.kind(), now) {
                    log::warn!("{}: {error}; trying again", self.place());
                }
                self.dispatch.on_read_failed(FLOW, fault, now);
            }
        }
        Ok(())
    }

    fn act(&mut self, action: Action, now: Instant) -> Result<()> {
        match action {
            Action::Read(_, read) => {
                let position = if read == Read::Open { self.position.clone() } else { None };
                self.reader.read(read, position);
            }
            Action::Close(_) => self.reader.close(),
            Action::Attempt(attempt) if self.plan.prints => {
                let body = self.telling.body(&attempt.event);
                self.out.json(&String::from_utf8_lossy(&body))?;
                let outcome = Outcome::Status { status: 200, retry_after: None };
                self.dispatch.on_outcome(attempt.token, outcome, Moment { now, jitter: sys::jitter() });
            }
            Action::Attempt(attempt) => {
                self.in_flight.insert(attempt.token, vec![attempt.clone()]);
                let job = Job::One(attempt, Arc::clone(&self.telling));
                self.workers.deliver(job, self.in_flight.len())?;
            }
            Action::Batch(batch) if self.plan.prints => {
                let parts = batch.parts.iter().map(|part| (&*self.telling, &*part.event));
                let body = format::batch_body(batch.id, parts);
                self.out.json(&String::from_utf8_lossy(&body))?;
                let outcome = Outcome::Status { status: 200, retry_after: None };
                self.dispatch.on_outcome(batch.token, outcome, Moment { now, jitter: sys::jitter() });
            }
            Action::Batch(batch) => {
                self.in_flight.insert(batch.token, batch.parts.clone());
                let tellings = vec![Arc::clone(&self.telling); batch.parts.len()];
                self.workers.deliver(Job::Batch(batch, tellings), self.in_flight.len())?;
            }
            Action::LookUp(attempt) => self.dispatch.on_looked_up(attempt.token, Some(false), now),
            Action::StoreLetter(attempt, class) => {
                let told = shown(&self.telling, &attempt.event);
                let text = format!("{told} would be a dead letter now ({})", class.as_str());
                self.out.marked_line("letter", Colour::Red, &text)?;
                self.dispatch.on_letter(attempt.token, true, now);
            }
            // Conflicts are not told.
            Action::Keep(attempt, _) => self.dispatch.on_kept(attempt.token, Some(LeafDocs::Unread), now),
            Action::DeleteLetter(_) | Action::Replayed(..) => {}
            // Nothing was stored that could be sent again.
            Action::Fetch(_, letter) => self.dispatch.on_fetched(&letter, Fetched::Gone, now),
            Action::StoreCheckpoint(_, position) => {
                self.position = Some((position.through_seq, position.delivered));
                self.dispatch.on_checkpoint(FLOW, Some("0-1".to_owned()), now);
            }
            Action::LetGo(_) => unreachable!("the only flow waits for changes and never rests"),
            Action::Say(notice) => self.say(&notice),
        }
        Ok(())
    }

    fn on_done(&mut self, token: u64, answer: &Answer) -> Result<()> {
        let Some(attempts) = self.in_flight.remove(&token) else { return Ok(()) };
        let word = match answer.outcome {
            Outcome::Status { status, .. } => status.to_string(),
            Outcome::Unreachable | Outcome::Timeout | Outcome::Broken => "---".to_owned(),
        };
        let is_delivered = self.dispatch.endpoint().is_delivered(answer.outcome);
        let colour = if is_delivered { Colour::Green } else { Colour::Red };
        let why = match colour {
            Colour::Green => String::new(),
            _ if answer.text.is_empty() => String::new(),
            _ => format!(": {}", answer.text),
        };
        for attempt in &attempts {
            let told = shown(&self.telling, &attempt.event);
            self.out.marked_line(&word, colour, &format!("{told} attempt {}{why}", attempt.attempt))?;
        }
        let moment = Moment { now: sys::now(), jitter: sys::jitter() };
        self.dispatch.on_outcome(token, answer.outcome, moment);
        Ok(())
    }

    fn say(&self, notice: &Notice) {
        match notice {
            Notice::Endpoint(endpoint::Notice::Down(_)) => {
                log::warn!("the endpoint does not take events; trying again, one at a time");
            }
            Notice::Endpoint(endpoint::Notice::Up) => log::info!("the endpoint takes events"),
            Notice::Endpoint(endpoint::Notice::Gone) => {
                log::error!("the endpoint said 410 twice; a daemon would pause this webhook for good");
            }
            Notice::Flow(_, flow::Notice::Recreated) => {
                log::warn!("{}: it was deleted and created again; reading from its beginning", self.place());
            }
            Notice::Flow(_, flow::Notice::Rewound { pending }) => {
                log::warn!("{}: {pending} changes lie ahead of where we were", self.place());
            }
            Notice::Letter(..) | Notice::LetterFailed(..) => {}
        }
    }

    fn place(&self) -> String {
        format!("database `{}`", self.telling.db)
    }
}

/// `document.updated orders/order:17 3-9f…`.
fn shown(telling: &Telling, event: &Event) -> String {
    format!("{} {}/{} {}", event.event_type(), encoded(&telling.db), event.doc_id, event.rev)
}

/// A token, and what came of its attempt.
type Done = (u64, Answer);

/// Threads that deliver, started when they are needed.
struct Workers {
    endpoint: Arc<Endpoint>,
    jobs: Sender<Job>,
    taken: Receiver<Job>,
    done: (Sender<Done>, Receiver<Done>),
    threads: Vec<Thread>,
}

impl Workers {
    fn new(endpoint: Endpoint, n_max: usize) -> Workers {
        let (jobs, taken) = bounded(n_max);
        Workers { endpoint: Arc::new(endpoint), jobs, taken, done: bounded(n_max), threads: Vec::new() }
    }

    fn deliver(&mut self, job: Job, n_in_flight: usize) -> Result<()> {
        if self.threads.len() < n_in_flight {
            let (taken, done) = (self.taken.clone(), self.done.0.clone());
            let endpoint = Arc::clone(&self.endpoint);
            let name = format!("worker:watch#{}", self.threads.len() + 1);
            self.threads.push(sys::spawn(&name, move || {
                for job in taken {
                    let answer = endpoint.deliver(&job).expect("its hold is unlimited");
                    if done.send((job.token(), answer)).is_err() {
                        return;
                    }
                }
            })?);
        }
        self.jobs.try_send(job).expect("there is room for every delivery that is allowed");
        Ok(())
    }

    fn stop(self) -> Vec<Thread> {
        self.endpoint.shut_down();
        self.threads
    }
}
