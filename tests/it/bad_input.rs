//! What CouchDB should not say, and documents that are hard to pass: one clear line each, and nothing is lost.

use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, Options, Seen, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Receiver;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::http_client::Open;
use crate::world::{Daemon, FLAVOURS, Ini, World, couch, long, on_each, receiver, receiver_with, write};

/// How every line about this webhook's reading begins.
const PLACE: &str = "webhook `orders`, database `orders`: failed to read changes since `";

/// One line of the log that holds `text` and nothing twice; stdout is not ours.
#[track_caller]
fn said_once(daemon: &Daemon, text: &str) -> String {
    let line = daemon.wait_for_log(text);
    assert_eq!(daemon.n_logged(text), 1, "{}", daemon.transcript());
    assert_eq!(daemon.n_logged("stdout: "), 0, "{}", daemon.transcript());
    line
}

/// An answer to make instead of the right one, so many times, to requests that hold `part`.
fn spoil(couch: &StandIn, part: &str, times: u32, kind: FaultKind) {
    let request = part.to_owned();
    couch.quirks(|quirks| quirks.faults.push(Fault { request, times, kind }));
}

/// Answers that are no page of changes, and what is said of them.
const NO_PAGES: [(FaultKind, &str); 9] = [
    (FaultKind::Html(200), "expected CouchDB's changes, got `<html><head><title>Bad gateway"),
    (FaultKind::Html(502), "502, expected CouchDB's JSON, got `<html><head><title>Bad gateway"),
    (FaultKind::Body(b""), "expected a page of changes, got nothing"),
    (FaultKind::Body(b"[1,2,3]\n"), "expected CouchDB's changes, got `[1,2,3]"),
    (FaultKind::Body(b"{\"error\":\"bad_thing\",\"reason\":\"it broke\"}\n"), "CouchDB broke off: bad_thing: it broke"),
    (FaultKind::Body(b"{\"results\":[\n{\"seq\":0,\"changes\":[]}\n],\n\"last_seq\":9}\n"), "expected `seq`, `id` and `changes`"),
    (
        FaultKind::Body(b"{\"results\":[\n{\"seq\":0,\"id\":\"ghost\",\"changes\":[{\"rev\":\"1-a\"}]},\n"),
        "the answer ended in the middle of a page",
    ),
    (
        FaultKind::Body(b"{\"results\":[\n{\"seq\":0,\"id\":\"ghost\",\"cha\n],\n\"last_seq\":9}\n"),
        "row `ghost`: the answer ended within it",
    ),
    (
        FaultKind::Body(b"{\"results\":[\n{\"seq\":0,\"id\":\"d\xff\",\"changes\":[{\"rev\":\"1-a\"}]}\n],\n\"last_seq\":9}\n"),
        "row `d\u{fffd}`: it is not UTF-8",
    ),
];

#[test]
fn what_is_no_page_of_changes_is_said_and_read_again() {
    on_each(&NO_PAGES, |(kind, expected)| {
        let couch = couch(Flavour::V1, &["orders"]);
        write(&couch, "orders", 5);
        spoil(&couch, "/orders/_changes?since=0&feed=normal", 1, kind);
        let world = World::start_on(couch, receiver(), "");
        let line = said_once(&world.daemon, PLACE);
        assert!(line.contains("[ERROR]") && line.contains("`0`: ") && line.contains(expected), "{line}");
        world.wait_for_all("orders");
    });
}

#[test]
fn what_is_no_line_of_a_feed_is_said_and_read_again() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        // Enough for an empty page.
        couch.quirks(|quirks| quirks.cut_feeds_after = Some(500));
        let world = World::start_on(couch, receiver(), "");
        world.wait_couch("waiting feed", |seen| seen.n_open_feeds() == 1);
        write(&world.couch, "orders", 20);
        let line = said_once(&world.daemon, PLACE);
        assert!(line.contains("[WARN]") && line.contains("the answer was cut off"), "{line}");
        world.couch.quirks(|quirks| quirks.cut_feeds_after = None);
        world.wait_for_all("orders");
        world.daemon.wait_for_log("reading again");

        let kind = FaultKind::Body(b"{\"seq\":0,\"id\":\"gh\n");
        spoil(&world.couch, "feed=continuous", 1, kind);
        world.couch.stop();
        world.couch.start_again().unwrap();
        let line = world.daemon.wait_for_nth_log(PLACE, 2);
        assert!(line.contains("`{\"seq\":0,\"id\":\"gh\\n`: the answer ended within it"), "{line}");
        world.couch.put("orders", "new", &json!({})).unwrap();
        world.wait_for_all("orders");
    });
}

#[test]
fn rows_without_a_seq_are_told_and_gone_behind() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.quirks(|quirks| quirks.seq_every = Some(10));
        write(&couch, "orders", 250);
        let mut world = World::start_on(couch, receiver(), "");
        world.wait_for_all("orders");
        write(&world.couch, "orders", 15);
        world.wait_for_all("orders");
        world.daemon.kill();
        world.daemon.start_again();
        world.couch.put("orders", "new", &json!({})).unwrap();
        world.wait_for_all("orders");
        assert_eq!(world.daemon.n_logged("ERROR"), 0, "{}", world.transcript());
    });
}

