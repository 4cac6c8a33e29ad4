//! Reading replications for the commands, on every version of CouchDB.
//!
//! Guarantees that one [`Entry`] means the same on each: before 2.1 it is made of the document and `_active_tasks`;
//! from then on of the scheduler's row, and of the document and `_active_tasks` where the row says too little. A list
//! holds no replication twice. Writes nothing.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::cli::common::Setup;
use crate::cli::replications::Where;
use crate::couch::client::{Generation, Server};
use crate::couch::scheduler::{self, Page};
use crate::error::{Error, Kind, Result};
use crate::pure::lag::{self, Checkpoint, Here};
use crate::pure::replication::{Info, Job, Progress, Row, State, Task, has_scheduler};
use crate::sys;

/// A CouchDB that let us in.
pub(super) struct Look {
    setup: Setup,
    here: Here,
    /// `3.5.0`.
    pub(super) version: String,
    generation: Generation,
    /// Whether it has `_scheduler`.
    pub(super) has_scheduler: bool,
    /// The replicator database.
    pub(super) db: String,
}

/// One replication.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// What is known of it.
    pub(super) row: Row,
    /// The scheduler's row as CouchDB wrote it, or what it would have been before 2.1. May hold secrets.
    pub(super) raw: Value,
    /// What it has done, wherever that is told.
    pub(super) progress: Progress,
}

/// Some replications of a database.
pub(super) struct Listing {
    /// What CouchDB counts; may be more than it lists.
    pub(super) total_rows: u64,
    /// By document.
    pub(super) entries: Vec<Entry>,
}

/// How far one is behind.
#[derive(Debug, Clone, Default)]
pub(super) struct Behind {
    /// Changes of the source that it has not been through.
    pub(super) changes_pending: Option<u64>,
    /// Who says so: `replicator`, or `source` when they were counted there behind the checkpoint.
    pub(super) counted_by: Option<&'static str>,
    /// On the end that is this server.
    pub(super) checkpoint: Option<Checkpoint>,
}

impl Look {
    /// Finds CouchDB as other commands do.
    ///
    /// # Errors
    /// `Config` for what is no replicator database; else as asking CouchDB.
    pub(super) fn open(place: Where) -> Result<Look> {
        let Where { database: db, source } = place;
        let setup = Setup::load(source)?;
        let welcome = setup.welcome()?;
        let has_scheduler = has_scheduler(&welcome.version);
        // Before 2.0 the one there is may be given any name (`[replicator] db`).
        let is_one = db == "_replicator" || db.ends_with("/_replicator");
        if welcome.generation != Generation::One && !is_one {
            let expected = "expected `_replicator` or a name that ends in `/_replicator`";
            return Err(Error::new(Kind::Config, format!("--database: {expected}, got `{db}`")));
        }
        let hookd = &setup.config.hookd;
        let here = Here::new([setup.server.base_url()].into_iter().chain(hookd.public_url.as_deref()));
        Ok(Look { here, version: welcome.version, generation: welcome.generation, has_scheduler, db, setup })
    }

    /// The server.
    pub(super) fn server(&self) -> &Server {
        &self.setup.server
    }

    /// The database of this server that an end of a replication is.
    pub(super) fn db_of(&self, end: &str) -> Option<String> {
        self.here.db(end)
    }

    /// Replications of the database in these states (none given: all), of these `limit` behind the first `skip`.
    ///
    /// # Errors
    /// As [`Server::request`], with what is missing when it is rights or the database.
    pub(super) fn list(&self, states: &[State], skip: usize, limit: usize) -> Result<Listing> {
        let listing = if self.has_scheduler {
            self.list_rows(states, skip, limit)
        } else {
            self.list_documents(states, skip, limit)
        };
        listing.map_err(|error| self.explained(error))
    }

    fn list_rows(&self, states: &[State], skip: usize, limit: usize) -> Result<Listing> {
        // What is left out is CouchDB's to decide only while it decides what there is.
        let (first, skip) = if states.is_empty() { (skip, 0) } else { (0, skip) };
        let total_rows = Cell::new(0);
        let page = |behind: usize, n_rows: usize| {
            let n_rows = if states.is_empty() { n_rows.min(limit) } else { n_rows };
            let page: Page<Value> =
                scheduler::docs_page_as(self.server(), Some(&self.db), first + behind, n_rows)?;
            total_rows.set(page.total_rows);
            let rows = page.rows.into_iter().map(Entry::of_row).collect::<Result<Vec<Entry>>>()?;
            Ok(Page { total_rows: page.total_rows.saturating_sub(first as u64), n_rows: page.n_rows, rows })
        };
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen = HashSet::new();
        scheduler::all(page, &mut |rows| {
            let wanted = rows.into_iter().filter(|entry| is_wanted(states, entry));
            entries.extend(wanted.filter(|entry| seen.insert(entry.row.doc_id.clone())));
            entries.len() < skip.saturating_add(limit)
        })?;
        let mut entries: Vec<Entry> = entries.into_iter().skip(skip).take(limit).collect();
        self.complete(&mut entries)?;
        Ok(Listing { total_rows: total_rows.get(), entries })
    }

