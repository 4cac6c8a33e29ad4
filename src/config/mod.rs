//! The typed configuration: what a correct set of sections means.
//!
//! Values here are checked. What CouchDB's or our own ini files say is read by `source`, named by `keys`, and
//! turned into these types by [`parse`], which collects every fault there is instead of stopping at the first.

pub mod finding;
mod hookd;
pub mod keys;
mod reader;
pub mod source;
pub(crate) mod values;
mod webhook;

#[cfg(test)]
mod source_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::config::finding::{Finding, Raw, Value};
use crate::config::keys::Section;
use crate::pure::dispatch::batches::Batching;
use crate::pure::format::Format;
use crate::pure::guard::Guard;
use crate::pure::lease::Mode;
use crate::pure::message::Watch;
use crate::pure::nearest::nearest_of;
use crate::pure::pattern::{Pattern, Selection};
use crate::pure::rate::RateLimit;
use crate::pure::secret::Secret;
use crate::pure::transitions;
use crate::pure::url::Url;

pub(crate) use crate::config::hookd::log_file;
pub(crate) use crate::config::webhook::{OF_CHANGES, OF_REPLICATIONS};

/// Sections that are read whatever they hold: ours, and those that say where CouchDB listens. The section of
/// each webhook comes on top, see [`webhook_sections`].
pub const FIXED_SECTIONS: [&str; 4] = ["hookd", "hookd.webhooks", "chttpd", "httpd"];

/// What [`parse`] makes of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    /// `None` when an error concerns more than one webhook, such as any in `[hookd]`.
    pub config: Option<Config>,
    /// Names of webhooks that are listed (or nearly so) but have an error: held back, not gone.
    pub held_back: BTreeSet<String>,
}

/// The sections of the webhooks that `[hookd.webhooks]` lists, to be asked for after it. Of a key such as
/// `orders_file` it is not known here whether it lists `orders` or `orders_file`: both are given.
pub fn webhook_sections<'a>(listed: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    let both = |key: &'a str| [Some(key.trim()), key.trim().strip_suffix("_file")];
    let names = listed.into_iter().flat_map(both).flatten().filter(|name| webhook::is_name(name));
    names.map(|name| format!("hookd.webhook.{name}")).collect()
}

/// Whether a section is ours to judge. Others are CouchDB's, and `local.ini` is a valid file of ours.
pub fn is_ours(section: &str) -> bool {
    section == "hookd" || section.starts_with("hookd.")
}

/// Whether a section is ours, or was probably meant to be.
fn looks_ours(section: &str) -> bool {
    let lower = section.trim().to_ascii_lowercase();
    ["hookd", "couch_hookd", "couch-hookd"].iter().any(|name| lower.starts_with(name))
}

/// Makes a configuration of sections, and says everything that is wrong with them: first what was found while
/// reading, then `[hookd]`, the list, each webhook by name, and sections that belong to none.
///
/// An error in a webhook's section holds back that webhook alone; any other error leaves no `config` at all.
/// Reads no file and asks nobody: whether URLs answer and databases exist is left to `check`.
pub fn parse(raw: &Raw) -> (Parsed, Vec<Finding>) {
    let mut findings = raw.findings.clone();
    let hookd = hookd::parse(raw, &mut findings);
    let mut webhooks = Vec::new();
    let listed = listed(raw, &mut findings);
    let nothing = BTreeMap::new();
    for (name, endpoint) in &listed {
        let section = raw.sections.get(&format!("hookd.webhook.{name}")).unwrap_or(&nothing);
        webhooks.extend(webhook::parse(name, endpoint, section, hookd.as_ref(), &mut findings));
    }
    unlisted_sections(raw, &listed, &mut findings);
    let held_back: BTreeSet<String> = findings
        .iter()
        .filter(|finding| finding.is_error())
        .filter_map(|finding| finding.webhook.clone())
        .collect();
    webhooks.retain(|webhook| !held_back.contains(&webhook.name));
    let for_all = findings.iter().any(|finding| finding.is_error() && finding.webhook.is_none());
    let config = hookd.filter(|_| !for_all).map(|hookd| Config { hookd, webhooks });
    (Parsed { config, held_back }, findings)
}

/// The base URL of the CouchDB whose sections these are: `[chttpd]` before `[httpd]`, which is the backend port
/// on 2.x and later. `None` when neither says a port or an address.
pub fn couchdb_url_from(raw: &Raw) -> Option<String> {
    ["chttpd", "httpd"].into_iter().find_map(|section| {
        let text = |key| raw.value(section, key).map(|value| value.text.expose().trim());
        let (port, address) = (text("port"), text("bind_address"));
        if port.is_none() && address.is_none() {
            return None;
        }
        let host = match address {
            None | Some("any" | "0.0.0.0") => "127.0.0.1".to_owned(),
            Some("::") => "[::1]".to_owned(),
            Some(address) if address.contains(':') && !address.starts_with('[') => format!("[{address}]"),
            Some(address) => address.to_owned(),
        };
        let url = format!("http://{host}:{}", port.unwrap_or("5984"));
        Url::parse(&url).ok().map(|url| url.base())
    })
}

