//! The daemon: starts the parts in order, applies configurations as they come, stops in reverse.
//!
//! Guarantees (DESIGN §2, §3): hosted, it never exits for a bad configuration or an unreachable server, and is gone
//! within a second after CouchDB is; a configuration that cannot be used leaves the last good one in force; only
//! webhooks that changed are stopped and started; a webhook never runs twice at the same time.

pub mod couch_config;
mod leases;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select, tick};

use crate::config::finding::{Origin, Raw};
use crate::config::source::{self, Overrides, Sources};
use crate::config::{self, Config, Hookd};
use crate::couch::client::Server;
use crate::couch::leases::Hold;
use crate::couch::state_db;
use crate::daemon::leases::Leases;
use crate::error::{Kind, Result};
use crate::host::config_poller::ConfigPoller;
use crate::host::ending::Closed;
use crate::host::standalone::{Signal, Signals};
use crate::host::stdio::Stdio;
use crate::host::systemd::Systemd;
use crate::pipeline::Shared;
use crate::pipeline::checkpointer;
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::desk::{Ask, Desk};
use crate::pipeline::dispatcher::{Order, Running};
use crate::pipeline::hints::Hints;
use crate::pipeline::lookout::Lookout;
use crate::pipeline::permits::Permits;
use crate::pipeline::reader_pool::ReaderPool;
use crate::pure::checkpoint::StateKey;
use crate::pure::message::Watch;
use crate::pure::settled::Verdict;
use crate::pure::url::Url;
use crate::sys::{self, Thread};

/// Hosted: what is in flight may take this long after the end of stdin, then one last checkpoint.
const HOSTED_END: (Duration, Duration) = (Duration::from_millis(500), Duration::from_millis(300));
/// By itself: the same, after SIGTERM; together under the 5 s of DESIGN §3.
const OWN_END: (Duration, Duration) = (Duration::from_millis(3_500), Duration::from_millis(1_000));
/// After both, to give back leases and to say that we are gone. The rest of the second that a hosted daemon has.
const LEASES_END: Duration = Duration::from_millis(150);
/// How often ended webhooks are looked for, and their successors started.
const TICK: Duration = Duration::from_millis(50);
/// A webhook whose thread panicked starts again after this.
const RESTART_AFTER: Duration = Duration::from_secs(5);
/// A notifier without a configuration that can be used reads its files again: nobody restarts it.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// Questions of the desk on their way; what it tells of other daemons, too.
const ASKS_MAX: usize = 16;
/// Between two tries to reach CouchDB.
const CONNECT_AGAIN: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(3),
];

/// Where the configuration comes from, and what ends the daemon.
pub enum Start {
    /// CouchDB started us: `get` and `log` on stdio.
    Host(Stdio, Overrides),
    /// By ourselves, from files.
    Files(Sources),
    /// By ourselves, from `_config` over HTTP.
    Polled(Receiver<Verdict<Raw>>),
    /// CouchDB started us from `[update_notification]`, and ends us by closing stdin. A configuration that cannot be
    /// used is no reason to end.
    Notified {
        /// Gives one message when CouchDB is gone.
        closed: Receiver<Closed>,
        /// What it says of databases.
        hints: Arc<Hints>,
        /// Where the configuration comes from.
        configured: Configured,
    },
}

/// Where a configuration comes from that no host gives.
pub enum Configured {
    /// From files.
    Files(Sources),
    /// From `_config` over HTTP.
    Polled(Receiver<Verdict<Raw>>),
}

