//! `replications`: what the commands say of the recorded replications on every version, and of many.

use std::io::{BufRead, BufReader};

use couch_hookd::standin::couch::{Flavour, Options, StandIn};
use couch_hookd::standin::replicator::{Happened, Progress, Replication, ReplicationState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::commands::{Desk, Said};
use crate::host::WAIT_MAX;
use crate::http_client::ask;
use crate::world::{CANARY, FLAVOURS, Ini, couch, long};

use ReplicationState::{Completed, Crashing, Error, Failed, Pending, Running};

const DB: &str = "_replicator";
const REFUSED: &str = "{replication_auth_error,\n    {session_request_failed,\"http://127.0.0.1:1/_session\",\"c4n4ry-user\",\n        {conn_failed,{error,econnrefused}}}}";

fn desk(couch: &StandIn) -> Desk {
    Desk::new(&Ini::new(&couch.url()))
}

/// A replication between two databases of this server, with a login in every place.
fn put(couch: &StandIn, id: &str, source: &str, target: &str, more: &Value) {
    let host = couch.url().replacen("://", &format!("://{CANARY}-user:{CANARY}-password@"), 1);
    let target = if target.contains("://") { target.to_owned() } else { format!("{host}/{target}") };
    let mut body = json!({"source": {"url": format!("{host}/{source}?token={CANARY}"),
        "headers": {"authorization": format!("Basic {CANARY}")}}, "target": target, "owner": "anna"});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    couch.put_replication(DB, id, &body).unwrap();
}

fn progress(couch: &StandIn, changes_pending: Option<u64>) -> Progress {
    let seq = couch.update_seq("fixture").to_string();
    Progress {
        docs_read: 8,
        docs_written: 7,
        doc_write_failures: 1,
        changes_pending,
        source_seq: seq.clone(),
        checkpointed_source_seq: seq,
        ..Progress::default()
    }
}

/// The replications of the recordings, in the states they had.
fn five(flavour: Flavour) -> StandIn {
    let couch = couch(flavour, &["fixture", "fixture_copy"]);
    for i in 0..9 {
        couch.put("fixture", &format!("doc{i}"), &json!({})).unwrap();
    }
    let closed = format!("http://{CANARY}:{CANARY}@127.0.0.1:1/x");
    put(&couch, "rep_done", "fixture", "fixture_copy", &json!({}));
    put(&couch, "rep_cont", "fixture", "fixture_copy", &json!({"continuous": true}));
    put(&couch, "rep_no_source", "nothere", "fixture_copy", &json!({}));
    put(&couch, "rep_closed_port", "fixture", &closed, &json!({"continuous": true}));
    put(&couch, "rep_no_filter", "fixture", "fixture_copy", &json!({"filter": "nope/nope"}));
    let say = |id: &str, replication| couch.replicate(DB, id, replication).unwrap();
    say("rep_done", Replication::with_progress(Completed, progress(&couch, None)));
    say("rep_cont", Replication::with_progress(Running, progress(&couch, Some(0))));
    let no_source = format!("db_not_found: could not open http://{CANARY}:{CANARY}@127.0.0.1:15984/nothere/");
    say("rep_no_source", Replication::failing(Crashing, &no_source, 2));
    say("rep_closed_port", Replication::failing(Crashing, REFUSED, 2));
    let no_filter = "Couldn't open document `_design/nope` from source database `http://127.0.0.1:15984/fixture/`: {error,<<\"not_found\">>}";
    say("rep_no_filter", Replication::failing(Error, no_filter, 1));
    couch
}

fn read(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|_| panic!("{said:?}"))
}

/// Ids and states of an answer in the scheduler's shape.
fn states(answer: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    answer["docs"].as_array().unwrap().iter().map(|row| (text(&row["doc_id"]), text(&row["state"]))).collect()
}

