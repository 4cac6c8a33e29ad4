//! How far a replication is behind: what its checkpoint says, what it counts itself, and whether one of its ends is a
//! database of this server, where the rest can be looked up.
//!
//! Guarantees that counts and checkpoints of every version are understood (CONTRACT §8), that a clock which differs
//! makes no negative age, and that nothing of a URL but the name of a database leaves. Leaves reading to
//! `couch::scheduler`.

use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::pure::replication::Progress;
use crate::pure::url::Url;

/// What a checkpoint says, as it stands in payloads:
///
/// `{"session_id":"dc8b…","source_last_seq":"9-g1AAA…","age_seconds":12,"docs_read":8,"docs_written":8,
/// "doc_write_failures":0,"missing_checked":8,"missing_found":8}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Of the run that wrote it; another one on the two ends means that they do not know each other's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<String>,
    /// Up to where the source was read, as CouchDB wrote it: an integer on 1.x, a text later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_last_seq: Option<Value>,
    /// Since it was written. CouchDB writes none while nothing happens, so an idle replication's grows, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<u64>,
    /// Counters of the last entry of its history, that is of the run which wrote it: `docs_read`, `docs_written`,
    /// `doc_write_failures`, `missing_checked`, `missing_found`, from 3.3 on `bulk_get_docs`, `bulk_get_attempts`.
    #[serde(flatten)]
    pub counters: Map<String, Value>,
}

impl Checkpoint {
    /// From the document `_local/<replication id>`; `None` when it is none.
    pub fn of(doc: &Value, now: Timestamp) -> Option<Checkpoint> {
        let members = doc.as_object()?;
        let last = members.get("history").and_then(|history| history.get(0)).and_then(Value::as_object);
        let session_id = members.get("session_id").and_then(Value::as_str).map(str::to_owned);
        let source_last_seq = members.get("source_last_seq").filter(|seq| !seq.is_null()).cloned();
        if session_id.is_none() && source_last_seq.is_none() {
            return None;
        }
        let end_time = last.and_then(|entry| entry.get("end_time")).and_then(Value::as_str).and_then(time_of);
        let age = end_time.map(|end_time| now.duration_since(end_time).as_secs());
        // Beside them stand times and places: a place of 1.x is a number, too.
        let is_counter = |(name, value): &(&String, &Value)| value.is_u64() && !name.ends_with("_seq");
        let counters = last.into_iter().flatten().filter(is_counter);
        Some(Checkpoint {
            session_id,
            source_last_seq,
            age_seconds: age.map(|seconds| u64::try_from(seconds).unwrap_or(0)),
            counters: counters.map(|(name, value)| (name.clone(), value.clone())).collect(),
        })
    }
}

/// `Sat, 21 Nov 2026 21:30:40 GMT`, or RFC 3339 as other replicators write it.
fn time_of(text: &str) -> Option<Timestamp> {
    let classic = jiff::fmt::rfc2822::parse(text).ok().map(|time| time.timestamp());
    classic.or_else(|| text.parse().ok())
}

/// How many changes of the source a replication has not been through, by its own counters: `changes_pending`, or with
/// the integers of 1.x what lies between `checkpointed_source_seq` and `source_seq`. `None` when it does not say.
pub fn pending(progress: &Progress) -> Option<u64> {
    let counted = || behind(progress.0.get("source_seq")?, progress.0.get("checkpointed_source_seq")?);
    progress.count("changes_pending").or_else(counted)
}

/// How far one place lies behind another, where places are integers (1.x): at most so many changes, as a document that
/// was changed again is listed at its last place only.
pub fn behind(update_seq: &Value, checkpointed: &Value) -> Option<u64> {
    Some(update_seq.as_u64()?.saturating_sub(checkpointed.as_u64()?))
}

/// The URLs by which this CouchDB is known.
#[derive(Debug, Clone, Default)]
pub struct Here {
    bases: Vec<Url>,
}

impl Here {
    /// Base URLs, such as `couchdb_url` and `public_url`; a text that is no URL is nobody's.
    pub fn new<'a>(bases: impl IntoIterator<Item = &'a str>) -> Here {
        Here { bases: bases.into_iter().filter_map(|text| Url::parse(text).ok()).collect() }
    }

    /// The database of this server that an end of a replication is: its URL has the host and port of one of ours (all
    /// names of this machine count as one), or it is a bare name, as 1.x takes it. `None` when it is elsewhere.
    pub fn db(&self, end: &str) -> Option<String> {
        if !end.contains("://") {
            let is_name = !end.is_empty() && !end.contains([':', '@', '?', '#', ' ']);
            return is_name.then(|| end.to_owned());
        }
        let url = Url::parse(end).ok()?;
        self.bases.iter().find_map(|base| {
            let same_host = url.host() == base.host() || (url.is_loopback() && base.is_loopback());
            if !same_host || url.port() != base.port() {
                return None;
            }
            let path = path_of(&url);
            let name = path.strip_prefix(&path_of(base))?.strip_prefix('/')?;
            let is_one_segment = !name.is_empty() && !name.contains('/');
            let name = percent_decode_str(name).decode_utf8().ok()?.into_owned();
            is_one_segment.then_some(name)
        })
    }
}

