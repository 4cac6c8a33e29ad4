//! Our own database: the checkpoints' key, one record per webhook, dead letters.
//!
//! Guarantees that nothing is written before the database is closed to strangers (a new one on 1.x and 2.x is open
//! to anybody), that storing a dead letter twice is storing it once, and that members which a later version wrote
//! into a record stay. Leaves to others when any of it is written.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::couch::all_docs;
use crate::couch::client::{Reply, Server, Written, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::about::{CONDITION, Condition, Tell};
use crate::pure::checkpoint::{Mark, Seek, StateKey};
use crate::pure::conflict::RESOLVED;
use crate::sys;

/// `_id` of the document with the key.
const KEY_ID: &str = "couch-hookd";
/// Old revisions that CouchDB keeps the names of.
const REVS_LIMIT: u64 = 10;
/// Dead letters read at once.
const PAGE_ROWS: usize = 200;
/// Suspects listed at most; more than 20 are never kept by one webhook (DESIGN §6).
const SUSPECTS_MAX: usize = 1_000;
/// The longest answer of an endpoint that a dead letter keeps.
const ANSWER_BYTES_MAX: usize = 1024;
/// 1.x tells of a document before it is on the disk, unless asked: without this a killed CouchDB lost the letter
/// and kept the checkpoint behind it (HOLES 5).
pub(crate) const FULL_COMMIT: (&str, &str) = ("x-couch-full-commit", "true");

/// Document `webhook:NAME`: what must be remembered of a webhook beyond its databases.
///
/// `{"_id":"webhook:orders","_rev":"3-…","activated_at":"2026-11-21T20:46:41Z","databases":{"orders":"5f0c…"},
/// "fingerprint":"9a…"}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WebhookRecord {
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// When it first became active: what `since = now` means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activated_at: Option<jiff::Timestamp>,
    /// Databases known, with the mark each had.
    #[serde(default)]
    pub databases: BTreeMap<String, Mark>,
    /// Of the configuration that was last seen.
    #[serde(default)]
    pub fingerprint: String,
    /// The patterns whose databases have got their starting points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patterns: Option<String>,
    /// `since` of the configuration at the first start; a later one has no effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Since when the endpoint has said 410.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_since: Option<jiff::Timestamp>,
    /// What it said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_reason: Option<String>,
    /// Since when it has been paused by a command or a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_since: Option<jiff::Timestamp>,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_reason: Option<String>,
    /// Who paused it, when a command did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_by: Option<String>,
    /// Dead letters that lay there when it was resumed although they were too many: so many more may come.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub letters_accepted: u64,
    /// Where commands have set it, by database.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub seeks: BTreeMap<String, Seek>,
    /// Requests whose effect is in this record, oldest first; the last 50.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requests_done: Vec<String>,
    /// Members this version does not know; written back as they are.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Requests that a record remembers to have done; more are never open at a time.
const REQUESTS_DONE_MAX: usize = 50;

impl WebhookRecord {
    /// Whether the effect of a request is in it.
    pub fn has_done(&self, request: &str) -> bool {
        self.requests_done.iter().any(|done| done == request)
    }

    /// Notes that it is.
    pub fn note_done(&mut self, request: &str) {
        self.requests_done.push(request.to_owned());
        let n_over = self.requests_done.len().saturating_sub(REQUESTS_DONE_MAX);
        self.requests_done.drain(..n_over);
    }

    /// Ends whatever pause there is.
    pub fn end_pause(&mut self) {
        (self.gone_since, self.gone_reason) = (None, None);
        (self.paused_since, self.paused_reason, self.paused_by) = (None, None, None);
    }
}

/// An event given up, by reference: the document is where it was. `_id` is the `webhook-id`.
///
/// `{"_id":"msg_5f0c…","webhook":"orders","db":"orders","mark":"…","doc_id":"order:17","rev":"3-9f…",
/// "revs":["3-9f…"],"seq":"42-g1…","event_type":"document.updated","class":"refused","status":422,
/// "answer":"total is missing","attempts":3,"first_attempt_at":"…","stored_at":"…"}`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeadLetter {
    /// `webhook-id`.
    #[serde(rename = "_id")]
    pub id: String,
    /// Name of the webhook.
    pub webhook: String,
    /// Name of the database.
    pub db: String,
    /// Its mark.
    pub mark: Mark,
    /// The document.
    pub doc_id: String,
    /// Its winning revision.
    pub rev: String,
    /// All revisions the id is made of: the winner, then live conflicts.
    pub revs: Vec<String>,
    /// Where the feed told of it, for people.
    pub seq: Option<Box<RawValue>>,
    /// `document.updated`.
    pub event_type: String,
    /// Whose fault it seems to be.
    pub class: DeadLetterClass,
    /// Status of the last answer; `None` when there was none.
    pub status: Option<u16>,
    /// Start of the last answer or error, redacted; cut at 1 KiB when stored.
    pub answer: String,
    /// How often it was tried.
    pub attempts: u32,
    /// When it was first tried.
    pub first_attempt_at: jiff::Timestamp,
    /// When it was given up.
    pub stored_at: jiff::Timestamp,
    /// What would have been told, where no document holds it: `data` of an event about ourselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<Box<RawValue>>,
}

