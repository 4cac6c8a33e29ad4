//! Conflicts in CouchDB: which documents of a webhook are known to be conflicted, and the bodies of their leaves.
//!
//! Guarantees that what is reported as stored or deleted is on CouchDB's disk, and that storing always makes a new
//! revision, so that a deletion that was still on its way refuses. When which is done is decided by `pure::dispatch`.

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::couch::client::{Limits, Server, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::couch::state_db::{FULL_COMMIT, delete_dead_letter, found};
use crate::error::{Context, Error, Kind, Result};
use crate::pure::conflict::{self, LeafDocs, leaf_docs, leaves_query};
use crate::pure::document::Document;

/// Ids read, or documents deleted, at once.
const PAGE_ROWS: usize = 1_000;
/// Tries to store one that somebody else changes, too.
const TRIES: u32 = 5;
/// An answer with leaves may be this much longer than they may be, in bytes; in a longer one they are not counted.
const LEAVES_MARGIN: u64 = 1 << 20;

/// A document that is conflicted now, for whoever looks into `state_db`.
///
/// `{"_id":"conflict:orders:9f86d081884c7d65:2c26b46b68ffc68f","_rev":"1-…","webhook":"orders","db":"orders",
/// "doc_id":"order:17","leaves":["3-b","3-a"],"since":"2026-11-22T06:30:00.123Z"}`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Conflicted {
    /// [`conflict::id`].
    #[serde(rename = "_id")]
    pub id: String,
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// Name of the webhook that tells it.
    pub webhook: String,
    /// The database.
    pub db: String,
    /// The document.
    pub doc_id: String,
    /// Its live leaves: the winner, then the others, sorted.
    pub leaves: Vec<String>,
    /// When it was first seen so.
    pub since: jiff::Timestamp,
}

/// Stores that a document is conflicted, or with other leaves than before.
///
/// # Errors
/// As [`Server::request`].
pub fn remember(server: &Server, state_db: &str, conflicted: &Conflicted) -> Result<()> {
    let path = db_path(state_db, &[&conflicted.id]);
    let mut conflicted = conflicted.clone();
    let mut tries = 0;
    loop {
        tries += 1;
        let body = serde_json::to_string(&conflicted).expect("texts serialize");
        // Most are new: only one that is there already has to be read.
        match server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT]) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == Kind::Conflict && tries < TRIES => {}
            Err(error) => return Err(error),
        }
        let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else {
            conflicted.rev = None;
            continue;
        };
        #[derive(Deserialize)]
        struct Stored {
            #[serde(rename = "_rev")]
            rev: String,
            since: Option<jiff::Timestamp>,
        }
        let stored: Stored = from_json(&body).context(|| format!("GET {path}"))?;
        conflicted.rev = Some(stored.rev);
        conflicted.since = stored.since.unwrap_or(conflicted.since);
    }
}

/// Deletes that it is; a missing one is fine.
///
/// # Errors
/// As [`Server::request`].
pub fn forget(server: &Server, state_db: &str, id: &str) -> Result<()> {
    // As a letter goes: under the revision that is there.
    delete_dead_letter(server, state_db, id)
}

/// Keys of all documents that are stored as conflicted at this [`conflict::place`].
///
/// # Errors
/// As [`Server::get_json`].
pub fn list(server: &Server, state_db: &str, place: &str) -> Result<Vec<u64>> {
    let mut keys = Vec::new();
    each_page(server, state_db, place, |rows| {
        keys.extend(rows.iter().filter_map(|row| conflict::key_of(place, &row.id)));
        Ok(())
    })?;
    Ok(keys)
}

/// Deletes all that is stored at this [`conflict::place`]: its database is gone.
///
/// # Errors
/// As [`Server::request`]; what was deleted by then stays so.
pub fn forget_all(server: &Server, state_db: &str, place: &str) -> Result<()> {
    each_page(server, state_db, place, |rows| {
        let docs = rows.iter().map(|row| json!({"_id": row.id, "_rev": row.value.rev, "_deleted": true}));
        let body = json!({ "docs": docs.collect::<Vec<_>>() }).to_string();
        let path = db_path(state_db, &["_bulk_docs"]);
        server.request(&Method::POST, &path, Some(&body), &[FULL_COMMIT]).map(drop)
    })
}

#[derive(Deserialize)]
struct Row {
    id: String,
    value: Value,
}

#[derive(Deserialize)]
struct Value {
    rev: String,
}

fn each_page(
    server: &Server,
    state_db: &str,
    place: &str,
    mut on_page: impl FnMut(&[Row]) -> Result<()>,
) -> Result<()> {
    #[derive(Deserialize)]
    struct Page {
        rows: Vec<Row>,
    }
    let mut start = place.to_owned();
    loop {
        // Keys are hex digits, which all sort before a `g`. One row over, to go on from.
        let path = format!(
            "{}?limit={}&startkey={}&endkey={}",
            db_path(state_db, &["_all_docs"]),
            PAGE_ROWS + 1,
            encoded(&json!(start).to_string()),
            encoded(&json!(format!("{place}g")).to_string()),
        );
        let mut page: Page = server.get_json(&path)?;
        let next = if page.rows.len() > PAGE_ROWS { page.rows.pop().map(|row| row.id) } else { None };
        if !page.rows.is_empty() {
            on_page(&page.rows)?;
        }
        match next {
            Some(next) => start = next,
            None => return Ok(()),
        }
    }
}

/// Reads the bodies of these leaves with one request, at most `bytes_max` of them together, each as `redact` leaves
/// it. Leaves that are gone are left out, all of them where the document is.
///
/// # Errors
/// As [`Server::request`]; `Malformed` for an answer of another shape.
pub fn read_leaves(
    server: &Server,
    db: &str,
    doc_id: &str,
    revs: &[String],
    bytes_max: usize,
    redact: impl Fn(Document) -> Document,
) -> Result<LeafDocs> {
    let path = format!("{}?open_revs={}", db_path(db, &[doc_id]), encoded(&leaves_query(revs)));
    let body_bytes_max = bytes_max as u64 + LEAVES_MARGIN;
    let limits = Limits { body_bytes_max, ..Limits::default() };
    let reply = match server.request_within(&Method::GET, &path, None, &[], limits) {
        Ok(reply) => reply,
        Err(error) if error.kind() == Kind::NotFound => return Ok(LeafDocs::Json("[]".into())),
        Err(error) if error.kind() == Kind::TooLong => return Ok(LeafDocs::TooLarge(None)),
        Err(error) => return Err(error),
    };
    let text = std::str::from_utf8(&reply.body)
        .map_err(|_| Error::new(Kind::Malformed, format!("GET {path}: expected UTF-8")))?;
    leaf_docs(text, revs, bytes_max, redact)
        .map_err(|error| Error::new(Kind::Malformed, format!("GET {path}: expected leaves: {error}")))
}
