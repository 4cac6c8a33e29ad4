//! The daemon at a real CouchDB of any version, the one that `COUCHDB_URL` (with an admin's login) names.
//!
//! Databases are a test's own, deleted at its end, `state_db` too. Without a server each test says `skipped`.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::commands::Desk;
use crate::http_client::{Open, Reply};
use crate::world::{Daemon, Ini, has_all, receiver, receiver_with};

/// A real server on a busy machine compiles filters, opens shards, and hashes passwords slowly at first.
const WAIT_MAX: Duration = Duration::from_secs(40);
/// What is said when a database was deleted and made again.
const RECREATED: &str = "database.recreated";

/// A real server and a database of a test's own.
pub(super) struct Real {
    /// With login.
    pub(super) url: String,
    /// Without.
    pub(super) base: String,
    login: String,
    pub(super) db: String,
    state_db: String,
    /// Whether it knows selectors.
    selects: bool,
}

impl Real {
    pub(super) fn start(name: &str) -> Option<Real> {
        let Ok(url) = std::env::var("COUCHDB_URL") else {
            eprintln!("skipped: real CouchDB (COUCHDB_URL is not set)");
            return None;
        };
        let url = url.trim_end_matches('/').to_owned();
        let (scheme, rest) = url.split_once("://").unwrap();
        let (login, host) = rest.rsplit_once('@').expect("COUCHDB_URL holds a login");
        let mut real = Real {
            base: format!("{scheme}://{host}"),
            login: format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login)),
            db: format!("j_{name}_{}", std::process::id()),
            state_db: format!("j_{name}_{}_state", std::process::id()),
            url: url.clone(),
            selects: true,
        };
        real.selects = !real.ask("GET", "/", "").json()["version"].as_str().unwrap().starts_with("1.");
        real.create();
        Some(real)
    }

    pub(super) fn ask(&self, method: &str, path: &str, body: &str) -> Reply {
        let headers = [
            ("Authorization", self.login.as_str()),
            ("Content-Type", "application/json"),
            ("Connection", "close"),
        ];
        Open::send(&self.base, method, path, &headers, body).expect("the server answers").rest()
    }

    /// Right after a deletion CouchDB may answer 412: somebody (the daemon) is just looking whether it is there.
    fn create(&self) {
        for _ in 0..50 {
            let reply = self.ask("PUT", &format!("/{}", self.db), "");
            match reply.status {
                200..300 => return,
                412 => {}
                _ => panic!("{reply:?}"),
            }
        }
        panic!("`{}` could not be made", self.db);
    }

    fn delete(&self) {
        let reply = self.ask("DELETE", &format!("/{}", self.db), "");
        assert!((200..300).contains(&reply.status), "{reply:?}");
    }

    /// Writes a document over `rev`; its new revision.
    fn put(&self, id: &str, body: &str, rev: Option<&str>) -> String {
        let rev = rev.map_or(String::new(), |rev| format!("?rev={rev}"));
        let reply = self.ask("PUT", &format!("/{}/{id}{rev}", self.db), body);
        assert!((200..300).contains(&reply.status), "{reply:?}");
        reply.json()["rev"].as_str().unwrap().to_owned()
    }

    /// Writes many new documents at once.
    pub(super) fn put_all(&self, docs: &[Value]) {
        let body = json!({ "docs": docs }).to_string();
        let reply = self.ask("POST", &format!("/{}/_bulk_docs", self.db), &body);
        assert!((200..300).contains(&reply.status), "{reply:?}");
    }

    /// Every live document's revision, but design documents'.
    fn revs(&self) -> BTreeMap<String, String> {
        let all = self.ask("GET", &format!("/{}/_all_docs", self.db), "").json();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let rows = all["rows"].as_array().unwrap().iter();
        let rows = rows.map(|row| (text(&row["id"]), text(&row["value"]["rev"])));
        rows.filter(|(id, _)| !id.starts_with('_')).collect()
    }

    /// Waits until commands see the daemon.
    fn wait_until_alive(&self) {
        let until = sys::now() + WAIT_MAX;
        let path = format!("/{}/_all_docs", self.state_db);
        while !self.ask("GET", &path, "").body.contains("\"daemon:") {
            assert!(sys::now() < until, "no daemon is alive");
            sys::sleep(Duration::from_millis(100));
        }
    }

    pub(super) fn ini(&self) -> Ini {
        Ini::new(&self.url).hookd(&format!("state_db = {}\ncheckpoint_interval = 1s", self.state_db))
    }

    /// The daemon with one webhook `orders`.
    fn daemon(&self, receiver: &Receiver, lines: &str) -> Daemon {
        Daemon::start(&self.ini().webhook("orders", &receiver.url(), &format!("db = {}\n{lines}", self.db)))
    }

    #[track_caller]
    fn wait_for_all(&self, receiver: &Receiver, revs: &BTreeMap<String, String>, daemon: &Daemon) {
        let all = receiver.wait_until(WAIT_MAX, |record| has_all(record, &self.db, revs));
        let (told, violations) =
            receiver.look(|record| (record.accepted_revs(&self.db).len(), record.violations().to_vec()));
        assert!(all, "{told} of {}\n{}", revs.len(), daemon.transcript());
        assert_eq!(violations, [], "{}", daemon.transcript());
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        for db in [&self.db, &self.state_db] {
            let _ = self.ask("DELETE", &format!("/{db}"), "");
        }
    }
}

