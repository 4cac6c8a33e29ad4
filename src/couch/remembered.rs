//! Where a webhook keeps what it remembers of things that have no feed: `_local/couch-hookd.NAME.0` to `.63` in the
//! database that it tells of, or in `state_db`.
//!
//! Guarantees that only documents which changed are written, with the `_rev` that was read, on 1.x to the disk before
//! anything is told of them; never into another database than the one that was read, nor after the webhook became
//! somebody else's to tell. What is in them is `pure::remembered`'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::couch::client::{Server, Written, db_path};
use crate::couch::leases::Hold;
use crate::couch::local_docs;
use crate::couch::refusal::from_json;
use crate::couch::state_db::FULL_COMMIT;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::{Mark, Seek, StateKey};
use crate::pure::message::Telling;
use crate::pure::remembered::{BUCKETS, Bucket, Remembered, number};

/// `_rev`s of the documents, as they were last read or written.
pub type Revs = [Option<String>; BUCKETS];

/// Whose memory, and where.
pub struct Memory {
    /// The watched CouchDB.
    pub server: Server,
    /// Signs what is remembered.
    pub key: StateKey,
    /// What is told; its database is the one that the documents lie in.
    pub telling: Telling,
    /// Where a command has set the webhook.
    pub seek: Option<Seek>,
    /// Whether the webhook is ours to tell.
    pub hold: Arc<Hold>,
    /// Set when whoever uses it is to end.
    pub stopping: Arc<AtomicBool>,
}

impl Memory {
    /// Everything that is remembered in the database that bears `mark`, by document, and the `_rev`s that it was read
    /// with.
    ///
    /// # Errors
    /// As [`Server::request`], and [`Memory::check`].
    pub fn read<K: Serialize + DeserializeOwned>(
        &self,
        mark: Mark,
    ) -> Result<(Vec<Option<Bucket<K>>>, Revs)> {
        #[derive(Deserialize)]
        struct Revision {
            #[serde(rename = "_rev")]
            rev: Option<String>,
        }
        let (db, webhook) = (&self.telling.db, &self.telling.webhook);
        let mut revs = [const { None }; BUCKETS];
        let mut stored = Vec::with_capacity(BUCKETS);
        let mut not_believed = Vec::new();
        for (index, rev) in revs.iter_mut().enumerate() {
            self.check()?;
            let id = id(webhook, index);
            let path = db_path(db, &["_local", &id]);
            let reply = match self.server.request(&Method::GET, &path, None, &[]) {
                Err(error) if error.kind() == Kind::NotFound => {
                    stored.push(None);
                    continue;
                }
                reply => reply?,
            };
            *rev = from_json::<Revision>(&reply.body).context(|| format!("GET {path}"))?.rev;
            let found = Bucket::from_json(&reply.body, &(db, &id), &self.key);
            let found = found.map_err(|why| not_believed.push((id, why)));
            // Of another life of the database: nothing that is there now was looked at.
            stored.push(found.ok().filter(|bucket| bucket.mark == mark));
        }
        if let [(id, why), ..] = &not_believed[..] {
            log::error!(
                "webhook `{webhook}`, database `{db}`: what {} of {BUCKETS} documents such as `_local/{id}` remember is not \
                 believed ({why}); what they knew is told anew",
                not_believed.len()
            );
        }
        Ok((stored, revs))
    }

    /// Stores what changed; only then may it be told.
    ///
    /// # Errors
    /// As [`Memory::read`]; `Conflict` when the database was created again meanwhile. What was stored by then stays so.
    pub fn write<K: Serialize + DeserializeOwned>(
        &self,
        remembered: &mut Remembered<K>,
        revs: &mut Revs,
    ) -> Result<()> {
        let (db, webhook, mark) = (&self.telling.db, &self.telling.webhook, remembered.mark());
        if remembered.dirty().is_empty() {
            return Ok(());
        }
        if !local_docs::is_same(&self.server, db, &mark, None)? {
            // A stale `_rev` is taken by a database that was created again (CONTRACT §6).
            return Err(Error::new(Kind::Conflict, "the database was created again meanwhile"));
        }
        // What is delivered need not be written again.
        let checkpoint = local_docs::position(&self.server, db, webhook, &self.key, self.seek.as_ref())?;
        if let Some(checkpoint) = checkpoint.filter(|checkpoint| checkpoint.mark == mark) {
            remembered.on_through(number(&checkpoint.through_seq));
        }
        let documents = remembered.dirty().into_iter().map(|(index, bucket)| {
            let id = id(webhook, index);
            let body = bucket.to_json(&(db, &id), &self.key, revs[index].as_deref());
            (index, db_path(db, &["_local", &id]), body)
        });
        for (index, path, body) in documents.collect::<Vec<_>>() {
            // Whoever tells after us may have begun: 2.x and 3.x take what we write over what it wrote.
            self.check()?;
            let reply = self.server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT])?;
            let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
            revs[index] = Some(written.rev);
            remembered.on_stored(index);
        }
        Ok(())
    }

    /// Whether whoever uses it is to end.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// `Stopped` when we are to end, or the webhook is not ours to tell any more.
    pub fn check(&self) -> Result<()> {
        match self.is_stopping() {
            true => Err(Error::new(Kind::Stopped, "stopped")),
            false => self.hold.check(),
        }
    }
}

/// The id of a document, behind `_local/`.
fn id(webhook: &str, index: usize) -> String {
    format!("couch-hookd.{webhook}.{index}")
}
