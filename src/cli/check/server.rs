//! Whether CouchDB answers, lets us in, and lets us do what each webhook needs.
//!
//! Guarantees that a refused login is tried once and not again: five wrong ones lock the account for everybody.

use std::ops::ControlFlow;
use std::time::Duration;

use http::Method;
use serde::Deserialize;

use crate::cli::check::patterns;
use crate::cli::check::report::{Level, Report};
use crate::config::{Filter, Hookd, Webhook};
use crate::couch::client::{Generation, Server, Welcome, db_path, encoded};
use crate::couch::feed::{Feed, FeedKind, FeedRequest};
use crate::couch::refusal::from_json;
use crate::couch::{scheduler, state_db};
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::hex;
use crate::pure::message::Watch;
use crate::pure::message::matches;
use crate::pure::replication::Row;
use crate::pure::seq::Seq;
use crate::sys;

/// Clocks may be this far apart; receivers accept signatures up to five minutes old.
const CLOCK_MAX: Duration = Duration::from_secs(60);
/// For one page of a feed, which runs the webhook's filter at most once.
const FEED_DEADLINE: Duration = Duration::from_secs(30);
/// Why rights are not tried.
const NOT_IN: &str = "not tried: CouchDB does not let us in";

/// Tries the server, and on it everything that the webhooks need.
pub(crate) fn check(hookd: &Hookd, webhooks: &[Webhook], report: &mut Report<'_>) -> Result<()> {
    let server = match Server::new(hookd) {
        Ok(server) => server,
        Err(error) => return report.say(Level::Error, "server", &error.to_string()),
    };
    let subject = format!("server {}", server.base_url());
    // Without the login, so that a wrong one does not hide a server that answers.
    let anonymous = Server::new(&Hookd { username: None, password: None, ..hookd.clone() })?;
    let welcome = match ask_welcome(&anonymous) {
        // `require_valid_user`: only the login gets an answer.
        Err(error) if error.kind() == Kind::Unauthorized && hookd.username.is_some() => ask_welcome(&server),
        welcome => welcome,
    };
    let generation = match welcome {
        Ok((welcome, date)) => {
            report.say(Level::Ok, &subject, &format!("CouchDB {} answers", welcome.version))?;
            check_clock(date, report)?;
            welcome.generation
        }
        Err(error) => {
            report.say(Level::Error, &subject, error.cause())?;
            return report.say(Level::Warning, "rights", "not tried: there is no CouchDB to try them on");
        }
    };
    let Some(is_admin) = check_login(&server, report)? else {
        return report.say(Level::Warning, "rights", NOT_IN);
    };
    check_state_db(&server, &hookd.state_db, report)?;
    for webhook in webhooks {
        // With `watch = daemon` it is `state_db`, which was looked at.
        let dbs = webhook.db.iter().filter(|_| webhook.watch == Watch::Changes);
        for db in dbs {
            check_database(&server, generation, webhook, db, report)?;
        }
        for db in webhook.db.iter().filter(|_| webhook.watch == Watch::Replications) {
            check_replicator(&server, generation, webhook, db, report)?;
        }
        let selected = webhook.selection.as_ref().and_then(|selection| selection.pattern.as_ref());
        if let Some(pattern) = webhook.patterns.as_ref().or(selected) {
            patterns::check(&server, hookd, &webhook.name, pattern, is_admin, report)?;
        }
        if generation > Generation::One {
            check_selector(webhook, report)?;
        }
    }
    Ok(())
}

/// Who the server is, and what time it has.
fn ask_welcome(server: &Server) -> Result<(Welcome, Option<jiff::Timestamp>)> {
    let welcome = server.welcome()?;
    let reply = server.request(&Method::GET, "/", None, &[])?;
    Ok((welcome, reply.date))
}

