//! The stand-in for CouchDB against recorded answers of 1.7.1, 2.2.0 and 3.5.0, its quirks, and the receiver.
//!
//! What is compared are statuses, headers, texts and line layout; what differs from server to server (seqs,
//! order of rows, sizes, times) is levelled first.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use couch_hookd::pure::signature::{Key, Mismatch, new_secret, sign};
use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::{Reaction, ReceiveOptions, Receiver, ReceiverOptions, run_receive};
use couch_hookd::standin::record::Violation;
use couch_hookd::sys;
use serde_json::{Value, json};

const ALL: [Flavour; 3] = [Flavour::V1, Flavour::V2, Flavour::V3];
const LIMIT: Duration = Duration::from_secs(10);

/// An answer, read to its end.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
    /// Whether the body ended as its head said.
    whole: bool,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// A request whose answer may still be coming.
struct Open {
    reader: BufReader<TcpStream>,
    status: u16,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    ended: bool,
}

impl Open {
    fn send(base: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Option<Open> {
        let mut stream = TcpStream::connect(base.strip_prefix("http://").unwrap()).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes()).ok()?;
        let mut reader = BufReader::new(stream);
        let mut first = String::new();
        reader.read_line(&mut first).ok()?;
        let status = first.split(' ').nth(1)?.parse().unwrap();
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_owned(), value.to_owned());
        }
        Some(Open { reader, status, headers, body: Vec::new(), ended: false })
    }

    /// Reads one chunk more; false at the end, whole or not.
    fn chunk(&mut self) -> bool {
        let mut size = String::new();
        if self.reader.read_line(&mut size).unwrap_or(0) == 0 {
            return false;
        }
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        if self.reader.read_exact(&mut chunk).is_err() {
            return false;
        }
        self.body.extend(&chunk[..size]);
        self.ended = size == 0;
        !self.ended
    }

    /// Reads until the body holds `text`.
    #[track_caller]
    fn until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.body).contains(text) {
            assert!(self.chunk(), "expected `{text}`, got `{}`", String::from_utf8_lossy(&self.body));
        }
    }

    fn rest(mut self) -> Reply {
        if let Some(length) = self.headers.get("Content-Length") {
            let mut body = vec![0; length.parse().unwrap()];
            self.ended = self.reader.read_exact(&mut body).is_ok();
            self.body = body;
        } else {
            while self.chunk() {}
        }
        let body = String::from_utf8(self.body).unwrap();
        Reply { status: self.status, headers: self.headers, body, whole: self.ended }
    }
}

fn ask(base: &str, method: &str, path: &str, body: &str) -> Reply {
    Open::send(base, method, path, &[("Accept", "application/json")], body).expect("an answer").rest()
}

fn get(couch: &StandIn, path: &str) -> Reply {
    ask(&couch.url(), "GET", path, "")
}

fn start(flavour: Flavour) -> StandIn {
    let couch = StandIn::start(Options::new(flavour)).unwrap();
    couch.create_db("db");
    couch
}

/// Ids and seqs of a page's rows, and its `last_seq` as `since` takes it.
fn page(couch: &StandIn, path: &str) -> (Vec<(String, String, String)>, String) {
    let reply = get(couch, path);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let json = reply.json();
    let rows = json["results"].as_array().unwrap().iter().map(|row| {
        let text = |value: &Value| value.as_str().map_or(value.to_string(), str::to_owned);
        (text(&row["id"]), text(&row["changes"][0]["rev"]), text(&row["seq"]))
    });
    let last_seq = &json["last_seq"];
    (rows.collect(), last_seq.as_str().map_or(last_seq.to_string(), str::to_owned))
}

// ---- recorded answers ----

const VERSIONS: [(Flavour, &str); 3] =
    [(Flavour::V1, "1.7.1"), (Flavour::V2, "2.2.0"), (Flavour::V3, "3.5.0")];

/// In an order in which each finds what it needs.
const BEFORE_FIXTURE: &[&str] = &["db_create", "db_create_again"];
const ON_FIXTURE: &[&str] = &[
    "root",
    "all_dbs",
    "changes_normal",
    "changes_normal_docs_conflicts",
    "changes_limit2",
    "changes_limit0_now",
    "changes_continuous_timeout",
    "changes_longpoll_timeout",
    "changes_doc_ids",
    "changes_selector",
    "changes_filter_function",
    "changes_filter_missing",
    "changes_view",
    "changes_no_db",
    "changes_since_garbage",
    "config_all",
    "config_missing",
    "config_os_daemons_put",
    "config_put",
    "config_section",
    "config_section_missing",
    "db_info",
    "dbs_info",
    "doc_conflict",
    "local_put",
    "local_get",
    "local_missing",
    "local_put_conflict",
    "unauthorized_no_login",
    "unauthorized_wrong",
    "db_delete",
];

