//! What a receiver has seen, and what was wrong with it: order, doubles, ids.
//!
//! Guarantees that every request is judged by the order in which requests came in, not by when they were
//! answered. Leaves to others: sockets, threads, waiting.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::time::Instant;

use serde::Deserialize;

use crate::pure::signature::Mismatch;

/// One thing told: a request holds one, a batch several.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct Event {
    /// The event's own id, `msg_…`.
    #[serde(default, alias = "_id")]
    pub id: String,
    /// `document.updated`, …
    #[serde(default, rename = "type")]
    pub event_type: String,
    /// What it is about.
    #[serde(default)]
    pub data: EventData,
}

/// `data` of an event, as far as receivers look at it; empty where it is not there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct EventData {
    /// The webhook's name.
    #[serde(default)]
    pub webhook: String,
    /// The database.
    #[serde(default)]
    pub db: String,
    /// The document's id.
    #[serde(default)]
    pub id: String,
    /// `3-9f…`.
    #[serde(default)]
    pub rev: String,
    /// Whether it is a deletion.
    #[serde(default)]
    pub deleted: bool,
}

impl Event {
    /// The events of a body, also of a batch, in a format that names them: `standard`, `cloudevents`,
    /// `couchdb_doc`; none of another.
    pub fn read_all(body: &[u8]) -> Vec<Event> {
        #[derive(Deserialize)]
        struct Batch {
            data: Vec<Event>,
        }
        if let Ok(batch) = serde_json::from_slice::<Batch>(body) {
            return batch.data;
        }
        if let Ok(batch) = serde_json::from_slice::<Vec<Event>>(body) {
            return batch;
        }
        let one = serde_json::from_slice::<Event>(body).ok().filter(|event| !event.event_type.is_empty());
        one.into_iter().collect()
    }
}

/// One request as the receiver got it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// From 1, in the order in which requests were complete.
    pub order: u64,
    /// When it was complete.
    pub received_at: Instant,
    /// Header `webhook-id`.
    pub webhook_id: String,
    /// Header `webhook-timestamp`, seconds since 1970.
    pub timestamp: Option<i64>,
    /// Header `hookd-attempt`.
    pub attempt: Option<u32>,
    /// Header `hookd-webhook`.
    pub webhook: String,
    /// Header `hookd-replay`.
    pub replay: bool,
    /// Path it was posted to.
    pub path: String,
    /// All headers; emptied in the record unless bodies are kept.
    pub headers: Vec<(String, String)>,
    /// The body; emptied in the record unless bodies are kept.
    pub body: Vec<u8>,
    /// What it tells.
    pub events: Vec<Event>,
    /// Whether the signature is right, and why not.
    pub verified: Result<(), Mismatch>,
    /// Requests being worked on when it came, itself included.
    pub concurrency: usize,
    /// What was answered; `None` while it is worked on, and for good when the connection was cut.
    pub status: Option<u16>,
    /// Whether the peer was gone when the answer was ready.
    pub peer_gone: bool,
}

impl Delivery {
    /// The event of a request that is no batch.
    pub fn event(&self) -> Option<&Event> {
        self.events.first()
    }

    /// The document's id; empty when it tells of none.
    pub fn doc_id(&self) -> &str {
        self.event().map_or("", |event| &event.data.id)
    }

    /// The revision; empty when it tells of none.
    pub fn rev(&self) -> &str {
        self.event().map_or("", |event| &event.data.rev)
    }

    /// The database; empty when it tells of none.
    pub fn db(&self) -> &str {
        self.event().map_or("", |event| &event.data.db)
    }

    /// Whether it was answered with 2xx.
    pub fn accepted(&self) -> bool {
        self.status.is_some_and(|status| (200..300).contains(&status))
    }
}

