//! The last thing told about each of the last documents: so many, and then the one that came first goes.
//!
//! Guarantees that it takes memory as it fills, and none once it is full. What a number stands for is left to the caller.

use crate::pure::slots::Slots;

/// Documents that are remembered, at most.
const TOLD_MAX: usize = 10_000;

/// By document, each a number (`message::doc_key`), the short id of what was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Document and what was told, in the order the documents came; when full, a ring.
    entries: Vec<(u64, u64)>,
    /// Of `entries`, when full: which came first.
    oldest: usize,
    slots: Slots,
}

impl Told {
    /// What was told last about a document.
    pub(crate) fn last(&self, doc_key: u64) -> Option<u64> {
        self.find(doc_key).map(|place| self.entries[place].1)
    }

    /// Something was told about a document. One that is known keeps its turn.
    pub(crate) fn insert(&mut self, doc_key: u64, short: u64) {
        if let Some(place) = self.find(doc_key) {
            self.entries[place].1 = short;
            return;
        }
        let mut place = self.entries.len();
        if place < TOLD_MAX {
            self.entries.push((doc_key, short));
        } else {
            place = self.oldest;
            self.oldest = (place + 1) % TOLD_MAX;
            self.slots.remove(self.slots.hash(self.entries[place].0), place);
            self.entries[place] = (doc_key, short);
        }
        self.slots.insert(self.slots.hash(doc_key), place);
    }

    fn find(&self, doc_key: u64) -> Option<usize> {
        self.slots.find(self.slots.hash(doc_key), |place| self.entries[place].0 == doc_key)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use super::*;

    #[test]
    fn agrees_with_a_tree_and_a_queue() {
        let (mut told, mut tree, mut queue) = (Told::default(), BTreeMap::new(), VecDeque::new());
        let mut random = fastrand::Rng::with_seed(7);
        for short in 0..10 * TOLD_MAX as u64 {
            // A third of them are known already.
            let key = random.u64(0..15_000);
            assert_eq!(told.last(key), tree.get(&key).copied(), "{short}: {key}");
            told.insert(key, short);
            if tree.insert(key, short).is_none() {
                queue.push_back(key);
            }
            if queue.len() > TOLD_MAX {
                let oldest = queue.pop_front().unwrap();
                tree.remove(&oldest);
                assert_eq!(told.last(oldest), None, "{short}: {oldest}");
            }
        }
        assert!(tree.iter().all(|(key, short)| told.last(*key) == Some(*short)));
        assert_eq!((told.entries.len(), tree.len()), (TOLD_MAX, TOLD_MAX));
    }
}