    fn list_documents(&self, states: &[State], skip: usize, limit: usize) -> Result<Listing> {
        let mut entries = Vec::new();
        scheduler::documents(self.server(), &self.db, &mut |doc_id, doc| {
            entries.push(Entry::of_document(&self.db, doc_id, &doc));
        })?;
        let total_rows = entries.len() as u64;
        entries.retain(|entry| is_wanted(states, entry));
        let mut entries: Vec<Entry> = entries.into_iter().skip(skip).take(limit).collect();
        self.complete(&mut entries)?;
        Ok(Listing { total_rows, entries })
    }

    /// One replication, and its document (a secret); `None` when there is no such document.
    ///
    /// # Errors
    /// As [`Look::list`].
    pub(super) fn one(&self, doc_id: &str) -> Result<Option<(Entry, Map<String, Value>)>> {
        self.find(doc_id).map_err(|error| self.explained(error))
    }

    fn find(&self, doc_id: &str) -> Result<Option<(Entry, Map<String, Value>)>> {
        let doc = scheduler::document(self.server(), &self.db, doc_id)?;
        let Some(Value::Object(doc)) = doc else { return Ok(None) };
        let row = match self.has_scheduler {
            true => scheduler::doc_as(self.server(), &self.db, doc_id)?,
            false => None,
        };
        let mut entry = match row {
            Some(raw) => Entry::of_row(raw)?,
            None => Entry::of_document(&self.db, doc_id, &doc),
        };
        entry.take_ends(&doc);
        // In terminal states only the document knows it.
        let id = doc.get("_replication_id").and_then(Value::as_str);
        entry.row.id = entry.row.id.or_else(|| id.map(str::to_owned));
        self.complete(std::slice::from_mut(&mut entry))?;
        Ok(Some((entry, doc)))
    }

    /// The error of a document that is not there.
    pub(super) fn no_such(&self, doc_id: &str) -> Error {
        let found =
            format!("no document `{doc_id}` in `{}`; `replications list` shows what there is", self.db);
        Error::new(Kind::NotFound, found)
    }

    /// Adds what rows leave out: both ends in state `error`, progress on 2.x.
    fn complete(&self, entries: &mut [Entry]) -> Result<()> {
        let without_ends: Vec<&str> =
            entries.iter().filter(|entry| entry.lacks_ends()).map(Entry::id).collect();
        let docs = scheduler::documents_of(self.server(), &self.db, &without_ends)?;
        for entry in entries.iter_mut() {
            if let Some(doc) = docs.get(&entry.row.doc_id) {
                entry.take_ends(doc);
            }
        }
        if !entries.iter().any(|entry| entry.row.state == State::Running && entry.progress.is_empty()) {
            return Ok(());
        }
        let tasks: HashMap<String, Task> = scheduler::tasks(self.server())?
            .into_iter()
            .map(|task| (base(&task.replication_id), task))
            .collect();
        for entry in entries.iter_mut().filter(|entry| entry.progress.is_empty()) {
            if let Some(task) = entry.row.id.as_deref().and_then(|id| tasks.get(&base(id))) {
                entry.take_progress(task.progress(), self.has_scheduler);
            }
        }
        Ok(())
    }

    /// The job that a replication is, if it is one, and the same as CouchDB wrote it.
    ///
    /// # Errors
    /// As [`Server::request`].
    pub(super) fn job(&self, entry: &Entry) -> Result<Option<(Job, Value)>> {
        let Some(id) = entry.row.id.as_deref().filter(|_| self.has_scheduler) else { return Ok(None) };
        let raw: Option<Value> =
            scheduler::job_as(self.server(), id).map_err(|error| self.explained(error))?;
        raw.map(|raw| Ok((Job::deserialize(&raw).map_err(malformed)?, raw))).transpose()
    }

    /// All jobs as CouchDB wrote them, each once, and how many it counts.
    ///
    /// # Errors
    /// As [`Server::request`].
    pub(super) fn jobs(&self) -> Result<(u64, Vec<Value>)> {
        let total_rows = Cell::new(0);
        let page = |skip: usize, n_rows: usize| {
            let page: Page<Value> = scheduler::jobs_page_as(self.server(), skip, n_rows)?;
            total_rows.set(page.total_rows);
            Ok(page)
        };
        let (mut jobs, mut seen) = (Vec::new(), HashSet::new());
        let read = scheduler::all(page, &mut |rows| {
            jobs.extend(rows.into_iter().filter(|job: &Value| seen.insert(job["id"].to_string())));
            true
        });
        read.map_err(|error| self.explained(error))?;
        Ok((total_rows.get(), jobs))
    }

