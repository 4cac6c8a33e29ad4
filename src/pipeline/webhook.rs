//! One attempt: a signed request to the endpoint, and what came of it.
//!
//! Guarantees that redirects are not followed and no proxy of the environment is used; that the text kept of an
//! answer holds none of our secrets; and that a pooled connection which died before any answer is tried once
//! more at once. Whom an outcome suspects is left to `pure::endpoint`.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectionDetails, Connector, DefaultConnector, Transport};
use ureq::{Agent, Timeout};

use crate::config;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::dispatch::Attempt;
use crate::pure::endpoint::Outcome;
use crate::pure::message::{Event, Telling};
use crate::pure::retry;
use crate::pure::secret::Secret;
use crate::pure::signature::{self, Key};
use crate::pure::url::Url;
use crate::{sys, tls};

/// Of an answer's body, in bytes: read to keep the connection, kept for nobody.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Of an answer's text in a dead letter, in characters.
const ANSWER_CHARS: usize = 300;
/// Idle connections live this long; most servers close theirs after 5 to 75 s.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// What came of one attempt.
#[derive(Debug, Clone)]
pub struct Answer {
    /// For the decision.
    pub outcome: Outcome,
    /// For people: the start of the answer or the error, without our secrets.
    pub text: String,
}

/// A webhook's endpoint: knows how to ask, not when.
pub struct Endpoint {
    agent: Agent,
    url: Secret,
    authorization: Option<Secret>,
    keys: Vec<Key>,
    headers: Vec<(String, Secret)>,
    webhook: String,
    user_agent: String,
    /// Answers so far: only then can a connection be a pooled one.
    n_answers: AtomicU64,
}

impl Endpoint {
    /// Prepares everything; sends nothing.
    ///
    /// # Errors
    /// `Config` for a URL, secret or CA file that cannot be used; the configuration was checked, files may have
    /// changed since.
    pub fn new(webhook: &config::Webhook) -> Result<Endpoint> {
        let fault = |found: String| Error::new(Kind::Config, found);
        let url = Url::parse(webhook.endpoint.expose()).map_err(fault)?;
        let authorization = url.userinfo().map_err(fault)?.map(|(name, password)| {
            use base64::Engine;
            let password = password.as_ref().map_or("", Secret::expose);
            let both = base64::engine::general_purpose::STANDARD.encode(format!("{name}:{password}"));
            Secret::new(format!("Basic {both}"))
        });
        let keys = webhook.secrets.iter().map(|secret| Key::parse(secret.expose())).collect::<Result<_, _>>();
        Ok(Endpoint {
            agent: agent_config(webhook, &url)?.new_agent(),
            url: Secret::new(url.without_userinfo()),
            authorization,
            keys: keys.map_err(fault).context(|| "secret".to_owned())?,
            headers: webhook.headers.clone(),
            webhook: webhook.name.clone(),
            user_agent: concat!("couch-hookd/", env!("CARGO_PKG_VERSION")).to_owned(),
            n_answers: AtomicU64::new(0),
        })
    }

    /// Sends one event and waits for the answer.
    pub fn deliver(&self, telling: &Telling, attempt: &Attempt) -> Answer {
        let body = telling.body(&attempt.event);
        let first = self.send(&attempt.event, attempt.attempt, attempt.replay, &body);
        match first {
            // A pooled connection that the other side had closed: noise, unless it happens again.
            Err(ureq::Error::Io(error)) if is_dead_socket(error.kind()) && self.was_answered() => {
                self.judge(self.send(&attempt.event, attempt.attempt, attempt.replay, &body))
            }
            result => self.judge(result),
        }
    }

    /// Ends every request under way and refuses later ones: outcomes become `Broken` at once.
    pub fn shut_down(&self) {
        self.agent.clone().shutdown();
    }

    fn was_answered(&self) -> bool {
        self.n_answers.load(Ordering::Relaxed) > 0
    }

