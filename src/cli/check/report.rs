//! Lines of `check`, for people or as JSON, and what they add up to.

use serde::Serialize;

use crate::cli::out::{Colour, Out};
use crate::error::Result;

/// How bad a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Ok,
    Warning,
    Error,
}

/// One line: `{"level":"error","subject":"server","message":"connection refused"}`.
#[derive(Serialize)]
struct Line<'a> {
    level: Level,
    subject: &'a str,
    message: &'a str,
}

/// Prints lines as they come and counts them.
pub(crate) struct Report<'a> {
    out: &'a mut Out,
    json: bool,
    n_errors: usize,
    n_warnings: usize,
}

impl<'a> Report<'a> {
    pub(crate) fn new(out: &'a mut Out, json: bool) -> Report<'a> {
        Report { out, json, n_errors: 0, n_warnings: 0 }
    }

    /// Says one thing about one subject.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn say(&mut self, level: Level, subject: &str, message: &str) -> Result<()> {
        let (word, colour) = match level {
            Level::Ok => ("ok", Colour::Green),
            Level::Warning => ("warning", Colour::Yellow),
            Level::Error => ("error", Colour::Red),
        };
        match level {
            Level::Ok => {}
            Level::Warning => self.n_warnings += 1,
            Level::Error => self.n_errors += 1,
        }
        if self.json {
            let line = serde_json::to_string(&Line { level, subject, message });
            return self.out.json(&line.expect("texts are always JSON"));
        }
        self.out.marked_line(word, colour, &format!("{subject}: {message}"))
    }

    /// The sum of it, and the exit status: 1 with an error.
    ///
    /// # Errors
    /// As [`Out::line`].
    pub(crate) fn finish(self) -> Result<u8> {
        if !self.json {
            let count = |n: usize, what: &str| match n {
                0 => format!("no {what}s"),
                1 => format!("1 {what}"),
                _ => format!("{n} {what}s"),
            };
            let sum = format!("{}, {}", count(self.n_errors, "error"), count(self.n_warnings, "warning"));
            self.out.line(&sum)?;
        }
        Ok(u8::from(self.n_errors > 0))
    }
}
