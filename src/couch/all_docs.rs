//! Documents of a database by their ids: ranges of `_all_docs`, whole or in pages.
//!
//! Guarantees the order of ids, and that a range is both its ends and all between. What does not fit the shape that is
//! asked for fails all of it: whoever lists what others may have written asks for JSON.

use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::couch::client::{Limits, Server, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::error::{Context, Result};

/// A document, and its id.
#[derive(Debug, Deserialize)]
pub struct Row<D> {
    /// `_id`.
    pub id: String,
    /// `None` where CouchDB could not read it.
    pub doc: Option<D>,
}

/// Those whose ids begin with a prefix of letters, digits and `:`, at most `n_max`, and CouchDB's time.
///
/// # Errors
/// As [`Server::get_json`].
pub fn beginning_with<D: DeserializeOwned>(
    server: &Server,
    db: &str,
    prefix: &str,
    n_max: Option<usize>,
    limits: Limits,
) -> Result<(Vec<Row<D>>, Option<jiff::Timestamp>)> {
    range(server, db, (prefix, &format!("{prefix}~")), n_max, limits)
}

/// The first `n_max` from one id to another, and the id that the next page begins at; `None` after the last one.
///
/// # Errors
/// As [`Server::get_json`].
pub fn page<D: DeserializeOwned>(
    server: &Server,
    db: &str,
    range_of_ids: (&str, &str),
    n_max: usize,
) -> Result<(Vec<Row<D>>, Option<String>)> {
    // One row over, to go on from.
    let (mut rows, _) = range(server, db, range_of_ids, Some(n_max + 1), Limits::default())?;
    let next = if rows.len() > n_max { rows.pop().map(|row: Row<D>| row.id) } else { None };
    Ok((rows, next))
}

fn range<D: DeserializeOwned>(
    server: &Server,
    db: &str,
    (from, to): (&str, &str),
    n_max: Option<usize>,
    limits: Limits,
) -> Result<(Vec<Row<D>>, Option<jiff::Timestamp>)> {
    #[derive(Deserialize)]
    struct Page<D> {
        rows: Vec<Row<D>>,
    }
    let path = format!(
        "{}?include_docs=true{}&startkey={}&endkey={}",
        db_path(db, &["_all_docs"]),
        n_max.map_or(String::new(), |n_max| format!("&limit={n_max}")),
        encoded(&json!(from).to_string()),
        encoded(&json!(to).to_string()),
    );
    let reply = server.request_within(&Method::GET, &path, None, &[], limits)?;
    let page: Page<D> = from_json(&reply.body).context(|| format!("GET {path}"))?;
    Ok((page.rows, reply.date))
}
