//! What follows an answer (DESIGN §6), rule by rule.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::pure::endpoint::{
    Class, DownReason, Endpoint, LetterClass, Moment, Notice, Outcome, Settings, Start, Trial, Verdict, class,
};
use crate::pure::rate::RateLimit;

const OK: Outcome = Outcome::Status { status: 200, retry_after: None };
const ERROR: Outcome = Outcome::Status { status: 500, retry_after: None };
const REFUSED: Outcome = Outcome::Status { status: 422, retry_after: None };
const GONE: Outcome = Outcome::Status { status: 410, retry_after: None };

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// An endpoint whose answers a test writes down; no jitter.
struct Rig {
    endpoint: Endpoint,
    now: Instant,
    trials: HashMap<&'static str, Trial>,
    next_token: u64,
}

fn settings(concurrency: usize) -> Settings {
    Settings {
        concurrency,
        retry_schedule: [1, 5, 15, 30, 60, 120, 300].map(seconds).to_vec(),
        retry_after_max: seconds(3600),
        dead_letter_after: 3,
        dead_letter_on: vec![400, 409, 411, 413, 414, 415, 422, 431, 501],
        delivered_on: &[],
        give_up_after: seconds(24 * 3600),
        rate_limit: None,
        batching: None,
    }
}

impl Rig {
    fn new(concurrency: usize) -> Rig {
        let now = crate::sys::now();
        let endpoint = Endpoint::new(settings(concurrency), now);
        Rig { endpoint, now, trials: HashMap::new(), next_token: 0 }
    }

    /// One that takes events already.
    fn up(concurrency: usize) -> Rig {
        let mut rig = Rig::new(concurrency);
        while rig.endpoint.n_delivered() < 6 {
            rig.get("warm-up", OK);
        }
        rig.endpoint.take_notices();
        rig
    }

    fn start(&mut self, event: &'static str) -> u64 {
        self.next_token += 1;
        let trial = self.trials.entry(event).or_default();
        self.endpoint.on_start(self.next_token, trial, self.now);
        self.next_token
    }

    fn end(&mut self, token: u64, event: &'static str, outcome: Outcome, alone: bool) -> Verdict {
        let trial = self.trials.get_mut(event).expect("it was started");
        let lane = event.bytes().fold(7, |hash: u64, byte| hash.wrapping_mul(31) + u64::from(byte));
        let at = Moment { now: self.now, jitter: 0.5 };
        let verdict = self.endpoint.on_outcome(token, trial, lane, outcome, alone, at);
        if matches!(verdict, Verdict::Delivered | Verdict::DeadLetter(_)) {
            self.trials.remove(event);
        }
        verdict
    }

    /// One attempt, with others unfinished beside it.
    fn get(&mut self, event: &'static str, outcome: Outcome) -> Verdict {
        let token = self.start(event);
        self.end(token, event, outcome, false)
    }

    fn get_alone(&mut self, event: &'static str, outcome: Outcome) -> Verdict {
        let token = self.start(event);
        self.end(token, event, outcome, true)
    }

    fn pass(&mut self, duration: Duration) {
        self.now += duration;
    }

    fn check_start(&self, expected: Start) {
        assert_eq!(self.endpoint.may_start(self.now), expected);
    }

    fn check_notices(&mut self, expected: &[Notice]) {
        assert_eq!(self.endpoint.take_notices(), expected);
    }

    /// In how many seconds a verdict has the event tried again.
    fn retry_in(&self, verdict: Verdict) -> u64 {
        match verdict {
            Verdict::RetryAt(at) | Verdict::LookUp(at) => (at - self.now).as_secs(),
            other => panic!("expected another try, got {other:?}"),
        }
    }
}

#[test]
fn the_status_says_whom_to_suspect() {
    let settings = settings(8);
    let check = |status, expected| {
        let outcome = Outcome::Status { status, retry_after: None };
        assert_eq!(class(outcome, &settings), expected, "{status}");
    };
    for status in [200, 201, 204, 299] {
        check(status, Class::Delivered);
    }
    for status in [301, 302, 304, 401, 403, 404, 405, 407, 408, 425, 429, 500, 502, 503, 504, 599] {
        check(status, Class::Endpoint);
    }
    for status in [400, 402, 406, 409, 411, 412, 413, 414, 415, 418, 422, 431, 451, 501] {
        check(status, Class::Event);
    }
    check(410, Class::Gone);
    for outcome in [Outcome::Unreachable, Outcome::Timeout, Outcome::Broken] {
        assert_eq!(class(outcome, &settings), Class::Endpoint);
    }
    let not_found = Outcome::Status { status: 404, retry_after: None };
    let listed = Settings { dead_letter_on: vec![404], ..settings.clone() };
    assert_eq!(class(not_found, &listed), Class::Event, "the operator's list counts first");
    let conflict = Outcome::Status { status: 409, retry_after: None };
    let couchdb = Settings { delivered_on: &[409], ..settings };
    assert_eq!(class(conflict, &couchdb), Class::Delivered, "it has the document already");
}

