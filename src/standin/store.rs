//! The stand-in's databases: documents, `_local` documents, and in which order of shards a feed finds them.
//!
//! Guarantees CouchDB's rules of writing, and that a crash takes back what was not committed. Knows no HTTP, no
//! lock and no clock; how a place in it is spelled is `seqs`' subject, what a document is `docs`'.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::standin::couch::Flavour;
use crate::standin::docs::{Document, Incoming, Refusal, Rev, next_rev, quoted};
use crate::standin::updates_feed::News;

/// Earlier states kept per database, to be undone by a crash: far more than are written in the second after
/// which a real 1.x commits.
const UNDO_MAX: usize = 1000;
/// Most revisions kept of a document, whatever `_revs_limit` says: enough to fetch an earlier one.
const REVS_MAX: u64 = 100;

/// A `_local` document: its versions, the newest last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Local {
    versions: Vec<(u64, Arc<str>)>,
}

#[derive(Debug, Default)]
struct Shard {
    seq: u64,
    by_seq: BTreeMap<u64, Arc<str>>,
}

enum Undo {
    Document { id: Arc<str>, before: Option<Document>, seq_before: u64 },
    Local { id: String, before: Option<Local> },
}

/// How far into each shard a feed has come: everything up to these numbers was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) Vec<u64>);

/// One database.
pub(crate) struct Database {
    flavour: Flavour,
    /// Another after every re-creation.
    pub(crate) incarnation: u64,
    /// Seconds since 1970 when it was made.
    pub(crate) created_seconds: i64,
    /// Microseconds since 1970 when it was last opened.
    pub(crate) opened_micros: i64,
    shards: Vec<Shard>,
    docs: BTreeMap<Arc<str>, Document>,
    locals: BTreeMap<String, Local>,
    /// What was last put into `_security`.
    pub(crate) security: Option<String>,
    pub(crate) revs_limit: u64,
    undo: VecDeque<Undo>,
    /// Writes ever: its file grows with each, and does not get shorter with a crash.
    n_writes: u64,
    /// Its name, and who is told of its updates.
    telling: Option<(Arc<str>, News)>,
}

impl Database {
    pub(crate) fn new(flavour: Flavour, n_shards: usize, incarnation: u64, now_micros: i64) -> Database {
        Database {
            flavour,
            incarnation,
            created_seconds: now_micros / 1_000_000,
            opened_micros: now_micros,
            shards: (0..n_shards).map(|_| Shard::default()).collect(),
            docs: BTreeMap::new(),
            locals: BTreeMap::new(),
            security: None,
            revs_limit: 1000,
            undo: VecDeque::new(),
            n_writes: 0,
            telling: None,
        }
    }

    /// The same, whose updates are told under this name.
    pub(crate) fn telling(self, name: &str, news: &News) -> Database {
        Database { telling: Some((name.into(), news.clone())), ..self }
    }

    /// Bytes of its file.
    pub(crate) fn file_bytes(&self) -> u64 {
        36_968 + 360 * self.n_writes
    }

    /// Bytes in use; only what differs with the `_local` documents is true of any database.
    pub(crate) fn active_bytes(&self) -> usize {
        let newest = self.locals.values().filter_map(|local| local.versions.last());
        newest.map(|(_, body)| body.len() + 30).sum()
    }

    pub(crate) fn doc(&self, id: &str) -> Option<&Document> {
        self.docs.get(id)
    }

    /// Documents whose winner is not deleted, in the order of ids.
    pub(crate) fn live_docs(&self) -> impl Iterator<Item = (&str, &Document)> {
        let live = self.docs.iter().filter(|(_, doc)| !doc.is_deleted(doc.winner()));
        live.map(|(id, doc)| (&**id, doc))
    }

    /// Ids of all documents, deleted ones too.
    pub(crate) fn ids(&self) -> Vec<Arc<str>> {
        self.docs.keys().cloned().collect()
    }

