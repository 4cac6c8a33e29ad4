//! The stand-in's answers about what is inside a database: documents, `_local`, `_all_docs`, `_security`.
//!
//! Guarantees statuses, texts and layout of the version, as recorded. `changes_feed` has the feed.

use std::fmt::Write;

use serde_json::Value;

use crate::standin::couch::State;
use crate::standin::docs::{Document, Incoming, Refusal, Rev, compact, quoted};
use crate::standin::http::Request;
use crate::standin::quirks::take_one;
use crate::standin::routes::{
    Outcome, Reply, Who, database, json, location, names, path_text, security, security_text, start_time,
    text,
};
use crate::standin::store::Database;

/// Answers `/db/…` but `_changes`.
pub(crate) fn in_database(
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
            let _: Value = json(&request.body)?;
            db.security = Some(compact(text(&request.body)?));
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
            let start = start_time(flavour, db);
            Ok(Reply::new(201, format!("{{\"ok\":true,\"instance_start_time\":\"{start}\"}}\n")))
        }
        ("POST", ["_compact"]) => {
            db.compact();
            Ok(Reply::new(202, "{\"ok\":true}\n"))
        }
        ("POST", ["_bulk_docs"]) => bulk_docs(db, request),
        ("GET", ["_all_docs"]) => all_docs(db, request),
        ("POST", ["_all_docs"]) => docs_of_keys(db, request),
        (_, ["_local", rest @ ..]) if !rest.is_empty() => {
            local(state, name, method, &rest.join("/"), request)
        }
        (_, [id]) if id.starts_with("_local/") => local(state, name, method, &id["_local/".len()..], request),
        (_, [id]) if id.starts_with("_design/") => {
            let path = format!("/{}", path_text(&[name, "_design"]));
            let to = format!("{path}/{}", path_text(&[&id["_design/".len()..]]));
            Ok(Reply::new(301, "").with("Location", to))
        }
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
    let body = format!("{{\"ok\":true,\"id\":{},\"rev\":\"0-{rev}\"}}\n", quoted(&full_id));
    let reply =
        Reply::new(if method == "PUT" { 201 } else { 200 }, body).with("ETag", format!("\"0-{rev}\""));
    Ok(if method == "PUT" { reply.with("Location", location(request, &[name, &full_id])) } else { reply })
}

fn full_commit(db: &mut Database, request: &Request) {
    if request.header("x-couch-full-commit") == Some("true") {
        db.commit();
    }
}

fn get_doc(db: &Database, id: &str, request: &Request) -> Outcome {
    let missing = |reason| Refusal::new(404, "not_found", reason);
    let doc = db.doc(id).ok_or_else(|| missing("missing"))?;
    if let Some(revs) = request.query_value("open_revs") {
        return open_revs(doc, id, revs);
    }
    let rev = match request.query_value("rev") {
        Some(rev) => Rev::parse(rev)?,
        None if doc.is_deleted(doc.winner()) => return Err(missing("deleted")),
        None => doc.winner().clone(),
    };
    let conflicts = request.query_value("conflicts") == Some("true");
    let reply = Reply::ok(doc.json(id, &rev, conflicts).ok_or_else(|| missing("missing"))?);
    // With conflicts the answer may change without the revision.
    Ok(if conflicts && doc.leaves().len() > 1 { reply } else { reply.with("ETag", format!("\"{rev}\"")) })
}

/// `[{"ok":{…}},{"missing":"2-a"}]`, what is there first: not in the order of the request. (Only as JSON; without
/// `Accept` CouchDB answers `multipart/mixed`.)
fn open_revs(doc: &Document, id: &str, revs: &str) -> Outcome {
    let wanted = match revs {
        "all" => doc.leaves(),
        revs => {
            let revs: Vec<String> = json(revs.as_bytes())?;
            revs.iter().map(|rev| Rev::parse(rev)).collect::<Result<_, _>>()?
        }
    };
    let (mut found, mut gone) = (Vec::new(), Vec::new());
    for rev in wanted {
        match doc.json(id, &rev, false) {
            Some(json) => found.push(format!("{{\"ok\":{json}}}")),
            None => gone.push(format!("{{\"missing\":\"{rev}\"}}")),
        }
    }
    found.sort();
    found.append(&mut gone);
    Ok(Reply::ok(format!("[{}]\n", found.join(","))))
}

/// Writes a document; `POST /db` gives it an id where it has none.
pub(crate) fn put_doc(state: &mut State, who: &Who, name: &str, id: &str, request: &Request) -> Outcome {
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
    let deleted = doc.deleted;
    let rev = db.write(&id, doc)?;
    full_commit(db, request);
    let status = if deleted && request.method == "PUT" { 200 } else { 201 };
    let reply = Reply::new(status, format!("{{\"ok\":true,\"id\":{},\"rev\":\"{rev}\"}}\n", quoted(&id)));
    let reply = reply.with("ETag", format!("\"{rev}\""));
    Ok(reply.with("Location", location(request, &[name, &id])))
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
    let rows = found.take(number("limit").unwrap_or(usize::MAX));
    let rows: Vec<String> = rows.map(|(id, doc)| row_of(id, doc, include_docs)).collect();
    let (total, offset) = (db.live_docs().count(), offset + skip);
    Ok(Reply::ok(format!(
        "{{\"total_rows\":{total},\"offset\":{offset},\"rows\":[\r\n{}\r\n]}}",
        rows.join(",\r\n")
    )))
}

/// `{"keys":[…]}`: those rows in that order; of deleted documents CouchDB says so, nothing more is needed here.
fn docs_of_keys(db: &Database, request: &Request) -> Outcome {
    #[derive(serde::Deserialize)]
    struct Keys {
        keys: Vec<String>,
    }
    let Keys { keys } = json(&request.body)?;
    let include_docs = request.query_value("include_docs") == Some("true");
    let live = |id: &str| db.doc(id).filter(|doc| !doc.is_deleted(doc.winner()));
    let rows = keys.iter().map(|id| match live(id) {
        Some(doc) => row_of(id, doc, include_docs),
        None => format!("{{\"key\":{},\"error\":\"not_found\"}}", quoted(id)),
    });
    let rows: Vec<String> = rows.collect();
    let total = db.live_docs().count();
    Ok(Reply::ok(format!(
        "{{\"total_rows\":{total},\"offset\":0,\"rows\":[\r\n{}\r\n]}}",
        rows.join(",\r\n")
    )))
}

fn row_of(id: &str, doc: &Document, include_docs: bool) -> String {
    let (rev, id_json) = (doc.winner(), quoted(id));
    let mut row = format!("{{\"id\":{id_json},\"key\":{id_json},\"value\":{{\"rev\":\"{rev}\"}}");
    if include_docs {
        let _ = write!(row, ",\"doc\":{}", doc.json(id, rev, false).unwrap_or("null".to_owned()));
    }
    row + "}"
}