/// The fixture's documents with the revisions that the recorded servers gave them.
fn fill_fixture(base: &str) {
    let design = r#"{"_id":"_design/app","_rev":"1-1178276408c9ed0e8c240dcce3125a0b","language":"javascript","filters":{"big":"function(doc, req) { return doc.total > 2; }"},"views":{"t":{"map":"function(doc) { if (doc.type) emit(doc.type, null); }"}}}"#;
    let docs = [
        r#"{"_id":"order:0","_rev":"1-83cf1aee167076d5c2fcfd17a2a67dba","type":"order","total":0,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:3","_rev":"1-3e843778cbee58beb81373fb4383efe7","type":"order","total":3,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:4","_rev":"1-4ecac9207605c8c258caf25ca4963b44","type":"order","total":4,"note":"größe ✓ LS end"}"#,
        r#"{"_id":"order:1","_rev":"2-ad372dc0ba107c12d1337eb2c785ae3f","type":"order","total":100}"#,
        r#"{"_id":"order:2","_rev":"2-8f58de7d4bd590b378492ced13eca0ce","_deleted":true}"#,
        design,
        r#"{"_id":"conflicted","_rev":"1-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb","v":2}"#,
        r#"{"_id":"conflicted","_rev":"1-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","v":1}"#,
    ];
    let docs = docs.join(",").replace("LS", "\u{2028}");
    let login = format!("Basic {}", STANDARD.encode("admin:right"));
    let body = format!("{{\"new_edits\":false,\"docs\":[{docs}]}}");
    let reply = Open::send(base, "POST", "/fixture/_bulk_docs", &[("Authorization", &login)], &body).unwrap();
    assert_eq!((reply.status, reply.rest().body.as_str()), (201, "[]\n"));
}

/// Numbers become `0` and opaque seqs `S`: what differs between two servers that mean the same.
fn level(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let digits = rest.len() - rest.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        if digits == 0 {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        rest = &rest[digits..];
        let opaque =
            rest.trim_start_matches(|letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter));
        if rest.starts_with("-g1AAAA") {
            rest = opaque;
            out.push('S');
        } else {
            out.push('0');
        }
    }
    out
}

/// A body with its rows sorted, each row's seq levelled; separators stay in the order in which they stand.
fn shape(body: &str) -> Vec<String> {
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for line in body.split('\n') {
        let Some((_, from_id)) = line.split_once(",\"id\":") else {
            lines.push(level(line));
            continue;
        };
        let row = from_id.trim_end_matches(['\r', ',']);
        lines.push(format!("row{:?}", &from_id[row.len()..]));
        rows.push(row.to_owned());
    }
    rows.sort();
    lines.into_iter().chain(rows).collect()
}