    /// A write of a client: `_rev` must be a leaf, or absent where nothing lives.
    pub(crate) fn write(&mut self, id: &str, doc: Incoming) -> Result<Rev, Refusal> {
        self.n_writes += 1;
        let known = self.docs.get(id);
        let old = self.flavour == Flavour::V1;
        let parent = match (known, doc.rev) {
            (None, None) => None,
            // 1.x does not look for what is not there (seen on 1.7.1).
            (None, rev) if old => rev,
            (Some(known), Some(rev)) if known.is_leaf(&rev) => Some(rev),
            (Some(known), None) if known.is_deleted(known.winner()) => {
                // 1.x begins at generation 1 again beside the tombstone, unless it had that revision before (seen).
                let again = old && !known.knows(&next_rev(None, doc.deleted, &doc.body));
                (!again).then(|| known.winner().clone())
            }
            _ => return Err(Refusal::conflict()),
        };
        let rev = next_rev(parent.as_ref(), doc.deleted, &doc.body);
        let path: Vec<Rev> = std::iter::once(rev.clone()).chain(parent).collect();
        self.insert(id, &path, doc.deleted, doc.body.into());
        Ok(rev)
    }

    /// A write of a replicator (`new_edits=false`): any revision, at most once.
    pub(crate) fn write_replicated(&mut self, id: &str, doc: Incoming) {
        self.n_writes += 1;
        let path = if doc.history.is_empty() { doc.rev.into_iter().collect() } else { doc.history };
        let Some(rev) = path.first() else { return };
        if self.docs.get(id).is_none_or(|known| !known.has_body(rev)) {
            self.insert(id, &path, doc.deleted, doc.body.into());
        }
    }

    fn insert(&mut self, id: &str, path: &[Rev], deleted: bool, body: Arc<str>) {
        let id: Arc<str> = self.docs.get_key_value(id).map_or_else(|| id.into(), |(id, _)| Arc::clone(id));
        let at = self.shard_of(&id);
        if self.flavour == Flavour::V1 {
            let before = self.docs.get(&id).cloned();
            self.remember(Undo::Document { id: Arc::clone(&id), before, seq_before: self.shards[at].seq });
        }
        let revs_limit = usize::try_from(self.revs_limit.min(REVS_MAX)).unwrap_or(1);
        let doc = self.docs.entry(Arc::clone(&id)).or_default();
        doc.insert(path, deleted, body);
        doc.stem(revs_limit);
        if let Some((name, news)) = &self.telling {
            news.note("updated", name);
            if self.flavour == Flavour::V1 && id.starts_with("_design/") {
                // An Erlang term in the place of a name (seen on 1.7.1).
                news.note("ddoc_updated", &format!("{{<<\"{name}\">>,<<\"{id}\">>}}"));
            }
        }
        let shard = &mut self.shards[at];
        shard.by_seq.remove(&doc.seq);
        shard.seq += 1;
        (doc.shard, doc.seq) = (at, shard.seq);
        shard.by_seq.insert(shard.seq, id);
    }

    pub(crate) fn n_shards(&self) -> usize {
        self.shards.len()
    }

    /// The shard a document lies in.
    pub(crate) fn shard_of(&self, id: &str) -> usize {
        let hash = Sha256::digest(id.as_bytes());
        usize::from(hash[0]) % self.shards.len()
    }

    fn remember(&mut self, undo: Undo) {
        if self.undo.len() == UNDO_MAX {
            self.undo.pop_front();
        }
        self.undo.push_back(undo);
    }

    /// Everything written so far is on disk.
    pub(crate) fn commit(&mut self) {
        self.undo.clear();
    }

    /// Takes back what was written since the last commit, from the newest: `n_updates` updates of documents, with
    /// the `_local` writes among and right before them. Says how many updates were taken back.
    pub(crate) fn roll_back(&mut self, n_updates: usize) -> usize {
        let mut undone = 0;
        while let Some(last) = self.undo.pop_back() {
            match last {
                Undo::Local { id, before } => {
                    match before {
                        Some(local) => self.locals.insert(id, local),
                        None => self.locals.remove(&id),
                    };
                }
                Undo::Document { .. } if undone == n_updates => {
                    self.undo.push_back(last);
                    break;
                }
                Undo::Document { id, before, seq_before } => {
                    let at = self.shard_of(&id);
                    let shard = &mut self.shards[at];
                    shard.by_seq.remove(&shard.seq);
                    shard.seq = seq_before;
                    match before {
                        Some(doc) => {
                            shard.by_seq.insert(doc.seq, Arc::clone(&id));
                            self.docs.insert(id, doc);
                        }
                        None => drop(self.docs.remove(&id)),
                    }
                    undone += 1;
                }
            }
        }
        undone
    }

    /// Forgets the bodies of all revisions that are no leaves.
    pub(crate) fn compact(&mut self) {
        self.docs.values_mut().for_each(Document::compact);
    }