/// Something that must not happen. `order`s are those of deliveries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// Two requests for one document were open at once.
    TwoOpen {
        /// `DB/ID`.
        doc: String,
        /// The one that was open.
        first: u64,
        /// The one that came.
        second: u64,
    },
    /// A revision came again after a newer one had been accepted. (Right only when it won again because the
    /// newer one, a conflict's winner, was deleted.)
    OlderAgain {
        /// `DB/ID`.
        doc: String,
        /// What came.
        rev: String,
        /// What had been accepted since.
        newer: String,
        /// The one that came.
        order: u64,
    },
    /// A generation lower than one accepted before. (Right only when a conflict's winner was deleted, or the
    /// database made again.)
    LowerGeneration {
        /// `DB/ID`.
        doc: String,
        /// What came.
        rev: String,
        /// What had been accepted before.
        accepted: String,
        /// The one that came.
        order: u64,
    },
    /// One revision came under two ids. (Right only when the database was made again, or its conflicts changed.)
    IdChanged {
        /// `DB/ID`.
        doc: String,
        /// The revision.
        rev: String,
        /// The id it had first.
        first: String,
        /// The id it has now.
        now: String,
    },
    /// One id came for two things.
    IdShared {
        /// The id.
        id: String,
        /// What it stood for first, `DB/ID REV`.
        first: String,
        /// What it stands for now.
        now: String,
    },
}

/// All a receiver has seen.
#[derive(Debug, Default)]
pub struct Record {
    keep_bodies: bool,
    deliveries: Vec<Delivery>,
    violations: Vec<Violation>,
    concurrency: usize,
    concurrency_max: usize,
    docs: HashMap<(String, String), DocRecord>,
    ids: HashMap<String, String>,
}

#[derive(Debug, Default)]
struct DocRecord {
    /// Accepted revisions with the order in which they came, ascending.
    accepted: Vec<(u64, String)>,
    /// Orders of requests being worked on.
    open: Vec<u64>,
    first_ids: BTreeMap<String, String>,
}

impl Record {
    /// An empty one; without `keep_bodies` headers and bodies are dropped.
    pub(crate) fn new(keep_bodies: bool) -> Record {
        Record { keep_bodies, ..Record::default() }
    }

    /// All requests so far, in order.
    pub fn deliveries(&self) -> &[Delivery] {
        &self.deliveries
    }

    /// What must not have happened.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// Requests being worked on now.
    pub fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// Most requests worked on at a time.
    pub fn concurrency_max(&self) -> usize {
        self.concurrency_max
    }

    /// Requests answered with 2xx, repeats included.
    pub fn n_accepted(&self) -> usize {
        self.deliveries.iter().filter(|delivery| delivery.accepted()).count()
    }

    /// Events answered with 2xx, repeats included.
    pub fn n_events_accepted(&self) -> usize {
        let accepted = self.deliveries.iter().filter(|delivery| delivery.accepted());
        accepted.map(|delivery| delivery.events.len()).sum()
    }

    /// Requests whose signature is not right.
    pub fn n_unverified(&self) -> usize {
        self.deliveries.iter().filter(|delivery| delivery.verified.is_err()).count()
    }

    /// The accepted revision of a document that came last.
    pub fn accepted_rev(&self, db: &str, doc_id: &str) -> Option<&str> {
        let doc = self.docs.get(&(db.to_owned(), doc_id.to_owned()))?;
        doc.accepted.last().map(|(_, rev)| rev.as_str())
    }

    /// The accepted revision that came last, of every document of a database.
    pub fn accepted_revs(&self, db: &str) -> BTreeMap<String, String> {
        let of_db = self.docs.iter().filter(|((name, _), _)| name == db);
        of_db.filter_map(|((_, id), doc)| Some((id.clone(), doc.accepted.last()?.1.clone()))).collect()
    }

    /// Everything as text, one line a request: to be printed when a test fails.
    pub fn transcript(&self) -> String {
        let mut text = String::new();
        for one in &self.deliveries {
            let status = one.status.map_or("-".to_owned(), |status| status.to_string());
            let attempt = one.attempt.unwrap_or(0);
            let _ = write!(text, "#{} {status} {} attempt {attempt}", one.order, one.webhook_id);
            for event in &one.events {
                let data = &event.data;
                let _ = write!(text, " {} {}/{} {}", event.event_type, data.db, data.id, data.rev);
            }
            let _ = match &one.verified {
                Ok(()) => writeln!(text),
                Err(why) => writeln!(text, " ({why})"),
            };
        }
        for violation in &self.violations {
            let _ = writeln!(text, "violation: {violation:?}");
        }
        text
    }

