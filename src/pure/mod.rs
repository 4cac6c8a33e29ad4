//! Decisions: values in, values out. No I/O, no clock, no randomness, no threads, no logging.

pub mod changes;
pub mod log_limit;
pub mod os_daemon;
pub mod secret;
pub mod seq;
pub mod settled;
