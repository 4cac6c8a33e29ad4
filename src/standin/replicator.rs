//! The stand-in's replicator: nothing is replicated; a test says in which state each replication is.
//!
//! Guarantees what CouchDB does with such a state. 2.x and 3.x write `completed` and `failed` into the document and
//! keep the other five in the scheduler alone; 1.x writes `triggered`, `completed` and `error`. What the scheduler
//! knew of a document is gone with the revision it was said of: an edit or a deletion makes its row go. Errors get
//! their history entries as CouchDB makes them, and `last_updated` is the time of the newest.
//! How it is shown over HTTP is `scheduler_routes`' subject.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::error::{Error, Kind, Result};
use crate::standin::couch::{Flavour, StandIn, State, said};
use crate::standin::docs::{Incoming, Rev, members, quoted};
use crate::standin::store::Database;
use crate::sys;

/// History entries kept of a job: CouchDB's `max_history`.
const HISTORY_MAX: usize = 20;
/// What 1.x and 2.x keep in every replicator database; 3.x takes it away.
const DESIGN: &str = "_design/_replicator";

/// CouchDB's seven words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicationState {
    /// Not yet looked at. Nothing on 1.x.
    Initializing,
    /// The document could not be made a job, such as for a missing filter; tried again. `error` without an id on
    /// 1.x.
    Error,
    /// A job that waits. Nothing on 1.x.
    Pending,
    /// A job that runs. `triggered` on 1.x, with an active task.
    Running,
    /// A job that crashed and waits to be tried again. `error` on 1.x.
    Crashing,
    /// Done. Written into the document.
    Completed,
    /// Given up. Written into the document; `error` on 1.x.
    Failed,
}

impl ReplicationState {
    /// All of them, as `states=` is refused with.
    pub(crate) const ALL: [ReplicationState; 7] = [
        ReplicationState::Initializing,
        ReplicationState::Error,
        ReplicationState::Running,
        ReplicationState::Pending,
        ReplicationState::Crashing,
        ReplicationState::Completed,
        ReplicationState::Failed,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            ReplicationState::Initializing => "initializing",
            ReplicationState::Error => "error",
            ReplicationState::Pending => "pending",
            ReplicationState::Running => "running",
            ReplicationState::Crashing => "crashing",
            ReplicationState::Completed => "completed",
            ReplicationState::Failed => "failed",
        }
    }

    pub(crate) fn parse(word: &str) -> Option<ReplicationState> {
        ReplicationState::ALL.into_iter().find(|state| state.as_str() == word)
    }

    fn is_terminal(self) -> bool {
        matches!(self, ReplicationState::Completed | ReplicationState::Failed)
    }
}

/// Counters of a replication; what a version does not know is left out there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// `revisions_checked`.
    pub revisions_checked: u64,
    /// `missing_revisions_found`.
    pub missing_revisions_found: u64,
    /// `docs_read`.
    pub docs_read: u64,
    /// `docs_written`.
    pub docs_written: u64,
    /// `doc_write_failures`.
    pub doc_write_failures: u64,
    /// `changes_pending`; CouchDB says `null` until it knows.
    pub changes_pending: Option<u64>,
    /// `bulk_get_docs` and `bulk_get_attempts`, 3.x.
    pub bulk_get_docs: u64,
    /// `source_seq` and `through_seq`; an integer on 1.x.
    pub source_seq: String,
    /// `checkpointed_source_seq`; an integer on 1.x.
    pub checkpointed_source_seq: String,
}

impl Default for Progress {
    /// Nothing done yet.
    fn default() -> Progress {
        Progress {
            revisions_checked: 0,
            missing_revisions_found: 0,
            docs_read: 0,
            docs_written: 0,
            doc_write_failures: 0,
            changes_pending: None,
            bulk_get_docs: 0,
            source_seq: "0".to_owned(),
            checkpointed_source_seq: "0".to_owned(),
        }
    }
}

/// One thing that happened to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// When; CouchDB shows seconds.
    pub at: Timestamp,
    /// `added`, `started`, `stopped` or `crashed`.
    pub kind: &'static str,
    /// Why it crashed.
    pub reason: Option<String>,
}

