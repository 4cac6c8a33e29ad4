//! What the stand-in for CouchDB promises to tests: places, feeds, and every quirk seen working once.

use std::collections::BTreeMap;
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::sys;
use serde_json::json;

use crate::http_client::{LIMIT, Open, ask, get, page};

const ALL: [Flavour; 3] = [Flavour::V1, Flavour::V2, Flavour::V3];

fn start(flavour: Flavour) -> StandIn {
    let couch = StandIn::start(Options::new(flavour)).unwrap();
    couch.create_db("db");
    couch
}

/// Follows a database in pages from the row's last seq, while others write, until nothing is left.
fn follow(couch: &StandIn, rng: &mut fastrand::Rng, filter: &str) -> (BTreeMap<String, String>, usize) {
    let (mut since, mut told, mut n_rows) = ("0".to_owned(), BTreeMap::new(), 0);
    loop {
        let limit = rng.usize(1..12);
        let (rows, last_seq) =
            page(&couch.url(), &format!("/db/_changes?since={since}&limit={limit}{filter}"));
        n_rows += rows.len();
        let full = rows.len() == limit;
        // After a full page only a row's seq is safe; any row will do, later ones come again.
        let stop_at =
            if full && rng.bool() { rng.usize(0..rows.len()) } else { rows.len().saturating_sub(1) };
        for (id, rev, seq) in rows.into_iter().take(stop_at + 1) {
            told.insert(id, rev);
            since = seq;
        }
        if !full {
            since = last_seq;
        }
        if rng.u8(..) < 200 && n_rows < 300 {
            let id = format!("doc{}", rng.u8(..40));
            let _ = if rng.u8(..) < 40 {
                couch.delete("db", &id)
            } else {
                couch.put("db", &id, &json!({"n": n_rows}))
            };
        } else if !full {
            return (told, n_rows);
        }
    }
}

#[test]
fn going_on_from_a_rows_seq_is_exact_in_whatever_order_rows_come() {
    for flavour in ALL {
        for seed in 0..25 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let couch = StandIn::start(Options { seed, ..Options::new(flavour) }).unwrap();
            couch.create_db("db");
            for n in 0..60 {
                couch.put("db", &format!("doc{}", n % 40), &json!({"n": n})).unwrap();
            }
            // A full filtered page's `last_seq` may be as wrong as it likes: nobody goes on from it.
            couch.quirks(|quirks| quirks.last_seq_skips = 3);
            let filter = if seed % 2 == 0 { "" } else { "&filter=app/all" };
            couch.filter("app/all", |_, _| Ok(true));
            let (told, _) = follow(&couch, &mut rng, filter);
            let expected: BTreeMap<_, _> =
                couch.winners("db").into_iter().map(|(id, winner)| (id, winner.rev)).collect();
            assert_eq!(told, expected, "{flavour:?} seed {seed}");
        }
    }
}

#[test]
fn an_idle_database_is_read_exactly_once_in_other_orders() {
    for flavour in [Flavour::V2, Flavour::V3] {
        let couch = start(flavour);
        for n in 0..50 {
            couch.put("db", &format!("doc{n}"), &json!({})).unwrap();
        }
        let reads: Vec<_> = (0..10).map(|_| page(&couch.url(), "/db/_changes").0).collect();
        let ids = |rows: &[(String, String, String)]| -> Vec<String> {
            rows.iter().map(|row| row.0.clone()).collect()
        };
        let seq_of =
            |rows: &[(String, String, String)]| rows.iter().find(|row| row.0 == "doc7").unwrap().2.clone();
        for pair in reads.windows(2) {
            assert_eq!(pair[0].len(), 50);
            assert_ne!(ids(&pair[0]), ids(&pair[1]), "{flavour:?}: the order should differ");
            assert_ne!(seq_of(&pair[0]), seq_of(&pair[1]), "{flavour:?}: seqs should differ");
        }
        let (first, second) = (reads[0][20].2.clone(), ids(&reads[0][..21]));
        let rest = ids(&page(&couch.url(), &format!("/db/_changes?since={first}")).0);
        assert_eq!(rest.len(), 29);
        assert!(rest.iter().all(|id| !second.contains(id)));
    }
}

