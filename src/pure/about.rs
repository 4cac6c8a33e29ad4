//! Events about ourselves: what is kept of them in `state_db`, and what a webhook with `watch = daemon` tells of that.
//!
//! Such a webhook reads the feed of `state_db` as others read theirs: what was stored there is told at least once,
//! whatever dies in between. Two kinds of documents are told: dead letters, and *conditions*, one document for each
//! thing that can be well or not, rewritten when that changes. So what changes twice before it is told is told as it is
//! then, and nothing grows. Guarantees that no loop is possible: conditions are kept of other webhooks only, and dead
//! letters of events about ourselves are never told.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::pure::changes::{Row, RowDoc};
use crate::pure::conflict::Standing;
use crate::pure::message::{Event, EventDoc, Telling, WebhookId};

/// An endpoint is down.
pub const FAILING: &str = "webhook.failing";
/// It takes events again.
pub const RECOVERED: &str = "webhook.recovered";
/// It answered 410 and that is believed.
pub const GONE: &str = "webhook.gone";
/// An event was given up.
pub const DEAD_LETTER: &str = "webhook.dead_letter";
/// A database cannot be read.
pub const FEED_LOST: &str = "feed.lost";
/// It can again.
pub const FEED_RECOVERED: &str = "feed.recovered";
/// CouchDB went back in a feed.
pub const FEED_REWOUND: &str = "feed.rewound";
/// A database was deleted and created again.
pub const RECREATED: &str = "database.recreated";
/// We started.
pub const STARTED: &str = "daemon.started";
/// Of a command that tries an endpoint.
pub const TEST: &str = "webhook.test";

/// Every type there is.
pub const TYPES: [&str; 10] = [
    FAILING,
    RECOVERED,
    GONE,
    DEAD_LETTER,
    FEED_LOST,
    FEED_RECOVERED,
    FEED_REWOUND,
    RECREATED,
    STARTED,
    TEST,
];

/// `_id` of a condition begins so.
pub const CONDITION: &str = "condition:";

/// What an event about ourselves says.
#[derive(Debug, Clone)]
pub struct About {
    /// One of [`TYPES`].
    pub event_type: &'static str,
    /// What it is about: `orders`, `orders/db`, `daemon`.
    pub subject: String,
    /// For people, one line.
    pub message: String,
    /// `data` of the payload.
    pub data: Box<str>,
    /// Told even when something newer of the same subject follows.
    pub is_kept: bool,
}

impl About {
    /// The event that says it, under this id; `doc_id` and `rev` are those of what it was read from.
    pub fn into_event(self, id: WebhookId, doc_id: String, rev: String, read_at: Timestamp) -> Event {
        Event {
            id,
            doc_id,
            rev,
            conflicts: Vec::new(),
            deleted: false,
            seq: None,
            doc: EventDoc::Absent,
            line: None,
            standing: Standing::Plain,
            conflict: None,
            about: Some(Box::new(self)),
            read_at,
        }
    }
}

/// Something that became so, to be kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Tell {
    /// `webhook:orders`, `feed:orders/db`, `database.recreated:orders/db`, `daemon`.
    pub subject: String,
    /// One of [`TYPES`].
    pub event_type: &'static str,
    /// When.
    pub at: Timestamp,
    /// Members of `data`; `message` among them.
    pub data: Map<String, Value>,
    /// Told though the last thing told of the subject was the same.
    pub again: bool,
}

impl Tell {
    /// About a webhook; `message` for people.
    pub fn of_webhook(webhook: &str, event_type: &'static str, at: Timestamp, message: &str) -> Tell {
        let data = Map::from_iter([
            ("about".to_owned(), json!(webhook)),
            ("message".to_owned(), json!(format!("webhook {webhook}: {message}"))),
        ]);
        Tell { subject: format!("webhook:{webhook}"), event_type, at, data, again: false }
    }

