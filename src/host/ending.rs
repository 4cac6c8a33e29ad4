//! The end of a hosted daemon: how it is noticed that CouchDB is gone, and that the process then ends in time.
//!
//! Guarantees that the first reason counts and is given once; and that the process is gone within a second of it,
//! whatever hangs (a name that does not resolve, a log that nobody reads). Ending cleanly within that second is left
//! to the daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::error::Result;
use crate::sys;

/// After CouchDB is gone the clean way has this long, then the process exits whatever it is doing.
pub const LAST_RESORT_AFTER: Duration = Duration::from_millis(900);
/// Between two looks at our parent. After SIGTERM CouchDB on OTP 20 takes over a second to go, so this is soon enough.
const PARENT_EVERY: Duration = Duration::from_millis(500);

/// Why the host is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// stdin reached its end: CouchDB stopped, restarted, or dropped us.
    StdinEnded,
    /// stdin cannot be read.
    StdinFailed(String),
    /// stdout cannot be written.
    StdoutFailed(String),
    /// Our parent is another one than at the start.
    ParentGone,
}

/// The last resort of a process that CouchDB started: its end, with the status that CouchDB takes for a clean one.
pub fn exit() {
    std::process::exit(0)
}

/// The process's parent, as `Ending::watch_parent` asks for it.
pub fn parent() -> i32 {
    nix::unistd::getppid().as_raw()
}

/// Ends the process once, whoever notices first that the host is gone.
#[derive(Clone)]
pub(crate) struct Ending {
    begun: Arc<AtomicBool>,
    closed: Sender<Closed>,
    last_resort: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ending").field("begun", &self.begun).finish_non_exhaustive()
    }
}

impl Ending {
    /// Not begun. The receiver gets one message when it begins.
    pub(crate) fn new(last_resort: impl Fn() + Send + Sync + 'static) -> (Ending, Receiver<Closed>) {
        let (closed, begins) = bounded(1);
        (Ending { begun: Arc::default(), closed, last_resort: Arc::new(last_resort) }, begins)
    }

    /// Says why and, [`LAST_RESORT_AFTER`] that, takes the last resort; at once when it has begun already.
    pub(crate) fn begin(&self, reason: Closed) {
        if self.begun.swap(true, Ordering::SeqCst) {
            return;
        }
        // There is room: this is the one message of the channel.
        let _ = self.closed.try_send(reason);
        sys::sleep(LAST_RESORT_AFTER);
        (self.last_resort)();
    }

    /// Whether it has begun.
    pub(crate) fn is_begun(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }

    /// Begins the end when `parent` gives another process than now; a thread that ends when `stop` is dropped.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub(crate) fn watch_parent(
        &self,
        parent: impl Fn() -> i32 + Send + 'static,
        stop: Receiver<()>,
    ) -> Result<sys::Thread> {
        let (ending, first) = (self.clone(), parent());
        sys::spawn("host:parent", move || {
            while stop.recv_timeout(PARENT_EVERY) == Err(RecvTimeoutError::Timeout) {
                if parent() != first {
                    return ending.begin(Closed::ParentGone);
                }
            }
        })
    }
}
