//! One webhook's endpoint: whether to knock, and whom to suspect when it does not open.
//!
//! Shared by all subscriptions of the webhook. The status of an answer is the first guess, what other events
//! got decides (DESIGN §6). Knows nothing of feeds and positions.
//!
//! ```text
//!            start                    endpoint-class x5, unreachable, Retry-After, 10 refusals
//!              |                  .-----------------------------------------------------------.
//!              v                  |                                                           v
//!            Down --- a delivery, or an answer that is not endpoint-class ---> Up: 1, 2, 4 .. concurrency
//!              |  one probe at a time, by the schedule's pace
//!              '--- 410 from two events, or twice in a minute ---> Gone
//! ```

use std::time::{Duration, Instant};

use crate::pure::dispatch::batches::Batching;
use crate::pure::rate::{Bucket, RateLimit};
use crate::pure::retry;

/// Unfinished events a webhook may hold, over all its databases.
pub const WINDOW_EVENTS: usize = 1_000;
/// And while the endpoint is down: enough lanes for probes to take turns, and no queue that grows with it.
const WINDOW_EVENTS_DOWN: usize = 100;
/// Endpoint-class answers in a row, with no delivery between them, that mean it is down.
const FAILURES_DOWN: u32 = 5;
/// Refusals of different documents in a row, with no delivery between them, that mean it is the endpoint.
const REFUSALS_DOWN: usize = 10;
/// Suspects at a time above which it is the endpoint after all.
pub const SUSPECTS_MAX: usize = 20;
/// A 410 from the same event counts as a second one after this time.
const GONE_AGAIN: Duration = Duration::from_secs(60);

/// What of a webhook's configuration decides here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Deliveries in flight; 1 = strict order.
    pub concurrency: usize,
    /// Steps between tries; the last repeats.
    pub retry_schedule: Vec<Duration>,
    /// The longest `Retry-After` that is believed.
    pub retry_after_max: Duration,
    /// Tries of a refused event; strikes of a suspect one.
    pub dead_letter_after: u32,
    /// Statuses that suspect the event.
    pub dead_letter_on: Vec<u16>,
    /// Statuses beside 2xx that mean delivered.
    pub delivered_on: &'static [u16],
    /// With `concurrency = 1`: how long one event may hold up the others.
    pub give_up_after: Duration,
    /// Attempts in a time, probes and retries among them.
    pub rate_limit: Option<RateLimit>,
    /// Several events in one request; `None`: never.
    pub batching: Option<Batching>,
}

/// The time of an input, and a number in `0.0..1.0` to spread what follows from it.
#[derive(Debug, Clone, Copy)]
pub struct Moment {
    /// Monotonic.
    pub now: Instant,
    /// Spreads retries.
    pub jitter: f64,
}

/// What came of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// An answer. `retry_after` is relative to now, uncut.
    Status {
        /// HTTP status.
        status: u16,
        /// What the answer asked for.
        retry_after: Option<Duration>,
    },
    /// No connection: refused, no route, DNS, TLS.
    Unreachable,
    /// Nothing, or not all of it, in time.
    Timeout,
    /// The connection broke before an answer was complete, or it was no HTTP.
    Broken,
}

/// Whom a single answer suspects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// 2xx.
    Delivered,
    /// The endpoint.
    Endpoint,
    /// The event.
    Event,
    /// 410.
    Gone,
}

/// Sorts an answer by the table of DESIGN §6.
pub fn class(outcome: Outcome, settings: &Settings) -> Class {
    let Outcome::Status { status, .. } = outcome else { return Class::Endpoint };
    match status {
        200..=299 => Class::Delivered,
        _ if settings.delivered_on.contains(&status) => Class::Delivered,
        410 => Class::Gone,
        _ if settings.dead_letter_on.contains(&status) => Class::Event,
        401 | 403 | 404 | 405 | 407 | 408 | 425 | 429 => Class::Endpoint,
        400..=499 => Class::Event,
        _ => Class::Endpoint,
    }
}

/// What one event has been through; lives with the event, kept by [`Endpoint`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Trial {
    /// Attempts so far, for `hookd-attempt`.
    pub attempts: u32,
    /// Failures in a row of any kind, for the schedule.
    failures: u32,
    /// Refusals that count, and in which run of the endpoint they were given.
    refusals: u32,
    refusal_run: u64,
    /// Endpoint-class answers and timeouts that had a delivery of another event between them.
    strikes: u32,
    /// Deliveries of the endpoint when the latest attempt started, at the latest strike, and when the attempt
    /// started that was the first strike.
    delivered_at_start: u64,
    delivered_at_strike: u64,
    delivered_at_first: u64,
    /// Endpoint-class answers and timeouts, with or without a delivery between them.
    own_failures: u32,
    /// First endpoint-class answer of an endpoint that does answer.
    answered_since: Option<Instant>,
    /// Whether its dead letter was looked for.
    looked_up: bool,
    /// An answer blamed it, perhaps: it goes into no batch.
    alone: bool,
}

