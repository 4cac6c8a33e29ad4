//! Lines that CouchDB writes to an `[update_notification]` process, as hints.
//!
//! Guarantees that no bytes, however they are split, make it fail: a line that cannot be read is told as damaged,
//! which means that anything may have changed; that at most [`LINE_BYTES_MAX`] of a line are kept; and that a
//! cluster's shards come out under the name that clients use. Whether a hint is worth anything is left to the lookout.
//!
//! ```text
//! 1.x       {"type":"created","db":"a/b"}              created, updated, deleted, compacted
//!           {"type":"ddoc_updated","db":"a","id":"_design/v"}
//! 2.0, 2.1  {"db":"shards/00000000-1fffffff/a.1795296954","type":"updated"}      and local_updated, ddoc_updated
//! ```
//!
//! Source: `couch_db_update_notifier.erl` at 1.1.0 and 1.7.1, `couch_event_os_listener.erl` at 2.1.2 (which crashes
//! where 1.x writes an `id`), `mem3:dbname/1` for shards; the lines as seen: CONTRACT §4.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;
use serde::Deserialize;

use crate::pure::hint::Hint;

/// Longest line that is read. A name has a few hundred bytes; the `id` of a design document may be long.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// CouchDB's own databases that change on their own whenever others do, and that nobody watches.
const NOISE: [&str; 4] = ["_dbs", "_nodes", "_global_changes", "_metadata"];

/// What a line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Something happened to a database.
    Hint(Hint),
    /// A line could not be read, or was too long: anything may have happened.
    Damaged,
}

/// Makes lines of bytes as they come, and hints of lines.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The line that has not ended yet.
    line: Vec<u8>,
    /// It is too long: its rest is dropped.
    is_too_long: bool,
}

impl Decoder {
    /// Takes the next bytes of the stream; `tell` gets what every line that ends in them says, in order. Lines that say
    /// nothing of use are left out.
    pub fn on_bytes(&mut self, mut bytes: &[u8], mut tell: impl FnMut(Told)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            let told = if self.is_too_long || self.line.len() + head.len() > LINE_BYTES_MAX {
                Some(Told::Damaged)
            } else if self.line.is_empty() {
                parse_line(head)
            } else {
                self.line.extend_from_slice(head);
                parse_line(&self.line)
            };
            self.line.clear();
            self.is_too_long = false;
            told.into_iter().for_each(&mut tell);
        }
        self.is_too_long |= self.line.len() + bytes.len() > LINE_BYTES_MAX;
        if self.is_too_long {
            self.line = Vec::new();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }
}

/// What one line says, without its newline; `None` for what is of no use: an event that changes no document, a
/// database of CouchDB's own, a type that is not known, a blank line.
pub fn parse_line(line: &[u8]) -> Option<Told> {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(rename = "type", borrow)]
        event: Cow<'a, str>,
        #[serde(borrow)]
        db: Cow<'a, str>,
    }
    if line.trim_ascii().is_empty() {
        return None;
    }
    let Ok(Line { event, db }) = serde_json::from_slice(line) else { return Some(Told::Damaged) };
    let hint = match &*event {
        "updated" | "ddoc_updated" => Hint::Updated,
        "created" => Hint::Created,
        "deleted" => Hint::Deleted,
        _ => return None,
    };
    let Some(name) = database(&db) else { return Some(Told::Damaged) };
    (!NOISE.contains(&&*name)).then(|| Told::Hint(hint(name.into_owned())))
}

/// The name that clients use. No version takes a `%` or, but behind a shard's name, a `.` in one.
fn database(db: &str) -> Option<Cow<'_, str>> {
    let whole = percent_decode_str(db).decode_utf8().ok()?;
    let name = match shard_suffix_at(&whole) {
        Some((start, end)) => Cow::Owned(whole[start..end].to_owned()),
        None => whole,
    };
    (!name.is_empty()).then_some(name)
}