    /// About one database of a webhook.
    pub fn of_feed(webhook: &str, db: &str, event_type: &'static str, at: Timestamp, message: &str) -> Tell {
        let mut tell = Tell::of_webhook(webhook, event_type, at, &format!("database {db}: {message}"));
        tell.data.insert("db".to_owned(), json!(db));
        // What happens is no condition that ends: it has a document of its own, which a feed found again a moment
        // later does not overwrite, and happening once more it is told once more.
        tell.again = matches!(event_type, FEED_REWOUND | RECREATED);
        let kept_under = if tell.again { event_type } else { "feed" };
        tell.subject = format!("{kept_under}:{webhook}/{db}");
        tell
    }

    /// Adds a member of `data`.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Tell {
        self.data.insert(name.to_owned(), value);
        self
    }
}

/// The document that keeps it, `_id` = `condition:` + subject:
/// `{"type":"webhook.failing","n":3,"at":"2026-11-22T00:52:43.622Z","data":{"about":"orders","message":"…"}}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// What holds.
    #[serde(rename = "type")]
    pub event_type: String,
    /// Counts changes of this subject: part of the `webhook-id`, stored before anything is sent.
    pub n: u64,
    /// Since when.
    pub at: Timestamp,
    /// What is told.
    pub data: Map<String, Value>,
}

impl Condition {
    /// What is to be stored after `tell`, over what is stored; `None`: nothing, it is so already, or ends what never
    /// began.
    pub fn after(stored: Option<Condition>, tell: &Tell) -> Option<Condition> {
        let ends = matches!(tell.event_type, RECOVERED | FEED_RECOVERED);
        let known = stored.as_ref().map(|stored| stored.event_type.as_str());
        let is_news = match known {
            None => !ends,
            Some(known) => known != tell.event_type,
        };
        let (rev, n) = stored.map_or((None, 0), |stored| (stored.rev, stored.n));
        (is_news || tell.again).then(|| Condition {
            rev,
            event_type: tell.event_type.to_owned(),
            n: n + 1,
            at: tell.at,
            data: tell.data.clone(),
        })
    }
}

/// Whether events of this type are about ourselves: their dead letters are told to nobody.
pub fn is_about_us(event_type: &str) -> bool {
    TYPES.contains(&event_type)
}

