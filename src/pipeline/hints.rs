//! What was hinted at and not yet looked into: shared by whoever hears of databases and the one who looks.
//!
//! Guarantees that noting never waits for the one who looks, however long that takes; that memory is bounded; and
//! that nothing is dropped in silence: what finds no room leaves a flag that says "look at everything". What is done
//! about a hint is left to the lookout.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::pure::hint::Hint;

/// Databases that wait to be looked at. Ten thousand users that all write while CouchDB cannot be asked have room.
pub const DATABASES_MAX: usize = 10_000;
/// Bytes of a name that is kept. CouchDB allows 238 from 2.0 on, a file system's path before; 10 MiB in all at worst.
pub const NAME_BYTES_MAX: usize = 1_024;

/// The set. One hint a database, in the order of the first.
#[derive(Debug)]
pub struct Hints {
    waiting: Mutex<Waiting>,
    wake: Sender<()>,
    woken: Receiver<()>,
}

/// What [`Hints::take`] gives: at most [`DATABASES_MAX`] hints.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// One a database, in the order in which it was first hinted at since the last take.
    pub hints: Vec<Hint>,
    /// Something was not kept, or could not be read: any database may have come, gone or changed.
    pub overflowed: bool,
}

#[derive(Debug, Default)]
struct Waiting {
    taken: Taken,
    /// Where in `taken.hints` a database is.
    places: HashMap<String, usize>,
}

impl Default for Hints {
    fn default() -> Hints {
        Hints::new()
    }
}

impl Hints {
    /// Empty.
    pub fn new() -> Hints {
        let (wake, woken) = bounded(1);
        Hints { waiting: Mutex::default(), wake, woken }
    }

    /// Keeps a hint and wakes whoever waits. Never blocks for longer than another note or take lasts.
    pub fn note(&self, hint: Hint) {
        let mut waiting = self.lock();
        let Waiting { taken, places } = &mut *waiting;
        if hint.db().len() > NAME_BYTES_MAX {
            taken.overflowed = true;
        } else {
            let is_full = taken.hints.len() >= DATABASES_MAX;
            match places.entry(hint.db().to_owned()) {
                Entry::Occupied(place) => taken.hints[*place.get()].merge(hint),
                Entry::Vacant(_) if is_full => taken.overflowed = true,
                Entry::Vacant(place) => {
                    place.insert(taken.hints.len());
                    taken.hints.push(hint);
                }
            }
        }
        drop(waiting);
        self.wake();
    }

    /// Says that anything may have changed: hints were lost before they got here.
    pub fn note_lost(&self) {
        self.lock().taken.overflowed = true;
        self.wake();
    }

    /// Takes everything noted since the last time.
    pub fn take(&self) -> Taken {
        std::mem::take(&mut *self.lock()).taken
    }

    /// Gives one message when there may be something to take: after each, take until the next. One receiver at a
    /// time. A message may come without anything to take.
    pub fn woken(&self) -> Receiver<()> {
        self.woken.clone()
    }

    fn wake(&self) {
        // Full: whoever waits is told already.
        let _ = self.wake.try_send(());
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::sys;

    fn updated(db: &str) -> Hint {
        Hint::Updated(db.to_owned())
    }

    #[test]
    fn a_database_waits_once_at_the_place_of_its_first_hint() {
        let hints = Hints::new();
        for hint in [updated("b"), updated("a"), Hint::Deleted("b".to_owned()), updated("a"), updated("b")] {
            hints.note(hint);
        }
        let expected = vec![Hint::Deleted("b".to_owned()), updated("a")];
        assert_eq!(hints.take(), Taken { hints: expected, overflowed: false });
        assert_eq!(hints.take(), Taken::default());
        hints.note(updated("a"));
        assert_eq!(hints.take().hints, [updated("a")], "taken is forgotten");
    }

    #[test]
    fn what_finds_no_room_is_said_and_what_waits_already_is_still_merged() {
        let hints = Hints::new();
        for i in 0..DATABASES_MAX {
            hints.note(updated(&i.to_string()));
        }
        hints.note(Hint::Created("0".to_owned()));
        assert!(!hints.lock().taken.overflowed, "exactly full is not too full");
        hints.note(updated("one more"));
        let taken = hints.take();
        assert!(taken.overflowed);
        assert_eq!(taken.hints.len(), DATABASES_MAX);
        assert_eq!(taken.hints[0], Hint::Created("0".to_owned()));
        assert!(!hints.take().overflowed, "said once");

        hints.note(updated(&"x".repeat(NAME_BYTES_MAX + 1)));
        assert_eq!(hints.take(), Taken { hints: Vec::new(), overflowed: true });
        hints.note_lost();
        assert_eq!(hints.take(), Taken { hints: Vec::new(), overflowed: true });
    }

    #[test]
    fn whoever_waits_is_woken_for_everything_that_is_noted() {
        const N: usize = 5_000;
        let hints = Arc::new(Hints::new());
        let (woken, noting) = (hints.woken(), Arc::clone(&hints));
        let thread = sys::spawn("notes", move || (0..N).for_each(|i| noting.note(updated(&i.to_string()))));
        let mut n_taken = 0;
        while n_taken < N {
            woken.recv_timeout(Duration::from_secs(10)).expect("what waits was said to wait");
            n_taken += hints.take().hints.len();
        }
        thread.unwrap().join().unwrap();
    }
}
