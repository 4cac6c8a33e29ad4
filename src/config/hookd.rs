//! Reads section `[hookd]`.
//!
//! Every error here concerns the whole configuration.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use log::LevelFilter;

use crate::config::finding::{Finding, Origin, Raw};
use crate::config::keys::Section;
use crate::config::reader::Reader;
use crate::config::{Hookd, LogFormat, couchdb_url_from, values};
use crate::pure::guard::{Guard, Level, Watched};
use crate::pure::pattern::is_system_database;
use crate::pure::secret::Secret;
use crate::pure::url::Url;

/// `None` when the section has an error, which is then among `findings`.
pub(crate) fn parse(raw: &Raw, findings: &mut Vec<Finding>) -> Option<Hookd> {
    let nothing = BTreeMap::new();
    let mut reader = Reader::new(Section::Hookd, None, raw.sections.get("hookd").unwrap_or(&nothing));
    let url = couchdb_url(&mut reader, raw);
    let (username, password) = credentials(&mut reader, &url);
    judge_log_file(&mut reader, raw);
    let hookd = Hookd {
        couchdb_url: url.base(),
        username,
        password,
        ca_file: reader.path("ca_file"),
        state_db: state_db(&mut reader),
        log_level: match reader.word("log_level", &[]) {
            "error" => LevelFilter::Error,
            "warn" => LevelFilter::Warn,
            "debug" => LevelFilter::Debug,
            _ => LevelFilter::Info,
        },
        log_format: match reader.word("log_format", &[]) {
            "json" => LogFormat::Json,
            _ => LogFormat::Text,
        },
        public_url: public_url(&mut reader),
        register: reader.flag("register"),
        checkpoint_interval: reader.duration("checkpoint_interval"),
        deliveries_max: small(reader.count("deliveries_max")),
        dead_letters_max: reader.count("dead_letters_max"),
        guard: guard(&mut reader, &url),
        feed_rotate: reader.duration("feed_rotate"),
        feed_timeout: reader.duration("feed_timeout"),
        feed_connections: small(reader.count("feed_connections")),
        sweep_interval: reader.duration("sweep_interval"),
        sweep_rate: u32::try_from(reader.count("sweep_rate")).expect("the table bounds this number"),
    };
    let found = reader.into_findings();
    let fine = !found.iter().any(Finding::is_error);
    findings.extend(found);
    fine.then_some(hookd)
}

/// The file for log lines, even of a configuration that cannot be used otherwise: that is what will be logged.
///
/// One that stands in `_config` does not count: whoever may write there must not have us write into any file.
pub(crate) fn log_file(raw: &Raw) -> Option<PathBuf> {
    let value = raw.value("hookd", "log_file").filter(|value| value.origin != Origin::CouchConfig)?;
    Some(PathBuf::from(value.text.expose().trim())).filter(|path| path.is_absolute())
}

/// A log that cannot be had is no reason to deliver nothing.
fn judge_log_file(reader: &mut Reader<'_>, raw: &Raw) {
    let Some(text) = reader.read("log_file", |text| Ok(text.to_owned())) else { return };
    if !Path::new(&text).is_absolute() {
        let message =
            format!("expected an absolute path, got `{}`; log lines go to stderr", values::shown(&text));
        reader.warning("log_file", message);
    } else if log_file(raw).is_none() {
        let message = "what CouchDB's configuration says does not count: expected `--set hookd.log_file=PATH` or \
            COUCH_HOOKD_LOG_FILE; log lines go to stderr";
        reader.warning("log_file", message);
    }
}

fn couchdb_url(reader: &mut Reader<'_>, raw: &Raw) -> Url {
    let found = (!reader.is_set("couchdb_url")).then(|| couchdb_url_from(raw)).flatten();
    if let Some(url) = found.as_deref().and_then(|url| Url::parse(url).ok()) {
        return url;
    }
    let url = reader.with_default("couchdb_url", Url::parse);
    if url.has_query() {
        reader.error("couchdb_url", "expected a URL without a query, got one with `?`");
    }
    if !url.is_https() && !url.is_loopback() {
        let message =
            format!("the login goes to {url} unencrypted; write https:// where the server takes it");
        reader.warning("couchdb_url", message);
    }
    url
}

/// `username` and `password`, else what the URL holds.
fn credentials(reader: &mut Reader<'_>, url: &Url) -> (Option<String>, Option<Secret>) {
    let username = reader.read("username", |text| match text.contains(':') {
        true => Err("expected a user name without `:`, which no login can hold".to_owned()),
        false => Ok(text.to_owned()),
    });
    let password = reader.secret("password");
    match (&username, &password) {
        (Some(_), Some(_)) => return (username, password),
        (Some(_), None) => {
            reader.error("username", "expected `password` or `password_file` beside it, got neither")
        }
        (None, Some(_)) if !reader.is_set("username") => {
            reader.error("password", "expected `username` beside it, got none");
        }
        _ => {}
    }
    match url.userinfo() {
        Ok(Some((name, Some(password)))) if username.is_none() => (Some(name), Some(password)),
        Ok(Some((_, None))) if username.is_none() => {
            reader.error("couchdb_url", "expected `NAME:PASSWORD@` in front of the host, got no password");
            (None, None)
        }
        Ok(_) => (username, password),
        Err(why) => {
            reader.error("couchdb_url", why);
            (None, None)
        }
    }
}

fn state_db(reader: &mut Reader<'_>) -> String {
    reader.with_default("state_db", |text| {
        let name = values::database(text)?;
        match is_system_database(&name) {
            true => Err(format!("expected a database of its own, got CouchDB's `{name}`")),
            false => Ok(name),
        }
    })
}

/// What endpoints may be, unless their webhook says otherwise; never the CouchDB that is watched.
fn guard(reader: &mut Reader<'_>, url: &Url) -> Guard {
    let watched = Some(Watched { host: url.host().to_owned(), port: url.port() });
    Guard {
        level: Level::of_word(reader.word("endpoint_guard", &[])),
        allow: reader.read("endpoint_allow", values::networks).unwrap_or_default(),
        deny: reader.read("endpoint_deny", values::networks).unwrap_or_default(),
        watched,
    }
}

fn public_url(reader: &mut Reader<'_>) -> Option<String> {
    let url = reader.read("public_url", Url::parse)?;
    if matches!(url.userinfo(), Err(_) | Ok(Some(_))) || url.has_query() {
        reader.error("public_url", "expected a URL without user name and query: it stands in every event");
    }
    Some(url.base())
}

/// Counts in the table are at most 256 where they become a `usize`.
pub(crate) fn small(count: u64) -> usize {
    usize::try_from(count).expect("the table bounds this number")
}
