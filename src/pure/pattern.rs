//! Which databases a webhook finds by pattern: `tenant-*, !tenant-test`.
//!
//! `*` stands for any run of characters, `/` among them, `?` for one character; every other character for itself.
//! Guarantees that no pattern, however wide, takes a database of CouchDB's own, nor ours: those hold passwords, or what
//! we write ourselves. Ours rather than a crate's, because names hold no more than `a-z0-9_$()+/-`: there is nothing to
//! escape and nothing to compile, and no pattern takes long.

use std::fmt;

/// Databases of CouchDB's own, also those below a prefix.
pub fn is_system_database(name: &str) -> bool {
    ["_users", "_replicator", "_global_changes", "_dbs", "_nodes"]
        .contains(&name.rsplit('/').next().unwrap_or(name))
}

/// What a webhook's `db` says beside databases that it names singly. Has at least one pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    wanted: Vec<String>,
    unwanted: Vec<String>,
    /// Those have a feed of their own, whatever the patterns say.
    named: Vec<String>,
}

impl Pattern {
    /// Of patterns, and of patterns or names that are left out, without their `!`; `named` are databases that the same
    /// webhook names singly.
    pub fn new(wanted: Vec<String>, unwanted: Vec<String>, named: Vec<String>) -> Pattern {
        assert!(!wanted.is_empty(), "without a pattern there is nothing to find");
        Pattern { wanted, unwanted, named }
    }

    /// What was shown of a pattern; those that were named singly are not in it. `None` when it is nothing of the kind.
    pub fn parse(text: &str) -> Option<Pattern> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let (unwanted, wanted): (Vec<&str>, Vec<&str>) = parts.partition(|part| part.starts_with('!'));
        let unwanted = unwanted.iter().map(|part| part.trim_start_matches('!').trim().to_owned());
        let wanted: Vec<String> = wanted.into_iter().map(str::to_owned).collect();
        (!wanted.is_empty()).then(|| Pattern::new(wanted, unwanted.collect(), Vec::new()))
    }

    /// Whether the database is found by pattern. Never one that is named singly, so that what a webhook finds and
    /// what it names have nothing in common; never `state_db`; never one whose name begins with `_`; never one of
    /// CouchDB's own below a prefix, such as `tenant/_replicator`.
    pub fn matches(&self, db: &str, state_db: &str) -> bool {
        let fits_any = |patterns: &[String]| patterns.iter().any(|pattern| fits(pattern, db));
        !db.starts_with('_')
            && !is_system_database(db)
            && db != state_db
            && fits_any(&self.wanted)
            && !fits_any(&self.unwanted)
            && !self.named.iter().any(|named| named == db)
    }

    /// Whether `state_db` would be found if it were another database: worth a word to people.
    pub fn would_match(&self, state_db: &str) -> bool {
        self.matches(state_db, "")
    }
}

impl fmt::Display for Pattern {
    /// As one writes it: `tenant-*, !tenant-test`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.wanted.join(", "))?;
        self.unwanted.iter().try_for_each(|unwanted| write!(f, ", !{unwanted}"))
    }
}

/// Databases by name, and what finds others: for whoever makes no difference between the two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Those named singly.
    pub named: Vec<String>,
    /// What finds others.
    pub pattern: Option<Pattern>,
}

impl Selection {
    /// Whether the database is one of them.
    pub fn has(&self, db: &str, state_db: &str) -> bool {
        self.named.iter().any(|named| named == db)
            || self.pattern.as_ref().is_some_and(|pattern| pattern.matches(db, state_db))
    }
}

impl fmt::Display for Selection {
    /// As one writes it: `orders, tenant-*, !tenant-test`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pattern = self.pattern.as_ref().map(Pattern::to_string);
        f.write_str(&self.named.iter().cloned().chain(pattern).collect::<Vec<_>>().join(", "))
    }
}

/// Whether a text is a pattern rather than a name.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?'])
}

