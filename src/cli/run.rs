//! `run` and `os-daemon`: the daemon, by itself and under CouchDB.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use log::LevelFilter;

use crate::config::finding::Origin;
use crate::config::source::{self, Overrides, Sources};
use crate::config::{self, Hookd};
use crate::daemon::couch_config::CouchConfig;
use crate::daemon::{self, Start};
use crate::error::{Error, Kind, Result};
use crate::host::stdio;
use crate::log::{Sink, install};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd run --config /etc/couch-hookd/hookd.ini\n  \
    couch-hookd run --config /etc/couch-hookd --set hookd.log_level=debug\n  \
    COUCHDB_URL=http://couch:5984 couch-hookd run --from-couchdb\n\n\
    Any key of [hookd] may come from the environment as COUCH_HOOKD_KEY, the login\n\
    also as COUCHDB_USER and COUCHDB_PASSWORD. Order: --set, environment, files,\n\
    defaults. SIGHUP reads the files again; SIGTERM ends cleanly.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) source: Source,
}

/// Where a command finds the configuration.
#[derive(Debug, Args)]
pub(crate) struct Source {
    /// Ini file, or a directory whose *.ini are read sorted; later ones count
    /// [default: /etc/couch-hookd/hookd.ini]
    #[arg(long, value_name = "FILE|DIR", conflicts_with = "from_couchdb")]
    pub(crate) config: Vec<PathBuf>,
    /// Take the configuration from CouchDB's own, over HTTP; needs a server admin
    #[arg(long)]
    pub(crate) from_couchdb: bool,
    /// The node whose configuration it is [default: the first that answers]
    #[arg(long, value_name = "NAME", requires = "from_couchdb")]
    pub(crate) node: Option<String>,
    /// One value over everything else
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

/// Runs under CouchDB, which speaks on stdio.
pub(crate) fn os_daemon() -> Result<u8> {
    let stdio = stdio::start()?;
    install(Sink::Host(stdio.log()), LevelFilter::Info)?;
    daemon::run(Start::Host(stdio, Overrides::of_process(Vec::new())))
}

/// Runs by itself.
pub(crate) fn run(arguments: Arguments) -> Result<u8> {
    install(Sink::Stderr, LevelFilter::Info)?;
    let Source { config, from_couchdb, node, set } = arguments.source;
    let overrides = Overrides::of_process(set);
    if !from_couchdb {
        return daemon::run(Start::Files(Sources { config, overrides }));
    }
    let couch_config = CouchConfig::start(&where_to_ask(&overrides)?, node, overrides)?;
    let status = daemon::run(Start::Polled(couch_config.answers()));
    couch_config.stop().map_err(|panic| Error::new(Kind::Io, panic))?;
    status
}

/// URL and login to ask CouchDB for its configuration with: from arguments and environment.
///
/// # Errors
/// `Config`, with every fault in one line.
pub(crate) fn where_to_ask(overrides: &Overrides) -> Result<Hookd> {
    let mut raw = source::from_sections(&BTreeMap::new(), &Origin::CouchConfig, overrides);
    raw.sections.retain(|section, _| section == "hookd");
    let (parsed, findings) = config::parse(&raw);
    parsed.config.map(|config| config.hookd).ok_or_else(|| {
        let faults = findings.iter().filter(|finding| finding.is_error());
        Error::new(Kind::Config, faults.map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })
}
