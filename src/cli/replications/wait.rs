//! `replications wait`: until a replication has come to its end.
//!
//! Guarantees that only CouchDB's own word ends it: a row that is missing, as after a start of the server, does not,
//! and a CouchDB that does not answer for a moment does not either. On 1.x `error` is the word for failed.

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use crate::cli::out::{Out, complain};
use crate::cli::replications::Where;
use crate::cli::replications::look::{Entry, Look};
use crate::cli::replications::shown::{analysis, analysis_members, counters, public_entry};
use crate::config::values;
use crate::error::{Error, Kind, Result};
use crate::pure::lag;
use crate::pure::replication::State;
use crate::sys;

/// Between two looks: at first, and at most.
const LOOK_FIRST: Duration = Duration::from_millis(100);
const LOOK_MAX: Duration = Duration::from_secs(2);
/// As long as anybody may want to wait.
const TIMEOUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications wait nightly && couch-hookd replications show nightly\n  \
    couch-hookd replications wait nightly --timeout 2h\n\n\
    Exit status 0 when it has completed; 1 when it has failed (on CouchDB 1.x: is in error),\n\
    when its document is deleted, and when the time is over. One that crashes or is in error\n\
    on 2.1 and later is tried again by CouchDB, and so waited for.")]
pub(super) struct Arguments {
    /// Its document in the replicator database
    #[arg(value_name = "DOC_ID")]
    doc_id: String,
    /// How long to wait: 30s, 10m, 2h
    #[arg(long, value_name = "TIME", default_value = "10m")]
    timeout: String,
    #[command(flatten)]
    place: Where,
    /// Only how it ended, as one JSON object
    #[arg(long)]
    json: bool,
}

/// Waits.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { doc_id, timeout, place, json } = arguments;
    let wait = values::duration(&timeout, Duration::ZERO, TIMEOUT_MAX)
        .map_err(|why| Error::new(Kind::Config, format!("--timeout: {why}")))?;
    let look = Look::open(place)?;
    let until = sys::now() + wait;
    let mut pause = LOOK_FIRST;
    let mut said: Option<String> = None;
    let mut last: Option<Entry> = None;
    let fault = loop {
        let mut fault = None;
        match look.one(&doc_id) {
            Ok(None) => return Err(look.no_such(&doc_id)),
            Ok(Some((entry, doc))) => {
                if last.is_none() && doc.get("continuous") == Some(&Value::Bool(true)) {
                    complain(&format!("`{doc_id}` is continuous: it never completes, it can only fail"));
                }
                let status = verdict(&look, &entry);
                let now = in_words(&entry);
                let is_news = said.as_ref() != Some(&now);
                if !json && (is_news || status.is_some()) {
                    out.line(&format!("{doc_id}: {now}"))?;
                }
                said = Some(now);
                if let Some(status) = status {
                    return end(&entry, status, json, out);
                }
                last = Some(entry);
            }
            // It is not the replication that does not answer.
            Err(error) if is_passing(error.kind()) => fault = Some(error),
            Err(error) => return Err(error),
        }
        let Some(left) = until.checked_duration_since(sys::now()).filter(|left| !left.is_zero()) else {
            break fault;
        };
        sys::sleep(pause.min(left));
        pause = (pause * 2).min(LOOK_MAX);
    };
    complain(&format!("`{doc_id}` has not come to its end within {timeout}"));
    if let Some(fault) = fault {
        return Err(fault);
    }
    match last {
        Some(entry) => end(&entry, 1, json, out),
        None => Ok(1),
    }
}

/// The exit status, once it has come to its end.
fn verdict(look: &Look, entry: &Entry) -> Option<u8> {
    match entry.row.state {
        State::Completed => Some(0),
        State::Failed => Some(1),
        State::Error if !look.has_scheduler => Some(1),
        _ => None,
    }
}

/// Where it is, in words that change only with what matters.
fn in_words(entry: &Entry) -> String {
    let row = &entry.row;
    match analysis(entry) {
        Some(found) => format!("{}: {}", row.state, found.error),
        None if row.state == State::Completed => {
            let done = counters(&entry.progress.0);
            if done.is_empty() { "completed".to_owned() } else { format!("completed: {done}") }
        }
        None => match lag::pending(&entry.progress) {
            Some(n) if n > 0 => format!("{}, {n} changes pending", row.state),
            _ => row.state.to_string(),
        },
    }
}

fn end(entry: &Entry, status: u8, json: bool, out: &mut Out) -> Result<u8> {
    let found = analysis(entry);
    if json {
        let mut row = public_entry(entry);
        if let (Value::Object(members), Some(found)) = (&mut row, &found) {
            members.extend(analysis_members(found));
        }
        out.json(&row.to_string())?;
    } else if let (Some(found), 1) = (found, status) {
        out.line(found.hint)?;
    }
    Ok(status)
}

fn is_passing(kind: Kind) -> bool {
    matches!(kind, Kind::Unreachable | Kind::Cut | Kind::Timeout | Kind::Server)
}
