//! What is told of the lives of replications, poll by poll.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::pure::checkpoint::{Mark, StateKey};
use crate::pure::remembered::{BUCKETS, Bucket, bucket_of};
use crate::pure::replication::{Info, Row, State};
use crate::pure::transitions::known::Known;
use crate::pure::transitions::{Settings, Told, Transitions, default_types};

const POLL: Duration = Duration::from_secs(5);
const SETTINGS: Settings = Settings {
    confirm_polls: 2,
    stalled_after: Duration::from_secs(600),
    retry_failed: Some((2, Duration::from_secs(60))),
};

fn mark() -> Mark {
    Mark::new([7; 16])
}

/// A daemon with its monitor; `buckets` is what CouchDB has stored.
struct World {
    machine: Transitions,
    stored: Vec<Option<Bucket<Known>>>,
    now: Instant,
    said: Vec<String>,
}

impl World {
    /// Of a database that was there when the webhook first started with `since = now`, or was not.
    fn new(is_quiet: bool) -> World {
        let stored = vec![None; BUCKETS];
        let machine = Transitions::new(SETTINGS, mark(), stored.clone(), 0, is_quiet);
        World { machine, stored, now: crate::sys::now(), said: Vec::new() }
    }

    /// Killed, and started again.
    fn restart(&mut self) {
        self.machine = Transitions::new(SETTINGS, mark(), self.stored.clone(), 0, true);
    }

    fn told(&mut self, told: impl IntoIterator<Item = Told>) {
        for told in told {
            self.machine.keep(&told, jiff::Timestamp::UNIX_EPOCH, "{}".into());
            let event = told.event_type.strip_prefix("replication.").unwrap();
            self.said.push(format!("{}:{event}", told.key));
        }
    }

    /// One poll that finds these rows; `n` times.
    fn poll(&mut self, rows: &[(&str, Row)], n: usize) -> &mut World {
        for _ in 0..n {
            self.now += POLL;
            self.machine.begin_poll();
            for (key, row) in rows {
                let told = self.machine.on_row(key, row, self.now);
                self.told(told);
            }
            let told = self.machine.end_poll();
            self.told(told);
            while let Some(told) = self.machine.next_resubmission(self.now) {
                self.told([told]);
            }
            self.store();
        }
        self
    }

    fn store(&mut self) {
        let dirty: Vec<(usize, Bucket<Known>)> = self
            .machine
            .remembered
            .dirty()
            .into_iter()
            .map(|(index, bucket)| (index, bucket.clone()))
            .collect();
        for (index, bucket) in dirty {
            let (place, key) = (("_replicator", "x"), StateKey::new([1; 32]));
            let json = bucket.to_json(&place, &key, None);
            self.stored[index] = Some(Bucket::from_json(json.as_bytes(), &place, &key).unwrap());
            self.machine.remembered.on_stored(index);
        }
    }

    /// What was told since the last call.
    fn said(&mut self) -> String {
        std::mem::take(&mut self.said).join(" ")
    }
}

fn row(state: State) -> Row {
    let json = json!({"doc_id": "a", "state": state});
    serde_json::from_value(json).unwrap()
}

fn ended(state: State, second: i64) -> Row {
    Row { last_updated: Some(jiff::Timestamp::from_second(second).unwrap()), ..row(state) }
}

fn working(docs_read: u64, pending: u64, failures: u64) -> Row {
    let info = json!({"docs_read": docs_read, "changes_pending": pending, "doc_write_failures": failures});
    Row { info: Info::of(info), ..row(State::Running) }
}

#[test]
fn a_replication_that_completes() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Initializing))], 1);
    assert_eq!(world.said(), "", "seen once");
    world.poll(&[("a", row(State::Running))], 2);
    assert_eq!(world.said(), "a:running");
    world.poll(&[("a", ended(State::Completed, 9))], 1);
    assert_eq!(world.said(), "a:completed", "a terminal state counts at once");
    world.poll(&[("a", ended(State::Completed, 9))], 3);
    assert_eq!(world.said(), "");
    // Edited: it runs again, and comes to another end.
    world.poll(&[("a", ended(State::Completed, 20))], 1);
    assert_eq!(world.said(), "a:completed");
}

#[test]
fn trouble_is_over_when_it_makes_progress_and_not_when_it_tries_again() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Running))], 2).poll(&[("a", row(State::Crashing))], 2);
    assert_eq!(world.said(), "a:running a:crashing");
    // A closed port runs for 8 s before it crashes again.
    for _ in 0..5 {
        world.poll(&[("a", row(State::Running))], 2).poll(&[("a", row(State::Crashing))], 6);
        world.poll(&[("a", row(State::Pending))], 2);
    }
    assert_eq!(world.said(), "");
    world.poll(&[("a", working(1, 5, 0))], 2);
    assert_eq!(world.said(), "", "what it had done before its crash is no progress");
    world.poll(&[("a", working(2, 4, 0))], 1);
    assert_eq!(world.said(), "a:running a:recovered");
    // 2.x tells no progress of what runs.
    world.poll(&[("a", row(State::Error))], 2).poll(&[("a", row(State::Running))], 37);
    assert_eq!(world.said(), "a:error a:running a:recovered");
    world.poll(&[("a", ended(State::Failed, 3))], 1).poll(&[("a", ended(State::Completed, 4))], 1);
    assert_eq!(world.said(), "a:failed a:completed a:recovered");
}