#[test]
fn a_continuous_feed_gives_rows_at_once_and_ends_when_the_database_goes() {
    for flavour in ALL {
        let couch = start(flavour);
        let mut feed =
            Open::send(&couch.url(), "GET", "/db/_changes?feed=continuous&since=now", &[], "").unwrap();
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
        couch.put("db", "x", &json!({"v": 1})).unwrap();
        feed.until("\"id\":\"x\"");
        couch.delete_db("db");
        let end = feed.rest();
        assert!(end.whole && end.body.contains("{\"last_seq\":"), "{flavour:?}: {}", end.body);

        couch.create_db("db");
        let beat =
            Open::send(&couch.url(), "GET", "/db/_changes?feed=continuous&heartbeat=20&since=now", &[], "");
        let mut beat = beat.unwrap();
        beat.until("\n\n\n");
        couch.stop();
        assert!(!beat.rest().whole, "{flavour:?}: a stopped server cuts");
        couch.start_again().unwrap();

        let mut poll =
            Open::send(&couch.url(), "GET", "/db/_changes?feed=longpoll&since=now", &[], "").unwrap();
        poll.until("results");
        couch.put("db", "y", &json!({})).unwrap();
        assert!(poll.rest().body.contains("\"id\":\"y\""));
        drop(Open::send(&couch.url(), "GET", "/db/_changes?feed=continuous&since=now", &[], ""));
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 0), "a feed outlived its peer");
    }
}

#[test]
fn a_place_in_a_deleted_database_leads_where_the_version_says() {
    for flavour in ALL {
        let couch = start(flavour);
        let fill = |n: usize| {
            for n in 0..n {
                couch.put("db", &format!("doc{n}"), &json!({})).unwrap();
            }
        };
        fill(8);
        let from_page = page(&couch.url(), "/db/_changes").1;
        let from_now = page(&couch.url(), "/db/_changes?since=now&limit=0").1;
        let info = get(&couch.url(), "/db").json()["update_seq"].clone();
        let from_info = info.as_str().map_or(info.to_string(), str::to_owned);
        couch.delete_db("db");
        couch.create_db("db");
        fill(5);
        let rows = |since: &str| page(&couch.url(), &format!("/db/_changes?since={since}")).0.len();
        let expected = match flavour {
            Flavour::V1 => [0, 0, 0],
            Flavour::V2 => [5, 0, 0],
            Flavour::V3 => [5, 5, 5],
        };
        assert_eq!([rows(&from_page), rows(&from_now), rows(&from_info)], expected, "{flavour:?}");
        if flavour == Flavour::V1 {
            assert!(
                get(&couch.url(), "/db/_changes?since=8").body.contains("\"last_seq\":8"),
                "1.x gives SINCE back"
            );
        }
    }
}

#[test]
fn last_seq_of_a_full_filtered_page_may_skip_rows() {
    for flavour in ALL {
        let couch = start(flavour);
        couch.filter("app/all", |_, _| Ok(true));
        let ids: Vec<String> = (0..40).map(|n| format!("doc{n}")).collect();
        ids.iter().for_each(|id| drop(couch.put("db", id, &json!({})).unwrap()));
        couch.quirks(|quirks| quirks.last_seq_skips = 4);
        let (_, last_seq) = page(&couch.url(), "/db/_changes?limit=10&filter=app/all");
        assert_eq!(page(&couch.url(), &format!("/db/_changes?since={last_seq}")).0.len(), 26, "{flavour:?}");
        let (_, unfiltered) = page(&couch.url(), "/db/_changes?limit=10");
        assert_eq!(
            page(&couch.url(), &format!("/db/_changes?since={unfiltered}")).0.len(),
            30,
            "{flavour:?}"
        );

        couch.quirks(|quirks| quirks.last_seq_skips = 0);
        let body = json!({"doc_ids": ids}).to_string();
        let reply = ask(&couch.url(), "POST", "/db/_changes?limit=10&filter=_doc_ids", &body).json();
        let last_seq = &reply["last_seq"];
        let last_seq = last_seq.as_str().map_or(last_seq.to_string(), str::to_owned);
        let left = page(&couch.url(), &format!("/db/_changes?since={last_seq}")).0.len();
        assert_eq!(left, if flavour == Flavour::V1 { 0 } else { 30 }, "{flavour:?}");
    }
}

