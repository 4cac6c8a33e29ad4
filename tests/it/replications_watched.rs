//! Commands on a webhook with `watch = replications`: what `check` and `explain` say, `seek` refused, `test` and `status`.

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use serde_json::{Value, json};

use crate::commands::{Desk, Said, ask, wait_until_alive};
use crate::host::WAIT_MAX;
use crate::world::{CANARY, Daemon, FLAVOURS, Ini, STATE_DB, couch, on_each, receiver};

const REPLICATIONS: &str = "watch = replications";

fn object(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:?}"))
}

/// `level: message` of every line of `check --json` about a subject.
fn lines(said: &Said, subject: &str) -> Vec<String> {
    let lines =
        said.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{said:?}")));
    let ours = lines.filter(|line: &Value| line["subject"].as_str().unwrap().contains(subject));
    ours.map(|line| format!("{}: {}", line["level"].as_str().unwrap(), line["message"].as_str().unwrap()))
        .collect()
}

#[test]
fn check_asks_whatever_tells_of_replications() {
    on_each(&FLAVOURS, |flavour| {
        let (couch, receiver) = (couch(flavour, &["_replicator"]), receiver());
        let more = format!("{REPLICATIONS}\ndb = _replicator, team/_replicator");
        let desk = Desk::new(&Ini::new(&couch.url()).webhook("sync", &receiver.url(), &more));
        let said = desk.say(&["check", "--json"]);
        assert_eq!(said.status, 0, "{flavour:?} {said:?}");
        let told = match flavour {
            Flavour::V1 => {
                "ok: this CouchDB has no scheduler: documents and `_active_tasks` tell how replications are"
            }
            _ => "ok: the scheduler tells how its replications are",
        };
        let expected = ["ok: its documents can be read", told, "ok: its checkpoint can be written"];
        assert_eq!(lines(&said, "database `_replicator`"), expected, "{flavour:?} {said:?}");
        let missing = ["warning: does not exist; once it does its replications are told"];
        assert_eq!(lines(&said, "database `team/_replicator`"), missing, "{flavour:?} {said:?}");
        let n_asked = couch.n_requests("GET /_scheduler/docs/_replicator");
        let n_tasks = couch.n_requests("GET /_active_tasks");
        let is_old = flavour == Flavour::V1;
        assert_eq!((n_asked, n_tasks), (usize::from(!is_old), usize::from(is_old)), "{flavour:?}");
        assert_eq!(couch.n_requests("DELETE /_replicator/_local/couch-hookd-check-"), 1, "{flavour:?}");
    });
}

/// A stand-in whose only admin is somebody else.
fn closed(flavour: Flavour) -> StandIn {
    let options = Options {
        admin: Some(("admin".to_owned(), format!("{CANARY}-another"))),
        users: vec![("hookd".to_owned(), format!("{CANARY}-couchdb"))],
        ..Options::new(flavour)
    };
    let couch = StandIn::start(options).unwrap();
    couch.create_db("_replicator");
    couch
}

#[test]
fn check_and_explain_say_that_an_admin_is_needed() {
    on_each(&FLAVOURS, |flavour| {
        let couch = closed(flavour);
        let receiver = receiver();
        let desk = Desk::new(&Ini::new(&couch.url()).webhook("sync", &receiver.url(), REPLICATIONS));
        let said = desk.say(&["check", "--json"]);
        let needed = "`watch = replications` needs a server admin, and we are `hookd`: give `username`";
        let lines = lines(&said, "database `_replicator`");
        let asked = if flavour == Flavour::V1 { "/_active_tasks" } else { "/_scheduler/docs" };
        let refused =
            |line: &&String| line.starts_with("error: ") && line.contains(asked) && line.contains(needed);
        assert_eq!((said.status, lines.iter().filter(refused).count()), (1, 1), "{flavour:?} {said:?}");

        let said = desk.say(&["explain", "sync", "--json"]);
        let all = object(&said);
        let missing: Vec<&Value> =
            all["rights"].as_array().unwrap().iter().map(|right| &right["missing"]).collect();
        let is_said =
            missing.iter().any(|missing| missing.as_str().is_some_and(|why| why.contains("server admin")));
        assert!(said.status == 1 && is_said, "{flavour:?} {said:?}");
    });
}

