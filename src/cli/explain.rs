//! `explain`: what a webhook is configured to do, where each value comes from, what follows from it, and which rights
//! it needs and has.
//!
//! Guarantees that secrets are shown as `set`, signing secrets with a fingerprint; and that CouchDB is only read.

mod rights;
mod settings;

use clap::Args;
use serde_json::json;

use crate::cli::common::Setup;
use crate::cli::explain::rights::Right;
use crate::cli::explain::settings::Setting;
use crate::cli::out::{Colour, Out};
use crate::cli::run::Source;
use crate::cli::table::{Cell, Table};
use crate::config::keys::short;
use crate::config::{Filter, Polling, Since, Webhook};
use crate::couch::client::Limits;
use crate::couch::leases;
use crate::error::Result;
use crate::pure::lease::Mode;
use crate::pure::message::Watch;
use crate::pure::{retry, url};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd explain orders\n  \
    couch-hookd explain orders --from-couchdb\n  \
    couch-hookd explain orders --json | jq '.settings[] | select(.origin != \"default\")'\n\n\
    Exit status 1 when a right is missing or CouchDB cannot be asked.")]
pub(crate) struct Arguments {
    /// The webhook's name
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    source: Source,
    /// One JSON object: {"webhook":…,"settings":[{"section":…,"key":…,"value":…,"origin":…}],…}
    #[arg(long)]
    json: bool,
}

/// Explains one webhook.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let setup = Setup::load(arguments.source)?;
    let webhook = setup.webhook(&arguments.name)?;
    let settings = settings::of(&setup, webhook);
    let mut facts = facts(webhook);
    facts.push(("lease", lease(&setup, webhook)));
    let rights = rights::ask(&setup, webhook);
    let status = u8::from(rights.iter().any(|right| right.missing.is_some()));
    let endpoint = url::shown(webhook.endpoint.expose());
    if arguments.json {
        out.json(&as_json(webhook, &endpoint, &settings, &facts, &rights))?;
        return Ok(status);
    }
    out.line(&format!("webhook `{}`, endpoint {endpoint}", webhook.name))?;
    for (what, text) in &facts {
        out.line(&format!("  {what}: {text}"))?;
    }
    out.line("")?;
    let mut table = Table::new(&["section", "key", "origin", "value"]);
    for Setting { section, key, value, origin } in &settings {
        table.row([section, key, origin, value].map(Cell::new));
    }
    table.print(out)?;
    out.line("")?;
    for Right { what, missing } in &rights {
        match missing {
            None => out.marked_line("ok", Colour::Green, what)?,
            Some(why) => out.marked_line("error", Colour::Red, &format!("{what}: {why}"))?,
        }
    }
    Ok(status)
}

/// What follows from the configuration: a word, and a sentence.
fn facts(webhook: &Webhook) -> Vec<(&'static str, String)> {
    let mut facts = vec![("tells", told(webhook))];
    let signed = match webhook.secrets.len() {
        0 => "no: receivers cannot tell our requests from forged ones".to_owned(),
        1 => "with one secret".to_owned(),
        n => format!("with {n} secrets; one that verifies is enough"),
    };
    facts.push(("signed", signed));
    let schedule = &webhook.retry_schedule;
    let steps: Vec<String> = schedule.iter().map(|step| short(*step)).collect();
    let last = steps.last().cloned().unwrap_or_default();
    let times: Vec<String> = retry::since_first(schedule).into_iter().map(clock).collect();
    facts.push((
        "tried again",
        format!(
            "after {}, then every {last}, each up to 20 % earlier or later; that is {} after the first try; \
             `Retry-After` may make it later, by {} at most",
            steps.join(", "),
            times.join(", "),
            short(webhook.retry_after_max)
        ),
    ));
    facts.push(("given up", given_up(webhook)));
    if webhook.watch == Watch::Replications {
        facts.extend(of_replications(webhook));
    }
    if webhook.paused {
        facts.push(("paused", "by its section (`paused = true`)".to_owned()));
    }
    facts
}

/// Which of several daemons tells it; now, where that can be read.
fn lease(setup: &Setup, webhook: &Webhook) -> String {
    let rule = match webhook.lease {
        None => return "never: every daemon that has this webhook tells it".to_owned(),
        Some(Mode::On) => "always: whoever holds it tells",
        Some(Mode::Shared) => return "one for each daemon: they divide the databases".to_owned(),
        Some(Mode::Auto) => {
            "while other daemons with this `state_db` have the webhook: whoever holds it tells"
        }
    };
    let state_db = &setup.config.hookd.state_db;
    let found = leases::read(&setup.server, state_db, &webhook.name, Limits::default()).ok().flatten();
    match found.filter(|found| !found.doc.released) {
        Some(found) => format!("{rule}; {} took or renewed it last", found.place),
        None => rule.to_owned(),
    }
}

