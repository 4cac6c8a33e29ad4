//! Databases that the webhook finds by pattern: given a flow when there may be something new, let go at rest.
//!
//! Guarantees that a database that is let go has nothing unfinished and its checkpoint is stored; that at most
//! [`ACTIVE_MAX`] have a flow, so that thousands at once take bounded memory; and that what is known of them is stored
//! only after that is so. Which is to be read is `pure::roster`'s to decide.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use crate::config;
use crate::couch::databases::Info;
use crate::couch::leases::Share;
use crate::error::Kind;
use crate::pipeline::complaints::{Complaint, Outage};
use crate::pipeline::dispatcher::{Dispatcher, telling};
use crate::pipeline::feed_reader::Reading;
use crate::pipeline::lookout::Sighting;
use crate::pipeline::store::Errand;
use crate::pipeline::subscription::Subscription;
use crate::pure::checkpoint::{Mark, Seek};
use crate::pure::conflict;
use crate::pure::dispatch::FlowIndex;
use crate::pure::flow::Flow;
use crate::pure::pattern::Pattern;
use crate::pure::roster::{Entry, Roster};

/// Databases that have a flow at a time. Each takes a few KiB; most of them only wait for their checkpoint.
pub(super) const ACTIVE_MAX: usize = 1_024;
/// With `lease = shared`, how often it is looked whether the databases are divided anew.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// When letters could not be listed, it is tried again after this.
const LIST_AGAIN: Duration = Duration::from_secs(5);
/// What is known of the databases is stored this often, where it changed.
const SAVE_EVERY: Duration = Duration::from_secs(60);

/// What is known of them.
pub(super) struct Found {
    pattern: Pattern,
    roster: Roster,
    /// What the webhook's record says of databases, where commands have set it.
    seeks: BTreeMap<String, Seek>,
    sightings: Receiver<Sighting>,
    /// With `lease = shared`: the division that what is known goes by, and when to look for another.
    generation: u64,
    look_at: Option<Instant>,
    /// When to look for letters that became ours with their databases.
    suspects_at: Option<Instant>,
    /// Of all of them: thousands may have one fault.
    complaint: Complaint,
    save_at: Instant,
    /// Buckets on their way.
    n_saving: usize,
}

impl Found {
    /// As they were stored; `is_found` says which of them this webhook finds by pattern now. Others may have been found, or set
    /// to a place, by an earlier configuration, or be named singly.
    pub(super) fn new(
        pattern: Pattern,
        is_found: &dyn Fn(&str) -> bool,
        databases: Vec<(String, Entry)>,
        mut seeks: BTreeMap<String, Seek>,
        sightings: Receiver<Sighting>,
        now: Instant,
    ) -> Found {
        let roster = Roster::restored(databases.into_iter().filter(|(db, _)| is_found(db)));
        seeks.retain(|db, _| is_found(db));
        let mut found = Found {
            generation: 0,
            look_at: None,
            suspects_at: None,
            pattern,
            roster,
            seeks,
            sightings,
            complaint: Complaint::default(),
            save_at: now + SAVE_EVERY,
            n_saving: 0,
        };
        // Where a command has set it, a database is read whatever it is known to hold.
        for db in found.seeks.keys() {
            found.roster.stir(db);
        }
        found
    }

    pub(super) fn sightings(&self) -> &Receiver<Sighting> {
        &self.sightings
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let save_at = self.roster.is_changed().then_some(self.save_at);
        save_at.into_iter().chain(self.look_at).chain(self.roster.next_deadline()).min()
    }
}

