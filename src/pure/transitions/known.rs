//! What is remembered of replications between two lives of the daemon: 64 documents `_local/couch-hookd.NAME.N`.
//!
//! Each holds the last state told of its replications (by hash of the document's id) and the events that are not known
//! to be delivered, so that one write makes a state known and its event certain. Guarantees that a number, once given
//! to an event, is never given to another while the database lives: `webhook-id`s are made of it (DESIGN §5).

use std::collections::BTreeMap;

use hmac::{Hmac, Mac};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::pure::checkpoint::{Mark, StateKey, hex};
use crate::pure::message::doc_key;
use crate::pure::replication::State;

/// How many documents there are.
pub const BUCKETS: usize = 64;
/// In front of the id of a replication that was started by `_replicate` and has no document; no document's id begins
/// so.
pub const TRANSIENT: &str = "_replicate/";

/// In which document a replication is remembered.
pub fn bucket_of(key: &str) -> usize {
    usize::try_from(doc_key(key) % BUCKETS as u64).expect("a number below 64")
}

/// What was last told of a replication, or found when its database was first looked at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// It was there when its database was first looked at, and has had no state since: its first one is no news.
    #[serde(default, skip_serializing_if = "is_false")]
    pub was_there: bool,
    /// When it came to that end: another time is another end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// What it has to recover from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<State>,
    /// Documents that it could not write, as last told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub write_failures: u64,
    /// Told as stalled, and has not moved since.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_stalled: bool,
    /// Fingerprint of the document that was told as invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalid: Option<u64>,
    /// How often it was submitted again since it last went well, and after which failure the last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resubmitted: Option<(u32, Option<Timestamp>)>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// An event that is not known to be delivered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Counts the events of a webhook and a database; part of the `webhook-id`.
    pub n: u64,
    /// Of which replication: id of its document, or [`TRANSIENT`] and its own.
    pub key: String,
    /// `replication.failed`.
    #[serde(rename = "type")]
    pub event_type: String,
    /// When it became so.
    pub at: Timestamp,
    /// `data` of the payload, as JSON text: CouchDB may spell JSON in another way when it gives it back.
    pub data: String,
}

/// One of the documents.
///
/// `{"_id":"_local/couch-hookd.sync.17","_rev":"0-3","mark":"5f0c…","last":812,"replications":{"edge1":{"state":
/// "crashing","trouble":"crashing"}},"events":[{"n":812,"key":"edge1","type":"replication.crashing","at":"…",
/// "data":"{…}"}],"hmac":"77…"}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// The mark of the database it was written in.
    pub mark: Mark,
    /// The highest number given to an event in it.
    pub last: u64,
    /// By id of their documents.
    pub replications: BTreeMap<String, Known>,
    /// In order of their numbers.
    pub events: Vec<Kept>,
}

impl Bucket {
    /// Of a database with this mark, with nothing in it.
    pub fn new(mark: Mark) -> Bucket {
        Bucket { mark, last: 0, replications: BTreeMap::new(), events: Vec::new() }
    }

    /// The id of the document, behind `_local/`.
    pub fn id(webhook: &str, index: usize) -> String {
        format!("couch-hookd.{webhook}.{index}")
    }

    /// The document to store; `place` names it (database and id), so that it holds nowhere else.
    pub fn to_json(&self, place: &(&str, &str), key: &StateKey, rev: Option<&str>) -> String {
        #[derive(Serialize)]
        struct Document<'a> {
            #[serde(rename = "_rev", skip_serializing_if = "Option::is_none")]
            rev: Option<&'a str>,
            #[serde(flatten)]
            bucket: &'a Bucket,
            hmac: String,
        }
        let hmac = hex(&self.mac(place, key).finalize().into_bytes());
        serde_json::to_string(&Document { rev, bucket: self, hmac })
            .expect("texts and numbers are always JSON")
    }

    /// Reads what CouchDB gave.
    ///
    /// # Errors
    /// Why it is not believed, to be told to people.
    pub fn from_json(body: &[u8], place: &(&str, &str), key: &StateKey) -> Result<Bucket, String> {
        #[derive(Deserialize)]
        struct Document {
            #[serde(flatten)]
            bucket: Bucket,
            hmac: String,
        }
        let Document { bucket, hmac } =
            serde_json::from_slice(body).map_err(|error| format!("it is not what we write: {error}"))?;
        // Compared as texts: whoever can measure the time that takes can write `_local` documents anyway.
        if hex(&bucket.mac(place, key).finalize().into_bytes()) != hmac {
            return Err(
                "its `hmac` does not fit: it was written by somebody else, or for another place".to_owned()
            );
        }
        Ok(bucket)
    }

    fn mac(&self, place: &(&str, &str), key: &StateKey) -> Hmac<Sha256> {
        let content = serde_json::to_vec(&(place, self)).expect("texts and numbers are always JSON");
        key.mac(&content)
    }
}