    fn send(
        &self,
        event: &Event,
        attempt: u32,
        replay: bool,
        body: &[u8],
    ) -> Result<(u16, Option<Duration>, Vec<u8>), ureq::Error> {
        let id = event.id.to_string();
        let timestamp = sys::wall().as_second();
        let mut request = self
            .agent
            .post(self.url.expose())
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, &self.user_agent)
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp.to_string())
            .header("hookd-webhook", &self.webhook)
            .header("hookd-attempt", attempt.to_string());
        if let Some(signature) = signature::sign(&self.keys, &id, timestamp, body) {
            request = request.header("webhook-signature", signature);
        }
        if replay {
            request = request.header("hookd-replay", "true");
        }
        let own = |name: &str| self.headers.iter().any(|(header, _)| header == name);
        if let Some(authorization) = self.authorization.as_ref().filter(|_| !own("authorization")) {
            request = request.header(AUTHORIZATION, authorization.expose());
        }
        for (name, value) in &self.headers {
            request = request.header(name.as_str(), value.expose());
        }
        let mut response = request.send(body)?;
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

    fn judge(&self, result: Result<(u16, Option<Duration>, Vec<u8>), ureq::Error>) -> Answer {
        match result {
            Ok((status, retry_after, body)) => {
                let text = self.redacted(&String::from_utf8_lossy(&body));
                Answer { outcome: Outcome::Status { status, retry_after }, text }
            }
            Err(error) => Answer { outcome: outcome_of(&error), text: self.redacted(&error.to_string()) },
        }
    }

    /// The start of a text in one line, without anything of ours that must not leave.
    fn redacted(&self, text: &str) -> String {
        let mut text: String = text
            .chars()
            .take(8 * ANSWER_CHARS)
            .map(|char| if char.is_control() { ' ' } else { char })
            .collect();
        let headers = self.headers.iter().map(|(_, value)| value.expose());
        let authorization = self.authorization.iter().map(Secret::expose);
        for secret in headers.chain(authorization).chain([self.url.expose()]) {
            if secret.len() >= 4 {
                text = text.replace(secret, "***");
            }
        }
        text.trim().chars().take(ANSWER_CHARS).collect()
    }
}

/// Connects to a webhook's endpoint as a delivery would, TLS included, and hangs up before anything is sent.
///
/// # Errors
/// `Config` as [`Endpoint::new`]; `Unreachable` or `Timeout` with what failed: the name, the connection, TLS.
pub fn reach(webhook: &config::Webhook) -> Result<()> {
    let url = Url::parse(webhook.endpoint.expose()).map_err(|found| Error::new(Kind::Config, found))?;
    let connector = DefaultConnector::default().chain(HangUp);
    let agent = Agent::with_parts(agent_config(webhook, &url)?, connector, DefaultResolver::default());
    match agent.head(url.origin()).call() {
        Err(ureq::Error::Other(other)) if other.is::<Reached>() => Ok(()),
        Err(ureq::Error::Timeout(_)) => Err(Error::new(Kind::Timeout, "no connection in time")),
        Err(error) => {
            // "io: Connection refused (os error 111)": the number is noise.
            let text = error.to_string();
            let text = text.split(" (os error").next().unwrap_or_default();
            Err(Error::new(Kind::Unreachable, text.strip_prefix("io: ").unwrap_or(text)))
        }
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
        .max_idle_connections(webhook.concurrency)
        .max_idle_connections_per_host(webhook.concurrency)
        .max_idle_age(IDLE_MAX);
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

/// What an error of the client says about the endpoint.
fn outcome_of(error: &ureq::Error) -> Outcome {
    match error {
        ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => Outcome::Unreachable,
        ureq::Error::Timeout(_) => Outcome::Timeout,
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_) => Outcome::Unreachable,
        ureq::Error::Io(error) => match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Outcome::Timeout,
            kind if is_dead_socket(kind) => Outcome::Broken,
            // Refused, no route, no name, a certificate that is not believed: nobody to talk to.
            _ => Outcome::Unreachable,
        },
        _ => Outcome::Broken,
    }
}
