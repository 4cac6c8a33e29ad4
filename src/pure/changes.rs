//! `_changes` as CouchDB writes it: pages and lines, parsed from any split of the bytes.

use serde_json::value::RawValue;

use crate::pure::seq::Seq;

/// One row of a feed.
///
/// `{"seq":"42-g1…","id":"order:17","changes":[{"rev":"3-9f…"}],"deleted":true,"doc":{…}}`
#[derive(Debug, Clone)]
pub struct Row {
    /// `None` when CouchDB wrote `null` (`seq_interval`).
    pub seq: Option<Seq>,
    /// The document's id, any bytes that JSON can hold.
    pub id: String,
    /// `changes[].rev` in the order given: the winner first; more with `style=all_docs`.
    pub revs: Vec<String>,
    /// Whether the winner is a deletion.
    pub deleted: bool,
    /// What came as `doc`.
    pub doc: RowDoc,
}

/// The `doc` of a row.
#[derive(Debug, Clone)]
pub enum RowDoc {
    /// No such member: the request did not ask for it.
    Absent,
    /// `"doc":null`: gone in between.
    Null,
    /// Longer than the parser was told to keep; its length in bytes.
    TooLarge {
        /// Length of the JSON text.
        bytes: u64,
    },
    /// The JSON text, byte for byte as CouchDB sent it.
    Json(Box<RawValue>),
}

/// What a feed gives.
#[derive(Debug, Clone)]
pub enum Item {
    /// A change.
    Row(Row),
    /// The end of a page, or the last line of a continuous feed.
    End {
        /// Absent or `null`: no position to store.
        last_seq: Option<Seq>,
        /// How many changes follow, where CouchDB says so (2.x and later).
        pending: Option<u64>,
    },
    /// A line or body with `error`, which may come inside a 200 (1.7.1).
    Fault {
        /// CouchDB's `error`.
        error: String,
        /// CouchDB's `reason`.
        reason: String,
    },
}
