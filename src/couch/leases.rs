//! Leases in CouchDB: documents `lease:NAME` in `state_db`, and what a webhook needs of its own, a [`Hold`].
//!
//! Guarantees that a lease is written only under the `_rev` it was read with (an ordinary document: CouchDB checks that on
//! every version), that all of a daemon's are written in one request, and that what cannot be read as a lease counts as
//! one of somebody unknown: it is waited out, never ignored. Who writes what, and when, is `pure::lease`'s to say.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use serde_json::value::RawValue;

use crate::couch::alive::Daemon;
use crate::couch::all_docs;
use crate::couch::client::{Limits, Server, db_path};
use crate::couch::refusal::from_json;
use crate::couch::state_db::found;
use crate::error::{Context, Error, Kind, Result};
use crate::pure::lease::{Answer, Doc, Order, Times, Write};
use crate::pure::share::{Division, Member};
use crate::sys;

/// In front of the id of every lease.
pub const PREFIX: &str = "lease:";
/// How often whoever waits for a hold looks at it.
const WAIT_CHECK: Duration = Duration::from_millis(50);

/// A lease as it is stored.
///
/// `{"_id":"lease:orders","_rev":"17-…","holder":"daemon:db1:4711:5f0c12ab","host":"db1","pid":4711,"n":17,
/// "ttl_ms":15000,"released":false,"written_at":"2026-11-22T09:40:00Z"}`
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    #[serde(rename = "_id")]
    id: String,
    #[serde(rename = "_rev", default, skip_serializing_if = "Option::is_none")]
    rev: Option<String>,
    holder: String,
    #[serde(default)]
    host: String,
    #[serde(default)]
    pid: u32,
    n: u64,
    ttl_ms: u64,
    #[serde(default)]
    released: bool,
    /// Of a member: for whom it tells nothing any more (`pure::share`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    knows: Option<BTreeSet<String>>,
    /// A member that goes leaves nothing: no other will ever have its name.
    #[serde(rename = "_deleted", default, skip_serializing_if = "is_false")]
    deleted: bool,
    /// By the holder's clock, for people; nothing is decided by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    written_at: Option<jiff::Timestamp>,
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// What the lease of a member of a webhook's daemons is called in the place of the webhook's name; no webhook has a
/// slash in its own.
pub fn member_name(webhook: &str, member: &str) -> String {
    format!("{webhook}/{member}")
}

/// Members among leases of [`list`], by their ids.
pub fn members(found: &BTreeMap<String, Found>, webhook: &str) -> BTreeMap<String, Member> {
    let member = |(name, found): (&String, &Found)| {
        let id = name.strip_prefix(webhook)?.strip_prefix('/')?;
        Some((id.to_owned(), Member { doc: found.doc.clone(), knows: found.knows.clone() }))
    };
    found.iter().filter_map(member).collect()
}

/// A lease that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// For the decision.
    pub doc: Doc,
    /// Of a member: for whom it tells nothing any more.
    pub knows: BTreeSet<String>,
    /// Whose it is, for people: `process 4711 on db1`.
    pub place: String,
    /// Whether it is one. What is none is waited out, then overwritten.
    pub is_readable: bool,
}

/// All leases, by webhook.
///
/// # Errors
/// As [`Server::request`].
pub fn list(server: &Server, state_db: &str, limits: Limits) -> Result<BTreeMap<String, Found>> {
    let (rows, _) = all_docs::beginning_with::<Box<RawValue>>(server, state_db, PREFIX, None, limits)?;
    let leases = rows.iter().filter_map(|row| {
        let name = row.id.strip_prefix(PREFIX)?;
        Some((name.to_owned(), parse(row.doc.as_ref()?.get().as_bytes())?))
    });
    Ok(leases.collect())
}

