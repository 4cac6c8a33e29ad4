//! What all webhooks of the process share a limit of: deliveries in flight, payload in memory.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Sender;

/// Payload that the process may hold over all webhooks, in bytes; one event of each is always let in.
const PROCESS_BYTES: usize = 64 << 20;

/// The process's shares.
#[derive(Debug)]
pub struct Permits {
    free: AtomicUsize,
    bytes: AtomicUsize,
    /// Webhooks that were refused a permit and are to be woken.
    waiting: Mutex<Vec<Sender<()>>>,
}

impl Permits {
    /// `deliveries_max` permits.
    pub fn new(deliveries_max: usize) -> Permits {
        Permits {
            free: AtomicUsize::new(deliveries_max),
            bytes: AtomicUsize::new(0),
            waiting: Mutex::new(Vec::new()),
        }
    }

    /// Takes a permit, or remembers to send to `wake` (bounded, one message) when one is given back.
    pub fn take(&self, wake: &Sender<()>) -> bool {
        if self.try_take() {
            return true;
        }
        self.waiting.lock().expect("no thread panics with this lock").push(wake.clone());
        // One may have been given back between the two lines above; whoever waits would not hear of it.
        self.try_take()
    }

    fn try_take(&self) -> bool {
        self.free.fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| free.checked_sub(1)).is_ok()
    }

    /// Gives a permit back.
    pub fn give_back(&self) {
        self.free.fetch_add(1, Ordering::AcqRel);
        let waiting = std::mem::take(&mut *self.waiting.lock().expect("no thread panics with this lock"));
        for wake in waiting {
            // Full means that it is about to wake anyway.
            let _ = wake.try_send(());
        }
    }

    /// A webhook holds `now` bytes instead of `before`.
    pub fn hold_bytes(&self, before: usize, now: usize) {
        self.bytes.fetch_add(now, Ordering::AcqRel);
        self.bytes.fetch_sub(before, Ordering::AcqRel);
    }

    /// Bytes that the process has room for.
    pub fn bytes_free(&self) -> usize {
        PROCESS_BYTES.saturating_sub(self.bytes.load(Ordering::Acquire))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_refused_is_woken_when_a_permit_comes_back() {
        let permits = Permits::new(1);
        let (wake, woken) = crossbeam_channel::bounded(1);
        assert!(permits.take(&wake));
        assert!(!permits.take(&wake));
        assert!(woken.try_recv().is_err());
        permits.give_back();
        assert!(woken.try_recv().is_ok());
        assert!(permits.take(&wake));
    }
}
