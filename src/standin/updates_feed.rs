//! The stand-in's `_db_updates`: what happened to databases, and the feed that tells it.
//!
//! Guarantees the shapes of the versions (CONTRACT §7, seen on 1.7.1, 2.3.1 and 3.5.0): 1.x tells what happens while
//! the request is open and nothing of before; 2.x and 3.x tell out of `_global_changes`, which must have been made, each
//! database and kind once at its newest, and send no byte, not even a status, before there is something to send.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::standin::couch::{Flavour, State, World};
use crate::standin::docs::{Refusal, quoted};
use crate::standin::http::{Answer, ChunkWriter, Request, locked};
use crate::standin::routes::{self, Reply, standard_headers};
use crate::sys;

/// What `_db_updates` is made of on 2.x and 3.x.
const GLOBAL_CHANGES: &str = "_global_changes";
/// Events kept; older ones are dropped.
const EVENTS_MAX: usize = 100_000;
/// Longest time between two looks at whether the peer has gone.
const PEER_CHECK: Duration = Duration::from_millis(100);
/// `timeout` and `heartbeat` when none is given.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What happened, shared by all databases of a stand-in.
#[derive(Debug, Clone, Default)]
pub(crate) struct News(Arc<Mutex<Log>>);

#[derive(Debug, Default)]
struct Log {
    /// The number of the newest event.
    last: u64,
    events: VecDeque<Event>,
}

#[derive(Debug, Clone)]
struct Event {
    n: u64,
    kind: &'static str,
    db: Arc<str>,
}

impl News {
    /// Something happened to a database.
    pub(crate) fn note(&self, kind: &'static str, db: &str) {
        let mut log = locked(&self.0);
        log.last += 1;
        if log.events.len() == EVENTS_MAX {
            log.events.pop_front();
        }
        let n = log.last;
        log.events.push_back(Event { n, kind, db: db.into() });
    }

    fn last(&self) -> u64 {
        locked(&self.0).last
    }

    /// What happened behind a place, in order; `once`: each database and kind at its newest alone.
    fn after(&self, place: u64, once: bool) -> Vec<Event> {
        let log = locked(&self.0);
        let events = log.events.iter().rev().take_while(|event| event.n > place);
        let mut told = HashSet::new();
        let fresh = |event: &&Event| !once || told.insert((event.kind, Arc::clone(&event.db)));
        let mut after: Vec<Event> = events.filter(fresh).cloned().collect();
        after.reverse();
        after
    }
}

/// Answers a `_db_updates` request, for as long as it stays open.
pub(crate) fn answer(world: &World, request: &Request, answer: Answer<'_>) {
    let flavour = world.lock().flavour;
    match world.change(|state| Feed::open(state, request)) {
        // An error means that the peer has gone, which ends the feed as well.
        Ok(mut feed) => drop(feed.run(world, request, answer)),
        Err(refusal) => drop(Reply::refusal(&refusal).send(flavour, request, answer)),
    }
}

struct Feed {
    flavour: Flavour,
    news: News,
    is_continuous: bool,
    at: u64,
    limit: usize,
    heartbeat: Option<Duration>,
    timeout: Duration,
}

