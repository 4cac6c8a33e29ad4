//! What is told: from a row of the feed to an event and its `webhook-id`. Bodies are `format`'s.
//!
//! Guarantees: the same state of a document has the same id for ever (DESIGN §5); `rev` and `doc` belong
//! together; `doc` passes byte for byte; nothing but allow-listed members of `_users` and replicator documents
//! leaves.

use std::fmt;
use std::ops::Range;

use jiff::Timestamp;
use ring::digest;

use crate::pure::about::{self, About};
use crate::pure::changes::{Line, Row, RowDoc};
use crate::pure::conflict::{self, CONFLICTED, Conflict, LeafDocs, RESOLVED, Standing};
use crate::pure::document::{Document, Head, members};
use crate::pure::format::{self, Format};
use crate::pure::redact::document::Redaction;
use crate::pure::seq::Seq;

/// The stable identity of one thing told to one webhook: `msg_` and 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WebhookId([u8; 16]);

impl WebhookId {
    /// First half of SHA-256 over a JSON array of texts. Ids may hold any byte, so no separator would do.
    pub fn of(parts: &impl serde::Serialize) -> WebhookId {
        let json = serde_json::to_vec(parts).expect("texts and numbers serialize");
        let hash = digest::digest(&digest::SHA256, &json);
        WebhookId(hash.as_ref()[..16].try_into().expect("SHA-256 has 32 bytes"))
    }

    /// From its text.
    pub fn parse(text: &str) -> Option<WebhookId> {
        let hex = text.strip_prefix("msg_").filter(|hex| hex.len() == 32 && hex.is_ascii())?;
        let mut bytes = [0; 16];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
        }
        Some(WebhookId(bytes))
    }

    /// Its text.
    pub fn text(&self) -> [u8; 36] {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut text = *b"msg_00000000000000000000000000000000";
        for (pair, byte) in text[4..].chunks_exact_mut(2).zip(self.0) {
            pair.copy_from_slice(&[HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
        text
    }

    /// The first 16 hex digits as a number: what checkpoints and memory keep.
    pub fn short(&self) -> u64 {
        u64::from_be_bytes(self.0[..8].try_into().expect("8 of 16 bytes"))
    }
}

impl fmt::Display for WebhookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).expect("hex digits are ASCII"))
    }
}

impl fmt::Debug for WebhookId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The document of an event.
#[derive(Debug, Clone)]
pub enum EventDoc {
    /// Not asked for, or a deletion without fields of its own.
    Absent,
    /// Longer than `payload_bytes_max`; its length in bytes.
    TooLarge(u64),
    /// CouchDB gave `null`.
    Gone,
    /// The JSON text as CouchDB sent it.
    Json(Document),
}

/// A change of a document, ready to be told.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its identity.
    pub id: WebhookId,
    /// The document.
    pub doc_id: String,
    /// The revision told: the body's where there is a body, else the row's.
    pub rev: String,
    /// Live conflicting revisions, sorted; empty unless the webhook tells conflicts.
    pub conflicts: Vec<String>,
    /// Whether this revision deletes the document.
    pub deleted: bool,
    /// For logs and payloads only.
    pub seq: Option<Seq>,
    /// The body.
    pub doc: EventDoc,
    /// The row as CouchDB wrote it, for `format = raw`, where all of it may leave.
    pub line: Option<Box<Line>>,
    /// What it says of the document's leaves.
    pub standing: Standing,
    /// What is kept of them, or read; `None` where that is nothing.
    pub conflict: Option<Box<Conflict>>,
    /// What is told in the place of a document's change: something about ourselves.
    pub about: Option<Box<About>>,
    /// When the row was read.
    pub read_at: Timestamp,
}

/// `document.updated`.
pub const UPDATED: &str = "document.updated";
/// `document.deleted`.
pub const DELETED: &str = "document.deleted";

