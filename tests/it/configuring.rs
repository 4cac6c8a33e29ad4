//! Configurations that are bad, half, changed and taken back, hosted and by ourselves: said, waited on, applied live.

use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::receiver::Receiver;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::host::{Host, WAIT_MAX};
use crate::world::{Daemon, FLAVOURS, Ini, World, couch, has_all, on_each, receiver, revs, write};

#[track_caller]
fn wait_for_all(couch: &StandIn, receiver: &Receiver, transcript: impl Fn() -> String) {
    let revs = revs(couch, "orders");
    assert!(receiver.wait_until(WAIT_MAX, |record| has_all(record, "orders", &revs)), "{}", transcript());
}

/// Waits until the daemon has asked for our sections `n` times more: each takes up to five seconds.
fn wait_for_answers(host: &Host, n: usize) {
    let asked = host.n_asked("hookd.webhooks");
    (asked..asked + n).for_each(|n_before| host.wait_for_get("hookd.webhooks", n_before));
}

#[test]
fn hosted_configurations_are_waited_on() {
    // All of it is waiting for the next `get`.
    let scenes = [
        bad_from_the_start,
        half_at_the_start,
        half_while_it_runs,
        one_of_two_changed,
        registered,
        hosted_by_one_that_does_not_answer,
    ];
    std::thread::scope(|scope| scenes.iter().for_each(|scene| drop(scope.spawn(scene))));
}

fn bad_from_the_start() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    write(&couch, "orders", 3);
    let port = couch.url().rsplit(':').next().unwrap().to_owned();
    let bad = format!(
        "[httpd]\nport = {port}\nbind_address = 127.0.0.1\n[hookd]\nlog_level = loud\n\
         [hookd.webhooks]\norders = {}\nother = ftp://x\n\
         [hookd.webhook.orders]\nsince = 0\nselctor = {{}}\ntimeout = 5\n",
        receiver.url()
    );
    let mut host = Host::start(&bad);
    for said in [
        "[hookd] log_level: expected `error` or `warn` or `info` or `debug`, got `loud`",
        "[hookd.webhook.orders] selctor: this key is unknown; the nearest one is `selector`",
        "[hookd.webhook.orders] timeout: expected a duration with its unit, got `5`; write `5s`",
        "[hookd.webhooks] other: expected `http://HOST`",
    ] {
        assert_eq!(host.wait_for_log(said).level, "error");
    }
    host.set_all(
        &bad.replace("loud", "info").replace("timeout = 5", "timeout = 5s").replace("selctor = {}", ""),
    );
    wait_for_answers(&host, 2);
    wait_for_all(&couch, &receiver, || host.transcript());
    host.wait_for_log("webhook `other` is held back");
    assert_eq!(host.logged().iter().filter(|logged| logged.message.contains("log_level")).count(), 1);
    host.assert_protocol_kept();
    assert_eq!(host.close().code, Some(0));
}

/// An administrator sets key by key; the daemon comes in between.
fn half_at_the_start() {
    let (couch, receiver) = (couch(Flavour::V2, &["orders"]), receiver());
    write(&couch, "orders", 3);
    couch.put("orders", "mine", &json!({"mine": true})).unwrap();
    let host = Host::start(&format!(
        "[hookd]\ncouchdb_url = {}\n[hookd.webhooks]\norders = {}\n",
        couch.url(),
        receiver.url()
    ));
    host.wait_for_get("hookd.webhook.orders", 0);
    host.set("hookd.webhook.orders", "selector", "{\"mine\": true}");
    host.set("hookd.webhook.orders", "since", "0");
    only_mine_is_told(&host, &receiver);
}

fn half_while_it_runs() {
    let (couch, receiver) = (couch(Flavour::V2, &["orders"]), receiver());
    write(&couch, "orders", 3);
    couch.put("orders", "mine", &json!({"mine": true})).unwrap();
    let host = Host::start(&format!("[hookd]\ncouchdb_url = {}\n", couch.url()));
    wait_for_answers(&host, 2);
    host.set("hookd.webhooks", "orders", &receiver.url());
    wait_for_answers(&host, 1);
    host.set("hookd.webhook.orders", "selector", "{\"mine\": true}");
    host.set("hookd.webhook.orders", "since", "0");
    wait_for_answers(&host, 1);
    only_mine_is_told(&host, &receiver);
}

