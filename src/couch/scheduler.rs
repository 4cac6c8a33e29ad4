//! What CouchDB says of its replications: `_scheduler/docs` and `_scheduler/jobs` (2.1 and later), `_active_tasks`, and
//! the checkpoints that a replication leaves.
//!
//! Guarantees that long lists are read to their end in pages of [`PAGE_ROWS`]: `total_rows` may be more or less than
//! what is listed, and pages shift while they are read, so a row may come twice or not at all (CONTRACT §8). Nothing is
//! filtered by CouchDB: with `states=` it looks through the first `skip + limit` documents of each shard only, so that
//! pages lose rows (`couch_replicator_fabric_rpc`, 2.1 to 3.5). All of it needs a server admin.

use std::collections::HashMap;

use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::couch::client::{Generation, Server, db_path, encoded};
use crate::couch::feed;
use crate::couch::refusal::from_json;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::lag;
use crate::pure::replication::{Job, Row, State, Task};
use crate::pure::resubmit::{Resubmission, Resubmitted};
use crate::pure::seq::Seq;

/// Rows of a page.
pub const PAGE_ROWS: usize = 500;
/// Changes are counted up to so many where CouchDB does not say how many there are.
const COUNTED_MAX: u64 = 10_000;
/// CouchDB writes into a replication's document itself: as often is a document read again that changed meanwhile.
const CONFLICTS_MAX: u32 = 5;

/// One page of a list.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// What CouchDB counts; may be more than it lists.
    pub total_rows: u64,
    /// How many rows it lists.
    pub n_rows: usize,
    /// Those of them that say something.
    pub rows: Vec<T>,
}

/// A page of `_scheduler/docs`, of one replicator database; `None` is `_replicator`: no request lists those of all
/// databases.
///
/// # Errors
/// As [`Server::request`]; `BadRequest` or `NotFound` before CouchDB 2.1; `Forbidden` when we are no server admin.
pub fn docs_page(server: &Server, db: Option<&str>, skip: usize, limit: usize) -> Result<Page<Row>> {
    docs_page_as(server, db, skip, limit)
}

/// As [`docs_page`], with rows as CouchDB wrote them for a [`Value`].
///
/// # Errors
/// As [`docs_page`].
pub fn docs_page_as<T: DeserializeOwned>(
    server: &Server,
    db: Option<&str>,
    skip: usize,
    limit: usize,
) -> Result<Page<T>> {
    #[derive(Deserialize)]
    struct Stated {
        #[serde(rename = "state")]
        _state: State,
    }
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        total_rows: u64,
        // So spelled when there is nothing at all (`couch_replicator_httpd_util:docs_cb`).
        #[serde(alias = "rows")]
        docs: Vec<Box<RawValue>>,
    }
    let db = db.map_or_else(String::new, |db| format!("/{}", encoded(db)));
    let body: Body = server.get_json(&format!("/_scheduler/docs{db}?limit={limit}&skip={skip}"))?;
    // A document that was saved a moment ago may be listed with a state of `null`: it has none to speak of.
    let texts = body.docs.iter().map(|row| row.get());
    let rows = texts.filter(|row| serde_json::from_str::<Stated>(row).is_ok()).map(serde_json::from_str);
    let malformed = |error| Error::new(Kind::Malformed, format!("expected rows of the scheduler: {error}"));
    let rows = rows.collect::<Result<_, _>>().map_err(malformed)?;
    Ok(Page { total_rows: body.total_rows, n_rows: body.docs.len(), rows })
}

/// A page of `_scheduler/jobs`.
///
/// # Errors
/// As [`docs_page`].
pub fn jobs_page(server: &Server, skip: usize, limit: usize) -> Result<Page<Job>> {
    jobs_page_as(server, skip, limit)
}

