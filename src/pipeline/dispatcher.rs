//! A webhook's own thread: drives `pure::dispatch` and starts, feeds and joins everything else of the webhook.
//!
//! Guarantees: outcomes are taken before new rows, because finished work frees room and moves the checkpoint; this
//! thread never waits for CouchDB or the endpoint once the webhook runs; a stop ends within the time given,
//! whatever hangs, and gives back the threads that could not be joined by then.

mod found;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, never, select_biased};
use serde_json::value::RawValue;

use crate::config;
use crate::couch::leases::Hold;
use crate::couch::requests::Request;
use crate::couch::state_db::{self, DeadLetter, DeadLetterClass};
use crate::error::{Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::activation::{self, Active};
use crate::pipeline::checkpointer::{self, Stored};
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::dispatcher::found::{ACTIVE_MAX, Found};
use crate::pipeline::feed_reader::{Fed, Reading};
use crate::pipeline::lookout::Sighting;
use crate::pipeline::replay::{Replayer, Replays};
use crate::pipeline::report::{InFlight, Report, Shown};
use crate::pipeline::store::{Change, Errand, Errant, Leaves, Store};
use crate::pipeline::subscription::Subscription;
use crate::pipeline::webhook::{Answer, Endpoint, Job};
use crate::pipeline::workers::Workers;
use crate::pure::about::{self, Tell};
use crate::pure::conflict::{self, Owed};
use crate::pure::dispatch::{Action, Attempt, Dispatch, Fetched, FlowIndex, Notice, SuspectLetter};
use crate::pure::endpoint::{self, DownReason, LetterClass, Moment, Outcome, Settings};
use crate::pure::flow;
use crate::pure::message::{Arrived, Telling, Watch, WebhookId};
use crate::pure::share::Division;
use crate::pure::snapshot::State;
use crate::pure::table::Table;
use crate::pure::url;
use crate::sys::{self, Thread};

/// Batches of rows on their way; each is at most one socket read, or one row.
const ROWS_MAX: usize = 2;
/// Sightings on their way; each is a page of databases at most.
const SIGHTINGS_MAX: usize = 32;
/// A worker without work for this long ends.
const WORKER_IDLE: Duration = Duration::from_secs(60);
/// An unfiltered open request is read anew after so many of its timeouts: quiet ones end by themselves before.
const UNFILTERED_ROTATE: u32 = 2;
/// Between two tries to activate a webhook.
const ACTIVATE_AGAIN: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];
/// Orders on their way: a webhook takes them at once, and reads requests that found no room when it starts again.
const ORDERS_MAX: usize = 16;
/// With `lease = shared`: how often others hear that we tell nothing, while we do not run.
const SETTLE_EVERY: Duration = Duration::from_millis(500);
/// Failures remembered for dead letters; more than can be unfinished are forgotten all at once.
const FAILURES_MAX: usize = 2 * endpoint::WINDOW_EVENTS;

/// What a running webhook can be told.
#[derive(Debug)]
pub enum Order {
    /// Its configuration has settled: it may start for the first time.
    Confirm,
    /// Send dead letters again.
    Replay(Box<Request>),
    /// These dead letters are gone.
    Discarded(Vec<WebhookId>),
    /// No new deliveries; `deliveries` for those in flight, then `checkpoint` for one last checkpoint.
    Stop {
        /// For what is in flight.
        deliveries: Duration,
        /// For the last checkpoint.
        checkpoint: Duration,
    },
}

/// A running webhook.
pub struct Running {
    orders: Sender<Order>,
    ended: Receiver<Vec<Thread>>,
    thread: Thread,
}

impl Running {
    /// Starts the webhook, which tells only while `hold` is valid. Unless `confirmed`, only one that ran before with
    /// this very configuration goes on.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(
        shared: &Shared,
        webhook: config::Webhook,
        confirmed: bool,
        hold: Arc<Hold>,
    ) -> Result<Running> {
        Running::start_with(&Shared { hold, ..shared.clone() }, webhook, move |shared, webhook, orders| {
            run(shared, webhook, confirmed, orders)
        })
    }

    /// Starts only what sends letters again, for a command when no daemon runs: nothing is read, nothing is
    /// written but what comes of the letters.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start_replays(shared: &Shared, webhook: config::Webhook) -> Result<Running> {
        Running::start_with(shared, webhook, run_replays)
    }

    fn start_with(
        shared: &Shared,
        webhook: config::Webhook,
        run: impl FnOnce(&Shared, &config::Webhook, &Receiver<Order>) -> Vec<Thread> + Send + 'static,
    ) -> Result<Running> {
        let (orders, ordered) = bounded(ORDERS_MAX);
        let (end, ended) = bounded(1);
        let shared = shared.clone();
        let thread = sys::spawn(&format!("webhook:{}", webhook.name), move || {
            let left = run(&shared, &webhook, &ordered);
            let _ = end.send(left);
        })?;
        Ok(Running { orders, ended, thread })
    }

    /// Tells it something; never waits. Whether there was room.
    pub fn order(&self, order: Order) -> bool {
        self.orders.try_send(order).is_ok()
    }

    /// Whether it has ended, so that `join` does not wait.
    pub fn is_ended(&self) -> bool {
        !self.ended.is_empty() || self.thread.is_finished()
    }

    /// Waits for its end, until `deadline`; gives the threads that are still busy with something that hangs.
    pub fn join(self, deadline: Instant) -> Vec<Thread> {
        match self.ended.recv_deadline(deadline) {
            Ok(mut left) => {
                left.push(self.thread);
                left
            }
            Err(_) => vec![self.thread],
        }
    }
}

fn run_replays(shared: &Shared, webhook: &config::Webhook, orders: &Receiver<Order>) -> Vec<Thread> {
    let active = activation::for_replays(shared, webhook);
    match active.and_then(|active| Dispatcher::start(shared, webhook, active)) {
        Ok(mut dispatcher) => {
            dispatcher.dispatch.only_replays();
            dispatcher.run(orders)
        }
        Err(error) => {
            log::error!("webhook `{}` cannot run: {error}", webhook.name);
            Vec::new()
        }
    }
}

