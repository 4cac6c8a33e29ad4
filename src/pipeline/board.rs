//! What the webhooks of this process last said of themselves, and attempts for those who look on.
//!
//! Webhooks write, whoever tells the world reads a copy; nothing is decided by it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::pure::snapshot::{State, Statuses, WebhookStatus};

/// Attempts kept for those who look on.
const ATTEMPTS_MAX: usize = 100;

/// One attempt, as `tail` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct Seen {
    /// Counts from 1 in this process.
    pub n: u64,
    /// When its answer came.
    pub at: jiff::Timestamp,
    /// `webhook-id`.
    pub id: String,
    /// The database.
    pub db: String,
    /// The document.
    pub doc_id: String,
    /// Attempts of this event in this process.
    pub attempt: u32,
    /// Whether a dead letter is sent again.
    pub replay: bool,
    /// HTTP status, if there was an answer.
    pub status: Option<u16>,
    /// How long it took.
    pub milliseconds: u64,
    /// Start of an answer other than 2xx, or the error; redacted.
    pub answer: String,
}

/// The last attempts of one webhook, while somebody looks on.
#[derive(Debug, Default)]
pub struct Attempts {
    seen: Mutex<(u64, VecDeque<Seen>)>,
}

impl Attempts {
    /// One more; the oldest is forgotten when there are too many.
    pub fn push(&self, mut seen: Seen) {
        let mut guard = lock(&self.seen);
        let (n, last) = &mut *guard;
        *n += 1;
        seen.n = *n;
        if last.len() >= ATTEMPTS_MAX {
            last.pop_front();
        }
        last.push_back(seen);
    }

    /// How many there were, and the last ones.
    pub fn last(&self) -> (u64, Vec<Seen>) {
        let guard = lock(&self.seen);
        (guard.0, guard.1.iter().cloned().collect())
    }
}

/// What all webhooks say.
#[derive(Debug, Default)]
pub struct Board {
    posts: Mutex<BTreeMap<String, (WebhookStatus, u64)>>,
    onlookers: Mutex<BTreeMap<String, Arc<Attempts>>>,
    has_onlookers: AtomicBool,
}

impl Board {
    /// A webhook says how it is. `since` stays as long as the word does.
    pub fn post(&self, webhook: &str, mut status: WebhookStatus) {
        let mut posts = lock(&self.posts);
        let before = posts.get(webhook);
        let n_words = before.map_or(0, |(_, n)| *n);
        let same = before.filter(|(before, _)| before.state == status.state);
        if let Some((before, _)) = same {
            status.since = before.since;
        }
        let n_words = n_words + u64::from(same.is_none());
        posts.insert(webhook.to_owned(), (status, n_words));
    }

    /// A webhook as it is held back.
    pub fn post_state(&self, webhook: &str, state: State, since: jiff::Timestamp, why: Option<String>) {
        lock(&self.posts).remove(webhook);
        self.post(webhook, WebhookStatus { why, ..WebhookStatus::new(state, since) });
    }

    /// A webhook that is configured no more.
    pub fn forget(&self, webhook: &str) {
        lock(&self.posts).remove(webhook);
    }

    /// What all say, and how often the word of any has changed so far.
    pub fn look(&self) -> (Statuses, u64) {
        let posts = lock(&self.posts);
        let n_words = posts.values().map(|(_, n)| n).sum::<u64>() + posts.len() as u64;
        (posts.iter().map(|(name, (status, _))| (name.clone(), status.clone())).collect(), n_words)
    }

    /// Somebody looks on at a webhook's attempts, or nobody does any more.
    pub fn set_onlooker(&self, webhook: &str, attempts: Option<Arc<Attempts>>) {
        let mut onlookers = lock(&self.onlookers);
        match attempts {
            Some(attempts) => onlookers.insert(webhook.to_owned(), attempts),
            None => onlookers.remove(webhook),
        };
        self.has_onlookers.store(!onlookers.is_empty(), Ordering::Release);
    }

    /// Whether anybody looks on at anything; asked for every attempt.
    pub fn has_onlookers(&self) -> bool {
        self.has_onlookers.load(Ordering::Acquire)
    }

    /// Where a webhook's attempts are shown, if somebody looks on.
    pub fn onlooker(&self, webhook: &str) -> Option<Arc<Attempts>> {
        lock(&self.onlookers).get(webhook).cloned()
    }
}

/// A poisoned lock guards values that stay whole whatever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    #[test]
    fn since_stays_while_the_word_does() {
        let board = Board::default();
        let at = |second: i64| jiff::Timestamp::from_second(second).unwrap();
        board.post("a", WebhookStatus::new(State::Running, at(1)));
        let (_, words) = board.look();
        board.post("a", WebhookStatus { unfinished: 7, ..WebhookStatus::new(State::Running, at(2)) });
        let (all, same) = board.look();
        assert_eq!((all["a"].since, all["a"].unfinished, same), (at(1), 7, words));
        board.post("a", WebhookStatus::new(State::Down, at(3)));
        let (all, other) = board.look();
        assert!(all["a"].since == at(3) && other > words);
    }

    #[test]
    fn the_last_hundred_attempts_are_kept_and_all_are_counted() {
        let attempts = Attempts::default();
        for i in 0..250 {
            attempts.push(Seen {
                n: 0,
                at: sys::wall(),
                id: String::new(),
                db: String::new(),
                doc_id: i.to_string(),
                attempt: 1,
                replay: false,
                status: None,
                milliseconds: 0,
                answer: String::new(),
            });
        }
        let (n, last) = attempts.last();
        assert_eq!((n, last.len(), last[0].n, last[99].doc_id.as_str()), (250, 100, 151, "249"));
    }
}
