//! couch-hookd: turns what happens inside CouchDB into signed webhooks, losing nothing.

pub mod cli;
pub mod config;
pub mod couch;
pub mod daemon;
pub mod demo;
pub mod error;
pub mod host;
pub mod log;
pub mod names;
pub mod pipeline;
pub mod pure;
pub mod standin;
pub mod sys;
pub mod tls;