impl Event {
    /// The type in the payload.
    pub fn event_type(&self) -> &'static str {
        match (&self.about, self.standing) {
            (Some(about), _) => about.event_type,
            (None, Standing::Conflicted) => CONFLICTED,
            (None, Standing::Resolved) => RESOLVED,
            (None, Standing::Plain) if self.deleted => DELETED,
            (None, Standing::Plain) => UPDATED,
        }
    }

    /// Whether the document has more than one live leaf.
    pub fn is_conflicted(&self) -> bool {
        self.standing == Standing::Conflicted
    }

    /// Names its document among those that are kept as conflicted.
    pub fn conflict_key(&self) -> Option<u64> {
        self.conflict.as_ref().and_then(|conflict| conflict.key)
    }

    /// The id that its row alone gives, whatever memory makes of it.
    pub fn row_id(&self) -> WebhookId {
        self.conflict.as_ref().map_or(self.id, |conflict| conflict.row_id)
    }

    /// Makes it what a letter with this id is about: the end of a conflict. It may be kept still that there is one.
    pub fn resolve(&mut self, id: WebhookId) {
        let (key, row_id, docs) = (self.conflict_key(), self.row_id(), LeafDocs::Unread);
        (self.id, self.standing) = (id, Standing::Resolved);
        self.conflict = Some(Box::new(Conflict { key, wanted: true, row_id, resolved_id: id, docs }));
    }

    /// Bodies of its conflicting leaves.
    pub fn leaf_docs(&self) -> &LeafDocs {
        self.conflict.as_ref().map_or(&LeafDocs::Unread, |conflict| &conflict.docs)
    }

    /// What it weighs in memory, about, in bytes.
    pub fn bytes(&self) -> usize {
        const FIXED: usize = 400;
        let doc = match &self.doc {
            EventDoc::Json(doc) => doc.get().len(),
            EventDoc::Absent | EventDoc::TooLarge(_) | EventDoc::Gone => 0,
        };
        let line = self.line.as_ref().map_or(0, |line| line.bytes());
        let about = self.about.as_ref().map_or(0, |about| about.data.len() + about.message.len());
        FIXED + self.doc_id.len() + doc + line + about + self.leaf_docs().bytes()
    }

    /// What it adds to the body of a batch, in bytes, about: its seq and id stand there twice in some formats.
    pub fn body_bytes(&self) -> usize {
        const FIXED: usize = 600;
        let doc = match &self.doc {
            EventDoc::Json(doc) => doc.get().len(),
            EventDoc::Absent | EventDoc::TooLarge(_) | EventDoc::Gone => 0,
        };
        let seq = self.seq.as_ref().map_or(0, |seq| seq.as_json().len());
        let conflicts: usize = self.conflicts.iter().map(|rev| rev.len() + 3).sum();
        let about = self.about.as_ref().map_or(0, |about| about.data.len());
        FIXED + 2 * (self.doc_id.len() + seq) + conflicts + doc + about + self.leaf_docs().bytes()
    }

    /// Whether it is told even when something newer of the same subject follows: a state that a replication was in,
    /// where of a document only the last one counts.
    pub fn is_kept(&self) -> bool {
        self.about.as_ref().is_some_and(|about| about.is_kept)
    }

    /// A number for its document, to key memory with. One that is kept stands for itself.
    pub fn doc_key(&self) -> u64 {
        if self.is_kept() { self.id.short() } else { doc_key(&self.doc_id) }
    }
}

/// A number for a document id (FNV-1a). Two documents with one number only cost a repeat: what is compared
/// behind it is the `webhook-id`.
pub fn doc_key(doc_id: &str) -> u64 {
    doc_id
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A row, judged: what it means for the position, and what of it is to be told.
#[derive(Debug, Clone)]
pub struct Arrived {
    /// `None` where CouchDB wrote `null`.
    pub seq: Option<Seq>,
    /// `None` when the webhook does not want it.
    pub event: Option<Event>,
}

/// Where a webhook's events come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// Changes of documents.
    Changes,
    /// Ourselves, as `state_db` keeps it.
    Daemon,
    /// States of replications, as CouchDB's scheduler and their documents tell them.
    Replications,
    /// Databases themselves: that they came, changed, went.
    Databases,
}

