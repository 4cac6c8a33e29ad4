//! Hides what we know to be secret in somebody else's text: error pages love to repeat the request.
//!
//! Guarantees one line of at most so many characters without any of the secrets given, in full or without what
//! usually stands in front (`Basic `, `whsec_`, `NAME=`). Leaves to others: secrets that it was not given, and text
//! that spells them another way.

pub mod document;

use std::fmt;

/// Shorter secrets would make every text unreadable, and are none.
const SECRET_BYTES_MIN: usize = 4;
/// A path segment as long as this is taken for a token (`/services/T0/B0/XXXXXXXXXXXXXXXXXXXXXXXX`).
const SEGMENT_BYTES_MIN: usize = 12;

/// What is hidden. `Debug` shows nothing of it.
#[derive(Default)]
pub struct Redactor {
    /// Longest first, so that no part of one is left when a shorter one is hidden.
    secrets: Vec<String>,
}

impl Redactor {
    /// Hides these texts; those shorter than four bytes are not hidden.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Redactor {
        let mut redactor = Redactor::default();
        secrets.into_iter().for_each(|secret| redactor.add(secret));
        redactor
    }

    /// Hides the URL of an endpoint without its userinfo, its path, its query, the query's values, and segments of
    /// the path that look like tokens. The host is no secret.
    #[must_use]
    pub fn and_url(mut self, url: &str) -> Redactor {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        let path = rest.find(['/', '?']).map_or("", |at| &rest[at..]);
        let (path_only, query) = path.split_once('?').unwrap_or((path, ""));
        let values = query.split('&').filter_map(|pair| pair.split_once('=')).map(|(_, value)| value);
        let tokens = path_only.split('/').filter(|segment| segment.len() >= SEGMENT_BYTES_MIN);
        for text in [url, path, path_only, query].into_iter().chain(values).chain(tokens) {
            self.add(text);
        }
        self
    }

    fn add(&mut self, secret: &str) {
        let behind_scheme = secret.split_once(' ').map(|(_, value)| value);
        for text in [Some(secret), behind_scheme, secret.strip_prefix("whsec_")].into_iter().flatten() {
            if text.len() >= SECRET_BYTES_MIN && !self.secrets.iter().any(|known| known == text) {
                self.secrets.push(text.to_owned());
            }
        }
        self.secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    }

    /// The first `n_chars` characters in one line, `***` where a secret stood.
    pub fn redact(&self, text: &str, n_chars: usize) -> String {
        let mut text = text.to_owned();
        // Before anything is cut: half a secret would not be recognised.
        for secret in &self.secrets {
            if text.contains(secret) {
                text = text.replace(secret, "***");
            }
        }
        let chars = text.trim().chars().take(n_chars);
        chars.map(|char| if char.is_control() { ' ' } else { char }).collect()
    }
}

impl fmt::Debug for Redactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let redactor = Redactor::new(["Basic aG9vaw==", "p4ssword", "whsec_S1GN", "ab"])
            .and_url("https://hooks.example/services/T0/AAAABBBBCCCC?token=t0ken&x=y");
        assert_eq!(redactor.redact(text, 40), expected);
        assert_eq!(format!("{redactor:?}"), "***");
    }

    #[test]
    fn hides_secrets_in_full_and_in_part() {
        check("no ab secret\r\nat hooks.example", "no ab secret  at hooks.example");
        check("Cannot POST /services/T0/AAAABBBBCCCC?token=t0ken&x=y", "Cannot POST ***");
        check("https://hooks.example/services/T0/AAAABBBBCCCC?token=t0ken&x=y!", "***!");
        check("POST /services/T0/AAAABBBBCCCC", "POST ***");
        check("no webhook AAAABBBBCCCC; token t0ken", "no webhook ***; token ***");
        check("Authorization: Basic aG9vaw==, aG9vaw==", "Authorization: ***, ***");
        check("wrong password p4ssword, S1GN, whsec_S1GN", "wrong password ***, ***, ***");
    }

    #[test]
    fn hides_before_it_cuts() {
        check(&"p4ssword ".repeat(20), &"*** ".repeat(10));
        check(&format!("{}p4ssword", "x".repeat(36)), &format!("{}***", "x".repeat(36)));
    }
}
