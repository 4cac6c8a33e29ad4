//! One CouchDB server: login, timeouts, and answers turned into values or errors of the right kind.
//!
//! Guarantees that no request is sent with a login that was refused a moment ago, that no secret stands in an
//! error, that redirects and environment proxies are never followed, that no read waits for ever, and that
//! [`Server::stop`] ends everything under way. Leaves to others what the answers mean.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use base64::Engine;
use http::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config;
use crate::couch::gate::Gate;
use crate::couch::refusal::{Refusal, from_json, login_verdict};
use crate::error::{Context, Error, Kind, Result};
use crate::names::{self, Names};
use crate::pure::login::Verdict;
use crate::tls;

/// Connecting, DNS and TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest silence within an ordinary answer.
const SILENCE: Duration = Duration::from_secs(60);
/// The longest ordinary answer: `max_document_size` is 8 MB since 3.0, 1.x and 2.x have no limit.
const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How much of an error's body is read.
const ERROR_BYTES_MAX: u64 = 64 * 1024;
/// Idle connections kept for ordinary requests.
const N_IDLE_MAX: usize = 4;
/// Buffers of one connection: a feed's rows are read in pieces of this many bytes at most.
const BUFFER_BYTES: usize = 64 * 1024;

/// A CouchDB server with our login. Cheap to clone; all clones are one server with one login gate. Other credentials
/// are another server.
#[derive(Clone)]
pub struct Server {
    shared: Arc<Shared>,
}

struct Shared {
    base_url: String,
    username: Option<String>,
    /// Value of `authorization`, a secret.
    authorization: Option<http::HeaderValue>,
    agents: AgentSettings,
    agent: ureq::Agent,
    gate: Gate,
    /// Lines to be woken by `stop`; `None` once stopped.
    lines: Mutex<Option<Vec<Weak<LineShared>>>>,
    /// One mark is written at a time (`couch::local_docs`): 2.x and 3.x let the second of two first writes win.
    mark_writing: Mutex<()>,
}

#[derive(Clone)]
struct AgentSettings {
    tls: Option<ureq::tls::TlsConfig>,
}

/// An answer with a status of 200 to 299.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The body, whole.
    pub body: Vec<u8>,
    /// The server's clock, from `date`.
    pub date: Option<jiff::Timestamp>,
}

/// What CouchDB says after a document was written.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Written {
    /// The new revision.
    pub rev: String,
}

/// What `GET /` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// `1.7.1`.
    pub version: String,
    /// The server's id; 2.x and a fresh 3.x node may have none.
    pub uuid: Option<String>,
    /// Whose rules hold.
    pub generation: Generation,
}

/// Whose rules a server follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Generation {
    /// CouchDB 1.x and BigCouch: no selectors; on 1.x integer seqs and `_rev` checked on `_local` documents.
    One,
    /// CouchDB 2.x.
    Two,
    /// CouchDB 3.x and what calls itself newer, such as pouchdb-server (with integer seqs).
    Three,
}

/// How long and how much may be read.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest time without a byte; `None` = any.
    pub silence: Option<Duration>,
    /// From the first byte sent to the last byte read; `None` = any.
    pub deadline: Option<Duration>,
    /// The longest body.
    pub body_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { silence: Some(SILENCE), deadline: None, body_bytes_max: BODY_BYTES_MAX }
    }
}

impl Server {
    /// Prepares everything; sends nothing.
    ///
    /// # Errors
    /// `Config` for a URL that is none, or a `ca_file` that cannot be used.
    pub fn new(hookd: &config::Hookd) -> Result<Server> {
        let base_url = hookd.couchdb_url.trim_end_matches('/').to_owned();
        let uri: http::Uri = base_url
            .parse()
            .map_err(|error| Error::new(Kind::Config, format!("couchdb_url is not a URL: {error}")))?;
        let tls = match uri.scheme_str() {
            Some("http") => None,
            Some("https") => Some(tls::settings(hookd.ca_file.as_deref())?),
            _ => return Err(Error::new(Kind::Config, "couchdb_url: expected `http://` or `https://`")),
        };
        let authorization = hookd.username.as_ref().map(|username| {
            let password = hookd.password.as_ref().map_or("", |password| password.expose());
            let login = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
            let mut value =
                http::HeaderValue::try_from(format!("Basic {login}")).expect("base64 is a header value");
            value.set_sensitive(true);
            value
        });
        let agents = AgentSettings { tls };
        Ok(Server {
            shared: Arc::new(Shared {
                base_url,
                username: hookd.username.clone(),
                authorization,
                agent: agents.agent(N_IDLE_MAX),
                agents,
                gate: Gate::default(),
                lines: Mutex::new(Some(Vec::new())),
                mark_writing: Mutex::new(()),
            }),
        })
    }

