//! What is remembered, between two lives of the daemon, of things that have no feed (replications, databases), with the
//! events that are told of them: 64 documents `_local/couch-hookd.NAME.N`.
//!
//! Each holds what is known of its things, by hash of their keys, and the events that are not known to be delivered, so
//! that one write makes a change known and its event certain. Guarantees that a number, once given to an event, is never
//! given to another while the database lives (`webhook-id`s are made of it, DESIGN §5); that an event is given to be sent
//! when it is stored, and nothing that came before it waits to be; and that what somebody else wrote, or wrote for another
//! place, is not believed. What is known of a thing, and what is told of it, is `transitions`' and `database_events`'.

use std::collections::BTreeMap;

use hmac::Mac;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::pure::checkpoint::{Mark, StateKey, hex};
use crate::pure::message::doc_key;
use crate::pure::seq::Seq;

/// How many documents there are.
pub const BUCKETS: usize = 64;

/// The position of a webhook that has not looked yet, and asked for what happens from now on.
const NOW: &str = "\"now\"";

/// In which document a thing is remembered.
pub fn bucket_of(key: &str) -> usize {
    usize::try_from(doc_key(key) % BUCKETS as u64).expect("a number below 64")
}

/// The position to begin at, where a webhook is to tell what happens from now on.
pub fn position_now() -> Seq {
    Seq::from_json(NOW).expect("a JSON text")
}

/// Whether nothing was looked at yet, and what is there then is not to be told.
pub fn is_now(position: &Seq) -> bool {
    position.as_json() == NOW
}

/// The position behind an event, `"t17"`.
pub fn position(number: u64) -> Seq {
    Seq::from_json(&format!("\"t{number}\"")).expect("a JSON text")
}

/// The number in a position of ours; 0 for everything else.
pub fn number(position: &Seq) -> u64 {
    let text = position.as_since();
    text.strip_prefix('t').and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// How a wait for events ended.
#[derive(Debug, PartialEq)]
pub struct Waited {
    /// What was handed over up to here.
    pub last_seq: Seq,
    /// Whether we were told to end it, or there is more than is handed over at once.
    pub closed: bool,
}

/// An event that is not known to be delivered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Counts the events of a webhook and a database; part of the `webhook-id`.
    pub n: u64,
    /// Of which thing.
    pub key: String,
    /// `replication.failed`.
    #[serde(rename = "type")]
    pub event_type: String,
    /// When it became so.
    pub at: Timestamp,
    /// `data` of the payload, as JSON text: CouchDB may spell JSON in another way when it gives it back.
    pub data: String,
}

/// One of the documents.
///
/// `{"_id":"_local/couch-hookd.sync.17","_rev":"0-3","mark":"5f0c…","last":812,"known":{"edge1":{"state":"crashing",
/// "trouble":"crashing"}},"events":[{"n":812,"key":"edge1","type":"replication.crashing","at":"…","data":"{…}"}],
/// "hmac":"77…"}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bucket<K> {
    /// The mark of the database it was written in.
    pub mark: Mark,
    /// The highest number given to an event in it.
    pub last: u64,
    /// By key.
    pub known: BTreeMap<String, K>,
    /// In order of their numbers.
    pub events: Vec<Kept>,
}

impl<K: Serialize + DeserializeOwned> Bucket<K> {
    /// The document to store; `place` names it (database and id), so that it holds nowhere else.
    pub fn to_json(&self, place: &(&str, &str), key: &StateKey, rev: Option<&str>) -> String {
        #[derive(Serialize)]
        struct Document<'a, K> {
            #[serde(rename = "_rev", skip_serializing_if = "Option::is_none")]
            rev: Option<&'a str>,
            #[serde(flatten)]
            bucket: &'a Bucket<K>,
            hmac: String,
        }
        serde_json::to_string(&Document { rev, bucket: self, hmac: self.hmac(place, key) })
            .expect("texts and numbers are always JSON")
    }

    /// Reads what CouchDB gave.
    ///
    /// # Errors
    /// Why it is not believed, to be told to people.
    pub fn from_json(body: &[u8], place: &(&str, &str), key: &StateKey) -> Result<Bucket<K>, String> {
        #[derive(Deserialize)]
        struct Document<K> {
            #[serde(flatten)]
            bucket: Bucket<K>,
            hmac: String,
        }
        let Document { bucket, hmac }: Document<K> =
            serde_json::from_slice(body).map_err(|error| format!("it is not what we write: {error}"))?;
        // Compared as texts: whoever can measure the time that takes can write `_local` documents anyway.
        if bucket.hmac(place, key) != hmac {
            return Err(
                "its `hmac` does not fit: it was written by somebody else, or for another place".to_owned()
            );
        }
        Ok(bucket)
    }

    fn hmac(&self, place: &(&str, &str), key: &StateKey) -> String {
        let content = serde_json::to_vec(&(place, self)).expect("texts and numbers are always JSON");
        hex(&key.mac(&content).finalize().into_bytes())
    }
}

