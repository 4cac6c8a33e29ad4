//! What is told of databases themselves, that they came, changed or went, and what is remembered of them.
//!
//! The shell hears of databases by the lookout. It looks into those that [`DatabaseEvents::on_seen`] or a hint names and
//! says what it found ([`DatabaseEvents::on_found`], [`DatabaseEvents::on_gone`]); then it stores what is remembered, and
//! only then sends what [`DatabaseEvents::events_after`] gives.
//!
//! Guarantees that what happened is remembered together with its event, so that a kill loses neither; that a number once
//! given to an event is never given to another (`webhook-id`s are made of it); and that what waits for an endpoint that
//! is down is bounded: of a database it is at most its last coming or going, and that it was changed since. Events that
//! may be on their way are left alone. What is there when a webhook first starts is known, not told; what is written to it
//! before the first look into it is told when CouchDB tells of it.

pub mod known;
pub mod telling;

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde::Serialize;

use crate::pure::checkpoint::Mark;
use crate::pure::database_events::known::Known;
use crate::pure::remembered::{Bucket, Kept, Remembered};
use crate::pure::seq::Seq;

/// It appeared. What it held by then is part of that, and not told on its own.
pub const CREATED: &str = "database.created";
/// Documents of it were written, once or a thousand times.
pub const UPDATED: &str = "database.updated";
/// It is gone.
pub const DELETED: &str = "database.deleted";
/// One of its design documents was written; told beside [`UPDATED`].
pub const DDOC_UPDATED: &str = "database.ddoc_updated";
/// It was deleted and made again.
pub const RECREATED: &str = "database.recreated";

/// Every type there is.
pub const TYPES: [&str; 5] = [CREATED, UPDATED, DELETED, DDOC_UPDATED, RECREATED];

/// Fingerprints kept of a database: a cluster of three nodes has a handful of spellings for one state.
const CLEAN_MAX: usize = 16;

/// What was found in a database that was looked into.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The mark that it bears.
    pub mark: Mark,
    /// The end of its changes.
    pub through: Seq,
    /// Whether there are changes behind the place that was known, where it bears the mark that was known.
    pub has_changed: bool,
    /// Ids of design documents among them.
    pub ddocs: Vec<String>,
}

/// `data` of the payload (DESIGN §5).
#[derive(Serialize)]
struct Data<'a> {
    webhook: &'a str,
    db: &'a str,
    /// Of a design document.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
}

/// The machine.
#[derive(Debug)]
pub struct DatabaseEvents {
    webhook: String,
    /// By name. Told is all that is found after the first look, which lists what was there when the webhook first started.
    pub remembered: Remembered<Known>,
    /// Seen since the walk under way began.
    seen: BTreeSet<String>,
    /// Events up to here may be on their way.
    handed: u64,
}

impl DatabaseEvents {
    /// From what is stored of each document, if anything is, in the database that bears `mark`; `through`: events up to
    /// this number need not be told any more. `is_quiet`: what is found where nothing is stored is not told.
    pub fn new(
        webhook: &str,
        mark: Mark,
        stored: Vec<Option<Bucket<Known>>>,
        through: u64,
        is_quiet: bool,
    ) -> DatabaseEvents {
        let remembered = Remembered::new(mark, stored, through, is_quiet);
        // An earlier life of ours may have sent any of them.
        let handed = remembered.last();
        DatabaseEvents { webhook: webhook.to_owned(), remembered, seen: BTreeSet::new(), handed }
    }

