//! `watch`: follows one database and shows, or sends, what a webhook would tell; to try it.
//!
//! Guarantees that nothing is written to CouchDB: no mark, no checkpoint, no database; what a daemon keeps there is
//! kept in memory. Decides nothing itself: `pure::dispatch` does, driven by `shell`. Arguments become sections of a
//! configuration, so that they are judged by the same rules and refused with the same words.

mod reader;
mod shell;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use log::LevelFilter;
use percent_encoding::percent_decode_str;

use crate::cli::out::{Out, complain};
use crate::config::finding::{Finding, Origin};
use crate::config::source::{self, Overrides};
use crate::config::{self, Hookd, Webhook};
use crate::error::{Error, Kind, Result};
use crate::log::{Sink, install};
use crate::pure::seq::Seq;
use crate::pure::signature;
use crate::pure::url::Url;
use crate::sys;

/// The webhook's name in payloads and headers.
const NAME: &str = "watch";
/// Where payloads would go that are printed; never connected to.
const NOWHERE: &str = "http://localhost/";
/// What of the environment counts here: the login, when the URL has none.
const VARIABLES: [&str; 3] = ["COUCHDB_USER", "COUCHDB_PASSWORD", "CREDENTIALS_DIRECTORY"];

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd watch http://admin:secret@127.0.0.1:5984/orders\n  \
    couch-hookd watch http://127.0.0.1:5984/orders --since 0 --events document.deleted\n  \
    couch-hookd watch http://127.0.0.1:5984/orders --to http://127.0.0.1:8787/\n\n\
    The login may also come from COUCHDB_USER and COUCHDB_PASSWORD. Ctrl-C ends\n\
    it. Nothing is written to CouchDB and nothing is remembered: the next start\n\
    begins at --since again.")]
pub(crate) struct Arguments {
    /// http://HOST:PORT/DATABASE, with or without NAME:PASSWORD@; in the database's name / is %2F
    #[arg(value_name = "DATABASE_URL")]
    database_url: String,
    /// Endpoint URL to post to; - prints payloads, one JSON object a line
    #[arg(long, value_name = "URL|-", default_value = "-")]
    to: String,
    /// now, 0 for everything the database holds, or a sequence
    #[arg(long, value_name = "now|0|SEQ", default_value = "now")]
    since: String,
    /// Only documents that match this Mango selector (CouchDB 2.0 and later)
    #[arg(long, value_name = "JSON")]
    selector: Option<String>,
    /// Only what this filter function passes
    #[arg(long, value_name = "DDOC/NAME")]
    filter: Option<String>,
    /// Query parameters of the filter function
    #[arg(long, value_name = "JSON", requires = "filter")]
    filter_params: Option<String>,
    /// Only these documents
    #[arg(long, value_name = "JSON")]
    doc_ids: Option<String>,
    /// Only documents for which this view emits something
    #[arg(long, value_name = "DDOC/NAME")]
    view: Option<String>,
    /// Only these event types
    #[arg(long, value_name = "TYPES")]
    events: Option<String>,
    /// Signing secret, whsec_…; may be given several times [default: a new one, printed]
    #[arg(long, value_name = "WHSEC")]
    secret: Vec<String>,
    /// File that holds one, out of sight of other users of this machine
    #[arg(long, value_name = "FILE", conflicts_with = "secret")]
    secret_file: Option<PathBuf>,
    /// Any other key that a webhook's section may have: timeout=5s, header.x-tenant=blue
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// What to do, judged.
struct Plan {
    hookd: Hookd,
    webhook: Webhook,
    /// `None`: from now on.
    since: Option<Seq>,
    /// Whether payloads are printed instead of sent.
    prints: bool,
}

/// Follows until told to end.
pub(crate) fn run(mut arguments: Arguments, out: &mut Out) -> Result<u8> {
    install(Sink::Stderr, LevelFilter::Info)?;
    let prints = arguments.to == "-";
    if !prints && arguments.secret.is_empty() && arguments.secret_file.is_none() {
        let secret = signature::new_secret(sys::random_bytes());
        out.line(&format!("signing with {secret}"))?;
        arguments.secret.push(secret);
    }
    let environment = std::env::vars().filter(|(name, _)| VARIABLES.contains(&name.as_str())).collect();
    match plan(&arguments, environment) {
        Ok(plan) => shell::follow(plan, out),
        Err(faults) => {
            faults.iter().for_each(|fault| complain(fault));
            Ok(2)
        }
    }
}

/// What the arguments mean; every fault in them, one a line.
fn plan(arguments: &Arguments, environment: BTreeMap<String, String>) -> Result<Plan, Vec<String>> {
    let (couchdb_url, db) = split(&arguments.database_url).map_err(|why| vec![why.to_string()])?;
    let prints = arguments.to == "-";
    let mut set = vec![
        format!("hookd.couchdb_url={couchdb_url}"),
        format!("hookd.webhooks.{NAME}={}", if prints { NOWHERE } else { &arguments.to }),
    ];
    let mut put = |key: &str, value: &str| set.push(format!("hookd.webhook.{NAME}.{key}={value}"));
    put("db", &db);
    let given = [
        ("selector", &arguments.selector),
        ("filter", &arguments.filter),
        ("filter_params", &arguments.filter_params),
        ("doc_ids", &arguments.doc_ids),
        ("view", &arguments.view),
        ("events", &arguments.events),
    ];
    for (key, value) in given {
        if let Some(value) = value {
            put(key, value);
        }
    }
    if !arguments.secret.is_empty() {
        put("secret", &arguments.secret.join(" "));
    }
    if let Some(path) = &arguments.secret_file {
        let whole = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        put("secret_file", &whole.to_string_lossy());
    }
    arguments.set.iter().for_each(|set| match set.split_once('=') {
        Some((key, value)) => put(key, value),
        None => put(set, ""),
    });
    let overrides = Overrides { set, environment };
    let raw = source::from_sections(&BTreeMap::new(), &Origin::Argument, &overrides);
    let (parsed, findings) = config::parse(&raw);
    let webhook = parsed.config.and_then(|mut config| config.webhooks.pop().map(|one| (config.hookd, one)));
    let Some((hookd, webhook)) = webhook else {
        return Err(findings.iter().filter(|finding| finding.is_error()).map(shown).collect());
    };
    Ok(Plan { hookd, webhook, since: since(&arguments.since), prints })
}

/// Base URL, login included, and the database's name.
fn split(database_url: &str) -> Result<(String, String)> {
    let fault = |found: String| Error::new(Kind::Config, found).context("DATABASE_URL");
    let url = Url::parse(database_url).map_err(fault)?;
    if url.has_query() {
        return Err(fault("expected no query, got one with `?`".to_owned()));
    }
    let database_url = database_url.trim_end_matches('/');
    let expected = "expected `http://HOST:PORT/DATABASE`, got no database";
    // The two slashes behind the scheme are none of a path.
    let path_start = database_url.find("://").map_or(0, |at| at + 3);
    let Some(at) = database_url[path_start..].rfind('/') else { return Err(fault(expected.to_owned())) };
    let (base, db) = database_url.split_at(path_start + at);
    let db = percent_decode_str(&db[1..]).decode_utf8();
    let db = db.map_err(|_| fault("expected UTF-8 in the database's name, got other bytes".to_owned()))?;
    Ok((base.to_owned(), db.into_owned()))
}

/// `None` for `now`.
fn since(text: &str) -> Option<Seq> {
    match text {
        "now" => None,
        _ if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) => Seq::from_json(text),
        _ => Seq::from_json(&serde_json::Value::from(text).to_string()),
    }
}

