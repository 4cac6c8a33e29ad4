//! Decisions: values in, values out. No I/O, no clock, no randomness, no threads, no logging.

pub mod about;
pub mod changes;
pub mod checkpoint;
pub mod conflict;
pub mod dispatch;
pub mod document;
pub mod endpoint;
pub mod excerpt;
pub mod flow;
pub mod format;
pub mod guard;
pub mod ini;
pub mod lanes;
pub mod log_limit;
pub mod login;
pub mod message;
pub mod os_daemon;
pub mod rate;
pub mod redact;
pub mod replication;
pub mod retry;
mod scan;
pub mod secret;
pub mod seq;
pub mod settled;
pub mod signature;
#[cfg(test)]
mod simulation;
pub mod snapshot;
pub mod table;
pub mod test_event;
pub mod transitions;
pub mod url;
pub mod watermark;
