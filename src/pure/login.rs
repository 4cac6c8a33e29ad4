//! When CouchDB may be asked with our credentials: the login gate's decision.
//!
//! Guarantees that a wrong password is tried once, not by every feed at once, and then not again for 5, 10, 15
//! minutes: CouchDB 3.4 locks an account after five failures, for everybody who uses it (DESIGN §8, HOLES 23).
//! Waiting, waking and the one probing request are left to `couch::client`.

use std::time::{Duration, Instant};

/// How long nothing is sent after the first, the second, every further refusal in a row.
const PAUSES: [Duration; 3] =
    [Duration::from_secs(5 * 60), Duration::from_secs(10 * 60), Duration::from_secs(15 * 60)];

/// One server's login.
#[derive(Debug, Default)]
pub struct Login {
    state: State,
    /// Refusals since the last acceptance.
    n_refusals: usize,
}

#[derive(Debug, Default)]
enum State {
    /// Not known to be good; nobody is trying.
    #[default]
    Unproven,
    /// One request is finding out.
    Trying,
    Accepted,
    Shut {
        until: Instant,
    },
}

/// What one who wants to send is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The login is good: send.
    Send,
    /// Find out with one request, then report with [`Login::on_answer`] or [`Login::on_no_answer`].
    Probe,
    /// Somebody is finding out: wait.
    Wait,
    /// Send nothing before `until`.
    Refused {
        /// When the next try is allowed.
        until: Instant,
    },
}

/// What an answer says about the login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It was taken.
    Accepted,
    /// It was not taken, or the account is locked.
    Refused,
    /// Cannot be told from this answer; the next one who asks finds out.
    Doubtful,
}

impl Login {
    /// Asks for a turn.
    pub fn ask(&mut self, now: Instant) -> Turn {
        match self.state {
            State::Accepted => Turn::Send,
            State::Trying => Turn::Wait,
            State::Shut { until } if now < until => Turn::Refused { until },
            State::Unproven | State::Shut { .. } => {
                self.state = State::Trying;
                Turn::Probe
            }
        }
    }

    /// An answer came, to a probe or to any request sent with these credentials.
    pub fn on_answer(&mut self, verdict: Verdict, now: Instant) {
        match (&self.state, verdict) {
            // Answers to what was under way when the gate shut: they open nothing and count for nothing.
            (State::Shut { .. }, _) => {}
            (_, Verdict::Accepted) => *self = Login { state: State::Accepted, n_refusals: 0 },
            (_, Verdict::Refused) => {
                let pause = PAUSES[self.n_refusals.min(PAUSES.len() - 1)];
                self.n_refusals += 1;
                self.state = State::Shut { until: now + pause };
            }
            (State::Accepted, Verdict::Doubtful) => self.state = State::Unproven,
            (State::Unproven | State::Trying, Verdict::Doubtful) => {}
        }
    }

    /// The probe got no answer, or one that says nothing: the next one who asks probes again.
    pub fn on_no_answer(&mut self) {
        if matches!(self.state, State::Trying) {
            self.state = State::Unproven;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn one_finds_out_and_the_others_wait() {
        let now = crate::sys::now();
        let mut login = Login::default();
        assert_eq!(login.ask(now), Turn::Probe);
        assert_eq!(login.ask(now), Turn::Wait);
        login.on_no_answer();
        assert_eq!(login.ask(now), Turn::Probe, "no answer proves nothing");
        login.on_answer(Verdict::Accepted, now);
        assert_eq!(login.ask(now), Turn::Send);
        assert_eq!(login.ask(now), Turn::Send);
    }

    #[test]
    fn refusals_shut_for_5_10_15_15_minutes_and_are_counted_once() {
        let mut now = crate::sys::now();
        let mut login = Login::default();
        for minutes in [5, 10, 15, 15] {
            assert_eq!(login.ask(now), Turn::Probe);
            login.on_answer(Verdict::Refused, now);
            // Feeds whose requests were under way hear the same, or were accepted a moment ago.
            login.on_answer(Verdict::Refused, now + MINUTE);
            login.on_answer(Verdict::Accepted, now + MINUTE);
            let until = now + minutes * MINUTE;
            assert_eq!(login.ask(until - Duration::from_millis(1)), Turn::Refused { until });
            now = until;
        }
        assert_eq!(login.ask(now), Turn::Probe);
        login.on_answer(Verdict::Accepted, now);
        login.on_answer(Verdict::Refused, now);
        assert_eq!(login.ask(now), Turn::Refused { until: now + 5 * MINUTE }, "an acceptance starts over");
    }

    #[test]
    fn a_doubtful_answer_makes_the_next_one_find_out() {
        let now = crate::sys::now();
        let mut login = Login::default();
        login.ask(now);
        login.on_answer(Verdict::Accepted, now);
        login.on_answer(Verdict::Doubtful, now);
        assert_eq!(login.ask(now), Turn::Probe);
        assert_eq!(login.ask(now), Turn::Wait);
    }
}
