//! Reading `_changes`: one request at a time, its rows handed over as they come.
//!
//! Guarantees that rows reach the caller after every read from the socket, that a blocked read can be woken, that a
//! fault in the middle of an answer is an error, and that `limit=0` is never asked. Which position to go on from,
//! when to rotate and when to try again are left to the caller (DESIGN §7, §8).

use std::ops::ControlFlow;
use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::config;
use crate::couch::client::{Cutter, Generation, Limits, Line, Server, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::changes::{Item, Parser, Shape};
use crate::pure::seq::Seq;

/// The piece of an answer that is read at once, in bytes.
const READ_BYTES: usize = 64 * 1024;

/// One request for changes.
#[derive(Debug, Clone)]
pub struct FeedRequest {
    /// The database.
    pub db: String,
    /// Where to go on.
    pub since: Seq,
    /// A page, or an open request.
    pub kind: FeedKind,
    /// What CouchDB leaves out.
    pub filter: Option<config::Filter>,
    /// Whether rows carry `doc`.
    pub include_docs: bool,
    /// Whether `doc` carries `_conflicts` and `changes` lists every leaf; takes documents in.
    pub conflicts: bool,
    /// Longer documents are left out while reading, in bytes.
    pub doc_bytes_max: usize,
    /// Whether rows keep their text, for `format = raw`.
    pub keeps_lines: bool,
    /// The longest time without a byte; `None` = any, for filtered feeds.
    pub silence: Option<Duration>,
    /// The longest time for the whole request; `None` = any.
    pub deadline: Option<Duration>,
}

/// How long a request lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedKind {
    /// `feed=normal`: what there is, at most `limit` rows.
    Page {
        /// At least 1 is asked: `limit=0` gives positions that lose changes (CONTRACT §6).
        limit: u32,
    },
    /// `feed=continuous` without heartbeat: rows as they happen, ends after `timeout` without one.
    Continuous {
        /// CouchDB takes its own `changes_timeout` (60 s) where that is shorter.
        timeout: Duration,
    },
}

/// How a request ended without a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedEnd {
    /// The answer is complete. There is a position to store only if an [`Item::End`] was handed over.
    Complete,
    /// The receiver of the items wanted no more.
    BrokenOff,
    /// [`FeedCloser::close`] ended it.
    Closed,
}

/// One feed of one subscription, with a connection of its own.
pub struct Feed {
    line: Line,
    server: Server,
    /// Kept from request to request: a long piece of memory taken anew for each finds its old place in use, and the
    /// heap grows.
    buffer: Vec<u8>,
}

/// Ends a feed's request from another thread.
#[derive(Clone)]
pub struct FeedCloser {
    cutter: Cutter,
}

impl FeedCloser {
    /// Of a line that something else than a [`Feed`] reads.
    pub(crate) fn of(line: &Line) -> FeedCloser {
        FeedCloser { cutter: line.cutter() }
    }

    /// Ends the request under way with [`FeedEnd::Closed`]; when there is none, the next one at once. The feed can
    /// make new requests afterwards. A wait for the login gate is not cut short; it lasts as long as one `GET /`.
    pub fn close(&self) {
        self.cutter.cut();
    }
}

impl Feed {
    /// Prepares a feed; sends nothing.
    pub fn new(server: &Server) -> Feed {
        Feed { line: server.line(), server: server.clone(), buffer: Vec::new() }
    }

    /// What ends this feed's requests; may be copied and sent to other threads.
    pub fn closer(&self) -> FeedCloser {
        FeedCloser::of(&self.line)
    }

    /// Whether it was closed since this was last asked, for whoever waits for something else in the feed's place.
    pub fn take_closed(&self) -> bool {
        self.line.take_cut()
    }

    /// Makes one request and hands its items over after every read, until it ends. `on_items` gets only rows and
    /// ends, in the order they came, and may leave the vector as it is or take them out.
    ///
    /// # Errors
    /// `NotFound` only when the database itself is gone. `BadSince` when the position is not of this server.
    /// `BadRequest` for a missing design document or filter. `Server` also for a fault inside an answer (items
    /// before it were handed over). `Malformed` for what is not CouchDB's, or ends in the middle. `Timeout` for
    /// silence and the deadline. `Cut` when the connection is lost. Else as [`Server::request`].
    pub fn read(
        &mut self,
        request: &FeedRequest,
        on_items: &mut dyn FnMut(&mut Vec<Item>) -> ControlFlow<()>,
    ) -> Result<FeedEnd> {
        if self.line.take_cut() {
            return Ok(FeedEnd::Closed);
        }
        match self.read_answer(request, on_items) {
            Err(_) if self.line.take_cut() => Ok(FeedEnd::Closed),
            end => end.context(|| format!("failed to read changes since `{}`", request.since)),
        }
    }