impl Dispatcher<'_> {
    /// Something was seen of databases, those of other webhooks among them.
    pub(super) fn on_sighting(&mut self, sighting: Sighting) {
        let Some(found) = &mut self.found else { return };
        let state_db = &self.shared.state_db;
        let division = self.shared.hold.share().map(Share::division);
        let is_mine = |db: &str| division.as_ref().is_none_or(|division| division.is_mine(db));
        match sighting {
            Sighting::Hinted(hints) => {
                for hint in hints.iter().filter(|hint| found.pattern.matches(hint.db(), state_db)) {
                    match is_mine(hint.db()) {
                        true => {
                            found.roster.on_hint(hint.db()).inspect(|flow| self.dispatch.stir(*flow));
                        }
                        false => found.roster.on_theirs(hint.db()),
                    }
                }
            }
            Sighting::Infos(infos) => {
                for (db, info) in infos.iter().filter(|(db, _)| found.pattern.matches(db, state_db)) {
                    let flow = match info {
                        Info::Seen(_) if !is_mine(db) => {
                            found.roster.on_theirs(db);
                            None
                        }
                        Info::Seen(fingerprint) => found.roster.on_seen(db, *fingerprint),
                        Info::Gone if found.roster.is_known(db) => found.roster.stir(db),
                        Info::Gone => None,
                    };
                    flow.inspect(|flow| self.dispatch.stir(*flow));
                }
            }
            Sighting::Swept => found.roster.on_swept(),
        }
    }

    /// Gives flows to those that wait for one, and has stored what is known of the others.
    pub(super) fn attend(&mut self, now: Instant) {
        if self.stop.is_some() {
            return;
        }
        self.divide(now);
        while let Some((db, mark)) = self.next_found(now) {
            self.activate(&db, mark);
        }
        let Some(found) = self.found.as_mut().filter(|found| now >= found.save_at) else { return };
        found.save_at = now + SAVE_EVERY;
        // A `state_db` that takes nothing, or a lease that is not renewed, must not heap them up.
        if found.n_saving > 0 {
            return;
        }
        while let Some((bucket, entries)) = found.roster.take_changed() {
            found.n_saving += 1;
            self.store.order(Errand::Databases(bucket, entries));
        }
    }

    /// Goes by the division as it is now, and says so as soon as nothing is under way of what is not ours any more.
    fn divide(&mut self, now: Instant) {
        let (Some(found), Some(share)) = (&mut self.found, self.shared.hold.share()) else { return };
        found.look_at = Some(now + LOOK_EVERY);
        let generation = share.generation();
        if generation != found.generation {
            found.generation = generation;
            let division = share.division();
            for flow in found.roster.divide(|db| division.is_mine(db)) {
                self.dispatch.leave(flow);
            }
            found.suspects_at = Some(now);
        }
        if found.suspects_at.is_some_and(|at| at <= now) {
            found.suspects_at = None;
            self.store.order(Errand::ListSuspects);
        }
        if found.roster.is_settled() {
            share.on_settled(found.generation);
        }
    }

    /// Letters could not be listed.
    pub(super) fn list_suspects_again(&mut self, now: Instant) {
        if let Some(found) = &mut self.found {
            found.suspects_at = Some(now + LIST_AGAIN);
        }
    }

    fn next_found(&mut self, now: Instant) -> Option<(Arc<str>, Option<Mark>)> {
        let found = self.found.as_mut()?;
        // Before it is known who else is there nothing is ours, whatever is wanted.
        let is_divided = self.shared.hold.share().is_none_or(|_| found.generation > 0);
        if is_divided && found.roster.n_active() < ACTIVE_MAX { found.roster.next(now) } else { None }
    }

    /// The flow of a database that somebody wants to read, or to send letters of; `None` for one that is not ours.
    pub(super) fn flow_of(&mut self, db: &str) -> Option<FlowIndex> {
        if let Some(named) = self.webhook.db.iter().position(|named| named == db) {
            return Some(named);
        }
        let found = self.found.as_ref()?;
        if let Some(flow) = found.roster.flow(db) {
            return Some(flow);
        }
        let is_mine = self.shared.hold.share().is_none_or(|share| share.is_mine(db));
        if !found.pattern.matches(db, &self.shared.state_db) || !is_mine {
            return None;
        }
        let mark = found.roster.mark(db);
        Some(self.activate(db, mark))
    }

    fn activate(&mut self, db: &str, mark: Option<Mark>) -> FlowIndex {
        let (shared, webhook) = (self.shared, self.webhook);
        let flow = self.dispatch.add(new_flow(shared, webhook).resting());
        let found = self.found.as_mut().expect("only databases that are found are activated");
        let (seek, told) = (found.seeks.get(db).cloned(), Arc::new(telling(&shared.source, webhook, db)));
        let fed = &self.channels.fed.0;
        let subscription = Subscription::pooled(Reading::new(shared, webhook, &told, seek, flow, fed), mark);
        match self.subscriptions.get_mut(flow) {
            Some(place) => *place = subscription,
            None => self.subscriptions.push(subscription),
        }
        found.roster.on_active(db, flow);
        flow
    }

    /// A database that was found bears this mark now.
    pub(super) fn on_found_mark(&mut self, flow: FlowIndex, mark: Mark) {
        let Some(found) = &mut self.found else { return };
        let db = self.subscriptions[flow].db();
        if found.complaint.over() {
            log::info!("webhook `{}`: reading databases again", self.webhook.name);
        }
        if let Some(before) = found.roster.on_mark(db, mark)
            && self.webhook.conflicts
        {
            let place = conflict::place(&self.webhook.name, db, &before.to_string());
            self.store.order(Errand::ForgetConflicts(place));
        }
    }

    /// Changes of a database were read. Where no hint had named it, hints are not relied on.
    pub(super) fn on_found_changes(&mut self, flow: FlowIndex) {
        let Some(found) = &mut self.found else { return };
        if found.roster.on_changes(self.subscriptions[flow].db()) {
            self.shared.lookout.on_missed();
        }
    }

    /// All that there was of a database is told and stored.
    pub(super) fn let_go(&mut self, flow: FlowIndex) {
        let Some(found) = &mut self.found else { return };
        let db = self.subscriptions[flow].db();
        match found.roster.is_leaving(db) {
            true => found.roster.on_left(db, self.shared.hold.share().is_none_or(|share| share.is_mine(db))),
            false => found.roster.on_rested(db),
        }
        self.dispatch.release(flow);
    }

    /// A database that was found could not be read: it makes room for others, as soon as nothing of it is unfinished.
    pub(super) fn on_found_failed(
        &mut self,
        flow: FlowIndex,
        error: Option<&crate::error::Error>,
        now: Instant,
    ) {
        let Some(found) = &mut self.found else { return };
        let db = self.subscriptions[flow].db();
        let kind = error.map(crate::error::Error::kind);
        if let Some(error) = error {
            if Outage::concerns(error) {
                self.shared.outage.say(error);
            } else if kind != Some(Kind::NotFound) && found.complaint.is_news(error.kind(), now) {
                let name = &self.webhook.name;
                log::error!(
                    "webhook `{name}`, database `{db}`: {error}; trying again (others may have the same fault)"
                );
            }
        }
        let is_gone = kind == Some(Kind::NotFound);
        if is_gone {
            self.dispatch.on_database_gone(flow);
        }
        // One that is left to somebody else rests, fault or not; and who has heard that its position is not known has to
        // read on, from the beginning: another flow would begin at that position again.
        let has_to_stay = self.dispatch.is_pinned(flow) || kind == Some(Kind::BadSince);
        if has_to_stay || found.roster.is_leaving(db) {
            return;
        }
        if is_gone && self.dispatch.flow(flow).is_told() {
            found.roster.on_gone(db);
        } else if kind.is_some() && self.dispatch.flow(flow).is_done() {
            let is_its_own = !matches!(
                kind,
                Some(
                    Kind::Unreachable
                        | Kind::Cut
                        | Kind::Timeout
                        | Kind::Unauthorized
                        | Kind::Locked
                        | Kind::Stopped
                )
            );
            found.roster.on_failed(db, is_its_own, now);
        } else {
            return;
        }
        self.report.feed_opened(db);
        self.dispatch.release(flow);
    }

    /// A bucket is stored, or could not be.
    pub(super) fn on_databases_stored(&mut self, bucket: u8, stored: bool) {
        let Some(found) = &mut self.found else { return };
        found.n_saving -= 1;
        if !stored {
            found.roster.on_not_stored(bucket);
        }
    }
}

/// A flow as the webhook's options have it.
pub(super) fn new_flow(shared: &crate::pipeline::Shared, webhook: &config::Webhook) -> Flow {
    let strict = webhook.concurrency == 1;
    let hookd = &shared.hookd;
    let rotate = match webhook.filter {
        Some(_) => hookd.feed_rotate,
        None => hookd.feed_timeout * super::UNFILTERED_ROTATE,
    };
    Flow::new(strict, rotate, hookd.checkpoint_interval)
}

/// Where what is seen of databases comes in; never, where nothing is found by pattern.
pub(super) fn sightings(found: Option<&Found>) -> Receiver<Sighting> {
    found.map_or_else(crossbeam_channel::never, |found| found.sightings().clone())
}
