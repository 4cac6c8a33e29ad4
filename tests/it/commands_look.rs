//! `status` and `tail`: what they say with the daemon up, down, and in trouble.

use couch_hookd::standin::couch::Flavour;
use couch_hookd::standin::receiver::Reaction;
use serde_json::{Value, json};

use crate::commands::{Desk, Said, wait_until_alive};
use crate::host::{Host, WAIT_MAX};
use crate::world::{Daemon, FLAVOURS, Ini, STATE_DB, World, couch, letters, on_each, receiver, write};

/// The lines of `status --json`, by webhook.
fn lines(said: &Said) -> Vec<Value> {
    said.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{said:?}"))).collect()
}

/// Waits until `status` says what is expected: the daemon says so within a second or two.
#[track_caller]
fn wait_for_status(desk: &Desk, world: &World, what: &str, fits: impl Fn(&Value, i32) -> bool) -> Value {
    let ticks = crossbeam_channel::tick(std::time::Duration::from_millis(200));
    let until = couch_hookd::sys::now() + WAIT_MAX;
    loop {
        let said = desk.say(&["status", "--json"]);
        let line = lines(&said).remove(0);
        if fits(&line, said.status) {
            return line;
        }
        assert!(couch_hookd::sys::now() < until, "never {what}: {said:?}\n{}", world.transcript());
        let _ = ticks.recv();
    }
}

#[test]
fn status_says_how_a_webhook_is_and_when_a_person_is_needed() {
    on_each(&FLAVOURS, |flavour| {
        let mut world = World::start(flavour, "retry_schedule = 100ms, 5m");
        let lines_of = "retry_schedule = 100ms, 5m";
        let desk =
            Desk::new(&Ini::new(&world.couch.url()).webhook("orders", &world.receiver.url(), lines_of));
        write(&world.couch, "orders", 5);
        world.wait_for_all("orders");
        wait_until_alive(&world.couch);
        let line = wait_for_status(&desk, &world, "running", |line, status| {
            line["state"] == "running" && line["pending"] == 0 && status == 0
        });
        assert!(line["daemon"].as_str().unwrap().contains(&world.daemon.pid().to_string()), "{line}");
        let table = desk.say(&["status"]);
        assert!(table.out.starts_with("WEBHOOK  STATE") && table.out.contains("said so"), "{table:?}");
        assert!(!table.out.contains('\u{1b}'), "no colours but on a terminal");
        // An endpoint that is down needs nobody yet; when it is said to be gone, somebody.
        world.receiver.refuse_connections(true).unwrap();
        write(&world.couch, "orders", 7);
        let line = wait_for_status(&desk, &world, "down", |line, status| {
            line["state"] == "down" && line["next_try"].is_string() && status == 0
        });
        assert!(line["why"].as_str().unwrap().contains("cannot be reached"), "{line}");
        assert!(line["failure"].is_string(), "{line}");
        assert!(line["pending"].as_u64().unwrap() >= 7 && line["oldest"].is_string(), "{line}");
        // Killed: it is known at once on this machine, and the rest from what is stored.
        world.daemon.kill();
        let said = desk.say(&["status", "--json"]);
        let line = lines(&said).remove(0);
        assert_eq!((said.status, &line["state"]), (1, &json!("stopped")), "{said:?}");
        assert_eq!((&line["needs"], &line["daemon"]), (&json!("no daemon runs it"), &Value::Null));
        assert!(line["pending"].as_u64().unwrap() >= 7, "{line}");
        desk.done(&["pause", "orders"]);
        let said = desk.say(&["status", "orders"]);
        assert!(said.status == 0 && said.out.contains("paused") && said.out.contains("by hand"), "{said:?}");
        assert!(said.out.contains("no daemon is alive"), "{said:?}");
    });
}

