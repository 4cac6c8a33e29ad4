//! What of a document in `_users` or a replicator database may leave: named members of the expected types, no others.
//!
//! Guarantees that no login, query string, header, token, hash or free text of such a document leaves, in whatever
//! shape it is: what is not on the list, or is of another type than it should be, is left out. Of `source` and `target`
//! the URL alone is told, as a text, and a reason only redacted. Other databases' documents are not touched.

use percent_encoding::percent_decode_str;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::pure::document::{Document, members};
use crate::pure::redact::Redactor;
use crate::pure::rep_error;
use crate::pure::url::shown_url;

/// Which members of a document may leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redaction {
    /// An ordinary database: all of them.
    None,
    /// `_users`.
    Users,
    /// `_replicator` and every database whose name ends in `/_replicator`.
    Replicator,
}

/// What a member must be to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A text.
    Text,
    /// A number, `true`, `false`.
    Plain,
    /// A text, a number, `true`, `false`.
    Scalar,
    /// Texts in a list.
    Texts,
    /// An object whose members are plain, or positions and times.
    Stats,
    /// A URL, or an object with one: told without login and query.
    Url,
    /// Why a replication fails: told redacted.
    Reason,
}

impl Redaction {
    /// By the database's name.
    pub fn of_db(db: &str) -> Redaction {
        match db {
            "_users" => Redaction::Users,
            "_replicator" => Redaction::Replicator,
            _ if db.ends_with("/_replicator") => Redaction::Replicator,
            _ => Redaction::None,
        }
    }

    /// What a member must be to leave; `None`: it stays. `selector`, `doc_ids` and `query_params` hold values of
    /// documents, `socket_options` and `since_seq` are free text.
    fn kind(self, name: &str) -> Option<Kind> {
        let kind = match (self, name) {
            (_, "_id" | "_rev") => Kind::Text,
            (_, "_deleted") => Kind::Plain,
            (Redaction::Users, "name" | "type") => Kind::Text,
            (Redaction::Users, "roles") => Kind::Texts,
            (Redaction::Replicator, "source" | "target") => Kind::Url,
            (Redaction::Replicator, "filter" | "owner" | "_replication_id" | "_replication_state") => {
                Kind::Text
            }
            // A number before 1.2.
            (Redaction::Replicator, "_replication_state_time" | "_replication_start_time") => Kind::Scalar,
            (Redaction::Replicator, "_replication_stats") => Kind::Stats,
            (Redaction::Replicator, "_replication_state_reason") => Kind::Reason,
            (
                Redaction::Replicator,
                "continuous"
                | "create_target"
                | "cancel"
                | "use_checkpoints"
                | "checkpoint_interval"
                | "use_bulk_get"
                | "winning_revs_only"
                | "worker_processes"
                | "worker_batch_size"
                | "http_connections"
                | "connection_timeout"
                | "retries_per_request",
            ) => Kind::Plain,
            _ => return None,
        };
        Some(kind)
    }

    /// The document with what may leave of it, in its order; scalars byte for byte. Nothing is left of what is no
    /// object. With [`Redaction::None`] everything is.
    pub fn apply(self, doc: Document) -> Document {
        if self == Redaction::None {
            return doc;
        }
        let mut out = String::from("{");
        for (name, value) in members(doc.get()) {
            let told = self.kind(&name).and_then(|kind| told(kind, &value, doc.get()));
            if let Some(told) = told {
                push_member(&mut out, &name, &told);
            }
        }
        out.push('}');
        Document::parse(out).expect("members of an object make an object")
    }
}

/// Members of `_replication_stats` that are texts: an opaque position of 2.0 and later, and a time.
const STATS_TEXTS: &[&str] = &["checkpointed_source_seq", "source_seq", "through_seq", "start_time"];

