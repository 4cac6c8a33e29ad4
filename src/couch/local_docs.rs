//! Marks and checkpoints: the `_local` documents in a watched database.
//!
//! Guarantees the rules of DESIGN §7, each of which stands on an experiment: a mark is never written together with a
//! checkpoint and is read back before use; a checkpoint counts only in the life of the database it was written in,
//! and only when we wrote it. What to do with a position is left to the caller.

use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::couch::client::{Generation, Limits, Reply, Server, Written, db_path};
use crate::couch::refusal::from_json;
use crate::couch::state_db::FULL_COMMIT;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::{CHECKPOINT_BYTES_MAX, Checkpoint, Mark, Seek, StateKey, checkpoint_id};
use crate::pure::seq::Seq;
use crate::sys;

/// `_local/` plus this is the mark's id.
const MARK_ID: &str = "couch-hookd";
/// A missing mark is believed after so many reads: a lagging copy in a cluster can miss it.
const N_MARK_READS: u32 = 3;
/// Time between those reads.
const MARK_READ_PAUSE: Duration = Duration::from_secs(1);

/// 1.x: `instance_start_time` of a database, another one after every start of the server, and after every opening of the
/// file: a server keeps 100 open (`max_dbs_open`), and closes those that nobody follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Which.
    pub db: String,
    /// Microseconds.
    pub since: String,
}

/// What was found before a feed is opened.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The mark of the database as it is now; stored and read back.
    pub mark: Mark,
    /// Where to go on; `None` = there is no position that holds.
    pub checkpoint: Option<Checkpoint>,
    /// `_rev` of the stored checkpoint, also of one that does not count: the next write must carry it.
    pub checkpoint_rev: Option<String>,
    /// The database is not the one that was known: another mark, or none where there was one. With a `checkpoint`
    /// (written since the re-creation) only `known_mark` was out of date.
    pub recreated: bool,
    /// Why a stored checkpoint was dropped that should have counted; to be said at error level.
    pub not_believed: Option<String>,
    /// 1.x: that of the database.
    pub life: Option<Life>,
    /// 1.x: the server lost its last changes, or was restored; the position was dropped.
    pub rolled_back: bool,
    /// Documents in the database, deletions not counted.
    pub doc_count: u64,
}

/// What `GET /DB` says.
#[derive(Deserialize)]
struct Info {
    #[serde(default)]
    doc_count: u64,
    update_seq: Option<Box<RawValue>>,
    instance_start_time: Option<serde_json::Value>,
}

/// `_local/couch-hookd` as stored.
///
/// `{"_id":"_local/couch-hookd","_rev":"0-1","mark":"5f0c…","instance_start_time":"1795296608"}`
struct StoredMark {
    rev: Option<String>,
    /// `None` when it is not 32 hex digits: somebody else wrote it.
    mark: Option<Mark>,
    created: Option<String>,
}

/// Reads mark and checkpoint, as before every opening of a feed; writes a mark where none is.
///
/// `known_mark` and `seek` are what the webhook's record or memory says; `pause` sleeps, and may return early.
///
/// # Errors
/// `NotFound` when the database does not exist; else as [`Server::request`].
#[expect(clippy::too_many_arguments, reason = "what is known of a database, from three places")]
pub fn open(
    server: &Server,
    generation: Generation,
    db: &str,
    webhook: &str,
    key: &StateKey,
    known_mark: Option<&Mark>,
    seek: Option<&Seek>,
    pause: &dyn Fn(Duration),
) -> Result<Opened> {
    let info: Info = server.get_json(&db_path(db, &[]))?;
    let created = creation_time(generation, &info);
    let stored = read_mark(server, db)?;
    let read = read_checkpoint(server, db, webhook, key)?;
    let was_marked = known_mark.is_some() || read.exists;
    let (mark, is_new_life) = settle_mark(server, db, stored, created, was_marked, pause)?;
    let copy = read.checkpoint.as_ref().map(|checkpoint| checkpoint.mark);
    let recreated = match (known_mark, copy) {
        // Who knows the mark has heard of the re-creation; an old checkpoint is only not yet written over.
        (Some(known), _) => *known != mark,
        (None, Some(copy)) => copy != mark,
        (None, None) => is_new_life,
    };
    let mut opened = Opened {
        mark,
        checkpoint: behind_seek(read.checkpoint.filter(|checkpoint| checkpoint.mark == mark), seek, mark),
        checkpoint_rev: read.rev,
        recreated,
        not_believed: read.not_believed,
        life: life(generation, db, &info),
        rolled_back: false,
        doc_count: info.doc_count,
    };
    if let Some(checkpoint) = &opened.checkpoint
        && generation == Generation::One
        && is_behind(&info, &checkpoint.through_seq)
    {
        opened.checkpoint = None;
        opened.rolled_back = true;
    }
    Ok(opened)
}

