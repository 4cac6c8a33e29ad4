//! Reads one webhook: its line in `[hookd.webhooks]` and its section `[hookd.webhook.NAME]`.
//!
//! Every error here holds back this webhook alone.

use std::collections::BTreeMap;
use std::fmt::Write;

use sha2::{Digest, Sha256};

use crate::config::finding::{Finding, Value};
use crate::config::hookd::small;
use crate::config::keys::{self, Section};
use crate::config::reader::{self, Reader};
use crate::config::{Filter, Hookd, Polling, Since, Webhook, values};
use crate::pure::dispatch::batches::Batching;
use crate::pure::format::Format;
use crate::pure::guard::{self, Guard, Level};
use crate::pure::lease::Mode;
use crate::pure::message::{DELETED, UPDATED, Watch, matches};
use crate::pure::pattern::{Pattern, Selection, fits, is_pattern};
use crate::pure::redact::document::Redaction;
use crate::pure::secret::Secret;
use crate::pure::transitions;
use crate::pure::url::{self, Url};

/// Whether a webhook may be called so: `[a-z0-9][a-z0-9_-]{0,39}`.
pub(crate) fn is_name(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=40).contains(&text.len())
        && text.bytes().all(|b| letter(b) || b == b'_' || b == b'-')
        && text.bytes().next().is_some_and(letter)
}

/// `None` when there is an error, which is then among `findings`.
pub(crate) fn parse(
    name: &str,
    endpoint: &Value,
    section: &BTreeMap<String, Value>,
    hookd: Option<&Hookd>,
    findings: &mut Vec<Finding>,
) -> Option<Webhook> {
    let state_db = hookd.map(|hookd| hookd.state_db.as_str());
    let mut reader = Reader::new(Section::Webhook, Some(name), section);
    let mut found = check_endpoint(name, endpoint);
    let watch = match reader.word("watch", &keys::WATCH_LATER) {
        "daemon" => Watch::Daemon,
        "replications" => Watch::Replications,
        "databases" => Watch::Databases,
        _ => Watch::Changes,
    };
    let (db, patterns) = match watch {
        Watch::Changes => databases(&mut reader, name, state_db),
        Watch::Daemon => (vec![state_db.unwrap_or_default().to_owned()], None),
        Watch::Replications => (replicator_databases(&mut reader), None),
        Watch::Databases => (vec![state_db.unwrap_or_default().to_owned()], None),
    };
    let selection = (watch == Watch::Databases).then(|| selection(&mut reader, state_db));
    let format = Format::parse(reader.word("format", &[])).expect("the table's words are those of formats");
    match watch {
        Watch::Changes => {}
        Watch::Daemon => no_changes(&mut reader, "daemon", &["db"], format),
        Watch::Replications => no_changes(&mut reader, "replications", &[], format),
        Watch::Databases => no_changes(&mut reader, "databases", &[], format),
    }
    let webhook = Webhook {
        name: name.to_owned(),
        endpoint: Secret::new(endpoint.text.expose().trim()),
        watch,
        db,
        patterns,
        selection,
        since: since(&mut reader),
        events: match watch {
            Watch::Changes => reader.with_default("events", values::events),
            Watch::Daemon => {
                reader.read_set("events", values::daemon_events).unwrap_or_else(|| vec!["*".to_owned()])
            }
            Watch::Databases => {
                reader.read_set("events", values::database_events).unwrap_or_else(|| vec!["*".to_owned()])
            }
            Watch::Replications => {
                reader.read_set("events", values::replication_events).unwrap_or_else(|| {
                    transitions::default_types().iter().map(|name| (*name).to_owned()).collect()
                })
            }
        },
        polling: polling(&mut reader, watch),
        filter: filter(&mut reader),
        include_docs: reader.flag("include_docs"),
        conflicts: reader.flag("conflicts"),
        conflict_docs: reader.flag("conflict_docs"),
        design_docs: reader.flag("design_docs"),
        secrets: secrets(&mut reader),
        headers: headers(&mut reader),
        timeout: reader.duration("timeout"),
        connect_timeout: reader.duration("connect_timeout"),
        concurrency: small(reader.count("concurrency")),
        retry_schedule: reader.durations("retry_schedule"),
        retry_after_max: reader.duration("retry_after_max"),
        give_up_after: reader.duration("give_up_after"),
        dead_letter_after: u32::try_from(reader.count("dead_letter_after"))
            .expect("the table bounds this number"),
        dead_letter_on: reader.with_default("dead_letter_on", values::statuses),
        payload_bytes_max: usize::try_from(reader.size("payload_bytes_max"))
            .expect("the table bounds this size"),
        format,
        rate_limit: reader.with_default("rate_limit", values::rate_limit),
        batching: batching(&mut reader, format),
        paused: reader.flag("paused"),
        lease: match reader.word("lease", &[]) {
            "off" => None,
            "on" => Some(Mode::On),
            "shared" if watch == Watch::Databases => Some(one_teller(&mut reader)),
            "shared" => Some(Mode::Shared),
            _ => Some(Mode::Auto),
        },
        guard: guard(&mut reader, hookd),
        ca_file: reader.path("ca_file"),
        fingerprint: fingerprint(endpoint, section),
    };
    check_shared(&mut reader, &webhook);
    check_conflicts(&mut reader, &webhook);
    found.extend(reader.into_findings());
    let fine = !found.iter().any(Finding::is_error);
    findings.extend(found);
    fine.then_some(webhook)
}