/// As [`jobs_page`], with rows as CouchDB wrote them for a [`Value`].
///
/// # Errors
/// As [`docs_page`].
pub fn jobs_page_as<T: DeserializeOwned>(server: &Server, skip: usize, limit: usize) -> Result<Page<T>> {
    #[derive(Deserialize)]
    struct Body<T> {
        #[serde(default)]
        total_rows: u64,
        jobs: Vec<T>,
    }
    let body: Body<T> = server.get_json(&format!("/_scheduler/jobs?limit={limit}&skip={skip}"))?;
    Ok(Page { total_rows: body.total_rows, n_rows: body.jobs.len(), rows: body.jobs })
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
        let Page { total_rows, n_rows, rows } = page(skip, PAGE_ROWS)?;
        // Rows are skipped, not documents: a page is one short for every design document that it passed over, and
        // what followed them comes next.
        skip += n_rows;
        // A short page is no end: CouchDB leaves out what changed its state while it looked. What it counts is none
        // either: up to 3.2 it takes off one for a design document that somebody may have deleted.
        let counted_out = n_rows < PAGE_ROWS && skip as u64 >= total_rows;
        if !each(rows) || n_rows == 0 || counted_out {
            return Ok(());
        }
    }
}

/// What the scheduler says of one document, a row as a [`Row`] or as CouchDB wrote it; `None` when it knows none, or
/// does not know yet what to make of it.
///
/// # Errors
/// As [`docs_page`].
pub fn doc_as<T: DeserializeOwned>(server: &Server, db: &str, doc_id: &str) -> Result<Option<T>> {
    let path = format!("/_scheduler/docs/{}/{}", encoded(db), encoded(doc_id));
    let row: Option<Value> = known(server.get_json(&path))?;
    // A document that was saved a moment ago is shown with a state of `null`.
    let Some(row) = row.filter(|row| !row["state"].is_null()) else { return Ok(None) };
    serde_json::from_value(row).map(Some).map_err(|error| {
        Error::new(Kind::Malformed, format!("expected a row, got another shape: {error}"))
            .context(format!("GET {path}"))
    })
}

/// One job, by the replication's id; `None` when there is none.
///
/// # Errors
/// As [`docs_page`].
pub fn job(server: &Server, id: &str) -> Result<Option<Job>> {
    job_as(server, id)
}

