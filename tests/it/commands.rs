//! Commands that operate a webhook: against a daemon by itself and under a host, and with none running.

use std::process::{Command, Stdio};

use couch_hookd::standin::couch::{Flavour, Seen, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::{Reaction, Receiver};
use couch_hookd::sys;
use serde_json::{Value, json};

use crate::host::{Host, WAIT_MAX};
use crate::world::{
    Daemon, Dir, FLAVOURS, Ini, STATE_DB, World, assert_no_secret, checkpoint, couch, has_all, letters,
    on_each, receiver, revs, write,
};

/// A configuration that commands read.
pub(crate) struct Desk {
    dir: Dir,
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Desk {
    pub(crate) fn new(ini: &Ini) -> Desk {
        let desk = Desk { dir: Dir::new() };
        std::fs::write(desk.dir.path("hookd.ini"), ini.text()).unwrap();
        desk
    }

    /// The command with these words and this configuration, ready to be started.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_couch-hookd"));
        command.args(words).arg("--config").arg(self.dir.path("hookd.ini"));
        for name in ["COUCHDB_URL", "COUCHDB_USER", "COUCHDB_PASSWORD"] {
            command.env_remove(name);
        }
        command.env("USER", "anna").env_remove("SUDO_USER");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn say(&self, words: &[&str]) -> Said {
        let output = self.command(words).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let said = Said {
            status: output.status.code().unwrap_or(-1),
            out: text(output.stdout),
            err: text(output.stderr),
        };
        assert_no_secret(&words.join(" "), &format!("{}{}", said.out, said.err));
        said
    }

    /// Runs one that must work; what it printed.
    #[track_caller]
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let said = self.say(words);
        assert_eq!(said.status, 0, "{words:?}: {said:?}");
        said.out
    }
}

/// Something that runs the webhooks, or nothing.
enum Runner {
    Alone(Daemon),
    Hosted(Host),
    Nobody,
}

impl Runner {
    /// Starts it, and waits until commands see that it is alive.
    fn start(&mut self, couch: &StandIn, ini: &Ini) {
        match self {
            Runner::Alone(daemon) => daemon.start_again(),
            Runner::Hosted(host) => host.start_again(),
            Runner::Nobody => *self = Runner::Alone(Daemon::start(ini)),
        }
        assert!(couch.wait_until(WAIT_MAX, |seen| alive(&seen.winners(STATE_DB)) == 1), "not alive");
    }
}

type Winners = std::collections::BTreeMap<String, couch_hookd::standin::couch::Winner>;

/// Daemons that say to run `orders`.
fn alive(winners: &Winners) -> usize {
    let live = |(id, winner): &(&String, &couch_hookd::standin::couch::Winner)| {
        id.starts_with("daemon:") && !winner.deleted && winner.json.contains("\"orders\":{")
    };
    winners.iter().filter(live).count()
}

pub(crate) fn wait_until_alive(couch: &StandIn) {
    assert!(couch.wait_until(WAIT_MAX, |seen| alive(&seen.winners(STATE_DB)) == 1), "no daemon is alive");
}

/// As [`wait_until_alive`], for another webhook.
pub(crate) fn wait_until_alive_of(couch: &StandIn, webhook: &str) {
    let says = format!("\"{webhook}\":{{");
    let live = |seen: &Seen<'_>| {
        seen.winners(STATE_DB)
            .iter()
            .any(|(id, winner)| id.starts_with("daemon:") && !winner.deleted && winner.json.contains(&says))
    };
    assert!(couch.wait_until(WAIT_MAX, live), "no daemon is alive for `{webhook}`");
}

fn record(couch: &StandIn) -> Value {
    serde_json::from_str(&couch.winner(STATE_DB, "webhook:orders").unwrap().json).unwrap()
}

fn request(couch: &StandIn, id: &str) -> Value {
    serde_json::from_str(&couch.winner(STATE_DB, id).unwrap().json).unwrap()
}

/// Writes a request as a command does.
pub(crate) fn ask(couch: &StandIn, id: &str, command: &str, arguments: &Value) {
    let request = json!({"webhook": "orders", "command": command, "arguments": arguments,
        "made_at": "2026-11-21T20:46:41Z", "made_by": "anna", "state": "open"});
    couch.put(STATE_DB, id, &request).unwrap();
}

