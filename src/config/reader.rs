//! Reads one section by the table of keys: takes values, collects what is wrong with them.
//!
//! Guarantees that every key of the section was either asked for or is reported, and that the same rules hold
//! for a default as for a value that was set.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::finding::{Finding, Value};
use crate::config::keys::{self, Key, Kind, Section};
use crate::config::values;
use crate::pure::secret::Secret;

/// One section being read.
pub(crate) struct Reader<'a> {
    section: Section,
    /// As it stands between the brackets.
    name: String,
    webhook: Option<&'a str>,
    values: &'a BTreeMap<String, Value>,
    findings: Vec<Finding>,
}

impl<'a> Reader<'a> {
    /// Starts with the keys that nobody knows.
    pub(crate) fn new(
        section: Section,
        webhook: Option<&'a str>,
        values: &'a BTreeMap<String, Value>,
    ) -> Reader<'a> {
        let name = match webhook {
            Some(webhook) => format!("hookd.webhook.{webhook}"),
            None => "hookd".to_owned(),
        };
        let mut reader = Reader { section, name, webhook, values, findings: Vec::new() };
        for key in values.keys().filter(|key| keys::find(section, key).is_none()) {
            let why = reader.unknown(key);
            reader.error(key, why);
        }
        reader
    }

    /// What was found; errors hold back the webhook, or everything.
    pub(crate) fn into_findings(self) -> Vec<Finding> {
        self.findings
    }

    /// Reports an error at a key.
    pub(crate) fn error(&mut self, key: &str, message: impl Into<String>) {
        let place = self.place(key);
        self.findings.push(Finding::error(self.webhook, place, message));
    }

    /// Reports a warning at a key.
    pub(crate) fn warning(&mut self, key: &str, message: impl Into<String>) {
        let place = self.place(key);
        self.findings.push(Finding::warning(self.webhook, place, message));
    }

    /// Whether the key is set.
    pub(crate) fn is_set(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Whether the key is set, and to something else than its default.
    pub(crate) fn is_changed(&self, key: &str) -> bool {
        let text = self.values.get(key).map(|value| value.text.expose().trim());
        text.is_some() && text != self.defined(key).default
    }

    /// The section's keys that begin so, and what follows the beginning.
    pub(crate) fn starting_with(&self, prefix: &str) -> Vec<(&'a str, &'a Value)> {
        let rest = |(key, value): (&'a String, &'a Value)| Some((key.strip_prefix(prefix)?, value));
        self.values.iter().filter_map(rest).filter(|(rest, _)| !rest.is_empty()).collect()
    }

    /// A value that must not be shown, with nothing trimmed off: a password may end in a blank.
    pub(crate) fn secret(&mut self, key: &str) -> Option<Secret> {
        self.defined(key);
        self.values.get(key).map(|value| value.text.clone())
    }

    /// Reads a value with `parse`; without a value, or with a wrong one (reported), its default.
    pub(crate) fn read<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let default = self.defined(key).default;
        if let Some(value) = self.values.get(key) {
            match parse(value.text.expose().trim()) {
                Ok(parsed) => return Some(parsed),
                Err(why) => self.error(key, why),
            }
        }
        default.map(|default| parse(default).expect("a default in the table is a correct value"))
    }

    /// Reads a value with `parse` whose default is another than the table's here; `None` without one, or with a wrong
    /// one (reported).
    pub(crate) fn read_set<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        self.defined(key);
        match parse(self.values.get(key)?.text.expose().trim()) {
            Ok(parsed) => Some(parsed),
            Err(why) => {
                self.error(key, why);
                None
            }
        }
    }

    pub(crate) fn flag(&mut self, key: &str) -> bool {
        self.with_default(key, values::flag)
    }

    pub(crate) fn duration(&mut self, key: &str) -> Duration {
        let Kind::Duration(min, max) = self.defined(key).kind else { unreachable!("`{key}` is no duration") };
        self.with_default(key, |text| values::duration(text, min, max))
    }

    pub(crate) fn durations(&mut self, key: &str) -> Vec<Duration> {
        let Kind::Durations(min, max) = self.defined(key).kind else {
            unreachable!("`{key}` is no durations")
        };
        self.with_default(key, |text| values::durations(text, min, max))
    }

    pub(crate) fn count(&mut self, key: &str) -> u64 {
        let Kind::Count(min, max) = self.defined(key).kind else { unreachable!("`{key}` is no number") };
        self.with_default(key, |text| values::count(text, min, max))
    }

    pub(crate) fn size(&mut self, key: &str) -> u64 {
        let Kind::Size(min, max) = self.defined(key).kind else { unreachable!("`{key}` is no size") };
        self.with_default(key, |text| values::size(text, min, max))
    }

    pub(crate) fn word(&mut self, key: &str, later: &[&str]) -> &'static str {
        let Kind::Word(words) = self.defined(key).kind else { unreachable!("`{key}` is no word") };
        self.with_default(key, |text| values::word(text, words, later))
    }

    pub(crate) fn path(&mut self, key: &str) -> Option<PathBuf> {
        self.read(key, |text| Ok(PathBuf::from(text)))
    }

    /// As `read`, for keys that have a default.
    pub(crate) fn with_default<T>(&mut self, key: &str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        self.read(key, parse).expect("this key has a default in the table")
    }

    /// `hookd.ini:12: [hookd] timeout`
    fn place(&self, key: &str) -> String {
        place(self.values.get(key), &self.name, key)
    }

    fn defined(&self, key: &str) -> &'static Key {
        keys::find(self.section, key).expect("the table defines every key that is read")
    }

    fn unknown(&self, key: &str) -> String {
        if keys::LATER.contains(&(self.section, key)) {
            return "this key is not available in this version; delete the line".to_owned();
        }
        if let (Some(webhook), "url") = (self.webhook, key) {
            return format!("this key is unknown; put `{webhook} = URL` under [hookd.webhooks]");
        }
        if key.starts_with(['#', '/']) {
            return "this key is unknown; comments begin with `;`".to_owned();
        }
        let (other, other_name) = match self.section {
            Section::Hookd => (Section::Webhook, "[hookd.webhook.NAME]"),
            Section::Webhook => (Section::Hookd, "[hookd]"),
        };
        let bare = key.strip_suffix("_file").unwrap_or(key);
        if keys::find(other, bare).is_some() {
            return format!("this key belongs to {other_name}; {}", keys::STRAY);
        }
        match keys::nearest(self.section, key) {
            Some(nearest) => format!("this key is unknown; the nearest one is `{nearest}`"),
            None => "this key is unknown".to_owned(),
        }
    }
}

/// Where something stands: `hookd.ini:12: [hookd] timeout`.
pub(crate) fn place(value: Option<&Value>, section: &str, key: &str) -> String {
    let key = values::shown(key);
    match value {
        Some(value) => format!("{}: [{section}] {key}", value.origin),
        None => format!("[{section}] {key}"),
    }
}
