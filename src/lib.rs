//! couch-hookd: turns what happens inside CouchDB into signed webhooks, losing nothing.

pub mod config;
pub mod error;
pub mod host;
pub mod log;
pub mod pure;
pub mod sys;
