//! Conflicts: what an event says of them, and which documents are known to be conflicted.
//!
//! What a row shows is told of it: more than one live leaf is `document.conflicted`. That a document *was* conflicted no
//! row shows, so it is kept in `state_db`, one small document each, and an event with one live leaf, or none, is
//! `document.resolved` while that is there. Guarantees, with `flow` and `dispatch`: it is stored before
//! `document.conflicted` is sent for the first time, and before the checkpoint passes a conflict that is not wanted; it
//! is deleted only after `document.resolved` was delivered or is a dead letter, and before the checkpoint passes that.
//!
//! ```text
//!  killed here                          what follows
//!  conflict read                        nobody was told; read again, or coalesced away
//!  `-- stored                           read again and told; resolved by then: `document.resolved` is told
//!      `-- told, checkpoint behind it   known
//!          `-- resolution read          read again: `document.resolved`
//!              `-- told                 told again, with its id
//!                  `-- deleted          read again: the same id, as `document.updated` or `document.deleted`
//! ```

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::pure::document::Document;
use crate::pure::message::{Event, WebhookId};

/// `document.conflicted`.
pub const CONFLICTED: &str = "document.conflicted";
/// `document.resolved`.
pub const RESOLVED: &str = "document.resolved";
/// How the ids of what is kept in `state_db` begin.
pub const PREFIX: &str = "conflict:";
/// So many leaves are asked for by name; of more, all are asked for: URLs end at 8 KiB.
const NAMED_MAX: usize = 100;

/// What an event says of its document's leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing beyond what was written.
    Plain,
    /// There is more than one live leaf.
    Conflicted,
    /// There was, and is no more.
    Resolved,
}

/// What is kept of an event's document with `conflicts = true`.
#[derive(Debug, Clone)]
pub struct Conflict {
    /// Names the document among those that are known to be conflicted; `None` where nothing is kept of them, because
    /// `document.resolved` is not wanted.
    pub key: Option<u64>,
    /// Whether the type that its row alone gives is wanted.
    pub wanted: bool,
    /// The id that its row alone gives: what memory and checkpoints know it by.
    pub row_id: WebhookId,
    /// The id that it has as `document.resolved`.
    pub resolved_id: WebhookId,
    /// Bodies of the conflicting leaves.
    pub docs: LeafDocs,
}

/// Bodies of conflicting leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeafDocs {
    /// Not asked for, or not read yet.
    Unread,
    /// Together longer than `payload_bytes_max`; their length in bytes, where it is known.
    TooLarge(Option<u64>),
    /// CouchDB does not give them, and will not the next time.
    Unreadable,
    /// A JSON array, each body as CouchDB sent it.
    Json(Box<str>),
}

impl LeafDocs {
    /// What they weigh, in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            LeafDocs::Json(text) => text.len(),
            LeafDocs::Unread | LeafDocs::TooLarge(_) | LeafDocs::Unreadable => 0,
        }
    }
}

impl Standing {
    /// Of an event of this type.
    pub fn of_type(event_type: &str) -> Standing {
        match event_type {
            CONFLICTED => Standing::Conflicted,
            RESOLVED => Standing::Resolved,
            _ => Standing::Plain,
        }
    }
}

/// What has to be done about an event, in `state_db` or to its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owed {
    /// Store that its document is conflicted, and read the leaves where they are asked for.
    Remember,
    /// Delete that it is.
    Forget,
}

/// Names a document of a webhook's database, in one of its lives.
pub fn key(webhook: &str, db: &str, mark: &str, doc_id: &str) -> u64 {
    WebhookId::of(&("conflict", webhook, db, mark, doc_id)).short()
}

/// How the ids of all that is kept of one database begin, in one of its lives:
/// `conflict:orders:9f86d081884c7d65:`. What it held before it was deleted and created again has another beginning.
pub fn place(webhook: &str, db: &str, mark: &str) -> String {
    format!("{PREFIX}{webhook}:{:016x}:", WebhookId::of(&("conflicts", webhook, db, mark)).short())
}

/// The id of what is kept of one document, and the reverse.
pub fn id(place: &str, key: u64) -> String {
    format!("{place}{key:016x}")
}

/// The key in such an id; `None` for what somebody else wrote.
pub fn key_of(place: &str, id: &str) -> Option<u64> {
    let hex = id.strip_prefix(place).filter(|hex| hex.len() == 16)?;
    u64::from_str_radix(hex, 16).ok()
}

/// Documents of one subscription that are, or may be, stored as conflicted: 8 bytes each, in a tree, because what
/// comes and goes makes a hash table double some day.
#[derive(Debug, Default)]
pub struct Known(BTreeSet<u64>);

impl Known {
    /// Begins with what is stored.
    pub fn of(keys: Vec<u64>) -> Known {
        Known(keys.into_iter().collect())
    }

    /// It may be stored from now on, whatever CouchDB answers.
    pub fn insert(&mut self, key: u64) {
        self.0.insert(key);
    }

