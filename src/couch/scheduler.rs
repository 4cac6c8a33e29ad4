//! What CouchDB says of its replications: `_scheduler/docs` and `_scheduler/jobs` (2.1 and later), `_active_tasks`, and
//! the checkpoints that a replication leaves.
//!
//! Guarantees that long lists are read to their end in pages of [`PAGE_ROWS`]: `total_rows` may exceed what is listed
//! and pages shift while they are read, so the end is a page that holds nothing, and a row may come twice or not at
//! all (CONTRACT §8). All of it needs a server admin.

use http::Method;
use serde::Deserialize;

use crate::couch::client::{Server, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::error::{Context, Kind, Result};
use crate::pure::replication::{Job, Row, Task};

/// Rows of a page.
pub const PAGE_ROWS: usize = 500;

/// One page of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// What CouchDB counts; may be more than it lists.
    pub total_rows: u64,
    /// What it lists.
    pub rows: Vec<T>,
}

/// A page of `_scheduler/docs`, of one replicator database or of all.
///
/// # Errors
/// As [`Server::request`]; `BadRequest` or `NotFound` before CouchDB 2.1; `Forbidden` when we are no server admin.
pub fn docs_page(server: &Server, db: Option<&str>, skip: usize, limit: usize) -> Result<Page<Row>> {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        total_rows: u64,
        docs: Vec<Row>,
    }
    let db = db.map_or_else(String::new, |db| format!("/{}", encoded(db)));
    let body: Body = server.get_json(&format!("/_scheduler/docs{db}?limit={limit}&skip={skip}"))?;
    Ok(Page { total_rows: body.total_rows, rows: body.docs })
}

/// A page of `_scheduler/jobs`.
///
/// # Errors
/// As [`docs_page`].
pub fn jobs_page(server: &Server, skip: usize, limit: usize) -> Result<Page<Job>> {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        total_rows: u64,
        jobs: Vec<Job>,
    }
    let body: Body = server.get_json(&format!("/_scheduler/jobs?limit={limit}&skip={skip}"))?;
    Ok(Page { total_rows: body.total_rows, rows: body.jobs })
}

/// Reads a list to its end, page by page; `page` gets what to skip and how many rows to ask for, `each` takes a page
/// and says whether to go on.
///
/// # Errors
/// What `page` returns.
pub fn all<T>(
    page: impl Fn(usize, usize) -> Result<Page<T>>,
    each: &mut dyn FnMut(Vec<T>) -> bool,
) -> Result<()> {
    let mut skip = 0;
    loop {
        let Page { total_rows, rows } = page(skip, PAGE_ROWS)?;
        let n_rows = rows.len();
        skip += PAGE_ROWS;
        // A short page is no end: CouchDB leaves out what changed its state while it looked.
        if !each(rows) || n_rows == 0 || skip as u64 >= total_rows {
            return Ok(());
        }
    }
}

/// What the scheduler says of one document; `None` when it knows none.
///
/// # Errors
/// As [`docs_page`].
pub fn doc(server: &Server, db: &str, doc_id: &str) -> Result<Option<Row>> {
    known(server.get_json(&format!("/_scheduler/docs/{}/{}", encoded(db), encoded(doc_id))))
}

/// One job, by the replication's id; `None` when there is none.
///
/// # Errors
/// As [`docs_page`].
pub fn job(server: &Server, id: &str) -> Result<Option<Job>> {
    known(server.get_json(&format!("/_scheduler/jobs/{}", encoded(id))))
}

/// What runs now.
///
/// # Errors
/// As [`docs_page`].
pub fn tasks(server: &Server) -> Result<Vec<Task>> {
    let found: Vec<serde_json::Value> = server.get_json("/_active_tasks")?;
    let replications = found.into_iter().filter(|task| task["type"] == "replication");
    Ok(replications.filter_map(|task| serde_json::from_value(task).ok()).collect())
}

/// The checkpoint that a replication left in a database of this server, as JSON; `None` when there is none.
/// `id` is the replication's, with or without what follows a `+`.
///
/// # Errors
/// As [`Server::request`].
pub fn checkpoint(server: &Server, db: &str, id: &str) -> Result<Option<serde_json::Value>> {
    let id = id.split('+').next().unwrap_or(id);
    known(server.get_json(&db_path(db, &["_local", id])))
}

/// A replication's document, as JSON; `None` when there is none.
///
/// # Errors
/// As [`Server::request`].
pub fn document(server: &Server, db: &str, doc_id: &str) -> Result<Option<serde_json::Value>> {
    let path = db_path(db, &[doc_id]);
    let reply = known(server.request(&Method::GET, &path, None, &[]))?;
    reply.map(|reply| from_json(&reply.body).context(|| format!("GET {path}"))).transpose()
}

fn known<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a list of which CouchDB counts `total_rows` and lists what `rows` gives for each page.
    fn read(total_rows: u64, rows: &[&[u32]]) -> Vec<u32> {
        let mut found = Vec::new();
        let page = |skip: usize, _| {
            let rows = rows.get(skip / PAGE_ROWS).unwrap_or(&&[][..]).to_vec();
            Ok(Page { total_rows, rows })
        };
        all(page, &mut |rows| {
            found.extend(rows);
            true
        })
        .unwrap();
        found
    }

    #[test]
    fn a_list_is_read_to_its_end_whatever_is_counted() {
        assert_eq!(read(4, &[&[]]), [0; 0], "2.2.0 counts four and lists none at its start");
        assert_eq!(read(1_200, &[&[1], &[2, 3], &[4]]), [1, 2, 3, 4], "a short page is no end");
        assert_eq!(read(5_000, &[&[1], &[]]), [1], "what is counted and not listed ends it");
        assert_eq!(read(0, &[&[1]]), [1]);
    }
}
