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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::time::Duration;

    use super::*;
    use crate::host::stdio;

    const LONG: Duration = Duration::from_secs(10);

    /// Answers every `get` of a round from `{section: answer}`; gives what was asked for.
    fn answer_round(lines: &mut impl BufRead, to: &mut impl Write, answers: &[(&str, &str)]) -> Vec<String> {
        let mut asked = Vec::new();
        for _ in 0..answers.len() {
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            let [_, section] = serde_json::from_str::<[String; 2]>(&line).unwrap();
            let (_, answer) = answers.iter().find(|(name, _)| *name == section).unwrap();
            to.write_all(format!("{answer}\n").as_bytes()).unwrap();
            asked.push(section);
        }
        asked
    }

    #[test]
    fn every_section_that_concerns_us_is_asked_for_and_handed_on_whole() {
        let (input, mut answers) = std::io::pipe().unwrap();
        let (lines, output) = std::io::pipe().unwrap();
        let stdio = stdio::start_on(input, output, || 7, || ()).unwrap();
        let poller = ConfigPoller::start(stdio.client()).unwrap();
        let mut lines = BufReader::new(lines);
        let sections = [
            ("hookd", r#"{"username":"u"}"#),
            ("hookd.webhooks", r#"{"a":"http://x/","b":"http://y/"}"#),
            ("chttpd", "{}"),
            ("httpd", r#"{"port":"5984"}"#),
            ("hookd.webhook.a", r#"{"since":"0"}"#),
            ("hookd.webhook.b", "{}"),
        ];
        let asked = answer_round(&mut lines, &mut answers, &sections);
        assert_eq!(asked, sections.map(|(name, _)| name));
        let Verdict::Provisional(first) = poller.answers().recv_timeout(LONG).unwrap() else {
            panic!("one answer settles nothing");
        };
        let names: Vec<&str> = first.keys().map(String::as_str).collect();
        assert_eq!(names, ["hookd", "hookd.webhook.a", "hookd.webhooks", "httpd"]);
        answer_round(&mut lines, &mut answers, &sections);
        assert_eq!(poller.answers().recv_timeout(LONG), Ok(Verdict::Settled(first)));
        drop(answers);
        assert!(stdio.closed().recv_timeout(LONG).is_ok());
        poller.stop().unwrap();
    }
}