/// Of a dead letter, what is told of it.
#[derive(Deserialize)]
struct Letter {
    webhook: String,
    event_type: String,
    stored_at: Timestamp,
    class: String,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Members of a letter that are told, beside its id.
const LETTER_MEMBERS: [&str; 6] = ["db", "doc_id", "rev", "status", "answer", "attempts"];

/// The event that a row of `state_db` is, read from the database that bears `mark`; `None` for everything else there.
pub fn event(telling: &Telling, row: Row, mark: &str) -> Option<Event> {
    let RowDoc::Json(doc) = &row.doc else { return None };
    if row.deleted {
        return None;
    }
    let named = |event_type: &str| TYPES.into_iter().find(|name| *name == event_type);
    let (event_type, at, n, data) = if row.id.starts_with(CONDITION) {
        let condition: Condition = serde_json::from_str(doc.get()).ok()?;
        (named(&condition.event_type)?, condition.at, json!(condition.n), condition.data)
    } else if row.id.starts_with("msg_") {
        let letter: Letter = serde_json::from_str(doc.get()).ok()?;
        if is_about_us(&letter.event_type) {
            return None;
        }
        let at = letter.stored_at;
        (DEAD_LETTER, at, json!(at.to_string()), letter_data(&row.id, letter))
    } else {
        return None;
    };
    let id = WebhookId::of(&(&telling.webhook, &telling.db, mark, &row.id, event_type, n));
    let rev = row.revs.into_iter().next().unwrap_or_default();
    Some(made(telling, id, row.id, rev, event_type, at, data)).map(|event| Event { seq: row.seq, ..event })
}

/// CouchDB itself cannot be reached: nothing can be stored, so this is told from memory, and dies with it. `n` is a
/// number that no other outage has: a random one, because there is nowhere to count.
pub fn couchdb_lost(telling: &Telling, mark: &str, n: u64, at: Timestamp, why: &str) -> Event {
    let id = WebhookId::of(&(&telling.webhook, &telling.db, mark, COUCHDB_ID, FEED_LOST, n));
    let data = couchdb(FEED_LOST, at, &format!("CouchDB cannot be read: {why}")).data;
    made(telling, id, COUCHDB_ID.to_owned(), String::new(), FEED_LOST, at, data)
}

/// CouchDB can be read again; to be kept.
pub fn couchdb_recovered(at: Timestamp) -> Tell {
    couchdb(FEED_RECOVERED, at, "CouchDB can be read again")
}

/// `_id` of the condition of CouchDB itself.
const COUCHDB_ID: &str = "condition:couchdb";

fn couchdb(event_type: &'static str, at: Timestamp, message: &str) -> Tell {
    let data =
        Map::from_iter([("about".to_owned(), json!("couchdb")), ("message".to_owned(), json!(message))]);
    Tell { subject: "couchdb".to_owned(), event_type, at, data, again: true }
}

/// We started; to be kept.
pub fn started(version: &str, at: Timestamp) -> Tell {
    let data = Map::from_iter([
        ("about".to_owned(), json!("daemon")),
        ("message".to_owned(), json!(format!("couch-hookd {version} started"))),
        ("version".to_owned(), json!(version)),
    ]);
    Tell { subject: "daemon".to_owned(), event_type: STARTED, at, data, again: true }
}

fn letter_data(id: &str, letter: Letter) -> Map<String, Value> {
    let Letter { webhook, event_type, class, mut other, .. } = letter;
    let db = other.get("db").and_then(Value::as_str).unwrap_or_default().to_owned();
    let doc_id = other.get("doc_id").and_then(Value::as_str).unwrap_or_default().to_owned();
    let message =
        format!("webhook {webhook}: {event_type} of {doc_id} in {db} is a dead letter now ({class})");
    let mut told = Map::from_iter([
        ("id".to_owned(), json!(id)),
        ("event_type".to_owned(), json!(event_type)),
        ("class".to_owned(), json!(class)),
    ]);
    for name in LETTER_MEMBERS {
        told.extend(
            other.remove(name).filter(|value| !value.is_null()).map(|value| (name.to_owned(), value)),
        );
    }
    Map::from_iter([
        ("about".to_owned(), json!(webhook)),
        ("message".to_owned(), json!(message)),
        ("dead_letter".to_owned(), Value::Object(told)),
    ])
}

fn made(
    telling: &Telling,
    id: WebhookId,
    doc_id: String,
    rev: String,
    event_type: &'static str,
    at: Timestamp,
    mut data: Map<String, Value>,
) -> Event {
    let text = |name: &str| data.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (subject, message) = (text("about"), text("message"));
    data.insert("webhook".to_owned(), json!(telling.webhook));
    let data = Value::Object(data).to_string().into_boxed_str();
    let about = About { event_type, subject, message, data, is_kept: false };
    about.into_event(id, doc_id, rev, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pure::document::Document;
    use crate::pure::format::Format;
    use crate::pure::message::Watch;
    use crate::pure::seq::Seq;

    fn telling() -> Telling {
        Telling {
            webhook: "ops".into(),
            db: "couch_hookd".into(),
            source: "https://couch.example/couch_hookd".into(),
            events: vec!["*".into()],
            include_docs: true,
            conflicts: false,
            conflict_docs: false,
            design_docs: false,
            payload_bytes_max: 1 << 20,
            format: Format::Standard,
            watch: Watch::Daemon,
        }
    }

    fn row(id: &str, doc: &Value) -> Row {
        Row {
            seq: Seq::from_json("7"),
            id: id.into(),
            revs: vec!["1-a".into()],
            deleted: false,
            doc: RowDoc::Json(Document::parse(doc.to_string()).unwrap()),
            line: None,
        }
    }

    fn told(id: &str, doc: &Value) -> Option<Event> {
        telling().arrived(row(id, doc), "m", Timestamp::UNIX_EPOCH).event
    }

    fn at() -> Timestamp {
        "2026-11-22T00:52:43.622Z".parse().unwrap()
    }

    fn stored(n: u64, event_type: &str) -> Condition {
        Condition { rev: Some("1-a".into()), event_type: event_type.into(), n, at: at(), data: Map::new() }
    }

    fn letter(event_type: &str) -> Value {
        json!({"webhook": "orders", "db": "orders", "mark": "x", "doc_id": "d7", "rev": "1-a", "revs": ["1-a"],
            "seq": 4, "event_type": event_type, "class": "refused", "status": 422, "answer": "no", "attempts": 3,
            "first_attempt_at": at(), "stored_at": at()})
    }

    #[test]
    fn what_is_stored_changes_only_when_something_does() {
        let after = |known: Option<&str>, event_type| {
            let tell = Tell::of_feed("orders", "db", event_type, at(), "x");
            Condition::after(known.map(|known| stored(4, known)), &tell).map(|condition| condition.n)
        };
        assert_eq!(after(None, FAILING), Some(1));
        assert_eq!(after(None, RECOVERED), None, "what never began does not end");
        assert_eq!(after(Some(FAILING), FAILING), None);
        assert_eq!(after(Some(FAILING), RECOVERED), Some(5));
        assert_eq!(after(Some(RECOVERED), RECOVERED), None);
        assert_eq!(after(Some(FAILING), GONE), Some(5));
        assert_eq!(after(Some(FEED_REWOUND), FEED_REWOUND), Some(5), "it happened again");
    }

    #[test]
    fn what_happens_is_not_overwritten_by_what_ends() {
        let subject = |event_type| Tell::of_feed("orders", "db", event_type, at(), "x").subject;
        assert_eq!(subject(FEED_LOST), subject(FEED_RECOVERED));
        assert_ne!(subject(RECREATED), subject(FEED_RECOVERED));
        assert_ne!(subject(RECREATED), subject(FEED_REWOUND));
    }

    #[test]
    fn an_id_is_made_of_what_is_stored() {
        let id = |n, event_type: &str| {
            told("condition:webhook:orders", &serde_json::to_value(stored(n, event_type)).unwrap())
                .unwrap()
                .id
        };
        assert_eq!(id(3, FAILING), id(3, FAILING));
        assert_ne!(id(3, FAILING), id(4, FAILING));
        let refused = told("msg_1", &letter("document.updated")).unwrap();
        assert_eq!(refused.id, told("msg_1", &letter("document.updated")).unwrap().id);
        assert_eq!((refused.event_type(), refused.read_at), (DEAD_LETTER, at()));
    }

    #[test]
    fn no_loop_is_possible() {
        for event_type in TYPES {
            assert!(
                told("msg_1", &letter(event_type)).is_none(),
                "a letter of `{event_type}` would tell of itself"
            );
        }
        for id in ["couch-hookd", "webhook:ops", "request:1", "_design/x", "daemon:1"] {
            assert!(
                told(id, &json!({"type": FAILING, "n": 1, "at": at(), "data": {}, "key": "CANARY"}))
                    .is_none()
            );
        }
        let deleted = Row { deleted: true, ..row("msg_1", &letter("document.updated")) };
        assert!(telling().arrived(deleted, "m", at()).event.is_none());
    }

    #[test]
    fn every_format_tells_it() {
        let tell = Tell::of_webhook("orders", FAILING, at(), "its endpoint cannot be reached <now>");
        let condition = Condition::after(None, &tell).unwrap();
        for (word, format) in Format::WORDS.into_iter().filter(|(_, format)| *format != Format::Raw) {
            let telling = Telling { format, ..telling() };
            let row = row("condition:webhook:orders", &serde_json::to_value(&condition).unwrap());
            let event = telling.arrived(row, "m", Timestamp::UNIX_EPOCH).event.unwrap();
            let body: Value = serde_json::from_slice(&telling.body(&event)).unwrap();
            match format {
                Format::Slack => assert_eq!(
                    body["text"],
                    "*webhook.failing* webhook orders: its endpoint cannot be reached &lt;now&gt; (webhook ops)"
                ),
                Format::CloudEvents => {
                    assert_eq!(
                        (&body["type"], &body["subject"]),
                        (&json!("couch-hookd.webhook.failing"), &json!("orders"))
                    );
                }
                _ => assert_eq!(body["type"], FAILING, "{word}"),
            }
            if format != Format::Slack {
                assert_eq!(
                    (&body["data"]["webhook"], &body["data"]["about"]),
                    (&json!("ops"), &json!("orders"))
                );
            }
        }
    }
}
