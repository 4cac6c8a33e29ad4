//! Databases found by pattern at the real CouchDB that `COUCHDB_URL` names: hints and sweeps as it gives them.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::outside::couchdb::Real;
use crate::world::{Daemon, long, receiver};

/// A real server opens databases slowly.
const PATIENCE: Duration = Duration::from_secs(120);

/// Databases beside the test's own, deleted at the end.
struct Tenants<'a> {
    real: &'a Real,
    names: Vec<String>,
}

impl Tenants<'_> {
    fn make(&mut self, n: usize) {
        for _ in 0..n {
            let name = format!("{}-tenant-{}", self.real.db, self.names.len());
            let reply = self.real.ask("PUT", &format!("/{name}"), "");
            assert!((200..300).contains(&reply.status), "{reply:?}");
            self.names.push(name);
        }
    }

    fn write(&self, names: &[String], id: &str) {
        for name in names {
            let reply = self.real.ask("PUT", &format!("/{name}/{id}"), "{}");
            assert!((200..300).contains(&reply.status), "{reply:?}");
        }
    }
}

impl Drop for Tenants<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = self.real.ask("DELETE", &format!("/{name}"), "");
        }
    }
}

#[test]
fn databases_of_a_real_server_are_found_and_told_of_and_let_go() {
    let Some(real) = Real::start("patterns") else { return };
    let mut tenants = Tenants { real: &real, names: Vec::new() };
    let n = if long() { 60 } else { 20 };
    tenants.make(n);
    tenants.write(&tenants.names, "before");
    let receiver = receiver();
    let lines = format!("db = {}-tenant-*\nsince = now", real.db);
    let ini =
        real.ini().hookd("sweep_interval = 3s\nsweep_rate = 200").webhook("tenants", &receiver.url(), &lines);
    let mut daemon = Daemon::start(&ini);
    daemon.wait_for_log("webhook `tenants` starts for the first time: tells changes");
    let wait = |what: &str, id: &str, names: &[String], daemon: &Daemon| {
        let is_told = receiver.wait_until(PATIENCE, |record| {
            let told: BTreeSet<&str> = record
                .deliveries()
                .iter()
                .filter(|one| one.accepted() && one.doc_id() == id)
                .map(couch_hookd::standin::record::Delivery::db)
                .collect();
            names.iter().all(|name| told.contains(name.as_str()))
        });
        assert!(is_told, "{what}: not all are told\n{}", daemon.transcript());
    };
    tenants.write(&tenants.names, "after");
    wait("those that were there", "after", &tenants.names, &daemon);
    tenants.make(n);
    let new = tenants.names[n..].to_vec();
    tenants.write(&new, "first");
    wait("new ones", "first", &new, &daemon);
    daemon.kill();
    tenants.write(&tenants.names, "down");
    // Made again while nobody looks, with the same document.
    let again = tenants.names[0].clone();
    real.ask("DELETE", &format!("/{again}"), "");
    real.ask("PUT", &format!("/{again}"), "");
    tenants.write(&[again], "down");
    daemon.start_again();
    wait("after a kill", "down", &tenants.names, &daemon);
    receiver.look(|record| {
        let before = record.deliveries().iter().filter(|one| one.doc_id() == "before").count();
        assert_eq!(before, 0, "what was there before was told");
    });
}
