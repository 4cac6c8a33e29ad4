//! One look: the database's own feed, then the scheduler, or on 1.x and 2.0 the documents and what runs.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::couch::feed::{Feed, FeedEnd, FeedKind, FeedRequest};
use crate::couch::scheduler::{self, Page};
use crate::error::{Error, Kind, Result};
use crate::pure::changes::{self, Item, RowDoc};
use crate::pure::rep_doc::{self, Finding, Origin};
use crate::pure::replication::{Info, Job, Progress, Row, State};
use crate::pure::transitions::Told;
use crate::pure::transitions::known::TRANSIENT;
use crate::replication::Monitor;
use crate::sys;

/// Rows of a page of the database's feed.
const PAGE_ROWS: u32 = 500;
/// Longer documents are not looked into, in bytes.
const DOC_BYTES_MAX: usize = 1024 * 1024;
/// An open feed without a byte for this much longer than its `timeout` is dead.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);

/// Something to be told, with what the look knows of it.
pub(super) struct News {
    pub(super) told: Told,
    pub(super) row: Option<Row>,
    pub(super) job: Option<Job>,
    pub(super) findings: Option<Value>,
    /// Source and target of its document, where that was read.
    pub(super) endpoints: (Option<String>, Option<String>),
}

impl News {
    pub(super) fn of(told: Told) -> News {
        News { told, row: None, job: None, findings: None, endpoints: (None, None) }
    }
}

