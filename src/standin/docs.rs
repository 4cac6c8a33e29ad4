//! Documents of the stand-in: revision trees, winners, and JSON whose members keep every byte but blanks.
//!
//! Guarantees CouchDB's choice of winners, and equal revisions for equal contents. Where a document lies in a
//! database is `store`'s subject.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

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
    /// In which shard it lies.
    pub(crate) shard: usize,
    /// Where its shard's order has it.
    pub(crate) seq: u64,
}

impl Document {
    /// The revision that wins: not deleted before deleted, then the highest.
    pub(crate) fn winner(&self) -> &Rev {
        // Nearly all have no conflict, and thousands are listed at a time.
        if let [only] = self.leaves.as_slice() {
            return only;
        }
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

    /// Whether a client may write on top of this revision.
    pub(crate) fn is_leaf(&self, rev: &Rev) -> bool {
        self.leaves.contains(rev)
    }

    /// Whether this revision is or was there.
    pub(crate) fn knows(&self, rev: &Rev) -> bool {
        self.revs.contains_key(rev)
    }

    /// Whether the body of this revision is here.
    pub(crate) fn has_body(&self, rev: &Rev) -> bool {
        self.revs.get(rev).is_some_and(|node| node.body.is_some())
    }

    /// Forgets the bodies of all revisions that are no leaves.
    pub(crate) fn compact(&mut self) {
        let leaves = &self.leaves;
        self.revs.iter_mut().filter(|(rev, _)| !leaves.contains(rev)).for_each(|(_, node)| node.body = None);
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
    pub(crate) fn insert(&mut self, path: &[Rev], deleted: bool, body: Arc<str>) {
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

    /// Forgets the oldest revisions beyond `revs_limit`.
    pub(crate) fn stem(&mut self, revs_limit: usize) {
        while self.revs.len() > revs_limit.max(1) + self.leaves.len() {
            let oldest = self.revs.keys().find(|rev| !self.leaves.contains(rev)).cloned();
            match oldest {
                Some(rev) => self.revs.remove(&rev),
                None => return,
            };
        }
    }
}

/// A document as a client sent it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Incoming {
    pub(crate) id: Option<String>,
    pub(crate) rev: Option<Rev>,
    pub(crate) deleted: bool,
    /// From `_revisions`, newest first.
    pub(crate) history: Vec<Rev>,
    /// As a [`Node`]'s.
    pub(crate) body: String,
}

impl Incoming {
    /// What a DELETE stands for.
    pub(crate) fn deletion(rev: Option<Rev>) -> Incoming {
        Incoming { rev, deleted: true, ..Incoming::default() }
    }

    /// Reads a document, its members kept byte for byte but for blanks between them.
    pub(crate) fn parse(json: &str) -> Result<Incoming, Refusal> {
        let members: Members<'_> = serde_json::from_str(json).map_err(|error| {
            let other = error.is_data();
            let reason = if other { "Document must be a JSON object" } else { "invalid UTF-8 JSON" };
            Refusal::new(400, "bad_request", reason)
        })?;
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

/// The members of a JSON object in order, names decoded, values as they stand.
///
/// # Errors
/// It is no JSON object.
pub(crate) fn members(json: &str) -> Result<Vec<(String, String)>, Refusal> {
    let bad = |_| Refusal::new(400, "bad_request", "Document must be a JSON object");
    let Members(members) = serde_json::from_str(json).map_err(bad)?;
    let named = |(key, value): (&RawValue, &RawValue)| {
        (serde_json::from_str(key.get()).unwrap_or_default(), value.get().to_owned())
    };
    Ok(members.into_iter().map(named).collect())
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
pub(crate) fn compact(json: &str) -> String {
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

/// As CouchDB: the same parent, deletion and body give the same revision, everywhere.
pub(crate) fn next_rev(parent: Option<&Rev>, deleted: bool, body: &str) -> Rev {
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

    #[test]
    fn bodies_keep_every_byte_but_blanks() {
        let body = r#"{"z":1.0,"a": -0.0,"n":12345678901234567890123,"\u0061b":1.0000000000000000199e+30,"s":"a \" b\\","o":{"b": [1, 2],"a":"x y"}}"#;
        let incoming = Incoming::parse(body).unwrap();
        let rev = next_rev(None, false, &incoming.body);
        let mut doc = Document::default();
        doc.insert(std::slice::from_ref(&rev), false, incoming.body.into());
        let kept = r#""z":1.0,"a":-0.0,"n":12345678901234567890123,"\u0061b":1.0000000000000000199e+30,"s":"a \" b\\","o":{"b":[1,2],"a":"x y"}}"#;
        let json = doc.json("x", &rev, false).unwrap();
        assert_eq!(json, format!("{{\"_id\":\"x\",\"_rev\":\"{rev}\",{kept}"));
        assert_eq!(Incoming::parse("[1]").unwrap_err().status, 400);
        assert_eq!(Incoming::parse("{\"_x\":1}").unwrap_err().error, "doc_validation");
    }
}
