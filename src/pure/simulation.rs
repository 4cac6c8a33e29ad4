//! A seeded simulation of everything that decides: three flows over one endpoint, a CouchDB that answers in
//! another order at every request, and crashes at every moment. In half of the schedules the last database is found by
//! pattern: its flow rests, is let go and comes back, as a roster says that sees it by sweeps and by hints that get lost.
//!
//! One schedule is a few hundred steps of random writes, outcomes, faults and crashes (of the daemon: state
//! reduced to stored checkpoints, records and dead letters), then a calm end in which everything must arrive.
//! `SIMULATION_SCHEDULES` sets how many run (100,000 in `tests/run`), `SIMULATION_SEED` runs a single one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::pure::changes::{Row, RowDoc};
use crate::pure::checkpoint::Mark;
use crate::pure::conflict::{self, LeafDocs, Owed, Standing};
use crate::pure::dispatch::batches::{Batch, Batching};
use crate::pure::dispatch::{Action, Asked, Attempt, Dispatch, Fetched, Notice, Replayed, SuspectLetter};
use crate::pure::document::Document;
use crate::pure::endpoint::{self, LetterClass, Moment, Outcome, Settings, WINDOW_EVENTS};
use crate::pure::flow::{Flow, Opened, Position, Read, ReadFault};
use crate::pure::format::Format;
use crate::pure::message::{self, Arrived, Event, Telling, Watch, WebhookId};
use crate::pure::rate::RateLimit;
use crate::pure::roster::{Entry, Roster};
use crate::pure::seq::Seq;
use crate::pure::size::size;

const FLOWS: usize = 3;
/// The database that may be found by pattern.
const FOUND: usize = FLOWS - 1;
const DOCS: usize = 12;
const SHARDS: usize = 3;
const STEPS: usize = 160;

/// An update of a document: the newest of each document is what a feed shows.
#[derive(Debug, Clone)]
struct Update {
    doc: usize,
    /// Of the winner.
    rev: String,
    /// Other live leaves, sorted.
    others: Vec<String>,
    /// Deleted leaves.
    gone: Vec<String>,
    deleted: bool,
    matches: bool,
}

impl Update {
    /// What a `webhook-id` is made of.
    fn revs(&self) -> Vec<&str> {
        std::iter::once(&self.rev).chain(&self.others).map(String::as_str).collect()
    }

    fn is_conflicted(&self) -> bool {
        !self.others.is_empty()
    }
}

/// A database. On 1.x one shard with integer seqs, else several with opaque ones.
#[derive(Debug, Clone)]
struct Db {
    one: bool,
    mark: u64,
    /// Per shard, every update; only those that are still the newest of their document are shown.
    shards: Vec<Vec<Update>>,
    newest: HashMap<usize, (usize, usize)>,
    /// `_local`: dies with the database.
    checkpoint: Option<(Position, u64)>,
    /// Each checkpoint ever stored, with the updates that the file held by then.
    checkpoints: Vec<(Position, u64, usize)>,
    /// `instance_start_time` on 1.x: another one after every start of the server.
    life: u64,
}

type Vector = Vec<usize>;

impl Db {
    fn new(one: bool, mark: u64) -> Db {
        let shards = if one { 1 } else { SHARDS };
        Db {
            one,
            mark,
            shards: vec![Vec::new(); shards],
            newest: HashMap::new(),
            checkpoint: None,
            checkpoints: Vec::new(),
            life: 0,
        }
    }

    fn write(&mut self, update: Update) {
        let (doc, shard) = (update.doc, update.doc % self.shards.len());
        self.shards[shard].push(update);
        self.newest.insert(doc, (shard, self.shards[shard].len() - 1));
    }

    fn winner(&self, doc: usize) -> Option<&Update> {
        self.newest.get(&doc).map(|(shard, at)| &self.shards[*shard][*at])
    }

    /// A seq as this version writes it: another one at every request.
    fn seq(&self, vector: &Vector, rng: &mut Rng) -> Seq {
        if self.one {
            return Seq::from_json(&vector[0].to_string()).unwrap();
        }
        let places: Vec<String> = vector.iter().map(usize::to_string).collect();
        Seq::from_json(&format!("\"{}-{}-{}\"", places.join("."), self.mark, rng.u16(..))).unwrap()
    }

    /// What a stored seq means to this database: 2.x and 3.x begin anew with a foreign one, 1.x does not notice.
    fn vector(&self, seq: &Seq) -> Vector {
        let since = seq.as_since();
        if self.one {
            return vec![since.parse().unwrap()];
        }
        let mut parts = since.split('-');
        let places = parts.next().unwrap();
        if parts.next() != Some(self.mark.to_string().as_str()) {
            return vec![0; self.shards.len()];
        }
        places.split('.').map(|place| place.parse().unwrap()).collect()
    }

    /// The next row behind `vector`, of a random shard; `filtered` passes only what matches.
    fn next_row(&self, vector: &mut Vector, filtered: bool, rng: &mut Rng) -> Option<Update> {
        loop {
            let open: Vec<usize> =
                (0..self.shards.len()).filter(|shard| vector[*shard] < self.shards[*shard].len()).collect();
            let shard = *rng.choice(&open)?;
            let at = vector[shard];
            vector[shard] += 1;
            let update = &self.shards[shard][at];
            if self.newest[&update.doc] == (shard, at) && (!filtered || update.matches) {
                return Some(update.clone());
            }
        }
    }
}

/// A request for rows that is open.
#[derive(Debug)]
struct Open {
    vector: Vector,
    mark: u64,
    limit: Option<usize>,
    n_rows: usize,
    to_close: bool,
}

/// Work that the shell would be doing.
#[derive(Debug)]
enum Job {
    Open(usize),
    Attempt(Attempt),
    Batch(Batch),
    LookUp(Attempt),
    Letter(Attempt, LetterClass),
    Checkpoint(usize, Position),
    Fetch(usize, SuspectLetter),
    /// With the mark of the database whose place in `state_db` it is.
    Keep(Attempt, Owed, u64),
}

/// A document of a database in one of its lives: place of the database, mark, document.
type Known = (usize, u64, usize);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Good,
    Unreachable,
    Fails,
    RefusesAll,
    Flaky,
}

/// How often something worth testing happened.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    four_in_flight: bool,
    crash_before_checkpoint: bool,
    letter: bool,
    rewind: bool,
    pause: bool,
    recreated: bool,
    rolled_back: bool,
    full_page: bool,
    late_checkpoint: bool,
    batch: bool,
    batch_refused: bool,
    batch_crash: bool,
    replayed: bool,
    discarded: bool,
    resolved: bool,
    resolved_unwanted: bool,
    crash_while_kept: bool,
    let_go: bool,
    stirred: bool,
    left: bool,
}