/// Where the database's name begins and ends in `shards/00000000-1fffffff/NAME.1795296954`.
fn shard_suffix_at(name: &str) -> Option<(usize, usize)> {
    let rest = name.strip_prefix("shards/")?;
    let (range, rest) = rest.split_once('/')?;
    let (begin, end) = range.split_once('-')?;
    let is_hex = |text: &str| text.len() == 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    // 1.x takes a database `shards/00000000-1fffffff/a`: only the time behind it makes it a shard.
    let (bare, time) = rest.rsplit_once('.')?;
    let is_time = !time.is_empty() && time.bytes().all(|byte| byte.is_ascii_digit());
    let start = name.len() - rest.len();
    (is_hex(begin) && is_hex(end) && is_time).then_some((start, start + bare.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn updated(db: &str) -> Option<Told> {
        Some(Told::Hint(Hint::Updated(db.to_owned())))
    }

    #[track_caller]
    fn check(line: &str, expected: Option<Told>) {
        assert_eq!(parse_line(line.as_bytes()), expected, "{line}");
    }

    #[test]
    fn lines_of_1_x_name_databases_as_they_are() {
        check(r#"{"type":"updated","db":"foo"}"#, updated("foo"));
        check(r#"{"type":"created","db":"udb"}"#, Some(Told::Hint(Hint::Created("udb".to_owned()))));
        check(r#"{"type":"deleted","db":"udb"}"#, Some(Told::Hint(Hint::Deleted("udb".to_owned()))));
        check(r#"{"type":"ddoc_updated","db":"udb","id":"_design/v"}"#, updated("udb"));
        check(r#"{"type":"updated","db":"a/b+c$(d)-e_f"}"#, updated("a/b+c$(d)-e_f"));
        check(r#"{"type":"updated","db":"a\/b"}"#, updated("a/b"));
        check(
            r#"{"type":"updated","db":"shards/00000000-1fffffff/a"}"#,
            updated("shards/00000000-1fffffff/a"),
        );
        check(r#"{"type":"updated","db":"_users"}"#, updated("_users"));
        check(r#"{"type":"compacted","db":"udb"}"#, None);
    }

    #[test]
    fn shards_are_turned_back_into_their_database() {
        let shard = |db: &str| format!(r#"{{"db":"{db}","type":"updated"}}"#);
        check(&shard("shards/00000000-1fffffff/foo.1500000000"), updated("foo"));
        check(&shard("shards/e0000000-ffffffff/a/b.1500000000"), updated("a/b"));
        check(&shard("shards%2F00000000-1fffffff%2Fa%2Fb%2bc.1500000000"), updated("a/b+c"));
        check(&shard("shards/00000000-ffffffff/_users.1500000000"), updated("_users"));
        // `mem3:dbname/1` drops what stands behind the last dot, and names may have a time of their own before it.
        check(&shard("shards/00000000-ffffffff/a.20261122093000.1500000000"), updated("a.20261122093000"));
        for not_one in ["shards/foo.1500000000", "shards/00000000-1fffffff/foo.x", "shards/0-1/foo.15"] {
            check(&shard(not_one), updated(not_one));
        }
    }

    #[test]
    fn what_changes_no_document_of_anybodys_is_left_out() {
        check(r#"{"db":"_dbs","type":"updated"}"#, None);
        check(r#"{"db":"_nodes","type":"updated"}"#, None);
        check(r#"{"db":"shards/00000000-1fffffff/_global_changes.1500000000","type":"updated"}"#, None);
        check(r#"{"db":"shards/00000000-1fffffff/foo.1500000000","type":"local_updated"}"#, None);
        check(r#"{"type":"frobnicated","db":"foo","why":[1,2]}"#, None);
        check("", None);
        check(" \t\r", None);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_told() {
        for line in [
            "{",
            "nonsense",
            "null",
            "[]",
            r#"{"type":"updated"}"#,
            r#"{"db":"foo"}"#,
            r#"{"type":"updated","db":7}"#,
            r#"{"type":"updated","db":""}"#,
            r#"{"type":"updated","db":"shards/00000000-1fffffff/.15"}"#,
            r#"{"type":"updated","db":"%ff"}"#,
            r#"{"type":"updated","db":"a","db":"b"}"#,
            r#"{"type":"updated","db":"a"}{"type":"updated","db":"b"}"#,
        ] {
            check(line, Some(Told::Damaged));
        }
        assert_eq!(parse_line(b"{\"type\":\"updated\",\"db\":\"\xff\"}"), Some(Told::Damaged));
        assert_eq!(parse_line(&[b'['; 60_000]), Some(Told::Damaged), "deep nesting overruns no stack");
    }

    /// What a stream says when it comes in pieces that end at `cuts`.
    fn decode(stream: &[u8], cuts: impl IntoIterator<Item = usize>) -> Vec<Told> {
        let (mut decoder, mut told, mut begun) = (Decoder::default(), Vec::new(), 0);
        for cut in cuts.into_iter().chain([stream.len()]) {
            decoder.on_bytes(&stream[begun..cut], |one| told.push(one));
            begun = cut;
        }
        told
    }

    #[test]
    fn any_split_of_the_bytes_says_the_same() {
        let stream = "{\"type\":\"updated\",\"db\":\"a\"}\r\n\n{\"type\":\"created\",\"db\":\"\\u00e4ö\"}\nx\n\
            {\"type\":\"compacted\",\"db\":\"a\"}\n{\"type\":\"deleted\",\"db\":\"b\"}\n{\"type\":\"upd";
        let expected = [
            Told::Hint(Hint::Updated("a".to_owned())),
            Told::Hint(Hint::Created("äö".to_owned())),
            Told::Damaged,
            Told::Hint(Hint::Deleted("b".to_owned())),
        ];
        let stream = stream.as_bytes();
        assert_eq!(decode(stream, []), expected);
        assert_eq!(decode(stream, 1..stream.len()), expected, "byte by byte");
        for first in 0..stream.len() {
            for second in first..stream.len() {
                assert_eq!(decode(stream, [first, second]), expected, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn a_line_without_end_is_dropped_and_said_once_and_the_next_one_is_read() {
        let good = b"{\"type\":\"updated\",\"db\":\"a\"}\n";
        let line = |length: usize| [&vec![b' '; length - good.len() + 1][..], good].concat();
        let longest = line(LINE_BYTES_MAX);
        for step in [1_000, 4_096, LINE_BYTES_MAX, 3 * LINE_BYTES_MAX] {
            let cuts = |stream: &[u8]| (step..stream.len()).step_by(step).collect::<Vec<_>>();
            assert_eq!(decode(&longest, cuts(&longest)), [updated("a").unwrap()], "pieces of {step}");
            let stream = [line(LINE_BYTES_MAX + 1), line(9 * LINE_BYTES_MAX), good.to_vec()].concat();
            let expected = [Told::Damaged, Told::Damaged, updated("a").unwrap()];
            assert_eq!(decode(&stream, cuts(&stream)), expected, "pieces of {step}");
        }
        let mut decoder = Decoder::default();
        for _ in 0..1_000 {
            decoder.on_bytes(&[b'x'; 4_096], |told| panic!("{told:?}"));
            assert!(decoder.line.capacity() <= 2 * LINE_BYTES_MAX, "{}", decoder.line.capacity());
        }
    }

    #[test]
    fn noise_never_fails() {
        let mut random = fastrand::Rng::with_seed(5);
        for _ in 0..2_000 {
            let alphabet = b"{}\":,\\u%./-dbtype\x00\xff\n shards0123456789";
            let stream: Vec<u8> =
                (0..random.usize(..400)).map(|_| alphabet[random.usize(..alphabet.len())]).collect();
            let cut = random.usize(..=stream.len());
            assert_eq!(decode(&stream, [cut]), decode(&stream, []), "{stream:?}");
        }
    }
}
