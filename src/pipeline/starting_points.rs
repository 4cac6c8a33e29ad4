//! What `since = now` means for thousands of databases: each gets its mark and a checkpoint, at a pace.
//!
//! Guarantees that a database that exists when the walk comes by is told from that moment on, and one that appears
//! later from its beginning, also when the pattern is changed before it could be read; that a walk that is broken off, or
//! killed, begins anew and finds done what was done; that a database that has a place already keeps it, and is looked at;
//! and that CouchDB opens no more than `sweep_rate` databases a second for it.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use crate::config;
use crate::couch::databases::{Info, Looker, Walk};
use crate::couch::roster_docs;
use crate::error::{Context, Error, Kind, Result};
use crate::pipeline::Shared;
use crate::pipeline::activation::{Started, start_database};
use crate::pipeline::complaints::Complaint;
use crate::pure::pattern::Pattern;
use crate::pure::roster::{self, Entry};
use crate::sys;

/// How often it is said how far the walk has come ...
const SAY_EVERY: Duration = Duration::from_secs(10);
/// ... and drawn, on a terminal.
const DRAW_EVERY: Duration = Duration::from_millis(200);
/// A pause is cut into pieces of this, to see whether we are wanted elsewhere.
const PIECE: Duration = Duration::from_millis(50);

/// Gives their starting points to all databases of the pattern that are not known yet, nor were the webhook's
/// (`was_watched`) before its pattern was changed: one of those that is not known has come since, and is read from its
/// beginning.
///
/// # Errors
/// As asking CouchDB; `Stopped` when wanted elsewhere.
pub(crate) fn take(
    shared: &Shared,
    webhook: &config::Webhook,
    pattern: &Pattern,
    was_watched: &dyn Fn(&str) -> bool,
    known: &mut Vec<(String, Entry)>,
    is_wanted: &dyn Fn() -> bool,
) -> Result<()> {
    let server = &shared.server;
    let generation = server.welcome()?.generation;
    let (mut walk, mut names) = (Walk::default(), Vec::new());
    let before: HashSet<String> = known.iter().map(|(db, _)| db.clone()).collect();
    loop {
        let page = walk.next(server).context(|| "failed to list databases".to_owned())?;
        if page.is_empty() {
            break;
        }
        let ours =
            |db: &String| pattern.matches(db, &shared.state_db) && !before.contains(db) && !was_watched(db);
        names.extend(page.into_iter().filter(ours));
    }
    let mut looker = Looker::new(server);
    looker.find_out()?;
    let (mut pace, mut complaint) = (Pace::new(shared.hookd.sweep_rate), Complaint::default());
    let (mut say_at, mut draw_at) = (sys::now() + SAY_EVERY, sys::now());
    let (mut n_done, mut is_drawn) = (0, false);
    for some in names.chunks(looker.at_once().max(1)) {
        // Before the checkpoint: what is written in between makes another fingerprint, and a look.
        for (db, info) in looker.infos(some)? {
            pace.wait(is_wanted)?;
            n_done += 1;
            let Info::Seen(fingerprint) = info else { continue };
            match start_database(shared, webhook, &db, generation) {
                Ok(Some(Started { mark, is_at_end })) => {
                    // Behind a place that it had already there may be something that was not told.
                    let clean = if is_at_end { vec![fingerprint] } else { Vec::new() };
                    known.push((db, Entry { mark: Some(mark), clean }));
                }
                Ok(None) => {}
                Err(error) if !concerns_one(error.kind()) => return Err(error),
                Err(error) => {
                    if complaint.is_news(error.kind(), sys::now()) {
                        log::error!(
                            "webhook `{}`: {error}; it is read from its beginning when it can be (others may have the \
                             same fault)",
                            webhook.name
                        );
                    }
                }
            }
        }
        let now = sys::now();
        if now >= draw_at {
            draw_at = now + DRAW_EVERY;
            let what = format!("webhook {}: starting points", webhook.name);
            is_drawn = crate::log::progress(&what, n_done, names.len());
        }
        if now >= say_at && !is_drawn {
            say_at = now + SAY_EVERY;
            log::info!(
                "webhook `{}` starts for the first time: {n_done} of {} databases have their starting point",
                webhook.name,
                names.len()
            );
        }
    }
    crate::log::progress("", 1, 1);
    log::info!("webhook `{}`: `{pattern}` are {} databases now", webhook.name, known.len());
    Ok(())
}

/// Stores what is known of them, before the record says that they have their starting points.
///
/// # Errors
/// As writing.
pub(crate) fn store(
    shared: &Shared,
    webhook: &config::Webhook,
    known: &[(String, Entry)],
    revs: &mut BTreeMap<u8, String>,
) -> Result<()> {
    let mut buckets: BTreeMap<u8, Vec<(String, Entry)>> = BTreeMap::new();
    for (db, entry) in known {
        buckets.entry(roster::bucket(db)).or_default().push((db.clone(), entry.clone()));
    }
    for (bucket, entries) in buckets {
        let rev = revs.get(&bucket).map(String::as_str);
        let rev = roster_docs::write(&shared.server, &shared.state_db, &webhook.name, bucket, &entries, rev)
            .context(|| "failed to store what is known of databases".to_owned())?;
        revs.insert(bucket, rev);
    }
    Ok(())
}

/// Whether a fault is about one database: the others go on.
fn concerns_one(kind: Kind) -> bool {
    matches!(kind, Kind::Forbidden | Kind::Server | Kind::Malformed | Kind::TooLong | Kind::BadRequest)
}

/// So many a second, evenly.
struct Pace {
    each: Duration,
    due: Instant,
}

impl Pace {
    fn new(a_second: u32) -> Pace {
        Pace { each: Duration::from_secs(1) / a_second.max(1), due: sys::now() }
    }

    /// Waits for the turn.
    fn wait(&mut self, is_wanted: &dyn Fn() -> bool) -> Result<()> {
        loop {
            if is_wanted() {
                return Err(Error::new(Kind::Stopped, "something else is to be done first"));
            }
            let now = sys::now();
            if now >= self.due {
                // Late is late: a slow CouchDB is not asked faster afterwards.
                self.due = now.max(self.due + self.each);
                return Ok(());
            }
            sys::sleep((self.due - now).min(PIECE));
        }
    }
}
