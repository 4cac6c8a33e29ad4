//! Threads that read databases in turns, for all webhooks: thousands of databases, a handful of connections.
//!
//! Guarantees that at most so many readings are under way as there are threads, and that each ends with a
//! [`Fed::Back`]. Threads are started when needed and end when idle. Which database is read next is decided by those
//! who give readings: each webhook keeps at most [`ReaderPool::size`] here, so that none waits long behind another's.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::couch::client::Server;
use crate::couch::feed::Feed;
use crate::error::{Error, Kind, Result};
use crate::pipeline::feed_reader::{Fed, Reading};
use crate::pipeline::workers::Workers;
use crate::pure::checkpoint::Mark;
use crate::pure::flow::Read;
use crate::sys::Thread;

/// A thread without work for this long ends.
const IDLE: Duration = Duration::from_secs(30);
/// Readings that may wait; webhooks give a few each. The queue touches all its memory at once: it holds pointers.
const WAITING_MAX: usize = 4_096;
/// Connections of the process that are not the pool's: of the lookout two, of leases, requests, checkpoints and letters the others.
const OTHER_CONNECTIONS: usize = 8;

/// One reading to be done.
struct Job {
    reading: Box<Reading>,
    read: Read,
    known_mark: Option<Mark>,
}

/// The pool.
pub struct ReaderPool {
    size: usize,
    /// Given and not done.
    n_jobs: Arc<AtomicUsize>,
    workers: Mutex<Option<Workers<Box<Job>>>>,
}

impl ReaderPool {
    /// No thread yet. A thread has two connections: one for pages, one for marks and checkpoints; so many fit into
    /// `feed_connections`.
    pub fn new(server: &Server, feed_connections: usize) -> ReaderPool {
        let size = (feed_connections.saturating_sub(OTHER_CONNECTIONS) / 2).max(1);
        let n_jobs = Arc::new(AtomicUsize::new(0));
        let (server, n_left) = (server.clone(), Arc::clone(&n_jobs));
        // Connections are kept by whoever reads next; there are never more than threads.
        let feeds: Mutex<Vec<Feed>> = Mutex::default();
        let workers = Workers::new("reader".to_owned(), WAITING_MAX, IDLE, move |job: Box<Job>| {
            let Job { mut reading, read, known_mark } = *job;
            let idle = feeds.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut feed = idle.unwrap_or_else(|| Feed::new(&server));
            let fed = reading.read(&mut feed, read, known_mark.as_ref());
            feeds.lock().unwrap_or_else(PoisonError::into_inner).push(feed);
            n_left.fetch_sub(1, Ordering::SeqCst);
            let (to, flow) = (reading.to(), reading.flow());
            // Nobody listens any more when the webhook was stopped meanwhile.
            let _ = to.send(Fed::Back(flow, reading, Box::new(fed)));
            ControlFlow::Continue(())
        });
        ReaderPool { size, n_jobs, workers: Mutex::new(Some(workers)) }
    }

    /// Threads at most, and readings that one webhook may have here.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Has something read; never waits.
    ///
    /// # Errors
    /// `Stopped` when the pool is; `Io` when no thread can be started and none is there. The reading is lost.
    pub fn give(&self, reading: Box<Reading>, read: Read, known_mark: Option<Mark>) -> Result<()> {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(workers) = &mut *workers else {
            return Err(Error::new(Kind::Stopped, "the pool is stopped"));
        };
        let n_jobs = self.n_jobs.fetch_add(1, Ordering::SeqCst) + 1;
        workers.give(Box::new(Job { reading, read, known_mark }), n_jobs.min(self.size))
    }

    /// Ends the threads after what they are at; gives them.
    pub fn stop(&self) -> Vec<Thread> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner).take();
        workers.map(Workers::stop).unwrap_or_default()
    }
}