/// As [`job`], as CouchDB wrote it for a [`Value`].
///
/// # Errors
/// As [`docs_page`].
pub fn job_as<T: DeserializeOwned>(server: &Server, id: &str) -> Result<Option<T>> {
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

/// How many changes of a database of this server lie behind the place that a checkpoint holds (`source_last_seq`), or
/// 10,000 for "at least so many" where CouchDB gives no `pending`; before 2.0 the distance of two integers, of
/// which documents that changed twice are a part. Filters are not known of. `None` when the database, or the place in
/// it, is not there.
///
/// # Errors
/// As [`Server::request`].
pub fn pending_after(
    server: &Server,
    generation: Generation,
    db: &str,
    place: &Value,
) -> Result<Option<u64>> {
    if generation == Generation::One {
        let info: Option<Value> = known(server.get_json(&db_path(db, &[])))?;
        return Ok(info.and_then(|info| lag::behind(&info["update_seq"], place)));
    }
    let Some(since) = Seq::from_json(&place.to_string()) else { return Ok(None) };
    match known(feed::count_after(server, db, &since, None, COUNTED_MAX)) {
        Err(error) if error.kind() == Kind::BadSince => Ok(None),
        counted => counted,
    }
}

/// Saves a replication's document again without CouchDB's own members, so that a replication which has ended begins
/// anew; `None` when there is no such document. Nothing is saved when it has none of them: CouchDB takes no notice of
/// a document that asks for what it is at already.
///
/// # Errors
/// As [`Server::request`]; `Conflict` when somebody else keeps writing it; `Forbidden` when we may not, on 1.x also
/// while the replication runs; `Malformed` for what is no document.
pub fn resubmit(server: &Server, db: &str, doc_id: &str) -> Result<Option<Resubmitted>> {
    let path = db_path(db, &[doc_id]);
    let mut n_tries = 0;
    loop {
        let Some(reply) = known(server.request(&Method::GET, &path, None, &[]))? else { return Ok(None) };
        let text = String::from_utf8_lossy(&reply.body);
        let Some(Resubmission { body, taken_out, state }) = Resubmission::of(&text) else {
            return Err(Error::new(Kind::Malformed, "expected a document, got something else").context(path));
        };
        let rev = match taken_out.is_empty() {
            true => None,
            false => match server.put_json(&path, &body) {
                Ok(written) => Some(written.rev),
                Err(error) if error.kind() == Kind::Conflict && n_tries < CONFLICTS_MAX => {
                    n_tries += 1;
                    continue;
                }
                Err(error) => return Err(error),
            },
        };
        return Ok(Some(Resubmitted { rev, taken_out, previous_state: state }));
    }
}

/// Every document of a replicator database but design documents, with its id, in CouchDB's order.
///
/// # Errors
/// As [`Server::request`].
pub fn documents(server: &Server, db: &str, each: &mut dyn FnMut(&str, Map<String, Value>)) -> Result<()> {
    let mut after: Option<String> = None;
    loop {
        let from = after.as_ref().map_or_else(String::new, |id| {
            format!("&skip=1&startkey={}", encoded(&Value::from(id.as_str()).to_string()))
        });
        let path = format!("{}?include_docs=true&limit={PAGE_ROWS}{from}", db_path(db, &["_all_docs"]));
        let page: DocRows = server.get_json(&path)?;
        let n_rows = page.rows.len();
        after = page.rows.last().map(|row| row.id.clone());
        for DocRow { id, doc } in page.rows {
            if let (false, Some(doc)) = (id.starts_with("_design/"), doc) {
                each(&id, doc);
            }
        }
        if n_rows < PAGE_ROWS {
            return Ok(());
        }
    }
}

/// The documents of these ids that there are, by id.
///
/// # Errors
/// As [`Server::request`].
pub fn documents_of(server: &Server, db: &str, ids: &[&str]) -> Result<HashMap<String, Map<String, Value>>> {
    let mut found = HashMap::new();
    let path = format!("{}?include_docs=true", db_path(db, &["_all_docs"]));
    for keys in ids.chunks(PAGE_ROWS) {
        let body = serde_json::json!({ "keys": keys }).to_string();
        let reply = server.request(&Method::POST, &path, Some(&body), &[])?;
        let page: DocRows = from_json(&reply.body).context(|| format!("POST {path}"))?;
        found.extend(page.rows.into_iter().filter_map(|row| Some((row.id, row.doc?))));
    }
    Ok(found)
}

/// Rows of `_all_docs`; one that is not there has no `id`, only a `key`.
#[derive(Deserialize)]
struct DocRows {
    rows: Vec<DocRow>,
}

#[derive(Deserialize)]
struct DocRow {
    #[serde(default)]
    id: String,
    #[serde(default)]
    doc: Option<Map<String, Value>>,
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

    /// Reads a list of which CouchDB counts `total_rows`; of these documents it lists those that are true, and looks
    /// at no more than `skip + limit` of them for a page, as it does within a shard.
    #[track_caller]
    fn check(total_rows: u64, documents: &[bool]) {
        let mut found = Vec::new();
        let page = |skip: usize, limit: usize| {
            let seen = documents.iter().enumerate().take(skip + limit);
            let rows: Vec<usize> =
                seen.filter(|(_, listed)| **listed).map(|(at, _)| at).skip(skip).take(limit).collect();
            Ok(Page { total_rows, n_rows: rows.len(), rows })
        };
        all(page, &mut |rows| {
            found.extend(rows);
            true
        })
        .unwrap();
        let listed: Vec<usize> = (0..documents.len()).filter(|at| documents[*at]).collect();
        assert_eq!(found, listed);
    }

    #[test]
    fn a_list_is_read_to_its_end_whatever_is_counted() {
        check(4, &[]);
        check(0, &[true]);
        check(1_299, &[true; 1_300]);
        check(5_000, &[true; 500]);
        check(499, &[true; 500]);
        check(1_200, &[true; 1_200]);
    }

    #[test]
    fn what_is_not_listed_takes_no_row_with_it() {
        let mut documents = [true; 1_300];
        documents[0] = false;
        check(1_299, &documents);
        documents[499..504].fill(false);
        documents[1_299] = false;
        check(1_300, &documents);
    }

    #[test]
    fn whoever_has_enough_ends_it() {
        let page = |skip, limit| {
            Ok(Page { total_rows: u64::MAX, n_rows: limit, rows: (skip..skip + limit).collect::<Vec<_>>() })
        };
        let mut n_rows = 0;
        all(page, &mut |rows| {
            n_rows += rows.len();
            n_rows < 1_000
        })
        .unwrap();
        assert_eq!(n_rows, 1_000);
    }
}
