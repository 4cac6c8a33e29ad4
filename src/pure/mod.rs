//! Decisions: values in, values out. No I/O, no clock, no randomness, no threads, no logging.

pub mod changes;
pub mod dispatch;
pub mod endpoint;
pub mod flow;
pub mod lanes;
pub mod message;
pub mod retry;
pub mod checkpoint;
pub mod login;
pub mod secret;
pub mod seq;
#[cfg(test)]
mod simulation;
pub mod watermark;
pub mod ini;
pub mod secret;
pub mod seq;
pub mod url;
pub mod signature;
pub mod log_limit;
pub mod os_daemon;
pub mod secret;
pub mod seq;
pub mod settled;
