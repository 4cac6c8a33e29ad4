//! The login gate of one server: lets requests through, one at first, none after a refusal.
//!
//! Guarantees what `pure::login` decides, over all threads; that those who wait for a probe share its outcome; and
//! that a stop wakes them. The probing request is the caller's.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Kind, Result};
use crate::pure::login::{Login, Turn, Verdict};
use crate::sys;

/// One per server and login.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    login: Login,
    /// Counts ended probes, so that those who wait see that theirs has ended.
    n_probes: u64,
    /// How the last probe failed.
    failure: Option<Error>,
    /// Why the gate is shut.
    refusal: String,
    is_stopped: bool,
}

impl Gate {
    /// Returns when the login may be used. `probe` makes the request that finds out, and must report its answer with
    /// [`Gate::on_verdict`].
    ///
    /// # Errors
    /// The probe's own; `Locked` while the gate is shut; `Stopped`.
    pub(crate) fn pass(&self, probe: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut state = self.lock();
        let mut waited_from = None;
        loop {
            if state.is_stopped {
                return Err(Error::new(Kind::Stopped, "stopped"));
            }
            if let (Some(n_probes), Some(failure)) = (waited_from, &state.failure)
                && state.n_probes > n_probes
            {
                // The probe that we waited for failed: another one now would only take the same time again.
                return Err(failure.clone());
            }
            match state.login.ask(sys::now()) {
                Turn::Send => return Ok(()),
                Turn::Refused { until } => {
                    let left = until.saturating_duration_since(sys::now());
                    let left = jiff::SignedDuration::from_secs(left.as_secs().cast_signed());
                    let text = format!(
                        "nothing is sent with this login until {:.0}: {}",
                        sys::wall() + left,
                        state.refusal
                    );
                    return Err(Error::new(Kind::Locked, text));
                }
                Turn::Wait => {
                    waited_from.get_or_insert(state.n_probes);
                    state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                Turn::Probe => {
                    drop(state);
                    let probing = Probing { gate: self };
                    let probed = probe();
                    self.lock().failure = probed.as_ref().err().cloned();
                    drop(probing);
                    return probed;
                }
            }
        }
    }

    /// What an answer said about the login, to a probe or to anything else; `text` is what CouchDB said.
    pub(crate) fn on_verdict(&self, verdict: Verdict, text: &str) {
        let mut state = self.lock();
        if verdict == Verdict::Refused {
            text.clone_into(&mut state.refusal);
        }
        state.login.on_answer(verdict, sys::now());
    }

    /// Nobody passes any more; who waits is woken.
    pub(crate) fn stop(&self) {
        self.lock().is_stopped = true;
        self.moved.notify_all();
    }

    /// A poisoned lock guards values that stay whole whatever panicked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A probe under way; its end, by a panic too, lets the next one go.
struct Probing<'a> {
    gate: &'a Gate,
}

impl Drop for Probing<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.login.on_no_answer();
        state.n_probes += 1;
        self.gate.moved.notify_all();
    }
}