    fn read_answer(
        &mut self,
        request: &FeedRequest,
        on_items: &mut dyn FnMut(&mut Vec<Item>) -> ControlFlow<()>,
    ) -> Result<FeedEnd> {
        let (path, body) = target(request);
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let limits = Limits { silence: request.silence, deadline: request.deadline, ..Limits::default() };
        let mut incoming = self
            .line
            .request(&method, &path, body.as_deref(), limits)
            .map_err(|error| self.explain(error, request))?;
        let shape = match request.kind {
            FeedKind::Page { .. } => Shape::Page,
            FeedKind::Continuous { .. } => Shape::Lines,
        };
        let mut parser = Parser::new(shape, request.doc_bytes_max).keeping_lines(request.keeps_lines);
        let mut items = Vec::new();
        self.buffer.resize(READ_BYTES, 0);
        loop {
            let n_bytes = self.line.read(&mut incoming, &mut self.buffer).map_err(cut_off)?;
            // What came before a fault is handed over first.
            let parsed = match n_bytes {
                0 => parser.finish(&mut items),
                _ => parser.push(&self.buffer[..n_bytes], &mut items),
            };
            let fault = take_fault(&mut items);
            if !items.is_empty() && on_items(&mut items).is_break() {
                return Ok(FeedEnd::BrokenOff);
            }
            items.clear();
            if let Some(fault) = fault {
                return Err(fault);
            }
            parsed?;
            if n_bytes == 0 {
                return Ok(FeedEnd::Complete);
            }
        }
    }

    /// Finds out what a refusal means.
    fn explain(&self, error: Error, request: &FeedRequest) -> Error {
        let since = request.since.as_since();
        match error.kind() {
            // 1.x and the backend port of 2.x: `list_to_integer` of what is no integer.
            Kind::Server if error.cause().ends_with(": badarg") && !is_integer(&since) => {
                Error::new(Kind::BadSince, error.cause())
            }
            Kind::NotFound => {
                match self.server.request(&Method::GET, &db_path(&request.db, &[]), None, &[]) {
                    // The database is there: the design document or the filter is not.
                    Ok(_) => Error::new(Kind::BadRequest, error.cause()),
                    Err(gone) => gone,
                }
            }
            _ => error,
        }
    }
}

/// A connection that is lost within an answer says less than one that cannot be made: a proxy may have cut it.
fn cut_off(error: Error) -> Error {
    match error.kind() {
        Kind::Unreachable => Error::new(Kind::Cut, format!("the answer was cut off ({})", error.cause())),
        _ => error,
    }
}

fn is_integer(since: &str) -> bool {
    since.bytes().all(|byte| byte.is_ascii_digit())
}

/// Takes a fault and what follows it out of the items.
fn take_fault(items: &mut Vec<Item>) -> Option<Error> {
    let at = items.iter().position(|item| matches!(item, Item::Fault { .. }))?;
    match items.drain(at..).next() {
        Some(Item::Fault { error, reason }) => {
            Some(Error::new(Kind::Server, format!("CouchDB broke off: {error}: {reason}")))
        }
        _ => None,
    }
}

/// Path with query, and the body for filters that need one.
fn target(request: &FeedRequest) -> (String, Option<String>) {
    let mut query = vec![("since", request.since.as_since())];
    match request.kind {
        FeedKind::Page { limit } => {
            query.push(("feed", "normal".to_owned()));
            query.push(("limit", limit.max(1).to_string()));
        }
        FeedKind::Continuous { timeout } => {
            query.push(("feed", "continuous".to_owned()));
            query.push(("timeout", timeout.as_millis().to_string()));
        }
    }
    if request.include_docs || request.conflicts {
        query.push(("include_docs", "true".to_owned()));
    }
    if request.conflicts {
        query.push(("conflicts", "true".to_owned()));
        query.push(("style", "all_docs".to_owned()));
    }
    let mut body = None;
    match &request.filter {
        None => {}
        Some(config::Filter::Selector(selector)) => {
            query.push(("filter", "_selector".to_owned()));
            body = Some(format!("{{\"selector\":{selector}}}"));
        }
        Some(config::Filter::DocIds(doc_ids)) => {
            query.push(("filter", "_doc_ids".to_owned()));
            body = Some(serde_json::json!({ "doc_ids": doc_ids }).to_string());
        }
        Some(config::Filter::View(view)) => {
            query.push(("filter", "_view".to_owned()));
            query.push(("view", view.clone()));
        }
        Some(config::Filter::Function { name, params }) => {
            query.push(("filter", name.clone()));
            query.extend(params.iter().map(|(name, value)| (name.as_str(), value.clone())));
        }
    }
    let query: Vec<String> =
        query.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect();
    (format!("{}?{}", db_path(&request.db, &["_changes"]), query.join("&")), body)
}