#[test]
fn list_shows_the_same_on_every_version() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        let desk = desk(&couch);
        let table = desk.done(&["replications", "list"]);
        assert!(table.starts_with("DOCUMENT         STATE "), "{table}");
        assert!(table.contains("5 replications in `_replicator`: 1 running, "), "{table}");
        assert!(!table.contains('\u{1b}') && table.contains("  fixture  127.0.0.1:1/x\n"), "{table}");
        assert!(table.contains("  nothere  fixture_copy\n"), "{table}");
        let answer = read(&desk.say(&["replications", "list", "--json"]));
        assert_eq!((&answer["total_rows"], &answer["offset"]), (&json!(5), &json!(0)), "{answer}");
        let crashing = if flavour == Flavour::V1 { "error" } else { "crashing" };
        let expected = [
            ("rep_closed_port", crashing),
            ("rep_cont", "running"),
            ("rep_done", "completed"),
            ("rep_no_filter", "error"),
            ("rep_no_source", crashing),
        ];
        assert_eq!(states(&answer), expected.map(|(id, state)| (id.to_owned(), state.to_owned())));
        let row = &answer["docs"][3];
        assert_eq!(row["source"], format!("{}/fixture", couch.url()), "from its document: {row}");
        assert!(row["last_updated"].is_string() && row["info"].to_string().contains("_design/nope"), "{row}");
        let done = &answer["docs"][2]["info"];
        assert_eq!((&done["docs_read"], &done["doc_write_failures"]), (&json!(8), &json!(1)), "{done}");
        // Some of them.
        let answer = read(&desk.say(&["replications", "list", "--json", "--state", "completed,running"]));
        assert_eq!(states(&answer).len(), 2, "{answer}");
        let answer = read(&desk.say(&["replications", "list", "--json", "--skip", "3", "--limit", "1"]));
        assert_eq!((states(&answer)[0].0.as_str(), &answer["offset"]), ("rep_no_filter", &json!(3)));
        let some = desk.done(&["replications", "list", "--limit", "2"]);
        assert!(some.contains("2 replications") && some.contains("; 3 more (--skip 2)"), "{some}");
        let none = desk.done(&["replications", "list", "--state", "failed"]);
        assert_eq!(none, "no replications in `_replicator` in these states\n");
    }
}

#[test]
fn rows_are_those_of_the_scheduler_without_secrets() {
    for flavour in [Flavour::V2, Flavour::V3] {
        let couch = five(flavour);
        let theirs = ask(&couch.url(), "GET", "/_scheduler/docs", "").json();
        let ours = read(&desk(&couch).say(&["replications", "list", "--json"]));
        for (theirs, ours) in theirs["docs"].as_array().unwrap().iter().zip(ours["docs"].as_array().unwrap())
        {
            for (name, value) in theirs.as_object().unwrap() {
                let hidden = ["source", "target", "info"].contains(&name.as_str());
                assert!(
                    ours[name] == *value || hidden && ours[name].is_null() == value.is_null(),
                    "{name}: {ours}"
                );
            }
        }
    }
}

/// Replications `r0000` to `r1299`; every 100th has failed.
fn many(flavour: Flavour) -> StandIn {
    let couch = couch(flavour, &[]);
    for i in 0..1_300 {
        let id = format!("r{i:04}");
        put(&couch, &id, "a", "b", &json!({}));
        let state =
            if i % 100 == 99 { Replication::failing(Failed, "kaboom", 1) } else { Replication::new(Running) };
        couch.replicate(DB, &id, state).unwrap();
    }
    couch
}

#[test]
fn long_lists_are_read_to_their_end() {
    // 2.x and 3.x have the same scheduler.
    let flavours: &[Flavour] = if long() { &FLAVOURS } else { &[Flavour::V1, Flavour::V3] };
    for flavour in flavours.iter().copied() {
        let couch = many(flavour);
        let desk = desk(&couch);
        let ids = |words: &[&str]| -> Vec<String> {
            let answer = read(&desk.say(&[&["replications", "list", "--json"], words].concat()));
            states(&answer).into_iter().map(|(id, _)| id).collect()
        };
        let expected = |range: std::ops::Range<usize>| range.map(|i| format!("r{i:04}")).collect::<Vec<_>>();
        assert_eq!(ids(&[]), expected(0..1_300));
        assert_eq!(ids(&["--skip", "700", "--limit", "550"]), expected(700..1_250));
        let word = if flavour == Flavour::V1 { "error" } else { "failed" };
        let failed: Vec<String> = (0..13).map(|i| format!("r{:04}", i * 100 + 99)).collect();
        assert_eq!(ids(&["--state", word]), failed);
        assert_eq!(ids(&["--state", word, "--skip", "11"]), failed[11..]);
        let errors = read(&desk.say(&["replications", "errors", "--json"]));
        assert_eq!(states(&errors).into_iter().map(|(id, _)| id).collect::<Vec<_>>(), failed);
        let too_long = |limit: Option<&str>| limit.is_some_and(|limit| limit.parse::<u64>().unwrap() > 500);
        couch.look(|seen| {
            for one in seen.requests().filter(|one| one.path.contains("docs")) {
                let limit =
                    one.query.iter().find(|(name, _)| name == "limit").map(|(_, limit)| limit.as_str());
                assert!(!too_long(limit), "{one:?}");
            }
        });
    }
}

