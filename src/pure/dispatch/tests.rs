//! Letters that an operator sends again: their pace, their share, and what comes of each; conflicts, step by step; and what
//! one of thousands of databases may take.

use super::*;
use crate::pure::changes::{Row, RowDoc};
use crate::pure::document::Document;
use crate::pure::format::Format;
use crate::pure::message::{Telling, Watch};
use crate::sys;

const FLOW: FlowIndex = 0;

struct World {
    dispatch: Dispatch,
    now: Instant,
    attempts: Vec<Attempt>,
    ends: Vec<(message::WebhookId, Replayed)>,
    deleted: Vec<message::WebhookId>,
    unreadable: bool,
    /// What the next fetch finds.
    found: Option<Event>,
    keeps: Vec<(Attempt, Owed)>,
}

fn event(doc_id: &str, rev: &str) -> Event {
    let row = Row {
        seq: None,
        id: doc_id.into(),
        revs: vec![rev.into()],
        deleted: false,
        doc: RowDoc::Absent,
        line: None,
    };
    telling().arrived(row, "mark", jiff::Timestamp::UNIX_EPOCH).event.unwrap()
}

fn telling() -> Telling {
    Telling {
        webhook: "w".into(),
        db: "db".into(),
        source: "urn:x".into(),
        events: vec!["document.*".into()],
        include_docs: false,
        conflicts: false,
        conflict_docs: false,
        design_docs: false,
        payload_bytes_max: 1 << 20,
        format: Format::Standard,
        watch: Watch::Changes,
    }
}

/// A row of `doc_id` under `conflicts = true`: the winner, other live leaves, deleted ones.
fn leaves(doc_id: &str, events: &str, rev: &str, others: &[&str], gone: &[&str]) -> Arrived {
    let doc = serde_json::json!({"_rev": rev, "_conflicts": others}).to_string();
    let row = Row {
        seq: None,
        id: doc_id.into(),
        revs: [&[rev], others, gone].concat().into_iter().map(str::to_owned).collect(),
        deleted: false,
        doc: RowDoc::Json(Document::parse(doc).unwrap()),
        line: None,
    };
    let telling = Telling { conflicts: true, events: vec![events.into()], ..telling() };
    telling.arrived(row, "mark", jiff::Timestamp::UNIX_EPOCH)
}

impl World {
    fn new(concurrency: usize) -> World {
        let settings = Settings {
            concurrency,
            rate_limit: None,
            batching: None,
            delivered_on: &[],
            retry_schedule: vec![Duration::from_secs(1), Duration::from_secs(5)],
            retry_after_max: Duration::from_secs(3600),
            dead_letter_after: 3,
            dead_letter_on: vec![422],
            give_up_after: Duration::from_secs(600),
        };
        let now = sys::now();
        let flow = Flow::new(concurrency == 1, Duration::from_secs(60), Duration::from_secs(5));
        let dispatch = Dispatch::new(settings, vec![flow], now);
        let (attempts, ends, deleted) = (Vec::new(), Vec::new(), Vec::new());
        let (unreadable, found, keeps) = (false, None, Vec::new());
        let mut world = World { dispatch, now, attempts, ends, deleted, unreadable, found, keeps };
        world.poll();
        world.open(false, None);
        world
    }

    fn open(&mut self, recreated: bool, conflicted: Option<Vec<u64>>) {
        let (checkpoint, rev, doc_count) = (None, None, 0);
        let opened = Opened { mark: "mark".into(), checkpoint, rev, recreated, doc_count, conflicted };
        self.dispatch.on_opened(FLOW, opened);
        self.poll();
    }

    /// Loses its connection, and remembers nothing that was told after it.
    fn open_anew(&mut self, conflicted: Option<Vec<u64>>) {
        self.dispatch.on_read_failed(FLOW, ReadFault::Changed, self.now);
        self.poll();
        self.open(true, conflicted);
    }