/// What one subscription tells: everything that turns its rows into events and events into bodies.
#[derive(Debug, Clone)]
pub struct Telling {
    /// Name of the webhook.
    pub webhook: String,
    /// Name of the database.
    pub db: String,
    /// `source` of the payload: where people know the database.
    pub source: String,
    /// Wanted event types, patterns with `*`.
    pub events: Vec<String>,
    /// Whether the document goes into the payload.
    pub include_docs: bool,
    /// Whether live conflicts are told.
    pub conflicts: bool,
    /// Whether the bodies of conflicting leaves go into the payload.
    pub conflict_docs: bool,
    /// Whether design documents are told.
    pub design_docs: bool,
    /// Documents above this many bytes are left out.
    pub payload_bytes_max: usize,
    /// Shape of the bodies.
    pub format: Format,
    /// Where events come from.
    pub watch: Watch,
}

impl Telling {
    /// Judges a row, read at `read_at` from the database that bears `mark`.
    pub fn arrived(&self, row: Row, mark: &str, read_at: Timestamp) -> Arrived {
        let seq = row.seq.clone();
        if !self.design_docs && row.id.starts_with("_design/") {
            return Arrived { seq, event: None };
        }
        if self.watch == Watch::Daemon {
            let event = about::event(self, row, mark);
            return Arrived { seq, event: event.filter(|event| self.wants(event)) };
        }
        let event = self.event(row, mark, read_at);
        // What is not wanted may still be a conflict, or the end of one.
        let counts = self.wants(&event) || event.conflict_key().is_some();
        Arrived { seq, event: counts.then_some(event) }
    }

    /// Whether it is kept which documents are conflicted: for whoever wants to be told that they are no more.
    pub fn remembers(&self) -> bool {
        self.conflicts
            && self.watch == Watch::Changes
            && self.events.iter().any(|pattern| matches(pattern, RESOLVED))
    }

    /// Whether its type is among those to be told.
    pub fn wants(&self, event: &Event) -> bool {
        self.wants_type(event.event_type())
    }

    /// Whether events of this type are to be told.
    pub fn wants_type(&self, event_type: &str) -> bool {
        self.events.iter().any(|pattern| matches(pattern, event_type))
    }

    /// A row as an event, wanted or not.
    pub fn event(&self, row: Row, mark: &str, read_at: Timestamp) -> Event {
        let Row { seq, id: doc_id, mut revs, deleted, mut doc, line } = row;
        // The members decide only where there are any: a body may be newer than its row.
        let head = match &mut doc {
            RowDoc::Json(doc) => doc.take_head(),
            RowDoc::Absent | RowDoc::Null | RowDoc::TooLarge { .. } => None,
        };
        // A body names the live leaves; a row alone lists deleted ones among them.
        let are_leaves_known = head.is_some() || revs.len() < 2 || deleted;
        let remembers = are_leaves_known && self.remembers();
        let mut gone = if remembers { revs.clone() } else { Vec::new() };
        let row_rev = if revs.is_empty() { String::new() } else { revs.remove(0) };
        let (rev, deleted, mut conflicts) = match head {
            Some(Head { rev: Some(rev), deleted, conflicts }) => (rev, deleted, conflicts),
            // Without a body only the row's leaves are known, deleted ones among them.
            _ => (row_rev, deleted, revs),
        };
        if self.conflicts {
            conflicts.sort();
        } else {
            conflicts.clear();
        }
        let revisions: Vec<&str> =
            std::iter::once(rev.as_str()).chain(conflicts.iter().map(String::as_str)).collect();
        let id = WebhookId::of(&(&self.webhook, &self.db, mark, &doc_id, revisions));
        let standing = match are_leaves_known && !deleted && !conflicts.is_empty() {
            true => Standing::Conflicted,
            false => Standing::Plain,
        };
        let doc = self.doc(doc, deleted);
        let line = line.filter(|_| Redaction::of_db(&self.db) == Redaction::None);
        let about = None;
        let mut event = Event {
            id,
            doc_id,
            rev,
            conflicts,
            deleted,
            seq,
            doc,
            line,
            standing,
            conflict: None,
            about,
            read_at,
        };
        if remembers || (self.conflict_docs && event.is_conflicted()) {
            let Telling { webhook, db, .. } = self;
            gone.retain(|leaf| *leaf != event.rev && !event.conflicts.contains(leaf));
            gone.sort();
            event.conflict = Some(Box::new(Conflict {
                key: remembers.then(|| conflict::key(webhook, db, mark, &event.doc_id)),
                wanted: self.wants(&event),
                row_id: event.id,
                resolved_id: conflict::resolved_id(webhook, db, mark, &event.doc_id, &event.rev, &gone),
                docs: LeafDocs::Unread,
            }));
        }
        event
    }