/// Runs until told to end; gives the exit status: 0, or 2 when started by itself with a configuration that
/// cannot be used.
///
/// # Errors
/// `Io` when no thread can be started or signals cannot be caught.
pub fn run(start: Start) -> Result<u8> {
    let systemd = Systemd::from_environment();
    let (mut stdio, mut poller, mut notified) = (None, None, None);
    let configured = match start {
        Start::Host(host, overrides) => {
            poller = Some(ConfigPoller::start(host.client())?);
            stdio = Some((host, overrides));
            None
        }
        Start::Files(sources) => Some(Configured::Files(sources)),
        Start::Polled(answers) => Some(Configured::Polled(answers)),
        Start::Notified { closed, hints, configured } => {
            notified = Some((closed, hints));
            Some(configured)
        }
    };
    let signals = configured.as_ref().map(|_| Signals::catch()).transpose()?;
    let (mut files, mut polled) = match configured {
        Some(Configured::Files(sources)) => (Some(sources), None),
        Some(Configured::Polled(answers)) => (None, Some(answers)),
        None => (None, None),
    };
    let (checkpoints, checkpointer) = checkpointer::start()?;
    let hints = notified.as_ref().map(|(_, hints)| Arc::clone(hints)).unwrap_or_default();
    let mut daemon = Daemon::new(checkpoints, hints);
    if let Some(sources) = &files
        && !daemon.apply_raw(&source::load(sources), true)
    {
        log::error!("the configuration cannot be used; see `couch-hookd check`");
        if notified.is_none() {
            log::logger().flush();
            return Ok(2);
        }
    }
    systemd.ready();
    let host_answers = poller.as_ref().map_or_else(never, ConfigPoller::answers);
    let host_closed = match (&stdio, &notified) {
        (Some((stdio, _)), _) => stdio.closed(),
        (None, Some((closed, _))) => closed.clone(),
        (None, None) => never(),
    };
    let again = if notified.is_some() { tick(READ_AGAIN) } else { never() };
    let received = signals.as_ref().map_or_else(never, Signals::received);
    let alive = systemd.alive_every().map_or_else(never, tick);
    let ticker = tick(TICK);
    loop {
        let answers = polled.clone().unwrap_or_else(never);
        let connected = daemon.connected();
        let asked = daemon.asked.clone();
        select! {
            recv(host_closed) -> reason => {
                say_closed(reason.ok().as_ref());
                break;
            }
            recv(received) -> signal => match signal {
                Ok(Signal::Reload) => {
                    systemd.reloading();
                    daemon.reload(files.as_mut());
                    systemd.ready();
                }
                Ok(Signal::Stop) | Err(_) => break,
            },
            recv(host_answers) -> verdict => if let (Ok(verdict), Some((_, overrides))) = (verdict, &stdio) {
                let (sections, settled) = verdict.into_parts();
                let raw = source::from_sections(&sections, &Origin::OsDaemons, overrides);
                let applied = daemon.apply_raw(&raw, settled);
                if let (true, Some((stdio, _))) = (applied && settled && daemon.registers(), &stdio) {
                    register(stdio, &sections);
                }
            },
            recv(answers) -> verdict => match verdict {
                Ok(verdict) => {
                    let (raw, settled) = verdict.into_parts();
                    daemon.apply_raw(&raw, settled);
                }
                Err(_) => polled = None,
            },
            recv(connected) -> facts => match facts {
                Ok(facts) => daemon.on_connected(facts),
                Err(_) => daemon.connect_again(),
            },
            recv(asked) -> ask => ask.into_iter().for_each(|ask| daemon.on_ask(ask)),
            recv(again) -> _ => if let (Some(sources), None) = (&files, &daemon.config) {
                daemon.apply_raw(&source::load(sources), true);
            },
            recv(ticker) -> _ => daemon.tick(),
            recv(alive) -> _ => systemd.alive(),
        }
    }
    systemd.stopping();
    let is_hosted = stdio.is_some() || notified.is_some();
    let (deliveries, checkpoint) = if is_hosted { HOSTED_END } else { OWN_END };
    daemon.stop(deliveries, checkpoint);
    drop(checkpointer);
    log::logger().flush();
    if let Some((stdio, _)) = stdio {
        // Whatever still hangs ends with the process.
        let _ = stdio.stop();
    }
    Ok(0)
}

fn say_closed(reason: Option<&Closed>) {
    match reason {
        // The host is gone: nobody reads this but stderr.
        Some(Closed::StdinEnded) | None => log::info!("CouchDB closed our stdin; ending"),
        Some(reason) => log::info!("the host is gone ({reason:?}); ending"),
    }
}

/// Asks CouchDB to restart us when one of our sections changes.
fn register(stdio: &Stdio, sections: &BTreeMap<String, BTreeMap<String, String>>) {
    for section in sections.keys().filter(|section| config::is_ours(section)) {
        if let Err(error) = stdio.client().register(section) {
            log::warn!("section `{section}` could not be registered: {error}");
        }
    }
}

/// What is known of CouchDB once it let us in.
struct Facts {
    key: StateKey,
    uuid: Option<String>,
    n_nodes: usize,
    version: String,
    /// Names of webhooks that have a record.
    recorded: Vec<String>,
}

/// A webhook of the current configuration, or of the one before.
struct Slot {
    running: Option<Running>,
    /// What it asks before it tells anything.
    hold: Option<Arc<Hold>>,
    /// What runs, or would.
    webhook: config::Webhook,
    /// Told to stop; starts again as this when it has ended.
    stopping: bool,
    next: Option<config::Webhook>,
    /// After a panic: starts again then.
    not_before: Option<Instant>,
    /// Whoever waits for the end; told by being dropped.
    waiting: Vec<Sender<()>>,
}