    /// Does what can be done at once: fetches succeed at the letter's own revision, `1-a`.
    fn poll(&mut self) {
        loop {
            let mut actions = Vec::new();
            self.dispatch.poll(self.now, usize::MAX, 0.5, &mut || true, &mut actions);
            let none = actions.is_empty();
            for action in actions {
                match action {
                    Action::Attempt(attempt) => self.attempts.push(attempt),
                    Action::Fetch(_, letter) => {
                        let found = match self.unreadable {
                            true => Fetched::Unreadable("too large".into()),
                            false => {
                                let found = self.found.take();
                                Fetched::Event(found.unwrap_or_else(|| event(&letter.doc_id, "1-a")))
                            }
                        };
                        self.dispatch.on_fetched(&letter, found, self.now);
                    }
                    Action::Replayed(id, end) => self.ends.push((id, end)),
                    Action::DeleteLetter(id) => self.deleted.push(id),
                    Action::LookUp(attempt) => {
                        self.dispatch.on_looked_up(attempt.token, Some(false), self.now);
                    }
                    Action::Keep(attempt, owed) => self.keeps.push((attempt, owed)),
                    _ => {}
                }
            }
            if none {
                let deadline = self.dispatch.next_deadline();
                assert!(deadline.is_none_or(|at| at > self.now), "the shell would spin");
                return;
            }
        }
    }

    fn ask(&mut self, doc_id: &str) {
        let id = event(doc_id, "1-a").id;
        let letter = SuspectLetter { id, doc_id: doc_id.into(), resolved: None };
        self.dispatch.ask_replay(FLOW, letter, Asked { even_if_superseded: false }, self.now);
        self.poll();
    }

    fn live(&mut self, doc_id: &str) {
        let arrived = Arrived { seq: None, event: Some(event(doc_id, "2-b")) };
        self.dispatch.on_rows(FLOW, vec![arrived], self.now);
        self.poll();
    }

    fn row(&mut self, arrived: Arrived) {
        self.dispatch.on_rows(FLOW, vec![arrived], self.now);
        self.poll();
    }

    /// Answers the oldest order to keep something; what it was.
    fn kept(&mut self, docs: Option<LeafDocs>) -> Owed {
        let (attempt, owed) = self.keeps.remove(0);
        self.dispatch.on_kept(attempt.token, docs, self.now);
        self.poll();
        owed
    }

    /// What is being told, and the answer to it.
    fn tell(&mut self) -> (&'static str, message::WebhookId) {
        let event = &self.attempts[0].event;
        let told = (event.event_type(), event.id);
        self.answer(200);
        told
    }

    /// Answers the oldest attempt; its document.
    fn answer(&mut self, status: u16) -> String {
        let attempt = self.attempts.remove(0);
        let outcome = Outcome::Status { status, retry_after: None };
        self.dispatch.on_outcome(attempt.token, outcome, Moment { now: self.now, jitter: 0.5 });
        self.poll();
        attempt.event.doc_id.clone()
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.poll();
    }

    /// Brings the endpoint up to all its deliveries.
    fn warm_up(&mut self) {
        for i in 0..8 {
            self.live(&format!("warm{i}"));
            self.answer(200);
        }
    }
}

#[test]
fn letters_go_one_after_the_other_at_their_pace() {
    let mut world = World::new(8);
    world.warm_up();
    world.dispatch.set_replay_pause(Duration::from_millis(20));
    for i in 0..5 {
        world.ask(&format!("d{i}"));
    }
    for n in 1..=3 {
        assert_eq!(world.attempts.len(), 1, "letter {n}");
        assert!(world.attempts[0].replay);
        world.answer(200);
        assert!(world.attempts.is_empty());
        world.pass(Duration::from_millis(20));
    }
    assert_eq!(world.deleted.len(), 3);
    assert!(world.ends.iter().all(|(_, end)| *end == Replayed::Delivered));
}

#[test]
fn letters_take_half_of_the_deliveries_and_of_a_single_one_every_other() {
    let mut world = World::new(8);
    world.warm_up();
    (0..20).for_each(|i| world.ask(&format!("d{i}")));
    assert_eq!(world.attempts.len(), 4);
    (0..10).for_each(|i| world.live(&format!("live{i}")));
    assert_eq!(world.attempts.iter().filter(|attempt| attempt.replay).count(), 4);
    assert_eq!(world.attempts.len(), 8);
    let mut strict = World::new(1);
    strict.warm_up();
    (0..3).for_each(|i| strict.ask(&format!("d{i}")));
    (0..3).for_each(|i| strict.live(&format!("live{i}")));
    let order: Vec<String> = (0..6).map(|_| strict.answer(200)).collect();
    assert_eq!(order, ["d0", "live0", "d1", "live1", "d2", "live2"]);
}

#[test]
fn what_comes_of_a_letter_is_said_once() {
    let mut world = World::new(8);
    world.warm_up();
    world.ask("refused");
    world.answer(422);
    // Told at a newer revision by now.
    world.live("newer");
    world.answer(200);
    world.ask("newer");
    // Fails three times while it is alone.
    world.ask("fails");
    for _ in 0..3 {
        assert_eq!(world.answer(500), "fails");
        world.pass(Duration::from_secs(10));
    }
    let ends: Vec<&Replayed> = world.ends.iter().map(|(_, end)| end).collect();
    assert_eq!(ends, [&Replayed::Refused, &Replayed::Superseded(None), &Replayed::Failed]);
    assert!(world.deleted.is_empty() && world.dispatch.n_asked() == 0);
}

