//! Documents `daemon:…` in `state_db`: which daemons are alive, and what they say of their webhooks.
//!
//! An ordinary document, because `_local` ones cannot be listed on 1.x. Written at the start and every 30 s with
//! CouchDB's own time, so that clocks do not matter; deleted at a clean end. One that was not renewed for 90 s is of
//! a daemon that was killed, as is one of this machine whose process is gone.
//!
//! It is also how daemons know of each other before they tell anything (`pure::lease`): `leased` names the webhooks that a
//! daemon runs, or would, and whether it tells them with a lease alone.

use std::collections::BTreeMap;

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::couch::all_docs;
use crate::couch::client::{Limits, Server, Written, db_path, encoded};
use crate::couch::refusal::from_json;
use crate::error::{Context, Kind, Result};
use crate::pure::snapshot::Statuses;
use crate::sys;

/// In front of the id of every such document.
pub const PREFIX: &str = "daemon:";
/// Without a renewal for so long a daemon is dead, in seconds.
const STALE_SECONDS: i64 = 90;
/// And its document is deleted by others after so long, in seconds.
const FORGOTTEN_SECONDS: i64 = 24 * 3600;

/// A daemon.
///
/// `{"_id":"daemon:db1:4711:5f0c12ab","host":"db1","pid":4711,"version":"0.1.0","started_at":"…","renewed_at":"…",
/// "webhooks":{"orders":{"state":"running",…}}}`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Daemon {
    /// [`PREFIX`], host, process, random digits.
    #[serde(rename = "_id")]
    pub id: String,
    /// `None` before the first write.
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<String>,
    /// Name of its machine.
    pub host: String,
    /// Process id there.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// By CouchDB's clock.
    pub started_at: jiff::Timestamp,
    /// By CouchDB's clock.
    pub renewed_at: jiff::Timestamp,
    /// Which life of that process id it is ([`sys::life_of_process`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<String>,
    /// Webhooks that it runs, or would.
    #[serde(default)]
    pub webhooks: Statuses,
    /// The same, as soon as they are configured; whether each is told with a lease alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub leased: BTreeMap<String, bool>,
}

impl Daemon {
    /// This process.
    pub fn new() -> Daemon {
        let (host, pid) = (sys::host_name(), std::process::id());
        let random = u32::from_be_bytes(sys::random_bytes());
        let now = sys::wall();
        Daemon {
            id: format!("{PREFIX}{host}:{pid}:{random:08x}"),
            rev: None,
            host,
            pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: now,
            renewed_at: now,
            life: sys::life_of_process(pid),
            webhooks: Statuses::new(),
            leased: BTreeMap::new(),
        }
    }

    /// `process 4711 on db1`.
    pub fn place(&self) -> String {
        format!("process {} on {}", self.pid, self.host)
    }

    /// Whether it may still be there, at `now` by CouchDB's clock.
    pub fn is_alive(&self, now: jiff::Timestamp) -> bool {
        !self.is_gone() && now.duration_since(self.renewed_at).as_secs() <= STALE_SECONDS
    }

    /// Whether it is of this machine and its process is not there any more. Machines of the same name that do not share
    /// their process ids, such as containers, are told apart where that can be seen.
    fn is_gone(&self) -> bool {
        if self.host != sys::host_name() {
            return false;
        }
        let space = |life: &str| life.rsplit_once(' ').map(|(space, _)| space.to_owned());
        let ours = sys::life_of_process(std::process::id());
        match (&self.life, ours) {
            (Some(its), Some(ours)) if space(its) != space(&ours) => false,
            (Some(its), Some(_)) => {
                let now = sys::life_of_process(self.pid);
                !sys::is_process(self.pid) || now.is_some_and(|now| now != *its)
            }
            _ => !sys::is_process(self.pid),
        }
    }

    /// Whether it runs a webhook, or would, and tells it with a lease alone.
    pub fn is_leased(&self, webhook: &str) -> Option<bool> {
        self.leased.get(webhook).copied().or_else(|| self.webhooks.contains_key(webhook).then_some(false))
    }
}

impl Default for Daemon {
    fn default() -> Daemon {
        Daemon::new()
    }
}

