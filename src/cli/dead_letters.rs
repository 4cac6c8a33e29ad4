//! `dead-letters`: what endpoints refused, listed, shown, sent again, deleted.
//!
//! Guarantees that what is sent again or deleted is what was counted before it was asked about, and nothing stored
//! since; that both go through the daemon which runs the webhook, where there is one; and that all numbers come from
//! what is stored, so that they are right whoever was killed in between.

use std::collections::BTreeMap;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::Value;

use crate::cli::ask::{Office, count, number};
use crate::cli::common::{Setup, age, parse_since};
use crate::cli::out::{Colour, Out, complain};
use crate::cli::pause::answer_json;
use crate::cli::prompt::{Bar, confirm};
use crate::cli::run::Source;
use crate::cli::table::{Cell, Table};
use crate::config::Webhook;
use crate::couch::letters::{self, Filter, Stored};
use crate::couch::requests::{Arguments as Asked, Command, Letters};
use crate::couch::state_db::{self, DeadLetterClass};
use crate::error::{Error, Kind, Result};

/// Letters that a request can name singly; more are meant by what they have in common.
const NAMED_MAX: usize = 10_000;
/// Lines of `list` unless `--limit` says otherwise.
const LISTED: usize = 100;
/// Letters sent again in a second unless `--rate` says otherwise: gentle beside live events.
const RATE: u32 = 50;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd dead-letters list\n  \
    couch-hookd dead-letters replay --webhook orders --class refused\n  \
    couch-hookd dead-letters discard --webhook orders --since 2h --yes")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Letter,
}

#[derive(Debug, Subcommand)]
enum Letter {
    /// List them, oldest last, and how many there are of each class
    #[command(after_help = "Examples:\n  \
        couch-hookd dead-letters list --webhook orders --class refused\n  \
        couch-hookd dead-letters list --since 2h --json | jq -r .doc_id")]
    List {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        source: Source,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show one, whole
    #[command(after_help = "Example:\n  \
        couch-hookd dead-letters show msg_d84e177d9d10d726caf871be87650e17")]
    Show {
        /// Its id, the webhook-id
        id: String,
        #[command(flatten)]
        source: Source,
        /// On one line
        #[arg(long)]
        json: bool,
    },
    /// Send them again; each is deleted when it was delivered
    #[command(after_help = "Examples:\n  \
        couch-hookd dead-letters replay --webhook orders --class refused\n  \
        couch-hookd dead-letters replay msg_d84e177d9d10d726caf871be87650e17 --yes\n\n\
        The revision that was refused is sent, with its webhook-id and `hookd-replay: true`.\n\
        Where a newer one was delivered, the letter is reported as superseded and stays.\n\
        Live events go on meanwhile. Exit status 1 when letters stay.")]
    Replay {
        #[command(flatten)]
        which: Which,
        /// Letters sent in a second, at most [default: 50]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
        rate: Option<u32>,
        /// Also those whose document was delivered at a newer revision since
        #[arg(long)]
        even_if_superseded: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        source: Source,
        /// The numbers as one JSON object a webhook
        #[arg(long)]
        json: bool,
    },
    /// Delete them; what they are about is not told
    #[command(after_help = "Example:\n  \
        couch-hookd dead-letters discard --webhook orders --class suspect --yes")]
    Discard {
        #[command(flatten)]
        which: Which,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        source: Source,
        /// The numbers as one JSON object a webhook
        #[arg(long)]
        json: bool,
    },
}

/// Which letters are meant.
#[derive(Debug, Args)]
struct Which {
    /// These alone
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Of this webhook
    #[arg(long, value_name = "NAME")]
    webhook: Option<String>,
    /// Of this class
    #[arg(long)]
    class: Option<Class>,
    /// Stored since then: `2h`, `30m`, or a time such as 2026-11-21T20:00:00Z
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Why they were given up.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Class {
    /// The endpoint refuses them
    Refused,
    /// The endpoint fails at them
    Suspect,
    /// They held up all others for too long
    GivenUp,
}

impl Which {
    fn filter(&self) -> Result<Filter> {
        Ok(Filter {
            webhook: self.webhook.clone(),
            class: self.class.map(|class| match class {
                Class::Refused => DeadLetterClass::Refused,
                Class::Suspect => DeadLetterClass::Suspect,
                Class::GivenUp => DeadLetterClass::GivenUp,
            }),
            stored_since: self.since.as_deref().map(parse_since).transpose()?,
            stored_until: None,
            ids: self.ids.clone(),
        })
    }

