//! A place in a changes feed, as CouchDB gave it.
//!
//! Opaque: never compared, sorted or taken apart. On 1.x it is a JSON integer (`42`), on 2.x and 3.x a JSON
//! string (`"42-g1AAA…"`), on BigCouch an array. It differs from request to request for one and the same
//! change (CONTRACT §6).

use std::fmt;
use std::sync::Arc;

/// The JSON text of a `seq` or `last_seq`, byte for byte. Cheap to clone: every row in flight holds one.
#[derive(Clone, PartialEq, Eq)]
pub struct Seq(Arc<str>);

impl Seq {
    /// From the JSON text as CouchDB wrote it; `None` for `null`.
    pub fn from_json(text: &str) -> Option<Seq> {
        let text = text.trim();
        (text != "null" && !text.is_empty()).then(|| Seq(text.into()))
    }

    /// The beginning of every database.
    pub fn zero() -> Seq {
        Seq("0".into())
    }

    /// The JSON text, to be put into payloads and checkpoints.
    pub fn as_json(&self) -> &str {
        &self.0
    }

    /// The value of `since=`, not yet percent-encoded: a string without its quotes, anything else as it is.
    pub fn as_since(&self) -> String {
        serde_json::from_str::<String>(&self.0).unwrap_or_else(|_| self.0.to_string())
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Seq {
    /// At most 24 characters, for log lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.as_since();
        match since.char_indices().nth(24) {
            Some((end, _)) => write!(f, "{}...", &since[..end]),
            None => f.write_str(&since),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_couchdb_wrote() {
        assert_eq!(Seq::from_json("42").unwrap().as_since(), "42");
        assert_eq!(Seq::from_json("\"42-g1\"").unwrap().as_since(), "42-g1");
        assert_eq!(Seq::from_json("[42,\"x\"]").unwrap().as_since(), "[42,\"x\"]");
        assert_eq!(Seq::from_json("null"), None);
    }
}
