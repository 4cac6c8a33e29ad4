//! Checks of replication documents: what CouchDB would refuse, ignore, or take otherwise than it was meant.
//!
//! Guarantees that everything wrong is said at once, sorted by path, and the same for the same document; that what
//! CouchDB accepts and uses is never an error; and that a finding holds nothing of the document but names of members,
//! numbers, `true` and `false`: no URL, no header's value, no text. Leaves to others whether an endpoint answers, a
//! filter exists, or a login is right.
//!
//! Source: CouchDB's own code, most of it seen on running servers too (1.7.1, 2.3.1, 3.5.0). `couch_rep.erl` (1.1.2), `couch_replicator_utils.erl` (1.2.0 to 1.7.1),
//! `couch_replicator_docs.erl` (2.1.0 to 3.2.3), `couch_replicator_parse.erl` (3.3.0 to 3.5.2), the function
//! `validate_doc_update` of `_design/_replicator` (up to 3.2.3), `couch_doc.erl` for members that begin with `_`.

mod endpoint;
mod fields;
mod state;
mod term;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::pure::nearest::nearest_of;

/// Characters of a member's name that are shown.
const NAME_CHARS_MAX: usize = 40;

/// A version of CouchDB. A part that was left out counts as the newest: `3.3` is the last 3.3.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version([u16; 3]);

impl Version {
    /// The newest whose code these checks were made after; what is checked when no version is known.
    pub const NEWEST: Version = Version([3, 5, u16::MAX]);

    /// One with all its parts.
    pub const fn new(major: u16, minor: u16, patch: u16) -> Version {
        Version([major, minor, patch])
    }

    fn is_at_least(self, major: u16, minor: u16) -> bool {
        self >= Version::new(major, minor, 0)
    }
}

impl FromStr for Version {
    type Err = String;

    /// `1.7`, `3.5.0`, `3`; what follows the numbers is left alone (`4.0.0-a1b2c3`).
    ///
    /// # Errors
    /// What was expected.
    fn from_str(text: &str) -> Result<Version, String> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let numbers: Vec<Option<u16>> = text[..end].split('.').map(|part| part.parse().ok()).collect();
        match numbers[..] {
            [Some(major @ 1..), ref rest @ ..] => {
                let part = |at: usize| rest.get(at).copied().flatten().unwrap_or(u16::MAX);
                Ok(Version([major, part(0), part(1)]))
            }
            _ => Err("expected a version of CouchDB such as `1.7` or `3.5.0`".to_owned()),
        }
    }
}

impl fmt::Display for Version {
    /// `3.5.0`, `1.7`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0.iter().filter(|part| **part != u16::MAX).map(u16::to_string);
        f.write_str(&parts.collect::<Vec<_>>().join("."))
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Where a document comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A person has written it and will save it: it holds nothing yet that CouchDB writes.
    ToSave,
    /// It was read from a replicator database: CouchDB may have written its state into it.
    Stored,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// CouchDB refuses the document, never completes it, or does something else than it says.
    Error,
    /// It works, but is not safe, not used, or probably not what was meant.
    Warning,
}

/// One thing found. `Display` gives it in one line, without the severity:
///
/// ```text
/// params.continuous: CouchDB reads `continuous` only at the top of the document; move it up
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The member, from the top: `params.socket_options`, `source.headers`, `doc_ids[3]`; `document` for all of it.
    pub path: String,
    /// How bad it is.
    pub severity: Severity,
    /// What was expected and what was found.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    /// Whether it is more than a warning.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.path, self.message, self.remedy)
    }
}

/// The documents of a text, each with its place in it: one document (place ``), an array (`[0]`), or what `_bulk_docs`
/// takes, `{"docs": […]}` (`docs[0]`).
///
/// # Errors
/// That it is no JSON, and where: a finding whose path is `line 3, column 7`.
pub fn documents(text: &str) -> Result<Vec<(String, Value)>, Finding> {
    let value: Value =
        serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|error| Finding {
            path: format!("line {}, column {}", error.line(), error.column()),
            severity: Severity::Error,
            message: match error.is_eof() {
                true => "expected JSON, got a text that ends too early".to_owned(),
                false => "expected JSON, got something else".to_owned(),
            },
            remedy: "look for a missing quote, comma or bracket, or a comma too many, just before it"
                .to_owned(),
        })?;
    let numbered = |before: &str, values: Vec<Value>| {
        let numbered = values.into_iter().enumerate();
        numbered.map(|(at, value)| (format!("{before}[{at}]"), value)).collect()
    };
    Ok(match value {
        Value::Array(values) => numbered("", values),
        Value::Object(mut object) if object.get("docs").is_some_and(Value::is_array) => {
            match object.remove("docs") {
                Some(Value::Array(values)) => numbered("docs", values),
                _ => Vec::new(),
            }
        }
        value => vec![(String::new(), value)],
    })
}

