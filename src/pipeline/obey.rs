//! What a request comes to: `pause`, `resume`, `seek` and `discard`, done by a daemon, or by a command when there is none.
//!
//! Guarantees that the effect comes once, whoever is killed in between and however often it is tried: it is one write
//! of the webhook's record, under its `_rev`, together with the request's id. (To discard what is discarded already
//! changes nothing.) Whoever runs the webhook starts its parts again afterwards: starting is recovering, and reads
//! the record. `replay` is the dispatcher's, `tail` the desk's (`pipeline::desk`).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::config;
use crate::couch::client::Generation;
use crate::couch::letters::{self, Filter};
use crate::couch::requests::{Arguments, Command, Progress, Request, text};
use crate::couch::state_db::{self, WebhookRecord};
use crate::couch::{feed, local_docs};
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::store::change_record;
use crate::pure::checkpoint::{Mark, Seek};
use crate::pure::message::{Watch, WebhookId};
use crate::pure::seq::Seq;
use crate::sys;

/// What came of a request.
#[derive(Debug)]
pub struct Obeyed {
    /// `Done` or `Failed`.
    pub state: Progress,
    /// For whoever asked.
    pub answer: Map<String, Value>,
    /// Whether the webhook's parts have to be started again for it to count.
    pub restart: bool,
    /// Letters that are gone.
    pub discarded: Vec<WebhookId>,
}

impl Obeyed {
    fn done(answer: Map<String, Value>) -> Obeyed {
        Obeyed { state: Progress::Done, answer, restart: true, discarded: Vec::new() }
    }

    fn failed(why: impl Into<String>) -> Obeyed {
        Obeyed { state: Progress::Failed, answer: text("error", why), restart: false, discarded: Vec::new() }
    }
}

/// Does what a request asks for, once.
///
/// # Errors
/// What may be over the next time: no connection, no login, a server that does not answer. The request stays open.
pub fn obey(shared: &Shared, webhook: &config::Webhook, request: &Request) -> Result<Obeyed> {
    let obeyed = match request.command {
        Command::Pause => pause(shared, request),
        Command::Resume => resume(shared, webhook, request),
        Command::Seek => seek(shared, webhook, request),
        Command::Discard => discard(shared, request),
        Command::Replay | Command::Tail | Command::Status => Ok(Obeyed::failed("is not obeyed here")),
    };
    match obeyed {
        Err(error) if is_passing(&error) => Err(error),
        Err(error) => Ok(Obeyed::failed(error.to_string())),
        obeyed => obeyed,
    }
}

/// Whether it may be over the next time.
pub fn is_passing(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Unreachable
            | Kind::Cut
            | Kind::Timeout
            | Kind::Unauthorized
            | Kind::Locked
            | Kind::Conflict
            | Kind::Server
            | Kind::Malformed
            | Kind::TooLong
            | Kind::Stopped
    )
}

fn pause(shared: &Shared, request: &Request) -> Result<Obeyed> {
    let now = sys::wall();
    let record = change_record(&shared.server, &shared.state_db, &request.webhook, |record| {
        once(record, request, |record| {
            record.paused_since.get_or_insert(now);
            let reason = request.arguments.reason.clone();
            record.paused_reason = Some(reason.unwrap_or_else(|| "by hand".to_owned()));
            record.paused_by = Some(request.made_by.clone()).filter(|by| !by.is_empty());
        });
    })?;
    Ok(Obeyed::done(Map::from_iter([("paused_since".to_owned(), json!(record.paused_since))])))
}

fn resume(shared: &Shared, webhook: &config::Webhook, request: &Request) -> Result<Obeyed> {
    if webhook.paused {
        return Ok(Obeyed::failed(
            "it is paused by its configuration: take `paused = true` out of its section",
        ));
    }
    let (server, state_db) = (&shared.server, &shared.state_db);
    let max = shared.hookd.dead_letters_max;
    let n_letters = letters::count(server, state_db, &request.webhook)?;
    let record = change_record(server, state_db, &request.webhook, |record| {
        once(record, request, |record| {
            record.end_pause();
            // Too many already, and whoever resumes knows: so many more may come.
            record.letters_accepted = if n_letters > max { n_letters } else { 0 };
        });
    })?;
    let resumed = record.paused_since.is_none() && record.gone_since.is_none();
    Ok(Obeyed::done(Map::from_iter([
        ("resumed".to_owned(), json!(resumed)),
        ("dead_letters".to_owned(), json!(n_letters)),
    ])))
}