    /// Notes a request that has come and gives it its order. `still_open` says of an earlier request whether its
    /// peer is still there: one whose peer has given up is no longer open.
    pub(crate) fn arrived(&mut self, mut delivery: Delivery, still_open: impl Fn(u64) -> bool) -> Delivery {
        delivery.order = self.deliveries.len() as u64 + 1;
        self.concurrency += 1;
        self.concurrency_max = self.concurrency_max.max(self.concurrency);
        delivery.concurrency = self.concurrency;
        for event in delivery.events.iter().filter(|event| !event.data.rev.is_empty()) {
            self.judge(delivery.order, event, &still_open);
        }
        let mut kept = delivery.clone();
        if !self.keep_bodies {
            kept.body = Vec::new();
            kept.headers = Vec::new();
        }
        self.deliveries.push(kept);
        delivery
    }

    fn judge(&mut self, order: u64, event: &Event, still_open: &impl Fn(u64) -> bool) {
        let (name, rev) = (format!("{}/{}", event.data.db, event.data.id), event.data.rev.clone());
        let doc = self.docs.entry((event.data.db.clone(), event.data.id.clone())).or_default();
        if let Some(first) = doc.open.iter().copied().find(|open| still_open(*open)) {
            self.violations.push(Violation::TwoOpen { doc: name.clone(), first, second: order });
        }
        doc.open.push(order);
        if let Some((_, newest)) = doc.accepted.last() {
            if *newest != rev && doc.accepted.iter().any(|(_, accepted)| *accepted == rev) {
                let newer = newest.clone();
                let violation = Violation::OlderAgain { doc: name.clone(), rev: rev.clone(), newer, order };
                self.violations.push(violation);
            } else if let Some((_, higher)) =
                doc.accepted.iter().find(|(_, one)| generation(one) > generation(&rev))
            {
                let accepted = higher.clone();
                let violation =
                    Violation::LowerGeneration { doc: name.clone(), rev: rev.clone(), accepted, order };
                self.violations.push(violation);
            }
        }
        let first = doc.first_ids.entry(rev.clone()).or_insert_with(|| event.id.clone());
        if *first != event.id {
            let (first, now) = (first.clone(), event.id.clone());
            self.violations.push(Violation::IdChanged { doc: name.clone(), rev: rev.clone(), first, now });
        }
        let now = format!("{name} {rev}");
        let first = self.ids.entry(event.id.clone()).or_insert_with(|| now.clone());
        if *first != now {
            let violation = Violation::IdShared { id: event.id.clone(), first: first.clone(), now };
            self.violations.push(violation);
        }
    }

    /// Notes what a request is answered, before the answer leaves.
    pub(crate) fn answered(&mut self, order: u64, status: Option<u16>, peer_gone: bool) {
        self.concurrency -= 1;
        let at = usize::try_from(order - 1).expect("orders count deliveries");
        let delivery = &mut self.deliveries[at];
        delivery.status = status;
        delivery.peer_gone = peer_gone;
        let accepted = delivery.accepted();
        for event in delivery.events.iter().filter(|event| !event.data.rev.is_empty()) {
            let key = (event.data.db.clone(), event.data.id.clone());
            let doc = self.docs.get_mut(&key).expect("it was noted when it came");
            doc.open.retain(|open| *open != order);
            if accepted {
                let at = doc.accepted.partition_point(|(earlier, _)| *earlier < order);
                doc.accepted.insert(at, (order, event.data.rev.clone()));
            }
        }
    }
}