/// All of them, and which are to be stored.
#[derive(Debug)]
pub struct Remembered<K> {
    mark: Mark,
    buckets: Vec<Bucket<K>>,
    dirty: Vec<bool>,
    /// By bucket the lowest number that was taken back since it was stored: what is stored still has it.
    taken_back: Vec<Option<u64>>,
    /// Those that were never stored, until the first look is over: what it finds there is known, not told.
    is_quiet: Vec<bool>,
    last: u64,
    /// Events up to here are delivered, or dead letters.
    through: u64,
}

impl<K> Remembered<K> {
    /// From what is stored of each document, if anything is, in the database that bears `mark`; `through`: events up to
    /// this number need not be told any more. `is_quiet`: what is found where nothing is stored is not told.
    pub fn new(mark: Mark, stored: Vec<Option<Bucket<K>>>, through: u64, is_quiet: bool) -> Remembered<K> {
        assert_eq!(stored.len(), BUCKETS, "one for each document");
        let is_quiet = stored.iter().map(|stored| stored.is_none() && is_quiet).collect();
        let new = || Bucket { mark, last: 0, known: BTreeMap::new(), events: Vec::new() };
        let buckets: Vec<Bucket<K>> = stored.into_iter().map(|stored| stored.unwrap_or_else(new)).collect();
        let last = buckets.iter().map(|bucket| bucket.last).max().unwrap_or(0).max(through);
        let (dirty, taken_back) = (vec![false; BUCKETS], vec![None; BUCKETS]);
        let mut remembered = Remembered { mark, buckets, dirty, taken_back, is_quiet, last, through };
        remembered.on_through(through);
        remembered
    }

    /// That of the database it lies in.
    pub fn mark(&self) -> Mark {
        self.mark
    }

    /// The highest number given so far.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Whether there are documents that were never stored, and what is found there is not told. Nothing may be stored
    /// before all of it was seen, which [`Remembered::end_first_look`] says.
    pub fn is_first_look(&self) -> bool {
        self.is_quiet.contains(&true)
    }

    /// Whether that is so for the document of this thing.
    pub fn is_quiet(&self, key: &str) -> bool {
        self.is_quiet[bucket_of(key)]
    }

    /// Everything that is there is known. All documents are stored then, so that it is known that they were.
    pub fn end_first_look(&mut self) {
        for (quiet, dirty) in self.is_quiet.iter_mut().zip(&mut self.dirty) {
            *dirty |= std::mem::take(quiet);
        }
    }

    /// What is known of a thing.
    pub fn known(&self, key: &str) -> Option<&K> {
        self.buckets[bucket_of(key)].known.get(key)
    }

    /// All that something is known of, and what.
    pub fn all(&self) -> impl Iterator<Item = (&str, &K)> {
        let all = self.buckets.iter().flat_map(|bucket| &bucket.known);
        all.map(|(key, known)| (key.as_str(), known))
    }

    /// Something is known of a thing from now on.
    pub fn insert(&mut self, key: &str, known: K) {
        let bucket = bucket_of(key);
        self.buckets[bucket].known.insert(key.to_owned(), known);
        self.dirty[bucket] = true;
    }

    /// There is no such thing any more; what was known of it.
    pub fn remove(&mut self, key: &str) -> Option<K> {
        let bucket = bucket_of(key);
        let known = self.buckets[bucket].known.remove(key)?;
        self.dirty[bucket] = true;
        Some(known)
    }

    /// Keeps an event, with the next number.
    pub fn keep(&mut self, key: &str, event_type: &str, at: Timestamp, data: String) {
        self.last += 1;
        let index = bucket_of(key);
        let bucket = &mut self.buckets[index];
        bucket.last = self.last;
        let (key, event_type) = (key.to_owned(), event_type.to_owned());
        bucket.events.push(Kept { n: self.last, key, event_type, at, data });
        self.dirty[index] = true;
    }

    /// Events of a thing that are not known to be delivered, in order.
    pub fn events_of(&self, key: &str) -> impl DoubleEndedIterator<Item = &Kept> {
        self.buckets[bucket_of(key)].events.iter().filter(move |kept| kept.key == key)
    }

    /// Events of a thing behind a number, none of which was sent, are not to be told any more.
    pub fn take_back(&mut self, key: &str, after: u64) {
        let lowest = self.events_of(key).map(|kept| kept.n).find(|n| *n > after);
        let index = bucket_of(key);
        if lowest.is_some() {
            self.taken_back[index] = self.taken_back[index].or(lowest);
            self.buckets[index].events.retain(|kept| kept.n <= after || kept.key != key);
            self.dirty[index] = true;
        }
    }

    /// The documents to be stored before anything more is told.
    pub fn dirty(&self) -> Vec<(usize, &Bucket<K>)> {
        let all = self.buckets.iter().enumerate();
        all.filter(|(index, _)| self.dirty[*index]).collect()
    }

    /// One of them is stored.
    pub fn on_stored(&mut self, index: usize) {
        (self.dirty[index], self.taken_back[index]) = (false, None);
    }

