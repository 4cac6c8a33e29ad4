//! Stores checkpoints, for all webhooks, at a pace that CouchDB bears.
//!
//! Guarantees: at most ten a second (each costs CouchDB 4 ms and 4 KiB of file, CONTRACT §9), and forty while hundreds
//! of databases wait for theirs; always with the `_rev` of the last read or write; never after the webhook's lease
//! has ended; on 1.x never after the server was started again since the position was read
//! (its numbers may have been used twice). 2.x and 3.x check no `_rev` (CONTRACT §6), so this is no lock.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::couch::client::{Limits, Server};
use crate::couch::leases::Hold;
use crate::couch::local_docs::{self, Life};
use crate::error::{Error, Kind, Result};
use crate::pure::checkpoint::{Checkpoint, DeliveredId, Mark, StateKey};
use crate::pure::dispatch::FlowIndex;
use crate::pure::flow::Position;
use crate::sys::{self, Thread};

/// Between two checkpoints, on average.
const PACE: Duration = Duration::from_millis(100);
/// The same while more than [`MANY`] wait: thousands of databases that were all written to would wait for minutes, and
/// those behind them with them. A sixth of a core of CouchDB's.
const PACE_MANY: Duration = Duration::from_millis(25);
/// Checkpoints that wait for their turn.
const MANY: usize = 100;
/// So many may go at once after a quiet time.
const BURST: u32 = 10;
/// Subscriptions that may wait for their turn; one each. The queue touches all its memory at once: it holds pointers.
const WAITING_MAX: usize = 16 * 1024;

/// One checkpoint to store, and where to say how it went.
pub struct Job {
    /// Where.
    pub server: Server,
    /// The database that it is about, and lies in.
    pub db: String,
    /// Name of the webhook.
    pub webhook: String,
    /// Signs it.
    pub key: StateKey,
    /// What it says.
    pub position: Position,
    /// The last seek that the position is behind.
    pub seek: Option<String>,
    /// 1.x: the server's life when the feed was opened.
    pub life: Option<Life>,
    /// Not paced, and not waited for longer than this: the process is ending.
    pub hurry: Option<Duration>,
    /// Whether the webhook is still ours: another daemon may have stored a later place.
    pub hold: Arc<Hold>,
    /// Names it in the answer.
    pub flow: FlowIndex,
    /// Where the answer goes.
    pub to: Sender<Stored>,
}

/// How it went: the new `_rev`.
pub struct Stored {
    /// Which.
    pub flow: FlowIndex,
    /// The new `_rev`.
    pub result: Result<String>,
}

/// Takes jobs. Cheap to clone; the thread ends when the last one is gone.
pub type CheckpointSender = Sender<Box<Job>>;

/// Starts the thread.
///
/// # Errors
/// `Io` when no thread can be started.
pub fn start() -> Result<(CheckpointSender, Thread)> {
    let (to, jobs) = bounded(WAITING_MAX);
    Ok((to, sys::spawn("checkpointer", move || run(&jobs))?))
}

fn run(jobs: &Receiver<Box<Job>>) {
    // The time at which the next one is due if all had come at the pace.
    let mut due = sys::now();
    while let Ok(job) = jobs.recv() {
        if job.hurry.is_none() {
            let each = if jobs.len() > MANY { PACE_MANY } else { PACE };
            due = pace(due, each, sys::now());
        }
        let flow = job.flow;
        // One database's trouble must not end the checkpoints of all others; the hook has logged the panic.
        let result = catch_unwind(AssertUnwindSafe(|| store(&job)))
            .unwrap_or_else(|_| Err(Error::new(Kind::Io, "we panicked")));
        // Nobody listens any more when the webhook was stopped meanwhile.
        let _ = job.to.send(Stored { flow, result });
    }
}

/// Waits for the turn; gives when the next one is due.
fn pace(due: Instant, each: Duration, now: Instant) -> Instant {
    let earliest = now.checked_sub(PACE * BURST).unwrap_or(now);
    let due = due.max(earliest);
    if due > now {
        sys::sleep(due - now);
    }
    due + each
}

fn store(job: &Job) -> Result<String> {
    let mark = Mark::parse(&job.position.mark).expect("marks in flows come from databases");
    check_life(job, &mark)?;
    let checkpoint = Checkpoint {
        through_seq: job.position.through_seq.clone(),
        mark,
        delivered: job.position.delivered.iter().map(|short| DeliveredId(*short)).collect(),
        time: sys::wall(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        seek: job.seek.clone(),
    };
    let rev = job.position.rev.as_deref();
    match write(job, &checkpoint, rev) {
        Err(error) if error.kind() == Kind::Conflict => {
            // Somebody else wrote it: an earlier life of ours whose request was still on its way, or another
            // daemon. Ours is read from this feed and is true; it goes over what is there. Unless the server lost
            // what was there: then ours may be a place that other changes have by now.
            check_life(job, &mark)?;
            let rev = local_docs::checkpoint_rev(&job.server, &job.db, &job.webhook)?;
            write(job, &checkpoint, rev.as_deref())
        }
        result => result,
    }
}

/// On 1.x: whether the server is still the one that the position was read from.
fn check_life(job: &Job, mark: &Mark) -> Result<()> {
    if job.life.is_some() && !local_docs::is_same(&job.server, &job.db, mark, job.life.as_ref())? {
        let found = "the server was started again, or the database is another one";
        return Err(Error::new(Kind::Conflict, found));
    }
    Ok(())
}

fn write(job: &Job, checkpoint: &Checkpoint, rev: Option<&str>) -> Result<String> {
    let limits = match job.hurry {
        Some(hurry) => Limits { deadline: Some(hurry), ..Limits::default() },
        None => Limits::default(),
    };
    job.hold.check()?;
    local_docs::write_checkpoint_within(&job.server, &job.db, &job.webhook, &job.key, checkpoint, rev, limits)
}