#[test]
fn a_filter_that_throws_is_said_with_its_reason_and_never_skipped() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        let thrower = |doc: &Value, _: &couch_hookd::standin::http::Request| match doc["_id"].as_str() {
            Some("bad") => Err("TypeError: doc.a is undefined".to_owned()),
            _ => Ok(true),
        };
        couch.filter("app/mine", thrower);
        write(&couch, "orders", 5);
        couch.put("orders", "bad", &json!({})).unwrap();
        couch.put("orders", "last", &json!({})).unwrap();
        let mut world = World::start_on(couch, receiver(), "filter = app/mine");
        let line = world.daemon.wait_for_log(PLACE);
        assert!(line.contains("[ERROR]") && line.contains("TypeError: doc.a is undefined"), "{line}");
        let changes = |seen: &Seen<'_>| seen.n_requests("/orders/_changes");
        world.wait_couch("three tries", |seen| changes(seen) >= 3);
        // The fourth comes in five minutes, not in the next two seconds.
        assert!(!world.couch.wait_until(Duration::from_secs(2), |seen| changes(seen) > 3));
        said_once(&world.daemon, PLACE);
        world.daemon.kill();
        world.couch.filter("app/mine", |_, _| Ok(true));
        world.daemon.start_again();
        world.wait_for_all("orders");
    });
}

#[test]
fn a_missing_filter_is_not_a_missing_database() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        write(&couch, "orders", 5);
        couch.put("orders", "_design/app", &json!({})).unwrap();
        let (no_filter, no_ddoc, no_db) = (receiver(), receiver(), receiver());
        let ini = Ini::new(&couch.url())
            .webhook("no-filter", &no_filter.url(), "db = orders\nfilter = app/mine")
            .webhook("no-ddoc", &no_ddoc.url(), "db = orders\nfilter = none/mine")
            .webhook("no-db", &no_db.url(), "db = none\nfilter = app/mine");
        let daemon = Daemon::start(&ini);
        let line = daemon.wait_for_log("webhook `no-filter`, database `orders`: failed to read");
        assert!(line.contains("[ERROR]") && line.contains("404 not_found: missing json key: "), "{line}");
        let line = daemon.wait_for_log("webhook `no-ddoc`, database `orders`: failed to read");
        assert!(line.contains("[ERROR]") && line.contains("404 not_found: missing;"), "{line}");
        let line = said_once(&daemon, "does not exist; waiting for it");
        assert!(line.contains("[WARN]") && line.contains("webhook `no-db`, database `none`"), "{line}");
        // What was missing comes.
        couch.filter("app/mine", |_, _| Ok(true));
        couch.create_db("none");
        couch.put("none", "d", &json!({})).unwrap();
        let came = no_db.wait_until(Duration::from_secs(10), |record| record.n_accepted() == 1);
        assert!(came, "{}", daemon.transcript());
        assert_eq!(daemon.n_logged("database.recreated"), 0, "{}", daemon.transcript());
        assert_eq!(daemon.n_logged("failed to read"), 2, "{}", daemon.transcript());
    });
}

/// A server whose admin is `admin` with `right`, with five documents.
fn guarded(flavour: Flavour) -> StandIn {
    let admin = Some(("admin".to_owned(), "right".to_owned()));
    let couch = StandIn::start(Options { admin, ..Options::new(flavour) }).unwrap();
    couch.create_db("orders");
    write(&couch, "orders", 5);
    couch
}

fn with_password(couch: &StandIn, receiver: &Receiver, password: &str) -> Ini {
    let ini = Ini::new(&couch.url().replacen("://", &format!("://admin:{password}@"), 1));
    ["one", "two", "three"].iter().fold(ini, |ini, name| ini.webhook(name, &receiver.url(), "db = orders"))
}

#[test]
fn a_wrong_password_is_tried_once() {
    on_each(&FLAVOURS, |flavour| {
        let couch = guarded(flavour);
        let receiver = receiver();
        let daemon = Daemon::start(&with_password(&couch, &receiver, "wrong"));
        let line = said_once(&daemon, "does not let us in");
        assert!(line.contains("[ERROR]") && line.contains("401 unauthorized: Name or password"), "{line}");
        // Five would lock the account for everybody; the next comes in five minutes.
        assert!(!couch.wait_until(Duration::from_secs(2), |seen| seen.requests().count() > 1));
        daemon.configure(&with_password(&couch, &receiver, "right").text());
        daemon.signal(Signal::SIGHUP);
        let told = receiver.wait_until(Duration::from_secs(10), |record| record.n_accepted() == 15);
        assert!(told, "{}", daemon.transcript());
        assert!(!daemon.transcript().contains("wrong"), "{}", daemon.transcript());
    });
}

