//! What is looked up when something is to be told: history, checkpoint, and what the document alone says.
//!
//! Nothing of it is needed for telling: what CouchDB does not give is left out.

use jiff::Timestamp;
use serde_json::Value;

use crate::couch::scheduler;
use crate::error::Result;
use crate::pure::lag::{self, Checkpoint};
use crate::pure::replication::{Row, State};
use crate::pure::transitions::telling::{self, Details};
use crate::pure::transitions::{REMOVED, type_of};
use crate::replication::Monitor;
use crate::replication::look::{News, url_of};
use crate::sys;

/// Things told at once that are looked up: with more, as when a server that hundreds replicate from goes down, the
/// requests would take longer than the looks are apart.
const LOOK_UPS_MAX: usize = 100;

impl Monitor {
    /// Makes events of what is to be told and wanted.
    pub(super) fn keep(&mut self, news: Vec<News>) -> Result<()> {
        for (at, news) in news.into_iter().enumerate() {
            self.looking.memory.check()?;
            if !self.looking.memory.telling.wants_type(news.told.event_type) {
                continue;
            }
            let details = match at < LOOK_UPS_MAX {
                true => self.look_up(&news),
                false => Details { row: news.row.as_ref(), job: news.job.clone(), ..Details::default() },
            };
            let details = Details { findings: news.findings.clone(), ..details };
            let at = telling::at(&details, sys::wall());
            let data = telling::data(&self.looking.memory.telling, &news.told, &details);
            self.opened_mut().machine.keep(&news.told, at, data);
        }
        Ok(())
    }

    fn look_up<'a>(&self, news: &'a News) -> Details<'a> {
        let (server, db) = (&self.looking.memory.server, &self.looking.memory.telling.db);
        let mut details = Details {
            row: news.row.as_ref(),
            job: news.job.clone(),
            n_resubmissions: self.opened().machine.n_resubmissions(&news.told.key),
            ..Details::default()
        };
        if news.told.event_type == REMOVED {
            return details;
        }
        let ends = |row: &Row| row.source.is_some() && row.target.is_some();
        details.endpoints = news.endpoints.clone();
        let has_document = news.job.is_none() && news.findings.is_none();
        if has_document && !news.row.as_ref().is_some_and(ends) {
            let document = scheduler::document(server, db, &news.told.key).ok().flatten().unwrap_or_default();
            details.endpoints = (url_of(document.get("source")), url_of(document.get("target")));
        }
        let Some(row) = &news.row else { return details };
        let Some(id) = &row.id else { return details };
        if details.job.is_none() && row.state.is_trouble() && self.opened().has_scheduler {
            details.job = scheduler::job(server, id).ok().flatten();
        }
        self.look_up_lag(&mut details, row, id);
        details
    }

    fn look_up_lag(&self, details: &mut Details<'_>, row: &Row, id: &str) {
        let server = &self.looking.memory.server;
        let here = |end: &Option<String>| end.as_deref().and_then(|end| self.here.db(end));
        let (source, target) = (here(&row.source), here(&row.target));
        let read = |db: &String| scheduler::checkpoint(server, db, id).ok().flatten();
        let checkpoint = source.iter().chain(&target).find_map(read);
        let checkpoint = checkpoint.and_then(|document| Checkpoint::of(&document, sys::wall()));
        let counted = row.info.progress().and_then(lag::pending);
        if let (None, Some(source), Some(place)) =
            (counted, &source, checkpoint.as_ref().and_then(|checkpoint| checkpoint.source_last_seq.as_ref()))
        {
            let pending = scheduler::pending_after(server, self.opened().generation, source, place);
            details.changes_pending = pending.ok().flatten();
        }
        details.checkpoint = checkpoint;
    }

    /// Saves failed replications again that are counted as submitted; what cannot be saved is tried at the next look.
    pub(super) fn resubmit(&mut self) {
        let (server, db) = (&self.looking.memory.server, &self.looking.memory.telling.db);
        // Not one that failed once more since: that is another failure, to be counted first.
        let is_failed = |document: &Value, ended_at: Option<Timestamp>| {
            let time = document["_replication_state_time"].as_str().and_then(|time| time.parse().ok());
            let is_later =
                ended_at.zip(time).is_some_and(|(known, found): (Timestamp, Timestamp)| found > known);
            document["_replication_state"] == State::Failed.as_str() && !is_later
        };
        for (key, ended_at) in self.opened().machine.resubmitted() {
            if self.looking.memory.check().is_err() {
                return;
            }
            let place =
                format!("webhook `{}`, replication `{key}` of `{db}`", self.looking.memory.telling.webhook);
            let saved = match scheduler::document(server, db, &key) {
                // Somebody was first.
                Ok(document) if !document.as_ref().is_some_and(|one| is_failed(one, ended_at)) => continue,
                Ok(_) => scheduler::resubmit(server, db, &key).map(drop),
                Err(error) => Err(error),
            };
            match saved {
                Ok(()) => log::info!("{place} had {}: submitted again", type_of(State::Failed)),
                Err(error) => {
                    log::warn!("{place}: failed to submit it again: {error}; trying at the next look")
                }
            }
        }
    }
}
