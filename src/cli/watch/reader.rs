//! The reading thread of `watch`: as `pipeline::feed_reader`, but it writes nothing to CouchDB.
//!
//! Guarantees that only `GET`s and `POST`s to `_changes` are sent. Without a mark in the database a re-creation is
//! noticed only when the database was missing in between, or, from 3.3 on, by its creation time.

use std::ops::ControlFlow;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::Deserialize;

use crate::config::{Filter, Hookd, Webhook};
use crate::couch::client::{Generation, Server, db_path};
use crate::couch::feed::{self, Feed, FeedCloser, FeedEnd, FeedKind, FeedRequest};
use crate::error::{Error, Kind, Result};
use crate::pure::changes::Item;
use crate::pure::checkpoint::Mark;
use crate::pure::flow::{Opened, Read, ReadFault};
use crate::pure::format::Format;
use crate::pure::message::{Arrived, Telling};
use crate::pure::seq::Seq;
use crate::sys::{self, Thread};

/// A feed without filter that is silent for this much longer than its `timeout` is dead.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);
/// A filtered page may scan for long before its first byte.
const FILTERED_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// A row may be this much longer than the longest document that is kept, in bytes.
const ROW_MARGIN: usize = 64 * 1024;
/// Batches of rows on their way.
const ROWS_MAX: usize = 2;

/// A place to go on from, and what was delivered beyond it.
pub(crate) type Position = (Seq, Vec<u64>);

/// What the reader gives.
pub(crate) enum Fed {
    Opened(Opened),
    Rows(Vec<Arrived>),
    End { last_seq: Option<Seq>, pending: Option<u64>, closed: bool },
    Failed(ReadFault, Error),
}

/// The running thread.
pub(crate) struct Reader {
    pub(crate) fed: Receiver<Fed>,
    orders: Sender<(Read, Option<Position>)>,
    closer: FeedCloser,
    thread: Thread,
}

impl Reader {
    /// Starts it; it reads nothing yet. `since` counts for the first opening, `None` is now.
    pub(crate) fn start(
        server: &Server,
        hookd: &Hookd,
        webhook: &Webhook,
        telling: Telling,
        since: Option<Seq>,
    ) -> Result<Reader> {
        let feed = Feed::new(server);
        let closer = feed.closer();
        let (orders, ordered) = bounded(1);
        let (to, fed) = bounded(ROWS_MAX);
        let state = State {
            server: server.clone(),
            filter: webhook.filter.clone(),
            timeout: hookd.feed_timeout,
            feed,
            telling,
            to,
            since,
            fresh: true,
            mark: Mark::new(sys::random_bytes()),
            created: None,
        };
        let thread = sys::spawn("feed:watch", move || state.run(&ordered))?;
        Ok(Reader { fed, orders, closer, thread })
    }

    /// Orders one reading; an opening goes on from `position`.
    pub(crate) fn read(&self, read: Read, position: Option<Position>) {
        self.orders.try_send((read, position)).expect("a flow orders one reading at a time");
    }

    /// Ends what is being read.
    pub(crate) fn close(&self) {
        self.closer.close();
    }

    /// Ends the thread; to be joined, when it has ended, by the caller.
    pub(crate) fn stop(self) -> Thread {
        self.closer.close();
        self.thread
    }
}

/// `GET /DB`, as far as it is looked at.
#[derive(Deserialize)]
struct Info {
    doc_count: u64,
    #[serde(default)]
    instance_start_time: Option<String>,
}

struct State {
    server: Server,
    filter: Option<Filter>,
    timeout: Duration,
    feed: Feed,
    telling: Telling,
    to: Sender<Fed>,
    /// Where to begin; `None`: now, until that is known.
    since: Option<Seq>,
    /// Whether nothing of this database was read yet, so that no position is one in it.
    fresh: bool,
    /// Made up: stands in `webhook-id`s, and is never stored.
    mark: Mark,
    /// 3.3 and later: when the database was made.
    created: Option<String>,
}