    /// The base URL without userinfo and without a slash at the end.
    pub fn base_url(&self) -> &str {
        &self.shared.base_url
    }

    /// Who we log in as.
    pub fn username(&self) -> Option<&str> {
        self.shared.username.as_deref()
    }

    /// Sends one request and reads its answer. `path` begins with a slash, is already encoded ([`db_path`]) and
    /// may hold a query; a `body` is JSON.
    ///
    /// # Errors
    /// By status: `Unauthorized`, `Forbidden`, `Locked`, `NotFound`, `Conflict`, `BadRequest`, `Server`, with
    /// CouchDB's `error` and `reason`; `Malformed` for anything that is not CouchDB's; `Unreachable`, `Timeout`,
    /// `Stopped`; `Locked` without sending anything while the login gate is shut.
    pub fn request(
        &self,
        method: &Method,
        path: &str,
        body: Option<&str>,
        headers: &[(&str, &str)],
    ) -> Result<Reply> {
        self.request_within(method, path, body, headers, Limits::default())
    }

    /// As [`Server::request`] with limits of its own.
    ///
    /// # Errors
    /// As [`Server::request`]; `TooLong` when the body is longer than allowed.
    pub fn request_within(
        &self,
        method: &Method,
        path: &str,
        body: Option<&str>,
        headers: &[(&str, &str)],
        limits: Limits,
    ) -> Result<Reply> {
        let ask = Ask { method, path, body, headers, limits };
        self.pass_gate()
            .and_then(|()| self.send_once_more(&self.shared.agent, &ask))
            .and_then(|answer| answer.read_whole(limits.body_bytes_max))
            .map_err(|error| self.stopped_or(error))
            .context(|| ask.to_string())
    }

