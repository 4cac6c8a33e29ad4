//! One attempt: a signed request to the endpoint, and what came of it.
//!
//! Guarantees that redirects are not followed and no proxy of the environment is used; that the text kept of an
//! answer holds none of our secrets; and that a pooled connection which died before any answer is tried once
//! more at once; and that nothing is sent while the webhook is not ours to tell, which is asked immediately before each
//! write to a connection. Whom an outcome suspects is left to `pure::endpoint`.

pub mod trial;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Request, Uri};
use ureq::unversioned::transport::{ConnectionDetails, Connector, Transport};
use ureq::{Agent, Timeout};

use crate::config;
use crate::couch::leases::Hold;
use crate::error::{Context, Error, Kind, Result};
use crate::names::{Names, Refused};
use crate::pipeline::agents::Agents;
use crate::pure::dispatch::Attempt;
use crate::pure::dispatch::batches::Batch;
use crate::pure::endpoint::Outcome;
use crate::pure::format;
use crate::pure::message::{Telling, WebhookId};
use crate::pure::redact::Redactor;
use crate::pure::retry;
use crate::pure::secret::Secret;
use crate::pure::signature::{self, Key};
use crate::pure::url::Url;
use crate::socket::{Gate, Sockets};
use crate::{sys, tls};

/// Of an answer's body, in bytes: read to keep the connection, kept for nobody.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Of an answer's text in a dead letter, in characters.
const ANSWER_CHARS: usize = 300;
/// Idle connections live this long; most servers close theirs after 5 to 75 s.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// Buffers of one connection, in each direction, in bytes: the longest headers that are read (servers allow 8 KiB by
/// habit), and a write for most payloads. `ureq`'s own are eight times as long, and every connection has two.
const BUFFER_BYTES: usize = 16 * 1024;

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const HOOKD_WEBHOOK: HeaderName = HeaderName::from_static("hookd-webhook");
const HOOKD_ATTEMPT: HeaderName = HeaderName::from_static("hookd-attempt");
const HOOKD_REPLAY: HeaderName = HeaderName::from_static("hookd-replay");

/// What came of one attempt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// For the decision.
    pub outcome: Outcome,
    /// For people: the start of the answer or the error, without our secrets.
    pub text: String,
}

/// What a worker is given to do.
#[derive(Debug)]
pub enum Job {
    /// One event, and how its database is told of.
    One(Attempt, Arc<Telling>),
    /// Several in one request; of each, how its database is told of.
    Batch(Batch, Vec<Arc<Telling>>),
}

impl Job {
    /// Names it in its outcome.
    pub fn token(&self) -> u64 {
        match self {
            Job::One(attempt, _) => attempt.token,
            Job::Batch(batch, _) => batch.token,
        }
    }
}

/// A webhook's endpoint: knows how to ask, not when.
pub struct Endpoint {
    agents: Agents,
    names: Names,
    /// Without userinfo; its path may be a secret all the same.
    uri: Uri,
    /// What every request carries.
    headers: HeaderMap,
    /// Of a request with several events, in the place of the one among `headers`.
    batch_content_type: &'static str,
    keys: Vec<Key>,
    /// What must not come back to us in an answer's text.
    redactor: Redactor,
    /// Whether the webhook is ours to tell.
    hold: Arc<Hold>,
    /// Answers so far: only then can a connection be a pooled one.
    n_answers: AtomicU64,
}

impl Endpoint {
    /// Prepares everything; sends nothing, and later nothing while `hold` is not valid.
    ///
    /// # Errors
    /// `Config` for a URL, secret or CA file that cannot be used; the configuration was checked, files may have
    /// changed since.
    pub fn new(webhook: &config::Webhook, hold: &Arc<Hold>) -> Result<Endpoint> {
        let fault = |found: String| Error::new(Kind::Config, found);
        let url = Url::parse(webhook.endpoint.expose()).map_err(fault)?;
        let keys = webhook.secrets.iter().map(|secret| Key::parse(secret.expose())).collect::<Result<_, _>>();
        let names = Names::guarded(webhook.guard.clone());
        let address = url.without_userinfo();
        let uri = address.parse().map_err(|error| fault(format!("not a URL: {error}")))?;
        let (headers, secrets) = headers(webhook, &url).map_err(fault)?;
        let redactor = Redactor::new(secrets.iter().chain(&webhook.secrets).map(Secret::expose))
            .and_url(webhook.endpoint.expose())
            .and_url(&address);
        let asked = Arc::clone(hold);
        let sockets = Sockets::gated(Gate(Arc::new(move || asked.is_valid())));
        Ok(Endpoint {
            agents: Agents::new(agent_config(webhook, &url)?, names.clone(), sockets),
            hold: Arc::clone(hold),
            names,
            uri,
            headers,
            batch_content_type: webhook.format.batch_content_type(),
            keys: keys.map_err(fault).context(|| "secret".to_owned())?,
            redactor,
            n_answers: AtomicU64::new(0),
        })
    }