/// Changes a record unless the request's effect is in it.
fn once(record: &mut WebhookRecord, request: &Request, change: impl FnOnce(&mut WebhookRecord)) {
    if !record.has_done(&request.id) {
        change(record);
        record.note_done(&request.id);
    }
}

/// Whether a webhook can be set to another place at all.
///
/// # Errors
/// `BadRequest` for one that tells of replications.
pub fn check_has_places(webhook: &config::Webhook) -> Result<()> {
    if webhook.watch == Watch::Databases {
        let found = format!(
            "webhook `{}`: `watch = databases` has no places to go to: CouchDB tells how its databases are now, not how \
             they were",
            webhook.name
        );
        return Err(Error::new(Kind::BadRequest, found));
    }
    if webhook.watch != Watch::Replications {
        return Ok(());
    }
    let found = format!(
        "webhook `{}`: `watch = replications` has no places to go to: CouchDB tells how its replications are now, not \
         how they were; `couch-hookd replications list` shows them",
        webhook.name
    );
    Err(Error::new(Kind::BadRequest, found))
}

/// Databases of a webhook that a `seek` is about, and the place in each.
///
/// # Errors
/// `NotFound` for a missing database; `BadRequest` for one that is not the webhook's, and for a place that CouchDB
/// does not know; else as asking CouchDB.
pub fn places(
    shared: &Shared,
    webhook: &config::Webhook,
    arguments: &Arguments,
) -> Result<Vec<(String, Seq)>> {
    let dbs = dbs_of_seek(webhook, &shared.state_db, arguments.db.as_deref())?;
    let generation = shared.server.welcome()?.generation;
    let to = arguments.to.as_ref().map_or_else(|| "now".to_owned(), ToString::to_string);
    let place = |db: &str| match to.as_str() {
        "\"now\"" => feed::resolve_now(&shared.server, db, generation),
        "0" | "\"0\"" => {
            shared.server.request(&http::Method::GET, &crate::couch::client::db_path(db, &[]), None, &[])?;
            Ok(Seq::zero())
        }
        seq => {
            let seq = Seq::from_json(seq)
                .ok_or_else(|| Error::new(Kind::BadRequest, "expected `now`, `0` or a seq"))?;
            check_place(shared, db, generation, &seq)?;
            Ok(seq)
        }
    };
    if dbs.len() > 1 && !["\"now\"", "0", "\"0\""].contains(&to.as_str()) {
        let found = format!(
            "a seq is a place in one database, and the webhook watches `{}`; say which one with --db",
            webhook.db.join("`, `")
        );
        return Err(Error::new(Kind::BadRequest, found));
    }
    dbs.into_iter()
        .map(|db| {
            let place = place(&db).context(|| format!("database `{db}`"))?;
            Ok((db, place))
        })
        .collect()
}

/// The databases that a `seek` is about.
fn dbs_of_seek(webhook: &config::Webhook, state_db: &str, db: Option<&str>) -> Result<Vec<String>> {
    let name = &webhook.name;
    let refused = |found: String| Err(Error::new(Kind::BadRequest, found));
    match (db, &webhook.patterns) {
        (Some(db), patterns) => {
            let is_found = patterns.as_ref().is_some_and(|pattern| pattern.matches(db, state_db));
            match is_found || webhook.db.iter().any(|named| named == db) {
                true => Ok(vec![db.to_owned()]),
                false => refused(format!(
                    "webhook `{name}` does not watch `{db}`; it watches `{}`",
                    webhook.databases()
                )),
            }
        }
        (None, Some(pattern)) => refused(format!(
            "webhook `{name}` finds databases by pattern (`{pattern}`), each with a place of its own; say which one with \
             --db"
        )),
        (None, None) if webhook.db.is_empty() => {
            refused(format!("webhook `{name}` reads no database: it has no place to set"))
        }
        (None, None) => Ok(webhook.db.clone()),
    }
}

