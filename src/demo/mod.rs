//! The whole on a machine with nothing installed: a stand-in for CouchDB, the daemon under an os_daemons host over
//! real pipes, a receiver that verifies signatures, documents being written, one `kill -9` in the middle.
//!
//! Guarantees that its closing line is counted, not claimed: what was written is compared with what the receiver
//! took, and the exit status is 1 when a last revision is missing, a signature was wrong or an order was broken.

mod host;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver as Inbox, RecvTimeoutError, bounded};
use serde_json::json;

use crate::demo::host::{Host, LogLine, Sections};
use crate::error::{Error, Kind, Result};
use crate::pure::signature::{self, Key};
use crate::standin::couch::{Flavour, Options as CouchOptions, StandIn};
use crate::standin::receiver::{Reaction, Receiver, ReceiverOptions};
use crate::standin::record::{Delivery, Record};
use crate::sys;

/// The watched database, and the webhook's name.
const DB: &str = "orders";
/// Documents that are updated in turn. At the pace below each changes every 3 s, so that what a killed daemon missed
/// is seldom replaced before it is back.
const DOCUMENTS: usize = 40;
/// Between two writes.
const WRITE_EVERY: Duration = Duration::from_millis(70);
/// Between two lines of progress.
const SHOW_EVERY: Duration = Duration::from_secs(1);
/// How long the last deliveries may take.
const SETTLE_MAX: Duration = Duration::from_secs(15);
/// How long an answer of the receiver takes at most: somebody is always in flight when the daemon is killed.
const ANSWER_MAX_MS: u64 = 40;
/// Log lines that wait to be shown.
const LOG_LINES: usize = 256;

/// What to show.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long documents are written.
    pub lasts: Duration,
    /// One JSON line per request received, instead of lines for people.
    pub json: bool,
    /// Our own binary, to be started as the daemon.
    pub program: PathBuf,
}

/// Runs the demo; gives the exit status. A message in `stop` ends the writing early.
///
/// # Errors
/// `Io` when a port, a thread or the daemon cannot be had.
pub fn run(options: &Options, out: &mut dyn Write, stop: &Inbox<()>) -> Result<u8> {
    let secret = signature::new_secret(sys::random_bytes());
    let key = Key::parse(&secret).map_err(|why| Error::new(Kind::Config, why))?;
    let receiver =
        Receiver::start(ReceiverOptions { keep_bodies: options.json, ..ReceiverOptions::new(vec![key]) })?;
    receiver.answer(|_| {
        let pause = Duration::from_millis((sys::jitter() * ANSWER_MAX_MS as f64) as u64);
        Reaction::Delay(pause, Box::new(Reaction::Status(200)))
    });
    let admin = ("admin".to_owned(), "demo".to_owned());
    let couch =
        StandIn::start(CouchOptions { admin: Some(admin.clone()), ..CouchOptions::new(Flavour::V2) })?;
    couch.create_db(DB);
    let (log_to, log) = bounded(LOG_LINES);
    let sections = sections(&couch.url(), &admin, &receiver.url(), &secret);
    let mut demo = Demo { options, out, written: HashMap::new(), n_written: 0, shown: 0 };
    demo.introduce(&couch.url(), &receiver.url(), &secret)?;
    let host = Host::start(options.program.clone(), sections, log_to)?;
    // What is written before the daemon follows "from now on" is not its business.
    demo.wait_for_start(&log)?;
    let host = demo.write_and_kill(&couch, &receiver, &log, host, stop)?;
    let settled = receiver.wait_until(SETTLE_MAX, |record| missing(&couch, record).is_empty());
    demo.show_requests(&receiver)?;
    let took = host.close()?;
    demo.show_log(&log)?;
    let verdict = demo.verdict(&couch, &receiver, settled, took)?;
    receiver.stop();
    couch.stop();
    Ok(verdict)
}

/// What an operator would write into `local.ini`.
fn sections(couch: &str, admin: &(String, String), endpoint: &str, secret: &str) -> Sections {
    let port = couch.rsplit(':').next().unwrap_or_default().trim_end_matches('/');
    let section = |keys: &[(&str, &str)]| {
        keys.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
    };
    let mut sections = Sections::new();
    sections.insert("chttpd".to_owned(), section(&[("port", port), ("bind_address", "127.0.0.1")]));
    sections.insert("hookd".to_owned(), section(&[("username", &admin.0), ("password", &admin.1)]));
    sections.insert("hookd.webhooks".to_owned(), section(&[(DB, endpoint)]));
    sections.insert(format!("hookd.webhook.{DB}"), section(&[("secret", secret)]));
    sections
}