/// What a test says of a replication.
#[derive(Debug, Clone)]
pub struct Replication {
    /// In which state it is.
    pub state: ReplicationState,
    /// What it says of an error: in `info` and in the history, in `_replication_state_reason` where that is
    /// written.
    pub reason: Option<String>,
    /// `info` of a running job on 3.x, what an active task shows, and `_replication_stats` of a completed one. Without
    /// it `info` is `null`.
    pub progress: Option<Progress>,
    /// `error_count`.
    pub error_count: u64,
    /// The history, newest first; empty: it grows by what the new state implies.
    pub history: Vec<Happened>,
    /// `id`, with `+continuous` where it is; else made from the document.
    pub id: Option<String>,
    /// `start_time`; else that of before, or now.
    pub start_time: Option<Timestamp>,
    /// `last_updated`; else that of the newest history entry, or now where there is no job.
    pub last_updated: Option<Timestamp>,
}

impl Replication {
    /// In a state, without an error.
    pub fn new(state: ReplicationState) -> Replication {
        Replication {
            state,
            reason: None,
            progress: None,
            error_count: 0,
            history: Vec::new(),
            id: None,
            start_time: None,
            last_updated: None,
        }
    }

    /// In a state of error, for so many times.
    pub fn failing(state: ReplicationState, reason: &str, error_count: u64) -> Replication {
        Replication { reason: Some(reason.to_owned()), error_count, ..Replication::new(state) }
    }

    /// In a state, having done something.
    pub fn with_progress(state: ReplicationState, progress: Progress) -> Replication {
        Replication { progress: Some(progress), ..Replication::new(state) }
    }
}

/// A replication as the scheduler knows it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// The revision it was said of, and of which incarnation of its database.
    rev: Rev,
    incarnation: u64,
    pub(crate) said: Replication,
    pub(crate) id: String,
    pub(crate) source: Value,
    pub(crate) target: Value,
    pub(crate) continuous: bool,
    pub(crate) start_time: Timestamp,
    pub(crate) last_updated: Timestamp,
    pub(crate) history: Vec<Happened>,
    /// What its process is called.
    pub(crate) pid: u64,
}

/// All that the scheduler knows, and how it is made to forget.
#[derive(Debug, Default)]
pub(crate) struct Replicator {
    /// By database, then by document.
    entries: BTreeMap<String, BTreeMap<String, Entry>>,
    /// Jobs of `_replicate`, by id.
    pub(crate) transient: BTreeMap<String, Entry>,
    /// Rows to leave out of the next so many listings.
    pub(crate) hidden: BTreeMap<(String, String), u32>,
    /// What rows are to show after the next listings that have them.
    scripts: BTreeMap<(String, String), VecDeque<Replication>>,
    pub(crate) n_listings: u64,
    pub(crate) n_rows: u64,
    n_processes: u64,
}

impl Replicator {
    fn of(&mut self, name: &str) -> &mut BTreeMap<String, Entry> {
        self.entries.entry(name.to_owned()).or_default()
    }

    /// What is known of a document's winning revision.
    pub(crate) fn entry(&self, name: &str, db: &Database, id: &str, rev: &Rev) -> Option<&Entry> {
        let entry = self.entries.get(name)?.get(id)?;
        (entry.rev == *rev && entry.incarnation == db.incarnation).then_some(entry)
    }

    /// Everything known of documents that are still as they were, by database and document.
    pub(crate) fn live<'a>(
        &'a self,
        databases: &'a BTreeMap<String, Database>,
    ) -> impl Iterator<Item = (&'a str, &'a str, &'a Entry)> {
        let entries = self.entries.iter().flat_map(|(name, ids)| ids.keys().map(move |id| (name, id)));
        entries.filter_map(|(name, id)| {
            let db = databases.get(name)?;
            let entry = self.entry(name, db, id, db.doc(id)?.winner())?;
            Some((name.as_str(), id.as_str(), entry))
        })
    }
}

impl StandIn {
    /// Writes a replication document as an admin does; its revision. The database is made when it is missing.
    ///
    /// CouchDB adds the `owner`, so do we. Over a document that is there it is an edit.
    ///
    /// # Errors
    /// `body` is no JSON object.
    pub fn put_replication(&self, db: &str, id: &str, body: &Value) -> Result<String> {
        let mut body = body.clone();
        let members = body.as_object_mut();
        let members = members.ok_or_else(|| Error::new(Kind::BadRequest, "expected a JSON object"))?;
        let flavour = self.world.change(|state| {
            let _ = state.create_db(db);
            let owner = state.admin.as_ref().map(|(name, _)| name.clone());
            members.entry("owner").or_insert(json!(owner));
            state.flavour
        });
        if flavour != Flavour::V3 && self.winner(db, DESIGN).is_none() {
            self.put(db, DESIGN, &json!({"language": "javascript", "validate_doc_update": "(left out)"}))?;
        }
        self.put(db, id, &body)
    }

