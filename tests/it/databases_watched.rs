//! What is told of databases themselves, and that it survives kills: the watcher against the stand-in, without a daemon.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use couch_hookd::config::Hookd;
use couch_hookd::couch::client::{Server, Welcome};
use couch_hookd::couch::leases::Hold;
use couch_hookd::couch::local_docs;
use couch_hookd::couch::remembered::Memory;
use couch_hookd::pipeline::complaints::Outage;
use couch_hookd::pipeline::hints::Hints;
use couch_hookd::pipeline::lookout::Lookout;
use couch_hookd::pipeline::watcher::{Watcher, Watching};
use couch_hookd::pure::checkpoint::{Mark, StateKey};
use couch_hookd::pure::format::Format;
use couch_hookd::pure::message::{Arrived, Telling, Watch};
use couch_hookd::pure::remembered::position_now;
use couch_hookd::pure::seq::Seq;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::docs::assert_fits;
use crate::host::WAIT_MAX;
use crate::world::{Daemon, FLAVOURS, Ini, on_each};

const STATE_DB: &str = "couch_hookd";

struct World {
    couch: StandIn,
    hookd: Hookd,
    welcome: Welcome,
    mark: Mark,
}

impl World {
    fn new(flavour: Flavour) -> World {
        let couch = StandIn::start(Options::new(flavour)).unwrap();
        couch.create_db(STATE_DB);
        let hookd = Hookd {
            sweep_interval: Duration::from_millis(500),
            sweep_rate: 1000,
            ..crate::couch::hookd(&couch.url())
        };
        let server = Server::new(&hookd).unwrap();
        let welcome = server.welcome().unwrap();
        let mark =
            local_docs::ensure_mark(&server, welcome.generation, STATE_DB, false, &sys::sleep).unwrap();
        World { couch, hookd, welcome, mark }
    }

    /// A life of the daemon.
    fn start(&self, through: &Seq) -> Life {
        let server = Server::new(&self.hookd).unwrap();
        let outage = Arc::new(Outage::new(self.couch.url()));
        let lookout = Arc::new(Lookout::new(&server, &self.hookd, Arc::<Hints>::default(), outage));
        let telling = Telling {
            webhook: "dbs".to_owned(),
            db: STATE_DB.to_owned(),
            source: format!("http://couch.example/{STATE_DB}"),
            events: vec!["database.*".to_owned()],
            include_docs: false,
            conflicts: false,
            conflict_docs: false,
            design_docs: false,
            payload_bytes_max: 1 << 20,
            format: Format::Standard,
            watch: Watch::Changes,
        };
        let mut watcher = Watcher::new(Watching {
            memory: Memory {
                server: server.clone(),
                key: StateKey::new([7; 32]),
                telling,
                seek: None,
                hold: Hold::unlimited(),
                stopping: Arc::default(),
            },
            wanted: Arc::new(|db| db.starts_with("tenant-")),
            lookout: Arc::clone(&lookout),
        });
        watcher.open(&self.welcome, self.mark, Some(through)).unwrap();
        Life { watcher, lookout, server, through: through.clone() }
    }
}

struct Life {
    watcher: Watcher,
    lookout: Arc<Lookout>,
    server: Server,
    through: Seq,
}