    /// Events up to this number are delivered, or dead letters, and that is stored; they go with the next write.
    pub fn on_through(&mut self, through: u64) {
        self.through = self.through.max(through);
        for bucket in &mut self.buckets {
            bucket.events.retain(|kept| kept.n > through);
        }
    }

    /// Stored events behind a number, in their order, at most `n_max`. None behind one that is not stored, or the
    /// position would pass that one; nor behind one that was taken back while it is still stored: a kill would bring it
    /// back, behind the position.
    pub fn events_after(&self, after: u64, n_max: usize) -> Vec<&Kept> {
        let of = |is_dirty: bool| {
            let buckets = self.buckets.iter().zip(&self.dirty).filter(move |(_, dirty)| **dirty == is_dirty);
            buckets.flat_map(|(bucket, _)| &bucket.events).filter(move |kept| kept.n > after)
        };
        let taken_back = self.taken_back.iter().flatten().copied().filter(|n| *n > after);
        let first = of(true).map(|kept| kept.n).chain(taken_back).min();
        let is_before = |kept: &&Kept| first.is_none_or(|first| kept.n < first);
        let mut found: Vec<&Kept> = of(false).filter(is_before).collect();
        found.sort_unstable_by_key(|kept| kept.n);
        found.truncate(n_max);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> Mark {
        Mark::new([7; 16])
    }

    fn new(stored: Vec<Option<Bucket<u8>>>, through: u64) -> Remembered<u8> {
        Remembered::new(mark(), stored, through, false)
    }

    /// Stores these documents.
    fn store(remembered: &mut Remembered<u8>, stored: &mut [Option<Bucket<u8>>], which: &[usize]) {
        let place = ("db", "id");
        let key = StateKey::new([1; 32]);
        let dirty: Vec<(usize, String)> = remembered
            .dirty()
            .into_iter()
            .filter(|(index, _)| which.contains(index))
            .map(|(index, bucket)| (index, bucket.to_json(&place, &key, None)))
            .collect();
        for (index, json) in dirty {
            stored[index] = Some(Bucket::from_json(json.as_bytes(), &place, &key).unwrap());
            remembered.on_stored(index);
        }
    }

    fn numbers(remembered: &Remembered<u8>, after: u64) -> Vec<u64> {
        remembered.events_after(after, 9).iter().map(|kept| kept.n).collect()
    }

    #[test]
    fn positions_are_numbers_of_ours() {
        for n in [0, 17, u64::MAX] {
            assert_eq!(number(&position(n)), n);
            assert!(!is_now(&position(n)));
        }
        for other in [Seq::zero(), position_now(), Seq::from_json("\"42-g1\"").unwrap()] {
            assert_eq!(number(&other), 0, "{other}");
        }
        assert!(is_now(&position_now()));
    }

    #[test]
    fn what_somebody_else_wrote_is_not_believed() {
        let (place, key) = (("_replicator", "couch-hookd.sync.1"), StateKey::new([1; 32]));
        let bucket: Bucket<u64> = Bucket {
            mark: mark(),
            last: 0,
            known: BTreeMap::from([("a".to_owned(), u64::MAX)]),
            events: vec![],
        };
        let json = bucket.to_json(&place, &key, Some("0-3"));
        assert!(json.starts_with("{\"_rev\":\"0-3\",\"mark\":"), "{json}");
        assert_eq!(Bucket::from_json(json.as_bytes(), &place, &key), Ok(bucket));
        for (body, place) in [
            (json.replace("\"last\":0", "\"last\":9"), place),
            (json.replace("\"a\"", "\"b\""), place),
            (json.clone(), ("_replicator", "couch-hookd.sync.2")),
            ("{}".to_owned(), place),
        ] {
            assert!(Bucket::<u64>::from_json(body.as_bytes(), &place, &key).is_err(), "{body}");
        }
    }

    #[test]
    fn what_was_taken_back_and_is_still_stored_is_not_passed() {
        let (a, b) = (bucket_of("a"), bucket_of("b"));
        assert_ne!(a, b);
        let mut stored = vec![None; BUCKETS];
        let mut remembered = new(stored.clone(), 0);
        for key in ["a", "b"] {
            remembered.insert(key, 0);
            remembered.keep(key, "created", Timestamp::UNIX_EPOCH, String::new());
        }
        assert!(numbers(&remembered, 0).is_empty(), "nothing is stored");
        store(&mut remembered, &mut stored, &[a, b]);
        assert_eq!(numbers(&remembered, 0), [1, 2]);
        remembered.remove("a");
        remembered.take_back("a", 0);
        // Sent now, 2 would be the position: 1 would come back with a kill, and never be told.
        assert!(numbers(&remembered, 0).is_empty());
        assert_eq!(numbers(&new(stored.clone(), 0), 0), [1, 2], "killed before it is stored");
        store(&mut remembered, &mut stored, &[a]);
        assert_eq!(numbers(&remembered, 0), [2]);
        let mut again = new(stored, 0);
        assert_eq!((numbers(&again, 0), again.known("a"), again.last()), (vec![2], None, 2));
        again.on_through(2);
        assert!(numbers(&again, 0).is_empty() && again.dirty().is_empty());
    }
}
