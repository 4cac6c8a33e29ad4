//! Filtered feeds, on every version: nothing behind a full page is skipped, and busy databases are not scanned twice.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::Duration;

use couch_hookd::config::{Filter, Hookd, LogFormat};
use couch_hookd::couch::client::Server;
use couch_hookd::couch::feed::{Feed, FeedKind, FeedRequest};
use couch_hookd::pure::changes::Item;
use couch_hookd::pure::flow::{Flow, Opened, Read};
use couch_hookd::pure::format::Format;
use couch_hookd::pure::message::{Telling, Watch};
use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Receiver;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::world::{Daemon, FLAVOURS, Ini, World, couch, has_all, on_each, receiver, revs};

/// Every third document is `mine`, and so is every document that a filter passes.
fn write_some_mine(couch: &StandIn, db: &str, n: usize) -> BTreeMap<String, String> {
    for i in 0..n {
        couch.put(db, &format!("d{i}"), &json!({"mine": i % 3 == 0})).unwrap();
    }
    let mut mine = revs(couch, db);
    mine.retain(|id, _| id[1..].parse::<usize>().unwrap() % 3 == 0);
    mine
}

fn is_mine(doc: &Value) -> bool {
    doc["mine"] == json!(true)
}

/// The kinds of filters that a version has, as lines of a webhook's section.
fn filters(flavour: Flavour, ids: &BTreeMap<String, String>) -> Vec<(&'static str, String)> {
    let ids = serde_json::to_string(&ids.keys().collect::<Vec<_>>()).unwrap();
    let mut filters = vec![
        ("function", "filter = app/mine\nfilter_params = {\"who\": \"me\"}".to_owned()),
        ("view", "view = app/mine".to_owned()),
        ("ids", format!("doc_ids = {ids}")),
    ];
    if flavour != Flavour::V1 {
        filters.push(("selector", "selector = {\"mine\": true}".to_owned()));
    }
    filters
}

#[test]
fn every_kind_of_filter_loses_nothing_behind_full_pages() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.quirks(|quirks| {
            quirks.last_seq_skips = 5;
            quirks.filtered_feeds_never_end = true;
        });
        couch.filter("app/mine", |doc, request| {
            // A view has no parameters of ours.
            let asked_by = request.query_value("who").or(request.query_value("view"));
            match asked_by {
                Some("me" | "app/mine") => Ok(is_mine(doc)),
                other => Err(format!("asked by {other:?}")),
            }
        });
        let mine = write_some_mine(&couch, "orders", 720);
        let filters = filters(flavour, &mine);
        let receivers: Vec<Receiver> = filters.iter().map(|_| receiver()).collect();
        let mut ini = Ini::new(&couch.url());
        for ((name, filter), receiver) in filters.iter().zip(&receivers) {
            ini = ini.webhook(name, &receiver.url(), &format!("db = orders\n{filter}"));
        }
        let daemon = Daemon::start(&ini);
        for ((name, _), receiver) in filters.iter().zip(&receivers) {
            let all = receiver.wait_until(Duration::from_secs(10), |record| has_all(record, "orders", &mine));
            let told = receiver.look(|record| record.accepted_revs("orders").len());
            assert!(all, "{flavour:?} {name}: {told} of {}\n{}", mine.len(), daemon.transcript());
            assert_eq!(told, mine.len(), "{flavour:?} {name}: more than it should");
        }
        // Caught up, one more change arrives through the open request.
        couch.put("orders", "d0", &json!({"mine": true, "n": 2})).unwrap();
        let rev = couch.winner("orders", "d0").unwrap().rev;
        for receiver in &receivers {
            let came = receiver.wait_until(Duration::from_secs(10), |record| {
                record.accepted_rev("orders", "d0") == Some(&rev)
            });
            assert!(came, "{flavour:?}\n{}", daemon.transcript());
            assert_eq!(receiver.look(|record| record.violations().to_vec()), []);
        }
    });
}