    /// What may leave of a document of this database.
    pub fn redacted(&self, doc: Document) -> Document {
        Redaction::of_db(&self.db).apply(doc)
    }

    fn doc(&self, doc: RowDoc, deleted: bool) -> EventDoc {
        if !self.include_docs {
            return EventDoc::Absent;
        }
        match doc {
            RowDoc::Absent => EventDoc::Absent,
            RowDoc::Null => EventDoc::Gone,
            RowDoc::TooLarge { bytes } => EventDoc::TooLarge(bytes),
            RowDoc::Json(doc) => {
                let doc = self.redacted(doc);
                // A raw line holds what CouchDB wrote into it.
                if deleted && self.format != Format::Raw && !has_own_members(doc.get()) {
                    EventDoc::Absent
                } else if doc.get().len() > self.payload_bytes_max {
                    EventDoc::TooLarge(doc.get().len() as u64)
                } else {
                    EventDoc::Json(doc)
                }
            }
        }
    }

    /// The body of a request that tells this event, in the webhook's format.
    pub fn body(&self, event: &Event) -> Vec<u8> {
        format::body(self, event)
    }
}

/// A time in UTC with milliseconds: `2026-11-21T20:46:41.123Z`.
#[derive(Debug, Clone, Copy)]
pub struct Rfc3339(pub Timestamp);

impl Rfc3339 {
    /// Its text; written by hand, because every event has one. Years are those of four digits.
    pub fn text(self) -> [u8; 24] {
        let time = jiff::tz::Offset::UTC.to_datetime(self.0);
        let mut text = *b"0000-00-00T00:00:00.000Z";
        let mut put = |place: Range<usize>, number: i16| {
            let mut rest = number.unsigned_abs();
            for digit in text[place].iter_mut().rev() {
                *digit += u8::try_from(rest % 10).expect("it is a digit");
                rest /= 10;
            }
        };
        put(0..4, time.year());
        put(5..7, time.month().into());
        put(8..10, time.day().into());
        put(11..13, time.hour().into());
        put(14..16, time.minute().into());
        put(17..19, time.second().into());
        put(20..23, time.millisecond());
        text
    }
}

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.text()).expect("digits are ASCII"))
    }
}

/// Whether an event type fits a pattern: `*` stands for any run of characters.
pub fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => text.strip_prefix(head).is_some_and(|tail| {
            rest.is_empty()
                || tail
                    .char_indices()
                    .map(|(at, _)| at)
                    .chain([tail.len()])
                    .any(|at| matches(rest, &tail[at..]))
        }),
    }
}

