//! A receiver of webhooks that verifies, records and answers by a script that may change while it runs.
//!
//! It is what `receive` and `demo` show and what the integration tests look at. Guarantees that a request is
//! recorded before it is answered, and that refusing connections closes the listening socket. Bookkeeping is
//! `record`'s, verification `pure::signature`'s.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver as Inbox, Sender, bounded, select};
use serde_json::json;

use crate::error::Result;
use crate::pure::signature::{self, Key};
use crate::standin::http::{Answer, Peer, Request, Server, locked};
use crate::standin::record::{Delivery, Event, Record};
use crate::sys;

/// Longest time between two looks at whether a waiting request's peer has gone.
const PEER_CHECK: Duration = Duration::from_millis(50);
/// Requests that may wait to be printed by [`run_receive`].
const PRINT_QUEUE: usize = 64;

/// How to start a receiver.
#[derive(Debug, Clone)]
pub struct ReceiverOptions {
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Secrets to verify with; without one every delivery is recorded as unverified.
    pub secrets: Vec<Key>,
    /// Whether headers and bodies stay in the record.
    pub keep_bodies: bool,
    /// How far `webhook-timestamp` may be from our clock.
    pub tolerance: Duration,
}

impl ReceiverOptions {
    /// A free port of 127.0.0.1, these secrets, no bodies kept.
    pub fn new(secrets: Vec<Key>) -> ReceiverOptions {
        ReceiverOptions {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            secrets,
            keep_bodies: false,
            tolerance: signature::TOLERANCE,
        }
    }
}

/// What a receiver does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reaction {
    /// This status, no body.
    Status(u16),
    /// This status with headers and a body.
    StatusWith {
        /// The status.
        status: u16,
        /// Names and values.
        headers: Vec<(String, String)>,
        /// The body.
        body: String,
    },
    /// Later, what follows. What the peer gives up meanwhile is not done.
    Delay(Duration, Box<Reaction>),
    /// No answer, until the peer goes or the receiver stops.
    Hang,
    /// The connection is closed without an answer.
    CutConnection,
}

type Script = dyn Fn(&Delivery) -> Reaction + Send + Sync;

/// A running receiver. Dropping it stops it.
pub struct Receiver {
    shared: Arc<Shared>,
    server: Server,
}

struct Shared {
    options: ReceiverOptions,
    state: Mutex<State>,
    changed: Condvar,
    script: Mutex<Arc<Script>>,
    /// Told of every request once it is answered, instead of keeping a record.
    printer: Option<Sender<Delivery>>,
}

#[derive(Default)]
struct State {
    record: Record,
    /// Connections of requests being worked on, by order.
    peers: HashMap<u64, Peer>,
    stopped: bool,
}

impl Receiver {
    /// Starts one that answers 200.
    ///
    /// # Errors
    /// `Io` when the address cannot be had.
    pub fn start(options: ReceiverOptions) -> Result<Receiver> {
        Receiver::start_with(options, None)
    }