/// The position to start from when only what happens from now on is wanted.
///
/// On 1.x the integer `update_seq` of `GET /DB`. Later servers are asked for `since=now&limit=1`: a position that
/// holds the shards' ids, so that a re-created database is noticed (HOLES 6). When that answer already holds a row,
/// the row is an event and the position behind it would lose it; no answer gives the position before it, so the
/// `update_seq` that was asked for *first* is taken: it lies before the row and may bring a few changes from the
/// moments between. (On 2.x it has no shard ids; the mark notices a re-creation all the same.)
///
/// # Errors
/// As [`Server::get_json`].
pub fn resolve_now(server: &Server, db: &str, generation: Generation) -> Result<Seq> {
    #[derive(Deserialize)]
    struct Info {
        update_seq: Box<RawValue>,
    }
    #[derive(Deserialize)]
    struct Page {
        results: Vec<serde::de::IgnoredAny>,
        last_seq: Box<RawValue>,
    }
    let malformed = |name| Error::new(Kind::Malformed, format!("expected a `{name}`, got `null`"));
    let info: Info = server.get_json(&db_path(db, &[]))?;
    let before = Seq::from_json(info.update_seq.get()).ok_or_else(|| malformed("update_seq"))?;
    if generation == Generation::One {
        return Ok(before);
    }
    let path = format!("{}?since=now&limit=1", db_path(db, &["_changes"]));
    let page: Page = server.get_json(&path)?;
    match page.results.is_empty() {
        true => Seq::from_json(page.last_seq.get()).ok_or_else(|| malformed("last_seq")),
        false => Ok(before),
    }
}

