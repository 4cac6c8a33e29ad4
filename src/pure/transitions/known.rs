//! What is remembered of a replication between two lives of the daemon.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::pure::replication::State;

/// In front of the id of a replication that was started by `_replicate` and has no document; no document's id begins
/// so.
pub const TRANSIENT: &str = "_replicate/";

/// What was last told of a replication, or found when its database was first looked at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// Its state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// It was there when its database was first looked at, and has had no state since: its first one is no news.
    #[serde(default, skip_serializing_if = "is_false")]
    pub was_there: bool,
    /// When it came to that end: another time is another end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// What it has to recover from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<State>,
    /// Documents that it could not write, as last told.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub write_failures: u64,
    /// Told as stalled, and has not moved since.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_stalled: bool,
    /// Fingerprint of the document that was told as invalid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalid: Option<u64>,
    /// How often it was submitted again since it last went well, and after which failure the last time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resubmitted: Option<(u32, Option<Timestamp>)>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_false(flag: &bool) -> bool {
    !*flag
}