    /// What is said when there is none.
    fn none(&self) -> &'static str {
        let all =
            self.ids.is_empty() && self.webhook.is_none() && self.class.is_none() && self.since.is_none();
        if all { "no dead letters" } else { "no such dead letters" }
    }

    /// All that are meant, newest first.
    fn find(&self, setup: &Setup) -> Result<Vec<Stored>> {
        let filter = self.filter()?;
        setup.welcome()?;
        let mut found = letters::list(&setup.server, &setup.config.hookd.state_db, &filter, usize::MAX)?;
        found.sort_by_key(|stored| std::cmp::Reverse(stored.letter.stored_at));
        Ok(found)
    }
}

/// Does what is asked.
pub(crate) fn run(arguments: Arguments, out: &mut Out) -> Result<u8> {
    match arguments.command {
        Letter::List { which, source, json } => list(&which, &Setup::load(source)?, json, out),
        Letter::Show { id, source, json } => show(&id, &Setup::load(source)?, json, out),
        Letter::Replay { which, rate, even_if_superseded, yes, source, json } => {
            let plan = Plan { rate: Some(rate.unwrap_or(RATE)), even_if_superseded, yes, json };
            replay(&which, &Setup::load(source)?, &plan, out)
        }
        Letter::Discard { which, yes, source, json } => {
            let plan = Plan { rate: None, even_if_superseded: false, yes, json };
            discard(&which, &Setup::load(source)?, &plan, out)
        }
    }
}

fn list(which: &Which, setup: &Setup, json: bool, out: &mut Out) -> Result<u8> {
    let found = which.find(setup)?;
    let limit = which.limit.unwrap_or(if json { usize::MAX } else { LISTED });
    if json {
        for stored in found.iter().take(limit) {
            out.json(&letter_json(stored))?;
        }
        return Ok(0);
    }
    if found.is_empty() {
        return out.line(which.none()).map(|()| 0);
    }
    let mut table = Table::new(&["ID", "WEBHOOK", "CLASS", ">STATUS", ">AGE", "DOCUMENT", "ANSWER"]);
    for Stored { letter, .. } in found.iter().take(limit) {
        table.row([
            (&letter.id).into(),
            (&letter.webhook).into(),
            Cell::coloured(letter.class.as_str(), colour(letter.class)),
            letter.status.map_or_else(|| "-".to_owned(), |status| status.to_string()).into(),
            age(letter.stored_at).into(),
            format!("{}/{} {}", letter.db, letter.doc_id, short(&letter.rev)).into(),
            (&letter.answer).into(),
        ]);
    }
    table.print(out)?;
    let more = match found.len().saturating_sub(limit) {
        0 => String::new(),
        n => format!("; {n} of them not shown (--limit)"),
    };
    out.line(&format!("{}: {}{more}", count(found.len() as u64, "dead letter"), by_class(&found)))?;
    Ok(0)
}

fn show(id: &str, setup: &Setup, json: bool, out: &mut Out) -> Result<u8> {
    let filter = Filter { ids: vec![id.to_owned()], ..Filter::default() };
    let state_db = &setup.config.hookd.state_db;
    setup.welcome()?;
    let Some(stored) = letters::list(&setup.server, state_db, &filter, 1)?.pop() else {
        return Err(Error::new(
            Kind::NotFound,
            format!("no dead letter `{id}`: delivered, discarded, or never stored"),
        ));
    };
    let text = letter_json(&stored);
    if json {
        return out.json(&text).map(|()| 0);
    }
    let members: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap_or_default();
    for (name, value) in &members {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        out.line(&format!("{name:<17} {value}"))?;
    }
    Ok(0)
}

/// What goes for all letters of one `replay` or `discard`.
struct Plan {
    rate: Option<u32>,
    even_if_superseded: bool,
    yes: bool,
    json: bool,
}

fn replay(which: &Which, setup: &Setup, plan: &Plan, out: &mut Out) -> Result<u8> {
    let groups = groups(which, setup)?;
    let n_letters: usize = groups.values().map(Vec::len).sum();
    if !announce(which, &groups, "to send again", plan, out)? {
        return Ok(u8::from(n_letters > 0));
    }
    let webhooks = groups.keys().map(|name| setup.webhook(name)).collect::<Result<Vec<_>>>()?;
    let office = Office::open(setup)?;
    for webhook in &webhooks {
        refuse_paused(&office, webhook)?;
    }
    let mut n_stay = 0;
    for (webhook, letters) in webhooks.into_iter().zip(groups.values()) {
        let asked = Asked {
            letters: Some(meant(which, letters)?),
            even_if_superseded: plan.even_if_superseded,
            rate: plan.rate,
            ..Asked::default()
        };
        let (mut bar, all) = (Bar::new(), letters.len() as u64);
        let done = office.have_done(webhook, Command::Replay, asked, &mut |request| {
            let text = format!("{} delivered", number(request, "delivered"));
            bar.show(all - number(request, "left").min(all), all, &text);
            Ok(())
        })?;
        bar.clear();
        n_stay += number(&done, "left");
        if plan.json {
            let mut answer = done.answer.clone();
            answer.insert("webhook".to_owned(), webhook.name.as_str().into());
            out.json(&answer_json(&answer))?;
            continue;
        }
        for example in done.answer.get("stay").and_then(Value::as_array).into_iter().flatten() {
            let text = |name: &str| example.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
            out.line(&format!("{}  {}/{}: {}", text("id"), text("db"), text("doc_id"), text("why")))?;
        }
        let counts =
            ["superseded", "refused", "failed", "gone"].into_iter().map(|name| (name, number(&done, name)));
        let stay: Vec<String> =
            counts.filter(|(_, n)| *n > 0).map(|(name, n)| format!("{n} {name}")).collect();
        let stay = if stay.is_empty() { String::new() } else { format!("; {} stay", stay.join(", ")) };
        let hint = match number(&done, "superseded") {
            0 => "",
            _ => " (`--even-if-superseded` sends what is superseded)",
        };
        let (name, delivered) = (&webhook.name, number(&done, "delivered"));
        out.line(&format!(
            "webhook `{name}`: {delivered} of {} delivered{stay}{hint}",
            count(all, "dead letter")
        ))?;
    }
    office.close()?;
    Ok(u8::from(n_stay > 0))
}

/// A webhook that is held back would send nothing, for as long as it is.
fn refuse_paused(office: &Office, webhook: &Webhook) -> Result<()> {
    let shared = &office.shared;
    let record = state_db::read_record(&shared.server, &shared.state_db, &webhook.name)?.unwrap_or_default();
    if webhook.paused || record.paused_since.is_some() || record.gone_since.is_some() {
        let name = &webhook.name;
        let found =
            format!("webhook `{name}` is paused and sends nothing; `couch-hookd resume {name}` first");
        return Err(Error::new(Kind::BadRequest, found));
    }
    Ok(())
}

fn discard(which: &Which, setup: &Setup, plan: &Plan, out: &mut Out) -> Result<u8> {
    let groups = groups(which, setup)?;
    let n_letters: usize = groups.values().map(Vec::len).sum();
    if !announce(which, &groups, "to delete", plan, out)? {
        return Ok(u8::from(n_letters > 0));
    }
    let office = Office::open(setup)?;
    for (name, letters) in &groups {
        let letters = meant(which, letters)?;
        let n_discarded = match setup.config.webhooks.iter().find(|webhook| webhook.name == *name) {
            Some(webhook) => {
                let asked = Asked { letters: Some(letters), ..Asked::default() };
                let done = office.have_done(webhook, Command::Discard, asked, &mut |_| Ok(()))?;
                number(&done, "discarded")
            }
            // Configured no more: nobody counts them.
            None => {
                let (filter, mut bar) = (Filter::of(name, &letters), Bar::new());
                let all = letters.n_letters;
                let shared = &office.shared;
                let gone = letters::discard(&shared.server, &shared.state_db, &filter, &mut |n| {
                    bar.show(n as u64, all, "deleted");
                })?;
                gone.len() as u64
            }
        };
        if plan.json {
            out.json(&serde_json::json!({"webhook": name, "discarded": n_discarded}).to_string())?;
        } else {
            out.line(&format!("webhook `{name}`: {} deleted", count(n_discarded, "dead letter")))?;
        }
    }
    office.close()?;
    Ok(0)
}

/// What is meant, by webhook.
fn groups(which: &Which, setup: &Setup) -> Result<BTreeMap<String, Vec<Stored>>> {
    let mut found = which.find(setup)?;
    found.truncate(which.limit.unwrap_or(usize::MAX));
    let mut groups: BTreeMap<String, Vec<Stored>> = BTreeMap::new();
    for stored in found {
        groups.entry(stored.letter.webhook.clone()).or_default().push(stored);
    }
    Ok(groups)
}

/// Says how many there are, and asks; whether to go on.
fn announce(
    which: &Which,
    groups: &BTreeMap<String, Vec<Stored>>,
    what: &str,
    plan: &Plan,
    out: &mut Out,
) -> Result<bool> {
    if groups.is_empty() {
        if !plan.json {
            out.line(which.none())?;
        }
        return Ok(false);
    }
    if !plan.json {
        for (name, letters) in groups {
            let n = count(letters.len() as u64, "dead letter");
            out.line(&format!("webhook `{name}`: {n} {what} ({})", by_class(letters)))?;
        }
    }
    let go_on = confirm(out, plan.yes, "go on?")?;
    if !go_on {
        complain("nothing was done");
    }
    Ok(go_on)
}

/// What a request says: by name where that is how they were chosen, else by what they have in common.
fn meant(which: &Which, letters: &[Stored]) -> Result<Letters> {
    let by_name = !which.ids.is_empty() || which.limit.is_some();
    if by_name && letters.len() > NAMED_MAX {
        let found = format!("expected at most {NAMED_MAX} letters with --limit, got {}", letters.len());
        return Err(Error::new(Kind::Config, found));
    }
    let filter = which.filter()?;
    Ok(Letters {
        class: filter.class,
        stored_since: filter.stored_since,
        stored_until: letters.iter().map(|stored| stored.letter.stored_at).max(),
        ids: match by_name {
            true => letters.iter().map(|stored| stored.letter.id.clone()).collect(),
            false => Vec::new(),
        },
        n_letters: letters.len() as u64,
    })
}

/// `600 refused, 400 suspect`.
fn by_class(letters: &[Stored]) -> String {
    let classes = [DeadLetterClass::Refused, DeadLetterClass::Suspect, DeadLetterClass::GivenUp];
    let counted = classes
        .map(|class| (letters.iter().filter(|stored| stored.letter.class == class).count(), class.as_str()));
    let counted = counted.into_iter().filter(|(n, _)| *n > 0);
    counted.map(|(n, class)| format!("{n} {class}")).collect::<Vec<_>>().join(", ")
}

fn colour(class: DeadLetterClass) -> Colour {
    match class {
        DeadLetterClass::Suspect => Colour::Yellow,
        DeadLetterClass::Refused | DeadLetterClass::GivenUp => Colour::Red,
    }
}

/// `3-9f1a2b…`.
fn short(rev: &str) -> String {
    match rev.char_indices().nth(8) {
        Some((at, _)) => format!("{}…", &rev[..at]),
        None => rev.to_owned(),
    }
}

fn letter_json(stored: &Stored) -> String {
    serde_json::to_string(&stored.letter).expect("a letter of texts is always JSON")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_cut_for_people() {
        assert_eq!(short("3-9f1a2b3c4d"), "3-9f1a2b…");
        assert_eq!(short("3-x"), "3-x");
    }
}
