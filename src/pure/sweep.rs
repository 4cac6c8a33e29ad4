//! When databases are looked at: how fast a walk over all of them goes, and how often one begins.
//!
//! Guarantees the stated worst delay: a change that nobody hinted at is seen within `max(interval, databases / rate)`,
//! where the interval is longer only while hints are known to arrive, which is judged by what is heard, never by an open
//! connection: a feed that drops every line says nothing, so nothing is relied on it. We ourselves write into `state_db`
//! every 30 seconds, which CouchDB hints at like at any other database, so that silence means something. Never faster
//! than the rate: looking at a database costs CouchDB 2.3 ms and opens it (CONTRACT §9).
//!
//! The shell asks [`Sweep::due`], then begins a walk ([`Sweep::begin`]) or goes on with it and says what it did.

use std::time::{Duration, Instant};

/// Between two walks while hints arrive.
pub const TRUSTING_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// Hints are known to arrive for so long after one did: more than twice as long as signs of life in `state_db` are apart.
pub const HEARD_WITHIN: Duration = Duration::from_secs(75);
/// And for so long after their source was lost, unless one arrives again.
const GONE_FOR: Duration = Duration::from_secs(40);
/// A change that no hint named: hints are not relied on for so long.
const DISTRUST: Duration = Duration::from_secs(3600);
/// In a second, where each database is a request of its own.
const SINGLE_RATE: u32 = 10;
/// Between two pages of names of which nothing is wanted.
const PAGE_GAP: Duration = Duration::from_millis(100);
/// After failures in a row.
const AGAIN_AFTER: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10), Duration::from_secs(30)];
/// After one that only a person can do something about.
const RARELY: Duration = Duration::from_secs(300);

/// What `[hookd]` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// `sweep_interval`.
    pub interval: Duration,
    /// `sweep_rate`: databases a second.
    pub rate: u32,
}

/// The machine; one for each CouchDB.
#[derive(Debug)]
pub struct Sweep {
    settings: Settings,
    is_single: bool,
    /// Databases that were looked at in the last whole walk.
    n_last: Option<usize>,
    walk: Option<Walking>,
    /// When the last walk began.
    begun: Option<Instant>,
    /// Not before then: paced, or after a failure.
    not_before: Instant,
    /// Something may have been missed: as fast as may be, and once more from the beginning.
    again: bool,
    n_failed: usize,
    heard: Option<Instant>,
    distrusted_until: Option<Instant>,
}

#[derive(Debug)]
struct Walking {
    n_asked: usize,
    /// At the rate, not spread over the interval.
    hurries: bool,
    /// When the present step was due.
    due: Instant,
}

impl Sweep {
    /// Nothing looked at yet: a walk is due at once.
    pub fn new(settings: Settings, now: Instant) -> Sweep {
        Sweep {
            settings,
            is_single: false,
            n_last: None,
            walk: None,
            begun: None,
            not_before: now,
            again: true,
            n_failed: 0,
            heard: None,
            distrusted_until: None,
        }
    }

    /// When the next step is due; asked anew after everything that happens.
    pub fn due(&self, now: Instant) -> Instant {
        let due = match (&self.walk, self.begun) {
            (Some(walk), _) => walk.due,
            (None, Some(begun)) if !self.again => begun + self.interval(now),
            (None, _) => now,
        };
        due.max(self.not_before)
    }

    /// Whether a walk is under way, to be gone on with.
    pub fn is_walking(&self) -> bool {
        self.walk.is_some()
    }

    /// A walk begins; `is_single`: each database is a request of its own.
    pub fn begin(&mut self, is_single: bool, now: Instant) {
        let hurries = std::mem::take(&mut self.again) || self.n_last.is_none();
        self.is_single = is_single;
        self.walk = Some(Walking { n_asked: 0, hurries, due: now });
        self.begun = Some(now);
    }

    /// `n` databases were asked about in one step, which began at `started`.
    pub fn on_asked(&mut self, n: usize, started: Instant, now: Instant) {
        self.n_failed = 0;
        let (pace, fastest) = (self.pace(now), self.fastest());
        let Some(walk) = &mut self.walk else { return };
        let n_steps = u32::try_from(n).unwrap_or(u32::MAX);
        walk.n_asked += n;
        // What was late is not made up for faster than the rate.
        walk.due = (walk.due + pace * n_steps).max(started + fastest * n_steps);
    }

