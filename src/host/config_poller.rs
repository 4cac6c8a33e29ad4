//! Asks CouchDB for our configuration again and again, and hands on what has settled.
//!
//! Guarantees that what it gives was answered whole; `pure::settled` decides what a first answer and a change are
//! good for. What the sections mean is left to `config`.

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};

use crate::error::{Kind, Result};
use crate::host::stdio::{HostClient, Sections};
use crate::pure::settled::{Settling, Verdict};
use crate::sys;

/// Webhooks whose sections are asked for: ten times what a server was ever planned for, still a second per round.
const WEBHOOKS_MAX: usize = 1_000;

/// The running poller. End it with [`ConfigPoller::stop`].
#[derive(Debug)]
pub struct ConfigPoller {
    answers: Receiver<Verdict<Sections>>,
    stop: Sender<()>,
    thread: sys::Thread,
}

impl ConfigPoller {
    /// Starts asking, at once and then as `pure::settled` says.
    ///
    /// # Errors
    /// `Io` when no thread can be started.
    pub fn start(client: HostClient) -> Result<ConfigPoller> {
        let (to, answers) = bounded(1);
        let (stop, stopped) = bounded(0);
        let thread = sys::spawn("host:config", move || poll(&client, &to, &stopped))?;
        Ok(ConfigPoller { answers, stop, thread })
    }

    /// What has settled, newest last; ends when the host is gone.
    pub fn answers(&self) -> Receiver<Verdict<Sections>> {
        self.answers.clone()
    }

    /// Ends it. Waits for an answer that is under way only until the host is gone or answers.
    ///
    /// # Errors
    /// What the thread panicked with.
    pub fn stop(self) -> Result<(), String> {
        drop((self.stop, self.answers));
        self.thread.join()
    }
}

/// Everything that concerns us, asked once: `[hookd]`, `[hookd.webhooks]`, the section of every webhook named
/// there, and where CouchDB listens (`[chttpd]`, `[httpd]`). Sections that CouchDB does not have are left out.
///
/// # Errors
/// As [`HostClient::get_section`].
pub fn our_sections(client: &HostClient) -> Result<Sections> {
    let mut sections = client.get_sections(&["hookd", "hookd.webhooks", "chttpd", "httpd"])?;
    if let Some(webhooks) = sections.get("hookd.webhooks") {
        let names: Vec<String> =
            webhooks.keys().take(WEBHOOKS_MAX).map(|name| format!("hookd.webhook.{name}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        sections.extend(client.get_sections(&names)?);
    }
    Ok(sections)
}

fn poll(client: &HostClient, to: &Sender<Verdict<Sections>>, stopped: &Receiver<()>) {
    let mut settling = Settling::new(sys::now());
    while stopped.recv_deadline(settling.next_ask()) == Err(RecvTimeoutError::Timeout) {
        let verdict = match our_sections(client) {
            Ok(sections) => settling.on_answer(sections, sys::now()),
            Err(error) if error.kind() == Kind::Stopped => return,
            Err(error) => {
                log::warn!("{error}; going on with the configuration as it is");
                settling.on_failure(sys::now());
                None
            }
        };
        if let Some(verdict) = verdict {
            select! {
                send(to, verdict) -> sent => if sent.is_err() { return },
                recv(stopped) -> _ => return,
            }
        }
    }
}
