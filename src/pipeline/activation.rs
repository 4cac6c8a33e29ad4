//! The start of a webhook: its record in `state_db`, and the moment that `since = now` means.
//!
//! Guarantees (DESIGN §4, §7): `now` is resolved once, at the very first start; every database that exists then
//! has a mark and a checkpoint before the record that says so is written, so that a kill in between begins the
//! first start anew and a kill after it loses nothing. Whatever appears later is read from its beginning.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{self, Since};
use crate::couch::client::Generation;
use crate::couch::feed;
use crate::couch::local_docs;
use crate::couch::requests::{self, Command, Progress, Request};
use crate::couch::roster_docs;
use crate::couch::state_db::{self, WebhookRecord};
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::starting_points;
use crate::pipeline::store::{change_record, list_suspects};
use crate::pure::checkpoint::{Checkpoint, Mark};
use crate::pure::dispatch::SuspectLetter;
use crate::pure::message::Watch;
use crate::pure::pattern::Pattern;
use crate::pure::remembered;
use crate::pure::roster::Entry;
use crate::sys;

/// Whose this is takes the starting points of a webhook that several daemons share; no database has this name.
const STARTING_POINTS: &str = "/starting points";

/// What a webhook starts with.
#[derive(Debug)]
pub struct Active {
    /// Its record as it is now.
    pub record: WebhookRecord,
    /// Whether this was its first start.
    pub first: bool,
    /// Letters that the daemon itself sends again, each with its database.
    pub suspects: Vec<(String, SuspectLetter)>,
    /// What is known of databases that are found by pattern.
    pub databases: Vec<(String, Entry)>,
    /// To write that with.
    pub bucket_revs: BTreeMap<u8, String>,
    /// Dead letters that are stored, counted up to the limit.
    pub n_letters: u64,
    /// More of them pause the webhook.
    pub letters_max: u64,
    /// Requests to send letters again that are not done.
    pub replays: Vec<Request>,
}

/// Whether this webhook was active before with the same configuration.
///
/// # Errors
/// As reading the record.
pub fn is_known(shared: &Shared, webhook: &config::Webhook) -> Result<bool> {
    let record = state_db::read_record(&shared.server, &shared.state_db, &webhook.name)?;
    Ok(record.is_some_and(|record| record.fingerprint == webhook.fingerprint))
}

/// Brings the webhook's record up to date, making it at the first start. Whether `is_wanted` elsewhere is asked
/// while databases are walked through, which may take minutes.
///
/// # Errors
/// Whatever CouchDB answered, `Stopped` when wanted elsewhere; nothing is half done that a second call would not
/// complete.
pub fn activate(shared: &Shared, webhook: &config::Webhook, is_wanted: &dyn Fn() -> bool) -> Result<Active> {
    let Shared { server, state_db, .. } = shared;
    let stored = state_db::read_record(server, state_db, &webhook.name)?;
    let first = stored.as_ref().is_none_or(|record| record.activated_at.is_none());
    let patterns = webhook.patterns.as_ref().map(ToString::to_string);
    let is_taken = stored.as_ref().is_some_and(|record| record.patterns == patterns);
    // Of those that share it one takes the starting points, and the others wait: after the first has begun, a database
    // that is there without a checkpoint is a new one.
    let is_ours = shared.hold.share().is_none_or(|share| share.is_mine(STARTING_POINTS));
    if (first || !is_taken) && !is_ours {
        return Err(Error::new(Kind::Stopped, "another daemon gives the databases their starting points"));
    }
    let databases = if first { first_start(shared, webhook)? } else { BTreeMap::new() };
    let (mut found, mut bucket_revs) = (Vec::new(), BTreeMap::new());
    if let Some(pattern) = &webhook.patterns {
        (found, bucket_revs) = roster_docs::read_all(server, state_db, &webhook.name)
            .context(|| "failed to read what is known of databases".to_owned())?;
        if !is_taken && webhook.since == Since::Now {
            let record = stored.as_ref();
            let before = record.and_then(|record| Pattern::parse(record.patterns.as_deref()?));
            let was_watched = |db: &str| {
                before.as_ref().is_some_and(|before| before.matches(db, state_db))
                    || record.is_some_and(|record| record.databases.contains_key(db))
            };
            starting_points::take(shared, webhook, pattern, &was_watched, &mut found, is_wanted)?;
            starting_points::store(shared, webhook, &found, &mut bucket_revs)?;
        }
    }
    shared.hold.check()?;
    let record = change_record(server, state_db, &webhook.name, |record| {
        if record.activated_at.is_none() {
            record.activated_at = Some(sys::wall());
            record.databases = databases.clone();
            record.since = Some(since_text(&webhook.since).to_owned());
        }
        record.patterns.clone_from(&patterns);
        if record.fingerprint != webhook.fingerprint {
            // A changed section is how an operator says that the endpoint is another one now. One that was paused
            // by a command before it ever ran has none yet.
            if !record.fingerprint.is_empty() {
                record.end_pause();
            }
            record.fingerprint = webhook.fingerprint.clone();
        }
    })
    .context(|| "failed to write the webhook's record".to_owned())?;
    let suspects = list_suspects(server, state_db, &webhook.name)?;
    // Whoever resumes a webhook with too many takes so many more.
    let letters_max = shared.hookd.dead_letters_max + record.letters_accepted;
    let n_letters = state_db::count_dead_letters(server, state_db, &webhook.name, letters_max + 1)?;
    let mut replays = requests::list(server, state_db).context(|| "failed to list requests".to_owned())?;
    replays.retain(|request| {
        let ours = request.webhook == webhook.name && request.command == Command::Replay;
        ours && request.state == Progress::Open
    });
    Ok(Active { record, first, suspects, databases: found, bucket_revs, n_letters, letters_max, replays })
}

