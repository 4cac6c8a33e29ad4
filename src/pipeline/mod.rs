//! Everything that runs for one webhook: reading, delivering, storing.
//!
//! ```text
//! feed:NAME/DB --rows--> webhook:NAME (drives pure::dispatch) --attempts--> worker:NAME, on demand
//!      ^  reads on command    |   ^------------ outcomes --------------------'
//!                             |--> reader, a few for the process: databases found by pattern, in turns
//!                             |       lookout and hints: which of them may hold something new
//!                             |--> store:NAME      dead letters, look-ups, the webhook's record
//!                             '--> checkpointer    one for the process, paced
//! ```
//!
//! A webhook's parts are started by its own thread, which joins them. Nothing here decides what is told, tried
//! again or finished: that is `pure`.

pub mod activation;
pub mod agents;
pub mod board;
pub mod checkpointer;
pub mod complaints;
pub mod desk;
pub mod dispatcher;
pub mod feed_reader;
pub mod hints;
pub mod lookout;
pub mod obey;
pub mod permits;
pub mod reader_pool;
mod replay;
mod report;
mod starting_points;
pub mod store;
mod subscription;
pub mod watcher;
pub mod webhook;
pub mod workers;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::couch::client::Server;
use crate::couch::leases::Hold;
use crate::pipeline::board::Board;
use crate::pipeline::checkpointer::CheckpointSender;
use crate::pipeline::complaints::Outage;
use crate::pipeline::feed_reader::FilteredPages;
use crate::pipeline::hints::Hints;
use crate::pipeline::lookout::Lookout;
use crate::pipeline::permits::Permits;
use crate::pipeline::reader_pool::ReaderPool;
use crate::pure::checkpoint::StateKey;

/// What all webhooks of the process share.
#[derive(Clone)]
pub struct Shared {
    /// The watched CouchDB.
    pub server: Server,
    /// Name of the database for dead letters and records.
    pub state_db: String,
    /// Key of the checkpoints, from `state_db`.
    pub key: StateKey,
    /// `source` of payloads, up to the database's name: `https://couch.example` or `urn:couchdb:UUID`.
    pub source: String,
    /// Deliveries in flight and payload held, over all webhooks.
    pub permits: Arc<Permits>,
    /// Where checkpoints go.
    pub checkpoints: CheckpointSender,
    /// Who reads databases that have no thread of their own.
    pub pool: Arc<ReaderPool>,
    /// Who sees which databases there are.
    pub lookout: Arc<Lookout>,
    /// One filtered page per database at a time: hanging up does not stop the server's scan.
    pub filtered_pages: Arc<FilteredPages>,
    /// What is said of a CouchDB that does not answer, once for all.
    pub outage: Arc<Outage>,
    /// What webhooks say of themselves.
    pub board: Arc<Board>,
    /// Whether a webhook tells of ourselves, and so things are to be kept for it.
    pub watched: Arc<AtomicBool>,
    /// Whether `daemon.started` was said.
    pub said_started: Arc<AtomicBool>,
    /// What is said of databases and was not yet looked into.
    pub hints: Arc<Hints>,
    /// What is asked before a webhook is told, or its place stored; unlimited for what is of no webhook.
    pub hold: Arc<Hold>,
    /// Times of `[hookd]`.
    pub hookd: Arc<crate::config::Hookd>,
}
