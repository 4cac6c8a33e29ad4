//! Decides when a configuration that is asked for again and again may be used.
//!
//! A webhook is six to twelve keys, set one by one; an answer may hold half of them. So a change is believed when
//! two answers in a row are equal. The very first answer is handed on at once, but as *provisional*: it is good
//! enough to go on with what ran before (whoever takes it compares fingerprints with the stored records; after a
//! kill no time may be lost, kills can come every few hundred milliseconds) and not good enough to start anything
//! for the first time, because `since = now` would be resolved from half a section. The second answer follows after
//! [`CONFIRM_AFTER`] instead of [`ASK_EVERY`], so that a new webhook waits a second and not five.
//! Serves the answers of `get` and of `_config` alike; asking is left to `host` and `config::source`.

use std::time::{Duration, Instant};

/// Time between two questions.
pub const ASK_EVERY: Duration = Duration::from_secs(5);
/// Time between the first and the second question after a start: longer than a script needs between two keys.
pub const CONFIRM_AFTER: Duration = Duration::from_secs(1);

/// What an answer is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict<T> {
    /// The first answer since the start: only to go on with what is known to have run like this.
    Provisional(T),
    /// Two answers in a row: to be applied whole.
    Settled(T),
}

impl<T> Verdict<T> {
    /// The answer, and whether it has settled.
    pub fn into_parts(self) -> (T, bool) {
        match self {
            Verdict::Provisional(answer) => (answer, false),
            Verdict::Settled(answer) => (answer, true),
        }
    }
}

/// The machine. Ask at [`Settling::next_ask`], tell it the outcome.
#[derive(Debug)]
pub struct Settling<T> {
    last_answer: Option<T>,
    settled: Option<T>,
    provisional_given: bool,
    next_ask: Instant,
}

impl<T: PartialEq + Clone> Settling<T> {
    /// Nothing known; the first question is due at once.
    pub fn new(now: Instant) -> Settling<T> {
        Settling { last_answer: None, settled: None, provisional_given: false, next_ask: now }
    }

    /// When to ask next.
    pub fn next_ask(&self) -> Instant {
        self.next_ask
    }

    /// What was settled last.
    pub fn settled(&self) -> Option<&T> {
        self.settled.as_ref()
    }

    /// An answer came. Gives a verdict at most once for the same content.
    pub fn on_answer(&mut self, answer: T, now: Instant) -> Option<Verdict<T>> {
        self.next_ask = now + if self.settled.is_none() { CONFIRM_AFTER } else { ASK_EVERY };
        let again = self.last_answer.as_ref() == Some(&answer);
        self.last_answer = Some(answer.clone());
        if again && self.settled.as_ref() != Some(&answer) {
            self.settled = Some(answer.clone());
            self.provisional_given = true;
            self.next_ask = now + ASK_EVERY;
            return Some(Verdict::Settled(answer));
        }
        if !self.provisional_given {
            self.provisional_given = true;
            return Some(Verdict::Provisional(answer));
        }
        None
    }

    /// No answer came, or not a whole one. It breaks the row: what follows must be heard twice again.
    pub fn on_failure(&mut self, now: Instant) {
        self.last_answer = None;
        self.next_ask = now + if self.settled.is_none() { CONFIRM_AFTER } else { ASK_EVERY };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers (`-` = failure) every question when it is due; gives verdicts as `p:x` and `s:x` with the seconds.
    fn check(answers: &str, expected: &str) {
        #[expect(clippy::disallowed_methods, reason = "any instant will do")]
        let start = Instant::now();
        let mut settling = Settling::new(start);
        let mut seen = Vec::new();
        for answer in answers.chars() {
            let now = settling.next_ask();
            let at = (now - start).as_secs();
            if answer == '-' {
                settling.on_failure(now);
                continue;
            }
            match settling.on_answer(answer, now) {
                Some(Verdict::Provisional(value)) => seen.push(format!("{at}p:{value}")),
                Some(Verdict::Settled(value)) => seen.push(format!("{at}s:{value}")),
                None => {}
            }
        }
        assert_eq!(seen.join(" "), expected, "{answers}");
    }

    #[test]
    fn the_first_answer_is_provisional_and_confirmed_a_second_later() {
        check("a", "0p:a");
        check("aa", "0p:a 1s:a");
        check("aaaaa", "0p:a 1s:a");
    }

    #[test]
    fn half_a_configuration_is_never_settled() {
        check("abcdd", "0p:a 4s:d");
        check("aabcdd", "0p:a 1s:a 21s:d");
    }

    #[test]
    fn a_change_needs_two_answers_in_a_row() {
        check("aabb", "0p:a 1s:a 11s:b");
        check("aababa", "0p:a 1s:a");
        check("aabbaa", "0p:a 1s:a 11s:b 21s:a");
        check("aababb", "0p:a 1s:a 21s:b");
    }

    #[test]
    fn a_failure_breaks_the_row() {
        check("-a-aa", "1p:a 4s:a");
        check("aab-b", "0p:a 1s:a");
        check("aab-bb", "0p:a 1s:a 21s:b");
        check("aa-a", "0p:a 1s:a");
    }
}
