//! Asking the daemon that runs a webhook to do something, or doing it here when there is none.
//!
//! Guarantees that a request stands in `state_db` before anything is done, as a trace and so that two who do it at a
//! time do it once; that a daemon which is alive is waited for; and that it is said on stderr when this process does
//! it itself. Whether a daemon is alive is `couch::alive`'s to know.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::cli::common::Setup;
use crate::cli::out::complain;
use crate::config::Webhook;
use crate::couch::alive::{self, Daemon};
use crate::couch::requests::{self, Arguments, Command, Progress, Request};
use crate::couch::state_db;
use crate::daemon;
use crate::error::{Error, Kind, Result};
use crate::pipeline::dispatcher::{Order, Running};
use crate::pipeline::{Shared, checkpointer, obey};
use crate::pure::snapshot::State;
use crate::sys;

/// How often an answer is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A daemon that has not answered by then is asked after: it may be dead.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is in flight when sending letters again breaks off may take this long.
const END: Duration = Duration::from_millis(3_500);

/// A CouchDB that let us in, with everything that a daemon would have.
pub(crate) struct Office {
    /// What the functions of the daemon need.
    pub(crate) shared: Shared,
    checkpointer: sys::Thread,
}

impl Office {
    /// Asks CouchDB who it is, and makes `state_db` as a daemon would.
    ///
    /// # Errors
    /// As asking CouchDB.
    pub(crate) fn open(setup: &Setup) -> Result<Office> {
        let hookd = Arc::new(setup.config.hookd.clone());
        let server = &setup.server;
        let welcome = setup.welcome()?;
        let key = state_db::ensure(server, &hookd.state_db, server.username())?;
        let source = daemon::public_source(&hookd, server.base_url(), welcome.uuid.as_deref());
        let (checkpoints, checkpointer) = checkpointer::start()?;
        let shared = daemon::shared(server, &hookd, key, source, checkpoints);
        Ok(Office { shared, checkpointer })
    }

    /// Daemons that are alive and run this webhook, or any with `None`.
    ///
    /// # Errors
    /// As asking CouchDB.
    pub(crate) fn alive(&self, webhook: Option<&str>) -> Result<Vec<Daemon>> {
        let (mut daemons, now) = alive::list(&self.shared.server, &self.shared.state_db)?;
        daemons.retain(|daemon| {
            daemon.is_alive(now) && webhook.is_none_or(|webhook| daemon.is_leased(webhook).is_some())
        });
        // First who tells it: the others stand by.
        let stands_by = |daemon: &Daemon| {
            let status = webhook.and_then(|webhook| daemon.webhooks.get(webhook));
            status.is_some_and(|status| status.state == State::Standby)
        };
        daemons.sort_by_key(stands_by);
        Ok(daemons)
    }

    /// Ends what was started.
    pub(crate) fn close(self) -> Result<()> {
        let Office { shared, checkpointer } = self;
        drop(shared);
        checkpointer.join().map_err(|panic| Error::new(Kind::Io, panic))
    }

    /// Stores a request.
    ///
    /// # Errors
    /// As writing to CouchDB.
    pub(crate) fn request(&self, webhook: &str, command: Command, arguments: Arguments) -> Result<Request> {
        let mut request = Request::new(webhook, command, arguments, &user_name());
        requests::write(&self.shared.server, &self.shared.state_db, &mut request)?;
        Ok(request)
    }

    /// Has a request done and gives it with its answer; `on_look` sees it from time to time until then.
    ///
    /// # Errors
    /// `BadRequest` with the reason when it cannot be done; else as asking CouchDB.
    pub(crate) fn have_done(
        &self,
        webhook: &Webhook,
        command: Command,
        arguments: Arguments,
        on_look: &mut dyn FnMut(&Request) -> Result<()>,
    ) -> Result<Request> {
        let request = self.request(&webhook.name, command, arguments)?;
        let request = match self.alive(Some(&webhook.name))?.first() {
            Some(daemon) => self.wait(&request, daemon, webhook, on_look)?,
            None => {
                complain(&format!("no daemon runs webhook `{}`: done here", webhook.name));
                self.do_here(&request, webhook, on_look)?
            }
        };
        match request.state {
            Progress::Failed => Err(requests::error_of(&request)),
            Progress::Open | Progress::Done => Ok(request),
        }
    }

