//! Letters that an operator sends again: found page by page, handed to the machine, counted.
//!
//! Guarantees that what is reported is derived from what is still stored: a run that was killed begins anew with the
//! letters that are left, and those that are gone were delivered. When one is sent, and whether, is decided by
//! `pure::dispatch`; which revision is told, by `pipeline::store`.
//!
//! Where several daemons divide the databases (`lease = shared`) each sends the letters of its own, and says so as a *part* of
//! the answer. When they are divided anew each looks for letters once more; a request is over when every part is, of one
//! and the same division.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::couch::letters::{Filter, Stored};
use crate::couch::requests::{Part, Progress, Request, STAY_MAX, Tally, text};
use crate::error::Result;
use crate::pipeline::store::Errand;
use crate::pure::dispatch::{ASKED_MAX, Asked, Dispatch, FlowIndex, Replayed, SuspectLetter};
use crate::pure::message::WebhookId;
use crate::pure::share::Division;

/// How often a run says how far it has come.
const REPORT_EVERY: Duration = Duration::from_secs(1);
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
    /// Whose the databases are, and a number that changes with it; `None` when all are ours.
    fn division(&self) -> Option<(Arc<Division>, u64)>;
}

/// All that a webhook was asked to send again; one request after the other.
#[derive(Debug, Default)]
pub(crate) struct Replays {
    waiting: VecDeque<Request>,
    run: Option<Run>,
    /// Our part is done, other daemons' may not be: looked at again when the databases are divided anew.
    rested: VecDeque<Run>,
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
    /// `left` is counted when it is told.
    tally: Tally,
    /// Whose the databases were when the letters were listed.
    division: Option<(Arc<Division>, u64)>,
    report_at: Option<Instant>,
    changed: bool,
    ended: bool,
}

#[derive(Debug)]
enum Listing {
    /// Not before it is known that the request is still open.
    Asked,
    /// Behind this id, from then on.
    Next(Option<String>, Option<Instant>),
    UnderWay,
    Over,
}