/// One lease, as most copies of a cluster have it; `None` when there is none.
///
/// # Errors
/// As [`Server::request`].
pub fn read(server: &Server, state_db: &str, webhook: &str, limits: Limits) -> Result<Option<Found>> {
    let path = db_path(state_db, &[&format!("{PREFIX}{webhook}")]);
    let body = found(server.request_within(&Method::GET, &path, None, &[], limits))?;
    Ok(body.and_then(|body| parse(&body)))
}

/// `None` for what has no `_rev`: CouchDB gives no such document.
fn parse(json: &[u8]) -> Option<Found> {
    #[derive(Deserialize)]
    struct Revision {
        #[serde(rename = "_rev")]
        rev: String,
    }
    let rev = serde_json::from_slice::<Revision>(json).ok()?.rev;
    Some(match serde_json::from_slice::<Stored>(json) {
        Ok(stored) => Found {
            place: format!("process {} on {}", stored.pid, stored.host),
            doc: Doc {
                rev,
                holder: stored.holder,
                n: stored.n,
                released: stored.released,
                ttl: Duration::from_millis(stored.ttl_ms),
            },
            knows: stored.knows.unwrap_or_default(),
            is_readable: true,
        },
        Err(_) => Found {
            place: "somebody unknown".to_owned(),
            doc: Doc { rev, holder: String::new(), n: 0, released: false, ttl: Duration::ZERO },
            knows: BTreeSet::new(),
            is_readable: false,
        },
    })
}

/// What is to be written of one lease.
#[derive(Debug, Clone)]
pub struct Change {
    /// The webhook's name, or a [`member_name`].
    pub name: String,
    /// What, and over what.
    pub order: Order,
    /// Of a member: for whom it tells nothing any more. It is deleted instead of released.
    pub knows: Option<BTreeSet<String>>,
}

/// Writes leases, each by itself; gives what came of each, in order.
///
/// # Errors
/// As [`Server::request`]: then it is not known what was written.
pub fn write(
    server: &Server,
    state_db: &str,
    us: &Daemon,
    times: Times,
    changes: &[Change],
    limits: Limits,
) -> Result<Vec<Answer>> {
    #[derive(Deserialize)]
    struct Outcome {
        id: String,
        rev: Option<String>,
        error: Option<String>,
        reason: Option<String>,
    }
    let docs = changes.iter().map(|Change { name, order, knows }| Stored {
        id: format!("{PREFIX}{name}"),
        rev: order.over.clone(),
        holder: us.id.clone(),
        host: us.host.clone(),
        pid: us.pid,
        n: order.n,
        ttl_ms: u64::try_from(times.ttl.as_millis()).unwrap_or(u64::MAX),
        released: order.write == Write::Release,
        knows: knows.clone(),
        deleted: knows.is_some() && order.write == Write::Release,
        written_at: Some(sys::wall()),
    });
    let body = json!({ "docs": docs.collect::<Vec<_>>() }).to_string();
    let path = db_path(state_db, &["_bulk_docs"]);
    let reply = server.request_within(&Method::POST, &path, Some(&body), &[], limits)?;
    let outcomes: Vec<Outcome> = from_json(&reply.body).context(|| format!("POST {path}"))?;
    let answer = |name: &str| {
        let id = format!("{PREFIX}{name}");
        match outcomes.iter().find(|outcome| outcome.id == id) {
            Some(Outcome { rev: Some(rev), error: None, .. }) => Ok(Answer::Written(rev.clone())),
            Some(outcome) if outcome.error.as_deref() == Some("conflict") => Ok(Answer::Conflict),
            Some(Outcome { error: Some(error), reason, .. }) => Err(Error::new(
                Kind::Forbidden,
                format!("`{id}` could not be written: {error}: {}", reason.as_deref().unwrap_or_default()),
            )),
            _ => Ok(Answer::Unknown),
        }
    };
    changes.iter().map(|change| answer(&change.name)).collect()
}

/// Stands for "whatever the time is".
const EVER: u64 = u64::MAX;

