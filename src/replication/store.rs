//! Where states are remembered: `_local/couch-hookd.NAME.0` to `.63` in the replicator database.
//!
//! Guarantees that only documents which changed are written, with the `_rev` that was read, on 1.x to the disk before
//! anything is told of them; and never into another database than the one that was looked at.

use std::sync::atomic::Ordering;

use http::Method;
use serde::Deserialize;

use crate::couch::client::{Written, db_path};
use crate::couch::local_docs;
use crate::couch::refusal::from_json;
use crate::couch::state_db::FULL_COMMIT;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::Mark;
use crate::pure::transitions::known::{BUCKETS, Bucket};
use crate::replication::{Monitor, number};

/// What is remembered, and the `_rev`s that it was read with.
type Stored = (Vec<Option<Bucket>>, [Option<String>; BUCKETS]);

impl Monitor {
    /// Everything that is remembered of the database that bears `mark`.
    pub(super) fn stored(&self, mark: Mark) -> Result<Stored> {
        #[derive(Deserialize)]
        struct Revision {
            #[serde(rename = "_rev")]
            rev: Option<String>,
        }
        let (db, webhook) = (&self.looking.telling.db, &self.looking.telling.webhook);
        let mut revs = [const { None }; BUCKETS];
        let mut stored = Vec::with_capacity(BUCKETS);
        let mut not_believed = Vec::new();
        for (index, rev) in revs.iter_mut().enumerate() {
            self.is_stopping()?;
            let id = Bucket::id(webhook, index);
            let path = db_path(db, &["_local", &id]);
            let reply = match self.looking.server.request(&Method::GET, &path, None, &[]) {
                Err(error) if error.kind() == Kind::NotFound => {
                    stored.push(None);
                    continue;
                }
                reply => reply?,
            };
            *rev = from_json::<Revision>(&reply.body).context(|| format!("GET {path}"))?.rev;
            let found = Bucket::from_json(&reply.body, &(db, &id), &self.looking.key);
            let found = found.map_err(|why| not_believed.push((id, why)));
            // Of another life of the database: nothing that is there now was looked at.
            stored.push(found.ok().filter(|bucket| bucket.mark == mark));
        }
        if let [(id, why), ..] = &not_believed[..] {
            log::error!(
                "webhook `{webhook}`, database `{db}`: what {} of {BUCKETS} documents such as `_local/{id}` remember of \
                 replications is not believed ({why}); their states are told anew",
                not_believed.len()
            );
        }
        Ok((stored, revs))
    }

    /// Stores what changed; only then may it be told.
    pub(super) fn store(&mut self) -> Result<()> {
        let (db, webhook) = (self.looking.telling.db.clone(), self.looking.telling.webhook.clone());
        let opened = self.opened.as_mut().expect("a database is opened before it is looked at");
        if opened.machine.dirty().is_empty() {
            return Ok(());
        }
        let (server, key) = (&self.looking.server, &self.looking.key);
        if !local_docs::is_same(server, &db, &opened.machine.mark(), None)? {
            // A stale `_rev` is taken by a database that was created again (CONTRACT §6).
            return Err(Error::new(Kind::Conflict, "the database was created again meanwhile"));
        }
        // What is delivered need not be written again.
        let checkpoint = local_docs::position(server, &db, &webhook, key, self.looking.seek.as_ref())?;
        if let Some(checkpoint) = checkpoint.filter(|checkpoint| checkpoint.mark == opened.machine.mark()) {
            opened.machine.on_through(number(&checkpoint.through_seq));
        }
        let dirty = opened.machine.dirty().into_iter().map(|(index, bucket)| {
            let id = Bucket::id(&webhook, index);
            let body = bucket.to_json(&(&db, &id), key, opened.revs[index].as_deref());
            (index, db_path(&db, &["_local", &id]), body)
        });
        for (index, path, body) in dirty.collect::<Vec<_>>() {
            // Whoever reads after us may have begun: 2.x and 3.x take what we write over what it wrote.
            if self.looking.stopping.load(Ordering::SeqCst) {
                return Err(Error::new(Kind::Stopped, "stopped"));
            }
            self.looking.hold.check()?;
            let reply = server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT])?;
            let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
            opened.revs[index] = Some(written.rev);
            opened.machine.on_stored(index);
        }
        Ok(())
    }
}
