//! `_changes` as CouchDB writes it: pages and lines, parsed from any split of the bytes.
//!
//! Guarantees that no row is skipped silently (a bad one is an error), that a `doc` comes out byte for byte, and
//! that memory stays bounded whatever the server sends: a long `doc` is dropped while it is read. Does not depend
//! on line breaks within pages nor on the order of members. What a row means is left to `flow`.

use std::borrow::Cow;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::error::{Error, Kind, Result};
use crate::pure::document::Document;
use crate::pure::excerpt::excerpt;
use crate::pure::scan::{ENVELOPE_BYTES_MAX, Event, Kept, Object, Text, TooLong};
use crate::pure::seq::Seq;

/// One row of a feed.
///
/// `{"seq":"42-g1…","id":"order:17","changes":[{"rev":"3-9f…"}],"deleted":true,"doc":{…}}`
#[derive(Debug, Clone)]
pub struct Row {
    /// `None` when CouchDB wrote `null` (`seq_interval`).
    pub seq: Option<Seq>,
    /// The document's id, any bytes that JSON can hold.
    pub id: String,
    /// `changes[].rev` in the order given: the winner first; more with `style=all_docs`.
    pub revs: Vec<String>,
    /// Whether the winner is a deletion.
    pub deleted: bool,
    /// What came as `doc`.
    pub doc: RowDoc,
    /// The row's text, where the parser was told to keep it.
    pub line: Option<Box<Line>>,
}

/// A row as CouchDB wrote it, its `doc` taken out.
#[derive(Debug, Clone)]
pub struct Line {
    /// With `null` in the place of `doc`.
    text: Box<str>,
    /// Where that `null` stands.
    doc_at: Option<usize>,
}

impl Line {
    /// The text up to the value of `doc`, and what follows it; all of it and `None` in a row without `doc`.
    pub fn around_doc(&self) -> (&str, Option<&str>) {
        match self.doc_at {
            Some(at) => (&self.text[..at], Some(&self.text[at + "null".len()..])),
            None => (&self.text, None),
        }
    }

    /// Its length without `doc`.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }
}

/// The `doc` of a row.
#[derive(Debug, Clone)]
pub enum RowDoc {
    /// No such member: the request did not ask for it.
    Absent,
    /// `"doc":null`: gone in between.
    Null,
    /// Longer than the parser was told to keep; its length in bytes.
    TooLarge {
        /// Length of the JSON text.
        bytes: u64,
    },
    /// The JSON text, byte for byte as CouchDB sent it.
    Json(Document),
}

/// What a feed gives.
#[derive(Debug, Clone)]
pub enum Item {
    /// A change.
    Row(Row),
    /// The end of a page, or the last line of a continuous feed.
    End {
        /// Absent or `null`: no position to store.
        last_seq: Option<Seq>,
        /// How many changes follow, where CouchDB says so (2.x and later).
        pending: Option<u64>,
    },
    /// A line or body with `error`, which may come inside a 200 (1.7.1).
    Fault {
        /// CouchDB's `error`.
        error: String,
        /// CouchDB's `reason`.
        reason: String,
    },
}

/// How an answer is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// `{"results":[ROW,ROW],"last_seq":…,"pending":…}`: `feed=normal`, `feed=longpoll`.
    Page,
    /// `ROW`, `ROW`, `{"last_seq":…}`, each on a line, with empty lines between: `feed=continuous`.
    Lines,
}

/// Takes an answer's bytes in any pieces and gives its items. One parser per answer; after an error it is of no
/// more use.
#[derive(Debug)]
pub struct Parser {
    shape: Shape,
    place: Place,
    /// The page's own object; its `results` are taken out.
    head: Object,
    /// The row being read; its `doc` is taken out.
    row: Object,
    doc: Text,
    row_doc: RowDoc,
    /// Where in `row` it was taken out.
    doc_at: Option<usize>,
    keeps_lines: bool,
}

