//! How fast, and in how much memory, the real binary tells changes to an endpoint that answers at once.
//!
//! `cargo bench --bench deliveries [-- --changes N] [--rounds N] [--memory N,N] [--binary PATH]`
//!
//! Rate: deliveries of 1 KiB documents, signed, in order per document, with checkpoints, at `concurrency = 16`, beside a
//! bare loop of 16 `ureq` threads that post the same bodies to the same receiver. Rounds of both take turns, because
//! machines are shared; the ratio is the median over the pairs. CPU time per delivery is the steadier number.
//! Memory: the daemon's peak RSS after so many changes. Exit status 1 when a target of issue 2 is missed.

mod couch;
#[path = "../shared/proc.rs"]
mod proc;
mod receiver;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use couch_hookd::pure::changes::{Item, Parser, Shape};
use couch_hookd::pure::format::Format;
use couch_hookd::pure::message::{Telling, Watch};
use couch_hookd::sys;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::couch::Couch;
use crate::receiver::Receiver;

const CONCURRENCY: u64 = 16;
const SECRET: &str = "whsec_Y291Y2gtaG9va2QtYmVuY2htYXJrLWtleS0wMDAx";
/// Of the reference's rate, at least.
const RATIO_MIN: f64 = 0.75;
/// Peak RSS, in KiB, below.
const RSS_KIB_MAX: u64 = 16 * 1024;
/// What two runs of the same length differ by, in KiB: which pages of which stacks and arenas were touched.
const RSS_KIB_NOISE: u64 = 512;
/// Different bodies that the reference takes turns with.
const REFERENCE_BODIES: u64 = 1_000;
/// A round without a delivery for this long has failed.
const STUCK: Duration = Duration::from_secs(30);

/// What the command line says.
struct Arguments {
    changes: u64,
    rounds: usize,
    memory: Vec<u64>,
    binary: PathBuf,
}

/// What a sender did in a round.
struct Measured {
    /// Deliveries a second, from the first to the last.
    rate: f64,
    /// User and system CPU time of the sender's process per delivery, in microseconds.
    cpu_us: f64,
    /// Peak RSS of the process, in KiB.
    rss_kib: u64,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, url, n_requests] = arguments.as_slice()
        && mode == "--reference"
    {
        reference(url, n_requests.parse().expect("the parent gives a number"));
        return ExitCode::SUCCESS;
    }
    match parse(&arguments) {
        Ok(arguments) => run(&arguments),
        Err(found) => {
            eprintln!("{found}");
            ExitCode::from(2)
        }
    }
}

fn parse(arguments: &[String]) -> Result<Arguments, String> {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_couch-hookd"));
    let mut parsed = Arguments { changes: 20_000, rounds: 5, memory: vec![10_000, 1_000_000], binary };
    // cargo adds `--bench`.
    let mut words = arguments.iter().filter(|word| *word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word}: expected a value behind it, got nothing"))?;
        let number =
            |text: &str| text.parse::<u64>().map_err(|_| format!("{word}: expected a number, got `{text}`"));
        match word.as_str() {
            "--changes" => parsed.changes = number(value)?.max(1),
            "--rounds" => parsed.rounds = usize::try_from(number(value)?).expect("it fits"),
            "--memory" => {
                let sizes = value.split(',').filter(|size| *size != "off").map(number);
                parsed.memory = sizes.collect::<Result<_, _>>()?;
            }
            "--binary" => parsed.binary = PathBuf::from(value),
            _ => return Err(format!("expected --changes, --rounds, --memory or --binary, got `{word}`")),
        }
    }
    Ok(parsed)
}