#[test]
fn an_endpoint_that_fails_at_one_letter_after_the_other_is_down_and_not_hammered() {
    let mut world = World::new(8);
    world.warm_up();
    (0..20).for_each(|i| world.ask(&format!("d{i}")));
    let mut n_answers = 0;
    while !world.attempts.is_empty() {
        world.answer(500);
        n_answers += 1;
    }
    assert!(world.dispatch.endpoint().is_down());
    assert!((5..=8).contains(&n_answers), "{n_answers}");
    // An outage says nothing about letters: all of them are delivered after it.
    world.now += Duration::from_secs(10);
    world.poll();
    assert_eq!(world.attempts.len(), 1, "a probe");
    while !world.attempts.is_empty() || world.dispatch.n_asked() > 0 {
        match world.attempts.is_empty() {
            true => world.pass(Duration::from_secs(5)),
            false => drop(world.answer(200)),
        }
    }
    assert_eq!(world.deleted.len(), 20);
}

#[test]
fn a_letter_whose_document_is_never_given_comes_to_an_end() {
    let mut world = World::new(8);
    world.warm_up();
    world.unreadable = true;
    world.ask("d0");
    assert_eq!(world.ends.len(), 1);
    assert_eq!(world.ends[0].1, Replayed::Unreadable("too large".into()));
    assert!(world.attempts.is_empty() && world.deleted.is_empty() && world.dispatch.n_asked() == 0);
}

#[test]
fn a_discarded_letter_is_sent_no_more() {
    let mut world = World::new(8);
    world.warm_up();
    world.dispatch.set_replay_pause(Duration::from_secs(1));
    (0..3).for_each(|i| world.ask(&format!("d{i}")));
    let gone: Vec<_> = (0..3).map(|i| event(&format!("d{i}"), "1-a").id).collect();
    world.dispatch.forget_letters(&gone);
    assert_eq!(world.answer(200), "d0", "what was in flight comes back");
    world.pass(Duration::from_secs(60));
    assert!(world.attempts.is_empty() && world.dispatch.n_asked() == 0);
}

const ALL: &str = "document.*";
const DONE: Option<LeafDocs> = Some(LeafDocs::Unread);

#[test]
fn a_conflict_is_stored_before_it_is_told_and_deleted_after_its_end_was() {
    let mut world = World::new(8);
    world.warm_up();
    world.row(leaves("a", ALL, "1-b", &[], &[]));
    let (plain, first) = world.tell();
    world.row(leaves("a", ALL, "1-b", &["1-a"], &[]));
    assert!(world.attempts.is_empty(), "not stored yet");
    assert_eq!(world.kept(DONE), Owed::Remember);
    let (conflicted, second) = world.tell();
    world.row(leaves("a", ALL, "1-b", &[], &["2-x"]));
    assert_eq!(world.attempts.len(), 1);
    assert!(world.keeps.is_empty(), "not told yet");
    let (resolved, third) = world.tell();
    assert_eq!(world.dispatch.n_pending(), 1, "not finished: it is still stored");
    assert_eq!(world.kept(DONE), Owed::Forget);
    assert_eq!(world.dispatch.n_pending(), 0);
    let told = [plain, conflicted, resolved];
    assert_eq!(told, ["document.updated", "document.conflicted", "document.resolved"]);
    assert!(third != first && third != second, "known ids are dropped by receivers");
    // The feed is read again: known, and nothing is told.
    world.row(leaves("a", ALL, "1-b", &[], &["2-x"]));
    assert!(world.attempts.is_empty() && world.dispatch.n_pending() == 0);
    // Another conflict with the same end is another end.
    world.row(leaves("a", ALL, "1-b", &["1-9"], &["2-x"]));
    world.kept(DONE);
    world.tell();
    world.row(leaves("a", ALL, "1-b", &[], &["2-x", "2-y"]));
    let (again, fourth) = world.tell();
    assert_eq!(again, "document.resolved");
    assert_ne!(fourth, third);
}

