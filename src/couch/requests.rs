//! Requests: documents in `state_db` by which a command asks the daemon that runs a webhook to do something.
//!
//! Guarantees that a request is on the disk before anybody relies on it, that ids sort by the time they were made,
//! and that an answer is given once. That the *effect* comes once is the doer's: it is one write of a document that
//! names the request (`WebhookRecord::requests_done`), or can be done twice without harm.

use std::collections::{BTreeMap, BTreeSet};

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::couch::all_docs;
use crate::couch::client::{Limits, Server, Written, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::couch::state_db::{DeadLetterClass, FULL_COMMIT, found};
use crate::error::{Context, Error, Kind, Result};
use crate::sys;

/// In front of the id of every request.
pub const PREFIX: &str = "request:";
/// Requests listed at most; more are never open at a time.
const LISTED_MAX: usize = 10_000;
/// Answered requests stay for a day, to be looked at.
const KEPT_SECONDS: i64 = 24 * 3600;
/// Letters that stay are named up to so many.
pub const STAY_MAX: usize = 20;
/// Tries to answer while others write to the same document.
const ANSWER_TRIES: u32 = 5;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Command {
    /// Stop reading and delivering, keep the place.
    Pause,
    /// End a pause, whatever began it.
    Resume,
    /// Go on from another place.
    Seek,
    /// Send dead letters again.
    Replay,
    /// Delete dead letters.
    Discard,
    /// Show attempts as they are made, for a while.
    Tail,
    /// Every daemon is to say at once how its webhooks are (`couch::alive`). Taken back by whoever asked.
    Status,
}

impl Command {
    /// The word.
    pub fn as_str(self) -> &'static str {
        match self {
            Command::Pause => "pause",
            Command::Resume => "resume",
            Command::Seek => "seek",
            Command::Replay => "replay",
            Command::Discard => "discard",
            Command::Tail => "tail",
            Command::Status => "status",
        }
    }
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// Not done, or not all of it.
    Open,
    /// Done.
    Done,
    /// It cannot be done; the answer's `error` says why.
    Failed,
}

/// Which dead letters are meant.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Letters {
    /// Of this class alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<DeadLetterClass>,
    /// Stored at or after this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_since: Option<jiff::Timestamp>,
    /// Stored at or before this: the newest one that was shown to whoever asked. By the clock that wrote the
    /// letters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_until: Option<jiff::Timestamp>,
    /// These alone, by id; empty = all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    /// How many there were, for the answer.
    #[serde(default)]
    pub n_letters: u64,
}

/// What a command needs to know.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Arguments {
    /// `pause`: for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `seek`: `now`, `0`, or a seq as CouchDB wrote it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Value>,
    /// `seek`: this database alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub db: Option<String>,
    /// `replay`, `discard`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub letters: Option<Letters>,
    /// `replay`: also what a newer revision was delivered after.
    #[serde(default)]
    pub even_if_superseded: bool,
    /// `replay`: at most so many a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// `tail`: grows while somebody looks.
    #[serde(default)]
    pub n_renewed: u64,
}

/// A request.
///
/// `{"_id":"request:00001795296608123456-5f0c12ab","webhook":"orders","command":"pause","arguments":{…},
/// "made_at":"2026-11-21T20:46:41Z","made_by":"anna","state":"done","answer":{…},"done_at":"…"}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// [`PREFIX`], microseconds since 1970 in 20 digits, `-`, random digits.
    #[serde(rename = "_id")]
    pub id: String,
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// Name of the webhook.
    pub webhook: String,
    /// What is asked for.
    pub command: Command,
    /// What it needs to know.
    #[serde(default)]
    pub arguments: Arguments,
    /// By the clock of whoever asked.
    pub made_at: jiff::Timestamp,
    /// Who asked, for people.
    #[serde(default)]
    pub made_by: String,
    /// How far it has come.
    pub state: Progress,
    /// What came of it so far.
    #[serde(default)]
    pub answer: Map<String, Value>,
    /// When that was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done_at: Option<jiff::Timestamp>,
}