/// The connection that all webhooks of a configuration share.
struct Connection {
    server: Server,
    hookd: Arc<Hookd>,
    shared: Option<Shared>,
    outage: Arc<Outage>,
    facts: Receiver<Facts>,
    thread: Thread,
    desk: Option<Desk>,
    leases: Option<Leases>,
}

struct Daemon {
    config: Option<Config>,
    settled: bool,
    /// What was said of the current configuration, so that it is said once.
    said: HashSet<String>,
    connection: Option<Connection>,
    slots: BTreeMap<String, Slot>,
    checkpoints: checkpointer::CheckpointSender,
    hints: Arc<Hints>,
    /// What the desk of the connection asks.
    asks: Sender<Ask>,
    asked: Receiver<Ask>,
    /// Whether a webhook tells of ourselves; whether it was told that we started.
    watched: Arc<AtomicBool>,
    said_started: Arc<AtomicBool>,
    /// Threads of ended webhooks that hang in something; joined when they come back.
    left: Vec<Thread>,
}

impl Daemon {
    fn new(checkpoints: checkpointer::CheckpointSender, hints: Arc<Hints>) -> Daemon {
        let (asks, asked) = bounded(ASKS_MAX);
        Daemon {
            asks,
            asked,
            config: None,
            settled: false,
            said: HashSet::new(),
            connection: None,
            slots: BTreeMap::new(),
            checkpoints,
            hints,
            watched: Arc::default(),
            said_started: Arc::default(),
            left: Vec::new(),
        }
    }

    fn registers(&self) -> bool {
        self.config.as_ref().is_some_and(|config| config.hookd.register)
    }

    fn connected(&self) -> Receiver<Facts> {
        match &self.connection {
            Some(connection) if connection.shared.is_none() => connection.facts.clone(),
            _ => never(),
        }
    }

    fn reload(&mut self, files: Option<&mut Sources>) {
        say_if_failed(crate::log::reopen());
        let Some(sources) = files else {
            log::info!("SIGHUP: the configuration comes from CouchDB and is asked for anyway");
            return;
        };
        self.said.clear();
        match self.apply_raw(&source::load(sources), true) {
            true => log::info!("SIGHUP: configuration applied"),
            false => log::error!("SIGHUP: the new configuration cannot be used; the old one stays in force"),
        }
    }

    /// Judges a configuration, says what is wrong with it, and applies it if it can be used.
    fn apply_raw(&mut self, raw: &Raw, settled: bool) -> bool {
        let (parsed, findings) = config::parse(raw);
        // First: what is said of a configuration that cannot be used is to be found there, too.
        match config::log_file(raw) {
            None if parsed.config.is_none() => {}
            path => say_if_failed(crate::log::set_file(path.as_deref())),
        }
        // Half a configuration has faults that the whole one has not.
        if settled {
            let texts: Vec<String> = findings.iter().map(ToString::to_string).collect();
            for (finding, text) in findings.iter().zip(&texts) {
                if self.said.contains(text) {
                    continue;
                }
                match finding.is_error() {
                    true => log::error!("{text}"),
                    false => log::warn!("{text}"),
                }
            }
            self.said = texts.into_iter().collect();
        }
        let Some(config) = parsed.config else { return false };
        crate::log::set_level(config.hookd.log_level);
        crate::log::set_format(config.hookd.log_format);
        if settled {
            for name in &parsed.held_back {
                log::error!("webhook `{name}` is held back: its section has an error");
            }
        }
        self.apply(config, settled);
        true
    }

    fn apply(&mut self, config: Config, settled: bool) {
        self.settled |= settled;
        let same_hookd = self.config.as_ref().is_some_and(|old| old.hookd == config.hookd);
        if !same_hookd {
            self.disconnect();
        }
        let mut wanted: BTreeMap<String, config::Webhook> =
            config.webhooks.iter().map(|webhook| (webhook.name.clone(), webhook.clone())).collect();
        for (name, slot) in &mut self.slots {
            match wanted.remove(name) {
                Some(webhook) if same_hookd && !slot.stopping && slot.webhook == webhook => {
                    if let (true, Some(running)) = (settled, &slot.running) {
                        running.order(Order::Confirm);
                    }
                }
                next => slot.stop(next),
            }
        }
        for (name, webhook) in wanted {
            self.slots.insert(name, Slot::new(webhook));
        }
        let watched = config.webhooks.iter().any(|webhook| webhook.watch == Watch::Daemon);
        self.watched.store(watched, Ordering::Relaxed);
        let hookd = config.hookd.clone();
        let needed = !config.webhooks.is_empty();
        self.config = Some(config);
        if needed && self.connection.is_none() {
            self.connect(hookd);
        }
        self.tick();
    }

