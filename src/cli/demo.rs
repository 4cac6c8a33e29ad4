//! `demo`: the whole on a machine with nothing installed.

use std::time::Duration;

use clap::Args;

use crate::cli::out::Out;
use crate::config::values;
use crate::demo;
use crate::error::{Error, Kind, Result};

/// How short and how long a demo may be.
const LASTS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3600));

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd demo\n  \
    couch-hookd demo --for 1m --json\n\n\
    Exit status 1 when a change was lost.")]
pub(crate) struct Arguments {
    /// How long documents are written; a number of seconds with `s`, of minutes with `m`
    #[arg(long = "for", value_name = "DURATION", default_value = "15s")]
    lasts: String,
    /// One JSON line per request received
    #[arg(long)]
    json: bool,
}

/// Runs it.
pub(crate) fn run(arguments: &Arguments, out: &mut Out) -> Result<u8> {
    let usage = |found: String| Error::new(Kind::Config, found).context("--for");
    let lasts = values::duration(&arguments.lasts, LASTS.0, LASTS.1).map_err(usage)?;
    let failed = |error| Error::new(Kind::Io, format!("our own binary cannot be found: {error}"));
    let program = std::env::current_exe().map_err(failed)?;
    let options = demo::Options { lasts, json: arguments.json, program };
    let (_go_on, stop) = crossbeam_channel::bounded(1);
    demo::run(&options, out.writer(), &stop)
}