    /// A page of names was read of which too few are wanted to ask about any.
    pub fn on_page(&mut self, now: Instant) {
        self.n_failed = 0;
        if let Some(walk) = &mut self.walk {
            walk.due = walk.due.max(now + PAGE_GAP);
        }
    }

    /// The walk has come to its end.
    pub fn on_end(&mut self) {
        self.n_last = self.walk.take().map(|walk| walk.n_asked).or(self.n_last);
    }

    /// A step failed; it is tried again. `rarely`: only a person can do something about it.
    pub fn on_failure(&mut self, rarely: bool, now: Instant) {
        let after = AGAIN_AFTER[self.n_failed.min(AGAIN_AFTER.len() - 1)];
        self.n_failed += 1;
        self.not_before = now + if rarely { RARELY } else { after };
    }

    /// A hint arrived, about whichever database.
    pub fn on_hint(&mut self, now: Instant) {
        self.heard = Some(now);
    }

    /// Who gives hints is gone, perhaps for a moment only.
    pub fn on_hints_gone(&mut self, now: Instant) {
        let until = (now + GONE_FOR).checked_sub(HEARD_WITHIN);
        self.heard = self.heard.and_then(|heard| until.map(|until| heard.min(until)));
    }

    /// Hints were lost, or somebody new looks on: anything may have changed. What is under way goes on, at the rate: were
    /// it to begin again each time, those at its end would never be looked at.
    pub fn on_hints_lost(&mut self) {
        self.again = true;
        if let Some(walk) = &mut self.walk {
            walk.hurries = true;
        }
    }

    /// A walk found a change that no hint had named.
    pub fn on_missed(&mut self, now: Instant) {
        self.distrusted_until = Some(now + DISTRUST);
    }

    /// Whether hints are known to arrive.
    pub fn hints_flow(&self, now: Instant) -> bool {
        let heard = self.heard.is_some_and(|heard| now < heard + HEARD_WITHIN);
        heard && self.distrusted_until.is_none_or(|until| now >= until)
    }

    /// From the beginning of one walk to that of the next, at least.
    pub fn interval(&self, now: Instant) -> Duration {
        match self.hints_flow(now) {
            true => self.settings.interval.max(TRUSTING_INTERVAL),
            false => self.settings.interval,
        }
    }

    /// After how long a change is seen at the latest that no hint names, as far as CouchDB answers; before the first
    /// walk over all databases it is not known how many there are.
    pub fn worst_delay(&self, now: Instant) -> Option<Duration> {
        let n = u32::try_from(self.n_last?).unwrap_or(u32::MAX);
        Some(self.interval(now).max(self.fastest() * n))
    }

    /// Databases looked at in the last whole walk.
    pub fn n_databases(&self) -> Option<usize> {
        self.n_last
    }

    /// For one database.
    fn pace(&self, now: Instant) -> Duration {
        let fastest = self.fastest();
        match (&self.walk, self.n_last) {
            // More than there were: whatever they are, the interval is not for them.
            (Some(walk), Some(n)) if !walk.hurries && walk.n_asked < n => {
                let n = u32::try_from(n).unwrap_or(u32::MAX);
                (self.interval(now) / n).max(fastest)
            }
            _ => fastest,
        }
    }

    fn fastest(&self) -> Duration {
        let rate = if self.is_single { self.settings.rate.min(SINGLE_RATE) } else { self.settings.rate };
        Duration::from_secs(1) / rate.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: Settings = Settings { interval: Duration::from_secs(60), rate: 40 };

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A whole walk over `n` databases in steps of 50, each answered after 100 ms; when each step began, and the end.
    fn walk(sweep: &mut Sweep, n: usize, is_single: bool, from: Instant) -> (Vec<Instant>, Instant) {
        let mut now = sweep.due(from).max(from);
        sweep.begin(is_single, now);
        let (mut steps, mut left) = (Vec::new(), n);
        loop {
            now = now.max(sweep.due(now));
            steps.push(now);
            let step = left.min(if is_single { 1 } else { 50 });
            left -= step;
            let started = now;
            now += Duration::from_millis(100);
            sweep.on_asked(step, started, now);
            if left == 0 {
                sweep.on_end();
                return (steps, now);
            }
        }
    }

    /// The most databases asked about within a second, by steps of `size`.
    fn n_per_second(steps: &[Instant], size: usize) -> usize {
        let within =
            |from: &Instant| steps.iter().filter(|step| (*from..*from + secs(1)).contains(*step)).count();
        // The first step of a second is paid for before it begins.
        steps.iter().map(|step| (within(step) - 1) * size).max().unwrap_or(0)
    }

    #[test]
    fn the_first_walk_begins_at_once_and_goes_at_the_rate() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        assert_eq!((sweep.due(start), sweep.worst_delay(start)), (start, None));
        let (steps, end) = walk(&mut sweep, 10_000, false, start);
        assert_eq!(steps[0], start);
        assert!(n_per_second(&steps, 50) <= 40);
        assert!((secs(248)..secs(252)).contains(&(end - start)), "{:?}", end - start);
        assert_eq!(sweep.worst_delay(end), Some(secs(250)));
        assert!(sweep.due(end) <= end, "the interval has passed");
    }