impl Request {
    /// A new one, not written yet.
    pub fn new(webhook: &str, command: Command, arguments: Arguments, made_by: &str) -> Request {
        let made_at = sys::wall();
        let random = u32::from_be_bytes(sys::random_bytes());
        Request {
            id: format!("{PREFIX}{:020}-{random:08x}", made_at.as_microsecond()),
            rev: None,
            webhook: webhook.to_owned(),
            command,
            arguments,
            made_at,
            made_by: made_by.to_owned(),
            state: Progress::Open,
            answer: Map::new(),
            done_at: None,
        }
    }

    /// From a document's JSON; `None` when it is no request that this version knows.
    pub fn parse(json: &str) -> Option<Request> {
        serde_json::from_str(json).ok()
    }
}

/// Stores a request; when this returns, it is on the disk.
///
/// # Errors
/// `Conflict` when somebody else wrote it since. Else as [`Server::request`].
pub fn write(server: &Server, state_db: &str, request: &mut Request) -> Result<()> {
    let path = db_path(state_db, &[&request.id]);
    let body = serde_json::to_string(request).expect("a request of texts is always JSON");
    let reply = server.request(&Method::PUT, &path, Some(&body), &[FULL_COMMIT])?;
    let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
    request.rev = Some(written.rev);
    Ok(())
}

/// A request as it is now; `None` when it was deleted.
///
/// # Errors
/// As [`Server::get_json`].
pub fn read(server: &Server, state_db: &str, id: &str) -> Result<Option<Request>> {
    let path = db_path(state_db, &[id]);
    let Some(body) = found(server.request(&Method::GET, &path, None, &[]))? else { return Ok(None) };
    from_json(&body).map(Some).context(|| format!("GET {path}"))
}

/// All requests, in the order in which they were made. What is none that this version knows is left out.
///
/// # Errors
/// As [`Server::get_json`].
pub fn list(server: &Server, state_db: &str) -> Result<Vec<Request>> {
    let (rows, _) = all_docs::beginning_with::<Box<RawValue>>(
        server,
        state_db,
        PREFIX,
        Some(LISTED_MAX),
        Limits::default(),
    )?;
    Ok(rows.into_iter().filter_map(|row| Request::parse(row.doc?.get())).collect())
}

/// Writes what came of a request so far, unless it has its last answer already or is gone.
///
/// # Errors
/// `Conflict` when others write to it all the time. Else as [`Server::request`].
pub fn answer(
    server: &Server,
    state_db: &str,
    id: &str,
    state: Progress,
    answer: &Map<String, Value>,
) -> Result<()> {
    let mut tries = 0;
    loop {
        tries += 1;
        let Some(mut request) = read(server, state_db, id)? else { return Ok(()) };
        if request.state != Progress::Open {
            return Ok(());
        }
        request.state = state;
        request.answer.clone_from(answer);
        request.done_at = (state != Progress::Open).then(sys::wall);
        match write(server, state_db, &mut request) {
            Err(error) if error.kind() == Kind::Conflict && tries < ANSWER_TRIES => {}
            result => return result,
        }
    }
}

/// What came of letters that were to be sent again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Tally {
    /// Sent and taken.
    pub delivered: u64,
    /// A newer revision was delivered before; the letter stays, as those below.
    pub superseded: u64,
    /// Refused again.
    pub refused: u64,
    /// The endpoint failed at it, or its document could not be read.
    pub failed: u64,
    /// There is no such document any more, or its database is not watched.
    pub gone: u64,
    /// Letters that are still there: those that stay, and those that are yet to be sent.
    pub left: u64,
    /// Some of those that stay, and why.
    pub stay: Vec<Value>,
}

impl Tally {
    /// As an answer, of so many letters altogether. Those that are not there any more were delivered, by earlier tries too.
    pub fn answer(&self, n_letters: u64) -> Map<String, Value> {
        let mut answer = fields(self);
        answer.insert("letters".to_owned(), json!(n_letters));
        answer.insert("delivered".to_owned(), json!(n_letters.saturating_sub(self.left)));
        answer
    }

