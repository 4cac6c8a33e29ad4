//! The stand-in's answers about server, configuration, databases and logins.
//!
//! Guarantees statuses, texts and layout of the version, as recorded. What is inside a database is answered by
//! `doc_routes`, its feed by `changes_feed`.

use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::standin::couch::{Flavour, State};
use crate::standin::doc_routes;
use crate::standin::docs::{Refusal, quoted};
use crate::standin::http::{Answer, Request};
use crate::standin::quirks::SPARED;
use crate::standin::scheduler_routes;
use crate::standin::seqs;
use crate::standin::store::Database;

/// What stands in a `Location` as it is.
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// From so many wrong passwords on an account is locked (3.4 and later).
const WRONG_LOGINS_MAX: u32 = 5;
/// Who answers.
pub(crate) const NODE: &str = "couchdb@127.0.0.1";

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<String>) -> Reply {
        Reply { status, headers: Vec::new(), body: body.into() }
    }

    pub(crate) fn ok(json: impl std::fmt::Display) -> Reply {
        Reply::new(200, format!("{json}\n"))
    }

    pub(crate) fn with(mut self, name: &'static str, value: String) -> Reply {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn html(status: u16) -> Reply {
        Reply::new(status, "<html><head><title>Bad gateway</title></head><body>nginx</body></html>\n")
            .with("Content-Type", "text/html".to_owned())
    }

    pub(crate) fn refusal(refusal: &Refusal) -> Reply {
        let reason = quoted(&refusal.reason);
        Reply::new(refusal.status, format!("{{\"error\":\"{}\",\"reason\":{reason}}}\n", refusal.error))
    }

    pub(crate) fn send(self, flavour: Flavour, request: &Request, answer: Answer<'_>) -> io::Result<()> {
        let mut headers = standard_headers(flavour, request);
        if let Some((_, own)) = self.headers.iter().find(|(name, _)| *name == "Content-Type") {
            headers.retain(|(name, _)| *name != "Content-Type");
            headers.push(("Content-Type", own));
        }
        let others = self.headers.iter().filter(|(name, _)| *name != "Content-Type");
        headers.extend(others.map(|(name, value)| (*name, value.as_str())));
        answer.send(self.status, &headers, self.body.as_bytes())
    }
}

/// The headers of every answer. JSON is called so only to who asks for it, as CouchDB does.
pub(crate) fn standard_headers(flavour: Flavour, request: &Request) -> Vec<(&'static str, &'static str)> {
    let json = request.header("accept").is_some_and(|accept| accept.contains("application/json"));
    let content_type = if json { "application/json" } else { "text/plain; charset=utf-8" };
    let server = match flavour {
        Flavour::V1 => "CouchDB/1.7.1 (Erlang OTP/20)",
        Flavour::V2 => "CouchDB/2.2.0 (Erlang OTP/20)",
        Flavour::V3 => "CouchDB/3.5.0 (Erlang OTP/25)",
    };
    let mut headers =
        vec![("Cache-Control", "must-revalidate"), ("Content-Type", content_type), ("Server", server)];
    if flavour != Flavour::V1 {
        headers.push(("X-CouchDB-Body-Time", "0"));
    }
    headers
}

/// Whether `changes_feed` answers this request.
pub(crate) fn is_changes(request: &Request) -> bool {
    let segments = request.segments();
    segments.len() == 2 && segments[1] == "_changes" && matches!(request.method.as_str(), "GET" | "POST")
}

/// Whether `updates_feed` answers this request.
pub(crate) fn is_updates(request: &Request) -> bool {
    request.method == "GET" && request.segments() == ["_db_updates"]
}

/// Answers a request.
pub(crate) fn reply(state: &mut State, request: &Request) -> Reply {
    route(state, request).unwrap_or_else(|refusal| Reply::refusal(&refusal))
}

/// An answer, or why there is none.
pub(crate) type Outcome = Result<Reply, Refusal>;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Who {
    Admin,
    User(String),
    Nobody,
}