fn wait_accepted(receiver: &Receiver, n: usize) {
    assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= n), "not {n} accepted");
}

#[test]
fn pause_keeps_the_place_and_resume_goes_on_whoever_runs() {
    on_each(
        &[("alone", Flavour::V1), ("hosted", Flavour::V2), ("nobody", Flavour::V3)],
        |(mode, flavour)| {
            let (couch, receiver) = (couch(flavour, &["orders"]), receiver());
            let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
            let desk = Desk::new(&ini);
            let mut runner = match mode {
                "hosted" => Runner::Hosted(Host::start(&ini.text())),
                _ => Runner::Alone(Daemon::start(&ini)),
            };
            write(&couch, "orders", 5);
            wait_accepted(&receiver, 5);
            if mode == "nobody" {
                if let Runner::Alone(mut daemon) = std::mem::replace(&mut runner, Runner::Nobody) {
                    daemon.terminate();
                }
                assert_eq!(
                    alive(&couch.winners(STATE_DB)),
                    0,
                    "a daemon that ended cleanly takes back that it is alive"
                );
            } else {
                wait_until_alive(&couch);
            }
            let said = desk.say(&["pause", "orders", "--reason", "moving house"]);
            assert_eq!(said.status, 0, "{mode}: {said:?}");
            assert!(said.out.contains("is paused"), "{mode}: {said:?}");
            assert_eq!(said.err.contains("done here"), mode == "nobody", "{mode}: {said:?}");
            let paused = record(&couch);
            assert_eq!(paused["paused_reason"], "moving house", "{mode}: {paused}");
            assert_eq!(paused["paused_by"], "anna");
            let before = receiver.look(|record| record.deliveries().len());
            couch.put("orders", "late", &json!({})).unwrap();
            let mut n_again = 0;
            if mode == "nobody" {
                let said = desk.say(&["seek", "orders", "--to", "0", "--yes"]);
                assert!(said.status == 0 && said.err.contains("done here"), "{said:?}");
                n_again = 5;
                runner.start(&couch, &ini);
            }
            let said = desk.say(&["resume", "orders", "--json"]);
            assert_eq!(said.status, 0, "{mode}: {said:?}");
            let answer: Value = serde_json::from_str(&said.out).unwrap();
            assert_eq!(answer["resumed"], true, "{mode}: {answer}");
            wait_accepted(&receiver, before + 1 + n_again);
            receiver.look(|record| {
                assert_eq!(record.deliveries().len(), before + 1 + n_again, "{mode}: nothing is told twice");
                assert!(record.accepted_rev("orders", "late").is_some());
            });
            assert_eq!(record(&couch)["paused_since"], Value::Null);
            let said = desk.say(&["seek", "orders", "--to", "0", "--yes"]);
            assert!(said.status == 0 && !said.err.contains("done here"), "{mode}: {said:?}");
            wait_accepted(&receiver, before + 1 + n_again + 6);
            receiver.look(|record| assert_eq!(record.violations(), [], "{mode}"));
        },
    );
}

#[test]
fn resume_ends_what_an_endpoint_that_is_gone_began() {
    let world = World::start(Flavour::V2, "");
    world.receiver.answer(|_| Reaction::Status(410));
    write(&world.couch, "orders", 3);
    world.daemon.wait_for_log("is gone; paused for good");
    world.wait_couch("gone_since in the record", |seen| {
        seen.winner(STATE_DB, "webhook:orders").is_some_and(|winner| winner.json.contains("gone_since"))
    });
    wait_until_alive(&world.couch);
    let desk = Desk::new(&Ini::new(&world.couch.url()).webhook("orders", &world.receiver.url(), ""));
    let said = desk.say(&["test", "orders"]);
    assert!(said.status == 1 && record(&world.couch)["gone_since"].is_string(), "{said:?}");
    world.receiver.answer(|_| Reaction::Status(200));
    desk.done(&["resume", "orders"]);
    world.wait("all three", |record| {
        (0..3).all(|i| record.accepted_rev("orders", &format!("d{i}")).is_some())
    });
}

