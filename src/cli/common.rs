//! What the commands that operate webhooks share: the configuration as `run` finds it, and the CouchDB it names.
//!
//! Guarantees that a configuration with faults in one webhook still serves the others, as in the daemon; that
//! faults are said in one line each on stderr; and that nothing is sent before a command asks for it.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::cli::out::complain;
use crate::cli::run::{Source, where_to_ask};
use crate::config::finding::{Finding, Origin, Raw};
use crate::config::source::{self, Overrides, Sources};
use crate::config::{self, Config, Webhook, values};
use crate::couch::client::{Server, Welcome};
use crate::couch::node_config::NodeConfig;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::nearest::nearest_of;
use crate::sys;

/// A configuration that can be used, and the server it is for.
pub(crate) struct Setup {
    /// As it was written, with the origin of every value.
    pub(crate) raw: Raw,
    /// What it means.
    pub(crate) config: Config,
    /// Webhooks whose section has an error: listed, but not in `config`.
    pub(crate) held_back: BTreeSet<String>,
    /// Everything that is wrong with it.
    pub(crate) findings: Vec<Finding>,
    /// CouchDB, not asked for anything yet (but for its configuration with `--from-couchdb`).
    pub(crate) server: Server,
}

impl Setup {
    /// Finds the configuration as `run` does.
    ///
    /// # Errors
    /// `Config`, with every fault in one line, when nothing can be done with it; with `--from-couchdb` as asking
    /// CouchDB.
    pub(crate) fn load(from: Source) -> Result<Setup> {
        let Source { config, from_couchdb, node, set } = from;
        let overrides = Overrides::of_process(set);
        let raw = match from_couchdb {
            false => source::load(&Sources { config, overrides }),
            true => {
                let server = Server::new(&where_to_ask(&overrides)?)?;
                let sections = NodeConfig::new(server, node).read().context(|| "_config".to_owned())?;
                source::from_sections(&sections, &Origin::CouchConfig, &overrides)
            }
        };
        let (parsed, findings) = config::parse(&raw);
        let Some(config) = parsed.config else {
            let faults = findings.iter().filter(|finding| finding.is_error()).map(ToString::to_string);
            let faults = faults.collect::<Vec<_>>().join("; ");
            return Err(Error::new(Kind::Config, format!("the configuration cannot be used: {faults}")));
        };
        let server = Server::new(&config.hookd)?;
        Ok(Setup { raw, config, held_back: parsed.held_back, findings, server })
    }

    /// Who the CouchDB is, asked first by every command that needs it.
    ///
    /// # Errors
    /// As [`Server::welcome`], with the server's address in place of the request.
    pub(crate) fn welcome(&self) -> Result<Welcome> {
        self.server.welcome().map_err(|error| {
            Error::new(error.kind(), error.cause()).context(format!("CouchDB at {}", self.server.base_url()))
        })
    }

    /// The webhook of this name.
    ///
    /// # Errors
    /// `Config`: it is not listed, or its section has an error (which one is said on stderr).
    pub(crate) fn webhook(&self, name: &str) -> Result<&Webhook> {
        if let Some(webhook) = self.config.webhooks.iter().find(|webhook| webhook.name == name) {
            return Ok(webhook);
        }
        if self.held_back.contains(name) {
            let its = |finding: &&Finding| finding.is_error() && finding.webhook.as_deref() == Some(name);
            self.findings.iter().filter(its).for_each(|finding| complain(&finding.to_string()));
            return Err(Error::new(Kind::Config, format!("webhook `{name}`: its section has an error")));
        }
        let names: Vec<&str> = self.config.webhooks.iter().map(|webhook| webhook.name.as_str()).collect();
        let hint = match nearest_of(name, names.iter().copied(), 2) {
            Some(near) => format!("did you mean `{near}`?"),
            None if names.is_empty() => "[hookd.webhooks] lists none".to_owned(),
            None => format!("there are `{}`", names.join("`, `")),
        };
        Err(Error::new(Kind::Config, format!("no webhook `{name}` is configured; {hint}")))
    }
}

/// How long ago a time was, for people: `12 s`, `4 m`, `3 h`, `2 d`.
pub(crate) fn age(at: jiff::Timestamp) -> String {
    span(sys::wall().duration_since(at).as_secs())
}

/// How long it is until a time: as [`age`].
pub(crate) fn until(at: jiff::Timestamp) -> String {
    span(at.duration_since(sys::wall()).as_secs())
}

fn span(seconds: i64) -> String {
    match seconds.max(0) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

/// A time as people give it: so long ago (`2h`, `30m`), or a time such as `2026-11-21T20:00:00Z`.
///
/// # Errors
/// `Config` with what was expected.
pub(crate) fn parse_since(text: &str) -> Result<jiff::Timestamp> {
    const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
    if let Ok(ago) = values::duration(text, Duration::ZERO, LONGEST) {
        return Ok(sys::wall() - ago);
    }
    text.parse().map_err(|_| {
        let found = "expected how long ago (`2h`, `30m`) or a time such as `2026-11-21T20:00:00Z`";
        Error::new(Kind::Config, format!("--since: {found}, got `{}`", values::shown(text)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_one_unit() {
        for (seconds, expected) in
            [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 m"), (7_200, "2 h"), (172_800, "2 d")]
        {
            assert_eq!(span(seconds), expected);
        }
    }

    #[test]
    fn times_are_read_as_people_give_them() {
        assert_eq!(parse_since("2026-11-21T20:00:00Z").unwrap().to_string(), "2026-11-21T20:00:00Z");
        let ago = sys::wall().duration_since(parse_since("2h").unwrap()).as_secs();
        assert!((7_100..7_300).contains(&ago), "{ago}");
        assert!(parse_since("yesterday").unwrap_err().to_string().contains("`2h`"));
    }
}