/// Why an event was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterClass {
    /// The endpoint refuses it.
    Refused,
    /// The endpoint fails at it while it takes others; replayed by the daemon itself.
    Suspect,
    /// With `concurrency = 1`: it held up all others for `give_up_after`.
    GivenUp,
}

impl DeadLetter {
    /// Of `document.resolved`: the revision that won.
    pub fn resolved(&self) -> Option<String> {
        (self.event_type == RESOLVED).then(|| self.rev.clone())
    }
}

impl DeadLetterClass {
    /// The word in the stored document.
    pub fn as_str(self) -> &'static str {
        match self {
            DeadLetterClass::Refused => "refused",
            DeadLetterClass::Suspect => "suspect",
            DeadLetterClass::GivenUp => "given_up",
        }
    }
}

/// Makes the database if it is missing, closes it to strangers, and gives the checkpoints' key, made once.
///
/// # Errors
/// `Forbidden` (or what CouchDB answered) with the two commands an admin types, when it is missing or open and we
/// may not change that. `Malformed` when the key is none. Else as [`Server::request`].
pub fn ensure(server: &Server, state_db: &str, username: Option<&str>) -> Result<StateKey> {
    make(server, state_db, username)
        .and_then(|()| close(server, state_db, username))
        .and_then(|()| limit_revs(server, state_db))
        .and_then(|()| key(server, state_db))
        .context(|| format!("state_db `{state_db}`"))
}

fn make(server: &Server, state_db: &str, username: Option<&str>) -> Result<()> {
    let path = db_path(state_db, &[]);
    match server.request(&Method::PUT, &path, None, &[]) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == Kind::Conflict => Ok(()),
        // Only server admins make databases; one may have made it for us.
        Err(error) if error.kind() == Kind::Forbidden => {
            match server.request(&Method::GET, &path, None, &[]) {
                Ok(_) => Ok(()),
                Err(missing) if missing.kind() == Kind::NotFound => {
                    Err(by_hand(server, state_db, username, "cannot be made with this login", error))
                }
                Err(error) if error.kind() == Kind::Forbidden => {
                    Err(by_hand(server, state_db, username, "cannot be read with this login", error))
                }
                Err(error) => Err(error),
            }
        }
        Err(error) => Err(error),
    }
}

/// Sees to it that only server admins and our user get in, before anything is written.
fn close(server: &Server, state_db: &str, username: Option<&str>) -> Result<()> {
    let path = db_path(state_db, &["_security"]);
    let version = server.welcome()?.version;
    // 1.0 and 1.1 call members readers.
    let members =
        if version.starts_with("1.1.") || version.starts_with("1.0.") { "readers" } else { "members" };
    let found: Value = server.get_json(&path)?;
    if is_closed(&found, members) && is_listed(&found, members, username) {
        return Ok(());
    }
    let wanted = closed_security(found.clone(), members, username);
    match server.request(&Method::PUT, &path, Some(&wanted.to_string()), &[]) {
        Ok(_) => {}
        // Closed already, and we got in: by a role, or because an admin listed us as he likes.
        Err(error) if error.kind() == Kind::Forbidden && is_closed(&found, members) => return Ok(()),
        Err(error) if error.kind() == Kind::Forbidden => {
            return Err(by_hand(server, state_db, username, "is open to anybody", error));
        }
        Err(error) => return Err(error),
    }
    let stored: Value = server.get_json(&path)?;
    if is_closed(&stored, members) {
        return Ok(());
    }
    Err(Error::new(Kind::Server, format!("{path}: still open to anybody after it was closed")))
}