    /// Writes `_local/ID` (`id` without `_local/`) by the rules of the version; the number of the new revision.
    pub(crate) fn write_local(&mut self, id: &str, doc: Incoming) -> Result<u64, Refusal> {
        self.n_writes += 1;
        let sent = doc.rev.as_ref().map_or(Ok(0), |rev| rev.hash.parse::<u64>());
        let sent = sent.map_err(|_| Refusal::new(400, "bad_request", "Invalid rev format"))?;
        let before = self.locals.get(id);
        let held = before.and_then(|local| local.versions.last()).map_or(0, |(rev, _)| *rev);
        if self.flavour == Flavour::V1 {
            if sent != held {
                return Err(Refusal::conflict());
            }
            let before = before.cloned();
            self.remember(Undo::Local { id: id.to_owned(), before });
        }
        if doc.deleted {
            self.locals.remove(id);
            return Ok(0);
        }
        let versions = &mut self.locals.entry(id.to_owned()).or_default().versions;
        if versions.len() > 4 {
            versions.remove(0);
        }
        versions.push((sent + 1, doc.body.into()));
        Ok(sent + 1)
    }

    /// `_local/ID` as JSON and its revision; `age` versions back, `None` when there is none so old.
    pub(crate) fn local(&self, id: &str, age: usize) -> Option<(u64, String)> {
        let (rev, body) = self.locals.get(id)?.versions.iter().rev().nth(age)?;
        let comma = if body.is_empty() { "" } else { "," };
        Some((
            *rev,
            format!("{{\"_id\":{},\"_rev\":\"0-{rev}\"{comma}{body}}}", quoted(&format!("_local/{id}"))),
        ))
    }

    /// Before everything.
    pub(crate) fn beginning(&self) -> Place {
        Place(vec![0; self.shards.len()])
    }

    /// After everything there is now.
    pub(crate) fn end(&self) -> Place {
        Place(self.shards.iter().map(|shard| shard.seq).collect())
    }

    /// All updates ever: `update_seq` on 1.x, the number in front of a seq since.
    pub(crate) fn update_seq(&self) -> u64 {
        self.shards.iter().map(|shard| shard.seq).sum()
    }

    /// How many changes lie after a place.
    pub(crate) fn n_after(&self, place: &Place) -> usize {
        self.shards.iter().zip(&place.0).map(|(shard, at)| shard.by_seq.range(at + 1..).count()).sum()
    }