    /// It is deleted.
    pub fn remove(&mut self, key: u64) {
        self.0.remove(&key);
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the document of this event is.
    pub fn has(&self, event: &Event) -> bool {
        event.conflict_key().is_some_and(|key| self.0.contains(&key))
    }

    /// Whether what is stored agrees with what this event says.
    pub fn agrees(&self, event: &Event) -> bool {
        event.conflict_key().is_none() || self.has(event) == event.is_conflicted()
    }

    /// Says what of the event only memory knows. Final while no other event of its document is at work.
    pub fn judge(&self, event: &mut Event) {
        let is_known = self.has(event);
        if let Some(conflict) = event.conflict.as_ref().filter(|_| event.standing != Standing::Conflicted) {
            (event.standing, event.id) = match is_known {
                true => (Standing::Resolved, conflict.resolved_id),
                false => (Standing::Plain, conflict.row_id),
            };
        }
    }
}

/// The `webhook-id` of `document.resolved`. Not that of its winner alone: whoever deletes the other leaves brings back
/// a state that may have been told before the conflict, and receivers drop ids that they know. `gone` are the deleted
/// leaves, which no two resolutions of a document share.
pub fn resolved_id(
    webhook: &str,
    db: &str,
    mark: &str,
    doc_id: &str,
    rev: &str,
    gone: &[String],
) -> WebhookId {
    WebhookId::of(&(webhook, db, mark, doc_id, [rev], "resolved", gone))
}

/// The query that asks a document for these leaves: `open_revs=["2-a","2-b"]`, not encoded.
pub fn leaves_query(revs: &[String]) -> String {
    match revs.len() {
        ..=NAMED_MAX => serde_json::to_string(revs).expect("texts serialize"),
        _ => "all".to_owned(),
    }
}

/// The bodies in an answer to [`leaves_query`], `[{"ok":{…}},{"missing":"2-a"}]`, in the order of `revs`, each as
/// `redact` leaves it. One that is gone is left out.
///
/// # Errors
/// Where the answer has another shape.
pub fn leaf_docs(
    answer: &str,
    revs: &[String],
    bytes_max: usize,
    redact: impl Fn(Document) -> Document,
) -> Result<LeafDocs, serde_json::Error> {
    #[derive(Deserialize)]
    struct Leaf<'a> {
        #[serde(borrow)]
        ok: Option<&'a RawValue>,
    }
    let leaves: Vec<Leaf<'_>> = serde_json::from_str(answer)?;
    let mut found: Vec<Option<Document>> = vec![None; revs.len()];
    for text in leaves.iter().filter_map(|leaf| leaf.ok) {
        let mut doc = Document::parse(text.get().to_owned())?;
        let head = doc.take_head().filter(|head| !head.deleted);
        let rev = head.and_then(|head| head.rev);
        if let Some(at) = revs.iter().position(|wanted| Some(wanted) == rev.as_ref()) {
            found[at] = Some(redact(doc));
        }
    }
    let texts: Vec<&str> = found.iter().flatten().map(Document::get).collect();
    let bytes = texts.iter().map(|text| text.len()).sum::<usize>();
    Ok(match bytes <= bytes_max {
        true => LeafDocs::Json(format!("[{}]", texts.join(",")).into()),
        false => LeafDocs::TooLarge(Some(bytes as u64)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_lead_back_to_their_document_and_to_no_other_life_of_its_database() {
        let first = place("orders", "orders", "m1");
        let key = key("orders", "orders", "m1", "order:17");
        let id = id(&first, key);
        assert!(id.starts_with("conflict:orders:"), "{id}");
        assert_eq!(key_of(&first, &id), Some(key));
        assert_eq!(key_of(&place("orders", "orders", "m2"), &id), None);
        assert_eq!(key_of(&place("orders", "other", "m1"), &id), None);
        assert_ne!(key, super::key("orders", "orders", "m2", "order:17"));
        assert_eq!(key_of(&first, &format!("{first}README")), None);
    }

    #[test]
    fn leaves_come_in_the_order_asked_for_byte_for_byte_without_those_that_are_gone() {
        let revs = ["2-a".to_owned(), "2-b".to_owned(), "2-c".to_owned(), "2-d".to_owned()];
        let a = r#"{"_id":"x","_rev":"2-a","n":1.0,"big":12345678901234567890123}"#;
        let d = r#"{"_id":"x","_rev":"2-d" ,"z":-0.0}"#;
        let gone = r#"{"_id":"x","_rev":"2-c","_deleted":true}"#;
        let other = r#"{"_id":"x","_rev":"2-e"}"#;
        let answer = format!(
            "[\n{{\"ok\":{d}}},{{\"ok\":{a}}},{{\"missing\":\"2-b\"}},{{\"ok\":{gone}}},{{\"ok\":{other}}}]\n"
        );
        let docs = |bytes_max| leaf_docs(&answer, &revs, bytes_max, |doc| doc).unwrap();
        assert_eq!(docs(1_000), LeafDocs::Json(format!("[{a},{d}]").into()));
        let bytes = a.len() + d.len();
        assert_eq!(docs(bytes), LeafDocs::Json(format!("[{a},{d}]").into()));
        assert_eq!(docs(bytes - 1), LeafDocs::TooLarge(Some(bytes as u64)));
        assert!(leaf_docs("{}", &revs, 9, |doc| doc).is_err());
    }

    #[test]
    fn many_leaves_are_asked_for_without_their_names() {
        let revs = |n: usize| (0..n).map(|n| format!("2-{n}")).collect::<Vec<_>>();
        assert_eq!(leaves_query(&revs(2)), r#"["2-0","2-1"]"#);
        assert_eq!(leaves_query(&revs(101)), "all");
    }
}
