//! Why a replication fails: from the reason CouchDB gives to plain words, a class and what to do about it.
//!
//! CouchDB's reasons are Erlang terms over several lines, sentences, or sentences that end in a term, and hold
//! whatever was at hand: URLs with logins, user names, headers. Guarantees that neither `error` nor `raw` holds a
//! login, a query, a header or a text of unknown meaning (`clean`), that both are one bounded line, and that every
//! input is answered. Secrets that stand in a plain sentence without any sign are left to those who know them.

mod clean;
#[cfg(test)]
mod tests;
mod words;

use serde::{Deserialize, Serialize};

use crate::pure::rep_error::words::Cause;

/// More of a reason is not read. Terms with a whole state in them can be megabytes.
const INPUT_BYTES_MAX: usize = 16 << 10;
/// The longest `error`, in bytes.
const ERROR_BYTES_MAX: usize = 400;
/// The longest `raw`, in bytes.
const RAW_BYTES_MAX: usize = 1 << 10;

/// What kind of failure it is: what receivers branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// No connection to the other side, or a broken one: refused, no such name, TLS, 502, 503.
    Unreachable,
    /// User name or password is wrong or missing: 401, locked accounts.
    Auth,
    /// Source or target does not exist: 404.
    NotFound,
    /// The filter function cannot be had or run.
    Filter,
    /// The target has no room, or takes no document as large as that: `enospc`, 413, 507, quotas.
    TargetFull,
    /// The user may not do that: 403, `validate_doc_update`.
    Forbidden,
    /// The other side is too slow: 408, 504.
    Timeout,
    /// Another document or request asks for the same replication.
    Duplicate,
    /// A process of CouchDB's died, and no cause outside of it is named.
    Crash,
    /// Everything else; faults of the document, too.
    Other,
}

impl Class {
    /// The word in payloads: `not_found`.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Unreachable => "unreachable",
            Class::Auth => "auth",
            Class::NotFound => "not_found",
            Class::Filter => "filter",
            Class::TargetFull => "target_full",
            Class::Forbidden => "forbidden",
            Class::Timeout => "timeout",
            Class::Duplicate => "duplicate",
            Class::Crash => "crash",
            Class::Other => "other",
        }
    }
}

/// A reason, understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Analysis {
    /// Plain words: `GET http://h/db/ failed: connection refused`. At most 400 bytes.
    pub error: String,
    /// The kind of failure; also decides what `hint` says.
    pub class: Class,
    /// What to do, one line.
    pub hint: &'static str,
    /// What CouchDB said, redacted, in one line of at most 1 KiB:
    /// `{http_request_failed,"GET","http://h/db/",{error,{conn_failed,{error,econnrefused}}}}`.
    pub raw: String,
}

/// Analyses a reason as it stands in `_replication_state_reason`, in `info` or in a job's history.
pub fn analyze(raw: &str) -> Analysis {
    let reason = head(raw);
    let said = words::of_reason(reason);
    let cause = said.cause.unwrap_or(Cause::Other);
    let words = if said.words.is_empty() { "no reason given".to_owned() } else { said.words };
    Analysis {
        error: clean::bound(words, ERROR_BYTES_MAX),
        class: cause.class(),
        hint: cause.hint(),
        raw: clean::bound(clean::cleaned(reason), RAW_BYTES_MAX),
    }
}

/// The first [`INPUT_BYTES_MAX`], without the word that the cut would go through: half a URL is no URL.
fn head(raw: &str) -> &str {
    if raw.len() <= INPUT_BYTES_MAX {
        return raw;
    }
    let mut end = INPUT_BYTES_MAX;
    while !raw.is_char_boundary(end) {
        end -= 1;
    }
    let whole = raw[..end].rfind([' ', '\n', ',']).unwrap_or(0);
    &raw[..whole]
}
