//! A webhook's errands to CouchDB beside its feeds: dead letters, look-ups, its record in `state_db`.
//!
//! One thread, one errand at a time, in order: dead letters are rare, and a record changes less often still.
//! Guarantees that what it reports as stored is on CouchDB's disk (`state_db` says how).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::{Map, Value};

use crate::config;
use crate::couch::client::{Server, db_path, encoded};
use crate::couch::conflicts::{self, Conflicted};
use crate::couch::leases::Share;
use crate::couch::letters::{self, Filter, Stored};
use crate::couch::requests::{self, Part, Progress};
use crate::couch::roster_docs;
use crate::couch::state_db::{self, DeadLetter, DeadLetterClass, WebhookRecord};
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pure::about::{self, Tell};
use crate::pure::changes::{Row, RowDoc};
use crate::pure::checkpoint::Mark;
use crate::pure::conflict::{self, Conflict, LeafDocs, Standing};
use crate::pure::database_events;
use crate::pure::dispatch::{Asked, Fetched, SuspectLetter};
use crate::pure::document::Document;
use crate::pure::endpoint::WINDOW_EVENTS;
use crate::pure::format::generation;
use crate::pure::message::{Event, Telling, Watch, WebhookId};
use crate::pure::roster::Entry;
use crate::pure::transitions::telling;
use crate::sys::{self, Thread};

/// Errands under way at most: every unfinished event may have one, and a few more for the record. The queue touches all
/// its memory at once: it holds pointers.
const ERRANDS_MAX: usize = 3 * WINDOW_EVENTS;
/// What is to be told of ourselves and could not be kept is tried again after this.
const TELL_AGAIN: Duration = Duration::from_secs(2);
/// Tries to change a record that others change, too.
const RECORD_TRIES: u32 = 5;

/// What is to be done.
pub enum Errand {
    /// Is there a dead letter with this id?
    LookUp(u64, WebhookId),
    /// Store this one.
    Letter(u64, Box<DeadLetter>),
    /// This document is conflicted, to be stored where a key is given; and its leaves are to be read, where they are
    /// asked for.
    Remember(u64, Box<Leaves>),
    /// What has this id in `state_db` is conflicted no more.
    Forget(u64, String),
    /// It was delivered after all.
    Delete(WebhookId),
    /// The document as it is now, in the database told of like this.
    Fetch(Arc<Telling>, SuspectLetter, Mark),
    /// The next letters that an operator wants sent again.
    ListLetters(Box<Filter>, Option<String>),
    /// A letter's own revision, for one that is sent again because an operator asked; whatever was delivered since.
    FetchLetter(Arc<Telling>, Box<Stored>, Mark, Asked),
    /// What came of a request so far.
    Answer(String, Progress, Map<String, Value>),
    /// What this member has done of a request that several obey.
    AnswerPart(String, String, Box<Part>),
    /// List the letters that we send again by ourselves: some may have become ours.
    ListSuspects,
    /// Store what is known of databases found by pattern, of one bucket.
    Databases(u8, Vec<(String, Entry)>),
    /// Forget what is stored as conflicted at this place: its database is another one by now.
    ForgetConflicts(String),
    /// Change the record.
    Record(Change),
    /// Keep what [`Store::tell`] was given.
    Tell,
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

/// A document that has more than one live leaf.
#[derive(Debug)]
pub struct Leaves {
    /// How its database is told of.
    pub telling: Arc<Telling>,
    /// Its name.
    pub doc_id: String,
    /// The winner, then the others, sorted.
    pub revs: Vec<String>,
    /// Where it is kept in `state_db`; `None` where that is not wanted.
    pub kept_at: Option<String>,
    /// When it was read.
    pub read_at: jiff::Timestamp,
}

/// What came of it.
pub enum Errant {
    /// It is stored, or deleted; with the leaves that were read.
    Kept(u64, Result<LeafDocs>),
    /// `None`: could not be found out.
    LookedUp(u64, Option<bool>),
    /// Whether it is stored.
    Letter(u64, Result<()>),
    /// The document of a suspect.
    Fetched(SuspectLetter, Box<Fetched>),
    /// Letters, and behind which id the next ones come.
    Listed(Result<(Vec<Stored>, Option<String>)>),
    /// An answer of a request is stored, the last one where `over`: how it stands then, `None` when it is not.
    Answered {
        /// Of the request.
        id: String,
        /// Whether it was all that we have to say.
        over: bool,
        /// How the request stands.
        state: Option<Progress>,
    },
    /// Letters that daemons send again by themselves, and of which database.
    Suspects(Result<Vec<(String, SuspectLetter)>>),
    /// Whether this bucket is stored.
    Databases(u8, bool),
}

/// What is to be kept of a subject, the newest of each.
type Tells = Arc<Mutex<BTreeMap<String, Tell>>>;

/// A running store.
pub struct Store {
    errands: Sender<Box<Errand>>,
    tells: Tells,
    thread: Thread,
}

impl Store {
    /// Starts the thread. `bucket_revs`: to write what is known of databases with.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(
        shared: &Shared,
        webhook: &config::Webhook,
        bucket_revs: BTreeMap<u8, String>,
        to: Sender<Errant>,
    ) -> Result<Store> {
        let (errands, orders) = bounded(ERRANDS_MAX);
        let tells = Tells::default();
        let waiting = Arc::clone(&tells);
        let state =
            State { shared: shared.clone(), webhook: webhook.clone(), to, tells: waiting, bucket_revs };
        let thread = sys::spawn(&format!("store:{}", webhook.name), move || state.run(&orders))?;
        Ok(Store { errands, tells, thread })
    }