/// A checkpoint as it was recorded, at another place.
fn checkpoint(couch: &StandIn, id: &str, source_last_seq: &Value) {
    let ended = couch_hookd::sys::wall() - std::time::Duration::from_secs(90);
    let file = format!("{}/tests/data/3.5.0/replication_checkpoint.json", env!("CARGO_MANIFEST_DIR"));
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut doc: Value = serde_json::from_str(recorded["body"].as_str().unwrap()).unwrap();
    doc.as_object_mut().unwrap().remove("_rev");
    doc["_id"] = format!("_local/{id}").into();
    doc["source_last_seq"] = source_last_seq.clone();
    doc["history"][0]["end_time"] = ended.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string().into();
    let reply = ask(&couch.url(), "PUT", &format!("/fixture/_local/{id}"), &doc.to_string());
    assert_eq!(reply.status, 201, "{reply:?}");
}

#[test]
fn show_tells_everything_of_one() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        let desk = desk(&couch);
        let said = desk.done(&["replications", "show", "rep_cont"]);
        for part in [
            "rep_cont in `_replicator`, revision ",
            "running",
            "`fixture` of this CouchDB",
            "continuous, owner",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(said.contains("docs_read 8") && said.contains("checkpoint    none yet"), "{said}");
        assert_eq!(said.contains("none: CouchDB keeps one from 2.1 on"), flavour == Flavour::V1, "{said}");
        // With a checkpoint, two changes ago.
        let row = read(&desk.say(&["replications", "show", "rep_cont", "--json"]));
        let id = row["id"].as_str().unwrap().trim_end_matches("+continuous").to_owned();
        let place = ask(&couch.url(), "GET", "/fixture/_changes", "").json()["last_seq"].clone();
        checkpoint(&couch, &id, &place);
        let row = read(&desk.say(&["replications", "show", "rep_cont", "--json"]));
        let age = row["lag"]["age_seconds"].as_u64().unwrap();
        assert!((90..90 + WAIT_MAX.as_secs()).contains(&age), "{row}");
        let session = "dc8b2c06f7816cbb86674d4c480612e3";
        assert_eq!(
            (&row["checkpoint"]["session_id"], &row["checkpoint"]["docs_written"]),
            (&json!(session), &json!(8))
        );
        assert_eq!(
            (&row["lag"]["changes_pending"], &row["lag"]["counted_by"]),
            (&json!(0), &json!("replicator"))
        );
        let said = desk.done(&["replications", "show", "rep_cont"]);
        assert!(
            said.contains(&format!("s old, session {session}; ")) && said.contains("pending       0 changes"),
            "{said}"
        );
        // One in trouble.
        let said = desk.done(&["replications", "show", "rep_closed_port"]);
        for part in [
            "connection refused",
            "class         unreachable",
            "hint  ",
            "raw           {replication_auth_error",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let none = desk.say(&["replications", "show", "rep_none"]);
        assert!(none.status == 1 && none.err.contains("no document `rep_none` in `_replicator`"), "{none:?}");
    }
}

#[test]
fn the_last_ten_things_that_happened_are_shown() {
    let couch = five(Flavour::V3);
    let at = |n: i64| jiff::Timestamp::from_second(1_795_296_610 + n).unwrap();
    let happened = |n: i64| match n % 2 {
        0 => Happened { at: at(n), kind: "started", reason: None },
        _ => Happened { at: at(n), kind: "crashed", reason: Some(REFUSED.to_owned()) },
    };
    let history = (0..14).rev().map(happened).collect();
    let crashing = Replication { history, ..Replication::failing(Crashing, REFUSED, 7) };
    couch.replicate(DB, "rep_closed_port", crashing).unwrap();
    let said = desk(&couch).done(&["replications", "show", "rep_closed_port"]);
    let history: Vec<&str> = said.lines().skip_while(|line| !line.starts_with("history ")).collect();
    assert_eq!(history.len(), 11, "{said}");
    assert!(
        history[0].ends_with("crashed: login at http://127.0.0.1:1/_session failed: connection refused"),
        "{said}"
    );
    assert!(history[0].contains(&at(13).to_string()) && history[9].contains(&at(4).to_string()), "{said}");
    assert!(history[10].ends_with("and 4 before (--json has them)"), "{said}");
    let row = read(&desk(&couch).say(&["replications", "show", "rep_closed_port", "--json"]));
    assert_eq!(row["history"].as_array().unwrap().len(), 14);
}

