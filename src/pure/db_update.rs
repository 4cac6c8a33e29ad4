//! One line of `_db_updates` (`feed=continuous`), from any split of the bytes.
//!
//! Guarantees that no line, however damaged, is more than a line that says nothing to rely on, and that memory stays
//! bounded. Shapes as seen on 1.7.1, 2.3.1 and 3.5.0. What follows from a hint is left to the lookout.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::pure::hint::Hint;
use crate::pure::seq::Seq;

/// The longest line that is read, in bytes: a name has 238, a `seq` grows with shards and nodes.
const LINE_BYTES_MAX: usize = 256 * 1024;

/// What a line says.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    /// Something happened to a database.
    ///
    /// `{"db_name":"tenant-9","type":"updated","seq":"4-g1AAA…"}`; on 1.x `{"type":"updated","db_name":"tenant-9"}`
    Hint {
        /// To which, and what.
        hint: Hint,
        /// Where to go on behind it; `None` on 1.x.
        seq: Option<Seq>,
    },
    /// The end of the answer: `{"last_seq":"4-g1AAA…"}`.
    End {
        /// Where to go on.
        seq: Option<Seq>,
    },
    /// CouchDB broke off: `{"error":"…","reason":"…"}`.
    Fault {
        /// Both.
        text: String,
    },
    /// Of a kind that says nothing about documents, such as `compacted`.
    Other {
        /// Where to go on behind it.
        seq: Option<Seq>,
    },
    /// Nothing that can be read: anything may have changed.
    Damaged,
}

/// Cuts an answer into lines. After an error of the connection start a new one.
#[derive(Debug, Default)]
pub struct Lines {
    /// The beginning of a line whose end has not come.
    begun: Vec<u8>,
    /// Its beginning was too long and is dropped.
    is_too_long: bool,
}

impl Lines {
    /// Takes bytes in any pieces; gives each line that they end. Empty lines are signs of life and no lines.
    pub fn push(&mut self, bytes: &[u8], mut on_line: impl FnMut(Line)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.begun.len() + piece.len() > LINE_BYTES_MAX {
                self.is_too_long = true;
                self.begun.clear();
            } else {
                self.begun.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                let is_too_long = std::mem::take(&mut self.is_too_long);
                match self.begun.trim_ascii() {
                    _ if is_too_long => on_line(Line::Damaged),
                    [] => {}
                    line => on_line(parse(line)),
                }
                self.begun.clear();
            }
        }
    }
}

fn parse(line: &[u8]) -> Line {
    #[derive(Deserialize)]
    struct Raw {
        db_name: Option<String>,
        #[serde(rename = "type")]
        kind: Option<String>,
        seq: Option<Box<RawValue>>,
        last_seq: Option<Box<RawValue>>,
        error: Option<serde_json::Value>,
        #[serde(default)]
        reason: serde_json::Value,
    }
    let Ok(raw) = serde_json::from_slice::<Raw>(line) else { return Line::Damaged };
    let seq_of = |raw: Option<Box<RawValue>>| raw.and_then(|raw| Seq::from_json(raw.get()));
    match (raw.db_name, raw.kind, raw.error) {
        (_, _, Some(error)) => {
            let text =
                |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            Line::Fault { text: format!("{}: {}", text(&error), text(&raw.reason)) }
        }
        (Some(db), Some(kind), None) => {
            let seq = seq_of(raw.seq);
            match kind.as_str() {
                "created" => Line::Hint { hint: Hint::Created(db), seq },
                "updated" => Line::Hint { hint: Hint::Updated(db), seq },
                "deleted" => Line::Hint { hint: Hint::Deleted(db), seq },
                "ddoc_updated" => Line::Hint { hint: Hint::Updated(db_of_term(&db).to_owned()), seq },
                _ => Line::Other { seq },
            }
        }
        (None, None, None) if raw.last_seq.is_some() => Line::End { seq: seq_of(raw.last_seq) },
        _ => Line::Damaged,
    }
}

/// 1.x spells database and design document of a `ddoc_updated` as an Erlang term: `{<<"orders">>,<<"_design/v">>}`.
fn db_of_term(db_name: &str) -> &str {
    let inside = db_name.strip_prefix("{<<\"").and_then(|rest| rest.split_once("\">>"));
    inside.map_or(db_name, |(db, _)| db)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<Line> {
        let (mut lines, mut all) = (Lines::default(), Vec::new());
        pieces.iter().for_each(|piece| lines.push(piece, |line| all.push(line)));
        all
    }

    fn hint(of: fn(String) -> Hint, db: &str, seq: &str) -> Line {
        Line::Hint { hint: of(db.to_owned()), seq: Seq::from_json(seq) }
    }

    /// As recorded from 1.7.1, 2.3.1 and 3.5.0, the seqs shortened.
    const RECORDED: &str = "{\"type\":\"created\",\"db_name\":\"u1\"}\n\n\
        {\"type\":\"updated\",\"db_name\":\"u1/x+c\"}\n\
        {\"type\":\"ddoc_updated\",\"db_name\":\"{<<\\\"u1\\\">>,<<\\\"_design/v\\\">>}\"}\n\
        {\"type\":\"compacted\",\"db_name\":\"u1\"}\n\
        {\"db_name\":\"u1\",\"type\":\"deleted\",\"seq\":\"7-g1AAA\"}\n\
        {\"last_seq\":\"8-g1AAA\"}\n\
        {\"error\":\"timeout\",\"reason\":null}\n";

    fn expected() -> Vec<Line> {
        vec![
            hint(Hint::Created, "u1", "null"),
            hint(Hint::Updated, "u1/x+c", "null"),
            hint(Hint::Updated, "u1", "null"),
            Line::Other { seq: None },
            hint(Hint::Deleted, "u1", "\"7-g1AAA\""),
            Line::End { seq: Seq::from_json("\"8-g1AAA\"") },
            Line::Fault { text: "timeout: null".to_owned() },
        ]
    }

    #[test]
    fn recorded_lines_are_read_however_they_are_cut() {
        let bytes = RECORDED.as_bytes();
        assert_eq!(lines(&[bytes]), expected());
        assert_eq!(lines(&bytes.chunks(1).collect::<Vec<_>>()), expected());
        for cut in 0..bytes.len() {
            assert_eq!(lines(&[&bytes[..cut], &bytes[cut..]]), expected(), "cut at {cut}");
        }
    }

    #[test]
    fn what_cannot_be_read_says_so_and_costs_its_line_alone() {
        let fine = b"{\"type\":\"updated\",\"db_name\":\"a\"}\n";
        let mut long = vec![b'x'; LINE_BYTES_MAX + 10];
        long.push(b'\n');
        for damaged in [&b"\xff\xfe\n"[..], b"{\"db_name\":\"a\"}\n", b"[]\n", b"5\n", b"{}\n", b"{\n", &long]
        {
            let all = lines(&[damaged, fine]);
            assert_eq!(all, [Line::Damaged, hint(Hint::Updated, "a", "null")]);
        }
        assert_eq!(
            lines(&[b"{\"type\":\"updated\",\"db_name\":\"a\"}"]),
            [],
            "a line without its end is none"
        );
    }
}
