//! What is told of databases themselves, that they came, changed or went, and what is remembered of them.
//!
//! The shell hears of databases by the lookout. It looks into those that [`DatabaseEvents::on_seen`] or a hint names and
//! says what it found ([`DatabaseEvents::on_found`], [`DatabaseEvents::on_gone`]); then it stores the documents that
//! [`DatabaseEvents::dirty`] names, and only then sends what [`DatabaseEvents::events_after`] gives.
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
use crate::pure::database_events::known::{BUCKETS, Bucket, Known, bucket_of};
use crate::pure::seq::Seq;
use crate::pure::transitions::known::Kept;

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
    mark: Mark,
    buckets: Vec<Bucket>,
    dirty: Vec<bool>,
    /// By bucket the lowest number that was taken back since it was stored: it is still there.
    taken_back: Vec<Option<u64>>,
    /// Buckets that were never stored: what there is of them at the first look is known, not told.
    is_quiet: Vec<bool>,
    /// Seen since the walk under way began.
    seen: BTreeSet<String>,
    last: u64,
    /// Events up to here are delivered, or dead letters.
    through: u64,
    /// Events up to here may be on their way.
    handed: u64,
}

impl DatabaseEvents {
    /// From what is stored of each document, if anything is, in the database that bears `mark`; `through`: events up to
    /// this number need not be told any more. `is_quiet`: what is found where nothing is stored is not told.
    pub fn new(
        webhook: &str,
        mark: Mark,
        stored: Vec<Option<Bucket>>,
        through: u64,
        is_quiet: bool,
    ) -> DatabaseEvents {
        assert_eq!(stored.len(), BUCKETS, "one for each document");
        let is_quiet: Vec<bool> = stored.iter().map(|stored| stored.is_none() && is_quiet).collect();
        let buckets: Vec<Bucket> =
            stored.into_iter().map(|stored| stored.unwrap_or_else(|| Bucket::new(mark))).collect();
        let last = buckets.iter().map(|bucket| bucket.last).max().unwrap_or(0).max(through);
        DatabaseEvents {
            webhook: webhook.to_owned(),
            mark,
            buckets,
            dirty: vec![false; BUCKETS],
            taken_back: vec![None; BUCKETS],
            is_quiet,
            seen: BTreeSet::new(),
            last,
            through,
            // An earlier life of ours may have sent any of them.
            handed: last,
        }
    }

    /// Whether it is not known yet what was there at the first start: list it, and call [`DatabaseEvents::on_there`].
    pub fn is_first_look(&self) -> bool {
        self.is_quiet.contains(&true)
    }

    /// What was there at the first start, all of it. What comes later is told.
    pub fn on_there(&mut self, names: impl IntoIterator<Item = String>) {
        for name in names {
            let bucket = bucket_of(&name);
            if self.is_quiet[bucket] {
                self.buckets[bucket].databases.entry(name).or_default();
            }
        }
        for (quiet, dirty) in self.is_quiet.iter_mut().zip(&mut self.dirty) {
            *dirty |= std::mem::take(quiet);
        }
    }

    /// What is known of a database that was looked into: its mark, and the end of its changes then.
    pub fn known(&self, db: &str) -> Option<(Mark, Seq)> {
        let known = self.buckets[bucket_of(db)].databases.get(db)?;
        Some((known.mark?, known.through()?))
    }

    /// A walk has come across a database; whether it is to be looked into.
    pub fn on_seen(&mut self, db: &str, fingerprint: u64) -> bool {
        self.seen.insert(db.to_owned());
        let known = self.buckets[bucket_of(db)].databases.get(db);
        known.is_none_or(|known| !known.clean.contains(&fingerprint))
    }

    /// CouchDB tells that something happened to a database. Where that cannot be seen by a look, the hint is believed: of
    /// one that was there at the first start what was written before the first look is not behind its place.
    pub fn on_hinted(&mut self, db: &str) {
        let bucket = bucket_of(db);
        let Some(known) = self.buckets[bucket].databases.get_mut(db) else { return };
        if (known.mark.is_none() || known.is_fresh) && !known.is_hinted {
            known.is_hinted = true;
            self.dirty[bucket] = true;
        }
    }

