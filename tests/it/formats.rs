//! Formats seen from outside: what a receiver gets, and that each is signed over its very bytes.

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::standin::record::Delivery;
use serde_json::{Value, json};

use crate::host::WAIT_MAX;
use crate::http_client::ask;
use crate::world::{
    Daemon, FLAVOURS, Ini, World, checkpoint, couch, letters, on_each, receiver, receiver_with,
};

/// What floats, blanks and another order of members would spoil.
const DOC: &str = r#"{"big":12345678901234567890123,"one":1.0,"zero":-0.0,"a":"<b> & c"}"#;

/// The requests that one document `order:17` causes in a format, after it was accepted.
fn requests(flavour: Flavour, format: &str, n: usize) -> (World, Vec<Delivery>) {
    let couch = couch(flavour, &["orders"]);
    couch.put_raw("orders", "order:17", DOC).unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let world = World::start_on(couch, receiver, &format!("format = {format}"));
    world.wait("delivery", |record| record.n_accepted() >= n);
    let all = world.receiver.look(|record| record.deliveries().to_vec());
    for one in &all {
        assert_eq!(one.verified, Ok(()), "the signature is over the body as it is\n{}", world.transcript());
    }
    (world, all)
}

fn header<'a>(one: &'a Delivery, name: &str) -> &'a str {
    one.headers.iter().find(|(other, _)| other.eq_ignore_ascii_case(name)).map_or("", |(_, value)| value)
}

fn text(one: &Delivery) -> &str {
    std::str::from_utf8(&one.body).unwrap()
}

/// The document as CouchDB gives it, byte for byte.
fn stored(couch: &StandIn) -> String {
    couch.winner("orders", "order:17").unwrap().json
}

