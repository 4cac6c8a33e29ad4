//! What is shown of a replication: CouchDB's own shapes without secrets, and cells for people.
//!
//! Guarantees an allow-list: a member that is not named here leaves in no output; of the ends and proxies only scheme,
//! host, port and path do, of reasons what `pure::rep_error` leaves of them.

use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::cli::common::age;
use crate::cli::out::{Colour, Out};
use crate::cli::replications::look::{Behind, Entry, Look};
use crate::cli::table::Cell;
use crate::error::Result;
use crate::pure::rep_error::{Analysis, analyze};
use crate::pure::replication::{Happened, State};
use crate::pure::url::shown_url;

/// Members of rows, jobs and what happened to them that are as harmless as they are.
const PLAIN: [&str; 13] = [
    "database",
    "doc_id",
    "error_count",
    "id",
    "last_updated",
    "node",
    "pid",
    "start_time",
    "state",
    "timestamp",
    "type",
    "user",
    "offset",
];

/// A row of `_scheduler/docs` or `_scheduler/jobs` without its secrets.
pub(super) fn public(raw: &Value) -> Value {
    let Some(members) = raw.as_object() else { return Value::Null };
    let shown = members.iter().filter_map(|(name, value)| {
        let value = match (name.as_str(), value) {
            (name, value) if PLAIN.contains(&name) && !value.is_object() && !value.is_array() => {
                value.clone()
            }
            ("source" | "target" | "proxy" | "source_proxy" | "target_proxy", Value::String(url)) => {
                shown_url(url).into()
            }
            ("source" | "target" | "proxy" | "source_proxy" | "target_proxy", _) => Value::Null,
            ("info", info) => public_info(info),
            ("reason", reason) => analyze(&text_of(reason)).raw.into(),
            ("history", Value::Array(happened)) => happened.iter().map(public).collect(),
            _ => return None,
        };
        Some((name.clone(), value))
    });
    Value::Object(shown.collect())
}

/// The scheduler's row of a replication without its secrets, with both ends where CouchDB leaves them out.
pub(super) fn public_entry(entry: &Entry) -> Value {
    let mut row = public(&entry.raw);
    if let Value::Object(members) = &mut row {
        for (name, end) in [("source", &entry.row.source), ("target", &entry.row.target)] {
            if !members.contains_key(name) {
                members.insert(name.to_owned(), end.as_deref().map(shown_url).into());
            }
        }
    }
    row
}

/// The reason in the shape that this version gives it, or the counters and places.
fn public_info(info: &Value) -> Value {
    match info {
        Value::String(reason) => analyze(reason).raw.into(),
        Value::Object(members) => {
            let shown = members.iter().filter_map(|(name, value)| match (name.as_str(), value) {
                ("error", reason) => Some((name.clone(), analyze(&text_of(reason)).raw.into())),
                (_, Value::Number(_) | Value::Null) => Some((name.clone(), value.clone())),
                (name, Value::String(_)) if name.ends_with("_seq") => Some((name.to_owned(), value.clone())),
                _ => None,
            });
            Value::Object(shown.collect())
        }
        _ => Value::Null,
    }
}

fn text_of(reason: &Value) -> String {
    reason.as_str().map_or_else(|| reason.to_string(), str::to_owned)
}

/// The reason of a replication's trouble, analysed.
pub(super) fn analysis(entry: &Entry) -> Option<Analysis> {
    entry.row.info.error().map(analyze)
}

/// The same as members of an object.
pub(super) fn analysis_members(analysis: &Analysis) -> Map<String, Value> {
    let Analysis { error, class, hint, raw } = analysis;
    let members = json!({"error": error, "error_class": class.as_str(), "hint": hint, "error_raw": raw});
    members.as_object().cloned().unwrap_or_default()
}

/// How far behind as a member `lag`, and the `checkpoint`.
pub(super) fn behind_members(behind: &Behind) -> Map<String, Value> {
    let Behind { changes_pending, counted_by, checkpoint } = behind;
    let age_seconds = checkpoint.as_ref().and_then(|checkpoint| checkpoint.age_seconds);
    let lag =
        json!({"changes_pending": changes_pending, "counted_by": counted_by, "age_seconds": age_seconds});
    [("lag".to_owned(), lag), ("checkpoint".to_owned(), json!(checkpoint))].into_iter().collect()
}

/// What happened to a job, without secrets.
pub(super) fn public_history(raw: &Value) -> Value {
    raw["history"].as_array().into_iter().flatten().map(public).collect()
}

/// `{"total_rows":…,"offset":…,"docs":[…]}`, on one line.
pub(super) fn print_rows(total: u64, skip: usize, name: &str, rows: Vec<Value>, out: &mut Out) -> Result<()> {
    out.json(&json!({"total_rows": total, "offset": skip, name: rows}).to_string())
}

