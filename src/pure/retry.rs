//! When to try again.

use std::time::{Duration, Instant};

use jiff::Timestamp;

/// How far jitter moves a delay, as a share of it, either way.
const JITTER: f64 = 0.2;

/// Decides when something that failed is tried again.
///
/// `failures` counts from 1; past the end of `schedule` its last step repeats, so that a recovery is noticed
/// within about that step. `jitter` is in `0.0..1.0` and moves the delay by up to 20 % either way. `not_before`
/// (from `Retry-After`) moves it later, never earlier. Never says "give up": that is decided by what other
/// events got (DESIGN §6).
///
/// Source: RFC 9110 §10.2.3 for `Retry-After`; the schedule's shape after Standard Webhooks, "Retries".
pub fn next_try(
    schedule: &[Duration],
    failures: u32,
    not_before: Option<Instant>,
    now: Instant,
    jitter: f64,
) -> Instant {
    let step = (failures.max(1) as usize - 1).min(schedule.len().saturating_sub(1));
    let delay = schedule.get(step).copied().unwrap_or_default();
    let at = now + delay.mul_f64(1.0 - JITTER + 2.0 * JITTER * jitter);
    not_before.map_or(at, |not_before| at.max(not_before))
}

/// When the tries of a schedule come after the first one, without jitter: sums of its steps.
pub fn since_first(schedule: &[Duration]) -> Vec<Duration> {
    let add = |sum: &mut Duration, step: &Duration| {
        *sum = sum.saturating_add(*step);
        Some(*sum)
    };
    schedule.iter().scan(Duration::ZERO, add).collect()
}

/// What an answer's `Retry-After` asks for: seconds, or a date that counts from the answer's own `date`, so that
/// a wrong clock on either side does no harm; without one it counts from `wall`. `None` when it is neither, or
/// not in the future. Not cut: who uses it has its own limit.
///
/// Source: RFC 9110 §10.2.3.
pub fn retry_after(text: &str, date: Option<&str>, wall: Timestamp) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(seconds))).filter(|after| !after.is_zero());
    }
    let from = date.and_then(http_date).unwrap_or(wall);
    Duration::try_from(http_date(text)?.duration_since(from)).ok().filter(|after| !after.is_zero())
}

/// A date of HTTP: `Sat, 21 Nov 2026 20:47:41 GMT`.
pub fn http_date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim().replace("GMT", "+0000")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(failures: u32, jitter: f64, expected_ms: u128) {
        let now = crate::sys::now();
        let schedule = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(300)];
        assert_eq!((next_try(&schedule, failures, None, now, jitter) - now).as_millis(), expected_ms);
    }

    #[test]
    fn follows_the_schedule_and_repeats_its_last_step() {
        check(1, 0.5, 1_000);
        check(2, 0.5, 5_000);
        check(3, 0.5, 300_000);
        check(4_000_000_000, 0.5, 300_000);
    }

    #[test]
    fn tries_are_counted_from_the_first() {
        let schedule = [1, 5, 15].map(Duration::from_secs);
        assert_eq!(since_first(&schedule), [1, 6, 21].map(Duration::from_secs));
    }

    #[test]
    fn jitter_moves_by_a_fifth_either_way() {
        check(2, 0.0, 4_000);
        check(2, 1.0, 6_000);
    }

    #[test]
    fn retry_after_moves_later_never_earlier() {
        let now = crate::sys::now();
        let schedule = [Duration::from_secs(5)];
        let early = now + Duration::from_secs(1);
        let late = now + Duration::from_secs(60);
        assert_eq!(next_try(&schedule, 1, Some(early), now, 0.5), now + Duration::from_secs(5));
        assert_eq!(next_try(&schedule, 1, Some(late), now, 0.5), late);
    }

    fn check_after(text: &str, date: Option<&str>, expected: Option<u64>) {
        let wall = "2026-11-21T20:46:41Z".parse().unwrap();
        assert_eq!(retry_after(text, date, wall), expected.map(Duration::from_secs), "{text} {date:?}");
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_by_the_answers_own_clock() {
        check_after("120", None, Some(120));
        check_after(" 7 ", None, Some(7));
        check_after("0", None, None);
        check_after("-5", None, None);
        check_after("soon", None, None);
        check_after("Sat, 21 Nov 2026 20:47:41 GMT", None, Some(60));
        check_after("Sat, 21 Nov 2026 20:47:41 GMT", Some("Sat, 21 Nov 2026 20:47:31 GMT"), Some(10));
        check_after("Sat, 21 Nov 2026 20:00:00 GMT", None, None);
    }
}
