//! The stand-in's answers about replications: `_scheduler/docs`, `_scheduler/jobs`, `_active_tasks`.
//!
//! Guarantees layout, order of members, texts and rules of paging of the version, as recorded and as in
//! `couch_replicator_httpd.erl` and `couch_replicator_fabric*.erl` of 2.2.0 and 3.5.0: `total_rows` counts all
//! documents, also those without a row, and on 2.x one less (seen on 2.2.0 and 2.3, whatever their number); each
//! shard is read for `skip + limit` documents, so a page may be short though it is not the last. What is shown is
//! `replicator`'s subject.

use serde_json::Value;

use crate::standin::couch::{Flavour, State};
use crate::standin::docs::{Document, Refusal, members, quoted};
use crate::standin::http::Request;
use crate::standin::quirks::take_one;
use crate::standin::replicator::{self, Entry, Happened, ReplicationState, object, or_null, seq, time};
use crate::standin::routes::{NODE, Outcome, Reply, Who, check_name, need_admin};
use crate::standin::store::Database;

/// `limit` of `_scheduler/jobs` when none is given; `_scheduler/docs` has none.
const JOBS_LIMIT: usize = 100;
const REPLICATOR: &str = "_replicator";

/// Members of an answer in order, their values JSON.
type Members = Vec<(&'static str, String)>;

/// Answers `_scheduler/…`.
pub(crate) fn scheduler(
    state: &mut State,
    who: &Who,
    method: &str,
    path: &[&str],
    request: &Request,
) -> Outcome {
    if state.flavour == Flavour::V1 {
        check_name("_scheduler")?;
    }
    need_admin(who)?;
    if method != "GET" {
        return Err(Refusal::new(405, "method_not_allowed", "Only GET,HEAD allowed"));
    }
    match path {
        ["jobs"] => jobs(state, request),
        ["jobs", id] => {
            let all = all_jobs(state);
            let job = all.into_iter().find(|(known, _)| known == id);
            job.map(|(_, job)| Reply::ok(job)).ok_or_else(missing)
        }
        ["docs"] => docs(state, REPLICATOR, request),
        ["docs", name] if is_replicator(name) => docs(state, name, request),
        ["docs", name, id] if is_replicator(name) => one_doc(state, name, id),
        // The slash of the name may stand as it is.
        ["docs", rest @ ..] => match rest.iter().position(|part| *part == REPLICATOR) {
            Some(at) if at > 0 && at + 1 == rest.len() => docs(state, &rest.join("/"), request),
            Some(at) if at > 0 && at + 2 == rest.len() => {
                one_doc(state, &rest[..=at].join("/"), rest[at + 1])
            }
            _ => Err(Refusal::new(400, "bad_request", "Invalid path")),
        },
        _ => Ok(Reply::new(404, "{\"error\":\"not found\"}\n")),
    }
}

fn is_replicator(name: &str) -> bool {
    name == REPLICATOR || name.ends_with("/_replicator")
}

fn missing() -> Refusal {
    Refusal::new(404, "not_found", "missing")
}

fn no_database() -> Refusal {
    Refusal::new(404, "not_found", "Database does not exist.")
}

fn number(request: &Request, name: &str) -> Result<Option<usize>, Refusal> {
    let Some(value) = request.query_value(name) else { return Ok(None) };
    let bad = |_| Refusal::new(400, "query_parse_error", format!("Invalid value for integer: {value:?}"));
    value.parse().map(Some).map_err(bad)
}

fn states(request: &Request) -> Result<Vec<ReplicationState>, Refusal> {
    let words = request.query_value("states").unwrap_or_default().to_lowercase();
    let parsed = words.split(',').filter(|word| !word.is_empty()).map(|word| {
        let all: Vec<&str> = ReplicationState::ALL.iter().map(|state| state.as_str()).collect();
        let reason = || format!("Unknown states [{word}]. Choose from: [{}]", all.join(","));
        ReplicationState::parse(word).ok_or_else(|| Refusal::new(400, "query_parse_error", reason()))
    });
    parsed.collect()
}

fn docs(state: &mut State, name: &str, request: &Request) -> Outcome {
    let limit = number(request, "limit")?.unwrap_or(usize::MAX);
    let asked_skip = number(request, "skip")?.unwrap_or(0);
    let states = states(request)?;
    let State { databases, replicator, quirks, rng, flavour, .. } = state;
    let db = databases.get(name).ok_or_else(no_database)?;
    replicator.n_listings += 1;
    if is_nth(quirks.scheduler_fails_every, replicator.n_listings) {
        let reason = "The request could not be processed in a reasonable amount of time.";
        return Err(Refusal::new(500, "timeout", reason));
    }
    let mut skip = asked_skip;
    if skip > 0 && quirks.scheduler_shift_max > 0 {
        skip =
            (skip + rng.usize(0..=2 * quirks.scheduler_shift_max)).saturating_sub(quirks.scheduler_shift_max);
    }
    let mut n_read = vec![0; db.n_shards()];
    let (mut total, mut n_passed, mut listed) = (0_usize, 0, Vec::new());
    for (id, doc) in db.live_docs() {
        total += 1;
        let n_read = &mut n_read[doc.shard];
        *n_read += 1;
        if *n_read > skip.saturating_add(limit) || listed.len() == limit || id.starts_with("_design/") {
            continue;
        }
        let known = match replicator.entry(name, db, id, doc.winner()) {
            Some(entry) => Some(entry.said.state),
            None => stored_state(id, doc),
        };
        if known.is_some_and(|known| states.is_empty() || states.contains(&known)) {
            n_passed += 1;
            if n_passed > skip {
                listed.push((id, doc));
            }
        }
    }
    let (mut rows, mut ids) = (Vec::new(), Vec::new());
    for (id, doc) in listed {
        replicator.n_rows += 1;
        let lost = is_nth(quirks.scheduler_row_lost_every, replicator.n_rows);
        let hidden = replicator.hidden.get_mut(&(name.to_owned(), id.to_owned())).is_some_and(take_one);
        if lost || hidden {
            continue;
        }
        let row = match replicator.entry(name, db, id, doc.winner()) {
            Some(entry) => active_row(*flavour, name, id, entry),
            None => stored_row(*flavour, name, id, doc),
        };
        rows.push(object(&row));
        ids.push(id.to_owned());
    }
    let is_old = *flavour == Flavour::V2;
    replicator::on_listed(state, name, ids);
    if is_old {
        total = total.saturating_sub(1);
    }
    let (offset, rows) = (asked_skip.min(total), rows.join(",\r\n"));
    Ok(Reply::ok(format!("{{\"total_rows\":{total},\"offset\":{offset},\"docs\":[\r\n{rows}\r\n]}}")))
}

fn is_nth(every: Option<u64>, n: u64) -> bool {
    every.is_some_and(|every| n.is_multiple_of(every))
}

fn one_doc(state: &State, name: &str, id: &str) -> Outcome {
    let db = state.databases.get(name).ok_or_else(no_database)?;
    let doc = db.doc(id).filter(|doc| !doc.is_deleted(doc.winner())).ok_or_else(missing)?;
    Ok(Reply::ok(object(&match state.replicator.entry(name, db, id, doc.winner()) {
        Some(entry) => active_row(state.flavour, name, id, entry),
        None => stored_row(state.flavour, name, id, doc),
    })))
}

/// What the scheduler or, before it, the document processor says.
fn active_row(flavour: Flavour, name: &str, id: &str, entry: &Entry) -> Members {
    let said = &entry.said;
    let has_job = !matches!(said.state, ReplicationState::Initializing | ReplicationState::Error);
    let rep_id = if has_job { quoted(&entry.id) } else { "null".to_owned() };
    let mut row = vec![("database", quoted(name)), ("doc_id", quoted(id)), ("id", rep_id)];
    let state = ("state", quoted(said.state.as_str()));
    let error_count = ("error_count", said.error_count.to_string());
    let node = ("node", quoted(NODE));
    let last_updated = ("last_updated", quoted(&time(entry.last_updated)));
    let start_time = ("start_time", quoted(&time(entry.start_time)));
    let info = ("info", info(flavour, entry));
    if !has_job {
        row.extend([state, info, error_count, node, last_updated, start_time]);
        return row;
    }
    let (source, target) = (endpoint(flavour, &entry.source), endpoint(flavour, &entry.target));
    row.extend([node, ("source", source), ("target", target), state, info, error_count]);
    row.extend([last_updated, start_time]);
    match flavour {
        Flavour::V3 => row.extend([("source_proxy", "null".to_owned()), ("target_proxy", "null".to_owned())]),
        _ => row.push(("proxy", "null".to_owned())),
    }
    row
}

fn info(flavour: Flavour, entry: &Entry) -> String {
    match entry.said.state {
        ReplicationState::Error | ReplicationState::Crashing => {
            reason_info(flavour, entry.said.reason.as_deref().map(quoted))
        }
        _ => progress(flavour, entry),
    }
}

/// 3.x wraps the text.
fn reason_info(flavour: Flavour, reason: Option<String>) -> String {
    match reason {
        Some(reason) if flavour == Flavour::V3 => object(&[("error", reason)]),
        Some(reason) => reason,
        None => "null".to_owned(),
    }
}

/// 2.x has none.
fn progress(flavour: Flavour, entry: &Entry) -> String {
    let known = entry.said.progress.as_ref().filter(|_| flavour == Flavour::V3);
    known.map_or_else(|| "null".to_owned(), |progress| object(&progress.members(flavour, true)))
}

/// The state that a document's own members give: a terminal one or none.
fn stored_state(id: &str, doc: &Document) -> Option<ReplicationState> {
    let json = doc.json(id, doc.winner(), false)?;
    // Most have none; parsing thousands for nothing would be slow.
    if !json.contains("\"_replication_state\":") {
        return None;
    }
    let value: Value = serde_json::from_str(&json).ok()?;
    match value["_replication_state"].as_str()? {
        "completed" => Some(ReplicationState::Completed),
        "failed" => Some(ReplicationState::Failed),
        _ => None,
    }
}

/// What a document that is no job says of itself.
fn stored_row(flavour: Flavour, name: &str, id: &str, doc: &Document) -> Members {
    let json = doc.json(id, doc.winner(), false).unwrap_or_default();
    let stored = members(&json).unwrap_or_default();
    let raw = |name: &str| stored.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let shown = |name: &str| {
        let value = raw(name).and_then(|value| serde_json::from_str(&value).ok()).unwrap_or(Value::Null);
        endpoint(flavour, &value)
    };
    let null = || "null".to_owned();
    let state_time = raw("_replication_state_time").unwrap_or_else(null);
    let state = stored_state(id, doc);
    let (info, error_count, start_time) = match state {
        Some(ReplicationState::Completed) => {
            let stats = raw("_replication_stats").unwrap_or_else(|| "{}".to_owned());
            let mut stats = members(&stats).unwrap_or_default();
            let at = stats.iter().position(|(name, _)| name == "start_time");
            let start_time = at.map_or_else(null, |at| stats.remove(at).1);
            let stats: Vec<(&str, String)> =
                stats.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
            (object(&stats), 0, start_time)
        }
        Some(_) => (reason_info(flavour, raw("_replication_state_reason")), 1, state_time.clone()),
        None => (null(), 0, null()),
    };
    vec![
        ("database", quoted(name)),
        ("doc_id", quoted(id)),
        ("id", null()),
        ("source", shown("source")),
        ("target", shown("target")),
        ("state", state.map_or_else(null, |state| quoted(state.as_str()))),
        ("error_count", error_count.to_string()),
        ("info", info),
        ("start_time", start_time),
        ("last_updated", state_time),
    ]
}

/// An endpoint as it is shown, as JSON: a URL with a slash at its end, its password masked before 3.x, without
/// its userinfo since.
fn endpoint(flavour: Flavour, given: &Value) -> String {
    let Some(text) = given.as_str().or_else(|| given["url"].as_str()) else { return "null".to_owned() };
    let Some((scheme, rest)) = text.split_once("://") else { return quoted(text) };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let authority = match authority.rsplit_once('@') {
        None => authority.to_owned(),
        Some((_, host)) if flavour == Flavour::V3 => host.to_owned(),
        Some((userinfo, host)) => match userinfo.split_once(':') {
            Some((user, _)) => format!("{user}:*****@{host}"),
            None => authority.to_owned(),
        },
    };
    let slash = if path.ends_with('/') || path.contains('?') { "" } else { "/" };
    quoted(&format!("{scheme}://{authority}{path}{slash}"))
}

fn jobs(state: &State, request: &Request) -> Outcome {
    let limit = number(request, "limit")?.unwrap_or(JOBS_LIMIT);
    let skip = number(request, "skip")?.unwrap_or(0);
    let all = all_jobs(state);
    let (total, offset) = (all.len(), skip.min(all.len()));
    let page: Vec<String> = all.into_iter().skip(skip).take(limit).map(|(_, job)| job).collect();
    Ok(Reply::ok(format!("{{\"total_rows\":{total},\"offset\":{offset},\"jobs\":[{}]}}", page.join(","))))
}

/// All jobs with their ids, in the order of these.
fn all_jobs(state: &State) -> Vec<(String, String)> {
    let of_docs = state.replicator.live(&state.databases).filter(|(.., entry)| {
        use ReplicationState::{Crashing, Pending, Running};
        matches!(entry.said.state, Running | Pending | Crashing)
    });
    let of_docs = of_docs.map(|(name, id, entry)| (entry, Some((name, id))));
    let transient = state.replicator.transient.values().map(|entry| (entry, None));
    let mut jobs: Vec<(String, String)> = of_docs
        .chain(transient)
        .map(|(entry, doc)| (entry.id.clone(), job(state.flavour, doc, entry)))
        .collect();
    jobs.sort();
    jobs
}

fn job(flavour: Flavour, doc: Option<(&str, &str)>, entry: &Entry) -> String {
    let running = entry.said.state == ReplicationState::Running;
    let null = || "null".to_owned();
    let pid = if running { pid(entry) } else { null() };
    let history: Vec<String> = entry.history.iter().map(happened).collect();
    let mut job = vec![
        ("database", doc.map_or_else(null, |(name, _)| quoted(name))),
        ("id", quoted(&entry.id)),
        ("pid", pid),
        ("source", endpoint(flavour, &entry.source)),
        ("target", endpoint(flavour, &entry.target)),
        ("user", null()),
        ("doc_id", doc.map_or_else(null, |(_, id)| quoted(id))),
    ];
    if flavour == Flavour::V3 {
        job.push(("info", progress(flavour, entry)));
    }
    job.push(("history", format!("[{}]", history.join(","))));
    job.push(("node", quoted(NODE)));
    job.push(("start_time", quoted(&time(entry.start_time))));
    object(&job)
}

fn pid(entry: &Entry) -> String {
    quoted(&format!("<0.{}.0>", 1000 + entry.pid))
}

fn happened(happened: &Happened) -> String {
    let mut members = vec![("timestamp", quoted(&time(happened.at))), ("type", quoted(happened.kind))];
    members.extend(happened.reason.as_ref().map(|reason| ("reason", quoted(reason))));
    object(&members)
}

/// Answers `GET /_active_tasks`; 2.x asks for no admin.
pub(crate) fn active_tasks(state: &State, who: &Who) -> Outcome {
    if state.flavour != Flavour::V2 {
        need_admin(who)?;
    }
    let of_docs = state.replicator.live(&state.databases);
    let of_docs = of_docs.map(|(name, id, entry)| (entry, Some((name, id, &state.databases[name]))));
    let transient = state.replicator.transient.values().map(|entry| (entry, None));
    let running = of_docs.chain(transient).filter(|(entry, _)| entry.said.state == ReplicationState::Running);
    let tasks: Vec<String> = running.map(|(entry, doc)| task(state.flavour, doc, entry)).collect();
    Ok(Reply::ok(format!("[{}]", tasks.join(","))))
}

fn task(flavour: Flavour, doc: Option<(&str, &str, &Database)>, entry: &Entry) -> String {
    let null = || "null".to_owned();
    let progress = entry.said.progress.clone().unwrap_or_default();
    let old = flavour == Flavour::V1;
    // These show URLs as 3.x does everywhere, from 2.x on.
    let shown = |given: &Value| endpoint(if old { flavour } else { Flavour::V3 }, given);
    let mut task: Members = Vec::new();
    if !old {
        task.push(("node", quoted(NODE)));
    }
    task.push(("pid", pid(entry)));
    if flavour == Flavour::V3 {
        task.push(("process_status", quoted("waiting")));
        task.push(("bulk_get_attempts", progress.bulk_get_docs.to_string()));
        task.push(("bulk_get_docs", progress.bulk_get_docs.to_string()));
    }
    if !old {
        task.push(("changes_pending", or_null(progress.changes_pending)));
    }
    task.push(("checkpoint_interval", if old { "5000" } else { "30000" }.to_owned()));
    let checkpointed = match progress.checkpointed_source_seq.as_str() {
        "0" if flavour == Flavour::V2 => "0".to_owned(),
        other => seq(flavour, other),
    };
    task.push(("checkpointed_source_seq", checkpointed));
    task.push(("continuous", entry.continuous.to_string()));
    if !old {
        task.push(("database", doc.map_or_else(null, |(name, id, db)| quoted(&shard(name, id, db)))));
    }
    task.push(("doc_id", doc.map_or_else(null, |(_, id, _)| quoted(id))));
    task.push(("doc_write_failures", progress.doc_write_failures.to_string()));
    task.push(("docs_read", progress.docs_read.to_string()));
    task.push(("docs_written", progress.docs_written.to_string()));
    task.push(("missing_revisions_found", progress.missing_revisions_found.to_string()));
    if old {
        task.push(("progress", "0".to_owned()));
    }
    task.push(("replication_id", quoted(&entry.id)));
    task.push(("revisions_checked", progress.revisions_checked.to_string()));
    task.push(("source", shown(&entry.source)));
    task.push(("source_seq", seq(flavour, &progress.source_seq)));
    task.push(("started_on", entry.start_time.as_second().to_string()));
    task.push(("target", shown(&entry.target)));
    if !old {
        task.push(("through_seq", seq(flavour, &progress.source_seq)));
    }
    task.push(("type", quoted("replication")));
    task.push(("updated_on", entry.last_updated.as_second().to_string()));
    if !old {
        task.push(("user", null()));
    }
    object(&task)
}

/// What a shard of a replicator database is called.
fn shard(name: &str, id: &str, db: &Database) -> String {
    let (at, n_shards) = (db.shard_of(id) as u64, db.n_shards() as u64);
    let bound = |at: u64| (at << 32) / n_shards;
    format!("shards/{:08x}-{:08x}/{name}.{}", bound(at), bound(at + 1) - 1, db.created_seconds)
}
