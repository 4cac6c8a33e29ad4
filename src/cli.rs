//! The commands: what each takes, and the few calls that it is made of.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use log::LevelFilter;

use crate::config::source::{Overrides, Sources};
use crate::daemon::{self, Start};
use crate::error::Result;
use crate::host::{Mode, stdio};
use crate::log::{Sink, install};

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
}

/// Runs the program; gives the exit status: 0 fine, 1 found a fault, 2 used wrongly.
pub fn main() -> u8 {
    let result = match Mode::of_bare_start() {
        Some(_) if std::env::args_os().len() == 1 => os_daemon(),
        _ => match Arguments::parse().command {
            Command::OsDaemon => os_daemon(),
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
