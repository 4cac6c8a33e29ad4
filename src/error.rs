//! The one error type: a kind that callers branch on, and a chain of context for people.
//!
//! A message says what was being done, to what, and what was found: lower case, no full stop, values in
//! backticks. Place first, cause last. No secret ever stands in one.

use std::fmt;

/// What callers branch on. Never match on an error's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No connection: refused, reset, no route, DNS, TLS.
    Unreachable,
    /// The connection was lost within an answer.
    Cut,
    /// A deadline or an idle limit passed.
    Timeout,
    /// 401: no login, or a wrong one.
    Unauthorized,
    /// 403 that speaks of rights.
    Forbidden,
    /// 403 that speaks of a locked account (CouchDB 3.4+), or our own login gate is shut.
    Locked,
    /// 404.
    NotFound,
    /// 409 or 412: somebody else wrote first, or it exists already.
    Conflict,
    /// A feed's position that this server does not know: 400 about `since`, on 1.x a 500.
    BadSince,
    /// Another 4xx.
    BadRequest,
    /// 5xx.
    Server,
    /// An answer that is not what CouchDB gives: HTML, JSON cut short, another shape.
    Malformed,
    /// An answer longer than the limit that it was asked for with.
    TooLong,
    /// Stopped by ourselves: the part is being shut down.
    Stopped,
    /// Configuration or arguments that cannot be used.
    Config,
    /// Files, pipes and other things of this machine.
    Io,
}

/// An error with its context, outermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    cause: String,
    context: Vec<String>,
}

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error; `cause` says what was found.
    pub fn new(kind: Kind, cause: impl Into<String>) -> Error {
        Error { kind, cause: cause.into(), context: Vec::new() }
    }

    /// Puts "what was being done, to what" in front.
    #[must_use]
    pub fn context(mut self, doing: impl Into<String>) -> Error {
        self.context.push(doing.into());
        self
    }

    /// What callers branch on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The innermost text, without context.
    pub fn cause(&self) -> &str {
        &self.cause
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for doing in self.context.iter().rev() {
            write!(f, "{doing}: ")?;
        }
        f.write_str(&self.cause)
    }
}

impl std::error::Error for Error {}

/// Adds context to a failed result.
pub trait Context<T> {
    /// As [`Error::context`], built only when needed.
    fn context(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.context(doing()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_reads_from_the_outside_in() {
        let error = Error::new(Kind::Timeout, "no byte for 65 s")
            .context("failed to read changes")
            .context("database `orders`");
        assert_eq!(error.to_string(), "database `orders`: failed to read changes: no byte for 65 s");
        assert_eq!(error.kind(), Kind::Timeout);
    }
}
