//! Members that begin with `_`: what CouchDB writes into a replication document, and what it never writes.
//!
//! Guarantees that a stored document with what CouchDB has written gives no finding, of whatever version.

use serde_json::{Map, Value};

use crate::pure::nearest::nearest_of;
use crate::pure::rep_doc::{Findings, Origin, Severity, shown, shown_name};

/// Members of any document. Source: `couch_doc:transfer_fields`, 1.1.2 to 3.5.0.
const SPECIAL: &[&str] = &[
    "_id",
    "_rev",
    "_deleted",
    "_attachments",
    "_revisions",
    "_revs_info",
    "_local_seq",
    "_conflicts",
    "_deleted_conflicts",
];

/// What CouchDB writes into replication documents. Source: `couch_replicator_docs:update_rep_doc`.
const WRITTEN: &[&str] = &[
    "_replication_id",
    "_replication_state",
    "_replication_state_reason",
    "_replication_state_time",
    "_replication_stats",
];

/// The words that CouchDB writes as a state; `failed` since 2.1.
const STATES: &[&str] = &["triggered", "completed", "error", "failed"];

const TAKE_AWAY: &str = "take all `_replication_*` members away before the document is saved";

/// One member that begins with `_`.
pub(crate) fn check_special(findings: &mut Findings, origin: Origin, name: &str, value: &Value) {
    if name == "_id" && !value.is_string() {
        return findings.wrong("_id", "a string", value, "write it in quotes");
    }
    let is_special = SPECIAL.contains(&name) || (name == "_access" && findings.version.is_at_least(3, 0));
    if is_special || origin == Origin::Stored {
        return;
    }
    if name == "_replication_state" {
        return check_left_state(findings, value);
    }
    if WRITTEN.contains(&name) {
        return findings.warning(name, "CouchDB writes it itself, and does not read it", TAKE_AWAY);
    }
    let near = nearest_of(name, SPECIAL.iter().chain(WRITTEN).copied(), 1);
    let remedy = match near.filter(|near| !WRITTEN.contains(near)) {
        Some(near) => format!("did you mean `{near}`?"),
        None => "take it away, or write it without `_`".to_owned(),
    };
    let message = "CouchDB refuses a document with a member of its own that it does not know";
    findings.error(shown_name(name), message, remedy);
}

/// A state in a document that is about to be saved.
///
/// Source: `couch_replicator_doc_processor:process_change/2` (2.1 and later), `couch_replicator_manager` (1.x).
fn check_left_state(findings: &mut Findings, value: &Value) {
    let (severity, message) = match value.as_str() {
        Some("completed") => (Severity::Error, "with `completed` CouchDB never starts the replication"),
        Some("failed") if findings.version.is_at_least(2, 1) => {
            (Severity::Error, "with `failed` CouchDB never starts the replication, nor checks the document")
        }
        Some("triggered" | "error") => (
            Severity::Warning,
            "CouchDB writes it itself; with this one it starts the replication all the same",
        ),
        _ => odd_state(findings),
    };
    findings.say(severity, "_replication_state", message, TAKE_AWAY);
}

/// `process_change` knows no other: a `case_clause`. Seen on 3.5.0: no replication is started any more, of no document,
/// until CouchDB is restarted without it. Up to 1.7.1 (`couch_replicator_manager:process_update`) the `case_clause` is
/// caught, `error` written into this document, and with `error` it is started.
fn odd_state(findings: &Findings) -> (Severity, &'static str) {
    match findings.version.is_at_least(2, 1) {
        true => (
            Severity::Error,
            "is no state that CouchDB writes: with it no replication is started any more, whatever its document",
        ),
        false => (
            Severity::Warning,
            "is no state of this CouchDB: it writes `error` in its place, and then starts the replication",
        ),
    }
}

/// A stored document: whether CouchDB can have written what it holds.
pub(crate) fn check_written(findings: &mut Findings, members: &Map<String, Value>) {
    let remedy = "save the document without its `_replication_*` members; CouchDB starts it then";
    let has = |name: &str| members.contains_key(name);
    let Some(state) = members.get("_replication_state") else {
        // With the state all but the id goes; 1.x writes the id before the state.
        for name in WRITTEN.iter().filter(|name| **name != "_replication_id" && has(name)) {
            let message = "stands without `_replication_state`: somebody else wrote it, not CouchDB";
            findings.warning(*name, message, "take it away; CouchDB does not read it");
        }
        return;
    };
    let word = state.as_str().filter(|word| STATES.contains(word));
    let is_old = !findings.version.is_at_least(2, 1);
    let odd = match word {
        None => {
            let known = if is_old { &STATES[..3] } else { STATES };
            let found = if state.is_string() { "another word".to_owned() } else { shown(state) };
            format!("expected one of `{}`, got {found}; it {}", known.join("`, `"), odd_state(findings).1)
        }
        Some("failed") if is_old => format!("`failed` {}", odd_state(findings).1),
        Some(word) => {
            let missing = match word {
                _ if !has("_replication_state_time") => "_replication_state_time",
                "failed" if !has("_replication_state_reason") => "_replication_state_reason",
                "completed" if !has("_replication_stats") && findings.version.is_at_least(1, 2) => {
                    "_replication_stats"
                }
                _ => return,
            };
            let (severity, then) = match word {
                "completed" | "failed" => (Severity::Error, "CouchDB does not start the replication with it"),
                _ => (Severity::Warning, "CouchDB starts the replication all the same"),
            };
            let message =
                format!("`{word}` without `{missing}`: somebody else wrote it, not CouchDB; {then}");
            return findings.say(severity, "_replication_state", message, remedy);
        }
    };
    let remedy = match is_old {
        true => remedy,
        false => "save the document without its `_replication_*` members, then restart CouchDB",
    };
    findings.say(odd_state(findings).0, "_replication_state", odd, remedy);
}
