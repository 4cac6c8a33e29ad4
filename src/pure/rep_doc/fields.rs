//! The members at the top of a replication document: since when CouchDB knows each, and what it takes there.

use serde_json::{Map, Value};

use crate::pure::nearest::nearest_of;
use crate::pure::rep_doc::{Findings, Severity, Version, endpoint, kind, shown, shown_name, term};

/// Below so many milliseconds a time was probably meant in seconds.
const MILLISECONDS_USUAL: i64 = 1_000;

/// One member.
pub(crate) struct Field {
    /// As CouchDB reads it.
    pub(crate) name: &'static str,
    /// The first version that knows it. `_replicator` itself is there since 1.1.
    since: Version,
    /// How bad it is when an older version ignores it: an error where it decides what is replicated.
    ignored: Severity,
    rule: Rule,
}

/// What CouchDB takes as its value.
pub(crate) enum Rule {
    Endpoint,
    Proxy,
    Boolean,
    /// A number, or a string that is one.
    Integer(Range),
    /// An Erlang list of pairs, and which names it takes.
    ErlangOptions(&'static [&'static str]),
    Cancel,
    CreateTargetParams,
    DocIds,
    Filter,
    QueryParams,
    Selector,
    SinceSeq,
    UserCtx,
    /// CouchDB writes it itself.
    Owner,
}

/// Numbers that CouchDB can do something with.
pub(crate) struct Range {
    least: i64,
    /// Whether it is a time, in milliseconds.
    is_time: bool,
    /// The first version that gets by with less all the same.
    forgives: Option<Version>,
}

const COUNT: Range = Range { least: 1, is_time: false, forgives: None };
/// Seen: 1.7.1 and 2.3.1 fail or hang with 0, 3.5.0 does not.
const BATCH: Range = Range { forgives: Some(Version::new(3, 0, 0)), ..COUNT };
/// Less than 0 is without end: `couch_replicator_httpc` counts down to 0.
const RETRIES: Range = Range { least: 0, is_time: false, forgives: Some(Version::new(1, 1, 0)) };
const TIMEOUT: Range = Range { least: 1, is_time: true, forgives: None };
/// With less than 0 no timer is set, and nothing is checkpointed before the end.
const INTERVAL: Range = Range { least: 0, is_time: true, forgives: None };

const fn field(name: &'static str, since: (u16, u16, u16), ignored: Severity, rule: Rule) -> Field {
    Field { name, since: Version::new(since.0, since.1, since.2), ignored, rule }
}

use Severity::{Error, Warning};

/// Every member, and since when.
///
/// Source: `convert_options/1` and `parse_rep_doc` of each tag from 1.1.2 to 3.5.2; `owner` is written by
/// `couch_replicator_docs:before_doc_update`.
const FIELDS: &[Field] = &[
    field("source", (1, 1, 0), Error, Rule::Endpoint),
    field("target", (1, 1, 0), Error, Rule::Endpoint),
    field("cancel", (1, 1, 0), Error, Rule::Cancel),
    field("continuous", (1, 1, 0), Error, Rule::Boolean),
    field("create_target", (1, 1, 0), Error, Rule::Boolean),
    field("doc_ids", (1, 1, 0), Error, Rule::DocIds),
    field("filter", (1, 1, 0), Error, Rule::Filter),
    field("query_params", (1, 1, 0), Error, Rule::QueryParams),
    field("proxy", (1, 1, 0), Error, Rule::Proxy),
    field("user_ctx", (1, 1, 0), Error, Rule::UserCtx),
    field("owner", (1, 1, 0), Warning, Rule::Owner),
    field("connection_timeout", (1, 2, 0), Warning, Rule::Integer(TIMEOUT)),
    field("http_connections", (1, 2, 0), Warning, Rule::Integer(COUNT)),
    field("retries_per_request", (1, 2, 0), Warning, Rule::Integer(RETRIES)),
    field("worker_batch_size", (1, 2, 0), Warning, Rule::Integer(BATCH)),
    field("worker_processes", (1, 2, 0), Warning, Rule::Integer(COUNT)),
    field("since_seq", (1, 2, 0), Error, Rule::SinceSeq),
    field("socket_options", (1, 2, 0), Warning, Rule::ErlangOptions(SOCKET_OPTIONS)),
    field("checkpoint_interval", (1, 6, 0), Warning, Rule::Integer(INTERVAL)),
    field("use_checkpoints", (1, 6, 0), Error, Rule::Boolean),
    field("selector", (2, 0, 0), Error, Rule::Selector),
    field("create_target_params", (2, 2, 0), Warning, Rule::CreateTargetParams),
    field("source_proxy", (3, 0, 0), Error, Rule::Proxy),
    field("target_proxy", (3, 0, 0), Error, Rule::Proxy),
    field("use_bulk_get", (3, 3, 0), Warning, Rule::Boolean),
    field("winning_revs_only", (3, 3, 0), Error, Rule::Boolean),
    field("ibrowse_options", (3, 3, 3), Warning, Rule::ErlangOptions(&["prefer_ipv6"])),
];

