//! CouchDB from the outside: requests, changes feeds, `_local` documents, and our own database.

pub mod alive;
pub mod all_docs;
pub mod client;
pub mod conflicts;
pub mod databases;
pub mod db_updates;
pub mod feed;
mod gate;
pub mod leases;
pub mod letters;
pub mod local_docs;
pub mod look_into;
pub mod node_config;
pub mod refusal;
pub mod remembered;
pub mod requests;
pub mod roster_docs;
pub mod scheduler;
#[cfg(test)]
mod scripted;
pub mod state_db;
