//! The kill test with a real CouchDB, when `COUCHDB_URL` (with an admin's login) names one; of any version.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::http_client;
use crate::kills::{Size, Written, kill_through_the_beam};
use crate::world::{Ini, long, receiver};

/// A real server, and a database of its own that is deleted at the end.
struct Real {
    base: String,
    login: String,
    db: String,
}

impl Real {
    fn ask(&self, method: &str, path: &str, body: &str) -> http_client::Reply {
        let headers = [
            ("Authorization", self.login.as_str()),
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
        ];
        http_client::Open::send(&self.base, method, path, &headers, body).expect("an answer").rest()
    }
}

impl Written for Real {
    fn update(&self, from: usize, n: usize, docs: usize) {
        let revs = self.revs();
        // A document once at most in a request.
        let ids: BTreeSet<String> =
            (from..from + n).map(|i| format!("d{}", (i * 7919 + i / docs) % docs)).collect();
        let docs: Vec<_> = ids
            .iter()
            .map(|id| match revs.get(id) {
                Some(rev) => json!({"_id": id, "_rev": rev, "n": from}),
                None => json!({"_id": id, "n": from}),
            })
            .collect();
        let body = json!({"docs": docs}).to_string();
        assert_eq!(self.ask("POST", &format!("/{}/_bulk_docs", self.db), &body).status, 201);
    }

    fn revs(&self) -> BTreeMap<String, String> {
        let rows = self.ask("GET", &format!("/{}/_all_docs", self.db), "").json();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let rows = rows["rows"].as_array().unwrap().iter();
        rows.map(|row| (text(&row["id"]), text(&row["value"]["rev"]))).collect()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        for db in [self.db.clone(), format!("{}_state", self.db)] {
            self.ask("DELETE", &format!("/{db}"), "");
        }
    }
}

#[test]
fn kills_with_a_real_couchdb_lose_nothing() {
    use base64::Engine;
    let Some((base, login)) = std::env::var("COUCHDB_URL").ok().and_then(|url| {
        let (login, host) = url.strip_prefix("http://")?.split_once('@')?;
        Some((format!("http://{}", host.trim_end_matches('/')), login.to_owned()))
    }) else {
        println!("skipped: kills with a real CouchDB (COUCHDB_URL is not set)");
        return;
    };
    let size = match long() {
        true => Size { writes: 20_000, docs: 2_000, kills: 100, life: (50, 900) },
        false => Size { writes: 900, docs: 90, kills: 6, life: (50, 700) },
    };
    let (username, password) = login.split_once(':').unwrap();
    let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(&login));
    let couch = Real { base, login: basic, db: format!("i_kills_{}", std::process::id()) };
    assert_eq!(couch.ask("PUT", &format!("/{}", couch.db), "").status, 201);
    let receiver = receiver();
    let ini = Ini::new(&couch.base)
        .hookd(&format!("username = {username}\npassword = {password}\nstate_db = {}_state", couch.db))
        .webhook("orders", &receiver.url(), &format!("db = {}", couch.db));
    let numbers = kill_through_the_beam(&couch.base, &ini, &couch, &couch.db, &receiver, size);
    println!("{numbers}");
}