/// What 3.3 and later keep of `socket_options` unless `[replicator] valid_socket_options` says otherwise.
const SOCKET_OPTIONS: &[&str] = &["buffer", "keepalive", "nodelay", "priority", "recbuf", "sndbuf"];

/// The member of this name.
pub(crate) fn find(name: &str) -> Option<&'static Field> {
    FIELDS.iter().find(|field| field.name == name)
}

/// All names that a person may write.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    FIELDS.iter().map(|field| field.name)
}

impl Field {
    /// Whether this version knows it, and takes this value.
    pub(crate) fn check(&self, findings: &mut Findings, path: &str, value: &Value) {
        if findings.version < self.since {
            let (version, since) = (findings.version, short(self.since));
            let message = format!("CouchDB {version} does not know it and ignores it (known since {since})");
            return findings.say(self.ignored, path, message, "take it away, or use a newer CouchDB");
        }
        match &self.rule {
            Rule::Endpoint => endpoint::check(findings, path, value),
            Rule::Proxy => endpoint::check_proxy(findings, path, value),
            Rule::Boolean => check_boolean(findings, path, value),
            Rule::Integer(range) => check_integer(findings, path, value, range),
            Rule::ErlangOptions(known) => check_erlang(findings, path, value, known),
            Rule::Cancel => check_cancel(findings, path, value),
            Rule::CreateTargetParams => check_create_target_params(findings, path, value),
            Rule::DocIds => check_doc_ids(findings, path, value),
            Rule::Filter => check_filter(findings, path, value),
            Rule::QueryParams if value.is_object() => {}
            Rule::QueryParams => {
                findings.wrong(path, "an object", value, "write `{\"name\": \"value\"}`");
            }
            Rule::Selector if value.is_object() => {}
            Rule::Selector => {
                findings.wrong(path, "an object, a Mango selector", value, "write `{\"type\": \"order\"}`");
            }
            Rule::SinceSeq => check_since_seq(findings, path, value),
            Rule::UserCtx => check_user_ctx(findings, path, value),
            Rule::Owner => {}
        }
    }
}

/// `3.3`, or `3.3.3` when it did not come with the first.
fn short(since: Version) -> String {
    match since.0 {
        [major, minor, 0] => format!("{major}.{minor}"),
        _ => since.to_string(),
    }
}

fn check_boolean(findings: &mut Findings, path: &str, value: &Value) {
    if value.is_boolean() {
        return;
    }
    let remedy = match value.as_str() {
        Some("true" | "false") => "write it without quotes",
        _ => "write `true` or `false`, without quotes",
    };
    findings.wrong(path, "`true` or `false`", value, remedy);
}

/// `couch_util:to_integer/1` takes strings, too; no float.
fn check_integer(findings: &mut Findings, path: &str, value: &Value, range: &Range) {
    let Range { least, is_time, forgives } = *range;
    let number = value.as_i64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
    let what = if is_time { "a whole number of milliseconds" } else { "a whole number" };
    let expected = format!("{what}, {least} or more");
    match number {
        Some(number) if number < least => {
            let remedy = "write a larger one, or leave it out for the server's own";
            let is_forgiven = forgives.is_some_and(|since| findings.version >= since);
            let severity = if is_forgiven { Severity::Warning } else { Severity::Error };
            findings.say(severity, path, format!("expected {expected}, got `{number}`"), remedy);
        }
        Some(number) if is_time && number < MILLISECONDS_USUAL => {
            let message = format!("is in milliseconds: `{number}` is less than a second");
            findings.warning(path, message, "write 30000 for 30 s");
        }
        Some(_) => {}
        // Beyond what Rust holds; Erlang takes any.
        None if value.is_u64() => {}
        None => findings.wrong(path, &expected, value, "write digits alone, and no point"),
    }
}

