//! The stand-in for CouchDB against recorded answers of 1.7.1, 2.2.0 and 3.5.0.
//!
//! What is compared are statuses, headers, texts and line layout; what differs from server to server (seqs,
//! order of rows, sizes, times) is levelled first.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use serde_json::Value;

use crate::http_client::{Open, page};

const VERSIONS: [(Flavour, &str); 3] =
    [(Flavour::V1, "1.7.1"), (Flavour::V2, "2.2.0"), (Flavour::V3, "3.5.0")];

/// In an order in which each finds what it needs.
const BEFORE_FIXTURE: &[&str] = &["db_create", "db_create_again"];
const ON_FIXTURE: &[&str] = &[
    "root",
    "all_dbs",
    "changes_normal",
    "changes_normal_docs_conflicts",
    "changes_limit2",
    "changes_limit0_now",
    "changes_continuous_timeout",
    "changes_longpoll_timeout",
    "changes_doc_ids",
    "changes_selector",
    "changes_filter_function",
    "changes_filter_missing",
    "changes_view",
    "changes_no_db",
    "changes_since_garbage",
    "config_all",
    "config_missing",
    "config_os_daemons_put",
    "config_put",
    "config_section",
    "config_section_missing",
    "db_info",
    "dbs_info",
    "doc_conflict",
    "local_put",
    "local_get",
    "local_missing",
    "local_put_conflict",
    "unauthorized_no_login",
    "unauthorized_wrong",
    "db_delete",
];

/// The fixture's documents with the revisions that the recorded servers gave them.
fn fill_fixture(base: &str) {
    let design = r#"{"_id":"_design/app","_rev":"1-1178276408c9ed0e8c240dcce3125a0b","language":"javascript","filters":{"big":"function(doc, req) { return doc.total > 2; }"},"views":{"t":{"map":"function(doc) { if (doc.type) emit(doc.type, null); }"}}}"#;
    let docs = [
        r#"{"_id":"order:0","_rev":"1-83cf1aee167076d5c2fcfd17a2a67dba","type":"order","total":0,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:3","_rev":"1-3e843778cbee58beb81373fb4383efe7","type":"order","total":3,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:4","_rev":"1-4ecac9207605c8c258caf25ca4963b44","type":"order","total":4,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:1","_rev":"2-ad372dc0ba107c12d1337eb2c785ae3f","type":"order","total":100}"#,
        r#"{"_id":"order:2","_rev":"2-8f58de7d4bd590b378492ced13eca0ce","_deleted":true}"#,
        design,
        r#"{"_id":"conflicted","_rev":"1-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","v":2}"#,
        r#"{"_id":"conflicted","_rev":"1-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","v":1}"#,
    ];
    let docs = docs.join(",").replace("LS", "\u{2028}");
    let login = format!("Basic {}", STANDARD.encode("admin:right"));
    let body = format!("{{\"new_edits\":false,\"docs\":[{docs}]}}");
    let reply = Open::send(base, "POST", "/fixture/_bulk_docs", &[("Authorization", &login)], &body).unwrap();
    assert_eq!((reply.status, reply.rest().body.as_str()), (201, "[]\n"));
}

/// Numbers become `0` and opaque seqs `S`: what differs between two servers that mean the same.
fn level(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let digits = rest.len() - rest.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        if digits == 0 {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        rest = &rest[digits..];
        let opaque =
            rest.trim_start_matches(|letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter));
        if rest.starts_with("-g1AAAA") {
            rest = opaque;
            out.push('S');
        } else {
            out.push('0');
        }
    }
    out
}

/// A body with its rows sorted, each row's seq levelled; separators stay in the order in which they stand.
fn shape(body: &str) -> Vec<String> {
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for line in body.split('\n') {
        let Some((_, from_id)) = line.split_once(",\"id\":") else {
            lines.push(level(line));
            continue;
        };
        let row = from_id.trim_end_matches(['\r', ',']);
        lines.push(format!("row{:?}", &from_id[row.len()..]));
        rows.push(row.to_owned());
    }
    rows.sort();
    lines.into_iter().chain(rows).collect()
}