    /// `GET`s a JSON value.
    ///
    /// # Errors
    /// As [`Server::request`]; `Malformed` when the body has another shape.
    pub fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let reply = self.request(&Method::GET, path, None, &[])?;
        from_json(&reply.body).context(|| format!("GET {path}"))
    }

    /// `PUT`s a document.
    ///
    /// # Errors
    /// As [`Server::request`]; `Malformed` when the answer has no `rev`.
    pub fn put_json(&self, path: &str, body: &str) -> Result<Written> {
        let reply = self.request(&Method::PUT, path, Some(body), &[])?;
        from_json(&reply.body).context(|| format!("PUT {path}"))
    }

    /// Who the server is.
    ///
    /// # Errors
    /// As [`Server::get_json`]; `Malformed` when it is no CouchDB.
    pub fn welcome(&self) -> Result<Welcome> {
        #[derive(Deserialize)]
        struct Root {
            version: Option<String>,
            uuid: Option<String>,
        }
        let root: Root = self.get_json("/")?;
        let version = root
            .version
            .ok_or_else(|| {
                Error::new(Kind::Malformed, "expected CouchDB's welcome with a `version`, got none")
            })
            .context(|| "GET /".to_owned())?;
        Ok(Welcome { generation: generation(&version), version, uuid: root.uuid })
    }

    /// How many nodes the cluster has; 1 where there is no `_membership` (1.x, pouchdb-server).
    ///
    /// # Errors
    /// As [`Server::get_json`].
    pub fn nodes(&self) -> Result<usize> {
        #[derive(Deserialize)]
        struct Membership {
            cluster_nodes: Vec<serde_json::Value>,
        }
        match self.get_json::<Membership>("/_membership") {
            Ok(membership) => Ok(membership.cluster_nodes.len().max(1)),
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::BadRequest | Kind::Malformed) => {
                Ok(1)
            }
            Err(error) => Err(error),
        }
    }

    /// Wakes and ends every request under way, feeds too. Every later one fails with `Stopped`.
    pub fn stop(&self) {
        let lines = lock(&self.shared.lines).take();
        self.shared.gate.stop();
        self.shared.agent.clone().shutdown();
        for line in lines.into_iter().flatten().filter_map(|line| line.upgrade()) {
            lock(&line.state).shutdown();
        }
    }

    /// Holds off everybody else who is about to write a mark in this process.
    pub(crate) fn lock_marks(&self) -> MutexGuard<'_, ()> {
        lock(&self.shared.mark_writing)
    }

    /// A line of its own to this server, for a feed.
    pub(crate) fn line(&self) -> Line {
        let shared = Arc::new(LineShared { state: Mutex::new(LineState { agent: None, cut: false }) });
        if let Some(lines) = lock(&self.shared.lines).as_mut() {
            lines.retain(|line| line.strong_count() > 0);
            lines.push(Arc::downgrade(&shared));
        }
        Line { server: self.clone(), shared }
    }

    fn is_stopped(&self) -> bool {
        lock(&self.shared.lines).is_none()
    }

    /// After [`Server::stop`] whatever failed has failed because of it.
    fn stopped_or(&self, error: Error) -> Error {
        if self.is_stopped() { Error::new(Kind::Stopped, "stopped") } else { error }
    }

    /// Returns when the login may be used. Whether it may is found out with a `GET /`, because that is over at once
    /// while the request that waits may be a feed that is silent for minutes.
    fn pass_gate(&self) -> Result<()> {
        if self.shared.authorization.is_none() {
            return if self.is_stopped() { Err(Error::new(Kind::Stopped, "stopped")) } else { Ok(()) };
        }
        self.shared.gate.pass(|| {
            let limits = Limits::default();
            let ask = Ask { method: &Method::GET, path: "/", body: None, headers: &[], limits };
            self.send_once_more(&self.shared.agent, &ask).map(drop).context(|| "GET /".to_owned())
        })
    }

    /// Sends, and sends once more when a pooled connection turned out to be dead; only what may be repeated.
    fn send_once_more(&self, agent: &ureq::Agent, ask: &Ask) -> Result<Answer> {
        match self.send(agent, ask) {
            Err(error)
                if error.kind() == Kind::Unreachable && ask.may_be_repeated() && !self.is_stopped() =>
            {
                self.send(agent, ask)
            }
            answer => answer,
        }
    }

    /// One request, up to the answer's headers. Tells the gate what the answer says about the login.
    fn send(&self, agent: &ureq::Agent, ask: &Ask) -> Result<Answer> {
        let mut request = http::Request::builder()
            .method(ask.method.clone())
            .uri(format!("{}{}", self.shared.base_url, ask.path))
            .header(http::header::ACCEPT, "application/json");
        if let Some(authorization) = &self.shared.authorization {
            request = request.header(http::header::AUTHORIZATION, authorization);
        }
        for (name, value) in ask.headers {
            request = request.header(*name, *value);
        }
        let sent = match ask.body {
            Some(body) => {
                let request = request.header(http::header::CONTENT_TYPE, "application/json").body(body);
                request
                    .map_err(ureq::Error::from)
                    .and_then(|request| agent.run(ask.limits.apply(agent, request)))
            }
            None => {
                let request = request.body(());
                request
                    .map_err(ureq::Error::from)
                    .and_then(|request| agent.run(ask.limits.apply(agent, request)))
            }
        };
        let response = sent.map_err(|error| transport_error(error, ask.limits.silence))?;
        let answer = Answer { response, silence: ask.limits.silence };
        let status = answer.status();
        if (200..300).contains(&status) {
            self.on_verdict(Verdict::Accepted, "");
            return Ok(answer);
        }
        let refusal = answer.refusal();
        if let Some(verdict) = login_verdict(status, &refusal, ask.path) {
            self.on_verdict(verdict, &refusal.text);
        }
        Err(Error::new(refusal.kind, refusal.text))
    }

    fn on_verdict(&self, verdict: Verdict, text: &str) {
        if self.shared.authorization.is_some() {
            self.shared.gate.on_verdict(verdict, text);
        }
    }
}