impl State {
    fn run(mut self, ordered: &Receiver<(Read, Option<Position>)>) {
        while let Ok((read, position)) = ordered.recv() {
            let fed = match read {
                Read::Open => self.open(position),
                Read::Page { since, limit } => {
                    self.read(since, FeedKind::Page { limit: u32::try_from(limit).unwrap_or(u32::MAX) })
                }
                Read::Wait { since } => self.read(since, FeedKind::Continuous { timeout: self.timeout }),
            };
            if self.to.send(fed.unwrap_or_else(|error| Fed::Failed(fault_of(&error), error))).is_err() {
                return;
            }
        }
    }

    fn open(&mut self, position: Option<Position>) -> Result<Fed> {
        let generation = self.server.welcome()?.generation;
        if generation == Generation::One && matches!(self.filter, Some(Filter::Selector(_))) {
            let found =
                "a selector needs CouchDB 2.0 or later, and this server is older; use --filter ddoc/name";
            return Err(Error::new(Kind::BadRequest, found));
        }
        let info: Info = match self.server.get_json(&db_path(&self.telling.db, &[])) {
            Err(error) if error.kind() == Kind::NotFound && !self.fresh => {
                // Whatever appears under this name is another database.
                self.forget();
                return Err(error);
            }
            info => info?,
        };
        let created = info.instance_start_time.filter(|_| generation == Generation::Three);
        if self.created.is_some() && self.created != created {
            self.forget();
        }
        self.created = created;
        let since = match &self.since {
            Some(since) => since.clone(),
            None => feed::resolve_now(&self.server, &self.telling.db, generation)?,
        };
        self.since = Some(since.clone());
        let place = position.filter(|_| !self.fresh).unwrap_or_else(|| (since, Vec::new()));
        self.fresh = false;
        Ok(Fed::Opened(Opened {
            mark: self.mark.to_string(),
            checkpoint: Some(place),
            rev: None,
            recreated: false,
            doc_count: info.doc_count,
            conflicted: None,
        }))
    }

    /// The database is gone: the next one of its name is read from its beginning.
    fn forget(&mut self) {
        self.mark = Mark::new(sys::random_bytes());
        self.created = None;
        self.since = Some(Seq::zero());
        self.fresh = true;
    }

    fn read(&mut self, since: Seq, kind: FeedKind) -> Result<Fed> {
        let filtered = self.filter.is_some();
        let is_page = matches!(kind, FeedKind::Page { .. });
        let request = FeedRequest {
            db: self.telling.db.clone(),
            since,
            kind,
            filter: self.filter.clone(),
            include_docs: self.telling.include_docs,
            conflicts: self.telling.conflicts,
            doc_bytes_max: self.telling.payload_bytes_max + ROW_MARGIN,
            keeps_lines: self.telling.format == Format::Raw,
            silence: (!filtered).then_some(self.timeout + SILENCE_MARGIN),
            deadline: (filtered && is_page).then_some(FILTERED_DEADLINE),
        };
        let (mark, telling, to) = (self.mark.to_string(), &self.telling, &self.to);
        let mut end = (None, None);
        let result = self.feed.read(&request, &mut |items: &mut Vec<Item>| {
            let read_at = sys::wall();
            let mut rows = Vec::with_capacity(items.len());
            for item in items.drain(..) {
                match item {
                    Item::Row(row) => rows.push(telling.arrived(row, &mark, read_at)),
                    Item::End { last_seq, pending } => end = (last_seq, pending),
                    // The feed makes an error of it.
                    Item::Fault { .. } => {}
                }
            }
            match rows.is_empty() || to.send(Fed::Rows(rows)).is_ok() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        })?;
        Ok(Fed::End { last_seq: end.0, pending: end.1, closed: result != FeedEnd::Complete })
    }
}

fn fault_of(error: &Error) -> ReadFault {
    match error.kind() {
        Kind::BadRequest | Kind::Server | Kind::Malformed => ReadFault::Refused,
        _ => ReadFault::Lost,
    }
}