#[test]
fn flapping_above_max_jobs_is_told_as_slowly_as_it_is_confirmed() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Running))], 2);
    for _ in 0..10 {
        world.poll(&[("a", row(State::Pending))], 1).poll(&[("a", row(State::Running))], 1);
    }
    assert_eq!(world.said(), "a:running");
}

#[test]
fn what_changed_while_we_were_away_is_told_once_and_what_did_not_is_not() {
    let mut world = World::new(false);
    world.poll(
        &[("a", row(State::Running)), ("b", row(State::Running)), ("c", ended(State::Completed, 1))],
        2,
    );
    world.said();
    world.restart();
    let after = [("a", row(State::Crashing)), ("b", row(State::Running)), ("c", ended(State::Completed, 1))];
    world.poll(&after, 5);
    assert_eq!(world.said(), "a:crashing");
    world.restart();
    world.poll(&after, 5);
    assert_eq!(world.said(), "");
}

#[test]
fn what_was_there_at_the_first_start_is_known_and_not_told() {
    let mut world = World::new(true);
    world.machine.on_document("late");
    world.poll(&[("a", row(State::Crashing))], 3);
    assert_eq!(world.said(), "");
    world.restart();
    world.poll(&[("a", working(1, 0, 0)), ("late", row(State::Running))], 3);
    assert_eq!(world.said(), "a:running a:recovered", "its rows came late");
    world.poll(&[("new", row(State::Running))], 2);
    assert_eq!(world.said(), "new:running");
}

#[test]
fn a_missing_row_says_nothing_and_a_missing_document_does() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Running))], 2).poll(&[], 50);
    assert_eq!(world.said(), "a:running");
    let told = world.machine.on_gone("a");
    world.told(told);
    assert_eq!(world.said(), "a:removed");
    assert!(world.machine.on_gone("a").is_none(), "once");
    world.poll(&[("a", row(State::Running))], 2);
    assert_eq!(world.said(), "a:running", "created again with the same id");
}

#[test]
fn one_without_a_document_is_gone_when_couchdb_lists_it_no_more() {
    let mut world = World::new(false);
    world.poll(&[("_replicate/5", row(State::Running))], 2).poll(&[], 1);
    assert_eq!(world.said(), "_replicate/5:running");
    world.poll(&[], 1);
    assert_eq!(world.said(), "_replicate/5:removed");
    world.poll(&[("_replicate/6", row(State::Running))], 2);
    world.said();
    world.restart();
    world.poll(&[], 2);
    assert_eq!(world.said(), "_replicate/6:removed", "it ended while we were away");
}

#[test]
fn stalled_is_told_once_until_it_moves() {
    let mut world = World::new(false);
    world.poll(&[("a", working(1, 5, 0))], 2);
    world.said();
    world.poll(&[("a", working(1, 7, 0))], 118);
    assert_eq!(world.said(), "", "what others write into its source is not its progress");
    world.poll(&[("a", working(1, 7, 0))], 200);
    assert_eq!(world.said(), "a:stalled");
    world.restart();
    world.poll(&[("a", working(1, 7, 0))], 200);
    assert_eq!(world.said(), "");
    world.poll(&[("a", working(2, 6, 0))], 1).poll(&[("a", working(2, 6, 0))], 121);
    assert_eq!(world.said(), "a:stalled");
    world.poll(&[("a", working(2, 0, 0))], 300);
    assert_eq!(world.said(), "", "nothing to do is no stall");
}

#[test]
fn documents_that_could_not_be_written_are_told_when_they_become_more() {
    let mut world = World::new(false);
    world.poll(&[("a", working(1, 0, 2))], 1);
    assert_eq!(world.said(), "");
    world.poll(&[("a", working(1, 0, 2))], 3);
    assert_eq!(world.said(), "a:running a:write_failures");
    world.poll(&[("a", working(5, 0, 3))], 2);
    assert_eq!(world.said(), "a:write_failures");
    world.restart();
    world.poll(&[("a", working(5, 0, 3))], 2);
    assert_eq!(world.said(), "");
    // Its job was made anew and counts anew.
    world.poll(&[("a", working(1, 0, 0))], 1).poll(&[("a", working(1, 0, 1))], 1);
    assert_eq!(world.said(), "a:write_failures");
}

#[test]
fn a_second_row_of_a_poll_is_left_alone() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Running)), ("a", row(State::Running))], 1);
    assert_eq!(world.said(), "");
}