#[test]
fn a_filtered_feed_may_never_end_while_others_write() {
    for flavour in ALL {
        let couch = start(flavour);
        couch.filter("app/none", |_, _| Ok(false));
        let path = "/db/_changes?feed=continuous&timeout=400&since=now&filter=app/none";
        let open = || Open::send(&couch.url(), "GET", path, &[], "").unwrap();
        // As long as somebody writes every few ms it stays open, though its timeout is 400 ms.
        let write_until = |done: &dyn Fn() -> bool, limit: Duration| {
            let deadline = sys::now() + limit;
            while !done() && sys::now() < deadline {
                couch.put("db", "noise", &json!({"at": format!("{:?}", sys::now())})).unwrap();
                let _ = couch.wait_until(Duration::from_millis(5), |_| false);
            }
            done()
        };
        let n_open = || couch.look(|seen| seen.n_open_feeds());
        let honest = open();
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
        assert!(write_until(&|| n_open() == 0, LIMIT), "{flavour:?}: without the quirk it ends");
        assert!(honest.rest().body.trim_start().starts_with("{\"last_seq\""));

        couch.quirks(|quirks| quirks.filtered_feeds_never_end = true);
        let mut endless = open();
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
        assert!(!write_until(&|| n_open() == 0, Duration::from_millis(1000)), "{flavour:?}: it ended");
        if flavour != Flavour::V1 {
            endless.until("\n\n");
        }
        let body = endless.rest().body;
        let silent = body.trim_start_matches('\n');
        assert!(silent.starts_with("{\"last_seq\""), "{flavour:?}: {body}");
        assert_eq!(silent.len() == body.len(), flavour == Flavour::V1, "{flavour:?}: 1.x sends not a byte");
    }
}

#[test]
fn feeds_are_cut_rewound_and_robbed_of_their_seqs() {
    let couch = start(Flavour::V3);
    for n in 0..9 {
        couch.put("db", &format!("doc{n}"), &json!({})).unwrap();
    }
    couch.quirks(|quirks| quirks.cut_feeds_after = Some(30));
    let cut = get(&couch.url(), "/db/_changes");
    assert_eq!((cut.body.len(), cut.whole), (30, false));
    couch.quirks(|quirks| {
        quirks.cut_feeds_after = None;
        quirks.seq_every = Some(4);
        quirks.rewinds = 1;
        quirks.null_docs = 1;
    });
    let (rows, _) = page(&couch.url(), "/db/_changes?since=now&include_docs=true");
    let with_seq: Vec<usize> = (0..rows.len()).filter(|at| rows[*at].2 != "null").collect();
    assert_eq!((rows.len(), with_seq), (9, vec![3, 7]), "rewound, with a seq on every fourth row");
    assert_eq!(page(&couch.url(), "/db/_changes?since=now").0.len(), 0, "rewound once");
    couch.quirks(|quirks| quirks.null_docs = 1);
    let reply = get(&couch.url(), "/db/_changes?include_docs=true&limit=2").json();
    assert!(reply["results"][0]["doc"].is_null() && reply["results"][1]["doc"].is_object(), "{reply}");
}

#[test]
fn a_feed_may_stay_open_when_its_database_is_deleted() {
    let couch = start(Flavour::V1);
    couch.quirks(|quirks| quirks.feeds_outlive_database = true);
    let path = "/db/_changes?feed=continuous&timeout=1&heartbeat=10000";
    let feed = Open::send(&couch.url(), "GET", path, &[], "").unwrap();
    assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
    couch.delete_db("db");
    assert!(!couch.wait_until(Duration::from_millis(250), |seen| seen.n_open_feeds() == 0));
    couch.stop();
    assert_eq!(feed.rest().body, "");
}

