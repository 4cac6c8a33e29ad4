//! Signals of a daemon that runs on its own, as messages.
//!
//! Guarantees that a signal is never lost between two looks and that nothing happens in signal context but a write
//! to a pipe (`signal-hook`'s). What a signal means is left to `daemon`.

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals as Pipe};

use crate::error::{Error, Kind, Result};
use crate::sys;

/// Signals that wait to be looked at; a full channel holds everything that another one could say.
const SIGNALS_MAX: usize = 16;

/// What somebody wants of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, SIGINT: finish or give back what is in flight, checkpoint, exit 0.
    Stop,
    /// SIGHUP: read the configuration again.
    Reload,
}

/// Caught signals. End with [`Signals::stop`].
#[derive(Debug)]
pub struct Signals {
    received: Receiver<Signal>,
    handle: Handle,
    thread: sys::Thread,
}

impl Signals {
    /// Catches SIGTERM, SIGINT and SIGHUP from now on, for the whole process.
    ///
    /// # Errors
    /// `Io` when the system refuses the handlers, the pipe or the thread.
    pub fn catch() -> Result<Signals> {
        let mut pipe = Pipe::new([SIGTERM, SIGINT, SIGHUP])
            .map_err(|error| Error::new(Kind::Io, format!("failed to catch signals: {error}")))?;
        let handle = pipe.handle();
        let (to, received) = bounded(SIGNALS_MAX);
        let thread = sys::spawn("host:signals", move || {
            for number in pipe.forever() {
                let signal = if number == SIGHUP { Signal::Reload } else { Signal::Stop };
                // Full: sixteen signals that nobody looked at, this one among them in effect.
                let _ = to.try_send(signal);
            }
        })?;
        Ok(Signals { received, handle, thread })
    }

    /// The signals, in order.
    pub fn received(&self) -> Receiver<Signal> {
        self.received.clone()
    }

    /// Stops listening. The signals stay caught: the process is about to end.
    ///
    /// # Errors
    /// What the thread panicked with.
    pub fn stop(self) -> Result<(), String> {
        self.handle.close();
        self.thread.join()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn signals_come_as_messages_and_listening_ends() {
        let signals = Signals::catch().unwrap();
        let received = signals.received();
        for (signal, expected) in [
            (nix::sys::signal::SIGHUP, Signal::Reload),
            (nix::sys::signal::SIGTERM, Signal::Stop),
            (nix::sys::signal::SIGINT, Signal::Stop),
        ] {
            nix::sys::signal::raise(signal).unwrap();
            assert_eq!(received.recv_timeout(Duration::from_secs(10)), Ok(expected));
        }
        signals.stop().unwrap();
        assert!(received.recv().is_err());
    }
}
