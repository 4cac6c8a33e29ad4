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
use crate::error::{Context, Error, Kind, Result};
use crate::pure::checkpoint::{CHECKPOINT_BYTES_MAX, Checkpoint, Mark, StateKey, checkpoint_id};
use crate::pure::seq::Seq;
use crate::sys;

/// `_local/` plus this is the mark's id.
const MARK_ID: &str = "couch-hookd";
/// A missing mark is believed after so many reads: a lagging copy in a cluster can miss it.
const N_MARK_READS: u32 = 3;
/// Time between those reads.
const MARK_READ_PAUSE: Duration = Duration::from_secs(1);

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
/// `known_mark` is what the webhook's record or memory says; `pause` sleeps, and may return early.
///
/// # Errors
/// `NotFound` when the database does not exist; else as [`Server::request`].
pub fn open(
    server: &Server,
    generation: Generation,
    db: &str,
    webhook: &str,
    key: &StateKey,
    known_mark: Option<&Mark>,
    pause: &dyn Fn(Duration),
) -> Result<Opened> {
    let info: Info = server.get_json(&db_path(db, &[]))?;
    let created = creation_time(generation, &info);
    let stored = read_mark(server, db)?;
    let read = read_checkpoint(server, db, webhook, key)?;
    let was_marked = known_mark.is_some() || read.exists;
    let (mark, is_new_life) = settle_mark(server, db, stored, created, was_marked, pause)?;
    let mut opened = Opened {
        mark,
        checkpoint: read.checkpoint,
        checkpoint_rev: read.rev,
        recreated: is_new_life || known_mark.is_some_and(|known| *known != mark),
        not_believed: read.not_believed,
        rolled_back: false,
        doc_count: info.doc_count,
    };
    if opened.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.mark != mark) {
        opened.checkpoint = None;
        opened.recreated = true;
    }
    if let Some(checkpoint) = &opened.checkpoint
        && generation == Generation::One
        && is_behind(&info, &checkpoint.through_seq)
    {
        opened.checkpoint = None;
        opened.rolled_back = true;
    }
    Ok(opened)
}

/// The database's mark, written first when there is none; for databases that get their first checkpoint.
///
/// # Errors
/// As [`open`].
pub fn ensure_mark(
    server: &Server,
    generation: Generation,
    db: &str,
    pause: &dyn Fn(Duration),
) -> Result<Mark> {
    let info: Info = server.get_json(&db_path(db, &[]))?;
    let stored = read_mark(server, db)?;
    settle_mark(server, db, stored, creation_time(generation, &info), false, pause).map(|(mark, _)| mark)
}

/// Stores a checkpoint over the one whose `_rev` is given, and gives the new `_rev`. Never together with a mark.
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
    write_checkpoint_within(server, db, webhook, key, checkpoint, rev, Limits::default())
}

/// As [`write_checkpoint`], with limits for a hurried end.
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
    let path = local_path(db, &checkpoint_id(webhook));
    let body = checkpoint.to_json(db, webhook, key, rev);
    let reply = server.request_within(&Method::PUT, &path, Some(&body), &[], limits)?;
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
    match server.put_json(&local_path(db, MARK_ID), &document.to_string()) {
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
    let is_seconds = (9..=11).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit());
    (generation == Generation::Three && is_seconds).then(|| time.to_owned())
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