    /// Starts to reach CouchDB; webhooks start when it has let us in.
    fn connect(&mut self, hookd: Hookd) {
        let made = Server::new(&hookd).and_then(|server| {
            let (to, facts) = bounded(1);
            let outage = Arc::new(Outage::new(server.base_url()));
            let (asked, state_db, said) = (server.clone(), hookd.state_db.clone(), Arc::clone(&outage));
            let thread = sys::spawn("connector", move || connect(&asked, &state_db, &said, &to))?;
            let hookd = Arc::new(hookd);
            Ok(Connection { server, hookd, shared: None, outage, facts, thread, desk: None, leases: None })
        });
        match made {
            Ok(connection) => self.connection = Some(connection),
            Err(error) => log::error!("[hookd]: {error}"),
        }
    }

    fn on_connected(&mut self, facts: Facts) {
        let Some(connection) = &mut self.connection else { return };
        let hookd = &connection.hookd;
        log::info!("CouchDB {} at {} answers", facts.version, connection.server.base_url());
        if facts.n_nodes > 1 && self.slots.values().any(|slot| slot.webhook.lease.is_none()) {
            log::warn!(
                "this CouchDB has {} nodes: if a daemon runs on each of them, each tells every change of webhooks with \
                 `lease = off`",
                facts.n_nodes
            );
        }
        for name in facts.recorded.iter().filter(|name| !self.slots.contains_key(*name)) {
            log::info!(
                "`{}` knows a webhook `{name}` that is not configured, or held back; it goes on where it stopped when it \
                 comes back (a renamed webhook is a new one)",
                hookd.state_db
            );
        }
        let source = public_source(hookd, connection.server.base_url(), facts.uuid.as_deref());
        let shared = Shared {
            outage: Arc::clone(&connection.outage),
            watched: Arc::clone(&self.watched),
            said_started: Arc::clone(&self.said_started),
            hints: Arc::clone(&self.hints),
            lookout: Arc::new(Lookout::new(
                &connection.server,
                hookd,
                Arc::clone(&self.hints),
                Arc::clone(&connection.outage),
            )),
            ..shared(&connection.server, hookd, facts.key, source, self.checkpoints.clone())
        };
        let (nudges, nudged) = bounded(ASKS_MAX);
        match Desk::start(&shared, self.asks.clone(), nudges) {
            Ok(desk) => connection.desk = Some(desk),
            Err(error) => log::error!("commands cannot be obeyed: {error}"),
        }
        match Leases::start(&shared, nudged) {
            Ok(leases) => connection.leases = Some(leases),
            Err(error) => log::error!("no webhook can be told: {error}"),
        }
        connection.shared = Some(shared);
        self.tick();
    }

    /// The connector broke down without a word; its panic was logged.
    fn connect_again(&mut self) {
        self.disconnect();
        if let Some(hookd) = self.config.as_ref().map(|config| config.hookd.clone()) {
            sys::sleep(TICK);
            self.connect(hookd);
        }
    }

    /// Everything that has to do with the server of the old configuration ends.
    fn disconnect(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if connection.shared.is_none() {
            connection.server.stop();
        }
        self.left.extend(connection.desk.into_iter().flat_map(Desk::stop));
        self.left.extend(
            connection
                .shared
                .iter()
                .flat_map(|shared| shared.lookout.stop().into_iter().chain(shared.pool.stop())),
        );
        self.left.push(connection.thread);
        if let Some(leases) = connection.leases {
            // Given back when the webhooks have ended.
            let (thread, _) = leases.stop(sys::now() + OWN_END.0 + OWN_END.1 + LEASES_END);
            self.left.push(thread);
        }
        for slot in self.slots.values_mut() {
            let next = slot.next.take().or_else(|| Some(slot.webhook.clone()));
            slot.stop(next);
        }
    }