/// 3.3 and later take pairs alone and leave out names that they do not know; older ones give every socket all of it.
fn check_erlang(findings: &mut Findings, path: &str, value: &Value, known: &[&str]) {
    const EXPECTED: &str = "a string with an Erlang list such as `\"[{keepalive, true}, {nodelay, false}]\"`";
    let example = match known {
        ["prefer_ipv6"] => "write `\"[{prefer_ipv6, true}]\"`",
        _ => "write `\"[{keepalive, true}, {nodelay, false}]\"`",
    };
    let Some(text) = value.as_str() else {
        return findings.wrong(path, EXPECTED, value, example);
    };
    let options = match term::parse(text) {
        Ok(term::Term::List(options)) => options,
        Ok(_) => {
            return findings.error(
                path,
                format!("expected {EXPECTED}, got one without `[` and `]`"),
                example,
            );
        }
        Err(found) => return findings.error(path, format!("expected {EXPECTED}, got {found}"), example),
    };
    let keeps_known = findings.version.is_at_least(3, 3);
    for (at, option) in options.iter().enumerate() {
        let nth = at + 1;
        let (name, value) = match option {
            term::Term::Tuple(pair) if pair.len() == 2 => match &pair[0] {
                term::Term::Atom(name) => (name.as_str(), &pair[1]),
                _ => {
                    let message = format!("option {nth}: expected a name in front, got something else");
                    findings.error(path, message, example);
                    continue;
                }
            },
            _ => {
                let severity = if keeps_known { Severity::Error } else { Severity::Warning };
                let message = format!("option {nth}: expected a pair `{{name, value}}`, got something else");
                findings.say(severity, path, message, example);
                continue;
            }
        };
        if known.contains(&name) {
            check_option(findings, path, nth, name, value);
        } else {
            let message = match keeps_known {
                true => format!("option {nth} is left out: CouchDB takes `{}`", known.join("`, `")),
                false => format!(
                    "option {nth} goes to Erlang as it is; one that it does not know lets nothing connect"
                ),
            };
            let remedy = match nearest_of(name, known.iter().copied(), 1) {
                Some(near) => format!("did you mean `{near}`?"),
                None if !keeps_known => "take it away unless Erlang's `inet` has it".to_owned(),
                None => "take it away, or let it through in CouchDB's configuration, section `[replicator]`"
                    .to_owned(),
            };
            findings.warning(path, message, remedy);
        }
    }
}

fn check_option(findings: &mut Findings, path: &str, nth: usize, name: &str, value: &term::Term) {
    let is_flag = ["keepalive", "nodelay", "prefer_ipv6"].contains(&name);
    let (fits, expected) = match value {
        term::Term::Atom(word) if is_flag => (word == "true" || word == "false", "`true` or `false`"),
        _ if is_flag => (false, "`true` or `false`"),
        value => (*value == term::Term::Integer, "a whole number"),
    };
    if !fits {
        let message = format!("option {nth}, `{name}`: expected {expected}, got something else");
        findings.error(path, message, "no connection can be opened with it");
    }
}

fn check_cancel(findings: &mut Findings, path: &str, value: &Value) {
    match value {
        Value::Bool(false) => {}
        Value::Bool(true) => findings.error(
            path,
            "it cancels a replication only at `_replicate`; a document with it starts one all the same, or fails",
            "delete the document to cancel its replication",
        ),
        other => findings.wrong(path, "`true` or `false`", other, "take it away: it has a use only at `_replicate`"),
    }
}

/// They become the query of `PUT /TARGET`.
fn check_create_target_params(findings: &mut Findings, path: &str, value: &Value) {
    let Some(params) = value.as_object() else {
        return findings.wrong(path, "an object", value, "write `{\"q\": 8}`");
    };
    for (name, value) in params {
        let path = format!("{path}.{}", shown_name(name));
        let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
        match name.as_str() {
            "q" | "n" if number.is_none_or(|number| number == 0) => {
                findings.wrong(
                    &path,
                    "a whole number, 1 or more",
                    value,
                    "leave it out for the server's own",
                );
            }
            "partitioned" if value.is_boolean() || matches!(value.as_str(), Some("true" | "false")) => {}
            "partitioned" => check_boolean(findings, &path, value),
            "placement" if !value.is_string() => {
                findings.wrong(&path, "a string such as `\"zone1:2\"`", value, "write it in quotes");
            }
            "q" | "n" | "placement" => {}
            _ if value.is_object() || value.is_array() => {
                findings.wrong(&path, "a value that fits into a query", value, "take it away");
            }
            _ => {
                let remedy = match nearest_of(name, ["partitioned", "placement"], 1) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => "take it away".to_owned(),
                };
                let message = "CouchDB makes databases with `q`, `n`, `placement` and `partitioned` alone";
                findings.warning(path, message, remedy);
            }
        }
    }
}

