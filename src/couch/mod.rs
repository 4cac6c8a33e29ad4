//! CouchDB from the outside: requests, changes feeds, `_local` documents, and our own database.

pub mod client;
pub mod feed;
pub mod local_docs;
pub mod state_db;
