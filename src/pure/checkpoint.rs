//! What `_local/couch-hookd.NAME` says: how far a webhook has come in a database, and proof that we wrote it.
//!
//! Guarantees that a checkpoint which was altered, or moved to another database or webhook, is not believed:
//! on 1.x and 2.x anybody may write `_local` documents in a default database (DESIGN §7). Reading and writing
//! the document is left to `couch::local_docs`.

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::Sha256;

use crate::pure::seq::Seq;

/// The longest stored checkpoint that is read, in bytes; our own stay below 30 KiB.
pub const CHECKPOINT_BYTES_MAX: usize = 1024 * 1024;

/// What tells one life of a database from the next: 128 random bits, shown as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark([u8; 16]);

impl Mark {
    /// From random bytes.
    pub fn new(bytes: [u8; 16]) -> Mark {
        Mark(bytes)
    }

    /// From its text; `None` unless it is 32 lower-case hex digits.
    pub fn parse(text: &str) -> Option<Mark> {
        hex_bytes(text).map(Mark)
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Mark {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mark {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mark, D::Error> {
        let text = String::deserialize(deserializer)?;
        Mark::parse(&text).ok_or_else(|| serde::de::Error::custom("expected a mark of 32 hex digits"))
    }
}

/// A delivery that is done: the first 16 hex digits of the hash in its `webhook-id`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveredId(pub u64);

impl DeliveredId {
    /// From its text; `None` unless it is 16 lower-case hex digits.
    pub fn parse(text: &str) -> Option<DeliveredId> {
        hex_bytes(text).map(|bytes| DeliveredId(u64::from_be_bytes(bytes)))
    }

    /// From `msg_` and at least 16 hex digits; `None` for anything else.
    pub fn from_webhook_id(webhook_id: &str) -> Option<DeliveredId> {
        DeliveredId::parse(webhook_id.strip_prefix("msg_")?.get(..16)?)
    }
}

impl fmt::Display for DeliveredId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for DeliveredId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The key of the checkpoints' HMAC: 256 random bits that only `state_db` holds. Never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct StateKey([u8; 32]);

impl StateKey {
    /// From random bytes.
    pub fn new(bytes: [u8; 32]) -> StateKey {
        StateKey(bytes)
    }

    /// From 64 lower-case hex digits.
    pub fn parse(text: &str) -> Option<StateKey> {
        hex_bytes(text).map(StateKey)
    }

    /// An HMAC over `content`.
    pub fn mac(&self, content: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(content);
        mac
    }

    /// A number that only we can make of this one.
    pub fn number(&self, number: u64) -> u64 {
        let hash = self.mac(&number.to_be_bytes()).finalize().into_bytes();
        hash.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    /// The text for `state_db`, and for nothing else.
    pub fn expose(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Debug for StateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// How far one webhook has come in one database.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Everything up to here is finished; put into the document as CouchDB wrote it.
    pub through_seq: Seq,
    /// The mark of the database it was written in.
    pub mark: Mark,
    /// What is delivered beyond `through_seq`; at most 1,000 (DESIGN §7).
    pub delivered: Vec<DeliveredId>,
    /// When it was written; for people only.
    pub time: jiff::Timestamp,
    /// The version that wrote it; for people only.
    pub version: String,
    /// The request behind which it is a position: id of the last `seek` in this database that its writer knew.
    pub seek: Option<String>,
}

/// Where an operator has set a webhook in one database, kept in the webhook's record for good.
///
/// One write of the record is the whole of a seek: from then on only checkpoints count that name its request, and
/// until there is one the position is this. So a checkpoint that was written before, by us or late by CouchDB on
/// behalf of a process that is gone, cannot undo it, and nothing can do it twice.
///
/// `{"request":"request:0179…-5f0c","mark":"5f0c…","through_seq":"42-g1…"}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seek {
    /// The request that asked for it.
    pub request: String,
    /// The database that it is a place in; another one of the name is read from its beginning.
    pub mark: Mark,
    /// All up to here counts as finished.
    pub through_seq: Value,
}

impl Seek {
    /// The position.
    pub fn through_seq(&self) -> Seq {
        Seq::from_json(&self.through_seq.to_string()).unwrap_or_else(Seq::zero)
    }
}

/// The document as stored.
///
/// `{"_id":"_local/couch-hookd.orders","_rev":"0-3","through_seq":"42-g1…","mark":"5f0c…","delivered":["09ab…"],
/// "time":"2026-11-21T20:46:41Z","version":"0.1.0","hmac":"77…"}`
#[derive(Serialize, Deserialize)]
struct Document<'a> {
    #[serde(rename = "_id", skip_deserializing)]
    id: String,
    #[serde(rename = "_rev", skip_deserializing, skip_serializing_if = "Option::is_none")]
    rev: Option<&'a str>,
    #[serde(borrow)]
    through_seq: &'a RawValue,
    mark: Mark,
    delivered: Vec<String>,
    time: String,
    version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seek: Option<String>,
    hmac: String,
}

impl Checkpoint {
    /// The document to store; `rev` is the `_rev` of the last read or write, without it a cluster gives old
    /// checkpoints back (CONTRACT §9).
    pub fn to_json(&self, db: &str, webhook: &str, key: &StateKey, rev: Option<&str>) -> String {
        let through_seq = RawValue::from_string(self.through_seq.as_json().to_owned())
            .expect("a seq is the JSON text that a parser took out of an answer");
        let mut document = Document {
            id: format!("_local/{}", checkpoint_id(webhook)),
            rev,
            through_seq: &through_seq,
            mark: self.mark,
            delivered: self.delivered.iter().map(DeliveredId::to_string).collect(),
            time: self.time.to_string(),
            version: self.version.clone(),
            seek: self.seek.clone(),
            hmac: String::new(),
        };
        document.hmac = hex(&document.mac(db, webhook, key).finalize().into_bytes());
        serde_json::to_string(&document).expect("a document of texts is always JSON")
    }

    /// Reads what CouchDB gave.
    ///
    /// # Errors
    /// Why it is not believed, to be told to people: too long, not a checkpoint, not written by us.
    pub fn from_json(body: &[u8], db: &str, webhook: &str, key: &StateKey) -> Result<Checkpoint, String> {
        if body.len() > CHECKPOINT_BYTES_MAX {
            return Err(format!("it has {} bytes (expected at most {CHECKPOINT_BYTES_MAX})", body.len()));
        }
        let document: Document =
            serde_json::from_slice(body).map_err(|error| format!("it is not a checkpoint: {error}"))?;
        let claimed: [u8; 32] = hex_bytes(&document.hmac).ok_or("its `hmac` is not 64 hex digits")?;
        document.mac(db, webhook, key).verify_slice(&claimed).map_err(
            |_| "its `hmac` does not fit: it was written by somebody else, or for another database",
        )?;
        let delivered: Option<Vec<DeliveredId>> =
            document.delivered.iter().map(|text| DeliveredId::parse(text)).collect();
        Ok(Checkpoint {
            through_seq: Seq::from_json(document.through_seq.get()).ok_or("its `through_seq` is `null`")?,
            mark: document.mark,
            delivered: delivered.ok_or("its `delivered` holds more than hex digits")?,
            time: document.time.parse().map_err(|_| "its `time` is not a time")?,
            version: document.version,
            seek: document.seek,
        })
    }
}

impl Document<'_> {
    /// Over the JSON array `[db, webhook, through_seq, mark, delivered, time, version]`, and `seek` behind it where
    /// there is one. The seq goes in as a value,
    /// not as text: CouchDB may spell a string's escapes or an array's blanks in another way when it gives it back.
    fn mac(&self, db: &str, webhook: &str, key: &StateKey) -> Hmac<Sha256> {
        let through_seq: Value = serde_json::from_str(self.through_seq.get()).unwrap_or_default();
        let mut content =
            json!([db, webhook, through_seq, self.mark, self.delivered, self.time, self.version]);
        if let (Some(seek), Value::Array(content)) = (&self.seek, &mut content) {
            content.push(seek.as_str().into());
        }
        key.mac(content.to_string().as_bytes())
    }
}

/// `couch-hookd.NAME`, what follows `_local/`.
pub fn checkpoint_id(webhook: &str) -> String {
    format!("couch-hookd.{webhook}")
}

/// Lower-case hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        for half in [byte >> 4, byte & 15] {
            text.push(char::from_digit(u32::from(half), 16).expect("half a byte is a hex digit"));
        }
        text
    })
}