fn run(arguments: &Arguments) -> ExitCode {
    let folder = std::env::temp_dir().join(format!("couch-hookd-bench-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("the folder for temporary files takes one");
    let bench = Bench {
        couch: Couch::start(),
        receiver: Receiver::start(SECRET),
        folder,
        binary: arguments.binary.clone(),
    };
    let mut is_met = true;
    if arguments.rounds > 0 {
        is_met &= bench.rates(arguments.changes, arguments.rounds);
    }
    if !arguments.memory.is_empty() {
        is_met &= bench.memory(&arguments.memory);
    }
    // Somebody may look at what is left there; it is small.
    let _ = fs::remove_dir_all(&bench.folder);
    if is_met { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

struct Bench {
    couch: Couch,
    receiver: Receiver,
    folder: PathBuf,
    binary: PathBuf,
}

impl Bench {
    fn rates(&self, n_changes: u64, n_rounds: usize) -> bool {
        println!(
            "{n_changes} deliveries of 1 KiB documents, {CONCURRENCY} at a time, receiver without delay"
        );
        let (mut references, mut daemons, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=n_rounds {
            let reference = self.reference(n_changes);
            let daemon = self.daemon(n_changes);
            let ratio = daemon.rate / reference.rate;
            println!(
                "round {round}: bare ureq {:6.0}/s {:5.1} us CPU, couch-hookd {:6.0}/s {:5.1} us CPU, ratio {ratio:.2}",
                reference.rate, reference.cpu_us, daemon.rate, daemon.cpu_us,
            );
            ratios.push(ratio);
            references.push(reference);
            daemons.push(daemon);
        }
        let rate = |all: &[Measured]| median(all.iter().map(|one| one.rate).collect());
        let cpu = |all: &[Measured]| median(all.iter().map(|one| one.cpu_us).collect());
        let ratio = median(ratios);
        println!(
            "median:  bare ureq {:6.0}/s {:5.1} us CPU, couch-hookd {:6.0}/s {:5.1} us CPU",
            rate(&references),
            cpu(&references),
            rate(&daemons),
            cpu(&daemons),
        );
        println!("ratio {ratio:.2}, at least {RATIO_MIN} expected: {}", verdict(ratio >= RATIO_MIN));
        ratio >= RATIO_MIN
    }

    fn memory(&self, sizes: &[u64]) -> bool {
        let mut all = Vec::new();
        for n_changes in sizes {
            let measured = self.daemon(*n_changes);
            println!(
                "peak RSS after {n_changes:7} changes: {:6} KiB ({:.0}/s)",
                measured.rss_kib, measured.rate
            );
            all.push(measured.rss_kib);
        }
        let most = all.iter().copied().max().unwrap_or(0);
        let grown = all.iter().map(|rss| rss.saturating_sub(all[0])).max().unwrap_or(0);
        println!("peak RSS {most} KiB, less than {RSS_KIB_MAX} expected: {}", verdict(most < RSS_KIB_MAX));
        println!(
            "grown by {grown} KiB, at most {RSS_KIB_NOISE} expected: {}",
            verdict(grown <= RSS_KIB_NOISE)
        );
        most < RSS_KIB_MAX && grown <= RSS_KIB_NOISE
    }

    fn reference(&self, n_requests: u64) -> Measured {
        self.receiver.reset(0);
        let program = std::env::current_exe().expect("we run");
        let mut command = Command::new(program);
        command.args(["--reference", &self.receiver.url(), &n_requests.to_string()]);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("this program starts");
        let measured = self.measure(&child, n_requests);
        // It ends with its stdin.
        drop(child.stdin.take());
        assert!(child.wait().expect("it is our child").success(), "the reference failed");
        measured
    }

    /// A daemon that has never run before tells all changes, stores its checkpoint and is stopped.
    fn daemon(&self, n_changes: u64) -> Measured {
        self.couch.reset(n_changes);
        self.receiver.reset(n_changes);
        let config = self.config();
        let mut command = Command::new(&self.binary);
        command.arg("run").arg("--config").arg(config);
        let mut child = command.stderr(Stdio::null()).spawn().expect("the daemon starts");
        let measured = self.measure(&child, n_changes);
        stop(&mut child);
        let counts = self.receiver.counts();
        let (n_checkpoints, through) = self.couch.checkpoints();
        assert_eq!((counts.n_requests, counts.n_changes), (n_changes, n_changes), "each change is told once");
        assert_eq!(
            (counts.n_bad_signatures, through),
            (0, n_changes),
            "{counts:?}, {n_checkpoints} checkpoints"
        );
        assert!(counts.n_signatures > 0 && n_checkpoints > 0, "{counts:?}, {n_checkpoints} checkpoints");
        measured
    }

    fn config(&self) -> PathBuf {
        let path = self.folder.join("hookd.ini");
        let (couch, hook) = (self.couch.url(), self.receiver.url());
        let text = format!(
            "[hookd]\ncouchdb_url = {couch}\n\n[hookd.webhooks]\nbench = {hook}\n\n[hookd.webhook.bench]\ndb = {}\n\
             since = 0\nconcurrency = {CONCURRENCY}\nsecret = {SECRET}\n",
            couch::DB
        );
        fs::write(&path, text).expect("our own folder takes a file");
        path
    }

    /// Waits until all requests have come.
    fn measure(&self, child: &Child, n_requests: u64) -> Measured {
        let mut before = (0, sys::now());
        let last = loop {
            let (n, now) = (self.receiver.n_requests(), sys::now());
            if n >= n_requests {
                break now;
            }
            if n > before.0 {
                before = (n, now);
            }
            assert!(now - before.1 < STUCK, "{n} of {n_requests} requests came, then none for {STUCK:?}");
            sys::sleep(Duration::from_millis(1));
        };
        let first = self.receiver.counts().first.expect("requests came");
        let seconds = (last - first).as_secs_f64();
        Measured {
            rate: n_requests as f64 / seconds,
            cpu_us: 1e3 * proc::cpu_ms(child.id()) / n_requests as f64,
            rss_kib: proc::rss_kib(child.id()),
        }
    }
}

/// 16 threads that post bodies until all are posted; then waits for the end of stdin.
fn reference(url: &str, n_requests: u64) {
    let bodies = Arc::new(bodies());
    let next = Arc::new(AtomicU64::new(0));
    let agent = ureq::Agent::config_builder()
        .max_idle_connections(CONCURRENCY as usize)
        .max_idle_connections_per_host(CONCURRENCY as usize)
        .build()
        .new_agent();
    let post = |_: u64| {
        let (bodies, next, agent, url) =
            (Arc::clone(&bodies), Arc::clone(&next), agent.clone(), url.to_owned());
        let post = move || {
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                if n >= n_requests {
                    return;
                }
                let body = &bodies[(n % REFERENCE_BODIES) as usize];
                let mut response =
                    agent.post(&url).content_type("application/json").send(body).expect("it answers");
                response.body_mut().read_to_vec().expect("the body is empty");
            }
        };
        sys::spawn("reference", post).expect("there is room for a thread")
    };
    let threads: Vec<_> = (0..CONCURRENCY).map(post).collect();
    for thread in threads {
        thread.join().expect("no thread panics");
    }
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// The bodies that the daemon makes of the first changes.
fn bodies() -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    for n in 1..=REFERENCE_BODIES {
        couch::push_row(&mut lines, n);
        lines.push(b'\n');
    }
    let mut items = Vec::new();
    Parser::new(Shape::Lines, 1 << 20).push(&lines, &mut items).expect("rows of ours are good");
    let telling = Telling {
        webhook: "bench".to_owned(),
        db: couch::DB.to_owned(),
        source: "urn:couchdb:bench/bench".to_owned(),
        events: vec!["document.*".to_owned()],
        include_docs: true,
        conflicts: false,
        conflict_docs: false,
        design_docs: false,
        payload_bytes_max: 1 << 20,
        format: Format::Standard,
        watch: Watch::Changes,
    };
    let body = |item| match item {
        Item::Row(row) => {
            let arrived = telling.arrived(row, "00112233445566778899aabbccddeeff", sys::wall());
            telling.body(&arrived.event.expect("all are wanted"))
        }
        Item::End { .. } | Item::Fault { .. } => unreachable!("there are only rows"),
    };
    items.into_iter().map(body).collect()
}

fn stop(child: &mut Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("ids are small"));
    kill(pid, Signal::SIGTERM).expect("it is our child");
    let deadline: Instant = sys::now() + STUCK;
    loop {
        match child.try_wait().expect("it is our child") {
            Some(status) => return assert!(status.success(), "the daemon ended with {status}"),
            None if sys::now() > deadline => {
                let _ = child.kill();
                panic!("the daemon did not end within {STUCK:?}");
            }
            None => sys::sleep(Duration::from_millis(5)),
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn verdict(is_met: bool) -> &'static str {
    if is_met { "met" } else { "MISSED" }
}
