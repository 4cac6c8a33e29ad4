//! `tail`: a webhook's attempts as they are made.
//!
//! Guarantees that the daemon does nothing for it once nobody looks: the request is renewed while this runs, and ends
//! by itself half a minute after. Shows the last 100 attempts at most at a time; what more there were is said.

use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;

use crate::cli::ask::Office;
use crate::cli::common::Setup;
use crate::cli::out::{Colour, Out};
use crate::cli::run::Source;
use crate::config::values;
use crate::couch::requests::{self, Arguments as Asked, Command, Progress, Request};
use crate::error::{Error, Kind, Result};
use crate::sys;

/// How often new attempts are looked for; the daemon writes them once a second.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often the daemon is told that somebody still looks; a third of its patience.
const RENEW_EVERY: Duration = Duration::from_secs(10);
/// A daemon that is there answers by then.
const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd tail orders\n  \
    couch-hookd tail orders --for 1m --json | jq 'select(.status != 200)'\n\n\
    Each line: status (--- without an answer), time, how long it took, webhook-id,\n\
    document, attempt, and the start of an answer other than 2xx. Ctrl-C ends it.")]
pub(crate) struct Arguments {
    /// The webhook
    name: String,
    /// End by itself after this long, such as `30s`
    #[arg(long = "for", value_name = "DURATION")]
    lasts: Option<String>,
    #[command(flatten)]
    source: Source,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Shows attempts until it is ended.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { name, lasts, source, json } = arguments;
    const LONGEST: Duration = Duration::from_secs(24 * 3600);
    let lasts = lasts.map(|text| values::duration(&text, Duration::ZERO, LONGEST)).transpose();
    let lasts = lasts.map_err(|why| Error::new(Kind::Config, format!("--for: {why}")))?;
    let setup = Setup::load(source)?;
    let webhook = setup.webhook(&name)?;
    let office = Office::open(&setup)?;
    if office.alive(Some(&webhook.name))?.is_empty() {
        let found = format!("no daemon runs webhook `{name}`: there are no attempts to show");
        return Err(Error::new(Kind::NotFound, found));
    }
    let request = office.request(&webhook.name, Command::Tail, Asked::default())?;
    let ended = follow(&office, &request, lasts, json, out);
    if let Ok(Some(request)) = requests::read(&office.shared.server, &office.shared.state_db, &request.id) {
        // It ends by itself if this fails.
        let _ = requests::delete(&office.shared.server, &office.shared.state_db, &request);
    }
    office.close()?;
    ended.map(|()| 0)
}

fn follow(
    office: &Office,
    request: &Request,
    lasts: Option<Duration>,
    json: bool,
    out: &mut Out,
) -> Result<()> {
    let begun: Instant = sys::now();
    let mut renewed = begun;
    let mut shown = None;
    loop {
        let now = office.read(request)?;
        if now.state != Progress::Open {
            return Err(Error::new(Kind::Stopped, "the daemon ended it"));
        }
        match (now.answer.get("attempts"), shown) {
            (Some(Value::Array(attempts)), _) => show(attempts, &mut shown, json, out)?,
            (_, None) if begun.elapsed() > PATIENCE => {
                return Err(Error::new(Kind::Timeout, "the daemon does not answer"));
            }
            _ => {}
        }
        if lasts.is_some_and(|lasts| begun.elapsed() >= lasts) {
            return Ok(());
        }
        if renewed.elapsed() >= RENEW_EVERY {
            renewed = sys::now();
            renew(office, now)?;
        }
        sys::sleep(LOOK_EVERY);
    }
}

/// Says that somebody still looks. The daemon may have written meanwhile; then the next time will do.
fn renew(office: &Office, mut request: Request) -> Result<()> {
    request.arguments.n_renewed += 1;
    match requests::write(&office.shared.server, &office.shared.state_db, &mut request) {
        Err(error) if error.kind() != Kind::Conflict => Err(error),
        _ => Ok(()),
    }
}

/// Those that were not shown yet. What was there before this began is not.
fn show(attempts: &[Value], shown: &mut Option<u64>, json: bool, out: &mut Out) -> Result<()> {
    let number = |attempt: &Value| attempt["n"].as_u64().unwrap_or(0);
    let last = attempts.last().map_or(0, number);
    let Some(before) = *shown else {
        *shown = Some(last);
        return Ok(());
    };
    let new: Vec<&Value> = attempts.iter().filter(|attempt| number(attempt) > before).collect();
    let missed = (last.saturating_sub(before)).saturating_sub(new.len() as u64);
    if missed > 0 && !json {
        out.line(&format!("… {missed} more …"))?;
    }
    for attempt in new {
        match json {
            true => out.json(&attempt.to_string())?,
            false => line(attempt, out)?,
        }
    }
    *shown = Some(last.max(before));
    Ok(())
}

fn line(attempt: &Value, out: &mut Out) -> Result<()> {
    let text = |name: &str| attempt[name].as_str().unwrap_or_default();
    let status = attempt["status"].as_u64();
    let colour = match status {
        Some(200..=299) => Colour::Green,
        Some(400..=499) => Colour::Yellow,
        _ => Colour::Red,
    };
    let status = status.map_or_else(|| "---".to_owned(), |status| status.to_string());
    // `2026-11-21T20:46:41.123456Z`: the day is today's.
    let time: String = text("at").split('T').nth(1).unwrap_or_default().chars().take(12).collect();
    let replay = if attempt["replay"] == true { " replay" } else { "" };
    let line = format!(
        "{} {:>6} ms  {}  {}/{}  attempt {}{replay}  {}",
        time.trim_end_matches('Z'),
        attempt["milliseconds"],
        text("id"),
        text("db"),
        text("doc_id"),
        attempt["attempt"],
        text("answer")
    );
    out.marked_line(&status, colour, line.trim_end())
}