    #[test]
    fn few_databases_are_spread_over_the_interval() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        let (_, end) = walk(&mut sweep, 500, false, start);
        assert!(end - start < secs(13));
        assert_eq!((sweep.due(end), sweep.worst_delay(end)), (start + secs(60), Some(secs(60))));
        let (steps, end) = walk(&mut sweep, 500, false, end);
        let gaps: Vec<Duration> = steps.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(gaps, vec![secs(6); 9]);
        assert_eq!(sweep.due(end), start + secs(120));
        let (_, end) = walk(&mut sweep, 2_000, false, end);
        assert!(end - start < secs(120 + 60 + 40), "more than before are not waited for: {:?}", end - start);
    }

    #[test]
    fn one_by_one_it_goes_ten_a_second() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        let (steps, _) = walk(&mut sweep, 300, true, start);
        assert!(n_per_second(&steps, 1) <= 10);
        assert_eq!(sweep.worst_delay(start), Some(secs(60)));
        let (_, end) = walk(&mut sweep, 1_000, true, start);
        assert_eq!(sweep.worst_delay(end), Some(secs(100)));
    }

    #[test]
    fn what_was_late_is_not_made_up_for_faster_than_the_rate() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        sweep.begin(false, start);
        sweep.on_asked(40, start, start + secs(30));
        assert_eq!(sweep.due(start + secs(30)), start + secs(1));
        sweep.on_asked(40, start + secs(30), start + secs(30));
        assert_eq!(sweep.due(start + secs(30)), start + secs(31));
    }

    #[test]
    fn walks_are_far_apart_only_while_hints_are_heard() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        let (_, end) = walk(&mut sweep, 100, false, start);
        assert_eq!(sweep.due(end), start + secs(60));
        sweep.on_hint(end);
        assert_eq!((sweep.due(end), sweep.worst_delay(end)), (start + secs(900), Some(secs(900))));
        // Silence: not even our own signs of life are hinted at.
        let silent = end + HEARD_WITHIN;
        assert_eq!(sweep.due(silent), start + secs(60));
        sweep.on_hint(silent);
        sweep.on_hints_gone(silent);
        assert!(sweep.hints_flow(silent), "they may be back in a moment");
        assert_eq!(sweep.interval(silent + GONE_FOR), secs(60));
    }

    #[test]
    fn a_change_that_no_hint_named_ends_the_trust_for_an_hour() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        sweep.on_hint(start);
        sweep.on_missed(start);
        assert!(!sweep.hints_flow(start));
        sweep.on_hint(start + secs(3600));
        assert!(sweep.hints_flow(start + secs(3600)));
    }

    #[test]
    fn lost_hints_hurry_the_walk_and_bring_another() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        let (_, end) = walk(&mut sweep, 500, false, start);
        let begun = sweep.due(end);
        sweep.begin(false, begun);
        sweep.on_hints_lost();
        sweep.on_asked(50, begun, begun);
        assert_eq!(sweep.due(begun), begun + secs(50) / 40);
        sweep.on_asked(450, begun, begun);
        sweep.on_end();
        assert_eq!(sweep.due(begun), begun, "once more");
        let (_, end) = walk(&mut sweep, 500, false, begun);
        assert_eq!(sweep.due(end), begun + secs(60), "and then as ever");
    }

    #[test]
    fn failures_are_tried_again_later_and_later() {
        let start = crate::sys::now();
        let mut sweep = Sweep::new(SETTINGS, start);
        let mut afters = Vec::new();
        for _ in 0..5 {
            sweep.on_failure(false, start);
            afters.push((sweep.due(start) - start).as_secs());
        }
        sweep.on_failure(true, start);
        afters.push((sweep.due(start) - start).as_secs());
        assert_eq!(afters, [1, 3, 10, 30, 30, 300]);
    }
}
