//! Text that must not leave: passwords, signing secrets, header values.
//!
//! Guarantees that no formatting of it, nor of anything that holds it, shows the text.

use std::fmt;

use sha2::{Digest, Sha256};

/// A secret text. `Debug` and `Display` give `***`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself, at the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Six hex digits by which people tell two secrets apart: `#1f9a07`. Only for texts that nobody can guess (a signing
/// secret, a URL with a token): to whoever guesses at a password it would say whether they are near.
pub fn fingerprint(text: &str) -> String {
    let hash = Sha256::digest(text.as_bytes());
    format!("#{:02x}{:02x}{:02x}", hash[0], hash[1], hash[2])
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