fn compare(couch: &StandIn, version: &str, name: &str) {
    let file = format!("{}/tests/data/{version}/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let request = &recorded["request"];
    let mut path = request["path"].as_str().unwrap().to_owned();
    if let Some((before, _)) = path.split_once("since=9") {
        path = format!("{before}since={}", page(&couch.url(), "/fixture/_changes").1);
    }
    let login = match name {
        "unauthorized_no_login" => None,
        "unauthorized_wrong" => Some("admin:wrong"),
        _ => Some("admin:right"),
    };
    let login = login.map(|login| format!("Basic {}", STANDARD.encode(login)));
    let mut headers = vec![("Accept", "application/json")];
    headers.extend(login.as_deref().map(|login| ("Authorization", login)));
    let (method, body) = (request["method"].as_str().unwrap(), request["body"].as_str().unwrap_or_default());
    let reply = Open::send(&couch.url(), method, &path, &headers, body).unwrap().rest();

    let place = format!("{version} {name}");
    assert_eq!(u64::from(reply.status), recorded["status"], "{place}: {}", reply.body);
    let expected = recorded["body"].as_str().unwrap();
    if name == "config_all" {
        // Keys of a section come in the order of a hash table.
        assert_eq!(reply.json(), serde_json::from_str::<Value>(expected).unwrap(), "{place}");
    } else if name == "changes_limit2" && version != "1.7.1" {
        // Which two of the rows come differs from request to request.
        let layout = |body: &str| shape(body)[..7].to_vec();
        assert_eq!(layout(&reply.body), layout(expected), "{place}:\n{}\n{expected}", reply.body);
    } else {
        assert_eq!(shape(&reply.body), shape(expected), "{place}:\n{}\n{expected}", reply.body);
    }
    for (header, value) in recorded["headers"].as_object().unwrap() {
        // `_all_dbs` and `_dbs_info` are streamed by 2.x and 3.x; nobody can tell from the body. One recorded
        // refusal closes the connection.
        if ["Transfer-Encoding", "Content-Length", "ETag", "Location", "Connection"]
            .contains(&header.as_str())
        {
            continue;
        }
        assert_eq!(reply.headers.get(header).map(String::as_str), value.as_str(), "{place}: {header}");
    }
    if name.starts_with("changes") && reply.status == 200 {
        assert_eq!(reply.headers["Transfer-Encoding"], "chunked", "{place}");
    }
}

#[test]
fn answers_are_those_of_the_recorded_servers() {
    for (flavour, version) in VERSIONS {
        let options = Options { admin: Some(("admin".into(), "right".into())), ..Options::new(flavour) };
        let couch = StandIn::start(options).unwrap();
        couch.filter("app/big", |doc, _| Ok(doc["total"].as_i64() > Some(2)));
        couch.filter("app/t", |doc, _| Ok(doc["type"].is_string()));
        let log = match flavour {
            Flavour::V1 => {
                &[("level", "info"), ("file", "/var/log/couchdb/couch.log"), ("include_sasl", "true")][..]
            }
            Flavour::V2 => {
                &[("level", "info"), ("writer", "file"), ("file", "/var/log/couchdb/couch.log")][..]
            }
            Flavour::V3 => &[("level", "info"), ("writer", "stderr")][..],
        };
        for (key, value) in log {
            couch.set_config("log", key, value);
        }
        couch.create_db("fixture_copy");
        if flavour != Flavour::V1 {
            couch.create_db("_global_changes");
        }
        BEFORE_FIXTURE.iter().for_each(|name| compare(&couch, version, name));
        // The recorded databases could be read by anybody.
        let login = format!("Basic {}", STANDARD.encode("admin:right"));
        let headers = [("Authorization", login.as_str())];
        Open::send(&couch.url(), "PUT", "/fixture/_security", &headers, "{}").unwrap();
        fill_fixture(&couch.url());
        ON_FIXTURE.iter().for_each(|name| compare(&couch, version, name));
    }
}
