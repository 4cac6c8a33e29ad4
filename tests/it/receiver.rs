//! The receiver of webhooks: what it verifies, records, answers and prints.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use couch_hookd::pure::signature::{Key, Mismatch, new_secret, sign};
use couch_hookd::standin::receiver::{Reaction, ReceiveOptions, Receiver, ReceiverOptions, run_receive};
use couch_hookd::standin::record::Violation;
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::http_client::{LIMIT, Open, ask};

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
        assert_eq!(record.accepted_revs("db").len(), 2);
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
        let (stop, stopped) = crossbeam_channel::bounded::<()>(1);
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