#[test]
fn invalid_is_told_once_for_what_a_person_wrote() {
    let mut world = World::new(true);
    let told = world.machine.on_checked("old", 1, true);
    world.told(told);
    world.poll(&[], 1);
    assert_eq!(world.said(), "", "it was there before");
    for (fingerprint, is_invalid, expected) in [
        (2, false, ""),
        (3, true, "a:invalid"),
        (3, true, ""),
        (4, true, "a:invalid"),
        (5, false, ""),
        (4, true, "a:invalid"),
    ] {
        let told = world.machine.on_checked("a", fingerprint, is_invalid);
        world.told(told);
        assert_eq!(world.said(), expected, "{fingerprint}");
    }
    world.poll(&[("a", ended(State::Failed, 1))], 1);
    assert_eq!(world.said(), "a:failed", "its state is news all the same");
}

#[test]
fn a_failed_one_is_submitted_again_so_often_and_no_more() {
    let mut world = World::new(false);
    world.poll(&[("a", ended(State::Failed, 1))], 12);
    assert_eq!(world.said(), "a:failed");
    world.poll(&[("a", ended(State::Failed, 1))], 5);
    assert_eq!(world.said(), "a:resubmitted");
    // The daemon is killed before it has saved the document: that is still to be done, and not to be told again.
    world.restart();
    world.poll(&[("a", ended(State::Failed, 1))], 1);
    assert_eq!(world.machine.resubmitted().iter().map(|(key, _)| key).collect::<Vec<_>>(), ["a"]);
    world.poll(&[("a", row(State::Running))], 1);
    assert!(world.machine.resubmitted().is_empty());
    world.poll(&[("a", ended(State::Failed, 100))], 13);
    assert_eq!(world.said(), "a:failed a:resubmitted");
    world.poll(&[("a", ended(State::Failed, 200))], 50);
    assert_eq!(world.said(), "a:failed", "twice is enough");
    world.poll(&[("a", ended(State::Completed, 300))], 1).poll(&[("a", ended(State::Failed, 400))], 50);
    assert_eq!(world.said(), "a:completed a:recovered a:failed a:resubmitted", "it went well in between");
}

#[test]
fn numbers_are_given_once_and_events_are_kept_until_they_are_delivered() {
    let mut world = World::new(false);
    world.poll(&[("a", row(State::Running)), ("b", row(State::Running))], 2);
    let numbers = |world: &World| -> Vec<u64> {
        world.machine.remembered.events_after(0, 9).iter().map(|event| event.n).collect()
    };
    assert_eq!(numbers(&world), [1, 2]);
    world.restart();
    assert_eq!(numbers(&world), [1, 2]);
    world.machine.remembered.on_through(1);
    assert_eq!(numbers(&world), [2]);
    let told = world.machine.on_gone("a");
    world.told(told);
    assert_eq!(numbers(&world), [2], "what is not stored is not told");
    world.store();
    assert_eq!(numbers(&world), [2, 3]);
    world.restart();
    assert_eq!(numbers(&world), [2, 3], "what was delivered went with the write of its document");
    world.machine.remembered.on_through(3);
    world.machine.on_document("x");
    let highest = Transitions::new(SETTINGS, mark(), vec![None; BUCKETS], 3, false);
    assert_eq!(highest.remembered.last(), 3, "the checkpoint remembers, too");
}

#[test]
fn the_default_leaves_out_what_comes_and_goes() {
    let left_out = ["replication.running", "replication.pending", "replication.initializing"];
    assert!(default_types().iter().all(|name| !left_out.contains(name)));
    assert_eq!(default_types().len(), 10);
    assert!(bucket_of("edge1") < BUCKETS);
}

#[test]
fn one_that_fails_again_between_two_looks_waits_again() {
    let mut world = World::new(false);
    world.poll(&[("a", ended(State::Failed, 1))], 13);
    assert_eq!(world.said(), "a:failed a:resubmitted");
    // Nobody saw it run.
    world.poll(&[("a", ended(State::Failed, 70))], 12);
    assert_eq!(world.said(), "a:failed");
    world.poll(&[("a", ended(State::Failed, 70))], 1);
    assert_eq!(world.said(), "a:resubmitted");
}

#[test]
fn nothing_is_told_before_what_came_earlier_is_stored() {
    let mut world = World::new(false);
    let rows =
        [("a", ended(State::Failed, 1)), ("b", ended(State::Failed, 1)), ("c", ended(State::Failed, 1))];
    assert!(bucket_of("a") != bucket_of("b") && bucket_of("b") != bucket_of("c"));
    world.machine.begin_poll();
    for (key, row) in &rows {
        let told = world.machine.on_row(key, row, world.now);
        world.told(told);
    }
    let keys = |world: &World| -> Vec<String> {
        world.machine.remembered.events_after(0, 9).iter().map(|event| event.key.clone()).collect()
    };
    // CouchDB refuses one of three documents: a position behind `c` would pass `b`.
    world.machine.remembered.on_stored(bucket_of("a"));
    world.machine.remembered.on_stored(bucket_of("c"));
    assert_eq!(keys(&world), ["a"]);
    world.machine.remembered.on_stored(bucket_of("b"));
    assert_eq!(keys(&world), ["a", "b", "c"]);
}