#[test]
fn explain_shows_when_a_state_is_told_and_nothing_about_changes() {
    let (couch, receiver) = (couch(Flavour::V3, &["_replicator"]), receiver());
    let ini = Ini::new(&couch.url())
        .webhook("sync", &receiver.url(), REPLICATIONS)
        .webhook(
            "quick",
            &receiver.url(),
            "watch = replications\nsince = now\npoll_interval = 200ms\n\
            confirm_polls = 1\nstalled_after = 90s\nretry_failed = 3, 10m\nevents = replication.failed",
        )
        .webhook("orders", &receiver.url(), "");
    let desk = Desk::new(&ini);
    let said = object(&desk.say(&["explain", "sync", "--json"]));
    let facts = &said["facts"];
    let asks = "every 5s, and when a document changed; a state counts when seen 2 times in a row, `completed` and `failed` \
        at once; what is so at the first start is told once";
    assert_eq!(facts["asks"], asks);
    assert_eq!(facts["stalled"], "after 10m with changes pending and without progress");
    assert_eq!(facts["submitted again"], "never: failed ones stay as they are");
    let tells = facts["tells"].as_str().unwrap();
    assert!(
        tells.contains("`replication.failed`") && tells.ends_with("of the replications in `_replicator`"),
        "{tells}"
    );
    assert!(!tells.contains("replication.running"), "{tells}");
    let setting = |said: &Value, key: &str| {
        let settings = said["settings"].as_array().unwrap().clone();
        settings.into_iter().find(|setting| setting["key"] == key).map(|setting| {
            (setting["value"].as_str().unwrap().to_owned(), setting["origin"].as_str().unwrap().to_owned())
        })
    };
    let default = |value: &str| Some((value.to_owned(), "default".to_owned()));
    assert_eq!(setting(&said, "db"), default("_replicator"));
    assert_eq!(setting(&said, "poll_interval"), default("5s"));
    assert_eq!(setting(&said, "confirm_polls"), default("2"));
    assert_eq!(setting(&said, "stalled_after"), default("10m"));
    assert_eq!(setting(&said, "retry_failed"), default("off"));
    let events = setting(&said, "events").unwrap();
    assert!(events.1 == "default" && events.0.contains("replication.failed, "), "{events:?}");
    for key in
        ["selector", "doc_ids", "view", "filter", "include_docs", "conflicts", "conflict_docs", "design_docs"]
    {
        assert_eq!(setting(&said, key), None, "{key}");
    }
    let right = "server admin: asks the scheduler about `_replicator`";
    let rights = said["rights"].as_array().unwrap();
    let has = rights
        .iter()
        .any(|one| one["right"].as_str().unwrap().starts_with(right) && one["missing"].is_null());
    assert!(has, "{rights:?}");

    let said = object(&desk.say(&["explain", "quick", "--json"]));
    let asks = "every 200ms, and when a document changed; a state counts at once; what is so at the first start is \
        known, not told";
    assert_eq!(said["facts"]["asks"], asks);
    assert_eq!(said["facts"]["stalled"], "after 90s with changes pending and without progress");
    let again = "10m after each failure, at most 3 times until it goes well";
    assert_eq!(said["facts"]["submitted again"], again);
    assert_eq!(said["events"], json!(["replication.failed"]));

    let said = object(&desk.say(&["explain", "orders", "--json"]));
    assert_eq!((&said["facts"]["asks"], setting(&said, "poll_interval")), (&Value::Null, None));
    assert!(setting(&said, "selector").is_some());
}

#[test]
fn seek_is_refused_by_the_command_and_by_a_daemon() {
    let (couch, receiver) = (couch(Flavour::V3, &["_replicator"]), receiver());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), REPLICATIONS);
    let desk = Desk::new(&ini);
    let refused = "webhook `orders`: `watch = replications` has no places to go to";
    let _daemon = Daemon::start(&ini);
    wait_until_alive(&couch);
    for to in ["0", "now", "12-g1AAA"] {
        let said = desk.say(&["seek", "orders", "--to", to, "--yes"]);
        assert!(said.status == 1 && said.out.is_empty() && said.err.contains(refused), "{said:?}");
    }
    let requests = |seen: &couch_hookd::standin::couch::Seen| {
        let requests =
            seen.winners(STATE_DB).into_iter().filter(|(_, winner)| winner.json.contains("\"seek\""));
        requests.map(|(_, winner)| winner.json).collect::<Vec<_>>()
    };
    assert_eq!(couch.look(|seen| requests(seen)), [""; 0]);
    // Of a command that did not look: the daemon does.
    ask(&couch, "request:00000000000000000001-a", "seek", &json!({"to": 0}));
    let is_refused = couch.wait_until(WAIT_MAX, |seen| {
        requests(seen).iter().any(|json| json.contains("\"failed\"") && json.contains(refused))
    });
    assert!(is_refused, "{:?}", couch.look(|seen| requests(seen)));
}

#[test]
fn test_and_status_work() {
    let (couch, receiver) = (couch(Flavour::V2, &["_replicator"]), receiver());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), REPLICATIONS);
    let desk = Desk::new(&ini);
    let _daemon = Daemon::start(&ini);
    wait_until_alive(&couch);
    let said = desk.done(&["test", "orders"]);
    assert!(said.contains("the endpoint takes events"), "{said}");
    let said = desk.done(&["status", "orders", "--json"]);
    assert!(said.contains("\"orders\"") && said.contains("running"), "{said}");
}
