//! `replications errors`: what fails, why, and what to do about it.
//!
//! Guarantees that a replication which runs again but has failed a moment ago is among them, with the reason that its
//! history holds.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::Value;

use crate::cli::ask::count;
use crate::cli::out::{Colour, Out};
use crate::cli::replications::Where;
use crate::cli::replications::look::{Entry, Look};
use crate::cli::replications::shown::{
    ago, analysis, analysis_members, print_rows, public_entry, state_cell, wrapped,
};
use crate::cli::table::{Cell, Table};
use crate::error::Result;
use crate::pure::rep_error::{Analysis, analyze};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications errors\n  \
    couch-hookd replications errors || mail -s 'replications' ops < /dev/null\n  \
    couch-hookd replications errors --json | jq -r '.docs[] | [.doc_id, .error_class, .error] | @tsv'\n\n\
    Those that are failed, crashing or in error, and those that run but failed just before.\n\
    COUNT are failures in a row; CouchDB 1.x counts none. Exit status 1 when there is any.")]
pub(super) struct Arguments {
    #[command(flatten)]
    place: Where,
    /// One JSON object: `_scheduler/docs` with error, error_class, hint and error_raw in each row
    #[arg(long)]
    json: bool,
}

/// Lists what fails.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { place, json } = arguments;
    let look = Look::open(place)?;
    let listing = look.list(&[], 0, usize::MAX)?;
    let mut found = Vec::new();
    for entry in listing.entries {
        if entry.row.state.is_trouble() || entry.row.error_count > 0 {
            let reason = reason(&look, &entry)?;
            found.push((entry, reason));
        }
    }
    if json {
        let row = |(entry, reason): &(Entry, Option<Analysis>)| {
            let mut row = public_entry(entry);
            if let (Value::Object(members), Some(reason)) = (&mut row, reason) {
                members.extend(analysis_members(reason));
            }
            row
        };
        print_rows(found.len() as u64, 0, "docs", found.iter().map(row).collect(), out)?;
    } else {
        print(&look, &found, listing.total_rows, out)?;
    }
    Ok(u8::from(!found.is_empty()))
}

/// The last reason: the row's, or the last crash's.
fn reason(look: &Look, entry: &Entry) -> Result<Option<Analysis>> {
    if let Some(found) = analysis(entry) {
        return Ok(Some(found));
    }
    let job = look.job(entry)?.map(|(job, _)| job);
    let reason = job.and_then(|job| job.history.iter().find_map(|happened| happened.reason()));
    Ok(reason.map(|reason| analyze(&reason)))
}

fn print(look: &Look, found: &[(Entry, Option<Analysis>)], n_all: u64, out: &mut Out) -> Result<()> {
    let mut table = Table::new(&["DOCUMENT", "STATE", ">COUNT", "CLASS", ">UPDATED", "ERROR"]);
    let mut hints = BTreeMap::new();
    for (entry, reason) in found {
        let row = &entry.row;
        let class = reason.as_ref().map_or("-", |reason| reason.class.as_str());
        table.row([
            (&row.doc_id).into(),
            state_cell(row.state),
            row.error_count.to_string().into(),
            Cell::coloured(class, Colour::Yellow),
            ago(row.last_updated).into(),
            reason.as_ref().map_or("no reason given", |reason| &reason.error).into(),
        ]);
        hints.extend(reason.as_ref().map(|reason| ((class, reason.hint), ())));
    }
    match out.width() {
        Some(width) if width < table.width() => print_below(&mut table, found, width, out)?,
        _ => table.print(out)?,
    }
    for (class, hint) in hints.keys() {
        for line in wrapped(&format!("{class}: "), hint, out.width()) {
            out.line(&line)?;
        }
    }
    let n = found.len() as u64;
    let all = count(n_all.max(n), "replication");
    match n {
        0 => out.line(&format!("no errors: {all} in `{}`", look.db)),
        _ => out.line(&format!(
            "{n} of {all} in `{}` in trouble; `replications show DOC_ID` has the whole",
            look.db
        )),
    }
}

/// Each error in lines of its own, below its row: cut off it would say little.
fn print_below(
    table: &mut Table,
    found: &[(Entry, Option<Analysis>)],
    width: usize,
    out: &mut Out,
) -> Result<()> {
    table.drop_last();
    let lines = table.lines(Some(width), out.has_colours());
    let mut errors = found.iter().map(|(_, reason)| reason.as_ref().map(|reason| reason.error.as_str()));
    for (at, line) in lines.iter().enumerate() {
        out.styled(line)?;
        // The first line are the headings.
        let error = if at == 0 { None } else { errors.next().flatten() };
        for line in error.into_iter().flat_map(|error| wrapped("    ", error, Some(width))) {
            out.line(&line)?;
        }
    }
    Ok(())
}