/// Keys with an option of their own; others come from `--set`.
const HAS_OPTION: [&str; 8] =
    ["selector", "filter", "filter_params", "doc_ids", "view", "events", "secret", "secret_file"];

/// A finding with the argument for its place, as it was given here.
fn shown(finding: &Finding) -> String {
    let place = finding.place.as_str();
    let key = place.strip_prefix(&format!("--set: [hookd.webhook.{NAME}] "));
    let place = match key {
        Some("db") => "DATABASE_URL".to_owned(),
        Some(key) if HAS_OPTION.contains(&key) => format!("--{}", key.replace('_', "-")),
        Some(key) => format!("--set {key}"),
        None if place.ends_with("couchdb_url") => "DATABASE_URL".to_owned(),
        None if place.starts_with("--set: [hookd.webhooks]") => "--to".to_owned(),
        None => place.to_owned(),
    };
    format!("{place}: {}", finding.message)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[track_caller]
    fn check(arguments: &[&str], expected: &str) {
        let line = Line::try_parse_from(["watch"].iter().chain(arguments)).unwrap();
        let login = [("COUCHDB_USER", "u"), ("COUCHDB_PASSWORD", "p")];
        let login = login.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let found = match plan(&line.arguments, login.into()) {
            Err(faults) => faults.join(" | "),
            Ok(plan) => format!(
                "{} {:?} {:?} {:?} {:?}",
                plan.hookd.couchdb_url, plan.hookd.username, plan.webhook.db, plan.since, plan.webhook.filter
            ),
        };
        assert_eq!(found, expected, "{arguments:?}");
    }

    #[test]
    fn arguments_become_a_plan() {
        check(&["http://h:5984/db"], r#"http://h:5984 Some("u") ["db"] None None"#);
        check(
            &["https://me:x@h/couch/a%2Fb/", "--since", "0"],
            r#"https://h/couch Some("me") ["a/b"] Some(0) None"#,
        );
        check(
            &["http://h/db", "--since", "12-g1", "--selector", r#"{"a":1}"#],
            r#"http://h Some("u") ["db"] Some("12-g1") Some(Selector("{\"a\":1}"))"#,
        );
    }

    #[test]
    fn every_fault_is_named_after_its_argument_and_shows_no_secret() {
        check(
            &["h/db"],
            "DATABASE_URL: expected `http://HOST` or `https://HOST` with or without a path, got a text without `://`",
        );
        check(&["http://h"], "DATABASE_URL: expected `http://HOST:PORT/DATABASE`, got no database");
        let line = Line::try_parse_from([
            "watch",
            "http://h/DB",
            "--to",
            "ftp://u:canary@h",
            "--selector",
            "{",
            "--secret",
            "whsec_canary",
            "--set",
            "timout=5s",
        ]);
        let Err(faults) = plan(&line.unwrap().arguments, BTreeMap::new()) else { panic!("expected faults") };
        let places: Vec<&str> = faults.iter().filter_map(|fault| fault.split(':').next()).collect();
        assert_eq!(places, ["--to", "--set timout", "DATABASE_URL", "--selector", "--secret"], "{faults:?}");
        assert!(!faults.join("").contains("canary"), "{faults:?}");
    }
}
