//! What one look at 5,000 replications costs the real binary: CPU time, memory, and requests.
//!
//! `cargo bench --bench replications [-- --replications N] [--looks N] [--binary PATH]`
//!
//! The stand-in is this process; its CPU time does not count. Half of the replications have trouble, all show what they
//! have done, and nothing changes, so nothing is to be told. Exit status 1 when a target of issue 4 is missed: under
//! 200 ms of CPU a look, under 32 MiB, at most 500 rows a page, no event.

#[path = "../shared/proc.rs"]
mod proc;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::receiver::{Receiver, ReceiverOptions};
use couch_hookd::standin::replicator::{Progress, Replication, ReplicationState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// CPU time of a look, in milliseconds, below.
const CPU_MS_MAX: f64 = 200.0;
/// Peak RSS, in KiB, below.
const RSS_KIB_MAX: u64 = 32 * 1024;
/// Rows of a page, at most.
const PAGE_ROWS_MAX: usize = 500;
/// A look that takes longer has failed.
const STUCK: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let (mut n_replications, mut n_looks) = (5_000, 10);
    let mut binary = PathBuf::from(env!("CARGO_BIN_EXE_couch-hookd"));
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("expected a value behind `{name}`"));
        match name.as_str() {
            "--replications" => n_replications = value().parse().expect("a number"),
            "--looks" => n_looks = value().parse().expect("a number"),
            "--binary" => binary = value().into(),
            // Given by cargo.
            "--bench" => {}
            other => panic!("expected --replications, --looks or --binary, got `{other}`"),
        }
    }
    run(&binary, n_replications, n_looks)
}

fn run(binary: &Path, n_replications: usize, n_looks: usize) -> ExitCode {
    let couch = StandIn::start(Options::new(Flavour::V3)).expect("a port is free");
    fill(&couch, n_replications);
    let receiver = Receiver::start(ReceiverOptions::new(Vec::new())).expect("a port is free");
    let config =
        std::env::temp_dir().join(format!("couch-hookd-bench-replications-{}.ini", std::process::id()));
    let ini = format!(
        "[hookd]\ncouchdb_url = {}\n[hookd.webhooks]\nsync = {}\n[hookd.webhook.sync]\nwatch = replications\n\
         events = *\npoll_interval = 1s\n",
        couch.url(),
        receiver.url()
    );
    fs::write(&config, ini).expect("the directory for temporary files can be written");
    let log = Stdio::null();
    let mut daemon =
        Command::new(binary).args(["run", "--config"]).arg(&config).stderr(log).spawn().expect("it runs");
    let looks = |couch: &StandIn, n: usize| {
        let done = couch.wait_until(STUCK, |seen| {
            // The list that is read last, by its first page.
            let is_first =
                |query: &[(String, String)]| query.iter().any(|(name, value)| name == "skip" && value == "0");
            let jobs = seen.requests().filter(|one| one.path == "/_scheduler/jobs" && is_first(&one.query));
            jobs.count() >= n
        });
        assert!(done, "no look within {STUCK:?}");
    };
    // The first one reads all documents and writes what is known; the second may still be warming up.
    looks(&couch, 3);
    let before = proc::cpu_ms(daemon.id());
    looks(&couch, 3 + n_looks);
    let cpu = (proc::cpu_ms(daemon.id()) - before) / n_looks as f64;
    let rss = proc::rss_kib(daemon.id());
    let limits = couch.look(|seen| {
        let pages = seen.requests().filter(|one| one.path.starts_with("/_scheduler"));
        let limits = pages.flat_map(|one| one.query.iter().filter(|(name, _)| name == "limit"));
        limits.filter_map(|(_, value)| value.parse::<usize>().ok()).max().unwrap_or(0)
    });
    let n_events = receiver.look(|record| record.deliveries().len());
    kill(Pid::from_raw(i32::try_from(daemon.id()).expect("ids are small")), Signal::SIGTERM)
        .expect("it is our child");
    let status = daemon.wait().expect("it is our child");
    assert!(status.success(), "the daemon ended with {status}");
    fs::remove_file(&config).expect("it was written above");
    let met = cpu < CPU_MS_MAX && rss < RSS_KIB_MAX && limits <= PAGE_ROWS_MAX && n_events == 0;
    println!(
        "{n_replications} replications: {cpu:.1} ms of CPU a look (below {CPU_MS_MAX}), {rss} KiB at most (below {RSS_KIB_MAX}), \
         pages of {limits} rows, {n_events} events: {}",
        if met { "met" } else { "MISSED" }
    );
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn fill(couch: &StandIn, n_replications: usize) {
    for n in 0..n_replications {
        let id = format!("replication-{n:05}");
        let doc = json!({"source": format!("https://edge{n}.example/orders"), "target": "https://cloud.example/orders",
            "continuous": true});
        couch.put_replication("_replicator", &id, &doc).expect("it is an object");
        let replication = match n % 2 {
            0 => Replication::with_progress(ReplicationState::Running, Progress::default()),
            _ => Replication::failing(
                ReplicationState::Crashing,
                "{error,{conn_failed,{error,econnrefused}}}",
                3,
            ),
        };
        couch.replicate("_replicator", &id, replication).expect("it was put above");
    }
}