#[test]
fn what_cannot_be_stored_is_tried_again_and_told_once() {
    let mut world = World::new(8);
    world.warm_up();
    world.row(leaves("a", ALL, "1-b", &["1-a"], &[]));
    world.kept(None);
    assert!(world.attempts.is_empty() && world.keeps.is_empty());
    world.pass(STORE_AGAIN);
    world.kept(DONE);
    world.tell();
    world.row(leaves("a", ALL, "1-b", &[], &["2-x"]));
    world.tell();
    world.kept(None);
    world.pass(STORE_AGAIN);
    assert!(world.attempts.is_empty(), "it was told");
    assert_eq!(world.kept(DONE), Owed::Forget);
    assert_eq!(world.dispatch.n_pending(), 0);
}

#[test]
fn a_change_behind_a_resolution_that_is_in_flight_is_no_second_one() {
    let mut world = World::new(8);
    world.warm_up();
    world.row(leaves("a", ALL, "1-b", &["1-a"], &[]));
    world.kept(DONE);
    world.tell();
    world.row(leaves("a", ALL, "1-b", &[], &["2-x"]));
    world.row(leaves("a", ALL, "2-b", &[], &["2-x"]));
    assert_eq!(world.tell().0, "document.resolved");
    world.kept(DONE);
    assert_eq!(world.tell().0, "document.updated");
    // One that fails is replaced, and what replaces it is the end of the conflict.
    world.row(leaves("a", ALL, "2-b", &["1-c"], &["2-x"]));
    world.kept(DONE);
    world.tell();
    world.row(leaves("a", ALL, "2-b", &[], &["2-x", "2-z"]));
    world.row(leaves("a", ALL, "3-b", &[], &["2-x", "2-z"]));
    world.answer(500);
    world.pass(Duration::from_secs(10));
    assert_eq!(world.attempts[0].event.rev, "3-b");
    assert_eq!(world.tell().0, "document.resolved");
}

#[test]
fn a_conflict_that_is_not_wanted_is_known_all_the_same() {
    let mut world = World::new(8);
    world.warm_up();
    let only = "document.resolved";
    world.row(leaves("a", only, "1-b", &[], &[]));
    assert!(world.attempts.is_empty() && world.dispatch.n_pending() == 0);
    world.row(leaves("a", only, "1-b", &["1-a"], &[]));
    assert_eq!(world.dispatch.n_pending(), 1, "the checkpoint waits");
    world.kept(DONE);
    assert!(world.attempts.is_empty() && world.dispatch.n_pending() == 0);
    world.row(leaves("a", only, "1-b", &[], &["2-x"]));
    assert_eq!(world.tell().0, only);
}

#[test]
fn what_is_kept_stays_known_when_the_feed_is_opened_again() {
    let mut world = World::new(8);
    world.warm_up();
    world.row(leaves("a", ALL, "1-b", &["1-a"], &[]));
    world.kept(DONE);
    world.tell();
    world.open_anew(None);
    world.row(leaves("a", ALL, "1-b", &[], &["2-x"]));
    assert_eq!(world.tell().0, "document.resolved");
    assert_eq!(world.kept(DONE), Owed::Forget);
}

#[test]
fn the_end_of_a_conflict_is_told_though_a_letter_of_its_revision_is_in_flight() {
    for is_letter_of_the_end in [true, false] {
        let mut world = World::new(8);
        world.warm_up();
        let row = || leaves("a", ALL, "1-b", &[], &["2-x"]);
        let mut event = row().event.unwrap();
        world.open_anew(Some(vec![event.conflict_key().unwrap()]));
        if is_letter_of_the_end {
            event.resolve(event.conflict.as_ref().unwrap().resolved_id);
        }
        let letter = SuspectLetter { id: event.id, doc_id: "a".into(), resolved: None };
        world.found = Some(event);
        world.dispatch.ask_replay(FLOW, letter, Asked { even_if_superseded: false }, world.now);
        world.poll();
        assert!(world.attempts[0].replay);
        world.row(row());
        if !is_letter_of_the_end {
            assert_eq!(world.tell().0, "document.updated");
            assert!(world.keeps.is_empty(), "its end is not told yet");
        }
        assert_eq!(world.tell().0, "document.resolved");
        assert_eq!(world.kept(DONE), Owed::Forget);
        assert!(world.attempts.is_empty() && world.dispatch.n_pending() == 0);
    }
}