/// How many changes lie behind a place: exact where CouchDB says what is pending, else counted page by page, up to
/// `max` (then it is "at least").
///
/// # Errors
/// As [`Server::get_json`].
pub fn count_after(
    server: &Server,
    db: &str,
    since: &Seq,
    filter: Option<&config::Filter>,
    max: u64,
) -> Result<u64> {
    #[derive(Deserialize)]
    struct Page {
        results: Vec<Row>,
        pending: Option<u64>,
    }
    #[derive(Deserialize)]
    struct Row {
        seq: Option<Box<RawValue>>,
    }
    const ROWS: u64 = 10_000;
    let (mut n_changes, mut since) = (0, since.clone());
    loop {
        // `pending` does not know of filters (CONTRACT §6): with one every row is counted.
        let limit = if filter.is_some() { ROWS } else { 1 };
        let limit = if n_changes == 0 { limit } else { ROWS }.min(max.saturating_sub(n_changes).max(1));
        let request = FeedRequest {
            db: db.to_owned(),
            since: since.clone(),
            kind: FeedKind::Page { limit: u32::try_from(limit).unwrap_or(u32::MAX) },
            filter: filter.cloned(),
            include_docs: false,
            conflicts: false,
            doc_bytes_max: 0,
            keeps_lines: false,
            silence: None,
            deadline: None,
        };
        let (path, body) = target(&request);
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let reply = server.request(&method, &path, body.as_deref(), &[])?;
        let page: Page = from_json(&reply.body).context(|| format!("database `{db}`, its changes"))?;
        n_changes += page.results.len() as u64;
        if let (Some(pending), None) = (page.pending, filter) {
            return Ok(n_changes + pending);
        }
        let full = page.results.len() as u64 >= limit;
        let last = page.results.iter().rev().find_map(|row| row.seq.as_ref());
        match last.and_then(|seq| Seq::from_json(seq.get())) {
            Some(last) if full && n_changes < max => since = last,
            _ => return Ok(n_changes),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;
    use crate::couch::scripted::{Scripted, Seen, recorded, send, send_chunk, send_head, wait_for_hang_up};
    use crate::sys;

    fn page(since: &str, limit: u32) -> FeedRequest {
        FeedRequest {
            db: "a/b".to_owned(),
            since: Seq::from_json(since).unwrap(),
            kind: FeedKind::Page { limit },
            filter: None,
            include_docs: false,
            conflicts: false,
            doc_bytes_max: 1024,
            keeps_lines: false,
            silence: Some(Duration::from_secs(10)),
            deadline: None,
        }
    }

    fn open_ended(since: &str) -> FeedRequest {
        let kind = FeedKind::Continuous { timeout: Duration::from_millis(1500) };
        FeedRequest { kind, ..page(since, 0) }
    }

    /// Ids and ends that one request gives, and how it ended.
    fn read(feed: &mut Feed, request: &FeedRequest) -> (Vec<String>, Result<FeedEnd>) {
        let mut got = Vec::new();
        let end = feed.read(request, &mut |items| {
            for item in items.drain(..) {
                got.push(match item {
                    Item::Row(row) => row.id,
                    Item::End { last_seq, .. } => format!("end {}", last_seq.unwrap_or_else(Seq::zero)),
                    Item::Fault { .. } => panic!("faults are errors"),
                });
            }
            ControlFlow::Continue(())
        });
        (got, end)
    }

    fn check_target(request: FeedRequest, path: &str, body: Option<&str>) {
        assert_eq!(target(&request), (path.to_owned(), body.map(str::to_owned)));
    }

    #[test]
    fn what_is_asked() {
        check_target(page("\"4-g+\"", 0), "/a%2Fb/_changes?since=4-g%2B&feed=normal&limit=1", None);
        check_target(
            FeedRequest { include_docs: true, ..open_ended("0") },
            "/a%2Fb/_changes?since=0&feed=continuous&timeout=1500&include_docs=true",
            None,
        );
        check_target(
            FeedRequest { conflicts: true, ..page("7", 9) },
            "/a%2Fb/_changes?since=7&feed=normal&limit=9&include_docs=true&conflicts=true&style=all_docs",
            None,
        );
        let filtered = |filter| FeedRequest { filter: Some(filter), ..page("7", 9) };
        let start = "/a%2Fb/_changes?since=7&feed=normal&limit=9";
        check_target(
            filtered(config::Filter::Selector("{\"a\":1.0}".to_owned())),
            &format!("{start}&filter=_selector"),
            Some("{\"selector\":{\"a\":1.0}}"),
        );
        check_target(
            filtered(config::Filter::DocIds(vec!["x\"".to_owned()])),
            &format!("{start}&filter=_doc_ids"),
            Some("{\"doc_ids\":[\"x\\\"\"]}"),
        );
        check_target(
            filtered(config::Filter::View("d/v".to_owned())),
            &format!("{start}&filter=_view&view=d%2Fv"),
            None,
        );
        let params = vec![("k&".to_owned(), "\"v\"".to_owned())];
        check_target(
            filtered(config::Filter::Function { name: "d/f".to_owned(), params }),
            &format!("{start}&filter=d%2Ff&k%26=%22v%22"),
            None,
        );
    }

    #[test]
    fn recorded_pages_and_lines_are_read() {
        for version in ["1.7.1", "2.2.0", "3.5.0"] {
            let scripted = Scripted::start(move |seen, stream| {
                let name = match seen.path.contains("continuous") {
                    true => "changes_continuous_timeout",
                    false => "changes_normal_docs_conflicts",
                };
                send_head(stream);
                for line in recorded(version, name).1.split_inclusive('\n') {
                    send_chunk(stream, line);
                }
                send_chunk(stream, "");
            });
            let mut feed = Feed::new(&scripted.server(None));
            for request in [page("0", 100), open_ended("0")] {
                let (got, end) = read(&mut feed, &request);
                assert_eq!(end.unwrap(), FeedEnd::Complete);
                assert_eq!(got.len(), 8, "{version}: {got:?}");
                assert!(got[7].starts_with("end "), "{got:?}");
            }
        }
    }

    #[test]
    fn rows_come_at_once_and_a_blocked_read_can_be_closed() {
        let scripted = Scripted::start(|seen, stream| {
            if seen.path.contains("normal") {
                return send(stream, 200, "{\"results\":[],\"last_seq\":1}");
            }
            send_head(stream);
            send_chunk(stream, "{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n{\"seq\":2,\"id\":\"b\",\"cha");
            wait_for_hang_up(stream);
        });
        let mut feed = Feed::new(&scripted.server(None));
        let closer = feed.closer();
        let (row_came, rows) = crossbeam_channel::bounded(1);
        let thread = sys::spawn("test", move || {
            rows.recv().unwrap();
            closer.close();
        })
        .unwrap();
        let mut ids = Vec::new();
        let end = feed.read(&open_ended("0"), &mut |items| {
            ids.extend(items.drain(..).map(|item| matches!(item, Item::Row(row) if row.id == "a")));
            row_came.send(()).unwrap();
            ControlFlow::Continue(())
        });
        assert_eq!((end.unwrap(), ids), (FeedEnd::Closed, vec![true]));
        thread.join().unwrap();
        let (got, end) = read(&mut feed, &page("0", 5));
        assert_eq!(
            (got, end.unwrap()),
            (vec!["end 1".to_owned()], FeedEnd::Complete),
            "a closed feed goes on"
        );
        feed.closer().close();
        assert_eq!(read(&mut feed, &page("0", 5)).1.unwrap(), FeedEnd::Closed, "closed before it was made");
        assert_eq!(read(&mut feed, &page("0", 5)).1.unwrap(), FeedEnd::Complete);
        assert_eq!(scripted.asked().len(), 3);
    }

    #[test]
    fn stopping_the_server_ends_its_feeds_for_good() {
        let (arrived, arrivals) = crossbeam_channel::bounded(1);
        let scripted = Scripted::start(move |_, stream| {
            send_head(stream);
            arrived.send(()).unwrap();
            wait_for_hang_up(stream);
        });
        let server = scripted.server(None);
        let mut feed = Feed::new(&server);
        let thread = sys::spawn("test", move || {
            arrivals.recv().unwrap();
            server.stop();
        })
        .unwrap();
        assert_eq!(read(&mut feed, &open_ended("0")).1.unwrap_err().kind(), Kind::Stopped);
        assert_eq!(read(&mut feed, &open_ended("0")).1.unwrap_err().kind(), Kind::Stopped);
        thread.join().unwrap();
    }

    #[test]
    fn the_receiver_can_break_off() {
        let scripted = Scripted::start(|_, stream| {
            send_head(stream);
            send_chunk(stream, "{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n");
            wait_for_hang_up(stream);
        });
        let mut feed = Feed::new(&scripted.server(None));
        let end = feed.read(&open_ended("0"), &mut |_| ControlFlow::Break(()));
        assert_eq!(end.unwrap(), FeedEnd::BrokenOff);
    }

    /// What is handed over, and the error.
    fn check_fault(
        request: &FeedRequest,
        answer: impl Fn(&Seen, &mut TcpStream) + Send + Sync + 'static,
        expected: (&[&str], Kind, &str),
    ) {
        let scripted = Scripted::start(answer);
        let (got, end) = read(&mut Feed::new(&scripted.server(None)), request);
        let error = end.unwrap_err();
        assert_eq!(
            (got.as_slice(), error.kind()),
            (expected.0.map_to_strings().as_slice(), expected.1),
            "{error}"
        );
        assert!(error.to_string().starts_with("failed to read changes since `"), "{error}");
        assert!(error.to_string().contains(expected.2), "{error}");
    }

    trait Strings {
        fn map_to_strings(&self) -> Vec<String>;
    }

    impl Strings for &[&str] {
        fn map_to_strings(&self) -> Vec<String> {
            self.iter().map(|text| (*text).to_owned()).collect()
        }
    }

    /// Answers feeds with a recorded refusal, and `GET /DB` with a status.
    fn refuse(
        version: &'static str,
        name: &'static str,
        db_status: u16,
    ) -> impl Fn(&Seen, &mut TcpStream) + Send + Sync {
        move |seen, stream| {
            if seen.path == "/a%2Fb" {
                let body = r#"{"error":"not_found","reason":"no_db_file"}"#;
                return send(stream, db_status, body);
            }
            let (status, body) = recorded(version, name);
            send(stream, status, &body);
        }
    }

    #[test]
    fn refusals_are_told_apart() {
        for version in ["1.7.1", "2.2.0", "3.5.0"] {
            let missing = if version == "1.7.1" { "no_db_file" } else { "" };
            let gone = (&[] as &[&str], Kind::NotFound, missing);
            check_fault(&page("1", 5), refuse(version, "changes_no_db", 404), gone);
            check_fault(
                &page("1", 5),
                refuse(version, "changes_filter_missing", 200),
                (&[], Kind::BadRequest, "404 not_found: missing json key: nope"),
            );
            check_fault(
                &page("\"garbage\"", 5),
                refuse(version, "changes_since_garbage", 200),
                (&[], Kind::BadSince, "since `garbage`"),
            );
        }
        check_fault(
            &page("17", 5),
            refuse("1.7.1", "changes_since_garbage", 200),
            (&[], Kind::Server, "500 unknown_error: badarg"),
        );
        check_fault(
            &page("1", 5),
            refuse("1.7.1", "changes_selector", 200),
            (&[], Kind::BadRequest, "unknown builtin filter name"),
        );
    }

    #[test]
    fn a_fault_within_an_answer_ends_it_after_the_rows_before_it() {
        let fault = |_: &Seen, stream: &mut TcpStream| {
            send_head(stream);
            send_chunk(
                stream,
                "{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n{\"error\":\"TypeError\",\"reason\":\"x is undefined\"}\n",
            );
            wait_for_hang_up(stream);
        };
        check_fault(&open_ended("0"), fault, (&["a"], Kind::Server, "TypeError: x is undefined"));
        let bad_row = |_: &Seen, stream: &mut TcpStream| {
            send(
                stream,
                200,
                "{\"results\":[{\"seq\":1,\"id\":\"a\",\"changes\":[]},{\"id\":\"b\"}],\"last_seq\":2}",
            );
        };
        check_fault(&page("0", 5), bad_row, (&["a"], Kind::Malformed, "row `b`"));
    }

    #[test]
    fn answers_that_end_early_are_errors() {
        let cut = |text: &'static str, is_ended: bool| {
            move |_: &Seen, stream: &mut TcpStream| {
                send_head(stream);
                send_chunk(stream, text);
                if is_ended {
                    send_chunk(stream, "");
                }
            }
        };
        let row = "{\"results\":[{\"seq\":1,\"id\":\"a\",\"changes\":[]}";
        check_fault(&page("0", 5), cut(row, false), (&["a"], Kind::Cut, "disconnected"));
        check_fault(&page("0", 5), cut(row, true), (&["a"], Kind::Malformed, "in the middle of a page"));
        let line = "{\"seq\":1,\"id\":\"a\",\"changes\":[]}\n";
        check_fault(&open_ended("0"), cut(line, false), (&["a"], Kind::Cut, "disconnected"));
        let nothing = |_: &Seen, _: &mut TcpStream| {};
        check_fault(&page("0", 5), nothing, (&[], Kind::Unreachable, "disconnected"));
        let html = |_: &Seen, stream: &mut TcpStream| send(stream, 200, "<html>hello");
        check_fault(&page("0", 5), html, (&[], Kind::Malformed, "got `<html>hello`"));
    }

    #[test]
    fn silence_is_limited_where_asked() {
        let silent = |_: &Seen, stream: &mut TcpStream| {
            send_head(stream);
            send_chunk(stream, "\n");
            wait_for_hang_up(stream);
        };
        let short = Some(Duration::from_millis(50));
        let request = FeedRequest { silence: short, ..open_ended("0") };
        check_fault(&request, silent, (&[], Kind::Timeout, "no byte for 0.05 s"));
        let request = FeedRequest { silence: None, deadline: short, ..open_ended("0") };
        check_fault(&request, silent, (&[], Kind::Timeout, "timeout (global)"));
    }

    #[test]
    fn now_is_before_every_row_that_is_not_told() {
        let check = |generation, changes: &'static str, expected: &str, n_asked| {
            let scripted = Scripted::start(move |seen, stream| match seen.path.as_str() {
                "/a%2Fb" => send(stream, 200, "{\"update_seq\":\"7-x\"}"),
                "/a%2Fb/_changes?since=now&limit=1" => send(stream, 200, changes),
                _ => send(stream, 400, "{}"),
            });
            let now = resolve_now(&scripted.server(None), "a/b", generation).unwrap();
            assert_eq!(now.as_json(), expected);
            assert_eq!(scripted.asked().len(), n_asked);
        };
        let calm = "{\"results\":[],\"last_seq\":\"9-x\"}";
        let row = "{\"results\":[{\"seq\":\"10-x\",\"id\":\"a\",\"changes\":[]}],\"last_seq\":\"10-x\"}";
        check(Generation::One, calm, "\"7-x\"", 1);
        check(Generation::Two, calm, "\"9-x\"", 2);
        check(Generation::Three, calm, "\"9-x\"", 2);
        check(Generation::Two, row, "\"7-x\"", 2);
        check(Generation::Three, row, "\"7-x\"", 2);
    }
}