fn run(shared: &Shared, webhook: &config::Webhook, confirmed: bool, orders: &Receiver<Order>) -> Vec<Thread> {
    shared.board.post_state(&webhook.name, State::Starting, sys::wall(), None);
    let Some(active) = activate(shared, webhook, confirmed, orders) else { return Vec::new() };
    if say_start(shared, webhook, &active) {
        match Dispatcher::start(shared, webhook, active) {
            Ok(dispatcher) => return dispatcher.run(orders),
            Err(error) => log::error!("webhook `{}` cannot run: {error}", webhook.name),
        }
    }
    // Held back: nothing to do until the configuration changes, or we are stopped.
    loop {
        settle(shared);
        let order = match shared.hold.share() {
            Some(_) => orders.recv_timeout(SETTLE_EVERY),
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match order {
            Ok(Order::Stop { .. }) | Err(RecvTimeoutError::Disconnected) => return Vec::new(),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// Of databases that daemons divide nothing is told yet: others need not wait for us.
fn settle(shared: &Shared) {
    if let Some(share) = shared.hold.share() {
        share.on_settled(share.generation());
    }
}

/// Activates the webhook, as soon as CouchDB lets us; `None` when stopped before.
fn activate(
    shared: &Shared,
    webhook: &config::Webhook,
    mut confirmed: bool,
    orders: &Receiver<Order>,
) -> Option<Active> {
    let mut complaint = Complaint::default();
    let mut tries = 0;
    loop {
        settle(shared);
        let is_wanted = || !orders.is_empty();
        let activate = || activation::activate(shared, webhook, &is_wanted);
        let active = match confirmed {
            true => activate().map(Some),
            false => activation::is_known(shared, webhook).and_then(|known| known.then(activate).transpose()),
        };
        let pause = match active {
            Ok(Some(active)) => return Some(active),
            // Not known: waits to be confirmed, or stopped.
            Ok(None) => None,
            Err(error) => {
                if Outage::concerns(&error) {
                    shared.outage.say(&error);
                } else if error.kind() != Kind::Stopped && complaint.is_news(error.kind(), sys::now()) {
                    log::error!("webhook `{}` cannot start: {error}; trying again", webhook.name);
                }
                tries += 1;
                Some(ACTIVATE_AGAIN[(tries - 1).min(ACTIVATE_AGAIN.len() - 1)])
            }
        };
        let order = match pause {
            Some(pause) if shared.hold.share().is_some() => orders.recv_timeout(pause.min(SETTLE_EVERY)).ok(),
            Some(pause) => orders.recv_timeout(pause).ok(),
            None => orders.recv().ok(),
        };
        match order {
            Some(Order::Stop { .. }) => return None,
            Some(Order::Confirm) => confirmed = true,
            // Read anew, once it is active.
            Some(Order::Replay(_) | Order::Discarded(_)) => {}
            None if pause.is_none() => return None,
            None => {}
        }
    }
}

/// Says how the webhook starts; `false` when it may not run.
fn say_start(shared: &Shared, webhook: &config::Webhook, active: &Active) -> bool {
    let name = &webhook.name;
    let databases = webhook.databases().replace(", ", "`, `");
    if let Some(since) = active.record.gone_since {
        tell_gone(shared, webhook, since);
        log::error!(
            "webhook `{name}` is paused for good: its endpoint said 410 at {since}; `couch-hookd resume {name}` or a \
             change of its section ends that"
        );
        let why = active.record.gone_reason.clone();
        shared.board.post_state(name, State::Gone, since, why);
        return false;
    }
    if let Some(since) = active.record.paused_since {
        let reason = active.record.paused_reason.as_deref().unwrap_or("no reason was kept");
        let text = format!(
            "webhook `{name}` is paused since {since} ({reason}); `couch-hookd resume {name}` or a change of its section \
             ends that"
        );
        match active.record.paused_by {
            Some(_) => log::info!("{text}"),
            None => log::error!("{text}"),
        }
        shared.board.post_state(name, State::Paused, since, Some(reason.to_owned()));
        return false;
    }
    if webhook.paused {
        log::info!("webhook `{name}` is paused by its configuration");
        shared.board.post_state(name, State::Paused, sys::wall(), Some("by its configuration".to_owned()));
        return false;
    }
    if active.n_letters > active.letters_max {
        log::error!(
            "webhook `{name}` is paused: more than {} dead letters of it lie in `{}`; discard them, raise \
             dead_letters_max, or let it go on with `couch-hookd resume {name}`",
            active.letters_max,
            shared.state_db
        );
        let why = format!("more than {} dead letters", active.letters_max);
        shared.board.post_state(name, State::Paused, sys::wall(), Some(why));
        return false;
    }
    if webhook.watch == Watch::Daemon {
        let first = if active.first { "starts for the first time" } else { "goes on" };
        log::info!("webhook `{name}` {first}: tells events about couch-hookd itself");
    } else if webhook.watch == Watch::Databases {
        let first = if active.first { "starts for the first time" } else { "goes on" };
        log::info!(
            "webhook `{name}` {first}: tells which of the databases `{databases}` come, change and go"
        );
    } else if webhook.watch == Watch::Replications {
        let first = match (active.first, &webhook.since) {
            (true, config::Since::Now) => "starts for the first time, from now on,",
            (true, config::Since::Beginning) => "starts for the first time",
            (false, _) => "goes on",
        };
        log::info!("webhook `{name}` {first}: tells how the replications of `{databases}` are");
    } else if active.first {
        let from = match webhook.since {
            config::Since::Now => "from now on",
            config::Since::Beginning => "from their beginning",
        };
        log::info!("webhook `{name}` starts for the first time: tells changes of `{databases}` {from}");
    } else {
        let since = activation::since_text(&webhook.since);
        if active.record.since.as_deref().is_some_and(|first| first != since) {
            log::warn!("webhook `{name}`: `since = {since}` has no effect, it has a position already");
        }
        log::info!("webhook `{name}` goes on with changes of `{databases}`");
    }
    true
}

/// Keeps it for webhooks that tell of ourselves, unless that was done when it happened: the daemon may have been
/// killed between both.
fn tell_gone(shared: &Shared, webhook: &config::Webhook, since: jiff::Timestamp) {
    if webhook.watch == Watch::Daemon || !shared.watched.load(Ordering::Relaxed) {
        return;
    }
    let tell = Tell::of_webhook(&webhook.name, about::GONE, since, GONE_TEXT);
    if let Err(error) = state_db::store_condition(&shared.server, &shared.state_db, &tell) {
        log::warn!("webhook `{}`: that it is gone could not be kept: {error}", webhook.name);
    }
}

/// What the last failure of an event was, for its dead letter.
struct Failure {
    status: Option<u16>,
    text: String,
    first: jiff::Timestamp,
}

/// What came of an attempt.
struct Done {
    token: u64,
    /// `None`: none was made, the webhook is not ours to tell now.
    answer: Option<Answer>,
}

struct Dispatcher<'a> {
    shared: &'a Shared,
    webhook: &'a config::Webhook,
    dispatch: Dispatch,
    subscriptions: Vec<Subscription>,
    /// Databases that are found by pattern.
    found: Option<Found>,
    store: Store,
    endpoint: Arc<Endpoint>,
    workers: Workers<Job>,
    in_flight: Table<u64, InFlight>,
    failures: HashMap<WebhookId, Failure>,
    /// Why the last attempt without an answer got none.
    no_answer: String,
    n_letters: u64,
    letters_max: u64,
    replays: Replays,
    report: Report,
    bytes: usize,
    stop: Option<Stopping>,
    channels: Channels,
    /// Whether it was told that deliveries arrive.
    is_told_up: bool,
    /// `watch = daemon`: CouchDB itself cannot be reached, and that was told.
    is_couchdb_lost: bool,
}

#[derive(Clone, Copy)]
struct Stopping {
    deliveries_until: Instant,
    until: Instant,
    hurry: Duration,
    cut: bool,
}

struct Channels {
    done: (Sender<Done>, Receiver<Done>),
    stored: (Sender<Stored>, Receiver<Stored>),
    errants: (Sender<Errant>, Receiver<Errant>),
    fed: (Sender<Fed>, Receiver<Fed>),
    wake: (Sender<()>, Receiver<()>),
}

impl<'a> Dispatcher<'a> {
    fn start(shared: &'a Shared, webhook: &'a config::Webhook, active: Active) -> Result<Dispatcher<'a>> {
        let n = webhook.db.len();
        let channels = Channels {
            done: bounded(webhook.concurrency),
            stored: bounded(n + if webhook.patterns.is_some() { ACTIVE_MAX } else { 0 }),
            errants: bounded(16),
            fed: bounded(ROWS_MAX),
            wake: bounded(1),
        };
        let endpoint = Arc::new(Endpoint::new(webhook, &shared.hold)?);
        let flows = (0..n).map(|_| found::new_flow(shared, webhook));
        let mut dispatch = Dispatch::new(settings(webhook), flows.collect(), sys::now());
        dispatch.set_readings_max(shared.pool.size());
        let subscriptions = webhook.db.iter().enumerate().map(|(flow, db)| {
            let mark = active.record.databases.get(db).copied();
            let seek = active.record.seeks.get(db).cloned();
            let telling = Arc::new(telling(&shared.source, webhook, db));
            let reading = Reading::new(shared, webhook, &telling, seek, flow, &channels.fed.0);
            Subscription::named(reading, mark)
        });
        let subscriptions = subscriptions.collect::<Result<_>>()?;
        let store = Store::start(shared, webhook, active.bucket_revs, channels.errants.0.clone())?;
        let workers = workers(shared, webhook, &endpoint, channels.done.0.clone());
        if webhook.watch == Watch::Daemon && !shared.said_started.swap(true, Ordering::Relaxed) {
            store.tell(about::started(env!("CARGO_PKG_VERSION"), sys::wall()));
        }
        let mut replays = Replays::default();
        active.replays.into_iter().for_each(|request| replays.ask(request));
        let found = webhook.patterns.clone().map(|pattern| {
            let (databases, seeks) = (active.databases, active.record.seeks.clone());
            let (to, sightings) = bounded(SIGHTINGS_MAX);
            let (wanted, state_db) = (pattern.clone(), shared.state_db.clone());
            let wanted = move |db: &str| wanted.matches(db, &state_db);
            shared.lookout.subscribe(Box::new(wanted.clone()), to)?;
            Ok(Found::new(pattern, &wanted, databases, seeks, sightings, sys::now()))
        });
        let found = found.transpose()?;
        let mut dispatcher = Dispatcher {
            replays,
            report: Report::new(),
            letters_max: active.letters_max,
            shared,
            webhook,
            dispatch,
            subscriptions,
            store,
            endpoint,
            workers,
            in_flight: Table::default(),
            failures: HashMap::new(),
            no_answer: String::new(),
            n_letters: active.n_letters,
            bytes: 0,
            stop: None,
            channels,
            is_told_up: false,
            is_couchdb_lost: false,
            found,
        };
        dispatcher.restore_suspects(active.suspects, sys::now());
        Ok(dispatcher)
    }

    /// Letters that we send again by ourselves, as far as their databases are ours.
    fn restore_suspects(&mut self, letters: Vec<(String, SuspectLetter)>, now: Instant) {
        let mut suspects = Vec::new();
        for (db, letter) in letters {
            if !self.dispatch.is_suspect(&letter.id) {
                suspects.extend(self.flow_of(&db).map(|flow| (flow, letter)));
            }
        }
        self.dispatch.restore_suspects(suspects, now);
    }

    fn run(mut self, orders: &Receiver<Order>) -> Vec<Thread> {
        let mut actions = Vec::new();
        let sightings = found::sightings(self.found.as_ref());
        loop {
            let now = sys::now();
            self.attend(now);
            let wake = &self.channels.wake.0;
            let (permits, hold) = (&self.shared.permits, &self.shared.hold);
            let mut permit = || hold.is_valid_or_wakes(wake) && permits.take(wake);
            self.dispatch.poll(now, permits.bytes_free(), sys::jitter(), &mut permit, &mut actions);
            for action in actions.drain(..) {
                self.act(action, now);
            }
            if !self.replays.is_empty() && self.go_on_replaying(now) {
                continue;
            }
            self.count_bytes();
            self.report(now);
            if self.is_over(now) {
                return self.end();
            }
            // To wait costs more than to look: seven channels to sign on to, and a switch of threads.
            if !self.take_ready(orders, &sightings) {
                self.wait(orders, &sightings);
                // Where cores are short, workers that are about to finish do so now: one wake-up takes them all.
                sys::yield_now();
                self.take_ready(orders, &sightings);
            }
        }
    }

    /// Takes what is there, rows last and one batch at a time; whether there was anything.
    fn take_ready(&mut self, orders: &Receiver<Order>, sightings: &Receiver<Sighting>) -> bool {
        let mut any = false;
        while let Ok(done) = self.channels.done.1.try_recv() {
            self.on_done(done);
            any = true;
        }
        while let Ok(stored) = self.channels.stored.1.try_recv() {
            self.on_stored(stored);
            any = true;
        }
        while let Ok(errant) = self.channels.errants.1.try_recv() {
            self.on_errant(errant);
            any = true;
        }
        if let Ok(order) = orders.try_recv() {
            self.on_order(order);
            any = true;
        }
        if let Ok(sighting) = sightings.try_recv() {
            self.on_sighting(sighting);
            any = true;
        }
        if let Ok(fed) = self.channels.fed.1.try_recv() {
            self.on_fed(fed);
            any = true;
        }
        any
    }

    /// Waits for one input.
    fn wait(&mut self, orders: &Receiver<Order>, sightings: &Receiver<Sighting>) {
        let Channels { done, stored, errants, fed, wake } = &self.channels;
        let (done, stored, errants, fed, wake) =
            (done.1.clone(), stored.1.clone(), errants.1.clone(), fed.1.clone(), wake.1.clone());
        let deadline = match (self.dispatch.next_deadline(), &self.stop) {
            (deadline, Some(stop)) => {
                let next = if stop.cut { stop.until } else { stop.deliveries_until };
                Some(deadline.map_or(next, |deadline| deadline.min(next)))
            }
            (deadline, None) => {
                let others = self.replays.next_deadline().into_iter().chain(self.report.next_deadline());
                let found = self.found.as_ref().and_then(Found::next_deadline);
                others.chain(found).chain(deadline).min()
            }
        };
        let timer = match deadline {
            Some(deadline) => crossbeam_channel::at(deadline),
            None => never(),
        };
        select_biased! {
            recv(done) -> input => input.into_iter().for_each(|done| self.on_done(done)),
            recv(stored) -> input => input.into_iter().for_each(|stored| self.on_stored(stored)),
            recv(errants) -> input => input.into_iter().for_each(|errant| self.on_errant(errant)),
            recv(orders) -> order => self.on_order(order.unwrap_or(STOP_NOW)),
            recv(wake) -> _ => {}
            recv(timer) -> _ => {}
            recv(sightings) -> input => input.into_iter().for_each(|sighting| self.on_sighting(sighting)),
            recv(fed) -> input => input.into_iter().for_each(|fed| self.on_fed(fed)),
        }
    }

    // --- Inputs ------------------------------------------------------------------------------------------

    fn on_order(&mut self, order: Order) {
        let (deliveries, checkpoint) = match order {
            Order::Stop { deliveries, checkpoint } => (deliveries, checkpoint),
            Order::Replay(request) => return self.replays.ask(*request),
            Order::Discarded(letters) => return self.on_discarded(&letters),
            Order::Confirm => return,
        };
        if self.stop.is_some() {
            return;
        }
        let now = sys::now();
        self.dispatch.halt();
        self.subscriptions.iter().for_each(Subscription::close);
        let deliveries_until = now + deliveries;
        let until = deliveries_until + checkpoint;
        self.stop = Some(Stopping { deliveries_until, until, hurry: checkpoint, cut: false });
    }

    fn on_done(&mut self, Done { token, answer }: Done) {
        let now = sys::now();
        let Some(InFlight { id, started, shown }) = self.in_flight.remove(&token) else { return };
        let Some(answer) = answer else { return self.dispatch.on_given_back(token, now) };
        let is_delivered = self.dispatch.endpoint().is_delivered(answer.outcome);
        self.report.on_outcome(answer.outcome, is_delivered, &answer.text, now);
        if let Some(shown) = shown {
            shown.show(&answer);
        }
        if self.stop.is_some_and(|stop| stop.cut) && !is_status(answer.outcome) {
            self.dispatch.on_given_back(token, now);
            return;
        }
        match answer.outcome {
            _ if is_delivered => {
                self.failures.remove(&id);
                if !std::mem::replace(&mut self.is_told_up, true) {
                    self.tell_webhook(about::RECOVERED, "its endpoint takes events", None);
                }
                log::debug!("webhook `{}`: `{id}` delivered", self.webhook.name);
            }
            outcome => {
                let status = match outcome {
                    Outcome::Status { status, .. } => Some(status),
                    Outcome::Unreachable | Outcome::Timeout | Outcome::Broken => None,
                };
                log::debug!("webhook `{}`: `{id}`: {outcome:?} {}", self.webhook.name, answer.text);
                if status.is_none() {
                    self.no_answer.clone_from(&answer.text);
                }
                // What a batch was answered is about none of its events.
                if !self.dispatch.is_batch(token) {
                    self.note_failure(id, status, answer.text, started);
                }
            }
        }
        self.dispatch.on_outcome(token, answer.outcome, Moment { now, jitter: sys::jitter() });
    }

    fn note_failure(&mut self, id: WebhookId, status: Option<u16>, text: String, started: jiff::Timestamp) {
        if self.failures.len() >= FAILURES_MAX {
            self.failures.clear();
        }
        let first = self.failures.get(&id).map_or(started, |failure| failure.first);
        self.failures.insert(id, Failure { status, text, first });
    }

    fn on_stored(&mut self, Stored { flow, result }: Stored) {
        let now = sys::now();
        match result {
            Ok(rev) => self.dispatch.on_checkpoint(flow, Some(rev), now),
            // Of one of thousands this is no news: it is opened anew.
            Err(error) if error.kind() == Kind::Conflict && self.subscriptions[flow].is_pooled() => {
                log::debug!("{}: the checkpoint is not stored: {error}", self.place(flow));
                self.dispatch.on_position_lost(flow, now);
            }
            Err(error) => {
                self.complain(flow, &error, "failed to store the checkpoint: ");
                self.dispatch.on_checkpoint(flow, None, now);
            }
        }
    }

    fn on_errant(&mut self, errant: Errant) {
        let now = sys::now();
        match errant {
            Errant::LookedUp(token, exists) => self.dispatch.on_looked_up(token, exists, now),
            Errant::Letter(token, stored) => {
                if let Err(error) = &stored {
                    let state_db = &self.shared.state_db;
                    log::error!(
                        "webhook `{}`: a dead letter could not be stored in `{state_db}`: {error}; its event stays \
                         undelivered and is tried again",
                        self.webhook.name
                    );
                }
                self.dispatch.on_letter(token, stored.is_ok(), now);
            }
            Errant::Kept(token, kept) => {
                if let Err(error) = &kept {
                    let (name, state_db) = (&self.webhook.name, &self.shared.state_db);
                    log::error!(
                        "webhook `{name}`: what is known of a conflict could not be stored in `{state_db}`, or its leaves \
                         not be read: {error}; its event waits and is tried again"
                    );
                }
                self.dispatch.on_kept(token, kept.ok(), now);
            }
            Errant::Fetched(letter, fetched) => self.dispatch.on_fetched(&letter, *fetched, now),
            Errant::Listed(listed) => self.replays.on_listed(listed, now),
            Errant::Answered { id, over, state } => self.replays.on_answered(&id, over, state, now),
            Errant::Suspects(Ok(letters)) => self.restore_suspects(letters, now),
            Errant::Suspects(Err(_)) => self.list_suspects_again(now),
            Errant::Databases(bucket, stored) => self.on_databases_stored(bucket, stored),
        }
    }

    fn on_fed(&mut self, fed: Fed) {
        let now = sys::now();
        match fed {
            Fed::Opened { flow, opened, mark, life } => {
                let subscription = &mut self.subscriptions[flow];
                subscription.life = life;
                let is_pooled = subscription.is_pooled();
                if subscription.mark.replace(mark) != Some(mark) && !is_pooled {
                    self.store.order(Errand::Record(Change::Mark(subscription.db().to_owned(), mark)));
                }
                self.report.feed_opened(subscription.db());
                if is_pooled {
                    self.on_found_mark(flow, mark);
                }
                self.dispatch.on_opened(flow, opened);
                self.shared.outage.over();
                if std::mem::take(&mut self.is_couchdb_lost) {
                    self.store.tell(about::couchdb_recovered(sys::wall()));
                }
            }
            Fed::Back(flow, reading, fed) => {
                self.subscriptions[flow].take_back(reading);
                self.on_fed(*fed);
            }
            Fed::Rows(flow, rows) => {
                if self.subscriptions[flow].is_pooled() {
                    self.on_found_changes(flow);
                }
                self.dispatch.on_rows(flow, rows, now);
            }
            Fed::End { flow, last_seq, pending, closed } => {
                // Opened, and even rows, may be followed by the same fault at the same place.
                if !closed {
                    let subscription = &mut self.subscriptions[flow];
                    subscription.n_cuts = 0;
                    if subscription.complaint.over() {
                        log::info!("{}: reading again", self.place(flow));
                        self.tell_feed(flow, about::FEED_RECOVERED, "read again");
                    }
                }
                self.dispatch.on_end(flow, last_seq, pending, closed, now);
            }
            Fed::Failed(flow, fault, error) if self.subscriptions[flow].is_pooled() => {
                self.dispatch.on_read_failed(flow, fault, now);
                self.on_found_failed(flow, error.as_ref(), now);
            }
            Fed::Failed(flow, fault, error) => {
                self.report.feed_failed(self.subscriptions[flow].db(), error.as_ref());
                if let Some(error) = error.filter(|_| self.stop.is_none()) {
                    self.complain(flow, &error, "");
                    if self.webhook.watch == Watch::Daemon && Outage::concerns(&error) {
                        self.tell_couchdb_lost(flow, &error, now);
                    }
                }
                self.dispatch.on_read_failed(flow, fault, now);
            }
        }
    }

    fn complain(&mut self, flow: FlowIndex, error: &crate::error::Error, what: &str) {
        if Outage::concerns(error) {
            self.shared.outage.say(error);
            return;
        }
        let cut = error.kind() == Kind::Cut;
        let subscription = &mut self.subscriptions[flow];
        subscription.n_cuts += u32::from(cut);
        // One cut is how a server that stops, or a proxy that has waited long enough, ends a request: no news yet.
        if (cut && subscription.n_cuts == 1) || !subscription.complaint.is_news(error.kind(), sys::now()) {
            log::debug!("{}: {what}{error}", self.place(flow));
            return;
        }
        let place = self.place(flow);
        if what.is_empty() && !matches!(error.kind(), Kind::Stopped) {
            let found = match error.kind() {
                Kind::NotFound => "it does not exist".to_owned(),
                _ => error.to_string(),
            };
            self.tell_feed(flow, about::FEED_LOST, &found);
        }
        match error.kind() {
            Kind::NotFound => log::warn!("{place} does not exist; waiting for it"),
            Kind::Timeout | Kind::Cut => log::warn!("{place}: {what}{error}; reconnecting"),
            Kind::Stopped => {}
            _ => log::error!("{place}: {what}{error}; trying again"),
        }
    }

    /// Keeps something about this webhook for those that tell of it; never about one of those itself.
    fn tell_webhook(&self, event_type: &'static str, message: &str, reason: Option<&str>) {
        if self.is_watched() {
            let tell = Tell::of_webhook(&self.webhook.name, event_type, sys::wall(), message);
            self.store.tell(match reason {
                Some(reason) => tell.with("reason", reason.into()),
                None => tell,
            });
        }
    }

    fn tell_feed(&self, flow: FlowIndex, event_type: &'static str, message: &str) {
        if self.is_watched() {
            let (webhook, db) = (&self.webhook.name, self.subscriptions[flow].db());
            self.store.tell(Tell::of_feed(webhook, db, event_type, sys::wall(), message));
        }
    }

    fn is_watched(&self) -> bool {
        self.webhook.watch != Watch::Daemon && self.shared.watched.load(Ordering::Relaxed)
    }

    /// Tells it from memory: there is nothing that it could be kept in.
    fn tell_couchdb_lost(&mut self, flow: FlowIndex, error: &crate::error::Error, now: Instant) {
        let Some(mark) = self.dispatch.flow(flow).mark().map(str::to_owned) else { return };
        if std::mem::replace(&mut self.is_couchdb_lost, true) {
            return;
        }
        let n = u64::from_be_bytes(sys::random_bytes());
        let telling = &self.subscriptions[flow].telling;
        let event = about::couchdb_lost(telling, &mark, n, sys::wall(), error.cause());
        if telling.wants(&event) {
            self.dispatch.on_rows(flow, vec![Arrived { seq: None, event: Some(event) }], now);
        }
    }

    fn place(&self, flow: FlowIndex) -> String {
        format!("webhook `{}`, database `{}`", self.webhook.name, self.subscriptions[flow].db())
    }

    // --- Actions -----------------------------------------------------------------------------------------

    fn act(&mut self, action: Action, now: Instant) {
        match action {
            Action::Read(flow, read) => {
                if let Err(error) = self.subscriptions[flow].read(self.shared, read) {
                    log::error!("{}: {error}", self.place(flow));
                }
            }
            Action::Close(flow) => self.subscriptions[flow].close(),
            Action::Attempt(attempt) => {
                let telling = self.telling(attempt.flow);
                self.deliver(attempt.event.id, Job::One(attempt, telling));
            }
            Action::Batch(batch) => {
                let tellings = batch.parts.iter().map(|part| self.telling(part.flow)).collect();
                self.deliver(batch.id, Job::Batch(batch, tellings));
            }
            Action::LookUp(attempt) => self.store.order(Errand::LookUp(attempt.token, attempt.event.id)),
            Action::StoreLetter(attempt, class) => self.store_letter(&attempt, class, now),
            Action::Keep(attempt, owed) => self.keep(&attempt, owed),
            Action::DeleteLetter(id) => {
                self.n_letters = self.n_letters.saturating_sub(1);
                self.store.order(Errand::Delete(id));
            }
            Action::Replayed(id, end) => self.replays.on_replayed(&id, &end),
            Action::Fetch(flow, letter) => {
                // A flow that was never opened has no mark yet; the letter's document can wait.
                let telling = self.telling(flow);
                match (self.subscriptions[flow].mark, self.replays.letter(&letter.id)) {
                    (Some(mark), Some((stored, asked))) => {
                        let stored = Box::new(stored.clone());
                        self.store.order(Errand::FetchLetter(telling, stored, mark, asked));
                    }
                    (Some(mark), None) => self.store.order(Errand::Fetch(telling, letter, mark)),
                    (None, _) => self.dispatch.on_fetched(&letter, Fetched::NotYet, now),
                }
            }
            Action::StoreCheckpoint(flow, position) => {
                let subscription = &self.subscriptions[flow];
                let job = checkpointer::Job {
                    server: self.shared.server.clone(),
                    db: subscription.db().to_owned(),
                    webhook: self.webhook.name.clone(),
                    key: self.shared.key.clone(),
                    position,
                    seek: subscription.seek.clone(),
                    life: subscription.life.clone(),
                    hurry: self.stop.map(|stop| stop.hurry),
                    hold: Arc::clone(&self.shared.hold),
                    flow,
                    to: self.channels.stored.0.clone(),
                };
                if self.shared.checkpoints.try_send(Box::new(job)).is_err() {
                    self.dispatch.on_checkpoint(flow, None, now);
                }
            }
            Action::LetGo(flow) => self.let_go(flow),
            Action::Say(notice) => self.say(notice),
        }
    }

    fn telling(&self, flow: FlowIndex) -> Arc<Telling> {
        Arc::clone(&self.subscriptions[flow].telling)
    }

    fn deliver(&mut self, id: WebhookId, job: Job) {
        let shown = match self.shared.board.has_onlookers() {
            true => Shown::of(self.shared, self.webhook, &job),
            false => None,
        };
        self.in_flight.insert(job.token(), InFlight { id, started: sys::wall(), shown });
        if let Err(error) = self.workers.give(job, self.in_flight.len()) {
            log::error!("webhook `{}`: {error}", self.webhook.name);
        }
    }

    fn keep(&mut self, attempt: &Attempt, owed: Owed) {
        let (flow, event) = (attempt.flow, &attempt.event);
        let telling = self.telling(flow);
        let mark = self.subscriptions[flow].mark.expect("a feed that gave rows was opened");
        let place = conflict::place(&self.webhook.name, &telling.db, &mark.to_string());
        let kept_at = event.conflict_key().map(|key| conflict::id(&place, key));
        self.store.order(match (owed, kept_at) {
            (Owed::Forget, Some(id)) => Errand::Forget(attempt.token, id),
            (_, kept_at) => {
                let revs = std::iter::once(&event.rev).chain(&event.conflicts).cloned().collect();
                let (doc_id, read_at) = (event.doc_id.clone(), event.read_at);
                Errand::Remember(attempt.token, Box::new(Leaves { telling, doc_id, revs, kept_at, read_at }))
            }
        });
    }

    fn store_letter(&mut self, attempt: &Attempt, class: LetterClass, _now: Instant) {
        let event = &attempt.event;
        let failure = self.failures.get(&event.id);
        let subscription = &self.subscriptions[attempt.flow];
        let mark = subscription.mark.expect("a feed that gave rows was opened");
        let letter = DeadLetter {
            id: event.id.to_string(),
            webhook: self.webhook.name.clone(),
            db: subscription.db().to_owned(),
            mark,
            doc_id: event.doc_id.clone(),
            rev: event.rev.clone(),
            revs: std::iter::once(&event.rev).chain(&event.conflicts).cloned().collect(),
            seq: event.seq.as_ref().and_then(|seq| RawValue::from_string(seq.as_json().to_owned()).ok()),
            event_type: event.event_type().to_owned(),
            class: match class {
                LetterClass::Refused => DeadLetterClass::Refused,
                LetterClass::Suspect => DeadLetterClass::Suspect,
                LetterClass::GaveUp => DeadLetterClass::GivenUp,
            },
            status: failure.and_then(|failure| failure.status),
            answer: failure.map(|failure| failure.text.clone()).unwrap_or_default(),
            attempts: attempt.attempt,
            first_attempt_at: failure.map_or_else(sys::wall, |failure| failure.first),
            stored_at: sys::wall(),
            payload: event
                .about
                .as_ref()
                .and_then(|about| RawValue::from_string(about.data.to_string()).ok()),
        };
        self.store.order(Errand::Letter(attempt.token, Box::new(letter)));
    }

    fn say(&mut self, notice: Notice) {
        let name = &self.webhook.name;
        match notice {
            Notice::Endpoint(endpoint::Notice::Down(reason)) => {
                let endpoint = url::shown(self.webhook.endpoint.expose());
                let why = match reason {
                    DownReason::Unreachable => format!(": {}", self.no_answer),
                    _ => String::new(),
                };
                log::warn!(
                    "webhook `{name}`: its endpoint {} ({endpoint}{why}); the checkpoint is held",
                    down_text(reason)
                );
                self.report.down(Some(down_text(reason)));
                self.is_told_up = false;
                let message = format!("its endpoint {}", down_text(reason));
                self.tell_webhook(about::FAILING, &message, Some(down_word(reason)));
            }
            Notice::Endpoint(endpoint::Notice::Up) => {
                log::info!("webhook `{name}`: its endpoint takes events");
                self.report.down(None);
            }
            Notice::Endpoint(endpoint::Notice::Gone) => {
                log::error!(
                    "webhook `{name}`: its endpoint said 410 twice and is gone; paused for good, the checkpoint is \
                     kept; `couch-hookd resume {name}` or a change of its section ends that"
                );
                self.store.order(Errand::Record(Change::Gone("the endpoint answered 410".to_owned())));
                self.tell_webhook(about::GONE, GONE_TEXT, None);
            }
            Notice::Flow(flow, flow::Notice::Recreated) => {
                log::warn!(
                    "{}: database.recreated: it was deleted and created again; reading from its beginning",
                    self.place(flow)
                );
                self.tell_feed(
                    flow,
                    about::RECREATED,
                    "it was deleted and created again; read from its beginning",
                );
            }
            Notice::Flow(flow, flow::Notice::Rewound { pending }) => {
                log::warn!(
                    "{}: feed.rewound: {pending} changes lie ahead of the checkpoint, more than half of the \
                     database; what is told again has its first id",
                    self.place(flow)
                );
                let message = format!("{pending} changes lie ahead of the checkpoint: CouchDB went back");
                self.tell_feed(flow, about::FEED_REWOUND, &message);
            }
            Notice::Letter(flow, id, class) => {
                log::warn!("{}: `{id}` is a dead letter now ({})", self.place(flow), class.as_str());
                self.failures.remove(&id);
                self.n_letters += 1;
                if self.n_letters > self.letters_max {
                    self.pause_for_letters();
                }
            }
            // Said by the store, with the reason.
            Notice::LetterFailed(..) => {}
        }
    }

    fn pause_for_letters(&mut self) {
        let name = &self.webhook.name;
        let max = self.letters_max;
        log::error!(
            "webhook `{name}`: more than {max} dead letters; paused until `couch-hookd resume {name}`"
        );
        self.report.pause(format!("more than {max} dead letters"));
        let reason = format!("more than {max} dead letters");
        self.store.order(Errand::Record(Change::Paused(reason)));
        self.dispatch.halt();
        self.subscriptions.iter().for_each(Subscription::close);
    }

    /// Goes on with letters that are sent again; whether the machine has to be asked again at once.
    fn go_on_replaying(&mut self, now: Instant) -> bool {
        let n_asked = self.dispatch.n_asked();
        let mut replays = std::mem::take(&mut self.replays);
        replays.go_on(self, now);
        self.replays = replays;
        self.dispatch.n_asked() > n_asked
    }

    fn on_discarded(&mut self, letters: &[WebhookId]) {
        self.n_letters = self.n_letters.saturating_sub(letters.len() as u64);
        self.dispatch.forget_letters(letters);
        self.replays.on_discarded(letters);
    }

    /// Says how the webhook is, from time to time.
    fn report(&mut self, now: Instant) {
        if self.report.is_due(now) {
            let status = self.report.status(&mut self.dispatch, now);
            self.shared.board.post(&self.webhook.name, status);
        }
    }

    fn count_bytes(&mut self) {
        let now = self.dispatch.bytes();
        if now != self.bytes {
            self.shared.permits.hold_bytes(self.bytes, now);
            self.bytes = now;
        }
    }

    // --- The end -----------------------------------------------------------------------------------------

    /// Whether everything is done that a stop waits for, or its time is up.
    fn is_over(&mut self, now: Instant) -> bool {
        let Some(stop) = &mut self.stop else { return false };
        if !stop.cut && (self.in_flight.is_empty() || now >= stop.deliveries_until) {
            stop.cut = true;
            // What is still in flight is told again after the next start, with its first id.
            self.endpoint.shut_down();
            self.dispatch.flush(now);
            return false;
        }
        stop.cut && (self.dispatch.is_stored() || now >= stop.until)
    }

    /// Ends every part; gives those that are not done yet.
    fn end(self) -> Vec<Thread> {
        self.shared.permits.hold_bytes(self.bytes, 0);
        self.endpoint.shut_down();
        let mut threads: Vec<Thread> =
            self.subscriptions.into_iter().filter_map(Subscription::stop).collect();
        threads.push(self.store.stop());
        threads.extend(self.workers.stop());
        // Whoever is about to send to us finds nobody and ends.
        drop(self.channels);
        let (ended, left): (Vec<Thread>, Vec<Thread>) = threads.into_iter().partition(Thread::is_finished);
        for thread in ended {
            if let Err(panic) = thread.join() {
                log::error!("{panic}");
            }
        }
        left
    }
}

impl Replayer for Dispatcher<'_> {
    fn dispatch(&mut self) -> &mut Dispatch {
        &mut self.dispatch
    }

    fn flow_of(&mut self, db: &str) -> Option<FlowIndex> {
        Dispatcher::flow_of(self, db)
    }

    fn order(&mut self, errand: Errand) {
        self.store.order(errand);
    }

    fn division(&self) -> Option<(Arc<Division>, u64)> {
        // The number first: what is read after it may be newer, and is then looked at once more.
        let generation = self.shared.hold.share()?.generation();
        Some((self.shared.hold.share()?.division(), generation))
    }
}

/// Those that make the webhook's deliveries.
fn workers(
    shared: &Shared,
    webhook: &config::Webhook,
    endpoint: &Arc<Endpoint>,
    done: Sender<Done>,
) -> Workers<Job> {
    let endpoint = Arc::clone(endpoint);
    let permits = Arc::clone(&shared.permits);
    let name = format!("worker:{}", webhook.name);
    Workers::new(name, webhook.concurrency, WORKER_IDLE, move |job: Job| {
        let token = job.token();
        let deliver = AssertUnwindSafe(|| endpoint.deliver(&job));
        // The panic was logged by its hook; the event must not hang for it.
        let answer = catch_unwind(deliver)
            .unwrap_or_else(|_| Some(Answer { outcome: Outcome::Broken, text: "we panicked".to_owned() }));
        drop(job);
        permits.give_back();
        match done.send(Done { token, answer }) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    })
}

/// When the daemon's own end of the orders is gone.
const STOP_NOW: Order = Order::Stop { deliveries: Duration::ZERO, checkpoint: Duration::ZERO };

fn is_status(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::Status { .. })
}