#[test]
fn leaves_that_were_read_are_in_the_body_and_are_counted() {
    let mut world = World::new(8);
    world.warm_up();
    world.row(leaves("a", ALL, "1-b", &["1-a"], &[]));
    let before = world.dispatch.bytes();
    world.kept(Some(LeafDocs::Json("[{\"n\":1.0}]".into())));
    assert_eq!(world.dispatch.bytes(), before + 11);
    let body = Telling { conflicts: true, ..telling() }.body(&world.attempts[0].event);
    let body = String::from_utf8(body).unwrap();
    assert!(body.contains(r#""conflicts":["1-a"],"conflict_docs":[{"n":1.0}]"#), "{body}");
    world.tell();
    assert_eq!(world.dispatch.bytes(), 0);
}

#[test]
fn one_of_those_that_rest_takes_no_more_than_its_share_of_the_window() {
    let mut world = World::new(8);
    world.dispatch.set_readings_max(4);
    let resting = || Flow::new(false, Duration::from_secs(60), Duration::from_secs(5)).resting();
    let [big, small] = [(); 2].map(|()| world.dispatch.add(resting()));
    let pages = |world: &mut World| {
        let mut actions = Vec::new();
        world.dispatch.poll(world.now, usize::MAX, 0.5, &mut || false, &mut actions);
        let pages = actions.into_iter().filter_map(|action| match action {
            Action::Read(flow, Read::Page { limit, .. }) => Some((flow, limit)),
            Action::Read(flow, Read::Open) => {
                let opened = Opened {
                    mark: "mark".into(),
                    checkpoint: None,
                    rev: None,
                    recreated: false,
                    doc_count: 0,
                    conflicted: None,
                };
                world.dispatch.on_opened(flow, opened);
                None
            }
            _ => None,
        });
        pages.collect::<Vec<_>>()
    };
    assert_eq!(pages(&mut world), []);
    let share = world.dispatch.endpoint().window() / SHARES;
    let first = pages(&mut world);
    assert_eq!(first.iter().map(|(flow, _)| *flow).collect::<Vec<_>>(), [big, small]);
    assert!(first.iter().all(|(_, limit)| (1..=share).contains(limit)), "{first:?}");
    // All of it waits for the endpoint.
    let seq = |n: usize| Seq::from_json(&n.to_string());
    let rows = |n: usize| Arrived { seq: seq(n), event: Some(event(&format!("d{n}"), "1-a")) };
    world.dispatch.on_rows(big, (1..=first[0].1).map(rows).collect(), world.now);
    world.dispatch.on_end(big, seq(first[0].1), None, false, world.now);
    world.dispatch.on_end(small, seq(1), None, false, world.now);
    while let Some((_, limit)) = pages(&mut world).into_iter().find(|(flow, _)| *flow == big) {
        let before = world.dispatch.flow(big).n_pending();
        assert!(before + limit <= share, "{before} wait, and {limit} more are read");
        world.dispatch.on_rows(big, (before + 1..=before + limit).map(rows).collect(), world.now);
        world.dispatch.on_end(big, seq(before + limit), None, false, world.now);
    }
    // The other has room for its own.
    world.dispatch.stir(small);
    let more = pages(&mut world);
    assert!(more.iter().any(|(flow, limit)| *flow == small && *limit > 0), "{more:?}");
}

#[test]
fn one_whose_letter_is_to_be_sent_again_is_not_let_go() {
    let mut world = World::new(8);
    world.dispatch.set_readings_max(4);
    let resting = Flow::new(false, Duration::from_secs(60), Duration::from_secs(5)).resting();
    let flow = world.dispatch.add(resting);
    let poll = |world: &mut World| {
        let mut actions = Vec::new();
        world.dispatch.poll(world.now, usize::MAX, 0.5, &mut || true, &mut actions);
        actions
    };
    let event = event("d", "1-a");
    let letter = SuspectLetter { id: event.id, doc_id: "d".into(), resolved: None };
    world.dispatch.ask_replay(flow, letter.clone(), Asked { even_if_superseded: false }, world.now);
    assert!(poll(&mut world).iter().any(|action| matches!(action, Action::Fetch(..))));
    let (checkpoint, rev) = (Some((Seq::zero(), Vec::new())), None);
    let opened =
        Opened { mark: "mark".into(), checkpoint, rev, recreated: false, doc_count: 0, conflicted: None };
    world.dispatch.on_opened(flow, opened);
    poll(&mut world);
    world.dispatch.on_end(flow, Some(Seq::zero()), None, false, world.now);
    let is_let_go = |actions: &[Action]| actions.iter().any(|one| matches!(one, Action::LetGo(_)));
    assert!(world.dispatch.flow(flow).is_at_rest());
    assert!(!is_let_go(&poll(&mut world)), "its place would be another database's when the letter is sent");
    world.dispatch.forget_letters(&[letter.id]);
    assert!(is_let_go(&poll(&mut world)));
}
