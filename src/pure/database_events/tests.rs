//! What is told of databases, and that a kill at any moment loses none of it.

use std::collections::BTreeMap;

use super::*;
use crate::pure::remembered::BUCKETS;

fn ours() -> Mark {
    mark(0)
}

fn mark(life: u8) -> Mark {
    Mark::new([life; 16])
}

fn found(life: u8, has_changed: bool) -> Found {
    let through = Seq::from_json(&format!("\"{life}-g1\"")).unwrap();
    Found { mark: mark(life), through, has_changed, ddocs: Vec::new() }
}

fn machine() -> DatabaseEvents {
    DatabaseEvents::new("dbs", ours(), vec![None; BUCKETS], 0, false)
}

/// Stores what is dirty; gives what is stored of each then.
fn store(machine: &mut DatabaseEvents, stored: &mut [Option<Bucket<Known>>]) {
    let dirty: Vec<(usize, Bucket<Known>)> =
        machine.remembered.dirty().into_iter().map(|(index, bucket)| (index, bucket.clone())).collect();
    for (index, bucket) in dirty {
        stored[index] = Some(bucket);
        machine.remembered.on_stored(index);
    }
}

fn stored_all(machine: &mut DatabaseEvents) -> Vec<Option<Bucket<Known>>> {
    let mut stored = vec![None; BUCKETS];
    store(machine, &mut stored);
    stored
}

/// `created a`, in order, of all that would be sent; none of it counts as sent.
fn waiting(machine: &DatabaseEvents) -> Vec<String> {
    let mut events: Vec<&Kept> =
        ["a", "b", "c"].iter().flat_map(|db| machine.remembered.events_of(db)).collect();
    events.sort_by_key(|kept| kept.n);
    events
        .iter()
        .map(|kept| format!("{} {}", kept.event_type.trim_start_matches("database."), kept.key))
        .collect()
}