fn only_mine_is_told(host: &Host, receiver: &Receiver) {
    let came = receiver.wait_until(WAIT_MAX, |record| record.accepted_rev("orders", "mine").is_some());
    assert!(came, "{}", host.transcript());
    let told = receiver.look(|record| record.deliveries().len());
    assert_eq!(told, 1, "{}\n{}", host.transcript(), receiver.look(|record| record.transcript()));
    host.wait_for_log("tells changes of `orders` from their beginning");
    host.assert_protocol_kept();
}

fn one_of_two_changed() {
    let couch = couch(Flavour::V3, &["orders"]);
    let (one, two) = (receiver(), receiver());
    let ini = Ini::new(&couch.url()).webhook("one", &one.url(), "db = orders").webhook(
        "two",
        &two.url(),
        "db = orders",
    );
    let host = Host::start(&ini.text());
    write(&couch, "orders", 3);
    wait_for_all(&couch, &one, || host.transcript());
    wait_for_all(&couch, &two, || host.transcript());
    host.set("hookd.webhook.two", "concurrency", "2");
    wait_for_answers(&host, 2);
    host.wait_for_log("webhook `two` goes on with changes");
    couch.put("orders", "new", &json!({})).unwrap();
    wait_for_all(&couch, &one, || host.transcript());
    wait_for_all(&couch, &two, || host.transcript());
    let started = host.logged().iter().filter(|logged| logged.message.contains("webhook `one`")).count();
    assert_eq!(started, 1, "{}", host.transcript());
    host.assert_protocol_kept();
}

fn registered() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    let ini = Ini::new(&couch.url()).hookd("register = on").webhook("orders", &receiver.url(), "");
    let host = Host::start(&ini.text());
    for section in ["hookd", "hookd.webhooks", "hookd.webhook.orders"] {
        host.wait_for_register(section);
    }
    write(&couch, "orders", 3);
    wait_for_all(&couch, &receiver, || host.transcript());
    host.assert_protocol_kept();
    assert_eq!(host.n_registered("httpd"), 0, "{}", host.transcript());
}

#[test]
fn a_couchdb_that_comes_up_later_is_waited_for_and_said_once() {
    on_each(&FLAVOURS, |flavour| {
        let (couch, receiver) = (couch(flavour, &["orders"]), receiver());
        write(&couch, "orders", 3);
        couch.stop();
        let host = Host::start(&Ini::new(&couch.url()).webhook("orders", &receiver.url(), "").text());
        let line = host.wait_for_log("waiting for CouchDB at http://127.0.0.1:");
        assert!(line.message.contains("refused"), "{}", line.message);
        couch.start_again().unwrap();
        wait_for_all(&couch, &receiver, || host.transcript());
        let said =
            host.logged().iter().filter(|logged| logged.message.contains("waiting for CouchDB")).count();
        assert_eq!(said, 1, "{}", host.transcript());
        host.assert_protocol_kept();
    });
}

#[test]
fn run_with_a_fault_in_hookd_says_it_and_exits_2() {
    let mut daemon = Daemon::start(&Ini::new("http://127.0.0.1:1").hookd("deliveries_max = none"));
    assert_eq!(daemon.wait_for_end().code, Some(2), "{}", daemon.transcript());
    let line = daemon.wait_for_log("deliveries_max");
    assert!(line.contains("[ERROR]") && line.contains("hookd.ini:3:") && line.contains("`none`"), "{line}");
    assert_eq!(daemon.n_logged("stdout: "), 0, "{}", daemon.transcript());
}

