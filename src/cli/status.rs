//! `status`: how every webhook is, with the daemon up or down, and whether a person is needed.
//!
//! Guarantees that what is counted (changes ahead, dead letters) is counted now, from what CouchDB holds; what only a
//! daemon knows it is asked for: a request that is taken back again. Changes nothing else.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::common::{Setup, age, until};
use crate::cli::out::{Colour, Out};
use crate::cli::run::Source;
use crate::cli::table::{Cell, Table};
use crate::config::Webhook;
use crate::couch::alive::{self, Daemon};
use crate::couch::letters::{self, Filter};
use crate::couch::requests::{self, Arguments as Asked, Command, Request};
use crate::couch::state_db::{self, DeadLetterClass, WebhookRecord};
use crate::couch::{feed, local_docs};
use crate::error::{Error, Kind, Result};
use crate::pure::lease::Mode;
use crate::pure::message::Watch;
use crate::pure::seq::Seq;
use crate::pure::snapshot::{State, WebhookStatus};
use crate::sys;

/// Changes are counted up to so many where CouchDB does not say how many there are.
const COUNTED_MAX: u64 = 10_000;
/// A daemon says how its webhooks are by then; else what it said before has to do.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// How often it is looked whether all have.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What passes by itself may take so long.
const PASSING: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd status\n  \
    couch-hookd status orders --json | jq .state\n  \
    couch-hookd status --config /opt/couchdb/etc/local.ini || mail -s 'webhooks' ops < /dev/null\n\n\
    PENDING counts the changes behind the stored place, before any filter. OLDEST is how\n\
    long ago the daemon read the oldest change that is not delivered yet.\n\n\
    Exit status 1 when a webhook needs a person: no daemon runs it; its section has an\n\
    error; its endpoint said 410; too many dead letters paused it; dead letters that were\n\
    refused or given up lie there; its endpoint takes nothing for longer than the whole\n\
    retry_schedule; it cannot start, or read a database, for 5 minutes. A pause by hand or\n\
    by configuration is no reason. Status 2: used wrongly.")]
pub(crate) struct Arguments {
    /// Only this webhook
    name: Option<String>,
    #[command(flatten)]
    source: Source,
    /// One JSON object a webhook, on one line each
    #[arg(long)]
    json: bool,
}

/// One webhook in one daemon, or in none.
///
/// `{"webhook":"orders","state":"down","since":"…","why":"its endpoint cannot be reached","daemon":"process 4711 on
/// db1","said_at":"…","pending":1200,"dead_letters":{"refused":3},"needs":"…",…}`
#[derive(Debug, Serialize)]
struct Line {
    webhook: String,
    state: &'static str,
    since: Option<Timestamp>,
    why: Option<String>,
    /// Who runs it, and when it last said how it is.
    daemon: Option<String>,
    said_at: Option<Timestamp>,
    /// Whether several daemons divide it (`lease = shared`): then each tells a part.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    divided: bool,
    /// Who would run it if that one did not (`lease`).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    standbys: Vec<String>,
    /// Changes behind the stored place; at least so many with `pending_at_least`.
    pending: Option<u64>,
    pending_at_least: bool,
    unfinished: u64,
    oldest: Option<Timestamp>,
    dead_letters: BTreeMap<&'static str, u64>,
    last_success: Option<Timestamp>,
    last_failure: Option<Timestamp>,
    failure: Option<String>,
    next_try: Option<Timestamp>,
    /// Why a person is needed.
    needs: Option<String>,
}

/// What CouchDB holds about one webhook.
struct Stored {
    record: WebhookRecord,
    pending: Option<u64>,
    letters: BTreeMap<&'static str, u64>,
}

