//! Several events in one request: which go together, and what follows for each of them.
//!
//! Guarantees (DESIGN §5, §6): a batch holds each document once, in order of arrival, and all its lanes are busy while it
//! is in flight; it is one delivery, with one permit; what failed before goes alone, so that a refused batch, or one
//! that the endpoint failed at, is sent again as single events and nobody is blamed for his neighbours. While the
//! endpoint is down, or was not heard of yet, single events go out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pure::dispatch::{Action, Attempt, Dispatch, FlowIndex, attempt, lane_key};
use crate::pure::endpoint::{BatchVerdict, Moment, Outcome, Trial};
use crate::pure::lanes::{LaneIndex, Picked};
use crate::pure::message::WebhookId;

/// `batch_max`, `batch_wait`, `batch_bytes_max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Events of a batch, at least 2.
    pub max: usize,
    /// How long an event that could go waits for others.
    pub wait: Duration,
    /// Of the body, in bytes, about; one event goes whatever its size.
    pub bytes_max: usize,
}

/// One request that tells several events.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Names it in the answer; the tokens of its parts do not.
    pub token: u64,
    /// Made of those of its events, in their order.
    pub id: WebhookId,
    /// At least two, of different documents, in order of arrival within each database.
    pub parts: Vec<Attempt>,
    /// The highest among its parts.
    pub attempt: u32,
}

/// What is to be sent next.
pub(super) enum Next {
    /// The next event of a database.
    Of(FlowIndex),
    /// One event, of this lane.
    One(FlowIndex, LaneIndex),
    /// Several.
    Batch(Vec<(FlowIndex, LaneIndex)>),
    /// Nothing: there is nothing, or it waits for company.
    Nothing,
}

impl Dispatch {
    /// Decides what goes out next, of an endpoint that takes events in order of arrival.
    pub(super) fn next_batch(&mut self, batching: Batching, now: Instant) -> Next {
        let n = self.flows.len();
        let mut lanes: Vec<(FlowIndex, LaneIndex)> = Vec::new();
        let mut bytes_left = batching.bytes_max;
        let mut is_full = false;
        for flow in (0..n).map(|i| (self.turn + i) % n) {
            let n_left = batching.max - lanes.len();
            match self.flows[flow].lanes().pick(now, n_left, bytes_left) {
                Picked::Alone(lane) => return Next::One(flow, lane),
                Picked::Fresh { lanes: fresh, bytes, is_full: full } => {
                    bytes_left = bytes_left.saturating_sub(bytes);
                    lanes.extend(fresh.into_iter().map(|lane| (flow, lane)));
                    is_full |= full || lanes.len() >= batching.max;
                }
            }
            if is_full {
                break;
            }
        }
        if lanes.is_empty() && !is_full {
            self.batch_since = None;
            return Next::Nothing;
        }
        if !is_full && batching.wait > Duration::ZERO {
            let since = *self.batch_since.get_or_insert(now);
            if now < since + batching.wait {
                return Next::Nothing;
            }
        }
        match lanes.len() {
            // One that is larger than a batch may be goes by itself.
            0 | 1 => {
                let first = lanes.pop().or_else(|| self.first_ready(now));
                first.map_or(Next::Nothing, |(flow, lane)| Next::One(flow, lane))
            }
            _ => Next::Batch(lanes),
        }
    }

    fn first_ready(&mut self, now: Instant) -> Option<(FlowIndex, LaneIndex)> {
        let n = self.flows.len();
        (0..n).map(|i| (self.turn + i) % n).find_map(|flow| {
            let lane = self.flows[flow].lanes().first_ready(now)?;
            Some((flow, lane))
        })
    }

    /// Starts one delivery of several events.
    pub(super) fn start_batch(
        &mut self,
        lanes: Vec<(FlowIndex, LaneIndex)>,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let token = self.token();
        self.endpoint.on_start(token, &mut Trial::default(), now);
        let mut parts = Vec::with_capacity(lanes.len());
        for (flow, lane) in lanes {
            let part = self.token();
            let pending = self.flows[flow].lanes().take_lane(lane, part).expect("it was picked just now");
            self.endpoint.join(&mut pending.trial);
            parts.push(attempt(part, flow, Arc::clone(&pending.event), pending.trial.attempts));
            self.turn = flow + 1;
        }
        let ids: Vec<String> = parts.iter().map(|part| part.event.id.to_string()).collect();
        self.batches.insert(token, parts.iter().map(|part| (part.token, part.flow)).collect());
        self.batch_since = None;
        let attempt = parts.iter().map(|part| part.attempt).max().unwrap_or(1);
        actions.push(Action::Batch(Batch { token, id: WebhookId::of(&ids), parts, attempt }));
    }

    /// Whether `token` names a batch in flight.
    pub fn is_batch(&self, token: u64) -> bool {
        self.batches.contains_key(&token)
    }

    /// What came of a batch.
    pub(super) fn on_batch_outcome(&mut self, token: u64, outcome: Outcome, at: Moment) {
        let Some(parts) = self.batches.remove(&token) else { return };
        let (first, flow) = parts[0];
        let pending = self.flows[flow].lanes().busy_mut(first).expect("a batch's lanes are busy");
        let lane = lane_key(flow, &pending.event);
        let verdict = self.endpoint.on_batch_outcome(lane, parts.len() as u64, outcome, at);
        for (part, flow) in parts {
            let retry_at = match verdict {
                BatchVerdict::Delivered => {
                    self.finish(flow, part, at.now);
                    continue;
                }
                BatchVerdict::Apart | BatchVerdict::Retry { .. } => {
                    let pending = self.flows[flow].lanes().busy_mut(part).expect("a batch's lanes are busy");
                    self.endpoint.part(verdict, &mut pending.trial, at)
                }
            };
            self.flows[flow].on_retry(part, retry_at, at.now);
        }
    }

    /// The batch was not sent, or not to its end, because we are being stopped.
    pub(super) fn on_batch_given_back(&mut self, token: u64, now: Instant) {
        let Some(parts) = self.batches.remove(&token) else { return };
        self.endpoint.on_given_back(token);
        for (part, flow) in parts {
            self.flows[flow].on_retry(part, now, now);
        }
    }

    /// When what waits for company goes without.
    pub(super) fn batch_deadline(&self) -> Option<Instant> {
        Some(self.batch_since? + self.batching?.wait)
    }
}