/// The lines of `[hookd.webhooks]` whose names will do, and their endpoints.
fn listed<'a>(raw: &'a Raw, findings: &mut Vec<Finding>) -> BTreeMap<&'a str, &'a Value> {
    let nothing = BTreeMap::new();
    let section = raw.sections.get("hookd.webhooks").unwrap_or(&nothing);
    if section.is_empty() {
        let message = "lists no webhook: expected lines such as `orders = https://shop.example/hooks/orders`";
        findings.push(Finding::warning(None, "[hookd.webhooks]", message));
    }
    let mut listed = BTreeMap::new();
    for (name, value) in raw.sections.get("hookd.webhooks").into_iter().flatten() {
        let place = reader::place(Some(value), "hookd.webhooks", name);
        let foreign = match (keys::find(Section::Webhook, name), keys::find(Section::Hookd, name)) {
            (Some(_), _) => Some("[hookd.webhook.NAME]"),
            (None, Some(_)) => Some("[hookd]"),
            (None, None) => None,
        };
        if let Some(owner) = foreign.filter(|_| !value.text.expose().contains("://")) {
            // Whoever this was meant for would run without it, without its filter even: nothing may run.
            let message = format!("this is a key of {owner}, not a webhook; {}", keys::STRAY);
            findings.push(Finding::error(None, place, message));
        } else if webhook::is_name(name) {
            listed.insert(name.as_str(), value);
        } else {
            let message = "expected a name of up to 40 lower-case letters, digits, `-` and `_` that begins with a \
                letter or digit";
            findings.push(Finding::error(Some(name), place, message));
        }
    }
    listed
}

/// Sections that look like ours but belong to no listed webhook. Where a listed one was probably meant it is
/// held back: without its section it would send everything.
fn unlisted_sections(raw: &Raw, listed: &BTreeMap<&str, &Value>, findings: &mut Vec<Finding>) {
    for (section, values) in &raw.sections {
        let known = section == "hookd" || section == "hookd.webhooks";
        let lower = section.trim().to_ascii_lowercase();
        if known || !looks_ours(section) {
            continue;
        }
        let exact = section.strip_prefix("hookd.webhook.");
        if exact.is_some_and(|name| listed.contains_key(name)) {
            continue;
        }
        let origin = values.values().map(|value| format!("{}: ", value.origin)).min().unwrap_or_default();
        let place = format!("{origin}[{}]", values::shown(section));
        // What follows the last dot may be a listed name although what stands before it is wrong.
        let name = lower.rsplit('.').next().unwrap_or_default().trim();
        let without_section = |name: &&&str| !raw.sections.contains_key(&format!("hookd.webhook.{name}"));
        let meant = nearest_of(name, listed.keys().filter(without_section).copied(), 1);
        let fixed = nearest_of(&lower, ["hookd", "hookd.webhooks"], 2).filter(|_| exact.is_none());
        findings.push(match (meant, fixed) {
            (Some(meant), _) => {
                let message = format!(
                    "belongs to no listed webhook; the nearest section is [hookd.webhook.{meant}], and `{meant}` is held \
                     back: without its section it might tell everything"
                );
                Finding::error(Some(meant), place, message)
            }
            (None, Some(fixed)) if !lower.starts_with("hookd.webhook.") => {
                Finding::error(None, place, format!("is unknown; the nearest section is [{fixed}]"))
            }
            _ => Finding::warning(
                None,
                place,
                "belongs to no webhook that [hookd.webhooks] lists; it is not used",
            ),
        });
    }
}

/// All of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Section `[hookd]`.
    pub hookd: Hookd,
    /// One per line of `[hookd.webhooks]` that has no fault, in the order of names.
    pub webhooks: Vec<Webhook>,
}

/// Section `[hookd]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Hookd {
    /// Base URL of CouchDB without userinfo and without a slash at the end.
    pub couchdb_url: String,
    /// Login name; from `username`, else from the URL's userinfo, percent-decoded.
    pub username: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// PEM file with roots to trust beside the system's and Mozilla's.
    pub ca_file: Option<PathBuf>,
    /// Database for dead letters, requests, one record per webhook.
    pub state_db: String,
    /// What is logged.
    pub log_level: log::LevelFilter,
    /// How standalone logs look.
    pub log_format: LogFormat,
    /// Under what URL people know this CouchDB, no slash at the end.
    pub public_url: Option<String>,
    /// Ask CouchDB to restart us when our sections change, instead of applying changes live.
    pub register: bool,
    /// The longest time between two checkpoints of a subscription that moves.
    pub checkpoint_interval: Duration,
    /// Deliveries in flight over all webhooks; at most 256.
    pub deliveries_max: usize,
    /// Dead letters of one webhook before it is paused.
    pub dead_letters_max: u64,
    /// Which addresses endpoints may have, unless their webhook says otherwise.
    pub guard: Guard,
    /// How long a filtered request stays open before it is read anew (DESIGN §8).
    pub feed_rotate: Duration,
    /// `timeout` of a continuous request: how long CouchDB keeps it open when nothing happens.
    pub feed_timeout: Duration,
    /// Connections to CouchDB for databases found by pattern, over all webhooks; at most 256.
    pub feed_connections: usize,
    /// How often every database is looked at while no hints flow.
    pub sweep_interval: Duration,
    /// Databases looked at in a second, at most.
    pub sweep_rate: u32,
}