#[test]
fn a_start_is_one_probe_then_twice_as_many_at_each_success() {
    let mut rig = Rig::new(5);
    rig.check_start(Start::Probe);
    let probe = rig.start("a");
    rig.check_start(Start::No);
    rig.end(probe, "a", OK, false);
    for allowed in [2, 4, 5, 5] {
        let mut tokens = Vec::new();
        while rig.endpoint.may_start(rig.now) == Start::Go {
            tokens.push(rig.start("b"));
        }
        assert_eq!(tokens.len(), allowed);
        let last = tokens.pop().unwrap();
        for token in tokens {
            rig.endpoint.on_given_back(token);
        }
        rig.end(last, "b", OK, false);
    }
    rig.check_notices(&[]);
}

#[test]
fn it_is_down_after_five_failures_in_a_row_but_not_when_others_are_delivered_between() {
    let mut rig = Rig::up(8);
    for _ in 0..20 {
        rig.get("a", ERROR);
        rig.get("b", OK);
    }
    rig.check_start(Start::Go);
    for event in ["c", "d", "e", "f"] {
        rig.get(event, ERROR);
        rig.check_start(Start::Go);
    }
    rig.get("g", ERROR);
    rig.check_start(Start::No);
    rig.check_notices(&[Notice::Down(DownReason::Failing)]);
    rig.pass(seconds(1));
    rig.check_start(Start::Probe);
    assert!(rig.endpoint.window() <= 100, "nothing is read ahead while it is down");
}

#[test]
fn it_is_down_at_once_when_it_cannot_be_reached_and_up_with_the_first_delivery() {
    let mut rig = Rig::up(8);
    rig.get("a", Outcome::Unreachable);
    rig.check_notices(&[Notice::Down(DownReason::Unreachable)]);
    rig.check_start(Start::No);
    rig.pass(seconds(1));
    rig.get("a", OK);
    rig.check_notices(&[Notice::Up]);
    rig.check_start(Start::Go);
}

#[test]
fn after_an_outage_of_ten_hours_the_next_probe_comes_within_the_last_step() {
    let mut rig = Rig::up(8);
    rig.get("a", Outcome::Unreachable);
    let end = rig.now + seconds(10 * 3600);
    let mut probes = 0;
    while rig.now < end {
        rig.now = rig.endpoint.next_deadline().expect("a probe is always due some time");
        rig.check_start(Start::Probe);
        let verdict = rig.get("a", Outcome::Unreachable);
        assert!(rig.retry_in(verdict) <= 300);
        probes += 1;
    }
    assert!((120..140).contains(&probes), "{probes} probes in ten hours");
    // It recovers this very moment.
    let wait = rig.endpoint.next_deadline().unwrap() - rig.now;
    assert!(wait <= seconds(300), "{wait:?}");
    rig.now += wait;
    assert_eq!(rig.get("a", OK), Verdict::Delivered);
    rig.check_start(Start::Go);
}

#[test]
fn retry_after_holds_the_whole_endpoint_and_is_cut_at_its_limit() {
    let asked = |after| Outcome::Status { status: 503, retry_after: Some(after) };
    let mut rig = Rig::up(8);
    rig.get("a", asked(seconds(600)));
    rig.check_notices(&[Notice::Down(DownReason::RetryAfter)]);
    rig.pass(seconds(599));
    rig.check_start(Start::No);
    rig.pass(seconds(1));
    rig.check_start(Start::Probe);
    rig.get("b", asked(seconds(365 * 24 * 3600)));
    rig.pass(seconds(3600));
    rig.check_start(Start::Probe);
}

#[test]
fn a_refused_event_is_looked_up_once_then_tried_as_often_as_configured() {
    let mut rig = Rig::up(8);
    let first = rig.get("bad", REFUSED);
    assert!(matches!(first, Verdict::LookUp(_)) && rig.retry_in(first) == 1);
    rig.get("good", OK);
    let second = rig.get("bad", REFUSED);
    assert!(matches!(second, Verdict::RetryAt(_)) && rig.retry_in(second) == 5);
    assert_eq!(rig.get("bad", REFUSED), Verdict::DeadLetter(LetterClass::Refused));
    rig.check_start(Start::Go);
}

