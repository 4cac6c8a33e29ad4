//! What a daemon says of a webhook to whoever asks: plain data, for `status`.
//!
//! Leaves to others who asks, and how it gets there (`couch::alive`).

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A webhook's state, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// CouchDB has not let it begin yet.
    Starting,
    /// It reads and delivers.
    Running,
    /// A database of it cannot be read, or is not there.
    Waiting,
    /// Its endpoint takes nothing now.
    Down,
    /// Until `resume`, or a change of its section.
    Paused,
    /// Its endpoint said 410.
    Gone,
    /// Another daemon tells it, or is to.
    Standby,
}

impl State {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Running => "running",
            State::Waiting => "waiting",
            State::Down => "down",
            State::Paused => "paused",
            State::Gone => "gone",
            State::Standby => "standby",
        }
    }
}

/// What a daemon knows of a webhook that it runs.
///
/// `{"state":"down","since":"2026-11-21T20:46:41Z","why":"cannot be reached","unfinished":100,"oldest":"…",
/// "last_success":"…","last_failure":"…","failure":"connection refused","next_try":"…"}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebhookStatus {
    /// One word.
    pub state: State,
    /// Since when.
    pub since: Timestamp,
    /// Why, where the word does not say it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Events read and not yet delivered or stored.
    #[serde(default)]
    pub unfinished: u64,
    /// When the oldest of them was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest: Option<Timestamp>,
    /// Last 2xx of this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_success: Option<Timestamp>,
    /// Last attempt of this process that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Timestamp>,
    /// What came of it, redacted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// When a failing endpoint is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try: Option<Timestamp>,
}

impl WebhookStatus {
    /// A state that nothing is known about yet.
    pub fn new(state: State, since: Timestamp) -> WebhookStatus {
        WebhookStatus {
            state,
            since,
            why: None,
            unfinished: 0,
            oldest: None,
            last_success: None,
            last_failure: None,
            failure: None,
            next_try: None,
        }
    }
}

/// What a daemon says of all its webhooks, by name.
pub type Statuses = BTreeMap<String, WebhookStatus>;