fn check_doc_ids(findings: &mut Findings, path: &str, value: &Value) {
    // From 3.3 on `null` is as good as nothing; before, `validate_doc_update` asks for an array.
    if value.is_null() && findings.version.is_at_least(3, 3) {
        return;
    }
    let Some(ids) = value.as_array() else {
        return findings.wrong(path, "an array of strings", value, "write `[\"id1\", \"id2\"]`");
    };
    let mut odd = ids.iter().enumerate().filter(|(_, id)| !id.is_string());
    if let Some((at, id)) = odd.next() {
        let more = match odd.count() {
            0 => String::new(),
            n => format!(", and {n} more"),
        };
        let message = format!("expected a string, got {}{more}", kind(id));
        findings.error(format!("{path}[{at}]"), message, "write ids as strings, in quotes");
    }
    if ids.is_empty() {
        findings.warning(
            path,
            "is empty: nothing is replicated",
            "name documents, or take it away for all of them",
        );
    }
}

/// Builtin filters are taken from 2.0 on; before, the name is cut at its first `/`.
fn check_filter(findings: &mut Findings, path: &str, value: &Value) {
    const REMEDY: &str = "write the design document's name without `_design/`, a slash, the filter's name";
    let Some(name) = value.as_str() else {
        return findings.wrong(path, "`DDOC/NAME`", value, REMEDY);
    };
    let is_builtin =
        name.starts_with('_') && !name.starts_with("_design/") && findings.version.is_at_least(2, 0);
    match name.split_once('/') {
        _ if name.is_empty() => findings.wrong(path, "`DDOC/NAME`", value, REMEDY),
        _ if is_builtin => {}
        Some(("_design", _)) => {
            findings.error(path, "expected `DDOC/NAME`, got one that begins with `_design/`", REMEDY);
        }
        Some((ddoc, filter)) if !ddoc.is_empty() && !filter.is_empty() => {}
        _ => findings.error(
            path,
            "expected `DDOC/NAME`, got a string without a name on both sides of `/`",
            REMEDY,
        ),
    }
}

/// A number up to 1.x, a string since 2.0, an array on BigCouch and Cloudant; what the source knows, not we.
fn check_since_seq(findings: &mut Findings, path: &str, value: &Value) {
    const EXPECTED: &str = "a `seq` of the source's `_changes`";
    const REMEDY: &str =
        "write it as `_changes` gives it: a number from CouchDB 1.x, a string from later ones";
    match value {
        Value::String(text) if !text.is_empty() => {}
        Value::Number(number) if number.is_u64() => {}
        Value::Array(_) => findings.warning(path, "is one of BigCouch alone; CouchDB refuses it", REMEDY),
        other => findings.wrong(path, EXPECTED, other, REMEDY),
    }
}

/// Names and roles are looked at by `validate_doc_update`, up to 3.2; later ones only need an object.
fn check_user_ctx(findings: &mut Findings, path: &str, value: &Value) {
    let Some(user) = value.as_object() else {
        return findings.wrong(
            path,
            "an object",
            value,
            "write `{\"name\": …, \"roles\": […]}`, or take it away",
        );
    };
    let severity = if findings.version.is_at_least(3, 3) { Severity::Warning } else { Severity::Error };
    match user.get("name") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if !name.is_empty() => {}
        Some(other) => {
            let message = format!("expected a name that is not empty, or `null`, got {}", shown(other));
            findings.say(severity, format!("{path}.name"), message, "write the user's name");
        }
    }
    let roles = match user.get("roles") {
        None => return,
        Some(Value::Array(roles)) => roles,
        Some(other) => {
            // `null` passes everywhere.
            let severity = if other.is_null() { Severity::Warning } else { severity };
            let message = format!("expected an array of strings, got {}", kind(other));
            return findings.say(severity, format!("{path}.roles"), message, "write `[\"role\"]`");
        }
    };
    if !roles.iter().all(Value::is_string) {
        let message = "expected an array of strings, got an array with something else";
        findings.warning(format!("{path}.roles"), message, "write `[\"role\"]`");
    }
    if roles.iter().any(|role| role == "_admin") {
        let (message, remedy) = match findings.version.is_at_least(3, 0) {
            true => ("`_admin` has no effect: 3.0 and later have no local endpoints", "take it away"),
            false => (
                "with `_admin` the replication may write anything into a local target, design documents too",
                "name the roles of a user who may do just what is needed",
            ),
        };
        findings.warning(format!("{path}.roles"), message, remedy);
    }
}

