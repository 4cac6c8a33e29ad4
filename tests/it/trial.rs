//! `test NAME`: one event by the way of a delivery, each step shown, nothing secret in any of it.

use std::io::{Read, Write};
use std::net::TcpListener;

use couch_hookd::pure::format::Format;
use couch_hookd::pure::message::WebhookId;
use couch_hookd::pure::test_event;
use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::sys;
use serde_json::Value;

use crate::commands::Desk;
use crate::world::{CANARY, Ini, STATE_DB, World, receiver, receiver_with, write};

/// Exit status and what stands on stdout, stderr behind it.
fn test(ini: &Ini, arguments: &[&str]) -> (i32, String) {
    let said = Desk::new(ini).say(&[&["test", "orders"], arguments].concat());
    (said.status, said.out + &said.err)
}

/// No CouchDB answers: the endpoint is tried all the same.
fn ini(endpoint: &str, lines: &str) -> Ini {
    Ini::new("http://127.0.0.1:9").webhook("orders", endpoint, lines)
}

#[test]
fn a_signed_event_arrives_and_every_step_is_timed() {
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let (status, text) = test(&ini(&receiver.url(), ""), &["--json"]);
    assert_eq!(status, 0, "{text}");
    let said: Value = serde_json::from_str(&text).unwrap();
    let steps: Vec<&str> =
        said["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["name", "connect", "answer"], "{text}");
    assert_eq!(said["status"], 200, "{text}");
    receiver.look(|record| {
        let [one] = record.deliveries() else { panic!("expected one request, got {record:?}") };
        assert_eq!(one.status, Some(200), "{one:?}");
        let header =
            |name: &str| one.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        assert_eq!(header("webhook-id"), said["id"].as_str());
        assert_eq!(header("x-canary"), Some(format!("{CANARY}-header").as_str()));
        // The line for the shell has the signature that was sent, which is no secret.
        assert!(said["curl"].as_str().unwrap().contains(header("webhook-signature").unwrap()), "{text}");
    });
}

#[test]
fn only_2xx_is_success_and_the_answer_is_shown_without_secrets() {
    let receiver = receiver();
    receiver.answer(|one| {
        let secret = one.headers.iter().find(|(key, _)| key == "x-canary").unwrap().1.clone();
        let body = format!("no such\ntoken {secret}");
        Reaction::StatusWith { status: 401, headers: Vec::new(), body }
    });
    let (status, text) = test(&ini(&receiver.url(), ""), &[]);
    assert_eq!(status, 1, "{text}");
    assert!(text.contains("401 Unauthorized") && text.contains("it says: no such token ***"), "{text}");
    assert!(text.contains("-H 'x-canary: ***'") && text.contains("/***'"), "{text}");
}

#[test]
fn the_step_that_fails_is_named() {
    let check = |endpoint: &str, lines: &str, expected: &str| {
        let (status, text) = test(&ini(endpoint, lines), &["--json"]);
        assert_eq!(status, 1, "{text}");
        let said: Value = serde_json::from_str(&text).unwrap();
        let found = format!("{}: {}", said["failed_at"].as_str().unwrap(), said["error"].as_str().unwrap());
        assert!(found.starts_with(expected), "{endpoint}: {found}");
    };
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    check(&format!("http://127.0.0.1:{port}/x"), "", "connect: connection refused");
    check("http://169.254.169.254/x", "", "name: the address `169.254.169.254` is refused");
    let receiver = receiver();
    check(&receiver.url().replace("http:", "https:"), "", "tls: ");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    check(&format!("http://{}/x", silent.local_addr().unwrap()), "timeout = 200ms", "answer: timeout");
}

#[test]
fn a_clock_that_differs_is_a_finding() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/x", listener.local_addr().unwrap());
    let server = sys::spawn("old-clock", move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.ends_with(b"}") {
            let n = stream.read(&mut buffer).unwrap();
            assert_ne!(n, 0, "expected a body, got its end");
            seen.extend_from_slice(&buffer[..n]);
        }
        let answer =
            "HTTP/1.1 204 No Content\r\nDate: Sat, 21 Nov 2020 20:47:41 GMT\r\nConnection: close\r\n\r\n";
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let (status, text) = test(&ini(&endpoint, ""), &[]);
    server.unwrap().join().unwrap();
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("warning") && text.contains(" s behind ours; receivers refuse"), "{text}");
}

#[test]
fn a_2xx_ends_a_pause_and_nothing_else_does() {
    let world = World::start(Flavour::V3, "");
    let receiver = &world.receiver;
    receiver.answer(|_| Reaction::Status(410));
    write(&world.couch, "orders", 2);
    world.wait_couch("gone_since in the record", |seen| {
        seen.winner(STATE_DB, "webhook:orders").is_some_and(|winner| winner.json.contains("gone_since"))
    });
    let ini = Ini::new(&world.couch.url()).webhook("orders", &receiver.url(), "");
    let (status, text) = test(&ini, &[]);
    assert_eq!(status, 1, "{text}");
    receiver.answer(|_| Reaction::Status(200));
    let (status, text) = test(&ini, &["--keep-paused"]);
    assert!(status == 0 && !text.contains("its pause is over"), "{text}");
    let (status, text) = test(&ini, &[]);
    assert!(status == 0 && text.contains("its pause is over"), "{text}");
    world.wait_for_all("orders");
    let (status, text) = test(&ini, &["--json"]);
    let said: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &said["pause"]), (0, &Value::from("none")), "{text}");
}

#[test]
fn the_documented_event_is_the_one_that_is_sent() {
    let text = include_str!("../../docs/events.md");
    let block = text.split("```json test\n").nth(1).unwrap().split("```").next().unwrap();
    let documented: Value = serde_json::from_str(block).unwrap();
    let at = documented["timestamp"].as_str().unwrap().parse().unwrap();
    let source = documented["source"].as_str().unwrap();
    let id = WebhookId::parse(documented["id"].as_str().unwrap()).unwrap();
    let sent = test_event::body(Format::Standard, id, "orders", source, at);
    assert_eq!(serde_json::from_slice::<Value>(&sent).unwrap(), documented);
}