/// Where the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before or between the objects of a line feed, or before a page's.
    Outside,
    /// In a page's own object.
    Head,
    /// After `"results":`, before the bracket.
    ResultsStart,
    /// Between rows of a page.
    Results,
    /// In a row or line.
    Row,
    /// In a row's `doc`.
    Doc,
    /// After a page.
    End,
}

impl Parser {
    /// `doc_bytes_max`: longer documents become [`RowDoc::TooLarge`].
    pub fn new(shape: Shape, doc_bytes_max: usize) -> Parser {
        Parser {
            shape,
            place: Place::Outside,
            head: Object::new(b"results"),
            row: Object::new(b"doc"),
            doc: Text::new(doc_bytes_max),
            row_doc: RowDoc::Absent,
            doc_at: None,
            keeps_lines: false,
        }
    }

    /// Keeps the text of every row beside what it means: [`Row::line`].
    #[must_use]
    pub fn keeping_lines(self, keeps_lines: bool) -> Parser {
        Parser { keeps_lines, ..self }
    }

    /// Takes the next bytes and appends what they complete to `out`. Items before a fault are in `out` all the same.
    ///
    /// # Errors
    /// `Malformed`: not JSON, not a changes feed, invalid UTF-8 in a row, a row without `id` or `changes`, a row
    /// without `doc` of over 1 MiB. Says the row's id where it is known.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<Item>) -> Result<()> {
        while !bytes.is_empty() {
            let n_taken = match self.place {
                Place::Outside | Place::ResultsStart | Place::Results | Place::End => self.between(bytes)?,
                Place::Head => {
                    let (n_taken, event) = self.head.push(bytes).map_err(|TooLong| too_long(&self.head))?;
                    match event {
                        Event::More => {}
                        Event::Special => self.place = Place::ResultsStart,
                        Event::Closed => {
                            self.place = Place::End;
                            out.push(self.head_item()?);
                        }
                    }
                    n_taken
                }
                Place::Row => {
                    let (n_taken, event) = self.row.push(bytes).map_err(|TooLong| too_long(&self.row))?;
                    match event {
                        Event::More => {}
                        Event::Special => {
                            self.doc.start();
                            self.place = Place::Doc;
                        }
                        Event::Closed => {
                            self.place = match self.shape {
                                Shape::Page => Place::Results,
                                Shape::Lines => Place::Outside,
                            };
                            out.push(self.row_item()?);
                        }
                    }
                    n_taken
                }
                Place::Doc => {
                    let (n_taken, doc) = match self.whole_doc(bytes) {
                        Some((document, n_taken)) => (n_taken, Some(RowDoc::Json(document))),
                        None => {
                            let (n_taken, is_done) = self.doc.push(bytes);
                            let doc = is_done.then(|| row_doc(self.doc.take())).transpose();
                            (n_taken, doc.map_err(|found| self.bad_row(&found))?)
                        }
                    };
                    if let Some(doc) = doc {
                        self.row_doc = doc;
                        self.doc_at = Some(self.row.text.len());
                        self.row.text.extend_from_slice(b"null");
                        self.place = Place::Row;
                    }
                    n_taken
                }
            };
            bytes = &bytes[n_taken..];
        }
        Ok(())
    }

    /// A document that is all there, as most are: found and checked in one pass.
    fn whole_doc(&self, bytes: &[u8]) -> Option<(Document, usize)> {
        let whole = if self.doc.is_started() { None } else { Document::parse_start(bytes) };
        whole.filter(|(_, n_bytes)| *n_bytes <= self.doc.bytes_max())
    }

    /// The body is over.
    ///
    /// # Errors
    /// `Malformed` when that was in the middle of a page or a line.
    pub fn finish(&mut self, _out: &mut Vec<Item>) -> Result<()> {
        match (self.shape, self.place) {
            (Shape::Page, Place::End) | (Shape::Lines, Place::Outside) => Ok(()),
            (Shape::Page, Place::Outside) => Err(malformed("expected a page of changes, got nothing")),
            (_, Place::Row | Place::Doc) => Err(self.bad_row("the answer ended within it")),
            _ => Err(malformed("the answer ended in the middle of a page")),
        }
    }

    /// One step outside of objects: blanks, or the byte that leads on.
    fn between(&mut self, bytes: &[u8]) -> Result<usize> {
        let Some(n_blanks) = bytes.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n'))
        else {
            return Ok(bytes.len());
        };
        match (self.place, bytes[n_blanks]) {
            (Place::Outside, b'{') if self.shape == Shape::Page => {
                self.head.start();
                self.place = Place::Head;
            }
            (Place::Outside | Place::Results, b'{') => {
                self.row.start();
                self.row_doc = RowDoc::Absent;
                self.doc_at = None;
                self.place = Place::Row;
            }
            (Place::ResultsStart, b'[') => self.place = Place::Results,
            // 1.7.1 puts an `{"error":…}` behind a row without caring for commas, so they are not counted.
            (Place::Results, b',') => {}
            (Place::Results, b']') => {
                self.head.text.extend_from_slice(b"null");
                self.place = Place::Head;
            }
            _ => {
                return Err(malformed(format!(
                    "expected CouchDB's changes, got `{}`",
                    shown(&bytes[n_blanks..])
                )));
            }
        }
        Ok(n_blanks + 1)
    }

    fn row_item(&mut self) -> Result<Item> {
        let doc = std::mem::replace(&mut self.row_doc, RowDoc::Absent);
        let text = std::str::from_utf8(&self.row.text)
            .map_err(|error| self.bad_row(&format!("it is not UTF-8 ({error})")))?;
        let envelope: Envelope =
            serde_json::from_str(text).map_err(|error| self.bad_row(&error.to_string()))?;
        match envelope {
            Envelope { seq: Some(seq), id: Some(id), changes: Some(changes), .. } => Ok(Item::Row(Row {
                seq: Seq::from_json(seq.get()),
                id: id.into_owned(),
                revs: changes.into_iter().map(|change| change.rev.into_owned()).collect(),
                deleted: envelope.deleted,
                doc,
                line: self.keeps_lines.then(|| Box::new(Line { text: text.into(), doc_at: self.doc_at })),
            })),
            Envelope { error: Some(_), .. } => Ok(envelope.fault()),
            Envelope { last_seq: Some(_), .. } if self.shape == Shape::Lines => Ok(envelope.end()),
            _ => Err(self.bad_row("expected `seq`, `id` and `changes`")),
        }
    }

    fn head_item(&mut self) -> Result<Item> {
        let text = &self.head.text;
        let envelope: Envelope = serde_json::from_slice(text).map_err(|error| {
            malformed(format!("expected a page of changes, got `{}`: {error}", shown(text)))
        })?;
        match envelope {
            Envelope { error: Some(_), .. } => Ok(envelope.fault()),
            Envelope { last_seq: Some(_), .. } if self.head.n_special == 1 => Ok(envelope.end()),
            _ => Err(malformed(format!("expected `results` and `last_seq`, got `{}`", shown(text)))),
        }
    }

    /// An error about the row being read, with its id if that can be told.
    fn bad_row(&self, found: &str) -> Error {
        let text = String::from_utf8_lossy(&self.row.text);
        let id = text.split_once("\"id\":").and_then(|(_, rest)| {
            serde_json::Deserializer::from_str(rest).into_iter::<String>().next()?.ok()
        });
        malformed(match id {
            Some(id) => format!("row `{}`: {found}", shown(id.as_bytes())),
            None => format!("row `{}`: {found}", shown(text.as_bytes())),
        })
    }
}

