//! Our own database: the checkpoints' key, one record per webhook, dead letters.
//!
//! Guarantees that nothing is written before the database is closed to strangers (a new one on 1.x and 2.x is open
//! to anybody), that storing a dead letter twice is storing it once, and that members which a later version wrote
//! into a record stay. Leaves to others when any of it is written.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::couch::client::{Server, Written, db_path, encoded, from_json};
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::{Mark, StateKey};
use crate::sys;

/// `_id` of the document with the key.
const KEY_ID: &str = "couch-hookd";
/// Old revisions that CouchDB keeps the names of.
const REVS_LIMIT: u64 = 10;
/// Dead letters read at once.
const PAGE_ROWS: usize = 200;
/// Suspects listed at most; more than 20 are never kept by one webhook (DESIGN §6).
const SUSPECTS_MAX: usize = 1_000;
/// The longest answer of an endpoint that a dead letter keeps.
const ANSWER_BYTES_MAX: usize = 1024;
/// 1.x tells of a document before it is on the disk, unless asked: without this a killed CouchDB lost the letter
/// and kept the checkpoint behind it (HOLES 5).
const FULL_COMMIT: (&str, &str) = ("x-couch-full-commit", "true");

/// Document `webhook:NAME`: what must be remembered of a webhook beyond its databases.
///
/// `{"_id":"webhook:orders","_rev":"3-…","activated_at":"2026-11-21T20:46:41Z","databases":{"orders":"5f0c…"},
/// "fingerprint":"9a…"}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WebhookRecord {
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// When it first became active: what `since = now` means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activated_at: Option<jiff::Timestamp>,
    /// Databases known, with the mark each had.
    #[serde(default)]
    pub databases: BTreeMap<String, Mark>,
    /// Of the configuration that was last seen.
    #[serde(default)]
    pub fingerprint: String,
    /// Since when the endpoint has said 410.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_since: Option<jiff::Timestamp>,
    /// What it said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_reason: Option<String>,
    /// Since when it has been paused by a command or a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_since: Option<jiff::Timestamp>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_reason: Option<String>,
    /// Members this version does not know; written back as they are.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// An event given up, by reference: the document is where it was. `_id` is the `webhook-id`.
///
/// `{"_id":"msg_5f0c…","webhook":"orders","db":"orders","mark":"…","doc_id":"order:17","rev":"3-9f…",
/// "revs":["3-9f…"],"seq":"42-g1…","event_type":"document.updated","class":"refused","status":422,
/// "answer":"total is missing","attempts":3,"first_attempt_at":"…","stored_at":"…"}`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetter {
    /// `webhook-id`.
    #[serde(rename = "_id")]
    pub id: String,
    /// Name of the webhook.
    pub webhook: String,
    /// Name of the database.
    pub db: String,
    /// Its mark.
    pub mark: Mark,
    /// The document.
    pub doc_id: String,
    /// Its winning revision.
    pub rev: String,
    /// All revisions the id is made of: the winner, then live conflicts.
    pub revs: Vec<String>,
    /// Where the feed told of it, for people.
    pub seq: Option<Box<RawValue>>,
    /// `document.updated`.
    pub event_type: String,
    /// Whose fault it seems to be.
    pub class: DeadLetterClass,
    /// Status of the last answer; `None` when there was none.
    pub status: Option<u16>,
    /// Start of the last answer or error, redacted; cut at 1 KiB when stored.
    pub answer: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was first tried.
    pub first_attempt_at: jiff::Timestamp,
    /// When it was given up.
    pub stored_at: jiff::Timestamp,
    /// Members this version does not know, and CouchDB's own.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Why an event was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterClass {
    /// The endpoint refuses it.
    Refused,
    /// The endpoint fails at it while it takes others; replayed by the daemon itself.
    Suspect,
    /// With `concurrency = 1`: it held up all others for `give_up_after`.
    GivenUp,
}
