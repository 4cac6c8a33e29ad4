//! Which changes of a replication's state are told, and what is remembered of them.
//!
//! The shell polls: [`Transitions::begin_poll`], a row for each replication with [`Transitions::on_row`], then
//! [`Transitions::end_poll`]; for each [`Told`] it gathers the details and calls [`Transitions::keep`]; then it stores what
//! is remembered, and only then sends the events.
//!
//! Guarantees (issue: damping and truth): a state counts when it was seen in `confirm_polls` polls in a row, a terminal
//! one at once; a row that is missing says nothing, only [`Transitions::on_gone`] does; what did not change since it was
//! last told is not told; a replication in trouble that only tries again is still in trouble, until it makes progress or
//! has run for a while: a closed port "runs" for 8 s before it crashes again (CONTRACT §8). Knows no event's details.

pub mod known;
pub mod telling;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::pure::checkpoint::Mark;
use crate::pure::lag;
use crate::pure::remembered::{Bucket, Remembered};
use crate::pure::replication::{Progress, Row, State};
use crate::pure::transitions::known::{Known, TRANSIENT};

/// Running or completed again after trouble.
pub const RECOVERED: &str = "replication.recovered";
/// Runs, has something to do, and does not move.
pub const STALLED: &str = "replication.stalled";
/// It could not write documents: the target refused them, and the replication went on.
pub const WRITE_FAILURES: &str = "replication.write_failures";
/// Its document is gone.
pub const REMOVED: &str = "replication.removed";
/// Its document cannot work as it is.
pub const INVALID: &str = "replication.invalid";
/// We saved its document again, so that CouchDB tries once more.
pub const RESUBMITTED: &str = "replication.resubmitted";

/// Every type there is, those of states first.
pub const TYPES: [&str; 13] = [
    "replication.initializing",
    "replication.pending",
    "replication.running",
    "replication.crashing",
    "replication.error",
    "replication.completed",
    "replication.failed",
    RECOVERED,
    STALLED,
    WRITE_FAILURES,
    REMOVED,
    INVALID,
    RESUBMITTED,
];

/// What is told unless `events` says otherwise: all but the three that come and go by themselves.
pub fn default_types() -> &'static [&'static str] {
    &TYPES[3..]
}

/// `replication.` and the word.
pub fn type_of(state: State) -> &'static str {
    let at = State::ALL.iter().position(|known| *known == state).expect("all states are listed");
    TYPES[at]
}

/// A replication in trouble that has run for so long without crashing, and tells no progress (2.x), has recovered.
const SOUND_AFTER: Duration = Duration::from_secs(180);

/// What a webhook asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Polls that a state has to be seen in.
    pub confirm_polls: u32,
    /// Without progress for so long, with changes pending: stalled.
    pub stalled_after: Duration,
    /// So often, and so long after each failure, a failed one is submitted again.
    pub retry_failed: Option<(u32, Duration)>,
}

/// Something to be told of a replication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Id of its document, or [`TRANSIENT`] and its own.
    pub key: String,
    /// One of [`TYPES`].
    pub event_type: &'static str,
    /// Its state as it is now; `None` when it is gone or has none.
    pub state: Option<State>,
    /// The last one that was told.
    pub previous: Option<State>,
}

/// What is seen of a replication while we run.
#[derive(Debug, Default)]
struct Seen {
    /// In which poll its row came last.
    poll: u64,
    /// A state that is not what is known, and in how many polls in a row it was seen.
    candidate: Option<(State, u32)>,
    /// Since when it runs without a break, and what it had done at that time.
    running_since: Option<(Instant, Option<u64>)>,
    /// What it has done, as a hash, and since when that is so.
    progress: Option<(u64, Instant)>,
    /// Whether the last row said that it has done more.
    has_moved: bool,
    /// Polls in a row without it; counted for those without a document.
    n_missing: u32,
    /// When it was first seen as failed with its present end.
    failed_since: Option<(Instant, Option<Timestamp>)>,
}