#[test]
fn filters_of_every_kind_lose_nothing() {
    let Some(real) = Real::start("filters") else { return };
    let design = json!({
        "filters": {"mine": "function (doc, req) { return doc.mine && req.query.who === 'me'; }"},
        "views": {"mine": {"map": "function (doc) { if (doc.mine) { emit(doc._id, null); } }"}},
    });
    real.put("_design/app", &design.to_string(), None);
    let docs = |range: std::ops::Range<u32>| {
        range.map(|i| json!({"_id": format!("d{i}"), "mine": i % 3 == 0})).collect::<Vec<_>>()
    };
    real.put_all(&docs(0..900));
    let ids: Vec<String> = (0..903).step_by(3).map(|i| format!("d{i}")).collect();
    let mut filters = vec![
        ("function", "filter = app/mine\nfilter_params = {\"who\": \"me\"}".to_owned()),
        ("view", "view = app/mine".to_owned()),
        ("ids", format!("doc_ids = {}", json!(ids))),
    ];
    if real.selects {
        filters.push(("selector", "selector = {\"mine\": true}".to_owned()));
    }
    let receivers: Vec<Receiver> = filters.iter().map(|_| receiver()).collect();
    let ini = filters.iter().zip(&receivers).fold(real.ini(), |ini, ((name, filter), receiver)| {
        ini.webhook(name, &receiver.url(), &format!("db = {}\n{filter}", real.db))
    });
    let daemon = Daemon::start(&ini);
    let mine = |mut revs: BTreeMap<String, String>| {
        revs.retain(|id, _| id[1..].parse::<u32>().unwrap() % 3 == 0);
        revs
    };
    for receiver in &receivers {
        real.wait_for_all(receiver, &mine(real.revs()), &daemon);
    }
    real.put_all(&docs(900..903));
    let mine = mine(real.revs());
    for receiver in &receivers {
        real.wait_for_all(receiver, &mine, &daemon);
        assert_eq!(receiver.look(|record| record.accepted_revs(&real.db).len()), mine.len());
    }
}