/// Shows how webhooks are.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let setup = Setup::load(arguments.source)?;
    let webhooks: Vec<&Webhook> = match &arguments.name {
        Some(name) => vec![setup.webhook(name)?],
        None => setup.config.webhooks.iter().collect(),
    };
    // Only to know whether we get in: a state_db that is not there yet is no fault.
    setup.welcome()?;
    let (daemons, now) = ask_daemons(&setup)?;
    let letters = count_letters(&setup)?;
    let mut lines = Vec::new();
    for webhook in webhooks {
        let stored = Stored::read(&setup, webhook, &letters)?;
        let running: Vec<&Daemon> =
            daemons.iter().filter(|daemon| daemon.webhooks.contains_key(&webhook.name)).collect();
        let stands_by = |daemon: &&Daemon| daemon.webhooks[&webhook.name].state == State::Standby;
        let (standbys, tellers): (Vec<&Daemon>, Vec<&Daemon>) = running.into_iter().partition(stands_by);
        let places = |daemons: &[&Daemon]| daemons.iter().map(|daemon| daemon.place()).collect::<Vec<_>>();
        let line = |daemon: &Daemon| Line::running(webhook, &stored, daemon, now);
        match (&tellers[..], &standbys[..]) {
            ([], []) => lines.push(Line::stopped(webhook, &stored)),
            ([], [first, others @ ..]) => lines.push(Line { standbys: places(others), ..line(first) }),
            _ => lines
                .extend(tellers.iter().map(|teller| Line { standbys: places(&standbys), ..line(teller) })),
        }
    }
    if arguments.name.is_none() {
        lines.extend(setup.held_back.iter().map(|name| Line::held_back(name)));
    }
    let needs = lines.iter().any(|line| line.needs.is_some());
    if arguments.json {
        for line in &lines {
            out.json(&serde_json::to_string(line).expect("texts and numbers are always JSON"))?;
        }
    } else {
        show(&lines, &daemons, out)?;
    }
    Ok(u8::from(needs))
}

/// Daemons that are alive, each having said a moment ago how its webhooks are, and CouchDB's time.
fn ask_daemons(setup: &Setup) -> Result<(Vec<Daemon>, Timestamp)> {
    let (server, state_db) = (&setup.server, &setup.config.hookd.state_db);
    let alive = || {
        let (mut daemons, now) =
            or_nothing(alive::list(server, state_db))?.unwrap_or((Vec::new(), sys::wall()));
        daemons.retain(|daemon| daemon.is_alive(now));
        Ok::<_, Error>((daemons, now))
    };
    let (before, now) = alive()?;
    let mut request = Request::new("", Command::Status, Asked::default(), "");
    // Who may only read sees what was said last.
    if before.is_empty() || requests::write(server, state_db, &mut request).is_err() {
        return Ok((before, now));
    }
    let until = sys::now() + ANSWER_MAX;
    let said = |daemon: &Daemon| before.iter().all(|one| one.id != daemon.id || one.rev != daemon.rev);
    let daemons = loop {
        let (daemons, now) = alive()?;
        if daemons.iter().all(said) || sys::now() >= until {
            break (daemons, now);
        }
        sys::sleep(LOOK_EVERY);
    };
    // It is cleaned away by a daemon if this fails.
    let _ = requests::delete(server, state_db, &request);
    Ok(daemons)
}

/// `None` for what is not there.
fn or_nothing<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Dead letters by webhook and class.
fn count_letters(setup: &Setup) -> Result<BTreeMap<String, BTreeMap<&'static str, u64>>> {
    let found = letters::list(&setup.server, &setup.config.hookd.state_db, &Filter::default(), usize::MAX);
    let mut counts: BTreeMap<String, BTreeMap<&'static str, u64>> = BTreeMap::new();
    for stored in or_nothing(found)?.unwrap_or_default() {
        let letter = stored.letter;
        *counts.entry(letter.webhook).or_default().entry(letter.class.as_str()).or_default() += 1;
    }
    Ok(counts)
}