/// How standalone log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How a webhook looks at replications.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Polling {
    /// How often.
    pub interval: Duration,
    /// What counts.
    pub transitions: transitions::Settings,
}

/// One webhook: a line of `[hookd.webhooks]` and its section `[hookd.webhook.NAME]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Webhook {
    /// `[a-z0-9][a-z0-9_-]{0,39}`.
    pub name: String,
    /// Endpoint URL; may hold userinfo or a token in its path, so it is a secret.
    pub endpoint: Secret,
    /// Where events come from.
    pub watch: Watch,
    /// Databases, named singly; with `watch = daemon` it is `state_db`, with `watch = replications` replicator
    /// databases. Empty only where there are `patterns`.
    pub db: Vec<String>,
    /// Databases that are found: those of `db` are not among them.
    pub patterns: Option<Pattern>,
    /// With `watch = databases`: which; `db` is `state_db` then.
    pub selection: Option<Selection>,
    /// Where to start in the databases that exist when the webhook first starts.
    pub since: Since,
    /// How replications are looked at.
    pub polling: Polling,
    /// Event types to send, patterns with `*`: `document.*`.
    pub events: Vec<String>,
    /// Filter that CouchDB runs.
    pub filter: Option<Filter>,
    /// Whether the document goes into the payload.
    pub include_docs: bool,
    /// Whether live conflicts are part of what is told.
    pub conflicts: bool,
    /// Whether the bodies of conflicting leaves go into the payload.
    pub conflict_docs: bool,
    /// Whether design documents are told.
    pub design_docs: bool,
    /// `whsec_…` texts that were checked to decode, newest first; none = unsigned.
    pub secrets: Vec<Secret>,
    /// Extra request headers, names in lower case.
    pub headers: Vec<(String, Secret)>,
    /// One attempt, all of it.
    pub timeout: Duration,
    /// Connecting, TLS included.
    pub connect_timeout: Duration,
    /// Deliveries in flight; 1 = strict order over all documents.
    pub concurrency: usize,
    /// When to try again; the last step repeats.
    pub retry_schedule: Vec<Duration>,
    /// The longest `Retry-After` that is believed.
    pub retry_after_max: Duration,
    /// With `concurrency = 1`: how long one event may hold up all others.
    pub give_up_after: Duration,
    /// Tries of an event that is refused.
    pub dead_letter_after: u32,
    /// Statuses that suspect the event rather than the endpoint.
    pub dead_letter_on: Vec<u16>,
    /// Documents above this many bytes are left out of the payload.
    pub payload_bytes_max: usize,
    /// Shape of the bodies.
    pub format: Format,
    /// Attempts in a time, probes and retries among them; `None`: any number.
    pub rate_limit: Option<RateLimit>,
    /// Several events in one request; `None`: never.
    pub batching: Option<Batching>,
    /// Stopped by configuration.
    pub paused: bool,
    /// When a lease is needed to tell it; `None`: never.
    pub lease: Option<Mode>,
    /// Which addresses its endpoint may have.
    pub guard: Guard,
    /// PEM file with roots for this endpoint beside the others.
    pub ca_file: Option<PathBuf>,
    /// SHA-256 in hex over the endpoint URL and the section as written: tells whether it changed.
    pub fingerprint: String,
}

impl Webhook {
    /// Its databases and patterns as one writes them, for people: `orders, tenant-*, !tenant-test`.
    pub fn databases(&self) -> String {
        if let Some(selection) = &self.selection {
            return selection.to_string();
        }
        let named = self.db.iter().cloned();
        named.chain(self.patterns.as_ref().map(Pattern::to_string)).collect::<Vec<_>>().join(", ")
    }
}

/// Where a webhook starts in databases that exist at its first start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Since {
    /// Only what happens from then on.
    Now,
    /// All that they hold.
    Beginning,
}

/// A filter that CouchDB runs on its side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Filter {
    /// `_selector`, 2.x and later; the JSON object as written.
    Selector(String),
    /// `_doc_ids`.
    DocIds(Vec<String>),
    /// `_view`: `ddoc/name`.
    View(String),
    /// A filter function `ddoc/name` with query parameters (values already as CouchDB takes them).
    Function {
        /// `ddoc/name`.
        name: String,
        /// Query parameters.
        params: Vec<(String, String)>,
    },
}