/// A database whose members list is empty is public.
fn is_closed(security: &Value, members: &str) -> bool {
    ["names", "roles"].iter().any(|kind| !names(security, members, kind).is_empty())
}

fn is_listed(security: &Value, members: &str, username: Option<&str>) -> bool {
    let Some(username) = username else { return true };
    [members, "admins"].iter().any(|group| names(security, group, "names").contains(&username))
}

fn names<'a>(security: &'a Value, group: &str, kind: &str) -> Vec<&'a str> {
    security[group][kind].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// What is there, with server admins and our user added.
fn closed_security(mut security: Value, members: &str, username: Option<&str>) -> Value {
    if !security.is_object() {
        security = json!({});
    }
    let mut with = |group: &str, name: Option<&str>| {
        let mut listed = names(&security, group, "names");
        listed.extend(name.filter(|name| !listed.contains(name)));
        let mut roles = names(&security, group, "roles");
        roles.extend(Some("_admin").filter(|role| !roles.contains(role)));
        let value = json!({ "names": listed, "roles": roles });
        security[group] = value;
    };
    with("admins", None);
    with(members, username);
    security
}

/// An error that says what an admin can do about it.
fn by_hand(server: &Server, state_db: &str, username: Option<&str>, found: &str, error: Error) -> Error {
    let url = format!("{}{}", server.base_url(), db_path(state_db, &[]));
    let security = closed_security(json!({}), "members", username);
    Error::new(
        error.kind(),
        format!(
            "{found} ({}); as an admin type `curl -u ADMIN -X PUT {url}` and `curl -u ADMIN -X PUT {url}/_security \
             -H 'Content-Type: application/json' -d '{security}'`",
            error.cause()
        ),
    )
}

/// Records are rewritten often and never replicated.
fn limit_revs(server: &Server, state_db: &str) -> Result<()> {
    let path = db_path(state_db, &["_revs_limit"]);
    let limit: Option<u64> = server.get_json(&path).ok();
    if limit == Some(REVS_LIMIT) {
        return Ok(());
    }
    match server.request(&Method::PUT, &path, Some(&REVS_LIMIT.to_string()), &[]) {
        // It saves space, no more: a member may not set it (3.5.0 says so with a 500), pouchdb-server does not know it.
        Err(error)
            if matches!(error.kind(), Kind::Forbidden | Kind::NotFound | Kind::BadRequest | Kind::Server) =>
        {
            Ok(())
        }
        other => other.map(drop),
    }
}

fn key(server: &Server, state_db: &str) -> Result<StateKey> {
    if let Some(key) = read_key(server, state_db)? {
        return Ok(key);
    }
    let body = json!({ "key": StateKey::new(sys::random_bytes()).expose() }).to_string();
    match server.request(&Method::PUT, &db_path(state_db, &[KEY_ID]), Some(&body), &[FULL_COMMIT]) {
        Ok(_) => {}
        // Another daemon was first.
        Err(error) if error.kind() == Kind::Conflict => {}
        Err(error) => return Err(error),
    }
    read_key(server, state_db)?.ok_or_else(|| {
        Error::new(Kind::Server, format!("document `{KEY_ID}` is not there after it was written"))
    })
}

/// The checkpoints' key; `None` when there is none yet. Makes nothing, for whoever only looks.
///
/// # Errors
/// `NotFound` when the database is missing; else as [`ensure`].
pub fn known_key(server: &Server, state_db: &str) -> Result<Option<StateKey>> {
    read_key(server, state_db)
}

fn read_key(server: &Server, state_db: &str) -> Result<Option<StateKey>> {
    #[derive(Deserialize)]
    struct Document {
        key: String,
    }
    let path = db_path(state_db, &[KEY_ID]);
    let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else { return Ok(None) };
    // The body stays out of the error: it holds what may be most of a key.
    let document: Option<Document> = serde_json::from_slice(&body).ok();
    match document.and_then(|document| StateKey::parse(&document.key)) {
        Some(key) => Ok(Some(key)),
        None => Err(Error::new(
            Kind::Malformed,
            format!(
                "document `{KEY_ID}`: expected a `key` of 64 hex digits; delete the document to get a new one"
            ),
        )),
    }
}