#[test]
fn dead_letters_and_a_section_with_an_error_need_a_person() {
    let world = World::start(Flavour::V3, "retry_schedule = 100ms");
    world.receiver.answer(|one| Reaction::Status(if one.doc_id() == "bad" { 422 } else { 200 }));
    world.couch.put("orders", "bad", &json!({})).unwrap();
    world.couch.put("orders", "good", &json!({})).unwrap();
    world.wait_couch("a letter", |seen| seen.winners(STATE_DB).keys().any(|id| id.starts_with("msg_")));
    assert_eq!(letters(&world.couch).len(), 1);
    wait_until_alive(&world.couch);
    let ini = Ini::new(&world.couch.url())
        .webhook("orders", &world.receiver.url(), "retry_schedule = 100ms")
        .webhook("wrong", &world.receiver.url(), "selektor = {}");
    let said = Desk::new(&ini).say(&["status", "--json"]);
    let lines = lines(&said);
    assert_eq!(said.status, 1);
    assert_eq!(lines[0]["dead_letters"], json!({"refused": 1}), "{said:?}");
    assert!(lines[0]["needs"].as_str().unwrap().contains("replay or discard"), "{said:?}");
    assert_eq!(
        (&lines[1]["webhook"], &lines[1]["state"]),
        (&json!("wrong"), &json!("held back")),
        "{said:?}"
    );
}

#[test]
fn status_of_a_server_that_lets_nobody_in_fails() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let desk = Desk::new(&ini);
    let said = desk.say(&["status"]);
    assert!(said.status == 1 && said.out.contains("no daemon runs it"), "nothing was ever started: {said:?}");
    assert!(couch.look(|seen| seen.databases()).iter().all(|db| db != STATE_DB), "to look makes nothing");
    couch.stop();
    let said = desk.say(&["status"]);
    assert!(said.status == 1 && said.err.contains("connection refused"), "{said:?}");
}

#[test]
fn tail_shows_attempts_while_somebody_looks() {
    on_each(&[false, true], |hosted| {
        let (couch, receiver) = (couch(Flavour::V2, &["orders"]), receiver());
        let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "retry_schedule = 100ms");
        let desk = Desk::new(&ini);
        let said = desk.say(&["tail", "orders", "--for", "1s"]);
        assert!(said.status == 1 && said.err.contains("no daemon runs webhook `orders`"), "{said:?}");
        let _daemon = (!hosted).then(|| Daemon::start(&ini));
        let _host = hosted.then(|| Host::start(&ini.text()));
        couch.put("orders", "before", &json!({})).unwrap();
        assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == 1));
        wait_until_alive(&couch);
        receiver.answer(|one| match one.attempt {
            Some(1) => Reaction::StatusWith { status: 500, headers: Vec::new(), body: "on fire".to_owned() },
            _ => Reaction::Status(200),
        });
        let child = desk.command(&["tail", "orders", "--for", "6s", "--json"]).spawn().unwrap();
        // It looks on once the daemon has answered.
        assert!(couch.wait_until(WAIT_MAX, |seen| {
            let mut all = seen.winners(STATE_DB).into_iter();
            all.any(|(id, winner)| id.starts_with("request:") && winner.json.contains("\"attempts\":["))
        }));
        // The command notes where it begins; what happens from then on is shown.
        let n = couch.n_requests("GET /couch_hookd/request");
        assert!(couch.wait_until(WAIT_MAX, |seen| seen.n_requests("GET /couch_hookd/request") > n + 1));
        couch.put("orders", "after", &json!({})).unwrap();
        let output = child.wait_with_output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{out}");
        let seen: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let told: Vec<_> = seen.iter().map(|one| (&one["doc_id"], &one["status"], &one["answer"])).collect();
        let (after, fire) = (json!("after"), json!("on fire"));
        assert_eq!(told, [(&after, &json!(500), &fire), (&after, &json!(200), &json!(""))], "{out}");
        // It takes its request back when it ends.
        let open = couch.winners(STATE_DB).into_iter();
        assert_eq!(open.filter(|(id, one)| id.starts_with("request:") && !one.deleted).count(), 0);
    });
}
