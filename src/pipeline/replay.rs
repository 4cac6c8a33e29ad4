//! Letters that an operator sends again: found page by page, handed to the machine, counted.
//!
//! Guarantees that what is reported is derived from what is still stored: a run that was killed begins anew with the
//! letters that are left, and those that are gone were delivered. When one is sent, and whether, is decided by
//! `pure::dispatch`; which revision is told, by `pipeline::store`.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::couch::letters::{Filter, Stored};
use crate::couch::requests::{Progress, Request, text};
use crate::error::Result;
use crate::pipeline::store::Errand;
use crate::pure::dispatch::{ASKED_MAX, Asked, Dispatch, FlowIndex, Replayed, SuspectLetter};
use crate::pure::message::WebhookId;

/// How often a run says how far it has come.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Letters that stay are named up to so many.
const EXAMPLES_MAX: usize = 20;
/// Requests remembered to be over: the feed may still bring them as they were before their last answer.
const OVER_MAX: usize = 64;
/// When letters could not be listed, or the end not be reported, it is tried again after this.
const AGAIN: Duration = Duration::from_secs(2);

/// Who sends letters again.
pub(crate) trait Replayer {
    /// The machine.
    fn dispatch(&mut self) -> &mut Dispatch;
    /// The place of a database; `None` for one that is not watched.
    fn flow_of(&mut self, db: &str) -> Option<FlowIndex>;
    /// Has an errand done.
    fn order(&mut self, errand: Errand);
}

/// All that a webhook was asked to send again; one request after the other.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    waiting: VecDeque<Request>,
    run: Option<Run>,
    /// Answered for good, the last ones.
    over: VecDeque<String>,
}

/// One request.
#[derive(Debug)]
struct Run {
    request: Request,
    filter: Filter,
    asked: Asked,
    listing: Listing,
    /// All that are left, counted before the first one is sent.
    n_left_at_start: u64,
    queue: VecDeque<Stored>,
    at_work: HashMap<WebhookId, Stored>,
    n_delivered: u64,
    n_superseded: u64,
    n_refused: u64,
    n_failed: u64,
    n_gone: u64,
    examples: Vec<Value>,
    report_at: Option<Instant>,
    changed: bool,
    ended: bool,
}

#[derive(Debug)]
enum Listing {
    /// Behind this id, from then on.
    Next(Option<String>, Option<Instant>),
    UnderWay,
    Over,
}

impl Replays {
    /// One more request, unless it is known.
    pub(crate) fn ask(&mut self, request: Request) {
        let known =
            self.run.iter().map(|run| &run.request).chain(&self.waiting).any(|one| one.id == request.id);
        if !known && !self.over.contains(&request.id) {
            self.waiting.push_back(request);
        }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.run.is_none()
    }