    /// Sends one event, or several at once, and waits for the answer. `None` when it was not sent, or not to its end,
    /// because the webhook is not ours to tell now.
    pub fn deliver(&self, job: &Job) -> Option<Answer> {
        if !self.hold.is_valid() {
            return None;
        }
        let (id, body, attempt, replay, content_type) = match job {
            Job::One(one, telling) => (one.event.id, telling.body(&one.event), one.attempt, one.replay, None),
            Job::Batch(batch, tellings) => {
                let parts = tellings.iter().zip(&batch.parts);
                let parts = parts.map(|(telling, part)| (&**telling, &*part.event));
                let content_type = self.batch_content_type;
                (batch.id, format::batch_body(batch.id, parts), batch.attempt, false, Some(content_type))
            }
        };
        let send = || self.send(id, attempt, replay, content_type, &body);
        let result = match send() {
            // A pooled connection that the other side had closed: noise, unless it happens again.
            Err(ureq::Error::Io(error)) if is_dead_socket(error.kind()) && self.was_answered() => send(),
            result => result,
        };
        // What failed then says nothing about the endpoint.
        (result.is_ok() || self.hold.is_valid()).then(|| self.judge(result))
    }

    /// Ends every request under way and refuses later ones: outcomes become `Broken` at once.
    pub fn shut_down(&self) {
        self.agents.shut_down();
    }

    fn was_answered(&self) -> bool {
        self.n_answers.load(Ordering::Relaxed) > 0
    }

    fn send(
        &self,
        id: WebhookId,
        attempt: u32,
        replay: bool,
        content_type: Option<&'static str>,
        body: &[u8],
    ) -> Result<(u16, Option<Duration>, Vec<u8>), ureq::Error> {
        let mut request = self.request(&id.to_string(), attempt, body)?;
        if let Some(content_type) = content_type {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        if replay {
            request.headers_mut().insert(HOOKD_REPLAY, HeaderValue::from_static("true"));
        }
        // To the end of the answer's body: only then the connection is free.
        self.agents.lend(|agent| self.ask(agent, request))
    }

    fn ask(
        &self,
        agent: &Agent,
        request: Request<&[u8]>,
    ) -> Result<(u16, Option<Duration>, Vec<u8>), ureq::Error> {
        let mut response = agent.run(request)?;
        self.n_answers.fetch_add(1, Ordering::Relaxed);
        let status = response.status().as_u16();
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let retry_after =
            text("retry-after").and_then(|after| retry::retry_after(after, text("date"), sys::wall()));
        // A body that is too long, or breaks off, changes nothing about the status.
        let body =
            response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec().unwrap_or_default();
        Ok((status, retry_after, body))
    }

    /// A request with all its headers, signed for this moment.
    fn request<'a>(&self, id: &str, attempt: u32, body: &'a [u8]) -> Result<Request<&'a [u8]>, ureq::Error> {
        let timestamp = sys::wall().as_second();
        let mut request = Request::post(self.uri.clone()).body(body)?;
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        headers.insert(WEBHOOK_ID, HeaderValue::try_from(id).expect("it is hex digits"));
        headers.insert(WEBHOOK_TIMESTAMP, timestamp.into());
        headers.insert(HOOKD_ATTEMPT, attempt.into());
        if let Some(signature) = signature::sign(&self.keys, id, timestamp, body) {
            headers.insert(WEBHOOK_SIGNATURE, HeaderValue::try_from(signature).expect("it is base64"));
        }
        Ok(request)
    }

    fn judge(&self, result: Result<(u16, Option<Duration>, Vec<u8>), ureq::Error>) -> Answer {
        match result {
            Ok((status, retry_after, body)) => {
                // Nobody reads what a delivery was answered.
                let text = match status {
                    200..=299 => String::new(),
                    _ => self.redactor.redact(&String::from_utf8_lossy(&body), ANSWER_CHARS),
                };
                Answer { outcome: Outcome::Status { status, retry_after }, text }
            }
            Err(error) => {
                let outcome = outcome_of(&error);
                if outcome == Outcome::Unreachable {
                    self.names.forget();
                }
                Answer { outcome, text: self.redactor.redact(&error_text(&error), ANSWER_CHARS) }
            }
        }
    }
}

