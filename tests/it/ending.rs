//! How the daemon ends: within a second under a host, within five by itself, whatever hangs.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use couch_hookd::standin::couch::{Flavour, StandIn};
use couch_hookd::standin::quirks::{Fault, FaultKind};
use couch_hookd::standin::receiver::Reaction;
use couch_hookd::standin::record::Record;
use couch_hookd::sys;
use serde_json::json;

use crate::host::{Ended, Host, WAIT_MAX};
use crate::world::{Dir, Ini, World, checkpoint, couch, receiver, write};

/// DESIGN §9: exit 0 within 1 s after the end of stdin; the rest is for a machine that is busy.
const HOSTED_MAX: Duration = Duration::from_millis(1_200);
/// DESIGN §3: within 5 s after SIGTERM.
const OWN_MAX: Duration = Duration::from_millis(5_300);

fn assert_ended(ended: Ended, max: Duration, transcript: &str) {
    assert_eq!(ended.code, Some(0), "{transcript}");
    assert!(ended.took <= max, "{:?}\n{transcript}", ended.took);
}

fn hang(couch: &StandIn, request: &str) {
    let fault = Fault { request: request.to_owned(), times: u32::MAX, kind: FaultKind::Hang };
    couch.quirks(|quirks| quirks.faults.push(fault));
}

/// Every request that is made from now on.
const ALL: &str = "?";

#[test]
fn the_end_of_stdin_ends_it_while_the_receiver_hangs() {
    let couch = couch(Flavour::V2, &["orders"]);
    let receiver = receiver();
    receiver.answer(|_| Reaction::Hang);
    write(&couch, "orders", 20);
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let mut host = Host::start(&ini.text());
    assert!(receiver.wait_until(WAIT_MAX, |record| record.concurrency() > 0), "{}", host.transcript());
    assert_ended(host.close(), HOSTED_MAX, &host.transcript());
    host.assert_protocol_kept();
}

#[test]
fn the_end_of_stdin_ends_it_and_keeps_what_was_delivered() {
    let couch = couch(Flavour::V2, &["orders"]);
    let receiver = receiver();
    write(&couch, "orders", 20);
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let mut host = Host::start(&ini.text());
    assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() == 20), "{}", host.transcript());
    // In flight when the end comes, and answered within its half second.
    receiver.answer(|_| Reaction::Delay(Duration::from_millis(250), Box::new(Reaction::Status(200))));
    couch.put("orders", "last", &json!({})).unwrap();
    assert!(receiver.wait_until(WAIT_MAX, |record| record.concurrency() == 1), "{}", host.transcript());
    assert_ended(host.close(), HOSTED_MAX, &host.transcript());
    host.start_again();
    couch.put("orders", "later", &json!({})).unwrap();
    assert!(receiver.wait_until(WAIT_MAX, |record| record.accepted_rev("orders", "later").is_some()));
    assert_eq!(receiver.look(|record| record.deliveries().len()), 22, "{}", host.transcript());
}

#[test]
fn the_end_of_stdin_ends_it_while_couchdb_hangs() {
    for request in [ALL, "_changes", "_local", "GET /?", "PUT /"] {
        let couch = couch(Flavour::V1, &["orders"]);
        let receiver = receiver();
        hang(&couch, request);
        let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
        let mut host = Host::start(&ini.text());
        let hanging = couch.wait_until(WAIT_MAX, |seen| {
            let found = |one: &couch_hookd::standin::couch::Logged| {
                let query: Vec<String> =
                    one.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
                format!("{} {}?{}", one.method, one.path, query.join("&")).contains(request)
            };
            seen.requests().any(found)
        });
        assert!(hanging, "no `{request}`\n{}", host.transcript());
        assert_ended(host.close(), HOSTED_MAX, &format!("`{request}`\n{}", host.transcript()));
    }
    // In the middle of its work: the last checkpoint gets no answer.
    let couch = couch(Flavour::V1, &["orders"]);
    let receiver = receiver();
    let ini = Ini::new(&couch.url()).webhook("orders", &receiver.url(), "");
    let mut host = Host::start(&ini.text());
    write(&couch, "orders", 20);
    assert!(receiver.wait_until(WAIT_MAX, |record| record.n_accepted() > 0), "{}", host.transcript());
    hang(&couch, ALL);
    assert_ended(host.close(), HOSTED_MAX, &host.transcript());
}

/// A daemon whose names are asked of a server that never answers.
#[test]
fn the_end_of_stdin_ends_it_while_names_do_not_resolve() {
    let Ok(silent) = std::net::UdpSocket::bind("127.0.0.9:53") else {
        println!("skipped: a name server that never answers (port 53 cannot be had)");
        return;
    };
    silent.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let dir = Dir::new();
    std::fs::write(dir.path("resolv.conf"), "nameserver 127.0.0.9\noptions timeout:30\n").unwrap();
    let script = format!(
        "mount --bind {} /etc/resolv.conf && exec {} os-daemon",
        dir.path("resolv.conf").display(),
        env!("CARGO_BIN_EXE_couch-hookd")
    );
    let arguments = ["-m", "/bin/sh", "-c", &script];
    let possible = Command::new("unshare").args(["-m", "true"]).status().is_ok_and(|status| status.success());
    if !possible {
        println!("skipped: a name server that never answers (`unshare -m` is not allowed)");
        return;
    }
    let couch = couch(Flavour::V2, &["orders"]);
    write(&couch, "orders", 3);
    let hook = Ini::new(&couch.url()).webhook("orders", "http://hook.test/hook", "");
    let server = Ini::new("http://couch.test:5984").webhook("orders", "http://127.0.0.1:9/hook", "");
    for ini in [hook, server] {
        let mut host = Host::start_program("unshare", &ini.text(), &arguments, &[]);
        let mut question = [0; 512];
        silent.recv(&mut question).unwrap_or_else(|_| panic!("nobody asks\n{}", host.transcript()));
        assert_ended(host.close(), HOSTED_MAX, &host.transcript());
    }
}

