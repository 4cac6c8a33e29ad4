//! What was found wrong with a configuration, and where its values came from.
//!
//! A finding is one line for a person: place first, then what was expected and what was found. It never holds
//! a secret: neither a password, a signing secret or a header's value, nor more of a URL than scheme and host.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::pure::secret::Secret;

/// Where a value was set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of an ini file, counted from 1.
    File {
        /// The file as it was named on the command line, or found in a directory named there.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// `--set` on the command line.
    Argument,
    /// CouchDB's `_config`, over HTTP.
    CouchConfig,
    /// Answers of an os_daemons host to `get`.
    OsDaemons,
}

impl fmt::Display for Origin {
    /// `local.d/hookd.ini:12`, ``environment `COUCH_HOOKD_PASSWORD` ``, `--set`, `_config`, `os_daemons`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment(variable) => write!(f, "environment `{variable}`"),
            Origin::Argument => f.write_str("--set"),
            Origin::CouchConfig => f.write_str("_config"),
            Origin::OsDaemons => f.write_str("os_daemons"),
        }
    }
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The webhook, or without one the whole configuration, cannot be used.
    Error,
    /// Works, but is probably not what was meant, or not safe.
    Warning,
}

/// One thing found. `Display` gives one line, without the severity:
///
/// ```text
/// local.d/hookd.ini:12: [hookd.webhook.orders] timeout: expected a duration such as `5s`, got `5`; write `5s`
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Origin, section and key as far as they are known: `hookd.ini:12: [hookd] timeout`. Never empty.
    pub place: String,
    /// What was expected, what was found, what to do.
    pub message: String,
    /// The webhook that an error holds back; an error without one concerns the whole configuration.
    pub webhook: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

impl Finding {
    /// An error that concerns `webhook`, or without one everything.
    pub fn error(webhook: Option<&str>, place: impl Into<String>, message: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Error,
            place: place.into(),
            message: message.into(),
            webhook: webhook.map(str::to_owned),
        }
    }

    /// A warning.
    pub fn warning(webhook: Option<&str>, place: impl Into<String>, message: impl Into<String>) -> Finding {
        Finding { severity: Severity::Warning, ..Finding::error(webhook, place, message) }
    }

    /// Whether it stops a webhook or everything.
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

/// One value as it was set, before anything is known about its key; so it may be a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    /// Trimmed, never empty; the contents of the file when it was set by `KEY_file`.
    pub text: Secret,
    /// Where it was set.
    pub origin: Origin,
}

/// All sections after merging, values by section and key, and what was found wrong on the way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Raw {
    /// Section, then key. Sections that are not ours stand here, too, as far as they were given.
    pub sections: BTreeMap<String, BTreeMap<String, Value>>,
    /// Unreadable files, malformed lines and the like: `parse` heeds and returns them.
    pub findings: Vec<Finding>,
}

impl Raw {
    /// The value of a key, if it is set.
    pub fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.sections.get(section)?.get(key)
    }
}
