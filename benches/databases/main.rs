//! Thousands of databases found by pattern: what they cost the real binary at rest, and how soon a write arrives.
//!
//! `cargo bench --bench databases [-- --databases N] [--changes N] [--couchdb URL] [--binary PATH]`
//!
//! The stand-in is this process; with `--couchdb` it is the server named (with the login of an admin), whose databases
//! `bench-…` are made and deleted again. Exit status 1 when a target of issue 5 is missed: under 64 MiB, under 24
//! threads, at most 19 connections to CouchDB, under 3 requests a second while idle, a write told within a second with
//! hints and within the worst delay without, a thousand at once, and none of them 10 s behind a database with 200,000
//! changes.

#[path = "../shared/proc.rs"]
mod proc;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::receiver::{Receiver, ReceiverOptions};
use couch_hookd::sys;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

const RSS_KIB_MAX: u64 = 64 * 1024;
const THREADS_MAX: u64 = 23;
/// `feed_connections` and three more.
const CONNECTIONS_MAX: u64 = 16 + 3;
const IDLE_REQUESTS_MAX: f64 = 3.0;
const HINTED_MAX: Duration = Duration::from_secs(1);
const BEHIND_MAX: Duration = Duration::from_secs(10);
/// Whatever takes longer has failed.
const STUCK: Duration = Duration::from_secs(600);
/// How long nothing happens, to count requests.
const IDLE: Duration = Duration::from_secs(60);
/// A sweep of 10,000 databases takes ten seconds, where none has to be waited for.
const QUICK: &str = "sweep_rate = 1000\nsweep_interval = 5s\n";

/// The CouchDB that is used.
enum Couch {
    StandIn(StandIn),
    Real(String, ureq::Agent),
}

impl Couch {
    fn url(&self) -> String {
        match self {
            Couch::StandIn(couch) => couch.url(),
            Couch::Real(url, _) => url.clone(),
        }
    }

    fn create(&self, db: &str) {
        match self {
            Couch::StandIn(couch) => couch.create_db(db),
            Couch::Real(url, agent) => drop(agent.put(format!("{url}/{db}")).send_empty()),
        }
    }

    /// Whether it does, as a real one does not.
    fn drop_hints(&self, drop: bool) -> bool {
        match self {
            Couch::StandIn(couch) => couch.quirks(|quirks| quirks.drop_updates = drop),
            Couch::Real(..) => return false,
        }
        true
    }

    fn delete(&self, db: &str) {
        if let Couch::Real(url, agent) = self {
            let _ = agent.delete(format!("{url}/{db}")).call();
        }
    }

    fn put(&self, db: &str, id: &str) {
        match self {
            Couch::StandIn(couch) => drop(couch.put(db, id, &json!({})).expect("it is there")),
            Couch::Real(url, agent) => {
                drop(agent.put(format!("{url}/{db}/{id}")).send("{}").expect("it is there"))
            }
        }
    }
}

struct Bench {
    couch: Couch,
    port: u16,
    receiver: Receiver,
    binary: PathBuf,
    n_databases: usize,
    is_met: bool,
}

/// The most that was seen of a daemon, looked at ten times a second.
#[derive(Default)]
struct Most {
    rss_kib: AtomicU64,
    threads: AtomicU64,
    connections: AtomicU64,
}

struct Daemon {
    child: Child,
    most: Arc<Most>,
    over: Arc<AtomicBool>,
    looker: Option<sys::Thread>,
    config: PathBuf,
}

fn main() -> ExitCode {
    let (mut n_databases, mut n_changes, mut couchdb) = (10_000, 200_000, None);
    let mut binary = PathBuf::from(env!("CARGO_BIN_EXE_couch-hookd"));
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("expected a value behind `{name}`"));
        match name.as_str() {
            "--databases" => n_databases = value().parse().expect("a number"),
            "--changes" => n_changes = value().parse().expect("a number"),
            "--couchdb" => couchdb = Some(value()),
            "--binary" => binary = value().into(),
            // Given by cargo.
            "--bench" => {}
            other => panic!("expected --databases, --changes, --couchdb or --binary, got `{other}`"),
        }
    }
    let couch = match couchdb {
        Some(url) => {
            Couch::Real(url, ureq::Agent::config_builder().http_status_as_error(false).build().into())
        }
        None => Couch::StandIn(StandIn::start(Options::new(Flavour::V3)).expect("a port is free")),
    };
    let url = couch.url();
    let port =
        url.trim_end_matches('/').rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
    let mut options = ReceiverOptions::new(Vec::new());
    options.keep_bodies = false;
    let receiver = Receiver::start(options).expect("a port is free");
    let mut bench = Bench { couch, port, receiver, binary, n_databases, is_met: true };
    bench.run(n_changes);
    if bench.is_met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn name(n: usize) -> String {
    format!("bench-{n:05}")
}