/// Says that this daemon is alive. Each request takes no longer than `limits` allow.
///
/// # Errors
/// As [`Server::request`].
pub fn renew(server: &Server, state_db: &str, daemon: &mut Daemon, limits: Limits) -> Result<()> {
    let path = db_path(state_db, &[&daemon.id]);
    let asked = server.request_within(&Method::GET, "/", None, &[], limits)?;
    daemon.renewed_at = asked.date.unwrap_or_else(sys::wall);
    if daemon.rev.is_none() {
        daemon.started_at = daemon.renewed_at;
    }
    let body = serde_json::to_string(daemon).expect("texts and numbers are always JSON");
    match server.request_within(&Method::PUT, &path, Some(&body), &[], limits) {
        Ok(reply) => {
            let written: Written = from_json(&reply.body).context(|| format!("PUT {path}"))?;
            daemon.rev = Some(written.rev);
            Ok(())
        }
        // Somebody took us for dead and deleted it, or CouchDB 1.x was killed and lost it: the next one is new.
        Err(error) if error.kind() == Kind::Conflict => {
            let found = server.request_within(&Method::GET, &path, None, &[], limits).ok();
            let found: Option<Daemon> = found.and_then(|reply| from_json(&reply.body).ok());
            daemon.rev = found.and_then(|found| found.rev);
            Err(error)
        }
        Err(error) => Err(error),
    }
}

/// Takes back what [`renew`] said; within `limits`, because the process is about to end.
///
/// # Errors
/// As [`Server::request`].
pub fn end(server: &Server, state_db: &str, daemon: &Daemon, limits: Limits) -> Result<()> {
    let Some(rev) = &daemon.rev else { return Ok(()) };
    let path = format!("{}?rev={}", db_path(state_db, &[&daemon.id]), encoded(rev));
    server.request_within(&Method::DELETE, &path, None, &[], limits).map(drop)
}

/// All daemons that have such a document, dead ones too, and CouchDB's time.
///
/// # Errors
/// As [`Server::get_json`].
pub fn list(server: &Server, state_db: &str) -> Result<(Vec<Daemon>, jiff::Timestamp)> {
    list_within(server, state_db, Limits::default())
}

/// As [`list`] with limits of its own.
///
/// # Errors
/// As [`list`].
pub fn list_within(
    server: &Server,
    state_db: &str,
    limits: Limits,
) -> Result<(Vec<Daemon>, jiff::Timestamp)> {
    let (rows, date) = all_docs::beginning_with::<Box<RawValue>>(server, state_db, PREFIX, None, limits)?;
    let daemons = rows.into_iter().filter_map(|row| serde_json::from_str(row.doc?.get()).ok()).collect();
    Ok((daemons, date.unwrap_or_else(sys::wall)))
}

/// Deletes the documents of daemons that are dead for sure.
///
/// # Errors
/// As [`Server::request`].
pub fn delete_dead(server: &Server, state_db: &str) -> Result<()> {
    let (daemons, now) = list(server, state_db)?;
    for daemon in daemons {
        if daemon.is_gone() || now.duration_since(daemon.renewed_at).as_secs() > FORGOTTEN_SECONDS {
            match end(server, state_db, &daemon, Limits::default()) {
                Err(error) if !matches!(error.kind(), Kind::NotFound | Kind::Conflict) => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_dead_when_it_was_not_renewed_or_its_process_is_gone() {
        let second = |second: i64| jiff::Timestamp::from_second(second).unwrap();
        let us = Daemon { renewed_at: second(1_000), ..Daemon::new() };
        assert!(us.is_alive(second(1_090)) && !us.is_alive(second(1_091)));
        // Clocks of CouchDB's nodes may differ a little.
        assert!(us.is_alive(second(990)));
        // No process has this id: it is above what Linux gives.
        let killed = Daemon { pid: i32::MAX as u32, ..us.clone() };
        assert!(!killed.is_alive(second(1_000)));
        // Another process has it by now.
        let (space, _) = us.life.as_deref().unwrap().rsplit_once(' ').unwrap();
        let reused = Daemon { life: Some(format!("{space} 1")), ..us.clone() };
        assert!(!reused.is_alive(second(1_000)));
        // Of a container of the same name: its ids are not ours.
        let contained = Daemon { life: Some("pid:[1] 1".to_owned()), ..killed.clone() };
        assert!(contained.is_alive(second(1_000)));
        // Of a version that does not say.
        assert!(!Daemon { life: None, ..killed.clone() }.is_alive(second(1_000)));
        let elsewhere = Daemon { host: format!("not-{}", us.host), ..killed };
        assert!(elsewhere.is_alive(second(1_000)), "of another machine only the time is known");
    }
}
