//! `replications lag`: how far replications are behind their sources.
//!
//! Guarantees that what CouchDB does not count itself is counted where the source is this server, and that it is said
//! who counted. A replication that came to its end is behind nothing, and left out.

use clap::Args;
use serde_json::Value;

use crate::cli::ask::count;
use crate::cli::out::Out;
use crate::cli::replications::Where;
use crate::cli::replications::look::{Behind, Entry, Look};
use crate::cli::replications::shown::{behind_members, number, print_rows, public_entry, state_cell};
use crate::cli::table::Table;
use crate::error::Result;
use crate::pure::replication::State;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications lag\n  \
    couch-hookd replications lag edge1 --json | jq '.docs[0].lag.changes_pending'\n\n\
    PENDING are changes of the source still to come: by the replicator itself where it counts\n\
    them, else counted at the source (marked *) behind the checkpoint and before any filter,\n\
    if the source is this CouchDB. CHECKPOINT is how old the checkpoint is on the end that is\n\
    this CouchDB; CouchDB writes one only while something happens. READ, WRITTEN and FAILED\n\
    are documents. Completed replications are left out.")]
pub(super) struct Arguments {
    /// Only this one
    #[arg(value_name = "DOC_ID")]
    doc_id: Option<String>,
    #[command(flatten)]
    place: Where,
    /// One JSON object: `_scheduler/docs` with lag and checkpoint in each row
    #[arg(long)]
    json: bool,
}

/// Shows how far replications are behind.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { doc_id, place, json } = arguments;
    let look = Look::open(place)?;
    let entries = match &doc_id {
        Some(doc_id) => vec![look.one(doc_id)?.ok_or_else(|| look.no_such(doc_id))?.0],
        None => {
            let mut entries = look.list(&[], 0, usize::MAX)?.entries;
            entries.retain(|entry| entry.row.state != State::Completed);
            entries
        }
    };
    let mut found = Vec::new();
    for entry in entries {
        let behind = look.behind(&entry)?;
        found.push((entry, behind));
    }
    if json {
        let row = |(entry, behind): &(Entry, Behind)| {
            let mut row = public_entry(entry);
            if let Value::Object(members) = &mut row {
                members.extend(behind_members(behind));
            }
            row
        };
        print_rows(found.len() as u64, 0, "docs", found.iter().map(row).collect(), out)?;
        return Ok(0);
    }
    print(&look, &found, out)?;
    Ok(0)
}

fn print(look: &Look, found: &[(Entry, Behind)], out: &mut Out) -> Result<()> {
    if found.is_empty() {
        return out.line(&format!("no replications in `{}` but completed ones", look.db));
    }
    let mut table =
        Table::new(&["DOCUMENT", "STATE", ">PENDING", ">CHECKPOINT", ">READ", ">WRITTEN", ">FAILED"]);
    for (entry, behind) in found {
        let pending = match behind.counted_by {
            Some("source") => format!("{}*", number(behind.changes_pending)),
            _ => number(behind.changes_pending),
        };
        let age = behind.checkpoint.as_ref().and_then(|checkpoint| checkpoint.age_seconds);
        let counter = |name: &str| number(entry.progress.count(name));
        table.row([
            entry.id().into(),
            state_cell(entry.row.state),
            pending.into(),
            age.map_or_else(|| "-".to_owned(), |age| format!("{age} s")).into(),
            counter("docs_read").into(),
            counter("docs_written").into(),
            counter("doc_write_failures").into(),
        ]);
    }
    table.print(out)?;
    let known: Vec<u64> = found.iter().filter_map(|(_, behind)| behind.changes_pending).collect();
    let all = count(found.len() as u64, "replication");
    let pending = count(known.iter().sum(), "change");
    let said = match found.len() - known.len() {
        0 => format!("{pending} pending"),
        n if known.is_empty() => {
            format!("nobody counts the changes pending of {}", if n == 1 { "it" } else { "them" })
        }
        n => format!("{pending} pending, without those of {n} that nobody counts"),
    };
    out.line(&format!("{all} in `{}`: {said}", look.db))
}
