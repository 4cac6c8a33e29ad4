//! The one table of keys: parser, `check`, sample files and the README's reference come from it.
//!
//! A key of a later version stands in [`LATER`] until then, so that it is answered with more than "unknown".

use std::fmt;
use std::time::Duration;

use crate::pure::guard;
use crate::pure::nearest::nearest_of;

/// The section a key belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// `[hookd]`
    Hookd,
    /// `[hookd.webhook.NAME]`
    Webhook,
}

/// What a key's value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// A text that is never shown.
    Secret,
    /// `http://` or `https://`.
    Url,
    /// A path; relative ones count from `$CREDENTIALS_DIRECTORY`, then from the ini file's directory.
    Path,
    /// An absolute path of a file that need not exist.
    NewFile,
    /// A database's name.
    Database,
    /// Database names and patterns of them, separated by commas; `!` in front leaves out.
    Databases,
    /// One of these words.
    Word(&'static [&'static str]),
    /// `true` or `false`, also `on` or `off`.
    Flag,
    /// `500ms`, `5s`, `2m`, `1h`, within these bounds.
    Duration(Duration, Duration),
    /// Several of them, separated by commas.
    Durations(Duration, Duration),
    /// A whole number within these bounds.
    Count(u64, u64),
    /// `512B`, `64KiB`, `1MiB`, within these bounds in bytes.
    Size(u64, u64),
    /// `10/s`, `100/m`, `1000/h`, or `off`.
    Rate,
    /// `3, 10m`, or `off`.
    Retries,
    /// HTTP statuses, separated by commas, or `off`.
    Statuses,
    /// Event types, separated by commas; `*` stands for any text.
    Events,
    /// A JSON object on one line.
    JsonObject,
    /// A JSON array of strings on one line.
    JsonStrings,
    /// `DESIGN_DOCUMENT/NAME`.
    DesignFunction,
    /// `whsec_…`, separated by commas.
    SigningSecrets,
    /// `10.0.0.0/8`, `fd00::/8` or single addresses, separated by commas.
    Networks,
}

/// One key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Where it stands.
    pub section: Section,
    /// Its name; `header.*` stands for any header.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: Kind,
    /// What holds without it, as one would write it.
    pub default: Option<&'static str>,
    /// An example, for keys without a default.
    pub example: &'static str,
    /// One line for people.
    pub text: &'static str,
}

/// Words of `watch` that a later version takes.
pub const WATCH_LATER: [&str; 0] = [];

/// Keys that a later version takes.
pub const LATER: [(Section, &str); 3] =
    [(Section::Hookd, "status_listen"), (Section::Webhook, "batch_max"), (Section::Webhook, "batch_wait")];

/// How a key comes to stand in a section of ours that it does not belong to.
///
/// Source: `couch_config.erl` before 3.3 for headers; `couch_config_writer.erl` up to 1.7.1, whose pattern for "the
/// next section begins" knows no dots, so that a key set over HTTP is written, or changed, further down in the file.
pub const STRAY: &str = "CouchDB before 3.3 ignores a section header with a comment behind it, and 1.x writes a key \
    that is set over HTTP below the wrong section: see the file and edit it there";

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}
const fn s(n: u64) -> Duration {
    Duration::from_secs(n)
}
const fn h(n: u64) -> Duration {
    Duration::from_secs(n * 3600)
}
const fn hookd(name: &'static str, kind: Kind, default: &'static str, text: &'static str) -> Key {
    Key { section: Section::Hookd, name, kind, default: Some(default), example: default, text }
}
const fn webhook(name: &'static str, kind: Kind, default: &'static str, text: &'static str) -> Key {
    Key { section: Section::Webhook, ..hookd(name, kind, default, text) }
}
/// The same key without a default; what stood there is only an example.
const fn optional(key: Key) -> Key {
    Key { default: None, ..key }
}

