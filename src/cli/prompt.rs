//! Asking whoever sits at the terminal, and showing how far long work has come.
//!
//! Guarantees that nothing is asked where nobody can answer: without a terminal only `--yes` goes on.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::cli::out::Out;
use crate::error::{Error, Kind, Result};

/// Width of the bar, in characters.
const BAR: usize = 30;

/// Whether to go on: with `--yes`, or when the answer begins with a `y`.
///
/// # Errors
/// `Config` when nobody can be asked; `Io` when the answer cannot be read.
pub(crate) fn confirm(out: &mut Out, yes: bool, question: &str) -> Result<bool> {
    if yes {
        return Ok(true);
    }
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        let found = "this changes things and nobody can be asked here (stdin is no terminal); say --yes";
        return Err(Error::new(Kind::Config, found));
    }
    let writer = out.writer();
    let io_error = |error| Error::new(Kind::Io, format!("failed to ask: {error}"));
    write!(writer, "{question} [y/N] ").and_then(|()| writer.flush()).map_err(io_error)?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(io_error)?;
    Ok(answer.trim_start().to_ascii_lowercase().starts_with('y'))
}

/// A line on stderr that says how far it is, on a terminal only.
pub(crate) struct Bar {
    shown: bool,
    is_terminal: bool,
}

impl Bar {
    /// None is shown yet.
    pub(crate) fn new() -> Bar {
        Bar { shown: false, is_terminal: io::stderr().is_terminal() }
    }

    /// So many of all, and a few words.
    pub(crate) fn show(&mut self, done: u64, all: u64, text: &str) {
        if !self.is_terminal || all == 0 {
            return;
        }
        self.shown = true;
        let filled = usize::try_from(done.min(all) * BAR as u64 / all).unwrap_or(BAR);
        let (full, empty) = ("#".repeat(filled), " ".repeat(BAR - filled));
        // Nowhere else to show it.
        let _ = write!(io::stderr(), "\r\x1b[K[{full}{empty}] {done}/{all}  {text}");
    }

    /// Takes it away.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.clear();
    }
}