/// What every request carries, and what of it is secret.
fn headers(webhook: &config::Webhook, url: &Url) -> Result<(HeaderMap, Vec<Secret>), String> {
    let value = |name: &str, text: &str| {
        let mut value = HeaderValue::try_from(text)
            .map_err(|_| format!("header.{name}: expected what a header can hold"))?;
        value.set_sensitive(true);
        Ok::<_, String>(value)
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(webhook.format.content_type()));
    let user_agent = concat!("couch-hookd/", env!("CARGO_PKG_VERSION"));
    headers.insert(USER_AGENT, HeaderValue::from_static(user_agent));
    headers.insert(HOOKD_WEBHOOK, value("hookd-webhook", &webhook.name)?);
    let mut secrets = Vec::new();
    if let Some((name, password)) = url.userinfo()? {
        use base64::Engine;
        let text = password.as_ref().map_or("", Secret::expose);
        let both = base64::engine::general_purpose::STANDARD.encode(format!("{name}:{text}"));
        let login = Secret::new(format!("Basic {both}"));
        headers.insert(AUTHORIZATION, value("authorization", login.expose())?);
        secrets.extend([login].into_iter().chain(password));
    }
    for (name, secret) in &webhook.headers {
        let header =
            HeaderName::try_from(name).map_err(|_| format!("header.{name}: expected a header's name"))?;
        let value = value(name, secret.expose())?;
        // One of the operator's takes the place of the login in the URL; beside ours it is one more.
        match header == AUTHORIZATION {
            true => headers.insert(header, value).is_some(),
            false => headers.append(header, value),
        };
        secrets.push(secret.clone());
    }
    Ok((headers, secrets))
}

/// Connects to a webhook's endpoint as a delivery would, TLS included, and hangs up before anything is sent.
///
/// # Errors
/// `Config` as [`Endpoint::new`]; `Unreachable` or `Timeout` with what failed: the name, the connection, TLS.
pub fn reach(webhook: &config::Webhook) -> Result<()> {
    let url = Url::parse(webhook.endpoint.expose()).map_err(|found| Error::new(Kind::Config, found))?;
    let connector = Sockets::default().chain(HangUp);
    let names = Names::guarded(webhook.guard.clone());
    let agent = Agent::with_parts(agent_config(webhook, &url)?, connector, names);
    match agent.head(url.origin()).call() {
        Err(ureq::Error::Other(other)) if other.is::<Reached>() => Ok(()),
        Err(ureq::Error::Timeout(_)) => Err(Error::new(Kind::Timeout, "no connection in time")),
        Err(error) => Err(Error::new(Kind::Unreachable, error_text(&error))),
        Ok(_) => Err(Error::new(Kind::Malformed, "an answer to a request that was never sent")),
    }
}

/// Last in a chain of connectors: gives up the connection that the others made, so that no request follows. Uses the
/// part of `ureq`'s interface that may change with a minor version; then this stops to build, no more.
#[derive(Debug)]
struct HangUp;

impl<In: Transport> Connector<In> for HangUp {
    type Out = In;

    fn connect(&self, _: &ConnectionDetails<'_>, made: Option<In>) -> Result<Option<In>, ureq::Error> {
        Err(made.map_or(ureq::Error::ConnectionFailed, |_| ureq::Error::Other(Box::new(Reached))))
    }
}

/// How [`HangUp`] says that there was a connection.
#[derive(Debug)]
struct Reached;

impl std::fmt::Display for Reached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("reached")
    }
}

impl std::error::Error for Reached {}

fn agent_config(webhook: &config::Webhook, url: &Url) -> Result<ureq::config::Config> {
    let agent = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .proxy(None)
        .timeout_global(Some(webhook.timeout))
        .timeout_connect(Some(webhook.connect_timeout.min(webhook.timeout)))
        .max_idle_connections(1)
        .max_idle_connections_per_host(1)
        .max_idle_age(IDLE_MAX)
        .input_buffer_size(BUFFER_BYTES)
        .output_buffer_size(BUFFER_BYTES);
    Ok(match url.is_https() {
        true => agent.tls_config(tls::settings(webhook.ca_file.as_deref())?).build(),
        false => agent.build(),
    })
}

fn is_dead_socket(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::UnexpectedEof
            | ErrorKind::NotConnected
    )
}

/// `io: Connection refused (os error 111)` without what is noise: `connection refused`.
fn error_text(error: &ureq::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let bare = ["io: ", "other: "].iter().find_map(|class| text.strip_prefix(class));
    let mut chars = bare.unwrap_or(text).chars();
    chars.next().map(|first| first.to_ascii_lowercase()).into_iter().chain(chars).collect()
}

/// What an error of the client says about the endpoint.
fn outcome_of(error: &ureq::Error) -> Outcome {
    match error {
        ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => Outcome::Unreachable,
        ureq::Error::Timeout(_) => Outcome::Timeout,
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_) => Outcome::Unreachable,
        ureq::Error::Other(error) if error.is::<Refused>() => Outcome::Unreachable,
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
            kind if is_dead_socket(kind) => Outcome::Broken,
            // Refused, no route, no name, a certificate that is not believed: nobody to talk to.
            _ => Outcome::Unreachable,
        },
        _ => Outcome::Broken,
    }
}