/// The position that counts: of a checkpoint that knows of the last seek, else the seek's own.
fn behind_seek(checkpoint: Option<Checkpoint>, seek: Option<&Seek>, mark: Mark) -> Option<Checkpoint> {
    let Some(seek) = seek.filter(|seek| seek.mark == mark) else { return checkpoint };
    let knows = |checkpoint: &Checkpoint| checkpoint.seek.as_deref() == Some(seek.request.as_str());
    checkpoint.filter(knows).or_else(|| {
        Some(Checkpoint {
            through_seq: seek.through_seq(),
            mark,
            delivered: Vec::new(),
            time: sys::wall(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seek: Some(seek.request.clone()),
        })
    })
}

/// The position of a webhook in a database as it is stored, without writing anything; `None` when there is none
/// that holds.
///
/// # Errors
/// As [`open`].
pub fn position(
    server: &Server,
    db: &str,
    webhook: &str,
    key: &StateKey,
    seek: Option<&Seek>,
) -> Result<Option<Checkpoint>> {
    let Some(mark) = read_mark(server, db)?.and_then(|stored| stored.mark) else { return Ok(None) };
    let checkpoint = read_checkpoint(server, db, webhook, key)?.checkpoint;
    Ok(behind_seek(checkpoint.filter(|checkpoint| checkpoint.mark == mark), seek, mark))
}

/// Whether the database still bears `mark`, and on 1.x (`life` given) its server was not started again since.
///
/// # Errors
/// As [`open`].
pub fn is_same(server: &Server, db: &str, mark: &Mark, life_then: Option<&Life>) -> Result<bool> {
    if let Some(life_then) = life_then {
        let now = match life_then.db == db {
            true => life(Generation::One, db, &server.get_json(&db_path(db, &[]))?),
            false => life_of_server(server, Generation::One, &life_then.db)?,
        };
        if now.as_ref() != Some(life_then) {
            return Ok(false);
        }
    }
    let stored = read_mark(server, db)?;
    Ok(stored.and_then(|stored| stored.mark).as_ref() == Some(mark))
}

/// On 1.x the life of the server: that of a database that somebody follows all the time, which is not the one that is asked
/// about otherwise.
///
/// # Errors
/// As [`Server::request`]; never `NotFound`, which would be said of the other.
pub fn life_of_server(server: &Server, generation: Generation, followed_db: &str) -> Result<Option<Life>> {
    if generation != Generation::One {
        return Ok(None);
    }
    match server.get_json::<Info>(&db_path(followed_db, &[])) {
        Ok(info) => Ok(life(generation, followed_db, &info)),
        Err(error) if error.kind() == Kind::NotFound => {
            Err(Error::new(Kind::Server, format!("`{followed_db}` is not there ({})", error.cause())))
        }
        Err(error) => Err(error),
    }
}

/// `_rev` of the stored checkpoint.
///
/// # Errors
/// As [`open`].
pub fn checkpoint_rev(server: &Server, db: &str, webhook: &str) -> Result<Option<String>> {
    #[derive(Deserialize)]
    struct Revision {
        #[serde(rename = "_rev")]
        rev: Option<String>,
    }
    let path = local_path(db, &checkpoint_id(webhook));
    let Some(reply) = read_local(server, db, &path)? else { return Ok(None) };
    from_json::<Revision>(&reply.body).map(|revision| revision.rev).context(|| format!("GET {path}"))
}

/// The database's mark, written first when there is none. One that is known to have had one is asked more than once.
///
/// # Errors
/// As [`open`].
pub fn ensure_mark(
    server: &Server,
    generation: Generation,
    db: &str,
    was_marked: bool,
    pause: &dyn Fn(Duration),
) -> Result<Mark> {
    let info: Info = server.get_json(&db_path(db, &[]))?;
    let stored = read_mark(server, db)?;
    settle_mark(server, db, stored, creation_time(generation, &info), was_marked, pause).map(|(mark, _)| mark)
}

/// Stores a webhook's first checkpoint, or over the one whose `_rev` is given, and gives the new `_rev`. Never together
/// with a mark. When this returns, it is on the disk.
///
/// # Errors
/// `Conflict` on 1.x when another one is stored; 2.x and 3.x do not check. Else as [`Server::put_json`].
pub fn write_checkpoint(
    server: &Server,
    db: &str,
    webhook: &str,
    key: &StateKey,
    checkpoint: &Checkpoint,
    rev: Option<&str>,
) -> Result<String> {
    let body = checkpoint.to_json(db, webhook, key, rev);
    put_checkpoint(server, &local_path(db, &checkpoint_id(webhook)), &body, &[FULL_COMMIT], Limits::default())
}

/// As [`write_checkpoint`], with limits for a hurried end, and on 1.x on the disk a second later: one that is lost
/// with a killed CouchDB is lost with all that was written after the one before.
///
/// # Errors
/// As [`write_checkpoint`].
pub fn write_checkpoint_within(
    server: &Server,
    db: &str,
    webhook: &str,
    key: &StateKey,
    checkpoint: &Checkpoint,
    rev: Option<&str>,
    limits: Limits,
) -> Result<String> {
    let body = checkpoint.to_json(db, webhook, key, rev);
    put_checkpoint(server, &local_path(db, &checkpoint_id(webhook)), &body, &[], limits)
}

fn put_checkpoint(
    server: &Server,
    path: &str,
    body: &str,
    headers: &[(&str, &str)],
    limits: Limits,
) -> Result<String> {
    let reply = server.request_within(&Method::PUT, path, Some(body), headers, limits)?;
    let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
    Ok(written.rev)
}

/// Gives the mark to use, and whether a database that had one has another life now.
fn settle_mark(
    server: &Server,
    db: &str,
    mut stored: Option<StoredMark>,
    created: Option<String>,
    was_marked: bool,
    pause: &dyn Fn(Duration),
) -> Result<(Mark, bool)> {
    let mut n_reads = 1;
    while stored.is_none() && was_marked && n_reads < N_MARK_READS {
        pause(MARK_READ_PAUSE);
        stored = read_mark(server, db)?;
        n_reads += 1;
    }
    let is_of_this_life = |stored: &StoredMark| match (&stored.created, &created) {
        (Some(then), Some(now)) => then == now,
        // Written by a server that gave no creation time, such as 3.2 before an upgrade.
        _ => true,
    };
    match &stored {
        Some(found @ StoredMark { mark: Some(mark), .. }) if is_of_this_life(found) => Ok((*mark, false)),
        Some(_) => Ok((write_mark(server, db, stored, created.as_deref())?, true)),
        None => Ok((write_mark(server, db, None, created.as_deref())?, was_marked)),
    }
}

/// Stores a new mark in place of `old` and gives what stands there afterwards, ours or that of another writer.
fn write_mark(server: &Server, db: &str, old: Option<StoredMark>, created: Option<&str>) -> Result<Mark> {
    // Two webhooks that find no mark at the same moment would both write one, and on 2.x and 3.x both succeed.
    let _alone = server.lock_marks();
    let seen_rev = old.and_then(|old| old.rev);
    let now = read_mark(server, db)?;
    if let Some(StoredMark { rev, mark: Some(mark), .. }) = &now
        && *rev != seen_rev
    {
        return Ok(*mark);
    }
    let mut document = serde_json::json!({ "mark": Mark::new(sys::random_bytes()) });
    if let Some(rev) = seen_rev {
        document["_rev"] = rev.into();
    }
    if let Some(created) = created {
        document["instance_start_time"] = created.into();
    }
    let body = document.to_string();
    match server.request(&Method::PUT, &local_path(db, MARK_ID), Some(&body), &[FULL_COMMIT]) {
        Ok(_) => {}
        // Another daemon was first; its mark is as good.
        Err(error) if error.kind() == Kind::Conflict => {}
        Err(error) => return Err(error),
    }
    match read_mark(server, db)? {
        Some(StoredMark { mark: Some(mark), .. }) => Ok(mark),
        _ => Err(Error::new(Kind::Server, "the mark is not there after it was written"))
            .context(|| format!("database `{db}`")),
    }
}

fn read_mark(server: &Server, db: &str) -> Result<Option<StoredMark>> {
    #[derive(Deserialize)]
    struct Document {
        #[serde(rename = "_rev")]
        rev: Option<String>,
        #[serde(default)]
        mark: serde_json::Value,
        #[serde(default)]
        instance_start_time: serde_json::Value,
    }
    let path = local_path(db, MARK_ID);
    let Some(reply) = read_local(server, db, &path)? else { return Ok(None) };
    let document: Document = from_json(&reply.body).context(|| format!("GET {path}"))?;
    Ok(Some(StoredMark {
        rev: document.rev,
        mark: document.mark.as_str().and_then(Mark::parse),
        created: document.instance_start_time.as_str().map(str::to_owned),
    }))
}

/// A checkpoint as found.
#[derive(Default)]
struct ReadCheckpoint {
    exists: bool,
    rev: Option<String>,
    checkpoint: Option<Checkpoint>,
    not_believed: Option<String>,
}

fn read_checkpoint(server: &Server, db: &str, webhook: &str, key: &StateKey) -> Result<ReadCheckpoint> {
    #[derive(Deserialize)]
    struct Revision {
        #[serde(rename = "_rev")]
        rev: Option<String>,
    }
    let path = local_path(db, &checkpoint_id(webhook));
    let Some(reply) = read_local(server, db, &path)? else { return Ok(ReadCheckpoint::default()) };
    let revision: Revision = from_json(&reply.body).context(|| format!("GET {path}"))?;
    let (checkpoint, not_believed) = match Checkpoint::from_json(&reply.body, db, webhook, key) {
        Ok(checkpoint) => (Some(checkpoint), None),
        Err(why) => (None, Some(why)),
    };
    Ok(ReadCheckpoint { exists: true, rev: revision.rev, checkpoint, not_believed })
}

/// `None` when the document is missing; an error when the database is.
fn read_local(server: &Server, db: &str, path: &str) -> Result<Option<Reply>> {
    // What is over the checkpoint's limit is read to be reported, up to what CouchDB 3.x can hold at all.
    let limits = Limits { body_bytes_max: 16 * CHECKPOINT_BYTES_MAX as u64, ..Limits::default() };
    match server.request_within(&Method::GET, path, None, &[], limits) {
        Ok(reply) => Ok(Some(reply)),
        Err(error) if error.kind() == Kind::NotFound => {
            // The same status for both; only the database itself can tell.
            server.request(&Method::GET, &db_path(db, &[]), None, &[])?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// `instance_start_time` where it is the time of creation, in seconds: from 3.3 on. On 1.x (microseconds) and in
/// pouchdb-server (milliseconds) it is the time of opening, on 2.0 to 3.2 it is `"0"`.
fn creation_time(generation: Generation, info: &Info) -> Option<String> {
    let time = info.instance_start_time.as_ref()?.as_str()?;
    (generation == Generation::Three && is_creation_time(time)).then(|| time.to_owned())
}

/// Whether an `instance_start_time` is in seconds, as only a time of creation is.
pub(crate) fn is_creation_time(time: &str) -> bool {
    (9..=11).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit())
}

/// On 1.x `instance_start_time` is the time of opening.
fn life(generation: Generation, db: &str, info: &Info) -> Option<Life> {
    let time = info.instance_start_time.as_ref()?.as_str()?;
    (generation == Generation::One).then(|| Life { db: db.to_owned(), since: time.to_owned() })
}

/// Whether a 1.x server counts less changes than the position says.
fn is_behind(info: &Info, through_seq: &Seq) -> bool {
    let count = |json: &str| json.parse::<u64>().ok();
    match (info.update_seq.as_ref().and_then(|seq| count(seq.get())), count(through_seq.as_json())) {
        (Some(update_seq), Some(through_seq)) => update_seq < through_seq,
        _ => false,
    }
}

fn local_path(db: &str, id: &str) -> String {
    db_path(db, &["_local", id])
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};

    use super::*;
    use crate::couch::scripted::{Scripted, send};
    use crate::pure::checkpoint::DeliveredId;

    /// One database with `_local` documents and nothing else.
    struct Fake {
        /// `GET /DB`; `null` = there is none.
        info: Value,
        docs: HashMap<String, (u32, Value)>,
        /// 1.x refuses a wrong `_rev`; 2.x and 3.x take anything.
        checks_revs: bool,
        /// Reads of a mark that miss it.
        n_missed: u32,
    }

    struct World {
        fake: Arc<Mutex<Fake>>,
        server: Server,
        generation: Generation,
        n_pauses: Cell<u32>,
    }

    const MARK: &str = "/db/_local/couch-hookd";
    const CHECKPOINT: &str = "/db/_local/couch-hookd.shop";

    impl World {
        fn new(generation: Generation) -> World {
            let fake = Arc::new(Mutex::new(Fake {
                info: json!({"doc_count": 5, "update_seq": 9, "instance_start_time": "0"}),
                docs: HashMap::new(),
                checks_revs: generation == Generation::One,
                n_missed: 0,
            }));
            let state = Arc::clone(&fake);
            let scripted = Scripted::start(move |seen, stream| {
                let (status, body) = state.lock().unwrap().answer(&seen.method, &seen.path, &seen.body);
                send(stream, status, &body.to_string());
            });
            World { fake, server: scripted.server(None), generation, n_pauses: Cell::new(0) }
        }

        fn open_knowing(&self, known: Option<Mark>) -> Result<Opened> {
            let pause = |time: Duration| {
                assert_eq!(time, Duration::from_secs(1));
                self.n_pauses.set(self.n_pauses.get() + 1);
            };
            open(&self.server, self.generation, "db", "shop", &key(), known.as_ref(), None, &pause)
        }

        fn open(&self) -> Opened {
            self.open_knowing(None).unwrap()
        }

        fn write(&self, mark: Mark, seq: &str, rev: Option<&str>) -> Result<String> {
            let checkpoint = Checkpoint {
                through_seq: Seq::from_json(seq).unwrap(),
                mark,
                delivered: vec![DeliveredId(1)],
                time: "2026-11-21T20:46:41Z".parse().unwrap(),
                version: "0.1.0".to_owned(),
                seek: None,
            };
            write_checkpoint(&self.server, "db", "shop", &key(), &checkpoint, rev)
        }

        /// Deleted and made anew: nothing is left of it.
        fn recreate(&self) {
            self.fake.lock().unwrap().docs.clear();
        }

        fn stored(&self, path: &str) -> Value {
            self.fake.lock().unwrap().docs[path].1.clone()
        }

        fn set(&self, path: &str, body: Value) {
            self.fake.lock().unwrap().docs.insert(path.to_owned(), (1, body));
        }

        fn set_info(&self, name: &str, value: Value) {
            self.fake.lock().unwrap().info[name] = value;
        }
    }

    impl Fake {
        fn answer(&mut self, method: &str, path: &str, body: &str) -> (u16, Value) {
            let missing = (404, json!({"error": "not_found", "reason": "missing"}));
            if self.info.is_null() {
                return missing;
            }
            match (method, path) {
                ("GET", "/db") => (200, self.info.clone()),
                ("GET", MARK) if self.n_missed > 0 => {
                    self.n_missed -= 1;
                    missing
                }
                ("GET", path) => match self.docs.get(path) {
                    None => missing,
                    Some((rev, body)) => {
                        let mut body = body.clone();
                        body["_rev"] = format!("0-{rev}").into();
                        (200, body)
                    }
                },
                ("PUT", path) => {
                    let body: Value = serde_json::from_str(body).unwrap();
                    let given = body["_rev"].as_str().map(|rev| rev[2..].parse::<u32>().unwrap());
                    let stored = self.docs.get(path).map(|(rev, _)| *rev);
                    if self.checks_revs && given != stored {
                        return (409, json!({"error": "conflict", "reason": "Document update conflict."}));
                    }
                    let rev = given.unwrap_or(0) + 1;
                    self.docs.insert(path.to_owned(), (rev, body));
                    (201, json!({"ok": true, "rev": format!("0-{rev}")}))
                }
                _ => (405, json!({"error": "method_not_allowed"})),
            }
        }
    }

    fn key() -> StateKey {
        StateKey::new([7; 32])
    }

    fn each_generation(check: impl Fn(World)) {
        for generation in [Generation::One, Generation::Two, Generation::Three] {
            check(World::new(generation));
        }
    }

    #[test]
    fn a_first_opening_writes_a_mark_and_no_checkpoint() {
        each_generation(|world| {
            let opened = world.open();
            assert_eq!(world.stored(MARK)["mark"], opened.mark.to_string());
            assert!(opened.checkpoint.is_none() && opened.checkpoint_rev.is_none());
            assert!(!opened.recreated && !opened.rolled_back && opened.not_believed.is_none());
            assert_eq!((opened.doc_count, world.n_pauses.get()), (5, 0));
            assert_eq!(world.open().mark, opened.mark, "the next opening finds it");
            let ensured = ensure_mark(&world.server, world.generation, "db", false, &|_| {}).unwrap();
            assert_eq!(ensured, opened.mark);
            assert_eq!(world.fake.lock().unwrap().docs.len(), 1);
        });
    }

    #[test]
    fn a_checkpoint_comes_back_with_its_rev() {
        each_generation(|world| {
            let mark = world.open().mark;
            let rev = world.write(mark, "7", None).unwrap();
            let opened = world.open_knowing(Some(mark)).unwrap();
            assert_eq!(opened.checkpoint.unwrap().through_seq.as_json(), "7");
            assert_eq!(opened.checkpoint_rev.as_deref(), Some(rev.as_str()));
            assert!(!opened.recreated);
            assert_eq!(world.write(mark, "8", Some(&rev)).unwrap(), "0-2");
            if world.generation == Generation::One {
                assert_eq!(world.write(mark, "8", Some(&rev)).unwrap_err().kind(), Kind::Conflict);
            }
        });
    }

    #[test]
    fn a_recreated_database_is_noticed_by_its_missing_mark() {
        each_generation(|world| {
            let mark = world.open().mark;
            world.recreate();
            let opened = world.open_knowing(Some(mark)).unwrap();
            assert!(opened.recreated && opened.mark != mark && opened.checkpoint.is_none());
            assert_eq!(world.n_pauses.get(), 2, "three reads, a second apart");
        });
    }

    #[test]
    fn an_old_checkpoint_that_was_written_into_a_new_database_does_not_count() {
        let world = World::new(Generation::Three);
        let old = world.open().mark;
        let rev = world.write(old, "7", None).unwrap();
        world.recreate();
        // The writer had not heard of it; 2.x and 3.x take a stale `_rev`.
        let rev = world.write(old, "7", Some(&rev)).unwrap();
        for known in [None, Some(old)] {
            let opened = world.open_knowing(known).unwrap();
            assert!(opened.recreated && opened.mark != old && opened.checkpoint.is_none());
            assert_eq!(opened.checkpoint_rev.as_deref(), Some(rev.as_str()), "to be written over");
        }
        // Once a checkpoint of the new life is stored, only the record is out of date.
        let new = world.open().mark;
        world.write(new, "3", Some(&rev)).unwrap();
        let opened = world.open_knowing(Some(old)).unwrap();
        assert!(opened.recreated && opened.checkpoint.is_some());
        assert!(!world.open_knowing(Some(new)).unwrap().recreated);
    }

    #[test]
    fn a_copy_that_lags_is_given_two_seconds() {
        let world = World::new(Generation::Three);
        let mark = world.open().mark;
        world.fake.lock().unwrap().n_missed = 2;
        let opened = world.open_knowing(Some(mark)).unwrap();
        assert_eq!((opened.mark, opened.recreated, world.n_pauses.get()), (mark, false, 2));
        // Three reads, and one more before a new mark is written over it.
        world.fake.lock().unwrap().n_missed = 3;
        assert!(!world.open_knowing(Some(mark)).unwrap().recreated);
        world.fake.lock().unwrap().n_missed = 4;
        let opened = world.open_knowing(Some(mark)).unwrap();
        assert!(opened.recreated && opened.mark != mark);
    }

    #[test]
    fn another_creation_time_is_another_life() {
        let world = World::new(Generation::Three);
        let before_upgrade = world.open().mark;
        let rev = world.write(before_upgrade, "\"7-x\"", None).unwrap();
        world.set_info("instance_start_time", json!("1795296608"));
        let opened = world.open_knowing(Some(before_upgrade)).unwrap();
        assert!(!opened.recreated, "3.2 gave no creation time, 3.3 does: the same database");
        assert!(opened.checkpoint.is_some());

        world.recreate();
        let mark = world.open().mark;
        assert_eq!(world.stored(MARK)["instance_start_time"], "1795296608");
        world.write(mark, "\"7-x\"", Some(&rev)).unwrap();
        world.set_info("instance_start_time", json!("1795296609"));
        let opened = world.open_knowing(Some(mark)).unwrap();
        assert!(opened.recreated && opened.mark != mark && opened.checkpoint.is_none());
        assert_eq!(world.n_pauses.get(), 0);
        assert_eq!(world.stored(MARK)["instance_start_time"], "1795296609");
        assert!(!world.open_knowing(Some(opened.mark)).unwrap().recreated);
    }

    #[test]
    fn times_of_opening_mean_nothing() {
        for (generation, times) in [
            (Generation::One, ["1795297002863980", "1795297002863981"]),
            (Generation::Three, ["1795297002863", "1795297002864"]),
        ] {
            let world = World::new(generation);
            world.set_info("instance_start_time", json!(times[0]));
            let mark = world.open().mark;
            world.set_info("instance_start_time", json!(times[1]));
            let opened = world.open_knowing(Some(mark)).unwrap();
            assert_eq!((opened.mark, opened.recreated), (mark, false));
        }
    }

    #[test]
    fn forged_and_damaged_checkpoints_are_not_believed() {
        each_generation(|world| {
            let mark = world.open().mark;
            world.write(mark, "3", None).unwrap();
            let honest = world.stored(CHECKPOINT);
            let mut forged = honest.clone();
            forged["through_seq"] = json!(9);
            let mut long = honest.clone();
            long["x"] = json!("x".repeat(CHECKPOINT_BYTES_MAX));
            for (body, why) in
                [(forged, "does not fit"), (json!({"a": 1}), "not a checkpoint"), (long, "bytes")]
            {
                world.set(CHECKPOINT, body);
                let opened = world.open_knowing(Some(mark)).unwrap();
                assert!(opened.checkpoint.is_none() && !opened.recreated);
                assert_eq!(opened.checkpoint_rev.as_deref(), Some("0-1"));
                assert!(opened.not_believed.unwrap().contains(why));
            }
            world.set(CHECKPOINT, honest);
            assert!(world.open().checkpoint.is_some());
        });
    }

    #[test]
    fn somebody_elses_mark_is_replaced() {
        each_generation(|world| {
            world.set(MARK, json!({"mark": "hello"}));
            let opened = world.open();
            assert_eq!(world.stored(MARK)["mark"], opened.mark.to_string());
            assert!(!world.open_knowing(Some(opened.mark)).unwrap().recreated);
        });
    }

    #[test]
    fn nothing_written_before_a_seek_counts_after_it() {
        each_generation(|world| {
            let mark = world.open().mark;
            let seek = |request: &str, mark: Mark, seq: Value| Seek {
                request: request.to_owned(),
                mark,
                through_seq: seq,
            };
            let open = |seek: &Seek| {
                let (server, pause) = (&world.server, |_: Duration| {});
                let opened =
                    open(server, world.generation, "db", "shop", &key(), Some(&mark), Some(seek), &pause);
                opened.unwrap()
            };
            let through = |opened: &Opened| opened.checkpoint.as_ref().map(|c| c.through_seq.to_string());
            // Without any checkpoint, and over one that is further: the place is the seek's.
            let first = seek("request:1", mark, json!(3));
            assert_eq!(through(&open(&first)).as_deref(), Some("3"));
            let rev = world.write(mark, "8", None).unwrap();
            let opened = open(&first);
            assert_eq!(through(&opened).as_deref(), Some("3"), "a late one of before does not count");
            assert!(opened.checkpoint.unwrap().delivered.is_empty());
            assert_eq!(opened.checkpoint_rev, Some(rev.clone()));
            // One that names it counts, until the next seek.
            let behind = Checkpoint {
                through_seq: Seq::from_json("5").unwrap(),
                mark,
                delivered: Vec::new(),
                time: sys::wall(),
                version: "0".to_owned(),
                seek: Some("request:1".to_owned()),
            };
            write_checkpoint(&world.server, "db", "shop", &key(), &behind, Some(&rev)).unwrap();
            assert_eq!(through(&open(&first)).as_deref(), Some("5"));
            assert_eq!(through(&open(&seek("request:2", mark, json!(0)))).as_deref(), Some("0"));
            // A place in another life of the database is none.
            let other = seek("request:2", Mark::new([9; 16]), json!(0));
            assert_eq!(through(&open(&other)).as_deref(), Some("5"));
            let position = position(&world.server, "db", "shop", &key(), Some(&first)).unwrap();
            assert_eq!(position.unwrap().through_seq.to_string(), "5");
        });
    }

    #[test]
    fn a_server_that_went_back_is_noticed_on_1_x() {
        let world = World::new(Generation::One);
        let mark = world.open().mark;
        world.write(mark, "9", None).unwrap();
        assert!(!world.open().rolled_back);
        world.set_info("update_seq", json!(8));
        let opened = world.open_knowing(Some(mark)).unwrap();
        assert!(opened.rolled_back && opened.checkpoint.is_none() && !opened.recreated);
        assert_eq!(opened.checkpoint_rev.as_deref(), Some("0-1"));
        let world = World::new(Generation::Two);
        let mark = world.open().mark;
        world.write(mark, "9", None).unwrap();
        world.set_info("update_seq", json!(8));
        assert!(!world.open().rolled_back, "elsewhere a seq is never compared");
    }

    #[test]
    fn a_missing_database_is_not_found() {
        each_generation(|world| {
            world.fake.lock().unwrap().info = Value::Null;
            assert_eq!(world.open_knowing(None).unwrap_err().kind(), Kind::NotFound);
        });
    }

    #[test]
    fn webhooks_that_open_a_new_database_together_agree_on_its_mark() {
        for _ in 0..20 {
            let world = World::new(Generation::Three);
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let server = world.server.clone();
                    let (tell, told) = crossbeam_channel::bounded(1);
                    let thread = sys::spawn("test", move || {
                        tell.send(ensure_mark(&server, Generation::Three, "db", false, &|_| {}).unwrap())
                            .unwrap();
                    });
                    (thread.unwrap(), told)
                })
                .collect();
            for (thread, told) in threads {
                thread.join().unwrap();
                assert_eq!(world.stored(MARK)["mark"], told.recv().unwrap().to_string());
            }
        }
    }
}
