//! The hash table of the hot paths: an event passes through a dozen look-ups, and `std`'s own hasher was most of
//! their time. `foldhash` is what `hashbrown` ships: seeded at random, so that who chooses document ids cannot choose
//! what they collide with.

use std::collections::HashMap;

/// A `HashMap`; made with `Table::default()`.
pub type Table<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
