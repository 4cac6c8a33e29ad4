//! The threads that make a webhook's deliveries: started when needed, ended when they have had no work for a while.
//!
//! Guarantees that a job given out is done, also when the last worker is just about to end: a worker that ends takes
//! itself off the count first and looks for a job once more after that, and a job is given out before the count is
//! read. So one of both sees the other. What a job is and where its outcome goes is left to the caller.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::error::Result;
use crate::sys::{self, Thread};

/// Does one job; `Break` ends the worker.
type Work<J> = Arc<dyn Fn(J) -> ControlFlow<()> + Send + Sync>;

/// The workers of one webhook.
pub struct Workers<J> {
    name: String,
    idle_max: Duration,
    jobs: Sender<J>,
    taken: Receiver<J>,
    work: Work<J>,
    /// Workers that will take the next job, or are at one.
    alive: Arc<AtomicUsize>,
    threads: Vec<Thread>,
    n_made: u64,
}

impl<J: Send + 'static> Workers<J> {
    /// None yet. Threads are called `name#1`, `name#2` …; at most `jobs_max` jobs are given out at a time.
    pub fn new(
        name: String,
        jobs_max: usize,
        idle_max: Duration,
        work: impl Fn(J) -> ControlFlow<()> + Send + Sync + 'static,
    ) -> Workers<J> {
        let (jobs, taken) = bounded(jobs_max);
        Workers {
            name,
            idle_max,
            jobs,
            taken,
            work: Arc::new(work),
            alive: Arc::default(),
            threads: Vec::new(),
            n_made: 0,
        }
    }

    /// Gives a job out; never waits. `n_jobs`: those given out and not done, with this one.
    ///
    /// # Errors
    /// `Io` when no thread can be started; the job waits for one that is at work.
    pub fn give(&mut self, job: J, n_jobs: usize) -> Result<()> {
        self.jobs.try_send(job).expect("there is room for every delivery that is allowed");
        fence(Ordering::SeqCst);
        if self.alive.load(Ordering::SeqCst) >= n_jobs {
            return Ok(());
        }
        self.threads.retain(|thread| !thread.is_finished());
        self.n_made += 1;
        let (taken, work, alive) = (self.taken.clone(), Arc::clone(&self.work), Arc::clone(&self.alive));
        let idle_max = self.idle_max;
        self.alive.fetch_add(1, Ordering::SeqCst);
        let name = format!("{}#{}", self.name, self.n_made);
        let thread = sys::spawn(&name, move || run(&taken, &alive, idle_max, &*work));
        self.threads.push(thread.inspect_err(|_| {
            self.alive.fetch_sub(1, Ordering::SeqCst);
        })?);
        Ok(())
    }

    /// Ends them after what they have to do; gives their threads.
    pub fn stop(self) -> Vec<Thread> {
        self.threads
    }
}

fn run<J>(taken: &Receiver<J>, alive: &AtomicUsize, idle_max: Duration, work: &dyn Fn(J) -> ControlFlow<()>) {
    loop {
        let job = match taken.recv_timeout(idle_max) {
            Ok(job) => job,
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => match leave(taken, alive) {
                Some(job) => job,
                None => return,
            },
        };
        if work(job).is_break() {
            return;
        }
    }
}

/// Takes a worker off the count, unless a job was given out that counted on it.
fn leave<J>(taken: &Receiver<J>, alive: &AtomicUsize) -> Option<J> {
    alive.fetch_sub(1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    let job = taken.try_recv().ok()?;
    alive.fetch_add(1, Ordering::SeqCst);
    Some(job)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_takes_the_job_that_was_given_out_meanwhile() {
        let (alive, (jobs, taken)) = (AtomicUsize::new(1), bounded(1));
        jobs.send('a').unwrap();
        assert_eq!(leave(&taken, &alive), Some('a'));
        assert_eq!(alive.load(Ordering::SeqCst), 1);
        assert_eq!(leave(&taken, &alive), None);
        assert_eq!(alive.load(Ordering::SeqCst), 0, "the next job finds nobody to count on");
    }

    #[test]
    fn jobs_are_done_while_workers_come_and_go() {
        let (to, done) = bounded(1);
        let idle_max = Duration::from_micros(200);
        let mut workers = Workers::new("worker:test".to_owned(), 1, idle_max, move |job: u32| {
            to.send(job).unwrap();
            ControlFlow::Continue(())
        });
        for job in 0..1_000 {
            workers.give(job, 1).unwrap();
            assert_eq!(done.recv_timeout(Duration::from_secs(5)), Ok(job));
            sys::sleep(Duration::from_micros(u64::from(job % 100) * 4));
        }
        assert!(workers.n_made > 1, "none ever ended");
        for thread in workers.stop() {
            thread.join().unwrap();
        }
    }
}
