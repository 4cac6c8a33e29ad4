//! A replication's document as it has to be saved so that CouchDB begins it anew: without what CouchDB wrote into it.
//!
//! Guarantees that every other member stays byte for byte and in its place, attachments and secrets too, and that the
//! document goes under the revision that was read. Nothing of the document is ever formatted but names of members.

use std::fmt;

use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// What CouchDB's own members begin with: `_replication_state`, `_replication_id`, …
const OWN: &str = "_replication_";

/// A document to be saved.
pub struct Resubmission {
    /// JSON, with the `_rev` that was read: a secret, as replications hold passwords.
    pub body: String,
    /// The members that were taken out, in their order; with none CouchDB would see no difference.
    pub taken_out: Vec<String>,
    /// What `_replication_state` said.
    pub state: Option<String>,
}

impl fmt::Debug for Resubmission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Resubmission {{ taken_out: {:?}, state: {:?} }}", self.taken_out, self.state)
    }
}

impl Resubmission {
    /// From the document as CouchDB sent it; `None` when it is no JSON object.
    pub fn of(doc: &str) -> Option<Resubmission> {
        let members = serde_json::from_str::<Members>(doc).ok()?.0;
        let (own, kept): (Vec<_>, Vec<_>) = members.into_iter().partition(|(name, _)| name.starts_with(OWN));
        let state = own.iter().find(|(name, _)| name == "_replication_state");
        let state = state.and_then(|(_, value)| serde_json::from_str(value.get()).ok());
        let pairs = kept.iter().map(|(name, value)| format!("{}:{}", quoted(name), value.get()));
        let body = format!("{{{}}}", pairs.collect::<Vec<_>>().join(","));
        Some(Resubmission { body, taken_out: own.into_iter().map(|(name, _)| name).collect(), state })
    }
}

fn quoted(name: &str) -> String {
    serde_json::to_string(name).expect("a text is always JSON")
}

/// What was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resubmitted {
    /// The new revision; `None` when nothing had to be taken out, and so nothing was saved.
    pub rev: Option<String>,
    /// The members that were taken out.
    pub taken_out: Vec<String>,
    /// What `_replication_state` said before.
    pub previous_state: Option<String>,
}

/// Members of an object in their order.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Members, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members: Vec<(String, Box<RawValue>)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if members.iter().any(|(known, _)| *known == name) {
                        return Err(A::Error::custom("a member twice"));
                    }
                    members.push((name, value));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_couchdbs_own_members_are_taken_out() {
        let doc = r#"{"_id":"a","_rev":"3-x","source":{"url":"http://u:p@h/a" , "n":1.0},"big":123456789012345678901,
            "_replication_state":"failed","_replication_state_time":"2026-11-21T21:36:46Z","q\"uote":"\u00e4",
            "_replication_stats":{"docs_read":1},"_replication_id":null,"_attachments":{"x":{"stub":true}}}"#;
        let found = Resubmission::of(doc).unwrap();
        let expected = r#"{"_id":"a","_rev":"3-x","source":{"url":"http://u:p@h/a" , "n":1.0},"big":123456789012345678901,"q\"uote":"\u00e4","_attachments":{"x":{"stub":true}}}"#;
        assert_eq!(found.body, expected);
        let own = ["_replication_state", "_replication_state_time", "_replication_stats", "_replication_id"];
        assert_eq!(
            (found.taken_out.as_slice(), found.state.as_deref()),
            (&own.map(str::to_owned)[..], Some("failed"))
        );
    }

    #[test]
    fn a_document_without_them_stays_as_it_is() {
        let found = Resubmission::of(r#"{"_id":"a","source":"b"}"#).unwrap();
        assert_eq!(found.body, r#"{"_id":"a","source":"b"}"#);
        assert_eq!((found.taken_out.len(), found.state), (0, None));
    }

    #[test]
    fn what_is_no_document_is_refused_and_nothing_of_one_is_formatted() {
        assert!(Resubmission::of("[]").is_none());
        assert!(Resubmission::of(r#"{"a":1,"a":2}"#).is_none());
        let found = Resubmission::of(r#"{"source":"http://u:canary@h/"}"#).unwrap();
        assert!(!format!("{found:?}").contains("canary"));
    }
}