/// That a webhook may be told by this daemon, for one stretch of time without anybody else in between.
///
/// Whoever tells asks [`Hold::is_valid`] immediately before; whoever stores does, too. Once it has ended it never comes
/// back: the next stretch has another one.
#[derive(Debug)]
pub struct Hold {
    /// Milliseconds since boot.
    until: AtomicU64,
    ended: AtomicBool,
    wakes: Mutex<Vec<Sender<()>>>,
    share: Option<Share>,
}

/// Which databases of a pattern are ours while a [`Hold`] is: with `lease = shared`, a part of them.
///
/// Whoever tells them looks at [`Share::generation`] from time to time. When it is another, it begins nothing for what is not
/// [`Share::is_mine`] any more, ends what is under way for it (the last delivery answered, the last checkpoint stored), and
/// then says so with [`Share::on_settled`] and the generation *read before it looked*. Only then do others begin.
#[derive(Debug, Default)]
pub struct Share {
    division: Mutex<Arc<Division>>,
    generation: AtomicU64,
    settled: AtomicU64,
}

impl Share {
    /// Whether a database is ours to tell.
    pub fn is_mine(&self, db: &str) -> bool {
        self.division().is_mine(db)
    }

    /// What is whose, to ask for many databases at once.
    pub fn division(&self) -> Arc<Division> {
        Arc::clone(&locked(&self.division))
    }

    /// Changes whenever something may be ours that was not, or the other way round; 0 before anything is.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Nothing is told any more, or begun, that was not ours at this generation.
    pub fn on_settled(&self, generation: u64) {
        self.settled.fetch_max(generation, Ordering::SeqCst);
    }

    /// Up to which generation that is so.
    pub fn settled(&self) -> u64 {
        self.settled.load(Ordering::SeqCst)
    }

    /// What is whose from now on.
    pub fn set(&self, division: &Division, generation: u64) {
        if self.generation() != generation {
            *locked(&self.division) = Arc::new(division.clone());
            self.generation.store(generation, Ordering::SeqCst);
        }
    }
}

impl Hold {
    /// One that is valid from when it is set to be.
    pub fn new() -> Arc<Hold> {
        Hold::with(0, None)
    }

    /// The same of a webhook whose databases are divided.
    pub fn of_share() -> Arc<Hold> {
        Hold::with(0, Some(Share::default()))
    }

    /// For what needs no lease.
    pub fn unlimited() -> Arc<Hold> {
        Hold::with(EVER, None)
    }

    fn with(until: u64, share: Option<Share>) -> Arc<Hold> {
        let (until, ended) = (AtomicU64::new(until), AtomicBool::new(false));
        Arc::new(Hold { until, ended, wakes: Mutex::default(), share })
    }

    /// Which databases are ours, where not all are.
    pub fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }

    /// Whether we may tell now, by this machine's clock.
    pub fn is_valid(&self) -> bool {
        if self.is_ended() {
            return false;
        }
        match self.until.load(Ordering::SeqCst) {
            EVER => true,
            until => sys::since_boot() < Duration::from_millis(until),
        }
    }

    /// As [`Hold::is_valid`]; if not, `wake` is told when it may be so again.
    pub fn is_valid_or_wakes(&self, wake: &Sender<()>) -> bool {
        if self.is_valid() {
            return true;
        }
        let mut wakes = locked(&self.wakes);
        if !wakes.iter().any(|other| other.same_channel(wake)) {
            wakes.push(wake.clone());
        }
        drop(wakes);
        // It may have become so before we were on the list.
        self.is_valid()
    }

    /// For what may be done only while it is ours.
    ///
    /// # Errors
    /// `Stopped` when it is not.
    pub fn check(&self) -> Result<()> {
        match self.is_valid() {
            true => Ok(()),
            false => Err(Error::new(Kind::Stopped, "the lease of this webhook is not ours now")),
        }
    }

    /// Waits until we may tell again; `false` when we never will.
    pub fn wait(&self) -> bool {
        while !self.is_ended() {
            if self.is_valid() {
                return true;
            }
            sys::sleep(WAIT_CHECK);
        }
        false
    }

    /// It is ours up to this moment, since boot.
    pub fn set_until(&self, until: Duration) {
        let until = u64::try_from(until.as_millis()).unwrap_or(EVER - 1);
        self.until.store(until, Ordering::SeqCst);
        if self.is_valid() {
            for wake in locked(&self.wakes).drain(..) {
                // Full: it is awake.
                let _ = wake.try_send(());
            }
        }
    }

    /// It is not ours any more.
    pub fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        locked(&self.wakes).drain(..).for_each(|wake| {
            let _ = wake.try_send(());
        });
    }

    /// Whether it has ended for good.
    pub fn is_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }
}

