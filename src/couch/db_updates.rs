//! `_db_updates`: hints about which databases changed, as CouchDB gives them.
//!
//! Guarantees that a missing `_global_changes` (404 to a page; to an open request 404, or no answer at all: CONTRACT §7)
//! is told apart from a server that is down; that on 2.x and 3.x a connection that was lost goes on behind its last
//! line; and that a blocked read can be woken. Hints are not proof: CouchDB itself loses some. When to try again is
//! left to the caller. Needs a server admin.

use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::couch::client::{Generation, Limits, Line, Server, encoded};
use crate::couch::feed::FeedCloser;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::db_update::{self, Lines};
use crate::pure::hint::Hint;
use crate::pure::seq::Seq;

/// CouchDB gives a sign of life so often; 1.x takes it for its `timeout`, which does the same there.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Without a byte for so long the connection is dead. The first one may take two heartbeats (`start_delayed_json_response`).
const SILENCE: Duration = Duration::from_secs(45);
/// For the page that finds out whether there is anything to follow.
const PAGE_DEADLINE: Duration = Duration::from_secs(30);
/// The piece of an answer that is read at once, in bytes.
const READ_BYTES: usize = 16 * 1024;

/// What is heard.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// CouchDB has answered: from now on its hints come.
    Opened {
        /// They go on behind the last one that was heard; else those of the time before may be lost.
        goes_on: bool,
    },
    /// One hint.
    Hint(Hint),
    /// A line that cannot be read: anything may have changed.
    Damaged,
}

/// One follower of `_db_updates`, with a connection of its own.
pub struct DbUpdates {
    line: Line,
    server: Server,
    /// Behind what was heard; `None`: from now on, and it is not known whether there is anything to follow.
    since: Option<Seq>,
    buffer: Vec<u8>,
}

impl DbUpdates {
    /// Prepares it; sends nothing.
    pub fn new(server: &Server) -> DbUpdates {
        DbUpdates { line: server.line(), server: server.clone(), since: None, buffer: Vec::new() }
    }

    /// What ends a request from another thread.
    pub fn closer(&self) -> FeedCloser {
        FeedCloser::of(&self.line)
    }

    /// Follows until CouchDB ends the answer, or the closer does.
    ///
    /// # Errors
    /// `NotFound`: this server has nothing to follow: before 1.4 no `_db_updates`, from 2.0 on no `_global_changes`.
    /// `Forbidden` when we are no server admin. `Timeout` for silence, `Cut` for a lost connection, `Server` for a
    /// fault inside the answer. Else as [`Server::request`].
    pub fn follow(&mut self, on_heard: &mut dyn FnMut(Heard)) -> Result<()> {
        if self.line.take_cut() {
            return Ok(());
        }
        match self.follow_once(on_heard) {
            Err(_) if self.line.take_cut() => Ok(()),
            followed => followed.context(|| "failed to follow `_db_updates`".to_owned()),
        }
    }

    fn follow_once(&mut self, on_heard: &mut dyn FnMut(Heard)) -> Result<()> {
        let generation = self.server.welcome()?.generation;
        let goes_on = generation != Generation::One && self.since.is_some();
        if generation != Generation::One && !goes_on {
            self.since = Some(self.find_out(on_heard)?);
        }
        let since = self.since.as_ref().map_or_else(|| "now".to_owned(), Seq::as_since);
        let heartbeat = HEARTBEAT.as_millis();
        let path = format!(
            "/_db_updates?feed=continuous&heartbeat={heartbeat}&timeout={heartbeat}&since={}",
            encoded(&since)
        );
        let limits = Limits { silence: Some(SILENCE), deadline: None, ..Limits::default() };
        let mut incoming = match self.line.request(&Method::GET, &path, None, limits) {
            Ok(incoming) => incoming,
            Err(error) => {
                // A server that answers but not this may have nothing to follow any more, or another
                // `_global_changes` than the position is of: the next try finds out first.
                self.since = None;
                return Err(absent(error));
            }
        };
        on_heard(Heard::Opened { goes_on });
        let mut lines = Lines::default();
        self.buffer.resize(READ_BYTES, 0);
        loop {
            let n_bytes = self.line.read(&mut incoming, &mut self.buffer).map_err(cut_off)?;
            if n_bytes == 0 {
                return Ok(());
            }
            let (since, mut fault) = (&mut self.since, None);
            lines.push(&self.buffer[..n_bytes], |line| {
                let seq = match line {
                    db_update::Line::Hint { hint, seq } => {
                        on_heard(Heard::Hint(hint));
                        seq
                    }
                    db_update::Line::Other { seq } | db_update::Line::End { seq } => seq,
                    db_update::Line::Damaged => {
                        on_heard(Heard::Damaged);
                        None
                    }
                    db_update::Line::Fault { text } => {
                        fault = Some(Error::new(Kind::Server, format!("CouchDB broke off: {text}")));
                        None
                    }
                };
                if seq.is_some() {
                    *since = seq;
                }
            });
            if let Some(fault) = fault {
                return Err(fault);
            }
        }
    }

    /// Whether there is something to follow, and from where on. A page answers at once, with 404 where there is not.
    fn find_out(&self, on_heard: &mut dyn FnMut(Heard)) -> Result<Seq> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            results: Vec<Row>,
            last_seq: Option<Box<RawValue>>,
        }
        #[derive(Deserialize)]
        struct Row {
            db_name: String,
        }
        let limits = Limits { deadline: Some(PAGE_DEADLINE), ..Limits::default() };
        let path = "/_db_updates?since=now&limit=1";
        let reply = self.server.request_within(&Method::GET, path, None, &[], limits).map_err(absent)?;
        let page: Page = crate::couch::refusal::from_json(&reply.body)?;
        for row in page.results {
            on_heard(Heard::Hint(Hint::Updated(row.db_name)));
        }
        let last_seq = page.last_seq.and_then(|seq| Seq::from_json(seq.get()));
        last_seq
            .ok_or_else(|| Error::new(Kind::Malformed, "expected a page of `_db_updates` with a `last_seq`"))
    }
}

/// Before 1.4 the name is taken for a database's: 400 or 404.
fn absent(error: Error) -> Error {
    match error.kind() {
        Kind::BadRequest => Error::new(Kind::NotFound, error.cause()),
        _ => error,
    }
}

fn cut_off(error: Error) -> Error {
    match error.kind() {
        Kind::Unreachable => Error::new(Kind::Cut, format!("the answer was cut off ({})", error.cause())),
        _ => error,
    }
}