    /// Orders an errand.
    pub fn order(&self, errand: Errand) {
        let sent = self.errands.try_send(Box::new(errand));
        sent.expect("the store lives, and has room for an errand of every event");
    }

    /// Orders that something about ourselves is kept, for webhooks that tell of it; what waits of the same subject is
    /// replaced, so that there is room whatever CouchDB does.
    pub fn tell(&self, tell: Tell) {
        let mut tells = locked(&self.tells);
        if tells.insert(tell.subject.clone(), tell).is_none() && tells.len() == 1 {
            drop(tells);
            self.order(Errand::Tell);
        }
    }

    /// Ends the thread after what it has to do; joined with the value given.
    pub fn stop(self) -> Thread {
        self.thread
    }
}

struct State {
    shared: Shared,
    webhook: config::Webhook,
    to: Sender<Errant>,
    tells: Tells,
    /// To write what is known of databases with.
    bucket_revs: BTreeMap<u8, String>,
}

impl State {
    fn run(mut self, orders: &Receiver<Box<Errand>>) {
        let Shared { server, state_db, .. } = &self.shared.clone();
        let place = format!("webhook `{}`", self.webhook.name);
        loop {
            // What could not be kept is tried again, also when nothing else is to be done.
            // (Not within the match: its lock would be held while we wait.)
            let is_idle = locked(&self.tells).is_empty();
            let next = match is_idle {
                true => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => orders.recv_timeout(TELL_AGAIN),
            };
            let errand = match next {
                Ok(errand) => *errand,
                Err(RecvTimeoutError::Timeout) => Errand::Tell,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // Not ours to tell now: what is known here may be old. Nothing is answered when it never is again.
            if !self.shared.hold.wait() {
                continue;
            }
            let errant = match errand {
                Errand::LookUp(token, id) => {
                    let found = state_db::dead_letter_exists(server, state_db, &id.to_string());
                    Some(Errant::LookedUp(token, found.ok()))
                }
                Errand::Letter(token, letter) => {
                    let stored = state_db::store_dead_letter(server, state_db, &letter);
                    Some(Errant::Letter(token, stored))
                }
                Errand::Remember(token, leaves) => Some(Errant::Kept(token, self.remember(&leaves))),
                Errand::Forget(token, id) => {
                    let forgotten = conflicts::forget(server, state_db, &id);
                    Some(Errant::Kept(token, forgotten.map(|()| LeafDocs::Unread)))
                }
                Errand::Delete(id) => {
                    if let Err(error) = state_db::delete_dead_letter(server, state_db, &id.to_string()) {
                        log::warn!("{place}: `{id}` was delivered, but its dead letter stays: {error}");
                    }
                    None
                }
                Errand::Fetch(telling, letter, mark) => {
                    let fetched = self.fetch(&telling, &letter, mark).unwrap_or_else(|error| unread(&error));
                    Some(Errant::Fetched(letter, Box::new(fetched)))
                }
                Errand::ListLetters(filter, after) => {
                    Some(Errant::Listed(letters::page(server, state_db, &filter, after.as_deref())))
                }
                Errand::FetchLetter(telling, stored, mark, asked) => {
                    let letter = SuspectLetter {
                        id: WebhookId::parse(&stored.letter.id).expect("it was parsed to be asked for"),
                        doc_id: stored.letter.doc_id.clone(),
                        resolved: stored.letter.resolved(),
                    };
                    let fetched = self.fetch_letter(&telling, &stored.letter, mark, asked);
                    Some(Errant::Fetched(letter, Box::new(fetched.unwrap_or_else(|error| unread(&error)))))
                }
                Errand::Answer(request, state, answer) => {
                    let answered = requests::answer(server, state_db, &request, state, &answer);
                    if let Err(error) = &answered {
                        log::debug!("{place}: `{request}` could not be answered: {error}");
                    }
                    let over = state != Progress::Open;
                    let state = answered.is_ok().then_some(state);
                    over.then_some(Errant::Answered { id: request, over, state })
                }
                Errand::AnswerPart(id, member, part) => {
                    let answered = requests::answer_part(server, state_db, &id, &member, &part);
                    if let Err(error) = &answered {
                        log::debug!("{place}: `{id}` could not be answered: {error}");
                    }
                    Some(Errant::Answered { id, over: part.over, state: answered.ok() })
                }
                Errand::ListSuspects => {
                    Some(Errant::Suspects(list_suspects(server, state_db, &self.webhook.name)))
                }
                Errand::Tell => {
                    self.keep_tells();
                    None
                }
                Errand::Databases(bucket, entries) => {
                    Some(Errant::Databases(bucket, self.keep_databases(bucket, &entries)))
                }
                Errand::ForgetConflicts(place) => {
                    if let Err(error) = conflicts::forget_all(server, state_db, &place) {
                        log::warn!("conflicts of a database that was deleted stay in `{state_db}`: {error}");
                    }
                    None
                }
                Errand::Record(change) => {
                    self.forget_other_life(&change);
                    let made = change_record(server, state_db, &self.webhook.name, |record| {
                        apply(record, &change);
                    });
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

    /// Keeps what is to be told; what cannot be kept waits, unless something newer of its subject does by then.
    fn keep_tells(&self) {
        let Shared { server, state_db, .. } = &self.shared;
        let tells = std::mem::take(&mut *locked(&self.tells));
        for (subject, tell) in tells {
            if let Err(error) = state_db::store_condition(server, state_db, &tell) {
                log::debug!("{} about `{subject}` could not be kept yet: {error}", tell.event_type);
                locked(&self.tells).entry(subject).or_insert(tell);
            }
        }
    }

    /// Whether it is stored.
    fn keep_databases(&mut self, bucket: u8, entries: &[(String, Entry)]) -> bool {
        let Shared { server, state_db, .. } = &self.shared;
        let rev = self.bucket_revs.get(&bucket).map(String::as_str);
        let division = self.shared.hold.share().map(Share::division);
        let keeps = |db: &str| division.as_ref().is_some_and(|division| !division.is_mine(db));
        let written = match division {
            // What others know of theirs stays.
            Some(_) => roster_docs::merge(server, state_db, &self.webhook.name, bucket, entries, keeps),
            None => roster_docs::write(server, state_db, &self.webhook.name, bucket, entries, rev),
        };
        match written {
            Ok(rev) => {
                self.bucket_revs.insert(bucket, rev);
                true
            }
            Err(error) => {
                log::debug!("what is known of databases could not be stored yet: {error}");
                false
            }
        }
    }

    fn remember(&self, leaves: &Leaves) -> Result<LeafDocs> {
        let Shared { server, state_db, .. } = &self.shared;
        let telling = &*leaves.telling;
        if let Some(id) = &leaves.kept_at {
            let conflicted = Conflicted {
                id: id.clone(),
                rev: None,
                webhook: telling.webhook.clone(),
                db: telling.db.clone(),
                doc_id: leaves.doc_id.clone(),
                leaves: leaves.revs.clone(),
                since: leaves.read_at,
            };
            conflicts::remember(server, state_db, &conflicted)?;
        }
        self.read_leaves(telling, &leaves.doc_id, &leaves.revs[1..])
    }

    /// Bodies of conflicting leaves, where they are asked for.
    fn read_leaves(&self, telling: &Telling, doc_id: &str, revs: &[String]) -> Result<LeafDocs> {
        if !telling.conflict_docs {
            return Ok(LeafDocs::Unread);
        }
        let (server, bytes_max) = (&self.shared.server, telling.payload_bytes_max);
        let redact = |doc| telling.redacted(doc);
        match conflicts::read_leaves(server, &telling.db, doc_id, revs, bytes_max, redact) {
            Err(error) if !is_passing(error.kind()) => {
                let place = format!("webhook `{}`, database `{}`", telling.webhook, telling.db);
                log::warn!("{place}: told without the conflicting leaves: {error}");
                Ok(LeafDocs::Unreadable)
            }
            read => read,
        }
    }

    /// When a database is another one than before, what was conflicted in the other one goes, before the record says
    /// so: who is killed in between does it again.
    fn forget_other_life(&self, change: &Change) {
        let Shared { server, state_db, .. } = &self.shared;
        let Change::Mark(db, mark) = change else { return };
        if !self.webhook.conflicts {
            return;
        }
        let webhook = &self.webhook.name;
        let forgotten = state_db::read_record(server, state_db, webhook).and_then(|record| {
            match record.as_ref().and_then(|record| record.databases.get(db)) {
                Some(before) if before != mark => {
                    let place = conflict::place(webhook, db, &before.to_string());
                    conflicts::forget_all(server, state_db, &place)
                }
                _ => Ok(()),
            }
        });
        if let Err(error) = forgotten {
            log::warn!(
                "webhook `{webhook}`: conflicts of the `{db}` that was deleted stay in `{state_db}`: {error}"
            );
        }
    }

    /// Reads a document as a feed would show it.
    fn fetch(&self, telling: &Telling, letter: &SuspectLetter, mark: Mark) -> Result<Fetched> {
        if matches!(telling.watch, Watch::Replications | Watch::Databases) {
            let stored =
                state_db::dead_letter(&self.shared.server, &self.shared.state_db, &letter.id.to_string())?;
            return Ok(now_or_gone(stored.and_then(|stored| of_payload(&stored))));
        }
        let query = if telling.conflicts { "?conflicts=true" } else { "" };
        // Deleted, or with its database: the feed tells what became of it.
        let Some(mut event) = self.read(telling, &letter.doc_id, query, mark)? else {
            return Ok(Fetched::Gone);
        };
        if letter.resolved.as_ref() == Some(&event.rev) && !event.is_conflicted() {
            event.resolve(letter.id);
        }
        let wanted = telling.wants(&event);
        Ok(if wanted { Fetched::Event(event) } else { Fetched::Gone })
    }

    /// Reads what a letter is about (DESIGN §7): its own revision, unless a newer one was delivered; where CouchDB has
    /// it no more, the current one.
    fn fetch_letter(
        &self,
        telling: &Telling,
        letter: &DeadLetter,
        mark: Mark,
        asked: Asked,
    ) -> Result<Fetched> {
        if matches!(telling.watch, Watch::Replications | Watch::Databases) {
            // What was told of a replication, or a database, stands in the letter, and nowhere else.
            return Ok(now_or_gone(of_payload(letter)));
        }
        if letter.mark != mark {
            // Of a database that is gone: what bears its name now has told everything anew.
            return Ok(Fetched::Gone);
        }
        let query = if telling.conflicts { "?conflicts=true" } else { "" };
        let id = WebhookId::parse(&letter.id).expect("it was parsed to be asked for");
        let is_resolved = letter.resolved().is_some();
        let now = self.read(telling, &letter.doc_id, query, mark)?;
        if let Some(now) = &now
            && now.id.to_string() == letter.id
        {
            return Ok(now_or_gone(Some(now.clone())));
        }
        let own = format!("?rev={}", encoded(&letter.rev));
        let own = match self.read(telling, &letter.doc_id, &own, mark)? {
            Some(mut event) if is_resolved => {
                event.resolve(id);
                Some(event)
            }
            // With conflicts the id is made of all of them; what they were stands in the letter.
            Some(mut event) => {
                event.conflicts = letter.revs.iter().skip(1).cloned().collect();
                event.standing = Standing::of_type(&letter.event_type);
                Some(self.with_leaves(telling, Event { id, ..event })?)
            }
            None => None,
        };
        // As it was left, when nothing was written since.
        let as_told = |now: &Event| is_resolved && now.rev == letter.rev && !now.is_conflicted();
        if now.as_ref().is_some_and(as_told) {
            return Ok(now_or_gone(own));
        }
        if asked.even_if_superseded {
            return Ok(now_or_gone(own.or(now)));
        }
        match (now, own) {
            (Some(now), own) => match self.is_delivered(telling, &now, letter)? {
                true => Ok(Fetched::Superseded(now.rev)),
                false => Ok(now_or_gone(own.or(Some(now)))),
            },
            // Deleted by now. A letter about that very deletion is told; else the deletion came later.
            (None, Some(own)) if own.deleted => Ok(Fetched::Event(own)),
            (None, Some(_)) => Ok(Fetched::Superseded("its deletion".to_owned())),
            (None, None) => Ok(Fetched::Gone),
        }
    }

    /// Whether what a document is now was delivered, as far as that can be known: it was unless it has a letter of its
    /// own, or the webhook does not want it. And what lies between it and an older letter may have been.
    fn is_delivered(&self, telling: &Telling, now: &Event, letter: &DeadLetter) -> Result<bool> {
        let Shared { server, state_db, .. } = &self.shared;
        let next_to_it = generation(&now.rev) <= generation(&letter.rev).map(|generation| generation + 1);
        Ok(telling.wants(now)
            && !(next_to_it && state_db::dead_letter_exists(server, state_db, &now.id.to_string())?))
    }

    /// A document as an event, wanted or not; `None` when there is none, or not that revision of it.
    fn read(&self, telling: &Telling, doc_id: &str, query: &str, mark: Mark) -> Result<Option<Event>> {
        let path = db_path(&telling.db, &[doc_id]) + query;
        let reply = match self.shared.server.request(&http::Method::GET, &path, None, &[]) {
            Ok(reply) => reply,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let found = |_| Error::new(Kind::Malformed, "expected a document");
        let text =
            String::from_utf8(reply.body).map_err(|_| Error::new(Kind::Malformed, "expected UTF-8"))?;
        // Without the line break behind it: a document is passed as the feed passes it.
        let doc = Document::parse(text.trim_end().to_owned()).map_err(found)?;
        let row = Row {
            seq: None,
            id: doc_id.to_owned(),
            revs: Vec::new(),
            deleted: false,
            doc: RowDoc::Json(doc),
            line: None,
        };
        if telling.watch == Watch::Daemon {
            // Never the document itself: what it says of us.
            return Ok(about::event(telling, row, &mark.to_string()));
        }
        self.with_leaves(telling, telling.event(row, &mark.to_string(), sys::wall())).map(Some)
    }

    /// An event that was not read from the feed, with the bodies of its conflicting leaves where they are asked for.
    fn with_leaves(&self, telling: &Telling, mut event: Event) -> Result<Event> {
        if telling.conflict_docs && event.is_conflicted() {
            let docs = self.read_leaves(telling, &event.doc_id, &event.conflicts)?;
            let (row_id, resolved_id) = (event.id, event.id);
            let none = || {
                let docs = LeafDocs::Unread;
                Box::new(Conflict { key: None, wanted: true, row_id, resolved_id, docs })
            };
            event.conflict.get_or_insert_with(none).docs = docs;
        }
        Ok(event)
    }
}

/// Why a document was not read: for now, or for good. A request must not wait for what never comes.
fn unread(error: &Error) -> Fetched {
    match is_passing(error.kind()) {
        true => Fetched::Failed,
        false => Fetched::Unreadable(error.to_string()),
    }
}

/// Whether what failed may succeed later.
fn is_passing(kind: Kind) -> bool {
    match kind {
        Kind::Unreachable
        | Kind::Cut
        | Kind::Timeout
        | Kind::Unauthorized
        | Kind::Locked
        | Kind::Conflict
        | Kind::Server
        | Kind::Stopped => true,
        Kind::Forbidden
        | Kind::NotFound
        | Kind::BadSince
        | Kind::BadRequest
        | Kind::Malformed
        | Kind::TooLong
        | Kind::Config
        | Kind::Io => false,
    }
}

/// The event that a letter holds itself.
fn of_payload(letter: &DeadLetter) -> Option<Event> {
    let id = WebhookId::parse(&letter.id)?;
    let payload = letter.payload.as_ref()?.get();
    let (event_type, at) = (&letter.event_type, letter.first_attempt_at);
    telling::event_of_letter(id, event_type, &letter.doc_id, at, payload)
        .or_else(|| database_events::telling::event_of_letter(id, event_type, &letter.doc_id, at, payload))
}

fn now_or_gone(event: Option<Event>) -> Fetched {
    event.map_or(Fetched::Gone, Fetched::Event)
}

fn locked(tells: &Tells) -> MutexGuard<'_, BTreeMap<String, Tell>> {
    tells.lock().unwrap_or_else(PoisonError::into_inner)
}

fn apply(record: &mut WebhookRecord, change: &Change) {
    match change {
        Change::Mark(db, mark) => {
            record.databases.insert(db.clone(), *mark);
            // A place in the database that had the name before.
            record.seeks.retain(|sought, seek| sought != db || seek.mark == *mark);
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

/// The letters that daemons send again by themselves, and of which database.
///
/// # Errors
/// As listing letters.
pub fn list_suspects(server: &Server, state_db: &str, webhook: &str) -> Result<Vec<(String, SuspectLetter)>> {
    let letters = state_db::list_suspects(server, state_db, webhook)
        .context(|| "failed to list dead letters".to_owned())?;
    let suspects = letters.into_iter().filter(|letter| letter.class == DeadLetterClass::Suspect);
    let suspects = suspects.filter_map(|letter| {
        let resolved = letter.resolved();
        Some((
            letter.db,
            SuspectLetter { id: WebhookId::parse(&letter.id)?, doc_id: letter.doc_id, resolved },
        ))
    });
    Ok(suspects.collect())
}

/// Reads a webhook's record, changes it, stores it under its `_rev`; again when somebody else was first.
///
/// # Errors
/// As the reading and writing.
pub fn change_record(
    server: &Server,
    state_db: &str,
    webhook: &str,
    change: impl Fn(&mut WebhookRecord),
) -> Result<WebhookRecord> {
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
