//! One webhook in the keeper of leases: what is handed out for it, what is written of it, what is said of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::couch::leases::{self, Change, Found, Hold};
use crate::pure::lease::{Lease, Order, State, Times, Write};
use crate::pure::share::{Member, Members};
use crate::sys;

/// One webhook.
pub(super) struct Entry {
    pub(super) lease: Lease,
    /// What its document is called behind [`leases::PREFIX`].
    pub(super) lease_name: String,
    /// `lease = shared`: who has which part.
    pub(super) shared: Option<Sharing>,
    /// When it was seen to be somebody else's.
    pub(super) standby_since: jiff::Timestamp,
    /// What is handed out, and for which tenure.
    pub(super) hold: Option<(u64, Arc<Hold>)>,
    pub(super) wanted: bool,
    /// Whose the lease is, for people.
    pub(super) place: String,
    /// What was said last.
    pub(super) said: Option<State>,
    pub(super) has_lapsed: bool,
    pub(super) said_unreadable: bool,
}

/// Our part in a webhook that several daemons divide.
pub(super) struct Sharing {
    /// Names this membership: no other ever has the same.
    pub(super) id: String,
    /// While our lease is held, and was looked at after it was written.
    pub(super) members: Option<Members>,
    /// What our lease says.
    pub(super) knows: BTreeSet<String>,
}

impl Entry {
    pub(super) fn new(lease: Lease, lease_name: String, shared: Option<Sharing>) -> Entry {
        Entry {
            lease,
            lease_name,
            shared,
            standby_since: sys::wall(),
            hold: None,
            wanted: true,
            place: String::new(),
            said: None,
            has_lapsed: false,
            said_unreadable: false,
        }
    }

    /// An order with what our lease says beside.
    pub(super) fn change(&self, order: Order) -> Change {
        let knows = self.shared.as_ref().map(|sharing| {
            sharing.members.as_ref().map(|members| members.knows().clone()).unwrap_or_default()
        });
        Change { name: self.lease_name.clone(), order, knows }
    }

    /// Other members that have not renewed their leases for too long are taken out.
    pub(super) fn expels(&self, webhook: &str, now: Duration) -> Vec<Change> {
        let members = self.shared.as_ref().and_then(|sharing| sharing.members.as_ref());
        let dead = members.map(|members| members.to_expel(now)).unwrap_or_default();
        let expel = |(id, rev): (String, String)| {
            let order = Order { write: Write::Release, over: Some(rev), n: 0 };
            Change { name: leases::member_name(webhook, &id), order, knows: Some(BTreeSet::new()) }
        };
        dead.into_iter().map(expel).collect()
    }

    /// Whether somebody has what was handed out.
    pub(super) fn is_used(&self) -> bool {
        self.hold.as_ref().is_some_and(|(_, hold)| Arc::strong_count(hold) > 1)
    }

    pub(super) fn note(&mut self, name: &str, found: Option<&Found>, state_db: &str) {
        let held = found.filter(|found| !found.doc.released);
        self.place = held.map(|found| found.place.clone()).unwrap_or_default();
        let unreadable = found.is_some_and(|found| !found.is_readable);
        if unreadable && !std::mem::replace(&mut self.said_unreadable, true) {
            log::warn!(
                "`{state_db}`: document `lease:{name}` is no lease; somebody else may tell the webhook for as long as it \
                 changes"
            );
        }
        self.said_unreadable &= unreadable;
    }

    /// Hands out what we may tell, and takes back what we may not.
    pub(super) fn hand_out(&mut self, alone_until: Duration) {
        let telling = self.lease.telling();
        if let Some((_, hold)) =
            self.hold.take_if(|(tenure, _)| telling.is_none_or(|telling| telling.tenure != *tenure))
        {
            hold.end();
        }
        if let Some(telling) = telling {
            let new = if self.shared.is_some() { Hold::of_share } else { Hold::new };
            let (_, hold) = self.hold.get_or_insert_with(|| (telling.tenure, new()));
            hold.set_until(telling.until.unwrap_or(alone_until));
            let members = self.shared.as_ref().and_then(|sharing| sharing.members.as_ref());
            if let (Some(members), Some(share)) = (members, hold.share()) {
                share.set(members.division(), members.generation());
            }
        }
    }

    /// Of a webhook that is divided: takes note of what was let go, so that others hear of it.
    pub(super) fn settle(&mut self) {
        let (Some(sharing), Some((_, hold))) = (&mut self.shared, &self.hold) else { return };
        if let (Some(members), Some(share)) = (&mut sharing.members, hold.share()) {
            members.on_settled(share.settled());
            if *members.knows() != sharing.knows {
                self.lease.hurry();
            }
        }
    }

    /// Says what is new of it.
    pub(super) fn say(&mut self, name: &str, now: Duration) {
        let state = self.lease.state();
        let lapsed = state == State::Held
            && self.lease.telling().and_then(|telling| telling.until).is_some_and(|until| now >= until);
        if lapsed != self.has_lapsed {
            self.has_lapsed = lapsed;
            match lapsed {
                true => log::warn!(
                    "webhook `{name}`: its lease could not be renewed in time: nothing is sent until CouchDB takes a \
                     renewal"
                ),
                false if state == State::Held => {
                    log::info!(
                        "webhook `{name}`: its lease was renewed and nobody took it meanwhile: it goes on"
                    );
                }
                false => {}
            }
        }
        let before = self.said.replace(state);
        if before == Some(state) || !self.wanted {
            return;
        }
        let place = &self.place;
        match (before, state) {
            (Some(State::Alone), State::Held) => {
                log::info!("webhook `{name}`: another daemon is there; we hold its lease and go on");
            }
            (Some(State::Held), State::Alone) => {
                log::info!("webhook `{name}`: no other daemon is there any more; told without a lease");
            }
            (_, State::Held) => log::info!("webhook `{name}`: its lease is ours"),
            (Some(_), State::Unknown) => log::warn!(
                "webhook `{name}`: this process was stopped for long; it looks who else is there before it tells more"
            ),
            (Some(State::Alone | State::Held), State::Standby) => {
                log::warn!("webhook `{name}`: another daemon tells it now; stopped here");
            }
            (_, State::Standby) if !place.is_empty() => {
                log::info!("webhook `{name}`: {place} holds its lease; standing by");
            }
            (_, State::Standby) => log::info!("webhook `{name}`: another daemon is there; standing by"),
            (_, State::Alone | State::Unknown) => {}
        }
        if state == State::Standby {
            self.standby_since = sys::wall();
        }
    }
}

impl Sharing {
    /// A membership that is not looked at yet.
    pub(super) fn new(id: String) -> Sharing {
        Sharing { id, members: None, knows: BTreeSet::new() }
    }

    /// What members CouchDB shows, asked for after our own lease was written.
    pub(super) fn on_look(&mut self, found: BTreeMap<String, Member>, times: Times, now: Duration) {
        let new = || Members::new(&self.id, times, sys::jitter());
        self.members.get_or_insert_with(new).on_look(found, now);
    }
}