#[test]
fn a_locked_account_is_left_alone() {
    let couch = guarded(Flavour::V3);
    // `admin:wrong`, five times.
    for _ in 0..5 {
        let headers = [("Authorization", "Basic YWRtaW46d3Jvbmc=")];
        assert_eq!(Open::send(&couch.url(), "GET", "/", &headers, "").unwrap().rest().status, 401);
    }
    let before = couch.look(|seen| seen.requests().count());
    let receiver = receiver();
    let mut daemon = Daemon::start(&with_password(&couch, &receiver, "right"));
    let line = said_once(&daemon, "does not let us in");
    assert!(line.contains("[ERROR]") && line.contains("Account is temporarily locked"), "{line}");
    assert!(!couch.wait_until(Duration::from_secs(1), |seen| seen.requests().count() > before + 1));
    couch.unlock();
    daemon.kill();
    daemon.start_again();
    let told = receiver.wait_until(Duration::from_secs(10), |record| record.n_accepted() == 15);
    assert!(told, "{}", daemon.transcript());
}

#[test]
fn a_position_that_couchdb_does_not_know_is_said_and_read_from_the_beginning() {
    let mut world = World::start(Flavour::V3, "");
    write(&world.couch, "orders", 5);
    world.wait_for_all("orders");
    world.wait_couch("checkpoint", |seen| seen.n_requests("PUT /orders/_local/couch-hookd.orders") > 0);
    world.daemon.kill();
    world.couch.quirks(|quirks| quirks.unknown_seqs = 1);
    world.couch.put("orders", "new", &json!({})).unwrap();
    world.daemon.start_again();
    said_once(&world.daemon, "CouchDB does not know the stored position; reading from the beginning");
    world.wait_for_all("orders");
}

/// The `doc` of a request, byte for byte, and its `doc_omitted`.
fn told_doc(world: &World, doc_id: &str) -> (Option<String>, Value) {
    #[derive(serde::Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        data: Data<'a>,
    }
    #[derive(serde::Deserialize)]
    struct Data<'a> {
        #[serde(borrow)]
        doc: Option<&'a serde_json::value::RawValue>,
        #[serde(default)]
        doc_omitted: Value,
    }
    world.wait(doc_id, |record| record.accepted_rev("orders", doc_id).is_some());
    world.receiver.look(|record| {
        let one = record.deliveries().iter().rfind(|one| one.doc_id() == doc_id).unwrap();
        let body: Body<'_> = serde_json::from_slice(&one.body).unwrap();
        (body.data.doc.map(|doc| doc.get().to_owned()), body.data.doc_omitted)
    })
}

/// What JSON libraries like to change.
const ODD: &str = "{\"z\":12345678901234567890123,\"a\":1.0,\"m\":-0.0,\"e\":1.0000000000000000199e+30,\
    \"u\":\"\u{2028}\\u2028\\/ü\",\"Z\":{\"b\":[],\"a\":null},\"\":\"\"}";

#[test]
fn odd_documents_arrive_byte_for_byte() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        let world = World::start_on(couch, receiver_with(|options| options.keep_bodies = true), "");
        world.couch.put_raw("orders", "odd", ODD).unwrap();
        let (doc, _) = told_doc(&world, "odd");
        let sent = world.couch.winner("orders", "odd").unwrap().json;
        assert_eq!(doc.as_deref(), Some(&*sent));
        assert!(sent.ends_with(&ODD[1..]), "the stand-in keeps bytes: {sent}");

        world.couch.quirks(|quirks| quirks.null_docs = 1);
        world.couch.put("orders", "gone", &json!({})).unwrap();
        assert_eq!(told_doc(&world, "gone"), (None, json!({"reason": "gone"})));
        world.assert_clean();
    });
}

#[test]
fn a_document_of_ten_megabytes_is_told_without_its_body_and_without_memory() {
    const MIB: usize = 1 << 20;
    // The stand-in is the slow part.
    let flavours: &[Flavour] = if long() { &FLAVOURS } else { &[Flavour::V3] };
    for flavour in flavours {
        let flavour = *flavour;
        let couch = couch(flavour, &["orders"]);
        let world = World::start_on(couch, receiver_with(|options| options.keep_bodies = true), "");
        write(&world.couch, "orders", 5);
        world.wait_for_all("orders");
        let before = world.daemon.rss_kib();
        for i in 0..if long() { 3 } else { 1 } {
            let doc_id = format!("large{i}");
            world.couch.put("orders", &doc_id, &json!({"x": "y".repeat(10 * MIB)})).unwrap();
            let (doc, omitted) = told_doc(&world, &doc_id);
            let length = world.couch.winner("orders", &doc_id).unwrap().json.len();
            assert_eq!((doc, omitted), (None, json!({"reason": "too_large", "bytes": length})));
        }
        let grown = world.daemon.rss_kib().saturating_sub(before);
        assert!(grown < 4 * 1024, "it grew by {grown} KiB\n{}", world.transcript());
        world.assert_clean();
    }
}