#[test]
fn a_database_made_again_is_read_from_its_beginning() {
    let Some(real) = Real::start("again") else { return };
    let receiver = receiver();
    let mut daemon = real.daemon(&receiver, "since = now");
    daemon.wait_for_log("starts for the first time");
    let docs: Vec<Value> = (0..5).map(|i| json!({"_id": format!("d{i}"), "n": i})).collect();
    let mut told = 0;
    // Running, then running again with equal documents, then while it is down: other ids every time.
    for n_before in 0..4 {
        if n_before == 3 {
            daemon.kill();
        }
        if n_before > 0 {
            real.delete();
            real.create();
        }
        real.put_all(&docs);
        if n_before == 3 {
            daemon.start_again();
        }
        let came = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= told + 5);
        told = receiver.look(|record| record.n_accepted());
        assert!(came, "{n_before}: {told}\n{}", daemon.transcript());
    }
    let ids: std::collections::BTreeSet<String> =
        receiver.look(|record| record.deliveries().iter().map(|one| one.webhook_id.clone()).collect());
    assert_eq!(ids.len(), 20, "{}", daemon.transcript());
    assert_eq!(daemon.n_logged(RECREATED), 3, "{}", daemon.transcript());
}

#[test]
fn odd_documents_arrive_byte_for_byte() {
    let Some(real) = Real::start("bytes") else { return };
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let daemon = real.daemon(&receiver, "");
    let body = "{\"z\":12345678901234567890123,\"a\":1.0,\"m\":-0.0,\"e\":1.0000000000000000199e+30,\
        \"u\":\"\u{2028}\\u2028\\/ü\",\"Z\":{\"b\":[],\"a\":null},\"\":\"\"}";
    real.put("odd", body, None);
    real.wait_for_all(&receiver, &real.revs(), &daemon);
    let sent = real.ask("GET", &format!("/{}/odd", real.db), "").body;
    let told = receiver.look(|record| String::from_utf8(record.deliveries()[0].body.clone()).unwrap());
    let doc = format!("\"doc\":{}}}}}", sent.trim_end());
    assert!(told.ends_with(&doc), "{told}\n{doc}");
}

#[test]
fn kills_lose_nothing() {
    let Some(real) = Real::start("kills") else { return };
    let receiver = receiver();
    let mut daemon = real.daemon(&receiver, "");
    let mut revs = BTreeMap::<String, String>::new();
    let n_kills = if crate::world::long() { 30 } else { 6 };
    for n_kill in 0..n_kills {
        for n_doc in 0..20 {
            let id = format!("d{n_doc}");
            let rev = real.put(&id, &json!({"n": n_kill}).to_string(), revs.get(&id).map(String::as_str));
            revs.insert(id, rev);
        }
        // Somewhere in the middle of what was written last.
        let some = |record: &couch_hookd::standin::record::Record| {
            revs.iter().filter(|(id, rev)| record.accepted_rev(&real.db, id) == Some(rev)).count() > 5
        };
        assert!(receiver.wait_until(WAIT_MAX, some), "{}", daemon.transcript());
        daemon.kill();
        daemon.start_again();
    }
    real.wait_for_all(&receiver, &revs, &daemon);
}