/// Exactly `2 * N` lower-case hex digits.
fn hex_bytes<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seq: &str) -> Checkpoint {
        Checkpoint {
            through_seq: Seq::from_json(seq).unwrap(),
            mark: Mark::new([0xab; 16]),
            delivered: vec![DeliveredId(1), DeliveredId(u64::MAX)],
            time: "2026-11-21T20:46:41Z".parse().unwrap(),
            version: "0.1.0".to_owned(),
            seek: Some("request:1-ab".to_owned()),
        }
    }

    fn key() -> StateKey {
        StateKey::new([7; 32])
    }

    #[test]
    fn comes_back_as_it_was_written() {
        for seq in ["42", "\"42-g1AAA_-\"", "[42,\"x\"]", "12345678901234567890123"] {
            let stored = sample(seq).to_json("orders", "shop", &key(), Some("0-3"));
            assert!(stored.contains(&format!("\"through_seq\":{seq},")), "{stored}");
            assert!(
                stored.starts_with(r#"{"_id":"_local/couch-hookd.shop","_rev":"0-3","#),
                "for people: {stored}"
            );
            let read = Checkpoint::from_json(stored.as_bytes(), "orders", "shop", &key()).unwrap();
            assert_eq!(read, sample(seq));
        }
    }

    #[test]
    fn is_believed_with_another_rev_member_order_and_spelling() {
        let stored = sample("[42,\"x/y\"]").to_json("orders", "shop", &key(), None);
        let value: Value = serde_json::from_str(&stored).unwrap();
        let respelled = serde_json::to_string_pretty(&value).unwrap().replace("x/y", "x\\/y");
        assert_ne!(respelled, stored);
        Checkpoint::from_json(respelled.as_bytes(), "orders", "shop", &key()).unwrap();
    }

    #[test]
    fn every_change_of_a_content_field_is_noticed() {
        let stored = sample("\"42-g1\"").to_json("orders", "shop", &key(), None);
        let not_believed = |body: &str, db: &str, webhook: &str, key: &StateKey| {
            Checkpoint::from_json(body.as_bytes(), db, webhook, key).unwrap_err()
        };
        for (old, new) in [
            ("42-g1", "43-g1"),
            ("abab", "abac"),
            ("0000000000000001", "0000000000000002"),
            ("[\"0000000000000001\",", "["),
            ("20:46", "20:47"),
            ("0.1.0", "0.1.1"),
            ("request:1-ab", "request:2-ab"),
            (",\"seek\":\"request:1-ab\"", ""),
        ] {
            let forged = stored.replacen(old, new, 1);
            assert_ne!(forged, stored);
            assert!(not_believed(&forged, "orders", "shop", &key()).contains("does not fit"), "{old}");
        }
        assert!(not_believed(&stored, "orders2", "shop", &key()).contains("does not fit"));
        assert!(not_believed(&stored, "orders", "shop2", &key()).contains("does not fit"));
        assert!(not_believed(&stored, "orders", "shop", &StateKey::new([8; 32])).contains("does not fit"));
        assert!(not_believed("{\"through_seq\":9}", "orders", "shop", &key()).contains("not a checkpoint"));
        assert!(not_believed("", "orders", "shop", &key()).contains("not a checkpoint"));
        let long = format!("{}{stored}", " ".repeat(CHECKPOINT_BYTES_MAX));
        assert!(not_believed(&long, "orders", "shop", &key()).contains("bytes"));
    }

    #[test]
    fn one_of_before_seeks_is_still_believed() {
        let old = Checkpoint { seek: None, ..sample("42") };
        let stored = old.to_json("orders", "shop", &key(), None);
        assert!(!stored.contains("seek"), "{stored}");
        assert_eq!(Checkpoint::from_json(stored.as_bytes(), "orders", "shop", &key()).unwrap(), old);
    }

    #[test]
    fn a_seek_keeps_the_place_as_it_was_given() {
        for seq in ["0", "42", "\"42-g1\"", "[42,\"x\"]"] {
            let through_seq = serde_json::from_str(seq).unwrap();
            let seek = Seek { request: "r".to_owned(), mark: Mark::new([1; 16]), through_seq };
            assert_eq!(seek.through_seq().as_json(), seq);
        }
    }

    #[test]
    fn marks_and_ids_are_strict_hex() {
        let mark = Mark::new([1; 16]);
        assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
        assert_eq!(Mark::parse("AB"), None);
        assert_eq!(Mark::parse(&"AB".repeat(16)), None);
        assert_eq!(Mark::parse(&"é".repeat(16)), None);
        assert_eq!(DeliveredId(10).to_string(), "000000000000000a");
        assert_eq!(DeliveredId::from_webhook_id("msg_000000000000000affff"), Some(DeliveredId(10)));
        assert_eq!(DeliveredId::from_webhook_id("msg_0"), None);
        assert_eq!(format!("{:?}", key()), "***");
    }
}