impl Replays {
    /// One more request, unless it is known.
    pub(crate) fn ask(&mut self, request: Request) {
        let runs = self.run.iter().chain(&self.rested).map(|run| &run.request);
        let known = runs.chain(&self.waiting).any(|one| one.id == request.id);
        if !known && !self.over.contains(&request.id) {
            self.waiting.push_back(request);
        }
    }

    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.run.is_none() && self.rested.is_empty()
    }

    /// When [`Replays::go_on`] has to be called again though nothing happened.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let run = self.run.as_ref()?;
        let list_at = match &run.listing {
            Listing::Next(_, at) => *at,
            Listing::Asked | Listing::UnderWay | Listing::Over => None,
        };
        let report_at = run.report_at.filter(|_| run.changed);
        list_at.into_iter().chain(report_at).min()
    }

    /// Does what can be done now.
    pub(crate) fn go_on(&mut self, by: &mut impl Replayer, now: Instant) {
        let division = by.division();
        if self.run.is_none() {
            self.begin(by, division.as_ref());
        }
        let Some(run) = &mut self.run else { return };
        // What is on its way would be found once more.
        if run.is_outdated(division.as_ref()) && !run.ended && run.at_work.is_empty() {
            run.begin_anew(division.clone());
        }
        if let Listing::Next(after, at) = &run.listing
            && at.is_none_or(|at| at <= now)
        {
            by.order(Errand::ListLetters(Box::new(run.filter.clone()), after.clone()));
            run.listing = Listing::UnderWay;
        }
        // Not before all are listed: what is told of the whole has to be counted first. Nor while others may still tell what
        // is ours.
        let is_listed = matches!(run.listing, Listing::Over);
        let may_send = is_listed && run.is_settled() && !run.is_outdated(division.as_ref());
        while may_send && by.dispatch().n_asked() < ASKED_MAX {
            let Some(stored) = run.queue.pop_front() else { break };
            match (by.flow_of(&stored.letter.db), WebhookId::parse(&stored.letter.id)) {
                (Some(flow), Some(id)) => {
                    let (doc_id, resolved) = (stored.letter.doc_id.clone(), stored.letter.resolved());
                    let letter = SuspectLetter { id, doc_id, resolved };
                    run.at_work.insert(id, stored);
                    by.dispatch().ask_replay(flow, letter, run.asked, now);
                }
                _ => run.stays(&stored, "its database is not watched (any more)", |tally| &mut tally.gone),
            }
        }
        let over = may_send && run.queue.is_empty() && run.at_work.is_empty();
        if over && !run.ended && run.report_at.is_none_or(|at| at <= now) {
            run.ended = true;
            run.changed = false;
            by.order(run.answer(true));
        } else if is_listed && run.changed && !run.ended && run.report_at.is_none_or(|at| at <= now) {
            run.changed = false;
            run.report_at = Some(now + REPORT_EVERY);
            by.order(run.answer(false));
        }
    }

    /// Takes up the next request: one that is new, or one that is to be looked at again.
    fn begin(&mut self, by: &mut impl Replayer, division: Option<&(Arc<Division>, u64)>) {
        let outdated = |run: &Run| run.is_outdated(division);
        if let Some(request) = self.waiting.pop_front() {
            self.run = Some(Run { division: division.cloned(), ..Run::new(request) });
        } else if let Some(at) = self.rested.iter().position(outdated) {
            self.run = self.rested.remove(at);
        }
        let Some(run) = &mut self.run else { return };
        let pause =
            run.request.arguments.rate.map_or(Duration::ZERO, |rate| Duration::from_secs(1) / rate.max(1));
        by.dispatch().set_replay_pause(pause);
        if run.ended {
            run.begin_anew(division.cloned());
            run.listing = Listing::Asked;
            by.order(run.answer(false));
        }
    }

    /// A page of letters, and where the next one begins.
    pub(crate) fn on_listed(&mut self, listed: Result<(Vec<Stored>, Option<String>)>, now: Instant) {
        let Some(run) = &mut self.run else { return };
        match listed {
            Ok((letters, next)) => {
                let division = run.division.as_ref().map(|(division, _)| division);
                let ours = |one: &Stored| division.is_none_or(|division| division.is_mine(&one.letter.db));
                run.queue.extend(letters.into_iter().filter(ours));
                run.n_left_at_start = run.queue.len() as u64;
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
            Replayed::Delivered => run.tally.delivered += 1,
            Replayed::Superseded(rev) => {
                let by = rev.as_deref().unwrap_or("a newer revision");
                run.stays(&stored, &format!("superseded by {by}"), |tally| &mut tally.superseded);
            }
            Replayed::Refused => run.stays(&stored, "refused again", |tally| &mut tally.refused),
            Replayed::Failed => run.stays(&stored, "the endpoint failed at it", |tally| &mut tally.failed),
            Replayed::Gone => run.stays(&stored, "there is no such document", |tally| &mut tally.gone),
            Replayed::Unreadable(why) => {
                run.stays(&stored, &format!("its document cannot be read: {why}"), |tally| &mut tally.failed);
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

    /// An answer is stored, the last one of ours where `over`; `state` is how the request stands then, `None` when it is not.
    pub(crate) fn on_answered(&mut self, id: &str, over: bool, state: Option<Progress>, now: Instant) {
        let Some(run) = self.run.take_if(|run| run.request.id == id) else { return };
        match (over, state) {
            (true, Some(Progress::Open)) => {
                self.rested.push_back(run);
                let n_over = self.rested.len().saturating_sub(OVER_MAX);
                self.rested.drain(..n_over);
            }
            (true, None) => {
                let report_at = Some(now + AGAIN);
                self.run = Some(Run { ended: false, changed: true, report_at, ..run });
            }
            (false, Some(Progress::Open) | None) => {
                let listing = match run.listing {
                    Listing::Asked => Listing::Next(None, None),
                    listing => listing,
                };
                self.run = Some(Run { listing, ..run });
            }
            (_, Some(Progress::Done | Progress::Failed)) => {
                self.over.push_back(run.request.id);
                let n_over = self.over.len().saturating_sub(OVER_MAX);
                self.over.drain(..n_over);
            }
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
            tally: Tally::default(),
            division: None,
            report_at: None,
            changed: false,
            ended: false,
        }
    }

    /// Whether the databases are divided otherwise than when the letters were listed, and that can be attended to now.
    fn is_outdated(&self, division: Option<&(Arc<Division>, u64)>) -> bool {
        let generation =
            |division: Option<&(Arc<Division>, u64)>| division.map(|(_, generation)| *generation);
        let is_waiting = matches!(self.listing, Listing::UnderWay | Listing::Asked);
        generation(division) != generation(self.division.as_ref()) && !is_waiting
    }

    fn is_settled(&self) -> bool {
        self.division.as_ref().is_none_or(|(division, _)| division.is_settled())
    }

    /// Looks for letters once more.
    fn begin_anew(&mut self, division: Option<(Arc<Division>, u64)>) {
        let delivered = self.tally.delivered;
        self.tally = Tally { delivered, ..Tally::default() };
        self.queue.clear();
        self.division = division;
        self.listing = Listing::Next(None, None);
        self.ended = false;
        self.changed = true;
    }

    fn stays(&mut self, stored: &Stored, why: &str, count: impl Fn(&mut Tally) -> &mut u64) {
        *count(&mut self.tally) += 1;
        if self.tally.stay.len() < STAY_MAX {
            let letter = &stored.letter;
            let mut example = text("id", &*letter.id);
            example.extend(text("db", &*letter.db));
            example.extend(text("doc_id", &*letter.doc_id));
            example.extend(text("why", why));
            self.tally.stay.push(Value::Object(example));
        }
    }

    /// What came of it so far, or at last.
    fn answer(&self, over: bool) -> Errand {
        let Tally { superseded, refused, failed, gone, .. } = self.tally;
        let waiting = self.queue.len() as u64 + self.at_work.len() as u64;
        let tally = Tally { left: waiting + superseded + refused + failed + gone, ..self.tally.clone() };
        let id = self.request.id.clone();
        if let Some((division, _)) = &self.division {
            let part = Part { over, among: division.members(), tally };
            return Errand::AnswerPart(id, division.me().to_owned(), Box::new(part));
        }
        let n_asked = self.request.arguments.letters.as_ref().map_or(0, |letters| letters.n_letters);
        let state = if over { Progress::Done } else { Progress::Open };
        Errand::Answer(id, state, tally.answer(n_asked.max(self.n_left_at_start)))
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
        replays.on_answered(&request.id, true, None, now);
        assert!(!replays.is_empty(), "to be answered once more");
        replays.on_answered(&request.id, true, Some(Progress::Done), now);
        // As it stood when it last said how far it had come.
        replays.ask(request);
        assert!(replays.is_empty());
    }
}
