//! The stand-in's `_changes`: normal, long-poll and continuous, with filters, as the version lays them out.
//!
//! Guarantees that rows leave as soon as they are written, that every row's seq resumes right behind it, and
//! what CONTRACT §6 says about ends: a timeout and a deleted database both give a `last_seq` and a clean end.
//! Rows are gathered under the lock in small batches and written without it.

use std::io;
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::standin::couch::{FilterFunction, Flavour, State, World};
use crate::standin::docs::{Document, Refusal, quoted};
use crate::standin::http::{Answer, ChunkWriter, Request};
use crate::standin::quirks::{SPARED, take_one};
use crate::standin::routes::{self, Reply, standard_headers};
use crate::standin::selector;
use crate::standin::seqs;
use crate::standin::store::{Database, Place};
use crate::sys;

/// Documents looked at before the lock is given to others.
const BATCH_DOCS: usize = 200;
/// Longest time between two looks at whether the peer has gone.
const PEER_CHECK: Duration = Duration::from_millis(100);
/// `timeout` when none is given: the default of all versions.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Answers a `_changes` request, for as long as it stays open.
pub(crate) fn answer(world: &World, request: &Request, answer: Answer<'_>) {
    let flavour = world.lock().flavour;
    let opened = world.change(|state| Feed::open(state, request));
    let mut feed = match opened {
        Ok(feed) => feed,
        Err(refusal) => {
            // Nobody is left to be told when this fails.
            let _ = Reply::refusal(&refusal).send(flavour, request, answer);
            return;
        }
    };
    // Whoever counts open feeds means those of watched databases.
    let waits = feed.kind != FeedKind::Normal && feed.db != SPARED;
    if waits {
        world.change(|state| state.n_open_feeds += 1);
    }
    // An error means that the peer has gone, which ends the feed as well.
    let _ = feed.run(world, answer);
    if waits {
        world.change(|state| state.n_open_feeds -= 1);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FeedKind {
    Normal,
    LongPoll,
    Continuous,
}

enum Filter {
    None,
    DocIds(Vec<String>),
    Design,
    Selector(Value),
    Function(FilterFunction),
}

/// One request, while it lasts.
struct Feed {
    request: Request,
    kind: FeedKind,
    flavour: Flavour,
    db: String,
    incarnation: u64,
    /// Everything up to here was given, or dropped by the filter.
    at: Place,
    /// Where a normal feed ends: what there was when it began.
    end: Place,
    filter: Filter,
    limit: usize,
    timeout: Duration,
    heartbeat: Option<Duration>,
    include_docs: bool,
    conflicts: bool,
    all_leaves: bool,
    /// Rows but every so-manieth have no seq.
    seq_every: u64,
    n_rows: usize,
    /// Changes ahead when it began: `pending` of `_doc_ids` on 3.x counts from there.
    n_ahead: usize,
}

/// The times of a request that stays open.
struct Clock {
    /// When the last row was given, or it first had to wait.
    quiet_since: Instant,
    last_beat: Instant,
    /// Whether it has been at the end of what there is.
    waiting: bool,
}

/// What a look at the database gave.
enum Look {
    /// Some documents were looked at; the rows of those that passed.
    Rows(String),
    /// Nothing left for now.
    Dry,
    /// The database is gone, or another one has its name.
    Gone,
    /// Rows, then a filter function threw.
    Thrown(String, String),
}

impl Feed {
    fn open(state: &mut State, request: &Request) -> Result<Feed, Refusal> {
        let who = routes::login(state, request)?;
        let name = request.segments().swap_remove(0);
        let flavour = state.flavour;
        routes::database(state, &name, &who)?;
        let filter = open_filter(state, &name, request)?;
        let db = &state.databases[&name];
        let number = |key: &str| request.query_value(key).and_then(|value| value.parse::<u64>().ok());
        let spared = name == SPARED;
        let rewind = !spared && take_one(&mut state.quirks.rewinds);
        let since = if rewind { "0" } else { request.query_value("since").unwrap_or("0") };
        if since != "0" && !spared && take_one(&mut state.quirks.unknown_seqs) {
            return Err(seqs::unknown(flavour));
        }
        let at = seqs::read(db, flavour, since)?;
        let limit = number("limit").map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let heartbeat = match request.query_value("heartbeat") {
            Some("true") => Some(TIMEOUT),
            _ => number("heartbeat").map(Duration::from_millis),
        };
        Ok(Feed {
            kind: match request.query_value("feed") {
                Some("continuous") => FeedKind::Continuous,
                Some("longpoll") => FeedKind::LongPoll,
                _ => FeedKind::Normal,
            },
            flavour,
            incarnation: db.incarnation,
            end: db.end(),
            n_ahead: db.n_after(&at),
            at,
            filter,
            // 1.x looks whether the limit is reached only after a row.
            limit: if flavour == Flavour::V1 { limit.max(1) } else { limit },
            timeout: number("timeout").map_or(TIMEOUT, Duration::from_millis),
            heartbeat,
            include_docs: request.query_value("include_docs") == Some("true"),
            conflicts: request.query_value("conflicts") == Some("true"),
            all_leaves: request.query_value("style") == Some("all_docs"),
            seq_every: state.quirks.seq_every.or_else(|| number("seq_interval")).unwrap_or(1).max(1),
            n_rows: 0,
            db: name,
            request: request.clone(),
        })
    }

    fn run(&mut self, world: &World, answer: Answer<'_>) -> io::Result<()> {
        let first = self.look(&mut world.lock());
        if let (Look::Thrown(_, reason), false) = (&first, self.flavour == Flavour::V1) {
            let refusal = Refusal::new(500, "compilation_error", reason);
            return Reply::refusal(&refusal).send(self.flavour, &self.request, answer);
        }
        let mut headers = standard_headers(self.flavour, &self.request);
        if self.kind == FeedKind::Normal {
            headers.push(("ETag", "\"7DYW4RDUP4PDYQHF8EEFMOOV3\""));
        }
        let left = world.lock().quirks.cut_feeds_after.filter(|_| self.db != SPARED);
        let mut out = Out { writer: answer.stream(200, &headers)?, left };
        if self.kind != FeedKind::Continuous {
            out.write("{\"results\":[\n")?;
        }
        if !self.give(world, &mut out, first)? {
            return hang(world, &out);
        }
        let last = self.last_line(&mut world.lock());
        out.write(&last)?;
        out.writer.finish()
    }

    /// Gives rows until the feed ends; false when it is to stay open and silent for ever.
    fn give(&mut self, world: &World, out: &mut Out<'_>, first: Look) -> io::Result<bool> {
        let mut first = Some(first);
        let mut clock = Clock { quiet_since: sys::now(), last_beat: sys::now(), waiting: false };
        loop {
            let mut state = world.lock();
            match first.take().unwrap_or_else(|| self.look(&mut state)) {
                Look::Rows(rows) => {
                    let never_ends = state.quirks.filtered_feeds_never_end && clock.waiting;
                    drop(state);
                    out.write(&rows)?;
                    if never_ends && rows.is_empty() && self.flavour != Flavour::V1 {
                        out.write("\n")?;
                    }
                    if never_ends || !rows.is_empty() {
                        clock.quiet_since = sys::now();
                    }
                    if self.n_rows >= self.limit {
                        return Ok(true);
                    }
                }
                Look::Thrown(rows, reason) => {
                    drop(state);
                    out.write(&rows)?;
                    let reason = quoted(&reason);
                    out.write(&format!("{{\"error\":\"compilation_error\",\"reason\":{reason}}}\n"))?;
                    // 1.7.1 leaves the socket open behind its error; later versions close it.
                    return if self.flavour == Flavour::V1 { Ok(false) } else { Err(gone()) };
                }
                Look::Gone => return Ok(!state.quirks.feeds_outlive_database),
                Look::Dry if !self.goes_on() => return Ok(true),
                Look::Dry => {
                    if self.wait(world, state, out, &mut clock)? {
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// Waits for the next thing to happen; true when the timeout has come.
    fn wait(
        &self,
        world: &World,
        state: MutexGuard<'_, State>,
        out: &mut Out<'_>,
        clock: &mut Clock,
    ) -> io::Result<bool> {
        let now = sys::now();
        if state.stopped || out.writer.peer_gone() {
            return Err(gone());
        }
        if !clock.waiting {
            clock.waiting = true;
            clock.quiet_since = now;
            // 3.x sends an empty line when it begins to wait without having given a row (seen on 3.5.0).
            if self.n_rows == 0 && self.flavour == Flavour::V3 {
                drop(state);
                return out.write("\n").map(|()| false);
            }
        }
        let deadline = match self.heartbeat {
            Some(heartbeat) => clock.last_beat + heartbeat,
            None => clock.quiet_since + self.timeout,
        };
        if now < deadline {
            drop(world.wait(state, (deadline - now).min(PEER_CHECK)));
            return Ok(false);
        }
        drop(state);
        // A heartbeat switches the timeout off.
        if self.heartbeat.is_some() {
            clock.last_beat = now;
            out.write("\n")?;
        }
        Ok(self.heartbeat.is_none())
    }

    /// Whether a feed with nothing more to give stays open.
    fn goes_on(&self) -> bool {
        match self.kind {
            FeedKind::Normal => false,
            FeedKind::LongPoll => self.n_rows == 0 && self.limit > 0,
            FeedKind::Continuous => self.limit > 0,
        }
    }

    fn look(&mut self, state: &mut State) -> Look {
        let State { databases, rng, quirks, n_scanned, .. } = state;
        let Some(db) = databases.get(&self.db).filter(|db| db.incarnation == self.incarnation) else {
            return Look::Gone;
        };
        let end = (self.kind == FeedKind::Normal).then(|| self.end.clone());
        let (mut rows, mut n_looked_at) = (String::new(), 0);
        while n_looked_at < BATCH_DOCS && self.n_rows < self.limit {
            let mut place = self.at.clone();
            let Some((id, doc)) = db.next(&mut place, end.as_ref(), &mut |n| rng.usize(..n)) else { break };
            n_looked_at += 1;
            *n_scanned += 1;
            match self.passes(&id, doc) {
                Err(reason) => return Look::Thrown(rows, reason),
                Ok(passes) => {
                    self.at = place;
                    if passes {
                        self.n_rows += 1;
                        let seq = self.row_seq(rng.u32(..));
                        let null_doc =
                            self.include_docs && self.db != SPARED && take_one(&mut quirks.null_docs);
                        rows.push_str(&self.row(&seq, &id, doc, null_doc));
                    }
                }
            }
        }
        if n_looked_at == 0 { Look::Dry } else { Look::Rows(rows) }
    }

    fn row_seq(&self, salt: u32) -> String {
        if !(self.n_rows as u64).is_multiple_of(self.seq_every) {
            return "null".to_owned();
        }
        seqs::spell(self.flavour, self.incarnation, &self.at, salt, true)
    }

    fn row(&self, seq: &str, id: &str, doc: &Document, null_doc: bool) -> String {
        let winner = doc.winner();
        let revs = if self.all_leaves { doc.leaves() } else { vec![winner.clone()] };
        let revs: Vec<String> = revs.iter().map(|rev| format!("{{\"rev\":\"{rev}\"}}")).collect();
        let mut row = match (self.kind, self.n_rows, self.flavour) {
            (FeedKind::Continuous, ..) | (_, 1, _) => String::new(),
            (_, _, Flavour::V1) => ",\n".to_owned(),
            _ => ",\r\n".to_owned(),
        };
        row.push_str(&format!("{{\"seq\":{seq},\"id\":{},\"changes\":[{}]", quoted(id), revs.join(",")));
        if doc.is_deleted(winner) {
            row.push_str(",\"deleted\":true");
        }
        if self.include_docs {
            let json = doc.json(id, winner, self.conflicts).filter(|_| !null_doc);
            row.push_str(&format!(",\"doc\":{}", json.as_deref().unwrap_or("null")));
        }
        row.push_str(if self.kind == FeedKind::Continuous { "}\n" } else { "}" });
        row
    }

    fn passes(&self, id: &str, doc: &Document) -> Result<bool, String> {
        let value = || -> Value {
            let json = doc.json(id, doc.winner(), false).unwrap_or_default();
            serde_json::from_str(&json).unwrap_or_default()
        };
        match &self.filter {
            Filter::None => Ok(true),
            Filter::DocIds(ids) => Ok(ids.iter().any(|wanted| wanted == id)),
            Filter::Design => Ok(id.starts_with("_design/")),
            Filter::Selector(wanted) => selector::matches(wanted, &value()).map_err(|refusal| refusal.reason),
            Filter::Function(function) => function(&value(), &self.request),
        }
    }

    /// What ends the body: where to go on from, and how much is left.
    fn last_line(&self, state: &mut State) -> String {
        let mut at = self.at.clone();
        let (mut n_left, salt) = (0, state.rng.u32(..));
        let n_skips = state.quirks.last_seq_skips;
        if let Some(db) = state.databases.get(&self.db).filter(|db| db.incarnation == self.incarnation) {
            let full = self.n_rows >= self.limit;
            match &self.filter {
                Filter::DocIds(ids) if full && self.flavour == Flavour::V1 && ids.len() <= 100 => {
                    at = db.end()
                }
                Filter::None => {}
                _ if full => self.skip(db, &mut at, n_skips),
                _ => {}
            }
            n_left = match self.filter {
                Filter::DocIds(_) | Filter::Design if self.flavour == Flavour::V3 => {
                    self.n_ahead.saturating_sub(self.n_rows)
                }
                _ => db.n_after(&at),
            };
        }
        // Shards that are not asked for rows give 2.x no ids.
        let with_ids = self.limit > 0;
        let seq = seqs::spell(self.flavour, self.incarnation, &at, salt, with_ids);
        let pending =
            if self.flavour == Flavour::V1 { String::new() } else { format!(",\"pending\":{n_left}") };
        if self.kind == FeedKind::Continuous {
            return format!("{{\"last_seq\":{seq}{pending}}}\n\n");
        }
        format!("\n],\n\"last_seq\":{seq}{pending}}}\n\n")
    }

    /// Moves a place behind the next `n_skips` rows that would have passed.
    fn skip(&self, db: &Database, at: &mut Place, n_skips: usize) {
        let mut n_left = n_skips;
        while n_left > 0 {
            let Some((id, doc)) = db.next(at, Some(&self.end), &mut |_| 0) else { return };
            n_left -= usize::from(self.passes(&id, doc).unwrap_or(false));
        }
    }
}

fn open_filter(state: &State, db: &str, request: &Request) -> Result<Filter, Refusal> {
    let bad = |reason: &str| Refusal::new(400, "bad_request", reason);
    let Some(name) = request.query_value("filter") else { return Ok(Filter::None) };
    let body = || routes::json::<Value>(&request.body);
    match name {
        "_doc_ids" => {
            let given = match request.query_value("doc_ids") {
                Some(ids) => routes::json(ids.as_bytes())?,
                None => body()?.get("doc_ids").cloned().unwrap_or_default(),
            };
            let ids = serde_json::from_value(given);
            let reason = match state.flavour {
                Flavour::V1 => "`doc_ids` filter parameter is not a list.",
                _ => "`doc_ids` filter parameter is not a list of doc ids.",
            };
            ids.map(Filter::DocIds).map_err(|_| bad(reason))
        }
        "_selector" if state.flavour != Flavour::V1 => {
            let wanted = body()?.get("selector").cloned().unwrap_or_default();
            selector::matches(&wanted, &Value::Object(serde_json::Map::new()))?;
            Ok(Filter::Selector(wanted))
        }
        "_design" => Ok(Filter::Design),
        "_view" => {
            let view = request.query_value("view").unwrap_or_default();
            function(state, db, view, "views").map(Filter::Function)
        }
        _ if name.starts_with('_') => Err(bad("unknown builtin filter name")),
        _ => function(state, db, name, "filters").map(Filter::Function),
    }
}

fn function(state: &State, db: &str, name: &str, kind: &str) -> Result<FilterFunction, Refusal> {
    if let Some(function) = state.filters.get(name) {
        return Ok(FilterFunction::clone(function));
    }
    let Some((ddoc_id, name)) = name.split_once('/') else {
        let reason = match state.flavour {
            Flavour::V1 => "filter parameter must be of the form `designname/filtername`",
            _ => "`filter` must be of the form `designname/filtername`",
        };
        return Err(Refusal::new(400, "bad_request", reason));
    };
    let ddoc_id = format!("_design/{ddoc_id}");
    let reason = match state.databases[db].doc(&ddoc_id) {
        None => "missing".to_owned(),
        Some(ddoc) if ddoc.is_deleted(ddoc.winner()) => "deleted".to_owned(),
        Some(ddoc) => {
            let json = ddoc.json(&ddoc_id, ddoc.winner(), false).unwrap_or_default();
            let members: Value = serde_json::from_str(&json).unwrap_or_default();
            let missing = if members.get(kind).is_some() { name } else { kind };
            format!("missing json key: {missing}")
        }
    };
    Err(Refusal::new(404, "not_found", reason))
}

/// A chunked body that may have to be cut after so many bytes.
struct Out<'a> {
    writer: ChunkWriter<'a>,
    left: Option<usize>,
}

impl Out<'_> {
    fn write(&mut self, text: &str) -> io::Result<()> {
        let Some(left) = self.left else { return self.writer.write(text.as_bytes()) };
        let n_bytes = text.len().min(left);
        self.left = Some(left - n_bytes);
        self.writer.write(&text.as_bytes()[..n_bytes])?;
        if n_bytes < text.len() { Err(gone()) } else { Ok(()) }
    }
}

fn gone() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

/// Stays open and silent until the peer goes or the server stops.
fn hang(world: &World, out: &Out<'_>) -> io::Result<()> {
    let mut state = world.lock();
    while !state.stopped && !out.writer.peer_gone() {
        state = world.wait(state, PEER_CHECK);
    }
    Err(gone())
}