#[test]
fn an_address_that_drops_packets_does_not_hold_up_the_end() {
    // A listener whose queue is full: connecting to it waits.
    let full = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    nix::sys::socket::listen(&full, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let address = full.local_addr().unwrap();
    let queued: Vec<_> = (0..2)
        .filter_map(|_| std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok())
        .collect();
    let couch = couch(Flavour::V2, &["orders"]);
    write(&couch, "orders", 3);
    let hook =
        Ini::new(&couch.url()).webhook("orders", &format!("http://{address}/hook"), "connect_timeout = 30s");
    let mut host = Host::start(&hook.text());
    host.wait_for_log("starts for the first time");
    let reading = couch.wait_until(WAIT_MAX, |seen| seen.n_requests("/orders/_changes") > 0);
    assert!(reading, "{}", host.transcript());
    assert_ended(host.close(), HOSTED_MAX, &host.transcript());
    let server = Ini::new(&format!("http://{address}")).webhook("orders", "http://127.0.0.1:9/hook", "");
    let mut host = Host::start(&server.text());
    host.wait_for_get("hookd", 1);
    assert_ended(host.close(), HOSTED_MAX, &host.transcript());
    drop(queued);
}

#[test]
fn sigterm_finishes_what_is_in_flight_and_writes_the_checkpoint() {
    let mut world = World::start(Flavour::V1, "");
    world.receiver.answer(|_| Reaction::Delay(Duration::from_millis(700), Box::new(Reaction::Status(200))));
    write(&world.couch, "orders", 1);
    world.wait("delivery in flight", |record| record.concurrency() == 1);
    let ended = world.daemon.terminate();
    assert_ended(ended, OWN_MAX, &world.transcript());
    assert_eq!(world.receiver.look(Record::n_accepted), 1, "{}", world.transcript());
    let stored = checkpoint(&world.couch, "orders", "orders").expect("a checkpoint");
    assert_eq!(stored["through_seq"], json!(world.couch.update_seq("orders")));
    world.daemon.start_again();
    world.couch.put("orders", "later", &json!({})).unwrap();
    world.wait_for_all("orders");
    assert_eq!(world.receiver.look(|record| record.deliveries().len()), 2, "{}", world.transcript());
}

#[test]
fn sigterm_gives_back_what_hangs() {
    let mut world = World::start(Flavour::V1, "");
    write(&world.couch, "orders", 3);
    world.wait_for_all("orders");
    world.receiver.answer(|one| if one.doc_id() == "d1" { Reaction::Hang } else { Reaction::Status(200) });
    write(&world.couch, "orders", 3);
    world.wait("others", |record| record.n_accepted() == 5 && record.concurrency() == 1);
    let ended = world.daemon.terminate();
    assert_ended(ended, OWN_MAX, &world.transcript());
    world.receiver.answer(|_| Reaction::Status(200));
    world.daemon.start_again();
    world.wait_for_all("orders");
    // What was delivered behind the one that hung is in the checkpoint, too.
    world.receiver.look(|record| assert_eq!(record.deliveries().len(), 7, "{}", record.transcript()));
}

#[test]
fn sigterm_ends_it_while_couchdb_hangs() {
    let mut world = World::start(Flavour::V3, "");
    write(&world.couch, "orders", 20);
    world.wait_for_all("orders");
    hang(&world.couch, ALL);
    write(&world.couch, "orders", 20);
    let ended = world.daemon.terminate();
    assert_ended(ended, OWN_MAX, &world.transcript());
}

#[test]
fn a_parent_that_is_gone_is_the_end_though_stdin_stays_open() {
    let dir = Dir::new();
    let script = "exec 3<&0; \"$0\" os-daemon <&3 & wait";
    let mut parent = Command::new("/bin/sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_couch-hookd")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(dir.path("stderr")).unwrap())
        .process_group(0)
        .spawn()
        .unwrap();
    // Kept: waiting for the parent would close it.
    let (stdin, mut output) = (parent.stdin.take(), parent.stdout.take().unwrap());
    let mut first = [0; 1];
    output.read_exact(&mut first).unwrap();
    let begun = sys::now();
    parent.kill().unwrap();
    parent.wait().unwrap();
    // Its end closes its stdout; our end of its stdin is still open.
    let (to, ended) = crossbeam_channel::bounded(1);
    let reader = sys::spawn("output", move || {
        let mut rest = Vec::new();
        let _ = output.read_to_end(&mut rest);
        let _ = to.send(sys::now());
    });
    let ended_at = ended.recv_timeout(WAIT_MAX).expect("it lives on without its parent");
    // Looked at every so often, then a second as for any other end.
    assert!(ended_at - begun < Duration::from_millis(2_500), "{:?}", ended_at - begun);
    reader.unwrap().join().unwrap();
    drop(stdin);
}
