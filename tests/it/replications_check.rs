//! `replications check`: a file, stdin, a document in CouchDB.

use std::io::Write;
use std::process::{Command, Stdio};

use couch_hookd::standin::couch::Flavour;
use serde_json::{Value, json};

use crate::commands::{Desk, Said};
use crate::world::{CANARY, Dir, FLAVOURS, Ini, assert_no_secret, couch};

/// Runs the command in this directory, with this on stdin and no configuration.
fn say(dir: &Dir, words: &[&str], stdin: &str) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
    command.args(["replications", "check"]).args(words).current_dir(dir.path("."));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let status = output.status.code().unwrap();
    let said = Said { status, out: text(output.stdout), err: text(output.stderr) };
    assert_no_secret("replications check", &format!("{}{}", said.out, said.err));
    said
}

fn lines(said: &Said) -> Vec<Value> {
    said.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{said:?}"))).collect()
}

#[test]
fn a_file_is_checked_without_a_couchdb() {
    let dir = Dir::new();
    let doc = json!({"_id": "edge1", "source": format!("https://ann:{CANARY}@h/a"), "target": "orders",
        "params": {"continuous": true}, "_replication_state": "completed"});
    std::fs::write(dir.path("edge1.json"), doc.to_string()).unwrap();
    let said = say(&dir, &["edge1.json"], "");
    assert_eq!((said.status, said.err.as_str()), (1, ""), "{said:?}");
    let paths: Vec<&str> = said.out.lines().map(|line| line.split(": ").nth(1).unwrap_or("")).collect();
    let expected = ["_replication_state", "params.continuous", "source", "target", "3 errors, 1 warning"];
    assert_eq!(paths, expected, "{said:?}");
    assert!(said.out.starts_with("error    edge1: _replication_state: with `completed`"), "{said:?}");
    assert!(said.out.contains("warning  edge1: source: holds a password in clear"), "{said:?}");
    assert!(said.out.ends_with("1 document, checked for CouchDB 3.5: 3 errors, 1 warning\n"), "{said:?}");
    // Another version, and a document that was read: 1.x takes names of its own databases.
    let said = say(&dir, &["edge1.json", "--couchdb-version", "1.7", "--stored", "--json"], "");
    let levels: Vec<_> =
        lines(&said).iter().map(|line| (line["level"].clone(), line["path"].clone())).collect();
    let expected = [
        (json!("error"), json!("_replication_state")),
        (json!("error"), json!("params.continuous")),
        (json!("warning"), json!("source")),
    ];
    assert_eq!((said.status, &levels[..]), (1, &expected[..]), "{said:?}");
}

#[test]
fn stdin_holds_several_documents_and_warnings_are_no_fault() {
    let (dir, url) = (Dir::new(), "https://h/a");
    let docs = json!({"docs": [{"source": url, "target": url},
        {"_id": "b", "source": url, "target": url, "heartbeat": 5}]});
    let said = say(&dir, &["-", "--json"], &docs.to_string());
    let lines = lines(&said);
    assert_eq!((said.status, lines.len()), (0, 2), "{said:?}");
    assert_eq!(lines[0], json!({"level": "ok", "document": "docs[0]"}));
    assert_eq!((&lines[1]["document"], &lines[1]["path"]), (&json!("b"), &json!("heartbeat")));
    assert!(lines[1]["remedy"].as_str().unwrap().contains("connection_timeout"), "{said:?}");
    let said = say(&dir, &["-"], &format!("{{\"source\": \"{CANARY}\",\n}}"));
    assert_eq!((said.status, said.err.as_str()), (1, ""), "{said:?}");
    assert!(
        said.out.starts_with("error    -: line 2, column 1: expected JSON, got something else;"),
        "{said:?}"
    );
}

#[test]
fn a_document_in_couchdb_is_checked_for_its_version() {
    for flavour in FLAVOURS {
        let couch = couch(flavour, &["_replicator", "team/_replicator"]);
        let desk = Desk::new(&Ini::new(&couch.url()).webhook("orders", "http://127.0.0.1:9/hook", ""));
        let doc = json!({"source": "orders", "target": format!("http://ann:{CANARY}@h/a"), "owner": "ann",
            "_replication_state": "completed", "_replication_state_time": "2026-11-21T21:04:54+00:00",
            "_replication_stats": {"docs_read": 1}});
        couch.put("_replicator", "edge1", &doc).unwrap();
        couch
            .put("team/_replicator", "edge/2", &json!({"source": "http://h/a", "taget": "http://h/b"}))
            .unwrap();
        let said = desk.say(&["replications", "check", "edge1", "--json"]);
        let lines = lines(&said);
        let errors: Vec<&Value> = lines.iter().filter(|line| line["level"] == "error").collect();
        if flavour == Flavour::V1 {
            assert_eq!((said.status, errors.len()), (0, 0), "{said:?}");
        } else {
            assert_eq!((said.status, errors.len(), &errors[0]["path"]), (1, 1, &json!("source")), "{said:?}");
        }
        assert!(lines.iter().any(|line| line["level"] == "warning" && line["path"] == "target"), "{said:?}");
        let said = desk.say(&["replications", "check", "edge/2", "--database", "team/_replicator"]);
        assert!(
            said.status == 1 && said.out.contains("taget: ") && said.out.contains("`target`?"),
            "{said:?}"
        );
        let said = desk.say(&["replications", "check", "edge3"]);
        assert_eq!((said.status, said.out.as_str()), (1, ""), "{said:?}");
        let missing = "no document `edge3` in database `_replicator`, and no file of this name";
        assert!(said.err.contains(missing), "{said:?}");
    }
}

#[test]
fn used_wrongly_is_said_with_status_2() {
    let dir = Dir::new();
    let check = |words: &[&str], expected: &str| {
        let said = say(&dir, words, "");
        assert!(
            said.status == 2 && said.out.is_empty() && said.err.contains(expected),
            "{words:?}: {said:?}"
        );
    };
    check(&[], "FILE|-|DOC_ID");
    check(&["-", "--couchdb-version", "newest"], "such as `1.7` or `3.5.0`");
    check(&["edge1", "--couchdb-version", "3.5"], "expected no --couchdb-version");
    check(&["."], "got the directory");
}