fn check_endpoint(name: &str, endpoint: &Value) -> Vec<Finding> {
    let place = reader::place(Some(endpoint), "hookd.webhooks", name);
    let text = endpoint.text.expose().trim();
    match Url::parse(text) {
        Err(why) => vec![Finding::error(Some(name), place, why)],
        Ok(url) if !url.is_https() && !url.is_loopback() => {
            let message = format!(
                "payloads go to {} unencrypted; write https:// where the endpoint takes it",
                url::shown(text)
            );
            vec![Finding::warning(Some(name), place, message)]
        }
        Ok(_) => Vec::new(),
    }
}

/// `[hookd]`'s, key by key replaced by the webhook's own.
fn guard(reader: &mut Reader<'_>, hookd: Option<&Hookd>) -> Guard {
    let common = hookd.map(|hookd| hookd.guard.clone()).unwrap_or_default();
    let level = reader.read("endpoint_guard", |text| values::word(text, guard::LEVELS, &[]));
    Guard {
        level: level.map_or(common.level, Level::of_word),
        allow: reader.read("endpoint_allow", values::networks).unwrap_or(common.allow),
        deny: reader.read("endpoint_deny", values::networks).unwrap_or(common.deny),
        watched: common.watched,
    }
}

/// Those named singly, and what finds others.
type Databases = (Vec<String>, Option<Pattern>);

fn databases(reader: &mut Reader<'_>, name: &str, state_db: Option<&str>) -> Databases {
    let parse = |text: &str| databases_of(text, state_db);
    if reader.is_set("db") {
        return reader.read("db", parse).unwrap_or_default();
    }
    parse(name).unwrap_or_else(|why| {
        reader.error("db", format!("without it the webhook's own name counts: {why}"));
        Databases::default()
    })
}

/// Which databases a webhook on databases tells of; all of them where nothing is said.
fn selection(reader: &mut Reader<'_>, state_db: Option<&str>) -> Selection {
    let parse = |text: &str| databases_of(text, state_db);
    let given = reader.read_set("db", parse);
    let (named, pattern) = given.unwrap_or_else(|| parse("*").expect("it is a pattern"));
    Selection { named, pattern }
}

/// `orders, tenant-*, !tenant-test`
fn databases_of(text: &str, state_db: Option<&str>) -> Result<Databases, String> {
    let (mut named, mut wanted, mut unwanted) = (Vec::new(), Vec::new(), Vec::new());
    for part in values::list(text) {
        let bare = part.strip_prefix('!').map(str::trim);
        let (list, text) = match bare {
            Some(bare) => (&mut unwanted, bare),
            None if is_pattern(part) => (&mut wanted, part),
            None => (&mut named, part),
        };
        let parsed = if is_pattern(text) { values::database_pattern(text) } else { values::database(text) }?;
        if bare.is_none() && Some(part) == state_db {
            return Err(format!("`{part}` is [hookd] state_db, which cannot be watched"));
        }
        if !list.contains(&parsed) {
            list.push(parsed);
        }
    }
    match (unwanted.first(), wanted.is_empty()) {
        (Some(unwanted), true) => Err(format!(
            "`!{unwanted}` leaves out what a pattern such as `tenant-*` would find: expected one beside it, got none"
        )),
        _ if named.is_empty() && wanted.is_empty() => {
            Err("expected databases, separated by commas, got none".to_owned())
        }
        (_, true) => Ok((named, None)),
        (_, false) => match named.iter().find(|name| unwanted.iter().any(|pattern| fits(pattern, name))) {
            Some(both) => Err(format!("`{both}` is named, and left out by a `!`; delete one of the two")),
            None => Ok((named.clone(), Some(Pattern::new(wanted, unwanted, named)))),
        },
    }
}