/// Why a dead letter was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LetterClass {
    /// The endpoint refused this event while it took others.
    Refused,
    /// The endpoint failed at this event while it took others; replayed by the daemon itself.
    Suspect,
    /// `concurrency = 1`: it held up the others for `give_up_after`.
    GaveUp,
}

impl LetterClass {
    /// The word in the stored document.
    pub fn as_str(self) -> &'static str {
        match self {
            LetterClass::Refused => "refused",
            LetterClass::Suspect => "suspect",
            LetterClass::GaveUp => "given_up",
        }
    }
}

/// What follows for the event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Done.
    Delivered,
    /// Its lane waits until then.
    RetryAt(Instant),
    /// See whether it has a dead letter already (then it is finished), else wait until then.
    LookUp(Instant),
    /// Store a dead letter, then it is finished.
    DeadLetter(LetterClass),
}

/// What follows for the events of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchVerdict {
    /// Done, all of them.
    Delivered,
    /// Refused: each is sent again at once, alone.
    Apart,
    /// The endpoint's fault, it seems: each is tried again by the schedule. `alone`: it may have been one of them.
    Retry {
        /// Whether they go into no further batch.
        alone: bool,
        /// What the answer asked for.
        not_before: Option<Instant>,
    },
}

/// Whether a delivery may start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Yes, the next one in order.
    Go,
    /// One, of another lane than the last while there is one.
    Probe,
    /// Not now.
    No,
}

/// What changed about the endpoint, to be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// It is down; why.
    Down(DownReason),
    /// It takes events again.
    Up,
    /// It answered 410 and that is believed.
    Gone,
}

/// Why an endpoint is taken to be down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DownReason {
    /// No connection.
    Unreachable,
    /// It asked to be left alone.
    RetryAfter,
    /// Five failures in a row.
    Failing,
    /// Ten different events refused in a row.
    RefusesEverything,
    /// More suspects than can be believed.
    TooManySuspects,
    /// One 410, not yet believed.
    MaybeGone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Deliveries in flight that are allowed now.
    Up { allowed: usize },
    /// `needs_delivery`: only a 2xx ends it.
    Down { probes_failed: u32, probe_at: Instant, probing: Option<u64>, needs_delivery: bool },
    /// For good, until somebody says otherwise.
    Gone,
}

/// The machine.
#[derive(Debug)]
pub struct Endpoint {
    settings: Settings,
    state: State,
    in_flight: usize,
    n_delivered: u64,
    failed_in_a_row: u32,
    /// Lanes refused since the last delivery, different ones.
    refused: Vec<u64>,
    refusal_run: u64,
    /// `Retry-After`: nothing goes out before, whatever comes of what was in flight when it was said.
    hold_until: Option<Instant>,
    /// `rate_limit`, and until when it lets nothing out.
    bucket: Option<Bucket>,
    rate_until: Option<Instant>,
    /// Lane and time of the first 410.
    gone_seen: Option<(u64, Instant)>,
    n_suspects: usize,
    notices: Vec<Notice>,
    /// Whether anything was ever heard: the state before is "not known", not "down".
    proven: bool,
}

impl Endpoint {
    /// A start counts as down: one delivery first, at once.
    pub fn new(settings: Settings, now: Instant) -> Endpoint {
        Endpoint {
            bucket: settings.rate_limit.map(Bucket::new),
            rate_until: None,
            settings,
            state: State::Down { probes_failed: 0, probe_at: now, probing: None, needs_delivery: false },
            in_flight: 0,
            n_delivered: 0,
            failed_in_a_row: 0,
            refused: Vec::new(),
            refusal_run: 0,
            hold_until: None,
            gone_seen: None,
            n_suspects: 0,
            notices: Vec::new(),
            proven: false,
        }
    }

    /// Unfinished events the webhook may hold now.
    pub fn window(&self) -> usize {
        match self.state {
            State::Up { .. } => WINDOW_EVENTS,
            State::Down { .. } => WINDOW_EVENTS_DOWN,
            State::Gone => 0,
        }
    }