/// The machine.
#[derive(Debug)]
pub struct Transitions {
    settings: Settings,
    /// By id of its document, or [`TRANSIENT`] and its own. First looked at is a database that was there when the webhook
    /// first started with `since = now`.
    pub remembered: Remembered<Known>,
    seen: HashMap<String, Seen>,
    poll: u64,
}

impl Transitions {
    /// From what is stored of each document, if anything is; `through`: events up to this number need not be told any
    /// more. `is_quiet`: what is found where nothing is stored is not told.
    pub fn new(
        settings: Settings,
        mark: Mark,
        stored: Vec<Option<Bucket<Known>>>,
        through: u64,
        is_quiet: bool,
    ) -> Transitions {
        let remembered = Remembered::new(mark, stored, through, is_quiet);
        Transitions { settings, remembered, seen: HashMap::new(), poll: 0 }
    }

    /// Whether something is remembered of this replication.
    pub fn is_known(&self, key: &str) -> bool {
        self.remembered.known(key).is_some()
    }

    /// Ids of all documents that something is remembered of.
    pub fn known_keys(&self) -> impl Iterator<Item = &str> {
        self.remembered.all().map(|(key, _)| key).filter(|key| !key.starts_with(TRANSIENT))
    }

    /// A look at everything begins.
    pub fn begin_poll(&mut self) {
        self.poll += 1;
    }

    /// CouchDB says this of a replication, at `now`. A second row of the same poll is left alone: pages shift.
    pub fn on_row(&mut self, key: &str, row: &Row, now: Instant) -> Vec<Told> {
        let seen = self.seen.entry(key.to_owned()).or_default();
        if seen.poll == self.poll {
            return Vec::new();
        }
        (seen.poll, seen.n_missing) = (self.poll, 0);
        seen.on_progress(row, now);
        let known = self.remembered.known(key);
        let ended_at = row.last_updated.filter(|_| row.state.is_terminal());
        if known.map_or(self.remembered.is_quiet(key), |known| known.was_there) {
            let found = Known {
                state: Some(row.state),
                was_there: false,
                ended_at,
                trouble: row.state.is_trouble().then_some(row.state),
                write_failures: write_failures(row),
                ..known.cloned().unwrap_or_default()
            };
            self.remembered.insert(key, found);
            return Vec::new();
        }
        let mut next = known.cloned().unwrap_or_default();
        let event_types = seen.judge(&self.settings, &mut next, row, ended_at, now);
        let previous = known.and_then(|known| known.state);
        // What is not known yet becomes so with its first event.
        if known.map_or(!event_types.is_empty(), |known| *known != next) {
            self.remembered.insert(key, next);
        }
        let told = |event_type| Told { key: key.to_owned(), event_type, state: Some(row.state), previous };
        event_types.into_iter().map(told).collect()
    }

    /// All rows were read, to the end of the list. Gives what follows from those that did not come: of replications
    /// without a document that CouchDB knows no more.
    pub fn end_poll(&mut self) -> Vec<Told> {
        let mut gone = Vec::new();
        for (key, seen) in &mut self.seen {
            if seen.poll != self.poll {
                seen.candidate = None;
                seen.n_missing += 1;
                if key.starts_with(TRANSIENT) && seen.n_missing >= self.settings.confirm_polls.max(2) {
                    gone.push(key.clone());
                }
            }
        }
        // Those that were started by `_replicate` and may have ended while we were away.
        for (key, _) in self.remembered.all() {
            if key.starts_with(TRANSIENT) && !self.seen.contains_key(key) {
                self.seen.insert(key.to_owned(), Seen { n_missing: 1, ..Seen::default() });
            }
        }
        self.remembered.end_first_look();
        gone.sort();
        gone.iter().filter_map(|key| self.on_gone(key)).collect()
    }

    /// A document is there. While a database is looked at for the first time, it is known from now on.
    pub fn on_document(&mut self, key: &str) {
        if self.remembered.is_quiet(key) && !self.is_known(key) {
            self.remembered.insert(key, Known { was_there: true, ..Known::default() });
        }
    }