impl Stored {
    fn read(
        setup: &Setup,
        webhook: &Webhook,
        letters: &BTreeMap<String, BTreeMap<&'static str, u64>>,
    ) -> Result<Stored> {
        let (server, state_db) = (&setup.server, &setup.config.hookd.state_db);
        let record = or_nothing(state_db::read_record(server, state_db, &webhook.name))?.flatten();
        let active = record.is_some();
        let record = record.unwrap_or_default();
        let key = or_nothing(state_db::known_key(server, state_db))?.flatten();
        let mut pending = None;
        // What lies ahead in `state_db` are signs of life, mostly: their number says nothing.
        let counts = active && webhook.watch == Watch::Changes;
        for db in webhook.db.iter().filter(|_| counts) {
            let Some(key) = &key else { break };
            let seek = record.seeks.get(db);
            let position = or_nothing(local_docs::position(server, db, &webhook.name, key, seek))?;
            let Some(position) = position else { continue };
            let since = position.map_or_else(Seq::zero, |checkpoint| checkpoint.through_seq);
            // A place that CouchDB does not know any more is found out by the daemon.
            if let Ok(n) = feed::count_after(server, db, &since, None, COUNTED_MAX) {
                pending = Some(pending.unwrap_or(0) + n);
            }
        }
        Ok(Stored { record, pending, letters: letters.get(&webhook.name).cloned().unwrap_or_default() })
    }

    fn n_lasting_letters(&self) -> u64 {
        let lasting = [DeadLetterClass::Refused, DeadLetterClass::GivenUp];
        lasting.iter().filter_map(|class| self.letters.get(class.as_str())).sum()
    }
}

impl Line {
    fn new(webhook: &str, state: &'static str) -> Line {
        Line {
            webhook: webhook.to_owned(),
            state,
            since: None,
            why: None,
            daemon: None,
            said_at: None,
            divided: false,
            standbys: Vec::new(),
            pending: None,
            pending_at_least: false,
            unfinished: 0,
            oldest: None,
            dead_letters: BTreeMap::new(),
            last_success: None,
            last_failure: None,
            failure: None,
            next_try: None,
            needs: None,
        }
    }

    fn with(mut self, stored: &Stored) -> Line {
        self.pending = stored.pending;
        self.pending_at_least = stored.pending.is_some_and(|n| n >= COUNTED_MAX);
        self.dead_letters.clone_from(&stored.letters);
        if self.needs.is_none() && stored.n_lasting_letters() > 0 {
            self.needs = Some("dead letters: replay or discard them".to_owned());
        }
        self
    }

    fn held_back(name: &str) -> Line {
        let needs = Some("its section has an error: see `couch-hookd check`".to_owned());
        Line { why: needs.clone(), needs, ..Line::new(name, "held back") }
    }

    /// What is known without a daemon.
    fn stopped(webhook: &Webhook, stored: &Stored) -> Line {
        let record = &stored.record;
        let state = match () {
            () if record.gone_since.is_some() => State::Gone.as_str(),
            () if webhook.paused || record.paused_since.is_some() => State::Paused.as_str(),
            () => "stopped",
        };
        let line = Line { why: Some("no daemon runs it".to_owned()), ..Line::new(&webhook.name, state) };
        let line = match (record.gone_since, record.paused_since) {
            (Some(since), _) => Line { since: Some(since), why: record.gone_reason.clone(), ..line },
            (None, Some(since)) => Line { since: Some(since), why: record.paused_reason.clone(), ..line },
            (None, None) if webhook.paused => Line { why: Some("by its configuration".to_owned()), ..line },
            (None, None) => line,
        };
        let needs = match needs_resume(webhook, record) {
            _ if state == "stopped" => Some("no daemon runs it".to_owned()),
            needs => needs,
        };
        Line { needs, ..line }.with(stored)
    }