    /// Whether deliveries keep the order of arrival over all documents.
    pub fn is_strict(&self) -> bool {
        self.settings.concurrency == 1
    }

    /// Whether 410 was believed.
    pub fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Whether it is known to be down, as opposed to up or not yet asked.
    pub fn is_down(&self) -> bool {
        matches!(self.state, State::Down { .. }) && self.proven
    }

    /// Whether it takes deliveries in order of arrival.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// Whether it takes deliveries in order of arrival, and one more now.
    pub fn has_free_delivery(&self) -> bool {
        self.hold_until.is_none()
            && self.rate_until.is_none()
            && matches!(self.state, State::Up { allowed } if self.in_flight < allowed)
    }

    /// Whether an answer means that it was delivered.
    pub fn is_delivered(&self, outcome: Outcome) -> bool {
        class(outcome, &self.settings) == Class::Delivered
    }

    /// Deliveries in flight.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight
    }

    /// Deliveries so far.
    pub fn n_delivered(&self) -> u64 {
        self.n_delivered
    }

    /// Suspect dead letters not yet delivered or given up; set when known from the store, too.
    pub fn set_n_suspects(&mut self, n: usize) {
        self.n_suspects = n;
    }

    /// What changed since the last call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Time passed: what `Retry-After` asked for may be over.
    pub fn on_time(&mut self, now: Instant) {
        self.hold_until = self.hold_until.filter(|until| now < *until);
        self.rate_until = self.rate_until.filter(|until| now < *until);
    }

    /// Whether a delivery may start at `now`.
    pub fn may_start(&self, now: Instant) -> Start {
        if self.hold_until.max(self.rate_until).is_some_and(|until| now < until) {
            return Start::No;
        }
        match self.state {
            State::Up { allowed } if self.in_flight < allowed => Start::Go,
            State::Down { probe_at, probing: None, .. } if probe_at <= now => Start::Probe,
            State::Up { .. } | State::Down { .. } | State::Gone => Start::No,
        }
    }

    /// When `may_start` changes by time alone.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.state {
            State::Up { .. } => self.hold_until.max(self.rate_until),
            State::Down { probe_at, probing: None, .. } => {
                Some(probe_at).max(self.hold_until).max(self.rate_until)
            }
            State::Down { .. } | State::Gone => None,
        }
    }

    /// A delivery started; `token` names it.
    pub fn on_start(&mut self, token: u64, trial: &mut Trial, now: Instant) {
        trial.attempts += 1;
        trial.delivered_at_start = self.n_delivered;
        self.in_flight += 1;
        if let Some(bucket) = &mut self.bucket {
            bucket.take(now);
            self.rate_until = bucket.next_at().filter(|until| now < *until);
        }
        if let State::Down { probing, .. } = &mut self.state {
            *probing = Some(token);
        }
    }

    /// A delivery was given back without an outcome (we are being stopped).
    pub fn on_given_back(&mut self, token: u64) {
        self.in_flight -= 1;
        if let State::Down { probing, .. } = &mut self.state
            && *probing == Some(token)
        {
            *probing = None;
        }
    }

    /// Judges what came of a delivery. `lane` names its document over all databases; `left`: every other
    /// unfinished event of this webhook is a left-over, so that no other can bear witness.
    pub fn on_outcome(
        &mut self,
        token: u64,
        trial: &mut Trial,
        lane: u64,
        outcome: Outcome,
        left: bool,
        at: Moment,
    ) -> Verdict {
        self.in_flight -= 1;
        let was_probe = match &mut self.state {
            State::Down { probing, .. } if *probing == Some(token) => {
                *probing = None;
                true
            }
            State::Up { .. } | State::Down { .. } | State::Gone => false,
        };
        let class = class(outcome, &self.settings);
        if class != Class::Delivered {
            trial.failures += 1;
            trial.alone |= class != Class::Endpoint || self.may_be_the_events(outcome);
        }
        match class {
            Class::Delivered => self.on_delivered(),
            Class::Event => self.on_refused(trial, lane, was_probe, at),
            Class::Gone => self.on_gone(trial, lane, was_probe, at),
            Class::Endpoint => self.on_failed(trial, outcome, was_probe, left, at),
        }
    }

    /// An event goes out in a batch that was started.
    pub fn join(&self, trial: &mut Trial) {
        trial.attempts += 1;
        trial.delivered_at_start = self.n_delivered;
    }

    /// Judges what came of a batch of `n_events`. It says nothing about a single one of them: no refusal, no strike is
    /// counted, the endpoint alone is judged. `lane` names the first of its documents.
    pub fn on_batch_outcome(
        &mut self,
        lane: u64,
        n_events: u64,
        outcome: Outcome,
        at: Moment,
    ) -> BatchVerdict {
        self.in_flight -= 1;
        // Of nobody: whatever is held against it is forgotten with it.
        let mut nobody = Trial::default();
        match class(outcome, &self.settings) {
            Class::Delivered => {
                self.on_delivered();
                self.n_delivered += n_events - 1;
                BatchVerdict::Delivered
            }
            Class::Event => {
                self.on_answer();
                BatchVerdict::Apart
            }
            Class::Gone => {
                self.on_gone(&mut nobody, lane, false, at);
                BatchVerdict::Retry { alone: true, not_before: None }
            }
            Class::Endpoint => {
                self.on_failed(&mut nobody, outcome, false, false, at);
                let not_before = self.not_before(outcome, at);
                BatchVerdict::Retry { alone: self.may_be_the_events(outcome), not_before }
            }
        }
    }

    /// What a batch's verdict means for one of its events: when it is tried again.
    pub fn part(&self, verdict: BatchVerdict, trial: &mut Trial, at: Moment) -> Instant {
        match verdict {
            BatchVerdict::Delivered | BatchVerdict::Apart => {
                trial.alone = true;
                at.now
            }
            BatchVerdict::Retry { alone, not_before } => {
                trial.alone |= alone;
                trial.failures += 1;
                self.retry_at(trial, not_before, at)
            }
        }
    }

    /// Whether an endpoint-class answer may be an event's fault: not where nobody answered, or asked for time.
    fn may_be_the_events(&self, outcome: Outcome) -> bool {
        !matches!(outcome, Outcome::Unreachable | Outcome::Status { retry_after: Some(_), .. })
    }

    /// Until when an answer asks to be left alone.
    fn not_before(&self, outcome: Outcome, at: Moment) -> Option<Instant> {
        let Outcome::Status { retry_after, .. } = outcome else { return None };
        retry_after.map(|after| at.now + after.min(self.settings.retry_after_max))
    }

    /// What came of a dead letter that was sent again. The failure of a suspect says nothing new about the endpoint,
    /// unless that cannot be reached; with `asked` (an operator believes that it is taken now) an endpoint-class
    /// answer does. A refusal never does: it is known to refuse this one.
    pub fn on_replay_outcome(&mut self, token: u64, outcome: Outcome, asked: bool, at: Moment) -> Class {
        let was_probe = matches!(self.state, State::Down { probing, .. } if probing == Some(token));
        self.on_given_back(token);
        let class = class(outcome, &self.settings);
        if class == Class::Delivered {
            self.on_delivered();
            return class;
        }
        let retry_after = match outcome {
            Outcome::Status { retry_after: Some(after), .. } if asked && class == Class::Endpoint => {
                Some(at.now + after.min(self.settings.retry_after_max))
            }
            _ => None,
        };
        self.hold_until = self.hold_until.max(retry_after);
        let reason = if outcome == Outcome::Unreachable {
            DownReason::Unreachable
        } else if retry_after.is_some() {
            DownReason::RetryAfter
        } else if asked && matches!(class, Class::Endpoint | Class::Gone) {
            self.failed_in_a_row += 1;
            if self.is_up() && self.failed_in_a_row < FAILURES_DOWN {
                return class;
            }
            DownReason::Failing
        } else {
            return class;
        };
        match self.state {
            State::Up { .. } => self.go_down(reason, retry_after, false, at),
            State::Down { .. } => self.probe_failed(was_probe, reason, retry_after, at),
            State::Gone => {}
        }
        class
    }

    /// Deliveries in flight at most, as configured.
    pub fn concurrency(&self) -> usize {
        self.settings.concurrency
    }

    /// Endpoint-class answers that an event may get while others are delivered.
    pub fn strikes_max(&self) -> u32 {
        self.settings.dead_letter_after
    }

    fn on_delivered(&mut self) -> Verdict {
        self.n_delivered += 1;
        self.failed_in_a_row = 0;
        self.refused.clear();
        self.gone_seen = None;
        let allowed = match self.state {
            State::Up { allowed } => allowed * 2,
            State::Down { .. } => {
                self.say_up();
                2
            }
            // Somebody else's delivery cannot undo what two 410s said.
            State::Gone => return Verdict::Delivered,
        };
        self.proven = true;
        self.state = State::Up { allowed: allowed.min(self.settings.concurrency) };
        Verdict::Delivered
    }

    fn say_up(&mut self) {
        if self.is_down() {
            self.notices.push(Notice::Up);
        }
    }

    /// It answers, so it is up; how it takes other events is not known yet. `false`: only a delivery would show that.
    fn on_answer(&mut self) -> bool {
        match self.state {
            State::Down { needs_delivery: true, .. } => return false,
            State::Down { .. } => {
                self.say_up();
                self.proven = true;
                self.state = State::Up { allowed: 1 };
            }
            State::Up { .. } | State::Gone => {}
        }
        self.failed_in_a_row = 0;
        true
    }

    fn on_refused(&mut self, trial: &mut Trial, lane: u64, was_probe: bool, at: Moment) -> Verdict {
        if !self.on_answer() {
            self.probe_failed(was_probe, DownReason::RefusesEverything, None, at);
            return Verdict::RetryAt(self.retry_at(trial, None, at));
        }
        if !self.refused.contains(&lane) {
            self.refused.push(lane);
        }
        if self.refused.len() >= REFUSALS_DOWN {
            // That run counts as undelivered: nobody's refusals in it say anything about the event.
            self.refused.clear();
            self.refusal_run += 1;
            self.go_down(DownReason::RefusesEverything, None, true, at);
            return Verdict::RetryAt(self.retry_at(trial, None, at));
        }
        if trial.refusal_run != self.refusal_run {
            trial.refusal_run = self.refusal_run;
            trial.refusals = 0;
        }
        trial.refusals += 1;
        if trial.refusals >= self.settings.dead_letter_after {
            return Verdict::DeadLetter(LetterClass::Refused);
        }
        self.look_up_first(trial, None, at)
    }

    fn on_gone(&mut self, trial: &mut Trial, lane: u64, was_probe: bool, at: Moment) -> Verdict {
        // To one event again and again, while others are taken: then it is the event. It would hold the position
        // for ever, because each delivery between shows that the endpoint is not gone.
        self.strike(trial);
        match self.gone_seen {
            _ if self.is_gone() => {}
            Some((first, first_at)) if first != lane || at.now >= first_at + GONE_AGAIN => {
                self.state = State::Gone;
                self.notices.push(Notice::Gone);
            }
            Some(_) => self.probe_failed(was_probe, DownReason::MaybeGone, None, at),
            None => {
                self.gone_seen = Some((lane, at.now));
                self.go_down(DownReason::MaybeGone, None, true, at);
            }
        }
        if let State::Down { probe_at, .. } = &mut self.state {
            // Soon enough to know within a minute, whatever the schedule says.
            *probe_at = (*probe_at).min(at.now + GONE_AGAIN);
        }
        Verdict::RetryAt(self.retry_at(trial, None, at))
    }

    fn on_failed(
        &mut self,
        trial: &mut Trial,
        outcome: Outcome,
        was_probe: bool,
        left: bool,
        at: Moment,
    ) -> Verdict {
        let retry_after = self.not_before(outcome, at);
        self.hold_until = self.hold_until.max(retry_after);
        let unreachable = outcome == Outcome::Unreachable;
        if unreachable {
            // Only an endpoint that does answer has had its time (`give_up_after`): an outage starts it anew.
            trial.answered_since = None;
        } else {
            self.strike(trial);
            trial.answered_since.get_or_insert(at.now);
        }
        self.failed_in_a_row += 1;
        let reason = if unreachable {
            Some(DownReason::Unreachable)
        } else if retry_after.is_some() {
            Some(DownReason::RetryAfter)
        } else if self.failed_in_a_row >= FAILURES_DOWN {
            Some(DownReason::Failing)
        } else {
            None
        };
        match self.state {
            State::Down { .. } => {
                let reason = reason.unwrap_or(DownReason::Failing);
                self.probe_failed(was_probe, reason, retry_after, at);
            }
            State::Up { .. } => {
                if let Some(reason) = reason {
                    self.go_down(reason, retry_after, false, at);
                }
            }
            State::Gone => {}
        }
        if !unreachable && retry_after.is_none() {
            if self.is_strict() {
                let held_up = trial.answered_since.map_or(Duration::ZERO, |since| at.now - since);
                if held_up >= self.settings.give_up_after {
                    return Verdict::DeadLetter(LetterClass::GaveUp);
                }
            }
            if self.is_suspect(trial, left) {
                return self.suspect(trial, at);
            }
            return self.look_up_first(trial, retry_after, at);
        }
        Verdict::RetryAt(self.retry_at(trial, retry_after, at))
    }

    /// Counts an endpoint-class answer against the event, when another was delivered since the last one.
    fn strike(&mut self, trial: &mut Trial) {
        if trial.strikes == 0 {
            trial.strikes = 1;
            // Those delivered while this one hung bear witness, too.
            trial.delivered_at_first = trial.delivered_at_start;
            trial.own_failures = 0;
        } else if self.n_delivered > trial.delivered_at_strike {
            trial.strikes += 1;
        }
        trial.own_failures += 1;
        trial.delivered_at_strike = self.n_delivered;
    }

    /// Whether other events bear witness against this one: each of its strikes was followed by a delivery of
    /// another event; or only such are `left` as were passed by others, and failed as often. (A finite load ends
    /// before three strikes can each be followed by a delivery.)
    pub fn is_suspect(&self, trial: &Trial, left: bool) -> bool {
        if trial.strikes == 0 || self.is_gone() {
            return false;
        }
        let followed =
            trial.strikes >= self.settings.dead_letter_after && self.n_delivered > trial.delivered_at_strike;
        (followed && self.is_up()) || (left && !self.is_strict() && self.is_left_over(trial))
    }

    /// Whether an event failed often enough, and others were delivered since it first did. In an outage there are
    /// events that failed for the first time after the last delivery.
    pub fn is_left_over(&self, trial: &Trial) -> bool {
        trial.strikes > 0
            && trial.own_failures >= self.settings.dead_letter_after
            && self.n_delivered > trial.delivered_at_first
    }

    /// The verdict for a suspect: a letter, unless there are too many to believe.
    pub fn suspect(&mut self, trial: &Trial, at: Moment) -> Verdict {
        if self.n_suspects >= SUSPECTS_MAX {
            if matches!(self.state, State::Up { .. }) {
                self.go_down(DownReason::TooManySuspects, None, false, at);
            }
            return Verdict::RetryAt(self.retry_at(trial, None, at));
        }
        self.n_suspects += 1;
        Verdict::DeadLetter(LetterClass::Suspect)
    }

    fn look_up_first(&self, trial: &mut Trial, not_before: Option<Instant>, at: Moment) -> Verdict {
        let retry_at = self.retry_at(trial, not_before, at);
        let asked = std::mem::replace(&mut trial.looked_up, true);
        if asked { Verdict::RetryAt(retry_at) } else { Verdict::LookUp(retry_at) }
    }

    fn retry_at(&self, trial: &Trial, not_before: Option<Instant>, at: Moment) -> Instant {
        retry::next_try(&self.settings.retry_schedule, trial.failures, not_before, at.now, at.jitter)
    }

    fn go_down(&mut self, reason: DownReason, not_before: Option<Instant>, needs_delivery: bool, at: Moment) {
        if !self.is_down() {
            self.notices.push(Notice::Down(reason));
        }
        self.proven = true;
        let probe_at = retry::next_try(&self.settings.retry_schedule, 1, not_before, at.now, at.jitter);
        self.state = State::Down { probes_failed: 1, probe_at, probing: None, needs_delivery };
    }

    /// A failure while down: only the probe's own sets the pace, those still in flight from before do not.
    fn probe_failed(&mut self, was_probe: bool, reason: DownReason, not_before: Option<Instant>, at: Moment) {
        let State::Down { probes_failed, probe_at, .. } = &mut self.state else { return };
        if was_probe {
            *probes_failed += 1;
            *probe_at =
                retry::next_try(&self.settings.retry_schedule, *probes_failed, not_before, at.now, at.jitter);
            if !self.proven {
                self.proven = true;
                self.notices.push(Notice::Down(reason));
            }
        } else if let Some(not_before) = not_before {
            *probe_at = (*probe_at).max(not_before);
        }
    }
}

/// A new revision of the document came while its lane waited: what the old one went through says nothing about
/// the new one, but the pace stays.
impl Trial {
    /// The trial of the revision that takes the place of this one's.
    #[must_use]
    pub fn of_successor(&self) -> Trial {
        Trial { failures: self.failures, ..Trial::default() }
    }

    /// Whether it goes into no batch: an answer may have been meant for it.
    pub fn is_alone(&self) -> bool {
        self.alone
    }

    /// The look-up failed: the next refusal asks again.
    pub fn look_up_again(&mut self) {
        self.looked_up = false;
    }
}

#[cfg(test)]
mod tests;