fn check_clock(date: Option<jiff::Timestamp>, report: &mut Report<'_>) -> Result<()> {
    let Some(date) = date else {
        return report.say(Level::Warning, "clock", "not compared: CouchDB's answer has no `date`");
    };
    let apart = sys::wall().duration_since(date);
    let seconds = apart.as_secs();
    if apart.unsigned_abs() <= CLOCK_MAX {
        return report.say(Level::Ok, "clock", "ours and CouchDB's agree");
    }
    let (way, seconds) = if seconds > 0 { ("ahead of", seconds) } else { ("behind", -seconds) };
    let text = format!(
        "ours is {seconds} s {way} CouchDB's; receivers refuse signatures that are 5 minutes off; set the clock"
    );
    report.say(Level::Warning, "clock", &text)
}

/// Whether CouchDB lets us in, and then whether as a server admin.
fn check_login(server: &Server, report: &mut Report<'_>) -> Result<Option<bool>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Session {
        user_ctx: UserContext,
    }
    #[derive(Deserialize)]
    struct UserContext {
        name: Option<String>,
        roles: Vec<String>,
    }
    let UserContext { name, roles } = match server.get_json::<Session>("/_session") {
        Ok(session) => session.user_ctx,
        Err(error) => {
            report.say(Level::Error, "login", &error.to_string())?;
            return Ok(None);
        }
    };
    let is_admin = roles.iter().any(|role| role == "_admin");
    match (name, is_admin) {
        (Some(name), true) => report.say(Level::Ok, "login", &format!("`{name}`, a server admin"))?,
        (Some(name), false) => report.say(Level::Ok, "login", &format!("`{name}`, no server admin"))?,
        (None, true) => {
            let text = "none, and none is needed: this CouchDB has no admin, everybody may do everything";
            report.say(Level::Warning, "login", text)?;
        }
        (None, false) => {
            let text =
                "none: expected `username` and `password` in [hookd], or COUCHDB_USER and COUCHDB_PASSWORD";
            report.say(Level::Warning, "login", text)?;
        }
    }
    Ok(Some(is_admin))
}

fn check_state_db(server: &Server, state_db: &str, report: &mut Report<'_>) -> Result<()> {
    let subject = format!("state_db `{state_db}`");
    let made =
        state_db::ensure(server, state_db, server.username()).and_then(|_| write_local(server, state_db));
    match made {
        Ok(()) => report.say(Level::Ok, &subject, "is there, closed to strangers, and can be written"),
        // Already says which database.
        Err(error) => report.say(Level::Error, "rights", &error.to_string()),
    }
}

/// A webhook reads the feed of its database, and keeps its checkpoint there.
fn check_database(
    server: &Server,
    generation: Generation,
    webhook: &Webhook,
    db: &str,
    report: &mut Report<'_>,
) -> Result<()> {
    let subject = format!("webhook `{}`, database `{db}`", webhook.name);
    if generation == Generation::One && matches!(webhook.filter, Some(Filter::Selector(_))) {
        let text = "`selector` needs CouchDB 2.0 or later, and this server is older; use a filter function \
            (`filter = ddoc/name`) instead";
        report.say(Level::Error, &subject, text)?;
    } else if let Err(error) = read_feed(server, webhook, db) {
        if error.kind() == Kind::NotFound {
            let text = "does not exist; once it does it is read from its beginning";
            return report.say(Level::Warning, &subject, text);
        }
        report.say(Level::Error, &subject, &error.to_string())?;
    } else {
        report.say(Level::Ok, &subject, "its changes can be read")?;
    }
    match write_local(server, db) {
        Ok(()) => report.say(Level::Ok, &subject, "its checkpoint can be written"),
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        Err(error) => report.say(Level::Error, &subject, &error.to_string()),
    }
}

/// A webhook reads the documents of its replicator database, asks the scheduler (1.x and 2.0: what runs), and keeps its
/// checkpoint and the states it knows there. All of it is for server admins.
fn check_replicator(
    server: &Server,
    generation: Generation,
    webhook: &Webhook,
    db: &str,
    report: &mut Report<'_>,
) -> Result<()> {
    let subject = format!("webhook `{}`, database `{db}`", webhook.name);
    let mut say = |done: Result<&str>| match done {
        Ok(fine) => report.say(Level::Ok, &subject, fine),
        Err(error) => report.say(Level::Error, &subject, &for_admins(server, &error)),
    };
    match read_feed(server, webhook, db) {
        Err(error) if error.kind() == Kind::NotFound => {
            let text = "does not exist; once it does its replications are told";
            return report.say(Level::Warning, &subject, text);
        }
        read => say(read.map(|()| "its documents can be read"))?,
    }
    say(ask_scheduler(server, generation, db))?;
    say(write_local(server, db).map(|()| "its checkpoint can be written"))
}