impl Bench {
    fn run(&mut self, n_changes: usize) {
        // Without it 2.x and 3.x give no hints.
        self.couch.create("_global_changes");
        (0..self.n_databases).for_each(|n| self.couch.create(&name(n)));
        let began = sys::now();
        let daemon = self.daemon(QUICK);
        self.wait_until_told(&[name(0)], "first", began);
        println!(
            "{} databases: the first start and the first write took {:.1?}",
            self.n_databases,
            began.elapsed()
        );
        self.stop(daemon, "first start");

        let daemon = self.daemon("");
        self.wait_until_told(&[name(1)], "warm", sys::now());
        self.idle();
        self.hinted();
        self.at_once("a thousand at once, with hints", HINTED_MAX * 10);
        self.stop(daemon, "with hints");

        if self.couch.drop_hints(true) {
            let daemon = self.daemon(QUICK);
            let worst = Duration::from_secs(5)
                .max(Duration::from_secs(1) * u32::try_from(self.n_databases).unwrap_or(0) / 1_000);
            let written = sys::now();
            let took = self.wait_until_told(&[name(self.n_databases / 2)], "lost", written);
            self.verdict(
                &format!("one write, every hint lost: {took:.1?}"),
                took <= worst * 2,
                &format!("{:?} and its reading", worst * 2),
            );
            self.at_once("a thousand at once, every hint lost", worst * 2 + BEHIND_MAX);
            self.stop(daemon, "without hints");
            self.couch.drop_hints(false);
        }

        let daemon = self.daemon("");
        self.wait_until_told(&[name(2)], "big", sys::now());
        for n in 0..n_changes {
            self.couch.put(&name(0), &format!("d{n}"));
        }
        self.at_once(&format!("a thousand at once, behind {n_changes} changes"), BEHIND_MAX);
        self.stop(daemon, "behind a mountain");
        (0..self.n_databases).for_each(|n| self.couch.delete(&name(n)));
    }

    /// Starts a daemon with more lines for `[hookd]`.
    fn daemon(&self, hookd: &str) -> Daemon {
        let config =
            std::env::temp_dir().join(format!("couch-hookd-bench-databases-{}.ini", std::process::id()));
        let ini = format!(
            "[hookd]\ncouchdb_url = {}\nstate_db = bench_hookd\n{hookd}[hookd.webhooks]\nall = {}\n[hookd.webhook.all]\ndb = bench-*\n",
            self.couch.url(),
            self.receiver.url()
        );
        fs::write(&config, ini).expect("the directory for temporary files can be written");
        let mut command = Command::new(&self.binary);
        let child =
            command.args(["run", "--config"]).arg(&config).stderr(Stdio::null()).spawn().expect("it runs");
        let (most, over): (Arc<Most>, Arc<AtomicBool>) = Default::default();
        let (seen, ended, pid, port) = (Arc::clone(&most), Arc::clone(&over), child.id(), self.port);
        let looker = sys::spawn("looker", move || {
            while !ended.load(Ordering::SeqCst) {
                seen.rss_kib.fetch_max(proc::rss_kib(pid), Ordering::SeqCst);
                seen.threads.fetch_max(proc::n_threads(pid), Ordering::SeqCst);
                seen.connections.fetch_max(proc::n_connections(pid, port) as u64, Ordering::SeqCst);
                sys::sleep(Duration::from_millis(100));
            }
        });
        Daemon { child, most, over, looker: Some(looker.expect("there is room for a thread")), config }
    }