#[test]
fn errors_say_why_and_what_to_do() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        // It runs again, and failed just before.
        if flavour != Flavour::V1 {
            put(&couch, "rep_again", "fixture", "another", &json!({"continuous": true}));
            couch
                .replicate(
                    DB,
                    "rep_again",
                    Replication::failing(Crashing, "{error,{conn_failed,{error,econnrefused}}}", 1),
                )
                .unwrap();
            let again = Replication { error_count: 1, ..Replication::new(Running) };
            couch.replicate(DB, "rep_again", again).unwrap();
        }
        let n = if flavour == Flavour::V1 { 3 } else { 4 };
        let said = desk(&couch).say(&["replications", "errors"]);
        assert_eq!(said.status, 1, "{said:?}");
        for part in [
            "could not open http://127.0.0.1:15984/nothere/",
            "\nfilter: put the filter's design document into the source",
            "\nunreachable: ",
            &format!("\n{n} of {} replications in `_replicator` in trouble", n + 2),
        ] {
            assert!(said.out.contains(part), "{part}: {}", said.out);
        }
        let answer = read(&desk(&couch).say(&["replications", "errors", "--json"]));
        let class = |row: &Value| row["error_class"].as_str().unwrap().to_owned();
        let classes: Vec<String> = answer["docs"].as_array().unwrap().iter().map(class).collect();
        let again = if flavour == Flavour::V1 { &[][..] } else { &["unreachable"] };
        assert_eq!(classes, [again, &["unreachable", "filter", "not_found"]].concat());
        for id in ["rep_closed_port", "rep_no_filter", "rep_no_source", "rep_again"] {
            let _ = couch.delete(DB, id);
        }
        assert_eq!(
            desk(&couch).done(&["replications", "errors"]),
            "no errors: 2 replications in `_replicator`\n"
        );
    }
}

#[test]
fn lag_is_counted_at_the_source_where_the_replicator_does_not() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        let desk = desk(&couch);
        let place = ask(&couch.url(), "GET", "/fixture/_changes", "").json()["last_seq"].clone();
        // A job that waits counts nothing; before 2.1 there is only the task that is missing.
        let row = read(&desk.say(&["replications", "show", "rep_cont", "--json"]));
        let id = row["id"].as_str().unwrap().trim_end_matches("+continuous").to_owned();
        match flavour {
            Flavour::V1 => {
                couch.replicate(DB, "rep_cont", Replication::failing(Crashing, "timeout", 1)).unwrap()
            }
            _ => couch.replicate(DB, "rep_cont", Replication::new(Pending)).unwrap(),
        }
        checkpoint(&couch, &id, &place);
        for i in 0..4 {
            couch.put("fixture", &format!("new{i}"), &json!({})).unwrap();
        }
        let answer = read(&desk.say(&["replications", "lag", "rep_cont", "--json"]));
        let lag = &answer["docs"][0]["lag"];
        assert_eq!((&lag["changes_pending"], &lag["counted_by"]), (&json!(4), &json!("source")), "{answer}");
        let all = desk.done(&["replications", "lag"]);
        assert!(all.contains("  4*  ") && !all.contains("rep_done"), "{all}");
        assert!(
            all.contains("4 replications in `_replicator`: 4 changes pending, without those of 3"),
            "{all}"
        );
        let none = desk.say(&["replications", "lag", "rep_none"]);
        assert!(none.status == 1 && none.err.contains("no document `rep_none`"), "{none:?}");
    }
}