/// Documents whose last revision the receiver has not taken.
fn missing(couch: &StandIn, record: &Record) -> Vec<String> {
    let taken = record.accepted_revs(DB);
    let winners = couch.winners(DB);
    winners.into_iter().filter(|(id, winner)| taken.get(id) != Some(&winner.rev)).map(|(id, _)| id).collect()
}

struct Demo<'a> {
    options: &'a Options,
    out: &'a mut dyn Write,
    /// Revisions written, by document.
    written: HashMap<String, Vec<String>>,
    n_written: usize,
    /// Requests shown so far.
    shown: usize,
}

impl Demo<'_> {
    fn say(&mut self, text: &str) -> Result<()> {
        if self.options.json {
            return Ok(());
        }
        self.line(text)
    }

    fn line(&mut self, text: &str) -> Result<()> {
        writeln!(self.out, "{text}").and_then(|()| self.out.flush()).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Error::new(Kind::Stopped, "nobody reads the output"),
            _ => Error::new(Kind::Io, format!("failed to write to stdout: {error}")),
        })
    }

    fn introduce(&mut self, couch: &str, endpoint: &str, secret: &str) -> Result<()> {
        if self.options.json {
            // Made for this run alone, and gone with it.
            return self
                .line(&json!({ "secret": secret, "couchdb": couch, "endpoint": endpoint }).to_string());
        }
        self.say(&format!("a stand-in for CouchDB 2.2 listens on {couch}, a receiver on {endpoint}"))?;
        self.say("the daemon is started as CouchDB does it from [os_daemons]: pipes, JSON lines, kill -9")?;
        self.say("")
    }

    fn wait_for_start(&mut self, log: &Inbox<LogLine>) -> Result<()> {
        let until = sys::now() + SETTLE_MAX;
        loop {
            match log.recv_deadline(until) {
                Ok(line) => {
                    let started = line.text.contains("starts for the first time");
                    self.log_line(&line)?;
                    if started {
                        return Ok(());
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::new(Kind::Timeout, "the daemon did not start its webhook"));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(Kind::Io, "the daemon ended at once"));
                }
            }
        }
    }

    /// Writes documents for as long as asked, and kills the daemon once, half-way.
    fn write_and_kill(
        &mut self,
        couch: &StandIn,
        receiver: &Receiver,
        log: &Inbox<LogLine>,
        mut host: Host,
        stop: &Inbox<()>,
    ) -> Result<Host> {
        let start = sys::now();
        let (end, mut kill_at) = (start + self.options.lasts, Some(start + self.options.lasts / 2));
        let (mut write_at, mut show_at) = (start, start + SHOW_EVERY);
        while sys::now() < end {
            if stop.recv_deadline(write_at.min(end)) != Err(RecvTimeoutError::Timeout) {
                break;
            }
            self.write(couch)?;
            write_at += WRITE_EVERY;
            if let Some(at) = kill_at.filter(|at| *at <= sys::now()) {
                kill_at = None;
                self.say(&format!(
                    "{} kill -9 {}: CouchDB's way of stopping us",
                    clock(start, at),
                    host.pid()
                ))?;
                host = host.kill_and_restart()?;
            }
            self.show_log(log)?;
            self.show_requests(receiver)?;
            if show_at <= sys::now() {
                self.show_progress(receiver, start, show_at)?;
                show_at += SHOW_EVERY;
            }
        }
        Ok(host)
    }

    fn write(&mut self, couch: &StandIn) -> Result<()> {
        let id = format!("order:{}", self.n_written % DOCUMENTS);
        let total = 10 + self.n_written * 7 % 90;
        let rev = couch.put(DB, &id, &json!({ "type": "order", "total": total }))?;
        self.written.entry(id).or_default().push(rev);
        self.n_written += 1;
        Ok(())
    }

    fn log_line(&mut self, line: &LogLine) -> Result<()> {
        self.say(&format!("         couchdb log [{}] couch_hookd :: {}", line.level, line.text))
    }

    fn show_log(&mut self, log: &Inbox<LogLine>) -> Result<()> {
        while let Ok(line) = log.try_recv() {
            self.log_line(&line)?;
        }
        Ok(())
    }

    fn show_progress(&mut self, receiver: &Receiver, start: Instant, at: Instant) -> Result<()> {
        let (n_delivered, last) = receiver.look(|record| {
            let last = record.deliveries().last().map(|delivery| {
                let signature = if delivery.verified.is_ok() { "verified" } else { "WRONG" };
                let rev: String = delivery.rev().chars().take(8).collect();
                format!("{} {} {rev}..  signature {signature}", delivery.webhook_id, delivery.doc_id())
            });
            (distinct(record.deliveries()).len(), last)
        });
        let last = last.unwrap_or_default();
        self.say(&format!(
            "{} {:4} written {n_delivered:4} delivered   {last}",
            clock(start, at),
            self.n_written
        ))
    }

    /// With `--json`: a line per request that was answered since the last call.
    fn show_requests(&mut self, receiver: &Receiver) -> Result<()> {
        if !self.options.json {
            return Ok(());
        }
        let new: Vec<Delivery> = receiver.look(|record| record.deliveries()[self.shown..].to_vec());
        for delivery in new {
            self.shown += 1;
            let headers: BTreeMap<String, &str> = delivery
                .headers
                .iter()
                .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str()))
                .collect();
            let body = String::from_utf8_lossy(&delivery.body);
            let line = json!({
                "webhook_id": delivery.webhook_id, "doc_id": delivery.doc_id(), "rev": delivery.rev(),
                "attempt": delivery.attempt, "verified": delivery.verified.is_ok(), "headers": headers, "body": body,
            });
            self.line(&line.to_string())?;
        }
        Ok(())
    }

    fn verdict(&mut self, couch: &StandIn, receiver: &Receiver, settled: bool, took: Duration) -> Result<u8> {
        let (lost, n_requests, ids, revs, n_unverified, violations) = receiver.look(|record| {
            let ids: HashSet<String> =
                record.deliveries().iter().map(|delivery| delivery.webhook_id.clone()).collect();
            let violations: Vec<String> =
                record.violations().iter().map(|fault| format!("{fault:?}")).collect();
            let deliveries = record.deliveries();
            (
                missing(couch, record),
                deliveries.len(),
                ids.len(),
                distinct(deliveries),
                record.n_unverified(),
                violations,
            )
        });
        let told = |id: &String, rev: &String| revs.contains(&(id.clone(), rev.clone()));
        let n_delivered: usize =
            self.written.iter().map(|(id, revs)| revs.iter().filter(|rev| told(id, rev)).count()).sum();
        let n_replaced = self.n_written - n_delivered - lost.len().min(self.n_written - n_delivered);
        let n_repeated = n_requests - ids;
        let fine = settled && lost.is_empty() && n_unverified == 0 && violations.is_empty();
        if self.options.json {
            let holds: BTreeMap<String, String> =
                couch.winners(DB).into_iter().map(|(id, winner)| (id, winner.rev)).collect();
            self.line(
                &json!({
                    "written": self.n_written, "delivered": n_delivered, "repeated": n_repeated, "kills": 1,
                    "replaced": n_replaced, "lost": lost.len(), "unverified": n_unverified,
                    "violations": violations, "couchdb_holds": holds,
                })
                .to_string(),
            )?;
        } else {
            self.say("")?;
            for fault in &violations {
                self.say(&format!("broken: {fault}"))?;
            }
            if n_unverified > 0 {
                self.say(&format!("broken: {n_unverified} signatures were wrong"))?;
            }
            self.say(&format!("stdin closed: the daemon was gone after {} ms", took.as_millis()))?;
            let replaced = match n_replaced {
                0 => String::new(),
                n => format!("{n} replaced by newer revisions before they were read, "),
            };
            self.say(&format!(
                "{} written, {n_delivered} delivered, {n_repeated} repeated after 1 kill, {replaced}{} lost",
                self.n_written,
                lost.len()
            ))?;
        }
        Ok(u8::from(!fine))
    }
}

fn distinct(deliveries: &[Delivery]) -> HashSet<(String, String)> {
    deliveries
        .iter()
        .filter(|delivery| delivery.accepted())
        .map(|delivery| (delivery.doc_id().to_owned(), delivery.rev().to_owned()))
        .collect()
}

fn clock(start: Instant, at: Instant) -> String {
    format!("{:5.1} s", (at - start).as_secs_f64())
}
