//! A webhook's errands to CouchDB beside its feeds: dead letters, look-ups, its record in `state_db`.
//!
//! One thread, one errand at a time, in order: dead letters are rare, and a record changes less often still.
//! Guarantees that what it reports as stored is on CouchDB's disk (`state_db` says how).

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config;
use crate::couch::client::db_path;
use crate::couch::state_db::{self, DeadLetter, WebhookRecord};
use crate::error::{Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pure::changes::{Row, RowDoc};
use crate::pure::checkpoint::Mark;
use crate::pure::dispatch::{Fetched, FlowIndex, SuspectLetter};
use crate::pure::document::Document;
use crate::pure::endpoint::WINDOW_EVENTS;
use crate::pure::message::{Telling, WebhookId};
use crate::sys::{self, Thread};

/// Errands under way at most: every unfinished event may have one, and a few more for the record.
const ERRANDS_MAX: usize = 2 * WINDOW_EVENTS;
/// Tries to change a record that others change, too.
const RECORD_TRIES: u32 = 5;

/// What is to be done.
pub enum Errand {
    /// Is there a dead letter with this id?
    LookUp(u64, WebhookId),
    /// Store this one.
    Letter(u64, Box<DeadLetter>),
    /// It was delivered after all.
    Delete(WebhookId),
    /// The document as it is now.
    Fetch(FlowIndex, SuspectLetter, Mark),
    /// Change the record.
    Record(Change),
}

/// A change of the webhook's record.
#[derive(Debug, Clone)]
pub enum Change {
    /// This database bears this mark now.
    Mark(String, Mark),
    /// The endpoint said 410, and that is believed.
    Gone(String),
    /// Too many dead letters.
    Paused(String),
}

/// What came of it.
pub enum Errant {
    /// `None`: could not be found out.
    LookedUp(u64, Option<bool>),
    /// Whether it is stored.
    Letter(u64, Result<()>),
    /// The document of a suspect.
    Fetched(SuspectLetter, Box<Fetched>),
}

/// A running store.
pub struct Store {
    errands: Sender<Errand>,
    thread: Thread,
}

impl Store {
    /// Starts the thread. `tellings` are the webhook's databases, in order.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(
        shared: &Shared,
        webhook: &config::Webhook,
        tellings: Vec<Telling>,
        to: Sender<Errant>,
    ) -> Result<Store> {
        let (errands, orders) = bounded(ERRANDS_MAX);
        let state = State { shared: shared.clone(), webhook: webhook.clone(), tellings, to };
        let thread = sys::spawn(&format!("store:{}", webhook.name), move || state.run(&orders))?;
        Ok(Store { errands, thread })
    }

    /// Orders an errand.
    pub fn order(&self, errand: Errand) {
        self.errands.try_send(errand).expect("the store lives, and has room for an errand of every event");
    }

    /// Ends the thread after what it has to do; joined with the value given.
    pub fn stop(self) -> Thread {
        self.thread
    }
}

struct State {
    shared: Shared,
    webhook: config::Webhook,
    tellings: Vec<Telling>,
    to: Sender<Errant>,
}

impl State {
    fn run(self, orders: &Receiver<Errand>) {
        let Shared { server, state_db, .. } = &self.shared;
        let place = format!("webhook `{}`", self.webhook.name);
        while let Ok(errand) = orders.recv() {
            let errant = match errand {
                Errand::LookUp(token, id) => {
                    let found = state_db::dead_letter_exists(server, state_db, &id.to_string());
                    Some(Errant::LookedUp(token, found.ok()))
                }
                Errand::Letter(token, letter) => {
                    let stored = state_db::store_dead_letter(server, state_db, &letter);
                    Some(Errant::Letter(token, stored))
                }
                Errand::Delete(id) => {
                    if let Err(error) = state_db::delete_dead_letter(server, state_db, &id.to_string()) {
                        log::warn!("{place}: `{id}` was delivered, but its dead letter stays: {error}");
                    }
                    None
                }
                Errand::Fetch(flow, letter, mark) => {
                    let fetched = self.fetch(flow, &letter, mark).unwrap_or(Fetched::Failed);
                    Some(Errant::Fetched(letter, Box::new(fetched)))
                }
                Errand::Record(change) => {
                    let made =
                        change_record(&self.shared, &self.webhook.name, |record| apply(record, &change));
                    if let Err(error) = made {
                        log::error!("{place}: {change:?} could not be kept in `{state_db}`: {error}");
                    }
                    None
                }
            };
            if errant.is_some_and(|errant| self.to.send(errant).is_err()) {
                return;
            }
        }
    }

    /// Reads a document as a feed would show it.
    fn fetch(&self, flow: FlowIndex, letter: &SuspectLetter, mark: Mark) -> Result<Fetched> {
        let telling = &self.tellings[flow];
        let query = if telling.conflicts { "?conflicts=true" } else { "" };
        let path = db_path(&telling.db, &[&letter.doc_id]) + query;
        let reply = match self.shared.server.request(&http::Method::GET, &path, None, &[]) {
            Ok(reply) => reply,
            // Deleted, or with its database: the feed tells what became of it.
            Err(error) if error.kind() == Kind::NotFound => return Ok(Fetched::Gone),
            Err(error) => return Err(error),
        };
        let found = |_| Error::new(Kind::Malformed, "expected a document");
        let text =
            String::from_utf8(reply.body).map_err(|_| Error::new(Kind::Malformed, "expected UTF-8"))?;
        // Without the line break behind it: a document is passed as the feed passes it.
        let doc = Document::parse(text.trim_end().to_owned()).map_err(found)?;
        let row = Row {
            seq: None,
            id: letter.doc_id.clone(),
            revs: Vec::new(),
            deleted: false,
            doc: RowDoc::Json(doc),
            line: None,
        };
        Ok(telling.arrived(row, &mark.to_string(), sys::wall()).event.map_or(Fetched::Gone, Fetched::Event))
    }
}

fn apply(record: &mut WebhookRecord, change: &Change) {
    match change {
        Change::Mark(db, mark) => {
            record.databases.insert(db.clone(), *mark);
        }
        Change::Gone(reason) => {
            record.gone_since = Some(sys::wall());
            record.gone_reason = Some(reason.clone());
        }
        Change::Paused(reason) => {
            record.paused_since = Some(sys::wall());
            record.paused_reason = Some(reason.clone());
        }
    }
}

/// Reads a webhook's record, changes it, stores it under its `_rev`; again when somebody else was first.
///
/// # Errors
/// As the reading and writing.
pub fn change_record(
    shared: &Shared,
    webhook: &str,
    change: impl Fn(&mut WebhookRecord),
) -> Result<WebhookRecord> {
    let (server, state_db) = (&shared.server, &shared.state_db);
    let mut tries = 0;
    loop {
        tries += 1;
        let mut record = state_db::read_record(server, state_db, webhook)?.unwrap_or_default();
        let before = record.clone();
        change(&mut record);
        if record == before && record.rev.is_some() {
            return Ok(record);
        }
        match state_db::write_record(server, state_db, webhook, &record) {
            Ok(rev) => {
                record.rev = Some(rev);
                return Ok(record);
            }
            Err(error) if error.kind() == Kind::Conflict && tries < RECORD_TRIES => {}
            Err(error) => return Err(error),
        }
    }
}