#[test]
fn a_test_that_is_taken_ends_a_pause_that_nobody_asked_for() {
    let world = World::start(Flavour::V3, "");
    world.receiver.answer(|_| Reaction::Status(410));
    write(&world.couch, "orders", 3);
    world.wait_couch("gone_since in the record", |seen| {
        seen.winner(STATE_DB, "webhook:orders").is_some_and(|winner| winner.json.contains("gone_since"))
    });
    wait_until_alive(&world.couch);
    world.receiver.answer(|_| Reaction::Status(200));
    let desk = Desk::new(&Ini::new(&world.couch.url()).webhook("orders", &world.receiver.url(), ""));
    let said = desk.done(&["test", "orders"]);
    assert!(said.contains("its pause is over"), "{said}");
    world.wait("all three", |record| {
        (0..3).all(|i| record.accepted_rev("orders", &format!("d{i}")).is_some())
    });
    desk.done(&["pause", "orders"]);
    let said = desk.done(&["test", "orders"]);
    assert!(!said.contains("its pause is over"), "one by hand has a reason: {said}");
    assert!(record(&world.couch)["paused_since"].is_string());
}

#[test]
fn resume_ends_what_too_many_dead_letters_began_and_so_many_more_may_come() {
    let (couch, receiver) = (couch(Flavour::V3, &["orders"]), receiver());
    receiver
        .answer(|delivery| Reaction::Status(if delivery.doc_id().starts_with("bad") { 422 } else { 200 }));
    let lines = "retry_schedule = 100ms";
    let ini = Ini::new(&couch.url()).hookd("dead_letters_max = 2").webhook("orders", &receiver.url(), lines);
    let daemon = Daemon::start(&ini);
    let bad = |n: usize| {
        couch.put("orders", &format!("good{n}"), &json!({})).unwrap();
        couch.put("orders", &format!("bad{n}"), &json!({})).unwrap();
    };
    (0..3).for_each(bad);
    daemon.wait_for_log("more than 2 dead letters; paused");
    wait_until_alive(&couch);
    let desk = Desk::new(&ini);
    assert!(couch.wait_until(WAIT_MAX, |seen| {
        seen.winner(STATE_DB, "webhook:orders").is_some_and(|winner| winner.json.contains("paused_since"))
    }));
    let said = desk.done(&["resume", "orders"]);
    assert!(said.contains("3 dead letters of it wait"), "{said}");
    couch.put("orders", "good3", &json!({})).unwrap();
    assert!(receiver.wait_until(WAIT_MAX, |record| record.accepted_rev("orders", "good3").is_some()));
    (4..7).for_each(bad);
    daemon.wait_for_log("more than 5 dead letters; paused");
    assert_eq!(letters(&couch).len(), 6);
}

#[test]
fn what_the_configuration_pauses_is_not_resumed() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "paused = true");
    let desk = Desk::new(&ini);
    let said = desk.say(&["resume", "orders"]);
    assert_eq!(said.status, 1, "{said:?}");
    assert!(said.err.contains("take `paused = true` out of its section"), "{said:?}");
    let said = desk.say(&["pause", "ordesr"]);
    assert_eq!(said.status, 2, "{said:?}");
    assert!(said.err.contains("did you mean `orders`?"), "{said:?}");
}

#[test]
fn seek_to_the_beginning_tells_everything_again_with_the_ids_it_had() {
    on_each(&FLAVOURS, |flavour| {
        let world = World::start(flavour, "");
        let ini = Ini::new(&world.couch.url()).webhook("orders", &world.receiver.url(), "");
        let desk = Desk::new(&ini);
        write(&world.couch, "orders", 40);
        world.wait_for_all("orders");
        wait_until_alive(&world.couch);
        let dry = desk.done(&["seek", "orders", "--to", "0", "--dry-run"]);
        assert!(dry.contains("orders    0                40"), "{dry}");
        let asked = desk.say(&["seek", "orders", "--to", "0"]);
        assert_eq!(asked.status, 2, "nobody can be asked: {asked:?}");
        // Deliveries flow meanwhile.
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let ticks = crossbeam_channel::tick(std::time::Duration::from_millis(2));
                for n in 0.. {
                    if over.load(std::sync::atomic::Ordering::Relaxed) {
                        return;
                    }
                    world.couch.put("orders", &format!("live{}", n % 20), &json!({"n": n})).unwrap();
                    let _ = ticks.recv();
                }
            });
            desk.done(&["seek", "orders", "--to", "0", "--yes"]);
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let told_twice = |record: &couch_hookd::standin::record::Record| {
            (0..40).all(|i| {
                let doc = format!("d{i}");
                let ids: Vec<&str> = record
                    .deliveries()
                    .iter()
                    .filter(|one| one.accepted() && one.doc_id() == doc)
                    .map(|one| one.webhook_id.as_str())
                    .collect();
                ids.len() >= 2 && ids.iter().all(|id| *id == ids[0])
            })
        };
        world.wait("everything told again with its first id", told_twice);
        world.wait_for_all("orders");
        // The place that is stored now is behind the seek, and a start goes on from it.
        let sought = record(&world.couch)["seeks"]["orders"]["request"].as_str().unwrap().to_owned();
        world.wait_couch("a checkpoint behind the seek", |seen| {
            seen.local("orders", "couch-hookd.orders").is_some_and(|json| json.contains(&sought))
        });
    });
}

