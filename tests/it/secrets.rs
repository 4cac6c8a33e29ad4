//! No secret leaves: an endpoint that answers with all it knows, at log level debug, in letters and in logs.
//!
//! That no other test makes a secret show is seen by `world` at the end of each.

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::standin::record::Record;

use crate::world::{
    CANARY, Daemon, Dir, Ini, World, assert_no_secret, letters, receiver_with, secret, write,
};

/// What servers and proxies write into their error pages.
fn echo(status: u16, headers: &[(String, String)]) -> Reaction {
    let mut body = format!(
        "Cannot POST /hook/{CANARY}-path?token={CANARY}-token: token={CANARY}-token, {CANARY}-token, hook:{CANARY}-endpoint, \
         wrong password {CANARY}-endpoint, http://hook:{CANARY}-endpoint@127.0.0.1/hook/{CANARY}-path?token={CANARY}-token, {} ",
        secret()
    );
    for (name, value) in headers {
        body += &format!("{name}={value};");
        body += value.strip_prefix("Basic ").unwrap_or_default();
        body += value.strip_prefix("Bearer ").unwrap_or_default();
    }
    Reaction::StatusWith { status, headers: vec![("x-echo".to_owned(), body.clone())], body }
}

#[test]
fn an_endpoint_that_echoes_everything_puts_no_secret_into_letters_and_logs() {
    let mut options = Options::new(Flavour::V3);
    options.admin = Some(("hookd".to_owned(), format!("{CANARY}-couchdb")));
    let couch = StandIn::start(options).unwrap();
    couch.create_db("orders");
    let receiver = receiver_with(|options| options.keep_bodies = true);
    receiver.answer(|one| match one.doc_id() {
        "d1" => echo(422, &one.headers),
        "d2" => echo(500, &one.headers),
        "d3" => echo(401, &one.headers),
        _ => Reaction::Status(200),
    });
    write(&couch, "orders", 200);
    couch.delete("orders", "d3").unwrap();
    let ini = Ini::new(&couch.url()).hookd("log_level = debug").webhook(
        "orders",
        &receiver.url(),
        "retry_schedule = 100ms",
    );
    let world = World { daemon: Daemon::start(&ini), couch, receiver };
    world.daemon.wait_for_log("is a dead letter now (refused)");
    world.daemon.wait_for_log("is a dead letter now (suspect)");
    world.wait("198 others", |record| record.accepted_revs("orders").len() >= 197);
    world.couch.put("orders", "d3", &serde_json::json!({})).unwrap();
    world.daemon.wait_for_log("status: 401");
    // The endpoint itself does get them.
    world.receiver.look(|record: &Record| {
        let header = |name: &str| {
            let found = record.deliveries()[0].headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.clone()).unwrap_or_default()
        };
        assert_eq!(header("x-canary"), format!("{CANARY}-header"));
        use base64::Engine;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("hook:{CANARY}-endpoint"));
        assert_eq!(header("authorization"), format!("Basic {login}"));
    });
    let stored = letters(&world.couch);
    // `d3` too, where three of its attempts had deliveries between them.
    assert!(stored.len() >= 2, "{stored:#?}");
    for letter in &stored {
        assert!(letter["answer"].as_str().unwrap().starts_with("Cannot POST"), "{letter:#}");
        assert_no_secret("a dead letter", &letter.to_string());
    }
    world.daemon.wait_for_log("delivered");
}

/// From a file, in the place of the login in the URL; the endpoint gives it back, and nobody sees it.
#[test]
fn a_bearer_token_reaches_the_endpoint_and_nobody_else() {
    let couch = crate::world::couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 20);
    let receiver = receiver_with(|options| options.keep_bodies = true);
    receiver.answer(|one| match one.doc_id() {
        "d1" => echo(422, &one.headers),
        _ => Reaction::Status(200),
    });
    let folder = Dir::new();
    let path = folder.path("token");
    std::fs::write(&path, format!("Bearer {CANARY}-bearer\n")).unwrap();
    let lines = format!("header.authorization_file = {}\nretry_schedule = 100ms", path.display());
    let ini = Ini::new(&couch.url()).hookd("log_level = debug").webhook("orders", &receiver.url(), &lines);
    let world = World { daemon: Daemon::start(&ini), couch, receiver };
    world.daemon.wait_for_log("is a dead letter now (refused)");
    world.receiver.look(|record: &Record| {
        for one in record.deliveries() {
            let given = one.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("authorization"));
            let given: Vec<&str> = given.map(|(_, value)| value.as_str()).collect();
            assert_eq!(given, [format!("Bearer {CANARY}-bearer")], "one, and not the login of the URL");
        }
    });
    let stored = letters(&world.couch);
    assert!(stored[0]["answer"].as_str().unwrap().starts_with("Cannot POST"), "{stored:#?}");
}

#[test]
fn a_wrong_password_and_an_unreachable_endpoint_show_no_secret() {
    let mut options = Options::new(Flavour::V3);
    options.admin = Some(("hookd".to_owned(), "another".to_owned()));
    let couch = StandIn::start(options).unwrap();
    let ini =
        Ini::new(&couch.url()).hookd("log_level = debug").webhook("orders", "http://127.0.0.1:9/hook", "");
    let daemon = Daemon::start(&ini);
    daemon.wait_for_log("401");

    let couch = crate::world::couch(Flavour::V3, &["orders"]);
    write(&couch, "orders", 1);
    let ini =
        Ini::new(&couch.url()).hookd("log_level = debug").webhook("orders", "http://127.0.0.1:9/hook", "");
    let daemon = Daemon::start(&ini);
    daemon.wait_for_log("cannot be reached");
    // A configuration with faults in all of them.
    let ini = Ini::new(&couch.url())
        .hookd(&format!("password = {CANARY}-password"))
        .webhook("orders", "nonsense://127.0.0.1:9/hook", &format!("secret = whsec_{CANARY}!"))
        .webhook("bills", "http://", &format!("header.bad name = {CANARY}\nheadr.x = {CANARY}"));
    let mut daemon = Daemon::start(&ini);
    assert_eq!(daemon.wait_for_end().code, Some(2), "{}", daemon.transcript());
}