/// The path without slashes at its end.
fn path_of(url: &Url) -> String {
    url.base()[url.origin().len()..].to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    /// As 3.5.0 writes it.
    fn document() -> Value {
        json!({"_id": "_local/3675", "_rev": "0-1", "session_id": "dc8b", "source_last_seq": "9-g1",
            "replication_id_version": 4, "history": [
                {"session_id": "dc8b", "start_time": "Sat, 21 Nov 2026 21:30:10 GMT",
                 "end_time": "Sat, 21 Nov 2026 21:30:40 GMT", "start_last_seq": 0, "end_last_seq": "9-g1",
                 "recorded_seq": "9-g1", "missing_checked": 8, "missing_found": 8, "docs_read": 8, "docs_written": 8,
                 "doc_write_failures": 0, "bulk_get_docs": 7, "bulk_get_attempts": 7},
                {"session_id": "older", "docs_read": 1_000}]})
    }

    #[test]
    fn a_checkpoint_says_its_age_and_what_its_run_has_done() {
        let checkpoint = Checkpoint::of(&document(), at("2026-11-21T21:30:52Z")).unwrap();
        let expected = json!({"session_id": "dc8b", "source_last_seq": "9-g1", "age_seconds": 12,
            "missing_checked": 8, "missing_found": 8, "docs_read": 8, "docs_written": 8, "doc_write_failures": 0,
            "bulk_get_docs": 7, "bulk_get_attempts": 7});
        assert_eq!(serde_json::to_value(&checkpoint).unwrap(), expected);
        assert_eq!(serde_json::from_value::<Checkpoint>(expected).unwrap(), checkpoint);
    }

    #[test]
    fn places_of_1_x_are_no_counters_and_ahead_of_our_clock_is_no_age() {
        let doc = json!({"session_id": "a", "source_last_seq": 9, "history": [{"recorded_seq": 9, "docs_read": 8,
            "start_last_seq": 0, "end_last_seq": 9, "end_time": "Sat, 21 Nov 2026 21:30:40 GMT"}]});
        let checkpoint = Checkpoint::of(&doc, at("2026-11-21T21:29:00Z")).unwrap();
        let expected = json!({"session_id": "a", "source_last_seq": 9, "age_seconds": 0, "docs_read": 8});
        assert_eq!(serde_json::to_value(&checkpoint).unwrap(), expected);
    }

    #[test]
    fn what_is_missing_in_a_checkpoint_is_left_out() {
        let of = |doc: Value| Checkpoint::of(&doc, at("2026-11-21T21:30:52Z"));
        assert_eq!(of(json!({"_id": "_local/x", "_rev": "0-1"})), None);
        assert_eq!(of(json!(null)), None);
        let found = of(json!({"session_id": "a", "history": [{"end_time": "yesterday"}]})).unwrap();
        assert_eq!(serde_json::to_value(found).unwrap(), json!({"session_id": "a"}));
        let found =
            of(json!({"session_id": "a", "history": [{"end_time": "2026-11-21T21:30:50Z"}]})).unwrap();
        assert_eq!(found.age_seconds, Some(2));
    }

    #[test]
    fn pending_is_what_is_counted_or_between_two_integers() {
        let pending = |value: Value| pending(&Progress(value.as_object().unwrap().clone()));
        assert_eq!(
            pending(json!({"changes_pending": 7, "source_seq": 9, "checkpointed_source_seq": 1})),
            Some(7)
        );
        assert_eq!(pending(json!({"changes_pending": null})), None);
        assert_eq!(pending(json!({"source_seq": 9, "checkpointed_source_seq": 4})), Some(5));
        assert_eq!(pending(json!({"source_seq": 4, "checkpointed_source_seq": 9})), Some(0), "rolled back");
        assert_eq!(pending(json!({"source_seq": "9-g1", "checkpointed_source_seq": "4-g1"})), None);
    }

    #[test]
    fn an_end_is_here_by_host_and_port() {
        let check = |base: &str, end: &str, expected: Option<&str>| {
            assert_eq!(Here::new([base]).db(end).as_deref(), expected, "{end} at {base}");
        };
        let base = "http://127.0.0.1:5984";
        check(base, "http://127.0.0.1:5984/fixture/", Some("fixture"));
        check(base, "http://admin:*****@127.0.0.1:5984/fixture/", Some("fixture"));
        check(base, "http://localhost:5984/team%2Fdb?x=y", Some("team/db"));
        check(base, "http://127.0.0.1:5985/fixture", None);
        check(base, "http://127.0.0.1:5984/", None);
        check(base, "http://127.0.0.1:5984/a/b", None);
        check(base, "https://couch.example/fixture", None);
        check(base, "fixture", Some("fixture"));
        check(base, "team/db", Some("team/db"));
        check(base, "", None);
        check(base, "u:p@h/db", None);
        check("https://Couch.example/couch/", "https://couch.example:443/couch/db", Some("db"));
        check("https://couch.example/couch", "https://couch.example/other/db", None);
        check("https://couch.example/couch", "https://couch.example/couchdb", None);
        check("nonsense", "http://127.0.0.1:5984/fixture", None);
    }

    #[test]
    fn every_name_of_this_server_counts() {
        let here = Here::new(["http://127.0.0.1:5984", "https://couch.example"]);
        assert_eq!(here.db("https://couch.example/orders").as_deref(), Some("orders"));
        assert_eq!(here.db("http://[::1]:5984/orders").as_deref(), Some("orders"));
    }
}