/// Everything that is wrong with a document, sorted by path, for this version or the newest.
///
/// Nothing is found in a deleted document and in design documents: no replication starts from them.
pub fn check(doc: &Value, version: Option<Version>, origin: Origin) -> Vec<Finding> {
    let mut findings = Findings { version: version.unwrap_or(Version::NEWEST), list: Vec::new() };
    let Some(members) = doc.as_object() else {
        let message = format!("expected a JSON object, got {}", shown(doc));
        findings.error("document", message, "write `{\"source\": …, \"target\": …}`");
        return findings.list;
    };
    let is_design = members.get("_id").and_then(Value::as_str).is_some_and(|id| id.starts_with("_design/"));
    if is_design || members.get("_deleted") == Some(&Value::Bool(true)) {
        return findings.list;
    }
    for (name, value) in members {
        match name.strip_prefix('_') {
            Some(_) => state::check_special(&mut findings, origin, name, value),
            None => check_member(&mut findings, members, name, value),
        }
    }
    if origin == Origin::Stored {
        state::check_written(&mut findings, members);
    }
    endpoint::check_both_there(&mut findings, members);
    fields::check_together(&mut findings, members);
    findings.list.sort_by(|a, b| (&a.path, a.severity, &a.message).cmp(&(&b.path, b.severity, &b.message)));
    findings.list
}

