//! `signature sign` and `signature verify`: what a receiver must compute, and why what it got does not match.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::cli::out::{Colour, Out};
use crate::cli::receive::Secrets;
use crate::error::{Error, Kind, Result};
use crate::pure::signature::{self, Mismatch};
use crate::sys;

/// No payload is longer: `payload_bytes_max` has this limit, and an envelope.
const BODY_BYTES_MAX: u64 = 64 << 20;

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    couch-hookd signature verify --secret-file orders.secret -H 'webhook-id: msg_5f0c…' \\\n    \
    -H 'webhook-timestamp: 1795296401' -H 'webhook-signature: v1,K5oZ…' body.json")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print the three headers of a signed request
    #[command(after_help = "Example:\n  \
        couch-hookd signature sign --secret whsec_… --id msg_1 body.json")]
    Sign {
        #[command(flatten)]
        secrets: Secrets,
        /// Value of webhook-id
        #[arg(long, value_name = "ID")]
        id: String,
        /// Value of webhook-timestamp, seconds since 1970 [default: now]
        #[arg(long, value_name = "SECONDS")]
        timestamp: Option<i64>,
        /// File with the body, - for stdin
        #[arg(value_name = "FILE", default_value = "-")]
        body: PathBuf,
    },
    /// Say whether a request's signature is right, and if not, why
    #[command(after_help = "Example:\n  \
        couch-hookd signature verify --secret-file orders.secret -H 'webhook-id: msg_5f0c…' \\\n    \
        -H 'webhook-timestamp: 1795296401' -H 'webhook-signature: v1,K5oZ…' body.json\n\n\
        The body must be byte for byte what was received. Exit status 1 when the signature is wrong.")]
    Verify {
        #[command(flatten)]
        secrets: Secrets,
        /// A header as it was received; the three webhook-… are needed, others do no harm
        #[arg(short = 'H', long = "header", value_name = "NAME: VALUE")]
        headers: Vec<String>,
        /// Accept a timestamp of any age: the request was kept for later
        #[arg(long)]
        any_age: bool,
        /// File with the body, - for stdin
        #[arg(value_name = "FILE", default_value = "-")]
        body: PathBuf,
    },
}

/// Signs or verifies.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    match arguments.command {
        Command::Sign { secrets, id, timestamp, body } => {
            if id.is_empty() || !id.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(wrong("--id: expected visible ASCII characters, which a header can hold"));
            }
            let keys = secrets.keys()?;
            let timestamp = timestamp.unwrap_or_else(|| sys::wall().as_second());
            let Some(signature) = signature::sign(&keys, &id, timestamp, &read_body(&body)?) else {
                return Err(no_secret());
            };
            out.line(&format!("webhook-id: {id}"))?;
            out.line(&format!("webhook-timestamp: {timestamp}"))?;
            out.line(&format!("webhook-signature: {signature}"))?;
            Ok(0)
        }
        Command::Verify { secrets, headers, any_age, body } => {
            let keys = secrets.keys()?;
            let headers = headers.iter().map(|header| split(header)).collect::<Result<Vec<_>>>()?;
            let tolerance = if any_age { Duration::MAX } else { signature::TOLERANCE };
            let now = sys::wall().as_second();
            match signature::verify(&keys, &headers, &read_body(&body)?, now, tolerance) {
                Ok(()) => {
                    out.marked_line("ok", Colour::Green, "the signature is right")?;
                    Ok(0)
                }
                Err(Mismatch::NoSecret) => Err(no_secret()),
                Err(why) => {
                    out.marked_line("wrong", Colour::Red, &why.to_string())?;
                    Ok(1)
                }
            }
        }
    }
}

fn split(header: &str) -> Result<(String, String)> {
    match header.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => {
            Ok((name.trim().to_owned(), value.trim().to_owned()))
        }
        _ => Err(wrong("--header: expected `NAME: VALUE`, got a text without a name and `:`")),
    }
}

fn read_body(path: &Path) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    let read = match path.as_os_str() == "-" {
        true => std::io::stdin().take(BODY_BYTES_MAX + 1).read_to_end(&mut body),
        false => {
            std::fs::File::open(path).and_then(|file| file.take(BODY_BYTES_MAX + 1).read_to_end(&mut body))
        }
    };
    read.map_err(|error| wrong(&format!("failed to read the body from `{}`: {error}", path.display())))?;
    if body.len() as u64 > BODY_BYTES_MAX {
        return Err(wrong(&format!("`{}`: expected a body of at most 64 MiB, got more", path.display())));
    }
    Ok(body)
}

fn no_secret() -> Error {
    wrong("expected --secret or --secret-file, got neither")
}

fn wrong(text: &str) -> Error {
    Error::new(Kind::Config, text)
}
