//! What CouchDB's answers say when they do not say yes, and what they say about our login.
//!
//! Guarantees that a status counts as CouchDB's word about databases and documents only when the body is CouchDB's:
//! a proxy's 404 is not a missing document. Sends nothing and keeps nothing.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Kind, Result};
use crate::pure::excerpt::excerpt;
use crate::pure::login::Verdict;

/// What an answer other than 2xx says.
pub(crate) struct Refusal {
    pub(crate) kind: Kind,
    /// `404 not_found: missing`.
    pub(crate) text: String,
    /// CouchDB's `reason`; empty when the answer is not CouchDB's.
    pub(crate) reason: String,
}

impl Refusal {
    /// From status and body.
    pub(crate) fn new(status: u16, body: &[u8]) -> Refusal {
        #[derive(Deserialize)]
        struct Body {
            error: String,
            #[serde(default)]
            reason: serde_json::Value,
        }
        if let Ok(Body { error, reason }) = serde_json::from_slice(body) {
            let reason = reason.as_str().map_or_else(|| reason.to_string(), str::to_owned);
            let text = format!("{status} {error}: {}", excerpt(reason.as_bytes(), 300));
            return Refusal { kind: kind_of(status, &reason), text, reason };
        }
        let kind = match kind_of(status, "") {
            // A proxy's word counts where it speaks of itself, not where it would speak of documents.
            kind @ (Kind::Server | Kind::Unauthorized) => kind,
            _ => Kind::Malformed,
        };
        let text = format!("{status}, expected CouchDB's JSON, got `{}`", excerpt(body, 60));
        Refusal { kind, text, reason: String::new() }
    }
}

fn kind_of(status: u16, reason: &str) -> Kind {
    match status {
        401 if speaks_of_rights(reason) => Kind::Forbidden,
        401 => Kind::Unauthorized,
        403 if reason.contains("locked") => Kind::Locked,
        403 => Kind::Forbidden,
        404 => Kind::NotFound,
        // `Malformed sequence supplied in 'since' parameter.`
        400 if reason.contains("'since'") => Kind::BadSince,
        409 | 412 => Kind::Conflict,
        408 | 425 | 429 => Kind::Server,
        400..=499 => Kind::BadRequest,
        500..=599 => Kind::Server,
        _ => Kind::Malformed,
    }
}

/// CouchDB answers 401, not 403, when a good login has no rights: `You are not a server admin.`,
/// `You are not authorized to access this db.`, `You are not a db or server admin.`
fn speaks_of_rights(reason: &str) -> bool {
    reason.starts_with("You are not ") && reason != "You are not an authenticated user"
}

/// What an answer other than 2xx says about the login, if anything. A 401 in other words than CouchDB's may come
/// from a filter function of somebody's; a 401 to `GET /` cannot.
pub(crate) fn login_verdict(status: u16, refusal: &Refusal, path: &str) -> Option<Verdict> {
    match (status, refusal.kind) {
        (_, Kind::Locked) => Some(Verdict::Refused),
        (_, Kind::Unauthorized) if refusal.reason == "Name or password is incorrect." || path == "/" => {
            Some(Verdict::Refused)
        }
        (_, Kind::Unauthorized) => Some(Verdict::Doubtful),
        (400..=499, Kind::Malformed) => None,
        (400..=499, _) => Some(Verdict::Accepted),
        _ => None,
    }
}

/// Reads a JSON body.
///
/// # Errors
/// `Malformed`, with the first characters of what came instead.
pub fn from_json<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| {
        Error::new(Kind::Malformed, format!("expected CouchDB's JSON, got `{}`: {error}", excerpt(body, 60)))
    })
}