/// The table, in the order in which people should read it.
pub const KEYS: &[Key] = &[
    hookd(
        "couchdb_url",
        Kind::Url,
        "http://127.0.0.1:5984",
        "Where CouchDB is. Under `[os_daemons]` leave it out: found from `[chttpd]` or `[httpd]`.",
    ),
    optional(hookd("username", Kind::Text, "hookd", "Login at CouchDB.")),
    optional(hookd("password", Kind::Secret, "/etc/couch-hookd/password", "Its password.")),
    optional(hookd(
        "ca_file",
        Kind::Path,
        "/etc/couch-hookd/ca.pem",
        "PEM file with roots to trust beside the system's and Mozilla's.",
    )),
    hookd(
        "state_db",
        Kind::Database,
        "couch_hookd",
        "Database for dead letters, requests and one record per webhook. Made at the start, admins only.",
    ),
    hookd("log_level", Kind::Word(&["error", "warn", "info", "debug"]), "info", "What is logged."),
    hookd(
        "log_format",
        Kind::Word(&["text", "json"]),
        "text",
        "How log lines on stderr and in `log_file` look.",
    ),
    optional(hookd(
        "log_file",
        Kind::NewFile,
        "/var/log/couch-hookd/couch-hookd.log",
        "File that takes log lines in place of stderr, opened anew at SIGHUP. Under `[os_daemons]` CouchDB's log takes them.",
    )),
    optional(hookd(
        "public_url",
        Kind::Url,
        "https://couch.example",
        "Under what URL people know this CouchDB; begins the `source` of every event.",
    )),
    hookd(
        "register",
        Kind::Flag,
        "off",
        "`on`: CouchDB restarts us when our sections change. `off`: changes are applied live.",
    ),
    hookd(
        "checkpoint_interval",
        Kind::Duration(ms(200), s(600)),
        "5s",
        "The longest time between two checkpoints of a subscription that moves.",
    ),
    hookd("deliveries_max", Kind::Count(1, 256), "64", "Deliveries in flight over all webhooks."),
    hookd(
        "dead_letters_max",
        Kind::Count(1, 1_000_000),
        "10000",
        "Dead letters of one webhook before it is paused.",
    ),
    hookd(
        "endpoint_guard",
        Kind::Word(guard::LEVELS),
        "metadata",
        "Endpoint addresses to refuse: `metadata`: link-local ones and clouds' metadata services; `public`: all but public ones.",
    ),
    optional(hookd(
        "endpoint_allow",
        Kind::Networks,
        "10.1.0.0/16, fd12:3456::/32",
        "Networks that endpoints may lie in whatever `endpoint_guard` says; the watched CouchDB is refused but here.",
    )),
    optional(hookd(
        "endpoint_deny",
        Kind::Networks,
        "10.0.0.0/8, fd00::/8",
        "Networks that no endpoint may lie in, whatever `endpoint_allow` says.",
    )),
    hookd(
        "feed_rotate",
        Kind::Duration(s(1), h(1)),
        "60s",
        "How long a filtered request stays open before it is read anew.",
    ),
    hookd(
        "feed_timeout",
        Kind::Duration(s(1), h(1)),
        "60s",
        "How long CouchDB keeps a request open when nothing happens.",
    ),
    hookd(
        "feed_connections",
        Kind::Count(1, 256),
        "16",
        "Connections to CouchDB for databases found by pattern, over all webhooks; each that is read at a time takes two.",
    ),
    hookd(
        "sweep_interval",
        Kind::Duration(ms(100), h(24)),
        "60s",
        "How often all databases are looked at when patterns are watched; while CouchDB tells which changed (`_db_updates`), \
         every 15 minutes.",
    ),
    hookd(
        "sweep_rate",
        Kind::Count(1, 1000),
        "40",
        "Databases looked at in a second, at most: each costs CouchDB 2 ms. 10,000 of them take 250 s at `40`, whatever \
         `sweep_interval` says.",
    ),
    webhook(
        "watch",
        Kind::Word(&["changes", "databases", "replications", "daemon"]),
        "changes",
        "What is told: changes of documents, that databases came, changed or went, states of replications, or events about \
         couch-hookd itself.",
    ),
    optional(webhook(
        "db",
        Kind::Databases,
        "orders, tenant-*, !tenant-test",
        "Databases, by name or by pattern: `*` is any text, `?` one character, `!` leaves out. Patterns need a server \
         admin, find new databases too, and never those of CouchDB's own. Without it: the webhook's own name; with \
         `watch = databases` `*`; with `watch = replications` `_replicator`, where there are no patterns.",
    )),
    webhook(
        "since",
        Kind::Word(&["now", "0"]),
        "now",
        "For databases that exist when the webhook first starts: `now`, or `0` for all they hold.",
    ),
    webhook(
        "events",
        Kind::Events,
        "document.*",
        "Event types, see `docs/events.md`; `document.conflicted` and `document.resolved` need `conflicts`. Default with `watch = replications`: all but `replication.initializing`, \
         `replication.pending` and `replication.running`; with `watch = databases` and `watch = daemon`: `*`.",
    ),
    webhook(
        "poll_interval",
        Kind::Duration(ms(100), h(1)),
        "5s",
        "With `watch = replications`: how often CouchDB's scheduler is asked; a changed replication document is seen sooner.",
    ),
    webhook(
        "confirm_polls",
        Kind::Count(1, 100),
        "2",
        "With `watch = replications`: a state counts when it was seen so often in a row; `completed` and `failed` at once.",
    ),
    webhook(
        "stalled_after",
        Kind::Duration(s(1), h(24 * 7)),
        "10m",
        "With `watch = replications`: a replication that runs, has changes pending and makes no progress for so long is \
         told as `replication.stalled`.",
    ),
    webhook(
        "retry_failed",
        Kind::Retries,
        "off",
        "With `watch = replications`: `3, 10m` submits a `failed` replication again, 10 minutes after each failure, at most \
         3 times until it goes well.",
    ),
    optional(webhook(
        "selector",
        Kind::JsonObject,
        r#"{"type": "order"}"#,
        "Mango selector, CouchDB 2.0 and later; JSON on one line. In a file write `\\u003b` for a `;` after a blank.",
    )),
    optional(webhook("filter", Kind::DesignFunction, "ddoc/name", "Filter function in a design document.")),
    optional(webhook(
        "filter_params",
        Kind::JsonObject,
        r#"{"type": "order"}"#,
        "Query parameters of `filter`.",
    )),
    optional(webhook("doc_ids", Kind::JsonStrings, r#"["a", "b"]"#, "Only these documents.")),
    optional(webhook(
        "view",
        Kind::DesignFunction,
        "ddoc/name",
        "Only documents that this view's map emits.",
    )),
    webhook("include_docs", Kind::Flag, "true", "Whether the document goes into the payload."),
    webhook(
        "conflicts",
        Kind::Flag,
        "false",
        "Whether conflicts are told (`document.conflicted`, `document.resolved`) and listed.",
    ),
    webhook(
        "conflict_docs",
        Kind::Flag,
        "false",
        "Whether the bodies of conflicting leaves go into the payload, too; needs `conflicts = true`.",
    ),
    webhook("design_docs", Kind::Flag, "false", "Whether design documents are told."),
    optional(webhook(
        "secret",
        Kind::SigningSecrets,
        "/etc/couch-hookd/orders.secret",
        "Signing secret `whsec_...`; several, newest first, are separated by commas, and every one signs.",
    )),
    optional(webhook("header.*", Kind::Secret, "blue", "An extra request header: `header.x-tenant = blue`.")),
    webhook(
        "format",
        Kind::Word(&["standard", "cloudevents", "raw", "slack", "couchdb_doc"]),
        "standard",
        "Shape of the payload: ours, CloudEvents, the change line, a chat's message, a document for a CouchDB.",
    ),
    webhook("timeout", Kind::Duration(ms(100), s(600)), "15s", "For one attempt, all of it."),
    webhook("connect_timeout", Kind::Duration(ms(100), s(60)), "5s", "For connecting, TLS included."),
    webhook(
        "concurrency",
        Kind::Count(1, 256),
        "8",
        "Deliveries in flight; `1` is strict order over all documents.",
    ),
    webhook(
        "retry_schedule",
        Kind::Durations(ms(100), h(24)),
        "1s, 5s, 15s, 30s, 1m, 2m, 5m",
        "When to try again; the last step repeats.",
    ),
    webhook(
        "retry_after_max",
        Kind::Duration(s(0), h(24)),
        "1h",
        "The longest `Retry-After` that is believed.",
    ),
    webhook(
        "give_up_after",
        Kind::Duration(s(1), h(24 * 30)),
        "24h",
        "With `concurrency = 1`: how long one failing event may hold up all others.",
    ),
    webhook("dead_letter_after", Kind::Count(1, 100), "3", "Tries of an event that is refused."),
    webhook(
        "dead_letter_on",
        Kind::Statuses,
        "400, 409, 411, 413, 414, 415, 422, 431, 501",
        "Statuses that suspect the event rather than the endpoint.",
    ),
    webhook(
        "payload_bytes_max",
        Kind::Size(1024, 16 << 20),
        "1MiB",
        "Larger documents are left out of the payload.",
    ),
    webhook("batch_max", Kind::Count(1, 500), "1", "Events in one request; `1` is no batches."),
    webhook(
        "batch_wait",
        Kind::Duration(s(0), s(60)),
        "0s",
        "How long an event waits for others to make a batch with.",
    ),
    webhook(
        "batch_bytes_max",
        Kind::Size(1024, 16 << 20),
        "1MiB",
        "Longest body of a batch; a larger event goes alone.",
    ),
    webhook(
        "rate_limit",
        Kind::Rate,
        "off",
        "Attempts in a second, a minute or an hour, retries among them; one second's worth may go out at once.",
    ),
    webhook("paused", Kind::Flag, "false", "Stops the webhook; its place is kept."),
    webhook(
        "lease",
        Kind::Word(&["auto", "on", "off", "shared"]),
        "auto",
        "Several daemons on one `state_db`: who holds the lease tells. `auto`: while others are there; `off`: every daemon tells; \
         `shared`: each tells its part of the databases found by pattern (with `watch = databases` one tells all, as with `on`).",
    ),
    optional(webhook(
        "endpoint_guard",
        Kind::Word(guard::LEVELS),
        "public",
        "For this webhook in place of the one in `[hookd]`.",
    )),
    optional(webhook(
        "endpoint_allow",
        Kind::Networks,
        "10.1.0.0/16",
        "For this webhook in place of the one in `[hookd]`.",
    )),
    optional(webhook(
        "endpoint_deny",
        Kind::Networks,
        "10.0.0.0/8",
        "For this webhook in place of the one in `[hookd]`.",
    )),
    optional(webhook(
        "ca_file",
        Kind::Path,
        "/etc/couch-hookd/shop-ca.pem",
        "PEM file with roots to trust for this endpoint beside the others.",
    )),
];

impl fmt::Display for Kind {
    /// For the reference: `duration, 100ms to 10m`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Text => f.write_str("text"),
            Kind::Secret => f.write_str("text, secret"),
            Kind::Url => f.write_str("URL"),
            Kind::Path | Kind::NewFile => f.write_str("path"),
            Kind::Database => f.write_str("database"),
            Kind::Databases => f.write_str("databases and patterns, by commas"),
            Kind::Word(words) => write!(f, "`{}`", words.join("`, `")),
            Kind::Flag => f.write_str("`true` or `false`"),
            Kind::Duration(min, max) => write!(f, "duration, {} to {}", short(*min), short(*max)),
            Kind::Durations(min, max) => {
                write!(f, "durations, {} to {}, by commas", short(*min), short(*max))
            }
            Kind::Count(min, max) => write!(f, "number, {min} to {max}"),
            Kind::Size(min, max) => write!(f, "size, {} to {}", short_size(*min), short_size(*max)),
            Kind::Rate => f.write_str("`N/s`, `N/m`, `N/h`, or `off`"),
            Kind::Retries => f.write_str("how often, after how long; or `off`"),
            Kind::Statuses => f.write_str("statuses, by commas, or `off`"),
            Kind::Events => f.write_str("event types, by commas"),
            Kind::JsonObject => f.write_str("JSON object"),
            Kind::JsonStrings => f.write_str("JSON array of strings"),
            Kind::DesignFunction => f.write_str("`DDOC/NAME`"),
            Kind::SigningSecrets => f.write_str("`whsec_...`, by commas, secret"),
            Kind::Networks => f.write_str("networks, by commas"),
        }
    }
}

