//! How a running webhook is, gathered while it runs and said once a second at most; and attempts for onlookers.
//!
//! Costs a comparison per turn of the dispatcher and two stores per delivery; nothing is decided by it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config;
use crate::error::{Error, Kind};
use crate::pipeline::Shared;
use crate::pipeline::board::{Attempts, Seen};
use crate::pipeline::webhook::{Answer, Job};
use crate::pure::dispatch::Dispatch;
use crate::pure::endpoint::Outcome;
use crate::pure::message::WebhookId;
use crate::pure::snapshot::{State, WebhookStatus};
use crate::sys;

/// Between two reports.
const EVERY: Duration = Duration::from_secs(1);

/// A delivery in flight, as its outcome needs it.
pub(crate) struct InFlight {
    /// What is told.
    pub(crate) id: WebhookId,
    /// When this attempt began.
    pub(crate) started: jiff::Timestamp,
    /// For whoever looks on.
    pub(crate) shown: Option<Box<Shown>>,
}

/// An attempt that somebody looks at.
pub(crate) struct Shown {
    attempts: Arc<Attempts>,
    began: Instant,
    seen: Seen,
}

impl Shown {
    /// What is known when it begins; `None` when nobody looks at this webhook.
    pub(crate) fn of(shared: &Shared, webhook: &config::Webhook, job: &Job) -> Option<Box<Shown>> {
        let attempts = shared.board.onlooker(&webhook.name)?;
        let (id, telling, doc_id, attempt, replay) = match job {
            Job::One(one, telling) => {
                (one.event.id, Some(telling), one.event.doc_id.clone(), one.attempt, one.replay)
            }
            Job::Batch(batch, tellings) => {
                (batch.id, tellings.first(), format!("({} events)", batch.parts.len()), batch.attempt, false)
            }
        };
        let seen = Seen {
            n: 0,
            at: sys::wall(),
            id: id.to_string(),
            db: telling.map(|telling| telling.db.clone()).unwrap_or_default(),
            doc_id,
            attempt,
            replay,
            status: None,
            milliseconds: 0,
            answer: String::new(),
        };
        Some(Box::new(Shown { attempts, began: sys::now(), seen }))
    }

    /// Shows what came of it.
    pub(crate) fn show(self, answer: &Answer) {
        let Shown { attempts, began, mut seen } = self;
        seen.at = sys::wall();
        seen.milliseconds = u64::try_from((sys::now() - began).as_millis()).unwrap_or(u64::MAX);
        seen.answer.clone_from(&answer.text);
        if let Outcome::Status { status, .. } = answer.outcome {
            seen.status = Some(status);
        }
        attempts.push(seen);
    }
}

/// What was seen of a webhook so far.
pub(crate) struct Report {
    due_at: Instant,
    changed: bool,
    success_at: Option<Instant>,
    failure: Option<(Instant, String)>,
    down: Option<&'static str>,
    paused: Option<String>,
    /// What is wrong with feeds, by database.
    feeds: BTreeMap<String, String>,
}

impl Report {
    /// Of a webhook that has just started; due at once.
    pub(crate) fn new() -> Report {
        Report {
            due_at: sys::now(),
            changed: true,
            success_at: None,
            failure: None,
            down: None,
            paused: None,
            feeds: BTreeMap::new(),
        }
    }

    /// What came of an attempt.
    pub(crate) fn on_outcome(&mut self, outcome: Outcome, is_delivered: bool, text: &str, now: Instant) {
        self.changed = true;
        match outcome {
            _ if is_delivered => self.success_at = Some(now),
            Outcome::Status { status, .. } => {
                let text = if text.is_empty() { String::new() } else { format!(": {text}") };
                self.failure = Some((now, format!("{status}{text}")));
            }
            Outcome::Unreachable | Outcome::Timeout | Outcome::Broken => {
                self.failure = Some((now, text.to_owned()));
            }
        }
    }

    /// The endpoint went down, and why, or takes events again.
    pub(crate) fn down(&mut self, why: Option<&'static str>) {
        self.down = why;
        self.at_once();
    }

    /// The webhook paused itself.
    pub(crate) fn pause(&mut self, why: String) {
        self.paused = Some(why);
        self.at_once();
    }

    /// A database's feed was opened, or is not read any more.
    pub(crate) fn feed_opened(&mut self, db: &str) {
        self.feeds.remove(db);
        self.changed = true;
    }

    /// A feed was lost, or could not be opened.
    pub(crate) fn feed_failed(&mut self, db: &str, error: Option<&Error>) {
        // A request that was cut, or timed out, is opened again at once and no state of the webhook.
        let Some(error) = error.filter(|error| !matches!(error.kind(), Kind::Cut | Kind::Stopped)) else {
            return;
        };
        let found = match error.kind() {
            Kind::NotFound => "does not exist".to_owned(),
            _ => error.cause().to_owned(),
        };
        self.feeds.insert(db.to_owned(), found);
        self.changed = true;
    }

    fn at_once(&mut self) {
        self.changed = true;
        self.due_at = sys::now();
    }

    /// Whether there is something to say.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.changed && now >= self.due_at
    }

    /// When there will be.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.changed.then_some(self.due_at)
    }

    /// How it is now.
    pub(crate) fn status(&mut self, dispatch: &mut Dispatch, now: Instant) -> WebhookStatus {
        (self.changed, self.due_at) = (false, now + EVERY);
        let wall = sys::wall();
        let ago = |at: Instant| wall - (now - at);
        let endpoint = dispatch.endpoint();
        let feed = self.feeds.first_key_value().map(|(db, found)| format!("database `{db}`: {found}"));
        let (state, why) = if let Some(why) = &self.paused {
            (State::Paused, Some(why.clone()))
        } else if endpoint.is_gone() {
            (State::Gone, Some("its endpoint answered 410".to_owned()))
        } else if endpoint.is_down() {
            (State::Down, self.down.map(|why| format!("its endpoint {why}")))
        } else if feed.is_some() {
            (State::Waiting, feed)
        } else {
            (State::Running, None)
        };
        let next_try = endpoint.next_deadline().filter(|_| state == State::Down);
        WebhookStatus {
            why,
            unfinished: dispatch.n_pending() as u64,
            oldest: dispatch.oldest(),
            last_success: self.success_at.map(ago),
            last_failure: self.failure.as_ref().map(|(at, _)| ago(*at)),
            failure: self.failure.as_ref().map(|(_, text)| text.clone()),
            next_try: next_try.map(|at| wall + at.saturating_duration_since(now)),
            ..WebhookStatus::new(state, wall)
        }
    }
}
