//! Letters that an operator sends again: their pace, their share, and what comes of each.

use super::*;
use crate::pure::changes::{Row, RowDoc};
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
}

fn event(doc_id: &str, rev: &str) -> Event {
    let telling = Telling {
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
    };
    let row = Row {
        seq: None,
        id: doc_id.into(),
        revs: vec![rev.into()],
        deleted: false,
        doc: RowDoc::Absent,
        line: None,
    };
    telling.arrived(row, "mark", jiff::Timestamp::UNIX_EPOCH).event.unwrap()
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
        let mut world = World { dispatch, now, attempts, ends, deleted, unreadable: false };
        world.poll();
        let opened = Opened {
            mark: "mark".into(),
            checkpoint: None,
            rev: None,
            recreated: false,
            doc_count: 0,
            conflicted: None,
        };
        world.dispatch.on_opened(FLOW, opened);
        world.poll();
        world
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
                            false => Fetched::Event(event(&letter.doc_id, "1-a")),
                        };
                        self.dispatch.on_fetched(&letter, found, self.now);
                    }
                    Action::Replayed(id, end) => self.ends.push((id, end)),
                    Action::DeleteLetter(id) => self.deleted.push(id),
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
