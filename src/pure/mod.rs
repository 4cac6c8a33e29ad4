//! Decisions: values in, values out. No I/O, no clock, no randomness, no threads, no logging.

pub mod changes;
pub mod checkpoint;
pub mod excerpt;
pub mod login;
mod scan;
pub mod secret;
pub mod seq;