/// What members say together.
pub(crate) fn check_together(findings: &mut Findings, members: &Map<String, Value>) {
    check_one_filter(findings, members);
    check_view(findings, members);
    check_creation(findings, members);
    let has_id = members.contains_key("id") || members.contains_key("replication_id");
    if members.get("cancel") == Some(&Value::Bool(true)) && has_id && findings.version.is_at_least(3, 0) {
        // Seen on 3.5.0.
        let message = "with an id beside it CouchDB starts no replication any more, whatever its document";
        findings.error("cancel", message, "delete the document, then restart CouchDB");
    }
    if findings.version.is_at_least(3, 0) && is_set(members, "proxy") {
        for other in ["source_proxy", "target_proxy"].into_iter().filter(|other| is_set(members, other)) {
            let message = format!("expected either `proxy` or `{other}`, got both");
            findings.error(
                other,
                message,
                "`proxy` is for both sides: keep it, or `source_proxy` and `target_proxy`",
            );
        }
    }
}

fn is_set(members: &Map<String, Value>, name: &str) -> bool {
    members.get(name).is_some_and(|value| value.as_str() != Some(""))
}

fn check_one_filter(findings: &mut Findings, members: &Map<String, Value>) {
    let counts = |name: &&str| match members.get(*name) {
        None => false,
        Some(value) => *name != "doc_ids" || !value.is_null(),
    };
    let there: Vec<&str> = ["doc_ids", "filter", "selector"].into_iter().filter(counts).collect();
    if findings.version.is_at_least(2, 0) {
        if there.len() > 1 {
            let message = format!(
                "expected one of `doc_ids`, `filter` and `selector`, got `{}`",
                there.join("` and `")
            );
            findings.error(
                there[0],
                message,
                "keep one; a selector can name ids: `{\"_id\": {\"$in\": […]}}`",
            );
        }
    } else if there.contains(&"doc_ids") && there.contains(&"filter") {
        let message = "CouchDB 1.x replicates what `doc_ids` names and does not ask the filter";
        findings.warning("filter", message, "keep one of both");
    }
    if members.contains_key("query_params") && !members.contains_key("filter") {
        let message = "has no effect without `filter`";
        findings.warning("query_params", message, "name the filter that they are for, or take them away");
    }
}

/// `"filter": "_view"` asks for `query_params.view`: `couch_replicator_filters:view_type/2`.
fn check_view(findings: &mut Findings, members: &Map<String, Value>) {
    let is_view = members.get("filter").and_then(Value::as_str) == Some("_view");
    if !is_view || !findings.version.is_at_least(2, 0) {
        return;
    }
    let view = members.get("query_params").and_then(|params| params.get("view"));
    let fits = |view: &str| view.split('/').count() == 2 && view.split('/').all(|part| !part.is_empty());
    if !view.and_then(Value::as_str).is_some_and(fits) {
        let found = match view {
            None => "none",
            Some(Value::String(_)) => "a string of another form",
            Some(other) => kind(other),
        };
        let message = format!("expected `DDOC/VIEW` for the filter `_view`, got {found}");
        findings.error("query_params.view", message, "write the design document's name without `_design/`");
    }
}

fn check_creation(findings: &mut Findings, members: &Map<String, Value>) {
    let creates = members.get("create_target") == Some(&Value::Bool(true));
    let target = members.get("target");
    let url = target.and_then(|target| target.get("url").or(Some(target))).and_then(Value::as_str);
    let params = members.get("create_target_params").and_then(Value::as_object);
    if let Some(params) = params.filter(|_| findings.version >= Version::new(2, 2, 0)) {
        if !creates {
            let message = "has no effect without `\"create_target\": true`";
            findings.warning("create_target_params", message, "add it, or take the parameters away");
        } else if !params.is_empty() && url.is_some_and(|url| url.contains('?')) {
            let message = "the target's URL has a `?` already: the parameters would follow a second one";
            findings.error("create_target_params", message, "take the query out of the target's URL");
        }
    }
    let is_local = url.is_some_and(|url| !url.contains("://"));
    if creates && is_local && !findings.version.is_at_least(2, 0) {
        let roles = members.get("user_ctx").and_then(|user| user.get("roles")).and_then(Value::as_array);
        if !roles.is_some_and(|roles| roles.iter().any(|role| role == "_admin")) {
            let message = "CouchDB 1.x makes a local target only for `user_ctx` with the role `_admin`";
            let remedy = "create the database yourself, or name the target by its URL with a login";
            findings.error("create_target", message, remedy);
        }
    }
}