    /// Waits for a daemon's answer; does it here when it dies meanwhile.
    fn wait(
        &self,
        request: &Request,
        daemon: &Daemon,
        webhook: &Webhook,
        on_look: &mut dyn FnMut(&Request) -> Result<()>,
    ) -> Result<Request> {
        let mut ask_after = sys::now() + PATIENCE;
        let mut said = false;
        let mut seen = request.answer.clone();
        loop {
            let now = self.read(request)?;
            on_look(&now)?;
            if now.state != Progress::Open {
                return Ok(now);
            }
            if now.answer != seen {
                // It is at it.
                ask_after = sys::now() + PATIENCE;
                seen.clone_from(&now.answer);
            }
            if sys::now() >= ask_after {
                if self.alive(Some(&webhook.name))?.is_empty() {
                    complain(&format!("the daemon ({}) is gone: done here", daemon.place()));
                    return self.do_here(request, webhook, on_look);
                }
                if !std::mem::replace(&mut said, true) {
                    let place = daemon.place();
                    complain(&format!(
                        "waiting for the daemon ({place}), which has not answered yet; Ctrl-C ends the waiting, the \
                         request stays"
                    ));
                }
                ask_after = sys::now() + PATIENCE / 4;
            }
            sys::sleep(LOOK_EVERY);
        }
    }

    fn do_here(
        &self,
        request: &Request,
        webhook: &Webhook,
        on_look: &mut dyn FnMut(&Request) -> Result<()>,
    ) -> Result<Request> {
        let Shared { server, state_db, .. } = &self.shared;
        if request.command == Command::Replay {
            return self.replay_here(request, webhook, on_look);
        }
        let obeyed = obey::obey(&self.shared, webhook, request).inspect_err(|error| {
            // Whoever asked is told that it failed: no daemon may do it later.
            let why = requests::text("error", error.to_string());
            let _ = requests::answer(server, state_db, &request.id, Progress::Failed, &why);
        })?;
        requests::answer(server, state_db, &request.id, obeyed.state, &obeyed.answer)?;
        requests::delete_old(server, state_db)?;
        self.read(request)
    }

    /// The part of the daemon that sends letters again, in this process.
    fn replay_here(
        &self,
        request: &Request,
        webhook: &Webhook,
        on_look: &mut dyn FnMut(&Request) -> Result<()>,
    ) -> Result<Request> {
        let running = Running::start_replays(&self.shared, webhook.clone())?;
        running.order(Order::Replay(Box::new(request.clone())));
        let done = loop {
            let now = self.read(request).and_then(|now| on_look(&now).map(|()| now));
            match now {
                Ok(now) if now.state == Progress::Open => {}
                other => break other,
            }
            if running.is_ended() {
                break Err(Error::new(Kind::Io, "what sends letters again has ended early"));
            }
            sys::sleep(LOOK_EVERY);
        };
        // Once it is answered nothing is in flight any more.
        let deliveries = if done.is_ok() { Duration::ZERO } else { END };
        running.order(Order::Stop { deliveries, checkpoint: Duration::ZERO });
        // What still hangs then, in a name that does not resolve for example, ends with the process.
        let threads = running.join(sys::now() + deliveries + Duration::from_secs(1));
        threads.into_iter().filter(sys::Thread::is_finished).for_each(|thread| drop(thread.join()));
        done
    }

    /// A request as it is now.
    ///
    /// # Errors
    /// `NotFound` when somebody deleted it; else as asking CouchDB.
    pub(crate) fn read(&self, request: &Request) -> Result<Request> {
        let found = requests::read(&self.shared.server, &self.shared.state_db, &request.id)?;
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("the request `{}` was deleted", request.id)))
    }
}

/// Who asks, for people.
fn user_name() -> String {
    let known = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    known.filter(|name| !name.is_empty()).unwrap_or_else(|| "somebody".to_owned())
}

/// A number of an answer; 0 where there is none.
pub(crate) fn number(request: &Request, name: &str) -> u64 {
    request.answer.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// `1 letter`, `2 letters`.
pub(crate) fn count(n: u64, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
