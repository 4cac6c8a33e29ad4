//! What is remembered of a database between two lives of the daemon.

use serde::{Deserialize, Serialize};

use crate::pure::checkpoint::Mark;
use crate::pure::seq::Seq;

/// What is known of a database that exists.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The mark that it bore; `None` before it was first looked into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// The end of its changes, as JSON text: CouchDB may spell JSON in another way when it gives it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub through: Option<String>,
    /// Fingerprints of states that hold nothing behind it, oldest first.
    pub clean: Vec<u64>,
    /// CouchDB told of something that a look cannot find: it is told at the next one, whatever is found.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_hinted: bool,
    /// There at the first start, and not changed since the first look: a hint of what was written before that may yet
    /// come.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_fresh: bool,
}

impl Known {
    /// The end of its changes.
    pub fn through(&self) -> Option<Seq> {
        Seq::from_json(self.through.as_deref()?)
    }
}
