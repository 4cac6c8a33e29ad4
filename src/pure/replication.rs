//! What CouchDB says of a replication: its state, and rows of `_scheduler/docs`, `_scheduler/jobs`, `_active_tasks`.
//!
//! Guarantees that an answer of any version is understood (CONTRACT §8): `info` may be a text (2.x), an object (3.x) or
//! `null`; `source` and `target` are missing in rows of state `error`; `id` is `null` in terminal states; unknown
//! members are left alone. Texts are as CouchDB gave them: names, passwords and URLs in them are hidden by whoever
//! shows them.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Whether a CouchDB of this version (`GET /`) has `_scheduler`: from 2.1 on. Before, documents bear all there is.
pub fn has_scheduler(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    match numbers.next() {
        Some(0 | 1) => false,
        Some(2) => numbers.next().is_some_and(|minor| minor >= 1),
        _ => true,
    }
}

/// Where a replication is, in CouchDB's own words (2.1 and later). The `triggered` of 1.x is [`State::Running`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its document was read, it is no job yet.
    Initializing,
    /// It could not be made a job; tried again.
    Error,
    /// It waits for its turn (`max_jobs`).
    Pending,
    /// It runs, or tries to.
    #[serde(alias = "triggered")]
    Running,
    /// It crashed and waits to be tried again.
    Crashing,
    /// It came to its end.
    Completed,
    /// It was given up.
    Failed,
}