/// `None` for 404.
pub(crate) fn found(reply: Result<Reply>) -> Result<Option<Vec<u8>>> {
    match reply {
        Ok(reply) => Ok(Some(reply.body)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A webhook's record; `None` when it was never active.
///
/// # Errors
/// As [`Server::get_json`].
pub fn read_record(server: &Server, state_db: &str, webhook: &str) -> Result<Option<WebhookRecord>> {
    let path = record_path(state_db, webhook);
    let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else { return Ok(None) };
    let mut record: WebhookRecord = from_json(&body).context(|| format!("GET {path}"))?;
    record.other.remove("_id");
    Ok(Some(record))
}

/// Names of all webhooks that have a record.
///
/// # Errors
/// As [`Server::get_json`].
pub fn list_records(server: &Server, state_db: &str) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Ids {
        rows: Vec<Id>,
    }
    #[derive(Deserialize)]
    struct Id {
        id: String,
    }
    let query = format!("?startkey={}&endkey={}", encoded("\"webhook:\""), encoded("\"webhook:~\""));
    let ids: Ids = server.get_json(&(db_path(state_db, &["_all_docs"]) + &query))?;
    Ok(ids.rows.iter().filter_map(|row| row.id.strip_prefix("webhook:")).map(str::to_owned).collect())
}

/// Stores a record over the revision it was read at and gives the new one.
///
/// # Errors
/// `Conflict` when somebody else wrote first: read again. Else as [`Server::put_json`].
pub fn write_record(
    server: &Server,
    state_db: &str,
    webhook: &str,
    record: &WebhookRecord,
) -> Result<String> {
    let path = record_path(state_db, webhook);
    let body = serde_json::to_string(record).expect("a record of texts is always JSON");
    let reply = server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT])?;
    let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
    Ok(written.rev)
}

/// Keeps that something became so, unless it is known to be so already.
///
/// # Errors
/// `Conflict` when somebody else wrote at the same time; else as [`Server::request`].
pub fn store_condition(server: &Server, state_db: &str, tell: &Tell) -> Result<()> {
    let path = db_path(state_db, &[&format!("{CONDITION}{}", tell.subject)]);
    let stored = match found(server.request(&Method::GET, &path, None, &[]))? {
        Some(body) => Some(from_json::<Condition>(&body).context(|| format!("GET {path}"))?),
        None => None,
    };
    let Some(condition) = Condition::after(stored, tell) else { return Ok(()) };
    let body = serde_json::to_string(&condition).expect("a condition of texts is always JSON");
    server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT]).map(drop)
}

fn record_path(state_db: &str, webhook: &str) -> String {
    db_path(state_db, &[&format!("webhook:{webhook}")])
}

/// Whether a letter with this `webhook-id` is stored.
///
/// # Errors
/// As [`Server::request`].
pub fn dead_letter_exists(server: &Server, state_db: &str, id: &str) -> Result<bool> {
    Ok(found(server.request(&Method::GET, &db_path(state_db, &[id]), None, &[]))?.is_some())
}

/// A letter by its `webhook-id`, if it is stored.
///
/// # Errors
/// As [`Server::request`].
pub fn dead_letter(server: &Server, state_db: &str, id: &str) -> Result<Option<DeadLetter>> {
    let path = db_path(state_db, &[id]);
    let reply = found(server.request(&Method::GET, &path, None, &[]))?;
    reply.map(|body| from_json(&body).context(|| format!("GET {path}"))).transpose()
}

/// Stores a letter; one that is there already is fine. When this returns, it is on the disk.
///
/// # Errors
/// As [`Server::request`].
pub fn store_dead_letter(server: &Server, state_db: &str, letter: &DeadLetter) -> Result<()> {
    let mut letter = letter.clone();
    if letter.answer.len() > ANSWER_BYTES_MAX {
        let cut = (0..=ANSWER_BYTES_MAX).rev().find(|at| letter.answer.is_char_boundary(*at));
        letter.answer.truncate(cut.unwrap_or_default());
    }
    let body = serde_json::to_string(&letter).expect("a letter of texts is always JSON");
    match server.request(&Method::PUT, &db_path(state_db, &[&letter.id]), Some(&body), &[FULL_COMMIT]) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == Kind::Conflict => Ok(()),
        Err(error) => Err(error),
    }
}

