//! Which rights a webhook needs at CouchDB, and whether the login has them; found out by reading alone.
//!
//! Guarantees that a refused login is tried once and not again (five wrong ones lock the account). What only writing
//! would show is left to `check`.

use http::Method;
use serde::Deserialize;

use crate::cli::common::Setup;
use crate::config::Webhook;
use crate::couch::client::db_path;
use crate::error::{Kind, Result};
use crate::pure::message::Watch;

/// One right.
#[derive(Debug)]
pub(crate) struct Right {
    /// What it allows, and what that is for.
    pub(crate) what: String,
    /// Why we do not have it; `None` when we do.
    pub(crate) missing: Option<String>,
}

/// Asks CouchDB for each right that the webhook needs.
pub(crate) fn ask(setup: &Setup, webhook: &Webhook) -> Vec<Right> {
    let server = &setup.server;
    let who = match roles(setup) {
        Ok(who) => who,
        Err(error) => {
            let what = format!("a login at CouchDB {}", server.base_url());
            return vec![Right { what, missing: Some(error.to_string()) }];
        }
    };
    let mut rights = vec![Right {
        what: format!("a login at CouchDB {}: {}", server.base_url(), who.text()),
        missing: None,
    }];
    for db in &webhook.db {
        let mut what = match webhook.watch {
            Watch::Replications => format!(
                "server admin: asks the scheduler about `{db}`, reads its documents, writes `_local` documents"
            ),
            Watch::Changes | Watch::Daemon | Watch::Databases => {
                format!("member of `{db}`: reads its changes, writes two `_local` documents")
            }
        };
        let missing = match (exists(setup, db), needs_admin(db) && !who.is_admin) {
            (Err(error), _) if error.kind() == Kind::NotFound => {
                what = match webhook.watch {
                    Watch::Replications => {
                        format!("`{db}` does not exist; once it does its replications are told")
                    }
                    _ => format!("`{db}` does not exist; once it does it is read from its beginning"),
                };
                None
            }
            (Err(error), _) => Some(error.to_string()),
            (Ok(()), true) => Some(
                "only a server admin reads it; give `username` and `password` of one in [hookd]".to_owned(),
            ),
            (Ok(()), false) => None,
        };
        rights.push(Right { what, missing });
    }
    if let Some(pattern) = &webhook.patterns {
        let what = format!("server admin: lists databases to find `{pattern}`, and hears of changes in them");
        let why = "we are none; give `username` and `password` of one in [hookd]";
        rights.push(Right { what, missing: (!who.is_admin).then(|| why.to_owned()) });
    }
    if let Some(selection) = &webhook.selection {
        let what = format!(
            "server admin: lists databases, hears of changes in `{selection}`, writes a `_local` document into each"
        );
        let why = "we are none; give `username` and `password` of one in [hookd]";
        rights.push(Right { what, missing: (!who.is_admin).then(|| why.to_owned()) });
    }
    let state_db = &setup.config.hookd.state_db;
    let (what, missing) = match exists(setup, state_db) {
        Ok(()) => (format!("member of `{state_db}`: dead letters, records"), None),
        Err(error) if error.kind() == Kind::NotFound => {
            let why = "there is none, and only a server admin makes one; `couch-hookd check` shows how";
            (format!("make `{state_db}`"), (!who.is_admin).then(|| why.to_owned()))
        }
        Err(error) => (format!("member of `{state_db}`: dead letters, records"), Some(error.to_string())),
    };
    rights.push(Right { what, missing });
    rights
}

/// Who we are to CouchDB.
struct Who {
    name: Option<String>,
    is_admin: bool,
}

impl Who {
    fn text(&self) -> String {
        let name = self.name.as_ref().map_or_else(|| "nobody".to_owned(), |name| format!("`{name}`"));
        format!("{name}, {}", if self.is_admin { "a server admin" } else { "no server admin" })
    }
}

fn roles(setup: &Setup) -> Result<Who> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Session {
        user_ctx: UserContext,
    }
    #[derive(Deserialize)]
    struct UserContext {
        name: Option<String>,
        roles: Vec<String>,
    }
    let UserContext { name, roles } = setup.server.get_json::<Session>("/_session")?.user_ctx;
    Ok(Who { name, is_admin: roles.iter().any(|role| role == "_admin") })
}

/// Whether a database is there and lets us in.
fn exists(setup: &Setup, db: &str) -> Result<()> {
    setup.server.request(&Method::GET, &db_path(db, &[]), None, &[]).map(drop)
}

/// Databases whose changes CouchDB shows to admins alone.
fn needs_admin(db: &str) -> bool {
    let last = db.rsplit('/').next().unwrap_or(db);
    ["_users", "_replicator"].contains(&last)
}