/// Whether all of `name` fits. Takes at most as many steps as one is long times the other.
pub fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut at, mut n) = (0, 0);
    // Behind the last `*`, and how much of the name it has been given: one more when what follows does not fit. What
    // an earlier `*` was given never needs to grow, for the last one can make up for it.
    let mut last = None;
    while n < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                at += 1;
                last = Some((at, n));
            }
            Some(byte) if *byte == b'?' || *byte == name[n] => {
                at += 1;
                n += 1;
            }
            _ => {
                let Some((behind, given)) = last else { return false };
                (at, n) = (behind, given + 1);
                last = Some((behind, n));
            }
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_and_question_marks_stand_for_text() {
        let check = |pattern: &str, name: &str, expected: bool| {
            assert_eq!(fits(pattern, name), expected, "`{pattern}` and `{name}`");
        };
        check("*", "", true);
        check("*", "a/b+c$(d)", true);
        check("tenant-*", "tenant-", true);
        check("tenant-*", "tenant-9/x", true);
        check("tenant-*", "xtenant-9", false);
        check("tenant-?", "tenant-9", true);
        check("tenant-?", "tenant-", false);
        check("tenant-?", "tenant-10", false);
        check("*-archive", "a-archive-archive", true);
        check("*-archive", "a-archive-b", false);
        check("a*b*c", "a-b-b-c", true);
        check("a*b*c", "a-c-b", false);
        check("a+$(b)", "a+$(b)", true);
        check("a", "ab", false);
    }

    #[test]
    fn what_is_written_of_a_pattern_finds_the_same() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        for (wanted, unwanted) in [(&["*"][..], &[][..]), (&["a-*", "b?"], &["a-x", "*-y"])] {
            let pattern = Pattern::new(texts(wanted), texts(unwanted), Vec::new());
            assert_eq!(Pattern::parse(&pattern.to_string()), Some(pattern));
        }
        assert_eq!(Pattern::parse("!a-x"), None);
    }

    #[test]
    fn every_short_pattern_fits_as_a_naive_reading_of_it() {
        fn naive(pattern: &[u8], name: &[u8]) -> bool {
            match pattern.split_first() {
                None => name.is_empty(),
                Some((b'*', rest)) => (0..=name.len()).any(|from| naive(rest, &name[from..])),
                Some((byte, rest)) => {
                    name.first().is_some_and(|first| *byte == b'?' || byte == first)
                        && naive(rest, &name[1..])
                }
            }
        }
        let texts = |letters: &[u8], max: u32| -> Vec<String> {
            let n = letters.len();
            (0..=max)
                .flat_map(|len| (0..n.pow(len)).map(move |number| (len, number)))
                .map(|(len, number)| (0..len).map(|at| char::from(letters[number / n.pow(at) % n])).collect())
                .collect()
        };
        for pattern in texts(b"ab*?", 5) {
            for name in texts(b"ab", 5) {
                let expected = naive(pattern.as_bytes(), name.as_bytes());
                assert_eq!(fits(&pattern, &name), expected, "`{pattern}` and `{name}`");
            }
        }
    }

    #[test]
    fn a_pattern_that_would_take_long_does_not() {
        let pattern = "a*".repeat(119);
        assert!(!fits(&(pattern.clone() + "b"), &"a".repeat(238)));
        assert!(fits(&pattern, &"a".repeat(238)));
    }

    #[test]
    fn systems_databases_ours_and_named_ones_are_never_found() {
        let own = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let all = Pattern::new(own(&["*"]), own(&["test-*", "old"]), own(&["orders"]));
        let check = |db: &str, expected: bool| assert_eq!(all.matches(db, "couch_hookd"), expected, "{db}");
        for db in ["a", "tenant/9", "a_users", "a/_other", "couch_hookd2", "older"] {
            check(db, true);
        }
        for db in ["_users", "_replicator", "_global_changes", "_anything", "_dbs", "a/_replicator"] {
            check(db, false);
        }
        for db in ["a/b/_users", "couch_hookd", "test-1", "old", "orders"] {
            check(db, false);
        }
        assert_eq!(all.to_string(), "*, !test-*, !old");
        assert!(all.would_match("couch_hookd"));
        assert!(!Pattern::new(own(&["tenant-*"]), Vec::new(), Vec::new()).would_match("couch_hookd"));
    }
}