/// Applies a configuration with SIGHUP.
fn reload(daemon: &Daemon, ini: &Ini, said: &str) {
    let n = daemon.n_logged(said);
    daemon.configure(&ini.text());
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_nth_log(said, n + 1);
}

#[test]
fn a_reload_applies_what_is_good_and_keeps_the_old_where_it_is_bad() {
    const APPLIED: &str = "SIGHUP: configuration applied";
    let couch = couch(Flavour::V3, &["orders"]);
    let (one, two) = (receiver(), receiver());
    let base = Ini::new(&couch.url()).webhook("one", &one.url(), "db = orders");
    let both = base.clone().webhook("two", &two.url(), "db = orders");
    let world = World { daemon: Daemon::start(&both), couch, receiver: one };
    let told = |receiver: &Receiver| wait_for_all(&world.couch, receiver, || world.transcript());
    let both_told = || [&world.receiver, &two].into_iter().for_each(told);
    write(&world.couch, "orders", 3);
    both_told();

    // Bad for all, then bad for one of them: what runs, runs on.
    let bad = both.clone().hookd("log_format = xml");
    reload(&world.daemon, &bad, "SIGHUP: the new configuration cannot be used; the old one stays in force");
    world.daemon.wait_for_log("log_format");
    world.couch.put("orders", "a", &json!({})).unwrap();
    both_told();
    let half = base.clone().webhook("two", &two.url(), "db = orders\nselctor = {}");
    reload(&world.daemon, &half, APPLIED);
    world.daemon.wait_for_log("webhook `two` is held back");
    world.couch.put("orders", "b", &json!({})).unwrap();
    told(&world.receiver);

    // Paused, then removed: not told, and not forgotten.
    let paused = base.clone().webhook("two", &two.url(), "db = orders\npaused = true");
    reload(&world.daemon, &paused, "webhook `two` is paused by its configuration");
    world.couch.put("orders", "c", &json!({})).unwrap();
    told(&world.receiver);
    reload(&world.daemon, &base, APPLIED);
    world.couch.put("orders", "d", &json!({})).unwrap();
    told(&world.receiver);
    assert_eq!(two.look(|record| record.deliveries().len()), 4, "{}", world.transcript());
    reload(&world.daemon, &both, APPLIED);
    both_told();
    let counts = [&world.receiver, &two].map(|receiver| receiver.look(|record| record.deliveries().len()));
    assert_eq!(counts, [7, 7], "{}", world.transcript());
    assert_eq!(world.daemon.n_logged("webhook `one` starts"), 1, "{}", world.transcript());
    assert_eq!(world.daemon.n_logged("webhook `one` goes on"), 0, "{}", world.transcript());
}

#[test]
fn a_cluster_of_more_than_one_node_is_said() {
    on_each(&[Flavour::V2, Flavour::V3], |flavour| {
        let couch = couch(flavour, &["orders"]);
        couch.quirks(|quirks| quirks.n_other_nodes = 2);
        let receiver = receiver();
        let host =
            Host::start(&Ini::new(&couch.url()).webhook("orders", &receiver.url(), "lease = off").text());
        let line = host.wait_for_log("this CouchDB has 3 nodes");
        assert!(line.message.starts_with("warning: ") && line.level == "info", "{line:?}");
    });
}

/// A `get` that is never answered must not keep the daemon from its work, nor from its end.
fn hosted_by_one_that_does_not_answer() {
    let (couch, receiver) = (couch(Flavour::V1, &["orders"]), receiver());
    let mut host = Host::start(&Ini::new(&couch.url()).webhook("orders", &receiver.url(), "").text());
    write(&couch, "orders", 3);
    wait_for_all(&couch, &receiver, || host.transcript());
    host.answer(false);
    host.wait_for_get("hookd", host.n_asked("hookd"));
    couch.put("orders", "new", &json!({})).unwrap();
    wait_for_all(&couch, &receiver, || host.transcript());
    let ended = host.close();
    assert_eq!(ended.code, Some(0));
    assert!(ended.took < Duration::from_millis(1_500), "{:?}\n{}", ended.took, host.transcript());
}
