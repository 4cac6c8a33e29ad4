//! A look into one database: whether it is the one that was known, and whether it was written since.
//!
//! Guarantees that a change behind the known place is seen, on 1.x also after the server lost its last ones; that a
//! design document is named when it was written, however much else was; and that a look costs a page of a hundred rows
//! at most where there was little to see. Writes a mark where there is none (DESIGN §7).

use std::ops::ControlFlow;
use std::time::Duration;

use crate::config::Filter;
use crate::couch::client::{Generation, Server};
use crate::couch::feed::{self, Feed, FeedKind, FeedRequest};
use crate::couch::local_docs;
use crate::error::{Kind, Result};
use crate::pure::changes::Item;
use crate::pure::checkpoint::Mark;
use crate::pure::database_events::Found;
use crate::pure::seq::Seq;

/// With more changes than this only design documents among them are listed.
const ROWS: u32 = 100;
/// Design documents that are told of one look, at most: CouchDB reads all changes to find them.
const DDOCS_MAX: u32 = 1_000;
/// For that.
const DDOCS_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// The longest silence within a page.
const SILENCE: Duration = Duration::from_secs(60);

/// Looks into a database of which `known` was found before: its mark, and the end of its changes then. `None`: there is
/// no such database. `pause` sleeps, and may return early.
///
/// # Errors
/// As [`Server::request`].
pub fn look_into(
    server: &Server,
    generation: Generation,
    db: &str,
    known: Option<&(Mark, Seq)>,
    pause: &dyn Fn(Duration),
) -> Result<Option<Found>> {
    let found = local_docs::ensure_mark(server, generation, db, known.is_some(), pause).and_then(|mark| {
        // Before the changes are read: what comes meanwhile is behind it.
        let now = feed::resolve_now(server, db, generation)?;
        let Some((_, since)) = known.filter(|(known, _)| *known == mark) else {
            return Ok(Found { mark, through: now, has_changed: true, ddocs: Vec::new() });
        };
        changes(server, generation, db, since, now).map(|(through, has_changed, ddocs)| Found {
            mark,
            through,
            has_changed,
            ddocs,
        })
    });
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The end of the changes, whether there are any, and ids of design documents among them.
fn changes(
    server: &Server,
    generation: Generation,
    db: &str,
    since: &Seq,
    now: Seq,
) -> Result<(Seq, bool, Vec<String>)> {
    let number = |seq: &Seq| seq.as_json().parse::<u64>().ok();
    if generation == Generation::One && number(&now) < number(since) {
        // Killed, it has lost its last changes, and counts from there anew.
        return Ok((now, true, Vec::new()));
    }
    let page = match read(server, db, since, ROWS, false) {
        // Not a position of this server any more.
        Err(error) if error.kind() == Kind::BadSince => return Ok((now, true, Vec::new())),
        page => page?,
    };
    let has_changed = !page.ids.is_empty();
    if page.ids.len() < ROWS as usize {
        let ddocs = page.ids.into_iter().filter(|id| id.starts_with("_design/")).collect();
        // A page that is not full ends where the changes do.
        return Ok((page.last_seq.unwrap_or(now), has_changed, ddocs));
    }
    let ddocs = read(server, db, since, DDOCS_MAX, true)?.ids;
    Ok((now, has_changed, ddocs))
}

struct Page {
    ids: Vec<String>,
    last_seq: Option<Seq>,
}

fn read(server: &Server, db: &str, since: &Seq, limit: u32, only_ddocs: bool) -> Result<Page> {
    let filter = only_ddocs.then(|| Filter::Function { name: "_design".to_owned(), params: Vec::new() });
    let request = FeedRequest {
        db: db.to_owned(),
        since: since.clone(),
        kind: FeedKind::Page { limit },
        filter,
        include_docs: false,
        conflicts: false,
        doc_bytes_max: 0,
        keeps_lines: false,
        silence: (!only_ddocs).then_some(SILENCE),
        deadline: only_ddocs.then_some(DDOCS_DEADLINE),
    };
    let mut page = Page { ids: Vec::new(), last_seq: None };
    Feed::new(server).read(&request, &mut |items| {
        for item in items.drain(..) {
            match item {
                Item::Row(row) => page.ids.push(row.id),
                Item::End { last_seq, .. } => page.last_seq = last_seq,
                // The feed makes an error of it.
                Item::Fault { .. } => {}
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(page)
}
