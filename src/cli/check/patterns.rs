//! What a webhook's patterns find now, and whether we may look.
//!
//! Guarantees that the list is read page by page and not kept.

use crate::cli::check::report::{Level, Report};
use crate::config::Hookd;
use crate::couch::client::Server;
use crate::couch::databases::Walk;
use crate::error::{Kind, Result};
use crate::pure::pattern::Pattern;

/// Names that are shown.
const SHOWN_MAX: usize = 5;

/// Says which databases are found.
pub(crate) fn check(
    server: &Server,
    hookd: &Hookd,
    webhook: &str,
    pattern: &Pattern,
    is_admin: bool,
    report: &mut Report<'_>,
) -> Result<()> {
    let subject = format!("webhook `{webhook}`, databases `{pattern}`");
    let found = match find(server, &hookd.state_db, pattern) {
        Ok(found) => found,
        Err(error) if error.kind() == Kind::Forbidden => {
            let who = server.username().map_or_else(|| "nobody".to_owned(), |name| format!("`{name}`"));
            let text = format!(
                "{error}; a pattern needs a server admin, who may list databases, and we are {who}: give `username` and \
                 `password` of one in [hookd], or in COUCHDB_USER and COUCHDB_PASSWORD"
            );
            return report.say(Level::Error, &subject, &text);
        }
        Err(error) => return report.say(Level::Error, &subject, &error.to_string()),
    };
    report.say(if found.n == 0 { Level::Warning } else { Level::Ok }, &subject, &found.text())?;
    if pattern.would_match(&hookd.state_db) {
        let text = format!("`{}` is [hookd] state_db, which no pattern finds", hookd.state_db);
        report.say(Level::Ok, &subject, &text)?;
    }
    if !is_admin {
        let text = "we are no server admin: of databases that we may not read nothing is told, and without \
            `_db_updates` changes are seen later";
        report.say(Level::Warning, &subject, text)?;
    }
    Ok(())
}

#[derive(Default)]
struct Found {
    n: usize,
    first: Vec<String>,
}

fn find(server: &Server, state_db: &str, pattern: &Pattern) -> Result<Found> {
    let (mut walk, mut found) = (Walk::default(), Found::default());
    loop {
        let page = walk.next(server)?;
        if page.is_empty() {
            return Ok(found);
        }
        for name in page.into_iter().filter(|name| pattern.matches(name, state_db)) {
            found.n += 1;
            if found.first.len() < SHOWN_MAX {
                found.first.push(name);
            }
        }
    }
}

impl Found {
    fn text(&self) -> String {
        let names = self.first.join("`, `");
        match self.n {
            0 => "finds no database; one that appears is read from its beginning".to_owned(),
            1 => format!("finds 1 database now: `{names}`"),
            n if n > self.first.len() => format!("finds {n} databases now: `{names}`, ..."),
            n => format!("finds {n} databases now: `{names}`"),
        }
    }
}
