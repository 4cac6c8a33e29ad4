//! What is told of databases themselves at the real CouchDB that `COUCHDB_URL` names; `--nocapture` shows every request.

use std::time::Duration;

use couch_hookd::standin::receiver::Receiver;
use serde_json::Value;

use crate::databases_watched::bodies;
use crate::outside::couchdb::Real;
use crate::world::{Daemon, receiver_with};

/// A real server opens databases slowly.
const PATIENCE: Duration = Duration::from_secs(60);

/// Databases beside the test's own, deleted at the end.
struct Made<'a>(&'a Real);

impl Made<'_> {
    fn name(&self, name: &str) -> String {
        format!("{}-{name}", self.0.db)
    }

    /// What is asked of a database, until CouchDB takes it: of one that is just deleted, or looked at, it may not at once.
    fn ask(&self, method: &str, name: &str, rest: &str, body: &str) {
        let path = format!("/{}{rest}", self.name(name).replace('/', "%2F"));
        let mut reply = self.0.ask(method, &path, body);
        for _ in 0..50 {
            if (200..300).contains(&reply.status) {
                return;
            }
            reply = self.0.ask(method, &path, body);
        }
        panic!("{method} {path}: {reply:?}");
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        for name in ["old", "new", "new/er", "gone"] {
            let _ = self.0.ask("DELETE", &format!("/{}", self.name(name).replace('/', "%2F")), "");
        }
    }
}

#[track_caller]
fn wait_for(receiver: &Receiver, daemon: &Daemon, event_type: &str, db: &str) {
    let is_it = |body: &Value| body["type"] == format!("database.{event_type}") && body["data"]["db"] == db;
    let told = receiver.wait_until(PATIENCE, |record| bodies(record).iter().any(is_it));
    let all = receiver.look(bodies);
    assert!(told, "no {event_type} of `{db}` in {all:#?}\n{}", daemon.transcript());
}

#[test]
fn databases_of_a_real_server_that_come_change_and_go_are_told_through_a_kill() {
    let Some(real) = Real::start("databases") else { return };
    let made = Made(&real);
    for name in ["old", "gone"] {
        made.ask("PUT", name, "", "");
        made.ask("PUT", name, "/before", "{}");
    }
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let lines = format!("watch = databases\ndb = {}-*\nsince = now", real.db);
    let ini =
        real.ini().hookd("sweep_interval = 2s\nsweep_rate = 200").webhook("dbs", &receiver.url(), &lines);
    let mut daemon = Daemon::start(&ini);
    daemon.wait_for_log("webhook `dbs` starts for the first time: tells which of the databases");
    daemon.wait_for_log("databases found by pattern: 2");
    let wait = |event_type: &str, name: &str, daemon: &Daemon| {
        wait_for(&receiver, daemon, event_type, &made.name(name));
    };
    made.ask("PUT", "new", "", "");
    wait("created", "new", &daemon);
    made.ask("PUT", "new", "/a", "{}");
    wait("updated", "new", &daemon);
    made.ask("PUT", "new", "/_design/v", r#"{"views":{}}"#);
    wait("ddoc_updated", "new", &daemon);
    daemon.kill();
    // Nobody looks: that it was gone in between shows in its mark alone.
    made.ask("DELETE", "new", "", "");
    made.ask("PUT", "new", "", "");
    made.ask("PUT", "new", "/a", "{}");
    made.ask("DELETE", "gone", "", "");
    made.ask("PUT", "new/er", "", "");
    daemon.start_again();
    wait("recreated", "new", &daemon);
    wait("deleted", "gone", &daemon);
    wait("created", "new/er", &daemon);
    made.ask("PUT", "old", "/after", "{}");
    wait("updated", "old", &daemon);
    made.ask("DELETE", "new/er", "", "");
    wait("deleted", "new/er", &daemon);
    receiver.look(|record| {
        for body in bodies(record) {
            println!("{body}");
            let (event_type, db) = (body["type"].as_str().unwrap(), body["data"]["db"].as_str().unwrap());
            assert!(db.starts_with(&format!("{}-", real.db)), "told of `{db}`");
            let is_known = event_type != "database.created" || db.contains("-new");
            assert!(is_known, "what was there at the first start was told as made: {body}");
        }
        assert_eq!((record.n_unverified(), record.violations()), (0, &[][..]), "{}", daemon.transcript());
    });
}
