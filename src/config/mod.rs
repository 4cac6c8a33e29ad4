//! The typed configuration: what a correct set of sections means.
//!
//! Values here are checked. What CouchDB's or our own ini files say is read by `source`, named by `keys`.

use std::path::PathBuf;
use std::time::Duration;

use crate::pure::secret::Secret;

/// All of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Section `[hookd]`.
    pub hookd: Hookd,
    /// One per line of `[hookd.webhooks]` that has no fault, in the order of names.
    pub webhooks: Vec<Webhook>,
}

/// Section `[hookd]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Hookd {
    /// Base URL of CouchDB without userinfo and without a slash at the end.
    pub couchdb_url: String,
    /// Login name; from `username`, else from the URL's userinfo, percent-decoded.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// PEM file with roots to trust beside the system's and Mozilla's.
    pub ca_file: Option<PathBuf>,
    /// Database for dead letters, requests, one record per webhook.
    pub state_db: String,
    /// What is logged.
    pub log_level: log::LevelFilter,
    /// How standalone logs look.
    pub log_format: LogFormat,
    /// Under what URL people know this CouchDB, no slash at the end.
    pub public_url: Option<String>,
    /// Ask CouchDB to restart us when our sections change, instead of applying changes live.
    pub register: bool,
    /// The longest time between two checkpoints of a subscription that moves.
    pub checkpoint_interval: Duration,
    /// Deliveries in flight over all webhooks; at most 256.
    pub deliveries_max: usize,
    /// Dead letters of one webhook before it is paused.
    pub dead_letters_max: u64,
    /// How long a filtered request stays open before it is read anew (DESIGN §8).
    pub feed_rotate: Duration,
    /// `timeout` of a continuous request: how long CouchDB keeps it open when nothing happens.
    pub feed_timeout: Duration,
}

/// How standalone log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// One webhook: a line of `[hookd.webhooks]` and its section `[hookd.webhook.NAME]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Webhook {
    /// `[a-z0-9][a-z0-9_-]{0,39}`.
    pub name: String,
    /// Endpoint URL; may hold userinfo or a token in its path, so it is a secret.
    pub endpoint: Secret,
    /// Databases, named singly.
    pub db: Vec<String>,
    /// Where to start in the databases that exist when the webhook first starts.
    pub since: Since,
    /// Event types to send, patterns with `*`: `document.*`.
    pub events: Vec<String>,
    /// Filter that CouchDB runs.
    pub filter: Option<Filter>,
    /// Whether the document goes into the payload.
    pub include_docs: bool,
    /// Whether live conflicts are part of what is told.
    pub conflicts: bool,
    /// Whether design documents are told.
    pub design_docs: bool,
    /// `whsec_…` texts that were checked to decode, newest first; none = unsigned.
    pub secrets: Vec<Secret>,
    /// Extra request headers, names in lower case.
    pub headers: Vec<(String, Secret)>,
    /// One attempt, all of it.
    pub timeout: Duration,
    /// Connecting, TLS included.
    pub connect_timeout: Duration,
    /// Deliveries in flight; 1 = strict order over all documents.
    pub concurrency: usize,
    /// When to try again; the last step repeats.
    pub retry_schedule: Vec<Duration>,
    /// The longest `Retry-After` that is believed.
    pub retry_after_max: Duration,
    /// With `concurrency = 1`: how long one event may hold up all others.
    pub give_up_after: Duration,
    /// Tries of an event that is refused.
    pub dead_letter_after: u32,
    /// Statuses that suspect the event rather than the endpoint.
    pub dead_letter_on: Vec<u16>,
    /// Documents above this many bytes are left out of the payload.
    pub payload_bytes_max: usize,
    /// Stopped by configuration.
    pub paused: bool,
    /// PEM file with roots for this endpoint beside the others.
    pub ca_file: Option<PathBuf>,
    /// SHA-256 in hex over the endpoint URL and the section as written: tells whether it changed.
    pub fingerprint: String,
}

/// Where a webhook starts in databases that exist at its first start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// Only what happens from then on.
    Now,
    /// All that they hold.
    Beginning,
}

/// A filter that CouchDB runs on its side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// `_selector`, 2.x and later; the JSON object as written.
    Selector(String),
    /// `_doc_ids`.
    DocIds(Vec<String>),
    /// `_view`: `ddoc/name`.
    View(String),
    /// A filter function `ddoc/name` with query parameters (values already as CouchDB takes them).
    Function {
        /// `ddoc/name`.
        name: String,
        /// Query parameters.
        params: Vec<(String, String)>,
    },
}