#[test]
fn a_selector_on_couchdb_1_is_an_error_that_says_so_and_others_run() {
    let couch = couch(Flavour::V1, &["orders"]);
    let (selecting, plain) = (receiver(), receiver());
    let ini = Ini::new(&couch.url())
        .webhook("selecting", &selecting.url(), "db = orders\nselector = {\"mine\": true}")
        .webhook("plain", &plain.url(), "db = orders");
    let daemon = Daemon::start(&ini);
    couch.put("orders", "d0", &json!({"mine": true})).unwrap();
    let line = daemon.wait_for_log("`selector` needs CouchDB 2.0 or later");
    assert!(line.contains("[ERROR]") && line.contains("webhook `selecting`"), "{line}");
    let came = plain.wait_until(Duration::from_secs(10), |record| record.n_accepted() == 1);
    assert!(came, "{}", daemon.transcript());
    assert_eq!(selecting.look(|record| record.deliveries().len()), 0);
    assert_eq!(daemon.n_logged("`selector` needs"), 1, "{}", daemon.transcript());
}

/// Reads a whole database by the rules of `Flow` in pages of seven; the ids that came.
fn read_by_sevens(couch: &StandIn, filter: Filter) -> BTreeSet<String> {
    let hookd = Hookd {
        couchdb_url: couch.url(),
        username: None,
        password: None,
        ca_file: None,
        state_db: "couch_hookd".to_owned(),
        log_level: log::LevelFilter::Info,
        log_format: LogFormat::Text,
        public_url: None,
        register: false,
        checkpoint_interval: Duration::from_secs(5),
        deliveries_max: 64,
        dead_letters_max: 10_000,
        guard: couch_hookd::pure::guard::Guard::off(),
        feed_rotate: Duration::from_secs(60),
        feed_timeout: Duration::from_secs(60),
        feed_connections: 16,
        sweep_interval: Duration::from_secs(60),
        sweep_rate: 40,
    };
    let telling = Telling {
        webhook: "w".to_owned(),
        db: "orders".to_owned(),
        source: String::new(),
        events: vec!["document.*".to_owned()],
        include_docs: false,
        conflicts: false,
        conflict_docs: false,
        design_docs: false,
        payload_bytes_max: 1024,
        format: Format::Standard,
        watch: Watch::Changes,
    };
    let mut feed = Feed::new(&Server::new(&hookd).unwrap());
    let mut flow = Flow::new(false, hookd.feed_rotate, hookd.checkpoint_interval);
    let (mut ids, mut token) = (BTreeSet::new(), 0);
    loop {
        let now = sys::now();
        match flow.next_read(7, now).expect("there is always something to read") {
            Read::Open => flow.on_opened(Opened {
                mark: "m".to_owned(),
                checkpoint: None,
                rev: None,
                recreated: false,
                conflicted: None,
                doc_count: 0,
            }),
            Read::Page { since, limit } => {
                assert_eq!(limit, 7);
                let request = FeedRequest {
                    db: "orders".to_owned(),
                    since,
                    kind: FeedKind::Page { limit: 7 },
                    filter: Some(filter.clone()),
                    include_docs: false,
                    conflicts: false,
                    doc_bytes_max: 1024,
                    keeps_lines: false,
                    silence: None,
                    deadline: None,
                };
                let mut end = (None, None);
                let read = feed.read(&request, &mut |items| {
                    for item in items.drain(..) {
                        match item {
                            Item::Row(row) => {
                                flow.on_rows(vec![telling.arrived(row, "m", sys::wall())], now);
                            }
                            Item::End { last_seq, pending } => end = (last_seq, pending),
                            Item::Fault { .. } => {}
                        }
                    }
                    ControlFlow::Continue(())
                });
                read.unwrap();
                flow.on_end(end.0, end.1, false, now);
            }
            Read::Wait { .. } => return ids,
        }
        while flow.lanes().can_take(now) {
            token += 1;
            let pending = flow.lanes().take(now, token).unwrap();
            ids.insert(pending.event.doc_id.clone());
            flow.on_finished(token, now);
        }
    }
}

#[test]
fn pages_of_seven_lose_nothing_behind_their_last_seq() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.quirks(|quirks| quirks.last_seq_skips = 3);
        couch.filter("app/mine", |doc, _| Ok(is_mine(doc)));
        let mine = write_some_mine(&couch, "orders", 150);
        let mine: BTreeSet<String> = mine.into_keys().collect();
        let mut filters = vec![
            Filter::DocIds(mine.iter().cloned().collect()),
            Filter::View("app/mine".to_owned()),
            Filter::Function { name: "app/mine".to_owned(), params: Vec::new() },
        ];
        if flavour != Flavour::V1 {
            filters.push(Filter::Selector("{\"mine\":true}".to_owned()));
        }
        for filter in filters {
            assert_eq!(read_by_sevens(&couch, filter.clone()), mine, "{flavour:?} {filter:?}");
        }
    });
}