/// Deletes a letter, as after a replay that was accepted; a missing one is fine.
///
/// # Errors
/// As [`Server::request`].
pub fn delete_dead_letter(server: &Server, state_db: &str, id: &str) -> Result<()> {
    #[derive(Deserialize)]
    struct Revision {
        #[serde(rename = "_rev")]
        rev: String,
    }
    let path = db_path(state_db, &[id]);
    let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else { return Ok(()) };
    let revision: Revision = from_json(&body).context(|| format!("GET {path}"))?;
    let path = format!("{path}?rev={}", encoded(&revision.rev));
    found(server.request(&Method::DELETE, &path, None, &[FULL_COMMIT])).map(drop)
}

/// How many letters a webhook has, counted up to `max`. Reads all letters of the database: for starts, not for
/// every event.
///
/// # Errors
/// As [`Server::get_json`].
pub fn count_dead_letters(server: &Server, state_db: &str, webhook: &str, max: u64) -> Result<u64> {
    let mut n_letters = 0;
    each_page(server, state_db, |letters| {
        n_letters += letters.iter().filter(|letter| letter["webhook"] == webhook).count() as u64;
        n_letters < max
    })?;
    Ok(n_letters.min(max))
}

/// A webhook's letters of class `suspect`, which the daemon replays; at most 1,000.
///
/// # Errors
/// As [`Server::get_json`].
pub fn list_suspects(server: &Server, state_db: &str, webhook: &str) -> Result<Vec<DeadLetter>> {
    let mut suspects = Vec::new();
    each_page(server, state_db, |letters| {
        for letter in letters {
            if letter["webhook"] != webhook || letter["class"] != "suspect" {
                continue;
            }
            // What somebody else changed beyond reading is not ours to replay.
            suspects.extend(DeadLetter::deserialize(letter).ok());
        }
        suspects.len() < SUSPECTS_MAX
    })?;
    suspects.truncate(SUSPECTS_MAX);
    Ok(suspects)
}

