//! `receive`: the other end, to look at webhooks and to try out refusals.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::cli::out::Out;
use crate::error::{Error, Kind, Result};
use crate::host::standalone::Signals;
use crate::pure::signature::Key;
use crate::standin::receiver::{ReceiveOptions, run_receive};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd receive --secret whsec_…\n  \
    couch-hookd receive --listen 127.0.0.1:8787 --refuse order:17 --json\n\n\
    Every POST is answered and printed; Ctrl-C ends it. Exit status 1 when a signature was wrong.")]
pub(crate) struct Arguments {
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8787")]
    listen: SocketAddr,
    #[command(flatten)]
    secrets: Secrets,
    /// Status of every answer
    #[arg(long, value_name = "STATUS", default_value_t = 200, value_parser = clap::value_parser!(u16).range(200..=599))]
    answer: u16,
    /// Answer events of this document with 422
    #[arg(long, value_name = "ID")]
    refuse: Option<String>,
    /// One JSON object a line, bodies and headers included
    #[arg(long)]
    json: bool,
}

/// Signing secrets as arguments.
#[derive(Debug, Args)]
pub(crate) struct Secrets {
    /// Signing secret, whsec_…; may be given several times
    #[arg(long, value_name = "WHSEC", hide_possible_values = true)]
    secret: Vec<String>,
    /// File that holds one, out of sight of other users of this machine
    #[arg(long, value_name = "FILE")]
    secret_file: Vec<PathBuf>,
}

impl Secrets {
    /// What was given, read and decoded.
    ///
    /// # Errors
    /// `Config` for one that is none, without showing it.
    pub(crate) fn keys(&self) -> Result<Vec<Key>> {
        let fault = |place: String| move |why: String| Error::new(Kind::Config, why).context(place);
        let mut keys = Vec::new();
        for text in &self.secret {
            keys.push(Key::parse(text).map_err(fault("--secret".to_owned()))?);
        }
        for path in &self.secret_file {
            let place = format!("--secret-file `{}`", path.display());
            let text = std::fs::read_to_string(path)
                .map_err(|error| fault(place.clone())(format!("failed to read: {error}")))?;
            keys.push(Key::parse(&text).map_err(fault(place))?);
        }
        Ok(keys)
    }
}

/// Receives until told to end.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let options = ReceiveOptions {
        listen: arguments.listen,
        secrets: arguments.secrets.keys()?,
        answer: arguments.answer,
        refuse: arguments.refuse,
        json: arguments.json,
    };
    let signals = Signals::catch()?;
    let status = run_receive(&options, out.writer(), &signals.received());
    signals.stop().map_err(|panic| Error::new(Kind::Io, panic))?;
    status
}
