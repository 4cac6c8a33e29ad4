//! `_changes` as CouchDB writes it: pages and lines, parsed from any split of the bytes.
//!
//! Guarantees that no row is skipped silently (a bad one is an error), that a `doc` comes out byte for byte, and
//! that memory stays bounded whatever the server sends: a long `doc` is dropped while it is read. Does not depend
//! on line breaks within pages nor on the order of members. What a row means is left to `flow`.

use std::borrow::Cow;

use memchr::memchr2;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::error::{Error, Kind, Result};
use crate::pure::seq::Seq;

/// The longest row without its `doc`, and the longest head of a page, in bytes: a document with 1,000 conflicts
/// has a row of 60 KiB under `style=all_docs`.
const ENVELOPE_BYTES_MAX: usize = 1024 * 1024;

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
    Json(Box<RawValue>),
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
        }
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
                    let (n_taken, event) = self.head.push(bytes)?;
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
                    let (n_taken, event) = self.row.push(bytes)?;
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
                    let (n_taken, is_done) = self.doc.push(bytes);
                    if is_done {
                        self.row_doc = self.doc.take().map_err(|found| self.bad_row(&found))?;
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
        let envelope: Envelope =
            serde_json::from_slice(&self.row.text).map_err(|error| self.bad_row(&error.to_string()))?;
        match envelope {
            Envelope { id: Some(id), changes: Some(changes), .. } => Ok(Item::Row(Row {
                seq: envelope.seq.and_then(|seq| Seq::from_json(seq.get())),
                id: id.into_owned(),
                revs: changes.into_iter().map(|change| change.rev.into_owned()).collect(),
                deleted: envelope.deleted,
                doc,
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
    #[serde(borrow)]
    seq: Option<&'a RawValue>,
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    changes: Option<Vec<Change<'a>>>,
    #[serde(default)]
    deleted: bool,
    #[serde(borrow)]
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

/// Reads one JSON object, except the value of one member of it.
#[derive(Debug)]
struct Object {
    /// The member whose value somebody else reads and replaces.
    special: &'static [u8],
    /// What was read: the object with other values in the place of the special one's.
    text: Vec<u8>,
    /// Open brackets; 1 directly within the object.
    depth: u32,
    string: StringState,
    /// Directly within the object: whether a member's name comes next, or is being read.
    in_name: bool,
    /// How much of the name agrees with `special`.
    name: Name,
    /// How often the special member came.
    n_special: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StringState {
    Outside,
    Inside,
    /// After a backslash.
    Escaped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    /// So many bytes, all as in the special name.
    Agrees(usize),
    Differs,
}

enum Event {
    /// All bytes are taken, the object goes on.
    More,
    /// The colon of the special member is taken; its value comes next.
    Special,
    /// The closing bracket is taken.
    Closed,
}

impl Object {
    fn new(special: &'static [u8]) -> Object {
        Object {
            special,
            text: Vec::new(),
            depth: 0,
            string: StringState::Outside,
            in_name: false,
            name: Name::Differs,
            n_special: 0,
        }
    }

    /// The opening bracket was taken.
    fn start(&mut self) {
        self.text.clear();
        self.text.push(b'{');
        self.depth = 1;
        self.string = StringState::Outside;
        self.in_name = true;
        self.name = Name::Agrees(0);
        self.n_special = 0;
    }

    /// Takes bytes up to the first event; says how many.
    fn push(&mut self, bytes: &[u8]) -> Result<(usize, Event)> {
        let (n_taken, event) = self.scan(bytes);
        if self.text.len() + n_taken > ENVELOPE_BYTES_MAX {
            let text = shown(&self.text);
            return Err(malformed(format!(
                "row `{text}`: over {ENVELOPE_BYTES_MAX} bytes without its `doc`"
            )));
        }
        self.text.extend_from_slice(&bytes[..n_taken]);
        Ok((n_taken, event))
    }

    fn scan(&mut self, bytes: &[u8]) -> (usize, Event) {
        let mut at = 0;
        while at < bytes.len() {
            if self.string != StringState::Outside {
                let end = skip_string(&mut self.string, bytes, at);
                if self.depth == 1 && self.in_name {
                    let is_closed = self.string == StringState::Outside;
                    self.compare_name(&bytes[at..end - usize::from(is_closed)]);
                }
                at = end;
                continue;
            }
            let byte = bytes[at];
            at += 1;
            match byte {
                b'"' => self.string = StringState::Inside,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at, Event::Closed);
                    }
                }
                b',' if self.depth == 1 => {
                    self.in_name = true;
                    self.name = Name::Agrees(0);
                }
                b':' if self.depth == 1 && self.in_name => {
                    self.in_name = false;
                    if self.name == Name::Agrees(self.special.len()) {
                        self.n_special += 1;
                        return (at, Event::Special);
                    }
                }
                _ => {}
            }
        }
        (at, Event::More)
    }

    fn compare_name(&mut self, part: &[u8]) {
        self.name = match self.name {
            Name::Agrees(n_bytes) if self.special[n_bytes..].starts_with(part) => {
                Name::Agrees(n_bytes + part.len())
            }
            _ => Name::Differs,
        };
    }
}

/// Reads one JSON value, keeping it as text unless it is too long.
#[derive(Debug)]
struct Text {
    bytes_max: usize,
    text: Vec<u8>,
    n_bytes: u64,
    /// Open brackets.
    depth: u32,
    string: StringState,
    /// Whether its first byte was seen.
    is_started: bool,
}

impl Text {
    fn new(bytes_max: usize) -> Text {
        Text {
            bytes_max,
            text: Vec::new(),
            n_bytes: 0,
            depth: 0,
            string: StringState::Outside,
            is_started: false,
        }
    }

    fn start(&mut self) {
        *self = Text::new(self.bytes_max);
    }

    /// Takes bytes up to the end of the value; says how many, and whether it has ended.
    fn push(&mut self, bytes: &[u8]) -> (usize, bool) {
        let n_blanks = if self.is_started {
            0
        } else {
            bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n')).count()
        };
        let (n_taken, is_done) = self.scan(&bytes[n_blanks..]);
        let part = &bytes[n_blanks..n_blanks + n_taken];
        self.is_started |= n_taken > 0;
        self.n_bytes += part.len() as u64;
        if self.n_bytes <= self.bytes_max as u64 {
            self.text.extend_from_slice(part);
        } else {
            self.text = Vec::new();
        }
        (n_blanks + n_taken, is_done)
    }

    fn scan(&mut self, bytes: &[u8]) -> (usize, bool) {
        let mut at = 0;
        while at < bytes.len() {
            if self.string != StringState::Outside {
                at = skip_string(&mut self.string, bytes, at);
                if self.string == StringState::Outside && self.depth == 0 {
                    return (at, true);
                }
                continue;
            }
            match bytes[at] {
                b'"' => self.string = StringState::Inside,
                b'{' | b'[' => self.depth += 1,
                // A bare number or word ends before what follows it.
                b'}' | b']' | b',' if self.depth == 0 => return (at, true),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                _ => {}
            }
            at += 1;
        }
        (at, false)
    }

    /// What was read; an error says what is wrong with it.
    fn take(&mut self) -> Result<RowDoc, String> {
        if self.n_bytes > self.bytes_max as u64 {
            return Ok(RowDoc::TooLarge { bytes: self.n_bytes });
        }
        let text = String::from_utf8(std::mem::take(&mut self.text))
            .map_err(|error| format!("its `doc` is not UTF-8 ({})", error.utf8_error()))?;
        if text.trim_end() == "null" {
            return Ok(RowDoc::Null);
        }
        let json = RawValue::from_string(text).map_err(|error| format!("its `doc` is not JSON: {error}"))?;
        Ok(RowDoc::Json(json))
    }
}

/// Goes on from `at` within a string; gives the place behind its closing quote, or the end of the bytes.
fn skip_string(state: &mut StringState, bytes: &[u8], mut at: usize) -> usize {
    loop {
        if *state == StringState::Escaped {
            if at == bytes.len() {
                return at;
            }
            at += 1;
            *state = StringState::Inside;
        }
        match memchr2(b'"', b'\\', &bytes[at..]) {
            None => return bytes.len(),
            Some(n_bytes) => {
                at += n_bytes + 1;
                if bytes[at - 1] == b'"' {
                    *state = StringState::Outside;
                    return at;
                }
                *state = StringState::Escaped;
            }
        }
    }
}

fn malformed(found: impl Into<String>) -> Error {
    Error::new(Kind::Malformed, found)
}

/// The first 60 characters, on one line.
fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(240)])
        .chars()
        .take(60)
        .flat_map(char::escape_debug)
        .collect()
}