/// The JSON text of a member, as it may leave; `None`: not at all.
fn told(kind: Kind, json: &RawValue, doc: &str) -> Option<String> {
    let value: Value = serde_json::from_str(json.get()).ok()?;
    let as_it_is = |fits: bool| fits.then(|| json.get().to_owned());
    let is_plain = |value: &Value| value.is_number() || value.is_boolean();
    match kind {
        Kind::Text => as_it_is(value.is_string()),
        Kind::Plain => as_it_is(is_plain(&value)),
        Kind::Scalar => as_it_is(value.is_string() || is_plain(&value)),
        Kind::Texts => as_it_is(value.as_array()?.iter().all(Value::is_string)),
        Kind::Stats if !value.is_object() => None,
        Kind::Stats => {
            let mut out = String::from("{");
            for (name, json) in members(json.get()) {
                let kind = if STATS_TEXTS.contains(&name.as_str()) { Kind::Scalar } else { Kind::Plain };
                // `changes_pending` may be `null`.
                let json =
                    if json.get() == "null" { Some("null".to_owned()) } else { told(kind, &json, doc) };
                if let Some(json) = json {
                    push_member(&mut out, &name, &json);
                }
            }
            Some(out + "}")
        }
        Kind::Url => {
            let url = value.as_str().or_else(|| value.get("url")?.as_str())?;
            Some(Value::from(shown_url(url)).to_string())
        }
        Kind::Reason => Some(Value::from(reason(value.as_str()?, doc)).to_string()),
    }
}

fn push_member(out: &mut String, name: &str, json: &str) {
    if out.len() > 1 {
        out.push(',');
    }
    *out += &Value::from(name).to_string();
    out.push(':');
    *out += json;
}

/// Why a replication fails, without what its document knows to be secret, nor what looks like it.
fn reason(text: &str, doc: &str) -> String {
    rep_error::analyze(&secrets(doc).redact(text, usize::MAX)).raw
}

/// What a replication document (JSON) knows to be secret: passwords and queries in its URLs, and every text in the
/// members that hold headers, logins and proxies. Not the names of users: they are words as databases' are.
pub fn secrets(doc: &str) -> Redactor {
    let mut secrets = Vec::new();
    for (name, json) in members(doc) {
        let value: Value = serde_json::from_str(json.get()).unwrap_or_default();
        match name.as_str() {
            "source" | "target" => match &value {
                Value::Object(parts) => {
                    for (name, part) in parts {
                        collect(part, name == "url", &mut secrets);
                    }
                }
                other => collect(other, true, &mut secrets),
            },
            "proxy" | "source_proxy" | "target_proxy" => collect(&value, true, &mut secrets),
            "headers" | "auth" | "oauth" => collect(&value, false, &mut secrets),
            _ => {}
        }
    }
    Redactor::new(secrets.iter().map(String::as_str))
}