    /// What its daemon said.
    fn running(webhook: &Webhook, stored: &Stored, daemon: &Daemon, now: Timestamp) -> Line {
        let status = daemon.webhooks[&webhook.name].clone();
        let record = &stored.record;
        let needs = needs_resume(webhook, record).or_else(|| needs_help(webhook, &status, now));
        // The record is newer than what was said: a webhook that was just paused is being stopped.
        let held = [
            (State::Gone, record.gone_since, &record.gone_reason),
            (State::Paused, record.paused_since, &record.paused_reason),
        ];
        let held = held.into_iter().find_map(|(state, since, why)| Some((state, since?, why.clone())));
        let (state, since, why) = held.unwrap_or((status.state, status.since, status.why));
        let line = Line {
            since: Some(since),
            why,
            daemon: Some(daemon.place()),
            divided: webhook.lease == Some(Mode::Shared),
            said_at: Some(daemon.renewed_at),
            unfinished: status.unfinished,
            oldest: status.oldest,
            last_success: status.last_success,
            last_failure: status.last_failure,
            failure: status.failure,
            next_try: status.next_try,
            needs,
            ..Line::new(&webhook.name, state.as_str())
        };
        line.with(stored)
    }
}

/// A pause that nobody asked for.
fn needs_resume(webhook: &Webhook, record: &WebhookRecord) -> Option<String> {
    let name = &webhook.name;
    if record.gone_since.is_some() {
        return Some(format!("its endpoint is gone: mend it, then `couch-hookd resume {name}`"));
    }
    let by_itself = record.paused_since.is_some() && record.paused_by.is_none();
    by_itself.then(|| format!("it paused itself: `couch-hookd resume {name}`"))
}

/// What should have passed by itself.
fn needs_help(webhook: &Webhook, status: &WebhookStatus, now: Timestamp) -> Option<String> {
    let lasts = now.duration_since(status.since).unsigned_abs();
    let schedule: Duration = webhook.retry_schedule.iter().sum();
    match status.state {
        State::Down if lasts > schedule => Some("its endpoint takes nothing for long".to_owned()),
        State::Starting if lasts > PASSING => Some("it cannot start: see the daemon's log".to_owned()),
        State::Waiting if lasts > PASSING => Some("it cannot read a database".to_owned()),
        State::Standby if lasts > PASSING => Some("no daemon holds its lease: see their logs".to_owned()),
        State::Starting | State::Waiting | State::Down | State::Standby => None,
        State::Running | State::Paused | State::Gone => None,
    }
}

/// Webhooks that more than one daemon runs.
fn run_twice(lines: &[Line]) -> Vec<&str> {
    let mut n_daemons: BTreeMap<&str, usize> = BTreeMap::new();
    for line in lines.iter().filter(|line| line.daemon.is_some() && !line.divided) {
        *n_daemons.entry(&line.webhook).or_default() += 1;
    }
    n_daemons.into_iter().filter(|(_, n)| *n > 1).map(|(name, _)| name).collect()
}