struct World {
    rng: Rng,
    now: Instant,
    strict: bool,
    one: bool,
    settings: Settings,
    page_rows: usize,
    dbs: Vec<Db>,
    /// Marks in the webhook's record.
    known: Vec<Option<u64>>,
    tellings: Vec<Telling>,
    filtered: Vec<bool>,
    letters: BTreeMap<WebhookId, (usize, String, LetterClass, Option<String>)>,
    /// What was delivered or became a letter, by what its row alone says.
    told_rows: HashSet<WebhookId>,
    /// All ids ever delivered, and the last revision told of each document.
    delivered: HashSet<WebhookId>,
    last_told: HashMap<(usize, usize), Vec<String>>,
    first_id: HashMap<(usize, u64, String, Vec<String>), WebhookId>,
    poison: HashMap<String, u16>,
    mood: Mood,
    calm: bool,
    next_mark: u64,
    next_rev: u64,
    /// Whether the last database is found by pattern, and what is stored of it.
    is_found: bool,
    stored_entries: Vec<(String, Entry)>,
    // Of this life of the daemon.
    roster: Roster,
    dispatch: Dispatch,
    jobs: Vec<Job>,
    reads: Vec<Option<Open>>,
    /// Checkpoints of earlier lives of the daemon that CouchDB has not stored yet.
    late: Vec<(usize, Position)>,
    in_flight_docs: HashSet<(usize, String)>,
    delivered_since_checkpoint: bool,
    /// The life of the server in which each feed was opened.
    lives: Vec<u64>,
    rolled_back: HashSet<(usize, usize)>,
    /// Documents of which an older revision won again.
    flipped: HashSet<(usize, usize)>,
    /// Crashes counted when an id was first told.
    first_told: HashMap<WebhookId, u64>,
    n_crashes: u64,
    /// Letters that an operator sends again, in this life.
    asked: HashMap<WebhookId, Asked>,
    /// Letters whose document is told at another revision, because an operator asked.
    told_otherwise: HashSet<WebhookId>,
    /// Keys stored as conflicted, by database and mark.
    kept: HashMap<(usize, u64), HashSet<u64>>,
    /// Which lives' conflicts the daemon has loaded.
    conflicts_of: Vec<Option<u64>>,
    /// Documents of which a conflict was told and no resolution since.
    told_conflicted: HashSet<Known>,
    /// How often a document became conflicted, or otherwise so.
    n_conflicts: HashMap<Known, usize>,
    /// Of the last resolution told: its id, and what had happened by then.
    last_resolved: HashMap<Known, (WebhookId, usize, u64, u64)>,
    n_keeps_failed: u64,
    seen: Seen,
}