    /// What was there at the first start, all of it. What comes later is told.
    pub fn on_there(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            if self.remembered.is_quiet(&name) && self.remembered.known(&name).is_none() {
                self.remembered.insert(&name, Known::default());
            }
        }
        self.remembered.end_first_look();
    }

    /// What is known of a database that was looked into: its mark, and the end of its changes then.
    pub fn known(&self, db: &str) -> Option<(Mark, Seq)> {
        let known = self.remembered.known(db)?;
        Some((known.mark?, known.through()?))
    }

    /// A walk has come across a database; whether it is to be looked into.
    pub fn on_seen(&mut self, db: &str, fingerprint: u64) -> bool {
        self.seen.insert(db.to_owned());
        self.remembered.known(db).is_none_or(|known| !known.clean.contains(&fingerprint))
    }

    /// CouchDB tells that something happened to a database. Where that cannot be seen by a look, the hint is believed: of
    /// one that was there at the first start what was written before the first look is not behind its place.
    pub fn on_hinted(&mut self, db: &str) {
        let Some(known) = self.remembered.known(db) else { return };
        if (known.mark.is_none() || known.is_fresh) && !known.is_hinted {
            let known = Known { is_hinted: true, ..known.clone() };
            self.remembered.insert(db, known);
        }
    }

    /// A database was looked into after `fingerprint` was seen of it, if it was a walk that led there.
    pub fn on_found(&mut self, db: &str, found: Found, fingerprint: Option<u64>, at: Timestamp) {
        self.seen.insert(db.to_owned());
        let before = self.remembered.known(db).cloned();
        let next = Known::after(before.as_ref(), &found, fingerprint);
        match &before {
            None => self.tell(db, CREATED, at, None),
            // It was there at the first start, and is looked into for the first time.
            Some(Known { mark: None, is_hinted: false, .. }) => {}
            Some(before) if before.mark.is_some_and(|mark| mark != found.mark) => {
                self.tell(db, RECREATED, at, None);
            }
            Some(before) if found.has_changed || before.is_hinted => {
                self.tell(db, UPDATED, at, None);
                for ddoc in &found.ddocs {
                    self.tell(db, DDOC_UPDATED, at, Some(ddoc));
                }
            }
            Some(_) => {}
        }
        if before.as_ref() != Some(&next) {
            self.remembered.insert(db, next);
        }
    }

    /// CouchDB answers 404 for this database.
    pub fn on_gone(&mut self, db: &str, at: Timestamp) {
        if self.remembered.remove(db).is_some() {
            self.tell(db, DELETED, at, None);
        }
    }

    /// A walk has come to its end. Gives the known databases that it did not come across: they may be gone.
    pub fn on_swept(&mut self) -> Vec<String> {
        let seen = std::mem::take(&mut self.seen);
        let known = self.remembered.all().map(|(db, _)| db);
        known.filter(|db| !seen.contains(*db)).map(str::to_owned).collect()
    }

    /// Numbers an event and keeps it; what waits of the same database and is part of it need not be told any more.
    fn tell(&mut self, db: &str, event_type: &str, at: Timestamp, ddoc: Option<&str>) {
        let data = Data { webhook: &self.webhook, db, id: ddoc };
        let data = serde_json::to_string(&data).expect("texts are always JSON");
        let handed = self.handed;
        let waiting = || self.remembered.events_of(db).filter(move |kept| kept.n > handed);
        if is_update(event_type) {
            if !waiting().any(|kept| kept.event_type == event_type && kept.data == data) {
                self.remembered.keep(db, event_type, at, data);
            }
            return;
        }
        let comes = waiting().rfind(|kept| !is_update(&kept.event_type)).map(|kept| kept.event_type.clone());
        self.remembered.take_back(db, handed);
        let event_type = match (comes.as_deref(), event_type) {
            // Nobody heard of it: nobody needs to know that it is gone, and if it came again, it came.
            (Some(CREATED), DELETED) => return,
            (Some(CREATED), RECREATED) => CREATED,
            (Some(DELETED), CREATED) => RECREATED,
            (_, event_type) => event_type,
        };
        self.remembered.keep(db, event_type, at, data);
    }

    /// Stored events behind a number, at most so many, in order. They count as sent from now on.
    pub fn events_after(&mut self, after: u64, n_max: usize) -> Vec<Kept> {
        let events: Vec<Kept> = self.remembered.events_after(after, n_max).into_iter().cloned().collect();
        self.handed = events.last().map_or(self.handed, |last| self.handed.max(last.n));
        events
    }
}

fn is_update(event_type: &str) -> bool {
    matches!(event_type, UPDATED | DDOC_UPDATED)
}

impl Known {
    /// What is known after a look. A fingerprint holds nothing new once what followed from it was found.
    fn after(before: Option<&Known>, found: &Found, fingerprint: Option<u64>) -> Known {
        let same = before.filter(|before| before.mark == Some(found.mark) && !found.has_changed);
        let mut clean = same.map(|before| before.clean.clone()).unwrap_or_default();
        if let Some(fingerprint) = fingerprint.filter(|fingerprint| !clean.contains(fingerprint)) {
            clean.push(fingerprint);
            let n_old = clean.len().saturating_sub(CLEAN_MAX);
            clean.drain(..n_old);
        }
        // Where nothing changed the place that is known is as good: it need not be stored again.
        let through = same.and_then(|before| before.through.clone());
        let through = through.unwrap_or_else(|| found.through.as_json().to_owned());
        // CouchDB may yet tell of what was written before the first look.
        let was_fresh = |before: &Known| before.mark.is_none() || (same.is_some() && before.is_fresh);
        let is_fresh = before.is_some_and(|before| !before.is_hinted && was_fresh(before));
        Known { mark: Some(found.mark), through: Some(through), clean, is_hinted: false, is_fresh }
    }
}

#[cfg(test)]
mod tests;