/// A way to the server with an agent of its own, so that it can be cut without ending other requests.
///
/// `ureq`'s shutdown is for ever, so a cut line gets a new agent with its next request.
pub(crate) struct Line {
    server: Server,
    shared: Arc<LineShared>,
}

struct LineShared {
    state: Mutex<LineState>,
}

struct LineState {
    agent: Option<ureq::Agent>,
    /// Set by a cut, taken by the request that it ends.
    cut: bool,
}

/// Cuts one line from another thread.
#[derive(Clone)]
pub(crate) struct Cutter {
    shared: Weak<LineShared>,
}

/// The body of an answer that is still coming.
pub(crate) struct Incoming {
    reader: ureq::BodyReader<'static>,
    silence: Option<Duration>,
}

impl Line {
    /// As [`Server::request_within`], but gives the body as it comes, and is never sent twice: what was looked at
    /// before may be another database, or an earlier life of the server, at the second time. After a cut the error
    /// is any; ask [`Line::take_cut`].
    pub(crate) fn request(
        &self,
        method: &Method,
        path: &str,
        body: Option<&str>,
        limits: Limits,
    ) -> Result<Incoming> {
        let ask = Ask { method, path, body, headers: &[], limits };
        self.server
            .pass_gate()
            .and_then(|()| self.agent())
            .and_then(|agent| self.server.send(&agent, &ask))
            .map(Answer::into_incoming)
            .map_err(|error| self.server.stopped_or(error))
    }

    /// One read of a body that this line gave; 0 at its end.
    pub(crate) fn read(&self, incoming: &mut Incoming, buffer: &mut [u8]) -> Result<usize> {
        incoming.read(buffer).map_err(|error| self.server.stopped_or(error))
    }

    /// Whether the line was cut since this was last asked.
    pub(crate) fn take_cut(&self) -> bool {
        std::mem::take(&mut lock(&self.shared.state).cut)
    }

    pub(crate) fn cutter(&self) -> Cutter {
        Cutter { shared: Arc::downgrade(&self.shared) }
    }

    fn agent(&self) -> Result<ureq::Agent> {
        let mut state = lock(&self.shared.state);
        if state.cut || self.server.is_stopped() {
            return Err(Error::new(Kind::Stopped, "stopped"));
        }
        // No idle connection: one that died meanwhile could not be told from a server that is down.
        let make = || self.server.shared.agents.agent(0);
        Ok(state.agent.get_or_insert_with(make).clone())
    }
}

impl Cutter {
    /// Ends the request under way, or the next one if there is none.
    pub(crate) fn cut(&self) {
        if let Some(shared) = self.shared.upgrade() {
            let mut state = lock(&shared.state);
            state.cut = true;
            state.shutdown();
        }
    }
}

impl LineState {
    fn shutdown(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.shutdown();
        }
    }
}

impl Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.reader.read(buffer).map_err(|error| transport_error(ureq::Error::from(error), self.silence))
    }
}

impl AgentSettings {
    fn agent(&self, n_idle_max: usize) -> ureq::Agent {
        let mut builder = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("couch-hookd/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .input_buffer_size(BUFFER_BYTES)
            .output_buffer_size(BUFFER_BYTES / 4)
            .max_idle_connections(n_idle_max)
            .max_idle_connections_per_host(n_idle_max);
        if let Some(tls) = &self.tls {
            builder = builder.tls_config(tls.clone());
        }
        names::agent(builder.build(), &Names::default())
    }
}

/// One request, before it is sent.
struct Ask<'a> {
    method: &'a Method,
    path: &'a str,
    body: Option<&'a str>,
    headers: &'a [(&'a str, &'a str)],
    limits: Limits,
}

impl Ask<'_> {
    /// Whether it changes nothing.
    fn may_be_repeated(&self) -> bool {
        *self.method == Method::GET
    }
}

impl fmt::Display for Ask<'_> {
    /// Method and path; the query may be long and says little.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path.split('?').next().unwrap_or_default())
    }
}