#[test]
fn seek_to_now_leaves_out_what_was_not_told() {
    let (couch, receiver) = (couch(Flavour::V3, &["orders"]), receiver());
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let desk = Desk::new(&ini);
    desk.done(&["pause", "orders"]);
    let mut daemon = Daemon::start(&ini);
    wait_until_alive(&couch);
    write(&couch, "orders", 30);
    let json: Value = serde_json::from_str(&desk.done(&["seek", "orders", "--to", "now", "--json"])).unwrap();
    assert_eq!(json["done"], true, "{json}");
    assert_eq!(json["databases"][0]["changes"], 0, "{json}");
    couch.put("orders", "new", &json!({})).unwrap();
    desk.done(&["resume", "orders"]);
    wait_accepted(&receiver, 1);
    daemon.terminate();
    receiver.look(|record| {
        let docs: Vec<&str> = record.deliveries().iter().map(|one| one.doc_id()).collect();
        assert_eq!(docs, ["new"]);
    });
    // And a place that an event told: what came after it is told again.
    let seq = {
        couch.put("orders", "newer", &json!({})).unwrap();
        daemon.start_again();
        wait_accepted(&receiver, 2);
        checkpoint(&couch, "orders", "orders").unwrap()["through_seq"].clone()
    };
    let seq = seq.as_str().map_or_else(|| seq.to_string(), str::to_owned);
    let said = desk.say(&["seek", "orders", "--to", &seq, "--dry-run"]);
    assert_eq!(said.status, 0, "{said:?}");
    let said = desk.say(&["seek", "orders", "--to", "nonsense", "--dry-run"]);
    assert!(said.status == 1 && said.err.contains("does not know the place"), "{said:?}");
    let said = desk.say(&["seek", "orders", "--to", "0", "--db", "others", "--dry-run"]);
    assert!(said.status == 1 && said.err.contains("does not watch `others`"), "{said:?}");
}

/// The place of the old database under the mark of the new one would skip what is written there.
#[test]
fn a_seek_while_the_database_is_created_again_skips_nothing() {
    let mut world = World::start(Flavour::V1, "");
    write(&world.couch, "orders", 5);
    world.wait_for_all("orders");
    world.daemon.terminate();
    // The first one is the command's look at how it is, the second one its seek.
    let marks = "GET /orders/_local/couch-hookd?";
    let is_mark =
        |seen: &Seen<'_>| seen.requests().filter(|one| one.path.ends_with("/_local/couch-hookd")).count();
    let n_marks = world.couch.look(is_mark);
    let late = FaultKind::Late(std::time::Duration::from_secs(2));
    world.couch.quirks(|quirks| {
        quirks.faults = vec![Fault { request: marks.to_owned(), times: 2, kind: late }];
    });
    let ini = Ini::new(&world.couch.url()).webhook("orders", &world.receiver.url(), "");
    let desk = Desk::new(&ini);
    let seek = desk.command(&["seek", "orders", "--to", "now", "--yes"]).spawn().unwrap();
    world.wait_couch("the mark read", |seen| is_mark(seen) >= n_marks + 2);
    world.couch.delete_db("orders");
    world.couch.create_db("orders");
    let output = seek.wait_with_output().unwrap();
    // What comes after a seek that was done, or was not.
    for i in 0..8 {
        world.couch.put("orders", &format!("new{i}"), &json!({})).unwrap();
    }
    world.daemon.start_again();
    let winners = revs(&world.couch, "orders");
    world
        .wait(&format!("all of the new database ({output:?})"), |record| has_all(record, "orders", &winners));
}