#[test]
fn ten_refusals_of_different_events_in_a_row_are_the_endpoints_own_fault() {
    let events = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    let mut rig = Rig::up(8);
    for event in events {
        assert!(!matches!(rig.get(event, REFUSED), Verdict::DeadLetter(_)));
    }
    rig.check_notices(&[Notice::Down(DownReason::RefusesEverything)]);
    for _ in 0..20 {
        for event in events {
            rig.now = rig.endpoint.next_deadline().unwrap().max(rig.now);
            let verdict = rig.get(event, REFUSED);
            assert!(matches!(verdict, Verdict::RetryAt(_)), "{verdict:?}");
            rig.check_start(Start::No);
        }
    }
    rig.pass(seconds(300));
    rig.get("0", OK);
    rig.check_notices(&[Notice::Up]);
    // That run does not count against anybody.
    assert!(matches!(rig.get("1", REFUSED), Verdict::LookUp(_) | Verdict::RetryAt(_)));
    rig.get("2", OK);
    assert!(matches!(rig.get("1", REFUSED), Verdict::RetryAt(_)));
    rig.get("3", OK);
    assert_eq!(rig.get("1", REFUSED), Verdict::DeadLetter(LetterClass::Refused));
}

#[test]
fn an_event_is_suspect_when_others_are_delivered_after_each_of_its_failures() {
    for failure in [ERROR, Outcome::Timeout, Outcome::Broken] {
        let mut rig = Rig::up(8);
        for _ in 0..3 {
            assert!(!matches!(rig.get("bad", failure), Verdict::DeadLetter(_)));
            assert!(!rig.endpoint.is_suspect(&rig.trials["bad"], false), "nobody bears witness yet");
            rig.get("good", OK);
        }
        assert!(rig.endpoint.is_suspect(&rig.trials["bad"], false));
    }
}

#[test]
fn an_event_is_not_suspect_when_nobody_is_delivered_or_nobody_can_be_reached() {
    let mut rig = Rig::up(8);
    rig.get("bad", ERROR);
    rig.get("good", OK);
    for _ in 0..10 {
        rig.get("bad", ERROR);
    }
    assert!(!rig.endpoint.is_suspect(&rig.trials["bad"], false), "two of its failures have no witness");
    let mut rig = Rig::up(8);
    for _ in 0..5 {
        rig.get("bad", Outcome::Unreachable);
        rig.get("good", OK);
    }
    assert!(!rig.endpoint.is_suspect(&rig.trials["bad"], false), "an outage is nobody's fault");
}

#[test]
fn the_last_event_left_is_suspect_when_all_others_passed_it_and_none_failed() {
    let mut rig = Rig::up(8);
    rig.get("bad", ERROR);
    rig.get("good", OK);
    rig.get("bad", ERROR);
    assert_eq!(rig.get_alone("bad", ERROR), Verdict::DeadLetter(LetterClass::Suspect));
    // All others may be through before it times out for the first time.
    let mut rig = Rig::up(8);
    let hanging = rig.start("hangs");
    rig.get("good", OK);
    rig.end(hanging, "hangs", Outcome::Timeout, true);
    rig.get_alone("hangs", Outcome::Timeout);
    assert_eq!(rig.get_alone("hangs", Outcome::Timeout), Verdict::DeadLetter(LetterClass::Suspect));
    // Alone from its first attempt on: that may be an outage.
    let mut rig = Rig::up(8);
    for _ in 0..20 {
        let verdict = rig.get_alone("bad", ERROR);
        assert!(!matches!(verdict, Verdict::DeadLetter(_)), "{verdict:?}");
    }
    // Another one first failed after the last delivery: that may be an outage as well.
    let mut rig = Rig::up(8);
    rig.get("bad", ERROR);
    rig.get("good", OK);
    for _ in 0..3 {
        rig.get("bad", ERROR);
        rig.get("other", ERROR);
    }
    assert!(rig.endpoint.is_left_over(&rig.trials["bad"]));
    assert!(!rig.endpoint.is_left_over(&rig.trials["other"]), "so `bad` is not tried as the last one left");
}

#[test]
fn more_than_twenty_suspects_are_the_endpoints_own_fault() {
    let mut rig = Rig::up(8);
    let at = Moment { now: rig.now, jitter: 0.5 };
    for _ in 0..20 {
        let verdict = rig.endpoint.suspect(&Trial::default(), at);
        assert_eq!(verdict, Verdict::DeadLetter(LetterClass::Suspect));
    }
    assert!(matches!(rig.endpoint.suspect(&Trial::default(), at), Verdict::RetryAt(_)));
    rig.check_notices(&[Notice::Down(DownReason::TooManySuspects)]);
}

