//! A hint: what somebody says happened to a database, without proof.
//!
//! Guarantees that two hints about one database become one that leaves nothing out of what has to be looked at.
//! Hints come from `_db_updates` and from CouchDB's `[update_notification]`; both lose some (DESIGN §8), so whoever
//! gets one looks, and whoever gets none looks too, only later.

/// What is said of a database, by its name as clients write it (`tenant/9`, never a shard's).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Hint {
    /// Documents were written, or a design document was.
    Updated(String),
    /// It was made; perhaps again under the name of one that was deleted.
    Created(String),
    /// It was deleted; perhaps made again since, for hints may be late.
    Deleted(String),
}

impl Hint {
    /// The database's name.
    pub fn db(&self) -> &str {
        match self {
            Hint::Updated(db) | Hint::Created(db) | Hint::Deleted(db) => db,
        }
    }

    /// Takes in what was said of the same database later: the newest coming or going stays, which an update does
    /// not hide.
    pub fn merge(&mut self, later: Hint) {
        if !matches!(later, Hint::Updated(_)) {
            *self = later;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_hides_neither_coming_nor_going() {
        let [updated, created, deleted] =
            [Hint::Updated, Hint::Created, Hint::Deleted].map(|of| of("a".to_owned()));
        let check = |first: &Hint, later: &Hint, expected: &Hint| {
            let mut merged = first.clone();
            merged.merge(later.clone());
            assert_eq!(merged, *expected, "{first:?} and then {later:?}");
        };
        for first in [&updated, &created, &deleted] {
            check(first, &updated, first);
            check(first, &created, &created);
            check(first, &deleted, &deleted);
        }
    }
}
