//! The last thing told about each of the last documents: so many, and then the one that came first goes.
//!
//! Guarantees that it takes memory as it fills, and none once it is full, however long documents come and go: a hash table
//! of `std` doubles when it is worn. What a number stands for is left to the caller.

use std::hash::BuildHasher;

/// Documents that are remembered, at most.
const TOLD_MAX: usize = 10_000;
/// Slots of the smallest table.
const SLOTS_MIN: usize = 64;

/// By document, each a number (`message::doc_key`), the short id of what was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// In the order they came, each with what was told; when full, a ring.
    entries: Vec<(u64, u64)>,
    /// Of `entries`, when full: which came first.
    oldest: usize,
    /// Places in `entries`, counted from 1, each at the slot of its document's hash or behind it; 0 = empty. At most
    /// half of them are taken.
    slots: Vec<u16>,
    /// Seeded at random: who chooses document ids cannot choose their slots.
    hasher: foldhash::fast::RandomState,
}

impl Told {
    /// What was told last about a document.
    pub(crate) fn last(&self, doc_key: u64) -> Option<u64> {
        self.entry_at(self.find(doc_key)?).map(|entry| self.entries[entry].1)
    }

    /// Something was told about a document. One that is known keeps its turn.
    pub(crate) fn insert(&mut self, doc_key: u64, short: u64) {
        if 2 * (self.entries.len() + 1) > self.slots.len() && self.entries.len() < TOLD_MAX {
            self.grow();
        }
        let slot = self.find(doc_key).expect("there are slots");
        if let Some(entry) = self.entry_at(slot) {
            self.entries[entry].1 = short;
            return;
        }
        if self.entries.len() < TOLD_MAX {
            self.entries.push((doc_key, short));
            self.put(slot, self.entries.len() - 1);
            return;
        }
        let oldest = self.oldest;
        self.oldest = (oldest + 1) % TOLD_MAX;
        self.remove(self.entries[oldest].0);
        self.entries[oldest] = (doc_key, short);
        let slot = self.find(doc_key).expect("there are slots");
        self.put(slot, oldest);
    }

    /// The slot of a document, or the empty one where it would be; `None` while there are no slots.
    fn find(&self, doc_key: u64) -> Option<usize> {
        let mut slot = self.home(doc_key)?;
        while self.entry_at(slot).is_some_and(|entry| self.entries[entry].0 != doc_key) {
            slot = (slot + 1) % self.slots.len();
        }
        Some(slot)
    }

    /// Where a document would be if it was alone.
    fn home(&self, doc_key: u64) -> Option<usize> {
        let hash = usize::try_from(self.hasher.hash_one(doc_key) >> 32).expect("it has 32 bits");
        hash.checked_rem(self.slots.len())
    }

    fn entry_at(&self, slot: usize) -> Option<usize> {
        usize::from(self.slots[slot]).checked_sub(1)
    }

    fn put(&mut self, slot: usize, entry: usize) {
        self.slots[slot] = u16::try_from(entry + 1).expect("there are fewer entries");
    }

    /// Takes a document out of the slots and closes the gap: whoever was moved on by it moves back.
    fn remove(&mut self, doc_key: u64) {
        let n_slots = self.slots.len();
        let mut gap = self.find(doc_key).expect("there are slots");
        let mut slot = gap;
        loop {
            slot = (slot + 1) % n_slots;
            let Some(entry) = self.entry_at(slot) else { break };
            let home = self.home(self.entries[entry].0).expect("there are slots");
            // It may not stand before its home, wherever the table's end lies.
            if (slot + n_slots - home) % n_slots >= (slot + n_slots - gap) % n_slots {
                self.slots[gap] = self.slots[slot];
                gap = slot;
            }
        }
        self.slots[gap] = 0;
    }

    fn grow(&mut self) {
        self.slots = vec![0; SLOTS_MIN.max(2 * self.slots.len())];
        for entry in 0..self.entries.len() {
            let slot = self.find(self.entries[entry].0).expect("there are slots");
            self.put(slot, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};

    use super::*;

    #[test]
    fn agrees_with_a_tree_and_a_queue_and_grows_no_more_once_full() {
        let (mut told, mut tree, mut queue) = (Told::default(), BTreeMap::new(), VecDeque::new());
        let mut random = fastrand::Rng::with_seed(7);
        let mut capacities = (0, 0);
        for n in 0..20 * TOLD_MAX as u64 {
            // A third of them are known already.
            let (key, short) = (random.u64(0..15_000), n);
            assert_eq!(told.last(key), tree.get(&key).copied(), "{n}: {key}");
            told.insert(key, short);
            if tree.insert(key, short).is_none() {
                queue.push_back(key);
            }
            if queue.len() > TOLD_MAX {
                let oldest = queue.pop_front().unwrap();
                tree.remove(&oldest);
                assert_eq!(told.last(oldest), None, "{n}: {oldest}");
            }
            if told.entries.len() == TOLD_MAX && capacities == (0, 0) {
                capacities = (told.entries.capacity(), told.slots.capacity());
            }
        }
        assert_eq!((told.entries.capacity(), told.slots.capacity()), capacities);
        assert!(tree.iter().all(|(key, short)| told.last(*key) == Some(*short)));
        assert_eq!(told.slots.iter().filter(|slot| **slot != 0).count(), TOLD_MAX);
    }
}
