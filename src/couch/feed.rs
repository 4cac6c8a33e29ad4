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
    buffer: Vec<u8>,
}

/// Ends a feed's request from another thread.
#[derive(Clone)]
pub struct FeedCloser {
    cutter: Cutter,
}

impl FeedCloser {
    /// Ends the request under way with [`FeedEnd::Closed`]; when there is none, the next one at once. The feed can
    /// make new requests afterwards. A wait for the login gate is not cut short; it lasts as long as one `GET /`.
    pub fn close(&self) {
        self.cutter.cut();
    }
}

impl Feed {
    /// Prepares a feed; sends nothing.
    pub fn new(server: &Server) -> Feed {
        Feed { line: server.line(), server: server.clone(), buffer: vec![0; READ_BYTES] }
    }

    /// What ends this feed's requests; may be copied and sent to other threads.
    pub fn closer(&self) -> FeedCloser {
        FeedCloser { cutter: self.line.cutter() }
    }

    /// Makes one request and hands its items over after every read, until it ends. `on_items` gets only rows and
    /// ends, in the order they came, and may leave the vector as it is or take them out.
    ///
    /// # Errors
    /// `NotFound` only when the database itself is gone. `BadSince` when the position is not of this server.
    /// `BadRequest` for a missing design document or filter. `Server` also for a fault inside an answer (items
    /// before it were handed over). `Malformed` for what is not CouchDB's, or ends in the middle. `Timeout` for
    /// silence and the deadline. Else as [`Server::request`].
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
            .or_else(|error| Err(self.explain(error, request)))?;
        let shape = match request.kind {
            FeedKind::Page { .. } => Shape::Page,
            FeedKind::Continuous { .. } => Shape::Lines,
        };
        let mut parser = Parser::new(shape, request.doc_bytes_max);
        let mut items = Vec::new();
        loop {
            let n_bytes = self.line.read(&mut incoming, &mut self.buffer)?;
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
        let cause = error.cause();
        let is_bad_since = match error.kind() {
            Kind::BadRequest => cause.contains("'since'"),
            // 1.x and the backend port of 2.x: `list_to_integer` of what is none.
            Kind::Server => {
                cause.ends_with(": badarg") && request.since.as_since().bytes().any(|b| !b.is_ascii_digit())
            }
            Kind::NotFound => {
                return match self.server.request(&Method::GET, &db_path(&request.db, &[]), None, &[]) {
                    // The database is there: the design document or the filter is not.
                    Ok(_) => Error::new(Kind::BadRequest, cause),
                    Err(gone) => gone,
                };
            }
            _ => false,
        };
        if is_bad_since { Error::new(Kind::BadSince, cause) } else { error }
    }
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