    /// Says in which state the replication of a document is, and does what CouchDB does then: writes it into the
    /// document or shows it in `_scheduler`.
    ///
    /// # Errors
    /// No such database or document.
    pub fn replicate(&self, db: &str, id: &str, replication: Replication) -> Result<()> {
        self.world.change(|state| replicate(state, db, id, replication))
    }

    /// As [`StandIn::replicate`] with the first of these, and with each of the others in turn after a listing of
    /// `_scheduler/docs` that had the row; the last one stays.
    ///
    /// # Errors
    /// No such database or document, or no state.
    pub fn replicate_by_listing(
        &self,
        db: &str,
        id: &str,
        states: impl IntoIterator<Item = Replication>,
    ) -> Result<()> {
        let mut states: VecDeque<Replication> = states.into_iter().collect();
        let first = states.pop_front().ok_or_else(|| Error::new(Kind::BadRequest, "expected a state"))?;
        self.world.change(|state| {
            replicate(state, db, id, first)?;
            state.replicator.scripts.insert((db.to_owned(), id.to_owned()), states);
            Ok(())
        })
    }

    /// How many states of [`StandIn::replicate_by_listing`] are still to come.
    pub fn n_states_to_come(&self, db: &str, id: &str) -> usize {
        let key = (db.to_owned(), id.to_owned());
        self.world.lock().replicator.scripts.get(&key).map_or(0, VecDeque::len)
    }

    /// Says in which state a replication of `_replicate` is; `id` with `+continuous` where it is. A terminal state
    /// ends it.
    pub fn replicate_transient(&self, id: &str, source: &str, target: &str, replication: Replication) {
        self.world.change(|state| {
            let replicator = &mut state.replicator;
            let before = replicator.transient.remove(id);
            if replication.state.is_terminal() {
                return;
            }
            replicator.n_processes += 1;
            let doc = json!({"source": source, "target": target, "continuous": id.ends_with("+continuous")});
            let replication = Replication { id: Some(id.to_owned()), ..replication };
            let rev = Rev { generation: 0, hash: String::new() };
            let entry = entry(before.as_ref(), rev, 0, &doc, replication, replicator.n_processes);
            replicator.transient.insert(id.to_owned(), entry);
        });
    }

    /// Leaves a document's row out of the next so many listings of `_scheduler/docs` that would have it.
    pub fn hide_replication(&self, db: &str, id: &str, n_listings: u32) {
        let key = (db.to_owned(), id.to_owned());
        self.world.change(|state| state.replicator.hidden.insert(key, n_listings));
    }

    /// Forgets what the scheduler knows of a document, as between a start of the server and the moment it looked at
    /// the document: no row, and no state where the document is asked for.
    pub fn forget_replication(&self, db: &str, id: &str) {
        self.world.change(|state| state.replicator.of(db).remove(id));
    }

    /// As [`StandIn::forget_replication`] for all, `_replicate`'s too: a restart of the server.
    pub fn forget_replications(&self) {
        self.world.change(|state| {
            state.replicator.entries.clear();
            state.replicator.transient.clear();
        });
    }
}

/// What comes behind a listing that had these rows.
pub(crate) fn on_listed(state: &mut State, name: &str, ids: Vec<String>) {
    for id in ids {
        let key = (name.to_owned(), id);
        if let Some(next) = state.replicator.scripts.get_mut(&key).and_then(VecDeque::pop_front) {
            // The document may be gone; then so is its script.
            let _ = replicate(state, name, &key.1, next);
        }
    }
}

