//! A real BEAM tells us of databases, as CouchDB 1.x does from `[update_notification]`: `tests/beam/notifier.escript`.

use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};

use couch_hookd::standin::couch::Flavour;
use couch_hookd::sys;
use crossbeam_channel::Receiver;

use crate::host::WAIT_MAX;
use crate::world::{Dir, Ini, couch, long, receiver, rss_kib, write};

/// `{"type":"updated","db":"x-0"}` and its newline: no line is shorter.
const LINE_BYTES_MIN: u64 = 31;

/// The running BEAM with its notifier. Dropped, both end.
struct Beam {
    child: Child,
    orders: Option<ChildStdin>,
    said: Receiver<String>,
    heard: Vec<String>,
    pid: u32,
}

impl Beam {
    /// Starts the real binary with these words; CouchDB has no quoting.
    fn start(words: &str) -> Beam {
        let mut child = Command::new("escript")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/beam/notifier.escript"))
            .arg(env!("CARGO_BIN_EXE_couch-hookd"))
            .args(words.split(' '))
            .env_remove("COUCHDB_URL")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`escript` starts: tests/run installs erlang-base");
        let said = super::lines(child.stdout.take().unwrap());
        let mut beam = Beam { orders: child.stdin.take(), child, said, heard: Vec::new(), pid: 0 };
        beam.pid = beam.wait_for("started ").parse().unwrap();
        beam
    }

    /// Sends an order, waits for the line that begins with `answer` and gives the rest of it. Nothing may have come
    /// back from the notifier until then, and it must not have ended.
    #[track_caller]
    fn order(&mut self, order: &str, answer: &str) -> String {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
        self.wait_for(answer)
    }

    #[track_caller]
    fn wait_for(&mut self, start: &str) -> String {
        let Ok(line) = self.said.recv_timeout(WAIT_MAX) else {
            panic!("the BEAM did not say `{start}`; it said {:#?}", self.heard);
        };
        self.heard.push(line.clone());
        match line.strip_prefix(start) {
            Some(rest) => rest.to_owned(),
            None => panic!("expected `{start}`, got {:#?}", self.heard),
        }
    }

    /// Pushes lines and waits until the notifier has read them all.
    #[track_caller]
    fn push(&mut self, n: u64, distinct: u64, name: &str) -> String {
        let until = self.bytes_read() + n * LINE_BYTES_MIN;
        let took = self.order(&format!("push {n} {distinct} {name}"), "pushed ");
        let patience = sys::now() + WAIT_MAX;
        while self.bytes_read() < until {
            assert!(sys::now() < patience, "it does not read: {} of {until} bytes", self.bytes_read());
            sys::yield_now();
        }
        took
    }

    /// What the notifier has read since it began, from wherever.
    fn bytes_read(&self) -> u64 {
        let counted = std::fs::read_to_string(format!("/proc/{}/io", self.pid)).unwrap();
        let line = counted.lines().find_map(|line| line.strip_prefix("rchar: "));
        line.expect("Linux counts it").parse().unwrap()
    }

    /// Closes the port, as a CouchDB that stops; the notifier is gone within a second.
    #[track_caller]
    fn close(mut self) {
        let took: u64 = self.order("close", "gone ").parse().unwrap();
        // A second is its own; the rest is for a machine that is busy.
        assert!(took <= 5_000, "{took} ms");
    }
}

impl Drop for Beam {
    fn drop(&mut self) {
        drop(self.orders.take());
        let _ = self.child.wait();
    }
}

#[test]
fn a_hundred_thousand_lines_of_a_real_beam_bring_nothing_back_and_cost_no_memory() {
    if !super::beam_is_there() {
        return;
    }
    let (dir, couch, receiver) = (Dir::new(), couch(Flavour::V1, &["orders"]), receiver());
    let (path, log) = (dir.path("hookd.ini"), dir.path("hookd.log"));
    let ini = Ini::new(&couch.url())
        .hookd(&format!("log_level = debug\nlog_file = {}", log.display()))
        .webhook("orders", &receiver.url(), "");
    std::fs::write(&path, ini.text()).unwrap();
    let mut beam = Beam::start(&format!("update-notification --config {}", path.display()));
    let deliver = |n: usize| {
        write(&couch, "orders", 5);
        let all = receiver.wait_until(WAIT_MAX, |record| record.n_accepted() >= n);
        assert!(all, "{}", std::fs::read_to_string(&log).unwrap_or_default());
    };
    deliver(5);
    // As many names as are kept, and then some: from here on there is no room.
    beam.push(12_000, 12_000, "full");
    deliver(10);
    let before = rss_kib(beam.pid);
    let n = if long() { 100_000 } else { 20_000 };
    let all_one = beam.push(n, 1, "orders");
    let all_different = beam.push(n, n, "different");
    deliver(15);
    let after = rss_kib(beam.pid);
    println!(
        "100,000 lines about one database in {all_one} ms, about as many in {all_different} ms; {before} KiB before, {after} KiB after"
    );
    assert!(after < before + 4_096, "{before} KiB before, {after} KiB after");
    beam.order("line nonsense", "written");
    beam.order(&format!("line {}", "x".repeat(10_000)), "written");
    deliver(20);
    beam.close();
}

#[test]
fn words_that_are_wrong_do_not_end_it_under_a_real_beam() {
    if !super::beam_is_there() {
        return;
    }
    for words in [
        "update-notification --confg /etc/couch-hookd/hookd.ini",
        "update-notification --config /nonexistent/hookd.ini",
        "update-notification --help",
        "update-notifcation --config /etc/couch-hookd/hookd.ini",
        "--version",
    ] {
        let mut beam = Beam::start(words);
        beam.push(20_000, 100, "db");
        beam.close();
    }
}

#[test]
fn a_beam_that_is_killed_takes_its_notifier_along() {
    if !super::beam_is_there() {
        return;
    }
    let mut beam = Beam::start("update-notification --config /nonexistent/hookd.ini");
    beam.push(1_000, 100, "db");
    beam.child.kill().unwrap();
    beam.child.wait().unwrap();
    let (begun, path) = (sys::now(), format!("/proc/{}/fd", beam.pid));
    // A process that has ended, even one that nobody has asked about yet, holds no files.
    while std::fs::read_dir(&path).is_ok_and(|mut files| files.next().is_some()) {
        // A second, on a machine that has nothing else to do.
        assert!(begun.elapsed() < crate::host::WAIT_MAX, "it lives on");
        sys::yield_now();
    }
}

#[test]
fn a_notifier_that_is_killed_ends_as_couchdb_expects() {
    if !super::beam_is_there() {
        return;
    }
    let mut beam = Beam::start("update-notification --config /nonexistent/hookd.ini");
    beam.push(1_000, 100, "db");
    writeln!(beam.orders.as_mut().unwrap(), "kill").unwrap();
    let both: Vec<String> = (0..2).map(|_| beam.said.recv_timeout(WAIT_MAX).unwrap()).collect();
    assert!(both.contains(&"killed".to_owned()) && both.contains(&"exited 137".to_owned()), "{both:?}");
}