#[test]
fn coming_changing_and_going_are_told() {
    let (mut machine, at) = (machine(), Timestamp::UNIX_EPOCH);
    let check = |machine: &mut DatabaseEvents, expected: &[&str]| {
        stored_all(machine);
        let sent = machine.events_after(machine.handed, 100);
        let texts: Vec<String> =
            sent.iter().map(|kept| format!("{} {}", kept.event_type, kept.data)).collect();
        assert_eq!(texts, expected);
    };
    assert!(machine.on_seen("a", 1));
    machine.on_found("a", found(1, true), Some(1), at);
    check(&mut machine, &[r#"database.created {"webhook":"dbs","db":"a"}"#]);
    assert!(!machine.on_seen("a", 1) && machine.on_seen("a", 2));
    machine.on_found("a", found(1, false), Some(2), at);
    check(&mut machine, &[]);
    assert!(!machine.on_seen("a", 1) && !machine.on_seen("a", 2), "one state has several spellings");
    let ddocs = vec!["_design/v".to_owned()];
    machine.on_found("a", Found { ddocs, ..found(1, true) }, Some(3), at);
    let ddoc = r#"database.ddoc_updated {"webhook":"dbs","db":"a","id":"_design/v"}"#;
    check(&mut machine, &[r#"database.updated {"webhook":"dbs","db":"a"}"#, ddoc]);
    assert!(machine.on_seen("a", 1), "what was clean before a change is not after it");
    machine.on_found("a", found(2, true), Some(4), at);
    check(&mut machine, &[r#"database.recreated {"webhook":"dbs","db":"a"}"#]);
    machine.on_gone("a", at);
    machine.on_gone("a", at);
    check(&mut machine, &[r#"database.deleted {"webhook":"dbs","db":"a"}"#]);
}

#[test]
fn what_was_there_at_the_first_start_is_known_and_what_comes_later_is_told() {
    let at = Timestamp::UNIX_EPOCH;
    let mut machine = DatabaseEvents::new("dbs", ours(), vec![None; BUCKETS], 0, true);
    assert!(machine.remembered.is_first_look());
    machine.on_there(["a", "b"].map(str::to_owned));
    assert!(!machine.remembered.is_first_look());
    // Killed before it has looked into any of them.
    let mut machine = DatabaseEvents::new("dbs", ours(), stored_all(&mut machine), 0, true);
    assert!(!machine.remembered.is_first_look(), "all of it is stored, empty documents too");
    for db in ["a", "b", "c"] {
        assert!(machine.on_seen(db, 1));
        assert_eq!(machine.known(db), None);
        machine.on_found(db, found(1, true), Some(1), at);
    }
    assert_eq!(waiting(&machine), ["created c"]);
    machine.on_found("a", found(1, true), None, at);
    machine.on_gone("b", at);
    assert_eq!(waiting(&machine), ["created c", "updated a", "deleted b"]);
}

#[test]
fn what_is_written_before_the_first_look_is_told_when_couchdb_tells_of_it() {
    let at = Timestamp::UNIX_EPOCH;
    // Each letter: a Hint, a look that Finds nothing new, one that finds a Change, a Kill; what waits in the end.
    let check = |steps: &str, expected: &[&str]| {
        let mut machine = DatabaseEvents::new("dbs", ours(), vec![None; BUCKETS], 0, true);
        machine.on_there(["a".to_owned()]);
        let mut stored = stored_all(&mut machine);
        for step in steps.chars() {
            match step {
                'h' => machine.on_hinted("a"),
                // Of what is not known every look says that it has changed.
                'f' => machine.on_found("a", found(1, machine.known("a").is_none()), None, at),
                'c' => machine.on_found("a", found(1, true), None, at),
                _ => machine = DatabaseEvents::new("dbs", ours(), stored.clone(), 0, true),
            }
            store(&mut machine, &mut stored);
        }
        assert_eq!(waiting(&machine), expected, "{steps}");
    };
    check("f", &[]);
    check("hf", &["updated a"]);
    check("hkf", &["updated a"]);
    // The hint was late.
    check("fhf", &["updated a"]);
    check("fhkf", &["updated a"]);
    // From then on a look says it all.
    check("fhfkhf", &["updated a"]);
    check("fchf", &["updated a"]);
    check("fkhf", &["updated a"]);
    let mut machine = DatabaseEvents::new("dbs", ours(), vec![None; BUCKETS], 0, false);
    machine.on_found("b", found(1, true), None, at);
    stored_all(&mut machine);
    machine.events_after(0, 100);
    machine.on_hinted("b");
    machine.on_found("b", found(1, false), None, at);
    assert_eq!(waiting(&machine), ["created b"], "what came later was looked into when it came");
}

#[test]
fn those_that_a_walk_does_not_come_across_may_be_gone() {
    let (mut machine, at) = (machine(), Timestamp::UNIX_EPOCH);
    for db in ["a", "b"] {
        machine.on_seen(db, 1);
        machine.on_found(db, found(1, true), Some(1), at);
    }
    assert_eq!(machine.on_swept(), [""; 0]);
    machine.on_seen("a", 1);
    assert_eq!(machine.on_swept(), ["b"]);
}

#[test]
fn what_waits_for_an_endpoint_is_bounded_and_what_may_be_sent_is_left_alone() {
    let at = Timestamp::UNIX_EPOCH;
    // Each letter: Created, Updated, Deleted, Recreated; what waits in the end.
    let check = |steps: &str, expected: &[&str]| {
        let mut machine = machine();
        for step in steps.chars() {
            match step {
                'c' => machine.on_found("a", found(1, true), None, at),
                'u' => machine.on_found("a", found(1, true), None, at),
                'r' => machine.on_found("a", found(2, true), None, at),
                'd' => machine.on_gone("a", at),
                // Everything so far is on its way.
                _ => {
                    stored_all(&mut machine);
                    machine.events_after(0, 100);
                }
            }
        }
        assert_eq!(waiting(&machine), expected, "{steps}");
    };
    check("cuuuu", &["created a", "updated a"]);
    check("cr", &["created a"]);
    check("cucd", &[]);
    check("cucdc", &["created a"]);
    check("c!dcd", &["created a", "deleted a"]);
    check("c!uuuu", &["created a", "updated a"]);
    check("c!u!u!u", &["created a", "updated a", "updated a", "updated a"]);
    check("c!d!c", &["created a", "deleted a", "created a"]);
    check("c!dc", &["created a", "recreated a"]);
    check("c!dcdcdc", &["created a", "recreated a"]);
    check("c!ur", &["created a", "recreated a"]);
    check("c!u!d", &["created a", "updated a", "deleted a"]);
}

/// What really is: by name the life and how often it was written.
type Truth = BTreeMap<String, (u8, u32)>;

/// Databases come, change and go; looks into them, writes, deliveries and kills come in any order. In the end whoever
/// listened knows what there is, and heard of a change after the last one; no number was used twice.
#[test]
fn a_kill_at_any_moment_loses_nothing_and_reuses_no_number() {
    for seed in 0..3_000 {
        let random = &mut fastrand::Rng::with_seed(seed);
        let (mut truth, mut told): (Truth, Truth) = Default::default();
        // What was found when each database was last looked into: in place of its feed.
        let mut looked: Truth = Truth::new();
        let mut by_number: BTreeMap<u64, String> = BTreeMap::new();
        let (mut stored, mut through, mut lives) = (vec![None; BUCKETS], 0, 0_u8);
        let mut machine = DatabaseEvents::new("dbs", ours(), stored.clone(), 0, false);
        let mut looked_stored = looked.clone();
        for step in 0..60 {
            let db = ["a", "b", "c"][random.usize(..3)];
            // The last steps settle everything.
            match if step < 50 { random.u8(..8) } else { 4 + step % 4 } {
                0 if !truth.contains_key(db) => {
                    lives = lives.wrapping_add(1).max(1);
                    truth.insert(db.to_owned(), (lives, 0));
                }
                0 | 1 => drop(truth.get_mut(db).map(|(_, n)| *n += 1)),
                2 => drop(truth.remove(db)),
                3 => {
                    machine = DatabaseEvents::new("dbs", ours(), stored.clone(), through, false);
                    looked = looked_stored.clone();
                }
                4 | 5 => {
                    for db in ["a", "b", "c"] {
                        match truth.get(db) {
                            Some((life, n)) => {
                                let known = looked.insert(db.to_owned(), (*life, *n));
                                let has_changed = known.is_none_or(|known| known != (*life, *n));
                                machine.on_found(db, found(*life, has_changed), None, Timestamp::UNIX_EPOCH);
                            }
                            None => {
                                looked.remove(db);
                                machine.on_gone(db, Timestamp::UNIX_EPOCH);
                            }
                        }
                    }
                }
                6 => {
                    store(&mut machine, &mut stored);
                    looked_stored = looked.clone();
                }
                _ => {
                    for kept in machine.events_after(through, random.usize(1..4)) {
                        let what = format!("{} {} {}", kept.event_type, kept.key, kept.at);
                        let before = by_number.insert(kept.n, what.clone());
                        assert!(before.is_none_or(|before| before == what), "seed {seed}: number {}", kept.n);
                        match kept.event_type.as_str() {
                            DELETED => drop(told.remove(&kept.key)),
                            _ => drop(truth.get(&kept.key).map(|now| told.insert(kept.key.clone(), *now))),
                        }
                        through = kept.n;
                    }
                    // The checkpoint may be lost with a kill, too; here it is stored at once.
                    machine.remembered.on_through(through);
                }
            }
        }
        for _ in 0..20 {
            store(&mut machine, &mut stored);
            for kept in machine.events_after(through, 10) {
                by_number.insert(kept.n, format!("{} {} {}", kept.event_type, kept.key, kept.at));
                match kept.event_type.as_str() {
                    DELETED => drop(told.remove(&kept.key)),
                    _ => drop(truth.get(&kept.key).map(|now| told.insert(kept.key.clone(), *now))),
                }
                through = kept.n;
            }
        }
        // Whoever hears of a database reads it then: what was told is what there was.
        assert_eq!(told, truth, "seed {seed}");
        let mut there = BTreeMap::new();
        for what in by_number.values() {
            let [event_type, db, ..] = what.split(' ').collect::<Vec<_>>()[..] else { unreachable!() };
            let was_there = there.insert(db, event_type != DELETED).unwrap_or(false);
            assert_eq!(was_there, event_type != CREATED, "seed {seed}: {by_number:?}");
        }
    }
}