/// Keys that say which changes of documents are told, and how.
pub(crate) const OF_CHANGES: [&str; 9] = [
    "selector",
    "filter",
    "filter_params",
    "doc_ids",
    "view",
    "include_docs",
    "conflicts",
    "conflict_docs",
    "design_docs",
];

/// Databases are told of from one walk over all of them, whoever tells.
fn one_teller(reader: &mut Reader<'_>) -> Mode {
    let message = "`shared` divides changes of documents; with `watch = databases` there is nothing to divide, so one daemon \
        tells, as with `on`: write that";
    reader.warning("lease", message);
    Mode::On
}

/// What is divided is found by pattern: a database that is named has a feed of its own, which nobody hands over.
fn check_shared(reader: &mut Reader<'_>, webhook: &Webhook) {
    if webhook.lease != Some(Mode::Shared) {
        return;
    }
    let found = match (&webhook.patterns, webhook.db.first()) {
        (Some(_), None) => return,
        (None, _) => {
            "`shared` divides databases that are found by pattern, and this webhook has none; choose `auto`"
                .to_owned()
        }
        (Some(_), Some(named)) => format!(
            "`shared` divides databases that are found by pattern, and `{named}` is named; give it a webhook of its own"
        ),
    };
    reader.error("lease", found);
}

/// What is said of conflicts needs `conflicts = true`, and bodies a format that holds them.
fn check_conflicts(reader: &mut Reader<'_>, webhook: &Webhook) {
    if webhook.watch != Watch::Changes {
        return;
    }
    let told_without = |pattern: &String| [UPDATED, DELETED].iter().any(|one| matches(pattern, one));
    if let Some(never) = webhook.events.iter().find(|pattern| !webhook.conflicts && !told_without(pattern)) {
        let message = format!("`{never}` is told only with `conflicts = true`; write that line, too");
        reader.error("events", message);
    }
    if !webhook.conflict_docs {
        return;
    }
    if !webhook.conflicts {
        let message = "has a meaning only with `conflicts = true`; write that line, too, or delete this one";
        reader.error("conflict_docs", message);
    }
    if matches!(webhook.format, Format::Raw | Format::Slack) {
        let message = "a request with `format = raw` or `format = slack` holds no leaves; choose another format, or \
            delete this line";
        reader.error("conflict_docs", message);
    }
}

/// Keys that say when the state of a replication is told.
pub(crate) const OF_REPLICATIONS: [&str; 4] =
    ["poll_interval", "confirm_polls", "stalled_after", "retry_failed"];

/// What is told is no change of a document, so what says which ones, or `also`, has no meaning.
fn no_changes(reader: &mut Reader<'_>, watch: &str, also: &[&str], format: Format) {
    for key in OF_CHANGES.iter().chain(also) {
        if reader.is_set(key) {
            reader.error(key, format!("has no meaning with `watch = {watch}`; delete the line"));
        }
    }
    if format == Format::Raw {
        let message = format!(
            "expected another format, got `raw`: with `watch = {watch}` there is no change line to send"
        );
        reader.error("format", message);
    }
}

fn replicator_databases(reader: &mut Reader<'_>) -> Vec<String> {
    let parse = |text: &str| {
        let mut names = Vec::new();
        for part in values::list(text) {
            let database = values::database(part)?;
            if Redaction::of_db(&database) != Redaction::Replicator {
                return Err(format!(
                    "expected `_replicator` or databases whose names end in `/_replicator`, got `{}`",
                    values::shown(part)
                ));
            }
            if !names.contains(&database) {
                names.push(database);
            }
        }
        if names.is_empty() {
            Err("expected databases, separated by commas, got none".to_owned())
        } else {
            Ok(names)
        }
    };
    reader.read_set("db", parse).unwrap_or_else(|| vec!["_replicator".to_owned()])
}

fn polling(reader: &mut Reader<'_>, watch: Watch) -> Polling {
    if watch != Watch::Replications {
        for key in OF_REPLICATIONS {
            if reader.is_changed(key) {
                reader.warning(key, "has a meaning only with `watch = replications`; delete the line");
            }
        }
    }
    Polling {
        interval: reader.duration("poll_interval"),
        transitions: transitions::Settings {
            confirm_polls: u32::try_from(reader.count("confirm_polls"))
                .expect("the table bounds this number"),
            stalled_after: reader.duration("stalled_after"),
            retry_failed: reader.with_default("retry_failed", values::retries),
        },
    }
}

