//! `replications`: what CouchDB's replications are at, what ails them, and how far behind they are.
//!
//! Guarantees the same words on CouchDB 1.x, 2.x and 3.x, and no secret of a replication in any output: URLs without
//! login and query, reasons cleaned, as JSON too. Only `retry` writes, one document. One file a command; `look` reads for
//! all but `check`.

mod check;
mod errors;
mod jobs;
mod lag;
mod list;
mod look;
mod retry;
mod show;
mod shown;
mod wait;

use clap::{Args, Subcommand};

use crate::cli::out::Out;
use crate::cli::run::Source;
use crate::error::Result;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications list --state failed,crashing,error\n  \
    couch-hookd replications show edge1\n  \
    couch-hookd replications errors || mail -s 'replications' ops < /dev/null\n  \
    couch-hookd replications check edge1.json\n\n\
    CouchDB shows replications to server admins only: `username` and `password` of\n\
    [hookd], or COUCHDB_USER and COUCHDB_PASSWORD, must be those of one.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Replication,
}

#[derive(Debug, Subcommand)]
enum Replication {
    /// List replications and their states, once or live
    List(list::Arguments),
    /// Show one replication: state, error, progress, checkpoint, history
    Show(show::Arguments),
    /// List the scheduler's jobs, those of `_replicate` too (CouchDB 2.1 and later)
    Jobs(jobs::Arguments),
    /// List what fails or has failed, with the reason and what to do; exit status 1 if any does
    Errors(errors::Arguments),
    /// Show how far replications are behind their sources
    Lag(lag::Arguments),
    /// Wait until a replication has completed; exit status 1 when it fails
    Wait(wait::Arguments),
    /// Find everything that is wrong with a replication document, in a file or in CouchDB
    Check(check::Arguments),
    /// Begin an ended replication anew: save its document without CouchDB's own fields
    Retry(retry::Arguments),
}

/// Where replications are looked for.
#[derive(Debug, Args)]
struct Where {
    /// Replicator database; all but the first have names that end in /_replicator
    #[arg(long, value_name = "DB", default_value = "_replicator")]
    database: String,
    #[command(flatten)]
    source: Source,
}

/// Does what is asked.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    match arguments.command {
        Replication::List(arguments) => list::run(arguments, out),
        Replication::Show(arguments) => show::run(arguments, out),
        Replication::Jobs(arguments) => jobs::run(arguments, out),
        Replication::Errors(arguments) => errors::run(arguments, out),
        Replication::Lag(arguments) => lag::run(arguments, out),
        Replication::Wait(arguments) => wait::run(arguments, out),
        Replication::Check(arguments) => check::run(arguments, out),
        Replication::Retry(arguments) => retry::run(arguments, out),
    }
}