fn told(webhook: &Webhook) -> String {
    if webhook.watch == Watch::Daemon {
        return format!("`{}` about couch-hookd itself", webhook.events.join("`, `"));
    }
    if webhook.watch == Watch::Databases {
        return format!("`{}` of the databases `{}`", webhook.events.join("`, `"), webhook.databases());
    }
    if webhook.watch == Watch::Replications {
        let dbs = webhook.db.join("`, `");
        return format!("`{}` of the replications in `{dbs}`", webhook.events.join("`, `"));
    }
    let dbs = webhook.databases().replace(", ", "`, `");
    let mut text = format!("`{}` of `{dbs}`", webhook.events.join("`, `"));
    text += &match &webhook.filter {
        None => String::new(),
        Some(Filter::Selector(selector)) => format!(", of documents that match {selector}"),
        Some(Filter::DocIds(ids)) => format!(", of {} documents named by `doc_ids`", ids.len()),
        Some(Filter::View(view)) => format!(", of documents for which the view `{view}` emits"),
        Some(Filter::Function { name, .. }) => format!(", of documents that the filter `{name}` passes"),
    };
    text += if webhook.design_docs { ", design documents too" } else { ", not of design documents" };
    text += if webhook.include_docs { ", with the document" } else { ", without the document" };
    text
}

/// When a replication counts as what.
fn of_replications(webhook: &Webhook) -> Vec<(&'static str, String)> {
    let Polling { interval, transitions } = &webhook.polling;
    let first = match webhook.since {
        Since::Now => "what is so at the first start is known, not told",
        Since::Beginning => "what is so at the first start is told once",
    };
    let counts = match transitions.confirm_polls {
        1 => "a state counts at once".to_owned(),
        n => format!("a state counts when seen {n} times in a row, `completed` and `failed` at once"),
    };
    let stalled =
        format!("after {} with changes pending and without progress", short(transitions.stalled_after));
    let again = match transitions.retry_failed {
        None => "never: failed ones stay as they are".to_owned(),
        Some((times, after)) => {
            format!("{} after each failure, at most {times} times until it goes well", short(after))
        }
    };
    vec![
        ("asks", format!("every {}, and when a document changed; {counts}; {first}", short(*interval))),
        ("stalled", stalled),
        ("submitted again", again),
    ]
}

/// When an event is not tried any more.
fn given_up(webhook: &Webhook) -> String {
    let refused = match &webhook.dead_letter_on[..] {
        [] => String::new(),
        statuses => {
            let statuses: Vec<String> = statuses.iter().map(u16::to_string).collect();
            format!(
                "an event that is refused ({}) becomes a dead letter after {} tries; ",
                statuses.join(", "),
                webhook.dead_letter_after
            )
        }
    };
    let blamed = match webhook.concurrency {
        1 => format!(
            "one that the endpoint answers with other faults after {} (`concurrency = 1`: it holds up all others)",
            short(webhook.give_up_after)
        ),
        _ => "while the endpoint is to blame never: the checkpoint is held".to_owned(),
    };
    refused + &blamed
}

/// `8m 51s`
fn clock(time: std::time::Duration) -> String {
    let seconds = time.as_secs();
    let parts = [(seconds / 3600, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let parts: Vec<String> =
        parts.iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    match (parts.is_empty(), time.subsec_millis()) {
        (true, ms) => format!("{ms}ms"),
        (false, _) => parts.join(" "),
    }
}

fn as_json(
    webhook: &Webhook,
    endpoint: &str,
    settings: &[Setting],
    facts: &[(&'static str, String)],
    rights: &[Right],
) -> String {
    let settings = settings.iter().map(|Setting { section, key, value, origin }| {
        json!({"section": section, "key": key, "value": value, "origin": origin})
    });
    let rights = rights.iter().map(|Right { what, missing }| json!({"right": what, "missing": missing}));
    let seconds =
        |times: &[std::time::Duration]| times.iter().map(|time| time.as_secs_f64()).collect::<Vec<_>>();
    json!({
        "webhook": webhook.name,
        "endpoint": endpoint,
        "databases": webhook.db,
        "patterns": webhook.patterns.as_ref().map(ToString::to_string),
        "events": webhook.events,
        "retry_after_seconds": seconds(&webhook.retry_schedule),
        "retry_since_first_seconds": seconds(&retry::since_first(&webhook.retry_schedule)),
        "facts": facts.iter().map(|(what, text)| ((*what).to_owned(), text.clone().into())).collect::<serde_json::Map<_, _>>(),
        "settings": settings.collect::<Vec<_>>(),
        "rights": rights.collect::<Vec<_>>(),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_read_as_on_a_clock() {
        let check = |ms: u64, expected: &str| assert_eq!(clock(Duration::from_millis(ms)), expected);
        check(200, "200ms");
        check(1_000, "1s");
        check(51_000, "51s");
        check(60_000, "1m");
        check(531_000, "8m 51s");
        check(3_605_000, "1h 5s");
    }
}
