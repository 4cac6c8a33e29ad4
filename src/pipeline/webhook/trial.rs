//! One request to an endpoint that is watched on its way: what each step took, and what came back.
//!
//! Guarantees the way of a delivery: the same names, guard, sockets, TLS, headers and signature, but a connection of
//! its own. Leaves to others what is sent and what is made of the answer.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::header::{CONTENT_TYPE, HeaderMap, USER_AGENT};
use http::{StatusCode, Uri};
use jiff::SignedDuration;
use ureq::Agent;
use ureq::config::Config;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{ConnectionDetails, Connector, NextTimeout, RustlsConnector, Transport};

use crate::config;
use crate::couch::leases::Hold;
use crate::error::{Error, Kind, Result};
use crate::names::Names;
use crate::pipeline::webhook::{
    ANSWER_BYTES_MAX, ANSWER_CHARS, Endpoint, HOOKD_ATTEMPT, HOOKD_WEBHOOK, WEBHOOK_ID, WEBHOOK_SIGNATURE,
    WEBHOOK_TIMESTAMP, agent_config, error_text,
};
use crate::pure::retry;
use crate::pure::url::Url;
use crate::socket::Plain;
use crate::sys;

/// A step on the way, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The name was looked up, and its addresses judged.
    Name,
    /// A connection was made.
    Connect,
    /// TLS was agreed on. Not over `http`.
    Tls,
    /// The request was sent, and the head of the answer came.
    Answer,
}

impl Step {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Step::Name => "name",
            Step::Connect => "connect",
            Step::Tls => "tls",
            Step::Answer => "answer",
        }
    }
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Trial {
    /// Steps that were done, and what each took.
    pub steps: Vec<(Step, Duration)>,
    /// To which the name was resolved and which the guard let through; empty when there was none.
    pub addresses: Vec<SocketAddr>,
    /// The answer, or the step that failed and why.
    pub outcome: Result<Answer, (Step, String)>,
    /// The request for a shell, without anything secret: a path, a query and headers' values stand as `***`.
    pub curl: String,
}

/// The answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// The start of its body in one line, without our secrets.
    pub text: String,
    /// How far the receiver's clock is ahead of ours, when its answer has a date; good to a second or two.
    pub clock_ahead: Option<SignedDuration>,
}

/// Sends one request, as the first attempt of the event `id`.
///
/// # Errors
/// `Config` as [`Endpoint::new`].
pub fn run(webhook: &config::Webhook, id: &str, body: &[u8]) -> Result<Trial> {
    let endpoint = Endpoint::new(webhook, &Hold::unlimited())?;
    let url = Url::parse(webhook.endpoint.expose()).map_err(|found| Error::new(Kind::Config, found))?;
    let watch =
        Watch(Arc::new(Mutex::new(Seen { begun: sys::now(), steps: Vec::new(), addresses: Vec::new() })));
    let connector = Plain.chain(watch.mark(Step::Connect)).chain(RustlsConnector::default());
    let resolver = Names::guarded(webhook.guard.clone());
    let agent = Agent::with_parts(
        agent_config(webhook, &url)?,
        connector.chain(watch.mark(Step::Tls)),
        Watched { names: resolver, watch: watch.clone() },
    );
    let request = endpoint
        .request(id, 1, body)
        .map_err(|error| Error::new(Kind::Config, format!("not a request: {error}")))?;
    let curl = curl(&url, request.headers(), body);
    watch.look(|seen| seen.begun = sys::now());
    let result = agent.run(request);
    let answered = sys::wall();
    let outcome = match result {
        Ok(mut response) => {
            watch.done(Step::Answer);
            let date = response.headers().get("date").and_then(|date| retry::http_date(date.to_str().ok()?));
            let status = response.status();
            // One that breaks off changes nothing about the status.
            let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
            let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
            Ok(Answer {
                status,
                text: endpoint.redactor.redact(&text, ANSWER_CHARS),
                clock_ahead: date.map(|date| date.duration_since(answered)),
            })
        }
        Err(error) => Err(endpoint.redactor.redact(&error_text(&error), ANSWER_CHARS)),
    };
    let Seen { mut steps, addresses, .. } = watch.look(std::mem::take);
    if !url.is_https() {
        steps.retain(|(step, _)| *step != Step::Tls);
    }
    let failed_at = match steps.last().map(|(step, _)| *step) {
        None => Step::Name,
        Some(Step::Name) => Step::Connect,
        Some(Step::Connect) if url.is_https() => Step::Tls,
        Some(_) => Step::Answer,
    };
    Ok(Trial { steps, addresses, outcome: outcome.map_err(|why| (failed_at, why)), curl })
}

/// The same request for a shell; what may be secret stands as `***`.
fn curl(url: &Url, headers: &HeaderMap, body: &[u8]) -> String {
    /// Ours, none of which holds a secret: a signature proves that one knows it.
    const SHOWN: [http::HeaderName; 7] = [
        CONTENT_TYPE,
        USER_AGENT,
        WEBHOOK_ID,
        WEBHOOK_TIMESTAMP,
        WEBHOOK_SIGNATURE,
        HOOKD_WEBHOOK,
        HOOKD_ATTEMPT,
    ];
    let mut line = "curl -i".to_owned();
    let mut n_seen = Vec::new();
    for (name, value) in headers {
        // An operator's header may bear the name of one of ours; ours comes first.
        let ours = SHOWN.contains(name) && !n_seen.contains(&name);
        n_seen.push(name);
        let value = if ours { value.to_str().unwrap_or("***") } else { "***" };
        line += &format!(" -H {}", quoted(&format!("{name}: {value}")));
    }
    let address = if url.has_path() { format!("{}/***", url.origin()) } else { url.origin() };
    line + &format!(" --data-binary {} {}", quoted(&String::from_utf8_lossy(body)), quoted(&address))
}

/// One word of a shell's.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// What was seen so far.
#[derive(Debug)]
struct Seen {
    begun: Instant,
    steps: Vec<(Step, Duration)>,
    addresses: Vec<SocketAddr>,
}

impl Default for Seen {
    fn default() -> Seen {
        Seen { begun: sys::now(), steps: Vec::new(), addresses: Vec::new() }
    }
}

#[derive(Debug, Clone)]
struct Watch(Arc<Mutex<Seen>>);

impl Watch {
    fn look<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A step is done now; the next one begins.
    fn done(&self, step: Step) {
        let now = sys::now();
        self.look(|seen| {
            seen.steps.push((step, now.saturating_duration_since(seen.begun)));
            seen.begun = now;
        });
    }

    fn mark(&self, step: Step) -> Mark {
        Mark { watch: self.clone(), step }
    }
}

/// Looks names up as [`Names`] does.
#[derive(Debug)]
struct Watched {
    names: Names,
    watch: Watch,
}

impl Resolver for Watched {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let addresses = self.names.resolve(uri, config, timeout)?;
        self.watch.done(Step::Name);
        self.watch.look(|seen| seen.addresses = addresses.iter().copied().collect());
        Ok(addresses)
    }
}

/// In a chain of connectors: what stands before it has done its step.
#[derive(Debug)]
struct Mark {
    watch: Watch,
    step: Step,
}

impl<In: Transport> Connector<In> for Mark {
    type Out = In;

    fn connect(&self, _: &ConnectionDetails<'_>, made: Option<In>) -> Result<Option<In>, ureq::Error> {
        self.watch.done(self.step);
        Ok(made)
    }
}