/// A duration as one would write it: `500ms`, `90s`, `2m`, `1h`.
pub fn short(duration: Duration) -> String {
    match duration.as_millis() {
        0 => "0s".to_owned(),
        ms if ms % 1000 != 0 => format!("{ms}ms"),
        ms if ms % 3_600_000 == 0 => format!("{}h", ms / 3_600_000),
        ms if ms % 60_000 == 0 => format!("{}m", ms / 60_000),
        ms => format!("{}s", ms / 1000),
    }
}

/// A size as one would write it: `512B`, `64KiB`, `1MiB`.
pub fn short_size(bytes: u64) -> String {
    match bytes {
        bytes if bytes != 0 && bytes % (1 << 20) == 0 => format!("{}MiB", bytes >> 20),
        bytes if bytes != 0 && bytes % 1024 == 0 => format!("{}KiB", bytes >> 10),
        bytes => format!("{bytes}B"),
    }
}

impl Key {
    /// Whether its value, or a part of it, must never be shown.
    pub fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::Secret | Kind::SigningSecrets | Kind::Url)
    }

    /// Whether it may be set by `KEY_file`; a path is one already.
    pub fn takes_file(&self) -> bool {
        !matches!(self.kind, Kind::Path | Kind::NewFile)
    }
}

/// The key that is set by `name`: `header.x-tenant` is `header.*`.
pub fn find(section: Section, name: &str) -> Option<&'static Key> {
    let name = match name.strip_prefix("header.") {
        Some(header) if section == Section::Webhook && !header.is_empty() => "header.*",
        _ => name,
    };
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// The known name of a section that `name` was probably meant to be, with `_file` where `name` ends so.
pub fn nearest(section: Section, name: &str) -> Option<String> {
    let lower = name.to_ascii_lowercase().replace('-', "_");
    let names = || KEYS.iter().filter(|key| key.section == section).map(|key| key.name);
    let of_a_file = lower.strip_suffix("_file").and_then(|bare| nearest_of(bare, names(), 2));
    match of_a_file {
        // `ca` and `log` are no keys by themselves.
        Some(name) if lower != "ca_file" => Some(format!("{name}_file")),
        _ => nearest_of(&lower, names(), 2).map(str::to_owned),
    }
}