    fn stop(&mut self, mut daemon: Daemon, what: &str) {
        daemon.over.store(true, Ordering::SeqCst);
        daemon.looker.take().map(sys::Thread::join);
        let pid = Pid::from_raw(i32::try_from(daemon.child.id()).expect("ids are small"));
        kill(pid, Signal::SIGTERM).expect("it is our child");
        let status = daemon.child.wait().expect("it is our child");
        assert!(status.success(), "the daemon ended with {status}");
        fs::remove_file(&daemon.config).expect("it was written when it started");
        let most = |of: &AtomicU64| of.load(Ordering::SeqCst);
        let (rss, threads, connections) =
            (most(&daemon.most.rss_kib), most(&daemon.most.threads), most(&daemon.most.connections));
        let met = rss < RSS_KIB_MAX && threads <= THREADS_MAX && connections <= CONNECTIONS_MAX;
        self.verdict(
            &format!("{what}: {rss} KiB, {threads} threads, {connections} connections at most"),
            met,
            &format!("{RSS_KIB_MAX}, {THREADS_MAX}, {CONNECTIONS_MAX}"),
        );
    }

    fn verdict(&mut self, what: &str, met: bool, limit: &str) {
        println!("{what} (limit {limit}): {}", if met { "met" } else { "MISSED" });
        self.is_met &= met;
    }

    /// Requests while nothing happens.
    fn idle(&mut self) {
        let Couch::StandIn(couch) = &self.couch else { return };
        let began = sys::now();
        sys::sleep(IDLE);
        let n = couch.look(|seen| seen.requests().rev().take_while(|one| one.at >= began).count());
        let rate = n as f64 / IDLE.as_secs_f64();
        self.verdict(
            &format!("idle: {rate:.2} requests a second"),
            rate < IDLE_REQUESTS_MAX,
            &IDLE_REQUESTS_MAX.to_string(),
        );
    }

    /// One write here and there.
    fn hinted(&mut self) {
        let mut all = Vec::new();
        for nth in 0..20 {
            let db = name(nth * 397 % self.n_databases);
            all.push(self.wait_until_told(&[db], &format!("hinted-{nth}"), sys::now()));
        }
        all.sort();
        let (median, worst) = (all[all.len() / 2], all[all.len() - 1]);
        self.verdict(
            &format!("one write, with hints: {median:.1?}, at worst {worst:.1?}"),
            worst < HINTED_MAX,
            &format!("{HINTED_MAX:?}"),
        );
    }

    fn at_once(&mut self, what: &str, limit: Duration) {
        let dbs: Vec<String> = (1..self.n_databases).rev().take(1_000).map(name).collect();
        let took = self.wait_until_told(&dbs, &format!("at-once-{}", what.len()), sys::now());
        self.verdict(&format!("{what}: the last after {took:.1?}"), took <= limit, &format!("{limit:?}"));
    }

    /// Writes a document to each and waits until all were told; how long the last one took.
    fn wait_until_told(&self, dbs: &[String], id: &str, since: Instant) -> Duration {
        // What is written before the starting point is not told: it is written again.
        let deadline = sys::now() + STUCK;
        let mut left: HashSet<&str> = dbs.iter().map(String::as_str).collect();
        let mut n_seen = self.receiver.look(|record| record.deliveries().len());
        let mut written = HashMap::new();
        for db in dbs {
            self.couch.put(db, id);
            written.insert(db.as_str(), sys::now());
        }
        let mut worst = Duration::ZERO;
        let mut n_tries = 1;
        loop {
            let wait = Duration::from_secs(if id == "first" { 1 } else { 600 });
            let done = self.receiver.wait_until(wait, |record| {
                for one in &record.deliveries()[n_seen..] {
                    // Accepted or about to be: the receiver takes everything.
                    let is_one = one.doc_id().starts_with(id);
                    if let Some(db) = dbs.iter().find(|db| is_one && *db == one.db())
                        && left.remove(db.as_str())
                    {
                        worst = worst
                            .max(one.received_at.saturating_duration_since(written[db.as_str()].max(since)));
                    }
                }
                n_seen = record.deliveries().len();
                left.is_empty()
            });
            if done {
                return worst;
            }
            assert!(sys::now() < deadline, "{} databases were not told of within {STUCK:?}", left.len());
            for db in &left {
                self.couch.put(db, &format!("{id}-{n_tries}"));
            }
            n_tries += 1;
        }
    }
}
