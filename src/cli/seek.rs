//! `seek`: setting a webhook to another place in its databases, after saying how many changes that is.

use clap::Args;
use serde_json::{Value, json};

use crate::cli::ask::Office;
use crate::cli::common::Setup;
use crate::cli::out::Out;
use crate::cli::pause::answer_json;
use crate::cli::prompt::confirm;
use crate::cli::run::Source;
use crate::cli::table::Table;
use crate::config::Webhook;
use crate::couch::feed;
use crate::couch::requests::{Arguments as Asked, Command};
use crate::couch::{local_docs, state_db};
use crate::error::{Context, Result};
use crate::pipeline::obey;
use crate::pure::seq::Seq;

/// Changes are counted up to so many where CouchDB does not say how many there are.
const COUNTED_MAX: u64 = 100_000;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd seek orders --to 0 --dry-run\n  \
    couch-hookd seek orders --to 0\n  \
    couch-hookd seek tenants --db tenant-7 --to now --yes\n  \
    couch-hookd seek orders --to 42-g1AAAACbeJzLYWBgYMpgTmEQTM4vTc5ISXIwNDLXMwBC\n\n\
    `0` tells everything that the databases hold again, with the ids it had. `now` leaves\n\
    out what was not told yet. A seq stands in every event (`seq`) and in dead letters.")]
pub(crate) struct Arguments {
    /// The webhook
    name: String,
    /// Where to go on: `now`, `0`, or a seq
    #[arg(long, value_name = "now|0|SEQ")]
    to: String,
    /// Only in this database of the webhook
    #[arg(long, value_name = "DATABASE")]
    db: Option<String>,
    /// Say how many changes that is, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    source: Source,
    /// The places and what they mean as one JSON object
    #[arg(long)]
    json: bool,
}

/// What a seek means for one database.
struct Step {
    db: String,
    to: Seq,
    /// Changes behind the new place, and behind the present one.
    ahead: u64,
    ahead_now: u64,
}

/// Sets a webhook to another place.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    let Arguments { name, to, db, dry_run, yes, source, json } = arguments;
    let setup = Setup::load(source)?;
    let webhook = setup.webhook(&name)?;
    obey::check_has_places(webhook)?;
    let office = Office::open(&setup)?;
    let asked = Asked { to: Some(place_value(&to)), db, ..Asked::default() };
    let steps = look(&office, webhook, &asked)?;
    if !json {
        show(&steps, out)?;
    }
    let done = if dry_run || !confirm(out, yes || json, "go on from there?")? {
        None
    } else {
        Some(office.have_done(webhook, Command::Seek, asked, &mut |_| Ok(()))?)
    };
    office.close()?;
    if json {
        let mut answer = done.as_ref().map(|done| done.answer.clone()).unwrap_or_default();
        let databases = steps.iter().map(|step| {
            json!({"db": step.db, "to": step.to.as_since(), "changes": step.ahead, "changes_before": step.ahead_now,
                "at_least": step.ahead >= COUNTED_MAX})
        });
        answer.insert("databases".to_owned(), databases.collect());
        answer.insert("done".to_owned(), done.is_some().into());
        return out.json(&answer_json(&answer)).map(|()| 0);
    }
    match done {
        Some(_) => out.line(&format!("webhook `{name}` goes on from there"))?,
        None => out.line("nothing was changed")?,
    }
    Ok(u8::from(done.is_none() && !dry_run))
}

/// A place as the request holds it: an integer of 1.x as a number, all else as a text.
fn place_value(to: &str) -> Value {
    match to.parse::<u64>() {
        Ok(number) => number.into(),
        Err(_) => to.into(),
    }
}

fn look(office: &Office, webhook: &Webhook, asked: &Asked) -> Result<Vec<Step>> {
    let shared = &office.shared;
    let record = state_db::read_record(&shared.server, &shared.state_db, &webhook.name)?.unwrap_or_default();
    let count = |db: &str, since: &Seq| {
        feed::count_after(&shared.server, db, since, webhook.filter.as_ref(), COUNTED_MAX)
            .context(|| format!("database `{db}`: its changes could not be counted"))
    };
    let places = obey::places(shared, webhook, asked)?;
    places
        .into_iter()
        .map(|(db, to)| {
            let seek = record.seeks.get(&db);
            let now = local_docs::position(&shared.server, &db, &webhook.name, &shared.key, seek)?;
            let now = now.map_or_else(Seq::zero, |checkpoint| checkpoint.through_seq);
            Ok(Step { ahead: count(&db, &to)?, ahead_now: count(&db, &now)?, db, to })
        })
        .collect()
}

fn show(steps: &[Step], out: &mut Out) -> Result<()> {
    let number = |n: u64| if n >= COUNTED_MAX { format!("at least {n}") } else { n.to_string() };
    let mut table = Table::new(&["DATABASE", "TO", ">CHANGES TO TELL", ">UNTIL NOW"]);
    for step in steps {
        table.row([
            (&step.db).into(),
            step.to.to_string().into(),
            number(step.ahead).into(),
            number(step.ahead_now).into(),
        ]);
    }
    table.print(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_integer_is_a_number_and_all_else_a_text() {
        assert_eq!(place_value("0"), json!(0));
        assert_eq!(place_value("42"), json!(42));
        assert_eq!(place_value("now"), json!("now"));
        assert_eq!(place_value("42-g1AAA"), json!("42-g1AAA"));
    }
}