/// A command that finds no daemon alive does it itself; one that starts at that moment has read the record already.
#[test]
fn what_was_done_by_others_while_a_daemon_starts_counts_for_it() {
    let mut world = World::start(Flavour::V3, "");
    write(&world.couch, "orders", 3);
    world.wait_for_all("orders");
    world.daemon.kill();
    let lists = |seen: &Seen<'_>| {
        let of_requests = |(_, value): &(String, String)| value == "\"request:\"";
        seen.requests().filter(|one| one.query.iter().any(of_requests)).count()
    };
    let n_lists = world.couch.look(lists);
    let late = FaultKind::Late(std::time::Duration::from_secs(2));
    world.couch.quirks(|quirks| {
        quirks.faults = vec![Fault { request: "startkey=\"request:".to_owned(), times: 2, kind: late }];
    });
    world.daemon.start_again();
    // Both the webhook, behind its record, and the desk.
    world.wait_couch("both lists", |seen| lists(seen) >= n_lists + 2);
    let now = sys::wall().to_string();
    let mut paused = record(&world.couch);
    paused["paused_since"] = json!(now);
    paused["paused_reason"] = json!("by hand");
    paused["requests_done"] = json!(["request:00000000000000000001-a"]);
    world.couch.put(STATE_DB, "webhook:orders", &paused).unwrap();
    let done = json!({"webhook": "orders", "command": "pause", "made_at": now, "made_by": "anna",
        "state": "done", "done_at": now});
    world.couch.put(STATE_DB, "request:00000000000000000001-a", &done).unwrap();
    world.daemon.wait_for_log("webhook `orders` is paused since");
}

#[test]
fn a_request_is_obeyed_once_though_killed_before_the_answer() {
    on_each(&FLAVOURS, |flavour| {
        let mut world = World::start(flavour, "");
        write(&world.couch, "orders", 10);
        world.wait_for_all("orders");
        wait_until_alive(&world.couch);
        // Requests far in the past and in the future: the order is that of their ids.
        let (seek, pause) = ("request:00000000000000000001-a", "request:00000000000000000002-b");
        for (id, command, arguments) in
            [(seek, "seek", json!({"to": 0})), (pause, "pause", json!({"reason": "test"}))]
        {
            let n_answers = world.couch.n_requests("PUT /couch_hookd/request%3A");
            let fault =
                Fault { request: "PUT /couch_hookd/request%3A".to_owned(), times: 1, kind: FaultKind::Hang };
            world.couch.quirks(|quirks| quirks.faults = vec![fault]);
            ask(&world.couch, id, command, &arguments);
            world.wait_couch("an answer under way", |seen| {
                seen.n_requests("PUT /couch_hookd/request%3A") > n_answers
            });
            assert!(record(&world.couch)["requests_done"].as_array().unwrap().contains(&json!(id)));
            assert_eq!(request(&world.couch, id)["state"], "open");
            world.daemon.kill();
            world.couch.quirks(|quirks| quirks.faults.clear());
            let before = record(&world.couch);
            world.daemon.start_again();
            world.wait_couch("an answer", |seen| {
                seen.winner(STATE_DB, id).is_some_and(|winner| winner.json.contains("\"state\":\"done\""))
            });
            let after = record(&world.couch);
            assert_eq!(after["requests_done"], before["requests_done"], "{flavour:?}");
            assert_eq!(
                (&after["seeks"], &after["paused_since"]),
                (&before["seeks"], &before["paused_since"])
            );
            world.wait("everything told again", |record| record.n_accepted() >= 20);
        }
        // Everything was told twice, by one seek, and not three times.
        let winners = revs(&world.couch, "orders");
        assert!(world.receiver.look(|record| has_all(record, "orders", &winners)));
        world.receiver.look(|record| {
            let most = (0..10).map(|i| {
                let doc = format!("d{i}");
                record.deliveries().iter().filter(|one| one.accepted() && one.doc_id() == doc).count()
            });
            // Once more at the most for the kill itself.
            assert!(most.clone().all(|n| (2..=3).contains(&n)), "{:?}", most.collect::<Vec<_>>());
        });
    });
}