    fn add(&mut self, other: Tally) {
        self.delivered += other.delivered;
        self.superseded += other.superseded;
        self.refused += other.refused;
        self.failed += other.failed;
        self.gone += other.gone;
        self.left += other.left;
        self.stay.extend(other.stay);
    }
}

/// What one of several daemons that divide a webhook's databases has done of a request (`lease = shared`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Whether it is all that it had to do, while the databases were divided among `among`.
    pub over: bool,
    /// All members that it saw, itself among them.
    pub among: BTreeSet<String>,
    /// What came of its part.
    #[serde(flatten)]
    pub tally: Tally,
}

/// Puts a member's part into the answer of a request; the last one that was missing ends it. Gives the state then; `Done` for a
/// request that is gone.
///
/// # Errors
/// As [`answer`].
pub fn answer_part(server: &Server, state_db: &str, id: &str, member: &str, part: &Part) -> Result<Progress> {
    let mut tries = 0;
    loop {
        tries += 1;
        let Some(mut request) = read(server, state_db, id)? else { return Ok(Progress::Done) };
        if request.state != Progress::Open {
            return Ok(request.state);
        }
        let n_asked = request.arguments.letters.as_ref().map_or(0, |letters| letters.n_letters);
        let (answer, is_over) = with_part(request.answer, n_asked, member, part);
        request.answer = answer;
        if is_over {
            (request.state, request.done_at) = (Progress::Done, Some(sys::wall()));
        }
        match write(server, state_db, &mut request) {
            Err(error) if error.kind() == Kind::Conflict && tries < ANSWER_TRIES => {}
            result => return result.map(|()| request.state),
        }
    }
}

/// An answer with one more part in it, and whether none is missing: each of those among whom the databases are divided has
/// done its part, and saw the same others. What one has done counts when it is gone, too; what it left is another's by then.
fn with_part(
    mut answer: Map<String, Value>,
    n_asked: u64,
    member: &str,
    part: &Part,
) -> (Map<String, Value>, bool) {
    let parts = answer.remove("parts").and_then(|parts| serde_json::from_value(parts).ok());
    let mut parts: BTreeMap<String, Part> = parts.unwrap_or_default();
    parts.insert(member.to_owned(), part.clone());
    let mut all = Tally::default();
    for (name, one) in &parts {
        all.add(match part.among.contains(name) {
            true => one.tally.clone(),
            false => Tally { delivered: one.tally.delivered, ..Tally::default() },
        });
    }
    let has_each = |is: &dyn Fn(&Part) -> bool| part.among.iter().all(|name| parts.get(name).is_some_and(is));
    let is_over = has_each(&|one| one.over && one.among == part.among);
    all.stay.truncate(STAY_MAX);
    let n_seen = all.delivered + all.left;
    let mut answer = all.answer(n_asked.max(n_seen));
    if !has_each(&|_| true) {
        // What others have is not known yet.
        answer.insert("delivered".to_owned(), json!(all.delivered));
        answer.insert("left".to_owned(), json!(n_asked.max(n_seen) - all.delivered));
    }
    answer.insert("parts".to_owned(), json!(parts));
    (answer, is_over)
}

fn fields(value: &impl Serialize) -> Map<String, Value> {
    match serde_json::to_value(value) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// Deletes requests that were answered more than a day ago, and those of people who looked and never ended it.
///
/// # Errors
/// As [`Server::request`].
pub fn delete_old(server: &Server, state_db: &str) -> Result<()> {
    let now = sys::wall();
    let is_old = |at: jiff::Timestamp| now.duration_since(at).as_secs() > KEPT_SECONDS;
    for request in list(server, state_db)? {
        let over = match request.state {
            Progress::Open => {
                matches!(request.command, Command::Tail | Command::Status) && is_old(request.made_at)
            }
            Progress::Done | Progress::Failed => is_old(request.done_at.unwrap_or(request.made_at)),
        };
        if over {
            delete(server, state_db, &request)?;
        }
    }
    Ok(())
}

/// Deletes a request; one that is gone, or has changed since, is fine.
///
/// # Errors
/// As [`Server::request`].
pub fn delete(server: &Server, state_db: &str, request: &Request) -> Result<()> {
    let rev = request.rev.as_deref().unwrap_or_default();
    let path = format!("{}?rev={}", db_path(state_db, &[&request.id]), encoded(rev));
    match server.request(&Method::DELETE, &path, None, &[]) {
        Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::Conflict) => Err(error),
        _ => Ok(()),
    }
}