    /// A database was looked into after `fingerprint` was seen of it, if it was a walk that led there.
    pub fn on_found(&mut self, db: &str, found: Found, fingerprint: Option<u64>, at: Timestamp) {
        let bucket = bucket_of(db);
        self.seen.insert(db.to_owned());
        let before = self.buckets[bucket].databases.get(db).cloned();
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
            self.buckets[bucket].databases.insert(db.to_owned(), next);
            self.dirty[bucket] = true;
        }
    }

    /// CouchDB answers 404 for this database.
    pub fn on_gone(&mut self, db: &str, at: Timestamp) {
        let bucket = bucket_of(db);
        if self.buckets[bucket].databases.remove(db).is_some() {
            self.dirty[bucket] = true;
            self.tell(db, DELETED, at, None);
        }
    }

    /// A walk has come to its end. Gives the known databases that it did not come across: they may be gone.
    pub fn on_swept(&mut self) -> Vec<String> {
        let seen = std::mem::take(&mut self.seen);
        let known = self.buckets.iter().flat_map(|bucket| bucket.databases.keys());
        known.filter(|db| !seen.contains(*db)).cloned().collect()
    }

    /// Numbers an event and keeps it; what waits of the same database and is part of it need not be told any more.
    fn tell(&mut self, db: &str, event_type: &str, at: Timestamp, ddoc: Option<&str>) {
        let handed = self.handed;
        let bucket = &mut self.buckets[bucket_of(db)];
        let waits = |kept: &Kept| kept.n > handed && kept.key == db;
        let data = Data { webhook: &self.webhook, db, id: ddoc };
        let data = serde_json::to_string(&data).expect("texts are always JSON");
        let mut event_type = event_type;
        if matches!(event_type, UPDATED | DDOC_UPDATED) {
            let is_same = |kept: &Kept| waits(kept) && kept.event_type == event_type && kept.data == data;
            if bucket.events.iter().any(is_same) {
                return;
            }
        } else {
            let comes =
                |kept: &&Kept| waits(kept) && !matches!(kept.event_type.as_str(), UPDATED | DDOC_UPDATED);
            let waiting = bucket.events.iter().rfind(comes).map(|kept| kept.event_type.clone());
            event_type = match (waiting.as_deref(), event_type) {
                // What nobody heard of coming has come, however often.
                (Some(CREATED), RECREATED) => CREATED,
                (Some(DELETED), CREATED) => RECREATED,
                (_, event_type) => event_type,
            };
            let lowest = bucket.events.iter().find(|kept| waits(kept)).map(|kept| kept.n);
            let taken_back = &mut self.taken_back[bucket_of(db)];
            *taken_back = taken_back.or(lowest);
            bucket.events.retain(|kept| !waits(kept));
            if (waiting.as_deref(), event_type) == (Some(CREATED), DELETED) {
                // Nobody heard of it: nobody needs to know that it is gone.
                return;
            }
        }
        self.last += 1;
        bucket.last = self.last;
        let event_type = event_type.to_owned();
        bucket.events.push(Kept { n: self.last, key: db.to_owned(), event_type, at, data });
        self.dirty[bucket_of(db)] = true;
    }

    /// The documents to be stored before anything is sent.
    pub fn dirty(&mut self) -> Vec<(usize, &Bucket)> {
        let through = self.through;
        let all = self.buckets.iter_mut().enumerate().filter(|(index, _)| self.dirty[*index]);
        all.map(|(index, bucket)| {
            bucket.events.retain(|kept| kept.n > through);
            (index, &*bucket)
        })
        .collect()
    }

    /// One of them is stored.
    pub fn on_stored(&mut self, index: usize) {
        (self.dirty[index], self.taken_back[index]) = (false, None);
    }

    /// Events up to this number are delivered, or dead letters.
    pub fn on_through(&mut self, through: u64) {
        self.through = self.through.max(through);
    }

    /// Stored events behind a number, at most so many, in order. They count as sent from now on.
    pub fn events_after(&mut self, after: u64, n_max: usize) -> Vec<Kept> {
        let stored = self.buckets.iter().zip(&self.dirty).filter(|(_, dirty)| !**dirty);
        let mut events: Vec<&Kept> =
            stored.flat_map(|(bucket, _)| &bucket.events).filter(|kept| kept.n > after).collect();
        events.sort_by_key(|kept| kept.n);
        // Nothing is sent before what came earlier and is not stored yet, or is stored and was taken back: a kill would
        // bring it back, and it would count as sent.
        let unstored = self.buckets.iter().zip(&self.dirty).filter(|(_, dirty)| **dirty);
        let unstored = unstored.flat_map(|(bucket, _)| &bucket.events).map(|kept| kept.n);
        let taken_back = self.taken_back.iter().flatten().copied();
        let first = unstored.chain(taken_back).filter(|n| *n > after).min();
        events.retain(|kept| first.is_none_or(|first| kept.n < first));
        events.truncate(n_max);
        let events: Vec<Kept> = events.into_iter().cloned().collect();
        self.handed = events.last().map_or(self.handed, |last| self.handed.max(last.n));
        events
    }

    /// The database that what is remembered lies in.
    pub fn mark(&self) -> Mark {
        self.mark
    }
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