/// What tells how replications are: the scheduler, since 2.1.
fn ask_scheduler(server: &Server, generation: Generation, db: &str) -> Result<&'static str> {
    if generation > Generation::One {
        match scheduler::docs_page(server, Some(db), 0, 1) {
            // 2.0: no such handler, so it is taken for a database's name.
            Err(error) if matches!(error.kind(), Kind::BadRequest | Kind::NotFound) => {}
            asked => {
                return asked.map(|_: scheduler::Page<Row>| "the scheduler tells how its replications are");
            }
        }
    }
    let text = "this CouchDB has no scheduler: documents and `_active_tasks` tell how replications are";
    scheduler::tasks(server).map(|_| text)
}

/// What was refused, and to whom it would not be.
fn for_admins(server: &Server, error: &Error) -> String {
    if error.kind() != Kind::Forbidden {
        return error.to_string();
    }
    let who = server.username().map_or_else(|| "nobody".to_owned(), |name| format!("`{name}`"));
    format!(
        "{error}; `watch = replications` needs a server admin, and we are {who}: give `username` and `password` of one \
         in [hookd], or in COUCHDB_USER and COUCHDB_PASSWORD"
    )
}

fn read_feed(server: &Server, webhook: &Webhook, db: &str) -> Result<()> {
    let request = FeedRequest {
        db: db.to_owned(),
        // CouchDB looks for the design document before it looks for changes, and finds none of those.
        since: Seq::from_json("\"now\"").expect("it is not null"),
        kind: FeedKind::Page { limit: 1 },
        filter: webhook.filter.clone(),
        include_docs: webhook.include_docs,
        conflicts: webhook.conflicts,
        doc_bytes_max: webhook.payload_bytes_max,
        keeps_lines: false,
        silence: Some(FEED_DEADLINE),
        deadline: Some(FEED_DEADLINE),
    };
    Feed::new(server).read(&request, &mut |_| ControlFlow::Continue(())).map(drop)
}

/// Writes a `_local` document of a name that nothing else has, reads it, and deletes it again.
fn write_local(server: &Server, db: &str) -> Result<()> {
    let id = format!("_local/couch-hookd-check-{}", hex(&sys::random_bytes::<8>()));
    let path = db_path(db, &[&id]);
    let doing = || "failed to write, read and delete a `_local` document".to_owned();
    server.put_json(&path, "{}").context(doing)?;
    #[derive(Deserialize)]
    struct Stored {
        #[serde(rename = "_rev")]
        rev: String,
    }
    let reply = server.request(&Method::GET, &path, None, &[]).context(doing)?;
    let Stored { rev } = from_json(&reply.body).context(doing)?;
    let path = format!("{path}?rev={}", encoded(&rev));
    server.request(&Method::DELETE, &path, None, &[]).map(drop).context(doing)
}

/// A selector hides plain deletions, which hardly anybody expects.
fn check_selector(webhook: &Webhook, report: &mut Report<'_>) -> Result<()> {
    let Some(Filter::Selector(selector)) = &webhook.filter else { return Ok(()) };
    let wants_deletions = webhook.events.iter().any(|pattern| matches(pattern, "document.deleted"));
    if !wants_deletions || selector.contains("\"_deleted\"") {
        return Ok(());
    }
    let text = format!(
        "`selector` does not match a plain DELETE, which leaves nothing but `_deleted`, so such deletions are not told; \
         {{\"$or\":[{selector},{{\"_deleted\":true}}]}} tells them, with those of all other documents; \
         `events = document.updated` says that none are wanted"
    );
    report.say(Level::Warning, &format!("webhook `{}`", webhook.name), &text)
}
