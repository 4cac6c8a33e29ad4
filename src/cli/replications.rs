//! `replications`: CouchDB's replications, looked into by hand. One file a command.

mod check;

use clap::{Args, Subcommand};

use crate::cli::out::Out;
use crate::error::Result;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd replications check edge1.json\n  \
    couch-hookd replications check edge1 --config /etc/couch-hookd/hookd.ini")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Replications,
}

#[derive(Debug, Subcommand)]
enum Replications {
    /// Find everything that is wrong with a replication document, in a file or in CouchDB
    Check(check::Arguments),
}

/// Does what is asked.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    match arguments.command {
        Replications::Check(arguments) => check::run(arguments, out),
    }
}