    /// When [`Replays::go_on`] has to be called again though nothing happened.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let run = self.run.as_ref()?;
        let list_at = match &run.listing {
            Listing::Next(_, at) => *at,
            Listing::UnderWay | Listing::Over => None,
        };
        let report_at = run.report_at.filter(|_| run.changed);
        list_at.into_iter().chain(report_at).min()
    }

    /// Does what can be done now.
    pub(crate) fn go_on(&mut self, by: &mut impl Replayer, now: Instant) {
        if self.run.is_none()
            && let Some(request) = self.waiting.pop_front()
        {
            let pause =
                request.arguments.rate.map_or(Duration::ZERO, |rate| Duration::from_secs(1) / rate.max(1));
            by.dispatch().set_replay_pause(pause);
            self.run = Some(Run::new(request));
        }
        let Some(run) = &mut self.run else { return };
        if let Listing::Next(after, at) = &run.listing
            && at.is_none_or(|at| at <= now)
        {
            by.order(Errand::ListLetters(Box::new(run.filter.clone()), after.clone()));
            run.listing = Listing::UnderWay;
        }
        // Not before all are listed: what is told of the whole has to be counted first.
        let listed = matches!(run.listing, Listing::Over);
        while listed && by.dispatch().n_asked() < ASKED_MAX {
            let Some(stored) = run.queue.pop_front() else { break };
            match (by.flow_of(&stored.letter.db), WebhookId::parse(&stored.letter.id)) {
                (Some(flow), Some(id)) => {
                    let (doc_id, resolved) = (stored.letter.doc_id.clone(), stored.letter.resolved());
                    let letter = SuspectLetter { id, doc_id, resolved };
                    run.at_work.insert(id, stored);
                    by.dispatch().ask_replay(flow, letter, run.asked, now);
                }
                _ => run.stays(&stored, "its database is not watched here (any more)", |run| &mut run.n_gone),
            }
        }
        let over = listed && run.queue.is_empty() && run.at_work.is_empty();
        if over && !run.ended && run.report_at.is_none_or(|at| at <= now) {
            run.ended = true;
            run.changed = false;
            by.order(Errand::Answer(run.request.id.clone(), Progress::Done, run.answer()));
        } else if listed && run.changed && !run.ended && run.report_at.is_none_or(|at| at <= now) {
            run.changed = false;
            run.report_at = Some(now + REPORT_EVERY);
            by.order(Errand::Answer(run.request.id.clone(), Progress::Open, run.answer()));
        }
    }

    /// A page of letters, and where the next one begins.
    pub(crate) fn on_listed(&mut self, listed: Result<(Vec<Stored>, Option<String>)>, now: Instant) {
        let Some(run) = &mut self.run else { return };
        match listed {
            Ok((letters, next)) => {
                run.n_left_at_start += letters.len() as u64;
                run.queue.extend(letters);
                run.listing = match next {
                    Some(next) => Listing::Next(Some(next), None),
                    None => Listing::Over,
                };
                run.changed = true;
            }
            Err(_) => {
                // From the first page: what was read by then may be gone meanwhile.
                run.queue.clear();
                run.n_left_at_start = 0;
                run.listing = Listing::Next(None, Some(now + AGAIN));
            }
        }
    }

    /// The letter with this id, to be sent again because an operator asked.
    pub(crate) fn letter(&self, id: &WebhookId) -> Option<(&Stored, Asked)> {
        let run = self.run.as_ref()?;
        Some((run.at_work.get(id)?, run.asked))
    }

    /// What came of one.
    pub(crate) fn on_replayed(&mut self, id: &WebhookId, end: &Replayed) {
        let Some(run) = &mut self.run else { return };
        let Some(stored) = run.at_work.remove(id) else { return };
        run.changed = true;
        match end {
            Replayed::Delivered => run.n_delivered += 1,
            Replayed::Superseded(rev) => {
                let by = rev.as_deref().unwrap_or("a newer revision");
                run.stays(&stored, &format!("superseded by {by}"), |run| &mut run.n_superseded);
            }
            Replayed::Refused => run.stays(&stored, "refused again", |run| &mut run.n_refused),
            Replayed::Failed => run.stays(&stored, "the endpoint failed at it", |run| &mut run.n_failed),
            Replayed::Gone => run.stays(&stored, "there is no such document", |run| &mut run.n_gone),
            Replayed::Unreadable(why) => {
                run.stays(&stored, &format!("its document cannot be read: {why}"), |run| &mut run.n_failed);
            }
        }
    }

    /// Letters were discarded: nothing comes of them any more, but of those in flight.
    pub(crate) fn on_discarded(&mut self, gone: &[WebhookId]) {
        let Some(run) = &mut self.run else { return };
        let ids: std::collections::HashSet<String> = gone.iter().map(ToString::to_string).collect();
        run.queue.retain(|stored| !ids.contains(&stored.letter.id));
        gone.iter().for_each(|id| drop(run.at_work.remove(id)));
        run.changed = true;
    }

    /// The last answer of a run is stored, or is not.
    pub(crate) fn on_answered(&mut self, stored: bool, now: Instant) {
        match self.run.take() {
            Some(run) if stored => {
                self.over.push_back(run.request.id);
                let n_over = self.over.len().saturating_sub(OVER_MAX);
                self.over.drain(..n_over);
            }
            Some(run) => {
                let report_at = Some(now + AGAIN);
                self.run = Some(Run { ended: false, changed: true, report_at, ..run });
            }
            None => {}
        }
    }
}

impl Run {
    fn new(request: Request) -> Run {
        let wanted = request.arguments.letters.clone().unwrap_or_default();
        Run {
            filter: Filter::of(&request.webhook, &wanted),
            asked: Asked { even_if_superseded: request.arguments.even_if_superseded },
            request,
            listing: Listing::Next(None, None),
            n_left_at_start: 0,
            queue: VecDeque::new(),
            at_work: HashMap::new(),
            n_delivered: 0,
            n_superseded: 0,
            n_refused: 0,
            n_failed: 0,
            n_gone: 0,
            examples: Vec::new(),
            report_at: None,
            changed: false,
            ended: false,
        }
    }

    fn stays(&mut self, stored: &Stored, why: &str, count: impl Fn(&mut Run) -> &mut u64) {
        *count(self) += 1;
        if self.examples.len() < EXAMPLES_MAX {
            let letter = &stored.letter;
            let mut example = text("id", &*letter.id);
            example.extend(text("db", &*letter.db));
            example.extend(text("doc_id", &*letter.doc_id));
            example.extend(text("why", why));
            self.examples.push(Value::Object(example));
        }
    }

    fn answer(&self) -> Map<String, Value> {
        let stay = self.n_superseded + self.n_refused + self.n_failed + self.n_gone;
        let n_letters = self.request.arguments.letters.as_ref().map_or(0, |letters| letters.n_letters);
        let n_letters = n_letters.max(self.n_left_at_start);
        let before = n_letters - self.n_left_at_start;
        let waiting = self.queue.len() as u64 + self.at_work.len() as u64;
        let answer = json!({
            "letters": n_letters,
            // Of earlier runs, too: what is not there any more was.
            "delivered": before + self.n_delivered,
            "superseded": self.n_superseded,
            "refused": self.n_refused,
            "failed": self.n_failed,
            "gone": self.n_gone,
            "left": waiting + stay,
            "stay": self.examples,
        });
        match answer {
            Value::Object(answer) => answer,
            _ => Map::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::couch::requests::{Arguments, Command};
    use crate::sys;

    #[test]
    fn a_request_that_is_over_is_not_begun_again_by_a_late_row_of_it() {
        let now = sys::now();
        let mut replays = Replays::default();
        let request = Request::new("orders", Command::Replay, Arguments::default(), "anna");
        replays.ask(request.clone());
        let run = Run { listing: Listing::Over, ended: true, ..Run::new(request.clone()) };
        replays.waiting.clear();
        replays.run = Some(run);
        replays.on_answered(false, now);
        assert!(!replays.is_empty(), "to be answered once more");
        replays.on_answered(true, now);
        // As it stood when it last said how far it had come.
        replays.ask(request);
        assert!(replays.is_empty());
    }
}