/// Whether a tombstone says more than that it is one.
fn has_own_members(doc: &str) -> bool {
    members(doc).iter().any(|(name, _)| !matches!(name.as_str(), "_id" | "_rev" | "_deleted"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn telling() -> Telling {
        Telling {
            webhook: "orders".into(),
            db: "orders".into(),
            source: "https://couch.example/orders".into(),
            events: vec!["document.*".into()],
            include_docs: true,
            conflicts: false,
            conflict_docs: false,
            design_docs: false,
            payload_bytes_max: 1 << 20,
            format: Format::Standard,
            watch: Watch::Changes,
        }
    }

    fn row(rev: &str, deleted: bool, doc: Option<&str>) -> Row {
        Row {
            seq: Seq::from_json("\"42-g1AAA\""),
            id: "order:17".into(),
            revs: vec![rev.into()],
            deleted,
            doc: doc.map_or(RowDoc::Absent, |doc| RowDoc::Json(Document::parse(doc.to_owned()).unwrap())),
            line: None,
        }
    }

    fn body(telling: &Telling, row: Row) -> String {
        let read_at = "2026-11-21T20:46:41.1234Z".parse().unwrap();
        let event = telling.arrived(row, "aa", read_at).event.expect("wanted");
        String::from_utf8(telling.body(&event)).unwrap()
    }

    #[test]
    fn times_are_written_as_jiff_writes_them() {
        let check = |at: Timestamp| assert_eq!(Rfc3339(at).to_string(), format!("{at:.3}"));
        check("0001-01-01T00:00:00Z".parse().unwrap());
        check("2024-02-29T23:59:59.9999Z".parse().unwrap());
        check("9999-12-30T21:59:59.0019Z".parse().unwrap());
        (0..2_000).for_each(|n| check(Timestamp::from_millisecond(n * 1_234_567_891).unwrap()));
    }

    #[test]
    fn a_body_holds_what_the_design_says() {
        let doc = r#"{"_id":"order:17","_rev":"3-9f","z":123456789012345678901234,"a":1.0,"n":-0.0,"e":1.0000000000000000199e+30}"#;
        expect_test::expect![[r#"{"id":"msg_d0fcd72b3ca2bde0fc684f8ce6fc3849","type":"document.updated","timestamp":"2026-11-21T20:46:41.123Z","source":"https://couch.example/orders","data":{"webhook":"orders","db":"orders","id":"order:17","rev":"3-9f","generation":3,"deleted":false,"seq":"42-g1AAA","doc":{"_id":"order:17","_rev":"3-9f","z":123456789012345678901234,"a":1.0,"n":-0.0,"e":1.0000000000000000199e+30}}}"#]]
        .assert_eq(&body(&telling(), row("3-9f", false, Some(doc))));
    }

    #[test]
    fn a_bare_tombstone_has_no_doc_and_one_with_fields_has() {
        let bare = body(&telling(), row("4-a", true, Some(r#"{"_id":"x","_rev":"4-a","_deleted":true}"#)));
        assert!(bare.contains(r#""type":"document.deleted""#) && !bare.contains("\"doc\""), "{bare}");
        let own = r#"{"_id":"x","_rev":"4-a","_deleted":true,"type":"order"}"#;
        let own = body(&telling(), row("4-a", true, Some(own)));
        assert!(own.contains(r#""doc":{"_id":"x""#), "{own}");
    }

    #[test]
    fn an_event_is_about_the_revision_of_its_body() {
        let read_at = Timestamp::UNIX_EPOCH;
        let newer = row("3-a", false, Some(r#"{"_id":"x","_rev":"4-b","_deleted":true,"why":"x"}"#));
        let event = telling().arrived(newer, "m", read_at).event.unwrap();
        assert_eq!((event.rev.as_str(), event.deleted), ("4-b", true));
        let same = telling().arrived(row("4-b", true, None), "m", read_at).event.unwrap();
        assert_eq!(event.id, same.id);
    }

    #[test]
    fn ids_differ_where_what_they_stand_for_differs() {
        let at = Timestamp::UNIX_EPOCH;
        let id = |telling: &Telling, row: Row, mark: &str| telling.arrived(row, mark, at).event.unwrap().id;
        let first = id(&telling(), row("3-a", false, None), "m1");
        assert_eq!(first, id(&telling(), row("3-a", false, None), "m1"));
        assert_ne!(first, id(&telling(), row("3-b", false, None), "m1"));
        assert_ne!(first, id(&telling(), row("3-a", false, None), "m2"));
        assert_ne!(first, id(&Telling { webhook: "b".into(), ..telling() }, row("3-a", false, None), "m1"));
        assert_ne!(first, id(&Telling { db: "b".into(), ..telling() }, row("3-a", false, None), "m1"));
    }

    #[test]
    fn conflicts_are_part_of_the_id_only_when_told_and_their_order_does_not_matter() {
        let at = Timestamp::UNIX_EPOCH;
        let id = |telling: &Telling, conflicts: &str| {
            let doc = format!(r#"{{"_id":"x","_rev":"3-a","_conflicts":{conflicts}}}"#);
            telling.arrived(row("3-a", false, Some(&doc)), "m", at).event.unwrap().id
        };
        let with = Telling { conflicts: true, ..telling() };
        assert_eq!(id(&with, r#"["2-c","2-b"]"#), id(&with, r#"["2-b","2-c"]"#));
        assert_ne!(id(&with, r#"["2-c"]"#), id(&with, "[]"));
        assert_eq!(id(&telling(), r#"["2-c"]"#), id(&telling(), "[]"));
    }

    #[test]
    fn what_is_not_wanted_still_has_a_seq() {
        let at = Timestamp::UNIX_EPOCH;
        let design = Row { id: "_design/app".into(), ..row("1-a", false, None) };
        let arrived = telling().arrived(design, "m", at);
        assert!(arrived.event.is_none() && arrived.seq.is_some());
        let only = Telling { events: vec!["document.deleted".into()], ..telling() };
        assert!(only.arrived(row("1-a", false, None), "m", at).event.is_none());
        assert!(only.arrived(row("2-a", true, None), "m", at).event.is_some());
    }

    #[test]
    fn large_and_missing_documents_are_named_as_omitted() {
        let small = Telling { payload_bytes_max: 10, ..telling() };
        let text = body(&small, row("1-a", false, Some(r#"{"_id":"x","_rev":"1-a"}"#)));
        assert!(text.contains(r#""doc_omitted":{"reason":"too_large","bytes":24}"#), "{text}");
        let gone = Row { doc: RowDoc::Null, ..row("1-a", false, None) };
        assert!(body(&telling(), gone).contains(r#""doc_omitted":{"reason":"gone"}"#));
    }

    #[test]
    fn secrets_of_users_and_replications_stay() {
        let doc = r#"{"_id":"org.couchdb.user:a","_rev":"1-a","name":"a","derived_key":"CANARY","salt":"CANARY","roles":["x"]}"#;
        let users = Telling { db: "_users".into(), ..telling() };
        let text = body(&users, row("1-a", false, Some(doc)));
        assert!(text.contains(r#""roles":["x"]"#) && !text.contains("CANARY"), "{text}");
        let doc = r#"{"_id":"r","_rev":"1-a","source":"https://u:CANARY@h/db","target":{"headers":{"Authorization":"CANARY"}},"continuous":true}"#;
        let replicator = Telling { db: "eu/_replicator".into(), ..telling() };
        let text = body(&replicator, row("1-a", false, Some(doc)));
        assert!(text.contains(r#""continuous":true"#) && !text.contains("CANARY"), "{text}");
    }

    #[test]
    fn patterns() {
        assert!(matches("document.*", "document.updated"));
        assert!(matches("*", "document.updated"));
        assert!(matches("*.deleted", "document.deleted"));
        assert!(!matches("*.deleted", "document.updated"));
        assert!(!matches("document", "document.updated"));
    }
}