#[test]
fn faults_are_made_as_often_as_asked_for() {
    let couch = start(Flavour::V3);
    couch.put("db", "x", &json!({})).unwrap();
    let fault = |request: &str, kind| Fault { request: request.into(), times: 1, kind };
    couch.quirks(|quirks| {
        quirks.faults = vec![
            fault("GET /db/_changes?limit=1", FaultKind::Html(502)),
            fault("GET /db/x", FaultKind::Status(500)),
            fault("GET /db/x", FaultKind::Cut),
            fault("PUT /db/y", FaultKind::CutAfterDoing),
        ];
        quirks.refuse_dead_letters = true;
    });
    let html = get(&couch.url(), "/db/_changes?limit=1");
    assert_eq!((html.status, html.headers["Content-Type"].as_str()), (502, "text/html"));
    assert_eq!(get(&couch.url(), "/db/_changes?limit=1").status, 200);
    assert_eq!(get(&couch.url(), "/db/x").json()["error"], "unknown_error");
    assert!(Open::send(&couch.url(), "GET", "/db/x", &[], "").is_none());
    assert_eq!(get(&couch.url(), "/db/x").status, 200);
    assert!(Open::send(&couch.url(), "PUT", "/db/y", &[], "{}").is_none());
    assert_eq!(get(&couch.url(), "/db/y").status, 200, "it was done before the connection was cut");
    assert_eq!(ask(&couch.url(), "PUT", "/db/msg_1", "{}").status, 403);
    couch.quirks(|quirks| {
        quirks.refuse_dead_letters = false;
        quirks.slow = Some(Duration::from_millis(60));
    });
    let begun = sys::now();
    assert_eq!(ask(&couch.url(), "PUT", "/db/msg_1", "{}").status, 201);
    assert!(begun.elapsed() >= Duration::from_millis(60));
    assert_eq!(couch.n_requests("PUT /db/msg_1"), 2);
}

#[test]
fn old_local_documents_come_back_as_often_as_asked_for() {
    let couch = start(Flavour::V3);
    let put = |body: &str| assert_eq!(ask(&couch.url(), "PUT", "/db/_local/c", body).status, 201);
    put("{\"v\":1}");
    couch.quirks(|quirks| quirks.old_locals = 1);
    assert_eq!(get(&couch.url(), "/db/_local/c").status, 404);
    put("{\"v\":2,\"_rev\":\"0-1\"}");
    couch.quirks(|quirks| quirks.old_locals = 1);
    assert_eq!(get(&couch.url(), "/db/_local/c").json()["v"], 1);
    assert_eq!(get(&couch.url(), "/db/_local/c").json()["v"], 2);
    assert!(
        couch.wait_until(LIMIT, |seen| seen.local("db", "c").is_some_and(|json| json.contains("\"v\":2")))
    );
}

#[test]
fn a_crash_of_1_x_loses_what_was_not_committed() {
    let couch = start(Flavour::V1);
    couch.create_db("state");
    let put = |path: &str, headers: &[(&str, &str)]| {
        assert_eq!(
            Open::send(&couch.url(), "PUT", path, headers, "{}").unwrap().rest().status,
            201,
            "{path}"
        );
    };
    put("/state/msg_safe", &[("X-Couch-Full-Commit", "true")]);
    put("/state/msg_lost", &[]);
    put("/db/one", &[]);
    put("/db/_local/c", &[]);
    assert_eq!(couch.crash_losing("state", 9), 1);
    assert!(TcpStream::connect(couch.url().strip_prefix("http://").unwrap()).is_err());
    couch.start_again().unwrap();
    let status = |path: &str| get(&couch.url(), path).status;
    assert_eq!([status("/state/msg_safe"), status("/state/msg_lost")], [200, 404]);
    assert_eq!([status("/db/one"), status("/db/_local/c")], [200, 200], "another file, another commit");
    assert_eq!(couch.crash_losing("db", 1), 1);
    couch.start_again().unwrap();
    assert_eq!([status("/db/one"), status("/db/_local/c"), 0], [404, 404, 0]);
    assert_eq!((couch.update_seq("db"), couch.update_seq("state")), (0, 1));

    let safe = start(Flavour::V3);
    safe.put("db", "x", &json!({})).unwrap();
    assert_eq!(safe.crash_losing("db", 1), 0, "3.x commits at once");
}