/// An answer of one text.
pub fn text(name: &str, text: impl Into<String>) -> Map<String, Value> {
    Map::from_iter([(name.to_owned(), Value::String(text.into()))])
}

/// Why a request failed, for people.
pub fn error_of(request: &Request) -> Error {
    let why = request.answer.get("error").and_then(Value::as_str).unwrap_or("no reason was given");
    Error::new(Kind::BadRequest, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_as_it_was_written_and_ids_sort_by_time() {
        let letters = Letters { class: Some(DeadLetterClass::GivenUp), n_letters: 7, ..Letters::default() };
        let arguments = Arguments { letters: Some(letters), rate: Some(50), ..Arguments::default() };
        let first = Request::new("orders", Command::Replay, arguments, "anna");
        let json = serde_json::to_string(&first).unwrap();
        assert_eq!(Request::parse(&json).unwrap(), first);
        assert!(json.contains(r#""command":"replay""#) && json.contains(r#""class":"given_up""#), "{json}");
        assert!(json.contains(r#""state":"open""#), "{json}");
        sys::sleep(std::time::Duration::from_millis(2));
        let second = Request::new("orders", Command::Pause, Arguments::default(), "");
        assert!(second.id > first.id && first.id.len() == PREFIX.len() + 20 + 1 + 8, "{}", first.id);
    }

    #[test]
    fn the_last_part_that_was_missing_ends_a_request() {
        /// Parts as they come: of whom, over or not, among whom, delivered, left.
        fn check(n_asked: u64, parts: &[(&str, bool, &[&str], u64, u64)], expected: &str) {
            let mut answer = Map::new();
            let mut seen = Vec::new();
            for (member, over, among, delivered, left) in parts {
                let tally = Tally { delivered: *delivered, refused: *left, left: *left, ..Tally::default() };
                let among = among.iter().map(|&name| name.to_owned()).collect();
                let is_over;
                (answer, is_over) = with_part(answer, n_asked, member, &Part { over: *over, among, tally });
                let end = if is_over { " over" } else { "" };
                seen.push(format!(
                    "{} of {}, {} left{end}",
                    answer["delivered"], answer["letters"], answer["left"]
                ));
            }
            assert_eq!(seen.join("; "), expected);
        }
        let ab: &[&str] = &["a", "b"];
        check(3, &[("a", true, &["a"], 2, 1)], "2 of 3, 1 left over");
        check(
            5,
            &[("a", false, ab, 1, 1), ("b", true, ab, 2, 0), ("a", true, ab, 1, 1)],
            "1 of 5, 4 left; 4 of 5, 1 left; 4 of 5, 1 left over",
        );
        // `c` dies, what it left is found by the others; a part that was done among others before does not count.
        let abc: &[&str] = &["a", "b", "c"];
        check(
            6,
            &[
                ("a", true, abc, 1, 0),
                ("b", true, abc, 1, 0),
                ("c", false, abc, 1, 3),
                ("a", true, ab, 3, 0),
                ("b", true, ab, 2, 0),
            ],
            "1 of 6, 5 left; 2 of 6, 4 left; 3 of 6, 3 left; 6 of 6, 0 left; 6 of 6, 0 left over",
        );
    }

    #[test]
    fn what_another_version_wrote_is_read_as_far_as_it_is_known() {
        let json = r#"{"_id":"request:1-a","_rev":"1-x","webhook":"orders","command":"seek","made_at":
            "2026-11-21T20:46:41Z","state":"open","arguments":{"to":"42-g1","later":true},"later":1}"#;
        let request = Request::parse(json).unwrap();
        assert_eq!((request.arguments.to, request.made_by.as_str()), (Some(json!("42-g1")), ""));
        assert_eq!(Request::parse(&json.replace("seek", "dance")), None);
        assert_eq!(Request::parse("{}"), None);
    }
}