/// A row, a line or a page's head, without what is taken out of it.
#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    seq: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    changes: Option<Vec<Change<'a>>>,
    #[serde(default)]
    deleted: bool,
    #[serde(borrow, default, deserialize_with = "present")]
    last_seq: Option<&'a RawValue>,
    #[serde(borrow)]
    pending: Option<&'a RawValue>,
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    reason: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Change<'a> {
    #[serde(borrow)]
    rev: Cow<'a, str>,
}

/// Tells `null`, which a `seq` may be, from a member that is missing.
fn present<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

impl Envelope<'_> {
    fn fault(&self) -> Item {
        let text = |value: Option<&RawValue>| {
            let json = value.map_or("", RawValue::get);
            serde_json::from_str::<String>(json).unwrap_or_else(|_| json.to_owned())
        };
        Item::Fault { error: text(self.error), reason: text(self.reason) }
    }

    fn end(&self) -> Item {
        Item::End {
            last_seq: self.last_seq.and_then(|seq| Seq::from_json(seq.get())),
            pending: self.pending.and_then(|pending| pending.get().parse().ok()),
        }
    }
}

/// What is wrong with a `doc` is told as text.
fn row_doc(kept: Kept) -> Result<RowDoc, String> {
    let text = match kept {
        Kept::TooLong { n_bytes } => return Ok(RowDoc::TooLarge { bytes: n_bytes }),
        Kept::Text(text) => String::from_utf8(text)
            .map_err(|error| format!("its `doc` is not UTF-8 ({})", error.utf8_error()))?,
    };
    if text.trim_end() == "null" {
        return Ok(RowDoc::Null);
    }
    let json = Document::parse(text).map_err(|error| format!("its `doc` is not JSON: {error}"))?;
    Ok(RowDoc::Json(json))
}