fn since(reader: &mut Reader<'_>) -> Since {
    reader.with_default("since", |text| match text {
        "now" => Ok(Since::Now),
        "0" => Ok(Since::Beginning),
        _ => Err(format!(
            "expected `now` or `0`, got `{}`; a sequence is for `couch-hookd seek`",
            values::shown(text)
        )),
    })
}

fn filter(reader: &mut Reader<'_>) -> Option<Filter> {
    let set: Vec<&str> =
        ["selector", "filter", "doc_ids", "view"].into_iter().filter(|key| reader.is_set(key)).collect();
    if let [first, .., last] = set[..] {
        reader.error(
            last,
            format!("expected one kind of filter, got `{first}` and `{last}`; delete one of them"),
        );
    }
    let params = reader.read("filter_params", values::params);
    if reader.is_set("filter_params") && !reader.is_set("filter") {
        reader.error("filter_params", "expected `filter` beside it, got none");
    }
    let selector = reader.read("selector", values::json_object).map(Filter::Selector);
    let doc_ids = reader.read("doc_ids", values::json_strings).map(Filter::DocIds);
    let view = reader.read("view", values::design_function).map(Filter::View);
    let function = reader
        .read("filter", values::design_function)
        .map(|name| Filter::Function { name, params: params.unwrap_or_default() });
    selector.or(doc_ids).or(view).or(function)
}

/// `None` where a request holds one event.
fn batching(reader: &mut Reader<'_>, format: Format) -> Option<Batching> {
    let max = small(reader.count("batch_max"));
    let wait = reader.duration("batch_wait");
    let bytes_max = usize::try_from(reader.size("batch_bytes_max")).expect("the table bounds this size");
    if max < 2 {
        return None;
    }
    if !format.takes_batches() {
        let word = Format::WORDS.iter().find(|(_, other)| *other == format).map_or("", |(word, _)| word);
        let message = format!(
            "a request with `format = {word}` holds one event: expected `batch_max = 1`, or `format = standard` or \
             `format = cloudevents`, got `batch_max = {max}`"
        );
        reader.error("batch_max", message);
    }
    Some(Batching { max, wait, bytes_max })
}

fn secrets(reader: &mut Reader<'_>) -> Vec<Secret> {
    let parse = |text: &str| {
        let parts: Vec<&str> =
            text.split([',', ' ', '\t', '\n', '\r']).filter(|part| !part.is_empty()).collect();
        for (index, part) in parts.iter().enumerate() {
            values::signing_secret(part).map_err(|why| match parts.len() {
                1 => why,
                _ => format!("secret {} of {}: {why}", index + 1, parts.len()),
            })?;
        }
        Ok(parts.into_iter().map(Secret::new).collect::<Vec<_>>())
    };
    if !reader.is_set("secret") {
        let message = "there is none: receivers cannot tell our requests from forged ones; \
            `couch-hookd secret` prints a new one";
        reader.warning("secret", message);
    }
    reader.read("secret", parse).unwrap_or_default()
}

fn headers(reader: &mut Reader<'_>) -> Vec<(String, Secret)> {
    let mut headers: Vec<(String, Secret)> = Vec::new();
    for (name, value) in reader.starting_with("header.") {
        let key = format!("header.{name}");
        let text = value.text.expose().trim();
        match values::header_name(name).and_then(|name| values::header_value(text).map(|()| name)) {
            Ok(name) if headers.iter().any(|(other, _)| *other == name) => {
                reader.error(&key, format!("the header `{name}` is set twice"));
            }
            Ok(name) => headers.push((name, Secret::new(text))),
            Err(why) => reader.error(&key, why),
        }
    }
    headers
}

/// The same for the same URL and the same set of keys and values, in whatever order they stand.
fn fingerprint(endpoint: &Value, section: &BTreeMap<String, Value>) -> String {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        // The length in front keeps `a` + `bc` apart from `ab` + `c`.
        hash.update((text.len() as u64).to_be_bytes());
        hash.update(text.as_bytes());
    };
    add(endpoint.text.expose().trim());
    for (key, value) in section {
        add(key);
        add(value.text.expose().trim());
    }
    hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
