//! In-process servers on loopback: a CouchDB stand-in and a receiver of webhooks.
//!
//! The `demo` and `receive` commands use them, and so do the integration tests, where they are what no real
//! server does on demand. Nothing here is part of the daemon itself.

pub mod couch;
pub mod http;
pub mod quirks;
pub mod receiver;
pub mod record;
pub mod replicator;

mod changes_feed;
mod doc_routes;
mod docs;
mod routes;
mod scheduler_routes;
mod selector;
mod seqs;
mod store;
mod updates_feed;