impl Monitor {
    /// Whether this CouchDB has `_scheduler`.
    pub(super) fn has_scheduler(&self) -> Result<bool> {
        let page: Result<Page<Row>> =
            scheduler::docs_page(&self.looking.memory.server, Some(&self.looking.memory.telling.db), 0, 1);
        match page {
            Ok(_) => Ok(true),
            // 2.0: no such handler, so it is taken for a database's name.
            Err(error) if matches!(error.kind(), Kind::BadRequest | Kind::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Looks at everything once, stores what changed, and does what is to be done.
    pub(super) fn look(&mut self, feed: &mut Feed) -> Result<()> {
        // Documents first: a row may then be of one that is known.
        if self.opened().found.is_some() {
            self.read_documents(feed)?;
        }
        self.opened_mut().machine.begin_poll();
        let looked = match self.opened().has_scheduler {
            true => self.look_at_scheduler(),
            false => self.look_at_documents(),
        };
        // What was seen before a page failed counts, but for the first look; when we are stopped, not everything that
        // follows from a row is kept by then.
        match looked {
            Err(error)
                if self.opened().machine.remembered.is_first_look() || error.kind() == Kind::Stopped =>
            {
                return Err(error);
            }
            Err(error) => {
                self.store()?;
                return Err(error);
            }
            Ok(()) => {}
        }
        let gone = self.opened_mut().machine.end_poll();
        self.keep(gone.into_iter().map(News::of).collect())?;
        let machine = &mut self.opened_mut().machine;
        let due: Vec<News> =
            std::iter::from_fn(|| machine.next_resubmission(sys::now())).map(News::of).collect();
        self.keep(due)?;
        self.store()?;
        self.resubmit();
        Ok(())
    }

    fn look_at_scheduler(&mut self) -> Result<()> {
        let server = self.looking.memory.server.clone();
        let db = self.looking.memory.telling.db.clone();
        let mut runs = None;
        let mut failure = None;
        scheduler::all(|skip, limit| scheduler::docs_page(&server, Some(&db), skip, limit), &mut |rows| {
            let seen = self.looking.memory.check().and_then(|()| self.on_rows(rows, &mut runs));
            failure = seen.err();
            failure.is_none()
        })?;
        if let Some(error) = failure {
            return Err(error);
        }
        // `_replicate` has no database; whoever watches the usual one is told of it.
        if db != "_replicator" {
            return Ok(());
        }
        let mut failure = None;
        scheduler::all(|skip, limit| scheduler::jobs_page(&server, skip, limit), &mut |jobs| {
            let jobs = jobs.into_iter().filter(|job: &Job| job.database.is_none() && job.doc_id.is_none());
            let seen = self.looking.memory.check().and_then(|()| self.on_jobs(jobs.collect()));
            failure = seen.err();
            failure.is_none()
        })?;
        failure.map_or(Ok(()), Err)
    }

    fn on_rows(&mut self, mut rows: Vec<Row>, runs: &mut Option<HashMap<String, Progress>>) -> Result<()> {
        // First: when it cannot be had, nothing of these rows may be known yet.
        for row in rows.iter_mut().filter(|row| row.state == State::Running && row.info == Info::None) {
            self.add_progress(row, runs)?;
        }
        let mut news = Vec::new();
        for row in rows {
            let key = row.doc_id.clone();
            let told = self.opened_mut().machine.on_row(&key, &row, sys::now());
            news.extend(told.into_iter().map(|told| News { row: Some(row.clone()), ..News::of(told) }));
        }
        self.keep(news)
    }

    fn on_jobs(&mut self, jobs: Vec<Job>) -> Result<()> {
        let mut news = Vec::new();
        for job in jobs {
            let key = format!("{TRANSIENT}{}", job.id);
            let row = row_of(&job);
            let told = self.opened_mut().machine.on_row(&key, &row, sys::now());
            let of = |told| News { row: Some(row.clone()), job: Some(job.clone()), ..News::of(told) };
            news.extend(told.into_iter().map(of));
        }
        self.keep(news)
    }

    /// 2.x says what a replication has done only in `_active_tasks`; asked once a look, when something needs it.
    fn add_progress(&self, row: &mut Row, runs: &mut Option<HashMap<String, Progress>>) -> Result<()> {
        if runs.is_none() {
            let tasks = scheduler::tasks(&self.looking.memory.server)?;
            *runs =
                Some(tasks.into_iter().map(|task| (id_of(&task.replication_id), task.progress())).collect());
        }
        let progress = row.id.as_deref().and_then(|id| runs.as_ref()?.get(&id_of(id)));
        if let Some(progress) = progress {
            row.info = Info::Progress(progress.clone());
        }
        Ok(())
    }

    /// 1.x and 2.0: documents bear their states.
    fn look_at_documents(&mut self) -> Result<()> {
        let is_running = |row: &Row| row.state == State::Running;
        let mut runs = None;
        let mut rows: Vec<Row> = self.opened().rows.values().cloned().collect();
        for row in rows.iter_mut().filter(|row| is_running(row)) {
            self.add_progress(row, &mut runs)?;
        }
        let mut none = Some(HashMap::new());
        self.on_rows(rows, &mut none)
    }

    // --- The database's own feed ------------------------------------------------------------------------------

    /// Reads all documents once: which are there, and whether they can work.
    fn read_documents(&mut self, feed: &mut Feed) -> Result<()> {
        loop {
            let (went_on, n_rows) = self.read_feed(feed, FeedKind::Page { limit: PAGE_ROWS })?;
            if !went_on {
                return Err(Error::new(Kind::Stopped, "stopped"));
            }
            if n_rows < PAGE_ROWS as usize {
                break;
            }
        }
        let opened = self.opened();
        let found = opened.found.as_ref();
        let is_found = |key: &str| found.is_some_and(|found| found.contains(key));
        let missing = opened.machine.known_keys().filter(|key| !is_found(key));
        let missing: Vec<String> = missing.map(str::to_owned).collect();
        for key in missing {
            // The feed of a lagging node may not show it yet.
            if scheduler::document(&self.looking.memory.server, &self.looking.memory.telling.db, &key)?
                .is_none()
            {
                let gone = self.opened_mut().machine.on_gone(&key);
                self.keep(gone.into_iter().map(News::of).collect())?;
            }
        }
        self.opened_mut().found = None;
        Ok(())
    }

    /// Waits for changes for so long; whether the feed was not closed, and how many there were.
    pub(super) fn follow(&mut self, feed: &mut Feed, timeout: Duration) -> Result<(bool, usize)> {
        // Less than a millisecond would be asked for as none.
        let timeout = timeout.max(Duration::from_millis(1));
        self.read_feed(feed, FeedKind::Continuous { timeout })
    }

    fn read_feed(&mut self, feed: &mut Feed, kind: FeedKind) -> Result<(bool, usize)> {
        let timeout = match kind {
            FeedKind::Continuous { timeout } => timeout,
            FeedKind::Page { .. } => Duration::from_secs(60),
        };
        let request = FeedRequest {
            db: self.looking.memory.telling.db.clone(),
            since: self.opened().since.clone(),
            kind,
            filter: None,
            include_docs: true,
            conflicts: false,
            doc_bytes_max: DOC_BYTES_MAX,
            keeps_lines: false,
            silence: Some(timeout + SILENCE_MARGIN),
            deadline: None,
        };
        let is_page = matches!(kind, FeedKind::Page { .. });
        let mut all = Vec::new();
        let end = feed.read(&request, &mut |items: &mut Vec<Item>| {
            all.append(items);
            // The first change wakes us; what else came with it is taken, too.
            let has_rows = all.iter().any(|item| matches!(item, Item::Row(_)));
            if is_page || !has_rows { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        if end == FeedEnd::Closed {
            return Ok((false, 0));
        }
        let mut n_rows = 0;
        for item in all {
            let seq = match item {
                Item::Row(row) => {
                    n_rows += 1;
                    let seq = row.seq.clone();
                    self.on_change(row)?;
                    seq
                }
                // Behind a full page more may follow; its last row counts.
                Item::End { last_seq, .. } => last_seq,
                Item::Fault { .. } => None,
            };
            if let Some(seq) = seq {
                self.opened_mut().since = seq;
            }
        }
        Ok((true, n_rows))
    }

    fn on_change(&mut self, row: changes::Row) -> Result<()> {
        if row.id.starts_with("_design/") {
            return Ok(());
        }
        let opened = self.opened_mut();
        if row.deleted {
            opened.rows.remove(&row.id);
            if let Some(found) = &mut opened.found {
                found.remove(&row.id);
            }
            let gone = opened.machine.on_gone(&row.id);
            return self.keep(gone.into_iter().map(News::of).collect());
        }
        opened.machine.on_document(&row.id);
        if let Some(found) = &mut opened.found {
            found.insert(row.id.clone());
        }
        let RowDoc::Json(doc) = row.doc else { return Ok(()) };
        let Ok(members) = serde_json::from_str::<Map<String, Value>>(doc.get()) else { return Ok(()) };
        if !opened.has_scheduler {
            match Row::of_document(&row.id, &members) {
                Some(found) => drop(opened.rows.insert(row.id.clone(), found)),
                None => drop(opened.rows.remove(&row.id)),
            }
        }
        self.check(&row.id, members)
    }

    fn check(&mut self, key: &str, members: Map<String, Value>) -> Result<()> {
        let endpoints = (url_of(members.get("source")), url_of(members.get("target")));
        let members = Value::Object(members);
        let findings = rep_doc::check(&members, self.opened().version, Origin::Stored);
        let is_invalid = findings.iter().any(Finding::is_error);
        // Keyed: it is stored, and made of the passwords in the document, too.
        let fingerprint = self.looking.memory.key.number(rep_doc::fingerprint(&members));
        let told = self.opened_mut().machine.on_checked(key, fingerprint, is_invalid);
        let Some(told) = told else { return Ok(()) };
        let findings = serde_json::to_value(&findings).ok();
        self.keep(vec![News { endpoints, findings, ..News::of(told) }])
    }
}

/// A URL, or the `url` of an object.
pub(super) fn url_of(end: Option<&Value>) -> Option<String> {
    match end? {
        Value::String(url) => Some(url.clone()),
        Value::Object(members) => members.get("url")?.as_str().map(str::to_owned),
        _ => None,
    }
}

/// `_scheduler` ends the id of a continuous replication in `+continuous`, `_active_tasks` of 1.x, too, documents do not.
fn id_of(id: &str) -> String {
    id.split('+').next().unwrap_or(id).to_owned()
}

/// What a job without a document would have for a row.
fn row_of(job: &Job) -> Row {
    let crash = job.history.first().filter(|happened| happened.what == "crashed");
    let info = match crash.and_then(|crash| crash.reason()) {
        Some(reason) if job.pid.is_none() => Info::Error(reason),
        _ => job.info.clone(),
    };
    Row {
        database: None,
        doc_id: format!("{TRANSIENT}{}", job.id),
        id: Some(job.id.clone()),
        node: job.node.clone(),
        source: job.source.clone(),
        target: job.target.clone(),
        state: job.state(),
        info,
        error_count: job.crashes().map_or(0, |(n, _, _)| n),
        start_time: job.start_time,
        last_updated: job.history.first().map(|happened| happened.timestamp),
    }
}
