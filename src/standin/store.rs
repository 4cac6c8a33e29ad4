//! What the stand-in's databases hold: documents with their revision trees, `_local` documents, and by which
//! order of shards a feed finds them.
//!
//! Guarantees CouchDB's rules of writing, and that bodies keep every byte outside of blanks. Knows no HTTP, no
//! lock and no clock; how a place in it is spelled is `seqs`' subject.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::sync::Arc;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::standin::couch::Flavour;

/// Earlier states kept per database, to be undone by a crash.
const UNDO_MAX: usize = 100_000;

/// Why something was not written, in CouchDB's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u16,
    pub(crate) error: &'static str,
    pub(crate) reason: String,
}

impl Refusal {
    pub(crate) fn new(status: u16, error: &'static str, reason: impl Into<String>) -> Refusal {
        Refusal { status, error, reason: reason.into() }
    }

    pub(crate) fn conflict() -> Refusal {
        Refusal::new(409, "conflict", "Document update conflict.")
    }
}

/// A revision: generation, then 32 hexadecimal digits. Ordered as CouchDB chooses winners.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rev {
    pub(crate) generation: u64,
    pub(crate) hash: String,
}

impl Rev {
    pub(crate) fn parse(text: &str) -> Result<Rev, Refusal> {
        let parsed = text.split_once('-').and_then(|(generation, hash)| {
            Some(Rev { generation: generation.parse().ok()?, hash: hash.to_owned() })
        });
        parsed.ok_or_else(|| Refusal::new(400, "bad_request", "Invalid rev format"))
    }
}

impl std::fmt::Display for Rev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.generation, self.hash)
    }
}

#[derive(Debug, Clone)]
struct Node {
    parent: Option<Rev>,
    deleted: bool,
    /// Members but those that begin with `_`, joined by commas; `None` once compacted away.
    body: Option<Arc<str>>,
}

/// One document: all its revisions, and where the feed has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Document {
    revs: BTreeMap<Rev, Node>,
    leaves: Vec<Rev>,
    seq: u64,
}

impl Document {
    /// The revision that wins: not deleted before deleted, then the highest.
    pub(crate) fn winner(&self) -> &Rev {
        let rank = |rev: &&Rev| (!self.is_deleted(rev), (*rev).clone());
        self.leaves.iter().max_by_key(rank).expect("a document has a leaf")
    }

    pub(crate) fn is_deleted(&self, rev: &Rev) -> bool {
        self.revs.get(rev).is_some_and(|node| node.deleted)
    }

    /// All leaves, the winner first, then from the highest down: what `style=all_docs` lists.
    pub(crate) fn leaves(&self) -> Vec<Rev> {
        let mut leaves = self.leaves.clone();
        leaves.sort_by_key(|rev| std::cmp::Reverse((!self.is_deleted(rev), rev.clone())));
        leaves
    }

    /// The document as JSON; `None` when that revision is unknown or its body is gone.
    pub(crate) fn json(&self, id: &str, rev: &Rev, conflicts: bool) -> Option<String> {
        let node = self.revs.get(rev)?;
        let mut json = format!("{{\"_id\":{},\"_rev\":\"{rev}\"", quoted(id));
        let body = node.body.as_deref()?;
        if !body.is_empty() {
            let _ = write!(json, ",{body}");
        }
        if node.deleted {
            json.push_str(",\"_deleted\":true");
        }
        let live = || self.leaves().into_iter().filter(|leaf| leaf != rev && !self.is_deleted(leaf));
        if conflicts && live().next().is_some() {
            let list: Vec<String> = live().map(|leaf| quoted(&leaf.to_string())).collect();
            let _ = write!(json, ",\"_conflicts\":[{}]", list.join(","));
        }
        json.push('}');
        Some(json)
    }

    /// Puts a revision and the ancestors that came with it, newest first, into the tree.
    fn insert(&mut self, path: &[Rev], deleted: bool, body: Arc<str>) {
        let leaf = path[0].clone();
        self.leaves.retain(|known| !path.contains(known));
        if !self.revs.values().any(|node| node.parent.as_ref() == Some(&leaf)) {
            self.leaves.push(leaf.clone());
        }
        self.revs.insert(leaf, Node { parent: path.get(1).cloned(), deleted, body: Some(body) });
        for (at, ancestor) in path.iter().enumerate().skip(1) {
            let parent = path.get(at + 1).cloned();
            self.revs.entry(ancestor.clone()).or_insert(Node { parent, deleted: false, body: None });
        }
    }

    fn stem(&mut self, revs_limit: usize) {
        while self.revs.len() > revs_limit.max(1) + self.leaves.len() {
            let oldest = self.revs.keys().find(|rev| !self.leaves.contains(rev)).cloned();
            match oldest {
                Some(rev) => self.revs.remove(&rev),
                None => return,
            };
        }
    }
}

/// A `_local` document: its versions, the newest last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Local {
    versions: Vec<(u64, Arc<str>)>,
}

/// A document as a client sent it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Incoming {
    pub(crate) id: Option<String>,
    pub(crate) rev: Option<Rev>,
    pub(crate) deleted: bool,
    /// From `_revisions`, newest first.
    pub(crate) history: Vec<Rev>,
    body: String,
}

impl Incoming {
    /// What a DELETE stands for.
    pub(crate) fn deletion(rev: Option<Rev>) -> Incoming {
        Incoming { rev, deleted: true, ..Incoming::default() }
    }

