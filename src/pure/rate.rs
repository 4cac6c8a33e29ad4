//! How many attempts an endpoint gets in a time: a token bucket that is told the time.
//!
//! Guarantees that in any time `t` no more than `t / interval` attempts and one burst start, and that a limit says when
//! the next one may, so that nobody has to ask again and again. What counts as an attempt is left to the caller.

use std::time::{Duration, Instant};

/// `N/s`, `N/m` or `N/h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// Attempts, at least 1 ...
    pub n: u32,
    /// ... in this time.
    pub per: Duration,
}

impl RateLimit {
    /// From one attempt to the next, on average.
    pub fn interval(self) -> Duration {
        self.per / self.n.max(1)
    }

    /// Attempts that may start at once after a rest: one second's worth, at least 1.
    pub fn burst(self) -> u32 {
        let interval = self.interval().as_nanos().max(1);
        u32::try_from(Duration::from_secs(1).as_nanos() / interval).unwrap_or(u32::MAX).max(1)
    }
}

/// The bucket of one endpoint. Kept as the time at which it is full again: no number of tokens that has to be counted
/// up as time passes, no fractions.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    interval: Duration,
    /// What a whole burst but its last attempt takes.
    slack: Duration,
    /// `None`: full.
    full_at: Option<Instant>,
}

impl Bucket {
    /// A full one.
    pub fn new(limit: RateLimit) -> Bucket {
        Bucket { interval: limit.interval(), slack: limit.interval() * (limit.burst() - 1), full_at: None }
    }

    /// When the next attempt may start; `None`: at any time.
    pub fn next_at(&self) -> Option<Instant> {
        self.full_at?.checked_sub(self.slack)
    }

    /// An attempt starts.
    pub fn take(&mut self, now: Instant) {
        self.full_at = Some(self.full_at.map_or(now, |full_at| full_at.max(now)) + self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes whenever it may, for `seconds`; gives the milliseconds of the starts.
    fn starts(n: u32, per_s: u64, seconds: u64) -> Vec<u128> {
        let begun = crate::sys::now();
        let end = begun + Duration::from_secs(seconds);
        let mut bucket = Bucket::new(RateLimit { n, per: Duration::from_secs(per_s) });
        let (mut now, mut starts) = (begun, Vec::new());
        while now < end {
            bucket.take(now);
            starts.push((now - begun).as_millis());
            now = bucket.next_at().map_or(now, |at| at.max(now));
        }
        starts
    }

    #[test]
    fn a_burst_is_a_seconds_worth_then_the_pace_holds() {
        assert_eq!(starts(4, 1, 2), [0, 0, 0, 0, 250, 500, 750, 1000, 1250, 1500, 1750]);
        assert_eq!(starts(30, 60, 7), [0, 2000, 4000, 6000]);
        assert_eq!(starts(1, 3600, 7201), [0, 3_600_000, 7_200_000]);
        assert_eq!(starts(120, 60, 2), [0, 0, 500, 1000, 1500]);
        let many = starts(1_000, 1, 3);
        assert_eq!((many.len(), many[999], many[1_000]), (1_000 + 2_999, 0, 1));
    }

    #[test]
    fn a_rest_fills_no_more_than_one_burst() {
        let begun = crate::sys::now();
        let mut bucket = Bucket::new(RateLimit { n: 2, per: Duration::from_secs(1) });
        for rest_s in [0, 1, 1_000] {
            let now = begun + Duration::from_secs(10 + rest_s * 2);
            assert!(bucket.next_at().is_none_or(|at| at <= now));
            bucket.take(now);
            assert!(bucket.next_at().is_none_or(|at| at <= now), "the second of a burst");
            bucket.take(now);
            assert_eq!(bucket.next_at(), Some(now + Duration::from_millis(500)), "no third");
        }
    }
}