    /// Its document answers 404, or is deleted.
    pub fn on_gone(&mut self, key: &str) -> Option<Told> {
        self.seen.remove(key);
        let known = self.remembered.remove(key)?;
        Some(Told { key: key.to_owned(), event_type: REMOVED, state: None, previous: known.state })
    }

    /// What was found in a document, by the fingerprint of what a person wrote in it: whether it can work.
    pub fn on_checked(&mut self, key: &str, fingerprint: u64, is_invalid: bool) -> Option<Told> {
        let quiet = self.remembered.is_quiet(key);
        let known = self.remembered.known(key);
        let was = known.and_then(|known| known.invalid);
        let is = is_invalid.then_some(fingerprint);
        if was == is {
            return None;
        }
        let new = || Known { was_there: quiet, ..Known::default() };
        let known = Known { invalid: is, ..known.cloned().unwrap_or_else(new) };
        let state = known.state;
        self.remembered.insert(key, known);
        let told = Told { key: key.to_owned(), event_type: INVALID, state, previous: state };
        (is_invalid && !quiet).then_some(told)
    }

    /// A failed replication whose time to be submitted again has come; counted from now on. The shell saves the
    /// document when that is stored, and as long as [`Transitions::resubmitted`] names it.
    pub fn next_resubmission(&mut self, now: Instant) -> Option<Told> {
        let (n_max, after) = self.settings.retry_failed?;
        let due = |key: &&String| {
            let seen = &self.seen[*key];
            let known = self.remembered.known(key);
            seen.failed_since.is_some_and(|(since, _)| now >= since + after)
                && known.is_some_and(|known| {
                    let (n, last) = known.resubmitted.unwrap_or((0, None));
                    // Without a time the next failure could not be told from this one.
                    let is_another = known.ended_at.is_some() && (n == 0 || last != known.ended_at);
                    known.state == Some(State::Failed) && n < n_max && is_another
                })
        };
        let key = self.seen.keys().filter(|key| !key.starts_with(TRANSIENT)).filter(due).min()?.clone();
        let known = self.remembered.known(&key).expect("found above");
        let resubmitted = Some((known.resubmitted.map_or(0, |(n, _)| n) + 1, known.ended_at));
        let (state, known) = (known.state, Known { resubmitted, ..known.clone() });
        self.remembered.insert(&key, known);
        Some(Told { key, event_type: RESUBMITTED, state, previous: state })
    }

    /// Those that are to be saved again: counted as submitted, and still failed with the same end, which came then.
    pub fn resubmitted(&self) -> Vec<(String, Option<Timestamp>)> {
        let still = self.remembered.all().filter(|(key, known)| {
            known.state == Some(State::Failed)
                && known.resubmitted.is_some_and(|(_, after)| after == known.ended_at)
                && self.seen.get(*key).is_some_and(|seen| seen.failed_since.is_some())
        });
        still.map(|(key, known)| (key.to_owned(), known.ended_at)).collect()
    }

    /// How often a replication was submitted again since it last went well.
    pub fn n_resubmissions(&self, key: &str) -> u32 {
        self.remembered.known(key).and_then(|known| known.resubmitted).map_or(0, |(n, _)| n)
    }

    /// Something told becomes an event, with the next number. Stored with the next write of its document.
    pub fn keep(&mut self, told: &Told, at: Timestamp, data: String) {
        self.remembered.keep(&told.key, told.event_type, at, data);
    }
}

impl Seen {
    fn on_progress(&mut self, row: &Row, now: Instant) {
        let hash = row.info.progress().map(work_hash);
        self.has_moved = false;
        if let Some(hash) = hash
            && self.progress.is_none_or(|(known, _)| known != hash)
        {
            self.has_moved = self.progress.is_some();
            self.progress = Some((hash, now));
        }
        if row.state != State::Running {
            self.running_since = None;
        } else if self.running_since.is_none() {
            self.running_since = Some((now, hash));
        }
        if row.state != State::Failed {
            self.failed_since = None;
        } else if self.failed_since.is_none_or(|(_, end)| end != row.last_updated) {
            self.failed_since = Some((now, row.last_updated));
        }
    }