fn show(lines: &[Line], daemons: &[Daemon], out: &mut Out) -> Result<()> {
    let mut table = Table::new(&[
        "WEBHOOK",
        "STATE",
        ">FOR",
        ">PENDING",
        ">OLDEST",
        ">LETTERS",
        ">LAST OK",
        ">FAILED",
        ">NEXT TRY",
        "WHY",
    ]);
    let ago = |at: Option<Timestamp>| at.map_or_else(|| "-".to_owned(), age);
    let mut whys = Vec::new();
    for line in lines {
        let colour = match (&line.needs, line.state) {
            (Some(_), _) => Colour::Red,
            (None, "running") => Colour::Green,
            (None, _) => Colour::Yellow,
        };
        let pending = match (line.pending, line.pending_at_least) {
            (None, _) => "-".to_owned(),
            (Some(n), true) => format!("{n}+"),
            (Some(n), false) => n.to_string(),
        };
        let why = match (&line.why, &line.failure) {
            (Some(why), Some(failure)) if line.state == "down" => format!("{why} ({failure})"),
            (Some(why), _) => why.clone(),
            (None, _) => String::new(),
        };
        table.row([
            (&line.webhook).into(),
            Cell::coloured(line.state, colour),
            ago(line.since).into(),
            pending.into(),
            ago(line.oldest).into(),
            line.dead_letters.values().sum::<u64>().to_string().into(),
            ago(line.last_success).into(),
            ago(line.last_failure).into(),
            line.next_try.map_or_else(|| "-".to_owned(), until).into(),
            (&why).into(),
        ]);
        whys.push(why);
    }
    // A reason is worth a line of its own where half of it would be cut away.
    if out.width().is_some_and(|width| table.width() > width) {
        table.drop_last();
        table.print(out)?;
        for (line, why) in lines.iter().zip(&whys).filter(|(_, why)| !why.is_empty()) {
            out.line(&format!("webhook `{}` is {}: {why}", line.webhook, line.state))?;
        }
    } else {
        table.print(out)?;
    }
    if daemons.is_empty() {
        out.line("no daemon is alive")?;
    }
    for daemon in daemons {
        let text = format!(
            "daemon: {}, version {}, said so {} ago",
            daemon.place(),
            daemon.version,
            age(daemon.renewed_at)
        );
        out.line(&text)?;
    }
    let mut standbys: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for line in lines.iter().filter(|line| !line.standbys.is_empty()) {
        standbys.entry(line.standbys.join(", ")).or_default().push(&line.webhook);
    }
    for (places, webhooks) in standbys {
        out.line(&format!("standing by for `{}`: {places}", webhooks.join("`, `")))?;
    }
    let twice = run_twice(lines);
    if !twice.is_empty() {
        let twice = twice.join("`, `");
        out.line(&format!(
            "more than one daemon tells `{twice}`: with `lease = auto` one does, and another takes over when it dies"
        ))?;
    }
    for line in lines {
        if let Some(needs) = &line.needs {
            out.line(&format!("webhook `{}` needs a person: {needs}", line.webhook))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_that_two_daemons_run_is_found() {
        let line = |name: &str, daemon: Option<&str>| Line {
            daemon: daemon.map(str::to_owned),
            ..Line::new(name, "running")
        };
        let lines = [line("a", Some("x")), line("b", None), line("a", Some("y")), line("b", Some("x"))];
        assert_eq!(run_twice(&lines), ["a"]);
    }

    #[test]
    fn what_should_have_passed_by_itself_needs_a_person() {
        let now = Timestamp::from_second(10_000).unwrap();
        let raw = crate::config::source::from_sections(
            &BTreeMap::from([(
                "hookd.webhooks".to_owned(),
                BTreeMap::from([("orders".to_owned(), "https://x.example/".to_owned())]),
            )]),
            &crate::config::finding::Origin::OsDaemons,
            &crate::config::source::Overrides::default(),
        );
        let webhook = crate::config::parse(&raw).0.config.unwrap().webhooks.pop().unwrap();
        let needs = |state: State, seconds: i64| {
            let since = Timestamp::from_second(10_000 - seconds).unwrap();
            needs_help(&webhook, &WebhookStatus::new(state, since), now).is_some()
        };
        assert!(!needs(State::Running, 9_000) && !needs(State::Down, 500));
        assert!(needs(State::Down, 600), "the schedule is 8 min 51 s");
        assert!(needs(State::Starting, 400) && needs(State::Waiting, 400) && !needs(State::Waiting, 200));
        let mut record = WebhookRecord { paused_since: Some(now), ..WebhookRecord::default() };
        assert!(needs_resume(&webhook, &record).is_some(), "it paused itself");
        record.paused_by = Some("anna".to_owned());
        assert!(needs_resume(&webhook, &record).is_none());
        record.gone_since = Some(now);
        assert!(needs_resume(&webhook, &record).unwrap().contains("resume orders"));
    }
}
