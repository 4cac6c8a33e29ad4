//! The only reader of clock and randomness, the only spawner of threads.
//!
//! Threads are named after their subject (`feed:orders/orders`), always joined by whoever spawned them, and a
//! panic in one comes out of [`Thread::join`] as text.

#![expect(clippy::disallowed_methods, reason = "this module is the one place for them")]

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Kind, Result};

/// Monotonic time, for every schedule and deadline.
pub fn now() -> Instant {
    Instant::now()
}

/// Time since this machine was started, with the time that it was suspended: for leases, which others wait out
/// while we are stopped.
pub fn since_boot() -> Duration {
    let clock = nix::time::ClockId::CLOCK_BOOTTIME;
    Duration::from(nix::time::clock_gettime(clock).expect("Linux has had this clock since 2.6.39"))
}

/// Wall-clock time, only for `webhook-timestamp`, `Retry-After` dates, and times that people read.
pub fn wall() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

/// Sleeps. Waiting for an event is nearly always better.
pub fn sleep(duration: Duration) {
    std::thread::sleep(duration);
}

/// Lets other threads that could run do so first, if there are any.
pub fn yield_now() {
    std::thread::yield_now();
}

/// A number in `0.0..1.0` to spread retries with; not for secrets.
pub fn jitter() -> f64 {
    fastrand::f64()
}

/// Random bytes fit for secrets and marks.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// Name of this machine; `localhost` when it has none.
pub fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}

/// Whether a process of this id exists on this machine, ours to see or not.
pub fn is_process(pid: u32) -> bool {
    let Ok(pid) = i32::try_from(pid) else { return false };
    let asked = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
    asked != Err(nix::errno::Errno::ESRCH)
}

/// What tells one life of a process from another on one machine: its space of ids, and when it began in it. `None`
/// where it cannot be known: it is gone, hidden, or this is no Linux with `/proc`.
pub fn life_of_process(pid: u32) -> Option<String> {
    let space = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name in parentheses, which may hold anything, follow the fields from the third on; the 22nd is it.
    let began = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{} {began}", space.to_str()?))
}

/// A running thread. Dropping it without [`Thread::join`] is a mistake.
#[must_use = "whoever spawns, joins"]
#[derive(Debug)]
pub struct Thread {
    handle: JoinHandle<()>,
}

/// Stack of every thread of ours, in bytes: deep enough for TLS and JSON, small enough for 256 workers.
const STACK_BYTES: usize = 512 * 1024;

/// Starts a named thread.
///
/// # Errors
/// `Io` when the system has no thread left.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<Thread> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(body)
        .map(|handle| Thread { handle })
        .map_err(|error| Error::new(Kind::Io, format!("failed to start thread `{name}`: {error}")))
}

impl Thread {
    /// Waits for the end; `Err` is the panic's message.
    ///
    /// # Errors
    /// The thread's name and what it panicked with.
    pub fn join(self) -> Result<(), String> {
        let name = self.handle.thread().name().unwrap_or("?").to_owned();
        self.handle.join().map_err(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without text".to_owned());
            format!("thread `{name}` panicked: {text}")
        })
    }

    /// Whether it has ended, so that `join` would not wait.
    pub fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }
}