    /// What a row changes in what is known, and what is told of that.
    fn judge(
        &mut self,
        settings: &Settings,
        known: &mut Known,
        row: &Row,
        ended_at: Option<Timestamp>,
        now: Instant,
    ) -> Vec<&'static str> {
        let mut told = Vec::new();
        let is_news = known.state != Some(row.state) || (ended_at.is_some() && ended_at != known.ended_at);
        if !is_news {
            self.candidate = None;
        } else if self.counts(settings, known, row, now) {
            self.candidate = None;
            told.push(type_of(row.state));
            if known.state.is_some_and(State::is_terminal) {
                // Another run counts anew.
                known.write_failures = 0;
            }
            (known.state, known.ended_at) = (Some(row.state), ended_at);
            match row.state {
                State::Running | State::Completed => {
                    if known.trouble.take().is_some() {
                        told.push(RECOVERED);
                    }
                    known.resubmitted = None;
                }
                state if state.is_trouble() => known.trouble = Some(state),
                _ => {}
            }
        }
        self.judge_work(settings, known, row, now, &mut told);
        told
    }

    /// Whether a state that is not the known one counts by now.
    fn counts(&mut self, settings: &Settings, known: &Known, row: &Row, now: Instant) -> bool {
        if row.state.is_terminal() {
            return true;
        }
        let n_before = self.candidate.filter(|(state, _)| *state == row.state).map_or(0, |(_, n)| n);
        self.candidate = Some((row.state, n_before + 1));
        if n_before + 1 < settings.confirm_polls {
            return false;
        }
        known.trouble.is_none() || row.state.is_trouble() || self.is_sound(row, now)
    }

    /// Whether it does more than try: it has done something since it runs, or has run for long.
    fn is_sound(&self, row: &Row, now: Instant) -> bool {
        let Some((since, then)) = self.running_since else { return false };
        let progress = row.info.progress();
        let has_moved = progress.map(work_hash).is_some_and(|hash| then != Some(hash));
        // The source told how much is left, and it is nothing: it was reached in this run.
        let is_done = progress.is_some_and(|progress| progress.count("changes_pending") == Some(0));
        has_moved || is_done || now >= since + SOUND_AFTER
    }

    fn judge_work(
        &mut self,
        settings: &Settings,
        known: &mut Known,
        row: &Row,
        now: Instant,
        told: &mut Vec<&'static str>,
    ) {
        if known.state.is_none() {
            return;
        }
        let failures = write_failures(row);
        if failures > known.write_failures {
            told.push(WRITE_FAILURES);
        }
        // Less is another run, too.
        if row.info.progress().is_some() {
            known.write_failures = failures;
        }
        let Some((_, moved_at)) = self.progress.filter(|_| row.state == State::Running) else { return };
        let is_behind = row.info.progress().and_then(lag::pending).is_some_and(|pending| pending > 0);
        // A run that began later has had less time.
        let idle_since = self.running_since.map_or(moved_at, |(since, _)| since.max(moved_at));
        if known.is_stalled && (self.has_moved || !is_behind) {
            known.is_stalled = false;
        } else if !known.is_stalled && is_behind && now >= idle_since + settings.stalled_after {
            known.is_stalled = true;
            told.push(STALLED);
        }
    }
}

fn write_failures(row: &Row) -> u64 {
    row.info.progress().and_then(|progress| progress.count("doc_write_failures")).unwrap_or(0)
}

/// What a replication itself has done: not what others write into its source.
fn work_hash(progress: &Progress) -> u64 {
    let own = progress.0.iter().filter(|(name, _)| *name != "source_seq" && *name != "changes_pending");
    own.fold(0, |hash, (name, value)| {
        let text = format!("{name}={value};");
        hash ^ crate::pure::message::doc_key(&text)
    })
}

#[cfg(test)]
mod tests;
