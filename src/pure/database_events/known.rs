//! What is remembered of databases between two lives of the daemon: 64 documents `_local/couch-hookd.NAME.N` in `state_db`.
//!
//! Each holds what is known of its databases (by hash of their names) and the events that are not known to be delivered,
//! so that one write makes a change known and its event certain. Guarantees that what somebody else wrote, or wrote for
//! another place, is not believed.

use std::collections::BTreeMap;

use hmac::Mac;
use serde::{Deserialize, Serialize};

use crate::pure::checkpoint::{Mark, StateKey, hex};
use crate::pure::message::doc_key;
use crate::pure::seq::Seq;
use crate::pure::transitions::known::Kept;

/// How many documents there are.
pub const BUCKETS: usize = 64;

/// In which document a database is remembered.
pub fn bucket_of(db: &str) -> usize {
    usize::try_from(doc_key(db) % BUCKETS as u64).expect("a number below 64")
}

/// What is known of a database that exists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The mark that it bore; `None` before it was first looked into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// The end of its changes, as JSON text: CouchDB may spell JSON in another way when it gives it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
    /// Fingerprints of states that hold nothing behind it, oldest first.
    pub clean: Vec<u64>,
    /// CouchDB told of something that a look cannot find: it is told at the next one, whatever is found.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_hinted: bool,
    /// There at the first start, and not changed since the first look: a hint of what was written before that may yet
    /// come.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_fresh: bool,
}

impl Known {
    /// The end of its changes.
    pub fn through(&self) -> Option<Seq> {
        Seq::from_json(self.through.as_deref()?)
    }
}

/// One of the documents.
///
/// `{"_id":"_local/couch-hookd.dbs.17","_rev":"0-3","mark":"5f0c…","last":812,"databases":{"tenant-9":{"mark":"77ab…",
/// "through":"\"42-g1AAA…\"","clean":[1209…]}},"events":[{"n":812,"key":"tenant-9","type":"database.updated","at":"…",
/// "data":"{…}"}],"hmac":"77…"}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bucket {
    /// The mark of the database it was written in.
    pub mark: Mark,
    /// The highest number given to an event in it.
    pub last: u64,
    /// By name.
    pub databases: BTreeMap<String, Known>,
    /// In order of their numbers.
    pub events: Vec<Kept>,
}

impl Bucket {
    /// Of a database with this mark, with nothing in it.
    pub fn new(mark: Mark) -> Bucket {
        Bucket { mark, last: 0, databases: BTreeMap::new(), events: Vec::new() }
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
        serde_json::to_string(&Document { rev, bucket: self, hmac: self.hmac(place, key) })
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
        if bucket.hmac(place, key) != hmac {
            return Err(
                "its `hmac` does not fit: it was written by somebody else, or for another place".to_owned()
            );
        }
        Ok(bucket)
    }

    fn hmac(&self, place: &(&str, &str), key: &StateKey) -> String {
        let content = serde_json::to_vec(&(place, self)).expect("texts and numbers are always JSON");
        hex(&key.mac(&content).finalize().into_bytes())
    }
}
