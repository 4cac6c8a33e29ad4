//! `watch = replications` at a real CouchDB 2.1 or later, the one that `COUCHDB_URL` (with an admin's login) names.
//!
//! Five replications in a replicator database of the test's own: what CouchDB makes of them is told, and nothing else.
//! One of them writes through a port on which nobody listens at first.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::outside::couchdb::Real;
use crate::replications::told;
use crate::world::{Daemon, receiver_with};

/// CouchDB tries a crashed replication again after 30 s and more.
const WAIT_MAX: Duration = Duration::from_secs(150);
/// How long nothing more may be told: long enough for another try.
const QUIET: Duration = Duration::from_secs(40);

/// Passes bytes between a port and CouchDB; ends with the process.
fn open_port(port: u16, to: &str) {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let to = to.to_owned();
    let accept = move || {
        for from in listener.incoming().map_while(Result::ok) {
            let Ok(other) = TcpStream::connect(&to) else { continue };
            let (back, ours) = (other.try_clone().unwrap(), from.try_clone().unwrap());
            pump(from, other);
            pump(back, ours);
        }
    };
    detach(accept);
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    detach(move || {
        let mut bytes = [0; 16 * 1024];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

fn detach(work: impl FnOnce() + Send + 'static) {
    #[expect(clippy::disallowed_methods, reason = "it ends with the test process")]
    std::thread::spawn(work);
}

/// More databases, deleted at the end.
struct Databases<'a>(&'a Real, Vec<String>);

impl Databases<'_> {
    fn create<'a>(real: &'a Real, names: &[&str]) -> Databases<'a> {
        for name in names {
            let reply = real.ask("PUT", &format!("/{name}"), "");
            assert!((200..300).contains(&reply.status), "{reply:?}");
        }
        Databases(real, names.iter().map(|name| (*name).to_owned()).collect())
    }
}

impl Drop for Databases<'_> {
    fn drop(&mut self) {
        for name in &self.1 {
            self.0.ask("DELETE", &format!("/{name}"), "");
        }
    }
}

/// What came of each but that it waits or begins to run, which it may do too briefly to be seen.
fn kinds(record: &Record) -> BTreeMap<String, Vec<String>> {
    let lasting = |(id, all): (String, Vec<crate::replications::Told>)| {
        let mut kinds: Vec<String> = all.into_iter().map(|one| one.kind).collect();
        kinds.retain(|kind| !["initializing", "pending"].contains(&kind.as_str()));
        if id != "cont" && kinds.first().is_some_and(|kind| kind == "running") {
            kinds.remove(0);
        }
        (id, kinds)
    };
    told(record).into_iter().map(lasting).filter(|(_, kinds)| !kinds.is_empty()).collect()
}

#[test]
fn five_replications_tell_what_becomes_of_them() {
    let Some(real) = Real::start("rep") else { return };
    let version = real.ask("GET", "/", "").json()["version"].as_str().unwrap().to_owned();
    if version.starts_with("1.") || version.starts_with("2.0") {
        eprintln!("skipped: replications (CouchDB {version} has no scheduler)");
        return;
    }
    let replicator = format!("{}%2F_replicator", real.db);
    let (copy, elsewhere) = (format!("{}_copy", real.db), format!("{}_elsewhere", real.db));
    let _databases = Databases::create(&real, &[&replicator, &copy, &elsewhere]);
    real.put_all(&(0..8).map(|n| json!({"_id": format!("d{n}")})).collect::<Vec<_>>());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = real.base.strip_prefix("http://").unwrap();
    let behind_port = real.url.replace(host, &format!("127.0.0.1:{port}"));
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let lines =
        format!("watch = replications\nevents = *\npoll_interval = 250ms\ndb = {}/_replicator", real.db);
    let daemon = Daemon::start(&real.ini().webhook("sync", &receiver.url(), &lines));
    daemon.wait_for_log("webhook `sync`");

    let source = format!("{}/{}", real.url, real.db);
    let put = |id: &str, body: &Value| {
        let reply = real.ask("PUT", &format!("/{replicator}/{id}"), &body.to_string());
        assert!((200..300).contains(&reply.status), "{reply:?}");
    };
    let target = format!("{}/{copy}", real.url);
    put("done", &json!({"source": source, "target": target}));
    put("cont", &json!({"source": source, "target": target, "continuous": true}));
    let elsewhere_url = format!("{behind_port}/{elsewhere}");
    put(
        "closed",
        &json!({"source": source, "target": elsewhere_url, "continuous": true,
        "checkpoint_interval": 2_000, "retries_per_request": 1}),
    );
    put("no_filter", &json!({"source": source, "target": target, "filter": "nope/nope"}));
    put("no_source", &json!({"source": format!("{source}_nothere"), "target": target}));

    let expected = |closed: &[&str]| -> BTreeMap<String, Vec<String>> {
        let all: [(&str, &[&str]); 5] = [
            ("cont", &["running"]),
            ("closed", closed),
            ("done", &["completed"]),
            ("no_filter", &["error"]),
            ("no_source", &["crashing"]),
        ];
        all.iter()
            .map(|(id, kinds)| ((*id).to_owned(), kinds.iter().map(|kind| (*kind).to_owned()).collect()))
            .collect()
    };
    let said = || format!("{}\n{}", receiver.look(Record::transcript), daemon.transcript());
    let first = expected(&["crashing"]);
    assert!(receiver.wait_until(WAIT_MAX, |record| kinds(record) == first), "{}", said());
    receiver.look(|record| {
        let told = told(record);
        let last = |id: &str| told[id].last().unwrap().body["data"]["replication"].clone();
        for (id, class) in [("closed", "unreachable"), ("no_filter", "filter"), ("no_source", "not_found")] {
            assert_eq!(last(id)["error_class"], class, "{}", last(id));
        }
        let login = real.url.split_once("://").unwrap().1.split_once('@').unwrap().0;
        assert!(told.values().flatten().all(|one| !one.body.to_string().contains(login)));
    });

    open_port(port, host);
    let then = expected(&["crashing", "running", "recovered"]);
    assert!(receiver.wait_until(WAIT_MAX, |record| kinds(record) == then), "{}", said());
    // Nothing more, though those without a source and a filter are tried again.
    let more = receiver.wait_until(QUIET, |record| kinds(record) != then);
    assert!(!more, "{}", said());
    let began = sys::now();
    for id in ["done", "cont", "closed", "no_filter", "no_source"] {
        let rev =
            real.ask("GET", &format!("/{replicator}/{id}"), "").json()["_rev"].as_str().unwrap().to_owned();
        real.ask("DELETE", &format!("/{replicator}/{id}?rev={rev}"), "");
    }
    let gone = |record: &Record| {
        kinds(record).values().all(|kinds| kinds.last().is_some_and(|kind| kind == "removed"))
    };
    assert!(receiver.wait_until(WAIT_MAX, gone), "{}", said());
    println!("CouchDB {version}: removals told within {:?}", began.elapsed());
}
