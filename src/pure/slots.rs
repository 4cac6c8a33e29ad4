//! Finds the entries of a list by what they are about: the hash table beside it.
//!
//! Guarantees that it takes memory as entries get more, and none as they come and go: a table of `std` marks the places
//! where something was, and doubles when it is worn. The list, and what its entries are about, are the caller's.

use std::hash::{BuildHasher, Hash};
use std::num::NonZeroU32;

/// Slots of the smallest table that holds anything; a power of 2, as all sizes.
const SLOTS_MIN: usize = 16;

/// Places in a list, each at the slot of its hash or behind it, with no empty slot between. At most three of four slots
/// are taken.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    slots: Vec<Option<Slot>>,
    n_taken: usize,
    /// Seeded at random: who chooses document ids cannot choose their slots.
    hasher: foldhash::fast::RandomState,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    hash: u32,
    /// Its place, counted from 1.
    nth: NonZeroU32,
}

impl Slot {
    fn place(self) -> usize {
        self.nth.get() as usize - 1
    }
}

impl Slots {
    /// What the other functions want to know of an entry.
    pub(crate) fn hash(&self, key: impl Hash) -> u32 {
        u32::try_from(self.hasher.hash_one(key) >> 32).expect("32 bits are left")
    }

    /// The place of the entry with this hash that `is_it`.
    pub(crate) fn find(&self, hash: u32, is_it: impl Fn(usize) -> bool) -> Option<usize> {
        let mut at = self.home(hash)?;
        while let Some(slot) = self.slots[at] {
            if slot.hash == hash && is_it(slot.place()) {
                return Some(slot.place());
            }
            at = self.next(at);
        }
        None
    }

    /// Takes in an entry that is not there yet.
    pub(crate) fn insert(&mut self, hash: u32, place: usize) {
        if 4 * (self.n_taken + 1) > 3 * self.slots.len() {
            let larger = vec![None; SLOTS_MIN.max(2 * self.slots.len())];
            let slots = std::mem::replace(&mut self.slots, larger);
            slots.into_iter().flatten().for_each(|slot| self.put(slot));
        }
        let nth = u32::try_from(place + 1).ok().and_then(NonZeroU32::new);
        self.put(Slot { hash, nth: nth.expect("lists are shorter") });
        self.n_taken += 1;
    }

    fn put(&mut self, slot: Slot) {
        let mut at = self.home(slot.hash).expect("there are slots");
        while self.slots[at].is_some() {
            at = self.next(at);
        }
        self.slots[at] = Some(slot);
    }

    /// Takes an entry out and closes the gap: what had to stand behind it moves up.
    pub(crate) fn remove(&mut self, hash: u32, place: usize) {
        let mut gap = self.home(hash).expect("there are slots");
        while self.slots[gap].expect("the entry is there").place() != place {
            gap = self.next(gap);
        }
        let mut at = self.next(gap);
        while let Some(slot) = self.slots[at] {
            let home = self.home(slot.hash).expect("there are slots");
            // Nothing may stand before its home, wherever the table's end lies.
            if self.distance(home, at) >= self.distance(gap, at) {
                self.slots[gap] = Some(slot);
                gap = at;
            }
            at = self.next(at);
        }
        self.slots[gap] = None;
        self.n_taken -= 1;
    }

    /// The slot of a hash; `None` while there are no slots.
    fn home(&self, hash: u32) -> Option<usize> {
        let mask = self.slots.len().checked_sub(1)?;
        Some(hash as usize & mask)
    }

    fn next(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.slots.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn agrees_with_a_map_and_grows_no_more_however_many_come_and_go() {
        // As many as 512 slots take.
        const N_MAX: usize = 384;
        let (mut slots, mut list, mut map) = (Slots::default(), Vec::new(), HashMap::new());
        let mut random = fastrand::Rng::with_seed(7);
        let mut n_full = 0;
        for n in 0..100_000 {
            let key = random.u64(0..1_000);
            let hash = slots.hash(key);
            let found = slots.find(hash, |place| list[place] == key);
            assert_eq!(found, map.get(&key).copied(), "{n}: {key}");
            match found {
                Some(place) => {
                    slots.remove(hash, place);
                    map.remove(&key);
                }
                None if map.len() < N_MAX => {
                    slots.insert(hash, list.len());
                    map.insert(key, list.len());
                    list.push(key);
                }
                None => n_full += 1,
            }
        }
        assert_eq!((slots.slots.len(), slots.n_taken), (512, map.len()));
        assert!(n_full > 1_000, "{n_full}");
    }
}