fn settings(rng: &mut Rng) -> Settings {
    let per = Duration::from_secs(*rng.choice(&[1, 60]).unwrap());
    let batching = Batching {
        max: *rng.choice(&[2, 3, 50]).unwrap(),
        wait: Duration::from_millis(*rng.choice(&[0, 0, 100, 5_000]).unwrap()),
        bytes_max: *rng.choice(&[1_300, 1 << 20]).unwrap(),
    };
    Settings {
        concurrency: *rng.choice(&[1, 2, 8, 8]).unwrap(),
        rate_limit: (rng.u8(..4) == 0).then(|| RateLimit { n: rng.u32(1..200), per }),
        batching: rng.bool().then_some(batching),
        retry_schedule: [1, 5, 15, 30, 60, 120, 300].map(Duration::from_secs).to_vec(),
        retry_after_max: Duration::from_secs(3600),
        dead_letter_after: 3,
        dead_letter_on: vec![400, 409, 411, 413, 414, 415, 422, 431, 501],
        delivered_on: &[],
        give_up_after: Duration::from_secs(600),
    }
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::with_seed(seed);
        let one = rng.u8(..4) == 0;
        let settings = settings(&mut rng);
        let filtered: Vec<bool> = (0..FLOWS).map(|_| rng.u8(..3) == 0).collect();
        let wanted = [
            "document.*",
            "document.*",
            "document.updated document.deleted document.resolved",
            "document.conflicted document.resolved",
            "document.updated document.deleted document.conflicted",
        ];
        let tells: Vec<(bool, &str)> =
            (0..FLOWS).map(|_| (rng.bool(), *rng.choice(&wanted).unwrap())).collect();
        let tellings = (0..FLOWS).map(|flow| Telling {
            webhook: "w".into(),
            db: format!("db{flow}"),
            source: "urn:x".into(),
            events: match tells[flow] {
                (true, wanted) => wanted.split(' ').map(str::to_owned).collect(),
                (false, _) => vec!["document.*".into()],
            },
            include_docs: false,
            conflicts: tells[flow].0,
            conflict_docs: false,
            design_docs: false,
            payload_bytes_max: 1 << 20,
            format: Format::Standard,
            watch: Watch::Changes,
        });
        let now = crate::sys::now();
        let mut poison = HashMap::new();
        if rng.bool() {
            for _ in 0..rng.usize(1..3) {
                let status = *rng.choice(&[422, 500, 400, 503]).unwrap();
                poison.insert(format!("doc{}", rng.usize(..DOCS)), status);
            }
        }
        let mut world = World {
            now,
            strict: settings.concurrency == 1,
            one,
            page_rows: *rng.choice(&[1, 3, 7, 1_000]).unwrap(),
            dbs: (0..FLOWS).map(|flow| Db::new(one, flow as u64)).collect(),
            known: vec![None; FLOWS],
            tellings: tellings.collect(),
            letters: BTreeMap::new(),
            told_rows: HashSet::new(),
            delivered: HashSet::new(),
            last_told: HashMap::new(),
            first_id: HashMap::new(),
            poison,
            mood: Mood::Good,
            calm: false,
            next_mark: 100,
            next_rev: 1,
            is_found: rng.bool(),
            stored_entries: Vec::new(),
            roster: Roster::default(),
            dispatch: Dispatch::new(settings.clone(), Vec::new(), now),
            settings,
            jobs: Vec::new(),
            reads: Vec::new(),
            late: Vec::new(),
            in_flight_docs: HashSet::new(),
            delivered_since_checkpoint: false,
            lives: vec![0; FLOWS],
            rolled_back: HashSet::new(),
            flipped: HashSet::new(),
            first_told: HashMap::new(),
            n_crashes: 0,
            asked: HashMap::new(),
            told_otherwise: HashSet::new(),
            kept: HashMap::new(),
            conflicts_of: vec![None; FLOWS],
            told_conflicted: HashSet::new(),
            n_conflicts: HashMap::new(),
            last_resolved: HashMap::new(),
            n_keeps_failed: 0,
            seen: Seen::default(),
            filtered,
            rng,
        };
        world.start();
        world
    }

    /// The daemon starts: nothing but what is stored is left.
    fn start(&mut self) {
        // Pages that a few documents fill.
        let page_rows = self.page_rows;
        let flow = || Flow::new(self.strict, Duration::from_secs(60), Duration::from_secs(5));
        let flows = (0..FLOWS).map(|place| match self.is_found && place == FOUND {
            true => Flow::vacant(),
            false => flow().with_page_rows(page_rows),
        });
        self.dispatch = Dispatch::new(self.settings.clone(), flows.collect(), self.now);
        self.dispatch.set_readings_max(1);
        self.roster = Roster::restored(self.stored_entries.clone());
        let suspects = self.letters.iter().filter(|(_, (_, _, class, _))| *class == LetterClass::Suspect);
        let suspects = suspects.map(|(id, (flow, doc_id, _, resolved))| {
            (*flow, SuspectLetter { id: *id, doc_id: doc_id.clone(), resolved: resolved.clone() })
        });
        let suspects: Vec<(usize, SuspectLetter)> = suspects.collect();
        self.conflicts_of = vec![None; FLOWS];
        if suspects.iter().any(|(flow, _)| *flow == FOUND) {
            self.activate();
        }
        self.dispatch.restore_suspects(suspects, self.now);
        self.dispatch.set_replay_pause(Duration::from_millis(*self.rng.choice(&[0, 20, 700]).unwrap()));
        self.asked.clear();
        self.jobs.clear();
        self.reads = (0..FLOWS).map(|_| None).collect();
        self.in_flight_docs.clear();
        self.delivered_since_checkpoint = false;
    }

    fn found_name() -> String {
        format!("db{FOUND}")
    }

    /// What a sweep sees: another spelling at every request.
    fn fingerprint(&mut self) -> u64 {
        let db = &self.dbs[FOUND];
        let n_updates: usize = db.shards.iter().map(Vec::len).sum();
        let spelling = if self.one { 0 } else { self.rng.u64(..3) };
        (db.mark << 48) | (db.life << 32) | ((n_updates as u64) << 8) | spelling
    }

    fn sweep(&mut self) {
        if !self.is_found {
            return;
        }
        let fingerprint = self.fingerprint();
        self.trace(&("sweep", fingerprint));
        if let Some(flow) = self.roster.on_seen(&Self::found_name(), fingerprint) {
            self.seen.stirred = true;
            self.dispatch.stir(flow);
        }
        self.roster.on_swept();
    }

    /// The database is somebody else's for a moment, as when daemons divide them.
    fn leave(&mut self) {
        self.trace(&"leave");
        for flow in self.roster.divide(|_| false) {
            self.seen.left = true;
            self.dispatch.leave(flow);
        }
        self.roster.divide(|_| true);
    }

    fn hint(&mut self) {
        if self.is_found
            && let Some(flow) = self.roster.stir(&Self::found_name())
        {
            self.dispatch.stir(flow);
        }
    }

    /// Gives the database that was found a flow, unless it has one.
    fn activate(&mut self) {
        if !self.is_found || self.roster.flow(&Self::found_name()).is_some() {
            return;
        }
        let flow = Flow::new(self.strict, Duration::from_secs(60), Duration::from_secs(5));
        let place = self.dispatch.add(flow.with_page_rows(self.page_rows).resting());
        assert_eq!(place, FOUND, "there is one place to be had");
        self.roster.on_active(&Self::found_name(), place);
        // Whoever reads it knows nothing of the last time.
        self.conflicts_of[FOUND] = None;
    }

    fn let_go(&mut self) {
        let flow = |job: &Job| match job {
            Job::Open(flow) | Job::Checkpoint(flow, _) => *flow,
            // Its answer names the letter, not the flow; of one that was discarded nobody waits for it.
            Job::Fetch(..) => FLOWS,
            Job::Attempt(attempt) | Job::LookUp(attempt) => attempt.flow,
            Job::Letter(attempt, _) | Job::Keep(attempt, ..) => attempt.flow,
            Job::Batch(batch) => batch.parts.iter().map(|part| part.flow).max().unwrap_or(0),
        };
        assert!(!self.jobs.iter().any(|job| flow(job) == FOUND), "work for it is under way: {:?}", self.jobs);
        assert!(self.reads[FOUND].is_none(), "it is being read");
        self.seen.let_go = true;
        self.dispatch.release(FOUND);
    }

    /// What the shell does with a fault of reading.
    fn read_failed(&mut self, flow: usize, fault: ReadFault) {
        self.dispatch.on_read_failed(flow, fault, self.now);
        let is_found = self.is_found && flow == FOUND && fault != ReadFault::Changed;
        let is_left = self.roster.is_leaving(&Self::found_name());
        if is_found && !is_left && !self.dispatch.is_pinned(flow) && self.dispatch.flow(flow).is_done() {
            self.roster.on_failed(&Self::found_name(), fault == ReadFault::Refused, self.now);
            self.let_go();
        }
    }

    fn crash(&mut self) {
        self.trace(&"crash");
        self.seen.crash_before_checkpoint |= self.delivered_since_checkpoint;
        // What CouchDB was already doing for us may still happen.
        for job in std::mem::take(&mut self.jobs) {
            match job {
                Job::Checkpoint(flow, position) if self.rng.bool() => {
                    self.store_checkpoint(flow, position);
                }
                // On 1.x its `_rev` is refused by then.
                Job::Checkpoint(flow, position) if !self.one => self.late.push((flow, position)),
                Job::Attempt(attempt) if self.rng.bool() => {
                    let outcome = self.outcome(std::slice::from_ref(&attempt));
                    self.record_outcome(outcome, std::slice::from_ref(&attempt));
                }
                Job::Batch(batch) if self.rng.bool() => {
                    let outcome = self.outcome(&batch.parts);
                    self.record_outcome(outcome, &batch.parts);
                    self.seen.batch_crash = true;
                }
                Job::Letter(attempt, class) if self.rng.bool() => self.store_letter(&attempt, class),
                Job::Keep(attempt, owed, mark) => {
                    self.seen.crash_while_kept = true;
                    if self.rng.bool() {
                        self.store_kept(&attempt, owed, mark);
                    }
                }
                _ => {}
            }
        }
        if self.rng.u8(..4) == 0 {
            let flow = self.rng.usize(..FLOWS);
            let db = &mut self.dbs[flow];
            if let Some((position, n, _)) = self.rng.choice(db.checkpoints.iter()) {
                let (mut position, n) = (position.clone(), *n);
                if self.rng.bool() {
                    // A seek forgets what is delivered beyond it.
                    position.delivered.clear();
                }
                db.checkpoint = Some((position, n));
                self.seen.rewind = true;
            }
        }
        // What came of its last requests above was told before it.
        self.n_crashes += 1;
        self.start();
    }

    fn write(&mut self) {
        let flow = self.rng.usize(..FLOWS);
        let doc = self.rng.usize(..DOCS);
        let n = self.next_rev;
        self.next_rev += 1;
        let old = self.dbs[flow].shards.concat();
        let old: Vec<&Update> = old.iter().filter(|update| update.doc == doc).collect();
        let new = format!("{n}-{:x}", self.rng.u32(..));
        let matches = self.rng.u8(..3) > 0;
        let mut update = match self.rng.choice(&old) {
            // Now and then an old revision wins again: the winner of a conflict was deleted.
            Some(update) if self.rng.u8(..8) == 0 => (*update).clone(),
            _ => Update {
                doc,
                rev: new.clone(),
                others: Vec::new(),
                gone: Vec::new(),
                deleted: false,
                matches,
            },
        };
        update.matches = matches;
        if self.tellings[flow].conflicts
            && let Some(winner) = self.dbs[flow].winner(doc)
        {
            match self.rng.u8(..8) {
                // Another leaf, more than before or the first.
                0 | 1 => update = Update { matches, deleted: false, ..winner.clone() },
                2 => (update.others, update.gone) = (winner.others.clone(), winner.gone.clone()),
                // Somebody deletes all but one: the winner stays, or another one wins.
                3 | 4 => {
                    let rev = self.rng.choice(winner.revs()).unwrap().to_owned();
                    let others = Vec::new();
                    update = Update { rev, others, matches, ..winner.clone() };
                    update.gone.push(new.clone());
                }
                5 => update.deleted = update.others.is_empty(),
                _ => {}
            }
            if !winner.deleted && update.rev == winner.rev && update.others == winner.others {
                update.others.push(new);
                update.others.sort();
            }
        }
        // Who wins deleted wins over deleted ones alone.
        update.deleted &= update.others.is_empty();
        match old.iter().any(|old| old.revs() == update.revs()) {
            true => self.flipped.insert((flow, doc)),
            false => self.flipped.remove(&(flow, doc)),
        };
        self.rolled_back.remove(&(flow, doc));
        self.trace(&("write", flow, doc, update.revs(), update.deleted));
        self.put(flow, update);
        if flow == FOUND && self.rng.bool() {
            self.hint();
        }
    }

    fn put(&mut self, flow: usize, update: Update) {
        if update.is_conflicted() {
            *self.n_conflicts.entry((flow, self.dbs[flow].mark, update.doc)).or_default() += 1;
        }
        self.dbs[flow].write(update);
    }

    /// Somebody sends letters again, or deletes some.
    fn operate(&mut self) {
        let all: Vec<WebhookId> = self.letters.keys().copied().collect();
        let n = self.rng.usize(0..4).min(all.len());
        let chosen: Vec<WebhookId> = self.rng.choose_multiple(all.iter(), n).into_iter().copied().collect();
        if !chosen.is_empty() && self.rng.u8(..4) == 0 {
            self.trace(&("discard", &chosen));
            self.seen.discarded = true;
            for id in &chosen {
                self.letters.remove(id);
                self.asked.remove(id);
                // Whoever discards it takes it for told.
                self.delivered.insert(*id);
            }
            self.dispatch.forget_letters(&chosen);
            return;
        }
        for id in chosen {
            let (flow, doc_id, _, resolved) = self.letters[&id].clone();
            let asked = Asked { even_if_superseded: self.rng.u8(..6) == 0 };
            if self.rng.bool() {
                // What it refused was mended, which is why it is asked.
                self.poison.remove(&doc_id);
            }
            self.trace(&("ask", id, asked));
            if flow == FOUND {
                self.activate();
            }
            self.asked.insert(id, asked);
            self.dispatch.ask_replay(flow, SuspectLetter { id, doc_id, resolved }, asked, self.now);
        }
    }

    /// Deleted and created again, sometimes with the very same documents.
    fn recreate(&mut self) {
        self.trace(&"re-create");
        let flow = self.rng.usize(..FLOWS);
        self.seen.recreated = true;
        self.next_mark += 1;
        let old = std::mem::replace(&mut self.dbs[flow], Db::new(self.one, self.next_mark));
        if self.rng.bool() {
            for doc in 0..DOCS {
                if let Some(update) = old.winner(doc) {
                    self.put(flow, update.clone());
                }
            }
        }
        self.last_told.retain(|(told_flow, _), _| *told_flow != flow);
        self.rolled_back.retain(|(rolled, _)| *rolled != flow);
    }

    /// 1.x with delayed commits, killed: the last updates and the checkpoint behind them come undone together.
    fn roll_back(&mut self) {
        let flow = self.rng.usize(..FLOWS);
        let db = &mut self.dbs[flow];
        if !db.one || db.shards[0].is_empty() {
            return;
        }
        self.trace(&("roll back", flow));
        let db = &mut self.dbs[flow];
        self.seen.rolled_back = true;
        let keep = self.rng.usize(..db.shards[0].len());
        let old = std::mem::replace(db, Db::new(true, db.mark));
        db.life = old.life + 1;
        for update in &old.shards[0][..keep] {
            db.write(update.clone());
        }
        for update in &old.shards[0][keep..] {
            self.rolled_back.insert((flow, update.doc));
        }
        // One file, written in order: a checkpoint that stays keeps all that was written before it.
        db.checkpoints = old.checkpoints;
        db.checkpoints.retain(|(_, _, updates)| *updates <= keep);
        db.checkpoint = db.checkpoints.last().map(|(position, n, _)| (position.clone(), *n));
        // The server is gone for a moment: every connection to it breaks.
        for flow in 0..FLOWS {
            if self.reads[flow].take().is_some() {
                self.read_failed(flow, ReadFault::Lost);
            }
        }
    }

    /// What a request is answered that tells these.
    fn outcome(&mut self, told: &[Attempt]) -> Outcome {
        let status = |status| Outcome::Status { status, retry_after: None };
        if let Some(poison) = told.iter().find_map(|one| self.poison.get(&one.event.doc_id))
            && self.mood != Mood::Unreachable
        {
            return if *poison == 503 { Outcome::Timeout } else { status(*poison) };
        }
        match self.mood {
            Mood::Good => status(200),
            Mood::Unreachable => Outcome::Unreachable,
            Mood::RefusesAll => status(422),
            Mood::Fails => match self.rng.u8(..4) {
                0 => Outcome::Status { status: 503, retry_after: Some(Duration::from_secs(120)) },
                1 => Outcome::Broken,
                _ => status(500),
            },
            Mood::Flaky => match self.rng.u8(..8) {
                0 => status(500),
                1 => Outcome::Timeout,
                2 => status(422),
                _ => status(200),
            },
        }
    }

    fn record_outcome(&mut self, outcome: Outcome, told: &[Attempt]) {
        if matches!(outcome, Outcome::Status { status: 200, .. }) {
            told.iter().for_each(|one| self.record_delivery(one));
        }
    }

    fn record_delivery(&mut self, attempt: &Attempt) {
        let flow = attempt.flow;
        let event = &attempt.event;
        self.delivered.insert(event.id);
        self.told_rows.insert(event.row_id());
        self.first_told.entry(event.row_id()).or_insert(self.n_crashes);
        let doc: usize = event.doc_id[3..].parse().unwrap();
        // Only what belongs to the database as it is now counts as the last word; and what an operator wants told behind
        // something newer is his word, not ours.
        let is_his = attempt.replay
            && self.asked.get(&event.id).is_some_and(|asked| asked.even_if_superseded)
            && self.dbs[flow].winner(doc).is_some_and(|winner| winner.revs() != revs(event));
        if self.id(flow, event) == event.row_id() && !is_his {
            self.last_told.insert((flow, doc), owned(revs(event)));
            self.record_conflict((flow, self.dbs[flow].mark, doc), event, attempt.replay);
        }
        self.delivered_since_checkpoint = true;
    }

    fn record_conflict(&mut self, known: Known, event: &Event, is_replay: bool) {
        let n_conflicts = self.n_conflicts.get(&known).copied().unwrap_or(0);
        match event.standing {
            Standing::Plain => {}
            Standing::Conflicted if is_replay => {}
            Standing::Conflicted => {
                if self.tellings[known.0].remembers() {
                    let key = event.conflict_key().expect("it is kept");
                    let kept = self.kept.get(&(known.0, known.1)).is_some_and(|kept| kept.contains(&key));
                    assert!(kept, "a conflict of {known:?} is told that is not kept");
                    self.told_conflicted.insert(known);
                }
            }
            Standing::Resolved => {
                assert!(n_conflicts > 0, "{known:?} is told to be resolved and was never conflicted");
                self.told_conflicted.remove(&known);
                self.seen.resolved = true;
                self.seen.resolved_unwanted |= !self.tellings[known.0].events.contains(&"document.*".into());
                if is_replay {
                    return;
                }
                let now = (event.id, n_conflicts, self.n_crashes, self.n_keeps_failed);
                let last = self.last_resolved.insert(known, now);
                let since = |last: (WebhookId, usize, u64, u64)| (last.1, last.2, last.3);
                let again = last.is_some_and(|last| last.0 != now.0 && since(last) == since(now));
                assert!(!again, "{known:?} is told twice to be resolved, of one conflict");
            }
        }
    }

    /// Stored or deleted at the place of a database with this mark.
    fn store_kept(&mut self, attempt: &Attempt, owed: Owed, mark: u64) {
        let Some(key) = attempt.event.conflict_key() else { return };
        let kept = self.kept.entry((attempt.flow, mark)).or_default();
        match owed {
            Owed::Remember => kept.insert(key),
            Owed::Forget => kept.remove(&key),
        };
    }

    fn is_kept(&self, flow: usize, doc: usize) -> bool {
        let mark = self.dbs[flow].mark;
        let key = conflict::key("w", &format!("db{flow}"), &mark.to_string(), &format!("doc{doc}"));
        self.kept.get(&(flow, mark)).is_some_and(|kept| kept.contains(&key))
    }

    /// Whether a change is wanted for what its row alone says.
    fn wants(&self, flow: usize, update: &Update) -> bool {
        let event_type = match (update.is_conflicted(), update.deleted) {
            (true, _) => "document.conflicted",
            (false, true) => "document.deleted",
            (false, false) => "document.updated",
        };
        self.tellings[flow].events.iter().any(|pattern| message::matches(pattern, event_type))
    }

    /// The id that an event of this document and revision has in the database as it is now.
    fn id(&self, flow: usize, event: &Event) -> WebhookId {
        let mark = self.dbs[flow].mark.to_string();
        WebhookId::of(&("w", format!("db{flow}"), mark, &event.doc_id, revs(event)))
    }

    fn store_letter(&mut self, attempt: &Attempt, class: LetterClass) {
        let event = &attempt.event;
        self.seen.letter = true;
        self.told_rows.insert(event.row_id());
        self.first_told.entry(event.row_id()).or_insert(self.n_crashes);
        let resolved = (event.standing == Standing::Resolved).then(|| event.rev.clone());
        self.letters.insert(event.id, (attempt.flow, event.doc_id.clone(), class, resolved));
        let doc: usize = event.doc_id[3..].parse().unwrap();
        if self.id(attempt.flow, event) == event.row_id() {
            self.last_told.insert((attempt.flow, doc), owned(revs(event)));
            if event.standing == Standing::Resolved {
                self.told_conflicted.remove(&(attempt.flow, self.dbs[attempt.flow].mark, doc));
            }
        }
    }

    /// 2.x and 3.x take any `_rev`, into another database of the name, too. On 1.x the shell looks at
    /// `instance_start_time` first: a position read before a crash of the server may not be stored after it.
    fn store_checkpoint(&mut self, flow: usize, position: Position) -> Option<String> {
        let db = &mut self.dbs[flow];
        let n = db.checkpoint.as_ref().map_or(0, |(_, n)| *n);
        if db.one && (position.mark != db.mark.to_string() || self.lives[flow] != db.life) {
            return None;
        }
        db.checkpoint = Some((position.clone(), n + 1));
        let updates = db.shards.iter().map(Vec::len).sum();
        db.checkpoints.push((position.clone(), n + 1, updates));
        self.delivered_since_checkpoint = false;
        self.check_checkpoint(flow, &position);
        Some(format!("0-{}", n + 1))
    }

    /// The promise: nothing at or before the checkpoint is neither delivered nor a dead letter.
    fn check_checkpoint(&self, flow: usize, position: &Position) {
        let db = &self.dbs[flow];
        if position.mark != db.mark.to_string() {
            return;
        }
        let through = db.vector(&position.through_seq);
        for (doc, (shard, at)) in &db.newest {
            let update = &db.shards[*shard][*at];
            if *at >= through[*shard] || (self.filtered[flow] && !update.matches) {
                continue;
            }
            let rolled_back = self.rolled_back.contains(&(flow, *doc));
            if self.tellings[flow].remembers() && !rolled_back {
                assert_eq!(
                    self.is_kept(flow, *doc),
                    update.is_conflicted(),
                    "checkpoint {:?} of db{flow} passes doc{doc} {:?}, and what is kept of its conflict disagrees",
                    position.through_seq,
                    update.revs()
                );
            }
            if !self.wants(flow, update) {
                continue;
            }
            let id = WebhookId::of(&(
                "w",
                format!("db{flow}"),
                &position.mark,
                format!("doc{doc}"),
                update.revs(),
            ));
            assert!(
                self.told_rows.contains(&id),
                "checkpoint {:?} of db{flow} passes doc{doc} {} which was neither delivered nor stored",
                position.through_seq,
                update.rev
            );
        }
    }

    /// A document as it is now, read by itself.
    fn fetched(&mut self, flow: usize, update: &Update, vector: &Vector) -> Event {
        match self.arrived(flow, update, vector).event {
            Some(event) => event,
            None => {
                // Not wanted by the feed: a request reads it all the same.
                let events = std::mem::replace(&mut self.tellings[flow].events, vec!["*".into()]);
                let event = self.arrived(flow, update, vector).event.expect("all are wanted");
                self.tellings[flow].events = events;
                event
            }
        }
    }

    fn arrived(&mut self, flow: usize, update: &Update, vector: &Vector) -> Arrived {
        let null = self.rng.u8(..10) == 0;
        let db = &self.dbs[flow];
        let seq = if null { None } else { Some(db.seq(vector, &mut self.rng)) };
        let doc = match self.tellings[flow].conflicts {
            true => {
                let Update { rev, others, deleted, .. } = update;
                let doc = serde_json::json!({"_rev": rev, "_deleted": deleted, "_conflicts": others});
                RowDoc::Json(Document::parse(doc.to_string()).unwrap())
            }
            false => RowDoc::Absent,
        };
        let revs = owned(update.revs());
        let leaves = revs.iter().chain(&update.gone).cloned().collect();
        let row = Row {
            seq,
            id: format!("doc{}", update.doc),
            revs: if self.tellings[flow].conflicts { leaves } else { revs.clone() },
            deleted: update.deleted,
            doc,
            line: None,
        };
        let mark = self.dispatch.flow(flow).mark().expect("it was opened").to_owned();
        let arrived = self.tellings[flow].arrived(row, &mark, jiff::Timestamp::UNIX_EPOCH);
        let Some(event) = &arrived.event else {
            assert!(!self.wants(flow, update), "{update:?} is wanted");
            return arrived;
        };
        let key = (flow, self.dbs[flow].mark, event.doc_id.clone(), revs);
        if mark == self.dbs[flow].mark.to_string() {
            assert_eq!(*self.first_id.entry(key).or_insert(event.id), event.id, "the id changed");
        }
        arrived
    }

    /// Takes the next step of an open request.
    fn step_read(&mut self, flow: usize) {
        let Some(mut open) = self.reads[flow].take() else { return };
        let gone = open.mark != self.dbs[flow].mark;
        if open.to_close || gone {
            // A deleted database ends a continuous feed as a timeout does.
            let last_seq = (gone && self.rng.bool()).then(|| self.dbs[flow].seq(&open.vector, &mut self.rng));
            let last_seq = last_seq.filter(|_| self.dbs[flow].shards.len() == open.vector.len());
            self.dispatch.on_end(flow, last_seq, None, open.to_close, self.now);
            return;
        }
        if !self.calm && self.rng.u8(..12) == 0 {
            let faults = [ReadFault::Refused, ReadFault::BadPosition, ReadFault::Lost, ReadFault::Lost];
            let fault = *self.rng.choice(&faults).unwrap();
            self.read_failed(flow, fault);
            return;
        }
        let mut rows = Vec::new();
        let mut dry = false;
        for _ in 0..self.rng.usize(1..6) {
            if open.limit.is_some_and(|limit| open.n_rows >= limit) {
                break;
            }
            match self.dbs[flow].next_row(&mut open.vector, self.filtered[flow], &mut self.rng) {
                Some(update) => {
                    open.n_rows += 1;
                    let vector = open.vector.clone();
                    rows.push(self.arrived(flow, &update, &vector));
                }
                None => {
                    dry = true;
                    break;
                }
            }
        }
        let full = open.limit.is_some_and(|limit| open.n_rows >= limit);
        self.seen.full_page |= full;
        self.trace(&("rows", flow, &rows));
        self.dispatch.on_rows(flow, rows, self.now);
        let times_out = open.limit.is_none() && dry && self.rng.u8(..4) == 0;
        if full || (open.limit.is_some() && dry) || times_out {
            let mut vector = open.vector.clone();
            if full && self.filtered[flow] && self.rng.bool() {
                // What real servers do: the last_seq of a full filtered page skips rows that match.
                self.dbs[flow].next_row(&mut vector, true, &mut self.rng);
            }
            let last_seq = self.dbs[flow].seq(&vector, &mut self.rng);
            self.trace(&("end", flow, &last_seq, full));
            self.dispatch.on_end(flow, Some(last_seq), Some(0), false, self.now);
        } else {
            self.reads[flow] = Some(open);
        }
    }

    fn start_read(&mut self, flow: usize, read: Read) {
        let (since, limit) = match read {
            Read::Open => {
                self.jobs.push(Job::Open(flow));
                return;
            }
            Read::Page { since, limit } => (since, Some(limit)),
            Read::Wait { since } => (since, None),
        };
        let db = &self.dbs[flow];
        let mark = db.mark.to_string();
        if self.dispatch.flow(flow).mark() != Some(mark.as_str()) || self.lives[flow] != db.life {
            self.read_failed(flow, ReadFault::Changed);
            return;
        }
        assert!(self.reads[flow].is_none(), "one request per feed");
        self.reads[flow] =
            Some(Open { vector: db.vector(&since), mark: db.mark, limit, n_rows: 0, to_close: false });
    }

    fn open(&mut self, flow: usize) {
        if !self.calm && self.rng.u8(..12) == 0 {
            self.read_failed(flow, ReadFault::Lost);
            return;
        }
        let db = &self.dbs[flow];
        let mark = db.mark.to_string();
        let checkpoint = db.checkpoint.as_ref().filter(|(position, _)| position.mark == mark);
        // Said once, as `local_docs::open` does: who knows the mark has heard of it.
        let recreated = checkpoint.is_none() && self.known[flow].is_some_and(|known| known != db.mark);
        let opened = Opened {
            checkpoint: checkpoint.map(|(at, _)| (at.through_seq.clone(), at.delivered.clone())),
            rev: db.checkpoint.as_ref().map(|(_, n)| format!("0-{n}")),
            recreated,
            doc_count: db.newest.len() as u64,
            conflicted: (self.tellings[flow].remembers() && self.conflicts_of[flow] != Some(db.mark)).then(
                || {
                    let kept = self.kept.get(&(flow, db.mark));
                    kept.into_iter().flatten().copied().collect()
                },
            ),
            mark,
        };
        self.conflicts_of[flow] = Some(db.mark);
        self.known[flow] = Some(db.mark);
        self.lives[flow] = db.life;
        if self.is_found && flow == FOUND {
            let mut mark = [0; 16];
            mark[..8].copy_from_slice(&self.dbs[flow].mark.to_be_bytes());
            self.roster.on_mark(&Self::found_name(), Mark::new(mark));
        }
        self.trace(&(flow, &opened));
        self.dispatch.on_opened(flow, opened);
    }

    /// A request of an earlier life of ours is carried out at last.
    fn store_late(&mut self) {
        if let Some((flow, position)) = self.late.pop() {
            self.trace(&("late checkpoint", flow, &position));
            let delivered = self.delivered_since_checkpoint;
            self.store_checkpoint(flow, position);
            self.delivered_since_checkpoint = delivered;
            self.seen.late_checkpoint = true;
        }
    }

    fn step_job(&mut self) {
        if self.jobs.is_empty() {
            return;
        }
        let at = self.rng.usize(..self.jobs.len());
        let job = self.jobs.swap_remove(at);
        let fails = !self.calm && self.rng.u8(..10) == 0;
        match job {
            Job::Open(flow) => self.open(flow),
            Job::Attempt(attempt) => {
                let outcome = self.outcome(std::slice::from_ref(&attempt));
                self.record_outcome(outcome, std::slice::from_ref(&attempt));
                self.in_flight_docs.remove(&(attempt.flow, attempt.event.doc_id.clone()));
                let jitter = self.rng.f64();
                self.dispatch.on_outcome(attempt.token, outcome, Moment { now: self.now, jitter });
            }
            Job::Batch(batch) => {
                let outcome = self.outcome(&batch.parts);
                self.record_outcome(outcome, &batch.parts);
                for part in &batch.parts {
                    self.in_flight_docs.remove(&(part.flow, part.event.doc_id.clone()));
                }
                let refused = matches!(outcome, Outcome::Status { status: 400 | 422, .. });
                self.seen.batch_refused |= refused;
                let jitter = self.rng.f64();
                self.dispatch.on_outcome(batch.token, outcome, Moment { now: self.now, jitter });
            }
            Job::LookUp(attempt) => {
                let exists = self.letters.contains_key(&attempt.event.id);
                self.dispatch.on_looked_up(attempt.token, (!fails).then_some(exists), self.now);
            }
            Job::Letter(attempt, class) => {
                if !fails {
                    self.store_letter(&attempt, class);
                }
                self.dispatch.on_letter(attempt.token, !fails, self.now);
            }
            Job::Keep(attempt, owed, mark) => {
                // Said to have failed, it may be done all the same.
                if !fails || self.rng.bool() {
                    self.store_kept(&attempt, owed, mark);
                }
                self.n_keeps_failed += u64::from(fails);
                let kept = (!fails).then_some(LeafDocs::Unread);
                self.dispatch.on_kept(attempt.token, kept, self.now);
            }
            Job::Checkpoint(flow, position) => {
                let rev = if fails { None } else { self.store_checkpoint(flow, position) };
                self.dispatch.on_checkpoint(flow, rev, self.now);
            }
            Job::Fetch(flow, letter) => {
                let doc: usize = letter.doc_id[3..].parse().unwrap();
                let found = match self.dbs[flow].winner(doc).cloned() {
                    _ if fails => Fetched::Failed,
                    None => Fetched::Gone,
                    Some(update) => {
                        let vector = vec![0; self.dbs[flow].shards.len()];
                        match (self.dispatch.flow(flow).mark(), self.asked.get(&letter.id).copied()) {
                            (None, _) => Fetched::NotYet,
                            (Some(_), asked) => {
                                let mut event = self.fetched(flow, &update, &vector);
                                if letter.resolved.as_ref() == Some(&event.rev) && !event.is_conflicted() {
                                    event.resolve(letter.id);
                                }
                                if event.id != letter.id
                                    && asked.is_some_and(|asked| asked.even_if_superseded)
                                {
                                    self.told_otherwise.insert(letter.id);
                                }
                                match asked {
                                    Some(asked) if !asked.even_if_superseded && event.id != letter.id => {
                                        Fetched::Superseded(event.rev)
                                    }
                                    None if !self.tellings[flow].wants(&event) => Fetched::Gone,
                                    _ => Fetched::Event(event),
                                }
                            }
                        }
                    }
                };
                self.dispatch.on_fetched(&letter, found, self.now);
            }
        }
    }

    /// Shows what happens, for whoever looks into one schedule.
    fn trace(&self, what: &dyn std::fmt::Debug) {
        if std::env::var_os("SIMULATION_SEED").is_some() {
            eprintln!("{what:?}");
        }
    }

    fn poll(&mut self) {
        if self.is_found && self.roster.next(self.now).is_some() {
            self.activate();
        }
        let mut actions = Vec::new();
        let jitter = self.rng.f64();
        // Now and then other webhooks hold all that the process has.
        let hold = if self.calm { 0 } else { self.rng.usize(..8) };
        let (bytes_free, spare) = (if hold == 1 { 0 } else { usize::MAX }, hold != 2);
        self.dispatch.poll(self.now, bytes_free, jitter, &mut || spare, &mut actions);
        let deadline = self.dispatch.next_deadline();
        let none_is_past = deadline.is_none_or(|at| at > self.now);
        assert!(none_is_past, "the shell would spin: {deadline:?} at {:?}, {:?}", self.now, self.dispatch);
        for action in actions {
            self.trace(&action);
            match action {
                Action::Read(flow, read) => self.start_read(flow, read),
                Action::Close(flow) => {
                    self.reads[flow].as_mut().expect("something is open").to_close = true;
                }
                Action::Attempt(attempt) => {
                    let doc = (attempt.flow, attempt.event.doc_id.clone());
                    assert!(self.in_flight_docs.insert(doc), "two requests for one document");
                    self.jobs.push(Job::Attempt(attempt));
                }
                Action::Batch(batch) => {
                    let max = self.settings.batching.expect("batches were asked for").max;
                    assert!((2..=max).contains(&batch.parts.len()), "{} events of {max}", batch.parts.len());
                    for part in &batch.parts {
                        let doc = (part.flow, part.event.doc_id.clone());
                        assert!(self.in_flight_docs.insert(doc), "two requests for one document");
                    }
                    self.seen.batch = true;
                    self.jobs.push(Job::Batch(batch));
                }
                Action::LookUp(attempt) => self.jobs.push(Job::LookUp(attempt)),
                Action::StoreLetter(attempt, class) => self.jobs.push(Job::Letter(attempt, class)),
                Action::Keep(attempt, owed) => {
                    assert!(self.tellings[attempt.flow].remembers(), "nothing is kept there");
                    let mark = self.known[attempt.flow].expect("it was opened");
                    self.jobs.push(Job::Keep(attempt, owed, mark));
                }
                Action::DeleteLetter(id) => {
                    let told = self.delivered.contains(&id) || self.told_otherwise.contains(&id);
                    assert!(told, "a letter went that was not delivered");
                    self.letters.remove(&id);
                }
                Action::Replayed(id, end) => {
                    assert!(self.asked.remove(&id).is_some(), "nobody asked for {id}");
                    self.seen.replayed |= end == Replayed::Delivered;
                }
                Action::Fetch(flow, letter) => self.jobs.push(Job::Fetch(flow, letter)),
                Action::StoreCheckpoint(flow, position) => self.jobs.push(Job::Checkpoint(flow, position)),
                Action::Say(Notice::Endpoint(endpoint::Notice::Down(_))) => self.seen.pause = true,
                Action::LetGo(flow) => {
                    assert_eq!(flow, FOUND, "the others never rest");
                    let name = Self::found_name();
                    match self.roster.is_leaving(&name) {
                        true => self.roster.on_left(&name, true),
                        false => self.roster.on_rested(&name),
                    }
                    self.let_go();
                }
                Action::Say(_) => {}
            }
        }
        let in_flight = self.dispatch.n_in_flight();
        let concurrency = self.settings.concurrency;
        assert!(in_flight <= concurrency, "{in_flight} in flight of {concurrency}");
        let in_order = |flow: usize| !self.strict || self.dispatch.flow(flow).keeps_order();
        assert!((0..FLOWS).all(in_order), "what came later went first: {:?}", self.dispatch);
        assert!(self.dispatch.n_pending() <= WINDOW_EVENTS + 8, "the window is full");
        self.seen.four_in_flight |= in_flight >= 4;
    }

    fn step(&mut self) {
        self.poll();
        if self.rng.u8(..10) == 0 {
            self.operate();
        }
        match self.rng.u8(..100) {
            0..=27 => self.write(),
            28 if self.rng.bool() => self.leave(),
            28 => self.sweep(),
            // It may be stored at any time, or not at all.
            29 => {
                while let Some((_, entries)) = self.roster.take_changed() {
                    self.stored_entries = entries;
                }
            }
            30..=59 => self.step_job(),
            60..=79 => self.step_read(self.next_flow()),
            80..=89 => self.pass_time(),
            90..=94 => {
                let moods =
                    [Mood::Good, Mood::Good, Mood::Unreachable, Mood::Fails, Mood::RefusesAll, Mood::Flaky];
                self.mood = *self.rng.choice(&moods).unwrap();
            }
            95..=97 => self.crash(),
            98 if self.rng.bool() => self.store_late(),
            98 => self.recreate(),
            _ => self.roll_back(),
        }
    }

    fn next_flow(&self) -> usize {
        let mut rng = self.rng.clone();
        rng.usize(..FLOWS)
    }

    /// To the next deadline, or a random while.
    fn pass_time(&mut self) {
        let random = self.now + Duration::from_millis(self.rng.u64(1..20_000));
        self.now = match self.dispatch.next_deadline() {
            Some(at) if self.rng.u8(..3) > 0 || self.calm => at.max(self.now),
            _ => random,
        };
    }

    /// Calm at last (poison stays): everything must arrive, in bounded time.
    fn settle(&mut self) {
        self.calm = true;
        self.late.clear();
        self.mood = Mood::Good;
        let mut n_operated = 0;
        for _ in 0..4_000 {
            self.poll();
            if self.is_done() {
                // Whoever looks now finds all the letters there will be.
                n_operated += 1;
                if n_operated > 3 {
                    return;
                }
                self.operate();
                continue;
            }
            if !self.jobs.is_empty() {
                self.step_job();
            } else if (0..FLOWS)
                .any(|flow| self.reads[flow].as_ref().is_some_and(|open| self.has_more(flow, open)))
            {
                (0..FLOWS).for_each(|flow| self.step_read(flow));
            } else {
                self.sweep();
                let waits = self.dispatch.n_pending() > 0 && self.dispatch.next_deadline().is_none();
                assert!(!waits, "nothing would ever go on: {:?}", self.dispatch);
                self.pass_time();
                if self.rng.u8(..4) == 0 {
                    // Other traffic, which is what shows that a poisoned event is one.
                    let flow = self.rng.usize(..FLOWS);
                    self.next_rev += 1;
                    self.rolled_back.remove(&(flow, DOCS));
                    let rev = format!("{}-f", self.next_rev);
                    let (others, gone, deleted, matches) = (Vec::new(), Vec::new(), false, true);
                    let mut other = Update { doc: DOCS, rev, others, gone, deleted, matches };
                    if !self.wants(flow, &other) {
                        // Whoever wants no updates wants conflicts; what is not told shows nothing.
                        other.others.push(format!("{}-e", self.next_rev));
                    }
                    self.put(flow, other);
                }
            }
        }
        panic!(
            "not done: jobs {:?}, reads {:?}, letters {:?}, poison {:?}, {:?}",
            self.jobs, self.reads, self.letters, self.poison, self.dispatch
        );
    }

    fn has_more(&self, flow: usize, open: &Open) -> bool {
        open.to_close
            || open.limit.is_some()
            || open.mark != self.dbs[flow].mark
            || self.dbs[flow]
                .next_row(&mut open.vector.clone(), self.filtered[flow], &mut self.rng.clone())
                .is_some()
    }

    fn is_done(&self) -> bool {
        self.jobs.is_empty()
            && self.asked.is_empty()
            && self.dispatch.n_pending() == 0
            && (0..FLOWS).all(|flow| {
                let rests = self.is_found && flow == FOUND;
                let is_read = match &self.reads[flow] {
                    Some(open) => !rests && !self.has_more(flow, open),
                    None => rests && self.is_clean(),
                };
                is_read
                    && self.dbs[flow]
                        .checkpoint
                        .as_ref()
                        .is_some_and(|(position, _)| position.mark == self.dbs[flow].mark.to_string())
            })
            && self.dispatch.is_stored()
    }

    /// Whether the roster believes that there is nothing new in the database, however its state is spelled.
    fn is_clean(&self) -> bool {
        let mut copy = self.rng.clone();
        let db = &self.dbs[FOUND];
        let n_updates: usize = db.shards.iter().map(Vec::len).sum();
        let spelling = if self.one { 0 } else { copy.u64(..3) };
        let fingerprint = (db.mark << 48) | (db.life << 32) | ((n_updates as u64) << 8) | spelling;
        let name = Self::found_name();
        // One of which a letter is to be sent again keeps its flow, at rest.
        let flow = self.dispatch.flow(FOUND);
        self.roster.is_clean(&name, fingerprint, self.roster.flow(&name).is_some() && flow.is_at_rest())
    }

    /// The last word about every document is what CouchDB holds.
    fn check_end(&self) {
        for flow in 0..FLOWS {
            for doc in 0..DOCS {
                let Some(winner) = self.dbs[flow].winner(doc) else { continue };
                if self.filtered[flow] && !winner.matches {
                    continue;
                }
                if self.rolled_back.contains(&(flow, doc)) {
                    continue;
                }
                let known = (flow, self.dbs[flow].mark, doc);
                if self.tellings[flow].remembers() {
                    let is_told = self.told_conflicted.contains(&known);
                    assert!(!is_told || winner.is_conflicted(), "nobody is told that {known:?} is resolved");
                    assert_eq!(self.is_kept(flow, doc), winner.is_conflicted(), "what is kept of {known:?}");
                }
                if !self.wants(flow, winner) {
                    continue;
                }
                let told = self.last_told.get(&(flow, doc));
                // A checkpoint names what is delivered by id alone. After a crash it cannot tell that since then
                // another revision was delivered, which it had not yet named, before this one won again. So then
                // only this is promised: it was delivered. (A receiver that goes by `webhook-id` drops a
                // revision that wins again in any case: it has its first id.)
                let mark = self.dbs[flow].mark.to_string();
                let id = WebhookId::of(&("w", format!("db{flow}"), mark, format!("doc{doc}"), winner.revs()));
                let crashed_since = self.first_told.get(&id).is_some_and(|crashes| *crashes < self.n_crashes);
                if self.flipped.contains(&(flow, doc)) && crashed_since {
                    continue;
                }
                assert_eq!(told, Some(&owned(winner.revs())), "the last word about doc{doc} of db{flow}");
            }
        }
    }
}

