//! `update-notification`: the daemon as CouchDB 1.x, 2.0 and 2.1 start it from `[update_notification]`.
//!
//! Guarantees that it ends when CouchDB is gone, or at a signal, and at nothing else: bad arguments, a configuration
//! that cannot be used, a daemon that breaks down are said on stderr or in the log while stdin is read on. An
//! `[update_notification]` process that exits at once takes CouchDB's HTTP down (CONTRACT §4).

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded, never, select};
use log::LevelFilter;

use crate::cli::out::complain;
use crate::cli::run::where_to_ask;
use crate::config::source::{Overrides, Sources};
use crate::daemon::couch_config::CouchConfig;
use crate::daemon::{self, Configured, Start};
use crate::error::{Error, Kind, Result};
use crate::host::update_notification::{self, Notifier};
use crate::log::{Sink, install};
use crate::pipeline::complaints::Complaint;
use crate::pipeline::hints::Hints;
use crate::pure::update_notification::Told;
use crate::sys;

/// After a breakdown the daemon starts again this much later.
const START_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What cannot be asked for a configuration is tried again this much later: a password's file may come.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = "Example, in the local.ini of CouchDB 1.x:\n  \
    [update_notification]\n  \
    couch_hookd = /usr/bin/couch-hookd update-notification --config /etc/couch-hookd/hookd.ini\n\n\
    Nothing is ever written to stdout, and it ends only when CouchDB does: a fault is\n\
    said on stderr, or in the file that log_file names. SIGHUP reads the configuration\n\
    again and opens the log file anew.")]
pub(crate) struct Arguments {
    /// Ini file, or a directory whose *.ini are read sorted; later ones count [default: CouchDB's
    /// own configuration, over HTTP from COUCHDB_URL, which needs a server admin]
    #[arg(long, value_name = "FILE|DIR")]
    config: Vec<PathBuf>,
    /// The node whose configuration it is [default: the first that answers]
    #[arg(long, value_name = "NAME", conflicts_with = "config")]
    node: Option<String>,
    /// One value over everything else
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

/// Runs until CouchDB is gone; gives the exit status.
pub(crate) fn run(arguments: &Arguments) -> u8 {
    let hints = Arc::new(Hints::new());
    let (damage, damaged) = bounded(1);
    let noting = Arc::clone(&hints);
    let started = begin(move |told| match told {
        Told::Hint(hint) => noting.note(hint),
        Told::Damaged => {
            noting.note_lost();
            // Said by whoever may wait for the log; one at a time will do.
            let _ = damage.try_send(());
        }
    });
    if let Err(error) = install(Sink::Stderr, LevelFilter::Info) {
        complain(&error.to_string());
    }
    let notifier = match started {
        Ok(notifier) => notifier,
        Err(error) => {
            log::error!("{error}; nothing is told until CouchDB starts this process again");
            return drain_here();
        }
    };
    let mut said = String::new();
    loop {
        match daemon(arguments, &notifier, &hints, &damaged) {
            Ok(()) => return 0,
            Err(Failed::ToAsk(error)) => {
                let text = error.to_string();
                if text != said {
                    log::error!("{text}; trying again every {} s", ASK_AGAIN_AFTER.as_secs());
                    said = text;
                }
                if wait(&notifier, ASK_AGAIN_AFTER) {
                    return 0;
                }
            }
            Err(Failed::ToGoOn(why)) => {
                log::error!(
                    "the daemon broke down: {why}; it starts again in {} s",
                    START_AGAIN_AFTER.as_secs()
                );
                if wait(&notifier, START_AGAIN_AFTER) {
                    return 0;
                }
                log::error!("{}; nothing is told until CouchDB starts this process again", start_anew());
                wait(&notifier, Duration::MAX);
                return 0;
            }
        }
    }
}

/// Stays for CouchDB's sake, with arguments that are of no use: says why, reads stdin, writes nothing.
pub(crate) fn stay(why: &str) -> u8 {
    let started = begin(|_| ());
    complain(&format!("{why}; nothing is told, and this process stays only because CouchDB needs it"));
    match started {
        Ok(notifier) => wait(&notifier, Duration::MAX),
        Err(_) => drain_here() == 0,
    };
    2
}

/// From here on stdin is read and stdout silent.
fn begin(tell: impl FnMut(Told) + Send + 'static) -> Result<Notifier> {
    let silenced = update_notification::silence_stdout();
    let notifier = update_notification::start(tell);
    if let Err(error) = silenced {
        // Nothing of ours writes there anyway.
        complain(&error.to_string());
    }
    notifier
}

fn drain_here() -> u8 {
    update_notification::drain(std::io::stdin(), |_| ());
    0
}

/// Whether CouchDB is gone within this time.
fn wait(notifier: &Notifier, time: Duration) -> bool {
    let gone = notifier.closed();
    let deadline = sys::now().checked_add(time);
    let waited = deadline
        .map_or_else(|| gone.recv().map_err(|_| RecvTimeoutError::Disconnected), |at| gone.recv_deadline(at));
    // The daemon may have taken the message.
    waited.is_ok() || notifier.is_closed()
}

enum Failed {
    /// The configuration cannot even be asked for.
    ToAsk(Error),
    /// What it broke down with. Threads of it may live on.
    ToGoOn(String),
}

/// Runs the daemon in a thread of its own and says what is wrong with CouchDB's lines.
fn daemon(
    arguments: &Arguments,
    notifier: &Notifier,
    hints: &Arc<Hints>,
    damaged: &Receiver<()>,
) -> Result<(), Failed> {
    let overrides = Overrides::of_process(arguments.set.clone());
    let (configured, asking) = match &arguments.config[..] {
        [] => {
            let asked = where_to_ask(&overrides).map_err(Failed::ToAsk)?;
            let asking =
                CouchConfig::start(&asked, arguments.node.clone(), overrides).map_err(Failed::ToAsk)?;
            (Configured::Polled(asking.answers()), Some(asking))
        }
        config => (Configured::Files(Sources { config: config.to_vec(), overrides }), None),
    };
    let start = Start::Notified { closed: notifier.closed(), hints: Arc::clone(hints), configured };
    let (end, ended) = bounded(1);
    let thread = sys::spawn("daemon", move || {
        // There is room: this is the one message of the channel.
        let _ = end.send(daemon::run(start));
    });
    let thread = thread.map_err(|error| Failed::ToGoOn(error.to_string()))?;
    let (mut complaint, mut damaged) = (Complaint::default(), damaged.clone());
    let outcome = loop {
        select! {
            recv(ended) -> outcome => break outcome,
            recv(damaged) -> damage => match damage {
                Ok(()) if complaint.is_news(Kind::Malformed, sys::now()) => log::warn!(
                    "CouchDB wrote a line on stdin that cannot be read; every database is looked at for it"
                ),
                Ok(()) => {}
                // stdin has ended; the daemon is about to.
                Err(_) => damaged = never(),
            },
        }
    };
    if let Some(asking) = asking {
        // A thread that hangs ends with the process.
        let _ = asking.stop();
    }
    match outcome {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(Failed::ToGoOn(error.to_string())),
        Err(_) => Err(Failed::ToGoOn(thread.join().err().unwrap_or_default())),
    }
}

/// Becomes the same program with the same arguments in the same process, so that CouchDB notices nothing and no thread
/// of before lives on; gives why that failed.
fn start_anew() -> Error {
    let mut words = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    let error = command.args(words).exec();
    Error::new(Kind::Io, format!("failed to start anew: {error}"))
}