#[test]
fn jobs_are_listed_those_without_a_document_too() {
    let couch = five(Flavour::V3);
    let url = format!("http://{CANARY}:{CANARY}@h/a");
    couch.replicate_transient("77+continuous", &url, "http://h/b", Replication::new(Running));
    let said = desk(&couch).done(&["replications", "jobs"]);
    assert!(said.contains("(_replicate)") && said.contains("rep_closed_port"), "{said}");
    assert!(said.contains("4 jobs: 2 running, 2 crashing\n"), "{said}");
    let answer = read(&desk(&couch).say(&["replications", "jobs", "--json"]));
    let theirs = ask(&couch.url(), "GET", "/_scheduler/jobs", "").json();
    assert_eq!(answer["total_rows"], theirs["total_rows"]);
    let transient = answer["jobs"].as_array().unwrap().iter().find(|job| job["doc_id"].is_null()).unwrap();
    assert_eq!((&transient["source"], &transient["id"]), (&json!("http://h/a/"), &json!("77+continuous")));
    let said = desk(&five(Flavour::V1)).done(&["replications", "jobs"]);
    assert_eq!(said, "CouchDB 1.7.1 has no jobs: they came with 2.1; see `replications list`\n");
}

#[test]
fn wait_ends_with_the_replication() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        let desk = desk(&couch);
        put(&couch, "one", "fixture", "fixture_copy", &json!({"n": 1}));
        couch.replicate(DB, "one", Replication::new(Running)).unwrap();
        let waiting = desk.command(&["replications", "wait", "one"]).spawn().unwrap();
        let path = if flavour == Flavour::V1 {
            "GET /_active_tasks"
        } else {
            "GET /_scheduler/docs/_replicator/one"
        };
        assert!(couch.wait_until(WAIT_MAX, |seen| seen.n_requests(path) >= 2), "it looks again");
        couch.replicate(DB, "one", Replication::with_progress(Completed, progress(&couch, None))).unwrap();
        let output = waiting.wait_with_output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{out}");
        assert!(
            out.starts_with("one: running\n")
                && out.contains("one: completed: ")
                && out.contains("docs_read 8"),
            "{out}"
        );
        // Failed; given up waiting; gone.
        couch
            .replicate(DB, "one", Replication::failing(Failed, "db_not_found: could not open http://h/x/", 1))
            .unwrap();
        let said = desk.say(&["replications", "wait", "one"]);
        assert!(said.status == 1 && said.out.contains("could not open http://h/x/"), "{said:?}");
        let row = read(&desk.say(&["replications", "wait", "one", "--json"]));
        assert_eq!(row["error_class"], "not_found", "{row}");
        let said = desk.say(&["replications", "wait", "rep_cont", "--timeout", "300ms"]);
        assert!(said.status == 1 && said.err.contains("has not come to its end within 300ms"), "{said:?}");
        assert!(said.err.contains("`rep_cont` is continuous: it never completes"), "{said:?}");
        couch.delete(DB, "one").unwrap();
        let said = desk.say(&["replications", "wait", "one"]);
        assert!(said.status == 1 && said.err.contains("no document `one`"), "{said:?}");
        let said = desk.say(&["replications", "wait", "one", "--timeout", "soon"]);
        assert!(said.status == 2 && said.err.contains("--timeout: expected a duration"), "{said:?}");
    }
}

