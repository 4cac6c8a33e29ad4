//! How much of a thing the unit tests do: every day little, in `tests/run` what takes minutes.
//!
//! Tests of other modules ask it as well; the integration tests have `world::long` for the same.

/// The one of these sizes that is wanted: `HOOKD_LONG` is set, and not to 0, where it is the long one.
pub(crate) fn size(every_day: u64, long: u64) -> u64 {
    let is_long = std::env::var_os("HOOKD_LONG").is_some_and(|value| value != "0");
    if is_long { long } else { every_day }
}