#[test]
fn raw_is_the_line_of_the_feed() {
    on_each(&FLAVOURS, |flavour| {
        let (world, all) = requests(flavour, "raw", 1);
        let body = text(&all[0]);
        assert_eq!(header(&all[0], "content-type"), "application/json");
        let line: Value = serde_json::from_str(body).unwrap();
        let members: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(members, ["changes", "doc", "id", "seq"], "{body}");
        assert!(body.contains(r#""big":12345678901234567890123"#) && body.contains("-0.0"), "{body}");
        assert_eq!(line["changes"][0]["rev"], line["doc"]["_rev"]);
        let rev = world.couch.delete("orders", "order:17").unwrap();
        world.wait("deletion", |record| record.n_accepted() >= 2);
        let body = world.receiver.look(|record| record.deliveries()[1].body.clone());
        let line: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((&line["deleted"], &line["changes"][0]["rev"]), (&json!(true), &json!(rev)));
        assert_eq!(line["doc"]["_deleted"], true, "raw leaves nothing out: {line}");
    });
}

/// Of leaves that are deleted only the line knows: what we make of a row ourselves would not hold them.
#[test]
fn raw_is_the_line_itself_and_not_made_of_it() {
    let couch = couch(Flavour::V3, &["orders"]);
    couch.put_raw("orders", "order:17", DOC).unwrap();
    couch
        .conflict("orders", "order:17", "1-00000000000000000000000000000001", r#"{"_deleted":true}"#)
        .unwrap();
    let receiver = receiver_with(|options| options.keep_bodies = true);
    let world = World::start_on(couch, receiver, "format = raw\nconflicts = true");
    world.wait("delivery", |record| record.n_accepted() >= 1);
    let body = world.receiver.look(|record| record.deliveries()[0].body.clone());
    let line: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(line["changes"].as_array().unwrap().len(), 2, "{line}");
}

#[test]
fn cloudevents_says_what_it_is() {
    let (world, all) = requests(Flavour::V3, "cloudevents", 1);
    assert_eq!(header(&all[0], "content-type"), "application/cloudevents+json; charset=utf-8");
    let event: Value = serde_json::from_slice(&all[0].body).unwrap();
    assert_eq!(event["id"], all[0].webhook_id.as_str());
    assert_eq!(event["type"], "org.apache.couchdb.document.updated");
    assert_eq!(event["subject"], "order:17");
    assert!(text(&all[0]).contains(&format!("\"doc\":{}", stored(&world.couch))), "{}", text(&all[0]));
}

#[test]
fn slack_gets_a_text_and_no_document() {
    let (_world, all) = requests(Flavour::V3, "slack", 1);
    let message: Value = serde_json::from_slice(&all[0].body).unwrap();
    let members: Vec<&String> = message.as_object().unwrap().keys().collect();
    assert_eq!(members, ["text"]);
    let said = message["text"].as_str().unwrap();
    assert!(said.starts_with("*document.updated* order:17 in orders, revision 1-"), "{said}");
    assert!(!text(&all[0]).contains("1234567"), "{said}");
}

/// The endpoint is a database of another CouchDB: a review queue. What it has already is delivered, too.
#[test]
fn couchdb_doc_fills_a_database_of_another_couchdb() {
    on_each(&FLAVOURS, |flavour| {
        let review = couch(flavour, &["review"]);
        let source = couch(Flavour::V3, &["orders"]);
        source.put_raw("orders", "order:17", DOC).unwrap();
        let lines = "format = couchdb_doc\nretry_schedule = 100ms";
        let ini = Ini::new(&source.url()).webhook("orders", &format!("{}/review", review.url()), lines);
        let mut daemon = Daemon::start(&ini);
        let found = review.wait_until(WAIT_MAX, |seen| !seen.winners("review").is_empty());
        assert!(found, "nothing arrived\n{}", daemon.transcript());
        let (id, winner) = review.winners("review").pop_first().unwrap();
        let doc: Value = serde_json::from_str(&winner.json).unwrap();
        assert!(id.starts_with("msg_"), "{id}");
        assert_eq!(doc["data"]["doc"]["_id"], "order:17");
        assert!(winner.json.contains(&stored(&source)), "{}", winner.json);
        // As after a kill before the checkpoint: told again, refused with 409, and that is that.
        source.put("orders", "order:18", &json!({})).unwrap();
        let both = review.wait_until(WAIT_MAX, |seen| seen.winners("review").len() == 2);
        assert!(both, "{}", daemon.transcript());
        daemon.kill();
        let posts = posted(&review);
        let forgotten = ask(&source.url(), "DELETE", "/orders/_local/couch-hookd.orders", "");
        assert!(forgotten.status < 300 || forgotten.status == 404, "{forgotten:?}");
        daemon.start_again();
        let again = review.wait_until(WAIT_MAX, |seen| {
            seen.requests().filter(|one| one.method == "POST").count() >= posts + 2
        });
        assert!(again, "{}", daemon.transcript());
        source.put("orders", "order:19", &json!({})).unwrap();
        let third = review.wait_until(WAIT_MAX, |seen| seen.winners("review").len() == 3);
        assert!(third, "409 held up what followed\n{}", daemon.transcript());
        let caught_up = source.wait_until(WAIT_MAX, |seen| {
            let checkpoint = seen.local("orders", "couch-hookd.orders").unwrap_or_default();
            checkpoint.contains("\"through_seq\":\"3-") && checkpoint.contains("\"delivered\":[]")
        });
        assert!(caught_up, "{:?}\n{}", checkpoint(&source, "orders", "orders"), daemon.transcript());
        assert_eq!(posted(&review), posts + 3, "what is there already is not tried again");
        assert_eq!(letters(&source), [] as [Value; 0]);
        assert_eq!(daemon.n_logged("its endpoint"), 0, "{}", daemon.transcript());
    });
}

fn posted(review: &StandIn) -> usize {
    review.look(|seen| seen.requests().filter(|one| one.method == "POST").count())
}

/// What a plain receiver answers 409 to is refused.
#[test]
fn elsewhere_409_is_a_refusal() {
    let couch = couch(Flavour::V3, &["orders"]);
    couch.put_raw("orders", "order:17", DOC).unwrap();
    couch.put_raw("orders", "order:18", DOC).unwrap();
    let receiver = receiver();
    receiver.answer(|one| Reaction::Status(if one.doc_id() == "order:17" { 409 } else { 200 }));
    let world = World::start_on(couch, receiver, "retry_schedule = 100ms");
    world.daemon.wait_for_log("is a dead letter now (refused)");
    assert_eq!(letters(&world.couch)[0]["status"], 409);
}