    /// Collects what has ended, starts what is to run.
    fn tick(&mut self) {
        if let Some(leases) = self.connection.as_mut().and_then(|connection| connection.leases.as_mut()) {
            let wanted = self.slots.iter().map(|(name, slot)| (name.clone(), slot.webhook.lease));
            leases.want(wanted.collect());
        }
        let connection = self.connection.as_ref();
        let shared = connection.and_then(|connection| connection.shared.as_ref());
        let leases = connection.and_then(|connection| connection.leases.as_ref());
        let settled = self.settled;
        let left = &mut self.left;
        self.slots.retain(|name, slot| {
            if slot.stopping && slot.running.as_ref().is_none_or(Running::is_ended) {
                left.extend(slot.running.take().into_iter().flat_map(|running| running.join(sys::now())));
                slot.stopping = false;
                slot.hold = None;
                slot.waiting.clear();
                match slot.next.take() {
                    Some(webhook) => slot.webhook = webhook,
                    None => {
                        shared.inspect(|shared| shared.board.forget(name));
                        return false;
                    }
                }
            }
            if !slot.stopping && slot.running.as_ref().is_some_and(Running::is_ended) {
                // It panicked, which was logged. Starting is recovering; not at once, or it might never do else.
                left.extend(slot.running.take().into_iter().flat_map(|running| running.join(sys::now())));
                slot.not_before = Some(sys::now() + RESTART_AFTER);
                slot.hold = None;
                log::error!("webhook `{name}` broke down; it starts again in {} s", RESTART_AFTER.as_secs());
            }
            if !slot.stopping && slot.hold.as_ref().is_some_and(|hold| hold.is_ended()) {
                slot.lose();
            }
            if slot.not_before.is_some_and(|not_before| sys::now() < not_before) {
                return true;
            }
            let hold = leases.and_then(|leases| leases.hold(name));
            if let (None, false, Some(shared), Some(hold)) = (&slot.running, slot.stopping, shared, hold) {
                slot.hold = Some(Arc::clone(&hold));
                match Running::start(shared, slot.webhook.clone(), settled, hold) {
                    Ok(running) => slot.running = Some(running),
                    Err(error) => log::error!("webhook `{name}` cannot start: {error}"),
                }
            }
            true
        });
        let (ended, waiting) = std::mem::take(left).into_iter().partition(Thread::is_finished);
        self.left = waiting;
        join(ended);
    }

    /// What the desk wants to know, or have done.
    fn on_ask(&mut self, ask: Ask) {
        match ask {
            Ask::Webhook(name, to) => {
                let leases = self.connection.as_ref().and_then(|connection| connection.leases.as_ref());
                let is_told_here =
                    leases.and_then(|leases| leases.hold(&name)).is_some_and(|hold| hold.is_valid());
                let webhook = self.slots.get(&name).map(|slot| (slot.webhook.clone(), is_told_here));
                // Nobody waits any more when the desk was stopped.
                let _ = to.send(webhook);
            }
            Ask::Restart(name, to) => {
                let Some(slot) = self.slots.get_mut(&name) else { return };
                slot.waiting.push(to);
                if !slot.stopping {
                    slot.stop(Some(slot.webhook.clone()));
                }
                self.tick();
            }
            Ask::Order(name, order) => {
                let running = self.slots.get(&name).and_then(|slot| slot.running.as_ref());
                if !running.is_some_and(|running| running.order(order)) {
                    log::debug!(
                        "webhook `{name}` does not run; it reads what it is asked for when it starts"
                    );
                }
            }
        }
    }

    /// Stops everything; takes no longer than both times together and a little.
    fn stop(mut self, deliveries: Duration, checkpoint: Duration) {
        let deadline: Instant = sys::now() + deliveries + checkpoint;
        let desk = self.connection.as_mut().and_then(|connection| connection.desk.take());
        self.left.extend(desk.into_iter().flat_map(Desk::stop));
        // Whoever waits there for a webhook to end need not.
        (_, self.asked) = bounded(1);
        for slot in self.slots.values() {
            if let Some(running) = &slot.running {
                running.order(Order::Stop { deliveries, checkpoint });
            }
        }
        for mut slot in std::mem::take(&mut self.slots).into_values() {
            slot.hold = None;
            self.left.extend(slot.running.into_iter().flat_map(|running| running.join(deadline)));
        }
        // Whoever waits for a lease of ours may go on as soon as nothing of ours does.
        if let Some(leases) = self.connection.as_mut().and_then(|connection| connection.leases.take()) {
            let until = deadline + LEASES_END;
            let (thread, ended) = leases.stop(until);
            let _ = ended.recv_deadline(until);
            self.left.push(thread);
        }
        if let Some(connection) = self.connection.take() {
            connection.server.stop();
            self.left.extend(
                connection
                    .shared
                    .iter()
                    .flat_map(|shared| shared.lookout.stop().into_iter().chain(shared.pool.stop())),
            );
            self.left.push(connection.thread);
        }
        // What still hangs, in a name that does not resolve for example, ends with the process.
        let ended = self.left.into_iter().filter(Thread::is_finished).collect();
        join(ended);
    }
}

