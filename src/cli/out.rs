//! The one writer of what commands print.
//!
//! Guarantees that a reader who goes away (`| head`) ends a command quietly, that colours go only to a terminal and
//! never where NO_COLOR is set, and that a line of somebody else's text cannot steer the terminal. Errors of the
//! program itself go to stderr.

use std::io::{self, IsTerminal, Write};

use crate::error::{Error, Kind, Result};
use crate::pure::os_daemon::one_line;

/// A colour of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colour {
    Green,
    Yellow,
    Red,
}

impl Colour {
    /// The text in this colour, for a terminal.
    pub(crate) fn paint(self, text: &str) -> String {
        let code = match self {
            Colour::Green => 32,
            Colour::Yellow => 33,
            Colour::Red => 31,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Standard output.
pub(crate) struct Out {
    stdout: io::Stdout,
    colours: bool,
}

impl Out {
    pub(crate) fn new() -> Out {
        let stdout = io::stdout();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Out { colours: stdout.is_terminal() && wanted, stdout }
    }

    /// One line, at once. Control characters in it are escaped.
    ///
    /// # Errors
    /// `Stopped` when nobody reads any more; `Io`.
    pub(crate) fn line(&mut self, text: &str) -> Result<()> {
        self.write(&one_line(text))
    }

    /// As [`Out::line`], with a coloured word of ours in front, padded to a column.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn marked_line(&mut self, word: &str, colour: Colour, text: &str) -> Result<()> {
        let text = one_line(text);
        match self.colours {
            true => self.write(&format!("{}  {text}", colour.paint(&format!("{word:<7}")))),
            false => self.write(&format!("{word:<7}  {text}")),
        }
    }

    /// One line of JSON, as long as it may be.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn json(&mut self, json: &str) -> Result<()> {
        self.write(json)
    }

    /// One line whose pieces were made safe and coloured by `table`.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn styled(&mut self, line: &str) -> Result<()> {
        self.write(line)
    }

    /// Whether colours are wanted.
    pub(crate) fn has_colours(&self) -> bool {
        self.colours
    }

    /// Columns of the terminal; `None` when stdout is none.
    pub(crate) fn width(&self) -> Option<usize> {
        self.size().map(|(width, _)| width)
    }

    /// Columns and lines of the terminal; `None` when stdout is none.
    pub(crate) fn size(&self) -> Option<(usize, usize)> {
        let (width, height) = terminal_size::terminal_size_of(&self.stdout)?;
        Some((usize::from(width.0), usize::from(height.0)))
    }

    /// A whole text of ours, as it is.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn text(&mut self, text: &[u8]) -> Result<()> {
        let mut stdout = self.stdout.lock();
        stdout.write_all(text).and_then(|()| stdout.flush()).map_err(failed)
    }

    /// The bytes as they are, for whoever prints by itself.
    pub(crate) fn writer(&mut self) -> &mut dyn Write {
        &mut self.stdout
    }

    fn write(&mut self, line: &str) -> Result<()> {
        let mut stdout = self.stdout.lock();
        writeln!(stdout, "{line}").and_then(|()| stdout.flush()).map_err(failed)
    }
}

fn failed(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Error::new(Kind::Stopped, "nobody reads the output"),
        _ => Error::new(Kind::Io, format!("failed to write to stdout: {error}")),
    }
}

/// One line on stderr: what went wrong with the command as a whole.
pub(crate) fn complain(text: &str) {
    // Nowhere else to say it.
    let _ = writeln!(io::stderr(), "couch-hookd: {}", one_line(text));
}
