//! The commands: what each takes, and the few calls that it is made of.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use log::LevelFilter;

use crate::config::source::{Overrides, Sources};
use crate::daemon::{self, Start};
use crate::demo;
use crate::error::{Error, Kind, Result};
use crate::host::{Mode, stdio};
use crate::log::{Sink, install};

/// How short and how long a demo may be.
const DEMO_LASTS: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3600));

/// Turns what happens inside CouchDB into signed webhooks, losing nothing.
#[derive(Debug, Parser)]
#[command(name = "couch-hookd", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs under CouchDB 1.1 to 2.2, which starts it from [os_daemons]
    OsDaemon,
    /// Runs by itself, under systemd or in a container
    Run {
        /// Ini file, or a directory whose *.ini are read sorted; later ones count
        #[arg(long, value_name = "FILE|DIR")]
        config: Vec<PathBuf>,
        /// One value over everything else
        #[arg(long, value_name = "SECTION.KEY=VALUE")]
        set: Vec<String>,
    },
    /// Shows the whole on a machine with nothing installed, with a kill -9 in the middle
    Demo {
        /// How long documents are written; a number of seconds with `s`, of minutes with `m`
        #[arg(long = "for", value_name = "DURATION", default_value = "15s")]
        lasts: String,
        /// One JSON line per request received
        #[arg(long)]
        json: bool,
    },
}

/// Runs the program; gives the exit status: 0 fine, 1 found a fault, 2 used wrongly.
pub fn main() -> u8 {
    let result = match Mode::of_bare_start() {
        Some(_) if std::env::args_os().len() == 1 => os_daemon(),
        _ => match Arguments::parse().command {
            Command::OsDaemon => os_daemon(),
            Command::Demo { lasts, json } => demo(&lasts, json),
            Command::Run { config, set } => run(Sources { config, overrides: Overrides::of_process(set) }),
        },
    };
    result.unwrap_or_else(|error| {
        log::error!("{error}");
        2
    })
}

fn os_daemon() -> Result<u8> {
    let stdio = stdio::start()?;
    install(Sink::Host(stdio.log()), LevelFilter::Info)?;
    daemon::run(Start::Host(stdio, Overrides::of_process(Vec::new())))
}

fn run(sources: Sources) -> Result<u8> {
    install(Sink::Stderr, LevelFilter::Info)?;
    daemon::run(Start::Files(sources))
}

fn demo(lasts: &str, json: bool) -> Result<u8> {
    let usage = |found: String| Error::new(Kind::Config, found).context("--for");
    let lasts = crate::config::values::duration(lasts, DEMO_LASTS.0, DEMO_LASTS.1).map_err(usage)?;
    let failed = |error| Error::new(Kind::Io, format!("our own binary cannot be found: {error}"));
    let options = demo::Options { lasts, json, program: std::env::current_exe().map_err(failed)? };
    let (_go_on, stop) = crossbeam_channel::bounded(1);
    demo::run(&options, &mut std::io::stdout().lock(), &stop)
}
