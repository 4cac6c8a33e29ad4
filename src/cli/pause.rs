//! `pause` and `resume`: stopping a webhook at its place, and ending any pause.

use clap::Args;

use crate::cli::ask::{Office, number};
use crate::cli::common::Setup;
use crate::cli::out::Out;
use crate::cli::run::Source;
use crate::config::Webhook;
use crate::couch::requests::{Arguments as Asked, Command, Request};
use crate::couch::state_db;
use crate::error::Result;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd pause orders --reason 'shop is being moved'\n  \
    couch-hookd pause orders --config /opt/couchdb/etc/local.ini\n\n\
    Reading and delivering end; the place in the feed is kept. `resume` ends it, and so\n\
    does a change of the webhook's section.")]
pub(crate) struct Pause {
    /// The webhook
    name: String,
    /// Why, for whoever looks at it later
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    source: Source,
    /// The answer as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    couch-hookd resume orders\n  \
    couch-hookd resume orders --config /opt/couchdb/etc/local.ini\n\n\
    Ends a pause by `pause`, by an endpoint that answered 410, and by too many dead\n\
    letters (so many more may come then). Tries a failing endpoint again at once.")]
pub(crate) struct Resume {
    /// The webhook
    name: String,
    #[command(flatten)]
    source: Source,
    /// The answer as one JSON object
    #[arg(long)]
    json: bool,
}

/// Stops a webhook.
pub(crate) fn pause(arguments: Pause, out: &mut Out) -> Result<u8> {
    let setup = Setup::load(arguments.source)?;
    let webhook = setup.webhook(&arguments.name)?;
    let office = Office::open(&setup)?;
    let asked = Asked { reason: arguments.reason, ..Asked::default() };
    let done = office.have_done(webhook, Command::Pause, asked, &mut |_| Ok(()))?;
    office.close()?;
    if arguments.json {
        return out.json(&answer_json(&done.answer)).map(|()| 0);
    }
    let name = &webhook.name;
    out.line(&format!("webhook `{name}` is paused; its place is kept. `couch-hookd resume {name}` ends it"))?;
    Ok(0)
}

/// Ends a pause.
pub(crate) fn resume(arguments: Resume, out: &mut Out) -> Result<u8> {
    let setup = Setup::load(arguments.source)?;
    let webhook = setup.webhook(&arguments.name)?;
    let office = Office::open(&setup)?;
    let done = resume_with(&office, webhook)?;
    office.close()?;
    if arguments.json {
        return out.json(&answer_json(&done.answer)).map(|()| 0);
    }
    let letters = match number(&done, "dead_letters") {
        0 => String::new(),
        n => format!(
            "; {} of it wait (`couch-hookd dead-letters list`)",
            crate::cli::ask::count(n, "dead letter")
        ),
    };
    out.line(&format!("webhook `{}` goes on where it stopped{letters}", webhook.name))?;
    Ok(0)
}

/// Ends whatever pause there is, through the daemon or here.
///
/// # Errors
/// `BadRequest` when its configuration pauses it; else as asking CouchDB.
fn resume_with(office: &Office, webhook: &Webhook) -> Result<Request> {
    office.have_done(webhook, Command::Resume, Asked::default(), &mut |_| Ok(()))
}

/// Ends a pause that nobody asked for (410, too many dead letters), after a test event was taken; whether there was
/// one. One by hand stays: whoever paused it had a reason that a test does not know.
///
/// # Errors
/// As asking CouchDB.
pub(crate) fn end_own_pause(setup: &Setup, webhook: &Webhook) -> Result<bool> {
    let (server, state_db) = (&setup.server, &setup.config.hookd.state_db);
    let record = state_db::read_record(server, state_db, &webhook.name)?.unwrap_or_default();
    let own = record.gone_since.is_some() || (record.paused_since.is_some() && record.paused_by.is_none());
    if !own || webhook.paused {
        return Ok(false);
    }
    let office = Office::open(setup)?;
    resume_with(&office, webhook)?;
    office.close().map(|()| true)
}

/// An answer as one line.
pub(crate) fn answer_json(answer: &serde_json::Map<String, serde_json::Value>) -> String {
    serde_json::to_string(answer).expect("an answer is JSON")
}