    /// Reads a document, its members kept byte for byte but for blanks between them.
    pub(crate) fn parse(json: &str) -> Result<Incoming, Refusal> {
        let members: Members<'_> =
            serde_json::from_str(json).map_err(|_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON"))?;
        let mut doc = Incoming::default();
        for (key, value) in members.0 {
            let name: String = serde_json::from_str(key.get()).unwrap_or_default();
            let text = || serde_json::from_str::<String>(value.get()).unwrap_or_default();
            match name.as_str() {
                "_id" => doc.id = Some(text()),
                "_rev" => doc.rev = Some(Rev::parse(&text())?),
                "_deleted" => doc.deleted = value.get() == "true",
                "_revisions" => doc.history = history(value.get())?,
                "_conflicts" | "_attachments" | "_revs_info" => {}
                _ if name.starts_with('_') && !name.starts_with("_replication_") => {
                    let reason = format!("Bad special document member: {name}");
                    return Err(Refusal::new(400, "doc_validation", reason));
                }
                _ => {
                    let comma = if doc.body.is_empty() { "" } else { "," };
                    let _ = write!(doc.body, "{comma}{}:{}", key.get(), compact(value.get()));
                }
            }
        }
        Ok(doc)
    }
}

/// A JSON object's members in order, as they stand.
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> serde::Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

fn history(json: &str) -> Result<Vec<Rev>, Refusal> {
    #[derive(serde::Deserialize)]
    struct Revisions {
        start: u64,
        ids: Vec<String>,
    }
    let bad = |_| Refusal::new(400, "doc_validation", "Malformed `_revisions`");
    let revisions: Revisions = serde_json::from_str(json).map_err(bad)?;
    let generations = (0..=revisions.start).rev();
    Ok(generations.zip(revisions.ids).map(|(generation, hash)| Rev { generation, hash }).collect())
}

/// The JSON without blanks outside of strings; nothing else changes.
fn compact(json: &str) -> String {
    let (mut inside, mut escaped) = (false, false);
    json.chars()
        .filter(|&letter| {
            let keep = inside || !matches!(letter, ' ' | '\t' | '\r' | '\n');
            if inside {
                inside = escaped || letter != '"';
                escaped = !escaped && letter == '\\';
            } else {
                inside = letter == '"';
            }
            keep
        })
        .collect()
}

/// A text as JSON.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a text is JSON")
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
        }
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
        let known = self.docs.get(id);
        let parent = match (known, doc.rev) {
            (None, None) => None,
            (Some(known), Some(rev)) if known.leaves.contains(&rev) => Some(rev),
            (Some(known), None) if known.is_deleted(known.winner()) => Some(known.winner().clone()),
            _ => return Err(Refusal::conflict()),
        };
        let rev = next_rev(parent.as_ref(), doc.deleted, &doc.body);
        let path: Vec<Rev> = std::iter::once(rev.clone()).chain(parent).collect();
        self.insert(id, &path, doc.deleted, doc.body.into());
        Ok(rev)
    }

    /// A write of a replicator (`new_edits=false`): any revision, at most once.
    pub(crate) fn write_replicated(&mut self, id: &str, doc: Incoming) {
        let path = if doc.history.is_empty() { doc.rev.into_iter().collect() } else { doc.history };
        let Some(rev) = path.first() else { return };
        let known = self.docs.get(id).and_then(|known| known.revs.get(rev));
        if known.is_none_or(|node| node.body.is_none()) {
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
        let revs_limit = usize::try_from(self.revs_limit).unwrap_or(usize::MAX);
        let doc = self.docs.entry(Arc::clone(&id)).or_default();
        doc.insert(path, deleted, body);
        doc.stem(revs_limit);
        let shard = &mut self.shards[at];
        shard.by_seq.remove(&doc.seq);
        shard.seq += 1;
        doc.seq = shard.seq;
        shard.by_seq.insert(shard.seq, id);
    }

    fn shard_of(&self, id: &str) -> usize {
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
        for doc in self.docs.values_mut() {
            let leaves = &doc.leaves;
            doc.revs
                .iter_mut()
                .filter(|(rev, _)| !leaves.contains(rev))
                .for_each(|(_, node)| node.body = None);
        }
    }

    /// Writes `_local/ID` (`id` without `_local/`) by the rules of the version; the number of the new revision.
    pub(crate) fn write_local(&mut self, id: &str, doc: Incoming) -> Result<u64, Refusal> {
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

/// As CouchDB: the same parent, deletion and body give the same revision, everywhere.
fn next_rev(parent: Option<&Rev>, deleted: bool, body: &str) -> Rev {
    let parent_text = parent.map(ToString::to_string).unwrap_or_default();
    let hash = Sha256::digest(format!("{deleted}\n{parent_text}\n{body}").as_bytes());
    let hash = hash[..16].iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    Rev { generation: parent.map_or(0, |rev| rev.generation) + 1, hash }
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
    fn bodies_keep_every_byte_but_blanks() {
        let mut db = database(Flavour::V3);
        let body = r#"{"z":1.0,"a": -0.0,"n":12345678901234567890123,"\u0061b":1.0000000000000000199e+30,"s":"a \" b\\","o":{"b": [1, 2],"a":"x y"}}"#;
        let rev = put(&mut db, "x", body);
        let kept = r#""z":1.0,"a":-0.0,"n":12345678901234567890123,"\u0061b":1.0000000000000000199e+30,"s":"a \" b\\","o":{"b":[1,2],"a":"x y"}}"#;
        let json = db.doc("x").unwrap().json("x", &rev, false).unwrap();
        assert_eq!(json, format!("{{\"_id\":\"x\",\"_rev\":\"{rev}\",{kept}"));
        assert_eq!(Incoming::parse("[1]").unwrap_err().status, 400);
        assert_eq!(Incoming::parse("{\"_x\":1}").unwrap_err().error, "doc_validation");
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