/// What the `webhook-id` of an event is made of.
fn revs(event: &Event) -> Vec<&str> {
    std::iter::once(&event.rev).chain(&event.conflicts).map(String::as_str).collect()
}

fn owned(texts: Vec<&str>) -> Vec<String> {
    texts.into_iter().map(str::to_owned).collect()
}

fn run(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.settle();
    world.check_end();
    world.seen
}

#[test]
fn no_schedule_loses_an_event() {
    if let Ok(seed) = std::env::var("SIMULATION_SEED") {
        run(seed.parse().unwrap());
        return;
    }
    let schedules: u64 =
        std::env::var("SIMULATION_SCHEDULES").map_or_else(|_| size(250, 1_000), |n| n.parse().unwrap());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let (to, counted) = crossbeam_channel::bounded(threads as usize);
    let workers: Vec<_> = (0..threads)
        .map(|nth| {
            let to = to.clone();
            let seeds = (1..=schedules).filter(move |seed| seed % threads == nth);
            crate::sys::spawn("simulation", move || to.send(run_all(seeds)).unwrap()).unwrap()
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    let mut counts = BTreeMap::new();
    for (name, n) in counted.try_iter().flatten() {
        *counts.entry(name).or_insert(0) += n;
    }
    for (name, _, least_percent) in shares(Seen::default()) {
        let percent = counts[name] as f64 * 100.0 / schedules as f64;
        println!("{name}: {percent:.1} % of {schedules} schedules (at least {least_percent} %)");
        assert!(percent >= f64::from(least_percent), "too few schedules with: {name}");
    }
}

/// Runs schedules one after the other, and counts what they held.
fn run_all(seeds: impl Iterator<Item = u64>) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    for seed in seeds {
        let seen = std::panic::catch_unwind(|| run(seed)).unwrap_or_else(|panic| {
            eprintln!("failed with SIMULATION_SEED={seed}");
            std::panic::resume_unwind(panic);
        });
        for (name, seen, _) in shares(seen) {
            *counts.entry(name).or_insert(0) += u64::from(seen);
        }
    }
    counts
}

/// What schedules must hold often enough for the simulation to mean anything, in percent.
fn shares(seen: Seen) -> [(&'static str, bool, u8); 20] {
    [
        ("at least 4 in flight", seen.four_in_flight, 20),
        ("a crash between delivery and checkpoint", seen.crash_before_checkpoint, 5),
        ("a dead letter", seen.letter, 5),
        ("a rewind", seen.rewind, 5),
        ("an endpoint pause", seen.pause, 5),
        ("a database re-created", seen.recreated, 5),
        ("a server rolled back", seen.rolled_back, 5),
        ("a full page", seen.full_page, 20),
        ("a checkpoint of an earlier life", seen.late_checkpoint, 5),
        ("a batch", seen.batch, 20),
        ("a batch refused", seen.batch_refused, 5),
        ("a crash with a batch in flight", seen.batch_crash, 5),
        ("a letter sent again", seen.replayed, 5),
        ("a letter discarded", seen.discarded, 5),
        ("a conflict resolved", seen.resolved, 5),
        ("one that was not told, or not all else", seen.resolved_unwanted, 1),
        ("a crash while one is stored or forgotten", seen.crash_while_kept, 5),
        ("a database that rests let go", seen.let_go, 20),
        ("one stirred while it is read", seen.stirred, 5),
        ("one left to somebody else", seen.left, 5),
    ]
}
