//! Which certificates are trusted: the system's, Mozilla's, and those of a PEM file of the operator's.
//!
//! Guarantees that machines with outdated or no roots of their own still reach today's endpoints, and that private
//! authorities work. Names `ureq`'s certificate types, because both users of `ureq` (`couch::client` and
//! `pipeline::webhook`) take exactly these; it sends nothing itself.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use crate::error::{Error, Kind, Result};

/// TLS settings for an agent, with the roots of `ca_file` beside the others.
///
/// The system's and Mozilla's roots are read once in a process; a copy of the result is cheap.
///
/// # Errors
/// `Config` when `ca_file` cannot be read, is not PEM, or holds no certificate.
pub fn settings(ca_file: Option<&Path>) -> Result<TlsConfig> {
    static COMMON: OnceLock<Arc<Vec<Certificate<'static>>>> = OnceLock::new();
    let common = COMMON.get_or_init(|| Arc::new(common_roots()));
    let roots = match ca_file {
        None => Arc::clone(common),
        Some(path) => {
            let mut roots = file_roots(path)?;
            roots.extend(common.iter().cloned());
            Arc::new(roots)
        }
    };
    Ok(TlsConfig::builder().root_certs(RootCerts::Specific(roots)).build())
}

/// The system's roots and those of Mozilla's that are not among them.
fn common_roots() -> Vec<Certificate<'static>> {
    let native = rustls_native_certs::load_native_certs();
    for error in &native.errors {
        log::debug!("a root certificate of this system was left out: {error}");
    }
    let known: HashSet<&[u8]> = native.certs.iter().map(AsRef::as_ref).collect();
    let mozilla = webpki_root_certs::TLS_SERVER_ROOT_CERTS
        .iter()
        .map(|der| -> &'static [u8] { der.as_ref() })
        .filter(|der| !known.contains(der))
        .map(Certificate::from_der);
    let system = native.certs.iter().map(|der| Certificate::from_der(der.as_ref()).to_owned());
    system.chain(mozilla).collect()
}

fn file_roots(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let fault =
        |found: String| Error::new(Kind::Config, found).context(format!("ca_file `{}`", path.display()));
    let pem = std::fs::read(path).map_err(|error| fault(format!("cannot be read: {error}")))?;
    let mut roots = Vec::new();
    for item in parse_pem(&pem) {
        if let PemItem::Certificate(root) = item.map_err(|error| fault(format!("is not PEM: {error}")))? {
            roots.push(root);
        }
    }
    if roots.is_empty() {
        return Err(fault("expected at least one `BEGIN CERTIFICATE`, got none".to_owned()));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mozillas_roots_are_there_whatever_the_system_has() {
        assert!(common_roots().len() >= webpki_root_certs::TLS_SERVER_ROOT_CERTS.len());
    }

    #[test]
    fn a_bad_ca_file_is_named() {
        let error = settings(Some(Path::new("/nowhere/ca.pem"))).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert!(error.to_string().starts_with("ca_file `/nowhere/ca.pem`: cannot be read"), "{error}");
        let error = settings(Some(Path::new("Cargo.toml"))).unwrap_err();
        assert!(error.to_string().contains("expected at least one"), "{error}");
    }
}
