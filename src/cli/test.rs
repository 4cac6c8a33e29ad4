//! `test`: one event to a webhook's endpoint, by the way that deliveries take; shows each step and the answer.
//!
//! Guarantees that nothing secret is shown, not even in the `curl` line, and that the exit status is 0 only after a
//! 2xx, which also ends a pause that nobody asked for. The endpoint is tried without CouchDB; only then CouchDB is asked
//! for a pause.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use crate::cli::common::Setup;
use crate::cli::out::{Colour, Out};
use crate::cli::pause::end_own_pause;
use crate::cli::run::Source;
use crate::cli::table::{Cell, Table};
use crate::daemon::public_source;
use crate::error::Result;
use crate::pipeline::webhook::trial::{self, Step, Trial};
use crate::pure::{test_event, url};
use crate::sys;

/// Clocks may be this far apart; receivers refuse signatures that are five minutes off.
const CLOCK_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd test orders\n  \
    couch-hookd test orders --config /opt/couchdb/etc/local.ini --json\n\n\
    Sends `webhook.test`, signed as every event. Exit status 0 only when the\n\
    answer is 2xx, which also ends a pause after 410 or too many dead letters (one\n\
    by hand stays). The curl line sends the same again, once what stands as *** is\n\
    filled in; its signature is good for five minutes.")]
pub(crate) struct Arguments {
    /// The webhook's name
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    source: Source,
    /// Leave a pause as it is
    #[arg(long)]
    keep_paused: bool,
    /// One JSON object: {"webhook":…,"id":…,"steps":[…],"status":…,…}
    #[arg(long)]
    json: bool,
}

/// Sends one, and shows what came of it.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let setup = Setup::load(arguments.source)?;
    let webhook = setup.webhook(&arguments.name)?;
    let id = test_event::id(&webhook.name, sys::random_bytes());
    let source = public_source(&setup.config.hookd, &setup.config.hookd.couchdb_url, None);
    let body = test_event::body(webhook.format, id, &webhook.name, &source, sys::wall());
    let trial = trial::run(webhook, &id.to_string(), &body)?;
    let taken = trial.outcome.as_ref().is_ok_and(|answer| answer.status.is_success());
    let endpoint = url::shown(webhook.endpoint.expose());
    let ends = taken && !arguments.keep_paused;
    if arguments.json {
        let mut said = as_json(&webhook.name, &endpoint, &id.to_string(), &trial);
        if ends {
            said["pause"] = match end_own_pause(&setup, webhook) {
                Ok(true) => "ended".into(),
                Ok(false) => "none".into(),
                Err(error) => error.to_string().into(),
            };
        }
        out.json(&said.to_string())?;
        return Ok(u8::from(!taken));
    }
    let signed = match webhook.secrets.len() {
        0 => "not signed: the webhook has no secret".to_owned(),
        1 => "signed".to_owned(),
        n => format!("signed with {n} secrets"),
    };
    out.line(&format!("webhook `{}`, endpoint {endpoint}", webhook.name))?;
    out.line(&format!("{} {id}, {signed}", test_event::EVENT_TYPE))?;
    show(&trial, out)?;
    if ends {
        match end_own_pause(&setup, webhook) {
            Ok(true) => {
                out.marked_line("ok", Colour::Green, "its pause is over: it goes on where it stopped")?;
            }
            Ok(false) => {}
            Err(error) => {
                let text = format!("whether it is paused is not known: {error}");
                out.marked_line("warning", Colour::Yellow, &text)?;
            }
        }
    }
    Ok(u8::from(!taken))
}

/// The steps, the answer, the clock, the `curl` line.
fn show(trial: &Trial, out: &mut Out) -> Result<()> {
    let mut table = Table::new(&["step", ">took", "found"]);
    for (step, took) in &trial.steps {
        let found = match (step, &trial.outcome) {
            (Step::Name, _) => addresses(trial),
            (Step::Answer, Ok(answer)) => answer.status.to_string(),
            _ => String::new(),
        };
        table.row([Cell::new(step.word()), Cell::new(ms(*took)), Cell::new(found)]);
    }
    if let Err((step, why)) = &trial.outcome {
        table.row([Cell::coloured(step.word(), Colour::Red), Cell::new("failed"), Cell::new(why)]);
    }
    table.print(out)?;
    if let Ok(answer) = &trial.outcome {
        if !answer.text.is_empty() {
            out.line(&format!("it says: {}", answer.text))?;
        }
        match clock_finding(trial) {
            Some(text) => out.marked_line("warning", Colour::Yellow, &text)?,
            None if answer.clock_ahead.is_none() => {
                out.line("its clock was not compared: the answer has no `date`")?
            }
            None => {}
        }
        match answer.status.is_success() {
            true => out.marked_line("ok", Colour::Green, "the endpoint takes events")?,
            false => {
                out.marked_line("error", Colour::Red, "expected 2xx: the endpoint does not take events")?
            }
        }
    } else {
        out.marked_line("error", Colour::Red, "there was no answer: the endpoint does not take events")?;
    }
    out.line(&trial.curl)
}

fn addresses(trial: &Trial) -> String {
    trial.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What is wrong with the receiver's clock, or ours.
fn clock_finding(trial: &Trial) -> Option<String> {
    let ahead = trial.outcome.as_ref().ok()?.clock_ahead?;
    if ahead.unsigned_abs() <= CLOCK_MAX {
        return None;
    }
    let way = if ahead.is_negative() { "behind" } else { "ahead of" };
    Some(format!(
        "its clock is {} s {way} ours; receivers refuse signatures that are 5 minutes off; set the clock that is wrong",
        ahead.unsigned_abs().as_secs()
    ))
}

/// `12.3 ms`
fn ms(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1000.0)
}

fn as_json(webhook: &str, endpoint: &str, id: &str, trial: &Trial) -> Value {
    let steps = trial
        .steps
        .iter()
        .map(|(step, took)| json!({"step": step.word(), "ms": took.as_secs_f64() * 1000.0}));
    let mut all = json!({
        "webhook": webhook,
        "endpoint": endpoint,
        "id": id,
        "addresses": trial.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "steps": steps.collect::<Vec<_>>(),
        "curl": trial.curl,
    });
    match &trial.outcome {
        Ok(answer) => {
            all["status"] = answer.status.as_u16().into();
            all["answer"] = answer.text.clone().into();
            if let Some(ahead) = answer.clock_ahead {
                all["clock_ahead_seconds"] = ahead.as_secs().into();
            }
        }
        Err((step, why)) => {
            all["failed_at"] = step.word().into();
            all["error"] = why.clone().into();
        }
    }
    all
}
