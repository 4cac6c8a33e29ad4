//! `replications jobs`: what the scheduler works at, replications without a document among it.

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cli::ask::count;
use crate::cli::common::age;
use crate::cli::out::Out;
use crate::cli::replications::Where;
use crate::cli::replications::look::Look;
use crate::cli::replications::shown::{end, public, state_cell};
use crate::cli::run::Source;
use crate::cli::table::Table;
use crate::error::Result;
use crate::pure::rep_error::analyze;
use crate::pure::replication::{Happened, Job, State};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications jobs\n  \
    couch-hookd replications jobs --json | jq '.jobs[] | select(.pid == null)'\n\n\
    All jobs of the server, whatever database their documents are in; those started by a\n\
    POST to `_replicate` have no document. CRASHES are those of the history that CouchDB\n\
    keeps. --json gives what `_scheduler/jobs` gives, without secrets.")]
pub(super) struct Arguments {
    #[command(flatten)]
    source: Source,
    /// One JSON object on one line
    #[arg(long)]
    json: bool,
}

/// Lists jobs.
pub(super) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { source, json } = arguments;
    let look = Look::open(Where { database: "_replicator".to_owned(), source })?;
    if !look.has_scheduler {
        let found =
            format!("CouchDB {} has no jobs: they came with 2.1; see `replications list`", look.version);
        return match json {
            true => out.json(&json!({"total_rows": 0, "offset": 0, "jobs": []}).to_string()),
            false => out.line(&found),
        }
        .map(|()| 0);
    }
    let (total, rows) = look.jobs()?;
    if json {
        let rows: Vec<Value> = rows.iter().map(public).collect();
        out.json(&json!({"total_rows": total, "offset": 0, "jobs": rows}).to_string())?;
        return Ok(0);
    }
    let jobs: Vec<Job> = rows.iter().filter_map(|row| Job::deserialize(row).ok()).collect();
    let mut table = Table::new(&["DOCUMENT", "STATE", ">CRASHES", ">SINCE", "SOURCE", "TARGET", "LAST"]);
    for job in &jobs {
        let last = job.history.first();
        table.row([
            document(job).into(),
            state_cell(job.state()),
            job.crashes().map_or(0, |(n, ..)| n).to_string().into(),
            last.map_or_else(|| "-".to_owned(), |last| age(last.timestamp)).into(),
            end(&look, job.source.as_deref()).into(),
            end(&look, job.target.as_deref()).into(),
            last.map(in_words).unwrap_or_default().into(),
        ]);
    }
    table.print(out)?;
    if jobs.is_empty() {
        return out.line("no jobs").map(|()| 0);
    }
    let n = |state| jobs.iter().filter(|job| job.state() == state).count();
    let states = [State::Running, State::Pending, State::Crashing];
    let by_state =
        states.into_iter().filter(|state| n(*state) > 0).map(|state| format!("{} {state}", n(state)));
    let by_state = by_state.collect::<Vec<_>>().join(", ");
    out.line(&format!("{}: {by_state}", count(jobs.len() as u64, "job")))?;
    Ok(0)
}

/// The reason where there is one: that it crashed is its state.
fn in_words(last: &Happened) -> String {
    last.reason().map_or_else(|| last.what.clone(), |reason| analyze(&reason).error)
}

/// Its document, and in which database unless it is the usual one.
fn document(job: &Job) -> String {
    match (job.doc_id.as_deref(), job.database.as_deref()) {
        (None, _) => "(_replicate)".to_owned(),
        (Some(doc_id), Some("_replicator") | None) => doc_id.to_owned(),
        (Some(doc_id), Some(db)) => format!("{db}/{doc_id}"),
    }
}