impl Feed {
    fn open(state: &mut State, request: &Request) -> Result<Feed, Refusal> {
        let who = routes::login(state, request)?;
        routes::need_admin(&who)?;
        let old = state.flavour == Flavour::V1;
        if !old && !state.databases.contains_key(GLOBAL_CHANGES) {
            return Err(Refusal::new(404, "not_found", "Database does not exist."));
        }
        let number = |name: &str| request.query_value(name).and_then(|value| value.parse::<u64>().ok());
        let is_continuous = request.query_value("feed") == Some("continuous");
        let timeout = number("timeout").map_or(TIMEOUT, Duration::from_millis);
        let at = match request.query_value("since").unwrap_or("0") {
            _ if old => state.news.last(),
            "now" => state.news.last(),
            since => since.split('-').next().and_then(|n| n.parse().ok()).unwrap_or(0),
        };
        Ok(Feed {
            flavour: state.flavour,
            news: state.news.clone(),
            is_continuous,
            at,
            limit: number("limit").map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)),
            // 1.x: whatever is asked for, at every timeout.
            heartbeat: match (old, is_continuous) {
                (true, continuous) => continuous.then_some(timeout),
                (false, _) => number("heartbeat").map(Duration::from_millis),
            },
            timeout,
        })
    }

    fn run(&mut self, world: &World, request: &Request, answer: Answer<'_>) -> io::Result<()> {
        let headers = standard_headers(self.flavour, request);
        if !self.is_continuous && self.flavour != Flavour::V1 {
            return self.page(world, &headers, answer);
        }
        let mut out = Out { answer: Some(answer), headers, writer: None };
        if self.flavour == Flavour::V1 {
            out.write("")?;
        }
        self.follow(world, &mut out)?;
        let last = match (self.flavour, self.is_continuous) {
            (Flavour::V1, _) => "\n".to_owned(),
            _ => format!("{{\"last_seq\":{}}}\n", self.seq(self.at)),
        };
        out.write(&last)?;
        out.writer.map_or(Ok(()), ChunkWriter::finish)
    }

    fn page(&self, world: &World, headers: &[(&str, &str)], answer: Answer<'_>) -> io::Result<()> {
        let dropped = world.lock().quirks.drop_updates;
        let mut events = self.news.after(self.at, true);
        events.truncate(if dropped { 0 } else { self.limit });
        let last = events.last().map_or(self.at, |event| event.n);
        let rows: Vec<String> = events.iter().map(|event| self.row(event)).collect();
        let body = format!(
            "{{\"results\":[\n{}\n],\n\"last_seq\":{}}}\n\n",
            rows.join(",\r\n"),
            self.seq(if events.is_empty() { self.news.last() } else { last })
        );
        answer.send(200, headers, body.as_bytes())
    }

    /// Tells what happens until the timeout, or for ever with a heartbeat.
    fn follow(&mut self, world: &World, out: &mut Out<'_>) -> io::Result<()> {
        let mut quiet_since = sys::now();
        loop {
            let state = world.lock();
            if state.stopped || out.peer_gone() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let events = self.news.after(self.at, self.flavour != Flavour::V1);
            if let Some(last) = events.last() {
                self.at = last.n;
                let dropped = state.quirks.drop_updates;
                drop(state);
                if !dropped {
                    let lines: String = events.iter().map(|event| self.row(event) + "\n").collect();
                    out.write(&lines)?;
                    quiet_since = sys::now();
                    if self.flavour == Flavour::V1 && !self.is_continuous {
                        return Ok(());
                    }
                }
                continue;
            }
            let deadline: Instant = quiet_since + self.heartbeat.unwrap_or(self.timeout);
            let now = sys::now();
            if now < deadline {
                drop(world.wait(state, (deadline - now).min(PEER_CHECK)));
                continue;
            }
            drop(state);
            if self.heartbeat.is_none() {
                return Ok(());
            }
            out.write("\n")?;
            quiet_since = now;
        }
    }

    fn row(&self, event: &Event) -> String {
        let (kind, db) = (event.kind, quoted(&event.db));
        match self.flavour {
            Flavour::V1 => format!("{{\"type\":\"{kind}\",\"db_name\":{db}}}"),
            _ => format!("{{\"db_name\":{db},\"type\":\"{kind}\",\"seq\":{}}}", self.seq(event.n)),
        }
    }

    fn seq(&self, n: u64) -> String {
        format!("\"{n}-g1AAAAupd\"")
    }
}

/// A body whose head is sent with its first bytes.
struct Out<'a> {
    answer: Option<Answer<'a>>,
    headers: Vec<(&'static str, &'static str)>,
    writer: Option<ChunkWriter<'a>>,
}

impl Out<'_> {
    fn write(&mut self, text: &str) -> io::Result<()> {
        if let Some(answer) = self.answer.take() {
            self.writer = Some(answer.stream(200, &self.headers)?);
        }
        self.writer.as_mut().map_or(Ok(()), |writer| writer.write(text.as_bytes()))
    }

    fn peer_gone(&self) -> bool {
        match (&self.answer, &self.writer) {
            (Some(answer), _) => answer.peer_gone(),
            (None, Some(writer)) => writer.peer_gone(),
            (None, None) => true,
        }
    }
}