/// The README's reference of keys: one table per section, in Markdown.
pub fn reference_markdown() -> String {
    let mut text = String::new();
    for (section, title) in [(Section::Hookd, "[hookd]"), (Section::Webhook, "[hookd.webhook.NAME]")] {
        text.push_str(&format!("\n`{title}`\n\n| key | value | default | |\n|---|---|---|---|\n"));
        for key in KEYS.iter().filter(|key| key.section == section) {
            let default = key.default.map_or_else(String::new, |default| format!("`{default}`"));
            text.push_str(&format!("| `{}` | {} | {default} | {} |\n", key.name, key.kind, key.text));
        }
    }
    text.trim_start().to_owned()
}

/// `couchdb-ini/hookd.ini`: for `couch-hookd run`.
pub fn sample_standalone() -> String {
    format!(
        "; couch-hookd beside a CouchDB of any version: /etc/couch-hookd/hookd.ini\n\
         ; Started by `couch-hookd run`. {SAMPLE_NOTES}\n{}",
        sample_sections()
    )
}

/// `couchdb-ini/local.d-hookd.ini`: for CouchDB 1.1 to 2.2, which starts the daemon itself.
pub fn sample_os_daemons() -> String {
    format!(
        "; couch-hookd started by CouchDB 1.1 to 2.2: put this into CouchDB's local.d directory.\n\
         ; On 1.x edit this file: keys set over HTTP are written below the wrong section when its name has dots.\n\
         ; {SAMPLE_NOTES}\n\n\
         [os_daemons]\n\
         ; No blanks in paths and arguments; a comment in this line would end the command.\n\
         couch_hookd = /usr/bin/couch-hookd os-daemon\n{}",
        sample_sections()
    )
}