fn too_long(object: &Object) -> Error {
    malformed(format!("`{}`: expected a row of at most {ENVELOPE_BYTES_MAX} bytes", shown(&object.text)))
}

fn malformed(found: impl Into<String>) -> Error {
    Error::new(Kind::Malformed, found)
}

fn shown(bytes: &[u8]) -> String {
    excerpt(bytes, 60)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    const DOC_MAX: usize = 1024;

    /// One line per item.
    fn shown_items(items: &[Item]) -> String {
        items.iter().fold(String::new(), |mut text, item| {
            match item {
                Item::Row(row) => {
                    let seq = row.seq.as_ref().map_or("null", Seq::as_json);
                    let doc = match &row.doc {
                        RowDoc::Absent => "-".to_owned(),
                        RowDoc::Null => "null".to_owned(),
                        RowDoc::TooLarge { bytes } => format!("{bytes} bytes"),
                        RowDoc::Json(json) => json.get().to_owned(),
                    };
                    let deleted = if row.deleted { " deleted" } else { "" };
                    writeln!(text, "{seq} {:?} {}{deleted} {doc}", row.id, row.revs.join(",")).unwrap();
                }
                Item::End { last_seq, pending } => {
                    let last_seq = last_seq.as_ref().map_or("null", Seq::as_json);
                    writeln!(text, "end {last_seq} pending {pending:?}").unwrap();
                }
                Item::Fault { error, reason } => writeln!(text, "fault {error}: {reason}").unwrap(),
            }
            text
        })
    }

    /// All items, then the error if there is one, for pieces of the given sizes (the last repeats).
    fn parsed(shape: Shape, body: &[u8], sizes: &[usize]) -> String {
        let mut parser = Parser::new(shape, DOC_MAX);
        let mut items = Vec::new();
        let mut rest = body;
        let mut sizes = sizes.iter().copied();
        let mut size = rest.len();
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            size = sizes.next().unwrap_or(size).clamp(1, rest.len());
            let (piece, more) = rest.split_at(size);
            result = parser.push(piece, &mut items);
            rest = more;
        }
        let result = result.and_then(|()| parser.finish(&mut items));
        let mut text = shown_items(&items);
        if let Err(error) = result {
            assert_eq!(error.kind(), Kind::Malformed);
            writeln!(text, "error {error}").unwrap();
        }
        text
    }

    /// Whole, and cut in two at every place, and byte by byte: always the same.
    fn check(shape: Shape, body: impl AsRef<[u8]>, expected: &str) {
        let body = body.as_ref();
        let text = String::from_utf8_lossy(body);
        assert_eq!(parsed(shape, body, &[body.len()]), expected, "{text}");
        for cut in 1..body.len() {
            assert_eq!(parsed(shape, body, &[cut, body.len()]), expected, "cut at {cut}: {text}");
        }
        assert_eq!(parsed(shape, body, &[1]), expected, "byte by byte: {text}");
    }

    fn recorded(version: &str, name: &str) -> String {
        let path = format!("{}/tests/data/{version}/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let answer: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        answer["body"].as_str().unwrap().to_owned()
    }

    #[derive(Deserialize)]
    struct NaiveRow {
        seq: Box<RawValue>,
        id: String,
        changes: Vec<NaiveChange>,
        #[serde(default)]
        deleted: bool,
        doc: Option<Box<RawValue>>,
    }

    #[derive(Deserialize)]
    struct NaiveChange {
        rev: String,
    }

    #[derive(Deserialize)]
    struct NaiveEnd {
        #[serde(default)]
        results: Vec<NaiveRow>,
        last_seq: Box<RawValue>,
        pending: Option<u64>,
    }

    impl NaiveRow {
        fn item(self) -> Item {
            Item::Row(Row {
                seq: Seq::from_json(self.seq.get()),
                id: self.id,
                revs: self.changes.into_iter().map(|change| change.rev).collect(),
                deleted: self.deleted,
                doc: self.doc.map_or(RowDoc::Absent, |doc| {
                    RowDoc::Json(Document::parse(doc.get().to_owned()).unwrap())
                }),
                line: None,
            })
        }
    }

    /// What `serde_json` makes of the whole text.
    fn naive(shape: Shape, body: &str) -> String {
        let mut items: Vec<Item> = Vec::new();
        let mut end = |text: &str| {
            let end: NaiveEnd = serde_json::from_str(text).unwrap();
            let mut rows: Vec<Item> = end.results.into_iter().map(NaiveRow::item).collect();
            rows.push(Item::End { last_seq: Seq::from_json(end.last_seq.get()), pending: end.pending });
            items.extend(rows);
        };
        match shape {
            Shape::Page => end(body),
            Shape::Lines => {
                for line in body.lines().filter(|line| !line.is_empty()) {
                    match serde_json::from_str::<NaiveRow>(line) {
                        Ok(row) => items.push(row.item()),
                        Err(_) => {
                            let end: NaiveEnd = serde_json::from_str(line).unwrap();
                            let last_seq = Seq::from_json(end.last_seq.get());
                            items.push(Item::End { last_seq, pending: end.pending });
                        }
                    }
                }
            }
        }
        shown_items(&items)
    }

    #[test]
    fn recorded_answers_agree_with_a_naive_reading_however_they_are_cut() {
        for version in ["1.7.1", "2.2.0", "3.5.0"] {
            for name in [
                "changes_normal",
                "changes_normal_docs_conflicts",
                "changes_limit0_now",
                "changes_limit2",
                "changes_longpoll_timeout",
            ] {
                let body = recorded(version, name);
                check(Shape::Page, &body, &naive(Shape::Page, &body));
            }
            let body = recorded(version, "changes_continuous_timeout");
            check(Shape::Lines, &body, &naive(Shape::Lines, &body));
        }
        let body = recorded("3.5.0", "changes_selector");
        check(Shape::Page, &body, &naive(Shape::Page, &body));
        check(
            Shape::Page,
            recorded("1.7.1", "changes_selector"),
            "fault bad_request: unknown builtin filter name\n",
        );
    }

    #[test]
    fn documents_stay_as_they_are_byte_for_byte() {
        let doc = "{ \"z\":1.0,\"a\" : -0.0,\"n\":12345678901234567890123,\"e\":1.0000000000000000199e+30,\
                   \"u\":\"\u{2028}\\u2028\\\"}],{\\\\\",\"doc\":{\"doc\":[[],{}]},\"\":null}";
        check(
            Shape::Lines,
            format!("{{\"seq\":1,\"id\":\"a\",\"changes\":[{{\"rev\":\"1-x\"}}],\"doc\":{doc}}}\n"),
            &format!("1 \"a\" 1-x {doc}\n"),
        );
    }

    #[test]
    fn order_of_members_and_blanks_do_not_matter() {
        check(
            Shape::Page,
            r#" { "pending" : 7, "last_seq":"9-x" ,"x":{"results":[1]}, "results" : [ {"doc": null ,"changes":[{"rev":"1-a"},{"rev":"1-b"}],"deleted":true,"id":"a\"\u00e9","seq":[42,"x"]}
              , {"doc":"text","id":"b","changes":[],"y":[{"doc":{}}],"seq":null} ] }  "#,
            "[42,\"x\"] \"a\\\"é\" 1-a,1-b deleted null\nnull \"b\"  \"text\"\nend \"9-x\" pending Some(7)\n",
        );
        check(Shape::Page, r#"{"results":[],"last_seq":null}"#, "end null pending None\n");
    }

    #[test]
    fn heartbeats_say_nothing() {
        check(
            Shape::Lines,
            "\n\n\r\n{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n\n{\"last_seq\":\"1-x\",\"pending\":0}\n",
            "1 \"a\"  -\nend \"1-x\" pending Some(0)\n",
        );
        check(Shape::Lines, "\n\n", "");
        check(Shape::Lines, "", "");
    }

    #[test]
    fn a_long_doc_is_dropped_and_counted() {
        for (n_bytes, kept) in [(DOC_MAX, true), (DOC_MAX + 1, false), (4 * DOC_MAX, false)] {
            let doc = format!("{{\"a\":[\"\\\"}}]\",{{}}],\"b\":\"{}\"}}", "é".repeat((n_bytes - 24) / 2));
            let doc = format!("{doc:<n_bytes$}", n_bytes = n_bytes).replacen(
                "\"b\":\"",
                &format!("\"b\":\"{}", "x".repeat(n_bytes - doc.len())),
                1,
            );
            let doc = doc.trim_end();
            assert_eq!(doc.len(), n_bytes);
            let row = format!("{{\"seq\":1,\"doc\":{doc},\"id\":\"a\",\"changes\":[{{\"rev\":\"1-x\"}}]}}");
            let shown = if kept { doc.to_owned() } else { format!("{n_bytes} bytes") };
            let body = format!("{{\"results\":[{row},{row}],\"last_seq\":1}}");
            let expected = format!("1 \"a\" 1-x {shown}\n").repeat(2) + "end 1 pending None\n";
            assert_eq!(parsed(Shape::Page, body.as_bytes(), &[7]), expected);
            assert_eq!(parsed(Shape::Page, body.as_bytes(), &[body.len()]), expected);
        }
    }

    #[test]
    fn memory_stays_bounded_while_a_long_doc_passes() {
        let mut parser = Parser::new(Shape::Lines, DOC_MAX);
        let mut items = Vec::new();
        parser.push(b"{\"seq\":1,\"id\":\"a\",\"changes\":[],\"doc\":{\"x\":\"", &mut items).unwrap();
        for _ in 0..10_000 {
            parser.push(&[b'x'; 1_000], &mut items).unwrap();
            assert_eq!(parser.doc.text_capacity().max(2 * DOC_MAX), 2 * DOC_MAX);
        }
        parser.push(b"\"}}\n", &mut items).unwrap();
        assert_eq!(shown_items(&items), "1 \"a\"  10000008 bytes\n");
    }

    #[test]
    fn a_row_without_end_is_an_error() {
        let body = format!("{{\"seq\":1,\"id\":\"{}", "x".repeat(ENVELOPE_BYTES_MAX));
        let text = parsed(Shape::Lines, body.as_bytes(), &[1 << 16]);
        assert!(text.ends_with("xxx`: expected a row of at most 1048576 bytes\n"), "{text}");
    }

    #[test]
    fn faults_within_a_200_come_out() {
        check(
            Shape::Lines,
            "{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n{\"error\":\"TypeError\",\"reason\":{\"x\":1}}\n",
            "1 \"a\"  -\nfault TypeError: {\"x\":1}\n",
        );
        check(
            Shape::Page,
            "{\"results\":[\n{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n\n{\"error\":\"TypeError\",\"reason\":\"x\"}\n",
            "1 \"a\"  -\nfault TypeError: x\nerror the answer ended in the middle of a page\n",
        );
    }

    #[test]
    fn bad_rows_are_errors_with_their_id() {
        let check_error = |shape, body: &[u8], expected: &str| {
            for size in [1, 5, body.len()] {
                let text = parsed(shape, body, &[size]);
                assert!(text.contains(expected) && text.contains("error "), "{text}");
            }
        };
        let page = |row: &[u8]| [b"{\"results\":[", row, b"],\"last_seq\":1}"].concat();
        check_error(Shape::Page, &page(b"{\"seq\":1,\"id\":\"a\"}"), "row `a`: expected");
        check_error(Shape::Page, &page(b"{\"seq\":1,\"changes\":[]}"), "expected `seq`, `id` and `changes`");
        check_error(Shape::Page, &page(b"{\"id\":\"a\",\"changes\":[]}"), "row `a`: expected `seq`");
        check_error(Shape::Page, &page(b"{\"last_seq\":1}"), "expected `seq`, `id` and `changes`");
        check_error(
            Shape::Page,
            &page(b"{\"id\":\"a\",\"seq\":1,\"changes\":[],\"doc\":{\"x\":\"\xff\"}}"),
            "row `a`: its `doc` is not UTF-8 (invalid utf-8 sequence of 1 bytes from index 6)",
        );
        check_error(
            Shape::Page,
            &page(b"{\"id\":\"a\",\"seq\":1,\"changes\":[],\"doc\":{\"x\":tru}}"),
            "row `a`: its `doc` is not JSON",
        );
        check_error(Shape::Page, &page(b"{\"id\":\"a\",\"doc\":,\"changes\":[]}"), "is not JSON");
        check_error(Shape::Lines, b"{\"id\":\"a\",\"x\":\"\xff\",\"changes\":[]}\n", "row `a`: ");
        check_error(Shape::Lines, b"{\"id\":\"\xff\",\"seq\":1,\"changes\":[]}\n", "error row `");
        check_error(Shape::Lines, b"{\"id\":\"a\",\"seq\":1,\"cha", "row `a`: the answer ended within it");
        check_error(Shape::Lines, b"{\"id\":\"a\",\"doc\":{\"x\"", "row `a`: the answer ended within it");
        check_error(Shape::Page, b"{\"results\":[", "ended in the middle of a page");
        check_error(Shape::Page, b"", "got nothing");
        check_error(Shape::Page, b"{\"results\":[],\"last_seq\":1}x", "got `x`");
        check_error(Shape::Page, b"{\"results\":{},\"last_seq\":1}", "expected CouchDB's changes, got `{");
        check_error(Shape::Page, b"{\"last_seq\":1}", "expected `results`");
        check_error(Shape::Page, b"{\"results\":[],\"results\":[],\"last_seq\":1}", "expected `results`");
    }

    #[test]
    fn what_is_not_json_is_shown() {
        let html =
            "\r\n<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>…</body></html>";
        assert_eq!(
            parsed(Shape::Page, html.as_bytes(), &[html.len()]),
            "error expected CouchDB's changes, got `<!DOCTYPE html><html><head><title>502 Bad Gateway</title></h`\n"
        );
        assert!(
            parsed(Shape::Lines, html.as_bytes(), &[1])
                .starts_with("error expected CouchDB's changes, got `<`")
        );
    }
}
