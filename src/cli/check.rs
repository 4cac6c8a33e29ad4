//! `check`: everything that is wrong, at once: the configuration, then the server, our rights, each endpoint.
//!
//! Guarantees that a later part is tried although an earlier one failed, as far as it can be; that no webhook
//! request is sent; and that what is written to CouchDB is `state_db`, which the daemon would make, and `_local`
//! documents of a name of their own, which are deleted again.

mod endpoint;
mod patterns;
mod report;
mod server;

use std::collections::BTreeMap;

use clap::Args;

use crate::cli::check::report::{Level, Report};
use crate::cli::out::Out;
use crate::cli::run::{Source, where_to_ask};
use crate::config::finding::{Origin, Raw};
use crate::config::source::{self, Overrides, Sources};
use crate::config::{self, Hookd, Webhook};
use crate::couch::client::Server;
use crate::couch::node_config::NodeConfig;
use crate::error::Result;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd check --config /etc/couch-hookd/hookd.ini\n  \
    couch-hookd check --config /opt/couchdb/etc/local.ini --json\n\n\
    Exit status 1 when there is an error; warnings do not count.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    source: Source,
    /// One JSON object a line: {"level":…,"subject":…,"message":…}
    #[arg(long)]
    json: bool,
}

/// Checks everything.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let mut report = Report::new(out, arguments.json);
    let (raw, bootstrap) = read(arguments.source, &mut report)?;
    let (parsed, findings) = config::parse(&raw);
    for finding in &findings {
        let level = if finding.is_error() { Level::Error } else { Level::Warning };
        report.say(level, &finding.place, &finding.message)?;
    }
    let webhooks = parsed.config.as_ref().map_or(&[][..], |config| &config.webhooks);
    if !findings.iter().any(config::finding::Finding::is_error) && !webhooks.is_empty() {
        let names: Vec<&str> = webhooks.iter().map(|webhook| webhook.name.as_str()).collect();
        let text = format!("can be used; webhooks: `{}`", names.join("`, `"));
        report.say(Level::Ok, "configuration", &text)?;
    }
    let hookd = parsed.config.as_ref().map(|config| config.hookd.clone());
    match hookd.or_else(|| hookd_alone(&raw)).or(bootstrap) {
        Some(hookd) => server::check(&hookd, webhooks, &mut report)?,
        None => report.say(Level::Warning, "server", "not tried: [hookd] has errors")?,
    }
    for webhook in webhooks {
        endpoint::check(webhook, &mut report)?;
    }
    for webhook in endpoints_alone(&raw, webhooks) {
        endpoint::check(&webhook, &mut report)?;
    }
    report.finish()
}

/// The configuration as it stands; with `--from-couchdb` also where it was asked for.
fn read(from: Source, report: &mut Report<'_>) -> Result<(Raw, Option<Hookd>)> {
    let Source { config, from_couchdb, node, set } = from;
    let overrides = Overrides::of_process(set);
    if !from_couchdb {
        return Ok((source::load(&Sources { config, overrides }), None));
    }
    let hookd = where_to_ask(&overrides)?;
    let mut node_config = NodeConfig::new(Server::new(&hookd)?, node);
    let sections = match node_config.read() {
        Ok(sections) => {
            if let Some(node) = node_config.node() {
                report.say(Level::Ok, "_config", &format!("node `{node}` gives it"))?;
            }
            sections
        }
        Err(error) => {
            report.say(Level::Error, "_config", &error.to_string())?;
            BTreeMap::new()
        }
    };
    Ok((source::from_sections(&sections, &Origin::CouchConfig, &overrides), Some(hookd)))
}

/// `[hookd]` when something else than `[hookd]` is wrong.
fn hookd_alone(raw: &Raw) -> Option<Hookd> {
    let mut sections = raw.sections.clone();
    sections.retain(|section, _| ["hookd", "chttpd", "httpd"].contains(&section.as_str()));
    let (parsed, _) = config::parse(&Raw { sections, findings: Vec::new() });
    parsed.config.map(|config| config.hookd)
}

/// Webhooks whose section has an error, as they would be without it: good enough to connect to their endpoints.
fn endpoints_alone(raw: &Raw, fine: &[Webhook]) -> Vec<Webhook> {
    let mut list = raw.sections.get("hookd.webhooks").cloned().unwrap_or_default();
    list.retain(|name, _| !fine.iter().any(|webhook| webhook.name == *name));
    let usable = hookd_alone(raw).is_some();
    let hookd: Vec<_> = raw
        .sections
        .get_key_value("hookd")
        .filter(|_| usable)
        .into_iter()
        .map(|(name, values)| (name.clone(), values.clone()))
        .collect();
    let alone = |(name, value)| {
        let mut sections = BTreeMap::from([("hookd.webhooks".to_owned(), BTreeMap::from([(name, value)]))]);
        // Where endpoints may lie.
        sections.extend(hookd.clone());
        let (parsed, _) = config::parse(&Raw { sections, findings: Vec::new() });
        parsed.config.and_then(|mut config| config.webhooks.pop())
    };
    list.into_iter().filter_map(alone).collect()
}