    /// The next change after `place` and not after `end`, out of a shard that `choose` takes among those that
    /// have one (it gets their number); moves `place` there.
    pub(crate) fn next(
        &self,
        place: &mut Place,
        end: Option<&Place>,
        choose: &mut dyn FnMut(usize) -> usize,
    ) -> Option<(Arc<str>, &Document)> {
        let mut heads: Vec<(usize, u64, &Arc<str>)> = Vec::with_capacity(self.shards.len());
        for (at, shard) in self.shards.iter().enumerate() {
            let head = shard.by_seq.range(place.0[at] + 1..).next();
            let head = head.filter(|(seq, _)| end.is_none_or(|end| **seq <= end.0[at]));
            heads.extend(head.map(|(seq, id)| (at, *seq, id)));
        }
        if heads.is_empty() {
            return None;
        }
        let (at, seq, id) = heads[choose(heads.len()) % heads.len()];
        place.0[at] = seq;
        Some((Arc::clone(id), self.docs.get(id).expect("what is in the order is in the database")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn database(flavour: Flavour) -> Database {
        Database::new(flavour, if flavour == Flavour::V1 { 1 } else { 4 }, 1, 0)
    }

    fn put(db: &mut Database, id: &str, json: &str) -> Rev {
        db.write(id, Incoming::parse(json).unwrap()).unwrap()
    }

    #[test]
    fn writes_follow_the_rules_of_revisions() {
        let mut db = database(Flavour::V3);
        let one = put(&mut db, "x", "{\"v\":1}");
        assert_eq!(db.write("x", Incoming::parse("{}").unwrap()), Err(Refusal::conflict()));
        let two = put(&mut db, "x", &format!("{{\"_rev\":\"{one}\",\"v\":2}}"));
        assert_eq!(two.generation, 2);
        let stale = Incoming::parse(&format!("{{\"_rev\":\"{one}\"}}")).unwrap();
        assert_eq!(db.write("x", stale), Err(Refusal::conflict()));
        let gone = put(&mut db, "x", &format!("{{\"_rev\":\"{two}\",\"_deleted\":true}}"));
        assert!(db.doc("x").unwrap().is_deleted(&gone));
        assert_eq!(put(&mut db, "x", "{\"v\":1}").generation, 4, "it goes on from the tombstone");

        let mut other = database(Flavour::V1);
        assert_eq!(put(&mut other, "x", "{ \"v\" : 1 }"), one, "equal content has an equal revision");
        let gone = put(&mut other, "x", &format!("{{\"_rev\":\"{one}\",\"_deleted\":true}}"));
        assert_eq!(put(&mut other, "x", "{\"v\":2}").generation, 1, "1.x begins again");
        let leaves = other.doc("x").unwrap().leaves();
        assert_eq!((leaves.len(), &leaves[1]), (2, &gone));
        let again = put(&mut other, "y", "{\"v\":1}");
        put(&mut other, "y", &format!("{{\"_rev\":\"{again}\",\"_deleted\":true}}"));
        assert_eq!(put(&mut other, "y", "{\"v\":1}").generation, 3, "but not to a revision it had");
        assert_eq!(put(&mut other, "z", "{\"_rev\":\"1-x\"}").generation, 2, "1.x takes any parent");
    }

    #[test]
    fn deleting_the_winner_of_a_conflict_brings_a_lower_generation() {
        let mut db = database(Flavour::V3);
        let one = put(&mut db, "x", "{\"v\":1}");
        let two = put(&mut db, "x", &format!("{{\"_rev\":\"{one}\",\"v\":2}}"));
        let leaf = "{\"_rev\":\"1-ffffffffffffffffffffffffffffffff\",\"v\":9}";
        db.write_replicated("x", Incoming::parse(leaf).unwrap());
        db.write_replicated("x", Incoming::parse(leaf).unwrap());
        let doc = db.doc("x").unwrap();
        assert_eq!(doc.winner(), &two);
        let json = doc.json("x", &two, true).unwrap();
        assert!(json.ends_with(r#","_conflicts":["1-ffffffffffffffffffffffffffffffff"]}"#), "{json}");
        put(&mut db, "x", &format!("{{\"_rev\":\"{two}\",\"_deleted\":true}}"));
        let doc = db.doc("x").unwrap();
        assert_eq!((doc.winner().generation, doc.leaves().len()), (1, 2));

        let grown = r#"{"_revisions":{"start":2,"ids":["eeee","ffffffffffffffffffffffffffffffff"]},"v":10}"#;
        db.write_replicated("x", Incoming::parse(grown).unwrap());
        let doc = db.doc("x").unwrap();
        assert_eq!((doc.winner().to_string().as_str(), doc.leaves().len()), ("2-eeee", 2));
    }

    #[test]
    fn local_documents_check_revisions_on_1_x_alone() {
        let local = |rev: &str| Incoming::parse(&format!("{{{rev}}}")).unwrap();
        let mut old = database(Flavour::V1);
        assert_eq!(old.write_local("c", local("\"_rev\":\"0-7\"")), Err(Refusal::conflict()));
        assert_eq!(old.write_local("c", local("")), Ok(1));
        assert_eq!(old.write_local("c", local("")), Err(Refusal::conflict()));
        assert_eq!(old.write_local("c", local("\"_rev\":\"0-1\"")), Ok(2));
        let mut new = database(Flavour::V3);
        assert_eq!(new.write_local("c", local("\"_rev\":\"0-7\"")), Ok(8));
        assert_eq!(new.write_local("c", local("")), Ok(1));
    }

    #[test]
    fn a_crash_takes_back_the_last_updates_and_their_numbers() {
        let mut db = database(Flavour::V1);
        let one = put(&mut db, "a", "{}");
        put(&mut db, "b", "{}");
        db.commit();
        put(&mut db, "a", &format!("{{\"_rev\":\"{one}\"}}"));
        db.write_local("c", Incoming::parse("{\"through_seq\":3}").unwrap()).unwrap();
        put(&mut db, "d", "{}");
        assert_eq!(db.update_seq(), 4);
        assert_eq!(db.roll_back(1), 1);
        assert_eq!((db.update_seq(), db.local("c", 0).is_some()), (3, false));
        assert_eq!(db.roll_back(5), 1);
        assert_eq!((db.update_seq(), db.doc("a").unwrap().winner()), (2, &one));
        assert_eq!(db.n_after(&db.beginning()), 2);
    }
}
