//! From something told of a replication to the event that is sent.
//!
//! `data` is made once, when it happens, and kept as text until it is delivered, so that what is told again after a
//! kill is the same. Guarantees that only named members leave, URLs without userinfo and query, and reasons in plain
//! words with names and passwords taken out (DESIGN §2.6).

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::pure::about::About;
use crate::pure::lag::Checkpoint;
use crate::pure::message::{Event, Telling, WebhookId};
use crate::pure::remembered::Kept;
use crate::pure::rep_error::{Analysis, Class, analyze};
use crate::pure::replication::{Job, Progress, Row, State};
use crate::pure::transitions::known::TRANSIENT;
use crate::pure::transitions::{INVALID, TYPES, Told};
use crate::pure::url::shown_url;

/// What is known of a replication at the moment when something is told of it.
#[derive(Debug, Default)]
pub struct Details<'a> {
    /// What the scheduler, or its document, says.
    pub row: Option<&'a Row>,
    /// Its job, for what it has been through.
    pub job: Option<Job>,
    /// Of its document, where the row names none: source and target.
    pub endpoints: (Option<String>, Option<String>),
    /// From the `_local` document of its checkpoint, where one side is this server.
    pub checkpoint: Option<Checkpoint>,
    /// Changes that the source still has, where the counters do not say it.
    pub changes_pending: Option<u64>,
    /// What was found in its document.
    pub findings: Option<Value>,
    /// How often it was submitted again.
    pub n_resubmissions: u32,
}

/// `data` of the payload (DESIGN §5).
#[derive(Serialize)]
struct Data<'a> {
    webhook: &'a str,
    db: &'a str,
    /// Of the document; `null` for one started by `_replicate`.
    id: Option<&'a str>,
    state: Option<State>,
    previous_state: Option<State>,
    replication: Replication<'a>,
    #[serde(skip_serializing_if = "Progress::is_empty")]
    progress: Progress,
    #[serde(skip_serializing_if = "Option::is_none")]
    checkpoint: &'a Option<Checkpoint>,
    #[serde(skip_serializing_if = "Option::is_none")]
    findings: &'a Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resubmissions: Option<u32>,
}

#[derive(Serialize)]
struct Replication<'a> {
    id: Option<&'a str>,
    source: Option<String>,
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_error_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    start_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_updated: Option<Timestamp>,
    #[serde(flatten)]
    error: Option<Analyzed>,
}

#[derive(Serialize)]
struct Analyzed {
    error: String,
    error_class: Class,
    error_raw: String,
    hint: &'static str,
}

/// `data` of the payload, as JSON text.
pub fn data(telling: &Telling, told: &Told, details: &Details<'_>) -> String {
    let transient = told.key.strip_prefix(TRANSIENT);
    let row = details.row;
    let url = |of_row: Option<&String>, of_doc: &Option<String>| {
        of_row.or(of_doc.as_ref()).map(|url| shown_url(url))
    };
    let crashes = details.job.as_ref().and_then(Job::crashes);
    let error = row.and_then(|row| row.info.error()).map(|reason| {
        let Analysis { error, class, hint, raw } = analyze(reason);
        Analyzed { error, error_class: class, error_raw: raw, hint }
    });
    let mut progress = row.and_then(|row| row.info.progress()).cloned().unwrap_or_default();
    if let Some(pending) = details.changes_pending {
        progress.0.insert("changes_pending".into(), json!(pending));
    }
    let data = Data {
        webhook: &telling.webhook,
        db: &telling.db,
        id: transient.is_none().then_some(told.key.as_str()),
        state: told.state,
        previous_state: told.previous,
        replication: Replication {
            id: row.and_then(|row| row.id.as_deref()).or(transient),
            source: url(row.and_then(|row| row.source.as_ref()), &details.endpoints.0),
            target: url(row.and_then(|row| row.target.as_ref()), &details.endpoints.1),
            node: row.and_then(|row| row.node.as_deref()),
            error_count: row.map(|row| row.error_count),
            first_error_at: crashes.map(|(_, first, _)| first),
            last_error_at: crashes.map(|(_, _, last)| last),
            start_time: row.and_then(|row| row.start_time),
            last_updated: row.and_then(|row| row.last_updated),
            error,
        },
        progress,
        checkpoint: &details.checkpoint,
        findings: &details.findings,
        resubmissions: Some(details.n_resubmissions).filter(|n| *n > 0),
    };
    serde_json::to_string(&data).expect("texts and numbers are always JSON")
}

/// When it became so: as CouchDB says, where that is not just now.
pub fn at(details: &Details<'_>, wall: Timestamp) -> Timestamp {
    details.row.filter(|row| row.state.is_terminal()).and_then(|row| row.last_updated).unwrap_or(wall)
}

/// The event that a kept one is, in the database that bears `mark`.
pub fn event(telling: &Telling, kept: &Kept, mark: &str) -> Option<Event> {
    let event_type = TYPES.into_iter().find(|name| *name == kept.event_type)?;
    let id = WebhookId::of(&(&telling.webhook, &telling.db, mark, &kept.key, event_type, kept.n));
    Some(made(id, event_type, kept.key.clone(), kept.at, kept.data.clone()))
}

/// The event whose dead letter holds this `payload`; its id is the letter's own.
pub fn event_of_letter(
    id: WebhookId,
    event_type: &str,
    key: &str,
    at: Timestamp,
    payload: &str,
) -> Option<Event> {
    let event_type = TYPES.into_iter().find(|name| *name == event_type)?;
    Some(made(id, event_type, key.to_owned(), at, payload.to_owned()))
}

fn made(id: WebhookId, event_type: &'static str, key: String, at: Timestamp, data: String) -> Event {
    let subject = key.strip_prefix(TRANSIENT).unwrap_or(&key).to_owned();
    let message = message(event_type, &subject, &serde_json::from_str(&data).unwrap_or_default());
    let about = About { event_type, subject, message, data: data.into_boxed_str(), is_kept: true };
    about.into_event(id, key, String::new(), at)
}

/// For people, one line: `replication edge1 (https://edge1/a -> https://cloud/a) is crashing: GET … failed: …`
fn message(event_type: &str, subject: &str, data: &Value) -> String {
    let replication = &data["replication"];
    let what = event_type.strip_prefix("replication.").unwrap_or(event_type).replace('_', " ");
    let places = match (replication["source"].as_str(), replication["target"].as_str()) {
        (Some(source), Some(target)) => format!(" ({source} -> {target})"),
        _ => String::new(),
    };
    let why = match (event_type, replication["error"].as_str()) {
        (INVALID, _) => first_finding(data),
        (_, Some(error)) => format!(": {error}"),
        _ => String::new(),
    };
    format!("replication {subject}{places}: {what}{why}")
}

fn first_finding(data: &Value) -> String {
    let errors = data["findings"].as_array().into_iter().flatten();
    let mut messages = errors.filter_map(|finding| finding["message"].as_str());
    messages.next().map(|message| format!(": {message}")).unwrap_or_default()
}