fn collect(value: &Value, is_url: bool, secrets: &mut Vec<String>) {
    match value {
        Value::String(text) if is_url => collect_url(text, secrets),
        Value::String(text) => secrets.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| collect(item, is_url, secrets)),
        // Names of members are no secrets, but the name in a login is one word of several.
        Value::Object(members) => {
            let parts = members.iter().filter(|(name, _)| *name != "username");
            parts.for_each(|(_, part)| collect(part, is_url, secrets));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn collect_url(url: &str, secrets: &mut Vec<String>) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let password =
        rest.rsplit_once('@').and_then(|(login, _)| login.split_once(':')).map(|(_, password)| password);
    let query = rest.split_once('?').map(|(_, query)| query);
    let values = query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
    for text in password.into_iter().chain(query).chain(values.map(|(_, value)| value)) {
        secrets.push(text.to_owned());
        secrets.push(percent_decode_str(text).decode_utf8_lossy().into_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(redaction: Redaction, doc: &str, expected: &str) {
        let told = redaction.apply(Document::parse(doc.to_owned()).unwrap());
        assert_eq!(told.get(), expected, "{doc}");
    }

    #[test]
    fn databases_are_known_by_their_names() {
        for (db, redaction) in [
            ("_users", Redaction::Users),
            ("_replicator", Redaction::Replicator),
            ("eu/_replicator", Redaction::Replicator),
            ("orders", Redaction::None),
            ("my_replicator", Redaction::None),
        ] {
            assert_eq!(Redaction::of_db(db), redaction, "{db}");
        }
        check(Redaction::None, r#"{"password":"x", "z":1.0}"#, r#"{"password":"x", "z":1.0}"#);
    }

    #[test]
    fn of_a_user_name_type_and_roles_leave() {
        check(
            Redaction::Users,
            r#"{"_id":"org.couchdb.user:a","_rev":"1-a","name":"a","type":"user","roles":["x"],"password":"p","derived_key":"k","salt":"s","password_scheme":"pbkdf2","email":"e"}"#,
            r#"{"_id":"org.couchdb.user:a","_rev":"1-a","name":"a","type":"user","roles":["x"]}"#,
        );
        check(
            Redaction::Users,
            r#"{"_deleted":true,"name":{"p":1},"roles":["x",{"p":1}]}"#,
            r#"{"_deleted":true}"#,
        );
    }

    #[test]
    fn of_a_replication_named_members_of_the_expected_types_leave() {
        check(
            Redaction::Replicator,
            r#"{"_id":"r","_rev":"1-a","source":"https://u:p@h/db?token=t","target":{"url":"https://u:p@h/to/","headers":{"Authorization":"x"},"auth":{"basic":{"username":"u","password":"p"}}},"filter":"app/mine","query_params":{"a":"b"},"selector":{"a":"b"},"doc_ids":["a"],"continuous":true,"create_target":false,"checkpoint_interval":5e3,"worker_processes":4,"owner":"anna","user_ctx":{"name":"u","roles":["_admin"]},"proxy":"http://u:p@h:1","source_proxy":"x","target_proxy":"x","socket_options":"[{keepalive,true}]","oauth":{"token":"x"},"since_seq":"1-x","note":"free"}"#,
            r#"{"_id":"r","_rev":"1-a","source":"https://h/db","target":"https://h/to/","filter":"app/mine","continuous":true,"create_target":false,"checkpoint_interval":5e3,"worker_processes":4,"owner":"anna"}"#,
        );
        check(
            Redaction::Replicator,
            r#"{"_replication_id":"a1","_replication_state":"error","_replication_state_time":1297974122,"_replication_state_reason":"db_not_found: could not open http://u:*****@h/db/","_replication_stats":{"docs_read":8,"changes_pending":null,"checkpointed_source_seq":"9-g1","start_time":"2026-11-21T21:45:47Z","note":"free","more":{"a":1}}}"#,
            r#"{"_replication_id":"a1","_replication_state":"error","_replication_state_time":1297974122,"_replication_state_reason":"db_not_found: could not open http://h/db/","_replication_stats":{"docs_read":8,"changes_pending":null,"checkpointed_source_seq":"9-g1","start_time":"2026-11-21T21:45:47Z"}}"#,
        );
        // Of another type than they should be, or of no use.
        check(
            Redaction::Replicator,
            r#"{"source":"u:p@h/db","target":{"URL":"http://h"},"filter":{"a":"b"},"continuous":"p","owner":["p"],"worker_processes":{"p":1},"_replication_state_reason":{"error":"p"},"_replication_stats":"p","_replication_id":["p"],"_rev":{"p":1}}"#,
            r#"{"source":"***"}"#,
        );
        check(Redaction::Replicator, r#"{"source":"orders","target":7}"#, r#"{"source":"orders"}"#);
        check(Redaction::Replicator, "[1]", "{}");
    }

    #[test]
    fn what_a_document_knows_to_be_secret_is_not_in_its_reason_either() {
        let doc = |reason: &str| {
            format!(
                r#"{{"source":{{"url":"http://anna:canary%40pass@h/anna?q=canary-query","headers":{{"X":"Basic canary-header"}},"auth":{{"basic":{{"username":"anna","password":"canary-auth"}}}}}},"target":"http://h/","proxy":"socks5://p:canary-proxy@h","_replication_state_reason":{}}}"#,
                Value::from(reason)
            )
        };
        let told = |reason: &str| Redaction::Replicator.apply(Document::parse(doc(reason)).unwrap());
        for secret in
            ["canary%40pass", "canary@pass", "canary-query", "canary-header", "canary-auth", "canary-proxy"]
        {
            let told = told(&format!("The door said {secret} is not anna"));
            assert!(!told.get().contains("canary"), "{}", told.get());
            assert!(told.get().contains("The door said *** is not anna"), "{}", told.get());
        }
    }
}