fn replicate(state: &mut State, name: &str, id: &str, replication: Replication) -> Result<()> {
    let flavour = state.flavour;
    state.replicator.n_processes += 1;
    let pid = state.replicator.n_processes;
    let db = state.db(name)?;
    let missing = || Error::new(Kind::NotFound, format!("no document `{id}` in `{name}`"));
    let doc = db.doc(id).filter(|doc| !doc.is_deleted(doc.winner())).ok_or_else(missing)?;
    let (rev, incarnation) = (doc.winner().clone(), db.incarnation);
    let body = doc.json(id, &rev, false).ok_or_else(missing)?;
    let value: Value = serde_json::from_str(&body).unwrap_or_default();
    let before = state.replicator.entry(name, &state.databases[name], id, &rev).cloned();
    let mut entry = entry(before.as_ref(), rev, incarnation, &value, replication, pid);
    if let Some(written) = written(flavour, &entry) {
        entry.rev = write(state.db(name)?, flavour, id, &entry.rev, &body, written)?;
    }
    let known = state.replicator.of(name);
    if flavour != Flavour::V1 && entry.said.state.is_terminal() {
        known.remove(id);
    } else {
        known.insert(id.to_owned(), entry);
    }
    Ok(())
}

fn entry(
    before: Option<&Entry>,
    rev: Rev,
    incarnation: u64,
    doc: &Value,
    said: Replication,
    pid: u64,
) -> Entry {
    let now = sys::wall();
    let history = match (said.history.is_empty(), before) {
        (false, _) => said.history.clone(),
        (true, Some(before)) => grown(before.history.clone(), &said, now),
        (true, None) => grown(Vec::new(), &said, now),
    };
    let has_job = !matches!(said.state, ReplicationState::Initializing | ReplicationState::Error);
    let newest = history.first().filter(|_| has_job).map(|newest| newest.at);
    let continuous = doc["continuous"] == true;
    Entry {
        rev,
        incarnation,
        id: said.id.clone().unwrap_or_else(|| replication_id(doc, continuous)),
        source: doc["source"].clone(),
        target: doc["target"].clone(),
        continuous,
        start_time: said.start_time.or(before.map(|before| before.start_time)).unwrap_or(now),
        last_updated: said.last_updated.or(newest).unwrap_or(now),
        history,
        pid: before.filter(|before| before.said.state == said.state).map_or(pid, |before| before.pid),
        said,
    }
}

/// Adds to a history, newest first, what must have happened when a job is in this state now.
fn grown(mut history: Vec<Happened>, said: &Replication, at: Timestamp) -> Vec<Happened> {
    let add = |history: &mut Vec<Happened>, kind, reason| history.insert(0, Happened { at, kind, reason });
    let started = |history: &[Happened]| history.first().is_some_and(|newest| newest.kind == "started");
    match said.state {
        ReplicationState::Initializing | ReplicationState::Error => return history,
        _ if history.is_empty() => add(&mut history, "added", None),
        _ => {}
    }
    match said.state {
        ReplicationState::Pending if started(&history) => add(&mut history, "stopped", None),
        ReplicationState::Running | ReplicationState::Crashing if !started(&history) => {
            add(&mut history, "started", None);
        }
        _ => {}
    }
    if said.state == ReplicationState::Crashing {
        add(&mut history, "crashed", said.reason.clone());
    }
    history.truncate(HISTORY_MAX);
    history
}

/// 32 hexadecimal digits that differ where CouchDB's differ, and what `continuous` adds.
fn replication_id(doc: &Value, continuous: bool) -> String {
    let what = ["source", "target", "filter", "query_params", "doc_ids", "selector"].map(|name| &doc[name]);
    let hash = Sha256::digest(json!(what).to_string().as_bytes());
    let hash = u128::from_be_bytes(hash[..16].try_into().expect("a digest has more than 16 bytes"));
    format!("{hash:032x}{}", if continuous { "+continuous" } else { "" })
}