/// `couchdb-ini/local.d-hookd-notified.ini`: for CouchDB 1.x, 2.0 and 2.1, which tells it of work.
pub fn sample_update_notification() -> String {
    format!(
        "; couch-hookd told of work by CouchDB 1.x, 2.0 and 2.1: put this into CouchDB's local.d directory, as couch-hookd.ini.\n\
         ; In place of a line under [os_daemons]: both together would tell everything twice.\n\
         ; {SAMPLE_NOTES}\n\n\
         [update_notification]\n\
         ; No blanks in paths and arguments; a comment in this line would end the command. The file is this one.\n\
         couch_hookd = /usr/bin/couch-hookd update-notification --config /etc/couchdb/local.d/couch-hookd.ini\n{}",
        sample_sections()
    )
}

const SAMPLE_NOTES: &str = "Lines that begin with ;key show the default or an example.\n\
    ; Comments stand on their own lines: CouchDB before 3.3 ignores a section header with one behind it.\n\
    ; Any KEY may be read from a file: KEY_file = PATH.";

fn sample_sections() -> String {
    let mut text = String::from("\n[hookd]\n");
    sample_keys(&mut text, Section::Hookd);
    text.push_str(
        "\n; The list: NAME = endpoint URL.\n[hookd.webhooks]\n;orders = https://shop.example/hooks/orders\n\n\
         ; Options of one webhook, all optional.\n[hookd.webhook.orders]\n",
    );
    sample_keys(&mut text, Section::Webhook);
    text
}

fn sample_keys(text: &mut String, section: Section) {
    for key in KEYS.iter().filter(|key| key.section == section) {
        let plain = key.text.replace('`', "");
        let name = match key.kind {
            Kind::SigningSecrets => format!("{}_file", key.name),
            Kind::Secret if key.name != "header.*" => format!("{}_file", key.name),
            _ => key.name.replace('*', "x-tenant"),
        };
        text.push_str(&format!("; {plain}\n;{name} = {}\n", key.example));
    }
}
