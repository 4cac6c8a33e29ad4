//! Dead letters as a set: found by what they are about, counted, deleted.
//!
//! Guarantees that all of it is read from what is stored at that moment, in pages, and that what cannot be read as a
//! letter is left alone. Storing a single one is `state_db`'s.

use http::Method;
use serde::Deserialize;
use serde_json::json;

use crate::couch::all_docs;
use crate::couch::client::{Server, db_path};
use crate::couch::refusal::from_json;
use crate::couch::requests::Letters;
use crate::couch::state_db::{DeadLetter, DeadLetterClass, FULL_COMMIT};
use crate::error::{Context, Error, Kind, Result};
use crate::pure::message::WebhookId;

/// Letters read at once: about 600 bytes each.
pub const PAGE_ROWS: usize = 1_000;
/// Letters deleted with one request.
const DELETED_AT_ONCE: usize = 500;

/// Which letters.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Of this webhook alone.
    pub webhook: Option<String>,
    /// Of this class alone.
    pub class: Option<DeadLetterClass>,
    /// Stored at or after this.
    pub stored_since: Option<jiff::Timestamp>,
    /// Stored at or before this.
    pub stored_until: Option<jiff::Timestamp>,
    /// These alone, by id; empty = all.
    pub ids: Vec<String>,
}

impl Filter {
    /// What a request says.
    pub fn of(webhook: &str, letters: &Letters) -> Filter {
        Filter {
            webhook: Some(webhook.to_owned()),
            class: letters.class,
            stored_since: letters.stored_since,
            stored_until: letters.stored_until,
            ids: letters.ids.clone(),
        }
    }

    /// Whether a letter is meant.
    pub fn wants(&self, letter: &DeadLetter) -> bool {
        self.webhook.as_ref().is_none_or(|webhook| *webhook == letter.webhook)
            && self.class.is_none_or(|class| class == letter.class)
            && self.stored_since.is_none_or(|since| letter.stored_at >= since)
            && self.stored_until.is_none_or(|until| letter.stored_at <= until)
            && (self.ids.is_empty() || self.ids.contains(&letter.id))
    }
}

/// A letter, and the revision of its document.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Of the letter's own document.
    pub letter_rev: String,
    /// What it says.
    pub letter: DeadLetter,
}

/// One page of letters behind the id `after`, those that are wanted, and where the next page begins; `None` after
/// the last one.
///
/// # Errors
/// As [`Server::get_json`].
pub fn page(
    server: &Server,
    state_db: &str,
    filter: &Filter,
    after: Option<&str>,
) -> Result<(Vec<Stored>, Option<String>)> {
    // Ids are hex digits, which all sort before a `g`.
    let range = (after.unwrap_or("msg_"), "msg_g");
    let (rows, next) = all_docs::page(server, state_db, range, PAGE_ROWS)?;
    let letters = rows.into_iter().filter_map(|row| stored(row.doc?));
    Ok((letters.filter(|stored| filter.wants(&stored.letter)).collect(), next))
}

/// A stored document as a letter; `None` for one that somebody changed beyond reading.
fn stored(doc: serde_json::Value) -> Option<Stored> {
    let letter_rev = doc.get("_rev")?.as_str()?.to_owned();
    Some(Stored { letter_rev, letter: DeadLetter::deserialize(doc).ok()? })
}

/// All letters that are wanted, in the order of their ids, at most `max`.
///
/// # Errors
/// As [`page`].
pub fn list(server: &Server, state_db: &str, filter: &Filter, max: usize) -> Result<Vec<Stored>> {
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let (letters, next) = page(server, state_db, filter, after.as_deref())?;
        all.extend(letters);
        if all.len() >= max || next.is_none() {
            all.truncate(max);
            return Ok(all);
        }
        after = next;
    }
}

/// How many letters a webhook has.
///
/// # Errors
/// As [`page`].
pub fn count(server: &Server, state_db: &str, webhook: &str) -> Result<u64> {
    let filter = Filter { webhook: Some(webhook.to_owned()), ..Filter::default() };
    Ok(list(server, state_db, &filter, usize::MAX)?.len() as u64)
}

/// Deletes the letters that are wanted and gives their ids; `on_progress` gets how many are gone so far.
///
/// # Errors
/// As [`Server::request`]; what was deleted by then stays so.
pub fn discard(
    server: &Server,
    state_db: &str,
    filter: &Filter,
    on_progress: &mut dyn FnMut(usize),
) -> Result<Vec<WebhookId>> {
    let mut gone = Vec::new();
    let mut after = None;
    loop {
        let (letters, next) = page(server, state_db, filter, after.as_deref())?;
        for some in letters.chunks(DELETED_AT_ONCE) {
            delete(server, state_db, some)?;
            gone.extend(some.iter().filter_map(|stored| WebhookId::parse(&stored.letter.id)));
            on_progress(gone.len());
        }
        if next.is_none() {
            return Ok(gone);
        }
        after = next;
    }
}

/// Deletes these, with one request. One that has changed since it was read stays.
fn delete(server: &Server, state_db: &str, letters: &[Stored]) -> Result<()> {
    #[derive(Deserialize)]
    struct Refused {
        error: Option<String>,
    }
    let docs: Vec<_> = letters
        .iter()
        .map(|stored| json!({"_id": stored.letter.id, "_rev": stored.letter_rev, "_deleted": true}))
        .collect();
    let path = db_path(state_db, &["_bulk_docs"]);
    let body = json!({ "docs": docs }).to_string();
    let reply = server.request(&Method::POST, &path, Some(&body), &[FULL_COMMIT])?;
    let results: Vec<Refused> = from_json(&reply.body).context(|| format!("POST {path}"))?;
    let mut refused = results.iter().filter_map(|one| one.error.as_deref());
    match refused.find(|error| *error != "conflict") {
        Some(error) => Err(Error::new(Kind::Server, format!("a dead letter could not be deleted: {error}"))),
        None => Ok(()),
    }
}