    /// How far a replication is behind, looked up where one of its ends is this server.
    ///
    /// # Errors
    /// As [`Server::request`].
    pub(super) fn behind(&self, entry: &Entry) -> Result<Behind> {
        let row = &entry.row;
        let source = row.source.as_deref().and_then(|end| self.here.db(end));
        let target = row.target.as_deref().and_then(|end| self.here.db(end));
        let mut checkpoint = None;
        if let Some(id) = &row.id {
            for db in [&source, &target].into_iter().flatten() {
                let found = scheduler::checkpoint(self.server(), db, id)?;
                checkpoint = found.and_then(|doc| Checkpoint::of(&doc, sys::wall()));
                if checkpoint.is_some() {
                    break;
                }
            }
        }
        if let Some(n) = lag::pending(&entry.progress) {
            return Ok(Behind { changes_pending: Some(n), counted_by: Some("replicator"), checkpoint });
        }
        let place = checkpoint.as_ref().and_then(|checkpoint| checkpoint.source_last_seq.as_ref());
        let counted = match (&source, place) {
            // A replication that came to its end has been through all that it was to see.
            _ if row.state == State::Completed => None,
            (Some(db), Some(place)) => scheduler::pending_after(self.server(), self.generation, db, place)?,
            _ => None,
        };
        Ok(Behind { changes_pending: counted, counted_by: counted.map(|_| "source"), checkpoint })
    }

    /// Says what is missing where CouchDB only refuses.
    pub(super) fn explained(&self, error: Error) -> Error {
        let missing = match error.kind() {
            Kind::Forbidden | Kind::Unauthorized => {
                let who = self.server().username().map_or("nobody".to_owned(), |name| format!("`{name}`"));
                format!("only server admins may see replications, and we are {who}")
            }
            Kind::NotFound => format!("is there a database `{}`?", self.db),
            _ => return error,
        };
        Error::new(error.kind(), format!("{error}; {missing}"))
    }
}

fn is_wanted(states: &[State], entry: &Entry) -> bool {
    states.is_empty() || states.contains(&entry.row.state)
}

/// The id without what follows a `+`.
fn base(id: &str) -> String {
    id.split('+').next().unwrap_or(id).to_owned()
}

fn malformed(error: serde_json::Error) -> Error {
    Error::new(Kind::Malformed, format!("expected a row of `_scheduler`, got another shape: {error}"))
}

impl Entry {
    fn of_row(raw: Value) -> Result<Entry> {
        let row = Row::deserialize(&raw).map_err(malformed)?;
        let progress = row.info.progress().cloned().unwrap_or_default();
        Ok(Entry { row, raw, progress })
    }

    /// Before 2.1, and while the scheduler does not know a document yet: one without a state is `initializing`.
    fn of_document(db: &str, doc_id: &str, doc: &Map<String, Value>) -> Entry {
        let row = Row::of_document(doc_id, doc).unwrap_or_else(|| {
            let mut doc = doc.clone();
            doc.insert("_replication_state".to_owned(), State::Initializing.as_str().into());
            Row::of_document(doc_id, &doc).expect("it bears a state")
        });
        let progress = row.info.progress().cloned().unwrap_or_default();
        let info = match &row.info {
            Info::None => Value::Null,
            Info::Error(error) => json!({ "error": error }),
            Info::Progress(progress) => json!(progress),
        };
        let raw = json!({"database": db, "doc_id": doc_id, "id": row.id, "source": row.source, "target": row.target,
            "state": row.state, "info": info, "error_count": row.error_count, "start_time": null,
            "last_updated": row.last_updated});
        let row = Row { database: Some(db.to_owned()), ..row };
        Entry { row, raw, progress }
    }

    /// Its document's id.
    pub(super) fn id(&self) -> &str {
        &self.row.doc_id
    }

    fn lacks_ends(&self) -> bool {
        self.row.source.is_none() || self.row.target.is_none()
    }

    fn take_ends(&mut self, doc: &Map<String, Value>) {
        let members: Map<String, Value> = doc.clone();
        let found = Entry::of_document("", &self.row.doc_id, &members).row;
        self.row.source = self.row.source.take().or(found.source);
        self.row.target = self.row.target.take().or(found.target);
    }

    /// From a task; before 2.1 it stands where the scheduler would have it.
    fn take_progress(&mut self, progress: Progress, has_scheduler: bool) {
        if !has_scheduler && self.raw["info"].is_null() {
            self.raw["info"] = json!(progress);
        }
        self.progress = progress;
    }
}