/// Whether CouchDB takes a seq. 1.x takes any, and tells nothing behind one that is not reached yet.
fn check_place(shared: &Shared, db: &str, generation: Generation, seq: &Seq) -> Result<()> {
    let ahead = feed::count_after(&shared.server, db, seq, None, 1).map_err(|error| match error.kind() {
        Kind::Server | Kind::BadRequest | Kind::BadSince => Error::new(
            Kind::BadRequest,
            format!("CouchDB does not know the place `{seq}`: {}", error.cause()),
        ),
        _ => error,
    });
    ahead?;
    if generation == Generation::One {
        let end = feed::resolve_now(&shared.server, db, generation)?;
        let number = |seq: &Seq| seq.as_json().parse::<u64>().ok();
        if number(seq).is_none_or(|seq| number(&end).is_some_and(|end| seq > end)) {
            let found = format!("the last change is `{end}`, expected a seq up to it, got `{seq}`");
            return Err(Error::new(Kind::BadRequest, found));
        }
    }
    Ok(())
}

/// The marks of the databases that a `seek` may be about, those that there are.
fn marks(shared: &Shared, webhook: &config::Webhook, request: &Request) -> Result<BTreeMap<String, Mark>> {
    let Shared { server, state_db, .. } = shared;
    let generation = server.welcome()?.generation;
    let record = state_db::read_record(server, state_db, &request.webhook)?.unwrap_or_default();
    let wanted = request.arguments.db.as_ref();
    let mut marks = BTreeMap::new();
    for db in dbs_of_seek(webhook, state_db, wanted.map(String::as_str))? {
        let was_marked = record.databases.contains_key(&db);
        match local_docs::ensure_mark(server, generation, &db, was_marked, &sys::sleep) {
            Ok(mark) => drop(marks.insert(db, mark)),
            // Said by `places`, with what it means.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(marks)
}

fn seek(shared: &Shared, webhook: &config::Webhook, request: &Request) -> Result<Obeyed> {
    let (server, state_db, name) = (&shared.server, &shared.state_db, &request.webhook);
    let done = state_db::read_record(server, state_db, name)?.filter(|record| record.has_done(&request.id));
    let record = match done {
        Some(record) => record,
        None => {
            check_has_places(webhook)?;
            let marks = marks(shared, webhook, request)?;
            let mut seeks = Vec::new();
            for (db, through_seq) in places(shared, webhook, &request.arguments)? {
                // A place is one in the database that bears the mark: that of the one before would skip changes.
                let mark = marks.get(&db).copied();
                let same = mark.map(|mark| local_docs::is_same(server, &db, &mark, None)).transpose()?;
                let (Some(mark), Some(true)) = (mark, same) else {
                    let found = format!("database `{db}` was deleted and created again meanwhile");
                    return Err(Error::new(Kind::Conflict, found));
                };
                let through_seq = serde_json::from_str(through_seq.as_json()).unwrap_or_default();
                seeks.push((db, Seek { request: request.id.clone(), mark, through_seq }));
            }
            change_record(server, state_db, name, |record| {
                once(record, request, |record| record.seeks.extend(seeks.iter().cloned()));
            })?
        }
    };
    let ours = record.seeks.iter().filter(|(_, seek)| seek.request == request.id);
    let places: Map<String, Value> = ours.map(|(db, seek)| (db.clone(), seek.through_seq.clone())).collect();
    Ok(Obeyed::done(Map::from_iter([("through_seq".to_owned(), Value::Object(places))])))
}

fn discard(shared: &Shared, request: &Request) -> Result<Obeyed> {
    let wanted = request.arguments.letters.clone().unwrap_or_default();
    let filter = Filter::of(&request.webhook, &wanted);
    let discarded = letters::discard(&shared.server, &shared.state_db, &filter, &mut |_| {})?;
    let left = letters::count(&shared.server, &shared.state_db, &request.webhook)?;
    let answer = Map::from_iter([
        ("discarded".to_owned(), json!(wanted.n_letters.max(discarded.len() as u64))),
        ("left".to_owned(), json!(left)),
    ]);
    Ok(Obeyed { state: Progress::Done, answer, restart: false, discarded })
}