#[test]
fn gone_is_believed_when_two_events_hear_it_or_one_hears_it_again_after_a_minute() {
    let mut rig = Rig::up(8);
    rig.get("a", GONE);
    rig.check_notices(&[Notice::Down(DownReason::MaybeGone)]);
    rig.get("a", GONE);
    assert!(!rig.endpoint.is_gone(), "the same one, at once");
    rig.get("b", GONE);
    assert!(rig.endpoint.is_gone());
    rig.check_notices(&[Notice::Gone]);
    rig.pass(seconds(100_000));
    rig.check_start(Start::No);
    assert_eq!(rig.endpoint.next_deadline(), None);

    let mut rig = Rig::up(8);
    rig.get("a", GONE);
    let mut tries = 0;
    while !rig.endpoint.is_gone() {
        rig.now = rig.endpoint.next_deadline().unwrap();
        rig.get("a", GONE);
        tries += 1;
    }
    assert!(tries > 1 && tries < 10, "{tries}");

    let mut rig = Rig::up(8);
    rig.get("a", GONE);
    rig.get("b", OK);
    rig.get("c", GONE);
    assert!(!rig.endpoint.is_gone(), "it took one between");
}

#[test]
fn one_event_that_hears_gone_while_others_are_taken_is_suspect() {
    let mut rig = Rig::up(8);
    for _ in 0..3 {
        assert!(!rig.endpoint.is_suspect(&rig.trials.get("bad").copied().unwrap_or_default(), false));
        rig.get("bad", GONE);
        rig.get("good", OK);
        rig.pass(seconds(300));
    }
    assert!(!rig.endpoint.is_gone());
    assert!(rig.endpoint.is_suspect(&rig.trials["bad"], false), "it would hold the position for ever");
}

#[test]
fn an_outage_starts_the_day_after_which_an_event_is_given_up_anew() {
    let mut rig = Rig::up(1);
    rig.get_alone("next", ERROR);
    for _ in 0..1_000 {
        rig.pass(seconds(300));
        rig.get_alone("next", Outcome::Unreachable);
    }
    // It is being started, and says so.
    let verdict = rig.get_alone("next", ERROR);
    assert!(!matches!(verdict, Verdict::DeadLetter(_)), "{verdict:?}");
}

#[test]
fn in_strict_order_an_event_is_given_up_only_after_a_day_of_answers() {
    let mut rig = Rig::up(1);
    let began = rig.now;
    loop {
        let verdict = rig.get_alone("bad", ERROR);
        if verdict == Verdict::DeadLetter(LetterClass::GaveUp) {
            break;
        }
        rig.now += seconds(rig.retry_in(verdict).max(1));
    }
    let held_up = rig.now - began;
    assert!(held_up >= seconds(24 * 3600) && held_up < seconds(25 * 3600), "{held_up:?}");
    let mut rig = Rig::up(1);
    for _ in 0..1_000 {
        let verdict = rig.get_alone("bad", Outcome::Unreachable);
        assert!(!matches!(verdict, Verdict::DeadLetter(_)), "nobody answered");
        rig.now += seconds(300);
    }
}

#[test]
fn those_still_in_flight_when_it_went_down_do_not_set_the_pace() {
    let mut rig = Rig::up(8);
    let tokens: Vec<u64> = ["a", "b", "c", "d"].map(|event| rig.start(event)).to_vec();
    rig.get("x", Outcome::Unreachable);
    let due = rig.endpoint.next_deadline();
    for (token, event) in tokens.into_iter().zip(["a", "b", "c", "d"]) {
        rig.end(token, event, Outcome::Unreachable, false);
    }
    assert_eq!(rig.endpoint.next_deadline(), due);
    // One of them that got through after all says more than the one that did not.
    let mut rig = Rig::up(8);
    let late = rig.start("late");
    rig.get("x", Outcome::Unreachable);
    rig.end(late, "late", OK, false);
    rig.check_start(Start::Go);
}

#[test]
fn a_rate_limit_holds_probes_and_retries_too_and_says_until_when() {
    let mut rig = Rig::new(8);
    let limit = RateLimit { n: 30, per: seconds(60) };
    rig.endpoint = Endpoint::new(Settings { rate_limit: Some(limit), ..settings(8) }, rig.now);
    rig.get("a", Outcome::Unreachable);
    // The schedule would probe after a second; the limit says two.
    assert_eq!(rig.endpoint.next_deadline(), Some(rig.now + seconds(2)));
    rig.pass(seconds(1));
    rig.endpoint.on_time(rig.now);
    rig.check_start(Start::No);
    rig.pass(seconds(1));
    rig.endpoint.on_time(rig.now);
    rig.check_start(Start::Probe);
    rig.get("a", OK);
    rig.check_start(Start::No);
    assert!(!rig.endpoint.has_free_delivery(), "it is up, and the limit holds");
    assert_eq!(rig.endpoint.next_deadline(), Some(rig.now + seconds(2)), "a time to wait for, no busy loop");
    rig.pass(seconds(2));
    rig.endpoint.on_time(rig.now);
    rig.check_start(Start::Go);
    assert_eq!(rig.endpoint.next_deadline(), None);
}