impl Life {
    /// Waits until all of these were told; gives what was, with the ids.
    #[track_caller]
    fn until(&mut self, expected: &[&str]) -> Vec<(String, String)> {
        let mut told: Vec<(String, String)> = Vec::new();
        let deadline = sys::now() + WAIT_MAX;
        loop {
            let has_all = |told: &[(String, String)]| {
                expected.iter().all(|wanted| told.iter().any(|(text, _)| text == wanted))
            };
            if has_all(&told) {
                return told;
            }
            assert!(sys::now() < deadline, "expected {expected:?}, got {told:?}");
            let mut emit = |events: Vec<Arrived>| {
                told.extend(events.iter().filter_map(|arrived| arrived.event.as_ref()).map(told_of));
                false
            };
            let waited =
                self.watcher.wait(&|| false, &self.through, Duration::from_secs(1), &mut emit).unwrap();
            self.through = waited.last_seq;
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let threads = self.lookout.stop();
        self.server.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// `database.updated {"db":…}`, and the `webhook-id`.
fn told_of(event: &couch_hookd::pure::message::Event) -> (String, String) {
    let about = event.about.as_ref().unwrap();
    (format!("{} {}", about.event_type, about.data), event.id.to_string())
}

/// Bodies that were accepted, in order; each is what docs/events.md says.
pub(crate) fn bodies(record: &Record) -> Vec<Value> {
    let accepted = record.deliveries().iter().filter(|one| one.accepted());
    let bodies = accepted.map(|one| serde_json::from_slice(&one.body).unwrap()).inspect(|body: &Value| {
        assert_fits("database", body);
        let names_a_ddoc = body["data"].get("id").is_some();
        assert_eq!(body["type"] == "database.ddoc_updated", names_a_ddoc, "{body}");
    });
    bodies.collect()
}

fn text(event_type: &str, db: &str) -> String {
    format!("database.{event_type} {{\"webhook\":\"dbs\",\"db\":\"{db}\"}}")
}

#[test]
fn databases_that_come_change_and_go_are_told_with_hints_and_without() {
    let cases = FLAVOURS.map(|flavour| [(flavour, true), (flavour, false)]);
    on_each(cases.as_flattened(), |(flavour, hints)| {
        let world = World::new(flavour);
        let couch = &world.couch;
        couch.create_db("tenant-old");
        couch.create_db("other");
        if hints {
            couch.create_db("_global_changes");
        }
        couch.quirks(|quirks| quirks.drop_updates = !hints);
        let mut life = world.start(&position_now());
        couch.create_db("tenant-new");
        let mut told = life.until(&[&text("created", "tenant-new")]);
        couch.put("tenant-new", "a", &json!({})).unwrap();
        couch.put("other", "a", &json!({})).unwrap();
        told.extend(life.until(&[&text("updated", "tenant-new")]));
        couch.put("tenant-new", "_design/v", &json!({})).unwrap();
        let ddoc = "database.ddoc_updated {\"webhook\":\"dbs\",\"db\":\"tenant-new\",\"id\":\"_design/v\"}";
        told.extend(life.until(&[ddoc]));
        couch.delete_db("tenant-old");
        told.extend(life.until(&[&text("deleted", "tenant-old")]));
        couch.delete_db("tenant-new");
        couch.create_db("tenant-new");
        couch.put("tenant-new", "a", &json!({})).unwrap();
        // A walk between the two may see it gone, and come.
        let again = [text("recreated", "tenant-new"), text("created", "tenant-new")];
        while !told.iter().skip(1).any(|(text, _)| again.contains(text)) {
            let more = life.until(&[]);
            told.extend(more);
            told.extend(one(&mut life));
        }
        let strange = |text: &&str| text.contains("other") || text.contains("created tenant-old");
        assert!(!told.iter().any(|(text, _)| strange(&text.as_str())), "{flavour:?} {told:?}");
        let ids: BTreeSet<&String> = told.iter().map(|(_, id)| id).collect();
        assert_eq!(ids.len(), told.len(), "each has its own id");
    });
}

/// What one wait gives.
fn one(life: &mut Life) -> Vec<(String, String)> {
    let mut told = Vec::new();
    let mut emit = |events: Vec<Arrived>| {
        told.extend(events.iter().filter_map(|arrived| arrived.event.as_ref()).map(told_of));
        false
    };
    let waited = life.watcher.wait(&|| false, &life.through, Duration::from_secs(1), &mut emit).unwrap();
    life.through = waited.last_seq;
    told
}

#[test]
fn what_was_told_and_not_delivered_is_told_again_with_its_id_and_what_happened_meanwhile_too() {
    for flavour in FLAVOURS {
        let world = World::new(flavour);
        let couch = &world.couch;
        (0..5).for_each(|n| couch.create_db(&format!("tenant-{n}")));
        drop(world.start(&position_now()));
        // Killed before it looked into any: those that were there are still known, not told.
        couch.create_db("tenant-5");
        let mut life = world.start(&position_now());
        let first = life.until(&[&text("created", "tenant-5")]);
        assert_eq!(first.len(), 1, "{flavour:?} {first:?}");
        drop(life);
        couch.create_db("tenant-6");
        couch.put("tenant-5", "a", &json!({})).unwrap();
        // Nothing was delivered: the checkpoint is where it was.
        let mut life = world.start(&position_now());
        let wanted = [text("created", "tenant-5"), text("created", "tenant-6"), text("updated", "tenant-5")];
        let second = life.until(&wanted.each_ref().map(String::as_str));
        assert!(second.contains(&first[0]), "{flavour:?} {second:?}");
        // All of it was.
        let through = life.through.clone();
        drop(life);
        couch.delete_db("tenant-0");
        let mut life = world.start(&through);
        let third = life.until(&[&text("deleted", "tenant-0")]);
        assert_eq!(third.len(), 1, "{flavour:?} {third:?}");
    }
}

#[test]
fn what_is_written_before_the_first_look_is_told_when_couchdb_tells_of_it() {
    let world = World::new(Flavour::V3);
    let couch = &world.couch;
    ["_global_changes", "tenant-old", "tenant-same"].iter().for_each(|db| couch.create_db(db));
    // No walk leads to any.
    let fault =
        Fault { request: "POST /_dbs_info".to_owned(), times: 1_000_000, kind: FaultKind::Status(500) };
    couch.quirks(|quirks| quirks.faults.push(fault));
    let mut life = world.start(&position_now());
    assert!(couch.wait_until(WAIT_MAX, |seen| seen.n_requests("GET /_db_updates") > 0));
    couch.put("tenant-old", "a", &json!({})).unwrap();
    assert_eq!(life.until(&[&text("updated", "tenant-old")]).len(), 1);
    couch.put("tenant-old", "a", &json!({})).unwrap();
    assert_eq!(life.until(&[&text("updated", "tenant-old")]).len(), 1);
    couch.quirks(|quirks| quirks.faults.clear());
    couch.delete_db("tenant-old");
    assert_eq!(life.until(&[&text("deleted", "tenant-old")]).len(), 1, "the other one did not change");
}

/// There is one walk over all databases, so nothing to divide.
#[test]
fn one_daemon_tells_of_databases_also_where_the_lease_is_to_be_shared() {
    let couch = crate::world::couch(Flavour::V3, &["_global_changes"]);
    let receiver = crate::world::receiver_with(|options| options.keep_bodies = true);
    let ini = Ini::new(&couch.url()).hookd("sweep_interval = 1s\nsweep_rate = 1000").webhook(
        "dbs",
        &receiver.url(),
        "watch = databases\ndb = tenant-*\nlease = shared",
    );
    let times = [("HOOKD_TEST_LEASE_TTL_MS", "1500")];
    let mut daemons = [Daemon::start_with(&ini, &times), Daemon::start_with(&ini, &times)];
    daemons[0].wait_for_log("with `watch = databases` there is nothing to divide");
    let holder = || {
        let lease = couch.winner(STATE_DB, "lease:dbs").filter(|doc| !doc.deleted)?;
        let lease: Value = serde_json::from_str(&lease.json).unwrap();
        lease["pid"].as_u64().filter(|_| lease["released"] == false)
    };
    let is_told = |db: &str, daemons: &[Daemon; 2]| {
        let told = |record: &Record| bodies(record).iter().any(|body| body["data"]["db"] == db);
        let log = || daemons.each_ref().map(Daemon::transcript).join("\n");
        assert!(receiver.wait_until(WAIT_MAX, told), "{}", log());
    };
    couch.create_db("tenant-1");
    is_told("tenant-1", &daemons);
    let pid = holder().expect("whoever told holds it");
    daemons.iter_mut().find(|one| u64::from(one.pid()) == pid).expect("it is one of them").kill();
    couch.create_db("tenant-2");
    is_told("tenant-2", &daemons);
    assert_ne!(holder(), Some(pid));
    let ids: BTreeSet<String> = receiver
        .look(|record| bodies(record).iter().map(|body| body["id"].as_str().unwrap().to_owned()).collect());
    assert_eq!(ids.len(), 2, "{ids:?}");
}

#[test]
fn a_daemon_tells_of_databases_through_kills() {
    for flavour in FLAVOURS {
        let couch = crate::world::couch(flavour, &["tenant-old", "other"]);
        let receiver = crate::world::receiver_with(|options| options.keep_bodies = true);
        let ini = Ini::new(&couch.url()).hookd("sweep_interval = 1s\nsweep_rate = 1000").webhook(
            "dbs",
            &receiver.url(),
            "watch = databases\ndb = tenant-*",
        );
        let mut world = crate::world::World { daemon: Daemon::start(&ini), couch, receiver };
        world
            .daemon
            .wait_for_log("webhook `dbs` starts for the first time: tells which of the databases `tenant-*`");
        world.daemon.wait_for_log("databases found by pattern: 1");
        world.couch.create_db("other-2");
        world.couch.create_db("tenant-1");
        let has = |event_type: &str, db: &str| {
            let wanted = (format!("database.{event_type}"), db.to_owned());
            move |record: &Record| {
                let mut bodies = bodies(record).into_iter();
                bodies
                    .any(|body| (&body["type"], &body["data"]["db"]) == (&json!(wanted.0), &json!(wanted.1)))
            }
        };
        world.wait("created", has("created", "tenant-1"));
        world.daemon.kill();
        world.couch.put("tenant-1", "a", &json!({})).unwrap();
        world.couch.delete_db("tenant-old");
        world.couch.create_db("tenant-2/x");
        world.daemon.start_again();
        world.wait("updated", has("updated", "tenant-1"));
        world.wait("deleted", has("deleted", "tenant-old"));
        world.wait("created, too", has("created", "tenant-2/x"));
        world.receiver.look(|record| {
            for body in bodies(record) {
                let (source, db) = (body["source"].as_str().unwrap(), body["data"]["db"].as_str().unwrap());
                assert!(
                    source.ends_with(&format!("/{}", couch_hookd::couch::client::encoded(db))),
                    "{source}"
                );
                assert!(db.starts_with("tenant-"), "{db}");
            }
        });
        world.assert_clean();
    }
}