impl Limits {
    fn apply<B: ureq::AsSendBody>(&self, agent: &ureq::Agent, request: http::Request<B>) -> http::Request<B> {
        agent.configure_request(request).timeout_per_read(self.silence).timeout_global(self.deadline).build()
    }
}

/// An answer whose body is not read yet.
struct Answer {
    response: http::Response<ureq::Body>,
    silence: Option<Duration>,
}

impl Answer {
    fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    fn read_whole(mut self, body_bytes_max: u64) -> Result<Reply> {
        let date = self.response.headers().get(http::header::DATE).and_then(|value| {
            let time = jiff::fmt::rfc2822::parse(value.to_str().ok()?).ok()?;
            Some(time.timestamp())
        });
        let body = self.response.body_mut().with_config().limit(body_bytes_max).read_to_vec();
        match body {
            Ok(body) => Ok(Reply { status: self.status(), body, date }),
            Err(ureq::Error::BodyExceedsLimit(_)) => Err(Error::new(
                Kind::TooLong,
                format!("expected an answer of at most {body_bytes_max} bytes, got a longer one"),
            )),
            Err(error) => Err(transport_error(error, self.silence)),
        }
    }

    fn into_incoming(self) -> Incoming {
        Incoming { reader: self.response.into_body().into_reader(), silence: self.silence }
    }

    /// Reads the body of an answer other than 2xx. The status is news even when the body does not come.
    fn refusal(mut self) -> Refusal {
        let mut body = Vec::new();
        let read = self.response.body_mut().as_reader().take(ERROR_BYTES_MAX).read_to_end(&mut body);
        if read.is_err() {
            body.clear();
        }
        Refusal::new(self.status(), &body)
    }
}

fn transport_error(error: ureq::Error, silence: Option<Duration>) -> Error {
    match error {
        ureq::Error::Timeout(ureq::Timeout::PerRead) => {
            Error::new(Kind::Timeout, format!("no byte for {} s", silence.unwrap_or(SILENCE).as_secs_f64()))
        }
        ureq::Error::Timeout(timeout) => Error::new(Kind::Timeout, format!("timeout ({timeout})")),
        ureq::Error::Io(error) => {
            let text = error.to_string();
            // "Connection refused (os error 111)": the number is noise.
            let text = text.split(" (os error").next().unwrap_or_default();
            let mut chars = text.chars();
            let first = chars.next().into_iter().flat_map(char::to_lowercase);
            Error::new(Kind::Unreachable, first.chain(chars).collect::<String>())
        }
        ureq::Error::HostNotFound => Error::new(Kind::Unreachable, "host not found"),
        ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => {
            Error::new(Kind::Malformed, format!("expected an HTTP answer, got {error}"))
        }
        ureq::Error::Http(_) | ureq::Error::BadUri(_) => {
            Error::new(Kind::Config, format!("cannot be sent: {error}"))
        }
        error => Error::new(Kind::Unreachable, error.to_string()),
    }
}

fn generation(version: &str) -> Generation {
    match version.split('.').next().and_then(|major| major.parse::<u32>().ok()) {
        Some(0 | 1) => Generation::One,
        Some(2) => Generation::Two,
        _ => Generation::Three,
    }
}

/// All but RFC 3986's unreserved characters.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// `/DB/SEGMENT/…` with each part encoded, slashes too; only the one in `_design/x` and `_local/x` stays.
pub fn db_path(db: &str, segments: &[&str]) -> String {
    let mut path = format!("/{}", encoded(db));
    for segment in segments {
        let prefix = ["_design/", "_local/"].into_iter().find(|prefix| segment.starts_with(prefix));
        let prefix = prefix.unwrap_or_default();
        path.push('/');
        path.push_str(prefix);
        path.push_str(&encoded(&segment[prefix.len()..]));
    }
    path
}

/// Percent-encoded, for a path segment or a query value.
pub fn encoded(text: &str) -> String {
    match text {
        "." => "%2E".to_owned(),
        ".." => "%2E%2E".to_owned(),
        _ => utf8_percent_encode(text, SEGMENT).to_string(),
    }
}

/// A poisoned lock guards values that stay whole whatever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