#[test]
fn a_server_that_comes_up_again_is_waited_for() {
    let couch = five(Flavour::V3);
    put(&couch, "one", "fixture", "fixture_copy", &json!({"n": 1}));
    couch.replicate(DB, "one", Replication::new(Running)).unwrap();
    let desk = desk(&couch);
    let waiting = desk.command(&["replications", "wait", "one"]).spawn().unwrap();
    let looks = "GET /_scheduler/docs/_replicator/one";
    assert!(couch.wait_until(WAIT_MAX, |seen| seen.n_requests(looks) >= 2));
    couch.stop();
    couch.forget_replications();
    couch.start_again().unwrap();
    let n = couch.n_requests(looks);
    assert!(couch.wait_until(WAIT_MAX, |seen| seen.n_requests(looks) > n + 1), "it looks on");
    couch.replicate(DB, "one", Replication::new(Completed)).unwrap();
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn retry_saves_the_document_without_couchdbs_own_fields() {
    for flavour in FLAVOURS {
        let couch = five(flavour);
        let desk = desk(&couch);
        let before: Value = {
            put(
                &couch,
                "one",
                "fixture",
                "fixture_copy",
                &json!({"query_params": {"n": "1.0"}, "filter": "a/b"}),
            );
            serde_json::from_str(&couch.winner(DB, "one").unwrap().json).unwrap()
        };
        couch.replicate(DB, "one", Replication::failing(Failed, "kaboom", 1)).unwrap();
        let written: Value = serde_json::from_str(&couch.winner(DB, "one").unwrap().json).unwrap();
        assert!(written["_replication_state"].is_string());
        let said = desk.done(&["replications", "retry", "one"]);
        let word = if flavour == Flavour::V1 { "error" } else { "failed" };
        assert!(said.starts_with(&format!("`one`, which was {word}: saved again as 3-")), "{said}");
        assert!(said.contains("without `_replication_state`, `_replication_state_time`"), "{said}");
        let winner = couch.winner(DB, "one").unwrap();
        let mut after: Value = serde_json::from_str(&winner.json).unwrap();
        after["_rev"] = before["_rev"].clone();
        assert_eq!(after, before);
        // There is nothing to take out now, and so nothing to save.
        let said = desk.say(&["replications", "retry", "one"]);
        assert!(said.status == 1 && said.out.contains("nothing was saved"), "{said:?}");
        assert_eq!(couch.winner(DB, "one").unwrap().rev, winner.rev);
        let done = read(&desk.say(&["replications", "retry", "rep_done", "--json"]));
        assert_eq!((&done["previous_state"], &done["database"]), (&json!("completed"), &json!(DB)), "{done}");
        assert!(done["rev"].is_string(), "{done}");
        let said = desk.say(&["replications", "retry", "none"]);
        assert!(said.status == 1 && said.err.contains("no document `none`"), "{said:?}");
    }
}

#[test]
fn the_live_table_is_redrawn_until_it_is_told_to_end() {
    let couch = five(Flavour::V3);
    let desk = desk(&couch);
    let mut child = desk.command(&["replications", "list", "--watch", "--every", "1"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut until = |part: &str| lines.by_ref().map(Result::unwrap).find(|line| line.contains(part)).unwrap();
    assert!(until("5 replications").contains("1 running"));
    couch.replicate(DB, "rep_cont", Replication::failing(Crashing, "kaboom", 1)).unwrap();
    while until("5 replications").contains("1 running") {}
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn other_replicator_databases_are_named() {
    for flavour in [Flavour::V2, Flavour::V3] {
        let couch = five(flavour);
        let body = json!({"source": "http://h/a", "target": "http://h/b"});
        couch.put_replication("team/_replicator", "theirs", &body).unwrap();
        couch.replicate("team/_replicator", "theirs", Replication::new(Running)).unwrap();
        let said = desk(&couch).done(&["replications", "list", "--database", "team/_replicator"]);
        assert!(
            said.contains("theirs") && said.contains("1 replication in `team/_replicator`: 1 running"),
            "{said}"
        );
        let said = desk(&couch).say(&["replications", "list", "--database", "orders"]);
        assert!(said.status == 2 && said.err.contains("ends in `/_replicator`, got `orders`"), "{said:?}");
        let said = desk(&couch).say(&["replications", "list", "--database", "no/_replicator"]);
        assert!(said.status == 1 && said.err.contains("is there a database `no/_replicator`?"), "{said:?}");
    }
}

#[test]
fn who_is_no_admin_is_told_what_is_missing() {
    for flavour in FLAVOURS {
        let mut options = Options::new(flavour);
        options.admin = Some(("admin".to_owned(), "secret".to_owned()));
        options.users = vec![("bob".to_owned(), format!("{CANARY}-bob"))];
        let couch = StandIn::start(options).unwrap();
        couch.put_replication(DB, "one", &json!({"source": "http://h/a", "target": "http://h/b"})).unwrap();
        couch.replicate(DB, "one", Replication::new(Running)).unwrap();
        let url = couch.url().replacen("://", &format!("://bob:{CANARY}-bob@"), 1);
        let desk = Desk::new(&Ini::new(&url));
        for words in [&["list"][..], &["errors"], &["jobs"], &["lag"]] {
            // Before 2.1 nobody is asked for jobs.
            if flavour == Flavour::V1 && words == ["jobs"] {
                continue;
            }
            let said = desk.say(&[&["replications"], words].concat());
            assert!(said.status == 1 && said.err.contains("only server admins"), "{words:?}: {said:?}");
        }
    }
}