fn compare(couch: &StandIn, version: &str, name: &str) {
    let file = format!("{}/tests/data/{version}/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let request = &recorded["request"];
    let mut path = request["path"].as_str().unwrap().to_owned();
    if let Some((before, _)) = path.split_once("since=9") {
        path = format!("{before}since={}", page(couch, "/fixture/_changes").1);
    }
    let login = match name {
        "unauthorized_no_login" => None,
        "unauthorized_wrong" => Some("admin:wrong"),
        _ => Some("admin:right"),
    };
    let login = login.map(|login| format!("Basic {}", STANDARD.encode(login)));
    let mut headers = vec![("Accept", "application/json")];
    headers.extend(login.as_deref().map(|login| ("Authorization", login)));
    let (method, body) = (request["method"].as_str().unwrap(), request["body"].as_str().unwrap_or_default());
    let reply = Open::send(&couch.url(), method, &path, &headers, body).unwrap().rest();

    let place = format!("{version} {name}");
    assert_eq!(u64::from(reply.status), recorded["status"], "{place}: {}", reply.body);
    let expected = recorded["body"].as_str().unwrap();
    if name == "config_all" {
        // Keys of a section come in the order of a hash table.
        assert_eq!(reply.json(), serde_json::from_str::<Value>(expected).unwrap(), "{place}");
    } else if name == "changes_limit2" && version != "1.7.1" {
        // Which two of the rows come differs from request to request.
        let layout = |body: &str| shape(body)[..7].to_vec();
        assert_eq!(layout(&reply.body), layout(expected), "{place}:\n{}\n{expected}", reply.body);
    } else {
        assert_eq!(shape(&reply.body), shape(expected), "{place}:\n{}\n{expected}", reply.body);
    }
    for (header, value) in recorded["headers"].as_object().unwrap() {
        // `_all_dbs` and `_dbs_info` are streamed by 2.x and 3.x; nobody can tell from the body. One recorded
        // refusal closes the connection.
        if ["Transfer-Encoding", "Content-Length", "ETag", "Location", "Connection"]
            .contains(&header.as_str())
        {
            continue;
        }
        assert_eq!(reply.headers.get(header).map(String::as_str), value.as_str(), "{place}: {header}");
    }
    if name.starts_with("changes") && reply.status == 200 {
        assert_eq!(reply.headers["Transfer-Encoding"], "chunked", "{place}");
    }
}

#[test]
fn answers_are_those_of_the_recorded_servers() {
    for (flavour, version) in VERSIONS {
        let options = Options { admin: Some(("admin".into(), "right".into())), ..Options::new(flavour) };
        let couch = StandIn::start(options).unwrap();
        couch.filter("app/big", |doc, _| Ok(doc["total"].as_i64() > Some(2)));
        couch.filter("app/t", |doc, _| Ok(doc["type"].is_string()));
        let log = match flavour {
            Flavour::V1 => {
                &[("level", "info"), ("file", "/var/log/couchdb/couch.log"), ("include_sasl", "true")][..]
            }
            Flavour::V2 => {
                &[("level", "info"), ("writer", "file"), ("file", "/var/log/couchdb/couch.log")][..]
            }
            Flavour::V3 => &[("level", "info"), ("writer", "stderr")][..],
        };
        for (key, value) in log {
            couch.set_config("log", key, value);
        }
        couch.create_db("fixture_copy");
        if flavour != Flavour::V1 {
            couch.create_db("_global_changes");
        }
        BEFORE_FIXTURE.iter().for_each(|name| compare(&couch, version, name));
        // The recorded databases could be read by anybody.
        let login = format!("Basic {}", STANDARD.encode("admin:right"));
        let headers = [("Authorization", login.as_str())];
        Open::send(&couch.url(), "PUT", "/fixture/_security", &headers, "{}").unwrap();
        fill_fixture(&couch.url());
        ON_FIXTURE.iter().for_each(|name| compare(&couch, version, name));
    }
}

// ---- feeds ----

/// Follows a database in pages from the row's last seq, while others write, until nothing is left.
fn follow(couch: &StandIn, rng: &mut fastrand::Rng, filter: &str) -> (BTreeMap<String, String>, usize) {
    let (mut since, mut told, mut n_rows) = ("0".to_owned(), BTreeMap::new(), 0);
    loop {
        let limit = rng.usize(1..12);
        let (rows, last_seq) = page(couch, &format!("/db/_changes?since={since}&limit={limit}{filter}"));
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
        let reads: Vec<_> = (0..10).map(|_| page(&couch, "/db/_changes").0).collect();
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
        let rest = ids(&page(&couch, &format!("/db/_changes?since={first}")).0);
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
        let from_page = page(&couch, "/db/_changes").1;
        let from_now = page(&couch, "/db/_changes?since=now&limit=0").1;
        let info = get(&couch, "/db").json()["update_seq"].clone();
        let from_info = info.as_str().map_or(info.to_string(), str::to_owned);
        couch.delete_db("db");
        couch.create_db("db");
        fill(5);
        let rows = |since: &str| page(&couch, &format!("/db/_changes?since={since}")).0.len();
        let expected = match flavour {
            Flavour::V1 => [0, 0, 0],
            Flavour::V2 => [5, 0, 0],
            Flavour::V3 => [5, 5, 5],
        };
        assert_eq!([rows(&from_page), rows(&from_now), rows(&from_info)], expected, "{flavour:?}");
        if flavour == Flavour::V1 {
            assert!(
                get(&couch, "/db/_changes?since=8").body.contains("\"last_seq\":8"),
                "1.x gives SINCE back"
            );
        }
    }
}

// ---- quirks ----

#[test]
fn last_seq_of_a_full_filtered_page_may_skip_rows() {
    for flavour in ALL {
        let couch = start(flavour);
        couch.filter("app/all", |_, _| Ok(true));
        let ids: Vec<String> = (0..40).map(|n| format!("doc{n}")).collect();
        ids.iter().for_each(|id| drop(couch.put("db", id, &json!({})).unwrap()));
        couch.quirks(|quirks| quirks.last_seq_skips = 4);
        let (_, last_seq) = page(&couch, "/db/_changes?limit=10&filter=app/all");
        assert_eq!(page(&couch, &format!("/db/_changes?since={last_seq}")).0.len(), 26, "{flavour:?}");
        let (_, unfiltered) = page(&couch, "/db/_changes?limit=10");
        assert_eq!(page(&couch, &format!("/db/_changes?since={unfiltered}")).0.len(), 30, "{flavour:?}");

        couch.quirks(|quirks| quirks.last_seq_skips = 0);
        let body = json!({"doc_ids": ids}).to_string();
        let reply = ask(&couch.url(), "POST", "/db/_changes?limit=10&filter=_doc_ids", &body).json();
        let last_seq = &reply["last_seq"];
        let last_seq = last_seq.as_str().map_or(last_seq.to_string(), str::to_owned);
        let left = page(&couch, &format!("/db/_changes?since={last_seq}")).0.len();
        assert_eq!(left, if flavour == Flavour::V1 { 0 } else { 30 }, "{flavour:?}");
    }
}

#[test]
fn a_filtered_feed_may_never_end_while_others_write() {
    for flavour in ALL {
        let couch = start(flavour);
        couch.filter("app/none", |_, _| Ok(false));
        let path = "/db/_changes?feed=continuous&timeout=150&since=now&filter=app/none";
        let open = || Open::send(&couch.url(), "GET", path, &[], "").unwrap();
        // As long as somebody writes every few ms it stays open, though its timeout is 150 ms.
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
        assert!(honest.rest().body.starts_with("{\"last_seq\""));

        couch.quirks(|quirks| quirks.filtered_feeds_never_end = true);
        let mut endless = open();
        assert!(couch.wait_until(LIMIT, |seen| seen.n_open_feeds() == 1));
        assert!(!write_until(&|| n_open() == 0, Duration::from_millis(600)), "{flavour:?}: it ended");
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
    let cut = get(&couch, "/db/_changes");
    assert_eq!((cut.body.len(), cut.whole), (30, false));
    couch.quirks(|quirks| {
        quirks.cut_feeds_after = None;
        quirks.seq_every = Some(4);
        quirks.rewinds = 1;
        quirks.null_docs = 1;
    });
    let (rows, _) = page(&couch, "/db/_changes?since=now&include_docs=true");
    let with_seq: Vec<usize> = (0..rows.len()).filter(|at| rows[*at].2 != "null").collect();
    assert_eq!((rows.len(), with_seq), (9, vec![3, 7]), "rewound, with a seq on every fourth row");
    assert_eq!(page(&couch, "/db/_changes?since=now").0.len(), 0, "rewound once");
    couch.quirks(|quirks| quirks.null_docs = 1);
    let reply = get(&couch, "/db/_changes?include_docs=true&limit=2").json();
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
    let html = get(&couch, "/db/_changes?limit=1");
    assert_eq!((html.status, html.headers["Content-Type"].as_str()), (502, "text/html"));
    assert_eq!(get(&couch, "/db/_changes?limit=1").status, 200);
    assert_eq!(get(&couch, "/db/x").json()["error"], "unknown_error");
    assert!(Open::send(&couch.url(), "GET", "/db/x", &[], "").is_none());
    assert_eq!(get(&couch, "/db/x").status, 200);
    assert!(Open::send(&couch.url(), "PUT", "/db/y", &[], "{}").is_none());
    assert_eq!(get(&couch, "/db/y").status, 200, "it was done before the connection was cut");
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
    assert_eq!(get(&couch, "/db/_local/c").status, 404);
    put("{\"v\":2,\"_rev\":\"0-1\"}");
    couch.quirks(|quirks| quirks.old_locals = 1);
    assert_eq!(get(&couch, "/db/_local/c").json()["v"], 1);
    assert_eq!(get(&couch, "/db/_local/c").json()["v"], 2);
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
    let status = |path: &str| get(&couch, path).status;
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
        assert_eq!(get(&couch, "/db").status, 401);
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
    let reason = |path: &str| get(&couch, path).json()["reason"].clone();
    assert_eq!(reason("/db/_changes?filter=app/x"), "missing");
    couch.put("db", "_design/app", &json!({})).unwrap();
    assert_eq!(reason("/db/_changes?filter=app/x"), "missing json key: x");
}

#[test]
fn all_docs_gives_ranges_and_pages() {
    let couch = start(Flavour::V3);
    for id in ["a", "msg_1", "msg_2", "msg_3", "z"] {
        couch.put("db", id, &json!({"of": id})).unwrap();
    }
    couch.delete("db", "msg_2").unwrap();
    let reply = get(&couch, "/db/_all_docs?startkey=%22msg_%22&endkey=%22msg_z%22&include_docs=true&limit=5");
    let ids: Vec<_> =
        reply.json()["rows"].as_array().unwrap().iter().map(|row| row["doc"]["of"].clone()).collect();
    assert_eq!(ids, ["msg_1", "msg_3"]);
    assert!(
        reply.body.starts_with("{\"total_rows\":4,\"offset\":1,\"rows\":[\r\n{\"id\":\"msg_1\","),
        "{}",
        reply.body
    );
    assert_eq!(get(&couch, "/db/_all_docs?skip=1&limit=1").json()["rows"][0]["id"], "msg_1");
}

// ---- the receiver ----

fn post(receiver: &Receiver, key: &Key, doc: &str, rev: &str) -> Option<u16> {
    let id = format!("msg_{doc}_{rev}");
    let body = json!({"id": id, "type": "document.updated", "timestamp": "t", "source": "s",
        "data": {"webhook": "w", "db": "db", "id": doc, "rev": rev, "deleted": false}});
    let body = body.to_string();
    let now = sys::wall().as_second();
    let signature = sign(std::slice::from_ref(key), &id, now, body.as_bytes()).unwrap();
    let now = now.to_string();
    let headers = [
        ("webhook-id", id.as_str()),
        ("webhook-timestamp", &now),
        ("webhook-signature", &signature),
        ("hookd-attempt", "1"),
    ];
    let base = format!("http://{}", receiver.address());
    Open::send(&base, "POST", "/hook", &headers, &body).map(|open| open.status)
}

fn key() -> Key {
    Key::parse(&new_secret([7; 32])).unwrap()
}

#[test]
fn the_receiver_verifies_records_and_answers_by_its_script() {
    let receiver =
        Receiver::start(ReceiverOptions { keep_bodies: true, ..ReceiverOptions::new(vec![key()]) }).unwrap();
    assert_eq!(post(&receiver, &key(), "a", "1-x"), Some(200));
    let other = Key::parse(&new_secret([8; 32])).unwrap();
    assert_eq!(post(&receiver, &other, "b", "1-x"), Some(200));
    receiver.answer(|delivery| match delivery.doc_id() {
        "cut" => Reaction::CutConnection,
        "late" => Reaction::Delay(Duration::from_millis(50), Box::new(Reaction::Status(503))),
        _ => Reaction::StatusWith {
            status: 429,
            headers: vec![("Retry-After".into(), "7".into())],
            body: "slow down".into(),
        },
    });
    assert_eq!(post(&receiver, &key(), "cut", "1-x"), None);
    let begun = sys::now();
    assert_eq!(post(&receiver, &key(), "late", "1-x"), Some(503));
    assert!(begun.elapsed() >= Duration::from_millis(50));
    let base = format!("http://{}", receiver.address());
    let busy = Open::send(&base, "POST", "/", &[], "{}").unwrap().rest();
    assert_eq!(
        (busy.status, busy.headers["Retry-After"].as_str(), busy.body.as_str()),
        (429, "7", "slow down")
    );
    assert_eq!(ask(&base, "GET", "/", "").status, 405);
    receiver.look(|record| {
        let verified: Vec<_> = record.deliveries().iter().map(|one| one.verified.clone()).collect();
        let unsigned = Mismatch::NoHeader("webhook-id");
        assert_eq!(verified, [Ok(()), Err(Mismatch::Different(None)), Ok(()), Ok(()), Err(unsigned)]);
        assert_eq!((record.n_accepted(), record.n_unverified()), (2, 2));
        assert_eq!(record.accepted_revs("db").into_iter().count(), 2);
        assert!(record.deliveries()[0].body.starts_with(b"{") && !record.deliveries()[0].headers.is_empty());
        assert_eq!(record.violations(), []);
    });
}

#[test]
fn the_receiver_sees_two_open_requests_for_one_document_and_refuses_connections() {
    let receiver = Receiver::start(ReceiverOptions::new(vec![key()])).unwrap();
    receiver.answer(|_| Reaction::Hang);
    std::thread::scope(|scope| {
        let hanging = [("a", "1-x"), ("b", "1-x"), ("a", "2-x")].map(|(doc, rev)| {
            let before = receiver.look(|record| record.deliveries().len());
            let receiver = &receiver;
            let posting = scope.spawn(move || post(receiver, &key(), doc, rev));
            assert!(receiver.wait_until(LIMIT, |record| record.deliveries().len() > before));
            posting
        });
        receiver.refuse_connections(true).unwrap();
        for posting in hanging {
            assert_eq!(posting.join().unwrap(), None, "what is open is cut");
        }
    });
    receiver.look(|record| {
        let expected = Violation::TwoOpen { doc: "db/a".into(), first: 1, second: 3 };
        assert_eq!(record.violations(), [expected], "{}", record.transcript());
        assert_eq!((record.concurrency(), record.concurrency_max()), (0, 3));
    });
    assert_eq!(
        TcpStream::connect(receiver.address()).unwrap_err().kind(),
        std::io::ErrorKind::ConnectionRefused
    );
    receiver.refuse_connections(false).unwrap();
    receiver.answer(|_| Reaction::Status(204));
    assert_eq!(post(&receiver, &key(), "a", "3-x"), Some(204));

    // One who gives up and tries again has one request open, not two.
    receiver.answer(|_| Reaction::Hang);
    let (base, body) =
        (receiver.address(), r#"{"id":"i","type":"t","data":{"db":"db","id":"c","rev":"1-x"}}"#);
    for n in 1..=3 {
        let mut stream = TcpStream::connect(base).unwrap();
        let head = format!("POST / HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        assert!(receiver.wait_until(LIMIT, |record| record.deliveries().len() == 4 + n));
    }
    receiver.look(|record| assert_eq!(record.violations().len(), 1, "{}", record.transcript()));
}

#[test]
fn receive_prints_a_line_for_every_request() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let run = |json: bool, requests: &(dyn Fn(&str) + Sync)| {
        let options = ReceiveOptions {
            listen: port,
            secrets: vec![key()],
            answer: 202,
            refuse: Some("bad\u{1b}".into()),
            json,
        };
        let (stop, stopped) = crossbeam_channel::bounded(1);
        std::thread::scope(|scope| {
            let receiving = scope.spawn(move || {
                let mut out = Vec::new();
                (run_receive(&options, &mut out, &stopped).unwrap(), String::from_utf8(out).unwrap())
            });
            let base = format!("http://{port}");
            while TcpStream::connect(port).is_err() {
                sys::sleep(Duration::from_millis(5));
            }
            requests(&base);
            drop(stop);
            receiving.join().unwrap()
        })
    };
    let unsigned = |base: &str| {
        let body = r#"{"id":"i","type":"document.updated","data":{"db":"db","id":"bad\u001b","rev":"1-x"}}"#;
        assert_eq!(Open::send(base, "POST", "/", &[("hookd-attempt", "2")], body).unwrap().status, 422);
    };
    let (exit, text) = run(false, &unsigned);
    assert_eq!(exit, 1, "a wrong signature is a fault");
    let expected = "422 document.updated db/bad\\u{1b} 1-x attempt 2 signature WRONG: no header `webhook-id`";
    assert_eq!(text.lines().nth(1), Some(expected), "{text}");
    let (exit, text) = run(true, &|base| {
        let now = sys::wall().as_second();
        let signature = sign(&[key()], "i", now, b"{\"a\":1}").unwrap();
        let now = now.to_string();
        let headers = [("Webhook-Id", "i"), ("webhook-timestamp", &now), ("webhook-signature", &signature)];
        assert_eq!(Open::send(base, "POST", "/", &headers, "{\"a\":1}").unwrap().status, 202);
    });
    let line: Value = serde_json::from_str(text.trim()).unwrap();
    assert_eq!((exit, &line["signature"], &line["body"]), (0, &json!("ok"), &json!("{\"a\":1}")));
    assert_eq!(line["headers"]["webhook-id"], "i");
}