/// What tells whether a person has changed a document: all members but those that begin with `_` and `owner`, which
/// CouchDB writes itself. Stays the same whatever the order of members.
///
/// Depends on the passwords in the document: not to be shown, lest it helps whoever guesses at one.
pub fn fingerprint(doc: &Value) -> u64 {
    let mut written: Vec<(&String, &Value)> = doc.as_object().into_iter().flatten().collect();
    written.retain(|(name, _)| !name.starts_with('_') && *name != "owner");
    let hash = Sha256::digest(canonical(written).as_bytes());
    hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// JSON with sorted members.
fn canonical(mut members: Vec<(&String, &Value)>) -> String {
    fn text(value: &Value) -> String {
        match value {
            Value::Object(object) => canonical(object.iter().collect()),
            Value::Array(values) => format!("[{}]", values.iter().map(text).collect::<Vec<_>>().join(",")),
            other => other.to_string(),
        }
    }
    members.sort_by_key(|(name, _)| *name);
    let members =
        members.iter().map(|(name, value)| format!("{}:{}", Value::from(name.as_str()), text(value)));
    format!("{{{}}}", members.collect::<Vec<_>>().join(","))
}

/// Findings as they are made, and the version they are made for.
struct Findings {
    version: Version,
    list: Vec<Finding>,
}

impl Findings {
    fn say(
        &mut self,
        severity: Severity,
        path: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let (path, message, remedy) = (path.into(), message.into(), remedy.into());
        self.list.push(Finding { path, severity, message, remedy });
    }

    fn error(&mut self, path: impl Into<String>, message: impl Into<String>, remedy: impl Into<String>) {
        self.say(Severity::Error, path, message, remedy);
    }

    fn warning(&mut self, path: impl Into<String>, message: impl Into<String>, remedy: impl Into<String>) {
        self.say(Severity::Warning, path, message, remedy);
    }

    /// A value of another type than CouchDB takes.
    fn wrong(&mut self, path: &str, expected: &str, value: &Value, remedy: impl Into<String>) {
        self.error(path, format!("expected {expected}, got {}", shown(value)), remedy);
    }
}

/// A member at the top that does not begin with `_`.
fn check_member(findings: &mut Findings, members: &Map<String, Value>, name: &str, value: &Value) {
    match (fields::find(name), name) {
        (Some(field), _) => field.check(findings, name, value),
        (None, "params") => check_params(findings, value),
        (None, _) => check_unknown(findings, members, name, value),
    }
}

/// `params`: articles on the replicator put options there. CouchDB has never read it.
fn check_params(findings: &mut Findings, value: &Value) {
    let remedy = "take its members up to the top of the document";
    let Some(inner) = value.as_object() else {
        return findings.warning("params", "CouchDB does not know it and ignores it", remedy);
    };
    if inner.is_empty() {
        findings.warning("params", "CouchDB does not know it and ignores it", "take it away");
    }
    for (name, value) in inner {
        let path = format!("params.{}", shown_name(name));
        match fields::find(name) {
            Some(field) => {
                let message = format!("CouchDB reads `{name}` only at the top of the document");
                findings.error(&path, message, "move it up");
                field.check(findings, &path, value);
            }
            None => {
                let message = "CouchDB ignores `params` and all in it, and has no option of this name";
                findings.error(
                    path,
                    message,
                    meant(name, inner).unwrap_or_else(|| "take it away".to_owned()),
                );
            }
        }
    }
}

/// What people write instead of what CouchDB reads.
const OTHER_NAMES: &[(&str, &str)] = &[
    ("timeout", "connection_timeout"),
    ("connect_timeout", "connection_timeout"),
    ("retries", "retries_per_request"),
    ("since", "since_seq"),
    ("batch_size", "worker_batch_size"),
    ("workers", "worker_processes"),
    ("filter_params", "query_params"),
    ("ids", "doc_ids"),
    ("winning_revs", "winning_revs_only"),
];

/// A name that CouchDB does not know at the top. It ignores it, whatever was meant.
fn check_unknown(findings: &mut Findings, members: &Map<String, Value>, name: &str, value: &Value) {
    let path = shown_name(name);
    let unknown = "CouchDB does not know it and ignores it";
    match name {
        "heartbeat" => findings.warning(
            path,
            "CouchDB's replicator has no such option: it asks for signs of life at a third of `connection_timeout` itself",
            "take it away; for a slow source raise `connection_timeout` (milliseconds)",
        ),
        "headers" | "auth" | "url" => findings.error(
            path,
            "CouchDB reads it only within `source` or `target`, as a part of an endpoint",
            "write `\"source\": {\"url\": …, \"headers\": {…}}`",
        ),
        "oauth" => findings.error(
            path,
            "CouchDB reads it only within `auth` of an endpoint, and only up to 2.1",
            "put it into `source.auth`, or use another login",
        ),
        "id" | "replication_id" if !value.is_string() => {
            findings.wrong(&path, "a string, and only for `_replicate`", value, "take it away");
        }
        "id" | "replication_id" => findings.warning(
            path,
            "it names a replication only for `_replicate`; in a document CouchDB does not use it",
            "take it away",
        ),
        _ => match meant(name, members) {
            Some(remedy) => findings.error(path, unknown, remedy),
            None => findings.warning(path, unknown, "take it away, unless it is a note of your own"),
        },
    }
}

/// `did you mean …`, when something near is known and not there already.
fn meant(name: &str, members: &Map<String, Value>) -> Option<String> {
    let folded = folded(name);
    let other = OTHER_NAMES.iter().find(|(other, _)| *other == folded).map(|(_, known)| *known);
    let known = other.or_else(|| nearest_of(&folded, fields::names(), 1));
    known.filter(|known| !members.contains_key(*known)).map(|known| format!("did you mean `{known}`?"))
}

/// `createTarget` and `Create-Target` as `create_target`.
fn folded(name: &str) -> String {
    let mut folded = String::new();
    for char in name.chars().take(2 * NAME_CHARS_MAX) {
        match char {
            '-' | ' ' => folded.push('_'),
            char if char.is_ascii_uppercase() => {
                if !folded.is_empty() && !folded.ends_with('_') {
                    folded.push('_');
                }
                folded.push(char.to_ascii_lowercase());
            }
            char => folded.push(char),
        }
    }
    folded
}

/// A member's name as a part of a path: cut, and not at all when it may hold a login.
fn shown_name(name: &str) -> String {
    if name.contains('@') || name.contains("://") {
        return "***".to_owned();
    }
    let cut: String = name.chars().take(NAME_CHARS_MAX).flat_map(char::escape_debug).collect();
    if name.chars().count() > NAME_CHARS_MAX { format!("{cut}…") } else { cut }
}

/// What a value is, and its number; never a text of the document.
fn shown(value: &Value) -> String {
    match value {
        Value::Bool(value) => format!("`{value}`"),
        Value::Number(number) => format!("`{number}`"),
        Value::String(text) if ["true", "false"].contains(&text.as_str()) => {
            format!("the string `\"{text}\"`")
        }
        other => kind(other).to_owned(),
    }
}

/// What a value is, for what may be secret.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "`null`",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "an empty string",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
