//! How one subscription reads, step by step; what it never loses is the simulation's subject.

use std::time::{Duration, Instant};

use crate::pure::flow::{Flow, Opened, Read, ReadFault};
use crate::pure::seq::Seq;

const ROTATE: Duration = Duration::from_secs(60);

fn seq(json: &str) -> Seq {
    Seq::from_json(json).unwrap()
}

fn opened(checkpoint: Option<&str>) -> Opened {
    Opened {
        mark: "m".to_owned(),
        checkpoint: checkpoint.map(|json| (seq(json), vec![7])),
        rev: None,
        recreated: false,
        doc_count: 0,
        conflicted: None,
    }
}

fn open(flow: &mut Flow, now: Instant) -> Option<Read> {
    assert_eq!(flow.next_read(9, now), Some(Read::Open));
    flow.on_opened(opened(Some("5")));
    flow.next_read(9, now)
}

fn parked_for(flow: &Flow, now: Instant) -> Duration {
    flow.next_reading_deadline().map_or(Duration::ZERO, |at| at - now)
}

#[test]
fn nothing_is_to_be_stored_of_what_was_never_read() {
    let now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5));
    assert!(flow.is_stored(), "its database may not be there: an end would wait for nothing");
    assert_eq!(flow.next_read(9, now), Some(Read::Open));
    flow.on_opened(opened(None));
    assert!(flow.is_stored());
    flow.next_read(9, now);
    flow.on_end(Some(seq("7")), Some(0), false, now);
    assert!(!flow.is_stored(), "that it was read up to there is to be stored");
}

#[test]
fn a_position_that_couchdb_does_not_know_is_dropped() {
    let now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5));
    assert_eq!(open(&mut flow, now), Some(Read::Page { since: seq("5"), limit: 9 }));
    flow.on_read_failed(ReadFault::BadPosition, now);
    let later = now + Duration::from_secs(5);
    assert_eq!(open(&mut flow, later), Some(Read::Page { since: Seq::zero(), limit: 9 }));
}

#[test]
fn a_server_that_is_being_started_costs_seconds_and_a_filter_that_throws_is_tried_every_five_minutes() {
    let mut now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5));
    let mut pauses = Vec::new();
    for _ in 0..5 {
        open(&mut flow, now);
        flow.on_read_failed(ReadFault::Refused, now);
        pauses.push(parked_for(&flow, now).as_secs());
        now += parked_for(&flow, now);
    }
    assert_eq!(pauses, [1, 5, 300, 300, 300]);
}

#[test]
fn a_database_that_is_another_at_every_look_is_looked_at_with_pauses() {
    let mut now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5));
    let mut pauses = Vec::new();
    for _ in 0..4 {
        open(&mut flow, now);
        flow.on_read_failed(ReadFault::Changed, now);
        pauses.push(parked_for(&flow, now).as_millis());
        now += parked_for(&flow, now);
    }
    assert_eq!(pauses, [0, 500, 1_000, 2_000]);
}

#[test]
fn ids_that_a_checkpoint_named_are_gone_from_the_next_once_the_feed_was_read_to_its_end() {
    let mut now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5));
    open(&mut flow, now);
    flow.on_end(Some(seq("5")), None, false, now);
    now += Duration::from_secs(5);
    let position = flow.next_checkpoint(now).expect("what it named has changed");
    assert!(position.delivered.is_empty());
}

#[test]
fn one_that_rests_reads_again_what_may_have_come_since_its_page_was_asked_for() {
    let now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5)).resting();
    assert_eq!(open(&mut flow, now), Some(Read::Page { since: seq("5"), limit: 9 }));
    flow.stir();
    flow.on_end(Some(seq("6")), None, false, now);
    assert_eq!(flow.next_read(9, now), Some(Read::Page { since: seq("6"), limit: 9 }));
    flow.on_end(Some(seq("6")), None, false, now);
    assert_eq!(flow.next_read(9, now), None);
    assert!(!flow.is_at_rest(), "its checkpoint is not stored");
    let position = flow.next_checkpoint(now + Duration::from_secs(5)).unwrap();
    assert_eq!(position.through_seq, seq("6"));
    flow.on_checkpoint_stored("0-2".to_owned(), now);
    assert!(flow.is_at_rest());
    flow.stir();
    assert!(!flow.is_at_rest());
    assert_eq!(flow.next_read(9, now), Some(Read::Page { since: seq("6"), limit: 9 }));
}

#[test]
fn one_that_could_not_be_read_at_all_makes_room_though_nothing_is_stored() {
    let now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5)).resting();
    assert_eq!(flow.next_read(9, now), Some(Read::Open));
    flow.on_opened(opened(None));
    assert!(matches!(flow.next_read(9, now), Some(Read::Page { .. })));
    flow.on_read_failed(ReadFault::Refused, now);
    assert!(flow.is_done());
    // What was read has to be stored first.
    open(&mut flow, now + Duration::from_secs(5));
    flow.on_end(Some(seq("6")), None, false, now);
    assert!(!flow.is_done());
}

#[test]
fn one_that_rests_and_whose_position_cannot_be_stored_is_opened_anew() {
    let now = crate::sys::now();
    let mut flow = Flow::new(false, ROTATE, Duration::from_secs(5)).resting();
    open(&mut flow, now);
    flow.on_end(Some(seq("6")), None, false, now);
    flow.next_checkpoint(now + Duration::from_secs(5)).unwrap();
    flow.on_position_lost(now);
    assert!(!flow.is_at_rest());
    assert_eq!(open(&mut flow, now), Some(Read::Page { since: seq("5"), limit: 9 }));
    flow.on_end(Some(seq("6")), None, false, now);
    flow.next_checkpoint(now + Duration::from_secs(5)).unwrap();
    flow.on_checkpoint_stored("0-2".to_owned(), now);
    assert!(flow.is_at_rest());
}