/// What only sends letters again starts with; changes nothing.
///
/// # Errors
/// As reading the record.
pub fn for_replays(shared: &Shared, webhook: &config::Webhook) -> Result<Active> {
    let record = state_db::read_record(&shared.server, &shared.state_db, &webhook.name)?.unwrap_or_default();
    let (suspects, replays) = (Vec::new(), Vec::new());
    let (databases, bucket_revs) = match webhook.patterns {
        Some(_) => roster_docs::read_all(&shared.server, &shared.state_db, &webhook.name)?,
        None => Default::default(),
    };
    let (n_letters, letters_max) = (0, u64::MAX);
    Ok(Active { record, first: false, suspects, databases, bucket_revs, n_letters, letters_max, replays })
}

/// Gives every database that exists its mark and, for `now`, its first checkpoint.
fn first_start(shared: &Shared, webhook: &config::Webhook) -> Result<BTreeMap<String, Mark>> {
    let generation = shared.server.welcome()?.generation;
    let mut databases = BTreeMap::new();
    for db in &webhook.db {
        let Some(started) = start_database(shared, webhook, db, generation)? else { continue };
        databases.insert(db.clone(), started.mark);
    }
    Ok(databases)
}

/// A database that is ready to be told.
pub(crate) struct Started {
    /// The mark that it bears.
    pub(crate) mark: Mark,
    /// Its checkpoint was written just now, at its end: there is nothing to tell yet.
    pub(crate) is_at_end: bool,
}

/// Gives a database its mark and, for `now`, its first checkpoint; `None` when it does not exist.
pub(crate) fn start_database(
    shared: &Shared,
    webhook: &config::Webhook,
    db: &str,
    generation: Generation,
) -> Result<Option<Started>> {
    let Shared { server, key, .. } = shared;
    let no_pause = |_: Duration| {};
    let opened = local_docs::open(server, generation, db, &webhook.name, key, None, None, &no_pause);
    let opened = match opened {
        // Not there yet: read from its beginning when it appears.
        Err(error) if error.kind() == Kind::NotFound => return Ok(None),
        opened => opened.context(|| format!("database `{db}`"))?,
    };
    // One that is there is of an attempt that was killed before the record was written, or the record was lost: then
    // it is what knows best, and where it is not believed, the beginning loses nothing.
    let is_at_end = webhook.since == Since::Now && opened.checkpoint_rev.is_none();
    if is_at_end {
        let through_seq = match webhook.watch {
            Watch::Replications | Watch::Databases => remembered::position_now(),
            Watch::Changes | Watch::Daemon => {
                feed::resolve_now(server, db, generation).context(|| format!("database `{db}`"))?
            }
        };
        let checkpoint = Checkpoint {
            through_seq,
            mark: opened.mark,
            delivered: Vec::new(),
            time: sys::wall(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seek: None,
        };
        // Who tells it by now began before this `now`, or will begin behind it.
        shared.hold.check()?;
        local_docs::write_checkpoint(server, db, &webhook.name, key, &checkpoint, None)
            .context(|| format!("database `{db}`: failed to write the first checkpoint"))?;
    }
    Ok(Some(Started { mark: opened.mark, is_at_end }))
}

/// `since` as it is written in a configuration.
pub fn since_text(since: &Since) -> &'static str {
    match since {
        Since::Now => "now",
        Since::Beginning => "0",
    }
}
