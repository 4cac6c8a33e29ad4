//! A stand-in for CouchDB 1.7.1, 2.2.0 or 3.5.0: small, in memory, on loopback, and scriptable.
//!
//! Guarantees: answers laid out byte for byte like those recorded from the real servers; on 2.x and 3.x another
//! order of rows and other seqs at every request, each row's seq resuming exactly; on 1.x integers, the silent
//! miss behind the end, and a crash that takes back what was not committed. It does on demand what no real
//! server does on demand: see [`Quirks`]. Bodies keep every byte but blanks, so that a test can tell whether
//! somebody re-wrote them.
//! Leaves out: views, attachments, Mango queries, users in `_users`, anything that survives the process; replications
//! have the states that a test gives them (`replicator`), nothing is replicated. Documents, `_changes`, `_local`,
//! configuration and logins are what couch-hookd needs.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::{Error, Kind, Result};
use crate::standin::changes_feed;
use crate::standin::docs::{Incoming, Refusal, Rev};
use crate::standin::http::{Answer, Request, Server, locked};
use crate::standin::quirks::{FaultKind, Quirks};
use crate::standin::replicator::Replicator;
use crate::standin::routes::{self, Reply};
use crate::standin::store::Database;
use crate::standin::updates_feed::{self, News};
use crate::sys;

/// Requests kept in the log; older ones are dropped.
const REQUESTS_MAX: usize = 100_000;
/// Longest time between two looks at whether a waiting request's peer has gone.
const PEER_CHECK: Duration = Duration::from_millis(100);

/// Which CouchDB is stood in for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// 1.7.1.
    V1,
    /// 2.2.0.
    V2,
    /// 3.5.0.
    V3,
}

/// How to start a stand-in.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which version.
    pub flavour: Flavour,
    /// Misbehaviour from the start; more with [`StandIn::quirks`].
    pub quirks: Quirks,
    /// The server admin's name and password; without one everybody is admin.
    pub admin: Option<(String, String)>,
    /// Names and passwords of people who are no admins.
    pub users: Vec<(String, String)>,
    /// Port on 127.0.0.1; 0 takes a free one.
    pub port: u16,
    /// Shards of a new database on 2.x and 3.x (q).
    pub n_shards: usize,
    /// What the order of rows and the spelling of seqs are drawn from.
    pub seed: u64,
}

impl Options {
    /// No admin, no quirks, a free port, 8 shards on 2.x and 2 on 3.x as by their defaults.
    pub fn new(flavour: Flavour) -> Options {
        Options {
            flavour,
            quirks: Quirks::default(),
            admin: None,
            users: Vec::new(),
            port: 0,
            n_shards: if flavour == Flavour::V2 { 8 } else { 2 },
            seed: 1,
        }
    }
}

/// A request as the log keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    /// `GET`, `PUT`, …
    pub method: String,
    /// Path as it came, percent-encoded.
    pub path: String,
    /// Query, decoded.
    pub query: Vec<(String, String)>,
    /// When it had been read.
    pub at: Instant,
}

/// A document's winning revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Winner {
    /// `3-9f…`.
    pub rev: String,
    /// Whether it is a deletion.
    pub deleted: bool,
    /// The document as CouchDB writes it, `_id` and `_rev` first.
    pub json: String,
}

/// A running stand-in. Dropping it stops it.
pub struct StandIn {
    pub(crate) world: Arc<World>,
    server: Server,
}

impl StandIn {
    /// Starts one.
    ///
    /// # Errors
    /// `Io` when the port cannot be had.
    pub fn start(options: Options) -> Result<StandIn> {
        let listen = SocketAddr::from(([127, 0, 0, 1], options.port));
        let world = Arc::new(World { state: Mutex::new(State::new(options)), changed: Condvar::new() });
        let shared = Arc::clone(&world);
        let server = Server::start("couch", listen, move |request, answer| handle(&shared, request, answer))?;
        Ok(StandIn { world, server })
    }