    fn start_with(options: ReceiverOptions, printer: Option<Sender<Delivery>>) -> Result<Receiver> {
        let listen = options.listen;
        let record = Record::new(options.keep_bodies);
        let shared = Arc::new(Shared {
            options,
            state: Mutex::new(State { record, ..State::default() }),
            changed: Condvar::new(),
            script: Mutex::new(Arc::new(|_: &Delivery| Reaction::Status(200))),
            printer,
        });
        let handler = Arc::clone(&shared);
        let server =
            Server::start("receiver", listen, move |request, answer| handler.handle(request, answer))?;
        Ok(Receiver { shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// An endpoint URL on it; every path is the same to it.
    pub fn url(&self) -> String {
        format!("http://{}/hook", self.server.address())
    }

    /// From now on answers are made by `script`, called once a request, several at a time.
    pub fn answer(&self, script: impl Fn(&Delivery) -> Reaction + Send + Sync + 'static) {
        *locked(&self.shared.script) = Arc::new(script);
    }

    /// Closes the listening socket and cuts what is open, or listens again on the same port.
    ///
    /// # Errors
    /// `Io` when somebody else has taken the port meanwhile.
    pub fn refuse_connections(&self, refuse: bool) -> Result<()> {
        self.shared.change(|state| state.stopped = refuse);
        if refuse {
            self.server.stop();
            return Ok(());
        }
        self.server.start_again()
    }

    /// Stops for good; the record stays.
    pub fn stop(&self) {
        self.shared.change(|state| state.stopped = true);
        self.server.stop();
    }

    /// Looks at the record. `look` must not call the receiver.
    pub fn look<T>(&self, look: impl FnOnce(&Record) -> T) -> T {
        look(&self.shared.lock().record)
    }

    /// Waits until `condition` holds, looking after every request and answer; whether it did within `limit`.
    ///
    /// `condition` must not call the receiver.
    #[must_use]
    pub fn wait_until(&self, limit: Duration, mut condition: impl FnMut(&Record) -> bool) -> bool {
        let deadline = sys::now() + limit;
        let mut state = self.shared.lock();
        while !condition(&state.record) {
            let now = sys::now();
            if now >= deadline {
                return false;
            }
            state = self.shared.wait(state, deadline - now);
        }
        true
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    fn handle(&self, request: &Request, answer: Answer<'_>) {
        if request.method != "POST" {
            let _ = answer.send(405, &[("Allow", "POST")], b"webhooks are posted here\n");
            return;
        }
        let Ok(peer) = answer.peer() else { return };
        let delivery = self.read(request);
        let mut delivery = match self.printer {
            Some(_) => delivery,
            None => self.change(|state| {
                let State { record, peers, .. } = state;
                let still_open = |order| peers.get(&order).is_some_and(|peer: &Peer| !peer.gone());
                let delivery = record.arrived(delivery, still_open);
                peers.insert(delivery.order, peer);
                delivery
            }),
        };
        let script = Arc::clone(&*locked(&self.script));
        let (status, headers, body) = match self.settle(script(&delivery), &answer) {
            Some(Reaction::Status(status)) => (Some(status), Vec::new(), String::new()),
            Some(Reaction::StatusWith { status, headers, body }) => (Some(status), headers, body),
            _ => (None, Vec::new(), String::new()),
        };
        delivery.status = status;
        match &self.printer {
            // Nobody prints any more: we are being stopped.
            Some(printer) => drop(printer.send(delivery)),
            None => self.change(|state| {
                state.peers.remove(&delivery.order);
                state.record.answered(delivery.order, status, answer.peer_gone());
            }),
        }
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        match status {
            // The peer may be gone; the record says so.
            Some(status) => drop(answer.send(status, &headers, body.as_bytes())),
            None => answer.cut(),
        }
    }

    fn read(&self, request: &Request) -> Delivery {
        let text = |name: &str| request.header(name).unwrap_or_default().to_owned();
        let options = &self.options;
        let now = sys::wall().as_second();
        Delivery {
            order: 0,
            received_at: sys::now(),
            webhook_id: text("webhook-id"),
            timestamp: text("webhook-timestamp").parse().ok(),
            attempt: text("hookd-attempt").parse().ok(),
            webhook: text("hookd-webhook"),
            replay: text("hookd-replay") == "true",
            path: request.path.clone(),
            headers: request.headers.clone(),
            events: Event::read_all(&request.body),
            verified: signature::verify(
                &options.secrets,
                &request.headers,
                &request.body,
                now,
                options.tolerance,
            ),
            body: request.body.clone(),
            concurrency: 0,
            status: None,
            peer_gone: false,
        }
    }

    /// Waits as a reaction says; what is to be done then, `None` when nobody waits for it any more.
    fn settle(&self, mut reaction: Reaction, answer: &Answer<'_>) -> Option<Reaction> {
        loop {
            let deadline = match &reaction {
                Reaction::Delay(delay, _) => Some(sys::now() + *delay),
                Reaction::Hang => None,
                _ => return Some(reaction),
            };
            let mut state = self.lock();
            loop {
                let now = sys::now();
                if deadline.is_some_and(|deadline| now >= deadline) {
                    break;
                }
                if state.stopped || answer.peer_gone() {
                    return None;
                }
                let left = deadline.map_or(PEER_CHECK, |deadline| deadline - now);
                state = self.wait(state, left.min(PEER_CHECK));
            }
            drop(state);
            if let Reaction::Delay(_, then) = reaction {
                reaction = *then;
            }
        }
    }
}

/// What `couch-hookd receive` does.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// Address to listen on.
    pub listen: SocketAddr,
    /// Secrets to verify with; without one signatures are not looked at.
    pub secrets: Vec<Key>,
    /// Status of every answer.
    pub answer: u16,
    /// Document whose events are answered with 422 instead.
    pub refuse: Option<String>,
    /// One JSON object a line instead of text.
    pub json: bool,
}

/// Runs a receiver that prints a line for every request, until `stop` has a message or its sender is gone.
///
/// Text: `200 document.updated orders/order:17 3-9f… attempt 1 signature ok`. JSON:
/// `{"time":…,"status":200,"webhook_id":…,"attempt":1,"signature":"ok","events":[…],"headers":{…},"body":"…"}`,
/// headers in lower case, `body_base64` instead of `body` when it is not UTF-8. Nothing is kept.
/// Exit code: 0, or 1 when a signature was wrong or the output failed.
///
/// # Errors
/// `Io` when the address cannot be had.
pub fn run_receive<T>(options: &ReceiveOptions, out: &mut dyn Write, stop: &Inbox<T>) -> Result<u8> {
    let (printer, printed) = bounded(PRINT_QUEUE);
    let receiver_options =
        ReceiverOptions { listen: options.listen, ..ReceiverOptions::new(options.secrets.clone()) };
    let receiver = Receiver::start_with(receiver_options, Some(printer))?;
    let (answer, refuse) = (options.answer, options.refuse.clone());
    receiver.answer(move |delivery| {
        let refused = delivery.events.iter().any(|event| Some(&event.data.id) == refuse.as_ref());
        Reaction::Status(if refused { 422 } else { answer })
    });
    let verifying = !options.secrets.is_empty();
    let mut exit = 0;
    let written = if options.json {
        Ok(())
    } else {
        let how =
            if verifying { "signatures are verified" } else { "no secret: signatures are not looked at" };
        writeln!(out, "receiving on {} ({how})", receiver.url()).and_then(|()| out.flush())
    };
    let mut failed = written.is_err();
    let mut show = |delivery: &Delivery| {
        if verifying && delivery.verified.is_err() {
            exit = 1;
        }
        let line = if options.json { json_line(delivery) } else { text_line(delivery, verifying) };
        print(out, &line).is_err()
    };
    while !failed {
        select! {
            recv(stop) -> _ => break,
            recv(printed) -> delivery => match delivery {
                Ok(delivery) => failed = show(&delivery),
                Err(_) => break,
            },
        }
    }
    // What has been answered is printed, too.
    while let (false, Ok(delivery)) = (failed, printed.try_recv()) {
        failed = show(&delivery);
    }
    // Whoever still waits to be printed must not hold up the end.
    drop(printed);
    receiver.stop();
    Ok(if failed { 1 } else { exit })
}

fn print(out: &mut dyn Write, line: &str) -> io::Result<()> {
    writeln!(out, "{line}")?;
    out.flush()
}

/// A text of somebody else's, fit for a terminal: control characters are escaped.
fn plain(text: &str) -> String {
    text.chars()
        .flat_map(|letter| {
            if letter.is_control() { letter.escape_default().collect::<Vec<_>>() } else { vec![letter] }
        })
        .collect()
}

fn text_line(delivery: &Delivery, verifying: bool) -> String {
    let status = delivery.status.map_or("---".to_owned(), |status| status.to_string());
    let mut told: Vec<String> = delivery
        .events
        .iter()
        .map(|event| match &event.data {
            // An event about couch-hookd itself has no document.
            data if data.id.is_empty() => event.event_type.clone(),
            data => format!("{} {}/{} {}", event.event_type, data.db, data.id, data.rev),
        })
        .collect();
    if told.is_empty() {
        told.push(format!("{} bytes", delivery.body.len()));
    }
    let attempt = delivery.attempt.map_or(String::new(), |attempt| format!(" attempt {attempt}"));
    let replay = if delivery.replay { " replay" } else { "" };
    let signature = match &delivery.verified {
        _ if !verifying => String::new(),
        Ok(()) => " signature ok".to_owned(),
        Err(why) => format!(" signature WRONG: {why}"),
    };
    plain(&format!("{status} {}{attempt}{replay}{signature}", told.join(", ")))
}

fn json_line(delivery: &Delivery) -> String {
    let events: Vec<_> = delivery
        .events
        .iter()
        .map(|event| {
            let data = &event.data;
            json!({"id": event.id, "type": event.event_type, "db": data.db, "doc_id": data.id, "rev": data.rev})
        })
        .collect();
    let headers: HashMap<String, &str> =
        delivery.headers.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.as_str())).collect();
    let mut line = json!({
        "time": sys::wall().to_string(),
        "status": delivery.status,
        "webhook_id": delivery.webhook_id,
        "attempt": delivery.attempt,
        "replay": delivery.replay,
        "signature": delivery.verified.as_ref().map_or_else(ToString::to_string, |()| "ok".to_owned()),
        "events": events,
        "headers": headers,
    });
    match std::str::from_utf8(&delivery.body) {
        Ok(body) => line["body"] = json!(body),
        Err(_) => {
            use base64::Engine;
            line["body_base64"] = json!(base64::engine::general_purpose::STANDARD.encode(&delivery.body));
        }
    }
    line.to_string()
}