fn generation(rev: &str) -> u64 {
    rev.split('-').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(id: &str, doc: &str, rev: &str) -> Delivery {
        let data = EventData { db: "db".into(), id: doc.into(), rev: rev.into(), ..EventData::default() };
        Delivery {
            order: 0,
            received_at: crate::sys::now(),
            webhook_id: id.into(),
            timestamp: None,
            attempt: Some(1),
            webhook: String::new(),
            replay: false,
            path: "/".into(),
            headers: Vec::new(),
            body: Vec::new(),
            events: vec![Event { id: id.into(), event_type: "document.updated".into(), data }],
            verified: Ok(()),
            concurrency: 0,
            status: None,
            peer_gone: false,
        }
    }

    /// Each step is `doc rev status`, a status of 0 leaves the request open; ids are `DOC REV` unless given.
    #[track_caller]
    fn check(steps: &[&str], expected: &[&str]) {
        let mut record = Record::default();
        for step in steps {
            let words: Vec<&str> = step.split(' ').collect();
            let id = words.get(3).map_or(format!("{} {}", words[0], words[1]), |id| (*id).to_owned());
            let one = record.arrived(delivery(&id, words[0], words[1]), |_| true);
            let status: u16 = words[2].parse().unwrap();
            if status > 0 {
                record.answered(one.order, Some(status), false);
            }
        }
        let found: Vec<String> = record.violations.iter().map(|one| format!("{one:?}")).collect();
        let fits = found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| a.starts_with(b));
        assert!(fits, "expected {expected:?}, got {found:?}\n{}", record.transcript());
    }

    #[test]
    fn what_is_right_is_left_alone() {
        check(&["a 1-x 200", "b 1-x 200", "a 2-x 200", "b 1-x 200"], &[]);
        check(&["a 1-x 500", "a 1-x 500", "a 2-x 200", "a 2-x 200"], &[]);
        check(&["a 1-x 0", "b 1-x 0"], &[]);
        check(&["a 2-x 500", "a 1-x 200"], &[]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        check(&["a 1-x 0", "a 1-x 0"], &["TwoOpen"]);
        check(&["a 1-x 200", "a 2-x 200", "a 1-x 200"], &["OlderAgain"]);
        check(&["a 2-x 200", "a 1-x 200"], &["LowerGeneration"]);
        check(&["a 1-x 200", "a 1-x 200 other"], &["IdChanged"]);
        check(&["a 1-x 200 same", "b 1-x 200 same"], &["IdShared"]);
    }

    #[test]
    fn a_request_whose_peer_gave_up_is_not_open() {
        let mut record = Record::default();
        record.arrived(delivery("i", "a", "1-x"), |_| true);
        record.arrived(delivery("i", "a", "1-x"), |_| false);
        assert_eq!(record.violations(), []);
        // The first, of a process killed since, is answered after the second: it came before all the same.
        let newer = record.arrived(delivery("j", "a", "2-x"), |_| false);
        record.answered(newer.order, Some(200), false);
        record.answered(1, Some(200), true);
        assert_eq!((record.accepted_rev("db", "a"), record.concurrency_max()), (Some("2-x"), 3));
    }

    #[test]
    fn reads_single_events_and_batches() {
        let one = r#"{"id":"m","type":"document.deleted","timestamp":"t","source":"s","data":{"db":"d","id":"x","rev":"2-a","deleted":true,"seq":42}}"#;
        let events = Event::read_all(one.as_bytes());
        assert_eq!((events.len(), events[0].data.rev.as_str(), events[0].data.deleted), (1, "2-a", true));
        let batch = format!(r#"{{"id":"b","type":"batch","data":[{one},{one}]}}"#);
        assert_eq!(Event::read_all(batch.as_bytes()).len(), 2);
        let cloudevents = format!("[{one},{one}]");
        assert_eq!(Event::read_all(cloudevents.as_bytes()).len(), 2);
        let document = one.replacen("\"id\"", "\"_id\"", 1);
        assert_eq!(Event::read_all(document.as_bytes())[0].id, "m");
        assert_eq!(Event::read_all(b"not json"), []);
    }
}