    /// `http://127.0.0.1:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.address())
    }

    /// Makes a database; one that exists stays as it is.
    pub fn create_db(&self, db: &str) {
        self.world.change(|state| {
            let _ = state.create_db(db);
        });
    }

    /// Deletes a database; nothing when there is none.
    pub fn delete_db(&self, db: &str) {
        self.world.change(|state| state.delete_db(db));
    }

    /// Writes a document over whatever wins now, so that it never conflicts; its new revision.
    ///
    /// # Errors
    /// No such database, or `body` is no JSON object.
    pub fn put(&self, db: &str, id: &str, body: &Value) -> Result<String> {
        self.put_raw(db, id, &body.to_string())
    }

    /// As [`StandIn::put`]; the members of `body` are kept byte for byte, but for blanks between them.
    ///
    /// # Errors
    /// No such database, or `body` is no JSON object.
    pub fn put_raw(&self, db: &str, id: &str, body: &str) -> Result<String> {
        self.write(db, id, body, false)
    }

    /// Deletes the winning revision; the tombstone's revision.
    ///
    /// # Errors
    /// No such database.
    pub fn delete(&self, db: &str, id: &str) -> Result<String> {
        self.write(db, id, "{}", true)
    }

    /// Adds a leaf as a replicator does (`new_edits=false`).
    ///
    /// # Errors
    /// No such database, `rev` is no revision, or `body` is no JSON object.
    pub fn conflict(&self, db: &str, id: &str, rev: &str, body: &str) -> Result<()> {
        let mut doc = Incoming::parse(body).map_err(said)?;
        doc.rev = Some(Rev::parse(rev).map_err(said)?);
        self.world.change(|state| {
            state.db(db)?.write_replicated(id, doc);
            Ok(())
        })
    }

    fn write(&self, db: &str, id: &str, body: &str, deleted: bool) -> Result<String> {
        let mut doc = Incoming::parse(body).map_err(said)?;
        self.world.change(|state| {
            let database = state.db(db)?;
            let known = database.doc(id).filter(|known| !known.is_deleted(known.winner()));
            doc.rev = known.map(|known| known.winner().clone());
            doc.deleted |= deleted;
            database.write(id, doc).map(|rev| rev.to_string()).map_err(said)
        })
    }

    /// The winning revision; `None` without such a document or database.
    pub fn winner(&self, db: &str, id: &str) -> Option<Winner> {
        self.look(|seen| seen.winner(db, id))
    }

    /// Every document's winning revision, deleted ones too: what a follower must have told in the end.
    pub fn winners(&self, db: &str) -> BTreeMap<String, Winner> {
        self.look(|seen| seen.winners(db))
    }

    /// `update_seq` as an integer: all updates so far. 0 without such a database.
    pub fn update_seq(&self, db: &str) -> u64 {
        self.look(|seen| seen.update_seq(db))
    }

    /// Forgets the bodies of revisions that are no leaves, as a compaction.
    pub fn compact(&self, db: &str) {
        self.world.change(|state| state.databases.get_mut(db).map(Database::compact));
    }

    /// Registers a filter function or a view for `filter=NAME` or `view=NAME`, `ddoc/name`.
    ///
    /// It gets the document and the request, and passes, drops or throws. Design documents' text is not run.
    pub fn filter(
        &self,
        name: &str,
        function: impl Fn(&Value, &Request) -> Result<bool, String> + Send + Sync + 'static,
    ) {
        self.world.change(|state| state.filters.insert(name.to_owned(), Arc::new(function)));
    }

    /// Sets a key of the configuration, as an ini file would.
    pub fn set_config(&self, section: &str, key: &str, value: &str) {
        self.world.change(|state| {
            state.config.entry(section.to_owned()).or_default().insert(key.to_owned(), value.to_owned())
        });
    }

    /// Changes how it misbehaves, while it runs.
    pub fn quirks(&self, change: impl FnOnce(&mut Quirks)) {
        self.world.change(|state| change(&mut state.quirks));
    }

    /// Unlocks accounts that too many wrong passwords have locked.
    pub fn unlock(&self) {
        self.world.change(|state| state.wrong_logins.clear());
    }

    /// Stops at once: nobody can connect, open connections are cut. The data stays.
    pub fn stop(&self) {
        self.world.change(|state| state.stopped = true);
        self.server.stop();
    }

    /// Listens on the same port again.
    ///
    /// # Errors
    /// `Io` when somebody else has the port.
    pub fn start_again(&self) -> Result<()> {
        self.world.change(|state| {
            state.stopped = false;
            let now = sys::wall().as_microsecond();
            state.databases.values_mut().for_each(|db| db.opened_micros = now);
        });
        self.server.start_again()
    }

    /// Stops as by SIGKILL. On 1.x, which commits late, the last `n_updates` updates of `db` come undone, with
    /// the `_local` writes among and right before them, but never what `X-Couch-Full-Commit: true` or
    /// `_ensure_full_commit` made durable; their numbers are used again. Other versions lose nothing.
    ///
    /// For more databases call it for each; then [`StandIn::start_again`]. Says how many updates are gone.
    pub fn crash_losing(&self, db: &str, n_updates: usize) -> usize {
        self.stop();
        self.world.change(|state| state.databases.get_mut(db).map_or(0, |db| db.roll_back(n_updates)))
    }

    /// Looks at everything at one moment. `look` must not call the stand-in.
    pub fn look<T>(&self, look: impl FnOnce(&Seen<'_>) -> T) -> T {
        look(&Seen(&self.world.lock()))
    }

    /// Waits until `condition` holds, looking after every change and request; whether it did within `limit`.
    ///
    /// `condition` must not call the stand-in.
    #[must_use]
    pub fn wait_until(&self, limit: Duration, mut condition: impl FnMut(&Seen<'_>) -> bool) -> bool {
        let deadline = sys::now() + limit;
        let mut state = self.world.lock();
        while !condition(&Seen(&state)) {
            let now = sys::now();
            if now >= deadline {
                return false;
            }
            state = self.world.wait(state, deadline - now);
        }
        true
    }

    /// How many requests hold `part` in `METHOD /path` (percent-encoded, without the query).
    pub fn n_requests(&self, part: &str) -> usize {
        self.look(|seen| seen.n_requests(part))
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Everything the stand-in holds, at one moment.
pub struct Seen<'a>(&'a State);

impl Seen<'_> {
    /// The requests so far, oldest first; at most 100,000.
    pub fn requests(&self) -> impl DoubleEndedIterator<Item = &Logged> {
        self.0.requests.iter()
    }

    /// How many requests hold `part` in `METHOD /path`.
    pub fn n_requests(&self, part: &str) -> usize {
        self.requests().filter(|one| format!("{} {}", one.method, one.path).contains(part)).count()
    }

    /// Continuous and long-poll requests that are open.
    pub fn n_open_feeds(&self) -> usize {
        self.0.n_open_feeds
    }

    /// Changes that all feeds together have looked at so far, whether a filter let them pass or not.
    pub fn n_scanned(&self) -> u64 {
        self.0.n_scanned
    }

    /// As [`StandIn::winner`].
    pub fn winner(&self, db: &str, id: &str) -> Option<Winner> {
        let doc = self.0.databases.get(db)?.doc(id)?;
        let rev = doc.winner();
        let json = doc.json(id, rev, false)?;
        Some(Winner { rev: rev.to_string(), deleted: doc.is_deleted(rev), json })
    }

    /// As [`StandIn::winners`].
    pub fn winners(&self, db: &str) -> BTreeMap<String, Winner> {
        let ids = self.0.databases.get(db).map(Database::ids).unwrap_or_default();
        ids.iter().filter_map(|id| Some((id.to_string(), self.winner(db, id)?))).collect()
    }

    /// `_local/ID` as JSON; `id` without `_local/`.
    pub fn local(&self, db: &str, id: &str) -> Option<String> {
        self.0.databases.get(db)?.local(id, 0).map(|(_, json)| json)
    }

    /// As [`StandIn::update_seq`].
    pub fn update_seq(&self, db: &str) -> u64 {
        self.0.databases.get(db).map_or(0, Database::update_seq)
    }

    /// Names of the databases.
    pub fn databases(&self) -> Vec<String> {
        self.0.databases.keys().cloned().collect()
    }
}

/// A filter as it was registered.
pub(crate) type FilterFunction = Arc<dyn Fn(&Value, &Request) -> Result<bool, String> + Send + Sync>;

/// What all connections share.
pub(crate) struct World {
    state: Mutex<State>,
    changed: Condvar,
}

pub(crate) struct State {
    pub(crate) flavour: Flavour,
    pub(crate) quirks: Quirks,
    pub(crate) admin: Option<(String, String)>,
    pub(crate) users: Vec<(String, String)>,
    pub(crate) databases: BTreeMap<String, Database>,
    pub(crate) config: BTreeMap<String, BTreeMap<String, String>>,
    pub(crate) filters: BTreeMap<String, FilterFunction>,
    pub(crate) wrong_logins: BTreeMap<String, u32>,
    /// What `_db_updates` tells.
    pub(crate) news: News,
    pub(crate) n_open_feeds: usize,
    /// Changes that feeds have looked at, passed or not.
    pub(crate) n_scanned: u64,
    pub(crate) replicator: Replicator,
    pub(crate) rng: fastrand::Rng,
    pub(crate) stopped: bool,
    requests: VecDeque<Logged>,
    n_shards: usize,
    n_created: u64,
}

impl World {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Does something to the state and wakes whoever waits for a change.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    pub(crate) fn wait<'a>(&'a self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits `limit` long, less when the server stops or `gone` says that nobody is there any more.
    fn pause(&self, limit: Duration, gone: impl Fn() -> bool) {
        let deadline = sys::now() + limit;
        let mut state = self.lock();
        while !state.stopped && !gone() && sys::now() < deadline {
            let left = deadline.saturating_duration_since(sys::now());
            state = self.wait(state, left.min(PEER_CHECK));
        }
    }
}

impl State {
    fn new(options: Options) -> State {
        let mut state = State {
            flavour: options.flavour,
            quirks: options.quirks,
            admin: options.admin,
            users: options.users,
            databases: BTreeMap::new(),
            config: BTreeMap::new(),
            filters: BTreeMap::new(),
            wrong_logins: BTreeMap::new(),
            news: News::default(),
            n_open_feeds: 0,
            n_scanned: 0,
            replicator: Replicator::default(),
            rng: fastrand::Rng::with_seed(options.seed),
            stopped: false,
            requests: VecDeque::new(),
            n_shards: if options.flavour == Flavour::V1 { 1 } else { options.n_shards.max(1) },
            n_created: 0,
        };
        for db in ["_replicator", "_users"] {
            let _ = state.create_db(db);
        }
        state
    }

    /// Makes a database; false when it exists.
    pub(crate) fn create_db(&mut self, db: &str) -> bool {
        if self.databases.contains_key(db) {
            return false;
        }
        self.n_created += 1;
        let incarnation = self.rng.u64(1..=u64::MAX >> 8) ^ self.n_created;
        let now = sys::wall().as_microsecond();
        let made = Database::new(self.flavour, self.n_shards, incarnation, now).telling(db, &self.news);
        self.databases.insert(db.to_owned(), made);
        self.tell("created", db);
        true
    }

    /// Deletes a database; whether there was one.
    pub(crate) fn delete_db(&mut self, db: &str) -> bool {
        let was_there = self.databases.remove(db).is_some();
        if was_there {
            self.tell("deleted", db);
        }
        was_there
    }

    fn tell(&self, kind: &'static str, db: &str) {
        self.news.note(kind, db);
        if self.flavour != Flavour::V1 {
            self.news.note("updated", "_dbs");
        }
    }

    pub(crate) fn db(&mut self, db: &str) -> Result<&mut Database> {
        self.databases.get_mut(db).ok_or_else(|| Error::new(Kind::NotFound, format!("no database `{db}`")))
    }

    fn log(&mut self, request: &Request) {
        if self.requests.len() == REQUESTS_MAX {
            self.requests.pop_front();
        }
        let Request { method, path, query, .. } = request.clone();
        self.requests.push_back(Logged { method, path, query, at: sys::now() });
    }
}

/// A refusal as those see it who do not ask over HTTP.
pub(crate) fn said(refusal: Refusal) -> Error {
    let kind = match refusal.status {
        404 => Kind::NotFound,
        409 => Kind::Conflict,
        _ => Kind::BadRequest,
    };
    Error::new(kind, format!("{}: {}", refusal.error, refusal.reason))
}

fn handle(world: &World, request: &Request, answer: Answer<'_>) {
    let (fault, slow) = world.change(|state| {
        state.log(request);
        (state.quirks.take_fault(request), state.quirks.slow)
    });
    let late = match fault {
        Some(FaultKind::Late(late)) => Some(late),
        _ => slow,
    };
    if let Some(late) = late {
        world.pause(late, || answer.peer_gone());
        if world.lock().stopped {
            return answer.cut();
        }
    }
    let reply = match fault {
        Some(FaultKind::Cut) => return answer.cut(),
        Some(FaultKind::Hang) => return world.pause(Duration::from_secs(3600), || answer.peer_gone()),
        Some(FaultKind::Html(status)) => Reply::html(status),
        Some(FaultKind::Body(bytes)) => {
            // The peer may be gone already.
            let _ = answer.send(200, &[("Content-Type", "application/json")], bytes);
            return;
        }
        Some(FaultKind::Status(status)) => {
            Reply::refusal(&Refusal::new(status, "unknown_error", "made by a fault"))
        }
        Some(FaultKind::CutAfterDoing) => {
            world.change(|state| routes::reply(state, request));
            return answer.cut();
        }
        None | Some(FaultKind::Late(_)) if routes::is_changes(request) => {
            return changes_feed::answer(world, request, answer);
        }
        None | Some(FaultKind::Late(_)) if routes::is_updates(request) => {
            return updates_feed::answer(world, request, answer);
        }
        None | Some(FaultKind::Late(_)) => world.change(|state| routes::reply(state, request)),
    };
    let flavour = world.lock().flavour;
    // The peer may be gone already; then nobody is left to be told.
    let _ = reply.send(flavour, request, answer);
}
