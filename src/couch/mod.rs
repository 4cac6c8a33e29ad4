//! CouchDB from the outside: requests, changes feeds, `_local` documents, and our own database.

pub mod client;
pub mod feed;
mod gate;
pub mod local_docs;
pub mod node_config;
pub mod refusal;
#[cfg(test)]
mod scripted;
pub mod state_db;