/// A poisoned lock guards a list that stays whole whatever panicked.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::couch::scripted::{Scripted, send};

    const TTL: Duration = Duration::from_secs(15);

    #[test]
    fn a_hold_is_valid_up_to_its_time_and_never_after_its_end() {
        let now = sys::since_boot();
        let hold = Hold::new();
        assert!(!hold.is_valid() && hold.check().is_err());
        let (wake, woken) = bounded(1);
        assert!(!hold.is_valid_or_wakes(&wake));
        hold.set_until(now + Duration::from_secs(100));
        assert!(hold.is_valid() && woken.try_recv().is_ok());
        hold.set_until(now.checked_sub(Duration::from_millis(1)).unwrap());
        assert!(!hold.is_valid());
        hold.set_until(now + Duration::from_secs(100));
        hold.end();
        hold.set_until(now + Duration::from_secs(100));
        assert!(!hold.is_valid() && !hold.wait());
        assert!(Hold::unlimited().is_valid());
    }

    #[test]
    fn leases_are_written_under_their_rev_and_read_as_far_as_they_are_leases() {
        let server = Scripted::start(|seen, stream| match seen.method.as_str() {
            "POST" => send(
                stream,
                201,
                r#"[{"id":"lease:b","error":"conflict","reason":"Document update conflict."},
                    {"ok":true,"id":"lease:a","rev":"2-x"}]"#,
            ),
            _ => send(
                stream,
                200,
                r#"{"total_rows":2,"offset":0,"rows":[
                    {"id":"lease:a","key":"lease:a","value":{"rev":"2-x"},"doc":{"_id":"lease:a","_rev":"2-x",
                     "holder":"daemon:h:7:1","host":"h","pid":7,"n":2,"ttl_ms":15000,"later":1}},
                    {"id":"lease:b","key":"lease:b","value":{"rev":"9-y"},"doc":{"_id":"lease:b","_rev":"9-y","holder":7}}]}"#,
            ),
        });
        let us = Daemon::new();
        let couch = server.server(None);
        let take = Order { write: Write::Take, over: None, n: 1 };
        let renew = Order { write: Write::Renew, over: Some("8-y".to_owned()), n: 5 };
        let change = |name: &str, order: Order| Change { name: name.to_owned(), order, knows: None };
        let orders = [change("a", take), change("b", renew)];
        let answers = write(&couch, "state", &us, Times::of(TTL), &orders, Limits::default()).unwrap();
        assert_eq!(answers, [Answer::Written("2-x".to_owned()), Answer::Conflict]);
        let body: serde_json::Value = serde_json::from_str(&server.seen()[0].body).unwrap();
        assert_eq!(body["docs"][0].get("_rev"), None);
        assert_eq!((&body["docs"][1]["_rev"], &body["docs"][1]["n"]), (&json!("8-y"), &json!(5)));
        assert_eq!(body["docs"][0]["holder"], us.id);
        let found = list(&couch, "state", Limits::default()).unwrap();
        assert_eq!(found["a"].place, "process 7 on h");
        assert_eq!((found["a"].doc.n, found["a"].doc.ttl, found["a"].doc.released), (2, TTL, false));
        // What is none is somebody's.
        assert!(!found["b"].is_readable && !found["b"].doc.released);
        assert_eq!(found["b"].doc.rev, "9-y");
    }
}