/// A member of a document: what it gets, or `None` to be taken away.
type Written = Vec<(&'static str, Option<String>)>;

/// What CouchDB writes into the document, in its order; `None` when nothing.
///
/// Source: `couch_replicator_manager.erl` 1.7.1, `couch_replicator_docs.erl` 2.2.0 and 3.5.0.
fn written(flavour: Flavour, entry: &Entry) -> Option<Written> {
    let reason = || Some(quoted(entry.said.reason.as_deref().unwrap_or_default()));
    let base_id = || Some(quoted(entry.id.trim_end_matches("+continuous")));
    let state = |word: &str| ("_replication_state", Some(quoted(word)));
    let stats = || {
        let mut stats = entry.said.progress.clone().unwrap_or_default().members(flavour, false);
        if flavour != Flavour::V1 {
            stats.push(("start_time", quoted(&time(entry.start_time))));
        }
        Some(object(&stats))
    };
    const REASON: &str = "_replication_state_reason";
    const STATS: &str = "_replication_stats";
    match (flavour, entry.said.state) {
        (_, ReplicationState::Completed) => {
            let id = (flavour == Flavour::V1).then(|| ("_replication_id", base_id()));
            let done = [(REASON, None), (STATS, stats())];
            Some([state("completed")].into_iter().chain(id).chain(done).collect())
        }
        (Flavour::V1, ReplicationState::Running) => {
            Some(vec![state("triggered"), (REASON, None), ("_replication_id", base_id()), (STATS, None)])
        }
        (Flavour::V1, ReplicationState::Error) => Some(vec![state("error"), (REASON, reason())]),
        (Flavour::V1, ReplicationState::Crashing | ReplicationState::Failed) => {
            Some(vec![state("error"), (REASON, reason()), ("_replication_id", base_id())])
        }
        (_, ReplicationState::Failed) => Some(vec![state("failed"), (STATS, None), (REASON, reason())]),
        _ => None,
    }
}

/// Writes members into a document as CouchDB's replicator: in their places where they are, else at the end; with the
/// time when the state is another. Nothing is written when nothing changes. The revision then.
fn write(
    db: &mut Database,
    flavour: Flavour,
    id: &str,
    rev: &Rev,
    json: &str,
    written: Written,
) -> Result<Rev> {
    let mut body = members(json).map_err(said)?;
    let before = body.clone();
    for (name, value) in written {
        let Some(value) = value else {
            body.retain(|(known, _)| known != name);
            continue;
        };
        let changed = store(&mut body, name, value);
        if name == "_replication_state" && changed {
            store(&mut body, "_replication_state_time", quoted(&doc_time(flavour, sys::wall())));
        }
    }
    if body == before {
        return Ok(rev.clone());
    }
    let text: Vec<(&str, String)> = body.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    db.write(id, Incoming::parse(&object(&text)).map_err(said)?).map_err(said)
}

/// Sets a member; whether it had another value.
fn store(body: &mut Vec<(String, String)>, name: &str, value: String) -> bool {
    match body.iter_mut().find(|(known, _)| known == name) {
        Some((_, old)) if *old == value => return false,
        Some((_, old)) => *old = value,
        None => body.push((name.to_owned(), value)),
    }
    true
}

impl Progress {
    /// The counters as the version writes them; `running` ones have the places too.
    pub(crate) fn members(&self, flavour: Flavour, running: bool) -> Vec<(&'static str, String)> {
        let mut members = vec![
            ("revisions_checked", self.revisions_checked.to_string()),
            ("missing_revisions_found", self.missing_revisions_found.to_string()),
            ("docs_read", self.docs_read.to_string()),
            ("docs_written", self.docs_written.to_string()),
        ];
        if flavour != Flavour::V1 {
            members.push(("changes_pending", or_null(self.changes_pending)));
        }
        members.push(("doc_write_failures", self.doc_write_failures.to_string()));
        if flavour == Flavour::V3 {
            members.push(("bulk_get_docs", self.bulk_get_docs.to_string()));
            members.push(("bulk_get_attempts", self.bulk_get_docs.to_string()));
        }
        members.push(("checkpointed_source_seq", seq(flavour, &self.checkpointed_source_seq)));
        if running {
            members.push(("source_seq", seq(flavour, &self.source_seq)));
            members.push(("through_seq", seq(flavour, &self.source_seq)));
        }
        members
    }
}

pub(crate) fn or_null(number: Option<u64>) -> String {
    number.map_or_else(|| "null".to_owned(), |number| number.to_string())
}

/// A seq as JSON: 1.x has numbers.
pub(crate) fn seq(flavour: Flavour, seq: &str) -> String {
    if flavour == Flavour::V1 { seq.to_owned() } else { quoted(seq) }
}

/// Members as a JSON object; the values are JSON.
pub(crate) fn object(members: &[(&str, String)]) -> String {
    let members: Vec<String> =
        members.iter().map(|(name, value)| format!("{}:{value}", quoted(name))).collect();
    format!("{{{}}}", members.join(","))
}

/// `2026-11-21T21:45:47Z`.
pub(crate) fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// A time in a document: 1.x writes the offset.
fn doc_time(flavour: Flavour, at: Timestamp) -> String {
    if flavour == Flavour::V1 { at.strftime("%Y-%m-%dT%H:%M:%S+00:00").to_string() } else { time(at) }
}