impl Slot {
    fn new(webhook: config::Webhook) -> Slot {
        let (running, hold, next, not_before, waiting) = (None, None, None, None, Vec::new());
        Slot { running, hold, webhook, stopping: false, next, not_before, waiting }
    }

    /// Somebody else tells it by now: nothing is waited for, nothing more is stored.
    fn lose(&mut self) {
        if let Some(running) = &self.running {
            running.order(Order::Stop { deliveries: Duration::ZERO, checkpoint: Duration::ZERO });
        }
        self.stopping = true;
        self.next = Some(self.webhook.clone());
    }

    /// Tells what runs to stop, to be followed by `next`.
    fn stop(&mut self, next: Option<config::Webhook>) {
        if let Some(running) = &self.running {
            running.order(Order::Stop { deliveries: OWN_END.0, checkpoint: OWN_END.1 });
        }
        self.stopping = true;
        self.next = next;
    }
}

/// What webhooks share, at this server.
pub(crate) fn shared(
    server: &Server,
    hookd: &Arc<Hookd>,
    key: StateKey,
    source: String,
    checkpoints: checkpointer::CheckpointSender,
) -> Shared {
    let (hints, outage) = (Arc::<Hints>::default(), Arc::new(Outage::new(server.base_url())));
    Shared {
        server: server.clone(),
        state_db: hookd.state_db.clone(),
        key,
        source,
        permits: Arc::new(Permits::new(hookd.deliveries_max)),
        checkpoints,
        pool: Arc::new(ReaderPool::new(server, hookd.feed_connections)),
        lookout: Arc::new(Lookout::new(server, hookd, Arc::clone(&hints), Arc::clone(&outage))),
        filtered_pages: Arc::default(),
        outage,
        board: Arc::default(),
        watched: Arc::default(),
        said_started: Arc::default(),
        hints,
        hold: Hold::unlimited(),
        hookd: Arc::clone(hookd),
    }
}

fn say_if_failed(outcome: Result<()>) {
    if let Err(error) = outcome {
        log::error!("{error}");
    }
}

fn join(threads: Vec<Thread>) {
    for thread in threads {
        if let Err(panic) = thread.join() {
            log::error!("{panic}");
        }
    }
}

/// Reaches CouchDB, however long that takes, and makes `state_db`; ends when told the facts or stopped.
fn connect(server: &Server, state_db: &str, outage: &Outage, to: &Sender<Facts>) {
    let mut complaint = Complaint::default();
    let mut tries = 0;
    loop {
        let facts = server.welcome().and_then(|welcome| {
            let key = state_db::ensure(server, state_db, server.username())?;
            let n_nodes = server.nodes().unwrap_or(1);
            // Only to be said; what fails here fails where it matters, too.
            let recorded = state_db::list_records(server, state_db).unwrap_or_default();
            Ok(Facts { key, uuid: welcome.uuid, n_nodes, version: welcome.version, recorded })
        });
        match facts {
            Ok(facts) => {
                let _ = to.send(facts);
                return;
            }
            Err(error) if error.kind() == Kind::Stopped => return,
            // An HTTP port that opens a moment after us is the rule on 2.x, and no news (CONTRACT §1).
            Err(error) if error.kind() == Kind::Unreachable && tries < 4 => {}
            Err(error) if Outage::concerns(&error) => outage.say(&error),
            Err(error) => {
                if complaint.is_news(error.kind(), sys::now()) {
                    log::error!("{error}");
                }
            }
        }
        sys::sleep(CONNECT_AGAIN[tries.min(CONNECT_AGAIN.len() - 1)]);
        tries += 1;
    }
}

/// `source` of every event, up to the database's name.
pub(crate) fn public_source(hookd: &Hookd, base_url: &str, uuid: Option<&str>) -> String {
    let loopback = Url::parse(base_url).is_ok_and(|url| url.is_loopback());
    match (&hookd.public_url, uuid) {
        (Some(url), _) => url.clone(),
        (None, Some(uuid)) if loopback => format!("urn:couchdb:{uuid}"),
        (None, _) => base_url.to_owned(),
    }
}