/// A state, coloured by whether somebody may have to do something.
pub(super) fn state_cell(state: State) -> Cell {
    Cell::coloured(state.as_str(), colour(state))
}

/// See [`state_cell`].
pub(super) fn colour(state: State) -> Colour {
    match state {
        State::Running | State::Completed => Colour::Green,
        State::Initializing | State::Pending => Colour::Yellow,
        State::Crashing | State::Error | State::Failed => Colour::Red,
    }
}

/// An end of a replication in few characters: the name of a database of this server, else host and path.
pub(super) fn end(look: &Look, end: Option<&str>) -> String {
    let Some(end) = end else { return "-".to_owned() };
    if let Some(db) = look.db_of(end) {
        return db;
    }
    let shown = shown_url(end);
    let bare = shown.split_once("://").map_or(shown.as_str(), |(_, rest)| rest);
    bare.trim_end_matches('/').to_owned()
}

/// How long ago, or `-`.
pub(super) fn ago(at: Option<Timestamp>) -> String {
    at.map_or_else(|| "-".to_owned(), age)
}

/// A number, or `-`.
pub(super) fn number(n: Option<u64>) -> String {
    n.map_or_else(|| "-".to_owned(), |n| n.to_string())
}

/// What happened and why, in words.
pub(super) fn happened(happened: &Happened) -> String {
    let reason = happened.reason().map(|reason| format!(": {}", analyze(&reason).error));
    format!("{}{}", happened.what, reason.unwrap_or_default())
}

/// `2 running, 1 failed`, in the order of a replication's life.
pub(super) fn by_state<'a>(entries: impl Iterator<Item = &'a Entry> + Clone) -> String {
    let counts = State::ALL.into_iter().map(|state| {
        let n = entries.clone().filter(|entry| entry.row.state == state).count();
        (n > 0).then(|| format!("{n} {state}"))
    });
    counts.flatten().collect::<Vec<_>>().join(", ")
}

/// Counters on one line, `docs_read 8, docs_written 8`, without places.
pub(super) fn counters(members: &Map<String, Value>) -> String {
    let numbers = members.iter().filter(|(name, value)| value.is_u64() && !name.ends_with("_seq"));
    numbers.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

/// A heading and a text, broken between words so that no line is wider than the terminal; the text stays behind the
/// heading on every line.
pub(super) fn wrapped(heading: &str, text: &str, width: Option<usize>) -> Vec<String> {
    let width = width.unwrap_or(usize::MAX);
    let indent = " ".repeat(heading.chars().count());
    let (mut lines, mut line, mut is_first) = (Vec::new(), heading.to_owned(), true);
    for word in text.split(' ') {
        if !is_first && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::replace(&mut line, indent.clone()));
            is_first = true;
        }
        if !std::mem::take(&mut is_first) {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_public() {
        let raw = json!({"database": "_replicator", "doc_id": "a", "id": null, "source": "http://u:canary@h/db?canary",
            "target": {"url": "http://canary"}, "proxy": "http://u:canary@p:3128/", "source_proxy": null,
            "state": "crashing", "error_count": 3, "headers": {"authorization": "canary"}, "auth": "canary",
            "user": ["canary"], "options": [["canary"]],
            "info": {"error": "{http_request_failed,\"GET\",\"http://u:canary@h/db?canary\",{error,timeout}}",
                "docs_read": 8, "through_seq": "9-g1", "text": "canary", "auth": {"canary": 1}},
            "history": [{"timestamp": "2026-11-21T21:30:41Z", "type": "crashed", "extra": "canary",
                "reason": "{error,{\"http://u:canary@h/\"}}"}]});
        let shown = public(&raw);
        assert!(!shown.to_string().contains("canary"), "{shown}");
        let old = public(&json!({"info": "db_not_found: could not open http://u:canary@h/db/"}));
        assert!(!old.to_string().contains("canary"), "{old}");
        assert_eq!(shown["source"], "http://h/db");
        assert_eq!((&shown["proxy"], &shown["source_proxy"]), (&json!("http://p:3128/"), &Value::Null));
        assert_eq!((&shown["info"]["docs_read"], &shown["info"]["through_seq"]), (&json!(8), &json!("9-g1")));
        assert_eq!(shown["history"][0]["type"], "crashed");
        assert!(shown["info"]["error"].as_str().unwrap().contains("timeout"), "{shown}");
    }

    #[test]
    fn long_texts_are_broken_between_words() {
        assert_eq!(wrapped("", "a long text of words", None), ["a long text of words"]);
        let lines = wrapped("hint  ", "a long text of words", Some(14));
        assert_eq!(lines, ["hint  a long", "      text of", "      words"]);
        assert_eq!(wrapped("  ", "averyveryverylongword x", Some(10)), ["  averyveryverylongword", "  x"]);
        assert_eq!(wrapped("a ", "", Some(10)), ["a "]);
    }
}