/// Checks the login, counting wrong ones.
pub(crate) fn login(state: &mut State, request: &Request) -> Result<Who, Refusal> {
    let Some((admin, admin_password)) = &state.admin else { return Ok(Who::Admin) };
    let Some(given) = request.header("authorization") else { return Ok(Who::Nobody) };
    let decoded =
        given.strip_prefix("Basic ").and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
    let text = String::from_utf8_lossy(&decoded).into_owned();
    let (name, password) = text.split_once(':').unwrap_or((&text, ""));
    let wrong = state.wrong_logins.entry(name.to_owned()).or_default();
    if state.flavour == Flavour::V3 && *wrong >= WRONG_LOGINS_MAX {
        let reason = "Account is temporarily locked due to multiple authentication failures";
        return Err(Refusal::new(403, "forbidden", reason));
    }
    if (name, password) == (admin.as_str(), admin_password.as_str()) {
        return Ok(Who::Admin);
    }
    if state.users.iter().any(|(user, known)| (name, password) == (user.as_str(), known.as_str())) {
        return Ok(Who::User(name.to_owned()));
    }
    *wrong += 1;
    Err(Refusal::new(401, "unauthorized", "Name or password is incorrect."))
}

pub(crate) fn need_admin(who: &Who) -> Result<(), Refusal> {
    if *who == Who::Admin {
        return Ok(());
    }
    Err(Refusal::new(401, "unauthorized", "You are not a server admin."))
}

/// Finds a database and checks that `who` may read it.
pub(crate) fn database<'a>(state: &'a mut State, name: &str, who: &Who) -> Result<&'a mut Database, Refusal> {
    let flavour = state.flavour;
    let missing = if flavour == Flavour::V1 { "no_db_file" } else { "Database does not exist." };
    let db = state.databases.get_mut(name).ok_or_else(|| Refusal::new(404, "not_found", missing))?;
    if *who != Who::Admin && !is_member(flavour, db, who) {
        return Err(match who {
            Who::Nobody => Refusal::new(401, "unauthorized", "You are not authorized to access this db."),
            _ => Refusal::new(403, "forbidden", "You are not allowed to access this db."),
        });
    }
    Ok(db)
}

fn is_member(flavour: Flavour, db: &Database, who: &Who) -> bool {
    let security = security(flavour, db);
    let members = || names(&security, "members", "names").chain(names(&security, "members", "roles"));
    let open = members().next().is_none();
    open || [names(&security, "members", "names"), names(&security, "admins", "names")]
        .into_iter()
        .flatten()
        .any(|name| matches!(who, Who::User(user) if *user == name))
}

pub(crate) fn names(security: &Value, group: &str, kind: &str) -> impl Iterator<Item = String> {
    let list = security.pointer(&format!("/{group}/{kind}")).and_then(Value::as_array).cloned();
    list.unwrap_or_default().into_iter().filter_map(|name| name.as_str().map(str::to_owned))
}

pub(crate) fn security(flavour: Flavour, db: &Database) -> Value {
    serde_json::from_str(&security_text(flavour, db)).unwrap_or_default()
}

pub(crate) fn security_text(flavour: Flavour, db: &Database) -> String {
    let default = match flavour {
        Flavour::V3 => r#"{"members":{"roles":["_admin"]},"admins":{"roles":["_admin"]}}"#,
        _ => "{}",
    };
    db.security.clone().unwrap_or_else(|| default.to_owned())
}

