//! `secret`: a new signing secret.

use crate::cli::out::Out;
use crate::error::Result;
use crate::pure::signature;
use crate::sys;

/// Prints one.
pub(crate) fn run(out: &mut Out) -> Result<u8> {
    out.line(&signature::new_secret(sys::random_bytes()))?;
    Ok(0)
}
