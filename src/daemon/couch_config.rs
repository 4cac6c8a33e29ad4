//! Asks CouchDB for its `_config` again and again, and hands on what has settled: `run --from-couchdb`.
//!
//! Guarantees that a CouchDB which is not there yet, or does not let us in, is waited for and said once; that what
//! is handed on was answered whole, by one node; and that a stop ends a question under way. `pure::settled` decides
//! what a first answer and a change are good for, `config` what sections mean.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};

use crate::config::Hookd;
use crate::config::finding::{Origin, Raw};
use crate::config::source::{self, Overrides};
use crate::couch::client::Server;
use crate::couch::node_config::NodeConfig;
use crate::error::{Kind, Result};
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pure::settled::{Settling, Verdict};
use crate::sys::{self, Thread};

/// A thread that hangs in a name that does not resolve is left to the end of the process after this.
const STOP_MAX: Duration = Duration::from_secs(1);

/// The running poller. End it with [`CouchConfig::stop`].
pub struct CouchConfig {
    answers: Receiver<Verdict<Raw>>,
    stop: Sender<()>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
    server: Server,
    thread: Thread,
}

impl CouchConfig {
    /// Starts asking, at once and then as `pure::settled` says. `hookd` holds URL and login to ask with, `overrides`
    /// lie over what is answered, `node` is asked or else the first that answers.
    ///
    /// # Errors
    /// `Config` for a URL or CA file that cannot be used; `Io` when no thread can be started.
    pub fn start(hookd: &Hookd, node: Option<String>, overrides: Overrides) -> Result<CouchConfig> {
        let server = Server::new(hookd)?;
        let (to, answers) = bounded(1);
        let (stop, stopped) = bounded(0);
        let (end, ended) = bounded(0);
        let node_config = NodeConfig::new(server.clone(), node);
        let outage = Outage::new(server.base_url());
        let poller = Poller { node_config, outage, overrides, to, stopped };
        let thread = sys::spawn("couch:config", move || {
            poller.run();
            drop(end);
        })?;
        Ok(CouchConfig { answers, stop, ended, server, thread })
    }

    /// What has settled.
    pub fn answers(&self) -> Receiver<Verdict<Raw>> {
        self.answers.clone()
    }

    /// Ends it, a question under way too.
    ///
    /// # Errors
    /// What the thread panicked with.
    pub fn stop(self) -> Result<(), String> {
        drop((self.stop, self.answers));
        self.server.stop();
        match self.ended.recv_timeout(STOP_MAX) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            _ => self.thread.join(),
        }
    }
}

struct Poller {
    node_config: NodeConfig,
    outage: Outage,
    overrides: Overrides,
    to: Sender<Verdict<Raw>>,
    stopped: Receiver<()>,
}

impl Poller {
    fn run(mut self) {
        let mut settling = Settling::new(sys::now());
        let mut complaint = Complaint::default();
        let mut node_said = false;
        while self.stopped.recv_deadline(settling.next_ask()) == Err(RecvTimeoutError::Timeout) {
            let sections = match self.node_config.read() {
                Ok(sections) => sections,
                Err(error) if error.kind() == Kind::Stopped => return,
                Err(error) => {
                    if Outage::concerns(&error) {
                        self.outage.say(&error);
                    } else if complaint.is_news(error.kind(), sys::now()) {
                        log::error!("{error}; going on with the configuration as it is");
                    }
                    settling.on_failure(sys::now());
                    continue;
                }
            };
            self.outage.over();
            if complaint.over() {
                log::info!("CouchDB gives its configuration again");
            }
            if let (false, Some(node)) = (node_said, self.node_config.node()) {
                log::info!("the configuration is node `{node}`'s");
                node_said = true;
            }
            // Settled is what CouchDB says: files named there are read when it is applied, not to judge it.
            let Some(verdict) = settling.on_answer(sections, sys::now()) else { continue };
            let (sections, settled) = verdict.into_parts();
            let raw = source::from_sections(&sections, &Origin::CouchConfig, &self.overrides);
            let verdict = if settled { Verdict::Settled(raw) } else { Verdict::Provisional(raw) };
            select! {
                send(self.to, verdict) -> sent => if sent.is_err() { return },
                recv(self.stopped) -> _ => return,
            }
        }
    }
}
