//! The daemon at pouchdb-server: integer seqs, no `pending`, feeds that outlive their database.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::http_client::ask;
use crate::outside::pouchdb::Pouch;
use crate::world::{Daemon, Ini, has_all, receiver};

fn put(pouch: &Pouch, id: &str, body: &Value, rev: Option<&str>) -> String {
    let rev = rev.map_or(String::new(), |rev| format!("?rev={rev}"));
    let reply = ask(&pouch.url, "PUT", &format!("/orders/{id}{rev}"), &body.to_string());
    assert_eq!(reply.status, 201, "{reply:?}");
    reply.json()["rev"].as_str().unwrap().to_owned()
}

#[test]
fn everything_arrives_over_kills_and_a_database_made_again() {
    if !std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pouchdb/node_modules")).is_dir() {
        eprintln!("skipped: pouchdb-server (tests/pouchdb/node_modules is missing; tests/run installs it)");
        return;
    }
    if !super::pouchdb_is_there() {
        return;
    }
    let pouch = Pouch::start();
    assert_eq!(ask(&pouch.url, "PUT", "/orders", "").status, 201);
    let receiver = receiver();
    // A feed of a deleted database stays open for ever: only reading it anew shows that it is gone.
    // Nobody is admin there, and unknown logins are refused: the later URL, without one, counts.
    let lines = format!("couchdb_url = {}\nfeed_timeout = 1s", pouch.url);
    let ini = Ini::new(&pouch.url).hookd(&lines).webhook("orders", &receiver.url(), "since = now");
    let mut daemon = Daemon::start(&ini);
    daemon.wait_for_log("starts for the first time");
    let wait_for = |revs: &BTreeMap<String, String>, daemon: &Daemon| {
        let all = receiver.wait_until(WAIT_MAX, |record| has_all(record, "orders", revs));
        assert!(all, "{}\n{}", daemon.transcript(), receiver.look(|record| record.transcript()));
    };
    let mut revs = BTreeMap::new();
    for round in 0..4 {
        for i in 0..30 {
            let id = format!("d{i}");
            let rev = put(&pouch, &id, &json!({"n": round}), revs.get(&id).map(String::as_str));
            revs.insert(id, rev);
        }
        daemon.kill();
        daemon.start_again();
        wait_for(&revs, &daemon);
    }
    let reply = ask(&pouch.url, "DELETE", &format!("/orders/d0?rev={}", revs["d0"]), "");
    revs.insert("d0".to_owned(), reply.json()["rev"].as_str().unwrap().to_owned());
    wait_for(&revs, &daemon);
    let deleted =
        receiver.look(|record| record.deliveries().last().map(|one| one.events[0].event_type.clone()));
    assert_eq!(deleted.as_deref(), Some("document.deleted"));
    assert_eq!(receiver.look(|record| record.violations().to_vec()), []);

    assert_eq!(ask(&pouch.url, "DELETE", "/orders", "").status, 200);
    assert_eq!(ask(&pouch.url, "PUT", "/orders", "").status, 201);
    let told = receiver.look(|record| record.n_accepted());
    for i in 0..5 {
        put(&pouch, &format!("new{i}"), &json!({}), None);
    }
    let came = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == told + 5);
    assert!(came, "{}", daemon.transcript());
    daemon.wait_for_log("database.recreated");
    assert_eq!(daemon.n_logged("ERROR"), 0, "{}", daemon.transcript());
}