#[test]
fn a_feed_whose_connection_fails_is_not_asked_for_again_before_its_database_is_looked_at() {
    on_each(&FLAVOURS, |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.quirks(|quirks| {
            let request = "feed=continuous".to_owned();
            quirks.faults.push(Fault { request, times: 1, kind: FaultKind::Cut });
        });
        let world = World::start_on(couch, receiver(), "");
        world.wait_couch("waiting feed", |seen| seen.n_open_feeds() == 1);
        let order = world.couch.look(|seen| {
            let names = seen.requests().filter(|one| one.path.starts_with("/orders"));
            names.map(|one| one.query.iter().any(|(_, value)| value == "continuous")).collect::<Vec<_>>()
        });
        assert!(!order.windows(2).any(|pair| pair == [true, true]), "{}", world.transcript());
    });
}

#[test]
fn a_quiet_filtered_feed_in_a_busy_database_is_scanned_once() {
    // A rotation is a second; others write a hundred documents in each.
    const ROTATIONS: usize = 3;
    let couch = couch(Flavour::V3, &["orders"]);
    couch.quirks(|quirks| quirks.filtered_feeds_never_end = true);
    let receiver = receiver();
    let ini = Ini::new(&couch.url()).hookd("feed_rotate = 1s").webhook(
        "orders",
        &receiver.url(),
        "selector = {\"mine\": true}",
    );
    let mut world = World { daemon: Daemon::start(&ini), couch, receiver };
    world.wait_couch("waiting feed", |seen| seen.n_open_feeds() == 1);
    let pages = |seen: &couch_hookd::standin::couch::Seen<'_>| {
        let is_page = |(name, value): &(String, String)| name == "feed" && value == "normal";
        seen.requests().filter(|one| one.query.iter().any(is_page)).count()
    };
    let n_pages = world.couch.look(pages);
    let pace = crossbeam_channel::tick(Duration::from_millis(10));
    let began = sys::now();
    let mut n_written = 0;
    while world.couch.look(pages) < n_pages + ROTATIONS {
        pace.recv().unwrap();
        n_written += 1;
        world.couch.put("orders", &format!("foreign{n_written}"), &json!({"n": n_written})).unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "it does not rotate\n{}", world.transcript());
    }
    let puts = world.couch.n_requests("PUT /orders/_local/couch-hookd.orders");
    world.wait_couch("checkpoint", |seen| seen.n_requests("PUT /orders/_local/couch-hookd.orders") > puts);
    let at_kill = world.couch.update_seq("orders");
    world.daemon.kill();
    let before = world.couch.look(|seen| seen.n_scanned());
    world.daemon.start_again();
    world.couch.put("orders", "mine", &json!({"mine": true})).unwrap();
    world.wait("what matches", |record| record.accepted_rev("orders", "mine").is_some());
    let scanned = world.couch.look(|seen| seen.n_scanned()) - before;
    let rotation = at_kill / ROTATIONS as u64;
    assert!(scanned < rotation, "{scanned} of {at_kill} scanned again, {rotation} in a rotation");
}

#[test]
fn the_feeds_of_many_databases_leave_each_other_open() {
    const N: usize = 30;
    let names: Vec<String> = (0..N).map(|i| format!("db{i}")).collect();
    let dbs: Vec<&str> = names.iter().map(String::as_str).collect();
    let couch = couch(Flavour::V3, &dbs);
    let world = World::start_on(couch, receiver(), &format!("db = {}", dbs.join(", ")));
    world.wait_couch("waiting feeds", |seen| seen.n_open_feeds() == N);
    let pages = |seen: &couch_hookd::standin::couch::Seen<'_>| {
        let is_page = |(name, value): &(String, String)| name == "feed" && value == "normal";
        seen.requests().filter(|one| one.query.iter().any(is_page)).count()
    };
    let n_pages = world.couch.look(pages);
    assert!(n_pages <= 2 * N, "{n_pages} pages of {N} empty databases\n{}", world.transcript());
}