#[test]
fn what_commands_ask_for_is_done() {
    let Some(real) = Real::start("commands") else { return };
    let receiver = receiver();
    receiver.answer(|delivery| Reaction::Status(if delivery.doc_id() == "d3" { 422 } else { 200 }));
    let lines = "since = 0\nretry_schedule = 100ms";
    let docs: Vec<Value> = (0..10).map(|n| json!({"_id": format!("d{n}")})).collect();
    real.put_all(&docs);
    let daemon = real.daemon(&receiver, lines);
    let desk =
        Desk::new(&real.ini().webhook("orders", &receiver.url(), &format!("db = {}\n{lines}", real.db)));
    let mut told = real.revs();
    let refused = told.remove("d3").unwrap();
    real.wait_for_all(&receiver, &told, &daemon);
    daemon.wait_for_log("is a dead letter now");
    real.wait_until_alive();
    assert!(desk.done(&["dead-letters", "list"]).contains("1 dead letter: 1 refused"));
    desk.done(&["pause", "orders"]);
    told.insert("late".to_owned(), real.put("late", "{}", None));
    assert!(desk.say(&["status", "orders"]).out.contains("paused"));
    assert!(desk.done(&["seek", "orders", "--to", "0", "--dry-run"]).contains("11"));
    desk.done(&["seek", "orders", "--to", "0", "--yes"]);
    let ids = || {
        receiver.look(|record| {
            let ids = record.deliveries().iter().filter(|one| one.accepted() && one.doc_id() != "late");
            let mut ids: Vec<String> = ids.map(|one| format!("{:?}", one.webhook_id)).collect();
            ids.sort();
            ids
        })
    };
    let first = ids();
    assert_eq!(first.len(), 9, "{first:?}");
    desk.done(&["resume", "orders"]);
    real.wait_for_all(&receiver, &told, &daemon);
    let twice: Vec<String> = first.iter().flat_map(|id| [id.clone(), id.clone()]).collect();
    assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == 19), "{}", daemon.transcript());
    assert_eq!(ids(), twice, "told again, with the ids they had");
    receiver.answer(|_| Reaction::Status(200));
    let said = desk.done(&["dead-letters", "replay", "--yes"]);
    assert!(said.contains("1 of 1 dead letter delivered"), "{said}");
    told.insert("d3".to_owned(), refused);
    real.wait_for_all(&receiver, &told, &daemon);
    assert!(desk.done(&["dead-letters", "list"]).contains("no dead letters"), "its letter is gone");
}

#[test]
fn a_conflict_is_told_with_its_leaves_and_so_is_its_end() {
    let Some(real) = Real::start("conflicts") else { return };
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let loser = "1-00000000000000000000000000000001";
    let rev = real.put("a", r#"{"n":1.0}"#, None);
    let mut daemon = real.daemon(&receiver, "conflicts = true\nconflict_docs = true");
    let told = |n: usize, daemon: &Daemon| {
        assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= n), "{}", daemon.transcript());
        receiver.look(|record| {
            let last = record.deliveries().iter().rfind(|one| one.accepted()).unwrap();
            (last.webhook_id.clone(), serde_json::from_slice::<Value>(&last.body).unwrap())
        })
    };
    let (first, event) = told(1, &daemon);
    assert_eq!(event["type"], "document.updated");
    let fork = json!({"new_edits": false, "docs": [{"_id": "a", "_rev": loser, "n": 2}]}).to_string();
    let reply = real.ask("POST", &format!("/{}/_bulk_docs", real.db), &fork);
    assert!((200..300).contains(&reply.status), "{reply:?}");
    let (second, event) = told(2, &daemon);
    println!("{event}");
    assert_eq!(event["type"], "document.conflicted");
    assert_eq!((&event["data"]["rev"], &event["data"]["conflicts"]), (&json!(rev), &json!([loser])));
    assert_eq!(event["data"]["conflict_docs"], json!([{"_id": "a", "_rev": loser, "n": 2}]));
    // What ends it comes while we are down.
    daemon.kill();
    let reply = real.ask("DELETE", &format!("/{}/a?rev={loser}", real.db), "");
    assert!((200..300).contains(&reply.status), "{reply:?}");
    let before = receiver.look(|record| record.n_accepted());
    daemon.start_again();
    let resolved = |record: &couch_hookd::standin::record::Record| {
        record
            .deliveries()
            .iter()
            .any(|one| one.event().is_some_and(|one| one.event_type == "document.resolved"))
    };
    assert!(receiver.wait_until(WAIT_MAX, resolved), "{}", daemon.transcript());
    let (third, event) = told(before + 1, &daemon);
    println!("{event}");
    assert_eq!((&event["data"]["rev"], &event["data"]["conflicts"]), (&json!(rev), &json!([])));
    assert!(third != first && third != second, "{third}");
    let until = sys::now() + WAIT_MAX;
    let path = format!("/{}/_all_docs", real.state_db);
    while real.ask("GET", &path, "").body.contains("\"conflict:") {
        assert!(sys::now() < until, "it is still listed\n{}", daemon.transcript());
        sys::sleep(Duration::from_millis(100));
    }
}