#[test]
fn five_wrong_passwords_lock_an_account_on_3_x() {
    for flavour in ALL {
        let options = Options {
            admin: Some(("admin".into(), "right".into())),
            users: vec![("hookd".into(), "pw".into())],
            ..Options::new(flavour)
        };
        let couch = StandIn::start(options).unwrap();
        couch.create_db("db");
        let as_user = |method: &str, login: &str, path: &str, body: &str| {
            let login = format!("Basic {}", STANDARD.encode(login));
            Open::send(&couch.url(), method, path, &[("Authorization", &login)], body).unwrap().rest()
        };
        let open = if flavour == Flavour::V3 { 403 } else { 200 };
        assert_eq!(as_user("GET", "hookd:pw", "/db", "").status, open);
        let members = r#"{"members":{"names":["hookd"],"roles":[]},"admins":{"names":[],"roles":[]}}"#;
        assert_eq!(
            as_user("PUT", "hookd:pw", "/db/_security", members).status,
            if open == 403 { 403 } else { 401 }
        );
        assert_eq!(as_user("PUT", "admin:right", "/db/_security", members).status, 200);
        assert_eq!(as_user("GET", "hookd:pw", "/db", "").status, 200);
        assert_eq!(get(&couch.url(), "/db").status, 401);
        for _ in 0..5 {
            assert_eq!(as_user("GET", "hookd:no", "/db", "").status, 401);
        }
        let after = as_user("GET", "hookd:pw", "/db", "");
        if flavour == Flavour::V3 {
            assert_eq!(after.status, 403);
            assert!(after.body.contains("Account is temporarily locked"), "{}", after.body);
            couch.unlock();
        }
        assert_eq!(as_user("GET", "hookd:pw", "/db", "").status, 200);
        assert_eq!(as_user("GET", "admin:right", "/db", "").status, 200);
    }
}

#[test]
fn a_filter_that_throws_is_what_the_version_makes_of_it() {
    for flavour in ALL {
        let couch = start(flavour);
        couch.put("db", "x", &json!({})).unwrap();
        couch.filter("app/throws", |_, _| Err("TypeError: doc.a is undefined".into()));
        let mut open = Open::send(&couch.url(), "GET", "/db/_changes?filter=app/throws", &[], "").unwrap();
        if flavour == Flavour::V1 {
            open.until("{\"error\":\"compilation_error\"");
            assert_eq!((open.status, open.ended), (200, false), "1.7.1 leaves it open");
        } else {
            assert_eq!(open.status, 500);
        }
    }
    let couch = start(Flavour::V3);
    let reason = |path: &str| get(&couch.url(), path).json()["reason"].clone();
    assert_eq!(reason("/db/_changes?filter=app/x"), "missing");
    couch.put("db", "_design/app", &json!({})).unwrap();
    assert_eq!(reason("/db/_changes?filter=app/x"), "missing json key: filters");
}

#[test]
fn all_docs_gives_ranges_and_pages() {
    let couch = start(Flavour::V3);
    for id in ["a", "msg_1", "msg_2", "msg_3", "z"] {
        couch.put("db", id, &json!({"of": id})).unwrap();
    }
    couch.delete("db", "msg_2").unwrap();
    let reply =
        get(&couch.url(), "/db/_all_docs?startkey=%22msg_%22&endkey=%22msg_z%22&include_docs=true&limit=5");
    let ids: Vec<_> =
        reply.json()["rows"].as_array().unwrap().iter().map(|row| row["doc"]["of"].clone()).collect();
    assert_eq!(ids, ["msg_1", "msg_3"]);
    assert!(
        reply.body.starts_with("{\"total_rows\":4,\"offset\":1,\"rows\":[\r\n{\"id\":\"msg_1\","),
        "{}",
        reply.body
    );
    assert_eq!(get(&couch.url(), "/db/_all_docs?skip=1&limit=1").json()["rows"][0]["id"], "msg_1");
}