fn route(state: &mut State, request: &Request) -> Outcome {
    let who = login(state, request)?;
    let segments = request.segments();
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    let method = if request.method == "HEAD" { "GET" } else { request.method.as_str() };
    let (old, current) = (state.flavour == Flavour::V1, state.flavour == Flavour::V3);
    match (method, path.as_slice()) {
        ("GET", []) => Ok(Reply::ok(welcome(state.flavour))),
        ("GET", ["_up"]) if current => Ok(Reply::ok(r#"{"status":"ok","seeds":{}}"#)),
        ("GET", ["_up"]) if !old => Ok(Reply::ok(r#"{"status":"ok"}"#)),
        ("GET", ["_membership"]) if !old => {
            if current {
                need_admin(&who)?;
            }
            let others = (1..=state.quirks.n_other_nodes).map(|n| format!(r#","couchdb@10.0.0.{n}""#));
            let nodes = format!(r#"["{NODE}"{}]"#, others.collect::<String>());
            Ok(Reply::ok(format!(r#"{{"all_nodes":{nodes},"cluster_nodes":{nodes}}}"#)))
        }
        ("GET", ["_session"]) => Ok(session(&who)),
        ("GET", ["_all_dbs"]) => {
            if current {
                need_admin(&who)?;
            }
            all_dbs(state, request)
        }
        ("GET", ["_active_tasks"]) => scheduler_routes::active_tasks(state, &who),
        (_, ["_scheduler", rest @ ..]) => scheduler_routes::scheduler(state, &who, method, rest, request),
        ("POST", ["_dbs_info"]) if !old && !state.quirks.no_dbs_info => {
            if current {
                need_admin(&who)?;
            }
            dbs_info(state, request)
        }
        (_, ["_config", rest @ ..]) if old => config(state, &who, method, rest, &request.body),
        ("GET", ["_node", "_local"]) if current => Ok(Reply::ok(format!(r#"{{"name":"{NODE}"}}"#))),
        ("GET", ["_node", _]) if !old => {
            Err(Refusal::new(400, "bad_request", "Incomplete path to _node request"))
        }
        (_, ["_node", "_local" | NODE, "_config", rest @ ..]) if !old => {
            config(state, &who, method, rest, &request.body)
        }
        (_, [db]) => on_database(state, &who, method, db, request),
        (_, [db, rest @ ..]) => doc_routes::in_database(state, &who, method, db, rest, request),
        _ => Err(Refusal::new(405, "method_not_allowed", "Only GET,HEAD allowed")),
    }
}

fn welcome(flavour: Flavour) -> &'static str {
    match flavour {
        Flavour::V1 => {
            r#"{"couchdb":"Welcome","uuid":"86e0b14fef53ded4bab67c9097993fae","version":"1.7.1","vendor":{"name":"The Apache Software Foundation","version":"1.7.1"}}"#
        }
        Flavour::V2 => {
            r#"{"couchdb":"Welcome","version":"2.2.0","git_sha":"none","features":["pluggable-storage-engines","scheduler"],"vendor":{"name":"The Apache Software Foundation"}}"#
        }
        Flavour::V3 => {
            r#"{"couchdb":"Welcome","version":"3.5.0","git_sha":"11f0d36","uuid":"3426545b193077e19a787b31cbf1a75f","features":["quickjs","access-ready","partitioned","pluggable-storage-engines","reshard","scheduler"],"vendor":{"name":"The Apache Software Foundation"}}"#
        }
    }
}

fn session(who: &Who) -> Reply {
    let (name, roles) = match who {
        Who::Admin => ("\"admin\"".to_owned(), "\"_admin\""),
        Who::User(name) => (quoted(name), ""),
        Who::Nobody => ("null".to_owned(), ""),
    };
    Reply::ok(format!(r#"{{"ok":true,"userCtx":{{"name":{name},"roles":[{roles}]}},"info":{{}}}}"#))
}

/// `limit` and `startkey` are for 2.x and 3.x; 1.x does not look at them.
fn all_dbs(state: &State, request: &Request) -> Outcome {
    let pages = state.flavour != Flavour::V1;
    let value = |name: &str| request.query_value(name).filter(|_| pages);
    let start: Option<String> =
        value("startkey").or(value("start_key")).map(|text| json(text.as_bytes())).transpose()?;
    let limit = value("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
    let names = state.databases.range(start.unwrap_or_default()..).take(limit);
    let names: Vec<String> = names.map(|(name, _)| quoted(name)).collect();
    Ok(Reply::ok(format!("[{}]", names.join(","))))
}

/// Names that `_dbs_info` takes.
const DBS_INFO_MAX: usize = 100;

fn dbs_info(state: &mut State, request: &Request) -> Outcome {
    let body: Value = json(&request.body)?;
    let missing = || Refusal::new(400, "bad_request", "`keys` member must exist.");
    let keys = body.get("keys").and_then(Value::as_array).cloned().ok_or_else(missing)?;
    if keys.len() > state.quirks.dbs_info_max.unwrap_or(DBS_INFO_MAX) {
        return Err(Refusal::new(400, "bad_request", "too_many_keys"));
    }
    let mut infos = Vec::new();
    for name in keys.iter().filter_map(Value::as_str) {
        infos.push(match info(state, name) {
            Some(info) => format!("{{\"key\":{},\"info\":{info}}}", quoted(name)),
            None => format!("{{\"key\":{},\"error\":\"not_found\"}}", quoted(name)),
        });
    }
    Ok(Reply::ok(format!("[{}]", infos.join(","))))
}

/// How many ways there are to spell an idle database's `update_seq` on a cluster.
const SPELLINGS: u32 = 6;

/// `GET /db` as the version lays it out; sizes are made up, but `_local` documents add to what is in use (seen).
fn info(state: &mut State, name: &str) -> Option<String> {
    // The node that happens to answer for each shard; alone it is always the same.
    let salt = if state.quirks.n_other_nodes > 0 { state.rng.u32(..SPELLINGS) } else { 0 };
    if state.quirks.closes_idle && name != SPARED {
        state.databases.get_mut(name)?.opened_micros += 1_000;
    }
    let db = state.databases.get(name)?;
    let bytes = 2402 + db.active_bytes();
    let n_live = db.live_docs().count();
    let n_deleted = db.ids().len() - n_live;
    let (name, seq) = (quoted(name), seqs::spell(state.flavour, db.incarnation, &db.end(), salt, false));
    Some(match state.flavour {
        Flavour::V1 => format!(
            r#"{{"db_name":{name},"doc_count":{n_live},"doc_del_count":{n_deleted},"update_seq":{seq},"purge_seq":0,"compact_running":false,"disk_size":{},"data_size":{bytes},"instance_start_time":"{}","disk_format_version":6,"committed_update_seq":{seq}}}"#,
            db.file_bytes(),
            db.opened_micros
        ),
        Flavour::V2 => format!(
            r#"{{"db_name":{name},"update_seq":{seq},"sizes":{{"file":38275,"external":692,"active":{bytes}}},"purge_seq":0,"other":{{"data_size":692}},"doc_del_count":{n_deleted},"doc_count":{n_live},"disk_size":38275,"disk_format_version":6,"data_size":{bytes},"compact_running":false,"cluster":{{"q":{},"n":1,"w":1,"r":1}},"instance_start_time":"0"}}"#,
            db.end().0.len()
        ),
        Flavour::V3 => format!(
            r#"{{"instance_start_time":"{}","db_name":{name},"purge_seq":"0-g1AAAABdeJzLYWBg","update_seq":{seq},"sizes":{{"file":57746,"external":377,"active":{bytes}}},"props":{{}},"doc_del_count":{n_deleted},"doc_count":{n_live},"disk_format_version":8,"compact_running":false,"cluster":{{"q":{},"n":1,"w":1,"r":1}}}}"#,
            if state.quirks.no_creation_time { 0 } else { db.created_seconds },
            db.end().0.len()
        ),
    })
}

fn config(state: &mut State, who: &Who, method: &str, path: &[&str], body: &[u8]) -> Outcome {
    need_admin(who)?;
    let object = |values: &std::collections::BTreeMap<String, String>| {
        serde_json::to_string(values).expect("texts are JSON")
    };
    let unknown = || Refusal::new(404, "not_found", "unknown_config_value");
    match (method, path) {
        ("GET", []) => Ok(Reply::ok(serde_json::to_string(&state.config).expect("texts are JSON"))),
        ("GET", [section]) => Ok(Reply::ok(state.config.get(*section).map_or("{}".to_owned(), object))),
        ("GET", [section, key]) => {
            let value = state.config.get(*section).and_then(|keys| keys.get(*key)).ok_or_else(unknown)?;
            Ok(Reply::ok(quoted(value)))
        }
        ("PUT" | "DELETE", ["os_daemons", _]) => {
            Err(Refusal::new(403, "forbidden", "Config section blacklisted for modification over HTTP API."))
        }
        ("PUT", [section, key]) => {
            let value: String = json(body)?;
            let old = state.config.entry((*section).to_owned()).or_default().insert((*key).to_owned(), value);
            Ok(Reply::ok(quoted(&old.unwrap_or_default())))
        }
        ("DELETE", [section, key]) => {
            let old = state.config.get_mut(*section).and_then(|keys| keys.remove(*key));
            old.map(|old| Reply::ok(quoted(&old))).ok_or_else(unknown)
        }
        _ => Err(Refusal::new(405, "method_not_allowed", "Only GET,PUT,DELETE allowed")),
    }
}

fn on_database(state: &mut State, who: &Who, method: &str, name: &str, request: &Request) -> Outcome {
    if method == "PUT" || state.flavour == Flavour::V1 {
        check_name(name)?;
    }
    match method {
        "PUT" => {
            need_admin(who)?;
            if !state.create_db(name) {
                let reason = "The database could not be created, the file already exists.";
                return Err(Refusal::new(412, "file_exists", reason));
            }
            Ok(Reply::new(201, "{\"ok\":true}\n").with("Location", location(request, &[name])))
        }
        "DELETE" => {
            need_admin(who)?;
            if state.delete_db(name) {
                return Ok(Reply::ok("{\"ok\":true}"));
            }
            let reason = if state.flavour == Flavour::V1 { "missing" } else { "Database does not exist." };
            Err(Refusal::new(404, "not_found", reason))
        }
        "GET" => {
            database(state, name, who)?;
            Ok(Reply::ok(info(state, name).expect("it was just found")))
        }
        "POST" => {
            let id = format!("{:032x}", state.rng.u128(..));
            doc_routes::put_doc(state, who, name, &id, request)
        }
        _ => Err(Refusal::new(405, "method_not_allowed", "Only DELETE,GET,HEAD,POST,PUT allowed")),
    }
}

pub(crate) fn check_name(name: &str) -> Result<(), Refusal> {
    let fine =
        |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || "_$()+-/".contains(letter);
    let system = ["_users", "_replicator", "_global_changes"].contains(&name);
    if system || (name.starts_with(|first: char| first.is_ascii_lowercase()) && name.chars().all(fine)) {
        return Ok(());
    }
    let rule = "Only lowercase characters (a-z), digits (0-9), and any of the characters _, $, (, ), +, -, and / \
                are allowed. Must begin with a letter.";
    Err(Refusal::new(400, "illegal_database_name", format!("Name: '{name}'. {rule}")))
}

pub(crate) fn location(request: &Request, path: &[&str]) -> String {
    format!("http://{}/{}", request.header("host").unwrap_or("127.0.0.1"), path_text(path))
}

/// Segments as they stand in a path.
pub(crate) fn path_text(path: &[&str]) -> String {
    let path: Vec<String> =
        path.iter().map(|part| utf8_percent_encode(part, &UNRESERVED).to_string()).collect();
    path.join("/")
}

/// `instance_start_time`: when it was opened on 1.x, nothing on 2.x, when it was made on 3.x.
pub(crate) fn start_time(flavour: Flavour, db: &Database) -> i64 {
    match flavour {
        Flavour::V1 => db.opened_micros,
        Flavour::V2 => 0,
        Flavour::V3 => db.created_seconds,
    }
}

pub(crate) fn text(body: &[u8]) -> Result<&str, Refusal> {
    std::str::from_utf8(body).map_err(|_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON"))
}

pub(crate) fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON"))
}
