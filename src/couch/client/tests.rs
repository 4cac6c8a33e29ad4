//! Answers turned into errors, the login gate with many who ask, and being stopped.

use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};

use super::*;
use crate::couch::scripted::{Scripted, hookd, recorded, send, wait_for_hang_up};
use crate::sys;

const LOGIN: Option<(&str, &str)> = Some(("hookd", "canary-password"));

fn get(server: &Server, path: &str) -> Result<Reply> {
    server.request(&Method::GET, path, None, &[])
}

/// Kind and text of the error that an answer becomes.
fn check_refusal(status: u16, body: &str, kind: Kind, text: &str) {
    let body = body.to_owned();
    let scripted = Scripted::start(move |_, stream| send(stream, status, &body));
    let error = get(&scripted.server(None), "/orders/x?secret=1").unwrap_err();
    assert_eq!(error.to_string(), format!("GET /orders/x: {text}"));
    assert_eq!(error.kind(), kind, "{error}");
}

#[test]
fn refusals_have_their_kind_and_couchdbs_words() {
    for version in ["1.7.1", "2.2.0", "3.5.0"] {
        let check_recorded = |name, kind, text| {
            let (status, body) = recorded(version, name);
            check_refusal(status, &body, kind, text);
        };
        check_recorded("local_missing", Kind::NotFound, "404 not_found: missing");
        // Recorded from `_all_dbs`, which 2.2.0 gives to anybody.
        if version != "2.2.0" {
            let text = "401 unauthorized: You are not a server admin.";
            check_recorded("unauthorized_no_login", Kind::Forbidden, text);
        }
        check_recorded(
            "unauthorized_wrong",
            Kind::Unauthorized,
            "401 unauthorized: Name or password is incorrect.",
        );
        check_recorded(
            "db_create_again",
            Kind::Conflict,
            "412 file_exists: The database could not be created, the file already exists.",
        );
    }
    let locked = "Account is temporarily locked due to multiple authentication failures";
    check_refusal(
        403,
        &format!("{{\"error\":\"forbidden\",\"reason\":\"{locked}\"}}"),
        Kind::Locked,
        &format!("403 forbidden: {locked}"),
    );
    check_refusal(
        403,
        r#"{"error":"forbidden","reason":"You are not allowed to access this db."}"#,
        Kind::Forbidden,
        "403 forbidden: You are not allowed to access this db.",
    );
    check_refusal(429, r#"{"error":"x","reason":null}"#, Kind::Server, "429 x: null");
    check_refusal(418, r#"{"error":"x"}"#, Kind::BadRequest, "418 x: null");
    check_refusal(
        502,
        "<html>\n<b>Bad</b>",
        Kind::Server,
        "502, expected CouchDB's JSON, got `<html>\\n<b>Bad</b>`",
    );
    check_refusal(404, "<html>", Kind::Malformed, "404, expected CouchDB's JSON, got `<html>`");
    check_refusal(302, "", Kind::Malformed, "302, expected CouchDB's JSON, got ``");
}

#[test]
fn who_the_server_is() {
    let check = |version: &'static str, generation, uuid: Option<&str>| {
        let scripted = Scripted::start(move |_, stream| {
            let (status, body) = recorded(version, "root");
            send(stream, status, &body);
        });
        let welcome = scripted.server(None).welcome().unwrap();
        let uuid = uuid.map(str::to_owned);
        assert_eq!(welcome, Welcome { version: version.to_owned(), uuid, generation });
    };
    check("1.7.1", Generation::One, Some("86e0b14fef53ded4bab67c9097993fae"));
    check("2.2.0", Generation::Two, None);
    check("3.5.0", Generation::Three, Some("3426545b193077e19a787b31cbf1a75f"));
    for (version, expected) in
        [("1.1.1+4a", Generation::One), ("4.2.0", Generation::Three), ("x", Generation::Three)]
    {
        assert_eq!(generation(version), expected, "{version}");
    }
    let html = Scripted::start(|_, stream| send(stream, 200, "<html>hello"));
    let error = html.server(None).welcome().unwrap_err();
    assert_eq!(error.kind(), Kind::Malformed);
    assert!(error.to_string().starts_with("GET /: expected CouchDB's JSON, got `<html>hello`"), "{error}");
}

#[test]
fn nodes_are_counted_where_there_is_a_cluster() {
    let check = |status, body: &'static str, n_nodes| {
        let scripted = Scripted::start(move |_, stream| send(stream, status, body));
        assert_eq!(scripted.server(None).nodes().unwrap(), n_nodes);
    };
    check(200, r#"{"all_nodes":["a"],"cluster_nodes":["a","b","c"]}"#, 3);
    check(400, r#"{"error":"illegal_database_name","reason":"…"}"#, 1);
    check(404, "Cannot GET /_membership", 1);
}

#[test]
fn paths_are_encoded() {
    assert_eq!(db_path("a/b+c$", &["_local", "x/y"]), "/a%2Fb%2Bc%24/_local/x%2Fy");
    assert_eq!(db_path("a", &["_design/a/b"]), "/a/_design/a%2Fb");
    assert_eq!(db_path("a", &["_local/é", ".."]), "/a/_local/%C3%A9/%2E%2E");
    assert_eq!(db_path("a", &["webhook:x"]), "/a/webhook%3Ax");
}

#[test]
fn the_login_is_sent_and_never_shown() {
    let scripted = Scripted::start(|_, stream| send(stream, 200, "{}"));
    let server = scripted.server(LOGIN);
    let reply = get(&server, "/x").unwrap();
    assert_eq!(reply.date.unwrap().to_string(), "2026-11-21T21:30:40Z");
    assert_eq!(scripted.asked(), ["GET /", "GET /x"]);
    // hookd:canary-password
    let header = "authorization: basic ag9va2q6y2fuyxj5lxbhc3n3b3jk";
    assert!(scripted.seen().iter().all(|seen| seen.headers.iter().any(|line| line == header)));
}

#[test]
fn a_wrong_password_is_sent_once_however_many_ask() {
    let scripted = Scripted::start(|_, stream| {
        let (status, body) = recorded("3.5.0", "unauthorized_wrong");
        send(stream, status, &body);
    });
    let server = scripted.server(LOGIN);
    let threads: Vec<_> = (0..16)
        .map(|n| {
            let server = server.clone();
            sys::spawn("test", move || {
                let error = get(&server, &format!("/db{n}")).unwrap_err();
                assert!(matches!(error.kind(), Kind::Unauthorized | Kind::Locked), "{error}");
                assert!(error.to_string().contains("Name or password is incorrect."), "{error}");
            })
            .unwrap()
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(scripted.asked(), ["GET /"]);
    let error = get(&server, "/again").unwrap_err();
    assert_eq!(error.kind(), Kind::Locked);
    let text = error.to_string();
    assert!(text.starts_with("GET /again: nothing is sent with this login until 20"), "{text}");
    assert!(!text.contains("canary"));
    assert_eq!(scripted.asked().len(), 1);
}

#[test]
fn rights_do_not_shut_the_gate_and_a_changed_password_does() {
    let status = Arc::new(AtomicU16::new(0));
    let now = Arc::clone(&status);
    let scripted = Scripted::start(move |seen, stream| {
        let name = match (seen.path.as_str(), now.load(Ordering::SeqCst)) {
            ("/", 0) => "root",
            (_, 0) => "unauthorized_no_login",
            _ => "unauthorized_wrong",
        };
        let (status, body) = recorded("3.5.0", name);
        send(stream, status, &body);
    });
    let server = scripted.server(LOGIN);
    for _ in 0..3 {
        assert_eq!(get(&server, "/_all_dbs").unwrap_err().kind(), Kind::Forbidden);
    }
    assert_eq!(scripted.asked().len(), 4);
    status.store(1, Ordering::SeqCst);
    assert_eq!(get(&server, "/a").unwrap_err().kind(), Kind::Unauthorized);
    assert_eq!(get(&server, "/b").unwrap_err().kind(), Kind::Locked);
    assert_eq!(scripted.asked().len(), 5);
}

#[test]
fn a_401_in_other_words_is_looked_into() {
    let scripted = Scripted::start(move |seen, stream| match seen.path.as_str() {
        "/" => send(stream, 200, "{}"),
        "/filtered" => send(stream, 401, r#"{"error":"unauthorized","reason":"says the filter"}"#),
        _ => send(stream, 200, "[]"),
    });
    let server = scripted.server(LOGIN);
    assert_eq!(get(&server, "/filtered").unwrap_err().kind(), Kind::Unauthorized);
    get(&server, "/x").unwrap();
    assert_eq!(scripted.asked(), ["GET /", "GET /filtered", "GET /", "GET /x"]);
}

#[test]
fn stop_ends_what_is_under_way_and_what_comes_later() {
    let n_silent = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&n_silent);
    let (arrived, arrivals) = crossbeam_channel::bounded(2);
    let scripted = Scripted::start(move |_, stream| {
        count.fetch_add(1, Ordering::SeqCst);
        arrived.send(()).unwrap();
        wait_for_hang_up(stream);
    });
    let server = scripted.server(None);
    let waiting = server.clone();
    let thread = sys::spawn("test", move || {
        assert_eq!(get(&waiting, "/x").unwrap_err().kind(), Kind::Stopped);
    })
    .unwrap();
    arrivals.recv().unwrap();
    server.stop();
    thread.join().unwrap();
    assert_eq!(get(&server, "/y").unwrap_err().kind(), Kind::Stopped);
    assert_eq!(
        server.line().request(&Method::GET, "/z", None, Limits::default()).err().unwrap().kind(),
        Kind::Stopped
    );
    assert_eq!(n_silent.load(Ordering::SeqCst), 1);
}

#[test]
fn stop_wakes_those_who_wait_for_the_gate() {
    let (arrived, arrivals) = crossbeam_channel::bounded(2);
    let scripted = Scripted::start(move |_, stream| {
        arrived.send(()).unwrap();
        wait_for_hang_up(stream);
    });
    let server = scripted.server(LOGIN);
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let server = server.clone();
            sys::spawn("test", move || {
                assert_eq!(get(&server, "/x").unwrap_err().kind(), Kind::Stopped);
            })
            .unwrap()
        })
        .collect();
    arrivals.recv().unwrap();
    server.stop();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(scripted.asked(), ["GET /"]);
}

#[test]
fn silence_deadline_and_length_are_limited() {
    let scripted = Scripted::start(|seen, stream| match seen.path.as_str() {
        "/long" => send(stream, 200, &"x".repeat(101)),
        _ => wait_for_hang_up(stream),
    });
    let server = scripted.server(None);
    let short = Some(Duration::from_millis(50));
    let check = |path, limits, kind, text: &str| {
        let error = server.request_within(&Method::GET, path, None, &[], limits).unwrap_err();
        assert_eq!((error.kind(), error.to_string().as_str()), (kind, text));
    };
    let silence = Limits { silence: short, ..Limits::default() };
    check("/x", silence, Kind::Timeout, "GET /x: no byte for 0.05 s");
    let deadline = Limits { deadline: short, ..Limits::default() };
    check("/x", deadline, Kind::Timeout, "GET /x: timeout (global)");
    let length = Limits { body_bytes_max: 100, ..Limits::default() };
    let text = "GET /long: expected an answer of at most 100 bytes, got a longer one";
    check("/long", length, Kind::TooLong, text);
}

#[test]
fn nobody_there_is_unreachable() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let server = Server::new(&hookd(&format!("http://127.0.0.1:{free}"), LOGIN)).unwrap();
    let error = get(&server, "/x").unwrap_err();
    assert_eq!(error.kind(), Kind::Unreachable);
    assert_eq!(error.to_string(), "GET /x: GET /: connection refused");
    for url in ["couch.example", "ftp://x", "http://"] {
        assert_eq!(
            Server::new(&hookd(url, None)).err().map(|error| error.kind()),
            Some(Kind::Config),
            "{url}"
        );
    }
}