impl State {
    /// All of them, in the order of a replication's life.
    pub const ALL: [State; 7] = [
        State::Initializing,
        State::Pending,
        State::Running,
        State::Crashing,
        State::Error,
        State::Completed,
        State::Failed,
    ];

    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Initializing => "initializing",
            State::Error => "error",
            State::Pending => "pending",
            State::Running => "running",
            State::Crashing => "crashing",
            State::Completed => "completed",
            State::Failed => "failed",
        }
    }

    /// By its word, or that of 1.x.
    pub fn parse(word: &str) -> Option<State> {
        if word == "triggered" {
            return Some(State::Running);
        }
        State::ALL.into_iter().find(|state| state.as_str() == word)
    }

    /// Whether CouchDB does no more of itself.
    pub fn is_terminal(self) -> bool {
        matches!(self, State::Completed | State::Failed)
    }

    /// Whether somebody may have to do something.
    pub fn is_trouble(self) -> bool {
        matches!(self, State::Crashing | State::Error | State::Failed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a replication has done: numbers, and places in the source's feed, as CouchDB names them
/// (`docs_read`, `changes_pending`, `bulk_get_docs`, `through_seq`, …). `changes_pending` may be `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress(pub Map<String, Value>);

impl Progress {
    /// A counter.
    pub fn count(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }

    /// Of an object, the counters and places in it; 1.x has them beside much else.
    pub fn of(object: &Map<String, Value>) -> Progress {
        const OTHERS: [&str; 5] =
            ["progress", "started_on", "updated_on", "checkpoint_interval", "error_count"];
        let wanted = |(name, value): &(&String, &Value)| {
            let is_place = name.ends_with("_seq");
            let is_count = (value.is_u64() || value.is_null()) && name.contains('_');
            (is_place || is_count || *name == "changes_pending") && !OTHERS.contains(&name.as_str())
        };
        let found = object.iter().filter(wanted).filter(|(name, value)| {
            // What else may be `null` is no counter.
            !value.is_null() || *name == "changes_pending"
        });
        Progress(found.map(|(name, value)| (name.clone(), value.clone())).collect())
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// `info` of a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Info {
    /// CouchDB gave none.
    #[default]
    None,
    /// Why it is in trouble: an Erlang term or a text, with names and URLs in it.
    Error(String),
    /// What it has done.
    Progress(Progress),
}

impl Info {
    /// From the member, whatever it is.
    pub fn of(value: Value) -> Info {
        match value {
            Value::Object(members) => match members.get("error") {
                Some(Value::String(error)) => Info::Error(error.clone()),
                Some(other) => Info::Error(other.to_string()),
                None if members.is_empty() => Info::None,
                None => Info::Progress(Progress::of(&members)),
            },
            Value::String(text) => Info::Error(text),
            Value::Null => Info::None,
            other => Info::Error(other.to_string()),
        }
    }

    /// The reason of trouble.
    pub fn error(&self) -> Option<&str> {
        match self {
            Info::Error(error) => Some(error),
            Info::None | Info::Progress(_) => None,
        }
    }

    /// What it has done.
    pub fn progress(&self) -> Option<&Progress> {
        match self {
            Info::Progress(progress) => Some(progress),
            Info::None | Info::Error(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for Info {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Info, D::Error> {
        Value::deserialize(deserializer).map(Info::of)
    }
}

/// A row of `_scheduler/docs`:
///
/// `{"database":"_replicator","doc_id":"edge1","id":"36…+continuous","node":"couchdb@…","source":"https://…/",
/// "target":"https://…/","state":"running","info":{"docs_read":8,…},"error_count":0,"last_updated":"…","start_time":"…"}`
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Row {
    /// Where its document lies.
    #[serde(default)]
    pub database: Option<String>,
    /// Its document.
    pub doc_id: String,
    /// Of the replication; `None` in terminal states and in `error`.
    #[serde(default)]
    pub id: Option<String>,
    /// The node that runs it.
    #[serde(default)]
    pub node: Option<String>,
    /// URL, with or without a masked password; `None` in `error`.
    #[serde(default)]
    pub source: Option<String>,
    /// Likewise.
    #[serde(default)]
    pub target: Option<String>,
    /// CouchDB's word.
    pub state: State,
    /// Trouble or progress.
    #[serde(default)]
    pub info: Info,
    /// Failures in a row.
    #[serde(default)]
    pub error_count: u64,
    /// Of this run; CouchDB's restart begins another.
    #[serde(default)]
    pub start_time: Option<Timestamp>,
    /// Moves while a state stays, but in terminal states.
    #[serde(default)]
    pub last_updated: Option<Timestamp>,
}

impl Row {
    /// From a replication's document as 1.x leaves it, or as 2.1+ does at the end; `None` while it bears no state.
    /// `doc_id` is its id, `doc` its members.
    pub fn of_document(doc_id: &str, doc: &Map<String, Value>) -> Option<Row> {
        let text = |name: &str| doc.get(name).and_then(Value::as_str);
        let state = State::parse(text("_replication_state")?)?;
        let url = |name: &str| match doc.get(name) {
            Some(Value::String(url)) => Some(url.clone()),
            Some(Value::Object(members)) => members.get("url").and_then(Value::as_str).map(str::to_owned),
            _ => None,
        };
        let info = match (text("_replication_state_reason"), doc.get("_replication_stats")) {
            (Some(reason), _) => Info::Error(reason.to_owned()),
            (None, Some(Value::Object(stats))) => Info::Progress(Progress::of(stats)),
            (None, _) => Info::None,
        };
        let at = text("_replication_state_time").and_then(|at| at.parse().ok());
        Some(Row {
            database: None,
            doc_id: doc_id.to_owned(),
            id: text("_replication_id").map(str::to_owned),
            node: None,
            source: url("source"),
            target: url("target"),
            state,
            info,
            error_count: u64::from(state.is_trouble()),
            start_time: None,
            last_updated: at,
        })
    }
}

/// What a job has been through; newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Happened {
    /// When.
    pub timestamp: Timestamp,
    /// `added`, `started`, `crashed`, `stopped`.
    #[serde(rename = "type")]
    pub what: String,
    /// Why it crashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Value>,
}

impl Happened {
    /// The reason as a text.
    pub fn reason(&self) -> Option<String> {
        match self.reason.clone()? {
            Value::String(text) => Some(text),
            other => Some(other.to_string()),
        }
    }
}

/// A row of `_scheduler/jobs`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Job {
    /// Of the replication, `+continuous` and all.
    pub id: String,
    /// Where its document lies; `None` for one started by `_replicate`.
    #[serde(default)]
    pub database: Option<String>,
    /// Its document; `None` for one started by `_replicate`.
    #[serde(default)]
    pub doc_id: Option<String>,
    /// The Erlang process; `None` while it does not run.
    #[serde(default)]
    pub pid: Option<String>,
    /// The node that runs it.
    #[serde(default)]
    pub node: Option<String>,
    /// Who started it.
    #[serde(default)]
    pub user: Option<String>,
    /// URL, with or without a masked password.
    #[serde(default)]
    pub source: Option<String>,
    /// Likewise.
    #[serde(default)]
    pub target: Option<String>,
    /// What it has done (3.x).
    #[serde(default)]
    pub info: Info,
    /// Newest first.
    #[serde(default)]
    pub history: Vec<Happened>,
    /// When it was made.
    #[serde(default)]
    pub start_time: Option<Timestamp>,
}

impl Job {
    /// Crashes since it last ran well, and when the first and the last of them were.
    pub fn crashes(&self) -> Option<(u64, Timestamp, Timestamp)> {
        let crashed = || self.history.iter().filter(|happened| happened.what == "crashed");
        let last = crashed().next()?.timestamp;
        let first = crashed().next_back()?.timestamp;
        Some((crashed().count() as u64, first, last))
    }

    /// Where it is: `_scheduler/jobs` does not say it in a word.
    pub fn state(&self) -> State {
        match self.history.first().map(|happened| happened.what.as_str()) {
            _ if self.pid.is_some() => State::Running,
            Some("crashed") => State::Crashing,
            _ => State::Pending,
        }
    }
}

/// A row of `_active_tasks` of type `replication`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Task {
    /// `+continuous` and all.
    pub replication_id: String,
    /// Its document; `None` for one started by `_replicate`.
    #[serde(default)]
    pub doc_id: Option<String>,
    /// Counters and places, among other members.
    #[serde(flatten)]
    members: Map<String, Value>,
}

impl Task {
    /// What it has done.
    pub fn progress(&self) -> Progress {
        Progress::of(&self.members)
    }

    /// A text member, such as `source`.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.members.get(name)?.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(json: &str) -> Row {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_scheduler_came_with_2_1() {
        let with: Vec<_> = ["1.7.1", "2.0.0", "2.1.0", "2.2.0", "2.3.1-last", "3.5.0", "10.0"]
            .into_iter()
            .filter(|version| has_scheduler(version))
            .collect();
        assert_eq!(with, ["2.1.0", "2.2.0", "2.3.1-last", "3.5.0", "10.0"]);
    }

    #[test]
    fn info_is_read_whatever_it_is() {
        let info = |value: Value| Info::of(value);
        assert_eq!(info(json!(null)), Info::None);
        assert_eq!(info(json!({})), Info::None);
        assert_eq!(info(json!("db_not_found")), Info::Error("db_not_found".into()));
        assert_eq!(info(json!({"error": "timeout"})), Info::Error("timeout".into()));
        let running =
            info(json!({"docs_read": 8, "changes_pending": null, "bulk_get_docs": 7, "through_seq": "9-x"}));
        let progress = running.progress().unwrap();
        assert_eq!((progress.count("docs_read"), progress.count("changes_pending")), (Some(8), None));
        assert_eq!(progress.0.len(), 4);
    }

    #[test]
    fn rows_miss_what_they_may_miss() {
        let row = row(
            r#"{"database":"_replicator","doc_id":"a","id":null,"state":"error","info":"x","error_count":2}"#,
        );
        assert_eq!((row.state, row.source, row.error_count), (State::Error, None, 2));
    }

    #[test]
    fn documents_of_1_x_bear_their_state() {
        let doc = json!({"_id": "a", "source": "http://u:p@h/a", "target": {"url": "b"}, "_replication_state": "triggered",
            "_replication_state_time": "2026-11-21T21:36:46+00:00", "_replication_id": "5"});
        let row = Row::of_document("a", doc.as_object().unwrap()).unwrap();
        assert_eq!((row.state, row.target.as_deref()), (State::Running, Some("b")));
        assert_eq!(row.last_updated.unwrap().to_string(), "2026-11-21T21:36:46Z");
        assert_eq!(Row::of_document("a", json!({"source": "a"}).as_object().unwrap()), None);
    }

    #[test]
    fn of_a_task_only_counters_and_places_are_progress() {
        let task: Task = serde_json::from_value(json!({"pid": "<0.1.0>", "checkpoint_interval": 5000, "docs_read": 1,
            "checkpointed_source_seq": 0, "continuous": true, "doc_id": "rep", "progress": 0, "replication_id": "5+continuous",
            "source": "http://h/", "source_seq": 9, "started_on": 1, "updated_on": 2, "type": "replication",
            "changes_pending": null, "user": null}))
        .unwrap();
        let names: Vec<String> = task.progress().0.keys().cloned().collect();
        assert_eq!(names, ["changes_pending", "checkpointed_source_seq", "docs_read", "source_seq"]);
    }

    #[test]
    fn a_job_says_where_it_is_by_its_history() {
        let job = |pid: Value, what: &str| -> Job {
            serde_json::from_value(
                json!({"id": "5", "database": null, "doc_id": null, "pid": pid, "history": [
                {"timestamp": "2026-11-21T21:30:10Z", "type": what}]}),
            )
            .unwrap()
        };
        assert_eq!(job(json!("<0.1.0>"), "started").state(), State::Running);
        assert_eq!(job(json!(null), "crashed").state(), State::Crashing);
        assert_eq!(job(json!(null), "added").state(), State::Pending);
        assert_eq!(job(json!(null), "crashed").crashes().unwrap().0, 1);
    }
}