/// Of an endpoint that is believed to be gone.
const GONE_TEXT: &str = "its endpoint said 410 and is gone; paused for good, its place is kept";

/// `reason` in the payload.
fn down_word(reason: DownReason) -> &'static str {
    match reason {
        DownReason::Unreachable => "unreachable",
        DownReason::RetryAfter => "retry_after",
        DownReason::Failing => "failing",
        DownReason::RefusesEverything => "refuses_everything",
        DownReason::TooManySuspects => "too_many_suspects",
        DownReason::MaybeGone => "maybe_gone",
    }
}

fn down_text(reason: DownReason) -> &'static str {
    match reason {
        DownReason::Unreachable => "cannot be reached",
        DownReason::RetryAfter => "asks to be left alone (`Retry-After`)",
        DownReason::Failing => "fails",
        DownReason::RefusesEverything => {
            "refuses one event after the other (nothing more becomes a dead letter)"
        }
        DownReason::TooManySuspects => "fails at too many different events",
        DownReason::MaybeGone => "answered 410 once",
    }
}

/// What the machine decides by.
pub(crate) fn settings(webhook: &config::Webhook) -> Settings {
    Settings {
        concurrency: webhook.concurrency,
        retry_schedule: webhook.retry_schedule.clone(),
        retry_after_max: webhook.retry_after_max,
        dead_letter_after: webhook.dead_letter_after,
        dead_letter_on: webhook.dead_letter_on.clone(),
        delivered_on: webhook.format.delivered_on(),
        give_up_after: webhook.give_up_after,
        rate_limit: webhook.rate_limit,
        batching: webhook.batching,
    }
}

/// What payloads of one database hold; `source` up to the database's name.
pub(crate) fn telling(source: &str, webhook: &config::Webhook, db: &str) -> Telling {
    Telling {
        webhook: webhook.name.clone(),
        db: db.to_owned(),
        source: format!("{source}/{}", crate::couch::client::encoded(db)),
        events: webhook.events.clone(),
        include_docs: webhook.include_docs,
        conflicts: webhook.conflicts,
        conflict_docs: webhook.conflict_docs,
        design_docs: webhook.design_docs,
        payload_bytes_max: webhook.payload_bytes_max,
        format: webhook.format,
        watch: webhook.watch,
    }
}