/// Gives the letters of all webhooks page by page, in the order of their ids, until `on_page` says `false`.
fn each_page(server: &Server, state_db: &str, mut on_page: impl FnMut(Vec<Value>) -> bool) -> Result<()> {
    let mut start = "msg_".to_owned();
    loop {
        // Ids are hex digits, which all sort before a `g`.
        let (rows, next) = all_docs::page(server, state_db, (&start, "msg_g"), PAGE_ROWS)?;
        let wants_more = on_page(rows.into_iter().filter_map(|row| row.doc).collect());
        match next {
            Some(next) if wants_more => start = next,
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::couch::scripted::{Scripted, Seen, send};

    /// A server with one database.
    #[derive(Default)]
    struct Fake {
        exists: bool,
        /// Whether our login is a server admin's.
        is_admin: bool,
        /// Whether it gets in although it is no admin.
        is_member: bool,
        /// Answers `true` to the change of `_security` and forgets it.
        forgets_security: bool,
        security: Value,
        revs_limit: Value,
        docs: BTreeMap<String, (u32, Value)>,
    }

    impl Fake {
        fn answer(&mut self, seen: &Seen) -> (u16, Value) {
            let no_admin = (401, json!({"error": "unauthorized", "reason": "You are not a server admin."}));
            let ok = (201, json!({"ok": true}));
            let (path, query) = seen.path.split_once('?').unwrap_or((&seen.path, ""));
            let may_enter = self.is_admin || self.is_member || self.security == json!({});
            match (seen.method.as_str(), path) {
                ("GET", "/") => (200, json!({"couchdb": "Welcome", "version": "3.5.0"})),
                ("PUT", "/state") if !self.is_admin => no_admin,
                ("PUT", "/state") if self.exists => (412, json!({"error": "file_exists", "reason": ""})),
                ("PUT", "/state") => {
                    self.exists = true;
                    ok
                }
                _ if !self.exists => (404, json!({"error": "not_found", "reason": "no_db_file"})),
                _ if !may_enter => (403, json!({"error": "forbidden", "reason": "You are not allowed"})),
                ("GET", "/state") => (200, json!({"db_name": "state"})),
                ("GET", "/state/_security") => (200, self.security.clone()),
                ("GET", "/state/_revs_limit") => (200, self.revs_limit.clone()),
                ("PUT", "/state/_security") if !self.is_admin => no_admin,
                // Seen on 3.5.0.
                ("PUT", "/state/_revs_limit") if !self.is_admin => {
                    let reason = "{error,{forbidden,<<\"You are not a db or server admin.\">>}}";
                    (500, json!({"error": "badmatch", "reason": reason}))
                }
                ("PUT", "/state/_security") => {
                    if !self.forgets_security {
                        self.security = serde_json::from_str(&seen.body).unwrap();
                    }
                    ok
                }
                ("PUT", "/state/_revs_limit") => {
                    self.revs_limit = serde_json::from_str(&seen.body).unwrap();
                    ok
                }
                ("GET", "/state/_all_docs") => (200, self.all_docs(query)),
                (method, path) => {
                    let id = path.strip_prefix("/state/").unwrap().replace("%3A", ":");
                    self.answer_doc(method, &id, query, &seen.body)
                }
            }
        }

        fn all_docs(&self, query: &str) -> Value {
            let query: BTreeMap<&str, &str> =
                query.split('&').map(|pair| pair.split_once('=').unwrap()).collect();
            let from = query["startkey"].replace("%22", "");
            assert_eq!((query["endkey"], query["include_docs"]), ("%22msg_g%22", "true"));
            let limit = query["limit"].parse().unwrap();
            let row = |(id, (_, doc)): (&String, &(u32, Value))| json!({"id": id, "key": id, "doc": doc});
            let rows = self.docs.range(from.clone()..).filter(|(id, _)| id.as_str() < "msg_g");
            json!({"rows": rows.map(row).take(limit).collect::<Vec<_>>()})
        }

        fn answer_doc(&mut self, method: &str, id: &str, query: &str, body: &str) -> (u16, Value) {
            let stored = self.docs.get(id).map(|(rev, _)| format!("{rev}-x"));
            let conflict = (409, json!({"error": "conflict", "reason": "Document update conflict."}));
            match method {
                "GET" => match self.docs.get(id) {
                    None => (404, json!({"error": "not_found", "reason": "missing"})),
                    Some((rev, doc)) => {
                        let mut doc = doc.clone();
                        doc["_rev"] = format!("{rev}-x").into();
                        doc["_id"] = id.into();
                        (200, doc)
                    }
                },
                "PUT" => {
                    let doc: Value = serde_json::from_str(body).unwrap();
                    if doc["_rev"].as_str() != stored.as_deref() {
                        return conflict;
                    }
                    let rev = self.docs.get(id).map_or(0, |(rev, _)| *rev) + 1;
                    self.docs.insert(id.to_owned(), (rev, doc));
                    (201, json!({"ok": true, "rev": format!("{rev}-x")}))
                }
                _ => {
                    if query.strip_prefix("rev=") != stored.as_deref() {
                        return conflict;
                    }
                    self.docs.remove(id);
                    (200, json!({"ok": true}))
                }
            }
        }
    }

    fn world(fake: Fake) -> (Arc<Mutex<Fake>>, Scripted) {
        let fake = Arc::new(Mutex::new(fake));
        let state = Arc::clone(&fake);
        let scripted = Scripted::start(move |seen, stream| {
            let (status, body) = state.lock().unwrap().answer(seen);
            send(stream, status, &body.to_string());
        });
        (fake, scripted)
    }

    /// As CouchDB up to 2.x makes a database: open to anybody.
    fn open_server() -> Fake {
        Fake { is_admin: true, security: json!({}), revs_limit: json!(1000), ..Fake::default() }
    }

    #[test]
    fn is_made_and_closed_before_anything_is_written() {
        let (fake, scripted) = world(open_server());
        let server = scripted.server(None);
        let key = ensure(&server, "state", Some("hookd")).unwrap();
        let asked = scripted.asked();
        let at = |wanted: &str| asked.iter().position(|asked| asked == wanted).unwrap();
        assert!(at("PUT /state/_security") < at("PUT /state/couch-hookd"), "{asked:?}");
        {
            let fake = fake.lock().unwrap();
            assert_eq!(
                fake.security,
                json!({"admins": {"names": [], "roles": ["_admin"]},
                       "members": {"names": ["hookd"], "roles": ["_admin"]}})
            );
            assert_eq!(fake.revs_limit, 10);
        }
        assert_eq!(ensure(&server, "state", Some("hookd")).unwrap(), key, "the key is made once");
        let puts = scripted.asked().iter().filter(|asked| asked.starts_with("PUT /state/")).count();
        assert_eq!(puts, 3, "{:?}", scripted.asked());
        let commits = |seen: &Seen| seen.headers.contains(&"x-couch-full-commit: true".to_owned());
        assert!(scripted.seen().iter().any(|seen| seen.path == "/state/couch-hookd" && commits(seen)));
    }

    #[test]
    fn whom_an_admin_let_in_stays() {
        let listed = json!({"admins": {"names": ["boss"], "roles": []}, "members": {"names": ["ops"], "roles": ["r"]}});
        let (fake, scripted) = world(Fake { exists: true, security: listed, ..open_server() });
        ensure(&scripted.server(None), "state", Some("hookd")).unwrap();
        assert_eq!(
            fake.lock().unwrap().security,
            json!({"admins": {"names": ["boss"], "roles": ["_admin"]},
                   "members": {"names": ["ops", "hookd"], "roles": ["r", "_admin"]}})
        );
    }

    fn check_by_hand(fake: Fake, found: &str) {
        let (fake, scripted) = world(fake);
        let error = ensure(&scripted.server(None), "state", Some("hookd")).unwrap_err();
        assert_eq!(error.kind(), Kind::Forbidden);
        let text = error.to_string();
        let url = format!("http://127.0.0.1:{}/state", scripted.port);
        assert!(text.starts_with(&format!("state_db `state`: {found} (40")), "{text}");
        assert!(text.contains(&format!("`curl -u ADMIN -X PUT {url}`")), "{text}");
        assert!(
            text.ends_with(&format!(
                "`curl -u ADMIN -X PUT {url}/_security -H 'Content-Type: application/json' -d '{{\"admins\":\
                 {{\"names\":[],\"roles\":[\"_admin\"]}},\"members\":{{\"names\":[\"hookd\"],\"roles\":[\"_admin\"]}}}}'`"
            )),
            "{text}"
        );
        assert!(fake.lock().unwrap().docs.is_empty(), "nothing was written");
    }

    #[test]
    fn what_we_may_not_do_an_admin_is_told() {
        let member = || Fake { is_admin: false, ..open_server() };
        check_by_hand(member(), "cannot be made with this login");
        check_by_hand(Fake { exists: true, ..member() }, "is open to anybody");
        let closed = json!({"members": {"names": ["other"], "roles": []}});
        check_by_hand(
            Fake { exists: true, security: closed.clone(), ..member() },
            "cannot be read with this login",
        );
        let by_role = Fake { exists: true, is_member: true, security: closed, ..member() };
        let (_, scripted) = world(by_role);
        ensure(&scripted.server(None), "state", Some("hookd")).unwrap();
    }

    #[test]
    fn a_database_that_stays_open_gets_no_key() {
        let (fake, scripted) = world(Fake { forgets_security: true, ..open_server() });
        let error = ensure(&scripted.server(None), "state", Some("hookd")).unwrap_err();
        assert!(error.to_string().contains("still open to anybody"), "{error}");
        assert!(fake.lock().unwrap().docs.is_empty());
    }

    #[test]
    fn a_damaged_key_is_said_and_not_shown() {
        let (fake, scripted) = world(open_server());
        let bad = (1, json!({"key": "canary"}));
        fake.lock().unwrap().docs.insert("couch-hookd".to_owned(), bad);
        let error = ensure(&scripted.server(None), "state", None).unwrap_err();
        assert_eq!(error.kind(), Kind::Malformed);
        assert!(!error.to_string().contains("canary"), "{error}");
    }

    #[test]
    fn records_keep_what_this_version_does_not_know() {
        let (fake, scripted) = world(Fake { exists: true, ..open_server() });
        let server = scripted.server(None);
        assert_eq!(read_record(&server, "state", "orders").unwrap(), None);
        let mut record = WebhookRecord {
            activated_at: Some("2026-11-21T20:46:41Z".parse().unwrap()),
            databases: BTreeMap::from([("a/b".to_owned(), Mark::new([1; 16]))]),
            fingerprint: "9a".to_owned(),
            ..WebhookRecord::default()
        };
        let rev = write_record(&server, "state", "orders", &record).unwrap();
        assert_eq!(write_record(&server, "state", "orders", &record).unwrap_err().kind(), Kind::Conflict);
        fake.lock().unwrap().docs.get_mut("webhook:orders").unwrap().1["requests"] = json!([{"n": 1}]);
        record.rev = Some(rev);
        record.other.insert("requests".to_owned(), json!([{"n": 1}]));
        assert_eq!(read_record(&server, "state", "orders").unwrap().as_ref(), Some(&record));
        record.gone_since = Some("2026-11-22T00:00:00Z".parse().unwrap());
        record.rev = Some(write_record(&server, "state", "orders", &record).unwrap());
        assert_eq!(read_record(&server, "state", "orders").unwrap(), Some(record));
    }

    fn letter(n: usize, webhook: &str, class: DeadLetterClass) -> DeadLetter {
        DeadLetter {
            id: format!("msg_{n:032x}"),
            webhook: webhook.to_owned(),
            db: "orders".to_owned(),
            mark: Mark::new([1; 16]),
            doc_id: format!("order:{n}"),
            rev: "1-a".to_owned(),
            revs: vec!["1-a".to_owned()],
            seq: RawValue::from_string("\"4-x\"".to_owned()).ok(),
            event_type: "document.updated".to_owned(),
            class,
            status: Some(422),
            answer: "é".repeat(600),
            attempts: 3,
            first_attempt_at: "2026-11-21T20:46:41Z".parse().unwrap(),
            stored_at: "2026-11-21T20:46:51.5Z".parse().unwrap(),
            payload: None,
        }
    }

    #[test]
    fn a_letter_is_stored_once_and_found() {
        let (fake, scripted) = world(Fake { exists: true, ..open_server() });
        let server = scripted.server(None);
        let letter = letter(1, "orders", DeadLetterClass::Refused);
        assert!(!dead_letter_exists(&server, "state", &letter.id).unwrap());
        for _ in 0..2 {
            store_dead_letter(&server, "state", &letter).unwrap();
            assert!(dead_letter_exists(&server, "state", &letter.id).unwrap());
        }
        let puts: Vec<Seen> = scripted.seen().into_iter().filter(|seen| seen.method == "PUT").collect();
        assert!(puts.iter().all(|seen| seen.headers.contains(&"x-couch-full-commit: true".to_owned())));
        let stored = fake.lock().unwrap().docs[&letter.id].1.clone();
        assert_eq!((stored["seq"].clone(), stored["class"].clone()), (json!("4-x"), json!("refused")));
        assert_eq!(stored["answer"].as_str().unwrap().len(), 1024);
        for _ in 0..2 {
            delete_dead_letter(&server, "state", &letter.id).unwrap();
            assert!(!dead_letter_exists(&server, "state", &letter.id).unwrap());
        }
    }

    #[test]
    fn letters_are_counted_and_suspects_listed_over_pages() {
        let (fake, scripted) = world(Fake { exists: true, ..open_server() });
        let server = scripted.server(None);
        for n in 0..(2 * PAGE_ROWS + 1) {
            let (webhook, class) = match n % 100 {
                0 => ("orders", DeadLetterClass::Suspect),
                1 => ("other", DeadLetterClass::Suspect),
                _ => ("orders", DeadLetterClass::Refused),
            };
            let body = serde_json::to_value(letter(n, webhook, class)).unwrap();
            fake.lock().unwrap().docs.insert(format!("msg_{n:032x}"), (1, body));
        }
        fake.lock().unwrap().docs.insert("webhook:orders".to_owned(), (1, json!({})));
        let count = |max| count_dead_letters(&server, "state", "orders", max).unwrap();
        assert_eq!(count(10_000), 397);
        assert_eq!(count(7), 7);
        assert_eq!(scripted.asked().len(), 3 + 1);
        let suspects = list_suspects(&server, "state", "orders").unwrap();
        let ids: Vec<&str> = suspects.iter().map(|letter| letter.doc_id.as_str()).collect();
        assert_eq!(ids, ["order:0", "order:100", "order:200", "order:300", "order:400"]);
    }
}
