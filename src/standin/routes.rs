//! The stand-in's answers to everything but `_changes`: server, configuration, databases, documents, logins.
//!
//! Guarantees statuses, texts and layout of the version, as recorded. `changes_feed` has the feed.

use std::fmt::Write;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::standin::couch::{Flavour, State};
use crate::standin::docs::{Incoming, Refusal, Rev, quoted};
use crate::standin::http::{Answer, Request};
use crate::standin::quirks::take_one;
use crate::standin::seqs;
use crate::standin::store::Database;

/// What stands in a `Location` as it is.
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
/// From so many wrong passwords on an account is locked (3.4 and later).
const WRONG_LOGINS_MAX: u32 = 5;
const NODE: &str = "couchdb@127.0.0.1";

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Reply {
    fn new(status: u16, body: impl Into<String>) -> Reply {
        Reply { status, headers: Vec::new(), body: body.into() }
    }

    fn ok(json: impl std::fmt::Display) -> Reply {
        Reply::new(200, format!("{json}\n"))
    }

    fn with(mut self, name: &'static str, value: String) -> Reply {
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

/// Answers a request.
pub(crate) fn reply(state: &mut State, request: &Request) -> Reply {
    route(state, request).unwrap_or_else(|refusal| Reply::refusal(&refusal))
}

type Outcome = Result<Reply, Refusal>;

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

fn need_admin(who: &Who) -> Result<(), Refusal> {
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

fn names(security: &Value, group: &str, kind: &str) -> impl Iterator<Item = String> {
    let list = security.pointer(&format!("/{group}/{kind}")).and_then(Value::as_array).cloned();
    list.unwrap_or_default().into_iter().filter_map(|name| name.as_str().map(str::to_owned))
}

fn security(flavour: Flavour, db: &Database) -> Value {
    serde_json::from_str(&security_text(flavour, db)).unwrap_or_default()
}

fn security_text(flavour: Flavour, db: &Database) -> String {
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
            Ok(Reply::ok(format!(r#"{{"all_nodes":["{NODE}"],"cluster_nodes":["{NODE}"]}}"#)))
        }
        ("GET", ["_session"]) => Ok(session(&who)),
        ("GET", ["_all_dbs"]) => {
            if current {
                need_admin(&who)?;
            }
            let names: Vec<String> = state.databases.keys().map(|name| quoted(name)).collect();
            Ok(Reply::ok(format!("[{}]", names.join(","))))
        }
        ("POST", ["_dbs_info"]) if !old => dbs_info(state, request),
        (_, ["_config", rest @ ..]) if old => config(state, &who, method, rest, &request.body),
        (_, ["_node", "_local" | NODE, "_config", rest @ ..]) if !old => {
            config(state, &who, method, rest, &request.body)
        }
        (_, [db]) => on_database(state, &who, method, db, request),
        (_, [db, rest @ ..]) => in_database(state, &who, method, db, rest, request),
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

fn dbs_info(state: &mut State, request: &Request) -> Outcome {
    let body: Value = json(&request.body)?;
    let keys = body.get("keys").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut infos = Vec::new();
    for name in keys.iter().filter_map(Value::as_str) {
        infos.push(match info(state, name) {
            Some(info) => format!("{{\"key\":{},\"info\":{info}}}", quoted(name)),
            None => format!("{{\"key\":{},\"error\":\"not_found\"}}", quoted(name)),
        });
    }
    Ok(Reply::ok(format!("[{}]", infos.join(","))))
}

/// `GET /db` as the version lays it out; sizes are made up.
fn info(state: &mut State, name: &str) -> Option<String> {
    let salt = state.rng.u32(..);
    let db = state.databases.get(name)?;
    let n_live = db.live_docs().count();
    let n_deleted = db.ids().len() - n_live;
    let (name, seq) = (quoted(name), seqs::spell(state.flavour, db.incarnation, &db.end(), salt, false));
    Some(match state.flavour {
        Flavour::V1 => format!(
            r#"{{"db_name":{name},"doc_count":{n_live},"doc_del_count":{n_deleted},"update_seq":{seq},"purge_seq":0,"compact_running":false,"disk_size":36968,"data_size":1516,"instance_start_time":"{}","disk_format_version":6,"committed_update_seq":{seq}}}"#,
            db.opened_micros
        ),
        Flavour::V2 => format!(
            r#"{{"db_name":{name},"update_seq":{seq},"sizes":{{"file":38275,"external":692,"active":2402}},"purge_seq":0,"other":{{"data_size":692}},"doc_del_count":{n_deleted},"doc_count":{n_live},"disk_size":38275,"disk_format_version":6,"data_size":2402,"compact_running":false,"cluster":{{"q":{},"n":1,"w":1,"r":1}},"instance_start_time":"0"}}"#,
            db.end().0.len()
        ),
        Flavour::V3 => format!(
            r#"{{"instance_start_time":"{}","db_name":{name},"purge_seq":"0-g1AAAABdeJzLYWBg","update_seq":{seq},"sizes":{{"file":57746,"external":377,"active":2113}},"props":{{}},"doc_del_count":{n_deleted},"doc_count":{n_live},"disk_format_version":8,"compact_running":false,"cluster":{{"q":{},"n":1,"w":1,"r":1}}}}"#,
            db.created_seconds,
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
    check_name(name)?;
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
            database(state, name, who)?;
            state.databases.remove(name);
            Ok(Reply::ok("{\"ok\":true}"))
        }
        "GET" => {
            database(state, name, who)?;
            Ok(Reply::ok(info(state, name).expect("it was just found")))
        }
        "POST" => {
            let id = format!("{:032x}", state.rng.u128(..));
            put_doc(state, who, name, &id, request)
        }
        _ => Err(Refusal::new(405, "method_not_allowed", "Only DELETE,GET,HEAD,POST,PUT allowed")),
    }
}

fn check_name(name: &str) -> Result<(), Refusal> {
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

fn location(request: &Request, path: &[&str]) -> String {
    let path: Vec<String> =
        path.iter().map(|part| utf8_percent_encode(part, &UNRESERVED).to_string()).collect();
    format!("http://{}/{}", request.header("host").unwrap_or("127.0.0.1"), path.join("/"))
}

fn in_database(
    state: &mut State,
    who: &Who,
    method: &str,
    name: &str,
    path: &[&str],
    request: &Request,
) -> Outcome {
    let flavour = state.flavour;
    let db = database(state, name, who)?;
    match (method, path) {
        ("GET", ["_security"]) => Ok(Reply::ok(security_text(flavour, db))),
        ("PUT", ["_security"]) => {
            let security = security(flavour, db);
            let db_admin =
                matches!(who, Who::User(user) if names(&security, "admins", "names").any(|n| n == *user));
            if *who != Who::Admin && !db_admin {
                return Err(Refusal::new(401, "unauthorized", "You are not a db or server admin."));
            }
            let given: Value = json(&request.body)?;
            db.security = Some(given.to_string());
            db.commit();
            Ok(Reply::ok("{\"ok\":true}"))
        }
        ("GET", ["_revs_limit"]) => Ok(Reply::ok(db.revs_limit)),
        ("PUT", ["_revs_limit"]) => {
            db.revs_limit = json(&request.body)?;
            Ok(Reply::ok("{\"ok\":true}"))
        }
        ("POST", ["_ensure_full_commit"]) => {
            db.commit();
            Ok(Reply::new(201, format!("{{\"ok\":true,\"instance_start_time\":\"{}\"}}\n", db.opened_micros)))
        }
        ("POST", ["_compact"]) => {
            db.compact();
            Ok(Reply::new(202, "{\"ok\":true}\n"))
        }
        ("POST", ["_bulk_docs"]) => bulk_docs(db, request),
        ("GET", ["_all_docs"]) => all_docs(db, request),
        (_, ["_local", rest @ ..]) if !rest.is_empty() => {
            local(state, name, method, &rest.join("/"), request)
        }
        (_, [id]) if id.starts_with("_local/") => local(state, name, method, &id["_local/".len()..], request),
        ("GET", _) => get_doc(db, &path.join("/"), request),
        ("PUT", _) => put_doc(state, who, name, &path.join("/"), request),
        ("DELETE", _) => delete_doc(db, &path.join("/"), request),
        _ => Err(Refusal::new(405, "method_not_allowed", "Only DELETE,GET,HEAD,PUT allowed")),
    }
}

fn local(state: &mut State, name: &str, method: &str, id: &str, request: &Request) -> Outcome {
    let missing = || Refusal::new(404, "not_found", "missing");
    let full_id = format!("_local/{id}");
    let State { databases, quirks, .. } = state;
    let db = databases.get_mut(name).ok_or_else(missing)?;
    if method == "GET" {
        let age = usize::from(db.local(id, 0).is_some() && take_one(&mut quirks.old_locals));
        let (rev, json) = db.local(id, age).ok_or_else(missing)?;
        return Ok(Reply::ok(json).with("ETag", format!("\"0-{rev}\"")));
    }
    let mut doc = match method {
        "PUT" => Incoming::parse(text(&request.body)?)?,
        "DELETE" if db.local(id, 0).is_none() => return Err(missing()),
        _ => Incoming::deletion(None),
    };
    if let Some(rev) = request.query_value("rev") {
        doc.rev = Some(Rev::parse(rev)?);
    }
    let rev = db.write_local(id, doc)?;
    full_commit(db, request);
    let reply = Reply::new(
        if method == "PUT" { 201 } else { 200 },
        format!("{{\"ok\":true,\"id\":{},\"rev\":\"0-{rev}\"}}\n", quoted(&full_id)),
    );
    Ok(reply.with("ETag", format!("\"0-{rev}\"")).with("Location", location(request, &[name, &full_id])))
}

fn full_commit(db: &mut Database, request: &Request) {
    if request.header("x-couch-full-commit") == Some("true") {
        db.commit();
    }
}

fn get_doc(db: &Database, id: &str, request: &Request) -> Outcome {
    let missing = |reason| Refusal::new(404, "not_found", reason);
    let doc = db.doc(id).ok_or_else(|| missing("missing"))?;
    let rev = match request.query_value("rev") {
        Some(rev) => Rev::parse(rev)?,
        None if doc.is_deleted(doc.winner()) => return Err(missing("deleted")),
        None => doc.winner().clone(),
    };
    let json = doc.json(id, &rev, request.query_value("conflicts") == Some("true"));
    Ok(Reply::ok(json.ok_or_else(|| missing("missing"))?).with("ETag", format!("\"{rev}\"")))
}

fn put_doc(state: &mut State, who: &Who, name: &str, id: &str, request: &Request) -> Outcome {
    if state.quirks.refuse_dead_letters && id.starts_with("msg_") {
        return Err(Refusal::new(403, "forbidden", "made by a quirk"));
    }
    let db = database(state, name, who)?;
    let mut doc = Incoming::parse(text(&request.body)?)?;
    if let Some(rev) = rev_given(request) {
        doc.rev = Some(Rev::parse(&rev)?);
    }
    let id = if request.method == "POST" {
        doc.id.clone().unwrap_or_else(|| id.to_owned())
    } else {
        id.to_owned()
    };
    let rev = db.write(&id, doc)?;
    full_commit(db, request);
    let reply = Reply::new(201, format!("{{\"ok\":true,\"id\":{},\"rev\":\"{rev}\"}}\n", quoted(&id)));
    Ok(reply.with("ETag", format!("\"{rev}\"")).with("Location", location(request, &[name, &id])))
}

fn delete_doc(db: &mut Database, id: &str, request: &Request) -> Outcome {
    let missing = |reason| Refusal::new(404, "not_found", reason);
    let known = db.doc(id).ok_or_else(|| missing("missing"))?;
    if known.is_deleted(known.winner()) {
        return Err(missing("deleted"));
    }
    let rev = rev_given(request).map(|rev| Rev::parse(&rev)).transpose()?;
    let rev = db.write(id, Incoming::deletion(rev))?;
    full_commit(db, request);
    let reply = Reply::ok(format!("{{\"ok\":true,\"id\":{},\"rev\":\"{rev}\"}}", quoted(id)));
    Ok(reply.with("ETag", format!("\"{rev}\"")))
}

fn rev_given(request: &Request) -> Option<String> {
    let header = || request.header("if-match").map(|tag| tag.trim_matches('"'));
    request.query_value("rev").or_else(header).map(str::to_owned)
}

fn bulk_docs(db: &mut Database, request: &Request) -> Outcome {
    #[derive(serde::Deserialize)]
    struct Bulk<'a> {
        #[serde(borrow)]
        docs: Vec<&'a serde_json::value::RawValue>,
        #[serde(default = "yes")]
        new_edits: bool,
    }
    fn yes() -> bool {
        true
    }
    let bad = |_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON");
    let bulk: Bulk<'_> = serde_json::from_str(text(&request.body)?).map_err(bad)?;
    let mut results = Vec::new();
    for raw in bulk.docs {
        let doc = Incoming::parse(raw.get())?;
        let id =
            doc.id.clone().ok_or_else(|| Refusal::new(400, "bad_request", "Document id must be given"))?;
        if !bulk.new_edits {
            db.write_replicated(&id, doc);
            continue;
        }
        let id_json = quoted(&id);
        results.push(match db.write(&id, doc) {
            Ok(rev) => format!("{{\"ok\":true,\"id\":{id_json},\"rev\":\"{rev}\"}}"),
            Err(no) => {
                format!("{{\"id\":{id_json},\"error\":\"{}\",\"reason\":{}}}", no.error, quoted(&no.reason))
            }
        });
    }
    full_commit(db, request);
    Ok(Reply::new(201, format!("[{}]\n", results.join(","))))
}

fn all_docs(db: &Database, request: &Request) -> Outcome {
    let id_of = |names: [&str; 2]| {
        let value = names.iter().find_map(|name| request.query_value(name));
        value.map(|value| json::<String>(value.as_bytes())).transpose()
    };
    let (start, end, key) =
        (id_of(["startkey", "start_key"])?, id_of(["endkey", "end_key"])?, id_of(["key", "key"])?);
    let inclusive = request.query_value("inclusive_end") != Some("false");
    let number = |name: &str| request.query_value(name).and_then(|value| value.parse::<usize>().ok());
    let include_docs = request.query_value("include_docs") == Some("true");
    let wanted = |id: &str| {
        start.as_deref().is_none_or(|start| id >= start)
            && end.as_deref().is_none_or(|end| id < end || (inclusive && id == end))
            && key.as_deref().is_none_or(|key| id == key)
    };
    let offset =
        db.live_docs().take_while(|(id, _)| start.as_deref().is_some_and(|start| *id < start)).count();
    let skip = number("skip").unwrap_or(0);
    let found = db.live_docs().filter(|(id, _)| wanted(id)).skip(skip);
    let rows = found.take(number("limit").unwrap_or(usize::MAX)).map(|(id, doc)| {
        let (rev, id_json) = (doc.winner(), quoted(id));
        let mut row = format!("{{\"id\":{id_json},\"key\":{id_json},\"value\":{{\"rev\":\"{rev}\"}}");
        if include_docs {
            let _ = write!(row, ",\"doc\":{}", doc.json(id, rev, false).unwrap_or("null".to_owned()));
        }
        row + "}"
    });
    let rows: Vec<String> = rows.collect();
    let (total, offset) = (db.live_docs().count(), offset + skip);
    Ok(Reply::ok(format!(
        "{{\"total_rows\":{total},\"offset\":{offset},\"rows\":[\r\n{}\r\n]}}",
        rows.join(",\r\n")
    )))
}

fn text(body: &[u8]) -> Result<&str, Refusal> {
    std::str::from_utf8(body).map_err(|_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON"))
}

pub(crate) fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|_| Refusal::new(400, "bad_request", "invalid UTF-8 JSON"))
}
